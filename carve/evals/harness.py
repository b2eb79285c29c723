"""`carve` as a model of lm-evaluation-harness: a context is read once, whatever is asked about it.

`CarveLM` answers lm-eval's three kinds of request; `run_harness` is `carve lm-eval`. All else of lm-eval stays as it
is: `python -m carve.evals.harness` is its own command line, which knows `--model carve` besides its models.
"""

import functools
import logging
import math
import os
import random
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from carve.evals.context import batches, check_context, end_tokens, pad_rows
from carve.evals.probes.results import append_result, key_of, read_results
from carve.models.checkpoint import find_checkpoint, load_checkpoint
from carve.models.configuration_carve import longest_context
from carve.models.modeling_carve import CarveForCausalLM
from carve.names import hint

try:
    import datasets
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.api.task import Task
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.evaluator import evaluate
    from lm_eval.models.utils import Collator, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.models.utils_hf import stop_sequences_criteria
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    from carve.evals.harness_tasks import TASKS, find_files, local_task
except ImportError as error:
    raise ImportError(f"{error}: the harness needs: pip install 'carve-attention[lm-eval]'") from error

PIECE = 2048  # tokens of a long text read at once
NEW_TOKENS = 256  # of an answer, where a task does not say: lm-eval's own default


@register_model("carve")
class CarveLM(TemplateLM):
    """A CARVE checkpoint as a model of lm-eval.

    Texts follow the tokenizer's BOS token where it has one, as documents do in training. What has nothing before it,
    an empty context or the first token of a rolling text, follows EOS where there is no BOS, as in lm-eval's own `hf`.

    Requests with the same context are grouped. Contexts are read `batch_size` at a time, each once; its continuations
    (the choices of a question, say) start from copies of the state that it left.

    Args:
        pretrained: a checkpoint folder, or the folder of a training run; or a model.
        tokenizer: of the model, if that is not a folder.
        batch_size: contexts, and continuations, in a forward.
        device: for a folder; see `load_checkpoint`. lm-eval's command line says `"cuda:0"` on any machine, so that
            is taken for None where there is no GPU.

    Raises:
        OSError, ValueError: as `load_checkpoint`; an argument out of range; a tokenizer with more tokens than the
            model knows, or with neither BOS nor EOS.
    """

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | CarveForCausalLM,
        tokenizer: PreTrainedTokenizerBase | None = None,
        batch_size: int | str = 16,
        device: str | torch.device | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size is {batch_size!r}, expected an integer of at least 1")
        if isinstance(pretrained, CarveForCausalLM):
            if tokenizer is None:
                raise ValueError("tokenizer is missing, expected that of the model")
            self.model: Any = pretrained
        else:
            if tokenizer is not None:
                raise ValueError("tokenizer is given with a folder, expected the one in the folder to be used")
            if str(device) == "cuda:0" and not torch.cuda.is_available():
                device = None
            self.model, tokenizer = load_checkpoint(pretrained, device)
        if len(tokenizer) > self.model.config.vocab_size:
            raise ValueError(
                f"tokenizer has {len(tokenizer)} tokens, the model knows {self.model.config.vocab_size}: "
                "expected the tokenizer that the model was trained with"
            )
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise ValueError(
                "tokenizer has neither BOS nor EOS, expected one to stand before the first token of a text"
            )
        self.tokenizer: Any = tokenizer
        self.batch_size = int(batch_size)
        self._device = self.model.device

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def max_length(self) -> int | None:
        """Tokens that the model can read in a row; None for any number."""
        return longest_context(self.model.config)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        # verbose=False: a text longer than the tokenizer's `model_max_length` is no mistake here.
        ids = self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]
        bos = self.tokenizer.bos_token_id
        if add_special_tokens is False or bos is None or ids[:1] == [bos]:
            return ids
        return [bos, *ids]

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Of each (texts, context, continuation): its log-probability in nats, and whether greedy decoding gives it."""
        by_context: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, (texts, context, continuation) in enumerate(requests):
            if not continuation:
                raise ValueError(f"a continuation has no tokens, expected at least one: {texts}")
            by_context[tuple(context)].append(i)
        longest = max((len(context) + len(continuation) - 1 for _, context, continuation in requests), default=0)
        check_context(self.model.config, longest)

        answers: dict[int, tuple[float, bool]] = {}
        contexts = sorted(by_context, key=len, reverse=True)  # what needs most memory comes first
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            for batch in batches(contexts, self.batch_size):
                tokens, mask = pad_rows(batch, "left", self._device)
                with torch.inference_mode():
                    read = self.model(tokens, attention_mask=mask, use_cache=True, logits_to_keep=1)
                rows = [(row, i) for row, context in enumerate(batch) for i in by_context[context]]
                rows.sort(key=lambda row: -len(requests[row[1]][2]))
                for part in batches(rows, self.batch_size):
                    origin = torch.tensor([row for row, _ in part], device=tokens.device)
                    scores = self._continue(read, mask, origin, [requests[i][2] for _, i in part])
                    for (_, i), answer in zip(part, scores, strict=True):
                        answers[i] = answer
                        if requests[i][0] is not None:
                            self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
                    bar.update(len(part))
        return [answers[i] for i in range(len(requests))]

    def _continue(
        self, read: Any, mask: Tensor, origin: Tensor, continuations: Sequence[Sequence[int]]
    ) -> list[tuple[float, bool]]:
        """Score continuations of contexts that have been read.

        Args:
            read: the model's output on the contexts, `[B, T]`, with its cache and the logits behind the last token.
            mask: `[B, T]`, of the contexts.
            origin: `[M]` int64, the context of each continuation.
        """
        targets, real = pad_rows(continuations, "right", self._device)  # [M, S]
        logits = read.logits[origin]  # [M, 1, vocab]
        if targets.shape[1] > 1:
            cache = read.past_key_values.copy()
            cache.reorder_cache(origin)
            with torch.inference_mode():
                seen = torch.cat([mask[origin], real[:, :-1]], 1)
                later = self.model(targets[:, :-1], attention_mask=seen, past_key_values=cache, use_cache=True).logits
            logits = torch.cat([logits, later], 1)  # [M, S, vocab]
        chosen, greedy = _choose(logits, targets)
        total = chosen.masked_fill(real == 0, 0).sum(1)
        return list(zip(total.tolist(), (greedy | (real == 0)).all(1).tolist(), strict=True))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of each text: the log-probability of all its tokens, in nats, each given all before it, in constant memory.

        A model with attention layers sees windows of `max_position_embeddings`, laid as lm-eval lays them.
        """
        answers = []
        for (text,) in tqdm([request.args for request in requests], disable=disable_tqdm, desc="Running rolling texts"):
            ids = self.tok_encode(text, add_special_tokens=False)
            if self.max_length is None:
                answer = self._carry(ids)
            else:
                windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
                pairs = [make_disjoint_window(window) for window in windows]
                answer = sum(self._loglikelihood_tokens([(None, *pair)], disable_tqdm=True)[0][0] for pair in pairs)
            answers.append(answer)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), answer)
        return answers

    def _carry(self, ids: list[int]) -> float:
        row = torch.tensor([[self.prefix_token_id, *ids]], device=self._device)
        cache, total = None, 0.0
        for start in range(0, len(ids), PIECE):
            piece = row[:, start : start + PIECE + 1]
            with torch.inference_mode():
                read = self.model(piece[:, :-1], past_key_values=cache, use_cache=True)
            cache = read.past_key_values
            total += _choose(read.logits, piece[:, 1:])[0].sum().item()
        return total

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each context until a stop string, EOS or the number of tokens that its task sets; greedily unless
        the task says otherwise."""
        by_arguments = Collator(
            [request.args for request in requests],
            sort_fn=lambda args: -len(args[0]),
            group_by="gen_kwargs",
            group_fn=lambda args: args[1],
        )
        longest = max((len(self._prompt(r.args[0])) + _new_tokens(r.args[1]) - 1 for r in requests), default=0)
        check_context(self.model.config, longest)
        tokenizer, answers = self.tokenizer, []
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests") as bar:
            for batch in by_arguments.get_batched(n=self.batch_size):
                arguments: dict[str, Any] = dict(normalize_gen_kwargs(batch[0][1], NEW_TOKENS))
                until, new_tokens = arguments.pop("until"), arguments.pop("max_gen_toks")
                if not arguments["do_sample"]:
                    arguments.pop("temperature", None)
                tokens, mask = pad_rows([self._prompt(context) for context, _ in batch], "left", self._device)
                written = self.model.generate(
                    tokens,
                    attention_mask=mask,
                    max_new_tokens=new_tokens,
                    stopping_criteria=stop_sequences_criteria(tokenizer, until, tokens.shape[1], len(batch)),
                    **end_tokens(tokenizer),
                    **arguments,
                )
                for (context, gen_kwargs), row in zip(batch, written[:, tokens.shape[1] :], strict=True):
                    text = tokenizer.decode(row, skip_special_tokens=True)
                    answers.append(postprocess_generated_text(text, until, None))
                    self.cache_hook.add_partial("generate_until", (context, gen_kwargs), answers[-1])
                bar.update(len(batch))
        return by_arguments.get_original(answers)

    def _prompt(self, context: str) -> list[int]:
        return self.tok_encode(context) or [self.prefix_token_id]


def _choose(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the targets (`[B, T]`, float64), and whether each is the likeliest token (`[B, T]` bool)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chosen = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return chosen.double(), logits.argmax(-1) == targets


def _new_tokens(gen_kwargs: dict[str, Any]) -> int:
    return int(normalize_gen_kwargs(gen_kwargs, NEW_TOKENS)["max_gen_toks"])


# -- `carve lm-eval` ---------------------------------------------------------------------------------


class Case(NamedTuple):
    """A task to score.

    Attributes:
        name: lm-eval's.
        task: lm-eval's.
        file: of its examples; None for the Hub.
        length: of RULER's contexts, in tokens; None for other tasks.
    """

    name: str
    task: Task
    file: Path | None
    length: int | None


def find_tasks(names: Sequence[str]) -> dict[str, tuple[str, Path]]:
    """Where lm-eval defines each name: `"task"`, `"group"` or `"tag"`, and a YAML file.

    Raises:
        ValueError: it has no such name; the message has the nearest.
    """
    defined = _definitions()
    for name in names:
        if name not in defined:
            raise ValueError(f"lm-eval has no task {name!r}{hint(name, defined)}")
    return {name: defined[name] for name in names}


@functools.cache
def _definitions() -> dict[str, tuple[str, Path]]:
    """All names, from the text of lm-eval's 14,000 files: to parse them, as its own index does, takes half a minute."""
    spec = find_spec("lm_eval")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    key = re.compile(r"^[\"']?(task|group|tag)[\"']?:(.*(?:\n *- .*)*)", re.MULTILINE)
    defined: dict[str, tuple[str, Path]] = {}
    for path in sorted(Path(spec.submodule_search_locations[0], "tasks").rglob("*")):
        if path.suffix in (".yaml", "") and path.is_file():  # what others include may have no suffix
            for kind, value in key.findall(path.read_text(encoding="utf-8")):
                if kind == "tag" or "\n" not in value:  # a list under `task:` is what a group has in it
                    for name in re.split(r"\n *- |,", value):
                        defined.setdefault(name.partition("#")[0].strip(" []\"'\n"), (kind, path))
    return defined


