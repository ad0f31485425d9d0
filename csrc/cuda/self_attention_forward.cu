// Folded efficient self-attention, forward, in three kernels: partial A of every split of the tokens, with an online
// softmax; A, G and M (self_attention_fold.cu); the output. x is read twice and the output written once.
#include "self_attention.h"

namespace msformer::gpu {
namespace {

// Partial sums of a split of the tokens of an image: blockIdx.x is split and image, blockIdx.y some key features. The
// pass has the shape of attention with the rows of W_k for queries and the tokens for keys and values: a warp has 16
// features, with their logits, weights and part of A in its registers.
struct ContextPass {
  SelfAttentionArguments arguments;
  Split splits;
  int features;  // of a block, a multiple of 16
  float *maxima, *sums, *key_tokens, *kept;
};

template <class E>
struct ContextMemory {
  using T = typename E::Store;
  static constexpr int TOKENS = sizeof(T) == 2 ? 64 : 32;
  int stride, weights, tokens, tile, kept, all;  // two tiles of tokens, `tile` bytes apart, and whether they are kept

  BOTH ContextMemory(int channels, int features) {
    Carver m;
    stride = tile_stride<T>(channels);
    weights = m.take(features * stride * static_cast<int>(sizeof(T)));
    tokens = m.used;
    for (int i = 0; i < 2; i++) m.take(TOKENS * stride * static_cast<int>(sizeof(T)));
    tile = (m.used - tokens) / 2;
    kept = m.take(2 * TOKENS * 4);
    all = m.used;
  }
};

template <class E>
KERNEL(THREADS, 1)
self_attention_context_kernel(const ContextPass pass) {
  using T = typename E::Store;
  constexpr int TOKENS = ContextMemory<E>::TOKENS, ROWS = TOKENS / WARPS;
  const SelfAttentionArguments& a = pass.arguments;
  DYNAMIC_SHARED(memory);
  const ContextMemory<E> m(a.channels, pass.features);
  T* weights = reinterpret_cast<T*>(memory + m.weights);
  auto tokens_of = [&](int buffer) { return reinterpret_cast<T*>(memory + m.tokens + buffer * m.tile); };
  auto kept_of = [&](int buffer) { return reinterpret_cast<float*>(memory + m.kept) + buffer * TOKENS; };

  const int warp = threadIdx.x / 32;
  const std::int64_t image = blockIdx.x / pass.splits.count, split = blockIdx.x % pass.splits.count;
  const int first_feature = blockIdx.y * pass.features, features = min(pass.features, a.keys - first_feature);
  const std::int64_t first = split * pass.splits.size, end = min(a.tokens, first + pass.splits.size);
  const int channels = round_up(a.channels, 16);
  const ImageTokens<T> x(a.x, image, a.channels);
  const LaneNorm<T> norm(a.parameters.norm.weight, a.parameters.norm.bias, a.channels, a.eps);
  stage(weights, m.stride, round_up(features, 16), channels, a.parameters.key_weight, a.channels, first_feature, 0,
        features, a.channels, THREADS);
  commit();

  float kept_tokens = 0;
  TokenRows<T, ROWS> rows;
  auto put = [&](std::int64_t token, int buffer) {
    auto exists = [&](int i) {
      const std::int64_t t = token + warp + i * WARPS;
      return t < end && is_kept(a.mask, image, t);
    };
    rows.put(norm, tokens_of(buffer) + warp * m.stride, m.stride, WARPS, exists, [&](int i, const float (&)[4]) {
      const float kept = exists(i) ? 1.0f : 0.0f;
      kept_tokens += kept;
      if (threadIdx.x % 32 == 0) kept_of(buffer)[warp + i * WARPS] = kept;
    });
  };
  rows.fetch(x, first + warp, WARPS, end);
  put(first, 0);
  wait<0>();
  __syncthreads();

  const bool works = 16 * warp < features;
  float largest[2] = {-INFINITY, -INFINITY}, total[2] = {};
  WarpProduct<MOST_CHANNELS / 8> key_tokens;
  key_tokens.clear();
  int buffer = 0;
  for (std::int64_t token = first; token < end; token += TOKENS, buffer ^= 1) {
    const bool more = token + TOKENS < end;
    if (more) rows.fetch(x, token + TOKENS + warp, WARPS, end);
    WarpProduct<TOKENS / 8> p;  // logits, then weights
    if (works) {
      p.clear();
      p.template add<E, false, true>(weights, m.stride, 16 * warp, tokens_of(buffer), m.stride, 0, channels, 0, TOKENS);
      const float* kept = kept_of(buffer);
      float shift[2], rescale[2];
      for (int h = 0; h < 2; h++) shift[h] = largest[h];
      p.each(0, TOKENS, [&](int j, int q, float logit) {
        if (kept[p.column(j, q)] != 0) shift[q / 2] = max(shift[q / 2], logit);
      });
      for (int h = 0; h < 2; h++) {
        const float before = largest[h];
        largest[h] = quad_max(shift[h]);
        shift[h] = largest[h] == -INFINITY ? 0.0f : largest[h];
        rescale[h] = expf(before - shift[h]);
        total[h] *= rescale[h];
      }
      // the sum is that of the weights as the product rounds them, so that they add up to 1
      p.each(0, TOKENS, [&](int j, int q, float& x) {
        x = kept[p.column(j, q)] != 0 ? as_operand<E>(expf(x - shift[q / 2])) : 0.0f;
        total[q / 2] += x;
      });
      key_tokens.each(0, channels, [&](int, int q, float& sum) { sum *= rescale[q / 2]; });
    }
    if (more) put(token + TOKENS, buffer ^ 1);
    if (works) key_tokens.template add_product<E>(p, tokens_of(buffer), m.stride, 0, TOKENS, channels);
    __syncthreads();
  }

  // every warp has counted its own rows
  float* counts = kept_of(0);
  if (threadIdx.x % 32 == 0) counts[warp] = kept_tokens;
  __syncthreads();
  const std::int64_t part = image * pass.splits.count + split;
  if (threadIdx.x == 0 && blockIdx.y == 0) {
    float count = 0;
    for (int w = 0; w < WARPS; w++) count += counts[w];
    write(pass.kept + part, count);
  }
  if (!works) return;
  for (int h = 0; h < 2; h++) {
    total[h] = quad_sum(total[h]);
    const int feature = 16 * warp + key_tokens.row(2 * h);
    if (threadIdx.x % 4 || feature >= features) continue;
    write(pass.maxima + part * a.keys + first_feature + feature, largest[h]);
    write(pass.sums + part * a.keys + first_feature + feature, total[h]);
  }
  key_tokens.each(0, channels, [&](int j, int q, float sum) {
    const int feature = 16 * warp + key_tokens.row(q), channel = key_tokens.column(j, q);
    if (feature < features && channel < a.channels)
      write(pass.key_tokens + (part * a.keys + first_feature + feature) * a.channels + channel, sum);
  });
}

// The output: blockIdx.x is image and block; a block takes every `blocks`-th tile of the image, a warp 16 tokens of it
// on its own.
struct OutputPass {
  SelfAttentionArguments arguments;
  int blocks, warps;
  int at_once;                        // rows of W_q and of M that are on the chip at a time
  const void *query_weight, *folded;  // see Fold
};

template <class E>
struct OutputMemory {
  using T = typename E::Store;
  int stride, query_weight, folded, query_bias, output_bias, tokens, all;

  BOTH explicit OutputMemory(const OutputPass& p) {
    const SelfAttentionArguments& a = p.arguments;
    Carver m;
    stride = tile_stride<T>(a.channels);
    query_bias = m.take(MOST_FEATURES * 4);
    output_bias = m.take(MOST_CHANNELS * 4);
    query_weight = folded = m.take(p.at_once * stride * static_cast<int>(sizeof(T)));
    if (p.at_once >= a.keys) folded = m.take(p.at_once * stride * static_cast<int>(sizeof(T)));
    tokens = m.take(16 * p.warps * stride * static_cast<int>(sizeof(T)));
    all = m.used;
  }
};

template <class E>
KERNEL(THREADS, 1)
self_attention_output_kernel(const OutputPass pass) {
  using T = typename E::Store;
  const SelfAttentionArguments& a = pass.arguments;
  DYNAMIC_SHARED(memory);
  const OutputMemory<E> m(pass);
  const int warp = threadIdx.x / 32, channels = round_up(a.channels, 16), keys = round_up(a.keys, 16);
  float* query_bias = reinterpret_cast<float*>(memory + m.query_bias);
  float* output_bias = reinterpret_cast<float*>(memory + m.output_bias);
  T* tokens = reinterpret_cast<T*>(memory + m.tokens) + 16 * warp * m.stride;
  const std::int64_t image = blockIdx.x / pass.blocks, block = blockIdx.x % pass.blocks;
  const ImageTokens<T> x(a.x, image, a.channels), output(a.output, image, a.channels);
  const LaneNorm<T> norm(a.parameters.norm.weight, a.parameters.norm.bias, a.channels, a.eps);

  const StagedRows<T> query_weight{reinterpret_cast<T*>(memory + m.query_weight), m.stride, pass.at_once,
                                   static_cast<const T*>(pass.query_weight),      a.keys,   channels};
  const StagedRows<T> folded{reinterpret_cast<T*>(memory + m.folded),
                             m.stride,
                             pass.at_once,
                             static_cast<const T*>(pass.folded) + image * a.keys * channels,
                             a.keys,
                             channels};
  stage_vector<T>(query_bias, a.parameters.query_bias, a.keys, MOST_FEATURES);
  stage_vector<T>(output_bias, a.parameters.output_bias, a.channels, MOST_CHANNELS);
  if (query_weight.resident()) {
    query_weight.stage_from(0);
    folded.stage_from(0);
    commit();
    wait<0>();
  }
  __syncthreads();

  const int step = 16 * pass.warps;
  for (std::int64_t tile = block * step; tile < a.tokens; tile += static_cast<std::int64_t>(pass.blocks) * step) {
    const std::int64_t token = tile + 16 * warp;
    TokenRows<T, 8> rows;
    for (int half = 0; half < 16; half += 8) {
      rows.fetch(x, token + half, 1, a.tokens);
      rows.put(
          norm, tokens + half * m.stride, m.stride, 1, [&](int i) { return token + half + i < a.tokens; },
          [](int, const float (&)[4]) {});
    }
    __syncwarp();

    WideProduct p;  // logits, then weights
    p.clear();
    query_weight.each([&](int first, int last) {
      p.template add<E, false, true>(tokens, m.stride, 0, query_weight.tile, m.stride, -first, channels, first, last);
    });
    p.each(0, keys, [&](int j, int q, float& logit) { logit += query_bias[p.column(j, q)]; });
    softmax_heads(p, a.heads, a.keys / a.heads);
    WarpProduct<MOST_CHANNELS / 8> y;
    y.clear();
    folded.each(
        [&](int first, int last) { y.template add_product<E>(p, folded.tile, m.stride, first, last, channels); });
    y.each(0, channels, [&](int j, int q, float& sum) { sum += output_bias[y.column(j, q)]; });
    constexpr int FLOATS = 4 / sizeof(T);  // how many of a tile's values a float32 takes
    store_rows<T, MOST_CHANNELS / 8>(y, reinterpret_cast<float*>(tokens), m.stride / FLOATS, channels / FLOATS, output,
                                     token, a.tokens, [&](std::int64_t t, int channel, float (&values)[4]) {
                                       if (!a.residual) return;
                                       float added[4];
                                       widen(added, x.load(t, channel));
                                       for (int i = 0; i < 4; i++) values[i] += added[i];
                                     });
  }
}

template <class E>
struct Forward {
  using T = typename E::Store;
  const SelfAttentionArguments& a;
  const int tile = ContextMemory<E>::TOKENS;
  const Split splits = split_tokens(a.tokens, tile, a.batch, processors());
  float *maxima, *sums, *key_tokens, *kept;
  T *folded, *query_weight;
  std::int64_t bytes;

