// A SIMT emulator: runs the CUDA kernels of csrc/cuda on the CPU, for tests alone.
//
//   g++ -x c++ -std=c++20 -include cuemu.h kernels.cu
//
// Threads of a block are fibers on one OS thread. Between barriers they run in a random order, and
// so do the blocks (the seed is cuemu::seed's). Wrong barriers (divergent, after an exit, never
// reached) are errors; uninitialised shared memory reads as NaN. With -fsanitize=address every
// access out of bounds of global or shared memory stops with a stack trace; with -fsanitize=thread
// a missing barrier or an unsynchronised access between blocks is reported as a data race, whatever
// the order was.
//
// What is copied asynchronously lands at once or not before its thread waits for it, by chance:
// until then there are NaN patterns. Copies may be handed to a barrier in shared memory (mbarrier),
// and land with its phase. Matrices are loaded as by the instruction, and rows of one
// that share a bank of shared memory are an error.
//
// Not emulated: clusters, their copies and barriers, the hardware's rounding order inside mma,
// occupancy.
#pragma once
#define CUEMU 1
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>
#undef __host__
#undef __shared__
#undef __global__
#undef __device__
#undef __launch_bounds__
#undef __forceinline__
#define __host__
#define __shared__ static
#define __global__
#define __device__
#define __launch_bounds__(...)
#define __forceinline__ inline
#if defined(__SANITIZE_ADDRESS__)
extern "C" {
void __sanitizer_start_switch_fiber(void**, const void*, size_t);
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
}
#endif
#if defined(__SANITIZE_THREAD__)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
}
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#define CUEMU_REL(p) __tsan_release(p)
#define CUEMU_ACQ(p) __tsan_acquire(p)
struct CuemuQuiet {
  CuemuQuiet() {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  ~CuemuQuiet() {
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
  }
};
#else
#define CUEMU_REL(p) (void)0
#define CUEMU_ACQ(p) (void)0
struct CuemuQuiet {
  ~CuemuQuiet() {}
};  // hides the emulator's own bookkeeping from TSan
#endif
namespace cuemu {
struct error : std::runtime_error {
  using std::runtime_error::runtime_error;
};
[[noreturn]] inline void fail(const std::string& s) { throw error("cuemu: " + s); }
extern "C" void cuemu_switch(void** save, void* load);
asm(".text\n.globl cuemu_switch\n.weak cuemu_switch\ncuemu_switch:\n push %rbp\n push %rbx\n push "
    "%r12\n push %r13\n push %r14\n push %r15\n mov %rsp,(%rdi)\n"
    " mov %rsi,%rsp\n pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n");
constexpr size_t STACK = 256 << 10;
struct Bar {
  // what TSan knows a round by, this one and the next: who leaves one late has not seen what others
  // did on their way to the next. Of the heap, where it forgets what was there before
  std::vector<char> tags = std::vector<char>(2);
  int round = 0, arrived = 0, expected = 0;
  const void* site = nullptr;
  std::vector<int> who;
};
struct Warp {
  std::map<unsigned, Bar> bar;
  alignas(16) char slot[3][32][16];
};  // one barrier per mask
struct Copy {
  void* to;
  const void* from;  // null: zeros
};
// a barrier in shared memory, and what is handed to its phase
struct Phases {
  int expected = 0, arrived = 0, phase = 0;
  std::vector<Copy> copies;
  std::vector<int> who;
};
struct Fiber {
  std::vector<std::vector<Copy>> copies{{}};  // by group, the open one last
  uint3 tid;
  int id = 0;
  void* sp = nullptr;
  char* stack = nullptr;
  bool done = true;
  unsigned parity = 0;
  void *asan = nullptr, *tsan = nullptr;
};
struct Machine {
  std::vector<Fiber> f;
  std::vector<std::vector<int>> ready;
  std::vector<Warp> warps;  // ready: runnable threads by warp
  Bar block;
  int n = 0, alive = 0;
  Fiber* cur = nullptr;
  void *main_sp = nullptr, *main_asan = nullptr, *main_tsan = nullptr;
  const void* main_stack = nullptr;
  size_t main_size = 0;
  dim3 grid, blk;
  uint3 bid{};
  std::function<void()> body;
  std::string err;
  uint64_t rng = 1;
  size_t dyn = 0;
  char launch_tag, block_tag;
  std::map<std::pair<const void*, int>, std::unique_ptr<char[]>> shared;
  std::map<const uint64_t*, Phases> phases;
  void wake(int i) { ready[i / 32].push_back(i); }
  unsigned rnd() {
    rng ^= rng << 13;
    rng ^= rng >> 7;
    rng ^= rng << 17;
    return unsigned(rng >> 32);
  }
};
// of the order in which blocks and threads run
inline uint64_t& seed() {
  static uint64_t value = getenv("CUEMU_SEED") ? strtoull(getenv("CUEMU_SEED"), nullptr, 10) : 0;
  return value;
}
// told of each launch's blocks and threads a block; null: nobody
using Listener = void (*)(int64_t, int64_t);
inline Listener& listener() {
  static Listener value = nullptr;
  return value;
}
inline Machine& M() {
  static thread_local Machine m;
  return m;
}
inline void to_main(bool dying) {  // leave the current fiber
  Machine& m = M();
  Fiber* f = m.cur;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(dying ? nullptr : &f->asan, m.main_stack, m.main_size);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(m.main_tsan, 1);
#endif
  cuemu_switch(&f->sp, m.main_sp);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(f->asan, &m.main_stack, &m.main_size);
#endif
}
inline void entry() {
  Machine& m = M();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &m.main_stack, &m.main_size);
#endif
  CUEMU_ACQ(&m.launch_tag);
  try {
    m.body();
    if (m.cur->copies.size() > 1 || !m.cur->copies[0].empty())
      fail("a thread ended with copies that it has not waited for");
  } catch (const std::exception& e) {
    if (m.err.empty()) m.err = e.what();
  }
  CUEMU_REL(&m.block_tag);
  {
    CuemuQuiet quiet;
    m.cur->done = true;
    m.alive--;
  }
  to_main(true);
}
inline void resume(Fiber& f) {
  Machine& m = M();
  m.cur = &f;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&m.main_asan, f.stack, STACK);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(f.tsan, 1);
#endif
  cuemu_switch(&m.main_sp, f.sp);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(m.main_asan, nullptr, nullptr);
#endif
}
// barrier over `expected` live fibers; site tells two different barriers of one block apart
inline void arrive(Bar& b, int expected, const void* site, const char* what) {
  CuemuQuiet quiet;
  Machine& m = M();
  int me = m.cur->id;
  if (&b == &m.block && m.alive < m.n)
    fail("__syncthreads after " + std::to_string(m.n - m.alive) +
         " threads of the block have exited");
  if (b.arrived && b.site != site)
    fail(std::string("divergent ") + what + " in block (" + std::to_string(m.bid.x) + "," +
         std::to_string(m.bid.y) + "," + std::to_string(m.bid.z) + "), thread " +
         std::to_string(me));
  b.site = site;
  b.arrived++;
  [[maybe_unused]] char* const tag = &b.tags[b.round % 2];
  CUEMU_REL(tag);
  b.who.push_back(me);
  b.expected = expected;
  if (b.arrived == expected) {
    for (int w : b.who) m.wake(w);
    b.who.clear();
    b.arrived = 0;
    b.round++;
  }
  to_main(false);  // also the last one yields: order is random again
  CUEMU_ACQ(tag);
}
inline void syncthreads(const void* site) {
  Machine& m = M();
  arrive(m.block, m.alive, site, "__syncthreads");
}
inline Warp& warp() {
  Machine& m = M();
  return m.warps[m.cur->id / 32];
}
inline int lane() { return M().cur->id & 31; }
inline int popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned live_mask() {
  Machine& m = M();
  int w0 = m.cur->id / 32 * 32;
  unsigned r = 0;
  for (int i = 0; i < 32 && w0 + i < m.n; i++)
    if (!m.f[w0 + i].done) r |= 1u << i;
  return r;
}
inline unsigned syncwarp(unsigned mask, const void* site) {
  CuemuQuiet quiet;
  unsigned live = live_mask();
  if (mask == 0xffffffffu && M().n - M().cur->id / 32 * 32 < 32) mask &= live;  // partial last warp
  if (mask & ~live) fail("warp operation names a thread that has exited");
  if (!(mask >> lane() & 1)) fail("warp operation: caller not in mask");
  arrive(warp().bar[mask], popc(mask), site, "warp operation");
  return mask;
}
template <class T>
struct Lanes {
  T v[32];
};
template <class T>
Lanes<T> gather(unsigned mask, T v,
                const void* site) {  // every lane's value, for all lanes of mask
  static_assert(sizeof(T) <= 16);
  CuemuQuiet quiet;
  Warp& w = warp();
  bool full = mask == ~0u;
  unsigned p = full ? M().cur->parity++ & 1 : 2;
  memcpy(w.slot[p][lane()], &v, sizeof(T));
  unsigned m = syncwarp(mask, site);
  Lanes<T> r;
  for (int i = 0; i < 32; i++)
    if (m >> i & 1)
      memcpy(&r.v[i], w.slot[p][i], sizeof(T));
    else
      r.v[i] = v;
  if (!full) syncwarp(m, site);  // full-mask operations alternate two slots instead
  return r;
}
inline void* shared_raw(const void* key, int idx,
                        size_t n) {  // fresh per block, filled with NaN patterns
  CuemuQuiet quiet;
  auto& p = M().shared[{key, idx}];
  if (!p) {
    p.reset(new char[n]);
    memset(p.get(), 0xff, n);
  }
  return p.get();
}
template <class T, int I>
std::remove_reference_t<T>& shared_var() {
  static const char key = 0;
  return *(T*)shared_raw(&key, I, sizeof(T));
}
// dynamic shared memory that cudaFuncSetAttribute has allowed a kernel
inline std::map<const void*, size_t>& allowed_shared() {
  static std::map<const void*, size_t> allowed;
  return allowed;
}
inline void check_shared(const void* kernel, size_t bytes) {
  auto found = allowed_shared().find(kernel);
  if (bytes > (found == allowed_shared().end() ? 48 << 10 : found->second))
    fail("more than 48 KiB of dynamic shared memory, which cudaFuncSetAttribute has not allowed");
}
template <class F>
void launch(F body, dim3 g, dim3 b, size_t dyn = 0) {
  CuemuQuiet quiet;
  Machine& m = M();
  if (m.cur) fail("nested launch");
  if (g.x == 0 || g.y == 0 || g.z == 0 || g.y > 65535 || g.z > 65535 || b.x * b.y * b.z > 1024 ||
      b.z > 64 || b.x * b.y * b.z == 0 || dyn > 232448)
    fail("invalid launch configuration");
  if (listener()) listener()(int64_t(g.x) * g.y * g.z, b.x * b.y * b.z);
  m.rng = 0x9E3779B97F4A7C15ull * (1 + seed());
  m.grid = g;
  m.blk = b;
  m.dyn = dyn;
  m.body = body;
  m.n = b.x * b.y * b.z;
  m.err.clear();
  m.f.resize(std::max<size_t>(m.f.size(), m.n));
  m.warps.assign((m.n + 31) / 32, Warp{});
  CUEMU_REL(&m.launch_tag);
  std::vector<unsigned> order(size_t(g.x) * g.y * g.z);
  for (size_t i = 0; i < order.size(); i++) order[i] = i;
  for (size_t i = order.size(); i > 1; i--)
    std::swap(order[i - 1], order[m.rnd() % i]);  // blocks in random order too
  for (unsigned o : order) {
    m.bid = {o % g.x, o / g.x % g.y, o / g.x / g.y};
    m.ready.assign(m.warps.size(), {});
    m.block = Bar{};
    m.shared.clear();
    m.phases.clear();
    m.alive = m.n;
    for (auto& w : m.warps) w.bar.clear();
    for (int i = 0; i < m.n; i++) {
      Fiber& f = m.f[i];
      f.id = i;
      f.tid = {i % b.x, i / b.x % b.y, i / b.x / b.y};
      f.done = false;
      f.copies.assign(1, {});
      f.parity = 0;
      if (!f.stack) {
        char* base = (char*)mmap(0, STACK + 4096, PROT_READ | PROT_WRITE,
                                 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        mprotect(base, 4096, PROT_NONE);
        f.stack = base + 4096;
      }
      void** sp = (void**)(f.stack + STACK - 64);
      *sp = (void*)entry;
      sp[1] = nullptr;
      f.sp = sp - 6;
      m.wake(i);
#if defined(__SANITIZE_THREAD__)
      m.main_tsan = __tsan_get_current_fiber();
      f.tsan = __tsan_create_fiber(0);
#endif
    }
    std::vector<unsigned> prio(m.warps.size());
    for (auto& p : prio)
      p = m.rnd() % 3
              ? m.rnd()
              : 0;  // the runnable warp of highest priority goes first; equal ones interleave
    while (m.err.empty()) {
      int w = -1, tie = 0;
      for (int j = 0; j < (int)prio.size(); j++)
        if (!m.ready[j].empty()) {
          if (w < 0 || prio[j] > prio[w]) {
            w = j;
            tie = 1;
          } else if (prio[j] == prio[w] && m.rnd() % ++tie == 0)
            w = j;
        }
      if (w < 0) break;
      auto& r = m.ready[w];
      int k = m.rnd() % r.size(), i = r[k];
      r[k] = r.back();
      r.pop_back();
      resume(m.f[i]);
      if (m.err.empty() && m.f[i].done && m.block.arrived)
        m.err = "cuemu: thread " + std::to_string(i) + " exited while " +
                std::to_string(m.block.arrived) + " threads wait at __syncthreads";
    }
    m.cur = nullptr;  // main joins the blocks only after the launch: races between blocks show
#if defined(__SANITIZE_THREAD__)
    for (int i = 0; i < m.n; i++) {
      __tsan_destroy_fiber(m.f[i].tsan);
      munmap(m.f[i].stack - 4096, STACK + 4096);
      m.f[i].stack = nullptr;
    }  // stacks are reused: forget them
#endif
    if (m.err.empty() && m.alive)
      m.err = "cuemu: deadlock, " + std::to_string(m.alive) +
              " threads wait at a barrier that others never reach";
    if (!m.err.empty()) break;
  }
  CUEMU_ACQ(&m.block_tag);
  m.shared.clear();
  if (!m.err.empty()) throw error(m.err);
}
}  // namespace cuemu
#define CUEMU_SITE           \
  ([]() -> const void* {     \
    static const char s = 0; \
    return &s;               \
  }())
