"""`carve compare`: the plan, the measurements against slower ones, an interruption, and the report's numbers."""

import copy
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import carve.compare.report as report
import carve.compare.run as module
import carve.train.run as training
from carve.cli import main
from carve.compare import compare, read_plan
from carve.compare.measure import Measure, content_off, documents_of, total
from carve.compare.plan import parameters_of
from carve.compare.report import Outcome, outcomes_of, over_seeds, over_windows
from carve.compare.run import read_results
from carve.evals import perplexity
from carve.evals.mixers import mixer_fields
from carve.models import CarveConfig, CarveForCausalLM
from carve.train.data import tokenise
from carve.train.tokenizer import load_tokenizer
from tests.tolerances import tolerance

ROOT = Path(__file__).parents[1]
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "while", "seven", "wizards", "boil", "jam"]
TINY = {"hidden_size": 16, "num_heads": 2, "head_dim": 8, "intermediate_size": 32, "chunk_size": 8, "content_rank": 4}
TEXTS = {"train": [500] * 20, "valid": [150, 40, 90], "test": [70, 120]}  # characters of each document


def words(generator: np.random.Generator, size: int) -> str:
    return " ".join(generator.choice(WORDS, size))[:size]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp("texts"), np.random.default_rng(0)
    for name, lengths in TEXTS.items():
        lines = [json.dumps({"text": words(generator, length)}) for length in lengths]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def comparison(**fields) -> dict:
    train = {
        "data": "train.jsonl", "validation": "valid.jsonl", "seq_len": 32, "batch_tokens": 128,
        "micro_batch": 4, "steps": 6, "warmup_steps": 1, "log_every": 2,
        "model": {**TINY, "num_hidden_layers": 1, "sliding_window": 16, "initializer_range": 0.1},
    }  # fmt: skip
    train |= fields.pop("train", {})
    whole = {"train": train, "mixers": {"carve-read": None, "gdn2": None}, "baseline": "gdn2", "seeds": 2}
    return whole | {"learning_rates": [1e-2], "tests": {"test": "test.jsonl"}} | fields


def write(path, **fields):
    path.write_text(yaml.safe_dump(comparison(**fields)))
    return path


