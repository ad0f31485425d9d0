// The threads of the kernels: those of the OpenMP runtime that is in the process already, PyTorch's.
//
// The module names no runtime of its own. A second one would bring a second set of threads, which wait for work on the
// same cores, and each of libgomp, libomp and libiomp5 has the entry point that is called. So one build works beside
// every PyTorch, whatever compiler made it.
#pragma once

namespace msformer {

// Runs work(data) once on each of `threads` threads, the calling one among them, and returns when all are done. False,
// and nothing is run, where there are no threads for it: in a parallel region already, in the child of a fork (fork.h),
// or without a runtime.
bool run_on_team(int threads, void (*work)(void*), void* data);

// The file of the runtime; null where there is none and the kernels run on one thread.
const char* thread_library();

}  // namespace msformer
