"""Opening a checkpoint folder: the model and its tokenizer, or one clear line on what is wrong with it."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from carve.models.configuration_carve import CarveConfig
from carve.models.modeling_carve import CarveForCausalLM

logger = logging.getLogger(__name__)
reports = logging.getLogger("transformers.modeling_utils")


def find_checkpoint(folder: str | os.PathLike[str]) -> Path:
    """The checkpoint to use: the folder itself, or the last complete `checkpoint-N` in the folder of a training run.

    Raises:
        OSError: no such folder.
        ValueError: it holds a model of another architecture, or no complete checkpoint; the message says which.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"no such checkpoint folder: {folder}")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, expected the folder of a checkpoint")
    if (folder / "config.json").exists():
        _check_complete(folder)
        return folder
    steps = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    for step in sorted(steps, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        try:
            _check_complete(step)
        except ValueError as error:
            logger.warning("%s; looking for the checkpoint before it", error)
        else:
            return step
    raise ValueError(f"{folder} has no config.json and no complete checkpoint-N folder in it: not a checkpoint")


def load_checkpoint(
    folder: str | os.PathLike[str], device: str | torch.device | None = None
) -> tuple[CarveForCausalLM, PreTrainedTokenizerBase]:
    """The model, in evaluation mode and in the dtype it was saved in, and its tokenizer.

    Args:
        folder: a checkpoint, or the folder of a training run (its last complete checkpoint is taken).
        device: where to put the model; None for the first GPU where there is one, else the CPU.

    Raises:
        OSError: no such folder.
        ValueError: another architecture, half written, a config.json that is wrong or does not fit the weights, or no
            tokenizer that fits.
    """
    folder = find_checkpoint(folder)
    try:
        config = CarveConfig.from_pretrained(folder, local_files_only=True)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} has no tokenizer: expected tokenizer.json and tokenizer_config.json") from error
    reports.addFilter(is_error)
    try:
        loaded: Any = CarveForCausalLM.from_pretrained(
            folder, config=config, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    finally:
        reports.removeFilter(is_error)
    model, info = loaded
    sized = [name for name, *_ in info["mismatched_keys"]]
    for found, what in (
        (info["missing_keys"], "lacks {} of the model's weights"),
        (sized, "has {} weights of another size than its config.json says"),
        (info["unexpected_keys"], "has {} weights that are none of the model's in its config.json"),
    ):
        if found:
            raise ValueError(f"{folder} {what.format(len(found))}: {', '.join(sorted(found)[:3])}, ...")
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model knows {model.config.vocab_size}"
        )
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval(), tokenizer


def is_error(record: logging.LogRecord) -> bool:
    """Not transformers' table of the weights that do not fit: what is raised for them says it in one line."""
    return record.levelno >= logging.ERROR


def _check_complete(folder: Path) -> None:
    """Raise ValueError unless the folder holds a whole CARVE model."""
    try:
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder} is half written: config.json is missing or damaged") from error
    if model_type != CarveConfig.model_type:
        raise ValueError(f"{folder} holds a model of type {model_type!r}, expected {CarveConfig.model_type!r}")
    index = folder / "model.safetensors.index.json"
    try:
        names = ["model.safetensors"]
        if index.exists():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is half written: {index.name} is damaged") from error
    for name in names:
        if not (folder / name).exists():
            raise ValueError(f"{folder} is half written: {name} is missing")
        try:
            with safe_open(folder / name, framework="pt"):  # reads the header and compares it with the file's length
                pass
        except SafetensorError as error:
            raise ValueError(f"{folder} is half written: {name} is cut short or damaged") from error
