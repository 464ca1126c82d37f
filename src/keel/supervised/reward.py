"""What `keel reward` does: one reward model, or an ensemble of several, from human pairs or rankings."""

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
from keel.run.folder import RunFolder, remove, replace_folder, write_final_metrics
from keel.run.reward_files import check_held_out, write_held_out
from keel.stats.preference_metrics import calibrate, final_metrics, score_range
from keel.supervised.loop import fit
from keel.supervised.ranking_task import data_metrics, reward_task, save_with_gate
from keel.supervised.split import Split, split_rankings
from keel.terminal import tell
from keel.world import generator


def reward(config: RewardConfig, resume: bool = False) -> dict[str, float]:
    """Learn a reward model or an ensemble from pairs or rankings; it is in `output/model`, with the gate's verdict.

    Returns the figures on held-out prompts.
    """
    split = split_rankings(config)
    check_held_out(config.gate, split.held_out)
    if config.members == 1:
        return fit_model(config, split, resume)
    with closing(RunFolder.open(config.output, config.model_dump(mode="json"), resume)) as folder:
        members = [member_settings(config, number) for number in range(1, config.members + 1)]
        for number, settings in enumerate(members, start=1):
            tell(f"member {number} of {config.members}")
            fit_model(settings, split, resume, own_head=True)
        metrics = join([Path(settings.output) / "model" for settings in members], config, split, folder)
        for settings in members if not config.checkpoint.keep_final else ():
            remove(RunFolder(settings.output).checkpoints)
        return metrics


def fit_model(config: RewardConfig, split: Split[Ranking], resume: bool, own_head: bool = False) -> dict[str, float]:
    """One reward model, from its start to `output/model`."""
    torch.manual_seed(config.seed)  # the adapter's start
    model = RewardModel.load(
        config.model,
        config.dtype,
        config.template,
        config.lora,
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
    """A member has a seed, a run folder and, if `member_models` says so, weights of its own to start from."""
    models = config.member_models or [config.model]
    own = {
        "output": str(RunFolder(config.output).members / str(number)),
        "seed": config.seed + number,
        "model": models[(number - 1) % len(models)],
        "members": 1,
        "member_models": [],
        "gate": {},
        "checkpoint": config.checkpoint.model_copy(update={"keep_final": True}),  # until all have finished
    }
    return config.model_copy(update=own)


@torch.no_grad()
def draw_head(model: RewardModel, seed: int) -> None:
    """A start of its own for a head that is still zero: normal, of variance 1 / (width + 1) (Stiennon et al. 2020)."""
    head = model.head
    if not head.weight.any():
        start = torch.randn(head.weight.shape, generator=generator(seed, "head")) / (head.in_features + 1) ** 0.5
        head.weight.copy_(start)


def join(members: list[Path], config: RewardConfig, split: Split[Ranking], folder: RunFolder) -> dict[str, float]:
    """The members as one model, judged as one. With `calibrate` their mean gets a temperature of its own."""
    ensemble = RewardEnsemble([RewardModel.load(str(member)) for member in members])
    readings = [
        Reading(ranking.prompt, response, tools=ranking.tools)
        for ranking in split.held_out
        for response in ranking.responses
    ]
    flat = ensemble.member_scores(readings)
    counts = [len(ranking.responses) for ranking in split.held_out]
    scores = [part.tolist() for part in flat.mean(0).split(counts)]
    metrics = final_metrics(scores, split.held_out, data_metrics(split))
    if config.calibrate:
        ensemble.temperature = metrics["temperature"]
        flat /= ensemble.temperature
        scores, metrics = calibrate(scores, metrics)
    metrics |= score_range(scores, split.held_out)
    write_held_out(folder, split.held_out, scores, [part.tolist() for part in flat.split(counts, 1)])

    def save(target: Path) -> None:
        save_ensemble(target, members, ensemble.temperature)

    replace_folder(folder.model, lambda target: save_with_gate(save, target, config, metrics))
    write_final_metrics(folder, metrics)
    return metrics
