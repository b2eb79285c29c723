"""Files that have their names only once they are whole, that one process holds, or that are named if damaged."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DAMAGE = (ValueError, TypeError, LookupError, EOFError, OSError, NotImplementedError)  # what comes of reading it


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Within `with`: a path to write a file to, which takes the place of `path` when all of it lies on the disk.

    Where that fails, what was there is left as it was.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def replace_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file of text, and the folders above it."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="")


def check_parent(path: str | os.PathLike[str]) -> None:
    """Raise FileNotFoundError unless there is a folder to write the file to."""
    parent = Path(path).absolute().parent
    if not parent.is_dir():
        raise FileNotFoundError(f"no such folder: {parent}")


def check_json(path: str | os.PathLike[str]) -> None:
    """See, before long work, that a file of JSON can be written there and replaces nothing but another.

    Raises:
        ValueError: what is there is something else.
        OSError: there is no such folder.
    """
    check_parent(path)
    path = Path(path).absolute()
    if path.exists():
        try:
            json.loads(path.read_bytes())
        except (ValueError, OSError) as error:
            raise ValueError(f"{path} is no file of JSON: expected a new file, or an earlier result") from error


@contextmanager
def reading(path: Path, remedy: str) -> Iterator[None]:
    """Within `with`: what fails where a file is not as it was written says which one it is, and what to do.

    Raises:
        ValueError: as said.
    """
    from zipfile import BadZipFile  # not above: `carve --help` is not to wait for them

    from safetensors import SafetensorError

    try:
        yield
    except (*DAMAGE, BadZipFile, SafetensorError) as error:
        raise ValueError(f"{path} is damaged ({' '.join(str(error).split())}): {remedy}") from error


@contextmanager
def locked(path: str | os.PathLike[str], *, wait: bool = False) -> Iterator[bool]:
    """Within `with`: whether this process, of all on this machine, has the lock. A process that ends lets it go."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            mine = True
        except BlockingIOError:
            mine = False
        yield mine
