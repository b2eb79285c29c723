"""lm-evaluation-harness: every score against a direct computation, without a cache, a batch or a network."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from carve import CarveForCausalLM
from carve.cli import main
from carve.evals import harness, perplexity
from carve.evals.harness import CarveLM, find_tasks, load_cases, run_harness
from carve.evals.harness_tasks import COMMON_SENSE, find_files, read_examples, wikitext_pages
from carve.evals.probes.results import read_results
from carve.generation import generate_text
from carve.train.tokenizer import byte_tokenizer
from tests.models.tiny import KINDS, make_model
from tests.tolerances import tolerance

Instance = harness.Instance
CONTEXTS = ["Question: why?\nAnswer:", "One  context ", "", "x" * 23 + " y", "Question: why?\nAnswer:"]
CHOICES = [" because", " so", " ä", "!", " because it is so"]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module", params=["bos", "eos"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    """Bytes; a text's first token follows BOS, or EOS where there is no BOS."""
    tokenizer = byte_tokenizer()
    if request.param == "bos":
        tokenizer.add_special_tokens({"bos_token": "<s>"})
    return tokenizer


def tiny_model(kind: str, dtype: torch.dtype = torch.float64, **fields: Any) -> CarveForCausalLM:
    layer_types, differing = KINDS[kind]
    return make_model(layer_types, dtype, vocab_size=260, **(differing | fields))


@pytest.fixture(scope="module", params=["mean", "read", "hybrid", "attention_first"])
def model(request: pytest.FixtureRequest) -> CarveForCausalLM:
    return tiny_model(request.param)


def ask(kind: str, *arguments: Any) -> list[Any]:
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


