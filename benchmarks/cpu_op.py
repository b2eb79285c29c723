"""The op and the model's decoding on a CPU: speed and memory, measured, with raw numbers and plots.

    python benchmarks/cpu_op.py                    # everything, some minutes
    python benchmarks/cpu_op.py speed length       # only these parts

Writes `results/cpu_op.json` (parts that were not run keep their earlier numbers) and `results/cpu_op_*.png`.
Two threads, float32. Rivals take turns within a run; figures are medians.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from carve import CarveConfig, CarveForCausalLM, CarveMixer
from carve.evals import perplexity
from carve.ops import chunk_carve, recurrent_carve
from carve.text import read_documents
from carve.train.tokenizer import byte_tokenizer

RESULTS = Path(__file__).parent / "results"
THREADS = 2
B, H, K, V = 1, 4, 64, 64


def arguments(T: int) -> dict:
    """What a CarveMixer at its initialisation hands to the op, as leaves that want gradients."""
    torch.manual_seed(0)
    mixer = CarveMixer(H * K, num_heads=H, head_dim=K)
    with torch.no_grad():
        op, _ = mixer.project(torch.randn(B, T, H * K))
    leaf = {name: x.detach().clone().requires_grad_() for name, x in op.items() if isinstance(x, torch.Tensor)}
    return op | leaf


def forward(op: Callable, x: dict) -> None:
    with torch.no_grad():
        op(**x)


def forward_backward(op: Callable, x: dict) -> None:
    o, _ = op(**x)
    o.backward(torch.ones_like(o))
    for y in x.values():
        if isinstance(y, torch.Tensor):
            y.grad = None


def seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def take_turns(runs: dict[str, tuple[Callable[[], object], int]]) -> dict[str, list[float]]:
    """Seconds of each run, repeated so many times, the rivals one after the other in each round."""
    for run, _ in runs.values():
        run()  # warm-up
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(max(repeats for _, repeats in runs.values())):
        for name, (run, repeats) in runs.items():
            if i < repeats:
                times[name].append(seconds(run))
    return times


def machine_rates() -> dict[str, float]:
    """What this machine reaches in this run: multiply-adds of a large product, and bytes of a large copy, a second."""
    x, big = torch.randn(1024, 1024), torch.randn(1 << 25)
    product = statistics.median(seconds(lambda: x @ x) for _ in range(15))
    copy = statistics.median(seconds(lambda: big.clone()) for _ in range(7))
    return {"flops_per_s": 2 * 1024**3 / product, "bytes_per_s": 2 * big.nbytes / copy}


def forward_floor(T: int, rates: dict[str, float]) -> dict[str, float]:
    """The least a forward by chunks of 64 can cost: its matrix products, and each input and output moved once."""
    L = 64
    flops_token_head = 2 * (2 * L * K) + 3 * (2 * K * V) + 2 * L * V + L * V  # M, A; q S, bk S, new S; M v; solve
    flops, moved = T * H * flops_token_head, 4 * T * H * (4 * K + 2 * V + 1)
    floors = {"flops": flops, "bytes": moved}
    return floors | {"flops_s": flops / rates["flops_per_s"], "bytes_s": moved / rates["bytes_per_s"]}


# -- the parts --


def speed() -> dict:
    """chunk_carve against the token loop, T = 4096."""
    x, rates = arguments(4096), machine_rates()
    times = take_turns(
        {
            "chunk forward": (lambda: forward(chunk_carve, x), 15),
            "loop forward": (lambda: forward(recurrent_carve, x), 5),
            "chunk forward+backward": (lambda: forward_backward(chunk_carve, x), 15),
            "loop forward+backward": (lambda: forward_backward(recurrent_carve, x), 3),
        }
    )
    middle = {name: statistics.median(runs) for name, runs in times.items()}
    ratios = {way: middle[f"loop {way}"] / middle[f"chunk {way}"] for way in ("forward", "forward+backward")}
    floor = forward_floor(4096, rates)
    print(f"  matrix products {rates['flops_per_s'] / 1e9:.0f} GFLOP/s, copies {rates['bytes_per_s'] / 1e9:.1f} GB/s")
    print(f"  forward floor: {floor['flops_s'] * 1e3:.1f} ms of products, {floor['bytes_s'] * 1e3:.1f} ms of moving")
    for way, ratio in ratios.items():
        chunk, loop = middle[f"chunk {way}"] * 1e3, middle[f"loop {way}"] * 1e3
        print(f"  {way}: chunks {chunk:.1f} ms, loop {loop:.0f} ms, {ratio:.1f} times faster")
    figure, axes = plt.subplots(figsize=(6, 3.5))
    names = [*middle, "floor (products)"]
    values = [1e3 * t for t in middle.values()] + [1e3 * floor["flops_s"]]
    axes.barh(names, values, color=["C0", "C1", "C0", "C1", "C7"])
    axes.bar_label(axes.containers[0], fmt="%.0f ms", padding=3)
    axes.set(xscale="log", xlabel="milliseconds", xlim=(1, 4 * max(values)), title=f"T = 4096, H = {H}, K = V = {K}")
    axes.invert_yaxis()
    figure.savefig(RESULTS / "cpu_op_speed.png", dpi=150, bbox_inches="tight")
    return {"seconds": times, "median_s": middle, "times_faster": ratios, "forward_floor": floor} | rates


def length() -> dict:
    """Cost of a token, forward and backward, against T."""
    inputs = {T: arguments(T) for T in (2048, 4096, 8192, 16384, 32768)}
    times: dict[str, list[float]] = {str(T): [] for T in inputs}
    forward_backward(chunk_carve, inputs[2048])  # warm-up
    for _ in range(5):  # in each round every length gets the same time, whatever else the machine does
        for T, x in inputs.items():
            times[str(T)] += [seconds(lambda: forward_backward(chunk_carve, x)) for _ in range(32768 // T)]  # noqa: B023
    micros = {T: statistics.median(runs) / int(T) * 1e6 for T, runs in times.items()}
    relative = {T: cost / micros["2048"] for T, cost in micros.items()}
    for T in micros:
        print(f"  T = {T}: {micros[T]:.1f} us a token, {relative[T]:.2f} of T = 2048")
    figure, axes = plt.subplots(figsize=(6, 3.5))
    axes.plot([int(T) for T in micros], list(micros.values()), "o-", label="chunk_carve, forward + backward")
    axes.axhline(1.2 * micros["2048"], ls="--", color="C7", label="1.2 times T = 2048")
    axes.set(xscale="log", xlabel="T", ylabel="microseconds a token", ylim=(0, 1.5 * max(micros.values())))
    axes.minorticks_off()
    axes.set_xticks([int(T) for T in micros], list(micros))
    axes.legend()
    figure.savefig(RESULTS / "cpu_op_length.png", dpi=150, bbox_inches="tight")
    return {"seconds": times, "us_a_token": micros, "relative_to_2048": relative}


def memory_of(field: str) -> int:
    """Bytes of this process: `VmRSS` resident now, `VmHWM` at most since the mark was reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_of(run: Callable[[], object]) -> int:
    """Bytes resident at most while it runs, above those resident before."""
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
    before = memory_of("VmRSS")
    run()
    return memory_of("VmHWM") - before


