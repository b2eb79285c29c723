"""Tokenizers: bytes built in, one of Hugging Face's, or one trained on the data."""

import os
import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from carve.train.data import read_texts, show_size

END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """One token a byte of UTF-8, 256 in all, and two special ones. Saves and loads as any Hugging Face tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _wrap(tokenizer)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer `"bytes"`, or that of a folder or of a name on the Hub.

    Raises:
        ValueError: there is none of that name, or it has no end-of-text token, which documents end with.
    """
    if name == "bytes":
        return byte_tokenizer()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer is {name!r}, which is neither 'bytes' nor one that loads: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {name!r} has no end-of-text token, expected one to end documents with")
    return tokenizer


def train_tokenizer(data: str, vocab_size: int, out: str | os.PathLike[str]) -> Path:
    """Train a byte-level BPE tokenizer on text, lossless for any text.

    Args:
        data: a file, a folder or `hub:NAME`, as in `TrainConfig`.
        vocab_size: tokens, the 256 bytes and 2 special ones included.
        out: the folder to write; it must not exist.

    Raises:
        ValueError: vocab_size is out of range, out exists, or the data is not text, or empty.
    """
    if not 258 <= vocab_size <= 1 << 24:  # the trainer makes room for all of them
        raise ValueError(
            f"vocab_size is {vocab_size}, expected at least 258, the bytes and 2 special tokens, and at most 2**24"
        )
    out = Path(out)
    if out.exists():
        raise ValueError(f"out is {out}, which exists already: expected a new folder")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,  # its own is on stdout
    )
    size = 0

    def blocks() -> Iterator[str]:
        nonlocal size
        for block in chain.from_iterable(read_texts(data)):
            size += len(block.encode())
            progress.update(task, size=size / 1e6)
            yield block

    with show_size("train on") as progress:
        task = progress.add_task("", total=None, size=0.0)
        tokenizer.train_from_iterator(blocks(), trainer)
    if not size:
        raise ValueError(f"data is {data!r}, which holds no text")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    _wrap(tokenizer).save_pretrained(partial)
    os.replace(partial, out)
    return out


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in (END_OF_TEXT, PAD)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        padding_side="left",  # so that generate() goes on where the text ends
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,  # a text that spells a special token is still only text
    )
