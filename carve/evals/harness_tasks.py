"""The data of lm-eval's tasks from local files: its own prompts and metrics, without the Hub.

A file holds JSON lines (`.jsonl`), gzipped or not, with the fields of the data set that lm-eval loads, or with those
that `TASKS` shows how to read; WikiText may be plain text (`.txt`), SQuAD its own JSON (`.json`).
"""

import gzip
import importlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

Record = dict[str, Any]


@dataclass(frozen=True)
class LocalTask:
    """How to read a task's examples.

    Attributes:
        file: how the names of files begin that hold them.
        fields: that lm-eval reads of an example.
        convert: makes these from a record that has others; None where there is no other form.
    """

    file: str
    fields: tuple[str, ...]
    convert: Callable[[Record], Record] | None = None


def _lettered(record: Record) -> Record:
    letters = [chr(ord("A") + i) for i in range(len(record["choices"]))]
    return {"choices": {"text": record["choices"], "label": letters}, "answerKey": letters[record["gold"]]}


def _arc(record: Record) -> Record:
    return {"question": record["question"]} | _lettered(record)


def _openbookqa(record: Record) -> Record:
    return {"question_stem": record["query"]} | _lettered(record)


def _piqa(record: Record) -> Record:
    first, second = record["choices"]
    return {"goal": record["goal"], "sol1": first, "sol2": second, "label": record["gold"]}


def _hellaswag(record: Record) -> Record:
    # lm-eval joins the label of the activity and two parts of the context; here all three are one text already.
    label, colon, context = record["context"].partition(": ")
    if not colon:
        raise ValueError("'context' has no label of an activity and colon at its beginning")
    endings = {"endings": record["choices"], "label": str(record["gold"])}
    return {"activity_label": label, "ctx_a": context, "ctx_b": ""} | endings


def _winogrande(record: Record) -> Record:
    # lm-eval puts each option in the place of the underscore: all of the context is an option here.
    first, second = record["context_options"]
    sentence, answer = "_ " + record["continuation"], str(record["gold"] + 1)
    return {"sentence": sentence, "option1": first, "option2": second, "answer": answer}


def _social_iqa(record: Record) -> Record:
    answers = dict(zip(("answerA", "answerB", "answerC"), record["choices"], strict=True))
    return {"context": record["context"], "question": record["question"], "label": str(record["gold"] + 1)} | answers


def _boolq(record: Record) -> Record:
    parts = re.fullmatch(r"Passage: (.*)\nQuestion: (.*)\?", record["query"], re.DOTALL)
    if parts is None or record["choices"] != ["no", "yes"]:
        raise ValueError("expected 'query' to be 'Passage: ...', a new line and 'Question: ...?', 'choices' no and yes")
    return {"passage": parts[1], "question": parts[2], "label": record["gold"]}


def _lambada(record: Record) -> Record:
    space = "" if record["continuation"][:1].isspace() else " "
    return {"text": record["context"] + space + record["continuation"]}


TASKS = {
    "wikitext": LocalTask("wikitext", ("page",)),
    "lambada_openai": LocalTask("lambada", ("text",), _lambada),
    "piqa": LocalTask("piqa", ("goal", "sol1", "sol2", "label"), _piqa),
    "hellaswag": LocalTask("hellaswag", ("activity_label", "ctx_a", "ctx_b", "endings", "label"), _hellaswag),
    "winogrande": LocalTask("winogrande", ("sentence", "option1", "option2", "answer"), _winogrande),
    "arc_easy": LocalTask("arc_easy", ("question", "choices", "answerKey"), _arc),
    "arc_challenge": LocalTask("arc_challenge", ("question", "choices", "answerKey"), _arc),
    "social_iqa": LocalTask("siqa", ("context", "question", "answerA", "answerB", "answerC", "label"), _social_iqa),
    "boolq": LocalTask("boolq", ("passage", "question", "label"), _boolq),
    "openbookqa": LocalTask("openbookqa", ("question_stem", "choices", "answerKey"), _openbookqa),
    "squad_completion": LocalTask("squad", ("text", "value")),
    "swde": LocalTask("swde", ("text", "value")),
    "fda": LocalTask("fda", ("text", "value")),
}
COMMON_SENSE = list(TASKS)[:10]
COMPLETION = {"squad_completion": "SQUADCompletion", "swde": "SWDE", "fda": "FDA"}  # classes, not YAML, in lm-eval


