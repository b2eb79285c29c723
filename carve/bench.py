"""How fast the op is on this device, beside its floors and flash-linear-attention (fla) where that is installed."""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from carve.files import check_json, replace_text
from carve.ops import chunk_carve

CONTENTS = {"blind": None, "mean": "mean", "read": "read"}
RANK = 16
Run = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """What the op is measured on: B sequences of T tokens, H heads (keys and values alike)."""

    batch: int
    length: int
    heads: int = 16
    key_dim: int = 128
    value_dim: int = 128
    chunk_size: int = 64

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} is {value}, expected a whole number of at least 1")

    @property
    def token_heads(self) -> int:
        return self.batch * self.length * self.heads


def floor_bytes(shape: Shape, backward: bool) -> int:
    """Bytes that must move through device memory: every input read once a pass, every output written once.

    16-bit q, k, v, e, o and their gradients, fp32 g and w. What a backward pass needs saved is not counted.
    """
    K, V = shape.key_dim, shape.value_dim
    inputs = 2 * (3 * K + V) + 4 * K + 4  # q, k, e, v; g; w
    forward = inputs + 2 * V
    return shape.token_heads * (forward + (2 * inputs + 2 * V if backward else 0))  # read again, do; gradients


def floor_operations(shape: Shape, backward: bool) -> int:
    """Floating-point operations of the products of the chunk form with triangular blocks of 16 tokens."""
    K, V = shape.key_dim, shape.value_dim
    forward = 3 * K * V + 2 * 16 * K + 2 * 16 * V  # b k S, q S, k v_new; A, M; T r, M v_new
    back = 11 * K * V + 4 * 16 * K + 4 * 16 * V
    return 2 * shape.token_heads * (forward + (back if backward else 0))


