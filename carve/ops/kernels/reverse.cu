// The backward's sequential part: one program per (sequence, value head) takes the gradient of the state from the last
// tile to the first.  It leaves behind what lets `gradients.cu` differentiate every tile on its own: the gradient of the
// state behind each tile, dr of each block, and what the content sends back.
//
// With d the gradient of the outputs (for "mean", that of the running sum added), r = a v - (b k exp G) S and dS the
// gradient of the state behind a block:
//
//     dv_new = M^T d + (k exp(G_16 - G)) dS             dr = T^T dv_new
//     dS    <- Diag(exp G_16) dS + (scale q exp G)^T d - (b k exp G)^T dr
//
// Products over K belong to the warp that has the rows of V.  The content needs the gradient of the erase gates too,
//
//     d(b k exp G) = -dr S^T - stril(dr v_new^T) (k exp -G)
//
// which is a product over V; it is done when a tile's dr are all there, by the warp that has the columns of K.

static_assert(TILE == SAVE, "a tile begins where a state was saved");
constexpr bool PREFETCH = true;
constexpr int SLABS = (COLUMNS + WARPS - 1) / WARPS;                    // slabs of 16 columns that a warp has

constexpr int O_Q = 0, O_K = O_Q + TILE * K * 2, O_E = O_K + TILE * K * 2, O_G = O_E + TILE * K * 2;
constexpr int O_BK_IN = O_G + TILE * K * 4, O_D = O_BK_IN + TILE * K * 2, O_EDITS = O_D + TILE * V * 2;
constexpr int O_DR = O_EDITS + TILE * V * 2, O_M = O_DR + TILE * V * 2, O_T = O_M + TILE * 32, O_A = O_T + TILE * 32;
constexpr int O_DECAY = O_A + TILE * 64, O_W = O_DECAY + BLOCKS * K * 4, O_WRITE = O_W + TILE * 4;
constexpr int O_STRONG = O_WRITE + TILE * 4, O_DLOGIT = O_STRONG + 64, O_DA = O_DLOGIT + TILE * 4;
constexpr int O_DZ = O_DA + WARPS * TILE * 4, O_DSUM = O_DZ + (READ ? 2 * TILE * 32 : 0), O_DCONTENT = O_DSUM + V * 4;
constexpr int O_DSHIFT = O_DCONTENT + 3 * RANK * 4, O_CONTENT = O_DSHIFT + (K + 16) * 4;
constexpr int O_DOWN = Aligned<O_CONTENT + (4 * RANK + K + TILE) * 4>::bytes;
constexpr int O_UP = O_DOWN + (READ ? RANK * V * 2 : MEAN ? RANK * V * 4 : 0);
constexpr int O_Z = O_UP + (READ ? RANK * K * 2 : MEAN ? RANK * K * 4 : 0);
constexpr int SHARED_BYTES = O_Z + (READ ? RANK * K * 2 : 0);

static_assert(SHARED_BYTES <= CARVE_SHARED, "carve/ops/kernels/cuda.py says how much shared memory a program gets");

DEVICE float pick(const float (&x)[RANK], int i) {  // without an index into registers at run time
  float y = x[0];
#pragma unroll
  for (int r = 1; r < RANK; ++r) y = i == r ? x[r] : y;
  return y;
}

