"""A training run, from a configuration to its last checkpoint."""

import json
import logging
import math
import shutil
import signal
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from carve.files import replace_text
from carve.models import CarveConfig, CarveForCausalLM
from carve.train.config import SPECIAL, TrainConfig
from carve.train.data import HUB, check_apart, collate, find_files, remove_partial, split_rows, tokenise
from carve.train.folder import (
    PARTIAL,
    alone,
    check_checkpoint,
    check_data,
    check_folder,
    check_kept,
    moved,
    save_config,
    token_cache,
)
from carve.train.tokenizer import load_tokenizer
from carve.train.trainer import CarveTrainer, Metrics, Rhythm, ShowProgress, StopOnSignal, what_is_left

LONG = 1e12  # parameters times tokens of a step: minutes on a few cores


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop, and has; the message says which checkpoint is the last, and how to go on.

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
        Interrupted: Ctrl-C or SIGTERM, after a checkpoint was saved; or at once, at a second Ctrl-C.
        ImportError: the packages that training needs are not installed.
    """
    try:
        import accelerate  # noqa: F401  (Trainer imports it, with a message that names no package of ours)
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ImportError("training needs: pip install 'carve-attention[train]'") from error
    out = Path(config.out)
    check_folder(config, out, resume)
    if resume:
        config = moved(config)
    args = arguments(config)
    for name in ("data", "validation"):  # both, before the work begins with one
        text = getattr(config, name)
        if text is not None and not text.startswith(HUB):
            if resume:
                check_kept(config, name)
            find_files(text, name)
            check_apart("out", out, name, text)
            if config.cache is not None:
                check_apart("cache", Path(config.cache), name, text)
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

    cache = token_cache(config)
    if args.process_index == 0:
        remove_partial(out / "data")
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

    if args.process_index == 0:  # from here on there is a run to go on with
        replace_text(out / "data.json", json.dumps(fingerprints) + "\n")
        save_config(config, out)

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
    last, how = get_last_checkpoint(out), f"go on with: carve train --resume {out}"
    if last != str(out / f"checkpoint-{config.steps}"):
        if last is not None:
            if (at := int(last.rpartition("-")[2])) > config.steps:
                raise ValueError(f"steps is {config.steps}, but the run in {out} has made {at}: expected more")
            logging.getLogger("transformers.trainer_utils").addFilter(is_news)
            if args.process_index == 0:
                check_checkpoint(Path(last), model_config)
        if args.process_index == 0:
            said = expectation(config, model.num_parameters(), args.device)
            progress.console.print(said, highlight=False)
        try:
            with stop, progress.bar:
                trainer.train(resume_from_checkpoint=last)
        except KeyboardInterrupt:
            what = f"stopped at once, after {trainer.state.global_step} steps; {what_is_left(out)}"
            raise Interrupted(f"{what}; {how}", signal.SIGINT) from None
        last = get_last_checkpoint(out)
        assert last is not None
    if stop.number is not None:
        ended = trainer.state.global_step >= config.steps
        raise Interrupted(f"saved {last}{', with which the run has ended' if ended else f'; {how}'}", stop.number)
    return Path(last)


def compile_blocks(model: CarveForCausalLM, backend: Any = "inductor") -> None:
    """Run the blocks and the loss without logits through `torch.compile`; weights and their names stay as they are.

    Blocks that are alike are compiled once, so that the time this takes does not grow with their number.
    """
    for block in model.model.layers:
        block.compile(backend=backend)
    model.head_loss = torch.compile(model.head_loss, backend=backend)  # type: ignore[method-assign]


def expectation(config: TrainConfig, parameters: int, device: torch.device) -> str:
    """What to know of a training before its first step has ended."""
    size = f"{parameters:,} parameters on {device.type}, {config.steps:,} steps of {config.batch_tokens:,} tokens"
    long = device.type == "cpu" and parameters * config.batch_tokens > LONG
    return size + (": on a CPU each may take minutes" if long else "")


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
        use_cache=config.model.get("use_cache", CarveConfig.use_cache),  # Trainer writes it into the checkpoints
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
