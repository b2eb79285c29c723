from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from carve import CarveConfig, CarveForCausalLM
from carve.inspection import draw_gates, trace_gates

ROUNDING = 1e-6  # of a sigmoid in float32, and of the mean over channels
TEXT = "def f(x):\n    return x + 1  # $\n"


def make_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_model(layer_types: list[str], **config: object) -> CarveForCausalLM:
    """With content projections that are heard."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_heads": 2, "head_dim": 8, "intermediate_size": 16, "chunk_size": 8}
    model = CarveForCausalLM(
        CarveConfig(vocab_size=257, num_hidden_layers=len(layer_types), layer_types=layer_types, **(sizes | config))
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("p_up", "p_write")):
                parameter.normal_()
    return model


@pytest.mark.parametrize("special", [{}, {"bos_token": "<s>"}])
def test_the_trace_is_of_the_gates_that_the_model_applies(special: dict[str, str]) -> None:
    """Without its content projections a model has the blind gates; with them, those plus the recorded shift."""
    tokenizer = make_tokenizer(**special)
    model = make_model(["carve", "full_attention", "carve"], content="read", content_write=True, num_v_heads=4)
    trace = trace_gates(model, tokenizer, TEXT)
    T = len(TEXT)
    assert [layer.index for layer in trace.layers] == [0, 2]
    assert trace.skipped == [(1, "full_attention")]
    assert "".join(trace.tokens) == TEXT
    assert trace.content_from == 8 - len(special)
    for layer in trace.layers:
        for array in (layer.erase, layer.erase_spread, layer.write, layer.keep, layer.erase_shift, layer.write_shift):
            assert array is not None
            assert array.shape == (T, 4)
            assert (array >= 0).all()
            assert (array <= 1).all()
        np.testing.assert_allclose(layer.erase_shift[: trace.content_from], 0, atol=ROUNDING)
        assert (layer.erase_shift[trace.content_from + 1 :] > ROUNDING).all()
        assert (layer.write_shift[trace.content_from + 1 :] > ROUNDING).all()

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("p_up", "p_write")):
                parameter.zero_()
    blind = trace_gates(model, tokenizer, TEXT).layers[0]  # the input of the first layer is the same
    first = trace.layers[0]
    np.testing.assert_allclose(blind.erase_shift, 0, atol=ROUNDING)
    np.testing.assert_allclose(blind.write_shift, 0, atol=ROUNDING)
    np.testing.assert_array_equal(first.keep, blind.keep)
    np.testing.assert_allclose(np.abs(first.write - blind.write), first.write_shift, atol=ROUNDING)
    assert (np.abs(first.erase - blind.erase) <= first.erase_shift + ROUNDING).all()


def test_full_attention_ends_where_its_positions_end() -> None:
    fields, tokenizer = {"max_position_embeddings": 9}, make_tokenizer(bos_token="<s>")
    hybrid = make_model(["carve", "full_attention"], **fields)
    trace_gates(hybrid, tokenizer, "x" * 8)
    with pytest.raises(ValueError, match="sequences of 10 tokens, but the model has max_position_embeddings = 9"):
        trace_gates(hybrid, tokenizer, "x" * 9)
    trace_gates(make_model(["carve"], **fields), tokenizer, "x" * 9)


@pytest.mark.parametrize("neg", [False, True])
def test_what_the_content_adds_to_the_logits(neg: bool) -> None:
    """The "mean" adds the same to all tokens of a chunk: to all that see any, as long as that is one chunk."""
    model = make_model(["carve"], content="mean", allow_neg_eigval=neg)
    assert trace_gates(model, make_tokenizer(), "x" * 8).layers[0].same is None
    one, more = (trace_gates(model, make_tokenizer(), text).layers[0] for text in (TEXT[:16], TEXT))
    np.testing.assert_allclose(one.same, 1, atol=ROUNDING)
    np.testing.assert_allclose(one.beside, 0, atol=1e-3)
    assert ((more.same > 0) & (more.same < 1 - 1e-3)).all()
    assert (more.beside > 1e-3).all()
    found = []
    for factor in (0.01, 2):  # so little that the memory stays what it is
        with torch.no_grad():
            model.model.layers[0].mixer.p_up *= factor
        found.append(trace_gates(model, make_tokenizer(), TEXT).layers[0])
    once, twice = found
    np.testing.assert_allclose(twice.same, once.same, rtol=0.02)
    np.testing.assert_allclose(twice.beside, 2 * once.beside, rtol=0.02)


def test_surprise_is_the_loss_of_the_model_in_bits() -> None:
    model, tokenizer = make_model(["carve"]), make_tokenizer()
    trace = trace_gates(model, tokenizer, TEXT)
    row = torch.tensor([tokenizer(TEXT)["input_ids"]])
    with torch.no_grad():
        loss = model(row, labels=row).loss
    assert np.isnan(trace.surprise[0])
    assert np.mean(trace.surprise[1:]) == pytest.approx(loss.item() / np.log(2), rel=1e-5)


def test_the_rivals_have_no_content_and_tied_gates_no_spread() -> None:
    trace = trace_gates(make_model(["gdn2", "kda", "gdn"]), make_tokenizer(), TEXT)
    gdn2, kda, gdn = trace.layers
    assert gdn2.write.shape == kda.write.shape
    assert (gdn2.erase_spread > 0).all()
    for layer in (kda, gdn):
        assert layer.erase_shift is None
        np.testing.assert_allclose(layer.erase_spread, 0, atol=ROUNDING)
        np.testing.assert_allclose(layer.erase, layer.write, atol=ROUNDING)


@pytest.mark.parametrize(("layer_type", "content"), [("gdn2", None), ("carve_value", None), ("carve_value", "read")])
def test_a_write_gate_a_value_is_the_mean_of_what_scales_the_values(layer_type: str, content: str | None) -> None:
    model, tokenizer = make_model([layer_type], content=content, content_write=content is not None), make_tokenizer()
    mixer, block = model.model.layers[0].mixer, model.model.layers[0]
    trace = trace_gates(model, tokenizer, TEXT).layers[0]
    with torch.no_grad():
        x = block.mixer_norm(model.model.embed_tokens(torch.tensor([tokenizer(TEXT)["input_ids"]])))
        gated, _ = mixer.project(x)
        mixer.write_proj.weight.zero_()  # gates of a half
        halved, _ = mixer.project(x)
    expected = (gated["v"] / halved["v"] / 2).mean(-1)[0].numpy()
    if content is None:
        assert trace.write_shift is None
        np.testing.assert_allclose(trace.write, expected, atol=10 * ROUNDING)
    else:  # the content's factor, of which the shift counts half, moves it from there
        first = model.config.chunk_size
        np.testing.assert_allclose(trace.write[:first], expected[:first], atol=10 * ROUNDING)
        np.testing.assert_allclose(np.abs(trace.write - expected), 2 * expected * trace.write_shift, atol=10 * ROUNDING)
        assert (trace.write_shift[first:] > ROUNDING).all()


def test_the_model_is_left_as_it_was() -> None:
    model = make_model(["carve"]).train()
    trace_gates(model, make_tokenizer(), TEXT)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("layer_types", "text"),
    [
        (["carve"], "x"),
        (["gdn2", "full_attention", "kda"], TEXT),
        (["carve", "carve"], TEXT * 20),
        (["carve", "gdn"] * 12, TEXT),
    ],
)
def test_a_picture_is_drawn_for_few_and_many_layers_and_tokens(
    tmp_path: Path, layer_types: list[str], text: str
) -> None:
    trace = trace_gates(make_model(layer_types, content_write="carve" in layer_types), make_tokenizer(), text)
    draw_gates(trace, tmp_path / "gates.png", title="a title with $ in it")
    import matplotlib.image

    picture = matplotlib.image.imread(tmp_path / "gates.png")
    height, width = picture.shape[:2]
    assert width > 1000
    assert height > 60 * len(trace.layers)
    assert [path.name for path in tmp_path.iterdir()] == ["gates.png"]


def test_what_cannot_be_inspected_is_said(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match="the text to inspect is empty"):
        trace_gates(make_model(["carve"]), tokenizer, "")
    with pytest.raises(ValueError, match="no recurrent layer"):
        trace_gates(make_model(["full_attention"]), tokenizer, TEXT)
    trace = trace_gates(make_model(["carve"]), tokenizer, TEXT)
    with pytest.raises(OSError, match="nowhere"):
        draw_gates(trace, tmp_path / "nowhere" / "gates.png")
