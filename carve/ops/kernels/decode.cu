// Decoding: a few tokens of each sequence, the state updated in place.  Symbols as in carve/ops/recurrence.py.
//
// A program runs COLUMNS of the V columns of one value head of one sequence, each sequence from its own position in its
// content chunk.  It holds its part of the state S [K, V] in registers, fp32, read once and written once.  Per token
//
//     r = S^T (b k exp g)     u = a v - r     S <- Diag(exp g) S + k u^T     o = scale (S_before^T (q exp g) + (q k) u)
//
// so that one pass over S gives both sums over K, and one barrier adds them up across the warps.  A warp has ROWS rows
// of S and computes their gates.  The SPLIT programs of a head are a cluster; they meet only where a chunk is full, to
// add up what the next chunk's gates see.
//
// The program that comes last moves a sequence's position.  All others have read it by then: arrivals are counted in
// the position's upper half, which is 0 before and after.
//
// Compiled for one shape: CARVE_K, CARVE_V, CARVE_R, the heads CARVE_H, CARVE_HV, CARVE_H_G and CARVE_H_E (of g and e),
// CARVE_ROWS, CARVE_SPLIT, CARVE_AHEAD (see below), CARVE_CONTENT (0 blind, 1 mean, 2 read), CARVE_RMS and CARVE_UNIT (0 or
// 1; unit: q and k get L2 norm 1), and CARVE_TYPE_Q to CARVE_TYPE_WRITE, the inputs' number formats, void for an input that there is none of.

constexpr int K = CARVE_K, V = CARVE_V, R = CARVE_R, SPLIT = CARVE_SPLIT;
constexpr int H = CARVE_H, HV = CARVE_HV, H_G = CARVE_H_G, H_E = CARVE_H_E;
constexpr bool MEAN = CARVE_CONTENT == 1, READ = CARVE_CONTENT == 2, RMS = CARVE_RMS, UNIT = CARVE_UNIT;
constexpr int COLUMNS = V / SPLIT;
constexpr int ROWS = CARVE_ROWS, WARPS = K / ROWS, THREADS = 32 * WARPS;

// Lanes of a warp that lie side by side in a row, with 4 columns each; a row takes PASSES of them, a warp has GROUPS.
constexpr int QUARTETS = COLUMNS / 4, POWER_OF_2 = QUARTETS & -QUARTETS, LANES = POWER_OF_2 < 32 ? POWER_OF_2 : 32;
constexpr int PASSES = QUARTETS / LANES, GROUPS = 32 / LANES, STEPS = ROWS / GROUPS;

constexpr int HELD = 4 * STEPS * PASSES;                  // numbers of S that a thread holds
constexpr int FITTING = (HELD > 64 ? 256 : HELD == 32 ? 768 : 512) / THREADS, PROGRAMS = FITTING > 1 ? FITTING : 1;
constexpr int AHEAD = CARVE_AHEAD;                        // programs from this one to that whose state it fetches, or 0
constexpr int SHARE = (COLUMNS + THREADS - 1) / THREADS;  // columns whose outputs a thread writes
constexpr int RANKS = (R + 31) / 32;                      // of the R numbers, those that a lane has
constexpr int SEEN = MEAN ? R : READ ? K * R : 0;         // numbers in a head's content

static_assert(K % 16 == 0 && COLUMNS % 16 == 0 && R <= 64, "shapes that the kernel is written for");

// -- number formats --

template <typename X> struct Number {
  static constexpr int BYTES = 2;
  static DEVICE float load(const void* p, i64 i) { return unpack<X>(((const unsigned short*)p)[i]).x; }
  static DEVICE void store(void* p, i64 i, float x) { ((unsigned short*)p)[i] = (unsigned short)pack<X>(x, 0); }
};
template <> struct Number<float> {
  static constexpr int BYTES = 4;
  static DEVICE float load(const void* p, i64 i) { return ((const float*)p)[i]; }
  static DEVICE void store(void* p, i64 i, float x) { ((float*)p)[i] = x; }
};
template <> struct Number<void> {
  static constexpr int BYTES = 0;
  static DEVICE float load(const void*, i64) { return 0; }
};
typedef Number<CARVE_TYPE_W> W;
typedef Number<CARVE_TYPE_UP> Up;
typedef Number<CARVE_TYPE_WRITE> Write;

