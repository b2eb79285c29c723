"""The chunk form in two fused CUDA kernels, as torch operators `carve::forward` and `carve::backward`.

The backward runs the forward again, tile by tile, from states that the forward saved every 32 tokens in bf16. It
adds nothing up across programs: what several programs contribute to (projections; keys shared by value heads) is
written apart and summed afterwards, always in the same order.
"""

import ctypes
import functools
import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor

from carve.ops.kernels import compiler
from carve.ops.recurrence import Options, Projections, Tokens, close_chunk
from carve.ops.state import CarveState, each

SIZES = (64, 128)  # of K and V
RANK = 16  # largest R; the kernels pad to it
SAVE = 32  # tokens between two saved states, also the backward's tile
INPUTS = {torch.bfloat16: "Bf16", torch.float16: "Fp16"}
CONTENTS = {"blind": 0, "mean": 1, "read": 2}


# -- what the kernels serve, and how they are launched --


def shared_bytes(name: str, K: int, V: int, tile: int, content: str) -> int:
    """Shared memory of a program; the kernels check that it is enough."""
    blocks, warps = tile // 16, V // 16
    projections = {"blind": 0, "mean": 64 * (V + K), "read": 32 * (V + 2 * K)}[content]
    small = 4 * (4 * RANK + K + tile) + 128 * tile + 4 * blocks * K + 4 * tile + 64 + 4 * V + projections
    alignment = 3 * 256
    if name == "forward":
        return 2 * (tile * (10 * K + 2 * V) + 4 * tile) + small + alignment
    rows = tile * (18 * K + 6 * V) + 16 * (2 * V + 2 * K)
    return rows + 4 * V * K + small + 4 * tile + 2048 + 64 * warps + 64 + 8 * RANK + 4 * (K + 16) + alignment


@functools.cache
def shared_room(device: int) -> int:
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin


def forward_tile(K: int, V: int, content: str, device: torch.device) -> int:
    """Tokens of a tile of the forward: 64 where shared memory allows."""
    return 64 if shared_bytes("forward", K, V, 64, content) <= shared_room(device.index or 0) else 32


def why_not(x: Tokens, p: Projections, options: Options) -> str | None:
    """Why the kernels do not serve these inputs; None if they do."""
    device, K, V = x.v.device, x.q.shape[-1], x.v.shape[-1]
    if device.type != "cuda":
        return f"the inputs are on {device}, expected a CUDA device"
    for name in ("q", "k", "v", "e"):
        y = getattr(x, name)
        if y.dtype not in INPUTS or y.dtype != x.v.dtype:
            return f"{name} has dtype {y.dtype}, expected q, k, v and e all in torch.bfloat16 or all in torch.float16"
    if K not in SIZES or V not in SIZES:
        return f"K = {K} and V = {V}, expected each to be one of {', '.join(map(str, SIZES))}"
    if p.down is not None and p.down.shape[-1] > RANK:
        return f"p_down has R = {p.down.shape[-1]}, expected at most {RANK}"
    if not has_compiler():
        return "cuda-core is not installed (pip install 'carve-attention[gpu]')"
    wanted = max(shared_bytes(name, K, V, SAVE, options.content or "blind") for name in ("forward", "backward"))
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8 or shared_room(device.index or 0) < wanted:
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor} and "
            f"{shared_room(device.index or 0)} bytes of shared memory a block, expected at least 8.0 and {wanted}"
        )
    return None


@functools.cache
def has_compiler() -> bool:
    return importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.core") is not None


class Inputs(NamedTuple):
    """What both kernels read, contiguous: q, k, v, e in bf16 or fp16, integers in int64, the rest in fp32."""

    q: Tensor  # [B, T, H, K]
    k: Tensor  # [B, T, H, K]
    v: Tensor  # [B, T, HV, V]
    g: Tensor  # [B, T, H or HV, K]
    e: Tensor  # [B, T, H or HV, K]
    w: Tensor | None  # [B, T, HV]
    p_down: Tensor | None  # [HV, V, R]
    p_up: Tensor | None  # [HV, R, K]
    p_write: Tensor | None  # [HV, R]
    bounds: Tensor | None  # [N + 1], of sequences packed into B = 1; None for B sequences of T tokens
    position: Tensor | None  # [N]; None for zeros

    @property
    def sequences(self) -> int:
        return self.v.shape[0] if self.bounds is None else len(self.bounds) - 1

    @property
    def rank(self) -> int:
        return 0 if self.p_down is None else self.p_down.shape[-1]

    def state_shapes(self, content: str) -> list[tuple[int, ...]]:
        """Of memory, content and content_sum; (0,) for what is not there."""
        N, HV, V, K, R = self.sequences, *self.v.shape[2:], self.q.shape[3], self.rank
        seen = {"blind": (0,), "mean": (N, HV, R), "read": (N, HV, K, R)}[content]
        return [(N, HV, K, V), seen, (N, HV, V) if content == "mean" else (0,)]


