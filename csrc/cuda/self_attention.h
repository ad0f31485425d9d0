// What the kernels of folded efficient self-attention share. With X the layer-normed tokens of an image, for up to 128
// channels, key and value features:
//
//     S = rho_k(X W_k)      A = S^T X      G_h = A_h W_v,h + b_v,h      M_h = G_h W_o,h
//     Y = rho_q(X W_q + b_q) M + b_o [+ x]
//
// rho_k is a softmax over the tokens, rho_q one over the features of a head. Queries, keys and values never leave the
// chip. Operands of products are rounded to the dtype of x; sums, statistics, A and G are float32.
#pragma once

#include <type_traits>

#include "tokens.h"
#include "warp_product.h"

namespace msformer::gpu {

constexpr int MOST_FEATURES = 128, WARPS = 8, THREADS = 32 * WARPS;
using WideProduct = WarpProduct<MOST_FEATURES / 8>;

// Products with what was summed over all tokens: float16 could overflow.
template <class E>
using SumEngine = std::conditional_t<std::is_same_v<E, F16>, Tf32, E>;

inline std::int64_t state_rows(const SelfAttentionArguments& a) { return a.batch * a.keys; }

// M = G W_o; with partial sums over tokens (forward) first the state and G from them. M, W_q and W_k are written as
// operands (see StagedRows).
struct Fold {
  SelfAttentionArguments arguments;
  const float *maxima, *sums, *key_tokens, *kept;  // [batch, splits, keys (x channels)], kept [batch, splits]; or none
  int splits;
  void* folded;                     // [batch, keys, channels rounded up to 16]
  void *query_weight, *key_weight;  // [keys, the same]; none: not needed
};
template <class T>
int fold(const Fold& f, void* stream);

// From the partial sums of dM over splits: dM, dG = dM W_o^T + the gradient of the returned context, dA = dG W_v^T and
// delta_j = <A_j, dA_j>, these two divided by the sum of the key softmax.
struct FoldBackward {
  SelfAttentionArguments arguments;
  const float* partials;  // [batch, splits, keys, channels]
  int splits;
  float *grad_folded, *grad_context;  // [batch, keys, channels or values of a head]
  void* grad_key_tokens;              // [batch, keys, channels rounded up to 16], an operand of SumEngine
  float* delta;                       // [batch, keys]
  int rows;                           // of a block
};
int fold_backward(Engine engine, FoldBackward f, void* stream);

// The gradients of W_o, W_v and b_v, one after the other, summed over groups of images: partials [groups, size].
struct ValueGradients {
  SelfAttentionArguments arguments;
  const float *grad_folded, *grad_context;
  float* partials;
  std::int64_t size;
  int groups;
};
int value_gradients(const ValueGradients& g, void* stream);

DEV bool is_kept(const Mask& mask, std::int64_t image, std::int64_t token) {
  return !mask.data || read(mask.data + image * mask.batch_stride + token * mask.token_stride);
}

// A vector in shared memory as float32, zeros without one.
template <class T>
DEV void stage_vector(float* to, const Parameter& vector, int count, int wide) {
  for (int i = threadIdx.x; i < wide; i += blockDim.x) to[i] = i < count && vector.data ? element<T>(vector, i) : 0.0f;
}

// Sums by channel or feature over all rows of all tiles: a tile's go to `parts`, a row for each warp, and after a
// barrier from there to sums that carry their errors on, for they may be long.
struct ColumnSums {
  static constexpr int BYTES = (WARPS * MOST_CHANNELS * 4) + MOST_CHANNELS * static_cast<int>(sizeof(ExactSum));
  float* parts;
  ExactSum* totals;

