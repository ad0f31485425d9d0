// Compiled once, for any processor.
#include "fork.h"

#ifdef __linux__
#include <dirent.h>
#include <pthread.h>

#include <atomic>
#endif

namespace msformer {

#ifdef __linux__

namespace {

std::atomic<bool> forks_with_threads{false}, lost_threads{false};

// entries of the folder: "." and "..", and one a thread
bool has_threads() {
  DIR* folder = opendir("/proc/self/task");
  if (!folder) return true;
  int entries = 0;
  while (readdir(folder)) ++entries;
  closedir(folder);
  return entries > 3;
}

void before_fork() { forks_with_threads = has_threads(); }

void in_child() {
  if (forks_with_threads) lost_threads = true;
}

[[maybe_unused]] const int registered = pthread_atfork(before_fork, nullptr, in_child);

}  // namespace

bool threads_may_be_used() { return !lost_threads.load(std::memory_order_relaxed); }

#else  // OpenMP of LLVM, as macOS has it, starts anew in a child

bool threads_may_be_used() { return true; }

#endif

}  // namespace msformer
