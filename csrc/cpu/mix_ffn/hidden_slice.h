// A slice of the hidden features of MixFFN, for a group of images of few tokens: all that comes between the two linear
// layers touches each hidden feature by itself, so a slice goes from the tokens through the first layer, convolution
// and activation, and back, while it is in the second cache of one core. A hidden norm and a gate do not; then all
// hidden features are one slice, and all threads work on it.
//
// U and dZ are kept with a border of zeros for the convolution, whose taps reach R rows and columns far: a row of an
// image is R + W tokens, the first R of them zero (also the right-hand neighbours of the row before), and R rows of
// zeros lie above each image and below the last.
#pragma once

#include "../engine/dense.h"
#include "mix_ffn.h"

namespace msformer::MSFORMER_VARIANT {

// How the hidden features are cut, by their number alone.
template <class T>
struct HiddenSlices {
  static constexpr std::int64_t kVectors = 64 / kWidth<float>;  // 64 features of float, 32 of double
  const Panels panels;
  const std::int64_t count, hidden;

  HiddenSlices(std::int64_t hidden_width, std::int64_t hidden_, bool whole)
      : panels(hidden_width / kWidth<T>),
        count(whole ? 1 : max_of<std::int64_t>(1, panels.vectors / kVectors)),
        hidden(hidden_) {}

  Range panel_range(std::int64_t i) const { return {panels.count * i / count, panels.count * (i + 1) / count}; }
  std::int64_t begin(std::int64_t i) const { return panels.begin(panel_range(i).begin) * kWidth<T>; }
  std::int64_t end(std::int64_t i) const { return min_of(hidden, panels.begin(panel_range(i).end) * kWidth<T>); }
};

// The same call for some of its hidden features; what is not theirs is left out.
template <class T>
inline MixFFNArguments with_hidden(const MixFFNArguments& a, std::int64_t begin, std::int64_t end, int num_threads) {
  MixFFNArguments out = a;
  const auto from = [begin](const void* data, std::int64_t each) -> const void* {
    return data ? static_cast<const T*>(data) + begin * each : nullptr;
  };
  const auto from_matrix = [&](const void* data, std::int64_t each) -> const void* {
    return a.matrix_dtype == DType::bfloat16 ? static_cast<const BFloat16*>(data) + begin * each : from(data, each);
  };
  const auto into = [begin](void* data, std::int64_t each) -> void* {
    return data ? static_cast<T*>(data) + begin * each : nullptr;
  };
  const std::int64_t taps = a.kernel_size * a.kernel_size;
  out.num_threads = num_threads;
  out.hidden = end - begin;
  out.parameters.fc1_weight = from_matrix(a.parameters.fc1_weight, a.channels);
  out.parameters.fc1_bias = from(a.parameters.fc1_bias, 1);
  out.parameters.dw_weight = from(a.parameters.dw_weight, taps);
  out.parameters.dw_bias = from(a.parameters.dw_bias, 1);
  out.parameters.norm = {};
  out.gradients.fc1_bias = into(a.gradients.fc1_bias, 1);
  out.gradients.dw_weight = into(a.gradients.dw_weight, taps);
  out.gradients.dw_bias = into(a.gradients.dw_bias, 1);
  out.gradients.fc2_bias = nullptr;
  out.gradients.norm = {};
  if (a.kept_hidden.data)
    visit_elements(a.kept_hidden, 0, 0, 0,
                   [&](auto* data) { out.kept_hidden.data = data + begin * a.kept_hidden.channel_stride; });
  return out;
}

template <class E>
struct HiddenSlice : MixFFN<E> {
  using T = typename E::Value;
  using Base = MixFFN<E>;
  using Weights = typename Base::Weights;
  using Base::a, Base::channels, Base::hidden, Base::width, Base::hidden_width;
  using Base::kernel_size, Base::radius, Base::activated, Base::activated_width;

  const std::int64_t image_tokens = a.height * a.width;
  const std::int64_t group_images = images_at_once(a.batch, image_tokens), group_tokens = group_images * image_tokens;
  const std::int64_t pitch = a.width + radius;
  const std::int64_t bordered_tokens = (group_images * (a.height + radius) + radius) * pitch + radius;

  HiddenSlice(const MixFFNArguments& arguments, const E& engine) : Base(arguments, engine) {}

