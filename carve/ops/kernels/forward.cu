// The forward: one program per (sequence, value head), the whole recurrence in one pass.
//
// Two kinds of warps work side by side.  Preparing warps copy the inputs and turn them into what does not depend on the
// content; state warps hold the state, V / 4 of its rows each, and do the rest.  Blocks of 16 tokens pass from one kind
// to the other through a ring of slots in shared memory, so that copies and preparation are a tile ahead.  There are
// only four state warps, with many registers, as the speed of shared memory is the limit: the more rows a warp has,
// the less often keys and queries are read.  Where two programs share a head, a warp has few rows, and what counts is the
// time from a chunk to the next: four more warps then help with the gates.
//
// Keys enter the products as they leave: with x = k exp -G, and D the block's decay,
//
//     A = (b k exp G) x^T,  M = (scale q exp G) x^T,  S <- D (S + x^T v_new)
//
// A strong block, where exp -G may overflow, halves its tokens again and again instead: the decay between a token of
// the upper and one of the lower half splits at the half's border into two factors of at most 1.

constexpr int STATE_WARPS = 4, PREPARERS = 4;            // warps that hold the state; preparing warps
constexpr int GATE_WARPS = SPLIT > 1 ? 8 : STATE_WARPS;  // warps that open the gates, the state warps first
constexpr int GATE_THREADS = 32 * GATE_WARPS, PROGRAM = GATE_THREADS + 32 * PREPARERS;
constexpr int STRIPS = ROWS / STATE_WARPS;               // strips of 16 rows of S^T that a state warp holds
constexpr int RING = 2 * BLOCKS;                         // slots
constexpr int PARTS = GATE_WARPS / BLOCKS;               // warps that share a block's gates, by columns
constexpr bool EARLY = MEAN && SPLIT > 1;                // exponentials of erase logits by the preparing warps

// A slot.  q_in lies over q, b k exp G over e (E if EARLY), x and k exp G over g; outputs over v.  Strong blocks: G over g, keys for
// the state over k.
constexpr int O_K_IN = O_G + K_ROWS, O_DECAY = O_MORE, O_A = O_DECAY + K * 4;
constexpr int O_STRONG = O_A + BLOCK * 4, SLOT = (O_STRONG + 4 + 255) / 256 * 256;

constexpr int PROJECTION = MEAN ? RANK * K * 4 : READ ? RANK * K * 2 : 0;
constexpr int O_T = RING * SLOT, O_ONES = O_T + TILE * 32, O_SIGNALS = O_ONES + K * 4;
constexpr int ADDENDS = SPLIT * STATE_WARPS;             // of the mean's projection: one of each state warp of the head
constexpr int O_WRITE = O_SIGNALS + 16 * RING + 16, O_RAW = O_WRITE + RANK * 4;
constexpr int MET = MEAN ? 2 * ADDENDS * RANK * 4 : READ && SPLIT > 1 ? 2 * RANK * K * 4 : 0;
constexpr int O_DOWN = (O_RAW + MET + 255) / 256 * 256;
constexpr int O_UP = O_DOWN + (READ ? RANK * V * 2 : MEAN ? RANK * V * 4 : 0), O_Z = O_UP + PROJECTION;
constexpr int O_SCRATCH = O_Z + (READ ? PROJECTION : 0);  // SCRATCH bytes a gate warp
constexpr int SCRATCH = 1024, SHARED_BYTES = O_SCRATCH + GATE_WARPS * SCRATCH;

static_assert(SPLIT <= 2, "two programs add up what each of them has to the same bits, more would need an order");
static_assert(PROGRAM == THREADS, "carve/ops/kernels/cuda.py says how many threads a program has");
static_assert(SHARED_BYTES <= CARVE_SHARED, "carve/ops/kernels/cuda.py says how much shared memory a program gets");

DEVICE void sync_gate_warps() { barrier(1, GATE_THREADS); }

DEVICE Sums scaled(Sums x, float factor) {
#pragma unroll
  for (int t = 0; t < 2; ++t)
#pragma unroll
    for (int n = 0; n < 4; ++n) x.x[t][n] *= factor;
  return x;
}

// Where an operand of a matrix with rows of D numbers is for this lane, in bytes; for columns from 16 n on, XOR 32 n.
// What serves a left operand serves the transpose of a right one, and the other way round.
template <int D> DEVICE u32 lane_left() { return (lane() & 15) * (2 * D) + (((lane() >> 4) ^ (lane() & 7)) << 4); }
template <int D> DEVICE u32 lane_right() {
  return ((lane() & 7) + 8 * (lane() >> 4)) * (2 * D) + ((((lane() >> 3) & 1) ^ (lane() & 7)) << 4);
}
DEVICE u32 lane_pair() { return quad_row() * (2 * K) + (quad_row() << 4) + 2 * quad_column(); }  // [16, K]: to store

DEVICE Operand load_left(u32 address) {
  Operand a;
  load_quarters(a.x, address);
  return a;
}
DEVICE void store_left(u32 address, const Operand& a) {
  store_shared(address, a.x[0]);
  store_shared(address + 16 * K, a.x[1]);
  store_shared(address ^ 16, a.x[2]);
  store_shared((address ^ 16) + 16 * K, a.x[3]);
}

struct Slot : BlockSlot<O_DECAY, O_A, O_STRONG> {
  DEVICE Matrix<K> x() const { return {base + O_G}; }        // k exp -G
  DEVICE Matrix<K> k_in() const { return {base + O_K_IN}; }  // k exp G
  DEVICE Matrix<V> v() const { return {base + O_V}; }        // values, then outputs
  // exp G_16, in the order in which the lanes that hold the state need it: four numbers of 16 columns a lane
  DEVICE float* decay() const { return (float*)(base + O_DECAY); }
  DEVICE float2& decay(int column) const {
    return *(float2*)(decay() + place_of_decay(column));
  }
};

