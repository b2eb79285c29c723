// What the forward and the backward share.  The symbols are those of carve/ops/recurrence.py.
//
// A program runs one value head of one sequence, tile by tile.  A tile is at most TILE tokens of one content chunk, so
// that its gates see one content; a tile is cut into blocks of 16 tokens, and with G the sum of g inside a block
//
//     A_ij  = sum_d b_i k_i k_j exp(G_i - G_j)  (i > j)      M_ij = scale sum_d q_i k_j exp(G_i - G_j)  (i >= j)
//     T     = (I + A)^-1                                     v_new = T (a v - (b k exp G) S)
//     o     = (scale q exp G) S + M v_new                    S <- Diag(exp G_16) S + (k exp(G_16 - G))^T v_new
//
// Operands of the tensor cores are bf16, sums fp32.  exp(-G) is used where a block decays by less than exp(-MILD) in
// every channel; a strong block, which decays more, goes another way.
//
// Where sequences and heads are few, SPLIT programs share a value head, each with V of its values, and meet as a cluster
// where the content needs all of them.
//
// Compiled for one shape: CARVE_K, CARVE_V, CARVE_SPLIT, CARVE_TILE, CARVE_INPUT (Bf16 or Fp16), CARVE_CONTENT (0 blind, 1 mean,
// 2 read), CARVE_RMS (0 or 1).

constexpr int SPLIT = CARVE_SPLIT;        // programs that share a value head
constexpr int K = CARVE_K, V = CARVE_V / SPLIT, TILE = CARVE_TILE;
constexpr int BLOCK = 16;                 // tokens over which decay may be divided out
constexpr int BLOCKS = TILE / BLOCK;
constexpr int SAVE = 64;                  // tokens between two states saved for the backward, from a chunk's first on
constexpr int RANK = 16;                  // R is padded to it with zeros
template <int BYTES> struct Aligned { static constexpr int bytes = (BYTES + 255) / 256 * 256; };
constexpr int THREADS = CARVE_THREADS, WARPS = THREADS / 32;
constexpr int ROWS = V / 16, COLUMNS = K / 16;  // slabs of 16 rows and of 16 columns of the transposed state
constexpr bool MEAN = CARVE_CONTENT == 1, READ = CARVE_CONTENT == 2, RMS = CARVE_RMS;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float MILD = 57.7f;             // 40 in powers of e: exp(40) leaves fp32 and bf16 room for 1e20 on either side
constexpr float GONE = -256.0f;           // 2^-256 is 0 in fp32: decays beyond it need no telling apart
typedef CARVE_INPUT Input;
template <typename X> struct IsHalf { static constexpr bool value = false; };
template <> struct IsHalf<Fp16> { static constexpr bool value = true; };
constexpr bool HALF = IsHalf<Input>::value;

static_assert(K % 64 == 0 && V % 64 == 0 && SAVE % TILE == 0, "shapes that the kernels are written for");

#if CARVE_SPLIT > 1
#define CLUSTER __cluster_dims__(CARVE_SPLIT, 1, 1)
#else
#define CLUSTER
#endif

DEVICE int lane() { return thread_index() & 31; }
DEVICE int warp() { return thread_index() >> 5; }
DEVICE int quad_row() { return lane() >> 2; }           // row of this thread's numbers in an 8 x 8 quarter
DEVICE int quad_column() { return 2 * (lane() & 3); }   // column of the first of its two numbers

// ---------------------------------------------------------------------------------------------------------------------
// 16 x 16 operands and products
// ---------------------------------------------------------------------------------------------------------------------

struct Operand { u32 x[4]; };     // bf16; quarters: upper left, lower left, upper right, lower right
struct Sums { float x[2][4]; };   // fp32; [left, right][upper row 0, 1, lower row 0, 1]

DEVICE Sums zeros() { return {{{0, 0, 0, 0}, {0, 0, 0, 0}}}; }

// C += A B^T
DEVICE void multiply(Sums& c, const Operand& a, const Operand& b) {
  multiply_add(c.x[0], a.x, b.x[0], b.x[2]);
  multiply_add(c.x[1], a.x, b.x[1], b.x[3]);
}

DEVICE Operand round_to_bf16(const Sums& c) {
  return {{pack<Bf16>(c.x[0][0], c.x[0][1]), pack<Bf16>(c.x[0][2], c.x[0][3]),
           pack<Bf16>(c.x[1][0], c.x[1][1]), pack<Bf16>(c.x[1][2], c.x[1][3])}};
}

DEVICE Operand transpose(const Operand& a) {
  return {{transpose_quarter(a.x[0]), transpose_quarter(a.x[2]), transpose_quarter(a.x[1]), transpose_quarter(a.x[3])}};
}

// f(number, row, column) of every number
template <typename F> DEVICE void for_each(Sums& c, F f) {
#pragma unroll
  for (int t = 0; t < 2; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i) f(c.x[t][i], quad_row() + 8 * (i >> 1), 8 * t + quad_column() + (i & 1));
}

template <typename X> DEVICE Operand to_bf16(Operand a);
template <> DEVICE Operand to_bf16<Bf16>(Operand a) { return a; }
template <> DEVICE Operand to_bf16<Fp16>(Operand a) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float2 y = unpack<Fp16>(a.x[i]);
    a.x[i] = pack<Bf16>(y.x, y.y);
  }
  return a;
}

