"""The tasks: labels against rules written again, token by token; and solvers built by hand on the op itself."""

from dataclasses import dataclass, field
from itertools import permutations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from carve.evals.probes import TASKS, Task, make_task
from carve.evals.probes.tasks import IGNORE, Registers
from carve.ops import recurrent_carve

SMALL = {
    "mqar": {"pairs": 3, "vocabulary": 40},
    "forgetting-mqar": {"pairs": 5, "vocabulary": 60, "length": 40},
    "write-once": {"pairs": 3, "edits": 4, "keys": 5, "values": 3},
    "compare-and-swap": {"pairs": 3, "edits": 5, "keys": 5, "values": 4},
    "counters": {"pairs": 3, "edits": 4, "keys": 5, "values": 4},
    "selective-forgetting": {"pairs": 3, "edits": 5, "keys": 5, "values": 4},
    "parity": {"length": 12},
    "modular-addition": {"length": 12, "modulus": 7},
    "s3": {"length": 12, "elements": "all"},
    "s5": {"length": 12},
}
small = pytest.mark.parametrize("name", SMALL)


def draw(name: str, rows: int = 50, seed: int = 0) -> tuple[Task, list[list[int]], list[list[int]], list[list[int]]]:
    task = make_task(name, SMALL[name])
    batch = task.draw(rows, seed)
    return task, *(x.tolist() for x in batch)


# -- the rules, written again --


def recall(task: Task, row: list[int]) -> dict[int, tuple[int, int]]:
    """Position -> (answer, position of what settled it)."""
    half, context = task.vocabulary // 2, 2 * (task.pairs + task.updates)
    held = {}
    for at in range(0, context, 2):
        assert 1 <= row[at] < half <= row[at + 1] < task.vocabulary
        held[row[at]] = (row[at + 1], at + 1)
    assert len(held) == task.pairs
    return held


def registers(name: str, task: Registers, row: list[int]) -> dict[int, tuple[int, int]]:
    width, base, empty = 1 + task.arguments, 1 + task.keys, 1 + task.keys + task.values
    held: dict[int, tuple[int, int]] = {}
    end = task.pairs * task.edits * width
    for at in range(0, end, width):
        key, *rest = row[at : at + width]
        assert 1 <= key < base
        stored, since = held.get(key, (empty, 0))
        if name == "write-once":
            after = rest[0] if stored == empty else stored
        elif name == "compare-and-swap":
            after = rest[1] if rest[0] == stored else stored
        elif name == "counters":
            before = 0 if stored == empty else stored - base
            after = base + (before + rest[0] - base) % task.values
        elif rest[0] > empty:  # a cue
            after = empty if stored != empty and (stored - base) % 2 == rest[0] - empty - 1 else stored
        else:
            after = rest[0]
        held[key] = (after, since if after == stored else at + width - 1)
    answers = {}
    for at in range(end, len(row), 2):
        assert row[at] == task.ASK
        answers[at + 1] = held.pop(row[at + 1])
    assert not held  # every register is asked for, once
    return answers


@pytest.mark.parametrize("name", ["mqar", "forgetting-mqar"])
def test_recall_asks_for_the_latest_value_of_every_key(name: str) -> None:
    task, *rows = draw(name)
    for row, labels, distance in zip(*rows, strict=True):
        held = recall(task, row)
        asked = [at for at, label in enumerate(labels) if label != IGNORE]
        assert sorted(row[at] for at in asked) == sorted(held)
        assert all(at % 2 == 0 and at >= 2 * (task.pairs + task.updates) for at in asked)
        for at in asked:
            answer, since = held[row[at]]
            assert (labels[at], distance[at]) == (answer, at - since)


def test_half_of_the_keys_are_told_anew_and_never_with_the_same_value() -> None:
    task, rows, _, _ = draw("forgetting-mqar")
    assert task.updates == 3
    for row in rows:
        told = [tuple(row[at : at + 2]) for at in range(0, 2 * 8, 2)]
        assert len({key for key, _ in told}) == 5
        assert len(set(told)) == 8


