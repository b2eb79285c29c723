"""The portable GPU kernels of the forward, and the steps that the backward shares with them.

Three kernels, one behind the other. A sequence is cut into blocks: at most 16 tokens of one content chunk.

    list_blocks   one program a sequence: which tokens each block holds
    prepare       one program a block and value head: all that does not depend on the state
    run_blocks    one program a sequence and value head (and tile of V): the state through the blocks in order

With G the sum of g inside a block, and D its decay exp G_16,

    A_ij  = sum_d b_i k_i k_j exp(G_i - G_j)  (i > j)      M_ij = scale sum_d q_i k_j exp(G_i - G_j)  (i >= j)
    T     = (I + A)^-1                                     v_new = T (a v - (b k exp G) S)
    o     = (scale q exp G) S + M v_new                    S <- D S + (k exp(G_16 - G))^T v_new

The state lies transposed, S^T [V, K], fp32. A block is strong if a channel decays by more than exp(-MILD) in it. In a
mild one, x = k exp(-G) gives A, M and, times D, the keys that enter the state. In a strong one x is k exp(G_16 - G),
and A and M are put together from halves of halves of the block: the decay between a token of the upper and one of the
lower half splits at the border into two factors of at most 1. No exponent exceeds MILD.

Tiles are padded to powers of two with zeros: BK, BV and BR columns in place of K, V and R.
"""

import triton
import triton.language as tl

BLOCK = tl.constexpr(16)
MILD = tl.constexpr(40.0)  # exp(40) leaves fp32 and bf16 room for a factor of 1e20 on either side
GONE = tl.constexpr(-110.0)  # exp(-110) is 0 in fp32: stronger decays need no telling apart, and their sums stay small
SHARE = tl.constexpr(16)  # blocks that a program looks through for strong ones, which are rare
FIELDS = tl.constexpr(3)  # of a block: first token in the batch, tokens (0: no block), chunk among all saved ones

# -- sequences, chunks and blocks --


@triton.jit
def find_sequence(bounds, positions, n, T):
    """First token in the batch, tokens, and tokens of the first chunk that came before them, of sequence n."""
    if bounds is None:
        begin = n.to(tl.int64) * T
        length = T
    else:
        begin = tl.load(bounds + n)
        length = (tl.load(bounds + n + 1) - begin).to(tl.int32)
    if positions is None:
        position = 0
    else:
        position = tl.load(positions + n).to(tl.int32)
    return begin, length, position


@triton.jit
def first_slot(begin, n, C):
    """Where the blocks of sequence n begin among all: L tokens make at most L / 16 + 2 blocks, or a chunk one more."""
    slot = begin // BLOCK + 2 * n
    if C % BLOCK != 0:
        slot += begin // C
    return slot


@triton.jit
def first_chunk(begin, n, C):
    """Where the chunks of sequence n begin among all: L tokens touch at most L / C + 2."""
    return begin // C + 2 * n


@triton.jit
def count_blocks(length, position, C):
    first = tl.minimum(C - position, length)  # tokens of the first chunk
    rest = length - first
    return tl.cdiv(first, BLOCK) + rest // C * tl.cdiv(C, BLOCK) + tl.cdiv(rest % C, BLOCK)


