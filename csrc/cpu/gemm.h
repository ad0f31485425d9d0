// Small matrix products C = init + A B, for operands that are already in scratch memory.
//
// A is read one value at a time (broadcast), at any strides, so it may be transposed. B is read in whole vectors along n:
// either packed (panels of a few vectors, each panel k rows) or a plain row-major block. C is row-major. n counts in
// whole vectors: leading dimensions are padded to the vector width and the padding holds zeros.
// A register tile of kTileRows x up to kTileVectors vectors stays in registers over the whole of k. init is added at the
// end, so that a sum over many blocks of tokens is a sum of block sums, with the smaller rounding error of that.
#pragma once

#include "parallel.h"
#include "simd.h"

namespace msformer::MSFORMER_ISA {

constexpr int kTileRows = 6;
constexpr int kTileVectors = MSFORMER_VECTOR_BYTES == 64 ? 4 : 2;

template <class T> inline std::int64_t padded(std::int64_t n) { return (n + kWidth<T> - 1) / kWidth<T> * kWidth<T>; }

// A panel split of `vectors` into tiles of at most kTileVectors, as even as possible (25 = 4+4+4+4+3+3+3): a lone
// last vector would leave the multipliers waiting for their own results.
struct Panels {
  std::int64_t vectors, count;
  explicit Panels(std::int64_t vectors_) : vectors(vectors_), count((vectors_ + kTileVectors - 1) / kTileVectors) {}
  std::int64_t begin(std::int64_t panel) const { return vectors * panel / count; }
};

template <class T> struct Operand {  // element (row, k) is data[row * row_stride + k * k_stride]
  const T* data;
  std::int64_t row_stride, k_stride;
};

template <class T> struct Matrix {  // the right-hand operand, k x n
  const T* data;
  std::int64_t leading;  // values from one k to the next; 0: packed in panels
};

template <class T, int ROWS, int VECTORS>
inline void gemm_tile(std::int64_t k, const T* a, std::int64_t a_row, std::int64_t a_k, const T* b, std::int64_t b_k,
                      const T* init, std::int64_t init_row, T* c, std::int64_t c_row) {
  constexpr int W = kWidth<T>;
  Vector<T> acc[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) acc[i][j] = Vector<T>{};
  for (std::int64_t p = 0; p < k; ++p, a += a_k, b += b_k) {
    Vector<T> bv[VECTORS];
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) bv[j] = load(b + j * W);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const Vector<T> av = splat(a[i * a_row]);
#pragma GCC unroll 8
      for (int j = 0; j < VECTORS; ++j) acc[i][j] += av * bv[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j)
      store(c + i * c_row + j * W, init ? acc[i][j] + load(init + i * init_row + j * W) : acc[i][j]);
}

template <class T, int ROWS, int VECTORS>
inline void gemm_rows(std::int64_t rows, std::int64_t k, Operand<T> a, const T* b, std::int64_t b_k, const T* init,
                      std::int64_t init_row, T* c, std::int64_t c_row) {
  std::int64_t i = 0;
  for (; i + ROWS <= rows; i += ROWS)
    gemm_tile<T, ROWS, VECTORS>(k, a.data + i * a.row_stride, a.row_stride, a.k_stride, b, b_k,
                                init ? init + i * init_row : nullptr, init_row, c + i * c_row, c_row);
  if constexpr (ROWS > 1)
    if (i < rows)
      gemm_rows<T, ROWS - 1, VECTORS>(rows - i, k, {a.data + i * a.row_stride, a.row_stride, a.k_stride}, b, b_k,
                                      init ? init + i * init_row : nullptr, init_row, c + i * c_row, c_row);
}

// C = init + A B. init: null for zeros, C itself to accumulate, or one row of biases (init_row 0).
template <class T>
void gemm(std::int64_t rows, std::int64_t k, std::int64_t n_padded, Operand<T> a, Matrix<T> b, const T* init,
          std::int64_t init_row, T* c, std::int64_t c_row) {
  constexpr int W = kWidth<T>;
  const Panels panels(n_padded / W);
  for (std::int64_t panel = 0; panel < panels.count; ++panel) {
    const std::int64_t first = panels.begin(panel), vectors = panels.begin(panel + 1) - first;
    const T* bp = b.leading ? b.data + first * W : b.data + first * W * k;
    const std::int64_t b_k = b.leading ? b.leading : vectors * W;
    const T* ip = init ? init + first * W : nullptr;
    T* cp = c + first * W;
    switch (vectors) {
      case 1: gemm_rows<T, kTileRows, 1>(rows, k, a, bp, b_k, ip, init_row, cp, c_row); break;
      case 2: gemm_rows<T, kTileRows, 2>(rows, k, a, bp, b_k, ip, init_row, cp, c_row); break;
#if MSFORMER_VECTOR_BYTES == 64
      case 3: gemm_rows<T, kTileRows, 3>(rows, k, a, bp, b_k, ip, init_row, cp, c_row); break;
      case 4: gemm_rows<T, kTileRows, 4>(rows, k, a, bp, b_k, ip, init_row, cp, c_row); break;
#endif
    }
  }
}

// C = A B with A row-major in scratch
template <class T>
inline void multiply(std::int64_t rows, std::int64_t k, std::int64_t n_padded, const T* a, std::int64_t lda, Matrix<T> b,
                     T* c, std::int64_t ldc, const T* bias = nullptr) {
  gemm<T>(rows, k, n_padded, {a, lda, 1}, b, bias, 0, c, ldc);
}

// C += A B
template <class T>
inline void multiply_add(std::int64_t rows, std::int64_t k, std::int64_t n_padded, const T* a, std::int64_t lda,
                         Matrix<T> b, T* c, std::int64_t ldc) {
  gemm<T>(rows, k, n_padded, {a, lda, 1}, b, c, ldc, c, ldc);
}

// C += A^T B, the reduction over tokens: A [tokens, rows], B [tokens, n]
template <class T>
inline void multiply_transposed_add(std::int64_t rows, std::int64_t tokens, std::int64_t n_padded, const T* a,
                                    std::int64_t lda, const T* b, std::int64_t ldb, T* c, std::int64_t ldc) {
  gemm<T>(rows, tokens, n_padded, {a, 1, lda}, {b, ldb}, c, ldc, c, ldc);
}

// Packs a k x n source (element (i, j) at data[i * k_stride + j * n_stride]) into panels, padded with zeros along n.
// Either stride is 1; the source is read along it, a cache line at a time.
template <class T>
void pack(int num_threads, T* out, const T* data, std::int64_t k_stride, std::int64_t n_stride, std::int64_t k,
          std::int64_t n) {
  constexpr std::int64_t W = kWidth<T>, kLine = 64 / sizeof(T), kWorthThreads = 1 << 15;
  const Panels panels(padded<T>(n) / W);
  parallel_for(panels.count, k * n < kWorthThreads ? 1 : num_threads, 64, [&](std::int64_t panel, void*) {
    const std::int64_t begin = panels.begin(panel) * W, width = panels.begin(panel + 1) * W - begin;
    const std::int64_t filled = min_of(width, n - begin);
    T* to = out + begin * k;
    const T* from = data + begin * n_stride;
    for (std::int64_t first = 0; first < k; first += kLine) {
      const std::int64_t last = min_of(k, first + kLine);
      if (n_stride == 1) {
        for (std::int64_t i = first; i < last; ++i)
          for (std::int64_t j = 0; j < filled; ++j) to[i * width + j] = from[i * k_stride + j];
      } else {
        for (std::int64_t j = 0; j < filled; ++j)
          for (std::int64_t i = first; i < last; ++i) to[i * width + j] = from[i * k_stride + j * n_stride];
      }
      for (std::int64_t i = first; i < last; ++i)
        for (std::int64_t j = filled; j < width; ++j) to[i * width + j] = T(0);
    }
  });
}

}  // namespace msformer::MSFORMER_ISA
