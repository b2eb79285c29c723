"""The CARVE layer: projections, short convolution, gates, norm; it calls the op for the recurrence.

    x --> q, k, v projections --> causal convolution, SiLU --> q, k, v ---.
      --> low-rank projection --> decay g                                 |
      --> erase logit e, write logit w                                    +--> op --> norm * gate --> projection
      --> low-rank projection --> output gate ----------------------------|--------------^
                                         content projections -------------'

The layer is that of Gated DeltaNet-2 (arXiv 2605.22791) with one write gate a head in place of one a value,
and the content projections of CARVE (arXiv 2606.27229). `gates` turns the same layer into its rivals, exactly.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from carve.ops import CarveState, chunk_carve, decode_carve, recurrent_carve
from carve.ops.api import check_cu_seqlens
from carve.ops.kernels.layer import convolve
from carve.ops.state import each

DRAFT = 16  # as many tokens at once, behind others, are still a matter of decoding

# What each kind of layer has: an erase gate a channel or a head; a write gate a head or a value, or the
# erase gate's own ("tied"); a decay a channel or a head.
GATES = {
    "carve": {"erase": "channel", "write": "head", "decay": "channel"},
    "carve_value": {"erase": "channel", "write": "value", "decay": "channel"},
    "carve_blind": {"erase": "channel", "write": "head", "decay": "channel"},
    "gdn2": {"erase": "channel", "write": "value", "decay": "channel"},
    "kda": {"erase": "head", "write": "tied", "decay": "channel"},
    "gdn": {"erase": "head", "write": "tied", "decay": "head"},
}
SEEING = ("carve", "carve_value")  # those whose gates see the content


class MixerState(NamedTuple):
    """What N sequences carry from one call of the layer to the next.

    Attributes:
        conv: `[N, conv_size - 1, 2 H K + HV V]`, the last inputs of the convolution, in the model's dtype.
        memory: the state of the op.
        chunk_size: the layer's; a state is of no use to a layer with another.
    """

    conv: Tensor
    memory: CarveState
    chunk_size: int

    def select(self, indices: Tensor) -> "MixerState":
        """The sequences at `indices` (`[M]` int64): to reorder, repeat or drop."""
        conv = self.conv.index_select(0, indices.to(self.conv.device))
        return MixerState(conv, self.memory.select(indices), self.chunk_size)

    def copy(self) -> "MixerState":
        """The same, with a memory of its own; `conv` is shared, which nothing writes into."""
        return MixerState(self.conv, CarveState(*each(contiguous_copy, self.memory)), self.chunk_size)


def contiguous_copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def decodes(x: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Whether a call of the layer behind others takes the path for the next tokens, which knows no gradients."""
    return x.is_cuda and x.shape[1] <= DRAFT and cu_seqlens is None and not torch.is_grad_enabled()


def writable(x: Tensor) -> bool:
    """Whether decoding may write into a tensor: no graph has saved it, it is laid out for it, the mode allows it."""
    if torch.compiler.is_compiling() or x.requires_grad or not x.is_contiguous():  # compiled, one cannot ask the mode
        return False
    return torch.is_inference_mode_enabled() or not x.is_inference()


def set_initial_values(module: Any) -> None:
    """Fill a module's own parameters with its `initial_values()`."""
    with torch.no_grad():
        for name, value in module.initial_values().items():
            getattr(module, name).copy_(value)


