"""The portable Triton kernels against the float64 recurrence: in Triton's interpreter, or on a GPU if there is one.

Tests marked gpu take the shapes and options of `tests/ops/test_cuda.py`, and more.
"""

import ast
import importlib
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")  # which has no wheels but for Linux

from triton import language as tl
from triton.runtime import interpreter

from carve.ops import CarveState, chunk_carve, recurrent_carve
from carve.ops.kernels import portable
from carve.ops.kernels.portable import LAUNCHES, Launch
from carve.ops.recurrence import Options, Projections, Tokens
from tests.ops.cases import Case, assert_close, assert_states_close
from tests.ops.kernel_cases import assert_as_exact as assert_kernel_as_exact
from tests.ops.kernel_cases import draw, in_float64, off, run
from tests.ops.test_chunked import assert_content_is_heard, gradients
from tests.ops.test_chunked import run as run_op
from tests.ops.test_cuda import LENGTHS
from tests.tolerances import tolerance

# strong blocks overflow in the launch that takes every block for a mild one, before the next writes them anew
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONTENTS = [(None, None), ("mean", None), ("mean", "rms"), ("read", None), ("read", "rms")]
chunk_portable = partial(chunk_carve, backend="triton")
contents = pytest.mark.parametrize("content", [None, "mean", "read"])
BASE = Case(
    B=1, T=37, H=1, groups=2, K=16, V=32, chunk_size=16, content=None, write="content", grouped=True, started=True
)


@pytest.fixture(autouse=True)
def scalars_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy 2.4 takes no array of one element for a number, which Triton 3.6's interpreter relies on in loops."""
    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_and_mend)


