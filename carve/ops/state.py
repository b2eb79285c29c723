"""What a sequence carries from one call to the next."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor


def each(function: Callable[[Any], Any], tensors: Iterable[Any]) -> list[Any]:
    """`function` of every tensor, None where there is none."""
    return [None if x is None else function(x) for x in tensors]


class CarveState(NamedTuple):
    """The state of N sequences after any number of tokens; its size does not depend on that number.

    Attributes:
        memory: `[N, HV, K, V]`, float32 (float64 when the op ran in float64).
        content: what the gates of the current chunk see, same dtype: `[N, HV, R]` for
            `content="mean"`, `[N, HV, K, R]` for `content="read"`, None when memory-blind.
        content_sum: `[N, HV, V]`, same dtype: the running sum of the outputs of the current chunk
            (`content="mean"` only, else None).
        position: `[N]`, int64: tokens already seen in the current chunk, `0 <= position < chunk_size`.
    """

    memory: Tensor
    content: Tensor | None
    content_sum: Tensor | None
    position: Tensor

    def select(self, indices: Tensor) -> "CarveState":
        """The sequences at `indices` (`[M]` int64), as a state of M sequences: to reorder, repeat or drop."""
        return CarveState(*each(lambda x: x.index_select(0, indices.to(x.device)), self))
