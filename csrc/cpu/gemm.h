// Small matrix products C = start + A B, for operands that are already in scratch memory.
//
// A is read one value at a time (broadcast), at any strides, so it may be transposed. B is read in whole vectors along n:
// either packed (panels of a few vectors, each panel k rows) or a plain row-major block. C is row-major. n counts in
// whole vectors: leading dimensions are padded to the vector width and the padding holds zeros.
// A register tile of kTileRows x up to kTileVectors vectors stays in registers over the whole of k. What is added to comes at
// the end, so that a sum over many blocks of tokens is a sum of block sums, with the smaller rounding error of that.
#pragma once

#include "pairs.h"
#include "parallel.h"

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

// How values are multiplied: as they are, or (pairs.h) two bfloat16 along k at a time.
template <class T> struct Values {
  using Sum = T;
  using Element = T;
  static void add(Vector<T>& sum, T a, Vector<T> b) { sum += splat(a) * b; }
  static Vector<T> load_right(const T* p) { return load(p); }
};

template <class T> struct Operand {  // element (row, k) is data[row * row_stride + k * k_stride]
  const T* data;
  std::int64_t row_stride, k_stride;
};

template <class T> struct Matrix {  // the right-hand operand, k x n
  const T* data;
  std::int64_t leading;  // values from one k to the next; 0: packed in panels
  bool pairs = false;    // packed by pack_weights for products of pairs
};

template <class T> struct Output {  // row i starts at data + offsets[i], or, without offsets, at data + i * leading
  T* data;
  std::int64_t leading;
  const std::int64_t* offsets = nullptr;
  T* row(std::int64_t i) const { return data + (offsets ? offsets[i] : i * leading); }
};

enum class Start { zero, bias, output };  // what the products are added to; bias is one row

template <class P, int ROWS, int VECTORS>
inline void gemm_tile(std::int64_t k, const typename P::Element* a, std::int64_t a_row, std::int64_t a_k,
                      const typename P::Element* b, std::int64_t b_k, Start start, const typename P::Sum* bias,
                      const Output<typename P::Sum>& c, std::int64_t row, std::int64_t column) {
  using T = typename P::Sum;
  constexpr int W = kWidth<T>;
  Vector<T> acc[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) acc[i][j] = Vector<T>{};
  for (std::int64_t p = 0; p < k; ++p, a += a_k, b += b_k) {
    decltype(P::load_right(b)) bv[VECTORS];
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) bv[j] = P::load_right(b + j * W);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < VECTORS; ++j) P::add(acc[i][j], a[i * a_row], bv[j]);
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

template <class P, int ROWS, int VECTORS>
inline void gemm_rows(std::int64_t row, std::int64_t end, std::int64_t k, const Operand<typename P::Element>& a,
                      const typename P::Element* b, std::int64_t b_k, Start start, const typename P::Sum* bias,
                      const Output<typename P::Sum>& c, std::int64_t column) {
  for (; row + ROWS <= end; row += ROWS)
    gemm_tile<P, ROWS, VECTORS>(k, a.data + row * a.row_stride, a.row_stride, a.k_stride, b, b_k, start, bias, c, row, column);
  if constexpr (ROWS > 1)
    if (row < end) gemm_rows<P, ROWS - 1, VECTORS>(row, end, k, a, b, b_k, start, bias, c, column);
}

struct Range {
  std::int64_t begin, end;
};

