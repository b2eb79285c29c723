"""`carve compare`: trains and measures what a plan asks for, each run once, shared between processes; then reports."""

import gc
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console

from carve.compare.measure import Measure, documents_of, measure_speed
from carve.compare.plan import (
    DEFAULTS,
    Plan,
    Run,
    common_train,
    is_recurrent,
    parameters_of,
    read_plan,
)
from carve.compare.report import Results, write_report
from carve.extras import need
from carve.files import locked, replace_text
from carve.models.checkpoint import load_checkpoint
from carve.train import TrainConfig, train
from carve.train.data import Tokens, check_apart, find_files, fingerprint, remove_partial, tokenise
from carve.train.tokenizer import load_tokenizer

FACTS = "comparison.json"  # what all results of a folder have in common
RESULTS = "results"  # a file for each run, named by the hash of its configuration
SPEED = "speed.json"
LONGEST = 1_000_000  # minutes
LARGEST = 700.0  # nats a token: e to that is about what a float holds


def compare(
    file: str | Path,
    out: str | Path,
    *,
    text: str | Path = ".",
    minutes: float | None = None,
    report_only: bool = False,
) -> bool:
    """Train and measure what is not yet in `out/results`, add it there, and write a report named as the file is.

    Several processes can work on one folder of one machine: each takes the next run that no other has. A run that is
    interrupted goes on from a checkpoint the next time.

    Args:
        file: the YAML file of the comparison; see docs/compare.md.
        out: the folder of results.
        text: the folder from which the paths of texts in the file start.
        minutes: stop after so many, with a checkpoint; None for no limit.
        report_only: only write the report again, from results that are there.

    Returns:
        False if the user stopped it; True at its end, or when the time is over.

    Raises:
        ValueError, OSError: the file, a text or the tokenizer does not fit, or the folder holds results of another
            comparison: before any training.
        ImportError: matplotlib or scipy is not installed.
    """
    for module in ("matplotlib", "scipy"):
        need(module, "the report")
    if minutes is not None and not 0 < minutes <= LONGEST:
        raise ValueError(f"minutes is {minutes}, expected a positive number of at most {LONGEST:,}")
    plan, out = read_plan(file, text), Path(out)
    if report_only:
        if not (out / FACTS).is_file():
            raise ValueError(f"{out} holds no {FACTS}: expected the folder of a comparison")
        plan = plan.with_facts(read_json(out / FACTS)["texts"])
        check_folder(plan, out)
        if not (results := results_of(plan, out)):
            raise ValueError(f"{out} holds no result of this comparison: expected some, to report")
        print(write_report(plan, results, read_speed(out), out / Path(file).stem))
        return True

    console, limit, stopped = Console(stderr=True, highlight=False), TimeLimit(minutes), False
    try:
        with limit:
            check_texts(plan, out)
            out.mkdir(parents=True, exist_ok=True)
            with locked(out / "texts.lock", wait=True):  # the other processes find the texts tokenised
                plan, texts = read_texts(plan, out)
            describe(plan, texts, out, console)
            # what torch.compile made for one mixer is kept beside that for the others, and serves the next seeds
            with torch._dynamo.config.patch(recompile_limit=1000, accumulated_recompile_limit=1000):
                work(plan, texts, out, console)
    except KeyboardInterrupt:
        stopped = True
    if plan.facts is None:
        print("stopped before any training; the same command goes on", file=sys.stderr)
        return limit.over
    results = results_of(plan, out)
    if results:
        print(write_report(plan, results, read_speed(out), out / Path(file).stem))
    if stopped:
        print(f"stopped with {plan.left(results)} runs left; the same command goes on", file=sys.stderr)
    return not stopped or limit.over


# -- before the work --


def check_texts(plan: Plan, out: Path) -> None:
    """Raise ValueError unless all texts are there, not empty, and none is where the results go."""
    for name, path in text_paths(plan).items():
        check_apart("out", out, name, path)
        if not any(file.stat().st_size for file in find_files(path, name)):
            raise ValueError(f"{name} is {path!r}, which is empty: expected text")


def text_paths(plan: Plan) -> dict[str, str]:
    """Name -> path: "data", "validation" and the tests."""
    return {"data": plan.train["data"], "validation": plan.train["validation"], **plan.tests}


