"""Training on the tasks, the list of runs, and what is kept of it."""

import json
import sys
from pathlib import Path

import pytest
import torch

from carve.cli import main
from carve.evals.mixers import MIXERS, mixer_fields
from carve.evals.probes import ProbeScore, make_task, probe_config, train_probe
from carve.evals.probes import runs as module
from carve.evals.probes.results import append_result, key_of, read_results
from carve.evals.probes.runs import ProbeRun, parse_shard, plan_probes, run_probes, summarise
from carve.evals.probes.tasks import IGNORE
from carve.evals.probes.training import (
    TEST,
    TRAIN,
    VALIDATION,
    Captured,
    Questions,
    adamw,
    by_distance,
    rate,
    training_batches,
)
from carve.models import CarveForCausalLM

TINY = {"hidden_size": 16, "num_heads": 1, "head_dim": 8, "intermediate_size": 16, "chunk_size": 4, "content_rank": 4}
RECALL = {"pairs": 2, "edits": 1, "keys": 4, "values": 4}
QUICK = {"steps": 3, "batch_size": 4, "evaluated": 8, "model": TINY}


def plan(tasks: str = "write-once", mixers: str = "carve-read", **how) -> list[ProbeRun]:
    return plan_probes(tasks.split(","), mixers.split(","), **(QUICK | how))


# -- mixers and models --


def test_every_mixer_makes_a_model_that_answers() -> None:
    task = make_task("write-once", RECALL)
    for name in MIXERS:
        config = probe_config(task, name, **TINY)
        batch = task.draw(2, 0)
        assert CarveForCausalLM(config)(batch.input_ids).logits.shape == (*batch.input_ids.shape, task.vocab_size)


def test_mixers_fill_all_layers() -> None:
    assert mixer_fields("carve-read-hybrid", 3)["layer_types"] == ["carve", "sliding_attention", "carve"]
    assert mixer_fields("gdn2", 3) == {"layer_types": ["gdn2"] * 3, "num_hidden_layers": 3}
    with pytest.raises(ValueError, match="mixer 'kda-hybrid' needs at least 2 layers, got 1"):
        mixer_fields("kda-hybrid", 1)
    with pytest.raises(ValueError, match="no mixer 'carve-red'; did you mean 'carve-read'"):
        mixer_fields("carve-red", 1)
    with pytest.raises(ValueError, match="no mixer 'zzz'; expected one of carve-mean"):
        mixer_fields("zzz", 1)


def test_the_smallest_model() -> None:
    sizes = {
        ("write-once", "carve-read"): 1,
        ("write-once", "full_attention"): 2,
        ("write-once", "gdn2-hybrid"): 2,
        ("modular-addition", "gdn2"): 2,
        ("modular-addition", "full_attention"): 3,
    }
    for (task, mixer), layers in sizes.items():
        assert probe_config(make_task(task), mixer).num_hidden_layers == layers
    assert probe_config(make_task("parity"), "gdn").allow_neg_eigval
    assert not probe_config(make_task("counters"), "gdn").allow_neg_eigval
    assert (
        probe_config(make_task("parity"), "gdn", num_hidden_layers=3, allow_neg_eigval=False).layer_types == ["gdn"] * 3
    )


def test_a_context_that_attention_cannot_see_is_refused() -> None:
    long = make_task("parity", {"length": 5000})
    assert probe_config(long, "carve-read").num_hidden_layers == 1
    assert probe_config(long, "carve-read-hybrid").num_hidden_layers == 2  # which sees its window, wherever that lies
    with pytest.raises(ValueError, match="sequences of 5001 tokens, but the model has max_position_embeddings = 4096"):
        probe_config(long, "full_attention")
    window = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 32}
    with pytest.raises(ValueError, match="sequences of 33 tokens, but all layers see a window of 32 only"):
        probe_config(make_task("parity", {"length": 32}), "full_attention", **window)
    assert probe_config(make_task("parity", {"length": 31}), "full_attention", **window).sliding_window == 32


# -- training --


