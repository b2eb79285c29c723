import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModel, AutoModelForCausalLM, DataCollatorWithFlattening

from carve import CarveForCausalLM, CarveModel, mixer
from carve.ops import chunk_carve
from tests.models.tiny import (
    ALL_LAYERS,
    KINDS,
    READ,
    VOCAB,
    assert_near,
    error,
    hear_content,
    make_model,
    tiny,
    tiny_config,
    tokens,
)
from tests.tolerances import tolerance

HYBRID = KINDS["hybrid"][0]
LENGTHS = [3, 1, 7, 4, 1]  # of packed documents


@torch.no_grad()
def logits_of(model: CarveForCausalLM, ids: Tensor, **inputs: Any) -> Tensor:
    return model(ids, **inputs).logits


def gradients(model: CarveForCausalLM, ids: Tensor, **inputs: Any) -> list[Tensor]:
    model.zero_grad()
    model(ids, labels=ids, **inputs).loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


# -- saving --


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_comes_back_with_its_bits(tmp_path: Path, dtype: torch.dtype, tie: bool) -> None:
    config = tiny_config(ALL_LAYERS, **READ, tie_word_embeddings=tie)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    hear_content(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, CarveForCausalLM)
    assert again.dtype == dtype
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tie
    found, expected = again.state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    ids = tokens(2, 9)
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))
    marked = {name.rsplit(".", 1)[1] for name, p in again.named_parameters() if hasattr(p, "_no_weight_decay")}
    assert marked == {"A_log", "dt_bias"}

    body = AutoModel.from_pretrained(tmp_path)
    assert isinstance(body, CarveModel)
    with torch.no_grad():
        assert torch.equal(body(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_weights_that_a_checkpoint_lacks_get_their_initial_values(tmp_path: Path) -> None:
    make_model(["carve"], torch.float32, content=None).save_pretrained(tmp_path)
    model = CarveForCausalLM.from_pretrained(tmp_path, content="read", content_write=True)
    mixer = model.model.layers[0].mixer
    assert not mixer.p_up.any()
    assert not mixer.p_write.any()
    assert 0.5 < mixer.p_down.std() * mixer.V**0.5 < 2


def test_tied_embeddings_stay_tied_when_resized() -> None:
    model = make_model(["carve"], torch.float32)
    model.resize_token_embeddings(VOCAB + 3)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert logits_of(model, tokens(1, 3)).shape == (1, 3, VOCAB + 3)


# -- what the layers compute --


@pytest.mark.parametrize("kind", ["mean", "read", "grouped", "hybrid"])
def test_the_content_term_moves_the_logits(kind: str) -> None:
    layer_types, fields = KINDS[kind]
    model, ids = make_model(layer_types, **fields), tokens(2, 16)
    before = logits_of(model, ids)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("p_up", "p_write")):
                parameter.zero_()
    assert error(logits_of(model, ids), before) > tolerance("op_content_effect")


@pytest.mark.parametrize("content", ["mean", "read"])
def test_a_new_model_has_the_bits_of_a_memory_blind_one(content: str) -> None:
    model = CarveForCausalLM(tiny_config(HYBRID, content=content, content_write=True)).eval()
    blind = CarveForCausalLM(tiny_config(HYBRID, content=None)).eval()
    blind.load_state_dict(model.state_dict(), strict=False)
    ids = tokens(2, 17)
    assert torch.equal(logits_of(model, ids), logits_of(blind, ids))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_later_tokens_leave_the_bits_of_earlier_ones(kind: str, dtype: torch.dtype) -> None:
    model, ids = tiny(kind, dtype), tokens(2, 14)
    before = logits_of(model, ids)
    for t in (1, 4, 6, 13):
        later = ids.clone()
        later[:, t:] = tokens(2, 14 - t, seed=t + 1)
        after = logits_of(model, later)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t:], before[:, t:])


def test_gradients_reach_every_parameter() -> None:
    for fields in (READ, {"content_write": True, "num_v_heads": 4}):
        model = make_model(ALL_LAYERS, **fields)
        for (name, _), grad in zip(model.named_parameters(), gradients(model, tokens(2, 13)), strict=True):
            assert grad.isfinite().all(), name
            assert grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", KINDS)
def test_the_dtypes_agree(kind: str) -> None:
    ids = tokens(2, 17)
    expected = logits_of(tiny(kind), ids)
    assert expected.dtype == torch.float64
    assert_near(logits_of(tiny(kind, torch.float32), ids), expected, "model_float32")


