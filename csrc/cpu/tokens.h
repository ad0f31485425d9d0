// Blocks of tokens on their way between the user's tensors (any strides; float32, float64, bfloat16, float16) and scratch
// memory (row-major, arithmetic type, rows padded with zeros to whole vectors), with LayerNorm on the way in and its
// gradient on the way out.
#pragma once

#include <type_traits>

#include "arguments.h"
#include "gemm.h"

namespace msformer::MSFORMER_ISA {

struct BFloat16 { std::uint16_t bits; };
struct Float16 { std::uint16_t bits; };

template <class To, class From> inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float to_float(BFloat16 x) { return bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16); }

// the product with 2^112 moves the exponent bias and turns float16 subnormals into normal floats
inline float to_float(Float16 x) {
  const std::uint32_t magnitude = x.bits & 0x7fffu;
  std::uint32_t bits = bit_cast<std::uint32_t>(bit_cast<float>(magnitude << 13) * bit_cast<float>(0x77800000u));
  bits |= magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return bit_cast<float>(bits | static_cast<std::uint32_t>(x.bits & 0x8000u) << 16);
}

// round to nearest, ties to even
inline BFloat16 to_bfloat16(float x) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(x);
  const std::uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return {static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
}

inline Float16 to_float16(float x) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(x), magnitude = bits & 0x7fffffffu;
  // below 2^-14: adding 0.5 lets the float unit round to multiples of 2^-24
  const std::uint32_t subnormal = bit_cast<std::uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const std::uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  const std::uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const std::uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  return {static_cast<std::uint16_t>((magnitude >= 0x477ff000u ? special : finite) | (bits >> 16 & 0x8000u))};
}

template <class T> inline T convert(float x) { return static_cast<T>(x); }
template <class T> inline T convert(double x) { return static_cast<T>(x); }
template <class T> inline T convert(BFloat16 x) { return static_cast<T>(to_float(x)); }
template <class T> inline T convert(Float16 x) { return static_cast<T>(to_float(x)); }
template <class T> inline void assign(float& to, T x) { to = static_cast<float>(x); }
template <class T> inline void assign(double& to, T x) { to = static_cast<double>(x); }
template <class T> inline void assign(BFloat16& to, T x) { to = to_bfloat16(static_cast<float>(x)); }
template <class T> inline void assign(Float16& to, T x) { to = to_float16(static_cast<float>(x)); }

// calls visit with a pointer to the activation's element type, at (batch, head, token)
template <class Visit>
inline void visit_elements(const Activation& x, std::int64_t batch, std::int64_t head, std::int64_t token, Visit visit) {
  const std::int64_t offset = batch * x.batch_stride + head * x.head_stride + token * x.token_stride;
  switch (x.dtype) {
    case DType::float32: visit(static_cast<float*>(x.data) + offset); break;
    case DType::float64: visit(static_cast<double*>(x.data) + offset); break;
    case DType::bfloat16: visit(static_cast<BFloat16*>(x.data) + offset); break;
    case DType::float16: visit(static_cast<Float16*>(x.data) + offset); break;
  }
}

// whole vectors of bfloat16, the same as to_float and to_bfloat16
inline Vector<float> load_bfloat16(const BFloat16* p) {
  typedef Simd<float>::Bits Bits;
  const Bits bits = __builtin_convertvector(*reinterpret_cast<const Simd<float>::Halves*>(p), Bits);
  return reinterpret_cast<Vector<float>>(bits << 16);
}
inline void store_bfloat16(BFloat16* p, Vector<float> x) {
  typedef Simd<float>::Bits Bits;
  const Bits bits = reinterpret_cast<Bits>(x), rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const Bits kept = (bits & 0x7fffffffu) > 0x7f800000u ? Bits{} + 0x7fc0u : rounded;
  *reinterpret_cast<Simd<float>::Halves*>(p) = __builtin_convertvector(kept, Simd<float>::Halves);
}

