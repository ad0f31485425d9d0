// Small matrix products C = start + A B, for operands that are already in scratch memory.
//
// A is read one value at a time (broadcast), at any strides, so it may be transposed. B is read in whole vectors along
// n: either packed (panels of a few vectors, each panel k rows) or a plain row-major block. C is row-major. n counts in
// whole vectors: leading dimensions are padded to the vector width and the padding holds zeros.
// A register tile of kTileRows x up to kTileVectors vectors stays in registers over the whole of k. What is added to
// comes at the end, so that a sum over many blocks of tokens is a sum of block sums, with the smaller rounding error of
// that.
//
// What is multiplied is up to the engine E: E::Value is the type of sums and of C, E::Element that of A and B, which
// may hold several values along k; E::load_right loads a vector of B, E::multiply_add adds a product to the sums.
#pragma once

#include <cstring>

#include "../base/vectors.h"

namespace msformer::MSFORMER_VARIANT {

constexpr int kTileRows = 6;
constexpr int kTileVectors = MSFORMER_VECTOR_BYTES == 64 ? 4 : 2;

// A panel split of `vectors` into tiles of at most kTileVectors, as even as possible (25 = 4+4+4+4+3+3+3): a lone
// last vector would leave the multipliers waiting for their own results.
struct Panels {
  std::int64_t vectors, count;
  explicit Panels(std::int64_t vectors_) : vectors(vectors_), count((vectors_ + kTileVectors - 1) / kTileVectors) {}
  std::int64_t begin(std::int64_t panel) const { return vectors * panel / count; }
};

template <class T>
struct Operand {  // element (row, k) is data[row * row_stride + k * k_stride]
  const T* data;
  std::int64_t row_stride, k_stride;
};

template <class T>
struct Matrix {  // the right-hand operand, k x n
  const T* data;
  std::int64_t leading;  // values from one k to the next; 0: packed in panels
};

template <class T>
struct Output {  // row i starts at data + offsets[i], or, without offsets, at data + i * leading
  T* data;
  std::int64_t leading;
  const std::int64_t* offsets = nullptr;
  T* row(std::int64_t i) const { return data + (offsets ? offsets[i] : i * leading); }
};

enum class Start { zero, bias, output };  // what the products are added to; bias is one row

template <class E, int ROWS, int VECTORS>
inline void gemm_tile(std::int64_t k, const typename E::Element* a, std::int64_t a_row, std::int64_t a_k,
                      const typename E::Element* b, std::int64_t b_k, Start start, const typename E::Value* bias,
                      const Output<typename E::Value>& c, std::int64_t row, std::int64_t column) {
  using T = typename E::Value;
  constexpr int W = kWidth<T>;
  Vector<T> acc[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) acc[i][j] = Vector<T>{};
  for (std::int64_t p = 0; p < k; ++p, a += a_k, b += b_k) {
    decltype(E::load_right(b)) bv[VECTORS];
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) bv[j] = E::load_right(b + j * W);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < VECTORS; ++j) E::multiply_add(acc[i][j], a[i * a_row], bv[j]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
    T* out = c.row(row + i) + column;
    const T* first = start == Start::output ? out : bias;
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j)
      store(out + j * W, start == Start::zero ? acc[i][j] : acc[i][j] + load(first + j * W));
  }
}

template <class E, int ROWS, int VECTORS>
inline void gemm_rows(std::int64_t row, std::int64_t end, std::int64_t k, const Operand<typename E::Element>& a,
                      const typename E::Element* b, std::int64_t b_k, Start start, const typename E::Value* bias,
                      const Output<typename E::Value>& c, std::int64_t column) {
  for (; row + ROWS <= end; row += ROWS)
    gemm_tile<E, ROWS, VECTORS>(k, a.data + row * a.row_stride, a.row_stride, a.k_stride, b, b_k, start, bias, c, row,
                                column);
  if constexpr (ROWS > 1)
    if (row < end) gemm_rows<E, ROWS - 1, VECTORS>(row, end, k, a, b, b_k, start, bias, c, column);
}

