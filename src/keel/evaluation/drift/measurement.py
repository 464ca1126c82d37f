"""The answers that `keel drift` compares: today's and those of the training, by one policy, before the same judges."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from keel.config import DecodingSettings, DriftConfig, PromptSettings, TrainConfig
from keel.data.batches import Rollouts
from keel.data.chats import read_tools
from keel.data.padding import pad_rows
from keel.data.prompts import Prompt, encode_prompt
from keel.data.turns import encode_response
from keel.errors import ConfigError, DataError
from keel.evaluation.drift.novelty import PromptWordPairs
from keel.evaluation.evaluate import Scoring, measure, sample_and_score
from keel.evaluation.frontier import find_checkpoints, settings_of_run
from keel.evaluation.judged import PER_TOKEN, EvaluatedResponses
from keel.evaluation.sample import PASS_TOKENS, EvaluatedPolicy, group_texts, load_frozen_model, load_policy
from keel.evaluation.slices import slice_rows
from keel.learn.targets import reference_logprobs
from keel.models.actor_critic import ActorCritic
from keel.models.prompt_reading import read_prompts
from keel.models.vocabulary import fill_id, require_embeddings
from keel.progress import ProgressDisplay
from keel.rollout.score import score
from keel.rollout.scorers import Scorer, build_scorers, check_signatures
from keel.run.folder import RunFolder
from keel.run.origin import fingerprints
from keel.run.reward_files import read_range
from keel.stats.two_samples import Numbers
from keel.world import generator

ENOUGH = 600  # training prompts that are answered where today's are fewer
LOGGED = 5_000  # different prompts of a run's log that stand for its training prompts


@dataclass(frozen=True)
class DriftSetup:
    """The run's policy, what its KL is measured to, and its judges."""

    run: TrainConfig
    policy: EvaluatedPolicy  # with today's prompts
    reference: ActorCritic | None
    scorers: list[Scorer]
    notes: list[str]  # what could not be measured, and why

    @property
    def scoring(self) -> Scoring:
        return partial(score, scorers=self.scorers, tokenizer=self.policy.tokenizer)

    @property
    def decoding(self) -> DecodingSettings:
        return training_decoding(self.run)


def training_decoding(run: TrainConfig) -> DecodingSettings:
    """One answer to a prompt, drawn as in the training."""
    names = ("batch_size", "max_response_tokens", "temperature", "stop", "stop_in_text")
    own = {name: getattr(run.rollout, name) for name in names}
    return DecodingSettings(**own)


def open_drift_setup(config: DriftConfig) -> DriftSetup:
    """Raises ConfigError without a policy or its judges, DataError for rows that cannot be read."""
    run = settings_of_run(config.run)
    step, policy = list(find_checkpoints(config.run).items())[-1]
    logged = run.prompts.model_copy(update={"path": config.answers, "column": "prompt"})
    today = load_policy(policy, config.prompts or logged, training_decoding(run), config.dtype)
    chosen = some(today.prompts, config.max_prompts or len(today.prompts), config.seed, "today")
    slice_rows(chosen, config.slices)  # report a mistake before anything is sampled
    if config.answers:
        read_responses(chosen, config.answers)
    start, notes = run.reference or run.policy.model, describe_unfinished_run(config.run, step, run.steps)
    try:
        reference = load_frozen_model(start, config.dtype)
    except ConfigError as error:
        reference = None
        notes.append(f"no KL and no log-probabilities of the reference: {error}")
    without = [source.model for source in run.rewards if source.model and read_range(source.model) is None]
    notes += [f"{model} has no range.json, so it is not known which scores are beyond it" for model in without]
    scorers = build_scorers(run.rewards)
    check_signatures(scorers, [name for prompt in today.prompts for name in prompt.columns])
    return DriftSetup(run, replace(today, prompts=chosen), reference, scorers, notes)


def describe_unfinished_run(folder: str, step: int, planned: int) -> list[str]:
    """A run without its result is judged by its last checkpoint."""
    if RunFolder(folder).policy.is_dir():
        return []
    return [f"the policy of step {step} of {planned} answers (the run is not finished)"]


