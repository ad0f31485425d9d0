// Which variant of the CPU code this machine runs.
#pragma once

#include <vector>

#include "abi.h"

namespace msformer {

struct Variant {
  const char* name;
  const Kernels* kernels;
};

// best first
const std::vector<Variant>& usable_variants();

// the one that MSFORMER_CPU_ISA names, else the best; throws std::invalid_argument for one that is not usable
const Variant& chosen_variant();

}  // namespace msformer
