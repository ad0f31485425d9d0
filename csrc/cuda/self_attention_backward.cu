// Folded efficient self-attention, backward, in two passes over the tokens that recompute both softmaxes.
//
// The query pass makes P = rho_q again, writes the gradient of the queries and sums dM = P^T dY over a split. Small
// kernels (self_attention_fold.cu) turn dM into dA and delta. The token pass (self_attention_token_backward.h) writes
// the gradient of x. Sums over tokens go to partial sums, one for each split or block, which `sum_partials` adds.
#include "self_attention_token_backward.h"

namespace msformer::gpu {
namespace {

// grad -> weights (grad - sum(weights grad)), the sum over a head, with the weights that belong to grad.sum[j][q].
template <class Weight>
DEV void softmax_heads_backward(WideProduct& grad, Weight weight, int heads, int head_keys) {
  for (int head = 0; head < heads; head++) {
    const int low = head * head_keys, high = low + head_keys;
    const int from = low / 8 * 8, to = round_up(high, 8);
    auto inside = [&](int j, int q) { return grad.column(j, q) >= low && grad.column(j, q) < high; };
    float total[2] = {};
    grad.each(from, to, [&](int j, int q, float g) {
      if (inside(j, q)) total[q / 2] += weight(j, q) * g;
    });
    for (float& t : total) t = quad_sum(t);
    grad.each(from, to, [&](int j, int q, float& g) {
      if (inside(j, q)) g = weight(j, q) * (g - total[q / 2]);
    });
  }
}

// blockIdx.x is split and image. Tiles of 16 tokens for each of `warps` warps; then each of all warps sums 16 rows of
// dM over the tile.
struct QueryPass {
  SelfAttentionArguments arguments;
  Split splits;
  int warps, at_once;                 // see OutputPass
  const void *query_weight, *folded;  // see Fold
  void* grad_query;                   // [batch, tokens, keys rounded up to 16]
  float *partials, *output_bias;
};

template <class E>
struct QueryMemory {
  using T = typename E::Store;
  int stride, wide_stride, query_bias, output_bias, query_weight, folded, tokens, grad_output, all;

