"""Measures launch configurations of the portable kernels on this GPU: `python benchmarks/triton_table.py`.

Writes the fastest ones into carve/ops/kernels/portable.py. A configuration counts only if its outputs and gradients are
those of plain torch; takes about ten minutes, most of them compiling.
"""

import itertools
import re
import sys
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from triton.testing import do_bench

from carve.ops import chunk_carve
from carve.ops.kernels import portable
from carve.ops.kernels.portable import LAUNCHES, Launch, Plan
from carve.ops.recurrence import Projections, Tokens

FILE = Path(portable.__file__)
SIZES = {32: 32, 64: 64, 128: 128, 256: 256}  # of K and V, for each row of the table
WARPS = {32: (1, 2, 4), 64: (2, 4, 8), 128: (4, 8), 256: (8, 16)}
TILES = {"gated": (32, 64, 128), "gradients": (32, 64, 128)}  # of V; other kernels take it whole up to 128, 64 beyond
KERNELS = {  # launches that a row of the table decides: the kernel, and GATED if it matters
    "prepare": ("prepare", None),
    "gated": ("run_blocks", True),
    "content": ("run_blocks", False),
    "reverse": ("reverse_blocks", None),
    "gradients": ("differentiate_blocks", None),
}
TOLERANCE = 0.02  # of the norm, as tests/tolerances.py has it for bfloat16 operands, and some


def candidates(name: str, size: int) -> list[Launch]:
    tiles = [tile for tile in TILES.get(name, (256 if size < 256 else 64,)) if tile <= max(size, 64) or tile == 256]
    stages = (1,) if name == "prepare" else (1, 2, 3)
    return [Launch(*parts) for parts in itertools.product(WARPS[size], stages, tiles)]


def draw(size: int, B: int, T: int, H: int) -> tuple[Tokens, Projections]:
    r = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=r, device="cuda")

    q, k = (torch.nn.functional.normalize(normal(B, T, H, size), dim=-1).bfloat16() for _ in range(2))
    v, e = normal(B, T, H, size).bfloat16(), normal(B, T, H, size).bfloat16()
    g = -torch.nn.functional.softplus(normal(B, T, H, size) - 3)
    g[:, 100:110] = -20.0  # strong blocks too
    tokens = Tokens(q, k, v, g, e, normal(B, T, H))
    down = normal(H, size, 16) * size**-0.5
    p = Projections(down, 0.2 * normal(H, 16, size), 0.2 * normal(H, 16))
    for y in (*tokens, *p):
        y.requires_grad_()
    return tokens, p


def run(x: Tokens, p: Projections, backend: str) -> list[torch.Tensor]:
    """Outputs and gradients."""
    o, _ = chunk_carve(*x, *p, content="read", content_norm="rms", backend=backend)
    weights = torch.sin(torch.arange(o.numel(), device="cuda").view(o.shape))
    return [o, *torch.autograd.grad((o.float() * weights).sum(), [*x, *p])]


def right(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    """Whether all agree; of NaN, none do."""
    return all((y - z).float().norm() <= TOLERANCE * z.float().norm() for y, z in zip(found, expected, strict=True))


def time_launch(name: str, x: Tokens, p: Projections) -> float:
    """Milliseconds of the launches that `name` decides, in one forward and backward."""
    kernel_name, gated = KERNELS[name]
    plain, total = Plan.launch, 0.0

    def launch(plan: Plan, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        nonlocal total
        plain(plan, kernel, programs, *arguments, **constants)
        if kernel.__name__ == kernel_name and gated in (None, constants.get("GATED")):
            total += do_bench(lambda: plain(plan, kernel, programs, *arguments, **constants), 5, 25)

    Plan.launch = launch  # type: ignore[method-assign]
    try:
        run(x, p, "triton")
    finally:
        Plan.launch = plain  # type: ignore[method-assign]
    return total


def choose(name: str, size: int) -> None:
    """Try the candidates of a row of the table, and leave the fastest that is right in it."""
    small, large = draw(SIZES[size], 1, 200, 2), draw(SIZES[size], 4, 2048, 16)
    expected = run(*small, "torch")
    times: dict[Launch, float] = {}
    for how in track(candidates(name, size), f"{name} {size}"):
        LAUNCHES[name][size] = how
        try:
            if right(run(*small, "triton"), expected):
                times[how] = time_launch(name, *large)
            else:
                print(f"{name} {size} {how}: wrong results")
        except Exception as error:  # too many registers, too much shared memory: whatever the compiler says
            print(f"{name} {size} {how}: {str(error).splitlines()[0][:100]}")
    if not times:
        raise SystemExit(f"{name} {size}: no configuration works")
    LAUNCHES[name][size] = best = min(times, key=lambda how: times[how])
    print(f"{name} {size}: {best}, {times[best]:.3f} ms, slowest {max(times.values()):.3f} ms", flush=True)


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("triton_table: no GPU, expected one to measure on")
    for name in LAUNCHES:
        for size in LAUNCHES[name]:
            choose(name, size)
    rows = (
        f'    "{name}": {{{", ".join(f"{size}: {write(how)}" for size, how in sizes.items())}}},\n'
        for name, sizes in LAUNCHES.items()
    )
    table = "LAUNCHES: dict[str, dict[int, Launch]] = {\n" + "".join(rows) + "}\n"
    text = re.sub(r"LAUNCHES: .*?\n}\n", lambda _: table, FILE.read_text(), count=1, flags=re.DOTALL)
    FILE.write_text(text)
    print(table)


def write(how: Launch) -> str:
    return f"Launch({how.num_warps}, {how.num_stages}, {how.tile})"


if __name__ == "__main__":
    main()
