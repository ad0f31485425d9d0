// MixFFN, what forward and backward share: how an image is cut into pieces, the hidden rows, the depthwise convolution
// and the activation.
//
// An image is cut into strips of columns and bands of rows; a piece (image, strip, band) walks its rows from top to
// bottom and keeps k rows of the hidden tensor U = x W_1 + b_1 in scratch, each with a few halo columns. The whole
// N x hidden tensor never exists. Outside the image U is zero (the convolution is zero padded), not b_1.
#pragma once

#include <type_traits>

#include "../base/norm.h"
#include "../base/tokens.h"
#include "../engine/products.h"
#include "depthwise.h"

namespace msformer::MSFORMER_VARIANT {

constexpr std::int64_t kStripColumns = 68;  // the most of a strip

// whether an image has so few tokens that it is better worked on as a whole than in strips
bool mix_ffn_fits_whole(const MixFFNArguments& a);
void mix_ffn_whole_forward(const MixFFNArguments& a);
void mix_ffn_whole_backward(const MixFFNArguments& a);

// The products of a row of a strip, for the choice of the engine: forward, and a weight's gradient.
struct StripProducts {
  ProductShape shapes[3];
  explicit StripProducts(const MixFFNArguments& a) {
    const std::int64_t columns = min_of(a.width, kStripColumns), activated = a.gated ? a.hidden / 2 : a.hidden;
    shapes[0] = {columns, a.channels, a.hidden, false};
    shapes[1] = {columns, activated, a.channels, false};
    shapes[2] = {a.channels, columns, a.hidden, true};
  }
};

// Gradients of the parameters that are not matrices, padded.
template <class T>
struct VectorGradients {
  T *taps, *fc1_bias, *dw_bias, *hidden_weight, *hidden_bias, *fc2_bias, *norm_weight, *norm_bias;

  VectorGradients(Arena& arena, std::int64_t width, std::int64_t hidden_width, std::int64_t tap_count)
      : taps(arena.take<T>(tap_count * hidden_width)),
        fc1_bias(arena.take<T>(hidden_width)),
        dw_bias(arena.take<T>(hidden_width)),
        hidden_weight(arena.take<T>(hidden_width)),
        hidden_bias(arena.take<T>(hidden_width)),
        fc2_bias(arena.take<T>(width)),
        norm_weight(arena.take<T>(width)),
        norm_bias(arena.take<T>(width)) {}

  void clear() const {  // one piece of the arena after the other
    T* const end = norm_bias + (norm_bias - norm_weight);
    for (T* p = taps; p < end; ++p) *p = T(0);
  }

