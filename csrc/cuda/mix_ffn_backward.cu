// MixFFN, backward: the pass over tokens, the sums, and all passes one after the other (see mix_ffn_backward.h).
#include "mix_ffn_backward.h"

namespace msformer::gpu {
namespace {

constexpr int TOKEN_WARPS = 8, TOKEN_THREADS = 32 * TOKEN_WARPS;

// Sums over tokens by channel: of grad_output, of the gradient of the norm's weight, and of its bias. Groups of threads
// share the rows of a tile out.
constexpr int TOKEN_SUMS = 3;
BOTH int token_groups(int channels) { return channels < TOKEN_THREADS ? TOKEN_THREADS / channels : 1; }

template <class E, int ROWS>
struct TokenMemory {
  using C = Config<E>;
  static constexpr int OUT_STRIDE = tile_stride<typename E::Store>(C::OUT);
  Carver carver;
  int mean, rstd, offsets, hidden, fc1;
  int sums, gradient;  // if they fit: many channels go through scratch memory
  int stride;          // of the gradient

  BOTH TokenMemory(const MixFFN& a, bool on_chip) {
    constexpr int SIZE = sizeof(typename E::Store);
    const int channels = a.arguments.channels;
    stride = channels + 4;
    mean = carver.take(ROWS * 4);
    rstd = carver.take(ROWS * 4);
    offsets = carver.take(TOKEN_SUMS * ROWS * 8);
    hidden = carver.take(ROWS * C::STRIDE * SIZE);
    fc1 = carver.take(C::CHUNK * OUT_STRIDE * SIZE);
    sums = carver.take(on_chip ? TOKEN_SUMS * token_groups(channels) * channels * int(sizeof(ExactSum)) : 0);
    gradient = carver.take(on_chip ? ROWS * stride * 4 : 0);
  }
};

// The tokens of a tile: where a row begins in x, in grad_output and in grad_x.
template <class T>
struct TileRows {
  const T *x, *grad_output;
  T* grad_x;
  const std::int64_t *x_offset, *grad_output_offset, *grad_x_offset;
  std::int64_t x_stride, grad_output_stride, grad_x_stride;  // of channels

