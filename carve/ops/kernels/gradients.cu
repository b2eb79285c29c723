// The backward's parallel part: one program per (tile, value head) turns what `reverse.cu` left behind into gradients of
// the tokens.  With S the state before a block and dS its gradient behind it:
//
//     dM = tril(d v_new^T)                              dA = -stril(dr v_new^T)
//     d(scale q exp G) = d S^T + dM (k exp -G)          d(b k exp G) = -dr S^T + dA (k exp -G)
//     d(k exp -G) = dA^T (b k exp G) + dM^T (scale q exp G)
//     d(k exp(G_16 - G)) = v_new dS^T                   dv = a dr
//
// A warp has 16 columns of K and half of a tile's blocks.  It runs through the rows of V in slabs of 16, and for each takes
// S forward and dS back to its blocks, so that no warp waits for another and only a slab of a state is ever held.

constexpr int HALVES = 2, HALF_BLOCKS = BLOCKS / HALVES;
static_assert(TILE == SAVE && BLOCKS % HALVES == 0, "a tile begins where a state was saved");
static_assert(WARPS == COLUMNS * HALVES, "a warp for each slab of columns and half of a tile");

constexpr int O_Q = 0, O_K = O_Q + TILE * K * 2, O_E = O_K + TILE * K * 2, O_G = O_E + TILE * K * 2;
constexpr int O_BK_IN = O_G + TILE * K * 4, O_K_OUT = O_BK_IN + TILE * K * 2, O_K_END = O_K_OUT + TILE * K * 2;
constexpr int O_D = O_K_END + TILE * K * 2, O_EDITS = O_D + TILE * V * 2, O_DR = O_EDITS + TILE * V * 2;
constexpr int O_DM = O_DR + TILE * V * 2, O_DA = O_DM + TILE * 32, O_PAIRS = O_DA + TILE * 32;
constexpr int O_DECAY = O_PAIRS + 2 * BLOCKS * 256 * 4, O_W = O_DECAY + BLOCKS * K * 4, O_WRITE = O_W + TILE * 4;
constexpr int O_STRONG = O_WRITE + TILE * 4, O_DW = O_STRONG + 64, O_CONTENT = O_DW + ROWS * TILE * 4;
constexpr int O_DOWN = Aligned<O_CONTENT + (4 * RANK + K + TILE) * 4>::bytes, O_UP = O_DOWN + (READ ? RANK * V * 2 : 0);
constexpr int O_Z = O_UP + (READ ? RANK * K * 2 : 0), SHARED_BYTES = O_Z + (READ ? RANK * K * 2 : 0);

static_assert(SHARED_BYTES <= CARVE_SHARED, "carve/ops/kernels/cuda.py says how much shared memory a program gets");

// Rows of D fp32 numbers, permuted likewise.
template <int D> struct WideMatrix {
  byte* base;

  DEVICE float* at(int row, int column) const {
    return (float*)(base + row * (4 * D) + (((column >> 2) ^ ((row & 7) << 1)) << 4) + 4 * (column & 3));
  }
  DEVICE float2& pair(int row, int column) const { return *(float2*)at(row, column); }
};

// Asynchronously copies tokens [first, first + count) of one head, D numbers of SIZE bytes each; zeros up to TILE rows.
template <int D, int SIZE, typename At>
DEVICE void copy_rows(const void* from, i64 first, int count, int heads, int head, At at) {
  constexpr int PIECES = D * SIZE / 16, ROWS = THREADS / PIECES;
  const int row_of_thread = thread_index() / PIECES, piece = thread_index() % PIECES;
  const byte* p = (const byte*)from + (first * heads + head) * (D * SIZE) + piece * 16;
#pragma unroll
  for (int i = 0; i < TILE; i += ROWS) {
    const int row = i + row_of_thread;
    copy_16_bytes(at(row, piece * (16 / SIZE)), p + (i64)min(row, count - 1) * (heads * D * SIZE), row < count);
  }
}
template <int D> DEVICE void copy_rows(Matrix<D> to, const void* from, i64 first, int count, int heads, int head) {
  copy_rows<D, 2>(from, first, count, heads, head, [&](int row, int column) { return (void*)to.at(row, column); });
}
template <int D> DEVICE void copy_rows(WideMatrix<D> to, const float* from, i64 first, int count, int heads, int head) {
  copy_rows<D, 4>(from, first, count, heads, head, [&](int row, int column) { return (void*)to.at(row, column); });
}