// Inputs as in the forward, and what it saved; gradients of o and of the state behind the last token (null for zero).
// Written in full: d_states and d_edits, laid out like states and edits; passed, [chunk, head, V + K + 4]: what the
// content adds to the gradient of the chunk's outputs (V), to its erase logits (K) and its write logits (1), for "mean";
// d_contents, [chunk, head, RANK + K + 4]: gradients of the content (RANK) and of the gates' shifts (K and 1), for "mean",
// of which the projections' gradients are sums; d_z, [block, head, lane]: the gradient of the content z, and those of the projections, [N, HV, ...], for "read"; gradients of
// the state before the first token, [N, HV, ...].
KERNEL void __launch_bounds__(THREADS, 1) carve_reverse(
    const void* q, const void* k, const void* v, const float* g, const void* e, const float* w, const float* p_down,
    const float* p_up, const float* p_write, const i64* bounds, const i64* positions, const u32* states,
    const u32* edits, const float* contents, const void* d_o, const float* d_memory_end,
    const float* d_content_end, const float* d_content_sum_end, u32* d_states, u32* d_edits, float* passed, u32* d_z_all, float* d_contents,
    float* d_p_down, float* d_p_up, float* d_p_write, float* d_memory, float* d_content, float* d_content_sum,
    float scale, float top, int H, int HV, int H_g, int H_e, int R, int T, int C) {
  byte* shared = shared_memory();
  const int n = block_index() / HV, head = block_index() % HV, thread = thread_index();
  const int key_head = head / (HV / H), g_head = head / (HV / H_g), e_head = head / (HV / H_e);
  const i64 own = (i64)n * HV + head;
  const Sequence sequence(bounds, positions, n, T, C);

  float* small = (float*)(shared + O_CONTENT);
  Content seen = {{shared + O_DOWN}, {shared + O_UP}, {shared + O_Z}, (float*)(shared + O_DOWN), (float*)(shared + O_UP),
                  small, small + RANK, small + 2 * RANK, small + 4 * RANK, small + 4 * RANK + K, R};
  Prepared p = {{shared + O_Q}, {shared + O_K}, {shared + O_E}, {shared + O_G}, {shared + O_Q}, {shared + O_BK_IN},
                {shared + O_G}, {shared + O_G + TILE * K * 2}, {shared + O_M}, {shared + O_T}, (float*)(shared + O_A),
                (float*)(shared + O_DECAY), (float*)(shared + O_WRITE), (float*)(shared + O_W), (int*)(shared + O_STRONG),
                scale, top, w != nullptr};
  const Matrix<V> d = {shared + O_D}, v_new = {shared + O_EDITS}, dr = {shared + O_DR};
  const Matrix<K> dx = p.bk_in;         // gradient of the erase logits, once b k exp G is no longer needed ("read")
  const Matrix<16> dA_bf16 = p.T;       // once T is no longer needed
  float* dA_wide = p.A;                 // the same in fp32, [BLOCKS][16 (i)][16 (j)]
  const Matrix<16> dz = {shared + O_DZ}, z = {shared + O_DZ + TILE * 32};  // [TILE, RANK] ("read")
  const Matrix<16> dZ_shared = {shared + O_DZ};                            // [K, RANK], after them
  float* da = (float*)(shared + O_DA);              // partial gradients of the write gate, [WARPS, TILE]
  float* d_logit = (float*)(shared + O_DLOGIT);     // gradient of its logit, [TILE]
  float* d_sum = (float*)(shared + O_DSUM);         // gradient of the running sum of outputs, [V] ("mean")
  float* d_raw = (float*)(shared + O_DCONTENT);     // gradient of the content, [RANK] ("mean")
  float* d_z = d_raw + RANK;                        // gradient of its norm
  float* d_end = d_z + RANK;                        // gradient of the content behind the last token, then 0
  float* d_shift = (float*)(shared + O_DSHIFT);     // gradient of the gates' shifts, [K] and [1] ("mean")
  const bool into_write = (MEAN || READ) && w && p_write;
  static_assert(K * 32 <= 2 * TILE * 32, "dZ lies over dz and z");

  // -- gradients behind the last token --
  State dS = load_state(d_memory_end ? d_memory_end + own * K * V : nullptr);
  load_projections(seen, p_down, p_up, p_write, head);
  Sums dZ[SLABS], d_up[SLABS], d_down = zeros();  // "read": [16 of K, RANK], [RANK, 16 of K], [16 of V, RANK]
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
    if (thread < RANK) d_raw[thread] = d_end[thread] = d_content_end && thread < R ? d_content_end[own * R + thread] : 0;
    for (int i = thread; i < V; i += THREADS) d_sum[i] = d_content_sum_end ? d_content_sum_end[own * V + i] : 0;
  }

  for (int chunk = sequence.chunks - 1; chunk >= 0; --chunk) {
    const int first_of_chunk = sequence.first(chunk), last_of_chunk = sequence.last(chunk);
    const i64 slot = (sequence.slot + chunk) * HV + head;
    float* to_sums = d_contents + slot * (RANK + K + 4);  // "mean"
    if constexpr (MEAN)
      if (thread < RANK) seen.raw[thread] = contents[slot * RANK + thread];
    if constexpr (READ)
      for (int i = thread; i < RANK * K / 2; i += THREADS)
        ((u32*)seen.Z.base)[i] = ((const u32*)contents)[slot * (RANK * K / 2) + i];
    if constexpr (MEAN) {
      sync();
      float squares = 0;
#pragma unroll
      for (int r = 0; r < RANK; ++r) squares += seen.raw[r] * seen.raw[r];
      const float root = RMS ? reciprocal_root(squares / R + 1e-8f) : 1;
      for (int i = thread; i < K; i += THREADS) {
        float shift = 0;
#pragma unroll
        for (int r = 0; r < RANK; ++r) shift += seen.raw[r] * root * seen.wide_up[r * K + i];
        seen.erase_shift[i] = shift;
      }
      if (warp() == WARPS - 1) {
        const int r = lane() & 15;
        float shift = seen.raw[r] * root * seen.write[r];
#pragma unroll
        for (int mask = 1; mask < 16; mask *= 2) shift += shuffle_xor(shift, mask);
        if (lane() == 0) *seen.write_shift = shift;
      }
      sync();
      float* to = passed + slot * (V + K + 4);
      for (int i = thread; i < V; i += THREADS) to[i] = d_sum[i];
      for (int i = thread; i < K; i += THREADS) to[V + i] = seen.erase_shift[i];
      if (thread == 0) to[V + K] = *seen.write_shift;
    }

    for (int first = first_of_chunk + (last_of_chunk - first_of_chunk - 1) / TILE * TILE; first >= first_of_chunk; first -= TILE) {
      const int count = min(TILE, last_of_chunk - first), blocks = (count + BLOCK - 1) / BLOCK;
      const i64 token = sequence.begin + first;
      const i64 state_slot = sequence.slot_of(chunk, first - first_of_chunk, SAVE);
      const i64 block_slot = sequence.slot_of(chunk, first - first_of_chunk, BLOCK);

      // -- inputs --
      copy_rows(p.g, g, token, count, H_g, g_head);
      copy_rows(p.k, k, token, count, H, key_head);
      copy_rows(p.q, q, token, count, H, key_head);
      copy_rows(p.e, e, token, count, H_e, e_head);
      copy_rows(d, d_o, token, count, HV, head);
      uint4 v_new_piece[BLOCKS];
      if constexpr (MEAN || READ) {
#pragma unroll
        for (int s = 0; s < BLOCKS; ++s)
          v_new_piece[s] = s < blocks ? *saved_block((u32*)edits, block_slot + s, HV, head) : make_uint4(0, 0, 0, 0);
        const byte* state = (const byte*)states + (state_slot * HV + head) * (2 * K * V);  // read when dr are all there
        for (int i = thread; i < 2 * K * V / 128; i += THREADS) fetch_into_cache(state + 128 * i);
      }
      if (w && thread < TILE) copy_4_bytes(p.w + thread, w + (token + min(thread, count - 1)) * HV + head, thread < count);
      if (thread < BLOCKS) p.strong[thread] = 0;
      if constexpr (MEAN || READ)
#pragma unroll
        for (int s = 0; s < BLOCKS; ++s) v_new.block(s).store(0, 16 * warp(), transpose(as_operand(v_new_piece[s])));
      wait_for_copies();
      sync();
      if (PREFETCH && first > 0) {  // the next tile, or about that
        const int some = min(TILE, first);
        fetch_rows<K, 4>(g, token - some, some, H_g, g_head);
        fetch_rows<K, 2>(k, token - some, some, H, key_head);
        fetch_rows<K, 2>(q, token - some, some, H, key_head);
        fetch_rows<K, 2>(e, token - some, some, H_e, e_head);
        fetch_rows<V, 2>(d_o, token - some, some, HV, head);
      }

      // -- as in the forward: gates, decays, the triangular systems; and d --
      if constexpr (READ) {
        shift_logits(seen, p.k, p.e);
        sync();
      }
      if constexpr (MEAN || HALF)
        for (int i = thread; i < TILE * V / 8; i += THREADS) {
          const int row = i / (V / 8), column = 8 * (i % (V / 8));
          uint4& piece = *(uint4*)d.at(row, column);
          Operand x = as_operand(piece);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float2 y = unpack<Input>(x.x[j]), more = MEAN ? *(float2*)(d_sum + column + 2 * j) : make_float2(0, 0);
            x.x[j] = pack<Bf16>(y.x + more.x, y.y + more.y);
          }
          piece = as_uint4(x);
        }
      prepare<false>(p, seen);
      sync();
      solve(p);
      sync();

      // -- the gradient of the state runs through the blocks, each warp with 16 rows of V on its own --
#pragma unroll 1
      for (int s = blocks - 1; s >= 0; --s) {
        const StateOperand dS_end = round_to_bf16(dS);
        if (s == blocks - 1) {
          uint4* to = saved_state(d_states, state_slot, HV, head);
#pragma unroll
          for (int m = 0; m < COLUMNS; ++m) to[32 * m] = as_uint4(dS_end.x[m]);
        }
        const Operand d_rows = d.block(s).load_transposed(0, 16 * warp());
        Sums dv_new = times_state(dS_end, p.k_end.block(s)), dr_sums = zeros();
        multiply(dv_new, d_rows, p.M.block(s).load_transposed(0, 0));
        multiply(dr_sums, round_to_bf16(dv_new), p.T.block(s).load_transposed(0, 0));
        const Operand dr_rows = round_to_bf16(dr_sums);
        *saved_block(d_edits, block_slot + s, HV, head) = as_uint4(dr_rows);
        const Operand dr_t = transpose(dr_rows);
        if constexpr (MEAN || READ) dr.block(s).store(0, 16 * warp(), dr_t);
        decay_columns(dS, p.decay + s * K);
#pragma unroll
        for (int m = 0; m < COLUMNS; ++m) {
          multiply(dS.x[m], d_rows, p.q_in.block(s).load_transposed(0, 16 * m));
          multiply(dS.x[m], negate(dr_rows), p.bk_in.block(s).load_transposed(0, 16 * m));
        }
        if (into_write) {
          float sums[2] = {0, 0};
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int row = min(16 * s + quad_row() + 8 * (i & 1), count - 1), column = 16 * warp() + 8 * (i >> 1) + quad_column();
            const float2 x = unpack<Input>(((const u32*)v)[(((token + row) * HV + head) * V + column) / 2]);
            const float2 y = unpack<Bf16>(dr_t.x[i]);
            sums[i & 1] += x.x * y.x + x.y * y.y;
          }
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            sums[i] = quad_sum(sums[i]);
            if ((lane() & 3) == 0) da[warp() * TILE + 16 * s + quad_row() + 8 * i] = sums[i];
          }
        }
      }

      // -- what the content sends back --
      if constexpr (MEAN || READ) {
        sync();
        if (warp() < blocks) {  // dA = -stril(dr v_new^T), a block a warp
          const int s = warp();
          Sums sums = zeros();
#pragma unroll
          for (int m = 0; m < ROWS; ++m)
            multiply(sums, negate(dr.block(s).load(0, 16 * m)), v_new.block(s).load(0, 16 * m));
          for_each(sums, [&](float& x, int i, int j) {
            x = i > j ? x : 0;
            dA_wide[(s * 16 + i) * 16 + j] = x;
          });
          dA_bf16.block(s).store(0, 0, round_to_bf16(sums));
        }
        if (thread < TILE) {
          float x = 0;
          if (into_write && thread < count) {
#pragma unroll
            for (int i = 0; i < WARPS; ++i) x += da[i * TILE + thread];
            x *= p.a[thread] * (1 - p.a[thread]);
          }
          d_logit[thread] = x;
          d_write_shift += x;
        }
        sync();

#pragma unroll
        for (int slab = 0; slab < SLABS; ++slab) {
          const int first_column = 16 * (warp() + slab * WARPS);
          if (first_column >= K) continue;
          Sums S[ROWS];  // [16 of K, V]
#pragma unroll
          for (int m = 0; m < ROWS; ++m) {
            const uint4* from = (const uint4*)states + ((state_slot * HV + head) * ROWS + m) * COLUMNS * 32 + (first_column / 16) * 32 + lane();
            S[m] = widen(transpose(as_operand(*from)));
          }
#pragma unroll 1
          for (int s = 0; s < blocks; ++s) {
            const bool strong = p.strong[s];
            Sums sums[2] = {zeros(), zeros()}, dk_in;
#pragma unroll
            for (int m = 0; m < ROWS; m += 4) {  // operands ahead of the products that wait for each other
              Operand dr_m[4];
#pragma unroll
              for (int i = 0; i < 4; ++i) dr_m[i] = dr.block(s).load(0, 16 * (m + i));
#pragma unroll
              for (int i = 0; i < 4; ++i) multiply(sums[i & 1], dr_m[i], round_to_bf16(S[m + i]));
            }
#pragma unroll
            for (int t = 0; t < 2; ++t)
#pragma unroll
              for (int i = 0; i < 4; ++i) dk_in.x[t][i] = -(sums[0].x[t][i] + sums[1].x[t][i]);
            if (!strong) multiply(dk_in, dA_bf16.block(s).load(0, 0), p.k_out.block(s).load_transposed(0, first_column));

            Operand dx_rows;
#pragma unroll
            for (int t = 0; t < 2; ++t)
#pragma unroll
              for (int i = 0; i < 2; ++i) {
                const int row = quad_row() + 8 * i, column = first_column + 8 * t + quad_column();
                const float2 logit = unpack<Input>(p.e.pair(16 * s + row, column)), shift = erase_shift(seen, column);
                const float keep_x = 1 - sigmoid(logit.x + shift.x), keep_y = 1 - sigmoid(logit.y + shift.y);
                float2 x = make_float2(dk_in.x[t][2 * i], dk_in.x[t][2 * i + 1]);
                if (strong) {  // pair by pair, decay summed up from token i backwards
                  float2 sum = make_float2(0, 0), pairs = make_float2(0, 0);
                  const float* g_row = g + ((token + 16 * s) * H_g + g_head) * K + column;
                  for (int j = min(row, count - 16 * s - 1); j >= 0; --j) {
                    const float2 more = *(const float2*)(g_row + (i64)j * H_g * K);
                    sum = make_float2(sum.x + fmaxf(LOG2_E * more.x, GONE), sum.y + fmaxf(LOG2_E * more.y, GONE));
                    if (j == 0) break;
                    const float2 y = unpack<Input>(p.k.pair(16 * s + j - 1, column));
                    const float A = dA_wide[(s * 16 + row) * 16 + j - 1];
                    pairs.x += A * y.x * exp2_(sum.x), pairs.y += A * y.y * exp2_(sum.y);
                  }
                  const float2 y = unpack<Input>(p.k.pair(16 * s + row, column));
                  x.x = (x.x * exp2_(sum.x) + pairs.x) * y.x * (1 - keep_x) * top * keep_x;
                  x.y = (x.y * exp2_(sum.y) + pairs.y) * y.y * (1 - keep_y) * top * keep_y;
                } else {
                  const float2 y = unpack<Bf16>(p.bk_in.pair(16 * s + row, column));
                  x.x *= y.x * keep_x, x.y *= y.y * keep_y;
                }
                d_erase_shift[slab][t][0] += x.x, d_erase_shift[slab][t][1] += x.y;
                dx_rows.x[2 * t + i] = pack<Bf16>(x.x, x.y);
              }
            if constexpr (READ) dx.block(s).store(0, first_column, dx_rows);

            if (s + 1 < blocks) {  // the state before the next block
              const Operand k_end = p.k_end.block(s).load_transposed(0, first_column);
              const float decay[2] = {p.decay[s * K + first_column + quad_row()], p.decay[s * K + first_column + quad_row() + 8]};
#pragma unroll
              for (int m = 0; m < ROWS; m += 4) {
                Operand v_m[4];
#pragma unroll
                for (int j = 0; j < 4; ++j) v_m[j] = v_new.block(s).load_transposed(0, 16 * (m + j));
#pragma unroll
                for (int j = 0; j < 4; ++j) {
#pragma unroll
                  for (int t = 0; t < 2; ++t)
#pragma unroll
                    for (int i = 0; i < 4; ++i) S[m + j].x[t][i] *= decay[i >> 1];
                  multiply(S[m + j], k_end, v_m[j]);
                }
              }
            }
          }
        }
      }

      // -- "read": from the gates' logits to what they read in the memory, a block a warp, and to the projections --
      if constexpr (READ) {
        sync();
        if (warp() < blocks) {
          const int s = warp();
          float root[2];
          Sums z_block = read_memory(seen, p.k.block(s), root), dz_block = zeros();
          z_block = scale_rows(z_block, root);
#pragma unroll
          for (int m = 0; m < COLUMNS; ++m) multiply(dz_block, dx.block(s).load(0, 16 * m), seen.up.load(0, 16 * m));
          for_each(dz_block, [&](float& x, int row, int r) { x += d_logit[16 * s + row] * seen.write[r]; });
#pragma unroll
          for (int t = 0; t < 2; ++t)
#pragma unroll
            for (int j = 0; j < 2; ++j)
              d_write[t][j] += z_block.x[t][j] * d_logit[16 * s + quad_row()] + z_block.x[t][2 + j] * d_logit[16 * s + quad_row() + 8];
          if constexpr (RMS) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              float dot = 0;
#pragma unroll
              for (int t = 0; t < 2; ++t)
                dot += z_block.x[t][2 * i] * dz_block.x[t][2 * i] + z_block.x[t][2 * i + 1] * dz_block.x[t][2 * i + 1];
              dot = quad_sum(dot) / R;
#pragma unroll
              for (int t = 0; t < 2; ++t)
#pragma unroll
                for (int j = 2 * i; j < 2 * i + 2; ++j) dz_block.x[t][j] = root[i] * (dz_block.x[t][j] - z_block.x[t][j] * dot);
            }
          }
          const Operand dz_rows = round_to_bf16(dz_block);
          dz.block(s).store(0, 0, dz_rows);
          z.block(s).store(0, 0, round_to_bf16(z_block));
          ((uint4*)d_z_all)[((block_slot + s) * HV + head) * 32 + lane()] = as_uint4(dz_rows);
        }
        sync();