typedef RingOf<Slot, RING, SLOT, 0, O_SIGNALS, O_SIGNALS + 8 * RING> Ring;

// ---------------------------------------------------------------------------------------------------------------------
// Preparing warps
// ---------------------------------------------------------------------------------------------------------------------

// The blocks of a sequence, one after the other.
struct Cursor {
  int token, last, chunk;  // first token; one behind the chunk's last
  Ring ring;

  DEVICE bool valid(const Sequence& sequence) const { return token < sequence.length; }
  DEVICE void skip(const Sequence& sequence, int blocks) {
    ring.step(blocks);
    while (valid(sequence)) {
      const int left = (last - token + BLOCK - 1) / BLOCK;
      if (blocks < left) {
        token += blocks * BLOCK;
        return;
      }
      token = last, blocks -= left;
      if (valid(sequence)) last = sequence.last(++chunk);
    }
  }
};

// Adds sum_d x_id k_jd exp(G_id - G_jd) over 16 columns to element [i, j] of levels[l], where i and j differ first in
// bit 3 - l, and i has it; other elements become meaningless.  x and k are fragments laid out as sums are.
DEVICE void multiply_strong(Sums (&levels)[4], const Sums& x, const Sums& k, Slot slot, int column) {
  const int lane = lane_anew(), first_row = lane >> 2, first_column = column + 2 * (lane & 3);
#pragma unroll
  for (int l = 0; l < 4; ++l) {
    const int half = 8 >> l;
    Sums upper, lower;
#pragma unroll
    for (int t = 0; t < 2; ++t)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = first_row + 8 * i, border = (row & -2 * half) + half - 1, c = first_column + 8 * t;
        const bool up = row & half;
        const float2 G = slot.G(row, c), G_border = slot.G(border, c);
        const float fx = exp2_(up ? G.x - G_border.x : G_border.x - G.x);
        const float fy = exp2_(up ? G.y - G_border.y : G_border.y - G.y);
        upper.x[t][2 * i] = up ? x.x[t][2 * i] * fx : 0, upper.x[t][2 * i + 1] = up ? x.x[t][2 * i + 1] * fy : 0;
        lower.x[t][2 * i] = up ? 0 : k.x[t][2 * i] * fx, lower.x[t][2 * i + 1] = up ? 0 : k.x[t][2 * i + 1] * fy;
      }
    multiply(levels[l], round_to_bf16(upper), round_to_bf16(lower));
  }
}
// The meaningful elements of all levels; the rest is 0.
DEVICE Sums gather(Sums (&levels)[4]) {
  const int lane = lane_anew();
  Sums y = zeros();
#pragma unroll
  for (int l = 0; l < 4; ++l) {
    const int half = 8 >> l;
#pragma unroll
    for (int t = 0; t < 2; ++t)
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int i = (lane >> 2) + 8 * (n >> 1), j = 8 * t + 2 * (lane & 3) + (n & 1);
        if ((i & -2 * half) == (j & -2 * half) && (i & half) && !(j & half)) y.x[t][n] = levels[l].x[t][n];
      }
  }
  return y;
}

DEVICE void store_M(Slot slot, const Sums& M) {
  const int lane = lane_anew();
#pragma unroll
  for (int t = 0; t < 2; ++t)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      slot.M().pair((lane >> 2) + 8 * i, 8 * t + 2 * (lane & 3)) = pack<Bf16>(M.x[t][2 * i], M.x[t][2 * i + 1]);
}

// M of a strong block, by one warp, from q, k and G.
DEVICE void multiply_queries_strong(Slot slot, float scale) {
  Sums levels[4] = {zeros(), zeros(), zeros(), zeros()}, same = zeros();
#pragma unroll 1
  for (int n = 0; n < COLUMNS; ++n) {
    const Operand q_raw = slot.q().load(0, 16 * n), k_raw = slot.k().load(0, 16 * n);
    multiply_strong(levels, widen<Input>(q_raw), widen<Input>(k_raw), slot, 16 * n);
    multiply(same, to_bf16<Input>(q_raw), to_bf16<Input>(k_raw));
  }
  Sums M = gather(levels);
  for_each(M, [&](float& x, int i, int j) { x = scale * (i == j ? same.x[j >> 3][2 * (i >> 3) + (j & 1)] : x); });
  store_M(slot, M);
}

// M of a mild block, by one warp.
DEVICE void multiply_queries(Slot slot) {
  const u32 left = shared_address(slot.base) + lane_left<K>(), right = shared_address(slot.base) + lane_right<K>();
  Sums even = zeros(), odd = zeros();
#pragma unroll
  for (int n = 0; n < COLUMNS; n += 2) {
    multiply(even, load_left((left ^ 32 * n) + O_Q), load_right((right ^ 32 * n) + O_G));
    multiply(odd, load_left((left ^ 32 * n + 32) + O_Q), load_right((right ^ 32 * n + 32) + O_G));
  }
  add(even, odd);
  for_each(even, [&](float& x, int i, int j) { x = i >= j ? x : 0; });
  store_M(slot, even);
}

