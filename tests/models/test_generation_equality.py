"""However a text is given to the model, in pieces, padded, beside others, by `generate`: the same numbers come out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from carve import CarveForCausalLM
from carve.models import CarveCache
from tests.models.tiny import KINDS, RECURRENT, VOCAB, assert_near, make_model, tiny, tokens

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module")
def no_grad():
    with torch.no_grad():
        yield


def in_pieces(model: CarveForCausalLM, ids: Tensor, pieces: list[int], mask: Tensor | None = None) -> Tensor:
    """Logits of all tokens, the first `sum(pieces)` in pieces and the rest in one."""
    outputs, cache, seen = [], None, 0
    for piece in ids.split([*pieces, ids.shape[1] - sum(pieces)], dim=1):
        seen += piece.shape[1]
        so_far = None if mask is None else mask[:, :seen]
        output = model(piece, attention_mask=so_far, past_key_values=cache, use_cache=True)
        outputs.append(output.logits)
        cache = output.past_key_values
    assert cache.get_seq_length() == ids.shape[1]
    return torch.cat(outputs, 1)


def pad(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Rows of unequal lengths as a batch `[B, T]`, and its attention mask."""
    T = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), T, dtype=torch.int64), torch.zeros(len(rows), T, dtype=torch.int64)
    for n, row in enumerate(rows):
        at = slice(T - len(row), T) if side == "left" else slice(0, len(row))
        ids[n, at], mask[n, at] = row, 1
    return ids, mask


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6, deadline=None)
@given(pieces=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_a_prompt_in_pieces_is_the_whole_prompt(kind: str, pieces: list[int]) -> None:
    ids = tokens(2, sum(pieces) + 1)
    assert_near(in_pieces(tiny(kind), ids, pieces), tiny(kind)(ids).logits)


@pytest.mark.parametrize("kind", ["mean", "read", "hybrid"])
def test_token_by_token_in_float32(kind: str) -> None:
    model, ids = tiny(kind, torch.float32), tokens(2, 19)
    assert_near(in_pieces(model, ids, [1] * 18), model(ids).logits, "model_float32")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=4, deadline=None)
@given(lengths=st.lists(st.integers(1, 13), min_size=2, max_size=4), side=st.sampled_from(["left", "right"]))
def test_padded_rows_are_each_alone(kind: str, lengths: list[int], side: str) -> None:
    rows = [tokens(1, T, seed=n)[0] for n, T in enumerate(lengths)]
    ids, mask = pad(rows, side)
    logits = tiny(kind)(ids, attention_mask=mask).logits
    for n, row in enumerate(rows):
        assert_near(logits[n, mask[n] == 1], tiny(kind)(row[None]).logits[0])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=4, deadline=None)
@given(pieces=st.lists(st.integers(1, 6), min_size=1, max_size=4), short=st.integers(1, 9))
def test_left_padded_rows_in_pieces_are_each_alone(kind: str, pieces: list[int], short: int) -> None:
    """The short row has no real token in the first pieces."""
    T = max(sum(pieces), short) + 1
    rows = [tokens(1, T, seed=0)[0], tokens(1, short, seed=1)[0]]
    ids, mask = pad(rows, "left")
    logits = in_pieces(tiny(kind), ids, pieces, mask)
    for n, row in enumerate(rows):
        assert_near(logits[n, mask[n] == 1], tiny(kind)(row[None]).logits[0])


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_padding_alone_leave_a_row_untouched(kind: str) -> None:
    rows = [tokens(1, 9, seed=0)[0], tokens(1, 2, seed=1)[0], tokens(1, 1, seed=2)[0]]
    ids, mask = pad(rows, "left")
    for pieces in ([1] * 8, [4, 4], [3, 4], [8]):
        logits = in_pieces(tiny(kind), ids, pieces, mask)
        for n, row in enumerate(rows):
            assert_near(logits[n, mask[n] == 1], tiny(kind)(row[None]).logits[0])
    everything_padded = torch.tensor([[0, 0], [0, 0]])
    ids, mask = tokens(2, 5), torch.ones(2, 5, dtype=torch.int64)
    ids, mask = torch.cat([everything_padded, ids], 1), torch.cat([everything_padded, mask], 1)
    assert_near(in_pieces(tiny(kind), ids, [2], mask)[:, 2:], tiny(kind)(ids[:, 2:]).logits)


@pytest.mark.parametrize("kind", [*RECURRENT, "full_attention"])
def test_padding_between_tokens_is_left_out(kind: str) -> None:
    """As when a right-padded batch is continued; a window would count such padding, and says so."""
    model = tiny(kind)
    ids = tokens(2, 14)
    mask = torch.ones_like(ids)
    mask[0, 3:8] = 0
    logits = in_pieces(model, ids, [8], mask)
    assert_near(logits[0, mask[0] == 1], model(ids[:1, mask[0] == 1]).logits[0])
    assert_near(logits[1], model(ids[1:]).logits[0])
    for call in (lambda: tiny("hybrid")(ids, attention_mask=mask), lambda: in_pieces(tiny("hybrid"), ids, [8], mask)):
        with pytest.raises(ValueError, match="attention_mask has padding between tokens"):
            call()


