// MixFFN, forward and backward, for images of few tokens: whole images at once, layer after layer.
//
// The strips of mix_ffn_{forward,backward}.cpp read all weights once for every image row, and keep a partial sum of
// every weight gradient; both are too much where the weights are larger than the images. Here the hidden tensors of a
// group of images exist as a whole, in a workspace of a few megabytes, and all threads work on one product at a time
// (dense.h).
//
// U and dZ are kept with a border of zeros for the convolution, whose taps reach R rows and columns far: a row of an
// image is R + W tokens, the first R of them zero (also the right-hand neighbours of the row before), and R rows of
// zeros lie above each image and below the last.
#include "../engine/dense.h"
#include "mix_ffn.h"

namespace msformer::MSFORMER_VARIANT {
namespace {

template <class T>
struct Whole : MixFFN<Values<T>> {
  using Base = MixFFN<Values<T>>;
  using Weights = typename Base::Weights;
  using Base::a, Base::channels, Base::hidden, Base::width, Base::hidden_width;
  using Base::kernel_size, Base::radius, Base::activated, Base::activated_width;

  const std::int64_t image_tokens = a.height * a.width;
  const std::int64_t group_images = images_at_once(a.batch, image_tokens), group_tokens = group_images * image_tokens;
  const std::int64_t pitch = a.width + radius;
  const std::int64_t bordered_tokens = (group_images * (a.height + radius) + radius) * pitch + radius;

  explicit Whole(const MixFFNArguments& arguments) : Base(arguments) {}

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

  // calls task(begin, end) for slices of the hidden features, in parallel
  template <class Task>
  void for_hidden_slices(const Task& task) const {
    constexpr std::int64_t kSlice = 4 * kWidth<T>;
    parallel_for((hidden_width + kSlice - 1) / kSlice, a.num_threads, 0,
                 [&](std::int64_t i, void*) { task(Range{i * kSlice, min_of(hidden_width, (i + 1) * kSlice)}); });
  }

  bool keeps_hidden() const { return a.kept_hidden.data != nullptr; }

  // U of a group of images, without its activation
  void make_hidden(const Weights& w, std::int64_t images, const T* x, const std::int64_t* offsets, T* u) const {
    dense_tokens<T>(a.num_threads, images * image_tokens, channels, hidden_width, x, width, w.fc1, w.fc1_bias,
                    {u, 0, offsets});
  }

  void keep_hidden_row(std::int64_t first_image, std::int64_t row, const T* u) const {
    store_tokens(a.kept_hidden, first_image + row / a.height, 0, row % a.height * a.width, a.width, hidden,
                 u + bordered_values(row), hidden_width);
  }

  void load_hidden_row(std::int64_t first_image, std::int64_t row, T* u) const {
    load_tokens(a.kept_hidden, first_image + row / a.height, 0, row % a.height * a.width, a.width, hidden,
                u + bordered_values(row), hidden_width);
  }

  template <class Task>
  void for_groups(const Task& task) const {
    for (std::int64_t first = 0; first < a.batch; first += group_images)
      task(first, min_of(group_images, a.batch - first));
  }

  struct ForwardBuffers {
    Weights weights;
    T *fc2, *fc2_bias, *x, *u, *z, *y;
    std::int64_t* offsets;
    ForwardBuffers(Arena& arena, const Whole& m)
        : weights(arena, m),
          fc2(arena.take<T>(m.activated * m.width)),
          fc2_bias(arena.take<T>(m.width)),
          x(arena.take<T>(m.group_tokens * m.width)),
          u(arena.take<T>(m.bordered_tokens * m.hidden_width)),
          z(arena.take<T>(m.group_tokens * m.hidden_width)),
          y(arena.take<T>(m.group_tokens * m.width)),
          offsets(arena.take<std::int64_t>(m.group_tokens)) {}
  };

