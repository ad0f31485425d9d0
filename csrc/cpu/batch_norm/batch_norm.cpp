// BatchNorm of tokens in training mode, forward and backward: every channel is normalised over all tokens of the batch.
//
// Two passes forward (statistics, output) and two backward (two sums a channel, gradient). Statistics of a block of
// tokens are its mean and the sum of squares about it, joined over blocks in double (Chan, Golub, LeVeque, 1979), so
// that a large mean does not swallow a small variance.
#include "../base/sums.h"
#include "../base/tokens.h"
#include "../engine/products.h"

namespace msformer::MSFORMER_VARIANT {
namespace {

template <class T>
struct BatchNorm {
  const BatchNormArguments& a;
  const std::int64_t channels = a.channels, width = padded<T>(channels), tokens = a.batch * a.tokens;
  const Split split = split_tokens(a.tokens, a.batch);
  const std::int64_t chunks = a.batch * split.count;

  explicit BatchNorm(const BatchNormArguments& arguments) : a(arguments) {}

  // calls task(chunk, batch, first token, tokens, scratch of `rows` blocks) for blocks of tokens, in parallel over
  // chunks
  template <class Task>
  void for_blocks(std::int64_t blocks, const Task& task) const {
    const std::int64_t block = kBlockTokens * width;
    parallel_for(
        chunks, a.num_threads, sizeof(T) * static_cast<std::size_t>(blocks * block),
        [&](std::int64_t chunk, void* data) {
          const std::int64_t batch = chunk / split.count, first = chunk % split.count * split.size;
          for_blocks_of(first, min_of(a.tokens, first + split.size), [&](std::int64_t token, std::int64_t count) {
            task(chunk, batch, token, count, static_cast<T*>(data), static_cast<T*>(data) + (blocks - 1) * block);
          });
        });
  }

  struct Moments {  // of the tokens of one chunk: mean and sum of squared differences, [width] each
    double *mean, *squares, *count;
  };
  Moments moments(double* memory, std::int64_t chunk) const {
    double* first = memory + chunk * (2 * width + 1);
    return {first, first + width, first + 2 * width};
  }

  static void join(double& mean, double& squares, double count, double other_mean, double other_squares,
                   double other_count) {
    const double total = count + other_count, difference = other_mean - mean;
    mean += difference * other_count / total;
    squares += other_squares + difference * difference * count * other_count / total;
  }

  void statistics() const {
    Workspace memory(sizeof(double) * static_cast<std::size_t>(chunks * (2 * width + 1)));
    double* all = static_cast<double*>(memory.data());
    for (std::int64_t i = 0; i < chunks * (2 * width + 1); ++i) all[i] = 0;
    for_blocks(1, [&](std::int64_t chunk, std::int64_t batch, std::int64_t token, std::int64_t count, T* x, T*) {
      load_tokens(a.x, batch, 0, token, count, channels, x, width);
      const Moments m = moments(all, chunk);
      for (std::int64_t c = 0; c < width; c += kWidth<T>) {
        Vector<T> sum{}, squares{};
        for (std::int64_t i = 0; i < count; ++i) sum += load(x + i * width + c);
        const Vector<T> mean = sum / static_cast<T>(count);
        for (std::int64_t i = 0; i < count; ++i) {
          const Vector<T> d = load(x + i * width + c) - mean;
          squares += d * d;
        }
        for (int lane = 0; lane < kWidth<T>; ++lane)
          join(m.mean[c + lane], m.squares[c + lane], *m.count, static_cast<double>(mean[lane]),
               static_cast<double>(squares[lane]), static_cast<double>(count));
      }
      *m.count += static_cast<double>(count);
    });
    for (std::int64_t c = 0; c < channels; ++c) {
      double mean = 0, squares = 0, count = 0;
      for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
        const Moments m = moments(all, chunk);
        join(mean, squares, count, m.mean[c], m.squares[c], *m.count);
        count += *m.count;
      }
      const double variance = squares / count;
      static_cast<T*>(a.mean)[c] = static_cast<T>(mean);
      static_cast<T*>(a.variance)[c] = static_cast<T>(variance);
    }
  }

  // NaN where the variance is beyond the largest number, as nothing right is left to say
  static T reciprocal_deviation(T variance, double eps) {
    if (variance == kInfinity<T>) return static_cast<T>(__builtin_nan(""));
    return static_cast<T>(1 / __builtin_sqrt(static_cast<double>(variance) + eps));
  }

