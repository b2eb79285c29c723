import json
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
from safetensors import safe_open

from carve.files import check_json, reading, replace_text, replacing


def fail(path: Path) -> None:
    with replacing(path) as partial:
        partial.write_text("half")
        raise RuntimeError("on the way")


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "a.txt"
    replace_text(path, "one\r\ntwo\n")
    assert path.read_bytes() == b"one\r\ntwo\n"
    with pytest.raises(RuntimeError, match="on the way"):
        fail(path)
    assert path.read_bytes() == b"one\r\ntwo\n"
    replace_text(path, "three")
    assert path.read_text() == "three"
    assert list(path.parent.iterdir()) == [path]


def test_a_file_of_json_replaces_nothing_else(tmp_path: Path) -> None:
    check_json(tmp_path / "new.json")
    (tmp_path / "old.json").write_text('{"total": 1}')
    check_json(tmp_path / "old.json")
    (tmp_path / "text.txt").write_text("a text that somebody needs")
    for name in ("text.txt", "."):
        with pytest.raises(ValueError, match="is no file of JSON: expected a new file, or an earlier result"):
            check_json(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        check_json(tmp_path / "nowhere" / "new.json")


@pytest.mark.parametrize("read", [json.load, ZipFile, np.load, safe_open])
def test_a_damaged_file_is_named(read, tmp_path: Path) -> None:
    path = tmp_path / "damaged"
    path.write_bytes(b"\x93NUMPY garbage")
    with pytest.raises(ValueError, match=r"damaged is damaged \(.+\): put it back"), reading(path, "put it back"):
        read(path.open("rb") if read is json.load else path, *(["pt"] if read is safe_open else []))