def in_subprocess(*words: str) -> dict:
    """This script's measurement of that name in a process of its own, where nothing else has allocated."""
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}  # glibc gives back what is freed
    command = [sys.executable, __file__, "--measure", *words]
    done = subprocess.run(command, env=os.environ | at_once, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def measure_op(T: str) -> dict:
    forward_backward(chunk_carve, arguments(256))  # libraries and their buffers
    x = arguments(int(T))
    leaves = [y for name, y in x.items() if isinstance(y, torch.Tensor) and not name.startswith("p_")]
    for y in leaves:
        y.grad = None

    def run() -> None:
        o, _ = chunk_carve(**x)
        o.backward(torch.ones_like(o))

    return {"inputs": sum(y.nbytes for y in leaves), "extra": peak_of(run)}


def memory() -> dict:
    """Peak extra memory of forward and backward: outputs, their gradient, all gradients, and what is in between."""
    found = {str(T): in_subprocess("op", str(T)) for T in (1024, 2048, 4096, 8192, 16384, 32768)}
    ratios = {T: x["extra"] / x["inputs"] for T, x in found.items()}
    for T, x in found.items():
        print(
            f"  T = {T}: {x['extra'] / 2**20:.0f} MiB beside inputs of {x['inputs'] / 2**20:.0f}: {ratios[T]:.1f} times"
        )
    figure, axes = plt.subplots(figsize=(6, 3.5))
    axes.plot([int(T) for T in ratios], list(ratios.values()), "o-", label="peak resident memory beyond the inputs")
    axes.axhline(6, ls="--", color="C7", label="aim: at most 6")
    axes.set(xscale="log", xlabel="T", ylabel="times the inputs' bytes", ylim=(0, 1.2 * max(6, *ratios.values())))
    axes.minorticks_off()
    axes.set_xticks([int(T) for T in ratios], list(ratios))
    axes.legend()
    figure.savefig(RESULTS / "cpu_op_memory.png", dpi=150, bbox_inches="tight")
    return {"bytes": found, "times_inputs": ratios}


def decode() -> dict:
    """Time of the next token after 1k and after 64k tokens: the op, and a whole model."""
    positions = {"1k": 1024, "64k": 65536}
    states, caches = {}, {}
    config = CarveConfig(vocab_size=256, hidden_size=128, num_hidden_layers=2, num_heads=2, head_dim=64)
    model = CarveForCausalLM(config).eval()
    token = torch.zeros(1, 1, dtype=torch.int64)
    with torch.inference_mode():
        x = {name: y.detach() if isinstance(y, torch.Tensor) else y for name, y in arguments(2048).items()}
        one = x | {name: x[name][:, :1] for name in ("q", "k", "v", "g", "e", "w") if x[name] is not None}
        text = torch.randint(256, (1, 2048))
        for name, position in positions.items():
            state = cache = None
            for start in range(0, position, 2048):
                n = min(2048, position - start)
                cut = {key: x[key][:, :n] for key in ("q", "k", "v", "g", "e", "w") if x[key] is not None}
                _, state = chunk_carve(**x | cut, initial_state=state, output_final_state=True)
                cache = model(text[:, :n], past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
            states[name], caches[name] = state, cache

        def step_op(name: str) -> None:
            _, states[name] = recurrent_carve(**one, initial_state=states[name], output_final_state=True)

        def step_model(name: str) -> None:
            caches[name] = model(token, past_key_values=caches[name], use_cache=True).past_key_values

        # one after the other: a model's step would leave the op's, if it came next, with cold caches
        times = take_turns({f"op {name}": (lambda name=name: step_op(name), 3000) for name in positions})
        times |= take_turns({f"model {name}": (lambda name=name: step_model(name), 1000) for name in positions})
    micros = {name: statistics.median(runs) * 1e6 for name, runs in times.items()}
    ratios = {what: micros[f"{what} 64k"] / micros[f"{what} 1k"] for what in ("op", "model")}
    for what, ratio in ratios.items():
        print(
            f"  {what}: {micros[f'{what} 1k']:.0f} us at 1k, {micros[f'{what} 64k']:.0f} us at 64k, ratio {ratio:.3f}"
        )
    return {"us_a_token": micros, "ratio_64k_to_1k": ratios}


def measure_stream(path: str) -> dict:
    torch.manual_seed(0)
    config = CarveConfig(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_heads=1, head_dim=16
    )
    model, tokenizer = CarveForCausalLM(config), byte_tokenizer()
    perplexity(model, tokenizer, ["warm up " * 2000])
    extra = peak_of(lambda: perplexity(model, tokenizer, read_documents(path)))
    return {"extra": extra, "peak": memory_of("VmHWM")}


def stream() -> dict:
    """Peak memory of a streaming evaluation of one document of 1 MB and of 10 MB."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in (1_000_000, 10_000_000):
            path, written = Path(folder) / f"{size}.txt", 0
            with path.open("w", encoding="utf-8") as file:
                while written < size:
                    for source in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
                        text = source.read_text(encoding="utf-8").encode("ascii", "replace").decode()[: size - written]
                        file.write(text)
                        written += len(text)
            name = f"{size // 10**6} MB"
            found[name] = in_subprocess("stream", str(path))
            print(
                f"  {name}: peak {found[name]['peak'] / 2**20:.0f} MiB, {found[name]['extra'] / 2**20:.1f} in the run"
            )
    return found


PARTS = {part.__name__: part for part in (speed, length, memory, decode, stream)}


def device() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all if none is given")
    parser.add_argument("--measure", nargs=2, metavar=("WHAT", "VALUE"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    torch.set_num_threads(THREADS)
    if chosen.measure:
        what, value = chosen.measure
        print(json.dumps({"op": measure_op, "stream": measure_stream}[what](value)))
        return
    unknown = [part for part in chosen.parts if part not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}, expected one of {', '.join(PARTS)}")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "cpu_op.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in chosen.parts or PARTS:
        print(f"{name}: {PARTS[name].__doc__}")
        about = {"device": device(), "torch": torch.__version__, "threads": THREADS, "dtype": "float32"}
        about["date"] = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        results[name] = about | PARTS[name]()
        path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
