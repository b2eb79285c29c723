"""The op and its decode step on one GPU, beside flash-linear-attention (fla): speed, memory, first call.

    python benchmarks/gpu_op.py                    # everything, about three minutes once fla has tuned itself
    python benchmarks/gpu_op.py op decode          # only these parts: op, grid, decode, first
    python benchmarks/gpu_op.py tables             # print the tables of what was measured before, no GPU needed

Every part's raw numbers go into `results/gpu_op.json` as soon as it is done (parts that were not run keep their
earlier numbers); `results/gpu_op.png` shows the main shapes, `results/gpu_op_grid.png` the other sizes. Rivals take
turns within a run; figures are medians of times between CUDA events. fla tunes itself at its first calls, which takes
minutes.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from carve.bench import CONTENTS, Shape, bench, ceilings, draw, markdown, take_turns
from carve.files import replace_text
from carve.ops import CarveState, decode_carve

RESULTS = Path(__file__).parent / "results" / "gpu_op.json"
MAIN = [Shape(8, 4096), Shape(2, 4096), Shape(1, 32768)]
GRID = [
    *(Shape(8, 4096, chunk_size=C) for C in (16, 32, 128, 256, 512)),
    *(Shape(8, 4096, key_dim=K, value_dim=V) for K, V in ((64, 64), (64, 128), (128, 64))),
    *(Shape(1, T) for T in (2048, 8192, 131072)),
    *(Shape(8, 4096, heads=H) for H in (4, 8, 32)),
]
BATCHES = (1, 8, 32, 128)
ROUNDS = 20


def system() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    asked = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"]
    versions = {}
    for name in ("torch", "triton", "cuda-core", "fla-core", "liger-kernel"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "driver and clocks": subprocess.run(asked, capture_output=True, text=True).stdout.strip(),
        "cuda": torch.version.cuda,
        **versions,
        "date": datetime.date.today().isoformat(),
    }


def op() -> dict[str, Any]:
    device = torch.device("cuda")
    limits = ceilings(device)
    rows = []
    for shape in MAIN:
        found = bench(shape, ["cuda", "triton"], list(CONTENTS), device, ROUNDS)
        print(markdown(shape, found, limits), flush=True)
        rows += found
        torch.cuda.empty_cache()
    return {"copy_bytes_per_second": limits[0], "product_operations_per_second": limits[1], "rows": rows}


def grid() -> dict[str, Any]:
    """Other sizes; rivals beside other lengths only, as fla tunes itself for minutes for other heads."""
    rows: list[dict[str, Any]] = []
    for shape in GRID:
        beside = replace(shape, batch=1, length=1) == Shape(1, 1)
        found = bench(shape, ["cuda"], list(CONTENTS), torch.device("cuda"), 8, beside)
        times = (f"{row['name']} {row['forward_ms']:.3f} {row['both_ms']:.3f}" for row in found)
        print(shape, ", ".join(times), flush=True)
        rows += found
        torch.cuda.empty_cache()
    return {"rows": rows}


def decode() -> dict[str, Any]:
    """One token in a CUDA graph, every sequence at another position; inputs in turn from enough copies of the state."""
    device = torch.device("cuda")
    copy = ceilings(device)[0]
    rows = []
    for B in BATCHES:
        shape = Shape(B, 1)
        traffic = 2 * 4 * B * shape.heads * shape.key_dim * shape.value_dim
        copies = max(1, 2 * 10**8 // traffic)  # more than the L2 cache holds
        graphs = {f"carve {name}": capture_carve(shape, content, copies) for name, content in CONTENTS.items()}
        graphs |= capture_fla(shape, copies)
        times = take_turns({name: graph.replay for name, graph in graphs.items()}, 50, device)
        for name, ms in times.items():
            us = 1e3 * statistics.median(ms) / copies
            share = traffic / (us / 1e6) / copy
            rows.append({"name": name, "batch": B, "us": us, "share_of_copy": share, "raw_ms": ms, "steps": copies})
            print(f"B{B} {name}: {us:.2f} us, state traffic at {share:.0%} of copy", flush=True)
    return {"copy_bytes_per_second": copy, "rows": rows}


def capture(step: Any) -> torch.cuda.CUDAGraph:
    """A graph of the step, which keeps alive the tensors that the step refers to."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.step = step
    return graph


