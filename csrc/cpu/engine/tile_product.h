// Products of operands in bfloat16 parts (parts.h) on tiles. MSFORMER_TILE_UNIT is the class that does the tile
// instructions.
//
// A block of C is two by two tiles, whose four sums stay in registers over the whole of k. Of three parts the small
// products come first, so that they are not rounded away beside the large ones. Sums within a tile instruction are of
// 16 products, so they round less than a chain of multiply-adds does.
#pragma once

#include "gemm.h"
#include "parts.h"

#define MSFORMER_STRING(name) #name
#define MSFORMER_FILE(name) MSFORMER_STRING(name)
#include MSFORMER_FILE(MSFORMER_TILE_HEADER)

namespace msformer::MSFORMER_VARIANT {

// Two rows and columns of tiles of C, of a left and a right operand.
class TileProduct {
 public:
  TileProduct(const PartLayout& layout, const LeftParts& left, const std::uint16_t* right)
      : layout_(layout), left_(left), right_(right) {}

  // rows and columns (in tiles) of C = start + A B
  void run(Range rows, Range columns, Start start, const float* bias, const Output<float>& c) {
    for (row_ = rows.begin; row_ < rows.end; row_ += 32) {
      const int first = static_cast<int>(min_of<std::int64_t>(16, rows.end - row_));
      const int second = static_cast<int>(min_of<std::int64_t>(16, rows.end - row_ - first));
      configure(first, second);
      for (column_ = columns.begin; column_ < columns.end; column_ += 2) {
        const bool two = column_ + 1 < columns.end;
        if (second)
          two ? block<2, 2>(start, bias, c) : block<2, 1>(start, bias, c);
        else
          two ? block<1, 2>(start, bias, c) : block<1, 1>(start, bias, c);
      }
    }
  }

 private:
  void configure(int first, int second) {
    if (first == first_ && second == second_) return;
    first_ = first;
    second_ = second;
    unit_.configure(first, second);
  }

  template <int ROWS, int COLUMNS>
  void block(Start start, const float* bias, const Output<float>& c) {
    if (layout_.parts > 1 || c.offsets) return buffered_block<ROWS, COLUMNS>(start, bias, c);
    // one part: what is added to need not be apart from the sums, whose error is that of the rounded operands
    const float* from = start == Start::output ? c.row(row_) + 16 * column_ : bias ? bias + 16 * column_ : nullptr;
    const std::int64_t leading = start == Start::output ? c.leading : 0;
    start == Start::zero ? clear<ROWS, COLUMNS>() : load_sums<ROWS, COLUMNS>(from, leading);
    sum<ROWS, COLUMNS>();
    store_sums<ROWS, COLUMNS>(c.row(row_) + 16 * column_, c.leading);
  }

  template <int ROWS, int COLUMNS>
  void buffered_block(Start start, const float* bias, const Output<float>& c) {
    constexpr std::int64_t kLeading = 32;
    alignas(64) float sums[32 * kLeading];
    clear<ROWS, COLUMNS>();
    sum<ROWS, COLUMNS>();
    store_sums<ROWS, COLUMNS>(sums, kLeading);
    const int rows = first_ + second_;
    if (layout_.parts > 1 && !all_finite<COLUMNS>(sums, rows)) keep_special_values(sums, kLeading, rows, 16 * COLUMNS);
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < 16 * COLUMNS; j += 16) {
        float* out = c.row(row_ + i) + 16 * column_ + j;
        const float* added = start == Start::output ? out : bias + 16 * column_ + j;
        const Vector<float> x = load(sums + i * kLeading + j);
        store(out, start == Start::zero ? x : x + load(added));
      }
  }

  template <int ROWS, int COLUMNS>
  void clear() {
    unit_.template clear<0>();
    if constexpr (COLUMNS > 1) unit_.template clear<1>();
    if constexpr (ROWS > 1) unit_.template clear<2>();
    if constexpr (ROWS > 1 && COLUMNS > 1) unit_.template clear<3>();
  }
  template <int ROWS, int COLUMNS>
  void load_sums(const float* from, std::int64_t leading) {
    unit_.template load_sum<0>(from, leading);
    if constexpr (COLUMNS > 1) unit_.template load_sum<1>(from + 16, leading);
    if constexpr (ROWS > 1) unit_.template load_sum<2>(from + 16 * leading, leading);
    if constexpr (ROWS > 1 && COLUMNS > 1) unit_.template load_sum<3>(from + 16 * leading + 16, leading);
  }
  template <int ROWS, int COLUMNS>
  void store_sums(float* to, std::int64_t leading) {
    unit_.template store_sum<0>(to, leading);
    if constexpr (COLUMNS > 1) unit_.template store_sum<1>(to + 16, leading);
    if constexpr (ROWS > 1) unit_.template store_sum<2>(to + 16 * leading, leading);
    if constexpr (ROWS > 1 && COLUMNS > 1) unit_.template store_sum<3>(to + 16 * leading + 16, leading);
  }

