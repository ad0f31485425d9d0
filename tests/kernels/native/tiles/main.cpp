// The instructions of AMX, on hardware or trapped, beside their emulation: products of the tile engine by both must
// have the same bits.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

#include "../../../../csrc/cpu/base/memory.h"
#include "../../../../csrc/cpu/base/tile_permission.h"
#include "trap.h"

#define MSFORMER_DECLARE(name)                                                                       \
  extern "C" void name(int parts, std::int64_t rows, std::int64_t k, std::int64_t n, const float* a, \
                       const float* a_transposed, const float* b, float* c);
MSFORMER_DECLARE(multiply_checked_amx)
MSFORMER_DECLARE(multiply_checked_emulation)

namespace {

constexpr std::int64_t kSide = 96;

struct Matrices {
  msformer::Workspace memory{sizeof(float) * 5 * kSide * kSide};
  float* matrix(int i) const { return static_cast<float*>(memory.data()) + i * kSide * kSide; }
};

std::int64_t padded(std::int64_t n) { return (n + 15) / 16 * 16; }

bool is_equal(int parts, std::int64_t rows, std::int64_t k, std::int64_t n, const Matrices& m, std::mt19937& random) {
  std::normal_distribution<float> normal;
  float *a = m.matrix(0), *transposed = m.matrix(1), *b = m.matrix(2), *found = m.matrix(3), *expected = m.matrix(4);
  std::memset(a, 0, sizeof(float) * 5 * kSide * kSide);
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t p = 0; p < k; ++p)
      transposed[p * padded(rows) + i] = a[i * padded(k) + p] = std::ldexp(normal(random), static_cast<int>(i % 3) * 4);
  for (std::int64_t p = 0; p < k; ++p)
    for (std::int64_t j = 0; j < n; ++j) b[p * padded(n) + j] = normal(random);
  if (rows > 2 && k > 2 && n > 2) {
    transposed[0] = a[0] = INFINITY;
    transposed[padded(rows) + 1] = a[padded(k) + 1] = 1e-40f;
    b[1] = NAN;
    b[2] = 0x1p-126f;
  }
  multiply_checked_amx(parts, rows, k, n, a, transposed, b, found);
  multiply_checked_emulation(parts, rows, k, n, a, transposed, b, expected);
  for (std::int64_t i = 0; i < rows * padded(n); ++i)
    if (std::memcmp(found + i, expected + i, sizeof(float)) != 0 && !(std::isnan(found[i]) && std::isnan(expected[i])))
      return false;
  return true;
}

}  // namespace

int main() {
  const bool hardware = msformer::tiles_are_permitted();
  if (!hardware) trap_tile_instructions();
  std::mt19937 random(0);
  Matrices matrices;
  int failed = 0, cases = 0;
  const std::int64_t sizes[][3] = {{1, 1, 1}, {16, 32, 16}, {17, 33, 17}, {49, 70, 40}, {40, 96, 33}, {5, 20, 66}};
  for (int parts = 1; parts <= 3; ++parts)
    for (const auto& size : sizes) {
      ++cases;
      if (is_equal(parts, size[0], size[1], size[2], matrices, random) && tiles_are_released()) continue;
      ++failed;
      std::printf("other bits: %d parts, %ld x %ld x %ld\n", parts, static_cast<long>(size[0]),
                  static_cast<long>(size[1]), static_cast<long>(size[2]));
    }
  std::printf("%d products, %d with other bits, %s\n", cases, failed,
              hardware                 ? "on hardware"
              : trapped_instructions() ? "trapped"
                                       : "nothing was executed");
  return failed != 0;
}
