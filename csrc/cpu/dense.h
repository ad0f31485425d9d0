// Products that all threads work on together, for images of few tokens: there a layer is a handful of matrix products with
// large weights, and one product after the other, each cut into tiles, reads every weight once and keeps all cores busy.
//
// Each value of a product is summed by one thread in an order that does not depend on how the product is cut, so results
// are the same on any number of threads.
#pragma once

#include "tokens.h"

namespace msformer::MSFORMER_ISA {

constexpr std::int64_t kDepthBlock = 512;  // products are sums of block sums, of so many terms each
constexpr std::int64_t kGroupTokens = 1024;  // tokens of the images that are worked on at once, unless one image has more

// C = start + A B
template <class T>
void dense(int num_threads, std::int64_t rows, std::int64_t k, std::int64_t n_padded, const Operand<T>& a, const Matrix<T>& b,
           Start start, const T* bias, const Output<T>& c) {
  constexpr std::int64_t kRows = 96, kTasks = 16;
  const Panels panels(n_padded / kWidth<T>);
  const std::int64_t row_blocks = max_of<std::int64_t>(1, (rows + kRows - 1) / kRows);
  const std::int64_t groups = min_of(panels.count, (kTasks + row_blocks - 1) / row_blocks);
  parallel_for(row_blocks * groups, num_threads, 0, [&](std::int64_t i, void*) {
    const std::int64_t block = i / groups, group = i % groups;
    const Range row_range{rows * block / row_blocks, rows * (block + 1) / row_blocks};
    const Range panel_range{panels.count * group / groups, panels.count * (group + 1) / groups};
    for (std::int64_t p = 0; p == 0 || p < k; p += kDepthBlock)
      gemm_part<T>(row_range, panel_range, {p, min_of(k, p + kDepthBlock)}, k, panels, a, b, p ? Start::output : start, bias, c);
  });
}

// Y [tokens, n] = X W + bias; X row-major
template <class T>
inline void dense_tokens(int num_threads, std::int64_t tokens, std::int64_t k, std::int64_t n_padded, const T* x,
                         std::int64_t ldx, const T* packed, const T* bias, const Output<T>& y, bool add = false) {
  dense<T>(num_threads, tokens, k, n_padded, {x, ldx, 1}, {packed, 0},
           add ? Start::output : bias ? Start::bias : Start::zero, bias, y);
}

// dW [rows, n] (+)= A^T B, summed over tokens: A [tokens, rows], B [tokens, n]
template <class T>
inline void dense_weights(int num_threads, std::int64_t rows, std::int64_t tokens, std::int64_t n_padded, const T* a,
                          std::int64_t lda, const T* b, std::int64_t ldb, T* w, std::int64_t ldw, bool add) {
  dense<T>(num_threads, rows, tokens, n_padded, {a, 1, lda}, {b, ldb}, add ? Start::output : Start::zero, nullptr, {w, ldw});
}

inline std::int64_t token_blocks(std::int64_t tokens) { return (tokens + 15) / 16; }

// calls task(first token, tokens, block) for the blocks of tokens, in parallel
template <class Task> inline void for_token_blocks(int num_threads, std::int64_t tokens, const Task& task) {
  const std::int64_t blocks = token_blocks(tokens);
  parallel_for(blocks, num_threads, 0, [&](std::int64_t i, void*) {
    const std::int64_t first = tokens * i / blocks;
    task(first, tokens * (i + 1) / blocks - first, i);
  });
}

// How many images are worked on at once.
inline std::int64_t images_at_once(std::int64_t images, std::int64_t tokens) {
  return max_of<std::int64_t>(1, min_of(images, kGroupTokens / max_of<std::int64_t>(1, tokens)));
}

// A gradient [rows, columns] that products are summed into: the user's own memory where its rows are whole vectors, else
// padded rows that are copied at the end.
template <class T> class WeightGradient {
 public:
  WeightGradient(void* target, std::int64_t rows, std::int64_t columns, T* staged)
      : target_(static_cast<T*>(target)), rows_(rows), columns_(columns), data_(is_direct(target, columns) ? target_ : staged) {}
  static std::int64_t staged_size(std::int64_t rows, std::int64_t columns) { return rows * padded<T>(columns); }
  T* data() const { return data_; }
  std::int64_t leading() const { return padded<T>(columns_); }
  void finish() const {
    if (data_ == target_) return;
    for (std::int64_t i = 0; i < rows_; ++i)
      std::memcpy(target_ + i * columns_, data_ + i * leading(), sizeof(T) * static_cast<std::size_t>(columns_));
  }

 private:
  static bool is_direct(const void* target, std::int64_t columns) {
    return columns % kWidth<T> == 0 && reinterpret_cast<std::uintptr_t>(target) % 64 == 0;
  }
  T* target_;
  std::int64_t rows_, columns_;
  T* data_;
};

}  // namespace msformer::MSFORMER_ISA
