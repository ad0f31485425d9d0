// Compiled once, for any processor.
#include "processor.h"

#include <cstring>
#include <stdexcept>
#include <string>

#ifdef __x86_64__
#include <cpuid.h>
#endif

namespace msformer {

#ifdef __x86_64__

namespace {

constexpr unsigned kAvxState = 0x6, kAvx512State = 0xe6;

struct Feature {
  const char* name;
  unsigned leaf, subleaf;
  int answer, bit;  // answer: eax, ebx, ecx, edx
  unsigned state;
};

constexpr Feature kFeatures[] = {
    {"fma", 1, 0, 2, 12, kAvxState},          {"avx2", 7, 0, 1, 5, kAvxState},
    {"avx512f", 7, 0, 1, 16, kAvx512State},   {"avx512dq", 7, 0, 1, 17, kAvx512State},
    {"avx512bw", 7, 0, 1, 30, kAvx512State},  {"avx512vl", 7, 0, 1, 31, kAvx512State},
    {"avx512bf16", 7, 1, 0, 5, kAvx512State},
};

}  // namespace

unsigned kept_state() {
  unsigned a, b, c, d;
  constexpr unsigned kSaysSo = 1u << 27;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kSaysSo)) return 0;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

bool processor_has(const char* feature) {
  for (const Feature& f : kFeatures) {
    if (std::strcmp(f.name, feature) != 0) continue;
    unsigned answers[4];
    if (!__get_cpuid_count(f.leaf, f.subleaf, &answers[0], &answers[1], &answers[2], &answers[3])) return false;
    return (answers[f.answer] >> f.bit & 1) && (kept_state() & f.state) == f.state;
  }
  throw std::invalid_argument(std::string("unknown feature of a processor: ") + feature);
}

#else

unsigned kept_state() { return 0; }
bool processor_has(const char*) { return false; }

#endif

}  // namespace msformer
