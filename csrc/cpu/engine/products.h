// The products that the operators are made of, by engine, and which engine a call gets.
//
// An engine is an object with the functions below. Which there are is a compile-time choice of a variant:
// MSFORMER_BFLOAT16_ENGINE multiplies bfloat16 tensors, and a variant with a MSFORMER_TILE_UNIT has tiles. Operators
// whose speed hangs on products are templates of the engine; `with_engine` picks it once a call. Small products of
// statistics are done on values, whatever the engine.
#pragma once

#include "../../abi.h"
#include "values.h"

#ifdef __AVX512BF16__
#include "pairs.h"
#endif
#ifdef MSFORMER_TILE_UNIT
#include "tiles.h"
#endif

namespace msformer::MSFORMER_VARIANT {

// One of the products of a call, to count what it costs.
struct ProductShape {
  std::int64_t rows, k, n;
  bool of_tokens;  // both operands are: the right one is rewritten for every block, too
};

// In how many bfloat16 parts a float is multiplied.
inline int parts_of(Precision precision) {
  if (precision == Precision::medium) return 1;
  return precision == Precision::high ? 2 : 3;
}

#ifdef MSFORMER_TILE_UNIT
// Whether tiles take fewer cycles for these products than multiply-adds of floats, or, for one part, of pairs of
// bfloat16. The cycles of a tile product (with its loads), a multiply-add and a rewritten vector were measured on one
// thread of a Xeon with AMX (docs/design.md).
inline bool tiles_pay(int parts, const ProductShape* shapes, int count) {
  if (MSFORMER_TILE_UNIT::kAlways) return true;
  constexpr double kTileProduct = 29, kVector = 13, kMultiplyAdds = 23;
  double tiles = 0, others = 0;
  for (const ProductShape* p = shapes; p < shapes + count; ++p) {
    const PartLayout layout(parts, p->k);
    const std::int64_t row_tiles = (p->rows + 15) / 16, column_tiles = (p->n + 15) / 16,
                       rewritten = p->rows + (p->of_tokens ? p->n : 0);
    tiles += kTileProduct *
             static_cast<double>(row_tiles * column_tiles * (layout.steps * layout.products + layout.rest_tiles));
    tiles += kVector * static_cast<double>(rewritten * ((p->k + 15) / 16));
    others += static_cast<double>(p->rows * p->k * p->n) / (parts == 1 ? 2 * kMultiplyAdds : kMultiplyAdds);
  }
  return tiles < others;
}
#endif

// calls task(engine) with the engine for tensors of this dtype and products of these shapes
template <int N, class Task>
void with_engine(DType dtype, Precision precision, const ProductShape (&shapes)[N], const Task& task) {
#ifdef MSFORMER_TILE_UNIT
  const int parts = parts_of(precision);
  if ((dtype == DType::float32 || dtype == DType::bfloat16) && tiles_pay(parts, shapes, N)) return task(Tiles{parts});
#endif
  (void)shapes;
  if (dtype == DType::float64) return task(Values<double>());
  if (dtype != DType::float16 && parts_of(precision) == 1) return task(MSFORMER_BFLOAT16_ENGINE());
  task(Values<float>());
}

// calls task(a value of the arithmetic type), for operators whose products are small
template <class Task>
void with_arithmetic(DType dtype, const Task& task) {
  dtype == DType::float64 ? task(double()) : task(float());
}

// Packs a k x n source (element (i, j) at data[i * k_stride + j * n_stride]) as a right-hand side, padded with zeros
// along n. Either stride is 1. out: engine.packed_size(k, padded n) elements.
template <class E>
void pack(const E& engine, int num_threads, typename E::Element* out, const typename E::Value* data,
          std::int64_t k_stride, std::int64_t n_stride, std::int64_t k, std::int64_t n) {
  engine.pack(num_threads, out, data, k_stride, n_stride, k, n);
}
template <class E>
void pack(const E& engine, int num_threads, typename E::Element* out, const WeightMatrix& weight, std::int64_t k_stride,
          std::int64_t n_stride, std::int64_t k, std::int64_t n) {
  weight.visit<typename E::Value>(
      [&](const auto* data) { engine.pack(num_threads, out, data, k_stride, n_stride, k, n); });
}

// C = A B [+ bias], A [rows, k] row-major in scratch, B packed
template <class E>
void multiply(const E& engine, std::int64_t rows, std::int64_t k, std::int64_t n_padded, const typename E::Value* a,
              std::int64_t lda, const typename E::Element* b, typename E::Value* c, std::int64_t ldc,
              const typename E::Value* bias = nullptr) {
  engine.multiply(rows, k, n_padded, a, lda, b, bias ? Start::bias : Start::zero, bias, {c, ldc});
}

// C += A B
template <class E>
void multiply_add(const E& engine, std::int64_t rows, std::int64_t k, std::int64_t n_padded, const typename E::Value* a,
                  std::int64_t lda, const typename E::Element* b, typename E::Value* c, std::int64_t ldc) {
  engine.multiply(rows, k, n_padded, a, lda, b, Start::output, nullptr, {c, ldc});
}

// C += A^T B, the reduction over tokens: A [tokens, rows], B [tokens, n]
template <class E>
void multiply_transposed_add(const E& engine, std::int64_t rows, std::int64_t tokens, std::int64_t n_padded,
                             const typename E::Value* a, std::int64_t lda, const typename E::Value* b, std::int64_t ldb,
                             typename E::Value* c, std::int64_t ldc) {
  engine.add_transposed(rows, tokens, n_padded, a, lda, b, ldb, {c, ldc});
}

}  // namespace msformer::MSFORMER_VARIANT
