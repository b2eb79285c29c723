"""Decoding: the recurrence in place, each sequence at its own position; the kernel beside float64."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from carve.ops import CarveState, chunk_carve, decode, decode_carve, recurrent_carve, slow
from carve.ops.kernels import cuda
from carve.ops.kernels import decode as kernel
from carve.ops.recurrence import Options, Projections, Tokens
from carve.ops.state import each
from tests.ops.cases import TENSORS, TOKEN_NAMES, Case, assert_close, assert_states_close, cases
from tests.tolerances import tolerance

few = settings(max_examples=25, derandomize=True, deadline=None)
CASE = Case(B=3, T=6, H=2, groups=2, K=5, V=4, chunk_size=4, started=True, content="mean", content_norm="rms")


def setting(case: Case, dtype: torch.dtype = torch.float64) -> tuple[dict, CarveState]:
    """Arguments of `decode_carve`, and a state to go with them."""
    arguments = replace(case, started=True).arguments(dtype)
    return arguments, arguments.pop("initial_state")


def copy(state: CarveState) -> CarveState:
    return CarveState(*each(Tensor.clone, state))


def same_bits(x: CarveState, y: CarveState) -> bool:
    return all(a is b is None or torch.equal(a, b) for a, b in zip(x, y, strict=True))


def cut(arguments: dict, start: int, stop: int, row: slice = slice(None)) -> dict:
    """The same arguments with only some tokens and rows."""
    names = (name for name in TOKEN_NAMES if arguments[name] is not None)
    return arguments | {name: arguments[name][row, start:stop] for name in names}


# -- what it computes --


@few
@given(cases(T=st.integers(0, 12), chunk_size=st.sampled_from([1, 3, 5, 64])))
def test_is_the_recurrence_in_place(case: Case) -> None:
    arguments, state = setting(case)
    expected, end = recurrent_carve(**arguments, initial_state=copy(state), output_final_state=True)
    kept = list(state)
    assert_close(decode_carve(**arguments, state=state), expected, "op_float64", "o")
    assert end is not None
    assert_states_close(state, end, "op_float64")
    assert all(x is y for x, y in zip(kept, state, strict=True))


@few
@given(cases(T=st.integers(1, 8), chunk_size=st.sampled_from([1, 3, 5])), st.data())
def test_each_sequence_takes_its_own_number_of_tokens(case: Case, data: st.DataObject) -> None:
    arguments, state = setting(case)
    lengths = data.draw(st.lists(st.integers(0, case.T), min_size=case.B, max_size=case.B))
    before = copy(state)
    o = decode_carve(**arguments, state=state, lengths=torch.tensor(lengths))
    for n, length in enumerate(lengths):
        alone = before.select(torch.tensor([n]))
        expected = decode_carve(**cut(arguments, 0, length, slice(n, n + 1)), state=alone)
        assert torch.equal(o[n : n + 1, :length], expected)
        assert not o[n, length:].any()
        assert same_bits(state.select(torch.tensor([n])), alone)


@pytest.mark.parametrize("content", ["mean", "read", None])
def test_a_draft_is_verified_and_rolled_back_to_every_token(content: str | None) -> None:
    arguments, state = setting(replace(CASE, content=content, T=5, chunk_size=3))
    before = copy(state)
    drafted = decode_carve(**arguments, state=state, update=False)
    assert same_bits(state, before)
    for accepted in range(6):
        moved, stepped = copy(before), copy(before)
        o = decode_carve(**arguments, state=moved, lengths=torch.full((CASE.B,), accepted))
        assert torch.equal(o[:, :accepted], drafted[:, :accepted])
        for t in range(accepted):
            decode_carve(**cut(arguments, t, t + 1), state=stepped)
        assert same_bits(moved, stepped)


def test_content_is_heard() -> None:
    """Or the tests above would show nothing of it."""
    for content in ("mean", "read"):
        arguments, state = setting(replace(CASE, content=content))
        silent = arguments | {"p_up": 0 * arguments["p_up"], "p_write": 0 * arguments["p_write"]}
        o, without = (decode_carve(**x, state=copy(state)) for x in (arguments, silent))
        assert (o - without).norm() > tolerance("op_content_effect") * o.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_outputs_have_the_dtype_of_v_and_the_state_float32(dtype: torch.dtype) -> None:
    arguments, state = setting(CASE, dtype)
    wide = {name: x.double() if isinstance(x, Tensor) else x for name, x in arguments.items()}
    expected = decode_carve(**wide, state=CarveState(*each(lambda x: x.double(), state[:3]), state.position.clone()))
    o = decode_carve(**arguments, state=state)
    assert o.dtype == dtype
    assert state.memory.dtype == torch.float32
    assert_close(o, expected, f"op_{str(dtype)[6:]}", "o")


def test_a_tangent_is_not_dropped() -> None:
    arguments, state = setting(CASE, torch.float32)
    with torch.no_grad(), forward_ad.dual_level():
        arguments["q"] = forward_ad.make_dual(arguments["q"], torch.ones_like(arguments["q"]))
        with pytest.raises(NotImplementedError, match="decoding has no forward-mode derivative"):
            decode_carve(**arguments, state=state)


# -- bad input --


def ints(*values: int) -> Tensor:
    return torch.tensor(values)


BAD = [
    ({"state": None}, "state is NoneType, expected a CarveState"),
    ({"k": torch.ones(3, 6, 2, 4)}, "k has shape [3, 6, 2, 4], expected [B, T, H, K] = [3, 6, 2, 5]"),
    ({"g": torch.ones(3, 6, 2, 5)}, "g has values from 1.0 to 1.0, expected finite log-decays <= 0"),
    ({"k": torch.ones(3, 6, 2, 5), "qk_l2norm": False}, "k has L2 norms up to 2.236, expected 1: pass qk_l2norm=True"),
    ({"content": "read"}, "state.content has shape [3, 4, 3], expected [N, HV, K, R] = [3, 4, 5, 3]"),
    ({"chunk_size": 1}, "expected values from 0 to below chunk_size = 1"),
    ({"update": 1}, "update is 1, expected True or False"),
    ({"lengths": [1, 2, 3]}, "lengths is list, expected a tensor"),
    ({"lengths": ints(1, 2, 3).int()}, "lengths has dtype torch.int32, expected torch.int64"),
    ({"lengths": ints(1, 2)}, "lengths has shape [2], expected [B] = [3]"),
    ({"lengths": ints(1, 7, 0)}, "lengths is [1, 7, 0], expected values from 0 to T = 6"),
    ({"lengths": ints(1, -1, 0)}, "lengths is [1, -1, 0], expected values from 0 to T = 6"),
    ({"backend": "triton"}, "backend is 'triton', expected one of 'auto', 'torch', 'cuda'"),
    ({"backend": "cuda"}, "backend is 'cuda', but the inputs are on cpu, expected a CUDA device"),
]


@pytest.mark.parametrize(("bad", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_input(bad: dict, message: str) -> None:
    arguments, state = setting(CASE, torch.float32)
    before = copy(state)
    with pytest.raises(ValueError, match=re.escape(message)):
        decode_carve(**{**arguments, "state": state, **bad})
    assert same_bits(state, before)


def test_a_state_that_cannot_be_updated_in_place() -> None:
    arguments, state = setting(CASE, torch.float32)
    state = state._replace(memory=state.memory.mT.contiguous().mT)
    with pytest.raises(ValueError, match=re.escape("state.memory has strides")):
        decode_carve(**arguments, state=state)


@pytest.mark.parametrize("name", [*TENSORS, "state.memory"])
def test_gradients_are_refused(name: str) -> None:
    arguments, state = setting(CASE, torch.float32)
    (state.memory if name == "state.memory" else arguments[name]).requires_grad_()
    with pytest.raises(ValueError, match=re.escape(f"{name} requires a gradient, which decoding does not give")):
        decode_carve(**arguments, state=state)
    with torch.no_grad():
        assert not decode_carve(**arguments, state=state).requires_grad


# -- the way to the kernel; plain torch stands in for it, and a description for the device --


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets what device there is."""

    def describe(capability: int = 90) -> None:
        room = 232_448 if capability >= 90 else 166_912
        kernel.choose_split.cache_clear()
        monkeypatch.setattr(kernel, "facts", lambda index: cuda.Device("a device", capability, room, 132, None))
        monkeypatch.setattr(torch.version, "cuda", "13.0")

    describe()
    yield describe
    kernel.choose_split.cache_clear()


