"""`carve eval`: perplexity of a checkpoint on files, with progress on stderr and a table at the end."""

import dataclasses
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from carve.evals.perplexity import Perplexity, perplexity
from carve.files import check_json, replace_text
from carve.models.checkpoint import find_checkpoint, load_checkpoint
from carve.text import read_documents


def evaluate_files(
    checkpoint: str | os.PathLike[str],
    paths: Sequence[str | os.PathLike[str]],
    *,
    window: int | None = None,
    stride: int | None = None,
    json_path: str | os.PathLike[str] | None = None,
) -> bool:
    """Score files with the model of a checkpoint folder; print a table, and write the raw numbers as JSON if asked.

    An interrupt (Ctrl-C) or an error ends the scoring; what was scored until then is printed and written all the same.

    Args:
        checkpoint: a checkpoint folder, or the folder of a training run.
        paths: text files, `.jsonl` or `.parquet`; see `read_documents`.
        window, stride: see `perplexity`.
        json_path: where to write `{"checkpoint", "window", "stride", "complete", "files": [...], "total": {...}}`;
            the checkpoint is the one that was scored, not its run's folder.

    Returns:
        whether it got to the end.

    Raises:
        OSError, ValueError, ImportError: as `load_checkpoint`, `read_documents` and `perplexity`; before any work
            where the reason is to be seen before, else behind what was scored.
    """
    for path in paths:
        read_documents(path)  # raises if it is not there
        if not Path(path).stat().st_size:
            raise ValueError(f"{os.fspath(path)} is empty: no text to score")
    if json_path is not None:
        check_json(json_path)
    folder = find_checkpoint(checkpoint)
    model, tokenizer = load_checkpoint(folder)

    results: dict[str, Perplexity] = {}
    ended: BaseException | None = None
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    ) as progress:
        try:
            for path in paths:
                # The bytes of the text are those of the file only in plain text: elsewhere the end is not known.
                plain = Path(path).suffix not in (".jsonl", ".parquet")
                total = Path(path).stat().st_size if plain else None
                task = progress.add_task(os.fspath(path), total=total or None, status="")

                def show(result: Perplexity, name: str = os.fspath(path), task: Any = task) -> None:
                    results[name] = result
                    status = f"{result.tokens:,} tokens, {result.bits_per_byte:.4f} bits/byte"
                    progress.update(task, completed=result.bytes, status=status)

                documents = read_documents(path)
                result = perplexity(model, tokenizer, documents, window=window, stride=stride, on_progress=show)
                progress.update(task, total=result.bytes)
        except (KeyboardInterrupt, Exception) as error:
            ended = error

    interrupted = isinstance(ended, KeyboardInterrupt)
    if results:
        _print_table(results, first_scored=tokenizer.bos_token_id is not None, window=window, stride=stride)
        if ended is not None:
            what = "interrupted" if interrupted else "failed"
            print(f"{what}: the numbers are those of the text scored until then", file=sys.stderr)
    elif interrupted:
        print("interrupted before anything was scored", file=sys.stderr)
    if results and json_path is not None:
        record: dict[str, Any] = {
            "checkpoint": str(folder),
            "window": window,
            "stride": stride,
            "complete": ended is None,
        }
        record["files"] = [{"path": name, **_numbers(result)} for name, result in results.items()]
        record["total"] = _numbers(sum(results.values(), Perplexity()))
        replace_text(json_path, json.dumps(record, indent=2) + "\n")
    if ended is not None and not interrupted:
        raise ended
    return not interrupted


def _numbers(result: Perplexity) -> dict[str, float | None]:
    derived = {"perplexity": result.perplexity, "bits_per_byte": result.bits_per_byte}
    numbers = dataclasses.asdict(result) | derived
    return {name: x if math.isfinite(x) else None for name, x in numbers.items()}  # JSON has no infinity


def _print_table(results: dict[str, Perplexity], *, first_scored: bool, window: int | None, stride: int | None) -> None:
    table = Table()
    table.add_column("file", overflow="fold")
    for name in ("documents", "tokens", "bytes", "perplexity", "bits/byte"):
        table.add_column(name, justify="right", no_wrap=True)
    rows = list(results.items())
    if len(rows) > 1:
        rows.append(("all", sum(results.values(), Perplexity())))
    for i, (name, x) in enumerate(rows):
        if name == "all" and i == len(rows) - 1:
            table.add_section()
        counts = [f"{x.documents:,}", f"{x.tokens:,}", f"{x.bytes:,}"]
        table.add_row(name, *counts, f"{x.perplexity:.4f}", f"{x.bits_per_byte:.4f}")
    console = Console()
    console.print(table)
    context = "all tokens before it in its document"
    if window is not None:
        context = f"at most {window} tokens before it (windows {stride or window} apart)"
    first = "given BOS" if first_scored else "not scored, for the tokenizer has no BOS"
    console.print(
        f"Each token scored once given {context}; the first of a document {first}.", highlight=False, soft_wrap=True
    )
