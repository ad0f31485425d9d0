// A linear layer on tokens, Y = X W^T + b, forward and backward, for one side much longer than the others: many tokens
// with small weights, or few tokens with very many input features.
//
// All three products (Y, dX, dW) go through one loop. A product C [m, n] = sum over k is cut into tiles of rows and
// columns, and, where that gives few tiles and k is long, into ranges of k whose partial sums are added at the end in a
// fixed order. A tile walks along k in blocks: both operands are brought into scratch (converted, transposed where need
// be), then multiplied in registers (gemm.h). All cuts depend on the shape alone.
#include "../base/sums.h"
#include "../base/tokens.h"
#include "../engine/dense.h"

namespace msformer::MSFORMER_VARIANT {
namespace {

constexpr std::int64_t kTileM = 288, kTileN = 128, kBlockK = 256, kWantedTiles = 16, kLeastK = 1024;

template <class E>
struct Product {
  using T = typename E::Value;
  const E& engine;
  std::int64_t m, n, k;
  const std::int64_t m_tiles = (m + kTileM - 1) / kTileM, n_tiles = (n + kTileN - 1) / kTileN;
  const std::int64_t k_ranges = count_ranges();

  std::int64_t count_ranges() const {
    const std::int64_t tiles = m_tiles * n_tiles;
    if (tiles == 0 || tiles >= kWantedTiles || k < 2 * kLeastK) return 1;
    return min_of<std::int64_t>(64 / tiles, k / kLeastK);
  }

  struct Tile {
    std::int64_t m, rows, n, columns;
  };

  struct Scratch {
    T *a, *b, *c;
    explicit Scratch(Arena& arena)
        : a(arena.take<T>(kTileM * kBlockK)), b(arena.take<T>(kBlockK * kTileN)), c(arena.take<T>(kTileM * kTileN)) {}
  };

  // load_a(m, rows, k, depth, scratch) -> Operand; load_b(k, depth, n, columns, scratch) -> Matrix;
  // store(Tile, values, leading) takes a finished tile
  template <class LoadA, class LoadB, class Store>
  void run(int num_threads, const LoadA& load_a, const LoadB& load_b, const Store& store) const {
    Arena counter(nullptr);
    Scratch measure(counter);
    const std::int64_t tiles = m_tiles * n_tiles, tile_size = kTileM * kTileN;
    Workspace memory(k_ranges > 1 ? sizeof(T) * static_cast<std::size_t>(tiles * k_ranges * tile_size) : 64);
    T* partials = static_cast<T*>(memory.data());
    parallel_for(tiles * k_ranges, num_threads, counter.used(), [&](std::int64_t i, void* data) {
      Arena arena(data);
      Scratch s(arena);
      const Tile tile = tile_of(i / k_ranges);
      const std::int64_t range = i % k_ranges;
      T* c = k_ranges > 1 ? partials + i * tile_size : s.c;
      sum(tile, {k * range / k_ranges, k * (range + 1) / k_ranges}, load_a, load_b, s, c);
      if (k_ranges == 1) store(tile, c, padded<T>(tile.columns));
    });
    if (k_ranges == 1) return;
    parallel_for(tiles, num_threads, counter.used(), [&](std::int64_t i, void* data) {
      Arena arena(data);
      Scratch s(arena);
      const Tile tile = tile_of(i);
      const std::int64_t leading = padded<T>(tile.columns);
      combine_partials<T>(partials + i * k_ranges * tile_size, nullptr, k_ranges, tile_size, tile.rows * leading, s.c);
      store(tile, s.c, leading);
    });
  }

  Tile tile_of(std::int64_t i) const {
    const std::int64_t row = i / n_tiles, column = i % n_tiles;
    const std::int64_t first = m * row / m_tiles, begin = column * kTileN;
    return {first, m * (row + 1) / m_tiles - first, begin, min_of(kTileN, n - begin)};
  }

  template <class LoadA, class LoadB>
  void sum(const Tile& tile, Range range, const LoadA& load_a, const LoadB& load_b, const Scratch& s, T* c) const {
    const std::int64_t leading = padded<T>(tile.columns);
    Start start = Start::zero;
    for (std::int64_t at = range.begin; at < range.end || start == Start::zero; at += kBlockK) {
      const std::int64_t depth = max_of<std::int64_t>(0, min_of(kBlockK, range.end - at));
      const Operand<T> a = load_a(tile.m, tile.rows, at, depth, s.a);
      const Matrix<T> b = load_b(at, depth, tile.n, tile.columns, s.b);
      dense(engine, 1, tile.rows, depth, leading, a, b, start, nullptr, {c, leading});
      start = Start::output;
    }
  }
};

// `count` rows of an activation [batch, tokens, channels], counted over all images, and the channels from `channel` on
template <class T>
void load_part(const Activation& x, std::int64_t image_tokens, std::int64_t first, std::int64_t count,
               std::int64_t channel, std::int64_t channels, T* out, std::int64_t leading) {
  for (std::int64_t t = first; t < first + count;) {
    const std::int64_t batch = t / image_tokens, token = t % image_tokens;
    const std::int64_t tokens = min_of(first + count - t, image_tokens - token);
    Activation part = x;
    visit_elements(x, 0, 0, 0, [&](auto* data) { part.data = data + channel * x.channel_stride; });
    load_tokens(part, batch, 0, token, tokens, channels, out + (t - first) * leading, leading);
    t += tokens;
  }
}

template <class T>
void store_part(const Activation& x, std::int64_t image_tokens, std::int64_t first, std::int64_t count,
                std::int64_t channel, std::int64_t channels, const T* in, std::int64_t leading) {
  for (std::int64_t t = first; t < first + count;) {
    const std::int64_t batch = t / image_tokens, token = t % image_tokens;
    const std::int64_t tokens = min_of(first + count - t, image_tokens - token);
    Activation part = x;
    visit_elements(x, 0, 0, 0, [&](auto* data) { part.data = data + channel * x.channel_stride; });
    store_tokens(part, batch, 0, token, tokens, channels, in + (t - first) * leading, leading);
    t += tokens;
  }
}

// One step of a tile, whose operands are both rewritten; the same for the three products.
struct TileProducts {
  ProductShape shapes[1];
  explicit TileProducts(const LinearArguments& a)
      : shapes{{min_of(a.batch * a.tokens, kTileM), min_of(a.in_features, kBlockK), min_of(a.out_features, kTileN),
                true}} {}
};

template <class E>
struct Linear {
  using T = typename E::Value;
  const LinearArguments& a;
  const E engine;
  const std::int64_t tokens = a.batch * a.tokens;
  const T* weight = static_cast<const T*>(a.parameters.weight);

