"""Writing text with a model, as a stream."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from carve.evals.context import end_tokens
from carve.models.configuration_carve import check_positions


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 400,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int | None = None,
    write: Callable[[str], None] | None = None,
) -> str:
    """Continue a prompt, with `model.generate`.

    The prompt follows the tokenizer's BOS token, where it has one, as documents do in training; the text ends
    at EOS or after `max_new_tokens`.

    Args:
        model: any causal language model of transformers.
        prompt: not empty; taken as it is, a newline at its end included.
        temperature: >= 0; 0 takes the likeliest token each time.
        top_p: in (0, 1]: sample among the likeliest tokens that together have this probability.
        seed: of the sampling; the same seed gives the same text. None draws another each time. PyTorch's own
            random state is left as it was.
        write: called with each piece of text as soon as it is final: at the end of words, so never in the
            middle of a character. On an interrupt it gets what was held back before the exception goes on.

    Returns:
        the continuation, without the prompt.

    Raises:
        ValueError: an argument out of range, an empty prompt, or more tokens than full attention has positions for.
    """
    if not prompt:
        raise ValueError("the prompt is empty: give at least one character")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not temperature >= 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    if seed is not None and not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be from 0 to below 2**64, got {seed}")

    ids = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    if tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    if not ids:
        raise ValueError(f"the prompt {prompt!r} has no tokens")
    check_positions(model.config, len(ids) + max_new_tokens)
    row = torch.tensor([ids], device=model.device)  # [1, T]
    # top_k=0: transformers would otherwise sample among the 50 likeliest only.
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    streamer = _Writer(tokenizer, write)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        if seed is None:
            torch.seed()
        else:
            torch.manual_seed(seed)
        try:
            model.generate(  # type: ignore[operator]  # every causal language model of transformers has it
                row,
                attention_mask=torch.ones_like(row),
                streamer=streamer,
                max_new_tokens=max_new_tokens,
                **end_tokens(tokenizer),
                **(sampling if temperature > 0 else {"do_sample": False}),
            )
        except KeyboardInterrupt:
            streamer.end()
            raise
    return "".join(streamer.parts)


class _Writer(TextStreamer):
    """Hands the text on instead of printing it, and keeps it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None] | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write
        self.parts: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.parts.append(text)
            if self.write is not None:
                self.write(text)