def some(prompts: Sequence[Prompt], count: int, seed: int, which: str) -> list[Prompt]:
    """`count` of the prompts, chosen at random, in their order."""
    order = torch.randperm(len(prompts), generator=generator(seed, "drift", which))[:count]
    return [prompts[row] for row in sorted(order.tolist())]


def training_prompts(setup: DriftSetup, folder: str) -> list[Prompt]:
    """All prompts of the training; where their file is gone, those in the run's log. Raises DataError without any."""
    settings, tokenizer = setup.run.prompts, setup.policy.tokenizer
    try:
        prompts = read_prompts(settings, tokenizer, quiet=True)
    except DataError as error:
        setup.notes.append(f"prompts of the run's log stand for those of the training ({error.what}: {settings.path})")
        return logged_prompts(setup, RunFolder(folder))
    if changed_since(settings, RunFolder(folder)):
        setup.notes.append(f"{settings.path} has changed since the run began")
    return prompts


def logged_prompts(setup: DriftSetup, folder: RunFolder) -> list[Prompt]:
    """The different prompts in rollouts.jsonl, at most LOGGED of them."""
    found: dict[str, Prompt] = {}
    try:
        with folder.rollouts.open("rb") as lines:
            for line in lines:
                content = json.loads(line)["prompt"]
                key = json.dumps(content)
                if key not in found:
                    found[key] = encode_prompt(content, setup.policy.tokenizer)
                if len(found) == LOGGED:
                    break
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError("neither the training prompts nor the run's log can be read", str(folder.rollouts)) from error
    if not found:
        raise DataError("the training prompts are gone, and the run's log is empty", str(folder.rollouts))
    return list(found.values())


