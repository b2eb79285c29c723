import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from carve.text import CONTEXT, read_documents, tokenize_stream

WORDS = [
    "def",
    "read(path):",
    "x",
    "=",
    "1",
    "#",
    "naïve,",
    "“quoted”",
    "The",
    "quick",
    "12345",
    "dogs.",
    "äöü",
    "漢字",
]
GAPS = [" ", "  ", "\n", "\n\n", "\r\n", "\t", "🙂", "a" * 300]


@given(
    text=st.lists(st.sampled_from(WORDS + GAPS), max_size=200),
    block=st.integers(1, 400),
    piece=st.integers(1, 300),
)
@settings(max_examples=60, deadline=None)
def test_pieces_give_the_tokens_of_the_whole(
    tokenizer: PreTrainedTokenizerFast, text: list[str], block: int, piece: int
) -> None:
    whole = " ".join(text)
    blocks = [whole[i : i + block] for i in range(0, len(whole), block)]
    pieces = list(tokenize_stream(tokenizer, blocks, piece=piece))
    assert [i for ids, _ in pieces for i in ids] == tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert sum(size for _, size in pieces) == len(whole.encode())


def test_a_long_text_is_cut_into_pieces_of_bounded_length(tokenizer: PreTrainedTokenizerFast, corpus: str) -> None:
    pieces = list(tokenize_stream(tokenizer, [corpus], piece=200))
    assert max(size for _, size in pieces) <= 4 * (2 * 200 + CONTEXT)  # 4: bytes of the longest character
    assert len(pieces) > 10
    assert [i for ids, _ in pieces for i in ids] == tokenizer(corpus, add_special_tokens=False)["input_ids"]


def test_a_plain_file_is_one_document_read_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus: str
) -> None:
    monkeypatch.setattr("carve.text.BLOCK", 7)  # cuts inside characters
    (tmp_path / "a.txt").write_bytes(corpus.encode())
    (document,) = read_documents(tmp_path / "a.txt")
    blocks = list(document)
    assert "".join(blocks) == corpus
    assert max(map(len, blocks)) <= 7


def test_json_lines_and_parquet_hold_one_document_a_row(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = ["one\ntwo", "", "drei äöü", *map(str, range(200))]
    lines = "\n".join(json.dumps({"text": text, "n": 1}) for text in texts)
    (tmp_path / "a.jsonl").write_text(lines + "\n\n")
    pq.write_table(pa.table({"n": range(len(texts)), "text": texts}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert ["".join(document) for document in read_documents(tmp_path / name)] == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"x" * 100_000 + b"\xff", "a.txt is not UTF-8 text: byte 100000"),
        ("a.txt", b"cut short \xe2\x82", "byte 10"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": \n', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"txt": "no"}\n', "a.jsonl, line 1: expected an object with a string field 'text'"),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1"),
        ("a.parquet", b"not parquet", "a.parquet is not a parquet file"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        [list(document) for document in read_documents(tmp_path / name)]


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file: "):
        read_documents(tmp_path / "nowhere.txt")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        read_documents(tmp_path)
