"""Results as JSON lines, each under the full configuration it belongs to: what is there need not be run again."""

import json
import os
import sys
from pathlib import Path
from typing import Any

BEGINNING = '{"configuration": {'  # of every line


def key_of(configuration: dict[str, Any]) -> str:
    """The configuration as a string that equal ones share."""
    return json.dumps(configuration, sort_keys=True)


def read_results(path: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """The results of a file, by `key_of` their configuration; none if there is no file.

    A line that was cut short (a process was killed while it wrote) is left out, and said on stderr.

    Raises:
        ValueError: a line that is no result nor the beginning of one: the file is something else.
    """
    results: dict[str, dict[str, Any]] = {}
    path = Path(path)
    if not path.exists():
        return results
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not line.strip(" \0"):  # zeros are what a machine leaves that went off while it wrote
            continue
        try:
            record = json.loads(line)
        except ValueError:
            if line[: len(BEGINNING)] == BEGINNING[: len(line)]:
                print(f"{path}, line {number}, was cut short: left out", file=sys.stderr)
                continue
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("configuration"), dict):
            raise ValueError(f"{path}, line {number}, is no result: expected an object with a field 'configuration'")
        results[key_of(record["configuration"])] = record
    return results


def append_result(path: str | os.PathLike[str], record: dict[str, Any]) -> None:
    """Add a line, in one write, so that several processes can share the file; on the disk when this returns."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(record, allow_nan=False) + "\n").encode()
    with path.open("ab+", buffering=0) as file:
        if size := file.seek(0, os.SEEK_END):
            file.seek(size - 1)
            if file.read(1) != b"\n":  # what a killed process left of its line
                line = b"\n" + line
        if file.write(line) != len(line):
            raise OSError(f"{path}: a result could not be written whole: is the disk full?")
        os.fsync(file.fileno())
