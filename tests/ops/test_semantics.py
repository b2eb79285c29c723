"""What must hold of any implementation: split invariance, packing, causality, determinism, and so on."""

import gc
import weakref
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from carve.ops import CarveState, chunk_carve, recurrent_carve
from carve.ops.chunked import BLOCK, SEGMENT, STEP
from tests.ops.cases import TENSORS, TOKEN_NAMES, Case, assert_close, assert_states_close, cases

few = settings(max_examples=25, derandomize=True, deadline=None)
OPS = {"chunk": chunk_carve, "recurrent": recurrent_carve}
both = pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())


def tokens(arguments: dict, start: int, stop: int) -> dict:
    """The same arguments with only tokens start to stop - 1."""
    cut = {name: arguments[name][:, start:stop] for name in TOKEN_NAMES if arguments[name] is not None}
    return arguments | cut


def rows(arguments: dict, *which: int) -> dict:
    """The same arguments with only some rows of the batch."""
    index = torch.tensor(which)
    cut = {name: arguments[name][index] for name in TOKEN_NAMES if arguments[name] is not None}
    begin = arguments["initial_state"]
    return arguments | cut | {"initial_state": None if begin is None else begin.select(index)}


def in_pieces(arguments: dict, pieces: list[tuple[str, int]]) -> tuple[torch.Tensor, CarveState]:
    """Run pieces of (op, length) one after the other, the state carried."""
    state, outputs, start = arguments["initial_state"], [], 0
    for op, length in pieces:
        piece = tokens(arguments, start, start + length) | {"initial_state": state}
        o, state = OPS[op](**piece, output_final_state=True)
        outputs.append(o)
        start += length
    return torch.cat(outputs, dim=1), state


def assert_same_in_pieces(arguments: dict, pieces: list[tuple[str, int]]) -> None:
    whole, final = chunk_carve(**arguments, output_final_state=True)
    o, state = in_pieces(arguments, pieces)
    assert_close(o, whole, "op_float64", "o")
    assert_states_close(state, final, "op_float64")


# -- 1: split invariance --


@few
@given(cases(T=st.integers(2, 80)), st.data())
def test_split_anywhere(case: Case, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, case.T - 1), max_size=4)))
    lengths = [b - a for a, b in zip([0, *cuts], [*cuts, case.T], strict=True)]
    ops = data.draw(st.lists(st.sampled_from(sorted(OPS)), min_size=len(lengths), max_size=len(lengths)))
    assert_same_in_pieces(case.arguments(), list(zip(ops, lengths, strict=True)))


@pytest.mark.parametrize("content", ["mean", "read"])
@pytest.mark.parametrize(
    "lengths", [[1] * 37, [2, 3, 5, 7, 11, 9], [16, 16, 5], [15, 1, 17, 4], [0, 20, 0, 17], [36, 1]], ids=str
)
def test_split_by_one_token_primes_and_at_chunk_boundaries(lengths: list[int], content: str) -> None:
    arguments = Case(B=1, T=37, groups=2, content=content, content_norm="rms", decay="mixed").arguments()
    for op in OPS:
        assert_same_in_pieces(arguments, [(op, length) for length in lengths])
    turns = [(sorted(OPS)[i % 2], length) for i, length in enumerate(lengths)]
    assert_same_in_pieces(arguments, turns)


def test_gradients_flow_through_pieces() -> None:
    """Back-propagation through carried states is that through the whole."""
    arguments = Case(B=1, T=41, started=True, content="mean", content_norm="rms").arguments()
    leaves = {name: arguments[name].requires_grad_() for name in TENSORS}
    whole, _ = chunk_carve(**arguments)
    pieces, _ = in_pieces(arguments, [("chunk", 7), ("recurrent", 3), ("chunk", 30), ("recurrent", 1)])
    weight = torch.randn_like(whole)
    for name, expected, found in zip(
        leaves,
        torch.autograd.grad((whole * weight).sum(), list(leaves.values())),
        torch.autograd.grad((pieces * weight).sum(), list(leaves.values())),
        strict=True,
    ):
        assert_close(found, expected, "op_float64_gradient", name)


# -- 2: packed sequences --


