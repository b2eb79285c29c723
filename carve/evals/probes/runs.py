"""`carve probe`: many small trainings, shared between processes, each run once; a table and a plot of what came out."""

import dataclasses
import math
import os
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from carve.evals.mixers import DECIDED, READ
from carve.evals.probes.progress import progress_on
from carve.evals.probes.results import append_result, key_of, read_results
from carve.evals.probes.tasks import TASKS, Task, make_task
from carve.evals.probes.training import MODEL, probe_config, train_probe
from carve.extras import need
from carve.files import replacing
from carve.models import CarveConfig
from carve.names import hint

RECIPE = ("steps", "batch_size", "learning_rate", "seed", "evaluated")  # arguments of `train_probe`
FEWEST = 30  # answers, for their accuracy to say something
SIZES = ("pairs", "length")  # the fields of tasks that make them harder


@dataclass(frozen=True)
class ProbeRun:
    """One training and its measurement.

    Attributes:
        name: of the task.
        task: the task itself.
        mixer: name of the mixer.
        model: the whole configuration of the model.
        configuration: all that decides the result, as plain data: the key of the result.
    """

    name: str
    task: Task
    mixer: str
    model: CarveConfig
    configuration: dict[str, Any]

    @property
    def key(self) -> str:
        return key_of(self.configuration)

    @property
    def size(self) -> dict[str, int]:
        """The fields of the task that make it harder."""
        return {name: getattr(self.task, name) for name in SIZES if getattr(self.task, name, None) is not None}

    @property
    def label(self) -> str:
        return " ".join([self.name, *(f"{name}={value}" for name, value in self.size.items())])


def plan_probes(
    tasks: Sequence[str],
    mixers: Sequence[str],
    *,
    pairs: Sequence[int] = (),
    lengths: Sequence[int] = (),
    seeds: int = 3,
    steps: int = 2000,
    batch_size: int = 64,
    learning_rates: Sequence[float] = (2e-3,),
    evaluated: int = 1024,
    fields: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    device: str = "cpu",
) -> list[ProbeRun]:
    """All runs: every task, of every size, with every mixer, learning rate and seed; the first seed of all comes first.

    Args:
        tasks: names in `TASKS`.
        mixers: names in `carve.evals.mixers.MIXERS`.
        pairs: numbers of pairs, for the tasks that have pairs; none for the task's own.
        lengths: the same for `length`.
        seeds: 0 to seeds - 1.
        steps, batch_size, learning_rates, evaluated: see `train_probe`.
        fields: of the tasks, for those that have them.
        model: fields of `CarveConfig`, for all models; not those that mixers differ in.
        device: where they will run; what is computed in bfloat16 is another result.

    Raises:
        ValueError: a name or a number that does not fit, a size or field that no task has, or a model that cannot take
            a task's sequences: before anything is run.
    """
    for name, given in (("tasks", tasks), ("mixers", mixers), ("learning_rates", learning_rates)):
        if not given:
            raise ValueError(f"{name} is empty, expected at least one")
    for name, number in (("seeds", seeds), ("steps", steps), ("batch_size", batch_size), ("evaluated", evaluated)):
        if number < 1:
            raise ValueError(f"{name} is {number}, expected at least 1")
    for learning_rate in learning_rates:
        if not 0 < learning_rate < math.inf:
            raise ValueError(f"learning_rates has {learning_rate}, expected positive finite numbers")
    cases = [(name, make_task(name, some)) for name in tasks for some in cases_of(name, pairs, lengths, fields or {})]
    for name in ["pairs"] * bool(pairs) + ["length"] * bool(lengths) + list(fields or {}):
        if not any(name in {field.name for field in dataclasses.fields(task)} for _, task in cases):
            raise ValueError(f"none of the tasks {', '.join(tasks)} has a field {name!r}")
    for name, given in (("pairs", pairs), ("length", lengths)):
        if given and name in (fields or {}):
            raise ValueError(f"{name} is given twice, {list(given)} and {(fields or {})[name]!r}, expected one of them")
    model = model or {}
    known = {field.name for field in dataclasses.fields(CarveConfig)}
    for name in model:
        if name not in known:
            raise ValueError(f"model has {name!r}, which CarveConfig does not know{hint(name, known)}")
        if name in DECIDED:
            raise ValueError(f"model has {name!r}, which the mixer decides, expected another field, or another mixer")
        if name == "vocab_size":
            raise ValueError("model has 'vocab_size', which the task decides, expected another field")

    try:
        dtype = "bfloat16" if torch.device(device).type == "cuda" else "float32"
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}, expected cpu or cuda") from error
    runs = []
    for name, task in cases:
        for mixer in mixers:
            config = probe_config(task, mixer, **model)
            own = {field for field in model if getattr(config, field) != getattr(CarveConfig, field)}
            chosen = sorted({*MODEL, *own, *task.model, *READ})
            fixed = {
                "task": {"name": name, **dataclasses.asdict(task)},
                "mixer": mixer,
                "model": {field: getattr(config, field) for field in chosen},
                "steps": steps,
                "batch_size": batch_size,
                "evaluated": evaluated,
                "dtype": dtype,
            }
            for seed in range(seeds):
                for learning_rate in learning_rates:
                    configuration = fixed | {"learning_rate": learning_rate, "seed": seed}
                    runs.append(ProbeRun(name, task, mixer, config, configuration))
    runs.sort(key=lambda run: run.configuration["seed"])
    unique = {run.key: run for run in runs}
    return list(unique.values())


