// The backward: one program per (sequence, value head), tiles in reverse order, everything of a tile run again.
//
// With d the gradient of the outputs (for "mean", that of the running sum added), r = a v - (b k exp G) S and dS the
// gradient of the state behind a block, a block's gradients are
//
//     dv_new = M^T d + (k exp(G_16 - G)) dS             dr = T^T dv_new
//     dS    <- Diag(exp G_16) dS + (scale q exp G)^T d - (b k exp G)^T dr
//     dM = tril(d v_new^T)                              dA = -stril(dr v_new^T)
//     d(scale q exp G) = d S^T + dM (k exp -G)          d(b k exp G) = -dr S^T + dA (k exp -G)
//     d(k exp -G) = dA^T (b k exp G) + dM^T (scale q exp G)
//     d(k exp(G_16 - G)) = v_new dS^T
//
// Products over K belong to the warp that has the rows of V (dv_new, dr, dS), products over V to the warp that has the
// columns of K (all others); dr, v_new, S and dS change hands in shared memory.

static_assert(TILE == SAVE, "a tile begins where a state was saved");
constexpr int SLABS = (COLUMNS + WARPS - 1) / WARPS;                    // slabs of 16 columns that a warp has
constexpr int DOWN_SHARE = V * RANK / THREADS, UP_SHARE = RANK * K / THREADS;  // of the projections' gradients

constexpr int O_Q = 0, O_K = O_Q + TILE * K * 2, O_E = O_K + TILE * K * 2, O_G = O_E + TILE * K * 2;
constexpr int O_V = O_G + TILE * K * 4, O_D = O_V + TILE * V * 2;
constexpr int O_Q_IN = O_D + TILE * V * 2, O_BK_IN = O_Q_IN + TILE * K * 2, O_K_OUT = O_BK_IN + TILE * K * 2;
constexpr int O_K_END = O_K_OUT + TILE * K * 2, O_V_NEW = O_K_END + TILE * K * 2, O_DR = O_V_NEW + TILE * V * 2;
constexpr int O_S = O_DR + BLOCK * V * 2, O_DS = O_S + V * K * 2, O_DX = O_DS + V * K * 2;
constexpr int O_M = O_DX + BLOCK * K * 2, O_T = O_M + TILE * 32, O_A = O_T + TILE * 32, O_PAIRS = O_A + TILE * 64;
constexpr int O_DECAY = O_PAIRS + 2 * 256 * 4, O_W = O_DECAY + BLOCKS * K * 4, O_WRITE = O_W + TILE * 4;
constexpr int O_STRONG = O_WRITE + TILE * 4, O_DA = O_STRONG + 64, O_DLOGIT = O_DA + WARPS * BLOCK * 4;
constexpr int O_DSUM = O_DLOGIT + BLOCK * 4, O_DCONTENT = O_DSUM + V * 4, O_DSHIFT = O_DCONTENT + 2 * RANK * 4;
constexpr int O_CONTENT = O_DSHIFT + (K + 16) * 4, O_DOWN = aligned(O_CONTENT + (4 * RANK + K + TILE) * 4);
constexpr int O_UP = O_DOWN + (READ ? RANK * V * 2 : MEAN ? RANK * V * 4 : 0);
constexpr int O_Z = O_UP + (READ ? RANK * K * 2 : MEAN ? RANK * K * 4 : 0);
constexpr int SHARED_BYTES = O_Z + (READ ? RANK * K * 2 : 0);

static_assert(SHARED_BYTES <= CARVE_SHARED, "carve/ops/kernels/cuda.py says how much shared memory a program gets");

DEVICE Operand negate(Operand a) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a.x[i] ^= 0x80008000u;
  return a;
}

