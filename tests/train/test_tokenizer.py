import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from carve.train.tokenizer import byte_tokenizer, load_tokenizer, train_tokenizer

BYTES = byte_tokenizer()


@settings(deadline=None, derandomize=True)
@given(st.text())
def test_bytes_are_lossless_and_one_token_each(text):
    ids = BYTES(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert BYTES.decode(ids) == text


def test_a_text_that_spells_a_special_token_is_text():
    text = "<|endoftext|> is not the end"
    assert BYTES.eos_token_id not in BYTES(text)["input_ids"]
    assert BYTES.decode(BYTES(text)["input_ids"]) == text


def test_bytes_load_from_a_folder(tmp_path):
    BYTES.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == len(BYTES) == 258
    text = "tab\t, snow ☃, <|pad|>"
    assert loaded(text)["input_ids"] == BYTES(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    pad = loaded.pad_token_id
    assert loaded(["ab", "c"], padding=True)["input_ids"] == [BYTES("ab")["input_ids"], [pad, *BYTES("c")["input_ids"]]]


def test_a_trained_tokenizer(tmp_path):
    (tmp_path / "d.txt").write_text("the cat sat on the mat, the cat sat\n" * 20)
    out = train_tokenizer(str(tmp_path / "d.txt"), 280, tmp_path / "tokenizer")
    tokenizer = load_tokenizer(str(out))
    assert len(tokenizer) <= 280
    text = "the cat sät ☃"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("the cat sat")["input_ids"]) < len("the cat sat")
    with pytest.raises(ValueError, match="exists already"):
        train_tokenizer(str(tmp_path / "d.txt"), 280, out)


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="vocab_size is 100"):
        train_tokenizer("text", 100, tmp_path / "out")
    with pytest.raises(ValueError, match=r"vocab_size is 1000000.*at most 2\*\*24"):
        train_tokenizer("text", 10**30, tmp_path / "out")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"data is '.*empty\.txt', which holds no text"):
        train_tokenizer(str(tmp_path / "empty.txt"), 300, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="tokenizer is"):
        load_tokenizer(str(tmp_path / "none"))