def greedy(model: CarveForCausalLM, row: Tensor, steps: int) -> Tensor:
    """`[steps]` tokens, each from a full forward without a cache."""
    T = len(row)
    for _ in range(steps):
        row = torch.cat([row, model(row[None], use_cache=False).logits[0, -1:].argmax(-1)])
    return row[T:]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_generation_is_the_full_forward(kind: str) -> None:
    model, rows = tiny(kind), [tokens(1, T, seed=T)[0] for T in (1, 6, 11)]
    expected = torch.stack([greedy(model, row, 9) for row in rows])
    ids, mask = pad(rows, "left")
    settings = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    found = model.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(found[:, ids.shape[1] :], expected)
    for row, tail in zip(rows, expected, strict=True):
        assert torch.equal(model.generate(row[None], **settings)[0, len(row) :], tail)
    assert len(expected.unique()) > 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{"do_sample": True}, {"num_beams": 3, "num_return_sequences": 2}])
def test_sampling_and_beams_do_not_depend_on_the_cache(kind: str, options: dict) -> None:
    ids, mask = pad([tokens(1, T, seed=T)[0] for T in (5, 9)], "left")
    found = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        output = tiny(kind).generate(
            ids,
            attention_mask=mask,
            max_new_tokens=8,
            use_cache=use_cache,
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
            **options,
        )
        found.append((output.sequences, torch.stack(output.scores)))
    assert torch.equal(found[0][0], found[1][0])
    finite = found[1][1].isfinite()
    assert_near(found[0][1][finite], found[1][1][finite])


@pytest.mark.parametrize("kind", ["mean", "hybrid"])
def test_generation_goes_on_from_a_cache(kind: str) -> None:
    model, ids = tiny(kind), tokens(2, 7)
    settings = {"do_sample": False, "pad_token_id": 0}
    cache = CarveCache(model.config)
    first = model.generate(ids, past_key_values=cache, max_new_tokens=3, **settings)
    assert cache.get_seq_length() == 9  # the last token was not read yet
    prompt = torch.cat([first, tokens(2, 4, seed=5)], 1)  # a second turn
    settings["attention_mask"] = torch.ones_like(prompt)  # generate would take a token 0 that was said for padding
    expected = model.generate(prompt, max_new_tokens=5, **settings)
    assert torch.equal(model.generate(prompt, past_key_values=cache, max_new_tokens=5, **settings), expected)


def test_generation_with_embeddings_a_prefill_in_pieces_and_several_samples() -> None:
    model, ids = tiny("hybrid"), tokens(1, 11)
    settings = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 6}
    expected = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, prefill_chunk_size=3, **settings), expected)
    assert torch.equal(model.generate(inputs_embeds=model.model.embed_tokens(ids), **settings), expected[:, 11:])
    torch.manual_seed(0)
    samples = model.generate(ids, num_return_sequences=4, **(settings | {"do_sample": True}))
    assert samples.shape == (4, 17)
    assert (samples < VOCAB).all()
    assert len(samples.unique(dim=0)) == 4


def test_generation_ends_at_a_stop_string(tokenizer_with_bos: PreTrainedTokenizerBase) -> None:
    model, ids = tiny("hybrid"), tokens(1, 6)
    whole = model.generate(ids, max_new_tokens=12, do_sample=False)
    stop = str(tokenizer_with_bos.decode(whole[0, 8:10]))
    ended = model.generate(ids, max_new_tokens=12, do_sample=False, stop_strings=[stop], tokenizer=tokenizer_with_bos)
    assert torch.equal(ended, whole[:, :10])


def test_generation_behind_padding_is_refused() -> None:
    ids, mask = pad([tokens(1, 9)[0], tokens(1, 4, seed=1)[0]], "right")
    for padded in ({"attention_mask": mask}, {"pad_token_id": 0}):  # generate makes a mask of the latter
        with pytest.raises(ValueError, match="attention_mask has padding behind a prompt, expected it before"):
            tiny("read").generate(ids, max_new_tokens=1, **padded)
    behind = {"attention_mask": mask, "past_key_values": tiny("read")(ids, attention_mask=mask).past_key_values}
    longer = torch.cat([ids, tokens(2, 3, seed=2)], 1)
    behind["attention_mask"] = torch.cat([mask, torch.ones(2, 3, dtype=torch.int64)], 1)
    assert tiny("read").generate(longer, max_new_tokens=2, pad_token_id=0, **behind).shape == (2, 14)


@pytest.mark.parametrize("kind", ["attention_first", "hybrid"])
def test_only_full_attention_has_a_limit(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model, ids = make_model(KINDS[kind][0], max_position_embeddings=16), tokens(1, 14)
    caplog.set_level("WARNING")
    model.generate(ids, max_new_tokens=4)
    assert ("predefined maximum length (16)" in caplog.text) == (kind == "hybrid")
    assert model.generate(ids).shape[1] == (16 if kind == "hybrid" else 34)  # 20 new tokens if nothing else is said
    if kind != "hybrid":
        assert model.generate(tokens(1, 30), max_length=35).shape[1] == 35
        assert model.generate(tokens(1, 30)).shape[1] == 50


@pytest.mark.parametrize("kind", ["mean", "hybrid"])
def test_static_caches_are_refused(kind: str) -> None:
    for name in ("static", "offloaded_static"):
        with pytest.raises(ValueError, match=f"cache_implementation is '{name}', expected None: recurrent layers"):
            tiny(kind).generate(tokens(1, 5), max_new_tokens=2, cache_implementation=name)
    ids = tiny(kind).generate(tokens(1, 5), max_new_tokens=2, cache_implementation="dynamic", do_sample=False)
    assert torch.equal(ids, tiny(kind).generate(tokens(1, 5), max_new_tokens=2, do_sample=False))
