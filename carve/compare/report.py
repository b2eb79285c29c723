"""The report of a comparison: what came out, how sure it is, and pictures of it."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from carve.compare.plan import DEFAULTS, Plan, Run, validation_loss
from carve.files import replace_text, replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARE = 0.95  # of the intervals
RESAMPLES, BLOCK = 10_000, 16  # of the bootstrap; windows that are drawn together, at most
NONE = "–"

Results = Mapping[str, Mapping[str, Any]]  # by `Run.key`
Interval = tuple[float, float, float]  # a difference in nats a token, and the ends of its interval


@dataclass(frozen=True)
class Outcome:
    """A mixer in one matching: the results of its seeds, at the learning rate chosen for it.

    Attributes:
        run: that of seed 0.
        seeds: seed -> result, of the seeds there are.
        wanted: how many there are to be.
        speed: see `measure_speed`; None before it is measured.
    """

    label: str
    matching: str
    run: Run
    seeds: dict[int, Mapping[str, Any]]
    wanted: int
    speed: Mapping[str, Any] | None

    def losses(self, text: str) -> dict[int, float]:
        """Seed -> nats a token; none of runs that diverged."""
        scores = {seed: result["texts"].get(text) for seed, result in self.seeds.items()}
        return {seed: score["nats"] / score["tokens"] for seed, score in scores.items() if score is not None}

    @cached_property
    def diverged(self) -> int:
        return sum("diverged" in result for result in self.seeds.values())


def outcomes_of(plan: Plan, results: Results, speed: Mapping[str, Any]) -> dict[str, list[Outcome]]:
    """Matching -> the mixers that have a result, in the order of the plan."""
    outcomes: dict[str, list[Outcome]] = {matching: [] for matching in plan.matching}
    for matching in plan.matching:
        for label in plan.mixers:
            rate = plan.best_rate(label, results)
            if rate is None:
                continue
            runs = {seed: plan.run(label, matching, rate, seed) for seed in plan.seeds_of(label)}
            seeds = {seed: results[run.key] for seed, run in runs.items() if run.key in results}
            if seeds:
                outcome = Outcome(label, matching, runs[0], seeds, len(runs), speed.get(runs[0].key))
                outcomes[matching].append(outcome)
    return outcomes


# -- how sure it is --


def over_seeds(ours: Outcome, base: Outcome, text: str) -> Interval | None:
    """Of the difference, over the seeds that both have; see `student`."""
    mine, other = ours.losses(text), base.losses(text)
    return student([mine[seed] - other[seed] for seed in mine if seed in other])


def student(differences: Sequence[float]) -> Interval | None:
    """Their mean, and Student's interval for it; None with fewer than two."""
    from scipy.stats import t

    if len(differences) < 2:
        return None
    mean, error = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
    reach = float(t.ppf((1 + SHARE) / 2, len(differences) - 1)) * error
    return mean, mean - reach, mean + reach


