"""Needle in a haystack as RULER defines it (arXiv 2404.06654): sentences to be found again in a long text.

The eight tasks, their sentences, questions and scoring are RULER's. What differs: words come from a list of our own,
keys within a sample are distinct, every sample is as long as its length allows, and a text for the haystack is given by
the user; without one, tasks that want one hide their needles in RULER's sentences of noise.
"""

import gzip
import hashlib
import os
import random
import re
import sys
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from carve.evals.context import batches, check_context, end_tokens, pad_rows
from carve.evals.probes.progress import progress_on
from carve.evals.probes.results import append_result, key_of, read_results
from carve.models.checkpoint import find_checkpoint, load_checkpoint
from carve.names import hint
from carve.text import read_text

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
PROMPT = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What are all the special magic {kind} for {query} mentioned in the provided text?"
)
ANSWER = " The special magic {kind} for {query} mentioned in the provided text are"
DEPTHS = 40  # places in a text, evenly spaced, where needles may be
NEW_TOKENS = 128  # of an answer, also kept free at the end of the context
ADJECTIVES_TEXT = """
able amber ancient bold brave brief bright broad calm careful cheap clean clear clever cold cool crisp curly daily
damp dark deep dense dry dull eager early easy empty exact faint fair famous fancy fast fierce final fine firm flat
fresh gentle giant glad golden grand great green happy hard harsh heavy hidden high hollow honest huge humble icy idle
jolly juicy keen kind large late lazy light little lively local lonely long loud lucky mellow mild modern narrow neat
new noble odd old open pale plain polite proud quick quiet rapid rare ready rich ripe rough round royal rural sandy
sharp shiny short shy silent silver simple slow small smooth soft solid sour steady steep strong sturdy sudden sunny
sweet swift tall tame thick thin tidy tiny tough useful vast vivid warm wet white wide wild wise witty wooden young
"""
NOUNS_TEXT = """
acorn anchor apple apron arrow badge banjo barrel basket beach bell bench bird blanket boat bottle branch brick bridge
brush bucket button cabin camel candle canoe carpet castle cedar chain chair chalk cherry circle clock cloud coat coin
comb copper cotton crane crown cup curtain daisy desk dish door dragon dress drum eagle engine falcon feather fence
ferry fiddle field flag flame flute forest fork fountain fox garden gate glove goat grape guitar hammer harbor harp
hat hawk hedge helmet hill horse house island jacket jar jewel kettle key kite ladder lake lamp leaf lemon letter lion
lock map marble market meadow mirror mitten moon mountain mule needle nest oak oar ocean olive onion orchard otter owl
paddle palace pearl pebble pencil piano pillow pine pipe planet plate pond pony pumpkin quilt rabbit raft ribbon ring
river robin rocket roof rope rose saddle sail scarf shell ship shoe shovel spoon star stone stove stream sun swan
table tent tiger tower train tree trumpet tulip tunnel valley vase violin wagon wall watch wheel whistle willow window
wolf yard zebra
"""
ADJECTIVES, NOUNS = ADJECTIVES_TEXT.split(), NOUNS_TEXT.split()


@dataclass(frozen=True)
class NeedleTask:
    """A task of RULER.

    Attributes:
        haystack: `"noise"`, `"text"`, or `"needles"`: sentences like the needles, for other keys.
        key, value: `"words"`, `"numbers"` (of seven digits) or `"uuids"`.
        keys: needles of different keys.
        values: needles to a key.
        queries: keys asked for.
    """

    haystack: str
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


NEEDLE_TASKS = {
    "s-niah-1": NeedleTask("noise"),
    "s-niah-2": NeedleTask("text"),
    "s-niah-3": NeedleTask("text", value="uuids"),
    "mk-niah-1": NeedleTask("text", keys=4),
    "mk-niah-2": NeedleTask("needles"),
    "mk-niah-3": NeedleTask("needles", key="uuids", value="uuids"),
    "mv-niah": NeedleTask("text", values=4),
    "mq-niah": NeedleTask("text", keys=4, queries=4),
}