  BOTH explicit QueryMemory(const QueryPass& p) {
    const SelfAttentionArguments& a = p.arguments;
    constexpr int SIZE = sizeof(T);
    Carver m;
    stride = tile_stride<T>(a.channels);
    wide_stride = tile_stride<T>(max(a.channels, a.keys));
    query_bias = m.take(MOST_FEATURES * 4);
    output_bias = m.take(ColumnSums::BYTES);
    query_weight = folded = m.take(p.at_once * stride * SIZE);
    if (p.at_once >= a.keys) folded = m.take(p.at_once * stride * SIZE);
    tokens = m.take(16 * p.warps * wide_stride * SIZE);  // X, then P
    grad_output = m.take(16 * p.warps * stride * SIZE);
    all = m.used;
  }
};

template <class E>
KERNEL(THREADS, 1)
self_attention_query_backward_kernel(const QueryPass pass) {
  using T = typename E::Store;
  const SelfAttentionArguments& a = pass.arguments;
  DYNAMIC_SHARED(memory);
  const QueryMemory<E> m(pass);
  const int warp = threadIdx.x / 32, channels = round_up(a.channels, 16), keys = round_up(a.keys, 16);
  float* query_bias = reinterpret_cast<float*>(memory + m.query_bias);
  T* tokens = reinterpret_cast<T*>(memory + m.tokens);
  T* grad_output = reinterpret_cast<T*>(memory + m.grad_output);
  const std::int64_t image = blockIdx.x / pass.splits.count, split = blockIdx.x % pass.splits.count;
  const std::int64_t end = min(a.tokens, (split + 1) * pass.splits.size);
  const ImageTokens<T> x(a.x, image, a.channels), y(a.grad_output, image, a.channels);

  const StagedRows<T> query_weight{reinterpret_cast<T*>(memory + m.query_weight), m.stride, pass.at_once,
                                   static_cast<const T*>(pass.query_weight),      a.keys,   channels};
  const StagedRows<T> folded{reinterpret_cast<T*>(memory + m.folded),
                             m.stride,
                             pass.at_once,
                             static_cast<const T*>(pass.folded) + image * a.keys * channels,
                             a.keys,
                             channels};
  stage_vector<T>(query_bias, a.parameters.query_bias, a.keys, MOST_FEATURES);
  if (query_weight.resident()) {
    query_weight.stage_from(0);
    folded.stage_from(0);
    commit();
    wait<0>();
  }
  __syncthreads();

  WarpProduct<MOST_CHANNELS / 8> grad_folded;  // rows 16 warp and on of dM
  grad_folded.clear();
  ColumnSums output_bias(memory + m.output_bias);
  const int step = 16 * pass.warps, row = 16 * warp;
  const bool works = warp < pass.warps;
  for (std::int64_t tile = split * pass.splits.size; tile < end; tile += step) {
    const std::int64_t token = tile + row;
    if (works) {
      const LaneNorm<T> norm(a.parameters.norm.weight, a.parameters.norm.bias, a.channels, a.eps);
      const LaneNorm<T> none({nullptr, false}, {nullptr, false}, a.channels, 0);
      float sums[4] = {};
      constexpr int ROWS = 8;  // at a time
      for (int r = 0; r < 16; r += ROWS) {
        auto exists = [&](int i) { return token + r + i < end; };
        TokenRows<T, ROWS> rows, grads;
        rows.fetch(x, token + r, 1, end);
        grads.fetch(y, token + r, 1, end);
        rows.put(norm, tokens + (row + r) * m.wide_stride, m.wide_stride, 1, exists, [](int, const float (&)[4]) {});
        grads.put(none, grad_output + (row + r) * m.stride, m.stride, 1, exists, [&](int, const float (&g)[4]) {
          for (int i = 0; i < 4; i++) sums[i] += g[i];
        });
      }
      for (int i = 0; i < 4; i++) output_bias.part(lane_channel() + i) = sums[i];
    }
    __syncwarp();

    WideProduct p;  // logits, then weights
    p.clear();
    query_weight.each([&](int first, int last) {
      if (works)
        p.template add<E, false, true>(tokens, m.wide_stride, row, query_weight.tile, m.stride, -first, channels, first,
                                       last);
    });
    if (works) {
      p.each(0, keys, [&](int j, int q, float& logit) { logit += query_bias[p.column(j, q)]; });
      softmax_heads(p, a.heads, a.keys / a.heads);
      __syncwarp();
      p.put(tokens, m.wide_stride, row, 0, keys);
    }
    // where most of the gradient cancels, weights that are rounded would show; a float32 tile spares registers
    auto weight = [&](int j, int q) {
      return sizeof(T) == 2 ? p.sum[j][q] : to_float(tokens[(row + p.row(q)) * m.wide_stride + p.column(j, q)]);
    };
    WideProduct grad;  // of the weights, then of the logits
    grad.clear();
    folded.each([&](int first, int last) {
      if (works)
        grad.template add<E, false, true>(grad_output, m.stride, row, folded.tile, m.stride, -first, channels, first,
                                          last);
    });
    if (works) {
      softmax_heads_backward(grad, weight, a.heads, a.keys / a.heads);
      grad.each(0, keys, [&](int j, int q, float g) {
        if (token + grad.row(q) >= end) return;
        const int feature = grad.column(j, q);
        T* to = static_cast<T*>(pass.grad_query) + (image * a.tokens + token + grad.row(q)) * keys + feature;
        write(to, from_float<T>(feature < a.keys ? g : 0.0f));
      });
    }
    __syncthreads();
    output_bias.add_parts(a.channels, pass.warps);
    if (row < keys)
      grad_folded.template add<E, true, false>(tokens, m.wide_stride, row, grad_output, m.stride, 0, step, 0, channels);
    __syncthreads();
  }

  const std::int64_t part = image * pass.splits.count + split;
  grad_folded.each(0, channels, [&](int j, int q, float sum) {
    const int feature = row + grad_folded.row(q), channel = grad_folded.column(j, q);
    if (feature < a.keys && channel < a.channels)
      write(pass.partials + (part * a.keys + feature) * a.channels + channel, sum);
  });
  output_bias.write_to(pass.output_bias + part * a.channels, a.channels);
}

// What the sums over tokens, images and splits are added from.
class GradientSums {
 public:
  void add(const ParameterGradient& to, const float* partials, std::int64_t splits, std::int64_t stride,
           std::int64_t count) {
    if (to.data) sums_.sum[sums_.count++] = {partials, splits, stride, count, to.data, to.wide};
  }
  const Sums& sums() const { return sums_; }

 private:
  Sums sums_{};
};

template <class E>
struct Backward {
  using T = typename E::Store;
  const SelfAttentionArguments& a;
  QueryPass query{};
  TokenPass token{};
  int blocks = 0, groups = 0;  // of the token pass; of images
  std::int64_t value_size = 0, bytes = 0;
  float *grad_folded = nullptr, *grad_context = nullptr, *delta = nullptr, *value_partials = nullptr;
  T *folded = nullptr, *query_weight = nullptr, *key_weight = nullptr, *grad_query = nullptr;
  typename SumEngine<E>::Store* grad_key_tokens = nullptr;