def test_a_tiny_model_learns_to_recall() -> None:
    task = make_task("write-once", RECALL)
    seen = []
    config = probe_config(task, "carve-read", **(TINY | {"hidden_size": 32, "head_dim": 16, "intermediate_size": 32}))
    score = train_probe(
        task,
        config,
        steps=150,
        batch_size=16,
        learning_rate=1e-2,
        evaluated=128,
        on_step=lambda step, loss: seen.append((step, loss)),
    )
    # A guess is right once in 4, and once in 2 for who knows which values there are.
    assert min(score.accuracy, score.validation) > 0.9
    assert score.losses[-1][1] < 0.5 < score.losses[0][1]
    assert [step for step, _ in seen] == list(range(1, 151))
    assert [pair for pair in seen if pair[1] is not None] == score.losses
    assert score.parameters == sum(p.numel() for p in CarveForCausalLM(config).parameters())


def test_every_step_has_sequences_of_its_own_with_their_answers() -> None:
    task = make_task("write-once", {"pairs": 3})
    found = list(training_batches(task, 5, 4, 0, torch.device("cpu"), block=2))
    assert len(found) == 5
    assert len({tuple(row) for questions in found for row in questions.input_ids.tolist()}) == 20
    batch = task.draw(8, [0, TRAIN, 2])  # the second block
    assert torch.equal(found[3].input_ids, batch.input_ids[4:])
    assert torch.equal(found[3].labels, batch.labels[4:].gather(1, found[3].places))
    assert (batch.labels[4:] != IGNORE).sum() == found[3].labels.numel()
    for stream in (VALIDATION, TEST):
        assert not torch.equal(task.draw(8, [0, stream, 0]).input_ids, task.draw(8, [0, TRAIN, 0]).input_ids)


def test_the_same_seed_gives_the_same_score() -> None:
    task = make_task("write-once", RECALL)
    config = probe_config(task, "carve-mean", **TINY)

    def score(seed: int) -> ProbeScore:
        return train_probe(task, config, steps=4, batch_size=4, evaluated=16, seed=seed)

    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    first = score(1)
    torch.rand(3)
    assert score(1) == first
    assert score(2).losses != first.losses
    torch.manual_seed(7)
    score(1)
    assert torch.equal(torch.random.get_rng_state(), before)  # whatever else uses it is left alone


@pytest.mark.parametrize("mixer", ["gdn", "full_attention"])
def test_a_training_that_diverges_ends_and_is_told(mixer: str) -> None:
    task = make_task("write-once", RECALL)
    config = probe_config(task, mixer, **TINY)
    with pytest.raises(FloatingPointError, match="diverged at step"):
        train_probe(task, config, steps=200, batch_size=4, evaluated=8, learning_rate=1e38)


def test_the_rate_warms_up_and_falls_to_a_tenth() -> None:
    rates = [rate(step, 100) for step in range(100)]
    assert rates[:10] == [pytest.approx((step + 1) / 10) for step in range(10)]
    assert rates[10] == max(rates) == 1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0.1 < rates[-1] < 0.11
    assert rate(0, 1) == 1


