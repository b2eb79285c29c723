"""Perplexity and bits per byte of a causal language model on text of any length, in constant memory."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from carve.models.configuration_carve import longest_context
from carve.text import tokenize_stream


@dataclass(frozen=True)
class Perplexity:
    """What a model makes of a text; results of several texts add up with `+`.

    Attributes:
        nats: the sum over all scored tokens of `-ln p(token | all before it)`.
        tokens: tokens scored.
        text_tokens: tokens of the text, the unscored first one of a document included.
        bytes: UTF-8 bytes of the text.
        documents: documents begun.
    """

    nats: float = 0.0
    tokens: int = 0
    text_tokens: int = 0
    bytes: int = 0
    documents: int = 0

    @property
    def perplexity(self) -> float:
        """`exp` of the mean nats per scored token; infinite beyond what a float holds."""
        mean = self.nats / self.tokens
        return math.exp(mean) if mean < 709 else math.inf if mean == mean else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Mean bits per scored token times tokens per byte of the text: an unscored token counts as an average one."""
        return self.nats / math.log(2) / self.tokens * self.text_tokens / self.bytes

    def __add__(self, other: "Perplexity") -> "Perplexity":
        return Perplexity(
            self.nats + other.nats,
            self.tokens + other.tokens,
            self.text_tokens + other.text_tokens,
            self.bytes + other.bytes,
            self.documents + other.documents,
        )


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[Iterable[str]],
    *,
    piece: int = 2048,
    window: int | None = None,
    stride: int | None = None,
    on_progress: Callable[[Perplexity], None] | None = None,
) -> Perplexity:
    """Score documents one after the other, each with a fresh state.

    Every token is scored once, given all tokens before it in its document. The first one is given the tokenizer's BOS
    token; a tokenizer without one leaves the first token of each document unscored. EOS is not scored:
    it is not text. The model reads `piece` tokens at once and carries its state (`past_key_values`) to the next piece,
    so the memory does not grow with the text (with full attention layers the state itself does). The result
    does not depend on `piece` but for rounding.

    With `window` the state is not carried: a token is scored given the `window - stride + 1` to `window` tokens
    before it (fewer where the document begins), as models of a fixed context are usually measured.

    Args:
        model: any causal language model of transformers; its mode (train or eval) is left as it was.
        documents: each a string, or an iterable over the blocks of a long text, as `read_documents` gives.
        piece: tokens read at once when there is no `window`, >= 1.
        window: tokens of context, >= 1; None for all of them.
        stride: tokens from one window to the next, 1 <= stride <= window; default `window`.
        on_progress: called after every piece with the result so far.

    Raises:
        ValueError: `piece`, `window` or `stride` out of range, no token to score, or more than the
            `max_position_embeddings` that full attention may see at once.
    """
    if piece < 1:
        raise ValueError(f"piece must be at least 1, got {piece}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if stride is not None and window is None:
        raise ValueError("stride needs a window")
    if stride is not None and window is not None and not 1 <= stride <= window:
        raise ValueError(f"stride must be between 1 and the window of {window}, got {stride}")
    longest = longest_context(model.config)
    if window is not None and longest is not None and window > longest:
        raise ValueError(f"window must be at most the model's max_position_embeddings of {longest}, got {window}")

    total = Perplexity()
    was_training = model.training
    model.eval()
    try:
        for number, document in enumerate(documents, start=1):
            parts = _score_document(model, tokenizer, document, number, window or piece, stride, carry=window is None)
            for part in parts:
                total += part
                if on_progress is not None and total.tokens:
                    on_progress(total)
    finally:
        model.train(was_training)
    if not total.tokens:
        raise ValueError("no text to score: every document is empty or has no token after its first")
    return total


def _score_document(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    document: Iterable[str],
    number: int,
    length: int,
    stride: int | None,
    *,
    carry: bool,
) -> Iterator[Perplexity]:
    """The document's parts of the total, one for each piece or window."""
    text_tokens = text_bytes = 0

    def tokens() -> Iterator[int]:
        nonlocal text_tokens, text_bytes
        if tokenizer.bos_token_id is not None:
            yield tokenizer.bos_token_id
        for ids, size in tokenize_stream(tokenizer, [document] if isinstance(document, str) else document):
            text_tokens += len(ids)
            text_bytes += size
            yield from ids

    yield Perplexity(documents=1)
    state, read, longest = None, 0, longest_context(model.config)
    for ids, fresh in _windows(tokens(), length, stride or length):
        read += fresh
        if carry and longest is not None and read > longest:
            raise ValueError(
                f"document {number} is longer than the model's max_position_embeddings of {longest}: give a window"
            )
        row = torch.tensor([ids], device=model.device)  # [1, T + 1]
        with torch.inference_mode():
            output = model(row[:, :-1], past_key_values=state, use_cache=carry, logits_to_keep=fresh)
            state = output.past_key_values if carry else None
            logits = output.logits[0]  # [fresh, vocab]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            nats = F.cross_entropy(logits, row[0, -fresh:], reduction="none").double().sum().item()
        yield Perplexity(nats, fresh, text_tokens, text_bytes)
        text_tokens = text_bytes = 0
    yield Perplexity(text_tokens=text_tokens, bytes=text_bytes)


def _windows(tokens: Iterator[int], length: int, stride: int) -> Iterator[tuple[list[int], int]]:
    """Windows of `length` inputs and one token more, the last target; and how many targets are new at its end."""
    window: list[int] = []
    fresh = -1  # the first token is no target
    for token in tokens:
        window.append(token)
        fresh += 1
        if len(window) == length + 1:
            yield window, fresh
            window, fresh = window[stride:], 0
    if fresh > 0:
        yield window, fresh
