"""The structure of src/keel gets no worse: circles, and names that the rules for names forbid, are counted.

The limits are those of today. Who lowers a number lowers its limit; nobody raises one.
"""

from pathlib import Path

import pytest

from .structure.imports import circles, folder_graph, import_graph
from .structure.names import (
    duplicate_names,
    ends_in_participle,
    ends_in_preposition,
    participle_functions,
    preposition_functions,
)
from .structure.prose import (
    RETIRED,
    comments,
    count_code_lines,
    count_in_names,
    count_in_prose,
    longest_paragraph,
    module_texts,
    paragraphs,
)
from .structure.sources import Module, folder_sizes, read_modules

ROOT = Path(__file__).parents[1]

FOLDER_CIRCLES = [["keel.diagnosis", "keel.diagnosis.rules"]]
MOST_DUPLICATES = 0
MOST_PARTICIPLES = 3  # interrupts_deferred(), interrupts_blocked(), interrupts_allowed(): context managers
MOST_PREPOSITIONS = 0

# Names that may be defined more than once, each for the same thing.
SAME_ROLE = {
    "run",  # what the verb does, called by cli/main.py
    "main",  # entry point of a module that is run with `python -m`
    *("dpo", "reward", "sft"),  # the function of keel.api, and the command's own, which it calls
}


@pytest.fixture(scope="session")
def modules() -> list[Module]:
    return read_modules(ROOT / "src" / "keel")


def test_modules_import_in_no_circle(modules: list[Module]):
    assert circles(import_graph(modules)) == []


def test_no_further_folders_import_in_a_circle(modules: list[Module]):
    assert [circle for circle in circles(folder_graph(modules)) if circle not in FOLDER_CIRCLES] == []


def test_no_further_public_name_is_defined_twice(modules: list[Module]):
    duplicates = sorted(duplicate_names(modules).keys() - SAME_ROLE)
    assert len(duplicates) <= MOST_DUPLICATES, duplicates


def test_no_further_function_is_named_by_a_participle_or_ends_in_a_preposition(modules: list[Module]):
    participles, prepositions = participle_functions(modules), preposition_functions(modules)
    assert len(participles) <= MOST_PARTICIPLES, participles
    assert len(prepositions) <= MOST_PREPOSITIONS, prepositions


# ---- the counting itself ---------------------------------------------------------------------------------------------

FILES = {
    "__init__.py": "def f():\n    from keel.a import one\n",
    "a/__init__.py": "",
    "a/one.py": "from keel.b.two import told\nclass Side: ...\ndef _hidden(): ...\n",
    "a/three.py": "from . import one\nfrom keel import __version__\n",
    "b/two.py": "def told():\n    import keel.a.three\nclass Side: ...\ndef _hidden(): ...\n",
    "c.py": "import keel.b.two\nimport os.path\n",
}


@pytest.fixture
def planted(tmp_path: Path) -> list[Module]:
    """Modules a.one -> b.two -> a.three -> a.one, and c, which imports them and is not part of the circle."""
    for name, text in FILES.items():
        path = tmp_path / "keel" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return read_modules(tmp_path / "keel")


def test_circles_are_found_also_through_imports_inside_functions(planted: list[Module]):
    assert circles(import_graph(planted)) == [["keel.a.one", "keel.a.three", "keel.b.two"]]
    assert circles(folder_graph(planted)) == [["keel.a", "keel.b"]]
    assert folder_graph(planted)["keel.c"] == {"keel.b"}


def test_a_public_name_in_two_modules_is_a_duplicate(planted: list[Module]):
    assert duplicate_names(planted) == {"Side": ["keel.a.one", "keel.b.two"]}
    assert participle_functions(planted) == ["keel.b.two:told"]


def test_sizes_are_counted_for_each_folder_alone(planted: list[Module]):
    (planted[0].path.parent / "a" / "x.js").write_text("1\n2\n3\n")
    sizes = folder_sizes(planted[0].path.parent)
    assert sizes["keel"] == {"python": {"files": 2, "lines": 4}}
    assert sizes["keel/a"] == {"python": {"files": 3, "lines": 5}, "js": {"files": 1, "lines": 3}}


@pytest.mark.parametrize("name", ["told", "sealed", "risen", "parted", "forgiven", "print_unidentified", "rows_taken"])
def test_a_last_word_in_the_past_participle(name: str):
    assert ends_in_participle(name)


@pytest.mark.parametrize("name", ["masked_mean", "is_closed", "set_seed", "token", "read", "open", "need", "held_out"])
def test_no_participle(name: str):
    assert not ends_in_participle(name)


def test_a_last_word_that_asks_for_another():
    assert [ends_in_preposition(name) for name in ("answers_of", "bring_in", "at")] == [True, True, True]
    assert [ends_in_preposition(name) for name in ("of_training", "offset", "held_out")] == [False, False, False]


CLASSES = """
class Kept:
    @property
    def passed(self): ...
    @classmethod
    def of(cls): ...
    def noted(self): ...
    def _left(self): ...
from contextlib import contextmanager
@contextmanager
def interrupts_deferred(): ...
"""


def module(folder: Path, text: str) -> Module:
    (folder / "m.py").write_text(text)
    return Module("keel.m", "keel", folder / "m.py")


def test_methods_count_and_properties_and_context_managers_do_not(tmp_path: Path):
    one = module(tmp_path, CLASSES)
    assert participle_functions([one]) == ["keel.m:Kept.noted"]
    assert preposition_functions([one]) == ["keel.m:Kept.of"]


CODE = '''"""Two answers."""

# Why, told once.
from x import (  # noqa: F401
    figures,
)


def told(answer: str) -> str:
    """It answers."""
    own = "figures"
    return f"the whole answer {answer} is not found" + own
'''


def counts(word: str, one: Module) -> tuple[int, int]:
    """Occurrences in prose and in names."""
    texts, entry = module_texts([one]), next(each for each in RETIRED if each.word == word)
    return count_in_prose(entry, texts.prose), count_in_names(entry, texts.names)


def test_retired_words_in_prose_and_in_names(tmp_path: Path):
    one = module(tmp_path, CODE)
    assert counts("answer", one) == (3, 2)
    assert counts("told", one) == (1, 1)
    assert counts("figure", one) == (0, 2)
    assert counts("own", one) == (0, 2)
    assert counts("found", one) == (0, 0)
    assert counts("whole", one) == (1, 0)


def test_comments_for_tools_and_docstrings_are_no_lines(tmp_path: Path):
    one = module(tmp_path, CODE)
    assert comments(one.text) == ["# Why, told once."]
    assert count_code_lines(one) == 6


DOCUMENT = """# A heading of five words

One two
three.

- four five
  six seven
- eight

```
a b c d e f g h i j
```

| a long row | of a table |
"""


def test_paragraphs_are_without_code_tables_and_headings():
    assert paragraphs(DOCUMENT) == ["One two three.", "- four five six seven", "- eight"]
    assert longest_paragraph(DOCUMENT) == 5