  void write(const MixFFNArguments& a) const {
    const std::int64_t tap_count = a.kernel_size * a.kernel_size;
    for (std::int64_t j = 0; j < a.hidden; ++j)
      for (std::int64_t tap = 0; tap < tap_count; ++tap)
        static_cast<T*>(a.gradients.dw_weight)[j * tap_count + tap] = taps[tap * padded<T>(a.hidden) + j];
    copy_out(fc1_bias, a.hidden, a.gradients.fc1_bias);
    copy_out(dw_bias, a.hidden, a.gradients.dw_bias);
    copy_out(fc2_bias, a.channels, a.gradients.fc2_bias);
    copy_out(hidden_weight, a.hidden, a.gradients.hidden_norm.weight);
    copy_out(hidden_bias, a.hidden, a.gradients.hidden_norm.bias);
    copy_out(norm_weight, a.channels, a.gradients.norm.weight);
    copy_out(norm_bias, a.channels, a.gradients.norm.bias);
  }
};

template <class T>
struct Activated {
  Vector<T> value, slope;
};

// 1 / (1 + e) of an e that vexp made: where that is saturated the sigmoid is zero, whatever it is multiplied with
template <class T>
inline Vector<T> sigmoid_of(Vector<T> e) {
  return e > static_cast<T>(sizeof(T) == 4 ? 1.65e38 : 8.2e307) ? Vector<T>{} : T(1) / (e + T(1));
}

// activation and its derivative at x; rough: for products that see no more than bfloat16 of it
template <class T>
inline Activated<T> activate(ActivationFunction function, bool rough, Vector<T> x) {
  const Vector<T> zero{}, one = splat(T(1));
  switch (function) {
    case ActivationFunction::relu:  // NaN stays NaN
      return {x < zero ? zero : x, x <= zero ? zero : one};
    case ActivationFunction::gelu_tanh: {
      // x sigmoid(2 y) with y = sqrt(2 / pi) (x + 0.044715 x^3), the same as x (1 + tanh y) / 2
      const T k = T(0.7978845608028653558), c = T(0.044715);
      const Vector<T> square = x * x, y = x * (square * (k * c) + k);
      const Vector<T> e = vexp(y * T(-2)), sigmoid = sigmoid_of<T>(e);
      const Vector<T> dy = square * (T(3) * k * c) + k;
      return {x * sigmoid, sigmoid + x * sigmoid * (e * sigmoid) * dy * T(2)};
    }
    case ActivationFunction::silu: {
      const Vector<T> e = vexp(-x), sigmoid = sigmoid_of<T>(e);
      return {x * sigmoid, sigmoid + x * sigmoid * (e * sigmoid)};
    }
    case ActivationFunction::hardswish: {
      const Vector<T> three = splat(T(3)), sixth = splat(T(1) / T(6));
      const Vector<T> inside = x * (x + three) * sixth, slope = x * (sixth + sixth) + splat(T(0.5));
      return {x <= -three  ? x * zero
              : x >= three ? x
                           : inside,  // NaN of -infinity, as in PyTorch
              x <= -three  ? zero
              : x >= three ? one
                           : slope};
    }
    case ActivationFunction::relu6: {
      const Vector<T> six = splat(T(6));
      return {x < zero ? zero : x > six ? six : x, x <= zero ? zero : x >= six ? zero : one};
    }
    case ActivationFunction::identity:
      return {x, one};
    default: {
      Vector<T> cdf, pdf;
      if (rough)
        rough_normal_distribution(x, cdf, pdf);
      else
        normal_distribution(x, cdf, pdf);
      return {x * cdf, cdf + x * pdf};
    }
  }
}

template <class E>
struct MixFFN {
  using T = typename E::Value;
  using Element = typename E::Element;
  const MixFFNArguments& a;
  const E engine;
  const std::int64_t channels = a.channels, hidden = a.hidden;
  const std::int64_t width = padded<T>(channels), hidden_width = padded<T>(hidden);
  const std::int64_t activated = a.gated ? hidden / 2 : hidden, activated_width = padded<T>(activated);  // of T
  const std::int64_t kernel_size = a.kernel_size, radius = kernel_size / 2, tap_count = kernel_size * kernel_size;

  static constexpr std::int64_t kBandRows = 64, kLeastBandRows = 7, kWantedPieces = 8;
  const std::int64_t strips = max_of<std::int64_t>(1, (a.width + kStripColumns - 1) / kStripColumns);
  const std::int64_t bands = count_bands();
  const std::int64_t pieces = a.batch * strips * bands;
  const std::int64_t strip_columns = (a.width + strips - 1) / strips;  // the widest strip

  MixFFN(const MixFFNArguments& arguments, const E& engine_) : a(arguments), engine(engine_) {}

  // bands of at most kBandRows; more of them where a few small images would leave cores idle, but not so low that the
  // rows around them, which are made twice, weigh
  std::int64_t count_bands() const {
    const std::int64_t others = max_of<std::int64_t>(1, a.batch * strips);
    const std::int64_t wanted = min_of((kWantedPieces + others - 1) / others, a.height / (kLeastBandRows * radius));
    return max_of<std::int64_t>(1, max_of((a.height + kBandRows - 1) / kBandRows, wanted));
  }