def test_gaps_follow_the_power_law() -> None:
    task = make_task("mqar", {"pairs": 1, "length": 34, "vocabulary": 40})
    labels = task.draw(20000, 0).labels
    gaps = (labels != IGNORE).nonzero()[:, 1] // 2  # 1, 2, ...: the pair takes the first
    found = torch.bincount(gaps, minlength=17)[1:17] / len(gaps)
    expected = torch.arange(1, 17) ** (0.01 - 1.0)
    # The share of a likely event among 20,000 has a standard deviation of at most 0.0036.
    assert (found - expected / expected.sum()).abs().max() < 5 * 0.0036


@pytest.mark.parametrize("name", [name for name in SMALL if issubclass(TASKS[name], Registers)])
def test_registers_hold_what_the_rule_says(name: str) -> None:
    task, *rows = draw(name)
    different = set()
    for row, labels, distance in zip(*rows, strict=True):
        answers = registers(name, task, row)
        assert {at for at, label in enumerate(labels) if label != IGNORE} == set(answers)
        for at, (answer, since) in answers.items():
            assert (labels[at], distance[at]) == (answer, at - since)
            different.add(answer)
    assert len(different) == task.answers


@pytest.mark.parametrize("name", ["parity", "modular-addition"])
def test_sums(name: str) -> None:
    task, *rows = draw(name)
    for row, labels, distance in zip(*rows, strict=True):
        assert (row[0], labels[0], distance[0]) == (0, IGNORE, 0)
        for at in range(1, len(row)):
            total = sum(token - 1 for token in row[1 : at + 1]) % task.modulus
            assert (labels[at], distance[at]) == (1 + task.modulus + total, at)


@pytest.mark.parametrize("name", ["s3", "s5"])
def test_permutations_compose(name: str) -> None:
    task, *rows = draw(name)
    group = list(permutations(range(task.points)))
    used = set()
    for row, labels, _ in zip(*rows, strict=True):
        assert row[: task.points] == list(range(task.points))
        things = list(range(task.points))  # what lies where; an element moves what lies at i to element[i]
        for at in range(task.points, len(row)):
            element = group[row[at] - task.points]
            used.add(element)
            moved = list(things)
            for i, place in enumerate(element):
                moved[place] = things[i]
            things = moved
            product = group[labels[at] - task.points - len(group)]
            assert [things[product[i]] for i in range(task.points)] == list(range(task.points))
    swaps = {element for element in group if sum(i != j for i, j in enumerate(element)) == 2}
    assert used == (set(group) if task.elements == "all" else swaps)


# -- what every task must be --