@dataclass(frozen=True)
class Sample:
    """A question about a long text.

    Attributes:
        prompt: the text, the question and the beginning of the answer.
        answers: strings that the continuation is to hold.
        tokens: of the prompt.
    """

    prompt: str
    answers: list[str]
    tokens: int


def read_haystack(path: str | os.PathLike[str]) -> list[str]:
    """The sentences of a text file, of a gzipped one (`.gz`), or of all such files in a folder, in order of name.

    Raises:
        OSError: there is none.
        ValueError: not UTF-8, or no text in it.
    """
    path = Path(path)
    files = [path]
    if path.is_dir():
        files = sorted(each for each in path.iterdir() if each.name.endswith((".txt", ".txt.gz", ".md")))
        if not files:
            raise FileNotFoundError(f"haystack {path} holds no .txt, .txt.gz or .md file")
    if not path.exists():
        raise FileNotFoundError(f"haystack: no such file or folder: {path}")
    words: list[str] = []
    for file in files:
        try:
            words += (gzip.decompress(file.read_bytes()).decode() if file.suffix == ".gz" else read_text(file)).split()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text: byte {error.start}") from error
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{file} is no gzip file: {error}") from error
    # A sentence ends with a word that ends so, before one that begins with a capital, a digit, a quotation mark or "(".
    sentences = re.split(r"(?:(?<=[.!?])|(?<=[.!?)][\"'”’).]))\s(?=[\"'“‘(]*[A-Z0-9])", " ".join(words))
    if not words:
        raise ValueError(f"haystack {path} has no text in it")
    return sentences


def random_string(rng: random.Random, kind: str) -> str:
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def distinct_strings(rng: random.Random, kind: str) -> Iterator[str]:
    """Endless, or as long as there are others."""
    seen: set[str] = set()
    limit = len(ADJECTIVES) * len(NOUNS) if kind == "words" else float("inf")
    while len(seen) < limit:
        string = random_string(rng, kind)
        if string not in seen:
            seen.add(string)
            yield string


def compose(task: NeedleTask, size: int, seed: str, sentences: list[str] | None) -> tuple[str, list[str]]:
    """A prompt with a haystack of `size` sentences, and the answers; all but the haystack is the same for every size.

    Args:
        seed: any string.
        sentences: of the text; None for noise.
    """
    rng = random.Random(seed)
    keys = distinct_strings(rng, task.key)
    # Distractors are drawn apart, so that their number moves nothing else.
    hidden = {key: [random_string(rng, task.value) for _ in range(task.values)] for key in islice(keys, task.keys)}
    needles = [NEEDLE.format(kind=task.value, key=key, value=value) for key in hidden for value in hidden[key]]
    rng.shuffle(needles)
    asked = rng.sample(list(hidden), task.queries)
    text = task.haystack == "text" and sentences is not None
    depths = sorted(rng.sample(range(DEPTHS), len(needles)))
    depth_of = [depth / (DEPTHS - 1) if text else rng.random() for depth in depths]
    start = rng.randrange(len(sentences)) if text and sentences else 0

    if text:
        assert sentences is not None
        hay = [sentences[(start + i) % len(sentences)] for i in range(size)]
    elif task.haystack == "needles":
        others = random.Random(rng.getrandbits(64))
        free = (key for key in distinct_strings(others, task.key) if key not in hidden)
        values = (random_string(others, task.value) for _ in range(size))
        hay = [NEEDLE.format(kind=task.value, key=key, value=value) for key, value in zip(free, values, strict=False)]
    else:
        hay = [NOISE] * size
    places = sorted(int(depth * len(hay)) for depth in depth_of)
    for place, needle in reversed(list(zip(places, needles, strict=True))):
        hay.insert(place, needle)
    context = (" " if text else "\n").join(hay)

    query = asked[0] if len(asked) == 1 else ", ".join(asked[:-1]) + ", and " + asked[-1]
    template, kind = PROMPT + ANSWER, task.value
    if task.queries * task.values == 1:
        template = template.replace("Some", "A").replace("are all", "is").replace("are", "is")
        kind = kind.removesuffix("s")
    return template.format(kind=kind, context=context, query=query), [v for key in asked for v in hidden[key]]