def test_accuracy_by_distance() -> None:
    right = torch.tensor([1.0, 0, 1, 1, 0, 1])
    assert by_distance(right, torch.tensor([1, 1, 4, 7, 5, 33])) == [
        (1, 2, 0.5, 2),
        (4, 8, pytest.approx(2 / 3), 3),
        (32, 64, 1, 1),
    ]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"evaluated": 0}, "evaluated is 0"),
        ({"learning_rate": 0}, "learning_rate is 0"),
        ({"learning_rate": float("inf")}, "learning_rate is inf, expected a positive finite number"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_training_arguments(how: dict, message: str) -> None:
    task = make_task("parity", {"length": 4})
    with pytest.raises(ValueError, match=message):
        train_probe(task, probe_config(task, "gdn", **TINY), **how)


# -- the list of runs --


def test_the_plan_has_every_run_once_and_the_first_seed_first() -> None:
    runs = plan("write-once,parity", "carve-read,gdn", pairs=[2, 3], lengths=[4], seeds=2, learning_rates=[1e-3, 2e-3])
    assert len(runs) == len({run.key for run in runs}) == 3 * 2 * 2 * 2
    assert [run.configuration["seed"] for run in runs] == [0] * 12 + [1] * 12
    assert {run.label for run in runs} == {"write-once pairs=2", "write-once pairs=3", "parity length=4"}
    assert len(plan("parity,parity", seeds=1, lengths=[4, 4])) == 1


def test_all_that_decides_a_result_is_in_its_key() -> None:
    changes = [
        {"mixers": "carve-mean"},
        {"pairs": [3]},
        {"fields": {"values": 5}},
        {"model": TINY | {"chunk_size": 5}},
        {"model": TINY | {"rms_norm_eps": 1e-4}},
        {"steps": 4},
        {"batch_size": 5},
        {"learning_rates": [1e-3]},
        {"evaluated": 9},
    ]
    keys = {plan(seeds=1, **change)[0].key for change in [{}, *changes]}
    assert len(keys) == len(changes) + 1
    assert plan(seeds=1, model=TINY | {"rms_norm_eps": 1e-5})[0].key in keys  # the default, written down


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"tasks": "write-onc"}, "did you mean 'write-once'"),
        ({"mixers": "gnd2"}, "no mixer 'gnd2'; did you mean 'gdn2'"),
        ({"pairs": [4, 100]}, "pairs is 100, expected from 1 to keys = 32"),
        ({"lengths": [4]}, "none of the tasks write-once has a field 'length'"),
        ({"fields": {"modulus": 3}}, "none of the tasks write-once has a field 'modulus'"),
        ({"fields": {"tokens": 3}}, "none of the tasks write-once has a field 'tokens'"),
        (
            {"model": {"chunksize": 3}},
            "model has 'chunksize', which CarveConfig does not know; did you mean 'chunk_size'",
        ),
        (
            {"model": {"layer_types": ["kda"]}},
            "model has 'layer_types', which the mixer decides, expected another field",
        ),
        ({"model": {"content": None}}, "model has 'content', which the mixer decides"),
        ({"model": {"vocab_size": 300}}, "model has 'vocab_size', which the task decides"),
        ({"pairs": [4], "fields": {"pairs": 8}}, r"pairs is given twice, \[4\] and 8"),
        ({"tasks": "mqar", "fields": {"power": "abc"}}, "power is 'abc', expected a positive number"),
        ({"device": "bogus"}, "device is 'bogus', expected cpu or cuda"),
        ({"model": {"chunk_size": 0}}, "chunk_size is 0, expected an integer of at least 1"),
        ({"seeds": 0}, "seeds is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"learning_rates": [0.0]}, "learning_rates has 0.0"),
        ({"learning_rates": [float("inf")]}, "learning_rates has inf, expected positive finite numbers"),
        ({"learning_rates": []}, "learning_rates is empty"),
        ({"tasks": "mqar", "mixers": "full_attention", "lengths": [5000]}, "sequences of 5000 tokens"),
    ],
)
def test_bad_plans(how: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(**how)


def test_shards() -> None:
    assert parse_shard("2/8") == (2, 8)
    for shard in ("0/2", "3/2", "2", "a/b", "-1/2", "1/2/3", ""):
        with pytest.raises(ValueError, match="expected I/N"):
            parse_shard(shard)


# -- what is kept --


def test_a_run_is_not_repeated_and_shards_share_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    runs = plan("write-once,parity", "carve-blind,gdn", pairs=[2], lengths=[4], seeds=2)
    trained = []

    def count(task, config, **how):
        trained.append(how["seed"])
        return train_probe(task, config, **how)

    monkeypatch.setattr(module, "train_probe", count)
    assert run_probes(runs, tmp_path, shard=(1, 3))
    assert len(trained) == 3
    assert "(1/2)" in capsys.readouterr().out
    assert run_probes(runs, tmp_path, shard=(2, 3))
    assert run_probes(runs, tmp_path)
    assert len(trained) == len(runs) == 8
    out = capsys.readouterr().out
    assert "write-once" in out
    assert "pairs=2" in out
    assert "±" in out
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    results = read_results(tmp_path / "results.jsonl")
    assert len(lines) == len(results) == 8
    assert {run.key for run in runs} == set(results)
    for record in results.values():
        assert 0 <= record["accuracy"] <= 1
        assert {"seconds", "device", "torch", "by_distance", "losses", "parameters", "validation"} <= set(record)
    assert (tmp_path / "probes.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.partial*"))
    run_probes(runs, tmp_path)
    assert len(trained) == 8


