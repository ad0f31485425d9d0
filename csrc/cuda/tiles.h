// What the CUDA kernels share: products of tiles in shared memory on tensor cores, staging of tiles, LayerNorm of rows.
//
// A tile is a row-major matrix in shared memory of which a row holds `stride` values: the columns, rounded up to 16,
// and 16 bytes more, so that the rows of a fragment lie in different banks. What lies in the padding up to 16 must be
// zero in both operands wherever it is summed over.
#pragma once

#include "api.h"
#include "block.h"

namespace msformer::gpu {

constexpr unsigned ALL_LANES = ~0u;

template <class A, class B>
BOTH constexpr auto ceil_div(A a, B b) {
  return (a + b - 1) / b;
}
BOTH constexpr int round_up(int n, int to) { return (n + to - 1) / to * to; }
template <class T>
BOTH constexpr int tile_stride(int columns) {
  return round_up(columns, 16) + 16 / static_cast<int>(sizeof(T));
}

// Offsets into shared memory, in bytes.
struct Carver {
  int used = 0;

  BOTH int take(int bytes) {
    const int at = used;
    used += round_up(bytes, 128);
    return at;
  }
};

// Things in shared memory by their offsets; tiles hold values of type T.
template <class T>
struct Shared {
  unsigned char* memory;

  DEV float* floats(int at) const { return reinterpret_cast<float*>(memory + at); }
  DEV T* tile(int at) const { return reinterpret_cast<T*>(memory + at); }
};

// Scratch memory, given out piece by piece; without memory it only counts.
struct Scratch {
  char* memory;
  std::int64_t used = 0;

  template <class Value>
  Value* take(std::int64_t count) {
    Value* found = memory ? reinterpret_cast<Value*>(memory + used) : nullptr;
    used += (count * static_cast<std::int64_t>(sizeof(Value)) + 127) / 128 * 128;
    return found;
  }
};

// Tokens in `count` parts of `size`, a multiple of a tile: as many as there is room for at a time on the processors,
// and at least one. Blocks beyond that would wait for the others to end.
struct Split {
  std::int64_t count, size;
};

inline Split split_tokens(std::int64_t tokens, int tile, std::int64_t others, int room) {
  const std::int64_t tiles = tokens > tile ? ceil_div(tokens, static_cast<std::int64_t>(tile)) : 1;
  const std::int64_t wanted = others && others < room ? room / others : 1, each = ceil_div(tiles, wanted);
  return {ceil_div(tiles, each), each * tile};
}

// How products are done: what the tiles hold, how much of the inner dimension an instruction takes, and in how many
// parts an operand goes. Sums are float32.
struct Bf16 {
  using Store = bf16;
  static constexpr int INNER = 16, PARTS = 1;
};
struct F16 {
  using Store = f16;
  static constexpr int INNER = 16, PARTS = 1;
};
struct Tf32 {  // operands rounded to the nearest tf32
  using Store = float;
  static constexpr int INNER = 8, PARTS = 1;
};

// Operands in parts of bf16, LEFT of the left one and RIGHT of the right one: 8 bits each, 24 in three. Products of
// three orders count: six instructions for the accuracy of float32, and they take twice as much of the inner dimension
// as tf32's three; four that are exact for operands of 16 bits.
template <int LEFT_, int RIGHT_>
struct Bf16Parts {
  using Store = float;
  static constexpr int INNER = 16, LEFT = LEFT_, RIGHT = RIGHT_, PARTS = LEFT > RIGHT ? LEFT : RIGHT;
};
using Fp32 = Bf16Parts<3, 3>;

// f(engine) for the type of an engine.
template <class F>
auto with_engine(Engine engine, F f) {
  switch (engine) {
    case Engine::bf16:
      return f(Bf16{});
    case Engine::f16:
      return f(F16{});
    case Engine::tf32:
      return f(Tf32{});
    default:
      return f(Fp32{});
  }
}

template <class E>
struct Fragment {  // of the left operand, 16 rows; or of the right one, 16 columns: [column / 8 * 2 + inner / half]
  unsigned r[E::PARTS][4];

