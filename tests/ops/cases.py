"""Inputs for the tests of the op: what to draw, and the tensors that go with it."""

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st

from carve.ops import CarveState
from tests.tolerances import tolerance

TOKEN_NAMES = ("q", "k", "v", "g", "e", "w")
TENSORS = (*TOKEN_NAMES, "p_down", "p_up", "p_write")
DECAYS = {  # log-decays that tokens and channels draw from
    "none": (0.0,),
    "weak": (-0.001, -0.01, -0.05),
    "gone": (-5.0,),
    "strong": (-50.0,),
    "extreme": (-316.0,),
    "mixed": (0.0, -0.001, -0.3, -5.0, -50.0, -316.0),
}
GATES = {"open": None, "saturated": (-50.0, 0.0, 50.0), "infinite": (-float("inf"), 0.0, float("inf"))}


@dataclass(frozen=True)
class Case:
    """What a set of inputs looks like; `arguments` makes it."""

    seed: int = 0
    B: int = 2
    T: int = 50
    H: int = 2
    groups: int = 1  # HV / H
    K: int = 5
    V: int = 4
    R: int = 3
    grouped: bool = False  # g and e a value head, not a key head
    content: str | None = "read"
    content_norm: str | None = None
    chunk_size: int = 16
    write: str | None = "content"  # None: w is None; "token": w alone; "content": w and p_write
    erase: bool = True  # p_up is given; without it the write gate alone sees the content
    decay: str = "weak"
    gates: str = "open"
    started: bool = False  # with an initial state, somewhere in a chunk
    qk_l2norm: bool = True
    allow_neg_eigval: bool = False
    scale: float | None = None

    @property
    def HV(self) -> int:
        return self.H * self.groups

    @property
    def audible(self) -> bool:
        """Whether the content can be expected to move the outputs: something is stored, gates can move, time passed."""
        free = self.decay in ("none", "weak") and self.gates == "open"
        return self.content is not None and free and 2 * self.chunk_size <= self.T

    def options(self) -> dict:
        names = ("content_norm", "chunk_size", "scale", "qk_l2norm", "allow_neg_eigval")
        return {"content": self.content or "mean"} | {name: getattr(self, name) for name in names}

    def arguments(self, dtype: torch.dtype = torch.float64) -> dict:
        """The op's arguments: tensors of `dtype`, a state of float32 at least."""
        r = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=r, dtype=torch.float64)

        def pick(values: tuple[float, ...], *shape: int) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float64)[torch.randint(len(values), shape, generator=r)]

        def logits(*shape: int) -> torch.Tensor:
            values = GATES[self.gates]
            return normal(*shape) if values is None else pick(values, *shape)

        B, T, H, HV, K, V, R = self.B, self.T, self.H, self.HV, self.K, self.V, self.R
        either = HV if self.grouped else H
        x = {"q": normal(B, T, H, K), "k": normal(B, T, H, K), "v": normal(B, T, HV, V)}
        if not self.qk_l2norm:
            x["k"] /= x["k"].norm(dim=-1, keepdim=True)
        x |= {"g": pick(DECAYS[self.decay], B, T, either, K), "e": logits(B, T, either, K)}
        x["w"] = None if self.write is None else logits(B, T, HV)
        # Strong enough to be heard; the mean output, unless normed, is small.
        loud = 40.0 if self.content == "mean" and self.content_norm is None else 4.0
        x["p_down"] = normal(HV, V, R) * V**-0.5 if self.content else None
        x["p_up"] = loud * normal(HV, R, K) if self.content and self.erase else None
        x["p_write"] = loud * normal(HV, R) if self.content and self.write == "content" else None
        x = {name: None if y is None else y.to(dtype) for name, y in x.items()}
        if not self.started:
            return x | self.options() | {"initial_state": None}
        content = {None: None, "mean": (B, HV, R), "read": (B, HV, K, R)}[self.content]
        state = (
            normal(B, HV, K, V),
            None if content is None else 0.1 * normal(*content),
            normal(B, HV, V) if self.content == "mean" else None,
        )
        wide = torch.promote_types(dtype, torch.float32)
        state = (None if y is None else y.to(wide) for y in state)
        position = torch.randint(self.chunk_size, (B,), generator=r)
        return x | self.options() | {"initial_state": CarveState(*state, position)}


def cases(**fixed) -> st.SearchStrategy[Case]:
    """Draws cases; `fixed` names fields that are given."""
    fields = {
        "seed": st.integers(0, 2**16),
        "B": st.integers(1, 3),
        "T": st.integers(1, 200),
        "H": st.integers(1, 2),
        "groups": st.integers(1, 3),
        "K": st.sampled_from([1, 2, 5, 16]),
        "V": st.sampled_from([1, 3, 8, 17]),
        "R": st.sampled_from([1, 2, 7]),
        "grouped": st.booleans(),
        "content": st.sampled_from(["mean", "read", None]),
        "content_norm": st.sampled_from([None, "rms"]),
        "chunk_size": st.sampled_from([1, 5, 16, 17, 64, 100]),
        "write": st.sampled_from([None, "token", "content"]),
        "erase": st.booleans(),
        "decay": st.sampled_from(sorted(DECAYS)),
        "gates": st.sampled_from(sorted(GATES)),
        "started": st.booleans(),
        "qk_l2norm": st.booleans(),
        "allow_neg_eigval": st.booleans(),
        "scale": st.sampled_from([None, 1.0, 0.3]),
    }
    drawn = st.builds(Case, **{name: fixed.get(name, strategy) for name, strategy in fields.items()})
    # p_up may be left out only where the write gate sees the content
    return drawn.map(lambda case: case if case.write == "content" else replace(case, erase=True))


def assert_close(found: torch.Tensor | None, expected: torch.Tensor | None, name: str, what: str = "") -> None:
    """The largest error is at most `tolerance(name)` of the largest expected value."""
    if expected is None or found is None:
        assert found is expected, f"{what}: {found} in place of {expected}"
        return
    assert found.shape == expected.shape, what
    if not expected.numel():
        return
    found, expected = found.detach().double(), expected.detach().double()
    assert torch.isfinite(found).all(), f"{what} is not finite"
    error, size = (found - expected).abs().max().item(), expected.abs().max().item()
    assert error <= tolerance(name) * max(size, 1e-30), f"{what}: error {error:.2e}, largest value {size:.2e}"


def assert_states_close(found: CarveState, expected: CarveState, name: str) -> None:
    for field, x, y in zip(CarveState._fields, found, expected, strict=True):
        if field == "position":
            assert torch.equal(x, y), f"position {x} in place of {y}"
        else:
            assert_close(x, y, name, field)