// -- shared memory --

template <int BYTES> struct Aligned { static constexpr int bytes = (BYTES + 15) / 16 * 16; };
constexpr int O_ROWS = 0;                                          // [K]: exp g, b k exp g, q exp g, k
constexpr int O_SUMS = O_ROWS + 16 * K;                            // [2][WARPS][2 (r, S^T q)][COLUMNS]
constexpr int O_VALUES = O_SUMS + 16 * WARPS * COLUMNS;            // [2][COLUMNS]: a v
constexpr int O_DOTS = O_VALUES + 8 * COLUMNS;                     // [2][WARPS]: q q, k k, q k
constexpr int O_TOTAL = O_DOTS + 32 * WARPS;                       // [COLUMNS]: sum of a full chunk's outputs
constexpr int O_BEGIN = O_TOTAL + (MEAN ? 4 * COLUMNS : 0);        // position before the first token
constexpr int O_UP = O_BEGIN + 16;                                 // [WARPS][R][ROWS]: p_up
constexpr int O_HEARD = O_UP + (SEEN ? K * R * Up::BYTES : 0);     // [WARPS][R]: parts of k^T Z
constexpr int O_SEEN = O_HEARD + (READ ? Aligned<4 * WARPS * R>::bytes : 0);  // content
constexpr int O_PARTS = O_SEEN + Aligned<4 * SEEN>::bytes;         // this program's part of the next content
constexpr int SHARED_BYTES = O_PARTS + Aligned<4 * SEEN>::bytes;

static_assert(SHARED_BYTES <= CARVE_SHARED, "carve/ops/kernels/decode.py says how much shared memory a program gets");

// -- warps --

DEVICE int lane() { return thread_index() & 31; }
DEVICE int warp() { return thread_index() >> 5; }
DEVICE float warp_sum(float x) {
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) x += shuffle_xor(x, mask);
  return x;
}

// Sums over COUNT lanes, STRIDE apart, of N numbers each: the i-th lane is left with the i-th N / COUNT of the sums.
template <int N, int COUNT, int STRIDE> DEVICE void scatter_sum(float (&x)[N]) {
  if constexpr (COUNT > 1) {
    float half[N / 2];
    const bool upper = lane() & (COUNT / 2 * STRIDE);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const float lost = upper ? x[i] : x[i + N / 2], kept = upper ? x[i + N / 2] : x[i];
      half[i] = kept + shuffle_xor(lost, COUNT / 2 * STRIDE);
    }
    scatter_sum<N / 2, COUNT / 2, STRIDE>(half);
#pragma unroll
    for (int i = 0; i < N / COUNT; ++i) x[i] = half[i];
  }
}

template <int N> DEVICE float sum(const float (&x)[N]) {
  float y = x[0];
#pragma unroll
  for (int i = 1; i < N; ++i) y += x[i];
  return y;
}

DEVICE void sync_head() {  // the programs of this head
  if constexpr (SPLIT > 1 && SEEN) sync_cluster();
  else sync();
}
DEVICE float load_from_head(const float* p, int rank) {
  if constexpr (SPLIT > 1 && SEEN) return load_from_program(p, rank);
  else return *p;
}

DEVICE float sigmoid(float x) { return reciprocal(1.0f + expf(-x)); }
DEVICE float unit_factor(float squares) { return UNIT ? reciprocal_root(squares + 1e-6f) : 1; }

struct Token { float q, k, g, e, w, v[SHARE]; };  // of this thread's row and columns

#if CARVE_SPLIT > 1 && CARVE_CONTENT
#define CLUSTER __cluster_dims__(CARVE_SPLIT, 1, 1)
#else
#define CLUSTER
#endif

