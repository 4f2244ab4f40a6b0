// Runs CUDA C++ kernels on the CPU for tests: one fiber per CUDA thread, one block at a time per OS thread.
#pragma once
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>
#include <ucontext.h>
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __shared__ static thread_local
#define __CUDA_CPU_SHIM__ 1
struct dim3 { unsigned x, y, z; constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {} };
struct uint3 { unsigned x, y, z; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
using std::min; using std::max;
namespace shim {
enum Wait { RUN, BLOCK, WARP, DONE };
struct Fiber { jmp_buf jb; ucontext_t uc; char* stack; uint3 tid; Wait wait; int line; bool started; };
struct State { std::vector<Fiber> f; jmp_buf home; ucontext_t home_uc; unsigned cur, n; void (*tramp)(void*); void* body;
               std::vector<char> dyn; uint64_t lane[32 * 32][1]; std::vector<char*> stacks; };
struct Copy { void* to; const void* from; int n, room, group; };
struct Copies { std::vector<Copy> pending; int group = 0; };   // asynchronous copies of one thread
inline thread_local State S;
inline thread_local std::vector<Copies> copies;
inline thread_local int errors;
constexpr size_t STACK = 64 << 10;
}
inline thread_local uint3 threadIdx, blockIdx; inline thread_local dim3 blockDim, gridDim; constexpr int warpSize = 32;
namespace shim {
inline void yield(Wait w, int line) {                       // park this fiber, go back to the scheduler
  Fiber& me = S.f[S.cur]; me.wait = w; me.line = line;
  if (!_setjmp(me.jb)) _longjmp(S.home, 1);
}
inline void entry() { S.tramp(S.body); S.f[S.cur].wait = DONE; _longjmp(S.home, 1); }
inline void resume(unsigned i) {
  S.cur = i; Fiber& f = S.f[i]; threadIdx = f.tid;
  if (_setjmp(S.home)) return;                              // a fiber came back
  if (f.started) _longjmp(f.jb, 1);
  f.started = true;
  getcontext(&f.uc); f.uc.uc_stack.ss_sp = f.stack; f.uc.uc_stack.ss_size = STACK; f.uc.uc_link = nullptr;
  makecontext(&f.uc, entry, 0); setcontext(&f.uc);
}
inline bool release(unsigned a, unsigned b, Wait w) {       // all live fibers of [a,b) parked at w: let them go
  int line = -1; unsigned live = 0;
  for (unsigned i = a; i < b; i++) { Fiber& f = S.f[i]; if (f.wait == DONE) continue; if (f.wait != w) return false;
    if (line >= 0 && f.line != line && w == BLOCK) { if (!errors++) fprintf(stderr, "shim: divergent __syncthreads: lines %d and %d\n", line, f.line); }
    line = f.line; live++; }
  for (unsigned i = a; i < b; i++) if (S.f[i].wait == w) S.f[i].wait = RUN;
  return live > 0;
}
inline void run_block() {
  copies.assign(S.n, {});
  for (unsigned i = 0; i < S.n; i++) { S.f[i].wait = RUN; S.f[i].started = false; }
  for (;;) {
    bool live = false, moved = false;
    for (unsigned j = 0; j < S.n; j++) { unsigned i = getenv("SHIM_REVERSE") ? S.n - 1 - j : j; if (S.f[i].wait == RUN) { resume(i); moved = true; } }
    for (unsigned a = 0; a < S.n; a += 32) moved |= release(a, std::min(a + 32, S.n), WARP);
    moved |= release(0, S.n, BLOCK);
    for (unsigned i = 0; i < S.n; i++) live |= S.f[i].wait != DONE;
    if (!live) return;
    if (!moved) { fprintf(stderr, "shim: deadlock (mixed barriers)\n"); errors++; return; }
  }
}
template <class B> void launch(dim3 g, dim3 b, size_t smem, B&& body) {
  S.n = b.x * b.y * b.z; gridDim = g; blockDim = b; S.f.resize(S.n);
  while (S.stacks.size() < S.n) S.stacks.push_back((char*)malloc(STACK));
  for (unsigned i = 0; i < S.n; i++) { S.f[i].stack = S.stacks[i]; S.f[i].tid = {i % b.x, i / b.x % b.y, i / (b.x * b.y)}; }
  S.dyn.resize(smem + 16); S.body = &body; S.tramp = [](void* p) { (*(std::remove_reference_t<B>*)p)(); };
  for (unsigned z = 0; z < g.z; z++) for (unsigned y = 0; y < g.y; y++) for (unsigned x = 0; x < g.x; x++) {
    blockIdx = {x, y, z}; memset(S.dyn.data(), 0xFF, S.dyn.size()); run_block(); }   // 0xFF.. = NaN poison
}
template <class... A> void call(void (*k)(A...), dim3 g, dim3 b, size_t smem, void** args) {
  launch(g, b, smem, [&] { [&]<size_t... I>(std::index_sequence<I...>) { k(*(std::remove_cv_t<A>*)args[I]...); }(std::index_sequence_for<A...>{}); });
}
template <class T> T shfl(T v, unsigned src, int line) {    // warp-collective exchange
  unsigned me = S.cur; memcpy(S.lane[me], &v, sizeof(T)); yield(WARP, line);
  unsigned s = (me & ~31u) | (src & 31); T r; memcpy(&r, S.lane[s < S.n ? s : me], sizeof(T)); yield(WARP, line); return r;
}
}
#define __syncthreads() shim::yield(shim::BLOCK, __LINE__)
#define __syncwarp(...) shim::yield(shim::WARP, __LINE__)
#define __shfl_down_sync(m, v, d) shim::shfl(v, std::min((shim::S.cur & 31) + (d), 31u), __LINE__)
#define __shfl_xor_sync(m, v, x) shim::shfl(v, (shim::S.cur & 31) ^ (x), __LINE__)
#define __shfl_sync(m, v, s) shim::shfl(v, (s), __LINE__)
#define DYNAMIC_SHARED(T, name) T* name = (T*)(((uintptr_t)shim::S.dyn.data() + 15) & ~(uintptr_t)15)
template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline T atomicAdd(T* p, T v) { T o = *p; *p = o + v; return o; }
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
// Asynchronous copies are made as late as they may be: when a thread waits for their group.
inline void device_copy(void* to, const void* from, int n, int room) {
  auto& mine = shim::copies[shim::S.cur]; mine.pending.push_back({to, from, n, room, mine.group}); }
inline void device_close_copies() { shim::copies[shim::S.cur].group++; }
inline void device_copies_arrived(int last) {
  auto& mine = shim::copies[shim::S.cur]; size_t left = 0;
  for (auto& c : mine.pending) {
    if (c.group >= mine.group - last) { mine.pending[left++] = c; continue; }
    memset(c.to, 0, c.room); if (c.n) memcpy(c.to, c.from, c.n); }
  mine.pending.resize(left); }
struct alignas(16) uint4 { unsigned x, y, z, w; };
#define SHIM_EXPORT(k) extern "C" int k##_cpu(const unsigned* gb, size_t smem, void** args) { shim::errors = 0; \
  shim::call(&k, dim3(gb[0], gb[1], gb[2]), dim3(gb[3], gb[4], gb[5]), smem, args); return shim::errors; }