  template <int ROWS, int COLUMNS>
  void sum() {
    const int small = layout_.parts == 3 ? layout_.products - 1 : layout_.products;
    sum_products<ROWS, COLUMNS>(0, small);
    sum_products<ROWS, COLUMNS>(small, layout_.products);
    const std::int64_t leading = layout_.rest_leading();
    for (std::int64_t i = 0; i < layout_.rest_tiles; ++i) {
      load_left<ROWS>(left_.rest(row_) + i * PartLayout::kStep, leading);
      load_right<COLUMNS>(layout_.rest_tile(i));
      multiply_add<ROWS, COLUMNS>();
    }
  }

  // these products of parts, over the whole steps of k
  template <int ROWS, int COLUMNS>
  void sum_products(int begin, int end) {
    const PartProduct* products = part_products(layout_.parts);
    for (std::int64_t step = 0; step < layout_.steps && begin < end; ++step)
      for (int i = begin; i < end; ++i) {
        const PartProduct p = products[i];
        if (i == begin || p.left != products[i - 1].left)
          load_left<ROWS>(left_.part(p.left, row_) + step * PartLayout::kStep, layout_.leading());
        if (i == begin || p.right != products[i - 1].right)
          load_right<COLUMNS>((step * layout_.parts + p.right) * PartLayout::kTile);
        multiply_add<ROWS, COLUMNS>();
      }
  }

  template <int ROWS>
  void load_left(const std::uint16_t* from, std::int64_t leading) {
    unit_.template load_left<0>(from, leading);
    if constexpr (ROWS > 1) unit_.template load_left<1>(from + 16 * leading, leading);
  }
  template <int COLUMNS>
  void load_right(std::int64_t at) {
    const std::uint16_t* tile = right_ + column_ * layout_.right_stride() + at;
    unit_.template load_right<0>(tile);
    if constexpr (COLUMNS > 1) unit_.template load_right<1>(tile + layout_.right_stride());
  }
  template <int ROWS, int COLUMNS>
  void multiply_add() {
    unit_.template multiply_add<0, 0>();
    if constexpr (COLUMNS > 1) unit_.template multiply_add<0, 1>();
    if constexpr (ROWS > 1) unit_.template multiply_add<1, 0>();
    if constexpr (ROWS > 1 && COLUMNS > 1) unit_.template multiply_add<1, 1>();
  }

  template <int COLUMNS>
  static bool all_finite(const float* sums, int rows) {
    Simd<float>::Integer special{};
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < 16 * COLUMNS; j += 16)
        special |= reinterpret_cast<Simd<float>::Integer>(vabs(load(sums + 32 * i + j))) >= 0x7f800000;
    return horizontal_max<float>(__builtin_convertvector(-special, Vector<float>)) == 0.0f;
  }

  // Infinity is no sum of parts: what it leaves is NaN. A sum with an infinite or undefined term is that of the first
  // parts alone, which have the same infinities, NaN, zeros and signs.
  void keep_special_values(float* sums, std::int64_t leading, int rows, int columns) const {
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < columns; ++j) {
        float sum = 0;
        for (std::int64_t k = 0; k < layout_.k; ++k) sum += left_value(i, k) * right_value(j, k);
        const bool finite = __builtin_fabsf(sum) < __builtin_inff();
        if (!finite) sums[i * leading + j] = sum;
      }
  }

  // the first part of a value, of a row or column of the block
  float left_value(std::int64_t i, std::int64_t k) const {
    const std::int64_t rest = k - layout_.leading();
    return value(rest < 0 ? left_.part(0, row_ + i)[k]
                          : left_.rest(row_ + i)[layout_.rest_place(large_product(), rest)]);
  }
  float right_value(std::int64_t j, std::int64_t k) const {
    const std::uint16_t* columns = right_ + (column_ + j / 16) * layout_.right_stride();
    const std::int64_t rest = k - layout_.leading(), step = k / PartLayout::kStep;
    const std::int64_t place = rest < 0 ? k % PartLayout::kStep : layout_.rest_place(large_product(), rest);
    const std::int64_t tile = rest < 0 ? step * layout_.parts * PartLayout::kTile : layout_.rest_tile(0);
    return value(columns[tile + place / 2 * 32 + j % 16 * 2 + place % 2]);
  }
  int large_product() const { return layout_.parts == 2 ? 1 : layout_.products - 1; }
  static float value(std::uint16_t bits) { return to_float(BFloat16{bits}); }

  const PartLayout& layout_;
  const LeftParts& left_;
  const std::uint16_t* right_;
  std::int64_t row_ = 0, column_ = 0;
  int first_ = 0, second_ = 0;
  MSFORMER_TILE_UNIT unit_;
};

}  // namespace msformer::MSFORMER_VARIANT
