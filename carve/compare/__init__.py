"""Comparing mixers: `plan` says what to train, `run` trains and measures (`measure`), `report` says what came out."""

from carve.compare.plan import Plan, read_plan
from carve.compare.run import compare

__all__ = ["Plan", "compare", "read_plan"]