class ShortConvolution(nn.Module):
    """Causal depthwise convolution over time, then SiLU.

    Args:
        channels: D.
        size: taps; the last is the token itself.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, size))
        set_initial_values(self)

    def initial_values(self) -> dict[str, Tensor]:
        bound = self.weight.shape[1] ** -0.5
        return {"weight": torch.empty(self.weight.shape).uniform_(-bound, bound)}

    def forward(
        self,
        parts: Sequence[Tensor],
        past: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        output_state: bool = True,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Convolve.

        Args:
            parts: `[B, T, d]` each, with D channels in all.
            past: `[N, size - 1, D]`, the inputs before the first token; None for zeros.
            cu_seqlens: `[N + 1]`, int32 or int64, for N sequences packed into B = 1.
            output_state: also return the last inputs.

        Returns:
            The parts convolved, and the last `size - 1` inputs of each sequence, `[N, size - 1, D]`, or None.
        """
        (B, T), sizes = parts[0].shape[:2], [x.shape[2] for x in parts]
        bounds = None if cu_seqlens is None else Bounds(cu_seqlens, T)
        if past is None and not output_state:
            before, weights = None if bounds is None else bounds.before, self.weight.split(sizes)
            return [convolve(x, w, before) for x, w in zip(parts, weights, strict=True)], None

        # -- each sequence behind the inputs before it --
        x, lags = torch.cat(list(parts), -1), self.weight.shape[1] - 1
        N = B if bounds is None else len(bounds.cu_seqlens) - 1
        past = x.new_zeros(N, lags, x.shape[2]) if past is None else past.to(x.dtype)
        if bounds is None:
            extended = torch.cat([past, x], 1)
            y, last = convolve(extended, self.weight)[:, lags:], extended[:, T:]
        else:
            longer = Bounds(bounds.cu_seqlens + lags * torch.arange(N + 1, device=x.device), T + N * lags)
            places = torch.arange(T, device=x.device) + lags * (bounds.sequence + 1)
            lag = torch.arange(lags, device=x.device)
            firsts = longer.cu_seqlens[:-1].unsqueeze(-1) + lag
            room = x.new_zeros(T + N * lags, x.shape[2])
            extended = room.index_copy(0, places, x[0]).index_copy(0, firsts.flatten(), past.flatten(0, 1))
            y = convolve(extended.unsqueeze(0), self.weight, longer.before)[:, places]
            last = extended[longer.cu_seqlens[1:].unsqueeze(-1) - lags + lag]
        # a view would keep all of x alive
        return list(y.split(sizes, -1)), last.clone(memory_format=torch.contiguous_format) if output_state else None


class Bounds:
    """Where tokens packed into a row of T stand.

    Attributes:
        cu_seqlens: `[N + 1]` int64, on its own device.
        sequence: `[T]` int64, which sequence a token belongs to.
        before: `[T]` int32, how many tokens of it come before.
    """

    def __init__(self, cu_seqlens: Tensor, T: int) -> None:
        self.cu_seqlens = cu_seqlens.to(torch.int64)
        times = torch.arange(T, device=cu_seqlens.device)
        # the last that begins here or before; of a slice, compiled for a GPU, PyTorch 2.11 would lose the beginning
        self.sequence = torch.bucketize(times, self.cu_seqlens, right=True) - 1
        self.before = (times - self.cu_seqlens[self.sequence]).to(torch.int32)


