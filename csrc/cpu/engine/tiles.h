// The engine that multiplies on tiles of bfloat16: one part of every value for bfloat16 tensors, up to three for float
// ones.
#pragma once

#include "../base/parallel.h"
#include "tile_product.h"
#include "values.h"

namespace msformer::MSFORMER_VARIANT {

struct Tiles {
  using Value = float;
  using Element = std::uint16_t;

  int parts;

  PartLayout layout(std::int64_t k) const { return {parts, k}; }

  // values, in whole vectors, as the products take them
  void round_operands(float* values, std::int64_t count) const {
    for (std::int64_t i = 0; i < count; i += 16) {
      Vector<float> sum{};
      for_parts(parts, load(values + i), [&](int, PartBits bits) { sum += reinterpret_cast<Vector<float>>(bits); });
      store(values + i, sum);
    }
  }

  bool is_exact() const { return parts == 3; }
  bool is_bfloat16() const { return parts == 1; }

  std::int64_t packed_size(std::int64_t k, std::int64_t n_padded) const { return layout(k).right_size(n_padded); }

  template <class S>
  void pack(int num_threads, Element* out, const S* data, std::int64_t k_stride, std::int64_t n_stride, std::int64_t k,
            std::int64_t n) const {
    const PartLayout layout = this->layout(k);
    for_panels<float>(num_threads, k, n, [&](std::int64_t begin, std::int64_t width, std::int64_t filled) {
      float* panel = static_cast<float*>(operand_scratch(sizeof(float) * static_cast<std::size_t>(k * width)));
      pack_panel(panel, data + begin * n_stride, k_stride, n_stride, k, width, filled);
      for (std::int64_t j = 0; j < width; j += 16)
        fill_right(layout, panel + j, width, out + (begin + j) / 16 * layout.right_stride());
    });
  }

  void multiply(std::int64_t rows, std::int64_t k, std::int64_t n_padded, const float* a, std::int64_t lda,
                const Element* packed, Start start, const float* bias, const Output<float>& c) const {
    const PartLayout layout = this->layout(k);
    const LeftParts left(layout, rows, scratch(layout.left_size(rows)));
    for (std::int64_t i = 0; i < rows; ++i) left.fill_row(i, a + i * lda);
    TileProduct(layout, left, packed).run({0, rows}, {0, n_padded / 16}, start, bias, c);
  }

  void add_transposed(std::int64_t rows, std::int64_t tokens, std::int64_t n_padded, const float* a, std::int64_t lda,
                      const float* b, std::int64_t ldb, const Output<float>& c) const {
    const PartLayout layout = this->layout(tokens);
    Element* const memory = scratch(layout.right_size(n_padded) + layout.left_size(rows));
    const LeftParts left(layout, rows, memory + layout.right_size(n_padded));
    for (std::int64_t i = 0; i < rows; i += 16) left.fill_rows(i, a, lda);
    for (std::int64_t j = 0; j < n_padded; j += 16)
      fill_right(layout, b + j, ldb, memory + j / 16 * layout.right_stride());
    TileProduct(layout, left, memory).run({0, rows}, {0, n_padded / 16}, Start::output, nullptr, c);
  }

  // as those of Values
  using Left = LeftParts;
  using Right = const Element*;
  std::int64_t left_size(std::int64_t rows, std::int64_t k) const { return layout(k).left_size(rows); }
  std::int64_t right_size(std::int64_t k, std::int64_t n_padded) const { return packed_size(k, n_padded); }

  Left make_left(int num_threads, Element* memory, std::int64_t rows, std::int64_t k, const Operand<float>& a) const {
    const LeftParts left(layout(k), rows, memory);
    parallel_for((rows + 15) / 16, num_threads, 0, [&](std::int64_t block, void*) {
      const std::int64_t begin = 16 * block, end = min_of(rows, begin + 16);
      if (a.k_stride != 1) return left.fill_rows(begin, a.data, a.k_stride);
      for (std::int64_t i = begin; i < end; ++i) left.fill_row(i, a.data + i * a.row_stride);
    });
    return left;
  }

  Right make_right(int num_threads, Element* right, std::int64_t k, const Panels& panels,
                   const Matrix<float>& b) const {
    const PartLayout layout = this->layout(k);
    parallel_for(panels.count, num_threads, 0, [&](std::int64_t i, void*) {
      const std::int64_t begin = panels.begin(i), end = panels.begin(i + 1);
      const float* panel = b.leading ? b.data + 16 * begin : b.data + 16 * begin * k;
      for (std::int64_t j = begin; j < end; ++j)
        fill_right(layout, panel + 16 * (j - begin), b.leading ? b.leading : 16 * (end - begin),
                   right + j * layout.right_stride());
    });
    return right;
  }
  static Right packed_right(const Element* packed) { return packed; }

  void product(int num_threads, std::int64_t rows, Range panel_range, std::int64_t k, const Panels& panels,
               const Left& a, Right b, Start start, const float* bias, const Output<float>& c) const {
    const PartLayout layout = this->layout(k);
    const std::int64_t first = panels.begin(panel_range.begin);
    multiply_parts(num_threads, layout, a, b + first * layout.right_stride(), rows,
                   panels.begin(panel_range.end) - first, start, bias ? bias + 16 * first : nullptr,
                   {c.data + 16 * first, c.leading, c.offsets});
  }

 private:
  // all threads on parts of C, in whole blocks of two tiles by two
  static void multiply_parts(int num_threads, const PartLayout& layout, const LeftParts& left, const Element* right,
                             std::int64_t rows, std::int64_t columns, Start start, const float* bias,
                             const Output<float>& c) {
    constexpr std::int64_t kTasks = 16;
    const std::int64_t blocks = dense_row_blocks(rows), row_pairs = (rows + 31) / 32, pairs = (columns + 1) / 2;
    const std::int64_t groups = min_of(pairs, (kTasks + blocks - 1) / blocks);
    parallel_for(blocks * groups, num_threads, 0, [&](std::int64_t i, void*) {
      const std::int64_t block = i / groups, group = i % groups;
      const Range row_range{32 * (row_pairs * block / blocks), min_of(rows, 32 * (row_pairs * (block + 1) / blocks))};
      const Range column_range{2 * (pairs * group / groups), min_of(columns, 2 * (pairs * (group + 1) / groups))};
      TileProduct(layout, left, right).run(row_range, column_range, start, bias, c);
    });
  }

  static Element* scratch(std::int64_t count) {
    return static_cast<Element*>(operand_scratch(sizeof(Element) * static_cast<std::size_t>(count)));
  }
};

}  // namespace msformer::MSFORMER_VARIANT