  DEV void round(int q, float x) { r[0][q] = bits_of(round_to_tf32(x)); }
  DEV void split(int q, float x, float y) {
    for (int p = 0; p < E::PARTS; p++) {
      r[p][q] = pack_bf16(x, y);
      const float x_rest = x - float_of(r[p][q] << 16), y_rest = y - float_of(r[p][q] & 0xffff0000u);
      x = x_rest == x_rest ? x_rest : 0.0f;  // NaN where x is infinite
      y = y_rest == y_rest ? y_rest : 0.0f;
    }
  }
};

// x as products by an engine take a right operand.
template <class E>
DEV float as_right_operand(float x) {
  if constexpr (E::INNER == 8) {
    return round_to_tf32(x);
  } else {
    float sum = 0;
    for (int p = 0; p < E::RIGHT; p++) {
      const float part = to_float(from_float<bf16>(x - sum));
      sum += part;
      if (part - part != 0) break;  // it is not finite
    }
    return sum;
  }
}

struct alignas(8) Pair {
  float x, y;
};

// The left operand's rows from `row` and inner values from `inner`; stored [row][inner], or [inner][row] if TRANSPOSED.
// Engines of float32 take tiles of any type.
template <class E, bool TRANSPOSED, class Tile>
DEV void load_left(Fragment<E>& f, const Tile* tile, int stride, int row, int inner) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(typename E::Store) == 2) {
    if constexpr (TRANSPOSED)
      load_matrices<true>(f.r[0], tile + (inner + lane / 16 * 8 + lane % 8) * stride + row + lane / 8 % 2 * 8);
    else
      load_matrices<false>(f.r[0], tile + (row + lane % 16) * stride + inner + lane / 16 * 8);
  } else if constexpr (E::INNER == 16) {
    for (int q = 0; q < 4; q++) {
      const int i = row + lane / 4 + q % 2 * 8, k = inner + lane % 4 * 2 + q / 2 * 8;
      const Pair p = TRANSPOSED ? Pair{tile[k * stride + i], tile[(k + 1) * stride + i]}
                                : *reinterpret_cast<const Pair*>(tile + i * stride + k);
      f.split(q, p.x, p.y);
    }
  } else {
    for (int q = 0; q < 4; q++) {
      const int i = row + lane / 4 + q % 2 * 8, k = inner + lane % 4 + q / 2 * 4;
      f.round(q, to_float(TRANSPOSED ? tile[k * stride + i] : tile[i * stride + k]));
    }
  }
}

// The right operand's 16 columns from `column`; stored [inner][column], or [column][inner] if TRANSPOSED, as weights
// are. IN_PAIRS: with the inner values in the order of `WarpProduct::as_left` (warp_product.h).
template <class E, bool TRANSPOSED, bool IN_PAIRS = false, class Tile>
DEV void load_right(Fragment<E>& f, const Tile* tile, int stride, int inner, int column) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(typename E::Store) == 2) {
    if constexpr (TRANSPOSED)
      load_matrices<false>(f.r[0], tile + (column + lane % 8 + lane / 16 * 8) * stride + inner + lane / 8 % 2 * 8);
    else
      load_matrices<true>(f.r[0], tile + (inner + lane % 16) * stride + column + lane / 16 * 8);
  } else if constexpr (E::INNER == 16) {
    for (int q = 0; q < 4; q++) {
      const int j = column + lane / 4 + q / 2 * 8, k = inner + lane % 4 * 2 + q % 2 * 8;
      const Pair p = TRANSPOSED ? *reinterpret_cast<const Pair*>(tile + j * stride + k)
                                : Pair{tile[k * stride + j], tile[(k + 1) * stride + j]};
      f.split(q, p.x, p.y);
    }
  } else {
    for (int q = 0; q < 4; q++) {
      const int j = column + lane / 4 + q / 2 * 8;
      const int k = inner + (IN_PAIRS ? lane % 4 * 2 + q % 2 : lane % 4 + q % 2 * 4);
      f.round(q, to_float(TRANSPOSED ? tile[j * stride + k] : tile[k * stride + j]));
    }
  }
}

