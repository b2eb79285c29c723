"""The demo: a small CARVE model learns Python's own source files on a CPU, is measured, and writes."""

import hashlib
import json
import lzma
import math
import os
import sysconfig
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from carve.evals import perplexity
from carve.files import replace_text, replacing
from carve.generation import generate_text
from carve.inspection import draw_gates, trace_gates
from carve.models.checkpoint import load_checkpoint
from carve.train import TrainConfig, train

LEFT_OUT = {"__pycache__", "dist-packages", "encodings", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test"}
"""Folders of the standard library that the demo does not read: installed packages, tests, data tables."""

PROMPT = "import os\n\n\ndef read(path):\n"


def run_demo(
    folder: str | os.PathLike[str] = "runs/demo",
    *,
    train_bytes: int = 3 << 20,
    validation_bytes: int = 3 << 15,
    sample_tokens: int = 500,
    training: dict[str, Any] | None = None,
) -> dict[str, float]:
    """Train the preset `demo` on Python's own source files, measure it, let it write, and draw.

    Interrupted with Ctrl-C and run again, it goes on where it stopped. Everything is written below `folder`:
    `data/train.jsonl` and `data/validation.jsonl`, the run of the training in `model`, `sample.txt`, `loss.png`,
    `gates.png` and `results.json`.

    Args:
        folder: where to write.
        train_bytes, validation_bytes: of text to learn from and to hold out, about.
        sample_tokens: bytes to write in the sample.
        training: fields of the preset to replace.

    Returns:
        bits a byte of the validation text: "before", "after", "unigram", "xz".

    Raises:
        OSError: this Python has no source files, or something cannot be written.
        ValueError: `folder` holds a run of other settings.
        Interrupted: Ctrl-C while it trains, after a checkpoint was saved.
    """
    folder = Path(folder)
    train_file, validation_file, validation = write_data(folder / "data", train_bytes, validation_bytes)
    size = sum(len(text.encode()) for text in validation)
    print(f"Python's own source files: {train_file.stat().st_size / 1e6:.1f} MB to learn from ({train_file})")
    print(f"{len(validation)} files, {size / 1e3:.0f} kB, held out to measure ({validation_file})\n")

    run = folder / "model"
    config = TrainConfig.load("demo", {"data": str(train_file), "out": str(run), **(training or {})})
    if not (run / f"checkpoint-{config.steps}").exists():
        train(config, resume=(run / "config.yaml").exists())

    model, tokenizer = load_checkpoint(run)
    torch.manual_seed(0)
    fresh = AutoModelForCausalLM.from_config(model.config).to(model.device)
    print(f"\nmeasuring on the {len(validation)} held-out files ...")
    bits = {
        "before": perplexity(fresh, tokenizer, validation).bits_per_byte,
        "after": perplexity(model, tokenizer, validation).bits_per_byte,
        "unigram": unigram_bits(validation),
        "xz": xz_bits(validation),
    }
    print(f"""
bits per byte of the held-out files (fewer is better)
  {bits["before"]:6.3f}  the model before training, fresh weights
  {bits["unigram"]:6.3f}  entropy of the byte frequencies of these very files
  {bits["xz"]:6.3f}  xz -9 on these files joined, with no other text to go by (the model had the training files)
  {bits["after"]:6.3f}  the model after training, each file with an empty memory at its start
""")
    sample = PROMPT + generate_text(model, tokenizer, PROMPT, max_new_tokens=sample_tokens, seed=0)
    print(f"{' it writes ':-^80}\n{sample}\n{'':-^80}\n")
    replace_text(folder / "sample.txt", sample)
    results = {"bits_per_byte": bits, "validation_bytes": size}
    replace_text(folder / "results.json", json.dumps(results, indent=2) + "\n")
    draw_loss(run / "metrics.jsonl", folder / "loss.png", bits)
    excerpt = max(validation, key=len)[:600]
    draw_gates(trace_gates(model, tokenizer, excerpt), folder / "gates.png", title="gates over 600 bytes held out")

    print(f"""In {folder}: loss.png, the loss while it learned; gates.png, what each layer erases, writes and forgets;
sample.txt; results.json; model, the checkpoints. To try next:

  carve generate {run} --prompt "class Reader:" --seed 1
  carve eval {run} {validation_file}
  carve eval {run} {validation_file} --window 32
  carve inspect {run} --file {folder / "sample.txt"} --out {folder / "sample.png"}
""")
    return bits


# -- text --------------------------------------------------------------------------------------------


def standard_library(root: str | os.PathLike[str] | None = None) -> list[tuple[str, str]]:
    """Python's own source files as `(path below root, text)`, in an order that depends on the paths alone.

    Files that are empty or not UTF-8 are left out, and the folders of `LEFT_OUT`.

    Args:
        root: the folder to read; None for the standard library of the running Python.

    Raises:
        OSError: there is no source file: a Python whose standard library was stripped or zipped.
    """
    root = Path(sysconfig.get_path("stdlib") if root is None else root)
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in LEFT_OUT]
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            try:
                text = path.read_bytes().decode("utf-8")
            except UnicodeDecodeError:
                continue
            if text:
                files.append((path.relative_to(root).as_posix(), text))
    if not files:
        raise FileNotFoundError(f"no Python source files in {root}, the standard library of this Python")
    return sorted(files, key=lambda file: hashlib.sha256(file[0].encode()).digest())