// ---------------------------------------------------------------------------------------------------------------------
// Gates
// ---------------------------------------------------------------------------------------------------------------------

// What a tile's gates see of the content, in shared memory.
struct Content {
  Matrix<V> down;       // P_down^T [RANK, V], bf16 ("read")
  Matrix<K> up;         // P_up [RANK, K], bf16 ("read")
  Matrix<K> Z;          // (S_c P_down)^T [RANK, K], bf16 ("read")
  float* write;         // p_write [RANK] ("read")
  float* erase_shift;   // z P_up [K] ("mean")
  float* write_shift;   // z_t p_write [TILE] ("read"), [1] ("mean")
  int R;
};

// "read": fills shared memory with the projections; zeros for those not given.
DEVICE void load_projections(const Content& c, const float* p_down, const float* p_up, const float* p_write, int head) {
  const int R = c.R, thread = thread_index();
  for (int i = thread; i < RANK * V / 2; i += THREADS) {
    const int r = i / (V / 2), v = 2 * (i % (V / 2));
    const float* p = p_down + ((i64)head * V + v) * R + r;
    c.down.pair(r, v) = r < R ? pack<Bf16>(p[0], p[R]) : 0;
  }
  for (int i = thread; i < RANK * K / 2; i += THREADS) {
    const int r = i / (K / 2), k = 2 * (i % (K / 2));
    const float* p = p_up + ((i64)head * R + r) * K + k;
    c.up.pair(r, k) = r < R && p_up ? pack<Bf16>(p[0], p[1]) : 0;
  }
  if (thread < RANK) c.write[thread] = thread < R && p_write ? p_write[(i64)head * R + thread] : 0;
}

// "read": z_t^ = k_t^T Z of a block of 16 tokens, and 1 / rms of it (1 without norm) for this thread's two rows.
DEVICE Sums read_memory(const Content& c, Matrix<K> k, float (&root)[2]) {
  Sums z = zeros();
#pragma unroll
  for (int n = 0; n < COLUMNS; ++n) multiply(z, to_bf16<Input>(k.load(0, 16 * n)), c.Z.load(0, 16 * n));
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    root[i] = 1;
    if constexpr (RMS) {
      float squares = 0;
#pragma unroll
      for (int t = 0; t < 2; ++t) squares += z.x[t][2 * i] * z.x[t][2 * i] + z.x[t][2 * i + 1] * z.x[t][2 * i + 1];
      root[i] = reciprocal_root(quad_sum(squares) / c.R + 1e-8f);
    }
  }
  return z;
}
DEVICE Sums scale_rows(Sums z, const float (&root)[2]) {
#pragma unroll
  for (int t = 0; t < 2; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i) z.x[t][i] *= root[i >> 1];
  return z;
}