def cases_of(name: str, pairs: Sequence[int], lengths: Sequence[int], fields: dict[str, Any]) -> Iterable[dict]:
    """The fields of each size of a task."""
    known = {field.name for field in dataclasses.fields(TASKS[name])} if name in TASKS else set()
    common = {field: value for field, value in fields.items() if field in known}
    cases = [common]
    for field, sizes in (("pairs", pairs), ("length", lengths)):
        if sizes and field in known:
            cases = [case | {field: size} for case in cases for size in sizes]
    return cases


def parse_shard(shard: str) -> tuple[int, int]:
    """`"2/8"` as (2, 8): the second of eight processes.

    Raises:
        ValueError: it does not read so.
    """
    part, _, parts = shard.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise ValueError(f"shard is {shard!r}, expected I/N with 1 <= I <= N, as in 2/8")
    return int(part), int(parts)


def probe_device(name: str | None) -> str:
    """The device of that name, or a GPU where there is one.

    Raises:
        ValueError: it is not there.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros((), device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {name!r}, which cannot be used here: {str(error).splitlines()[0]}") from error
    return name


def run_probes(
    runs: Sequence[ProbeRun],
    out: str | os.PathLike[str],
    *,
    device: str = "cpu",
    shard: tuple[int, int] = (1, 1),
    report: bool = True,
) -> bool:
    """Run what is not yet in `out/results.jsonl` and add it there; then print the table and draw `out/probes.png`.

    Several processes can work on one folder, each with its share of the runs. An interrupt (Ctrl-C) loses the run
    that it meets, no other.

    Args:
        shard: (i, n): every n-th run, from the i-th.
        report: False to leave out the table and the picture; see `report_probes`.

    Returns:
        whether this process got to the end of its share.

    Raises:
        ValueError, OSError: a results file that is something else, or one that cannot be written.
        ImportError: matplotlib is not installed.
    """
    need("matplotlib", "the plot")
    out = Path(out)
    results_file = out / "results.jsonl"
    done = read_results(results_file)
    mine = [run for run in runs[shard[0] - 1 :: shard[1]] if run.key not in done]
    out.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    complete = True
    with progress_on(console) as progress:
        whole = progress.add_task("runs", total=len(mine), status="")
        current = progress.add_task("steps", total=None, status="")
        try:
            for number, run in enumerate(mine, start=1):
                recipe = {name: run.configuration[name] for name in RECIPE}
                progress.reset(current, total=recipe["steps"], status="")

                def show(step: int, loss: float | None) -> None:
                    shown = {} if loss is None else {"status": f"loss {loss:.3f}"}
                    progress.update(current, completed=step, **shown)  # type: ignore[arg-type]

                begin = time.monotonic()
                try:
                    score = train_probe(run.task, run.model, **recipe, device=device, on_step=show)
                    measured = dataclasses.asdict(score)
                except FloatingPointError as error:  # a result too, and the runs after it are to be made
                    measured = {"accuracy": 0.0, "validation": 0.0, "by_distance": [], "diverged": str(error)}
                seconds = round(time.monotonic() - begin, 2)
                where = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "CPU"
                measured |= {"seconds": seconds, "device": where, "torch": torch.__version__}
                append_result(results_file, {"configuration": run.configuration, **measured})
                of = f"{run.label} {run.mixer} at {recipe['learning_rate']:g}, seed {recipe['seed']}"
                status = f"{of}: {measured['accuracy']:.3f}"
                progress.update(whole, advance=1, status=status)
                if not console.is_terminal:
                    print(f"{number}/{len(mine)} {status} in {seconds:.0f} s", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            complete = False
    if report:
        report_probes(runs, out)
    return complete


def report_probes(runs: Sequence[ProbeRun], out: str | os.PathLike[str]) -> bool:
    """Print the table and draw `out/probes.png`, of those of the runs that have a result; whether any has."""
    summaries = summarise(runs, read_results(Path(out) / "results.jsonl"))
    if summaries:
        print_table(summaries)
        draw(summaries, Path(out) / "probes.png")
    return bool(summaries)


# -- what came out --


@dataclass(frozen=True)
class Summary:
    """A task of one size with one mixer, over the seeds, at the learning rate that is best on validation.

    Attributes:
        run: one of its runs.
        accuracies: seed -> share of right answers, on test sequences.
        seeds: how many there are to be.
        diverged: how many did not get to their end; their accuracy counts as 0.
        learning_rate: the chosen one.
        by_distance: `(from, to, accuracy)`, over all seeds, where they have answers enough to tell.
    """

    run: ProbeRun
    accuracies: dict[int, float]
    seeds: int
    diverged: int
    learning_rate: float
    by_distance: list[tuple[int, int, float]]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies.values())

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; None of one."""
        return statistics.stdev(self.accuracies.values()) if len(self.accuracies) > 1 else None


