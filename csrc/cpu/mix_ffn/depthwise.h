// The depthwise convolution of rows of tokens, k x k with k = 3, 5 or 7, and the gradients of its taps.
//
// A few sums stay in registers while one row of taps after the other is applied: those of some neighbouring outputs, so
// that a token that is loaded serves all of them, or those of some rows of taps. No more than one row of taps has to be
// in registers beside them.
#pragma once

#include <type_traits>

#include "../base/vectors.h"
#include "../engine/gemm.h"

namespace msformer::MSFORMER_VARIANT {

constexpr int kMostTapRows = 7;
constexpr int kVectorRegisters = MSFORMER_VECTOR_BYTES == 64 ? 32 : 16;

// The rows that a row of outputs is made of, from top to bottom; each points at the token k / 2 left of the first
// output.
template <class T>
struct TapRows {
  const T* row[kMostTapRows] = {};
};

// Rows of an image in scratch, the newest in place of the oldest: as many as the convolution reads.
template <class T>
struct RowRing {
  std::int64_t size = 0;
  T* rows[kMostTapRows] = {};

  // row >= -size
  T* at(std::int64_t row) const { return rows[(row + size) % size]; }

  // the rows around `center`, `offset` values further on
  TapRows<T> around(std::int64_t center, std::int64_t offset = 0) const {
    TapRows<T> found;
    for (std::int64_t i = 0; i < size; ++i) found.row[i] = at(center - size / 2 + i) + offset;
    return found;
  }
};

// calls task(std::integral_constant<int, k>) for a kernel of k x k taps
template <class Task>
inline void with_kernel_size(std::int64_t size, const Task& task) {
  switch (size) {
    case 3:
      return task(std::integral_constant<int, 3>());
    case 5:
      return task(std::integral_constant<int, 5>());
    default:
      return task(std::integral_constant<int, 7>());
  }
}

// `COUNT` outputs of `VECTORS` vectors of channels, which lie in one cache line
template <class T, int SIZE, int VECTORS, int COUNT>
inline void depthwise_outputs(const TapRows<T>& rows, std::int64_t at, std::int64_t leading, const Vector<T>* taps,
                              const Vector<T>* start, T* out) {
  Vector<T> sum[VECTORS][COUNT];
#pragma GCC unroll 2
  for (int v = 0; v < VECTORS; ++v)
#pragma GCC unroll 16
    for (int o = 0; o < COUNT; ++o) sum[v][o] = start[v];
#pragma GCC unroll 1
  for (int r = 0; r < SIZE; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) {
      const T* from = rows.row[r] + at + v * kWidth<T>;
      Vector<T> tap[SIZE];
#pragma GCC unroll 7
      for (int i = 0; i < SIZE; ++i) tap[i] = taps[(r * VECTORS + v) * SIZE + i];
#pragma GCC unroll 22
      for (int j = 0; j < COUNT + SIZE - 1; ++j) {
        const Vector<T> x = load(from + j * leading);
#pragma GCC unroll 7
        for (int i = 0; i < SIZE; ++i)
          if (j - i >= 0 && j - i < COUNT) sum[v][j - i] += x * tap[i];
      }
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < VECTORS; ++v)
#pragma GCC unroll 16
    for (int o = 0; o < COUNT; ++o) store(out + o * leading + v * kWidth<T>, sum[v][o]);
}

// the outputs [first, tokens), `COUNT` at a time, and what is left by halves of it
template <class T, int SIZE, int VECTORS, int COUNT>
inline void depthwise_row(const TapRows<T>& rows, std::int64_t first, std::int64_t tokens, std::int64_t leading,
                          std::int64_t c, const Vector<T>* taps, const Vector<T>* start, T* out) {
  for (; first + COUNT <= tokens; first += COUNT)
    depthwise_outputs<T, SIZE, VECTORS, COUNT>(rows, first * leading + c, leading, taps, start,
                                               out + first * leading + c);
  if constexpr (COUNT > 1)
    depthwise_row<T, SIZE, VECTORS, COUNT / 2>(rows, first, tokens, leading, c, taps, start, out);
}

// the vectors of channels from c on, `VECTORS` at a time, and what is left by halves of it
template <class T, int SIZE, int VECTORS, bool FLIP>
inline void depthwise_channels(const TapRows<T>& rows, const T* taps, const T* bias, std::int64_t tokens,
                               std::int64_t leading, std::int64_t c, T* out) {
  constexpr int W = kWidth<T>, COUNT = kVectorRegisters / 2 / VECTORS;
  for (; c + VECTORS * W <= leading; c += VECTORS * W) {
    Vector<T> tap[SIZE][VECTORS][SIZE], start[VECTORS] = {};
    for (int v = 0; v < VECTORS; ++v) {
      if (bias) start[v] = load(bias + c + v * W);
      for (int r = 0; r < SIZE; ++r)
        for (int i = 0; i < SIZE; ++i) {
          const int k = r * SIZE + i;
          tap[r][v][i] = load(taps + (FLIP ? SIZE * SIZE - 1 - k : k) * leading + c + v * W);
        }
    }
    depthwise_row<T, SIZE, VECTORS, COUNT>(rows, 0, tokens, leading, c, tap[0][0], start, out);
  }
  if constexpr (VECTORS > 1) depthwise_channels<T, SIZE, VECTORS / 2, FLIP>(rows, taps, bias, tokens, leading, c, out);
}

// out [tokens, leading] = depthwise convolution of k rows with taps [k * k, leading], plus bias. FLIP applies the
// transposed convolution.
template <class T, bool FLIP>
void depthwise(std::int64_t kernel_size, const TapRows<T>& rows, const T* taps, const T* bias, std::int64_t tokens,
               std::int64_t leading, T* out) {
  constexpr int VECTORS = MSFORMER_VECTOR_BYTES == 64 ? 1 : 2;
  with_kernel_size(kernel_size, [&](auto size) {
    depthwise_channels<T, size(), VECTORS, FLIP>(rows, taps, bias, tokens, leading, 0, out);
  });
}

// tap[r][i] += grad at `COUNT` tokens times what tap i of row r saw there; inlined for the sums to stay in registers
template <class T, int SIZE, int ROWS, int COUNT>
inline __attribute__((always_inline)) void add_tap_products(const T* const* rows, std::int64_t at, std::int64_t leading,
                                                            const T* grad, Vector<T>* tap, Vector<T>& sum) {
  Vector<T> g[COUNT];
#pragma GCC unroll 4
  for (int o = 0; o < COUNT; ++o) {
    g[o] = load(grad + o * leading);
    sum += g[o];
  }
#pragma GCC unroll 7
  for (int r = 0; r < ROWS; ++r) {
    const T* from = rows[r] + at;
#pragma GCC unroll 14
    for (int j = 0; j < COUNT + SIZE - 1; ++j) {
      const Vector<T> x = load(from + j * leading);
#pragma GCC unroll 7
      for (int i = 0; i < SIZE; ++i)
        if (j - i >= 0 && j - i < COUNT) tap[r * SIZE + i] += g[j - i] * x;
    }
  }
}

// the gradients of as many rows of taps as registers hold, from row FIRST on, then of the others
template <class T, int SIZE, int FIRST>
inline void add_tap_gradients(const TapRows<T>& rows, const T* grad, std::int64_t tokens, std::int64_t c,
                              std::int64_t leading, T* taps, T* bias) {
  constexpr int COUNT = 4, HELD = max_of(1, (kVectorRegisters - COUNT - 2) / SIZE);
  constexpr int ROWS = min_of(HELD, SIZE - FIRST), LAST = FIRST + ROWS;
  Vector<T> tap[ROWS * SIZE] = {}, sum{};
  std::int64_t t = 0;
  for (; t + COUNT <= tokens; t += COUNT)
    add_tap_products<T, SIZE, ROWS, COUNT>(rows.row + FIRST, t * leading + c, leading, grad + t * leading + c, tap,
                                           sum);
  for (; t < tokens; ++t)
    add_tap_products<T, SIZE, ROWS, 1>(rows.row + FIRST, t * leading + c, leading, grad + t * leading + c, tap, sum);
#pragma GCC unroll 49
  for (int k = 0; k < ROWS * SIZE; ++k) {
    T* to = taps + (FIRST * SIZE + k) * leading + c;
    store(to, load(to) + tap[k]);
  }
  if constexpr (LAST < SIZE)
    add_tap_gradients<T, SIZE, LAST>(rows, grad, tokens, c, leading, taps, bias);
  else
    store(bias + c, load(bias + c) + sum);
}

// Adds the gradients of the taps [k * k, leading] and of the bias over `tokens` tokens, for the given columns, from dZ
// and the rows of U around it.
template <class T>
void depthwise_weight_backward(std::int64_t kernel_size, const TapRows<T>& rows, const T* grad_z, std::int64_t tokens,
                               std::int64_t leading, Range columns, T* taps, T* bias) {
  with_kernel_size(kernel_size, [&](auto size) {
    for (std::int64_t c = columns.begin; c < columns.end; c += kWidth<T>)
      add_tap_gradients<T, size(), 0>(rows, grad_z, tokens, c, leading, taps, bias);
  });
}

}  // namespace msformer::MSFORMER_VARIANT