DEVICE Operand negate(Operand a) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a.x[i] ^= 0x80008000u;
  return a;
}

// 16-bit numbers in an operand as fp32, laid out as sums are
template <typename X = Bf16> DEVICE Sums widen(const Operand& a) {
  Sums y;
#pragma unroll
  for (int t = 0; t < 2; ++t)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 pair = unpack<X>(a.x[2 * t + i]);
      y.x[t][2 * i] = pair.x, y.x[t][2 * i + 1] = pair.y;
    }
  return y;
}

DEVICE void add(Sums& x, const Sums& y) {
#pragma unroll
  for (int t = 0; t < 2; ++t)
#pragma unroll
    for (int n = 0; n < 4; ++n) x.x[t][n] += y.x[t][n];
}
DEVICE uint4 as_uint4(const Operand& a) { return make_uint4(a.x[0], a.x[1], a.x[2], a.x[3]); }
DEVICE Operand as_operand(uint4 x) { return {{x.x, x.y, x.z, x.w}}; }

DEVICE float quad_sum(float x) {  // over the 4 lanes that hold a row
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}
DEVICE float column_sum(float x) {  // over the 8 lanes that hold a column
  x += shuffle_xor(x, 4);
  x += shuffle_xor(x, 8);
  return x + shuffle_xor(x, 16);
}
DEVICE float warp_sum(float x) { return column_sum(quad_sum(x)); }

// ---------------------------------------------------------------------------------------------------------------------
// Matrices in shared memory
// ---------------------------------------------------------------------------------------------------------------------

// Rows of D 16-bit numbers.  Pieces of 16 bytes are permuted within a row, so that the 8 rows of a quarter lie in
// different banks.  For D >= 64 the base is a multiple of a row's bytes: then going from one column to another (both
// multiples of 16) is one XOR of a lane's address.
template <int D> struct Matrix {
  byte* base;

  DEVICE byte* at(int row, int column) const {
    const int piece = D >= 64 ? (column >> 3) ^ (row & 7) : (column >> 3) ^ ((row >> 2) & 1);
    return base + row * (2 * D) + (piece << 4) + 2 * (column & 7);
  }
  DEVICE u32& pair(int row, int column) const { return *(u32*)at(row, column); }
  DEVICE Matrix block(int i) const { return {base + i * (BLOCK * 2 * D)}; }

  DEVICE u32 address(int row_of_lane, int piece_of_lane, int row, int column) const {
    if (D < 64) return shared_address(at(row + row_of_lane, column + 8 * piece_of_lane));
    const u32 first = shared_address(base) + row_of_lane * (2 * D) + ((piece_of_lane ^ (row_of_lane & 7)) << 4);
    return (first ^ (2 * column)) + row * (2 * D);
  }
  // the operand at [row, column], both multiples of 16
  DEVICE Operand load(int row, int column) const {
    Operand a;
    load_quarters(a.x, address(lane() & 15, lane() >> 4, row, column));
    return a;
  }
  // element [i][j] of the operand is [row + j][column + i] of the matrix
  DEVICE Operand load_transposed(int row, int column) const {
    Operand a;
    load_quarters_transposed(a.x, address((lane() & 7) + 8 * (lane() >> 4), (lane() >> 3) & 1, row, column));
    return a;
  }
  DEVICE void store(int row, int column, const Operand& a) const {
    pair(row + quad_row(), column + quad_column()) = a.x[0];
    pair(row + quad_row() + 8, column + quad_column()) = a.x[1];
    pair(row + quad_row(), column + quad_column() + 8) = a.x[2];
    pair(row + quad_row() + 8, column + quad_column() + 8) = a.x[3];
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Sequences, chunks and tiles
// ---------------------------------------------------------------------------------------------------------------------

struct Sequence {
  i64 begin;             // of its first token in the batch
  int length, position;  // tokens; tokens of the first chunk that came before this call
  int C, chunks;
  int span;              // tokens of a chunk that a call can have, at most
  i64 slot;              // of its first chunk among all that are saved

  // bounds: [N + 1], or null; T: tokens of a row, which without bounds is a sequence; positions: [N], or null for zeros
  DEVICE Sequence(const i64* bounds, const i64* positions, int n, int T, int chunk_size) {
    begin = bounds ? bounds[n] : (i64)n * T;
    length = bounds ? (int)(bounds[n + 1] - begin) : T;
    position = positions ? (int)positions[n] : 0;
    C = chunk_size;
    span = min(C, T);
    chunks = length ? (position + length - 1) / C + 1 : 0;
    slot = begin / C + 2 * n;  // a sequence of L tokens touches at most L / C + 2 chunks
  }
  DEVICE int first(int chunk) const { return max(0, chunk * C - position); }
  DEVICE int last(int chunk) const { return min(length, (chunk + 1) * C - position); }  // one behind it
  // of what is saved every `tokens` tokens of a chunk
  DEVICE i64 slot_of(int chunk, int token_of_chunk, int tokens) const {
    return (slot + chunk) * ((span + tokens - 1) / tokens) + token_of_chunk / tokens;
  }
};

DEVICE float sigmoid(float x) { return reciprocal(1.0f + exp2_(-LOG2_E * x)); }
