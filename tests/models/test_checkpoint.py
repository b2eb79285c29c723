import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from carve import CarveConfig, CarveForCausalLM
from carve.models.checkpoint import find_checkpoint, load_checkpoint


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    config = CarveConfig(
        vocab_size=256, hidden_size=16, num_hidden_layers=1, num_heads=1, head_dim=8, intermediate_size=16
    )
    CarveForCausalLM(config).save_pretrained(folder)
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab=vocab, merges=[]))).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def test_a_checkpoint_comes_back_with_its_tokenizer(folder: Path) -> None:
    model, tokenizer = load_checkpoint(folder)
    assert not model.training
    assert len(tokenizer) == model.config.vocab_size
    again, _ = load_checkpoint(str(folder))
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), again.parameters(), strict=True))


def test_importing_the_models_makes_a_checkpoint_known_to_transformers(saved: Path) -> None:
    """As the README says; in a process where nothing else has been imported."""
    code = """
import sys
import carve.models
from transformers import AutoModelForCausalLM, AutoTokenizer
print(*(type(each.from_pretrained(sys.argv[1])).__name__ for each in (AutoModelForCausalLM, AutoTokenizer)))
"""
    command = [sys.executable, "-c", code, str(saved)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert found == ["CarveForCausalLM", type(load_checkpoint(saved)[1]).__name__]


def test_the_last_complete_checkpoint_of_a_run_is_taken(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    for step in (9, 10, 100):
        shutil.copytree(folder, run / f"checkpoint-{step}")
    shutil.copytree(folder, run / "checkpoint-last")  # no step: not one of the run's
    assert find_checkpoint(run) == run / "checkpoint-100"
    weights = run / "checkpoint-100" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(run) == run / "checkpoint-10"
    assert "checkpoint-100 is half written" in caplog.text


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such checkpoint folder: "):
        load_checkpoint(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="file is a file"):
        load_checkpoint(tmp_path / "file")
    with pytest.raises(ValueError, match=r"no config\.json and no complete checkpoint-N"):
        load_checkpoint(tmp_path)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a model of type 'llama', expected 'carve'"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("kept", [0, 5, 0.5, 0.99])
def test_every_cut_file_is_noticed(folder: Path, name: str, kept: float) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(kept if kept >= 1 else kept * len(content))])
    with pytest.raises(ValueError, match=f"half written: {name}"):
        load_checkpoint(folder)


def test_missing_weights_are_noticed(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"half written: model\.safetensors is missing"):
        load_checkpoint(folder)


def test_a_missing_shard_is_noticed(folder: Path) -> None:
    model, _ = load_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="10KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    load_checkpoint(folder)
    shards[-1].unlink()
    with pytest.raises(ValueError, match=f"half written: {shards[-1].name} is missing"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 2, "layer_types": ["carve"] * 2}, r"lacks \d+ of the model's weights: model.layers.1"),
        ({"vocab_size": 300}, "has 1 weights of another size than its config.json says: model.embed_tokens.weight"),
        ({"content": None}, "has 2 weights that are none of the model's in its config.json: "),
        ({"num_hidden_layers": 2}, r"model/config\.json: layer_types has 1 entries, expected num_hidden_layers = 2"),
        ({"num_hidden_layers": "1"}, r"model/config\.json: Field 'num_hidden_layers' expected int, got str"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(
    folder: Path, caplog: pytest.LogCaptureFixture, fields: dict[str, Any], message: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder)
    assert not caplog.messages  # no report of transformers besides


def test_no_tokenizer_is_said(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer: expected tokenizer\.json"):
        load_checkpoint(folder)


def test_a_tokenizer_too_large_for_the_model_is_said(folder: Path) -> None:
    _, tokenizer = load_checkpoint(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="the tokenizer has 257 tokens, the model knows 256"):
        load_checkpoint(folder)