#pragma unroll
        for (int slab = 0; slab < SLABS; ++slab) {
          const int first_column = 16 * (warp() + slab * WARPS);
          if (first_column >= K) continue;
#pragma unroll 1
          for (int s = 0; s < blocks; ++s) {
            multiply(dZ[slab], to_bf16<Input>(p.k.block(s).load_transposed(0, first_column)), dz.block(s).load_transposed(0, 0));
            multiply(d_up[slab], z.block(s).load_transposed(0, 0), dx.block(s).load_transposed(0, first_column));
          }
        }

        // a chunk's content came from the memory at its beginning
        if (first == first_of_chunk && chunk > 0) {
          sync();
#pragma unroll
          for (int slab = 0; slab < SLABS; ++slab)
            if (warp() + slab * WARPS < COLUMNS) {
              dZ_shared.store(16 * (warp() + slab * WARPS), 0, round_to_bf16(dZ[slab]));
              dZ[slab] = zeros();
            }
          sync();
          const Operand down = seen.down.load_transposed(0, 16 * warp());
          const uint4* from = saved_state((u32*)states, state_slot, HV, head);
#pragma unroll
          for (int m = 0; m < COLUMNS; ++m) {
            multiply(dS.x[m], down, dZ_shared.load(16 * m, 0));
            multiply(d_down, as_operand(from[32 * m]), dZ_shared.load_transposed(16 * m, 0));
          }
        }
      }
      sync();
    }

    // -- "mean": from the gates' logits to the content, and to the outputs of the chunk before --
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
      if (warp() < TILE / 32) {
        const float x = warp_sum(d_write_shift);
        d_write_shift = 0;
        if (lane() == 0) d_shift[K + 1 + warp()] = x;
      }
      sync();
      const float d_shift_write = d_shift[K + 1] + d_shift[K + 2];
      {  // d_z = d_shift P_up^T, a number of it by PARTS threads
        constexpr int PARTS = THREADS / RANK;
        const int r = thread / PARTS, part = thread % PARTS;
        float x = 0;
#pragma unroll
        for (int i = 0; i < K / PARTS; ++i) x += d_shift[part + PARTS * i] * seen.wide_up[r * K + part + PARTS * i];
#pragma unroll
        for (int mask = 1; mask < PARTS; mask *= 2) x += shuffle_xor(x, mask);
        if (part == 0) d_z[r] = x + d_shift_write * seen.write[r];
      }
      for (int i = thread; i < K + 1; i += THREADS) to_sums[RANK + i] = i < K ? d_shift[i] : d_shift_write;
      sync();
      float dr_content[RANK];  // gradient of the content; every thread has it all
      {
        float squares = 0, dot = 0;
#pragma unroll
        for (int r = 0; r < RANK; ++r) squares += seen.raw[r] * seen.raw[r], dot += seen.raw[r] * d_z[r];
        const float root = RMS ? reciprocal_root(squares / R + 1e-8f) : 1;
#pragma unroll
        for (int r = 0; r < RANK; ++r)
          dr_content[r] = d_end[r] + root * (d_z[r] - (RMS ? seen.raw[r] * root * root * dot / R : 0));
      }
      if (thread < RANK && chunk > 0) to_sums[thread] = pick(dr_content, thread);
      for (int i = thread; i < V; i += THREADS) {
        float x = 0;
#pragma unroll
        for (int r = 0; r < RANK; r += 4) {
          const float4 down = *(const float4*)(seen.wide_down + i * RANK + r);
          x += (down.x * dr_content[r] + down.y * dr_content[r + 1]) + (down.z * dr_content[r + 2] + down.w * dr_content[r + 3]);
        }
        if (chunk > 0) d_sum[i] = x / C;
      }
      sync();
      if (thread < RANK) d_end[thread] = 0, d_raw[thread] = pick(dr_content, thread);
    }
  }

  // -- gradients of the projections and of the state before the first token --
  sync();
  if (d_memory) store_state(d_memory + own * K * V, dS);
  if constexpr (MEAN) {
    if (d_content && thread < R) d_content[own * R + thread] = d_raw[thread];
    if (d_content_sum)
      for (int i = thread; i < V; i += THREADS) d_content_sum[own * V + i] = d_sum[i];
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
    float* partial = da;  // of the write projection, a block of tokens a warp: [BLOCKS, RANK]
    if (warp() < BLOCKS)
#pragma unroll
      for (int t = 0; t < 2; ++t)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float x = column_sum(d_write[t][j]);
          if (quad_row() == 0) partial[warp() * RANK + 8 * t + quad_column() + j] = x;
        }
    sync();
    if (thread < R) {
      float x = 0;
#pragma unroll
      for (int s = 0; s < BLOCKS; ++s) x += partial[s * RANK + thread];
      d_p_write[own * R + thread] = x;
    }
  }
}
