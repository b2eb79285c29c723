import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from typer.testing import CliRunner

from carve.bench import (
    Candidate,
    Ceilings,
    Shape,
    bench,
    draw,
    floor_bytes,
    floor_operations,
    in_turn,
    leaves_of,
    markdown,
    ours,
    take_turns,
    write_json,
)
from carve.cli import app

CPU = torch.device("cpu")
TINY = Shape(1, 20, heads=2, key_dim=8, value_dim=4, chunk_size=16)
SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu_op.py"
ABOUT = {
    "device": "a GPU",
    "torch": "2",
    "cuda": "13",
    "triton": None,
    "cuda-core": None,
    "fla-core": None,
    "date": "d",
}


# -- floors --


@pytest.mark.parametrize(("content", "projections"), [(None, 0), ("mean", 2 * 128 * 16), ("read", 2 * 128 * 16 + 16)])
def test_floor_of_bytes(content: str | None, projections: int) -> None:
    """By hand, for one token and head of K = V = 128."""
    x = draw(Shape(1, 1, heads=1), content, CPU, torch.bfloat16)
    inputs = 4 * 256 + 512 + 4 + 4 * projections  # q, k, v, e; g; w
    forward, both = floor_bytes(leaves_of(x), x["v"])
    assert forward == inputs + 256
    assert both == inputs + 256 + inputs + 256 + inputs  # forward; the inputs again, do; gradients


def test_floor_of_operations() -> None:
    one = floor_operations(Shape(1, 1, heads=1))
    assert one == (2 * (3 * 128 * 128 + 4 * 16 * 128), 2 * (14 * 128 * 128 + 12 * 16 * 128))
    assert floor_operations(Shape(2, 10, heads=3)) == tuple(60 * x for x in one)


# -- how it is measured --


def test_runs_take_turns() -> None:
    order: list[str] = []
    runs = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = take_turns(runs, 3, CPU)
    assert order == ["a", "b"] * 5  # two rounds of warm-up
    assert {name: len(ms) for name, ms in times.items()} == {"a": 3, "b": 3}


def test_inputs_take_turns() -> None:
    seen: list[int] = []
    run = in_turn([lambda i=i: seen.append(i) for i in range(3)])
    for _ in range(7):
        run()
    assert seen == [0, 1, 2, 0, 1, 2, 0]


def test_rows_hold_medians_of_what_was_measured() -> None:
    rows = bench(ours(TINY, ["torch"], ["blind", "mean", "read"], CPU), 3, CPU)
    assert [row["name"] for row in rows] == ["carve blind, torch", "carve mean, torch", "carve read, torch"]
    for row in rows:
        assert row["forward_ms"] == sorted(row["raw"]["forward_ms"])[1] > 0
        assert row["both_ms"] == sorted(row["raw"]["both_ms"])[1] > 0
        assert row["peak_mib"] is None
        assert (row["forward_operations"], row["both_operations"]) == floor_operations(TINY)


def test_a_rival_that_fails_leaves_the_other_rows() -> None:
    def fails() -> Candidate:
        raise KeyError("no such kernel")

    rows = bench({"first": fails} | ours(TINY, ["torch", "nothing"], ["mean"], CPU), 1, CPU)
    assert [row["name"] for row in rows] == ["first", "carve mean, torch", "carve mean, nothing"]
    assert rows[0]["refused"] == "KeyError: 'no such kernel'"
    assert rows[1]["forward_ms"] > 0
    assert rows[2]["refused"].startswith("ValueError: backend is 'nothing', expected one of")


# -- how it is shown --


def row_of(name: str, forward_ms: float = 2.0, both_ms: float = 9.0) -> dict:
    floors = {"forward_bytes": 10**6, "both_bytes": 3 * 10**6}
    floors |= {"forward_operations": 5 * 10**8, "both_operations": 6 * 10**9}
    raw = {"forward_ms": [forward_ms], "both_ms": [both_ms]}
    return {"name": name, "forward_ms": forward_ms, "both_ms": both_ms, "peak_mib": 1234.5, "raw": raw} | floors


LIMITS = Ceilings(bytes=1e9, operations=1e12)


def test_the_table_says_how_far_the_larger_floor_is() -> None:
    lines = markdown([row_of("x"), {"name": "y", "refused": "no | way\nout"}], LIMITS).splitlines()
    assert lines[2] == "| x | 2.000 | 1.000, 0.500 | 2.0 | 9.000 | 3.000, 6.000 | 1.5 | 1,234 |"
    assert lines[3] == "| y | no / way out | | | | | | |"
    assert len({line.count("|") for line in lines}) == 1


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


