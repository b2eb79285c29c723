"""Text of any length as a stream: files -> documents -> blocks of text -> tokens, in constant memory."""

import codecs
import json
import os
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

BLOCK = 1 << 16
"""Bytes read from a file at once, and the characters (about) that are tokenised at once."""

CONTEXT = 256
"""Characters on either side of a cut that decide whether it is safe; a token is never nearly so long."""


# -- files -> documents ------------------------------------------------------------------------------


def read_documents(path: str | os.PathLike[str]) -> Iterator[Iterator[str]]:
    """The documents of a file, each as an iterator over its text in blocks.

    `.jsonl` has one document a line and `.parquet` one a row, both in a field named `text`; any other file is one
    document of plain UTF-8 text. A plain file and a parquet file are never held in memory as a whole.

    Raises:
        OSError: the file cannot be read.
        ValueError: not UTF-8, not JSON lines, or no text field. The message names the file and the place.
        ImportError: a parquet file, and pyarrow is not installed.
    """
    path = _existing(path)
    if path.suffix == ".jsonl":
        return ((text for text in (document,)) for document in _json_lines(path))
    if path.suffix == ".parquet":
        return ((text for text in (document,)) for document in _parquet_rows(path))
    return iter([_text_blocks(path)])


def read_text(path: str | os.PathLike[str]) -> str:
    """The whole of a plain UTF-8 text file, byte for byte; errors as in `read_documents`."""
    return "".join(_text_blocks(_existing(path)))


def _existing(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, expected a file")
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    return path


def _text_blocks(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        offset = 0
        while True:
            block = file.read(BLOCK)
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is not UTF-8 text: byte {offset - pending + error.start}") from error
            offset += len(block)
            if text:
                yield text
            if not block:
                return


def _json_lines(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:  # covers bytes that are not UTF-8
                raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise ValueError(f"{path}, line {number}: expected an object with a string field 'text'")
            yield record["text"]


def _parquet_rows(path: Path) -> Iterator[str]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError("reading parquet needs pyarrow: pip install 'carve-attention[eval]'") from error
    try:
        with pq.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise ValueError(f"{path}: no column 'text' among {file.schema_arrow.names}")
            for batch in file.iter_batches(batch_size=64, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    if not isinstance(text, str):
                        raise ValueError(f"{path}: column 'text' holds {type(text).__name__}, expected strings")
                    yield text
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a parquet file: {error}") from error


# -- blocks of text -> tokens ------------------------------------------------------------------------


def tokenize_stream(
    tokenizer: PreTrainedTokenizerBase, blocks: Iterable[str], *, piece: int = BLOCK
) -> Iterator[tuple[list[int], int]]:
    """Tokenise a text that does not fit in memory: pieces of `(token ids, bytes of UTF-8 text they stand for)`.

    The ids joined are those of the whole text tokenised at once, without special tokens. The text is cut only where
    the tokenizer itself shows a cut to be safe: where the 256 characters before it and the 256 after it, tokenised
    together, begin with the tokens of those before it alone. The ends of lines are tried first, then words, then
    any character; where none is safe the piece grows. Each piece is tokenised behind the 256 characters before it,
    whose tokens are then taken off: a tokenizer that treats the start of a text in its own way (SentencePiece's
    leading space) sees no start there.

    Args:
        blocks: the text, in order, in blocks of any lengths.
        piece: characters tokenised at once, about.
    """
    before, text = "", ""
    for part in (block[i : i + piece] for block in blocks for i in range(0, len(block), piece)):
        text += part
        while len(text) >= piece + CONTEXT:
            cut = _safe_cut(tokenizer, before, text)
            if cut is None:
                break
            yield _encode_after(tokenizer, before, text[:cut]), len(text[:cut].encode())
            before, text = (before + text[:cut])[-CONTEXT:], text[cut:]
    if text:
        yield _encode_after(tokenizer, before, text), len(text.encode())


def _safe_cut(tokenizer: PreTrainedTokenizerBase, before: str, text: str) -> int | None:
    end = len(text) - CONTEXT
    positions = range(end, max(0, end - BLOCK // 4), -1)
    lines = (i for i in positions if text[i - 1] == "\n")
    words = (i for i in positions if text[i].isspace() and not text[i - 1].isspace())
    for cut in chain(islice(lines, 64), islice(words, 64), islice(positions, 64)):
        left = (before + text[:cut])[-CONTEXT:]
        alone = _encode(tokenizer, left)
        if _encode(tokenizer, left + text[cut : cut + CONTEXT])[: len(alone)] == alone:
            return cut
    return None


def _encode_after(tokenizer: PreTrainedTokenizerBase, before: str, text: str) -> list[int]:
    skipped = _encode(tokenizer, before)
    ids = _encode(tokenizer, before + text)
    if ids[: len(skipped)] != skipped:
        raise ValueError(f"the tokenizer cannot work in pieces: its tokens depend on text more than {CONTEXT} later")
    return ids[len(skipped) :]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose=False: a text longer than the tokenizer's `model_max_length` is no mistake here.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
