// A GPU on the CPU, for tests: the threads of a block are fibers, and what a kernel may use (block.h) is done by hand.
//
// It is made to show what a GPU would hide. A warp runs until all of it waits for the block, the furthest that it can
// get ahead of the others, and warps run in three orders (MSFORMER_EMULATE_ORDER: 0 as numbered, 1 backwards, any other
// number the seed of a random one): what lacks a barrier gives other results. Fresh shared memory is NaN. A copy of
// cp.async is carried out when it is waited for, never before, and its target is NaN until then. Misaligned accesses,
// barriers that not all threads reach, threads that wait at different barriers, and lanes that do not meet stop the
// program with the block, the thread and the kind. AddressSanitizer knows the fibers. Not seen: bank conflicts, and
// memory ordering between warps without a barrier.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <unordered_set>
#include <vector>

// How fibers are switched: by hand, or by the C library, which makes system calls.
#if defined(__x86_64__) && !defined(MSFORMER_EMULATE_WITH_UCONTEXT)
#define MSFORMER_SWITCH_BY_HAND 1
#else
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#define MSFORMER_ADDRESS_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define MSFORMER_ADDRESS_SANITIZER 1
#endif
#endif
#ifdef MSFORMER_ADDRESS_SANITIZER
#include <sanitizer/common_interface_defs.h>
#endif

