"""The public op: checks and the choice of a backend. No arithmetic here.

`torch.compile` traces all of it but the plain torch path, which it leaves alone. So checks look at shapes, dtypes and
devices only, and those of values stand apart.
"""

from collections.abc import Iterable
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.weak import WeakTensorKeyDictionary

from carve.ops.chunked import chunked
from carve.ops.kernels import cuda, portable
from carve.ops.recurrence import Options, Projections, Tokens, recurrent, recurrent_packed
from carve.ops.slow import say_slow
from carve.ops.state import CarveState, each

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PATHS: dict[str, Any] = {"cuda": cuda, "triton": portable}  # faster than plain torch, the fastest first


class NotFinite(FloatingPointError, ValueError):
    """A value that should be finite is not: of an argument, or of a model that has diverged."""


class CarveGates(NamedTuple):
    """The gates of every token, and what they would be without the content term.

    Attributes:
        b: erase gate, `[B, T, HV, K]`, in (0, 1), or (0, 2) with `allow_neg_eigval`.
        a: write gate, `[B, T, HV]`, in (0, 1); None if w is None.
        b_blind, a_blind: the same with the content term left out.
    """

    b: Tensor
    a: Tensor | None
    b_blind: Tensor
    a_blind: Tensor | None


def chunk_carve(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    e: Tensor,
    w: Tensor | None = None,
    p_down: Tensor | None = None,
    p_up: Tensor | None = None,
    p_write: Tensor | None = None,
    *,
    content: str = "mean",
    content_norm: str | None = None,
    chunk_size: int = 64,
    scale: float | None = None,
    qk_l2norm: bool = False,
    allow_neg_eigval: bool = False,
    initial_state: CarveState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, CarveState | None]:
    """CARVE by chunks: for training and for prompts. Arithmetic and state are float32 (float64 for float64 inputs).

    Args:
        q: queries, `[B, T, H, K]`, any float dtype.
        k: keys, `[B, T, H, K]`, any float dtype, of unit L2 norm over K unless `qk_l2norm`. With erase gates in (0, s),
            norms above sqrt(2 / s) would make what is erased grow instead: an error (checked on a CPU only).
        v: values, `[B, T, HV, V]`, any float dtype; HV a multiple of H.
        g: log-decay (natural log), `[B, T, H, K]` or `[B, T, HV, K]`, finite and <= 0 (checked on a CPU only).
        e: erase-gate logit from the token, `[B, T, H, K]` or `[B, T, HV, K]`.
        w: write-gate logit, `[B, T, HV]`; None for a write gate of 1.
        p_down: content projection, first factor, `[HV, V, R]`; None for the memory-blind op.
        p_up: content projection to the erase gate, `[HV, R, K]`.
        p_write: content projection to the write gate, `[HV, R]`; needs w.
        content: what the gates see of the memory. `"mean"` (the paper): the mean output of the chunk before;
            `"read"`: what the memory at the start of the chunk holds under the token's key.
        content_norm: None, or `"rms"` to bring the R numbers of the projected content to unit mean square.
        chunk_size: tokens in a content chunk, C >= 1, counted from the start of each sequence.
        scale: factor on the outputs; None for K^-0.5.
        qk_l2norm: divide q and k by their L2 norm over K first.
        allow_neg_eigval: let the erase gate range over (0, 2) in place of (0, 1).
        initial_state: the state before the first token, from a call with the same shapes and options. On a GPU a
            position that is not below chunk_size ends the process with an assertion on the device.
        output_final_state: also return the state after the last token.
        cu_seqlens: `[N + 1]` int32 or int64, for N sequences packed into B = 1: sequence n is tokens
            cu_seqlens[n] to cu_seqlens[n + 1]. Starts at 0, never decreases, ends at T. One on a GPU is read once,
            which waits for the GPU, or never where nothing can be read (`torch.compile`, capture of a CUDA graph):
            there boundaries that do not fit end the process with an assertion on the device.
        backend: `"cuda"` for fused kernels (K and V of 64 or 128, bf16 or fp16, R of at most 16), `"triton"` for
            portable ones (K and V multiples of 16 up to 256; float32 too; R of at most 64), `"torch"`, or `"auto"` for
            the fastest that serves the inputs. On a GPU "auto" warns, once a reason, where that is not "cuda"; the
            environment variable CARVE_STRICT=1 makes it an error.

    Returns:
        o `[B, T, HV, V]` in v's dtype, and the final state or None.

    Raises:
        ValueError: an argument does not fit, or the backend named does not serve the inputs; the message names it,
            what it is and what was expected.
        RuntimeError: the kernels of the backend named could not be compiled; the message holds the compiler's log.
        NotImplementedError: a second derivative was asked for, or a forward-mode one. (Plain torch raises RuntimeError
            for transforms of torch.func: its functions know none.)

    For a CUDA graph, run once before the capture: kernels are compiled and loaded at first use.

    Source: arXiv 2606.27229; the recurrence is in `carve/ops/recurrence.py`.
    """
    tokens, p = Tokens(q, k, v, g, e, w), Projections(p_down, p_up, p_write)
    N = check_tokens(tokens, cu_seqlens)
    options = check_options(tokens, p, content, content_norm, chunk_size, scale, qk_l2norm, allow_neg_eigval)
    check_state(initial_state, tokens, p, options, N)
    path = choose_backend(backend, PATHS, tokens, p, options, initial_state, N)
    if path != "torch":
        return run_kernels(path, tokens, p, initial_state, options, cu_seqlens, output_final_state)
    o, state = chunk_in_torch(tokens, p, initial_state, options, cu_seqlens)
    return o, state if output_final_state else None


