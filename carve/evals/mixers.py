"""The token mixers that comparisons and probes know by name."""

from typing import Any

from carve.names import hint

READ: dict[str, Any] = {"layer_types": ["carve"], "content": "read", "content_norm": "rms"}
READ |= {"content_erase": True, "content_write": True}
MEAN = READ | {"content": "mean", "content_write": False}

MIXERS: dict[str, dict[str, Any]] = {
    # -- CARVE, by what its gates see of the memory --
    "carve-mean": MEAN,  # the paper's
    "carve-mean-write": MEAN | {"content_write": True},
    "carve-read": READ,
    "carve-read-raw": READ | {"content_norm": None},
    "carve-read-erase": READ | {"content_write": False},
    "carve-read-write": READ | {"content_erase": False},
    "carve-mean-value": MEAN | {"layer_types": ["carve_value"]},  # with a write gate a value
    "carve-read-value": READ | {"layer_types": ["carve_value"]},
    "carve-blind": {"layer_types": ["carve"], "content": None},
    # -- its rivals --
    "gdn2": {"layer_types": ["gdn2"]},
    "kda": {"layer_types": ["kda"]},
    "gdn": {"layer_types": ["gdn"]},
    "full_attention": {"layer_types": ["full_attention"]},
    # -- hybrids: every second layer sees a window --
    "carve-mean-hybrid": MEAN | {"layer_types": ["carve", "sliding_attention"]},
    "carve-read-hybrid": READ | {"layer_types": ["carve", "sliding_attention"]},
    "gdn2-hybrid": {"layer_types": ["gdn2", "sliding_attention"]},
    "kda-hybrid": {"layer_types": ["kda", "sliding_attention"]},
    "gdn-hybrid": {"layer_types": ["gdn", "sliding_attention"]},
}
"""Name -> fields of `CarveConfig`; `layer_types` is a period, which `mixer_fields` repeats over the layers."""

DECIDED = {field for fields in MIXERS.values() for field in fields}
"""Fields of `CarveConfig` in which mixers differ."""


def mixer_fields(name: str, num_hidden_layers: int) -> dict[str, Any]:
    """The fields of `CarveConfig` that make a model of so many layers use the mixer of that name.

    Raises:
        ValueError: no such mixer, no number of layers, or fewer than its period.
    """
    if name not in MIXERS:
        raise ValueError(f"there is no mixer {name!r}{hint(name, MIXERS)}")
    if type(num_hidden_layers) is not int:
        raise ValueError(f"num_hidden_layers is {num_hidden_layers!r}, expected an integer")
    fields = MIXERS[name]
    period = fields["layer_types"]
    if num_hidden_layers < len(period):
        raise ValueError(f"mixer {name!r} needs at least {len(period)} layers, got {num_hidden_layers}")
    layer_types = [period[i % len(period)] for i in range(num_hidden_layers)]
    return fields | {"num_hidden_layers": num_hidden_layers, "layer_types": layer_types}
