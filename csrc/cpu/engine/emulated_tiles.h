// What amx.h does, in plain C++, for tests on machines without it: the same operands and the same sums, bit for bit, as
// Intel's manual gives them for TDPBF16PS. Values at even and at odd places along k are summed apart, with a fused
// multiply-add each, then both sums are added, and that to the tile. Subnormal numbers count as zero everywhere.
#pragma once

#include "../base/vectors.h"

namespace msformer::MSFORMER_VARIANT {

class EmulatedTiles {
 public:
  static constexpr bool kAlways = true;

  void configure(int first, int second) { *this = EmulatedTiles(first, second ? second : 1); }
  EmulatedTiles() = default;

  template <int SUM>
  void clear() {
    for (auto& row : sums_[SUM]) row = Vector<float>{};
  }
  template <int SUM>
  void load_sum(const float* from, std::int64_t leading) {
    for (int i = 0; i < rows_[SUM / 2]; ++i) sums_[SUM][i] = load_unaligned(from + i * leading);
  }
  template <int SUM>
  void store_sum(float* to, std::int64_t leading) {
    for (int i = 0; i < rows_[SUM / 2]; ++i) store_unaligned(to + i * leading, sums_[SUM][i]);
  }
  template <int ROW>
  void load_left(const std::uint16_t* from, std::int64_t leading) {
    for (int i = 0; i < rows_[ROW]; ++i) std::memcpy(left_[ROW][i], from + i * leading, 64);
  }
  template <int COLUMN>
  void load_right(const std::uint16_t* tile) {
    for (int i = 0; i < 16; ++i) {
      Bits pairs;
      std::memcpy(&pairs, tile + 32 * i, sizeof pairs);
      right_[COLUMN][2 * i] = without_subnormals(reinterpret_cast<Vector<float>>(pairs << 16));
      right_[COLUMN][2 * i + 1] = without_subnormals(reinterpret_cast<Vector<float>>(pairs & 0xffff0000u));
    }
  }
  template <int ROW, int COLUMN>
  void multiply_add() {
    for (int i = 0; i < rows_[ROW]; ++i) {
      Vector<float> even{}, odd{};
      for (int k = 0; k < 32; k += 2) {
        even = without_subnormals(even + left_value(left_[ROW][i][k]) * right_[COLUMN][k]);
        odd = without_subnormals(odd + left_value(left_[ROW][i][k + 1]) * right_[COLUMN][k + 1]);
      }
      Vector<float>& sum = sums_[2 * ROW + COLUMN][i];
      sum = without_subnormals(without_subnormals(sum) + without_subnormals(even + odd));
    }
  }

 private:
  typedef Simd<float>::Bits Bits;
  EmulatedTiles(int first, int second) : rows_{first, second} {}

  static Vector<float> without_subnormals(Vector<float> x) { return vabs(x) < 0x1p-126f ? x * 0.0f : x; }
  static Vector<float> left_value(std::uint16_t x) {
    const std::uint32_t bits = (x & 0x7f80u) ? x : x & 0x8000u;
    float value;
    const std::uint32_t wide = bits << 16;
    std::memcpy(&value, &wide, sizeof value);
    return splat(value);
  }

  int rows_[2] = {};
  Vector<float> sums_[4][16] = {};
  std::uint16_t left_[2][16][32] = {};
  Vector<float> right_[2][32] = {};
};

}  // namespace msformer::MSFORMER_VARIANT
