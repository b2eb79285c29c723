"""The layer and the whole model in training on one GPU: what each part costs, and what fused modules would save.

    python benchmarks/gpu_layer.py                 # everything
    python benchmarks/gpu_layer.py parts loss      # only these: traffic, parts, loss, layer, model, preset
    python benchmarks/gpu_layer.py tables          # print the tables of what was measured before; as `traffic`, no GPU

Every part's raw numbers go into `results/gpu_layer.json` as soon as it is done (parts that were not run keep their
earlier numbers). Rivals take turns within a run; figures are medians of times between CUDA events.

`fla` stands for flash-linear-attention: its operators in our layer (the same projections, convolution, gates and
norm), and its fused modules; `liger` for liger-kernel. Rows of what is not installed are left out. fla tunes itself at
its first calls, which takes minutes for its operators; the sizes here are those that `gpu_op.py` runs them at.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from gpu_op import load, save, system
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.llama.modeling_llama import LlamaMLP

import carve.train
from carve import CarveConfig, CarveForCausalLM, CarveMixer
from carve.bench import Run, Shape, ceilings, draw, floor_bytes, peak_memory, take_turns
from carve.mixer import GatedRMSNorm, ShortConvolution
from carve.ops import chunk_carve
from carve.ops.kernels.layer import convolve, convolve_in_torch, unit, unit_in_torch
from carve.train.run import compile_blocks

try:
    from fla.modules.causal_conv1d import causal_conv1d
    from fla.modules.fused_linear_cross_entropy import FusedLinearCrossEntropyLoss
    from fla.modules.l2norm import l2norm
    from fla.modules.norm.fused_norm_gate import rms_norm_gated
    from fla.ops.gdn2 import chunk_gdn2
    from fla.ops.kda import chunk_kda

    FLA = True
except ImportError:
    FLA = False
try:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    LIGER = True
except ImportError:
    LIGER = False

RESULTS = Path(__file__).parent / "results" / "gpu_layer.json"
DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
torch._dynamo.config.recompile_limit = 64  # one piece of code serves all kinds of layers
SHAPE = Shape(8, 4096)  # 16 heads, K = V = 128
WIDTH, VOCABULARY = 2048, 32000
MODEL_BATCH = 4
ROUNDS = 10


# -- candidates --


class FlaConvolution(ShortConvolution):
    """The same convolution by fla's kernel."""

    def forward(
        self,
        parts: Sequence[Tensor],
        past: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        output_state: bool = True,
    ) -> tuple[list[Tensor], Tensor | None]:
        weights = self.weight.to(parts[0].dtype).split([x.shape[2] for x in parts])
        pairs = zip(parts, weights, strict=True)
        return [causal_conv1d(x, w, activation="silu", cu_seqlens=cu_seqlens)[0] for x, w in pairs], None


class FlaNorm(GatedRMSNorm):
    """The same norm by fla's kernel."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return rms_norm_gated(x, gate, self.weight, None, activation="sigmoid", eps=self.eps)


class FlaMixer(CarveMixer):
    """Our layer with fla's operator, for gates="gdn2" and gates="kda"."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        H, HV, K, V = self.H, self.HV, self.K, self.V
        (q, k, v), _ = self.conv([self.q_proj(x), self.k_proj(x), self.v_proj(x)], output_state=False)
        q, k, v = q.unflatten(-1, (H, K)), k.unflatten(-1, (H, K)), v.unflatten(-1, (HV, V))
        g, e = self.log_decay(self.decay_proj(x)), self.erase_proj(x).sigmoid()
        if self.write_proj is None:
            o, _ = chunk_kda(q, k, v, g, e, use_qk_l2norm_in_kernel=True)
        else:
            w = self.write_proj(x).sigmoid().view(v.shape)
            o, _ = chunk_gdn2(q, k, v, g, e.view(k.shape), w, use_qk_l2norm_in_kernel=True)
        return self.o_proj(self.norm(o, self.gate_proj(x).view(o.shape)).flatten(2)), None