def load_cases(
    names: Sequence[str], files: dict[str, Path], lengths: Sequence[int], tokenizer: str | os.PathLike[str]
) -> list[Case]:
    """The tasks of these names with their data, groups taken apart; RULER's once for each length.

    Args:
        files: of examples, by name; see `find_files`.
        tokenizer: a folder with the one that RULER counts tokens with.

    Raises:
        ValueError: no such task, or its data cannot be loaded.
        ImportError: a package that a task needs is not installed.
    """
    cases: list[Case] = []
    for name, (kind, path) in find_tasks(names).items():
        file, ruler = files.get(name), path.parent.name == "ruler" and kind != "tag"
        for length in lengths if ruler else [None]:
            manager = TaskManager(
                include_defaults=kind != "task" and not ruler,  # other groups may have their tasks anywhere
                include_path=str(path.parent),
                metadata={"tokenizer": str(tokenizer)} | ({"max_seq_lengths": [length]} if ruler else {}),
            )
            spec: Any = name
            if file is not None:  # a member of a group: that is where lm-eval takes what differs from its definition
                spec = {"group": "carve", "task": [{"task": name} | local_task(name, file)]}
            random.seed(DEFAULT_RANDOM_SEED)  # RULER draws its samples here
            np.random.seed(DEFAULT_OTHER_SEED)
            try:
                loaded = manager.load(spec)["tasks"]
            except (OSError, LookupError, ValueError) as error:
                local = f", or --data {name}=FILE" if name in TASKS else ""
                remedy = f"; it takes a network{local}" if file is None else ""
                raise ValueError(f"the data of task {name!r} cannot be loaded{remedy}: {error}") from error
            for each, task in loaded.items():
                if task.config.num_fewshot is None:
                    task.set_config("num_fewshot", 0)
                task.set_fewshot_seed(DEFAULT_OTHER_SEED)
                cases.append(Case(each, task, file, length))
    return cases


