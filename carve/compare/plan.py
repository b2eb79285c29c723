"""What a comparison trains: a YAML file of mixers and settings -> runs, each with all that decides its result."""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from carve.evals.context import check_context
from carve.evals.mixers import DECIDED, mixer_fields
from carve.models import CarveConfig, CarveForCausalLM
from carve.models.configuration_carve import ATTENTION
from carve.names import hint
from carve.train import TrainConfig
from carve.train.config import read_yaml, settled
from carve.train.data import HUB

MATCHING = ("shape", "parameters")
FIELDS = ("train", "mixers", "baseline", "learning_rates", "seeds", "matching", "tests")
TEXTS = ("data", "validation", "tokenizer")  # fields of `TrainConfig` that all runs share
OWN = ("content_lr",)  # those that a mixer can have for itself
OURS = {"out", "cache", "seed", "learning_rate", "validation_share", "eval_every", "save_every", "keep"}  # set here
SHARE = 0.005  # by which the numbers of parameters may differ


@dataclass(frozen=True)
class Run:
    """One training and its measurement.

    Attributes:
        label: of the mixer, as in the YAML file.
        matching: "shape" or "parameters"; what is the same in both is of the first.
        train: fields of `TrainConfig`, the texts and folders left out.
        configuration: all that decides the result, as plain data.
    """

    label: str
    matching: str
    train: dict[str, Any]
    configuration: dict[str, Any]

    @functools.cached_property
    def key(self) -> str:
        """A hash of the whole configuration: the name of its result."""
        return hashlib.sha256(json.dumps(self.configuration, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def described(self) -> str:
        matched = " at equal parameters" if self.matching == "parameters" else ""
        return f"{self.label}{matched}, learning rate {self.train['learning_rate']:g}, seed {self.train['seed']}"


@dataclass(frozen=True)
class Plan:
    """A comparison, as its YAML file says.

    Attributes:
        train: fields of `TrainConfig` that all runs share.
        mixers: label -> `mixer`, its name in `carve.evals.mixers`; `seeds`, how many runs, with seeds 0, 1, ...;
            `model`, fields of `CarveConfig`, and `train`, others of `TrainConfig`, in place of the common ones.
        baseline: the label that the others are compared with.
        learning_rates: all are tried with every mixer, with seed 0; the best on validation is taken for all seeds.
        matching: "shape" (all models have the same sizes), "parameters" (the MLP is as wide as makes the number of
            parameters that of the baseline), or both.
        tests: name -> text file.
        facts: what the texts are: fingerprints, and the tokenizer's vocabulary; None before they are read.
    """

    train: dict[str, Any]
    mixers: dict[str, dict[str, Any]]
    baseline: str
    learning_rates: list[float]
    matching: list[str]
    tests: dict[str, str]
    facts: dict[str, Any] | None = None

    def with_facts(self, facts: dict[str, Any]) -> "Plan":
        """The plan, knowing its texts.

        Raises:
            ValueError: no width of an MLP gives the number of parameters.
        """
        plan = dataclasses.replace(self, facts=facts)
        for label in self.mixers:
            for matching in self.matching:
                plan.run(label, matching, self.learning_rates[0], 0)
        return plan

    @property
    def common(self) -> dict[str, Any]:
        """What every result of a folder must agree on."""
        return {"train": common_train(self.train), "texts": self.facts}

    def seeds_of(self, label: str) -> range:
        return range(self.mixers[label]["seeds"])

    def shape(self, label: str) -> dict[str, Any]:
        """Fields of `CarveConfig`, of models of equal shape; no vocabulary yet."""
        common, own = self.train.get("model", {}), self.mixers[label]["model"]
        layers = {**common, **own}.get("num_hidden_layers", CarveConfig.num_hidden_layers)
        return {**common, **mixer_fields(self.mixers[label]["mixer"], layers), **own}

    def model(self, label: str, matching: str) -> dict[str, Any]:
        """Fields of `CarveConfig`."""
        assert self.facts is not None
        model = {"vocab_size": self.facts["vocab_size"], **self.shape(label)}
        if matching == "shape" or label == self.baseline:
            return model
        target = parameters_of(self.model(self.baseline, matching))["all"]
        return {**model, "intermediate_size": fitting_width(label, model, target)}

    def run(self, label: str, matching: str, learning_rate: float, seed: int) -> Run:
        model = self.model(label, matching)
        config = CarveConfig(**model)
        train = numbers({name: x for name, x in self.train.items() if name not in TEXTS} | self.mixers[label]["train"])
        train |= {"model": model, "learning_rate": learning_rate, "seed": seed}
        whole = common_train(train) | {"learning_rate": learning_rate, "seed": seed}
        whole |= {"model": {name: getattr(config, name) for name in CarveConfig.__annotations__}}
        return Run(label, matching, train, {"train": whole, "texts": self.facts})

    def sweep(self, label: str) -> list[Run]:
        """One run for each learning rate; they are of the first matching, and choose the rate for all."""
        return [self.run(label, self.matching[0], rate, 0) for rate in self.learning_rates]

    def best_rate(self, label: str, results: Mapping[str, Mapping[str, Any]]) -> float | None:
        """The learning rate with the lowest validation loss; None while one has no result."""
        if len(self.learning_rates) == 1:
            return self.learning_rates[0]
        runs = self.sweep(label)
        if any(run.key not in results for run in runs):
            return None
        losses = [validation_loss(results[run.key]) for run in runs]
        return self.learning_rates[losses.index(min(losses))]

    def wanted(self, results: Mapping[str, Mapping[str, Any]]) -> list[Run]:
        """The runs that are known to be needed and have no result: sweeps first, then seed after seed.

        As long as a mixer's sweep has gaps, it is not known which of its other runs are needed.
        """
        runs = [run for label in self.mixers if len(self.learning_rates) > 1 for run in self.sweep(label)]
        found = [
            run
            for label in self.mixers
            if (rate := self.best_rate(label, results)) is not None
            for run in self.at_rate(label, rate)
        ]
        runs += sorted(found, key=lambda run: run.train["seed"])
        return list({run.key: run for run in runs if run.key not in results}.values())

    def at_rate(self, label: str, rate: float) -> list[Run]:
        """The different runs of a mixer whose learning rate is chosen."""
        runs = [self.run(label, matching, rate, seed) for seed in self.seeds_of(label) for matching in self.matching]
        return list({run.key: run for run in runs}.values())

    def left(self, results: Mapping[str, Mapping[str, Any]]) -> int:
        """How many runs have no result yet, those included that are not known before a sweep has ended."""
        unknown = [label for label in self.mixers if self.best_rate(label, results) is None]
        later = sum(len(self.at_rate(label, self.learning_rates[0])) - 1 for label in unknown)
        return len(self.wanted(results)) + later


DEFAULTS: dict[str, Any] = {
    field.name: field.default
    for field in dataclasses.fields(TrainConfig)
    if field.name not in {*TEXTS, *OURS} and field.default is not dataclasses.MISSING
}


def common_train(train: Mapping[str, Any]) -> dict[str, Any]:
    """What decides every run of a comparison, defaults included, the texts left out."""
    deciding = {"model", *DEFAULTS} - {"log_every"}
    return {name: x for name, x in settled(train).items() if name in deciding}


def validation_loss(result: Mapping[str, Any]) -> float:
    """Nats a token, infinite where training diverged."""
    score = result["texts"].get("validation")
    return float("inf") if score is None else score["nats"] / score["tokens"]


def numbers(train: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `TrainConfig`, as it takes them: 1 where it is the float 1.0."""
    floats = {field.name for field in dataclasses.fields(TrainConfig) if field.type is float}
    return {name: float(x) if name in floats else x for name, x in train.items()}


def parameters_of(model: Mapping[str, Any]) -> dict[str, int]:
    """Parameters of a model with these fields of `CarveConfig`: all, without embeddings, and of its mixers."""
    return count_parameters(json.dumps(dict(model), sort_keys=True))


@functools.cache  # a model is built to count it
def count_parameters(model: str) -> dict[str, int]:
    with torch.device("meta"):  # no memory
        built = CarveForCausalLM(CarveConfig(**json.loads(model)))
    embeddings = {built.model.embed_tokens.weight, built.lm_head.weight}
    whole = sum(p.numel() for p in built.parameters())
    return {
        "all": whole,
        "without embeddings": whole - sum(p.numel() for p in embeddings),
        "mixers": sum(p.numel() for block in built.model.layers for p in block.mixer.parameters()),
    }


def fitting_width(label: str, model: dict[str, Any], target: int) -> int:
    """The `intermediate_size` that brings a model nearest to so many parameters: a multiple of 16 if one will do.

    Raises:
        ValueError: none comes within 0.5 %.
    """
    width = model.get("intermediate_size", CarveConfig.intermediate_size)
    at_width, one_more = (parameters_of({**model, "intermediate_size": w})["all"] for w in (width, width + 1))
    ideal = width + (target - at_width) / (one_more - at_width)
    for step in (16, 8, 4, 2, 1):
        fitting = round(ideal / step) * step
        count = at_width + (fitting - width) * (one_more - at_width)
        if fitting > 0 and abs(count - target) <= SHARE * target:
            return fitting
    raise ValueError(f"mixers has {label!r}: no width of its MLP gives the {target:,} parameters of the baseline")


# -- reading the file --


def read_plan(file: str | Path, text: str | Path = ".") -> Plan:
    """Read a comparison from a YAML file.

    Args:
        text: the folder from which the paths of texts in the file start.

    Raises:
        ValueError: no such file, not YAML, a field or mixer that is not known (the nearest is suggested), or a value
            that does not fit; before any work.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"{str(file)!r} is no file, expected the YAML file of a comparison")
    try:
        fields = read_yaml(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is not a mapping of fields to values")
    check_names("field of a comparison", fields, FIELDS)
    for name in ("train", "mixers", "baseline", "learning_rates"):
        if name not in fields:
            raise ValueError(f"{name} is missing in {path}")
    train, tests = mapping("train", fields["train"]), mapping("tests", fields.get("tests"))
    check_names("field of train", train, {field.name for field in dataclasses.fields(TrainConfig)} - OURS)
    for name in ("data", "validation"):
        if name not in train:
            raise ValueError(f"train: {name} is missing, expected the path of a text")
        if name in tests:
            raise ValueError(f"tests has {name!r}, expected another name: it is the text of train: {name}")
    train = {name: place(f"train: {name}", x, text) if name in TEXTS else x for name, x in train.items()}
    train["model"] = mapping("train: model", train.get("model"))
    check_vocabulary("train", train["model"])
    for name in train["model"]:
        if name in DECIDED:
            raise ValueError(f"train: model: {name} is what mixers differ in, expected it with one of them")
    tests = {name: place(f"tests: {name}", x, text) for name, x in tests.items()}
    rates, matching = fields["learning_rates"], fields.get("matching", ["shape"])
    if not all_different(rates) or not all(type(x) in (int, float) and 0 < x < math.inf for x in rates):
        raise ValueError(f"learning_rates is {rates!r}, expected a list of different positive numbers")
    if not all_different(matching) or not all(x in MATCHING for x in matching):
        raise ValueError(f"matching is {matching!r}, expected a list of {' and '.join(map(repr, MATCHING))}")
    mixers = {}
    for label, entry in mapping("mixers", fields["mixers"]).items():
        where = f"mixers: {label}"
        entry = {"mixer": label, "seeds": fields.get("seeds", 3)} | mapping(where, entry)
        check_names(f"field of {where}", entry, ("mixer", "seeds", "model", "train"))
        entry |= {name: mapping(f"{where}: {name}", entry.get(name)) for name in ("model", "train")}
        check_vocabulary(where, entry["model"])
        check_names(f"field of {where}: train", entry["train"], OWN)
        mixers[label] = entry
    if fields["baseline"] not in list(mixers):
        raise ValueError(f"baseline is {fields['baseline']!r}, expected one of the mixers: {', '.join(mixers)}")
    plan = Plan(train, mixers, fields["baseline"], [float(x) for x in rates], matching, tests)
    for label, entry in mixers.items():
        try:
            if not isinstance(entry["mixer"], str):
                raise ValueError(f"mixer is {entry['mixer']!r}, expected a name as in carve/evals/mixers.py")
            if type(entry["seeds"]) is not int or entry["seeds"] < 1:
                raise ValueError(f"seeds is {entry['seeds']!r}, expected an integer of at least 1")
            config = TrainConfig(**(train | entry["train"] | {"model": plan.shape(label)}))
            check_context(CarveConfig(**config.model), config.seq_len)
        except ValueError as error:
            raise ValueError(f"mixers: {label}: {error}") from error
    return plan


def mapping(name: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {value!r}, expected a mapping")
    for key in value:
        if not isinstance(key, str):
            raise ValueError(f"{name} has the name {key!r}, expected a string (in quotes, if it is a number)")
    return value


def check_vocabulary(where: str, model: Mapping[str, Any]) -> None:
    if "vocab_size" in model:
        raise ValueError(f"{where}: model: vocab_size is {model['vocab_size']!r}, expected none: it is the tokenizer's")


def all_different(x: Any) -> bool:
    """Whether it is a list of one thing or more, none of them twice."""
    return isinstance(x, list) and bool(x) and all(y not in x[:i] for i, y in enumerate(x))


def check_names(what: str, names: Iterable[str], allowed: Iterable[str]) -> None:
    """Raise ValueError on a name that is not allowed, with the nearest one that is."""
    allowed = sorted(allowed)
    for name in names:
        if name not in allowed:
            raise ValueError(f"{name!r} is no {what}{hint(name, allowed)}")


def place(name: str, value: Any, text: str | Path) -> str:
    """The path of a text, or of a tokenizer."""
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r}, expected a path")
    if value.startswith(HUB):
        raise ValueError(f"{name} is {value!r}, expected a file or a folder: a comparison takes none of the Hub")
    return value if (name, value) == ("train: tokenizer", "bytes") else str(Path(text, value))


def is_recurrent(model: Mapping[str, Any]) -> bool:
    """Whether no layer is attention: what such a model can read has no limit."""
    return set(ATTENTION).isdisjoint(model["layer_types"])
