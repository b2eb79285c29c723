"""The pages of results say what the raw results say."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    specification = importlib.util.spec_from_file_location("results", ROOT / "benchmarks" / "results.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["results.py", "--check"])
    return module


def test_the_pages_are_made_from_the_results(results: ModuleType) -> None:
    results.main()


def test_a_number_that_was_changed_by_hand_is_found(results: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    page.write_text(text.replace("| `gdn2` | 37", "| `gdn2` | 36", 1), encoding="utf-8")
    assert page.read_text(encoding="utf-8") != text
    results.PAGES = [page]
    with pytest.raises(SystemExit, match=r"results\.md is out of date"):
        results.main()


def test_other_sizes_of_a_probe_are_not_more_seeds(
    results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (results.RESULTS / "probes" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    expected = results.accuracies()
    record = json.loads(lines[0])
    record["configuration"]["task"]["pairs"] = 32
    (tmp_path / "probes").mkdir()
    (tmp_path / "probes" / "results.jsonl").write_text("\n".join([*lines, json.dumps(record)]), encoding="utf-8")
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    results.probes.cache_clear()
    assert results.accuracies() == expected
    record["configuration"]["task"]["pairs"], record["configuration"]["steps"] = 8, 5
    (tmp_path / "probes" / "results.jsonl").write_text("\n".join([*lines, json.dumps(record)]), encoding="utf-8")
    results.probes.cache_clear()
    with pytest.raises(ValueError, match="two results of write-once with gdn2, seed 0: expected one recipe"):
        results.probes()


def test_one_seed_of_two_mixers_is_shown_as_that(results: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, found = results.comparison("small")
    some = {x: dataclasses.replace(found[x], seeds={0: found[x].seeds[0]}) for x in ("carve-read", "gdn2")}
    monkeypatch.setattr(results, "comparison", lambda name, matching="shape": (plan, some))
    rows = results.perplexities("small")[2:]
    assert len(rows) == 2
    assert all(row.endswith("| 1 of 3 |") and "±" not in row for row in rows)
    [difference] = results.differences("small")[2:]
    gap = some["carve-read"].losses("validation")[0] - some["gdn2"].losses("validation")[0]
    assert difference.startswith(f"| `carve-read` less `gdn2` | {gap:+.3f} | ")
    assert difference.endswith(" | 1 |")


def test_harder_probes_are_shown_at_the_rate_that_validation_chose(results: ModuleType) -> None:
    lines = (results.RESULTS / "probes" / "hard" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    found: dict[float, dict[int, dict]] = {}
    for record in map(json.loads, lines):
        configuration = record["configuration"]
        task = configuration["task"]
        if (task["name"], task["pairs"], configuration["mixer"]) == ("write-once", 32, "gdn2"):
            found.setdefault(configuration["learning_rate"], {})[configuration["seed"]] = record
    assert sorted(found) == [0.001, 0.003]
    best = max(found.values(), key=lambda seeds: sum(record["validation"] for record in seeds.values()))
    [case] = [case for case in results.HARD if (case.task, case.pairs) == ("write-once", 32)]
    assert results.probed_at(case)["gdn2"].accuracies == {seed: x["accuracy"] for seed, x in best.items()}


def test_gains_are_of_the_same_seeds_and_say_how_many(results: ModuleType) -> None:
    case = results.ONE_HEAD["16 pairs, 10,000 steps, 0.003"]
    mine, blind = (results.probed_at(case)[mixer].accuracies for mixer in ("carve-read-raw", "carve-blind"))
    assert set(mine) < set(blind)  # a seed is missing
    mean = 100 * sum(mine[seed] - blind[seed] for seed in mine) / len(mine)
    shown = results.gain_cell(case, "carve-read-raw", "carve-blind")
    assert shown.startswith(f"{mean:+.1f} (")
    assert shown.endswith(", 2 seeds)")