def changed_since(settings: PromptSettings, folder: RunFolder) -> bool:
    try:
        began = json.loads(folder.began.read_text(encoding="utf-8"))["inputs"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return any(began.get(path, now) != now for path, now in fingerprints([settings.path]))


def sample_and_score_prompts(
    setup: DriftSetup, prompts: Sequence[Prompt], seed: int, which: str, copies: int = 1
) -> EvaluatedResponses:
    """The policy answers and the judges judge."""
    decoding = setup.decoding.model_copy(update={"num_responses": copies})
    policy = replace(setup.policy, prompts=list(prompts))
    with ProgressDisplay(f"drift {which}", len(prompts) * copies) as display:
        return sample_and_score(policy, setup.reference, setup.scoring, decoding, seed, which, display.show)


def score_logged_responses(setup: DriftSetup, path: str) -> EvaluatedResponses:
    """The judges judge the answers of the file. They are taken to have ended, unless a column `truncated` says not."""
    parts: list[dict[str, Tensor]] = []
    texts: list[str] = []
    with ProgressDisplay("drift answers", len(setup.policy.prompts)) as display:
        for rollouts in logged_rollouts(setup, path):
            temperature = setup.decoding.temperature or 1.0
            parts.append(measure(rollouts, setup.policy, setup.reference, setup.scoring, temperature))
            texts += rollouts.texts
            display.show(len(texts), {})
    measured = {name: torch.cat([part[name].cpu() for part in parts]).view(-1, 1) for name in parts[0]}
    if setup.policy.stop_texts and not setup.decoding.stop_in_text:
        setup.notes.append(
            "stop texts are left out of the logged rows, which are read as if an end token had ended them"
        )
    if not any("truncated" in prompt.columns for prompt in setup.policy.prompts):
        del measured["truncated"]
        setup.notes.append("truncated: the logged rows do not say")
    return EvaluatedResponses(setup.policy.prompts, group_texts(texts, 1), measured)


def read_responses(prompts: Sequence[Prompt], path: str) -> list[str]:
    """Raises DataError where a row has none."""
    responses = [prompt.columns.get("response") for prompt in prompts]
    if not all(isinstance(text, str) for text in responses):
        raise DataError('a row has no text in "response"', path, "give rows of `prompt, response`")
    return [str(text) for text in responses]


def logged_rollouts(setup: DriftSetup, path: str) -> Iterator[Rollouts]:
    """The logged answers as the policy would have written them."""
    policy, size = setup.policy, setup.decoding.batch_size
    endings = [(number,) for number in policy.end_ids]
    for start in range(0, len(policy.prompts), size):
        prompts = policy.prompts[start : start + size]
        responses = read_responses(prompts, path)
        rows = [
            encode_response(p.content, a, policy.tokenizer, policy.end_ids, read_tools(p.columns))
            for p, a in zip(prompts, responses, strict=True)
        ]
        cut = torch.tensor([bool(prompt.columns.get("truncated")) for prompt in prompts])
        by_text = [any(text in response for text in policy.stop_texts) for response in responses]
        ends = [  # what was cut, or ended by a stop text, has no end token, and a text may end with one
            len(row.tokens) - int(was_cut or stopped or row.tokens[row.num_prompt_tokens : -1][-1:] in endings)
            for row, was_cut, stopped in zip(rows, cut, by_text, strict=True)
        ]
        tokens = [list(row.tokens[row.num_prompt_tokens : end]) for row, end in zip(rows, ends, strict=True)]
        yield build_rollouts(setup, prompts, [list(prompt.tokens) for prompt in prompts], tokens, cut, responses)


def build_rollouts(
    setup: DriftSetup,
    prompts: list[Prompt],
    before: list[list[int]],
    after: list[list[int]],
    cut: Tensor,
    texts: list[str],
) -> Rollouts:
    """Ids that are read and ids that are looked at, as a batch."""
    policy, tokenizer = setup.policy.model.policy, setup.policy.tokenizer
    require_embeddings(policy, [*before, *after], tokenizer, setup.policy.name)
    pad_id, device = fill_id(policy, tokenizer), policy.device
    prompt_tokens, prompt_mask = (part.to(device) for part in pad_rows(before, pad_id, side="left"))
    tokens, mask = (part.to(device) for part in pad_rows(after, pad_id))
    blank = torch.zeros(tokens.shape, device=device)
    return Rollouts(prompts, prompt_tokens, prompt_mask, tokens, mask, blank, cut.to(device), texts)


def prompt_logprobs(setup: DriftSetup, prompts: list[Prompt]) -> Numbers:
    """Mean log-probability of a prompt's tokens under the reference, each given those before it; nan for one token."""
    found = np.full(len(prompts), np.nan)
    readable = [row for row, prompt in enumerate(prompts) if len(prompt.tokens) > 1]
    if setup.reference is None or not readable:
        return found
    own = [prompts[row] for row in readable]
    first, rest = [[p.tokens[0]] for p in own], [list(p.tokens[1:]) for p in own]
    batch = build_rollouts(setup, own, first, rest, torch.zeros(len(own), dtype=torch.bool), [""] * len(own))
    sums = reference_logprobs(setup.reference, batch, 1.0, PASS_TOKENS).double().sum(1)
    found[readable] = (sums / batch.lengths).cpu().numpy()
    return found


def table(
    setup: DriftSetup, evaluated: EvaluatedResponses, known: PromptWordPairs, of_training: bool
) -> dict[str, Numbers]:
    """A value for each answer and figure, name -> [N]."""
    measured = {name: values[:, 0].double().cpu().numpy() for name, values in evaluated.measured.items()}
    for name in [name for name in measured if name.startswith("cut/")]:
        share = measured.pop(name).mean()
        if share:
            when = "the training" if of_training else "today"
            setup.notes.append(f"{name}: {share:.1%} of the texts of {when} are too long and lost their beginning")
    for name in PER_TOKEN:
        if name in measured:
            measured[name] = measured[name] / measured["length"]
    for source, scorer in zip(setup.run.rewards, setup.scorers, strict=True):
        limits = read_range(source.model) if source.model else None
        if limits is not None:
            said = measured[f"rewards/{scorer.name}"]
            outside = (said < limits["score_lowest"]) | (said > limits["score_highest"])
            measured[f"outside_range/{scorer.name}"] = np.where(np.isfinite(said), outside, np.nan)
    if len(setup.scorers) == 1:
        del measured[f"rewards/{setup.scorers[0].name}"]  # it is the score
    if setup.reference is not None:
        measured["prompt_logprob"] = prompt_logprobs(setup, evaluated.prompts)
    contents = [prompt.content for prompt in evaluated.prompts]
    measured["prompt_novelty"] = np.array([known.novelty(content, of_training) for content in contents])
    return measured