@pytest.fixture
def low_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter, too, multiplies bfloat16 as a GPU does: rounded to the nearest, added up in float32."""
    if DEVICE != "cpu":
        return
    convert, begin = interpreter._convert_float, portable.Plan.__init__

    def widen(x: np.ndarray) -> np.ndarray:  # a bfloat16 is kept as the upper half of a float32
        return (x.astype(np.uint32) << 16).view(np.float32)

    def convert_well(x: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if (source, target) == (tl.bfloat16, tl.float32):
            return widen(x.view(np.uint16)).view(np.uint32)
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(x.view(np.float32).copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)
        return convert(x, source, target, mode)

    def multiply(_: Any, a: Any, b: Any, to: Any, *__: Any) -> Any:
        a, b = (widen(x.data) if x.dtype.scalar == tl.bfloat16 else x.data for x in (a, b))
        with np.errstate(invalid="ignore"):  # of strong blocks, see above
            return interpreter.TensorHandle(np.matmul(a, b, dtype=to.data.dtype) + to.data, to.dtype.scalar)

    def plan(self: Any, *arguments: Any) -> None:
        begin(self, *arguments)
        self.low = torch.bfloat16

    monkeypatch.setattr(interpreter, "_convert_float", convert_well)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", multiply)
    monkeypatch.setattr(portable.Plan, "__init__", plan)


# -- small --


def move(arguments: dict) -> dict:
    """To the device."""

    def at(y: Any) -> Any:
        if isinstance(y, CarveState):
            return CarveState(*map(at, y))
        return y.to(DEVICE) if isinstance(y, torch.Tensor) else y

    return {name: at(y) for name, y in arguments.items()}


def bring(y: Any) -> Any:
    """To the CPU."""
    if isinstance(y, dict):
        return {name: x.cpu() for name, x in y.items()}
    return CarveState(*map(bring, y)) if isinstance(y, CarveState) else None if y is None else y.cpu()


def assert_case(case: Case, dtype: torch.dtype = torch.float32, **more: Any) -> None:
    """Outputs, the final state and all gradients are those of the recurrence."""
    arguments = case.arguments(dtype) | more
    exact = in_float64(arguments)
    o, state = run_op(chunk_portable, move(arguments))
    expected, final = run_op(recurrent_carve, exact)
    if case.audible:
        assert_content_is_heard(exact, expected)
    name = str(dtype).removeprefix("torch.")
    rounded = dtype == torch.bfloat16 or (dtype == torch.float16 and DEVICE == "cuda")
    assert_close(o.cpu(), expected, "op_portable_operands" if rounded else f"op_{name}", "o")
    assert_states_close(bring(state), final, "op_portable_operands" if rounded else "op_float32")
    found, wanted = bring(gradients(chunk_portable, move(arguments))), gradients(recurrent_carve, exact)
    for tensor in wanted:
        lower = found[tensor].dtype == dtype and dtype != torch.float32
        which = f"op_{name}" if lower else "op_float32_gradient"
        assert_close(found[tensor], wanted[tensor], "op_portable_operands" if rounded else which, tensor)


@pytest.mark.parametrize(("content", "norm"), CONTENTS)
def test_contents(content: str | None, norm: str | None) -> None:
    assert_case(replace(BASE, content=content, content_norm=norm))


@pytest.mark.parametrize(("content", "C", "K"), [(None, 64, 32), ("mean", 7, 16), ("read", 20, 16)])
def test_strong_decay(content: str | None, C: int, K: int) -> None:
    assert_case(replace(BASE, content=content, content_norm="rms", chunk_size=C, decay="mixed", K=K, V=16, groups=1))


@pytest.mark.parametrize("decay", ["none", "extreme"])
def test_uniform_decay(decay: str) -> None:
    assert_case(replace(BASE, content="read", decay=decay, groups=1, T=20))


@pytest.mark.parametrize("strong_at", [0, 15])
def test_a_strong_decay_costs_no_precision_behind_it(strong_at: int) -> None:
    case = replace(BASE, groups=1, T=32, started=False)
    arguments = case.arguments(torch.float32)
    arguments["g"][:, strong_at::16] = -3e4
    assert_case(case, g=arguments["g"])


@pytest.mark.parametrize("content", ["mean", "read"])
def test_gates_of_exactly_zero_and_one(content: str) -> None:
    assert_case(replace(BASE, content=content, content_norm="rms", gates="infinite", groups=1))


@pytest.mark.parametrize("content", ["mean", "read"])
def test_packed_sequences(content: str) -> None:
    lengths = torch.tensor([0, 1, 16, 0, 20])
    case = replace(BASE, content=content, groups=1, chunk_size=5, write="token", V=16)
    states = replace(case, B=5).arguments(torch.float32)["initial_state"]
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    assert_case(case, initial_state=states, cu_seqlens=bounds.int())


@pytest.mark.parametrize(("content", "R"), [("mean", 1), ("read", 1), ("read", 40)])
def test_ranks_in_float32(content: str, R: int) -> None:
    # of a single number the norm leaves the sign, and of its gradient next to nothing
    assert_case(replace(BASE, content=content, content_norm="rms" if R > 1 else None, R=R, groups=1))


@pytest.mark.parametrize("content", ["mean", "read"])
def test_a_state_too_large_for_registers(content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("content", "reverse"):
        monkeypatch.setitem(portable.LAUNCHES, name, {256: Launch(1, 1, 16)})
    case = replace(BASE, content=content, content_norm="rms", V=48, groups=1, T=20, chunk_size=10)
    assert_case(case)
    assert_case(replace(case, started=False))


def test_little_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """States that a program cannot hold whole lie in memory; what has no room at all is refused."""
    monkeypatch.setattr(portable, "shared_room", lambda device: 101376)
    assert "expected at most 128 with 101376 bytes" in portable.why_not(*described(256, 16, **WIDE), MEAN)
    assert portable.why_not(*described(128, 128, **WIDE), MEAN) is None
    tiles = []
    launch = portable.Plan.launch

    def look(self: Any, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        tiles.append((kernel.__name__, constants.get("BV")))
        launch(self, kernel, programs, *arguments, **constants)

    monkeypatch.setattr(portable.Plan, "launch", look)
    assert_case(replace(BASE, content="read", content_norm="rms", K=16, V=96, T=18, groups=1, chunk_size=9))
    assert {tile for name, tile in tiles if name in ("run_blocks", "reverse_blocks")} == {32}


@pytest.mark.parametrize("content", ["mean", "read"])
def test_sums_over_many_programs(content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RUN", "RUN_CHUNKS"):
        monkeypatch.setattr(portable, name, 2)
    monkeypatch.setitem(portable.LAUNCHES, "keys", {256: Launch(1, 1, 16)})
    assert_case(replace(BASE, content=content, content_norm="rms", K=48, V=80, chunk_size=6, groups=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision(dtype: torch.dtype) -> None:
    assert_case(replace(BASE, content="read", K=48, V=16, groups=1, qk_l2norm=False, allow_neg_eigval=True), dtype)


@pytest.mark.usefixtures("low_operands")
@pytest.mark.parametrize(("content", "decay"), [(None, "mixed"), ("mean", "weak"), ("read", "weak")])
def test_operands_rounded_as_on_a_gpu(content: str | None, decay: str) -> None:
    arguments = draw([75, 30], H=1, K=32, V=48, R=16, content=content, decay=decay, C=32, started=True, device=DEVICE)
    assert_as_exact(arguments)


@pytest.mark.parametrize("content", ["mean", "read", None])
@pytest.mark.parametrize(("B", "T"), [(2, 0), (0, 5)])
def test_nothing_to_do(content: str | None, B: int, T: int) -> None:
    """The gradient of a state goes through where there are no tokens; those of shared heads are as empty as they."""
    assert_case(Case(B=B, T=T, K=16, V=16, groups=2, content=content, content_norm="rms", started=True))


def test_no_write_gate() -> None:
    assert_case(replace(BASE, content="mean", write=None, scale=0.3))


@pytest.mark.parametrize("content", ["mean", "read"])
def test_projections_of_zero_give_the_bits_of_the_blind_op(content: str) -> None:
    arguments = replace(BASE, content=content, started=False, T=33, groups=1).arguments(torch.float32)
    arguments = move(arguments | {name: torch.zeros_like(arguments[name]) for name in ("p_up", "p_write")})
    blind = arguments | {"p_down": None, "p_up": None, "p_write": None}
    o, state = run_op(chunk_portable, arguments)
    o_blind, state_blind = run_op(chunk_portable, blind)
    assert torch.equal(o, o_blind)
    assert torch.equal(state.memory, state_blind.memory)
    found = bring(gradients(chunk_portable, arguments, state_too=False))
    for name, x in bring(gradients(chunk_portable, blind, state_too=False)).items():
        assert torch.equal(found[name], x), name


def test_the_operator_keeps_its_promises() -> None:
    """Schema, fake tensors and autograd registration."""
    arguments = move(replace(BASE, content="mean", T=5, groups=1, started=False).arguments(torch.float32))
    tensors = [arguments[name].requires_grad_() for name in ("q", "k", "v", "g", "e", "w", "p_down", "p_up", "p_write")]
    inputs = (*tensors, *[None] * 5, "mean", False, 16, 1.0, 1.0, True, True)
    torch.library.opcheck(portable.forward.op, inputs, test_utils=("test_schema", "test_faketensor"))


# -- what the kernels serve --


def described(K: int = 64, V: int = 128, R: int = 16, device: str = DEVICE, **dtypes: torch.dtype) -> tuple[Any, Any]:
    """Inputs as `why_not` looks at them."""

    def tensor(name: str, *shape: int) -> Any:
        dtype = dtypes.get(name, torch.bfloat16)
        return SimpleNamespace(shape=torch.Size(shape), dtype=dtype, device=torch.device(device))

    q, k, g, e = (tensor(name, 1, 5, 2, K) for name in "qkge")
    x = Tokens(q, k, tensor("v", 1, 5, 2, V), g, e, tensor("w", 1, 5, 2))
    return x, Projections(tensor("p_down", 2, V, R), tensor("p_up", 2, R, K), None)


OPTIONS = Options("read", None, 64, 1.0, False, False, torch.float32)
MEAN = OPTIONS._replace(content="mean")
WIDE = dict.fromkeys(("q", "k", "v"), torch.float32)


@pytest.mark.parametrize(("K", "V"), [(16, 256), (48, 80), (256, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_it_serves(K: int, V: int, dtype: torch.dtype) -> None:
    assert portable.why_not(*described(K, V, 64, q=dtype, k=dtype, v=dtype), OPTIONS) is None


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"device": "meta"}, "the inputs are on meta, expected a GPU"),
        ({"v": torch.float32}, "q has dtype torch.bfloat16, expected q, k and v all in one of torch.bfloat16, "),
        ({"k": torch.float64}, "k has dtype torch.float64, expected q, k and v all in one of torch.bfloat16, "),
        ({"K": 24}, "K = 24 and V = 128, expected multiples of 16 up to 256"),
        ({"V": 272}, "K = 64 and V = 272, expected multiples of 16 up to 256"),
        ({"R": 65}, "p_down has R = 65, expected at most 64"),
    ],
)
def test_what_it_does_not_serve(inputs: dict[str, Any], message: str) -> None:
    assert (portable.why_not(*described(**inputs), OPTIONS) or "").startswith(message)


def test_too_long_chunks() -> None:
    said = portable.why_not(*described(), OPTIONS._replace(chunk_size=2**31))
    assert said == f"chunk_size is 2147483648, expected at most {2**30}"


def test_an_old_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton.__version__", "3.5.1")
    assert portable.why_not(*described(), OPTIONS) == "Triton is 3.5.1, expected at least 3.6"


# -- the launch table --


def read_table(text: str) -> dict[str, dict[int, Launch]]:
    """LAUNCHES as Python finds it in portable.py's text."""
    (value,) = (
        node.value for node in ast.parse(text).body if isinstance(node, ast.AnnAssign) and node.target.id == "LAUNCHES"
    )
    return eval(compile(ast.Expression(value), "portable.py", "eval"), {"Launch": Launch})


