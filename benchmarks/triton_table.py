"""Measures launch configurations of the portable kernels on this GPU, for the table in carve/ops/kernels/portable.py.

    python benchmarks/triton_table.py 128              # the rows for heads of up to 128; all rows without a number
    python benchmarks/triton_table.py 128 --minutes 2  # candidates that are not compiled by then are left out
    python benchmarks/triton_table.py 128 --write      # put the fastest into portable.py

Every candidate is compiled in another process, by a whole forward and backward on the arguments that are timed
afterwards (Triton compiles anew for other divisibilities), and counts only if what comes out is what the present table
gives, to rounding. The best of a first round are then timed in turns. Raw numbers go into `results/triton_table.json`,
where sizes that were not measured keep their earlier ones.
"""

import argparse
import functools
import itertools
import multiprocessing
import os
import re
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from carve.ops import chunk_carve
from carve.ops.kernels import portable
from carve.ops.kernels.portable import LAUNCHES, Launch, Plan

FILE = Path(portable.__file__)
RESULTS = Path(__file__).parent / "results" / "triton_table.json"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, T, H, R = 8, 4096, 16, 16
CONTENTS = [None, "mean", "read"]  # what the gates see of the memory in the ops that are run
WARPS = {32: (1, 2, 4), 64: (1, 2, 4, 8), 128: (1, 2, 4, 8, 16), 256: (2, 4, 8, 16)}
STAGES = (1, 2, 3)
TILES = {"gated": (32, 64, 128), "keys": (32, 64, 128)}  # of V, of K; the others keep the present table's
FINAL, ROUNDS = 3, 7  # candidates of a row in the last round; turns
TOLERANCE = 0.02  # of the norm: other tiles add up bfloat16 products in another order

Candidate = tuple[str, int, Launch]  # kernel, size, configuration


def row_of(kernel: str, constants: dict[str, Any]) -> str | None:
    """The row of the table that decides this launch."""
    if kernel == "run_blocks":
        return "gated" if constants["GATED"] else "content"
    if kernel == "reverse_blocks":
        return "reverse" if constants["CONTENT"] else "gated"
    return {"prepare": "prepare", "differentiate_values": "values", "differentiate_keys": "keys"}.get(kernel)


