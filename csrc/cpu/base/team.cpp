// Compiled once, for any processor.
#include "team.h"

#include <initializer_list>

#include "fork.h"

#ifndef _WIN32
#include <dlfcn.h>
#endif

namespace msformer {

#ifndef _WIN32

namespace {

struct Runtime {
  void (*parallel)(void (*work)(void*), void* data, unsigned threads, unsigned flags) = nullptr;
  int (*in_parallel)() = nullptr;

  bool take_from(void* library) {
    parallel = reinterpret_cast<decltype(parallel)>(dlsym(library, "GOMP_parallel"));
    in_parallel = reinterpret_cast<decltype(in_parallel)>(dlsym(library, "omp_in_parallel"));
    return parallel && in_parallel;
  }
};

constexpr const char* kNames[] = {"libgomp.so.1", "libomp.so.5", "libomp.so", "libiomp5.so", "libomp.dylib"};

// PyTorch loads its runtime for all to see. Where it does not, one that is there comes before one that is not.
Runtime find() {
  Runtime runtime;
  if (runtime.take_from(RTLD_DEFAULT)) return runtime;
  for (int how : {RTLD_NOW | RTLD_NOLOAD, RTLD_NOW})
    for (const char* name : kNames) {
      void* library = dlopen(name, how);
      if (library && runtime.take_from(library)) return runtime;
    }
  return {};
}

// when the first kernel needs it: PyTorch is there by then
const Runtime& runtime() {
  static const Runtime once = find();
  return once;
}

}  // namespace

bool run_on_team(int threads, void (*work)(void*), void* data) {
  const Runtime& r = runtime();
  if (!r.parallel || r.in_parallel() || !threads_may_be_used()) return false;
  r.parallel(work, data, static_cast<unsigned>(threads), 0);
  return true;
}

const char* thread_library() {
  Dl_info found;
  if (!runtime().parallel || !dladdr(reinterpret_cast<void*>(runtime().parallel), &found)) return nullptr;
  return found.dli_fname;
}

#else

bool run_on_team(int, void (*)(void*), void*) { return false; }
const char* thread_library() { return nullptr; }

#endif

}  // namespace msformer
