"""A training run: transformers' Trainer, with checkpoints that are whole or absent, and progress that one can read."""

import json
import logging
import math
import os
import shutil
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any
from zipfile import ZipFile

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from carve.files import locked, replace_text
from carve.mixer import CarveMixer
from carve.models import CarveConfig, CarveForCausalLM
from carve.train.config import SPECIAL, TrainConfig, settled
from carve.train.data import HUB, collate, find_files, reading, split_rows, tokenise
from carve.train.tokenizer import load_tokenizer

PARTIAL = "partial"  # where a checkpoint is written until it is whole
LOCK = "lock"  # held by the process that trains
PLACES = ("data", "tokenizer", "out", "cache")  # fields of `TrainConfig`; what lies there may be moved
RHYTHM = ("eval_every", "save_every", "log_every", "keep")  # and these change nothing of the weights


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop and has saved a checkpoint; the message says how to go on.

    Attributes:
        signal: the number of the signal, SIGINT or SIGTERM.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


def train(config: TrainConfig, *, resume: bool = False) -> Path:
    """Train a model.

    Args:
        config: what to train, on what, how long, and where to put it.
        resume: go on from the last checkpoint of `config.out`; on as many CPUs, to the same bits as uninterrupted.

    Returns:
        The folder of the last checkpoint, which `from_pretrained` loads.

    Raises:
        ValueError: the data, tokenizer or model do not fit, the run's folder is in use, or a resumed run differs or is
            damaged.
        OSError: a checkpoint could not be written; those before it are whole.
        FloatingPointError: the training diverged; the message names the step and the last checkpoint.
        Interrupted: Ctrl-C or SIGTERM, after a checkpoint was saved.
        ImportError: the packages that training needs are not installed.
    """
    try:
        import accelerate  # noqa: F401  (Trainer imports it, with a message that names no package of ours)
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ImportError("training needs: pip install 'carve-attention[train]'") from error
    out = Path(config.out)
    check_folder(config, out, resume)
    args = arguments(config)
    for name in ("data", "validation"):  # both, before the work begins with one
        text = getattr(config, name)
        if text is not None and not text.startswith(HUB):
            find_files(text, name)
            if out.absolute().is_relative_to(Path(text).absolute()):
                raise ValueError(f"out is {out}, within {name} = {text!r}: expected a folder that is not read as text")
    tokenizer = load_tokenizer(config.tokenizer)
    with alone(out) if args.process_index == 0 else nullcontext():
        if args.process_index == 0:
            check_folder(config, out, resume)  # once more: another may have begun since, and ended
        return _train(config, args, tokenizer, out, resume)


