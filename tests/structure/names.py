"""Public names of a package: defined twice, or not in the form that the rules for names ask of a function."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

from .sources import Module


def word_set(text: str) -> frozenset[str]:
    return frozenset(text.split())


PREPOSITIONS = word_set("of for to by in on with at from as up out off")

# Words in -ed that are nouns or verbs in the present tense.
NOT_PARTICIPLES = word_set("bed embed exceed feed need proceed red seed shed speed succeed")

# Past participles that differ from the verb's present tense: `read`, `split` or `set` cannot be told from it.
IRREGULAR_PARTICIPLES = word_set(
    """
    begun bent bound broken brought built bought caught chosen dealt done drawn driven fallen felt forbidden forgiven
    forgotten found frozen given gone grown heard held hidden kept known laid learnt led left lent lost made meant met
    mistaken overwritten paid proven risen said seen sent shaken shown sold spent spoken spoilt stolen struck stuck sunk
    sworn swept taken taught thought thrown told torn understood undone unseen untold withdrawn withheld won worn woven
    written
    """
)

# Names that other libraries call or that readers know from there (asyncio, transformers), and a term of the glossary.
ESTABLISHED = re.compile(r"^(connection_made|connection_lost|from_pretrained|(.+_)?held_out)$")

# `is_finished` is a statement, not a bare participle.
STATEMENTS = word_set("are can has have is must should was were")

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def public_definitions(modules: Iterable[Module]) -> Iterator[tuple[str, Module]]:
    """Functions and classes at module level without a leading underscore."""
    for module in modules:
        for node in module.tree.body:
            if isinstance(node, FunctionNode | ast.ClassDef) and not node.name.startswith("_"):
                yield node.name, module


def duplicate_names(modules: Iterable[Module]) -> dict[str, list[str]]:
    """Public name -> the modules that define it, for names with more than one."""
    owners: dict[str, list[str]] = defaultdict(list)
    for name, module in public_definitions(modules):
        if module.name not in owners[name]:
            owners[name].append(module.name)
    return {name: found for name, found in sorted(owners.items()) if len(found) > 1}


def public_functions(modules: Iterable[Module]) -> Iterator[tuple[str, FunctionNode]]:
    """`module:function` and `module:Class.method` of all public functions; properties are no functions to a reader."""
    for module in modules:
        yield from ((f"{module.name}:{node.name}", node) for node in functions(module.tree.body))
        for owner in module.tree.body:
            if isinstance(owner, ast.ClassDef):
                yield from ((f"{module.name}:{owner.name}.{node.name}", node) for node in functions(owner.body))


def functions(body: Iterable[ast.stmt]) -> list[FunctionNode]:
    """Public functions of a module or class, without properties."""
    public = [node for node in body if isinstance(node, FunctionNode) and not node.name.startswith("_")]
    return [node for node in public if not any("property" in each or "setter" in each for each in decorators(node))]


def decorators(node: FunctionNode) -> list[str]:
    return [ast.unparse(each) for each in node.decorator_list]


def ends_in_participle(name: str) -> bool:
    """Whether the last word is a past participle: `told`, `rows_dropped`; not `masked_mean` or `is_closed`."""
    words = name.lower().split("_")
    last = words[-1]
    if ESTABLISHED.match(name) or (len(words) > 1 and words[0] in STATEMENTS):
        return False
    return last in IRREGULAR_PARTICIPLES or (len(last) > 3 and last.endswith("ed") and last not in NOT_PARTICIPLES)


def ends_in_preposition(name: str) -> bool:
    """Whether the last word is one that asks for another: `answers_of`, `bring_in`."""
    return not ESTABLISHED.match(name) and name.lower().split("_")[-1] in PREPOSITIONS


def participle_functions(modules: Iterable[Module]) -> list[str]:
    """Functions named by a participle. Context managers are left out: their names say what holds inside."""
    return [
        place
        for place, node in public_functions(modules)
        if ends_in_participle(node.name) and not any("contextmanager" in each for each in decorators(node))
    ]


def preposition_functions(modules: Iterable[Module]) -> list[str]:
    return [place for place, node in public_functions(modules) if ends_in_preposition(node.name)]