@few
@given(cases(B=st.just(1), started=st.just(False)), st.data())
def test_packed_sequences_give_what_they_give_alone(case: Case, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, case.T), max_size=4)))  # repeated: of zero length
    bounds = [0, *cuts, case.T]
    arguments = case.arguments()
    N = len(bounds) - 1
    if data.draw(st.booleans()):
        batch = Case(**{**vars(case), "B": N, "started": True}).arguments()
        arguments["initial_state"] = batch["initial_state"]
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
    packed = arguments | {"cu_seqlens": torch.tensor(bounds, dtype=dtype)}
    for op in OPS.values():
        o, state = op(**packed, output_final_state=True)
        for n, (start, stop) in enumerate(pairwise(bounds)):
            begin = arguments["initial_state"]
            alone = tokens(arguments, start, stop)
            alone["initial_state"] = None if begin is None else begin.select(torch.tensor([n]))
            expected, final = recurrent_carve(**alone, output_final_state=True)
            assert_close(o[:, start:stop], expected, "op_float64", f"o of sequence {n}")
            assert_states_close(state.select(torch.tensor([n])), final, "op_float64")


@both
def test_packed_sequences_do_not_leak(op) -> None:
    """Bit for bit: what one document holds, NaN included, leaves the others alone, forward and backward."""
    x = Case(B=1, T=90, K=16, V=8).arguments(torch.float32) | {"cu_seqlens": torch.tensor([0, 20, 20, 55, 90])}
    leaves = {name: x[name].requires_grad_() for name in TOKEN_NAMES}
    o, _ = op(**x)
    gradients = torch.autograd.grad(o[:, 20:55].sum(), list(leaves.values()))
    for name, gradient in zip(leaves, gradients, strict=True):
        assert gradient[:, :20].count_nonzero() == gradient[:, 55:].count_nonzero() == 0, name
    spoilt = {name: y.detach().clone() for name, y in leaves.items()}
    for name, y in spoilt.items():
        y[:, :20] = y[:, 55:] = -7.0 if name == "g" else float("nan")
    o_spoilt, _ = op(**x | spoilt)
    assert torch.equal(o_spoilt[:, 20:55], o[:, 20:55])


@both
def test_zero_length_sequences_keep_the_bits_of_their_state(op) -> None:
    begin = Case(B=4, started=True, content="mean").arguments()["initial_state"]
    packed = Case(B=1, T=30, content="mean").arguments()
    packed |= {"initial_state": begin, "cu_seqlens": torch.tensor([0, 0, 12, 30, 30])}
    _, state = op(**packed, output_final_state=True)
    for x, y in zip(state, begin, strict=True):
        assert torch.equal(x[[0, 3]], y[[0, 3]])


@both
def test_no_tokens(op) -> None:
    """T = 0: no outputs, the state as it was, gradients of the right shapes."""
    arguments = Case(T=0, started=True).arguments()
    arguments["v"].requires_grad_()
    o, state = op(**arguments, output_final_state=True)
    assert o.shape == arguments["v"].shape
    assert all(torch.equal(x, y) for x, y in zip(state, arguments["initial_state"], strict=True) if x is not None)
    packed = rows(arguments, 0) | {"cu_seqlens": torch.tensor([0, 0, 0]), "initial_state": arguments["initial_state"]}
    o, state = op(**packed, output_final_state=True)
    assert o.shape[:2] == (1, 0)
    assert torch.equal(state.memory, arguments["initial_state"].memory)


@both
def test_no_sequences(op) -> None:
    o, state = op(**Case(B=0, T=5).arguments(), output_final_state=True)
    assert o.shape[:2] == (0, 5)
    assert state.memory.shape[0] == state.position.shape[0] == 0


@pytest.mark.parametrize("content", ["mean", "read"])
def test_rows_at_different_positions(content: str) -> None:
    """Rows of one batch may be anywhere in their chunks."""
    arguments = Case(B=5, T=45, started=True, content=content, content_norm="rms").arguments()
    assert len(arguments["initial_state"].position.unique()) > 2
    for op in OPS.values():
        o, state = op(**arguments, output_final_state=True)
        for n in range(5):
            expected, final = recurrent_carve(**rows(arguments, n), output_final_state=True)
            assert_close(o[n : n + 1], expected, "op_float64", f"o of row {n}")
            assert_states_close(state.select(torch.tensor([n])), final, "op_float64")


# -- 3: causality --