def read_texts(plan: Plan, out: Path) -> tuple[Plan, dict[str, Tokens]]:
    """The plan, knowing its texts, and the texts tokenised; the folder is new or of the same comparison.

    Raises:
        ValueError: a text or the tokenizer does not fit, or the folder holds results of another comparison.
    """
    tokenizer = load_tokenizer(plan.train.get("tokenizer", "bytes"))
    paths = text_paths(plan)
    prints = {name: fingerprint(path, tokenizer, name) for name, path in paths.items()}
    plan = plan.with_facts({"vocab_size": len(tokenizer), "fingerprints": prints})
    check_folder(plan, out)
    remove_partial(out / "tokens")  # we hold the lock
    texts = {name: tokenise(path, tokenizer, out / "tokens", name) for name, path in paths.items()}
    for name, tokens in texts.items():
        wanted = plan.train.get("seq_len", TrainConfig.seq_len) if name in ("data", "validation") else 2
        if len(tokens.ids) < wanted:
            raise ValueError(f"{name} is {paths[name]!r} with {len(tokens.ids)} tokens, expected at least {wanted}")
        if all(len(document) < 2 for document in documents_of(tokens)):
            raise ValueError(
                f"{name} is {paths[name]!r}, expected a document of two tokens or more: the first has no loss"
            )
    replace_text(out / FACTS, json.dumps(plan.common, indent=2) + "\n")
    return plan, texts


def check_folder(plan: Plan, out: Path) -> None:
    """Raise ValueError where the folder holds results of another comparison, and say in what it differs."""
    if not (out / FACTS).exists():
        for name in (RESULTS, "config.yaml"):  # the second is of a training run
            if (out / name).exists():
                raise ValueError(
                    f"{out} holds {name} but no {FACTS}: expected a new folder, or that of this comparison"
                )
        return
    there = read_json(out / FACTS)
    was, now = flat(there | {"train": common_train(there["train"])}), flat(json.loads(json.dumps(plan.common)))
    for name in was | now:
        if was.get(name) != now.get(name):
            raise ValueError(
                f"{out} holds results of another comparison: {name} is {was.get(name)!r} there, "
                f"{now.get(name)!r} here; expected the same, or a new folder"
            )


def flat(x: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(x, dict):
        return {name: x}
    return {key: y for part, z in x.items() for key, y in flat(z, f"{name}: {part}" if name else part).items()}


def read_results(out: Path) -> Results:
    """What is there, by `Run.key`."""
    return {path.stem: read_json(path) for path in (out / RESULTS).glob("*.json")}


def results_of(plan: Plan, out: Path) -> Results:
    """Those that are of the plan's runs."""
    runs = [run.key for label in plan.mixers for rate in plan.learning_rates for run in plan.at_rate(label, rate)]
    return {key: result for key, result in read_results(out).items() if key in runs}


def read_speed(out: Path) -> dict[str, Any]:
    """By `Run.key`, what `measure_speed` found."""
    return read_json(out / SPEED) if (out / SPEED).exists() else {}


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): expected what a comparison wrote there") from error


def describe(plan: Plan, texts: dict[str, Tokens], out: Path, console: Console) -> None:
    train = {**DEFAULTS, **plan.train}
    tokens, size = train["steps"] * train["batch_tokens"], len(texts["data"].ids)
    console.print(
        f"{plan.left(read_results(out))} runs to make, each of {tokens / 1e6:,.3g} M tokens: "
        f"{tokens / size:.2f} passes over the {size / 1e6:,.3g} M of the text"
    )


# -- the work --


def work(plan: Plan, texts: dict[str, Tokens], out: Path, console: Console) -> None:
    """Make every run that no other process makes; the first to find none left measures speed, alone."""
    waited = False
    while wanted := plan.wanted(read_results(out)):
        for run in wanted:
            path = out / RESULTS / f"{run.key}.json"
            with locked(out / "runs" / f"{run.key}.lock") as mine:
                if mine and not path.exists():
                    console.print(f"{plan.left(read_results(out))} left: {run.described}")
                    replace_text(path, json.dumps(make(plan, run, texts, out), allow_nan=False) + "\n")
                    waited = False
                    break
        else:
            if not waited:
                console.print("waiting for runs of other processes")
            waited = True
            time.sleep(1)
    with locked(out / "speed.lock", wait=True):
        runs = {run.key: run for run in speed_runs(plan, read_results(out))}
        if not set(runs) <= set(speed := read_speed(out)):
            console.print("measuring speed")
            free_memory()
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            found = measure_speed([{**DEFAULTS, **run.train} for run in runs.values()], device)
            speed |= {key: record | {"device": device_name()} for key, record in zip(runs, found, strict=True)}
            replace_text(out / SPEED, json.dumps(speed) + "\n")


