"""Hidden states of rows of unequal length, with no work on padding and none repeated on what rows share.

A trial detects models that cannot read packed rows, because they compute more across tokens than this attention does.
They read padded rows. Models whose states depend on the other rows of a batch read one row at a time.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from keel.errors import ConfigError
from keel.models.attention import Layout
from keel.models.heads import UNFIT, check_logits, trunk, unwrap_model
from keel.models.layers import has_known_layers, rotations, run_layers
from keel.models.positions import rotation_threshold
from keel.models.prefixes import find_shared_prefixes
from keel.models.trial import states_agree, trial

ATTENTION = "keel"
"""Name of this attention in a transformers config: sdpa, or attention of packed rows if a layout is passed."""
HARMLESS = {"position_ids", "cache_position", "is_causal", "use_cache"}
"""Arguments of attention functions that the mask or the layout already determines."""


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    layout: Layout | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention function for transformers. With a layout, query [1, heads, N, D] -> [1, N, heads, D].

    Raises TypeError for an argument that would change the result but is not supported here.
    """
    unknown = [name for name, value in others.items() if name not in HARMLESS and not _has_no_effect(value)]
    if unknown or not getattr(module, "is_causal", True) or others.get("is_causal") is False:
        raise TypeError(f"attention with {', '.join(unknown) or 'a view of later tokens'}")
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    if attention_mask is not None and attention_mask.numel() > 1:
        raise TypeError("attention with a mask that depends on the positions in a row")
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return layout.attend(query, key, value, scaling, sliding_window).unsqueeze(0), None


def _has_no_effect(value: Any) -> bool:
    """Return whether an argument has a value that changes nothing, such as a dropout of 0."""
    return value is None or (isinstance(value, int | float) and not value)


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def reads_packed_rows(model: Any) -> bool:
    """Return whether the model reads packed rows, without work on padding."""
    return bool(unwrap_model(model).config.get_text_config()._attn_implementation == ATTENTION)


def reads_single_rows(model: Any) -> bool:
    """Return whether the model reads one row at a time, because other rows in a batch would change its states."""
    return getattr(unwrap_model(model), "keel_reads_single_rows", False)