template <int LEFT, int RIGHT>
DEV void multiply_add(float (&sum)[4], const Fragment<Bf16Parts<LEFT, RIGHT>>& left,
                      const Fragment<Bf16Parts<LEFT, RIGHT>>& right, int half) {
  const int b = half * 2;
  // tensor cores cut sums off: what is to have the accuracy of float32 is added up outside of them (Ootomo, Yokota,
  // "Recovering single precision accuracy from Tensor Cores", 2022)
  float product[4] = {}, small[4] = {};
  multiply_add(bf16{}, product, left.r[0], right.r[0][b], right.r[0][b + 1]);
#pragma unroll
  for (int order = 2; order > 0; order--)  // the smallest first
#pragma unroll
    for (int l = 0; l < LEFT; l++) {
      const int r = order - l;
      if (r >= 0 && r < RIGHT) multiply_add(bf16{}, small, left.r[l], right.r[r][b], right.r[r][b + 1]);
    }
  // the first parts tell what is not finite; infinity times another part of the other operand may have any sign
  for (int q = 0; q < 4; q++) sum[q] += product[q] + (small[q] - small[q] == 0 ? small[q] : 0.0f);
}

template <class E>
DEV void multiply_add(float (&sum)[4], const Fragment<E>& left, const Fragment<E>& right, int half) {
  const int b = half * 2;
  multiply_add(typename E::Store{}, sum, left.r[0], right.r[0][b], right.r[0][b + 1]);
}

// Sums of a product of ROWS x COLUMNS, spread over the warps of a block in units of 16 x 8 NJ. NJ is even.
template <class E, int ROWS, int COLUMNS, int NJ, int WARPS>
struct Product {
  static_assert(ROWS % 16 == 0 && COLUMNS % (8 * NJ) == 0 && NJ % 2 == 0);
  static constexpr int ROW_UNITS = ROWS / 16, ALL = ROW_UNITS * (COLUMNS / (8 * NJ)), UNITS = ceil_div(ALL, WARPS);
  using Store = typename E::Store;
  float sum[UNITS][NJ][4];

  DEV void clear() {
#pragma unroll
    for (int u = 0; u < UNITS; u++)
#pragma unroll
      for (int j = 0; j < NJ; j++)
#pragma unroll
        for (int q = 0; q < 4; q++) sum[u][j][q] = 0;
  }

  // sum += left right over `inner` values (a multiple of 16). Units that lie wholly beyond `rows` or `columns` are
  // left.
  template <bool LEFT_TRANSPOSED, bool RIGHT_TRANSPOSED>
  DEV void add(const Store* left, int left_stride, const Store* right, int right_stride, int inner, int rows = ROWS,
               int columns = COLUMNS) {
    const int warp = threadIdx.x / 32;
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
      const int unit = warp + u * WARPS, row = unit % ROW_UNITS * 16, column = unit / ROW_UNITS * (8 * NJ);
      if (unit >= ALL || row >= rows || column >= columns) continue;
#pragma unroll(E::PARTS > 1 ? 1 : 2)  // registers
      for (int k = 0; k < inner; k += E::INNER) {
        Fragment<E> a;
        load_left<E, LEFT_TRANSPOSED>(a, left, left_stride, row, k);
#pragma unroll
        for (int j = 0; j < NJ; j += 2) {
          if (column + 8 * j >= columns) break;
          Fragment<E> b;
          load_right<E, RIGHT_TRANSPOSED>(b, right, right_stride, k, column + 8 * j);
          multiply_add(sum[u][j], a, b, 0);
          multiply_add(sum[u][j + 1], a, b, 1);
        }
      }
    }
  }

  // f(row, column, sum) for every sum of this thread.
  template <class F>
  DEV void each(F f) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
      const int unit = warp + u * WARPS, row = unit % ROW_UNITS * 16, column = unit / ROW_UNITS * (8 * NJ);
      if (unit >= ALL) continue;
