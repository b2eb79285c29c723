"""What a model carries from one forward to the next: constant size for recurrent layers, else a window or all."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, CacheLayerMixin

from carve.mixer import GATES, MixerState
from carve.models.configuration_carve import CarveConfig


class RecurrentCacheLayer(CacheLayerMixin):
    """The state of one recurrent layer, as transformers' caches hold it."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.state: MixerState | None = None
        self.seen = 0  # tokens, padding included, as attention layers count them

    def advance(self, state: MixerState, tokens: int) -> None:
        """Take the state after `tokens` more tokens."""
        self.state, self.seen = state, self.seen + tokens

    @property
    def batch_size(self) -> int:
        return -1 if self.state is None else len(self.state.conv)

    def select(self, indices: Tensor) -> None:
        """Keep the sequences at `indices` (`[M]` int64), which may repeat."""
        if self.state is not None:
            self.state = self.state.select(indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.select(torch.arange(self.batch_size).repeat_interleave(repeats))

    def reset(self) -> None:
        self.state, self.seen = None, 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            raise ValueError(
                "crop: a recurrent memory cannot take tokens back; take a cache.snapshot() before them to restore"
            )

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise TypeError("a recurrent layer holds no keys and values: use advance")

    def offload(self) -> None:
        """The state is small: it stays where it is."""

    def prefetch(self) -> None:
        """The state is small: it stays where it is."""


for layer_type in GATES:  # so that transformers' DynamicCache(config=...) and generate() build these layers
    DYNAMIC_LAYER_TYPE_MAPPING[layer_type] = RecurrentCacheLayer


class CarveCache(DynamicCache):
    """The cache of a CARVE model: transformers' own, plus copies and snapshots to come back to.

    `reorder_cache(indices)`, `batch_select_indices(indices)` and `batch_repeat_interleave(n)` choose sequences.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: CarveConfig) -> None:
        super().__init__(config=config)

    def copy(self) -> "CarveCache":
        """A cache of its own with the same content.

        Memories are copied, for decoding writes into them; keys and values are not: attention layers replace theirs.
        """
        other = copy.copy(self)
        other.layers = [copy.copy(layer) for layer in self.layers]
        for layer in other.layers:
            if isinstance(layer, RecurrentCacheLayer) and layer.state is not None:
                layer.state = layer.state.copy()
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> "CarveCache":
        return self.copy()  # tensors that carry gradients would refuse

    def snapshot(self) -> "CarveCache":
        """The cache as it is now, to `restore` later, any number of times."""
        return self.copy()

    def restore(self, snapshot: "CarveCache") -> None:
        """Go back to a snapshot: all tokens since are forgotten."""
        self.layers = snapshot.copy().layers


def check_cache(cache: Cache, config: CarveConfig, B: int) -> None:
    """Raise ValueError unless the cache has this model's kinds of layers, each empty or of B sequences.

    Args:
        cache: any cache of transformers.
        config: the model's configuration.
        B: rows of the batch.
    """
    if not isinstance(cache, Cache):
        raise ValueError(f"past_key_values is {type(cache).__name__}, expected a CarveCache or None")
    assert config.layer_types is not None
    wanted = [DYNAMIC_LAYER_TYPE_MAPPING[layer_type] for layer_type in config.layer_types]
    if [type(layer) for layer in cache.layers] != wanted:
        raise ValueError(
            f"past_key_values has the layers {cache.layers}, expected those of a CarveCache for "
            f"layer_types = {config.layer_types}"
        )
    layers: list[Any] = cache.layers
    for layer in layers:
        if not layer.get_seq_length():
            continue
        recurrent = isinstance(layer, RecurrentCacheLayer)
        held = layer.batch_size if recurrent else len(layer.keys)
        if held != B:
            raise ValueError(f"past_key_values holds {held} sequences, expected {B} as in the batch")
        heads = [config.num_key_value_heads, config.head_dim]
        if not recurrent and [layer.keys.shape[1], layer.keys.shape[3]] != heads:  # CarveMixer checks its own
            raise ValueError(
                f"past_key_values has keys of shape {list(layer.keys.shape)}, expected "
                f"[B, num_key_value_heads, tokens, head_dim] with {heads[0]} heads of {heads[1]}"
            )
