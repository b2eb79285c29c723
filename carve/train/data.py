"""Text to training sequences: read, tokenise once, keep on disk, pack, with the documents apart.

On disk lie the tokens of all documents one behind the other, each document begun by the tokenizer's BOS token, where
it has one, and ended by the end-of-text token; and where documents start. Such a folder can itself be given as data,
without the text. Sequence i is tokens i L to (i + 1) L. A document that goes on into the next sequence starts afresh
there: no memory is carried over.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from carve.files import reading
from carve.text import read_documents, tokenize_stream

HUB = "hub:"
ABOUT = "about.json"
REMEDY = "put it back, or remove its folder and give the text, to tokenise it again"


def find_files(data: str, name: str = "data") -> list[Path]:
    """The files of a path, sorted: itself, or all below a folder but hidden ones.

    Args:
        name: of the text, for errors; here and in what follows.

    Raises:
        ValueError: there is no such path, or no file in it.
    """
    if not data:
        raise ValueError(f"{name} is empty, expected a file, a folder or {HUB}NAME")
    root = Path(data)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise ValueError(f"{name} is {data!r}: no such file or folder (a data set of the Hub is {HUB}NAME)")
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    if not files:
        raise ValueError(f"{name} is {data!r}, an empty folder: expected text files")
    return files


def check_apart(what: str, folder: Path, name: str, text: str) -> None:
    """Raise ValueError where a folder that is written to, `what` by name, lies within a text."""
    if folder.resolve().is_relative_to(Path(text).resolve()):
        raise ValueError(f"{what} is {folder}, within {name} = {text!r}: expected a folder that is not read as text")


def read_texts(data: str, name: str = "data") -> Iterator[Iterable[str]]:
    """The documents of a file, a folder or a Hub data set, each in blocks of text.

    Raises:
        ValueError: nothing there, or a file that is not UTF-8 (named, with the byte).
    """
    if data.startswith(HUB):
        yield from _read_hub(data, name)
    else:
        for path in find_files(data, name):
            yield from read_documents(path)


def _read_hub(data: str, name: str) -> Iterator[Iterable[str]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError("reading a data set of the Hub needs: pip install 'carve-attention[train]'") from error
    repository, _, config = data.removeprefix(HUB).partition(":")
    try:
        rows = load_dataset(repository, config or None, split="train", streaming=True)
    except Exception as error:  # of many kinds, from the network up
        raise ValueError(f"{name} is {data!r}, which does not load: {' '.join(str(error).split())}") from error
    for row in rows:
        if not isinstance(row.get("text"), str):
            raise ValueError(f"{name} is {data!r}, with columns {sorted(row)}: expected a column 'text' of strings")
        yield (row["text"],)


@dataclass(frozen=True)
class Tokens:
    """A tokenised text on disk.

    Attributes:
        ids: `[tokens]`, uint16 or uint32, memory-mapped.
        starts: `[documents]`, int64: where each document starts.
        bytes: of UTF-8 text, the tokens that begin and end documents not counted.
        fingerprint: of the text and the tokenizer.
    """

    ids: np.ndarray
    starts: np.ndarray
    bytes: int
    fingerprint: str


def tokenise(
    data: str, tokenizer: PreTrainedTokenizerBase, cache: str | os.PathLike[str], name: str = "data"
) -> Tokens:
    """Tokenise once: the next call with the same text and tokenizer finds it in `cache`.

    Args:
        data: the text; or a folder that an earlier call left in its cache, which is taken as it is.

    Raises:
        ValueError: there is no text, it is not UTF-8, it was tokenised by another tokenizer, or a file that an earlier
            call left is damaged.
    """
    known = fingerprint(data, tokenizer, name)
    folder = Path(data) if is_tokens(data) else Path(cache) / known
    if not folder.exists():
        _write_tokens(data, tokenizer, folder, name)
    about = read_about(folder)
    with reading(folder / "starts.npy", REMEDY):
        starts = np.load(folder / "starts.npy")
    with reading(folder / "ids.bin", REMEDY):
        ids = np.memmap(folder / "ids.bin", dtype=about["dtype"], mode="r")
        if len(ids) <= starts[-1] or ids[-1] != tokenizer.eos_token_id:
            raise ValueError("it ends within a document")
    return Tokens(ids, starts, about["bytes"], known)


def is_tokens(data: str) -> bool:
    """Whether the data is a folder of tokens."""
    return all((Path(data) / name).is_file() for name in (ABOUT, "ids.bin", "starts.npy"))


def read_about(folder: str | Path) -> dict[str, Any]:
    """What is known of a folder of tokens."""
    path = Path(folder) / ABOUT
    with reading(path, REMEDY):
        about = json.loads(path.read_text(encoding="utf-8"))
        if not {"dtype", "bytes", "fingerprint"} <= set(about):
            raise ValueError("it lacks fields")
    return about


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the tokens and their ids."""
    tokens = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(repr((tokens, *marks(tokenizer))).encode()).hexdigest()[:24]