def test_the_launch_table_can_be_measured_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The script in `benchmarks`, on a few tokens and without its processes; one configuration gives wrong results."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    script = importlib.import_module("triton_table")
    small = {"B": 1, "T": 20, "H": 1, "R": 4, "ROUNDS": 2, "FINAL": 1, "STAGES": (1,), "WARPS": {32: (1,)}}
    for name, value in {**small, "LAUNCHES": {name: dict(sizes) for name, sizes in LAUNCHES.items()}}.items():
        monkeypatch.setattr(script, name, value)
    monkeypatch.setattr(portable, "LAUNCHES", script.LAUNCHES)
    wrong = ("reverse", 32, Launch(1, 1))

    def compile_all(found: list, deadline: float) -> list:
        sample = script.sample
        tried = {}
        for candidate in found:
            if candidate == wrong:
                monkeypatch.setattr(script, "sample", lambda x: [1.1 * y for y in sample(x)])
            tried[candidate] = script.try_candidate(candidate)
            monkeypatch.setattr(script, "sample", sample)
        assert {c: reason for c, reason in tried.items() if reason} == {wrong: "wrong results"}
        return [c for c in found if not tried[c]]

    monkeypatch.setattr(script, "compile_all", compile_all)
    records = script.measure([32], minutes=1)
    assert {record["kernel"] for record in records} == set(LAUNCHES)
    assert not any(record["kernel"] == "reverse" and record["launch"] == vars(wrong[2]) for record in records)
    for name, sizes in script.LAUNCHES.items():
        fastest = next(record for record in records if record["kernel"] == name)
        assert vars(sizes[32]) == fastest["launch"]
        assert len(fastest["ms"]) == small["ROUNDS"]

    text = Path(portable.__file__).read_text(encoding="utf-8")
    written = script.replace_table(text, script.table())
    assert read_table(written) == script.LAUNCHES
    assert script.replace_table(written, "") == script.replace_table(text, "")  # the rest stays
    with pytest.raises(ValueError, match="0 tables LAUNCHES, expected one"):
        script.replace_table(script.replace_table(text, ""), script.table())

    before = json.loads(script.RESULTS.read_text(encoding="utf-8"))
    merged = script.merge({**before, "32": "older"}, records, {"system": "this one"})
    contents = [None, "mean", "read"]
    assert merged == {**before, "32": {"system": "this one", "contents": contents, "launches": records}}