def run(
    name: str,
    tile: int,
    x: Inputs,
    more: list[Tensor | None],
    content: str,
    rms: bool,
    chunk_size: int,
    scale: float,
    top: float,
) -> None:
    """Launch a kernel on x and its further tensors, in order; an empty tensor is passed as null."""
    (H, K), (HV, V) = x.q.shape[2:], x.v.shape[2:]
    size = shared_bytes(name, K, V, tile, content)
    values = {"K": K, "V": V, "TILE": tile, "INPUT": INPUTS[x.v.dtype], "CONTENT": CONTENTS[content]}
    values |= {"RMS": int(rms), "SHARED": size}
    constants = tuple((f"CARVE_{key}", str(value)) for key, value in values.items())
    pointers = [0 if y is None or not y.numel() else y.data_ptr() for y in (*x, *more)]
    numbers = (H, HV, x.g.shape[2], x.e.shape[2], x.rank or 1, x.v.shape[1], chunk_size)
    arguments = [*pointers, ctypes.c_float(scale), ctypes.c_float(top), *map(ctypes.c_int, numbers)]
    programs = x.sequences * HV
    if programs:
        compiler.launch(name, x.v.device, constants, programs, 2 * V, size, arguments)


# -- the forward --


@torch.library.custom_op("carve::forward", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    e: Tensor,
    w: Tensor | None,
    p_down: Tensor | None,
    p_up: Tensor | None,
    p_write: Tensor | None,
    bounds: Tensor | None,
    position: Tensor | None,
    memory: Tensor | None,
    content: Tensor | None,
    content_sum: Tensor | None,
    kind: str,
    rms: bool,
    chunk_size: int,
    scale: float,
    top: float,
    final: bool,
    save: bool,
) -> list[Tensor]:
    """Outputs; memory, content, content_sum behind the last token, a full chunk not yet closed; three that are saved.

    The arguments up to position: see `Inputs`; kind: "blind", "mean" or "read"; top: largest erase gate. What there
    is none of, or was not asked for (`final`, `save`), is returned empty.
    """
    x = Inputs(q, k, v, g, e, w, p_down, p_up, p_write, bounds, position)
    outputs = allocate(x, kind, chunk_size, final, save)
    tile = forward_tile(q.shape[3], v.shape[3], kind, v.device)
    run("forward", tile, x, [memory, content, content_sum, *outputs], kind, rms, chunk_size, scale, top)
    return outputs


