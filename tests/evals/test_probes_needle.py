"""Needle in a haystack: RULER's wording, lengths, scoring; and a checkpoint measured with it."""

import gzip
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from carve import CarveConfig, CarveForCausalLM
from carve.evals.context import pad_rows
from carve.evals.probes import needle as module
from carve.evals.probes.needle import (
    NEEDLE_TASKS,
    NEW_TOKENS,
    NOISE,
    compose,
    encode,
    needle_sample,
    needle_task,
    read_haystack,
    run_needles,
    score_needle,
    string_match,
)
from carve.evals.probes.results import read_results

SENTENCES = [f"Sentence number {i} speaks of nothing in particular." for i in range(300)]
NEEDLE = re.compile(r"One of the special magic (\w+) for (\S+) is: (\S+)\.")
UUID = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
KINDS = {"words": r"[a-z]+-[a-z]+", "numbers": r"[1-9][0-9]{6}", "uuids": UUID}
every = pytest.mark.parametrize("name", NEEDLE_TASKS)


# -- prompts --


def test_the_wording_is_rulers() -> None:
    prompt, (value,) = compose(NEEDLE_TASKS["s-niah-1"], 3, "x", None)
    key = NEEDLE.search(prompt)[2]
    lines = prompt.split("\n")
    assert lines[0] == (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards."
    )
    assert sorted(lines[1:-1]) == sorted([NOISE] * 3 + [f"One of the special magic numbers for {key} is: {value}."])
    assert lines[-1] == (
        f"What is the special magic number for {key} mentioned in the provided text? "
        f"The special magic number for {key} mentioned in the provided text is"
    )


def test_the_wording_for_several_answers_is_rulers() -> None:
    prompt, values = compose(NEEDLE_TASKS["mq-niah"], 3, "x", SENTENCES)
    value_of = {found[2]: found[3] for found in NEEDLE.finditer(prompt)}
    keys = [next(key for key in value_of if value_of[key] == value) for value in values]
    query = f"{keys[0]}, {keys[1]}, {keys[2]}, and {keys[3]}"
    lines = prompt.split("\n")
    assert lines[0] == (
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the numbers afterwards."
    )
    assert len(lines) == 3
    assert sum(sentence in lines[1] for sentence in SENTENCES) == 3
    assert lines[-1] == (
        f"What are all the special magic numbers for {query} mentioned in the provided text? "
        f"The special magic numbers for {query} mentioned in the provided text are"
    )


@every
def test_every_task_hides_what_it_says(name: str) -> None:
    task = needle_task(name)
    for draw in range(20):
        prompt, answers = compose(task, 30, str(draw), SENTENCES)
        context = prompt.split("\n", 1)[1].rsplit("\n", 1)[0]
        needles = [found.groups() for found in NEEDLE.finditer(context)]
        assert len(needles) == task.keys * task.values + (30 if task.haystack == "needles" else 0)
        assert {kind for kind, _, _ in needles} == {task.value}
        assert all(re.fullmatch(KINDS[task.key], key) and re.fullmatch(KINDS[task.value], x) for _, key, x in needles)
        question = prompt.rsplit("\n", 1)[1]
        asked = {key for _, key, _ in needles if re.search(rf"\b{key}\b", question)}
        assert len(asked) == task.queries
        assert sorted(value for _, key, value in needles if key in asked) == sorted(answers)
        assert len(answers) == task.queries * task.values
        assert (NOISE in context) == (task.haystack == "noise")
        assert sum(sentence in context for sentence in SENTENCES) == (30 if task.haystack == "text" else 0)
        assert not any(answer in question for answer in answers)


@every
def test_without_a_text_needles_lie_in_noise(name: str) -> None:
    prompt, _ = compose(needle_task(name), 5, "x", None)
    assert prompt.count(NOISE) == (0 if needle_task(name).haystack == "needles" else 5)


