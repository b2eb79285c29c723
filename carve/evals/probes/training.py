"""Training a small model on a synthetic task, always in the same way, and measuring what it answers."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from carve.evals.context import check_context
from carve.evals.mixers import MIXERS, mixer_fields
from carve.evals.probes.tasks import IGNORE, Batch, Task
from carve.models import CarveConfig, CarveForCausalLM
from carve.models.configuration_carve import ATTENTION

# Heads of 64 and R <= 16 are what the fused kernels serve; short chunks let the content be heard early.
MODEL = {
    "hidden_size": 128,
    "num_heads": 2,
    "head_dim": 64,
    "intermediate_size": 128,
    "chunk_size": 16,
    "content_rank": 16,
    "sliding_window": 32,
    "initializer_range": 0.1,
}
BETAS, WEIGHT_DECAY, CLIP, WARMUP, FLOOR = (0.9, 0.95), 0.1, 1.0, 0.1, 0.1
TRAIN, VALIDATION, TEST = range(3)  # streams of sequences drawn from one seed


@dataclass(frozen=True)
class ProbeScore:
    """How a trained model answers sequences that it has not seen.

    Attributes:
        accuracy: share of the answers that are right, on test sequences.
        validation: the same on others, to choose a learning rate by.
        by_distance: `(from, to, accuracy, answers)` of the test answers whose distance d is from <= d < to.
        losses: `(step, nats an answer)` while it trained, about 20 of them.
        parameters: of the model, embeddings included.
    """

    accuracy: float
    validation: float
    by_distance: list[tuple[int, int, float, int]]
    losses: list[tuple[int, float]]
    parameters: int


class Questions(NamedTuple):
    """Sequences on the device.

    Attributes:
        input_ids: `[B, T]` int64.
        places: `[B, Q]` int64, where the Q answers of each are asked for.
        labels: `[B, Q]` int64, the answers.
    """

    input_ids: Tensor
    places: Tensor
    labels: Tensor


def probe_config(task: Task, mixer: str, **fields: Any) -> CarveConfig:
    """The smallest model that is known to be able to solve the task, with the mixer of that name.

    Args:
        mixer: a name in `carve.evals.mixers.MIXERS`.
        fields: of `CarveConfig`, to replace those chosen here.

    Raises:
        ValueError: no such mixer, a field that does not fit, or sequences longer than attention layers take.
    """
    layers = fields.pop("num_hidden_layers", None)
    if layers is None:
        period = MIXERS[mixer]["layer_types"] if mixer in MIXERS else []
        layers = max(task.layers, len(period))
        if set(period) <= set(ATTENTION):
            layers += 1  # without a short convolution it takes a layer to see the token before
    chosen = MODEL | task.model | mixer_fields(mixer, layers) | fields
    config = CarveConfig(vocab_size=task.vocab_size, **chosen)
    check_context(config, task.tokens)
    return config


def train_probe(
    task: Task,
    config: CarveConfig,
    *,
    steps: int = 2000,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    seed: int = 0,
    evaluated: int = 1024,
    device: str | torch.device = "cpu",
    on_step: Callable[[int, float | None], None] | None = None,
) -> ProbeScore:
    """Train a model on a task and measure it.

    AdamW (betas 0.9 and 0.95, weight decay 0.1 of matrices), gradients clipped to norm 1, a warm-up over a tenth of
    the steps and a cosine to a tenth of the peak. Every step sees new sequences. On a CPU in float32, and to the same
    bits whenever it is run on the same number of threads; on a GPU under bfloat16 autocast.

    Args:
        config: of the model; see `probe_config`.
        seed: of weights and sequences.
        evaluated: sequences of validation, and of test.
        on_step: called after every step with its number, from 1, and the loss where that is known (about 20 times).

    Raises:
        ValueError: an argument out of range.
        FloatingPointError: the training diverged: the loss, what goes into the op or what comes out of the model is
            not finite, be it only behind the last step.
    """
    for name, number in (("steps", steps), ("batch_size", batch_size), ("evaluated", evaluated)):
        if number < 1:
            raise ValueError(f"{name} is {number}, expected at least 1")
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate is {learning_rate}, expected a positive finite number")
    if seed < 0:
        raise ValueError(f"seed is {seed}, expected at least 0")
    check_context(config, task.tokens)
    device = torch.device(device)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CarveForCausalLM(config)  # on the CPU: the same weights on every device
    nn.Module.to(model, device)
    model.train()
    optimizer = adamw(model, learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))

    def learn(questions: Questions) -> Tensor:
        loss = F.cross_entropy(answer(model, questions).flatten(0, 1), questions.labels.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return loss.detach()

    losses: list[tuple[int, float]] = []
    step = 0
    take = Captured(learn) if device.type == "cuda" else learn
    try:
        for step, questions in enumerate(training_batches(task, steps, batch_size, seed, device), start=1):
            loss = take(questions)
            schedule.step()
            # Reading the loss waits for the device: only now and then.
            known = step % max(1, steps // 20) == 0 or step == steps
            if known:
                losses.append((step, loss.item()))
                if not math.isfinite(losses[-1][1]):
                    raise FloatingPointError(f"the loss is {losses[-1][1]}")
            if on_step is not None:
                on_step(step, losses[-1][1] if known else None)

        model.eval()
        right, _ = evaluate(model, task, [seed, VALIDATION], evaluated, device)
        validation = right.mean().item()
        right, distance = evaluate(model, task, [seed, TEST], evaluated, device)
    except FloatingPointError as error:
        raise FloatingPointError(f"diverged at step {step}: {error}") from error
    return ProbeScore(
        accuracy=right.mean().item(),
        validation=validation,
        by_distance=by_distance(right, distance),
        losses=losses,
        parameters=sum(p.numel() for p in model.parameters()),
    )


class Captured:
    """A training step as one CUDA graph: a model so small waits for its kernels to be launched, not for them to run.

    The first steps are taken as they are: kernels are compiled, and the optimizer's state is made. So are all where one
    waits for the device, as plain torch does, which serves what the op's kernels do not: that cannot be captured.
    """

    eager = 3

    def __init__(self, learn: Callable[[Questions], Tensor]) -> None:
        self.learn = learn
        self.taken = 0
        self.waits = False

    def __call__(self, questions: Questions) -> Tensor:
        """Take a step; its loss, which the next one overwrites."""
        self.taken += 1
        if self.taken == self.eager:
            loss, self.waits = watched(self.learn, questions)
            return loss
        if self.taken < self.eager or self.waits:
            return self.learn(questions)
        if self.taken == self.eager + 1:
            self.questions = Questions(*(x.clone() for x in questions))
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(questions.input_ids.device), torch.cuda.graph(self.graph):
                self.loss = self.learn(self.questions)
        for mine, given in zip(self.questions, questions, strict=True):
            mine.copy_(given)
        self.graph.replay()
        return self.loss


def watched(learn: Callable[[Questions], Tensor], questions: Questions) -> tuple[Tensor, bool]:
    """The loss of a step, and whether it waited for the device."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            loss = learn(questions)
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return loss, any("called a synchronizing CUDA operation" in str(each.message) for each in found)


