"""Resuming over the end of an epoch, with changed data, after a failure on a terminal, and with several processes."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import carve.train.trainer as trainer
from carve.train import TrainConfig, train
from carve.train.folder import save_config
from carve.train.tokenizer import byte_tokenizer

ROWS = 12  # 11 to train on, 2 at a time: an epoch is 3 steps of 4, 4 and 2 sequences

# Only process 0 is asked to stop, while the second step runs. Arguments: configuration, run folder.
ONE_IS_ASKED = """
import os, signal, sys
import carve.train.run as run
from carve.train import TrainConfig, train

class Ask(run.ShowProgress):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 1 and args.process_index == 0:
            os.kill(os.getpid(), signal.SIGINT)

run.ShowProgress = Ask
try:
    train(TrainConfig.load(sys.argv[1], {"out": sys.argv[2]}))
except run.Interrupted as interruption:
    print(interruption)
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text(("all that is gold does not glitter " * 20)[: 32 * ROWS - 1])
    TrainConfig(
        data=str(folder / "text.txt"), seq_len=32, batch_tokens=128, micro_batch=2, steps=7, warmup_steps=2,
        eval_every=0, save_every=1, log_every=1, keep=9, validation_share=0.08,
        model={"hidden_size": 16, "num_hidden_layers": 1, "num_heads": 1, "head_dim": 8, "intermediate_size": 16,
               "chunk_size": 8},
    ).save(folder / "config.yaml")  # fmt: skip
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def whole(config_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(TrainConfig.load(config_file, {"out": str(out)}))
    return out


def cut(whole, out, step):
    """The run as it was when `step` had been saved."""
    shutil.copytree(whole, out)
    for later in range(step + 1, 8):
        shutil.rmtree(out / f"checkpoint-{later}")
    return out


def test_tokens_are_counted_where_an_epoch_ends(whole):
    tokens = [json.loads(line)["tokens"] for line in (whole / "metrics.jsonl").open()]
    assert tokens[:7] == [32 * sequences for sequences in (4, 8, 10, 14, 18, 20, 24)]


@pytest.mark.parametrize(("micro_batch", "sizes"), [(4, {4}), (16, {11})])
def test_batches_are_of_one_size_and_not_padded(micro_batch, sizes, config_file, tmp_path, monkeypatch):
    seen, step = [], trainer.CarveTrainer.training_step

    def look(self, model, inputs, *rest):
        seen.append(inputs)
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(trainer.CarveTrainer, "training_step", look)
    fields = {"out": str(tmp_path / "run"), "micro_batch": micro_batch, "batch_tokens": 32 * micro_batch, "steps": 4}
    train(TrainConfig.load(config_file, fields))
    assert {len(inputs["input_ids"]) for inputs in seen} == sizes
    assert {frozenset(inputs) - {"position_ids"} for inputs in seen} == {frozenset(("input_ids", "labels"))}


@pytest.mark.parametrize("step", [2, 3, 5])  # within the first epoch, at its end, within the second
def test_resumed_in_any_epoch_gives_the_same_bits(step, whole, config_file, tmp_path):
    out = cut(whole, tmp_path / "run", step)
    last = train(TrainConfig.load(config_file, {"out": str(out)}), resume=True)
    expected = load_file(whole / "checkpoint-7" / "model.safetensors")
    for name, found in load_file(last / "model.safetensors").items():
        assert torch.equal(found, expected[name]), name
    lines, wanted = ([json.loads(line) for line in (x / "metrics.jsonl").open()] for x in (out, whole))
    for line in (*lines, *wanted):
        line.pop("tokens_per_second")
    assert lines == wanted


def test_changed_data_is_not_resumed(whole, config_file, tmp_path):
    out = cut(whole, tmp_path / "run", 2)
    text = tmp_path / "text.txt"
    text.write_text("not all those who wander are lost " * 20)
    config = TrainConfig.load(config_file, {"out": str(out), "data": str(text)})
    config.save(out / "config.yaml")  # as if the file itself had changed
    with pytest.raises(ValueError, match=r"data has changed"):
        train(config, resume=True)


CHECKPOINT = ("config.json", "model.safetensors", "trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth")


@pytest.mark.parametrize("damage", ["garbage", "cut"])
@pytest.mark.parametrize(
    "name",
    [
        *(f"checkpoint-6/{each}" for each in CHECKPOINT),
        "data.json",
        "data/*/about.json",
        "data/*/ids.bin",
        "data/*/s*.npy",
    ],
)
def test_a_damaged_file_is_named(name, damage, whole, config_file, tmp_path):
    (path,) = cut(whole, tmp_path / "run", 6).glob(name)
    path.write_bytes(b"garbage}\n" if damage == "garbage" else path.read_bytes()[: path.stat().st_size // 4 * 2])
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} is damaged .*: put it back, or ") as raised:
        train(TrainConfig.load(config_file, {"out": str(tmp_path / "run")}), resume=True)
    assert "\n" not in str(raised.value)


def test_a_line_of_the_metrics_that_is_none_is_named(whole, config_file, tmp_path):
    out = cut(whole, tmp_path / "run", 6)
    with (out / "metrics.jsonl").open("a") as file:
        file.write("garbage}\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged .*: put it back, or remove it"):
        train(TrainConfig.load(config_file, {"out": str(out)}), resume=True)


def test_a_checkpoint_that_lacks_a_file_is_not_resumed_without(whole, config_file, tmp_path):
    out = cut(whole, tmp_path / "run", 6)
    (out / "checkpoint-6" / "optimizer.pt").unlink()
    config = TrainConfig.load(config_file, {"out": str(out)})
    with pytest.raises(ValueError, match=r"checkpoint-6/optimizer\.pt is missing: .*remove .*/checkpoint-6 to go on"):
        train(config, resume=True)
    shutil.rmtree(out / "checkpoint-6")
    assert train(config, resume=True).name == "checkpoint-7"


def test_a_run_goes_on_with_texts_that_were_moved(whole, config_file, tmp_path):
    """And with defaults written down."""
    out, text = cut(whole, tmp_path / "run", 6), tmp_path / "text.txt"
    shutil.copy(TrainConfig.load(config_file).data, text)
    fields = {"out": str(out), "data": str(text), "cache": str(tmp_path / "cache"), "model": {"conv_size": 4}}
    assert train(TrainConfig.load(config_file, fields), resume=True).name == "checkpoint-7"
    assert TrainConfig.load(out / "config.yaml").data == str(text)


@pytest.mark.parametrize("validation", [None, "text.txt"])
def test_a_run_goes_on_from_any_working_directory(validation, config_file, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    shutil.copy(TrainConfig.load(config_file).data, tmp_path / "text.txt")
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    paths = {"data": "text.txt", "validation": validation, "tokenizer": "tokenizer", "out": "run", "cache": "cache"}
    monkeypatch.chdir(tmp_path)
    train(TrainConfig.load(config_file, paths))
    shutil.rmtree(tmp_path / "run" / "checkpoint-7")
    monkeypatch.chdir(tmp_path / "there")
    assert train(TrainConfig.load("../run/config.yaml", {"out": "../run"}), resume=True).name == "checkpoint-7"
    assert not list((tmp_path / "there").iterdir())


def test_what_lies_in_a_run_moves_with_it(config_file, tmp_path):
    out = tmp_path / "run"
    train(TrainConfig.load(config_file, {"out": str(out), "cache": str(out / "cache")}))
    shutil.rmtree(out / "checkpoint-7")
    out.rename(tmp_path / "moved")
    fields = {"out": str(tmp_path / "moved")}
    assert train(TrainConfig.load(tmp_path / "moved" / "config.yaml", fields), resume=True).name == "checkpoint-7"
    assert not out.exists()
    assert TrainConfig.load(tmp_path / "moved" / "config.yaml").cache == str(tmp_path / "moved" / "cache")


def test_names_stay_names(config_file, tmp_path, monkeypatch):
    """Also where there is a folder of that name."""
    (tmp_path / "bytes").mkdir()
    monkeypatch.chdir(tmp_path)
    config = TrainConfig.load(config_file, {"data": "hub:a/b", "tokenizer": "bytes", "out": "run"})
    for tokenizer in ("bytes", "some/name"):
        save_config(replace(config, tokenizer=tokenizer), tmp_path)
        saved = TrainConfig.load(tmp_path / "config.yaml")
        assert (saved.data, saved.tokenizer, saved.validation) == ("hub:a/b", tokenizer, None)


def test_tokens_do_where_the_text_is_gone(whole, config_file, tmp_path):
    out = cut(whole, tmp_path / "run", 6)
    (kept,) = (out / "data").iterdir()
    fields = {"out": str(out), "data": str(tmp_path / "gone.txt")}
    with pytest.raises(ValueError, match=r"data is '.*gone\.txt': no such .*: --data ") as raised:
        train(TrainConfig.load(config_file, fields), resume=True)
    assert str(raised.value).endswith(f"--data {kept}")
    assert train(TrainConfig.load(config_file, fields | {"data": str(kept)}), resume=True).name == "checkpoint-7"


def test_a_failure_gives_the_terminal_back(config_file, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    screen = io.StringIO()
    monkeypatch.setattr(trainer, "Console", lambda **_: Console(file=screen, force_terminal=True))
    monkeypatch.setattr(trainer.CarveTrainer, "_save_rng_state", full)
    with pytest.raises(OSError, match="No space left"):
        train(TrainConfig.load(config_file, {"out": str(tmp_path / "run")}))
    hidden, shown = screen.getvalue().count("\x1b[?25l"), screen.getvalue().count("\x1b[?25h")
    assert 0 < hidden <= shown


def test_what_a_kill_left_while_tokenising_goes(config_file, tmp_path):
    left = tmp_path / "run" / "data" / "abc.partial-1"
    left.mkdir(parents=True)
    train(TrainConfig.load(config_file, {"out": str(tmp_path / "run"), "steps": 3}))
    assert not left.exists()


def test_processes_stop_together(config_file, tmp_path):
    out = tmp_path / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    with subprocess.Popen(
        [*launch, sys.executable, "-c", ONE_IS_ASKED, config_file, out],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as launcher:  # fmt: skip
        try:
            printed, errors = launcher.communicate(timeout=120)
        finally:
            launcher.terminate()  # it ends the processes that it started
    assert launcher.returncode == 0, errors
    assert (out / "checkpoint-2" / "model.safetensors").exists()
    assert not (out / "checkpoint-3").exists()
    assert f"carve train --resume {out}" in printed
    assert len(list((out / "data").iterdir())) == 1