def summarise(runs: Sequence[ProbeRun], results: dict[str, dict[str, Any]]) -> list[Summary]:
    """One summary for each task, size and mixer that has a result."""
    groups: dict[tuple[str, str], dict[float, list[ProbeRun]]] = {}
    for run in runs:
        rates = groups.setdefault((run.label, run.mixer), {})
        rates.setdefault(run.configuration["learning_rate"], []).append(run)
    summaries = []
    for rates in groups.values():
        found = {rate: [results[run.key] for run in some if run.key in results] for rate, some in rates.items()}
        found = {rate: records for rate, records in found.items() if records}
        if not found:
            continue
        # The choice falls among the rates that have as many seeds as any.
        most = max(len(records) for records in found.values())
        best = max(
            (rate for rate in found if len(found[rate]) == most),
            key=lambda rate: statistics.fmean(record["validation"] for record in found[rate]),
        )
        bins: dict[tuple[int, int], list[tuple[float, int]]] = {}
        for record in found[best]:
            for low, high, accuracy, count in record["by_distance"]:
                bins.setdefault((low, high), []).append((accuracy, count))
        counts = {at: sum(n for _, n in pairs) for at, pairs in bins.items()}
        by_distance = [
            (*at, sum(x * n for x, n in bins[at]) / counts[at]) for at in sorted(bins) if counts[at] >= FEWEST
        ]
        accuracies = {record["configuration"]["seed"]: record["accuracy"] for record in found[best]}
        diverged = sum("diverged" in record for record in found[best])
        summaries.append(Summary(rates[best][0], accuracies, len(rates[best]), diverged, best, by_distance))
    return summaries