// "read": adds z_t P_up to the erase logits in e, in place, and sets the write logits' shifts.
DEVICE void shift_logits(const Content& c, Matrix<K> k, Matrix<K> e) {
  constexpr int PARTS = WARPS / BLOCKS;  // warps that share a block's columns
  for (int job = warp(); job < BLOCKS * PARTS; job += WARPS) {
    const int s = job / PARTS, part = job % PARTS;
    float root[2];
    Sums z = scale_rows(read_memory(c, k.block(s), root), root);
    const Operand z_bf16 = round_to_bf16(z);
#pragma unroll
    for (int n = part; n < COLUMNS; n += PARTS) {
      Sums shift = zeros();
      multiply(shift, z_bf16, c.up.load_transposed(0, 16 * n));
#pragma unroll
      for (int t = 0; t < 2; ++t)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          u32& x = e.block(s).pair(quad_row() + 8 * i, 16 * n + 8 * t + quad_column());
          const float2 y = unpack<Input>(x);
          x = pack<Input>(y.x + shift.x[t][2 * i], y.y + shift.x[t][2 * i + 1]);
        }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float shift = 0;
#pragma unroll
      for (int t = 0; t < 2; ++t)
        shift += z.x[t][2 * i] * c.write[8 * t + quad_column()] + z.x[t][2 * i + 1] * c.write[8 * t + quad_column() + 1];
      shift = quad_sum(shift);
      if (part == 0 && (lane() & 3) == 0) c.write_shift[16 * s + quad_row() + 8 * i] = shift;
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Preparing a tile
// ---------------------------------------------------------------------------------------------------------------------

struct Prepared {
  Matrix<K> q, k, e;           // inputs; e holds erase logits
  WideMatrix<K> g;
  Matrix<K> q_in, bk_in;       // scale q exp G, b k exp G
  Matrix<K> k_out, k_end;      // k exp -G (0 in strong blocks), k exp(G_16 - G)
  float* decay;                // [BLOCKS][K], exp G_16
  float* a;                    // [TILE], write gate
  float* w;                    // [TILE], its logit
  int* strong;                 // [BLOCKS], whether to go pair by pair
  float scale, top;            // top: 2 with allow_neg_eigval, else 1
  bool has_w;
};

DEVICE float2 erase_shift(const Content& c, int k) {
  if constexpr (MEAN) return *(float2*)(c.erase_shift + k);
  return make_float2(0, 0);
}

// Decays, gates, and everything that they scale.  A thread has two columns of a block.  q_in may lie over q; g is replaced
// by G, in powers of 2.  Expects `strong` at 0; has a barrier inside, and none at the end.
DEVICE void prepare(const Prepared& p, const Content& c) {
  constexpr int JOBS = BLOCKS * K / 2, ROUNDS = JOBS > THREADS ? JOBS / THREADS : 1;
  constexpr int PARTS = JOBS < THREADS ? THREADS / JOBS : 1, TOKENS = BLOCK / PARTS;  // threads that share two columns
  const int part = PARTS > 1 ? thread_index() / JOBS : 0;
  float2 G[ROUNDS][TOKENS], end[ROUNDS];
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) {
    const int job = (thread_index() + round * THREADS) % JOBS, s = job / (K / 2), column = 2 * (job % (K / 2));
    float2 sum = make_float2(0, 0);
#pragma unroll
    for (int t = 0; t < BLOCK; ++t) {
      const float2 g = p.g.pair(16 * s + t, column);
      sum = make_float2(sum.x + at_least(LOG2_E * g.x, GONE), sum.y + at_least(LOG2_E * g.y, GONE));
      if (t / TOKENS == part) G[round][t % TOKENS] = sum;
    }
    end[round] = sum;
    if (fminf(sum.x, sum.y) < -MILD) raise_flag(p.strong + s);
    if (part == 0) *(float2*)(p.decay + s * K + column) = make_float2(exp2_(sum.x), exp2_(sum.y));
  }
  sync();
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) {
    const int job = (thread_index() + round * THREADS) % JOBS, s = job / (K / 2), column = 2 * (job % (K / 2));
    const bool strong = p.strong[s];
    const float2 shift = erase_shift(c, column), G_16 = end[round];
    const float2 growth = make_float2(exp2_(-G_16.x), exp2_(-G_16.y));
    u32 q_raw[TOKENS], k_raw[TOKENS], e_raw[TOKENS];  // all read before any is written, not to wait for each in turn
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
      const int row = 16 * s + part * TOKENS + t;
      q_raw[t] = p.q.pair(row, column), k_raw[t] = p.k.pair(row, column), e_raw[t] = p.e.pair(row, column);
    }
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
      const int row = 16 * s + part * TOKENS + t;
      const float2 sum = G[round][t];
      const float2 q = unpack<Input>(q_raw[t]), k = unpack<Input>(k_raw[t]), x = unpack<Input>(e_raw[t]);
      const float2 in = make_float2(exp2_(sum.x), exp2_(sum.y));
      const float2 b = make_float2(p.top * sigmoid(x.x + shift.x), p.top * sigmoid(x.y + shift.y));
      p.q_in.pair(row, column) = pack<Bf16>(q.x * (in.x * p.scale), q.y * (in.y * p.scale));
      p.bk_in.pair(row, column) = pack<Bf16>(b.x * k.x * in.x, b.y * k.y * in.y);
      const float2 k_end = make_float2(k.x * exp2_(G_16.x - sum.x), k.y * exp2_(G_16.y - sum.y));
      p.k_end.pair(row, column) = pack<Bf16>(k_end.x, k_end.y);
      p.k_out.pair(row, column) = strong ? 0 : pack<Bf16>(k_end.x * growth.x, k_end.y * growth.y);
      p.g.pair(row, column) = sum;
    }
  }
  const float write_shift = READ ? 0 : MEAN ? *c.write_shift : 0;
  for (int t = thread_index(); t < TILE; t += THREADS)
    p.a[t] = p.has_w ? sigmoid(p.w[t] + (READ ? c.write_shift[t] : write_shift)) : 1;
}