def use_fla_modules(layer: CarveMixer) -> None:
    layer.conv.__class__, layer.norm.__class__ = FlaConvolution, FlaNorm


def use_fla_operator(layer: CarveMixer) -> None:
    layer.__class__ = FlaMixer


# What a layer or a model may be: the arguments of CarveMixer, and by which operator.
KINDS: dict[str, tuple[dict[str, Any], bool]] = {
    "carve blind": ({"content": None}, False),
    "carve mean": ({"content": "mean"}, False),
    "carve read": ({"content": "read", "content_write": True}, False),
    "gdn2 by carve": ({"gates": "gdn2"}, False),
    "gdn2 by fla": ({"gates": "gdn2"}, True),
    "kda by carve": ({"gates": "kda"}, False),
    "kda by fla": ({"gates": "kda"}, True),
}


def runs_of(function: Callable[..., Any], inputs: list[Tensor], leaves: list[Tensor]) -> tuple[Run, Run]:
    """The forward alone, without gradients, and the forward and backward."""

    def forward() -> None:
        with torch.no_grad():
            function(*inputs)

    gradients: list[Tensor] = []

    def both() -> None:
        y = function(*inputs)
        outputs = y if isinstance(y, list) else [y]
        if not gradients:
            gradients.extend(torch.randn_like(y) for y in outputs)
        torch.autograd.grad(outputs, leaves, gradients)

    return forward, both


def compiled(function: Any) -> Any:
    return torch.compile(function, dynamic=False)


