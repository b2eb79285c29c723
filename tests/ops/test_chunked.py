"""`chunk_carve` against `recurrent_carve`: values, states and gradients, in every dtype and for every decay."""

import pytest
import torch
from hypothesis import given, settings

from carve.ops import CarveState, carve_gates, chunk_carve, recurrent_carve
from tests.ops.cases import DECAYS, TENSORS, Case, assert_close, assert_states_close, cases
from tests.tolerances import tolerance

few = settings(max_examples=80, derandomize=True, deadline=None)
CONTENTS = [("mean", None), ("mean", "rms"), ("read", None), ("read", "rms")]


def run(op, arguments: dict) -> tuple[torch.Tensor, CarveState]:
    o, state = op(**arguments, output_final_state=True)
    assert state is not None
    return o, state


def gradients(op, arguments: dict, state_too: bool = True) -> dict[str, torch.Tensor]:
    """Gradients of a random sum of the outputs and of the final state, by name."""
    tensors = {name: x for name, x in arguments.items() if name in TENSORS and x is not None}
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    begin = arguments["initial_state"]
    if begin is not None:
        begin = CarveState(*(None if x is None else x.clone().requires_grad_() for x in begin[:3]), begin.position)
        leaves |= {name: x for name, x in begin._asdict().items() if x is not None and name != "position"}
    o, end = run(op, arguments | {name: leaves[name] for name in tensors} | {"initial_state": begin})
    r = torch.Generator().manual_seed(7)
    outputs = [o, *(x for x in end[:3] if x is not None and state_too)]
    weights = [torch.randn(x.shape, generator=r).bfloat16().to(x.dtype) for x in outputs]  # the same in every dtype
    total = sum((x * weight).sum(dtype=torch.float64) for x, weight in zip(outputs, weights, strict=True))
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def assert_content_is_heard(arguments: dict, o: torch.Tensor) -> None:
    """The content term moves the outputs by enough for an error in it to show."""
    begin = arguments["initial_state"]
    blind = {"p_down": None, "p_up": None, "p_write": None}
    blind["initial_state"] = None if begin is None else begin._replace(content=None, content_sum=None)
    o_blind, _ = recurrent_carve(**arguments | blind)
    assert (o - o_blind).norm() >= tolerance("op_content_effect") * o.norm()


@few
@given(cases())
def test_chunks_are_the_recurrence(case: Case) -> None:
    arguments = case.arguments()
    o, state = run(chunk_carve, arguments)
    expected, final = run(recurrent_carve, arguments)
    assert_close(o, expected, "op_float64", "o")
    assert_states_close(state, final, "op_float64")
    if case.audible:
        assert_content_is_heard(arguments, expected)


@settings(few, max_examples=40)
@given(cases())
def test_gradients_are_those_of_the_recurrence(case: Case) -> None:
    arguments = case.arguments()
    found, expected = gradients(chunk_carve, arguments), gradients(recurrent_carve, arguments)
    for name in expected:
        assert_close(found[name], expected[name], "op_float64_gradient", name)


