import dataclasses

import pytest
import yaml
from typer.testing import CliRunner

from carve.cli import app
from carve.models import CarveConfig
from carve.train import TrainConfig
from carve.train.config import PRESETS, settled


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_presets_load(preset):
    config = TrainConfig.load(preset, {"data": "text"})
    assert config.batch_tokens % (config.seq_len * config.micro_batch) == 0


def test_largest_preset_has_the_papers_size():
    model = CarveConfig(**TrainConfig.load("1.3b", {"data": "text"}).model)
    import torch

    from carve import CarveForCausalLM

    with torch.device("meta"):
        parameters = sum(p.numel() for p in CarveForCausalLM(model).parameters())
    assert 1.2e9 < parameters < 1.4e9


def test_a_key_that_comes_twice_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_text("data: text\nsteps: 500\nmodel: {hidden_size: 64, hidden_size: 32}\n")
    with pytest.raises(ValueError, match=r"c\.yaml is not YAML: the key 'hidden_size' comes twice .*line 3"):
        TrainConfig.load(tmp_path / "c.yaml")


def test_yaml_round_trip(tmp_path):
    config = TrainConfig(data="text", steps=7, warmup_steps=2, model={"content": "read", "content_write": True})
    config.save(tmp_path / "config.yaml")
    assert TrainConfig.load(tmp_path / "config.yaml") == config


def test_overrides_win_and_merge_the_model(tmp_path):
    (tmp_path / "c.yaml").write_text("data: text\nsteps: 500\nmodel: {hidden_size: 64, chunk_size: 16}\n")
    config = TrainConfig.load(tmp_path / "c.yaml", {"steps": 600, "model": {"chunk_size": 32}})
    assert config.steps == 600
    assert config.model == {"hidden_size": 64, "chunk_size": 32}


def test_help_has_a_flag_a_line_and_a_default_for_every_field():
    shown = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "250", "TERM": "dumb"}, color=False).output
    for field in dataclasses.fields(TrainConfig):
        line = next(line for line in shown.splitlines() if f"--{field.name.replace('_', '-')} " in line)
        assert field.metadata["help"] in line
        if field.default not in (dataclasses.MISSING, None):
            assert f"[default: {field.default}]" in line


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stepps": 3}, "did you mean 'steps'"),
        ({"steps": "many"}, "steps is 'many'"),
        ({"steps": True}, "steps is True"),
        ({"steps": 0}, "steps is 0"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"learning_rate": float("inf")}, "learning_rate is inf, expected a positive finite number"),
        ({"content_lr": float("inf")}, "content_lr is inf"),
        (
            {"model": {"layer_types": ["gdn2"] * 22, "content": "mean"}},
            "model has 'content', but no layer of layer_types",
        ),
        ({"model": {"layer_types": ["gdn2"] * 22, "content_write": True}}, "model has 'content_write', but no layer"),
        ({"content_lr": 2, "model": {"content": None}}, "content_lr is 2.0, expected 1: no layer of the model sees"),
        ({"content_lr": 0.5, "model": {"layer_types": ["gdn2"] * 22}}, "content_lr is 0.5, expected 1"),
        ({"weight_decay": float("inf")}, "weight_decay is inf"),
        ({"weight_decay": float("nan")}, "weight_decay is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1 << 32}, "seed is 4294967296"),
        ({"dtype": "float64"}, "dtype is 'float64'"),
        ({"seq_len": 3, "batch_tokens": 100}, "batch_tokens is 100"),
        ({"warmup_steps": 1000}, "warmup_steps is 1000"),
        ({"validation_share": 1.0}, "validation_share is 1.0"),
        ({"data": 3}, "data is 3"),
        ({"model": {"hidden": 3}}, "model has 'hidden'"),
        ({"model": {"layer_types": ["lstm"], "num_hidden_layers": 1}}, "layer_types has 'lstm'"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        TrainConfig.load(None, {"data": "text"} | fields)


def test_data_is_required():
    with pytest.raises(ValueError, match="data is missing"):
        TrainConfig.load("demo")


def test_unknown_preset_lists_those_there_are():
    with pytest.raises(ValueError, match=r"'small' is neither.*1\.3b, 30m, 340m, demo"):
        TrainConfig.load("small")


def test_numbers_are_written_as_in_python(tmp_path):
    (tmp_path / "c.yaml").write_text("data: text\nlearning_rate: 5e-4\nmodel: {rms_norm_eps: 1E-6}\nout: '1e-5'\n")
    config = TrainConfig.load(tmp_path / "c.yaml")
    assert (config.learning_rate, config.model, config.out) == (5e-4, {"rms_norm_eps": 1e-6}, "1e-5")
    config.save(tmp_path / "saved.yaml")
    assert TrainConfig.load(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize("text", [b"a: [", b"- 1\n- 2\n", b"model: 3\n", b"data: \xff"])
def test_files_that_are_no_mapping(tmp_path, text):
    (tmp_path / "c.yaml").write_bytes(text)
    with pytest.raises(ValueError, match=r"c\.yaml is not"):
        TrainConfig.load(tmp_path / "c.yaml")


def test_a_saved_config_is_plain_yaml(tmp_path):
    TrainConfig(data="text").save(tmp_path / "c.yaml")
    assert yaml.safe_load((tmp_path / "c.yaml").read_text())["tokenizer"] == "bytes"


def test_what_is_not_given_is_the_tokenizers_and_not_none() -> None:
    """A token that the configuration says there is none of is not the same as one that it leaves to the tokenizer."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        left, none = settled({"model": {}}), settled({"model": {name: None}})
        assert left != none
        assert name not in left["model"]
