"""Whole runs of a tiny model: what they write, and that no interruption changes the outcome."""

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from functools import wraps
from pathlib import Path

import pytest
import torch
from rich.progress import Progress
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForCausalLM, AutoTokenizer

from carve.models import CarveConfig, CarveForCausalLM
from carve.train import TrainConfig, train
from carve.train.folder import alone
from carve.train.run import Interrupted, check_content, compile_blocks, expectation
from carve.train.trainer import CarveTrainer, ShowProgress

FIELDS = {
    "seq_len": 32,
    "batch_tokens": 128,
    "micro_batch": 2,
    "steps": 6,
    "warmup_steps": 2,
    "eval_every": 4,
    "save_every": 2,
    "log_every": 2,
    "keep": 3,
    "learning_rate": 3e-3,
    "content_lr": 2.0,
    "validation_share": 0.05,
    "model": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_heads": 1,
        "head_dim": 8,
        "intermediate_size": 16,
        "chunk_size": 8,
        "content": "read",
    },
}

# Kills itself at a moment of a run, as a power cut would. Arguments: run folder, text, moment, whether to resume.
VICTIM = """
import os, signal, sys
import carve.train.run as run
import carve.train.trainer as trainer
from carve.train import TrainConfig, train

out, data, moment, resume = sys.argv[1:]
die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
if moment == "between":
    class Die(run.ShowProgress):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 3:
                die()
    run.ShowProgress = Die
elif moment == "writing":
    save = run.CarveTrainer._save_scaler
    run.CarveTrainer._save_scaler = lambda self, path: die() if path.endswith("-4") else save(self, path)
elif moment == "publishing":
    publish = trainer.publish
    trainer.publish = lambda partial, final: die() if final.name == "checkpoint-4" else publish(partial, final)
elif moment in ("SIGINT", "SIGTERM"):
    class Ask(run.ShowProgress):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 2:
                os.kill(os.getpid(), getattr(signal, moment))
    run.ShowProgress = Ask
try:
    train(TrainConfig.load(data, {"out": out}), resume=resume == "resume")
except run.Interrupted as interruption:
    print(interruption)
    sys.exit(128 + interruption.signal)
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    TrainConfig(data=str(folder / "text.txt"), **FIELDS).save(folder / "config.yaml")
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def whole(config_file, tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert train(TrainConfig.load(config_file, {"out": str(out)})) == out / "checkpoint-6"
    return out


def weights(checkpoint):
    return load_file(checkpoint / "model.safetensors")


def assert_same_run(out, whole):
    for step in (4, 6):
        expected = weights(whole / f"checkpoint-{step}")
        for name, found in weights(out / f"checkpoint-{step}").items():
            assert torch.equal(found, expected[name]), (step, name)
    lines, expected = ([json.loads(line) for line in (x / "metrics.jsonl").open()] for x in (out, whole))
    for line in (*lines, *expected):
        line.pop("tokens_per_second", None)
    assert lines == expected


def test_what_a_run_writes(whole):
    assert sorted(path.name for path in whole.iterdir()) == [
        "checkpoint-2", "checkpoint-4", "checkpoint-6",
        "config.yaml", "data", "data.json", "lock", "metrics.jsonl", "tensorboard",
    ]  # fmt: skip
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").open()]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6]
    assert [line["step"] for line in lines if "eval_bits_per_byte" in line] == [4, 6]
    assert set(lines[0]) == {"step", "tokens", "loss", "learning_rate", "grad_norm", "tokens_per_second"}
    assert lines[0]["tokens"] == 256
    assert lines[-2]["loss"] < lines[0]["loss"]
    events = EventAccumulator(str(whole / "tensorboard"))
    events.Reload()
    assert "train/loss" in events.Tags()["scalars"]


def test_a_checkpoint_is_a_model_with_its_tokenizer(whole):
    model = AutoModelForCausalLM.from_pretrained(whole / "checkpoint-6")
    tokenizer = AutoTokenizer.from_pretrained(whole / "checkpoint-6")
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.generate(**tokenizer("def", return_tensors="pt"), max_new_tokens=3).shape[1] <= 6
    assert model(**tokenizer("def", return_tensors="pt")).past_key_values is not None


def test_two_runs_are_the_same(whole, config_file, tmp_path):
    train(TrainConfig.load(config_file, {"out": str(tmp_path / "again")}))
    assert_same_run(tmp_path / "again", whole)


@pytest.mark.parametrize("moment", ["between", "writing", "publishing"])
def test_killed_and_resumed_gives_the_same_bits(moment, whole, config_file, tmp_path):
    out = tmp_path / "run"
    victim = subprocess.run([sys.executable, "-c", VICTIM, out, config_file, moment, "new"], capture_output=True)
    assert victim.returncode == -signal.SIGKILL, victim.stderr.decode()
    assert not (out / "checkpoint-4").exists()
    assert weights(out / "checkpoint-2").keys()
    train(TrainConfig.load(config_file, {"out": str(out)}), resume=True)
    assert_same_run(out, whole)
    assert not (out / "partial").exists()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_saves_and_says_how_to_resume(name, whole, config_file, tmp_path):
    out, number = tmp_path / "run", getattr(signal, name)
    victim = subprocess.run(
        [sys.executable, "-c", VICTIM, out, config_file, name, "new"], capture_output=True, text=True
    )
    assert victim.returncode == 128 + number, victim.stderr
    assert f"carve train --resume {out}" in victim.stdout
    assert "Traceback" not in victim.stderr
    assert (out / "checkpoint-3" / "model.safetensors").exists()
    train(TrainConfig.load(config_file, {"out": str(out)}), resume=True)
    for tensor, expected in zip(
        weights(out / "checkpoint-6").values(), weights(whole / "checkpoint-6").values(), strict=True
    ):
        assert torch.equal(tensor, expected)


def test_a_signal_in_the_last_step_is_no_less_one(config_file, tmp_path, monkeypatch):
    def ask(self, args, state, control, **_):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(ShowProgress, "on_step_begin", ask, raising=False)
    with pytest.raises(Interrupted, match=r"checkpoint-6, with which the run has ended"):
        train(TrainConfig.load(config_file, {"out": str(tmp_path / "run")}))
    assert (tmp_path / "run" / "checkpoint-6").exists()


@pytest.mark.parametrize(("step", "left"), [(1, "there is no checkpoint"), (3, "the last checkpoint is .*-2")])
def test_a_second_interrupt_stops_at_once_and_says_what_is_left(step, left, config_file, tmp_path, monkeypatch):
    def ask(self, args, state, control, **_):
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(ShowProgress, "on_step_begin", ask, raising=False)
    out = tmp_path / "run"
    with pytest.raises(Interrupted, match=rf"at once, after {step} steps; {left}; go on .* --resume .*run$") as raised:
        train(TrainConfig.load(config_file, {"out": str(out)}))
    assert raised.value.signal == signal.SIGINT
    monkeypatch.undo()
    assert train(TrainConfig.load(config_file, {"out": str(out)}), resume=True) == out / "checkpoint-6"


@pytest.mark.parametrize(
    ("device", "parameters", "long"),
    [("cpu", 30_000_000, True), ("cpu", 1_000_000, False), ("cuda", 30_000_000, False)],
)
def test_what_to_expect_is_said(device, parameters, long):
    said = expectation(TrainConfig(data="text"), parameters, torch.device(device))
    size = f"{parameters:,} parameters on {device}, 1,000 steps of 65,536 tokens"
    assert said == size + ": on a CPU each may take minutes" * long


def test_progress_is_shown_within_a_step(config_file, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Progress, "update", lambda self, task, **fields: seen.append(fields.get("completed")))
    train(TrainConfig.load(config_file, {"out": str(tmp_path / "run"), "steps": 3, "eval_every": 0}))
    assert [done for done in seen if done is not None] == [0.5, 1, 1.5, 2, 2.5, 3]


@pytest.mark.parametrize(("share", "rows"), [(0.1, 3), (0.3, 9)])
def test_all_that_is_held_out_is_evaluated(share, rows, config_file, tmp_path, monkeypatch):
    """Also where it is less than a batch, or no multiple of one."""
    seen = []

    def note(self, model, inputs, *rest, **how):
        seen.append(len(inputs["input_ids"]))
        return step(self, model, inputs, *rest, **how)

    step = CarveTrainer.prediction_step
    monkeypatch.setattr(CarveTrainer, "prediction_step", note)
    (tmp_path / "text.txt").write_text("x" * (30 * FIELDS["seq_len"] + 5))
    fields = {"micro_batch": 4, "steps": 1, "warmup_steps": 0, "eval_every": 1, "validation_share": share}
    places = {"data": str(tmp_path / "text.txt"), "out": str(tmp_path / "run")}
    train(TrainConfig.load(config_file, fields | places))
    assert sum(seen) == rows


def test_resuming_a_run_that_has_ended_changes_nothing(whole, config_file, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    assert train(TrainConfig.load(config_file, {"out": str(tmp_path / "run")}), resume=True).name == "checkpoint-6"
    assert_same_run(tmp_path / "run", whole)


def test_a_resumed_run_may_log_evaluate_and_save_at_other_steps(whole, config_file, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for step in (4, 6):
        shutil.rmtree(out / f"checkpoint-{step}")
    rhythm = {"eval_every": 3, "save_every": 1, "log_every": 5, "keep": 9}
    train(TrainConfig.load(config_file, {"out": str(out)} | rhythm), resume=True)
    assert sorted(path.name for path in out.glob("checkpoint-*")) == [f"checkpoint-{i}" for i in range(2, 7)]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    assert [line["step"] for line in lines if "loss" in line] == [2, 5, 6]
    assert [line["step"] for line in lines if "eval_loss" in line] == [3, 6]
    for name, found in weights(out / "checkpoint-6").items():
        assert torch.equal(found, weights(whole / "checkpoint-6")[name]), name


def test_a_checkpoint_whose_model_returns_no_cache_goes_on(whole, tmp_path):
    """As those that were written when Trainer set `use_cache` to False."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoint-6")
    path = out / "checkpoint-4" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_cache": False}))
    last = train(TrainConfig.load(out / "config.yaml", {"out": str(out)}), resume=True)
    assert json.loads((last / "config.json").read_text())["use_cache"] is True


