// Primitives: number formats, 16 x 16 operands of the tensor cores, warp and block communication, asynchronous copies.
// Needs no header, so that NVRTC compiles it anywhere; runs on compute capability 8.0 and later.

#define DEVICE __device__ __forceinline__
#define KERNEL extern "C" __global__

typedef unsigned int u32;
typedef long long i64;
typedef unsigned char byte;

// -- where we are --

DEVICE int thread_index() { return threadIdx.x; }
DEVICE int block_index() { return blockIdx.x; }
DEVICE byte* shared_memory() {
  extern __shared__ __align__(1024) byte shared[];
  return shared;
}
DEVICE int lane_anew() {  // for what is rarely needed: what follows from it is not kept in registers meanwhile
  int x;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(x));
  return x;
}
DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// -- communication --

DEVICE void sync() { __syncthreads(); }
DEVICE void warp_sync() { __syncwarp(); }
DEVICE float shuffle(float x, int lane) { return __shfl_sync(~0u, x, lane); }
DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
DEVICE bool any_lane(bool x) { return __any_sync(~0u, x); }
DEVICE bool all_lanes(bool x) { return __all_sync(~0u, x); }
DEVICE int uniform(int x) { return __shfl_sync(~0u, x, 0); }  // tells the compiler that x is the same in the whole warp

// -- arithmetic --

DEVICE float exp2_(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float at_least(float x, float least) {  // NaN stays NaN
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(least));
  return y;
}
DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float reciprocal_root(float x) { return rsqrtf(x); }

// -- pairs of 16-bit numbers; the first lies in the lower half --

struct Bf16 { unsigned short bits; };
struct Fp16 { unsigned short bits; };

template <typename X> DEVICE float2 unpack(u32 x);
template <> DEVICE float2 unpack<Bf16>(u32 x) {
  return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
}
template <> DEVICE float2 unpack<Fp16>(u32 x) {
  float2 y;
  asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}" : "=f"(y.x), "=f"(y.y) : "r"(x));
  return y;
}

template <typename X> DEVICE u32 pack(float a, float b);
template <> DEVICE u32 pack<Bf16>(float a, float b) {
  u32 y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(b), "f"(a));
  return y;
}
template <> DEVICE u32 pack<Fp16>(float a, float b) {
  u32 y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(b), "f"(a));
  return y;
}

// -- tensor cores: the four 8 x 8 quarters of a 16 x 16 operand, and C += A B on a 16 x 8 half --

DEVICE void load_quarters(u32 (&x)[4], u32 row) {  // the shared address of this lane's row
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(row) : "memory");
}
DEVICE void load_quarters_transposed(u32 (&x)[4], u32 row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(row) : "memory");
}
DEVICE u32 transpose_quarter(u32 x) {
  u32 y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}
DEVICE void store_shared(u32 address, u32 x) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(x) : "memory"); }
DEVICE void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// -- asynchronous copies into shared memory; zeros where `valid` is false --

DEVICE void copy_16_bytes(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}
DEVICE void copy_4_bytes(void* to, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 4 : 0)
               : "memory");
}
DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
DEVICE void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }  // those begun since the last call
DEVICE void wait_for_copies_but_last() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }  // but the group closed last
DEVICE void fetch_into_cache(const void* line) { asm volatile("prefetch.global.L2 [%0];" ::"l"(line)); }

// -- global memory that is used once, or by several programs --

DEVICE float4 load_once(const float* p) {  // 16 bytes, kept out of the L1 cache; asked for in the order of the source
  float4 x;
  asm volatile("ld.global.L1::no_allocate.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "l"(p));
  return x;
}
DEVICE u32 load_shared_by_programs(const u32* p) { return *(const volatile u32*)p; }
DEVICE u32 add_atomically(u32* p, u32 x) {  // returns what was there; not by atomicAdd, which waits for it at once
  u32 y;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;" : "=r"(y) : "l"(p), "r"(x) : "memory");
  return y;
}
DEVICE void stop() { __trap(); }  // ends the process with an error

// -- clusters: programs that reach into each other's shared memory; compute capability 9.0 --

DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
DEVICE float load_from_program(const float* p, int rank) {  // what lies at p in the shared memory of another
  u32 address;
  float x;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(p)), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
  return x;
}

DEVICE void store_into_program(float4* p, int rank, float4 x) {
  u32 address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(p)), "r"(rank));
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
               : "memory");
}

// -- synchronisation of some of a block's warps --

// From 0 to 1, by any number of threads at once.
DEVICE void raise_flag(int* flag) { *(volatile int*)flag = 1; }

// All `threads` that name this barrier meet.
DEVICE void barrier(int name, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory"); }

// In shared memory.  Its phase, 0 at first, changes whenever as many have arrived as it was set up for.  What a warp did
// before it arrived is seen by those who waited for the phase's end; to wait for phase 1 of a new signal returns at once.
struct alignas(8) Signal { u32 state[2]; };

DEVICE void set_up(Signal* signal, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(signal)), "r"(arrivals) : "memory");
}
DEVICE void arrive(Signal* signal) {
  asm volatile("{.reg .b64 state; mbarrier.arrive.shared.b64 state, [%0];}" ::"r"(shared_address(signal)) : "memory");
}
DEVICE bool has_ended(Signal* signal, int phase) {
  u32 ended;
  asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
               : "=r"(ended) : "r"(shared_address(signal)), "r"(phase) : "memory");
  return ended;
}
DEVICE void wait(Signal* signal, int phase) {
#if __CUDA_ARCH__ >= 900  // sleeps meanwhile
  u32 ended;
  do {
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(ended) : "r"(shared_address(signal)), "r"(phase) : "memory");
  } while (!ended);
#else
  while (!has_ended(signal, phase)) {}
#endif
}

// The same among the programs of a cluster.
DEVICE void arrive_at_program(Signal* signal, int rank) {
  asm volatile(
      "{.reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;"
      " mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];}" ::"r"(shared_address(signal)), "r"(rank)
      : "memory");
}
DEVICE void wait_for_cluster(Signal* signal, int phase) {
  u32 ended;
  do {
    asm volatile(
        "{.reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
        : "=r"(ended) : "r"(shared_address(signal)), "r"(phase) : "memory");
  } while (!ended);
}
