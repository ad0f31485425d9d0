// The products that the operators are made of, by engine, and which engine a call gets.
//
// How products are done is a compile-time choice of a variant: MSFORMER_BFLOAT16_ENGINE is the engine for bfloat16
// tensors. Operators whose speed hangs on products are templates of the engine; `with_engine` picks it once a call.
// Small products of statistics are done on values, whatever the engine.
#pragma once

#include "../../abi.h"
#include "values.h"

#ifdef __AVX512BF16__
#include "pairs.h"
#endif

namespace msformer::MSFORMER_VARIANT {

// calls task(engine) with the engine for activations of this dtype
template <class Task>
void with_engine(DType dtype, const Task& task) {
  switch (dtype) {
    case DType::float64:
      return task(Values<double>());
    case DType::bfloat16:
      return task(MSFORMER_BFLOAT16_ENGINE());
    default:
      return task(Values<float>());
  }
}

// the same for operators that multiply values only
template <class Task>
void with_values(DType dtype, const Task& task) {
  dtype == DType::float64 ? task(Values<double>()) : task(Values<float>());
}

// Packs a k x n source (element (i, j) at data[i * k_stride + j * n_stride]) as a right-hand side, padded with zeros
// along n. Either stride is 1. out: E::packed_size(k, padded n) elements.
template <class E>
void pack(int num_threads, typename E::Element* out, const typename E::Value* data, std::int64_t k_stride,
          std::int64_t n_stride, std::int64_t k, std::int64_t n) {
  E::pack(num_threads, out, data, k_stride, n_stride, k, n);
}

// C = A B [+ bias], A [rows, k] row-major in scratch, B packed
template <class E>
void multiply(std::int64_t rows, std::int64_t k, std::int64_t n_padded, const typename E::Value* a, std::int64_t lda,
              const typename E::Element* b, typename E::Value* c, std::int64_t ldc,
              const typename E::Value* bias = nullptr) {
  E::multiply(rows, k, n_padded, a, lda, b, bias ? Start::bias : Start::zero, bias, {c, ldc});
}

// C += A B
template <class E>
void multiply_add(std::int64_t rows, std::int64_t k, std::int64_t n_padded, const typename E::Value* a,
                  std::int64_t lda, const typename E::Element* b, typename E::Value* c, std::int64_t ldc) {
  E::multiply(rows, k, n_padded, a, lda, b, Start::output, nullptr, {c, ldc});
}

// C = A B with B row-major, of values
template <class T>
void multiply_rows(std::int64_t rows, std::int64_t k, std::int64_t n_padded, const T* a, std::int64_t lda, const T* b,
                   std::int64_t ldb, T* c, std::int64_t ldc) {
  gemm<Values<T>>(rows, k, n_padded, {a, lda, 1}, {b, ldb}, Start::zero, nullptr, {c, ldc});
}

// C += A^T B, the reduction over tokens: A [tokens, rows], B [tokens, n]
template <class E>
void multiply_transposed_add(std::int64_t rows, std::int64_t tokens, std::int64_t n_padded, const typename E::Value* a,
                             std::int64_t lda, const typename E::Value* b, std::int64_t ldb, typename E::Value* c,
                             std::int64_t ldc) {
  E::add_transposed(rows, tokens, n_padded, a, lda, b, ldb, {c, ldc});
}

}  // namespace msformer::MSFORMER_VARIANT
