"""The `carve` command: parsing only; every command calls one function of the package."""

import dataclasses
import os
import sys
import warnings
from collections.abc import Callable
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any

import typer

from carve.train.config import PRESETS, TrainConfig, read_yaml

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train, evaluate and use CARVE language models.",
)


Checkpoint = Annotated[
    Path, typer.Argument(help="A checkpoint folder, or the folder of a training run: its last complete checkpoint.")
]


@app.command("eval")
def evaluate(
    checkpoint: Checkpoint,
    texts: Annotated[list[Path], typer.Argument(help="Text files; .jsonl or .parquet with a field 'text'.")],
    window: Annotated[
        int | None, typer.Option(help="Forget all but this many tokens, to compare with attention models.")
    ] = None,
    stride: Annotated[int | None, typer.Option(help=r"Tokens from one window to the next.  \[default: window]")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the raw numbers to this file.")] = None,
) -> None:
    """Perplexity and bits per byte on text of any length, in constant memory. Ctrl-C prints what it has."""
    from carve.evals.report import evaluate_files

    _quiet()
    if not evaluate_files(checkpoint, texts, window=window, stride=stride, json_path=json):
        raise typer.Exit(130)


@app.command()
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str | None, typer.Option(help="The text to continue.")] = None,
    file: Annotated[Path | None, typer.Option(help="Continue the text of this file, to its last byte.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.")] = 400,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.8,
    top_p: Annotated[
        float, typer.Option(help="Sample among the likeliest that together have this probability.")
    ] = 0.95,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
) -> None:
    """Continue a prompt from --prompt, --file or standard input; prints the continuation as it is produced."""
    from carve.generation import generate_text
    from carve.models.checkpoint import load_checkpoint

    _quiet()
    text = _text(prompt, file)
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal that cannot show a character
    try:
        generate_text(
            *load_checkpoint(checkpoint),
            text,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            write=lambda piece: print(piece, end="", flush=True),
        )
    except KeyboardInterrupt:
        print()
        raise typer.Exit(130) from None
    print()


@app.command()
def inspect(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(help="The picture to write, a PNG.")],
    prompt: Annotated[str | None, typer.Option(help="The text to run through the model.")] = None,
    file: Annotated[Path | None, typer.Option(help="Run the text of this file: a page or two.")] = None,
) -> None:
    """Draw what each layer and head erases, writes and forgets over a text, and how the content moves the gates."""
    from carve.inspection import inspect_checkpoint

    _quiet()
    inspect_checkpoint(checkpoint, _text(prompt, file), out)


@app.command()
def demo() -> None:
    """Train a small model on Python's own source files, here and now: three minutes, no download."""
    from carve.demo import run_demo

    _quiet()
    try:
        run_demo()
    except KeyboardInterrupt:
        print("stopped; `carve demo` goes on from the last checkpoint", file=sys.stderr)
        raise typer.Exit(130) from None