def marks(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end and, where there is one, begin a document."""
    return [tokenizer.eos_token_id, *([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id])]


def fingerprint(data: str, tokenizer: PreTrainedTokenizerBase, name: str = "data") -> str:
    """Of the text's names and content, and of the tokenizer. A Hub data set goes by its name.

    Raises:
        ValueError: no such data, or a folder of tokens of another tokenizer.
    """
    if is_tokens(data):
        about = read_about(data)
        if about.get("vocabulary") != vocabulary(tokenizer):
            raise ValueError(f"{name} is {data!r}, tokens of another tokenizer: expected those of this one")
        return about["fingerprint"]
    digest = hashlib.sha256()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    digest.update((backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))).encode())
    digest.update(" ".join(map(str, marks(tokenizer))).encode())
    if data.startswith(HUB):
        digest.update(data.encode())
    else:
        for path in find_files(data, name):
            digest.update(f"\0{path.name}\0".encode())
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()[:24]


def remove_partial(cache: Path) -> None:
    """Remove what a process that was killed while it tokenised left in a cache, in which no other tokenises now."""
    for left in cache.glob("*.partial-*"):
        shutil.rmtree(left)


def _write_tokens(data: str, tokenizer: PreTrainedTokenizerBase, folder: Path, name: str) -> None:
    """Write into a folder of another name, and rename it when all is there."""
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
    partial = folder.with_name(f"{folder.name}.partial-{uuid.uuid4().hex}")
    partial.mkdir(parents=True)
    end, *begin = marks(tokenizer)
    starts, position, size = [], 0, 0
    try:
        with show_size("tokenise") as progress, (partial / "ids.bin").open("wb") as file:
            task = progress.add_task("", total=None, size=0.0)
            for document in read_texts(data, name):
                start = position
                for ids, length in tokenize_stream(tokenizer, document):
                    ids = [*begin, *ids] if ids and position == start else ids
                    file.write(np.asarray(ids, dtype=dtype).tobytes())
                    position, size = position + len(ids), size + length
                    progress.update(task, size=size / 1e6)
                if position == start:
                    continue  # an empty document
                file.write(np.asarray([end], dtype=dtype).tobytes())
                starts.append(start)
                position += 1
            file.flush()
            os.fsync(file.fileno())
        if not starts:
            raise ValueError(f"{name} is {data!r}, which holds no text")
        np.save(partial / "starts.npy", np.asarray(starts, dtype=np.int64))
        about = {"dtype": dtype.name, "bytes": size, "fingerprint": folder.name, "vocabulary": vocabulary(tokenizer)}
        (partial / ABOUT).write_text(json.dumps(about), encoding="utf-8")
        os.replace(partial, folder)
    except OSError:
        if not folder.exists():  # else another process was faster
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def show_size(doing: str) -> Progress:
    """A bar for text of which no one knows how much there is, a task's `size` in MB; none without a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn(f"{doing} {{task.fields[size]:.1f}} MB"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


class PackedDataset(Dataset):
    """Sequences of `seq_len` tokens, packed without padding.

    An item is a dict of `[seq_len]` int64 tensors: `input_ids`; `position_ids`, which restart at each document;
    `labels`, the tokens again, with -100 for the first of each document, which nothing predicts.

    Args:
        tokens: the text.
        seq_len: L.
        rows: which sequences, of all `len(tokens.ids) // seq_len`; what is left at the end is not used.
    """

    def __init__(self, tokens: Tokens, seq_len: int, rows: range) -> None:
        self.tokens, self.seq_len, self.rows = tokens, seq_len, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        begin = self.rows[index] * self.seq_len
        ids = torch.from_numpy(self.tokens.ids[begin : begin + self.seq_len].astype(np.int64))
        low, high = np.searchsorted(self.tokens.starts, [begin, begin + self.seq_len])
        starts = torch.zeros(self.seq_len, dtype=torch.int64)
        first = torch.from_numpy(self.tokens.starts[low:high] - begin)
        starts[first] = first
        labels = ids.clone()
        labels[first] = -100
        return {
            "input_ids": ids,
            "position_ids": torch.arange(self.seq_len) - starts.cummax(0).values,
            "labels": labels,
        }


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Items of `PackedDataset` as a batch, `[B, seq_len]` each.

    Without `position_ids` if no document begins inside a row: on a GPU a model would have to wait to find that out.
    """
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    if (batch["position_ids"][:, -1] == batch["position_ids"].shape[1] - 1).all():
        del batch["position_ids"]
    return batch


def split_rows(
    tokens: Tokens, seq_len: int, validation_share: float, name: str = "data"
) -> tuple[PackedDataset, PackedDataset]:
    """The sequences for training and, of the last share of the text, for validation.

    Args:
        name: of the text, for the error.

    Raises:
        ValueError: the text is too short for a sequence of each.
    """
    total = len(tokens.ids) // seq_len
    held_out = max(1, round(total * validation_share)) if validation_share else 0
    if total - held_out < 1:
        both = " to train and validate on" if held_out else ""
        raise ValueError(f"{name} has {len(tokens.ids)} tokens: too few for sequences of seq_len = {seq_len}{both}")
    rows = range(total)
    return (
        PackedDataset(tokens, seq_len, rows[: total - held_out]),
        PackedDataset(tokens, seq_len, rows[total - held_out :]),
    )