def needle_sample(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    seed: int = 0,
    index: int = 0,
    sentences: list[str] | None = None,
) -> Sample:
    """The longest sample, in whole sentences, that leaves `NEW_TOKENS` of `length` tokens of context for the answer.

    Args:
        name: of the task, in `NEEDLE_TASKS`.
        seed, index: which sample.
        sentences: of a text, see `read_haystack`; None for noise.

    Raises:
        ValueError: no such task, or a length in which not even the question has room.
    """
    task = needle_task(name)
    room = length - NEW_TOKENS

    draw = f"{name} {seed} {index}"

    def tokens(size: int) -> int:
        return len(encode(tokenizer, compose(task, size, draw, sentences)[0]))

    if tokens(0) > room:
        raise ValueError(
            f"length is {length} tokens, expected at least {tokens(0) + NEW_TOKENS} for the needles and the question"
            f" of {name} and {NEW_TOKENS} tokens of answer"
        )
    low, high = 0, 1  # sentences that fit, and that may not
    while tokens(high) <= room:
        low, high = high, 2 * high
        if high > 16 * length:  # distractors have run out of keys
            break
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if tokens(middle) <= room else (low, middle)
    prompt, answers = compose(task, low, draw, sentences)
    return Sample(prompt, answers, len(encode(tokenizer, prompt)))


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids behind the BOS token, where there is one."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids if tokenizer.bos_token_id is None else [tokenizer.bos_token_id, *ids]


def needle_task(name: str) -> NeedleTask:
    """The task of that name; ValueError, with the nearest, where there is none."""
    if name not in NEEDLE_TASKS:
        raise ValueError(f"there is no needle task {name!r}{hint(name, NEEDLE_TASKS)}")
    return NEEDLE_TASKS[name]


def string_match(prediction: str, answers: Sequence[str]) -> float:
    """RULER's score of one answer: the share of the strings that occur in it, whatever the case."""
    prediction = re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip().lower()
    return sum(answer.lower() in prediction for answer in answers) / len(answers)


def check_counts(samples: int, batch_size: int) -> None:
    """Raise ValueError unless there is something to answer."""
    for name, number in (("samples", samples), ("batch_size", batch_size)):
        if number < 1:
            raise ValueError(f"{name} is {number}, expected at least 1")


def score_needle(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    samples: int = 100,
    batch_size: int = 16,
    seed: int = 0,
    sentences: list[str] | None = None,
    on_sample: Callable[[int, float], None] | None = None,
) -> tuple[float, list[dict[str, Any]]]:
    """Let a model answer, greedily.

    Args:
        model: any causal language model of transformers.
        length: tokens of context: of the prompt, and `NEW_TOKENS` of answer.
        batch_size: samples answered at once, padded on the left.
        on_sample: called with the number of samples so far and their mean score.

    Returns:
        the mean score in [0, 1], and of each sample its answers, what the model said, tokens and score.

    Raises:
        ValueError: no such task, a number out of range, or a context longer than the model takes.
    """
    check_counts(samples, batch_size)
    needle_task(name)
    check_context(model.config, length)
    records: list[dict[str, Any]] = []
    was_training = model.training
    model.eval()
    try:
        for indices in batches(range(samples), batch_size):
            drawn = [needle_sample(name, tokenizer, length, seed=seed, index=i, sentences=sentences) for i in indices]
            tokens, mask = pad_rows([encode(tokenizer, sample.prompt) for sample in drawn], "left", model.device)
            with torch.inference_mode():
                output = model.generate(  # type: ignore[operator]  # every causal language model has it
                    tokens,
                    attention_mask=mask,
                    max_new_tokens=NEW_TOKENS,
                    do_sample=False,
                    **end_tokens(tokenizer),
                )
            for sample, row in zip(drawn, output[:, tokens.shape[1] :], strict=True):
                said = str(tokenizer.decode(row, skip_special_tokens=True))
                score = string_match(said, sample.answers)
                records.append({"answers": sample.answers, "said": said, "tokens": sample.tokens, "score": score})
                if on_sample is not None:
                    on_sample(len(records), sum(record["score"] for record in records) / len(records))
    finally:
        model.train(was_training)
    return sum(record["score"] for record in records) / samples, records