@pytest.mark.parametrize("kind", ["mean", "read", "rivals", "hybrid"])
def test_bfloat16_and_autocast_are_near_float32(kind: str) -> None:
    layer_types, fields = KINDS[kind]
    fields = fields | {"initializer_range": 0.1}  # of the size that training makes; large ones amplify rounding
    ids = tokens(2, 17)
    exact = make_model(layer_types, torch.float32, **fields)
    expected = logits_of(exact, ids)

    def check(model: CarveForCausalLM) -> None:
        assert_near(logits_of(model, ids), expected, "model_bfloat16")
        with torch.no_grad():
            cache = model(ids[:, :15], use_cache=True).past_key_values
            tail = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in (15, 16)]
        assert error(torch.cat(tail, 1), expected[:, 15:]) < tolerance("model_bfloat16")
        for layer in cache.layers:
            if hasattr(layer, "state"):
                assert layer.state.memory.memory.dtype == torch.float32
        grads = gradients(model, ids)
        assert all(grad.isfinite().all() for grad in grads)

    with torch.autocast("cpu", torch.bfloat16):
        check(exact)
    check(exact.bfloat16())


# -- packed documents --


def packed(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens `[1, T]` of documents of these lengths, their cu_seqlens and position_ids `[1, T]`."""
    position_ids = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    return tokens(1, sum(lengths), seed), torch.tensor([0, *lengths]).cumsum(0), position_ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_documents_are_each_alone(kind: str, dtype: torch.dtype) -> None:
    model = tiny(kind)
    ids, cu_seqlens, position_ids = packed(LENGTHS)
    alone = torch.cat([logits_of(model, document) for document in ids.split(LENGTHS, dim=1)], dim=1)
    assert_near(logits_of(model, ids, cu_seqlens=cu_seqlens.to(dtype)), alone)
    found = logits_of(model, ids, position_ids=position_ids)
    assert_near(found, alone)
    assert torch.equal(logits_of(model, ids, position_ids=position_ids, cu_seqlens=cu_seqlens), found)
    ones = torch.ones_like(ids)
    assert torch.equal(logits_of(model, ids, position_ids=position_ids, attention_mask=ones), found)
    empty = torch.tensor([0, 0, 3, 4, 4, 4, 11, 15, 16, 16])  # documents of no tokens
    assert_near(logits_of(model, ids, cu_seqlens=empty), alone)
    assert error(logits_of(model, ids), alone) > tolerance("op_content_effect")


@pytest.mark.parametrize("kind", ["read", "hybrid"])
@pytest.mark.parametrize("position_ids", [True, False])
@pytest.mark.parametrize(("bounds", "seq_idx"), [(True, True), (True, False), (False, True)])
def test_what_a_flattening_collator_makes_has_the_loss_of_each_alone(
    kind: str, position_ids: bool, bounds: bool, seq_idx: bool
) -> None:
    model, samples = tiny(kind), [{"input_ids": tokens(1, n, seed=n)[0].tolist()} for n in LENGTHS]
    batch = DataCollatorWithFlattening(
        return_position_ids=position_ids, return_flash_attn_kwargs=bounds, return_seq_idx=seq_idx
    )(samples)
    scored = [(n - 1, torch.tensor([sample["input_ids"]])) for n, sample in zip(LENGTHS, samples, strict=True) if n > 1]
    expected = sum(n * model(ids, labels=ids).loss for n, ids in scored) / sum(n for n, _ in scored)
    assert_near(model(**batch).loss, expected, "model_float32")  # as transformers' losses are
    leaky = model(batch["input_ids"], labels=batch["labels"]).loss
    assert error(leaky, expected) > 10 * tolerance("model_float32")


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_packed_documents_are_each_alone(kind: str) -> None:
    model, other = tiny(kind), [9, 1, 6]
    (first, _, places), (second, _, other_places) = packed(LENGTHS), packed(other, seed=1)
    rows = [(first, LENGTHS), (second, other), (first, LENGTHS)]
    alone = [torch.cat([logits_of(model, x) for x in ids.split(lengths, dim=1)], 1) for ids, lengths in rows]
    ids, position_ids = torch.cat([ids for ids, _ in rows]), torch.cat([places, other_places, places])
    assert_near(logits_of(model, ids, position_ids=position_ids), torch.cat(alone))
    seq_idx = (position_ids == 0).cumsum(1)
    assert_near(logits_of(model, ids, seq_idx=seq_idx), torch.cat(alone))
    same = logits_of(model, ids[[0, 2]], position_ids=places)  # one line of positions for all rows
    assert_near(same, torch.cat([alone[0], alone[2]]))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_leaks_between_documents(kind: str) -> None:
    """Other tokens in one document leave the bits of all others, and their gradients, as they were."""
    model = tiny(kind)
    ids, cu_seqlens, position_ids = packed(LENGTHS)
    for n in range(len(LENGTHS)):
        inside = torch.zeros_like(ids, dtype=torch.bool)
        inside[:, cu_seqlens[n] : cu_seqlens[n + 1]] = True
        changed = torch.where(inside, (ids + 7) % VOCAB, ids)
        for how in ({"cu_seqlens": cu_seqlens}, {"position_ids": position_ids}):
            before, after = logits_of(model, ids, **how), logits_of(model, changed, **how)
            assert torch.equal(before[~inside], after[~inside])
            assert not torch.equal(before[inside], after[inside])
    x = model.model.embed_tokens(ids).detach().requires_grad_()
    model(inputs_embeds=x, cu_seqlens=cu_seqlens).logits[:, 4:11].square().sum().backward()
    model.zero_grad()
    assert (x.grad[:, 4:11] != 0).any(-1).all()
    assert not x.grad[:, :4].any()
    assert not x.grad[:, 11:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_of_a_row_do_not_depend_on_its_neighbours(kind: str) -> None:
    model, ids = tiny(kind), tokens(3, 14)
    other = ids.clone()
    other[1:] = tokens(2, 14, seed=1)
    assert torch.equal(logits_of(model, ids)[0], logits_of(model, other)[0])


# -- loss and outputs --


def test_the_loss_is_of_the_next_tokens() -> None:
    model, ids = tiny("hybrid"), tokens(2, 9)
    labels = ids.clone()
    labels[0, :4], labels[1, 6] = -100, -100
    output = model(ids, labels=labels)
    expected = cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    scored = int((labels[:, 1:] != -100).sum())
    for items in (7, torch.tensor(7)):
        assert model(ids, labels=labels, num_items_in_batch=items).loss.item() == pytest.approx(
            expected.item() * scored / 7, rel=1e-6
        )
    alone = model(ids, labels=labels, skip_logits=True)
    assert torch.equal(alone.loss, output.loss)
    assert alone.logits is None
    assert torch.equal(model(ids, labels=labels, skip_logits=True, return_dict=False)[0], output.loss)
    with pytest.raises(ValueError, match=r"labels has shape \[2, 8\], expected \[B, T or logits_to_keep\] = \[2, 9\]"):
        model(ids, labels=labels[:, 1:])
    with pytest.raises(ValueError, match="skip_logits is True, expected labels"):
        model(ids, skip_logits=True)


@pytest.mark.parametrize("kind", ["read", "hybrid"])
def test_the_outputs_that_can_be_asked_for(kind: str) -> None:
    model, ids = tiny(kind), tokens(2, 9)
    output = model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    assert torch.equal(output.hidden_states[0], model.model.embed_tokens(ids))
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)
    first = model.model.layers[0]
    stream = output.hidden_states[0] + first.mixer(first.mixer_norm(output.hidden_states[0]))[0]
    assert_near(output.hidden_states[1], stream + first.mlp(first.mlp_norm(stream)))

    assert torch.equal(model(ids, logits_to_keep=3).logits, model.lm_head(output.hidden_states[-1][:, -3:]))
    some = torch.tensor([1, 5])
    assert torch.equal(model(ids, logits_to_keep=some).logits, model.lm_head(output.hidden_states[-1][:, some]))
    assert torch.equal(model(inputs_embeds=model.model.embed_tokens(ids)).logits, output.logits)
    assert torch.equal(model(ids, return_dict=False)[0], output.logits)

    model = make_model(*KINDS[kind][:1], **KINDS[kind][1], output_hidden_states=True)
    assert len(model(ids).hidden_states) == model.config.num_hidden_layers + 1
    assert model(ids, output_hidden_states=False).hidden_states is None


def test_when_there_is_a_cache() -> None:
    model, ids = make_model(["carve"]), tokens(1, 5)
    assert model(ids).past_key_values.get_seq_length() == 5
    assert model(ids, use_cache=False).past_key_values is None
    assert model(ids, cu_seqlens=torch.tensor([0, 5])).past_key_values is None
    assert model.train()(ids).past_key_values is None


def test_layers_are_asked_for_a_state_only_if_there_is_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def note(*arguments: Any, output_final_state: bool, **options: Any) -> Any:
        asked.append(output_final_state)
        return chunk_carve(*arguments, output_final_state=output_final_state, **options)

    monkeypatch.setattr(mixer, "chunk_carve", note)
    model, ids = make_model(["carve"] * 2), tokens(1, 5)
    model(ids)
    model.train()(ids)
    model(ids, cu_seqlens=torch.tensor([0, 2, 5]))
    assert asked == [True] * 2 + [False] * 4


# -- training --


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("inputs", ["rows", "packed", "padded"])
def test_gradient_checkpointing_gives_the_same_bits(inputs: str) -> None:
    model = make_model(ALL_LAYERS, torch.float32, **READ).train()
    ids, cu_seqlens, _ = packed(LENGTHS)
    mask = torch.ones(1, 16, dtype=torch.int64)
    mask[0, :3] = 0
    extra = {"rows": {}, "packed": {"cu_seqlens": cu_seqlens}, "padded": {"attention_mask": mask}}[inputs]
    expected = gradients(model, ids, **extra)
    runs = 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    model.gradient_checkpointing_enable()
    handle = model.model.layers[0].mixer.register_forward_hook(count)
    found = gradients(model, ids, **extra)
    handle.remove()
    assert runs == 2
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_a_few_steps_learn_a_line_by_heart() -> None:
    model = CarveForCausalLM(tiny_config(HYBRID, **READ, initializer_range=0.1)).train()
    ids = tokens(2, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert all(block.mixer.p_up.abs().sum() > 0 for block in model.model.layers[::2])


def test_the_compiled_model_is_the_model() -> None:
    torch._dynamo.reset()
    model = make_model(["carve", "sliding_attention"], **READ).train()
    ids, _, position_ids = packed(LENGTHS)
    results = []
    for call in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        output = call(ids, position_ids=position_ids, labels=ids)
        output.loss.backward()
        results.append([output.logits, *(parameter.grad.clone() for parameter in model.parameters())])
    for found, expected in zip(*reversed(results), strict=True):
        assert_near(found, expected)


# -- bad input --


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            {"attention_mask": torch.ones(2, 8)},
            r"attention_mask has shape \[2, 8\], expected \[B, past \+ T\] = \[2, 9\]",
        ),
        ({"attention_mask": torch.ones(2, 1, 9, 9)}, r"attention_mask has shape \[2, 1, 9, 9\]"),
        ({"position_ids": torch.arange(8)[None]}, r"position_ids has shape \[1, 8\], expected \[B, T\] = \[2, 9\]"),
        ({"cu_seqlens": torch.tensor([0, 9])}, "cu_seqlens needs B = 1"),
        ({"labels": tokens(2, 9), "logits_to_keep": 4}, r"expected \[B, T or logits_to_keep\] = \[2, 4\]"),
        ({"use_cache": True, "position_ids": torch.arange(9)[None] % 5}, "use_cache was asked for packed documents"),
        ({"seq_idx": torch.zeros(2, 8)}, r"seq_idx has shape \[2, 8\], expected \[B, T\] = \[2, 9\]"),
        ({"output_attentions": True}, "output_attentions is True, expected False"),
        ({"token_type_ids": torch.ones(2, 9)}, "token_type_ids has values other than 0"),
    ],
)
def test_bad_inputs_are_named(inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny("hybrid")(tokens(2, 9), **inputs)


@pytest.mark.parametrize(
    "bounds", [[0, 8], [1, 9], [0, 5, 3, 9], [0, 10], [9]], ids=["short", "late", "falling", "long", "one"]
)
def test_bad_cu_seqlens_are_named(bounds: list[int]) -> None:
    for kind in ("read", "hybrid"):
        with pytest.raises(ValueError, match=r"cu_seqlens .* expected"):
            tiny(kind)(tokens(1, 9), cu_seqlens=torch.tensor(bounds))


def test_a_misspelt_input_is_not_swallowed() -> None:
    with pytest.raises(TypeError, match="seq_id"):
        tiny("hybrid")(tokens(1, 9), seq_id=torch.zeros(1, 9))


def test_what_tokenizers_and_callers_give_by_habit_is_taken() -> None:
    model, ids = tiny("hybrid"), tokens(2, 9)
    habits = {"token_type_ids": torch.zeros_like(ids), "output_attentions": False}
    assert torch.equal(logits_of(model, ids, **habits), logits_of(model, ids))


def test_inputs_that_contradict_each_other_are_named() -> None:
    model, ids = tiny("hybrid"), tokens(1, 9)
    places = torch.arange(9)[None]
    bounds, halves = torch.tensor([0, 4, 9]), torch.tensor([[0] * 4 + [1] * 5])
    for inputs, message in (
        ({"position_ids": places, "cu_seqlens": bounds}, "position_ids or seq_idx and cu_seqlens say different things"),
        ({"seq_idx": 0 * halves, "cu_seq_lens_q": bounds}, "position_ids or seq_idx and cu_seqlens say different"),
        ({"seq_idx": halves, "position_ids": places}, "position_ids and seq_idx say different things"),
        ({"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds[[0, 2]]}, "cu_seq_lens_q and cu_seq_lens_k say different"),
        ({"cu_seqlens": bounds, "max_length_k": 4}, "max_length_k is 4, expected at least 5"),
        ({"max_length_q": 8}, "max_length_q is 8, expected at least 9"),
    ):
        with pytest.raises(ValueError, match=message):
            model(ids, **inputs)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(ids, inputs_embeds=model.model.embed_tokens(ids))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match=r"expected input_ids \[B, T\] or inputs_embeds \[B, T, D\]"):
        model(ids[0])


@pytest.mark.parametrize("kind", ["read", "hybrid"])
def test_new_documents_beside_padding_or_behind_a_cache_are_refused(kind: str) -> None:
    model, ids = tiny(kind), tokens(2, 9)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, :2] = 0
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    assert torch.equal(
        logits_of(model, ids, attention_mask=mask, position_ids=places), logits_of(model, ids, attention_mask=mask)
    )
    restarted = places.clone()
    restarted[1, 5:] = torch.arange(4)
    with pytest.raises(ValueError, match="position_ids restart in a batch with padding"):
        model(ids, attention_mask=mask, position_ids=restarted)

    with torch.no_grad():
        cache = model(ids[:, :5], use_cache=True).past_key_values
    for positions in ([5, 6, 0, 1], [0, 1, 2, 3], [0, 0, 0, 0]):
        with pytest.raises(ValueError, match=r"position_ids restart, .* a cache that already holds 5 tokens"):
            model(ids[:, 5:], past_key_values=cache, position_ids=torch.tensor([positions]))
    with pytest.raises(ValueError, match="cu_seqlens needs B = 1, an empty cache and no padding"):
        model(ids[:, 5:], past_key_values=cache, cu_seqlens=torch.tensor([0, 4]))
    found = logits_of(model, ids[:, 5:], past_key_values=cache, position_ids=torch.arange(5, 9)[None])
    assert_near(found, logits_of(model, ids)[:, 5:])


@pytest.mark.parametrize("kind", ["read", "grouped"])
def test_documents_apart_by_padding_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="position_ids restart in a batch with padding"):
        tiny(kind)(
            tokens(1, 5),
            attention_mask=torch.tensor([[1, 1, 0, 1, 1]]),
            position_ids=torch.tensor([[0, 1, 0, 0, 1]]),
        )


def test_no_two_weights_begin_with_the_same_numbers() -> None:
    torch.manual_seed(0)
    model = CarveForCausalLM(tiny_config(["carve", "carve"], **READ, v_head_dim=24))
    weights = {name: p.detach().flatten()[:96] for name, p in model.named_parameters() if p.numel() >= 96}
    weights = {name: p for name, p in weights.items() if p.std() > 0}
    assert sum(name.endswith("p_down") for name in weights) == 2
    correlation = torch.corrcoef(torch.stack(list(weights.values()))).fill_diagonal_(0)
    assert correlation.abs().max() < 0.6


def test_packing_that_does_not_fit_is_named_whatever_its_form() -> None:
    model, ids = tiny("read"), tokens(1, 7)
    bounds, far = torch.tensor([0, 4, 7]), torch.tensor([[0, 4, 7]])
    for inputs, message in (
        ({"position_ids": torch.arange(5)[None], "seq_idx": torch.zeros(1, 7)}, r"position_ids has shape \[1, 5\]"),
        ({"cu_seq_lens_q": far, "cu_seq_lens_k": far}, r"cu_seqlens has shape \[1, 3\], expected \[N \+ 1\]"),
        ({"cu_seq_lens_q": bounds, "max_length_q": 3}, "max_length_q is 3, expected at least 4"),
    ):
        with pytest.raises(ValueError, match=message):
            model(ids, **inputs)


def test_transformers_sees_what_may_be_passed_on() -> None:
    """It looks at the signature: Trainer for the columns to keep, `generate` for the arguments to accept."""
    inner, outer = (inspect.signature(each.forward).parameters for each in (CarveModel, CarveForCausalLM))
    assert set(inner) <= set(outer)
    model, ids = tiny("read"), tokens(1, 7)
    alone = model.generate(ids, max_new_tokens=2, do_sample=False)
    typed = model.generate(ids, token_type_ids=torch.zeros_like(ids), max_new_tokens=2, do_sample=False)
    assert torch.equal(alone, typed)