def allocate(x: Inputs, kind: str, chunk_size: int, final: bool, save: bool) -> list[Tensor]:
    """The forward's outputs, unwritten."""
    (B, T, HV, V), K = x.v.shape, x.q.shape[3]
    ends = [x.g.new_empty(shape if final else 0) for shape in x.state_shapes(kind)]
    chunks = B * T // chunk_size + 2 * x.sequences if save else 0  # at most; `Sequence` in tile.cuh counts alike
    states = -(-chunk_size // SAVE) * chunks
    seen = {"blind": 0, "mean": RANK, "read": RANK * K // 2}[kind]
    return [
        torch.empty_like(x.v),
        *ends,
        x.v.new_empty(states, HV, V * K // 2, dtype=torch.int32),
        x.g.new_empty(chunks, HV, seen),
        x.g.new_empty(chunks, HV, V if kind == "mean" else 0),
    ]


@forward.register_fake
def _(*arguments: Any) -> list[Tensor]:
    kind, _, chunk_size, _, _, final, save = arguments[14:]
    return allocate(Inputs(*arguments[:11]), kind, chunk_size, final, save)


# -- the backward --


@torch.library.custom_op("carve::backward", mutates_args=())
def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    e: Tensor,
    w: Tensor | None,
    p_down: Tensor | None,
    p_up: Tensor | None,
    p_write: Tensor | None,
    bounds: Tensor | None,
    position: Tensor | None,
    saved: list[Tensor],
    do: Tensor,
    d_memory: Tensor | None,
    d_content: Tensor | None,
    d_content_sum: Tensor | None,
    kind: str,
    rms: bool,
    chunk_size: int,
    scale: float,
    top: float,
    begun: bool,
) -> list[Tensor]:
    """Gradients of the first nine arguments and, if `begun`, of the initial state; empty for what is not there.

    saved: the last three outputs of `forward`; do: contiguous, of v's dtype; d_memory, d_content, d_content_sum:
    gradients of the state behind the last token.
    """
    x = Inputs(q, k, v, g, e, w, p_down, p_up, p_write, bounds, position)
    outputs = allocate_gradients(x, kind, begun)
    more = [*saved, do, d_memory, d_content, d_content_sum, *outputs]
    run("backward", SAVE, x, more, kind, rms, chunk_size, scale, top)
    heads = [sum_groups(dy, y) for dy, y in zip(outputs[:5], x[:5], strict=True)]
    projections = [dy.sum(0) if dy.numel() else dy for dy in outputs[6:9]]
    return [*heads, outputs[5], *projections, *outputs[9:]]


def allocate_gradients(x: Inputs, kind: str, begun: bool) -> list[Tensor]:
    """What the backward kernel writes: [B, T, HV, ...] for tokens, [N, HV, ...] for projections and the state."""
    (B, T, HV, V), K, N, R = x.v.shape, x.q.shape[3], x.sequences, x.rank
    tokens = [y.new_empty(B, T, HV, V if y is x.v else K) for y in x[:5] if y is not None]
    tokens.append(x.g.new_empty((B, T, HV) if x.w is not None else 0))
    projections = [x.g.new_empty(N, HV, *shape) for shape in ((V, R), (R, K), (R,))]
    return [*tokens, *projections, *(x.g.new_empty(shape if begun else 0) for shape in x.state_shapes(kind))]


def sum_groups(dx: Tensor, x: Tensor) -> Tensor:
    """Gradients of heads that value heads share: [B, T, HV, K] to the shape of x."""
    if dx.shape == x.shape:
        return dx
    B, T, H, K = x.shape
    return dx.view(B, T, H, -1, K).sum(3, dtype=torch.float32).to(x.dtype)


@backward.register_fake
def _(*arguments: Any) -> list[Tensor]:
    x, kind, begun = Inputs(*arguments[:11]), arguments[16], arguments[21]
    written = allocate_gradients(x, kind, begun)
    heads = [torch.empty_like(y) for y in x[:5] if y is not None]
    return [*heads, written[5], *(dy[0] if dy.numel() else dy for dy in written[6:9]), *written[9:]]


def keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *tensors, kind, rms, chunk_size, scale, top, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.begun = tensors[11] is not None
    ctx.options = (kind, rms, chunk_size, scale, top)
    ctx.save_for_backward(*tensors[:11], *output[4:])


def differentiate(ctx: Any, d_outputs: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    *x, states, contents, means = ctx.saved_tensors
    do, *ends = d_outputs[:4]
    do = torch.zeros_like(x[2]) if do is None else do.to(x[2].dtype).contiguous()
    ends = each(Tensor.contiguous, ends)
    found = backward(*x, [states, contents, means], do, *ends, *ctx.options, ctx.begun)
    gradients = [None if y is None else dy for y, dy in zip(x[:9], found, strict=False)]
    state = [dy if dy.numel() else None for dy in found[9:]]
    return *gradients, None, None, *state, *[None] * 7


forward.register_autograd(differentiate, setup_context=keep_for_backward)


# -- what the public op calls --


def fused(
    x: Tokens, p: Projections, state: CarveState | None, options: Options, cu_seqlens: Tensor | None, final: bool
) -> tuple[Tensor, CarveState | None]:
    """Run N sequences; `why_not` has nothing against the arguments.

    Args:
        x: inputs, `[B, T, ...]`: B sequences of T tokens, or one row of N packed sequences.
        p: content projections in float32.
        state: the state before the first tokens; None for zeros.
        cu_seqlens: `[N + 1]`, int32 or int64, of packed sequences, or None.
        final: whether to return the state after the last tokens.

    Returns:
        o `[B, T, HV, V]` in v's dtype, and the state after the last tokens or None.
    """
    device, kind = x.v.device, options.content or "blind"
    q, k = x.q, x.k
    if options.qk_l2norm:
        q, k = (y * torch.rsqrt(y.float().square().sum(-1, keepdim=True) + 1e-6).to(y.dtype) for y in (q, k))
    tokens = each(lambda y: y.contiguous(), (q, k, x.v, x.g.float(), x.e, None if x.w is None else x.w.float()))
    bounds = None if cu_seqlens is None else cu_seqlens.to(device, torch.int64).contiguous()
    begin = [None] * 3 if state is None else each(lambda y: y.contiguous(), state[:3])
    position = None if state is None else state.position.contiguous()
    inputs = Inputs(*tokens, *each(lambda y: y.contiguous(), p), bounds, position)  # type: ignore[call-arg]
    differentiated = [*inputs[:9], *begin]
    save = torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in differentiated)
    top = 2.0 if options.allow_neg_eigval else 1.0
    rms = options.content_norm == "rms"
    o, *ends = forward(*inputs, *begin, kind, rms, options.chunk_size, options.scale, top, final, save)[:4]
    if not final:
        return o, None
    lengths = x.v.new_full((x.v.shape[0],), x.v.shape[1], dtype=torch.int64) if bounds is None else bounds.diff()
    seen = lengths if position is None else position + lengths
    full = (seen % options.chunk_size == 0) & (lengths > 0)
    memory = ends[0]
    content = None if kind == "blind" else ends[1]
    content_sum = ends[2] if kind == "mean" else None
    content, content_sum = close_chunk(memory, content, content_sum, full, p, options)
    return o, CarveState(memory, content, content_sum, seen % options.chunk_size)