# -- on a GPU --


assert_as_exact = partial(assert_kernel_as_exact, backend="triton")


SIZES = [(16, 16), (32, 32), (64, 64), (96, 96), (128, 128), (256, 256), (16, 128), (128, 48), (64, 256), (256, 64)]
SHAPES = [(K, V, content, "rms", "bfloat16") for K, V in SIZES for content in (None, "mean", "read")]
SHAPES += [(128, 128, content, None, "bfloat16") for content in ("mean", "read")]
SHAPES += [(K, V, content, "rms", "float16") for K, V in ((128, 128), (96, 96)) for content in (None, "mean", "read")]


@pytest.mark.gpu
@pytest.mark.parametrize(("K", "V", "content", "norm", "dtype"), SHAPES)
def test_shapes_and_dtypes(K: int, V: int, content: str | None, norm: str | None, dtype: str) -> None:
    norm = norm if content else None
    assert_as_exact(draw([300, 211], K=K, V=V, dtype=getattr(torch, dtype), content=content, norm=norm))


@pytest.mark.gpu
@contents
@pytest.mark.parametrize(("K", "V"), [(32, 32), (128, 128), (256, 256)])
def test_float32(content: str | None, K: int, V: int) -> None:
    arguments = draw([100, 90], K=K, V=V, dtype=torch.float32, content=content, started=True, decay="mixed")
    assert_as_exact(arguments, bound="op_kernel_float32")


