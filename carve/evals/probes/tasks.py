"""Synthetic tasks that ask for what a memory should hold: recall, state tracking, memory-conditioned editing.

A task draws sequences of tokens and the answers that are asked for on the way, from a seed. The label of a position is
the answer itself, to be predicted there (nothing is to be shifted); -100 where nothing is asked.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import permutations
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from carve.names import hint

IGNORE = -100


class Batch(NamedTuple):
    """B sequences of a task.

    Attributes:
        input_ids: `[B, T]` int64.
        labels: `[B, T]` int64, the answer asked for at a position, -100 for none.
        distance: `[B, T]` int64, tokens from the one that settled the answer to the question; 0 where nothing is asked.
    """

    input_ids: Tensor
    labels: Tensor
    distance: Tensor


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all tasks have.

    Attributes:
        layers: recurrent ones, of the smallest model that could solve it (docs/probes.md); attention takes one more.
        model: fields of `CarveConfig` that such a model needs.
    """

    layers: ClassVar[int] = 1
    model: ClassVar[dict[str, Any]] = {}

    @property
    def vocab_size(self) -> int:
        """Tokens, of questions and answers."""
        raise NotImplementedError

    @property
    def answers(self) -> int:
        """Tokens that can be an answer: a guess is right once in so many times."""
        raise NotImplementedError

    @property
    def tokens(self) -> int:
        """T, tokens of a sequence."""
        raise NotImplementedError

    def draw(self, batch_size: int, seed: int | Sequence[int]) -> Batch:
        """Draw sequences; the same seed (an integer or several, not negative) gives the same ones on every machine."""
        raise NotImplementedError

    def expect(self, name: str, fits: bool, expected: str) -> None:
        """Raise ValueError unless the field fits."""
        if not fits:
            raise ValueError(f"{name} is {getattr(self, name)!r}, expected {expected}")

    def expect_integers(self) -> None:
        """Raise ValueError unless the fields that hold integers do."""
        for field in fields(self):
            if field.type in (int, "int"):
                value = getattr(self, field.name)
                self.expect(field.name, isinstance(value, int) and not isinstance(value, bool), "an integer")


def batch_of(input_ids: np.ndarray, labels: np.ndarray, distance: np.ndarray) -> Batch:
    return Batch(*(torch.from_numpy(x.astype(np.int64)) for x in (input_ids, labels, distance)))


def distinct(rng: np.random.Generator, rows: int, choices: int, size: int) -> np.ndarray:
    """`[rows, size]`, in each row distinct numbers below `choices`, in random order."""
    if size * size > choices:
        return np.argsort(rng.random((rows, choices)), axis=1)[:, :size]
    found = rng.integers(0, choices, (rows, size))
    while len(again := np.flatnonzero((np.diff(np.sort(found, axis=1), axis=1) == 0).any(axis=1))):
        found[again] = rng.integers(0, choices, (len(again), size))
    return found


# -- associative recall --


@dataclass(frozen=True, kw_only=True)
class MQAR(Task):
    """Multi-query associative recall as in Zoology (arXiv 2312.04927, `multiquery_ar.py` of its repository).

    Distinct keys with their values, `k v k v ...`; then each key once more, each at a gap drawn from a power law,
    between random tokens; asked for is its value. With `updates` (Zoology's forgetting variant) so many of the keys
    come a second time before the questions, with another value, which is the one that counts.

    Args:
        pairs: keys, each with a value.
        vocabulary: tokens; 0 is blank, the lower half keys, the upper half values.
        length: tokens of a sequence; None for 8 to a pair, as many as in Zoology's easiest cases.
        power: gaps g = 1, 2, ... have probability in proportion to g ** (power - 1); 1 makes them uniform.
        updates: keys that get a new value.
    """

    pairs: int = 8
    vocabulary: int = 256
    length: int | None = None
    power: float = 0.01
    updates: int = 0

    def __post_init__(self) -> None:
        self.expect_integers()
        self.expect("pairs", self.pairs >= 1, "at least 1")
        self.expect("updates", 0 <= self.updates <= self.pairs, f"from 0 to pairs = {self.pairs}")
        self.expect("power", isinstance(self.power, (int, float)) and self.power > 0, "a positive number")
        smallest = 2 * self.pairs + 2
        self.expect("vocabulary", self.vocabulary >= smallest, f"at least {smallest}: half of it keys, half values")
        if self.length is not None:
            shortest = 4 * self.pairs + 2 * self.updates
            fits = isinstance(self.length, int) and self.length >= shortest and self.length % 2 == 0
            self.expect("length", fits, f"an even number of at least {shortest}: two tokens for each pair and question")

    @property
    def vocab_size(self) -> int:
        return self.vocabulary

    @property
    def answers(self) -> int:
        return self.vocabulary - self.vocabulary // 2

    @property
    def tokens(self) -> int:
        return 8 * self.pairs + 2 * self.updates if self.length is None else self.length

    def draw(self, batch_size: int, seed: int | Sequence[int]) -> Batch:
        rng = np.random.default_rng(seed)
        n, half, rows = self.pairs, self.vocabulary // 2, np.arange(batch_size)[:, None]
        keys = 1 + distinct(rng, batch_size, half - 1, n)
        values = half + distinct(rng, batch_size, self.answers, n)
        updated = distinct(rng, batch_size, n, self.updates)
        shift = rng.integers(1, self.answers, updated.shape)  # to another value, whichever it was
        later = half + (values[rows, updated] - half + shift) % self.answers
        context = 2 * (n + self.updates)

        input_ids = rng.integers(0, self.vocabulary, (batch_size, self.tokens))
        input_ids[:, 0:context:2] = np.concatenate([keys, keys[rows, updated]], axis=1)
        input_ids[:, 1:context:2] = np.concatenate([values, later], axis=1)
        settled = np.tile(1 + 2 * np.arange(n), (batch_size, 1))
        values[rows, updated] = later
        settled[rows, updated] = 2 * n + 1 + 2 * np.arange(self.updates)

        # Without replacement: the n first of exponential races, at rates in proportion to the probabilities.
        space = (self.tokens - context) // 2
        races = rng.exponential(size=(batch_size, space)) * np.arange(1, space + 1) ** (1 - self.power)
        asked = context + 2 * np.argsort(races, axis=1)[:, :n]
        labels, distance = np.full_like(input_ids, IGNORE), np.zeros_like(input_ids)
        input_ids[rows, asked], labels[rows, asked], distance[rows, asked] = keys, values, asked - settled
        return batch_of(input_ids, labels, distance)


