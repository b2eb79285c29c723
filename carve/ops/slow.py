"""Saying that something runs on a slower path than its user may expect: once, and as an error where that is wished."""

import functools
import os
import warnings

import torch


@torch.compiler.assume_constant_result  # so that it is run while torch.compile traces
def say_slow(message: str, choice: str | None = None) -> None:
    """Warn of a slow path, once a message; with CARVE_STRICT=1 in the environment, raise ValueError.

    choice: how to choose that path without being told.
    """
    if os.environ.get("CARVE_STRICT", "") not in ("", "0"):
        raise ValueError(f"{message}; CARVE_STRICT forbids it" + (f", {choice} to choose it" if choice else ""))
    warn_once(f"carve: {message}" + (f"; {choice} to choose it without this warning" if choice else ""))


@functools.cache
def warn_once(message: str) -> None:
    """Warn, once a message in a process: Python's own record is by place, and some settings leave it out."""
    warnings.warn(message, stacklevel=5)