// Shapes as in carve/ops/decode.py.  A token's numbers are contiguous; q_row to w_row are the distances between tokens.
// lengths may be null.
KERNEL void CLUSTER __launch_bounds__(THREADS, PROGRAMS) carve_decode(
    const void* q, const void* k, const void* v, const void* g, const void* e, const void* w, const void* p_down,
    const void* p_up, const void* p_write, const i64* lengths, float* memory, float* content, float* content_sum,
    i64* position, void* o, i64 q_row, i64 k_row, i64 v_row, i64 g_row, i64 e_row, i64 w_row, float scale, float top,
    int T, int C, int update, int programs) {
  byte* shared = shared_memory();
  const int rank = block_index() % SPLIT, thread = thread_index();
  const int n = block_index() / (HV * SPLIT), head = block_index() / SPLIT % HV;
  const i64 own = block_index() / SPLIT;
  const int key_head = head / (HV / H), g_head = head / (HV / H_G), e_head = head / (HV / H_E);
  const int first_column = rank * COLUMNS, first_row = warp() * ROWS, row = lane() % ROWS;
  const int group = lane() / LANES, column_of_lane = 4 * (lane() % LANES);

  float4* rows = (float4*)(shared + O_ROWS) + first_row;
  float* totals = (float*)(shared + O_TOTAL);
  byte* up = shared + O_UP + warp() * (R * ROWS * Up::BYTES);
  float* heard = (float*)(shared + O_HEARD);
  float* seen = (float*)(shared + O_SEEN);
  float* parts = (float*)(shared + O_PARTS);

  // -- everything is asked for before anything is waited for --
  auto load_token = [&](int t) {
    const i64 at = (i64)n * T + t;
    Token x;
    x.q = Number<CARVE_TYPE_Q>::load(q, at * q_row + key_head * K + first_row + row);
    x.k = Number<CARVE_TYPE_K>::load(k, at * k_row + key_head * K + first_row + row);
    x.g = Number<CARVE_TYPE_G>::load(g, at * g_row + g_head * K + first_row + row);
    x.e = Number<CARVE_TYPE_E>::load(e, at * e_row + e_head * K + first_row + row);
    x.w = W::load(w, at * w_row + head);
#pragma unroll
    for (int i = 0; i < SHARE; ++i) {
      const int column = min(thread + i * THREADS, COLUMNS - 1);
      x.v[i] = Number<CARVE_TYPE_V>::load(v, at * v_row + head * V + first_column + column);
    }
    return x;
  };
  Token x = load_token(0);
  if constexpr (READ) {
    const byte* from = (const byte*)(content + (own * K + first_row) * R);
    byte* to = (byte*)(seen + first_row * R);
#pragma unroll
    for (int i = lane(); i < ROWS * R / 4; i += 32) copy_16_bytes(to + 16 * i, from + 16 * i, true);
  }
  float raw[RANKS], write[RANKS];  // "mean": content; p_write
#pragma unroll
  for (int i = 0; i < RANKS; ++i) {
    const int r = lane() + 32 * i;
    raw[i] = MEAN && r < R ? content[own * R + r] : 0;
    write[i] = r < R ? Write::load(p_write, head * R + r) : 0;
  }
  if constexpr (Up::BYTES > 0) {
    constexpr int PIECES = ROWS * Up::BYTES / 16;
    const byte* from = (const byte*)p_up + ((i64)head * R * K + first_row) * Up::BYTES;
#pragma unroll
    for (int i = lane(); i < R * PIECES; i += 32)
      copy_16_bytes(up + 16 * i, from + i / PIECES * (K * Up::BYTES) + i % PIECES * 16, true);
  }
  float total[SHARE];  // "mean": sum of the chunk's outputs
#pragma unroll
  for (int i = 0; i < SHARE; ++i)
    total[i] = MEAN ? content_sum[own * V + first_column + min(thread + i * THREADS, COLUMNS - 1)] : 0;
  u32* halves = (u32*)(position + n);  // the lower first
  const u32 begin = thread == 0 ? load_shared_by_programs(halves) : 0;
  const i64 taken = lengths ? lengths[n] : T;

  float4 S[STEPS][PASSES];
  float* memory_of_lane = memory + (own * K + first_row + group) * V + first_column + column_of_lane;
#pragma unroll
  for (int s = 0; s < STEPS; ++s)
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass)
      S[s][pass] = load_once(memory_of_lane + s * GROUPS * V + pass * 4 * LANES);

  if constexpr (AHEAD > 0)  // into the cache, for a program that has not begun
    if (const i64 next = (i64)block_index() + AHEAD; next < programs) {
      const float* from = memory + next / SPLIT * (K * V) + next % SPLIT * COLUMNS;
      constexpr int LINES = (COLUMNS + 31) / 32;
#pragma unroll
      for (int i = thread; i < K * LINES; i += THREADS) fetch_into_cache(from + i / LINES * V + i % LINES * 32);
    }
  if (begin >= (u32)C || taken < 0 || taken > T) stop();
  const int count = (int)taken;
  u32 arrivals = 0;  // of other programs, before this one
  if (thread == 0) {
    *(int*)(shared + O_BEGIN) = (int)begin;
    if (update && count) arrivals = add_atomically(halves + 1, 1);
  }
  int at = 0;