def test_the_last_step_is_logged(config_file, tmp_path):
    train(TrainConfig.load(config_file, {"out": str(tmp_path / "run"), "steps": 3, "log_every": 100}))
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").open()] == [3, 3]


def test_a_full_disk_keeps_the_last_checkpoint(config_file, tmp_path, monkeypatch):
    save = CarveTrainer._save_rng_state

    def full(self, folder):
        if folder.endswith("-4"):
            (Path(folder) / "rng_state.pth").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(self, folder)

    monkeypatch.setattr(CarveTrainer, "_save_rng_state", full)
    out = tmp_path / "run"
    with pytest.raises(OSError, match=r"checkpoint-4 could not be written.*No space left.*checkpoint-2"):
        train(TrainConfig.load(config_file, {"out": str(out)}))
    assert sorted(path.name for path in out.glob("*") if "checkpoint" in path.name or "partial" in path.name) == [
        "checkpoint-2"
    ]
    assert weights(out / "checkpoint-2").keys()


@pytest.mark.parametrize(
    ("mixer", "steps", "at", "seen"),
    [
        ("carve", 6, 1, "g has values from nan"),  # the op itself sees it
        ("full_attention", 6, 2, "loss is nan, expected a finite number"),
        ("full_attention", 1, 1, "weights are not finite"),  # at the last step, behind its loss
    ],
)
def test_a_training_that_diverges_says_so(mixer, steps, at, seen, config_file, tmp_path):
    out = tmp_path / "run"
    fields = {"steps": steps, "warmup_steps": 0, "learning_rate": 1e39, "content_lr": 1.0}
    fields |= {"eval_every": 0, "save_every": 6}
    fields["model"] = {"layer_types": [mixer], "content": "mean" if mixer == "carve" else None}
    with pytest.raises(FloatingPointError, match=rf"diverged at step {at}: {seen}.* below 1e\+39.*no check"):
        train(TrainConfig.load(config_file, {"out": str(out)} | fields))
    assert not list(out.glob("checkpoint-*"))