#define DEV inline
#define BOTH inline
#define KERNEL(threads, blocks_per_sm) inline void
#define DYNAMIC_SHARED(name) unsigned char* name = ::msformer::emulated::block().shared

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace msformer::emulated {

enum class State : char { ready, at_block, at_warp, done };

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

// Exchanges of a warp have two buffers in turns, so that one meeting an exchange is enough.
struct Warp {
  alignas(16) std::uint32_t given[2][32][8];
  alignas(16) std::uint32_t made[2][32][4];
  double sum[2][32][4];
  int arrived = 0;
  std::uint32_t mask = 0;
};

// A place in the source.
struct Place {
  const char* file = "";
  int line = 0;

  bool operator!=(const Place& other) const { return line != other.line || std::strcmp(file, other.file) != 0; }
};

struct Fiber {
  void* stack_pointer = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
  dim3 index;
  int number = 0, lane = 0, turn = 0;
  Warp* warp = nullptr;
  State state = State::ready;
  Place barrier;  // where it waits, at_block
  std::unique_ptr<char[]> stack;
  std::vector<Copy> open;                 // copies that are not committed
  std::vector<std::vector<Copy>> groups;  // committed, and not waited for
#ifndef MSFORMER_SWITCH_BY_HAND
  ucontext_t context;
#endif
};

struct Block {
  dim3 grid, size, index;
  unsigned char* shared = nullptr;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Fiber* self = nullptr;
  void* scheduler = nullptr;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_stack_size = 0;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  int at_barrier = 0, alive = 0;
#ifndef MSFORMER_SWITCH_BY_HAND
  ucontext_t main;
#endif
};

inline Block& block() {
  static thread_local Block b;
  return b;
}
inline Fiber& self() { return *block().self; }

// What kernels moved between global memory and the chip since the last `reset`: bytes asked for, and, where `sectors`
// is on, bytes of distinct sectors of 32 bytes a launch, which is what a large cache would let through.
struct Traffic {
  bool sectors = false;
  std::uint64_t read = 0, written = 0, distinct_read = 0, distinct_written = 0;
  std::unordered_set<std::uintptr_t> seen_read, seen_written;

  void count(const void* at, int bytes, bool reads) {
    (reads ? read : written) += static_cast<std::uint64_t>(bytes);
    if (!sectors) return;
    const auto first = reinterpret_cast<std::uintptr_t>(at) / 32;
    const auto last = (reinterpret_cast<std::uintptr_t>(at) + bytes - 1) / 32;
    for (auto s = first; s <= last; s++)
      if ((reads ? seen_read : seen_written).insert(s).second) (reads ? distinct_read : distinct_written) += 32;
  }
};
inline Traffic& traffic() {
  static Traffic t;
  return t;
}

// A list of launches in place of running them, for questions about sizes that would take too long to run.
struct Launched {
  std::string kernel;  // as the compiler writes the function `launch`
  dim3 grid;
  int threads, shared;
};
struct Recorder {
  bool on = false;
  std::vector<Launched> launches;
};
inline Recorder& recorder() {
  static Recorder r;
  return r;
}

[[noreturn]] inline void stop(const char* why, const Place& place = {}) {
  const Block& b = block();
  const unsigned thread = b.self ? b.self->number : 0;
  std::fprintf(stderr, "emulated GPU: %s: block (%u, %u, %u), thread %u", why, b.index.x, b.index.y, b.index.z, thread);
  std::fprintf(stderr, place.line ? ", %s:%d\n" : "\n", place.file, place.line);
  std::abort();
}

inline void check_alignment(const void* at, int bytes, const char* what) {
  if (reinterpret_cast<std::uintptr_t>(at) % bytes) stop(what);
}

#ifdef MSFORMER_ADDRESS_SANITIZER
constexpr std::size_t STACK = 256 * 1024;  // frames are wider
#else
constexpr std::size_t STACK = 64 * 1024;
#endif
constexpr std::uint64_t STACK_END = 0x5ca1ab1e0ddba11;  // at the lowest address, which nothing should reach

#ifdef MSFORMER_SWITCH_BY_HAND
__attribute__((naked, noinline)) inline void swap(void** /*save*/, void* /*to*/) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
inline void switch_to_scheduler() { swap(&self().stack_pointer, block().scheduler); }
inline void switch_to(Fiber& f) { swap(&block().scheduler, f.stack_pointer); }
#else
inline void switch_to_scheduler() { swapcontext(&self().context, &block().main); }
inline void switch_to(Fiber& f) { swapcontext(&block().main, &f.context); }
#endif

#ifdef MSFORMER_ADDRESS_SANITIZER
inline void before_switch(void** fake_stack, const void* stack, std::size_t size) {
  __sanitizer_start_switch_fiber(fake_stack, stack, size);
}
inline void after_switch(void* fake_stack, const void** from, std::size_t* size) {
  __sanitizer_finish_switch_fiber(fake_stack, from, size);
}
#else
inline void before_switch(void**, const void*, std::size_t) {}
inline void after_switch(void*, const void**, std::size_t*) {}
#endif

inline void leave() {
  Block& b = block();
  Fiber& f = *b.self;
  before_switch(f.state == State::done ? nullptr : &f.fake_stack, b.scheduler_stack, b.scheduler_stack_size);
  switch_to_scheduler();
  after_switch(f.fake_stack, &b.scheduler_stack, &b.scheduler_stack_size);
}
inline void enter(Fiber& f) {
  Block& b = block();
  b.self = &f;
  before_switch(&b.scheduler_fake_stack, f.stack.get(), STACK);
  switch_to(f);
  after_switch(b.scheduler_fake_stack, nullptr, nullptr);
  std::uint64_t end;
  std::memcpy(&end, f.stack.get(), sizeof(end));
  if (end != STACK_END) stop("a thread with more on its stack than the emulation has room for");
}

inline void run_fiber() {
  after_switch(nullptr, &block().scheduler_stack, &block().scheduler_stack_size);
  block().body(block().argument);
  self().state = State::done;
  block().alive--;
  leave();
}

constexpr int INVALID_CONFIGURATION = 9;  // cudaErrorInvalidConfiguration
constexpr int OUT_OF_MEMORY = 2;          // cudaErrorMemoryAllocation

inline void prepare(Fiber& f) {
  if (!f.stack) f.stack.reset(new char[STACK]);
  std::memcpy(f.stack.get(), &STACK_END, sizeof(STACK_END));
#ifdef MSFORMER_SWITCH_BY_HAND
  const auto top = (reinterpret_cast<std::uintptr_t>(f.stack.get()) + STACK) & ~std::uintptr_t(15);
  void** at = reinterpret_cast<void**>(top) - 2;  // at its entry a function finds the stack 8 off a multiple of 16
  *at = reinterpret_cast<void*>(&run_fiber);
  f.stack_pointer = at - 6;
#else
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack.get();
  f.context.uc_stack.ss_size = STACK;
  f.context.uc_link = nullptr;
  makecontext(&f.context, reinterpret_cast<void (*)()>(run_fiber), 0);
#endif
}

inline int number_from_environment(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text && *text ? std::atoi(text) : otherwise;
}
inline int order() { return number_from_environment("MSFORMER_EMULATE_ORDER", 0); }

[[noreturn]] inline void stop_at_barrier() {
  Block& b = block();
  for (Fiber& f : b.fibers) {
    if (f.state == State::done) continue;
    b.self = &f;
    if (f.state == State::at_block) stop("a barrier of the block that not all threads reach", f.barrier);
    stop("a barrier of the warp that not all lanes reach");
  }
  stop("no thread can go on");
}

// Threads of the barrier go on; those that have ended are not waited for.
inline void open_barrier() {
  Block& b = block();
  const Fiber* first = nullptr;
  for (Fiber& f : b.fibers) {
    if (f.state != State::at_block) continue;
    if (!first) first = &f;
    b.self = &f;
    if (f.barrier != first->barrier) stop("a barrier of the block that not all threads reach", f.barrier);
    f.state = State::ready;
  }
  b.at_barrier = 0;
}

inline void run_block(int order) {
  Block& b = block();
  const int count = static_cast<int>(b.fibers.size()), warps = static_cast<int>(b.warps.size());
  std::mt19937 random(order + b.index.x);
  for (Warp& w : b.warps) w.arrived = 0;
  for (Fiber& f : b.fibers) {
    f.state = State::ready;
    f.turn = 0;
    f.open.clear();
    f.groups.clear();
    prepare(f);
  }
  b.alive = count;
  b.at_barrier = 0;
  while (b.alive) {
    bool moved = false;
    const int shift = order > 1 ? static_cast<int>(random() % warps) : 0;
    for (int t = 0; t < warps; t++) {
      const int w = order == 1 ? warps - 1 - t : (t + shift) % warps;
      const int first = 32 * w, last = std::min(first + 32, count);
      for (bool again = true; again;) {
        again = false;
        for (int i = first; i < last; i++) {
          Fiber& f = b.fibers[order == 1 ? last - 1 - (i - first) : i];
          if (f.state == State::ready) {
            again = moved = true;
            enter(f);
          }
        }
      }
    }
    if (b.at_barrier && b.at_barrier == b.alive) {
      open_barrier();
      moved = true;
    }
    if (!moved) stop_at_barrier();
  }
  for (Fiber& f : b.fibers)
    if (!f.open.empty() || !f.groups.empty()) {
      b.self = &f;
      stop("a copy that is never waited for");
    }
}

inline void sync_block(Place place) {
  self().state = State::at_block;
  self().barrier = place;
  block().at_barrier++;
  leave();
}

// All lanes of the mask; the last one to come runs `last`.
template <class Last>
void meet(std::uint32_t mask, Last last) {
  Fiber& f = self();
  Warp& w = *f.warp;
  if (!(mask >> f.lane & 1)) stop("a lane outside its own mask");
  if (w.arrived && w.mask != mask) stop("lanes of a warp that meet with different masks");
  w.mask = mask;
  if (++w.arrived < __builtin_popcount(mask)) {
    f.state = State::at_warp;
    leave();
    return;
  }
  w.arrived = 0;
  last();
  Fiber* lanes = &f - f.lane;
  for (int i = 0; i < 32; i++)
    if ((mask >> i & 1) && lanes[i].state == State::at_warp) lanes[i].state = State::ready;
}

inline std::uint32_t (*give(const void* what, std::size_t bytes))[8] {
  Fiber& f = self();
  auto* buffer = f.warp->given[f.turn++ & 1];
  std::memcpy(buffer[f.lane], what, bytes);
  return buffer;
}

template <class T>
T exchange(std::uint32_t mask, T value, int from) {
  static_assert(sizeof(T) <= 32);
  auto* buffer = give(&value, sizeof(T));
  meet(mask, [] {});
  T found;
  std::memcpy(&found, buffer[from & 31], sizeof(T));
  return found;
}

}  // namespace msformer::emulated

