"""Measures launch configurations of the portable kernels on this GPU, for the table in carve/ops/kernels/portable.py.

    python benchmarks/triton_table.py 128              # the rows for heads of up to 128; all rows without a number
    python benchmarks/triton_table.py 128 --minutes 2  # candidates that are not compiled by then are left out
    python benchmarks/triton_table.py 128 --write      # put the fastest into portable.py

Every candidate is compiled in a process of its own, by a whole forward and backward on the arguments that are timed
afterwards (Triton compiles anew for other divisibilities), and counts only if what comes out is what the present table
gives, to rounding. The best of a first round are then timed in turns. Raw numbers: `results/triton_table.json`.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import re
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from carve.ops import chunk_carve
from carve.ops.kernels import portable
from carve.ops.kernels.portable import LARGEST_READ, LAUNCHES, Launch, Plan

FILE = Path(portable.__file__)
RESULTS = Path(__file__).parent / "results" / "triton_table.json"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, T, H, R = 8, 4096, 16, 16
KERNELS = {  # launches that a row of the table decides: the kernel, and GATED if it matters
    "prepare": ("prepare", None),
    "gated": ("run_blocks", True),
    "content": ("run_blocks", False),
    "reverse": ("reverse_blocks", None),
    "values": ("differentiate_values", None),
    "keys": ("differentiate_keys", None),
}
WARPS = {32: (1, 2, 4), 64: (1, 2, 4, 8), 128: (1, 2, 4, 8, 16), 256: (2, 4, 8, 16)}
STAGES = (1, 2, 3)
TILES = {"gated": (32, 64, 128), "keys": (32, 64, 128)}  # of V, of K; others take V whole up to 128, then 64
FINAL, ROUNDS = 3, 7  # candidates of a row in the last round; turns
TOLERANCE = 0.02  # of the norm: other tiles add up bfloat16 products in another order

Candidate = tuple[str, int, Launch]  # kernel, size, configuration


def candidates(name: str, size: int) -> Iterator[Launch]:
    tiles = [tile for tile in TILES.get(name, ()) if tile <= size] or [256 if size < 256 else 64]
    stages = (1,) if name in ("prepare", "values", "keys") else STAGES
    for warps, stage, tile in itertools.product(WARPS[size], stages, tiles):
        if warps * 32 <= 8 * tile:  # fewer than four numbers of a tile a thread are none to work on
            yield Launch(warps, stage, tile)


def draw(size: int) -> dict[str, Tensor]:
    r = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=r, device=DEVICE)

    x = {name: F.normalize(normal(B, T, H, size), dim=-1).bfloat16() for name in ("q", "k")}
    x |= {name: normal(B, T, H, size).bfloat16() for name in ("v", "e")}
    g = -F.softplus(normal(B, T, H, size) - 3)
    g[:, 100:110] = -20.0  # strong blocks too
    x |= {"g": g, "w": normal(B, T, H), "p_down": normal(H, size, R) * size**-0.5}
    x |= {"p_up": 0.2 * normal(H, R, size), "p_write": 0.2 * normal(H, R)}
    return {name: y.requires_grad_() for name, y in x.items()}


def run(x: dict[str, Tensor]) -> list[Tensor]:
    """Outputs and gradients, of each content that the kernels serve."""
    found = []
    for content in ("mean", "read") if x["q"].shape[-1] <= LARGEST_READ else ("mean",):
        o, _ = chunk_carve(**x, content=content, content_norm="rms", backend="triton")
        weights = torch.sin(torch.arange(o.numel(), device=DEVICE)).view(o.shape)
        found += [o.detach(), *torch.autograd.grad((o.float() * weights).sum(), list(x.values()))]
    return found


def sample(x: dict[str, Tensor]) -> list[Tensor]:
    """Some numbers of each output and gradient, on the CPU."""
    return [y.flatten()[:: max(1, y.numel() // 20_000)].float().cpu() for y in run(x)]


@contextmanager
def launching(name: str, size: int, how: Launch) -> Iterator[None]:
    before = LAUNCHES[name][size]
    LAUNCHES[name][size] = how
    try:
        yield
    finally:
        LAUNCHES[name][size] = before


KEPT: dict[int, dict[str, Tensor]] = {}  # arguments that a compiling process has made


def try_candidate(candidate: Candidate, expected: list[Tensor]) -> str | None:
    """Compile and run it; what is wrong with it, or None."""
    name, size, how = candidate
    if size not in KEPT:
        KEPT.clear()
        KEPT[size] = draw(size)
    try:
        with launching(name, size, how):
            found = sample(KEPT[size])
    except Exception as error:  # too many registers, too much shared memory: whatever the compiler says
        return str(error).splitlines()[0][:100]
    right = all((y - z).norm() <= TOLERANCE * z.norm() for y, z in zip(found, expected, strict=True))
    return None if right else "wrong results"


def milliseconds(candidate: Candidate, x: dict[str, Tensor]) -> float:
    """What the launches that a row of the table decides take together, of one forward and backward of each content."""
    name, plain, marks = candidate[0], Plan.launch, []
    kernel_name, gated = KERNELS[name]

    def launch(plan: Plan, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        begin = mark()
        plain(plan, kernel, programs, *arguments, **constants)
        if kernel.__name__ == kernel_name and gated in (None, constants.get("GATED")):
            marks.append((begin, mark()))

    Plan.launch = launch  # type: ignore[method-assign]
    try:
        with launching(*candidate):
            if DEVICE == "cuda":
                torch.cuda._sleep(10_000_000)  # or the first kernels would wait for their launches
            run(x)
    finally:
        Plan.launch = plain  # type: ignore[method-assign]
    if DEVICE == "cpu":
        return sum(end - begin for begin, end in marks)
    torch.cuda.synchronize()
    return sum(begin.elapsed_time(end) for begin, end in marks)


def mark() -> Any:
    if DEVICE == "cpu":
        return 1e3 * time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def in_turns(found: list[Candidate], x: dict[str, Tensor], rounds: int) -> dict[Candidate, list[float]]:
    """Milliseconds in each round."""
    times: dict[Candidate, list[float]] = {candidate: [] for candidate in found}
    for _ in range(rounds):
        for candidate in found:
            times[candidate].append(milliseconds(candidate, x))
    return times


def processes_with_room() -> int:
    """How many processes of a forward and backward, as this one has made, the GPU's free memory holds."""
    torch.cuda.empty_cache()
    each = torch.cuda.max_memory_reserved() * 3 // 2 + 2**30  # what lies between blocks; a context and its code
    return torch.cuda.mem_get_info()[0] // each


