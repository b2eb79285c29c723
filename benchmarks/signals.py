"""Other signals for CARVE's gates than the op computes, on the editing probes.

    python benchmarks/signals.py --pairs 8 --steps 1300 --device cuda --output benchmarks/results/signals

Every signal goes into both gates. It depends on what the memory held when a chunk began, and on the token; on nothing
later. The layer here runs chunk by chunk: it works out the gates' logits in PyTorch, and calls the op without content
on the chunk's tokens. Asked for "mean" and "read" it is the package's layer, to rounding (`tests/test_signals.py`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor

from carve import mixer
from carve.evals.probes.runs import ProbeRun, parse_shard, plan_probes, probe_device, report_probes, run_probes
from carve.models import modeling_carve
from carve.ops import chunk_carve

TASKS = ("write-once", "compare-and-swap", "counters", "selective-forgetting")


class Seen(NamedTuple):
    """What a signal may depend on, in a chunk of n tokens; all float32 or wider.

    Attributes:
        memory: S, when the chunk began, `[B, HV, K, V]`.
        mean: of the outputs of the chunk before, `[B, HV, V]`; zeros in the first one.
        q, k: of the tokens, of unit length, `[B, n, HV, K]`.
        v: of the tokens, `[B, n, HV, V]`.
    """

    memory: Tensor
    mean: Tensor
    q: Tensor
    k: Tensor
    v: Tensor


def read(S: Tensor, k: Tensor) -> Tensor:
    """`S^T k`, `[B, n, HV, V]`."""
    return torch.einsum("bhkv,bnhk->bnhv", S, k)


class Signal(NamedTuple):
    """What the gates see.

    Attributes:
        content: the signal, `[B, n, HV, V]` or `[B, 1, HV, V]`, before P_down.
        later: memory and mean are those of so many chunks before the latest there are.
        stopped: no gradient flows through them.
    """

    content: Callable[[Seen], Tensor]
    later: int = 0
    stopped: bool = False


def the_mean(seen: Seen) -> Tensor:
    return seen.mean.unsqueeze(1)


def the_read(seen: Seen) -> Tensor:
    return read(seen.memory, seen.k)


SIGNALS = {
    "mean": Signal(the_mean),
    "read": Signal(the_read),
    "mean, a chunk later": Signal(the_mean, later=1),
    "read, a chunk later": Signal(the_read, later=1),
    "mean, gradient stopped": Signal(the_mean, stopped=True),
    "read, gradient stopped": Signal(the_read, stopped=True),
    "error": Signal(lambda seen: seen.v - the_read(seen)),  # what the token would change, if the chunk had just begun
    "query": Signal(lambda seen: read(seen.memory, seen.q)),  # what the token's own output would have been then
}


class SignalMixer(mixer.CarveMixer):
    """The CARVE layer with another signal, for training: no packed sequences, no state."""

    signal: Signal

    def forward(self, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        o = self.run(self.project(x, output_state=False)[0])
        return self.o_proj(self.norm(o, self.gate_proj(x).view(o.shape)).flatten(2)), None

    def run(self, op: dict[str, Any]) -> Tensor:
        """Outputs `[B, T, HV, V]` from the arguments of the op."""
        tokens: dict[str, Tensor] = {name: op[name] for name in ("q", "k", "v", "g", "e", "w")}
        groups, C, T = self.HV // self.H, self.chunk_size, tokens["v"].shape[1]
        if groups > 1:  # a gate of its own for every value head
            tokens |= {name: tokens[name].repeat_interleave(groups, 2) for name in ("q", "k", "g", "e")}
        wide = torch.promote_types(tokens["v"].dtype, torch.float32)
        memory = tokens["v"].new_zeros(len(tokens["v"]), self.HV, self.K, self.V, dtype=wide)
        memories, means = [memory], [memory.new_zeros(memory.shape[0], self.HV, self.V)]  # at each chunk's beginning
        outputs, state = [], None
        for start in range(0, T, C):
            piece = {name: y[:, start : start + C] for name, y in tokens.items()}
            with torch.autocast(memory.device.type, enabled=False):
                erase, write = self.shifts(memories, means, {name: piece[name].to(wide) for name in ("q", "k", "v")})
            piece |= {"e": piece["e"] + erase, "w": piece["w"] + write}
            o, state = chunk_carve(
                **piece,
                chunk_size=C,
                qk_l2norm=True,
                allow_neg_eigval=self.allow_neg_eigval,
                initial_state=state,
                output_final_state=True,
            )
            outputs.append(o)
            memories.append(state.memory)
            means.append(o.to(wide).mean(1))
        return torch.cat(outputs, 1)

    def shifts(self, memories: list[Tensor], means: list[Tensor], piece: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What the signal adds to the logits of a chunk's gates: `[B, n or 1, HV, K]`, `[B, n or 1, HV]`."""
        assert self.p_down is not None
        assert self.p_up is not None
        assert self.p_write is not None
        at = max(0, len(memories) - 1 - self.signal.later)
        memory, mean = memories[at], means[at]
        if self.signal.stopped:
            memory, mean = memory.detach(), mean.detach()
        q, k = (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + 1e-6) for y in (piece["q"], piece["k"]))
        c = self.signal.content(Seen(memory, mean, q, k, piece["v"]))
        z = torch.einsum("bnhv,hvr->bnhr", c, self.p_down.to(c.dtype))
        if self.content_norm == "rms":
            z = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + 1e-8)
        erase = torch.einsum("bnhr,hrk->bnhk", z, self.p_up.to(c.dtype))
        return erase, torch.einsum("bnhr,hr->bnh", z, self.p_write.to(c.dtype))


