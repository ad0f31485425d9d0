// LayerNorm of rows in scratch memory, on the way in, and its gradient on the way out; or RMSNorm, which is the same
// about zero instead of the mean.
#pragma once

#include "sums.h"

namespace msformer::MSFORMER_VARIANT {

// mean (zero if not centred) and 1 / sqrt(variance + eps) of one row, variance about that (two passes over a row that
// is in L1). The second pass also sums what the first mean is off by: of a row of nearly equal values, its rounding
// error would be divided by sqrt(eps).
template <class T>
inline void row_statistics(const T* row, std::int64_t channels, T eps, bool centred, T& mean, T& rstd) {
  constexpr int W = kWidth<T>;
  const std::int64_t whole = channels / W * W;
  mean = T(0);
  if (centred) {
    Vector<T> sum{};
    for (std::int64_t c = 0; c < whole; c += W) sum += load(row + c);
    if (whole < channels) sum += keep_lanes<T>(load(row + whole), channels - whole);  // beside infinity padding is NaN
    mean = horizontal_sum<T>(sum) / static_cast<T>(channels);
  }
  Vector<T> squares{}, rests{};
  const auto add = [&](Vector<T> d) {
    squares += d * d;
    rests += d;
  };
  for (std::int64_t c = 0; c < whole; c += W) add(load(row + c) - mean);
  if (whole < channels) add(keep_lanes<T>(load(row + whole) - mean, channels - whole));
  T variance = horizontal_sum<T>(squares) / static_cast<T>(channels);
  if (variance == kInfinity<T>) variance = static_cast<T>(__builtin_nan(""));  // nothing right is left to say
  if (centred) {
    const T rest = horizontal_sum<T>(rests) / static_cast<T>(channels);
    mean += rest;
    variance = variance > rest * rest ? variance - rest * rest : variance != variance ? variance : T(0);
  }
  rstd = T(1) / static_cast<T>(sizeof(T) == 4 ? __builtin_sqrtf(static_cast<float>(variance + eps))
                                              : __builtin_sqrt(static_cast<double>(variance + eps)));
}

// LayerNorm's weight and bias, padded with zeros. Without LayerNorm weight is null.
template <class T>
struct Norm {
  const T* weight = nullptr;
  const T* bias = nullptr;
  T eps = T(0);
  bool centred = true;
};

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
    row_statistics(row, channels, norm.eps, norm.centred, mean, rstd);
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
void layer_norm_backward(const Norm<T>& norm, std::int64_t rows, std::int64_t channels, const T* normalized,
                         const T* rstd, T* grad, std::int64_t leading, T* grad_weight, T* grad_bias) {
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
    const T mean = norm.centred ? horizontal_sum<T>(sum) * inverse : T(0), mean_dot = horizontal_sum<T>(dot) * inverse;
    for (std::int64_t c = 0; c < width; c += W) store(g + c, (load(g + c) - mean - load(x + c) * mean_dot) * rstd[i]);
  }
}

}  // namespace msformer::MSFORMER_VARIANT