#define threadIdx (::msformer::emulated::self().index)
#define blockIdx (::msformer::emulated::block().index)
#define blockDim (::msformer::emulated::block().size)
#define gridDim (::msformer::emulated::block().grid)

namespace msformer {

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulated::sync_block({file, line});
}
inline void __syncwarp(std::uint32_t mask = ~0u) {
  emulated::meet(mask, [] {});
}
template <class T>
T __shfl_sync(std::uint32_t mask, T value, int lane) {
  return emulated::exchange(mask, value, lane);
}
template <class T>
T __shfl_xor_sync(std::uint32_t mask, T value, int bits) {
  return emulated::exchange(mask, value, emulated::self().lane ^ bits);
}
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }

using std::max;
using std::min;

namespace gpu {

struct bf16 {
  std::uint16_t bits;
};
struct f16 {
  std::uint16_t bits;
};

inline unsigned bits_of(float x) {
  unsigned u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline float float_of(unsigned u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return float_of(static_cast<unsigned>(x.bits) << 16); }
inline float to_float(f16 x) {
  const unsigned sign = (x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  if (exponent == 31) return float_of(sign | 0x7f800000u | mantissa << 13);
  if (exponent) return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
  const float small = static_cast<float>(mantissa) * 0x1p-24f;
  return sign ? -small : small;
}
template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  const unsigned u = bits_of(x);
  if (x != x) return {0x7fff};
  return {static_cast<std::uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
template <>
inline f16 from_float<f16>(float x) {
  const auto sign = static_cast<std::uint16_t>(bits_of(x) >> 16 & 0x8000);
  const float size = std::fabs(x);
  if (x != x) return {0x7fff};
  if (size >= 65520.0f) return {static_cast<std::uint16_t>(sign | 0x7c00)};
  if (size < 0x1p-14f)  // nearbyint rounds ties to even
    return {static_cast<std::uint16_t>(sign | static_cast<unsigned>(std::nearbyint(size * 0x1p24f)))};
  const unsigned u = bits_of(size);
  return {static_cast<std::uint16_t>(sign | ((u + 0xfff + (u >> 13 & 1)) - (112u << 23)) >> 13)};
}

inline unsigned pack_bf16(float x, float y) {
  return from_float<bf16>(x).bits | static_cast<unsigned>(from_float<bf16>(y).bits) << 16;
}
inline float multiply(float a, float b) { return a * b; }

template <class T>
T read(const T* from) {
  emulated::check_alignment(from, alignof(T), "a misaligned read");
  emulated::traffic().count(from, sizeof(T), true);
  return *from;
}
template <class T>
void write(T* to, T value) {
  emulated::check_alignment(to, alignof(T), "a misaligned write");
  emulated::traffic().count(to, sizeof(T), false);
  *to = value;
}

template <int BYTES>
void copy(void* to, const void* from) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  emulated::check_alignment(to, BYTES, "a misaligned target of a copy");
  emulated::check_alignment(from, BYTES, "a misaligned source of a copy");
  emulated::traffic().count(from, BYTES, true);
  std::memset(to, 0xff, BYTES);
  emulated::self().open.push_back({to, from, BYTES});
}
inline void commit() {
  auto& f = emulated::self();
  f.groups.push_back(std::move(f.open));
  f.open.clear();
}
template <int GROUPS_LEFT>
void wait() {
  auto& f = emulated::self();
  while (static_cast<int>(f.groups.size()) > GROUPS_LEFT) {
    for (const auto& c : f.groups.front()) std::memcpy(c.to, c.from, c.bytes);
    f.groups.erase(f.groups.begin());
  }
}

template <bool TRANSPOSED>
void load_matrices(unsigned (&r)[4], const void* row) {
  emulated::check_alignment(row, 16, "a misaligned row of ldmatrix");
  const int side = emulated::self().turn & 1;
  auto* given = emulated::give(&row, sizeof(row));
  emulated::Warp& w = *emulated::self().warp;
  emulated::meet(~0u, [&] {
    for (int j = 0; j < 4; j++) {
      std::uint16_t m[8][8];
      for (int i = 0; i < 8; i++) {
        const void* p;
        std::memcpy(&p, given[8 * j + i], sizeof(p));
        std::memcpy(m[i], p, 16);
      }
      for (int l = 0; l < 32; l++) {
        const int i = l / 4, k = l % 4 * 2;
        w.made[side][l][j] = TRANSPOSED ? m[k][i] | unsigned(m[k + 1][i]) << 16 : m[i][k] | unsigned(m[i][k + 1]) << 16;
      }
    }
  });
  std::memcpy(r, w.made[side][emulated::self().lane], 16);
}

// To the nearest number with 10 bits behind the leading one, ties away from zero; not finite stays so.
inline float round_to_tf32(float x) {
  const unsigned u = bits_of(x);
  return (u & 0x7f800000u) == 0x7f800000u ? x : float_of((u + 0x1000u) & 0xffffe000u);
}

inline float cut_off(double x) {
  const float nearest = static_cast<float>(x);
  return std::isfinite(nearest) && std::fabs(static_cast<double>(nearest)) > std::fabs(x)
             ? std::nextafter(nearest, 0.0f)
             : nearest;
}

// K values of a row of A; PACKED of them in a register.
template <int K, int PACKED, class Value>
void multiply_add_by_hand(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, Value value) {
  const unsigned all[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const int side = emulated::self().turn & 1;
  auto* given = emulated::give(all, sizeof(all));
  emulated::Warp& w = *emulated::self().warp;
  emulated::meet(~0u, [&] {  // the last lane multiplies for the warp
    float left[16][K], right[K][8];
    double sum[16][8] = {};
    for (int l = 0; l < 32; l++)
      for (int e = 0; e < PACKED; e++) {
        const int k = l % 4 * PACKED + e;
        for (int q = 0; q < 4; q++) left[l / 4 + q % 2 * 8][k + q / 2 * (K / 2)] = value(given[l][q], e);
        for (int q = 0; q < 2; q++) right[k + q * (K / 2)][l / 4] = value(given[l][4 + q], e);
      }
    for (int i = 0; i < 16; i++)
      for (int k = 0; k < K; k++)
        for (int j = 0; j < 8; j++) sum[i][j] += static_cast<double>(left[i][k]) * right[k][j];
    for (int l = 0; l < 32; l++)
      for (int q = 0; q < 4; q++) w.sum[side][l][q] = sum[l / 4 + q / 2 * 8][l % 4 * 2 + q % 2];
  });
  // products are exact, and so is their sum to many bits; it is cut off, not rounded, to a float (Fasi et al.,
  // "Numerical behavior of NVIDIA tensor cores", 2021)
  for (int q = 0; q < 4; q++) d[q] = cut_off(d[q] + w.sum[side][emulated::self().lane][q]);
}
inline void multiply_add(bf16, float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  multiply_add_by_hand<16, 2>(
      d, a, b0, b1, [](unsigned r, int e) { return to_float(bf16{static_cast<std::uint16_t>(r >> 16 * e)}); });
}
inline void multiply_add(f16, float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  multiply_add_by_hand<16, 2>(d, a, b0, b1,
                              [](unsigned r, int e) { return to_float(f16{static_cast<std::uint16_t>(r >> 16 * e)}); });
}
// As the tensor cores do: of a float the upper 19 bits count, the others are cut off.
inline void multiply_add(float, float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  multiply_add_by_hand<8, 1>(d, a, b0, b1, [](unsigned r, int) { return float_of(r & 0xffffe000u); });
}

// MSFORMER_EMULATE_SHARED_KB: as on a GPU with that much, e.g. 99 (sm_86, sm_89) or 163 (sm_80).
inline int most_shared() { return emulated::number_from_environment("MSFORMER_EMULATE_SHARED_KB", 227) * 1024; }
// MSFORMER_EMULATE_PROCESSORS: how many multiprocessors work is split for.
inline int processors() { return emulated::number_from_environment("MSFORMER_EMULATE_PROCESSORS", 2); }

template <auto kernel, class Arguments>
int launch(dim3 grid, int threads, int shared, void* /*stream*/, const Arguments& arguments) {
  using namespace emulated;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return 0;
  if (threads < 1 || threads > 1024 || shared > most_shared() || grid.y > 65535 || grid.z > 65535)
    return INVALID_CONFIGURATION;
  if (recorder().on) {
    recorder().launches.push_back({__PRETTY_FUNCTION__, grid, threads, shared});
    return 0;
  }
  Block& b = block();
  b.grid = grid;
  b.size = dim3(threads);
  if (static_cast<int>(b.fibers.size()) != threads) {
    b.fibers.clear();
    b.fibers.resize(threads);
  }
  b.warps.resize((threads + 31) / 32);
  for (int i = 0; i < threads; i++) {
    Fiber& f = b.fibers[i];
    f.number = i;
    f.lane = i % 32;
    f.warp = &b.warps[i / 32];
    f.index = dim3(i, 0, 0);
  }
  b.body = [](void* a) { kernel(*static_cast<const Arguments*>(a)); };
  b.argument = const_cast<Arguments*>(&arguments);
  traffic().seen_read.clear();
  traffic().seen_written.clear();
  // exactly as much as was asked for: a sanitizer sees what lies beyond
  void* allocated = nullptr;
  if (posix_memalign(&allocated, 128, shared)) return OUT_OF_MEMORY;
  std::unique_ptr<void, void (*)(void*)> memory(allocated, std::free);
  b.shared = static_cast<unsigned char*>(allocated);
  const int how = order();
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        std::memset(b.shared, 0xff, shared);
        b.index = dim3(x, y, z);
        run_block(how);
      }
  b.shared = nullptr;
  return 0;
}

}  // namespace gpu
}  // namespace msformer
