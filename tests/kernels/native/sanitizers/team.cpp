// In place of csrc/cpu/base/team.cpp: a team is made of new threads and ends with its loop, so ThreadSanitizer sees
// every wait. libgomp waits by system calls of its own, which the sanitizer does not know: each handover of data would
// look like a race.
#include "../../../../csrc/cpu/base/team.h"

#include <thread>
#include <vector>

#include "../../../../csrc/cpu/base/fork.h"

namespace msformer {

namespace {
thread_local bool in_team = false;
}

bool run_on_team(int threads, void (*work)(void*), void* data) {
  if (in_team || !threads_may_be_used()) return false;
  const auto run = [&] {
    in_team = true;
    work(data);
    in_team = false;
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(run);
  run();
  for (std::thread& other : others) other.join();
  return true;
}

const char* thread_library() { return nullptr; }

}  // namespace msformer