struct Range {
  std::int64_t begin, end;
};

// products are sums of block sums, of so many elements of k each: shorter sums round less, and a block of B stays in
// the first cache
constexpr std::int64_t kDepthBlock = 64;

// The rows of one panel of C = start + A B, summed over one block of k.
template <class E, int VECTORS>
void gemm_panel(int vectors, Range rows, std::int64_t k, const Operand<typename E::Element>& a,
                const typename E::Element* b, std::int64_t b_k, Start start, const typename E::Value* bias,
                const Output<typename E::Value>& c, std::int64_t column) {
  if (vectors == VECTORS)
    return gemm_rows<E, kTileRows, VECTORS>(rows.begin, rows.end, k, a, b, b_k, start, bias, c, column);
  if constexpr (VECTORS > 1) gemm_panel<E, VECTORS - 1>(vectors, rows, k, a, b, b_k, start, bias, c, column);
}

// Whether a block of B whose rows lie far apart is gathered first. Where a row of it is a cache line or less, rows that
// are a multiple of some kilobytes apart push each other out of the first cache: up to 25 % of a backward pass. Where
// it is four lines, gathering does not pay (docs/design.md).
constexpr bool kGathers = MSFORMER_VECTOR_BYTES < 64;

template <class E>
inline void gather(typename E::Element* to, const typename E::Element* from, std::int64_t apart, std::int64_t k,
                   std::int64_t vectors) {
  constexpr std::size_t kBytes = sizeof(typename E::Element) * kWidth<typename E::Value>;
  for (std::int64_t i = 0; i < k; ++i, from += apart)
    for (std::int64_t j = 0; j < vectors; ++j, to += kWidth<typename E::Value>)
      std::memcpy(to, from + j * kWidth<typename E::Value>, kBytes);
}

// The rows and panels of C = start + A B that are asked for; k counts elements, which may be pairs.
template <class E>
void gemm_part(Range rows, Range panel_range, std::int64_t k, const Panels& panels,
               const Operand<typename E::Element>& a, const Matrix<typename E::Element>& b, Start start,
               const typename E::Value* bias, const Output<typename E::Value>& c) {
  constexpr int W = kWidth<typename E::Value>;
  alignas(64) typename E::Element gathered[kGathers ? kDepthBlock * kTileVectors * W : 1];
  for (std::int64_t panel = panel_range.begin; panel < panel_range.end; ++panel) {
    const std::int64_t first = panels.begin(panel), vectors = panels.begin(panel + 1) - first;
    const std::int64_t b_k = b.leading ? b.leading : vectors * W;
    const auto* bp = b.leading ? b.data + first * W : b.data + first * W * k;
    const bool gathers = kGathers && b_k > vectors * W && rows.end - rows.begin > kTileRows;
    for (std::int64_t p = 0; p == 0 || p < k; p += kDepthBlock) {
      const std::int64_t depth = min_of(k - p, kDepthBlock);
      if (gathers) gather<E>(gathered, bp + p * b_k, b_k, depth, vectors);
      gemm_panel<E, kTileVectors>(static_cast<int>(vectors), rows, depth,
                                  {a.data + p * a.k_stride, a.row_stride, a.k_stride},
                                  gathers ? gathered : bp + p * b_k, gathers ? vectors * W : b_k,
                                  p ? Start::output : start, bias ? bias + first * W : nullptr, c, first * W);
    }
  }
}

// C = start + A B on the calling thread
template <class E>
inline void gemm(std::int64_t rows, std::int64_t k, std::int64_t n_padded, const Operand<typename E::Element>& a,
                 const Matrix<typename E::Element>& b, Start start, const typename E::Value* bias,
                 const Output<typename E::Value>& c) {
  const Panels panels(n_padded / kWidth<typename E::Value>);
  gemm_part<E>({0, rows}, {0, panels.count}, k, panels, a, b, start, bias, c);
}

}  // namespace msformer::MSFORMER_VARIANT
