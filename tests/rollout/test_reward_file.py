"""A file of reward functions is the module that it is for `python FILE.py`."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from keel.config import RewardSource
from keel.errors import ConfigError
from keel.rollout.reward_file import forget_files
from keel.rollout.scorers import Scorer, build_scorers

from .answers import words

TOKENIZER, TWO = words("yes", "yes yes")


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    forget_files()


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def scorers(*places: str) -> list[Scorer]:
    return build_scorers([RewardSource(function=place) for place in places])


def test_it_imports_what_lies_beside_it(tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        rewards="from helpers_beside import size\n"
        "def now(completions): return [size(c) for c in completions]\n"
        "def late(completions):\n    from later_beside import size\n    return [size(c) for c in completions]\n",
        helpers_beside="def size(text): return float(len(text.split()))\n",
        later_beside="def size(text): return 10.0 * len(text.split())\n",
    )
    path = list(sys.path)
    now, late = scorers(f"{folder}/rewards.py:now", f"{folder}/rewards.py:late")
    assert now(TWO, None) == [1.0, 2.0]
    assert late(TWO, None) == [10.0, 20.0]
    assert sys.path == path


def test_files_of_two_folders_see_their_own_siblings(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 2.0)):
        write(
            tmp_path / name,
            rewards="import shared_name\n"
            "def f(completions):\n    import late_name\n"
            "    return [shared_name.VALUE + late_name.VALUE for _ in completions]\n",
            shared_name=f"VALUE = {value}\n",
            late_name=f"VALUE = {10 * value}\n",
        )
    first, second = scorers(*(f"{tmp_path}/{name}/rewards.py:f" for name in "ab"))
    for _ in range(2):
        assert first(TWO, None) == [11.0, 11.0]
        assert second(TWO, None) == [22.0, 22.0]


def test_a_dataclass_under_postponed_annotations(tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        rules="from __future__ import annotations\nfrom dataclasses import dataclass\nfrom typing import ClassVar\n"
        "@dataclass\nclass Rule:\n    kind: ClassVar[str] = 'x'\n    weight: float = 3.0\n"
        "def f(completions): return [Rule().weight for _ in completions]\n",
    )
    assert scorers(f"{folder}/rules.py:f")[0](TWO, None) == [3.0, 3.0]


WORKERS = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from sizes_beside import size

def one(text):
    return size(text)

def pool(completions):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as workers:
        return list(workers.map(one, completions))

def pickled(completions):
    import pickle
    return [pickle.loads(pickle.dumps(one))(text) for text in completions]
"""


@pytest.mark.slow
def test_worker_processes(tmp_path: Path) -> None:
    folder = write(tmp_path, workers=WORKERS, sizes_beside="def size(text): return float(len(text.split()))\n")
    assert scorers(f"{folder}/workers.py:pool")[0](TWO, None) == [1.0, 2.0]


def test_its_functions_can_be_pickled(tmp_path: Path) -> None:
    folder = write(tmp_path, workers=WORKERS, sizes_beside="def size(text): return float(len(text.split()))\n")
    pickled, _ = scorers(f"{folder}/workers.py:pickled", f"{folder}/workers.py:pool")  # one module, not two
    assert pickled(TWO, None) == [1.0, 2.0]


def test_a_file_with_the_name_of_a_library_leaves_it_alone(tmp_path: Path) -> None:
    import json

    folder = write(tmp_path, json="import dataclasses\ndef f(completions): return [4.0 for _ in completions]\n")
    assert scorers(f"{folder}/json.py:f")[0](TWO, None) == [4.0, 4.0]
    assert sys.modules["json"] is json


def test_a_library_imported_later_is_not_a_file_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("colorsys", "named_beside"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    text = "import named_beside\ndef f(completions): return [named_beside.VALUE for _ in completions]\n"
    folder = write(tmp_path, colorsys=text, named_beside="VALUE = 5.0\n")
    (built,) = scorers(f"{folder}/colorsys.py:f")
    for _ in range(2):
        import colorsys

        assert hasattr(colorsys, "rgb_to_hsv")
        assert built(TWO, None) == [5.0, 5.0]
        assert sys.modules["colorsys"] is colorsys
        assert "named_beside" not in sys.modules


def test_a_file_that_was_changed_is_read_anew_with_its_siblings(tmp_path: Path) -> None:
    text = "from sibling_changed import VALUE\ndef f(completions): return [VALUE for _ in completions]\n"
    folder = write(tmp_path, changing=text, sibling_changed="VALUE = 1.0\n")
    assert scorers(f"{folder}/changing.py:f")[0](TWO, None) == [1.0, 1.0]
    write(tmp_path, changing=text.replace("[VALUE ", "[VALUE + 100 "), sibling_changed="VALUE = 25.0  # longer\n")
    assert scorers(f"{folder}/changing.py:f")[0](TWO, None) == [125.0, 125.0]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("import sys\nsys.exit(0)\n", r"SystemExit on import \(odd_file\.py:2\)"),
        ("x = 1\n1 / 0\n", r"ZeroDivisionError on import \(odd_file\.py:2\)"),
        ("class Panic(BaseException): pass\nraise Panic('a library in Rust')\n", "Panic on import"),
        ("def f(:\n", "SyntaxError on import"),
    ],
)
def test_a_file_that_cannot_be_imported(tmp_path: Path, text: str, kind: str) -> None:
    folder = write(tmp_path, odd_file=text)
    with pytest.raises(ConfigError, match=kind):
        scorers(f"{folder}/odd_file.py:f")
    assert "odd_file" not in sys.modules


def test_no_python_file(tmp_path: Path) -> None:
    (tmp_path / "rewards.txt").write_text("def f(completions): return []\n")
    with pytest.raises(ConfigError, match="not a Python file"):
        scorers(f"{tmp_path}/rewards.txt:f")


def test_what_it_changes_on_import_is_changed_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path, moves="import os\nos.chdir('/')\ndef f(completions): return [0.0 for _ in completions]\n")
    before = Path.cwd()
    scorers(f"{folder}/moves.py:f")
    assert Path.cwd() == before != Path(os.sep)
    assert "moves.py changed the working directory" in capsys.readouterr().err