@contextmanager
def mixing(name: str) -> Iterator[None]:
    """Within `with`: models are built with mixers of that signal."""
    made = type("SignalMixer", (SignalMixer,), {"signal": SIGNALS[name]})
    before = modeling_carve.CarveMixer
    modeling_carve.CarveMixer = made  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        modeling_carve.CarveMixer = before  # type: ignore[misc]


def plan(name: str, tasks: Sequence[str], **options: Any) -> list[ProbeRun]:
    """The runs of a signal: those of `"read"` into both gates, under a name of their own."""
    runs = plan_probes(tasks, ["carve-read"], **options)
    return [replace(run, mixer=name, configuration={**run.configuration, "mixer": name}) for run in runs]


def main(
    signals: Annotated[str, typer.Option(help="Their names, separated by semicolons.")] = ";".join(SIGNALS),
    tasks: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(TASKS),
    pairs: Annotated[int, typer.Option(help="Keys, with a value each.")] = 8,
    seeds: Annotated[int, typer.Option(help="Runs of each.")] = 3,
    steps: Annotated[int, typer.Option(help="Optimizer steps of a run.")] = 1300,
    learning_rate: Annotated[float, typer.Option(help="Its peak.")] = 3e-3,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    shard: Annotated[str, typer.Option(help="I/N: the I-th of N processes.")] = "1/1",
    output: Annotated[str, typer.Option(help="The folder of results.jsonl.")] = "benchmarks/results/signals",
) -> None:
    """Train small models on the editing probes with each signal. Run again, it goes on where it stopped."""
    where, names = probe_device(device), [name.strip() for name in signals.split(";")]
    editing = [task.strip() for task in tasks.split(",")]
    for name in names:
        if name not in SIGNALS:
            raise typer.BadParameter(f"there is no signal {name!r}, expected some of {'; '.join(SIGNALS)}")
    for task in editing:
        if task not in TASKS:
            raise typer.BadParameter(f"there is no task {task!r} here, expected some of {', '.join(TASKS)}")
    options: dict[str, Any] = {"pairs": [pairs], "seeds": seeds, "steps": steps, "learning_rates": [learning_rate]}
    runs = {name: plan(name, editing, **options, device=where) for name in names}
    complete = True
    for name in names:
        with mixing(name):
            complete = complete and run_probes(runs[name], output, device=where, shard=parse_shard(shard), report=False)
    report_probes([run for some in runs.values() for run in some], output)
    if not complete:
        raise typer.Exit(130)


if __name__ == "__main__":
    typer.run(main)
