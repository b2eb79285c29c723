import math
from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from carve import CarveConfig, CarveForCausalLM
from carve.evals import Perplexity, perplexity


def nats_in_one_forward(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, text: str
) -> tuple[torch.Tensor, int]:
    """Nats of every token that has one before it (float64), and the tokens of the text."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    row = torch.tensor([[tokenizer.bos_token_id, *ids] if tokenizer.bos_token else ids])
    with torch.no_grad():
        logits = model(row).logits.double()
    return F.cross_entropy(logits[0, :-1], row[0, 1:], reduction="none"), len(ids)


@pytest.mark.parametrize("piece", [1, 7, 64, 10_000])
def test_pieces_of_any_size_give_what_one_forward_gives(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, corpus: str, piece: int
) -> None:
    text = corpus[:500]
    nats, tokens = nats_in_one_forward(model, tokenizer, text)
    result = perplexity(model, tokenizer, [text], piece=piece)
    assert result.nats == pytest.approx(nats.sum().item(), rel=1e-12)
    assert (result.tokens, result.text_tokens, result.bytes) == (tokens - 1, tokens, len(text.encode()))
    assert result.perplexity == pytest.approx(math.exp(nats.mean()), rel=1e-12)
    bits = nats.mean().item() / math.log(2) * tokens / len(text.encode())
    assert result.bits_per_byte == pytest.approx(bits, rel=1e-12)


def test_bos_makes_the_first_token_count(
    model: PreTrainedModel, tokenizer_with_bos: PreTrainedTokenizerFast, corpus: str
) -> None:
    text = corpus[:300]
    nats, tokens = nats_in_one_forward(model, tokenizer_with_bos, text)
    result = perplexity(model, tokenizer_with_bos, [text], piece=50)
    assert result.nats == pytest.approx(nats.sum().item(), rel=1e-12)
    assert result.tokens == result.text_tokens == tokens == len(text.encode())
    assert result.bits_per_byte == pytest.approx(nats.sum().item() / math.log(2) / len(text.encode()), rel=1e-12)


def test_documents_are_kept_apart(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, corpus: str) -> None:
    texts = [corpus[:200], "", corpus[150:400]]
    alone = sum((perplexity(model, tokenizer, [text]) for text in (texts[0], texts[2])), Perplexity())
    together = perplexity(model, tokenizer, iter(texts), piece=32)
    assert together.nats == pytest.approx(alone.nats, rel=1e-12)
    assert together.tokens == alone.tokens
    assert together.documents == 3
    assert together.bytes == alone.bytes
    assert together.nats != pytest.approx(perplexity(model, tokenizer, ["".join(texts)]).nats, rel=1e-6)


@pytest.mark.parametrize(("window", "stride"), [(16, None), (16, 16), (16, 5), (16, 1), (1, 1), (8_000, 100)])
def test_windows_score_every_token_once_given_what_the_window_holds(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, corpus: str, window: int, stride: int | None
) -> None:
    text = corpus[:120]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    step = stride or window
    expected = 0.0
    with torch.no_grad():
        for target in range(1, len(ids)):
            # The window that scores this token: the first one whose end reaches it.
            start = 0 if target <= window else math.ceil((target - window) / step) * step
            logits = model(torch.tensor([ids[start:target]])).logits[0, -1]
            expected -= logits.log_softmax(0)[ids[target]].item()
            assert start == 0 or window - step < target - start <= window
    result = perplexity(model, tokenizer, [text], window=window, stride=stride)
    assert result.nats == pytest.approx(expected, rel=1e-12)
    assert result.tokens == len(ids) - 1


def test_progress_reports_what_is_known_so_far(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, corpus: str
) -> None:
    seen: list[Perplexity] = []
    model.train()
    result = perplexity(model, tokenizer, [corpus[:200], corpus[200:500]], piece=9, on_progress=seen.append)
    assert model.training
    model.eval()
    assert [p.tokens for p in seen] == sorted(p.tokens for p in seen)
    assert len({p.tokens for p in seen}) > 5
    assert seen[-1] == result
    first = nats_in_one_forward(model, tokenizer, corpus[:200])[0]
    assert seen[0].nats == pytest.approx(first[: seen[0].tokens].sum().item(), rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"piece": 0}, "piece must be at least 1, got 0"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"stride": 2}, "stride needs a window"),
        ({"window": 4, "stride": 5}, "stride must be between 1 and the window of 4, got 5"),
        ({"window": 4, "stride": 0}, "stride must be between 1 and the window of 4, got 0"),
        ({"window": 8193}, "window must be at most the model's max_position_embeddings of 8192, got 8193"),
    ],
)
def test_bad_arguments_are_named(
    model: PreTrainedModel, tokenizer_with_bos: PreTrainedTokenizerFast, arguments: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        perplexity(model, tokenizer_with_bos, ["text"], **arguments)


@pytest.mark.parametrize("attention", ["full_attention", "sliding_attention"])
def test_full_attention_reads_no_more_than_its_positions(
    attention: str, tokenizer_with_bos: PreTrainedTokenizerFast, corpus: str
) -> None:
    sizes = {"hidden_size": 16, "num_heads": 1, "head_dim": 8, "intermediate_size": 16, "max_position_embeddings": 64}
    config = CarveConfig(
        vocab_size=257, num_hidden_layers=2, layer_types=["carve", attention], sliding_window=8, **sizes
    )
    model = CarveForCausalLM(config)
    assert perplexity(model, tokenizer_with_bos, ["x" * 64, "y"], piece=10).tokens == 65
    assert perplexity(model, tokenizer_with_bos, [corpus[:200]], window=64).tokens > 100
    if attention == "full_attention":
        with pytest.raises(ValueError, match=r"document 2 is longer than .* of 64: give a window"):
            perplexity(model, tokenizer_with_bos, ["y", "x" * 65], piece=10)
    else:  # which sees its window, wherever that lies
        assert perplexity(model, tokenizer_with_bos, ["x" * 65], piece=10).tokens == 65


def test_no_text_is_an_error_not_a_number(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    for documents in ([], [""], [iter(())]):
        with pytest.raises(ValueError, match="no text to score"):
            perplexity(model, tokenizer, documents)


def test_a_hopeless_model_has_infinite_perplexity() -> None:
    assert Perplexity(nats=1e6, tokens=10, text_tokens=10, bytes=10).perplexity == math.inf
    assert math.isnan(Perplexity(nats=math.nan, tokens=10, text_tokens=10, bytes=10).perplexity)


def test_a_text_is_read_no_further_than_it_is_scored(
    model: PreTrainedModel, tokenizer_with_bos: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("carve.text.tokenize_stream.__kwdefaults__", {"piece": 100})
    read = 0

    def blocks() -> Iterator[str]:
        nonlocal read
        for _ in range(60):
            read += 50
            yield "fifty characters to a block, line after the other\n"

    def check(so_far: Perplexity) -> None:
        assert so_far.bytes <= read
        assert read - so_far.tokens < 1000  # a piece of text, its context and a piece of tokens

    assert perplexity(model, tokenizer_with_bos, [blocks()], piece=64, on_progress=check).tokens == 3000