def test_a_training_that_diverges_names_the_last_checkpoint(config_file, tmp_path, monkeypatch):
    step = CarveTrainer.training_step

    def run_away(self, model, *rest):
        if self.state.global_step == 3:
            model.lm_head.weight.data[0] = float("inf")
        return step(self, model, *rest)

    monkeypatch.setattr(CarveTrainer, "training_step", run_away)
    with pytest.raises(FloatingPointError, match=r"diverged at step 4: .*the last checkpoint is .*run/checkpoint-2"):
        train(TrainConfig.load(config_file, {"out": str(tmp_path / "run")}))


def test_a_used_folder_is_refused(whole, config_file):
    with pytest.raises(ValueError, match=r"not empty: carve train --resume"):
        train(TrainConfig.load(config_file, {"out": str(whole)}))


def test_a_folder_in_which_another_process_trains_is_refused(whole, config_file, tmp_path):
    with alone(tmp_path / "run"), pytest.raises(ValueError, match=r"out is .*run, in which another process trains"):
        train(TrainConfig.load(config_file, {"out": str(tmp_path / "run")}))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]
    with alone(whole), pytest.raises(ValueError, match="in which another process trains"):
        train(TrainConfig.load(config_file, {"out": str(whole)}), resume=True)
    assert train(TrainConfig.load(config_file, {"out": str(whole)}), resume=True).name == "checkpoint-6"