#define threadIdx (cuemu::M().cur->tid)
#define blockIdx (cuemu::M().bid)
#define blockDim (cuemu::M().blk)
#define __trap() cuemu::fail("a trap")
#define __syncthreads() cuemu::syncthreads(CUEMU_SITE)
inline void cuemu_syncwarp(const void* s, unsigned m = 0xffffffffu) { cuemu::syncwarp(m, s); }
#define __syncwarp(...) cuemu_syncwarp(CUEMU_SITE __VA_OPT__(, ) __VA_ARGS__)
template <class T>
T cuemu_shfl(const void* s, unsigned m, T v, int src, int w = 32) {
  int l = cuemu::lane();
  return cuemu::gather(m, v, s).v[(l & ~(w - 1)) | (src & (w - 1))];
}
template <class T>
T cuemu_xor(const void* s, unsigned m, T v, int x, int w = 32) {
  int l = cuemu::lane(), t = l ^ x;
  auto g = cuemu::gather(m, v, s);
  return (t & ~(w - 1)) > (l & ~(w - 1)) ? v : g.v[t & 31];
}
template <class T>
T cuemu_down(const void* s, unsigned m, T v, int d, int w = 32) {
  int l = cuemu::lane();
  auto g = cuemu::gather(m, v, s);
  return (l & (w - 1)) + d >= w ? v : g.v[l + d];
}
template <class T>
T cuemu_up(const void* s, unsigned m, T v, int d, int w = 32) {
  int l = cuemu::lane();
  auto g = cuemu::gather(m, v, s);
  return (l & (w - 1)) < d ? v : g.v[l - d];
}
inline unsigned cuemu_ballot(const void* s, unsigned m, int p) {
  auto g = cuemu::gather(m, p != 0, s);
  unsigned r = 0;
  for (int i = 0; i < 32; i++)
    if (m >> i & 1 && g.v[i]) r |= 1u << i;
  return r;
}
#define __shfl_sync(...) cuemu_shfl(CUEMU_SITE, __VA_ARGS__)
#define __shfl_xor_sync(...) cuemu_xor(CUEMU_SITE, __VA_ARGS__)
#define __shfl_down_sync(...) cuemu_down(CUEMU_SITE, __VA_ARGS__)
#define __shfl_up_sync(...) cuemu_up(CUEMU_SITE, __VA_ARGS__)
#define __ballot_sync(...) cuemu_ballot(CUEMU_SITE, __VA_ARGS__)
template <class T>
T atomicAdd(T* p, T v) {  // fibers are not preempted; atomic for TSan and for OS threads
  T o, n;
  if constexpr (std::is_integral_v<T>)
    return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
  else {
    __atomic_load(p, &o, __ATOMIC_RELAXED);
    do n = o + v;
    while (!__atomic_compare_exchange(p, &o, &n, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return o;
  }
}
namespace cuemu {
inline void land(const Copy& copy) {
  if (copy.from)
    memcpy(copy.to, copy.from, 16);
  else
    memset(copy.to, 0, 16);
}
}  // namespace cuemu
inline void lm2_copy_async(void* to, const void* from, bool there) {
  if (uintptr_t(to) % 16 || (there && uintptr_t(from) % 16)) cuemu::fail("a misaligned copy");
  const cuemu::Copy copy = {to, there ? from : nullptr};
  bool lands = false;
  {
    CuemuQuiet quiet;
    lands = cuemu::M().rnd() % 2;
    // one that has landed is waited for all the same
    cuemu::M().cur->copies.back().push_back(lands ? cuemu::Copy{} : copy);
  }
  if (lands)
    cuemu::land(copy);
  else
    memset(to, 0xff, 16);
}
inline void lm2_copies_end() {
  CuemuQuiet quiet;
  cuemu::M().cur->copies.emplace_back();
}
template <int kGroups>
void lm2_copies_landed() {
  std::vector<cuemu::Copy> landed;
  {
    CuemuQuiet quiet;
    auto& groups = cuemu::M().cur->copies;
    while (int(groups.size()) - 1 > kGroups) {
      landed.insert(landed.end(), groups[0].begin(), groups[0].end());
      groups.erase(groups.begin());
    }
  }
  for (const auto& copy : landed)
    if (copy.to) cuemu::land(copy);
}
// mbarrier.init, which the others have to wait for
inline void lm2_mbarrier_init(uint64_t* barrier, int count) {
  if (uintptr_t(barrier) % 8) cuemu::fail("a misaligned mbarrier");
  *barrier = count;
  CuemuQuiet quiet;
  cuemu::M().phases[barrier] = {count};
}
namespace cuemu {
inline Phases& phases_of(const uint64_t* barrier) {
  (void)*static_cast<const volatile uint64_t*>(barrier);
  CuemuQuiet quiet;
  const auto found = M().phases.find(barrier);
  if (found == M().phases.end()) fail("an mbarrier that is not initialised");
  return found->second;
}
}  // namespace cuemu
// mbarrier.arrive, or with_copies cp.async.mbarrier.arrive.noinc: when all that this thread copies
// has landed
inline void lm2_mbarrier_arrive(uint64_t* barrier, bool with_copies) {
  cuemu::Phases& phases = cuemu::phases_of(barrier);
  std::vector<cuemu::Copy> landed;
  CUEMU_REL(&phases);
  bool is_last = false;
  {
    CuemuQuiet quiet;
    auto& groups = cuemu::M().cur->copies;
    if (with_copies) {
      for (const auto& group : groups)
        phases.copies.insert(phases.copies.end(), group.begin(), group.end());
      groups.assign(1, {});
    }
    is_last = ++phases.arrived == phases.expected;
    if (is_last) landed.swap(phases.copies);
  }
  if (!is_last) return;
  CUEMU_ACQ(&phases);
  for (const auto& copy : landed)
    if (copy.to) cuemu::land(copy);
  CUEMU_REL(&phases);
  CuemuQuiet quiet;
  phases.arrived = 0;
  phases.phase++;
  for (int thread : phases.who) cuemu::M().wake(thread);
  phases.who.clear();
}
// mbarrier.try_wait.parity, until it answers: the phase of this parity has ended
inline void lm2_mbarrier_wait(uint64_t* barrier, int parity) {
  cuemu::Phases& phases = cuemu::phases_of(barrier);
  {
    CuemuQuiet quiet;
    while (phases.phase % 2 == parity) {
      phases.who.push_back(cuemu::M().cur->id);
      cuemu::to_main(false);
    }
  }
  CUEMU_ACQ(&phases);
}
template <bool kTransposed, class T>
void lm2_load_matrices(uint32_t (&result)[4], const T* row) {
  static_assert(sizeof(T) == 2);
  if (uintptr_t(row) % 16) cuemu::fail("a misaligned row of a matrix");
  const auto rows = cuemu::gather(~0u, row, CUEMU_SITE);
  const int lane = cuemu::lane(), g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; i++) {
    unsigned banks = 0;
    for (int r = 0; r < 8; r++) banks |= 1u << (uintptr_t(rows.v[8 * i + r]) / 16 % 8);
    if (banks != 0xff) cuemu::fail("rows of a matrix share a bank of shared memory");
    T pair[2];
    for (int j = 0; j < 2; j++)
      pair[j] = kTransposed ? rows.v[8 * i + 2 * t + j][g] : rows.v[8 * i + g][2 * t + j];
    memcpy(&result[i], pair, 4);
  }
}
namespace cuemu {
// of the compute capability of device 1, which has the tensors
inline int& major() {
  static int value = getenv("CUEMU_MAJOR") ? atoi(getenv("CUEMU_MAJOR")) : 8;
  return value;
}
// the current one: 0 unless somebody has made 1 the current one, which has to be done
inline int& device() {
  static int value = 0;
  return value;
}
inline int major_of(int device) { return device == 1 ? major() : 15 - major(); }
}  // namespace cuemu
#define cudaGetDevice(current) (*(current) = cuemu::device(), cudaSuccess)
#define cudaDeviceGetAttribute(value, attribute, device) \
  (*(value) = cuemu::major_of(device), (void)(attribute), cudaSuccess)
inline float __expf(float x) { return expf(x); }
using std::max;
using std::min;
inline float __uint_as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline cudaError_t cuemu_last_error() { return cudaSuccess; }
#define cudaGetLastError() cuemu_last_error()
#define cudaFuncSetAttribute(function, attribute, value) \
  (cuemu::allowed_shared()[function] = size_t(value), cudaSuccess)
// what csrc/cuda/simt.h has for nvcc
#define LM2_SHARED(name, ...) auto& name = cuemu::shared_var<__VA_ARGS__, __COUNTER__>()
#define LM2_DYNAMIC_SHARED(T, name) T* name = (T*)cuemu::shared_raw(nullptr, 0, cuemu::M().dyn)
#define LM2_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (cuemu::check_shared((const void*)(kernel), shared_bytes),       \
   cuemu::launch([=] { kernel(__VA_ARGS__); }, grid, block, shared_bytes))
template <class T>
void lm2_mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct A {
    uint32_t v[4];
  } own_a;
  struct B {
    uint32_t v[2];
  } own_b;
  memcpy(&own_a, a, sizeof own_a);
  memcpy(&own_b, b, sizeof own_b);
  auto all_a = cuemu::gather(~0u, own_a, CUEMU_SITE);
  auto all_b = cuemu::gather(~0u, own_b, CUEMU_SITE);
  const int lane = cuemu::lane(), g = lane >> 2, t = lane & 3;
  const auto element = [](uint32_t pair, int i) {
    T x;
    const uint16_t bits = uint16_t(pair >> (16 * i));
    memcpy(&x, &bits, 2);
    return float(x);
  };
  for (int row = 0; row < 2; row++)
    for (int column = 0; column < 2; column++) {
      float sum = 0;
      for (int half = 0; half < 2; half++)
        for (int q = 0; q < 4; q++)
          for (int i = 0; i < 2; i++)
            sum += element(all_a.v[g * 4 + q].v[2 * half + row], i) *
                   element(all_b.v[(2 * t + column) * 4 + q].v[half], i);
      d[row * 2 + column] += sum;
    }
}
