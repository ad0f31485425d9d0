// Unit tests of what the CPU kernels are made of: vectors, conversions, products of every engine, reductions, softmax
// sums. Compiled once per variant and run by test_cpp.py. Everything is compared with plain loops in double.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "cpu/attention/softmax.h"
#include "cpu/base/norm.h"
#include "cpu/base/sums.h"
#include "cpu/base/tokens.h"
#include "cpu/engine/dense.h"

using namespace msformer;
using namespace msformer::MSFORMER_VARIANT;

namespace {

int failures = 0;
std::mt19937 generator(7);

template <class... Values>
void check(bool good, const char* format, Values... values) {
  if (good) return;
  if (++failures <= 20) {
    std::printf(format, values...);
    std::printf("\n");
  }
}

template <class T>
class Buffer {  // aligned, padded, filled with NaN
 public:
  explicit Buffer(std::int64_t count)
      : data_(static_cast<T*>(std::aligned_alloc(64, (sizeof(T) * count + 127) / 64 * 64))) {
    const std::size_t bytes = (sizeof(T) * count + 127) / 64 * 64;
    std::memset(static_cast<void*>(data_), 0xff, bytes);  // NaN, of floats
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  T* get() { return data_; }
  T& operator[](std::int64_t i) { return data_[i]; }

 private:
  T* data_;
};

double uniform() { return std::uniform_real_distribution<double>(-1, 1)(generator); }

template <class T>
constexpr double kEps = sizeof(T) == 4 ? 1.2e-7 : 2.3e-16;

// rows [rows, columns] in a buffer with padded rows; padding zero
template <class T>
void fill_rows(Buffer<T>& out, std::int64_t rows, std::int64_t columns) {
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t c = 0; c < padded<T>(columns); ++c)
      out[i * padded<T>(columns) + c] = c < columns ? static_cast<T>(uniform()) : T(0);
}

template <class T>
void test_vectors() {
  constexpr int W = kWidth<T>;
  alignas(64) T values[W * W];
  for (T& v : values) v = static_cast<T>(uniform());
  double sum = 0, largest = -2;
  for (int i = 0; i < W; ++i) {
    sum += static_cast<double>(values[i]);
    largest = std::fmax(largest, static_cast<double>(values[i]));
  }
  check(std::fabs(static_cast<double>(horizontal_sum<T>(load(values))) - sum) < W * kEps<T>, "horizontal_sum");
  check(static_cast<double>(horizontal_max<T>(load(values))) == largest, "horizontal_max");
  Vector<T> rows[W];
  for (int i = 0; i < W; ++i) rows[i] = load(values + i * W);
  transpose<T>(rows);
  for (int i = 0; i < W; ++i)
    for (int j = 0; j < W; ++j) check(rows[i][j] == values[j * W + i], "transpose %d %d", i, j);
  for (int count = 0; count <= W; ++count) {
    const Vector<T> kept = keep_lanes<T>(load(values), count);
    for (int i = 0; i < W; ++i) check(kept[i] == (i < count ? values[i] : T(0)), "keep_lanes %d", count);
  }
  const T nan = std::numeric_limits<T>::quiet_NaN();
  check(vmax<T>(splat(T(1)), splat(nan))[0] == T(1), "vmax lets NaN replace a number");
}

void test_functions() {
  for (double x = -87; x < 88; x += 0.0101) {
    const float at = static_cast<float>(x);
    const double expected = std::exp(static_cast<double>(at)), found = static_cast<double>(vexp(splat(at))[0]);
    check(std::fabs(found - expected) <= 2.5 * 6e-8 * expected, "vexp(%g) = %g, expected %g", x, found, expected);
    if (x <= 0) check(vexp_small(splat(at))[0] == vexp(splat(at))[0], "vexp_small(%g)", x);
  }
  check(vexp_small(splat(-1000.0f))[0] == 0.0f, "vexp_small(-1000)");
  check(std::isnan(vexp(splat(std::nanf("")))[0]), "vexp(NaN)");
  for (double x = -13; x < 13; x += 0.00101) {
    Vector<float> cdf, pdf;
    const float at = static_cast<float>(x);
    normal_distribution(splat(at), cdf, pdf);
    const double wanted = 0.5 * std::erfc(-static_cast<double>(at) / std::sqrt(2.0));
    check(std::fabs(static_cast<double>(cdf[0]) - wanted) <= 2e-7 + 1e-5 * std::fmin(wanted, 1e-3),
          "cdf(%g) = %g, expected %g", x, static_cast<double>(cdf[0]), wanted);
  }
}

void test_rough_normal_distribution() {
  Vector<float> cdf, pdf;
  for (double x = -20; x < 20; x += 0.00101) {
    const float at = static_cast<float>(x);
    rough_normal_distribution(splat(at), cdf, pdf);
    const double size = std::fabs(static_cast<double>(at)), tail = 0.5 * std::erfc(size / std::sqrt(2.0));
    const double wanted = at < 0 ? tail : 1 - tail, density = std::exp(-0.5 * size * size) * 0.3989422804014327;
    const double error = std::fabs(static_cast<double>(cdf[0]) - wanted);
    check(error <= 3e-6 && error * size <= 3e-6, "rough cdf(%g) is off by %g", x, error);
    if (at < 0 && at > -12.9f)  // below, floats are subnormal
      check(error <= 1.1e-3 * wanted, "rough cdf(%g) = %g, expected %g", x, static_cast<double>(cdf[0]), wanted);
    const double density_error = std::fabs(static_cast<double>(pdf[0]) - density);
    check(density_error <= 6e-6 && density_error * size <= 6e-6, "rough pdf(%g) is off by %g", x, density_error);
  }
  for (const float at : {14.5f, 1e10f, 3e38f, std::numeric_limits<float>::infinity()}) {
    rough_normal_distribution(splat(at), cdf, pdf);
    check(cdf[0] == 1.0f && pdf[0] == 0.0f, "rough cdf(%g)", static_cast<double>(at));
    rough_normal_distribution(splat(-at), cdf, pdf);
    check(cdf[0] == 0.0f && pdf[0] == 0.0f, "rough cdf(-%g)", static_cast<double>(at));
  }
}

void test_conversions() {
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const BFloat16 b{static_cast<std::uint16_t>(bits)};
    const Float16 h{static_cast<std::uint16_t>(bits)};
    const float from_b = to_float(b), from_h = to_float(h);
    if (!std::isnan(from_b)) check(to_bfloat16(from_b).bits == bits, "bfloat16 %x", bits);
    if (!std::isnan(from_h)) check(to_float16(from_h).bits == bits, "float16 %x", bits);
    check(std::isnan(from_h) == ((bits & 0x7fff) > 0x7c00), "float16 NaN %x", bits);
  }
  check(to_float16(65520.0f).bits == 0x7c00 && to_float16(65519.0f).bits == 0x7bff, "float16 overflow");
  check(to_bfloat16(1.00390625f).bits == 0x3f80 && to_bfloat16(1.01171875f).bits == 0x3f82, "bfloat16 ties to even");
}

