// What the forward and the reverse share: blocks of 16 tokens in slots of shared memory, which preparing warps fill ahead of
// those that hold the state.

constexpr int OWN = K / 32;                              // columns of a block that a lane of a preparing warp has

constexpr int K_ROWS = BLOCK * K * 2, V_ROWS = BLOCK * V * 2, SQUARE = BLOCK * BLOCK * 2;
constexpr int O_Q = 0, O_K = O_Q + K_ROWS, O_E = O_K + K_ROWS, O_G = O_E + K_ROWS, O_V = O_G + 2 * K_ROWS;
constexpr int O_M = O_V + V_ROWS, O_MORE = O_M + SQUARE;

// The right operand of a product: quarters upper left, upper right, lower left, lower right, which saves the moves that
// the tensor cores' order of registers takes otherwise.
struct Right { u32 x[4]; };

// C += A B^T
DEVICE void multiply(Sums& c, const Operand& a, const Right& b) {
  multiply_add(c.x[0], a.x, b.x[0], b.x[1]);
  multiply_add(c.x[1], a.x, b.x[2], b.x[3]);
}

DEVICE Right load_right(u32 address) {
  Right b;
  load_quarters(b.x, address);
  return b;
}
DEVICE Right load_right_transposed(u32 address) {
  Right b;
  load_quarters_transposed(b.x, address);
  return b;
}
// as Matrix::load and Matrix::load_transposed
template <int D> DEVICE Right load_right(Matrix<D> x, int row, int column) {
  Right b;
  load_quarters(b.x, x.address((lane() & 7) + 8 * (lane() >> 4), (lane() >> 3) & 1, row, column));
  return b;
}
template <int D> DEVICE Right load_right_transposed(Matrix<D> x, int row, int column) {
  Right b;
  load_quarters_transposed(b.x, x.address(lane() & 15, lane() >> 4, row, column));
  return b;
}
DEVICE Right right_transposed(uint4 a) {  // the transpose of a left operand
  return {{transpose_quarter(a.x), transpose_quarter(a.y), transpose_quarter(a.z), transpose_quarter(a.w)}};
}

// A warp copies `count` rows of D numbers of 16 bits, and zeros up to BLOCK rows, 16 bytes a lane, into a Matrix<D>;
// with FP32, of fp32 numbers, in two rounds a row, as they lie.
template <int D, bool FP32 = false>
DEVICE void copy_block(byte* to, const void* from, i64 first, int count, int heads, int head) {
  constexpr int LANES = D / 8, STEP = 32 / LANES, BYTES = FP32 ? 4 * D : 2 * D;
  const int lane = lane_anew(), row = lane / LANES, piece = lane % LANES, stride = heads * BYTES;
  const byte* p = (const byte*)from + (first * heads + head) * BYTES + ((i64)row * stride + piece * 16);
  const int plain = row * BYTES + piece * 16, permuted = row * BYTES + ((piece ^ row) << 4);
#pragma unroll
  for (int i = 0; i < BLOCK; i += STEP) {
    const bool valid = row + i < count;
    const byte* from_row = p + (i64)i * stride;
    copy_16_bytes(to + i * BYTES + (FP32 ? plain : permuted ^ ((i & 7) << 4)), from_row, valid);
    if (FP32) copy_16_bytes(to + i * BYTES + plain + BYTES / 2, from_row + BYTES / 2, valid);
  }
}

// Some consecutive numbers of a row, as one access to shared memory.
struct alignas(4 * OWN) Floats { float x[OWN]; };
struct alignas(2 * OWN) Pairs { u32 x[OWN / 2]; };

template <typename X> DEVICE Floats own_columns(Matrix<K> x, int row) {
  const Pairs pairs = *(const Pairs*)x.at(row, OWN * lane());
  Floats y;
#pragma unroll
  for (int c = 0; c < OWN; c += 2) {
    const float2 pair = unpack<X>(pairs.x[c / 2]);
    y.x[c] = pair.x, y.x[c + 1] = pair.y;
  }
  return y;
}
DEVICE void set_own_columns(Matrix<K> x, int row, const Floats& y) {
  Pairs pairs;
#pragma unroll
  for (int c = 0; c < OWN; c += 2) pairs.x[c / 2] = pack<Bf16>(y.x[c], y.x[c + 1]);
  *(Pairs*)x.at(row, OWN * lane()) = pairs;
}