#pragma unroll 1
  for (int t = 0; t < count; ++t) {
    const int turn = t & 1;  // what is read behind the barrier has two places, so that there is only one
    float* sums = (float*)(shared + O_SUMS) + turn * (WARPS * 2 * COLUMNS);
    float* values = (float*)(shared + O_VALUES) + turn * COLUMNS;
    float4* dots = (float4*)(shared + O_DOTS) + turn * WARPS;
    if (t == 0) wait_for_copies();
    warp_sync();  // the warp's copies are there; it has read the rows of the token before

    // -- gates of this warp's rows --
    const float own_q = lane() < ROWS ? x.q : 0, own_k = lane() < ROWS ? x.k : 0;
    const float qq = UNIT ? warp_sum(own_q * own_q) : 0, kk = UNIT ? warp_sum(own_k * own_k) : 0;
    const float qk = warp_sum(own_q * own_k);
    if (lane() == 0) dots[warp()] = make_float4(qq, kk, qk, 0);
    float shift = 0, write_logit = x.w;
    if constexpr (SEEN > 0) {
      float z[RANKS];
#pragma unroll
      for (int i = 0; i < RANKS; ++i) z[i] = raw[i];
      if constexpr (READ) {
#pragma unroll
        for (int j = 0; j < ROWS; ++j) {
          const float k_j = shuffle(x.k, j);
#pragma unroll
          for (int i = 0; i < RANKS; ++i)
            if (lane() + 32 * i < R) z[i] += k_j * seen[(first_row + j) * R + lane() + 32 * i];
        }
#pragma unroll
        for (int i = 0; i < RANKS; ++i)
          if (lane() + 32 * i < R) heard[warp() * R + lane() + 32 * i] = z[i], z[i] = 0;
        sync();
        float squares = 0;
#pragma unroll
        for (int j = 0; j < WARPS; ++j) {
          squares += dots[j].y;
#pragma unroll
          for (int i = 0; i < RANKS; ++i)
            if (lane() + 32 * i < R) z[i] += heard[j * R + lane() + 32 * i];
        }
#pragma unroll
        for (int i = 0; i < RANKS; ++i) z[i] *= unit_factor(squares);
      }
      if constexpr (RMS) {
        float squares = 0;
#pragma unroll
        for (int i = 0; i < RANKS; ++i) squares += z[i] * z[i];
        const float root = reciprocal_root(warp_sum(squares) / R + 1e-8f);
#pragma unroll
        for (int i = 0; i < RANKS; ++i) z[i] *= root;
      }
      if constexpr (Up::BYTES > 0)
#pragma unroll
        for (int r = 0; r < R; ++r) shift += shuffle(z[r / 32], r % 32) * Up::load(up, r * ROWS + row);
      if constexpr (Write::BYTES > 0) {
        float heard_by_write = 0;
#pragma unroll
        for (int i = 0; i < RANKS; ++i) heard_by_write += z[i] * write[i];
        write_logit += warp_sum(heard_by_write);
      }
    }
    const float decay = expf(x.g), b = top * sigmoid(x.e + shift), a = W::BYTES > 0 ? sigmoid(write_logit) : 1;
    if (lane() < ROWS) rows[row] = make_float4(decay, b * x.k * decay, x.q * decay, x.k);
#pragma unroll
    for (int i = 0; i < SHARE; ++i)
      if (thread + i * THREADS < COLUMNS) values[thread + i * THREADS] = a * x.v[i];
    warp_sync();

    // -- sums over this warp's rows --
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
      float y[8] = {};  // of (b k exp g)^T S, then of (q exp g)^T S
#pragma unroll
      for (int s = 0; s < STEPS; ++s) {
        const float4 c = rows[s * GROUPS + group], m = S[s][pass];
        y[0] = fmaf(c.y, m.x, y[0]), y[1] = fmaf(c.y, m.y, y[1]), y[2] = fmaf(c.y, m.z, y[2]);
        y[3] = fmaf(c.y, m.w, y[3]), y[4] = fmaf(c.z, m.x, y[4]), y[5] = fmaf(c.z, m.y, y[5]);
        y[6] = fmaf(c.z, m.z, y[6]), y[7] = fmaf(c.z, m.w, y[7]);
      }
      scatter_sum<8, GROUPS, LANES>(y);
      constexpr int LEFT = 8 / GROUPS;
      const int i = group * LEFT;
      float* to = sums + (2 * warp() + i / 4) * COLUMNS + pass * 4 * LANES + column_of_lane + i % 4;
      if constexpr (LEFT == 8) *(float4*)(to + COLUMNS) = make_float4(y[4], y[5], y[6], y[7]);
      if constexpr (LEFT >= 4) *(float4*)to = make_float4(y[0], y[1], y[2], y[3]);
      if constexpr (LEFT == 2) *(float2*)to = make_float2(y[0], y[1]);
      if constexpr (LEFT == 1) *to = y[0];
    }
    sync();
    if (t == 0) at = *(int*)(shared + O_BEGIN);
    if (t + 1 < count) x = load_token(t + 1);

    // -- the state behind the token --
    float qq_all = 0, kk_all = 0, qk_all = 0;
