"""What a model reads: how many tokens in a row, and rows of different lengths as a batch, to be continued."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from carve.models.configuration_carve import check_positions


def check_context(config: Any, tokens: int) -> None:
    """Raise ValueError where sequences of so many tokens are longer than what all attention of a model can see."""
    check_positions(config, tokens)
    if set(getattr(config, "layer_types", None) or ()) == {"sliding_attention"} and tokens > config.sliding_window:
        raise ValueError(f"sequences of {tokens} tokens, but all layers see a window of {config.sliding_window} only")


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """The items, so many at once; the last may be fewer."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def pad_rows(rows: Sequence[Sequence[int]], side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of tokens as `[B, T]` int64, and the mask `[B, T]` int64 that is 0 at the padding, `"left"` or `"right"`."""
    tokens = [torch.tensor(row, dtype=torch.int64) for row in rows]
    real = [torch.ones_like(row) for row in tokens]
    padded, mask = (pad_sequence(each, True, padding_side=side).to(device) for each in (tokens, real))
    return padded, mask


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """What `generate` ends a row with and fills it up with: EOS too, where the tokenizer has no padding."""
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    return {"eos_token_id": end, "pad_token_id": end if pad is None else pad}