def run_harness(
    checkpoint: str | os.PathLike[str],
    names: Sequence[str],
    out: str | os.PathLike[str],
    *,
    data: Iterable[str] = (),
    lengths: Sequence[int] = (1024, 2048, 4096),
    limit: int | None = None,
    batch_size: int = 16,
) -> bool:
    """`carve lm-eval`: score a checkpoint on every task that is not yet in `out`; add it there; a table.

    Args:
        checkpoint: a checkpoint folder, or the folder of a training run.
        names: tasks, groups or tags of lm-eval.
        out: a file of JSON lines, one for each task, with the model's every answer.
        data: files to take the examples from instead of the Hub: see `find_files`.
        lengths: of the context of RULER's tasks, in tokens.
        limit: examples of a task; None for all.
        batch_size: see `CarveLM`.

    Returns:
        whether it got to the end; an interrupt (Ctrl-C) loses the task that it meets, no other.

    Raises:
        OSError, ValueError: something is missing, or does not fit: before anything is run.
    """
    for what, given in (("tasks", names), ("lengths", lengths)):
        if not given:
            raise ValueError(f"{what} is empty, expected at least one")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}, expected at least 1")
    if min(lengths) < 1:
        raise ValueError(f"lengths has {min(lengths)}, expected at least 1")
    results = read_results(out)
    find_tasks(names)
    files = find_files(names, data)
    folder = find_checkpoint(checkpoint)
    model = CarveLM(folder, batch_size=batch_size)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    os.environ["DISABLE_MULTIPROC"] = "1"  # lm-eval would fork a process a core for the error of a perplexity
    cases = load_cases(names, files, lengths, folder)
    for case in cases:
        check_context(model.model.config, case.length or 0)
    keys = [_configuration(case, folder, limit) for case in cases]

    complete = True
    left = [(case, key) for case, key in zip(cases, keys, strict=True) if key_of(key) not in results]
    try:
        for number, (case, key) in enumerate(left, start=1):
            name = case.name if case.length is None else f"{case.name}, {case.length} tokens"
            print(f"{name} ({number} of {len(left)})", file=sys.stderr, flush=True)
            append_result(out, {"configuration": key} | _evaluate(model, case, limit))
    except KeyboardInterrupt:
        complete = False

    results = read_results(out)
    table = Table("task", "examples", "metric", "value", "standard error")
    for case, key in zip(cases, keys, strict=True):
        record = results.get(key_of(key), {"scores": {}})
        first = True
        for metric, score in record["scores"].items():
            if "_stderr" not in metric:
                head = (case.name, f"{len(record['examples']):,}") if first else ("", "")
                kind, comma, answers = metric.partition(",")
                error = record["scores"].get(f"{kind}_stderr{comma}{answers}")
                table.add_row(*head, metric, _shown(score), _shown(error))
                first = False
    Console().print(table)
    return complete