#pragma unroll
      for (int j = 0; j < NJ; j++)
#pragma unroll
        for (int q = 0; q < 4; q++) f(row + lane / 4 + q / 2 * 8, column + 8 * j + lane % 4 * 2 + q % 2, sum[u][j][q]);
    }
  }
};

// A sum that carries the error of each addition on (Neumaier, 1974).
struct ExactSum {
  float total = 0, lost = 0;

  DEV void add(float x) {
    const float next = total + x;
    lost += (total < 0 ? -total : total) >= (x < 0 ? -x : x) ? (total - next) + x : (x - next) + total;
    total = next;
  }
  DEV void join(const ExactSum& other) {
    add(other.total);
    lost += other.lost;
  }
  DEV float value() const { return lost == lost ? total + lost : total; }  // infinite sums have no error
};

template <class Number>
DEV Number warp_sum(Number x) {
  for (int bits = 16; bits; bits /= 2) x += __shfl_xor_sync(ALL_LANES, x, bits);
  return x;
}
// NaN where the variance is beyond the largest number, as nothing right is left to say
DEV float reciprocal_deviation(float variance, float eps) { return rsqrtf(variance + eps) + (variance - variance); }
DEV float warp_max(float x) {
  for (int bits = 16; bits; bits /= 2) x = max(x, __shfl_xor_sync(ALL_LANES, x, bits));
  return x;
}

template <class T>
DEV float element(const Parameter& p, std::int64_t i) {
  return p.wide ? read(static_cast<const float*>(p.data) + i) : to_float(read(static_cast<const T*>(p.data) + i));
}

template <class T>
DEV T* address(const Tokens& x, std::int64_t image, std::int64_t token, std::int64_t channel = 0) {
  return static_cast<T*>(x.data) + image * x.batch_stride + token * x.token_stride + channel * x.channel_stride;
}

template <int BYTES, class T>
DEV bool is_aligned(const T* data, std::int64_t pitch) {
  return (reinterpret_cast<std::uintptr_t>(data) | static_cast<std::uintptr_t>(pitch * sizeof(T))) % BYTES == 0;
}

// Rows x columns of a matrix of which a row is contiguous, `pitch` values after the last one, in the largest pieces
// that all rows are aligned to. What is copied without registers is there after the caller's commit, wait and barrier.
template <class T>
DEV void copy_matrix(T* tile, int stride, const T* from, std::int64_t pitch, int rows, int columns, int threads) {
  constexpr int SIZE = sizeof(T);
  const int bytes = is_aligned<16>(from, pitch)  ? 16
                    : is_aligned<8>(from, pitch) ? 8
                    : is_aligned<4>(from, pitch) ? 4
                                                 : SIZE;
  const int piece = bytes / SIZE, pieces = columns / piece, rest = columns - pieces * piece;
  for (int i = threadIdx.x; i < rows * pieces; i += threads) {
    const int r = i / pieces, c = i % pieces * piece;
    T* to = tile + r * stride + c;
    const T* at = from + r * pitch + c;
    if (bytes == 16)
      copy<16>(to, at);
    else if (bytes == 8)
      copy<8>(to, at);
    else if (bytes == 4)
      copy<4>(to, at);
    else
      *to = read(at);
  }
  for (int i = threadIdx.x; i < rows * rest; i += threads) {
    const int r = i / rest, c = pieces * piece + i % rest;
    tile[r * stride + c] = read(from + r * pitch + c);
  }
}

