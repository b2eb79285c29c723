"""What all Triton kernels are launched with: which Triton and which GPUs serve them, sizes of tiles, the launch."""

import contextlib
import importlib.util
from contextlib import AbstractContextManager
from typing import Any

import torch

LOWEST = (3, 6)  # the first version that the kernels were tested with
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def why_not() -> str | None:
    """Why there is no Triton to launch kernels with; None if there is."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed, expected the package triton"
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < LOWEST:
        return f"Triton is {triton.__version__}, expected at least {'.'.join(map(str, LOWEST))}"
    return None


def why_too_old(device: torch.device) -> str | None:
    """Why a GPU does not serve the kernels; None if it does."""
    if device.type == "cuda" and torch.version.cuda is not None:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return f"{device} has compute capability {'.'.join(map(str, capability))}, expected at least 8.0"
    return None


def pad(size: int) -> int:
    """Of a tile's side: the next power of two, at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def launch(kernel: Any, device: torch.device, programs: int, *arguments: Any, **constants: Any) -> None:
    """Launch a Triton kernel on a device, or on a CPU in the interpreter."""
    where: AbstractContextManager = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    if programs:
        with where:
            kernel[(programs,)](*arguments, **constants)
