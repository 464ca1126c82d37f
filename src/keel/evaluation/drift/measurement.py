"""Sample or read the responses that `keel drift` compares, and measure them with the run's reward models."""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from keel.config import DecodingSettings, DriftConfig, TrainConfig, TrainPrompts
from keel.data.batches import Rollouts
from keel.data.chats import read_tools
from keel.data.padding import pad_rows
from keel.data.prompts import Prompt, encode_prompt
from keel.data.turns import encode_response
from keel.errors import ConfigError, DataError
from keel.evaluation.drift.novelty import PromptWordPairs
from keel.evaluation.evaluate import Scoring, gather_responses, measure_responses, sample_and_score
from keel.evaluation.evaluated_policy import PASS_TOKENS, EvaluatedPolicy
from keel.evaluation.frontier import find_checkpoints, settings_of_run
from keel.evaluation.judged import PER_TOKEN, EvaluatedResponses
from keel.evaluation.sample import (
    group_texts,
    load_frozen_model,
    load_policy,
    share_progress,
)
from keel.evaluation.slices import slice_rows
from keel.learn.targets import reference_logprobs
from keel.models.actor_critic import ActorCritic
from keel.models.prompt_reading import read_training_prompts
from keel.models.vocabulary import fill_id, require_embeddings
from keel.rollout.judge_scorer import refuse_comparisons
from keel.rollout.score import score
from keel.rollout.scorers import Scorer, build_scorers, check_signatures
from keel.run.folder import RunFolder
from keel.run.origin import fingerprints
from keel.run.reward_files import read_range
from keel.stats.two_samples import Numbers
from keel.world import ALONE, World, generator, raise_together

ENOUGH = 600  # training prompts to sample, or as many as there are prompts of today where these are more
LOGGED = 5_000  # most prompts to read from a run's log, where the file of the training prompts is missing


@dataclass(frozen=True)
class DriftSetup:
    """The policy, reference model and scorers of the run."""

    run: TrainConfig
    policy: EvaluatedPolicy  # with today's prompts
    reference: ActorCritic | None
    scorers: list[Scorer]
    notes: list[str]  # what could not be measured and why, for the report
    world: World = ALONE  # processes that share the prompts, each with all models

    @property
    def scoring(self) -> Scoring:
        return partial(score, scorers=self.scorers, tokenizer=self.policy.tokenizer)

    @property
    def decoding(self) -> DecodingSettings:
        return training_decoding(self.run)


def training_decoding(run: TrainConfig) -> DecodingSettings:
    """Return the decoding settings of the run, for one response to each prompt."""
    names = ("batch_size", "max_response_tokens", "temperature", "stop", "stop_in_text")
    return DecodingSettings(**{name: getattr(run.rollout, name) for name in names})


def open_drift_setup(config: DriftConfig, world: World) -> DriftSetup:
    """Load the run's policy, reference and scorers, and read today's prompts.

    Raises ConfigError without a policy or a scorer, DataError for rows that cannot be read.
    """
    run = raise_together(world, partial(settings_of_run, config.run))
    step, policy = world.from_main(lambda: list(find_checkpoints(config.run).items())[-1])
    logged = run.prompts.model_copy(update={"path": config.answers, "column": "prompt"})
    today = load_policy(policy, config.prompts or logged, training_decoding(run), config.dtype, world)
    chosen = choose_prompts(today.prompts, config.max_prompts or len(today.prompts), config.seed, "today")
    slice_rows(chosen, config.slices)  # called for its errors, before anything is sampled
    if config.answers:
        read_responses(chosen, config.answers)
    start, notes = run.reference or run.policy.model, describe_unfinished_run(config.run, step, run.steps)
    try:
        reference = world.in_turn(partial(load_frozen_model, start, config.dtype))
    except ConfigError as error:
        reference = None
        notes.append(f"no KL and no log-probabilities of the reference: {error}")
    without = [source.model for source in run.rewards if source.model and read_range(source.model) is None]
    notes += [f"{model} has no range.json: scores outside its range cannot be counted" for model in without]
    scorers = world.in_turn(partial(build_scorers, run.rewards))
    refuse_comparisons(scorers, "rewards of the run")
    check_signatures(scorers, [name for prompt in today.prompts for name in prompt.columns])
    return DriftSetup(run, replace(today, prompts=chosen), reference, scorers, notes, world)


def describe_unfinished_run(folder: str, step: int, planned: int) -> list[str]:
    """Return a note for a run without a result, whose last checkpoint is used instead."""
    if RunFolder(folder).policy.is_dir():
        return []
    return [f"the run is not finished: the policy of step {step} of {planned} is used"]


