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
second factor may grow to exp(-G_j), which is safe for the tokens j up to which the block decays by less than
exp(-MILD); the others take exp(G_i - G_j) pair by pair. All exponents are sums of g, never differences, so a
strong decay costs no precision in the weak one behind it.

The backward saves the state at each segment of steps, and runs a segment again before it differentiates it.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from carve.ops.kernels.operator import needs_gradient
from carve.ops.recurrence import Options, Projections, Tokens, all_or_mask, close_chunk, gates, head_first
from carve.ops.state import CarveState, each

STEP = 64  # tokens in a triangular system
BLOCK = 16  # tokens over which decay may be divided out
MILD = 40.0  # exp(40) leaves float32 room for a factor of 1e20 on either side
GONE = -13.0  # times the bits of a number: exp of it is 0, in float32 and in float64
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

    sequence = torch.repeat_interleave(torch.arange(len(lengths), device="cpu"), lengths)  # of each token
    every = torch.arange(len(sequence), device="cpu")
    local = every - (lengths.cumsum(0) - lengths)[sequence]
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
    tokens = torch.full((int(first_slot[-1]), lanes), -1, device="cpu")
    tokens[slot, lane] = every
    closes = torch.zeros(len(tokens), dtype=torch.bool, device="cpu")
    closes[slot[in_chunk == chunk_size - 1]] = True
    return Grid(order, active.tolist(), tokens, closes, (position + lengths) % chunk_size)


