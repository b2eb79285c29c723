"""Inputs for the tests of the GPU kernels, and what they are compared with.

That is float64, by the chunk form in torch, which `test_chunked.py` holds to the recurrence within 1e-10: token by
token these tests would take ten times as long. Errors are norms over norms; see `tests/tolerances.py`.
"""

import torch

from carve.ops import CarveState, chunk_carve
from tests.tolerances import tolerance


def draw(
    lengths: list[int],
    *,
    H: int = 2,
    groups: int = 1,
    K: int = 128,
    V: int = 128,
    R: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    content: str | None = None,
    norm: str | None = "rms",
    write: bool = True,
    grouped: bool = False,
    started: bool = False,
    decay: str = "weak",
    gates: str = "open",
    C: int = 64,
    neg: bool = False,
    seed: int = 0,
    device: str = "cuda",
) -> dict:
    """Arguments of the op: sequences packed into a row, projections that are heard."""
    r = torch.Generator().manual_seed(seed)
    T, N, HV = sum(lengths), len(lengths), H * groups
    either = HV if grouped else H

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=r)

    def sprinkle(x: torch.Tensor, share: float, value: float, *shape: int) -> torch.Tensor:
        return torch.where(torch.rand(*shape, generator=r) < share, value, x)

    k = normal(1, T, H, K) + 0.5 * normal(1, 1, H, K)
    x = {name: y / y.norm(dim=-1, keepdim=True) for name, y in (("q", normal(1, T, H, K)), ("k", k))}
    g = -torch.nn.functional.softplus(normal(1, T, either, K) - 3)
    e, w = normal(1, T, either, K), normal(1, T, HV)
    if decay == "mixed":
        for share, value in ((0.02, -50.0), (0.005, -316.0), (0.2, 0.0)):
            g = sprinkle(g, share, value, 1, T, either, K)
        g = sprinkle(g, 0.02, -5.0, 1, T, either, 1)
    elif decay != "weak":
        g = torch.full_like(g, float(decay))
    if gates == "shut or open":
        e = sprinkle(sprinkle(e, 0.4, float("inf"), *e.shape), 0.4, -float("inf"), *e.shape)
        w = sprinkle(sprinkle(w, 0.3, float("inf"), *w.shape), 0.3, -float("inf"), *w.shape)
    x |= {"v": normal(1, T, HV, V), "e": e}
    x = {name: y.to(dtype) for name, y in x.items()} | {"g": g, "w": w if write else None}
    if content:
        size = V**-0.5 * (1 if content == "read" else 30 if norm else 200)  # the mean is small unless normed
        x |= {"p_down": size * normal(HV, V, R), "p_up": 0.7 * normal(HV, R, K) / R**0.5}
        x["p_write"] = 0.7 * normal(HV, R) / R**0.5 if write else None
    state = None
    if started:
        seen = {None: None, "mean": (N, HV, R), "read": (N, HV, K, R)}[content]
        state = CarveState(
            0.3 * normal(N, HV, K, V),
            None if seen is None else 0.3 * normal(*seen),
            normal(N, HV, V) if content == "mean" else None,
            torch.randint(C, (N,), generator=r),
        )
        state = CarveState(*(None if y is None else y.to(device) for y in state))
    options = {"content": content or "mean", "content_norm": norm, "chunk_size": C, "allow_neg_eigval": neg}
    x = {name: None if y is None else y.to(device) for name, y in x.items()}
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)]).to(device)
    return x | options | {"initial_state": state, "cu_seqlens": bounds}


def in_float64(arguments: dict) -> dict:
    def widen(y: object) -> object:
        if isinstance(y, CarveState):
            return CarveState(*(widen(field) for field in y))
        return y.double() if isinstance(y, torch.Tensor) and y.is_floating_point() else y

    return {name: widen(y) for name, y in arguments.items()}


def run(op, arguments: dict, **more) -> tuple[torch.Tensor, CarveState, dict[str, torch.Tensor]]:
    """Outputs, the final state, and the gradients of a random weighing of both."""
    arguments = {name: y.detach() if isinstance(y, torch.Tensor) else y for name, y in arguments.items()}
    leaves = {name: y for name, y in arguments.items() if isinstance(y, torch.Tensor) and y.is_floating_point()}
    begin = arguments["initial_state"]
    if begin is not None:
        begin = CarveState(*(None if y is None else y.detach() for y in begin))
        arguments["initial_state"] = begin
        leaves |= {name: y for name, y in begin._asdict().items() if y is not None and name != "position"}
    for y in leaves.values():
        y.requires_grad_()
    o, end = op(**arguments, output_final_state=True, **more)
    r = torch.Generator(o.device).manual_seed(1)
    weighed = (o.double() * torch.randn(o.shape, generator=r, device=o.device)).sum()
    for y in end[:3]:
        if y is not None:
            weighed = weighed + 0.1 * (y.double() * torch.randn(y.shape, generator=r, device=o.device)).sum()
    found = torch.autograd.grad(weighed, list(leaves.values()), allow_unused=True)
    return o, end, {name: dy for name, dy in zip(leaves, found, strict=True) if dy is not None}


def off(found: torch.Tensor, expected: torch.Tensor, least: float = 0.0) -> float:
    """Norm of the error over the norm of what is expected, or over `least` if that is more."""
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    if not expected.numel():
        return 0.0
    return ((found.double() - expected.double()).norm() / max(expected.double().norm().item(), least, 1e-30)).item()


def assert_as_exact(arguments: dict, heard: bool = True, backend: str = "cuda", bound: str = "op_kernel") -> None:
    """bound: of the errors, in `TOLERANCES`, and with `_content` and `_gradient` behind it."""
    o, end, gradients = run(chunk_carve, arguments, backend=backend)
    exact_o, exact_end, exact = run(chunk_carve, in_float64(arguments), backend="torch")
    if heard and arguments.get("p_down") is not None:
        blind = arguments | {"p_down": None, "p_up": None, "p_write": None}
        begin = blind["initial_state"]
        blind["initial_state"] = None if begin is None else begin._replace(content=None, content_sum=None)
        without = chunk_carve(**blind, backend=backend)[0]
        assert off(without, exact_o) > tolerance("op_content_effect"), "the content is not heard"
    errors = {"o": off(o, exact_o)}
    for name, y, exact_y in zip(CarveState._fields, end, exact_end, strict=True):
        if name == "position":
            assert torch.equal(y, exact_y)
        elif exact_y is not None:
            errors[name] = off(y, exact_y, least=1e-3 * exact_end.memory.norm().item())
    bounds = {"content": f"{bound}_content"}
    bad = {name: error for name, error in errors.items() if error > tolerance(bounds.get(name, bound))}
    # the gradient of g is what is left of terms like q dq, which is nothing where everything decays at once
    least = {"g": 0.05 * (exact["q"] * arguments["q"].double()).norm().item()}
    errors = {f"d{name}": off(gradients[name], dy, least.get(name, 0)) for name, dy in exact.items()}
    bad |= {name: error for name, error in errors.items() if error > tolerance(f"{bound}_gradient")}
    assert set(gradients) == set(exact)
    assert not bad, bad