// ---------------------------------------------------------------------------------------------------------------------
// Gradients
// ---------------------------------------------------------------------------------------------------------------------

DEVICE void scale_by_rows(Sums& x, const float (&by)[2]) {
#pragma unroll
  for (int t = 0; t < 2; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i) x.x[t][i] *= by[i >> 1];
}

// Sums from each of a block's 16 rows on.
DEVICE void sum_from_row(Sums& x) {
#pragma unroll
  for (int t = 0; t < 2; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int rows = 1; rows < 8; rows *= 2) {
        const float later = shuffle(x.x[t][i], lane() + 4 * rows);
        if (quad_row() + rows < 8) x.x[t][i] += later;
      }
#pragma unroll
  for (int t = 0; t < 2; ++t)
#pragma unroll
    for (int i = 0; i < 2; ++i) x.x[t][i] += shuffle(x.x[t][2 + i], lane() & 3);
}

// The part of a strong block's gradients that M and A bring, pair by pair, for two columns of token i (row of p's
// matrices): of q, of b k, and of k as the later and the earlier partner.  q_rows: the block's queries in device memory,
// `stride` numbers apart, `count` of them.
struct PairGradients { float2 q, bk, k; };
DEVICE PairGradients differentiate_pair_by_pair(const Prepared& p, const Content& c, const float* dM, const float* dA,
                                                const u32* q_rows, i64 stride, int count, int s, int i, int column) {
  PairGradients d = {make_float2(0, 0), make_float2(0, 0), make_float2(0, 0)};
  const float2 G_i = p.g.pair(16 * s + i, column), shift = erase_shift(c, column);
#pragma unroll 1
  for (int j = 0; j < min(BLOCK, count); ++j) {
    const int row = 16 * s + j;
    const float2 G_j = p.g.pair(row, column), k = unpack<Input>(p.k.pair(row, column));
    if (j <= i) {
      const float2 decayed = make_float2(k.x * exp2_(G_i.x - G_j.x), k.y * exp2_(G_i.y - G_j.y));
      const float M = p.scale * dM[i * 16 + j], A = dA[i * 16 + j];
      d.q.x += M * decayed.x, d.q.y += M * decayed.y;
      d.bk.x += A * decayed.x, d.bk.y += A * decayed.y;
    }
    if (j >= i) {
      const float2 q = unpack<Input>(q_rows[(j * stride + column) / 2]), x = unpack<Input>(p.e.pair(row, column));
      const float M = p.scale * dM[j * 16 + i], A = p.top * dA[j * 16 + i];
      d.k.x += exp2_(G_j.x - G_i.x) * (M * q.x + A * sigmoid(x.x + shift.x) * k.x);
      d.k.y += exp2_(G_j.y - G_i.y) * (M * q.y + A * sigmoid(x.y + shift.y) * k.y);
    }
  }
  return d;
}