DEVICE State widen(const StateOperand& S) {
  State y;
#pragma unroll
  for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 x = unpack<Bf16>(S.x[n].x[i]);
      y.x[n].x[i >> 1][2 * (i & 1)] = x.x, y.x[n].x[i >> 1][2 * (i & 1) + 1] = x.y;
    }
  return y;
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
// matrices): of q, of b k, and of k as the later and the earlier partner.
struct PairGradients { float2 q, bk, k; };
DEVICE PairGradients differentiate_pair_by_pair(const Prepared& p, const Content& c, const float* dM, const float* dA,
                                                int s, int i, int column) {
  PairGradients d = {make_float2(0, 0), make_float2(0, 0), make_float2(0, 0)};
  const float2 G_i = p.g.pair(16 * s + i, column), shift = erase_shift(c, column);
#pragma unroll 1
  for (int j = 0; j < BLOCK; ++j) {
    const int row = 16 * s + j;
    const float2 G_j = p.g.pair(row, column), k = unpack<Input>(p.k.pair(row, column));
    if (j <= i) {
      const float2 decayed = make_float2(k.x * exp2_(G_i.x - G_j.x), k.y * exp2_(G_i.y - G_j.y));
      const float M = p.scale * dM[i * 16 + j], A = dA[i * 16 + j];
      d.q.x += M * decayed.x, d.q.y += M * decayed.y;
      d.bk.x += A * decayed.x, d.bk.y += A * decayed.y;
    }
    if (j >= i) {
      const float2 q = unpack<Input>(p.q.pair(row, column)), x = unpack<Input>(p.e.pair(row, column));
      const float M = p.scale * dM[j * 16 + i], A = p.top * dA[j * 16 + i];
      d.k.x += exp2_(G_j.x - G_i.x) * (M * q.x + A * sigmoid(x.x + shift.x) * k.x);
      d.k.y += exp2_(G_j.y - G_i.y) * (M * q.y + A * sigmoid(x.y + shift.y) * k.y);
    }
  }
  return d;
}

