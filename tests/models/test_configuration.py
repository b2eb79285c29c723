import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from carve import CarveConfig
from tests.models.tiny import ALL_LAYERS, READ, tiny_config


def test_a_configuration_comes_back(tmp_path: Path) -> None:
    config = tiny_config(ALL_LAYERS, **READ, num_v_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, CarveConfig)
    assert again.to_diff_dict() == config.to_diff_dict()
    assert again.rope_parameters["rope_theta"] == 5e5


def test_what_transformers_writes_is_read(tmp_path: Path) -> None:
    tiny_config(["full_attention"], name_or_path="here", attn_implementation="eager").save_pretrained(tmp_path)
    kept = {
        "auto_map": {"AutoModel": "modeling.Model"},
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
        "tokenizer_class": "PreTrainedTokenizerFast",
        "architectures": ["CarveForCausalLM"],
    }
    of_old = {"torch_dtype": "bfloat16", "num_labels": 3, "max_length": 20, "do_sample": True, "_name_or_path": "there"}
    path = tmp_path / "config.json"
    written = json.loads(path.read_text()) | kept | of_old
    path.write_text(json.dumps(written))
    again = AutoConfig.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert {name: getattr(again, name) for name in kept} == kept
    assert (again.dtype, again.num_labels, again._attn_implementation) == (torch.bfloat16, 3, "sdpa")
    assert tiny_config(["full_attention"], rope_theta=5e5).rope_parameters["rope_theta"] == 5e5

    path.write_text(json.dumps(written | {"chunk_sise": 4, "note": "by a tool"}))
    with pytest.warns(UserWarning, match="config.json has") as said:
        noted = AutoConfig.from_pretrained(tmp_path)
    ours = [str(each.message) for each in said if "config.json has" in str(each.message)]
    assert [message.partition(", which")[0] for message in ours] == [
        "carve: config.json has 'chunk_sise'",
        "carve: config.json has 'note'",
    ]
    assert ours[0].endswith("did you mean 'chunk_size'?")
    assert noted.to_dict() == again.to_dict()


def test_what_is_left_out_follows_from_the_rest() -> None:
    config = CarveConfig(num_hidden_layers=3, num_heads=4)
    assert config.layer_types == ["carve"] * 3
    assert config.num_attention_heads == config.num_key_value_heads == 4
    assert (config.content, config.content_norm, config.content_write, config.chunk_size) == ("mean", "rms", False, 64)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_types": ["carve", "rwkv"]}, "layer_types has 'rwkv', expected only 'carve', 'carve_value'"),
        ({"layer_types": ["carve", "attention"]}, "layer_types has 'attention', expected only 'carve', 'carve_value'"),
        ({"layer_types": "carve,gdn"}, "layer_types is 'carve,gdn', expected a list, [carve,gdn]"),
        ({"layer_types": ["carve"]}, "layer_types has 1 entries, expected num_hidden_layers = 2"),
        ({"chunk_sise": 8}, "CarveConfig has no field 'chunk_sise'; did you mean 'chunk_size'?"),
        ({"contentnorm": None}, "CarveConfig has no field 'contentnorm'; did you mean 'content_norm'?"),
        ({"gates": "kda"}, "CarveConfig has no field 'gates'; did you mean 'layer_types'?"),  # CarveMixer's names
        ({"norm_eps": 1e-6}, "CarveConfig has no field 'norm_eps'; did you mean 'rms_norm_eps'?"),
        ({"num_layers": 2}, "CarveConfig has no field 'num_layers'; did you mean 'num_hidden_layers'?"),
        ({"d_model": 64}, "CarveConfig has no field 'd_model'; did you mean 'hidden_size'?"),
        ({"use_short_conv": True}, "CarveConfig has no field 'use_short_conv'"),
        ({"check": 3}, "CarveConfig has no field 'check'"),
        ({"sees_content": True}, "CarveConfig has no field 'sees_content'"),
        ({"hidden_size": "32"}, "Field 'hidden_size' expected int, got str (value: '32')"),
        ({"content": 3}, "Field 'content' with value 3 doesn't match any type in"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "Missing required keys in `rope_parameters`"),
        ({"vocab_size": 0}, "vocab_size is 0, expected an integer of at least 1"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05, expected a positive number"),
        ({"initializer_range": -1.0}, "initializer_range is -1.0, expected a number of at least 0"),
        ({"attention_dropout": 1.0}, "attention_dropout is 1.0, expected from 0 to below 1"),
        ({"hidden_act": "swish2"}, "hidden_act is 'swish2', expected one of 'gelu'"),
        ({"pad_token_id": 61}, "pad_token_id is 61, expected None or from 0 to below vocab_size = 61"),
        ({"pad_token_id": -1}, "pad_token_id is -1, expected None or from 0 to below vocab_size = 61"),
        ({"chunk_size": 0}, "chunk_size is 0, expected an integer of at least 1"),
        ({"num_v_heads": 3}, "num_v_heads is 3, expected a multiple of num_heads = 2"),
        ({"content": "max"}, "content is 'max', expected 'mean', 'read' or None"),
        ({"content_norm": "l2"}, "content_norm is 'l2', expected 'rms' or None"),
        ({"sliding_window": None}, "sliding_window is None, expected at least 2"),
        ({"sliding_window": 1}, "sliding_window is 1, expected at least 2"),
        ({"num_key_value_heads": 3}, "num_attention_heads is 2, expected a multiple of num_key_value_heads = 3"),
        ({"head_dim": 7}, "head_dim is 7, expected an even number"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], message: str) -> None:
    fields = {"num_hidden_layers": 2, "layer_types": ["carve", "sliding_attention"], **fields}
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_config(fields.pop("layer_types"), **fields)


def test_fields_of_attention_are_free_without_attention() -> None:
    tiny_config(["carve"], sliding_window=None, head_dim=7, num_key_value_heads=3)


def test_whether_layers_see_the_memory() -> None:
    assert tiny_config(["carve_blind", "gdn2", "carve"]).sees_content
    assert not tiny_config(["carve_blind", "gdn2", "full_attention"], content="read").sees_content
    assert not tiny_config(["carve"], content=None).sees_content