def test_a_resumed_run_must_be_the_same(whole, config_file, tmp_path):
    with pytest.raises(ValueError, match=r"steps is 8, but the run in .* has 6"):
        train(TrainConfig.load(config_file, {"out": str(whole), "steps": 8}), resume=True)
    with pytest.raises(ValueError, match=r"^model.content is 'mean', but the run in .* has 'read': it cannot go on$"):
        train(TrainConfig.load(config_file, {"out": str(whole), "model": {"content": "mean"}}), resume=True)
    with pytest.raises(ValueError, match=r"^model.bos_token_id is None, but the run in .* has the tokenizer's"):
        train(TrainConfig.load(config_file, {"out": str(whole), "model": {"bos_token_id": None}}), resume=True)
    with pytest.raises(ValueError, match=r"holds no config\.yaml"):
        train(TrainConfig.load(config_file, {"out": str(tmp_path)}), resume=True)
    with pytest.raises(ValueError, match=r"validation is '.*', but the run in .* has None"):
        train(TrainConfig.load(config_file, {"out": str(whole), "validation": str(config_file)}), resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"intermediate_size": 24}}, "model.intermediate_size is 24, but .*checkpoint-4 has 16"),
        ({"steps": 3}, "steps is 3, but the run in .* has made 4: expected more"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused(change, message, whole, tmp_path):
    """The configuration was changed by hand since."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoint-6")
    TrainConfig.load(out / "config.yaml", change | {"out": str(out)}).save(out / "config.yaml")
    with pytest.raises(ValueError, match=message):
        train(TrainConfig.load(out / "config.yaml"), resume=True)


def test_errors_leave_the_folder_as_good_as_new(config_file, tmp_path):
    out = tmp_path / "run"
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"bad\.txt is not UTF-8"):
        train(TrainConfig.load(config_file, {"out": str(out), "data": str(tmp_path / "bad.txt")}))
    with pytest.raises(ValueError, match="validation is 'nowhere': no such file or folder"):
        train(TrainConfig.load(config_file, {"out": str(out), "validation": "nowhere"}))
    assert not list(out.rglob("ids.bin"))  # nor was the other text tokenised
    with pytest.raises(ValueError, match=r"out is .*run, within data = '.*': expected a folder that is not read as"):
        train(TrainConfig.load(config_file, {"out": str(out), "data": str(tmp_path)}))
    within = {"out": str(out), "data": str(config_file.parent), "cache": str(config_file.parent / "tokens")}
    with pytest.raises(ValueError, match=r"cache is .*tokens, within data = '.*': expected a folder that is not read"):
        train(TrainConfig.load(config_file, within))
    with pytest.raises(ValueError, match="data is empty, expected a file, a folder or hub:NAME"):
        train(TrainConfig.load(config_file, {"out": str(out), "data": ""}))
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"validation is '.*empty\.txt', which holds no text"):
        train(TrainConfig.load(config_file, {"out": str(out), "validation": str(tmp_path / "empty.txt")}))
    with pytest.raises(ValueError, match="vocab_size 100"):
        train(TrainConfig.load(config_file, {"out": str(out), "model": {"vocab_size": 100}}))
    assert not (out / "config.yaml").exists()
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(ValueError, match="validation has 6 tokens: too few for sequences of seq_len"):
        train(TrainConfig.load(config_file, {"out": str(out), "validation": str(tmp_path / "short.txt")}))
    train(TrainConfig.load(config_file, {"out": str(out), "steps": 3}))  # the folder is still as good as new


@pytest.mark.parametrize(
    ("seq_len", "model", "warned"),
    [
        (9, {}, True),
        (10, {}, False),
        (9, {"content": None}, False),
        (9, {"layer_types": ["carve_blind"], "content": "mean"}, False),
    ],
)
def test_content_that_no_loss_sees_is_said(seq_len, model, warned):
    """And it is so: the projections' gradient is zero where there is a warning, and only there."""
    torch.manual_seed(0)
    config = CarveConfig(**FIELDS["model"] | {"vocab_size": 32} | model)
    carve = CarveForCausalLM(config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_content(seq_len, config)
    assert [str(each.message) for each in caught] == [
        "carve: the content projections will not learn: seq_len is 9, expected at least chunk_size + 2 = 10"
    ] * warned
    ids = torch.randint(32, (2, seq_len))
    carve(ids, labels=ids, use_cache=False).loss.backward()
    gradients = [p.grad.norm() for name, p in carve.named_parameters() if name.endswith("p_up")]
    assert bool(gradients) == config.sees_content
    assert all((norm == 0) == warned for norm in gradients)


def test_what_is_not_decayed(config_file, tmp_path):
    decayed = {}

    def look(self, model):
        decayed["names"] = names = get_names(self, model)
        decayed["all"] = [name for name, _ in model.named_parameters()]
        return names

    get_names = CarveTrainer.get_decay_parameter_names
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CarveTrainer, "get_decay_parameter_names", look)
        train(TrainConfig.load(config_file, {"out": str(tmp_path / "run"), "steps": 3}))
    spared = {name.split("model.layers.0.")[-1] for name in set(decayed["all"]) - set(decayed["names"])}
    assert spared == {
        "mixer_norm.weight", "mlp_norm.weight", "model.norm.weight", "mixer.norm.weight",
        "mixer.A_log", "mixer.dt_bias", "mixer.gate_proj.1.bias",
    }  # fmt: skip


def test_the_content_projections_learn_at_their_own_rate(config_file, tmp_path):
    lasts = [
        weights(train(TrainConfig.load(config_file, {"out": str(tmp_path / str(factor)), "steps": 3} | fields)))
        for factor, fields in ((1, {"content_lr": 1.0}), (2, {}), (3, {"content_lr": 1e-9}))
    ]
    name = "model.layers.0.mixer.p_up"  # zero at first: what it is has been learnt
    assert 1.5 < (lasts[1][name].norm() / lasts[0][name].norm()).item() < 2.5
    assert lasts[2][name].norm() < 1e-6 * lasts[0][name].norm()
    other = "model.layers.0.mixer.q_proj.weight"
    assert (lasts[1][other] - lasts[0][other]).norm() < 1e-2 * lasts[0][other].norm()


def test_interrupted_is_a_keyboard_interrupt():
    assert issubclass(Interrupted, KeyboardInterrupt)
    assert os.environ.get("TENSORBOARD_LOGGING_DIR") is None  # a run leaves the environment as it was


@pytest.mark.parametrize("fields", [{"gradient_checkpointing": True}, {"dtype": "bfloat16"}, {"validation": "same"}])
def test_other_ways_to_run(fields, config_file, tmp_path):
    config = TrainConfig.load(config_file)
    if "validation" in fields:
        fields = {"validation": config.data}
    last = train(TrainConfig.load(config_file, {"out": str(tmp_path / "run"), "steps": 3} | fields))
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in weights(last).values())


