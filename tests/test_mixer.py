import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from carve import CarveMixer
from carve import mixer as module
from carve.mixer import GATES, MixerState
from carve.ops import recurrent_carve
from tests.models.tiny import assert_near, error, hear_content
from tests.tolerances import tolerance

VARIANTS: list[dict[str, Any]] = [
    {},
    {"content_norm": None, "conv_size": 1},
    {"content_write": True, "num_v_heads": 4, "v_head_dim": 6},
    {"content": "read", "content_norm": None},
    {"content": "read", "content_write": True, "num_v_heads": 6, "conv_size": 1, "allow_neg_eigval": True},
    {"content": "read", "content_erase": False, "content_write": True},
    {"content": None, "v_head_dim": 12},
    {"gates": "carve_blind"},
    {"gates": "carve_value", "content": "read", "content_write": True, "num_v_heads": 4},
    {"gates": "gdn2"},
    {"gates": "kda", "num_v_heads": 4},
    {"gates": "gdn", "num_v_heads": 4, "allow_neg_eigval": True},
]


def make_layer(dtype: torch.dtype = torch.float64, seed: int = 0, **arguments: Any) -> CarveMixer:
    torch.manual_seed(seed)
    layer = CarveMixer(24, **({"num_heads": 2, "head_dim": 8, "content_rank": 4, "chunk_size": 4} | arguments))
    hear_content(layer)
    return layer.to(dtype)


def inputs(B: int, T: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, T, 24, generator=torch.Generator().manual_seed(1)).to(dtype)


def unit(x: Tensor) -> Tensor:
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


