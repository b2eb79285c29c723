"""CARVE token by token: the definition. If another path disagrees, the other is wrong.

For one head, with a memory S of K x V numbers and a content c fixed for the whole chunk:

    z_t = norm(c_t P_down)
    b_t = s sigmoid(e_t + z_t P_up)                                     erase gate
    a_t = sigmoid(w_t + z_t p_write)                                    write gate
    S_t = (I - k_t (b_t * k_t)^T) Diag(exp g_t) S_{t-1} + a_t k_t v_t^T
    o_t = scale S_t^T q_t

CARVE, arXiv 2606.27229; the delta rule with decay is that of Gated DeltaNet-2, arXiv 2605.22791.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from carve.ops.state import CarveState, each


class Tokens(NamedTuple):
    """The op's inputs token by token; `...` is [B, T] here and [slots, lanes] in the chunk form."""

    q: Tensor  # [..., H, K]
    k: Tensor  # [..., H, K]
    v: Tensor  # [..., HV, V]
    g: Tensor  # [..., H or HV, K]
    e: Tensor  # [..., H or HV, K]
    w: Tensor | None  # [..., HV]


class Projections(NamedTuple):
    """The content projections, all None in a memory-blind op."""

    down: Tensor | None  # [HV, V, R]
    up: Tensor | None  # [HV, R, K]
    write: Tensor | None  # [HV, R]


class Options(NamedTuple):
    """What does not change from token to token."""

    content: str | None  # "mean", "read"; None when memory-blind
    content_norm: str | None  # "rms" or None
    chunk_size: int
    scale: float
    qk_l2norm: bool
    allow_neg_eigval: bool
    dtype: torch.dtype  # of the arithmetic and of the state


def head_first(x: Tokens, options: Options) -> Tokens:
    """`[N, T, H, ...]` to `[N, HV, T, ...]`, w to `[N, HV, T, 1]`, in the compute dtype; q, k of unit norm if asked."""
    heads = x.v.shape[2]

    def lay_out(y: Tensor) -> Tensor:
        return y.transpose(1, 2).to(options.dtype).repeat_interleave(heads // y.shape[2], dim=1)

    q, k = x.q.to(options.dtype), x.k.to(options.dtype)
    if options.qk_l2norm:
        q, k = (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + 1e-6) for y in (q, k))
    w = None if x.w is None else x.w.transpose(1, 2).unsqueeze(-1).to(options.dtype)
    return Tokens(lay_out(q), lay_out(k), lay_out(x.v), lay_out(x.g), lay_out(x.e), w)