def test_no_step_returns_logits_or_a_cache(config_file, tmp_path, monkeypatch):
    forward, kept = CarveForCausalLM.forward, []

    @wraps(forward)  # Trainer reads the names of the arguments
    def note(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        kept.append((outputs.logits, outputs.past_key_values))
        return outputs

    monkeypatch.setattr(CarveForCausalLM, "forward", note)
    train(TrainConfig.load(config_file, {"out": str(tmp_path / "run"), "steps": 3, "eval_every": 3}))
    assert len(kept) > 2
    assert set(kept) == {(None, None)}


def test_compiled_blocks_train_alike_and_are_compiled_once() -> None:
    graphs = []
    for layers in (1, 3):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = CarveForCausalLM(CarveConfig(**FIELDS["model"] | {"vocab_size": 32, "num_hidden_layers": layers}))
        expected, names = training_step(model), list(model.state_dict())
        counter = CompileCounterWithBackend("aot_eager")
        compile_blocks(model, backend=counter)
        for found, wanted in zip(training_step(model), expected, strict=True):
            torch.testing.assert_close(found, wanted)
        assert list(model.state_dict()) == names
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1] > 0


def training_step(model: CarveForCausalLM) -> list[torch.Tensor]:
    """The loss and all gradients."""
    ids = torch.arange(48).view(2, 24) % 32
    model.zero_grad()
    loss = model(ids, labels=ids, use_cache=False, skip_logits=True).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
