// What `gradients.cu` runs again of the forward, by all threads and a tile at a time: gates, decays, and all that they
// scale.

DEVICE Operand negate(Operand a) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a.x[i] ^= 0x80008000u;
  return a;
}

DEVICE Sums widen(const Operand& a) {
  Sums y;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 x = unpack<Bf16>(a.x[i]);
    y.x[i >> 1][2 * (i & 1)] = x.x, y.x[i >> 1][2 * (i & 1) + 1] = x.y;
  }
  return y;
}

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

// Starts fetching tokens [first, first + count) of one head into the L2 cache.
template <int D, int SIZE> DEVICE void fetch_rows(const void* from, i64 first, int count, int heads, int head) {
  constexpr int LINES = D * SIZE / 128;
  for (int i = thread_index(); i < count * LINES; i += THREADS)
    fetch_into_cache((const byte*)from + ((first + i / LINES) * heads + head) * (D * SIZE) + i % LINES * 128);
}

// ---------------------------------------------------------------------------------------------------------------------
// Gates
// ---------------------------------------------------------------------------------------------------------------------

// The content projections of this head and what they make of the current content, in shared memory.
struct Content {
  Matrix<V> down;       // P_down^T [RANK, V], bf16 ("read")
  Matrix<K> up;         // P_up [RANK, K], bf16 ("read")
  Matrix<K> Z;          // (S_c P_down)^T [RANK, K], bf16 ("read")
  float* wide_down;     // P_down [V, RANK] ("mean")
  float* wide_up;       // P_up [RANK, K] ("mean")
  float* write;         // p_write [RANK]
  float* raw;           // m_c P_down [RANK] ("mean")
  float* z;             // norm of it [RANK] ("mean")
  float* erase_shift;   // z P_up [K] ("mean")
  float* write_shift;   // z_t p_write [TILE] ("read"), [1] ("mean")
  int R;
};

// Fills shared memory with the projections; zeros for those not given.
DEVICE void load_projections(const Content& c, const float* p_down, const float* p_up, const float* p_write, int head) {
  const int R = c.R, thread = thread_index();
  if constexpr (READ) {
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
  }
  if constexpr (MEAN) {
    for (int i = thread; i < V * RANK; i += THREADS) {
      const int v = i / RANK, r = i % RANK;
      c.wide_down[i] = r < R ? p_down[((i64)head * V + v) * R + r] : 0;
    }
    for (int i = thread; i < RANK * K; i += THREADS)
      c.wide_up[i] = i / K < R && p_up ? p_up[(i64)head * R * K + i] : 0;
  }
  if constexpr (MEAN || READ)
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
  constexpr int PARTS = WARPS < BLOCKS ? 1 : WARPS / BLOCKS;  // warps that share a block's columns
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
      sum = make_float2(sum.x + fmaxf(LOG2_E * g.x, GONE), sum.y + fmaxf(LOG2_E * g.y, GONE));
      if (t / TOKENS == part) G[round][t % TOKENS] = sum;
    }
    end[round] = sum;
    if (fminf(sum.x, sum.y) < -MILD) p.strong[s] = 1;
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
