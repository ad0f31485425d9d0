// The engine that multiplies values as they are, float or double; and how a right-hand side is packed.
#pragma once

#include "../base/parallel.h"
#include "../base/tokens.h"
#include "gemm.h"

namespace msformer::MSFORMER_VARIANT {

// One panel of a packed right-hand side: columns [begin, begin + width), of which `filled` are in the source.
template <class T, class S>
inline void pack_panel(T* to, const S* from, std::int64_t k_stride, std::int64_t n_stride, std::int64_t k,
                       std::int64_t width, std::int64_t filled) {
  constexpr std::int64_t W = kWidth<T>;
  const std::int64_t whole = filled / W * W, whole_k = n_stride == 1 ? k : k / W * W;
  for (std::int64_t j = 0; j < whole; j += W) {
    if (n_stride == 1) {
      for (std::int64_t i = 0; i < k; ++i) store(to + i * width + j, load_values<T>(from + i * k_stride + j));
    } else {
      for (std::int64_t i = 0; i < whole_k; i += W) {
        Vector<T> block[W];
        for (std::int64_t row = 0; row < W; ++row) block[row] = load_values<T>(from + i + (j + row) * n_stride);
        transpose<T>(block);
        for (std::int64_t row = 0; row < W; ++row) store(to + (i + row) * width + j, block[row]);
      }
    }
  }
  // what is left: the last rows of the transposed blocks, and the columns of the last, incomplete vector
  for (std::int64_t i = whole_k; i < k; ++i)
    for (std::int64_t j = 0; j < whole; ++j) to[i * width + j] = convert<T>(from[i * k_stride + j * n_stride]);
  for (std::int64_t j = whole; j < filled; ++j)
    for (std::int64_t i = 0; i < k; ++i) to[i * width + j] = convert<T>(from[i * k_stride + j * n_stride]);
  for (std::int64_t i = 0; i < k; ++i)
    for (std::int64_t j = filled; j < width; ++j) to[i * width + j] = T(0);
}

// calls task(first column, columns, columns in the source) for the panels of a k x n right-hand side, in parallel where
// it is large
template <class T, class Task>
void for_panels(int num_threads, std::int64_t k, std::int64_t n, const Task& task) {
  constexpr std::int64_t W = kWidth<T>, kWorthThreads = 1 << 15;
  const Panels panels(padded<T>(n) / W);
  parallel_for(panels.count, k * n < kWorthThreads ? 1 : num_threads, 0, [&](std::int64_t panel, void*) {
    const std::int64_t begin = panels.begin(panel) * W, width = panels.begin(panel + 1) * W - begin;
    task(begin, width, min_of(width, n - begin));
  });
}

// of a product that all threads work on
inline std::int64_t dense_row_blocks(std::int64_t rows) {
  constexpr std::int64_t kRows = 96;
  return max_of<std::int64_t>(1, (rows + kRows - 1) / kRows);
}

// gemm_part on all threads
template <class E>
void dense_parts(int num_threads, std::int64_t rows, Range panel_range, std::int64_t k, const Panels& panels,
                 const Operand<typename E::Element>& a, const Matrix<typename E::Element>& b, Start start,
                 const typename E::Value* bias, const Output<typename E::Value>& c) {
  constexpr std::int64_t kTasks = 16;
  const std::int64_t count = panel_range.end - panel_range.begin, row_blocks = dense_row_blocks(rows);
  const std::int64_t groups = min_of(count, (kTasks + row_blocks - 1) / row_blocks);
  parallel_for(row_blocks * groups, num_threads, 0, [&](std::int64_t i, void*) {
    const std::int64_t block = i / groups, group = i % groups;
    const Range row_range{rows * block / row_blocks, rows * (block + 1) / row_blocks};
    const Range of_group{panel_range.begin + count * group / groups, panel_range.begin + count * (group + 1) / groups};
    gemm_part<E>(row_range, of_group, k, panels, a, b, start, bias, c);
  });
}

template <class T>
struct Values {
  using Value = T;
  using Element = T;

  static void multiply_add(Vector<T>& sum, T a, Vector<T> b) { sum += splat(a) * b; }
  static Vector<T> load_right(const T* p) { return load(p); }

  static void round_operands(T*, std::int64_t) {}        // values as the products take them
  static constexpr bool is_exact() { return true; }      // whether those are the values as they are
  static constexpr bool is_bfloat16() { return false; }  // whether they are single values of bfloat16

  static std::int64_t depth(std::int64_t k) { return k; }  // elements along k
  static std::int64_t packed_size(std::int64_t k, std::int64_t n_padded) { return k * n_padded; }

  template <class S>
  static void pack(int num_threads, T* out, const S* data, std::int64_t k_stride, std::int64_t n_stride, std::int64_t k,
                   std::int64_t n) {
    for_panels<T>(num_threads, k, n, [&](std::int64_t begin, std::int64_t width, std::int64_t filled) {
      pack_panel(out + begin * k, data + begin * n_stride, k_stride, n_stride, k, width, filled);
    });
  }

  static void multiply(std::int64_t rows, std::int64_t k, std::int64_t n_padded, const T* a, std::int64_t lda,
                       const T* packed, Start start, const T* bias, const Output<T>& c) {
    gemm<Values>(rows, k, n_padded, {a, lda, 1}, {packed, 0}, start, bias, c);
  }

  static void add_transposed(std::int64_t rows, std::int64_t tokens, std::int64_t n_padded, const T* a,
                             std::int64_t lda, const T* b, std::int64_t ldb, const Output<T>& c) {
    gemm<Values>(rows, tokens, n_padded, {a, 1, lda}, {b, ldb}, Start::output, nullptr, c);
  }

  // Operands of `product`, which all threads make and may share: here they are taken where they lie.
  using Left = Operand<T>;
  using Right = Matrix<T>;
  static std::int64_t left_size(std::int64_t, std::int64_t) { return 0; }
  static std::int64_t right_size(std::int64_t, std::int64_t) { return 0; }
  static Left make_left(int, T*, std::int64_t, std::int64_t, const Operand<T>& a) { return a; }
  static Right make_right(int, T*, std::int64_t, const Panels&, const Matrix<T>& b) { return b; }
  static Right packed_right(const T* packed) { return {packed, 0}; }

  // The panels of C = start + A B that are asked for, all threads on parts of it.
  static void product(int num_threads, std::int64_t rows, Range panel_range, std::int64_t k, const Panels& panels,
                      const Left& a, const Right& b, Start start, const T* bias, const Output<T>& c) {
    dense_parts<Values>(num_threads, rows, panel_range, k, panels, a, b, start, bias, c);
  }
};

}  // namespace msformer::MSFORMER_VARIANT