def over_windows(ours: Outcome, base: Outcome, text: str) -> Interval | None:
    """The same difference, and a paired bootstrap interval over the windows of the text, of the models as trained.

    Windows next to each other are mostly of one document, and alike: runs of them are drawn (circular block bootstrap).
    """
    seeds = [seed for seed in ours.losses(text) if seed in base.losses(text)]
    if not seeds:
        return None

    def sums(outcome: Outcome) -> np.ndarray:  # [seeds, windows, 2]
        return np.array([outcome.seeds[seed]["texts"][text]["windows"] for seed in seeds], dtype=float)

    mine, other = sums(ours), sums(base)
    nats, tokens = (mine - other)[..., 0].mean(0), mine[0, :, 1]  # [windows]
    generator, W = np.random.default_rng(0), len(nats)
    block = max(1, min(BLOCK, W // 8))
    drawn = np.empty(RESAMPLES)
    for i in range(0, RESAMPLES, 1000):
        starts = generator.integers(W, size=(1000, -(-W // block), 1))
        picks = ((starts + np.arange(block)) % W).reshape(1000, -1)[:, :W]
        drawn[i : i + 1000] = nats[picks].sum(1) / tokens[picks].sum(1)
    low, high = np.quantile(drawn, [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return float(nats.sum() / tokens.sum()), float(low), float(high)


# -- the page --


def write_report(plan: Plan, results: Results, speed: Mapping[str, Any], stem: Path) -> Path:
    """Write `stem.md` and its pictures, each under its name only when it is whole; returns the page's path."""
    outcomes = outcomes_of(plan, results, speed)
    page = [f"# Comparison with {plan.baseline}", "", *opening(plan, results)]
    texts = ["validation", *plan.tests]
    for matching, some in outcomes.items():
        if not some:
            continue
        base = next((x for x in some if x.label == plan.baseline), None)
        title, what = {
            "shape": ("Equal shape", "All models have the same width, layers, heads and MLP."),
            "parameters": (
                "Equal number of parameters",
                f"The MLP is as wide as brings the number of parameters within 0.5 % of that of {plan.baseline}.",
            ),
        }[matching]
        page += ["", f"## {title}", "", what, "", *sizes(some), *perplexities(some, texts)]
        for text in texts:
            page += differences(some, base, text)
        page += by_position(some, base, texts[min(1, len(texts) - 1)])
        if used := contents(some):
            page += [
                "",
                "What the trained content term does, on validation: the rise of the loss, in nats a token, when it is "
                "switched off or taken from another text; how far it moves the gates of a head on average (largest: "
                "of any head); of what it adds to the erase gates' logits, the share that is the same for every token, "
                "and how much it varies beside the token's own logits (means over heads).",
                "",
                *used,
            ]
    page += rates(plan, results)
    first = outcomes[plan.matching[0]]
    pictures = {
        "perplexity": draw_perplexity(outcomes, texts),
        "position": draw_position(first, plan.baseline, texts),
        "gates": draw_gates(first),
    }
    page += ["", "## Pictures", ""]
    for name, figure in pictures.items():
        if figure is not None:
            path = stem.with_name(f"{stem.name}_{name}.png")
            with replacing(path) as partial:
                figure.savefig(partial, format="png")
            page.append(f"![{name}]({path.name})")
    path = stem.with_name(f"{stem.name}.md")
    replace_text(path, "\n".join(page) + "\n")
    return path


def opening(plan: Plan, results: Results) -> list[str]:
    train = {**DEFAULTS, **plan.train}
    tokens = train["steps"] * train["batch_tokens"]
    devices = sorted({record["device"] for record in results.values()})
    left = plan.left(results)
    lines = [
        f"{train['steps']:,} steps of {train['batch_tokens']:,} tokens, {tokens / 1e6:,.4g} M in all, in sequences of "
        f"{train['seq_len']:,}; the same trainer, data order and seeds for all. Device: {', '.join(devices)}.",
    ]
    if left:
        lines += ["", f"**Not complete: {left} runs are left.**"]
    lines += [
        "",
        f"Perplexity is that of a token given those before it in its window of {train['seq_len']:,} tokens; mean ± "
        "standard deviation over seeds. Differences are of the loss, in nats a token, negative where the perplexity is "
        f"lower than that of {plan.baseline}, each with two {SHARE:.0%} intervals. *Over seeds*: Student's t of the "
        "differences between runs of the same seed, which says what another training might give. *Over the text*: "
        f"paired bootstrap of runs of up to {BLOCK} windows, {RESAMPLES:,} resamples, which says what other text of "
        "this kind might give with these trained models.",
    ]
    return lines


def sizes(some: Sequence[Outcome]) -> list[str]:
    rows = []
    for x in some:
        count = next(iter(x.seeds.values()))["parameters"]
        speed, peak = NONE, NONE
        if x.speed is not None:
            speed = f"{statistics.median(x.speed['tokens_per_second']):,.0f}"
            peak = NONE if x.speed["peak_bytes"] is None else f"{x.speed['peak_bytes'] / 2**20:,.0f}"
        model = x.run.configuration["train"]["model"]
        numbers = [f"{count[name]:,}" for name in ("all", "without embeddings", "mixers")]
        rows.append([x.label, *numbers, f"{model['intermediate_size']:,}", speed, peak, seeds_cell(x)])
    head = ["mixer", "parameters", "without embeddings", "of the mixers", "MLP width", "tokens/s", "peak MiB", "seeds"]
    devices = " and ".join(sorted({x.speed["device"] for x in some if x.speed is not None}))
    note = "Tokens a second and peak memory are of training steps of one micro-batch, run alone and in turns"
    note += f", on {devices}." if devices else "."
    return [*table(head, rows), "", note]


def seeds_cell(x: Outcome) -> str:
    cell = f"{len(x.seeds)}" if len(x.seeds) == x.wanted else f"{len(x.seeds)} of {x.wanted}"
    return cell + (f", {x.diverged} diverged" if x.diverged else "")


def perplexities(some: Sequence[Outcome], texts: Sequence[str]) -> list[str]:
    rows = []
    for x in some:
        cells = [spread([math.exp(y) for y in x.losses(text).values()]) for text in texts]
        rows.append([x.label, *(["diverged"] * len(texts) if x.diverged == len(x.seeds) else cells)])
    return ["", "Perplexity:", "", *table(["mixer", *texts], rows)]


def spread(numbers: Sequence[float], digits: int = 3) -> str:
    """Mean and standard deviation."""
    if not numbers:
        return NONE
    deviation = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{statistics.fmean(numbers):.{digits}f}{deviation}"


def differences(some: Sequence[Outcome], base: Outcome | None, text: str) -> list[str]:
    if base is None:
        return []
    if base.diverged == len(base.seeds):
        return ["", f"Nothing to compare with on {text}: {base.label} diverged."]
    rows = []
    for x in some:
        if x.label != base.label and x.losses(text):
            seeds, windows = over_seeds(x, base, text), over_windows(x, base, text)
            if windows is not None:
                percent = f"{100 * math.expm1(windows[0]):+.2f} %"
                rows.append([x.label, f"{windows[0]:+.4f}", percent, reach(seeds), reach(windows)])
    if not rows:
        return []
    head = ["mixer", "difference", "in perplexity", "over seeds", "over the text"]
    return ["", f"Against {base.label} on {text}, over the seeds that both have:", "", *table(head, rows)]


def reach(interval: Interval | None) -> str:
    return NONE if interval is None else f"{interval[1]:+.4f} to {interval[2]:+.4f}"


def by_position(some: Sequence[Outcome], base: Outcome | None, text: str) -> list[str]:
    """Differences in loss by what comes before a token: in the window, and in the document with the memory carried."""
    page = []
    for path, title in PLACES.items():
        if base is None or not (places := position_losses(base, base, text, path)):
            continue
        names = [f"{low:,} to {high:,}" for low, high in places]
        rows = []
        for x in some:
            if x.label != base.label and (losses := position_losses(x, base, text, path)):
                other = position_losses(base, x, text, path)
                cells = [f"{losses[at] - other[at]:+.4f}" if at in losses and at in other else NONE for at in places]
                rows.append([x.label, *cells])
        if rows:
            page += ["", f"Difference from {base.label} on {text} by {title}:", "", *table(["mixer", *names], rows)]
    return page


PLACES = {
    "by_context": "tokens before it in its window",
    "by_position": "tokens before it in its document, the memory carried on (only what has no attention)",
}


def position_losses(x: Outcome, partner: Outcome, text: str, place: str) -> dict[tuple[int, int], float]:
    """`(from, to)` -> nats a token, the mean over the seeds that its partner has too."""
    found: dict[tuple[int, int], list[float]] = {}
    for seed in x.losses(text).keys() & partner.losses(text).keys():
        score = x.seeds[seed]["texts"][text]
        for low, high, nats, tokens in (score if place == "by_context" else score.get("carried", {})).get(place, []):
            found.setdefault((low, high), []).append(nats / tokens)
    return {at: statistics.fmean(losses) for at, losses in found.items()}


def contents(some: Sequence[Outcome]) -> list[str]:
    """What the trained content term does, on validation text, of those that have one."""
    rows = []
    for x in some:
        kept = [result for result in x.seeds.values() if result.get("content")]
        if not kept:
            continue
        off, swapped = [], []
        for result in kept:
            whole, content = result["texts"]["validation"], result["content"]
            off.append((content["off"]["nats"] - whole["nats"]) / whole["tokens"])
            if pairs := content["swapped"]:
                swapped.append((pairs["other"] - pairs["own"]) / pairs["tokens"])
        layers = [layer for result in kept for layer in result["content"]["gates"]]
        names = ("erase_shift", "write_shift", "same", "beside")
        heads = {name: [y for layer in layers for y in layer.get(name) or []] for name in names}
        cells = [
            f"{statistics.fmean(y):.3f} (largest {max(y):.3f})" if (y := heads[name]) else NONE for name in names[:2]
        ]
        cells += [f"{statistics.fmean(y):.0%}" if (y := heads[name]) else NONE for name in names[2:]]
        rows.append([x.label, signed(off), signed(swapped), *cells])
    head = ["mixer", "content off", "content of another text", "erase gate moved", "write gate moved"]
    head += ["the same for all tokens", "beside the token's own"]
    known = [i for i in range(len(head)) if any(row[i] != NONE for row in rows)]
    return table([head[i] for i in known], [[row[i] for i in known] for row in rows]) if rows else []


def signed(numbers: Sequence[float]) -> str:
    if not numbers:
        return NONE
    deviation = f" ± {statistics.stdev(numbers):.4f}" if len(numbers) > 1 else ""
    return f"{statistics.fmean(numbers):+.4f}{deviation}"


def rates(plan: Plan, results: Results) -> list[str]:
    if len(plan.learning_rates) == 1:
        return ["", f"One learning rate for all, {plan.learning_rates[0]:g}: nothing was tuned."]
    rows = []
    for label in plan.mixers:
        best = plan.best_rate(label, results)
        cells = []
        for run in sorted(plan.sweep(label), key=lambda run: run.train["learning_rate"]):
            loss = validation_loss(results[run.key]) if run.key in results else None
            cell = NONE if loss is None else "diverged" if math.isinf(loss) else f"{math.exp(loss):.3f}"
            cells.append(f"**{cell}**" if run.train["learning_rate"] == best else cell)
        edge = best in (min(plan.learning_rates), max(plan.learning_rates)) and len(plan.learning_rates) > 2
        rows.append([label, *cells, "at the edge" if edge else ""])
    return [
        "",
        "## Learning rates",
        "",
        f"The same for all mixers, seed 0, {'equal shape' if plan.matching[0] == 'shape' else 'equal parameters'}: "
        "validation perplexity. The best of each is taken for all of its runs.",
        "",
        *table(["mixer", *(f"{rate:g}" for rate in sorted(plan.learning_rates)), ""], rows),
    ]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


# -- the pictures --


def draw_perplexity(outcomes: Mapping[str, Sequence[Outcome]], texts: Sequence[str]) -> "Figure | None":
    """A column for each text, a row for each matching: the seeds as dots, their mean as a line."""
    from matplotlib.figure import Figure

    kept = {matching: some for matching, some in outcomes.items() if some}
    if not kept:
        return None
    labels = list(dict.fromkeys(x.label for some in kept.values() for x in some))
    size = (1.6 + 2.6 * len(texts), (0.8 + 0.28 * len(labels)) * len(kept) + 0.4)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    axes = figure.subplots(len(kept), len(texts), squeeze=False, sharey=True)
    for row, (matching, some) in zip(axes, kept.items(), strict=True):
        for ax, text in zip(row, texts, strict=True):
            for x in some:
                at = labels.index(x.label)
                found = [math.exp(y) for y in x.losses(text).values()]
                ax.plot(found, [at] * len(found), "o", color=f"C{at % 10}", alpha=0.6, markersize=5)
                if found:
                    ax.plot([statistics.fmean(found)] * 2, [at - 0.3, at + 0.3], color=f"C{at % 10}", linewidth=2)
            ax.set_title(f"{text}, equal {matching}", fontsize=9)
            ax.tick_params(labelsize=8)
            ax.grid(alpha=0.3)
        row[0].set_yticks(range(len(labels)), labels)
        row[0].set_ylim(len(labels) - 0.5, -0.5)
    for ax in axes[-1]:
        ax.set_xlabel("perplexity", fontsize=8)
    return figure


def draw_position(some: Sequence[Outcome], baseline: str, texts: Sequence[str]) -> "Figure | None":
    """Difference in loss from the baseline by what comes before a token: a row for each text.

    Nothing is drawn where all falls into one bin: its difference is that of the whole text.
    """
    from matplotlib.figure import Figure

    base = next((x for x in some if x.label == baseline), None)
    if base is None or len(some) < 2:
        return None
    bins = {place: [len(position_losses(base, base, text, place)) for text in texts] for place in PLACES}
    places = [place for place in PLACES if max(bins[place]) > 1]
    if not places:
        return None
    figure = Figure(figsize=(1.6 + 3.7 * len(places), 1.2 + 2.3 * len(texts)), dpi=110, layout="constrained")
    axes = figure.subplots(len(texts), len(places), squeeze=False)
    for n, (row, text) in enumerate(zip(axes, texts, strict=True)):
        for ax, place in zip(row, places, strict=True):
            if bins[place][n] < 2:
                ax.axis("off")
                continue
            for i, x in enumerate(some):
                losses, other = position_losses(x, base, text, place), position_losses(base, x, text, place)
                at = [bounds for bounds in other if bounds in losses]
                middles = [math.sqrt(low * high) for low, high in at]
                if x is not base and at:
                    lines = [losses[bounds] - other[bounds] for bounds in at]
                    style = {"color": f"C{i % 10}", "linestyle": ("-", "--", ":", "-.")[i // 10 % 4], "linewidth": 1.2}
                    ax.plot(middles, lines, marker="o", markersize=3, label=x.label, **style)
            ax.axhline(0, color="0.5", linewidth=0.8)
            ax.set_xscale("log", base=2)
            ax.set_xlabel(PLACES[place].partition(" (")[0], fontsize=7)
            ax.tick_params(labelsize=7)
            ax.grid(alpha=0.3)
        row[0].set_ylabel(f"{text}\nnats over {baseline}", fontsize=8)
    handles = {label: line for ax in figure.axes for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    return figure


def draw_gates(some: Sequence[Outcome]) -> "Figure | None":
    """How far the content moves the gates, for each layer and head, the mean over seeds: a picture for each gate."""
    from matplotlib.figure import Figure

    shown: list[tuple[str, list[int], np.ndarray]] = []
    for x in some:
        reports = [result["content"]["gates"] for result in x.seeds.values() if result.get("content")]
        for gate in ("erase", "write"):
            shifts = [[layer[f"{gate}_shift"] for layer in layers] for layers in reports]  # [seeds][layers][heads]
            if shifts and shifts[0] and shifts[0][0] is not None and np.any(shifts):
                shown.append((f"{x.label}\n{gate} gate", [layer["layer"] for layer in reports[0]], np.mean(shifts, 0)))
    if not shown:
        return None
    rows = -(-len(shown) // 3)
    figure = Figure(figsize=(10, 0.4 + 2.3 * rows), dpi=110, layout="constrained")
    axes = figure.subplots(rows, 3, squeeze=False).flatten()
    for ax in axes[len(shown) :]:
        ax.axis("off")
    for ax, (title, layers, moved) in zip(axes, shown, strict=False):
        image = ax.imshow(moved, aspect="auto", cmap="inferno", vmin=0, interpolation="nearest")
        ax.set_title(title, fontsize=8)
        ax.set_xlabel("head", fontsize=7)
        ax.set_ylabel("layer", fontsize=7)
        ax.set_xticks(range(moved.shape[1]))
        ax.set_yticks(range(len(layers)), [str(layer) for layer in layers])
        ax.tick_params(labelsize=7)
        bar = figure.colorbar(image, ax=ax)
        bar.set_label("moved by content", fontsize=7)
        bar.ax.tick_params(labelsize=7)
    return figure
