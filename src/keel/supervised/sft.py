"""Supervised fine-tuning: train a model on the completions or texts of a file (`keel sft`)."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from keel.config import SftConfig, SupervisedSettings
from keel.data.examples import ExampleFormat, load_examples
from keel.data.notes import Notes
from keel.data.padding import microbatches, pad_rows
from keel.data.turns import Example
from keel.errors import ConfigError
from keel.models.gradients import require_gradients
from keel.models.heads import token_statistics, trunk, unwrap_model
from keel.models.layers import recompute_layers
from keel.models.loading import end_token_ids, load_causal_lm, save_policy
from keel.models.packed import token_states
from keel.models.positions import num_positions
from keel.models.prompt_reading import chat_tokenizer, end_responses_at_turns, print_remarks, read_prompt_format
from keel.models.sharding import forward_pass, shard_model
from keel.models.vocabulary import report_unembedded_ids, require_embeddings
from keel.supervised.held_out import measure_shares
from keel.supervised.learner import SupervisedTask
from keel.supervised.loop import fit
from keel.supervised.split import Split, split_rows
from keel.world import World


def sft(config: SftConfig, resume: bool = False) -> dict[str, float]:
    """Fine-tune a model on completions or texts, and save it in `output/model`. Return the metrics on held-out rows."""
    world = World.from_environment(config.parallel.shard)
    model, tokenizer, ends = load_speaker(config, world)
    split, num_cut = load_split(config, model, tokenizer, ends)
    train, budget = split.train, config.microbatch_tokens
    task = SupervisedTask(
        name="sft",
        model=model,
        lengths=[len(example.tokens) for example in train],
        weights=[example.num_targets for example in train],
        row=lambda i: {"prompt": train[i].prompt, "text": tokenizer.decode(list(train[i].tokens))},
        loss=lambda rows: target_losses(model, [train[i] for i in rows]).sum(),
        evaluate=lambda: evaluate_examples(model, split.held_out, budget, world),
        facts={"rows_left_out": split.left_out, "rows_cut": num_cut},
        save=lambda plain, folder, metrics: save_policy(plain, tokenizer, folder),
        watch=(lambda: evaluate_examples(model, split.watched, budget, world)["loss"]) if split.watched else None,
    )
    return fit(config, task, world, resume)


def load_speaker(config: SupervisedSettings, world: World) -> tuple[Any, Any, list[int]]:
    """Load the causal language model to train, its tokenizer, and the ids of its end tokens.

    The weights of the model are divided among the processes. Raises ConfigError for a model without an end token.
    """
    loaded: tuple[Any, Any, list[int]] = world.in_turn(partial(_load_speaker, config, world))
    return loaded


def _load_speaker(config: SupervisedSettings, world: World) -> tuple[Any, Any, list[int]]:
    tokenizer = chat_tokenizer(config.model, config.data)
    torch.manual_seed(config.seed)  # for the random initial weights of the LoRA adapter
    model: Any = load_causal_lm(config.model, config.dtype, config.lora, config.quantization)
    if world.mesh is None:  # otherwise the device never holds the whole model
        model.to(world.device)
    require_gradients(model, config.model)
    report_unembedded_ids(model, tokenizer, config.model)
    if config.gradient_checkpointing:
        recompute_layers(trunk(model))
    end_responses_at_turns(model, tokenizer, config.data)
    ends = end_token_ids(model, tokenizer)
    if not ends:
        raise ConfigError(
            "the model has no end token", where=config.model, fix="set eos_token_id in its generation_config.json"
        )
    return shard_model(model, world), tokenizer, ends


def longest_row(config: SupervisedSettings, model: Any) -> int:
    """Return the largest number of tokens of a row: `max_tokens`, or the model's positions if these are fewer."""
    return min(config.max_tokens, num_positions(model) or config.max_tokens)


def load_split(config: SftConfig, model: Any, tokenizer: Any, ends: Sequence[int]) -> tuple[Split[Example], int]:
    """Load and split the examples, without those that have no token to learn. Also return the number of cut rows."""
    data, notes, num_cut = config.data, Notes(), 0
    example_format = ExampleFormat(tokenizer, ends, longest_row(config, model), config.turns, read_prompt_format(data))

    def load(path: str) -> list[Example]:
        nonlocal num_cut
        examples, cut = load_examples(path, example_format, data.split, notes)
        require_embeddings(model, [example.tokens for example in examples], tokenizer, path)
        num_cut += cut
        return examples

    examples = load(data.path)
    learnable = [example for example in examples if example.num_targets > 0]
    others = [example for example in load(data.eval_path) if example.num_targets > 0] if data.eval_path else None
    print_remarks(notes.lines())
    split = split_rows(learnable, others, lambda example: example.prompt, config)
    return replace(split, left_out=len(examples) - len(learnable)), num_cut


def target_losses(model: Any, examples: Sequence[Example]) -> Tensor:
    """Compute -log p of every token to learn in all examples. -> [number of targets]

    Logits are computed at the positions of these tokens alone.
    """
    device = unwrap_model(model).device
    tokens, mask = (tensor.to(device) for tensor in pad_rows([example.tokens for example in examples], 0))
    learned = pad_rows([example.learned for example in examples], 0)[0].to(device).bool()
    predicting = learned[mask].nonzero().squeeze(1) - 1  # the state before a token predicts it

    def logprobs() -> Tensor:
        return token_statistics(model, token_states(model, tokens, mask)[predicting], tokens[learned])[0]

    return -forward_pass(model, logprobs)


def evaluate_examples(
    model: Any, examples: Sequence[Example], microbatch_tokens: int, world: World
) -> dict[str, float]:
    """Compute the mean loss per learned token, and its exponential. Empty without examples."""
    if not examples:
        return {}
    lengths = [len(example.tokens) for example in examples]

    def total_loss(rows: list[int]) -> float:
        groups = microbatches([lengths[row] for row in rows], microbatch_tokens)
        return sum(float(target_losses(model, [examples[rows[i]] for i in group]).sum()) for group in groups)

    total = sum(measure_shares(model, lengths, total_loss, world))
    loss = total / sum(example.num_targets for example in examples)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}  # exp overflows above 709
