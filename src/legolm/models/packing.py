"""Sequences packed without padding: one row of concatenated examples, positions restarting, and attention inside each.

Everything but attention runs on (1, tokens, hidden) and never sees a padding token. Attention takes examples of similar
length together; a causal query never reaches the padding behind its own example, so the causal mask alone keeps
examples apart (Krell et al., "Efficient sequence packing without cross-contamination", arXiv 2107.02027).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, softmax

from legolm.data import Tokens
from legolm.models.rotary import scales_by_length

ATTENTION = "legolm_packed"
"""Name of the attention below in transformers' `AttentionInterface`."""
LONG = 512
"""Up to this many tokens the attention weights are kept for the backward pass; beyond, the fused kernel is cheaper."""
SIMILAR = {"cpu": 0.8, "cuda": 0.25}
"""Examples at least this long, relative to the longest, share a bucket: padding costs a CPU, each kernel a GPU."""


class _Places(NamedTuple):
    """Of a bucket's examples with so many heads, counting each token's heads one after the other (int64).

    `take`: which of the pack stands where in (examples, heads, length); `put`: where in that the bucket's own stand;
    `blank`: what there is padding or shared.
    """

    take: Tensor
    put: Tensor
    blank: Tensor


@dataclass(frozen=True)
class Bucket:
    """Examples of similar length, tokens `start` to `stop` of the pack, seen as `count` examples of `length` tokens.

    `rows` (count, length; int64) says which token of the pack stands where, `own` (bool) which of these places are the
    bucket's, not behind an example and not shared. The pack's first `shared` tokens are the first of all examples, and
    the longest example's own.
    """

    start: int
    stop: int
    count: int
    length: int
    shared: int
    rows: Tensor
    own: Tensor
    _places: dict[tuple[int, torch.device], _Places] = field(default_factory=dict, compare=False)

    def take(self, packed: Tensor, groups: int, blank: bool = False) -> Tensor:
        """(heads, tokens, head size) of the pack as (count · groups, heads / groups · length, head size).

        Padding repeats the example's last token, or is zero if `blank`.
        """
        heads, _, size = packed.shape
        places = self._of(heads, packed.device)
        chosen = packed.transpose(0, 1).reshape(-1, size).index_select(0, places.take)
        if blank and len(places.blank):
            chosen.index_fill_(0, places.blank, 0)
        return chosen.view(self.count * groups, heads // groups * self.length, size)

    def put(self, taken: Tensor, packed: Tensor) -> None:
        """Write what `take` would give into the pack, whose heads lie together for each token; no padding."""
        heads, _, size = packed.shape
        into = packed.transpose(0, 1)[self.start : self.stop].view(-1, size)
        torch.index_select(taken.reshape(-1, size), 0, self._of(heads, packed.device).put, out=into)

    def add_shared(self, taken: Tensor, packed: Tensor) -> None:
        """Add to the pack's shared tokens, which `put` gave the longest example's gradient, that of all others."""
        if self.shared:
            heads, _, size = packed.shape
            apart = taken.reshape(self.count, heads, self.length, size)[0 if self.start else 1 :]
            packed[:, : self.shared] += apart[:, :, : self.shared].sum(0)

    def _of(self, heads: int, device: torch.device) -> _Places:
        if (heads, device) not in self._places:
            head = torch.arange(heads)
            example, position = self.own.nonzero(as_tuple=True)
            found = (
                self.rows[:, None] * heads + head[:, None],
                (example[:, None] * heads + head) * self.length + position[:, None],
                (~self.own)[:, None].expand(-1, heads, -1).flatten().nonzero(),
            )
            self._places[heads, device] = _Places(*(one.flatten().to(device) for one in found))
        return self._places[heads, device]


@dataclass(frozen=True)
class Pack:
    """Examples in one row, longest first; all tensors int64.

    `ids` and `positions` are (1, tokens); `predict` (answer tokens) are the places whose hidden state predicts the
    answer tokens `labels`; `owner` says whose they are, counted as the examples came.
    """

    ids: Tensor
    positions: Tensor
    predict: Tensor
    labels: Tensor
    owner: Tensor
    lengths: tuple[int, ...]
    buckets: tuple[Bucket, ...]


def pack(examples: Sequence[Tokens], device: torch.device, shared: int = 0) -> Pack:
    """Put examples in one row.

    The first `shared` tokens, the same in all and before any that predicts (`shared_prompt`), stand there once, in the
    longest example; all look at them there, and their gradient is the sum of what all ask of them.
    """
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].ids))
    ids: list[int] = []
    positions: list[int] = []
    predict: list[int] = []
    labels: list[int] = []
    owner: list[int] = []
    for index in order:
        example, left_out = examples[index], shared if ids else 0
        begin = len(ids) - left_out
        predict += range(begin + example.answer - 1, begin + len(example.ids) - 1)
        labels += example.ids[example.answer :]
        owner += [index] * (len(example.ids) - example.answer)
        ids += example.ids[left_out:]
        positions += range(left_out, len(example.ids))
    lengths = tuple(len(examples[index].ids) for index in order)

    def place(values: list[int]) -> Tensor:
        return torch.tensor(values, device=device)

    return Pack(
        ids=place(ids)[None],
        positions=place(positions)[None],
        predict=place(predict),
        labels=place(labels),
        owner=place(owner),
        lengths=lengths,
        buckets=tuple(_buckets(lengths, SIMILAR.get(device.type, SIMILAR["cpu"]), shared)),
    )