def run_kernels(
    path: str,
    x: Tokens,
    p: Projections,
    state: CarveState | None,
    options: Options,
    cu_seqlens: Tensor | None,
    final: bool,
) -> tuple[Tensor, CarveState | None]:
    """`chunk_carve` by one of `PATHS`."""
    check_no_tangents(f"backend {path!r}", [*x, *p, *(state or ())])
    if state is not None:
        check_position(state.position, options.chunk_size)
    return PATHS[path].fused(x, cast(p, options), state, options, cu_seqlens, final)


def check_no_tangents(what: str, tensors: Iterable[Tensor | None]) -> None:
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(y is not None and forward_ad.unpack_dual(y).tangent is not None for y in tensors):
        raise NotImplementedError(f"{what} has no forward-mode derivative (jvp), expected reverse mode")


@torch.compiler.disable
def chunk_in_torch(
    x: Tokens, p: Projections, state: CarveState | None, options: Options, cu_seqlens: Tensor | None
) -> tuple[Tensor, CarveState]:
    """`chunk_carve` by the plain torch path."""
    lengths = find_lengths(x, cu_seqlens)
    state = check_values(x, p, state, options, len(lengths))
    return chunked(x, cast(p, options), state, options, lengths)


def recurrent_carve(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    e: Tensor,
    w: Tensor | None = None,
    p_down: Tensor | None = None,
    p_up: Tensor | None = None,
    p_write: Tensor | None = None,
    *,
    content: str = "mean",
    content_norm: str | None = None,
    chunk_size: int = 64,
    scale: float | None = None,
    qk_l2norm: bool = False,
    allow_neg_eigval: bool = False,
    initial_state: CarveState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, CarveState | None]:
    """CARVE token by token: the definition, and the decode step. Arguments and results as in `chunk_carve`."""
    tokens, p = Tokens(q, k, v, g, e, w), Projections(p_down, p_up, p_write)
    N = check_tokens(tokens, cu_seqlens)
    options = check_options(tokens, p, content, content_norm, chunk_size, scale, qk_l2norm, allow_neg_eigval)
    check_state(initial_state, tokens, p, options, N)
    path = choose_backend(backend, PATHS, tokens, p, options, initial_state, N)
    if path != "torch":
        return run_kernels(path, tokens, p, initial_state, options, cu_seqlens, output_final_state)
    o, state = recur_in_torch(tokens, p, initial_state, options, cu_seqlens)
    return o, state if output_final_state else None