@pytest.mark.parametrize(
    ("V", "content", "capability", "expected"),
    [
        (128, "mean", 90, 4),
        (256, "read", 90, 4),
        (64, "mean", 90, 4),
        (32, "mean", 90, 2),  # a program has at least 16 columns
        (96, "mean", 90, 2),
        (128, "mean", 80, 1),  # no clusters
        (128, "blind", 80, 4),  # none needed
    ],
)
def test_programs_that_share_a_head(
    device: Callable[..., None], V: int, content: str, capability: int, expected: int
) -> None:
    device(capability)
    assert kernel.choose_split(128, V, 16, content, 4, 0) == expected


def test_states_that_do_not_fit_into_registers_are_split_or_refused(device: Callable[..., None]) -> None:
    assert kernel.choose_split(256, 256, 16, "read", 4, 0) == 4
    device(80)
    assert kernel.choose_split(256, 256, 16, "read", 4, 0) is None


def inputs(case: Case, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> tuple[Tokens, Projections, Options]:
    """What the choice of a path looks at; on a GPU that need not be there, without storage."""
    arguments = case.arguments(dtype)
    with FakeTensorMode():
        fake = {
            n: torch.empty(y.shape, dtype=dtype, device=device) for n, y in arguments.items() if isinstance(y, Tensor)
        }
    x = Tokens(*(fake.get(name) for name in TOKEN_NAMES))  # type: ignore[arg-type]
    p = Projections(fake.get("p_down"), fake.get("p_up"), fake.get("p_write"))
    return x, p, Options(case.content, None, case.chunk_size, 1.0, False, False, torch.float32)


WIDE = Case(B=1, T=1, K=64, V=64, R=16)


@pytest.mark.parametrize("case", [WIDE, replace(WIDE, K=16, V=256, R=64), replace(WIDE, K=240, V=80, content=None)])
def test_what_the_kernel_serves(case: Case, device: Callable[..., None]) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert kernel.why_not(*inputs(case, dtype, "cuda")) is None


@pytest.mark.parametrize(
    ("case", "dtype", "capability", "message"),
    [
        (WIDE, torch.float64, 90, "q has dtype torch.float64, expected torch.bfloat16 or torch.float16 or"),
        (replace(WIDE, K=40), torch.float16, 90, "K = 40 and V = 64, expected multiples of 16 up to 256"),
        (replace(WIDE, V=272), torch.float16, 90, "K = 64 and V = 272, expected multiples of 16 up to 256"),
        (replace(WIDE, R=65), torch.float16, 90, "p_down has R = 65, expected at most 64"),
        (replace(WIDE, chunk_size=2**31), torch.float16, 90, "chunk_size is 2147483648, expected at most"),
        (WIDE, torch.float16, 75, "a device has compute capability 7.5, expected at least 8.0"),
        (replace(WIDE, K=256, V=256), torch.float16, 80, "K = 256, V = 256 and R = 16 are too large for a device"),
    ],
)
def test_what_the_kernel_does_not_serve(
    case: Case, dtype: torch.dtype, capability: int, message: str, device: Callable[..., None]
) -> None:
    device(capability)
    assert (kernel.why_not(*inputs(case, dtype, "cuda")) or "").startswith(message)


def test_auto_says_that_it_is_slow_on_a_gpu(device: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CARVE_STRICT", raising=False)
    slow.warn_once.cache_clear()
    wanted = inputs(replace(WIDE, K=40), device="cuda")
    with pytest.warns(UserWarning, match="the op runs in plain torch, .* because 'cuda' does not serve it: K = 40"):
        assert decode.choose_backend("auto", decode.PATHS, *wanted) == "torch"
    monkeypatch.setenv("CARVE_STRICT", "1")
    with pytest.raises(ValueError, match="CARVE_STRICT forbids it"):
        decode.choose_backend("auto", decode.PATHS, *wanted)
    monkeypatch.setattr(kernel, "why_not", lambda *_: None)
    monkeypatch.setattr(kernel, "build", lambda *_: "the compiler refused")
    with pytest.raises(RuntimeError, match="backend is 'cuda', but the compiler refused"):
        decode.choose_backend("cuda", decode.PATHS, *wanted)


def test_rows_of_tokens_are_read_where_they_lie() -> None:
    x = torch.zeros(3, 5, 7, 4)
    for y, row in ((x, 28), (x[:, :1], 140), (x[:1, ::2], 56), (x[:, 0].unsqueeze(1), 140), (x[:, :, 2:4], 28)):
        assert kernel.in_rows(y)[0] is y
        assert kernel.in_rows(y)[1] == row
    for y in (x[:, ::2], x.transpose(0, 1), x[..., ::2], x[:, :, :1].expand(-1, -1, 7, -1)):
        laid_out, row = kernel.in_rows(y)
        assert laid_out.is_contiguous()
        assert torch.equal(laid_out, y)
        assert row == y.shape[2] * y.shape[3]


@pytest.fixture
def stand_in(device: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Lets CPU tensors go the kernel's way; collects the shapes of v that came along."""
    calls: list[tuple[int, ...]] = []

    def run(
        x: Tokens, p: Projections, lengths: Any, state: CarveState, options: Options, update: bool, o: Tensor
    ) -> None:
        calls.append(tuple(x.v.shape))
        o.copy_(decode.decode_in_torch(x, p, state, options, lengths, update))

    monkeypatch.setattr(kernel, "why_not", lambda *_: None)
    monkeypatch.setattr(kernel, "build", lambda *_: None)
    monkeypatch.setattr(kernel, "run", run)
    return calls


ON_KERNEL = replace(CASE, K=16, V=16)


@pytest.mark.parametrize("content", ["mean", "read", None])
def test_the_operator(content: str | None, stand_in: list[tuple[int, ...]]) -> None:
    arguments, state = setting(replace(ON_KERNEL, content=content), torch.float32)
    x, p = Tokens(*(arguments[n] for n in TOKEN_NAMES)), [arguments[n] for n in ("p_down", "p_up", "p_write")]
    numbers = (content or "blind", "rms", CASE.chunk_size, 0.3, True, False)
    for lengths, update in product((None, ints(1, 0, 6)), (True, False)):
        torch.library.opcheck(torch.ops.carve.decode.default, (*x, *p, lengths, *copy(state), *numbers, update))


@pytest.mark.parametrize("content", ["mean", "read", None])
def test_compiled_into_one_graph(content: str | None, stand_in: list[tuple[int, ...]]) -> None:
    arguments, state = setting(replace(ON_KERNEL, content=content), torch.float32)
    expected, at_end = decode_carve(**arguments, state=(eager := copy(state)), lengths=ints(6, 2, 1)), eager
    run = torch.compile(decode_carve, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        o = run(**arguments, state=state, lengths=ints(6, 2, 1), backend="cuda")
    assert stand_in == [(3, 6, 4, 16)]
    assert torch.equal(o, expected)
    assert same_bits(state, at_end)


def test_in_inference_mode(stand_in: list[tuple[int, ...]]) -> None:
    arguments, state = setting(ON_KERNEL, torch.float32)
    expected = decode_carve(**arguments, state=copy(state))
    with torch.inference_mode():
        for begin in (copy(state), state):
            assert torch.equal(decode_carve(**arguments, state=begin, backend="cuda"), expected)


def test_no_tokens_and_no_sequences(stand_in: list[tuple[int, ...]]) -> None:
    for case in (replace(ON_KERNEL, T=0), replace(ON_KERNEL, B=0)):
        arguments, state = setting(case, torch.float32)
        before = copy(state)
        assert decode_carve(**arguments, state=state, backend="cuda").shape == (case.B, case.T, 4, 16)
        assert same_bits(state, before)
    assert not stand_in


# -- the kernel --


BATCH = Case(B=5, T=3, H=2, groups=2, K=128, V=128, R=16, chunk_size=4, content_norm="rms")
KERNEL_CASES = {
    "one token": replace(BATCH, T=1),
    "one sequence": replace(BATCH, B=1, H=1, groups=1),
    "many sequences": replace(BATCH, B=300, T=2, K=64, V=64),
    "draft": replace(BATCH, B=2, T=16, grouped=True, content_norm=None),
    "chunks of one": replace(BATCH, chunk_size=1, allow_neg_eigval=True),
    "unit keys": replace(BATCH, qk_l2norm=False, scale=0.7),
    "no write gate": replace(BATCH, write=None),
    "write gate blind": replace(BATCH, write="token", grouped=True),
    "erase gate blind": replace(BATCH, erase=False),
    "64 x 64": replace(BATCH, K=64, V=64, R=7),
    "64 x 128": replace(BATCH, K=64, R=33),
    "128 x 64": replace(BATCH, V=64, R=64),
    "48 x 16": replace(BATCH, K=48, V=16, R=5, groups=3),
    "16 x 96": replace(BATCH, K=16, V=96, R=1),
    "256 x 256": replace(BATCH, B=2, K=256, V=256),
    "strong decay": replace(BATCH, decay="mixed"),
    "saturated gates": replace(BATCH, gates="infinite"),
}


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh tensors are full of NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def on_gpu(arguments: dict) -> dict:
    return {name: x.cuda() if isinstance(x, Tensor) else x for name, x in arguments.items()}


def state_on_gpu(state: CarveState) -> CarveState:
    return CarveState(*each(Tensor.cuda, state))


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("content", ["mean", "read", None])
@pytest.mark.parametrize("case", KERNEL_CASES.values(), ids=KERNEL_CASES.keys())
def test_kernel_is_the_recurrence(case: Case, content: str | None, dtype: torch.dtype) -> None:
    arguments, state = setting(replace(case, content=content), dtype)
    wide = {name: x.double() if isinstance(x, Tensor) else x for name, x in arguments.items()}
    there = on_gpu(arguments)
    taken = torch.arange(case.B) % (case.T + 1)
    for lengths in (None, taken):
        expected_end = CarveState(*each(Tensor.double, state[:3]), state.position.clone())
        expected = decode_carve(**wide, state=expected_end, lengths=lengths)
        options: dict = {"lengths": None if lengths is None else lengths.cuda(), "backend": "cuda"}
        found = state_on_gpu(state)
        o = decode_carve(**there, state=found, **options)
        assert o.dtype == dtype
        assert_close(o.cpu(), expected, f"op_{str(dtype)[6:]}", "o")
        assert_states_close(CarveState(*each(Tensor.cpu, found)), expected_end, "op_float32")

        untouched, again = state_on_gpu(state), state_on_gpu(state)
        assert torch.equal(decode_carve(**there, state=untouched, update=False, **options), o)
        assert same_bits(CarveState(*each(Tensor.cpu, untouched)), state)
        assert torch.equal(decode_carve(**there, state=again, **options), o)
        assert same_bits(again, found)


@pytest.mark.gpu
@pytest.mark.parametrize("content", ["mean", "read", None])
@pytest.mark.parametrize("V", [128, 256])
def test_a_sequence_has_the_same_bits_in_any_batch(V: int, content: str | None) -> None:
    """In a large one, programs fetch the state of others ahead."""
    arguments, state = setting(replace(BATCH, V=V, content=content), torch.float32)
    arguments, state = on_gpu(arguments), state_on_gpu(state)
    B = state.position.shape[0]

    def repeat(x: Tensor) -> Tensor:
        return x.repeat(80, *[1] * (x.dim() - 1))

    larger = {n: repeat(x) if n in TOKEN_NAMES and x is not None else x for n, x in arguments.items()}
    others = CarveState(*(None if x is None else repeat(x) for x in state))
    o = decode_carve(**arguments, state=state, backend="cuda")
    o_larger = decode_carve(**larger, state=others, backend="cuda")
    assert torch.equal(o_larger[-B:], o)
    assert same_bits(CarveState(*(None if x is None else x[-B:] for x in others)), state)


@pytest.mark.gpu
@pytest.mark.parametrize("content", ["mean", "read", None])
@pytest.mark.parametrize("split", kernel.SPLITS)
def test_kernel_in_every_split(split: int, content: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "choose_split", lambda *_: split)
    test_kernel_is_the_recurrence(BATCH, content, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("content", ["mean", "read", None])
def test_kernel_in_a_cuda_graph_for_ten_thousand_steps(content: str | None) -> None:
    steps = 10_000
    arguments, _ = setting(replace(BATCH, B=3, T=steps, groups=1, content=content, chunk_size=64), torch.bfloat16)
    arguments = on_gpu(arguments)
    for name in ("p_up", "p_write"):  # or gates shut, and rounding opens them
        arguments[name] = arguments[name] if content is None else 0.05 * arguments[name]
    whole, end = chunk_carve(**arguments, output_final_state=True, backend="cuda")
    assert end is not None
    state = CarveState(*each(torch.zeros_like, end))
    token = {name: x.clone() for name, x in cut(arguments, 0, 1).items() if name in TOKEN_NAMES and x is not None}
    decode_carve(**{**arguments, **token}, state=copy(state))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = decode_carve(**{**arguments, **token}, state=state)
    found = torch.empty_like(whole)
    for t in range(steps):
        for name, x in token.items():
            x.copy_(arguments[name][:, t : t + 1])
        graph.replay()
        found[:, t : t + 1] = o
    assert torch.equal(state.position, end.position)
    for x, y in ((found, whole), (found[:, -500:], whole[:, -500:]), (state.memory, end.memory)):
        assert (x.double() - y.double()).norm() <= tolerance("op_kernel") * y.double().norm()


@pytest.mark.gpu
def test_kernel_beyond_65535_heads_and_32_bit_offsets() -> None:
    arguments, state = setting(replace(BATCH, B=1, T=1, H=16, groups=1, content="read"), torch.bfloat16)
    arguments, state = on_gpu(arguments), state_on_gpu(state)
    expected_end = copy(state)
    expected = decode_carve(**arguments, state=expected_end)
    B = 9_000  # 2.4e9 numbers in the memory
    many = CarveState(*each(lambda x: x.repeat(B, *[1] * (x.dim() - 1)), state))
    arguments |= {n: arguments[n].expand(B, -1, *arguments[n].shape[2:]) for n in TOKEN_NAMES}
    o = decode_carve(**arguments, state=many)
    for n in (0, 4_999, B - 1):
        assert torch.equal(o[n : n + 1], expected)
        assert same_bits(many.select(torch.tensor([n])), expected_end)


@pytest.mark.gpu
def test_kernel_reads_views_and_other_streams() -> None:
    arguments, state = setting(replace(BATCH, groups=1, T=1, content="mean"), torch.bfloat16)
    arguments, state = on_gpu(arguments), state_on_gpu(state)
    again = copy(state)
    expected = decode_carve(**arguments, state=state)
    joined = torch.cat([arguments[name].flatten(2) for name in ("q", "k", "v")], dim=-1)
    views = {n: x.view(5, 1, 2, 128) for n, x in zip("qkv", joined.split([256] * 3, dim=-1), strict=True)}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        o = decode_carve(**{**arguments, **views}, state=again)
    stream.synchronize()
    assert torch.equal(o, expected)
    assert same_bits(again, state)
