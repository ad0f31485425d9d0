// A linear layer of so few tokens that rewriting its weight would take half as long as the product: Y^T = W X^T, with W
// as the left operand where it lies, and the tokens, which are few, rewritten as the right one.
#pragma once

#include "dense.h"

namespace msformer::MSFORMER_VARIANT {

template <class E>
class WeightRows {
  using T = Value<E>;
  using Element = typename E::Element;
  static constexpr std::int64_t kFeatures = 48;  // of a block
  // whether the engine's left operand is a matrix of elements
  static constexpr bool kHasRows = std::is_same<typename E::Right, Matrix<Element>>::value;

 public:
  static constexpr std::int64_t kTokens = 64;  // at most

  // whether a weight [out, in] is a matrix of elements as it lies, and so many tokens are few enough
  static bool fit(const WeightMatrix& weight, std::int64_t tokens, std::int64_t in) {
    if (!kHasRows || tokens > kTokens || reinterpret_cast<std::uintptr_t>(weight.data) % sizeof(Element)) return false;
    const bool narrow = weight.dtype == DType::bfloat16;
    return std::is_same<E, Values<T>>::value ? !narrow : narrow && in % 2 == 0;
  }

  static std::int64_t size(const E& engine, std::int64_t tokens, std::int64_t in) {
    return engine.packed_size(in, padded<T>(tokens));
  }

  // the transpose of tokens [tokens, in], for all layers that they go to
  static typename E::Right turn(const E& engine, int num_threads, Element* memory, std::int64_t tokens, std::int64_t in,
                                const T* x, std::int64_t leading) {
    pack(engine, num_threads, memory, x, 1, leading, in, tokens);
    return engine.packed_right(memory);
  }

  // Y [tokens, out] = X W^T + bias, bias padded or null, W [out, in]
  static void multiply(const E& engine, int num_threads, std::int64_t tokens, std::int64_t in, std::int64_t out,
                       const typename E::Right& x, const void* weight, const T* bias, const Output<T>& y) {
    if constexpr (kHasRows) {
      const std::int64_t k = engine.depth(in), width = padded<T>(tokens);
      const Element* rows = static_cast<const Element*>(weight);
      parallel_for((out + kFeatures - 1) / kFeatures, num_threads, 0, [&](std::int64_t block, void*) {
        alignas(64) T sums[kFeatures * kTokens];
        const std::int64_t first = kFeatures * block, count = min_of(kFeatures, out - first);
        gemm<E>(count, k, width, {rows + first * k, k, 1}, x, Start::zero, nullptr, {sums, width});
        fill(sums + count * width, (padded<T>(count) - count) * width, T(0));
        turn_back(tokens, padded<T>(count), sums, width, bias ? bias + first : nullptr, y, first);
      });
    }
  }

 private:
  // sums [features, width] -> features of the rows of y
  static void turn_back(std::int64_t tokens, std::int64_t features, const T* sums, std::int64_t width, const T* bias,
                        const Output<T>& y, std::int64_t first) {
    constexpr std::int64_t W = kWidth<T>;
    for (std::int64_t c = 0; c < features; c += W)
      for (std::int64_t token = 0; token < tokens; token += W) {
        Vector<T> square[W];
        for (std::int64_t i = 0; i < W; ++i) square[i] = load(sums + (c + i) * width + token);
        transpose<T>(square);
        const Vector<T> added = bias ? load(bias + c) : Vector<T>{};
        for (std::int64_t i = 0; i < min_of(W, tokens - token); ++i)
          store(y.row(token + i) + first + c, square[i] + added);
      }
  }
};

}  // namespace msformer::MSFORMER_VARIANT
