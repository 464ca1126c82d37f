"""The example that is read first: short, flat, built on keel.core alone, and right."""

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

FILE = Path(__file__).parents[1] / "examples" / "minimal_ppo.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("minimal_ppo", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_short_and_uses_nothing_but_torch_and_core() -> None:
    source = FILE.read_text()
    assert len(source.splitlines()) <= 200
    imported = {
        name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    allowed = {name for name in imported if name == "torch" or name.startswith("keel.core.")}
    assert imported - allowed <= sys.stdlib_module_names


def test_it_nears_the_exact_optimum(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    result = example.main(steps=20)
    assert result["start"] < 0 < result["J"] < result["J*"]
    assert result["share"] > 0.9
    assert f"exact optimum J* {result['J*']:.4f}" in capsys.readouterr().out


def test_its_enumeration_is_complete(example: ModuleType) -> None:
    """Probabilities of all 121 answers to each prompt sum to 1, and at the reference itself KL is 0."""
    torch.manual_seed(1)
    model = example.Network(example.VOCABULARY)
    prompts, responses, mask = example.every_response()
    assert len(prompts) == 3 * 121
    with torch.no_grad():
        logprobs = example.response_logprobs(model, prompts, responses).masked_fill(~mask, 0.0).sum(1)
    torch.testing.assert_close(logprobs.exp().view(3, 121).sum(1), torch.ones(3))
    at_reference = example.exact(model, model)
    assert at_reference["kl"] == 0
    assert at_reference["J"] == pytest.approx(at_reference["score"])
    assert at_reference["J*"] > at_reference["J"]