  // where row r of the group (image r / height) begins in a bordered tensor: the zero tokens left of its first
  std::int64_t bordered_row(std::int64_t row) const { return (row + (row / a.height + 1) * radius) * pitch; }
  // where its first token is, in values
  std::int64_t bordered_values(std::int64_t row) const { return (bordered_row(row) + radius) * hidden_width; }

  void make_offsets(std::int64_t* offsets) const {
    for (std::int64_t row = 0; row < group_images * a.height; ++row)
      for (std::int64_t c = 0; c < a.width; ++c) offsets[row * a.width + c] = bordered_values(row) + c * hidden_width;
  }

  void clear_border(T* bordered) const {
    const auto clear = [&](std::int64_t token, std::int64_t count) {
      fill(bordered + token * hidden_width, count * hidden_width, T(0));
    };
    for (std::int64_t i = 0; i <= group_images; ++i) clear(i * (a.height + radius) * pitch, radius * pitch);
    for (std::int64_t row = 0; row < group_images * a.height; ++row) clear(bordered_row(row), radius);
    clear(bordered_tokens - radius, radius);
  }

  TapRows<T> neighbours(const T* bordered, std::int64_t row) const {
    TapRows<T> found;
    for (std::int64_t i = 0; i < kernel_size; ++i)
      found.row[i] = bordered + (bordered_row(row) + (i - radius) * pitch) * hidden_width;
    return found;
  }

  // calls task(row of the group) for the image rows of `images` images, in parallel
  template <class Task>
  void for_rows(std::int64_t images, const Task& task) const {
    parallel_for(images * a.height, a.num_threads, 0, [&](std::int64_t row, void*) { task(row); });
  }

  // calls task(begin, end) for a few vectors of the features at a time, in parallel
  template <class Task>
  void for_columns(const Task& task) const {
    constexpr std::int64_t kColumns = 4 * kWidth<T>;
    parallel_for((hidden_width + kColumns - 1) / kColumns, a.num_threads, 0,
                 [&](std::int64_t i, void*) { task(Range{i * kColumns, min_of(hidden_width, (i + 1) * kColumns)}); });
  }

  bool keeps_hidden() const { return a.kept_hidden.data != nullptr; }

  // U of a group of images, without its activation, from their tokens
  void make_hidden(const Weights& w, std::int64_t images, const typename E::Left& x, const std::int64_t* offsets,
                   T* u) const {
    product(this->engine, a.num_threads, images * image_tokens, channels, hidden_width, x,
            this->engine.packed_right(w.fc1), Start::bias, w.fc1_bias, {u, 0, offsets});
  }

  void keep_hidden_row(std::int64_t first_image, std::int64_t row, const T* u) const {
    store_tokens(a.kept_hidden, first_image + row / a.height, 0, row % a.height * a.width, a.width, hidden,
                 u + bordered_values(row), hidden_width);
  }

  void load_hidden_row(std::int64_t first_image, std::int64_t row, T* u) const {
    load_tokens(a.kept_hidden, first_image + row / a.height, 0, row % a.height * a.width, a.width, hidden,
                u + bordered_values(row), hidden_width);
  }

  struct ForwardBuffers {
    T *u, *z;
    std::int64_t* offsets;
    ForwardBuffers(Arena& arena, const HiddenSlice& s)
        : u(arena.take<T>(s.bordered_tokens * s.hidden_width)),
          z(arena.take<T>(s.group_tokens * s.hidden_width)),
          offsets(arena.take<std::int64_t>(s.group_tokens)) {}
  };

  // T of a group of images, in b.z; make_hidden(offsets, u) makes U of their tokens, without its activation
  template <class MakeHidden>
  void forward(const Weights& w, const ForwardBuffers& b, std::int64_t first_image, std::int64_t images,
               const MakeHidden& make_hidden_values) const {
    make_offsets(b.offsets);
    clear_border(b.u);
    make_hidden_values(b.offsets, b.u);
    if (keeps_hidden() || this->activates_hidden())
      for_rows(images, [&](std::int64_t row) {
        if (keeps_hidden()) keep_hidden_row(first_image, row, b.u);
        if (this->activates_hidden()) this->activate_hidden(a.width, b.u + bordered_values(row), nullptr);
      });
    for_rows(images, [&](std::int64_t row) {
      T* z = b.z + row * a.width * hidden_width;
      depthwise<T, false>(kernel_size, neighbours(b.u, row), w.taps, w.dw_bias, a.width, hidden_width, z);
      this->normalize_and_activate(w.hidden_norm, a.width, z);
    });
  }