  struct Piece {
    std::int64_t batch, row_begin, row_end, column_begin, column_end;
  };
  Piece piece(std::int64_t i) const {
    const std::int64_t band = i % bands, strip = i / bands % strips;
    return {i / (bands * strips), a.height * band / bands, a.height * (band + 1) / bands, a.width * strip / strips,
            a.width * (strip + 1) / strips};
  }

  struct Weights {
    Element* fc1;  // packed [C, hidden_width]
    T* fc1_bias;
    T *taps, *dw_bias;  // [tap_count, hidden_width]; the skip connection is part of the centre tap
    T *hidden_weight, *hidden_bias, *norm_weight, *norm_bias;
    Norm<T> norm, hidden_norm;

    Weights(Arena& arena, const MixFFN& m)
        : fc1(arena.take<Element>(m.engine.packed_size(m.channels, m.hidden_width))),
          fc1_bias(arena.take<T>(m.hidden_width)),
          taps(arena.take<T>(m.tap_count * m.hidden_width)),
          dw_bias(arena.take<T>(m.hidden_width)),
          hidden_weight(arena.take<T>(m.hidden_width)),
          hidden_bias(arena.take<T>(m.hidden_width)),
          norm_weight(arena.take<T>(m.width)),
          norm_bias(arena.take<T>(m.width)) {}

    // packed_fc1: whether U is to be made
    void fill_in(const MixFFN& m, bool packed_fc1 = true) {
      const MixFFNArguments& a = m.a;
      if (packed_fc1)
        pack(m.engine, a.num_threads, fc1, WeightMatrix{a.parameters.fc1_weight, a.matrix_dtype}, 1, m.channels,
             m.channels, m.hidden);
      copy_padded(fc1_bias, a.parameters.fc1_bias, m.hidden);
      copy_padded(dw_bias, a.parameters.dw_bias, m.hidden);
      fill(taps, m.tap_count * m.hidden_width, T(0));
      for (std::int64_t tap = 0; tap < m.tap_count; ++tap) {
        const T added = a.skip && tap == m.tap_count / 2 ? T(1) : T(0);
        for (std::int64_t c = 0; c < m.hidden; ++c)
          taps[tap * m.hidden_width + c] = static_cast<const T*>(a.parameters.dw_weight)[c * m.tap_count + tap] + added;
      }
      const T eps = static_cast<T>(a.norm_eps);
      if (a.parameters.norm.weight)
        norm = {copy_padded(norm_weight, a.parameters.norm.weight, m.channels),
                copy_padded(norm_bias, a.parameters.norm.bias, m.channels), eps};
      if (a.parameters.hidden_norm.weight)
        hidden_norm = {copy_padded(hidden_weight, a.parameters.hidden_norm.weight, m.hidden),
                       copy_padded(hidden_bias, a.parameters.hidden_norm.bias, m.hidden), eps};
    }
  };

  RowRing<T> take_ring(Arena& arena, std::int64_t columns) const {
    RowRing<T> ring{kernel_size};
    for (std::int64_t i = 0; i < kernel_size; ++i) ring.rows[i] = arena.take<T>(columns * hidden_width);
    return ring;
  }

  // x of one image row, columns [begin, end), after the norm
  void load_row(const Norm<T>& norm, std::int64_t batch, std::int64_t row, std::int64_t begin, std::int64_t end, T* x,
                T* normalized, T* rstd) const {
    load_tokens(a.x, batch, 0, row * a.width + begin, end - begin, channels, x, width);
    if (norm.weight) layer_norm(norm, end - begin, channels, x, normalized ? normalized : x, x, width, rstd);
  }