def run_needles(
    checkpoint: str | os.PathLike[str],
    names: Sequence[str],
    lengths: Sequence[int],
    out: str | os.PathLike[str],
    *,
    samples: int = 100,
    batch_size: int = 16,
    haystack: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> bool:
    """`carve needle`: score a checkpoint on every task and length that is not yet in `out`; add them there; a table.

    Args:
        checkpoint: a checkpoint folder, or the folder of a training run.
        names: in `NEEDLE_TASKS`.
        lengths: of the context, in tokens.
        out: a file of JSON lines, one for each task and length, with every answer.
        batch_size: samples answered at once; it changes no score but by rounding, and is no part of the results' key.
        haystack: see `read_haystack`; None for noise.

    Returns:
        whether it got to the end; an interrupt (Ctrl-C) loses the task and length that it meets, no other.

    Raises:
        OSError, ValueError: something is missing, or does not fit: before anything is run.
    """
    for what, given in (("tasks", names), ("lengths", lengths)):
        if not given:
            raise ValueError(f"{what} is empty, expected at least one")
    check_counts(samples, batch_size)
    for name in names:
        needle_task(name)
    sentences = None if haystack is None else read_haystack(haystack)
    text = None if sentences is None else hashlib.sha256("\n".join(sentences).encode()).hexdigest()[:24]
    results = read_results(out)
    folder = find_checkpoint(checkpoint)
    files = [(path.name, path.stat()) for path in sorted(folder.glob("*.safetensors"))]
    weights = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in files]
    model, tokenizer = load_checkpoint(folder)
    for length in lengths:
        check_context(model.config, length)
        for name in names:
            needle_sample(name, tokenizer, length, seed=seed, sentences=sentences)

    cases = []
    for name in names:
        for length in lengths:
            hay = NEEDLE_TASKS[name].haystack
            source = (text or "noise") if hay == "text" else hay  # by what the text is, not by where it lies
            configuration = {"checkpoint": str(folder), "weights": weights, "task": name, "length": length}
            cases.append((name, length, configuration | {"samples": samples, "haystack": source, "seed": seed}))
    left = [case for case in cases if key_of(case[2]) not in results]
    console = Console(stderr=True)
    complete = True
    with progress_on(console) as progress:
        bar = progress.add_task("needles", total=len(left) * samples, status="")
        try:
            for number, (name, length, configuration) in enumerate(left):

                def show(done: int, mean: float, before: int = number * samples, what: str = name) -> None:
                    progress.update(bar, completed=before + done, status=f"{what}: {100 * mean:.1f}")

                how: dict[str, Any] = {"samples": samples, "batch_size": batch_size, "seed": seed}
                score, records = score_needle(
                    name, model, tokenizer, length, **how, sentences=sentences, on_sample=show
                )
                append_result(out, {"configuration": configuration, "score": score, "samples": records})
                if not console.is_terminal:
                    print(f"{name} {length}: {100 * score:.1f}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            complete = False

    results = read_results(out)
    table = Table("task", "haystack", *(f"{length:,}" for length in lengths))
    for name in names:
        row = {case[1]: case[2] for case in cases if case[0] == name}
        scores = [results.get(key_of(configuration), {}).get("score") for configuration in row.values()]
        shown = ["" if score is None else f"{100 * score:.1f}" for score in scores]
        source = str(row[lengths[0]]["haystack"])
        table.add_row(name, Path(str(haystack)).name if source == text else source, *shown)
    Console().print(table)
    print(f"Mean share of the needles found, in %, by greedy generation on {samples} samples; by tokens of context.")
    return complete