  struct BackwardBuffers {
    T *u, *before, *grad_z, *z, *t;  // before: U without its activation
    T* hidden_partials;              // gradients of the hidden norm's weight and bias, of an image row each
    std::int64_t* offsets;
    BackwardBuffers(Arena& arena, const HiddenSlice& s)
        : u(arena.take<T>(s.bordered_tokens * s.hidden_width)),
          before(s.activates_hidden() ? arena.take<T>(s.group_tokens * s.hidden_width) : nullptr),
          grad_z(arena.take<T>(s.bordered_tokens * s.hidden_width)),
          z(arena.take<T>(s.group_tokens * s.hidden_width)),
          t(arena.take<T>(s.group_tokens * s.hidden_width)),
          hidden_partials(arena.take<T>(s.group_images * s.a.height * 2 * s.hidden_width)),
          offsets(arena.take<std::int64_t>(s.group_tokens)) {}
  };

  // U of a group of images, kept or made again, activated
  void load_hidden(const Weights& w, const BackwardBuffers& b, std::int64_t first_image, std::int64_t images,
                   const typename E::Left& x) const {
    make_offsets(b.offsets);
    clear_border(b.u);
    clear_border(b.grad_z);
    if (!keeps_hidden()) make_hidden(w, images, x, b.offsets, b.u);
    if (keeps_hidden() || this->activates_hidden())
      for_rows(images, [&](std::int64_t row) {
        if (keeps_hidden()) load_hidden_row(first_image, row, b.u);
        if (this->activates_hidden())
          this->activate_hidden(a.width, b.u + bordered_values(row), b.before + row * a.width * hidden_width);
      });
  }

  // dZ of all rows, from U and grad_z = dT; T in b.t
  void activation_gradients(const Weights& w, const BackwardBuffers& b, std::int64_t images) const {
    for_rows(images, [&](std::int64_t row) {
      T* z = b.z + row * a.width * hidden_width;
      T* t = b.t + row * a.width * hidden_width;
      T* partial = b.hidden_partials + row * 2 * hidden_width;
      depthwise<T, false>(kernel_size, neighbours(b.u, row), w.taps, w.dw_bias, a.width, hidden_width, z);
      fill(partial, 2 * hidden_width, T(0));
      this->activation_backward(w.hidden_norm, a.width, z, t, b.grad_z + bordered_values(row), partial,
                                partial + hidden_width);
    });
  }

  // gradients of the convolution and of the hidden norm, and dU in place of z
  void convolution_gradients(const Weights& w, const BackwardBuffers& b, const VectorGradients<T>& gradients,
                             std::int64_t images) const {
    for_columns([&](Range columns) {
      for (std::int64_t row = 0; row < images * a.height; ++row)
        depthwise_weight_backward<T>(kernel_size, neighbours(b.u, row), b.grad_z + bordered_values(row), a.width,
                                     hidden_width, columns, gradients.taps, gradients.dw_bias);
      const std::int64_t size = columns.end - columns.begin;
      const T* partials = b.hidden_partials + columns.begin;
      add_column_sums(images * a.height, size, partials, 2 * hidden_width, gradients.hidden_weight + columns.begin);
      add_column_sums(images * a.height, size, partials + hidden_width, 2 * hidden_width,
                      gradients.hidden_bias + columns.begin);
    });
    for_rows(images, [&](std::int64_t row) {
      const std::int64_t at = row * a.width * hidden_width;
      depthwise<T, true>(kernel_size, neighbours(b.grad_z, row), w.taps, nullptr, a.width, hidden_width, b.z + at);
      if (this->activates_hidden()) this->activate_hidden_backward(a.width, b.before + at, b.z + at);
    });
    for_columns([&](Range columns) {
      add_column_sums(images * image_tokens, columns.end - columns.begin, b.z + columns.begin, hidden_width,
                      gradients.fc1_bias + columns.begin);
    });
  }
};

}  // namespace msformer::MSFORMER_VARIANT
