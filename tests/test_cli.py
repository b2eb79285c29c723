import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from carve import CarveConfig, CarveForCausalLM
from carve.cli import main
from carve.evals import perplexity
from carve.models.checkpoint import load_checkpoint

TEXT = "def read(path):\n    return open(path).read()  # äöü\n" * 4


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Carve = Callable[..., Outcome]


@pytest.fixture
def carve(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Carve:
    """`carve(*arguments, stdin=b"")`: what the command line does."""

    def run(*arguments: object, stdin: bytes = b"") -> Outcome:
        monkeypatch.setattr(sys, "argv", ["carve", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        return Outcome(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    config = CarveConfig(
        vocab_size=257,
        hidden_size=16,
        num_hidden_layers=2,
        num_heads=1,
        head_dim=8,
        intermediate_size=16,
        layer_types=["carve", "sliding_attention"],
        sliding_window=8,
        chunk_size=8,
    )
    CarveForCausalLM(config).save_pretrained(folder)
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_help_does_not_wait_for_torch() -> None:
    """Nor `carve train --help`, which has a flag for every field."""
    code = """
import sys
from typer.testing import CliRunner
from carve.cli import app
for arguments in (["--help"], ["train", "--help"]):
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
assert "--seq-len" in shown.output
assert "layer_types=[" in shown.output
print(*{"torch", "transformers", "datasets", "numpy", "safetensors"} & set(sys.modules))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_eval_prints_a_table_and_writes_the_numbers(carve: Carve, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    lines = tmp_path / "more.jsonl"
    lines.write_text('{"text": "one"}\n{"text": "two and three"}\n')
    outcome = carve("eval", checkpoint, text, lines, "--json", tmp_path / "numbers.json")
    assert outcome.code == 0, outcome.err
    expected = perplexity(*load_checkpoint(checkpoint), [TEXT])
    assert f"{expected.bits_per_byte:.4f}" in outcome.out
    assert f"{expected.perplexity:.4f}" in outcome.out
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["complete"] is True
    assert numbers["checkpoint"] == str(checkpoint)
    assert [file["path"] for file in numbers["files"]] == [str(text), str(lines)]
    assert numbers["files"][0]["nats"] == pytest.approx(expected.nats, rel=1e-6)
    assert numbers["files"][0]["bytes"] == len(TEXT.encode())
    assert numbers["files"][1]["documents"] == 2
    for name in ("nats", "tokens", "bytes", "documents"):
        assert numbers["total"][name] == pytest.approx(sum(file[name] for file in numbers["files"]))


def test_eval_of_a_run_says_which_checkpoint_was_scored(
    carve: Carve, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for step in (9, 10):
        shutil.copytree(checkpoint, f"run/checkpoint-{step}")
    assert carve("eval", "run", text, "--json", "numbers.json").code == 0
    assert json.loads(Path("numbers.json").read_text())["checkpoint"] == "run/checkpoint-10"


def test_eval_with_windows_forgets(carve: Carve, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    for name, arguments in (("whole", ()), ("window", ("--window", 4)), ("stride", ("--window", 4, "--stride", 1))):
        outcome = carve("eval", checkpoint, text, *arguments, "--json", tmp_path / name)
        assert outcome.code == 0, outcome.err
    whole, window, stride = (
        json.loads((tmp_path / name).read_text())["total"] for name in ("whole", "window", "stride")
    )
    assert whole["tokens"] == window["tokens"] == stride["tokens"]
    assert len({whole["nats"], window["nats"], stride["nats"]}) == 3


def test_an_interrupted_eval_gives_what_it_has(
    carve: Carve, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def interrupted(*arguments: object, on_progress, **options: object) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(perplexity(*arguments, on_progress=on_progress, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr("carve.evals.report.perplexity", interrupted)
    outcome = carve("eval", checkpoint, text, "--json", tmp_path / "numbers.json")
    assert outcome.code == 130
    assert "interrupted: the numbers are those of the text scored until then" in outcome.err
    assert f"{seen[0].bits_per_byte:.4f}" in outcome.out
    assert json.loads((tmp_path / "numbers.json").read_text())["complete"] is False
    outcome = carve("eval", checkpoint, text)
    assert outcome.code == 130
    assert "interrupted before anything was scored" in outcome.err


def test_an_eval_that_fails_gives_what_it_has(carve: Carve, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "one and two"}\nno JSON\n')
    outcome = carve("eval", checkpoint, text, bad, text, "--json", tmp_path / "numbers.json")
    assert outcome.code == 2
    assert f"carve: error: {bad}, line 2: not JSON" in outcome.err.splitlines()[-1]
    assert "failed: the numbers are those of the text scored until then" in outcome.err
    assert f"{perplexity(*load_checkpoint(checkpoint), [TEXT]).bits_per_byte:.4f}" in outcome.out
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["complete"] is False
    assert [(file["path"], file["bytes"]) for file in numbers["files"]] == [
        (str(text), len(TEXT.encode())), (str(bad), len("one and two")),
    ]  # fmt: skip


def test_an_interrupt_before_any_training_says_so(carve: Carve, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("carve.train.run.train", interrupted)
    outcome = carve("train", "--data", text)
    assert (outcome.code, outcome.err) == (130, "stopped before training began\n")


def test_generate_takes_its_prompt_from_three_places(carve: Carve, checkpoint: Path, text: Path) -> None:
    options = ("--max-new-tokens", 20, "--seed", 1)
    prompted = carve("generate", checkpoint, "--prompt", TEXT, *options)
    assert prompted.code == 0, prompted.err
    assert len(prompted.out) > 5
    assert carve("generate", checkpoint, "--file", text, *options).out == prompted.out
    assert carve("generate", checkpoint, *options, stdin=TEXT.encode()).out == prompted.out
    assert carve("generate", checkpoint, "--prompt", TEXT, "--max-new-tokens", 20, "--seed", 2).out != prompted.out


def test_inspect_draws_and_says_what_it_left_out(carve: Carve, checkpoint: Path, tmp_path: Path) -> None:
    outcome = carve("inspect", checkpoint, "--prompt", "def f(): return 1", "--out", tmp_path / "gates.png")
    assert outcome.code == 0, outcome.err
    assert "left out layer 1: sliding_attention has no such gates" in outcome.out
    assert "layer 0, by head: 0% of what the content adds to the erase logits is the same" in outcome.out  # nothing yet
    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eval", "CHECKPOINT", "nowhere.txt"), "no such file: nowhere.txt"),
        (("eval", "nowhere", "TEXT"), "no such checkpoint folder: nowhere"),
        (("eval", "CHECKPOINT", "CHECKPOINT"), "is a folder, expected a file"),
        (("eval", "CHECKPOINT", "TEXT", "--stride", "4"), "stride needs a window"),
        (("eval", "CHECKPOINT", "TEXT", "--window", "0"), "window must be at least 1, got 0"),
        (("eval", "CHECKPOINT", "TEXT", "--json", "nowhere/x.json"), "no such folder"),
        (("eval", "CHECKPOINT", "EMPTY"), "is empty: no text to score"),
        (("eval", "CHECKPOINT", "BINARY"), "is not UTF-8 text: byte 0"),
        (("generate", "CHECKPOINT", "--file", "nowhere.txt"), "no such file: nowhere.txt"),
        (("generate", "CHECKPOINT", "--file", "BINARY"), "is not UTF-8 text: byte 0"),
        (("generate", "CHECKPOINT", "--prompt", ""), "the prompt is empty"),
        (("generate", "CHECKPOINT"), "the prompt is empty"),
        (("generate", "CHECKPOINT", "--prompt", "x", "--file", "TEXT"), "give --prompt or --file, not both"),
        (("generate", "CHECKPOINT", "--prompt", "x", "--temperature", "-1"), "temperature must be at least 0"),
        (
            ("train", "--data", "TEXT", "--model", "layer_types=[carve"),
            "--model is 'layer_types=[carve', whose value is not",
        ),
        (("train", "--resume", "CHECKPOINT", "--out", "elsewhere"), "--out and --resume exclude each other"),
        (("inspect", "CHECKPOINT", "--prompt", "", "--out", "OUT"), "the text to inspect is empty"),
        (("inspect", "CHECKPOINT", "--prompt", "x", "--out", "nowhere/x.png"), "no such folder"),
        (
            ("inspect", "nowhere", "--prompt", "x", "--out", "CHECKPOINT"),
            "expected the name of a picture, ending in .png",
        ),
        (("inspect", "nowhere", "--prompt", "x", "--out", "x.jpg"), "out is x.jpg, expected the name of a picture"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    carve: Carve, checkpoint: Path, text: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe")
    places = {
        "CHECKPOINT": checkpoint,
        "TEXT": text,
        "EMPTY": tmp_path / "empty.txt",
        "BINARY": tmp_path / "binary.txt",
        "OUT": tmp_path / "gates.png",
    }
    outcome = carve(*(places.get(argument, argument) for argument in arguments))
    assert outcome.code == 2
    errors = [line for line in outcome.err.splitlines() if line.startswith("carve: error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "gates.png").exists()


WITHOUT_EXTRAS = """
import sys
for name in ("accelerate", "cuda", "datasets", "lm_eval", "matplotlib", "pyarrow", "scipy", "tensorboard"):
    sys.modules[name] = None  # as if it were not installed
from carve.cli import main
main()
"""


def test_a_result_alone_is_on_standard_output(carve: Carve, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT * 20, encoding="utf-8")
    made = carve("tokenizer", tmp_path / "text.txt", "--out", tmp_path / "tokenizer", "--vocab-size", 300)
    assert made.out == f"{tmp_path / 'tokenizer'}\n"
    out = tmp_path / "run"
    fields = ["--seq-len", 16, "--batch-tokens", 16, "--micro-batch", 1, "--steps", 1, "--warmup-steps", 0]
    for field in ("hidden_size=8", "num_hidden_layers=1", "num_heads=1", "head_dim=8", "intermediate_size=8"):
        fields += ["--model", field]
    trained = carve(
        "train", "--data", tmp_path / "text.txt", "--tokenizer", tmp_path / "tokenizer", "--out", out, *fields
    )
    assert trained.out == f"{out / 'checkpoint-1'}\n"
    (warning,) = (line for line in trained.err.splitlines() if "content projections" in line)  # and no line of source
    assert warning.startswith("carve: the content projections will not learn: ")
    assert "check_content" not in trained.err
    assert ".py" not in trained.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--data", "nowhere"), "training needs: pip install 'carve-attention[train]'"),
        (("lm-eval", "nowhere", "--output", "out"), "the harness needs: pip install 'carve-attention[lm-eval]'"),
    ],
)
def test_the_command_needs_no_extras_but_says_what_others_need(arguments: tuple[str, ...], message: str) -> None:
    command = [sys.executable, "-c", WITHOUT_EXTRAS, *arguments]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    assert outcome.returncode == 2, outcome.stderr
    assert outcome.stderr.splitlines()[-1].startswith("carve: error: ")
    assert outcome.stderr.splitlines()[-1].endswith(message)


@pytest.mark.parametrize("flush", [False, True])
def test_a_reader_that_has_seen_enough_ends_the_command_in_silence(flush: bool) -> None:
    code = f"""
import sys
from carve.cli import app, main
@app.command()
def shout():
    print("x", flush={flush})
sys.argv = ["carve", "shout"]
main()
"""
    read, write = os.pipe()
    os.close(read)
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with os.fdopen(write) as pipe:
        command = [sys.executable, "-c", code]
        outcome = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, check=False, env=environment)
    assert (outcome.returncode, outcome.stderr) == (1, "")


def test_what_is_not_utf8_on_standard_input_is_said(carve: Carve, checkpoint: Path) -> None:
    outcome = carve("generate", checkpoint, stdin=b"ab\xff")
    assert outcome.code == 2
    assert "carve: error: standard input is not UTF-8 text: byte 2" in outcome.err


def test_the_demo_says_how_to_go_on(carve: Carve, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("carve.demo.run_demo", interrupted)
    outcome = carve("demo")
    assert outcome.code == 130
    assert "`carve demo` goes on from the last checkpoint" in outcome.err


def test_probes_of_another_device_are_reported_without_it(carve: Carve, tmp_path: Path) -> None:
    shutil.copy(Path(__file__).parent.parent / "benchmarks" / "results" / "probes" / "results.jsonl", tmp_path)
    arguments = ["probe", "--task", "write-once", "--mixer", "gdn2", "--device", "cuda", "--report"]
    arguments += ["--pairs", "8", "--learning-rate", "3e-3", "--output", tmp_path]
    found = carve(*arguments, "--steps", "1300")
    assert found.code == 0
    assert "92.2 ± 3.3" in found.out
    assert (tmp_path / "probes.png").read_bytes().startswith(b"\x89PNG")
    missing = carve(*arguments, "--steps", "5")
    assert missing.code == 2
    assert "holds no result of these 3 runs: expected some, with the same options" in missing.err