// what the engine makes of a value before it multiplies it
template <class E>
double operand(const E& engine, typename E::Value x) {
  Buffer<typename E::Value> one(16);
  for (int i = 0; i < 16; ++i) one[i] = x;
  engine.round_operands(one.get(), 16);
  return static_cast<double>(one[0]);
}

// precision: of a product of operands, relative
template <class E>
void test_products(const E& engine, const char* name, double precision = kEps<typename E::Value>) {
  using T = typename E::Value;
  for (std::int64_t rows : {1, 5, 7, 13, 49})
    for (std::int64_t k : {1, 3, 16, 17, 68})
      for (std::int64_t n : {1, 15, 16, 17, 65, 130}) {
        const std::int64_t lda = padded<T>(k), ldc = padded<T>(n);
        Buffer<T> a(rows * lda), weights(k * n), bias(ldc), c(rows * ldc);
        Buffer<typename E::Element> packed(engine.packed_size(k, ldc));
        fill_rows(a, rows, k);
        fill_rows(bias, 1, n);
        for (std::int64_t i = 0; i < k * n; ++i) weights[i] = static_cast<T>(uniform());
        for (const bool transposed : {false, true}) {  // [k, n], or [n, k] as the weights of a linear layer
          const std::int64_t k_stride = transposed ? 1 : n, n_stride = transposed ? k : 1;
          pack(engine, 1, packed.get(), weights.get(), k_stride, n_stride, k, n);
          multiply(engine, rows, k, ldc, a.get(), lda, packed.get(), c.get(), ldc, bias.get());
          multiply_add(engine, rows, k, ldc, a.get(), lda, packed.get(), c.get(), ldc);
          for (std::int64_t i = 0; i < rows; ++i)
            for (std::int64_t j = 0; j < ldc; ++j) {
              double sum = 0, size = 1;
              for (std::int64_t p = 0; j < n && p < k; ++p) {
                const double term =
                    operand(engine, a[i * lda + p]) * operand(engine, weights[p * k_stride + j * n_stride]);
                sum += term;
                size += std::fabs(term);
              }
              const double expected = 2 * sum + static_cast<double>(bias[j]);
              check(std::fabs(static_cast<double>(c[i * ldc + j]) - expected) <= 8 * precision * size,
                    "%s: product %ld x %ld x %ld at %ld, %ld", name, long(rows), long(k), long(n), long(i), long(j));
            }
        }
        // A^T B: `rows` and n are the sizes of the result, k the tokens
        const std::int64_t left_width = padded<T>(rows);
        Buffer<T> left(k * left_width), right(k * ldc), sums(rows * ldc);
        fill_rows(left, k, rows);
        fill_rows(right, k, n);
        for (std::int64_t i = 0; i < rows * ldc; ++i) sums[i] = T(1);
        multiply_transposed_add(engine, rows, k, ldc, left.get(), left_width, right.get(), ldc, sums.get(), ldc);
        for (std::int64_t i = 0; i < rows; ++i)
          for (std::int64_t j = 0; j < n; ++j) {
            double sum = 1, size = 1;
            for (std::int64_t p = 0; p < k; ++p) {
              const double term = operand(engine, left[p * left_width + i]) * operand(engine, right[p * ldc + j]);
              sum += term;
              size += std::fabs(term);
            }
            check(std::fabs(static_cast<double>(sums[i * ldc + j]) - sum) <= 8 * precision * size,
                  "%s: transposed product %ld x %ld x %ld", name, long(rows), long(k), long(n));
          }
      }
}