DEVICE Pairs own_pairs(Matrix<K> x, int row) { return *(const Pairs*)x.at(row, OWN * lane()); }
// Turns a block's inputs into what does not depend on the content, by one warp; a lane has OWN columns.  EARLY: as one
// shift x serves all tokens, an erase gate is 1 / (1 + E exp(-x)), and E = exp(-e) takes its logit's place.
DEVICE void prepare_block(Slot slot, float scale) {
  if constexpr (EARLY)
#pragma unroll
    for (int t = 0; t < BLOCK; ++t) {
      Floats e = own_columns<Input>(slot.e(), t);
#pragma unroll
      for (int c = 0; c < OWN; ++c) e.x[c] = exp2_(-LOG2_E * e.x[c]);
      set_own_columns(slot.e(), t, e);
    }
  Floats G[BLOCK];
  const bool strong = add_up_decays(slot, G);
  if (strong) {
#pragma unroll
    for (int t = 0; t < BLOCK; ++t) (Floats&)slot.G(t, OWN * lane()) = G[t];
    warp_sync();
    multiply_queries_strong(slot, scale);
  }
#pragma unroll
  for (int c = 0; c < OWN; c += 2)
    slot.decay(OWN * lane() + c) = make_float2(exp2_(G[BLOCK - 1].x[c]), exp2_(G[BLOCK - 1].x[c + 1]));
  warp_sync();  // x and k_in lie over g; all have read it
  if (strong) {
#pragma unroll
    for (int t = 0; t < BLOCK; ++t) {
      const Pairs q = own_pairs(slot.q(), t);
      Floats q_in;
#pragma unroll
      for (int c = 0; c < OWN; c += 2) {
        const float2 y = unpack<Input>(q.x[c / 2]);
        q_in.x[c] = y.x * (exp2_(G[t].x[c]) * scale), q_in.x[c + 1] = y.y * (exp2_(G[t].x[c + 1]) * scale);
      }
      set_own_columns(slot.q(), t, q_in);
    }
  } else {
#pragma unroll
    for (int t = 0; t < BLOCK; ++t) {
      const Pairs q = own_pairs(slot.q(), t), k = own_pairs(slot.k(), t);
      Floats q_in, k_in, x;
#pragma unroll
      for (int c = 0; c < OWN; ++c) {
        const float2 q_pair = unpack<Input>(q.x[c / 2]), k_pair = unpack<Input>(k.x[c / 2]);
        const float in = exp2_(G[t].x[c]), k_c = c & 1 ? k_pair.y : k_pair.x;
        q_in.x[c] = (c & 1 ? q_pair.y : q_pair.x) * (in * scale);
        k_in.x[c] = k_c * in;
        x.x[c] = k_c * exp2_(-G[t].x[c]);
      }
      set_own_columns(slot.q(), t, q_in);
      set_own_columns(slot.k_in(), t, k_in);
      set_own_columns(slot.x(), t, x);
    }
    warp_sync();
    multiply_queries(slot);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Gates
// ---------------------------------------------------------------------------------------------------------------------

// What the gates of a block see of the content.
struct Seen {
  Matrix<V> down;   // P_down^T [RANK, V] ("read")
  float* wide_down; // P_down / C [V, RANK] ("mean")
  Matrix<K> up;     // P_up [RANK, K] ("read")
  float* wide_up;   // the same ("mean")
  Matrix<K> Z;      // (S_c P_down)^T [RANK, K] ("read")
  float* raw;       // m_c P_down in addends, [2 (chunks in turns), ADDENDS, RANK] ("mean")
  float* write;     // p_write [RANK]
  float part_of_R;  // 1 / R
};

DEVICE void load_seen(
    const Seen& seen, const float* p_down, const float* p_up, const float* p_write, int head, int part, int R, int C) {
  const int thread = thread_index();
  if constexpr (READ)
    for (int i = thread; i < RANK * V / 2; i += GATE_THREADS) {
      const int r = i / (V / 2), v = 2 * (i % (V / 2));
      const float* p = p_down + ((i64)part * V + v) * R + r;
      seen.down.pair(r, v) = r < R ? pack<Bf16>(p[0], p[R]) : 0;
    }
  if constexpr (MEAN)
    for (int i = thread; i < V * RANK; i += GATE_THREADS) {
      const int v = i / RANK, r = i % RANK;
      seen.wide_down[i] = r < R ? p_down[((i64)part * V + v) * R + r] / C : 0;
    }
  if constexpr (MEAN || READ) {
    load_gate_projections<GATE_THREADS>(seen.up.base, seen.write, p_up, p_write, head, R);
  }
}

// "mean": the shifts of a warp's columns, part `share` of all, times -log2(e), or exp(-shift) if EARLY; returns the shift
// of the write gates.
DEVICE float hear(const Seen& seen, int chunk, int share, float* shifts) {
  float z = 0;  // number lane % RANK of the content after its norm
  for (int i = 0; i < ADDENDS; ++i) z += seen.raw[(chunk % 2 * ADDENDS + i) * RANK + lane() % RANK];
  float squares = z * z;
#pragma unroll
  for (int mask = 1; mask < RANK; mask *= 2) squares += shuffle_xor(squares, mask);
  if constexpr (RMS) z *= reciprocal_root(squares * seen.part_of_R + 1e-8f);
  constexpr int EACH = K / PARTS / 32;
  const float* up = seen.wide_up + share * (K / PARTS) + lane();
  float shift[EACH] = {}, write = z * seen.write[lane() % RANK];
#pragma unroll
  for (int r = 0; r < RANK; ++r) {
    const float z_r = shuffle(z, r);
#pragma unroll
    for (int i = 0; i < EACH; ++i) shift[i] += z_r * up[r * K + 32 * i];
  }
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const float x = -LOG2_E * shift[i];  // a factor is kept off 0 and infinity: those are for logits
    shifts[32 * i + lane()] = EARLY ? exp2_(fminf(fmaxf(x, -100.0f), 100.0f)) : x;
  }
#pragma unroll
  for (int mask = 1; mask < RANK; mask *= 2) write += shuffle_xor(write, mask);
  warp_sync();
  return write;
}

// "read": z of a block's tokens [16 tokens, RANK]: the content after its norm.
DEVICE Sums see(const Seen& seen, Slot slot) {
  Sums z = zeros(), odd = zeros();
  const u32 left = shared_address(slot.k().base) + lane_left<K>();
  const u32 right = shared_address(seen.Z.base) + lane_right<K>();
#pragma unroll
  for (int n = 0; n < COLUMNS; n += 2) {
    multiply(z, to_bf16<Input>(load_left(left ^ 32 * n)), load_right(right ^ 32 * n));
    multiply(odd, to_bf16<Input>(load_left(left ^ 32 * n + 32)), load_right(right ^ 32 * n + 32));
  }
  add(z, odd);
  if constexpr (RMS)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float squares = 0;
#pragma unroll
      for (int t = 0; t < 2; ++t) squares += z.x[t][2 * i] * z.x[t][2 * i] + z.x[t][2 * i + 1] * z.x[t][2 * i + 1];
      const float root = reciprocal_root(quad_sum(squares) * seen.part_of_R + 1e-8f);
#pragma unroll
      for (int t = 0; t < 2; ++t) z.x[t][2 * i] *= root, z.x[t][2 * i + 1] *= root;
    }
  return z;
}