def direct(
    model: CarveForCausalLM, tokenizer: PreTrainedTokenizerBase, context: str, continuation: str
) -> tuple[float, bool]:
    """Log-probability of a continuation by one forward over all of it, and whether each token is the likeliest."""
    start = [] if context else [tokenizer.eos_token_id]
    if tokenizer.bos_token_id is not None:
        start = [tokenizer.bos_token_id]
    before = start + tokenizer(context, add_special_tokens=False)["input_ids"]
    row = torch.tensor([before + tokenizer(continuation, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        logits = model(row, use_cache=False).logits[0, len(before) - 1 : -1].double()
    targets = row[0, len(before) :]
    return -F.cross_entropy(logits, targets, reduction="sum").item(), bool((logits.argmax(-1) == targets).all())


def assert_same(
    found: list[tuple[float, bool]], expected: list[tuple[float, bool]], name: str = "model_float64"
) -> None:
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [x for x, _ in found] == pytest.approx([x for x, _ in expected], rel=tolerance(name))


# -- the three kinds of request ----------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [2, 64])
def test_every_choice_has_the_log_probability_of_one_forward(
    model: CarveForCausalLM, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> None:
    pairs = [(context, choice) for context in CONTEXTS for choice in CHOICES]
    found = CarveLM(model, tokenizer, batch_size).loglikelihood(ask("loglikelihood", *pairs), disable_tqdm=True)
    # A space between the two belongs to the continuation, says lm-eval; to bytes it is all the same but for the score.
    moved = [(c.rstrip(), c[len(c.rstrip()) :] + choice) for c, choice in pairs]
    assert_same(found, [direct(model, tokenizer, *pair) for pair in moved])


def test_float32_agrees_too(tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_model("read", torch.float32)
    pairs = [(context, choice) for context in CONTEXTS[:1] + CONTEXTS[3:] for choice in CHOICES]
    found = CarveLM(model, tokenizer).loglikelihood(ask("loglikelihood", *pairs), disable_tqdm=True)
    assert_same(found, [direct(model, tokenizer, *pair) for pair in pairs], "model_float32")


def test_what_greedy_decoding_gives_is_greedy(model: CarveForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    lm = CarveLM(model, tokenizer)
    context = tokenizer("a context", add_special_tokens=False)["input_ids"]
    row = torch.tensor([context])
    after = model.generate(row, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)[0, len(context) :]
    other = [*after.tolist()[:-1], (after[-1].item() + 1) % 256]
    found = lm._loglikelihood_tokens([(None, context, after.tolist()), (None, context, other)], disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, False]


def test_a_context_is_read_once(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerBase) -> None:
    model, read = tiny_model("read"), []
    forward = model.forward

    def counted(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        read.append(input_ids.numel())
        return forward(input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", counted)
    context = "a long context, " * 20 + "and"
    requests = ask("loglikelihood", *[(context, choice) for choice in (" yes!", " no!!", " why?", " or?!")])
    CarveLM(model, tokenizer).loglikelihood(requests, disable_tqdm=True)
    assert read == [len(context) + (tokenizer.bos_token_id is not None), 4 * 4]  # the last token is only a target


def test_a_rolling_text_carries_the_state(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerBase) -> None:
    model, read = tiny_model("mean"), []
    forward = model.forward

    def counted(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        read.append(input_ids.shape[1])
        return forward(input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", counted)
    monkeypatch.setattr(harness, "PIECE", 7)
    texts = ["A text of some length, and nothing to stop it. " * 3, "short", "", "seven t"]
    lm = CarveLM(model, tokenizer)
    found = lm.loglikelihood_rolling(ask("loglikelihood_rolling", *[(text,) for text in texts]), disable_tqdm=True)
    assert max(read) == 7
    assert sum(read) == sum(map(len, texts))  # each token is scored once
    expected = [direct(model, tokenizer, "", text)[0] if text else 0 for text in texts]
    assert found == pytest.approx(expected, rel=tolerance("model_float64"))
    if tokenizer.bos_token_id is not None:
        scored = [perplexity(model, tokenizer, [text], piece=5).nats if text else 0 for text in texts]
        assert found == pytest.approx([-nats for nats in scored], rel=tolerance("model_float64"))


def test_attention_sees_the_windows_that_lm_eval_lays(tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_model("hybrid", max_position_embeddings=8)
    lm = CarveLM(model, tokenizer)
    text = "0123456789abcdefghij"  # windows of 8: the last one is as long as the others, and scores what is left
    windows = [("", text[:8]), (text[7], text[8:16]), (text[11:16], text[16:])]
    scores = []
    for context, continuation in windows:
        row = torch.tensor([[lm.prefix_token_id] * (not context) + lm.tok_encode(context + continuation, False)])
        assert row.shape[1] == 9
        with torch.no_grad():
            logits = model(row[:, :-1], use_cache=False).logits[0]
        nats = F.cross_entropy(logits, row[0, 1:], reduction="none")
        scores.append(-nats[-len(continuation) :].sum().item())
    found = lm.loglikelihood_rolling(ask("loglikelihood_rolling", (text,)), disable_tqdm=True)
    assert found == pytest.approx([sum(scores)], rel=tolerance("model_float64"))


def test_generation_is_what_the_model_says_alone(model: CarveForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = ["A prompt", "Another, longer prompt with more in it", "short", "A prompt"]
    alone = [
        generate_text(model, tokenizer, prompt, max_new_tokens=12, temperature=0).split("\n")[0] for prompt in prompts
    ]
    lm = CarveLM(model, tokenizer, batch_size=3)
    free = ask("generate_until", *[(prompt, {"until": ["\n"], "max_gen_toks": 12}) for prompt in prompts])
    found = lm.generate_until(free, disable_tqdm=True)
    assert found == alone
    assert max(map(len, found)) > 4
    stop = found[1][2:4]
    stopped = ask("generate_until", (prompts[1], {"until": [stop], "max_gen_toks": 12}), free[0].args)
    assert lm.generate_until(stopped, disable_tqdm=True) == [alone[1].split(stop)[0], alone[0]]


def test_generation_samples_where_a_task_says_so(tokenizer: PreTrainedTokenizerBase) -> None:
    lm = CarveLM(tiny_model("mean"), tokenizer)
    arguments = {"until": [], "max_gen_toks": 20, "do_sample": True, "temperature": 1.5}
    torch.manual_seed(0)
    first, second = (lm.generate_until(ask("generate_until", ("x", arguments)), disable_tqdm=True) for _ in range(2))
    assert first != second


def test_lm_evals_own_model_says_the_same() -> None:
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = tiny_model("hybrid"), byte_tokenizer()
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, device="cpu")
    ours = CarveLM(model, tokenizer, batch_size=2)
    pairs = ask("loglikelihood", *[(context, choice) for context in CONTEXTS for choice in CHOICES])
    assert_same(ours.loglikelihood(pairs), theirs.loglikelihood(pairs))
    texts = ask("loglikelihood_rolling", ("A text to roll over",), ("another",))
    expected = theirs.loglikelihood_rolling(texts)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(expected, rel=tolerance("model_float64"))
    prompts = ask(
        "generate_until", *[(text, {"until": ["e"], "max_gen_toks": 12}) for text in ("A prompt", "One more")]
    )
    assert ours.generate_until(prompts) == theirs.generate_until(prompts)


# -- bad input ---------------------------------------------------------------------------------------


def test_lm_eval_knows_the_model_by_name(checkpoint: Path) -> None:
    from lm_eval.api.registry import get_model

    lm = get_model("carve").create_from_arg_string(f"pretrained={checkpoint},batch_size=2", {"device": "cpu"})
    assert isinstance(lm, CarveLM)
    assert lm.batch_size == 2


def test_a_tokenizer_that_does_not_fit_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    small = make_model(["carve"], vocab_size=100)
    with pytest.raises(ValueError, match=f"tokenizer has {len(tokenizer)} tokens, the model knows 100"):
        CarveLM(small, tokenizer)
    bare = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend_tokenizer)
    with pytest.raises(ValueError, match="neither BOS nor EOS"):
        CarveLM(tiny_model("mean"), bare)
    with pytest.raises(ValueError, match="tokenizer is missing"):
        CarveLM(tiny_model("mean"))


@pytest.mark.parametrize("batch_size", [0, "auto", -1])
def test_a_batch_size_is_a_number(tokenizer: PreTrainedTokenizerBase, batch_size: Any) -> None:
    with pytest.raises(ValueError, match="batch_size is"):
        CarveLM(tiny_model("mean"), tokenizer, batch_size)


def test_a_context_longer_than_attention_sees_is_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    lm = CarveLM(tiny_model("hybrid", max_position_embeddings=16), tokenizer)
    lm.loglikelihood(ask("loglikelihood", ("x" * 10, "y" * 5)), disable_tqdm=True)
    with pytest.raises(ValueError, match="max_position_embeddings = 16"):
        lm.loglikelihood(ask("loglikelihood", ("x" * 10, "y" * 10)), disable_tqdm=True)
    with pytest.raises(ValueError, match="max_position_embeddings = 16"):
        lm.generate_until(ask("generate_until", ("x" * 10, {"max_gen_toks": 10})), disable_tqdm=True)
    with pytest.raises(ValueError, match="continuation has no tokens"):
        lm.loglikelihood(ask("loglikelihood", ("x", "")), disable_tqdm=True)


# -- `carve lm-eval` ---------------------------------------------------------------------------------

LETTERS = {"text": ["the sun", "a stone", "rain"], "label": ["A", "B", "C"]}
RECORDS: dict[str, list[dict[str, Any]]] = {
    "lambada": [
        {"context": "I saw a dog and you saw a", "continuation": "cat"},
        {"context": "He said the", "continuation": "\n\nword"},
    ],
    "piqa": [
        {"goal": "sit", "choices": ["use a chair", "no"], "gold": 0},
        {"goal": "eat", "choices": ["a", "b"], "gold": 1},
    ],
    "hellaswag": [{"context": "Cooking: A man [title] has a pan. he", "choices": ["cooks.", "flies."], "gold": 0}],
    "winogrande": [{"context_options": ["A_b so A", "A_b so b"], "continuation": "won.", "gold": 1}],
    "arc_easy": [{"question": "What is hot?", "choices": LETTERS["text"], "gold": 0}],
    "arc_challenge": [{"question": "What is wet?", "choices": LETTERS, "answerKey": "C"}],  # as lm-eval's own data
    "siqa": [{"context": "Jo fell.", "question": "Why?", "choices": ["ice", "fun", "tea"], "gold": 0}],
    "boolq": [{"query": "Passage: Water is wet.\nQuestion: is water wet?", "choices": ["no", "yes"], "gold": 1}],
    "openbookqa": [{"query": "Fog is likely at", "choices": ["a marsh", "a desert"], "gold": 0}],
}
PAGE = " = Title = \n \n Words , and more words . \n = = Part = = \n \n End \n"
PROMPTS: dict[str, list[list[tuple[str, str]]]] = {  # example -> (context, continuation) of each choice
    "lambada_openai": [[("I saw a dog and you saw a", " cat")], [("He said", " the\n\nword")]],
    "piqa": [
        [("Question: sit\nAnswer:", " use a chair"), ("Question: sit\nAnswer:", " no")],
        [("Question: eat\nAnswer:", " a"), ("Question: eat\nAnswer:", " b")],
    ],
    "hellaswag": [[("Cooking: A man. has a pan. he", f" {end}") for end in ("cooks.", "flies.")]],
    "winogrande": [[("A_b so A", " won."), ("A_b so b", " won.")]],
    "arc_easy": [[("Question: What is hot?\nAnswer:", f" {choice}") for choice in LETTERS["text"]]],
    "arc_challenge": [[("Question: What is wet?\nAnswer:", f" {choice}") for choice in LETTERS["text"]]],
    "social_iqa": [[("Q: Jo fell. Why?\nA:", f" {choice}") for choice in ("ice", "fun", "tea")]],
    "boolq": [[("Water is wet.\nQuestion: is water wet?\nAnswer:", f" {choice}") for choice in ("no", "yes")]],
    "openbookqa": [[("Fog is likely at", " a marsh"), ("Fog is likely at", " a desert")]],
}
GOLD = {
    "piqa": [0, 1],
    "hellaswag": [0],
    "winogrande": [1],
    "arc_easy": [0],
    "arc_challenge": [2],
    "social_iqa": [0],
    "boolq": [1],
    "openbookqa": [0],
}
SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": "The cat sat.",
                    "qas": [
                        {"question": "Who sat?", "answers": [{"text": "The cat"}, {"text": "cat"}]},
                        {"question": "Who ran?", "answers": []},
                    ],
                }
            ]
        }
    ]
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model("read").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, records in RECORDS.items():
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (folder / f"{name}_test.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "wikitext2_test.txt.gz").write_bytes(gzip.compress((" \n" + PAGE * 2).encode()))
    (folder / "squad_dev.json").write_text(json.dumps(SQUAD))
    (folder / "fda.jsonl").write_text('{"text": "K: 12 \\n", "value": " 12 "}\n')
    return folder


def test_scores_of_local_files_are_those_of_a_direct_computation(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [*COMMON_SENSE, "squad_completion", "fda"]
    out = tmp_path / "results.jsonl"
    assert run_harness(checkpoint, names, out, data=[str(data)])
    shown = capsys.readouterr()
    assert "wikitext (1 of 12)" in shown.err
    assert "acc_norm" in shown.out
    results = {record["configuration"]["task"]: record for record in read_results(out).values()}
    assert list(results) == names
    model, tokenizer = tiny_model("read"), byte_tokenizer()

    for name, prompts in PROMPTS.items():
        expected = [[direct(model, tokenizer, *pair) for pair in choices] for choices in prompts]
        for example, answers in zip(results[name]["examples"], expected, strict=True):
            assert_same([tuple(answer) for answer in example["filtered_resps"]], answers)
        scores = results[name]["scores"]
        if name == "lambada_openai":
            nats = [answers[0][0] for answers in expected]
            assert scores["perplexity"] == pytest.approx(math.exp(-sum(nats) / 2), rel=tolerance("model_float64"))
            assert scores["acc"] == sum(answers[0][1] for answers in expected) / 2
            continue
        per_character = [
            [x / len(text.removeprefix(" ")) for (x, _), (_, text) in zip(answers, pairs, strict=True)]
            for answers, pairs in zip(expected, prompts, strict=True)
        ]
        plain = [[x for x, _ in answers] for answers in expected]
        for metric, values in (("acc", plain), ("acc_norm", per_character)):
            right = [row.index(max(row)) == gold for row, gold in zip(values, GOLD[name], strict=True)]
            if metric in scores or metric == "acc":
                assert scores[metric] == sum(right) / len(right), (name, metric)

    page = " = Title =\n\n Words, and more words.\n = = Part = =\n\n End\n".replace("= =", "==").replace("\n ", "\n")
    nats, _ = direct(model, tokenizer, "", page)
    scores = results["wikitext"]["scores"]
    assert results["wikitext"]["examples"][0]["target"] == page
    assert [x["filtered_resps"][0] for x in results["wikitext"]["examples"]] == pytest.approx([nats] * 2)
    assert scores["byte_perplexity"] == pytest.approx(math.exp(-nats / len(PAGE.encode())))

    question = "The cat sat.\n\nQuestion: Who sat?\nAnswer:"
    for name, prompt, longest, end in (("squad_completion", question, 256, "\n\n"), ("fda", "K: 12", 48, "\n")):
        said = generate_text(model, tokenizer, prompt, max_new_tokens=longest, temperature=0).split(end)[0]
        assert [example["filtered_resps"] for example in results[name]["examples"]] == [[said]]

    before = out.read_bytes()
    assert run_harness(checkpoint, names[:2], out, data=[str(data)])  # nothing is left
    assert out.read_bytes() == before
    assert run_harness(checkpoint, names[2:3], out, data=[str(data)], limit=1)
    assert len(read_results(out)) == len(names) + 1


def test_an_interrupt_keeps_what_is_done(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = harness._evaluate

    def interrupted(model: Any, case: Any, limit: Any) -> Any:
        if case.name == "boolq":
            raise KeyboardInterrupt
        return evaluate(model, case, limit)

    monkeypatch.setattr(harness, "_evaluate", interrupted)
    out = tmp_path / "results.jsonl"
    assert not run_harness(checkpoint, ["arc_easy", "boolq"], out, data=[str(data)])
    assert [record["configuration"]["task"] for record in read_results(out).values()] == ["arc_easy"]


def test_ruler_is_scored_at_each_length(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    official = harness._definitions()["niah_single_1"][1].read_text()
    assert "niah_utils.niah_single_1" in official
    folder = tmp_path / "ruler"  # lm-eval's own task, but for its samples, which take it ten seconds
    folder.mkdir()
    (folder / "made.yaml").write_text(
        official.replace("niah_utils.niah_single_1", "made.samples").replace(
            "common_utils.", "lm_eval.tasks.ruler.common_utils."
        )
    )
    (folder / "made.py").write_text(
        "import datasets\n\n\ndef samples(max_seq_lengths, tokenizer, **kwargs):\n"
        "    made = {'outputs': ['zzz', ''], 'gen_prefix': f'The number in {tokenizer} is'}\n"
        "    made = [made | {'input': f'{n} tokens', 'max_length': n} for n in max_seq_lengths]\n"
        "    return {'test': datasets.Dataset.from_list(made)}\n"
    )
    monkeypatch.setitem(harness._definitions(), "niah_single_1", ("task", folder / "made.yaml"))
    out = tmp_path / "results.jsonl"
    assert run_harness(checkpoint, ["niah_single_1"], out, lengths=[1024, 2048])
    records = list(read_results(out).values())
    assert [record["configuration"]["length"] for record in records] == [1024, 2048]
    for record, length in zip(records, (1024, 2048), strict=True):
        assert record["scores"][str(length)] == 0.5
        prompt = f"{length} tokens The number in {checkpoint} is"
        said = generate_text(tiny_model("read"), byte_tokenizer(), prompt, max_new_tokens=128, temperature=0)
        assert [example["filtered_resps"] for example in record["examples"]] == [[said]]


def test_the_command_line_says_what_is_wrong(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def carve(*arguments: object) -> int | str | None:
        monkeypatch.setattr("sys.argv", ["carve", "lm-eval", str(checkpoint), *map(str, arguments)])
        try:
            main()
        except SystemExit as end:
            return end.code
        return 0

    out = tmp_path / "results.jsonl"
    assert carve("--output", out, "--tasks", "piqa,arc_eazy") == 2
    assert capsys.readouterr().err == "carve: error: lm-eval has no task 'arc_eazy'; did you mean 'arc_easy'?\n"
    assert carve("--output", out, "--tasks", "piqa,boolq", "--data", data, "--limit", 1, "--batch-size", 2) == 0
    assert [len(record["examples"]) for record in read_results(out).values()] == [1, 1]
    assert "boolq" in capsys.readouterr().out


def test_names_are_looked_up_and_the_nearest_is_said() -> None:
    official = [*COMMON_SENSE, "ruler", "niah_single_1", "niah_multivalue", "swde", "fda", "squad_completion"]
    assert list(find_tasks(official)) == official
    with pytest.raises(ValueError, match="lm-eval has no task 'hellaswagg'; did you mean 'hellaswag'"):
        find_tasks(["piqa", "hellaswagg"])


def test_mistakes_are_named_before_a_model_is_loaded(data: Path, tmp_path: Path) -> None:
    out, missing = tmp_path / "results.jsonl", tmp_path / "missing"
    cases: list[tuple[list[str], dict[str, Any], str]] = [
        (["piqua"], {}, "did you mean"),
        ([], {}, "tasks is empty"),
        (["piqa"], {"limit": 0}, "limit is 0"),
        (["piqa"], {"lengths": [0]}, "lengths has 0"),
        (["piqa"], {"data": [str(missing)]}, "expected a folder or TASK=FILE"),
        (["piqa"], {"data": [f"piqa={missing}"]}, "no such file"),
        (["piqa"], {"data": [f"boolq={missing}"]}, "expected one of the tasks piqa"),
        (["swde"], {"data": [str(data)]}, r"no file swde\* for swde"),
        (["piqa"], {}, "no such checkpoint folder"),
    ]
    for names, arguments, message in cases:
        with pytest.raises((ValueError, OSError), match=message):
            run_harness(missing, names, out, **arguments)
    assert not out.exists()


def test_files_are_found_by_name(tmp_path: Path) -> None:
    for name in ("siqa_dev.jsonl", "piqa_a.jsonl", "piqa_b.jsonl"):
        (tmp_path / name).touch()
    assert find_files(["social_iqa"], [str(tmp_path)]) == {"social_iqa": tmp_path / "siqa_dev.jsonl"}
    assert find_files(["niah_single_1"], [str(tmp_path)]) == {}
    with pytest.raises(ValueError, match="several files for piqa"):
        find_files(["piqa"], [str(tmp_path)])
    chosen = tmp_path / "piqa_b.jsonl"
    assert find_files(["piqa"], [str(tmp_path), f"piqa={chosen}"]) == {"piqa": chosen}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("piqa", "", "is empty"),
        ("piqa", "{", "line 1: not JSON"),
        ("piqa", '{"goal": "x"}', "example 1: no field 'choices'"),
        ("piqa", '{"goal": "x", "choices": ["a", "b"], "gold": 2}', "'gold' is 2, expected the index of a choice"),
        ("piqa", '{"goal": "x", "choices": ["a", "b", "c"], "gold": 2}', "too many values"),
        ("boolq", '{"query": "x", "choices": ["no", "yes"], "gold": 0}', "expected 'query' to be"),
        ("hellaswag", '{"context": "x", "choices": ["a"], "gold": 0}', "no label of an activity"),
        ("swde", '{"text": "x"}', "expected the fields text, value"),
        ("swde", "[1]", "expected the fields text, value"),
    ],
)
def test_a_file_that_is_something_else_is_an_error(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_examples(name, path)
    other = tmp_path / "examples.csv"
    other.write_text(text)
    with pytest.raises(ValueError, match=r"expected a file \.jsonl"):
        read_examples(name, other)
    broken = tmp_path / "examples.jsonl.gz"
    broken.write_text("no gzip")
    with pytest.raises(ValueError, match="damaged"):
        read_examples(name, broken)


def test_wikitext_is_cut_at_titles() -> None:
    assert wikitext_pages(" \n" + PAGE + PAGE) == [PAGE, PAGE]


def test_without_a_network_the_hub_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="the data of task 'piqa' cannot be loaded; it takes a network, or --data piqa="
    ):
        load_cases(["piqa"], {}, [1024], tmp_path)
