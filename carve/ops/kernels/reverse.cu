// The backward's sequential part: the gradient of the state, from the last tile of a sequence to the first, one value head
// a program, or a cluster of SPLIT programs with V of its values each.  It leaves behind what lets `gradients.cu`
// differentiate every tile on its own: the gradient of the state behind each tile, dr of each block, and what the content
// sends back.
//
// With d the gradient of the outputs (for "mean", that of the running sum added), r = a v - (b k exp G) S and dS the
// gradient of the state behind a block:
//
//     dv_new = M^T d + (k exp(G_16 - G)) dS             dr = T^T dv_new
//     dS    <- Diag(exp G_16) dS + (scale q exp G)^T d - (b k exp G)^T dr
//
// The content is known, so all but dS is independent of what comes behind.  Preparing warps copy inputs and turn them,
// block by block, into what the chain needs, as in `forward.cu`: through a ring of slots, about a tile ahead.  Working
// warps run the chain, 16 rows of V each.  The content needs the gradient of the erase gates too.  With S the state before
// a tile, D_s the decay of its block s and x = k exp -G,
//
//     d(b k exp G)_s = -((dr_s S^T D_0 + P_s0 x_0 D_0) D_1 + P_s1 x_1 D_1 ...) - P_ss x_s      P_sj = dr_s v_new_j^T
//
// (P_ss strictly lower): products over V, done when a tile's dr are all there, by the warp that has the columns of K.  As
// everything here is linear in dr, programs of a cluster add up only what the content receives: for "mean" 16 numbers a
// chunk, for "read" 16 a token.

constexpr int WORKERS = SPLIT * ROWS, PREPARERS = 4;  // warps
constexpr int HELD = COLUMNS / SPLIT;                 // slabs of 16 columns of dS^T that a worker holds, with 16 rows
constexpr int SLABS = (COLUMNS + WORKERS - 1) / WORKERS;  // those that it has when dr are all there, with all rows
constexpr bool SEES = MEAN || READ;

constexpr int NUMBERS = RANK + 4;                     // that a worker adds to the content's gradient ("mean")
constexpr int UP_BYTES = MEAN ? RANK * K * 4 : READ ? RANK * K * 2 : 0;
constexpr int MET_BYTES = MEAN ? 2 * SPLIT * WORKERS * NUMBERS * 4 : READ && SPLIT > 1 ? 2 * BLOCKS * 1024 : 0;
constexpr int O_UP = 0, O_WRITE = O_UP + UP_BYTES, O_MET = O_WRITE + RANK * 4, O_DA = O_MET + MET_BYTES;
constexpr int O_SHARES = O_DA + (READ ? ROWS * TILE * 4 : 0), O_SIGNALS = O_SHARES + (SPLIT > 1 ? 2 * WORKERS * 1024 : 0);
constexpr int O_RING = Aligned<O_SIGNALS + 16 * 8 + 8>::bytes;

// A slot.  q_in lies over q, weights over e, b k exp G and x over g, dr over d; when the chain is through, P over q_in.
constexpr int O_KEYS = O_G + K_ROWS, O_D = O_V, O_T = O_MORE, O_Z = O_T + SQUARE, O_DECAY = O_Z + SQUARE;
constexpr int O_GATES = O_DECAY + K * 4, O_RAW = O_GATES + BLOCK * 4, O_STRONG = O_RAW + RANK * 4;
constexpr int SLOT = Aligned<O_STRONG + 4>::bytes;

constexpr int ROOM = (CARVE_SHARED - O_RING) / SLOT, RING = ROOM < 8 ? ROOM : 8;  // slots
constexpr int SHARED_BYTES = O_RING + RING * SLOT;

static_assert(SPLIT <= 2, "two programs add up what each of them has to the same bits, more would need an order");
static_assert(TILE == SAVE, "a tile begins where a state was saved");
static_assert(RING > BLOCKS, "carve/ops/kernels/cuda.py says how much shared memory a program gets");
static_assert(THREADS == 32 * (WORKERS + PREPARERS), "carve/ops/kernels/cuda.py says how many threads a program has");

DEVICE void sync_workers() { barrier(1, 32 * WORKERS); }

struct Slot : BlockSlot<O_DECAY, O_GATES, O_STRONG> {
  DEVICE Matrix<K> bk_in() const { return {base + O_G}; }
  DEVICE Matrix<K> keys() const { return {base + O_KEYS}; }      // k exp -G; strong: k exp(G_16 - G)
  DEVICE Matrix<V> d() const { return {base + O_D}; }            // gradient of the outputs, then dr
  DEVICE Matrix<16> T() const { return {base + O_T}; }
  DEVICE Matrix<TILE> P() const { return {base + O_Q}; }
  DEVICE float* A() const { return (float*)(base + O_T); }       // transposed, over T and z until it is solved
  DEVICE Matrix<16> z() const { return {base + O_Z}; }           // ("read")
  DEVICE Matrix<16> dz() const { return {base + O_M}; }          // when the chain is through ("read")
  DEVICE Matrix<16> dZ() const { return {base + O_G}; }          // [K, RANK], when the chain is through
  // exp G_16, in the order in which the lanes that hold the state need it: four numbers of 16 columns a lane
  DEVICE float4 decay_of_lane(int slab) const { return *(float4*)(base + O_DECAY + 64 * slab + 8 * quad_column()); }
  DEVICE float2& decay(int column) const {
    return *(float2*)(base + O_DECAY + 4 * ((column & ~15) + 2 * (column & 6) + ((column >> 2) & 2)));
  }
  DEVICE float* raw() const { return (float*)(base + O_RAW); }   // m_c P_down [RANK] ("mean"); 1 / rms of z ("read")
};

typedef RingOf<Slot, RING, SLOT, O_RING, O_SIGNALS, O_SIGNALS + 64> Ring;

// ---------------------------------------------------------------------------------------------------------------------
// Preparing warps
// ---------------------------------------------------------------------------------------------------------------------

// The blocks of a sequence, from the last to the first.
struct Cursor {
  int chunk, block;  // block of the chunk
  Ring ring;

  DEVICE void skip(const Sequence& sequence, int blocks) {
    ring.step(blocks);
    block -= blocks;
    while (block < 0 && --chunk >= 0) block += (sequence.last(chunk) - sequence.first(chunk) + BLOCK - 1) / BLOCK;
  }
};