def shared_prompt(model: Any, batch: Sequence[Tokens]) -> int:
    """Tokens that all prompts begin with, a system message say, which the model is to read once; 0 where it cannot."""
    capped = getattr(model.config, "attn_logit_softcapping", None)
    if len(batch) == 1 or capped or scales_by_length(model) or max(len(one.ids) for one in batch) > LONG:
        return 0
    prompts = [one.ids[: one.answer - 1] for one in batch]  # the last token of each predicts
    return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False)))


def _buckets(lengths: Sequence[int], similar: float, shared: int) -> Iterator[Bucket]:
    """Cut a descending row of lengths where they fall below `similar` of the longest."""
    start = 0
    while lengths:
        longest = lengths[0]
        size = torch.tensor([length for length in lengths if length >= similar * longest])[:, None]
        left_out = torch.full_like(size, shared)
        if not start:
            left_out[0] = 0
        offset, ends = torch.arange(longest), start + (size - left_out).cumsum(0)
        rows = torch.where(offset < left_out, offset, ends - size + offset.minimum(size - 1))
        stop = int(ends[-1])
        yield Bucket(start, stop, len(size), longest, shared, rows, (offset < size) & (offset >= left_out))
        lengths, start = lengths[len(size) :], stop


def use_packed_attention(model: Any) -> None:
    """Let a transformers model attend by `packed_attention`."""
    # Here, not above: it brings all that transformers has for models, and who only plans has none.
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, packed_attention)
    model.set_attn_implementation(ATTENTION)


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Pack,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query (1, heads, tokens, head size), key and value (1, KV groups, ...).

    Returns (1, tokens, heads, head size). `attention_mask` is None: transformers makes none for an attention that it
    does not know; `packing` comes with the model's keyword arguments.
    """
    query, key = query.to(value.dtype), key.to(value.dtype)
    window = sliding_window if sliding_window and sliding_window < packing.lengths[0] else None
    q, k, v = (side.squeeze(0) for side in (query, key, value))  # [0] would make zeros to put its gradient into
    if softcap is None and query.is_cuda:
        return _fused_attention(q, k, v, packing, scaling, window).transpose(0, 1)[None], None
    if softcap is None and packing.lengths[0] <= LONG:
        out = _PackedAttention.apply(q, k, v, packing, scaling, window)  # type: ignore[no-untyped-call]
        return out.transpose(0, 1)[None], None
    parts = []
    split = [torch.split(part, list(packing.lengths), dim=2) for part in (query, key, value)]
    for q, k, v in zip(*split, strict=True):
        if softcap is None:
            mask = None if window is None else _mask(q.shape[2], 1, window, q.dtype, q.device)
            part = scaled_dot_product_attention(
                q, k, v, mask, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
            )
        else:
            k, v = (side.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for side in (k, v))
            scores = softcap * torch.tanh(scaling / softcap * (q @ k.transpose(2, 3)).float())
            scores = scores + _mask(q.shape[2], 1, window, scores.dtype, scores.device)
            part = softmax(scores, -1).to(v.dtype) @ v
        parts.append(part)
    return torch.cat(parts, dim=2).transpose(1, 2), None


class _PackedAttention(torch.autograd.Function):
    """Bucket by bucket softmax(s q kᵀ + causal) v. The query heads of a KV group are rows of one matrix: no repeats."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, packing: Pack, scaling: float, window: int | None
    ) -> Tensor:
        groups = key.shape[0]
        # Laid out as the output projection reads it, (tokens, heads, head size).
        out = query.new_empty(query.shape[1], query.shape[0], query.shape[2]).transpose(0, 1)
        saved: list[Tensor] = []
        for bucket in packing.buckets:
            q, k, v = (bucket.take(side, groups) for side in (query, key, value))
            mask = _mask(bucket.length, query.shape[0] // groups, window, q.dtype, q.device)
            weights = softmax(torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scaling), -1)
            bucket.put(weights @ v, out)
            saved += [q, k, v, weights]
        ctx.save_for_backward(*saved)
        ctx.packing, ctx.scaling, ctx.shapes = packing, scaling, (query.shape, key.shape)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (heads, tokens, size), (groups, _, _) = ctx.shapes
        dq, dk, dv = (grad.new_empty(tokens, count, size).transpose(0, 1) for count in (heads, groups, groups))
        saved = iter(ctx.saved_tensors)  # once: checkpointing gives them once
        for bucket, q, k, v, weights in zip(ctx.packing.buckets, saved, saved, saved, saved, strict=True):
            g = bucket.take(grad, groups, blank=True)
            scores = torch._softmax_backward_data(g @ v.transpose(1, 2), weights, -1, weights.dtype)
            bucket.put((scores @ k).mul_(ctx.scaling), dq)
            for part, packed in (
                ((scores.transpose(1, 2) @ q).mul_(ctx.scaling), dk),
                (weights.transpose(1, 2) @ g, dv),
            ):
                bucket.put(part, packed)
                bucket.add_shared(part, packed)
        return dq, dk, dv, None, None, None


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, packing: Pack, scaling: float, window: int | None
) -> Tensor:
    """The same bucket by bucket in torch's fused kernel: few launches, and no attention weights in memory."""
    found = []
    for q, k, v in zip(*(_Apart.apply(side, packing) for side in (query, key, value)), strict=True):  # type: ignore[no-untyped-call]
        mask = None if window is None else _mask(q.shape[2], 1, window, q.dtype, q.device)
        grouped = q.shape[1] != k.shape[1]
        found.append(
            scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped)
        )
    out: Tensor = _Together.apply(packing, query.shape[1], *found)  # type: ignore[no-untyped-call]
    return out


