"""What a training run does: one flat dataclass, read from YAML, each field also a flag of `carve train`."""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from carve.files import replace_text
from carve.names import hint

PRESETS = Path(__file__).parent / "presets"
DTYPES = ("float32", "bfloat16")
CONTENT = ("content", "content_norm", "content_erase", "content_write")  # of the model: what its gates see
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")  # of the model: where not given, they are the tokenizer's


class Loader(yaml.SafeLoader):
    """YAML in which 5e-4 is a number, as it is to Python, and no key of a mapping comes twice.

    PyYAML takes 5e-4 for a word unless it is written 5.0e-4, and of two values of one key the last.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                problem = f"the key {key!r} comes twice"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """What `Loader` reads back: the word 5e-4 gets quotes."""


for each in (Loader, Dumper):
    each.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def read_yaml(text: str | bytes) -> Any:
    """The value of a YAML text, in UTF-8.

    Raises:
        ValueError: it is not YAML.
    """
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {' '.join(str(error).split())}") from error


def _option(help: str, default: Any = dataclasses.MISSING, **kwargs: Any) -> Any:
    return field(default=default, metadata={"help": help}, **kwargs)


@dataclass(kw_only=True)
class TrainConfig:
    """A training run. Every field's meaning is in its `help`, which `carve train --help` prints.

    Raises:
        ValueError: a field is not what it must be; the message names it.
    """

    data: str = _option("Training text: a file or folder (.jsonl, .parquet, else UTF-8 text), or hub:NAME[:CONFIG].")
    validation: str | None = _option("Validation text, the same; by default the last share of the data.", None)
    validation_share: float = _option(
        "Share of the data's sequences kept for validation if none is given; 0 to evaluate nothing.", 0.01
    )
    tokenizer: str = _option("'bytes' (nothing to download), or a tokenizer's folder or Hub name.", "bytes")
    model: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "NAME=VALUE of CarveConfig, as hidden_size=256 or 'layer_types=[carve,gdn]'; repeat for more."
        },
    )
    out: str = _option("Folder of the run: config.yaml, metrics.jsonl, checkpoint-N, tensorboard.", "runs/train")
    cache: str | None = _option("Folder for the tokenised text, to share between runs; by default in the run's.", None)
    seq_len: int = _option("Tokens in a training sequence.", 2048)
    batch_tokens: int = _option("Tokens in an optimizer step, over all devices.", 65536)
    micro_batch: int = _option("Sequences that a device runs at once; the rest of the batch is accumulated.", 8)
    steps: int = _option("Optimizer steps.", 1000)
    learning_rate: float = _option("Peak learning rate of AdamW (betas 0.9 and 0.95).", 1e-3)
    content_lr: float = _option("Factor on the learning rate of the content projections.", 1.0)
    warmup_steps: int = _option("Steps of linear warm-up; a cosine to a tenth of the peak follows.", 100)
    weight_decay: float = _option("Of matrices; norms, biases and the parameters of the decay have none.", 0.1)
    clip: float = _option("Largest norm of the gradient.", 1.0)
    seed: int = _option("Of initial weights and data order.", 0)
    dtype: str = _option("'float32', or 'bfloat16' to compute in it under autocast (weights stay float32).", "float32")
    gradient_checkpointing: bool = _option("Trade time for memory: run each block again in the backward.", False)
    compile: bool = _option("Run the blocks and the loss through torch.compile.", False)
    eval_every: int = _option("Steps between evaluations; 0 for none.", 250)
    save_every: int = _option("Steps between checkpoints.", 250)
    log_every: int = _option("Steps between lines of metrics.jsonl.", 10)
    keep: int = _option("Checkpoints to keep, the newest ones.", 2)

    def __post_init__(self) -> None:
        from carve.models import CarveConfig  # not above: `carve --help` needs the fields alone

        for each in dataclasses.fields(self):
            self._check_type(each)
        for name in ("seq_len", "batch_tokens", "micro_batch", "steps", "save_every", "log_every", "keep"):
            self._expect(name, getattr(self, name) >= 1, "at least 1")
        for name in ("warmup_steps", "eval_every"):
            self._expect(name, getattr(self, name) >= 0, "at least 0")
        self._expect("weight_decay", 0 <= self.weight_decay < math.inf, "a finite number of at least 0")
        self._expect("seq_len", self.seq_len >= 2, "at least 2, a token and the one to predict")
        self._expect("learning_rate", 0 < self.learning_rate < math.inf, "a positive finite number")
        self._expect("content_lr", 0 < self.content_lr < math.inf, "a positive finite number")
        self._expect("seed", 0 <= self.seed < 1 << 32, "from 0 to below 2**32")
        self._expect("clip", self.clip > 0, "a positive number")
        self._expect("warmup_steps", self.warmup_steps < self.steps, f"fewer than steps = {self.steps}")
        self._expect("validation_share", 0 <= self.validation_share < 1, "from 0 to below 1")
        self._expect("dtype", self.dtype in DTYPES, f"one of {', '.join(DTYPES)}")
        tokens = self.seq_len * self.micro_batch
        self._expect("batch_tokens", self.batch_tokens % tokens == 0, f"a multiple of seq_len x micro_batch = {tokens}")
        names = {each.name for each in dataclasses.fields(CarveConfig)}
        for name in self.model:
            if name not in names:
                raise ValueError(f"model has {name!r}, which CarveConfig does not know{hint(name, names)}")
        model = CarveConfig(**self.model)  # raises on values that do not fit
        for name in () if model.content is None or model.sees_content else CONTENT:
            if name in self.model:
                raise ValueError(f"model has {name!r}, but no layer of layer_types sees content: expected it left out")
        fits = self.content_lr == 1 or model.sees_content
        self._expect("content_lr", fits, "1: no layer of the model sees content")

    def _expect(self, name: str, fits: bool, expected: str) -> None:
        if not fits:
            raise ValueError(f"{name} is {getattr(self, name)!r}, expected {expected}")

    def _check_type(self, each: dataclasses.Field) -> None:
        value, kind = getattr(self, each.name), each.type
        if value is None and kind == str | None:
            return
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            setattr(self, each.name, float(value))
            return
        python_type: type = str if kind == str | None else dict if kind == dict[str, Any] else kind  # type: ignore[assignment]
        if not isinstance(value, python_type) or (isinstance(value, bool) and python_type is not bool):
            raise ValueError(f"{each.name} is {value!r}, expected {python_type.__name__}")

    @classmethod
    def load(cls, source: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> "TrainConfig":
        """Read a configuration.

        Args:
            source: a YAML file, or the name of a preset; None for the defaults.
            overrides: fields that win over the file's; `model` is merged field by field.

        Raises:
            ValueError: no such file or preset, not YAML, an unknown or missing field, or a value that does not fit.
        """
        fields = {} if source is None else _read(source)
        overrides = dict(overrides or {})
        fields |= {"model": {**fields.get("model", {}), **overrides.pop("model", {})}} | overrides
        names = {each.name for each in dataclasses.fields(cls)}
        for name in fields:
            if name not in names:
                raise ValueError(f"{name!r} is no field of a training configuration{hint(name, names)}")
        if "data" not in fields:
            raise ValueError("data is missing: expected a file, a folder or hub:NAME to train on")
        return cls(**fields)

    def save(self, path: str | Path) -> None:
        """Write all fields as YAML."""
        replace_text(path, yaml.dump(dataclasses.asdict(self), Dumper=Dumper, sort_keys=False))


def settled(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `TrainConfig` with the defaults of those that are not given, its own and the model's: runs with the
    same are the same, however they were written down."""
    from carve.models import CarveConfig

    own = {each.name: each.default for each in dataclasses.fields(TrainConfig) if each.name not in ("data", "model")}
    known = [name for name in CarveConfig.__annotations__ if name not in ("vocab_size", *SPECIAL)]
    model = {name: getattr(CarveConfig, name) for name in known}
    return {**own, **fields, "model": model | fields.get("model", {})}


def _read(source: str | Path) -> dict[str, Any]:
    presets = {path.stem: path for path in sorted(PRESETS.glob("*.yaml"))}
    path = presets.get(str(source), Path(source))
    if not path.is_file():
        raise ValueError(f"{str(source)!r} is neither a YAML file nor a preset ({', '.join(presets)})")
    try:
        fields = read_yaml(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is {error}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("model", {}), dict):
        raise ValueError(f"{path} is not a mapping of fields to values (model: a mapping too)")
    return fields