// weights of bfloat16 are packed as floats of the same values are
template <class E>
void test_bfloat16_weights(const E& engine, const char* name) {
  for (std::int64_t k : {1, 3, 16, 33, 68})
    for (std::int64_t n : {1, 15, 16, 65}) {
      Buffer<float> values(k * n);
      Buffer<BFloat16> rounded(k * n);
      for (std::int64_t i = 0; i < k * n; ++i) {
        rounded[i] = to_bfloat16(static_cast<float>(uniform()));
        values[i] = to_float(rounded[i]);
      }
      const std::int64_t size = engine.packed_size(k, padded<float>(n));
      Buffer<typename E::Element> expected(size), found(size);
      for (const bool transposed : {false, true}) {
        const std::int64_t k_stride = transposed ? 1 : n, n_stride = transposed ? k : 1;
        pack(engine, 1, expected.get(), values.get(), k_stride, n_stride, k, n);
        pack(engine, 1, found.get(), WeightMatrix{rounded.get(), DType::bfloat16}, k_stride, n_stride, k, n);
        const std::size_t bytes = sizeof(typename E::Element) * static_cast<std::size_t>(size);
        check(std::memcmp(expected.get(), found.get(), bytes) == 0, "%s: bfloat16 weights %ld x %ld", name, long(k),
              long(n));
      }
    }
}