// row of values -> out, in whole vectors: a value of the same type is copied, the end of the last vector becomes zero
template <class T, class S> inline void load_row(const S* source, std::int64_t channels, T* out, std::int64_t leading) {
  constexpr std::int64_t W = kWidth<T>;
  const std::int64_t whole = channels / W * W;
  if constexpr (sizeof(T) == sizeof(S)) {
    for (std::int64_t c = 0; c < whole; c += W) store(out + c, load_unaligned(reinterpret_cast<const T*>(source) + c));
  } else if constexpr (sizeof(T) == 4 && std::is_same<S, BFloat16>::value) {
    for (std::int64_t c = 0; c < whole; c += W) store(out + c, load_bfloat16(source + c));
  } else {
    for (std::int64_t c = 0; c < whole; ++c) out[c] = convert<T>(source[c]);
  }
  for (std::int64_t c = whole; c < leading; c += W) {
    alignas(64) T last[W] = {};
    for (std::int64_t i = 0; i < channels - c; ++i) last[i] = convert<T>(source[c + i]);
    store(out + c, load(last));
  }
}

// rows [tokens, channels] of one batch and head -> out [tokens, leading], padding zeroed
template <class T>
void load_tokens(const Activation& x, std::int64_t batch, std::int64_t head, std::int64_t token, std::int64_t tokens,
                 std::int64_t channels, T* out, std::int64_t leading) {
  visit_elements(x, batch, head, token, [&](const auto* source) {
    const std::int64_t by_token = x.token_stride, by_channel = x.channel_stride;
    if (by_channel == 1) {
      for (std::int64_t i = 0; i < tokens; ++i) load_row<T>(source + i * by_token, channels, out + i * leading, leading);
      return;
    }
    for (std::int64_t c = 0; c < channels; ++c)
      for (std::int64_t i = 0; i < tokens; ++i) out[i * leading + c] = convert<T>(source[i * by_token + c * by_channel]);
    for (std::int64_t i = 0; i < tokens; ++i)
      for (std::int64_t c = channels; c < leading; ++c) out[i * leading + c] = T(0);
  });
}

template <class T, class S> inline void store_row(const T* in, std::int64_t channels, S* target) {
  constexpr std::int64_t W = kWidth<T>;
  std::int64_t c = 0;
  if constexpr (sizeof(T) == sizeof(S))
    for (; c + W <= channels; c += W) store_unaligned(reinterpret_cast<T*>(target) + c, load(in + c));
  if constexpr (sizeof(T) == 4 && std::is_same<S, BFloat16>::value)
    for (; c + W <= channels; c += W) store_bfloat16(target + c, load(in + c));
  for (; c < channels; ++c) assign(target[c], in[c]);
}

template <class T>
void store_tokens(const Activation& x, std::int64_t batch, std::int64_t head, std::int64_t token, std::int64_t tokens,
                  std::int64_t channels, const T* in, std::int64_t leading) {
  visit_elements(x, batch, head, token, [&](auto* target) {
    if (x.channel_stride == 1) {
      for (std::int64_t i = 0; i < tokens; ++i) store_row<T>(in + i * leading, channels, target + i * x.token_stride);
      return;
    }
    for (std::int64_t i = 0; i < tokens; ++i)
      for (std::int64_t c = 0; c < channels; ++c)
        assign(target[i * x.token_stride + c * x.channel_stride], in[i * leading + c]);
  });
}

// mean and 1 / sqrt(variance + eps) of one row, variance about the mean (two passes over a row that is in L1)
template <class T> inline void row_statistics(const T* row, std::int64_t channels, T eps, T& mean, T& rstd) {
  constexpr int W = kWidth<T>;
  const std::int64_t whole = channels / W * W;
  Vector<T> sum{};
  for (std::int64_t c = 0; c < padded<T>(channels); c += W) sum += load(row + c);  // padding is zero
  mean = horizontal_sum<T>(sum) / static_cast<T>(channels);
  Vector<T> squares{};
  for (std::int64_t c = 0; c < whole; c += W) {
    const Vector<T> d = load(row + c) - mean;
    squares += d * d;
  }
  if (whole < channels) {
    const Vector<T> d = keep_lanes<T>(load(row + whole) - mean, channels - whole);
    squares += d * d;
  }
  const T variance = horizontal_sum<T>(squares) / static_cast<T>(channels);
  rstd = T(1) / static_cast<T>(sizeof(T) == 4 ? __builtin_sqrtf(static_cast<float>(variance + eps))
                                              : __builtin_sqrt(static_cast<double>(variance + eps)));
}