  // U of image row `row` for the columns [begin, end), zeros where they are outside the image; x is scratch. Where U
  // has an activation, before, unless null, takes what it was made of.
  void hidden_row(const Weights& w, std::int64_t batch, std::int64_t row, std::int64_t begin, std::int64_t end, T* x,
                  T* out, T* before) const {
    const std::int64_t first = max_of<std::int64_t>(begin, 0), last = min_of(end, a.width);
    if (row < 0 || row >= a.height) return fill(out, (end - begin) * hidden_width, T(0));
    fill(out, (first - begin) * hidden_width, T(0));
    fill(out + (last - begin) * hidden_width, (end - last) * hidden_width, T(0));
    load_row(w.norm, batch, row, first, last, x, nullptr, nullptr);
    multiply(engine, last - first, channels, hidden_width, x, width, w.fc1, out + (first - begin) * hidden_width,
             hidden_width, w.fc1_bias);
    const std::int64_t at = (first - begin) * hidden_width;
    if (activates_hidden()) activate_hidden(last - first, out + at, before ? before + at : nullptr);
  }

  Activated<T> activate(ActivationFunction function, Vector<T> x) const {
    return MSFORMER_VARIANT::activate<T>(function, engine.is_bfloat16(), x);
  }

  bool activates_hidden() const { return a.inner_activation != ActivationFunction::identity; }

  // the activation before the convolution, of tokens of U in place; before, unless null, takes what they were
  void activate_hidden(std::int64_t tokens, T* u, T* before) const {
    for (std::int64_t i = 0; i < tokens * hidden_width; i += kWidth<T>) {
      const Vector<T> x = load(u + i);
      if (before) store(before + i, x);
      store(u + i, activate(a.inner_activation, x).value);
    }
  }

  // the gradient of U before that activation, in place
  void activate_hidden_backward(std::int64_t tokens, const T* before, T* grad) const {
    for (std::int64_t i = 0; i < tokens * hidden_width; i += kWidth<T>)
      store(grad + i, load(grad + i) * activate(a.inner_activation, load(before + i)).slope);
  }

  // hidden norm and activation of rows, in place; T of rows with a gate is in their first half
  void normalize_and_activate(const Norm<T>& norm, std::int64_t tokens, T* z) const {
    for_few_rows(tokens, [&](std::int64_t first, auto count) {
      T* rows = z + first * hidden_width;
      a.gated ? gate_rows<count()>(rows) : activate_rows<count()>(norm, rows);
    });
  }

  // From z, t = T, and grad (of T) becomes dZ. With a norm, z becomes the normalised z, and unless null
  // weight_sum and bias_sum take up the gradients of the norm's parameters.
  void activation_backward(const Norm<T>& norm, std::int64_t tokens, T* z, T* t, T* grad, T* weight_sum,
                           T* bias_sum) const {
    for_few_rows(tokens, [&](std::int64_t first, auto count) {
      const std::int64_t at = first * hidden_width;
      if (a.gated)
        gate_backward_rows<count()>(z + at, t + at, grad + at);
      else if (norm.weight)
        norm_activation_backward_rows<count()>(norm, z + at, t + at, grad + at, weight_sum, bias_sum);
      else
        activation_backward_rows<count()>(z + at, t + at, grad + at);
    });
  }

 private:
  // calls task(first row, how many) for four rows at a time, and then one: the rows share the loads of what they are
  // multiplied with, and their long chains of arithmetic overlap
  template <class Task>
  static void for_few_rows(std::int64_t rows, const Task& task) {
    std::int64_t i = 0;
    for (; i + 4 <= rows; i += 4) task(i, std::integral_constant<int, 4>());
    for (; i < rows; ++i) task(i, std::integral_constant<int, 1>());
  }

  template <int ROWS>
  void activate_rows(const Norm<T>& norm, T* z) const {
    T mean[ROWS] = {}, rstd[ROWS] = {};
    if (norm.weight)
      for (int r = 0; r < ROWS; ++r)
        row_statistics(z + r * hidden_width, hidden, norm.eps, norm.centred, mean[r], rstd[r]);
    for (std::int64_t c = 0; c < hidden_width; c += kWidth<T>) {
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        Vector<T> n = load(z + r * hidden_width + c);
        if (norm.weight) n = (n - mean[r]) * rstd[r] * load(norm.weight + c) + load(norm.bias + c);
        store(z + r * hidden_width + c, activate(a.activation, n).value);
      }
    }
  }

