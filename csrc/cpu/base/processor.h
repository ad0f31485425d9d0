// What this processor has, and what the operating system keeps of it.
#pragma once

namespace msformer {

// Whether there is a feature of x86, as variants.py names it, and the operating system keeps its registers. Asked of
// the processor itself: __builtin_cpu_supports says no to everything in what zig links.
bool processor_has(const char* feature);

// The state that the operating system keeps when threads change, as xgetbv says it; 0 where it does not say.
unsigned kept_state();

}  // namespace msformer
