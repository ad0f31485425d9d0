// Products of one warp: 16 rows, with all their columns in its registers, so that what is done to a whole row (a
// softmax) and the next product need no shared memory.
#pragma once

#include "tiles.h"

namespace msformer::gpu {

// The other lanes that hold parts of a row's sums.
DEV float quad_max(float x) {
  for (int bits = 1; bits < 4; bits *= 2) x = max(x, __shfl_xor_sync(ALL_LANES, x, bits));
  return x;
}
DEV float quad_sum(float x) {
  for (int bits = 1; bits < 4; bits *= 2) x += __shfl_xor_sync(ALL_LANES, x, bits);
  return x;
}

// What an operand is after a product has rounded it.
template <class E>
DEV float as_operand(float x) {
  if constexpr (sizeof(typename E::Store) == 2)
    return to_float(from_float<typename E::Store>(x));
  else
    return E::PARTS == 1 ? round_to_tf32(x) : x;
}

template <int NJ>
struct WarpProduct {
  float sum[NJ][4];

  // Where sum[j][q] stands.
  DEV static int row(int q) { return threadIdx.x % 32 / 4 + q / 2 * 8; }
  DEV static int column(int j, int q) { return 8 * j + threadIdx.x % 4 * 2 + q % 2; }

  DEV void clear() {
#pragma unroll
    for (int j = 0; j < NJ; j++)
#pragma unroll
      for (int q = 0; q < 4; q++) sum[j][q] = 0;
  }

  // f(j, q, sum) for columns [from, to), multiples of 8.
  template <class F>
  DEV void each(int from, int to, F f) {
    each_of(*this, from, to, f);
  }
  template <class F>
  DEV void each(int from, int to, F f) const {
    each_of(*this, from, to, f);
  }

  // Columns [from, to) += left right, over `inner` values (multiples of 16); the left tile's rows begin with `row`, the
  // right one's column for column 0 is `column`.
  template <class E, bool LEFT_TRANSPOSED, bool RIGHT_TRANSPOSED, class Left, class Right>
  DEV void add(const Left* left, int left_stride, int row, const Right* right, int right_stride, int column, int inner,
               int from, int to) {
#pragma unroll(sizeof(typename E::Store) == 2 ? 2 : 1)  // registers
    for (int k = 0; k < inner; k += E::INNER) {
      Fragment<E> a;
      load_left<E, LEFT_TRANSPOSED>(a, left, left_stride, row, k);
#pragma unroll
      for (int j = 0; j < NJ; j += 2) {
        if (8 * j < from) continue;
        if (8 * j >= to) break;
        Fragment<E> b;
        load_right<E, RIGHT_TRANSPOSED>(b, right, right_stride, k, column + 8 * j);
        multiply_add(sum[j], a, b, 0);
        multiply_add(sum[j + 1], a, b, 1);
      }
    }
  }

  // Columns [0, to) += left right, where the columns [first, last) of `left` are the inner values, and those of the
  // right tile begin with `first`.
  template <class E, int K, class Right>
  DEV void add_product(const WarpProduct<K>& left, const Right* right, int right_stride, int first, int last, int to) {
#pragma unroll
    for (int k = 0; k < 8 * K; k += E::INNER) {
      if (k < first || k >= last) continue;
      Fragment<E> a;
      left.template as_left<E>(a, k);
#pragma unroll
      for (int j = 0; j < NJ; j += 2) {
        if (8 * j >= to) break;
        Fragment<E> b;
        load_right<E, false, true>(b, right, right_stride, k - first, 8 * j);
        multiply_add(sum[j], a, b, 0);
        multiply_add(sum[j + 1], a, b, 1);
      }
    }
  }

  // Columns from k on as a left operand. A float32 engine takes a lane's two neighbouring columns where its inner
  // values lie 4 apart: the right operand must come IN_PAIRS.
  template <class E>
  DEV void as_left(Fragment<E>& f, int k) const {
    const int j = k / 8;
    if constexpr (sizeof(typename E::Store) == 2) {
      for (int half = 0; half < 2; half++)
        for (int q = 0; q < 2; q++) f.r[0][half * 2 + q] = packed<E>(sum[j + half][2 * q], sum[j + half][2 * q + 1]);
    } else if constexpr (E::INNER == 16) {
      for (int half = 0; half < 2; half++)
        for (int q = 0; q < 2; q++) f.split(half * 2 + q, sum[j + half][2 * q], sum[j + half][2 * q + 1]);
    } else {
      f.round(0, sum[j][0]);
      f.round(1, sum[j][2]);
      f.round(2, sum[j][1]);
      f.round(3, sum[j][3]);
    }
  }

  // Columns [from, to) as they are, in the dtype of a tile whose columns begin with `from`.
  template <class T>
  DEV void put(T* tile, int stride, int row, int from, int to) const {
    each(from, to, [&](int j, int q, float x) {
      tile[(row + WarpProduct::row(q)) * stride + column(j, q) - from] = from_float<T>(x);
    });
  }

 private:
  template <class Self, class F>
  DEV static void each_of(Self& self, int from, int to, F f) {
#pragma unroll
    for (int j = 0; j < NJ; j++) {
      if (8 * j < from || 8 * j >= to) continue;
#pragma unroll
      for (int q = 0; q < 4; q++) f(j, q, self.sum[j][q]);
    }
  }

  template <class E>
  DEV static unsigned packed(float low, float high) {
    using T = typename E::Store;
    return from_float<T>(low).bits | static_cast<unsigned>(from_float<T>(high).bits) << 16;
  }
};

// Two products with the same right operand, the left ones transposed, [inner][row]: columns [0, to) from `column` of
// the right tile on.
template <class E, int NJ, class Left, class Right>
DEV void add_both(WarpProduct<NJ>& first, WarpProduct<NJ>& second, const Left* first_left, const Left* second_left,
                  int left_stride, int row, const Right* right, int right_stride, int column, int inner, int to) {
  if constexpr (sizeof(typename E::Store) == 4) {  // they take too many registers
    first.template add<E, true, false>(first_left, left_stride, row, right, right_stride, column, inner, 0, to);
    second.template add<E, true, false>(second_left, left_stride, row, right, right_stride, column, inner, 0, to);
    return;
  }
#pragma unroll 2
  for (int k = 0; k < inner; k += E::INNER) {
    Fragment<E> one, other;
    load_left<E, true>(one, first_left, left_stride, row, k);
    load_left<E, true>(other, second_left, left_stride, row, k);
#pragma unroll
    for (int j = 0; j < NJ; j += 2) {
      if (8 * j >= to) break;
      Fragment<E> b;
      load_right<E, false>(b, right, right_stride, k, column + 8 * j);
      for (int half = 0; half < 2; half++) {
        multiply_add(first.sum[j + half], one, b, half);
        multiply_add(second.sum[j + half], other, b, half);
      }
    }
  }
}

}  // namespace msformer::gpu