// Inputs as in the forward, and what it saved; gradients of o and of the state behind the last token (null for zero).
// Gradients of tokens have HV heads, those of the projections and of the state [N, HV, ...], all written in full; those
// of the state before the first token may be null.
KERNEL void __launch_bounds__(THREADS, 1) carve_backward(
    const void* q, const void* k, const void* v, const float* g, const void* e, const float* w, const float* p_down,
    const float* p_up, const float* p_write, const i64* bounds, const i64* positions, const u32* states,
    const float* contents, const float* means, const void* d_o, const float* d_memory_end, const float* d_content_end,
    const float* d_content_sum_end, void* d_q, void* d_k, void* d_v, float* d_g, void* d_e, float* d_w, float* d_p_down,
    float* d_p_up, float* d_p_write, float* d_memory, float* d_content, float* d_content_sum, float scale, float top,
    int H, int HV, int H_g, int H_e, int R, int T, int C) {
  byte* shared = shared_memory();
  const int n = block_index() / HV, head = block_index() % HV, thread = thread_index();
  const int key_head = head / (HV / H), g_head = head / (HV / H_g), e_head = head / (HV / H_e);
  const i64 own = (i64)n * HV + head;
  const Sequence sequence(bounds, positions, n, T, C);

  float* small = (float*)(shared + O_CONTENT);
  Content seen = {{shared + O_DOWN}, {shared + O_UP}, {shared + O_Z}, (float*)(shared + O_DOWN), (float*)(shared + O_UP),
                  small, small + RANK, small + 2 * RANK, small + 4 * RANK, small + 4 * RANK + K, R};
  Prepared p = {{shared + O_Q}, {shared + O_K}, {shared + O_E}, {shared + O_G}, {shared + O_Q_IN}, {shared + O_BK_IN},
                {shared + O_K_OUT}, {shared + O_K_END}, {shared + O_M}, {shared + O_T}, (float*)(shared + O_A),
                (float*)(shared + O_DECAY), (float*)(shared + O_WRITE), (float*)(shared + O_W), (int*)(shared + O_STRONG),
                scale, top, w != nullptr};
  const Matrix<V> values = {shared + O_V}, d = {shared + O_D}, v_new = {shared + O_V_NEW}, dr = {shared + O_DR};
  const Matrix<K> S_t = {shared + O_S}, dS_t = {shared + O_DS};  // [V, K]
  const Matrix<K> dx = {shared + O_DX};                          // gradient of the erase logits, [BLOCK, K] ("read")
  const Matrix<16> dZ_shared = {shared + O_DX};                  // [K, RANK]
  float *dM_shared = (float*)(shared + O_PAIRS), *dA_shared = dM_shared + 256;
  float* da = (float*)(shared + O_DA);              // partial gradients of the write gate, [WARPS, BLOCK]
  float* d_logit = (float*)(shared + O_DLOGIT);     // gradient of its logit, [BLOCK]
  float* d_sum = (float*)(shared + O_DSUM);         // gradient of the running sum of outputs, [V] ("mean")
  float* d_raw = (float*)(shared + O_DCONTENT);     // gradient of the content, [RANK] ("mean")
  float* d_z = d_raw + RANK;                        // gradient of its norm
  float* d_shift = (float*)(shared + O_DSHIFT);     // gradient of the gates' shifts, [K] and [1] ("mean")

  // -- gradients behind the last token --
  State dS = load_state(d_memory_end ? d_memory_end + own * K * V : nullptr);
  load_projections(seen, p_down, p_up, p_write, head);
  Sums dZ[SLABS], d_up[SLABS], d_down = zeros();  // "read": [16 of K, RANK], [RANK, 16 of K], [16 of V, RANK]
  float d_down_share[DOWN_SHARE] = {}, d_up_share[UP_SHARE] = {};  // "mean": of [V, RANK] and [RANK, K]
  float d_write[2][2] = {}, d_erase_shift[SLABS][2][2] = {}, d_write_shift = 0;
#pragma unroll
  for (int i = 0; i < SLABS; ++i) {
    dZ[i] = d_up[i] = zeros();
    if constexpr (READ)
      if (d_content_end && warp() + i * WARPS < COLUMNS)
        for_each(dZ[i], [&](float& x, int row, int r) {
          if (r < R) x = d_content_end[(own * K + 16 * (warp() + i * WARPS) + row) * R + r];
        });
  }
  if constexpr (MEAN) {
    if (thread < RANK) d_raw[thread] = d_content_end && thread < R ? d_content_end[own * R + thread] : 0;
    for (int i = thread; i < V; i += THREADS) d_sum[i] = d_content_sum_end ? d_content_sum_end[own * V + i] : 0;
  }

  for (int chunk = sequence.chunks - 1; chunk >= 0; --chunk) {
    const int first_of_chunk = sequence.first(chunk), last_of_chunk = sequence.last(chunk);
    const i64 slot = (sequence.slot + chunk) * HV + head;
    if constexpr (MEAN)
      if (thread < RANK) seen.raw[thread] = contents[slot * RANK + thread];
    if constexpr (READ)
      for (int i = thread; i < RANK * K / 2; i += THREADS)
        ((u32*)seen.Z.base)[i] = ((const u32*)contents)[slot * (RANK * K / 2) + i];
    set_shifts(seen);

    for (int first = first_of_chunk + (last_of_chunk - first_of_chunk - 1) / TILE * TILE; first >= first_of_chunk; first -= TILE) {
      const int count = min(TILE, last_of_chunk - first), blocks = (count + BLOCK - 1) / BLOCK;
      const i64 token = sequence.begin + first;

      // -- inputs, and the state at the tile's beginning --
      copy_rows(p.g, g, token, count, H_g, g_head);
      copy_rows(p.k, k, token, count, H, key_head);
      copy_rows(p.q, q, token, count, H, key_head);
      copy_rows(p.e, e, token, count, H_e, e_head);
      copy_rows(values, v, token, count, HV, head);
      copy_rows(d, d_o, token, count, HV, head);
      if (w && thread < TILE) copy_4_bytes(p.w + thread, w + (token + min(thread, count - 1)) * HV + head, thread < count);
      StateOperand S_first;
      const i64 state_slot = sequence.state_slot(chunk, first - first_of_chunk), state_at = state_slot * HV + head;
      const uint4* from = saved_state((u32*)states, state_slot, HV, head);
#pragma unroll
      for (int m = 0; m < COLUMNS; ++m) {
        const uint4 x = from[32 * m];
        S_first.x[m] = {{x.x, x.y, x.z, x.w}};
      }
      if (thread < BLOCKS) p.strong[thread] = 0;
      wait_for_copies();
      sync();

      // -- have the next tile (or about that) fetched into the L2 cache --
      const int some = min(TILE, first);
      fetch_rows<K, 4>(g, token - some, some, H_g, g_head);
      fetch_rows<K, 2>(k, token - some, some, H, key_head);
      fetch_rows<K, 2>(q, token - some, some, H, key_head);
      fetch_rows<K, 2>(e, token - some, some, H_e, e_head);
      fetch_rows<V, 2>(v, token - some, some, HV, head);
      fetch_rows<V, 2>(d_o, token - some, some, HV, head);
      if (some) fetch_into_cache((const byte*)states + (state_at - HV) * (2 * K * V) + thread * (2 * K * V / THREADS));

      // -- as in the forward: gates, decays, the triangular systems; and d --
      if constexpr (READ) {
        shift_logits(seen, p.k, p.e);
        sync();
      }
      for (int i = thread; i < TILE * V / 2; i += THREADS) {
        const int row = i / (V / 2), column = 2 * (i % (V / 2));
        const float2 x = unpack<Input>(d.pair(row, column));
        const float2 more = MEAN ? *(float2*)(d_sum + column) : make_float2(0, 0);
        d.pair(row, column) = pack<Bf16>(x.x + more.x, x.y + more.y);
      }
      prepare<true>(p, seen);
      sync();
      solve(p);
      sync();

      // -- v_new of every block, and the state before the last --
      {
        State S = widen(S_first);
        StateOperand S_in = S_first;
#pragma unroll 1
        for (int s = 0; s < blocks; ++s) {
          if (s) S_in = round_to_bf16(S);
          v_new.block(s).store(0, 16 * warp(), transpose(advance(S, S_in, p, values, s)));
        }
#pragma unroll
        for (int m = 0; m < COLUMNS; ++m) S_t.store(16 * warp(), 16 * m, S_in.x[m]);
      }

#pragma unroll 1
      for (int s = blocks - 1; s >= 0; --s) {
        const i64 token_of_block = token + 16 * s;
        const int count_of_block = count - 16 * s;

        // -- products over K: this warp has 16 rows of V --
        {
          const StateOperand dS_end = round_to_bf16(dS);
#pragma unroll
          for (int m = 0; m < COLUMNS; ++m) dS_t.store(16 * warp(), 16 * m, dS_end.x[m]);
          if (s + 1 < blocks)
#pragma unroll
            for (int m = 0; m < COLUMNS; ++m) S_t.store(16 * warp(), 16 * m, S_first.x[m]);

          const Operand d_rows = d.block(s).load_transposed(0, 16 * warp());
          Sums dv_new = times_state(dS_end, p.k_end.block(s)), dr_sums = zeros();
          multiply(dv_new, d_rows, p.M.block(s).load_transposed(0, 0));
          multiply(dr_sums, round_to_bf16(dv_new), p.T.block(s).load_transposed(0, 0));
          const Operand dr_rows = round_to_bf16(dr_sums);
          dr.store(0, 16 * warp(), transpose(dr_rows));
          decay_columns(dS, p.decay + s * K);
#pragma unroll
          for (int m = 0; m < COLUMNS; ++m) {
            multiply(dS.x[m], d_rows, p.q_in.block(s).load_transposed(0, 16 * m));
            multiply(dS.x[m], negate(dr_rows), p.bk_in.block(s).load_transposed(0, 16 * m));
          }

          const Operand v_rows = values.block(s).load_transposed(0, 16 * warp());
          Operand dv;
#pragma unroll
          for (int t = 0; t < 2; ++t) {
            const float2 a = *(const float2*)(p.a + 16 * s + 8 * t + quad_column());
            float2 sum = make_float2(0, 0);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const float2 x = unpack<Input>(v_rows.x[2 * t + i]);
              sum.x += dr_sums.x[t][2 * i] * x.x, sum.y += dr_sums.x[t][2 * i + 1] * x.y;
              dv.x[2 * t + i] = pack<Input>(a.x * dr_sums.x[t][2 * i], a.y * dr_sums.x[t][2 * i + 1]);
            }
            sum = make_float2(column_sum(sum.x), column_sum(sum.y));
            if (quad_row() == 0) *(float2*)(da + warp() * BLOCK + 8 * t + quad_column()) = sum;
          }
          dv = transpose(dv);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int row = quad_row() + 8 * (i & 1), column = 16 * warp() + 8 * (i >> 1) + quad_column();
            if (row < count_of_block) ((u32*)d_v)[(((token_of_block + row) * HV + head) * V + column) / 2] = dv.x[i];
          }
        }
        sync();

        // -- the write gate --
        if (thread < BLOCK) {
          float sum = 0;
#pragma unroll
          for (int i = 0; i < WARPS; ++i) sum += da[i * BLOCK + thread];
          const float a = p.a[16 * s + thread], x = w ? sum * a * (1 - a) : 0;
          d_logit[thread] = x;
          d_write_shift += x;
          if (w && thread < count_of_block) d_w[(token_of_block + thread) * HV + head] = x;
        }

        // -- products over V: this warp has SLABS times 16 columns of K --
        Sums dk[SLABS];
        Operand dx_rows[SLABS];
#pragma unroll
        for (int slab = 0; slab < SLABS; ++slab) {
          const int first_column = 16 * (warp() + slab * WARPS);
          const bool active = first_column < K;
          Sums dq_in = zeros(), dk_in = zeros(), dk_end = zeros(), dM = zeros(), dA = zeros(), S_dS = zeros();
          if (active)
#pragma unroll
            for (int m = 0; m < V / 16; ++m) {
              const Operand d_m = d.block(s).load(0, 16 * m), dr_m = negate(dr.load(0, 16 * m));
              const Operand v_m = v_new.block(s).load(0, 16 * m);
              const Operand S_m = S_t.load_transposed(16 * m, first_column), dS_m = dS_t.load_transposed(16 * m, first_column);
              multiply(dq_in, d_m, S_m);
              multiply(dk_in, dr_m, S_m);
              multiply(dk_end, v_m, dS_m);
              multiply(dM, d_m, v_m);
              multiply(dA, dr_m, v_m);
              multiply(S_dS, S_m, dS_m);  // of which the diagonal is the gradient of the block's decay
            }
          for_each(dM, [&](float& x, int i, int j) { x = i >= j ? x : 0; });
          for_each(dA, [&](float& x, int i, int j) { x = i > j ? x : 0; });

          const bool strong = p.strong[s];
          Sums dk_out = zeros();
          if (strong) {
            if (warp() == 0 && slab == 0) {
              for_each(dM, [&](float& x, int i, int j) { dM_shared[i * 16 + j] = x; });
              for_each(dA, [&](float& x, int i, int j) { dA_shared[i * 16 + j] = x; });
            }
            sync();
          } else if (active) {
            const Operand k_out = p.k_out.block(s).load_transposed(0, first_column);
            const Operand dM_rows = round_to_bf16(dM), dA_rows = round_to_bf16(dA);
            multiply(dq_in, dM_rows, k_out);
            multiply(dk_in, dA_rows, k_out);
            multiply(dk_out, transpose(dA_rows), p.bk_in.block(s).load_transposed(0, first_column));
            multiply(dk_out, transpose(dM_rows), p.q_in.block(s).load_transposed(0, first_column));
          }

          // -- from what was scaled back to q, k, the gates and the decay --
          if (active) {
            Sums dG;
            float dG_end[2][2] = {};
#pragma unroll
            for (int t = 0; t < 2; ++t) {
              const int column = first_column + 8 * t + quad_column();
              const float2 end = p.g.pair(16 * s + BLOCK - 1, column), shift = erase_shift(seen, column);
#pragma unroll
              for (int i = 0; i < 2; ++i) {
                const int row = quad_row() + 8 * i, row_of_tile = 16 * s + row;
                const float2 sum = p.g.pair(row_of_tile, column);
                const float2 q_pair = unpack<Input>(p.q.pair(row_of_tile, column));
                const float2 k_pair = unpack<Input>(p.k.pair(row_of_tile, column));
                const float2 logit = unpack<Input>(p.e.pair(row_of_tile, column));
                PairGradients pairs = {make_float2(0, 0), make_float2(0, 0), make_float2(0, 0)};
                if (strong) pairs = differentiate_pair_by_pair(p, seen, dM_shared, dA_shared, s, row, column);
                float dq_pair[2], dx_pair[2];
                auto differentiate = [&](int j, float G, float G_16, float q_i, float k_i, float x, float q_more, float bk_more, float k_more) {
                  const float in = exp2_(G), out = strong ? 0 : exp2_(-G), to_end = exp2_(G_16 - G), b = sigmoid(x);
                  const float from_end = dk_end.x[t][2 * i + j] * to_end;
                  const float dq_i = dq_in.x[t][2 * i + j] * in * scale + q_more;
                  const float dk_erase = (dk_in.x[t][2 * i + j] * in + bk_more) * (top * b);
                  const float dk_write = dk_out.x[t][2 * i + j] * out + from_end + k_more;
                  dq_pair[j] = dq_i;
                  dx_pair[j] = dk_erase * k_i * (1 - b);
                  dk[slab].x[t][2 * i + j] = dk_erase + dk_write;
                  dG.x[t][2 * i + j] = dq_i * q_i + (dk_erase - dk_write) * k_i;
                  dG_end[t][j] += from_end * k_i;
                  d_erase_shift[slab][t][j] += dx_pair[j];
                };
                differentiate(0, sum.x, end.x, q_pair.x, k_pair.x, logit.x + shift.x, pairs.q.x, pairs.bk.x, pairs.k.x);
                differentiate(1, sum.y, end.y, q_pair.y, k_pair.y, logit.y + shift.y, pairs.q.y, pairs.bk.y, pairs.k.y);
                dx_rows[slab].x[2 * t + i] = pack<Bf16>(dx_pair[0], dx_pair[1]);
                if (row < count_of_block) {
                  const i64 at = (((token_of_block + row) * HV + head) * K + column) / 2;
                  ((u32*)d_q)[at] = pack<Input>(dq_pair[0], dq_pair[1]);
                  ((u32*)d_e)[at] = pack<Input>(dx_pair[0], dx_pair[1]);
                }
              }
            }
            sum_from_row(dG);
#pragma unroll
            for (int t = 0; t < 2; ++t) {
              const int column = first_column + 8 * t + quad_column();
              float whole[2];
#pragma unroll
              for (int j = 0; j < 2; ++j) {
                const float diagonal = shuffle(t ? S_dS.x[1][2 + j] : S_dS.x[0][j], 4 * (quad_column() + j) + (lane() & 3));
                whole[j] = column_sum(dG_end[t][j]) + p.decay[s * K + column + j] * diagonal;
              }
#pragma unroll
              for (int i = 0; i < 2; ++i)
                if (quad_row() + 8 * i < count_of_block)
                  *(float2*)(d_g + ((token_of_block + quad_row() + 8 * i) * HV + head) * K + column) =
                      make_float2(dG.x[t][2 * i] + whole[0], dG.x[t][2 * i + 1] + whole[1]);
            }
            if constexpr (READ) dx.store(0, first_column, dx_rows[slab]);
          }
        }

        // -- "read": from the gates' logits to what they read in the memory, and to the projections --
        if constexpr (READ) {
          sync();
          float root[2];
          Sums z = read_memory(seen, p.k.block(s), root), dz = zeros();
          z = scale_rows(z, root);
#pragma unroll
          for (int m = 0; m < COLUMNS; ++m) multiply(dz, dx.load(0, 16 * m), seen.up.load(0, 16 * m));
          for_each(dz, [&](float& x, int row, int r) { x += d_logit[row] * seen.write[r]; });
          if (warp() == 0)
#pragma unroll
            for (int t = 0; t < 2; ++t)
#pragma unroll
              for (int j = 0; j < 2; ++j)
                d_write[t][j] += z.x[t][j] * d_logit[quad_row()] + z.x[t][2 + j] * d_logit[quad_row() + 8];
          if constexpr (RMS) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              float dot = 0;
#pragma unroll
              for (int t = 0; t < 2; ++t) dot += z.x[t][2 * i] * dz.x[t][2 * i] + z.x[t][2 * i + 1] * dz.x[t][2 * i + 1];
              dot = quad_sum(dot) / R;
#pragma unroll
              for (int t = 0; t < 2; ++t)
#pragma unroll
                for (int j = 2 * i; j < 2 * i + 2; ++j) dz.x[t][j] = root[i] * (dz.x[t][j] - z.x[t][j] * dot);
            }
          }
          const Operand dz_rows = round_to_bf16(dz), dz_columns = transpose(dz_rows), z_columns = transpose(round_to_bf16(z));
#pragma unroll
          for (int slab = 0; slab < SLABS; ++slab) {
            const int first_column = 16 * (warp() + slab * WARPS);
            if (first_column >= K) continue;
            multiply(dk[slab], dz_rows, seen.Z.load_transposed(0, first_column));
            multiply(dZ[slab], to_bf16<Input>(p.k.block(s).load_transposed(0, first_column)), dz_columns);
            multiply(d_up[slab], z_columns, transpose(dx_rows[slab]));
          }
        }