  DEV ColumnSums(unsigned char* memory)
      : parts(reinterpret_cast<float*>(memory)), totals(reinterpret_cast<ExactSum*>(parts + WARPS * MOST_CHANNELS)) {
    for (int c = threadIdx.x; c < MOST_CHANNELS; c += THREADS) totals[c] = {};
  }
  DEV float& part(int column) { return parts[threadIdx.x / 32 * MOST_CHANNELS + column]; }
  // Of the first `warps` warps. A column is always the same thread's.
  DEV void add_parts(int count, int warps = WARPS) {
    for (int c = threadIdx.x; c < count; c += THREADS) {
      float sum = 0;
      for (int w = 0; w < warps; w++) sum += parts[w * MOST_CHANNELS + c];
      totals[c].add(sum);
    }
  }
  DEV void write_to(float* to, int count) const {
    for (int c = threadIdx.x; c < count; c += THREADS) write(to + c, totals[c].value());
  }
};

// Rows of `columns` values, at most COLUMNS, in multiples of 16, from rows `pitch` apart that are aligned to 16 bytes.
// All threads of the block take part.
template <int COLUMNS, class T>
DEV void copy_aligned_rows(T* tile, int stride, const T* from, std::int64_t pitch, int rows, int columns) {
  constexpr int GROUP = 16 / sizeof(T), GROUPS = COLUMNS / GROUP;
  const int c = threadIdx.x % GROUPS * GROUP;
  if (c >= columns) return;
#pragma unroll 1
  for (int r = threadIdx.x / GROUPS; r < rows; r += blockDim.x / GROUPS)
    copy<16>(tile + r * stride + c, from + r * pitch + c);
}

// Zeros in `rows` rows of `columns` values.
template <class T>
DEV void clear_rows(T* tile, int stride, int rows, int columns) {
#pragma unroll 1
  for (int r = threadIdx.x / 32; r < rows; r += blockDim.x / 32)
    for (int c = threadIdx.x % 32; c < columns; c += 32) tile[r * stride + c] = from_float<T>(0.0f);
}

// Rows of an operand in shared memory, all of them at once or, where they do not fit, some at a time. In global memory
// it is [rows, channels rounded up to 16], zeros behind the channels. All threads of the block take part.
template <class T>
struct StagedRows {
  T* tile;
  int stride, at_once;  // a multiple of 16
  const T* matrix;
  int rows, channels;  // these with the zeros

  DEV bool resident() const { return at_once >= rows; }

  // Rows [first, first + at_once), to be there after a commit, wait and barrier.
  DEV void stage_from(int first) const {
    const int count = min(at_once, rows - first);
    copy_aligned_rows<MOST_CHANNELS>(tile, stride, matrix + static_cast<std::int64_t>(first) * channels, channels,
                                     count, channels);
    clear_rows(tile + count * stride, stride, round_up(count, 16) - count, channels);
  }

  // f(first, last) for the rows [first, last) that the tile holds then, in multiples of 16.
  template <class F>
  DEV void each(F f) const {
    if (resident()) return f(0, round_up(rows, 16));
    for (int first = 0; first < rows; first += at_once) {
      __syncthreads();
      stage_from(first);
      commit();
      wait<0>();
      __syncthreads();
      f(first, min(first + at_once, round_up(rows, 16)));
    }
  }
};

// rho_q of the rows of a warp: in each head a softmax over its columns.
DEV void softmax_heads(WideProduct& p, int heads, int head_keys) {
  for (int head = 0; head < heads; head++) {
    const int low = head * head_keys, high = low + head_keys;
    const int from = low / 8 * 8, to = round_up(high, 8);
    auto inside = [&](int j, int q) { return p.column(j, q) >= low && p.column(j, q) < high; };
    float largest[2] = {-INFINITY, -INFINITY}, total[2] = {};
    p.each(from, to, [&](int j, int q, float x) {
      if (inside(j, q)) largest[q / 2] = max(largest[q / 2], x);
    });
    for (float& m : largest) m = quad_max(m);
    p.each(from, to, [&](int j, int q, float& x) {
      if (!inside(j, q)) return;
      x = expf(x - largest[q / 2]);
      total[q / 2] += x;
    });
    for (float& t : total) t = 1 / quad_sum(t);
    p.each(from, to, [&](int j, int q, float& x) {
      if (inside(j, q)) x *= total[q / 2];
    });
  }
}

}  // namespace msformer::gpu