@dataclass(frozen=True, kw_only=True)
class ForgettingMQAR(MQAR):
    """`MQAR` in which half of the keys (rounded up) get a new value, unless `updates` says how many."""

    updates: int = -1

    def __post_init__(self) -> None:
        if self.updates == -1:
            object.__setattr__(self, "updates", (self.pairs + 1) // 2)
        super().__post_init__()


# -- registers that are edited --


@dataclass(frozen=True, kw_only=True)
class Registers(Task):
    """Registers, each named by a key, that a sequence of operations edits; then every register is asked for once.

    An operation is the key and one or two arguments: `k a`. A question is `ASK k`, and the answer is asked for at k.
    What an operation does depends on what the register holds, which is not to be seen in the operation.

    Args:
        pairs: registers in a sequence.
        edits: operations on each of them, in random order.
        keys: tokens that can name a register.
        values: tokens that a register can hold.
    """

    pairs: int = 8
    edits: int = 3
    keys: int = 32
    values: int = 8

    arguments: ClassVar[int] = 1
    cues: ClassVar[int] = 0  # tokens beside keys and values
    ASK: ClassVar[int] = 0

    def __post_init__(self) -> None:
        self.expect_integers()
        self.expect("pairs", 1 <= self.pairs <= self.keys, f"from 1 to keys = {self.keys}")
        self.expect("edits", self.edits >= 1, "at least 1")
        self.expect("values", self.values >= 2, "at least 2")

    @property
    def first_value(self) -> int:
        return 1 + self.keys

    @property
    def empty(self) -> int:
        """The token for a register that holds nothing."""
        return self.first_value + self.values

    @property
    def vocab_size(self) -> int:
        return self.empty + 1 + self.cues

    @property
    def answers(self) -> int:
        return self.values

    @property
    def tokens(self) -> int:
        return self.pairs * (self.edits * (1 + self.arguments) + 2)

    def random_values(self, rng: np.random.Generator, size: int) -> np.ndarray:
        return rng.integers(self.first_value, self.empty, size)

    def other_values(self, rng: np.random.Generator, than: np.ndarray) -> np.ndarray:
        """Values, each another than the one given."""
        shift = rng.integers(1, self.values, than.shape)
        return self.first_value + (than - self.first_value + shift) % self.values

    def choose(self, rng: np.random.Generator, stored: np.ndarray, first: np.ndarray) -> list[np.ndarray]:
        """The arguments of an operation on registers that hold `stored`; `first` where it is the register's first."""
        raise NotImplementedError

    def edit(self, stored: np.ndarray, *arguments: np.ndarray) -> np.ndarray:
        """What the registers hold after the operation."""
        raise NotImplementedError

    def draw(self, batch_size: int, seed: int | Sequence[int]) -> Batch:
        rng = np.random.default_rng(seed)
        n, width, rows = self.pairs, 1 + self.arguments, np.arange(batch_size)
        keys = 1 + distinct(rng, batch_size, self.keys, n)
        order = rng.permuted(np.tile(np.repeat(np.arange(n), self.edits), (batch_size, 1)), axis=1)
        asked = rng.permuted(np.tile(np.arange(n), (batch_size, 1)), axis=1)
        held = np.full((batch_size, n), self.empty)
        fresh = np.full((batch_size, n), True)
        settled = np.zeros((batch_size, n), dtype=np.int64)
        operations = np.empty((batch_size, n * self.edits, width), dtype=np.int64)
        for i, register in enumerate(order.T):
            stored, first = held[rows, register], fresh[rows, register]
            chosen = self.choose(rng, stored, first)
            after = self.edit(stored, *chosen)
            operations[:, i] = np.stack([keys[rows, register], *chosen], axis=1)
            settled[rows, register] = np.where(after != stored, (i + 1) * width - 1, settled[rows, register])
            held[rows, register], fresh[rows, register] = after, False

        questions = np.stack([np.full_like(asked, self.ASK), keys[rows[:, None], asked]], axis=2)
        input_ids = np.concatenate([operations.reshape(batch_size, -1), questions.reshape(batch_size, -1)], axis=1)
        labels, distance = np.full_like(input_ids, IGNORE), np.zeros_like(input_ids)
        places = n * self.edits * width + 1 + 2 * np.arange(n)
        labels[:, places] = held[rows[:, None], asked]
        distance[:, places] = places - settled[rows[:, None], asked]
        return batch_of(input_ids, labels, distance)


@dataclass(frozen=True, kw_only=True)
class WriteOnce(Registers):
    """`k v`: the first value given to a key stays, later ones are ignored."""

    edits: int = 6  # so many that later values often agree with each other: adding up cannot tell the first

    def choose(self, rng: np.random.Generator, stored: np.ndarray, first: np.ndarray) -> list[np.ndarray]:
        return [self.random_values(rng, len(stored))]

    def edit(self, stored: np.ndarray, *arguments: np.ndarray) -> np.ndarray:
        (value,) = arguments
        return np.where(stored == self.empty, value, stored)


@dataclass(frozen=True, kw_only=True)
class CompareAndSwap(Registers):
    """`k x y`: k is set to y only if it holds x; half of the time it does. The first one is `k EMPTY y`."""

    arguments: ClassVar[int] = 2

    def choose(self, rng: np.random.Generator, stored: np.ndarray, first: np.ndarray) -> list[np.ndarray]:
        value = np.where(first, self.first_value, stored)  # to draw others than this
        hit = first | (rng.random(len(stored)) < 0.5)
        new = np.where(first, self.random_values(rng, len(stored)), self.other_values(rng, value))
        return [np.where(hit, stored, self.other_values(rng, value)), new]

    def edit(self, stored: np.ndarray, *arguments: np.ndarray) -> np.ndarray:
        expected, new = arguments
        return np.where(stored == expected, new, stored)


@dataclass(frozen=True, kw_only=True)
class Counters(Registers):
    """`k d`: k is incremented by d, modulo the number of values; it begins at 0."""

    values: int = 5

    def choose(self, rng: np.random.Generator, stored: np.ndarray, first: np.ndarray) -> list[np.ndarray]:
        return [rng.integers(self.first_value + 1, self.empty, len(stored))]

    def edit(self, stored: np.ndarray, *arguments: np.ndarray) -> np.ndarray:
        (increment,) = arguments
        count = np.where(stored == self.empty, self.first_value, stored) - self.first_value
        return self.first_value + (count + increment - self.first_value) % self.values


@dataclass(frozen=True, kw_only=True)
class SelectiveForgetting(Registers):
    """`k v` stores v; `k FORGET_c` empties k only if what it holds is of class c (its number modulo 2).

    The first operation on a key stores; later ones store or cue, half of the time each. The answer is a value or EMPTY.
    """

    cues: ClassVar[int] = 2

    @property
    def answers(self) -> int:
        return self.values + 1

    def choose(self, rng: np.random.Generator, stored: np.ndarray, first: np.ndarray) -> list[np.ndarray]:
        cue = self.empty + 1 + rng.integers(0, self.cues, len(stored))
        writes = first | (rng.random(len(stored)) < 0.5)
        return [np.where(writes, self.random_values(rng, len(stored)), cue)]

    def edit(self, stored: np.ndarray, *arguments: np.ndarray) -> np.ndarray:
        (argument,) = arguments
        hit = (stored - self.first_value) % self.cues == argument - self.empty - 1
        return np.where(argument < self.empty, argument, np.where(hit, self.empty, stored))


# -- state tracking --


@dataclass(frozen=True, kw_only=True)
class GroupWord(Task):
    """Elements of a finite group, one a token; asked for at each is the product of all so far, the latest on the left.

    A sequence begins with `start` tokens, always the same, with which a model can set up its memory.

    Args:
        length: elements of a sequence.
    """

    length: int = 32
    # Without it no token can turn round what is stored, only shrink it.
    model: ClassVar[dict[str, Any]] = {"allow_neg_eigval": True}

    def __post_init__(self) -> None:
        self.expect_integers()
        self.expect("length", self.length >= 1, "at least 1")

    @property
    def table(self) -> np.ndarray:
        """`[G, G]`: the number of `a b` for elements a and b; number 0 is the identity."""
        raise NotImplementedError

    @property
    def generators(self) -> np.ndarray:
        """The elements that occur in sequences."""
        return np.arange(self.answers)

    @property
    def start(self) -> int:
        return 1

    @property
    def vocab_size(self) -> int:
        return self.start + 2 * self.answers

    @property
    def tokens(self) -> int:
        return self.start + self.length

    def draw(self, batch_size: int, seed: int | Sequence[int]) -> Batch:
        rng = np.random.default_rng(seed)
        G, start, table = self.answers, self.start, self.table
        elements = rng.choice(self.generators, (batch_size, self.length))
        products = np.empty_like(elements)
        product = np.zeros(batch_size, dtype=np.int64)
        for i, element in enumerate(elements.T):
            products[:, i] = product = table[element, product]
        prefix = np.tile(np.arange(start), (batch_size, 1))
        input_ids = np.concatenate([prefix, start + elements], axis=1)
        labels = np.concatenate([np.full_like(prefix, IGNORE), start + G + products], axis=1)
        distance = np.tile(np.r_[np.zeros(start), 1 : self.length + 1], (batch_size, 1))
        return batch_of(input_ids, labels, distance)


@dataclass(frozen=True, kw_only=True)
class ModularAddition(GroupWord):
    """The sum so far, modulo `modulus`."""

    layers: ClassVar[int] = 2  # a rotation is two reflections
    modulus: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect("modulus", self.modulus >= 2, "at least 2")

    @property
    def table(self) -> np.ndarray:
        numbers = np.arange(self.modulus)
        return (numbers[:, None] + numbers) % self.modulus

    @property
    def answers(self) -> int:
        return self.modulus


@dataclass(frozen=True, kw_only=True)
class Parity(ModularAddition):
    """Whether the bits so far have an odd sum."""

    layers: ClassVar[int] = 1
    modulus: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect("modulus", self.modulus == 2, "2: the task 'modular-addition' takes others")


@dataclass(frozen=True, kw_only=True)
class Permutations(GroupWord):
    """Permutations of `points` things, composed.

    Args:
        elements: `"swaps"`, those that exchange two things: one layer can apply one a token, exactly. Or `"all"`.
    """

    points: int = 3
    elements: str = "swaps"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect("points", self.points == type(self).points, f"{type(self).points}, as the task's name says")
        self.expect("elements", self.elements in ("swaps", "all"), "'swaps' or 'all'")

    @property
    def group(self) -> np.ndarray:
        """`[G, points]`: element g takes i to `group[g, i]`."""
        return np.array(list(permutations(range(self.points))))

    @property
    def table(self) -> np.ndarray:
        group = self.group
        code = self.points ** np.arange(self.points)
        number = np.zeros(code[-1] * self.points, dtype=np.int64)
        number[group @ code] = np.arange(len(group))
        return number[group[:, group] @ code]  # [a, b, i]: a takes b's image of i

    @property
    def generators(self) -> np.ndarray:
        moved = (self.group != np.arange(self.points)).sum(1)
        return np.flatnonzero(moved == 2) if self.elements == "swaps" else np.arange(self.answers)

    @property
    def answers(self) -> int:
        return len(self.group)

    @property
    def start(self) -> int:
        return self.points


@dataclass(frozen=True, kw_only=True)
class Permutations5(Permutations):
    """Permutations of five things: the smallest group whose word problem is not solvable."""

    points: int = 5


TASKS: dict[str, type[Task]] = {
    "mqar": MQAR,
    "forgetting-mqar": ForgettingMQAR,
    "write-once": WriteOnce,
    "compare-and-swap": CompareAndSwap,
    "counters": Counters,
    "selective-forgetting": SelectiveForgetting,
    "parity": Parity,
    "modular-addition": ModularAddition,
    "s3": Permutations,
    "s5": Permutations5,
}


def make_task(name: str, values: dict[str, Any] | None = None) -> Task:
    """The task of that name.

    Args:
        values: fields of the task that are not to have their default.

    Raises:
        ValueError: no such task (the message suggests the nearest), no such field, or a value that does not fit.
    """
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}{hint(name, TASKS)}")
    known = [field.name for field in fields(TASKS[name])]
    for field in values or {}:
        if field not in known:
            raise ValueError(f"task {name!r} has no field {field!r}{hint(field, known)}")
    return TASKS[name](**(values or {}))