// Write gates of a block; shift: of all of them; z ("read"): of each token.
DEVICE void open_write_gates(const Seen& seen, const Sums& z, float shift, Slot slot, bool has_w) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if constexpr (READ) {
      shift = 0;
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const float2 write = *(float2*)(seen.write + 8 * t + quad_column());
        shift += z.x[t][2 * i] * write.x + z.x[t][2 * i + 1] * write.y;
      }
      shift = quad_sum(shift);
    }
    float& a = slot.a()[quad_row() + 8 * i];
    if ((lane() & 3) == 0) a = has_w ? sigmoid(a + shift) : 1;
  }
}

// Erase gates, and the keys behind them, of one part of a block's columns; returns this part's addend of A.
DEVICE Sums open_erase_gates(
    const Seen& seen, const Sums& z, const float* shifts, Slot slot, int part, float top) {
  const Operand z_rounded = round_to_bf16(scaled(z, -LOG2_E));
  const u32 base = shared_address(slot.base), left = base + lane_left<K>(), right = base + lane_right<K>();
  const u32 pairs = base + O_E + lane_pair();
  const int first = part * (COLUMNS / PARTS);
  const u32 projection = shared_address(seen.up.base) + lane_left<K>();
  const float share = reciprocal(top);
  const auto gates = [&](int n) {  // of the 16 columns from 16 n on
    Sums y = zeros();  // sigmoid(x) = 1 / (1 + 2^y), with y = -log2(e) x
    if constexpr (READ) multiply(y, z_rounded, load_right_transposed(projection ^ 32 * n));
    if constexpr (MEAN)
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const float2 shift = *(const float2*)(shifts + 16 * (n - first) + 8 * t + quad_column());
        y.x[t][0] = y.x[t][2] = shift.x, y.x[t][1] = y.x[t][3] = shift.y;
      }
    const Operand raw = load_left((left ^ 32 * n) + O_E);
    const Sums e = EARLY ? widen<Bf16>(raw) : widen<Input>(raw);
#pragma unroll
    for (int t = 0; t < 2; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = y.x[t][i];
        x = reciprocal(share + share * (EARLY ? x * e.x[t][i] : exp2_(x - LOG2_E * e.x[t][i])));
      }
    return y;
  };
  if (slot.strong()) {
    Sums levels[4] = {zeros(), zeros(), zeros(), zeros()};
#pragma unroll 1
    for (int n = first; n < first + COLUMNS / PARTS; ++n) {
      Sums bk = gates(n);
      const Sums k = widen<Input>(slot.k().load(0, 16 * n));
#pragma unroll
      for (int t = 0; t < 2; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) bk.x[t][i] *= k.x[t][i];
      multiply_strong(levels, bk, k, slot, 16 * n);
#pragma unroll
      for (int t = 0; t < 2; ++t)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int lane = lane_anew();
          const float2 G = slot.G((lane >> 2) + 8 * i, 16 * n + 8 * t + 2 * (lane & 3));
          bk.x[t][2 * i] *= exp2_(G.x), bk.x[t][2 * i + 1] *= exp2_(G.y);
        }
      slot.e().store(0, 16 * n, round_to_bf16(bk));
    }
    return gather(levels);
  }
  Sums A = zeros();
#pragma unroll
  for (int m = 0; m < COLUMNS / PARTS; ++m) {
    const int n = first + m;
    Sums bk = gates(n);
    const Sums k_in = widen<Bf16>(load_left((left ^ 32 * n) + O_K_IN));
#pragma unroll
    for (int t = 0; t < 2; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) bk.x[t][i] *= k_in.x[t][i];
    const Operand rounded = round_to_bf16(bk);
    store_left(pairs ^ 32 * n, rounded);
    multiply(A, rounded, load_right((right ^ 32 * n) + O_G));
  }
  return A;
}

// Strong blocks: k exp(G_16 - G) over k, one part of the columns.
DEVICE void decay_keys(Slot slot, int part) {
#pragma unroll 1
  for (int n = part * (COLUMNS / PARTS); n < (part + 1) * (COLUMNS / PARTS); ++n) {
    Sums k = widen<Input>(slot.k().load(0, 16 * n));
#pragma unroll
    for (int t = 0; t < 2; ++t)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int lane = lane_anew(), column = 16 * n + 8 * t + 2 * (lane & 3);
        const float2 G = slot.G((lane >> 2) + 8 * i, column), G_16 = slot.G(BLOCK - 1, column);
        k.x[t][2 * i] *= exp2_(G_16.x - G.x), k.x[t][2 * i + 1] *= exp2_(G_16.y - G.y);
      }
    slot.k().store(0, 16 * n, round_to_bf16(k));
  }
}

// T of a block, transposed, from this warp's addend of A and those in the scratch of the other parts' warps.
DEVICE void solve_block(Sums A, byte* scratch, Matrix<16> T) {
#pragma unroll
  for (int part = 1; part < PARTS; ++part)
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const float4 x = ((const float4*)(scratch - part * (BLOCKS * SCRATCH)))[t * 32 + lane()];
      A.x[t][0] += x.x, A.x[t][1] += x.y, A.x[t][2] += x.z, A.x[t][3] += x.w;
    }
  warp_sync();
  float* columns = (float*)scratch;  // of A
  for_each(A, [&](float& x, int i, int j) { columns[j * 16 + i] = i > j ? x : 0; });
  warp_sync();
  // forward substitution in fp32; lane c, and c + 16, has column c of T
  const int column = lane_anew() & 15;
  float x[BLOCK];
  solve(x, columns, column);
  u32 pairs[BLOCK / 2];