// Inputs as in the forward, what it saved, and what the reverse pass left.  Gradients of tokens have HV heads.
KERNEL void __launch_bounds__(THREADS, 1) carve_gradients(
    const void* q, const void* k, const void* v, const float* g, const void* e, const float* w, const float* p_down,
    const float* p_up, const float* p_write, const i64* bounds, const i64* positions, const u32* states,
    const u32* edits, const float* contents, const void* d_o, const u32* d_states, const u32* d_edits,
    const float* passed, const u32* d_z_all, void* d_q, void* d_k, void* d_v, float* d_g, void* d_e, float* d_w,
    float scale, float top, int N, int H, int HV, int H_g, int H_e, int R, int T, int C) {
  byte* shared = shared_memory();
  const int head = block_index() % HV, thread = thread_index();
  const int key_head = head / (HV / H), g_head = head / (HV / H_g), e_head = head / (HV / H_e);

  // -- which tile --
  const i64 tile = block_index() / HV;
  const int tiles_of_chunk = (min(C, T) + TILE - 1) / TILE;
  int n = 0;  // the last sequence whose slots begin at the tile's or before
  for (int size = N; size > 1;) {
    const int half = size / 2;
    if (Sequence(bounds, nullptr, n + half, T, C).slot <= tile / tiles_of_chunk) n += half;
    size -= half;
  }
  const Sequence sequence(bounds, positions, n, T, C);
  const int chunk = (int)(tile / tiles_of_chunk - sequence.slot), token_of_chunk = (int)(tile % tiles_of_chunk) * TILE;
  if (chunk >= sequence.chunks) return;
  const int first = sequence.first(chunk) + token_of_chunk, last = sequence.last(chunk);
  if (first >= last) return;
  const int count = min(TILE, last - first);
  const i64 token = sequence.begin + first, slot = (sequence.slot + chunk) * HV + head;
  const i64 state_slot = sequence.slot_of(chunk, token_of_chunk, SAVE), block_slot = sequence.slot_of(chunk, token_of_chunk, BLOCK);

  float* small = (float*)(shared + O_CONTENT);
  Content seen = {{shared + O_DOWN}, {shared + O_UP}, {shared + O_Z}, small, small + 4 * RANK, small + 4 * RANK + K, R};
  Prepared p = {{shared + O_Q}, {shared + O_K}, {shared + O_E}, {shared + O_G}, {shared + O_Q}, {shared + O_BK_IN},
                {shared + O_K_OUT}, {shared + O_K_END},
                (float*)(shared + O_DECAY), (float*)(shared + O_WRITE), (float*)(shared + O_W), (int*)(shared + O_STRONG),
                scale, top, w != nullptr};
  const Matrix<V> d = {shared + O_D}, v_new = {shared + O_EDITS}, dr = {shared + O_DR};
  const Matrix<16> dM = {shared + O_DM}, dA = {shared + O_DA};        // [TILE, 16]
  float *dM_wide = (float*)(shared + O_PAIRS), *dA_wide = dM_wide + BLOCKS * 256;  // the same in fp32, [BLOCKS, 16, 16]
  float* dw = (float*)(shared + O_DW);                                // partial gradients of the write gate, [ROWS, TILE]

  // -- inputs --
  const i64 state_at = (state_slot * HV + head) * ROWS * COLUMNS * 32 + (warp() % COLUMNS) * 32 + lane();
  const uint4 *own_states = (const uint4*)states + state_at, *own_d_states = (const uint4*)d_states + state_at;
  uint4 next_S = own_states[0], next_dS = own_d_states[0];
  copy_rows(p.g, g, token, count, H_g, g_head);
  copy_rows(p.k, k, token, count, H, key_head);
  copy_rows(p.q, q, token, count, H, key_head);
  copy_rows(p.e, e, token, count, H_e, e_head);
  copy_rows(d, d_o, token, count, HV, head);
  // v_new, dr and v: what this warp has of the tile's pieces, a block's 16 rows of V each; read now, used below
  constexpr int PIECES = BLOCKS * ROWS / WARPS;
  static_assert(PIECES * WARPS == BLOCKS * ROWS, "every warp has as many pieces");
  uint4 v_new_piece[PIECES], dr_piece[PIECES];
  u32 v_piece[PIECES][4];
#pragma unroll
  for (int i = 0; i < PIECES; ++i) {
    const int job = warp() + i * WARPS, s = job / ROWS, m = job % ROWS;
    const i64 at = (((block_slot + s) * HV + head) * ROWS + m) * 32 + lane();
    v_new_piece[i] = dr_piece[i] = make_uint4(0, 0, 0, 0);
    if (16 * s < count) v_new_piece[i] = ((const uint4*)edits)[at], dr_piece[i] = ((const uint4*)d_edits)[at];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int row = 16 * s + quad_row() + 8 * (j & 1), column = 16 * m + 8 * (j >> 1) + quad_column();
      v_piece[i][j] = row < count ? ((const u32*)v)[(((token + row) * HV + head) * V + column) / 2] : 0;
    }
  }
  if (w && thread < TILE) copy_4_bytes(p.w + thread, w + (token + min(thread, count - 1)) * HV + head, thread < count);
  if (thread < BLOCKS) p.strong[thread] = 0;
  const float* from_content = passed + slot * (V + K + 4);  // "mean"
  if constexpr (MEAN) {
    for (int i = thread; i < K; i += THREADS) seen.erase_shift[i] = from_content[V + i];
    if (thread == 0) *seen.write_shift = from_content[V + K];
  }
  if constexpr (READ) {
    load_projections(seen, p_down, p_up, p_write, head);
    for (int i = thread; i < RANK * K / 2; i += THREADS)
      ((u32*)seen.Z.base)[i] = ((const u32*)contents)[slot * (RANK * K / 2) + i];
  }
