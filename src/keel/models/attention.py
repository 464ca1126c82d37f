"""Causal attention of packed rows, in which the tokens of all rows follow one another without padding.

The compiled kernels read packed rows directly. Without them, rows are unfolded into buckets of similar length.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from keel import kernels
from keel.models.layers import rotate
from keel.models.prefixes import SharedPrefixes

SHORT = 256
"""Longest row for plain matrix products on a CPU."""
MIDDLING = 512
"""Longest row for the compiled kernel. For longer rows torch's kernel is as fast."""
BUCKET_COST = 16_384
"""Fixed cost of a bucket, in entries of a matrix of attention weights."""


@dataclass(frozen=True)
class Bucket:
    """Adjacent rows, the longest first, and the layout of their N packed tokens in R rows of L columns."""

    lengths: Tensor  # [R]
    place: Tensor  # [N], row * L + position of each packed token
    width: int  # L
    indices: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # results of `vectors` by number of heads

    @property
    def rows(self) -> int:
        return len(self.lengths)

    def unfold(self, x: Tensor) -> Tensor:
        """Pad with zeros. [N, heads, D] -> [R, heads, L, D]"""
        if len(x) < self.rows * self.width:
            x = x.new_zeros(self.rows * self.width, *x.shape[1:]).index_copy(0, self.place, x)
        return x.reshape(self.rows, self.width, *x.shape[1:]).transpose(1, 2)

    def fold(self, x: Tensor) -> Tensor:
        """Remove the padding. [R, heads, L, D] -> [N, heads, D]"""
        return x.transpose(1, 2).flatten(0, 1).index_select(0, self.place)

    def vectors(self, heads: int) -> tuple[Tensor, Tensor]:
        """Return the indices between N * heads packed vectors and [R, heads, L]: those to gather, and those to scatter.

        Positions beyond the end of a row gather the row's last vector.
        """
        if heads not in self.indices:
            head = torch.arange(heads)
            starts = self.lengths.cumsum(0) - self.lengths
            token = starts.unsqueeze(1) + torch.arange(self.width).minimum(self.lengths.unsqueeze(1) - 1)
            gather = (token.unsqueeze(1) * heads + head.view(1, -1, 1)).flatten()
            row, position = self.place // self.width, self.place % self.width
            scatter = ((row.unsqueeze(1) * heads + head) * self.width + position.unsqueeze(1)).flatten()
            self.indices[heads] = gather, scatter
        return self.indices[heads]


@dataclass(frozen=True)
class Layout:
    """The lengths of packed rows, the longest first.

    Attributes:
        shared: None, or what the rows have in common. Then only their distinct tokens are given.
    """

    lengths: Sequence[int]
    device: torch.device
    shared: SharedPrefixes | None = None

    def select(self, x: Tensor) -> Tensor:
        """Keep the tokens that a model reads. [N, ...] -> [D, ...]"""
        return x if self.shared is None else self.shared.select(x)

    def expand(self, x: Tensor) -> Tensor:
        """Copy what a model has read to all packed tokens. [D, ...] -> [N, ...]"""
        return x if self.shared is None else self.shared.expand(x)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        window: int | None = None,
        rotation: kernels.Rotation | None = None,
    ) -> Tensor:
        """Compute causal attention within each row.

        query [D, heads, size], key and value [D, kv_heads, size] -> [D, heads, size]

        Args:
            rotation: cosine and sine [N, 1, size / 2] by which queries and keys are rotated first.
        """
        query, key, value = (self.expand(x) for x in (query, key, value))
        return self.select(self._attend_rows(query, key, value, scaling, window, rotation))

    def _attend_rows(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        window: int | None,
        rotation: kernels.Rotation | None,
    ) -> Tensor:
        window = None if window is None or window >= self.lengths[0] else window
        fits = self.lengths[0] <= MIDDLING and query.shape[-1] % 8 == 0 and query.shape[-1] == value.shape[-1]
        if fits and kernels.available(narrow=(query, key, value)):
            attended: Tensor = PackedAttention.apply(query, key, value, self.starts, scaling, rotation, window)
            return attended
        if rotation is not None:
            query, key = (rotate(x, *rotation) for x in (query, key))
        chunks = zip(self.buckets, *(x.split(self.sizes) for x in (query, key, value)), strict=True)
        return torch.cat([_attend(bucket, q, k, v, scaling, window) for bucket, q, k, v in chunks])

    @cached_property
    def starts(self) -> Tensor:
        """Index of the first token of each row, and the number of tokens. [rows + 1]"""
        return torch.tensor([0, *accumulate(self.lengths)], device="cpu")

    @cached_property
    def sizes(self) -> list[int]:
        """Number of tokens of each bucket."""
        return [int(bucket.lengths.sum()) for bucket in self.buckets]

    @cached_property
    def buckets(self) -> list[Bucket]:
        """Buckets of rows of similar length. A new bucket starts where it saves more than BUCKET_COST."""
        lengths, starts = self.lengths, [0]
        for row, length in enumerate(lengths):
            widest = lengths[starts[-1]]
            # The left side is the number of entries of attention matrices that a new bucket saves.
            if (len(lengths) - row) * (widest**2 - length**2) > BUCKET_COST and length < 0.8 * widest:
                starts.append(row)
        groups = [lengths[first:last] for first, last in zip(starts, [*starts[1:], len(lengths)], strict=True)]
        return [_bucket(group, self.device) for group in groups]


