"""Tables and the picture of docs/results.md and the README, from the raw results under `benchmarks/results/`.

    python benchmarks/results.py            # write them
    python benchmarks/results.py --check    # exit 1 if a page says something else than the results

A table stands between `<!-- NAME -->` and `<!-- end -->`; what is around it is written by hand.
"""

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from carve.compare.plan import Plan, read_plan, validation_loss
from carve.compare.report import (
    NONE,
    Interval,
    Outcome,
    by_position,
    contents,
    outcomes_of,
    over_seeds,
    seeds_cell,
    spread,
    student,
    table,
)
from carve.compare.run import FACTS, read_speed
from carve.compare.run import read_results as read_comparison
from carve.evals.mixers import MIXERS
from carve.evals.probes.results import read_results as read_probes
from carve.evals.probes.runs import Summary, cell, plan_probes, summarise
from carve.evals.probes.tasks import make_task

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "docs" / "results.md", ROOT / "README.md"]
PICTURE = RESULTS / "results.png"
EDITING = ("write-once", "compare-and-swap", "counters", "selective-forgetting")
SIZE = {"pairs": 8, "length": 64}  # of the probes' tables
BLIND = "carve-blind"
SINGLE_CHANGES = [("carve-read", BLIND), ("carve-mean", BLIND), ("kda", BLIND)]  # what the gates see; one gate for both
SINGLE_CHANGES += [("carve-read-value", "carve-read"), ("carve-mean-value", "carve-mean")]  # a write gate a value
SINGLE_CHANGES += [("carve-read-value", "gdn2"), ("carve-mean-value", "gdn2")]  # what the gates see, with such a gate
SINGLE_CHANGES += [("carve-read-value", BLIND)]  # both
SHOWN = [
    "carve-mean",
    "carve-mean-write",
    "carve-read",
    "carve-read-raw",
    "carve-read-value",
    "carve-mean-value",
    BLIND,
]
SHOWN += ["gdn2", "kda", "gdn"]


# -- language modelling --


def folder(name: str) -> Path:
    """Where the results of a comparison are: `language_rates` and the like share that of `language`."""
    return RESULTS / "compare" / name.partition("_")[0]


@cache
def comparison(name: str, matching: str = "shape") -> tuple[Plan, dict[str, Outcome]]:
    """The plan and the outcomes of a comparison in `benchmarks/compare`, of models of equal shape or parameters."""
    out = folder(name)
    facts = json.loads((out / FACTS).read_text(encoding="utf-8"))["texts"]
    plan = read_plan(ROOT / "benchmarks" / "compare" / f"{name}.yaml").with_facts(facts)
    return plan, {x.label: x for x in outcomes_of(plan, read_comparison(out), read_speed(out))[matching]}


def perplexities(name: str, matching: str = "shape") -> list[str]:
    """Perplexity of each mixer, and what it costs."""
    plan, found = comparison(name, matching)
    texts = ["validation", *plan.tests]
    timed = any(x.speed for x in found.values())
    rows = []
    for x in found.values():
        count = next(iter(x.seeds.values()))["parameters"]["without embeddings"]
        cells = [spread([math.exp(y) for y in x.losses(text).values()], 1) for text in texts]
        speed = NONE if x.speed is None else f"{statistics.median(x.speed['tokens_per_second']) / 1e3:,.0f}"
        rows.append([f"`{x.label}`", *cells, f"{count / 1e6:.2f}", *[speed] * timed, seeds_cell(x)])
    return table(["mixer", *texts, "parameters, M", *["1,000 tokens/s"] * timed, "seeds"], rows)


def sweep(name: str, matching: str = "shape") -> list[str]:
    """Validation loss of seed 0 at each learning rate."""
    plan, _ = comparison(name, matching)
    found = read_comparison(folder(name))
    losses = {label: [validation_loss(found[run.key]) for run in plan.sweep(label)] for label in plan.mixers}
    rows = [[f"`{label}`", *(f"{loss:.3f}" for loss in some)] for label, some in losses.items()]
    return table(["mixer", *(f"{rate:g}" for rate in plan.learning_rates)], rows)


