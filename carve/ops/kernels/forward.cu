// The forward: one program per (sequence, value head), the whole recurrence in one pass.
//
// While a tile is worked on, the inputs of the next are copied into the other of two stages.

constexpr int STAGES = 2;
constexpr int O_Q = 0, O_K = O_Q + TILE * K * 2, O_E = O_K + TILE * K * 2, O_G = O_E + TILE * K * 2;
constexpr int O_V = O_G + TILE * K * 4, O_W = O_V + TILE * V * 2, STAGE = aligned(O_W + TILE * 4);
constexpr int O_M = STAGES * STAGE, O_T = O_M + TILE * 32, O_A = O_T + TILE * 32, O_DECAY = O_A + TILE * 64;
constexpr int O_WRITE = O_DECAY + BLOCKS * K * 4, O_STRONG = O_WRITE + TILE * 4, O_TOTAL = O_STRONG + 64;
constexpr int O_CONTENT = O_TOTAL + V * 4, O_DOWN = aligned(O_CONTENT + (4 * RANK + K + TILE) * 4);
constexpr int O_UP = O_DOWN + (READ ? RANK * V * 2 : MEAN ? RANK * V * 4 : 0);
constexpr int O_Z = O_UP + (READ ? RANK * K * 2 : MEAN ? RANK * K * 4 : 0);
constexpr int SHARED_BYTES = O_Z + (READ ? RANK * K * 2 : 0);

static_assert(SHARED_BYTES <= CARVE_SHARED, "carve/ops/kernels/cuda.py says how much shared memory a program gets");

