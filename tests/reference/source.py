"""Signatures and docstrings of the source as Markdown. Nothing is imported, so types read as they are written."""

import ast
from collections.abc import Iterator
from functools import cache

from . import ROOT
from .markdown import docstring_markdown, escape, table

MAX_WIDTH = 100
Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def tree(module: str) -> ast.Module:
    """Return the syntax tree of a module of keel, such as `keel.api`."""
    path = ROOT / "src" / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def public(module: str) -> dict[str, Function | ast.ClassDef]:
    """Return the public functions and classes that a module defines, in their order."""
    return {
        node.name: node
        for node in tree(module).body
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_")
    }


def function_markdown(node: Function, prefix: str = "", level: int = 3) -> str:
    """Return heading, signature and docstring of a function. `prefix` is written before its name."""
    parts = [f"{'#' * level} {prefix}{node.name}", f"```py\n{signature(node)}\n```"]
    if text := ast.get_docstring(node):
        parts.append(docstring_markdown(text))
    return "\n\n".join(parts)


def class_markdown(node: ast.ClassDef, prefix: str = "", level: int = 3) -> str:
    """Return heading, docstring, attributes and public methods of a class."""
    parts = [f"{'#' * level} {prefix}{node.name}"]
    if text := ast.get_docstring(node):
        parts.append(docstring_markdown(text))
    if rows := list(_attributes(node)):
        parts.append(table(["attribute", "type", "meaning"], rows))
    methods = (each for each in node.body if isinstance(each, Function) and not each.name.startswith("_"))
    parts += [function_markdown(each, f"{node.name}.", level + 1) for each in methods if not _is_property(each)]
    return "\n\n".join(parts)


def signature(node: Function) -> str:
    """Return `name(parameters) -> type`, with a parameter on each line if it is long. Without `self` and `cls`."""
    parameters = [text for text in _parameters(node.args) if text not in ("self", "cls")]
    returns = f" -> {_type(node.returns)}" if node.returns is not None else ""
    line = f"{node.name}({', '.join(parameters)}){returns}"
    if len(line) <= MAX_WIDTH:
        return line
    body = "".join(f"    {text},\n" for text in parameters)
    return f"{node.name}(\n{body}){returns}"


def _parameters(arguments: ast.arguments) -> Iterator[str]:
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    for argument, default in zip(positional, defaults, strict=True):
        yield _parameter(argument, default)
    if arguments.vararg:
        yield f"*{_parameter(arguments.vararg, None)}"
    elif arguments.kwonlyargs:
        yield "*"
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield _parameter(argument, default)
    if arguments.kwarg:
        yield f"**{_parameter(arguments.kwarg, None)}"


def _parameter(argument: ast.arg, default: ast.expr | None) -> str:
    annotation = f": {_type(argument.annotation)}" if argument.annotation is not None else ""
    equals = " = " if annotation else "="
    return f"{argument.arg}{annotation}" + (f"{equals}{ast.unparse(default)}" if default is not None else "")


def _type(annotation: ast.expr) -> str:
    """Return an annotation as text. One that is quoted, for a type that is imported late, loses its quotes."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return annotation.value
    return ast.unparse(annotation)


def _attributes(node: ast.ClassDef) -> Iterator[list[str]]:
    """Yield a row for each field and each property: name, type, meaning. A field's meaning is the text below it."""
    following = [*node.body[1:], None]
    for field, text in zip(node.body, following, strict=True):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            yield [f"`{field.target.id}`", f"`{_type(field.annotation)}`", escape(_text(text))]
    for method in node.body:
        if isinstance(method, Function) and _is_property(method) and not method.name.startswith("_"):
            returns = f"`{_type(method.returns)}`" if method.returns is not None else ""
            yield [f"`{method.name}`", returns, escape(" ".join((ast.get_docstring(method) or "").split()))]


def _text(node: ast.stmt | None) -> str:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return " ".join(node.value.value.split())
    return ""


def _is_property(node: Function) -> bool:
    return any(isinstance(each, ast.Name) and each.id == "property" for each in node.decorator_list)
