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
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

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
SHOWN = ["carve-read", "carve-mean", "carve-mean-write", "carve-read-value", "carve-mean-value", BLIND]
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
    for label in ("carve-read", "carve-mean", BLIND, "carve-read-value", "gdn2", "kda"):
        x = comparison("language")[1][label]
        count = next(iter(x.seeds.values()))["parameters"]["without embeddings"]
        loss = spread([math.exp(y) for y in x.losses("validation").values()], 1)
        cells = [hard_cell("write-once", 32, label), hard_cell("forgetting-mqar", 64, label)]
        rows.append([f"`{label}`", f"{count / 1e6:.1f}", loss, *cells])
    return table(["mixer", "parameters, M", "perplexity", "write-once, %", "forgetting-mqar, %"], rows)


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


HARD = {"write-once": (16, 32), "mqar": (64,), "forgetting-mqar": (64,)}  # task -> pairs
RATES = {"write-once": [1e-3, 3e-3]}  # learning rates, where more than 3e-3 was tried
RECIPE: dict[str, Any] = {"steps": 2600, "device": "cuda"}


@cache
def hard() -> Mapping[tuple[str, int], Mapping[str, Summary]]:
    """Task and pairs -> mixer -> what came out at its best learning rate, of the harder probes."""
    there = read_probes(RESULTS / "probes" / "hard" / "results.jsonl")
    found: dict[tuple[str, int], dict[str, Summary]] = {}
    for task, sizes in HARD.items():
        mixers = [mixer for mixer in MIXERS if any(x["configuration"]["mixer"] == mixer for x in there.values())]
        rates = RATES.get(task, [3e-3])
        runs = plan_probes([task], mixers, pairs=sizes, learning_rates=rates, **RECIPE)
        for x in summarise(runs, there):
            found.setdefault((task, x.run.size["pairs"]), {})[x.run.mixer] = x
    return found


def hard_cell(task: str, pairs: int, mixer: str, *, rate: bool = False) -> str:
    """Accuracy, and the learning rate if asked for and there was a choice."""
    found = hard()[task, pairs].get(mixer)
    if found is None:
        return NONE
    return cell(found) + (f" at {found.learning_rate:g}" if rate and task in RATES else "")


def hard_mixers() -> list[str]:
    return [mixer for mixer in MIXERS if any(mixer in some for some in hard().values())]


def hard_accuracies() -> list[str]:
    rows = [[f"`{mixer}`", *(hard_cell(*case, mixer, rate=True) for case in hard())] for mixer in hard_mixers()]
    return table(["mixer", *(f"{task}, {pairs} pairs" for task, pairs in hard())], rows)


def hard_differences(base: str) -> list[str]:
    """Accuracy less that of the base with the same seed, each at its own best rate; of how many seeds, if not three."""
    rows = []
    for mixer in (mixer for mixer in hard_mixers() if mixer != base):
        cells = []
        for case in hard():
            mine, other = (hard()[case][x].accuracies if x in hard()[case] else {} for x in (mixer, base))
            gains = [100 * (mine[seed] - other[seed]) for seed in mine if seed in other]
            cells.append(interval_cell(student(gains), 1, *(["2 seeds"] if len(gains) == 2 else [])))
        rows.append([f"`{mixer}`", *cells])
    return table([f"less `{base}`", *(f"{task}, {pairs} pairs" for task, pairs in hard())], rows)


def one_head() -> list[str]:
    """Accuracy on `write-once` with 16 pairs in one head of 32, at each learning rate."""
    there = read_probes(RESULTS / "probes" / "one_head" / "results.jsonl")
    found, rates, model = [], RATES["write-once"], {"num_heads": 1, "head_dim": 32}
    for rate in rates:
        runs = plan_probes(["write-once"], list(MIXERS), pairs=[16], learning_rates=[rate], model=model, **RECIPE)
        found.append({x.run.mixer: cell(x) for x in summarise(runs, there)})
    shown = [mixer for mixer in MIXERS if any(mixer in some for some in found)]
    rows = [[f"`{mixer}`", *(some.get(mixer, NONE) for some in found)] for mixer in shown]
    return table(["mixer", *(f"{rate:g}" for rate in rates)], rows)


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
    "hard": hard_accuracies,
    "hard: less carve-blind": lambda: hard_differences(BLIND),
    "hard: less gdn2": lambda: hard_differences("gdn2"),
    "one head": one_head,
    "signals": signals,
}


def draw() -> Figure:
    """Loss of each seed less that of the blind mixer of that seed; accuracy on probes."""
    figure = Figure(figsize=(11, 3.4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.5))
    colours = {mixer: f"C{i % 10}" for i, mixer in enumerate(SHOWN)}
    found = {label: x for label, x in comparison("language")[1].items() if label in SHOWN}
    base = found[BLIND].losses("validation")
    for at, (label, x) in enumerate(found.items()):
        seeds = [loss - base[seed] for seed, loss in x.losses("validation").items()]
        left.plot(seeds, [at] * len(seeds), "o", color=colours[label], alpha=0.6)
        left.plot([statistics.fmean(seeds)] * 2, [at - 0.3, at + 0.3], color=colours[label], linewidth=2)
    left.set_yticks(range(len(found)), list(found))
    left.invert_yaxis()
    left.axvline(0, color="0.5", linewidth=0.8)
    left.set_xlabel("validation loss less that of carve-blind with the same seed, nats a token", fontsize=8)
    left.set_title("language: 31 M parameters, 100 M tokens", fontsize=9)
    probed = {f"{task}\n{pairs} pairs": (task, pairs) for task, pairs in hard()}
    for i, mixer in enumerate(SHOWN):
        for at, case in enumerate(probed.values()):
            if mixer in hard()[case]:
                seeds = [100 * x for x in hard()[case][mixer].accuracies.values()]
                place = at + (i - len(SHOWN) // 2) * 0.09
                right.bar(place, statistics.fmean(seeds), 0.08, color=colours[mixer], alpha=0.6)
                right.plot([place] * len(seeds), seeds, ".", color="0.2", markersize=3)
    right.set_xticks(range(len(probed)), list(probed))
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