@every
def test_a_longer_haystack_changes_nothing_else(name: str) -> None:
    task = needle_task(name)
    (short, answers), (long, again) = (compose(task, size, "x", SENTENCES) for size in (4, 40))
    assert answers == again
    assert short.rsplit("\n", 1)[1] == long.rsplit("\n", 1)[1]
    assert set(NEEDLE.findall(short)) <= set(NEEDLE.findall(long))
    assert compose(task, 4, "x", SENTENCES) == (short, answers)
    assert compose(task, 4, "y", SENTENCES)[1] != answers


def test_needles_lie_at_all_depths() -> None:
    depths = []
    for draw in range(400):
        prompt, _ = compose(NEEDLE_TASKS["s-niah-2"], 100, str(draw), SENTENCES)
        context = prompt.split("\n")[1]
        depths.append(NEEDLE.search(context).start() / len(context))
    counts = torch.histc(torch.tensor(depths), bins=4, min=0, max=1)
    assert counts.min() > 60  # of 100 expected in each quarter


@every
@pytest.mark.parametrize("length", [1024, 2048])
def test_samples_fill_their_length(name: str, length: int, tokenizer: PreTrainedTokenizerBase) -> None:
    sample = needle_sample(name, tokenizer, length, sentences=SENTENCES)
    assert sample.tokens == len(encode(tokenizer, sample.prompt))
    longest = max(len(encode(tokenizer, line)) for line in [*SENTENCES, NOISE, *sample.prompt.split("\n")[1:-1]])
    if needle_task(name).haystack == "text":
        longest = max(len(encode(tokenizer, sentence)) for sentence in SENTENCES)
    assert length - NEW_TOKENS - longest - 3 <= sample.tokens <= length - NEW_TOKENS
    assert all(answer in sample.prompt for answer in sample.answers)
    assert needle_sample(name, tokenizer, length, sentences=SENTENCES) == sample
    assert needle_sample(name, tokenizer, length, sentences=SENTENCES, index=1) != sample
    assert needle_sample(name, tokenizer, length, sentences=SENTENCES, seed=1) != sample


def test_a_length_with_no_room_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match=r"length is 130 tokens, expected at least \d+ for the needles"):
        needle_sample("s-niah-1", tokenizer, 130)


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ValueError, match="no needle task 's-niah-4'; did you mean 's-niah-"):
        needle_task("s-niah-4")
    with pytest.raises(ValueError, match="no needle task 'qa'; expected one of s-niah-1"):
        needle_task("qa")


# -- haystacks --


def test_haystacks_are_read_as_sentences(tmp_path: Path) -> None:
    text = 'One here. "Two!" And (so). Then\nthree\nof them? 4 is next; etc. and so on.'
    sentences = ["One here.", '"Two!"', "And (so).", "Then three of them?", "4 is next; etc. and so on."]
    (tmp_path / "b.txt").write_text(text)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"First."))
    (tmp_path / "c.json").write_text("{}")
    assert read_haystack(tmp_path / "b.txt") == sentences
    assert read_haystack(tmp_path) == ["First.", *sentences]


def test_bad_haystacks(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="haystack: no such file or folder: nowhere"):
        read_haystack("nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no \.txt"):
        read_haystack(tmp_path)
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(ValueError, match="has no text in it"):
        read_haystack(tmp_path / "a.txt")
    for name, content in (("b.txt", b"\xff"), ("b.txt.gz", gzip.compress(b"\xff"))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="not UTF-8"):
            read_haystack(tmp_path / name)
    whole = gzip.compress(b"First. Second." * 100)
    for content in (b"abc", whole[:-4], whole[:12] + bytes([whole[12] ^ 255]) + whole[13:]):
        (tmp_path / "c.txt.gz").write_bytes(content)
        with pytest.raises(ValueError, match=r"c\.txt\.gz is no gzip file"):
            read_haystack(tmp_path / "c.txt.gz")


# -- scores --