#pragma unroll
  for (int i = 0; i < PIECES; ++i) {
    const int job = warp() + i * WARPS, s = job / ROWS, m = job % ROWS;
    v_new.block(s).store(0, 16 * m, transpose(as_operand(v_new_piece[i])));
    dr.block(s).store(0, 16 * m, transpose(as_operand(dr_piece[i])));
  }
  wait_for_copies();
  sync();

  // -- as in the forward: gates and decays; and d --
  if constexpr (READ) {
    shift_logits(seen, p.k, p.e);
    sync();
  }
  if constexpr (MEAN || HALF)
    for (int i = thread; i < TILE * V / 2; i += THREADS) {
      const int row = i / (V / 2), column = 2 * (i % (V / 2));
      const float2 x = unpack<Input>(d.pair(row, column));
      const float2 more = MEAN ? *(const float2*)(from_content + column) : make_float2(0, 0);
      d.pair(row, column) = pack<Bf16>(x.x + more.x, x.y + more.y);
    }
  prepare(p, seen);
  sync();

  // -- dM and dA, one matrix a warp; dv and the write gate, a block's 16 rows of V a warp --
  for (int job = warp(); job < 2 * BLOCKS; job += WARPS) {
    const int s = job % BLOCKS;
    const bool for_M = job < BLOCKS;
    Sums sums = zeros();
#pragma unroll
    for (int m = 0; m < ROWS; ++m)
      multiply(sums, for_M ? d.block(s).load(0, 16 * m) : negate(dr.block(s).load(0, 16 * m)), v_new.block(s).load(0, 16 * m));
    float* wide = (for_M ? dM_wide : dA_wide) + s * 256;
    for_each(sums, [&](float& x, int i, int j) {
      x = i > j || (for_M && i == j) ? x : 0;
      wide[i * 16 + j] = x;
    });
    (for_M ? dM : dA).block(s).store(0, 0, round_to_bf16(sums));
  }
#pragma unroll
  for (int i = 0; i < PIECES; ++i) {
    const int job = warp() + i * WARPS, s = job / ROWS, m = job % ROWS;
    const Operand rows = dr.block(s).load(0, 16 * m);
    float sums[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int row = 16 * s + quad_row() + 8 * (j & 1), column = 16 * m + 8 * (j >> 1) + quad_column();
      const float2 x = unpack<Input>(v_piece[i][j]), y = unpack<Bf16>(rows.x[j]);
      sums[j & 1] += x.x * y.x + x.y * y.y;
      if (row < count) ((u32*)d_v)[(((token + row) * HV + head) * V + column) / 2] = pack<Input>(p.a[row] * y.x, p.a[row] * y.y);
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      sums[j] = quad_sum(sums[j]);
      if ((lane() & 3) == 0) dw[m * TILE + 16 * s + quad_row() + 8 * j] = sums[j];
    }
  }
  sync();
  if (w && thread < count) {
    float x = 0;
#pragma unroll
    for (int m = 0; m < ROWS; ++m) x += dw[m * TILE + thread];
    d_w[(token + thread) * HV + head] = x * p.a[thread] * (1 - p.a[thread]);
  }

  // -- products over V: S forward and dS back, one slab of 16 rows of V after the other --
  const int first_column = 16 * (warp() % COLUMNS), first_block = warp() / COLUMNS * HALF_BLOCKS;
  if (16 * first_block >= count) return;
  Sums dq_in[HALF_BLOCKS], dk_in[HALF_BLOCKS], dk_end[HALF_BLOCKS];
  float behind[HALF_BLOCKS][2];  // sum over V of S dS behind each block: the gradient of all decay up to there