// Products that threads share, of rows and columns that the caller chooses; sizes beyond what is summed at once.
template <class E>
void test_dense(const E& engine, const char* name, double precision = kEps<typename E::Value>) {
  using T = typename E::Value;
  for (std::int64_t rows : {1, 97})
    for (std::int64_t k : {3, 1023})
      for (std::int64_t n : {16, 208}) {
        const std::int64_t lda = padded<T>(k), ldt = padded<T>(rows), ldc = padded<T>(n);
        Buffer<T> a(rows * lda), transposed(k * ldt), b(k * ldc), bias(ldc), packed(k * ldc), c(rows * ldc);
        fill_rows(a, rows, k);
        fill_rows(b, k, n);
        fill_rows(bias, 1, n);
        for (std::int64_t i = 0; i < k * ldt; ++i) transposed[i] = T(0);
        for (std::int64_t i = 0; i < rows; ++i)
          for (std::int64_t p = 0; p < k; ++p) transposed[p * ldt + i] = a[i * lda + p];
        pack(Values<T>(), 1, packed.get(), b.get(), ldc, 1, k, n);
        Buffer<typename E::Element> of_engine(engine.packed_size(k, ldc));
        Buffer<T> again(rows * ldc);
        pack(engine, 1, of_engine.get(), b.get(), ldc, 1, k, n);
        dense_rows(engine, 2, rows, k, ldc, a.get(), lda, engine.packed_right(of_engine.get()), Start::bias, bias.get(),
                   Output<T>{again.get(), ldc});
        const Panels panels(ldc / kWidth<T>);
        const std::int64_t first = panels.count / 2;  // the last panels come first
        Buffer<typename E::Element> left(engine.left_size(rows, k) + 16), right(engine.right_size(k, ldc) + 16);
        for (const int threads : {1, 2}) {
          engine.product(threads, rows, {first, panels.count}, k, panels,
                         engine.make_left(threads, left.get(), rows, k, {a.get(), lda, 1}),
                         engine.make_right(threads, right.get(), k, panels, {packed.get(), 0}), Start::bias, bias.get(),
                         Output<T>{c.get(), ldc});
          engine.product(threads, rows, {0, first}, k, panels,
                         engine.make_left(threads, left.get(), rows, k, {transposed.get(), 1, ldt}),
                         engine.make_right(threads, right.get(), k, panels, {b.get(), ldc}), Start::bias, bias.get(),
                         Output<T>{c.get(), ldc});
          for (std::int64_t i = 0; i < rows; i += 7)
            for (std::int64_t j = 0; j < n; j += 5) {
              double sum = static_cast<double>(bias[j]), size = 1;
              for (std::int64_t p = 0; p < k; ++p) {
                const double term = operand(engine, a[i * lda + p]) * operand(engine, b[p * ldc + j]);
                sum += term;
                size += std::fabs(term);
              }
              check(std::fabs(static_cast<double>(again[i * ldc + j]) - sum) <= 8 * precision * size,
                    "%s: packed product %ld x %ld x %ld", name, long(rows), long(k), long(n));
              check(std::fabs(static_cast<double>(c[i * ldc + j]) - sum) <= 8 * precision * size,
                    "%s: dense product %ld x %ld x %ld at %ld, %ld", name, long(rows), long(k), long(n), long(i),
                    long(j));
            }
        }
      }
}

#ifdef MSFORMER_TILE_UNIT
// three parts hold all of a float, two 16 bits of it
void test_parts() {
  for (int i = 0; i < 2000; ++i) {
    const float x = static_cast<float>(std::ldexp(uniform(), i % 60 - 30));
    check(operand(Tiles{3}, x) == static_cast<double>(x), "three parts of %g", static_cast<double>(x));
    const double error = std::fabs(operand(Tiles{2}, x) - static_cast<double>(x));
    check(error <= 0x1p-17 * std::fabs(static_cast<double>(x)), "two parts of %g", static_cast<double>(x));
    check(operand(Tiles{1}, x) == static_cast<double>(to_float(to_bfloat16(x))), "one part of %g",
          static_cast<double>(x));
  }
}