// A warp starts fetching the same, of numbers of SIZE bytes, into the L2 cache.
template <int D, int SIZE> DEVICE void fetch_block(const void* from, i64 first, int count, int heads, int head) {
  constexpr int LINES = D * SIZE / 128, STEP = 32 / LINES;
  const int lane = lane_anew(), row = lane / LINES, stride = heads * (D * SIZE);
  const byte* p = (const byte*)from + (first * heads + head) * (D * SIZE) + ((i64)row * stride + lane % LINES * 128);
#pragma unroll
  for (int i = 0; i < BLOCK; i += STEP)
    if (row + i < count) fetch_into_cache(p + (i64)i * stride);
}

// Rows of A and M of a strong block, by one warp: decay is summed up from token i backwards.
DEVICE void multiply_block_pair_by_pair(Slot slot, const Floats& shift, float scale, float top) {
#pragma unroll 1
  for (int i = 0; i < BLOCK; ++i) {
    const Floats q = own_columns<Input>(slot.q(), i), e = own_columns<Input>(slot.e(), i);
    Floats bk = own_columns<Input>(slot.k(), i), sum = {};
#pragma unroll
    for (int c = 0; c < OWN; ++c) bk.x[c] *= top * sigmoid(e.x[c] + shift.x[c]);
#pragma unroll 1
    for (int j = BLOCK - 1; j >= 0; --j) {
      float M = 0, A = 0;
      if (j <= i) {
        const Floats k = own_columns<Input>(slot.k(), j);
        if (j < i) {
          const Floats g = (Floats&)slot.G(j + 1, OWN * lane());
#pragma unroll
          for (int c = 0; c < OWN; ++c) sum.x[c] += at_least(LOG2_E * g.x[c], GONE);
        }
#pragma unroll
        for (int c = 0; c < OWN; ++c) {
          const float decayed = k.x[c] * exp2_(sum.x[c]);
          M += q.x[c] * decayed, A += bk.x[c] * decayed;
        }
        M = warp_sum(M) * scale, A = warp_sum(A);
      }
      if (lane() == 0) {
        *(unsigned short*)slot.M().at(i, j) = (unsigned short)(pack<Bf16>(M, 0) & 0xffff);
        slot.A()[j * 16 + i] = j < i ? A : 0;
      }
    }
  }
}

// A and M of a mild block, by one warp.
DEVICE void multiply_block(Slot slot) {
  Sums A[2] = {zeros(), zeros()}, M[2] = {zeros(), zeros()};
#pragma unroll
  for (int n = 0; n < COLUMNS; ++n) {
    const Right keys = load_right(slot.keys(), 0, 16 * n);
    multiply(A[n & 1], slot.bk_in().load(0, 16 * n), keys);
    multiply(M[n & 1], slot.q().load(0, 16 * n), keys);
  }
#pragma unroll
  for (int t = 0; t < 2; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i) A[0].x[t][i] += A[1].x[t][i], M[0].x[t][i] += M[1].x[t][i];
  for_each(A[0], [&](float& x, int i, int j) { slot.A()[j * 16 + i] = i > j ? x : 0; });
  for_each(M[0], [&](float& x, int i, int j) { x = i >= j ? x : 0; });
  slot.M().store(0, 0, round_to_bf16(M[0]));
}

// "read": adds z P_up to the erase logits, z p_write to the write logits, leaves 1 / rms, and returns z.
DEVICE Operand shift_block(Slot slot, const Right (&Z)[COLUMNS], Matrix<K> up, const float* write, float part_of_R) {
  Sums z = zeros(), odd = zeros();
#pragma unroll
  for (int n = 0; n < COLUMNS; n += 2) {
    multiply(z, to_bf16<Input>(slot.k().load(0, 16 * n)), Z[n]);
    multiply(odd, to_bf16<Input>(slot.k().load(0, 16 * n + 16)), Z[n + 1]);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float squares = 0, root = 1, shift = 0;
#pragma unroll
    for (int t = 0; t < 2; ++t)
#pragma unroll
      for (int j = 2 * i; j < 2 * i + 2; ++j) {
        z.x[t][j] += odd.x[t][j];
        squares += z.x[t][j] * z.x[t][j];
      }
    if constexpr (RMS) root = reciprocal_root(quad_sum(squares) * part_of_R + 1e-8f);
#pragma unroll
    for (int t = 0; t < 2; ++t)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float& x = z.x[t][2 * i + j];
        x *= root;
        shift += x * write[8 * t + quad_column() + j];
      }
    shift = quad_sum(shift);
    if ((lane() & 3) == 0) {
      slot.a()[quad_row() + 8 * i] += shift;
      slot.raw()[quad_row() + 8 * i] = root;
    }
  }
  const Operand z_bf16 = round_to_bf16(z);
#pragma unroll
  for (int n = 0; n < COLUMNS; ++n) {
    Sums shift = zeros();
    multiply(shift, z_bf16, load_right_transposed(up, 0, 16 * n));
#pragma unroll
    for (int t = 0; t < 2; ++t)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        u32& x = slot.e().pair(quad_row() + 8 * i, 16 * n + 8 * t + quad_column());
        const float2 y = unpack<Input>(x);
        x = pack<Input>(y.x + shift.x[t][2 * i], y.y + shift.x[t][2 * i + 1]);
      }
  }
  warp_sync();
  return z_bf16;
}

// T = (I + A)^-1 of a block by forward substitution in fp32; lane c (and c + 16) has column c.
DEVICE void solve_block(Slot slot) {
  const int column = lane() & 15;
  const float* A = slot.A();
  float x[BLOCK];
  solve(x, A, column);
  warp_sync();  // all have read A
#pragma unroll
  for (int i = 0; i < BLOCK; ++i)
    if (lane() < 16) *(unsigned short*)slot.T().at(i, column) = (unsigned short)(pack<Bf16>(x[i], 0) & 0xffff);
}

