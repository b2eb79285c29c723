"""An operator called directly, and through PyTorch's dispatcher."""

from typing import Any, List  # noqa: UP035 (PyTorch 2.6 knows no other name of it in an operator)

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from carve.ops.kernels.registration import Operator, refuse_second_derivative


def scale(x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    return factor * x, x.sum(-1)


def fake(x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[:-1])


def backward(dy: Tensor, dsum: Tensor, factor: float) -> List[Tensor]:  # noqa: UP006
    return [factor * dy + dsum.unsqueeze(-1)]


def fake_backward(dy: Tensor, dsum: Tensor, factor: float) -> List[Tensor]:  # noqa: UP006
    return [torch.empty_like(dy)]


def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.factor = inputs[1]


def differentiate(ctx: Any, dy: Tensor, dsum: Tensor) -> tuple[Tensor, None]:
    return backward_op(dy, dsum, ctx.factor)[0], None


scale_op = Operator("test_scale", scale, fake, differentiate, keep)
backward_op = Operator("test_scale_backward", backward, fake_backward, refuse_second_derivative)


class Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Wrapped(Tensor):
    pass


def differentiated(x: Tensor, call: Any = scale_op) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y, total = call(x, 3.0)
    return [y, total, *torch.autograd.grad(y.square().sum() + total.square().sum(), x)]


def test_it_is_the_same_directly_and_through_the_dispatcher() -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    direct, dispatched = differentiated(x), differentiated(x, scale_op.op)
    compiled = differentiated(x, torch.compile(lambda *a: scale_op(*a), backend="aot_eager", fullgraph=True))
    for y, z, w in zip(direct, dispatched, compiled, strict=True):
        assert torch.equal(y, z)
        assert torch.equal(y, w)
    with torch.no_grad():
        assert torch.equal(scale_op(x, 3.0)[0], 3 * x)
    torch.library.opcheck(scale_op.op, (x.requires_grad_(), 3.0))


def test_modes_and_other_kinds_of_tensors_see_it() -> None:
    x = torch.randn(3, 4)
    with Watch() as watch:
        differentiated(x)
    assert {"carve.test_scale.default", "carve.test_scale_backward.default"} <= set(watch.seen)
    seen: list[Any] = []
    call = scale_op.op

    def spy(*arguments: Any) -> Any:
        seen.append(arguments)
        return call(*arguments)

    scale_op.op = spy  # type: ignore[assignment]
    try:
        scale_op(x.as_subclass(Wrapped), 3.0)
        scale_op(torch.nn.Parameter(x), 3.0)
    finally:
        scale_op.op = call
    assert len(seen) == 1


@pytest.mark.parametrize("grad", [True, False])
def test_forward_derivatives_and_vmap_are_refused(grad: bool) -> None:
    """A kernel goes by addresses: it would leave the tangents out, without a word."""
    x = torch.randn(3, 4)
    with torch.set_grad_enabled(grad):
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
            scale_op(forward_ad.make_dual(x, x), 3.0)
        with pytest.raises(NotImplementedError, match="jvp"):
            torch.func.jvp(lambda x: scale_op(x, 3.0)[0], (x,), (x,))
        with pytest.raises(RuntimeError, match="does not have vmap support"):
            torch.func.vmap(lambda x: scale_op(x, 3.0)[0])(x)
        (dx,) = torch.func.vjp(lambda x: scale_op(x, 3.0)[0], x)[1](x)
    assert torch.equal(dx, 3 * x)


def test_second_derivatives_are_refused() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    y, _ = scale_op(x, 3.0)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated"):
        dx.sum().backward()
