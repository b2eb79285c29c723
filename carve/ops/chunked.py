"""CARVE by chunks, in plain torch: matrix products inside a step, steps in order.

A step is at most `STEP` tokens of one content chunk of one sequence. With G the cumulative sum of g
inside the step, and for tokens i > j of it,

    A_ij  = sum_d b_i k_i k_j exp(G_i - G_j)          M_ij = scale sum_d q_i k_j exp(G_i - G_j)   (i >= j)
    v_new = (I + A)^-1 (a v - (b k exp G) S)          one triangular system a step and head
    o     = scale (q exp G) S + M v_new
    S    <- Diag(exp G_C) S + (k exp(G_C - G))^T v_new

Only the gates b and a depend on the content, so everything else is prepared for many steps at once.

Decay is never divided out over more than one block of `BLOCK` tokens: exp(G_i - G_j) is split at the first
token of i's block, where both factors are at most 1 if j lies in an earlier block. Inside a block the
second factor may grow to exp(-G_j), which is safe while the block decays by less than exp(-MILD); a
stronger block takes exp(G_i - G_j) pair by pair. All exponents are sums of g, never differences, so a
strong decay costs no precision in the weak one behind it.

The backward saves the state at each segment of steps, and runs a segment again before it differentiates it.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from carve.ops.recurrence import Options, Projections, Tokens, close_chunk, gates, head_first
from carve.ops.state import CarveState

STEP = 64  # tokens in a triangular system
BLOCK = 16  # tokens over which decay may be divided out
MILD = 40.0  # exp(40) leaves float32 room for products of 1e20 on either side
SEGMENT = 256  # tokens that are prepared, and run again in the backward, together


class Grid(NamedTuple):
    """The order of work. A slot is one step of one sequence; slots lie step by step, longest sequence first.

    As sequences end, fewer are active: those of a step are always the first ones of the step before.
    """

    order: Tensor  # [N] sequences, the one with most steps first
    active: list[int]  # sequences in each step
    tokens: Tensor  # [slots, lanes] index of the token in the flattened batch, -1 for an empty lane
    closes: Tensor  # [slots] whether the slot holds the last token of a full chunk
    position: Tensor  # [N] tokens in the current chunk when all is done


def lay_grid(lengths: Tensor, position: Tensor, chunk_size: int) -> Grid:
    """Schedule N sequences of `lengths` tokens, which start at `position` in a chunk (`[N]`, int64, CPU)."""
    width = min(chunk_size, STEP)
    lanes = width if width <= BLOCK else -(-width // BLOCK) * BLOCK
    steps_a_chunk = -(-chunk_size // width)

    sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths)  # of each token
    local = torch.arange(len(sequence)) - (lengths.cumsum(0) - lengths)[sequence]
    at = position[sequence] + local  # counted from the start of the sequence's first chunk
    in_chunk = at % chunk_size
    step = at // chunk_size * steps_a_chunk + in_chunk // width - (position // width)[sequence]
    lane = in_chunk % width - torch.where(step == 0, (position % width)[sequence], 0)

    steps = torch.zeros_like(lengths)  # of each sequence
    steps[lengths > 0] = step[lengths.cumsum(0)[lengths > 0] - 1] + 1
    order = torch.argsort(steps, descending=True, stable=True)
    active = (len(steps) - torch.bincount(steps).cumsum(0))[:-1]
    first_slot = pad(active.cumsum(0), (1, 0))

    slot = first_slot[step] + torch.argsort(order)[sequence]
    tokens = torch.full((int(first_slot[-1]), lanes), -1)
    tokens[slot, lane] = torch.arange(len(sequence))
    closes = torch.zeros(len(tokens), dtype=torch.bool)
    closes[slot[in_chunk == chunk_size - 1]] = True
    return Grid(order, active.tolist(), tokens, closes, (position + lengths) % chunk_size)


class Pairs(NamedTuple):
    """The F blocks that decay too strongly to divide, with k_j exp(G_i - G_j) pair by pair."""

    slot: Tensor  # [F], ascending
    head: Tensor  # [F]
    block: Tensor  # [F]
    k: Tensor  # [F, BLOCK (i), BLOCK (j), K], 0 for i < j

    def split(self, slots: list[int]) -> list["Pairs"]:
        """Those of the first `slots[0]` slots, of the next `slots[1]`, and so on, each counted from its first."""
        ends = torch.tensor([0, *slots], device=self.slot.device).cumsum(0)
        counts = torch.searchsorted(self.slot, ends).diff().tolist()
        parts = zip(ends.tolist(), *(x.split(counts) for x in self), strict=False)
        return [Pairs(slot - first, head, block, k) for first, slot, head, block, k in parts]


def decayed_products(rows: Tensor, exp_upto: Tensor, k_col: Tensor, pairs: Pairs) -> Tensor:
    """sum_d rows_i k_j exp(G_i - G_j), `[slots, HV, L, L]`; right for i >= j only, to be masked elsewhere.

    rows, exp_upto: `[slots, HV, L, K]`; k_col: `[slots, HV, blocks, L, K]`.
    """
    slots, heads, blocks, L, K = k_col.shape
    in_blocks = (slots, heads, blocks, L // blocks, K)
    products = (rows * exp_upto).view(in_blocks) @ k_col.mT  # [slots, HV, blocks, BLOCK, L]
    if len(pairs.slot):  # the others left these diagonal blocks 0
        at = (pairs.slot, pairs.head, pairs.block)
        diagonal = (pairs.k @ rows.view(in_blocks)[at].unsqueeze(-1)).squeeze(-1)
        products = products.view(*in_blocks[:4], blocks, L // blocks)
        products[(*at, slice(None), pairs.block)] = diagonal
    return products.view(slots, heads, L, L)


class Prepared(NamedTuple):
    """What of the slots does not depend on the content; L lanes are `blocks` of at most `BLOCK` tokens."""

    k: Tensor  # [slots, HV, L, K]
    v: Tensor  # [slots, HV, L, V]
    e: Tensor  # [slots, HV, L, K]
    w: Tensor | None  # [slots, HV, L]
    exp_upto: Tensor  # [slots, HV, L, K]: exp(G_i - G at the start of i's block)
    k_col: Tensor  # [slots, HV, blocks (of i), L, K]: k_j exp(G at the start of i's block - G_j)
    exp_G: Tensor  # [slots, HV, L, K]
    q_in: Tensor  # [slots, HV, L, K]: scale q exp G
    k_out: Tensor  # [slots, HV, L, K]: k exp(G_C - G)
    M: Tensor  # [slots, HV, L, L]
    decay: Tensor  # [slots, HV, K, 1]: exp G_C

    def split(self, slots: list[int]) -> "list[Prepared]":
        """The first `slots[0]` slots, the next `slots[1]`, and so on."""
        columns = ([None] * len(slots) if x is None else x.split(slots) for x in self)
        return [Prepared(*row) for row in zip(*columns, strict=True)]


def prepare(x: Tokens, options: Options) -> tuple[Prepared, Pairs]:
    """x: `[slots, L, H, ...]`, zeros in the empty lanes."""
    q, k, v, g, e, w = head_first(x, options)
    q = q * options.scale
    slots, heads, L, K = k.shape
    size = min(BLOCK, L)
    blocks = L // size
    in_blocks = (slots, heads, blocks, size, K)
    g, k_blocks = g.reshape(in_blocks), k.reshape(in_blocks)

    # -- sums of g: products with zeros and ones, so that terms are only added and nothing cancels --
    i, j, t = torch.meshgrid(*[torch.arange(blocks, device=g.device)] * 3, indexing="ij")
    ones = g.new_ones(size, size)
    upto = ones.tril() @ g  # over the tokens of the block up to and with this one
    after = ones.triu(1) @ g  # over those behind it
    total = upto[..., -1, :]  # over the block, [slots, HV, blocks, K]
    before_block = (t < i)[:, 0].to(g) @ total
    after_block = (t > i)[:, 0].to(g) @ total
    between = ((j < t) & (t < i)).to(g).flatten(0, 1) @ total  # [slots, HV, blocks * blocks, K]

    # -- exp(G_i - G_j), split at the start of i's block --
    exp_upto, k_after = upto.exp(), k_blocks * after.exp()
    earlier = (j < i)[..., 0].view(blocks, blocks, 1, 1)
    k_col = k_after.unsqueeze(2) * (between.exp().view(slots, heads, blocks, blocks, 1, K) * earlier)
    strong = (total < -MILD).any(-1)
    k_divided = k_blocks * (-upto.masked_fill(strong[..., None, None], 0)).exp()
    k_col.diagonal(0, 2, 3).copy_(k_divided.masked_fill(strong[..., None, None], 0).movedim(2, -1))
    k_col = k_col.view(slots, heads, blocks, L, K)
    at = strong.nonzero(as_tuple=True)
    i, j, t = torch.meshgrid(*[torch.arange(size, device=g.device)] * 3, indexing="ij")
    apart = (((j < t) & (t <= i)).to(g).flatten(0, 1) @ g[at]).view(-1, size, size, K)
    pairs = Pairs(*at, apart.exp() * ones.tril().unsqueeze(-1) * k_blocks[at].unsqueeze(1))

    exp_G = (exp_upto * before_block.exp().unsqueeze(-2)).view(k.shape)
    exp_upto = exp_upto.view(k.shape)
    k_out = (k_after * after_block.exp().unsqueeze(-2)).view(k.shape)
    M = decayed_products(q, exp_upto, k_col, pairs).tril()
    decay = total.sum(2).exp().unsqueeze(-1)
    return Prepared(k, v, e, w, exp_upto, k_col, exp_G, q * exp_G, k_out, M, decay), pairs


class Segment(NamedTuple):
    """Steps that are prepared together."""

    active: list[int]  # sequences in each step
    tokens: Tensor  # [slots, L]
    closes: Tensor  # [slots]


def cut_segments(grid: Grid, device: torch.device) -> list[Segment]:
    """Cut a grid into runs of steps of about `SEGMENT` tokens, at least one step each."""
    segments, step, slot = [], 0, 0
    while step < len(grid.active):
        active = grid.active[step : step + max(1, SEGMENT // (grid.active[step] * grid.tokens.shape[1]))]
        slots = slice(slot, slot + sum(active))
        segments.append(Segment(active, grid.tokens[slots].to(device), grid.closes[slots].to(device)))
        step, slot = step + len(active), slots.stop
    return segments


def run_steps(
    segment: Segment, x: Tokens, p: Projections, begin: Sequence[Tensor | None], options: Options
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Run the steps of a segment for the sequences that are active in the first of them.

    Args:
        x: inputs of the slots, `[slots, L, H, ...]`, zeros in the empty lanes.
        begin: memory, content and content_sum of these sequences.

    Returns:
        o `[slots, L, HV, V]` in the compute dtype, and memory, content and content_sum afterwards.
    """
    with torch.autocast(x.v.device.type, enabled=False):
        prepared, pairs = prepare(x, options)
        memory, content, content_sum = begin
        outputs, ended = [], []
        for n, full, step, strong in zip(
            segment.active,
            segment.closes.split(segment.active),
            prepared.split(segment.active),
            pairs.split(segment.active),
            strict=True,
        ):
            if n < len(memory):  # some sequences have come to their end
                ended.append(each(lambda y: y[n:], (memory, content, content_sum)))
                memory, content, content_sum = each(lambda y: y[:n], (memory, content, content_sum))
            b, a = gates(step.k, step.e, step.w, content, p, options)
            bk = b * step.k
            A = decayed_products(bk, step.exp_upto, step.k_col, strong)
            u = (step.v if a is None else a * step.v) - (bk * step.exp_G) @ memory
            v_new = torch.linalg.solve_triangular(A, u, upper=False, unitriangular=True)  # of A, what is below
            o = step.q_in @ memory + step.M @ v_new
            memory = step.decay * memory + step.k_out.mT @ v_new
            if content_sum is not None:
                content_sum = content_sum + o.sum(-2)
            content, content_sum = close_chunk(memory, content, content_sum, full, p, options)
            outputs.append(o)
        rows = zip((memory, content, content_sum), *reversed(ended), strict=True)
        return torch.cat(outputs).transpose(1, 2), *(None if y[0] is None else torch.cat(y) for y in rows)


