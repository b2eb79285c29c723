"""The portable GPU kernels of what a layer does around the recurrence: L2 norm, and short convolution with SiLU.

Every element is read and written once, but for a few neighbours that the cache holds. All arithmetic is float32.
"""

import triton
import triton.language as tl

# -- L2 norm --


@triton.jit
def normalise(x, y, factors, rows, eps, K: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr):
    """y = x / |x| over K columns, and the factors 1 / |x|: x, y `[rows, K]`, factors `[rows]`."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BK)[None, :]
    at, held = row[:, None] * K + column, (row < rows)[:, None] & (column < K)
    b_x = tl.load(x + at, mask=held, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(b_x * b_x, 1) + eps)
    tl.store(factors + row, factor, mask=row < rows)
    tl.store(y + at, b_x * factor[:, None], mask=held)


@triton.jit
def differentiate_norm(y, factors, dy, dx, rows, K: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr):
    """dx = (dy - y (y . dy)) / |x|"""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BK)[None, :]
    at, held = row[:, None] * K + column, (row < rows)[:, None] & (column < K)
    b_y = tl.load(y + at, mask=held, other=0.0).to(tl.float32)
    b_dy = tl.load(dy + at, mask=held, other=0.0).to(tl.float32)
    factor = tl.load(factors + row, mask=row < rows, other=0.0)
    b_dx = (b_dy - b_y * tl.sum(b_y * b_dy, 1)[:, None]) * factor[:, None]
    tl.store(dx + at, b_dx, mask=held)


# -- causal convolution, SiLU --


@triton.jit
def count_before(before, rows, tokens, T):
    """Of each row, how many tokens of its sequence come before it; -1 behind the last row."""
    count = rows % T if before is None else tl.load(before + rows, mask=rows < tokens, other=0)
    return tl.where(rows < tokens, count.to(tl.int32), -1)


@triton.jit
def load_tap(weight, columns, lag, D, TAPS: tl.constexpr):
    """The weights of what lies `lag` tokens back, `[1, columns]`; the last tap is the token's own."""
    return tl.load(weight + columns * TAPS + (TAPS - 1 - lag), mask=columns < D, other=0.0).to(tl.float32)[None, :]


@triton.jit
def load_past(x, rows, columns, counts, lag, D):
    """What lies `lag` tokens back in the same sequence, or 0."""
    seen = (counts >= lag)[:, None] & (columns < D)[None, :]
    return tl.load(x + (rows - lag)[:, None] * D + columns[None, :], mask=seen, other=0.0).to(tl.float32)


@triton.jit
def weigh(x, weight, rows, columns, counts, D, TAPS: tl.constexpr):
    """The convolution before SiLU."""
    z = load_past(x, rows, columns, counts, 0, D) * load_tap(weight, columns, 0, D, TAPS)
    for lag in tl.static_range(1, TAPS):
        z += load_past(x, rows, columns, counts, lag, D) * load_tap(weight, columns, lag, D, TAPS)
    return z


@triton.jit
def find_tile(D, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which rows of the tokens and which columns a program has, and the number of its rows' tile."""
    tiles = tl.cdiv(D, COLUMNS)
    i_rows = tl.program_id(0) // tiles
    rows = i_rows.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return i_rows, rows, (tl.program_id(0) % tiles) * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def convolve(x, weight, before, y, tokens, T, D, TAPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """y = SiLU(z), z_t = sum over lags of w_lag x_{t - lag}: x, y `[tokens, D]`, weight `[D, TAPS]`."""
    _, rows, columns = find_tile(D, ROWS, COLUMNS)
    z = weigh(x, weight, rows, columns, count_before(before, rows, tokens, T), D, TAPS)
    held = (rows < tokens)[:, None] & (columns < D)[None, :]
    tl.store(y + rows[:, None] * D + columns[None, :], z * tl.sigmoid(z), mask=held)


@triton.jit
def differentiate_silu(
    x, weight, before, dy, dz, d_weights, tokens, T, D, TAPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """dz, and the share of these rows in the weights' gradient: d_weights `[tiles of rows, TAPS, D]`."""
    i_rows, rows, columns = find_tile(D, ROWS, COLUMNS)
    counts = count_before(before, rows, tokens, T)
    z = weigh(x, weight, rows, columns, counts, D, TAPS)
    at, held = rows[:, None] * D + columns[None, :], (rows < tokens)[:, None] & (columns < D)[None, :]
    s = tl.sigmoid(z)
    b_dz = tl.load(dy + at, mask=held, other=0.0).to(tl.float32) * s * (1 + z * (1 - s))
    tl.store(dz + at, b_dz, mask=held)
    for lag in tl.static_range(TAPS):
        share = tl.sum(b_dz * load_past(x, rows, columns, counts, lag, D), 0)
        to = d_weights + (i_rows.to(tl.int64) * TAPS + TAPS - 1 - lag) * D + columns
        tl.store(to, share, mask=columns < D)


@triton.jit
def differentiate_weighing(
    weight, before, dz, dx, tokens, T, D, TAPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """dx_t = sum over lags of w_lag dz_{t + lag}, of those in the same sequence."""
    _, rows, columns = find_tile(D, ROWS, COLUMNS)
    b_dx = tl.zeros([ROWS, COLUMNS], tl.float32)
    for lag in tl.static_range(TAPS):
        later = rows + lag
        reached = (count_before(before, later, tokens, T) >= lag)[:, None] & (columns < D)[None, :]
        b_dz = tl.load(dz + later[:, None] * D + columns[None, :], mask=reached, other=0.0).to(tl.float32)
        b_dx += b_dz * load_tap(weight, columns, lag, D, TAPS)
    tl.store(dx + rows[:, None] * D + columns[None, :], b_dx, mask=(rows < tokens)[:, None] & (columns < D)[None, :])