def summary() -> list[str]:
    """Of the README: what decides."""
    rows = []
    found = [comparison("language")[1], comparison("language_parameters", "parameters")[1]]
    for label in ("carve-mean", "carve-read", "carve-read-raw", BLIND, "gdn2", "kda", "gdn"):
        trained = [x[label].losses("validation").values() if label in x else () for x in found]
        losses = [spread([math.exp(y) for y in some], 1) if some else NONE for some in trained]
        rows.append([f"`{label}`", *losses, *(cell(probed_at(case)[label]) for case in (UPDATES, TWO_HEADS, SMALLEST))])
    titles = ["perplexity, equal width", "equal parameters", "forgetting-mqar", "write-once, 2 heads", "1 head"]
    return table(["mixer", *titles], rows)


def pairs_of(name: str, matching: str) -> list[tuple[str, str, list[int]]]:
    """Mixers to hold against each other, and the seeds that both have: the baseline, and what differs in one thing."""
    plan, found = comparison(name, matching)
    windowed = [(label, label.removesuffix("-hybrid")) for label in found if label.endswith("-hybrid")]
    against = [(label, plan.baseline) for label in found if not label.endswith("-hybrid")]
    pairs = [(x, y) for x, y in dict.fromkeys(against + SINGLE_CHANGES + windowed) if x != y and {x, y} <= set(found)]
    losses = {label: found[label].losses("validation").keys() for label in found}
    return [(x, y, sorted(losses[x] & losses[y])) for x, y in pairs]


def interval_cell(interval: Interval | None, digits: int, *more: str) -> str:
    """A mean and the interval for it, and what more there is to say."""
    if interval is None:
        return NONE
    mean, low, high = (f"{x:+.{digits}f}" for x in interval)
    return f"{mean} ({', '.join([f'{low} to {high}', *more])})"


def differences(name: str, matching: str = "shape") -> list[str]:
    """Differences in loss over the seeds that both have, with intervals; of one seed without."""
    plan, found = comparison(name, matching)
    rows = []
    for ours, base, seeds in pairs_of(name, matching):
        cells = []
        for text in ("validation", *plan.tests):
            one = [x.losses(text)[seeds[0]] for x in (found[ours], found[base])] if len(seeds) == 1 else None
            interval = over_seeds(found[ours], found[base], text)
            cells.append(f"{one[0] - one[1]:+.3f}" if one else interval_cell(interval, 3))
        rows.append([f"`{ours}` less `{base}`", *cells, str(len(seeds))])
    return table(["", "validation", *plan.tests, "seeds"], rows)


def positions(name: str, text: str) -> list[str]:
    """The same by what comes before a token, without intervals."""
    plan, found = comparison(name)
    return by_position(list(found.values()), found.get(plan.baseline), text)


def content_terms(name: str, matching: str = "shape") -> list[str]:
    """What the content term does in the trained models, on validation."""
    return contents(list(comparison(name, matching)[1].values()))


def layers(name: str) -> list[str]:
    """How far the content moves the gates of each layer, the mean over heads and seeds."""
    rows, numbers = [], []
    for x in comparison(name)[1].values():
        seeds = [result["content"]["gates"] for result in x.seeds.values() if result.get("content")]
        if not seeds or "hybrid" in x.label:
            continue
        numbers = [layer["layer"] for layer in seeds[0]]
        for what, key, form in (
            ("erase gate moved", "erase_shift", ".3f"),
            ("the same for all tokens", "same", ".0%"),
            ("write gate moved", "write_shift", ".3f"),
        ):
            known = [gates for gates in seeds if gates[0].get(key)]
            if known:
                means = [statistics.fmean(y for gates in known for y in gates[i][key]) for i in range(len(numbers))]
                rows.append([f"`{x.label}`, {what}", *(format(y, form) for y in means)])
    return table(["layer", *map(str, numbers)], rows)


# -- probes --