// LayerNorm's weight and bias, padded with zeros. Without LayerNorm weight is null.
template <class T> struct Norm {
  const T* weight = nullptr;
  const T* bias = nullptr;
  T eps = T(0);
};

// out [padded(count)] = source, or zeros when it is null; zero padding
template <class T> inline const T* copy_padded(T* out, const void* source, std::int64_t count) {
  const std::int64_t given = source ? count : 0;
  if (given) std::memcpy(out, source, sizeof(T) * static_cast<std::size_t>(given));
  for (std::int64_t i = given; i < padded<T>(count); ++i) out[i] = T(0);
  return out;
}

// LayerNorm of rows: in -> normalized (before weight and bias), out (after). Any of the three may be the same memory.
// rstd: one value a row, may be null.
template <class T>
void layer_norm(const Norm<T>& norm, std::int64_t rows, std::int64_t channels, const T* in, T* normalized, T* out,
                std::int64_t leading, T* rstd_out) {
  constexpr int W = kWidth<T>;
  const std::int64_t whole = channels / W * W, width = padded<T>(channels);
  for (std::int64_t i = 0; i < rows; ++i) {
    const T* row = in + i * leading;
    T mean, rstd;
    row_statistics(row, channels, norm.eps, mean, rstd);
    for (std::int64_t c = 0; c < width; c += W) {
      Vector<T> x = (load(row + c) - mean) * rstd;
      if (c == whole) x = keep_lanes<T>(x, channels - whole);
      store(normalized + i * leading + c, x);
      store(out + i * leading + c, x * load(norm.weight + c) + load(norm.bias + c));
    }
    if (rstd_out) rstd_out[i] = rstd;
  }
}

// Gradient of LayerNorm: grad [rows, leading] of its output becomes that of its input, in place;
// grad_weight and grad_bias are added to.
template <class T>
void layer_norm_backward(const Norm<T>& norm, std::int64_t rows, std::int64_t channels, const T* normalized, const T* rstd,
                         T* grad, std::int64_t leading, T* grad_weight, T* grad_bias) {
  constexpr int W = kWidth<T>;
  const std::int64_t width = padded<T>(channels);
  const T inverse = T(1) / static_cast<T>(channels);
  for (std::int64_t c = 0; c < width; c += W) {
    Vector<T> weight_sum{}, bias_sum{};
    for (std::int64_t i = 0; i < rows; ++i) {
      const Vector<T> g = load(grad + i * leading + c);
      weight_sum += g * load(normalized + i * leading + c);
      bias_sum += g;
    }
    store(grad_weight + c, load(grad_weight + c) + weight_sum);
    store(grad_bias + c, load(grad_bias + c) + bias_sum);
  }
  for (std::int64_t i = 0; i < rows; ++i) {
    const T* x = normalized + i * leading;
    T* g = grad + i * leading;
    Vector<T> sum{}, dot{};
    for (std::int64_t c = 0; c < width; c += W) {
      const Vector<T> scaled = load(g + c) * load(norm.weight + c);
      store(g + c, scaled);
      sum += scaled;
      dot += scaled * load(x + c);
    }
    const T mean = horizontal_sum<T>(sum) * inverse, mean_dot = horizontal_sum<T>(dot) * inverse;
    for (std::int64_t c = 0; c < width; c += W) store(g + c, (load(g + c) - mean - load(x + c) * mean_dot) * rstd[i]);
  }
}

template <class T> inline void add_rows(std::int64_t rows, std::int64_t leading, const T* in, T* out) {
  for (std::int64_t i = 0; i < rows * leading; i += kWidth<T>) store(out + i, load(out + i) + load(in + i));
}

template <class T> inline void fill(T* out, std::int64_t count, T value) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = value;
}