// Turns a block's inputs into what the workers need, by one warp; a lane has OWN columns.  shift: of its erase logits.
DEVICE void prepare_block(Slot slot, const Floats& shift, float write_shift, float scale, float top, bool has_w) {
  Floats G[BLOCK];
  const bool strong = add_up_decays(slot, G);
  if (strong) {
    multiply_block_pair_by_pair(slot, shift, scale, top);
  }
  const Floats G_16 = G[BLOCK - 1];
  Floats until, y_shift;  // up to where keys decay; the shift as the gates need it
#pragma unroll
  for (int c = 0; c < OWN; ++c) until.x[c] = strong ? G_16.x[c] : 0, y_shift.x[c] = -LOG2_E * shift.x[c];
#pragma unroll
  for (int c = 0; c < OWN; c += 2) slot.decay(OWN * lane() + c) = make_float2(exp2_(G_16.x[c]), exp2_(G_16.x[c + 1]));
  warp_sync();  // all have read g
  const float share = 1 / top;
  constexpr int AT_ONCE = 4;  // tokens read before any is written, not to wait for each in turn
#pragma unroll
  for (int first = 0; first < BLOCK; first += AT_ONCE) {
    Floats q[AT_ONCE], k[AT_ONCE], e[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      q[i] = own_columns<Input>(slot.q(), first + i);
      k[i] = own_columns<Input>(slot.k(), first + i);
      e[i] = own_columns<Input>(slot.e(), first + i);
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int t = first + i;
      Floats bk_in, keys;
#pragma unroll
      for (int c = 0; c < OWN; ++c) {
        const float in = exp2_(G[t].x[c]), gate = reciprocal(share + share * exp2_(y_shift.x[c] - LOG2_E * e[i].x[c]));
        const float bk = gate * k[i].x[c];
        q[i].x[c] *= in * scale;
        bk_in.x[c] = bk * in;
        keys.x[c] = k[i].x[c] * exp2_(until.x[c] - G[t].x[c]);
        e[i].x[c] = (strong ? bk : bk_in.x[c]) * (1 - share * gate);
      }
      set_own_columns(slot.q(), t, q[i]);
      set_own_columns(slot.bk_in(), t, bk_in);
      set_own_columns(slot.keys(), t, keys);
      if constexpr (SEES) set_own_columns(slot.e(), t, e[i]);
    }
  }
  if (lane() < BLOCK) slot.a()[lane()] = has_w ? sigmoid(slot.a()[lane()] + write_shift) : 1;
  warp_sync();
  if (!strong) multiply_block(slot);
  warp_sync();
  solve_block(slot);
}

// ---------------------------------------------------------------------------------------------------------------------
// The state: a worker's 16 rows of S^T [V, K], and HELD slabs of columns
// ---------------------------------------------------------------------------------------------------------------------

struct Held { Sums x[HELD]; };

// memory is this worker's part of [K, SPLIT V], fp32; zeros if null
DEVICE Held load_held(const float* memory) {
  Held S;
#pragma unroll
  for (int m = 0; m < HELD; ++m)
    for_each(S.x[m], [&](float& x, int row, int column) { x = memory ? memory[(16 * m + column) * (SPLIT * V) + row] : 0; });
  return S;
}
DEVICE void store_held(float* memory, Held& S) {
#pragma unroll
  for (int m = 0; m < HELD; ++m)
    for_each(S.x[m], [&](float& x, int row, int column) { memory[(16 * m + column) * (SPLIT * V) + row] = x; });
}

DEVICE void decay_held(Held& S, Slot slot, int first_slab) {
#pragma unroll
  for (int m = 0; m < HELD; ++m) scale_columns(S.x[m], slot.decay_of_lane(first_slab + m));
}

// A strong block's d(b k), less a sign and with its gates: from what d(b k exp G) is without P of the block itself, pair by
// pair, decay summed up from token i backwards.  g: of the block's first token in device memory, rows `stride` apart.
DEVICE void add_pair_by_pair(
    Sums& x, Slot slot, const float* g, int stride, int count, int s, int first_column) {
#pragma unroll 1
  for (int part = 0; part < 4; ++part) {  // two neighbours of this lane's eight numbers; as one copy of the code
    const int t = part >> 1, i = part & 1;
    const int row = quad_row() + 8 * i, column = first_column + 8 * t + quad_column();
    float2 sum = make_float2(0, 0), pairs = make_float2(0, 0);
    for (int j = min(row, count - 1); j >= 0; --j) {
      const float2 more = *(const float2*)(g + (i64)j * stride + column);
      sum = make_float2(sum.x + at_least(LOG2_E * more.x, GONE), sum.y + at_least(LOG2_E * more.y, GONE));
      if (j == 0) break;
      const float2 k = unpack<Input>(slot.k().pair(j - 1, column));
      const float P = unpack<Bf16>(*(unsigned short*)slot.P().at(row, 16 * s + j - 1)).x;
      pairs.x += P * k.x * exp2_(sum.x), pairs.y += P * k.y * exp2_(sum.y);
    }
    const float2 decay = make_float2(exp2_(sum.x), exp2_(sum.y));
    for_each(x, [&](float& y, int y_row, int y_column) {
      if (y_row == row && y_column == column - first_column) y = y * decay.x + pairs.x;
      if (y_row == row && y_column == column - first_column + 1) y = y * decay.y + pairs.y;
    });
  }
}

DEVICE float dot(float4 x, float4 y) { return (x.x * y.x + x.y * y.y) + (x.z * y.z + x.w * y.w); }

// ---------------------------------------------------------------------------------------------------------------------