#pragma unroll
    for (int j = 0; j < WARPS; ++j) qq_all += dots[j].x, kk_all += dots[j].y, qk_all += dots[j].z;
    const float k_factor = unit_factor(kk_all), q_factor = scale * unit_factor(qq_all);
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
      const float* sum = sums + pass * 4 * LANES + column_of_lane;
      float4 r = make_float4(0, 0, 0, 0);
#pragma unroll
      for (int j = 0; j < WARPS; ++j) {
        const float4 y = *(const float4*)(sum + j * 2 * COLUMNS);
        r = make_float4(r.x + y.x, r.y + y.y, r.z + y.z, r.w + y.w);
      }
      const float4 value = *(const float4*)(values + pass * 4 * LANES + column_of_lane);
      const float4 u = make_float4(k_factor * (value.x - k_factor * r.x), k_factor * (value.y - k_factor * r.y),
                                   k_factor * (value.z - k_factor * r.z), k_factor * (value.w - k_factor * r.w));
#pragma unroll
      for (int s = 0; s < STEPS; ++s) {
        const float4 c = rows[s * GROUPS + group];
        float4& m = S[s][pass];
        m = make_float4(fmaf(c.w, u.x, c.x * m.x), fmaf(c.w, u.y, c.x * m.y), fmaf(c.w, u.z, c.x * m.z),
                        fmaf(c.w, u.w, c.x * m.w));
      }
    }

    // -- outputs --
