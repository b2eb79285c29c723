"""The chunk form in portable Triton kernels, as torch operators `carve::portable_forward` and `portable_backward`.

The forward keeps what the gates of each chunk see, and nothing else. With it the backward prepares every block anew,
takes the state through the blocks again, its gradient back through them, and then every block on its own
(`triton_backward.py`). It adds nothing up across programs: what several programs contribute to (projections; keys
shared by value heads) is written apart and summed afterwards, always in the same order.

In Triton's interpreter (TRITON_INTERPRET=1 before Triton is imported) the same kernels run on a CPU, slowly, for tests.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any, List  # noqa: UP035

import torch
from torch import Tensor

from carve.ops.kernels import triton_launch
from carve.ops.kernels.operator import CONTENTS, Inputs, run_sequences, sum_groups
from carve.ops.kernels.registration import Operator, refuse_second_derivative
from carve.ops.kernels.triton_launch import DTYPES, launch, pad
from carve.ops.recurrence import Options, Projections, Tokens
from carve.ops.state import CarveState, each

STEP, LARGEST = 16, 256  # K and V are multiples of STEP up to LARGEST
RANK = 64  # largest R
LONGEST = 2**30  # largest chunk_size; the kernels count tokens of a chunk in 32 bits
BLOCK, FIELDS, SHARE = 16, 3, 16  # as in triton_forward.py
ROOM = 160 * 1024  # bytes of shared memory with which loads can run ahead of their use
SMALL_TILE = 32  # of V, where larger ones need more shared memory than there is
RUN, RUN_CHUNKS = 64, 16  # blocks, chunks whose share of the projections' gradients one program adds up
Tensors = List[Tensor]  # noqa: UP006 (PyTorch 2.6 knows no other name of it in an operator)


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched."""

    num_warps: int
    num_stages: int = 1
    tile: int = 256  # largest number of columns of V that a program has, or takes at a time; for "keys" of K


# For padded sizes, the larger one of K and V, up to each. benchmarks/triton_table.py measures it. Kernels that hold
# [256, 16] have two warps: with more, these products become wgmma, for which ptxas 12.8 makes wrong code there.
LAUNCHES: dict[str, dict[int, Launch]] = {
    "prepare": {32: Launch(1, 1, 256), 64: Launch(2, 1, 256), 128: Launch(4, 1, 256), 256: Launch(8, 1, 256)},
    "gated": {32: Launch(1, 2, 256), 64: Launch(4, 2, 64), 128: Launch(4, 2, 64), 256: Launch(8, 1, 64)},
    "content": {32: Launch(1, 2, 256), 64: Launch(4, 2, 256), 128: Launch(8, 2, 256), 256: Launch(2, 1, 16)},
    "reverse": {32: Launch(1, 2, 256), 64: Launch(4, 2, 256), 128: Launch(8, 2, 256), 256: Launch(2, 1, 16)},
    "values": {32: Launch(1, 1, 256), 64: Launch(1, 1, 256), 128: Launch(1, 1, 256), 256: Launch(2, 1, 256)},
    "keys": {32: Launch(1, 1, 32), 64: Launch(4, 1, 64), 128: Launch(4, 1, 64), 256: Launch(2, 1, 16)},
}


# -- what the kernels serve, and how they are launched --


def why_not(x: Tokens, p: Projections, options: Options) -> str | None:
    """Why the kernels do not serve these inputs; None if they do."""
    device, K, V = x.v.device, x.q.shape[-1], x.v.shape[-1]
    if (reason := triton_launch.why_not()) is not None:
        return reason
    import triton

    if device.type != "cuda" and not (device.type == "cpu" and triton.knobs.runtime.interpret):
        return f"the inputs are on {device}, expected a GPU"
    for name, y in (("q", x.q), ("k", x.k), ("v", x.v)):
        if y.dtype not in DTYPES or y.dtype != x.v.dtype:
            names = ", ".join(map(str, DTYPES))
            return f"{name} has dtype {y.dtype}, expected q, k and v all in one of {names}"
    if K % STEP or V % STEP or max(K, V) > LARGEST:
        return f"K = {K} and V = {V}, expected multiples of {STEP} up to {LARGEST}"
    if p.down is not None and p.down.shape[-1] > RANK:
        return f"p_down has R = {p.down.shape[-1]}, expected at most {RANK}"
    if options.chunk_size > LONGEST:
        return f"chunk_size is {options.chunk_size}, expected at most {LONGEST}"
    if (reason := triton_launch.why_too_old(device)) is not None:
        return reason
    if max(K, V) > 128 and x.v.dtype == torch.float32 and (room := shared_room(device)) < ROOM:
        return f"K = {K} and V = {V} in float32, expected at most 128 with {room} bytes of shared memory a block"
    return None


