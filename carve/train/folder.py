"""The folder of a training run: who may train in it, what may go on, and checkpoints that are whole or absent."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from safetensors import safe_open

from carve.files import locked, reading
from carve.models import CarveConfig
from carve.train.config import TrainConfig, settled
from carve.train.data import HUB, is_tokens

PARTIAL = "partial"  # where a checkpoint is written until it is whole
LOCK = "lock"  # held by the process that trains
BEFORE = ("data", LOCK, "data.json")  # what is there before there is a run
PLACES = ("data", "tokenizer", "out", "cache")  # fields of `TrainConfig`; what lies there may be moved
RHYTHM = ("eval_every", "save_every", "log_every", "keep")  # and these change nothing of the weights


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Within `with`: no other process of this machine trains in the folder. One that is killed is in no one's way.

    Raises:
        ValueError: another does.
    """
    with locked(out / LOCK) as mine:
        if not mine:
            raise ValueError(f"out is {out}, in which another process trains: expected its end, or another folder")
        yield


def check_folder(config: TrainConfig, out: Path, resume: bool) -> None:
    """See that the run's folder is new, or that what it holds is a run with this configuration.

    Texts and tokenizer may lie elsewhere now: `check_data` sees that they are the same.

    Raises:
        ValueError: the folder is not empty, there is nothing to resume, or a field differs; the message names it.
    """
    saved = out / "config.yaml"
    if not resume:
        if out.exists() and (not out.is_dir() or any(path.name not in BEFORE for path in out.iterdir())):
            how = f": carve train --resume {out} goes on with it" if saved.exists() else ""
            raise ValueError(f"out is {out}, which is not empty{how}; expected a new folder")
        return
    if not saved.is_file():
        raise ValueError(f"{out} holds no config.yaml: expected the folder of a training run")
    fields, before = (settled(vars(each)) for each in (config, TrainConfig.load(saved)))
    for where, now, was in (("", fields, before), ("model.", fields.pop("model"), before.pop("model"))):
        for name in was | now:
            free = name in PLACES + RHYTHM or (name == "validation" and None not in (was[name], now[name]))
            same = (name in now) == (name in was) and now.get(name) == was.get(name)
            if not same and not free:
                mine, its = (repr(each[name]) if name in each else "the tokenizer's" for each in (now, was))
                raise ValueError(f"{where}{name} is {mine}, but the run in {out} has {its}: it cannot go on")


def moved(config: TrainConfig) -> TrainConfig:
    """The configuration of a run that goes on: what lay in its folder is looked for there, wherever that is now."""
    saved = TrainConfig.load(Path(config.out) / "config.yaml")
    paths = {name: getattr(config, name) for name in (*PLACES, "validation") if name != "out"}
    found: dict[str, Any] = {
        name: str(Path(config.out) / Path(path).relative_to(saved.out))
        for name, path in paths.items()
        if path is not None and path == getattr(saved, name) and Path(path).is_relative_to(saved.out)
    }
    return replace(config, **found)


def check_data(out: Path, fingerprints: dict[str, str]) -> None:
    """See that the text is still that of the run.

    Raises:
        ValueError: the text or the tokenizer has changed since the run began; the message names the field.
    """
    for name, was in read_fingerprints(out).items():
        if fingerprints[name] != was:
            raise ValueError(f"{name} has changed, in text or tokenizer, since the run in {out} began: it cannot go on")


def token_cache(config: TrainConfig) -> Path:
    """Where a run has its texts tokenised."""
    return Path(config.out, "data") if config.cache is None else Path(config.cache)


def check_kept(config: TrainConfig, name: str) -> None:
    """Raise ValueError where a text of a run is gone, but not its tokens, which do as well."""
    text, kept = getattr(config, name), token_cache(config) / read_fingerprints(Path(config.out))[name]
    if not Path(text).exists() and is_tokens(str(kept)):
        raise ValueError(
            f"{name} is {text!r}: no such file or folder; expected it, or its tokens, which are there: --{name} {kept}"
        )


def read_fingerprints(out: Path) -> dict[str, str]:
    """Of the texts that a run was begun with, "data" and "validation"."""
    path = out / "data.json"
    with reading(path, "put it back, or train anew in another folder"):
        fingerprints = json.loads(path.read_text(encoding="utf-8"))
        return {name: fingerprints[name] for name in ("data", "validation")}


def save_config(config: TrainConfig, out: Path) -> None:
    """Write `config.yaml`, with the paths absolute: the run can go on from any working directory."""
    paths = {name: getattr(config, name) for name in (*PLACES, "validation")}
    if config.tokenizer == "bytes" or not Path(config.tokenizer).exists():  # a name
        del paths["tokenizer"]
    paths = {name: path for name, path in paths.items() if path is not None and not path.startswith(HUB)}
    config = replace(config, **{name: os.path.abspath(path) for name, path in paths.items()})
    config.save(out / "config.yaml")


def check_checkpoint(folder: Path, model: CarveConfig) -> None:
    """See that a run can go on from a checkpoint.

    Raises:
        ValueError: a file is missing or damaged, or the checkpoint is of another model; the message names it.
    """
    remedy = f"put it back, or remove {folder} to go on from the checkpoint before it, or from the start"
    for pattern in (
        "config.json",
        "model*.safetensors",
        "trainer_state.json",
        "optimizer.pt",
        "scheduler.pt",
        "rng*.pth",
    ):
        paths = list(folder.glob(pattern))
        if not paths:
            raise ValueError(f"{folder / pattern} is missing: {remedy}")
        for path in paths:
            with reading(path, remedy):
                check_whole(path)
    with reading(folder / "config.json", remedy):
        was = CarveConfig.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    for name in CarveConfig.__annotations__:
        if name != "use_cache" and getattr(model, name) != getattr(was, name):  # training uses none
            raise ValueError(f"model.{name} is {getattr(model, name)!r}, but {folder} has {getattr(was, name)!r}")


def check_whole(path: Path) -> None:
    """Raise an error, of many kinds, where a file of a checkpoint was cut or is not of its kind."""
    if path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
    elif path.suffix == ".safetensors":
        with safe_open(path, "pt"):
            pass
    else:
        with ZipFile(path) as file:
            if part := file.testzip():
                raise ValueError(f"{part} is not as it was written")


def publish(partial: Path, final: Path) -> None:
    """Give a folder its final name once all that is in it lies on the disk."""
    for path in (*partial.rglob("*"), partial):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    if final.exists():  # the same step, from before an interruption
        shutil.rmtree(final)
    os.replace(partial, final)
    shutil.rmtree(partial.parent, ignore_errors=True)