  DEV float x_at(int r, int c) const { return to_float(read(x + x_offset[r] + c * x_stride)); }
  DEV float grad_output_at(int r, int c) const {
    return to_float(read(grad_output + grad_output_offset[r] + c * grad_output_stride));
  }
  DEV void write_grad_x(int r, int c, float value) const {
    write(grad_x + grad_x_offset[r] + c * grad_x_stride, from_float<T>(value));
  }
};

// The gradient of LayerNorm(x), [rows, channels] in float32: that of U times fc1_weight.
template <class E, int ROWS>
DEV void multiply_by_fc1(const MixFFN& a, const TokenMemory<E, ROWS>& m, unsigned char* memory, std::int64_t start,
                         int rows, float* gradient) {
  using C = Config<E>;
  using T = typename E::Store;
  const MixFFNArguments& g = a.arguments;
  const Shared<T> shared{memory};
  T *hidden = shared.tile(m.hidden), *fc1 = shared.tile(m.fc1);
  for (int in = 0; in < g.channels; in += C::OUT) {
    const int ins = min(C::OUT, g.channels - in);
    Product<E, ROWS, C::OUT, 2, TOKEN_WARPS> product;
    product.clear();
    for (int first = 0; first < g.hidden; first += C::CHUNK) {
      const int channels = min(C::CHUNK, g.hidden - first);
      stage(hidden, C::STRIDE, ROWS, C::CHUNK, Parameter{a.scratch.grad_hidden, false}, g.hidden, start, first, rows,
            channels, TOKEN_THREADS);
      stage(fc1, m.OUT_STRIDE, C::CHUNK, round_up(ins, 16), g.parameters.fc1_weight, g.channels, first, in, channels,
            ins, TOKEN_THREADS);
      commit();
      wait<0>();
      __syncthreads();
      product.template add<false, false>(hidden, C::STRIDE, fc1, m.OUT_STRIDE, round_up(channels, 16), rows, ins);
      __syncthreads();
    }
    product.each([&](int r, int c, float sum) {
      if (r < rows && c < ins) gradient[r * m.stride + in + c] = sum;
    });
  }
}

template <class E, int ROWS>
KERNEL(TOKEN_THREADS, 1)
mix_ffn_token_backward_kernel(const MixFFN a) {
  using T = typename E::Store;
  DYNAMIC_SHARED(memory);
  const bool on_chip = !a.scratch.token_gradients;
  const TokenMemory<E, ROWS> m(a, on_chip);
  const Shared<T> shared{memory};
  const MixFFNArguments& g = a.arguments;
  const Parameter& weight = g.parameters.norm.weight;
  const bool norm = weight.data;
  float *mean = shared.floats(m.mean), *rstd = shared.floats(m.rstd);
  const int groups = token_groups(g.channels);
  float* gradient = on_chip ? shared.floats(m.gradient)
                            : a.scratch.token_gradients + blockIdx.x * static_cast<std::int64_t>(ROWS) * m.stride;
  ExactSum* sums =
      on_chip ? reinterpret_cast<ExactSum*>(memory + m.sums)
              : a.scratch.token_sums + blockIdx.x * static_cast<std::int64_t>(TOKEN_SUMS) * groups * g.channels;
  auto sum_of = [&](int which, int group, int c) -> ExactSum& {
    return sums[(which * groups + group) * g.channels + c];
  };
  for (int i = threadIdx.x; i < TOKEN_SUMS * groups * g.channels; i += TOKEN_THREADS) sums[i] = ExactSum{};

  auto* offsets = reinterpret_cast<std::int64_t*>(memory + m.offsets);
  const TileRows<T> tile{static_cast<const T*>(g.x.data),
                         static_cast<const T*>(g.grad_output.data),
                         static_cast<T*>(g.grad_x.data),
                         offsets,
                         offsets + ROWS,
                         offsets + 2 * ROWS,
                         g.x.channel_stride,
                         g.grad_output.channel_stride,
                         g.grad_x.channel_stride};
  const std::int64_t tokens = static_cast<std::int64_t>(g.height) * g.width, all = g.batch * tokens;
  const Walk walk(ceil_div(all, ROWS), blockIdx.x, a.scratch.token_splits);
  for (std::int64_t t = walk.begin; t < walk.end; t++) {
    const std::int64_t start = t * ROWS;
    const int rows = static_cast<int>(min(static_cast<std::int64_t>(ROWS), all - start));
    for (int r = threadIdx.x; r < rows; r += TOKEN_THREADS) {
      const std::int64_t image = (start + r) / tokens, token = (start + r) % tokens;
      offsets[r] = image * g.x.batch_stride + token * g.x.token_stride;
      offsets[ROWS + r] = image * g.grad_output.batch_stride + token * g.grad_output.token_stride;
      offsets[2 * ROWS + r] = image * g.grad_x.batch_stride + token * g.grad_x.token_stride;
    }
    __syncthreads();
    if (norm)
      row_statistics(
          mean, rstd, rows, g.channels, g.eps, TOKEN_WARPS, [&](int r, int c) { return tile.x_at(r, c); },
          [](int) { return true; });
    multiply_by_fc1<E, ROWS>(a, m, memory, start, rows, gradient);
    __syncthreads();
    for (int i = threadIdx.x; i < groups * g.channels; i += TOKEN_THREADS) {
      const int group = i / g.channels, c = i % g.channels;
      ExactSum output_sum, scale_sum, shift_sum;
      for (int r = group; r < rows; r += groups) {
        output_sum.add(tile.grad_output_at(r, c));
        if (!norm) continue;
        const float grad = gradient[r * m.stride + c];
        shift_sum.add(grad);
        scale_sum.add(grad * (tile.x_at(r, c) - mean[r]) * rstd[r]);
      }
      sum_of(0, group, c).join(output_sum);
      sum_of(1, group, c).join(scale_sum);
      sum_of(2, group, c).join(shift_sum);
    }
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int r = warp; r < rows; r += TOKEN_WARPS) {
      float sum = 0, product = 0;
      if (norm) {
        for (int c = lane; c < g.channels; c += 32) {
          const float grad = gradient[r * m.stride + c] * element<T>(weight, c);
          sum += grad;
          product += grad * (tile.x_at(r, c) - mean[r]) * rstd[r];
        }
        sum = warp_sum(sum) / static_cast<float>(g.channels);
        product = warp_sum(product) / static_cast<float>(g.channels);
      }
      for (int c = lane; c < g.channels; c += 32) {
        float grad = gradient[r * m.stride + c];
        if (norm) {
          const float normalized = (tile.x_at(r, c) - mean[r]) * rstd[r];
          grad = rstd[r] * (grad * element<T>(weight, c) - sum - normalized * product);
        }
        if (g.residual) grad += tile.grad_output_at(r, c);
        tile.write_grad_x(r, c, grad);
      }
    }
    __syncthreads();
  }
  float* partial = a.scratch.token_partials + blockIdx.x * a.scratch.token_size;
  for (int i = threadIdx.x; i < TOKEN_SUMS * g.channels; i += TOKEN_THREADS) {
    ExactSum total;
    for (int group = 0; group < groups; group++) total.join(sum_of(i / g.channels, group, i % g.channels));
    write(partial + i, total.value());
  }
}

// The rows of a tile of the pass over tokens: many, or few where many do not fit; in shared memory, or with the wide
// parts of it in scratch memory where even few do not.
struct TokenForm {
  bool many, on_chip;
  int shared;
};

template <class E>
TokenForm token_form(const MixFFN& a) {
  const int many = TokenMemory<E, 64>(a, true).carver.used, few = TokenMemory<E, 16>(a, true).carver.used;
  if (many <= most_shared()) return {true, true, many};
  if (few <= most_shared()) return {false, true, few};
  return {false, false, TokenMemory<E, 16>(a, false).carver.used};
}

template <class E>
int launch_tokens(const MixFFN& a, void* stream) {
  const TokenForm form = token_form<E>(a);
  if (form.shared > most_shared()) return OUT_OF_SHARED_MEMORY;
  const dim3 grid(a.scratch.token_splits);
  return form.many ? launch<mix_ffn_token_backward_kernel<E, 64>>(grid, TOKEN_THREADS, form.shared, stream, a)
                   : launch<mix_ffn_token_backward_kernel<E, 16>>(grid, TOKEN_THREADS, form.shared, stream, a);
}

// Scratch memory from `start` on; returns its bytes.
template <class E>
std::int64_t place_scratch(MixFFN& a, void* start) {
  using C = Config<E>;
  using T = typename E::Store;
  const MixFFNArguments& g = a.arguments;
  const std::int64_t tokens = g.batch * g.height * g.width, matrix = static_cast<std::int64_t>(g.channels) * g.hidden;
  const int chunks = ceil_div(g.hidden, C::CHUNK), blocks = max(1, chunks * ceil_div(g.channels, C::OUT));
  const bool norm = g.parameters.hidden_norm.weight.data != nullptr;
  MixFFNScratch& s = a.scratch;
  // a multiprocessor holds a block of the halves: more splits would wait for the first ones
  s.splits = static_cast<int>(min(count_tiles<C>(a), static_cast<std::int64_t>(max(1, processors() / blocks))));
  s.token_splits = static_cast<int>(min(ceil_div(tokens, std::int64_t{64}), std::int64_t{2} * processors()));
  s.second_size = matrix + (norm ? 2 * g.hidden : 0);
  s.first_size = matrix + 11ll * g.hidden;
  s.token_size = static_cast<std::int64_t>(TOKEN_SUMS) * g.channels;
  Scratch scratch{static_cast<char*>(start)};
  s.grad_normalized = scratch.take<T>(tokens * g.hidden);
  s.grad_hidden = scratch.take<T>(tokens * g.hidden);
  s.statistics = scratch.take<float>(norm ? tokens * 2 : 0);
  s.row_sums = scratch.take<float>(norm ? tokens * 2 * chunks : 0);
  s.second_partials = scratch.take<float>(s.splits * s.second_size);
  s.first_partials = scratch.take<float>(s.splits * s.first_size);
  s.token_partials = scratch.take<float>(s.token_splits * s.token_size);
  s.token_gradients = nullptr;
  s.token_sums = nullptr;
  if (!token_form<E>(a).on_chip) {
    s.token_gradients = scratch.take<float>(s.token_splits * std::int64_t{16} * (g.channels + 4));
    s.token_sums = scratch.take<ExactSum>(s.token_splits * s.token_size * token_groups(g.channels));
  }
  return scratch.used;
}

template <class E>
int sum_all(const MixFFN& a, void* stream) {
  const MixFFNArguments& g = a.arguments;
  const MixFFNScratch& s = a.scratch;
  const std::int64_t matrix = static_cast<std::int64_t>(g.channels) * g.hidden;
  Sums sums{};
  auto add = [&](const float* from, std::int64_t splits, std::int64_t size, std::int64_t count,
                 const ParameterGradient& to) {
    if (to.data) sums.sum[sums.count++] = {from, splits, size, count, to.data, to.wide};
  };
  const float *second = s.second_partials + matrix, *first = s.first_partials + matrix;
  add(s.first_partials, s.splits, s.first_size, matrix, g.gradients.fc1_weight);
  add(first, s.splits, s.first_size, 9ll * g.hidden, g.gradients.dw_weight);
  add(first + 9ll * g.hidden, s.splits, s.first_size, g.hidden, g.gradients.dw_bias);
  add(first + 10ll * g.hidden, s.splits, s.first_size, g.hidden, g.gradients.fc1_bias);
  add(s.second_partials, s.splits, s.second_size, matrix, g.gradients.fc2_weight);
  add(second, s.splits, s.second_size, g.hidden, g.gradients.hidden_norm.weight);
  add(second + g.hidden, s.splits, s.second_size, g.hidden, g.gradients.hidden_norm.bias);
  add(s.token_partials, s.token_splits, s.token_size, g.channels, g.gradients.fc2_bias);
  add(s.token_partials + g.channels, s.token_splits, s.token_size, g.channels, g.gradients.norm.weight);
  add(s.token_partials + 2 * g.channels, s.token_splits, s.token_size, g.channels, g.gradients.norm.bias);
  return sum_partials<typename E::Store>(sums, stream);
}

}  // namespace

int mix_ffn_backward(Engine engine, const MixFFNArguments& arguments, void* stream) {
  return with_engine(engine, [&](auto e) -> int {
    using E = decltype(e);
    MixFFN a{arguments, 0, false, {}};
    place_scratch<E>(a, arguments.scratch);
    if (arguments.parameters.hidden_norm.weight.data)
      if (int error = mix_ffn_statistics(engine, a, stream)) return error;
    if (int error = mix_ffn_second_backward(engine, a, stream)) return error;
    if (int error = mix_ffn_first_backward(engine, a, stream)) return error;
    if (int error = launch_tokens<E>(a, stream)) return error;
    return sum_all<E>(a, stream);
  });
}

std::int64_t mix_ffn_backward_scratch(Engine engine, const MixFFNArguments& arguments) {
  return with_engine(engine, [&](auto e) {
    MixFFN a{arguments, 0, false, {}};
    return place_scratch<decltype(e)>(a, nullptr);
  });
}

}  // namespace msformer::gpu