def random(*size: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(*size, device=DEVICE, dtype=dtype).requires_grad_()


def measure(candidates: dict[str, tuple[Run, Run]], rounds: int = ROUNDS) -> dict[str, dict[str, Any]]:
    """Medians, all times and peak memory of each. Those that fail, for want of memory or else, are marked so."""
    rows: dict[str, dict[str, Any]] = {}
    fit: dict[str, tuple[Run, Run]] = {}
    for name, run in candidates.items():
        begin = time.perf_counter()
        try:
            run[0]()
            run[1]()
            first = time.perf_counter() - begin
            rows[name] = {"first_s": first, "peak_mib": peak_memory(run[1], DEVICE)}
            fit[name] = run
        except Exception as error:  # the others are to be measured all the same
            first, why = time.perf_counter() - begin, f"{type(error).__name__}: {error}".splitlines()[0][:200]
            rows[name] = {"first_s": first, "peak_mib": None, "forward_ms": None, "both_ms": None, "failed": why}
            print(f"  {name}: {why}", file=sys.stderr, flush=True)
        print(f"  {name}: first calls {first:.1f} s", file=sys.stderr, flush=True)
        torch.cuda.empty_cache()
    for i, key in enumerate(("forward_ms", "both_ms")):
        for name, ms in take_turns({name: run[i] for name, run in fit.items()}, rounds, DEVICE).items():
            rows[name] |= {key: statistics.median(ms), f"raw_{key}": ms}
    return rows


# -- the parts of a layer and of a model --


class Part(NamedTuple):
    """A part of a training step, with the least that it must move and compute."""

    name: str
    functions: dict[str, Callable]  # "plain", of torch, and the same by others
    inputs: list[Tensor]
    weights: list[Tensor]
    floor_bytes: tuple[float, float] = (0, 0)  # forward; forward and backward
    floor_operations: tuple[float, float] = (0, 0)


def parts_of(device: torch.device) -> Iterator[Part]:
    """The parts of a layer at SHAPE and WIDTH, and of a block and a model around it.

    Floors: inputs read and outputs written once in the forward; inputs and output gradients read and input gradients
    written once in the backward. U is the bytes of one 16-bit tensor `[B, T, H K]`.
    """

    def random(*size: int) -> Tensor:
        return torch.randn(*size, device=device, dtype=DTYPE).requires_grad_()

    B, T, D, H, K, V = SHAPE.batch, SHAPE.length, WIDTH, SHAPE.heads, SHAPE.key_dim, SHAPE.value_dim
    U = 2 * B * T * H * K
    layer = CarveMixer(D, num_heads=H, head_dim=K, v_head_dim=V).to(device, DTYPE)
    mlp = LlamaMLP(CarveConfig(**preset("1.3b"))).to(device, DTYPE)  # type: ignore[arg-type]

    def products(weights: list[Tensor]) -> tuple[float, float]:
        forward = 2 * B * T * sum(w.numel() for w in weights)
        return forward, 3 * forward

    def project(x: Tensor) -> list[Tensor]:
        return [m(x) for m in layer.children() if m is not layer.conv and m is not layer.norm]

    matrices = [p for p in layer.parameters() if p.dim() == 2 and p is not layer.conv.weight]
    yield Part("projections", {"plain": project}, [random(B, T, D)], matrices, (0, 0), products(matrices))

    weight = layer.conv.weight
    functions: dict[str, Callable] = {
        "plain": lambda x: convolve_in_torch(x, weight),
        "compiled": compiled(lambda x: convolve_in_torch(x, weight)),
        "ours": lambda x: convolve(x, weight),
    }
    if FLA:
        functions["fla"] = lambda x: causal_conv1d(x, weight, activation="silu")[0]
    x = random(B, T, 2 * H * K + H * V)
    yield Part("convolution, SiLU", functions, [x], [weight], (6 * U, 15 * U))

    functions = {"plain": unit_in_torch, "compiled": compiled(unit_in_torch), "ours": unit}
    functions |= {"fla": l2norm} if FLA else {}
    yield Part("L2 norm of q and k", functions, [random(B, T, 2 * H, K)], [], (4 * U, 10 * U))

    functions = {"plain": layer.log_decay, "compiled": compiled(layer.log_decay)}
    weights = [layer.A_log, layer.dt_bias]
    yield Part("log-decay", functions, [random(B, T, H * K)], weights, (3 * U, 7 * U))  # g is fp32

    functions = {"plain": layer.norm, "compiled": compiled(layer.norm)}
    if FLA:
        functions["fla"] = lambda x, gate: rms_norm_gated(
            x, gate, layer.norm.weight, None, activation="sigmoid", eps=layer.norm.eps
        )
    gated = [random(B, T, H, V), random(B, T, H, V)]
    yield Part("gated RMS norm", functions, gated, [layer.norm.weight], (3 * U, 8 * U))

    if device.type == "cuda":
        arguments = draw(SHAPE, "mean", device, DTYPE)
        names = [name for name, y in arguments.items() if isinstance(y, Tensor)]

        def op(*tensors: Tensor) -> Tensor:
            return chunk_carve(**(arguments | dict(zip(names, tensors, strict=True))))[0]

        floors = floor_bytes(SHAPE, False), floor_bytes(SHAPE, True)
        yield Part("the op, content mean", {"plain": op}, [arguments[name] for name in names], [], floors)

    norm = torch.nn.RMSNorm(D).to(device, DTYPE)
    functions = {"plain": norm, "compiled": compiled(norm)}
    yield Part("RMS norm of a block", functions, [random(B, T, D)], [norm.weight], (2 * U, 5 * U))

    matrices = list(mlp.parameters())
    functions = {"plain": mlp, "compiled": compiled(mlp)}
    yield Part("MLP of a block", functions, [random(B, T, D)], matrices, (0, 0), products(matrices))


def parts() -> dict[str, Any]:
    """Each part alone, in plain torch, compiled, by us and by fla, beside the least its bytes and products can take."""
    torch.manual_seed(0)
    copy, product = ceilings(DEVICE)
    rows: list[dict[str, Any]] = []
    for part in parts_of(DEVICE):
        candidates = {
            how: runs_of(function, part.inputs, part.inputs + part.weights) for how, function in part.functions.items()
        }
        print(f" {part.name}", file=sys.stderr)
        floor = [1e3 * max(part.floor_bytes[i] / copy, part.floor_operations[i] / product) for i in range(2)]
        for how, row in measure(candidates).items():
            rows.append({"part": part.name, "how": how, "floor_ms": floor, **row})
        del candidates
        torch.cuda.empty_cache()
    return {"copy_bytes_per_second": copy, "product_operations_per_second": product, "rows": rows}


class Traffic(TorchDispatchMode):
    """Counts the bytes that operators read and write, each as a kernel of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in ("_unsafe_view", "_reshape_alias", "detach") and "empty" not in name:
            for x in tree_leaves((args, kwargs, result)):
                if isinstance(x, Tensor):
                    self.bytes += min(x.numel() * x.itemsize, x.untyped_storage().nbytes())
        return result


def traffic() -> dict[str, Any]:
    """Bytes that each part moves in plain torch, an operator at a time, beside the least.

    Without a GPU, where RMS norms are not one operator but several, it counts more for them.
    """
    rows = []
    for part in parts_of(DEVICE if torch.cuda.is_available() else torch.device("meta")):
        moved = []
        for run in runs_of(part.functions["plain"], part.inputs, part.inputs + part.weights):
            with Traffic() as counter:
                run()
            moved.append(counter.bytes)
        rows.append({"part": part.name, "bytes": moved, "floor_bytes": part.floor_bytes})
    return {"rows": rows}


# -- the output layer and the loss --


def chunked_loss(x: Tensor, weight: Tensor, labels: Tensor, chunk: int = 2048) -> Tensor:
    """Cross entropy, the logits of one chunk of tokens at a time, and once more in the backward."""

    def part(x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight).float(), labels, reduction="sum")

    labels = F.pad(labels, (0, 1), value=-100)[:, 1:].flatten()
    pieces = zip(x.flatten(0, 1).split(chunk), labels.split(chunk), strict=True)
    total = torch.stack([checkpoint(part, *piece, use_reentrant=False) for piece in pieces]).sum()
    return total / (labels != -100).sum()


def loss() -> dict[str, Any]:
    """Output layer and loss, 32,000 tokens of vocabulary, of as many tokens as a step of the model below."""
    torch.manual_seed(0)
    x, weight = random(MODEL_BATCH, SHAPE.length, WIDTH), random(VOCABULARY, WIDTH, dtype=torch.float32)
    with torch.no_grad():
        weight.mul_(0.02)
    labels = torch.randint(VOCABULARY, (MODEL_BATCH, SHAPE.length), device=DEVICE)
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:].flatten()

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return ForCausalLMLoss(F.linear(x, weight), labels, VOCABULARY)

    functions: dict[str, Callable] = {
        "plain": plain,
        "compiled": compiled(plain),
        "chunked": lambda x, weight: chunked_loss(x, weight, labels),
        "chunked, compiled": compiled(lambda x, weight: chunked_loss(x, weight, labels)),
    }
    if FLA:
        fla = FusedLinearCrossEntropyLoss()
        functions["fla"] = lambda x, weight: fla(x.flatten(0, 1), shifted, weight.to(x.dtype))
    if LIGER:
        liger = LigerFusedLinearCrossEntropyLoss()
        functions["liger"] = lambda x, weight: liger(weight.to(x.dtype), x.flatten(0, 1), shifted)

    def autocast(function: Callable) -> Callable:
        def run(*inputs: Tensor) -> Tensor:
            with torch.autocast(DEVICE.type, DTYPE):
                return function(*inputs)

        return run

    candidates = {how: runs_of(autocast(run), [x, weight], [x, weight]) for how, run in functions.items()}
    return {"rows": [{"how": how, **row} for how, row in measure(candidates).items()]}


# -- one layer --


def layer() -> dict[str, Any]:
    """One layer, in plain torch, compiled as a whole, and with its convolution and norm compiled or fla's."""
    x = random(SHAPE.batch, SHAPE.length, WIDTH)
    candidates: dict[str, tuple[Run, Run]] = {}

    def add(kind: str, how: str) -> None:
        arguments, by_fla = KINDS[kind]
        if not FLA and (by_fla or "fla" in how):
            return
        torch.manual_seed(0)
        mixer = CarveMixer(WIDTH, num_heads=SHAPE.heads, **arguments).to(DEVICE, DTYPE)
        if by_fla:
            use_fla_operator(mixer)
        if "fla" in how:
            use_fla_modules(mixer)
        if how == "conv and norm compiled":
            mixer.conv.compile(dynamic=False)
            mixer.norm.compile(dynamic=False)
        call = compiled(mixer) if how == "compiled" else mixer

        def run(x: Tensor) -> Tensor:
            return call(x, output_state=False)[0]

        candidates[f"{kind}, {how}"] = runs_of(run, [x], [x, *mixer.parameters()])

    for kind in ("carve mean", "gdn2 by fla"):
        for how in ("plain", "fla's conv and norm"):
            add(kind, how)
    add("carve mean", "conv and norm compiled")
    for kind in KINDS:
        add(kind, "compiled")
    rows = [{"name": name, **row} for name, row in measure(candidates).items()]
    for row in rows:
        if row["name"] in ("carve mean, plain", "carve mean, compiled") and "failed" not in row:
            row["kernels_ms"] = breakdown(candidates[row["name"]][1])
    return {"rows": rows}


CLASSES = {
    "the op": ("carve_",),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "gemv", "splitK"),
}


