import json
import lzma
import os
import re
import signal
from pathlib import Path

import pytest

from carve import demo
from carve.models.checkpoint import load_checkpoint
from carve.train.run import Interrupted
from carve.train.trainer import Metrics

TINY = {
    "train_bytes": 40_000,
    "validation_bytes": 6_000,
    "sample_tokens": 60,
    "training": {
        "seq_len": 32,
        "batch_tokens": 64,
        "micro_batch": 2,
        "steps": 6,
        "warmup_steps": 1,
        "save_every": 3,
        "log_every": 1,
        "model": {"hidden_size": 16, "head_dim": 8, "v_head_dim": 8, "intermediate_size": 16},
    },
}


def test_the_demo_trains_measures_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bits = demo.run_demo(tmp_path / "demo", **TINY)
    out = capsys.readouterr().out
    assert all(f"{bits[name]:.3f}" in out for name in ("before", "after", "unigram", "xz"))
    assert bits["after"] < bits["before"]
    assert json.loads((tmp_path / "demo" / "results.json").read_text())["bits_per_byte"] == bits
    assert (tmp_path / "demo" / "sample.txt").read_text().startswith(demo.PROMPT)
    for picture in ("loss.png", "gates.png"):
        assert (tmp_path / "demo" / picture).read_bytes().startswith(b"\x89PNG")
    model, tokenizer = load_checkpoint(tmp_path / "demo" / "model")
    assert model.config.hidden_size == 16
    (inspected,) = re.findall(r"carve inspect .* --file (.*) --out", out)
    assert len(tokenizer(Path(inspected).read_text())["input_ids"]) > model.config.chunk_size  # or no content is heard
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo"]

    assert demo.run_demo(tmp_path / "demo", **TINY) == bits  # nothing left to train: it measures again


def test_an_interrupted_demo_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Metrics.on_log

    def interrupt(self: Metrics, args: object, state, control: object, logs: dict, **others: object) -> None:
        log(self, args, state, control, logs, **others)
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "on_log", interrupt)
        with pytest.raises(Interrupted):
            demo.run_demo(tmp_path / "demo", **TINY)
    assert demo.run_demo(tmp_path / "demo", **TINY) == demo.run_demo(tmp_path / "whole", **TINY)


def test_the_text_is_split_by_file_and_the_same_each_time(tmp_path: Path) -> None:
    train, validation, texts = demo.write_data(tmp_path, 40_000, 6_000)
    records = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in (train, validation)}
    assert [record["text"] for record in records["validation"]] == texts
    paths = [record["path"] for part in records.values() for record in part]
    assert len(set(paths)) == len(paths)
    assert 6_000 <= sum(len(text.encode()) for text in texts) < 7_500
    assert all(len(text.encode()) <= 1_500 for text in texts)
    assert sum(len(record["text"].encode()) for record in records["train"]) >= 40_000
    before = train.stat().st_mtime_ns
    assert demo.write_data(tmp_path, 40_000, 6_000) == (train, validation, texts)
    assert train.stat().st_mtime_ns == before


def test_tests_packages_and_what_is_not_utf8_are_left_out(tmp_path: Path) -> None:
    for name in ("a.py", "b.txt", "empty.py", "pkg/c.py", "test/d.py", "site-packages/e.py", "pkg/__pycache__/f.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("" if "empty" in name else f"# {name}\r\n", newline="")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    assert dict(demo.standard_library(tmp_path)) == {"a.py": "# a.py\r\n", "pkg/c.py": "# pkg/c.py\r\n"}
    with pytest.raises(FileNotFoundError, match="no Python source files"):
        demo.standard_library(tmp_path / "nowhere")


def test_the_measures_to_compare_with() -> None:
    assert demo.unigram_bits(["abab", "cdcd"]) == pytest.approx(2)
    assert demo.unigram_bits(["aaab"]) == pytest.approx(0.811278, rel=1e-5)
    texts = ["def f():\n" * 100, "return 1\n" * 100]
    assert demo.xz_bits(texts) == pytest.approx(8 * len(lzma.compress("".join(texts).encode(), preset=9)) / 1800)