// A block's log-decays added up, in powers of 2, of a lane's columns; returns whether the block is strong.
template <typename Slot> DEVICE bool add_up_decays(Slot slot, Floats (&G)[BLOCK]) {
  const auto g = [&](int t) -> const Floats& { return (const Floats&)slot.G(t, OWN * lane()); };
  float lowest = 0;
#pragma unroll
  for (int t = 0; t < BLOCK; ++t) G[t] = g(t);
#pragma unroll
  for (int c = 0; c < OWN; ++c) {
    float sum = 0;
#pragma unroll
    for (int t = 0; t < BLOCK; ++t) G[t].x[c] = sum = sum + LOG2_E * G[t].x[c];
    lowest = fminf(lowest, sum);
  }
  const bool strong = any_lane(lowest < -MILD);
  if (lane() == 0) slot.set_strong(strong);
  if (strong) {
#pragma unroll
    for (int c = 0; c < OWN; ++c) {
      float sum = 0;  // anew, so that differences of sums stay finite
#pragma unroll
      for (int t = 0; t < BLOCK; ++t) G[t].x[c] = sum = sum + at_least(LOG2_E * g(t).x[c], GONE);
    }
  }
  return strong;
}

// x: a column of T = (I + A)^-1 of a block, by forward substitution in fp32.  A: its columns, 16 numbers each.
DEVICE void solve(float (&x)[BLOCK], const float* A, int column) {
#pragma unroll
  for (int i = 0; i < BLOCK; ++i) x[i] = i == column ? 1 : 0;
#pragma unroll
  for (int j = 0; j < BLOCK - 1; ++j) {
    float A_j[BLOCK];
#pragma unroll
    for (int i = (j + 1) & ~3; i < BLOCK; i += 4) *(float4*)(A_j + i) = *(const float4*)(A + j * 16 + i);
#pragma unroll
    for (int i = j + 1; i < BLOCK; ++i) x[i] -= A_j[i] * x[j];
  }
}

DEVICE void scale_columns(Sums& y, float4 x) {
  y.x[0][0] *= x.x, y.x[0][1] *= x.y, y.x[0][2] *= x.x, y.x[0][3] *= x.y;
  y.x[1][0] *= x.z, y.x[1][1] *= x.w, y.x[1][2] *= x.z, y.x[1][3] *= x.w;
}

template <int O_DECAY, int O_GATES, int O_STRONG> struct BlockSlot {
  byte* base;

  DEVICE Matrix<K> q() const { return {base + O_Q}; }
  DEVICE Matrix<K> k() const { return {base + O_K}; }
  DEVICE Matrix<K> e() const { return {base + O_E}; }
  DEVICE float2& G(int row, int column) const { return *(float2*)(base + O_G + (row * K + column) * 4); }
  DEVICE Matrix<16> M() const { return {base + O_M}; }
  DEVICE float* a() const { return (float*)(base + O_GATES); }
  DEVICE bool strong() const { return any_lane(*(int*)(base + O_STRONG)); }  // any_lane tells that lanes agree
  DEVICE void set_strong(bool x) const { *(int*)(base + O_STRONG) = x; }
};

// Where a warp is in the ring of COUNT slots.  A slot's signals: `full`, once it is prepared, and `free`, once none of the
// warps that hold the state needs it.
template <typename Slot, int COUNT, int BYTES, int O_SLOTS, int O_FULL, int O_FREE> struct RingOf {
  byte* shared;
  int slot, phase;

  DEVICE Slot at() const { return {shared + O_SLOTS + slot * BYTES}; }
  DEVICE Slot at(int ahead) const { return {shared + O_SLOTS + (slot + ahead) % COUNT * BYTES}; }
  DEVICE Signal* full() const { return (Signal*)(shared + O_FULL) + slot; }
  DEVICE Signal* free() const { return (Signal*)(shared + O_FREE) + slot; }
  DEVICE void step(int blocks) {
    slot += blocks;
    phase ^= slot / COUNT & 1;
    slot %= COUNT;
  }
  DEVICE RingOf after(int blocks) const {
    RingOf y = *this;
    y.step(blocks);
    return y;
  }
};

// The first COUNT threads fill shared memory with P_up [RANK, K], in fp32 for "mean" and else in bf16, and with p_write
// [RANK]; zeros for those not given.
template <int COUNT>
DEVICE void load_gate_projections(byte* up, float* write, const float* p_up, const float* p_write, int head, int R) {
  const int thread = thread_index();
  for (int i = thread; i < RANK * K / 2; i += COUNT) {
    const int r = i / (K / 2), column = 2 * (i % (K / 2));
    const float* p = p_up + ((i64)head * R + r) * K + column;
    const float2 x = r < R && p_up ? make_float2(p[0], p[1]) : make_float2(0, 0);
    if constexpr (MEAN) *(float2*)((float*)up + r * K + column) = x;
    else Matrix<K>{up}.pair(r, column) = pack<Bf16>(x.x, x.y);
  }
  if (thread < RANK) write[thread] = thread < R && p_write ? p_write[(i64)head * R + thread] : 0;
}

// Where a column's decay lies: in the order in which the lanes that hold the state need it, four numbers of 16 columns a
// lane.
DEVICE int place_of_decay(int column) { return (column & ~15) + 2 * (column & 6) + ((column >> 2) & 2); }