// Inputs and outputs are contiguous, shapes as in carve/ops/api.py.  May be null: w, p_up, p_write, bounds, positions,
// the initial state (memory, content, content_sum) and everything behind o.
KERNEL void __launch_bounds__(THREADS, 1) carve_forward(
    const void* q, const void* k, const void* v, const float* g, const void* e, const float* w, const float* p_down,
    const float* p_up, const float* p_write, const i64* bounds, const i64* positions, const float* memory,
    const float* content, const float* content_sum, void* o, float* memory_end, float* content_end,
    float* content_sum_end, u32* states, float* contents, float* means, float scale, float top, int H, int HV, int H_g,
    int H_e, int R, int T, int C) {
  byte* shared = shared_memory();
  const int n = block_index() / HV, head = block_index() % HV, thread = thread_index();
  const int key_head = head / (HV / H), g_head = head / (HV / H_g), e_head = head / (HV / H_e);
  const i64 own = (i64)n * HV + head;
  const Sequence sequence(bounds, positions, n, T, C);

  float* small = (float*)(shared + O_CONTENT);
  Content seen = {{shared + O_DOWN}, {shared + O_UP}, {shared + O_Z}, (float*)(shared + O_DOWN), (float*)(shared + O_UP),
                  small, small + RANK, small + 2 * RANK, small + 4 * RANK, small + 4 * RANK + K, R};
  Prepared p;
  p.M.base = shared + O_M, p.T.base = shared + O_T, p.A = (float*)(shared + O_A), p.decay = (float*)(shared + O_DECAY);
  p.a = (float*)(shared + O_WRITE), p.strong = (int*)(shared + O_STRONG);
  p.scale = scale, p.top = top, p.has_w = w;
  float* total = (float*)(shared + O_TOTAL);  // sum of the chunk's outputs, [V]

  auto copy_tile = [&](int stage, int first, int count) {
    byte* at = shared + stage * STAGE;
    const i64 token = sequence.begin + first;
    copy_rows(WideMatrix<K>{at + O_G}, g, token, count, H_g, g_head);
    copy_rows(Matrix<K>{at + O_K}, k, token, count, H, key_head);
    copy_rows(Matrix<K>{at + O_Q}, q, token, count, H, key_head);
    copy_rows(Matrix<K>{at + O_E}, e, token, count, H_e, e_head);
    copy_rows(Matrix<V>{at + O_V}, v, token, count, HV, head);
    if (w && thread < TILE)
      copy_4_bytes(at + O_W + 4 * thread, w + (token + min(thread, count - 1)) * HV + head, thread < count);
  };

  // -- the state before the first token --
  if (sequence.chunks) copy_tile(0, 0, min(TILE, sequence.last(0)));
  State S = load_state(memory ? memory + own * K * V : nullptr);
  load_projections(seen, p_down, p_up, p_write, head);
  if constexpr (MEAN) {
    if (thread < RANK) seen.raw[thread] = content && thread < R ? content[own * R + thread] : 0;
    for (int i = thread; i < V; i += THREADS) total[i] = content_sum ? content_sum[own * V + i] : 0;
  }
  if constexpr (READ)
    for (int i = thread; i < RANK * K / 2; i += THREADS) {
      const int r = i / (K / 2), column = 2 * (i % (K / 2));
      const float* z = content + (own * K + column) * R + r;
      seen.Z.pair(r, column) = content && r < R ? pack<Bf16>(z[0], z[R]) : 0;
    }

  int stage = 0;
  for (int chunk = 0; chunk < sequence.chunks; ++chunk) {
    set_shifts(seen);
    if constexpr (READ) sync();
    if (contents) {
      if constexpr (MEAN)
        if (thread < RANK) contents[((sequence.slot + chunk) * HV + head) * RANK + thread] = seen.raw[thread];
      if constexpr (READ)
        for (int i = thread; i < RANK * K / 2; i += THREADS)
          ((u32*)contents)[((sequence.slot + chunk) * HV + head) * (RANK * K / 2) + i] = ((u32*)seen.Z.base)[i];
    }

    const int first_of_chunk = sequence.first(chunk), last_of_chunk = sequence.last(chunk);
    float sums[2] = {0, 0};  // of this chunk's outputs, two rows of V
    for (int first = first_of_chunk; first < last_of_chunk; first += TILE, stage ^= 1) {
      const int count = min(TILE, last_of_chunk - first);
      byte* at = shared + stage * STAGE;
      p.q.base = p.q_in.base = at + O_Q, p.k.base = at + O_K, p.e.base = p.bk_in.base = at + O_E;
      p.g.base = p.k_out.base = at + O_G, p.k_end.base = at + O_G + TILE * K * 2, p.w = (float*)(at + O_W);
      const Matrix<V> v_o = {at + O_V};  // values, then outputs

      // -- inputs of this tile are there; fetch those of the next --
      wait_for_copies();
      if (thread < BLOCKS) p.strong[thread] = 0;
      sync();
      const int next = first + count;
      if (next < sequence.length)
        copy_tile(stage ^ 1, next, min(TILE, sequence.last(chunk + (next == last_of_chunk)) - next));

      // -- gates, decays, and the triangular systems --
      if constexpr (READ) {
        shift_logits(seen, p.k, p.e);
        sync();
      }
      prepare<false>(p, seen);
      sync();
      solve(p);
      sync();

      // -- the state runs through the blocks, each warp on its own --
#pragma unroll 1
      for (int s = 0; s < BLOCKS; ++s) {
        const StateOperand S_in = round_to_bf16(S);
        if (states && s % (SAVE / BLOCK) == 0 && 16 * s < count) {
          uint4* to = saved_state(states, sequence.state_slot(chunk, first - first_of_chunk + 16 * s), HV, head);
#pragma unroll
          for (int m = 0; m < COLUMNS; ++m) to[32 * m] = make_uint4(S_in.x[m].x[0], S_in.x[m].x[1], S_in.x[m].x[2], S_in.x[m].x[3]);
        }
        const Operand v_new = advance(S, S_in, p, v_o, s);
        Sums out = times_state(S_in, p.q_in.block(s));
        multiply(out, v_new, p.M.block(s).load(0, 0));
#pragma unroll
        for (int t = 0; t < 2; ++t)
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[i >> 1] += out.x[t][i];
        // movmatrix moves 16-bit numbers of any format
        const Operand rows = transpose({{pack<Input>(out.x[0][0], out.x[0][1]), pack<Input>(out.x[0][2], out.x[0][3]),
                                         pack<Input>(out.x[1][0], out.x[1][1]), pack<Input>(out.x[1][2], out.x[1][3])}});
        v_o.block(s).store(0, 16 * warp(), rows);
      }
      sync();
      for (int i = thread; i < count * (V / 8); i += THREADS) {
        const int row = i / (V / 8), column = 8 * (i % (V / 8));
        *(uint4*)((byte*)o + (((sequence.begin + first + row) * HV + head) * V + column) * 2) = *(uint4*)v_o.at(row, column);
      }
    }

    // -- what the next chunk's gates see --
    const bool another = chunk + 1 < sequence.chunks;
    if constexpr (MEAN) {
      sums[0] = quad_sum(sums[0]), sums[1] = quad_sum(sums[1]);
      if ((lane() & 3) == 0) {
        total[16 * warp() + quad_row()] += sums[0];
        total[16 * warp() + quad_row() + 8] += sums[1];
      }
      sync();
      if (another) {
        if (means)
          for (int i = thread; i < V; i += THREADS) means[((sequence.slot + chunk) * HV + head) * V + i] = total[i] / C;
        for (int r = warp(); r < RANK; r += WARPS) {
          float x = 0;
          for (int i = lane(); i < V; i += 32) x += total[i] * seen.wide_down[i * RANK + r];
          x = warp_sum(x);
          if (lane() == 0) seen.raw[r] = x / C;
        }
        sync();
        for (int i = thread; i < V; i += THREADS) total[i] = 0;
      }
    }
    if constexpr (READ)
      if (another) {  // the stage just used is free: S^T [V, K] goes there
        const Matrix<K> S_t = {shared + (stage ^ 1) * STAGE};
        const StateOperand S_bf16 = round_to_bf16(S);
#pragma unroll
        for (int m = 0; m < COLUMNS; ++m) S_t.store(16 * warp(), 16 * m, S_bf16.x[m]);
        sync();
        for (int m = warp(); m < COLUMNS; m += WARPS) {
          Sums z = zeros();
#pragma unroll
          for (int i = 0; i < V / 16; ++i) multiply(z, seen.down.load(0, 16 * i), S_t.load_transposed(16 * i, 16 * m));
          seen.Z.store(0, 16 * m, round_to_bf16(z));
        }
      }
  }

  // -- the state behind the last token; a full chunk is not closed here --
  if (memory_end) store_state(memory_end + own * K * V, S);
  sync();
  if constexpr (MEAN) {
    if (content_end && thread < R) content_end[own * R + thread] = seen.raw[thread];
    if (content_sum_end)
      for (int i = thread; i < V; i += THREADS) content_sum_end[own * V + i] = total[i];
  }
  if constexpr (READ)
    if (content_end)
      for (int i = thread; i < R * K / 2; i += THREADS) {
        const int r = i / (K / 2), column = 2 * (i % (K / 2));
        const float2 z = unpack<Bf16>(seen.Z.pair(r, column));
        content_end[(own * K + column) * R + r] = z.x;
        content_end[(own * K + column + 1) * R + r] = z.y;
      }
}
