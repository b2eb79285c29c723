"""Decoding: a few tokens of each sequence, the state updated in place."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from carve.ops.api import (
    cast,
    check_no_tangents,
    check_options,
    check_state,
    check_tensor,
    check_tokens,
    check_values,
    choose_backend,
    expect,
)
from carve.ops.kernels import decode as kernel
from carve.ops.recurrence import Options, Projections, Tokens, recurrent
from carve.ops.state import CarveState, each

PATHS = {"cuda": kernel}


def decode_carve(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    e: Tensor,
    w: Tensor | None = None,
    p_down: Tensor | None = None,
    p_up: Tensor | None = None,
    p_write: Tensor | None = None,
    *,
    state: CarveState,
    content: str = "mean",
    content_norm: str | None = None,
    chunk_size: int = 64,
    scale: float | None = None,
    qk_l2norm: bool = False,
    allow_neg_eigval: bool = False,
    lengths: Tensor | None = None,
    update: bool = True,
    backend: str = "auto",
) -> Tensor:
    """CARVE for generation: the next token, or a few drafted ones, of each sequence, each at its own position.

    What `recurrent_carve` computes, with the state updated in place and without gradients. On a GPU it is one kernel
    that waits for nothing on the CPU, so a CUDA graph can hold it; run the same shapes once before capture.

    To verify a draft of T tokens, run it with `update=False`, decide from the outputs how many to accept, and run
    it again with `lengths=accepted`; or keep a copy of the state to go back to.

    Args:
        q, k, v, g, e, w, p_down, p_up, p_write: as in `chunk_carve`, for the T tokens that follow the state. T of 1
            to 16 is what this is fast for.
        state: of the B sequences, from a call with the same shapes and options; its tensors contiguous.
        content, content_norm, chunk_size, scale, qk_l2norm, allow_neg_eigval: as in `chunk_carve`.
        lengths: `[B]` int64, how many of the T tokens each sequence takes, 0 to T; None for all. Checked on a CPU;
            on a GPU a value out of range ends the process, and so does a `state.position` out of range.
        update: move the state behind the tokens taken. If False, it is left alone, bit for bit.
        backend: `"cuda"` for the fused kernel (K and V multiples of 16 up to 256, R of at most 64; no float64),
            `"torch"`, or `"auto"` for the kernel where it serves the inputs; it warns where it does not on a GPU.

    Returns:
        o `[B, T, HV, V]` in v's dtype; 0 for tokens that are not taken.

    Raises:
        ValueError: an argument does not fit, or needs a gradient; the message names it and what was expected.

    Source: arXiv 2606.27229; the recurrence is in `carve/ops/recurrence.py`.
    """
    x, p = Tokens(q, k, v, g, e, w), Projections(p_down, p_up, p_write)
    N = check_tokens(x, None)
    options = check_options(x, p, content, content_norm, chunk_size, scale, qk_l2norm, allow_neg_eigval)
    check_decoding(x, p, state, options, lengths, update, N)
    if choose_backend(backend, PATHS, x, p, options) == "cuda":
        return kernel.fused(x, p, state, options, lengths, update)
    return decode_in_torch(x, p, state, options, lengths, update)


@contextmanager
def named_state() -> Iterator[None]:
    """Errors of the checks within name the state as it is named here."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("initial_state", "state")) from None


def check_decoding(
    x: Tokens,
    p: Projections,
    state: CarveState,
    options: Options,
    lengths: Tensor | None,
    update: bool,
    N: int,
) -> None:
    """Raise unless the state, lengths and update fit, and nothing needs a gradient."""
    if not isinstance(state, CarveState):
        raise ValueError(f"state is {type(state).__name__}, expected a CarveState")
    with named_state():
        check_state(state, x, p, options, N)
    for name, y in state._asdict().items():
        if y is not None and not y.is_contiguous():
            raise ValueError(f"state.{name} has strides {list(y.stride())}, expected a contiguous tensor")
    if not isinstance(update, bool):
        raise ValueError(f"update is {update!r}, expected True or False")
    if lengths is not None:
        check_tensor("lengths", lengths, x.v.device, (torch.int64,))
        expect("lengths", lengths, {"[B]": (N,)})
    check_no_tangents("decoding", [*x, *p, *state])
    if torch.is_grad_enabled():
        named = {**x._asdict(), "p_down": p.down, "p_up": p.up, "p_write": p.write}
        for name, y in {**named, **{f"state.{field}": y for field, y in state._asdict().items()}}.items():
            if y is not None and y.requires_grad:
                raise ValueError(
                    f"{name} requires a gradient, which decoding does not give, expected a call under "
                    "torch.no_grad(), or recurrent_carve"
                )


@torch.compiler.disable
def decode_in_torch(
    x: Tokens, p: Projections, state: CarveState, options: Options, lengths: Tensor | None, update: bool
) -> Tensor:
    """`decode_carve` in plain torch."""
    B, T = x.v.shape[:2]
    with named_state():
        check_values(x, p, state, options, B)
    if lengths is not None and lengths.device.type == "cpu" and not ((lengths >= 0) & (lengths <= T)).all():
        raise ValueError(f"lengths is {lengths.tolist()}, expected values from 0 to T = {T}")
    p, now = cast(p, options), state
    outputs = [x.v[:, :0].to(options.dtype)]
    with torch.no_grad(), torch.autocast(x.v.device.type, enabled=False):
        for t in range(T):
            o, after = recurrent(one_token(x, t), p, now, options)
            if lengths is not None:
                taken = lengths > t
                o, after = choose(taken, o, o.new_zeros(())), CarveState(*map(partial(choose, taken), after, now))
            outputs.append(o)
            now = after
        if update:
            for moved, y in zip(now, state, strict=True):
                if y is not None and moved is not None:
                    y.copy_(moved)
    return torch.cat(outputs, dim=1).to(x.v.dtype)


def one_token(x: Tokens, t: int) -> Tokens:
    return Tokens(*each(lambda y: y[:, t : t + 1], x))


def choose(taken: Tensor, x: Any, y: Any) -> Any:
    """x `[B, ...]` of the sequences where `taken` (`[B]` bool) is true, else y; None where there is none."""
    return None if x is None else torch.where(taken.view(-1, *[1] * (x.dim() - 1)), x, y)
