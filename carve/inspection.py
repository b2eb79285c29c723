"""What each layer and head of a model erases, writes and forgets over a text, as numbers and as a picture."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from carve.extras import need
from carve.files import check_parent, replacing
from carve.mixer import CarveMixer
from carve.models.checkpoint import load_checkpoint
from carve.models.configuration_carve import check_positions
from carve.ops import carve_gates

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS_DRAWN = 512
"""Steps of time that a picture resolves; a longer text is averaged into this many."""
TOKENS_SPELT = 48
"""The longest text whose tokens are written under the picture."""


@dataclass(frozen=True)
class LayerGates:
    """The gates of one recurrent layer. All arrays are float32; means over key channels have `[T, HV]`.

    Attributes:
        index: of the layer in the model, from 0.
        layer_type: as in `CarveConfig.layer_types`.
        erase: `b`, mean over key channels: the share of what is held under the key that is erased.
        erase_spread: standard deviation of `b` over the key channels; 0 where one gate serves the whole head.
        write: `a`; where the write gate has one number a value, the mean over values.
        keep: `exp(g)`, mean over key channels: the share of memory that outlives the token.
        erase_shift: `|b - b without content|`, mean over key channels; None in a layer without content.
        write_shift: `|a - a without content|`; None where the write gate does not see the content. Of a "carve_value"
            layer, by how much the content moves half the factor that it puts on the values, from 0.5.
        same: `[HV]`, of what the content adds to the erase logits, the share (of its mean square) that is the same for
            every token: no more than a bias. None without content, or if no token sees any.
        beside: `[HV]`, the standard deviation over tokens of what it adds, over that of the token's own logits.
    """

    index: int
    layer_type: str
    erase: np.ndarray
    erase_spread: np.ndarray
    write: np.ndarray
    keep: np.ndarray
    erase_shift: np.ndarray | None
    write_shift: np.ndarray | None
    same: np.ndarray | None
    beside: np.ndarray | None


@dataclass(frozen=True)
class GateTrace:
    """The gates of a model over a text.

    Attributes:
        tokens: the T tokens, spelt out.
        surprise: `[T]`, `-log2 p(token | those before)`, in bits; NaN for a first token that nothing comes before.
        layers: the recurrent layers.
        skipped: the index and type of every layer without such gates (attention).
        erase_limit: the largest value that `erase` can take, 1 or 2.
        content_from: index of the first token whose gates see the content: the first one of the second chunk.
    """

    tokens: list[str]
    surprise: np.ndarray
    layers: list[LayerGates]
    skipped: list[tuple[int, str]]
    erase_limit: float
    content_from: int


def inspect_checkpoint(checkpoint: str | os.PathLike[str], text: str, out: str | os.PathLike[str]) -> None:
    """Draw the gates of the model in a checkpoint folder over a text; says on stdout what it drew and what it left out.

    Raises:
        OSError, ValueError, ImportError: as `load_checkpoint`, `trace_gates` and `draw_gates`.
    """
    check_parent(out)
    if Path(out).is_dir() or Path(out).suffix.lower() != ".png":
        raise ValueError(f"out is {os.fspath(out)}, expected the name of a picture, ending in .png")
    need("matplotlib", "drawing")
    trace = trace_gates(*load_checkpoint(checkpoint), text)
    draw_gates(trace, out, title=f"{os.fspath(checkpoint)} over {len(trace.tokens):,} tokens")
    for index, kind in trace.skipped:
        print(f"left out layer {index}: {kind} has no such gates")
    for layer in trace.layers:
        if layer.same is not None and layer.beside is not None:
            same, beside = (", ".join(f"{y:.0%}" for y in x) for x in (layer.same, layer.beside))
            print(
                f"layer {layer.index}, by head: {same} of what the content adds to the erase logits is the same for "
                f"every token; it varies {beside} as much as the token's own logits"
            )
    print(f"wrote {os.fspath(out)}: {len(trace.layers)} layers, {len(trace.tokens):,} tokens")


def trace_gates(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> GateTrace:
    """Run a text through a model and record the gates of its recurrent layers.

    The text follows the BOS token where the tokenizer has one, as in training; the trace leaves that token out.
    The gates come from the token-by-token recurrence: time and memory grow with the text, so give it
    thousands of tokens at most.

    Raises:
        ValueError: an empty text, one of more tokens than full attention has positions for, or no recurrent layers.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise ValueError("the text to inspect is empty: give at least one token")
    mixers = {name: module for name, module in model.named_modules() if isinstance(module, CarveMixer)}
    if not mixers:
        raise ValueError("the model has no recurrent layer to inspect, only attention")
    first = 0 if tokenizer.bos_token_id is None else 1
    check_positions(model.config, first + len(ids))
    row = torch.tensor([[tokenizer.bos_token_id] * first + ids], device=model.device)  # [1, T]

    inputs: dict[str, torch.Tensor] = {}

    def remember(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            inputs[name] = args[0].detach()

        return hook

    was_training = model.training
    model.eval()
    hooks = [module.register_forward_pre_hook(remember(name)) for name, module in mixers.items()]
    try:
        with torch.inference_mode():
            logits = model(row).logits[0].float()
            nats = F.cross_entropy(logits[:-1], row[0, 1:], reduction="none")
            types = model.config.layer_types
            layers = [
                _layer_gates(index, types[index], mixer, inputs[name], first)
                for name, mixer in mixers.items()
                for index in [next(int(part) for part in name.split(".") if part.isdecimal())]
            ]
    finally:
        for handle in hooks:
            handle.remove()
        model.train(was_training)

    surprise = nats.double().cpu().numpy() / np.log(2)
    recurrent = {layer.index for layer in layers}
    return GateTrace(
        tokens=[str(tokenizer.decode([i])) for i in ids],
        surprise=surprise if first else np.concatenate([[np.nan], surprise]),
        layers=layers,
        skipped=[(i, kind) for i, kind in enumerate(types) if i not in recurrent],
        erase_limit=2.0 if any(mixer.allow_neg_eigval for mixer in mixers.values()) else 1.0,
        content_from=model.config.chunk_size - first,
    )


def _layer_gates(index: int, layer_type: str, mixer: CarveMixer, x: torch.Tensor, first: int) -> LayerGates:
    """The gates from the layer's input `[1, T, D]`, less the `first` tokens of it."""
    op, _ = mixer.project(x)
    b, a, b_blind, a_blind = carve_gates(**op)  # b [1, T, HV, K], a [1, T, HV]
    write = a
    if mixer.gates["write"] == "value":  # which the layer has put on v: the op has the content's factor alone, if that
        assert mixer.write_proj is not None
        values = mixer.write_proj(x).sigmoid().view(op["v"].shape)
        write = values if a is None else 2 * a.unsqueeze(-1) * values  # [1, T, HV, V]
    assert write is not None
    keep = op["g"].exp().repeat_interleave(b.shape[2] // op["g"].shape[2], dim=2)  # [1, T, HV, K]

    def array(y: torch.Tensor) -> np.ndarray:
        return (y.mean(-1) if y.dim() == 4 else y)[0, first:].float().cpu().numpy()

    same = beside = None
    if mixer.p_down is not None and x.shape[1] > mixer.chunk_size:
        seeing, blind = (y[0, mixer.chunk_size :].double() / (1 + mixer.allow_neg_eigval) for y in (b, b_blind))
        own = torch.logit(blind, 1e-6)  # [T - C, HV, K]
        added = torch.logit(seeing, 1e-6) - own
        same = share(added.mean(0).square().sum(-1), added.square().mean(0).sum(-1))
        beside = share(*(y.var(0, correction=0).sum(-1).sqrt() for y in (added, own)))
    return LayerGates(
        index=index,
        layer_type=layer_type,
        erase=array(b),
        erase_spread=array(b.std(-1, correction=0)),
        write=array(write),
        keep=array(keep),
        erase_shift=None if mixer.p_down is None else array((b - b_blind).abs()),
        write_shift=None if mixer.p_write is None or a is None or a_blind is None else array((a - a_blind).abs()),
        same=same,
        beside=beside,
    )


def share(part: torch.Tensor, whole: torch.Tensor) -> np.ndarray:
    """part / whole, 0 of nothing."""
    return torch.where(part > 0, part / whole, 0).float().cpu().numpy()


# -- the picture -------------------------------------------------------------------------------------


def draw_gates(trace: GateTrace, out: str | os.PathLike[str], *, title: str = "") -> None:
    """Draw a trace as a PNG: a row for each layer, a column for each kind of gate, heads against time.

    A text of more than 512 tokens is averaged into 512 steps. The surprise of the model heads every column, to tell
    what the gates follow. The file appears under its name only when it is complete.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    need("matplotlib", "drawing")
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    layers, T = trace.layers, len(trace.tokens)
    forgotten = [1 - layer.keep for layer in layers]
    # Decay differs by orders of magnitude between heads: what matters is how near exp(g) is to 1.
    low = max(1e-4, min(float(np.quantile(x, 0.02)) for x in forgotten))
    high = max(10 * low, max(float(np.quantile(x, 0.98)) for x in forgotten))
    spread = [x.erase_spread for x in layers]
    columns: list[tuple[str, str, list[Any], Any, str]] = [
        ("erase gate b", "mean over key channels", [x.erase for x in layers], Normalize(0, trace.erase_limit), "magma"),
        ("spread of b", "standard deviation over key channels", spread, Normalize(0, _largest(spread)), "magma"),
        ("write gate a", "a, mean over values if one each", [x.write for x in layers], Normalize(0, 1), "viridis"),
        ("decay exp(g)", "mean over key channels (log scale of 1 - exp g)", forgotten, LogNorm(low, high), "cividis_r"),
    ]
    heard = f"from token {trace.content_from + 1} on, the second chunk"
    if trace.content_from >= T:
        heard = f"which begins at token {trace.content_from + 1}: this text is too short"
    for gate, name, arrays in (
        ("b", "erase", [x.erase_shift for x in layers]),
        ("a", "write", [x.write_shift for x in layers]),
    ):
        if any(x is not None for x in arrays):
            meaning = f"|{gate} - {gate} without content|, {heard}"
            columns.append(
                (f"{name} gate moved by content", meaning, arrays, Normalize(0, _largest(arrays)), "inferno")
            )

    lines = [title or "gates over the text"]
    for kind in sorted({kind for _, kind in trace.skipped}):
        indices = ", ".join(str(i) for i, other in trace.skipped if other == kind)
        lines.append(f"not shown, for they have no such gates: {kind} layers {indices}")

    # All in inches. Placed by hand: with 24 layers matplotlib's own layout takes ten times as long as the drawing.
    heads = layers[0].erase.shape[1]
    row = min(1.6, max(1.0 if len(layers) <= 6 else 0.65, 0.16 * heads))
    width = max(3.7, 0.115 * T) if T <= TOKENS_SPELT else 3.7
    left, gap, top, surprise = 0.8, 0.08, 0.45 + 0.2 * len(lines), 0.6
    below = 0.7 if T > TOKENS_SPELT else 0.95  # room for the tokens, then the colour bar
    total_width = left + (width + 0.4) * len(columns)
    total_height = top + surprise + (row + gap) * len(layers) + below + 0.5
    figure = Figure(figsize=(total_width, total_height), dpi=110)
    figure.text(0.5, 1 - 0.1 / total_height, "\n".join(lines), fontsize=11, ha="center", va="top", parse_math=False)

    def place(column: int, down: float, height: float) -> "Axes":
        x = left + (width + 0.4) * column
        y = total_height - down - height
        return figure.add_axes((x / total_width, y / total_height, width / total_width, height / total_height))

    for j, (name, meaning, arrays, norm, colours) in enumerate(columns):
        _draw_surprise(place(j, top, surprise), trace, name, labelled=j == 0)
        image = None
        for i, (layer, array) in enumerate(zip(layers, arrays, strict=True), start=1):
            ax = place(j, top + surprise + gap * i + row * (i - 1), row)
            if array is None:
                note = f"not in a {layer.layer_type} layer"
                ax.text(0.5, 0.5, note, ha="center", va="center", transform=ax.transAxes, color="0.4", fontsize=8)
                ax.set_yticks([])
            else:
                extent = (0.5, T + 0.5, heads - 0.5, -0.5)
                values = np.clip(_averaged(array).T, norm.vmin, norm.vmax)
                image = ax.imshow(
                    values, aspect="auto", extent=extent, interpolation="nearest", norm=norm, cmap=colours
                )
                ax.set_yticks(range(heads) if heads <= 4 else [0, heads - 1])
            ax.tick_params(labelsize=7)
            ax.set_xlim(0.5, T + 0.5)
            if j == 0:
                ax.set_ylabel(f"layer {layer.index}\n{layer.layer_type}\nhead", fontsize=8)
            if i < len(layers):
                ax.set_xticks([])
            else:
                _label_time(ax, trace.tokens)
        if image is None:
            continue
        bar = place(j, total_height - 0.5 - 0.12, 0.12)
        figure.colorbar(image, cax=bar, orientation="horizontal")
        bar.set_xlabel(meaning, fontsize=8)
        bar.tick_params(labelsize=8)
        if name == "decay exp(g)":
            ticks = [x for x in (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.9) if low <= x <= high]
            bar.xaxis.set_minor_locator(NullLocator())
            bar.set_xticks(ticks, [f"{1 - x:.4g}" for x in ticks])

    with replacing(out) as partial:
        figure.savefig(partial, format="png")


def _largest(arrays: Sequence[np.ndarray | None]) -> float:
    """The top of a scale of its own, for what is far smaller than a gate."""
    return max(1e-3, *(float(np.quantile(x, 0.995)) for x in arrays if x is not None))


def _draw_surprise(ax: "Axes", trace: GateTrace, name: str, *, labelled: bool) -> None:
    T = len(trace.tokens)
    values = _averaged(np.nan_to_num(trace.surprise))
    ax.fill_between(np.linspace(1, T, len(values)), values, step="mid", color="0.55", linewidth=0)
    ax.set_xlim(0.5, T + 0.5)
    ax.set_ylim(bottom=0)
    ax.set_xticks([])
    ax.tick_params(labelsize=7)
    ax.set_title(name, fontsize=11)
    if labelled:
        ax.set_ylabel("surprise\nbits/token", fontsize=8)


def _averaged(x: np.ndarray) -> np.ndarray:
    """`[T, ...]` averaged over runs of time into at most COLUMNS_DRAWN steps."""
    if len(x) <= COLUMNS_DRAWN:
        return x
    edges = np.linspace(0, len(x), COLUMNS_DRAWN + 1).astype(int)
    return np.stack([x[i:j].mean(axis=0) for i, j in pairwise(edges)])


def _label_time(ax: "Axes", tokens: list[str]) -> None:
    if len(tokens) > TOKENS_SPELT:
        ax.set_xlabel("token", fontsize=8)
        return
    spelt = [t.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") for t in tokens]
    turned = 90 if max(map(len, spelt)) > 1 else 0
    ax.set_xticks(range(1, len(tokens) + 1), spelt, fontsize=7, rotation=turned, family="monospace", parse_math=False)
    ax.set_xlabel("token", fontsize=8)
