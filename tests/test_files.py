from pathlib import Path

import pytest

from carve.files import replace_text, replacing


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