#pragma unroll
    for (int i = 0; i < SHARE; ++i) {
      const int column = thread + i * THREADS;
      if (column < COLUMNS) {
        float r = 0, y = 0;
#pragma unroll
        for (int j = 0; j < WARPS; ++j) r += sums[j * 2 * COLUMNS + column], y += sums[(j * 2 + 1) * COLUMNS + column];
        y = q_factor * (y + qk_all * (k_factor * (values[column] - k_factor * r)));
        Number<CARVE_TYPE_V>::store(o, (((i64)n * T + t) * HV + head) * V + first_column + column, y);
        total[i] += y;
      }
    }

    // -- a full chunk: what the gates of the next one see --
    if (++at == C) {
      at = 0;
      if constexpr (SEEN > 0) {
        if constexpr (MEAN) {
#pragma unroll
          for (int i = 0; i < SHARE; ++i) {
            if (thread + i * THREADS < COLUMNS) totals[thread + i * THREADS] = total[i];
            total[i] = 0;
          }
          sync();
#pragma unroll 1
          for (int r = warp(); r < R; r += WARPS) {
            float y[(COLUMNS + 31) / 32];
#pragma unroll
            for (int i = 0; i < (COLUMNS + 31) / 32; ++i) {
              const int column = min(lane() + 32 * i, COLUMNS - 1);
              const float down = Number<CARVE_TYPE_DOWN>::load(p_down, ((i64)head * V + first_column + column) * R + r);
              y[i] = warp_sum(lane() + 32 * i < COLUMNS ? totals[column] * down : 0);
            }
            if (lane() == 0) parts[r] = sum(y);
          }
        }
        if constexpr (READ) {
#pragma unroll 1
          for (int first = 0; first < R; first += 4) {  // 4 of the R columns at once
            float down[PASSES][4][4];
#pragma unroll
            for (int pass = 0; pass < PASSES; ++pass)
#pragma unroll
              for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                  const i64 column = (i64)head * V + first_column + pass * 4 * LANES + column_of_lane + i;
                  down[pass][i][j] = first + j < R ? Number<CARVE_TYPE_DOWN>::load(p_down, column * R + first + j) : 0;
                }
#pragma unroll
            for (int s = 0; s < STEPS; ++s) {
              float z[PASSES];
#pragma unroll
              for (int pass = 0; pass < PASSES; ++pass) {
                const float4 m = S[s][pass];
                float y[4];
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                  const float half = fmaf(m.y, down[pass][1][j], m.x * down[pass][0][j]);
                  y[j] = fmaf(m.w, down[pass][3][j], fmaf(m.z, down[pass][2][j], half));
                }
                scatter_sum<4, 4, 1>(y);
                z[pass] = y[0];
#pragma unroll
                for (int mask = 4; mask < LANES; mask *= 2) z[pass] += shuffle_xor(z[pass], mask);
              }
              const int r = first + lane() % 4;
              if (lane() % LANES < 4 && r < R) parts[(first_row + s * GROUPS + group) * R + r] = sum(z);
            }
          }
        }
        sync_head();
#pragma unroll 1
        for (int i = thread; i < SEEN; i += THREADS) {
          float y[SPLIT];
#pragma unroll
          for (int j = 0; j < SPLIT; ++j) y[j] = load_from_head(parts + i, j);
          seen[i] = sum(y) / (MEAN ? C : 1);
        }
        sync_head();
        if constexpr (MEAN)
#pragma unroll
          for (int i = 0; i < RANKS; ++i) raw[i] = lane() + 32 * i < R ? seen[lane() + 32 * i] : 0;
      }
    }
  }

  // -- no output of tokens that are not taken --
#pragma unroll 1
  for (int t = count; t < T; ++t)
#pragma unroll 1
    for (int i = thread; i < COLUMNS; i += THREADS)
      Number<CARVE_TYPE_V>::store(o, (((i64)n * T + t) * HV + head) * V + first_column + i, 0);

  if (!update || count == 0) return;
#pragma unroll
  for (int s = 0; s < STEPS; ++s)
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass)
      *(float4*)(memory_of_lane + s * GROUPS * V + pass * 4 * LANES) = S[s][pass];
  if constexpr (MEAN)
#pragma unroll
    for (int i = 0; i < SHARE; ++i)
      if (thread + i * THREADS < COLUMNS) content_sum[own * V + first_column + thread + i * THREADS] = total[i];
  if constexpr (SEEN > 0)
    if (at < count && rank == 0)  // a chunk was closed
#pragma unroll 1
      for (int i = thread; i < SEEN; i += THREADS) content[own * SEEN + i] = seen[i];
  if (thread == 0 && arrivals == HV * SPLIT - 1) position[n] = at;
}
