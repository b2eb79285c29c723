"""transformers' Trainer for our models, and what is called while it runs: to stop, to log, to show progress."""

import json
import math
import os
import shutil
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from carve.files import reading, replace_text
from carve.mixer import CarveMixer
from carve.train.folder import PARTIAL, publish


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

    def get_train_dataloader(self) -> Any:
        """As Trainer does, but without a batch of another size at the end of a pass: all would be compiled anew for it.

        A text with less than a batch makes one all the same, and evaluation has the last rows too.
        """
        batch = self.args.train_batch_size * self.args.world_size
        self.args.dataloader_drop_last = len(self.train_dataset) >= batch  # type: ignore[arg-type]
        try:
            return super().get_train_dataloader()
        finally:
            self.args.dataloader_drop_last = False

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As Trainer does, but for the logits, which accelerate would copy to float32 for nobody, and for a cache."""
        try:
            return super().compute_loss(model, inputs | {"skip_logits": True, "use_cache": False}, *args, **kwargs)
        except FloatingPointError as error:  # of the op, on a CPU
            raise self.diverged(str(error)) from error

    def diverged(self, seen: str) -> FloatingPointError:
        """The error to raise where numbers have run away."""
        return FloatingPointError(
            f"training diverged at step {self.state.global_step}: {seen}; train anew, in another folder, with "
            f"a learning_rate below {self.args.learning_rate:g} (resumed, it would go the same way); "
            + what_is_left(str(self.args.output_dir))
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


def what_is_left(out: str | os.PathLike[str]) -> str:
    """Of a run that ends here."""
    last = get_last_checkpoint(out)
    return f"the last checkpoint is {last}" if last else "there is no checkpoint"


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
            speed_estimate_period=3600,  # or no time is shown where a step takes half a minute
            disable=not (shown and self.console.is_terminal),
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.begin, self.first = time.monotonic(), state.num_input_tokens_seen
        self.loss, self.part = "", 0
        if state.is_world_process_zero:
            self.task = self.bar.add_task("train", total=state.max_steps, completed=state.global_step, text="")

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.part += 1
        self.show(state, state.global_step + self.part / args.gradient_accumulation_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.part = 0
        self.show(state, state.global_step)

    def show(self, state: Any, completed: float) -> None:
        if state.is_world_process_zero:
            self.bar.update(self.task, completed=completed, text=f"{self.loss}{self.speed(state):,.0f} tokens/s")

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