def _with_fields(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command a flag for every field of `TrainConfig`."""
    presets = ", ".join(path.stem for path in sorted(PRESETS.glob("*.yaml")))
    options: dict[str, Any] = {
        "config": Annotated[str | None, typer.Argument(help=f"A preset ({presets}) or a YAML file of these options.")],
        "resume": Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")],
    }
    for each in dataclasses.fields(TrainConfig):
        default = "" if each.default in (dataclasses.MISSING, None) else f"  [default: {each.default}]"
        shown = (each.metadata["help"] + default).replace("[", r"\[")  # rich takes a bare [...] for markup
        kind = list[str] if each.name == "model" else each.type
        options[each.name] = Annotated[kind | None, typer.Option(help=shown)]  # type: ignore[operator]
    parameters = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=kind) for name, kind in options.items()
    ]
    command.__annotations__ = options
    command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return command


@app.command()
@_with_fields
def train(config: str | None, resume: Path | None, **fields: Any) -> None:
    """Train a model on text. Ctrl-C saves a checkpoint; --resume goes on from the last one, to the same weights."""
    from carve.train.run import Interrupted
    from carve.train.run import train as run

    _quiet()
    overrides = {name: value for name, value in fields.items() if value not in (None, [])}
    if "model" in overrides:
        overrides["model"] = _assignments("model", overrides["model"])
    if resume is not None:
        if config is not None:
            raise ValueError("config and --resume exclude each other: a run goes on with its own configuration")
        if "out" in overrides:
            raise ValueError("--out and --resume exclude each other: a run goes on in its own folder")
        if not (resume / "config.yaml").is_file():
            raise ValueError(f"--resume is {resume}, which holds no config.yaml: expected the folder of a training run")
        config, overrides = str(resume / "config.yaml"), overrides | {"out": str(resume)}
    try:
        print(run(TrainConfig.load(config, overrides), resume=resume is not None))
    except Interrupted as interruption:
        print(interruption, file=sys.stderr)
        raise typer.Exit(128 + interruption.signal) from None
    except KeyboardInterrupt:
        print("stopped before training began", file=sys.stderr)
        raise typer.Exit(130) from None


@app.command()
def tokenizer(
    data: Annotated[str, typer.Argument(help="Text: a file or folder (.jsonl, .parquet, else UTF-8), or hub:NAME.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    vocab_size: Annotated[int, typer.Option(help="Tokens, the 256 bytes included.")] = 16384,
) -> None:
    """Train a byte-level BPE tokenizer on text, for `carve train --tokenizer`."""
    from carve.train.tokenizer import train_tokenizer

    print(train_tokenizer(data, vocab_size, out))


@app.command()
def probe(
    task: Annotated[str, typer.Option(help="Tasks, separated by commas; see docs/probes.md.")],
    mixer: Annotated[str, typer.Option(help="Mixers, separated by commas, as in carve/evals/mixers.py.")],
    pairs: Annotated[str, typer.Option(help="Numbers of pairs, for tasks that have them: 4,8,16.")] = "",
    length: Annotated[str, typer.Option(help="Lengths, for tasks that have one: 16,32.")] = "",
    seeds: Annotated[int, typer.Option(help="Runs of each, with seeds 0, 1, ...")] = 3,
    steps: Annotated[int, typer.Option(help="Optimizer steps of a run.")] = 2000,
    batch_size: Annotated[int, typer.Option(help="Sequences in a step.")] = 64,
    learning_rate: Annotated[
        str, typer.Option(help="Peaks, separated by commas; the best on validation is reported.")
    ] = "2e-3",
    set: Annotated[list[str] | None, typer.Option(help="NAME=VALUE, a field of the tasks; repeat for more.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="NAME=VALUE of CarveConfig; repeat for more.")] = None,
    device: Annotated[str | None, typer.Option(help=r"cpu or cuda.  \[default: cuda where there is one]")] = None,
    shard: Annotated[str, typer.Option(help="I/N: the I-th of N processes that share the runs.")] = "1/1",
    output: Annotated[Path, typer.Option(help="The folder of results.jsonl and probes.png.")] = Path("runs/probe"),
    report: Annotated[
        bool, typer.Option("--report", help="Train nothing: table and picture of what is there.")
    ] = False,
) -> None:
    """Train small models on recall, editing and state-tracking tasks. Run again, it goes on where it stopped."""
    from carve.evals.probes.runs import parse_shard, plan_probes, probe_device, report_probes, run_probes

    _quiet()
    if device is None or not report:  # results of a device can be reported without it
        device = probe_device(device)
    runs = plan_probes(
        _names(task),
        _names(mixer),
        pairs=_numbers("pairs", pairs, int),
        lengths=_numbers("length", length, int),
        seeds=seeds,
        steps=steps,
        batch_size=batch_size,
        learning_rates=_numbers("learning-rate", learning_rate, float),
        fields=_assignments("set", set or []),
        model=_assignments("model", model or []),
        device=device,
    )
    if report:
        if not report_probes(runs, output):
            raise ValueError(
                f"{output} holds no result of these {len(runs)} runs: expected some, with the same options"
            )
    elif not run_probes(runs, output, device=device, shard=parse_shard(shard)):
        print("stopped; the same command goes on with the runs that are left", file=sys.stderr)
        raise typer.Exit(130)


@app.command()
def needle(
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Option(help="The file of JSON lines to add results to.")],
    task: Annotated[
        str, typer.Option(help="Tasks, separated by commas.")
    ] = "s-niah-1,s-niah-2,s-niah-3,mk-niah-1,mk-niah-2,mk-niah-3,mv-niah,mq-niah",
    length: Annotated[str, typer.Option(help="Tokens of context, separated by commas.")] = "1024,2048,4096,8192",
    samples: Annotated[int, typer.Option(help="Of each task and length.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Samples answered at once.")] = 16,
    haystack: Annotated[
        Path | None,
        typer.Option(help=r"Text to hide needles in: .txt, .txt.gz or .md, or a folder.  \[default: noise]"),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same samples.")] = 0,
) -> None:
    """Needle in a haystack, as in RULER, by greedy generation. Run again, it goes on where it stopped."""
    from carve.evals.probes.needle import run_needles

    _quiet()
    lengths = _numbers("length", length, int)
    how: dict[str, Any] = {"samples": samples, "batch_size": batch_size, "haystack": haystack, "seed": seed}
    if not run_needles(checkpoint, _names(task), lengths, output, **how):
        print("stopped; the same command goes on with what is left", file=sys.stderr)
        raise typer.Exit(130)


@app.command("lm-eval")
def lm_eval(
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Option(help="The file of JSON lines to add results to.")],
    tasks: Annotated[
        str, typer.Option(help="Names of lm-evaluation-harness, separated by commas.")
    ] = "wikitext,lambada_openai,piqa,hellaswag,winogrande,arc_easy,arc_challenge,social_iqa,boolq,openbookqa",
    data: Annotated[
        list[str] | None, typer.Option(help=r"TASK=FILE, or a folder of files; repeat for more.  \[default: the Hub]")
    ] = None,
    length: Annotated[str, typer.Option(help="Tokens of context of RULER's tasks.")] = "1024,2048,4096",
    limit: Annotated[int | None, typer.Option(help="Only so many examples of each task.")] = None,
    batch_size: Annotated[int, typer.Option(help="Contexts, and continuations, read at once.")] = 16,
) -> None:
    """Standard benchmarks, as lm-evaluation-harness defines them. Run again, it goes on where it stopped."""
    from carve.evals.harness import run_harness

    _quiet()
    lengths = _numbers("length", length, int)
    if not run_harness(
        checkpoint, _names(tasks), output, data=data or [], lengths=lengths, limit=limit, batch_size=batch_size
    ):
        print("stopped; the same command goes on with what is left", file=sys.stderr)
        raise typer.Exit(130)


@app.command()
def compare(
    file: Annotated[Path, typer.Argument(help="The YAML file of a comparison; see docs/compare.md.")],
    text: Annotated[Path, typer.Option(help="The folder from which the paths of texts in the file start.")] = Path(),
    out: Annotated[
        Path | None, typer.Option(help=r"The folder of results and report.  \[default: runs/ and the file's name]")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop after so many, to go on at the next call.")] = None,
    report: Annotated[bool, typer.Option("--report", help="Only write the report again, from what is there.")] = False,
) -> None:
    """Train mixers alike, measure them, and report. Run again, it goes on; several processes share a folder's runs."""
    from carve.compare import compare as run

    _quiet()
    if not run(file, out or Path("runs", file.stem), text=text, minutes=minutes, report_only=report):
        raise typer.Exit(130)


@app.command()
def bench(
    batch: Annotated[int, typer.Option(help="B, sequences.")] = 1,
    length: Annotated[int, typer.Option(help="T, tokens of each.")] = 1024,
    heads: Annotated[int, typer.Option(help="H.")] = 4,
    key_dim: Annotated[int, typer.Option(help="K, of a head.")] = 64,
    value_dim: Annotated[int, typer.Option(help="V, of a head.")] = 64,
    chunk_size: Annotated[int, typer.Option(help="C, tokens whose gates see the same content.")] = 64,
    backend: Annotated[str, typer.Option(help="auto, cuda, triton or torch.")] = "auto",
    device: Annotated[str | None, typer.Option(help=r"Such as cpu or cuda.  \[default: cuda if there is one]")] = None,
    rounds: Annotated[int, typer.Option(help="Times each is run; figures are medians.")] = 5,
    json: Annotated[Path | None, typer.Option(help="Write the raw numbers to this file.")] = None,
) -> None:
    """Speed and memory of the op on this device, for every content, beside fla's operators where they are installed."""
    from carve.bench import report

    report(
        (batch, length, heads, key_dim, value_dim, chunk_size),
        backend=backend,
        device=device,
        rounds=rounds,
        json_path=json,
    )


def _names(text: str) -> list[str]:
    """The items of a comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(option: str, text: str, kind: type) -> list[Any]:
    """The numbers of a comma-separated list."""
    try:
        return [kind(number) for number in _names(text)]
    except ValueError:
        raise ValueError(f"--{option} is {text!r}, expected numbers separated by commas") from None


def _assignments(option: str, pairs: list[str]) -> dict[str, Any]:
    """NAME=VALUE as a mapping, the values read as YAML."""
    assigned = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--{option} is {pair!r}, expected NAME=VALUE")
        try:
            assigned[name] = read_yaml(value)
        except ValueError as error:
            raise ValueError(f"--{option} is {pair!r}, whose value is {error}") from error
    return assigned


def _text(prompt: str | None, file: Path | None) -> str:
    """The text of --prompt, --file or standard input."""
    if prompt is not None and file is not None:
        raise ValueError("give --prompt or --file, not both")
    if prompt is not None:
        return prompt
    if file is not None:
        from carve.text import read_text

        return read_text(file)
    if sys.stdin.isatty():
        raise ValueError("no text: give --prompt, --file, or text on standard input")
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8 text: byte {error.start}") from error


def _quiet() -> None:
    """Keep transformers' own progress bars off stderr."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _say(message: Warning | str, category: type[Warning], filename: str, *_: Any, **__: Any) -> None:
    """Print a warning as a sentence; Python would add a line of source. Of another package's, say whose it is."""
    ours = str(message).startswith("carve: ") or Path(filename).is_relative_to(Path(__file__).parent)
    print(message if ours else f"{filename}: {category.__name__}: {message}", file=sys.stderr)


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit code 2."""
    try:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _say
                app()
        except SystemExit:
            sys.stdout.flush()  # a closed pipe is noticed here, not when the interpreter ends, which would complain
            raise
    except BrokenPipeError:  # `carve eval ... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)  # as typer does where it is the first to notice
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"carve: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
