"""The chunk form in three fused CUDA kernels, as torch operators `carve::forward` and `carve::backward`.

The forward saves the state every 64 tokens and v_new, in bf16. The backward takes the gradient of the state from the
last tile to the first (`reverse.cu`), then every tile on its own (`gradients.cu`). It adds nothing up across programs:
what several programs contribute to (projections; keys shared by value heads) is written apart and summed afterwards,
always in the same order.
"""

import ctypes
import functools
from typing import Any, List, NamedTuple  # noqa: UP035

import torch
from torch import Tensor

from carve.ops.kernels import compiler
from carve.ops.kernels.operator import CONTENTS, Inputs, needs_gradient, run_sequences, sum_groups
from carve.ops.kernels.registration import Operator, refuse_second_derivative
from carve.ops.recurrence import Options, Projections, Tokens
from carve.ops.state import CarveState, each

SIZES = (64, 128)  # of K and V
RANK = 16  # largest R; the kernels pad to it
LONGEST = 2**20  # largest chunk_size; the kernels count tokens of a chunk in 32 bits
SAVE = 64  # tokens between two saved states, also the backward's tile
INPUTS = {torch.bfloat16: "Bf16", torch.float16: "Fp16"}
Tensors = List[Tensor]  # noqa: UP006 (PyTorch 2.6 knows no other name of it in an operator)


# -- what the kernels serve, and how they are launched --