# -- the command --


def test_command(tmp_path: Path) -> None:
    options = {"length": 20, "heads": 2, "key-dim": 8, "value-dim": 4, "chunk-size": 16, "rounds": 1, "device": "cpu"}
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    result = CliRunner().invoke(app, ["bench", *given, "--content", "blind,read", "--json", str(tmp_path / "x.json")])
    assert result.exit_code == 0, result.output
    assert "| carve read, auto |" in result.output
    written = json.loads((tmp_path / "x.json").read_text())
    assert [row["name"] for row in written["rows"]] == ["carve blind, auto", "carve read, auto"]
    assert written["about"]["torch"] == torch.__version__
    assert written["ceilings"]["bytes"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length", "0"], "length is 0, expected a whole number of at least 1"),
        (["--rounds", "0"], "rounds is 0, expected at least 1"),
        (["--content", "all"], "content is 'all', expected some of blind, mean, read"),
        (["--content", ","], "content is '', expected some of blind, mean, read"),
        (["--device", "gpu"], "device is 'gpu', expected cpu or cuda"),
        (["--device", "meta"], "device is 'meta', expected cpu or cuda"),
        (["--backend", "fast", "--device", "cpu"], "backend is 'fast', expected one of"),
        (["--json", "/nowhere/x.json"], "/nowhere is not a folder"),
        (["--json", "/"], "/ is a folder, expected a file"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert isinstance(result.exception, ValueError | OSError)
    assert message in str(result.exception)


# -- the script --


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/gpu_op.py, on a CPU and small, with its results and pages in a folder of their own."""
    spec = importlib.util.spec_from_file_location("gpu_op", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in {
        "ROOT": tmp_path,
        "RESULTS": tmp_path / "results" / "gpu_op.json",
        "DEVICE": CPU,
        "MAIN": [TINY, TINY._replace(length=40)],
        "LAYERS": [TINY._replace(value_dim=8)],
        "COMPILED": (),
        "WIDTH": 16,
        "MODEL": "demo",
        "MODEL_BATCH": 1,
        "MODEL_LENGTH": 16,
        "VOCABULARY": 50,
        "STEPS": 1,
        "ROUNDS": 2,
    }.items():
        assert hasattr(module, name)
        monkeypatch.setattr(module, name, value)
    return module


def entry(*rows: dict) -> dict:
    return {"about": ABOUT, "ceilings": LIMITS._asdict(), "shape": TINY._asdict(), "rows": list(rows)}


def test_an_interrupted_run_keeps_what_it_has(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    key, other = map(str, script.MAIN)
    script.RESULTS.parent.mkdir()
    earlier = {"op": {key: entry(row_of("old")), other: entry(row_of("kept"))}, "layer": {"x": entry(row_of("kept"))}}
    write_json(script.RESULTS, earlier)
    measured = script.bench

    def bench_once(*arguments: object) -> list[dict]:
        monkeypatch.setattr(script, "bench", interrupted)
        return measured(*arguments)

    def interrupted(*arguments: object) -> list[dict]:
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "bench", bench_once)
    with pytest.raises(KeyboardInterrupt):
        script.measure(["op"], ["torch"])
    results = script.load()
    assert [row["name"] for row in results["op"][key]["rows"]] == [
        f"carve {x}, torch" for x in ("blind", "mean", "read")
    ]
    assert results["op"][other] == earlier["op"][other]
    assert results["layer"] == earlier["layer"]


def test_layer_and_model_are_measured(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """fla is not here: its rows say so."""
    script.measure(["layer", "model"], ["torch"])
    results = script.load()
    for part, field in (("layer", "both_ms"), ("model", "step_ms")):
        (found,) = results[part].values()
        *rows, rival = found["rows"]
        assert [row["name"] for row in rows] == ["carve-blind", "carve-mean", "carve-read", "gdn2"]
        assert all(row[field] > 0 for row in rows)
        assert "No module named 'fla'" in rival["refused"]
    out = capsys.readouterr().out
    assert "layer: " in out
    assert "model: " in out
    assert [len(row["raw"]["ms"]) for row in results["model"]["demo, B 1, T 16"]["rows"][:4]] == [2, 2, 2, 2]


def test_tables_go_into_the_pages(script: ModuleType) -> None:
    page = script.ROOT / "page.md"
    page.write_text(
        "before\n<!-- gpu_op op -->\nold\n<!-- end -->\nbetween\n<!-- gpu_op decode -->\n<!-- end -->\nafter\n"
    )
    decoded = {"name": "carve mean", "us": 3.5, "share_of_copy": 0.5, "steps": 1, "raw": {"ms": []}}
    results = {
        "op": {"B 1": entry(row_of("x"), {"name": "y", "refused": "too old"})},
        "decode": {"B 1": entry(decoded) | {"state_traffic_bytes": 1000}},
    }
    for _ in range(2):  # the second time the same
        script.fill(page, script.tables(results))
        text = page.read_text()
        assert text.startswith("before\n<!-- gpu_op op -->\n\nB 1\n\n| |")
        assert "| x | 2.000 |" in text
        assert "| y | too old |" in text
        assert "| carve mean | 3.50 (50%) |" in text
        assert "| floor: the state read and written | 1.00 |" in text
        assert "old\n" not in text
        assert text.endswith("<!-- end -->\nafter\n")
    page.write_text("<!-- gpu_op decades -->\n<!-- end -->")
    with pytest.raises(ValueError, match="mark for 'decades', expected one of op, decode"):
        script.fill(page, script.tables(results))


def test_tables_need_no_gpu(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    script.RESULTS.parent.mkdir()
    write_json(script.RESULTS, {"op": {str(shape): entry(row_of("carve mean, cuda")) for shape in script.MAIN}})
    (script.ROOT / "docs").mkdir()
    pages = {"README.md": "summary", "docs/kernels.md": "layer"}
    for page, name in pages.items():
        (script.ROOT / page).write_text(f"<!-- gpu_op {name} -->\n<!-- end -->\n")
    monkeypatch.setattr(sys, "argv", ["gpu_op.py", "tables"])
    script.main()
    assert "(the paper's) | 2.00 | 9.0 | 1,234 | 2.00 | 9.0 | 1,234 |" in (script.ROOT / "README.md").read_text()
    assert "| fla Gated DeltaNet-2 | not measured | | |" in (script.ROOT / "README.md").read_text()
    assert "Not measured." in (script.ROOT / "docs" / "kernels.md").read_text()


def test_ctrl_c_says_where_the_results_are(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "measure", interrupted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["gpu_op.py", "op"])
    with pytest.raises(SystemExit, match="130"):
        script.main()
    assert f"stopped; what was measured is in {script.RESULTS}" in capsys.readouterr().err


def test_the_grid_says_what_was_not_served(script: ModuleType) -> None:
    refused = {"name": "b", "refused": "ValueError: K is 16"}
    text = script.grid_table({"1": entry(row_of("a"), refused), "2": entry(row_of("a"), row_of("b"))})
    assert text.splitlines()[2:] == [
        "| 1 | 20 | 2 | 8 | 4 | 16 | 2.000 / 9.000 | no (1) |",
        "| 1 | 20 | 2 | 8 | 4 | 16 | 2.000 / 9.000 | 2.000 / 9.000 |",
        "",
        "(1) ValueError: K is 16",
    ]


FIRST = """
import os, pathlib, sys
kept = pathlib.Path(os.environ["CARVE_CACHE"], "kernel")
print("said on the way")
print(float(kept.exists()))
kept.parent.mkdir(exist_ok=True)
if sys.argv[2] != "leaves nothing":
    kept.touch()
if sys.argv[2] == "fails":
    sys.exit("no such kernel")
if sys.argv[2] == "stays":
    import time; time.sleep(100)
"""


def test_first_calls_have_an_empty_cache(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that prints whether the cache was full in place of seconds."""
    monkeypatch.setattr(script, "FIRST", FIRST)
    row = script.first_calls("cuda", "x", 60)
    assert row == {"name": "x", "empty_cache_s": 0, "full_cache_s": 1, "files": 1}
    assert script.first_calls("cuda", "fails", 60) == {"name": "fails", "refused": "no such kernel"}
    assert script.first_calls("cuda", "stays", 1)["refused"] == "not done in 1 s"
    with pytest.raises(RuntimeError, match="left nothing in the empty cache"):
        script.first_calls("cuda", "leaves nothing", 60)


def test_plots_are_drawn(script: ModuleType) -> None:
    script.RESULTS.parent.mkdir()
    shape = script.GRID["chunk"][0]
    script.plot(
        {"op": {"B 1": entry(row_of("a"))}, "grid": {str(shape): entry(row_of("a"), {"name": "b", "refused": "c"})}}
    )
    assert {path.name for path in script.RESULTS.parent.iterdir()} == {"gpu_op.png", "gpu_op_grid.png"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["ops"], "unknown part 'ops', expected some of op, decode"), (["op", "--backends", "x"], "unknown backend 'x'")],
)
def test_bad_arguments_of_the_script(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_op.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        script.main()
    assert message in capsys.readouterr().err