def build(x: Tokens, p: Projections, options: Options, state: CarveState | None, N: int) -> str | None:
    """Nothing: Triton compiles a kernel when it is first launched, and keeps it on disk."""
    return None


def shared_room(device: torch.device) -> int:
    """Bytes of shared memory that a program can have."""
    if device.type != "cuda":
        return ROOM
    properties: Any = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 0)


class Plan:
    """The blocks of a call's sequences, and what all kernels are launched with."""

    def __init__(self, x: Inputs, kind: str, rms: bool, chunk_size: int) -> None:
        from carve.ops.kernels import triton_forward

        (B, T, H, self.K), (self.HV, self.V) = x.q.shape, x.v.shape[2:]
        self.x, self.kind, self.C, self.T = x, kind, chunk_size, T
        tokens = B * T
        self.slots = tokens // BLOCK + (tokens // chunk_size if chunk_size % BLOCK else 0) + 2 * x.sequences
        self.chunks = tokens // chunk_size + 2 * x.sequences
        self.BK, self.BV, self.BR = pad(self.K), pad(self.V), pad(x.rank or 1)
        # of operands; Triton's interpreter multiplies no bf16
        self.low = torch.bfloat16 if x.v.is_cuda and x.v.dtype != torch.float32 else torch.float32
        exact = "tf32x3" if x.v.is_cuda and torch.version.hip is None else "ieee"
        fast = "tf32" if exact == "tf32x3" else "ieee"
        self.constants = {
            "H": H,
            "HV": self.HV,
            "K": self.K,
            "BK": self.BK,
            "BR": self.BR,
            "CONTENT": CONTENTS[kind],
            "RMS": rms,
            "PRECISION": exact if self.low == torch.float32 else fast,
            "WIDE": exact,
        }
        self.heads = {"H_g": x.g.shape[2], "H_e": x.e.shape[2]}
        self.blocks = x.v.new_zeros(self.slots, FIELDS, dtype=torch.int64)
        self.starts = None if kind == "blind" else x.v.new_zeros(self.chunks, dtype=torch.int64)
        lists = (x.bounds, x.position, self.blocks, self.starts)
        self.launch(triton_forward.list_blocks, x.sequences, *lists, T, chunk_size, STEP=128)

    def launch(self, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        launch(kernel, self.x.v.device, programs, *arguments, **constants)

    def options(self, name: str) -> Launch:
        sizes = LAUNCHES[name]
        how = sizes[next(size for size in sizes if max(self.BK, self.BV) <= size)]
        tile = min(how.tile, self.BK if name == "keys" else self.BV)
        wide, small = self.low == torch.float32, shared_room(self.x.v.device) < ROOM
        largest = max(self.BK, self.BV)
        crowded = (largest > 128 and (small or wide)) or (largest > 64 and small and self.kind == "read")
        if crowded and name in ("gated", "content", "reverse"):
            tile = min(tile, SMALL_TILE)
        # loads may not run ahead of the stores of a state that lies in memory, nor where there is no room for them
        in_memory = tile < self.BV and name in ("content", "reverse")
        return replace(how, tile=tile, num_stages=1 if in_memory or wide or small else how.num_stages)

    def scratch(self, *shape: int, wide: bool = False) -> Tensor:
        """`[slots, HV, *shape]`, unwritten."""
        return self.x.v.new_empty(self.slots, self.HV, *shape, dtype=torch.float32 if wide else self.low)


class Prepared:
    """What `prepare` writes; see there."""

    def __init__(
        self, plan: Plan, contents: Tensor | None, gated: bool, sloped: bool, scale: float, top: float
    ) -> None:
        from carve.ops.kernels import triton_forward

        x, K, how = plan.x, plan.K, plan.options("prepare")
        self.q_in, self.x, self.k_in = (plan.scratch(BLOCK, K) for _ in range(3))
        self.M, self.decay = plan.scratch(BLOCK, BLOCK, wide=True), plan.scratch(K, wide=True)
        self.strong = plan.blocks.new_zeros(plan.slots, plan.HV, dtype=torch.int32)
        self.T = plan.scratch(BLOCK, BLOCK, wide=True) if gated else None
        self.a = plan.scratch(BLOCK, wide=True) if gated else None
        self.slope = plan.scratch(BLOCK, K) if sloped else None
        written = [self.q_in, self.x, self.k_in, self.M, self.decay, self.strong, self.T, self.a, self.slope]
        for strong in (False, True):
            plan.launch(
                triton_forward.prepare,
                -(-plan.slots // (SHARE if strong else 1)) * plan.HV,
                *(x.q, x.k, x.g, x.e, x.w, x.p_up, x.p_write, contents, plan.blocks),
                *written,
                *(scale, top, x.rank, plan.slots),
                GATED=gated,
                STRONG=strong,
                **plan.heads,
                **plan.constants,
                num_warps=how.num_warps,
                num_stages=how.num_stages,
            )

    @property
    def for_run(self) -> list[Tensor | None]:
        return [self.q_in, self.x, self.k_in, self.M, self.decay, self.strong, self.T, self.a]


def run_blocks(
    plan: Plan,
    prepared: Prepared,
    begin: list[Tensor | None],
    outputs: list[Tensor | None],
    gated: bool,
    top: float,
) -> None:
    """outputs: o, the state behind the last token (3), contents, means, states, edits; None for what is not wanted."""
    from carve.ops.kernels import triton_forward

    x, how = plan.x, plan.options("gated" if gated else "content")
    if how.tile < plan.BV and not gated and outputs[1] is None:  # where the kernel keeps its state
        outputs[1:4] = [x.g.new_empty(shape) for shape in x.state_shapes(plan.kind)]
    plan.launch(
        triton_forward.run_blocks,
        x.sequences * plan.HV * (-(-plan.V // how.tile) if gated else 1),
        *(x.k, x.v, x.g, x.e, x.w, x.p_down, x.p_up, x.p_write, x.bounds, x.position),
        *prepared.for_run,
        *begin,
        *outputs,
        *(top, x.rank, plan.T, plan.C),
        V=plan.V,
        BV=how.tile,
        GATED=gated,
        STAGES=how.num_stages,
        **plan.heads,
        **(plan.constants | ({"CONTENT": 0} if gated else {})),
        num_warps=how.num_warps,
        num_stages=how.num_stages,
    )


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs; memory, content, content_sum behind the last token, a full chunk not yet closed; two that are saved.

    The arguments up to position: see `Inputs`; kind: "blind", "mean" or "read"; top: largest erase gate. What there
    is none of, or was not asked for (`final`, `save`), is returned empty.
    """
    x = Inputs(q, k, v, g, e, w, p_down, p_up, p_write, bounds, position)
    outputs = allocate(x, kind, chunk_size, final, save)
    plan, gated = Plan(x, kind, rms, chunk_size), kind == "blind"
    prepared = Prepared(plan, None, gated, False, scale, top)
    wanted = [y if y.numel() else None for y in outputs]
    run_blocks(plan, prepared, [memory, content, content_sum], [*wanted, None, None], gated, top)
    return tuple(outputs)  # type: ignore[return-value]


def allocate(x: Inputs, kind: str, chunk_size: int, final: bool, save: bool) -> list[Tensor]:
    """The forward's outputs, unwritten."""
    (B, T, HV, V), K, R = x.v.shape, x.q.shape[3], x.rank
    ends = [x.g.new_empty(shape if final else 0) for shape in x.state_shapes(kind)]
    chunks = B * T // chunk_size + 2 * x.sequences if save and kind != "blind" else 0
    return [
        torch.empty_like(x.v),
        *ends,
        x.g.new_empty(chunks, HV, *((K, R) if kind == "read" else (R,))),
        x.g.new_empty(chunks if kind == "mean" else 0, HV, V),
    ]


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
    memory: Tensor | None,
    contents: Tensor,
    means: Tensor,
    do: Tensor,
    d_memory: Tensor | None,
    d_content: Tensor | None,
    d_content_sum: Tensor | None,
    kind: str,
    rms: bool,
    chunk_size: int,
    scale: float,
    top: float,
) -> Tensors:
    """Gradients of the first nine arguments and, if there is a memory, of the initial state; else empty.

    contents, means: the last two outputs of `forward`; do: contiguous, of v's dtype; d_memory, d_content,
    d_content_sum: gradients of the state behind the last token.
    """
    from triton import language as tl

    from carve.ops.kernels import triton_backward

    x = Inputs(q, k, v, g, e, w, p_down, p_up, p_write, bounds, position)
    outputs = allocate_gradients(x, kind, memory is not None)
    blind = kind == "blind"
    if not v.numel():
        return pass_through(x, outputs, [d_memory, d_content, d_content_sum], blind)
    plan = Plan(x, kind, rms, chunk_size)
    K, V = plan.K, plan.V
    prepared = Prepared(plan, contents, True, not blind, scale, top)
    states, edits = plan.scratch(V, K), plan.scratch(BLOCK, V)
    run_blocks(plan, prepared, [memory, None, None], [None] * 6 + [states, edits], True, top)

    # -- the gradient of the state, from the last block to the first --
    d_states, d_edits = plan.scratch(V, K), plan.scratch(BLOCK, V)
    d_sums, d_contents = torch.empty_like(means), torch.empty_like(contents)
    written = [y if y.numel() else None for y in outputs[6:]]
    how = plan.options("gated" if blind else "reverse")
    if how.tile < plan.BV and not blind and memory is None:  # where the kernel keeps its state
        written = [x.g.new_empty(shape) for shape in x.state_shapes(kind)]
    constants = {name: y for name, y in (plan.constants | plan.heads).items() if name != "H_e"}
    plan.launch(
        triton_backward.reverse_blocks,
        x.sequences * plan.HV * (-(-V // how.tile) if blind else 1),
        *(x.k, x.v, x.g, x.p_down, x.p_up, x.p_write, x.bounds, x.position),
        *prepared.for_run,
        *(prepared.slope, states, edits, contents, do, d_memory, d_content, d_content_sum),
        *(d_states, d_edits, d_sums, d_contents, *written),
        *(x.rank, plan.T, plan.C),
        V=V,
        BV=how.tile,
        STAGES=how.num_stages,
        **constants,
        num_warps=how.num_warps,
        num_stages=how.num_stages,
    )
    strong, a = prepared.strong, prepared.a
    del prepared

    # -- every block on its own --
    dq, dk, dv, dg, de, dw = (y if y.numel() else None for y in outputs[:6])
    dA, dM = (plan.scratch(BLOCK, BLOCK, wide=True) for _ in range(2))
    how = plan.options("values")
    plan.launch(
        triton_backward.differentiate_values,
        plan.slots * plan.HV,
        *(x.v, plan.blocks, a, edits, do, d_edits, d_sums),
        *(dv, dw, dA, dM),
        V=V,
        BV=plan.BV,
        **{name: plan.constants[name] for name in ("HV", "CONTENT", "PRECISION")},
        num_warps=how.num_warps,
        num_stages=how.num_stages,
    )
    how = plan.options("keys")
    z = plan.scratch(BLOCK, x.rank, wide=True)
    tile = plan.BK if kind == "read" else how.tile
    for is_strong in (False, True):
        plan.launch(
            triton_backward.differentiate_keys,
            -(-plan.slots // (SHARE if is_strong else 1)) * plan.HV * -(-K // tile),
            *(x.q, x.k, x.g, x.e, x.p_up, x.p_write, contents, plan.blocks, strong),
            *(states, edits, do, d_states, d_edits, d_sums, dA, dM, dw),
            *(dq, dk, dg, de, z),
            *(scale, top, x.rank, plan.slots),
            V=V,
            BV=plan.BV,
            TILE=tile,
            STRONG=is_strong,
            **plan.heads,
            **plan.constants,
            num_warps=how.num_warps,
            num_stages=how.num_stages,
        )
    projections = [x.g.new_empty(0) for _ in range(3)]
    if not blind:
        tile, runs = min(plan.BV, 64), -(-plan.chunks // RUN_CHUNKS)
        d_down = x.g.new_empty(runs, plan.HV, V, x.rank)
        names = ["HV", "K", "BK", "BR", "CONTENT", "PRECISION"]
        plan.launch(
            triton_backward.sum_down,
            runs * plan.HV * -(-V // tile),
            *(plan.starts, means, states, d_contents, d_down, x.rank, plan.chunks),
            V=V,
            BV=tile,
            RUN=RUN_CHUNKS,
            **{name: plan.constants[name] for name in names},
        )
        runs = -(-plan.slots // RUN)
        d_up, d_write = x.g.new_empty(runs, plan.HV, x.rank, K), x.g.new_empty(runs, plan.HV, x.rank)
        names.remove("CONTENT")
        plan.launch(
            triton_backward.sum_projections,
            runs * plan.HV,
            *(plan.blocks, z, de, dw, d_up, d_write, x.rank, plan.slots),
            RUN=RUN,
            LOW=tl.float32 if plan.low == torch.float32 else tl.bfloat16,
            **{name: plan.constants[name] for name in names},
        )
        projections = [dy.sum(0) for dy in (d_down, d_up, d_write)]
    heads = [sum_groups(dy, y) for dy, y in zip(outputs[:5], x[:5], strict=True)]
    return [*heads, outputs[5], *projections, *outputs[6:]]


def pass_through(x: Inputs, outputs: list[Tensor], ends: list[Tensor | None], blind: bool) -> list[Tensor]:
    """The gradients where there are no tokens: the state came out as it went in."""
    for dy, end in zip(outputs[6:], ends, strict=True):
        if dy.numel():
            dy.zero_() if end is None else dy.copy_(end)
    HV, V, K, R = *x.v.shape[2:], x.q.shape[3], x.rank
    projections = [x.g.new_zeros(0 if blind else (HV, *shape)) for shape in ((V, R), (R, K), (R,))]
    return [*(torch.empty_like(y) for y in x[:5] if y is not None), outputs[5], *projections, *outputs[6:]]


def allocate_gradients(x: Inputs, kind: str, begun: bool) -> list[Tensor]:
    """What the backward kernels write: [B, T, HV, ...] for tokens, [N, HV, ...] for the state."""
    (B, T, HV, V), K = x.v.shape, x.q.shape[3]
    tokens = [y.new_empty(B, T, HV, V if y is x.v else K) for y in x[:5] if y is not None]
    tokens.append(x.g.new_empty((B, T, HV) if x.w is not None else 0))
    return [*tokens, *(x.g.new_empty(shape if begun else 0) for shape in x.state_shapes(kind))]


def fake_backward(*arguments: Any) -> list[Tensor]:
    x, begun, kind = Inputs(*arguments[:11]), arguments[11] is not None, arguments[18]
    written, (HV, V), K, R = allocate_gradients(x, kind, begun), x.v.shape[2:], x.q.shape[3], x.rank
    heads = [torch.empty_like(y) for y in x[:5] if y is not None]
    shapes = [0] * 3 if kind == "blind" else [(HV, V, R), (HV, R, K), (HV, R)]
    projections = [x.g.new_empty(shape) for shape in shapes]
    return [*heads, written[5], *projections, *written[6:]]


def keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, kind, rms, chunk_size, scale, top, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.options = (kind, rms, chunk_size, scale, top)
    ctx.save_for_backward(*tensors[:12], *output[4:])


def differentiate(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
    *x, memory, contents, means = ctx.saved_tensors
    do, *ends = d_outputs[:4]
    do = torch.zeros_like(x[2]) if do is None else do.to(x[2].dtype).contiguous()
    ends = each(Tensor.contiguous, ends)
    found = backward(*x, memory, contents, means, do, *ends, *ctx.options)
    gradients = [None if y is None else dy for y, dy in zip(x[:9], found, strict=False)]
    state = [dy if dy.numel() else None for dy in found[9:]]
    return *gradients, None, None, *state, *[None] * 7


forward = Operator("portable_forward", run_forward, fake_forward, differentiate, keep_for_backward)
backward = Operator("portable_backward", run_backward, fake_backward, refuse_second_derivative)
fused = functools.partial(run_sequences, forward)  # what the public op calls