  void forward() const {
    Arena counter(nullptr);
    ForwardBuffers(counter, *this);
    Workspace memory(counter.used());
    Arena arena(memory.data());
    ForwardBuffers s(arena, *this);
    s.weights.fill_in(*this);
    pack<Values<T>>(a.num_threads, s.fc2, static_cast<const T*>(a.parameters.fc2_weight), 1, activated, activated,
                    channels);
    copy_padded(s.fc2_bias, a.parameters.fc2_bias, channels);
    make_offsets(s.offsets);
    clear_border(s.u);
    for_groups([&](std::int64_t first, std::int64_t images) {
      const std::int64_t tokens = images * image_tokens;
      load_images<T>(a.num_threads, a.x, s.weights.norm, first, images, image_tokens, channels, s.x, nullptr, nullptr);
      make_hidden(s.weights, images, s.x, s.offsets, s.u);
      if (keeps_hidden() || this->activates_hidden())
        for_rows(images, [&](std::int64_t row) {
          if (keeps_hidden()) keep_hidden_row(first, row, s.u);
          if (this->activates_hidden()) this->activate_hidden(a.width, s.u + bordered_values(row), nullptr);
        });
      for_rows(images, [&](std::int64_t row) {
        T* z = s.z + row * a.width * hidden_width;
        depthwise<T, false>(kernel_size, neighbours(s.u, row), s.weights.taps, s.weights.dw_bias, a.width, hidden_width,
                            z);
        this->normalize_and_activate(s.weights.hidden_norm, a.width, z);
      });
      dense_tokens<T>(a.num_threads, tokens, activated, width, s.z, hidden_width, s.fc2, s.fc2_bias, {s.y, width});
      store_images(a.num_threads, a.output, a.residual ? &a.x : nullptr, first, images, image_tokens, channels, s.x,
                   s.y);
    });
  }

  struct BackwardBuffers {
    Weights weights;
    VectorGradients<T> vectors;
    RightSide<T> fc1_transposed, fc2_transposed;  // [hidden, width], [C, activated_width]
    WeightGradient<T> fc1_gradient, fc2_gradient;
    T *x, *normalized, *rstd, *grad_output, *grad_x;
    T *u, *before, *grad_z, *z, *t;  // before: U without its activation
    T *hidden_partials,
        *norm_partials;  // gradients of the norms' weight and bias: an image row each; a token block each
    std::int64_t* offsets;
    BackwardBuffers(Arena& arena, const Whole& m)
        : weights(arena, m),
          vectors(arena, m.width, m.hidden_width, m.tap_count),
          fc1_transposed(arena, m.a.parameters.fc1_weight, m.hidden, m.channels),
          fc2_transposed(arena, m.a.parameters.fc2_weight, m.channels, m.activated),
          fc1_gradient(arena, m.a.gradients.fc1_weight, m.hidden, m.channels),
          fc2_gradient(arena, m.a.gradients.fc2_weight, m.channels, m.activated),
          x(arena.take<T>(m.group_tokens * m.width)),
          normalized(arena.take<T>(m.group_tokens * m.width)),
          rstd(arena.take<T>(m.group_tokens)),
          grad_output(arena.take<T>(m.group_tokens * m.width)),
          grad_x(arena.take<T>(m.group_tokens * m.width)),
          u(arena.take<T>(m.bordered_tokens * m.hidden_width)),
          before(m.activates_hidden() ? arena.take<T>(m.group_tokens * m.hidden_width) : nullptr),
          grad_z(arena.take<T>(m.bordered_tokens * m.hidden_width)),
          z(arena.take<T>(m.group_tokens * m.hidden_width)),
          t(arena.take<T>(m.group_tokens * m.hidden_width)),
          hidden_partials(arena.take<T>(m.group_images * m.a.height * 2 * m.hidden_width)),
          norm_partials(arena.take<T>(token_blocks(m.group_tokens) * 2 * m.width)),
          offsets(arena.take<std::int64_t>(m.group_tokens)) {}
  };

  // dZ of all rows, from U and grad_z = dT; T in s.t
  void activation_gradients(const BackwardBuffers& s, std::int64_t images) const {
    for_rows(images, [&](std::int64_t row) {
      T* z = s.z + row * a.width * hidden_width;
      T* t = s.t + row * a.width * hidden_width;
      T* grad_z = s.grad_z + bordered_values(row);
      T* partial = s.hidden_partials + row * 2 * hidden_width;
      depthwise<T, false>(kernel_size, neighbours(s.u, row), s.weights.taps, s.weights.dw_bias, a.width, hidden_width,
                          z);
      fill(partial, 2 * hidden_width, T(0));
      this->activation_backward(s.weights.hidden_norm, a.width, z, t, grad_z, partial, partial + hidden_width);
    });
  }