  explicit Backward(const SelfAttentionArguments& arguments) : a(arguments) {
    query.arguments = token.arguments = a;
    if (!fit()) {
      bytes = OUT_OF_SHARED_MEMORY;
      return;
    }
    query.splits = split_tokens(a.tokens, 16 * query.warps, a.batch, processors());
    const std::int64_t tiles = a.batch * token.tiles_of_image();
    blocks = static_cast<int>(tiles < processors() ? tiles : processors());
    groups = static_cast<int>(a.batch < 32 ? a.batch : 32);
    const std::int64_t keys = a.keys, channels = a.channels, values = a.values, parts = a.batch * query.splits.count;
    token.size = 2 * keys * channels + keys + 2 * channels;
    value_size = 2 * channels * values + values;

    Scratch scratch{static_cast<char*>(a.scratch)};
    const std::int64_t operand = keys * round_up(a.channels, 16);
    folded = scratch.take<T>(a.batch * operand);
    query_weight = scratch.take<T>(operand);
    key_weight = scratch.take<T>(operand);
    grad_query = scratch.take<T>(a.batch * a.tokens * round_up(a.keys, 16));
    grad_key_tokens = scratch.take<typename SumEngine<E>::Store>(a.batch * operand);
    grad_folded = scratch.take<float>(a.batch * keys * channels);
    grad_context = scratch.take<float>(a.batch * keys * values / a.heads);
    delta = scratch.take<float>(a.batch * keys);
    query.partials = scratch.take<float>(parts * keys * channels);
    query.output_bias = scratch.take<float>(parts * channels);
    token.partials = scratch.take<float>(blocks * token.size);
    value_partials = scratch.take<float>(groups * value_size);
    bytes = scratch.used;
    query.folded = folded;
    query.query_weight = token.query_weight = query_weight;
    token.key_weight = key_weight;
    query.grad_query = grad_query;
    token.grad_query = grad_query;
    token.grad_key_tokens = grad_key_tokens;
    token.delta = delta;
  }

  bool fit() {
    const int all = round_up(a.keys, 16), some = all < CHUNK ? all : CHUNK;
    auto query_fits = [&](int warps, int at_once) {
      query.warps = warps;
      query.at_once = at_once;
      return QueryMemory<E>(query).all <= most_shared();
    };
    auto token_fits = [&](int rows, int at_once) {
      token.rows = rows;
      token.at_once = at_once;
      return TokenMemory<E>(token).all <= most_shared();
    };
    return (query_fits(WARPS, all) || query_fits(WARPS, some) || query_fits(WARPS / 2, all) ||
            query_fits(WARPS / 2, some)) &&
           (token_fits(MOST_ROWS, all) || token_fits(MOST_ROWS, some) || token_fits(MOST_ROWS / 2, all) ||
            token_fits(MOST_ROWS / 2, some));
  }

  int sum_gradients(void* stream) const {
    const auto& g = a.gradients;
    const std::int64_t keys = a.keys, channels = a.channels, values = a.values, matrix = keys * channels;
    GradientSums sums;
    const float* of_tokens = token.partials;
    sums.add(g.query_weight, of_tokens, blocks, token.size, matrix);
    sums.add(g.key_weight, of_tokens + matrix, blocks, token.size, matrix);
    sums.add(g.query_bias, of_tokens + 2 * matrix, blocks, token.size, keys);
    sums.add(g.norm.weight, of_tokens + 2 * matrix + keys, blocks, token.size, channels);
    sums.add(g.norm.bias, of_tokens + 2 * matrix + keys + channels, blocks, token.size, channels);
    sums.add(g.output_weight, value_partials, groups, value_size, channels * values);
    sums.add(g.value_weight, value_partials + channels * values, groups, value_size, channels * values);
    sums.add(g.value_bias, value_partials + 2 * channels * values, groups, value_size, values);
    sums.add(g.output_bias, query.output_bias, a.batch * query.splits.count, channels, channels);
    return sum_partials<T>(sums.sums(), stream);
  }

  int run(Engine engine, void* stream) const {
    if (bytes < 0) return static_cast<int>(bytes);
    const Fold f{a, nullptr, nullptr, nullptr, nullptr, 0, folded, query_weight, key_weight};
    if (int error = fold<T>(f, stream)) return error;
    if (int error =
            launch<self_attention_query_backward_kernel<E>>(dim3(static_cast<unsigned>(a.batch * query.splits.count)),
                                                            THREADS, QueryMemory<E>(query).all, stream, query))
      return error;
    const FoldBackward back{
        a, query.partials, static_cast<int>(query.splits.count), grad_folded, grad_context, grad_key_tokens, delta, 0};
    if (int error = fold_backward(engine, back, stream)) return error;
    if (int error = value_gradients({a, grad_folded, grad_context, value_partials, value_size, groups}, stream))
      return error;
    if (int error = launch<self_attention_token_backward_kernel<E>>(dim3(blocks), THREADS, TokenMemory<E>(token).all,
                                                                    stream, token))
      return error;
    return sum_gradients(stream);
  }
};

}  // namespace

int self_attention_backward(Engine engine, const SelfAttentionArguments& arguments, void* stream) {
  return with_engine(engine, [&](auto e) { return Backward<decltype(e)>(arguments).run(engine, stream); });
}

std::int64_t self_attention_backward_scratch(Engine engine, const SelfAttentionArguments& arguments) {
  return with_engine(engine, [&](auto e) { return Backward<decltype(e)>(arguments).bytes; });
}

}  // namespace msformer::gpu
