import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from carve.bench import Shape, bench, floor_bytes, floor_operations, markdown, take_turns
from carve.cli import app

CPU = torch.device("cpu")
TINY = Shape(1, 20, heads=2, key_dim=8, value_dim=4, chunk_size=16)


def test_floors() -> None:
    """By hand, for one token and head of K = V = 128."""
    one = Shape(1, 1, heads=1)
    assert floor_bytes(one, backward=False) == 5 * 256 + 512 + 4  # q, k, v, e, o; g; w
    assert floor_bytes(one, backward=True) == (5 * 256 + 516) + (5 * 256 + 516) + (4 * 256 + 516)
    assert floor_operations(one, backward=False) == 2 * (3 * 128 * 128 + 4 * 16 * 128)
    many = Shape(2, 10, heads=3)
    assert floor_bytes(many, backward=True) == 60 * floor_bytes(one, backward=True)


def test_runs_take_turns() -> None:
    order: list[str] = []
    runs = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = take_turns(runs, 3, CPU)
    assert order == ["a", "b"] * 5  # two rounds of warm-up
    assert {name: len(ms) for name, ms in times.items()} == {"a": 3, "b": 3}


def test_rows_hold_medians_of_what_was_measured() -> None:
    rows = bench(TINY, ["torch"], ["blind", "mean", "read"], CPU, rounds=3)
    assert [row["name"] for row in rows] == ["carve blind, torch", "carve mean, torch", "carve read, torch"]
    for row in rows:
        assert row["forward_ms"] == sorted(row["raw"]["forward_ms"])[1] > 0
        assert row["both_ms"] == sorted(row["raw"]["both_ms"])[1] > 0
        assert row["peak_mib"] is None


def test_the_table_says_how_far_the_floor_is() -> None:
    shape = Shape(1, 1, heads=1)
    row = {"name": "x", "forward_ms": 2e3 * 1796 / 1e6, "both_ms": 1.0, "peak_mib": 1234.5}
    lines = markdown(shape, [row], (1e6, 1e12)).splitlines()
    assert lines[2].startswith("| x | 3.592 (2.0x) | 1.000 (0.2x) | 1,234 |")
    assert lines[3].startswith("| floor (bytes or operations) | 1.796 |")


def test_command(tmp_path: Path) -> None:
    options = {"length": 20, "heads": 2, "key-dim": 8, "value-dim": 4, "chunk-size": 16, "rounds": 1, "device": "cpu"}
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    result = CliRunner().invoke(app, ["bench", *given, "--json", str(tmp_path / "x.json")])
    assert result.exit_code == 0, result.output
    assert "| carve read, auto |" in result.output
    assert len(json.loads((tmp_path / "x.json").read_text())["rows"]) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length", "0"], "length is 0, expected a whole number of at least 1"),
        (["--rounds", "0"], "rounds is 0, expected at least 1"),
        (["--device", "gpu"], "device is 'gpu', expected one that PyTorch has here"),
        (["--backend", "fast", "--device", "cpu"], "backend is 'fast', expected one of"),
        (["--json", "/nowhere/x.json"], "no such folder: /nowhere"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert isinstance(result.exception, ValueError | OSError)
    assert message in str(result.exception)