def print_table(summaries: Sequence[Summary]) -> None:
    """For each task a table: mixers down, sizes across."""
    console = Console()
    chosen = len({summary.learning_rate for summary in summaries}) > 1
    tasks: dict[str, list[Summary]] = {}
    for summary in summaries:
        tasks.setdefault(summary.run.name, []).append(summary)
    for name, some in tasks.items():
        sizes = {summary.run.label.removeprefix(name).strip(): None for summary in some}
        table = Table()
        for title in ("mixer", *sizes):
            table.add_column(title, overflow="fold")
        for mixer in dict.fromkeys(summary.run.mixer for summary in some):
            mine = [summary for summary in some if summary.run.mixer == mixer]
            row = {s.run.label.removeprefix(name).strip(): cell(s, rate=chosen) for s in mine}
            table.add_row(mixer, *(row.get(size, "") for size in sizes))
        console.print(f"{name}, of which a guess gets {100 / some[0].run.task.answers:.1f}", highlight=False)
        console.print(table)
    evaluated = summaries[0].run.configuration["evaluated"]
    tested = (
        f"Accuracy in % on {evaluated} test sequences, mean ± standard deviation over seeds (how many, if not all)."
    )
    console.print(tested, highlight=False, soft_wrap=True)
    if chosen:
        console.print("Each at the learning rate with the best validation accuracy.", highlight=False, soft_wrap=True)


def cell(summary: Summary, *, rate: bool = False) -> str:
    """The accuracy in %, of how many seeds if some are missing, and at which learning rate if that is asked for."""
    spread = "" if summary.spread is None else f" ± {100 * summary.spread:.1f}"
    some = f" ({len(summary.accuracies)}/{summary.seeds})" if len(summary.accuracies) < summary.seeds else ""
    diverged = f" ({summary.diverged} diverged)" if summary.diverged else ""
    at = f" at {summary.learning_rate:g}" if rate else ""
    return f"{100 * summary.mean:.1f}{spread}{some}{diverged}{at}"


def draw(summaries: Sequence[Summary], out: Path) -> None:
    """For each task, accuracy against size (mean and range over seeds), and against distance at the largest size."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(summary.run.name for summary in summaries))
    mixers = list(dict.fromkeys(summary.run.mixer for summary in summaries))
    figure = Figure(figsize=(3.4 * len(tasks) + 1.6, 6), dpi=110, layout="constrained")
    axes = figure.subplots(2, len(tasks), sharey=True, squeeze=False)
    for column, name in enumerate(tasks):
        top, bottom = axes[:, column]
        of_task = [summary for summary in summaries if summary.run.name == name]
        answers = of_task[0].run.task.answers
        # Across: the first of the fields that has several values, with the others at their largest.
        values = {field: {s.run.size[field] for s in of_task} for field in of_task[0].run.size}
        field = next((field for field in values if len(values[field]) > 1), next(iter(values)))
        others = {other: max(values[other]) for other in values if other != field}
        of_task = [s for s in of_task if all(s.run.size[other] == others[other] for other in others)]
        for i, mixer in enumerate(mixers):
            style = {"color": f"C{i % 10}", "marker": "os^vD"[i // 10 % 5], "markersize": 4, "linewidth": 1.2}
            mine = sorted((s for s in of_task if s.run.mixer == mixer), key=lambda s: s.run.size[field])
            if not mine:
                continue
            sizes = [s.run.size[field] for s in mine]
            means = [s.mean for s in mine]
            top.plot(sizes, means, label=mixer, **style)
            top.fill_between(
                sizes,
                [min(s.accuracies.values()) for s in mine],
                [max(s.accuracies.values()) for s in mine],
                color=style["color"],
                alpha=0.12,
            )
            top.set_xlabel(field)
            far = mine[-1].by_distance
            bottom.plot([(low * high) ** 0.5 for low, high, _ in far], [x for *_, x in far], label=mixer, **style)
        largest = max(of_task, key=lambda s: s.run.size[field]).run
        top.set_title(name, fontsize=10)
        bottom.set_title(largest.label, fontsize=8)
        top.set_xscale("log", base=2)
        if any(s.by_distance for s in of_task):  # not where every training diverged
            bottom.set_xscale("log", base=2)
        bottom.set_xlabel("distance, tokens")
        for ax in (top, bottom):
            ax.axhline(1 / answers, color="0.6", linewidth=0.8, linestyle="--")
            ax.grid(alpha=0.3)
            ax.set_ylim(-0.02, 1.02)
    for ax in axes[:, 0]:
        ax.set_ylabel("accuracy")
    handles = {label: line for ax in axes[0] for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    with replacing(out) as partial:
        figure.savefig(partial, format="png")
