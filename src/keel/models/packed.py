"""Hidden states of rows of unequal length, with no work on padding.

Models whose attention cannot be told so, or that compute anything else across tokens, are found by trial and read
padded rows; those whose tokens depend on the batch around them, one row at a time.
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
from keel.models.heads import UNFIT, check_logits, plain, trunk
from keel.models.layers import has_known_layers, rotations, walk
from keel.models.positions import rotation_threshold
from keel.models.trial import close, trial

ATTENTION = "keel"
"""Name of this attention in a transformers config: sdpa, and packed rows where a layout is given."""
HARMLESS = {"position_ids", "cache_position", "is_causal", "use_cache"}
"""Arguments of attention functions that say nothing new where the mask or the layout is given."""


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
    """Attention function for transformers. query [1, heads, N, D] -> [1, N, heads, D] when `layout` is given.

    Raises TypeError for an argument that would change the result if it were known here.
    """
    unknown = [name for name, value in others.items() if name not in HARMLESS and not _says_nothing(value)]
    if unknown or not getattr(module, "is_causal", True) or others.get("is_causal") is False:
        raise TypeError(f"attention with {', '.join(unknown) or 'sight of later tokens'}")
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    if attention_mask is not None and attention_mask.numel() > 1:
        raise TypeError("attention with a mask that is made from the positions in a row")
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return layout.attend(query, key, value, scaling, sliding_window).unsqueeze(0), None


def _says_nothing(value: Any) -> bool:
    """Whether an argument has the value that leaves everything as it is."""
    return value is None or (isinstance(value, int | float) and not value)


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def reads_packed_rows(model: Any) -> bool:
    """Whether padding costs the model nothing."""
    return bool(plain(model).config.get_text_config()._attn_implementation == ATTENTION)


def reads_single_rows(model: Any) -> bool:
    """Whether rows are read one at a time, because a batch around them would change their states."""
    return getattr(plain(model), "keel_reads_single_rows", False)


def token_states(model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """Hidden states of the tokens under the mask, row by row. [B, L], [B, L] bool -> [mask.sum(), H]

    Padding may stand on any side.
    """
    parts = _rows_to_read_together(model, mask)
    if len(parts) == 1:
        return _states(model, tokens, mask)
    lengths = mask.sum(1)
    each = [_states(model, tokens[rows], mask[rows]).split(lengths[rows].tolist()) for rows in parts]
    order = torch.cat(parts).argsort().tolist()
    rows = [states for part in each for states in part]
    return torch.cat([rows[place] for place in order])


def _rows_to_read_together(model: Any, mask: Tensor) -> list[Tensor]:
    """The rows of each pass: all of them, where none depends on those around it."""
    every = torch.arange(len(mask), device=mask.device)
    if reads_single_rows(model):
        return list(every.split(1))
    threshold, lengths = rotation_threshold(model), mask.sum(1)
    if threshold is None or bool((lengths <= threshold).all()):
        return [every]
    return [part for part in (every[lengths <= threshold], every[lengths > threshold]) if len(part)]


def _states(model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """`token_states` of rows that do not depend on one another."""
    if not reads_packed_rows(model):
        tokens, mask = left_align(tokens, mask)
        masked = {} if reads_single_rows(model) else {"attention_mask": mask.long()}
        return trunk(model)(input_ids=tokens, use_cache=False, **masked).last_hidden_state[mask]
    lengths, order = mask.sum(1).sort(descending=True, stable=True)
    layout = Layout(lengths.tolist(), tokens.device)
    tokens, mask = tokens[order], mask[order]
    states = _packed_states(trunk(model), tokens[mask], (mask.cumsum(1) - 1)[mask], layout)
    return states.index_select(0, _back(lengths, order))


def _packed_states(trunk: Any, tokens: Tensor, positions: Tensor, layout: Layout) -> Tensor:
    """Tokens [N] and positions [N] in the order of the layout -> [N, H]"""
    if has_known_layers(trunk):
        scaling, rotation = trunk.layers[0].self_attn.scaling, rotations(trunk, positions)
        return walk(trunk, tokens, lambda _, q, k, v: layout.attend(q, k, v, scaling, rotation=rotation))
    states: Tensor = trunk(
        input_ids=tokens.unsqueeze(0),
        position_ids=positions.unsqueeze(0),
        attention_mask=tokens.new_ones(1, 1, 1, 1, dtype=torch.bool),  # of four dimensions, it is passed on as it is
        use_cache=False,
        layout=layout,
    ).last_hidden_state[0]
    return states


def _back(lengths: Tensor, order: Tensor) -> Tensor:
    """Where each token of the rows as they came lies in the packed order. -> [N]"""
    starts = (lengths.cumsum(0) - lengths)[order.argsort()]
    own = lengths[order.argsort()]
    first = own.cumsum(0) - own
    return torch.arange(int(own.sum()), device=own.device) + (starts - first).repeat_interleave(own)


def left_align(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same rows without padding before or inside them: each has the positions it has alone. [B, L] -> [B, <= L]"""
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(mask.sum(1).max())]
    return tokens.gather(1, order), mask.gather(1, order)