def adamw(model: nn.Module, learning_rate: float) -> torch.optim.AdamW:
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in model.parameters():
        matrix = parameter.dim() >= 2 and not getattr(parameter, "_no_weight_decay", False)
        (decayed if matrix else kept).append(parameter)
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": kept, "weight_decay": 0.0}]
    device = next(model.parameters()).device
    if device.type != "cuda":
        return torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS)
    rate = torch.tensor(learning_rate, device=device)  # on the device, where a captured step sees it change
    return torch.optim.AdamW(groups, lr=rate, betas=BETAS, fused=True, capturable=True)


def rate(step: int, steps: int) -> float:
    """The factor on the learning rate of a step, counted from 0."""
    warmup = max(1, int(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def questions_of(batch: Batch, device: torch.device) -> Questions:
    """A batch in which every sequence asks for as many answers."""
    asked = batch.labels != IGNORE
    places = asked.nonzero()[:, 1].view(len(asked), -1)
    return Questions(*(x.to(device) for x in (batch.input_ids, places, batch.labels[asked].view_as(places))))


def training_batches(
    task: Task, steps: int, batch_size: int, seed: int, device: torch.device, block: int = 16
) -> Iterator[Questions]:
    """A batch for each step; drawn and taken to the device by the block, which saves a GPU from waiting for either."""
    for start in range(0, steps, block):
        drawn = questions_of(task.draw(block * batch_size, [seed, TRAIN, start]), device)
        for i in range(min(block, steps - start)):
            yield Questions(*(x[i * batch_size : (i + 1) * batch_size] for x in drawn))


def answer(model: CarveForCausalLM, questions: Questions) -> Tensor:
    """Logits `[B, Q, vocab]`, float32, of all answers asked for.

    Raises:
        FloatingPointError: what goes into the op is not finite, as it sees on a CPU.
    """
    cuda = questions.input_ids.is_cuda
    with torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext():
        hidden = model.model(questions.input_ids, use_cache=False).last_hidden_state
        places = questions.places.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        return model.lm_head(hidden.gather(1, places)).float()


def evaluate(
    model: CarveForCausalLM, task: Task, seed: list[int], evaluated: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Whether each answer is right (1.0 or 0.0), and its distance, for so many sequences; both on the CPU.

    Raises:
        FloatingPointError: the model's weights have run away.
    """
    right, distance = [], []
    with torch.inference_mode():
        for i, rows in enumerate(torch.arange(evaluated).split(128)):
            batch = task.draw(len(rows), [*seed, i])
            questions = questions_of(batch, device)
            logits = answer(model, questions)
            if not logits.isfinite().all():
                raise FloatingPointError("the logits are not finite")
            right.append((logits.argmax(-1) == questions.labels).flatten().double().cpu())
            distance.append(batch.distance[batch.labels != IGNORE])
    return torch.cat(right), torch.cat(distance)


def by_distance(right: Tensor, distance: Tensor) -> list[tuple[int, int, float, int]]:
    """The accuracy within `(from, to)`, powers of two, where there are answers."""
    found = []
    for low in (2**i for i in range(int(distance.max()).bit_length())):
        within = (distance >= low) & (distance < 2 * low)
        if within.any():
            found.append((low, 2 * low, right[within].mean().item(), int(within.sum())))
    return found
