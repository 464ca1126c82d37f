"""Keep the responses of an external engine until the next checkpoint, so that a resumed run repeats them.

The last bits of an engine's log-probs, and in bfloat16 even its tokens, depend on which responses were sampled
together. A resumed run therefore reads the responses of the steps after its checkpoint instead of sampling them again.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from keel.data.batches import Rollouts
from keel.data.padding import pad_rows
from keel.data.prompts import Prompt
from keel.models.vocabulary import fill_id
from keel.rollout.sampler import decode_responses
from keel.run.folder import RunFolder, storage, write_atomic
from keel.training.setup import prompts_of_step
from keel.training.trainer import PolicyTrainer


def sample_or_recall(trainer: PolicyTrainer, folder: RunFolder) -> Rollouts:
    """Return the responses of the next step: those of the journal, or new ones, which are then written to it."""
    if not trainer.setup.engine.is_external:
        return trainer.sample()
    path = journal_path(folder, trainer.state.step + 1)
    recalled = recall_responses(path, trainer)
    if recalled is not None:
        trainer.state.seconds["sample"] = 0.0
        return recalled
    rollouts = trainer.sample()
    keep_responses(path, rollouts)
    return rollouts


def journal_path(folder: RunFolder, step: int) -> Path:
    return folder.responses / f"step-{step:06d}.safetensors"


def trim_journal(folder: RunFolder, step: int) -> None:
    """Delete the responses of the steps up to this one, which a checkpoint contains. Raises CheckpointError."""
    with storage(folder.responses):
        for path in folder.responses.glob("step-*.safetensors"):
            if int(path.stem.partition("-")[2]) <= step:
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


def recall_responses(path: Path, trainer: PolicyTrainer) -> Rollouts | None:
    """Return the responses of a step; None if the journal has none, or those of other prompts."""
    setup, step = trainer.setup, trainer.state.step + 1
    rollout, device = setup.config.rollout, setup.world.device
    prompts = prompts_of_step(setup.prompts, setup.config.seed, step, rollout.batch_size, rollout.group_size or 1)
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