  // rows [width]: what both passes that write multiply with
  struct Channels {
    T *mean, *rstd, *weight, *bias;
    Channels(Arena& arena, const BatchNorm& b)
        : mean(arena.take<T>(b.width)),
          rstd(arena.take<T>(b.width)),
          weight(arena.take<T>(b.width)),
          bias(arena.take<T>(b.width)) {}
    void fill_in(const BatchNorm& b) {
      copy_padded(mean, b.a.mean, b.channels);
      copy_padded(rstd, b.a.variance, b.channels);
      for (std::int64_t c = 0; c < b.width; ++c)
        rstd[c] = c < b.channels ? reciprocal_deviation(rstd[c], b.a.eps) : T(0);
      copy_padded(bias, b.a.parameters.bias, b.channels);
      copy_padded(weight, b.a.parameters.weight, b.channels);
      if (!b.a.parameters.weight) fill(weight, b.channels, T(1));
    }
  };

  void forward() const {
    statistics();
    Arena counter(nullptr);
    Channels(counter, *this);
    Workspace memory(counter.used());
    Arena arena(memory.data());
    Channels s(arena, *this);
    s.fill_in(*this);
    for_blocks(1, [&](std::int64_t, std::int64_t batch, std::int64_t token, std::int64_t count, T* x, T*) {
      load_tokens(a.x, batch, 0, token, count, channels, x, width);
      for (T* row = x; row < x + count * width; row += width)
        for (std::int64_t c = 0; c < width; c += kWidth<T>)
          store(row + c, (load(row + c) - load(s.mean + c)) * load(s.rstd + c) * load(s.weight + c) + load(s.bias + c));
      store_tokens(a.output, batch, 0, token, count, channels, x, width);
    });
  }

  void backward() const {
    Arena counter(nullptr);
    Channels(counter, *this);
    Workspace memory(counter.used() + sizeof(T) * static_cast<std::size_t>((chunks + 2) * 2 * width));
    Arena arena(memory.data());
    Channels s(arena, *this);
    s.fill_in(*this);
    T* partials = arena.take<T>(chunks * 2 * width);  // sums of dy and of dy x̂, a chunk each
    fill(partials, chunks * 2 * width, T(0));
    for_blocks(2, [&](std::int64_t chunk, std::int64_t batch, std::int64_t token, std::int64_t count, T* x, T* grad) {
      load_tokens(a.x, batch, 0, token, count, channels, x, width);
      load_tokens(a.grad_output, batch, 0, token, count, channels, grad, width);
      T* sums = partials + chunk * 2 * width;
      for (std::int64_t c = 0; c < width; c += kWidth<T>) {
        Vector<T> sum{}, dot{};
        for (std::int64_t i = 0; i < count; ++i) {
          const Vector<T> g = load(grad + i * width + c);
          sum += g;
          dot += g * (load(x + i * width + c) - load(s.mean + c));
        }
        store(sums + c, load(sums + c) + sum);
        store(sums + width + c, load(sums + width + c) + dot * load(s.rstd + c));
      }
    });
    T* total = arena.take<T>(2 * width);
    combine_partials<T>(partials, nullptr, chunks, 2 * width, 2 * width, total);
    copy_out(total, channels, a.gradients.bias);
    copy_out(total + width, channels, a.gradients.weight);
    const T inverse = static_cast<T>(1.0 / static_cast<double>(tokens));
    for_blocks(2, [&](std::int64_t, std::int64_t batch, std::int64_t token, std::int64_t count, T* x, T* grad) {
      load_tokens(a.x, batch, 0, token, count, channels, x, width);
      load_tokens(a.grad_output, batch, 0, token, count, channels, grad, width);
      for (std::int64_t i = 0; i < count * width; i += width)
        for (std::int64_t c = 0; c < width; c += kWidth<T>) {
          const Vector<T> normalized = (load(x + i + c) - load(s.mean + c)) * load(s.rstd + c);
          const Vector<T> g =
              load(grad + i + c) - load(total + c) * inverse - normalized * (load(total + width + c) * inverse);
          store(grad + i + c, g * (load(s.rstd + c) * load(s.weight + c)));
        }
      store_tokens(a.grad_x, batch, 0, token, count, channels, grad, width);
    });
  }
};

}  // namespace

void batch_norm_forward(const BatchNormArguments& a) {
  with_arithmetic(a.x.dtype, [&](auto value) { BatchNorm<decltype(value)>(a).forward(); });
}

void batch_norm_backward(const BatchNormArguments& a) {
  with_arithmetic(a.x.dtype, [&](auto value) { BatchNorm<decltype(value)>(a).backward(); });
}

}  // namespace msformer::MSFORMER_VARIANT
