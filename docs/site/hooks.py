"""Hooks of mkdocs: add pages from the root of the repository, rewrite links to its files, refuse network resources."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT_PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""file in the root of the repository -> page of the site"""
LINK = re.compile(r"(?<!!)\[([^\]\[]+)\]\(([^)\s]+)\)")
LOADED = re.compile(r"""<(?:script|img|iframe|source)[^>]+src=["']?(?:https?:)?//|<link[^>]+href=["']?(?:https?:)?//""")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages from the root of the repository."""
    for source, page in ROOT_PAGES.items():
        text = (root(config) / source).read_text(encoding="utf-8")
        content = text.replace("](docs/", "](")
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Replace links to files of the repository that are not pages by the path of the file. Refuse missing files.

    The site has no address for these files, so a link to them would be broken.
    """
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def replace(match: re.Match[str]) -> str:
        text, target = match.groups()
        path = posixpath.normpath(posixpath.join(folder, target.partition("#")[0]))
        if "://" in target or target.startswith("#") or path.startswith("docs/"):
            return match.group(0)
        if not (root(config) / path).exists():
            raise PluginError(f"{page.file.src_uri}: link to {target}, which is not in the repository")
        return f"`{path}`" if path in text else f"{text} (`{path}`)"

    return LINK.sub(replace, markdown)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse a page that loads a resource from the network."""
    loaded = LOADED.search(output)
    if loaded:
        raise PluginError(f"{page.file.src_uri} loads from the network: {loaded.group(0)}")
    return output


def root(config: Any) -> Path:
    """Return the root of the repository."""
    return Path(config["config_file_path"]).parent