def _train(
    config: TrainConfig, args: TrainingArguments, tokenizer: PreTrainedTokenizerBase, out: Path, resume: bool
) -> Path:
    """The training itself; `train` says what it takes and raises."""
    from torch.utils.tensorboard import SummaryWriter

    cache = out / "data" if config.cache is None else Path(config.cache)
    for left in (out / "data").glob("*.partial-*") if args.process_index == 0 else ():
        shutil.rmtree(left)  # a run was killed here
    with args.main_process_first(local=False):  # the others find it in the cache
        tokens = validation_tokens = tokenise(config.data, tokenizer, cache)
        if config.validation is not None:
            validation_tokens = tokenise(config.validation, tokenizer, cache, "validation")
    fingerprints = {"data": tokens.fingerprint, "validation": validation_tokens.fingerprint}
    if resume:
        check_data(out, fingerprints)
    if config.validation is None:
        training, validation = split_rows(tokens, config.seq_len, config.validation_share)
    else:
        training, _ = split_rows(tokens, config.seq_len, 0)
        validation, _ = split_rows(validation_tokens, config.seq_len, 0, "validation")

    # a pass over the text would end with a batch of another size, for which all would be compiled anew
    args.dataloader_drop_last = len(training) >= config.micro_batch * args.world_size * max(1, args.n_gpu)

    set_seed(config.seed)
    special = {name: getattr(tokenizer, name) for name in SPECIAL}
    fields = {"vocab_size": len(tokenizer)} | special | config.model
    if fields["vocab_size"] < len(tokenizer):
        raise ValueError(f"model has vocab_size {fields['vocab_size']}, expected at least {len(tokenizer)} tokens")
    model_config = CarveConfig(**fields)
    if args.process_index == 0:
        check_content(config.seq_len, model_config)
    model = CarveForCausalLM(model_config)
    if model_config.tie_word_embeddings:  # or Trainer warns that a resumed checkpoint lacks it
        model._keys_to_ignore_on_save = ["lm_head.weight"]
    if config.compile:
        compile_blocks(model)

    stop, progress = StopOnSignal(), ShowProgress(shown=args.process_index == 0)
    callbacks = [stop, Rhythm(), Metrics(out), progress]
    if args.process_index == 0:
        callbacks.append(TensorBoardCallback(SummaryWriter(str(out / "tensorboard"))))
    scored = len(validation_tokens.ids)
    if tokenizer.bos_token_id is not None:  # which nothing predicts
        scored -= len(validation_tokens.starts)
    bits_a_byte = scored / validation_tokens.bytes / math.log(2)
    trainer = CarveTrainer(
        model=model,
        args=args,
        train_dataset=training,
        eval_dataset=validation,
        processing_class=tokenizer,
        data_collator=collate,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.bits_a_byte, trainer.content_lr = bits_a_byte, config.content_lr
    if args.process_index == 0:
        shutil.rmtree(out / PARTIAL, ignore_errors=True)  # what an interruption left
        replace_text(out / "data.json", json.dumps(fingerprints) + "\n")
        config.save(out / "config.yaml")
    last = get_last_checkpoint(out)
    if last != str(out / f"checkpoint-{config.steps}"):
        if last is not None:
            if (at := int(last.rpartition("-")[2])) > config.steps:
                raise ValueError(f"steps is {config.steps}, but the run in {out} has made {at}: expected more")
            logging.getLogger("transformers.trainer_utils").addFilter(is_news)
            if args.process_index == 0:
                check_checkpoint(Path(last), model_config)
        with stop, progress.bar:
            trainer.train(resume_from_checkpoint=last)
        last = get_last_checkpoint(out)
        assert last is not None
    if stop.number is not None and trainer.state.global_step < config.steps:
        raise Interrupted(f"saved {last}; go on with: carve train --resume {out}", stop.number)
    return Path(last)


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Within `with`: no other process of this machine trains in the folder. One that is killed is in no one's way.

    Raises:
        ValueError: another does.
    """
    with locked(out / LOCK) as mine:
        if not mine:
            raise ValueError(f"out is {out}, in which another process trains: expected its end, or another folder")
        yield


def compile_blocks(model: CarveForCausalLM, backend: Any = "inductor") -> None:
    """Run the blocks and the loss without logits through `torch.compile`; weights and their names stay as they are.

    Blocks that are alike are compiled once, so that the time this takes does not grow with their number.
    """
    for block in model.model.layers:
        block.compile(backend=backend)
    model.head_loss = torch.compile(model.head_loss, backend=backend)  # type: ignore[method-assign]


def check_content(seq_len: int, model: CarveConfig) -> None:
    """Warn where layers see content, but in no gate that has a loss behind it.

    The first chunk sees an empty memory, and the last token of a sequence has no loss.
    """
    if model.sees_content and seq_len < model.chunk_size + 2:
        warnings.warn(
            f"carve: the content projections will not learn: seq_len is {seq_len}, expected at least "
            f"chunk_size + 2 = {model.chunk_size + 2}",
            stacklevel=4,
        )


def check_folder(config: TrainConfig, out: Path, resume: bool) -> None:
    """See that the run's folder is new, or that what it holds is a run with this configuration.

    Texts and tokenizer may lie elsewhere now: `check_data` sees that they are the same.

    Raises:
        ValueError: the folder is in use, there is nothing to resume, or a field differs; the message names it.
    """
    saved = out / "config.yaml"
    if not resume:
        if out.exists() and (not out.is_dir() or any(path.name not in ("data", LOCK) for path in out.iterdir())):
            how = f": carve train --resume {out} goes on with it" if saved.exists() else ""
            raise ValueError(f"out is {out}, which is not empty{how}; expected a new folder")
        return
    if not saved.is_file():
        raise ValueError(f"{out} holds no config.yaml: expected the folder of a training run")
    fields, before = (settled(vars(each)) for each in (config, TrainConfig.load(saved)))
    for where, now, was in (("", fields, before), ("model.", fields.pop("model"), before.pop("model"))):
        for name in was | now:
            free = name in PLACES + RHYTHM or (name == "validation" and None not in (was[name], now[name]))
            same = (name in now) == (name in was) and now.get(name) == was.get(name)
            if not same and not free:
                mine, its = (repr(each[name]) if name in each else "the tokenizer's" for each in (now, was))
                raise ValueError(f"{where}{name} is {mine}, but the run in {out} has {its}: it cannot go on")


def check_data(out: Path, fingerprints: dict[str, str]) -> None:
    """See that the text is still that of the run.

    Raises:
        ValueError: the text or the tokenizer has changed since the run began; the message names the field.
    """
    path = out / "data.json"
    with reading(path, "put it back, or train anew in another folder"):
        before = {name: json.loads(path.read_text(encoding="utf-8"))[name] for name in fingerprints}
    for name, was in before.items():
        if fingerprints[name] != was:
            raise ValueError(f"{name} has changed, in text or tokenizer, since the run in {out} began: it cannot go on")


def check_checkpoint(folder: Path, model: CarveConfig) -> None:
    """See that a run can go on from a checkpoint.

    Raises:
        ValueError: a file is missing or damaged, or the checkpoint is of another model; the message names it.
    """
    remedy = f"put it back, or remove {folder} to go on from the checkpoint before it, or from the start"
    for pattern in (
        "config.json",
        "model*.safetensors",
        "trainer_state.json",
        "optimizer.pt",
        "scheduler.pt",
        "rng*.pth",
    ):
        paths = list(folder.glob(pattern))
        if not paths:
            raise ValueError(f"{folder / pattern} is missing: {remedy}")
        for path in paths:
            with reading(path, remedy):
                check_whole(path)
    with reading(folder / "config.json", remedy):
        was = CarveConfig.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    for name in CarveConfig.__annotations__:
        if getattr(model, name) != getattr(was, name):
            raise ValueError(f"model.{name} is {getattr(model, name)!r}, but {folder} has {getattr(was, name)!r}")


def check_whole(path: Path) -> None:
    """Raise an error, of many kinds, where a file of a checkpoint was cut or is not of its kind."""
    if path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
    elif path.suffix == ".safetensors":
        with safe_open(path, "pt"):
            pass
    else:
        with ZipFile(path) as file:
            if part := file.testzip():
                raise ValueError(f"{part} is not as it was written")


def is_news(record: logging.LogRecord) -> bool:
    """Whether a word of transformers is not that of arguments which differ: `check_folder` has looked at them."""
    return "do not match the ones in the `trainer_state.json`" not in record.getMessage()


def arguments(config: TrainConfig) -> TrainingArguments:
    """The configuration in the words of transformers' Trainer."""
    # A word of transformers that is about to be replaced by another: said only where it is needed.
    checkpointing: dict[str, Any] = {"gradient_checkpointing": True} if config.gradient_checkpointing else {}
    args = TrainingArguments(
        output_dir=config.out,
        max_steps=config.steps,
        per_device_train_batch_size=config.micro_batch,
        per_device_eval_batch_size=config.micro_batch,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=config.clip,
        seed=config.seed,
        bf16=config.dtype == "bfloat16",
        **checkpointing,
        eval_strategy="steps" if config.eval_every else "no",
        eval_steps=config.eval_every or None,
        save_strategy="steps",
        save_steps=config.save_every,
        save_total_limit=config.keep,
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="all",
        report_to=[],
        disable_tqdm=True,
        prediction_loss_only=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        accelerator_config={"non_blocking": torch.cuda.is_available()},  # or each batch waits for all before it
        use_cpu=not torch.cuda.is_available(),
    )
    devices = args.world_size * max(1, args.n_gpu)
    tokens = config.seq_len * config.micro_batch * devices
    if config.batch_tokens % tokens:
        raise ValueError(
            f"batch_tokens is {config.batch_tokens}, expected a multiple of "
            f"seq_len x micro_batch x devices = {config.seq_len} x {config.micro_batch} x {devices} = {tokens}"
        )
    args.gradient_accumulation_steps = config.batch_tokens // tokens
    return args


class CarveTrainer(Trainer):
    """Trainer, but for groups of parameters, bits per byte, and checkpoints that are whole or absent."""

    bits_a_byte: float  # times nats a token
    content_lr: float  # times the learning rate, for the content projections
    _writing = False

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        kept = {name for name, parameter in model.named_parameters() if getattr(parameter, "_no_weight_decay", False)}
        return [name for name in super().get_decay_parameter_names(model) if name not in kept]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)
        mixers = [module for module in self.model.modules() if isinstance(module, CarveMixer)]  # type: ignore[union-attr]
        content = {p for mixer in mixers for p in (mixer.p_down, mixer.p_up, mixer.p_write) if p is not None}
        if content and self.content_lr != 1:
            for group in list(optimizer.param_groups):
                own = [p for p in group["params"] if p in content]
                if own:
                    group["params"] = [p for p in group["params"] if p not in content]
                    optimizer.add_param_group({**group, "params": own, "lr": group["lr"] * self.content_lr})
        return optimizer

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As Trainer does, but for the logits: accelerate would copy all of them to float32, for nobody."""
        try:
            return super().compute_loss(model, inputs | {"skip_logits": True}, *args, **kwargs)
        except FloatingPointError as error:  # of the op, on a CPU
            raise self.diverged(str(error)) from error

    def diverged(self, seen: str) -> FloatingPointError:
        """The error to raise where numbers have run away."""
        last = get_last_checkpoint(self.args.output_dir)
        return FloatingPointError(
            f"training diverged at step {self.state.global_step}: {seen}; train anew, in another folder, with "
            f"a learning_rate below {self.args.learning_rate:g} (resumed, it would go the same way); "
            + (f"the last checkpoint is {last}" if last else "there is no checkpoint")
        )

    def _track_num_input_tokens(self, inputs: dict[str, torch.Tensor]) -> None:
        """As Trainer does, which puts the number on the device to add it up, and waits for all that runs there."""
        self.state.num_input_tokens_seen += inputs["input_ids"].numel() * self.args.world_size

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for name in ("loss", "grad_norm", "eval_loss"):
            if not math.isfinite(logs.get(name, 0)):
                raise self.diverged(f"{name} is {logs[name]}, expected a finite number")
        if "eval_loss" in logs:
            logs["eval_bits_per_byte"] = logs["eval_loss"] * self.bits_a_byte
        super().log(logs, start_time)

    def _get_output_dir(self, trial: Any) -> str:
        out = super()._get_output_dir(trial)
        return os.path.join(out, PARTIAL) if self._writing else out

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        if not all(parameter.isfinite().all() for parameter in model.parameters()):  # no checkpoint of use
            raise self.diverged("weights are not finite")
        out = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        self._writing = True
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                publish(out / PARTIAL / name, out / name)
                rotate_checkpoints(str(out), self.args.save_total_limit)
            self.accelerator.wait_for_everyone()
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk shows as any of the three
            shutil.rmtree(out / PARTIAL, ignore_errors=True)
            last = get_last_checkpoint(out)
            left = f"the last whole one is {last}" if last else "there is none before it"
            raise OSError(f"{name} could not be written ({' '.join(str(error).split())}); {left}") from error
        finally:
            self._writing = False


def publish(partial: Path, final: Path) -> None:
    """Give a folder its final name once all that is in it lies on the disk."""
    for path in (*partial.rglob("*"), partial):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    if final.exists():  # the same step, from before an interruption
        shutil.rmtree(final)
    os.replace(partial, final)
    shutil.rmtree(partial.parent, ignore_errors=True)


class StopOnSignal(TrainerCallback):
    """Within `with`: the first SIGINT or SIGTERM saves after the current step and stops; a second one stops at once."""

    number: int | None = None

    def __enter__(self) -> None:
        self.before = {number: signal.signal(number, self.receive) for number in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        Console(stderr=True).print("stopping after this step, with a checkpoint (once more to stop at once)")
        self.__exit__()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if args.world_size > 1:  # all stop at one step: saving waits for every process
            received = torch.tensor(self.number or 0, device=args.device)
            torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
            self.number = int(received) or None
        if self.number is not None:
            control.should_save = control.should_training_stop = True
        return control


class Rhythm(TrainerCallback):
    """Logs, evaluates and saves as often as is said now, not when a checkpoint was written; logs the last step too."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.compute_steps(args, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        control.should_log |= state.global_step == state.max_steps
        return control


