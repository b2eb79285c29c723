"""Bad input: a ValueError that names the argument, what it is and what was expected."""

import re
import warnings

import pytest
import torch

from carve.ops import CarveState, carve_gates, chunk_carve, recurrent_carve
from tests.ops.cases import Case

CASE = Case(B=2, T=6, H=2, groups=2, K=5, V=4, R=3, chunk_size=4, content="mean", started=True)
NAN, INF = float("nan"), float("inf")


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


def bounds(*values: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


# Arguments that replace good ones, and what the message must say. B, T, H, HV, K, V, R = 2, 6, 2, 4, 5, 4, 3.
TENSORS = [
    ({"q": None}, "q is NoneType, expected a tensor"),
    ({"g": -1.0}, "g is float, expected a tensor"),
    ({"v": ones(2, 6, 4, 4).long()}, "v has dtype torch.int64, expected torch.float16 or torch.bfloat16 or"),
    ({"e": ones(2, 6, 2, 5).bool()}, "e has dtype torch.bool, expected torch.float16 or"),
    ({"k": torch.empty(2, 6, 2, 5, device="meta")}, "k is on meta, expected cpu like q"),
    ({"q": ones(2, 6, 10)}, "q has shape [2, 6, 10], expected 4 dimensions"),
    ({"v": ones(2, 6, 4, 4, 1)}, "v has shape [2, 6, 4, 4, 1], expected 4 dimensions"),
    ({"q": ones(2, 6, 2, 0), "k": ones(2, 6, 2, 0)}, "q has shape [2, 6, 2, 0]"),
    ({"v": ones(2, 6, 0, 4)}, "expected H, K, HV, V of at least 1"),
    ({"v": ones(2, 6, 3, 4)}, "v has HV = 3 heads, expected a multiple of q's H = 2"),
    ({"v": ones(1, 6, 4, 4)}, "v has shape [1, 6, 4, 4], expected [B, T, HV, V] = [2, 6, 4, 4]"),
    ({"v": ones(2, 5, 4, 4)}, "v has shape [2, 5, 4, 4], expected [B, T, HV, V] = [2, 6, 4, 4]"),
    ({"k": ones(2, 6, 2, 1)}, "k has shape [2, 6, 2, 1], expected [B, T, H, K] = [2, 6, 2, 5]"),
    ({"k": ones(2, 6, 4, 5)}, "k has shape [2, 6, 4, 5], expected [B, T, H, K]"),
    (
        {"g": -ones(2, 6, 2)},
        "g has shape [2, 6, 2], expected [B, T, H, K] = [2, 6, 2, 5] or [B, T, HV, K]",
    ),
    ({"g": -ones(2, 6, 2, 1)}, "g has shape [2, 6, 2, 1], expected"),
    ({"e": ones(2, 6, 1, 5)}, "e has shape [2, 6, 1, 5], expected"),
    ({"w": ones(2, 6, 2)}, "w has shape [2, 6, 2], expected [B, T, HV] = [2, 6, 4]"),
    ({"w": ones(2, 6, 4, 1)}, "w has shape [2, 6, 4, 1], expected"),
]
DECAYS = [
    ({"g": torch.full((2, 6, 2, 5), bad)}, f"g has values from {bad} to {bad}, expected finite log-decays <= 0")
    for bad in (0.5, 3.0, INF, -INF, NAN)
]
PROJECTIONS = [
    ({"p_down": None}, "p_up was given without p_down"),
    ({"p_down": None, "p_up": None}, "p_write was given without p_down"),
    ({"p_up": None, "p_write": None}, "p_up is None, expected a tensor [HV, R, K] with p_down unless p_write is given"),
    ({"p_down": ones(4, 3)}, "p_down has shape [4, 3], expected [HV, V, R]"),
    ({"p_down": ones(4, 5, 3)}, "p_down has shape [4, 5, 3], expected [HV, V, R] = [4, 4, 3]"),
    ({"p_down": ones(2, 4, 3)}, "p_down has shape [2, 4, 3], expected [HV, V, R] = [4, 4, 3]"),
    ({"p_down": ones(4, 4, 0), "p_up": ones(4, 0, 5), "p_write": ones(4, 0)}, "p_down has shape [4, 4, 0], expected"),
    ({"p_down": torch.tensor(1.0)}, "p_down has shape [], expected [HV, V, R]"),
    ({"p_down": 0.5}, "p_down is float, expected a tensor"),
    ({"p_up": "zero"}, "p_up is str, expected a tensor"),
    ({"p_up": ones(4, 5, 3)}, "p_up has shape [4, 5, 3], expected [HV, R, K] = [4, 3, 5]"),
    ({"p_up": ones(4, 2, 5)}, "p_up has shape [4, 2, 5], expected [HV, R, K] = [4, 3, 5]"),
    ({"p_write": ones(4, 3, 1)}, "p_write has shape [4, 3, 1], expected [HV, R] = [4, 3]"),
    ({"w": None}, "p_write was given without w"),
    ({"p_up": ones(4, 3, 5).long()}, "p_up has dtype torch.int64, expected torch.float16"),
    ({"p_down": torch.empty(4, 4, 3, device="meta")}, "p_down is on meta, expected cpu"),
]
OPTIONS = [
    ({"content": "max"}, "content is 'max', expected 'mean' or 'read'"),
    ({"content": None}, "content is None, expected 'mean' or 'read' (p_down=None makes the op memory-blind)"),
    ({"content_norm": "layer"}, "content_norm is 'layer', expected None or 'rms'"),
    *(
        ({"chunk_size": bad}, f"chunk_size is {bad!r}, expected an integer >= 1")
        for bad in (0, -1, True, 1.5, "64", None)
    ),
    *(({"scale": bad}, f"scale is {bad!r}, expected a finite number") for bad in (NAN, INF, "big", True)),
    ({"qk_l2norm": 1}, "qk_l2norm is 1, expected True or False"),
    ({"allow_neg_eigval": None}, "allow_neg_eigval is None, expected True or False"),
    ({"backend": "fast"}, "backend is 'fast', expected one of 'auto', 'torch', "),
    ({"backend": "cuda"}, "backend is 'cuda', but the inputs are on cpu, expected a CUDA device"),
]
PACKED = [
    ({"cu_seqlens": [0, 6]}, "cu_seqlens is list, expected an int32 or int64 tensor"),
    ({"cu_seqlens": ones(2)}, "cu_seqlens is torch.float32, expected an int32 or int64 tensor"),
    ({"cu_seqlens": bounds(0, 6, dtype=torch.int16)}, "cu_seqlens is torch.int16"),
    ({"cu_seqlens": bounds(0)}, "cu_seqlens has shape [1], expected [N + 1]"),
    ({"cu_seqlens": bounds(0, 6).unsqueeze(0)}, "cu_seqlens has shape [1, 2], expected [N + 1]"),
    ({"cu_seqlens": torch.tensor(6)}, "cu_seqlens has shape [], expected [N + 1]"),
    ({"cu_seqlens": bounds(1, 6)}, "cu_seqlens is [1, 6], expected to start at 0, never decrease and end at T = 6"),
    ({"cu_seqlens": bounds(0, 5)}, "cu_seqlens is [0, 5], expected to start at 0"),
    ({"cu_seqlens": bounds(0, 7)}, "cu_seqlens is [0, 7], expected to start at 0"),
    ({"cu_seqlens": bounds(0, 4, 3, 6)}, "cu_seqlens is [0, 4, 3, 6], expected to start at 0, never decrease"),
    ({"cu_seqlens": bounds(0, *[9] * 20, 6)}, "cu_seqlens is [0, 9, 9, 9, 9, '...', 9, 9, 6]"),
]


def state(**changes) -> CarveState:
    return CASE.arguments(torch.float32)["initial_state"]._replace(**changes)


STATES = [
    (tuple(state()), "initial_state is tuple, expected a CarveState"),
    (state(memory=None), "initial_state.memory is None, expected a tensor"),
    (state(content=None), "initial_state.content is None, expected a tensor for content='mean'"),
    (state(content_sum=None), "initial_state.content_sum is None, expected a tensor for content='mean'"),
    (state(position=None), "initial_state.position is NoneType, expected a tensor"),
    (state(memory=0.0), "initial_state.memory is float, expected a tensor"),
    (
        state(memory=ones(2, 2, 5, 4)),
        "initial_state.memory has shape [2, 2, 5, 4], expected [N, HV, K, V]",
    ),
    (state(memory=ones(3, 4, 5, 4)), "initial_state.memory has shape [3, 4, 5, 4], expected"),
    (state(memory=ones(2, 4, 4, 5)), "initial_state.memory has shape [2, 4, 4, 5], expected"),
    (state(content=ones(2, 4, 5, 3)), "initial_state.content has shape [2, 4, 5, 3], expected [N, HV, R] = [2, 4, 3]"),
    (state(content_sum=ones(2, 4, 3)), "initial_state.content_sum has shape [2, 4, 3], expected [N, HV, V]"),
    (state(memory=ones(2, 4, 5, 4).double()), "initial_state.memory has dtype torch.float64, expected torch.float32"),
    (state(content=ones(2, 4, 3).bfloat16()), "initial_state.content has dtype torch.bfloat16, expected torch.float32"),
    (state(position=bounds(0)), "initial_state.position has shape [1], expected [N] = [2]"),
    (
        state(position=bounds(0, 1, dtype=torch.int32)),
        "initial_state.position has dtype torch.int32, expected",
    ),
    (
        state(position=torch.zeros(2, dtype=torch.int64, device="meta")),
        "initial_state.position is on meta",
    ),
    (state(position=bounds(0, 4)), "initial_state.position is [0, 4], expected values from 0 to below chunk_size = 4"),
    (state(position=bounds(-1, 0)), "initial_state.position is [-1, 0], expected values from 0"),
]

every = [*TENSORS, *DECAYS, *PROJECTIONS, *OPTIONS]


@pytest.mark.parametrize("op", [chunk_carve, recurrent_carve])
@pytest.mark.parametrize(("changes", "message"), every, ids=[message for _, message in every])
def test_bad_arguments(op, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        op(**CASE.arguments(torch.float32) | changes)


@pytest.mark.parametrize("op", [chunk_carve, recurrent_carve])
@pytest.mark.parametrize(("changes", "message"), PACKED, ids=[message for _, message in PACKED])
def test_bad_cu_seqlens(op, changes: dict, message: str) -> None:
    one_row = Case(**{**vars(CASE), "B": 1}).arguments(torch.float32)
    with pytest.raises(ValueError, match=re.escape(message)):
        op(**one_row | changes)


@pytest.mark.parametrize("op", [chunk_carve, recurrent_carve])
def test_packed_sequences_need_one_row(op) -> None:
    with pytest.raises(ValueError, match="cu_seqlens needs packed sequences with B = 1, but there are B = 2 rows"):
        op(**CASE.arguments(torch.float32) | {"cu_seqlens": bounds(0, 6)})


@pytest.mark.parametrize("op", [chunk_carve, recurrent_carve])
@pytest.mark.parametrize(("bad", "message"), STATES, ids=[message for _, message in STATES])
def test_bad_state(op, bad: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        op(**CASE.arguments(torch.float32) | {"initial_state": bad})


@pytest.mark.parametrize("op", [chunk_carve, recurrent_carve])
def test_state_of_another_op(op) -> None:
    """A state of one content, chunk size or precision is no state of another."""
    arguments = CASE.arguments(torch.float32)
    blind = arguments | {"p_down": None, "p_up": None, "p_write": None}
    with pytest.raises(ValueError, match=r"initial_state\.content is a tensor, expected None for a memory-blind op"):
        op(**blind)
    with pytest.raises(ValueError, match=r"initial_state\.content has shape .*, expected \[N, HV, K, R\]"):
        op(**arguments | {"content": "read"})
    _, at_three = op(**arguments | {"initial_state": None}, output_final_state=True)
    assert at_three.position.tolist() == [2, 2]
    with pytest.raises(ValueError, match="the state comes from another chunk size"):
        op(**arguments | {"initial_state": at_three, "chunk_size": 2})
    with pytest.raises(ValueError, match=r"initial_state\.memory has dtype torch.float32, expected torch.float64"):
        op(**arguments | {"v": arguments["v"].double(), "initial_state": at_three})


@pytest.mark.parametrize("op", [chunk_carve, recurrent_carve])
def test_a_misspelt_argument_is_not_swallowed(op) -> None:
    with pytest.raises(TypeError, match="contnt"):
        op(**CASE.arguments(), contnt="read")


def test_gates_check_their_arguments() -> None:
    arguments = CASE.arguments(torch.float32)
    del arguments["initial_state"]
    with pytest.raises(ValueError, match="g has values from"):
        carve_gates(**arguments | {"g": -arguments["g"]})


@pytest.mark.parametrize("op", [chunk_carve, recurrent_carve])
def test_decay_bounds_are_allowed(op) -> None:
    """0, -0.0 and what forgets all at once are decays; the CPU's path is the fast one, so nothing is said."""
    arguments = CASE.arguments(torch.float32)
    for g in (0.0, -0.0, -1e30):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            o, _ = op(**arguments | {"g": torch.full_like(arguments["g"], g)})
        assert torch.isfinite(o).all()


UNIT = Case(B=2, T=200, H=2, K=16, V=4, content=None, write=None, decay="none", gates="infinite", qk_l2norm=False)


@pytest.mark.parametrize("op", [chunk_carve, recurrent_carve, carve_gates])
@pytest.mark.parametrize(("neg", "limit"), [(False, 2**0.5), (True, 1.0)])
def test_keys_that_would_make_the_memory_grow_are_refused(op, neg: bool, limit: float) -> None:
    """To just the length at which the erase begins to overshoot by more than there is."""
    arguments = UNIT.arguments() | {"allow_neg_eigval": neg}
    del arguments["initial_state"]
    k = arguments["k"]
    for bad in (1.02 * limit, 100.0):
        with pytest.raises(ValueError, match=re.escape(f"k has L2 norms up to {bad:.4g}, expected 1: pass qk_l2norm")):
            op(**arguments | {"k": bad * k})
        op(**arguments | {"k": bad * k, "qk_l2norm": True})
    if op is not carve_gates:
        again = {"k": limit * k[:, :1].expand_as(k), "v": torch.zeros_like(arguments["v"])}
        begin = Case(**{**vars(UNIT), "started": True}).arguments()["initial_state"]
        # with one key the memory under it swings between two values at the limit; beyond, it would double and double
        _, state = op(**arguments | again | {"initial_state": begin, "output_final_state": True})
        assert state.memory.abs().max() < 10 * begin.memory.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_keys_may_be_rounded_or_short_or_nan(dtype: torch.dtype) -> None:
    arguments = UNIT.arguments(dtype) | {"allow_neg_eigval": True}
    even = torch.full_like(arguments["k"], 0.2501)  # all rounded the same way
    for k in (arguments["k"], even / even.norm(dim=-1, keepdim=True), 0 * even, NAN * even):
        chunk_carve(**arguments | {"k": k})


@pytest.mark.parametrize(("bad", "runaway"), [(NAN, True), (-INF, True), (0.5, False)])
def test_numbers_that_ran_away_can_be_told_from_a_wrong_sign(bad: float, runaway: bool) -> None:
    """Both are a ValueError; what trains models asks for the first."""
    arguments = CASE.arguments(torch.float32)
    with pytest.raises(ValueError, match="g has values from") as caught:
        chunk_carve(**arguments | {"g": torch.full_like(arguments["g"], bad)})
    assert isinstance(caught.value, FloatingPointError) == runaway
    with pytest.raises(FloatingPointError, match="k has L2 norms up to inf, expected 1"):
        chunk_carve(**arguments | {"k": torch.full_like(arguments["k"], INF), "qk_l2norm": False})