def token_states(model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """Return the hidden states of the counted tokens, row by row. [B, L], [B, L] bool -> [mask.sum(), H]

    Padding may be on either side.
    """
    passes = _rows_of_passes(model, mask)
    if len(passes) == 1:
        return _states(model, tokens, mask)
    lengths = mask.sum(1)
    by_pass = [_states(model, tokens[rows], mask[rows]).split(lengths[rows].tolist()) for rows in passes]
    order = torch.cat(passes).argsort().tolist()
    by_row = [states for states_of_pass in by_pass for states in states_of_pass]
    return torch.cat([by_row[place] for place in order])


def _rows_of_passes(model: Any, mask: Tensor) -> list[Tensor]:
    """Return the rows of each forward pass: one pass with all rows, unless rows would change each other's states."""
    every = torch.arange(len(mask), device=mask.device)
    if reads_single_rows(model):
        return list(every.split(1))
    threshold, lengths = rotation_threshold(model), mask.sum(1)
    if threshold is None or bool((lengths <= threshold).all()):
        return [every]
    # LongRoPE takes the angles of all rows from the longest row of the batch.
    return [rows for rows in (every[lengths <= threshold], every[lengths > threshold]) if len(rows)]


def _states(model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """Compute `token_states` in one forward pass."""
    if not reads_packed_rows(model):
        tokens, mask = left_align(tokens, mask)
        masked = {} if reads_single_rows(model) else {"attention_mask": mask.long()}
        return trunk(model)(input_ids=tokens, use_cache=False, **masked).last_hidden_state[mask]
    lengths, order = mask.sum(1).sort(descending=True, stable=True)
    tokens, mask = left_align(tokens[order], mask[order])
    row_lengths = lengths.tolist()
    layout = Layout(row_lengths, tokens.device, find_shared_prefixes(tokens, mask, row_lengths))
    states = _packed_states(trunk(model), tokens[mask], (mask.cumsum(1) - 1)[mask], layout)
    return states.index_select(0, _back(lengths, order))


def _packed_states(trunk: Any, tokens: Tensor, positions: Tensor, layout: Layout) -> Tensor:
    """Compute the states of packed tokens [N] with positions [N], in the order of the layout. -> [N, H]"""
    distinct = layout.select(tokens)
    if has_known_layers(trunk):
        scaling, rotation = trunk.layers[0].self_attn.scaling, rotations(trunk, positions)
        states = run_layers(trunk, distinct, lambda _, q, k, v: layout.attend(q, k, v, scaling, rotation=rotation))
        return layout.expand(states)
    states = trunk(
        input_ids=distinct.unsqueeze(0),
        position_ids=layout.select(positions).unsqueeze(0),
        attention_mask=tokens.new_ones(
            1, 1, 1, 1, dtype=torch.bool
        ),  # transformers passes on a mask of four dimensions
        use_cache=False,
        layout=layout,
    ).last_hidden_state[0]
    return layout.expand(states)


def _back(lengths: Tensor, order: Tensor) -> Tensor:
    """Return the packed index of each token, for rows in their original order. -> [N]

    Args:
        lengths: of the rows in packed order.
        order: original row of each packed row.
    """
    packed_starts = (lengths.cumsum(0) - lengths)[order.argsort()]
    counts = lengths[order.argsort()]
    starts = counts.cumsum(0) - counts
    shifts = (packed_starts - starts).repeat_interleave(counts)
    return torch.arange(int(counts.sum()), device=counts.device) + shifts


def left_align(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move padding to the end of each row, so that tokens have the same positions as alone. [B, L] -> [B, <= L]"""
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(mask.sum(1).max())]
    return tokens.gather(1, order), mask.gather(1, order)


WITHOUT_EFFECT = {
    *("_name_or_path", "architectures", "transformers_version", "use_cache"),
    *("num_labels", "problem_type", "id2label", "label2id", "keel_template", "keel_max_tokens"),
}
"""Settings in config.json without an effect on trials. The ids of special tokens have none either: trials do not use
these tokens."""


def pack_if_possible(model: Any) -> None:
    """Choose the fastest way to read rows that gives the states of each row alone. A trial determines it.

    The result of a trial depends on the layers, not on their weights, and a run loads several models of one kind. It is
    therefore kept for later models of the same kind.

    Raises ConfigError if the same row does not get the same states twice, or if tokens attend to later ones.
    """
    base: Any = unwrap_model(model)
    kind, head = _kind(model), "" if base.get_output_embeddings() is None else repr(type(base))
    result = _trial_results.get((kind, head))
    if result is None:
        _run_trial(model)
        result = _TrialResult(
            single_rows=base.keel_reads_single_rows,
            attention=base.config.get_text_config()._attn_implementation,
            head_by_forward=getattr(base, "keel_head_by_forward", None),
        )
        if kind:
            # After a trial of a language model, a classifier on the same layers needs no trial.
            _trial_results.update({(kind, head): result, (kind, ""): result})
        return
    base.keel_reads_single_rows = result.single_rows
    base.config.get_text_config()._attn_implementation = result.attention
    if head:
        base.keel_head_by_forward = result.head_by_forward


@dataclass(frozen=True)
class _TrialResult:
    """How a model reads rows, and how it computes logits."""

    single_rows: bool
    attention: str
    head_by_forward: bool | None  # None for a classifier


_trial_results: dict[tuple[str, str], _TrialResult] = {}
"""Results of this process's trials, by kind of model and class of the language model ("" for a classifier)."""


def _kind(model: Any) -> str:
    """Return all that a trial depends on: classes of layers, settings, dtype and device; "" for layers with hooks."""
    base, layers = unwrap_model(model), list(trunk(model).modules())
    if any(module._forward_hooks or module._forward_pre_hooks for module in [base, *layers]):
        return ""
    names = [repr(type(layer)) for layer in layers]
    config = {k: v for k, v in base.config.to_dict().items() if k not in WITHOUT_EFFECT and not k.endswith("token_id")}
    attention = base.config.get_text_config()._attn_implementation
    return repr((names, sorted(config.items()), attention, base.dtype, base.device))


def _run_trial(model: Any) -> None:
    """Set how a model reads rows and computes logits, by trial."""
    with trial(model) as (tokens, mask):
        alone = _require_readable(model, tokens, mask)
        if unwrap_model(model).get_output_embeddings() is not None:
            _require_causal(model, tokens, mask, alone)
            check_logits(model)
        base: Any = unwrap_model(model)
        base.keel_reads_single_rows = not _agrees(model, tokens, mask, alone)
        if base.keel_reads_single_rows:
            return
        config = base.config.get_text_config()
        initial = config._attn_implementation
        config._attn_implementation = ATTENTION
        if not _agrees(model, tokens, mask, alone):
            config._attn_implementation = initial


def _read_alone(model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """Return the states of each row alone, which any other way to read rows must give as well."""
    read = trunk(model)
    rows = [row[counted].unsqueeze(0) for row, counted in zip(tokens, mask, strict=True)]
    return torch.cat([read(input_ids=row, use_cache=False).last_hidden_state[0] for row in rows])


def _require_readable(model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """Return the states of each row alone. Raises ConfigError if the model needs more than tokens."""
    try:
        return _read_alone(model, tokens, mask)
    except UNFIT as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        what = f"{type(unwrap_model(model)).__name__} needs other inputs than tokens: {reason}"
        raise ConfigError(what, where="model", fix="use another architecture") from error


def _agrees(model: Any, tokens: Tensor, mask: Tensor, alone: Tensor) -> bool:
    try:
        return states_agree(token_states(model, tokens, mask), alone)
    except UNFIT:  # the model does not pass on a layout, or needs the shape of unpacked rows
        return False


def _require_causal(model: Any, tokens: Tensor, mask: Tensor, alone: Tensor) -> None:
    """Raise ConfigError unless the first half of the first row has the same states as in the full row."""
    half = tokens.shape[1] // 2
    if states_agree(_read_alone(model, tokens[:1, :half], mask[:1, :half]), alone[:half]):
        return
    again = states_agree(_read_alone(model, tokens, mask), alone)
    why = "tokens attend to later ones" if again else "the same tokens get other states the second time"
    raise ConfigError(
        f"{type(unwrap_model(model)).__name__} is not a causal language model: {why}",
        where="model",
        fix="use another architecture, or set is_decoder in its config.json" if again else "use another architecture",
    )