// infinities and NaN come out as those of a product of floats, and touch no other value
void test_special_values(const Tiles& tiles) {
  const std::int64_t rows = 40, k = 70, n = 48;
  const float infinity = std::numeric_limits<float>::infinity();
  Buffer<float> a(rows * padded<float>(k)), b(k * n), expected(rows * n), found(rows * n);
  Buffer<std::uint16_t> packed(tiles.packed_size(k, n));
  fill_rows(a, rows, k);
  fill_rows(b, k, n);
  const std::int64_t lda = padded<float>(k);
  a[3 * lda + 2] = infinity;    // in a whole step
  a[4 * lda + 69] = -infinity;  // in the rest
  a[5 * lda + 1] = std::nanf("");
  a[6 * lda + 7] = 3e38f;  // sums of such numbers are infinite
  b[7 * n + 11] = 3e38f;
  b[66 * n + 12] = infinity;
  b[9 * n + 40] = 0.0f;
  a[7 * lda + 9] = infinity;  // times zero
  gemm<Values<float>>(rows, k, n, {a.get(), lda, 1}, {b.get(), n}, Start::zero, nullptr, {expected.get(), n});
  pack(tiles, 1, packed.get(), b.get(), n, 1, k, n);
  multiply(tiles, rows, k, n, a.get(), lda, packed.get(), found.get(), n);
  for (std::int64_t i = 0; i < rows * n; ++i) {
    const double wanted = static_cast<double>(expected[i]), got = static_cast<double>(found[i]);
    if (std::isfinite(wanted))
      check(std::fabs(got - wanted) <= 0.3 + 0.05 * std::fabs(wanted), "beside special values: %g, expected %g", got,
            wanted);
    else
      check(std::isnan(wanted) ? std::isnan(got) : got == wanted, "special value at %ld, %ld: %g, expected %g",
            long(i / n), long(i % n), got, wanted);
  }
}
#endif

template <class T>
void test_reductions() {
  for (std::int64_t rows : {0, 1, 3, 15, 16, 17, 33, 300, 5001}) {
    const std::int64_t width = 2 * kWidth<T>;
    Buffer<T> in(rows * width + 1), out(width);
    for (std::int64_t i = 0; i < rows * width; ++i) in[i] = static_cast<T>(uniform() + 1);
    for (std::int64_t c = 0; c < width; ++c) out[c] = T(3);
    add_column_sums(rows, width, in.get(), width, out.get());
    for (std::int64_t c = 0; c < width; ++c) {
      long double sum = 3;
      for (std::int64_t i = 0; i < rows; ++i) sum += static_cast<long double>(in[i * width + c]);
      check(std::fabs(static_cast<double>(out[c] - sum)) <= 3 * kEps<T> * static_cast<double>(sum),
            "add_column_sums of %ld rows", long(rows));
    }
  }
  const std::int64_t parts = 37, count = 131;
  Buffer<T> partials(parts * count), total(count);
  double factors[parts];
  for (double& factor : factors) factor = uniform();
  for (std::int64_t i = 0; i < parts * count; ++i) partials[i] = static_cast<T>(uniform());
  combine_partials<T>(partials.get(), factors, parts, count, count, total.get());
  for (std::int64_t i = 0; i < count; ++i) {
    long double sum = 0;  // of terms that are summed in double, and rounded once to T
    for (std::int64_t p = 0; p < parts; ++p)
      sum += static_cast<long double>(factors[p]) * static_cast<long double>(partials[p * count + i]);
    check(std::fabs(static_cast<double>(total[i] - sum)) <= 4 * kEps<T> + 1e-14, "combine_partials at %ld", long(i));
  }
}

// an online softmax over three chunks of tokens, each in two blocks, one of them all masked
template <class E>
void test_key_sums(const E& engine) {
  using T = typename E::Value;
  const std::int64_t keys = 5, channels = 7, tokens = 66, chunk = 22, block = 11;
  const std::int64_t key_width = padded<T>(keys), width = padded<T>(channels), size = KeySums<T>::size(keys, width);
  Buffer<T> logits(tokens * key_width), values(tokens * width), sums(3 * size), out(width);
  fill_rows(logits, tokens, keys);
  fill_rows(values, tokens, channels);
  for (std::int64_t i = 0; i < tokens * key_width; ++i) logits[i] *= T(9);
  for (std::int64_t i = 0; i < block * key_width; ++i) logits[i] = -kInfinity<T>;
  std::vector<T> kept(logits.get(), logits.get() + tokens * key_width);
  for (std::int64_t part = 0; part < 3; ++part) {
    KeySums<T> chunk_sums(sums.get() + part * size, keys);
    reset(chunk_sums, keys, width);
    for (std::int64_t first = part * chunk; first < (part + 1) * chunk; first += block)
      accumulate_keys(engine, block, keys, logits.get() + first * key_width, values.get() + first * width, width,
                      chunk_sums);
  }
  for (std::int64_t key = 0; key < keys; ++key) {
    T max, sum;
    combine_keys<T>(sums.get(), 3, keys, key, width, true, &max, &sum, out.get());
    double largest = -1e300, total = 0;
    for (std::int64_t n = block; n < tokens; ++n)
      largest = std::fmax(largest, static_cast<double>(kept[n * key_width + key]));
    std::vector<double> mean(channels);
    for (std::int64_t n = block; n < tokens; ++n) {
      const double weight = std::exp(static_cast<double>(kept[n * key_width + key]) - largest);
      total += weight;
      for (std::int64_t c = 0; c < channels; ++c) mean[c] += weight * static_cast<double>(values[n * width + c]);
    }
    const double tolerance = std::fmax(20 * kEps<T>, std::fabs(operand(engine, T(1.0 / 3)) - 1.0 / 3) * 4);
    check(static_cast<double>(max) == largest, "maximum of key %ld", long(key));
    check(std::fabs(static_cast<double>(sum) - total) <= 20 * kEps<T> * total, "sum of key %ld", long(key));
    for (std::int64_t c = 0; c < channels; ++c)
      check(std::fabs(static_cast<double>(out[c]) - mean[c] / total) <= tolerance, "mean of key %ld", long(key));
  }
}