def choose_prompts(prompts: Sequence[Prompt], count: int, seed: int, which: str) -> list[Prompt]:
    """Choose `count` prompts at random, and return them in the order of the file."""
    order = torch.randperm(len(prompts), generator=generator(seed, "drift", which))[:count]
    return [prompts[row] for row in sorted(order.tolist())]


def training_prompts(setup: DriftSetup, folder: str) -> list[Prompt]:
    """Read the training prompts from their file or, if it is missing, from the run's log. Raises DataError."""
    settings, tokenizer = setup.run.prompts, setup.policy.tokenizer
    try:
        prompts = [each for file in read_training_prompts(settings, tokenizer, quiet=True) for each in file]
    except DataError as error:
        setup.notes.append(f"the training prompts are read from the run's log ({error.what}: {settings.path})")
        return logged_prompts(setup, RunFolder(folder))
    if has_changed(settings, RunFolder(folder)):
        setup.notes.append(f"{settings.path} has changed since the run began")
    return prompts


def logged_prompts(setup: DriftSetup, folder: RunFolder) -> list[Prompt]:
    """Read the distinct prompts in rollouts.jsonl, at most LOGGED of them."""
    prompts: dict[str, Prompt] = {}
    try:
        with folder.rollouts.open("rb") as lines:
            for line in lines:
                content = json.loads(line)["prompt"]
                key = json.dumps(content)
                if key not in prompts:
                    prompts[key] = encode_prompt(content, setup.policy.tokenizer)
                if len(prompts) == LOGGED:
                    break
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            "neither the training prompts nor the run's log can be read",
            str(folder.rollouts),
            "restore the file of the training prompts",
        ) from error
    if not prompts:
        raise DataError(
            "the file of the training prompts is missing, and the run's log is empty",
            str(folder.rollouts),
            "restore the file of the training prompts",
        )
    return list(prompts.values())


