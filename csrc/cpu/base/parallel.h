// A parallel loop over independent tasks, and scratch memory for them.
//
// Which thread runs a task never matters for the result: each task writes its own output or its own partial sum, and
// partial sums are combined in an order that depends on the shape alone. Results are bit for bit the same on any number
// of threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "memory.h"
#include "team.h"
#include "vectors.h"

namespace msformer::MSFORMER_VARIANT {

// Hands out pieces of one block, each aligned to 64 bytes. With a null base it only counts, so that the same code sizes
// a block and then divides it.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(std::int64_t count) {
    T* piece = reinterpret_cast<T*>(base_ + used_);
    used_ += (static_cast<std::size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return piece;
  }
  std::size_t used() const { return used_; }

 private:
  char* base_;
  std::size_t used_ = 0;
};

// What the threads of one loop share. Each takes the next task that nobody has, until none is left.
template <class Task>
struct Loop {
  const Task& task;
  std::int64_t count;
  std::size_t scratch_bytes;
  std::int64_t next = 0;
  bool out_of_memory = false;

  static void work(void* loop) { static_cast<Loop*>(loop)->work(); }
  void work() {
    void* scratch = thread_scratch(scratch_bytes);
    if (!scratch) return __atomic_store_n(&out_of_memory, true, __ATOMIC_RELAXED);
    for (;;) {
      const std::int64_t i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (i >= count) return;
      task(i, scratch);
    }
  }
};

// Runs task(i, scratch) for every i below count. Scratch is the thread's own; a task that starts a loop of its own must
// not use it afterwards. A loop that needs no team makes none: one within it would count as nested, and OpenMP starts
// new threads for nested teams.
template <class Task>
void parallel_for(std::int64_t count, int num_threads, std::size_t scratch_bytes, const Task& task) {
  Loop<Task> loop{task, count, scratch_bytes};
  const int team = static_cast<int>(min_of<std::int64_t>(num_threads, count));
  if (team < 2 || !run_on_team(team, Loop<Task>::work, &loop)) loop.work();
  if (loop.out_of_memory) throw_out_of_memory();
}

}  // namespace msformer::MSFORMER_VARIANT
