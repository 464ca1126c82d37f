"""The house holds: every import in src/keel is one that the table below allows.

Read from the source with `ast`, so nothing is imported and nothing runs; imports inside functions count as well.
"""

import ast
import re
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from .structure.imports import Import, imports

ROOT = Path(__file__).parents[1]

SETTINGS = frozenset({"pydantic", "pydantic_settings", "yaml"})


@dataclass(frozen=True)
class Layer:
    """What one part of keel may import: parts of keel (a name allows all below it too) and other packages.

    `packages` None = any dependency in pyproject.toml, those of the extras inside functions only.
    """

    parts: frozenset[str]
    packages: frozenset[str] | None = None
    inside_functions: frozenset[str] = frozenset()

    @classmethod
    def of(cls, parts: str, packages: frozenset[str] | None = None, inside_functions: str = "") -> "Layer":
        return cls(frozenset(parts.split()), packages, frozenset(inside_functions.split()))


# A part is a file or a folder of src/keel; run.read is one too. Each may import only parts that are above it.
# cli and __init__ load the rest when a function runs: `keel --help` and `import keel` do not wait for torch.
LAYERS = {
    "errors": Layer.of("", frozenset()),
    "terminal": Layer.of("", frozenset()),
    "failpoints": Layer.of("errors", frozenset()),
    "files": Layer.of("", frozenset()),
    "interrupts": Layer.of("errors", frozenset()),
    "naming": Layer.of("", frozenset()),
    "progress": Layer.of("", frozenset({"rich"})),
    "algorithms": Layer.of("", frozenset()),
    "config": Layer.of("algorithms naming files errors", SETTINGS),
    "kernels": Layer.of("", frozenset({"torch"})),
    "core": Layer.of("kernels", frozenset({"torch"})),
    "heartbeat": Layer.of("interrupts errors", frozenset()),
    "world": Layer.of("heartbeat errors", frozenset({"torch"})),
    "shards": Layer.of("", frozenset({"torch"})),
    "endpoints": Layer.of("errors", frozenset({"httpx"})),
    "data": Layer.of("core files errors"),
    "judge": Layer.of("endpoints data.messages files errors", frozenset()),
    "stats": Layer.of("data.preferences", frozenset({"numpy"})),
    "models": Layer.of("kernels core data shards world config terminal errors"),
    "rollout": Layer.of("models data judge endpoints kernels core world naming terminal errors"),
    "learn": Layer.of("models data core shards world algorithms failpoints errors"),
    "run": Layer.of("kernels stats data.batches data.preferences shards world failpoints terminal files errors config"),
    "run.read": Layer.of(
        "run.folder run.lock run.rollout_line data.turn_text files config errors",
        frozenset({"numpy", "yaml", "pydantic"}),
    ),
    "loop": Layer.of(
        "learn.guard learn.masters run.checkpoint run.folder run.lock run.origin run.saved_tensors "
        "world config interrupts errors"
    ),
    "ranking": Layer.of("stats judge data terminal files errors"),
    "diagnosis": Layer.of("run.read stats.overoptimisation algorithms", frozenset({"numpy"})),
    "report": Layer.of("diagnosis run.read run.folder run.reward_files stats data files config errors"),
    "evaluation": Layer.of(
        "rollout endpoints.client judge.judge learn.targets learn.pass_check models run stats data core world "
        "config progress terminal files errors"
    ),
    "training": Layer.of(
        "evaluation diagnosis rollout judge.judge loop learn models run stats data core kernels shards world "
        "config failpoints interrupts progress terminal files errors"
    ),
    "supervised": Layer.of(
        "loop learn models run stats data core world config failpoints interrupts progress terminal errors"
    ),
    "server": Layer.of("rollout data config terminal errors"),
    "web": Layer.of("ranking diagnosis run.read run.folder run.lock server stats data files config terminal errors"),
    "quickstart": Layer.of(
        "training supervised evaluation diagnosis run.read run.folder ranking web data config interrupts errors"
    ),
    "api": Layer.of(
        "", frozenset(), inside_functions="config data errors training supervised evaluation diagnosis run.read world"
    ),
    "__init__": Layer.of("api", frozenset(), inside_functions="core training"),
    "cli": Layer.of(
        "errors config interrupts terminal files",
        SETTINGS | {"rich"},
        inside_functions="core world data judge stats models rollout learn run ranking diagnosis report evaluation "
        "training supervised server web quickstart",
    ),
    "__main__": Layer.of("", frozenset(), inside_functions="cli"),
}


def covers(parts: frozenset[str], name: str) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def dependencies(pyproject: Path) -> tuple[frozenset[str], frozenset[str]]:
    """Import names of the hard dependencies, and of those that only an extra brings."""
    project = tomllib.loads(pyproject.read_text())["project"]

    def names(requirements: list[str]) -> frozenset[str]:
        plain = [re.split(r"[^\w-]", line)[0].lower().replace("-", "_") for line in requirements]
        return frozenset("yaml" if name == "pyyaml" else name for name in plain)

    extras = [line for group, lines in project["optional-dependencies"].items() if group != "dev" for line in lines]
    return names(project["dependencies"]), names(extras)


def complaint(part: str, found: Import, hard: frozenset[str], extras: frozenset[str]) -> str | None:
    """Why this part may not have this import; None if it may."""
    layer = LAYERS[part]
    top, _, below = found.module.partition(".")
    if top == "keel":
        if covers(layer.parts | {part}, below) or below == "__version__":
            return None
        if covers(layer.inside_functions, below):
            return None if found.inside else "only inside a function"
        return f"{part} must not know it"
    if top in sys.stdlib_module_names:
        return None
    if top not in hard | extras:
        return "not a dependency in pyproject.toml"
    if layer.packages is not None:
        allowed = top in layer.packages or (found.inside and bool(layer.inside_functions))
        return None if allowed else f"{part} must do without it"
    return "an extra: only inside a function" if top in extras and not found.inside else None