// Inputs as in the forward, and what it saved; gradients of o and of the state behind the last token (null for zero).
// Written in full: d_states and d_edits, laid out like states and edits; passed, [chunk, head, SPLIT V + K + 4]: what the
// content adds to the gradient of the chunk's outputs (SPLIT V), to its erase logits (K) and its write logits (1), for
// "mean"; d_contents, [chunk, head, SPLIT, RANK + K + 4]: addends of the gradients of the content (RANK) and of the gates'
// shifts (K and 1), for "mean", of which the projections' gradients are sums; d_z, [block, head, lane]: the gradient of the
// content z, and those of the projections, [N, HV, ...], for "read"; gradients of the state before the first token,
// [N, HV, ...].
KERNEL void CLUSTER __launch_bounds__(THREADS, 1) carve_reverse(
    const void* q, const void* k, const void* v, const float* g, const void* e, const float* w, const float* p_down,
    const float* p_up, const float* p_write, const i64* bounds, const i64* positions, const u32* states,
    const u32* edits, const float* contents, const void* d_o, const float* d_memory_end, const float* d_content_end,
    const float* d_content_sum_end, u32* d_states, u32* d_edits, float* passed, u32* d_z_all, float* d_contents,
    float* d_p_down, float* d_p_up, float* d_p_write, float* d_memory, float* d_content, float* d_content_sum,
    float scale, float top, int H, int HV, int H_g, int H_e, int R, int T, int C) {
  byte* shared = shared_memory();
  const int warp_index = uniform(warp()), thread = thread_index();
  const int parts = HV * SPLIT, n = block_index() / parts, part = block_index() % parts;  // of all heads' values
  const int head = part / SPLIT, rank = part % SPLIT;
  const i64 own = (i64)n * HV + head, own_part = own * SPLIT + rank, own_memory = own * (K * SPLIT * V) + rank * V;
  const Sequence sequence(bounds, positions, n, T, C);
  const Matrix<K> up = {shared + O_UP};             // P_up [RANK, K] ("read")
  float* wide_up = (float*)(shared + O_UP);         // the same in fp32 ("mean")
  float* write = (float*)(shared + O_WRITE);        // p_write [RANK]
  const float part_of_R = 1.0f / R, part_of_C = 1.0f / C;
  Ring ring = {shared, 0, 0};
  Signal* heard = ring.free() + 8;                  // what programs have of the content's gradient has met

  if (thread == 0) {
    for (int i = 0; i < RING; ++i) {
      set_up(ring.full() + i, 1);
      set_up(ring.free() + i, WORKERS);
    }
    set_up(heard, MEAN ? SPLIT * WORKERS : BLOCKS);
  }
  if constexpr (SEES) {
    load_gate_projections<THREADS>(up.base, write, p_up, p_write, head, R);
  }
  if constexpr (SPLIT > 1) sync_cluster();
  else sync();

  // the projections' gradients in addends, when all else is done: of P_up, p_write and P_down ("read")
  float* last = (float*)(shared + O_RING);
  constexpr int LAST_DOWN = RANK * K + BLOCKS * RANK;

  if (warp_index >= WORKERS) {
    // -- preparing warps: each takes every PREPARERS-th block --
    const int key_head = head / (HV / H), g_head = head / (HV / H_g), e_head = head / (HV / H_e);
    const auto fetch = [&](const Cursor& at) {
      const int first = sequence.first(at.chunk) + BLOCK * at.block, count = min(BLOCK, sequence.last(at.chunk) - first);
      const i64 token = sequence.begin + first;
      fetch_block<K, 4>(g, token, count, H_g, g_head);
      fetch_block<K, 2>(k, token, count, H, key_head);
      fetch_block<K, 2>(q, token, count, H, key_head);
      fetch_block<K, 2>(e, token, count, H_e, e_head);
      fetch_block<V, 2>(d_o, token, count, parts, part);
    };
    const auto copy = [&](const Cursor& at) {
      const Slot slot = at.ring.at();
      const int first = sequence.first(at.chunk) + BLOCK * at.block, t = lane_anew();
      const int count = min(BLOCK, sequence.last(at.chunk) - first);
      const i64 token = sequence.begin + first, slot_of_chunk = (sequence.slot + at.chunk) * HV + head;
      copy_block<K, true>(slot.base + O_G, g, token, count, H_g, g_head);
      copy_block<K>(slot.base + O_K, k, token, count, H, key_head);
      copy_block<K>(slot.base + O_Q, q, token, count, H, key_head);
      copy_block<K>(slot.base + O_E, e, token, count, H_e, e_head);
      copy_block<V>(slot.base + O_D, d_o, token, count, parts, part);
      if constexpr (SEES) {
        const i64 block_slot = sequence.slot_of(at.chunk, BLOCK * at.block, BLOCK);
        const byte* v_new = (const byte*)edits + (block_slot * parts + part) * (ROWS * 512);
        // what is read when a tile's dr are all there: v_new, and a quarter of the state before the tile
        const i64 state_slot = sequence.slot_of(at.chunk, BLOCK * at.block, SAVE);
        const byte* state = (const byte*)states + (state_slot * parts + part) * (2 * K * V) + at.block % BLOCKS * (2 * K * V / BLOCKS);
        if (t < ROWS * 512 / 128) fetch_into_cache(v_new + 128 * t);
        for (int i = t; i < 2 * K * V / BLOCKS / 128; i += 32) fetch_into_cache(state + 128 * i);
      }
      if constexpr (MEAN)
        if (t < RANK / 4) copy_16_bytes(slot.raw() + 4 * t, contents + slot_of_chunk * RANK + 4 * t, true);
      if (t < BLOCK) copy_4_bytes(slot.a() + t, w + (token + t) * HV + head, w && t < count);
      close_copies();
    };
    Cursor at = {sequence.chunks, 0, ring};  // block to prepare
    at.skip(sequence, warp_index - WORKERS + 1);
    at.ring = ring.after(warp_index - WORKERS);
    Cursor next = at;  // block to copy
    int copied = 0;    // blocks, not prepared yet
    while (at.chunk >= 0) {
      // copies begin as soon as there is room, but preparation does not wait for that
      Signal* room = next.ring.free();
      const int phase = next.ring.phase ^ 1;
      if (next.chunk >= 0 && (copied == 0 || (copied == 1 && all_lanes(has_ended(room, phase))))) {
        wait(room, phase);
        copy(next);
        next.skip(sequence, PREPARERS);
        if (next.chunk >= 0) fetch(next);
        ++copied;
        continue;
      }
      const Slot slot = at.ring.at();
      Right Z[COLUMNS];  // (S_c P_down)^T [RANK, K] ("read")
      if constexpr (READ) {
        const Matrix<K> from = {(byte*)contents + ((sequence.slot + at.chunk) * HV + head) * (RANK * K * 2)};
#pragma unroll
        for (int m = 0; m < COLUMNS; ++m)
#pragma unroll
          for (int i = 0; i < 4; ++i) Z[m].x[i] = from.pair(quad_row() + 8 * (i >> 1), 16 * m + 8 * (i & 1) + quad_column());
      }
      if (copied == 2) wait_for_copies_but_last();
      else wait_for_copies();
      warp_sync();
      Floats shift = {};
      float write_shift = 0;
      Operand z;
      if constexpr (READ) z = shift_block(slot, Z, up, write, part_of_R);
      if constexpr (MEAN) {
        float squares = 0;
#pragma unroll
        for (int r = 0; r < RANK; ++r) {
          const float raw = slot.raw()[r];
          squares += raw * raw;
          write_shift += raw * write[r];
          const Floats row = *(const Floats*)(wide_up + r * K + OWN * lane());
#pragma unroll
          for (int c = 0; c < OWN; ++c) shift.x[c] += raw * row.x[c];
        }
        const float root = RMS ? reciprocal_root(squares * part_of_R + 1e-8f) : 1;
        write_shift *= root;
#pragma unroll
        for (int c = 0; c < OWN; ++c) shift.x[c] *= root;
        if (at.block == 0 && rank == 0) {
          float* to = passed + ((sequence.slot + at.chunk) * HV + head) * (SPLIT * V + K + 4) + SPLIT * V;
          *(Floats*)(to + OWN * lane()) = shift;
          if (lane() == 0) to[K] = write_shift;
        }
      }
      prepare_block(slot, shift, write_shift, scale, top, w);
      if constexpr (READ) slot.z().store(0, 0, z);
      warp_sync();
      if (lane() == 0) arrive(at.ring.full());
      at.skip(sequence, PREPARERS);
      --copied;
    }
  } else {
    // -- workers: gradients behind the last token --
    const int strip = warp_index % ROWS, half = warp_index / ROWS, first_slab = half * HELD;  // of dS^T
    const int row_of_lane = 16 * strip + quad_row();  // of V, and 8 rows on
    const i64 own_held = own_memory + first_slab * (16 * SPLIT * V) + 16 * strip;
    const bool into_write = SEES && w && p_write;
    Held dS = load_held(d_memory_end ? d_memory_end + own_held : nullptr);
    Operand down = {};                               // P_down, [16 of V, RANK] ("read")
    Sums dZ[SLABS], d_up[SLABS], d_down = zeros();   // [16 of K, RANK], [RANK, 16 of K], [16 of V, RANK] ("read")
    float d_sum[2] = {};                             // gradient of the running sum of outputs, two rows of V ("mean")
    float d_write[2][2] = {}, d_erase_shift[SLABS][2][2] = {}, d_write_shift = 0;
#pragma unroll
    for (int i = 0; i < SLABS; ++i) {
      dZ[i] = d_up[i] = zeros();
      if constexpr (READ)
        if (d_content_end && warp_index + i * WORKERS < COLUMNS)
          for_each(dZ[i], [&](float& x, int row, int r) {
            if (r < R) x = d_content_end[(own * K + 16 * (warp_index + i * WORKERS) + row) * R + r];
          });
    }
    if constexpr (READ)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = 8 * (i >> 1) + quad_column();
        const float* p = p_down + (part * V + row_of_lane + 8 * (i & 1)) * R + r;
        down.x[i] = pack<Bf16>(r < R ? p[0] : 0, r + 1 < R ? p[1] : 0);
      }
    if (MEAN && d_content_sum_end)
#pragma unroll
      for (int i = 0; i < 2; ++i) d_sum[i] = d_content_sum_end[own_part * V + row_of_lane + 8 * i];
    const auto four = [&](const float* p) {  // this lane's of R numbers
      const int r = 4 * (lane() & 3);
      return make_float4(r < R ? p[r] : 0, r + 1 < R ? p[r + 1] : 0, r + 2 < R ? p[r + 2] : 0, r + 3 < R ? p[r + 3] : 0);
    };
    float* da = (float*)(shared + O_DA);             // addends of the write gate's gradient, [ROWS, TILE] ("read")
    int meeting = 0, turn = 0;

    for (int chunk = sequence.chunks - 1; chunk >= 0; --chunk) {
      const int first_of_chunk = sequence.first(chunk), last_of_chunk = sequence.last(chunk);
      const i64 slot_of_chunk = (sequence.slot + chunk) * HV + head;
      if (MEAN && half == 0 && (lane() & 3) == 0) {
        float* to = passed + slot_of_chunk * (SPLIT * V + K + 4) + rank * V + row_of_lane;
        to[0] = d_sum[0], to[8] = d_sum[1];
      }

      for (int first = first_of_chunk + (last_of_chunk - first_of_chunk - 1) / TILE * TILE; first >= first_of_chunk;
           first -= TILE) {
        const int count = min(TILE, last_of_chunk - first), blocks = (count + BLOCK - 1) / BLOCK;
        const i64 token = sequence.begin + first;
        const i64 state_slot = sequence.slot_of(chunk, first - first_of_chunk, SAVE) * parts + part;
        const i64 block_slot = sequence.slot_of(chunk, first - first_of_chunk, BLOCK);
        const auto slot_of = [&](int s) { return ring.after(blocks - 1 - s).at(); };

        // v_new_j^T and S^T as saved, to be transposed; asked for early where there are registers
        const int column_of_P = warp_index % BLOCKS;  // j: a warp has P_sj of one
        uint4 v_new[ROWS], S[SLABS][ROWS];
        const auto ask_for_v_new = [&] {
          const i64 at = (block_slot + min(column_of_P, blocks - 1)) * parts + part;
#pragma unroll
          for (int m = 0; m < ROWS; ++m) v_new[m] = ((const uint4*)edits)[(at * ROWS + m) * 32 + lane()];
        };
        const auto ask_for_S = [&] {
#pragma unroll
          for (int slab = 0; slab < SLABS; ++slab)
#pragma unroll
            for (int m = 0; m < ROWS; ++m) {
              const int column = min(warp_index + slab * WORKERS, COLUMNS - 1);
              S[slab][m] = ((const uint4*)states)[((state_slot * ROWS + m) * COLUMNS + column) * 32 + lane()];
            }
        };
        if constexpr (SEES && SPLIT > 1) ask_for_v_new(), ask_for_S();

        // -- the gradient of the state runs through the blocks --
#pragma unroll 1
        for (int s = blocks - 1; s >= 0; --s) {
          const Ring here = ring.after(blocks - 1 - s);
          const Slot slot = here.at();
          u32 v_pairs[4];
          if (into_write && half == SPLIT - 1)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int row = min(16 * s + quad_row() + 8 * (i & 1), count - 1);
              const int column = 16 * strip + 8 * (i >> 1) + quad_column();
              v_pairs[i] = ((const u32*)v)[(((token + row) * parts + part) * V + column) / 2];
            }
          wait(here.full(), here.phase);
          if (s == blocks - 1) {
            uint4* to = (uint4*)d_states + ((state_slot * ROWS + strip) * COLUMNS + first_slab) * 32 + lane();
#pragma unroll
            for (int m = 0; m < HELD; ++m) to[32 * m] = as_uint4(round_to_bf16(dS.x[m]));
          }
          Operand d_rows = slot.d().load_transposed(0, 16 * strip);
          if constexpr (MEAN || HALF)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float2 x = unpack<Input>(d_rows.x[i]);
              d_rows.x[i] = pack<Bf16>(x.x + d_sum[i & 1], x.y + d_sum[i & 1]);
            }
          const bool strong = slot.strong();
          if (!strong) decay_held(dS, slot, first_slab);  // its keys are decayed to the block's beginning
          Sums y[4] = {zeros(), zeros(), zeros(), zeros()};
          if (half == 0) multiply(y[3], d_rows, load_right_transposed(slot.M(), 0, 0));
#pragma unroll
          for (int m = 0; m < HELD; ++m)
            multiply(y[m & 3], round_to_bf16(dS.x[m]), load_right(slot.keys(), 0, 16 * (first_slab ^ m)));
          if (strong) decay_held(dS, slot, first_slab);
#pragma unroll
          for (int t = 0; t < 2; ++t)
#pragma unroll
            for (int i = 0; i < 4; ++i) y[0].x[t][i] = (y[0].x[t][i] + y[1].x[t][i]) + (y[2].x[t][i] + y[3].x[t][i]);
          if constexpr (SPLIT > 1) {  // the addend of the warp that has the other columns
            float4* shares = (float4*)(shared + O_SHARES) + turn * (WORKERS * 64) + lane();
            turn ^= 1;
#pragma unroll
            for (int t = 0; t < 2; ++t)
              shares[warp_index * 64 + 32 * t] = make_float4(y[0].x[t][0], y[0].x[t][1], y[0].x[t][2], y[0].x[t][3]);
            barrier(2 + strip, 64);
#pragma unroll
            for (int t = 0; t < 2; ++t) {
              const float4 x = shares[(warp_index ^ ROWS) * 64 + 32 * t];
              y[0].x[t][0] += x.x, y[0].x[t][1] += x.y, y[0].x[t][2] += x.z, y[0].x[t][3] += x.w;
            }
          }
          Sums dr_sums = zeros();
          multiply(dr_sums, round_to_bf16(y[0]), load_right_transposed(slot.T(), 0, 0));
          const Operand dr_rows = round_to_bf16(dr_sums), minus = negate(dr_rows);
#pragma unroll
          for (int m = 0; m < HELD; ++m) {
            multiply(dS.x[m], d_rows, load_right_transposed(slot.q(), 0, 16 * (first_slab ^ m)));
            multiply(dS.x[m], minus, load_right_transposed(slot.bk_in(), 0, 16 * (first_slab ^ m)));
          }
          if (half == 0)
            ((uint4*)d_edits)[(((block_slot + s) * parts + part) * ROWS + strip) * 32 + lane()] = as_uint4(dr_rows);
          if constexpr (!SEES) {
            warp_sync();
            if (lane() == 0) arrive(here.free());
            continue;
          }
          const Operand dr_t = transpose(dr_rows);
          if (half == 0) slot.d().store(0, 16 * strip, dr_t);
          if (into_write && half == SPLIT - 1) {
            float sums[2] = {0, 0};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float2 x = unpack<Input>(v_pairs[i]), dr = unpack<Bf16>(dr_t.x[i]);
              sums[i & 1] += x.x * dr.x + x.y * dr.y;
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const int row = quad_row() + 8 * i;
              const float a = slot.a()[row], x = quad_sum(sums[i]) * a * (1 - a);
              if constexpr (MEAN) d_write_shift += x;  // the same in the four lanes of a row
              if (READ && (lane() & 3) == 0) da[strip * TILE + 16 * s + row] = x;
            }
          }
        }

        // -- what the content sends back --
        if constexpr (SEES) {
          if constexpr (SPLIT == 1) ask_for_v_new();
          Slot slots[BLOCKS];
#pragma unroll
          for (int s = 0; s < BLOCKS; ++s) slots[s] = slot_of(min(s, blocks - 1));
          sync_workers();
          for (int s = column_of_P + warp_index / BLOCKS; s < blocks; s += WORKERS / BLOCKS) {
            Sums sums[2] = {zeros(), zeros()};
#pragma unroll
            for (int m = 0; m < ROWS; ++m)
              multiply(sums[m & 1], slot_of(s).d().load(0, 16 * m), right_transposed(v_new[m]));
            for_each(sums[0], [&](float& x, int i, int j) {
              x = s > column_of_P || i > j ? x + sums[1].x[j >> 3][2 * (i >> 3) + (j & 1)] : 0;
            });
            slot_of(s).P().store(0, 16 * column_of_P, round_to_bf16(sums[0]));
          }
          if constexpr (SPLIT == 1) ask_for_S();
          Right S_right[SLABS][ROWS];
#pragma unroll
          for (int slab = 0; slab < SLABS; ++slab)
#pragma unroll
            for (int m = 0; m < ROWS; ++m) S_right[slab][m] = right_transposed(S[slab][m]);
          sync_workers();

#pragma unroll
          for (int slab = 0; slab < SLABS; ++slab) {
            const int first_column = 16 * (warp_index + slab * WORKERS);
            if (first_column >= K) continue;
            // less a sign; of all BLOCKS, so that none waits for a branch: those that are not there repeat the last
            Sums dk_in[BLOCKS];
            bool strong[BLOCKS], any_strong = false;
#pragma unroll
            for (int s = 0; s < BLOCKS; ++s) {
              dk_in[s] = zeros();
              strong[s] = slots[s].strong();
              any_strong |= strong[s];
            }
#pragma unroll
            for (int m = 0; m < ROWS; ++m)
#pragma unroll
              for (int s = 0; s < BLOCKS; ++s) multiply(dk_in[s], slots[s].d().load(0, 16 * m), S_right[slab][m]);
#pragma unroll
            for (int j = 0; j < BLOCKS; ++j) {
              const Right keys = load_right_transposed(slots[j].keys(), 0, first_column);
              const float4 decay = slots[j].decay_of_lane(first_column / 16), one = make_float4(1, 1, 1, 1);
              Operand P = slots[j].P().load(0, 16 * j);
#pragma unroll
              for (int i = 0; i < 4; ++i) P.x[i] = strong[j] ? 0 : P.x[i];
              multiply(dk_in[j], P, keys);
#pragma unroll
              for (int s = j + 1; s < BLOCKS; ++s) {  // a strong block's keys are decayed to its end already
                scale_columns(dk_in[s], strong[j] ? decay : one);
                multiply(dk_in[s], slots[s].P().load(0, 16 * j), keys);
                scale_columns(dk_in[s], strong[j] ? one : decay);
              }
            }
            if (any_strong) {
              const float* g_rows = g + (token * H_g + head / (HV / H_g)) * K;
#pragma unroll
              for (int j = 0; j < BLOCKS; ++j)
                if (strong[j] && j < blocks)
                  add_pair_by_pair(dk_in[j], slots[j], g_rows + (i64)16 * j * H_g * K, H_g * K, count - 16 * j, j, first_column);
            }
#pragma unroll
            for (int j = 0; j < BLOCKS; ++j)
#pragma unroll
              for (int t = 0; t < 2; ++t)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                  u32& pair = slots[j].e().pair(quad_row() + 8 * i, first_column + 8 * t + quad_column());
                  const float2 weight = unpack<Bf16>(pair);
                  float2 x = make_float2(-dk_in[j].x[t][2 * i] * weight.x, -dk_in[j].x[t][2 * i + 1] * weight.y);
                  if (j >= blocks) x = make_float2(0, 0);
                  d_erase_shift[slab][t][0] += x.x, d_erase_shift[slab][t][1] += x.y;
                  if (READ && j < blocks) pair = pack<Bf16>(x.x, x.y);
                }
          }
        }

        // -- "read": from the gates' logits to what they read in the memory, a block a warp, and to the projections --
        if constexpr (READ) {
          sync_workers();
          if (warp_index < BLOCKS) {
            const int s = warp_index;
            const Slot slot = slot_of(s < blocks ? s : 0);
            Sums dz = zeros(), odd = zeros();
            float d_logit[2] = {0, 0};
            if (s < blocks) {
#pragma unroll
              for (int m = 0; m < COLUMNS; m += 2) {
                multiply(dz, slot.e().load(0, 16 * m), load_right(up, 0, 16 * m));
                multiply(odd, slot.e().load(0, 16 * m + 16), load_right(up, 0, 16 * m + 16));
              }
              if (into_write)
#pragma unroll
                for (int i = 0; i < 2; ++i)
#pragma unroll
                  for (int m = 0; m < ROWS; ++m) d_logit[i] += da[m * TILE + 16 * s + quad_row() + 8 * i];
              for_each(dz, [&](float& x, int row, int r) {
                x += odd.x[r >> 3][2 * (row >> 3) + (r & 1)] + d_logit[row >> 3] * write[r];
              });
            }
            if constexpr (SPLIT > 1) {  // the other program's addend
              float4* met = (float4*)(shared + O_MET) + (meeting % 2 * BLOCKS + s) * 64 + lane();
#pragma unroll
              for (int t = 0; t < 2; ++t)
                store_into_program(met + 32 * t, rank ^ 1, make_float4(dz.x[t][0], dz.x[t][1], dz.x[t][2], dz.x[t][3]));
              warp_sync();
              if (lane() == 0) arrive_at_program(heard, rank ^ 1);
              wait_for_cluster(heard, meeting % 2);
#pragma unroll
              for (int t = 0; t < 2; ++t) {
                const float4 x = met[32 * t];
                dz.x[t][0] += x.x, dz.x[t][1] += x.y, dz.x[t][2] += x.z, dz.x[t][3] += x.w;
              }
            }
            if (s < blocks) {
              const Sums z = widen(slot.z().load(0, 0));
#pragma unroll
              for (int i = 0; i < 2; ++i) {
                const float root = slot.raw()[quad_row() + 8 * i];
                float along = 0;
#pragma unroll
                for (int t = 0; t < 2; ++t)
#pragma unroll
                  for (int j = 0; j < 2; ++j) {
                    d_write[t][j] += z.x[t][2 * i + j] * d_logit[i];
                    along += z.x[t][2 * i + j] * dz.x[t][2 * i + j];
                  }
                along = RMS ? quad_sum(along) * part_of_R : 0;
#pragma unroll
                for (int t = 0; t < 2; ++t)
#pragma unroll
                  for (int j = 2 * i; j < 2 * i + 2; ++j) dz.x[t][j] = root * (dz.x[t][j] - z.x[t][j] * along);
              }
              const Operand dz_rows = round_to_bf16(dz);
              slot.dz().store(0, 0, dz_rows);
              if (rank == 0) ((uint4*)d_z_all)[((block_slot + s) * HV + head) * 32 + lane()] = as_uint4(dz_rows);
            }
          }
          ++meeting;
          sync_workers();
#pragma unroll
          for (int slab = 0; slab < SLABS; ++slab) {
            const int first_column = 16 * (warp_index + slab * WORKERS);
            if (first_column >= K) continue;
#pragma unroll 1
            for (int s = 0; s < blocks; ++s) {
              const Slot slot = slot_of(s);
              multiply(dZ[slab], to_bf16<Input>(slot.k().load_transposed(0, first_column)), load_right_transposed(slot.dz(), 0, 0));
              multiply(d_up[slab], slot.z().load_transposed(0, 0), load_right_transposed(slot.e(), 0, first_column));
            }
          }

          // a chunk's content came from the memory at its beginning
          if (first == first_of_chunk && chunk > 0) {
            const Matrix<16> dZ_shared = slot_of(0).dZ();
#pragma unroll
            for (int slab = 0; slab < SLABS; ++slab)
              if (warp_index + slab * WORKERS < COLUMNS) {
                dZ_shared.store(16 * (warp_index + slab * WORKERS), 0, round_to_bf16(dZ[slab]));
                dZ[slab] = zeros();
              }
            sync_workers();
            const uint4* from = (const uint4*)states + ((state_slot * ROWS + strip) * COLUMNS + first_slab) * 32 + lane();
#pragma unroll
            for (int m = 0; m < HELD; ++m) {
              multiply(dS.x[m], down, load_right(dZ_shared, 16 * (first_slab + m), 0));
              multiply(d_down, as_operand(from[32 * m]), load_right_transposed(dZ_shared, 16 * (first_slab + m), 0));
            }
          }
        }

        // -- "mean": from the gates' logits to the content, and to the outputs of the chunk before --
        if constexpr (MEAN)
          if (first == first_of_chunk) {
            float* to_sums = d_contents + (slot_of_chunk * SPLIT + rank) * (RANK + K + 4);
            float dz[2] = {0, 0};  // numbers 2 quad_row() and the next of d_shift P_up^T, over this warp's columns
#pragma unroll
            for (int slab = 0; slab < SLABS; ++slab) {
              const int column = 16 * (warp_index + slab * WORKERS) + quad_column();
              if (column >= K) continue;
#pragma unroll
              for (int t = 0; t < 2; ++t) {
                float2 x = make_float2(column_sum(d_erase_shift[slab][t][0]), column_sum(d_erase_shift[slab][t][1]));
                d_erase_shift[slab][t][0] = d_erase_shift[slab][t][1] = 0;
                if (quad_row() == 0) *(float2*)(to_sums + RANK + column + 8 * t) = x;
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                  const float2 y = *(const float2*)(wide_up + (2 * quad_row() + i) * K + column + 8 * t);
                  dz[i] += x.x * y.x + x.y * y.y;
                }
              }
            }
            float d_write_sum = 0;
            if (into_write) d_write_sum = column_sum(d_write_shift);
            d_write_shift = 0;
            float4 addend;
            addend.x = quad_sum(dz[0]) + d_write_sum * write[2 * quad_row()];
            addend.y = quad_sum(dz[1]) + d_write_sum * write[2 * quad_row() + 1];
            addend.z = shuffle_xor(addend.x, 4), addend.w = shuffle_xor(addend.y, 4);
            if (lane() == 1) addend = make_float4(d_write_sum, 0, 0, 0);
            float* met = (float*)(shared + O_MET) + meeting % 2 * (SPLIT * WORKERS * NUMBERS);
            float4* to = (float4*)(met + (rank * WORKERS + warp_index) * NUMBERS) + (lane() == 1 ? 4 : lane() >> 3);
            const bool sends = lane() % 8 == 0 || lane() == 1;
            float4 d_raw = make_float4(0, 0, 0, 0), wide_down[2] = {d_raw, d_raw};  // asked for before the wait
            if (d_content_end && chunk == sequence.chunks - 1) d_raw = four(d_content_end + own * R);
