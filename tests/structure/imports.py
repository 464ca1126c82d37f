"""Imports of a package, read from the source: nothing is imported and nothing runs."""

import ast
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from .sources import Module

Graph = Mapping[str, Iterable[str]]


@dataclass(frozen=True)
class Import:
    module: str
    line: int
    inside: bool  # in a function, or for type checkers only


def absolute(node: ast.ImportFrom, package: str) -> str:
    """The module that `from ... import` names; leading dots are resolved against the package that holds the file."""
    if not node.level:
        return node.module or ""
    base = package.split(".")[: package.count(".") + 2 - node.level]
    return ".".join([*base, node.module] if node.module else base)


def modules_of(node: ast.AST, package: str) -> list[str]:
    """The modules that one statement or call imports. `from keel import core` names keel.core."""
    match node:
        case ast.Import():
            return [alias.name for alias in node.names]
        case ast.ImportFrom():
            return [f"{absolute(node, package)}.{alias.name}" for alias in node.names]
        case ast.Call(func=function, args=[ast.Constant(value=str(name)), *_]):
            return [name] if ast.unparse(function) in {"import_module", "importlib.import_module", "__import__"} else []
    return []


def runs_later(node: ast.AST) -> bool:
    """True for a function, and for a block that only type checkers read."""
    if isinstance(node, ast.If):
        return ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def imports(node: ast.AST, package: str, inside: bool = False) -> Iterator[Import]:
    """Every import below `node`, with its line."""
    for child in ast.iter_child_nodes(node):
        for module in modules_of(child, package):
            yield Import(module, getattr(child, "lineno", 0), inside)
        yield from imports(child, package, inside or runs_later(child))


def import_graph(modules: Iterable[Module]) -> dict[str, set[str]]:
    """Module -> modules of the package that it imports, also those imported inside functions.

    The package itself is left out as a target: its version is all that modules take from it (tests/test_layers.py).
    """
    modules = list(modules)
    names = {module.name for module in modules}
    root = min(names, key=len)
    graph = {}
    for module in modules:
        found = {resolve(each.module, names) for each in imports(module.tree, module.folder)}
        graph[module.name] = {target for target in found if target and target not in (root, module.name)}
    return graph


def resolve(imported: str, names: set[str]) -> str | None:
    """`keel.data.rows.read_rows` -> `keel.data.rows`; None for what is not in the package."""
    while imported and imported not in names:
        imported = imported.rpartition(".")[0]
    return imported or None


def part_of(module: Module) -> str:
    """The folder of a module; a file directly in the package counts as a folder of its own."""
    return module.name if "." not in module.folder else module.folder


def folder_imports(modules: Iterable[Module]) -> dict[tuple[str, str], int]:
    """(from, to) -> how many modules of the first folder import a module of the second, counted per pair of modules."""
    modules = list(modules)
    parts = {module.name: part_of(module) for module in modules}
    pairs = Counter(
        (parts[source], parts[target]) for source, targets in import_graph(modules).items() for target in targets
    )
    return {pair: count for pair, count in sorted(pairs.items()) if pair[0] != pair[1]}


def folder_graph(modules: Iterable[Module]) -> dict[str, set[str]]:
    graph: dict[str, set[str]] = {}
    for source, target in folder_imports(modules):
        graph.setdefault(source, set()).add(target)
    return graph


def circles(graph: Graph) -> list[list[str]]:
    """Largest sets of two and more nodes that all reach each other."""
    reach = {node: reachable(graph, node) for node in graph}
    groups = {frozenset({node, *(other for other in reach[node] if node in reach.get(other, ()))}) for node in graph}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def reachable(graph: Graph, start: str) -> set[str]:
    """Nodes to which a path of one and more edges leads."""
    seen: set[str] = set()
    waiting = list(graph.get(start, ()))
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting.extend(graph.get(node, ()))
    return seen