def find_files(names: Sequence[str], data: Iterable[str]) -> dict[str, Path]:
    """The local files of tasks.

    Args:
        names: of tasks.
        data: each either `TASK=FILE`, or a folder: then every task in `TASKS` without a file of its own has one there,
            whose name begins as said there.

    Raises:
        OSError: no such file, or a folder without one for a task.
        ValueError: a task that is not run, or one whose data cannot be local; several files for it in a folder.
    """
    files: dict[str, Path] = {}
    folders: list[Path] = []
    for each in data:
        name, equals, path = each.partition("=")
        if not equals:
            folders.append(Path(each))
            if not folders[-1].is_dir():
                raise NotADirectoryError(f"data is {each!r}, expected a folder or TASK=FILE")
            continue
        if name not in names:
            raise ValueError(f"data has a file for {name!r}, expected one of the tasks {', '.join(names)}")
        files[name] = Path(path)
        if not files[name].is_file():
            raise FileNotFoundError(f"data of {name}: no such file: {path}")
    for name in names:
        if name not in TASKS and name in files:
            raise ValueError(f"the data of {name!r} cannot be local, only that of {', '.join(TASKS)}")
        if name in TASKS and name not in files and folders:
            beginning = TASKS[name].file
            there = sorted(path for folder in folders for path in folder.glob(f"{beginning}*") if path.is_file())
            if not there:
                raise FileNotFoundError(f"no file {beginning}* for {name} in {', '.join(map(str, folders))}")
            if len(there) > 1:
                raise ValueError(f"several files for {name}: {', '.join(map(str, there))}; choose: {name}=FILE")
            files[name] = there[0]
    return files


def local_task(name: str, path: str | os.PathLike[str]) -> dict[str, Any]:
    """What to change in lm-eval's definition of a task so that its examples are those of a file.

    Raises:
        OSError, ValueError: as `read_examples`.
    """
    examples = datasets.Dataset.from_list(read_examples(name, path))

    def local_examples(**kwargs: Any) -> dict[str, datasets.Dataset]:
        return {"test": examples}

    if name not in COMPLETION:
        splits = {"training_split": None, "validation_split": None, "test_split": "test"}
        return {"custom_dataset": local_examples} | splits
    official = getattr(importlib.import_module(f"lm_eval.tasks.{name}.task"), COMPLETION[name])

    def download(self: Any, *args: Any, **kwargs: Any) -> None:
        self.dataset = {"validation": examples}

    return {"class": type(official.__name__, (official,), {"download": download})}


def read_examples(name: str, path: str | os.PathLike[str]) -> list[Record]:
    """The examples of a task, with the fields that lm-eval reads.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not what it should be; the message names the line and what was expected.
    """
    path, task = Path(path), TASKS[name]
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            text = file.read().decode("utf-8")
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path} is damaged, or no UTF-8 text: {error}") from error
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if name == "wikitext" and kind == ".txt":
        records: list[Any] = [{"page": page} for page in wikitext_pages(text)]
    elif name == "squad_completion" and kind == ".json":
        records = _squad(text, path)
    elif kind == ".jsonl":
        records = [_parse(line, path, number) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    else:
        raise ValueError(f"{path}: expected a file .jsonl or .jsonl.gz for {name}")
    if not records:
        raise ValueError(f"{path} is empty: no example of {name}")
    return [_example(task, record, path, number) for number, record in enumerate(records, 1)]


def _parse(text: str, path: Path, number: int) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: not JSON: {error}") from error


def _example(task: LocalTask, record: Any, path: Path, number: int) -> Record:
    try:
        if set(task.fields) <= set(record):
            return {field: record[field] for field in task.fields}
        if task.convert is not None:
            if "choices" in record and not 0 <= record["gold"] < len(record["choices"]):
                raise ValueError(f"'gold' is {record['gold']}, expected the index of a choice")
            return task.convert(record)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        reason = f"no field {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}, example {number}: {reason}") from error
    raise ValueError(f"{path}, example {number}: expected the fields {', '.join(task.fields)}")


def wikitext_pages(text: str) -> list[str]:
    """A WikiText file, cut before each title, a line such as ` = Robert Boulter = `, as the data set of lm-eval is."""
    return [page for page in re.split(r"^(?= = (?!= ).* = ?$)", text, flags=re.MULTILINE) if page.strip()]


def _squad(text: str, path: Path) -> list[Record]:
    """Paragraph and question, to be completed by the first answer. The data set of lm-eval has statements instead."""
    try:
        return [
            {
                "text": f"{paragraph['context']}\n\nQuestion: {question['question']}\nAnswer:",
                "value": question["answers"][0]["text"],
            }
            for article in _parse(text, path, 1)["data"]
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
            if question["answers"]  # version 2 has questions without
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected SQuAD's own JSON, found no {error}") from error