#pragma unroll
  for (int j = 0; j < HALF_BLOCKS; ++j) dq_in[j] = dk_in[j] = dk_end[j] = zeros(), behind[j][0] = behind[j][1] = 0;
#pragma unroll 1
  for (int m = 0; m < ROWS; ++m) {
    Sums S = widen(transpose(as_operand(next_S))), dS = widen(transpose(as_operand(next_dS)));
    if (m + 1 < ROWS) next_S = own_states[(m + 1) * COLUMNS * 32], next_dS = own_d_states[(m + 1) * COLUMNS * 32];

    auto step = [&](int s) {  // S from before block s to behind it
      const float decay[2] = {p.decay[s * K + first_column + quad_row()], p.decay[s * K + first_column + quad_row() + 8]};
      scale_by_rows(S, decay);
      multiply(S, p.k_end.block(s).load_transposed(0, first_column), v_new.block(s).load_transposed(0, 16 * m));
    };
    auto step_back = [&](int s) {  // dS from behind block s to before it
      const float decay[2] = {p.decay[s * K + first_column + quad_row()], p.decay[s * K + first_column + quad_row() + 8]};
      scale_by_rows(dS, decay);
      multiply(dS, p.q_in.block(s).load_transposed(0, first_column), d.block(s).load_transposed(0, 16 * m));
      multiply(dS, negate(p.bk_in.block(s).load_transposed(0, first_column)), dr.block(s).load_transposed(0, 16 * m));
    };

#pragma unroll 1
    for (int s = 0; s < first_block; ++s) step(s);
    Sums S_behind[HALF_BLOCKS];
#pragma unroll
    for (int j = 0; j < HALF_BLOCKS; ++j) {
      const int s = first_block + j;
      const Operand S_in = round_to_bf16(S);
      multiply(dq_in[j], d.block(s).load(0, 16 * m), S_in);
      multiply(dk_in[j], negate(dr.block(s).load(0, 16 * m)), S_in);
      step(s);
      S_behind[j] = S;
    }
#pragma unroll 1
    for (int s = BLOCKS - 1; s >= first_block + HALF_BLOCKS; --s) step_back(s);
#pragma unroll
    for (int j = HALF_BLOCKS - 1; j >= 0; --j) {
      const int s = first_block + j;
      multiply(dk_end[j], v_new.block(s).load(0, 16 * m), round_to_bf16(dS));
#pragma unroll
      for (int t = 0; t < 2; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) behind[j][i >> 1] += S_behind[j].x[t][i] * dS.x[t][i];
      if (j > 0) step_back(s);
    }
  }

  // -- from what was scaled back to q, k, the gates and the decay --