#pragma unroll
  for (int i = 0; i < BLOCK; i += 2) pairs[i / 2] = pack<Bf16>(x[i], x[i + 1]);
  if (lane_anew() < 16) {
    *(uint4*)T.at(column, 0) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    *(uint4*)T.at(column, 8) = make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The state
// ---------------------------------------------------------------------------------------------------------------------

struct State { Sums x[COLUMNS]; };  // 16 rows of S^T [V, K]
typedef State Strips[STRIPS];

// memory is this program's columns of [K, SPLIT V], fp32; zeros if null.  strip: which 16 rows of S^T
DEVICE State load_strip(const float* memory, int strip) {
  State S;
#pragma unroll
  for (int m = 0; m < COLUMNS; ++m)
    for_each(S.x[m], [&](float& x, int row, int column) {
      x = memory ? memory[(16 * m + column) * (SPLIT * V) + 16 * strip + row] : 0;
    });
  return S;
}
DEVICE void store_strip(float* memory, State& S, int strip) {
#pragma unroll
  for (int m = 0; m < COLUMNS; ++m)
    for_each(S.x[m], [&](float& x, int row, int column) {
      memory[(16 * m + column) * (SPLIT * V) + 16 * strip + row] = x;
    });
}

DEVICE void decay_state(Strips& S, const float* decay) {
#pragma unroll
  for (int m = 0; m < COLUMNS; ++m) {
    const float4 x = *(const float4*)(decay + 16 * m + 2 * quad_column());
#pragma unroll
    for (int i = 0; i < STRIPS; ++i) {
      scale_columns(S[i].x[m], x);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------

// Inputs and outputs are contiguous, shapes as in carve/ops/api.py.  May be null: w, p_up, p_write, bounds, positions,
// the initial state (memory, content, content_sum) and everything behind o.
KERNEL void CLUSTER __launch_bounds__(PROGRAM, 1) carve_forward(
    const void* q, const void* k, const void* v, const float* g, const void* e, const float* w, const float* p_down,
    const float* p_up, const float* p_write, const i64* bounds, const i64* positions, const float* memory,
    const float* content, const float* content_sum, void* o, float* memory_end, float* content_end,
    float* content_sum_end, u32* states, u32* edits, float* contents, float* means, float scale, float top, int H,
    int HV, int H_g, int H_e, int R, int T, int C) {
  byte* shared = shared_memory();
  const int warp_index = uniform(warp());
  const int parts = HV * SPLIT, n = block_index() / parts, part = block_index() % parts;  // of all heads' values
  const int head = part / SPLIT, rank = part % SPLIT, thread = thread_index();
  const Sequence sequence(bounds, positions, n, T, C);
  Ring ring = {shared, 0, 0};
  Signal* heard = ring.free() + RING;  // what the next chunk's gates see is there
  Signal* opened = heard + 1;          // the gates of a tile, and its T
  if (thread == 0) {
    for (int i = 0; i < RING; ++i) {
      set_up(ring.full() + i, 1);
      set_up(ring.free() + i, STATE_WARPS);
    }
    set_up(heard, MEAN ? ADDENDS : SPLIT * GATE_WARPS);
    set_up(opened, GATE_WARPS);
  }
  for (int i = thread; i < K; i += PROGRAM) ((float*)(shared + O_ONES))[i] = 1;
  if constexpr (SPLIT > 1) sync_cluster();
  else sync();

  // -- preparing warps: each takes every PREPARERS-th block --
  if (warp_index >= GATE_WARPS) {
    const int key_head = head / (HV / H), g_head = head / (HV / H_g), e_head = head / (HV / H_e);
    const auto copy = [&](const Cursor& at) {
      const Slot slot = at.ring.at(0);
      const i64 token = sequence.begin + at.token;
      const int count = min(BLOCK, at.last - at.token), t = lane_anew();
      copy_block<K, true>(slot.base + O_G, g, token, count, H_g, g_head);
      copy_block<K>(slot.base + O_K, k, token, count, H, key_head);
      copy_block<K>(slot.base + O_Q, q, token, count, H, key_head);
      copy_block<K>(slot.base + O_E, e, token, count, H_e, e_head);
      copy_block<V>(slot.base + O_V, v, token, count, parts, part);
      if (w && t < BLOCK) copy_4_bytes(slot.a() + t, w + (token + t) * HV + head, t < count);
      close_copies();
    };
    Cursor at = {0, sequence.last(0), 0, ring};  // block to prepare
    at.skip(sequence, warp_index - GATE_WARPS);
    Cursor next = at;  // block to copy
    int copied = 0;    // blocks, not prepared yet
    while (at.valid(sequence)) {
      // copies begin as soon as there is room, but preparation does not wait for that
      Signal* room = next.ring.free();
      const int phase = next.ring.phase ^ 1;
      if (next.valid(sequence) && (copied == 0 || (copied == 1 && all_lanes(has_ended(room, phase))))) {
        wait(room, phase);
        copy(next);
        next.skip(sequence, PREPARERS);
        ++copied;
        continue;
      }
      if (copied == 2) wait_for_copies_but_last();
      else wait_for_copies();
      warp_sync();
      prepare_block(at.ring.at(0), scale);
      warp_sync();
      if (lane() == 0) arrive(at.ring.full());
      at.skip(sequence, PREPARERS);
      --copied;
    }
    return;
  }

  // -- state warps, and those that help with the gates: the state before the first token --
  const bool holds_state = warp_index < STATE_WARPS;
  const i64 own = (i64)n * HV + head, own_part = own * SPLIT + rank, own_memory = own * (K * SPLIT * V) + rank * V;
  const Seen seen = {{shared + O_DOWN}, (float*)(shared + O_DOWN), {shared + O_UP}, (float*)(shared + O_UP),
                     {shared + O_Z}, (float*)(shared + O_RAW), (float*)(shared + O_WRITE), 1.0f / R};
  const int first_strip = STRIPS * warp_index;
  Strips S;
#pragma unroll
  for (int i = 0; i < STRIPS; ++i) S[i] = load_strip(memory && holds_state ? memory + own_memory : nullptr, first_strip + i);
  load_seen(seen, p_down, p_up, p_write, head, part, R, C);
  float sums[STRIPS][2];  // of this chunk's outputs, two rows of a strip; the four lanes of a row have an addend each
  const auto row = [&](int strip) { return 16 * (first_strip + strip) + (lane_anew() >> 2); };
#pragma unroll
  for (int i = 0; i < STRIPS; ++i) {
    const bool begun = MEAN && content_sum && holds_state && (lane() & 3) == 0;
    sums[i][0] = begun ? content_sum[own_part * V + row(i)] : 0;
    sums[i][1] = begun ? content_sum[own_part * V + row(i) + 8] : 0;
  }
  if constexpr (MEAN)
    for (int i = thread; i < ADDENDS * RANK; i += GATE_THREADS)
      seen.raw[i] = content && i < R ? content[own * R + i] : 0;
  if constexpr (READ)
    for (int i = thread; i < RANK * K / 2; i += GATE_THREADS) {
      const int r = i / (K / 2), column = 2 * (i % (K / 2));
      const float* z = content + (own * K + column) * R + r;
      seen.Z.pair(r, column) = content && r < R ? pack<Bf16>(z[0], z[R]) : 0;
    }
  const auto raw_content = [&](int chunk) {  // "mean": number thread % RANK of m_c P_down
    float x = 0;
    for (int i = 0; i < ADDENDS; ++i) x += seen.raw[(chunk % 2 * ADDENDS + i) * RANK + thread % RANK];
    return x;
  };
  // in a slot: this lane's row of its warp's values, and its piece of the outputs; in a [16, 16] matrix: operands' rows
  const u32 v_transposed = O_V + (lane_right<V>() ^ 32 * first_strip);
  const int row_of_lane = lane() / (2 * STRIPS), column_of_lane = 16 * first_strip + lane() % (2 * STRIPS) * 8;
  const int o_piece = (int)(Slot{0}.v().at(row_of_lane, column_of_lane) - (byte*)0);
  const u32 small_left = (u32)(Matrix<16>{0}.at(lane() & 15, 8 * (lane() >> 4)) - (byte*)0);
  const u32 small_right = (u32)(Matrix<16>{0}.at((lane() & 7) + 8 * (lane() >> 4), lane() & 8) - (byte*)0);
  byte* o_of_lane = (byte*)o + (((sequence.begin + row_of_lane) * parts + part) * V + column_of_lane) * 2;
  int tile = 0;  // parity
  sync_gate_warps();

  for (int chunk = 0; chunk < sequence.chunks; ++chunk) {
    if (MEAN && chunk > 0) {
      if constexpr (SPLIT > 1) wait_for_cluster(heard, (chunk - 1) & 1);
      else wait(heard, (chunk - 1) & 1);
    }
    const i64 slot_of_content = (sequence.slot + chunk) * HV + head;
    if (contents && rank == 0) {
      if constexpr (MEAN)
        if (thread < RANK) contents[slot_of_content * RANK + thread] = raw_content(chunk);
      if constexpr (READ)
        for (int i = thread; i < RANK * K / 2; i += GATE_THREADS)
          ((u32*)contents)[slot_of_content * (RANK * K / 2) + i] = ((u32*)seen.Z.base)[i];
    }
    const bool another = chunk + 1 < sequence.chunks;
    const int first_of_chunk = sequence.first(chunk), last_of_chunk = sequence.last(chunk);
    for (int first = first_of_chunk; first < last_of_chunk; first += TILE) {
      const int blocks = (min(TILE, last_of_chunk - first) + BLOCK - 1) / BLOCK;

      // -- the gates of the tile's blocks side by side, PARTS warps a block --
      const int block = warp_index % BLOCKS, share = warp_index / BLOCKS;
      const bool busy = block < blocks && share < PARTS;
      const Slot mine = ring.at(block);
      byte* scratch = shared + O_SCRATCH + warp_index * SCRATCH;
      Sums A, z = zeros();
      float write_shift = 0;
      if (busy) {
        const Ring at = ring.after(block);
        wait(at.full(), at.phase);
        if constexpr (READ) z = see(seen, mine);
        if constexpr (MEAN) write_shift = hear(seen, chunk, share, (float*)scratch);
        A = open_erase_gates(seen, z, (float*)scratch, mine, share, top);
        if (share < PARTS - 1) {
          warp_sync();
#pragma unroll
          for (int t = 0; t < 2; ++t)
            ((float4*)scratch)[t * 32 + lane()] = make_float4(A.x[t][0], A.x[t][1], A.x[t][2], A.x[t][3]);
        }
      }
      sync_gate_warps();
      if (busy) {
        if (mine.strong()) decay_keys(mine, share);
        if (share == 0) open_write_gates(seen, z, write_shift, mine, w);
        if (share == PARTS - 1) solve_block(A, scratch, {shared + O_T + block * 512});
      }
      warp_sync();
      if (lane() == 0) arrive(opened);
      if (!holds_state) ring.step(blocks);

      // -- the state runs through the blocks, each warp on its own --
      const bool last_tile = first + TILE >= last_of_chunk;
#pragma unroll 1
      for (int s = 0; s < blocks && holds_state; ++s) {
        const Slot slot = ring.at(0);
        const u32 base = shared_address(slot.base), right = base + lane_right<K>();
        const int token = first + BLOCK * s, token_of_chunk = token - first_of_chunk;
        if (states && token_of_chunk % SAVE == 0) {
          const i64 at = (sequence.slot_of(chunk, token_of_chunk, SAVE) * parts + part) * ROWS + first_strip;
          uint4* to = (uint4*)states + at * (COLUMNS * 32);
#pragma unroll
          for (int i = 0; i < STRIPS; ++i)
#pragma unroll
            for (int m = 0; m < COLUMNS; ++m) to[(i * COLUMNS + m) * 32 + lane()] = as_uint4(round_to_bf16(S[i].x[m]));
        }
        // (b k exp G) S and (scale q exp G) S, transposed: strips of [16 of V, 16 tokens]
        constexpr int CHAINS = STRIPS == 1 ? 2 : 1;  // sums of every other product, as one waits for the other
        Sums r[CHAINS * STRIPS], out[CHAINS * STRIPS];
#pragma unroll
        for (int i = 0; i < CHAINS * STRIPS; ++i) r[i] = out[i] = zeros();
#pragma unroll
        for (int m = 0; m < COLUMNS; ++m) {
          const Right bk_in = load_right((right ^ 32 * m) + O_E), q_in = load_right((right ^ 32 * m) + O_Q);
#pragma unroll
          for (int i = 0; i < STRIPS; ++i) {
            const Operand S_in = round_to_bf16(S[i].x[m]);
            multiply(r[m % CHAINS * STRIPS + i], S_in, bk_in);
            multiply(out[m % CHAINS * STRIPS + i], S_in, q_in);
          }
        }
#pragma unroll
        for (int i = STRIPS; i < CHAINS * STRIPS; ++i) add(r[i - STRIPS], r[i]), add(out[i - STRIPS], out[i]);
        if (s == 0) {
          wait(opened, tile);
          tile ^= 1;
        }
        const Right T_block = load_right_transposed(shared_address(shared) + O_T + 512 * s + small_left);
        const Right M_block = load_right(base + O_M + small_right);
        const float* write_gates = slot.a() + quad_column();
        const float2 a[2] = {*(const float2*)write_gates, *(const float2*)(write_gates + 8)};
        Operand v_new[STRIPS];
#pragma unroll
        for (int i = 0; i < STRIPS; ++i) {
          Operand v_t;
          load_quarters_transposed(v_t.x, base + (v_transposed ^ 32 * i));
#pragma unroll
          for (int t = 0; t < 2; ++t)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              const float2 y = unpack<Input>(v_t.x[2 * t + j]);
              r[i].x[t][2 * j] = a[t].x * y.x - r[i].x[t][2 * j];
              r[i].x[t][2 * j + 1] = a[t].y * y.y - r[i].x[t][2 * j + 1];
            }
          Sums edit = zeros();
          multiply(edit, round_to_bf16(r[i]), T_block);
          v_new[i] = round_to_bf16(edit);
        }
        if (edits) {
          const i64 at = (sequence.slot_of(chunk, token_of_chunk, BLOCK) * parts + part) * ROWS + first_strip;
          uint4* to = (uint4*)edits + at * 32;
#pragma unroll
          for (int i = 0; i < STRIPS; ++i) to[i * 32 + lane()] = as_uint4(v_new[i]);
        }
        const float* decay = slot.decay();
        u32 keys = base + lane_left<K>() + O_G;
        if (slot.strong()) {  // its keys are decayed to the block's end
          decay_state(S, decay);
          decay = (const float*)(shared + O_ONES);
          keys += O_K - O_G;
        }
#pragma unroll
        for (int i = 0; i < STRIPS; ++i) multiply(out[i], v_new[i], M_block);
#pragma unroll
        for (int m = 0; m < COLUMNS; ++m) {
          const Right key = load_right_transposed(keys ^ 32 * m);
#pragma unroll
          for (int i = 0; i < STRIPS; ++i) multiply(S[i].x[m], v_new[i], key);
        }
#pragma unroll
        for (int i = 0; i < STRIPS; ++i) {
          Sums& y = out[i];
#pragma unroll
          for (int t = 0; t < 2; ++t)
#pragma unroll
            for (int n = 0; n < 4; ++n) sums[i][n >> 1] += y.x[t][n];
          // movmatrix moves 16-bit numbers of any format
          const Operand y_t = {{pack<Input>(y.x[0][0], y.x[0][1]), pack<Input>(y.x[0][2], y.x[0][3]),
                                pack<Input>(y.x[1][0], y.x[1][1]), pack<Input>(y.x[1][2], y.x[1][3])}};
          const Operand turned = transpose(y_t);
          slot.v().store(0, 16 * (first_strip + i), turned);  // to leave in pieces of 16 bytes, whole sectors a warp
        }
        if constexpr (MEAN)  // what the next chunk's gates see
          if (another && token + BLOCK >= last_of_chunk) {
            float4 raw = make_float4(0, 0, 0, 0);
#pragma unroll
            for (int i = 0; i < STRIPS; ++i)
#pragma unroll
              for (int j = 0; j < 2; ++j) {
                const float sum = quad_sum(sums[i][j]);
                sums[i][j] = 0;
                if (means && (lane() & 3) == 0) means[(slot_of_content * SPLIT + rank) * V + row(i) + 8 * j] = sum / C;
                const float4 down = *(const float4*)(seen.wide_down + (row(i) + 8 * j) * RANK + 4 * (lane() & 3));
                raw.x += sum * down.x, raw.y += sum * down.y, raw.z += sum * down.z, raw.w += sum * down.w;
              }
            raw = make_float4(column_sum(raw.x), column_sum(raw.y), column_sum(raw.z), column_sum(raw.w));
            float4* to = (float4*)(seen.raw + ((chunk + 1) % 2 * ADDENDS + rank * STATE_WARPS + warp_index) * RANK);
            if constexpr (SPLIT > 1) {
              if (lane() < 4)
                for (int i = 0; i < SPLIT; ++i) store_into_program(to + lane(), i, raw);
              warp_sync();
              if (lane() < SPLIT) arrive_at_program(heard, lane());
            } else {
              if (lane() < 4) to[lane()] = raw;
              warp_sync();
              if (lane() == 0) arrive(heard);
            }
          }
        warp_sync();
#pragma unroll
        for (int i = 0; i < STRIPS; ++i)
          if (token + row_of_lane + 8 * i < last_of_chunk) {
            const uint4 piece = *(uint4*)(slot.base + o_piece + 8 * i * (2 * V));
            *(uint4*)(o_of_lane + (i64)(token + 8 * i) * (parts * V * 2)) = piece;
          }
        decay_state(S, decay);
        warp_sync();
        const bool needed = READ && another && last_tile && s >= blocks - V / 64;  // for what follows the chunk
        if (lane() == 0 && !needed) arrive(ring.free());
        ring.step(1);
      }
    }

    // -- "read": what the next chunk's gates see --
    if constexpr (READ)
      if (another) {
        // Z^T = P_down^T S^T; S^T goes through the slots of the last two blocks, 64 rows each, or of one block in turns
        constexpr int HALVES = V / 64;
        const bool in_turns = (last_of_chunk - first_of_chunk - 1) % TILE < BLOCK * (HALVES - 1);
        const auto half_state = [&](int half) {
          return shared_address(ring.at(RING - 1 - (in_turns ? 0 : half)).base);
        };
        constexpr int SLABS = COLUMNS / GATE_WARPS;  // 16-column slabs of Z^T that a warp makes
        Sums z[SLABS], odd[SLABS];
#pragma unroll
        for (int n = 0; n < SLABS; ++n) z[n] = odd[n] = zeros();
#pragma unroll 1
        for (int turn = 0; turn < (in_turns ? HALVES : 1); ++turn) {
          sync_gate_warps();  // none needs the slots, or what went through them in the turn before
          if (holds_state && (!in_turns || first_strip / 4 == turn))
#pragma unroll
            for (int i = 0; i < STRIPS; ++i) {
              const u32 pairs = half_state(first_strip / 4) + (first_strip + i) % 4 * (32 * K) + lane_pair();
#pragma unroll
              for (int m = 0; m < COLUMNS; ++m) store_left(pairs ^ 32 * m, round_to_bf16(S[i].x[m]));
            }
          sync_gate_warps();
#pragma unroll 1
          for (int half = in_turns ? turn : 0; half < (in_turns ? turn + 1 : HALVES); ++half) {
            const u32 left = shared_address(seen.down.base) + lane_left<V>();
            const u32 right = half_state(half) + lane_left<K>();
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
              for (int n = 0; n < SLABS; ++n)
                multiply(i & 1 ? odd[n] : z[n], load_left(left ^ (128 * half + 32 * i)),
                         load_right_transposed((right ^ 32 * (SLABS * warp_index + n)) + i * (32 * K)));
          }
        }
#pragma unroll
        for (int n = 0; n < SLABS; ++n) add(z[n], odd[n]);
        if constexpr (SPLIT > 1) {  // the other program's addend, in the order of this one's lanes
          float4* met = (float4*)(shared + O_RAW) + (chunk % 2 * GATE_WARPS + warp_index) * (2 * SLABS * 32) + lane();
#pragma unroll
          for (int n = 0; n < SLABS; ++n)
#pragma unroll
            for (int t = 0; t < 2; ++t) {
              const float(&x)[4] = z[n].x[t];
              store_into_program(met + (2 * n + t) * 32, rank ^ 1, make_float4(x[0], x[1], x[2], x[3]));
            }
          warp_sync();
          if (lane() < SPLIT) arrive_at_program(heard, lane());
          wait_for_cluster(heard, chunk & 1);
#pragma unroll
          for (int n = 0; n < SLABS; ++n)
#pragma unroll
            for (int t = 0; t < 2; ++t) {
              const float4 x = met[(2 * n + t) * 32];
              z[n].x[t][0] += x.x, z[n].x[t][1] += x.y, z[n].x[t][2] += x.z, z[n].x[t][3] += x.w;
            }
        }
#pragma unroll
        for (int n = 0; n < SLABS; ++n) {
          const u32 Z = (shared_address(seen.Z.base) + lane_pair()) ^ 32 * (SLABS * warp_index + n);
          store_left(Z, round_to_bf16(z[n]));
        }
        sync_gate_warps();
        for (int i = 1; i <= HALVES - in_turns; ++i) {
          const Ring at = ring.after(RING - i);
          if (lane() == 0 && holds_state) arrive(at.free());
        }
      }
  }

  // -- the state behind the last token; a full chunk is not closed here --
  if (memory_end && holds_state)
#pragma unroll
    for (int i = 0; i < STRIPS; ++i) store_strip(memory_end + own_memory, S[i], first_strip + i);
  if constexpr (MEAN) {
    if (content_end && rank == 0 && thread < R)
      content_end[own * R + thread] = raw_content(max(sequence.chunks, 1) - 1);
#pragma unroll
    for (int i = 0; i < STRIPS; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float sum = quad_sum(sums[i][j]);
        if (content_sum_end && holds_state && (lane() & 3) == 0) content_sum_end[own_part * V + row(i) + 8 * j] = sum;
      }
  }
  if constexpr (READ)
    if (content_end && rank == 0)
      for (int i = thread; i < R * K / 2; i += GATE_THREADS) {
        const int r = i / (K / 2), column = 2 * (i % (K / 2));
        const float2 z = unpack<Bf16>(seen.Z.pair(r, column));
        content_end[(own * K + column) * R + r] = z.x;
        content_end[(own * K + column + 1) * R + r] = z.y;
      }
}