#pragma unroll
            for (int i = 0; i < 2; ++i) wide_down[i] = four(p_down + (part * V + row_of_lane + 8 * i) * R);
            if constexpr (SPLIT > 1) {
              if (sends)
                for (int i = 0; i < SPLIT; ++i) store_into_program(to, i, addend);
              warp_sync();
              if (lane() < SPLIT) arrive_at_program(heard, lane());
              wait_for_cluster(heard, meeting % 2);
            } else {
              if (sends) *to = addend;
              warp_sync();
              if (lane() == 0) arrive(heard);
              wait(heard, meeting % 2);
            }
            ++meeting;
            float4 d_z = make_float4(0, 0, 0, 0);
            const int r = 4 * (lane() & 3);
#pragma unroll
            for (int i = 0; i < SPLIT * WORKERS; ++i) {
              const float4 x = *(const float4*)(met + i * NUMBERS + r);
              d_z.x += x.x, d_z.y += x.y, d_z.z += x.z, d_z.w += x.w;
            }
            const float4 raw = *(const float4*)(slot_of(0).raw() + r);
            float root = 1, along = 0;
            if constexpr (RMS) {
              root = reciprocal_root(quad_sum(dot(raw, raw)) * part_of_R + 1e-8f);
              along = root * root * quad_sum(dot(raw, d_z)) * part_of_R;
            }
            d_raw.x += root * (d_z.x - raw.x * along), d_raw.y += root * (d_z.y - raw.y * along);
            d_raw.z += root * (d_z.z - raw.z * along), d_raw.w += root * (d_z.w - raw.w * along);
            if (chunk > 0)