@pytest.mark.parametrize(("content", "norm"), CONTENTS)
@pytest.mark.parametrize("T", [130, 200])
def test_strong_content(content: str, norm: str | None, T: int) -> None:
    case = Case(T=T, groups=2, K=16, V=8, content=content, content_norm=norm, started=True, chunk_size=16)
    arguments = case.arguments()
    o, state = run(chunk_carve, arguments)
    expected, final = run(recurrent_carve, arguments)
    assert_content_is_heard(arguments, expected)
    assert_close(o, expected, "op_float64", "o")
    assert_states_close(state, final, "op_float64")
    found, wanted = gradients(chunk_carve, arguments), gradients(recurrent_carve, arguments)
    assert len(found) == len(TENSORS) + (3 if content == "mean" else 2)
    for name in wanted:
        assert wanted[name].abs().max() > 0, name
        assert_close(found[name], wanted[name], "op_float64_gradient", name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay", ["weak", "mixed"])
@pytest.mark.parametrize("op", [chunk_carve, recurrent_carve])
def test_lower_precision(op, decay: str, dtype: torch.dtype) -> None:
    """Against float64 on the same rounded inputs; the state and the arithmetic are float32."""
    case = Case(T=150, K=16, V=8, decay=decay, content="read", started=True, chunk_size=32)
    arguments = case.arguments(dtype)
    wide = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    begin = arguments["initial_state"]
    wide["initial_state"] = CarveState(*(None if x is None else x.double() for x in begin[:3]), begin.position)
    o, state = run(op, arguments)
    expected, final = run(recurrent_carve, wide)
    assert o.dtype == dtype
    assert state.memory.dtype == state.content.dtype == torch.float32
    name = str(dtype).removeprefix("torch.")
    assert_close(o, expected, f"op_{name}", "o")
    assert_states_close(state, final, "op_float32")
    found, wanted = gradients(op, arguments), gradients(recurrent_carve, wide)
    for tensor in wanted:
        lower = found[tensor].dtype == dtype and dtype != torch.float32
        assert_close(found[tensor], wanted[tensor], f"op_{name}" if lower else "op_float32_gradient", tensor)


@pytest.mark.parametrize("decay", sorted(DECAYS))
@pytest.mark.parametrize("chunk_size", [17, 64])
def test_any_decay(decay: str, chunk_size: int) -> None:
    """Also in float32, where exp(316) is infinite: outputs, states and gradients are finite and right."""
    case = Case(T=100, K=16, V=8, decay=decay, chunk_size=chunk_size, started=True)
    arguments = case.arguments(torch.float32)
    exact = case.arguments(torch.float64)
    o, state = run(chunk_carve, arguments)
    expected, final = run(recurrent_carve, exact)
    assert_close(o, expected, "op_float32", "o")
    assert_states_close(state, final, "op_float32")
    found, wanted = gradients(chunk_carve, arguments), gradients(recurrent_carve, exact)
    for name in wanted:
        assert_close(found[name], wanted[name], "op_float32_gradient", name)


@pytest.mark.parametrize("strong_at", [0, 3, 14, 15])
@pytest.mark.parametrize("strong", [-30.0, -41.0, -316.0, -3e4])
def test_a_strong_decay_costs_no_precision_behind_it(strong: float, strong_at: int) -> None:
    """Differences of sums would: beside 3e4, float32 has no digit for 1e-3."""
    arguments = Case(T=48, K=16, V=8, content=None, write="token", decay="weak").arguments(torch.float32)
    arguments["g"][:, strong_at::16] = strong
    exact = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    o, _ = run(chunk_carve, arguments)
    expected, _ = run(recurrent_carve, exact)
    assert_close(o, expected, "op_float32", "o")
    found, wanted = gradients(chunk_carve, arguments), gradients(recurrent_carve, exact)
    for name in wanted:
        if name == "g":  # of the weak decays, beside which those of the strong ones vanish
            found[name][:, strong_at::16] = wanted[name][:, strong_at::16] = 0
        assert_close(found[name], wanted[name], "op_float32_gradient", name)


@pytest.mark.parametrize("gates", ["saturated", "infinite"])
@pytest.mark.parametrize("content", ["mean", "read"])
def test_gates_of_exactly_zero_and_one(gates: str, content: str) -> None:
    case = Case(T=70, K=16, V=8, gates=gates, content=content, content_norm="rms", allow_neg_eigval=False)
    arguments = case.arguments(torch.float32)
    assert set(arguments["e"].sigmoid().unique().tolist()) >= {0.5, 1.0}
    exact = case.arguments()
    o, _ = run(chunk_carve, arguments)
    expected, _ = run(recurrent_carve, exact)
    assert_close(o, expected, "op_float32", "o")
    found, wanted = gradients(chunk_carve, arguments), gradients(recurrent_carve, exact)
    for name in wanted:
        assert_close(found[name], wanted[name], "op_float32_gradient", name)


@pytest.mark.parametrize(("content", "norm"), CONTENTS)
def test_projections_of_zero_give_the_bits_of_the_blind_op(content: str, norm: str | None) -> None:
    arguments = Case(T=100, K=16, V=8, content=content, content_norm=norm).arguments(torch.float32)
    arguments["p_up"].zero_()
    blind = arguments | {"p_down": None, "p_up": None, "p_write": None}
    for op in (chunk_carve, recurrent_carve):
        o, state = run(op, blind)
        for p_write in (None, torch.zeros_like(arguments["p_write"])):
            o_zero, state_zero = run(op, arguments | {"p_write": p_write})
            assert torch.equal(o_zero, o)
            assert torch.equal(state_zero.memory, state.memory)
            found = gradients(op, arguments | {"p_write": p_write}, state_too=False)
            for name, x in gradients(op, blind, state_too=False).items():
                assert torch.equal(found[name], x), name
            assert found["p_up"].abs().max() > 0  # so that training can leave zero


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("content", ["mean", "read", None])
def test_masks_of_the_largest_decay(content: str | None, dtype: torch.dtype) -> None:
    """Of several in a block the sum is no number any more."""
    arguments = Case(T=40, K=6, content=content, chunk_size=32).arguments(dtype)
    arguments["g"][:, 5:8] = torch.finfo(dtype).min
    o, state = run(chunk_carve, arguments)
    expected, final = run(recurrent_carve, arguments)
    assert_close(o, expected, f"op_{str(dtype)[6:]}")
    assert_states_close(state, final, f"op_{str(dtype)[6:]}")
    found = gradients(chunk_carve, arguments)
    for name, wanted in gradients(recurrent_carve, arguments).items():
        assert_close(found[name], wanted, "op_float64" if dtype == torch.float64 else "op_float32_gradient", name)


@pytest.mark.parametrize("op", [recurrent_carve, chunk_carve])
@pytest.mark.parametrize("content", ["mean", "read", None])
@pytest.mark.parametrize("T", [0, 1])
def test_a_returned_state_is_nobody_elses(op, content: str | None, T: int) -> None:
    """Decoding writes into it."""
    arguments = Case(T=T, content=content, started=True).arguments()
    _, state = op(**arguments, output_final_state=True)
    for before, y in zip(arguments["initial_state"], state, strict=True):
        assert y is None or y.data_ptr() != before.data_ptr()


def test_no_default_device_gets_between() -> None:
    arguments = Case(B=1, T=20).arguments()
    bounds = torch.tensor([0, 7, 20])
    for op in (chunk_carve, recurrent_carve):
        for more in ({}, {"cu_seqlens": bounds}):
            expected, _ = op(**arguments, **more)
            with torch.device("meta"):
                found, _ = op(**arguments, **more)
            assert torch.equal(found, expected)


def test_no_tokens_have_no_gates() -> None:
    arguments = {name: y for name, y in Case(T=0, groups=2).arguments().items() if name != "initial_state"}
    gates = carve_gates(**arguments)
    assert gates.b.shape == gates.b_blind.shape == (2, 0, 4, 5)
    assert gates.a.shape == gates.a_blind.shape == (2, 0, 4)


def test_gates_report_is_what_the_recurrence_applies() -> None:
    from carve.ops import carve_gates

    case = Case(T=40, content="read")
    arguments = case.arguments()
    del arguments["initial_state"]
    found = carve_gates(**arguments)
    assert_close(found.b_blind, arguments["e"].sigmoid(), "op_float64", "b_blind")
    assert_close(found.a_blind, arguments["w"].sigmoid(), "op_float64", "a_blind")
    assert torch.equal(found.b[:, : case.chunk_size], found.b_blind[:, : case.chunk_size])  # nothing is stored yet
    assert (found.b - found.b_blind).abs().max() > tolerance("op_content_effect")
    # The memory-blind op, given these gates as logits, does what the content-aware one does.
    blind = arguments | {"p_down": None, "p_up": None, "p_write": None, "e": found.b.logit(), "w": found.a.logit()}
    assert_close(recurrent_carve(**blind)[0], recurrent_carve(**arguments)[0], "op_float64", "o")
