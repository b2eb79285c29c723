"""The portable GPU kernels of the backward.

`prepare` and `run_blocks` of the forward come first, now that the content and so every gate is known; they leave the
state S before each block, v_new, and what a block is made of. Then, with d the gradient of the outputs (for "mean",
that of the running sum added), r = a v - (b k exp G) S, and dS the gradient of the state behind a block:

    reverse_blocks        one program a sequence and value head (and tile of V), from the last block to the first

        dv_new = M^T d + (k exp(G_16 - G)) dS             dr = T^T dv_new
        dS    <- D dS + (scale q exp G)^T d - (b k exp G)^T dr

    differentiate_values  one program a block and value head: gradients of v and w, and products over V for the next
    differentiate_keys    one program a block, value head and tile of K: gradients of q, k, g and e
    sum_projections       gradients of P_up and p_write, over runs of blocks
    sum_down              gradient of P_down, over runs of chunks

In reverse_blocks the content needs the gradient of the erase gates too, from

    d(b k exp G) = -dr S^T + dA (k exp -G)                dA = -stril(dr v_new^T)

In the sequential kernel and in differentiate_keys everything of a block lies transposed: [BK, 16], [BV, 16].
"""

import triton
import triton.language as tl

from carve.ops.kernels.triton_forward import (
    FIELDS,
    SHARE,
    across,
    any_block,
    count_blocks,
    find_block,
    find_sequence,
    first_chunk,
    first_slot,
    half_decays,
    has_block,
    load_decays,
    load_down,
    load_up,
    load_write,
    norm_mean,
    point_S,
    point_Z,
    read_memory,
    see_mean,
    see_memory,
)


@triton.jit
def strong_rows(P, kt, gt, LOW: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr):
    """sum_(j < i) P_ij k_j exp(G_i - G_j), `[BK, 16 (i)]`."""
    y = tl.zeros(kt.shape, tl.float32)
    for level in tl.range(4, num_stages=1, loop_unroll_factor=1):
        f = half_decays(gt, level, WIDE)
        y += f * tl.dot((kt * f).to(LOW), tl.trans(across(P, level).to(LOW)), input_precision=PRECISION)
    return y


@triton.jit
def add_up(x, which, LOW: tl.constexpr, WIDE: tl.constexpr):
    """sum_j x_j over the j that `which` `[16 (j), 16 (i)]` names for i. A scan would leave the products' layout."""
    ones = tl.where(which, 1.0, 0.0).to(LOW)
    if ones.dtype == tl.float32:
        return tl.dot(x, ones, input_precision=WIDE)
    high = x.to(LOW)  # three bfloat16 hold a float32
    rest = x - high.to(tl.float32)
    middle = rest.to(LOW)
    return tl.dot((rest - middle.to(tl.float32)).to(LOW), ones, tl.dot(middle, ones, tl.dot(high, ones)))