def has_changed(settings: TrainPrompts, folder: RunFolder) -> bool:
    """Whether a file of the training prompts has changed since the run began; False where that is unknown."""
    try:
        began = json.loads(folder.began.read_text(encoding="utf-8"))["inputs"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return any(began.get(path, now) != now for path, now in fingerprints([file.path for file in settings.files]))


def sample_and_score_prompts(
    setup: DriftSetup, prompts: Sequence[Prompt], seed: int, which: str, copies: int = 1
) -> EvaluatedResponses:
    """Sample `copies` responses to each prompt from the policy, and measure them. Every process must call it.

    Args:
        which: name of the stream of random numbers.
    """
    decoding = setup.decoding.model_copy(update={"num_responses": copies})
    policy = replace(setup.policy, prompts=list(prompts))
    with share_progress(f"drift {which}", len(prompts), copies, setup.world) as show:
        return sample_and_score(policy, setup.reference, setup.scoring, decoding, seed, which, setup.world, show)


def score_logged_responses(setup: DriftSetup, path: str) -> EvaluatedResponses:
    """Measure the responses of the file. A response counts as truncated only if its column `truncated` is true."""
    prompts, world = setup.policy.prompts, setup.world
    responses = gather_responses(raise_together(world, partial(_score_share, setup, path)), prompts, world)
    measured = responses.measured
    if setup.policy.stop_texts and not setup.decoding.stop_in_text:
        setup.notes.append("stop texts are missing from the logged rows, which are read as if an end token ended them")
    if not any("truncated" in prompt.columns for prompt in prompts):
        del measured["truncated"]
        setup.notes.append("truncated is left out: the logged rows have no column of that name")
    return responses


def _score_share(setup: DriftSetup, path: str) -> EvaluatedResponses:
    """Measure this process's share of the logged responses."""
    batches: dict[str, list[Tensor]] = defaultdict(list)
    texts: list[str] = []
    count, temperature = len(setup.policy.prompts), setup.decoding.temperature or 1.0
    share = replace(setup, policy=replace(setup.policy, prompts=setup.policy.prompts[setup.world.share(count)]))
    with share_progress("drift responses", count, 1, setup.world) as show:
        for rollouts in logged_rollouts(share, path):
            measured = measure_responses(rollouts, setup.policy, setup.reference, setup.scoring, temperature)
            for name, values in measured.items():
                batches[name].append(values.cpu())
            texts += rollouts.texts
            show(len(texts), {})
    by_name = {name: torch.cat(values).view(-1, 1) for name, values in batches.items()}
    return EvaluatedResponses(share.policy.prompts, group_texts(texts, 1), by_name)


def read_responses(prompts: Sequence[Prompt], path: str) -> list[str]:
    """Return the column `response` of all prompts. Raises DataError where a row has none."""
    responses = [prompt.columns.get("response") for prompt in prompts]
    if not all(isinstance(text, str) for text in responses):
        raise DataError('a row has no text in "response"', path, "give each row a prompt and a response")
    return [str(text) for text in responses]


def logged_rollouts(setup: DriftSetup, path: str) -> Iterator[Rollouts]:
    """Yield batches of the logged responses, as if the policy had just sampled them."""
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
        # `encode_response` appends an end token. It is removed where the response was cut or ended by a stop text, and
        # where the logged text already ends with an end token.
        ends = [
            len(row.tokens) - int(was_cut or stopped or row.tokens[row.num_prompt_tokens : -1][-1:] in endings)
            for row, was_cut, stopped in zip(rows, cut, by_text, strict=True)
        ]
        tokens = [list(row.tokens[row.num_prompt_tokens : end]) for row, end in zip(rows, ends, strict=True)]
        yield build_rollouts(setup, prompts, [list(prompt.tokens) for prompt in prompts], tokens, cut, responses)


def build_rollouts(
    setup: DriftSetup,
    prompts: list[Prompt],
    prompt_ids: list[list[int]],
    response_ids: list[list[int]],
    cut: Tensor,
    texts: list[str],
) -> Rollouts:
    """Pad the token ids to a batch. Raises DataError for ids without an embedding."""
    policy, tokenizer = setup.policy.model.policy, setup.policy.tokenizer
    require_embeddings(policy, [*prompt_ids, *response_ids], tokenizer, setup.policy.name)
    pad_id, device = fill_id(policy, tokenizer), policy.device
    prompt_tokens, prompt_mask = (each.to(device) for each in pad_rows(prompt_ids, pad_id, side="left"))
    tokens, mask = (each.to(device) for each in pad_rows(response_ids, pad_id))
    blank = torch.zeros(tokens.shape, device=device)
    return Rollouts(prompts, prompt_tokens, prompt_mask, tokens, mask, blank, cut.to(device), texts)


def prompt_logprobs(setup: DriftSetup, prompts: list[Prompt]) -> Numbers:
    """Compute the mean log-probability of each prompt's tokens but the first under the reference. -> [N]

    NaN for a prompt of one token, and for all prompts without a reference. Every process must call it, and reads a
    share of the prompts.
    """
    world = setup.world
    share = partial(_prompt_logprobs, setup, prompts[world.share(len(prompts))])
    return np.array([mean for means in world.gather_values(raise_together(world, share)) for mean in means])


def _prompt_logprobs(setup: DriftSetup, prompts: list[Prompt]) -> list[float]:
    means = np.full(len(prompts), np.nan)
    rows = [row for row, prompt in enumerate(prompts) if len(prompt.tokens) > 1]
    if setup.reference is not None and rows:
        longer = [prompts[row] for row in rows]
        first, rest = [[p.tokens[0]] for p in longer], [list(p.tokens[1:]) for p in longer]
        cut = torch.zeros(len(longer), dtype=torch.bool)
        batch = build_rollouts(setup, longer, first, rest, cut, [""] * len(longer))
        sums = reference_logprobs(setup.reference, batch, 1.0, PASS_TOKENS).double().sum(1)
        means[rows] = (sums / batch.lengths).cpu().numpy()
    values: list[float] = means.tolist()
    return values


def metric_values(
    setup: DriftSetup, evaluated: EvaluatedResponses, known: PromptWordPairs, of_training: bool
) -> dict[str, Numbers]:
    """Return the value of each metric for each response, [N] by name."""
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
            scores = measured[f"rewards/{scorer.name}"]
            outside = (scores < limits["score_lowest"]) | (scores > limits["score_highest"])
            measured[f"outside_range/{scorer.name}"] = np.where(np.isfinite(scores), outside, np.nan)
    if len(setup.scorers) == 1:
        del measured[f"rewards/{setup.scorers[0].name}"]  # the same as the score; a second test of it would cost power
    if setup.reference is not None:
        measured["prompt_logprob"] = prompt_logprobs(setup, evaluated.prompts)
    contents = [prompt.content for prompt in evaluated.prompts]
    measured["prompt_novelty"] = np.array([known.novelty(content, of_training) for content in contents])
    return measured
