from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from carve import CarveForCausalLM, mixer
from carve.models import CarveCache
from tests.models.tiny import KINDS, READ, RECURRENT, assert_near, make_model, tiny, tokens


def feed(model: CarveForCausalLM, ids: Tensor, cache: CarveCache | None = None) -> tuple[Tensor, CarveCache]:
    with torch.no_grad():
        output = model(ids, past_key_values=cache, use_cache=True)
    return output.logits, output.past_key_values


def nbytes(cache: CarveCache) -> int:
    """All memory that the cache keeps alive."""
    total = 0
    for layer in cache.layers:
        held = [layer.keys, layer.values]
        if getattr(layer, "state", None) is not None:
            held += [layer.state.conv, *layer.state.memory]
        total += sum(x.untyped_storage().nbytes() for x in held if x is not None)
    return total


@pytest.fixture(params=[False, True], ids=["as on a CPU", "as on a GPU"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, the next tokens are written into the state."""
    if request.param:
        monkeypatch.setattr(mixer, "decodes", lambda x, cu_seqlens: cu_seqlens is None and not torch.is_grad_enabled())


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("kind", KINDS)
def test_a_snapshot_at_every_offset_can_be_restored_again_and_again(kind: str) -> None:
    model, ids = tiny(kind), tokens(2, 20)
    other = tokens(2, 6, seed=1)
    chunk_size = model.config.chunk_size
    for offset in range(chunk_size, 2 * chunk_size + 1):
        _, cache = feed(model, ids[:, :offset])
        snapshot = cache.snapshot()
        expected, _ = feed(model, ids[:, offset:], cache)
        for length in (1, 6):
            feed(model, other[:, :length], cache)
            cache.restore(snapshot)
            assert cache.get_seq_length() == offset
            again, _ = feed(model, ids[:, offset:], cache)
            assert torch.equal(again, expected)
        assert snapshot.get_seq_length() == offset


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_goes_its_own_way(kind: str) -> None:
    model, ids, other = tiny(kind), tokens(2, 13), tokens(2, 5, seed=1)
    _, cache = feed(model, ids[:, :7])
    copy = cache.copy()
    feed(model, other, copy)
    logits, _ = feed(model, ids[:, 7:], cache)
    assert_near(logits, feed(model, ids)[0][:, 7:])
    logits, _ = feed(model, ids[:, 7:8], copy)
    assert_near(logits, feed(model, torch.cat([ids[:, :7], other, ids[:, 7:8]], 1))[0][:, 12:])
    cache.reset()
    assert (cache.get_seq_length(), copy.get_seq_length()) == (0, 13)
    assert_near(feed(model, ids, cache)[0], feed(model, ids)[0])


def test_on_a_gpu_the_memory_of_a_cache_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixer, "decodes", lambda x, cu_seqlens: cu_seqlens is None)
    model, ids = tiny("read"), tokens(2, 12)
    _, cache = feed(model, ids[:, :7])
    memories = [layer.state.memory.memory for layer in cache.layers]
    logits = [feed(model, ids[:, t : t + 1], cache)[0] for t in range(7, 12)]
    assert all(layer.state.memory.memory is y for layer, y in zip(cache.layers, memories, strict=True))
    assert_near(torch.cat(logits, 1), feed(model, ids)[0][:, 7:])


@pytest.mark.gpu
@pytest.mark.parametrize("content", ["mean", "read", None])
def test_decoding_in_place_has_the_bits_of_decoding_copies(
    content: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(["carve"] * 2, torch.bfloat16, head_dim=64, content=content).cuda()
    ids = tokens(2, 20).cuda()

    def decode() -> list[Tensor]:
        logits, cache = feed(model, ids[:, :9])
        snapshot, found = cache.snapshot(), [logits]
        for _ in range(2):
            found += [feed(model, ids[:, t : t + 1], cache)[0] for t in range(9, 15)]
            found.append(feed(model, ids[:, 15:], cache)[0])
            cache.restore(snapshot)
        return found

    in_place = decode()
    monkeypatch.setattr(mixer, "writable", lambda y: False)
    for y, expected in zip(in_place, decode(), strict=True):
        assert torch.equal(y, expected)
    for y, again in zip(in_place[1:8], in_place[8:], strict=True):
        assert torch.equal(y, again)


def test_a_cache_that_carries_gradients_can_be_copied() -> None:
    model, ids = make_model(*KINDS["hybrid"][:1], **READ), tokens(1, 9)
    cache = deepcopy(model(ids[:, :5], use_cache=True).past_key_values)  # is the same as its own copy()
    model(ids[:, 5:], past_key_values=cache).logits.square().sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(ids).logits[:, 5:].square().sum().backward()
    for grad, p in zip(found, model.parameters(), strict=True):
        assert_near(grad, p.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_can_be_chosen(kind: str) -> None:
    model, ids = tiny(kind), tokens(3, 12)
    logits, _ = feed(model, ids)
    rest = ids[:, 7:]

    def after(rows: list[int], choose: str, argument: Any) -> None:
        _, cache = feed(model, ids[:, :7])
        getattr(cache, choose)(argument)
        assert_near(feed(model, rest[rows], cache)[0], logits[rows, 7:])

    after([2, 0, 0], "reorder_cache", torch.tensor([2, 0, 0]))
    after([2, 1], "batch_select_indices", torch.tensor([2, 1]))
    after([0, 2], "batch_select_indices", torch.tensor([True, False, True]))
    after([0, 0, 1, 1, 2, 2], "batch_repeat_interleave", 2)
    for choose, argument in (
        ("reorder_cache", torch.tensor([0])),
        ("batch_select_indices", torch.tensor([0])),
        ("batch_repeat_interleave", 2),
    ):  # an empty cache has nothing to choose from
        cache = CarveCache(model.config)
        getattr(cache, choose)(argument)
        assert_near(feed(model, ids, cache)[0], logits)


@pytest.mark.parametrize("kind", RECURRENT)
def test_tokens_cannot_be_cropped(kind: str) -> None:
    _, cache = feed(tiny(kind), tokens(2, 3))
    with pytest.raises(ValueError, match=r"crop: .* take a cache.snapshot\(\)"):
        cache.crop(-1)
    assert not cache.is_croppable
    cache.crop(0)
    assert cache.get_seq_length() == 3


@pytest.mark.parametrize("kind", RECURRENT)
def test_the_cache_of_a_recurrent_model_is_of_constant_size(kind: str) -> None:
    sizes = set()
    for T in (1, 3, 40, 200):
        _, cache = feed(tiny(kind), tokens(1, T))
        sizes.add(nbytes(cache))
        assert cache.get_seq_length() == T
    assert len(sizes) == 1


@pytest.mark.parametrize("kind", ["hybrid", "attention_first"])
def test_the_cache_of_a_hybrid_is_bounded_by_its_window(kind: str) -> None:
    layer_types = [x for x in KINDS[kind][0] if x != "full_attention"]
    model = make_model(layer_types, **KINDS[kind][1])
    cache, sizes = None, []
    for piece in tokens(1, 60).split(3, dim=1):
        _, cache = feed(model, piece, cache)
        sizes.append(nbytes(cache))
    assert sizes[0] < sizes[2]  # the window, of 5 tokens, was not full at first
    assert len(set(sizes[2:])) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chunk_size": 8}, "chunk_size 8, expected 4"),
        ({"num_heads": 4, "num_attention_heads": 2}, "state.conv has shape"),
        ({"content_rank": 3}, "initial_state.content has shape"),
        ({"content": None}, "initial_state.content is None"),
        ({"num_key_value_heads": 1}, "past_key_values has keys of shape"),
        ({"layer_types": ["carve"]}, "past_key_values has the layers .*, expected those of a CarveCache"),
        ({"layer_types": ["full_attention", "carve"]}, "past_key_values has the layers"),
        ({"layer_types": ["carve", "sliding_attention"]}, "past_key_values has the layers"),
    ],
)
def test_the_cache_of_another_model_is_refused(fields: dict[str, Any], message: str) -> None:
    layer_types = fields.pop("layer_types", ["sliding_attention", "carve"])
    _, cache = feed(make_model(layer_types, **(READ | fields)), tokens(2, 5))
    with pytest.raises(ValueError, match=message):
        feed(make_model(["sliding_attention", "carve"], **READ), tokens(2, 1), cache)


@pytest.mark.parametrize("kind", ["read", "attention_first"])
def test_a_cache_that_does_not_fit_the_batch_is_refused_and_kept(kind: str) -> None:
    model, ids = tiny(kind), tokens(2, 9)
    _, cache = feed(model, ids[:, :5])
    with pytest.raises(ValueError, match="past_key_values holds 2 sequences, expected 3"):
        feed(model, tokens(3, 1), cache)
    assert_near(feed(model, ids[:, 5:], cache)[0], feed(model, ids)[0][:, 5:])
    with pytest.raises(ValueError, match="past_key_values is tuple, expected a CarveCache or None"):
        feed(model, ids, ())
    with pytest.raises(ValueError, match="past_key_values has the layers"):
        feed(model, ids, DynamicCache())


def test_the_cache_that_generate_makes_can_be_used() -> None:
    model, ids = tiny("hybrid"), tokens(2, 6)
    out = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
    logits, _ = feed(model, out.sequences[:, -1:], out.past_key_values)
    assert_near(logits, feed(model, out.sequences)[0][:, -1:])