@triton.jit
def unsee_memory(
    zt,
    roots,
    d_logits,
    d_write_logits,
    p_up,
    p_write,
    head,
    R,
    K: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    RMS: tl.constexpr,
    LOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient `[BR, 16]` of the content of 16 tokens before its norm, from those of the gates' logits, `[BK, 16]` and
    `[16]`; zt, roots: of `read_memory`."""
    dzt = zt * 0.0
    if p_up is not None:
        up = load_up(p_up, head, tl.arange(0, BK), R, K, BR).to(LOW)
        # the other way round, [BR, BK] x [BK, 16], is a product that ptxas 12.8 gave the wrong operand at BR = 64
        dzt = tl.trans(tl.dot(tl.trans(d_logits.to(LOW)), tl.trans(up), input_precision=PRECISION))
    if p_write is not None:
        dzt += load_write(p_write, head, R, BR)[:, None] * d_write_logits[None, :]
    if RMS:
        dzt = dzt - zt * (tl.sum(zt * dzt, 0) / R)[None, :]
    return dzt * roots[None, :]


@triton.jit
def unpass_block(
    dSt,
    d_sum,
    o_v,
    at,
    first,
    count,
    head,
    b_q_in,
    b_k_in,
    b_x,
    b_M,
    b_T,
    b_decay,
    is_strong,
    v,
    states,
    edits,
    d_o,
    d_states,
    d_edits,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CONTENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Columns o_v of V go back through a block. Returns the gradient of the state before it `[BV, BK]`, and if there is
    a content their shares of dr S^T `[BK, 16]`, of v_new dr^T `[16, 16]` and of the write gates' gradient `[16]`.
    """
    LOW: tl.constexpr = b_x.dtype
    rows, o_k = tl.arange(0, 16), tl.arange(0, dSt.shape[1])
    k_held, v_held = o_k < K, o_v < V
    o_token = first * HV * V + head * V + rows[:, None] * (HV * V) + o_v[None, :]
    held = (rows < count)[:, None] & v_held[None, :]
    o_saved = at * (V * K) + o_v[:, None] * K + o_k[None, :]
    S_held = v_held[:, None] & k_held[None, :]
    o_edit = at * (16 * V) + rows[:, None] * V + o_v[None, :]
    dt = tl.trans(tl.load(d_o + o_token, mask=held, other=0.0).to(tl.float32))
    if CONTENT == 1:
        dt += d_sum[:, None]
    d_low = dt.to(LOW)
    tl.store(d_states + o_saved, dSt.to(LOW), mask=S_held)
    into_x = (dSt * tl.where(is_strong, 1.0, b_decay)[None, :]).to(LOW)
    dvt = tl.dot(into_x, tl.trans(b_x), input_precision=PRECISION)
    dvt = tl.dot(d_low, b_M, dvt, input_precision=PRECISION)
    drt = tl.dot(dvt.to(LOW), b_T, input_precision=PRECISION)
    dr_low = drt.to(LOW)
    tl.store(d_edits + o_edit, tl.trans(dr_low), mask=v_held[None, :])
    dSt *= b_decay[None, :]
    dSt = tl.dot(d_low, b_q_in, dSt, input_precision=PRECISION)
    dSt = tl.dot((-drt).to(LOW), b_k_in, dSt, input_precision=PRECISION)
    rSt = tl.zeros([dSt.shape[1], 16], tl.float32)
    rv = tl.zeros([16, 16], tl.float32)
    da = tl.zeros([16], tl.float32)
    if CONTENT > 0:
        b_edit = tl.load(edits + o_edit, mask=v_held[None, :], other=0.0)
        b_S = tl.load(states + o_saved, mask=S_held, other=0.0)
        rv = tl.dot(b_edit, dr_low, input_precision=PRECISION)
        rSt = tl.dot(tl.trans(b_S), dr_low, input_precision=PRECISION)
        da = tl.sum(drt * tl.trans(tl.load(v + o_token, mask=held, other=0.0).to(tl.float32)), 0)
    return dSt, rSt, rv, da


@triton.jit(do_not_specialize=["R", "length_of_all", "C"])
def reverse_blocks(
    k,
    v,
    g,
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
    slope,
    states,
    edits,
    contents,
    d_o,
    d_memory_end,
    d_content_end,
    d_content_sum_end,
    d_states,
    d_edits,
    d_sums,
    d_contents,
    d_memory,
    d_content,
    d_content_sum,
    R,
    length_of_all,
    C,
    H: tl.constexpr,
    HV: tl.constexpr,
    H_g: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BR: tl.constexpr,
    CONTENT: tl.constexpr,
    RMS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Writes d_states, dS^T behind each block, and d_edits, its dr, shaped like states and edits; for "mean" d_sums,
    what the next chunk's content adds to the gradient of a chunk's outputs (`[chunks, HV, V]`); d_contents, shaped like
    contents, of all chunks but each sequence's first; and, if given, the gradient of the state before the first token.

    Memory-blind, tiles of BV columns of V are programs of their own. Else a program has all of V: in registers if that
    is one tile, else tile by tile in d_memory and d_content_sum, which then must be given.
    """
    TILES: tl.constexpr = (V + BV - 1) // BV
    PROGRAMS: tl.constexpr = TILES if CONTENT == 0 else 1
    LOOP: tl.constexpr = 1 if CONTENT == 0 else TILES
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
    r, c = rows[:, None], rows[None, :]

    # -- gradients of the state behind the last token --
    if CONTENT > 0:
        last_token, last_count, last_chunk, last_start = find_block(blocks - 1, length, position, C)
        to_last = (chunk_slot + last_chunk) * HV + head
    for t in tl.static_range(LOOP):
        end_v = t * BV + o_v
        dSt = tl.zeros([BV, BK], tl.float32)
        d_sum = tl.zeros([BV], tl.float32)
        if d_memory_end is not None:
            from_S, S_held = point_S(d_memory_end, own, end_v, K, V, BK)
            dSt = tl.load(from_S, mask=S_held, other=0.0)
        if CONTENT == 1:
            if d_content_sum_end is not None:
                d_sum = tl.load(d_content_sum_end + own * V + end_v, mask=end_v < V, other=0.0)
            tl.store(d_sums + to_last * V + end_v, d_sum, mask=end_v < tl.minimum(blocks, 1) * V)
        if LOOP > 1:
            to_S, S_held = point_S(d_memory, own, end_v, K, V, BK)
            tl.store(to_S, dSt, mask=S_held)
            if CONTENT == 1:
                tl.store(d_content_sum + own * V + end_v, d_sum, mask=end_v < V)
    if LOOP > 1:
        tl.debug_barrier()  # a gradient in memory is stored by other threads than load it
    if CONTENT == 1:
        d_seen = tl.zeros([BR], tl.float32)
        if d_content_end is not None:
            d_seen = tl.load(d_content_end + own * R + o_r, mask=r_held, other=0.0)
        d_erase = tl.zeros([BK], tl.float32)
        d_write = tl.sum(d_seen * 0.0, 0)
        seen = tl.load(contents + to_last * R + o_r, mask=o_r < tl.minimum(blocks, 1) * R, other=0.0)
    if CONTENT == 2:
        dZ = tl.zeros([BK, BR], tl.float32)
        if d_content_end is not None:
            from_end, end_held = point_Z(d_content_end, own, R, K, BK, BR)
            dZ = tl.load(from_end, mask=end_held, other=0.0)
        from_Z, Z_held = point_Z(contents, to_last, R, K, BK, BR)
        Z_low = tl.load(from_Z, mask=Z_held & (o_r < tl.minimum(blocks, 1) * R)[None, :], other=0.0).to(LOW)
    if CONTENT > 0 and LOOP == 1:
        down = load_down(p_down, head, o_v, R, V, BR)

    for back in tl.range(0, blocks, num_stages=STAGES):
        i = blocks - 1 - back
        at = (slot + i) * HV + head
        token, count, chunk, start = find_block(i, length, position, C)
        o_16K = at * (16 * K) + rows[:, None] * K + o_k[None, :]
        b_x = tl.load(x + o_16K, mask=k_held[None, :], other=0.0)
        b_k_in = tl.load(k_in + o_16K, mask=k_held[None, :], other=0.0)
        b_q_in = tl.load(q_in + o_16K, mask=k_held[None, :], other=0.0)
        b_decay = tl.load(decay + at * K + o_k, mask=k_held, other=1.0)
        b_M = tl.load(M + at * 256 + i16).to(LOW)
        b_T = tl.load(T + at * 256 + i16).to(LOW)
        is_strong = tl.load(strong + at) != 0

        # -- back through the block --
        if LOOP == 1:
            dSt, rSt, rv, da = unpass_block(
                *(dSt, d_sum, o_v, at, begin + token, count, head),
                *(b_q_in, b_k_in, b_x, b_M, b_T, b_decay, is_strong),
                *(v, states, edits, d_o, d_states, d_edits, HV, K, V, CONTENT, PRECISION),
            )
        else:
            rSt = tl.zeros([BK, 16], tl.float32)
            rv = tl.zeros([16, 16], tl.float32)
            da = tl.zeros([16], tl.float32)
            for tile in tl.range(LOOP, num_stages=1, loop_unroll_factor=1):
                t_v = tile * BV + o_v
                at_S, tile_held = point_S(d_memory, own, t_v, K, V, BK)
                t_sum = d_sum
                if CONTENT == 1:
                    t_sum = tl.load(d_content_sum + own * V + t_v, mask=t_v < V, other=0.0)
                dS_next, t_rSt, t_rv, t_da = unpass_block(
                    *(tl.load(at_S, mask=tile_held, other=0.0), t_sum, t_v, at, begin + token, count, head),
                    *(b_q_in, b_k_in, b_x, b_M, b_T, b_decay, is_strong),
                    *(v, states, edits, d_o, d_states, d_edits, HV, K, V, CONTENT, PRECISION),
                )
                tl.debug_barrier()
                tl.store(at_S, dS_next, mask=tile_held)
                rSt += t_rSt
                rv += t_rv
                da += t_da
            tl.debug_barrier()

        if CONTENT > 0:
            # -- gradients of the gates' logits --
            b_slope = tl.load(slope + o_16K, mask=k_held[None, :], other=0.0)
            dAt = tl.where(r < c, -rv, 0.0)
            dbt = -rSt
            o_key = (begin + token) * H * K + head // (HV // H) * K + rows[:, None] * (H * K) + o_k[None, :]
            k_mask = (rows < count)[:, None] & k_held[None, :]
            if is_strong:
                o_g = (begin + token) * H_g * K + head // (HV // H_g) * K + rows[:, None] * (H_g * K) + o_k[None, :]
                gt = tl.trans(load_decays(g + o_g, k_mask))
                kt = tl.trans(tl.load(k + o_key, mask=k_mask, other=0.0).to(tl.float32))
                dbt = dbt * tl.exp(tl.cumsum(gt, 1))
                dbt += strong_rows(tl.trans(dAt), kt, gt, LOW, PRECISION, WIDE)
            else:
                dbt = tl.dot(tl.trans(b_x), dAt.to(LOW), dbt, input_precision=PRECISION)
            d_logits = dbt * tl.trans(b_slope.to(tl.float32))
            b_a = tl.load(a + at * 16 + rows)
            d_write_logits = da * b_a * (1 - b_a)

            if CONTENT == 1:
                d_erase += tl.sum(d_logits, 1)
                if p_write is not None:
                    d_write += tl.sum(d_write_logits, 0)
                if token == start:
                    z, root = norm_mean(seen, R, RMS)
                    dz = z * 0.0
                    if p_up is not None:
                        dz = tl.sum(load_up(p_up, head, o_k, R, K, BR) * d_erase[None, :], 1)
                    if p_write is not None:
                        dz += load_write(p_write, head, R, BR) * d_write
                    if RMS:
                        dz = dz - z * (tl.sum(z * dz, 0) / R)
                    d_seen += dz * root
                    d_erase = d_erase * 0.0
                    d_write = d_write * 0.0
                    if chunk > 0:
                        before = (chunk_slot + chunk - 1) * HV + head
                        tl.store(d_contents + (before + HV) * R + o_r, d_seen, mask=r_held)
                        if LOOP == 1:
                            d_sum = tl.sum(down * d_seen[None, :], 1) / C
                            tl.store(d_sums + before * V + o_v, d_sum, mask=o_v < V)
                        else:
                            for tile in tl.range(LOOP, num_stages=1, loop_unroll_factor=1):
                                t_v = tile * BV + o_v
                                t_sum = tl.sum(load_down(p_down, head, t_v, R, V, BR) * d_seen[None, :], 1) / C
                                tl.store(d_sums + before * V + t_v, t_sum, mask=t_v < V)
                                tl.store(d_content_sum + own * V + t_v, t_sum, mask=t_v < V)
                            tl.debug_barrier()
                        d_seen = d_seen * 0.0
                        seen = tl.load(contents + before * R + o_r, mask=r_held, other=0.0)
            else:
                b_k = tl.load(k + o_key, mask=k_mask, other=0.0).to(LOW)
                zt, roots = read_memory(b_k, Z_low, R, RMS, PRECISION)
                dzt = unsee_memory(
                    zt, roots, d_logits, d_write_logits, p_up, p_write, head, R, K, BK, BR, RMS, LOW, PRECISION
                )
                dZ = tl.dot(tl.trans(b_k), tl.trans(dzt.to(LOW)), dZ, input_precision=PRECISION)
                if (token == start) & (chunk > 0):
                    before = (chunk_slot + chunk - 1) * HV + head
                    to_dZ, dZ_held = point_Z(d_contents, before + HV, R, K, BK, BR)
                    tl.store(to_dZ, dZ, mask=dZ_held)
                    dZ_low = dZ.to(LOW)
                    if LOOP == 1:
                        dSt = tl.dot(down.to(LOW), tl.trans(dZ_low), dSt, input_precision=PRECISION)
                    else:
                        for tile in tl.range(LOOP, num_stages=1, loop_unroll_factor=1):
                            t_v = tile * BV + o_v
                            at_S, tile_held = point_S(d_memory, own, t_v, K, V, BK)
                            down_low = load_down(p_down, head, t_v, R, V, BR).to(LOW)
                            dS_read = tl.dot(down_low, tl.trans(dZ_low), input_precision=PRECISION)
                            dS_read += tl.load(at_S, mask=tile_held, other=0.0)
                            tl.debug_barrier()
                            tl.store(at_S, dS_read, mask=tile_held)
                        tl.debug_barrier()
                    dZ = dZ * 0.0
                    from_next, next_held = point_Z(contents, before, R, K, BK, BR)
                    Z_low = tl.load(from_next, mask=next_held, other=0.0).to(LOW)

    # -- gradient of the state before the first token --
    if d_memory is not None:
        if LOOP == 1:
            to_first, S_first_held = point_S(d_memory, own, o_v, K, V, BK)
            tl.store(to_first, dSt, mask=S_first_held)
            if CONTENT == 1:
                tl.store(d_content_sum + own * V + o_v, d_sum, mask=o_v < V)
        if CONTENT == 1:
            tl.store(d_content + own * R + o_r, d_seen, mask=r_held)
        if CONTENT == 2:
            to_Z, to_Z_held = point_Z(d_content, own, R, K, BK, BR)
            tl.store(to_Z, dZ, mask=to_Z_held)


@triton.jit
def load_outputs(
    d_o, d_sums, blocks, i, head, o_token, held, o_v, HV: tl.constexpr, V: tl.constexpr, CONTENT: tl.constexpr
):
    """The gradient of the outputs of block i, `[16, BV]`; for "mean" with what the next chunk's content adds."""
    d = tl.load(d_o + o_token, mask=held, other=0.0)
    if CONTENT == 1:
        chunk = tl.load(blocks + i * FIELDS + 2) * HV + head
        d = d.to(tl.float32) + tl.load(d_sums + chunk * V + o_v, mask=o_v < V, other=0.0)[None, :]
    return d


@triton.jit
def differentiate_values(
    v,
    blocks,
    a,
    edits,
    d_o,
    d_edits,
    d_sums,
    dv,
    dw,
    dA,
    dM,
    HV: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    CONTENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes dv, dw (fp32), and the products over V: dA and dM, `[slots, HV, 16, 16]` fp32, dM with its diagonal."""
    i = (tl.program_id(0) // HV).to(tl.int64)
    head = tl.program_id(0) % HV
    token, count = tl.load(blocks + i * FIELDS), tl.load(blocks + i * FIELDS + 1)
    if count == 0:
        return
    at = i * HV + head
    rows, o_v = tl.arange(0, 16), tl.arange(0, BV)
    r, c = rows[:, None], rows[None, :]
    kept, v_held = rows < count, o_v < V
    o_token = (token * HV + head) * V + rows[:, None] * (HV * V) + o_v[None, :]
    o_edit = at * (16 * V) + rows[:, None] * V + o_v[None, :]
    held = kept[:, None] & v_held[None, :]
    b_edit = tl.load(edits + o_edit, mask=v_held[None, :], other=0.0)
    b_dr = tl.load(d_edits + o_edit, mask=v_held[None, :], other=0.0)
    b_d = load_outputs(d_o, d_sums, blocks, i, head, o_token, held, o_v, HV, V, CONTENT).to(b_edit.dtype)
    o_16 = at * 256 + r * 16 + c
    tl.store(dA + o_16, tl.where(r > c, -tl.dot(b_dr, tl.trans(b_edit), input_precision=PRECISION), 0.0))
    tl.store(dM + o_16, tl.where(r >= c, tl.dot(b_d, tl.trans(b_edit), input_precision=PRECISION), 0.0))
    b_a = tl.load(a + at * 16 + rows)
    wide_dr = b_dr.to(tl.float32)
    tl.store(dv + o_token, (wide_dr * b_a[:, None]).to(dv.dtype.element_ty), mask=held)
    if dw is not None:
        da = tl.sum(wide_dr * tl.load(v + o_token, mask=held, other=0.0).to(tl.float32), 1)
        tl.store(dw + (token + rows) * HV + head, da * b_a * (1 - b_a), mask=kept)


@triton.jit(do_not_specialize=["R", "slots"])
def differentiate_keys(
    q,
    k,
    g,
    e,
    p_up,
    p_write,
    contents,
    blocks,
    strong,
    states,
    edits,
    d_o,
    d_states,
    d_edits,
    d_sums,
    dA,
    dM,
    dw,
    dq,
    dk,
    dg,
    de,
    z_all,
    scale,
    top,
    R,
    slots,
    H: tl.constexpr,
    HV: tl.constexpr,
    H_g: tl.constexpr,
    H_e: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BR: tl.constexpr,
    TILE: tl.constexpr,
    CONTENT: tl.constexpr,
    RMS: tl.constexpr,
    STRONG: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Writes dq, dk, dg (fp32), de `[B, T, HV, K]`, and z_all, each token's content `[slots, HV, 16, R]`.

    Strong blocks: as in `prepare`. Tiles of K, of TILE channels, are programs of their own, but for "read", as the
    gradient of its content is a sum over K.
    """
    TILES: tl.constexpr = (K + TILE - 1) // TILE
    head = tl.program_id(0) // TILES % HV
    tile = tl.program_id(0) % TILES
    first = tl.program_id(0) // (HV * TILES) * (SHARE if STRONG else 1)
    if not any_block(first, head, blocks, strong, slots, HV, STRONG):
        return
    LOW: tl.constexpr = states.dtype.element_ty
    rows, o_v, o_r = tl.arange(0, 16), tl.arange(0, BV), tl.arange(0, BR)
    r, c = rows[:, None], rows[None, :]
    for j in tl.range(0, SHARE if STRONG else 1, num_stages=1, loop_unroll_factor=1):
        i = (first + j).to(tl.int64)
        at = i * HV + head
        if has_block(i, at, blocks, strong, slots, STRONG):
            token, count = tl.load(blocks + i * FIELDS), tl.load(blocks + i * FIELDS + 1)
            kept, v_held = rows < count, o_v < V

            # -- products with states --
            o_edit = at * (16 * V) + rows[:, None] * V + o_v[None, :]
            o_token = (token * HV + head) * V + rows[:, None] * (HV * V) + o_v[None, :]
            t_held = kept[:, None] & v_held[None, :]
            b_d = load_outputs(d_o, d_sums, blocks, i, head, o_token, t_held, o_v, HV, V, CONTENT).to(LOW)
            b_edit = tl.load(edits + o_edit, mask=v_held[None, :], other=0.0)
            b_dr = tl.load(d_edits + o_edit, mask=v_held[None, :], other=0.0)
            o_k = tile * TILE + tl.arange(0, TILE)
            held = (o_k < K)[:, None] & kept[None, :]
            o_saved = at * (V * K) + o_v[:, None] * K + o_k[None, :]
            S_held = v_held[:, None] & (o_k < K)[None, :]
            b_S = tl.load(states + o_saved, mask=S_held, other=0.0)
            b_dS = tl.load(d_states + o_saved, mask=S_held, other=0.0)
            dqt = tl.dot(tl.trans(b_S), tl.trans(b_d), input_precision=PRECISION)  # d S^T
            dbt = tl.dot(tl.trans(b_S), tl.trans(b_dr), input_precision=PRECISION)  # dr S^T
            d_out = tl.dot(tl.trans(b_dS), tl.trans(b_edit), input_precision=PRECISION)  # gradient of k exp(G_16 - G)
            kept_state = tl.sum(b_S.to(tl.float32) * b_dS.to(tl.float32), 0)

            # -- decays and gates, as in the forward --
            o_key = (token * H + head // (HV // H)) * K + rows[None, :] * (H * K) + o_k[:, None]
            kt = tl.load(k + o_key, mask=held, other=0.0).to(tl.float32)
            qt = tl.load(q + o_key, mask=held, other=0.0).to(tl.float32) * scale
            o_g = (token * H_g + head // (HV // H_g)) * K + rows[None, :] * (H_g * K) + o_k[:, None]
            gt = load_decays(g + o_g, held)
            o_e = (token * H_e + head // (HV // H_e)) * K + rows[None, :] * (H_e * K) + o_k[:, None]
            logits = tl.load(e + o_e, mask=held, other=0.0).to(tl.float32)
            if CONTENT > 0:
                chunk = tl.load(blocks + i * FIELDS + 2) * HV + head
            if CONTENT == 1:
                seen = tl.load(contents + chunk * R + o_r, mask=o_r < R, other=0.0)
                z, root = norm_mean(seen, R, RMS)
                zt = z[:, None] + tl.zeros([BR, 16], tl.float32)
                erase, write = see_mean(seen, p_up, p_write, head, o_k, R, K, BR, RMS)
                logits += erase[:, None]
            if CONTENT == 2:
                from_Z, Z_held = point_Z(contents, chunk, R, K, BK, BR)
                Z = tl.load(from_Z, mask=Z_held, other=0.0).to(LOW)
                k_low = tl.trans(kt.to(LOW))
                erase, write = see_memory(k_low, Z, p_up, p_write, head, R, K, BK, BR, RMS, PRECISION)
                logits += tl.trans(erase)
                zt, roots = read_memory(k_low, Z, R, RMS, PRECISION)
            s = tl.sigmoid(logits)
            b = top * s
            G = add_up(gt, r <= c, LOW, WIDE)
            total = tl.sum(gt, 1)
            inward, outward = tl.exp(G), tl.exp(total[:, None] - G)

            o_16 = at * 256 + r * 16 + c
            b_dA, b_dM = tl.load(dA + o_16), tl.load(dM + o_16)
            diagonal = tl.sum(tl.where(r == c, b_dM, 0.0), 0)  # apart: it does not depend on g
            b_dM = tl.where(r > c, b_dM, 0.0)

            # -- dbt: gradient of b k; dqt: of scale q; dkt: of k where it is the column of A and M --
            dbt = -dbt * inward
            dqt = dqt * inward
            if STRONG:
                dkt = tl.zeros([TILE, 16], tl.float32)
                for level in tl.range(4, num_stages=1, loop_unroll_factor=1):
                    f = half_decays(gt, level, WIDE)
                    k_half = (kt * f).to(LOW)
                    dA_half, dM_half = across(b_dA, level).to(LOW), across(b_dM, level).to(LOW)
                    dbt += f * tl.dot(k_half, tl.trans(dA_half), input_precision=PRECISION)
                    dqt += f * tl.dot(k_half, tl.trans(dM_half), input_precision=PRECISION)
                    into_k = tl.dot((b * kt * f).to(LOW), dA_half, input_precision=PRECISION)
                    into_k = tl.dot((qt * f).to(LOW), dM_half, into_k, input_precision=PRECISION)
                    dkt += f * into_k
            else:
                away = tl.exp(-G)
                xt = (kt * away).to(LOW)
                dA_low, dM_low = b_dA.to(LOW), b_dM.to(LOW)
                dbt += inward * tl.dot(xt, tl.trans(dA_low), input_precision=PRECISION)
                dqt += inward * tl.dot(xt, tl.trans(dM_low), input_precision=PRECISION)
                dkt = tl.dot((b * kt * inward).to(LOW), dA_low, input_precision=PRECISION)
                dkt = tl.dot((qt * inward).to(LOW), dM_low, dkt, input_precision=PRECISION) * away

            # -- gradients of the inputs --
            into_state = d_out * outward * kt  # decays with the tokens behind: those before a token add to its gradient
            dG = dbt * b * kt + dqt * qt - dkt * kt - into_state
            dG = add_up(dG, r >= c, LOW, WIDE) + tl.sum(into_state, 1)[:, None]
            o_out = (token * HV + head) * K + rows[None, :] * (HV * K) + o_k[:, None]
            tl.store(dg + o_out, dG + (kept_state * tl.exp(total))[:, None], mask=held)
            dqt += kt * diagonal[None, :]
            dkt += qt * diagonal[None, :]
            tl.store(dq + o_out, (dqt * scale).to(dq.dtype.element_ty), mask=held)
            d_logits = dbt * kt * b * (1 - s)
            tl.store(de + o_out, d_logits.to(de.dtype.element_ty), mask=held)
            dkt += dbt * b + d_out * outward
            if CONTENT == 2:
                d_write_logits = tl.zeros([16], tl.float32)
                if dw is not None:
                    d_write_logits += tl.load(dw + (token + rows) * HV + head, mask=kept, other=0.0)
                dzt = unsee_memory(
                    zt, roots, d_logits, d_write_logits, p_up, p_write, head, R, K, BK, BR, RMS, LOW, PRECISION
                )
                dkt = tl.dot(Z, dzt.to(LOW), dkt, input_precision=PRECISION)
            tl.store(dk + o_out, dkt.to(dk.dtype.element_ty), mask=held)
            if CONTENT > 0:
                o_z = (at * 16 + rows[None, :]) * R + o_r[:, None]
                tl.store(z_all + o_z, zt, mask=(o_r < R * (tile == 0))[:, None] & (rows < 16)[None, :])


@triton.jit(do_not_specialize=["R", "slots"])
def sum_projections(
    blocks,
    z_all,
    de,
    dw,
    d_p_up,
    d_p_write,
    R,
    slots,
    HV: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    RUN: tl.constexpr,
    LOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of P_up `[runs, HV, R, K]` and p_write `[runs, HV, R]` from each run of RUN blocks."""
    run = tl.program_id(0) // HV
    head = tl.program_id(0) % HV
    rows, o_k, o_r = tl.arange(0, 16), tl.arange(0, BK), tl.arange(0, BR)
    up = tl.zeros([BR, BK], tl.float32)
    write = tl.zeros([BR], tl.float32)
    for j in range(RUN):
        i = run.to(tl.int64) * RUN + j
        token = tl.load(blocks + i * FIELDS, mask=i < slots, other=0)
        count = tl.load(blocks + i * FIELDS + 1, mask=i < slots, other=0)
        kept = rows < count
        o_z = ((i * HV + head) * 16 + rows[None, :]) * R + o_r[:, None]
        zt = tl.load(z_all + o_z, mask=(o_r < R)[:, None] & kept[None, :], other=0.0)
        o_e = (token * HV + head) * K + rows[:, None] * (HV * K) + o_k[None, :]
        b_de = tl.load(de + o_e, mask=kept[:, None] & (o_k < K)[None, :], other=0.0)
        up = tl.dot(zt.to(LOW), b_de.to(LOW), up, input_precision=PRECISION)
        if dw is not None:
            b_dw = tl.load(dw + (token + rows) * HV + head, mask=kept, other=0.0)
            write += tl.sum(zt * b_dw[None, :], 1)
    at = tl.program_id(0).to(tl.int64) * R + o_r
    tl.store(d_p_up + at[:, None] * K + o_k[None, :], up, mask=(o_r < R)[:, None] & (o_k < K)[None, :])
    tl.store(d_p_write + at, write, mask=o_r < R)


@triton.jit(do_not_specialize=["R", "chunks"])
def sum_down(
    starts,
    means,
    states,
    d_contents,
    d_p_down,
    R,
    chunks,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BR: tl.constexpr,
    RUN: tl.constexpr,
    CONTENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of P_down `[runs, HV, V, R]` from each run of RUN chunks; tiles of V are programs of their own."""
    TILES: tl.constexpr = (V + BV - 1) // BV
    head = tl.program_id(0) // TILES % HV
    run = (tl.program_id(0) // (HV * TILES)).to(tl.int64)
    o_v, o_k, o_r = tl.program_id(0) % TILES * BV + tl.arange(0, BV), tl.arange(0, BK), tl.arange(0, BR)
    v_held, r_held = o_v < V, o_r < R
    down = tl.zeros([BV, BR], tl.float32)
    for j in tl.range(0, RUN, num_stages=1):
        chunk = run * RUN + j
        slot = tl.load(starts + chunk, mask=chunk < chunks, other=0)
        begun = slot > 0
        if CONTENT == 1:
            mean = tl.load(means + ((chunk - 1) * HV + head) * V + o_v, mask=v_held & begun, other=0.0)
            d_seen = tl.load(d_contents + (chunk * HV + head) * R + o_r, mask=r_held & begun, other=0.0)
            down += mean[:, None] * d_seen[None, :]
        else:
            o_saved = (slot * HV + head) * (V * K) + o_v[:, None] * K + o_k[None, :]
            b_S = tl.load(states + o_saved, mask=v_held[:, None] & (o_k < K)[None, :] & begun, other=0.0)
            from_dZ, held = point_Z(d_contents, chunk * HV + head, R, K, BK, BR)
            dZ = tl.load(from_dZ, mask=held & begun, other=0.0).to(b_S.dtype)
            down = tl.dot(b_S, dZ, down, input_precision=PRECISION)
    to = d_p_down + ((run * HV + head) * V + o_v[:, None]) * R + o_r[None, :]
    tl.store(to, down, mask=v_held[:, None] & r_held[None, :])