@pytest.mark.parametrize("gates", ["gdn2", "kda", "gdn"])
@pytest.mark.parametrize("num_v_heads", [2, 4])
def test_a_rival_is_its_own_definition(gates: str, num_v_heads: int) -> None:
    """The layer against the token loop of the rival's paper, from the layer's projections."""
    layer = make_layer(gates=gates, num_v_heads=num_v_heads, v_head_dim=6)
    x = inputs(2, 11)
    B, T, H, K, HV, V = 2, 11, 2, 8, num_v_heads, 6
    op, _ = layer.project(x)
    (q, k, v), _ = layer.conv([layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)])
    q, k = (unit(y.view(B, T, H, K)).repeat_interleave(HV // H, 2) for y in (q, k))
    v, g = v.view(B, T, HV, V), op["g"].repeat_interleave(HV // H, 2)
    erase = layer.erase_proj(x).sigmoid()

    S = x.new_zeros(B, HV, K, V)
    outputs = []
    for t in range(T):
        k_t, v_t = k[:, t].unsqueeze(-1), v[:, t].unsqueeze(-2)  # [B, HV, K, 1], [B, HV, 1, V]
        if gates == "gdn2":
            b = erase[:, t].view(B, H, K, 1).repeat_interleave(HV // H, 1)
            v_t = layer.write_proj(x).sigmoid().view(v.shape)[:, t].unsqueeze(-2) * v_t
            S = g[:, t].exp().unsqueeze(-1) * S
            S = S - k_t @ ((b * k_t).mT @ S) + k_t @ v_t
        else:
            beta = erase[:, t].view(B, HV, 1, 1)
            if gates == "gdn":
                assert (g[:, t] == g[:, t, :, :1]).all()
                S = g[:, t, :, :1].exp().unsqueeze(-1) * S
            else:
                S = g[:, t].exp().unsqueeze(-1) * S
            S = S - beta * k_t @ (k_t.mT @ S) + beta * k_t @ v_t
        outputs.append(K**-0.5 * (q[:, t].unsqueeze(-2) @ S).squeeze(-2))
    o = torch.stack(outputs, 1)
    expected = layer.o_proj(layer.norm(o, layer.gate_proj(x).view(o.shape)).flatten(2))
    assert_near(layer(x)[0], expected)


@pytest.mark.parametrize("arguments", VARIANTS)
def test_the_layer_is_its_projections_and_the_recurrence(arguments: dict[str, Any]) -> None:
    layer = make_layer(**arguments)
    x = inputs(2, 11)
    o, memory = recurrent_carve(**layer.project(x)[0], output_final_state=True)
    normed = o * (o.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * layer.gate_proj(x).view(o.shape).sigmoid()
    y, state = layer(x)
    assert_near(y, layer.o_proj(normed.flatten(2)))
    assert_near(state.memory.memory, memory.memory)
    assert state.memory.position.tolist() == [11 % 4] * 2


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"content_write": True},
        {"content": "read", "content_write": True},
        {"content": "read", "content_erase": False, "content_write": True},
        {"gates": "carve_value"},
        {"gates": "carve_value", "content": "read", "content_erase": False, "content_write": True},
    ],
)
def test_the_content_term_is_heard_once_its_projections_are_not_zero(arguments: dict[str, Any]) -> None:
    layer, silent = make_layer(**arguments), make_layer(**arguments)
    with torch.no_grad():
        for p in (silent.p_up, silent.p_write):
            if p is not None:
                p.zero_()
    x = inputs(2, 16)
    y, expected = layer(x)[0], silent(x)[0]
    assert_near(y[:, :4], expected[:, :4])  # nothing is stored before the first chunk
    assert error(y[:, 4:], expected[:, 4:]) > tolerance("op_content_effect")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [1, 9])
@pytest.mark.parametrize("content", ["mean", "read"])
def test_at_initialisation_the_layer_has_the_bits_of_the_memory_blind_one(
    content: str, T: int, dtype: torch.dtype
) -> None:
    layer = CarveMixer(
        24, num_heads=2, num_v_heads=4, head_dim=8, chunk_size=4, content=content, content_write=True
    ).to(dtype)
    blind = CarveMixer(24, num_heads=2, num_v_heads=4, head_dim=8, chunk_size=4, content=None).to(dtype)
    loaded = blind.load_state_dict(layer.state_dict(), strict=False)
    assert loaded.unexpected_keys == ["p_down", "p_up", "p_write"]
    assert not loaded.missing_keys
    x = inputs(2, T, dtype)
    assert torch.equal(layer(x)[0], blind(x)[0])


@pytest.mark.parametrize("content_write", [False, True])
def test_with_a_write_gate_a_value_the_layer_begins_as_gdn2(content_write: bool) -> None:
    sizes = {"num_heads": 2, "num_v_heads": 4, "head_dim": 8, "v_head_dim": 6, "chunk_size": 4}
    layer = CarveMixer(24, **sizes, gates="carve_value", content="read", content_write=content_write)
    gdn2 = CarveMixer(24, **sizes, gates="gdn2")
    assert not gdn2.load_state_dict(layer.state_dict(), strict=False).missing_keys
    assert torch.equal(layer(inputs(2, 9, torch.float32))[0], gdn2(inputs(2, 9, torch.float32))[0])


def test_with_one_seed_layers_with_and_without_content_begin_with_the_same_weights() -> None:
    layers = []
    for arguments in ({}, {"content": "read", "content_write": True}, {"content": None}, {"gates": "carve_blind"}):
        torch.manual_seed(0)
        layers.append(CarveMixer(24, num_heads=2, head_dim=8, **arguments).state_dict())
    for name, weight in layers[2].items():
        assert all(torch.equal(layer[name], weight) for layer in layers), name
    assert layers[2].keys() == layers[3].keys()
    assert torch.equal(layers[0]["p_down"], layers[1]["p_down"])


@pytest.mark.parametrize("arguments", VARIANTS)
@settings(max_examples=5, deadline=None)
@given(pieces=st.lists(st.integers(0, 9), min_size=2, max_size=5))
def test_a_state_carried_over_pieces_is_the_whole(arguments: dict[str, Any], pieces: list[int]) -> None:
    layer = make_layer(**arguments)
    x = inputs(2, sum(pieces) + 1)
    whole, last = layer(x)
    outputs, state = [], None
    for piece in x.split([*pieces, 1], dim=1):
        y, state = layer(piece, state)
        outputs.append(y)
    assert_near(torch.cat(outputs, 1), whole)
    assert state is not None
    assert torch.equal(state.memory.position, last.memory.position)
    assert_near(state.memory.memory, last.memory.memory)
    if last.conv.numel():
        assert_near(state.conv, last.conv)


@pytest.mark.parametrize("arguments", VARIANTS)
@settings(max_examples=4, deadline=None)
@given(lengths=st.lists(st.integers(0, 7), min_size=1, max_size=4), data=st.data())
def test_packed_sequences_with_states_are_each_alone(
    arguments: dict[str, Any], lengths: list[int], data: st.DataObject
) -> None:
    layer = make_layer(**arguments)
    N, before = len(lengths), data.draw(st.integers(0, 5))
    _, begin = layer(inputs(N, before).flip(0)) if before else (None, None)
    x = inputs(1, sum(lengths))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    y, states = layer(x, begin, cu_seqlens)
    for n, piece in enumerate(x.split(lengths, dim=1)):
        alone, state = layer(piece, None if begin is None else begin.select(torch.tensor([n])))
        at = slice(int(cu_seqlens[n]), int(cu_seqlens[n + 1]))
        if lengths[n]:
            assert_near(y[:, at], alone)
        selected = states.select(torch.tensor([n]))
        assert torch.equal(selected.memory.position, state.memory.position)
        torch.testing.assert_close(selected.conv, state.conv, rtol=0, atol=tolerance("model_float64"))
        torch.testing.assert_close(selected.memory.memory, state.memory.memory, rtol=0, atol=tolerance("model_float64"))


@pytest.mark.parametrize("arguments", VARIANTS)
def test_gradients_reach_every_parameter(arguments: dict[str, Any]) -> None:
    layer = make_layer(**arguments)
    layer(inputs(2, 11))[0].square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_the_first_step_of_training_moves_the_content_projections() -> None:
    layer = CarveMixer(24, num_heads=2, head_dim=8, chunk_size=4, content="read", content_write=True)
    layer(inputs(2, 11, torch.float32))[0].square().sum().backward()
    assert layer.p_up.grad.abs().sum() > 0
    assert layer.p_write.grad.abs().sum() > 0


@pytest.mark.parametrize("T", [1, 9])
@pytest.mark.parametrize("content", ["mean", "read"])
def test_the_state_stays_float32(content: str, T: int) -> None:
    x = inputs(2, T, torch.float32)
    layer = make_layer(torch.float32, content=content, content_norm=None, chunk_size=3)

    def run(layer: CarveMixer, x: Tensor) -> Tensor:
        outputs, state = [], None
        for _ in range(4):
            y, state = layer(x, state)
            outputs.append(y)
            kept = [value for value in state.memory if value is not None]
            assert [value.dtype for value in kept] == [torch.float32] * (len(kept) - 1) + [torch.int64]
        return torch.cat(outputs, 1)

    def check(layer: CarveMixer, x: Tensor) -> None:
        y = run(layer, x)
        assert y.dtype == torch.bfloat16
        assert_near(y, expected, "model_bfloat16")

    expected = run(layer, x)

    with torch.autocast("cpu", torch.bfloat16):
        check(layer, x)
    check(layer.bfloat16(), x.bfloat16())


@pytest.mark.parametrize("arguments", VARIANTS)
def test_without_a_state_the_outputs_are_the_same(arguments: dict[str, Any]) -> None:
    layer, x = make_layer(**arguments), inputs(1, 11)
    _, before = layer(inputs(1, 6))
    for state, bounds in ((None, None), (before, None), (None, torch.tensor([0, 4, 4, 11]))):
        y, after = layer(x, state, bounds, output_state=False)
        assert after is None
        assert torch.equal(y, layer(x, state, bounds)[0])


@pytest.fixture
def decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path that the next tokens take on a GPU."""
    monkeypatch.setattr(module, "decodes", lambda x, cu_seqlens: cu_seqlens is None and not torch.is_grad_enabled())


def copied(state: MixerState) -> list[Tensor]:
    return [y.clone() for y in (state.conv, *state.memory) if y is not None]


def assert_is(state: MixerState, expected: list[Tensor]) -> None:
    for y, z in zip(copied(state), expected, strict=True):
        assert torch.equal(y, z)


@pytest.mark.parametrize("arguments", VARIANTS)
@pytest.mark.parametrize("T", [1, 3])
@torch.no_grad()
def test_decoding_writes_into_a_state_only_when_told(arguments: dict[str, Any], T: int, decoding: None) -> None:
    layer, x = make_layer(**arguments), inputs(2, 6 + T)
    _, state = layer(x[:, :6])
    before = copied(state)
    y, after = layer(x[:, 6:], state)
    assert_is(state, before)
    again, moved = layer(x[:, 6:], state, in_place=True)
    assert torch.equal(again, y)
    assert_is(moved, copied(after))
    assert all(found is given for found, given in zip(moved.memory, state.memory, strict=True))
    assert_near(y, layer(x)[0][:, 6:])


def test_a_state_that_must_not_be_written_into_is_copied(decoding: None) -> None:
    """One that the backward of an earlier call needs; one made in inference mode; one that is a view of another."""
    layer, x = make_layer(), inputs(2, 9)
    _, saved = layer(x[:, :7])
    with torch.inference_mode():
        _, inferred = layer(x[:, :7])
    once = inputs(1, 7)
    with torch.no_grad():
        _, single = layer(once)
        memory = type(single.memory)(*(y.expand(2, *y.shape[1:]) for y in single.memory))
        view = MixerState(single.conv.expand(2, -1, -1), memory, single.chunk_size)
        for state in (saved, inferred, view):
            before = copied(state)
            y, after = layer(x[:, 7:], state, in_place=True)
            assert_is(state, before)
            expected, _ = layer(x[:, 7:], state)
            assert torch.equal(y, expected)
            layer(x[:, 7:], after, in_place=True)  # which is now its own
    saved.memory.memory.square().sum().backward()
    assert layer.v_proj.weight.grad.isfinite().all()


def test_what_may_be_written_into() -> None:
    x = torch.ones(2, 3)
    with torch.inference_mode():
        y = torch.ones(2, 3)
        assert module.writable(y)
        assert module.writable(x)
    assert module.writable(x)
    assert not module.writable(y)
    assert not module.writable(x.clone().requires_grad_())
    assert not module.writable(x.mT)
    assert not torch.compile(module.writable, fullgraph=True, backend="eager")(x)


def test_as_in_the_readme() -> None:
    layer = CarveMixer(hidden_size=64, num_heads=2, head_dim=16)
    y, state = layer(torch.randn(1, 100, 64))
    y, state = layer(torch.randn(1, 1, 64), state)
    assert y.shape == (1, 1, 64)
    assert state.memory.memory.shape == (1, 2, 16, 16)
    assert state.memory.position.tolist() == [101 % 64]


def test_the_state_keeps_nothing_else_alive() -> None:
    layer = make_layer()
    sizes = []
    for T in (1, 4, 100):
        _, state = layer(inputs(1, T))
        sizes.append(sum(x.untyped_storage().nbytes() for x in (state.conv, *state.memory)))
    assert sizes[0] == sizes[1] == sizes[2]


def test_which_parameters_are_not_decayed() -> None:
    layer = make_layer()
    for copied in (layer, copy.deepcopy(layer), layer.bfloat16(), copy.deepcopy(layer).to_empty(device="cpu")):
        marked = {name for name, p in copied.named_parameters() if getattr(p, "_no_weight_decay", False)}
        assert marked == {"A_log", "dt_bias"}


@pytest.mark.parametrize("gates", GATES)
def test_initial_decay_is_of_the_stated_range(gates: str) -> None:
    layer = make_layer(gates=gates, num_heads=8)
    assert (layer.A_log.exp() >= 1).all()
    assert (layer.A_log.exp() <= 16).all()
    dt = torch.nn.functional.softplus(layer.dt_bias)
    assert (dt > 0.00099).all()
    assert (dt < 0.101).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gates": "mamba"}, "gates is 'mamba', expected one of 'carve', 'carve_value'"),
        ({"content": "max"}, "content is 'max', expected 'mean', 'read' or None"),
        ({"content_norm": "l2"}, "content_norm is 'l2', expected 'rms' or None"),
        ({"num_v_heads": 3}, "num_v_heads is 3, expected a multiple of num_heads = 2"),
        ({"num_v_heads": 0}, "num_v_heads is 0, expected an integer of at least 1"),
        ({"num_v_heads": "4"}, "num_v_heads is '4', expected an integer of at least 1"),
        ({"chunk_size": 0}, "chunk_size is 0, expected an integer of at least 1"),
        ({"chunk_size": None}, "chunk_size is None, expected an integer of at least 1"),
        ({"conv_size": 0}, "conv_size is 0, expected an integer of at least 1"),
        ({"head_dim": 8.0}, "head_dim is 8.0, expected an integer of at least 1"),
        ({"content_rank": -1}, "content_rank is -1, expected an integer of at least 1"),
        ({"content_rank": True}, "content_rank is True, expected an integer of at least 1"),
        ({"content_write": "no"}, "content_write is 'no', expected True or False"),
        ({"allow_neg_eigval": 1}, "allow_neg_eigval is 1, expected True or False"),
        ({"norm_eps": -1e-5}, "norm_eps is -1e-05, expected a positive number"),
        ({"norm_eps": float("nan")}, "norm_eps is nan, expected a positive number"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_layer(**arguments)


def test_bad_inputs_are_named() -> None:
    layer = make_layer()
    x = inputs(2, 5)
    with pytest.raises(ValueError, match=r"x has shape \[5, 24\], expected \[B, T, D\] with D = 24"):
        layer(x[0])
    with pytest.raises(ValueError, match=r"x has shape \[2, 5, 23\]"):
        layer(x[..., 1:])
    with pytest.raises(ValueError, match="cu_seqlens needs packed sequences with B = 1"):
        layer(x, cu_seqlens=torch.tensor([0, 5]))
    for bounds in ([0, 4], [1, 5], [0, 3, 2, 5], [0, 6]):
        with pytest.raises(ValueError, match=r"cu_seqlens is .* end at T = 5"):
            layer(x[:1], cu_seqlens=torch.tensor(bounds))
    with pytest.raises(ValueError, match=r"cu_seqlens is torch\.float32"):
        layer(x[:1], cu_seqlens=torch.tensor([0.0, 5.0]))
    _, state = layer(x)
    with pytest.raises(ValueError, match="state is CarveState, expected the MixerState of an earlier call"):
        layer(x, state.memory)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chunk_size": 8}, "state is from a layer of chunk_size 8, expected 4"),
        ({"num_heads": 4}, "state.conv has shape"),
        ({"conv_size": 2}, "state.conv has shape"),
        ({"num_heads": 1, "head_dim": 16}, "initial_state.memory has shape"),
        ({"content": None}, "initial_state.content is None, expected a tensor for content='mean'"),
        ({"content": "read"}, "initial_state.content has shape"),
        ({"content_rank": 3}, "initial_state.content has shape"),
    ],
)
def test_a_state_of_another_layer_is_refused(arguments: dict[str, Any], message: str) -> None:
    x = inputs(2, 5)
    _, state = make_layer(**arguments)(x)
    with pytest.raises(ValueError, match=message):
        make_layer()(x, state)


def test_a_state_of_another_batch_is_refused() -> None:
    layer = make_layer()
    _, state = layer(inputs(2, 5))
    with pytest.raises(ValueError, match="state is of 2 sequences, expected 3"):
        layer(inputs(3, 5), state)
    with pytest.raises(ValueError, match="state is of 2 sequences, expected 1"):
        layer(inputs(1, 5), state, cu_seqlens=torch.tensor([0, 5]))


def test_training_after_inference_mode() -> None:
    layer = make_layer(chunk_size=13)  # a size of no other test: nothing is prepared for it yet
    x = inputs(1, 14)
    with torch.inference_mode():
        expected, _ = layer(x)
    y, _ = layer(x)
    assert torch.equal(y, expected)
    y.sum().backward()
    assert layer.q_proj.weight.grad.isfinite().all()