def _bucket(group: Sequence[int], device: torch.device) -> Bucket:
    lengths, width = torch.tensor(group, device=device), group[0]
    inside = torch.arange(width, device=device) < lengths.unsqueeze(1)
    return Bucket(lengths, inside.flatten().nonzero().squeeze(1), width)


def _attend(bucket: Bucket, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
    window = None if window is None or bucket.width <= window else window
    if bucket.width <= SHORT and query.device.type == "cpu":
        bias = _bias(bucket.width, query.shape[1] // key.shape[1], window, query.dtype)
        short_rows: Tensor = ShortRows.apply(query, key, value, bucket, bias, scaling)
        return short_rows
    groups = query.shape[1] // key.shape[1]
    query, key, value = (bucket.unfold(x) for x in (query, key, value))
    key, value = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (key, value))
    visible = None if window is None else _visible(bucket.width, window, query.device)
    attended = scaled_dot_product_attention(
        query, key, value, attn_mask=visible, is_causal=visible is None, scale=scaling
    )
    return bucket.fold(attended)


class PackedAttention(torch.autograd.Function):
    """Attention by the compiled kernels, which need no buckets and store no attention weights."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        starts: Tensor,
        scaling: float,
        rotation: kernels.Rotation | None,
        window: int | None,
    ) -> Tensor:
        wide = query.float(), key.float(), value.float()
        attended, statistics = kernels.attend(*wide, starts, scaling, rotation, window)
        attended = attended.to(query.dtype)
        ctx.save_for_backward(query, key, value, attended, statistics)
        ctx.shape = starts, scaling, rotation, window
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, attended, statistics = ctx.saved_tensors
        starts, scaling, rotation, window = ctx.shape
        inputs = query.float(), key.float(), value.float(), starts, scaling, rotation, window
        results = kernels.attend_back(*inputs, attended.float(), statistics, gradients[0].float())
        return *(x.to(attended.dtype) for x in results), None, None, None, None


class ShortRows(torch.autograd.Function):
    """Attention by plain matrix products, with the weights of a bucket in one matrix that is reused in place.

    For short rows on a CPU, it takes at most half the time of the fused kernel. Positions beyond the end of a row hold
    copies of the row's last token. No earlier token attends to them, and no gradient comes from them.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bucket: Bucket, bias: Tensor, scaling: float
    ) -> Tensor:
        (_, heads, size), kv_heads = query.shape, key.shape[1]
        queries, keys, values = (
            x.reshape(-1, size).index_select(0, bucket.vectors(x.shape[1])[0]).view(bucket.rows * kv_heads, -1, size)
            for x in (query, key, value)
        )
        weights = torch.baddbmm(bias.expand(len(queries), -1, -1), queries, keys.transpose(1, 2), alpha=scaling)
        torch.softmax(weights, -1, out=weights)
        attended = weights @ values
        ctx.save_for_backward(queries, keys, values, weights, attended)
        ctx.bucket, ctx.scaling = bucket, scaling
        return attended.view(-1, size).index_select(0, bucket.vectors(heads)[1]).view(query.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, weights, attended = ctx.saved_tensors
        _, heads, size = gradients[0].shape
        places = ctx.bucket.vectors(heads)[1]
        for_output = torch.zeros_like(attended)
        for_output.view(-1, size).index_copy_(0, places, gradients[0].reshape(-1, size))
        for_scores = for_output @ values.transpose(1, 2)
        # The gradient of softmax: each row minus its mean under the attention weights, times the weights.
        for_scores.sub_((for_output * attended).sum(-1, keepdim=True)).mul_(weights)
        for_query = torch.bmm(for_scores, keys).mul_(ctx.scaling)
        for_key = torch.bmm(for_scores.transpose(1, 2), queries).mul_(ctx.scaling)
        for_value = torch.bmm(weights.transpose(1, 2), for_output)
        kv_heads = len(keys) // ctx.bucket.rows
        packed = (
            x.view(-1, size).index_select(0, ctx.bucket.vectors(n)[1]).view(-1, n, size)
            for x, n in ((for_query, heads), (for_key, kv_heads), (for_value, kv_heads))
        )
        return *packed, None, None, None


def _visible(width: int, window: int | None, device: torch.device) -> Tensor:
    """Return which tokens a token attends to: itself and the `window` - 1 tokens before it, or all. [L, L] bool"""
    position = torch.arange(width, device=device)
    distance = position.unsqueeze(1) - position
    return (distance >= 0) & (distance < (window or width))


@lru_cache(maxsize=512)
def _bias(width: int, groups: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """Return 0 where a token attends and -inf elsewhere, repeated per query head of a key head. [groups * L, L]"""
    visible = _visible(width, window, torch.device("cpu"))
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, -torch.inf).repeat(groups, 1)