class Sigmoid(torch.autograd.Function):
    """1 / (1 + exp(-x)), every element alike.

    torch.sigmoid rounds the last few elements of a tensor another way than the rest, so a sequence's bits would
    depend on how many others there are.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.neg().exp_().add_(1).reciprocal_()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return dy * (1 - y) * y


def gates(
    k: Tensor, e: Tensor, w: Tensor | None, content: Tensor | None, p: Projections, options: Options
) -> tuple[Tensor, Tensor | None]:
    """Erase gate b `[N, HV, T, K]` and write gate a `[N, HV, T, 1]` (None for 1) of tokens of one chunk.

    k, e: `[N, HV, T, K]`; w: `[N, HV, T, 1]` or None; content: see `CarveState`.
    """
    if content is not None:
        z = k @ content if options.content == "read" else content.unsqueeze(-2)  # [N, HV, T or 1, R]
        if options.content_norm == "rms":
            z = rms_norm(z, z.shape[-1:], eps=1e-8)
        if p.up is not None:
            e = e + z @ p.up
        if p.write is not None and w is not None:
            w = w + z @ p.write.unsqueeze(-1)
    b = Sigmoid.apply(e)
    return 2 * b if options.allow_neg_eigval else b, None if w is None else Sigmoid.apply(w)


def all_or_mask(full: Tensor) -> Tensor | bool:
    """True or False if `full` (`[N]` bool) is so for all sequences, which is cheaper to act on; else full itself."""
    count = int(full.sum())
    return bool(count) if count in (0, len(full)) else full


def close_chunk(
    memory: Tensor,
    content: Tensor | None,
    content_sum: Tensor | None,
    full: Tensor | bool,
    p: Projections,
    options: Options,
) -> tuple[Tensor | None, Tensor | None]:
    """Content and content_sum after a token: those of the next chunk for the sequences whose chunk is `full`.

    memory, content, content_sum: see `CarveState`; full: `[N]` bool, or one for all.
    """
    if content is None or p.down is None or full is False:
        return content, content_sum
    if content_sum is None:
        fresh = memory @ p.down  # Z = S P_down, [N, HV, K, R]
    else:
        fresh = ((content_sum / options.chunk_size).unsqueeze(-2) @ p.down).squeeze(-2)
    if full is True:
        return fresh, None if content_sum is None else torch.zeros_like(content_sum)
    assert isinstance(full, Tensor)
    if content_sum is not None:
        content_sum = content_sum.masked_fill(full.view(-1, 1, 1), 0)
    return torch.where(full.view(-1, *[1] * (content.dim() - 1)), fresh, content), content_sum


def split_tokens(x: Tensor | None, T: int) -> Sequence[Tensor | None]:
    """`[N, HV, T, ...]` as T pieces of one token, `[N, HV, 1, ...]`."""
    return [None] * T if x is None else x.split(1, dim=2)[:T]  # of no tokens, split makes one empty piece


def recurrent(
    x: Tokens, p: Projections, state: CarveState, options: Options, trace: list | None = None
) -> tuple[Tensor, CarveState]:
    """Run B sequences of T tokens, one token after the other.

    Args:
        x: inputs, `[B, T, ...]`.
        p: content projections in the compute dtype.
        state: the state before the first token, N = B.
        trace: if given, gets `(b, a, b_blind, a_blind)` of every token appended.

    Returns:
        o `[B, T, HV, V]` in the compute dtype, and the state after the last token.
    """
    inputs = head_first(x, options)
    S, content, content_sum, position = state
    outputs = [inputs.v[:, :, :0]]
    for q_t, k_t, v_t, g_t, e_t, w_t in zip(*(split_tokens(y, inputs.v.shape[2]) for y in inputs), strict=True):
        b, a = gates(k_t, e_t, w_t, content, p, options)
        if trace is not None:
            trace.append((b, a, *gates(k_t, e_t, w_t, None, p, options)))

        S = S * g_t.exp().mT
        v_new = (v_t if a is None else a * v_t) - (b * k_t) @ S
        S = S + k_t.mT * v_new  # an outer product, each number alike in any batch
        o = options.scale * q_t @ S
        outputs.append(o)

        position = position + 1
        full = position == options.chunk_size
        position = position.masked_fill(full, 0)
        if content_sum is not None:
            content_sum = content_sum + o.squeeze(-2)
        if content is not None:
            content, content_sum = close_chunk(S, content, content_sum, all_or_mask(full), p, options)
    return torch.cat(outputs, dim=2).transpose(1, 2), CarveState(S, content, content_sum, position)


def recurrent_packed(
    x: Tokens, p: Projections, state: CarveState, options: Options, lengths: Tensor
) -> tuple[Tensor, CarveState]:
    """Run N sequences packed into B = 1, each of its own length (`[N]` int64, CPU), one after the other."""
    pieces = zip(*([None] * len(lengths) if y is None else y.split(lengths.tolist(), dim=1) for y in x), strict=True)
    runs = [
        recurrent(Tokens(*piece), p, state.select(torch.tensor([n], device="cpu")), options)
        for n, piece in enumerate(pieces)
    ]
    outputs, states = zip(*runs, strict=True)
    columns = (None if column[0] is None else column for column in zip(*states, strict=True))
    return torch.cat(outputs, dim=1), CarveState(*each(torch.cat, columns))