@pytest.mark.parametrize(
    ("said", "answers", "score"),
    [
        (" 1234567.", ["1234567"], 1),
        (" 12345678", ["1234567"], 1),  # RULER asks only whether it occurs
        (" 123456", ["1234567"], 0),
        ("", ["1234567"], 0),
        ("it is ABCD-ef", ["abcd-EF"], 1),
        ("1111111, 2222222 and 3333333", ["1111111", "3333333", "4444444", "2222222"], 0.75),
        ("111\x001111", ["1111111"], 0),
    ],
)
def test_scoring_is_rulers(said: str, answers: list[str], score: float) -> None:
    assert string_match(said, answers) == score


class Oracle:
    """Says part of what it should, as a model would."""

    device = torch.device("cpu")
    config = SimpleNamespace()
    training = True

    def __init__(self, tokenizer: PreTrainedTokenizerBase, share: int) -> None:
        self.tokenizer, self.share = tokenizer, share

    def eval(self) -> None:
        self.training = False

    def train(self, mode: bool) -> None:
        self.training = mode

    def generate(self, tokens: torch.Tensor, attention_mask: torch.Tensor, **how) -> torch.Tensor:
        assert not self.training
        assert how["max_new_tokens"] == NEW_TOKENS
        assert not how["do_sample"]
        said = []
        for row, mask in zip(tokens, attention_mask, strict=True):
            prompt = self.tokenizer.decode(row[mask.bool()])
            question = prompt.rsplit("\n", 1)[1]
            found = [value for _, key, value in NEEDLE.findall(prompt) if key in question]
            text = " " + ", ".join(found[: len(found) // self.share])
            said.append(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        answers, real = pad_rows(said, "right", self.device)
        (blank,) = self.tokenizer(" ", add_special_tokens=False)["input_ids"]
        return torch.cat([tokens, answers.where(real.bool(), blank)], dim=1)


@every
def test_a_model_that_knows_gets_all_and_one_that_knows_half_gets_half(
    name: str, tokenizer_with_bos: PreTrainedTokenizerBase
) -> None:
    task, model, seen = needle_task(name), Oracle(tokenizer_with_bos, 1), []
    how = {
        "samples": 3,
        "batch_size": 2,
        "sentences": SENTENCES,
        "on_sample": lambda done, mean: seen.append((done, mean)),
    }
    score, records = score_needle(name, model, tokenizer_with_bos, 2048, **how)
    assert score == 1
    assert seen == [(1, 1), (2, 1), (3, 1)]
    assert model.training
    assert [record["score"] for record in records] == [1, 1, 1]
    if task.keys * task.values > 1 and task.queries * task.values > 1:
        assert score_needle(name, Oracle(tokenizer_with_bos, 2), tokenizer_with_bos, 2048, **how)[0] == 0.5


def test_what_a_model_says_is_its_greedy_continuation(
    model: PreTrainedModel, tokenizer_with_bos: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "NEW_TOKENS", 5)
    score, (record,) = score_needle("s-niah-1", model, tokenizer_with_bos, 700, samples=1)
    sample = needle_sample("s-niah-1", tokenizer_with_bos, 700)
    ids = [tokenizer_with_bos.bos_token_id, *tokenizer_with_bos(sample.prompt, add_special_tokens=False)["input_ids"]]
    assert record["tokens"] == len(ids) == sample.tokens
    start = len(ids)
    for _ in range(5):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert record["said"] == tokenizer_with_bos.decode(ids[start:], skip_special_tokens=True)
    assert score == string_match(record["said"], sample.answers)


def test_samples_are_answered_together_as_one_by_one(
    model: PreTrainedModel, tokenizer_with_bos: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "NEW_TOKENS", 8)
    how = {"samples": 5, "sentences": SENTENCES}
    one = score_needle("s-niah-3", model, tokenizer_with_bos, 700, batch_size=1, **how)
    assert len({record["tokens"] for record in one[1]}) > 1  # so that there is padding
    assert score_needle("s-niah-3", model, tokenizer_with_bos, 700, batch_size=3, **how) == one
    with pytest.raises(ValueError, match="batch_size is 0"):
        score_needle("s-niah-3", model, tokenizer_with_bos, 700, batch_size=0, **how)


def test_a_context_longer_than_the_model_takes_is_refused(
    model: PreTrainedModel, tokenizer_with_bos: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(ValueError, match="sequences of 9000 tokens, but the model has max_position_embeddings = 8192"):
        score_needle("s-niah-1", model, tokenizer_with_bos, 9000)
    with pytest.raises(ValueError, match="samples is 0"):
        score_needle("s-niah-1", model, tokenizer_with_bos, 1024, samples=0)


# -- a checkpoint --


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer_with_bos: PreTrainedTokenizerBase) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    config = CarveConfig(
        vocab_size=257,
        hidden_size=16,
        num_hidden_layers=2,
        num_heads=1,
        head_dim=8,
        intermediate_size=16,
        chunk_size=8,
        layer_types=["carve", "full_attention"],
        max_position_embeddings=800,
    )
    CarveForCausalLM(config).save_pretrained(folder)
    tokenizer_with_bos.save_pretrained(folder)
    return folder


def test_a_checkpoint_is_measured_and_goes_on_where_it_stopped(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "NEW_TOKENS", 4)
    scored = []

    def count(name: str, *arguments, **how):
        scored.append(name)
        if len(scored) == 2:
            raise KeyboardInterrupt
        return score_needle(name, *arguments, **how)

    monkeypatch.setattr(module, "score_needle", count)
    (tmp_path / "text.txt").write_text(" ".join(SENTENCES))
    out = tmp_path / "needles.jsonl"
    how = {"samples": 2, "haystack": tmp_path / "text.txt"}
    assert not run_needles(checkpoint, ["s-niah-1", "s-niah-2"], [700], out, **how)
    assert run_needles(checkpoint, ["s-niah-1", "s-niah-2"], [700], out, **how)
    assert scored == ["s-niah-1", "s-niah-2", "s-niah-2"]
    first, second = read_results(out).values()
    assert first["configuration"]["haystack"] == "noise"
    assert len(second["samples"]) == 2
    assert second["score"] == sum(sample["score"] for sample in second["samples"]) / 2
    shown = capsys.readouterr().out
    assert "s-niah-2" in shown
    assert "text.txt" in shown
    assert "0.0" in shown
    assert run_needles(checkpoint, ["s-niah-1"], [700], out, samples=2)  # no text is needed, and none was
    assert len(scored) == 3
    (tmp_path / "text.txt").rename(tmp_path / "moved.txt")
    assert run_needles(checkpoint, ["s-niah-2"], [700], out, samples=2, haystack=tmp_path / "moved.txt")
    assert len(scored) == 3
    (tmp_path / "text.txt").write_text(" ".join(SENTENCES[1:]))
    assert run_needles(checkpoint, ["s-niah-1", "s-niah-2"], [700], out, **how)
    assert scored[3:] == ["s-niah-2"]  # in another text; the other task has none


@pytest.mark.parametrize(
    ("names", "lengths", "how", "message"),
    [
        (["s-niah-9"], [700], {}, "no needle task 's-niah-9'"),
        (["s-niah-1"], [900], {}, "max_position_embeddings = 800"),
        (["s-niah-1"], [300], {}, "length is 300 tokens, expected at least"),
        (["s-niah-1"], [700], {"samples": 0}, "samples is 0"),
        (["s-niah-1"], [700], {"batch_size": 0}, "batch_size is 0"),
        (["s-niah-1"], [700], {"haystack": "nowhere"}, "haystack: no such file or folder: nowhere"),
        ([], [700], {}, "tasks is empty"),
        (["s-niah-1"], [], {}, "lengths is empty"),
    ],
)
def test_bad_input(checkpoint: Path, tmp_path: Path, names: list, lengths: list, how: dict, message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        run_needles(checkpoint, names, lengths, tmp_path / "out.jsonl", **how)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_file_of_something_else_is_left_as_it_is(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("# Notes\n")
    with pytest.raises(ValueError, match=r"notes\.md, line 1, is no result"):
        run_needles(checkpoint, ["s-niah-1"], [700], tmp_path / "notes.md")
    assert (tmp_path / "notes.md").read_text() == "# Notes\n"