@torch.compiler.disable
def recur_in_torch(
    x: Tokens, p: Projections, state: CarveState | None, options: Options, cu_seqlens: Tensor | None
) -> tuple[Tensor, CarveState]:
    """`recurrent_carve` by the plain torch path; the state that it returns is nobody else's."""
    lengths = find_lengths(x, cu_seqlens)
    begin = state = check_values(x, p, state, options, len(lengths))
    with torch.autocast(x.v.device.type, enabled=False):
        if cu_seqlens is None:
            o, state = recurrent(x, cast(p, options), state, options)
        else:
            o, state = recurrent_packed(x, cast(p, options), state, options, lengths)
    own = [y.clone() if y is not None and y is was else y for y, was in zip(state, begin, strict=True)]
    return o.to(x.v.dtype), CarveState(*own)  # type: ignore[arg-type]


def carve_gates(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    e: Tensor,
    w: Tensor | None = None,
    p_down: Tensor | None = None,
    p_up: Tensor | None = None,
    p_write: Tensor | None = None,
    *,
    content: str = "mean",
    content_norm: str | None = None,
    chunk_size: int = 64,
    scale: float | None = None,
    qk_l2norm: bool = False,
    allow_neg_eigval: bool = False,
) -> CarveGates:
    """The gates that `recurrent_carve` applies to each token, for inspection. Arguments as in `chunk_carve`."""
    tokens, p = Tokens(q, k, v, g, e, w), Projections(p_down, p_up, p_write)
    N = check_tokens(tokens, None)
    options = check_options(tokens, p, content, content_norm, chunk_size, scale, qk_l2norm, allow_neg_eigval)
    state = check_values(tokens, p, None, options, N)
    trace: list[CarveGates] = []
    with torch.no_grad(), torch.autocast(v.device.type, enabled=False):
        recurrent(tokens, cast(p, options), state, options, trace)
    if not trace:
        (B, _, HV, _), K = v.shape, q.shape[3]
        b = v.new_zeros(B, 0, HV, K, dtype=options.dtype)
        return CarveGates(b, None if w is None else b[..., 0], b, None if w is None else b[..., 0])
    columns = (None if column[0] is None else column for column in zip(*trace, strict=True))
    b, a, b_blind, a_blind = each(lambda x: torch.cat(x, 2).transpose(1, 2), columns)
    return CarveGates(b, None if a is None else a.squeeze(-1), b_blind, None if a is None else a_blind.squeeze(-1))


def cast(p: Projections, options: Options) -> Projections:
    return Projections(*each(lambda x: x.to(options.dtype), p))


def expect(name: str, x: Tensor, expected: dict[str, tuple[int, ...]]) -> None:
    """Raise unless the shape of x is one of those expected (by their symbolic names)."""
    if all(x.shape != shape for shape in expected.values()):
        wanted = " or ".join(f"{symbols} = {list(shape)}" for symbols, shape in expected.items())
        raise ValueError(f"{name} has shape {list(x.shape)}, expected {wanted}")


