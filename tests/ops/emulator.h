// In place of primitives.cuh, to run the kernels on a CPU (x86-64): every GPU thread is a fiber, warps take turns in random
// order, and what the threads of a warp, a program or a cluster do together is a rendezvous.  Shared memory begins as
// garbage, and writing beyond its end, unaligned operands, threads that do not arrive together and reaching into a program
// that has ended end the process.  Compiled with -fsanitize=thread (and linked without), `races` counts accesses to shared
// memory by two warps, one of them writing, that no barrier or signal puts in an order.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <utility>
#include <vector>
#define DEVICE inline
#define KERNEL static
#define __restrict__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
typedef unsigned int u32;
typedef long long i64;
typedef unsigned char byte;
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct uint4 {
  u32 x, y, z, w;
};
static float2 make_float2(float a, float b) { return {a, b}; }
static float4 make_float4(float a, float b, float c, float d) { return {a, b, c, d}; }
static uint4 make_uint4(u32 a, u32 b, u32 c, u32 d) { return {a, b, c, d}; }
static float __uint_as_float(u32 x) {
  float y;
  memcpy(&y, &x, 4);
  return y;
}
static u32 __float_as_uint(float x) {
  u32 y;
  memcpy(&y, &x, 4);
  return y;
}
static inline int min(int a, int b) { return a < b ? a : b; }
static inline int max(int a, int b) { return a > b ? a : b; }
static inline i64 min(i64 a, i64 b) { return a < b ? a : b; }