// The rows and panels of C = start + A B that are asked for. k, of which B has `depth` in all, is the range to sum over; it
// counts elements, which may be pairs.
template <class P>
void gemm_part(Range rows, Range panel_range, Range k, std::int64_t depth, const Panels& panels,
               const Operand<typename P::Element>& a, const Matrix<typename P::Element>& b, Start start,
               const typename P::Sum* bias, const Output<typename P::Sum>& c) {
  constexpr int W = kWidth<typename P::Sum>;
  const Operand<typename P::Element> a_part{a.data + k.begin * a.k_stride, a.row_stride, a.k_stride};
  for (std::int64_t panel = panel_range.begin; panel < panel_range.end; ++panel) {
    const std::int64_t first = panels.begin(panel), vectors = panels.begin(panel + 1) - first;
    const std::int64_t b_k = b.leading ? b.leading : vectors * W;
    const auto* bp = (b.leading ? b.data + first * W : b.data + first * W * depth) + k.begin * b_k;
    const auto* biases = bias ? bias + first * W : nullptr;
    const std::int64_t size = k.end - k.begin;
    switch (vectors) {
      case 1: gemm_rows<P, kTileRows, 1>(rows.begin, rows.end, size, a_part, bp, b_k, start, biases, c, first * W); break;
      case 2: gemm_rows<P, kTileRows, 2>(rows.begin, rows.end, size, a_part, bp, b_k, start, biases, c, first * W); break;
#if MSFORMER_VECTOR_BYTES == 64
      case 3: gemm_rows<P, kTileRows, 3>(rows.begin, rows.end, size, a_part, bp, b_k, start, biases, c, first * W); break;
      case 4: gemm_rows<P, kTileRows, 4>(rows.begin, rows.end, size, a_part, bp, b_k, start, biases, c, first * W); break;
#endif
    }
  }
}

// C = start + A B on the calling thread
template <class P>
inline void gemm(std::int64_t rows, std::int64_t k, std::int64_t n_padded, const Operand<typename P::Element>& a,
                 const Matrix<typename P::Element>& b, Start start, const typename P::Sum* bias,
                 const Output<typename P::Sum>& c) {
  const Panels panels(n_padded / kWidth<typename P::Sum>);
  gemm_part<P>({0, rows}, {0, panels.count}, {0, k}, k, panels, a, b, start, bias, c);
}

// C = start + A B with A row-major in scratch; in pairs where B is packed so
template <class T>
inline void multiply_rows(std::int64_t rows, std::int64_t k, std::int64_t n_padded, const T* a, std::int64_t lda,
                          const Matrix<T>& b, Start start, const T* bias, T* c, std::int64_t ldc) {
#ifdef MSFORMER_PAIRS
  if constexpr (sizeof(T) == 4)
    if (b.pairs) {
      const std::int64_t leading = (k + 1) / 2;
      Pair* pairs = pair_scratch(rows * (leading + kWidth<T>));
      pairs_along_rows(rows, k, a, lda, pairs, leading);
      return gemm<Pairs>(rows, leading, n_padded, {pairs, leading, 1}, {reinterpret_cast<const Pair*>(b.data), 0}, start, bias,
                         {c, ldc});
    }
#endif
  gemm<Values<T>>(rows, k, n_padded, {a, lda, 1}, b, start, bias, {c, ldc});
}

// C = A B [+ bias]
template <class T>
inline void multiply(std::int64_t rows, std::int64_t k, std::int64_t n_padded, const T* a, std::int64_t lda, Matrix<T> b,
                     T* c, std::int64_t ldc, const T* bias = nullptr) {
  multiply_rows(rows, k, n_padded, a, lda, b, bias ? Start::bias : Start::zero, bias, c, ldc);
}

// C += A B
template <class T>
inline void multiply_add(std::int64_t rows, std::int64_t k, std::int64_t n_padded, const T* a, std::int64_t lda,
                         Matrix<T> b, T* c, std::int64_t ldc) {
  multiply_rows<T>(rows, k, n_padded, a, lda, b, Start::output, nullptr, c, ldc);
}

// C += A^T B, the reduction over tokens: A [tokens, rows], B [tokens, n]; in_pairs: of bfloat16, where there are such
template <class T>
inline void multiply_transposed_add(std::int64_t rows, std::int64_t tokens, std::int64_t n_padded, const T* a,
                                    std::int64_t lda, const T* b, std::int64_t ldb, T* c, std::int64_t ldc,
                                    bool in_pairs = false) {
#ifdef MSFORMER_PAIRS
  if constexpr (sizeof(T) == 4)
    if (in_pairs) {
      const std::int64_t depth = (tokens + 1) / 2, leading = padded<T>(rows);
      Pair* left = pair_scratch(depth * (leading + n_padded));
      Pair* right = left + depth * leading;
      pairs_of_rows(tokens, leading, a, lda, left);
      pairs_of_rows(tokens, n_padded, b, ldb, right);
      return gemm<Pairs>(rows, depth, n_padded, {left, 1, leading}, {right, n_padded}, Start::output, nullptr, {c, ldc});
    }
#endif
  gemm<Values<T>>(rows, tokens, n_padded, {a, 1, lda}, {b, ldb}, Start::output, nullptr, {c, ldc});
}