  // calls task(where a vector of values is in the rows, where its gates are)
  template <int ROWS, class Task>
  void for_gates(const Task& task) const {
    for (int r = 0; r < ROWS; ++r)
      for (std::int64_t c = 0; c < activated; c += kWidth<T>)
        task(r * hidden_width + c, r * hidden_width + activated + c);
  }

  template <int ROWS>
  void gate_rows(T* z) const {
    for_gates<ROWS>([&](std::int64_t value, std::int64_t gate) {
      store(z + value, load(z + value) * activate(a.activation, load(z + gate)).value);
    });
  }

  template <int ROWS>
  void gate_backward_rows(const T* z, T* t, T* grad) const {
    for_gates<ROWS>([&](std::int64_t value, std::int64_t gate) {
      const Activated<T> f = activate(a.activation, load(z + gate));
      const Vector<T> x = load(z + value), g = load(grad + value);
      store(t + value, x * f.value);
      store(grad + value, g * f.value);
      store(grad + gate, g * x * f.slope);
    });
  }

  template <int ROWS>
  void activation_backward_rows(const T* z, T* t, T* grad) const {
    for (std::int64_t i = 0; i < ROWS * hidden_width; i += kWidth<T>) {
      const Activated<T> f = activate(a.activation, load(z + i));
      store(t + i, f.value);
      store(grad + i, load(grad + i) * f.slope);
    }
  }

  template <int ROWS>
  void norm_activation_backward_rows(const Norm<T>& norm, T* z, T* t, T* grad, T* weight_sum, T* bias_sum) const {
    constexpr int W = kWidth<T>;
    T mean[ROWS], rstd[ROWS];
    for (int r = 0; r < ROWS; ++r)
      row_statistics(z + r * hidden_width, hidden, norm.eps, norm.centred, mean[r], rstd[r]);
    Vector<T> sum[ROWS] = {}, dot[ROWS] = {};
    for (std::int64_t c = 0; c < hidden_width; c += W) {
      const Vector<T> weight = load(norm.weight + c), bias = load(norm.bias + c);
      Vector<T> weight_gradient{}, bias_gradient{};
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        const std::int64_t at = r * hidden_width + c;
        const Vector<T> x = (load(z + at) - mean[r]) * rstd[r];
        const Activated<T> f = activate(a.activation, x * weight + bias);
        const Vector<T> g = load(grad + at) * f.slope, scaled = g * weight;
        weight_gradient += g * x;
        bias_gradient += g;
        store(z + at, x);
        store(t + at, f.value);
        store(grad + at, scaled);
        sum[r] += scaled;
        dot[r] += scaled * x;
      }
      if (weight_sum) {
        store(weight_sum + c, load(weight_sum + c) + weight_gradient);
        store(bias_sum + c, load(bias_sum + c) + bias_gradient);
      }
    }
    const T inverse = T(1) / static_cast<T>(hidden);
    for (int r = 0; r < ROWS; ++r) {
      const T mean_grad = horizontal_sum<T>(sum[r]) * inverse, mean_dot = horizontal_sum<T>(dot[r]) * inverse;
      for (std::int64_t at = r * hidden_width; at < (r + 1) * hidden_width; at += W) {
        Vector<T> g = (load(grad + at) - mean_grad - load(z + at) * mean_dot) * rstd[r];
        const std::int64_t left = hidden - (at - r * hidden_width);
        store(grad + at, left < W ? keep_lanes<T>(g, left) : g);
      }
    }
  }
};

}  // namespace msformer::MSFORMER_VARIANT