def gather(x: Tensor, tokens: Tensor) -> Tensor:
    """`[all tokens, ...]` to `[slots, L, ...]`, zeros in the empty lanes."""
    y = x.index_select(0, tokens.clamp(min=0).flatten()).view(*tokens.shape, *x.shape[1:])
    empty = tokens < 0
    return y.masked_fill_(empty.view(*tokens.shape, *[1] * (x.dim() - 1)), 0) if empty.any() else y


def scatter(y: Tensor, tokens: Tensor, out: Tensor) -> None:
    """`[slots, L, ...]` into its places in `out`, `[all tokens, ...]`; empty lanes are dropped."""
    held = tokens >= 0
    out[tokens[held]] = y[held].to(out.dtype)


def each(function: Callable[[Any], Any], tensors: Iterable[Tensor | None]) -> list[Any]:
    """`function` of every tensor, None where there is none."""
    return [None if x is None else function(x) for x in tensors]


class ChunkCarve(torch.autograd.Function):
    """All segments in order; keeps the inputs and each segment's first state for the backward.

    `tensors`: 6 of `Tokens`, `[all tokens, H, ...]`; 3 of `Projections`; memory, content and content_sum of
    the sequences in the order of the grid. Returns o and the last three.
    """

    @staticmethod
    def forward(ctx: Any, segments: list[Segment], options: Options, *tensors: Tensor | None) -> Any:
        x, p, state = tensors[:6], Projections(*tensors[6:9]), each(torch.clone, tensors[9:])
        assert x[2] is not None
        o, begins = torch.empty_like(x[2]), []
        for segment in segments:
            begin = each(lambda y: y[: segment.active[0]].clone(), state)  # noqa: B023
            begins += begin if any(ctx.needs_input_grad) else []
            inputs = Tokens(*each(lambda y: gather(y, segment.tokens), x))  # noqa: B023
            o_slots, *end = run_steps(segment, inputs, p, begin, options)
            scatter(o_slots, segment.tokens, o)
            for y, y_end in zip(state, end, strict=True):
                if y is not None:
                    y[: segment.active[0]] = y_end
        ctx.segments, ctx.options = segments, options
        ctx.save_for_backward(*tensors[:9], *begins)
        return o, *state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do: Tensor, *dstate_end: Tensor | None) -> Any:
        saved = ctx.saved_tensors
        x, p, begins = saved[:6], saved[6:9], saved[9:]
        dx, dp, dstate = each(torch.zeros_like, x), each(torch.zeros_like, p), each(torch.clone, dstate_end)
        for i, segment in reversed(list(enumerate(ctx.segments))):
            rows = segment.active[0]
            inputs = each(lambda y: gather(y, segment.tokens), x)  # noqa: B023
            leaves = each(lambda y: y.detach().requires_grad_(), [*inputs, *p, *begins[3 * i : 3 * i + 3]])
            with torch.enable_grad():
                o, *end = run_steps(segment, Tokens(*leaves[:6]), Projections(*leaves[6:9]), leaves[9:], ctx.options)
            douts = [gather(do, segment.tokens).to(o.dtype), *each(lambda dy: dy[:rows], dstate)]  # noqa: B023
            found = iter(
                torch.autograd.grad(
                    [y for y in (o, *end) if y is not None],
                    [y for y in leaves if y is not None],
                    [dy for dy in douts if dy is not None],
                    materialize_grads=True,
                )
            )
            grads = each(lambda _: next(found), leaves)  # noqa: B023
            for dy, out in zip(grads[:6], dx, strict=True):
                if out is not None:
                    scatter(dy, segment.tokens, out)
            for dy, out in zip(grads[6:9], dp, strict=True):
                if out is not None:
                    out += dy
            for dy, out in zip(grads[9:], dstate, strict=True):
                if out is not None:
                    out[:rows] = dy
        return None, None, *dx, *dp, *dstate


def chunked(
    x: Tokens, p: Projections, state: CarveState, options: Options, lengths: Tensor
) -> tuple[Tensor, CarveState]:
    """Run N sequences of `lengths` tokens (`[N]` int64 on the CPU), one behind the other in x.

    Args:
        x: inputs, `[B, T, ...]`: N rows of T tokens, or one row of N packed sequences.
        p: content projections in the compute dtype.
        state: the state before the first tokens.

    Returns:
        o `[B, T, HV, V]` in v's dtype, and the state after the last tokens.
    """
    grid = lay_grid(lengths, state.position.cpu(), options.chunk_size)
    device = x.v.device
    order = grid.order.to(device)
    flat = each(lambda y: y.flatten(0, 1), x)
    begin = each(lambda y: y.index_select(0, order), state[:3])
    o, *end = ChunkCarve.apply(cut_segments(grid, device), options, *flat, *p, *begin)
    memory, content, content_sum = each(lambda y: y.index_select(0, order.argsort()), end)
    return o.view(x.v.shape), CarveState(memory, content, content_sum, grid.position.to(device))