def make(plan: Plan, run: Run, texts: dict[str, Tokens], out: Path) -> dict[str, Any]:
    """Train, or go on with it, and measure: the result, as plain data. One that diverged is a result too."""
    folder, steps = out / "runs" / run.key, run.train.get("steps", TrainConfig.steps)
    config = TrainConfig(
        **{name: os.path.abspath(plan.train[name]) for name in ("data", "validation")},
        tokenizer=plan.train.get("tokenizer", TrainConfig.tokenizer),
        **run.train,
        out=os.path.abspath(folder),
        cache=os.path.abspath(out / "tokens"),
        eval_every=0,
        save_every=min(steps, max(100, steps // 10)),  # so much a killed process may lose
        keep=1,
    )
    resume = (folder / "config.yaml").exists()
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)  # killed before it had begun
    record: dict[str, Any] = {"label": run.label, "configuration": run.configuration}
    record |= {"parameters": parameters_of(run.train["model"])}
    record |= {"device": device_name(), "torch": torch.__version__}
    try:
        checkpoint = train(config, resume=resume)
        free_memory()
        return record | measure_run(run, config, checkpoint, texts)
    except FloatingPointError as error:
        return record | {"texts": {}, "diverged": str(error)}
    finally:
        free_memory()


def measure_run(run: Run, config: TrainConfig, checkpoint: Path, texts: dict[str, Tokens]) -> dict[str, Any]:
    """What a run that has ended gives, as plain data.

    Raises:
        FloatingPointError: it diverged: a number, or a perplexity, is not finite.
    """
    lines = (checkpoint.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [[line["step"], line["loss"]] for line in map(json.loads, lines) if "loss" in line]

    model, tokenizer = load_checkpoint(checkpoint)
    measure = Measure(config.seq_len, config.micro_batch, config.dtype)
    carried = is_recurrent(run.train["model"])
    scores = {
        name: measure.score_text(model, tokens, carried=carried) for name, tokens in texts.items() if name != "data"
    }
    for name, score in scores.items():
        if (loss := score["nats"] / score["tokens"]) > LARGEST:
            raise FloatingPointError(f"the loss on {name} is {loss:.0f} nats a token, whose perplexity is not finite")
    found: dict[str, Any] = {"losses": losses, "texts": scores}
    if model.config.sees_content:
        found["content"] = measure.content_report(model, tokenizer, texts["validation"])
    (checkpoint / "optimizer.pt").unlink(missing_ok=True)  # two thirds of the bytes, for a run that has ended
    return found


def speed_runs(plan: Plan, results: Results) -> list[Run]:
    """A run of each mixer and matching."""
    return [
        plan.run(label, matching, plan.best_rate(label, results) or plan.learning_rates[0], 0)
        for matching in plan.matching
        for label in plan.mixers
    ]


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def free_memory() -> None:
    gc.collect()  # a Trainer holds itself in circles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class TimeLimit:
    """Within `with`: when the time is over, a run in training saves a checkpoint and ends; anything else just ends.

    Attributes:
        over: whether the time is over.
    """

    def __init__(self, minutes: float | None) -> None:
        self.minutes, self.over = minutes, False

    def __enter__(self) -> "TimeLimit":
        if self.minutes is not None:
            self.before = {number: signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGTERM)}
            signal.signal(signal.SIGALRM, self.expire)
            signal.signal(signal.SIGTERM, self.end)
            signal.setitimer(signal.ITIMER_REAL, 60 * self.minutes)
        return self

    def __exit__(self, *_: object) -> None:
        if self.minutes is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in self.before.items():
                signal.signal(number, handler)

    def expire(self, number: int, frame: FrameType | None) -> None:
        self.over = True
        os.kill(os.getpid(), signal.SIGTERM)  # which training, while it runs, answers with a checkpoint

    def end(self, number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt
