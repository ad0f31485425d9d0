// The engine that multiplies bfloat16 in pairs: one instruction multiplies two neighbours along k and adds both
// products to a float, at twice the rate of float multiply-adds (AVX-512 BF16). Used where the user's tensors are
// bfloat16, as PyTorch's own products are then: operands are rounded to bfloat16, sums are float.
//
// An element holds the value at an even k in its lower half and the one at the following k, or zero, in its upper half.
#pragma once

#include <immintrin.h>

#include "../base/memory.h"
#include "values.h"

namespace msformer::MSFORMER_VARIANT {

struct Pairs {
  using Value = float;
  using Element = std::uint32_t;

  static void multiply_add(Vector<float>& sum, Element a, __m512bh b) {
    sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a))), b);
  }
  static __m512bh load_right(const Element* p) { return reinterpret_cast<__m512bh>(_mm512_load_si512(p)); }

  // values, in whole vectors, as the products take them
  static void round_operands(float* values, std::int64_t count) {
    for (std::int64_t i = 0; i < count; i += 16) {
      const __m512i bits = _mm512_cvtepu16_epi32(rounded(_mm512_load_ps(values + i)));
      _mm512_store_ps(values + i, _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)));
    }
  }

  static constexpr bool is_exact() { return false; }
  static constexpr bool is_bfloat16() { return true; }

  static std::int64_t depth(std::int64_t k) { return (k + 1) / 2; }
  static std::int64_t packed_size(std::int64_t k, std::int64_t n_padded) { return depth(k) * n_padded; }

  template <class S>
  static void pack(int num_threads, Element* out, const S* data, std::int64_t k_stride, std::int64_t n_stride,
                   std::int64_t k, std::int64_t n) {
    for_panels<float>(num_threads, k, n, [&](std::int64_t begin, std::int64_t width, std::int64_t filled) {
      Element* to = out + begin * depth(k);
      const S* from = data + begin * n_stride;
      for (std::int64_t j = 0; j < width; j += 16) {
        const std::int64_t columns = max_of<std::int64_t>(0, min_of<std::int64_t>(16, filled - j));
        if (n_stride == 1)
          pairs_below(k, columns, from + j, k_stride, to + j, width);
        else
          turned_pairs(k, columns, from + j * n_stride, n_stride, to + j, width);
      }
    });
  }

  static void multiply(std::int64_t rows, std::int64_t k, std::int64_t n_padded, const float* a, std::int64_t lda,
                       const Element* packed, Start start, const float* bias, const Output<float>& c) {
    const std::int64_t leading = depth(k);
    // a row is written in whole vectors
    Element* left = scratch(rows * leading + 16);
    pairs_along_rows(rows, k, a, lda, left, leading);
    gemm<Pairs>(rows, leading, n_padded, {left, leading, 1}, {packed, 0}, start, bias, c);
  }

  static void add_transposed(std::int64_t rows, std::int64_t tokens, std::int64_t n_padded, const float* a,
                             std::int64_t lda, const float* b, std::int64_t ldb, const Output<float>& c) {
    const std::int64_t leading = padded<float>(rows);
    Element* left = scratch(depth(tokens) * (leading + n_padded));
    Element* right = left + depth(tokens) * leading;
    pairs_of_rows(tokens, leading, a, lda, left, leading);
    pairs_of_rows(tokens, n_padded, b, ldb, right, n_padded);
    gemm<Pairs>(rows, depth(tokens), n_padded, {left, 1, leading}, {right, n_padded}, Start::output, nullptr, c);
  }

  // as those of Values
  using Left = Operand<Element>;
  using Right = Matrix<Element>;
  // rows of pairs are written in whole vectors
  static std::int64_t left_size(std::int64_t rows, std::int64_t k) { return depth(k) * padded<float>(rows) + 16; }
  static std::int64_t right_size(std::int64_t k, std::int64_t n_padded) { return packed_size(k, n_padded); }

  // row-major, or, where A lies transposed, transposed
  static Left make_left(int num_threads, Element* left, std::int64_t rows, std::int64_t k, const Operand<float>& a) {
    constexpr std::int64_t kRows = 32;
    const std::int64_t leading = depth(k), width = padded<float>(rows);
    const bool by_rows = a.k_stride == 1;
    parallel_for((rows + kRows - 1) / kRows, num_threads, 0, [&](std::int64_t block, void*) {
      const std::int64_t begin = kRows * block, end = min_of(rows, begin + kRows);
      if (by_rows)
        pairs_along_rows(end - begin, k, a.data + begin * a.row_stride, a.row_stride, left + begin * leading, leading);
      else
        pairs_of_rows(k, padded<float>(end - begin), a.data + begin, a.k_stride, left + begin, width);
    });
    return {left, by_rows ? leading : 1, by_rows ? 1 : width};
  }

  static Right make_right(int num_threads, Element* right, std::int64_t k, const Panels& panels,
                          const Matrix<float>& b) {
    parallel_for(panels.count, num_threads, 0, [&](std::int64_t i, void*) {
      const std::int64_t begin = 16 * panels.begin(i), size = 16 * panels.begin(i + 1) - begin;
      const float* panel = b.leading ? b.data + begin : b.data + begin * k;
      pairs_of_rows(k, size, panel, b.leading ? b.leading : size, right + begin * depth(k), size);
    });
    return packed_right(right);
  }
  static Right packed_right(const Element* packed) { return {packed, 0}; }

  static void product(int num_threads, std::int64_t rows, Range panel_range, std::int64_t k, const Panels& panels,
                      const Left& a, const Right& b, Start start, const float* bias, const Output<float>& c) {
    dense_parts<Pairs>(num_threads, rows, panel_range, depth(k), panels, a, b, start, bias, c);
  }

 private:
  static Element* scratch(std::int64_t count) {
    return static_cast<Element*>(operand_scratch(sizeof(Element) * static_cast<std::size_t>(count)));
  }

  static __m256i rounded(__m512 values) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)); }

  static __mmask16 first(std::int64_t count) {
    return static_cast<__mmask16>((1u << max_of<std::int64_t>(0, min_of<std::int64_t>(16, count))) - 1);
  }

  // the first `count` of 16 values, in the lower halves; the others are zero
  static __m512i halves(std::int64_t count, const float* from) {
    return _mm512_cvtepu16_epi32(rounded(_mm512_maskz_loadu_ps(first(count), from)));
  }
  static __m512i halves(std::int64_t count, const BFloat16* from) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(count), from));
  }

  // the first `count` of 32 values as pairs of neighbours; the others are zero
  static __m512i neighbours(std::int64_t count, const float* from) {
    const __m512 low = _mm512_maskz_loadu_ps(first(count), from);
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(first(count - 16), from + 16), low));
  }
  static __m512i neighbours(std::int64_t count, const BFloat16* from) {
    return count >= 32 ? _mm512_loadu_si512(from)
                       : _mm512_maskz_loadu_epi16(static_cast<__mmask32>((1u << count) - 1), from);
  }

  // up to 16 columns of a matrix [k, columns], whose rows are k_stride apart -> 16 columns of pairs
  template <class S>
  static void pairs_below(std::int64_t k, std::int64_t columns, const S* from, std::int64_t k_stride, Element* to,
                          std::int64_t leading) {
    for (std::int64_t i = 0; i < k; i += 2) {
      const __m512i low = halves(columns, from + i * k_stride);
      const __m512i high = i + 1 < k ? halves(columns, from + (i + 1) * k_stride) : _mm512_setzero_si512();
      _mm512_store_si512(to + i / 2 * leading, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }

  // the same of a matrix that lies transposed, [columns, k]
  template <class S>
  static void turned_pairs(std::int64_t k, std::int64_t columns, const S* from, std::int64_t n_stride, Element* to,
                           std::int64_t leading) {
    for (std::int64_t i = 0; i < depth(k); i += 16) {
      Vector<float> square[16];  // of bits
      for (std::int64_t j = 0; j < 16; ++j)
        square[j] = reinterpret_cast<Vector<float>>(j < columns ? neighbours(k - 2 * i, from + j * n_stride + 2 * i)
                                                                : _mm512_setzero_si512());
      transpose<float>(square);
      for (std::int64_t j = 0; j < min_of<std::int64_t>(16, depth(k) - i); ++j)
        _mm512_store_si512(to + (i + j) * leading, reinterpret_cast<__m512i>(square[j]));
    }
  }

  // pairs of neighbours in a row: in [rows, k] -> out [rows, leading]
  static void pairs_along_rows(std::int64_t rows, std::int64_t k, const float* in, std::int64_t leading_in,
                               Element* out, std::int64_t leading) {
    for (std::int64_t i = 0; i < rows; ++i) {
      const float* from = in + i * leading_in;
      Element* to = out + i * leading;
      std::int64_t c = 0;
      for (; c + 16 <= k; c += 16)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + c / 2), rounded(_mm512_loadu_ps(from + c)));
      if (c == k) continue;
      const __mmask16 kept = static_cast<__mmask16>((1u << (k - c)) - 1);
      const __mmask8 written = static_cast<__mmask8>((1u << (leading - c / 2)) - 1);
      _mm256_mask_storeu_epi32(to + c / 2, written, rounded(_mm512_maskz_loadu_ps(kept, from + c)));
    }
  }

  // pairs of values below each other: in [rows, width] -> out [depth(rows), width], width in whole vectors
  static void pairs_of_rows(std::int64_t rows, std::int64_t width, const float* in, std::int64_t leading, Element* out,
                            std::int64_t leading_out) {
    for (std::int64_t i = 0; i < rows; i += 2)
      for (std::int64_t c = 0; c < width; c += 16) {
        const float* from = in + i * leading + c;
        const __m512i low = halves(16, from), high = i + 1 < rows ? halves(16, from + leading) : _mm512_setzero_si512();
        _mm512_store_si512(out + i / 2 * leading_out + c, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
      }
  }
};

}  // namespace msformer::MSFORMER_VARIANT