// Rows x columns of a contiguous matrix [.., pitch] from (row, column) on, into a tile of tall x wide; zeros in the
// rest. To be waited for as `copy_matrix`.
template <class T>
DEV void stage(T* tile, int stride, int tall, int wide, const Parameter& matrix, std::int64_t pitch, std::int64_t row,
               std::int64_t column, int rows, int columns, int threads) {
  const std::int64_t start = row * pitch + column;
  if (matrix.wide && sizeof(T) < 4) {
    const float* from = static_cast<const float*>(matrix.data) + start;
    for (int i = threadIdx.x; i < rows * columns; i += threads) {
      const int r = i / columns, c = i % columns;
      tile[r * stride + c] = from_float<T>(read(from + r * pitch + c));
    }
  } else {
    copy_matrix(tile, stride, static_cast<const T*>(matrix.data) + start, pitch, rows, columns, threads);
  }
  const int right = wide - columns;
  for (int i = threadIdx.x; i < rows * right; i += threads)
    tile[i / right * stride + columns + i % right] = from_float<T>(0.0f);
  for (int i = threadIdx.x; i < (tall - rows) * wide; i += threads)
    tile[(rows + i / wide) * stride + i % wide] = from_float<T>(0.0f);
}

// Mean and 1 / standard deviation of each of `rows` rows of `columns` values, by value(row, column); a warp a row. The
// deviations are summed from the values again, so that a large mean costs no digits. Rows where !exists(row) get zeros.
template <class Value, class Exists>
DEV void row_statistics(float* mean, float* rstd, int rows, int columns, float eps, int warps, Value value,
                        Exists exists) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int r = warp; r < rows; r += warps) {
    float m = 0, s = 0;
    if (exists(r)) {
      float sum = 0;
      for (int c = lane; c < columns; c += 32) sum += value(r, c);
      m = warp_sum(sum) / static_cast<float>(columns);
      float squares = 0;
      for (int c = lane; c < columns; c += 32) {
        const float d = value(r, c) - m;
        squares += d * d;
      }
      s = reciprocal_deviation(warp_sum(squares) / static_cast<float>(columns), eps);
    }
    if (lane == 0) {
      mean[r] = m;
      rstd[r] = s;
    }
  }
}

// One tensor of sums over `splits` partial sums, each `stride` values after the last, written in the dtype of a
// parameter.
struct Sum {
  const float* partials;
  std::int64_t splits, stride, count;
  void* to;  // none: nothing is written
  bool wide;
};
constexpr int MOST_SUMS = 16;
struct Sums {
  Sum sum[MOST_SUMS];
  int count;
};

// blockIdx.y: which tensor. In fixed order.
template <class T>
KERNEL(256, 1)
sum_partials_kernel(const Sums sums) {
  const Sum& s = sums.sum[blockIdx.y];
  for (std::int64_t i = blockIdx.x * 256ll + threadIdx.x; i < s.count; i += 256ll * gridDim.x) {
    ExactSum sum;
    for (std::int64_t k = 0; k < s.splits; k++) sum.add(read(s.partials + k * s.stride + i));
    const float value = sum.value();
    if (s.wide)
      write(static_cast<float*>(s.to) + i, value);
    else
      write(static_cast<T*>(s.to) + i, from_float<T>(value));
  }
}

template <class T>
int sum_partials(const Sums& sums, void* stream) {
  std::int64_t most = 0;
  for (int i = 0; i < sums.count; i++) most = most > sums.sum[i].count ? most : sums.sum[i].count;
  if (most == 0) return 0;
  const auto blocks = static_cast<unsigned>(most / 256 + 1 < 1024 ? most / 256 + 1 : 1024);
  return launch<sum_partials_kernel<T>>(dim3(blocks, sums.count), 256, 0, stream, sums);
}

}  // namespace msformer::gpu