// out [width] += sum of the rows of in, as a sum of sums over a few rows: a smaller rounding error
template <class T>
inline void add_column_sums(std::int64_t rows, std::int64_t width, const T* in, std::int64_t leading, T* out) {
  constexpr std::int64_t kRows = 16;
  for (std::int64_t c = 0; c < width; c += kWidth<T>) {
    Vector<T> total{};
    for (std::int64_t begin = 0; begin < rows; begin += kRows) {
      Vector<T> sum{};
      for (std::int64_t i = begin; i < min_of(rows, begin + kRows); ++i) sum += load(in + i * leading + c);
      total += sum;
    }
    store(out + c, load(out + c) + total);
  }
}

// out[i] = sum over p of partials[p * stride + i] (times factors[p], unless null), in double, in the order of p
template <class T>
void combine_partials(const T* partials, const double* factors, std::int64_t count, std::int64_t stride, std::int64_t n,
                      T* out) {
  constexpr std::int64_t kBlock = 64;
  for (std::int64_t begin = 0; begin < n; begin += kBlock) {
    const std::int64_t size = min_of(kBlock, n - begin);
    double sums[kBlock] = {};
    for (std::int64_t p = 0; p < count; ++p) {
      const T* partial = partials + p * stride + begin;
      const double factor = factors ? factors[p] : 1.0;
      for (std::int64_t i = 0; i < size; ++i) sums[i] += factor * static_cast<double>(partial[i]);
    }
    for (std::int64_t i = 0; i < size; ++i) out[begin + i] = static_cast<T>(sums[i]);
  }
}

// How tokens are cut into chunks, and chunks into blocks: by the shape alone, never by the number of threads. Chunks are
// nearly equal, and so are the blocks of one chunk.
struct Split {
  std::int64_t count, size;
};

constexpr std::int64_t kBlockTokens = 96;  // the most that one step of a kernel holds in scratch

inline Split split_tokens(std::int64_t tokens, std::int64_t images) {
  const std::int64_t wanted = max_of<std::int64_t>(1, 64 / max_of<std::int64_t>(1, images));
  const std::int64_t few = min_of<std::int64_t>(8, tokens / 24);  // small chunks, rather than leave cores idle
  const std::int64_t count = max_of<std::int64_t>(1, min_of(wanted, max_of(few, tokens / kBlockTokens)));
  const std::int64_t size = max_of<std::int64_t>(1, (tokens + count - 1) / count);
  return {max_of<std::int64_t>(1, (tokens + size - 1) / size), size};
}

// calls task(first token, tokens) for the blocks of [first, last)
template <class Task> inline void for_blocks_of(std::int64_t first, std::int64_t last, const Task& task) {
  const std::int64_t blocks = (last - first + kBlockTokens - 1) / kBlockTokens;
  for (std::int64_t i = 0; i < blocks; ++i) {
    const std::int64_t begin = first + (last - first) * i / blocks, end = first + (last - first) * (i + 1) / blocks;
    task(begin, end - begin);
  }
}

// How many partial sums of `bytes` each are kept for `tasks` tasks: as many as 64, fewer where they are large.
inline std::int64_t group_count(std::int64_t tasks, std::int64_t bytes) {
  const std::int64_t affordable = max_of<std::int64_t>(8, min_of<std::int64_t>(64, (std::int64_t{32} << 20) / bytes));
  return min_of(tasks, affordable);
}

// total [size] = sum of the groups' partials
template <class T>
void combine_groups(const T* partials, std::int64_t groups, std::int64_t size, int num_threads, T* total) {
  constexpr std::int64_t kPiece = 4096;
  parallel_for((size + kPiece - 1) / kPiece, num_threads, 64, [&](std::int64_t i, void*) {
    const std::int64_t begin = i * kPiece;
    combine_partials<T>(partials + begin, nullptr, groups, size, min_of(kPiece, size - begin), total + begin);
  });
}

template <class T> inline void copy_out(const T* source, std::int64_t count, void* target) {
  if (target) std::memcpy(target, source, sizeof(T) * static_cast<std::size_t>(count));
}

}  // namespace msformer::MSFORMER_ISA