@functools.lru_cache
@torch.inference_mode(False)  # what is kept must serve a backward too
def summing(blocks: int, size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros and ones that add up g by a product: terms are only added, so nothing cancels.

    Returns:
        in_block `[3 size, size]`: g of a block's tokens to sums up to and with each token, behind each token, and
            minus the first; over_blocks `[2 blocks + blocks^2, blocks]`: sums of blocks to those before each block,
            behind each block, and between any two; earlier `[blocks, blocks]`: whether j is before i.
    """
    ones = torch.ones(size, size, dtype=dtype, device=device)
    in_block = torch.cat([ones.tril(), ones.triu(1), -ones.tril()])
    i, j, t = torch.meshgrid(*[torch.arange(blocks, device=device)] * 3, indexing="ij")
    over_blocks = torch.cat([(t < i)[:, 0], (t > i)[:, 0], ((j < t) & (t < i)).flatten(0, 1)]).to(dtype)
    return in_block, over_blocks, (j < i)[..., 0].to(dtype)


class Pairs(NamedTuple):
    """The F blocks with tokens j that decay too strongly to divide, and k_j exp(G_i - G_j) of these, pair by pair."""

    row: Tensor  # [F], ascending
    block: Tensor  # [F]
    k: Tensor  # [F, BLOCK (i), BLOCK (j), K], 0 for i < j and for the other j

    def split(self, rows: list[int]) -> list["Pairs"]:
        """Those of the first `rows[0]` rows, of the next `rows[1]`, and so on, each counted from its first."""
        if not len(self.row):
            return [self] * len(rows)
        ends = torch.tensor([0, *rows], device=self.row.device).cumsum(0)
        counts = torch.searchsorted(self.row, ends).diff().tolist()
        parts = zip(ends.tolist(), *(x.split(counts) for x in self), strict=False)
        return [Pairs(row - first, block, k) for first, row, block, k in parts]


def pair_up(k: Tensor, g: Tensor, strong: Tensor) -> Pairs:
    """k, g: `[rows, blocks, BLOCK, K]`; strong: `[rows, blocks, BLOCK]` bool, of the tokens j."""
    at = strong.any(-1).nonzero(as_tuple=True)
    size, K = k.shape[-2:]
    i, j, t = torch.meshgrid(*[torch.arange(size, device=g.device)] * 3, indexing="ij")
    apart = (((j < t) & (t <= i)).to(g).flatten(0, 1) @ g[at]).view(-1, size, size, K)  # G_i - G_j
    held = (i >= j)[..., 0] & strong[at].unsqueeze(1)
    return Pairs(at[0], at[1], apart.exp() * held.unsqueeze(-1) * k[at].unsqueeze(1))


def decayed_products(x: Tensor, x_row: Tensor, k_col: Tensor, pairs: Pairs) -> Tensor:
    """sum_d x_i k_j exp(G_i - G_j), `[rows, L, L]`; right for i >= j only, to be masked elsewhere.

    x: `[rows, L, K]`; x_row, k_col: as k_row and k_col of `Prepared`.
    """
    rows, L, K = x_row.shape
    blocks = len(k_col) // rows
    in_blocks = (rows, blocks, L // blocks)
    products = torch.bmm(x_row.view(rows * blocks, -1, K), k_col.mT)
    if len(pairs.row):  # k_col left these columns of the diagonal blocks 0
        at = (pairs.row, pairs.block)
        diagonal = (pairs.k @ x.view(*in_blocks, K)[at].unsqueeze(-1)).squeeze(-1)
        products = products.view(*in_blocks, blocks, L // blocks)
        products[(*at, slice(None), pairs.block)] += diagonal
    return products.view(rows, L, L)


class Prepared(NamedTuple):
    """What does not depend on the content. A row is a head of a slot; its L lanes are blocks of `BLOCK` tokens."""

    k: Tensor  # [rows, L, K]
    v: Tensor  # [rows, L, V]
    e: Tensor  # [rows, L, K]
    w: Tensor | None  # [rows, L, 1]
    q_row: Tensor  # [rows, L, K]: q_i exp(G_i - G at the start of i's block)
    k_row: Tensor  # [rows, L, K]: k_i exp(G_i - G at the start of i's block)
    k_col: Tensor  # [rows * blocks (of i), L, K]: k_j exp(G at the start of i's block - G_j)
    start: Tensor  # [rows, blocks, 1, K]: exp(G at the start of the block)
    k_out: Tensor  # [rows, L, K]: k exp(G_C - G)
    M: Tensor  # [rows, L, L]: sum_d q_i k_j exp(G_i - G_j), 0 for i < j
    decay: Tensor  # [rows, K, 1]: exp G_C

    def split(self, rows: list[int]) -> "list[Prepared]":
        """The first `rows[0]` rows, the next `rows[1]`, and so on."""
        columns = each(lambda x: x.split([n * (len(x) // len(self.k)) for n in rows]), self)
        columns = [[None] * len(rows) if x is None else x for x in columns]
        return [Prepared(*step) for step in zip(*columns, strict=True)]


def prepare(x: Tokens, options: Options) -> tuple[Prepared, Pairs]:
    """x: `[slots, L, H, ...]`, zeros in the empty lanes."""
    q, k, v, g, e, w = each(lambda y: y.flatten(0, 1), head_first(x, options))
    g = g.clamp(min=GONE * torch.finfo(g.dtype).bits)  # nothing is left behind it; of more, sums might be infinite
    rows, L, K = k.shape
    size = min(BLOCK, L)
    blocks = L // size
    in_blocks = (rows, blocks, size, K)
    q, k, g = (y.view(in_blocks) for y in (q, k, g))
    in_block, over_blocks, earlier = summing(blocks, size, g.dtype, g.device)

    # -- exp of sums of g: up to, behind and minus up to each token; before, behind and between blocks --
    sums = in_block @ g
    total = sums[:, :, size - 1].clone()  # [rows, blocks, K]
    strong = (sums[:, :, 2 * size :] > MILD).any(-1)  # [rows, blocks, size]: a token's own, whatever comes behind it
    none = strong.new_empty(0, dtype=torch.int64)
    pairs = pair_up(k, g, strong) if strong.any() else Pairs(none, none, k[:0, 0, :, None])
    if len(pairs.row):
        sums[:, :, 2 * size :].masked_fill_(strong.unsqueeze(-1), 0)  # whose exp would overflow
    upto, behind, minus_upto = sums.exp_().split(size, dim=2)
    before_block, behind_block, between = (over_blocks @ total).exp_().split([blocks, blocks, blocks**2], dim=1)

    # -- exp(G_i - G_j), split at the start of i's block --
    q_row, k_row, k_behind, k_mild = q * upto, k * upto, k * behind, k * minus_upto
    if len(pairs.row):  # after the product: of k itself, gradients of all rows would add up in another order
        k_mild = k_mild.masked_fill(strong.unsqueeze(-1), 0)
    between = between.view(rows, blocks, blocks, 1, K) * earlier.view(blocks, blocks, 1, 1)
    k_col = k_behind.unsqueeze(1) * between
    k_col.diagonal(0, 1, 2).copy_(k_mild.movedim(1, -1))
    k_col = k_col.view(rows * blocks, L, K)

    k_out = k_behind * behind_block.unsqueeze(2)
    k, q, k_row, q_row, k_out = (y.view(rows, L, K) for y in (k, q, k_row, q_row, k_out))
    M = decayed_products(q, q_row, k_col, pairs).tril_()
    decay = total.sum(1).exp().unsqueeze(-1)
    return Prepared(k, v, e, w, q_row, k_row, k_col, before_block.unsqueeze(2), k_out, M, decay), pairs


class Segment(NamedTuple):
    """Steps that are prepared together."""

    active: list[int]  # sequences in each step
    tokens: Tensor | slice  # [slots * L], 0 in the empty lanes; a slice if they follow each other
    held: Tensor | None  # [slots * L] whether the lane holds a token; None if all do
    lanes: int  # L
    closes: list[Tensor | bool]  # of each step, whether a chunk ends there: [sequences], or one for all


def cut_segments(grid: Grid, device: torch.device) -> list[Segment]:
    """Cut a grid into runs of steps of about `SEGMENT` tokens, at least one step each."""
    segments, step, slot = [], 0, 0
    while step < len(grid.active):
        active = grid.active[step : step + max(1, SEGMENT // (grid.active[step] * grid.tokens.shape[1]))]
        slots = slice(slot, slot + sum(active))
        closes = [all_or_mask(full) for full in grid.closes[slots].split(active)]
        closes = [full if isinstance(full, bool) else full.to(device) for full in closes]
        tokens = grid.tokens[slots].flatten()
        held = None if bool((tokens >= 0).all()) else (tokens >= 0).to(device)
        in_order = held is None and bool((tokens.diff() == 1).all())
        places = slice(int(tokens[0]), int(tokens[-1]) + 1) if in_order else tokens.clamp(min=0).to(device)
        segments.append(Segment(active, places, held, grid.tokens.shape[1], closes))
        step, slot = step + len(active), slots.stop
    return segments


def run_steps(segment: Segment, x: Tokens, p: Projections, begin: list[Any], options: Options) -> list[Any]:
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
        heads = x.v.shape[2]
        rows = [n * heads for n in segment.active]
        outputs, ended = [], []
        steps = zip(segment.active, segment.closes, prepared.split(rows), pairs.split(rows), strict=True)
        for n, full, step, strong in steps:
            if n < len(memory):  # some sequences have come to their end
                ended.append(each(lambda y: y[n:], (memory, content, content_sum)))  # noqa: B023
                memory, content, content_sum = each(lambda y: y[:n], (memory, content, content_sum))  # noqa: B023
            # per head, as [n, HV, ...]: what the gates need; the rest per row, as [n * HV, ...]
            k, e, w = each(lambda y: y.view(n, heads, *y.shape[1:]), (step.k, step.e, step.w))  # noqa: B023
            b, a = each(lambda y: y.flatten(0, 1), gates(k, e, w, content, p, options))
            S, q_row, bk_row = memory.flatten(0, 1), step.q_row, b * step.k_row
            A = decayed_products(b * step.k if len(strong.row) else b, bk_row, step.k_col, strong)
            q_in, bk_in = (
                (y.view(*step.start.shape[:2], -1, y.shape[2]) * step.start).view(y.shape) for y in (q_row, bk_row)
            )
            u = torch.baddbmm(step.v if a is None else a * step.v, bk_in, S, alpha=-1)
            v_new = torch.linalg.solve_triangular(A, u, upper=False, unitriangular=True)  # of A, what is below
            o = torch.baddbmm(torch.bmm(q_in, S), step.M, v_new, beta=options.scale, alpha=options.scale)
            memory = torch.baddbmm(step.decay * S, step.k_out.mT, v_new).view(memory.shape)
            o = o.view(n, heads, *o.shape[1:])
            if content_sum is not None:
                content_sum = content_sum + o.sum(-2)
            content, content_sum = close_chunk(memory, content, content_sum, full, p, options)
            outputs.append(o)
        state = zip((memory, content, content_sum), *reversed(ended), strict=True)
        ends = each(torch.cat, (None if parts[0] is None else parts for parts in state))
        return [torch.cat(outputs).transpose(1, 2), *ends]


def gather(x: Tensor, segment: Segment) -> Tensor:
    """`[all tokens, ...]` to `[slots, L, ...]`, zeros in the empty lanes."""
    y = x[segment.tokens]
    if segment.held is not None:
        y.masked_fill_(~segment.held.view(-1, *[1] * (x.dim() - 1)), 0)
    return y.view(-1, segment.lanes, *x.shape[1:])


def scatter(y: Tensor, segment: Segment, out: Tensor) -> None:
    """`[slots, L, ...]` into its places in `out`, `[all tokens, ...]`; empty lanes are dropped."""
    y, tokens = y.flatten(0, 1), segment.tokens
    if segment.held is not None:
        assert isinstance(tokens, Tensor)
        y, tokens = y[segment.held], tokens[segment.held]
    out[tokens] = y.to(out.dtype)


class ChunkCarve(torch.autograd.Function):
    """All segments in order; keeps the inputs and each segment's first state for the backward.

    `differentiated`: whether there is to be a backward; `tensors`: 6 of `Tokens`, `[all tokens, H, ...]`; 3 of
    `Projections`; memory, content and content_sum of the sequences in the order of the grid. Returns o and the last
    three.
    """

    @staticmethod
    def forward(ctx: Any, segments: list[Segment], options: Options, differentiated: bool, *tensors: Any) -> Any:
        x, p, state = tensors[:6], Projections(*tensors[6:9]), each(torch.clone, tensors[9:])
        assert x[2] is not None
        o, begins = torch.empty_like(x[2]), []
        for segment in segments:
            begin = each(lambda y: y[: segment.active[0]].clone(), state)  # noqa: B023
            begins += begin if differentiated else []
            inputs = Tokens(*each(lambda y: gather(y, segment), x))  # noqa: B023
            o_slots, *end = run_steps(segment, inputs, p, begin, options)
            scatter(o_slots, segment, o)
            for y, y_end in zip(state, end, strict=True):
                if y is not None:
                    y[: segment.active[0]] = y_end
        ctx.segments, ctx.options = segments, options
        ctx.save_for_backward(*tensors[:9], *begins)
        return o, *state

    @staticmethod
    def backward(ctx: Any, do: Tensor, *dstate_end: Tensor | None) -> Any:
        if torch.is_grad_enabled():  # once_differentiable would let torch.autograd.grad leave this part out, unsaid
            raise NotImplementedError(
                "create_graph=True asks for a second derivative of chunk_carve, which it has not: recurrent_carve has"
            )
        saved = ctx.saved_tensors
        x, p, begins = saved[:6], saved[6:9], saved[9:]
        dx, dp, dstate = each(torch.zeros_like, x), each(torch.zeros_like, p), each(torch.clone, dstate_end)
        for i, segment in reversed(list(enumerate(ctx.segments))):
            rows = segment.active[0]
            inputs = each(lambda y: gather(y, segment), x)  # noqa: B023
            leaves = each(lambda y: y.detach().requires_grad_(), [*inputs, *p, *begins[3 * i : 3 * i + 3]])
            with torch.enable_grad():
                o, *end = run_steps(segment, Tokens(*leaves[:6]), Projections(*leaves[6:9]), leaves[9:], ctx.options)
            douts = [gather(do, segment).to(o.dtype), *each(lambda dy: dy[:rows], dstate)]  # noqa: B023
            outputs = [(y, dy) for y, dy in zip((o, *end), douts, strict=True) if y is not None and y.requires_grad]
            wanted = [y for y in leaves if y is not None]
            ends, dends = zip(*outputs, strict=True)
            with torch.autocast(do.device.type, enabled=False):  # else a backward called under it rounds the products
                found = iter(torch.autograd.grad(ends, wanted, dends, materialize_grads=True))
            grads = each(lambda _: next(found), leaves)  # noqa: B023
            for dy, out in zip(grads[:6], dx, strict=True):
                if out is not None:
                    scatter(dy, segment, out)
            for dy, out in zip(grads[6:9], dp, strict=True):
                if out is not None:
                    out += dy
            for dy, out in zip(grads[9:], dstate, strict=True):
                if out is not None:
                    out[:rows] = dy
        return None, None, None, *dx, *dp, *dstate


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
    tensors = [*flat, *p, *begin]
    o, *end = ChunkCarve.apply(cut_segments(grid, device), options, needs_gradient(tensors), *tensors)
    memory, content, content_sum = each(lambda y: y.index_select(0, order.argsort()), end)
    return o.view(x.v.shape), CarveState(memory, content, content_sum, grid.position.to(device))