#pragma unroll
        for (int slab = 0; slab < SLABS; ++slab)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int row = quad_row() + 8 * (i & 1), t = i >> 1, column = 16 * (warp() + slab * WARPS) + 8 * t + quad_column();
            if (row < count_of_block && column < K)
              ((u32*)d_k)[(((token_of_block + row) * HV + head) * K + column) / 2] =
                  pack<Input>(dk[slab].x[t][2 * (i & 1)], dk[slab].x[t][2 * (i & 1) + 1]);
          }
        sync();
      }

      // -- "read": a chunk's content came from the memory at its beginning --
      if constexpr (READ)
        if (first == first_of_chunk && chunk > 0) {
#pragma unroll
          for (int slab = 0; slab < SLABS; ++slab)
            if (warp() + slab * WARPS < COLUMNS) {
              dZ_shared.store(16 * (warp() + slab * WARPS), 0, round_to_bf16(dZ[slab]));
              dZ[slab] = zeros();
            }
          sync();
          const Operand down = seen.down.load_transposed(0, 16 * warp());
#pragma unroll
          for (int m = 0; m < COLUMNS; ++m) {
            multiply(dS.x[m], down, dZ_shared.load(16 * m, 0));
            multiply(d_down, S_first.x[m], dZ_shared.load_transposed(16 * m, 0));
          }
          sync();
        }
    }

    // -- "mean": from the gates' logits to the content, the projections, and the outputs of the chunk before --
    if constexpr (MEAN) {
#pragma unroll
      for (int slab = 0; slab < SLABS; ++slab)
#pragma unroll
        for (int t = 0; t < 2; ++t)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int column = 16 * (warp() + slab * WARPS) + 8 * t + quad_column() + j;
            const float x = column_sum(d_erase_shift[slab][t][j]);
            d_erase_shift[slab][t][j] = 0;
            if (quad_row() == 0 && column < K) d_shift[column] = x;
          }
      if (warp() == 0) {
        const float x = warp_sum(lane() < BLOCK ? d_write_shift : 0);
        d_write_shift = 0;
        if (lane() == 0) d_shift[K] = x;
      }
      sync();
