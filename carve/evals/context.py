"""How many tokens a model can read in a row."""

from typing import Any


def longest_context(config: Any) -> int | None:
    """Tokens that full attention may see, in the model of a configuration; None for any number."""
    full = "full_attention" in (getattr(config, "layer_types", None) or ["full_attention"])
    return getattr(config, "max_position_embeddings", None) if full else None


def check_context(config: Any, tokens: int) -> None:
    """Raise ValueError where sequences of so many tokens are longer than what all attention of a model can see."""
    longest = longest_context(config)
    if longest is not None and tokens > longest:
        raise ValueError(f"sequences of {tokens} tokens, but the model has max_position_embeddings = {longest}")
    if set(getattr(config, "layer_types", None) or ()) == {"sliding_attention"} and tokens > config.sliding_window:
        raise ValueError(f"sequences of {tokens} tokens, but all layers see a window of {config.sliding_window} only")
