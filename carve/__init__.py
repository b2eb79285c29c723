"""CARVE: a recurrent token mixer that looks at its own memory before it decides what to erase."""

from carve.mixer import CarveMixer
from carve.models import CarveConfig, CarveForCausalLM, CarveModel

__all__ = ["CarveConfig", "CarveForCausalLM", "CarveMixer", "CarveModel"]