  explicit Forward(const SelfAttentionArguments& arguments) : a(arguments) {
    Scratch scratch{static_cast<char*>(a.scratch)};
    const std::int64_t parts = a.batch * splits.count;
    maxima = scratch.take<float>(parts * a.keys);
    sums = scratch.take<float>(parts * a.keys);
    key_tokens = scratch.take<float>(parts * a.keys * a.channels);
    kept = scratch.take<float>(parts);
    const std::int64_t operand = static_cast<std::int64_t>(a.keys) * round_up(a.channels, 16);
    folded = scratch.take<T>(a.batch * operand);
    query_weight = scratch.take<T>(operand);
    bytes = scratch.used;
  }

  int make_context(void* stream) const {
    int features = a.keys > 16 ? round_up(a.keys, 16) : 16;
    while (features > 16 && ContextMemory<E>(a.channels, features).all > most_shared()) features -= 16;
    const int shared = ContextMemory<E>(a.channels, features).all;
    if (shared > most_shared()) return OUT_OF_SHARED_MEMORY;
    const ContextPass pass{a, splits, features, maxima, sums, key_tokens, kept};
    const dim3 grid(static_cast<unsigned>(a.batch * splits.count), ceil_div(a.keys, features));
    return launch<self_attention_context_kernel<E>>(grid, THREADS, shared, stream, pass);
  }

  int make_output(void* stream) const {
    OutputPass pass{a, 0, WARPS, round_up(a.keys, 16), query_weight, folded};
    auto fits = [&](int warps, int at_once) {
      pass.warps = warps;
      pass.at_once = at_once;
      return OutputMemory<E>(pass).all <= most_shared();
    };
    const int all = round_up(a.keys, 16), some = min(all, 32);
    if (!fits(WARPS, all) && !fits(WARPS / 2, all) && !fits(WARPS, some) && !fits(WARPS / 2, some))
      return OUT_OF_SHARED_MEMORY;
    const Split split = split_tokens(a.tokens, 16 * pass.warps, a.batch, processors());
    pass.blocks = static_cast<int>(split.count);
    const dim3 grid(static_cast<unsigned>(a.batch * pass.blocks));
    return launch<self_attention_output_kernel<E>>(grid, 32 * pass.warps, OutputMemory<E>(pass).all, stream, pass);
  }

  int run(void* stream) const {
    if (int error = make_context(stream)) return error;
    const Fold f{a, maxima, sums, key_tokens, kept, static_cast<int>(splits.count), folded, query_weight, nullptr};
    if (int error = fold<T>(f, stream)) return error;
    return make_output(stream);
  }
};

}  // namespace

int self_attention_forward(Engine engine, const SelfAttentionArguments& arguments, void* stream) {
  return with_engine(engine, [&](auto e) { return Forward<decltype(e)>(arguments).run(stream); });
}

std::int64_t self_attention_forward_scratch(Engine engine, const SelfAttentionArguments& arguments) {
  return with_engine(engine, [&](auto e) { return Forward<decltype(e)>(arguments).bytes; });
}

}  // namespace msformer::gpu
