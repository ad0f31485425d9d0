#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/base/processor.h"
#include "cpu/base/tile_permission.h"

// made by setup.py: MSFORMER_FOR_EACH_VARIANT(X) is X(name, whether this processor has it) for each, best first
#include "variants.h"

#define MSFORMER_DECLARE(name, Arguments) \
  void name##_forward(const Arguments&);  \
  void name##_backward(const Arguments&);
#define MSFORMER_ENTRIES(name, Arguments) name##_forward, name##_backward,
#define MSFORMER_VARIANT_KERNELS(variant, usable)                          \
  namespace msformer::variant {                                            \
  MSFORMER_FOR_EACH_OPERATOR(MSFORMER_DECLARE)                             \
  constexpr Kernels kernels{MSFORMER_FOR_EACH_OPERATOR(MSFORMER_ENTRIES)}; \
  }
MSFORMER_FOR_EACH_VARIANT(MSFORMER_VARIANT_KERNELS)

namespace msformer {

const std::vector<Variant>& usable_variants() {
  static const std::vector<Variant> list = [] {
    std::vector<Variant> found;
#define MSFORMER_ADD(variant, usable) \
  if (usable) found.push_back({#variant, &variant::kernels});
    MSFORMER_FOR_EACH_VARIANT(MSFORMER_ADD)
#undef MSFORMER_ADD
    return found;
  }();
  return list;
}

const Variant& chosen_variant() {
  const char* wanted = std::getenv("MSFORMER_CPU_ISA");
  if (!wanted || !*wanted) return usable_variants().front();
  std::string known;
  for (const Variant& variant : usable_variants()) {
    if (variant.name == std::string(wanted)) return variant;
    known += (known.empty() ? "" : ", ") + std::string(variant.name);
  }
  throw std::invalid_argument("unknown or unsupported instruction set '" + std::string(wanted) +
                              "'; this machine has: " + known);
}

}  // namespace msformer
