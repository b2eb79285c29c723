"""What both sets of kernels share as torch operators: their inputs, and the way from the op's arguments to them."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from carve.ops.kernels.layer import unit
from carve.ops.recurrence import Options, Projections, Tokens, close_chunk
from carve.ops.state import CarveState, each

CONTENTS = {"blind": 0, "mean": 1, "read": 2}


class Inputs(NamedTuple):
    """What the kernels read, contiguous: q, k, v in the same dtype, integers in int64, g, w and projections in fp32."""

    q: Tensor  # [B, T, H, K]
    k: Tensor  # [B, T, H, K]
    v: Tensor  # [B, T, HV, V]
    g: Tensor  # [B, T, H or HV, K]
    e: Tensor  # [B, T, H or HV, K]
    w: Tensor | None  # [B, T, HV]
    p_down: Tensor | None  # [HV, V, R]
    p_up: Tensor | None  # [HV, R, K]
    p_write: Tensor | None  # [HV, R]
    bounds: Tensor | None  # [N + 1], of sequences packed into B = 1; None for B sequences of T tokens
    position: Tensor | None  # [N]; None for zeros

    @property
    def sequences(self) -> int:
        return self.v.shape[0] if self.bounds is None else len(self.bounds) - 1

    @property
    def rank(self) -> int:
        return 0 if self.p_down is None else self.p_down.shape[-1]

    def state_shapes(self, content: str) -> list[tuple[int, ...]]:
        """Of memory, content and content_sum; (0,) for what is not there."""
        N, HV, V, K, R = self.sequences, *self.v.shape[2:], self.q.shape[3], self.rank
        seen = {"blind": (0,), "mean": (N, HV, R), "read": (N, HV, K, R)}[content]
        return [(N, HV, K, V), seen, (N, HV, V) if content == "mean" else (0,)]


def run_sequences(
    forward: Callable[..., tuple[Tensor, ...]],
    x: Tokens,
    p: Projections,
    state: CarveState | None,
    options: Options,
    cu_seqlens: Tensor | None,
    final: bool,
) -> tuple[Tensor, CarveState | None]:
    """The op by a forward operator, whose `why_not` has nothing against the arguments.

    Args:
        forward: `carve::forward` or `carve::portable_forward`, which take the same arguments.
        x: inputs, `[B, T, ...]`: B sequences of T tokens, or one row of N packed sequences.
        p: content projections in float32.
        state: the state before the first tokens; None for zeros.
        cu_seqlens: `[N + 1]`, int32 or int64, of packed sequences, or None.
        final: whether to return the state after the last tokens.

    Returns:
        o `[B, T, HV, V]` in v's dtype, and the state after the last tokens or None.
    """
    device, kind = x.v.device, options.content or "blind"
    q, k = (unit(x.q), unit(x.k)) if options.qk_l2norm else (x.q, x.k)
    tokens = each(Tensor.contiguous, (q, k, x.v, x.g.float(), x.e, None if x.w is None else x.w.float()))
    bounds = None if cu_seqlens is None else cu_seqlens.to(device, torch.int64).contiguous()
    memory, content, content_sum, position = (None,) * 4 if state is None else each(Tensor.contiguous, state)
    inputs = Inputs(*tokens, *each(Tensor.contiguous, p), bounds, position)  # type: ignore[call-arg]
    save = needs_gradient([*tokens, *p, memory, content, content_sum])
    top = 2.0 if options.allow_neg_eigval else 1.0
    rms = options.content_norm == "rms"
    o, *ends = forward(
        *inputs, memory, content, content_sum, kind, rms, options.chunk_size, options.scale, top, final, save
    )[:4]
    if not final:
        return o, None
    lengths = x.v.new_full((x.v.shape[0],), x.v.shape[1], dtype=torch.int64) if bounds is None else bounds.diff()
    seen = lengths if position is None else position + lengths
    full = (seen % options.chunk_size == 0) & (lengths > 0)
    memory, content, content_sum = ends
    content = None if kind == "blind" else content
    content_sum = content_sum if kind == "mean" else None
    with torch.autocast(device.type, enabled=False):
        content, content_sum = close_chunk(memory, content, content_sum, full, p, options)
    return o, CarveState(memory, content, content_sum, seen % options.chunk_size)


def needs_gradient(tensors: Iterable[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def sum_groups(dx: Tensor, x: Tensor) -> Tensor:
    """Gradients of heads that value heads share: [B, T, HV, K] to the shape of x."""
    if dx.shape == x.shape:
        return dx
    B, T, H, K = x.shape
    return dx.view(B, T, H, dx.shape[2] // H, K).sum(3, dtype=torch.float32).to(x.dtype)
