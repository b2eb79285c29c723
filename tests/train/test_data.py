import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset

from carve.train.data import PackedDataset, collate, find_files, read_texts, split_rows, tokenise
from carve.train.tokenizer import byte_tokenizer

TEXTS = ["first document", "the second, ünïcode ☃", "x"]


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "texts"
    (root / "below").mkdir(parents=True)
    (root / "a.txt").write_text(TEXTS[0], encoding="utf-8")
    (root / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[1:]), encoding="utf-8")
    (root / "below" / "c.txt").write_text("", encoding="utf-8")
    (root / ".hidden").write_bytes(b"\xff")
    return root


def documents(data):
    return ["".join(blocks) for blocks in read_texts(str(data))]


def test_a_folder_has_its_files_in_order(folder):
    assert documents(folder) == [*TEXTS, ""]


def test_parquet(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "d.parquet")
    assert documents(tmp_path / "d.parquet") == TEXTS


def test_hub_data_sets_go_through_datasets(tmp_path):
    (tmp_path / "set").mkdir()
    Dataset.from_dict({"text": TEXTS}).to_parquet(tmp_path / "set" / "train.parquet")
    assert documents(f"hub:{tmp_path / 'set'}") == TEXTS


def test_a_hub_data_set_that_does_not_load_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"data is 'hub:.*nothing'"):
        documents(f"hub:{tmp_path / 'nothing'}")


def test_tokens_on_disk_are_the_documents_each_ended(folder, tmp_path):
    tokenizer = byte_tokenizer()
    tokens = tokenise(str(folder), tokenizer, tmp_path / "cache")
    assert tokens.ids.dtype == np.uint16
    assert isinstance(tokens.ids, np.memmap)
    assert tokens.bytes == sum(len(text.encode()) for text in TEXTS)
    ends = [*tokens.starts[1:], len(tokens.ids)]
    found = [tokens.ids[a:b] for a, b in zip(tokens.starts, ends, strict=True)]
    assert [tokenizer.decode(ids[:-1]) for ids in found] == TEXTS  # the empty document is left out
    assert all(ids[-1] == tokenizer.eos_token_id for ids in found)


def test_documents_begin_with_bos_where_there_is_one(folder, tmp_path):
    plain, tokenizer = byte_tokenizer(), byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    before, tokens = (tokenise(str(folder), each, tmp_path / "cache") for each in (plain, tokenizer))
    assert before.fingerprint != tokens.fingerprint
    ends = [*tokens.starts[1:], len(tokens.ids)]
    found = [tokens.ids[a:b].tolist() for a, b in zip(tokens.starts, ends, strict=True)]
    assert [tokenizer.decode(ids[1:-1]) for ids in found] == TEXTS
    assert {(ids[0], ids[-1]) for ids in found} == {(tokenizer.bos_token_id, tokenizer.eos_token_id)}
    assert tokens.bytes == before.bytes
    same = byte_tokenizer()  # BOS is of the tokenizer's own tokens: only that it begins documents is new
    same.bos_token = same.eos_token
    with pytest.raises(ValueError, match="tokens of another tokenizer"):
        tokenise(str(tmp_path / "cache" / before.fingerprint), same, tmp_path / "unused")


def test_tokenised_once_and_again_when_the_text_changes(folder, tmp_path, monkeypatch):
    tokenise(str(folder), byte_tokenizer(), tmp_path / "cache")
    monkeypatch.setattr("carve.train.data._write_tokens", lambda *_: pytest.fail("tokenised twice"))
    tokenise(str(folder), byte_tokenizer(), tmp_path / "cache")
    monkeypatch.undo()
    (folder / "a.txt").write_text("another")
    assert tokenise(str(folder), byte_tokenizer(), tmp_path / "cache").bytes != sum(len(t.encode()) for t in TEXTS)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_tokens_need_no_text(folder, tmp_path):
    before = tokenise(str(folder), byte_tokenizer(), tmp_path / "cache")
    left = tmp_path / "cache" / before.fingerprint
    after = tokenise(str(left.rename(tmp_path / "tokens")), byte_tokenizer(), tmp_path / "unused")
    assert np.array_equal(after.ids, before.ids)
    assert np.array_equal(after.starts, before.starts)
    assert (after.bytes, after.fingerprint) == (before.bytes, before.fingerprint)
    assert not (tmp_path / "unused").exists()
    other = byte_tokenizer()
    other.add_tokens(["another"])
    with pytest.raises(ValueError, match=r"data is '.*tokens', tokens of another tokenizer"):
        tokenise(str(tmp_path / "tokens"), other, tmp_path / "unused")


def test_nothing_half_written_stays(folder, tmp_path, monkeypatch):
    (folder / "z.txt").write_bytes(b"good until \xff here")
    with pytest.raises(ValueError, match=r"z\.txt.*not UTF-8.*11"):
        tokenise(str(folder), byte_tokenizer(), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_full_disk_leaves_nothing(folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("carve.train.data.np.save", full)
    with pytest.raises(OSError, match="No space left"):
        tokenise(str(folder), byte_tokenizer(), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_empty_or_missing_data(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="an empty folder"):
        find_files(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="no such file or folder"):
        find_files(str(tmp_path / "missing"))
    (tmp_path / "blank.txt").write_text("")
    with pytest.raises(ValueError, match="holds no text"):
        tokenise(str(tmp_path / "blank.txt"), byte_tokenizer(), tmp_path / "cache")


def test_packing_keeps_documents_apart(folder, tmp_path):
    tokens = tokenise(str(folder), byte_tokenizer(), tmp_path / "cache")
    rows = PackedDataset(tokens, 10, range(len(tokens.ids) // 10))
    items = [rows[i] for i in range(len(rows))]
    ids = torch.cat([item["input_ids"] for item in items])
    assert ids.tolist() == tokens.ids[: len(ids)].tolist()
    starts = {start for start in tokens.starts.tolist() if start < len(ids)}
    for i in range(len(ids)):
        position, label = (items[i // 10][name][i % 10].item() for name in ("position_ids", "labels"))
        begin = max(start for start in starts | {i // 10 * 10} if start <= i)
        assert position == i - begin
        assert label == (-100 if i in starts else ids[i].item())


def test_a_batch_has_positions_only_where_a_document_begins_inside_a_row(folder, tmp_path):
    tokens = tokenise(str(folder), byte_tokenizer(), tmp_path / "cache")
    rows = PackedDataset(tokens, 4, range(len(tokens.ids) // 4))
    inside = [any(4 * i < start < 4 * i + 4 for start in tokens.starts) for i in range(len(rows))]
    found = set()
    for i in range(len(rows) - 1):
        batch = collate([rows[i], rows[i + 1]])
        found.add("position_ids" in batch)
        assert ("position_ids" in batch) == (inside[i] or inside[i + 1])
        for name, x in batch.items():
            assert torch.equal(x[1], rows[i + 1][name])
    assert found == {False, True}


def test_split_holds_out_the_last_share(tmp_path):
    (tmp_path / "d.txt").write_text("abcdefghij" * 10)
    tokens = tokenise(str(tmp_path / "d.txt"), byte_tokenizer(), tmp_path / "cache")
    training, validation = split_rows(tokens, 10, 0.2)
    assert (len(training), len(validation)) == (8, 2)
    assert validation.rows[0] == 8
    with pytest.raises(ValueError, match=r"too few for sequences of seq_len = 101"):
        split_rows(tokens, 101, 0.2)
