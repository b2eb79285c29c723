"""Measuring a trained model token by token, many sequences at once, and what its content term is good for."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from carve.evals.probes.training import adamw
from carve.inspection import trace_gates
from carve.mixer import CarveMixer
from carve.models import CarveConfig, CarveForCausalLM
from carve.models.cache_carve import CarveCache, RecurrentCacheLayer
from carve.train.data import Tokens
from carve.train.run import compile_blocks

FIRST_BIN = 64  # the largest number of tokens before those of the first bin
SWAPPED = 128  # windows in which the content is exchanged, at most
TRACED = 1024  # tokens whose gates are traced, at most


def documents_of(tokens: Tokens) -> list[np.ndarray]:
    """The documents of a text, each `[n]`, without the end-of-text token."""
    ends = [*tokens.starts[1:], len(tokens.ids)]
    return [tokens.ids[start : end - 1] for start, end in zip(tokens.starts, ends, strict=True)]


@dataclass(frozen=True)
class Measure:
    """How models are measured: how many sequences of how many tokens at once, and in which dtype."""

    seq_len: int
    micro_batch: int
    dtype: str

    def autocast(self, device: torch.device) -> Any:
        return torch.autocast(device.type, torch.bfloat16) if self.dtype == "bfloat16" else nullcontext()

    # -- perplexity --

    def windows(self, tokens: Tokens) -> list[np.ndarray]:
        """The documents cut into pieces of `seq_len` tokens and the one behind each, its last target."""
        L = self.seq_len
        return [x[i : i + L + 1] for x in documents_of(tokens) for i in range(0, len(x) - 1, L)]

    def score_windows(self, model: CarveForCausalLM, windows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Nats of each token of each window but the first, given those before it in the window: `[tokens - 1]` each.

        Added up, that is `carve.evals.perplexity` with `window=seq_len`, for a tokenizer without BOS.
        """
        found: list[np.ndarray] = []
        for start in range(0, len(windows), self.micro_batch):
            batch = windows[start : start + self.micro_batch]
            ids = pad(batch, model.device)
            with torch.inference_mode(), self.autocast(model.device):
                nats = nats_of(model(ids[:, :-1], use_cache=False).logits, ids[:, 1:])
            found += [row[: len(window) - 1] for row, window in zip(nats, batch, strict=True)]
        return found

    def score_carried(self, model: CarveForCausalLM, tokens: Tokens) -> list[np.ndarray]:
        """The same for whole documents, `[tokens - 1]` each, the memory carried on from piece to piece.

        Added up, that is `carve.evals.perplexity` without a window, for a tokenizer without BOS.
        """
        documents = [x for x in documents_of(tokens) if len(x) > 1]
        order = sorted(range(len(documents)), key=lambda i: -len(documents[i]))
        found: dict[int, list[np.ndarray]] = {i: [] for i in order}
        for first in range(0, len(order), self.micro_batch):
            rows = order[first : first + self.micro_batch]
            cache, start = CarveCache(model.config), 0
            while rows:
                piece = self.seq_len * self.micro_batch // len(rows)
                ids = pad([documents[i][start : start + piece + 1] for i in rows], model.device)
                with torch.inference_mode(), self.autocast(model.device):
                    read = model(ids[:, :-1], past_key_values=cache, use_cache=True)
                    nats = nats_of(read.logits, ids[:, 1:])
                start += ids.shape[1] - 1
                for i, row in zip(rows, nats, strict=True):  # what is behind a document's end is padding
                    found[i].append(row[: max(0, len(documents[i]) - 1 - start + len(row))])
                going = [len(documents[i]) - 1 > start for i in rows]
                rows = [i for i, goes in zip(rows, going, strict=True) if goes]
                if rows and not all(going):
                    cache.batch_select_indices(torch.tensor(going).nonzero().flatten())
        return [np.concatenate(found[i]) for i in range(len(documents))]

    def score_text(self, model: CarveForCausalLM, tokens: Tokens, *, carried: bool) -> dict[str, Any]:
        """The score of a text, as plain data: nats and tokens, in all, by window, and by what comes before a token."""
        scores = self.score_windows(model, self.windows(tokens))
        score: dict[str, Any] = total(scores)
        score["windows"] = [[round(float(x.sum()), 3), len(x)] for x in scores]
        score["by_context"] = binned(scores)
        if carried:
            scores = self.score_carried(model, tokens)
            score["carried"] = total(scores) | {"by_position": binned(scores)}
        return score

    # -- what the content term is good for --

    def content_report(
        self, model: CarveForCausalLM, tokenizer: PreTrainedTokenizerBase, tokens: Tokens
    ) -> dict[str, Any]:
        """What the content term does: the loss without it and with another sequence's, how far it moves gates."""
        windows = self.windows(tokens)
        with content_off(model):
            off = total(self.score_windows(model, windows))
        report: dict[str, Any] = {"off": off, "swapped": None}
        full = [window for window in windows if len(window) == self.seq_len + 1]
        half = min(len(full), SWAPPED) // 2
        if half and model.config.chunk_size < self.seq_len:
            far = [w for pair in zip(full[:half], full[len(full) - half :], strict=True) for w in pair]
            own, other = (total(self.score_by_chunks(model, far, swapped=swapped)) for swapped in (False, True))
            report["swapped"] = {"tokens": own["tokens"], "own": own["nats"], "other": other["nats"]}
        document = max(documents_of(tokens), key=len)
        middle = document[len(document) // 2 :][:TRACED]
        with self.autocast(model.device):
            trace = trace_gates(model, tokenizer, str(tokenizer.decode(middle.astype(int))))
        at = max(0, trace.content_from)
        report["gates"] = [
            {
                "layer": layer.index,
                "erase": by_head(layer.erase[at:]),
                "erase_shift": by_head(layer.erase_shift[at:]),
                "write_shift": None if layer.write_shift is None else by_head(layer.write_shift[at:]),
                "same": None if layer.same is None else rounded(layer.same),
                "beside": None if layer.beside is None else rounded(layer.beside),
            }
            for layer in trace.layers
            if layer.erase_shift is not None and len(layer.erase_shift) > at
        ]
        return report

    def score_by_chunks(
        self, model: CarveForCausalLM, windows: Sequence[np.ndarray], *, swapped: bool
    ) -> list[np.ndarray]:
        """`score_windows` of full windows, an even number of them, read chunk by chunk.

        With `swapped` the gates see in every chunk what they would see in the other window of a pair (0 and 1,
        2 and 3, ...), while the memory that they edit stays the window's own.
        """
        found: list[np.ndarray] = []
        size = 2 * max(1, self.seq_len * self.micro_batch // model.config.chunk_size // 2)
        for first in range(0, len(windows), size):
            ids = pad(windows[first : first + size], model.device)
            cache, nats = CarveCache(model.config), []
            other = torch.arange(len(ids), device=model.device) ^ 1
            for start in range(0, self.seq_len, model.config.chunk_size):
                piece = ids[:, start : min(start + model.config.chunk_size, self.seq_len) + 1]
                with torch.inference_mode(), self.autocast(model.device):
                    read = model(piece[:, :-1], past_key_values=cache, use_cache=True)
                    nats.append(nats_of(read.logits, piece[:, 1:]))
                    if swapped:
                        swap_content(cache, other)
            found += list(np.concatenate(nats, 1))
        return found


def pad(rows: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """Rows as `[B, T]` int64 on the device, padded behind their ends, where nothing is read from."""
    longest = max(map(len, rows))
    padded = np.stack([np.pad(row.astype(np.int64), (0, longest - len(row))) for row in rows])
    return torch.from_numpy(padded).to(device)


def nats_of(logits: Tensor, targets: Tensor) -> np.ndarray:
    """`-ln p(target)`, `[B, T]` float64, from logits `[B, T, vocab]`.

    Raises:
        FloatingPointError: one is not finite.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    nats = F.cross_entropy(logits, targets.flatten(), reduction="none")
    if not nats.isfinite().all():
        raise FloatingPointError("the loss of a token is not finite")
    return nats.view(targets.shape).double().cpu().numpy()


def total(scores: Sequence[np.ndarray]) -> dict[str, Any]:
    return {"nats": float(sum(x.sum() for x in scores)), "tokens": sum(map(len, scores))}


def binned(scores: Sequence[np.ndarray]) -> list[list[Any]]:
    """`[from, to, nats, tokens]` of the tokens with from <= n <= to tokens before them: 1 to 64, then doubling."""
    longest, low, high, bins = max(map(len, scores)), 1, FIRST_BIN, []
    while low <= longest:
        parts = [x[low - 1 : high] for x in scores]
        bins.append([low, high, round(float(sum(x.sum() for x in parts)), 3), sum(map(len, parts))])
        low, high = high + 1, 2 * high
    return bins


def by_head(x: np.ndarray | None) -> list[float]:
    """The mean over tokens, `[T, HV]` -> `[HV]`."""
    assert x is not None
    return rounded(x.mean(0))


def rounded(x: np.ndarray) -> list[float]:
    return [round(float(y), 6) for y in x]


@contextmanager
def content_off(model: nn.Module) -> Iterator[None]:
    """Within `with`: the gates see nothing of the memory."""
    factors = [
        p
        for mixer in model.modules()
        if isinstance(mixer, CarveMixer)
        for p in (mixer.p_up, mixer.p_write)
        if p is not None
    ]
    kept = [p.detach().clone() for p in factors]
    with torch.no_grad():
        for p in factors:
            p.zero_()
    try:
        yield
    finally:
        with torch.no_grad():
            for p, was in zip(factors, kept, strict=True):
                p.copy_(was)


def swap_content(cache: CarveCache, other: Tensor) -> None:
    """Give each sequence the content of the one at `other` (`[N]` int64)."""
    for layer in cache.layers:
        if isinstance(layer, RecurrentCacheLayer) and layer.state is not None:
            memory = layer.state.memory
            if memory.content is not None:
                layer.state = layer.state._replace(memory=memory._replace(content=memory.content[other]))


# -- speed --


def measure_speed(
    settings: Sequence[Mapping[str, Any]], device: torch.device, *, rounds: int = 3, steps: int = 5
) -> list[dict[str, Any]]:
    """Training steps of fresh models, in turns: tokens a second of each round, and bytes at the peak (GPU only).

    Args:
        settings: for each model the fields of `TrainConfig`. A step is one of `micro_batch` sequences of `seq_len`
            random tokens, the optimizer's included.
    """
    found: list[dict[str, Any]] = [{"tokens_per_second": [], "peak_bytes": None} for _ in settings]
    cuda = device.type == "cuda"
    for _ in range(rounds):
        for how, record in zip(settings, found, strict=True):
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device) if cuda else 0
            seconds, tokens = time_steps(how, device, steps)
            record["tokens_per_second"].append(round(tokens / seconds, 1))
            if cuda:
                record["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before
    return found


def time_steps(how: Mapping[str, Any], device: torch.device, steps: int) -> tuple[float, int]:
    """Seconds and tokens of so many training steps of a fresh model, after three to warm up."""
    measure = Measure(how["seq_len"], how["micro_batch"], how["dtype"])
    model = CarveForCausalLM(CarveConfig(**how["model"]))
    nn.Module.to(model, device)
    model.train()
    if how["gradient_checkpointing"]:
        model.gradient_checkpointing_enable()
    if how["compile"]:
        compile_blocks(model)
    optimizer = adamw(model, 0.0)  # takes as long as any other rate, and no weights run away
    ids = torch.randint(how["model"]["vocab_size"], (how["micro_batch"], how["seq_len"]), device=device)
    for step in range(3 + steps):
        if step == 3:
            wait_for(device)
            begin = time.perf_counter()
        with measure.autocast(device):
            loss = model(ids, labels=ids, use_cache=False, skip_logits=True).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), how["clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    wait_for(device)
    return time.perf_counter() - begin, steps * ids.numel()


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
