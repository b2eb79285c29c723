"""Tiny models whose content term is heard, and the one way to compare what they compute."""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from carve import CarveConfig, CarveForCausalLM
from tests.tolerances import tolerance

VOCAB = 61
ALL_LAYERS = ["carve", "carve_value", "gdn2", "kda", "gdn", "sliding_attention", "full_attention"]
READ = {"content": "read", "content_norm": None, "content_write": True}
GROUPED = {"num_v_heads": 4, "v_head_dim": 6, "content_write": True, "chunk_size": 5}
BLIND = {"content": None, "conv_size": 1, "allow_neg_eigval": True}

# name -> layer types, and what differs from the sizes of `tiny_config`
KINDS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "mean": (["carve"] * 2, {}),
    "read": (["carve"] * 2, READ),
    "grouped": (["carve"] * 2, GROUPED),
    "blind": (["carve"] * 2, BLIND),
    "rivals": (["gdn2", "kda", "gdn"], {}),
    "hybrid": (["carve", "sliding_attention", "carve", "full_attention"], READ),
    "attention_first": (["sliding_attention", "carve"], {"num_attention_heads": 4, "num_key_value_heads": 2}),
    "full_attention": (["full_attention", "carve"], {"num_attention_heads": 4, "num_key_value_heads": 2}),
}
RECURRENT = ["mean", "read", "grouped", "blind", "rivals"]


def tiny_config(layer_types: list[str], **fields: Any) -> CarveConfig:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": len(layer_types),
        "num_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "chunk_size": 4,
        "content_rank": 4,
        "sliding_window": 5,
        "initializer_range": 0.3,
    }
    return CarveConfig(layer_types=layer_types, **(sizes | fields))


def hear_content(module: nn.Module) -> None:
    """Give the content projections, zero at initialisation, values that move the outputs."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(("p_up", "p_write")):
                parameter.normal_(std=2)


def make_model(layer_types: list[str], dtype: torch.dtype = torch.float64, **fields: Any) -> CarveForCausalLM:
    torch.manual_seed(0)
    model = CarveForCausalLM(tiny_config(layer_types, **fields)).eval()
    hear_content(model)
    return model.to(dtype)


@functools.cache
def tiny(kind: str, dtype: torch.dtype = torch.float64) -> CarveForCausalLM:
    """The model of that kind, shared by all tests: not to be changed."""
    layer_types, fields = KINDS[kind]
    return make_model(layer_types, dtype, **fields)


def tokens(B: int, T: int, seed: int = 0) -> Tensor:
    """`[B, T]` token ids; 0 is left out, for padding."""
    return torch.randint(1, VOCAB, (B, T), generator=torch.Generator().manual_seed(seed))


def error(found: Tensor, expected: Tensor) -> float:
    """Largest error, relative to the largest value."""
    assert found.shape == expected.shape
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max())


def assert_near(found: Tensor, expected: Tensor, name: str = "model_float64") -> None:
    assert error(found, expected) <= tolerance(name)