class _Apart(torch.autograd.Function):
    """(heads, tokens, head size) as each bucket's (examples, heads, length, head size).

    No gradient comes from padding: nobody looks at its keys, and what its queries find is thrown away.
    """

    @staticmethod
    def forward(ctx: Any, packed: Tensor, packing: Pack) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.packing, ctx.shape = packing, packed.shape
        return tuple(_apart(bucket, packed) for bucket in packing.buckets)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        packed = _together(ctx.packing, ctx.shape[1], grads)
        for bucket, part in zip(ctx.packing.buckets, grads, strict=True):
            bucket.add_shared(part, packed)
        return packed, None


class _Together(torch.autograd.Function):
    """What `_Apart` took apart, without the padding."""

    @staticmethod
    def forward(ctx: Any, packing: Pack, tokens: int, *parts: Tensor) -> Tensor:  # type: ignore[override]
        ctx.packing = packing
        return _together(packing, tokens, parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, None, *(_apart(bucket, grad, blank=True) for bucket in ctx.packing.buckets)


def _apart(bucket: Bucket, packed: Tensor, blank: bool = False) -> Tensor:
    heads, _, size = packed.shape
    return bucket.take(packed, heads, blank).view(bucket.count, heads, bucket.length, size)


def _together(packing: Pack, tokens: int, parts: Sequence[Tensor]) -> Tensor:
    _, heads, _, size = parts[0].shape
    # Laid out as the output projection reads it, (tokens, heads, head size).
    out = parts[0].new_empty(tokens, heads, size).transpose(0, 1)
    for bucket, part in zip(packing.buckets, parts, strict=True):
        bucket.put(part, out)
    return out


@lru_cache(maxsize=64)
def _mask(length: int, repeat: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(repeat · length, length): 0 where a query may look (itself and before it, within `window`), else -inf."""
    full = torch.full((length, length), float("-inf"), device=device, dtype=dtype)
    mask = full.triu(1) if window is None else full.triu(1) + full.tril(-window)
    return mask.repeat(repeat, 1)
