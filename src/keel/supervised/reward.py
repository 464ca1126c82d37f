"""Train a reward model, or an ensemble of reward models, from human pairs or rankings (`keel reward`)."""

from contextlib import closing
from pathlib import Path

import torch

from keel.config import RewardConfig
from keel.data.preferences import Ranking
from keel.models.ensemble import RewardEnsemble, save_ensemble
from keel.models.gradients import require_gradients
from keel.models.heads import trunk
from keel.models.layers import recompute_layers
from keel.models.prompt_reading import chat_tokenizer
from keel.models.reading import Reading
from keel.models.reward_model import RewardModel
from keel.run.folder import RunFolder, delete_path, replace_folder, write_final_metrics
from keel.run.reward_files import check_held_out, write_held_out
from keel.stats.preference_metrics import calibrate, final_metrics, score_range
from keel.supervised.loop import fit
from keel.supervised.ranking_task import data_metrics, reward_task, save_with_gate
from keel.supervised.split import Split, split_rankings
from keel.terminal import print_line
from keel.world import generator


def reward(config: RewardConfig, resume: bool = False) -> dict[str, float]:
    """Train a reward model or an ensemble, and save it in `output/model` with the verdict of the gate.

    Returns the metrics on held-out prompts.
    """
    split = split_rankings(config)
    check_held_out(config.gate, split.held_out)
    if config.members == 1:
        return fit_model(config, split, resume)
    with closing(RunFolder.open(config.output, config.model_dump(mode="json"), resume)) as folder:
        members = [member_settings(config, number) for number in range(1, config.members + 1)]
        for number, settings in enumerate(members, start=1):
            print_line(f"member {number} of {config.members}")
            fit_model(settings, split, resume, own_head=True)
        metrics = join_members([Path(settings.output) / "model" for settings in members], config, split, folder)
        for settings in members if not config.checkpoint.keep_final else ():
            delete_path(RunFolder(settings.output).checkpoints)
        return metrics


def fit_model(config: RewardConfig, split: Split[Ranking], resume: bool, own_head: bool = False) -> dict[str, float]:
    """Train one reward model and save it in `output/model`."""
    torch.manual_seed(config.seed)  # for the random initial weights of the LoRA adapter
    model = RewardModel.load(
        config.model,
        config.dtype,
        config.template,
        config.lora,
        config.quantization,
        max_tokens=config.max_tokens,
        tokenizer=chat_tokenizer(config.model, config.data),
    )
    require_gradients(model.model, config.model)
    if own_head:
        draw_head(model, config.seed)
    if config.gradient_checkpointing:
        recompute_layers(trunk(model.model))
    return fit(config, reward_task(config, model, split), resume)


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
    members: list[Path], config: RewardConfig, split: Split[Ranking], folder: RunFolder
) -> dict[str, float]:
    """Save the members as one model and evaluate their mean. With `calibrate`, a temperature is fitted to the mean."""
    ensemble = RewardEnsemble([RewardModel.load(str(member)) for member in members])
    readings = [
        Reading(ranking.prompt, response, tools=ranking.tools)
        for ranking in split.held_out
        for response in ranking.responses
    ]
    flat = ensemble.member_scores(readings)
    counts = [len(ranking.responses) for ranking in split.held_out]
    scores = [of_ranking.tolist() for of_ranking in flat.mean(0).split(counts)]
    metrics = final_metrics(scores, split.held_out, data_metrics(split))
    if config.calibrate:
        ensemble.temperature = metrics["temperature"]
        flat /= ensemble.temperature
        scores, metrics = calibrate(scores, metrics)
    metrics |= score_range(scores, split.held_out)
    write_held_out(folder, split.held_out, scores, [of_ranking.tolist() for of_ranking in flat.split(counts, 1)])

    def save(target: Path) -> None:
        save_ensemble(target, members, ensemble.temperature)

    replace_folder(folder.model, lambda target: save_with_gate(save, target, config, metrics))
    write_final_metrics(folder, metrics)
    return metrics
