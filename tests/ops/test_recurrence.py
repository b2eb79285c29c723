"""`recurrent_carve` against the literal oracle, and against the token loops of the models that it contains."""

import pytest
import torch
from hypothesis import given, settings

from carve.ops import CarveState, recurrent_carve
from tests.ops.cases import TENSORS, Case, assert_close, assert_states_close, cases
from tests.ops.oracle import oracle

few = settings(max_examples=40, derandomize=True, deadline=None)


def to_numpy(arguments: dict) -> dict:
    state = arguments["initial_state"]
    plain = {name: x.numpy() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    return plain | {"initial_state": None if state is None else [None if x is None else x.numpy() for x in state]}


@few
@given(cases())
def test_recurrence_is_the_specification(case: Case) -> None:
    arguments = case.arguments()
    o, state = recurrent_carve(**arguments, output_final_state=True)
    expected, final = oracle(**to_numpy(arguments))
    assert_close(o, torch.from_numpy(expected), "op_float64", "o")
    final = CarveState(*(None if x is None else torch.from_numpy(x) for x in final))
    assert_states_close(state, final, "op_float64")


@pytest.mark.parametrize("content", ["mean", "read"])
@pytest.mark.parametrize("norm", [None, "rms"])
def test_gradients_of_the_recurrence_are_numeric_ones(content: str, norm: str | None) -> None:
    case = Case(B=1, T=7, H=1, groups=2, K=3, V=2, R=2, chunk_size=3, content=content, content_norm=norm, started=True)
    arguments = case.arguments()
    state = arguments.pop("initial_state")
    names = [name for name in TENSORS if arguments[name] is not None]
    arguments["g"] = arguments["g"] - 0.1  # away from 0, where a numeric step would be an error

    def run(memory: torch.Tensor, content: torch.Tensor, *rest: torch.Tensor):
        tensors = dict(zip(names, rest[-len(names) :], strict=True))
        total = rest[0] if state.content_sum is not None else None
        begin = CarveState(memory, content, total, state.position)
        o, end = recurrent_carve(**arguments | tensors, initial_state=begin, output_final_state=True)
        return [x for x in (o, *end[:3]) if x is not None]

    leaves = [x for x in state[:3] if x is not None] + [arguments[name] for name in names]
    assert torch.autograd.gradcheck(run, [x.clone().requires_grad_() for x in leaves])


# -- special cases: each model's own loop, as its paper writes it, one head at a time --


def gdn2_loop(q, k, v, g, erase, write):
    """Gated DeltaNet-2: an erase gate a key channel, a write gate a value channel; erase `[T, K]`, write `[T, V]`."""
    S, outputs = torch.zeros(q.shape[1], v.shape[1], dtype=q.dtype), []
    for t in range(len(q)):
        S = g[t].exp()[:, None] * S
        S = S - torch.outer(k[t], (erase[t] * k[t]) @ S) + torch.outer(k[t], write[t] * v[t])
        outputs.append(q[t] @ S * q.shape[1] ** -0.5)
    return torch.stack(outputs)


def kda_loop(q, k, v, g, beta):
    """Kimi Delta Attention: decay a key channel, one gate beta a head that erases and writes. beta `[T]`."""
    S, outputs = torch.zeros(q.shape[1], v.shape[1], dtype=q.dtype), []
    for t in range(len(q)):
        S = g[t].exp()[:, None] * S
        S = S + beta[t] * torch.outer(k[t], v[t] - k[t] @ S)
        outputs.append(q[t] @ S * q.shape[1] ** -0.5)
    return torch.stack(outputs)


def gdn_loop(q, k, v, g, beta):
    """Gated DeltaNet: as KDA, with one decay a head. g, beta `[T]`."""
    identity = torch.eye(q.shape[1], dtype=q.dtype)
    S, outputs = torch.zeros(q.shape[1], v.shape[1], dtype=q.dtype), []
    for t in range(len(q)):
        S = g[t].exp() * (identity - beta[t] * torch.outer(k[t], k[t])) @ S + beta[t] * torch.outer(k[t], v[t])
        outputs.append(q[t] @ S * q.shape[1] ** -0.5)
    return torch.stack(outputs)


def by_head(loop, *tensors: torch.Tensor) -> torch.Tensor:
    """A loop over each row and head of `[B, T, H, ...]`."""
    B, _, H = tensors[0].shape[:3]
    rows = [torch.stack([loop(*(x[n, :, h] for x in tensors)) for h in range(H)], dim=1) for n in range(B)]
    return torch.stack(rows)


def test_gdn2_is_a_special_case() -> None:
    x = Case(content=None, write="token", T=40).arguments()
    write = torch.randn(x["v"].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).sigmoid()
    x |= {"w": None, "qk_l2norm": False, "k": torch.nn.functional.normalize(x["k"], dim=-1)}
    expected = by_head(gdn2_loop, x["q"], x["k"], x["v"], x["g"], x["e"].sigmoid(), write)
    o, _ = recurrent_carve(**x | {"v": write * x["v"]})
    assert_close(o, expected, "op_float64", "o")


@pytest.mark.parametrize("allow_neg_eigval", [False, True])
def test_kda_is_a_special_case(allow_neg_eigval: bool) -> None:
    x = Case(content=None, write="token", T=40).arguments()
    logit = x["w"]  # [B, T, HV]
    x |= {
        "qk_l2norm": False,
        "k": torch.nn.functional.normalize(x["k"], dim=-1),
        "e": logit[..., None].expand_as(x["k"]),
    }
    if allow_neg_eigval:  # the write gate stays in (0, 1): twice the values, as they are written
        x |= {"allow_neg_eigval": True, "v": 2 * x["v"]}
    beta = logit.sigmoid() * (2 if allow_neg_eigval else 1)
    v = x["v"] / 2 if allow_neg_eigval else x["v"]
    o, _ = recurrent_carve(**x)
    assert_close(o, by_head(kda_loop, x["q"], x["k"], v, x["g"], beta), "op_float64", "o")


def test_gdn_is_a_special_case() -> None:
    x = Case(content=None, write="token", T=40).arguments()
    g = x["g"][..., 0]
    x |= {"qk_l2norm": False, "k": torch.nn.functional.normalize(x["k"], dim=-1)}
    x |= {"e": x["w"][..., None].expand_as(x["k"]), "g": g[..., None].expand_as(x["k"])}
    o, _ = recurrent_carve(**x)
    assert_close(o, by_head(gdn_loop, x["q"], x["k"], x["v"], g, x["w"].sigmoid()), "op_float64", "o")