def shared_bytes(name: str, K: int, V: int, tile: int, content: str, split: int = 1) -> int:
    """Shared memory of a program, one of `split` that share a head; the kernels check that it is enough."""
    V //= split
    wide = {"blind": 0, "mean": 64 * (V + K), "read": 32 * (V + 2 * K)}[content]  # projections and Z
    narrow = wide if content == "read" else 0
    small = 4 * (4 * RANK + K + tile) + tile // 4 * K + 8 * tile + 64 + 3 * 256
    if name == "forward":
        slot = -(-(164 * K + 32 * V + 580) // 256) * 256  # for a block of 16 tokens
        seen = {"blind": 0, "mean": 64 * (V + K) + 512 * split, "read": 32 * V + 64 * K}[content]
        if split > 1:
            seen += 4096 + (128 * K if content == "read" else 0)  # four more warps; to hand over a share of Z
        return tile // 8 * (slot + 16) + 96 * tile + 4 * K + 336 + seen
    if name == "reverse":
        slot = -(-(164 * K + 32 * V + 1668) // 256) * 256  # for a block of 16 tokens, of which there are up to 8
        seen = {"blind": 0, "mean": 64 * K + 10 * split**2 * V, "read": 32 * K + 16 * V + 8192 * (split - 1)}[content]
        if split > 1:
            seen += 128 * split * V  # to hand over shares of dv_new
        room = {128: 99, 192: 163, 256: 227}[K + split * V] * 1024  # on devices that serve the shape
        return min(-(-(seen + 200) // 256) * 256 + 8 * slot, room)
    return tile * (16 * K + 6 * V + 64 + 128 + V // 4) + narrow + small


def threads(name: str, K: int, V: int, split: int) -> int:
    return {"forward": 256 if split == 1 else 384, "reverse": 2 * V + 128, "gradients": 4 * K}[name]


class Device(NamedTuple):
    """What there is to run on."""

    name: str
    capability: int  # 90 for 9.0; of tuples, compiled, PyTorch 2.11 cannot tell the larger
    shared_room: int  # bytes of shared memory that a program can have
    processors: int
    no_compiler: str | None  # why there is none


@compiler.constant
def facts(device: int) -> Device:
    properties: Any = torch.cuda.get_device_properties(device)
    room = properties.shared_memory_per_block_optin
    capability = 10 * properties.major + properties.minor
    return Device(properties.name, capability, room, properties.multi_processor_count, compiler.why_not(device))


def programs_of_head(K: int, V: int, heads: int, device: torch.device) -> int:
    """How many programs share a value head: two where `heads`, of all sequences, leave half of the device idle."""
    gpu = facts(device.index or 0)
    return 2 if K == V == 128 and gpu.capability >= 90 and 2 * heads <= gpu.processors else 1


def forward_tile(K: int, V: int, content: str, device: torch.device) -> int:
    """Tokens of a tile of the forward: 64 where shared memory allows."""
    return 64 if shared_bytes("forward", K, V, 64, content) <= facts(device.index or 0).shared_room else 32


def why_not(x: Tokens, p: Projections, options: Options) -> str | None:
    """Why the kernels do not serve these inputs; None if they do."""
    device, K, V = x.v.device, x.q.shape[-1], x.v.shape[-1]
    if device.type != "cuda":
        return f"the inputs are on {device}, expected a CUDA device"
    if torch.version.cuda is None:
        return "this PyTorch is not built for CUDA, expected an NVIDIA GPU and one that is"
    for name, y in (("q", x.q), ("k", x.k), ("v", x.v), ("e", x.e)):
        if y.dtype not in INPUTS or y.dtype != x.v.dtype:
            return f"{name} has dtype {y.dtype}, expected q, k, v and e all in torch.bfloat16 or all in torch.float16"
    if K not in SIZES or V not in SIZES:
        return f"K = {K} and V = {V}, expected each to be one of {', '.join(map(str, SIZES))}"
    if p.down is not None and p.down.shape[-1] > RANK:
        return f"p_down has R = {p.down.shape[-1]}, expected at most {RANK}"
    if options.chunk_size > LONGEST:
        return f"chunk_size is {options.chunk_size}, expected at most {LONGEST}"
    gpu = facts(device.index or 0)
    tiles = {"forward": 32, "reverse": SAVE, "gradients": SAVE}
    wanted = max(shared_bytes(name, K, V, tile, options.content or "blind") for name, tile in tiles.items())
    if gpu.capability < 80 or gpu.shared_room < wanted:
        return (
            f"{gpu.name} has compute capability {gpu.capability / 10} and {gpu.shared_room} bytes of "
            f"shared memory a block, expected at least 8.0 and {wanted}"
        )
    return gpu.no_compiler


@functools.cache
def variant(
    name: str, K: int, V: int, split: int, tile: int, dtype: torch.dtype, content: str, rms: bool
) -> tuple[int, compiler.Constants]:
    """Bytes of shared memory of a program, and the constants that the kernel is compiled with."""
    size = shared_bytes(name, K, V, tile, content, split)
    values = {"K": K, "V": V, "SPLIT": split, "TILE": tile, "INPUT": INPUTS[dtype], "CONTENT": CONTENTS[content]}
    values |= {"RMS": int(rms), "SHARED": size, "THREADS": threads(name, K, V, split)}
    return size, tuple((f"CARVE_{key}", str(value)) for key, value in values.items())


def run(
    name: str,
    split: int,
    tile: int,
    x: Inputs,
    more: list[Tensor | None],
    content: str,
    rms: bool,
    chunk_size: int,
    scale: float,
    top: float,
    programs: int,
    *numbers: int,
) -> None:
    """Launch a kernel on x and more, all aligned (an empty tensor is passed as null), and its own numbers, in order."""
    (H, K), (HV, V) = x.q.shape[2:], x.v.shape[2:]
    size, constants = variant(name, K, V, split, tile, x.v.dtype, content, rms)
    assert all(y is None or y.is_contiguous() for y in (*x, *more))
    pointers = [0 if y is None or not y.numel() else y.data_ptr() for y in (*x, *more)]
    numbers = (*numbers, H, HV, x.g.shape[2], x.e.shape[2], x.rank or 1, x.v.shape[1], chunk_size)
    arguments = [*pointers, ctypes.c_float(scale), ctypes.c_float(top), *map(ctypes.c_int, numbers)]
    if programs:
        compiler.launch(name, x.v.device, constants, programs, threads(name, K, V, split), size, arguments)


def align(y: Tensor) -> Tensor:
    """y, or a copy of it that begins at a multiple of 16 bytes, as much as a kernel copies at once."""
    return y if y.data_ptr() % 16 == 0 else y.clone()


def build(x: Tokens, p: Projections, options: Options, state: CarveState | None, N: int) -> str | None:
    """Compile what these inputs need, unless it is done; why that failed, with the compiler's log, else None."""
    names = ("forward", "reverse", "gradients") if needs_gradient([*x, *p, *(state or ())]) else ("forward",)
    sizes = SIZES.index(x.q.shape[-1]), SIZES.index(x.v.shape[-1])
    split = programs_of_head(x.q.shape[-1], x.v.shape[-1], N * x.v.shape[2], x.v.device)
    content, rms = options.content or "blind", options.content_norm == "rms"
    return build_kernels(names, x.v.device, sizes, split, x.v.dtype, content, rms)


@compiler.constant
def build_kernels(
    names: tuple[str, ...],
    device: torch.device,
    sizes: tuple[int, int],
    split: int,
    dtype: torch.dtype,
    content: str,
    rms: bool,
) -> str | None:
    """sizes: of K and V, as places in `SIZES`: `torch.compile` may not know the numbers."""
    K, V = (SIZES[i] for i in sizes)
    try:
        for name in names:
            tile = forward_tile(K, V, content, device) if name == "forward" else SAVE
            size, constants = variant(name, K, V, 1 if name == "gradients" else split, tile, dtype, content, rms)
            compiler.load(name, device.index or 0, constants, size)
    except RuntimeError as error:
        return str(error)
    return None


# -- the forward --


def run_forward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs; memory, content, content_sum behind the last token, a full chunk not yet closed; four that are saved.

    The arguments up to position: see `Inputs`; kind: "blind", "mean" or "read"; top: largest erase gate. What there
    is none of, or was not asked for (`final`, `save`), is returned empty.
    """
    x = Inputs(*each(align, (q, k, v, g, e, w, p_down, p_up, p_write, bounds, position)))
    outputs = allocate(x, kind, chunk_size, final, save)
    tile = forward_tile(q.shape[3], v.shape[3], kind, v.device)
    heads = x.sequences * v.shape[2]
    split = programs_of_head(q.shape[3], v.shape[3], heads, v.device)
    more = [*each(align, (memory, content, content_sum)), *outputs]
    run("forward", split, tile, x, more, kind, rms, chunk_size, scale, top, split * heads)
    return tuple(outputs)  # type: ignore[return-value]


def allocate(x: Inputs, kind: str, chunk_size: int, final: bool, save: bool) -> list[Tensor]:
    """The forward's outputs, unwritten."""
    (HV, V), K = x.v.shape[2:], x.q.shape[3]
    ends = [x.g.new_empty(shape if final else 0) for shape in x.state_shapes(kind)]
    if not save:
        return [torch.empty_like(x.v), *ends, *(x.v.new_empty(0) for _ in range(4))]
    chunks, seen = slots(x, chunk_size), {"blind": 0, "mean": RANK, "read": RANK * K // 2}[kind]
    states = allocate_states(x, chunk_size)
    # not every chunk that is counted need be there
    contents, means = x.g.new_zeros(chunks, HV, seen), x.g.new_zeros(chunks, HV, V if kind == "mean" else 0)
    return [torch.empty_like(x.v), *ends, *states, contents, means]


def slots(x: Inputs, chunk_size: int, tokens: int | None = None) -> int:
    """Chunks, or pieces of so many tokens of each, at most; `Sequence` in tile.cuh counts alike."""
    B, T = x.v.shape[:2]
    chunks = B * T // chunk_size + 2 * x.sequences
    return chunks if tokens is None else chunks * -(-min(chunk_size, T) // tokens)


def allocate_states(x: Inputs, chunk_size: int) -> list[Tensor]:
    """A state every `SAVE` tokens of a chunk, and v_new of every 16, in bf16 as the kernels hold them, unwritten."""
    (HV, V), K = x.v.shape[2:], x.q.shape[3]
    sizes = {SAVE: V * K // 2, 16: V * 8}
    return [x.v.new_empty(slots(x, chunk_size, tokens), HV, size, dtype=torch.int32) for tokens, size in sizes.items()]


def fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    kind, _, chunk_size, _, _, final, save = arguments[14:]
    return tuple(allocate(Inputs(*arguments[:11]), kind, chunk_size, final, save))


# -- the backward --


def run_backward(
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
    saved: Tensors,
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
) -> Tensors:
    """Gradients of the first nine arguments and, if `begun`, of the initial state; empty for what is not there.

    saved: the last four outputs of `forward`; do: contiguous, of v's dtype; d_memory, d_content, d_content_sum:
    gradients of the state behind the last token.
    """
    x = Inputs(*each(align, (q, k, v, g, e, w, p_down, p_up, p_write, bounds, position)))
    outputs = allocate_gradients(x, kind, begun)
    (HV, V), K, chunks = v.shape[2:], q.shape[3], slots(x, chunk_size)
    d_states = allocate_states(x, chunk_size)
    passed = x.g.new_empty(chunks if kind == "mean" else 0, HV, V + K + 4)
    split = programs_of_head(K, V, x.sequences * HV, v.device)
    d_contents = x.g.new_zeros(chunks if kind == "mean" else 0, HV, split, RANK + K + 4)
    d_z = x.v.new_empty(slots(x, chunk_size, 16) if kind == "read" else 0, HV, 128, dtype=torch.int32)
    left = [*d_states, passed, d_z]
    do, *ends = each(align, (do, d_memory, d_content, d_content_sum))
    options = (kind, rms, chunk_size, scale, top)
    more = [*saved[:3], do, *ends, *left, d_contents, *outputs[6:]]
    run("reverse", split, SAVE, x, more, *options, split * x.sequences * HV)
    run(
        "gradients",
        1,
        SAVE,
        x,
        [*saved[:3], do, *left, *outputs[:6]],
        *options,
        slots(x, chunk_size, SAVE) * HV,
        x.sequences,
    )
    heads = [sum_groups(dy, y) for dy, y in zip(outputs[:5], x[:5], strict=True)]
    projections = [dy.sum(0) if dy.numel() else dy for dy in outputs[6:9]]
    if kind == "mean":
        projections = differentiate_projections(x, rms, saved[2], saved[3], d_contents.sum(2))
    return [*heads, outputs[5], *projections, *outputs[9:]]


def allocate_gradients(x: Inputs, kind: str, begun: bool) -> list[Tensor]:
    """What the backward kernels write: [B, T, HV, ...] for tokens, [N, HV, ...] for projections and the state."""
    (B, T, HV, V), K, N, R = x.v.shape, x.q.shape[3], x.sequences, x.rank
    tokens = [y.new_empty(B, T, HV, V if y is x.v else K) for y in x[:5] if y is not None]
    tokens.append(x.g.new_empty((B, T, HV) if x.w is not None else 0))
    projections = [x.g.new_empty(N, HV, *shape) for shape in ((V, R), (R, K), (R,))]
    return [*tokens, *projections, *(x.g.new_empty(shape if begun else 0) for shape in x.state_shapes(kind))]


def differentiate_projections(
    x: Inputs, rms: bool, contents: Tensor, means: Tensor, d_contents: Tensor
) -> list[Tensor]:
    """For "mean": gradients of p_down, p_up and p_write from those of every chunk's content and shifts of the gates."""
    R, K = x.rank, x.q.shape[3]
    d_content, d_shift = d_contents[..., :R], d_contents[..., RANK : RANK + K + 1]
    z = contents[..., :R]
    if rms:
        z = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + 1e-8)
    with torch.autocast(x.v.device.type, enabled=False):
        shifts = z.permute(1, 2, 0) @ d_shift.transpose(0, 1)
        p_down = means[:-1].permute(1, 2, 0) @ d_content[1:].transpose(0, 1)  # a chunk's content is the mean before it
    return [p_down, shifts[..., :K].contiguous(), shifts[..., K].contiguous()]


def fake_backward(*arguments: Any) -> list[Tensor]:
    x, kind, begun = Inputs(*arguments[:11]), arguments[16], arguments[21]
    written = allocate_gradients(x, kind, begun)
    heads = [torch.empty_like(y) for y in x[:5] if y is not None]
    return [*heads, written[5], *(dy[0] if dy.numel() else dy for dy in written[6:9]), *written[9:]]


def keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, kind, rms, chunk_size, scale, top, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.begun = tensors[11] is not None
    ctx.options = (kind, rms, chunk_size, scale, top)
    ctx.save_for_backward(*tensors[:11], *output[4:])


def differentiate(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
    *x, states, edits, contents, means = ctx.saved_tensors
    do, *ends = d_outputs[:4]
    do = torch.zeros_like(x[2]) if do is None else do.to(x[2].dtype).contiguous()
    ends = each(Tensor.contiguous, ends)
    found = backward(*x, [states, edits, contents, means], do, *ends, *ctx.options, ctx.begun)
    gradients = [None if y is None else dy for y, dy in zip(x[:9], found, strict=False)]
    state = [dy if dy.numel() else None for dy in found[9:]]
    return *gradients, None, None, *state, *[None] * 7


forward = Operator("forward", run_forward, fake_forward, differentiate, keep_for_backward)
backward = Operator("backward", run_backward, fake_backward, refuse_second_derivative)
fused = functools.partial(run_sequences, forward)  # what the public op calls
