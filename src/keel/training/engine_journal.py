"""Keep the responses of an external engine until the next checkpoint, so that a resumed run repeats them.

The last bits of an engine's log-probs, and in bfloat16 even its tokens, depend on which responses were sampled
together. A resumed run therefore reads the responses of the steps after its checkpoint instead of sampling them again.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from keel.data.batches import Rollouts
from keel.data.padding import pad_rows
from keel.data.prompts import Prompt
from keel.models.vocabulary import fill_id
from keel.rollout.engine import Draws
from keel.rollout.sampler import decode_responses
from keel.run.folder import RunFolder, storage, write_atomic
from keel.training.resampling import SampleRound
from keel.training.setup import TrainingSetup
from keel.training.trainer import PolicyTrainer


def sample_or_recall(trainer: PolicyTrainer, folder: RunFolder) -> Rollouts:
    """Return the responses of the next step: those of the journal, or new ones, which are then written to it."""
    if not trainer.setup.engine.is_external:
        return trainer.sample()
    path = journal_path(folder, trainer.state.step + 1)
    recalled = recall_responses(path, trainer.setup, trainer.step_prompts())
    if recalled is not None:
        trainer.state.seconds["sample"] = 0.0
        return recalled
    rollouts = trainer.sample()
    keep_responses(path, rollouts)
    return rollouts


def journal_of_rounds(trainer: PolicyTrainer, folder: RunFolder) -> SampleRound | None:
    """Return what samples or recalls the responses of a round of resampling; None for keel's sampler."""
    if not trainer.setup.engine.is_external:
        return None

    def sample(number: int, prompts: Sequence[Prompt], draws: Draws) -> Rollouts:
        path = journal_path(folder, trainer.state.step + 1, number)
        recalled = recall_responses(path, trainer.setup, list(prompts))
        if recalled is not None:
            return recalled
        rollouts = trainer.setup.sample(prompts, draws)
        keep_responses(path, rollouts)
        return rollouts

    return sample


def journal_path(folder: RunFolder, step: int, resampling: int = 0) -> Path:
    """Return the file of a step's responses, or of those of a round of resampling."""
    number = f"-{resampling:02d}" if resampling else ""
    return folder.responses / f"step-{step:06d}{number}.safetensors"


def trim_journal(folder: RunFolder, step: int) -> None:
    """Delete the responses of the steps up to this one, which a checkpoint contains. Raises CheckpointError."""
    with storage(folder.responses):
        for path in folder.responses.glob("step-*.safetensors"):
            if int(path.stem.split("-")[1]) <= step:
                path.unlink()
        if folder.responses.is_dir() and not any(folder.responses.iterdir()):
            folder.responses.rmdir()


def keep_responses(path: Path, rollouts: Rollouts) -> None:
    """Write tokens, log-probs and lengths of the responses, with a fingerprint of their prompts."""
    tensors = {
        "tokens": rollouts.response_tokens.cpu().contiguous(),
        "logprobs": rollouts.logprobs.cpu().contiguous(),
        "lengths": rollouts.lengths.cpu(),
        "truncated": rollouts.truncated.cpu(),
    }
    write_atomic(path, save(tensors, metadata={"prompts": fingerprint(rollouts.prompts)}))


def recall_responses(path: Path, setup: TrainingSetup, prompts: list[Prompt]) -> Rollouts | None:
    """Return the responses in a file of the journal; None if there are none, or those of other prompts."""
    rollout, device = setup.config.rollout, setup.world.device
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("prompts") != fingerprint(prompts):
                return None
            tokens, logprobs, lengths, truncated = (
                file.get_tensor(name).to(device) for name in ("tokens", "logprobs", "lengths", "truncated")
            )
    except (OSError, SafetensorError):
        return None
    pad_id = fill_id(setup.actor_critic.policy, setup.tokenizer)
    prompt_tokens, prompt_mask = (x.to(device) for x in pad_rows([p.tokens for p in prompts], pad_id, side="left"))
    mask = torch.arange(tokens.shape[1], device=device) < lengths.unsqueeze(1)
    texts = decode_responses(setup.tokenizer, prompts, tokens, mask, truncated, rollout.stop_in_text)
    return Rollouts(prompts, prompt_tokens, prompt_mask, tokens, mask, logprobs, truncated, texts)


def fingerprint(prompts: list[Prompt]) -> str:
    return hashlib.sha256(json.dumps([prompt.tokens for prompt in prompts]).encode()).hexdigest()