def check_tensor(name: str, x: object, device: torch.device, dtypes: tuple[torch.dtype, ...] = DTYPES) -> None:
    """Raise unless x is a tensor of one of the dtypes on the device."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} is {type(x).__name__}, expected a tensor")
    if x.dtype not in dtypes:
        raise ValueError(f"{name} has dtype {x.dtype}, expected {' or '.join(map(str, dtypes))}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, expected {device} like q")


def check_tokens(x: Tokens, cu_seqlens: Tensor | None) -> int:
    """Raise unless the inputs fit each other; returns N, the number of sequences."""
    for name, y in zip(Tokens._fields, x, strict=True):
        if y is None and name == "w":
            continue
        check_tensor(name, y, x.q.device if isinstance(x.q, Tensor) else torch.device("cpu"))
    for name in ("q", "v"):
        y = getattr(x, name)
        if y.dim() != 4:
            raise ValueError(f"{name} has shape {list(y.shape)}, expected 4 dimensions: [B, T, heads, head dim]")
    B, T, H, K = x.q.shape
    HV, V = x.v.shape[2:]
    if H < 1 or K < 1 or HV < 1 or V < 1:
        raise ValueError(f"q has shape {list(x.q.shape)} and v {list(x.v.shape)}, expected H, K, HV, V of at least 1")
    if HV % H:
        raise ValueError(f"v has HV = {HV} heads, expected a multiple of q's H = {H}")
    expect("v", x.v, {"[B, T, HV, V]": (B, T, HV, V)})
    expect("k", x.k, {"[B, T, H, K]": (B, T, H, K)})
    for name in ("g", "e"):
        expect(name, getattr(x, name), {"[B, T, H, K]": (B, T, H, K), "[B, T, HV, K]": (B, T, HV, K)})
    if x.w is not None:
        expect("w", x.w, {"[B, T, HV]": (B, T, HV)})
    return B if cu_seqlens is None else len(check_cu_seqlens(cu_seqlens, B, T)) - 1


BOUNDS: Any = WeakTensorKeyDictionary()  # of each cu_seqlens on a GPU that was read: its version, and its values


def check_cu_seqlens(cu_seqlens: Tensor, B: int, T: int) -> Tensor:
    """Raise unless these are boundaries of sequences packed into one row of T tokens; returns them in int64.

    Reading a tensor on a GPU waits for the GPU, so it is read once, and again only when it was changed in place. The
    values are returned on the CPU, but where they cannot be read (`torch.compile`, capture of a CUDA graph) on their
    own device: there the check runs with the rest, and boundaries that do not fit end the process.
    """
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        found = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise ValueError(f"cu_seqlens is {found}, expected an int32 or int64 tensor")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens has shape {list(cu_seqlens.shape)}, expected [N + 1] with N >= 1")
    if B != 1:
        raise ValueError(f"cu_seqlens needs packed sequences with B = 1, but there are B = {B} rows")
    if torch.compiler.is_compiling() or (cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing()):
        bounds = cu_seqlens.detach().long()
        fits = (bounds[0] == 0) & (bounds[-1] == T) & (bounds.diff() >= 0).all()
        torch._assert_async(fits, "cu_seqlens must start at 0, never decrease and end at T")
        return bounds
    bounds = read_bounds(cu_seqlens)
    if bounds[0] != 0 or bounds[-1] != T or (bounds.diff() < 0).any():
        shown = bounds.tolist() if len(bounds) <= 10 else [*bounds[:5].tolist(), "...", *bounds[-3:].tolist()]
        raise ValueError(f"cu_seqlens is {shown}, expected to start at 0, never decrease and end at T = {T}")
    return bounds


def read_bounds(cu_seqlens: Tensor) -> Tensor:
    """Its values in int64, on the CPU."""
    if not cu_seqlens.is_cuda or cu_seqlens.is_inference():  # which does not say when it is changed
        return cu_seqlens.detach().cpu().long()
    version, bounds = BOUNDS.get(cu_seqlens, (None, None))
    if version != cu_seqlens._version:
        bounds = cu_seqlens.detach().cpu().long()
        BOUNDS[cu_seqlens] = (cu_seqlens._version, bounds)
    return bounds


def find_lengths(x: Tokens, cu_seqlens: Tensor | None) -> Tensor:
    """Lengths of the N sequences, `[N]` int64, on the CPU."""
    B, T = x.v.shape[:2]
    return torch.full((B,), T, device="cpu") if cu_seqlens is None else read_bounds(cu_seqlens).diff()


def check_options(
    x: Tokens,
    p: Projections,
    content: str | None,
    content_norm: str | None,
    chunk_size: int,
    scale: float | None,
    qk_l2norm: bool,
    allow_neg_eigval: bool,
) -> Options:
    """Raise unless the projections and options fit the inputs; returns the options with defaults filled in."""
    K, (HV, V) = x.q.shape[3], x.v.shape[2:]
    for name, y in (("p_down", p.down), ("p_up", p.up), ("p_write", p.write)):
        if y is not None:
            check_tensor(name, y, x.q.device)
    for name, flag in (("qk_l2norm", qk_l2norm), ("allow_neg_eigval", allow_neg_eigval)):
        if not isinstance(flag, bool):
            raise ValueError(f"{name} is {flag!r}, expected True or False")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float)) or not isfinite(scale)):
        raise ValueError(f"scale is {scale!r}, expected a finite number or None")
    if content not in ("mean", "read"):
        raise ValueError(f"content is {content!r}, expected 'mean' or 'read' (p_down=None makes the op memory-blind)")
    if content_norm not in (None, "rms"):
        raise ValueError(f"content_norm is {content_norm!r}, expected None or 'rms'")
    if not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size!r}, expected an integer >= 1")
    if p.down is None:
        for name, y in (("p_up", p.up), ("p_write", p.write)):
            if y is not None:
                raise ValueError(f"{name} was given without p_down, expected both or neither")
    else:
        R = max(p.down.shape[-1], 1) if p.down.dim() else 1
        expect("p_down", p.down, {"[HV, V, R]": (HV, V, R)})
        if p.up is None and p.write is None:
            raise ValueError("p_up is None, expected a tensor [HV, R, K] with p_down unless p_write is given")
        if p.up is not None:
            expect("p_up", p.up, {"[HV, R, K]": (HV, R, K)})
        if p.write is not None:
            expect("p_write", p.write, {"[HV, R]": (HV, R)})
            if x.w is None:
                raise ValueError("p_write was given without w, expected a write-gate logit w to add the content to")
    scale = K**-0.5 if scale is None else float(scale)
    dtype = torch.float64 if torch.float64 in (x.q.dtype, x.k.dtype, x.v.dtype) else torch.float32
    blind = p.down is None
    return Options(None if blind else content, content_norm, chunk_size, scale, qk_l2norm, allow_neg_eigval, dtype)


def state_shapes(x: Tokens, p: Projections, options: Options, N: int) -> dict[str, tuple[str, tuple[int, ...]] | None]:
    """Shapes of a state's memory, content and content_sum, in symbols and in numbers; None where there is none."""
    K, (HV, V) = x.q.shape[3], x.v.shape[2:]
    R = 0 if p.down is None else p.down.shape[2]
    return {
        "memory": ("[N, HV, K, V]", (N, HV, K, V)),
        "content": {
            None: None,
            "mean": ("[N, HV, R]", (N, HV, R)),
            "read": ("[N, HV, K, R]", (N, HV, K, R)),
        }[options.content],
        "content_sum": ("[N, HV, V]", (N, HV, V)) if options.content == "mean" else None,
    }