def write_data(folder: Path, train_bytes: int, validation_bytes: int) -> tuple[Path, Path, list[str]]:
    """Split the standard library by file and write `train.jsonl` and `validation.jsonl`.

    Files go to validation in order until they hold `validation_bytes`, then to train until they hold `train_bytes`.
    Those of more than a quarter of `validation_bytes` do not validate, or one file would decide the measurement.

    Returns:
        the two paths, and the validation texts.
    """
    parts: dict[str, list[dict[str, str]]] = {"train": [], "validation": []}
    sizes = {"train": 0, "validation": 0}
    for path, text in standard_library():
        length = len(text.encode())
        part = "validation" if sizes["validation"] < validation_bytes and length <= validation_bytes // 4 else "train"
        if part == "validation" or sizes["train"] < train_bytes:
            parts[part].append({"path": path, "text": text})
            sizes[part] += length
    folder.mkdir(parents=True, exist_ok=True)
    paths = {part: folder / f"{part}.jsonl" for part in parts}
    for part, out in paths.items():
        content = "".join(json.dumps(record) + "\n" for record in parts[part])
        # Left alone where nothing changed: a training that goes on need not tokenise its data again.
        if not out.exists() or out.read_text(encoding="utf-8") != content:
            replace_text(out, content)
    return paths["train"], paths["validation"], [record["text"] for record in parts["validation"]]


def unigram_bits(texts: Sequence[str]) -> float:
    """Entropy of the byte frequencies of the texts themselves, in bits a byte: no code of single bytes takes less."""
    counts = Counter("".join(texts).encode())
    total = sum(counts.values())
    return -sum(n / total * math.log2(n / total) for n in counts.values())


def xz_bits(texts: Sequence[str]) -> float:
    """Bits a byte of what `xz -9` makes of the texts, joined in order."""
    joined = "".join(texts).encode()
    return 8 * len(lzma.compress(joined, preset=9)) / len(joined)


# -- the loss curve ----------------------------------------------------------------------------------


def draw_loss(metrics: Path, out: Path, bits: dict[str, float]) -> None:
    """Draw the training loss of a `metrics.jsonl`, in bits a byte, with the levels it can be held against."""
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    points = [(record["step"], record["loss"] / math.log(2)) for record in records if "loss" in record]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    ax = figure.subplots()
    ax.plot(*zip(*points, strict=True), color="tab:blue", linewidth=1.2, label="training batches")
    for name, label, colour in (
        ("unigram", "byte frequencies of the held-out files", "0.6"),
        ("xz", "xz -9 on the held-out files", "tab:orange"),
        ("after", "held-out files after training", "tab:green"),
    ):
        ax.axhline(bits[name], color=colour, linewidth=1, linestyle="--", label=f"{label}: {bits[name]:.3f}")
    ax.set_xlabel("step")
    ax.set_ylabel("bits per byte")
    ax.set_title("CARVE learns Python's own source files")
    ax.set_ylim(bottom=0)
    ax.margins(x=0.01)
    ax.grid(alpha=0.3)
    ax.legend()
    with replacing(out) as partial:
        figure.savefig(partial, format="png")