class GatedRMSNorm(nn.Module):
    """RMS norm over the last dimension, times the sigmoid of a gate; float32 inside."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def initial_values(self) -> dict[str, Tensor]:
        return {"weight": torch.ones(self.weight.shape)}

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        normed = F.rms_norm(x.to(wide), self.weight.shape, self.weight.to(wide), self.eps)
        return (normed * gate.to(wide).sigmoid()).to(x.dtype)


class CarveMixer(nn.Module):
    """The CARVE token mixer as a layer.

    Args:
        hidden_size: D, the width of the model.
        num_heads: H, key heads.
        head_dim: K, key dimension of a head.
        num_v_heads: HV, value heads, a multiple of H; None for H.
        v_head_dim: V, value dimension of a head; None for K.
        conv_size: taps of the short convolution over q, k and v.
        gates: `"carve"`; `"carve_value"`, which has a write gate a value; `"carve_blind"`, which sees no content; or
            one of the rivals, which do not either: `"gdn2"` (a write gate a value), `"kda"` (one scalar gate that
            erases and writes), `"gdn"` (the same, and one decay a head).
        content: what the gates see of the memory: `"mean"` (the paper), `"read"` or None; see `carve.ops`.
        content_norm: `"rms"` or None.
        content_rank: R, rank of the content projections.
        content_erase, content_write: which gates see the content; one of the two at least.
        chunk_size: C, tokens in a content chunk.
        allow_neg_eigval: let the erase gate range over (0, 2).
        norm_eps: epsilon of the output norm.

    Parameters whose `_no_weight_decay` is true are not to be decayed.

    Around the op lie many small steps over the whole sequence (convolution, norms, gates). On a GPU,
    `torch.compile(layer)` makes a few of them, in one graph.

    Raises:
        ValueError: an argument is not one of those listed, or the sizes do not fit.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        head_dim: int = 128,
        num_v_heads: int | None = None,
        v_head_dim: int | None = None,
        conv_size: int = 4,
        gates: str = "carve",
        content: str | None = "mean",
        content_norm: str | None = "rms",
        content_rank: int = 16,
        content_erase: bool = True,
        content_write: bool = False,
        chunk_size: int = 64,
        allow_neg_eigval: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        num_v_heads = num_heads if num_v_heads is None else num_v_heads
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        sizes = {"hidden_size": hidden_size, "num_heads": num_heads, "head_dim": head_dim, "v_head_dim": v_head_dim}
        sizes |= {"conv_size": conv_size, "content_rank": content_rank, "chunk_size": chunk_size}
        for name, size in (sizes | {"num_v_heads": num_v_heads}).items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{name} is {size!r}, expected an integer of at least 1")
        if num_v_heads % num_heads:
            raise ValueError(f"num_v_heads is {num_v_heads}, expected a multiple of num_heads = {num_heads}")
        flags = {"content_erase": content_erase, "content_write": content_write, "allow_neg_eigval": allow_neg_eigval}
        for name, flag in flags.items():
            if not isinstance(flag, bool):
                raise ValueError(f"{name} is {flag!r}, expected True or False")
        if not isinstance(norm_eps, (int, float)) or not 0 < norm_eps < math.inf:
            raise ValueError(f"norm_eps is {norm_eps!r}, expected a positive number")
        if gates not in tuple(GATES):
            raise ValueError(f"gates is {gates!r}, expected one of {', '.join(map(repr, GATES))}")
        if content not in ("mean", "read", None):
            raise ValueError(f"content is {content!r}, expected 'mean', 'read' or None")
        if content_norm not in ("rms", None):
            raise ValueError(f"content_norm is {content_norm!r}, expected 'rms' or None")
        if content is not None and not content_erase and not content_write:
            raise ValueError(f"content is {content!r}, but content_erase and content_write are both False")
        self.H, self.HV, self.K, self.V = num_heads, num_v_heads, head_dim, v_head_dim
        self.gates = GATES[gates]
        self.content = content if gates in SEEING else None
        self.content_norm, self.chunk_size, self.allow_neg_eigval = content_norm, chunk_size, allow_neg_eigval

        key_size, value_size = num_heads * head_dim, num_v_heads * v_head_dim
        self.q_proj = nn.Linear(hidden_size, key_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, key_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, value_size, bias=False)
        self.conv = ShortConvolution(2 * key_size + value_size, conv_size)

        decays = key_size if self.gates["decay"] == "channel" else num_heads
        if self.gates["decay"] == "channel":
            low_rank = nn.Linear(hidden_size, v_head_dim, bias=False)
            self.decay_proj: nn.Module = nn.Sequential(low_rank, nn.Linear(v_head_dim, decays, bias=False))
        else:
            self.decay_proj = nn.Linear(hidden_size, decays, bias=False)
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.dt_bias = nn.Parameter(torch.empty(decays))
        erases = key_size if self.gates["erase"] == "channel" else num_v_heads
        self.erase_proj = nn.Linear(hidden_size, erases, bias=False)
        writes = {"head": num_v_heads, "value": value_size, "tied": None}[self.gates["write"]]
        self.write_proj = None if writes is None else nn.Linear(hidden_size, writes, bias=False)

        if self.content is None:
            self.p_down = self.p_up = self.p_write = None
        else:
            self.p_down = nn.Parameter(torch.empty(num_v_heads, v_head_dim, content_rank))
            self.p_up = nn.Parameter(torch.empty(num_v_heads, content_rank, head_dim)) if content_erase else None
            self.p_write = nn.Parameter(torch.empty(num_v_heads, content_rank)) if content_write else None

        self.gate_proj = nn.Sequential(
            nn.Linear(hidden_size, v_head_dim, bias=False), nn.Linear(v_head_dim, value_size, bias=True)
        )
        self.norm = GatedRMSNorm(v_head_dim, norm_eps)
        self.o_proj = nn.Linear(value_size, hidden_size, bias=False)
        set_initial_values(self)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Mark the decay's parameters, also those that loading a checkpoint puts in place of the first."""
        super().register_parameter(name, param)
        self.mark_parameters()

    def mark_parameters(self) -> None:
        for name in ("A_log", "dt_bias"):
            if name in self._parameters:
                self._parameters[name]._no_weight_decay = True  # type: ignore[union-attr]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.mark_parameters()  # copy.deepcopy drops the marks

    def _apply(self, *args: Any, **kwargs: Any) -> "CarveMixer":
        super()._apply(*args, **kwargs)
        self.mark_parameters()  # to_empty, behind a start on the meta device, makes new parameters
        return self

    def initial_values(self) -> dict[str, Tensor]:
        """Initial values of the layer's own parameters, those of its submodules left out.

        Decay as in Mamba-2 and Gated DeltaNet: rates A uniform in [1, 16], steps log-uniform in [0.001, 0.1].
        The content starts unheard: p_up and p_write are zero.
        """
        dt = torch.empty(self.dt_bias.shape).uniform_(math.log(0.001), math.log(0.1)).exp()
        values = {
            "A_log": torch.empty(self.A_log.shape).uniform_(1, 16).log(),
            "dt_bias": dt + torch.log(-torch.expm1(-dt)),  # the inverse of softplus
        }
        if self.p_down is not None:
            with torch.random.fork_rng(devices=[]):  # a layer without content draws the same numbers for all else
                seed = int(torch.randint(2**62, (), device="cpu"))
            generator = torch.Generator().manual_seed(seed)
            p_down = torch.empty(self.p_down.shape, device="cpu")
            values["p_down"] = p_down.normal_(0, self.V**-0.5, generator=generator)
        if self.p_up is not None:
            values["p_up"] = torch.zeros(self.p_up.shape)
        if self.p_write is not None:
            values["p_write"] = torch.zeros(self.p_write.shape)
        return values

    def log_decay(self, step: Tensor) -> Tensor:
        """g `[B, T, H, K or 1]` from the step that the token asks for, `[B, T, H K or H]`."""
        wide = torch.promote_types(step.dtype, torch.float32)  # bfloat16 would round a weak decay to none
        dt = F.softplus(step + self.dt_bias.to(wide))
        return -self.A_log.to(wide).exp().unsqueeze(-1) * dt.unflatten(-1, (self.H, -1))

    def project(
        self, x: Tensor, past: Tensor | None = None, cu_seqlens: Tensor | None = None, output_state: bool = True
    ) -> tuple[dict[str, Any], Tensor | None]:
        """The arguments of the op, by name, and what the convolution returns; arguments as there and in `forward`."""
        B, T, _ = x.shape
        H, HV, K, V = self.H, self.HV, self.K, self.V
        cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(x.device)
        parts = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        (q, k, v), last = self.conv(parts, past, cu_seqlens, output_state)
        q, k, v = q.unflatten(-1, (H, K)), k.unflatten(-1, (H, K)), v.unflatten(-1, (HV, V))

        g, e = self.log_decay(self.decay_proj(x)), self.erase_proj(x)
        if self.gates["erase"] == "channel":
            e, w = e.view(B, T, H, K), None
        else:
            e, w = e.view(B, T, HV, 1).expand(B, T, HV, K), e
        if self.write_proj is not None:
            w = self.write_proj(x)
        if self.gates["write"] == "value":
            assert w is not None
            v, w = w.sigmoid().view(v.shape) * v, None
            if self.p_write is not None:  # what the content brings is a factor, the same for all values and 1 at first
                v, w = 2 * v, x.new_zeros(B, T, HV)

        op = {"q": q, "k": k, "v": v, "g": g.expand(B, T, H, K), "e": e, "w": w, "qk_l2norm": True}
        op.update(chunk_size=self.chunk_size, allow_neg_eigval=self.allow_neg_eigval)
        if self.content is not None:
            op.update(p_down=self.p_down, p_up=self.p_up, p_write=self.p_write)
            op.update(content=self.content, content_norm=self.content_norm)
        return op, last

    def forward(
        self,
        x: Tensor,
        state: MixerState | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        output_state: bool = True,
        in_place: bool = False,
    ) -> tuple[Tensor, MixerState | None]:
        """Mix.

        Args:
            x: `[B, T, D]`.
            state: of the N sequences, from an earlier call; None at their start.
            cu_seqlens: `[N + 1]`, int32 or int64, for N sequences packed into B = 1.
            output_state: also return the state behind the last tokens; training needs none.
            in_place: the state given is used up: decoding may write the new one into it.

        Returns:
            y `[B, T, D]`, and the state of the N sequences after their last tokens, or None.

        Raises:
            ValueError: x, the state or cu_seqlens do not fit.
        """
        D = self.q_proj.in_features
        if x.dim() != 3 or x.shape[2] != D:
            raise ValueError(f"x has shape {list(x.shape)}, expected [B, T, D] with D = {D}")
        N = x.shape[0]
        if cu_seqlens is not None:
            N = len(check_cu_seqlens(cu_seqlens, *x.shape[:2])) - 1
        if state is not None:
            self.check_state(state, N)
        past, memory = (None, None) if state is None else (state.conv, state.memory)
        op, last = self.project(x, past, cu_seqlens, output_state)
        if memory is not None and decodes(x, cu_seqlens):
            if not in_place or not all(writable(y) for y in memory if y is not None):
                memory = CarveState(*each(contiguous_copy, memory))
            o = decode_carve(**op, state=memory)
        else:
            run = recurrent_carve if x.shape[1] == 1 else chunk_carve
            o, memory = run(**op, initial_state=memory, output_final_state=output_state, cu_seqlens=cu_seqlens)
        y = self.o_proj(self.norm(o, self.gate_proj(x).view(o.shape)).flatten(2))
        if not output_state:
            return y, None
        assert last is not None
        assert memory is not None
        return y, MixerState(last, memory, self.chunk_size)

    def check_state(self, state: MixerState, N: int) -> None:
        """Raise ValueError unless the state is of N sequences and this layer's sizes; the op checks the memory."""
        if not isinstance(state, MixerState):
            raise ValueError(f"state is {type(state).__name__}, expected the MixerState of an earlier call")
        if state.chunk_size != self.chunk_size:
            raise ValueError(f"state is from a layer of chunk_size {state.chunk_size}, expected {self.chunk_size}")
        if len(state.conv) != N:
            raise ValueError(f"state is of {len(state.conv)} sequences, expected {N}")
        channels, size = self.conv.weight.shape
        if state.conv.shape[1:] != (size - 1, channels):
            raise ValueError(
                f"state.conv has shape {list(state.conv.shape)}, expected [N, conv_size - 1, 2 H K + HV V] = "
                f"{[N, size - 1, channels]}: it is from a layer of other sizes"
            )