def candidates(name: str, size: int) -> Iterator[Launch]:
    present = LAUNCHES[name][size].tile  # which may be more than there is
    tiles = [present, *(tile for tile in TILES.get(name, ()) if tile <= size and tile != min(present, size))]
    stages = (1,) if name in ("prepare", "values", "keys") else STAGES
    # with four warps, products of [256, 16] become wgmma, for which ptxas 12.8 makes wrong code in these kernels
    most = 2 if size > 128 and name in ("content", "reverse", "keys") else 16
    for warps, stage, tile in itertools.product(WARPS[size], stages, tiles):
        # of 16 tokens and a tile of columns, two numbers a thread or more
        if warps <= min(most, min(tile, size) // 4):
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
    """Outputs and gradients, with each content."""
    found = []
    for content in CONTENTS:
        blind = {name: y for name, y in x.items() if not name.startswith("p_")}
        taken, options = (x, {"content": content, "content_norm": "rms"}) if content else (blind, {})
        o, _ = chunk_carve(**taken, **options, backend="triton")
        weights = torch.sin(torch.arange(o.numel(), device=DEVICE)).view(o.shape)
        found += [o.detach(), *torch.autograd.grad((o.float() * weights).sum(), list(taken.values()))]
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


@functools.lru_cache(1)
def example(size: int) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Arguments, and a sample of what the present table makes of them."""
    x = draw(size)
    return x, sample(x)


def try_candidate(candidate: Candidate) -> str | None:
    """Compile and run it; what is wrong with it, or None."""
    try:
        x, expected = example(candidate[1])
        with launching(*candidate):
            found = sample(x)
    except Exception as error:  # too many registers, too much shared memory: whatever the compiler says
        return f"{type(error).__name__}: {error}".splitlines()[0][:100]
    right = all((y - z).norm() <= TOLERANCE * z.norm() for y, z in zip(found, expected, strict=True))
    return None if right else "wrong results"


def milliseconds(candidate: Candidate, x: dict[str, Tensor]) -> float:
    """What the launches that a row of the table decides take together, of one forward and backward of each content."""
    plain, marks = Plan.launch, []

    def launch(plan: Plan, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        begin = mark()
        plain(plan, kernel, programs, *arguments, **constants)
        if row_of(kernel.__name__, constants) == candidate[0]:
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


def serve(channel: Connection) -> None:
    """Try what comes, up to the first that fails: it may leave the GPU or the arguments unfit for the next."""
    wrong = None
    while wrong is None:
        wrong = try_candidate(channel.recv())
        channel.send(wrong)


def start() -> Connection:
    """To a new process that serves."""
    context = multiprocessing.get_context("spawn")
    channel, other = context.Pipe()
    context.Process(target=serve, args=(other,), daemon=True).start()
    other.close()  # so that the channel ends with the process
    return channel


def compile_all(found: list[Candidate], deadline: float) -> list[Candidate]:
    """Those that work, the present table's first."""
    right = [(name, size, LAUNCHES[name][size]) for name, size in dict.fromkeys((c[0], c[1]) for c in found)]
    left = [c for c in found if c not in right]
    processes = max(1, min((os.cpu_count() or 2) - 1, processes_with_room()))
    idle: list[Connection] = []
    busy: dict[Connection, Candidate] = {}
    while (left or busy) and (seconds := deadline - time.monotonic()) > 0:
        while left and len(busy) < processes:
            channel = idle.pop() if idle else start()
            busy[channel] = left.pop(0)
            channel.send(busy[channel])
        for channel in wait(list(busy), seconds):
            name, size, how = candidate = busy.pop(channel)
            try:
                wrong = channel.recv()
            except (EOFError, OSError):
                wrong = "its process died"
            if wrong is None:
                right.append(candidate)
                idle.append(channel)
            else:
                print(f"{name} {size} {how}: {wrong}", flush=True)
    if late := len(left) + len(busy):
        print(f"{late} candidates were not compiled in time", flush=True)
    for process in multiprocessing.active_children():
        process.kill()
        process.join()
    return right


def measure(sizes: list[int], minutes: float) -> list[dict[str, Any]]:
    """Times of all candidates, the fastest of each row first; the rows of `LAUNCHES` become the fastest."""
    deadline = time.monotonic() + 60 * minutes
    found = [(name, size, how) for size in sizes for name in LAUNCHES for how in candidates(name, size)]
    for size in sizes:
        run(draw(size))  # so that the other processes find the present table compiled
    right = compile_all(found, deadline)
    records = []
    for size in sizes:
        x = draw(size)
        for name in LAUNCHES:
            ours = [c for c in right if c[:2] == (name, size)]
            in_turns(ours, x, 1)  # not counted: it loads what other processes have compiled
            times = in_turns(ours, x, 1)
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


def replace_table(text: str, new: str) -> str:
    """portable.py's text with another table."""
    text, found = re.subn(r"^LAUNCHES: .*?^}\n", lambda _: new, text, flags=re.DOTALL | re.MULTILINE)
    if found != 1:
        raise ValueError(f"portable.py has {found} tables LAUNCHES, expected one")
    return text


def merge(results: dict[str, Any], records: list[dict[str, Any]], about: dict[str, Any]) -> dict[str, Any]:
    """Results by size; those that were not measured now keep what was measured before, and on what."""
    new = {}
    for size in dict.fromkeys(record["size"] for record in records):
        launches = [record for record in records if record["size"] == size]
        new[str(size)] = {**about, "contents": CONTENTS, "launches": launches}
    return results | new


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
    from gpu_op import load, save, system

    records = measure(sizes, options.minutes)
    about = {"system": system(), "shape": {"B": B, "T": T, "H": H, "R": R}}
    save(merge(load(RESULTS), records, about), RESULTS)
    print(table())
    if options.write:
        FILE.write_text(replace_table(FILE.read_text(encoding="utf-8"), table()), encoding="utf-8")


if __name__ == "__main__":
    main()