def breakdown(run: Run) -> dict[str, float]:
    """Milliseconds that kernels take, by kind, the largest of the rest by name."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as prof:
        run()
        torch.cuda.synchronize()
    found: dict[str, float] = dict.fromkeys([*CLASSES, "the rest"], 0.0)
    others: dict[str, float] = {}
    for event in prof.events():
        if event.device_type != torch.autograd.DeviceType.CUDA or event.is_user_annotation:
            continue
        ms = event.time_range.elapsed_us() / 1e3
        kind = next((kind for kind, words in CLASSES.items() if any(word in event.name for word in words)), None)
        found[kind or "the rest"] += ms
        if kind is None:
            others[event.name[:80]] = others.get(event.name[:80], 0.0) + ms
    return found | dict(sorted(others.items(), key=lambda item: -item[1])[:12])


# -- a training step of a model --


class Training:
    """A model and its optimiser, as `carve train` has them: float32 weights, bfloat16 autocast, AdamW."""

    def __init__(self, config: CarveConfig, batch: int, kind: str, compiled: bool, fla_modules: bool) -> None:
        torch.manual_seed(0)
        with torch.device(DEVICE):
            self.model = CarveForCausalLM(config)
        self.model.train()
        for block in self.model.model.layers:
            if KINDS[kind][1]:
                use_fla_operator(block.mixer)
            if fla_modules:
                use_fla_modules(block.mixer)
        if compiled:
            compile_blocks(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.ids = torch.randint(config.vocab_size, (batch, SHAPE.length), device=DEVICE)

    def forward(self) -> None:
        with torch.no_grad(), torch.autocast(DEVICE.type, DTYPE):
            _ = self.model(self.ids, labels=self.ids, use_cache=False, skip_logits=True).loss

    def step(self) -> None:
        with torch.autocast(DEVICE.type, DTYPE):
            loss = self.model(self.ids, labels=self.ids, use_cache=False, skip_logits=True).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def train(sizes: dict[str, Any], batch: int, wanted: list[tuple[str, str]]) -> dict[str, Any]:
    candidates: dict[str, tuple[Run, Run]] = {}
    weights: dict[str, int] = {}
    for kind, how in wanted:
        arguments, by_fla = KINDS[kind]
        if not FLA and (by_fla or "fla" in how):
            continue
        gates = arguments.get("gates", "carve")
        options = {name: value for name, value in arguments.items() if name != "gates"}
        config = CarveConfig(**sizes, **options, layer_types=[gates] * sizes["num_hidden_layers"])
        training = Training(config, batch, kind, how == "compiled", "fla" in how)
        name = f"{kind}, {how}"
        candidates[name] = training.forward, training.step
        weights[name] = sum(p.numel() for p in training.model.parameters())
    rows = measure(candidates, rounds=5)
    gc.collect()
    return {
        "sizes": sizes,
        "batch": batch,
        "length": SHAPE.length,
        "rows": [{"name": name, "parameters": weights[name], **row} for name, row in rows.items()],
    }


def model() -> dict[str, Any]:
    """A step of a model of the 1.3b preset's width, 6 layers of it: 340 million parameters besides the embeddings."""
    sizes = preset("1.3b") | {"num_hidden_layers": 6}
    wanted = [("carve mean", "plain"), ("carve blind", "compiled"), ("carve mean", "compiled")]
    wanted += [("carve read", "compiled"), ("gdn2 by fla", "compiled")]
    return train(sizes, MODEL_BATCH, wanted)


