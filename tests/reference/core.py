"""docs/reference/core.md: the functions of `keel.core`."""

import ast
from collections.abc import Iterator

import keel.core

from .markdown import docstring_markdown
from .source import Function, class_markdown, function_markdown, public, tree

INTRODUCTION = """
# keel.core

The formulas of keel as pure functions of tensors. They need torch, and no models, data or settings of keel.
[minimal_ppo.py](../../examples/minimal_ppo.py) is PPO with `keel.core` and torch.
"""


def page() -> str:
    """Return the text of the page."""
    overview = docstring_markdown(ast.get_docstring(tree("keel.core")) or "")
    return "\n\n".join([INTRODUCTION.strip(), overview, *map("\n\n".join, map(_module_section, keel.core.__all__))])


def _module_section(name: str) -> Iterator[str]:
    module = f"keel.core.{name}"
    yield f"## {module}"
    if text := ast.get_docstring(tree(module)):
        yield docstring_markdown(text)
    for node in public(module).values():
        yield function_markdown(node) if isinstance(node, Function) else class_markdown(node)