@cache
def probes(folder: str = "probes") -> Mapping[str, Mapping[str, Mapping[int, float]]]:
    """Task, at `SIZE` -> mixer -> seed -> accuracy in %, of a folder of results."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for record in read_probes(RESULTS / folder / "results.jsonl").values():
        configuration = record["configuration"]
        task, mixer, seed = configuration["task"], configuration["mixer"], configuration["seed"]
        if any(task.get(name, size) != size for name, size in SIZE.items()):
            continue
        seeds = found.setdefault(task["name"], {}).setdefault(mixer, {})
        if seed in seeds:
            raise ValueError(f"two results of {task['name']} with {mixer}, seed {seed}: expected one recipe")
        seeds[seed] = 100 * record["accuracy"]
    return found


def scores(task: str, mixer: str) -> list[float]:
    return list(probes()[task][mixer].values())


def probed() -> list[str]:
    return [mixer for mixer in MIXERS if any(mixer in some for some in probes().values())]


def accuracies() -> list[str]:
    tasks = probes()
    rows = [["*a guess*", *(f"*{100 / make_task(task, {}).answers:.0f}*" for task in tasks)]]
    rows += [[f"`{mixer}`", *(spread(scores(task, mixer), 1) for task in tasks)] for mixer in probed()]
    return table(["mixer", *tasks], rows)


def probe_differences() -> list[str]:
    """Accuracy on the editing tasks less that of the blind mixer with the same seed."""
    rows = []
    for mixer in probed():
        if mixer != BLIND:
            pairs = [(probes()[task][mixer], probes()[task][BLIND]) for task in EDITING]
            gains = [[mine[seed] - other[seed] for seed in mine if seed in other] for mine, other in pairs]
            rows.append([f"`{mixer}`", *(interval_cell(student(some), 1) for some in gains)])
    return table([f"less `{BLIND}`", *EDITING], rows)


class Case(NamedTuple):
    """A column of a table of probes: a task of one size, each mixer at its best of the learning rates on validation.

    Attributes:
        folder: of the results, in `benchmarks/results/`.
        one_head: of 32 x 32, in place of two of 64 x 64.
    """

    folder: str
    task: str
    pairs: int | None = None
    rates: tuple[float, ...] = (3e-3,)
    seeds: int = 3
    steps: int = 2600
    one_head: bool = False

    @property
    def title(self) -> str:
        return self.task if self.pairs is None else f"{self.task}, {self.pairs} pairs"


BOTH = (1e-3, 3e-3)
TWO_HEADS = Case("probes/hard", "write-once", 32, BOTH)
HARD = [TWO_HEADS._replace(pairs=16), TWO_HEADS, Case("probes/hard", "mqar", 64)]
UPDATES = Case("probes/hard", "forgetting-mqar", 64, BOTH, seeds=5)
MORE_EDITING = [Case("probes/hard", task, 16) for task in ("counters", "compare-and-swap", "selective-forgetting")]
STATES = [Case("probes", task, steps=1300) for task in ("s5", "modular-addition")]
SMALLEST = Case("probes/one_head", "write-once", 32, steps=10_000, one_head=True)  # as many keys as dimensions
ONE_HEAD = {
    f"16 pairs, {steps:,} steps, {rate:g}": Case("probes/one_head", "write-once", 16, (rate,), 3, steps, one_head=True)
    for steps in (2600, 10_000)
    for rate in BOTH
} | {"32 pairs, 10,000 steps, 0.003": SMALLEST}
SEEING = [mixer for mixer, fields in MIXERS.items() if fields.get("content") and not mixer.endswith("-hybrid")]


@cache
def probed_at(case: Case) -> Mapping[str, Summary]:
    """Mixer -> what came out at its best learning rate, in the order of `MIXERS`."""
    there = read_probes(RESULTS / case.folder / "results.jsonl")
    runs = plan_probes(
        [case.task],
        list(MIXERS),
        pairs=[case.pairs] if case.pairs else (),
        learning_rates=case.rates,
        seeds=case.seeds,
        steps=case.steps,
        model={"num_heads": 1, "head_dim": 32} if case.one_head else {},
        device="cuda",
    )
    return {x.run.mixer: x for x in summarise(runs, there)}


def probe_cell(case: Case, mixer: str) -> str:
    """Accuracy, and the learning rate where there was a choice."""
    found = probed_at(case).get(mixer)
    if found is None:
        return NONE
    return cell(found, rate=len(case.rates) > 1)


def gain_cell(case: Case, mixer: str, base: str) -> str:
    """Accuracy less that of the base with the same seed, each at its own best rate; of how many seeds, if not all."""
    mine, other = (probed_at(case)[x].accuracies if x in probed_at(case) else {} for x in (mixer, base))
    gains = [100 * (mine[seed] - other[seed]) for seed in mine if seed in other]
    return interval_cell(student(gains), 1, *([f"{len(gains)} seeds"] if len(gains) < case.seeds else []))


def mixers_of(cases: Iterable[Case]) -> list[str]:
    return [mixer for mixer in MIXERS if any(mixer in probed_at(case) for case in cases)]


def probe_table(cases: Mapping[str, Case]) -> list[str]:
    rows = [[f"`{x}`", *(probe_cell(case, x) for case in cases.values())] for x in mixers_of(cases.values())]
    return table(["mixer", *cases], rows)


def titled(cases: Iterable[Case]) -> dict[str, Case]:
    return {case.title: case for case in cases}


def probe_gains(cases: Mapping[str, Case], base: str) -> list[str]:
    mixers = [mixer for mixer in mixers_of(cases.values()) if mixer != base]
    rows = [[f"`{x}`", *(gain_cell(case, x, base) for case in cases.values())] for x in mixers]
    return table([f"less `{base}`", *cases], rows)


def gains_of_content(case: Case, *, accuracy: bool) -> list[str]:
    """What the forms that see the memory gain on each that does not."""
    bases = [BLIND, "gdn2", "gdn", "kda"]
    rows = []
    for x in mixers_of([case]):
        gains = [gain_cell(case, x, base) if x in SEEING else "" for base in bases]
        if accuracy or x in SEEING:
            rows.append([f"`{x}`", *[probe_cell(case, x)] * accuracy, *gains])
    return table(["mixer", *["accuracy, %"] * accuracy, *(f"less `{base}`" for base in bases)], rows)


def signals() -> list[str]:
    """Accuracy of each signal of `signals.py` into both gates; of how many of three seeds, if not all."""
    tasks = ("write-once", "counters")
    found = [probes("signals")[task] for task in tasks]
    rows = []
    for name in dict.fromkeys(name for of_task in found for name in of_task):
        seeds = [list(of_task.get(name, {}).values()) for of_task in found]
        rows.append([name, *(spread(x, 1) + (f" ({len(x)}/3)" if 0 < len(x) < 3 else "") for x in seeds)])
    return table(["signal, into both gates", *tasks], rows)


# -- the pages --

BLOCKS = {
    "summary": summary,
    "small: perplexity": lambda: perplexities("small"),
    "small: differences": lambda: differences("small"),
    "small: rates": lambda: sweep("small"),
    "small: equal parameters": lambda: differences("small", "parameters"),
    "small: content": lambda: content_terms("small"),
    "ablations: differences": lambda: differences("ablations"),
    "ablations: content": lambda: content_terms("ablations"),
    "language: perplexity": lambda: perplexities("language"),
    "language: differences": lambda: differences("language"),
    "language: positions": lambda: positions("language", "test"),
    "language: content": lambda: content_terms("language"),
    "language: layers": lambda: layers("language"),
    "language: rates": lambda: sweep("language_rates", "parameters"),
    "language: equal parameters": lambda: perplexities("language_parameters", "parameters"),
    "language: equal parameters, differences": lambda: differences("language_parameters", "parameters"),
    "language: equal parameters, content": lambda: content_terms("language_parameters", "parameters"),
    "probes": accuracies,
    "probes: differences": probe_differences,
    "updates": lambda: gains_of_content(UPDATES, accuracy=True),
    "hard": lambda: probe_table(titled(HARD)),
    "hard: less carve-blind": lambda: probe_gains(titled(HARD), BLIND),
    "hard: less gdn2": lambda: probe_gains(titled(HARD), "gdn2"),
    "more editing": lambda: probe_table(titled(MORE_EDITING)),
    "one head": lambda: probe_table(ONE_HEAD),
    "one head: 32 pairs": lambda: gains_of_content(SMALLEST, accuracy=False),
    "states": lambda: probe_table(titled(STATES)),
    "signals": signals,
}


def draw() -> Figure:
    """Loss of each seed less that of the blind mixer of that seed; accuracy on probes."""
    figure = Figure(figsize=(11, 3.4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.5))
    colours = {mixer: f"C{i % 10}" for i, mixer in enumerate(SHOWN)}
    ways = ("equal width, 0.002", "equal parameters, 0.004")
    found = [comparison("language")[1], comparison("language_parameters", "parameters")[1]]
    labels = [label for label in found[0] if label in SHOWN]
    for way, some, shift in zip(ways, found, (-0.16, 0.16), strict=True):
        base = some[BLIND].losses("validation")
        for at, label in enumerate(labels):
            if label in some:
                losses = some[label].losses("validation")
                seeds = [losses[seed] - base[seed] for seed in losses if seed in base]
                full = {"color": colours[label], "markerfacecolor": "none" if shift > 0 else colours[label]}
                left.plot(seeds, [at + shift] * len(seeds), "o", markersize=4.5, alpha=0.7, **full)
                left.plot([statistics.fmean(seeds)] * 2, [at + shift - 0.15, at + shift + 0.15], color=colours[label])
        left.plot([], [], "o", color="0.4", markersize=4.5, markerfacecolor="none" if shift > 0 else "0.4", label=way)
    left.legend(fontsize=7, loc="lower left")
    left.set_yticks(range(len(labels)), labels)
    left.invert_yaxis()
    left.axvline(0, color="0.5", linewidth=0.8)
    left.set_xlabel("validation loss less that of carve-blind with the same seed, nats a token", fontsize=8)
    left.set_title("language: 31 M parameters, 100 M tokens", fontsize=9)
    cases = {"recall under updates\nforgetting-mqar, 64 pairs": UPDATES}
    cases |= {"write-once, 32 pairs\ntwo heads of 64": TWO_HEADS, "write-once, 32 pairs\none head of 32": SMALLEST}
    barred = [mixer for mixer in SHOWN if mixer in probed_at(UPDATES)]
    for i, mixer in enumerate(barred):
        for at, case in enumerate(cases.values()):
            if mixer in probed_at(case):
                seeds = [100 * x for x in probed_at(case)[mixer].accuracies.values()]
                place = at + (i - len(barred) // 2) * 0.09
                right.bar(place, statistics.fmean(seeds), 0.08, color=colours[mixer], alpha=0.6)
                right.plot([place] * len(seeds), seeds, ".", color="0.2", markersize=3)
    right.set_xticks(range(len(cases)), list(cases))
    right.set_ylabel("accuracy, %", fontsize=8)
    right.set_title("editing and recall, one layer", fontsize=9)
    patches = [Patch(color=colour, alpha=0.6, label=mixer) for mixer, colour in colours.items()]
    right.legend(handles=patches, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7)
    for ax in (left, right):
        ax.tick_params(labelsize=8)
        ax.grid(alpha=0.3)
    return figure


def fill(text: str) -> str:
    """The page, with every table as the results have it."""

    def block(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n" + "\n".join(BLOCKS[match[1]]()) + "\n<!-- end -->"

    return re.sub(r"<!-- (?!end)(.+?) -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a page is out of date")
    check = parser.parse_args().check
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if fill(text) != text:
            if check:
                sys.exit(f"{page} is out of date: python benchmarks/results.py")
            page.write_text(fill(text), encoding="utf-8")
    if not check:
        draw().savefig(PICTURE)


if __name__ == "__main__":
    main()