def part_of(inner: Path) -> str:
    """The part that a file of the package belongs to, the smallest that the table names."""
    nested = ".".join(inner.with_suffix("").parts[:2])
    return nested if nested in LAYERS else inner.parts[0].removesuffix(".py")


def violations(package: Path, pyproject: Path) -> list[str]:
    """One line `file:line: module (why)` for each forbidden import and for each part that the table does not name."""
    hard, extras = dependencies(pyproject)
    lines = []
    for path in sorted(package.rglob("*.py")):
        inner = path.relative_to(package)
        part = part_of(inner)
        if part not in LAYERS:
            lines.append(f"{inner}: no part of the house is called {part!r}")
            continue
        folder = ".".join(["keel", *inner.parts[:-1]])
        found_here = [
            (found, complaint(part, found, hard, extras)) for found in imports(ast.parse(path.read_text()), folder)
        ]
        lines += [f"{inner}:{found.line}: {found.module} ({why})" for found, why in found_here if why]
    return lines


def test_every_import_is_in_the_table():
    assert violations(ROOT / "src" / "keel", ROOT / "pyproject.toml") == []


def test_the_table_has_no_way_back():
    above: set[str] = set()
    for part, layer in LAYERS.items():
        known = {name.split(".")[0] for name in layer.parts | layer.inside_functions}
        assert known <= above | ({"cli"} if part == "__main__" else set()), part
        above.add(part)


def test_who_imports_the_top_of_the_house():
    everyone = {part: layer.parts | layer.inside_functions for part, layer in LAYERS.items()}
    assert {part for part, names in everyone.items() if "cli" in names} == {"__main__"}
    assert {part for part, names in everyone.items() if "web" in names} == {"cli", "quickstart"}
    assert {part for part, names in everyone.items() if "training" in names} == {"cli", "quickstart", "api", "__init__"}
    assert "learn" not in everyone["rollout"]
    assert "rollout" not in everyone["learn"]


BAD = [
    ("core/losses.py", "import scipy", "scipy (not a dependency"),
    ("core/losses.py", "import transformers", "transformers (core must do without it)"),
    ("core/losses.py", "from keel.errors import DataError", "keel.errors.DataError (core must not know it)"),
    ("config.py", "import torch", "torch (config must do without it)"),
    ("errors.py", "def f():\n    import torch", "errors.py:2: torch (errors must do without it)"),
    ("world.py", "from keel import config", "keel.config (world must not know it)"),
    (
        "data/prompts.py",
        "from ..models.policy import Policy",
        "keel.models.policy.Policy (data must not",
    ),
    ("rollout/score.py", "def f():\n    from keel.learn import update", "keel.learn.update (rollout must not"),
    ("learn/update.py", "import keel.rollout.sampler", "keel.rollout.sampler (learn must not know it)"),
    ("learn/update.py", "from .. import rollout", "keel.rollout (learn must not know it)"),
    ("learn/update.py", "import keel", "keel (learn must not know it)"),
    (
        "run/folder.py",
        "import importlib\nimportlib.import_module('keel.training.policy')",
        "keel.training.policy (run must",
    ),
    ("run/metrics_log.py", "import tensorboard", "tensorboard (an extra: only inside a function)"),
    ("training/policy.py", "from keel.cli import main", "keel.cli.main (training must not know it)"),
    ("training/policy.py", "from keel.quickstart import world", "keel.quickstart.world (training must not know it)"),
    ("training/policy.py", "if True:\n    from keel.web import app", "keel.web.app (training must not know it)"),
    (
        "run/read/curves.py",
        "from keel.run.metrics_log import read",
        "keel.run.metrics_log.read (run.read must not know it)",
    ),
    ("cli/train.py", "from keel.training import policy", "keel.training.policy (only inside a function)"),
    ("cli/train.py", "class Verb:\n    import torch", "torch (cli must do without it)"),
    ("__init__.py", "import torch", "torch (__init__ must do without it)"),
    ("helpers.py", "", "no part of the house is called 'helpers'"),
]


@pytest.mark.parametrize(("path", "source", "expected"), BAD, ids=[path for path, *_ in BAD])
def test_a_forbidden_import_is_reported(tmp_path: Path, path: str, source: str, expected: str):
    (tmp_path / path).parent.mkdir(exist_ok=True, parents=True)
    (tmp_path / path).write_text(source)
    lines = violations(tmp_path, ROOT / "pyproject.toml")
    assert len(lines) == 1, lines
    assert lines[0].startswith(path)
    assert expected in lines[0]


GOOD = [
    ("core/losses.py", "import math\nimport torch\nfrom .masked import whiten\nfrom keel.core import kl"),
    ("models/actor_critic.py", "from ..data.batches import Rollouts\ndef f():\n    import peft"),
    ("run/folder.py", "from keel import __version__"),
    (
        "cli/train.py",
        "from keel.errors import ConfigError\ndef f():\n    import torch\n    from keel.training import policy",
    ),
    ("__init__.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from keel.training import trainer"),
]


@pytest.mark.parametrize(("path", "source"), GOOD, ids=[path for path, _ in GOOD])
def test_an_allowed_import_is_not_reported(tmp_path: Path, path: str, source: str):
    (tmp_path / path).parent.mkdir(exist_ok=True, parents=True)
    (tmp_path / path).write_text(source)
    assert violations(tmp_path, ROOT / "pyproject.toml") == []