def check_state(state: CarveState | None, x: Tokens, p: Projections, options: Options, N: int) -> None:
    """Raise unless the state fits the inputs."""
    if state is None:
        return
    if not isinstance(state, CarveState):
        raise ValueError(f"initial_state is {type(state).__name__}, expected a CarveState")
    for name, shape in state_shapes(x, p, options, N).items():
        y = getattr(state, name)
        if (y is None) != (shape is None):
            found, wanted = ("None", "a tensor") if y is None else ("a tensor", "None")
            how = "a memory-blind op" if options.content is None else f"content={options.content!r}"
            raise ValueError(f"initial_state.{name} is {found}, expected {wanted} for {how}")
        if shape is not None:
            check_tensor(f"initial_state.{name}", y, x.v.device, (options.dtype,))
            expect(f"initial_state.{name}", y, dict([shape]))
    check_tensor("initial_state.position", state.position, x.v.device, (torch.int64,))
    expect("initial_state.position", state.position, {"[N]": (N,)})


def check_values(x: Tokens, p: Projections, state: CarveState | None, options: Options, N: int) -> CarveState:
    """Raise where values on a CPU are out of range; returns the state, a new one, all zeros, for None."""
    if x.g.device.type == "cpu" and x.g.numel():
        low, high = (float(y) for y in x.g.detach().aminmax())
        if not (low > -float("inf") and high <= 0):
            error = ValueError if isfinite(low) and isfinite(high) else NotFinite
            raise error(f"g has values from {low} to {high}, expected finite log-decays <= 0")
    if x.k.device.type == "cpu" and x.k.numel() and not options.qk_l2norm:
        # Along k the erase multiplies by 1 - b |k|^2. A NaN passes, as in q and v; 1 % is room for keys in bf16.
        longest = float(torch.linalg.vector_norm(x.k.detach(), dim=-1, dtype=options.dtype).max())
        if longest > 1.01 * (2 / (2 if options.allow_neg_eigval else 1)) ** 0.5:
            error = ValueError if isfinite(longest) else NotFinite
            raise error(f"k has L2 norms up to {longest:.4g}, expected 1: pass qk_l2norm=True, or normalise it over K")
    if state is None:
        shapes = state_shapes(x, p, options, N).values()
        memory, content, content_sum = each(lambda s: x.v.new_zeros(s[1], dtype=options.dtype), shapes)
        return CarveState(memory, content, content_sum, torch.zeros(N, dtype=torch.int64, device=x.v.device))
    check_position(state.position, options.chunk_size)
    return state