// One panel of `pack`: columns [begin, begin + width), of which `filled` are in the source.
template <class T>
inline void pack_panel(T* to, const T* from, std::int64_t k_stride, std::int64_t n_stride, std::int64_t k,
                       std::int64_t width, std::int64_t filled) {
  constexpr std::int64_t W = kWidth<T>;
  const std::int64_t whole = filled / W * W, whole_k = n_stride == 1 ? k : k / W * W;
  for (std::int64_t j = 0; j < whole; j += W) {
    if (n_stride == 1) {
      for (std::int64_t i = 0; i < k; ++i) store(to + i * width + j, load_unaligned(from + i * k_stride + j));
    } else {
      for (std::int64_t i = 0; i < whole_k; i += W) {
        Vector<T> block[W];
        for (std::int64_t row = 0; row < W; ++row) block[row] = load_unaligned(from + i + (j + row) * n_stride);
        transpose<T>(block);
        for (std::int64_t row = 0; row < W; ++row) store(to + (i + row) * width + j, block[row]);
      }
    }
  }
  // what is left: the last rows of the transposed blocks, and the columns of the last, incomplete vector
  for (std::int64_t i = whole_k; i < k; ++i)
    for (std::int64_t j = 0; j < whole; ++j) to[i * width + j] = from[i * k_stride + j * n_stride];
  for (std::int64_t j = whole; j < filled; ++j)
    for (std::int64_t i = 0; i < k; ++i) to[i * width + j] = from[i * k_stride + j * n_stride];
  for (std::int64_t i = 0; i < k; ++i)
    for (std::int64_t j = filled; j < width; ++j) to[i * width + j] = T(0);
}

// Packs a k x n source (element (i, j) at data[i * k_stride + j * n_stride]) into panels, padded with zeros along n.
// Either stride is 1.
template <class T>
void pack(int num_threads, T* out, const T* data, std::int64_t k_stride, std::int64_t n_stride, std::int64_t k,
          std::int64_t n) {
  constexpr std::int64_t W = kWidth<T>, kWorthThreads = 1 << 15;
  const Panels panels(padded<T>(n) / W);
  parallel_for(panels.count, k * n < kWorthThreads ? 1 : num_threads, 0, [&](std::int64_t panel, void*) {
    const std::int64_t begin = panels.begin(panel) * W, width = panels.begin(panel + 1) * W - begin;
    pack_panel(out + begin * k, data + begin * n_stride, k_stride, n_stride, k, width, min_of(width, n - begin));
  });
}

// Weights packed for `multiply`: as values, or as pairs (of the same size, half of which is then used).
template <class T> struct PackedWeights {
  T* data;
  bool pairs;
  Matrix<T> matrix() const { return {data, 0, pairs}; }
};

template <class T>
void pack_weights(int num_threads, PackedWeights<T> out, const T* data, std::int64_t k_stride, std::int64_t n_stride,
                  std::int64_t k, std::int64_t n) {
  pack(num_threads, out.data, data, k_stride, n_stride, k, n);
#ifdef MSFORMER_PAIRS
  if constexpr (sizeof(T) == 4)
    if (out.pairs) {
      const Panels panels(padded<T>(n) / kWidth<T>);
      Pair* to = reinterpret_cast<Pair*>(out.data);
      for (std::int64_t panel = 0; panel < panels.count; ++panel) {  // in place: what is written has been read
        const std::int64_t begin = panels.begin(panel) * kWidth<T>, width = panels.begin(panel + 1) * kWidth<T> - begin;
        pairs_of_rows(k, width, out.data + begin * k, width, to + begin * ((k + 1) / 2));
      }
    }
#endif
}

}  // namespace msformer::MSFORMER_ISA