AT = [0, 1, BLOCK - 1, BLOCK, 40, STEP - 1, STEP, 100, SEGMENT // 2, 150]


@both
@pytest.mark.parametrize("content", ["mean", "read"])
@pytest.mark.parametrize("at", AT)
def test_later_tokens_leave_the_bits_of_earlier_ones(op, content: str, at: int) -> None:
    case = Case(B=2, T=160 if op is chunk_carve else at + 2, K=16, V=8, content=content, content_norm="rms")
    arguments = case.arguments(torch.float32)
    o, _ = op(**arguments)
    later = Case(**{**vars(case), "seed": 1, "decay": "mixed", "gates": "saturated"}).arguments(torch.float32)
    changed = {name: torch.cat([arguments[name][:, :at], later[name][:, at:]], dim=1) for name in TOKEN_NAMES}
    changed["v"][:, at:] *= 1e20
    o_changed, _ = op(**arguments | changed)
    assert torch.equal(o_changed[:, :at], o[:, :at])
    assert not torch.equal(o_changed[:, at:], o[:, at:])


@both
@pytest.mark.parametrize("name", ["q", "k", "v", "e", "w"])
def test_a_later_nan_stays_later(op, name: str) -> None:
    """A NaN reaches its own step of tokens and those behind it, never the steps before."""
    T, step = (3 * STEP, STEP) if op is chunk_carve else (30, 1)
    arguments = Case(B=1, T=T, K=16, V=8, chunk_size=STEP).arguments(torch.float32)
    o, _ = op(**arguments)
    at = T // 3 * 2
    arguments[name][:, at] = float("nan")
    o_changed, _ = op(**arguments)
    assert torch.equal(o_changed[:, : at // step * step], o[:, : at // step * step])
    assert o_changed[:, at].isnan().any()


@both
def test_gradients_reach_back_only(op) -> None:
    arguments = Case(B=1, T=50, K=16, V=8).arguments(torch.float32)
    leaves = [arguments[name].requires_grad_() for name in TOKEN_NAMES]
    o, _ = op(**arguments)
    for gradient in torch.autograd.grad(o[:, :23].sum(), leaves):
        assert gradient[:, 23:].count_nonzero() == 0


# -- 4: partial chunks --


@both
@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32])
def test_a_partial_chunk_is_not_heard_until_full(op, length: int) -> None:
    arguments = Case(B=1, T=length, content="mean", content_norm="rms").arguments()
    o, state = op(**arguments, output_final_state=True)
    full = length // 16 * 16
    assert state.position.tolist() == [length - full]
    assert_close(state.content_sum, o[:, full:].sum(1), "op_float64", "content_sum")
    mean = o[:, full - 16 : full].mean(1) if full else torch.zeros_like(o[:, 0])  # [B, HV, V]
    assert_close(state.content, torch.einsum("nhv,hvr->nhr", mean, arguments["p_down"]), "op_float64", "content")


# -- 6: determinism, and independence of the batch --


def bits(op, arguments: dict) -> list[torch.Tensor]:
    """Outputs, final state and all gradients."""
    leaves = {
        name: arguments[name].detach().clone().requires_grad_() for name in TENSORS if arguments[name] is not None
    }
    o, state = op(**arguments | leaves, output_final_state=True)
    total = o.double().square().sum() + state.memory.double().sum()
    return [o, *(x for x in state if x is not None), *torch.autograd.grad(total, list(leaves.values()))]


@both
@pytest.mark.parametrize("decay", ["weak", "mixed"])
def test_the_same_bits_ten_times(op, decay: str) -> None:
    T = 300 if op is chunk_carve else 30
    arguments = Case(B=2, T=T, K=32, V=32, content="mean", content_norm="rms", decay=decay).arguments(torch.float32)
    first = bits(op, arguments)
    for _ in range(9):
        assert all(torch.equal(x, y) for x, y in zip(bits(op, arguments), first, strict=True))


@both
@pytest.mark.parametrize("shape", [(5, 3, 2), (16, 8, 4), (64, 64, 16)], ids=str)
@pytest.mark.parametrize("content", ["mean", "read"])
def test_bits_do_not_depend_on_the_neighbours(op, content: str, shape: tuple[int, int, int]) -> None:
    """A row alone, with neighbours, with neighbours that decay strongly or are NaN: the same bits."""
    K, V, R = shape
    T = 150 if op is chunk_carve else 40
    case = Case(B=5, T=T, H=1, K=K, V=V, R=R, content=content, content_norm="rms", started=True)
    arguments = case.arguments(torch.float32)
    strong = {**arguments, "g": arguments["g"].clone(), "v": arguments["v"].clone()}
    strong["g"][[0, 1, 3, 4]] = torch.tensor([-5.0, -50.0, -316.0, 0.0]).view(4, 1, 1, 1)
    strong["v"][4] = float("nan")
    names = [name for name in TENSORS if name in TOKEN_NAMES]

    def row_bits(x: dict, n: int) -> list[torch.Tensor]:
        leaves = {name: x[name].detach().clone().requires_grad_() for name in names}
        o, state = op(**x | leaves, output_final_state=True)
        gradients = torch.autograd.grad(o[n].double().square().sum() + state.memory[n].sum(), list(leaves.values()))
        return [o[n], *(y[n] for y in state if y is not None), *(y[n] for y in gradients)]

    alone = row_bits(rows(arguments, 2), 0)
    for batch, n in [(arguments, 2), (strong, 2), (rows(arguments, 2, 0), 0), (rows(arguments, 4, 3, 2), 2)]:
        for found, expected in zip(row_bits(batch, n), alone, strict=True):
            assert torch.equal(found, expected)


@both
def test_bits_do_not_depend_on_packed_neighbours(op) -> None:
    arguments = Case(B=1, T=130, K=16, V=8).arguments(torch.float32)
    o, state = op(**tokens(arguments, 40, 90), output_final_state=True)
    for bounds in ([0, 40, 90, 130], [0, 3, 40, 90, 90, 130], [0, 10, 20, 30, 40, 90, 130]):
        packed, states = op(**arguments, cu_seqlens=torch.tensor(bounds), output_final_state=True)
        assert torch.equal(packed[:, 40:90], o)
        assert torch.equal(states.memory[bounds.index(40)], state.memory[0])


# -- robustness --


@pytest.mark.parametrize("content", ["mean", "read"])
def test_twenty_thousand_tokens_stay_finite(content: str) -> None:
    case = Case(B=1, T=20_000, H=1, K=16, V=16, R=4, content=content, content_norm="rms", chunk_size=64, decay="weak")
    arguments = case.arguments(torch.float32)
    leaves = [arguments[name].requires_grad_() for name in TENSORS]
    o, state = chunk_carve(**arguments, output_final_state=True)
    gradients = torch.autograd.grad(o.square().mean(), leaves)
    assert all(torch.isfinite(x).all() for x in (o, state.memory, state.content, *gradients))


@both
def test_inputs_need_not_be_contiguous(op) -> None:
    arguments = Case(B=2, T=40, groups=2, started=True).arguments()
    o, state = op(**arguments, output_final_state=True)
    strided = dict(arguments)
    for name in TENSORS:
        x = arguments[name]
        strided[name] = x.transpose(0, -1).contiguous().transpose(0, -1)
        assert not strided[name].is_contiguous(), name
    o_strided, state_strided = op(**strided, output_final_state=True)
    assert_close(o_strided, o, "op_float64", "o")
    assert_states_close(state_strided, state, "op_float64")


@both
def test_expanded_inputs_have_gradients(op) -> None:
    """Gates tied over K come as a stride of 0."""
    arguments = Case(B=1, T=20).arguments()
    e = arguments["e"][..., :1].clone().requires_grad_()
    o, _ = op(**arguments | {"e": e.expand_as(arguments["e"])})
    copied = e.detach().expand_as(arguments["e"]).clone().requires_grad_()
    o_copied, _ = op(**arguments | {"e": copied})
    (found,), (expected,) = torch.autograd.grad(o.sum(), [e]), torch.autograd.grad(o_copied.sum(), [copied])
    assert_close(found, expected.sum(-1, keepdim=True), "op_float64_gradient", "e")


@both
def test_arguments_are_left_untouched(op) -> None:
    arguments = Case(B=2, T=70, started=True, content="mean", decay="mixed").arguments(torch.float32)
    begin = arguments["initial_state"]
    copies = {name: arguments[name].clone() for name in TENSORS}
    begin_copy = [x.clone() for x in begin]
    leaves = {name: arguments[name].requires_grad_() for name in TENSORS}
    o, state = op(**arguments, output_final_state=True)
    weight = torch.ones_like(o)
    o.backward(weight)
    assert all(torch.equal(leaves[name], copies[name]) for name in TENSORS)
    assert all(torch.equal(x, y) for x, y in zip(begin, begin_copy, strict=True))
    assert torch.equal(weight, torch.ones_like(o))
    state.memory.detach().zero_()  # nor does the final state share memory with the initial one
    assert torch.equal(begin.memory, begin_copy[0])


@both
def test_final_state_only_if_asked(op) -> None:
    assert op(**Case(T=3).arguments())[1] is None


@both
def test_autocast_changes_nothing(op) -> None:
    arguments = Case(B=1, T=40, K=16, V=16).arguments(torch.float32)
    leaves = [arguments[name].requires_grad_() for name in TENSORS]
    o, state = op(**arguments, output_final_state=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, found_state = op(**arguments, output_final_state=True)
    assert found.dtype == torch.float32
    assert all(torch.equal(x, y) for x, y in zip((found, *found_state), (o, *state), strict=True) if x is not None)
    for x, y in zip(*(torch.autograd.grad(z.sum(), leaves) for z in (found, o)), strict=True):
        assert torch.equal(x, y)


def test_a_backward_under_autocast_is_the_same() -> None:
    arguments = Case(B=1, T=40, K=16, V=16).arguments(torch.float32)
    leaves = [arguments[name].requires_grad_() for name in TENSORS]
    o, _ = chunk_carve(**arguments)
    expected = torch.autograd.grad(o.sum(), leaves, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(o.sum(), leaves)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def saved_bytes(T: int) -> int:
    """Bytes that the graph of one call holds, the inputs left out."""
    arguments = Case(B=1, T=T, H=1, K=32, V=32, chunk_size=16).arguments(torch.float32)
    leaves = [arguments[name].requires_grad_() for name in TENSORS]
    inputs = {x.untyped_storage().data_ptr() for x in leaves}
    held: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        o, _ = chunk_carve(**arguments)
    assert o.grad_fn is not None
    return sum(size for at, size in held.items() if at not in inputs)


def test_backward_holds_one_state_a_segment() -> None:
    """Not the graph of every chunk: of a segment of 16 chunks, one memory of K V numbers and its content."""
    state = 4 * (32 * 32 + 32 * 3)
    assert saved_bytes(4 * SEGMENT) <= (4 + 1) * state
    assert saved_bytes(8 * SEGMENT) - saved_bytes(4 * SEGMENT) <= 4 * state


def test_backward_frees_each_segment() -> None:
    """Of the tensors that a backward makes, those of one segment are alive at a time."""
    alive, most = [0], [0]

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                alive[0] += 1
                most[0] = max(most[0], alive[0])
                weakref.finalize(out, lambda: alive.__setitem__(0, alive[0] - 1))
            return out

    def peak(T: int) -> int:
        arguments = Case(B=1, T=T, H=1, K=8, V=8, chunk_size=16).arguments(torch.float32)
        leaves = [arguments[name].requires_grad_() for name in TENSORS]
        gc.collect()
        alive[0] = most[0] = 0
        with Count():
            o, _ = chunk_carve(**arguments)
            o.sum().backward()
        assert all(x.grad is not None for x in leaves)
        return most[0]

    assert peak(8 * SEGMENT) <= peak(2 * SEGMENT) + 8 * 6  # the saved states, a handful of tensors a segment


def test_no_second_derivatives_by_chunks() -> None:
    arguments = Case(B=1, T=10).arguments()
    v = arguments["v"].requires_grad_()
    o, _ = chunk_carve(**arguments)
    with pytest.raises(NotImplementedError, match="a second derivative of chunk_carve"):
        torch.autograd.grad((o * v).sum(), [v], create_graph=True)


@both
def test_without_gradients_no_graph(op) -> None:
    arguments = Case(B=1, T=10).arguments()
    arguments["q"].requires_grad_()
    with torch.no_grad():
        o, state = op(**arguments, output_final_state=True)
    assert not o.requires_grad
    assert not state.memory.requires_grad
    with torch.inference_mode():
        assert torch.equal(op(**arguments)[0], o)


@both
def test_gradient_of_some_inputs_only(op) -> None:
    """Frozen inputs cost nothing and get nothing; the others get what they got before."""
    arguments = Case(B=1, T=40, content="mean", content_norm="rms").arguments()
    everything = dict(zip(TENSORS, bits(op, arguments)[-len(TENSORS) :], strict=True))
    for name in TENSORS:
        x = arguments[name].clone().requires_grad_()
        o, state = op(**arguments | {name: x}, output_final_state=True)
        (found,) = torch.autograd.grad(o.square().sum() + state.memory.sum(), [x])
        assert_close(found, everything[name], "op_float64_gradient", name)


@both
def test_compile_around_the_op(op) -> None:
    """The op is left as it is by torch.compile; what stands around it is compiled."""
    arguments = Case(B=1, T=20).arguments(torch.float32)

    def layer(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        o, _ = op(**arguments | {"q": 2 * q, "v": v + 1})
        return o.sin()

    q, v = (arguments[name].requires_grad_() for name in ("q", "v"))
    expected = layer(q, v)
    found = torch.compile(layer, backend="aot_eager")(q, v)
    assert_close(found, expected, "op_float32", "o")
    for x, y in zip(*(torch.autograd.grad(o.sum(), [q, v]) for o in (found, expected)), strict=True):
        assert_close(x, y, "op_float32_gradient", "gradient")