def check_position(position: Tensor, chunk_size: int) -> None:
    """Raise unless all sequences stand in a chunk of that size.

    On a GPU, where one would have to wait for the values, the device checks it, and ends the process.
    """
    fits = ((position >= 0) & (position < chunk_size)).all()
    if position.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(fits, "initial_state.position must be from 0 to below chunk_size")
    elif not fits:
        raise ValueError(
            f"initial_state.position is {position.tolist()}, expected values from 0 to below "
            f"chunk_size = {chunk_size}: the state comes from another chunk size"
        )


# -- the choice of a backend --


def choose_backend(backend: str, paths: dict[str, Any], x: Tokens, p: Projections, options: Options, *more: Any) -> str:
    """The path to take; raises unless the one named serves the inputs, speaks up where "auto" takes a slower one.

    Args:
        paths: name -> kernels, the fastest first: `why_not(x, p, options)` and `build(x, p, options, *more)` say why
            they do not serve the inputs, and why they cannot be compiled, or None.
    """
    backends = ("auto", "torch", *reversed(paths))
    if backend not in backends:
        raise ValueError(f"backend is {backend!r}, expected one of {', '.join(map(repr, backends))}")
    if backend == "torch" or (backend == "auto" and x.v.device.type == "cpu"):
        return "torch"
    if backend != "auto":
        reason = paths[backend].why_not(x, p, options)
        if reason is not None:
            raise ValueError(f"backend is {backend!r}, but {reason}")
        reason = paths[backend].build(x, p, options, *more)
        if reason is not None:
            raise RuntimeError(f"backend is {backend!r}, but {reason}")
        return backend
    refused: list[str] = []
    for name, path in paths.items():
        reason = path.why_not(x, p, options) or path.build(x, p, options, *more)
        if reason is None:
            break
        refused.append(f"{name!r} does not serve it: {reason}")
    else:
        name = "torch"
    if refused:
        fall_back(name, str(x.v.device), "; ".join(refused))
    return name


def fall_back(name: str, device: str, refused: str) -> None:
    """Say that "auto" lands on a slower path; with CARVE_STRICT=1 in the environment, raise."""
    how = "in plain torch, which is slow there" if name == "torch" else f"on {name!r}, which is not the fastest"
    say_slow(f"on {device} the op runs {how}, because {refused}", f"pass backend={name!r}")
