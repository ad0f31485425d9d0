// The small matrices of folded efficient self-attention, one row for each key feature: A, G and M, their gradients, and
// those of W_v, b_v and W_o. A row is independent of the others.
//
// An error in M is the same for all tokens, and does not average out in sums over them. So for float32 this is done in
// double precision, else in float32.
#include "self_attention.h"

namespace msformer::gpu {
namespace {

constexpr int FOLD_ROWS = 4;  // that a block works on at most, all of one head
template <class T>
using Wide = std::conditional_t<sizeof(T) == 4, double, float>;
template <class T>
using Row = Wide<T>[MOST_CHANNELS];

// Where a block works: up to `rows` rows from `row` on of a head of an image.
struct RowGroup {
  std::int64_t image;
  int head, row, rows;  // the row among those of the head
  std::int64_t state;   // the first row among those of all images

  DEV RowGroup(const SelfAttentionArguments& a, int rows_of_block) {
    const int head_keys = a.keys / a.heads, groups = ceil_div(head_keys, rows_of_block);
    const std::int64_t block = blockIdx.x / groups;
    image = block / a.heads;
    head = static_cast<int>(block % a.heads);
    row = static_cast<int>(blockIdx.x % groups) * rows_of_block;
    rows = min(rows_of_block, head_keys - row);
    state = block * head_keys + row;
  }
};

// Zeros behind the channels of rows of an operand.
template <class T>
DEV void clear_padding(T* operand, int rows, int channels) {
  const int pitch = round_up(channels, 16), padding = pitch - channels;
  for (int i = threadIdx.x; i < rows * padding; i += THREADS)
    write(operand + i / padding * pitch + channels + i % padding, from_float<T>(0.0f));
}

// More rows a block where there are enough of them: it reads the weights for all of them at once.
int rows_of_block(const SelfAttentionArguments& a) {
  return state_rows(a) < 4 * FOLD_ROWS * processors() ? 1 : FOLD_ROWS;
}
unsigned row_groups(const SelfAttentionArguments& a, int rows) {
  return static_cast<unsigned>(a.batch * a.heads * ceil_div(a.keys / a.heads, rows));
}

// Over all threads of a block, in a fixed order; `parts` has room for WARPS values.
template <class Number, class Join>
DEV Number reduce_block(Number x, Number* parts, Join join) {
  for (int bits = 16; bits; bits /= 2) x = join(x, __shfl_xor_sync(ALL_LANES, x, bits));
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  x = parts[0];
  for (int w = 1; w < WARPS; w++) x = join(x, parts[w]);
  __syncthreads();
  return x;
}
template <class Number>
DEV Number block_sum(Number x, Number* parts) {
  return reduce_block(x, parts, [](Number a, Number b) { return a + b; });
}
template <class Number>
DEV Number block_max(Number x, Number* parts) {
  return reduce_block(x, parts, [](Number a, Number b) { return max(a, b); });
}

// sum_s weight(s) partial(s), rows of `channels` values `stride` apart; the whole block, with `parts` for the sums of
// warps. In `sum` after the next barrier.
template <class T, class Weight>
DEV void sum_rows(Row<T>& sum, Row<T>* parts, const float* partials, std::int64_t stride, int splits, int channels,
                  Weight weight) {
  const int warp = threadIdx.x / 32;
  const Tokens tokens{const_cast<float*>(partials), 0, stride, 1};
  const ImageTokens<float> rows(tokens, 0, channels);
  Wide<T> own[4] = {};
#pragma unroll 4
  for (int s = warp; s < splits; s += WARPS) {
    const Four<float> x = rows.load(s, lane_channel());
    for (int i = 0; i < 4; i++) own[i] += weight(s) * Wide<T>(x.value[i]);
  }
  for (int i = 0; i < 4; i++) parts[warp][lane_channel() + i] = own[i];
  __syncthreads();
  for (int c = threadIdx.x; c < MOST_CHANNELS; c += THREADS) {
    Wide<T> total = 0;
    for (int w = 0; w < WARPS; w++) total += parts[w][c];
    sum[c] = c < channels ? total : 0;
  }
}

// out(row, o, sum) with the sum over i < inner of in[row][i] matrix[o * pitch + i], for every o; a warp an output. One
// lane has the sum. in[row][i] must be finite beyond `inner`.
template <class T, class Out>
DEV void multiply_rows(const Row<T>* in, int rows, int inner, const Parameter& matrix, std::int64_t start,
                       std::int64_t pitch, int outputs, Out out) {
  Wide<T> own[FOLD_ROWS][4];
#pragma unroll
  for (int r = 0; r < FOLD_ROWS; r++)
    for (int i = 0; i < 4; i++) own[r][i] = r < rows ? in[r][lane_channel() + i] : 0;
#pragma unroll 2
  for (int o = threadIdx.x / 32; o < outputs; o += WARPS) {
    float weight[4];
    for (int i = 0; i < 4; i++)
      weight[i] = lane_channel() + i < inner ? element<T>(matrix, start + o * pitch + lane_channel() + i) : 0.0f;
#pragma unroll
    for (int r = 0; r < FOLD_ROWS; r++) {
      if (r >= rows) break;
      Wide<T> sum = 0;
      for (int i = 0; i < 4; i++)
        if (lane_channel() + i < inner) sum += own[r][i] * weight[i];
      sum = warp_sum(sum);
      if (threadIdx.x % 32 == 0) out(r, o, sum);
    }
  }
}

// The same with the matrix transposed, matrix[i * pitch + o]: a thread an output and one half of the inner values.
template <class T>
DEV void multiply_rows_transposed(const Row<T>* in, Row<T>* halves, int rows, int inner, const Parameter& matrix,
                                  std::int64_t start, std::int64_t pitch, int outputs) {
  static_assert(THREADS == 2 * MOST_CHANNELS);
  const int o = threadIdx.x % MOST_CHANNELS, half = threadIdx.x / MOST_CHANNELS, middle = (inner + 1) / 2;
  Wide<T> sum[FOLD_ROWS] = {};
  if (o < outputs) {
    const int end = half ? inner : middle;
#pragma unroll 8
    for (int i = half ? middle : 0; i < end; i++) {
      const float weight = element<T>(matrix, start + i * pitch + o);
#pragma unroll
      for (int r = 0; r < FOLD_ROWS; r++)
        if (r < rows) sum[r] += in[r][i] * weight;
    }
  }
#pragma unroll
  for (int r = 0; r < FOLD_ROWS; r++)
    if (r < rows) halves[half * FOLD_ROWS + r][o] = sum[r];
}

template <class T>
struct FoldMemory {
  int key_tokens, context, parts, weights, warps, all;