def draw(shape: Shape, content: str | None, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of `chunk_carve` as a layer makes them; the leaves want gradients."""
    r = torch.Generator(device).manual_seed(0)
    B, T, H, K, V = shape.batch, shape.length, shape.heads, shape.key_dim, shape.value_dim

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=r, device=device)

    x = {name: normalize(normal(B, T, H, K), dim=-1).to(dtype) for name in ("q", "k")}
    x |= {"v": normal(B, T, H, V).to(dtype), "g": -softplus(normal(B, T, H, K) - 3)}
    x |= {"e": normal(B, T, H, K).to(dtype), "w": normal(B, T, H)}
    if content:
        x |= {"p_down": V**-0.5 * normal(H, V, RANK), "p_up": 0.1 * normal(H, RANK, K)}
    if content == "read":
        x["p_write"] = 0.1 * normal(H, RANK)
    for y in x.values():
        y.requires_grad_()
    options = {"content": content or "mean", "content_norm": "rms", "chunk_size": shape.chunk_size}
    return x | options


def runs_of(op: Callable[..., Any], arguments: dict[str, Any]) -> tuple[Run, Run]:
    """The forward alone, without gradients, and the forward and backward."""
    leaves = [y for y in arguments.values() if isinstance(y, Tensor) and y.requires_grad]
    do = torch.randn_like(arguments["v"])

    def forward() -> None:
        with torch.no_grad():
            op(**arguments)

    def both() -> None:
        torch.autograd.grad(op(**arguments)[0], leaves, do)

    return forward, both


def rivals(shape: Shape, device: torch.device) -> dict[str, tuple[Run, Run]]:
    """fla's operators on the same shapes. Their gates come after the sigmoid, which ours applies itself."""
    if device.type != "cuda":
        return {}
    try:
        from fla.ops.gdn2 import chunk_gdn2
        from fla.ops.kda import chunk_kda
    except ImportError:
        return {}
    x = draw(shape, None, device, torch.bfloat16)
    shared = {name: x[name] for name in ("q", "k", "v", "g")}
    open_gates = torch.sigmoid(x["e"].detach())
    erase = open_gates.requires_grad_()
    write = torch.sigmoid(torch.randn_like(x["v"])).requires_grad_()
    beta = torch.sigmoid(x["w"].detach()).bfloat16().requires_grad_()
    return {
        "fla chunk_gdn2": runs_of(chunk_gdn2, shared | {"b": erase, "w": write}),
        "fla chunk_kda": runs_of(chunk_kda, shared | {"beta": beta}),
    }


def take_turns(runs: dict[str, Run], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of each run, the runs one after the other in every round, after two rounds of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    pending: list[tuple[str, Any, Any]] = []
    for i in range(rounds + 2):
        for name, run in runs.items():
            if device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run()
                end.record()
                if i > 1:
                    pending.append((name, start, end))
            else:
                begin = time.perf_counter()
                run()
                if i > 1:
                    times[name].append(1e3 * (time.perf_counter() - begin))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    for name, start, end in pending:
        times[name].append(start.elapsed_time(end))
    return times


def peak_memory(run: Run, device: torch.device) -> float | None:
    """MiB above what was there before, outputs, gradients and what is saved included; None off CUDA."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def ceilings(device: torch.device) -> tuple[float, float] | None:
    """Bytes and 16-bit operations a second that a large copy and a large matrix product reach; None off CUDA."""
    if device.type != "cuda":
        return None
    x, y = (torch.randn(2**28, device=device) for _ in range(2))
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    runs: dict[str, Run] = {"copy": lambda: y.copy_(x), "product": lambda: a @ a}
    times = {name: statistics.median(ms) for name, ms in take_turns(runs, 10, device).items()}
    return 2 * 4 * 2**28 / (times["copy"] / 1e3), 2 * 8192**3 / (times["product"] / 1e3)


def bench(
    shape: Shape, backends: list[str], contents: list[str], device: torch.device, rounds: int, beside: bool = True
) -> list[dict]:
    """Measure one shape: a row for each backend and content and, with `beside`, one for each rival.

    Returns:
        Rows with `name`, `forward_ms`, `both_ms` (forward and backward; medians), all the times under `raw`, and
        `peak_mib` of forward and backward.

    Raises:
        ValueError: a backend does not serve the shape on this device.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    candidates: dict[str, tuple[Run, Run]] = {}
    for backend in backends:
        for content in contents:
            arguments = draw(shape, CONTENTS[content], device, dtype) | {"backend": backend}
            candidates[f"carve {content}, {backend}"] = runs_of(chunk_carve, arguments)
    candidates |= rivals(shape, device) if beside else {}
    forward = take_turns({name: run[0] for name, run in candidates.items()}, rounds, device)
    both = take_turns({name: run[1] for name, run in candidates.items()}, rounds, device)
    return [
        {
            "name": name,
            **vars(shape),
            "forward_ms": statistics.median(forward[name]),
            "both_ms": statistics.median(both[name]),
            "peak_mib": peak_memory(run[1], device),
            "raw": {"forward_ms": forward[name], "both_ms": both[name]},
        }
        for name, run in candidates.items()
    ]


def markdown(shape: Shape, rows: list[dict], limits: tuple[float, float] | None) -> str:
    """A table of one shape; with the device's ceilings, the floors and how many times a row takes them."""

    def floor(backward: bool) -> float | None:
        if limits is None:
            return None
        seconds = floor_bytes(shape, backward) / limits[0], floor_operations(shape, backward) / limits[1]
        return 1e3 * max(seconds)

    def cell(ms: float, least: float | None) -> str:
        return f"{ms:.3f}" if least is None else f"{ms:.3f} ({ms / least:.1f}x)"

    lines = ["| | forward, ms | forward + backward, ms | peak extra memory, MiB |", "|---|---|---|---|"]
    for row in rows:
        memory = "" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}"
        times = cell(row["forward_ms"], floor(False)), cell(row["both_ms"], floor(True))
        lines.append(f"| {row['name']} | {times[0]} | {times[1]} | {memory} |")
    if limits is not None:
        lines.append(f"| floor (bytes or operations) | {floor(False):.3f} | {floor(True):.3f} | |")
    return "\n".join(lines)


def report(
    sizes: tuple[int, int, int, int, int, int], *, backend: str, device: str | None, rounds: int, json_path: Path | None
) -> None:
    """Measure and print one shape: B, T, H, K, V and C.

    Raises:
        ValueError: a size or `rounds` is less than 1, the device is not there, or the backend does not serve the shape.
        OSError: the file cannot be written.
    """
    shape = Shape(*sizes)
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}, expected at least 1")
    if json_path is not None:
        check_json(json_path)
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {device!r}, expected one that PyTorch has here ({error})") from error
    rows = bench(shape, [backend], list(CONTENTS), place, rounds)
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else f"{place}, {torch.get_num_threads()} threads"
    print(f"{shape}\n{name}, {'bfloat16' if place.type == 'cuda' else 'float32'}, medians of {rounds}\n")
    print(markdown(shape, rows, ceilings(place)))
    if json_path is not None:
        replace_text(json_path, json.dumps({"device": name, "torch": torch.__version__, "rows": rows}, indent=1))
