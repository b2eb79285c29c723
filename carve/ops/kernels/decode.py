"""Decoding in one fused CUDA kernel, as the torch operator `carve::decode`."""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from carve.ops.kernels import compiler
from carve.ops.kernels.cuda import facts
from carve.ops.kernels.operator import CONTENTS
from carve.ops.recurrence import Options, Projections, Tokens
from carve.ops.state import CarveState, each

TYPES = {torch.bfloat16: "Bf16", torch.float16: "Fp16", torch.float32: "float"}
STEP, LARGEST = 16, 256  # K and V are multiples of STEP up to LARGEST
RANK = 64  # largest R
LONGEST = 2**30  # largest chunk_size; the kernel counts tokens of a chunk in 32 bits
SPLITS = (1, 2, 4, 8)  # programs of a head
HELD = 2**15  # numbers of the state that a program holds in registers, at most
COLUMNS = 128  # of a program, more only if need be: beyond, registers are left for one program a processor


# -- what the kernel serves, and how it is launched --


def rows_of_warp(K: int, columns: int) -> int:
    """Rows of the state that a warp of a program with so many columns holds.

    More rows mean fewer warps that all compute the same, and more bytes in flight; 32 need a multiple of them,
    and registers.
    """
    return 32 if K % 32 == 0 and columns <= 64 else 16


def shared_bytes(K: int, V: int, R: int, split: int, content: str, up: int) -> int:
    """Shared memory of a program, `up` the bytes of a number of p_up; the kernel checks that it is enough."""
    columns, warps = V // split, K // rows_of_warp(K, V // split)
    seen = {"blind": 0, "mean": R, "read": K * R}[content]
    size = 16 * K + 16 * warps * columns + 8 * columns + 32 * warps
    size += 4 * columns * (content == "mean") + up * K * R * (seen > 0) + 4 * warps * R * (content == "read")
    return size + 8 * seen + 4 * 16


