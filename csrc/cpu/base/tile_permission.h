// Whether this process may use the tiles of AMX. The processor has to have them, the operating system to keep their
// state, and Linux to give a permission, which is asked for once and holds for all threads and forked processes.
#pragma once

namespace msformer {

bool tiles_are_permitted();

// why not; null if they are, or if the processor has none
const char* why_tiles_are_refused();

}  // namespace msformer