def test_an_interrupt_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = plan(mixers="carve-blind,gdn", seeds=1)
    calls = []

    def interrupted(task, config, **how):
        calls.append(config)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train_probe(task, config, **how)

    monkeypatch.setattr(module, "train_probe", interrupted)
    assert not run_probes(runs, tmp_path)
    assert list(read_results(tmp_path / "results.jsonl")) == [runs[0].key]
    assert run_probes(runs, tmp_path)
    assert len(calls) == 3
    assert len(read_results(tmp_path / "results.jsonl")) == 2


def test_a_line_that_was_cut_short_costs_only_itself(tmp_path: Path, capsys) -> None:
    path = tmp_path / "results.jsonl"
    append_result(path, {"configuration": {"a": 1}, "accuracy": 0.5})
    with path.open("a") as file:
        file.write('{"configuration": {"a": 2}, "accu')
    append_result(path, {"configuration": {"a": 3}, "accuracy": 0.7})
    assert [record["accuracy"] for record in read_results(path).values()] == [0.5, 0.7]
    assert "line 2, was cut short: left out" in capsys.readouterr().err
    assert read_results(tmp_path / "none.jsonl") == {}


@pytest.mark.parametrize("line", [b'{"step": 1}', b"[1]", b"steps: 1", b"# Notes", b"\x89PNG"])
def test_a_file_of_something_else_is_refused(line: bytes, tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_bytes(line + b"\n")
    with pytest.raises(ValueError, match=r"results.jsonl, line 1, is no result"):
        run_probes(plan(), tmp_path)


@pytest.mark.parametrize("steps", [2, 60])  # with two, attention is seen to diverge only behind the last
def test_a_diverged_run_is_a_result_and_the_next_is_run(
    steps: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = plan(mixers="gdn,full_attention", seeds=1, learning_rates=[3e37], steps=steps)
    assert run_probes(runs, tmp_path)
    for record in read_results(tmp_path / "results.jsonl").values():
        assert record["accuracy"] == 0
        assert record["diverged"].startswith("diverged at step ")
        assert "finite" in record["diverged"] or "nan" in record["diverged"]
    assert capsys.readouterr().out.count("(1 diverged)") == 2


def test_the_learning_rate_is_chosen_by_validation_among_those_with_most_seeds() -> None:
    runs = plan(seeds=2, learning_rates=[1e-3, 2e-3, 3e-3])
    scores = {1e-3: [(0.5, 0.9), (0.5, 0.9)], 2e-3: [(0.6, 0.1), (0.6, 0.3)], 3e-3: [(0.9, 0.9), None]}
    results = {}
    for run in runs:
        found = scores[run.configuration["learning_rate"]][run.configuration["seed"]]
        if found is not None:
            validation, accuracy = found
            bins = [(1, 2, accuracy, 20)] if run.configuration["seed"] == 0 else [(1, 2, accuracy, 20), (2, 4, 1.0, 30)]
            bins.append((4, 8, 0.0, 14))  # of both seeds too few to say anything
            record = {"validation": validation, "accuracy": accuracy, "by_distance": bins}
            results[run.key] = json.loads(json.dumps({"configuration": run.configuration, **record}))
    (summary,) = summarise(runs, results)
    assert summary.learning_rate == 2e-3
    assert summary.accuracies == {0: 0.1, 1: 0.3}
    assert (summary.seeds, summary.mean, summary.spread) == (2, pytest.approx(0.2), pytest.approx(0.02**0.5))
    assert summary.by_distance == [(1, 2, pytest.approx(0.2)), (2, 4, 1.0)]
    assert summarise(runs, {}) == []


def test_keys_do_not_depend_on_the_order() -> None:
    assert key_of({"a": 1, "b": [2, 3]}) == key_of({"b": [2, 3], "a": 1})


# -- the command line --


def test_the_command_runs_and_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def carve(arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["carve", *arguments.split()])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0), *capfd.readouterr()

    model = "".join(f" --model {name}={value}" for name, value in TINY.items())
    quick = f"--steps 2 --batch-size 2 --seeds 1 --device cpu --output {tmp_path / 'out'}{model}"
    code, out, err = carve(
        f"probe --task write-once,s3 --mixer carve-read,kda --pairs 2 --length 3 --set edits=2 {quick}"
    )
    assert code == 0, err
    assert "write-once, of which a guess gets 12.5" in out
    assert "s3, of which a guess gets 16.7" in out
    results = read_results(tmp_path / "out" / "results.jsonl").values()
    assert [record["configuration"]["task"].get("edits") for record in results] == [2, 2, None, None]
    mistakes = {
        "--task write-onc --mixer gdn": "there is no task 'write-onc'; did you mean 'write-once'?",
        "--task parity --mixer gnd": "there is no mixer 'gnd'; did you mean 'gdn'?",
        "--task parity --mixer gdn --length 3,x": "--length is '3,x', expected numbers separated by commas",
        "--task parity --mixer gdn --shard 3/2": "shard is '3/2', expected I/N",
        "--task parity --mixer gdn --device tpu9": "device is 'tpu9', which cannot be used here",
        "--task parity --mixer gdn --set length": "--set is 'length', expected NAME=VALUE",
    }
    for arguments, message in mistakes.items():
        code, _, err = carve(f"probe {arguments} --output {tmp_path / 'none'}")
        assert code == 2
        assert len(err.splitlines()) == 1
        assert err.startswith("carve: error: ")
        assert message in err
    assert not (tmp_path / "none").exists()


# -- on a GPU --


@pytest.mark.gpu
def test_a_captured_step_is_the_step_and_sees_the_learning_rate_change() -> None:
    weights = []
    for capture in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3).cuda()
        optimizer = adamw(model, 0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, 30))

        def learn(questions: Questions, model: torch.nn.Linear = model, optimizer=optimizer) -> torch.Tensor:
            loss = torch.nn.functional.cross_entropy(model(questions.input_ids.float()), questions.labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            return loss.detach()

        take = Captured(learn) if capture else learn
        for _ in range(30):
            x, y = torch.randint(9, (8, 4), device="cuda"), torch.randint(3, (8,), device="cuda")
            take(Questions(x, x, y))
            schedule.step()
        weights.append(model.weight.detach())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_plain_torch_which_cannot_be_captured_trains_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", None)
    config = probe_config(make_task("write-once", {"pairs": 2}), "carve-read", num_heads=1, head_dim=8)
    recipe = {"steps": 5, "batch_size": 4, "evaluated": 8, "device": "cuda"}
    assert len(train_probe(make_task("write-once", {"pairs": 2}), config, **recipe).losses) == 5


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", ["carve-mean", "carve-read", "gdn2-hybrid", "full_attention"])
def test_training_by_captured_steps_is_the_same(mixer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task("write-once", {"pairs": 4})
    recipe = {"steps": 40, "learning_rate": 3e-3, "evaluated": 128, "device": "cuda"}
    captured = train_probe(task, probe_config(task, mixer), **recipe)
    monkeypatch.setattr(Captured, "eager", 40)
    eager = train_probe(task, probe_config(task, mixer), **recipe)
    assert [step for step, _ in captured.losses] == [step for step, _ in eager.losses]
    for (_, mine), (_, other) in zip(captured.losses, eager.losses, strict=True):
        assert mine == pytest.approx(other, abs=0.02)  # bfloat16, and sums whose order differs from run to run