#pragma unroll
      for (int i = 0; i < UP_SHARE; ++i) {
        const int at = thread + i * THREADS;
        d_up_share[i] += seen.z[at / K] * d_shift[at % K];
      }
      if (thread < RANK) d_write[0][0] += seen.z[thread] * d_shift[K];
      for (int r = warp(); r < RANK; r += WARPS) {
        float x = 0;
        for (int i = lane(); i < K; i += 32) x += d_shift[i] * seen.wide_up[r * K + i];
        x = warp_sum(x) + d_shift[K] * seen.write[r];
        if (lane() == 0) d_z[r] = x;
      }
      sync();
      if (warp() == 0) {
        const int r = lane() & 15;
        float x = d_z[r];
        if constexpr (RMS) {
          float squares = seen.raw[r] * seen.raw[r], dot = seen.z[r] * x;
#pragma unroll
          for (int mask = 1; mask < 16; mask *= 2) squares += shuffle_xor(squares, mask), dot += shuffle_xor(dot, mask);
          x = reciprocal_root(squares / R + 1e-8f) * (x - seen.z[r] * dot / R);
        }
        warp_sync();
        if (lane() < RANK) d_raw[r] += x;
      }
      sync();
      if (chunk > 0) {
        const float* mean = means + ((sequence.slot + chunk - 1) * HV + head) * V;
#pragma unroll
        for (int i = 0; i < DOWN_SHARE; ++i) {
          const int at = thread + i * THREADS;
          d_down_share[i] += mean[at / RANK] * d_raw[at % RANK];
        }
        for (int i = thread; i < V; i += THREADS) {
          float x = 0;
#pragma unroll
          for (int r = 0; r < RANK; ++r) x += seen.wide_down[i * RANK + r] * d_raw[r];
          d_sum[i] = x / C;
        }
        sync();
        if (thread < RANK) d_raw[thread] = 0;
      }
    }
  }

  // -- gradients of the projections and of the state before the first token --
  sync();
  if (d_memory) store_state(d_memory + own * K * V, dS);
  if constexpr (MEAN) {
    if (d_content && thread < R) d_content[own * R + thread] = d_raw[thread];
    if (d_content_sum)
      for (int i = thread; i < V; i += THREADS) d_content_sum[own * V + i] = d_sum[i];
#pragma unroll
    for (int i = 0; i < DOWN_SHARE; ++i) {
      const int at = thread + i * THREADS;
      if (at % RANK < R) d_p_down[(own * V + at / RANK) * R + at % RANK] = d_down_share[i];
    }
#pragma unroll
    for (int i = 0; i < UP_SHARE; ++i) {
      const int at = thread + i * THREADS;
      if (at / K < R) d_p_up[own * R * K + at] = d_up_share[i];
    }
    if (thread < R) d_p_write[own * R + thread] = d_write[0][0];
  }
  if constexpr (READ) {
    for_each(d_down, [&](float& x, int row, int r) {
      if (r < R) d_p_down[(own * V + 16 * warp() + row) * R + r] = x;
    });
#pragma unroll
    for (int slab = 0; slab < SLABS; ++slab) {
      const int first_column = 16 * (warp() + slab * WARPS);
      if (first_column >= K) continue;
      for_each(dZ[slab], [&](float& x, int row, int r) {
        if (d_content && r < R) d_content[(own * K + first_column + row) * R + r] = x;
      });
      for_each(d_up[slab], [&](float& x, int r, int column) {
        if (r < R) d_p_up[(own * R + r) * K + first_column + column] = x;
      });
    }
    if (warp() == 0)
#pragma unroll
      for (int t = 0; t < 2; ++t)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float x = column_sum(d_write[t][j]);
          const int r = 8 * t + quad_column() + j;
          if (quad_row() == 0 && r < R) d_p_write[own * R + r] = x;
        }
  }
}
