"""CARVE as a Hugging Face model."""

from carve.models.cache_carve import CarveCache
from carve.models.configuration_carve import CarveConfig
from carve.models.modeling_carve import CarveForCausalLM, CarveModel

__all__ = ["CarveCache", "CarveConfig", "CarveForCausalLM", "CarveModel"]