@pytest.fixture(scope="module")
def whole(texts, tmp_path_factory):
    """A finished comparison: its file and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    file = write(folder / "toy.yaml")
    assert compare(file, folder / "out", text=texts)
    return file, folder / "out"


def trained(name: str, layers: int = 2, **fields) -> CarveForCausalLM:
    """A model in float64 whose content is heard."""
    torch.manual_seed(0)
    config = {**TINY, "vocab_size": 258, "sliding_window": 16, "initializer_range": 0.3}
    model = CarveForCausalLM(CarveConfig(**{**config, **mixer_fields(name, layers), **fields})).double().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(("p_up", "p_write")):
                parameter.normal_(std=2.0)
    return model


# -- measuring --


@pytest.fixture(scope="module")
def valid(texts, tmp_path_factory):
    return tokenise(str(texts / "valid.jsonl"), load_tokenizer("bytes"), tmp_path_factory.mktemp("cache"))


MEASURE = Measure(seq_len=32, micro_batch=4, dtype="float32")


@pytest.mark.parametrize("name", ["carve-read", "carve-mean", "gdn2-hybrid"])
def test_the_scores_are_those_of_perplexity(name, texts, valid):
    model = trained(name)
    documents = [json.loads(line)["text"] for line in (texts / "valid.jsonl").open()]
    expected = perplexity(model, load_tokenizer("bytes"), documents, window=32)
    score = MEASURE.score_text(model, valid, carried=name != "gdn2-hybrid")
    assert score["tokens"] == expected.tokens == sum(len(x) - 1 for x in documents_of(valid))
    assert score["nats"] == pytest.approx(expected.nats, rel=tolerance("compare_float64"))
    assert (
        sum(tokens for _, tokens in score["windows"]) == sum(row[3] for row in score["by_context"]) == score["tokens"]
    )
    if name != "gdn2-hybrid":
        expected = perplexity(model, load_tokenizer("bytes"), documents, piece=7)
        assert score["carried"]["tokens"] == expected.tokens
        assert score["carried"]["nats"] == pytest.approx(expected.nats, rel=tolerance("compare_float64"))
        low, high, _, tokens = score["carried"]["by_position"][-1]
        assert (low, high) == (129, 256)
        assert tokens == 149 - 128  # of the longest document, behind its first 128 predictions


def test_switching_the_content_off_gives_the_blind_model(valid):
    model, windows = trained("carve-read"), MEASURE.windows(valid)
    blind = trained("carve-read", content=None)
    blind.load_state_dict({name: x for name, x in model.state_dict().items() if ".p_" not in name}, strict=True)
    own, expected = (total(MEASURE.score_windows(each, windows))["nats"] for each in (model, blind))
    with content_off(model):
        off = total(MEASURE.score_windows(model, windows))["nats"]
    assert off == pytest.approx(expected, rel=tolerance("compare_float64"))
    assert abs(off - own) > tolerance("compare_content_effect")
    assert total(MEASURE.score_windows(model, windows))["nats"] == own  # and it is on again


@pytest.mark.parametrize("name", ["carve-read", "carve-mean"])
def test_another_sequences_content(name, valid):
    """Of a window paired with itself it is its own; of a pair it is what each would see alone, put in by hand."""
    model = trained(name, layers=1)
    first, second = MEASURE.windows(valid)[:2]
    own = MEASURE.score_windows(model, [first, second])
    by_chunks = MEASURE.score_by_chunks(model, [first, second], swapped=False)
    twice = MEASURE.score_by_chunks(model, [first, first], swapped=True)
    for found, expected in zip([*by_chunks, *twice], [*own, own[0], own[0]], strict=True):
        np.testing.assert_allclose(found, expected, rtol=tolerance("compare_float64"))
    swapped = MEASURE.score_by_chunks(model, [first, second], swapped=True)
    for found, expected in zip(swapped, own, strict=True):
        np.testing.assert_allclose(found[:8], expected[:8], rtol=tolerance("compare_float64"))  # nothing is stored yet
        assert np.abs(found[8:] - expected[8:]).max() > tolerance("compare_content_effect")


def test_scores_that_are_no_numbers_are_refused(valid):
    model = trained("gdn2-hybrid")
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan  # which nothing before it sees
    with pytest.raises(FloatingPointError, match="the loss of a token is not finite"):
        MEASURE.score_windows(model, MEASURE.windows(valid))


def test_what_the_content_does_is_reported(valid):
    found = MEASURE.content_report(trained("carve-read"), load_tokenizer("bytes"), valid)
    assert found["off"]["tokens"] == sum(len(x) - 1 for x in documents_of(valid))
    assert found["swapped"]["tokens"] == 2 * 32 * (sum((len(x) - 1) // 32 for x in documents_of(valid)) // 2)
    assert [layer["layer"] for layer in found["gates"]] == [0, 1]
    for layer in found["gates"]:
        assert len(layer["erase_shift"]) == len(layer["write_shift"]) == 2
        assert min(layer["erase_shift"] + layer["write_shift"]) > 0
    assert (
        MEASURE.content_report(trained("carve-read", chunk_size=32), load_tokenizer("bytes"), valid)["swapped"] is None
    )


# -- the plan --


def facts(names=("data", "validation", "test")) -> dict:
    return {"vocab_size": 258, "fingerprints": dict.fromkeys(names, "x")}


def test_widths_give_equal_parameters(tmp_path):
    mixers = {"carve-mean": None, "gdn2": None, "kda": None, "full_attention": None, "gdn2-hybrid": None}
    model = {**TINY, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4}
    file = write(tmp_path / "c.yaml", mixers=mixers, matching=["shape", "parameters"], train={"model": model})
    plan = read_plan(file).with_facts(facts())
    target = parameters_of(plan.model("gdn2", "shape"))["all"]
    for label in mixers:
        same, fitted = plan.model(label, "shape"), plan.model(label, "parameters")
        assert same["intermediate_size"] == 160
        assert {**fitted, "intermediate_size": 160} == same
        built = CarveForCausalLM(CarveConfig(**fitted))
        count = sum(p.numel() for p in built.parameters())
        assert abs(count - target) <= 0.005 * target
        assert parameters_of(fitted) == {
            "all": count,
            "without embeddings": count - 258 * 64,
            "mixers": sum(p.numel() for name, p in built.named_parameters() if ".mixer." in name),
        }
    assert plan.model("kda", "parameters")["intermediate_size"] != 160
    assert plan.run("gdn2", "shape", 1e-2, 0).key == plan.run("gdn2", "parameters", 1e-2, 0).key  # trained once
    narrow = write(tmp_path / "n.yaml", matching=["parameters"], mixers={"gdn2": None, "big": {"mixer": "carve-read",
        "model": {"content_rank": 4000}}})  # fmt: skip
    with pytest.raises(ValueError, match="mixers has 'big': no width of its MLP gives"):
        read_plan(narrow).with_facts(facts())


def test_the_best_rate_of_each_mixer_is_used_for_all_its_seeds(tmp_path):
    mixers = {"carve-read": None, "gdn2": {"seeds": 1}}
    file = write(
        tmp_path / "c.yaml", mixers=mixers, learning_rates=[1e-3, 1e-2, 1e-1], matching=["shape", "parameters"]
    )
    plan = read_plan(file).with_facts(facts())
    assert [run.described for run in plan.wanted({})] == [
        f"{label}, learning rate {rate}, seed 0" for label in mixers for rate in ("0.001", "0.01", "0.1")
    ]
    assert plan.left({}) == 6 + 3  # 2 seeds x 2 matchings, less the one that the sweep has; gdn2's is there
    best = {"carve-read": 1e-2, "gdn2": 1e-1}
    results = {}
    for label in mixers:
        for run in plan.sweep(label):
            nats = 1.0 if run.train["learning_rate"] == best[label] else 2.0
            results[run.key] = {"texts": {"validation": {"nats": nats, "tokens": 1}}}
    assert {label: plan.best_rate(label, results) for label in mixers} == best
    left = [(run.label, run.train["learning_rate"], run.train["seed"]) for run in plan.wanted(results)]
    assert left == [("carve-read", 1e-2, 0), ("carve-read", 1e-2, 1), ("carve-read", 1e-2, 1)]
    assert [run.described for run in plan.wanted(results)] == [
        "carve-read at equal parameters, learning rate 0.01, seed 0",
        "carve-read, learning rate 0.01, seed 1",
        "carve-read at equal parameters, learning rate 0.01, seed 1",
    ]
    assert plan.left(results) == 3
    run = plan.sweep("gdn2")[2]
    results[run.key] = {"texts": {}, "diverged": "..."}
    assert plan.best_rate("gdn2", results) == 1e-3


def test_the_comparisons_that_come_with_the_package(tmp_path):
    page = re.search("```yaml\n(.*?)```", (ROOT / "docs" / "compare.md").read_text(), re.DOTALL)
    (tmp_path / "page.yaml").write_text(page[1])
    plans = {
        path.stem: read_plan(path) for path in [*(ROOT / "benchmarks" / "compare").glob("*.yaml"), *tmp_path.iterdir()]
    }
    languages = ["language", "language_parameters", "language_rates"]
    assert sorted(plans) == ["ablations", *languages, "page", "small", "toy"]
    for plan in plans.values():
        assert plan.with_facts(facts()).left({})
    assert plans["small"].common == plans["ablations"].common  # the same but for the mixers
    assert all(plans[name].common == plans["language"].common for name in languages)
    toy = plans["toy"]  # runs from a fresh clone
    assert all((ROOT / path).is_file() for path in (toy.train["data"], toy.train["validation"], *toy.tests.values()))


def test_variants_override_the_model(tmp_path):
    variant = {"mixer": "carve-read", "model": {"chunk_size": 4, "content_norm": None}, "train": {"content_lr": 3.0}}
    file = write(tmp_path / "c.yaml", mixers={"gdn2": None, "read, chunk 4": variant})
    run = read_plan(file).with_facts(facts()).run("read, chunk 4", "shape", 1e-2, 1)
    assert (run.train["seed"], run.train["content_lr"]) == (1, 3.0)
    model = run.configuration["train"]["model"]
    assert (model["content"], model["content_norm"], model["chunk_size"]) == ("read", None, 4)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"mixers": {"gdn2": None, "carve-red": None}}, "there is no mixer 'carve-red'; did you mean 'carve-read'"),
        ({"mixers": {"gdn2": {"modle": {}}}}, "'modle' is no field of mixers: gdn2; did you mean 'model'"),
        ({"mixers": {"gdn2": {"model": {"chunksize": 4}}}}, "did you mean 'chunk_size'"),
        ({"mixers": {"gdn2": {"train": {"steps": 3}}}}, "'steps' is no field of mixers: gdn2: train"),
        ({"mixers": {"gdn2": {"seeds": 0}}}, "seeds is 0, expected an integer of at least 1"),
        ({"train": {"learning_rate": 1.0}}, "'learning_rate' is no field of train"),
        ({"baseline": "kda"}, "baseline is 'kda', expected one of the mixers: carve-read, gdn2"),
        ({"learning_rates": []}, "learning_rates is"),
        ({"train": {"model": {"content": "read"}}}, "train: model: content is what mixers differ in, expected it"),
        ({"train": {"model": {"vocab_size": 300}}}, "train: model: vocab_size is 300, expected none: it is"),
        ({"mixers": {"gdn2": {"model": {"vocab_size": 9}}}}, "mixers: gdn2: model: vocab_size is 9, expected none"),
        ({"learning_rates": ["fast"]}, "expected a list of different positive numbers"),
        ({"matching": ["size"]}, "matching is"),
        ({"tests": {"validation": "x"}}, "expected another name"),
        ({"tests": {"data": "x"}}, "tests has 'data', expected another name"),
        ({"train": {"out": "x"}}, "'out' is no field of train"),
        ({"train": {"validation": None}}, "validation is None, expected a path"),
        ({"train": {"batch_tokens": 100}}, "batch_tokens is 100, expected a multiple"),
        ({"mixers": {"gdn2": None, "full_attention": {"model": {"max_position_embeddings": 16}}}},
         "sequences of 32 tokens, but the model has max_position_embeddings = 16"),
        ({"sead": 1}, "'sead' is no field of a comparison; did you mean 'seeds'"),
        # -- of another kind than expected --
        ({"mixers": ["gdn2"]}, r"mixers is \['gdn2'\], expected a mapping"),
        ({"mixers": {1: None}}, "mixers has the name 1, expected a string"),
        ({"mixers": {"gdn2": "kda"}}, "mixers: gdn2 is 'kda', expected a mapping"),
        ({"mixers": {"gdn2": {"mixer": ["kda"]}}}, r"mixers: gdn2: mixer is \['kda'\], expected a name"),
        ({"mixers": {"gdn2": {"mixer": None}}}, "mixers: gdn2: mixer is None, expected a name"),
        ({"mixers": {"gdn2": {"model": ["x"]}}}, r"mixers: gdn2: model is \['x'\], expected a mapping"),
        ({"mixers": {"gdn2": {"train": "content_lr"}}}, "mixers: gdn2: train is 'content_lr', expected a mapping"),
        ({"mixers": {"gdn2": {"train": {"content_lr": "2"}}}}, "mixers: gdn2: content_lr is '2', expected float"),
        ({"mixers": {"gdn2": {"model": {"chunk_size": None}}}}, "'chunk_size' expected int, got NoneType"),
        ({"mixers": {"gdn2": {"model": {"num_hidden_layers": "2"}}}}, "num_hidden_layers is '2', expected an integer"),
        ({"mixers": {"gdn2": {"model": {"num_hidden_layers": None}}}}, "num_hidden_layers is None, expected an integ"),
        ({"mixers": {"gdn2": {"model": {"hidden_act": "no"}}}}, "hidden_act is 'no', expected one of"),
        ({"mixers": {"gdn2": {"seeds": None}}}, "seeds is None, expected an integer of at least 1"),
        ({"seeds": "3"}, "seeds is '3', expected an integer of at least 1"),
        ({"train": {"model": ["x"]}}, r"train: model is \['x'\], expected a mapping"),
        ({"train": {"model": {"hidden_size": None}}}, "'hidden_size' expected int, got NoneType"),
        ({"train": {"steps": "6"}}, "steps is '6', expected int"),
        ({"train": {"data": ["x"]}}, r"train: data is \['x'\], expected a path"),
        ({"baseline": ["gdn2"]}, r"baseline is \['gdn2'\], expected one of the mixers"),
        ({"learning_rates": 1e-3}, "learning_rates is 0.001, expected a list of different positive numbers"),
        ({"learning_rates": [math.inf]}, r"learning_rates is \[inf\]"),
        ({"learning_rates": [1, 1.0]}, r"learning_rates is \[1, 1.0\], expected a list of different"),
        ({"matching": [{"shape": 1}]}, "matching is .*, expected a list of 'shape' and 'parameters'"),
        ({"tests": ["test.jsonl"]}, r"tests is \['test.jsonl'\], expected a mapping"),
        ({"tests": {"test": None}}, "tests: test is None, expected a path"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit(fields, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        read_plan(write(tmp_path / "c.yaml", **fields))


def refused(capsys, monkeypatch, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", ["carve", "compare", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert errors.startswith("carve: error: ")
    return errors


def test_texts_that_are_not_there(texts, tmp_path, capsys, monkeypatch):
    file, out = write(tmp_path / "c.yaml"), tmp_path / "out"
    assert "no file" in refused(capsys, monkeypatch, tmp_path / "none.yaml")
    assert "no such file" in refused(capsys, monkeypatch, file, "--text", tmp_path, "--out", out)
    for name in TEXTS:
        (tmp_path / f"{name}.jsonl").write_text((texts / f"{name}.jsonl").read_text())
    (tmp_path / "test.jsonl").write_text("")
    assert "test is" in (errors := refused(capsys, monkeypatch, file, "--text", tmp_path, "--out", out))
    assert "which is empty" in errors
    (tmp_path / "test.jsonl").write_text('{"text": ""}\n')
    errors = refused(capsys, monkeypatch, file, "--text", tmp_path, "--out", out)
    assert "test is" in errors
    assert "which holds no text" in errors
    (tmp_path / "test.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "valid.jsonl").write_text('{"text": "too short"}\n')
    assert "expected at least 32" in refused(capsys, monkeypatch, file, "--text", tmp_path, "--out", out)
    assert not (out / "comparison.json").exists()  # or the text, once mended, would be another comparison's
    (tmp_path / "valid.jsonl").write_text((texts / "valid.jsonl").read_text())
    assert "test is" in (errors := refused(capsys, monkeypatch, file, "--text", tmp_path, "--out", out))
    assert "expected a document of two tokens or more" in errors
    unknown = write(tmp_path / "t.yaml", train={"tokenizer": "tokenizer"})
    assert "neither 'bytes' nor one that loads" in refused(capsys, monkeypatch, unknown, "--text", texts, "--out", out)
    assert "minutes is inf" in refused(capsys, monkeypatch, file, "--text", texts, "--minutes", "inf")
    hub = write(tmp_path / "h.yaml", train={"data": "hub:some/text"})
    assert "a comparison takes none of the Hub" in refused(capsys, monkeypatch, hub)
    folder = write(tmp_path / "f.yaml", train={"data": "."})
    assert "within data = " in refused(capsys, monkeypatch, folder, "--text", tmp_path, "--out", tmp_path / "out")
    assert "minutes is 0.0" in refused(capsys, monkeypatch, file, "--text", texts, "--minutes", 0)
    assert "no comparison.json" in refused(capsys, monkeypatch, file, "--out", tmp_path / "new", "--report")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    found = refused(capsys, monkeypatch, file, "--text", texts, "--out", tmp_path / "run")
    assert "run holds config.yaml but no comparison.json: expected a new folder" in found
    assert not (out / "runs").exists()


def test_results_of_another_comparison(whole, texts, tmp_path, capsys, monkeypatch):
    _, out = whole
    assert compare(write(tmp_path / "l.yaml", train={"log_every": 1}), out, report_only=True)  # which decides nothing
    longer = write(tmp_path / "c.yaml", train={"steps": 7})
    errors = refused(capsys, monkeypatch, longer, "--out", out, "--text", texts)
    assert "results of another comparison: train: steps is 6 there, 7 here" in errors
    for name in TEXTS:
        (tmp_path / f"{name}.jsonl").write_text((texts / f"{name}.jsonl").read_text())
    (tmp_path / "train.jsonl").write_text((texts / "train.jsonl").read_text() + '{"text": "more"}\n')
    errors = refused(capsys, monkeypatch, write(tmp_path / "d.yaml"), "--out", out, "--text", tmp_path)
    assert "texts: fingerprints: data is" in errors


# -- the whole --


def test_every_mixer_sees_the_same_data_in_the_same_order(texts, tmp_path, monkeypatch):
    seen: dict[str, list] = {}
    forward = CarveForCausalLM.forward

    def remember(self, *args, **kwargs):
        if self.training:
            seen.setdefault(self.config.layer_types[0], []).append(kwargs["input_ids"])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(CarveForCausalLM, "forward", remember)
    monkeypatch.setattr(module, "measure_speed", lambda runs, device: [{}] * len(runs))
    monkeypatch.setattr(module, "write_report", lambda *_: "")
    file = write(tmp_path / "c.yaml", seeds=1, train={"steps": 2}, mixers={"gdn": None, "full_attention": None},
                 baseline="gdn", tests={})  # fmt: skip
    assert compare(file, tmp_path / "out", text=texts)
    assert len(seen["gdn"]) == 2
    for one, other in zip(seen["gdn"], seen["full_attention"], strict=True):
        assert torch.equal(one, other)


def test_an_interrupted_comparison_goes_on(whole, texts, tmp_path, monkeypatch, capsys):
    """The time is over within the second run: it is saved, taken up again, and ends as without the interruption.

    In between the texts and the results are moved, and a default and a number are written down in another way.
    """
    _, out = whole
    expected = read_results(out)

    class Alarm(training.ShowProgress):
        runs = 0

        def on_step_begin(self, args, state, control, **_):
            Alarm.runs += state.global_step == 0
            if Alarm.runs == 2 and state.global_step == 3:
                os.kill(os.getpid(), signal.SIGALRM)

    monkeypatch.setattr(module, "measure_speed", lambda runs, device: [{}] * len(runs))
    monkeypatch.setattr(module, "write_report", lambda *_: "")
    short = write(tmp_path / "c.yaml", seeds=1)
    with monkeypatch.context() as patch:
        patch.setattr(training, "ShowProgress", Alarm)
        assert compare(short, tmp_path / "out", text=texts, minutes=60)  # in time, so that it is no failure
    left = tmp_path / "out" / "tokens" / "abc.partial-1"  # of a process that was killed
    left.mkdir()
    assert "stopped with 1 runs left" in capsys.readouterr().err
    assert len(read_results(tmp_path / "out")) == 1
    assert len(list((tmp_path / "out" / "runs").glob("*/checkpoint-4"))) == 1
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    def no_first_steps(self, args, state, control, **_):
        assert state.global_step >= 4

    with monkeypatch.context() as patch:
        patch.setattr(Alarm, "on_step_begin", no_first_steps)
        patch.setattr(training, "ShowProgress", Alarm)
        shutil.copytree(texts, tmp_path / "texts")
        (tmp_path / "out").rename(tmp_path / "moved")
        fields = yaml.safe_load(short.read_text())
        fields["train"] |= {"clip": 1, "model": {**fields["train"]["model"], "conv_size": 4}}
        moved = write(tmp_path / "moved.yaml", **fields)
        assert compare(moved, tmp_path / "moved", text=tmp_path / "texts")
    assert not (tmp_path / "moved" / "tokens" / left.name).exists()
    found = read_results(tmp_path / "moved")
    assert len(found) == 2
    for key in found:
        assert found[key] == expected[key]
    monkeypatch.setattr(module, "make", None)
    assert compare(short, tmp_path / "moved", text=texts)  # nothing is left to do


def test_a_run_that_another_process_has_is_left_to_it(whole, texts, tmp_path, monkeypatch):
    """Here the other one holds the lock of the first run, and gives it back without a result."""
    file, _ = whole
    made, out = [], tmp_path / "out"

    def make(plan, run, texts, out):
        made.append(run.described)
        if len(made) == 3:
            held.__exit__(None, None, None)
        score = {"nats": 1.0, "tokens": 1}
        return {"texts": {"validation": score}, "device": "CPU"}

    monkeypatch.setattr(module, "make", make)
    monkeypatch.setattr(module, "measure_speed", lambda runs, device: [{}] * len(runs))
    monkeypatch.setattr(module, "write_report", lambda *_: "")
    plan = read_plan(file, texts)
    known = json.loads((whole[1] / "comparison.json").read_text())["texts"]
    runs = plan.with_facts(known).wanted({})
    held = module.locked(out / "runs" / f"{runs[0].key}.lock")
    assert held.__enter__()
    assert compare(file, out, text=texts)
    assert made == [run.described for run in (*runs[1:], runs[0])]


@pytest.mark.parametrize("steps", [1, 6])  # only behind the last step; and within the training
def test_where_every_run_diverges_the_report_says_so(steps, texts, tmp_path):
    train = {"steps": steps, "warmup_steps": 0, "log_every": 1}
    file = write(tmp_path / "c.yaml", learning_rates=[1e39, 1e40], train=train)
    assert compare(file, tmp_path / "out", text=texts)
    results = read_results(tmp_path / "out")
    assert len(results) == 6
    for record in results.values():
        assert record["texts"] == {}
        assert "finite" in record["diverged"]
    page = (tmp_path / "out" / "c.md").read_text()
    for label in ("carve-read", "gdn2"):
        assert row(page, "Equal shape", label)[-1] == "2, 2 diverged"
        assert row(page, "Perplexity:", label) == ["diverged", "diverged"]
        assert row(page, "## Learning rates", label) == ["**diverged**", "diverged", ""]
    assert "Nothing to compare with on test: gdn2 diverged." in page


def test_a_run_that_diverges_does_not_end_the_others(texts, tmp_path):
    mixers = {"carve-read": {"train": {"content_lr": 1e35}}, "gdn2": None}
    file = write(tmp_path / "c.yaml", mixers=mixers, learning_rates=[1e-3], seeds=1)
    assert compare(file, tmp_path / "out", text=texts)
    page = (tmp_path / "out" / "c.md").read_text()
    assert row(page, "Perplexity:", "carve-read") == ["diverged", "diverged"]
    assert all(float(cell) > 1 for cell in row(page, "Perplexity:", "gdn2"))
    assert "Against gdn2" not in page


def test_a_perplexity_that_no_float_holds_is_that_of_a_run_that_diverged(texts, tmp_path, monkeypatch):
    plan, read = module.read_texts(read_plan(write(tmp_path / "c.yaml"), texts), tmp_path)
    monkeypatch.setattr(Measure, "score_text", lambda *_, **__: {"nats": 7e5, "tokens": 900})
    record = module.make(plan, plan.wanted({})[0], read, tmp_path)
    assert record["texts"] == {}
    assert record["diverged"] == "the loss on validation is 778 nats a token, whose perplexity is not finite"


def row(page: str, section: str, label: str) -> list[str]:
    """The cells of a mixer's row in the first table behind a line of that text."""
    behind = page[page.index(section) :]
    line = next(line for line in behind.splitlines() if line.startswith(f"| {label} |"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_the_reports_numbers(whole, texts):
    """Computed again, from the files of results alone."""
    _, out = whole
    runs, keys = {}, {}
    for path in (out / "results").iterdir():
        record = json.loads(path.read_text())
        train = record["configuration"]["train"]
        runs[train["model"]["layer_types"][0], train["seed"]] = record
        keys[train["model"]["layer_types"][0], train["seed"]] = path.stem
    speeds = json.loads((out / "speed.json").read_text())
    assert sorted(runs) == [(kind, seed) for kind in ("carve", "gdn2") for seed in (0, 1)]
    page = (out / "toy.md").read_text()

    def losses(kind, text):
        return [runs[kind, seed]["texts"][text]["nats"] / runs[kind, seed]["texts"][text]["tokens"] for seed in (0, 1)]

    for label, kind in (("carve-read", "carve"), ("gdn2", "gdn2")):
        for at, text in enumerate(("validation", "test")):
            found = [math.exp(x) for x in losses(kind, text)]
            expected = f"{sum(found) / 2:.3f} ± {abs(found[0] - found[1]) / math.sqrt(2):.3f}"
            assert row(page, "Perplexity:", label)[at] == expected
        speed = speeds[keys[kind, 0]]["tokens_per_second"]
        counts = runs[kind, 0]["parameters"]
        expected = [f"{counts[name]:,}" for name in ("all", "without embeddings", "mixers")]
        assert row(page, "Equal shape", label) == [*expected, "32", f"{statistics.median(speed):,.0f}", "–", "2"]

    for text in ("validation", "test"):
        first, second = (a - b for a, b in zip(losses("carve", text), losses("gdn2", text), strict=True))
        mean, error = (first + second) / 2, abs(first - second) / 2
        cells = row(page, f"Against gdn2 on {text}", "carve-read")
        assert cells[:2] == [f"{mean:+.4f}", f"{100 * (math.exp(mean) - 1):+.2f} %"]
        # Student's t of one degree of freedom is Cauchy's distribution: its 97.5 % quantile is tan(0.475 pi).
        reach = math.tan(0.475 * math.pi) * error
        assert cells[2] == f"{mean - reach:+.4f} to {mean + reach:+.4f}"
        low, high = map(float, cells[3].split(" to "))
        assert low < mean < high

    whole_, off = runs["carve", 0]["texts"]["validation"], [runs["carve", seed]["content"]["off"] for seed in (0, 1)]
    rises = [x["nats"] / x["tokens"] - loss for x, loss in zip(off, losses("carve", "validation"), strict=True)]
    mean, error = sum(rises) / 2, abs(rises[0] - rises[1]) / math.sqrt(2)
    assert off[0]["tokens"] == whole_["tokens"]
    assert row(page, "What the trained content term does", "carve-read")[0] == f"{mean:+.4f} ± {error:.4f}"
    pictures = re.findall(r"\]\((\w+\.png)\)", page)
    for name in pictures:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert sorted(pictures) == [f"toy_{name}.png" for name in ("gates", "perplexity", "position")]


def test_the_report_alone_needs_no_text(whole, tmp_path, monkeypatch, capsys):
    file, out = whole
    before = (out / "toy.md").read_text()
    (out / "toy.md").unlink()
    monkeypatch.setattr(sys, "argv", ["carve", "compare", str(file), "--out", str(out), "--report"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert capsys.readouterr().out.strip() == str(out / "toy.md")
    assert (out / "toy.md").read_text() == before


@pytest.mark.parametrize("fields", [{}, {"learning_rates": [1e-3]}])
def test_nothing_is_not_reported(fields, whole, tmp_path, capsys, monkeypatch):
    """Neither where there is no result at all, nor where those there are, are of other runs."""
    out = tmp_path / "toy"
    shutil.copytree(whole[1], out, ignore=shutil.ignore_patterns("toy*", *([] if fields else ["results"])))
    file = write(tmp_path / "other.yaml", **fields)
    said = refused(capsys, monkeypatch, file, "--out", out, "--report")
    assert f"{out} holds no result of this comparison: expected some" in said
    assert not (out / "other.md").exists()


def outcome(label: str, seeds: list[list[list[float]]]) -> Outcome:
    """A mixer with the windows of a text `[seeds][windows]` of (nats, tokens)."""
    scores = [
        {"nats": sum(x for x, _ in windows), "tokens": sum(n for _, n in windows), "windows": windows}
        for windows in seeds
    ]
    return Outcome(label, "shape", None, {i: {"texts": {"test": x}} for i, x in enumerate(scores)}, len(seeds), None)


def test_intervals():
    """The bootstrap is as wide as the standard error says; differences that do not vary have no width."""
    generator = np.random.default_rng(1)
    base = generator.normal(300, 30, 4000)
    shift = generator.normal(-1, 2, 4000)
    ours, other = outcome("a", [[[x, 100] for x in base + shift]]), outcome("b", [[[x, 100] for x in base]])
    assert over_seeds(ours, other, "test") is None  # of one seed
    mean, low, high = over_windows(ours, other, "test")
    error = shift.std() / math.sqrt(4000) / 100
    assert mean == pytest.approx(shift.mean() / 100)
    assert [low, high] == pytest.approx([mean - 1.96 * error, mean + 1.96 * error], rel=tolerance("compare_bootstrap"))

    alike = np.repeat(shift[:1000], 4)  # four neighbours of a document each
    ours, other = outcome("a", [[[x, 100] for x in base + alike]]), outcome("b", [[[x, 100] for x in base]])
    mean, low, high = over_windows(ours, other, "test")
    assert 1.7 < (high - low) / (2 * 1.96 * alike.std() / math.sqrt(4000) / 100) < 2.1  # 2, but for the blocks' ends

    seeds = [-0.01, -0.03, -0.02]
    ours, other = outcome("a", [[[300 + 100 * d, 100]] for d in seeds]), outcome("b", [[[300, 100]]] * 3)
    found = over_seeds(ours, other, "test")
    reach = 4.302653 * 0.01 / math.sqrt(3)  # Student's t of two degrees of freedom, from a table
    assert found == pytest.approx((-0.02, -0.02 - reach, -0.02 + reach), rel=tolerance("compare_bootstrap"))
    assert over_windows(ours, other, "test") == pytest.approx((-0.02, -0.02, -0.02))


def test_positions_are_compared_over_the_seeds_that_both_have():
    ours, base = outcome("a", [[[3.1, 1]]]), outcome("b", [[[x, 1]] for x in (3.0, 4.0, 5.0)])
    for x in (ours, base):
        for result in x.seeds.values():
            score = result["texts"]["test"]
            score["by_context"] = [[1, 64, score["nats"], 1]]
    assert report.by_position([ours, base], base, "test")[-1] == "| a | +0.1000 |"
    assert report.position_losses(base, base, "test", "by_context") == {(1, 64): 4.0}


# -- the report, from numbers made up so that all of it can be worked out by hand --


def scored(loss: float, context: list, carried: list) -> dict:
    """A text of two windows, of 10 and 30 tokens, with the same loss; `(nats, tokens)` by place, from 1 to 64 on."""
    ends = [(1, 64), (65, 128), (129, 256)]
    places = [[[*at, *x] for at, x in zip(ends, some, strict=False)] for some in (context, carried)]
    windows = [[10 * loss, 10], [30 * loss, 30]]
    whole = {"nats": 40 * loss, "tokens": 40, "windows": windows, "by_context": places[0]}
    return whole | {"carried": {"by_position": places[1]}}


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """A plan, results and speeds: gdn2 is best at 0.01, carve-read at 0.1, the edge; there they have two seeds."""
    file = write(tmp_path_factory.mktemp("plan") / "c.yaml", learning_rates=[1e-2, 1e-3, 1e-1])
    plan, results, speed = read_plan(file).with_facts(facts()), {}, {}
    sweeps = {"gdn2": {1e-3: 2.5, 1e-2: 2.0, 1e-1: None}, "carve-read": {1e-3: 3.0, 1e-2: 2.2, 1e-1: 2.1}}
    for label, losses in sweeps.items():
        for run in plan.sweep(label):
            loss = losses[run.train["learning_rate"]]
            texts = {} if loss is None else {"validation": scored(loss, [], [])}
            results[run.key] = {"texts": texts, "device": "CPU"} | ({"diverged": "..."} if loss is None else {})
    counts = {"all": 5000, "without embeddings": 3000, "mixers": 1000}
    gates = [
        {"erase_shift": [0.1, 0.3], "write_shift": [0.2, 0.2], "same": [0.5, 0.7], "beside": [0.01, 0.03]},
        {"erase_shift": [0.1, 0.5], "write_shift": [0.0, 0.4], "same": [0.6, 0.6], "beside": [0.02, 0.06]},
    ]
    for seed, (validation, test, context) in enumerate(
        [(2.0, 1.0, [(12, 10), (8, 10)]), (2.4, 1.0, [(24, 20), (8, 10)])]
    ):
        texts = {"validation": scored(validation, [], []), "test": scored(test, context, [(10, 10), (20, 10), (3, 1)])}
        results[plan.run("gdn2", "shape", 1e-2, seed).key] = {"texts": texts, "device": "GPU", "parameters": counts}
    for seed, (validation, test, context) in enumerate(
        [(2.1, 0.5, [(7, 10), (3, 10)]), (2.7, 0.7, [(11, 10), (3, 10)])]
    ):
        texts = {"validation": scored(validation, [], []), "test": scored(test, context, [(15, 10), (19, 10)])}
        content = {
            "off": {"nats": 40 * validation + [4, 12][seed], "tokens": 40},
            "swapped": {"tokens": 20, "own": 10, "other": [12, 10][seed]},
            "gates": [{"layer": 3, **gates[seed]}],
        }
        record = {"texts": texts, "device": "CPU", "parameters": counts, "content": content}
        results[plan.run("carve-read", "shape", 1e-1, seed).key] = record
    for label, rate, rounds in (("gdn2", 1e-2, [1100, 100, 2100]), ("carve-read", 1e-1, [700, 900, 100])):
        record = {"tokens_per_second": rounds, "peak_bytes": 300 << 20 if label == "gdn2" else None}
        record["device"] = "NVIDIA H100"
        speed[plan.run(label, "shape", rate, 0).key] = record
    return plan, results, speed


def test_a_page_worked_out_by_hand(made_up, tmp_path):
    page = report.write_report(*made_up, tmp_path / "c").read_text()
    assert "6 steps of 128 tokens, 0.000768 M in all" in page
    assert "Device: CPU, GPU." in page
    assert "Not complete" not in page
    sizes = ["5,000", "3,000", "1,000", "32"]
    assert row(page, "## Equal shape", "gdn2") == [*sizes, "1,100", "300", "2"]
    assert row(page, "## Equal shape", "carve-read") == [*sizes, "700", "–", "2"]
    assert row(page, "Perplexity:", "gdn2") == ["9.206 ± 2.570", "2.718 ± 0.000"]  # of e^2 and e^2.4; of e and e
    assert row(page, "Perplexity:", "carve-read") == ["11.523 ± 4.747", "1.831 ± 0.258"]
    # Of 0.1 and 0.3, seed by seed: their standard error is 0.1, which Student's t of one degree takes 12.7062 times.
    assert row(page, "Against gdn2 on validation", "carve-read") == [
        "+0.2000", "+22.14 %", "-1.0706 to +1.4706", "+0.2000 to +0.2000",
    ]  # fmt: skip
    assert row(page, "Against gdn2 on test", "carve-read") == [
        "-0.4000", "-32.97 %", "-1.6706 to +0.8706", "-0.4000 to -0.4000",
    ]  # fmt: skip
    by_context = page[page.index("Difference from gdn2 on test by tokens before it in its window") :]
    assert by_context.splitlines()[2] == "| mixer | 1 to 64 | 65 to 128 |"
    assert row(by_context, "", "carve-read") == ["-0.3000", "-0.5000"]
    carried = page[page.index("Difference from gdn2 on test by tokens before it in its document") :]
    assert carried.splitlines()[2] == "| mixer | 1 to 64 | 65 to 128 | 129 to 256 |"
    assert row(carried, "", "carve-read") == ["+0.5000", "-0.1000", "–"]
    content = page[page.index("What the trained content term does") :]
    assert content.splitlines()[2] == (
        "| mixer | content off | content of another text | erase gate moved | write gate moved "
        "| the same for all tokens | beside the token's own |"
    )
    assert row(content, "", "carve-read") == [
        "+0.2000 ± 0.1414", "+0.0500 ± 0.0707", "0.250 (largest 0.500)", "0.200 (largest 0.400)", "60%", "3%",
    ]  # fmt: skip
    rates = page[page.index("## Learning rates") :]
    assert rates.splitlines()[4] == "| mixer | 0.001 | 0.01 | 0.1 |  |"
    assert row(rates, "", "gdn2") == ["12.182", "**7.389**", "diverged", ""]
    assert row(rates, "", "carve-read") == ["20.086", "9.025", "**8.166**", "at the edge"]


def test_pictures_worked_out_by_hand(made_up):
    plan, results, speed = made_up
    outcomes = outcomes_of(plan, results, speed)
    texts = ["validation", "test"]

    def lines(ax) -> list:
        return [[list(map(float, x)) for x in line.get_data()] for line in ax.lines]

    figure = report.draw_perplexity(outcomes, texts)
    for ax, text, losses in zip(figure.axes, texts, [[(2.1, 2.7), (2, 2.4)], [(0.5, 0.7), (1, 1)]], strict=True):
        assert ax.get_title() == f"{text}, equal shape"
        expected = []
        for at, both in enumerate(losses):
            found = [math.exp(x) for x in both]
            expected += [[found, [at, at]], [[sum(found) / 2] * 2, [at - 0.3, at + 0.3]]]
        assert lines(ax) == [[pytest.approx(x), pytest.approx(y)] for x, y in expected]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["carve-read", "gdn2"]
    assert figure.axes[0].get_ylim() == (1.5, -0.5)  # the first on top

    figure = report.draw_position(outcomes["shape"], "gdn2", texts)
    axes = dict(zip(["validation window", "validation", "test window", "test document"], figure.axes, strict=True))
    for name, differences in {"test window": [-0.3, -0.5], "test document": [0.5, -0.1]}.items():
        line, zero = axes[name].lines
        assert line.get_label() == "carve-read"
        assert list(line.get_xdata()) == pytest.approx([8, math.sqrt(65 * 128)])
        assert list(line.get_ydata()) == pytest.approx(differences)
        assert list(zero.get_ydata()) == [0, 0]
        assert axes[name].get_xlabel().startswith(f"tokens before it in its {name.split()[1]}")
    assert not axes["validation window"].lines

    figure = report.draw_gates(outcomes["shape"])
    shown = [ax for ax in figure.axes if ax.images]
    assert [ax.get_title() for ax in shown if ax.get_title()] == [
        "carve-read\nerase gate", "carve-read\nwrite gate",
    ]  # fmt: skip
    for ax, moved in zip(shown, [[0.1, 0.4], [0.1, 0.3]], strict=False):
        np.testing.assert_allclose(ax.images[0].get_array(), [moved])
        assert [label.get_text() for label in ax.get_yticklabels()] == ["3"]


def test_what_falls_into_one_bin_is_not_drawn_by_position(made_up):
    some = outcomes_of(*made_up)["shape"]
    short = [dataclasses.replace(x, seeds=copy.deepcopy(x.seeds)) for x in some]
    scores = [result["texts"]["test"] for x in short for result in x.seeds.values()]
    for score in scores:
        del score["by_context"][1:]
    figure = report.draw_position(short, "gdn2", ["test"])
    assert [ax.get_xlabel() for ax in figure.axes] == ["tokens before it in its document, the memory carried on"]
    for score in scores:
        del score["carried"]["by_position"][1:]
    assert report.draw_position(short, "gdn2", ["test"]) is None


def test_seeds_are_paired_and_windows_weighed_by_their_tokens():
    ours = dataclasses.replace(outcome("a", [[[31, 10]], [[42, 10]]]), wanted=3)
    ours = dataclasses.replace(ours, seeds={2: ours.seeds[0], 1: ours.seeds[1]})
    base = outcome("b", [[[99, 10]], [[40, 10]], [[30, 10]]])
    mean, low, high = over_seeds(ours, base, "test")  # of 0.1 and 0.2, whose standard error is 0.05
    assert (mean, low, high) == pytest.approx((0.15, 0.15 - 12.7062 * 0.05, 0.15 + 12.7062 * 0.05), abs=1e-4)
    assert over_windows(ours, base, "test") == pytest.approx((0.15, 0.15, 0.15))
    assert over_windows(base, ours, "test") == pytest.approx((-0.15, -0.15, -0.15))
    assert report.seeds_cell(ours) == "2 of 3"
    ours = dataclasses.replace(ours, seeds=ours.seeds | {1: {"texts": {}, "diverged": "..."}})
    assert report.seeds_cell(ours) == "2 of 3, 1 diverged"
    assert over_seeds(ours, base, "test") is None
    assert over_windows(ours, base, "test")[0] == pytest.approx(0.1)
    assert report.perplexities([ours], ["test"])[-1] == "| a | 22.198 |"  # e^3.1, of the seed that is left
    assert report.differences([ours, base], ours, "test")[-1].startswith("| b | -0.1000 | -9.52 % | – | -0.1000 to ")

    # A quarter of the draws has the first window twice, a quarter the second: 0.1 and 0 are the ends.
    ours, base = outcome("a", [[[110, 100], [300, 300]]]), outcome("b", [[[100, 100], [300, 300]]])
    assert over_windows(ours, base, "test") == pytest.approx((10 / 400, 0, 10 / 100))
    ours, base = (outcome(name, [[[nats, 100], [nats, 300]] * 200]) for name, nats in (("a", 101), ("b", 100)))
    assert over_windows(ours, base, "test") == pytest.approx((2 / 400, 2 / 400, 2 / 400))  # as many of each in a draw


def test_about_nineteen_of_twenty_intervals_hold_the_difference():
    """Over three seeds that vary, and over 128 windows that do; the difference is -0.01 in all."""
    generator, held = np.random.default_rng(2), {over_seeds: 0, over_windows: 0}
    for _ in range(200):
        base = generator.normal(300, 30, (3, 128))
        for over, size in ((over_seeds, (3, 1)), (over_windows, (1, 128))):
            ours = base + generator.normal(-1, 2, size)
            a, b = (outcome("x", [[[nats, 100] for nats in seed] for seed in some]) for some in (ours, base))
            _, low, high = over(a, b, "test")
            held[over] += low < -0.01 < high
    for count in held.values():
        assert 0.91 < count / 200 < 0.98


def test_an_unfinished_comparison_is_said_to_be_one(whole, texts):
    file, out = whole
    known = json.loads((out / "comparison.json").read_text())["texts"]
    plan = read_plan(file, texts).with_facts(known)
    results = read_results(out)
    some = {run.key: results[run.key] for run in plan.sweep("gdn2")}
    assert [x.label for x in outcomes_of(plan, some, {})["shape"]] == ["gdn2"]
    assert "3 runs are left" in "\n".join(report.opening(plan, some))