  // gradients of the convolution and of the hidden norm, and dU in place of z
  void convolution_gradients(const BackwardBuffers& s, std::int64_t images) const {
    for_hidden_slices([&](Range slice) {
      for (std::int64_t row = 0; row < images * a.height; ++row)
        depthwise_weight_backward<T>(kernel_size, neighbours(s.u, row), s.grad_z + bordered_values(row), a.width,
                                     hidden_width, slice, s.vectors.taps, s.vectors.dw_bias);
      const std::int64_t size = slice.end - slice.begin;
      const T* partials = s.hidden_partials + slice.begin;
      add_column_sums(images * a.height, size, partials, 2 * hidden_width, s.vectors.hidden_weight + slice.begin);
      add_column_sums(images * a.height, size, partials + hidden_width, 2 * hidden_width,
                      s.vectors.hidden_bias + slice.begin);
    });
    for_rows(images, [&](std::int64_t row) {
      const std::int64_t at = row * a.width * hidden_width;
      depthwise<T, true>(kernel_size, neighbours(s.grad_z, row), s.weights.taps, nullptr, a.width, hidden_width,
                         s.z + at);
      if (this->activates_hidden()) this->activate_hidden_backward(a.width, s.before + at, s.z + at);
    });
  }

  void backward() const {
    Arena counter(nullptr);
    BackwardBuffers(counter, *this);
    Workspace memory(counter.used());
    Arena arena(memory.data());
    BackwardBuffers s(arena, *this);
    s.weights.fill_in(*this, !keeps_hidden());
    s.vectors.clear();
    const Matrix<T> fc1_transposed = s.fc1_transposed.fill_in(a.num_threads);
    const Matrix<T> fc2_transposed = s.fc2_transposed.fill_in(a.num_threads);
    const WeightGradient<T>&fc1 = s.fc1_gradient, &fc2 = s.fc2_gradient;
    make_offsets(s.offsets);
    clear_border(s.u);
    clear_border(s.grad_z);
    for_groups([&](std::int64_t first, std::int64_t images) {
      const std::int64_t tokens = images * image_tokens;
      load_images(a.num_threads, a.x, s.weights.norm, first, images, image_tokens, channels, s.x, s.normalized, s.rstd);
      load_images<T>(a.num_threads, a.grad_output, {}, first, images, image_tokens, channels, s.grad_output, nullptr,
                     nullptr);
      if (!keeps_hidden()) make_hidden(s.weights, images, s.x, s.offsets, s.u);
      if (keeps_hidden() || this->activates_hidden())
        for_rows(images, [&](std::int64_t row) {
          if (keeps_hidden()) load_hidden_row(first, row, s.u);
          if (this->activates_hidden())
            this->activate_hidden(a.width, s.u + bordered_values(row), s.before + row * a.width * hidden_width);
        });
      dense<T>(a.num_threads, tokens, channels, activated_width, {s.grad_output, width, 1}, fc2_transposed, Start::zero,
               nullptr, {s.grad_z, 0, s.offsets});
      activation_gradients(s, images);
      dense_weights<T>(a.num_threads, channels, tokens, activated_width, s.grad_output, width, s.t, hidden_width,
                       fc2.data(), fc2.leading(), first > 0);
      convolution_gradients(s, images);
      dense_weights<T>(a.num_threads, hidden, tokens, width, s.z, hidden_width, s.x, width, fc1.data(), fc1.leading(),
                       first > 0);
      for_hidden_slices([&](Range slice) {
        add_column_sums(tokens, slice.end - slice.begin, s.z + slice.begin, hidden_width,
                        s.vectors.fc1_bias + slice.begin);
      });
      add_column_sums(tokens, width, s.grad_output, width, s.vectors.fc2_bias);
      dense<T>(a.num_threads, tokens, hidden, width, {s.z, hidden_width, 1}, fc1_transposed, Start::zero, nullptr,
               {s.grad_x, width});
      store_image_gradients(a.num_threads, a.grad_x, s.weights.norm, a.residual ? s.grad_output : nullptr, first,
                            images, image_tokens, channels, s.normalized, s.rstd, s.grad_x, s.norm_partials,
                            s.vectors.norm_weight, s.vectors.norm_bias);
    });
    fc1.finish();
    fc2.finish();
    s.vectors.write(a);
  }
};

}  // namespace

bool mix_ffn_fits_whole(const MixFFNArguments& a) {
  return a.form == Form::few_tokens && a.batch * a.height * a.width * a.hidden > 0;
}

void mix_ffn_whole_forward(const MixFFNArguments& a) {
  with_values(a.x.dtype, [&](auto engine) { Whole<typename decltype(engine)::Value>(a).forward(); });
}

void mix_ffn_whole_backward(const MixFFNArguments& a) {
  with_values(a.x.dtype, [&](auto engine) { Whole<typename decltype(engine)::Value>(a).backward(); });
}

}  // namespace msformer::MSFORMER_VARIANT
