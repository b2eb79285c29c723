"""The portable GPU kernels of what a layer does around the recurrence: L2 norm, and short convolution with SiLU.

Every element is read and written once, but for a few neighbours that the cache holds. All arithmetic is float32. How
many tokens there are is no part of what is compiled: no length of a sequence, or of a batch, compiles anything anew.
"""

import triton
import triton.language as tl

# -- L2 norm --


@triton.jit(do_not_specialize=["rows"])
def normalise(x, y, factors, rows, eps, K: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr):
    """y = x / |x| over K columns, and the factors 1 / |x|: x, y `[rows, K]`, factors `[rows]`."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BK)[None, :]
    at, held = row[:, None] * K + column, (row < rows)[:, None] & (column < K)
    b_x = tl.load(x + at, mask=held, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(b_x * b_x, 1) + eps)
    tl.store(factors + row, factor, mask=row < rows)
    tl.store(y + at, b_x * factor[:, None], mask=held)


@triton.jit(do_not_specialize=["rows"])
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
def count_before(before, begin, i, tokens, T):
    """How many tokens of its sequence come before row begin + i (i in 32 bits); -1 behind the last row."""
    row = begin + i
    if before is None:
        count = ((begin % T).to(tl.int32) + i) % T
    else:
        count = tl.load(before + row, mask=row < tokens, other=0)
    return tl.where(row < tokens, count, -1)


@triton.jit
def load_tap(weight, columns, lag, D, TAPS: tl.constexpr):
    """The weights of what lies `lag` tokens back; the last tap is the token's own."""
    held = (columns < D) & (lag < TAPS)
    return tl.load(weight + columns * TAPS + (TAPS - 1 - lag), mask=held, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["tokens", "T"])
def convolve(x, weight, before, y, tokens, T, D, TAPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """y = SiLU(z), z_t = sum over lags of w_lag x_{t - lag}: x, y `[tokens, D]`, weight `[D, TAPS]`."""
    tiles = tl.cdiv(D, COLUMNS)
    begin = (tl.program_id(0) // tiles).to(tl.int64) * ROWS
    columns = (tl.program_id(0) % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    rows, counts = begin + tl.arange(0, ROWS), count_before(before, begin, tl.arange(0, ROWS), tokens, T)
    z = tl.zeros([ROWS, COLUMNS], tl.float32)
    for lag in tl.static_range(TAPS):
        seen = (counts >= lag)[:, None] & (columns < D)[None, :]
        past = tl.load(x + (rows - lag)[:, None] * D + columns[None, :], mask=seen, other=0.0).to(tl.float32)
        z += past * load_tap(weight, columns, lag, D, TAPS)[None, :]
    held = (rows < tokens)[:, None] & (columns < D)[None, :]
    tl.store(y + rows[:, None] * D + columns[None, :], z * tl.sigmoid(z), mask=held)


@triton.jit
def load_row(x, row, columns, tokens, D):
    held = (columns < D) & (row >= 0) & (row < tokens)
    return tl.load(x + row * D + columns, mask=held, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["tokens", "T"])
def differentiate_convolution(
    x, weight, before, dy, dx, d_weights, tokens, T, D, TAPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """dx, and the share of these rows in the weights' gradient: d_weights `[tiles of rows, TAPS, D]`. TAPS <= 4.

    A program goes down its rows, and holds the three inputs before a token, and of the three tokens before it what the
    gradient of their inputs is so far. Of the tokens behind its rows it wants only what they add to that.
    """
    tiles = tl.cdiv(D, COLUMNS)
    i_rows = (tl.program_id(0) // tiles).to(tl.int64)
    columns = (tl.program_id(0) % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    w0, w1 = load_tap(weight, columns, 0, D, TAPS), load_tap(weight, columns, 1, D, TAPS)
    w2, w3 = load_tap(weight, columns, 2, D, TAPS), load_tap(weight, columns, 3, D, TAPS)
    begin = i_rows * ROWS
    x1, x2 = load_row(x, begin - 1, columns, tokens, D), load_row(x, begin - 2, columns, tokens, D)
    x3, x0 = load_row(x, begin - 3, columns, tokens, D), load_row(x, begin, columns, tokens, D)
    b_dy = load_row(dy, begin, columns, tokens, D)
    dx1, dx2, dx3, dw0 = tl.zeros_like(x1), tl.zeros_like(x1), tl.zeros_like(x1), tl.zeros_like(x1)
    dw1, dw2, dw3 = tl.zeros_like(x1), tl.zeros_like(x1), tl.zeros_like(x1)
    for i in range(ROWS + 3):
        row = begin + i
        count = tl.minimum(count_before(before, begin, i, tokens, T), TAPS - 1)  # of the tokens before it that it sees
        next_x, next_dy = load_row(x, row + 1, columns, tokens, D), load_row(dy, row + 1, columns, tokens, D)
        y1, y2, y3 = tl.where(count >= 1, x1, 0), tl.where(count >= 2, x2, 0), tl.where(count >= 3, x3, 0)
        z = x0 * w0 + y1 * w1 + y2 * w2 + y3 * w3
        s = tl.sigmoid(z)
        dz = b_dy * s * (1 + z * (1 - s))

        held = (columns < D) & (i >= 3) & (row - 3 < tokens)
        tl.store(dx + (row - 3) * D + columns, dx3 + tl.where(count >= 3, dz * w3, 0), mask=held)
        dx3 = dx2 + tl.where(count >= 2, dz * w2, 0)
        dx2 = dx1 + tl.where(count >= 1, dz * w1, 0)
        dx1 = dz * w0
        own = tl.where(i < ROWS, dz, 0)
        dw0, dw1, dw2, dw3 = dw0 + own * x0, dw1 + own * y1, dw2 + own * y2, dw3 + own * y3
        x0, x1, x2, x3, b_dy = next_x, x0, x1, x2, next_dy
    to = d_weights + i_rows * TAPS * D + columns
    tl.store(to + (TAPS - 1) * D, dw0, mask=columns < D)
    tl.store(to + (TAPS - 2) * D, dw1, mask=(columns < D) & (TAPS > 1))
    tl.store(to + (TAPS - 3) * D, dw2, mask=(columns < D) & (TAPS > 2))
    tl.store(to + (TAPS - 4) * D, dw3, mask=(columns < D) & (TAPS > 3))
