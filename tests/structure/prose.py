"""Comments, paragraphs and words: what the text in code and documents consists of."""

import ast
import io
import re
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .sources import Module

PRAGMA = re.compile(r"#\s*(fmt|noqa|type|ruff|pragma|mypy)\b")
LAYOUT_TOKENS = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


def tokens(text: str) -> list[tokenize.TokenInfo]:
    return list(tokenize.generate_tokens(io.StringIO(text).readline))


def comments(text: str) -> list[str]:
    """Comments of a Python file, without those that are meant for tools."""
    found = (token.string for token in tokens(text) if token.type == tokenize.COMMENT)
    return [comment for comment in found if not PRAGMA.match(comment)]


def docstrings(tree: ast.AST) -> list[ast.Constant]:
    """Texts that are statements: docstrings, and the help lines below fields."""
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]


def count_code_lines(module: Module) -> int:
    """Lines with code: neither empty, nor comments alone, nor docstrings."""
    lines: set[int] = set()
    for token in tokens(module.text):
        if token.type not in LAYOUT_TOKENS:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in docstrings(module.tree):
        lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def comments_per_thousand_lines(modules: Iterable[Module]) -> float:
    modules = list(modules)
    code = sum(count_code_lines(module) for module in modules)
    return 1000 * sum(len(comments(module.text)) for module in modules) / max(1, code)


# ---- documents -------------------------------------------------------------------------------------------------------


def without_code(text: str) -> str:
    """A Markdown text without its fenced blocks."""
    return re.sub(r"^( *)```.*?^\1```[^\n]*$", "", text, flags=re.MULTILINE | re.DOTALL)


def paragraphs(text: str) -> list[str]:
    """Paragraphs and list items of a Markdown text; no headings, tables or code."""
    found: list[list[str]] = [[]]
    for line in without_code(text).splitlines():
        plain = line.strip()
        if not plain or plain.startswith(("#", "|", "<")):
            found.append([])
        elif re.match(r"([-*+]|\d+\.)\s", plain):
            found.append([plain])
        else:
            found[-1].append(plain)
    return [" ".join(lines) for lines in found if lines]


def longest_paragraph(text: str) -> int:
    """Words of the longest paragraph."""
    return max((len(each.split()) for each in paragraphs(text)), default=0)


def documents(root: Path) -> list[Path]:
    """README.md, and the Markdown files of docs/."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


# ---- words to retire -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Retired:
    """A word that the rules for names and prose retire: a pattern for prose, words for identifiers, or both.

    What is good English in one of the two is looked for in the other only: a file may be "not found".
    """

    word: str
    prose: str = ""
    identifiers: frozenset[str] = frozenset()  # words inside a name
    names: frozenset[str] = frozenset()  # names of one word


def retired(word: str, prose: str | None = None, identifiers: str = "", names: str = "") -> Retired:
    """Prose is by default the word itself."""
    pattern = word if prose is None else prose
    return Retired(word, pattern, frozenset(identifiers.split()), frozenset(names.split()))


RETIRED = [
    retired("answer", "answers?", "answer answers"),
    retired("answered", "answered|answering", "answered"),
    retired("told", None, "told"),
    retired("said", None, "said"),
    retired("says", "says?", "says"),
    retired("speaks", "speaks?", "speaks"),
    retired("heard", None, "heard"),
    retired("found", "", names="found"),
    retired("own", None, names="own"),
    retired("mend", "mend(s|ed|ing)?", "mend mended"),
    retired("dear", "dear(er|est)?", "dear"),
    retired("figure", "figures?", "figure figures"),
    retired("judge", "judg(e|es|ed|ing)", "judge judges judged judging"),
    retired("stands", "stands?", "stands standing"),
    retired("lies", "lies?", "lies"),
    retired("apart", None, "apart"),
    retired("whole", None, "whole"),
    retired("goes on", "go(es)? on|went on|going on"),
    retired("in the words of"),
    retired("as far as it sees"),
    retired("by one hand"),
    retired("the last word"),
    retired("in these clothes"),
    retired("before", "", names="before"),
    retired("after", "", names="after"),
    retired("good run", "(good|bad|sick) runs?", "sick"),
    retired("Player", "", names="Player"),
    retired("Desk", "", names="Desk"),
    retired("Known", "", names="Known"),
    retired("Parts", "", names="Parts"),
    retired("Experience", "", names="Experience"),
    retired("Task", "", names="Task"),
]


@dataclass
class Texts:
    """What a person reads and what a program reads, of some files."""

    prose: list[str] = field(default_factory=list)
    names: Counter[str] = field(default_factory=Counter)


def module_texts(modules: Iterable[Module]) -> Texts:
    """Docstrings, comments and strings are prose; names are names, and so are strings without a space, such as keys."""
    texts = Texts()
    for module in modules:
        texts.prose += comments(module.text)
        texts.names.update(identifiers(module.tree))
        for text in strings(module.tree):
            if " " in text.strip():
                texts.prose.append(text)
            else:
                texts.names.update(re.findall(r"[A-Za-z_]\w*", text))
    return texts


def identifiers(tree: ast.AST) -> Iterator[str]:
    """Every name of a syntax tree where it is: definitions, arguments, variables, attributes, imports."""
    for node in ast.walk(tree):
        named = {getattr(node, key, None) for key in ("id", "attr", "arg", "name", "asname")}
        yield from (part for name in named if isinstance(name, str) for part in name.split("."))


def strings(tree: ast.AST) -> Iterator[str]:
    """Every string of a syntax tree: docstrings, literals, and the fixed parts of f-strings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def count_in_prose(word: Retired, prose: Iterable[str]) -> int:
    if not word.prose:
        return 0
    pattern = re.compile(rf"\b({word.prose.replace(' ', chr(92) + 's+')})\b", re.IGNORECASE)
    return sum(len(pattern.findall(text)) for text in prose)


def count_in_names(word: Retired, names: Counter[str]) -> int:
    """Occurrences of names that are the word or have it as a part: `figures_of` holds `figures`."""
    return sum(count for name, count in names.items() if name in word.names or name_words(name) & word.identifiers)


def name_words(name: str) -> set[str]:
    """The words of a name in snake or camel case, in lower case."""
    return {word.lower() for word in WORD.findall(name)}


def retired_words(root: Path, modules: Iterable[Module]) -> dict[str, dict[str, int]]:
    """Word -> occurrences in the prose of documents, pages (templates, scripts) and source, and in identifiers."""
    package, source = root / "src" / "keel", module_texts(modules)
    docs = [without_code(path.read_text(encoding="utf-8")) for path in documents(root)]
    kinds = (".html", ".js", ".yaml")
    pages = [path.read_text(encoding="utf-8") for path in sorted(package.rglob("*")) if path.suffix in kinds]
    return {
        word.word: {
            "docs": count_in_prose(word, docs),
            "pages": count_in_prose(word, pages),
            "source": count_in_prose(word, source.prose),
            "identifiers": count_in_names(word, source.names),
        }
        for word in RETIRED
    }