  BOTH explicit FoldMemory(int splits) {
    Carver m;
    key_tokens = m.take(FOLD_ROWS * sizeof(Row<T>));
    context = m.take(FOLD_ROWS * sizeof(Row<T>));
    parts = m.take(2 * FOLD_ROWS * sizeof(Row<T>));
    weights = m.take(splits * 4);
    warps = m.take(WARPS * sizeof(Wide<T>));
    all = m.used;
  }
};
static_assert(2 * FOLD_ROWS >= WARPS);  // rows of `parts`

struct FoldPass {
  Fold fold;
  int rows;
  unsigned groups;  // blocks behind the groups of rows copy the weights
};
constexpr int COPIERS = 16;

template <class T>
DEV void copy_weight(void* to, const Parameter& weight, int rows, int channels, int block) {
  if (!to) return;
  const int pitch = round_up(channels, 16);
#pragma unroll 4
  for (int i = block * THREADS + threadIdx.x; i < rows * pitch; i += COPIERS * THREADS) {
    const int r = i / pitch, c = i % pitch;
    write(static_cast<T*>(to) + i, from_float<T>(c < channels ? element<T>(weight, r * channels + c) : 0.0f));
  }
}

template <class T>
KERNEL(THREADS, 1)
self_attention_fold_kernel(const FoldPass pass) {
  const Fold& f = pass.fold;
  const SelfAttentionArguments& a = f.arguments;
  if (blockIdx.x >= pass.groups) {
    const int block = static_cast<int>(blockIdx.x - pass.groups);
    copy_weight<T>(f.query_weight, a.parameters.query_weight, a.keys, a.channels, block);
    copy_weight<T>(f.key_weight, a.parameters.key_weight, a.keys, a.channels, block);
    return;
  }
  DYNAMIC_SHARED(memory);
  const FoldMemory<T> m(f.splits);
  Row<T>* key_tokens = reinterpret_cast<Row<T>*>(memory + m.key_tokens);
  Row<T>* context = reinterpret_cast<Row<T>*>(memory + m.context);
  Row<T>* parts = reinterpret_cast<Row<T>*>(memory + m.parts);
  float* weights = reinterpret_cast<float*>(memory + m.weights);
  auto* warps = reinterpret_cast<Wide<T>*>(memory + m.warps);
  const RowGroup at(a, pass.rows);
  const int head_values = a.values / a.heads, first_value = at.head * head_values;
  for (int i = threadIdx.x; i < FOLD_ROWS * MOST_CHANNELS; i += THREADS) {
    const int r = i / MOST_CHANNELS, v = i % MOST_CHANNELS;
    const bool given = !f.maxima && r < at.rows && v < head_values;
    context[r][v] = given ? read(a.state.context + (at.state + r) * head_values + v) : 0.0f;
  }

  if (f.maxima) {
    Wide<T> kept = 0;
    for (int s = threadIdx.x; s < f.splits; s += THREADS) kept += read(f.kept + at.image * f.splits + s);
    kept = block_sum(kept, warps);
    for (int r = 0; r < at.rows; r++) {
      const std::int64_t first = at.image * f.splits * a.keys + (at.state + r) % a.keys;
      Wide<T> maximum = -INFINITY, total = 0;
      for (int s = threadIdx.x; s < f.splits; s += THREADS)
        maximum = max(maximum, Wide<T>(read(f.maxima + first + s * static_cast<std::int64_t>(a.keys))));
      const float largest = static_cast<float>(block_max(maximum, warps));
      const float shift = largest == -INFINITY ? 0.0f : largest;
      for (int s = threadIdx.x; s < f.splits; s += THREADS) {
        const std::int64_t part = first + s * static_cast<std::int64_t>(a.keys);
        weights[s] = expf(read(f.maxima + part) - shift);
        total += Wide<T>(weights[s]) * read(f.sums + part);
      }
      total = block_sum(total, warps);
      if (total == 0 && kept > 0) total = NAN;  // all logits are -infinity
      sum_rows<T>(key_tokens[r], parts, f.key_tokens + first * a.channels,
                  static_cast<std::int64_t>(a.keys) * a.channels, f.splits, a.channels,
                  [&](int s) { return Wide<T>(weights[s]); });
      for (int c = threadIdx.x; c < a.channels; c += THREADS) {
        key_tokens[r][c] = total == 0 ? 0 : key_tokens[r][c] / total;
        write(a.state.key_tokens + (at.state + r) * a.channels + c, static_cast<float>(key_tokens[r][c]));
      }
      if (threadIdx.x == 0) {
        write(a.state.key_max + at.state + r, largest);
        write(a.state.key_sum + at.state + r, static_cast<float>(total));
      }
      __syncthreads();
    }
    // the columns of S sum to 1, or to 0 where no token is kept
    multiply_rows<T>(key_tokens, at.rows, a.channels, a.parameters.value_weight,
                     static_cast<std::int64_t>(first_value) * a.channels, a.channels, head_values,
                     [&](int r, int v, Wide<T> sum) {
                       if (kept > 0 && a.parameters.value_bias.data)
                         sum += element<T>(a.parameters.value_bias, first_value + v);
                       context[r][v] = sum;
                       write(a.state.context + (at.state + r) * head_values + v, static_cast<float>(sum));
                     });
  }
  __syncthreads();
  const int pitch = round_up(a.channels, 16);
  T* folded = static_cast<T*>(f.folded) + at.state * pitch;
  multiply_rows<T>(
      context, at.rows, head_values, a.parameters.output_weight, first_value, a.values, a.channels,
      [&](int r, int c, Wide<T> sum) { write(folded + r * pitch + c, from_float<T>(static_cast<float>(sum))); });
  clear_padding(folded, at.rows, a.channels);
}

template <class E>
KERNEL(THREADS, 1)
self_attention_fold_backward_kernel(const FoldBackward f) {
  using T = typename E::Store;
  using Sum = SumEngine<E>;
  const SelfAttentionArguments& a = f.arguments;
  DYNAMIC_SHARED(memory);
  const FoldMemory<T> m(0);
  Row<T>* grad_rows = reinterpret_cast<Row<T>*>(memory + m.key_tokens);  // of M, then of A
  Row<T>* grad_context = reinterpret_cast<Row<T>*>(memory + m.context);
  Row<T>* parts = reinterpret_cast<Row<T>*>(memory + m.parts);
  auto* warps = reinterpret_cast<Wide<T>*>(memory + m.warps);
  const RowGroup at(a, f.rows);
  const int head_values = a.values / a.heads, first_value = at.head * head_values;
  auto each = [&](int columns, auto g) {  // g(row, column) for the rows, spread over the threads
    for (int i = threadIdx.x; i < at.rows * columns; i += THREADS) g(i / columns, i % columns);
    __syncthreads();
  };
  auto joined = [&](int r, int o) { return parts[r][o] + parts[FOLD_ROWS + r][o]; };

  for (int r = 0; r < at.rows; r++) {
    const std::int64_t row = at.state + r, first = (at.image * f.splits * a.keys + row % a.keys) * a.channels;
    sum_rows<T>(grad_rows[r], parts, f.partials + first, static_cast<std::int64_t>(a.keys) * a.channels, f.splits,
                a.channels, [](int) { return Wide<T>(1); });
    __syncthreads();
  }
  each(a.channels, [&](int r, int c) {
    write(f.grad_folded + (at.state + r) * a.channels + c, static_cast<float>(grad_rows[r][c]));
  });

  multiply_rows_transposed<T>(grad_rows, parts, at.rows, a.channels, a.parameters.output_weight, first_value, a.values,
                              head_values);
  __syncthreads();
  each(head_values, [&](int r, int v) {
    const std::int64_t i = (at.state + r) * head_values + v;
    grad_context[r][v] = joined(r, v) + (a.grad_context ? read(a.grad_context + i) : 0.0f);
    write(f.grad_context + i, static_cast<float>(grad_context[r][v]));
  });

  multiply_rows_transposed<T>(grad_context, parts, at.rows, head_values, a.parameters.value_weight,
                              static_cast<std::int64_t>(first_value) * a.channels, a.channels, a.channels);
  __syncthreads();
  // Divided by the sum of the softmax, which is then not needed with the tokens. delta is subtracted from products with
  // these rows, most of which it cancels: both must see the same rounding.
  const int pitch = round_up(a.channels, 16);
  auto* grad_key_tokens = static_cast<typename Sum::Store*>(f.grad_key_tokens) + at.state * pitch;
  clear_padding(grad_key_tokens, at.rows, a.channels);
  each(a.channels, [&](int r, int c) {
    const float total = read(a.state.key_sum + at.state + r);
    const float grad = total == 0 ? 0.0f : as_operand<Sum>(static_cast<float>(joined(r, c) / total));
    write(grad_key_tokens + r * pitch + c, from_float<typename Sum::Store>(grad));
    grad_rows[r][c] = Wide<T>(grad) * read(a.state.key_tokens + (at.state + r) * a.channels + c);
  });
  for (int r = 0; r < at.rows; r++) {
    Wide<T> delta = 0;
    for (int c = threadIdx.x; c < a.channels; c += THREADS) delta += grad_rows[r][c];
    delta = block_sum(delta, warps);
    if (threadIdx.x == 0) write(f.delta + at.state + r, static_cast<float>(delta));
  }
}

// Sums over the images of a group and the features of a head: blockIdx.y 0 is W_o [channels, values], 1 is W_v [values,
// channels] and, behind it, b_v. blockIdx.z is the group.
KERNEL(THREADS, 1)
self_attention_value_gradient_kernel(const ValueGradients g) {
  const SelfAttentionArguments& a = g.arguments;
  const int head_keys = a.keys / a.heads, head_values = a.values / a.heads;
  const bool output = blockIdx.y == 0;
  const std::int64_t first = a.batch * blockIdx.z / g.groups, end = a.batch * (blockIdx.z + 1) / g.groups;
  const int matrix = a.channels * a.values, count = output ? matrix : matrix + a.values;
  for (int i = blockIdx.x * THREADS + threadIdx.x; i < count; i += gridDim.x * THREADS) {
    const bool bias = i >= matrix;
    const int value = bias ? i - matrix : output ? i % a.values : i / a.channels;
    const int channel = output ? i / a.values : i % a.channels;
    const int head = value / head_values;
    const float* context = (output ? a.state.context : g.grad_context) + value % head_values;
    const float* rows = (output ? g.grad_folded : a.state.key_tokens) + channel;
    float sum = 0;
    for (std::int64_t image = first; image < end; image++) {
      const std::int64_t row = image * a.keys + head * head_keys;
      if (bias && read(a.state.key_sum + row) == 0) continue;  // no token is kept: b_v is not in the context
#pragma unroll 4
      for (std::int64_t j = row; j < row + head_keys; j++)
        sum += read(context + j * head_values) * (bias ? 1.0f : read(rows + j * a.channels));
    }
    write(g.partials + blockIdx.z * g.size + (output ? 0 : matrix) + i, sum);
  }
}

}  // namespace

template <class T>
int fold(const Fold& f, void* stream) {
  const int rows = rows_of_block(f.arguments), shared = FoldMemory<T>(f.splits).all;
  if (shared > most_shared()) return OUT_OF_SHARED_MEMORY;
  const unsigned groups = row_groups(f.arguments, rows);
  return launch<self_attention_fold_kernel<T>>(dim3(groups + COPIERS), THREADS, shared, stream,
                                               FoldPass{f, rows, groups});
}
template int fold<bf16>(const Fold&, void*);
template int fold<f16>(const Fold&, void*);
template int fold<float>(const Fold&, void*);

int fold_backward(Engine engine, FoldBackward f, void* stream) {
  f.rows = rows_of_block(f.arguments);
  return with_engine(engine, [&](auto e) {
    return launch<self_attention_fold_backward_kernel<decltype(e)>>(
        dim3(row_groups(f.arguments, f.rows)), THREADS, FoldMemory<typename decltype(e)::Store>(0).all, stream, f);
  });
}

int value_gradients(const ValueGradients& g, void* stream) {
  const SelfAttentionArguments& a = g.arguments;
  const auto blocks = static_cast<unsigned>(ceil_div(a.channels * a.values + a.values, THREADS));
  return launch<self_attention_value_gradient_kernel>(dim3(blocks, 2, g.groups), THREADS, 0, stream, g);
}

}  // namespace msformer::gpu
