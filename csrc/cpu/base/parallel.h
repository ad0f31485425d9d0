// A parallel loop over independent tasks, and scratch memory for them.
//
// Which thread runs a task never matters for the result: each task writes its own output or its own partial sum, and
// partial sums are combined in an order that depends on the shape alone. Results are bit for bit the same on any number
// of threads.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "fork.h"
#include "memory.h"
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

// Runs task(i, scratch) for every i below count. Scratch is the thread's own; a task that starts a loop of its own must
// not use it afterwards. A loop that needs no team opens no parallel region at all: one inside it would count as
// nested, and OpenMP starts new threads for nested teams.
template <class Task>
void parallel_for(std::int64_t count, int num_threads, std::size_t scratch_bytes, const Task& task) {
#ifdef _OPENMP
  if (num_threads > 1 && count > 1 && !omp_in_parallel() && threads_may_be_used()) {
    const int team = static_cast<int>(min_of<std::int64_t>(num_threads, count));
    bool out_of_memory = false;
#pragma omp parallel num_threads(team)
    {
      void* scratch = thread_scratch(scratch_bytes);
      if (!scratch) {
#pragma omp atomic write
        out_of_memory = true;
      }
#pragma omp for schedule(dynamic, 1)
      for (std::int64_t i = 0; i < count; ++i)
        if (scratch) task(i, scratch);
    }
    if (out_of_memory) throw_out_of_memory();
    return;
  }
#endif
  void* scratch = thread_scratch(scratch_bytes);
  if (!scratch) throw_out_of_memory();
  for (std::int64_t i = 0; i < count; ++i) task(i, scratch);
}

}  // namespace msformer::MSFORMER_VARIANT
