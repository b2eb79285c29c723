"""CARVE: a recurrent token mixer that looks at its own memory before it decides what to erase."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from carve.mixer import CarveMixer
    from carve.models import CarveConfig, CarveForCausalLM, CarveModel

__all__ = ["CarveConfig", "CarveForCausalLM", "CarveMixer", "CarveModel"]


def __getattr__(name: str) -> Any:
    """Import what is asked for, and not before: the command line is not to wait for torch and transformers."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("carve.mixer" if name == "CarveMixer" else "carve.models"), name)