@triton.jit
def find_block(i, length, position, C):
    """First token, tokens and chunk of block i of a sequence, and the chunk's first token."""
    first = tl.minimum(C - position, length)
    later = i - tl.cdiv(first, BLOCK)
    a_chunk = tl.cdiv(C, BLOCK)
    chunk = tl.where(later < 0, 0, 1 + later // a_chunk)
    start = tl.where(later < 0, 0, first + (chunk - 1) * C)
    token = start + BLOCK * tl.where(later < 0, i, later % a_chunk)
    end = tl.where(later < 0, first, tl.minimum(length, start + C))
    return token, tl.minimum(BLOCK, end - token), chunk, start


@triton.jit(do_not_specialize=["T", "C"])
def list_blocks(bounds, positions, blocks, starts, T, C, STEP: tl.constexpr):
    """blocks: `[slots, FIELDS]` int64, zeros before; program n fills in the blocks of sequence n.

    starts, if given: `[chunks]` int64, zeros before; the first block of each chunk but a sequence's first.
    """
    n = tl.program_id(0)
    begin, length, position = find_sequence(bounds, positions, n, T)
    slot, chunk_slot = first_slot(begin, n, C), first_chunk(begin, n, C)
    total = count_blocks(length, position, C)
    for first in range(0, total, STEP):
        i = first + tl.arange(0, STEP)
        token, count, chunk, start = find_block(i, length, position, C)
        to = blocks + (slot + i) * FIELDS
        tl.store(to, begin + token, mask=i < total)
        tl.store(to + 1, count.to(tl.int64), mask=i < total)
        tl.store(to + 2, chunk_slot + chunk, mask=i < total)
        if starts is not None:
            tl.store(starts + chunk_slot + chunk, slot + i, mask=(i < total) & (token == start) & (chunk > 0))


# -- decays --


@triton.jit
def load_decays(at, held):
    """Log decays, at least GONE. NaN stays NaN."""
    return tl.maximum(tl.load(at, mask=held, other=0.0), GONE, propagate_nan=tl.PropagateNan.ALL)


# -- products of a strong block --


# Level 0 to 3 of halves: 1, 2, 4, 8 tokens. The loops over them are not unrolled, which would take too many registers.
# What comes from a product and goes into another has K or V rows: Triton gives each warp a share of the rows alone.


@triton.jit
def half_decays(gt, level, WIDE: tl.constexpr):
    """exp of the sum of g between each token and the border of its two halves, `[BK, 16]`. Terms are only added."""
    t, i = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    border = ((i >> level) | 1) << level  # first token of the upper half
    between = ((t >= border) & (t <= i)) | ((t > i) & (t < border))
    return tl.exp(tl.dot(gt, between.to(tl.float32), input_precision=WIDE))


@triton.jit
def across(P, level):
    """P_ij for i in an upper and j in the lower half beside it, else 0."""
    i, j = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    return tl.where(((i >> level) ^ 1 == j >> level) & (i > j), P, 0.0)


@triton.jit
def strong_products(xt, kt, gt, LOW: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr):
    """sum_d x_i k_j exp(G_i - G_j) for i > j, else 0; xt, kt, gt: `[BK, 16]` fp32."""
    P = tl.zeros([16, 16], tl.float32)
    for level in tl.range(4, num_stages=1, loop_unroll_factor=1):
        f = half_decays(gt, level, WIDE)
        product = tl.dot(tl.trans((xt * f).to(LOW)), (kt * f).to(LOW), input_precision=PRECISION)
        P += across(product, level)
    return P


@triton.jit
def solve(A, PRECISION: tl.constexpr):
    """(I + stril A)^-1, `[16, 16]`, by inverses of halves: [[P, 0], [Q, R]] has [[P^-1, 0], [-R^-1 Q P^-1, R^-1]]."""
    i, j = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    T = tl.where(i == j, 1.0, 0.0) - across(A, 0)
    for level in tl.static_range(1, 4):
        half = tl.dot(T, across(A, level), input_precision=PRECISION)
        T -= tl.dot(half, T, input_precision=PRECISION)
    return T


# -- what the gates see --


@triton.jit
def load_up(p_up, head, o_k, R, K: tl.constexpr, BR: tl.constexpr):
    """Columns o_k of P_up of a head, `[BR, size of o_k]`."""
    o_r = tl.arange(0, BR)[:, None]
    return tl.load(p_up + (head * R + o_r) * K + o_k[None, :], mask=(o_r < R) & (o_k < K)[None, :], other=0.0)


@triton.jit
def load_write(p_write, head, R, BR: tl.constexpr):
    """p_write of a head, `[BR]`."""
    o_r = tl.arange(0, BR)
    return tl.load(p_write + head * R + o_r, mask=o_r < R, other=0.0)


@triton.jit
def point_Z(contents, at, R, K: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr):
    """Row `at` of Z `[..., K, R]` as `[BK, BR]` pointers, and which of them hold."""
    o_k, o_r = tl.arange(0, BK)[:, None], tl.arange(0, BR)[None, :]
    return contents + (at * K + o_k) * R + o_r, (o_k < K) & (o_r < R)


@triton.jit
def norm_mean(seen, R, RMS: tl.constexpr):
    """z `[BR]`, the norm of the content, and 1 / its size."""
    root = tl.sum(seen * 0.0, 0) + 1.0
    if RMS:
        root = tl.rsqrt(tl.sum(seen * seen, 0) / R + 1e-8)
    return seen * root, root


@triton.jit
def see_mean(seen, p_up, p_write, head, o_k, R, K: tl.constexpr, BR: tl.constexpr, RMS: tl.constexpr):
    """What the content `[BR]` adds to the erase logits of channels o_k, and to the write logits."""
    z, root = norm_mean(seen, R, RMS)
    erase = tl.zeros(o_k.shape, tl.float32)
    write = tl.sum(z * 0.0, 0)
    if p_up is not None:
        erase = tl.sum(z[:, None] * load_up(p_up, head, o_k, R, K, BR), 0)
    if p_write is not None:
        write = tl.sum(z * load_write(p_write, head, R, BR), 0)
    return erase, write


@triton.jit
def read_memory(k, Z, R, RMS: tl.constexpr, PRECISION: tl.constexpr):
    """z^T `[BR, 16]` and 1 / its size `[16]`, of 16 tokens, from keys k `[16, BK]` and Z `[BK, BR]`."""
    zt = tl.trans(tl.dot(k, Z.to(k.dtype), input_precision=PRECISION))
    root = tl.sum(zt * 0.0, 0) + 1.0
    if RMS:
        root = tl.rsqrt(tl.sum(zt * zt, 0) / R + 1e-8)
    return zt * root[None, :], root


@triton.jit
def see_memory(
    k,
    Z,
    p_up,
    p_write,
    head,
    R,
    K: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    RMS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What the content adds to the erase logits of 16 tokens, `[16, BK]`, and to their write logits, `[16]`."""
    zt, root = read_memory(k, Z, R, RMS, PRECISION)
    erase = tl.zeros([16, BK], tl.float32)
    write = tl.sum(zt * 0.0, 0)
    if p_up is not None:
        up = load_up(p_up, head, tl.arange(0, BK), R, K, BR).to(k.dtype)
        erase = tl.trans(tl.dot(tl.trans(up), zt.to(k.dtype), input_precision=PRECISION))
    if p_write is not None:
        write = tl.sum(zt * load_write(p_write, head, R, BR)[:, None], 0)
    return erase, write


# -- the kernels --


@triton.jit
def has_block(i, at, blocks, strong, slots, STRONG: tl.constexpr):
    """Whether slots i hold a block, a strong one if STRONG."""
    if STRONG:
        return tl.load(strong + at, mask=i < slots, other=0) != 0
    return tl.load(blocks + i * FIELDS + 1, mask=i < slots, other=0) != 0


@triton.jit
def any_block(first, head, blocks, strong, slots, HV: tl.constexpr, STRONG: tl.constexpr):
    """Whether a program that begins with slot `first` has anything to do."""
    i = first.to(tl.int64) + tl.arange(0, SHARE if STRONG else 1)
    return tl.max(has_block(i, i * HV + head, blocks, strong, slots, STRONG).to(tl.int32), 0) != 0


@triton.jit(do_not_specialize=["R", "slots"])
def prepare(
    q,
    k,
    g,
    e,
    w,
    p_up,
    p_write,
    contents,
    blocks,
    q_in,
    x,
    k_in,
    M,
    decay,
    strong,
    T,
    a,
    slope,
    scale,
    top,
    R,
    slots,
    H: tl.constexpr,
    HV: tl.constexpr,
    H_g: tl.constexpr,
    H_e: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    CONTENT: tl.constexpr,
    RMS: tl.constexpr,
    GATED: tl.constexpr,
    STRONG: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Writes, for each block and value head: q_in = scale q exp G, x, M, D, and whether the block is strong.

    Without the gates, because the content is not known: k_in = k exp G. With them (GATED): k_in = b k exp G, T, the
    write gates a, and if asked for slope = b (1 - b / top) k exp G (of a strong block b (1 - b / top) k).

    A first launch takes every block for a mild one, a second (STRONG) writes the strong ones anew: a kernel that has
    both ways would hold twice the registers.

    Shapes: q_in, x, k_in, slope `[slots, HV, 16, K]`; M, T `[slots, HV, 16, 16]`; decay `[slots, HV, K]` fp32;
    strong `[slots, HV]` int32, zeros before; a `[slots, HV, 16]` fp32.
    """
    head = tl.program_id(0) % HV
    first = tl.program_id(0) // HV * (SHARE if STRONG else 1)
    if not any_block(first, head, blocks, strong, slots, HV, STRONG):
        return
    LOW: tl.constexpr = x.dtype.element_ty
    rows, o_k = tl.arange(0, 16), tl.arange(0, BK)
    for j in tl.range(0, SHARE if STRONG else 1, num_stages=1, loop_unroll_factor=1):
        i = (first + j).to(tl.int64)
        at = i * HV + head
        if has_block(i, at, blocks, strong, slots, STRONG):
            token, count = tl.load(blocks + i * FIELDS), tl.load(blocks + i * FIELDS + 1)
            held = (rows < count)[:, None] & (o_k < K)[None, :]
            o_key = (token * H + head // (HV // H)) * K + rows[:, None] * (H * K) + o_k[None, :]
            b_k = tl.load(k + o_key, mask=held, other=0.0)
            o_g = (token * H_g + head // (HV // H_g)) * K + rows[:, None] * (H_g * K) + o_k[None, :]
            b_g = load_decays(g + o_g, held)

            # -- decays --
            G = tl.cumsum(b_g, 0)
            total = tl.sum(b_g, 0)
            if not STRONG:
                tl.store(strong + at, (tl.min(total, 0) < -MILD).to(tl.int32))
            inward = tl.exp(G)
            wide_k = b_k.to(tl.float32)
            wide_q = tl.load(q + o_key, mask=held, other=0.0).to(tl.float32) * scale
            b_q_in = (wide_q * inward).to(LOW)
            b_x = (wide_k * tl.exp(total[None, :] - G if STRONG else -G)).to(LOW)
            o_16K = at * (16 * K) + rows[:, None] * K + o_k[None, :]
            columns = (o_k < K)[None, :]
            tl.store(q_in + o_16K, b_q_in, mask=columns)
            tl.store(x + o_16K, b_x, mask=columns)
            tl.store(decay + at * K + o_k, tl.exp(total), mask=o_k < K)

            # -- M --
            r, c = rows[:, None], rows[None, :]
            if STRONG:
                b_M = strong_products(tl.trans(wide_q), tl.trans(wide_k), tl.trans(b_g), LOW, PRECISION, WIDE)
                b_M = tl.where(r == c, tl.sum(wide_q * wide_k, 1)[:, None], b_M)
            else:
                b_M = tl.where(r >= c, tl.dot(b_q_in, tl.trans(b_x), input_precision=PRECISION), 0.0)
            o_16 = at * 256 + r * 16 + c
            tl.store(M + o_16, b_M)

            # -- gates --
            b_k_in = (wide_k * inward).to(LOW)
            if GATED:
                o_e = (token * H_e + head // (HV // H_e)) * K + rows[:, None] * (H_e * K) + o_k[None, :]
                logits = tl.load(e + o_e, mask=held, other=0.0).to(tl.float32)
                b_a = tl.full([16], 1.0, tl.float32)
                write = tl.zeros([16], tl.float32)
                if CONTENT > 0:
                    chunk = tl.load(blocks + i * FIELDS + 2) * HV + head
                    if CONTENT == 1:
                        o_r = tl.arange(0, BR)
                        seen = tl.load(contents + chunk * R + o_r, mask=o_r < R, other=0.0)
                        erase, write_all = see_mean(seen, p_up, p_write, head, o_k, R, K, BR, RMS)
                        logits += erase[None, :]
                        write += write_all
                    else:
                        from_Z, Z_held = point_Z(contents, chunk, R, K, BK, BR)
                        Z = tl.load(from_Z, mask=Z_held, other=0.0)
                        erase, write = see_memory(b_k.to(LOW), Z, p_up, p_write, head, R, K, BK, BR, RMS, PRECISION)
                        logits += erase
                if w is not None:
                    write += tl.load(w + (token + rows) * HV + head, mask=rows < count, other=0.0)
                    b_a = tl.sigmoid(write)
                tl.store(a + at * 16 + rows, b_a)
                b = tl.sigmoid(logits)
                if slope is not None:
                    b_slope = top * b * (1 - b) * (wide_k if STRONG else wide_k * inward)
                    tl.store(slope + o_16K, b_slope.to(LOW), mask=columns)
                b *= top
                b_k_in = (b * b_k_in.to(tl.float32)).to(
                    LOW
                )  # rounded as run_blocks does, so that a zero P_up changes no bit
                if STRONG:
                    A = strong_products(tl.trans(b * wide_k), tl.trans(wide_k), tl.trans(b_g), LOW, PRECISION, WIDE)
                else:
                    A = tl.dot(b_k_in, tl.trans(b_x), input_precision=PRECISION)
                tl.store(T + o_16, solve(A, PRECISION))
            tl.store(k_in + o_16K, b_k_in, mask=columns)


@triton.jit
def pass_block(
    St,
    o_v,
    at,
    first,
    count,
    head,
    b_k_in,
    b_x,
    b_T,
    b_a,
    b_decay,
    is_strong,
    q_in,
    M,
    v,
    o,
    states,
    edits,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The state `[BV, BK]` of columns o_v of V behind a block that begins at token `first`; sums of its outputs."""
    LOW: tl.constexpr = b_x.dtype
    rows, o_k = tl.arange(0, 16), tl.arange(0, St.shape[1])
    k_held, v_held = o_k < K, o_v < V
    o_token = first * HV * V + head * V + rows[:, None] * (HV * V) + o_v[None, :]
    held = (rows < count)[:, None] & v_held[None, :]
    b_v = tl.load(v + o_token, mask=held, other=0.0)
    S_low = St.to(LOW)
    vt = tl.trans(b_v.to(tl.float32) * b_a[:, None])
    vt -= tl.dot(S_low, tl.trans(b_k_in), input_precision=PRECISION)
    vt_new = tl.dot(vt.to(LOW), tl.trans(b_T), input_precision=PRECISION).to(LOW)
    if states is not None:
        o_saved = at * (V * K) + o_v[:, None] * K + o_k[None, :]
        tl.store(states + o_saved, S_low, mask=v_held[:, None] & k_held[None, :])
        o_edit = at * (16 * V) + rows[:, None] * V + o_v[None, :]
        tl.store(edits + o_edit, tl.trans(vt_new), mask=v_held[None, :])
    sums = tl.zeros([St.shape[0]], tl.float32)
    if o is not None:
        o_16K = at * (16 * K) + rows[:, None] * K + o_k[None, :]
        b_q_in = tl.load(q_in + o_16K, mask=k_held[None, :], other=0.0)
        b_M = tl.load(M + at * 256 + rows[:, None] * 16 + rows[None, :]).to(LOW)
        ot = tl.dot(S_low, tl.trans(b_q_in), input_precision=PRECISION)
        ot = tl.dot(vt_new, tl.trans(b_M), ot, input_precision=PRECISION)
        tl.store(o + o_token, tl.trans(ot).to(o.dtype.element_ty), mask=held)
        sums = tl.sum(ot, 1)
    St *= tl.where(is_strong, b_decay, 1.0)[None, :]
    St = tl.dot(vt_new, b_x, St, input_precision=PRECISION)
    St *= tl.where(is_strong, 1.0, b_decay)[None, :]
    return St, sums


@triton.jit
def point_S(states, own, o_v, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr):
    """Columns o_v of V of the state `[K, V]` in row `own`, as `[BV, BK]` pointers, and which of them hold."""
    o_k = tl.arange(0, BK)[None, :]
    return states + own * (K * V) + o_k * V + o_v[:, None], (o_v < V)[:, None] & (o_k < K)


@triton.jit
def load_down(p_down, head, o_v, R, V: tl.constexpr, BR: tl.constexpr):
    """Rows o_v of P_down of a head, `[BV, BR]`."""
    o_r = tl.arange(0, BR)[None, :]
    return tl.load(p_down + (head * V + o_v[:, None]) * R + o_r, mask=(o_v < V)[:, None] & (o_r < R), other=0.0)


@triton.jit(do_not_specialize=["R", "length_of_all", "C"])
def run_blocks(
    k,
    v,
    g,
    e,
    w,
    p_down,
    p_up,
    p_write,
    bounds,
    positions,
    q_in,
    x,
    k_in,
    M,
    decay,
    strong,
    T,
    a,
    memory,
    content,
    content_sum,
    o,
    memory_end,
    content_end,
    content_sum_end,
    contents,
    means,
    states,
    edits,
    top,
    R,
    length_of_all,
    C,
    H: tl.constexpr,
    HV: tl.constexpr,
    H_g: tl.constexpr,
    H_e: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BR: tl.constexpr,
    CONTENT: tl.constexpr,
    RMS: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The state through the blocks of a sequence, for one value head.

    GATED, with all gates known, tiles of BV columns of V are programs of their own. Without, a program has all of V: in
    registers if that is one tile, else tile by tile in memory_end and content_sum_end, which then must be given.

    Reads what `prepare` wrote, the inputs, and the state before the first token (None for zeros). Writes those that are
    given of: o; the state behind the last token, a full chunk not yet closed; contents, what the gates of each chunk
    see (`[chunks, HV, R]` or `[chunks, HV, K, R]`), and means, each full chunk's mean output (`[chunks, HV, V]`);
    states, S^T before each block (`[slots, HV, V, K]`), and edits, its v_new (`[slots, HV, 16, V]`).
    """
    TILES: tl.constexpr = (V + BV - 1) // BV
    PROGRAMS: tl.constexpr = TILES if GATED else 1
    LOOP: tl.constexpr = 1 if GATED else TILES
    n = tl.program_id(0) // (HV * PROGRAMS)
    head = tl.program_id(0) // PROGRAMS % HV
    own = n.to(tl.int64) * HV + head
    begin, length, position = find_sequence(bounds, positions, n, length_of_all)
    slot, chunk_slot = first_slot(begin, n, C), first_chunk(begin, n, C)
    blocks = count_blocks(length, position, C)
    LOW: tl.constexpr = x.dtype.element_ty
    rows, o_k, o_r = tl.arange(0, 16), tl.arange(0, BK), tl.arange(0, BR)
    o_v = tl.program_id(0) % PROGRAMS * BV + tl.arange(0, BV)
    k_held, r_held = o_k < K, o_r < R
    i16 = rows[:, None] * 16 + rows[None, :]

    # -- the state before the first token --
    for t in tl.static_range(LOOP):
        begin_v = t * BV + o_v
        St = tl.zeros([BV, BK], tl.float32)
        if memory is not None:
            from_S, S_held = point_S(memory, own, begin_v, K, V, BK)
            St = tl.load(from_S, mask=S_held, other=0.0)
        total = tl.zeros([BV], tl.float32)
        if CONTENT == 1 and content is not None:
            total = tl.load(content_sum + own * V + begin_v, mask=begin_v < V, other=0.0)
        if LOOP > 1:
            to_S, S_held = point_S(memory_end, own, begin_v, K, V, BK)
            tl.store(to_S, St, mask=S_held)
            if CONTENT == 1:
                tl.store(content_sum_end + own * V + begin_v, total, mask=begin_v < V)
    if LOOP > 1:
        tl.debug_barrier()  # a state in memory is stored by other threads than load it
    if CONTENT == 1:
        seen = tl.zeros([BR], tl.float32)
        if content is not None:
            seen = tl.load(content + own * R + o_r, mask=r_held, other=0.0)
        if contents is not None:
            tl.store(contents + (chunk_slot * HV + head) * R + o_r, seen, mask=o_r < tl.minimum(blocks, 1) * R)
        erase, write = see_mean(seen, p_up, p_write, head, o_k, R, K, BR, RMS)
    if CONTENT == 2:
        Z = tl.zeros([BK, BR], tl.float32)
        if content is not None:
            from_Z, Z_held = point_Z(content, own, R, K, BK, BR)
            Z = tl.load(from_Z, mask=Z_held, other=0.0)
        if content_end is not None:
            to_end, end_held = point_Z(content_end, own, R, K, BK, BR)
            tl.store(to_end, Z, mask=end_held)
        if contents is not None:
            to_Z, Z_held = point_Z(contents, chunk_slot * HV + head, R, K, BK, BR)
            tl.store(to_Z, Z, mask=Z_held & (o_r < tl.minimum(blocks, 1) * R)[None, :])
        Z_low = Z.to(LOW)
    if CONTENT > 0 and LOOP == 1:
        down = load_down(p_down, head, o_v, R, V, BR)

    for i in tl.range(0, blocks, num_stages=STAGES):
        at = (slot + i) * HV + head
        token, count, chunk, start = find_block(i, length, position, C)
        o_16K = at * (16 * K) + rows[:, None] * K + o_k[None, :]
        b_x = tl.load(x + o_16K, mask=k_held[None, :], other=0.0)
        b_k_in = tl.load(k_in + o_16K, mask=k_held[None, :], other=0.0)
        b_decay = tl.load(decay + at * K + o_k, mask=k_held, other=1.0)
        is_strong = tl.load(strong + at) != 0

        # -- gates, and the triangular system --
        if GATED:
            b_T = tl.load(T + at * 256 + i16).to(LOW)
            b_a = tl.load(a + at * 16 + rows)
        else:
            o_e = (begin + token) * H_e * K + head // (HV // H_e) * K + rows[:, None] * (H_e * K) + o_k[None, :]
            k_mask = (rows < count)[:, None] & k_held[None, :]
            logits = tl.load(e + o_e, mask=k_mask, other=0.0).to(tl.float32)
            o_key = (begin + token) * H * K + head // (HV // H) * K + rows[:, None] * (H * K) + o_k[None, :]
            if CONTENT == 2:
                b_k = tl.load(k + o_key, mask=k_mask, other=0.0).to(LOW)
                erase, write = see_memory(b_k, Z_low, p_up, p_write, head, R, K, BK, BR, RMS, PRECISION)
                b = top * tl.sigmoid(logits + erase)
            else:
                b = top * tl.sigmoid(logits + erase[None, :])
            b_a = tl.full([16], 1.0, tl.float32)
            if w is not None:
                b_w = tl.load(w + (begin + token + rows) * HV + head, mask=rows < count, other=0.0)
                b_a = tl.sigmoid(b_w + write)
            b_k_in = (b * b_k_in.to(tl.float32)).to(LOW)
            if is_strong:
                wide_k = tl.load(k + o_key, mask=k_mask, other=0.0).to(tl.float32)
                o_g = (begin + token) * H_g * K + head // (HV // H_g) * K + rows[:, None] * (H_g * K) + o_k[None, :]
                b_g = load_decays(g + o_g, k_mask)
                bkt, kt, gt = tl.trans(b * wide_k), tl.trans(wide_k), tl.trans(b_g)
                A = strong_products(bkt, kt, gt, LOW, PRECISION, WIDE)
            else:
                A = tl.dot(b_k_in, tl.trans(b_x), input_precision=PRECISION)
            b_T = solve(A, PRECISION).to(LOW)

        # -- edits, outputs, the next state --
        if LOOP == 1:
            St, sums = pass_block(
                *(St, o_v, at, begin + token, count, head, b_k_in, b_x, b_T, b_a, b_decay, is_strong),
                *(q_in, M, v, o, states, edits, HV, K, V, PRECISION),
            )
            if CONTENT == 1:
                total += sums
        else:
            for tile in tl.range(LOOP, num_stages=1, loop_unroll_factor=1):
                t_v = tile * BV + o_v
                at_S, tile_held = point_S(memory_end, own, t_v, K, V, BK)
                S_next, sums = pass_block(
                    *(tl.load(at_S, mask=tile_held, other=0.0), t_v, at, begin + token, count, head),
                    *(b_k_in, b_x, b_T, b_a, b_decay, is_strong),
                    *(q_in, M, v, o, states, edits, HV, K, V, PRECISION),
                )
                tl.debug_barrier()
                tl.store(at_S, S_next, mask=tile_held)
                if CONTENT == 1:
                    at_sum = content_sum_end + own * V + t_v
                    tl.store(at_sum, tl.load(at_sum, mask=t_v < V, other=0.0) + sums, mask=t_v < V)
            tl.debug_barrier()

        # -- the next chunk's content --
        if CONTENT > 0:
            if ((position + token + count) % C == 0) & (i + 1 < blocks):
                to = (chunk_slot + chunk) * HV + head
                if CONTENT == 1:
                    if LOOP == 1:
                        mean = total / C
                        seen = tl.sum(mean[:, None] * down, 0)
                        total = tl.zeros([BV], tl.float32)
                        if contents is not None:
                            tl.store(means + to * V + o_v, mean, mask=o_v < V)
                    else:
                        seen = tl.zeros([BR], tl.float32)
                        for tile in tl.range(LOOP, num_stages=1, loop_unroll_factor=1):
                            t_v = tile * BV + o_v
                            at_sum = content_sum_end + own * V + t_v
                            mean = tl.load(at_sum, mask=t_v < V, other=0.0) / C
                            seen += tl.sum(mean[:, None] * load_down(p_down, head, t_v, R, V, BR), 0)
                            tl.debug_barrier()  # others may still read what this thread clears
                            tl.store(at_sum, mean * 0.0, mask=t_v < V)
                            if contents is not None:
                                tl.store(means + to * V + t_v, mean, mask=t_v < V)
                        tl.debug_barrier()
                    erase, write = see_mean(seen, p_up, p_write, head, o_k, R, K, BR, RMS)
                    if contents is not None:
                        tl.store(contents + (to + HV) * R + o_r, seen, mask=r_held)
                else:
                    if LOOP == 1:
                        Z = tl.dot(tl.trans(St.to(LOW)), down.to(LOW), input_precision=PRECISION)
                    else:
                        Z = tl.zeros([BK, BR], tl.float32)
                        for tile in tl.range(LOOP, num_stages=1, loop_unroll_factor=1):
                            t_v = tile * BV + o_v
                            at_S, tile_held = point_S(memory_end, own, t_v, K, V, BK)
                            S_low = tl.load(at_S, mask=tile_held, other=0.0).to(LOW)
                            down_low = load_down(p_down, head, t_v, R, V, BR).to(LOW)
                            Z = tl.dot(tl.trans(S_low), down_low, Z, input_precision=PRECISION)
                        tl.debug_barrier()
                    Z_low = Z.to(LOW)
                    if content_end is not None:
                        to_final, final_held = point_Z(content_end, own, R, K, BK, BR)
                        tl.store(to_final, Z, mask=final_held)
                    if contents is not None:
                        to_next, next_held = point_Z(contents, to + HV, R, K, BK, BR)
                        tl.store(to_next, Z, mask=next_held)

    # -- the state behind the last token --
    if memory_end is not None:
        if LOOP == 1:
            to_S, S_held = point_S(memory_end, own, o_v, K, V, BK)
            tl.store(to_S, St, mask=S_held)
            if CONTENT == 1:
                tl.store(content_sum_end + own * V + o_v, total, mask=o_v < V)
        if CONTENT == 1:
            tl.store(content_end + own * R + o_r, seen, mask=r_held)
