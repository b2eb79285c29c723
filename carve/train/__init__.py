"""Training: text -> tokens on disk (`data`) -> transformers' Trainer (`run`), as `config` says."""

from carve.train.config import TrainConfig
from carve.train.run import train

__all__ = ["TrainConfig", "train"]