def preset_step() -> dict[str, Any]:
    """A step of the 340m preset. 8 heads: fla would tune itself anew."""
    wanted = [("carve mean", "plain"), ("carve mean", "compiled")]
    return train(preset("340m"), MODEL_BATCH, wanted)


def preset(name: str) -> dict[str, Any]:
    path = Path(carve.train.__file__).parent / "presets" / f"{name}.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8"))["model"]


# -- tables --


def number(x: float | None, digits: int = 2) -> str:
    return "failed" if x is None else f"{x:,.{digits}f}"


def tables(results: dict[str, Any]) -> None:
    """Print what was measured, as Markdown."""
    devices = {found["system"]["device"] for found in results.values() if "system" in found}
    if devices:
        print(f"{' and '.join(devices)}, bf16, medians; B {SHAPE.batch}, T {SHAPE.length}, D {WIDTH}, H 16\n")
    if "traffic" in results:
        print("| bytes moved in plain torch, GB | forward (least) | forward + backward (least) |\n|---|---|---|")
        for row in results["traffic"]["rows"]:
            pairs = zip(row["bytes"], row["floor_bytes"], strict=True)
            cells = [f"{moved / 1e9:.2f}" + (f" ({least / 1e9:.2f})" if least else "") for moved, least in pairs]
            print(f"| {row['part']} | {' | '.join(cells)} |")
        print()
    if "parts" in results:
        print("| part of a layer | | forward, ms (floor) | forward + backward, ms (floor) |\n|---|---|---|---|")
        for row in results["parts"]["rows"]:
            forward, both = row["floor_ms"]
            times = f"{number(row['forward_ms'])} ({forward:.2f}) | {number(row['both_ms'])} ({both:.2f})"
            print(f"| {row['part']} | {row['how']} | {times} |")
        print()
    for part, title in (
        ("loss", "output layer and loss"),
        ("layer", "one layer"),
        ("model", "step of a model, 6 layers of the 1.3b preset"),
        ("preset", "step of a model, 340m preset"),
    ):
        if part not in results:
            continue
        both = "training step" if part in ("model", "preset") else "forward + backward"
        print(f"| {title} | forward, ms | {both}, ms | peak memory above weights, MiB | first calls, s |")
        print("|---|---|---|---|---|")
        for row in results[part]["rows"]:
            name = row.get("name") or row["how"]
            times = f"{number(row['forward_ms'])} | {number(row['both_ms'])} | {number(row['peak_mib'], 0)}"
            print(f"| {name} | {times} | {row['first_s']:.1f} |")
        print()
        for row in results[part]["rows"]:
            if "kernels_ms" in row:
                cells = "; ".join(f"{name} {ms:.2f}" for name, ms in row["kernels_ms"].items() if ms > 0.02)
                print(f"{row['name']}, kernels of forward + backward, ms: {cells}\n")


PARTS = {"traffic": traffic, "parts": parts, "loss": loss, "layer": layer, "model": model, "preset": preset_step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, "tables"], default=[*PARTS], help="what to measure")
    wanted = [part for part in parser.parse_args().parts if part != "tables"]
    results = load(RESULTS)
    for part in wanted:
        begin = time.perf_counter()
        results |= {part: PARTS[part]() | ({} if part == "traffic" else {"system": system()})}
        save(results, RESULTS)
        print(f"-- {part}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
        gc.collect()
        torch.compiler.reset()
        torch.cuda.empty_cache()
    tables(results)


if __name__ == "__main__":
    main()