@small
def test_seeds_reproduce_and_differ(name: str) -> None:
    task = make_task(name, SMALL[name])
    for one, other in zip(task.draw(9, [3, 1]), task.draw(9, [3, 1]), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(task.draw(9, [3, 1]).input_ids, task.draw(9, [3, 2]).input_ids)
    assert not torch.equal(task.draw(9, [3, 1]).input_ids, task.draw(9, [4, 1]).input_ids)


@small
def test_shapes_and_ranges(name: str) -> None:
    task = make_task(name, SMALL[name])
    batch = task.draw(200, 0)
    for x in batch:
        assert (x.shape, x.dtype) == ((200, task.tokens), torch.int64)
    assert batch.input_ids.min() >= 0
    assert batch.input_ids.max() < task.vocab_size
    asked = batch.labels != IGNORE
    assert batch.labels[asked].min() >= 0
    assert batch.labels[asked].max() < task.vocab_size
    assert len(batch.labels[asked].unique()) <= task.answers
    assert (asked.sum(1) == asked[0].sum()).all()
    assert (batch.distance[asked] > 0).all()
    assert not batch.distance[~asked].any()


@small
def test_the_answer_is_not_to_be_seen_at_the_question_or_behind_it(name: str) -> None:
    task = make_task(name, SMALL[name])
    batch = task.draw(2000, 0)
    asked = batch.labels != IGNORE
    assert not (batch.input_ids == batch.labels)[asked].any()
    following = F.pad(batch.input_ids[:, 1:], (0, 1), value=-1)
    seen = (following == batch.labels)[asked].double().mean().item()
    # Between Zoology's questions there are random tokens, which happen to be the answer once in a vocabulary.
    assert seen <= (2 / task.vocab_size if "mqar" in name else 0)


@small
def test_no_answer_is_much_likelier_than_the_others(name: str) -> None:
    task = make_task(name, SMALL[name])
    labels = task.draw(4000, 0).labels
    counts = torch.bincount(labels[labels != IGNORE])
    # A register that a cue can empty is empty more often than it holds any one value; after an odd number of swaps
    # only half of a group can be reached, and by one swap fewer still.
    assert counts.max() / counts.sum() < 3 / task.answers


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("write-onc", {}, "no task 'write-onc'; did you mean 'write-once'"),
        ("zzz", {}, "no task 'zzz'; expected one of mqar"),
        ("mqar", {"pair": 3}, "task 'mqar' has no field 'pair'; did you mean 'pairs'"),
        ("mqar", {"pairs": 0}, "pairs is 0, expected at least 1"),
        ("mqar", {"pairs": 2.5}, "pairs is 2.5, expected an integer"),
        ("mqar", {"pairs": 8, "length": 30}, "length is 30, expected an even number of at least 32"),
        ("mqar", {"pairs": 8, "length": 41}, "length is 41, expected an even number"),
        ("mqar", {"pairs": 8, "vocabulary": 17}, "vocabulary is 17, expected at least 18"),
        ("mqar", {"power": 0}, "power is 0, expected a positive number"),
        ("forgetting-mqar", {"pairs": 3, "updates": 4}, "updates is 4, expected from 0 to pairs = 3"),
        ("counters", {"pairs": 33}, "pairs is 33, expected from 1 to keys = 32"),
        ("write-once", {"values": 1}, "values is 1, expected at least 2"),
        ("write-once", {"edits": 0}, "edits is 0, expected at least 1"),
        ("parity", {"modulus": 3}, "modulus is 3, expected 2"),
        ("modular-addition", {"modulus": 1}, "modulus is 1, expected at least 2"),
        ("s3", {"points": 4}, "points is 4, expected 3, as the task's name says"),
        ("s5", {"points": 3}, "points is 3, expected 5, as the task's name says"),
        ("s3", {"elements": "some"}, "elements is 'some', expected 'swaps' or 'all'"),
        ("s5", {"length": 0}, "length is 0, expected at least 1"),
    ],
)
def test_bad_input(name: str, fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_task(name, fields)


# -- solvers built by hand --

SURE = 40.0  # a logit whose sigmoid is 1, in the other sign 0


@dataclass
class Tape:
    """One head's inputs of the op, written down token by token."""

    K: int
    V: int = 1
    rows: dict[str, list] = field(default_factory=lambda: {name: [] for name in "qkvew"})

    def token(self, *, key=(), value=(), query=(), erase: bool = False, write: bool = False) -> None:
        """Key, value and query as {index: number}; erase and write say whether the gates are open."""
        for name, size, entries in (("k", self.K, key), ("v", self.V, value), ("q", self.K, query)):
            x = torch.zeros(size, dtype=torch.float64)
            for at, number in dict(entries).items():
                x[at] = number
            self.rows[name].append(x)
        self.rows["e"].append(torch.full((self.K,), SURE if erase else -SURE, dtype=torch.float64))
        self.rows["w"].append(torch.tensor(SURE if write else -SURE, dtype=torch.float64))

    def run(self, decay: torch.Tensor | float = 0.0, **options) -> torch.Tensor:
        """`[T, V]`; decay: `[K]`, a log-decay for all tokens."""
        x = {name: torch.stack(rows)[None, :, None] for name, rows in self.rows.items()}
        o, _ = recurrent_carve(**x, g=torch.zeros_like(x["k"]) + decay, scale=1.0, **options)
        return o[0, :, 0]


def solved(name: str, solve, fields: dict | None = None, **how) -> float:
    """The share of right answers."""
    task = make_task(name, fields or SMALL[name])
    batch = task.draw(20, 1)
    right = []
    for row, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        answers = solve(task, row, **how)
        right += [answers[at] == label for at, label in enumerate(labels) if label != IGNORE]
    return float(np.mean(right))


def solve_recall(task: Task, row: list[int]) -> list[int]:
    """Overwrite what is stored under the key of the token before."""
    half = task.vocabulary // 2
    tape = Tape(half, task.vocabulary - half)
    for before, token in zip([0, *row], row, strict=False):
        pair = 0 < before < half <= token
        tape.token(
            key={before: 1} if pair else {},
            value={token - half: 1} if pair else {},
            query={token: 1} if token < half else {},
            erase=pair,
            write=pair,
        )
    return (half + tape.run().argmax(-1)).tolist()


def solve_write_once(task: Registers, row: list[int], looks: bool) -> list[int]:
    """Write only where what is read under the key holds no mark."""
    base, V = 1 + task.keys, task.values + 1
    tape = Tape(base, V)
    for before, token in zip([0, *row], row, strict=False):
        pair = base <= token
        tape.token(
            key={before: 1} if pair else {},
            value={token - base: 1, V - 1: 1} if pair else {},
            query={} if pair else {token: 1},
            write=pair,
        )
    content = {}
    if looks:
        p_down = torch.zeros(1, V, 1, dtype=torch.float64)
        p_down[0, -1] = 1
        p_write = torch.full((1, 1), -2 * SURE, dtype=torch.float64)
        content = {"p_down": p_down, "p_write": p_write, "content": "read", "chunk_size": 2}
    return (base + tape.run(**content)[:, :-1].argmax(-1)).tolist()


def solve_write_once_by_age(task: Registers, row: list[int]) -> list[int]:
    """Memory-blind: each value in a channel that decays and in one that does not; their difference grows with age."""
    base = 1 + task.keys
    tape = Tape(2 * base, task.values)
    half = 0.5**0.5
    for before, token in zip([0, *row], row, strict=False):
        pair = base <= token
        tape.token(
            key={before: half, base + before: half} if pair else {},
            value={token - base: 1} if pair else {},
            query={} if pair else {token: 1, base + token: -1},
            write=pair,
        )
    decay = torch.zeros(2 * base, dtype=torch.float64)
    decay[base:] = -1 / len(row)
    return (base + tape.run(decay).argmax(-1)).tolist()


def solve_compare_and_swap(task: Registers, row: list[int]) -> list[int]:
    """A mark at (register, value); exchanging the places of x and y by a reflection moves it if it is at x."""
    base, values = 1 + task.keys, task.values
    tape = Tape(base * values)

    def place(key: int, value: int) -> int:
        return key * values + value - base

    for i, token in enumerate(row):
        before = row[max(0, i - 2) : i]
        if i < task.pairs * task.edits * 3 and i % 3 == 2:
            key, expected = before
            if expected == task.empty:
                tape.token(key={place(key, token): 1}, value={0: 1}, write=True)
            elif expected == token:
                tape.token()
            else:
                half = 0.5**0.5
                tape.token(key={place(key, expected): half, place(key, token): -half}, erase=True)
        elif 0 < token < base:
            tape.token(query={place(token, base + value): 1 + value for value in range(values)})
        else:
            tape.token()
    return (base - 1 + tape.run(allow_neg_eigval=True)[:, 0].round().long()).tolist()


def solve_counters(task: Registers, row: list[int]) -> list[int]:
    """Add up."""
    base = 1 + task.keys
    tape = Tape(base)
    for before, token in zip([0, *row], row, strict=False):
        pair = base <= token
        key, value = ({before: 1}, {0: token - base}) if pair else ({}, {})
        tape.token(key=key, value=value, query={} if pair else {token: 1}, write=pair)
    return (base + tape.run()[:, 0].round().long() % task.values).tolist()


def solve_selective_forgetting(task: Registers, row: list[int]) -> list[int]:
    """Values at (register, class); a cue erases its class, and a token after a value the other class is erased."""
    base, empty = 1 + task.keys, task.empty
    tape = Tape(2 * base, task.values)
    for i, token in enumerate(row):
        key, before = ([0, 0, *row][i + 1], [0, 0, *row][i])
        if base <= token < empty:
            value = token - base
            tape.token(key={2 * key + value % 2: 1}, value={value: 1}, erase=True, write=True)
        elif token > empty:
            tape.token(key={2 * key + token - empty - 1: 1}, erase=True)
        else:
            other = {2 * before + (key - base + 1) % 2: 1} if base <= key < empty else {}
            tape.token(key=other, erase=True, query={2 * token: 1, 2 * token + 1: 1})
    o = tape.run()
    return torch.where(o.max(-1).values > 0.5, base + o.argmax(-1), empty).tolist()


def solve_parity(task: Task, row: list[int]) -> list[int]:
    """Turn one number's sign at every 1."""
    tape = Tape(1)
    for i, token in enumerate(row):
        tape.token(key={0: 1}, value={0: 1}, query={0: 1}, write=i == 0, erase=token == 2)
    return (3 + (tape.run(allow_neg_eigval=True)[:, 0] < 0).long()).tolist()


def solve_swaps(task: Task, row: list[int]) -> list[int]:
    """Start tokens write the rows of the identity; a swap is a reflection; where each row lies names the element."""
    points = task.points
    group = list(permutations(range(points)))
    tape = Tape(points, points)
    query = {i: 1 + i for i in range(points)}
    for token in row:
        if token < points:
            tape.token(key={token: 1}, value={token: 1}, write=True)
            continue
        i, j = (i for i, place in enumerate(group[token - points]) if place != i)
        tape.token(key={i: 0.5**0.5, j: -(0.5**0.5)}, erase=True, query=query)
    o = tape.run(allow_neg_eigval=True).round().long() - 1  # where the thing that began at i lies
    numbers = {element: number for number, element in enumerate(group)}
    return [points + len(group) + numbers.get(tuple(places), 0) for places in o.tolist()]


def test_one_layer_can_solve_it() -> None:
    # The shortest sequences: with no random pairs between the questions, which could tell a key anew.
    assert solved("mqar", solve_recall, {"pairs": 3, "vocabulary": 40, "length": 12}) == 1
    assert solved("forgetting-mqar", solve_recall, {"pairs": 5, "vocabulary": 60, "length": 26}) == 1
    assert solved("compare-and-swap", solve_compare_and_swap) == 1
    assert solved("counters", solve_counters) == 1
    assert solved("selective-forgetting", solve_selective_forgetting) == 1
    assert solved("parity", solve_parity) == 1
    assert solved("s3", solve_swaps, {"length": 12}) == 1
    assert solved("s5", solve_swaps) == 1


def test_write_once_is_solved_by_looking_and_not_by_the_same_memory_blind() -> None:
    assert solved("write-once", solve_write_once, looks=True) == 1
    assert solved("write-once", solve_write_once, looks=False) < 0.8


def test_a_blind_memory_can_tell_the_oldest_value_until_later_ones_agree() -> None:
    few, many = ({"pairs": 4, "edits": edits, "values": 8} for edits in (2, 6))
    assert solved("write-once", solve_write_once_by_age, few) == 1
    assert solved("write-once", solve_write_once_by_age, many) < 0.8
    assert solved("write-once", solve_write_once, many, looks=True) == 1
