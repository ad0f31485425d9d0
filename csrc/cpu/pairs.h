// Products of bfloat16 in pairs: one instruction multiplies two neighbours along k and adds both products to a float, at
// twice the rate of float multiply-adds (AVX-512 BF16). Used where the user's tensors are bfloat16, as PyTorch's own products
// are then: operands are rounded to bfloat16, sums are float.
//
// A Pair holds the element at an even k in its lower half and the one at the following k, or zero, in its upper half.
#pragma once

#include "simd.h"

#ifdef __AVX512BF16__
#define MSFORMER_PAIRS
#include <immintrin.h>
#endif

namespace msformer {

// at least `count` pairs of 64-byte aligned memory of the calling thread, apart from thread_scratch
std::uint32_t* pair_scratch(std::int64_t count);

}  // namespace msformer

namespace msformer::MSFORMER_ISA {

#ifdef MSFORMER_PAIRS
constexpr bool kHasPairs = true;

typedef std::uint32_t Pair;

struct Pairs {
  using Sum = float;
  using Element = Pair;
  static void add(Vector<float>& sum, Pair a, __m512bh b) {
    sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a))), b);
  }
  static __m512bh load_right(const Pair* p) { return reinterpret_cast<__m512bh>(_mm512_load_si512(p)); }
};

inline __m512i rounded(const float* p) {  // 16 values as bfloat16, each in the lower half of 32 bits
  return _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(p))));
}

// pairs of neighbours in a row: in [rows, k], whose rows may be read to the next whole vector -> out [rows, leading]
inline void pairs_along_rows(std::int64_t rows, std::int64_t k, const float* in, std::int64_t leading_in, Pair* out,
                             std::int64_t leading) {
  for (std::int64_t i = 0; i < rows; ++i) {
    const float* from = in + i * leading_in;
    std::uint16_t* to = reinterpret_cast<std::uint16_t*>(out + i * leading);
    std::int64_t c = 0;
    for (; c + 16 <= k; c += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + c), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(from + c))));
    if (c < k) {
      const __mmask16 kept = static_cast<__mmask16>((1u << (k - c)) - 1), written = static_cast<__mmask16>((1u << (2 * leading - c)) - 1);
      _mm256_mask_storeu_epi16(to + c, written,
                               reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(kept, from + c))));
    }
  }
}

// pairs of values below each other: in [rows, width] -> out [(rows + 1) / 2, width], width in whole vectors.
// out may be the memory of in.
inline void pairs_of_rows(std::int64_t rows, std::int64_t width, const float* in, std::int64_t leading, Pair* out) {
  for (std::int64_t i = 0; i < rows; i += 2)
    for (std::int64_t c = 0; c < width; c += 16) {
      const float* from = in + i * leading + c;
      const __m512i low = rounded(from), high = i + 1 < rows ? rounded(from + leading) : _mm512_setzero_si512();
      _mm512_store_si512(out + i / 2 * width + c, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
}
#else
constexpr bool kHasPairs = false;
#endif

}  // namespace msformer::MSFORMER_ISA