@pytest.mark.gpu
@contents
@pytest.mark.parametrize("size", [64, 128])
def test_packed_sequences_with_grouped_heads_and_states(content: str | None, size: int) -> None:
    assert_as_exact(draw(LENGTHS, groups=2, grouped=True, K=size, V=size, R=7, content=content, started=True))


@pytest.mark.gpu
@contents
@pytest.mark.parametrize("decay", ["0", "-5", "-50", "-316", "mixed"])
def test_decays(content: str | None, decay: str) -> None:
    # nothing but the last token is left of a memory that decays so: its norm's direction is all rounding
    forgets = decay not in ("0", "mixed")
    norm = None if forgets and content == "read" else "rms"
    arguments = draw([200, 131], H=4, content=content, norm=norm, decay=decay, started=decay == "mixed")
    assert_as_exact(arguments, heard=not forgets)


@pytest.mark.gpu
@contents
def test_gates_at_0_and_1(content: str | None) -> None:
    assert_as_exact(draw([300, 100], H=4, content=content, gates="shut or open"))


@pytest.mark.gpu
@contents
@pytest.mark.parametrize("C", [1, 16, 17, 100, 512])
def test_chunk_sizes(content: str | None, C: int) -> None:
    assert_as_exact(draw([150 if C < 16 else 700], content=content, C=C, started=True, seed=C))


@pytest.mark.gpu
@pytest.mark.parametrize("content", ["mean", "read"])
@pytest.mark.parametrize(("size", "R"), [(64, 7), (64, 17), (64, 40), (64, 64), (128, 64), (256, 64)])
def test_ranks(content: str, size: int, R: int) -> None:
    assert_as_exact(draw([200], R=R, K=size, V=size, content=content))