WITHOUT_EFFECT = {
    *("_name_or_path", "architectures", "transformers_version", "use_cache"),
    *("num_labels", "problem_type", "id2label", "label2id", "keel_template", "keel_max_tokens"),
}
"""Settings in config.json that no trial depends on. Nor does one on the ids of special tokens, which it avoids."""


def pack_if_possible(model: Any) -> None:
    """Let a model read rows in the fastest way that gives the states of each row alone, which is tried.

    A model like one that was tried before reads as that one does: what a trial shows depends on the layers and not on
    the weights in them, and a run loads several models of one kind.

    Raises ConfigError for one that gives no row the same states twice, or whose tokens see later ones.
    """
    whole: Any = plain(model)
    kind, head = _kind(model), "" if whole.get_output_embeddings() is None else repr(type(whole))
    known = _known_ways.get((kind, head))
    if known is None:
        _try_ways(model)
        ways = _Ways(
            single_rows=whole.keel_reads_single_rows,
            attention=whole.config.get_text_config()._attn_implementation,
            head_by_forward=getattr(whole, "keel_head_by_forward", None),
        )
        if kind:
            # Where a language model was tried, a classifier on the same layers needs no trial.
            _known_ways.update({(kind, head): ways, (kind, ""): ways})
        return
    whole.keel_reads_single_rows = known.single_rows
    whole.config.get_text_config()._attn_implementation = known.attention
    if head:
        whole.keel_head_by_forward = known.head_by_forward


@dataclass(frozen=True)
class _Ways:
    """What a trial showed."""

    single_rows: bool
    attention: str
    head_by_forward: bool | None  # None for a classifier


_known_ways: dict[tuple[str, str], _Ways] = {}
"""What trials in this process showed, by kind of model and class of the language model ("" for a classifier)."""


def _kind(model: Any) -> str:
    """Return what a trial depends on: classes of the layers, settings, number format, device. "" where hooks act."""
    whole, layers = plain(model), list(trunk(model).modules())
    if any(module._forward_hooks or module._forward_pre_hooks for module in [whole, *layers]):
        return ""
    names = [repr(type(layer)) for layer in layers]
    config = {k: v for k, v in whole.config.to_dict().items() if k not in WITHOUT_EFFECT and not k.endswith("token_id")}
    attention = whole.config.get_text_config()._attn_implementation
    return repr((names, sorted(config.items()), attention, whole.dtype, whole.device))


def _try_ways(model: Any) -> None:
    """Set how a model reads rows, and its head, by trial."""
    with trial(model) as (tokens, mask):
        alone = _require_readable(model, tokens, mask)
        if plain(model).get_output_embeddings() is not None:
            _require_causal(model, tokens, mask, alone)
            check_logits(model)
        whole: Any = plain(model)
        whole.keel_reads_single_rows = not _agrees(model, tokens, mask, alone)
        if whole.keel_reads_single_rows:
            return
        config = whole.config.get_text_config()
        usual = config._attn_implementation
        config._attn_implementation = ATTENTION
        if not _agrees(model, tokens, mask, alone):
            config._attn_implementation = usual


def _read_alone(model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """What every other way has to give: each row by itself, with nothing but its tokens."""
    read = trunk(model)
    rows = [row[real].unsqueeze(0) for row, real in zip(tokens, mask, strict=True)]
    return torch.cat([read(input_ids=row, use_cache=False).last_hidden_state[0] for row in rows])


def _require_readable(model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """`_read_alone`; raises ConfigError where tokens alone are not enough."""
    try:
        return _read_alone(model, tokens, mask)
    except UNFIT as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        what = f"{type(plain(model)).__name__} cannot read rows of tokens alone: {reason}"
        raise ConfigError(what, where="model", fix="use another architecture") from error


def _agrees(model: Any, tokens: Tensor, mask: Tensor, alone: Tensor) -> bool:
    try:
        return close(token_states(model, tokens, mask), alone)
    except UNFIT:  # it knows no layout, or computes with one row's shape
        return False


def _require_causal(model: Any, tokens: Tensor, mask: Tensor, alone: Tensor) -> None:
    """The first row, which has no padding: its first half gives the states that it has in the whole row."""
    half = tokens.shape[1] // 2
    if close(_read_alone(model, tokens[:1, :half], mask[:1, :half]), alone[:half]):
        return
    again = close(_read_alone(model, tokens, mask), alone)
    why = "tokens see later ones" if again else "the same tokens get other states the second time"
    raise ConfigError(
        f"{type(plain(model)).__name__} is no causal language model: {why}",
        where="model",
        fix="use another architecture, or set is_decoder in its config.json" if again else "use another architecture",
    )