def capture_carve(shape: Shape, content: str | None, copies: int) -> torch.cuda.CUDAGraph:
    B, H, K, V, device = shape.batch, shape.heads, shape.key_dim, shape.value_dim, torch.device("cuda")
    x = draw(shape, content, device, torch.bfloat16)
    x = {name: y.detach() if isinstance(y, torch.Tensor) else y for name, y in x.items()}
    size = {None: None, "mean": (B, H, 16), "read": (B, H, K, 16)}[content]
    states = [
        CarveState(
            torch.randn(B, H, K, V, device=device),
            None if size is None else torch.randn(size, device=device),
            torch.zeros(B, H, V, device=device) if content == "mean" else None,
            torch.randint(shape.chunk_size, (B,), device=device),
        )
        for _ in range(copies)
    ]

    def step() -> None:
        for state in states:
            decode_carve(**x, state=state, backend="cuda")

    return capture(step)


def capture_fla(shape: Shape, copies: int) -> dict[str, torch.cuda.CUDAGraph]:
    try:
        from fla.ops.gdn2 import fused_recurrent_gdn2
    except ImportError:
        return {}
    B, H, K, V, device = shape.batch, shape.heads, shape.key_dim, shape.value_dim, torch.device("cuda")
    x = draw(shape, None, device, torch.bfloat16)
    inputs = {name: x[name].detach() for name in ("q", "k", "v", "g")}
    inputs |= {"b": torch.sigmoid(x["e"].detach()), "w": torch.sigmoid(torch.randn_like(x["v"]))}
    states = [torch.randn(B, H, K, V, device=device) for _ in range(copies)]

    def step() -> None:
        for state in states:
            fused_recurrent_gdn2(**inputs, initial_state=state, output_final_state=True)

    with torch.no_grad():
        return {"fla fused_recurrent_gdn2": capture(step)}


FIRST = """
import time; begin = time.perf_counter()
import torch; from carve.bench import Shape, draw, runs_of; from carve.ops import chunk_carve
torch.zeros(1, device="cuda"); torch.cuda.synchronize(); ready = time.perf_counter()
x = draw(Shape(1, 256), "mean", torch.device("cuda"), torch.bfloat16) | {"backend": "cuda"}
runs_of(chunk_carve, x)[1](); torch.cuda.synchronize(); print(time.perf_counter() - ready)
"""


def first() -> dict[str, Any]:
    """Seconds of the first forward and backward of a process: on an empty cache, and on the one that it left."""
    with tempfile.TemporaryDirectory() as folder:
        # no cache but ours is full either
        environment = os.environ | {"HOME": folder, "CARVE_CACHE": f"{folder}/carve", "CUDA_CACHE_PATH": f"{folder}/nv"}
        command, seconds = [sys.executable, "-c", FIRST], []
        for _ in range(2):
            seconds.append(float(subprocess.check_output(command, env=environment, text=True).split()[-1]))
            kernels = len(list(Path(folder, "carve").glob("*.cubin")))
            if kernels != 3:
                raise RuntimeError(f"{kernels} kernels in the cache, expected those of forward, reverse and gradients")
    print(
        f"first forward and backward: {seconds[0]:.1f} s on an empty cache, {seconds[1]:.1f} s on a full one",
        flush=True,
    )
    return {"empty_cache_s": seconds[0], "full_cache_s": seconds[1]}


PARTS = {"op": op, "decode": decode, "first": first, "grid": grid}


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def save(results: dict[str, Any], path: Path) -> None:
    replace_text(path, json.dumps(results, indent=1))