struct Context {
  void* sp;
};
extern "C" void emu_switch(void** from, void* to);
asm(R"(
.text
.globl emu_switch
.type emu_switch,@function
emu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");
static void jump(Context* a, Context* b) { emu_switch(&a->sp, b->sp); }
static void make(Context* c, char* stack, size_t n, void (*f)()) {
  uint64_t* p = (uint64_t*)(((uintptr_t)(stack + n)) & ~63ull);
  *--p = 0;
  *--p = (uint64_t)f;
  for (int i = 0; i < 6; i++) *--p = 0;
  c->sp = p;
}

namespace emu {
struct Copy {
  void* to;
  const void* from;
  int n;
  bool valid;
};
struct Fiber {
  Context ctx;
  char* stack;
  bool done = false;
  bool waiting = false;
  std::vector<Copy> copies;
  std::vector<int> groups;
};
static std::vector<Fiber> fibers;
static int cur = -1, blk = 0;
static Context main_ctx;
static int nthreads;
static byte* first_smem;  // of the cluster's first program
static size_t smem_stride;
static int program() { return cur / nthreads; }  // of the cluster
static byte* smem_of(int program) { return first_smem + program * smem_stride; }
struct Warp {
  int arrived = 0;
  long gen = 0;
  u32 in[32][4];
  const void* ptr[32];
  const char* what;
  float fin[32];
  int lane[32];
  u32 out[32][4];
};
static std::vector<Warp> warps;
#define UNSEEN __attribute__((no_sanitize("thread")))  // by the compiler's calls at every access
constexpr int MOST_WARPS = 32, MOST_SIGNALS = 128;  // of a cluster
struct Clock {
  u32 of[MOST_WARPS];  // up to where the past of each warp is known
};
struct Meeting {
  int arrived = 0;
  long gen = 0;
  int n = 0;
  Clock past[2];  // of this meeting and the one before
};
static int races = 0;
// Vector clocks, as in FastTrack (Flanagan and Freund 2009), a clock a warp: what the lanes of a warp do to each other is not
// looked at.  A cell is two bytes of shared memory.  Plain arrays, as functions of the library are seen themselves.
struct Cell {
  int writer;
  u32 written, read[MOST_WARPS];  // when, by the clock of the warp
};
static Clock clocks[MOST_WARPS];
static Cell* cells = nullptr;
static size_t cells_there = 0;

UNSEEN static void begin_races(size_t bytes) {
  cells_there = bytes / 2;
  cells = (Cell*)realloc(cells, cells_there * sizeof(Cell));
  for (size_t i = 0; i < cells_there * sizeof(Cell) / 4; ++i) ((u32*)cells)[i] = 0;
  for (size_t i = 0; i < cells_there; ++i) cells[i].writer = -1;
  for (int w = 0; w < MOST_WARPS; ++w)
    for (int i = 0; i < MOST_WARPS; ++i) clocks[w].of[i] = w == i;
}
UNSEEN static void forget(Clock& past) {
  for (int w = 0; w < MOST_WARPS; ++w) past.of[w] = 0;
}
UNSEEN static void join(Clock& to, const Clock& from) {
  for (int w = 0; w < MOST_WARPS; ++w)
    if (to.of[w] < from.of[w]) to.of[w] = from.of[w];
}
UNSEEN static void release(Clock& to) {
  join(to, clocks[cur >> 5]);
  ++clocks[cur >> 5].of[cur >> 5];
}
UNSEEN static void acquire(const Clock& from) { join(clocks[cur >> 5], from); }
UNSEEN static void found(const char* what, size_t cell, int other, const void* here) {
  if (races++ < 8)
    printf("race: %s, byte %zu of shared memory, warp %d before warp %d, code at %+ld\n", what, 2 * cell, other, cur >> 5,
           (const byte*)here - (const byte*)&races);
}
UNSEEN static void access(const void* p, size_t n, bool writes, const void* here) {
  if (cur < 0 || (const byte*)p < first_smem || (const byte*)p + n > first_smem + 2 * cells_there) return;
  const int warp = cur >> 5;
  const u32* known = clocks[warp].of;
  const size_t at = (const byte*)p - first_smem;
  for (size_t i = at / 2; i <= (at + n - 1) / 2; ++i) {
    Cell& cell = cells[i];
    if (cell.writer >= 0 && cell.written > known[cell.writer])
      found(writes ? "two writes" : "a read of what is written", i, cell.writer, here);
    if (writes) {
      for (int w = 0; w < MOST_WARPS; ++w)
        if (w != warp && cell.read[w] > known[w]) found("a write of what is read", i, w, here);
      cell.writer = warp;
      cell.written = known[warp];
    } else
      cell.read[warp] = known[warp];
  }
}
static std::vector<Meeting> meetings;  // of each program's threads, then of the cluster's
static void yield();
static void meet(Meeting& m, int n) {
  long gen = m.gen;
  if (m.arrived == 0) {
    m.n = n;
    forget(m.past[gen & 1]);
  } else if (m.n != n) {
    printf("barrier counts differ\n");
    abort();
  }
  release(m.past[gen & 1]);
  if (++m.arrived == n) {
    m.arrived = 0;
    m.gen++;
  } else
    while (m.gen == gen) yield();
  acquire(m.past[gen & 1]);
}
static void yield() { jump(&fibers[cur].ctx, &main_ctx); }
template <class F>
void warp_op(const char* what, F finish) {
  Warp& w = warps[cur >> 5];
  long gen = w.gen;
  if (w.arrived == 0)
    w.what = what;
  else if (strcmp(w.what, what)) {
    printf("divergent warp op %s vs %s\n", w.what, what);
    abort();
  }
  if (++w.arrived == 32) {
    finish(w);
    w.arrived = 0;
    w.gen++;
  } else
    while (w.gen == gen) yield();
}
static float rb(u32 x) {
  u32 y = x << 16;
  float f;
  memcpy(&f, &y, 4);
  return f;
}
}  // namespace emu
static int thread_index() { return emu::cur % emu::nthreads; }
static int block_index() { return emu::blk + emu::program(); }
static byte* shared_memory() { return emu::smem_of(emu::program()); }
static void sync() { emu::meet(emu::meetings[emu::program()], emu::nthreads); }
static void warp_sync() {
  emu::warp_op("sync", [](emu::Warp&) {});
}
static float shuffle(float x, int lane) {
  using namespace emu;
  int l = cur & 31;
  Warp& w = warps[cur >> 5];
  w.fin[l] = x;
  warp_op("shfl", [](Warp& w) {
    for (int i = 0; i < 32; i++) memcpy(&w.out[i][0], &w.fin[i], 4);
  });
  u32 y = w.out[lane & 31][0];
  float f;
  memcpy(&f, &y, 4);
  warp_op("shfl2", [](Warp&) {});
  return f;
}
static float shuffle_xor(float x, int m) { return shuffle(x, (emu::cur & 31) ^ m); }
static float exp2_(float x) {
  float y = std::exp2(x);
  return std::fabs(y) < 1.17549435e-38f ? 0.f : y;
}
static float at_least(float x, float least) { return x < least ? least : x; }
static float reciprocal(float x) { return 1.f / x; }
static float reciprocal_root(float x) { return 1.f / std::sqrt(x); }
struct Bf16 {
  unsigned short bits;
};
struct Fp16 {
  unsigned short bits;
};
template <class X>
float2 unpack(u32 x);
template <class X>
u32 pack(float, float);
template <>
float2 unpack<Bf16>(u32 x) {
  return {__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u)};
}
static u32 bf(float a) {
  u32 x = __float_as_uint(a);
  if ((x & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return (x + 0x7fff + ((x >> 16) & 1)) >> 16;
}
template <>
u32 pack<Bf16>(float a, float b) {
  return bf(a) | (bf(b) << 16);
}
template <>
float2 unpack<Fp16>(u32 x) {
  _Float16 h[2];
  memcpy(h, &x, 4);
  return {(float)h[0], (float)h[1]};
}
template <>
u32 pack<Fp16>(float a, float b) {
  _Float16 h[2] = {(_Float16)a, (_Float16)b};
  u32 x;
  memcpy(&x, h, 4);
  return x;
}
static void ldm(u32 (&x)[4], const void* row, bool tr) {
  using namespace emu;
  int l = cur & 31;
  Warp& w = warps[cur >> 5];
  w.ptr[l] = row;
  if (((uintptr_t)row) & 15) {
    printf("unaligned ldmatrix\n");
    abort();
  }
  if ((byte*)row < smem_of(program()) || (byte*)row >= smem_of(program()) + 300000) {
    printf("ldmatrix outside\n");
    abort();
  }
  warp_op(tr ? "ldmt" : "ldm", [tr](Warp& w) {
    for (int m = 0; m < 4; m++)
      for (int i = 0; i < 32; i++) {
        int g = i >> 2, q = i & 3;
        uint16_t a, b;
        if (!tr) {
          const uint16_t* p = (const uint16_t*)w.ptr[m * 8 + g];
          a = p[2 * q];
          b = p[2 * q + 1];
        } else {
          a = ((const uint16_t*)w.ptr[m * 8 + 2 * q])[g];
          b = ((const uint16_t*)w.ptr[m * 8 + 2 * q + 1])[g];
        }
        w.out[i][m] = a | ((u32)b << 16);
      }
  });
  for (int m = 0; m < 4; m++) x[m] = w.out[l][m];
  warp_op("ldm2", [](Warp&) {});
}
static u32 shared_address(const void* p) { return (u32)((byte*)p - shared_memory()); }
static void fetch_into_cache(const void*) {}
static void load_quarters(u32 (&x)[4], u32 row) { ldm(x, shared_memory() + row, false); }
static void load_quarters_transposed(u32 (&x)[4], u32 row) { ldm(x, shared_memory() + row, true); }
static u32 transpose_quarter(u32 x) {
  using namespace emu;
  int l = cur & 31;
  Warp& w = warps[cur >> 5];
  w.in[l][0] = x;
  warp_op("movm", [](Warp& w) {
    uint16_t m[8][8];
    for (int i = 0; i < 32; i++) {
      m[i >> 2][2 * (i & 3)] = w.in[i][0];
      m[i >> 2][2 * (i & 3) + 1] = w.in[i][0] >> 16;
    }
    for (int i = 0; i < 32; i++) w.out[i][0] = m[2 * (i & 3)][i >> 2] | ((u32)m[2 * (i & 3) + 1][i >> 2] << 16);
  });
  u32 y = w.out[l][0];
  warp_op("movm2", [](Warp&) {});
  return y;
}
static void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  using namespace emu;
  int l = cur & 31;
  Warp& w = warps[cur >> 5];
  for (int i = 0; i < 4; i++) w.in[l][i] = a[i];
  w.out[l][0] = b0;
  w.out[l][1] = b1;
  warp_op("mma", [](Warp& w) {
    float A[16][16], B[16][8];
    for (int i = 0; i < 32; i++) {
      int g = i >> 2, q = i & 3;
      for (int m = 0; m < 4; m++) {
        int r = g + 8 * (m & 1), cc = 2 * q + 8 * (m >> 1);
        A[r][cc] = rb(w.in[i][m] & 0xffff);
        A[r][cc + 1] = rb(w.in[i][m] >> 16);
      }
      for (int m = 0; m < 2; m++) {
        B[2 * q + 8 * m][g] = rb(w.out[i][m] & 0xffff);
        B[2 * q + 8 * m + 1][g] = rb(w.out[i][m] >> 16);
      }
    }
    for (int i = 0; i < 32; i++) {
      int g = i >> 2, q = i & 3;
      for (int e = 0; e < 4; e++) {
        float s = 0;
        int r = g + 8 * (e >> 1), cc = 2 * q + (e & 1);
        for (int k = 0; k < 16; k++) s += A[r][k] * B[k][cc];
        w.in[i][e] = __float_as_uint(s);
      }
    }
  });
  for (int e = 0; e < 4; e++) c[e] += __uint_as_float(w.in[l][e]);
  warp_op("mma2", [](Warp&) {});
}
static void chk(void* to, int n) {
  if ((byte*)to < shared_memory() || (uintptr_t)to % n) {
    printf("bad copy\n");
    abort();
  }
}
// Copies are made when they are waited for, but may be from the beginning.
static void copy_16_bytes(void* to, const void* from, bool v) {
  chk(to, 16);
  emu::access(to, 16, true, __builtin_return_address(0));
  emu::fibers[emu::cur].copies.push_back({to, from, 16, v});
}
static void copy_4_bytes(void* to, const void* from, bool v) {
  chk(to, 4);
  emu::access(to, 4, true, __builtin_return_address(0));
  emu::fibers[emu::cur].copies.push_back({to, from, 4, v});
}
static void do_copies(int m) {
  auto& f = emu::fibers[emu::cur];
  for (int i = 0; i < m; i++) {
    auto& x = f.copies[i];
    emu::access(x.to, x.n, true, __builtin_return_address(0));
    if (x.valid)
      memcpy(x.to, x.from, x.n);
    else
      memset(x.to, 0, x.n);
  }
  f.copies.erase(f.copies.begin(), f.copies.begin() + m);
}
static void wait_for_copies() {
  emu::fibers[emu::cur].groups.clear();
  do_copies((int)emu::fibers[emu::cur].copies.size());
}
static void close_copies() {
  auto& f = emu::fibers[emu::cur];
  int before = 0;
  for (int g : f.groups) before += g;
  f.groups.push_back((int)f.copies.size() - before);
}
static void wait_for_copies_but_last() {
  auto& f = emu::fibers[emu::cur];
  while (f.groups.size() > 1) {
    do_copies(f.groups[0]);
    f.groups.erase(f.groups.begin());
  }
}
namespace emu {
static std::vector<Meeting> bars;  // 16 of each program
}
static void barrier(int id, int n) {
  using namespace emu;
  if (id < 1 || id > 15 || n % 32) {
    printf("bad barrier\n");
    abort();
  }
  meet(bars[16 * program() + id], n);
}
UNSEEN static void raise_flag(int* flag) {
  if (!*flag) emu::access(flag, 4, true, __builtin_return_address(0));
  *flag = 1;
}
struct alignas(8) Signal {
  short n, pending;
  int phase;
};
namespace emu {
struct Past {
  Signal* of;
  Clock arriving, ended[2];  // of the phase that goes on; of the last of each parity
};
static Past pasts[MOST_SIGNALS];
UNSEEN static Past& past_of(Signal* s) {
  int i = 0;
  while (i < MOST_SIGNALS && pasts[i].of && pasts[i].of != s) ++i;
  if (i == MOST_SIGNALS) abort();
  pasts[i].of = s;
  return pasts[i];
}
}  // namespace emu
UNSEEN static void set_up(Signal* s, int n) {
  s->n = s->pending = n;
  s->phase = 0;
}
UNSEEN static void arrive(Signal* s) {
  if (s->n <= 0 || s->pending <= 0) {
    printf("bad arrive\n");
    abort();
  }
  emu::Past& past = emu::past_of(s);
  emu::release(past.arriving);
  if (--s->pending == 0) {
    s->pending = s->n;
    past.ended[s->phase] = past.arriving;
    emu::forget(past.arriving);
    s->phase ^= 1;
  }
}
static void sync_cluster() { emu::meet(emu::meetings.back(), emu::fibers.size()); }
namespace emu {
template <class X>
X* of_program(const X* p, int rank) {
  bool ended = true;
  for (int i = 0; i < nthreads; i++) ended = ended && fibers[rank * nthreads + i].done;
  if (ended) {
    printf("a program of the cluster has ended\n");
    abort();
  }
  return (X*)((byte*)p - smem_of(program()) + smem_of(rank));
}
}  // namespace emu
static float load_from_program(const float* p, int rank) { return *emu::of_program(p, rank); }
static void store_into_program(float4* p, int rank, float4 x) { *emu::of_program(p, rank) = x; }
static void arrive_at_program(Signal* s, int rank) { arrive(emu::of_program(s, rank)); }
static int lane_anew() { return emu::cur & 31; }
UNSEEN static bool has_ended(Signal* s, int phase) {
  if (s->phase == phase) return false;
  emu::acquire(emu::past_of(s).ended[phase]);
  return true;
}
static bool any_lane(bool x) {
  using namespace emu;
  int l = cur & 31;
  Warp& w = warps[cur >> 5];
  w.lane[l] = x;
  warp_op("any", [](Warp& w) {
    u32 m = 0;
    for (int i = 0; i < 32; i++) m |= w.lane[i] ? 1u << i : 0;
    for (int i = 0; i < 32; i++) w.out[i][0] = m;
  });
  u32 y = w.out[l][0];
  warp_op("any2", [](Warp&) {});
  return y != 0;
}
static bool all_lanes(bool x) { return !any_lane(!x); }
static int uniform(int x) { return x; }
static void store_shared(u32 a, u32 x) {
  if (a % 4 || a > 300000) abort();
  *(u32*)(shared_memory() + a) = x;
}
static void wait(Signal* s, int phase) {
  while (!has_ended(s, phase)) emu::yield();
}
static void wait_for_cluster(Signal* s, int phase) { wait(s, phase); }
namespace emu {
static void (*entry_fn)(void**);
static void** entry_args;
static void entry() {
  entry_fn(entry_args);
  fibers[cur].done = true;
  yield();
}
template <class... A>
struct Caller;
template <auto fn, class... A, size_t... I>
static void call_impl(void (*)(A...), void** a, std::index_sequence<I...>) {
  fn(*(A*)a[I]...);
}
template <auto fn, class... A>
static void call2(void (*p)(A...), void** a) {
  call_impl<fn>(p, a, std::index_sequence_for<A...>{});
}
template <auto fn>
static void call(void** a) {
  call2<fn>(fn, a);
}
static void run(void (*f)(void**), int grid, int threads, int programs, int bytes, void** args, int seed) {
  entry_fn = f;
  entry_args = args;
  nthreads = threads;
  std::mt19937 rng(seed);
  const size_t SS = 1 << 16;
  const int all = threads * programs;  // of a cluster
  static char* stacks = nullptr;
  static int cap = 0;
  if (cap < all) {
    free(stacks);
    stacks = (char*)aligned_alloc(4096, SS * all);
    cap = all;
  }
  smem_stride = (bytes + 1024 + 4096) / 1024 * 1024;
  std::vector<byte> mem(programs * smem_stride + 1024, 0xff);
  first_smem = (byte*)(((uintptr_t)mem.data() + 1023) / 1024 * 1024);
  races = 0;
  for (blk = 0; blk < grid; blk += programs) {
    for (int i = 0; i < programs; i++) {
      memset(smem_of(i), 0xff, bytes);
      memset(smem_of(i) + bytes, 0xab, 1024);
    }
    fibers.assign(all, Fiber());
    warps.assign(all / 32, Warp());
    meetings.assign(programs + 1, Meeting());
    bars.assign(16 * programs, Meeting());
    memset(pasts, 0, sizeof pasts);
    begin_races(programs * smem_stride);
    for (int i = 0; i < all; i++) make(&fibers[i].ctx, stacks + SS * i, SS, entry);
    int left = all;
    std::vector<int> ord(all / 32);
    for (size_t i = 0; i < ord.size(); i++) ord[i] = i;
    while (left) {
      std::shuffle(ord.begin(), ord.end(), rng);
      left = 0;
      for (int w : ord) {
        int burst = 1 + rng() % 40;
        for (int b = 0; b < burst; b++)
          for (int l = 0; l < 32; l++) {
            cur = w * 32 + l;
            if (!fibers[cur].done) jump(&main_ctx, &fibers[cur].ctx);
          }
      }
      for (auto& f : fibers) left += !f.done;
    }
    for (int n = 0; n < programs; n++)
      for (int i = 0; i < 1024; i++)
        if (smem_of(n)[bytes + i] != 0xab) {
          printf("shared memory overrun at %d\n", i);
          abort();
        }
  }
}
}  // namespace emu

// What the compiler calls at every access.
#define ACCESS(name, bytes, writes) \
  extern "C" UNSEEN void __tsan_##name(void* p) { emu::access(p, bytes, writes, __builtin_return_address(0)); }
#define ACCESSES(bytes)                             \
  ACCESS(read##bytes, bytes, false)                 \
  ACCESS(write##bytes, bytes, true)                 \
  ACCESS(unaligned_read##bytes, bytes, false)       \
  ACCESS(unaligned_write##bytes, bytes, true)
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
extern "C" UNSEEN void __tsan_read_range(void* p, size_t n) { emu::access(p, n, false, __builtin_return_address(0)); }
extern "C" UNSEEN void __tsan_write_range(void* p, size_t n) { emu::access(p, n, true, __builtin_return_address(0)); }
extern "C" UNSEEN void __tsan_vptr_update(void*, void*) {}
extern "C" UNSEEN void __tsan_vptr_read(void*) {}
extern "C" UNSEEN void __tsan_func_entry(void*) {}
extern "C" UNSEEN void __tsan_func_exit() {}
extern "C" UNSEEN void __tsan_init() {}