def _configuration(case: Case, folder: Path, limit: int | None) -> dict[str, Any]:
    """What a result depends on; two runs with the same one are the same."""
    weights = [[path.name, *_state(path)] for path in sorted(folder.glob("*.safetensors"))]
    configuration: dict[str, Any] = {"checkpoint": str(folder), "weights": weights, "task": case.name, "limit": limit}
    if case.file is not None:
        configuration["data"] = [str(case.file), *_state(case.file)]
    if case.length is not None:
        configuration["length"] = case.length
    return configuration | {"lm_eval": version("lm_eval"), "task_version": case.task.VERSION}


def _state(path: Path) -> tuple[int, int]:
    return path.stat().st_size, path.stat().st_mtime_ns


def _evaluate(model: CarveLM, case: Case, limit: int | None) -> dict[str, Any]:
    """The scores of a task and, of every example, what the model answered and what that counts."""
    tasks = {"tasks": {case.name: case.task}}
    evaluated: Any = evaluate(model, tasks, limit=limit, bootstrap_iters=1000)
    scores = {
        key.removesuffix(",none"): score
        for key, score in evaluated["results"][case.name].items()
        if "," in key and isinstance(score, int | float) and score != -1  # RULER has -1 for other lengths
    }
    examples = [
        {field: example[field] for field in ("doc_id", "target", "filtered_resps", *example["metrics"])}
        for example in evaluated["samples"][case.name]
    ]
    return _plain({"scores": scores, "examples": examples})


def _shown(number: float | None) -> str:
    return "" if number is None else f"{number:.6g}"


def _plain(value: Any) -> Any:
    """A value as JSON has it: no NaN, no infinity, no numbers of NumPy."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