def compile_all(found: list[Candidate], expected: dict[int, list[Tensor]], deadline: float) -> list[Candidate]:
    """Those that work, the present table's first."""
    right = [(name, size, LAUNCHES[name][size]) for name, size in dict.fromkeys((c[0], c[1]) for c in found)]
    processes = max(1, min((os.cpu_count() or 2) - 1, processes_with_room()))
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))
    jobs = {pool.submit(try_candidate, c, expected[c[1]]): c for c in found if c not in right}
    try:
        for job in as_completed(jobs, timeout=max(1.0, deadline - time.monotonic())):
            name, size, how = jobs[job]
            if (wrong := job.result()) is None:
                right.append(jobs[job])
            else:
                print(f"{name} {size} {how}: {wrong}", flush=True)
    except TimeoutError:
        print(f"{sum(not job.done() for job in jobs)} candidates were not compiled in time", flush=True)
    for process in pool._processes.values():
        process.kill()
    pool.shutdown(cancel_futures=True)
    return right


def measure(sizes: list[int], minutes: float) -> list[dict[str, Any]]:
    """Times of all candidates, the fastest of each row first; the rows of `LAUNCHES` become the fastest."""
    deadline = time.monotonic() + 60 * minutes
    found = [(name, size, how) for size in sizes for name in LAUNCHES for how in candidates(name, size)]
    expected = {size: sample(draw(size)) for size in sizes}
    right = compile_all(found, expected, deadline)
    records = []
    for size in sizes:
        x = draw(size)
        for name in LAUNCHES:
            times = in_turns([c for c in right if c[:2] == (name, size)], x, 1)
            best = sorted(times, key=lambda c: times[c])[:FINAL]
            present = (name, size, LAUNCHES[name][size])
            times |= in_turns(list(dict.fromkeys([*best, present])), x, ROUNDS)
            rows = [
                {"kernel": name, "size": size, "launch": vars(c[2]), "present": c == present, "ms": ms}
                for c, ms in times.items()
            ]
            rows.sort(key=lambda row: (len(row["ms"]) == 1, statistics.median(row["ms"])))
            records += rows
            LAUNCHES[name][size] = Launch(**rows[0]["launch"])
            before = statistics.median(times[present])
            print(f"{name} {size}: {LAUNCHES[name][size]}, {statistics.median(rows[0]['ms']):.3f} ms for {before:.3f}")
    return records


def table() -> str:
    def write(how: Launch) -> str:
        return f"Launch({how.num_warps}, {how.num_stages}, {how.tile})"

    rows = (
        f'    "{name}": {{{", ".join(f"{size}: {write(how)}" for size, how in sizes.items())}}},\n'
        for name, sizes in LAUNCHES.items()
    )
    return "LAUNCHES: dict[str, dict[int, Launch]] = {\n" + "".join(rows) + "}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", type=int, help="32, 64, 128, 256")
    parser.add_argument("--minutes", type=float, default=10, help="for compiling")
    parser.add_argument("--write", action="store_true", help="put the fastest into portable.py")
    options = parser.parse_args()
    sizes = options.sizes or list(WARPS)
    if DEVICE == "cpu":
        sys.exit("triton_table: no GPU, expected one to measure on")
    if not set(sizes) <= set(WARPS):
        sys.exit(f"triton_table: sizes are {sizes}, expected some of {', '.join(map(str, WARPS))}")
    from gpu_op import system

    records = measure(sizes, options.minutes)
    shape = {"B": B, "T": T, "H": H, "R": R}
    RESULTS.write_text(json.dumps({"system": system(), "shape": shape, "launches": records}) + "\n", encoding="utf-8")
    print(table())
    if options.write:
        text = FILE.read_text(encoding="utf-8")
        FILE.write_text(
            re.sub(r"LAUNCHES: .*?\n}\n", lambda _: table(), text, count=1, flags=re.DOTALL), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