def tables(results: dict[str, Any]) -> None:
    """Print what was measured, as Markdown, and draw the main shapes."""
    found = results.get("op")
    if found:
        limits = found["copy_bytes_per_second"], found["product_operations_per_second"]
        print(f"copy {limits[0] / 1e12:.2f} TB/s, bf16 product {limits[1] / 1e12:.0f} TFLOP/s\n")
        figure, axes = plt.subplots(1, len(MAIN), figsize=(12, 3.5), layout="constrained")
        for shape, axis in zip(MAIN, axes, strict=True):
            rows = [row for row in found["rows"] if (row["batch"], row["length"]) == (shape.batch, shape.length)]
            title = f"B {shape.batch}, T {shape.length}"
            print(f"{title}, H 16, K = V = 128\n\n{markdown(shape, rows, limits)}\n")
            names = [row["name"] for row in rows]
            axis.barh(names, [row["both_ms"] for row in rows], color="#9db4c0", label="forward + backward")
            axis.barh(names, [row["forward_ms"] for row in rows], color="#253237", label="forward")
            axis.set(title=title, xlabel="ms")
            axis.invert_yaxis()
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        figure.suptitle(f"{found['system']['device']}, bf16, H 16, K = V = 128, medians")
        figure.savefig(RESULTS.with_suffix(".png"), dpi=120)
    if "decode" in results:
        print("| decode, us a step (share of copy bandwidth) | " + " | ".join(f"B {B}" for B in BATCHES) + " |")
        print("|---" * (1 + len(BATCHES)) + "|")
        rows = results["decode"]["rows"]
        for name in dict.fromkeys(row["name"] for row in rows):
            cells = [f"{row['us']:.2f} ({row['share_of_copy']:.0%})" for row in rows if row["name"] == name]
            print(f"| {name} | " + " | ".join(cells) + " |")
        print()
    if "first" in results:
        print(
            "first forward and backward, s: {empty_cache_s:.1f}, with a full cache {full_cache_s:.1f}\n".format(
                **results["first"]
            )
        )
    if "grid" in results and found:
        draw_grid([*found["rows"], *results["grid"]["rows"]], found["system"]["device"])
    if "grid" in results:
        print("| B | T | H | K | V | C | | forward, ms | forward + backward, ms |\n" + "|---" * 9 + "|")
        for row in results["grid"]["rows"]:
            sizes = [row[key] for key in ("batch", "length", "heads", "key_dim", "value_dim", "chunk_size")]
            print(
                "|",
                " | ".join(map(str, sizes)),
                "|",
                row["name"],
                f"| {row['forward_ms']:.3f} | {row['both_ms']:.3f} |",
            )


def draw_grid(rows: list[dict[str, Any]], device: str) -> None:
    """Time of forward and backward a token and head, against T, H and C, the other sizes as in the main shapes."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    common = {"key_dim": 128, "value_dim": 128}
    panels = [
        ("length", "T (B 1)", common | {"batch": 1, "heads": 16, "chunk_size": 64}),
        ("heads", "H (B 8, T 4096)", common | {"batch": 8, "length": 4096, "chunk_size": 64}),
        ("chunk_size", "C (B 8, T 4096)", common | {"batch": 8, "length": 4096, "heads": 16}),
    ]
    names = [name for name in dict.fromkeys(row["name"] for row in rows) if "triton" not in name]
    for axis, (size, label, fixed) in zip(axes, panels, strict=True):
        for name in names:
            line = [row for row in rows if row["name"] == name and fixed.items() <= row.items()]
            at = {row[size]: 1e6 * row["both_ms"] / (row["batch"] * row["length"] * row["heads"]) for row in line}
            if size == "chunk_size" and len(at) == 1:  # a rival, which has none
                axis.axhline(next(iter(at.values())), ls=":", color=f"C{names.index(name)}")
            elif at:
                axis.plot(*zip(*sorted(at.items()), strict=True), "o-", color=f"C{names.index(name)}", label=name)
        axis.set(xlabel=label, ylim=(0, None))
        axis.set_xscale("log", base=2)
    axes[0].set_ylabel("ns a token and head")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.suptitle(f"{device}, bf16, forward + backward, H 16, K = V = 128, C 64 where not said otherwise")
    figure.savefig(RESULTS.with_name("gpu_op_grid.png"), dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, "tables"], default=[*PARTS], help="what to measure")
    parts = [part for part in parser.parse_args().parts if part != "tables"]
    results = load(RESULTS)
    for part in parts:
        begin = time.perf_counter()
        results |= {part: PARTS[part]() | {"system": system()}}
        save(results, RESULTS)
        print(f"-- {part}: {time.perf_counter() - begin:.0f} s\n", flush=True)
    tables(results)


if __name__ == "__main__":
    main()
