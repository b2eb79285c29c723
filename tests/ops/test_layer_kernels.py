"""The kernels of what a layer does around the recurrence: in Triton's interpreter, or on a GPU if there is one."""

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d, pad, silu

pytest.importorskip("triton")  # which has no wheels but for Linux

from carve import CarveMixer
from carve.mixer import Bounds
from carve.ops import slow
from carve.ops.kernels import layer
from tests.ops.cases import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels serve a CPU too, where Triton interprets them."""
    monkeypatch.setattr(layer, "served", lambda *tensors: all(x.dtype in layer.DTYPES for x in tensors))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_as_exact(op: Callable[..., Tensor], definition: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Values and gradients of `op`, on the device, are those of the definition in float64."""
    ours = [x.to(DEVICE).requires_grad_() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    y, expected = op(*ours), definition(*exact)
    assert y.dtype == inputs[0].dtype
    dtype = str(y.dtype).removeprefix("torch.")
    assert_close(y.cpu(), expected, f"layer_{dtype}", "y")
    dy = normal(*y.shape, seed=9).to(y.dtype)
    found = torch.autograd.grad(y, ours, dy.to(DEVICE))
    wanted = torch.autograd.grad(expected, exact, dy.double())
    for i, (dx, exact_dx) in enumerate(zip(found, wanted, strict=True)):
        bound = "op_float32_gradient" if dx.dtype == torch.float32 else f"layer_{dtype}_gradient"
        assert_close(dx.cpu(), exact_dx, bound, f"gradient {i}")


def norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


@dtypes
@pytest.mark.parametrize("shape", [(2, 3, 2, 128), (1, 5, 1, 24), (1, 1, 1, 3), (3, 67, 2, 16)])
def test_unit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    assert_as_exact(layer.unit, norm, normal(*shape).to(dtype))


def test_unit_of_nothing_and_of_zeros() -> None:
    assert layer.unit(torch.zeros(0, 3, 1, 16, device=DEVICE)).shape == (0, 3, 1, 16)
    x = torch.zeros(1, 2, 1, 16, device=DEVICE, requires_grad=True)
    y = layer.unit(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert (y == 0).all()
    assert_close(dx.cpu(), torch.full_like(x, 1e3).cpu(), "op_float32", "dx")


def definition(bounds: list[int] | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """The convolution by PyTorch's own, each packed sequence on its own."""

    def alone(x: Tensor, weight: Tensor) -> Tensor:
        D, taps = weight.shape
        return silu(conv1d(pad(x.mT, (taps - 1, 0)), weight.unsqueeze(1), groups=D)).mT

    def packed(x: Tensor, weight: Tensor) -> Tensor:
        assert bounds is not None
        return torch.cat([alone(x[:, a:b], weight) for a, b in pairwise(bounds) if b > a], 1)

    return alone if bounds is None else packed


@dtypes
@pytest.mark.parametrize(("B", "T", "D", "taps"), [(2, 67, 24, 4), (1, 1, 70, 4), (3, 5, 16, 2), (2, 64, 3, 1)])
def test_convolution(dtype: torch.dtype, B: int, T: int, D: int, taps: int) -> None:
    assert_as_exact(layer.convolve, definition(), normal(B, T, D).to(dtype), 0.5 * normal(D, taps, seed=1).to(dtype))


@pytest.mark.parametrize("lengths", [[0, 1, 2, 0, 65, 3, 4, 0], [70], [126, 1, 2, 0, 3], [129, 3]])
def test_convolution_of_packed_sequences(lengths: list[int]) -> None:
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    before = Bounds(torch.tensor(bounds), bounds[-1]).before.to(DEVICE)
    x, weight = normal(1, bounds[-1], 40).float(), 0.5 * normal(40, 4, seed=1).float()
    assert_as_exact(lambda x, w: layer.convolve(x, w, before), definition(bounds), x, weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_packed_sequence_is_none_of_its_neighbours_business(value: float) -> None:
    """What is not finite in it stays there, in values and gradients, also where a tile of 128 rows ends in it."""
    bounds, T, weight = [0, 125, 129, 134], 134, 0.5 * normal(8, 4, seed=1).float().to(DEVICE)
    before = Bounds(torch.tensor(bounds), T).before.to(DEVICE)
    x, inside = normal(1, T, 8).float().to(DEVICE), slice(bounds[1], bounds[2])
    results = []
    for broken in (False, True):
        ours = x.clone()
        if broken:
            ours[:, inside] = value
        y = layer.convolve(ours.requires_grad_(), weight, before)
        (dx,) = torch.autograd.grad(y.sum(), ours)
        results.append([torch.cat([z[:, : inside.start], z[:, inside.stop :]], 1) for z in (y, dx)])
    for z, wanted in zip(*results, strict=True):
        assert torch.equal(z, wanted)


def test_wide_weights_of_narrow_inputs() -> None:
    """As under autocast: they are not rounded first, and their gradient is as wide as they are."""
    x, weight = normal(1, 70, 8).bfloat16(), normal(8, 4, seed=1).float()
    assert_as_exact(layer.convolve, definition(), x, weight)


def test_inputs_that_are_not_contiguous() -> None:
    x, weight = normal(2, 8, 11).float().mT, normal(4, 8, seed=1).float().mT
    assert_as_exact(layer.convolve, definition(), x, weight)
    assert_as_exact(layer.unit, norm, normal(2, 16, 5).float().mT)


def test_what_is_later_leaves_the_bits_alone() -> None:
    x, weight = normal(1, 100, 8).float().to(DEVICE), normal(8, 4, seed=1).float().to(DEVICE)
    changed = x.clone()
    changed[:, 50:] += 1
    assert torch.equal(layer.convolve(x, weight)[:, :50], layer.convolve(changed, weight)[:, :50])


def test_no_tokens() -> None:
    x, weight = (
        torch.zeros(1, 0, 8, device=DEVICE, requires_grad=True),
        torch.ones(8, 4, device=DEVICE).requires_grad_(),
    )
    y = layer.convolve(x, weight)
    dx, dw = torch.autograd.grad(y.sum(), [x, weight])
    assert y.shape == dx.shape == x.shape
    assert (dw == 0).all()


@pytest.mark.parametrize("packed", [False, True])
def test_a_layer_in_pieces(packed: bool) -> None:
    """The layer's convolution by kernels, with and behind a past, is that of plain torch."""
    mixer = CarveMixer(24, num_heads=2, head_dim=8)
    sizes, taps = [16, 16, 16], 4
    parts, past = [normal(1, 9, d, seed=d).float() for d in sizes], normal(3 if packed else 1, taps - 1, 48).float()
    mixer, parts, past = mixer.to(DEVICE), [x.to(DEVICE) for x in parts], past.to(DEVICE)
    cu_seqlens = torch.tensor([0, 2, 2, 9], device=DEVICE) if packed else None
    found = mixer.conv(parts, past, cu_seqlens)
    layer_served, layer.served = layer.served, lambda *tensors: False
    try:
        expected = mixer.conv(parts, past, cu_seqlens)
    finally:
        layer.served = layer_served
    for y, wanted in zip(found[0], expected[0], strict=True):
        assert_close(y.detach(), wanted.detach(), "op_float32", "y")
    assert torch.equal(found[1], expected[1])


def test_second_derivatives_are_refused() -> None:
    x, weight = normal(1, 4, 4).float().to(DEVICE).requires_grad_(), normal(4, 2).float().to(DEVICE).requires_grad_()
    for y in (layer.convolve(x, weight), layer.unit(x)):
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="cannot be differentiated"):
            dx.sum().backward()


def test_a_slow_path_on_a_gpu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    slow.warn_once.cache_clear()
    monkeypatch.delenv("CARVE_STRICT", raising=False)
    monkeypatch.setattr(layer, "convolve_in_torch", lambda *_: "slowly")
    x: Any = SimpleNamespace(is_cuda=True, device="cuda:7", dtype=torch.float32)
    with pytest.warns(UserWarning, match=r"on cuda:7 the short convolution runs in plain torch, .* it has 5 taps"):
        assert layer.convolve(x, torch.zeros(8, 5)) == "slowly"
    monkeypatch.setenv("CARVE_STRICT", "1")
    with pytest.raises(ValueError, match=r"it has 5 taps, .* expected up to 4 taps, .* CARVE_STRICT forbids it"):
        layer.convolve(x, torch.zeros(8, 5))


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_large_and_repeatable(packed: bool) -> None:
    """As large as a layer has it, the same bits again, every element written."""
    T, D = 4096, 6144
    x, weight = normal(1, T, D).bfloat16().cuda(), 0.5 * normal(D, 4, seed=1).float().cuda()
    bounds = [0, 1000, 1000, 1003, T]
    before = Bounds(torch.tensor(bounds, device="cuda"), T).before if packed else None
    assert_as_exact(
        lambda x, w: layer.convolve(x, w, before), definition(bounds if packed else None), x.cpu(), weight.cpu()
    )
    dy = torch.randn_like(x)
    results = [layer.convolve_backward(x, weight, before, dy) for _ in range(20)]
    assert all(torch.equal(y, z) for found in results for y, z in zip(found, results[0], strict=True))


@pytest.mark.gpu
def test_more_than_32_bits_of_numbers() -> None:
    """Offsets are of 64 bits: the last rows of 2.2 billion numbers are right."""
    x = torch.zeros(1, 2**31 // 4096 + 2048, 4096, device="cuda", dtype=torch.bfloat16)
    x[:, -8:] = normal(1, 8, 4096).to(x)
    weight = normal(4096, 4, seed=1).float().cuda()
    tail = x[:, -16:].clone()
    assert torch.equal(layer.convolve(x, weight)[:, -8:], layer.convolve(tail, weight)[:, -8:])
    y = layer.unit(x.view(1, -1, 32, 128))
    assert torch.equal(y[:, -8:].flatten(2), layer.unit(tail.view(1, -1, 32, 128))[:, -8:].flatten(2))
