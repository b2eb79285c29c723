"""What a sequence carries from one call to the next."""

from typing import NamedTuple

import torch


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

    memory: torch.Tensor
    content: torch.Tensor | None
    content_sum: torch.Tensor | None
    position: torch.Tensor

    def select(self, indices: torch.Tensor) -> "CarveState":
        """The sequences at `indices` (`[M]` int64), as a state of M sequences: to reorder, repeat or drop."""
        return CarveState(*(None if x is None else x.index_select(0, indices.to(x.device)) for x in self))
