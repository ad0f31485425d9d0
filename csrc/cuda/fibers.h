// The threads of a block as fibers, one block after the other: how they are switched, wait for each other and exchange
// values, and what the emulation of a GPU (emulated.h) keeps of them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
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
