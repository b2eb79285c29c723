"""The CUDA kernels on a GPU; see `kernel_cases.py`."""

import pytest
import torch

from carve.ops import chunk_carve, recurrent_carve
from carve.ops.kernels import cuda
from tests.ops.kernel_cases import assert_as_exact, draw, in_float64, off, run
from tests.tolerances import tolerance

pytestmark = pytest.mark.gpu
LENGTHS = [0, 1, 15, 16, 17, 63, 64, 65, 1000]
contents = pytest.mark.parametrize("content", [None, "mean", "read"])


@pytest.fixture(params=[1, 2], ids=["one program a head", "two programs a head"])
def split(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where K = V = 128, whatever the number of heads."""
    if request.param > 1 and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("clusters of programs take compute capability 9.0")
    monkeypatch.setattr(cuda, "programs_of_head", lambda K, V, *_: request.param if K == V == 128 else 1)


@contents
@pytest.mark.parametrize("norm", [None, "rms"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("K", "V"), [(64, 64), (128, 128), (64, 128), (128, 64)])
def test_shapes_and_dtypes(content: str | None, norm: str | None, dtype: torch.dtype, K: int, V: int) -> None:
    assert_as_exact(draw([300, 211], K=K, V=V, dtype=dtype, content=content, norm=norm))


@pytest.mark.usefixtures("split")
@contents
def test_packed_sequences_with_grouped_heads_and_states(content: str | None) -> None:
    assert_as_exact(draw(LENGTHS, groups=2, grouped=True, R=7, content=content, started=True))


@pytest.mark.usefixtures("split")
@contents
@pytest.mark.parametrize("decay", ["0", "-5", "-50", "-316", "mixed"])
def test_decays(content: str | None, decay: str) -> None:
    # nothing but the last token is left of a memory that decays so: its norm's direction is all rounding
    forgets = decay not in ("0", "mixed")
    norm = None if forgets and content == "read" else "rms"
    arguments = draw([200, 131], H=4, content=content, norm=norm, decay=decay, started=decay == "mixed")
    assert_as_exact(arguments, heard=not forgets)


@pytest.mark.usefixtures("split")
@contents
def test_gates_at_0_and_1(content: str | None) -> None:
    assert_as_exact(draw([300, 100], H=4, content=content, gates="shut or open"))


@pytest.mark.usefixtures("split")
@contents
@pytest.mark.parametrize("C", [1, 5, 16, 17, 63, 100, 512])
def test_chunk_sizes(content: str | None, C: int) -> None:
    assert_as_exact(draw([150 if C < 16 else 700], H=4, content=content, C=C, started=True, seed=C))


@pytest.mark.usefixtures("split")
@contents
def test_no_write_gate_and_strong_erasure(content: str | None) -> None:
    assert_as_exact(draw([300], content=content, write=False, neg=True, C=32))


@pytest.mark.usefixtures("split")
@contents
def test_any_mix_of_pieces(content: str | None) -> None:
    arguments = draw([400], content=content, C=48)
    whole, final = recurrent_carve(**in_float64(arguments), backend="torch", output_final_state=True)
    state, outputs, start = None, [], 0
    tokens = [name for name in ("q", "k", "v", "g", "e", "w") if arguments[name] is not None]
    pieces = [(chunk_carve, "cuda", 97), (recurrent_carve, "torch", 3), (recurrent_carve, "cuda", 1)]
    pieces += [
        (chunk_carve, "torch", 43),
        (chunk_carve, "cuda", 48),
        (recurrent_carve, "cuda", 8),
        (chunk_carve, "cuda", 200),
    ]
    for op, backend, length in pieces:
        piece = arguments | {name: arguments[name][:, start : start + length] for name in tokens}
        piece |= {"initial_state": state, "cu_seqlens": None}
        o, state = op(**piece, output_final_state=True, backend=backend)
        outputs.append(o)
        start += length
    assert off(torch.cat(outputs, 1), whole) <= tolerance("op_kernel")
    assert off(state.memory, final.memory) <= tolerance("op_kernel")


@pytest.mark.parametrize("others", [-1.0, -100.0], ids=["mild", "strong"])
def test_a_decay_that_is_no_number_is_heard(others: float) -> None:
    arguments = draw([40])
    arguments["g"][0, 20, 0, 3], arguments["g"][0, 25, 0, 7] = torch.nan, others
    o = chunk_carve(**arguments, backend="cuda")[0]
    assert o[:, :16].isfinite().all()
    assert o[:, 20:, 0].isnan().all()


@contents
def test_a_long_sequence(content: str | None) -> None:
    arguments = draw([100_000], H=1, content=content, norm="rms")
    with torch.no_grad():
        o, end = chunk_carve(**arguments, output_final_state=True, backend="cuda")
        exact, exact_end = chunk_carve(**in_float64(arguments), output_final_state=True, backend="torch")
    assert off(o, exact) <= tolerance("op_kernel")
    assert off(o[:, -1000:], exact[:, -1000:]) <= tolerance("op_kernel")
    assert off(end.memory, exact_end.memory) <= tolerance("op_kernel")


@pytest.mark.usefixtures("split")
@contents
def test_same_bits_beside_another_kernel(content: str | None) -> None:
    arguments = draw(LENGTHS, groups=2, content=content, decay="mixed", started=True)
    first = run(chunk_carve, arguments, backend="cuda")
    beside, a = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda")
    for _ in range(100):
        with torch.cuda.stream(beside):
            a = (a @ a).clamp(-1, 1)
        again = run(chunk_carve, arguments, backend="cuda")
        assert torch.equal(again[0], first[0])
        assert all(x is y or torch.equal(x, y) for x, y in zip(again[1], first[1], strict=True))
        assert all(torch.equal(again[2][name], dy) for name, dy in first[2].items())


@pytest.mark.usefixtures("split")
@contents
def test_every_element_is_written(content: str | None) -> None:
    arguments = draw(LENGTHS, groups=2, content=content, started=True)
    plain = run(chunk_carve, arguments, backend="cuda")
    torch.use_deterministic_algorithms(True)  # which fills new memory with NaN
    try:
        assert torch.empty(3, device="cuda").isnan().all()
        poisoned = run(chunk_carve, arguments, backend="cuda")
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(poisoned[0], plain[0])
    assert all(x is y or torch.equal(x, y) for x, y in zip(poisoned[1], plain[1], strict=True))
    assert all(torch.equal(poisoned[2][name], dy) for name, dy in plain[2].items())


@contents
def test_neighbours_leave_a_sequence_alone(content: str | None) -> None:
    both, tokens = draw([130, 70], content=content), ("q", "k", "v", "g", "e", "w")
    alone = both | {name: both[name][:, 130:] for name in tokens} | {"cu_seqlens": None}
    o, _ = chunk_carve(**both, backend="cuda")
    assert torch.equal(o[:, 130:], chunk_carve(**alone, backend="cuda")[0])


@contents
def test_the_future_leaves_the_past_alone(content: str | None) -> None:
    arguments, tokens = draw([200], content=content), ("q", "k", "v", "g", "e", "w")
    o, _ = chunk_carve(**arguments, backend="cuda")
    other = draw([200], content=content, seed=1)
    for t in (1, 17, 64, 100):
        later = {name: torch.cat([arguments[name][:, :t], other[name][:, t:]], 1) for name in tokens}
        assert torch.equal(chunk_carve(**arguments | later, backend="cuda")[0][:, :t], o[:, :t])