  Linear(const LinearArguments& arguments, const E& engine_) : a(arguments), engine(engine_) {}

  // rows of an activation as the left operand, or as the right one
  auto rows_of(const Activation& x) const {
    return [this, &x](std::int64_t m, std::int64_t rows, std::int64_t k, std::int64_t depth, T* out) -> Operand<T> {
      const std::int64_t leading = padded<T>(depth);
      load_part(x, a.tokens, m, rows, k, depth, out, leading);
      return {out, leading, 1};
    };
  }

  void forward() const {
    const Product<E> product{engine, tokens, a.out_features, a.in_features};
    product.run(
        a.num_threads, rows_of(a.x),
        [&](std::int64_t k, std::int64_t depth, std::int64_t n, std::int64_t columns, T* out) -> Matrix<T> {
          pack(Values<T>(), 1, out, weight + n * a.in_features + k, 1, a.in_features, depth, columns);
          return {out, 0};
        },
        [&](const auto& tile, T* c, std::int64_t leading) {
          const T* bias = a.parameters.bias ? static_cast<const T*>(a.parameters.bias) + tile.n : nullptr;
          for (std::int64_t i = 0; bias && i < tile.rows; ++i)
            for (std::int64_t j = 0; j < tile.columns; ++j) c[i * leading + j] += bias[j];
          store_part(a.output, a.tokens, tile.m, tile.rows, tile.n, tile.columns, c, leading);
        });
  }

  void backward_input() const {
    const Product<E> product{engine, tokens, a.in_features, a.out_features};
    product.run(
        a.num_threads, rows_of(a.grad_output),
        [&](std::int64_t k, std::int64_t depth, std::int64_t n, std::int64_t columns, T* out) -> Matrix<T> {
          pack(Values<T>(), 1, out, weight + k * a.in_features + n, a.in_features, 1, depth, columns);
          return {out, 0};
        },
        [&](const auto& tile, T* c, std::int64_t leading) {
          store_part(a.grad_x, a.tokens, tile.m, tile.rows, tile.n, tile.columns, c, leading);
        });
  }

  void backward_weight() const {
    const Product<E> product{engine, a.out_features, a.in_features, tokens};
    product.run(
        a.num_threads,
        [&](std::int64_t m, std::int64_t rows, std::int64_t k, std::int64_t depth, T* out) -> Operand<T> {
          const std::int64_t leading = padded<T>(rows);
          load_part(a.grad_output, a.tokens, k, depth, m, rows, out, leading);
          return {out, 1, leading};
        },
        [&](std::int64_t k, std::int64_t depth, std::int64_t n, std::int64_t columns, T* out) -> Matrix<T> {
          const std::int64_t leading = padded<T>(columns);
          load_part(a.x, a.tokens, k, depth, n, columns, out, leading);
          return {out, leading};
        },
        [&](const auto& tile, const T* c, std::int64_t leading) {
          T* target = static_cast<T*>(a.gradients.weight) + tile.m * a.in_features + tile.n;
          for (std::int64_t i = 0; i < tile.rows; ++i)
            store_row<T>(c + i * leading, tile.columns, target + i * a.in_features);
        });
  }

  void backward_bias() const {
    const Split split = split_tokens(tokens, 1);
    const std::int64_t width = padded<T>(a.out_features);
    const std::size_t scratch = sizeof(T) * static_cast<std::size_t>(kBlockTokens * width);
    Workspace memory(sizeof(T) * static_cast<std::size_t>((split.count + 1) * width));
    T* partials = static_cast<T*>(memory.data());
    parallel_for(split.count, a.num_threads, scratch, [&](std::int64_t i, void* data) {
      fill(partials + i * width, width, T(0));
      for_blocks_of(i * split.size, min_of(tokens, (i + 1) * split.size), [&](std::int64_t token, std::int64_t count) {
        load_part(a.grad_output, a.tokens, token, count, 0, a.out_features, static_cast<T*>(data), width);
        add_column_sums(count, width, static_cast<T*>(data), width, partials + i * width);
      });
    });
    T* total = partials + split.count * width;
    combine_partials<T>(partials, nullptr, split.count, width, width, total);
    copy_out(total, a.out_features, a.gradients.bias);
  }
};

}  // namespace

void linear_forward(const LinearArguments& a) {
  with_engine(a.x.dtype, a.precision, TileProducts(a).shapes,
              [&](auto engine) { Linear<decltype(engine)>(a, engine).forward(); });
}

void linear_backward(const LinearArguments& a) {
  with_engine(a.x.dtype, a.precision, TileProducts(a).shapes, [&](auto engine) {
    const Linear<decltype(engine)> linear(a, engine);
    if (a.grad_x.data) linear.backward_input();
    linear.backward_weight();
    if (a.gradients.bias) linear.backward_bias();
  });
}

}  // namespace msformer::MSFORMER_VARIANT
