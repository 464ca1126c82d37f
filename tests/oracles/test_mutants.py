"""The oracles bite: classic mistakes are written into a copy of keel, one at a time, and each makes some oracle
fail. A mistake is a textual edit whose place must be found exactly once, so it cannot go stale unnoticed."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PACKAGE = TESTS.parent / "src" / "keel"
ASSERTION = re.compile(r"^E +(AssertionError|assert )", re.MULTILINE)


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str  # under src/keel
    right: str
    wrong: str
    oracle: str  # under tests

    def apply(self, package: Path) -> None:
        path = package / self.file
        path.write_text(path.read_text().replace(self.right, self.wrong))


MUTANTS = [
    Mutant(
        "KL sign",
        "core/rewards.py",
        "token_scores - kl_coef * kl",
        "token_scores + kl_coef * kl",
        "core/test_rewards.py::test_rewards_are_the_score_minus_the_weighted_kl",
    ),
    Mutant(
        "k3 in the reward",
        "learn/targets.py",
        "kl_estimate(analysis.logprobs, ref_logprobs, settings.kl_estimator)",
        'kl_estimate(analysis.logprobs, ref_logprobs, "k3")',
        "oracles/test_system.py::test_the_kl_enters_the_reward_as_k1",
    ),
    Mutant(
        "score on the wrong index",
        "core/rewards.py",
        "last_counted_index(response_mask).unsqueeze(1)",
        "(last_counted_index(response_mask) - 1).clamp(min=0).unsqueeze(1)",
        "core/test_rewards.py::test_the_score_stands_on_the_last_counted_token",
    ),
    Mutant(
        "lambda applied to V",
        "core/advantages.py",
        "+ gamma * next_value",
        "+ gamma * gae_lambda * next_value",
        "core/test_advantages.py::test_gae",
    ),
    Mutant(
        "whitening over pads",
        "core/masked.py",
        "mean, var = masked_moments(x, mask, all_sum)",
        "mean, var = masked_moments(x, torch.ones_like(mask), all_sum)",
        "learn/test_targets.py::test_whitened_advantages",
    ),
    Mutant(
        "unbiased variance",
        "core/masked.py",
        "return mean, all_sum(masked_sum((x - mean) ** 2, mask)) / count",
        "return mean, all_sum(masked_sum((x - mean) ** 2, mask)) / (count - 1)",
        "learn/test_targets.py::test_whitened_advantages",
    ),
    Mutant(
        "ratio inverted",
        "core/losses.py",
        "torch.exp((new_logprobs - logprobs)",
        "torch.exp((logprobs - new_logprobs)",
        "core/test_losses.py::test_clipped_surrogate",
    ),
    Mutant(
        "min becomes max",
        "core/losses.py",
        "torch.maximum(-advantages * ratio, -advantages * clipped)",
        "torch.minimum(-advantages * ratio, -advantages * clipped)",
        "core/test_losses.py::test_clipped_surrogate",
    ),
    Mutant(
        "end token masked out",
        "rollout/sampler.py",
        "prompt_mask, responses, response_mask, logprobs,",
        "prompt_mask, responses, response_mask & (responses != pad_id), logprobs,",
        "oracles/test_sampler.py::test_which_tokens_count[tiny_gpt2]",  # where pad = end
    ),
    Mutant(
        "stored log-probs at temperature 1",
        "learn/targets.py",
        "partial(analyze_all, actor_critic, *arguments,",
        "partial(analyze_all, actor_critic, rollouts, 1.0, settings.microbatch_tokens,",
        "oracles/test_system.py::test_stored_logprobs_are_those_of_the_tempered_model[tiny_policy]",
    ),
    Mutant(
        "mean of each micro-batch",
        "learn/update.py",
        "microbatch), num_loss_tokens)",
        "microbatch), float(microbatch.response_mask.sum()))",
        "oracles/test_unchanged.py::test_micro_batches_never_change_the_gradient[tiny_policy-separate-20]",
    ),
    Mutant(
        "reference updated",
        "training/setup.py",
        "return ActorCritic(shard_model(copy.deepcopy(policy).requires_grad_(False), world))",
        "return ActorCritic(policy)",
        "oracles/test_unchanged.py::test_the_reference_stays_where_the_policy_started[tiny_policy]",
    ),
    Mutant(
        "gradient divided by the number of processes",
        "models/sharding.py",
        "set_gradient_divide_factor(1.0)",
        "set_gradient_divide_factor(float(mesh.size()))",
        "oracles/test_ranks.py::test_ranks_take_the_step_of_one[micro-batches of both]",
    ),
    Mutant(
        "a process without rows makes no pass",
        "learn/update.py",
        "for _ in range(idle):",
        "for _ in range(0 * idle):",
        "oracles/test_ranks.py::test_ranks_take_the_step_of_one[a rank without a row]",
    ),
    Mutant(
        "weights around the layers are stale",
        "models/sharding.py",
        "reshard_after_forward=True,  # of",
        "reshard_after_forward=None,  # of",
        "models/test_sharding.py::test_the_weights_around_the_layers_are_new_after_a_step",
    ),
    Mutant(
        "trained weights stay in 16 bits",
        "models/sharding.py",
        "weight.dtype.itemsize < 4:",
        "weight.dtype.itemsize < 2:",
        "models/test_sharding.py::test_trained_weights_are_float32_and_copies_are_their_rounding",
    ),
    Mutant(
        "inputs of layers are rounded",
        "models/sharding.py",
        "torch.float32, cast_forward_inputs=False)",
        "torch.float32, cast_forward_inputs=True)",
        "models/test_sharding.py::test_inputs_of_layers_are_not_rounded",
    ),
    Mutant(
        "tied weights are copied twice",
        "models/sharding.py",
        "return copy.deepcopy(empty, weights) if world.is_main else None",
        "return copy.deepcopy(empty).to_empty(device='cpu') if world.is_main else None",
        "models/test_sharding.py::test_a_gathered_copy_is_the_model_that_was_loaded",
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_place_of_the_mistake_is_found_once(mutant: Mutant) -> None:
    assert (PACKAGE / mutant.file).read_text().count(mutant.right) == 1


@pytest.mark.slow
def test_every_mutant_is_killed(tmp_path: Path) -> None:
    jobs = {"right": (copy_of_keel(tmp_path / "right"), sorted({mutant.oracle for mutant in MUTANTS}))}
    for number, mutant in enumerate(MUTANTS):
        folder = copy_of_keel(tmp_path / str(number))
        mutant.apply(folder / "keel")
        jobs[mutant.name] = (folder, [mutant.oracle])
    results = run(jobs, tmp_path)
    code, output = results.pop("right")
    assert code == 0, f"the oracles fail without a mistake too:\n{output}"
    survived = {name: output for name, (code, output) in results.items() if code != 1 or not ASSERTION.search(output)}
    assert not survived, "\n".join(f"{name} survived:\n{output[-1500:]}" for name, output in survived.items())


def copy_of_keel(folder: Path) -> Path:
    shutil.copytree(PACKAGE, folder / "keel", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def run(jobs: dict[str, tuple[Path, list[str]]], tmp_path: Path) -> dict[str, tuple[int, str]]:
    """Exit code and output of pytest for each (folder that holds keel, oracles)."""
    options = ["-x", "-q", "-p", "no:cacheprovider", f"--rootdir={TESTS.parent}"]
    arguments = {
        name: (str(folder), [*options, f"--basetemp={folder}/tmp", *(str(TESTS / oracle) for oracle in oracles)])
        for name, (folder, oracles) in jobs.items()
    }
    file = tmp_path / "jobs.json"
    file.write_text(json.dumps(arguments))
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "PYTHONPATH", "COV_"))
    }
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, str(Path(__file__).with_name("run_mutants.py")), str(file)]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert finished.returncode == 0, finished.stderr
    return {name: (code, output) for name, (code, output) in json.loads(finished.stdout).items()}
