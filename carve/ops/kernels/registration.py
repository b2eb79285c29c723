"""A kernel as a torch operator: what PyTorch's compiler, autograd and dispatch modes know of it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


class Operator:
    """An operator `carve::<name>` with its gradient.

    A call goes through PyTorch's dispatcher only where that has something to say: while `torch.compile` traces, under
    dispatch modes, for tensors that are not plain. Elsewhere it would double the time that the CPU takes for a call
    and its backward.

    Args:
        name: of the operator.
        run: what it does; annotated, for the schema. It changes none of its arguments and returns none of them. Outputs
            whose gradients are wanted come as a tensor or a tuple, not a list.
        fake: the same, with outputs of the right shapes and nothing in them.
        differentiate: gradients of the arguments from the context and the gradients of the outputs.
        keep: puts into the context what `differentiate` needs: (ctx, inputs, output).
    """

    def __init__(
        self,
        name: str,
        run: Callable[..., Any],
        fake: Callable[..., Any],
        differentiate: Callable[..., Any],
        keep: Callable[..., None] = keep_nothing,
    ) -> None:
        self.run = run
        self.op = torch.library.custom_op(f"carve::{name}", run, mutates_args=())
        self.op.register_fake(fake)
        self.op.register_autograd(differentiate, setup_context=keep)
        steps = {"forward": self.run_now, "setup_context": keep, "backward": differentiate}
        methods = {step: staticmethod(function) for step, function in steps.items()}
        self.function: Any = type(f"carve::{name}", (torch.autograd.Function,), methods)  # a profiler shows the name

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or not all(map(is_plain, arguments)):
            return self.op(*arguments)
        if torch.is_grad_enabled() or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
            return self.function.apply(*arguments)  # which refuses what a kernel would not see: jvp, vmap
        return self.run(*arguments)

    def run_now(self, *arguments: Any) -> Any:
        found = self.run(*arguments)
        return tuple(found) if isinstance(found, list) else found  # of a list autograd knows nothing


def is_plain(x: Any) -> bool:
    return not isinstance(x, Tensor) or type(x) in (Tensor, torch.nn.Parameter)


def refuse_second_derivative(ctx: Any, *_: Any) -> None:
    raise NotImplementedError("the kernels' backward cannot be differentiated, recurrent_carve in plain torch can")
