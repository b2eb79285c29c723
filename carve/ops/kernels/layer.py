"""What a layer does around the recurrence, as torch operators: `carve::unit`, the L2 norm, and `carve::convolve`.

Each has the portable kernels of `triton_layer.py`, for any GPU that Triton serves, and a definition in plain torch for
all else. `torch.compile` takes the operators as they are.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from carve.ops.kernels import triton_launch
from carve.ops.kernels.compiler import constant
from carve.ops.kernels.registration import Operator, refuse_second_derivative
from carve.ops.kernels.triton_launch import DTYPES, launch, pad
from carve.ops.slow import say_slow

EPS = 1e-6
NORM_TILE = 4096  # numbers that a program normalises


class Tile(NamedTuple):
    """Tokens and channels that a program of the convolution has, and its warps."""

    rows: int
    columns: int
    warps: int


FORWARD, BACKWARD = Tile(8, 128, 2), Tile(128, 256, 2)
TAPS = 4  # at most


def served(*tensors: Tensor) -> bool:
    """Whether the kernels serve these."""
    return all(x.is_cuda and x.dtype in DTYPES for x in tensors) and has_triton(tensors[0].device)


@constant
def has_triton(device: torch.device) -> bool:
    return triton_launch.why_not() is None and triton_launch.why_too_old(device) is None


# -- L2 norm --


def unit(x: Tensor) -> Tensor:
    """x `[..., K]` over its L2 norm, rounded once; for the backward it keeps no copy in float32."""
    return normalise(x.contiguous())[0] if served(x) else unit_in_torch(x)


def unit_in_torch(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return (x * torch.rsqrt(norm.square() + EPS)).to(x.dtype)


def tile_norm(x: Tensor) -> tuple[int, dict[str, int]]:
    """Programs for `[rows, K]`, and the constants that they take."""
    K = x.shape[-1]
    rows = max(1, NORM_TILE // pad(K))
    return -(-(x.numel() // K) // rows), {"K": K, "BK": pad(K), "ROWS": rows}


def run_norm(x: Tensor) -> tuple[Tensor, Tensor]:
    """x `[..., K]`, contiguous, over its L2 norm; and one over the norm, `[...]` float32."""
    from carve.ops.kernels import triton_layer

    y, factors = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    programs, constants = tile_norm(x)
    launch(triton_layer.normalise, x.device, programs, x, y, factors, factors.numel(), EPS, **constants)
    return y, factors


def fake_norm(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)


def run_norm_backward(y: Tensor, factors: Tensor, dy: Tensor) -> Tensor:
    """The gradient of x from what `carve::unit` returned and the gradient of its first output, contiguous."""
    from carve.ops.kernels import triton_layer

    dx = torch.empty_like(y)
    programs, constants = tile_norm(y)
    launch(triton_layer.differentiate_norm, y.device, programs, y, factors, dy, dx, factors.numel(), **constants)
    return dx


def fake_norm_backward(y: Tensor, factors: Tensor, dy: Tensor) -> Tensor:
    return torch.empty_like(y)


def keep_unit(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output)


def differentiate_unit(ctx: Any, dy: Tensor, _: Any) -> Tensor:
    y, factors = ctx.saved_tensors
    return normalise_backward(y, factors, dy.to(y.dtype).contiguous())


normalise = Operator("unit", run_norm, fake_norm, differentiate_unit, keep_unit)
normalise_backward = Operator("unit_backward", run_norm_backward, fake_norm_backward, refuse_second_derivative)


# -- causal convolution, SiLU --


def convolve(x: Tensor, weight: Tensor, before: Tensor | None = None) -> Tensor:
    """Causal depthwise convolution over time, then SiLU.

    Args:
        x: `[B, T, D]`.
        weight: `[D, taps]`, the last tap for the token itself.
        before: `[T]` int32, how many tokens of its own sequence come before each, for sequences packed into B = 1.

    Returns:
        `[B, T, D]`, in x's dtype.
    """
    if weight.shape[1] <= TAPS and served(x, weight):
        return convolve_by_kernel(x.contiguous(), weight.contiguous(), before)
    if x.is_cuda:
        wanted = f"expected up to {TAPS} taps, 16 or 32 bits, and a GPU and a version that Triton's kernels serve"
        found = f"it has {weight.shape[1]} taps, {x.dtype} and weights in {weight.dtype}"
        say_slow(f"on {x.device} the short convolution runs in plain torch, which is slow there: {found}, {wanted}")
    return convolve_in_torch(x, weight, before)


def convolve_in_torch(x: Tensor, weight: Tensor, before: Tensor | None = None) -> Tensor:
    T, lags = x.shape[1], weight.shape[1] - 1
    weight, extended = weight.to(x.dtype), F.pad(x, (0, 0, lags, 0))  # under autocast x is narrower, and is to stay so
    y = x * weight[:, lags]
    for lag in range(1, lags + 1):
        past = extended[:, lags - lag : lags - lag + T]
        if before is not None:
            past = torch.where((before >= lag).unsqueeze(-1), past, 0)
        y = torch.addcmul(y, past, weight[:, lags - lag])
    return F.silu(y)


def run_convolution(kernel: Any, x: Tensor, tensors: list[Tensor | None], taps: int, tile: Tile) -> None:
    """Launch one of the convolution's kernels for all tiles of x `[B, T, D]`."""
    B, T, D = x.shape
    programs = -(-(B * T) // tile.rows) * -(-D // tile.columns)
    constants = {"TAPS": taps, "ROWS": tile.rows, "COLUMNS": tile.columns, "num_warps": tile.warps}
    launch(kernel, x.device, programs, *tensors, B * T, T, D, **constants)


def run_convolve(x: Tensor, weight: Tensor, before: Tensor | None) -> Tensor:
    """`convolve` of contiguous tensors."""
    from carve.ops.kernels import triton_layer

    y = torch.empty_like(x)
    run_convolution(triton_layer.convolve, x, [x, weight, before, y], weight.shape[1], FORWARD)
    return y


def fake_convolve(x: Tensor, weight: Tensor, before: Tensor | None) -> Tensor:
    return torch.empty_like(x)


def run_convolve_backward(x: Tensor, weight: Tensor, before: Tensor | None, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight."""
    from carve.ops.kernels import triton_layer

    (B, T, D), taps, dx = x.shape, weight.shape[1], torch.empty_like(x)
    shares = x.new_empty(-(-(B * T) // BACKWARD.rows), taps, D, dtype=torch.float32)
    kernel = triton_layer.differentiate_convolution
    run_convolution(kernel, x, [x, weight, before, dy, dx, shares], taps, BACKWARD)
    return dx, shares.sum(0).T.to(weight.dtype).contiguous()


def fake_convolve_backward(x: Tensor, weight: Tensor, before: Tensor | None, dy: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def keep_convolution(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def differentiate_convolution(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, before = ctx.saved_tensors
    return *convolve_backward(x, weight, before, dy.to(x.dtype).contiguous()), None


convolve_by_kernel = Operator("convolve", run_convolve, fake_convolve, differentiate_convolution, keep_convolution)
convolve_backward = Operator(
    "convolve_backward", run_convolve_backward, fake_convolve_backward, refuse_second_derivative
)