template <class T>
void test_layer_norm() {
  for (std::int64_t channels : {1, 3, 16, 17, 100}) {
    const std::int64_t rows = 5, width = padded<T>(channels);
    Buffer<T> x(rows * width), normalized(rows * width), out(rows * width), weight(width), bias(width), rstd(rows);
    fill_rows(x, rows, channels);
    fill_rows(weight, 1, channels);
    fill_rows(bias, 1, channels);
    layer_norm<T>({weight.get(), bias.get(), T(1e-5)}, rows, channels, x.get(), normalized.get(), out.get(), width,
                  rstd.get());
    for (std::int64_t i = 0; i < rows; ++i) {
      double mean = 0, variance = 0;
      for (std::int64_t c = 0; c < channels; ++c) mean += static_cast<double>(x[i * width + c]) / channels;
      for (std::int64_t c = 0; c < channels; ++c)
        variance += std::pow(static_cast<double>(x[i * width + c]) - mean, 2) / channels;
      for (std::int64_t c = 0; c < channels; ++c) {
        const double n =
            (static_cast<double>(x[i * width + c]) - mean) / std::sqrt(variance + static_cast<double>(T(1e-5)));
        const double expected = n * static_cast<double>(weight[c]) + static_cast<double>(bias[c]);
        check(std::fabs(static_cast<double>(out[i * width + c]) - expected) <= 100 * kEps<T>, "layer_norm of %ld",
              long(channels));
      }
      for (std::int64_t c = channels; c < width; ++c) check(out[i * width + c] == T(0), "padding of layer_norm");
    }
  }
}

}  // namespace

int main() {
  test_vectors<float>();
  test_vectors<double>();
  test_functions();
  test_rough_normal_distribution();
  test_conversions();
  test_products(Values<float>(), "float");
  test_dense(Values<float>(), "float");
  test_bfloat16_weights(Values<float>(), "float");
  test_products(Values<double>(), "double");
  test_dense(Values<double>(), "double");
  test_products(MSFORMER_BFLOAT16_ENGINE(), "bfloat16 engine");
  test_dense(MSFORMER_BFLOAT16_ENGINE(), "bfloat16 engine");
  test_bfloat16_weights(MSFORMER_BFLOAT16_ENGINE(), "bfloat16 engine");
#ifdef MSFORMER_TILE_UNIT
  test_parts();
  for (const int parts : {1, 2, 3}) {
    // the product of the second parts is left out of two
    test_products(Tiles{parts}, "tiles", parts == 2 ? 0x1p-18 : kEps<float>);
    test_dense(Tiles{parts}, "tiles", parts == 2 ? 0x1p-18 : kEps<float>);
    test_bfloat16_weights(Tiles{parts}, "tiles");
    test_special_values(Tiles{parts});
  }
#endif
  test_reductions<float>();
  test_reductions<double>();
  test_key_sums(Values<float>());
  test_key_sums(Values<double>());
  test_key_sums(MSFORMER_BFLOAT16_ENGINE());
  test_layer_norm<float>();
  test_layer_norm<double>();
  std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