@functools.cache
def choose_split(K: int, V: int, R: int, content: str, up: int, device: int) -> int | None:
    """How many programs share a head; None if the state does not fit.

    From 1 sequence to 128, 4 were the fastest on an H100 or within 4 % of it. Other numbers only where 4
    do not fit.
    """
    gpu = facts(device)
    meets = content != "blind"  # programs of a head meet in a cluster, which needs compute capability 9.0
    fitting = [
        split
        for split in SPLITS
        if V % (STEP * split) == 0
        and K * V // split <= HELD
        and shared_bytes(K, V, R, split, content, up) <= gpu.shared_room
        and (split == 1 or not meets or gpu.capability >= 90)
    ]
    filling = [split for split in fitting if split >= 4 and V // split <= COLUMNS]
    return next(iter(filling[:1] or fitting[-1:]), None)


def why_not(x: Tokens, p: Projections, options: Options) -> str | None:
    """Why the kernel does not serve these inputs; None if it does."""
    device, K, V = x.v.device, x.q.shape[-1], x.v.shape[-1]
    if device.type != "cuda":
        return f"the inputs are on {device}, expected a CUDA device"
    if torch.version.cuda is None:
        return "this PyTorch is not built for CUDA, expected an NVIDIA GPU and one that is"
    for name, y in zip((*x._fields, "p_down", "p_up", "p_write"), (*x, *p), strict=True):
        if y is not None and y.dtype not in TYPES:
            return f"{name} has dtype {y.dtype}, expected {' or '.join(map(str, TYPES))}"
    if K % STEP or V % STEP or max(K, V) > LARGEST:
        return f"K = {K} and V = {V}, expected multiples of {STEP} up to {LARGEST}"
    if p.down is not None and p.down.shape[-1] > RANK:
        return f"p_down has R = {p.down.shape[-1]}, expected at most {RANK}"
    if options.chunk_size > LONGEST:
        return f"chunk_size is {options.chunk_size}, expected at most {LONGEST}"
    gpu = facts(device.index or 0)
    if gpu.capability < 80:
        return f"{gpu.name} has compute capability {gpu.capability / 10}, expected at least 8.0"
    if split_of(x, p, options) is None:
        R = 0 if p.down is None else p.down.shape[-1]
        return (
            f"K = {K}, V = {V} and R = {R} are too large for {gpu.name}, expected K V of at most {HELD} for a program, "
            f"{gpu.shared_room} bytes of shared memory, and compute capability 9.0 to share a head"
        )
    return gpu.no_compiler


def split_of(x: Tokens, p: Projections, options: Options) -> int | None:
    K, V = x.q.shape[3], x.v.shape[3]
    R = 0 if p.down is None else p.down.shape[2]
    up = 0 if p.up is None else p.up.element_size()
    return choose_split(K, V, R, options.content or "blind", up, x.v.device.index or 0)


@functools.cache
def variant(
    K: int,
    V: int,
    R: int,
    heads: tuple[int, ...],
    split: int,
    ahead: int,
    content: str,
    rms: bool,
    unit: bool,
    types: tuple[torch.dtype | None, ...],
) -> tuple[int, int, compiler.Constants]:
    """Threads and bytes of shared memory of a program, and the constants that the kernel is compiled with.

    heads: of q, v, g and e; types: of the tokens and the projections, in order, None where there is none.
    """
    names = ("Q", "K", "V", "G", "E", "W", "DOWN", "UP", "WRITE")
    formats = ("void" if dtype is None else TYPES[dtype] for dtype in types)
    size = shared_bytes(K, V, R, split, content, 0 if types[7] is None else types[7].itemsize)
    rows = rows_of_warp(K, V // split)
    values: dict[str, Any] = {"K": K, "V": V, "R": R, "ROWS": rows, "SPLIT": split, "AHEAD": ahead}
    values |= dict(zip(("H", "HV", "H_G", "H_E"), heads, strict=True))
    values |= {"CONTENT": CONTENTS[content], "RMS": int(rms), "UNIT": int(unit), "SHARED": size}
    values |= {f"TYPE_{name}": value for name, value in zip(names, formats, strict=True)}
    return 32 * K // rows, size, tuple((f"CARVE_{key}", str(value)) for key, value in values.items())


def variant_of(x: Tokens, p: Projections, options: Options) -> tuple[int, int, int, compiler.Constants]:
    """The same of some inputs, with the programs of a head first."""
    split = split_of(x, p, options)
    assert split is not None
    R = 1 if p.down is None else p.down.shape[2]
    kind, rms = options.content or "blind", options.content_norm == "rms"
    types = tuple(None if y is None else y.dtype for y in (*x, *p))
    heads = tuple(y.shape[2] for y in (x.q, x.v, x.g, x.e))
    some = 4 * facts(x.v.device.index or 0).processors  # about as many as run at once
    ahead = some if x.v.shape[0] * x.v.shape[2] * split > some else 0
    return split, *variant(x.q.shape[3], x.v.shape[3], R, heads, split, ahead, kind, rms, options.qk_l2norm, types)


def build(x: Tokens, p: Projections, options: Options) -> str | None:
    """Compile what these inputs need, unless it is done; why that failed, with the compiler's log, else None."""
    _, _, size, constants = variant_of(x, p, options)
    return build_kernel(x.v.device.index or 0, constants, size)


@compiler.constant
def build_kernel(device: int, constants: compiler.Constants, size: int) -> str | None:
    try:
        compiler.load("decode", device, constants, size)
    except RuntimeError as error:
        return str(error)
    return None


def in_rows(x: Tensor) -> tuple[Tensor, int]:
    """x `[B, T, ...]`, a copy if need be, with a token's numbers side by side, and the distance between tokens."""
    B, T = x.shape[:2]
    if not x[0, 0].is_contiguous() or (B > 1 and T > 1 and x.stride(0) != T * x.stride(1)):
        x = x.contiguous()
    return x, x.stride(1) if T > 1 else x.stride(0)


def run(
    x: Tokens, p: Projections, lengths: Tensor | None, state: CarveState, options: Options, update: bool, o: Tensor
) -> None:
    """Launch the kernel; it writes o, and the state if `update`."""
    for name, y in (("memory", state.memory), ("content", state.content)):
        if y is not None and y.data_ptr() % 16:
            raise ValueError(f"state.{name} lies at {y.data_ptr():#x}, expected a multiple of 16")
    split, threads, size, constants = variant_of(x, p, options)
    tokens = [(None, 0) if y is None else in_rows(y) for y in x]
    down, up, write, lengths = each(Tensor.contiguous, (*p, lengths))
    if up is not None and up.data_ptr() % 16:
        up = up.clone()
    tensors = [*(y for y, _ in tokens), down, up, write, lengths, *state, o]
    arguments: list[Any] = [0 if y is None else y.data_ptr() for y in tensors]
    arguments += [ctypes.c_int64(row) for _, row in tokens]
    arguments += map(ctypes.c_float, (options.scale, 2.0 if options.allow_neg_eigval else 1.0))
    programs = x.v.shape[0] * x.v.shape[2] * split
    arguments += map(ctypes.c_int, (x.v.shape[1], options.chunk_size, int(update), programs))
    compiler.launch("decode", x.v.device, constants, programs, threads, size, arguments)


@torch.library.custom_op("carve::decode", mutates_args=("memory", "content", "content_sum", "position"))
def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    e: Tensor,
    w: Tensor | None,
    p_down: Tensor | None,
    p_up: Tensor | None,
    p_write: Tensor | None,
    lengths: Tensor | None,
    memory: Tensor,
    content: Tensor | None,
    content_sum: Tensor | None,
    position: Tensor,
    kind: str,
    content_norm: str | None,
    chunk_size: int,
    scale: float,
    qk_l2norm: bool,
    allow_neg_eigval: bool,
    update: bool,
) -> Tensor:
    """o `[B, T, HV, V]`; the state (memory to position) is moved if `update`, else only read.

    kind: "blind", "mean" or "read"; the rest: see `decode_carve`.
    """
    o = v.new_empty(v.shape)
    options = Options(
        None if kind == "blind" else kind, content_norm, chunk_size, scale, qk_l2norm, allow_neg_eigval, torch.float32
    )
    if o.numel():
        x, p = Tokens(q, k, v, g, e, w), Projections(p_down, p_up, p_write)
        run(x, p, lengths, CarveState(memory, content, content_sum, position), options, update, o)
    return o


@decode.register_fake
def _(*arguments: Any) -> Tensor:
    v = arguments[2]
    return v.new_empty(v.shape)


# -- what the public op calls --


def fused(
    x: Tokens, p: Projections, state: CarveState, options: Options, lengths: Tensor | None, update: bool
) -> Tensor:
    """o `[B, T, HV, V]` in v's dtype; `why_not` has nothing against the arguments, and the state is contiguous."""
    kind, numbers = options.content or "blind", options[1:-1]
    return decode(*x, *p, lengths, *state, kind, *numbers, update)
