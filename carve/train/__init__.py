"""Training: text -> tokens on disk (`data`) -> transformers' Trainer (`run`, `trainer`) -> checkpoints (`folder`)."""

from typing import TYPE_CHECKING, Any

from carve.train.config import TrainConfig

if TYPE_CHECKING:
    from carve.train.run import train

__all__ = ["TrainConfig", "train"]


def __getattr__(name: str) -> Any:
    """Import `train` when it is asked for: the command line needs the configuration alone."""
    if name != "train":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from carve.train.run import train

    return train
