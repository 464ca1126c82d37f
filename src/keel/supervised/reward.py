"""Train a reward model, or an ensemble of reward models, from human pairs or rankings (`keel reward`)."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from keel.config import RewardConfig
from keel.data.preferences import Ranking
from keel.loop.open_run import lock_folder
from keel.models.ensemble import save_ensemble
from keel.models.gradients import require_gradients
from keel.models.heads import trunk
from keel.models.layers import recompute_layers
from keel.models.prompt_reading import chat_tokenizer, print_remarks
from keel.models.reading import Reading
from keel.models.reward_model import MICROBATCH_TOKENS, RewardModel
from keel.models.sharding import shard_model
from keel.run.folder import RunFolder, delete_path, replace_folder, write_final_metrics
from keel.run.reward_files import check_held_out, write_held_out
from keel.stats.preference_metrics import calibrate, final_metrics, score_range
from keel.supervised.loop import fit
from keel.supervised.ranking_task import EncodedRanking, data_metrics, reward_task, save_with_gate, score_rankings
from keel.supervised.split import Split, split_rankings
from keel.world import World, generator


def reward(config: RewardConfig, resume: bool = False) -> dict[str, float]:
    """Train a reward model or an ensemble, and save it in `output/model` with the verdict of the gate.

    Returns the metrics on held-out prompts.
    """
    world = World.from_environment(config.parallel.shard)
    split = split_rankings(config)
    check_held_out(config.gate, split.held_out)
    if config.members == 1:
        return fit_model(config, split, world, resume)
    with lock_folder(config.output, config, resume, world) as folder:
        members = [member_settings(config, number) for number in range(1, config.members + 1)]
        for number, settings in enumerate(members, start=1):
            print_remarks([f"member {number} of {config.members}"])
            fit_model(settings, split, world, resume, own_head=True)
        metrics = join_members([Path(settings.output) / "model" for settings in members], config, split, folder, world)
        for settings in members if world.is_main and not config.checkpoint.keep_final else ():
            delete_path(RunFolder(settings.output).checkpoints)
        return metrics


def fit_model(
    config: RewardConfig, split: Split[Ranking], world: World, resume: bool, own_head: bool = False
) -> dict[str, float]:
    """Train one reward model and save it in `output/model`."""
    model = world.in_turn(partial(load_model, config, world, own_head))
    return fit(config, reward_task(config, model, split, world), world, resume)


def load_model(config: RewardConfig, world: World, own_head: bool) -> RewardModel:
    """Load a reward model to train, and divide its weights among the processes."""
    torch.manual_seed(config.seed)  # for the random initial weights of the LoRA adapter
    model = RewardModel.load(
        config.model,
        config.dtype,
        config.template,
        config.lora,
        config.quantization,
        max_tokens=config.max_tokens,
        device=initial_device(world),
        tokenizer=chat_tokenizer(config.model, config.data),
    )
    require_gradients(model.model, config.model)
    if own_head:
        draw_head(model, config.seed)
    if config.gradient_checkpointing:
        recompute_layers(trunk(model.model))
    shard_model(model.model, world)
    return model


def initial_device(world: World) -> torch.device:
    """Return the device on which a model is loaded. The device of a sharded model never holds the whole model."""
    return world.device if world.mesh is None else torch.device("cpu")


def member_settings(config: RewardConfig, number: int) -> RewardConfig:
    """Return the settings of one member: its seed, run folder and, with `member_models`, initial weights."""
    models = config.member_models or [config.model]
    changes = {
        "output": str(RunFolder(config.output).members / str(number)),
        "seed": config.seed + number,
        "model": models[(number - 1) % len(models)],
        "members": 1,
        "member_models": [],
        "gate": {},
        "checkpoint": config.checkpoint.model_copy(update={"keep_final": True}),  # until all have finished
    }
    return config.model_copy(update=changes)


@torch.no_grad()
def draw_head(model: RewardModel, seed: int) -> None:
    """Draw the weights of a head that is still zero: normal, of variance 1 / (width + 1) (Stiennon et al. 2020).

    The members of an ensemble thus have different heads from the start.
    """
    head = model.head
    if not head.weight.any():
        start = torch.randn(head.weight.shape, generator=generator(seed, "head")) / (head.in_features + 1) ** 0.5
        head.weight.copy_(start)


def join_members(
    members: list[Path], config: RewardConfig, split: Split[Ranking], folder: RunFolder, world: World
) -> dict[str, float]:
    """Save the members as one model and evaluate their mean. With `calibrate`, a temperature is fitted to the mean."""
    flat = torch.stack([member_scores(member, split.held_out, world) for member in members])
    counts = [len(ranking.responses) for ranking in split.held_out]
    scores = [of_ranking.tolist() for of_ranking in flat.mean(0).split(counts)]
    metrics = final_metrics(scores, split.held_out, data_metrics(split))
    temperature = metrics["temperature"] if config.calibrate else 1.0
    if config.calibrate:
        flat /= temperature
        scores, metrics = calibrate(scores, metrics)
    metrics |= score_range(scores, split.held_out)

    def save(target: Path) -> None:
        save_ensemble(target, members, temperature)

    def write() -> None:
        write_held_out(folder, split.held_out, scores, [of_ranking.tolist() for of_ranking in flat.split(counts, 1)])
        replace_folder(folder.model, lambda target: save_with_gate(save, target, config, metrics))
        write_final_metrics(folder, metrics)

    world.from_main(write)
    return metrics


def member_scores(member: Path, rankings: Sequence[Ranking], world: World) -> Tensor:
    """Score the responses of all rankings with a trained member. -> [N] float32, on every process"""
    model = world.in_turn(lambda: RewardModel.load(str(member), device=initial_device(world)))
    shard_model(model.model.requires_grad_(False), world)
    encoded = [
        EncodedRanking(
            [
                model.encode_within(Reading(ranking.prompt, response, tools=ranking.tools), model.limit)[0]
                for response in ranking.responses
            ],
            ranking,
        )
        for ranking in rankings
    ]
    scores = score_rankings(model, encoded, MICROBATCH_TOKENS, world)
    return torch.tensor([score for of_ranking in scores for score in of_ranking])