class Metrics(TrainerCallback):
    """metrics.jsonl: a line for what the trainer logs; lines behind the checkpoint that a run goes on from are cut."""

    def __init__(self, out: Path) -> None:
        self.path = out / "metrics.jsonl"
        self.last: tuple[float, int] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.last = (time.monotonic(), state.num_input_tokens_seen)
        if state.is_world_process_zero and self.path.exists():
            with reading(self.path, "put it back, or remove it and do without what it says"):
                lines = self.path.read_text(encoding="utf-8").splitlines()
                kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= state.global_step]
            replace_text(self.path, "".join(f"{line}\n" for line in kept))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero or logs is None:
            return
        line = {"step": state.global_step, "tokens": state.num_input_tokens_seen}
        if "loss" in logs and self.last is not None:
            (then, tokens), self.last = self.last, (time.monotonic(), state.num_input_tokens_seen)
            speed = (self.last[1] - tokens) / (self.last[0] - then)
            line |= {key: logs[key] for key in ("loss", "learning_rate", "grad_norm") if key in logs}
            line |= {"tokens_per_second": round(speed, 1)}
        elif "eval_loss" in logs:
            line |= {key: logs[key] for key in ("eval_loss", "eval_bits_per_byte")}
        else:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class ShowProgress(TrainerCallback):
    """A bar with loss, speed and time left; where there is no terminal, a line at each log."""

    def __init__(self, shown: bool) -> None:
        self.console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (shown and self.console.is_terminal),
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.begin, self.first = time.monotonic(), state.num_input_tokens_seen
        self.loss = ""
        if state.is_world_process_zero:
            self.task = self.bar.add_task("train", total=state.max_steps, completed=state.global_step, text="")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.bar.update(
                self.task, completed=state.global_step, text=f"{self.loss}{self.speed(state):,.0f} tokens/s"
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero or logs is None:
            return
        if "loss" in logs:
            self.loss = f"loss {logs['loss']:.3f}  "
            if not self.console.is_terminal:
                self.console.print(
                    f"step {state.global_step}/{state.max_steps}  {self.loss}{self.speed(state):,.0f} tokens/s"
                )
        if "eval_loss" in logs:
            self.bar.console.print(
                f"step {state.global_step}: validation loss {logs['eval_loss']:.4f}, "
                f"{logs['eval_bits_per_byte']:.4f} bits per byte"
            )

    def speed(self, state: Any) -> float:
        """Tokens a second since training began or was taken up again."""
        return (state.num_input_tokens_seen - self.first) / (time.monotonic() - self.begin)
