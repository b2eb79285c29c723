"""The folder of a training run: who may train in it, what may go on, and checkpoints that are whole or absent."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import ZipFile

from safetensors import safe_open

from carve.files import locked
from carve.models import CarveConfig
from carve.train.config import TrainConfig, settled
from carve.train.data import reading

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


def check_data(out: Path, fingerprints: dict[str, str]) -> None:
    """See that the text is still that of the run.

    Raises:
        ValueError: the text or the tokenizer has changed since the run began; the message names the field.
    """
    path = out / "data.json"
    with reading(path, "put it back, or train anew in another folder"):
        before = {name: json.loads(path.read_text(encoding="utf-8"))[name] for name in fingerprints}
    for name, was in before.items():
        if fingerprints[name] != was:
            raise ValueError(f"{name} has changed, in text or tokenizer, since the run in {out} began: it cannot go on")


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