#pragma unroll
              for (int i = 0; i < 2; ++i) d_sum[i] = quad_sum(dot(wide_down[i], d_raw)) * part_of_C;
            if (rank == 0 && warp_index == 0 && lane() < 4) {
              float* to_begin = d_content + own * R + r;
              if (chunk > 0) *(float4*)(to_sums + r) = d_raw;
              else if (d_content) {
                if (r < R) to_begin[0] = d_raw.x;
                if (r + 1 < R) to_begin[1] = d_raw.y;
                if (r + 2 < R) to_begin[2] = d_raw.z;
                if (r + 3 < R) to_begin[3] = d_raw.w;
              }
              if (lane() == 0) {
                float x = 0;
#pragma unroll
                for (int i = 0; i < SPLIT * WORKERS; ++i) x += met[i * NUMBERS + RANK];
                to_sums[RANK + K] = x;
              }
            }
          }

        if constexpr (SEES) {
          warp_sync();
          if (lane() == 0)
            for (int s = 0; s < blocks; ++s) arrive(ring.after(s).free());
        }
        ring.step(blocks);
      }
    }

    // -- gradients of the projections and of the state before the first token --
    if (d_memory) store_held(d_memory + own_held, dS);
    if constexpr (MEAN) {
      if (d_content && rank == 0 && thread < R && sequence.chunks == 0)
        d_content[own * R + thread] = d_content_end ? d_content_end[own * R + thread] : 0;
      if (d_content_sum && half == 0 && (lane() & 3) == 0)
#pragma unroll
        for (int i = 0; i < 2; ++i) d_content_sum[own_part * V + row_of_lane + 8 * i] = d_sum[i];
    }
    if constexpr (READ) {
      sync_workers();  // none needs its slots
      for_each(d_down, [&](float& x, int row, int r) { last[LAST_DOWN + ((half * V) + 16 * strip + row) * RANK + r] = x; });
#pragma unroll
      for (int slab = 0; slab < SLABS; ++slab) {
        const int first_column = 16 * (warp_index + slab * WORKERS);
        if (first_column >= K) continue;
        for_each(dZ[slab], [&](float& x, int row, int r) {
          if (d_content && rank == 0 && r < R) d_content[(own * K + first_column + row) * R + r] = x;
        });
        for_each(d_up[slab], [&](float& x, int r, int column) { last[r * K + first_column + column] = x; });
      }
      if (warp_index < BLOCKS)
#pragma unroll
        for (int t = 0; t < 2; ++t)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const float x = column_sum(d_write[t][j]);
            if (quad_row() == 0) last[RANK * K + warp_index * RANK + 8 * t + quad_column() + j] = x;
          }
    }
  }

  if constexpr (READ) {
    const auto of_head = [&](int i) { return SPLIT > 1 ? last[i] + load_from_program(last + i, 1) : last[i]; };
    if constexpr (SPLIT > 1) sync_cluster();
    else sync();
    for (int i = thread; i < V * R; i += THREADS) {
      float x = 0;
      for (int half = 0; half < SPLIT; ++half) x += last[LAST_DOWN + (half * V + i / R) * RANK + i % R];
      d_p_down[own_part * V * R + i] = x;
    }
    if (rank == 0) {
      for (int i = thread; i < R * K; i += THREADS) d_p_up[own * R * K + i] = of_head(i);
      if (thread < R) {
        float x = 0;
        for (int s = 0; s < BLOCKS; ++s) x += of_head(RANK * K + s * RANK + thread);
        d_p_write[own * R + thread] = x;
      }
    }
    if constexpr (SPLIT > 1) sync_cluster();  // none has ended while the other reads
  }
}
