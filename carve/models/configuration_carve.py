"""The configuration of a CARVE language model."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, configuration_utils
from transformers.activations import ACT2FN

from carve.mixer import GATES, SEEING, CarveMixer
from carve.names import hint
from carve.ops.slow import warn_once

ATTENTION = ("sliding_attention", "full_attention")
LAYER_TYPES = (*GATES, *ATTENTION)

# transformers' own table: its Trainer reads the configuration of a checkpoint without knowing the architecture.
configuration_utils.ALLOWED_ATTN_LAYER_TYPES += tuple(GATES)  # type: ignore[assignment]

# What transformers writes into a config.json and has no field for.
WRITTEN = (
    "auto_map",
    "custom_pipelines",
    "distributed_config",
    "fusion_config",
    "quantization_config",
    "tokenizer_class",
    "transformers_weights",
)
OTHER_NAMES = {"d_model": "hidden_size", "gates": "layer_types"}  # too far from ours to be guessed


class UnknownField(ValueError):
    """A field that neither `CarveConfig` nor transformers knows."""

    def __init__(self, field: str, known: Sequence[str]) -> None:
        super().__init__(f"CarveConfig has no field {field!r}{hint(OTHER_NAMES.get(field, field), known)}")
        self.field = field


def with_value_errors(config_class: type) -> type:
    """What `strict` finds wrong, as the ValueError that says so in one line, and how a list is written."""
    init = config_class.__init__  # type: ignore[misc]

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **fields: Any) -> None:
        if isinstance(names := fields.get("layer_types"), str):
            raise ValueError(f"layer_types is {names!r}, expected a list, [{names}]")
        try:
            init(self, *args, **fields)
        except StrictDataclassError as error:
            raise ValueError(str(error.__cause__)) from error

    config_class.__init__ = __init__  # type: ignore[misc]
    return config_class


@with_value_errors
@strict
class CarveConfig(PreTrainedConfig):
    """Configuration of `CarveModel` and `CarveForCausalLM`. The defaults make a model of 1.3B parameters.

    Args:
        vocab_size: tokens in the vocabulary.
        hidden_size: D, the width of the model.
        num_hidden_layers: blocks.
        num_heads: H, key heads of a recurrent layer.
        num_v_heads: HV, value heads of a recurrent layer; None for H.
        head_dim: K, key dimension of a head; also the head dimension of attention layers.
        v_head_dim: V, value dimension of a recurrent head; None for K.
        intermediate_size: width of the SwiGLU MLP.
        conv_size: taps of the short convolution.
        layer_types: the token mixer of each block: `"carve"`; `"carve_value"`, with a write gate a value;
            `"carve_blind"`, without content; the rivals `"gdn2"`, `"kda"`, `"gdn"`; `"sliding_attention"`,
            `"full_attention"`. None for `"carve"` in all.
        content: what the gates of `"carve"` and `"carve_value"` layers see of the memory: `"mean"` (the paper),
            `"read"`, None.
        content_norm: norm of the projected content, `"rms"` or None.
        content_rank: R, rank of the content projections.
        content_erase, content_write: which gates see the content; one of the two at least.
        chunk_size: C, tokens in a content chunk.
        allow_neg_eigval: let the erase gate range over (0, 2).
        num_attention_heads, num_key_value_heads: heads of attention layers; None for H, and for all of these.
        sliding_window: tokens that `"sliding_attention"` sees, itself included.
        rope_parameters: rotary embeddings of attention layers, as in transformers.
        max_position_embeddings: longest context of attention layers; recurrent layers have no limit.
        rms_norm_eps: epsilon of all norms.
        initializer_range: standard deviation of the initial weights.
        tie_word_embeddings: use the embeddings as output layer too.

    Raises:
        ValueError: a name is neither one of those above nor of transformers' own, or a value is not as it should be.
    """

    model_type = "carve"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    vocab_size: int = 32000
    hidden_size: int = 2048
    num_hidden_layers: int = 22
    num_heads: int = 16
    num_v_heads: int | None = None
    head_dim: int = 128
    v_head_dim: int | None = None
    intermediate_size: int = 5632
    conv_size: int = 4
    layer_types: list[str] | None = None
    content: str | None = "mean"
    content_norm: str | None = "rms"
    content_rank: int = 16
    content_erase: bool = True
    content_write: bool = False
    chunk_size: int = 64
    allow_neg_eigval: bool = False
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    sliding_window: int | None = 2048
    rope_parameters: dict | None = None
    max_position_embeddings: int = 4096
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_attention_heads is None:
            self.num_attention_heads = self.num_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.layer_types is None:
            self.layer_types = ["carve"] * self.num_hidden_layers
        for name in self.layer_types:  # before transformers takes "attention" for "full_attention"
            if name not in LAYER_TYPES:
                raise ValueError(f"layer_types has {name!r}, expected only {', '.join(map(repr, LAYER_TYPES))}")
        known = [field.name for field in dataclasses.fields(self)]
        for name in kwargs:
            own = getattr(type(self), name, None)
            if callable(own) or (isinstance(own, property) and own.fset is None):  # a method, which it would hide
                raise UnknownField(name, known)
        super().__post_init__(**kwargs)
        for name in kwargs:  # transformers has taken out those that it knows, and kept all others
            if name in vars(self) and not (name.startswith("_") or name in WRITTEN or hasattr(type(self), name)):
                raise UnknownField(name, known)
        self.check()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers does; what a config.json has beside is left out, and said: other tools leave notes there."""
        while True:
            try:
                return super().from_dict(config_dict, **kwargs)
            except UnknownField as error:
                config_dict = {name: y for name, y in config_dict.items() if name != error.field}
                warn_once(f"carve: config.json has {error.field!r}, which is without effect: {error}")

    def check(self) -> None:
        """Raise ValueError on what the layers themselves would not notice, or only once they are built."""
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected an integer of at least 1")
        if not 0 < self.rms_norm_eps < math.inf:
            raise ValueError(f"rms_norm_eps is {self.rms_norm_eps}, expected a positive number")
        if not 0 <= self.initializer_range < math.inf:
            raise ValueError(f"initializer_range is {self.initializer_range}, expected a number of at least 0")
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"attention_dropout is {self.attention_dropout}, expected from 0 to below 1")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act is {self.hidden_act!r}, expected one of {', '.join(map(repr, ACT2FN))}")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id is {self.pad_token_id}, expected None or from 0 to below vocab_size = {self.vocab_size}"
            )
        assert self.layer_types is not None
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries, "
                f"expected num_hidden_layers = {self.num_hidden_layers}"
            )
        for i, name in enumerate(self.layer_types):
            if name not in ATTENTION:
                with torch.device("meta"):  # no memory: only to let the layer check its arguments
                    CarveMixer(**self.mixer_arguments(i))
                break
        if "sliding_attention" in self.layer_types and (self.sliding_window is None or self.sliding_window < 2):
            raise ValueError(f"sliding_window is {self.sliding_window}, expected at least 2 for 'sliding_attention'")
        if not set(ATTENTION).isdisjoint(self.layer_types):
            heads, groups = self.num_attention_heads, self.num_key_value_heads
            assert heads is not None
            assert groups is not None
            if min(heads, groups) < 1 or heads % groups:
                raise ValueError(
                    f"num_attention_heads is {heads}, expected a multiple of num_key_value_heads = {groups}"
                )
            if self.head_dim % 2:
                raise ValueError(f"head_dim is {self.head_dim}, expected an even number for rotary embeddings")

    @property
    def sees_content(self) -> bool:
        """Whether the gates of some layer see the memory."""
        return self.content is not None and not set(SEEING).isdisjoint(self.layer_types or ())

    def validate_rope(self) -> None:
        """Only attention has rotary embeddings: a recurrent head may be of any size."""
        if not set(ATTENTION).isdisjoint(self.layer_types or ()):
            try:
                super().validate_rope()
            except KeyError as error:
                raise ValueError(error.args[0]) from error

    def mixer_arguments(self, layer_idx: int) -> dict[str, Any]:
        """Arguments of the `CarveMixer` of a recurrent layer."""
        assert self.layer_types is not None
        return {
            "hidden_size": self.hidden_size,
            "num_heads": self.num_heads,
            "head_dim": self.head_dim,
            "num_v_heads": self.num_v_heads,
            "v_head_dim": self.v_head_dim,
            "conv_size": self.conv_size,
            "gates": self.layer_types[layer_idx],
            "content": self.content,
            "content_norm": self.content_norm,
            "content_rank": self.content_rank,
            "content_erase": self.content_erase,
            "content_write": self.content_write,
            "chunk_size": self.chunk_size,
            "allow_neg_eigval": self.allow_neg_eigval,
            "norm_eps": self.rms_norm_eps,
        }


def longest_context(config: Any) -> int | None:
    """Tokens that full attention may see, in the model of any configuration of transformers; None for any number."""
    full = "full_attention" in (getattr(config, "layer_types", None) or ["full_attention"])
    return getattr(config, "max_position_embeddings", None) if full else None


def check_positions(config: Any, tokens: int) -> None:
    """Raise ValueError where sequences of so many tokens have more positions than full attention knows."""
    longest = longest_context(config)
    if longest is not None and tokens > longest:
        raise ValueError(f"sequences of {tokens} tokens, but the model has max_position_embeddings = {longest}")
