"""The `carve` command: parsing only; every command calls one function of the package."""

import dataclasses
import os
import signal
import sys
from collections.abc import Callable
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from huggingface_hub.errors import StrictDataclassError

from carve.train.config import PRESETS, TrainConfig

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
    stride: Annotated[int | None, typer.Option(help="Tokens from one window to the next.  [default: window]")] = None,
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
    file: Annotated[Path | None, typer.Option(help="Run the text of this file, a few thousand tokens at most.")] = None,
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
        # Escaped: rich takes a bare [...] for markup.
        default = "" if each.default in (dataclasses.MISSING, None) else rf"  \[default: {each.default}]"
        kind = list[str] if each.name == "model" else each.type
        options[each.name] = Annotated[kind | None, typer.Option(help=each.metadata["help"] + default)]  # type: ignore[operator]
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
        if not (resume / "config.yaml").is_file():
            raise ValueError(f"--resume is {resume}, which holds no config.yaml: expected the folder of a training run")
        config, overrides = str(resume / "config.yaml"), overrides | {"out": str(resume)}
    try:
        print(run(TrainConfig.load(config, overrides), resume=resume is not None))
    except Interrupted as interruption:
        print(interruption, file=sys.stderr)
        raise typer.Exit(128 + interruption.signal) from None
    except KeyboardInterrupt:
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


def _assignments(option: str, pairs: list[str]) -> dict[str, Any]:
    """NAME=VALUE as a mapping, the values read as YAML."""
    assigned = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--{option} is {pair!r}, expected NAME=VALUE")
        assigned[name] = yaml.safe_load(value)
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


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit code 2."""
    try:
        app()
    except BrokenPipeError:  # `carve generate ... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (ValueError, OSError, ImportError, StrictDataclassError) as error:
        print(f"carve: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
