// Products of the tile engine, for the unit that this file is compiled with.
#include "../../../../csrc/cpu/engine/dense.h"

using namespace msformer;
using namespace msformer::MSFORMER_VARIANT;

#define MSFORMER_JOIN(a, b) a##b
#define MSFORMER_NAME(a, b) MSFORMER_JOIN(a, b)

// c [rows, n] += a [rows, k] b [k, n], once by each way that the engine has; k and n are whole vectors apart in memory
extern "C" void MSFORMER_NAME(multiply_, MSFORMER_VARIANT)(int parts, std::int64_t rows, std::int64_t k, std::int64_t n,
                                                           const float* a, const float* a_transposed, const float* b,
                                                           float* c) {
  const Tiles tiles{parts};
  const std::int64_t lda = padded<float>(k), ldt = padded<float>(rows), ldb = padded<float>(n);
  Workspace memory(2 * static_cast<std::size_t>(tiles.packed_size(k, ldb)));
  auto* packed = static_cast<std::uint16_t*>(memory.data());
  tiles.pack(1, packed, b, ldb, 1, k, n);
  tiles.multiply(rows, k, ldb, a, lda, packed, Start::output, nullptr, {c, ldb});
  tiles.add_transposed(rows, k, ldb, a_transposed, ldt, b, ldb, {c, ldb});
  dense(tiles, 2, rows, k, ldb, Operand<float>{a, lda, 1}, Matrix<float>{b, ldb}, Start::output, nullptr,
        Output<float>{c, ldb});
}