@pytest.mark.gpu
@pytest.mark.parametrize("others", [-1.0, -100.0], ids=["mild", "strong"])
def test_a_decay_that_is_no_number_is_heard(others: float) -> None:
    arguments = draw([40])
    arguments["g"][0, 20, 0, 3], arguments["g"][0, 25, 0, 7] = torch.nan, others
    o = chunk_carve(**arguments, backend="triton")[0]
    assert o[:, :16].isfinite().all()
    assert o[:, 20:, 0].isnan().all()


@pytest.mark.gpu
@contents
def test_no_write_gate_and_strong_erasure(content: str | None) -> None:
    assert_as_exact(draw([300], content=content, write=False, neg=True, C=32))


@pytest.fixture
def poison() -> Iterator[None]:
    """New memory is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3, device="cuda").isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def assert_same_bits(found: tuple, expected: tuple) -> None:
    assert torch.equal(found[0], expected[0])
    assert all(x is y or torch.equal(x, y) for x, y in zip(found[1], expected[1], strict=True))
    assert all(torch.equal(found[2][name], dy) for name, dy in expected[2].items())


@pytest.mark.gpu
@contents
@pytest.mark.parametrize("size", [64, 128])
def test_same_bits_beside_another_kernel(content: str | None, size: int) -> None:
    arguments = draw(LENGTHS, groups=2, K=size, V=size, content=content, decay="mixed", started=True)
    first = run(chunk_carve, arguments, backend="triton")
    beside, a = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda")
    for _ in range(50):
        with torch.cuda.stream(beside):
            a = (a @ a).clamp(-1, 1)
        assert_same_bits(run(chunk_carve, arguments, backend="triton"), first)


@pytest.mark.gpu
@contents
@pytest.mark.parametrize("size", [48, 128])
def test_every_element_is_written(content: str | None, size: int, request: pytest.FixtureRequest) -> None:
    arguments = draw(LENGTHS, groups=2, K=size, V=size, content=content, started=True)
    plain = run(chunk_carve, arguments, backend="triton")
    request.getfixturevalue("poison")
    assert_same_bits(run(chunk_carve, arguments, backend="triton"), plain)


@pytest.mark.gpu
@contents
def test_neighbours_and_the_future_leave_a_sequence_alone(content: str | None) -> None:
    both, tokens = draw([130, 70], content=content), ("q", "k", "v", "g", "e", "w")
    alone = both | {name: both[name][:, 130:] for name in tokens} | {"cu_seqlens": None}
    o, _ = chunk_carve(**both, backend="triton")
    assert torch.equal(o[:, 130:], chunk_carve(**alone, backend="triton")[0])
    other = draw([130, 70], content=content, seed=1)
    for t in (1, 17, 64, 100):
        later = {name: torch.cat([both[name][:, :t], other[name][:, t:]], 1) for name in tokens}
        assert torch.equal(chunk_carve(**both | later, backend="triton")[0][:, :t], o[:, :t])


@pytest.mark.gpu
@contents
def test_any_mix_of_pieces(content: str | None) -> None:
    arguments = draw([400], content=content, C=48)
    whole, final = recurrent_carve(**in_float64(arguments), backend="torch", output_final_state=True)
    state, outputs, start = None, [], 0
    tokens = [name for name in ("q", "k", "v", "g", "e", "w") if arguments[name] is not None]
    pieces = [("triton", 97), ("torch", 3), ("triton", 1), ("torch", 43), ("cuda", 48), ("triton", 208)]
    for backend, length in pieces:
        piece = arguments | {name: arguments[name][:, start : start + length] for name in tokens}
        o, state = chunk_carve(
            **piece | {"initial_state": state, "cu_seqlens": None}, output_final_state=True, backend=backend
        )
        outputs.append(o)
        start += length
    assert off(torch.cat(outputs, 1), whole) <= tolerance("op_kernel")
    assert off(state.memory, final.memory) <= tolerance("op_kernel")