#pragma unroll
  for (int j = 0; j < HALF_BLOCKS; ++j) {
    const int s = first_block + j, count_of_block = count - 16 * s;
    if (count_of_block <= 0) break;
    const i64 token_of_block = token + 16 * s;
    const bool strong = p.strong[s];
    Sums dk_out = zeros(), dk, dG;
    if (!strong) {
      const Operand k_out = p.k_out.block(s).load_transposed(0, first_column);
      multiply(dq_in[j], dM.block(s).load(0, 0), k_out);
      multiply(dk_in[j], dA.block(s).load(0, 0), k_out);
      multiply(dk_out, dA.block(s).load_transposed(0, 0), p.bk_in.block(s).load_transposed(0, first_column));
      multiply(dk_out, dM.block(s).load_transposed(0, 0), p.q_in.block(s).load_transposed(0, first_column));
    }
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const int column = first_column + 8 * t + quad_column();
      const float2 end = p.g.pair(16 * s + BLOCK - 1, column), shift = erase_shift(seen, column);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = quad_row() + 8 * i, row_of_tile = 16 * s + row;
        const float2 sum = p.g.pair(row_of_tile, column);
        const float2 q_pair = unpack<Bf16>(p.q_in.pair(row_of_tile, column));
        const float2 k_pair = unpack<Input>(p.k.pair(row_of_tile, column));
        const float2 logit = unpack<Input>(p.e.pair(row_of_tile, column));
        PairGradients pairs = {make_float2(0, 0), make_float2(0, 0), make_float2(0, 0)};
        float2 q_raw = make_float2(0, 0);
        if (strong && row < count_of_block) {
          const u32* q_rows = (const u32*)q + (token_of_block * H + key_head) * (K / 2);
          pairs = differentiate_pair_by_pair(p, seen, dM_wide + s * 256, dA_wide + s * 256, q_rows, (i64)H * K, count_of_block, s, row, column);
          q_raw = unpack<Input>(q_rows[((i64)row * H * K + column) / 2]);
        }
        float dq_pair[2], dx_pair[2];
        auto differentiate = [&](int at, float G, float G_16, float q_in, float q_i, float k_i, float x, float q_more, float bk_more, float k_more) {
          const float in = exp2_(G), b = sigmoid(x);
          const float dq_i = dq_in[j].x[t][2 * i + at] * in * scale;
          const float dk_erase = (dk_in[j].x[t][2 * i + at] * in + bk_more) * (top * b);
          const float dk_write = dk_out.x[t][2 * i + at] * (strong ? 0 : exp2_(-G)) + dk_end[j].x[t][2 * i + at] * exp2_(G_16 - G) + k_more;
          dq_pair[at] = dq_i + q_more;
          dx_pair[at] = dk_erase * k_i * (1 - b);
          dk.x[t][2 * i + at] = dk_erase + dk_write;
          dG.x[t][2 * i + at] = dq_in[j].x[t][2 * i + at] * q_in + q_more * q_i + (dk_erase - dk_write) * k_i;
        };
        differentiate(0, sum.x, end.x, q_pair.x, q_raw.x, k_pair.x, logit.x + shift.x, pairs.q.x, pairs.bk.x, pairs.k.x);
        differentiate(1, sum.y, end.y, q_pair.y, q_raw.y, k_pair.y, logit.y + shift.y, pairs.q.y, pairs.bk.y, pairs.k.y);
        if (row < count_of_block) {
          const i64 at = (((token_of_block + row) * HV + head) * K + column) / 2;
          ((u32*)d_q)[at] = pack<Input>(dq_pair[0], dq_pair[1]);
          ((u32*)d_e)[at] = pack<Input>(dx_pair[0], dx_pair[1]);
        }
      }
    }

    sum_from_row(dG);
    const float whole[2] = {quad_sum(behind[j][0]), quad_sum(behind[j][1])};  // of columns quad_row() and quad_row() + 8
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const int column = first_column + 8 * t + quad_column();
      const float more[2] = {shuffle(whole[t], 4 * quad_column()), shuffle(whole[t], 4 * quad_column() + 4)};
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (quad_row() + 8 * i < count_of_block)
          *(float2*)(d_g + ((token_of_block + quad_row() + 8 * i) * HV + head) * K + column) =
              make_float2(dG.x[t][2 * i] + more[0], dG.x[t][2 * i + 1] + more[1]);
    }

    if constexpr (READ) {
      const Operand dz = as_operand(((const uint4*)d_z_all)[((block_slot + s) * HV + head) * 32 + lane()]);
      multiply(dk, dz, seen.Z.load_transposed(0, first_column));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = quad_row() + 8 * (i & 1), t = i >> 1, column = first_column + 8 * t + quad_column();
      if (row < count_of_block)
        ((u32*)d_k)[(((token_of_block + row) * HV + head) * K + column) / 2] =
            pack<Input>(dk.x[t][2 * (i & 1)], dk.x[t][2 * (i & 1) + 1]);
    }
  }
}
