// Whether threads may be used: not in the child of a fork.
#pragma once

namespace msformer {

// False in a child that was forked from a process with several threads. OpenMP's are gone there, but libgomp waits for
// them, for ever. A child of a process with one thread starts threads of its own.
bool threads_may_be_used();

}  // namespace msformer
