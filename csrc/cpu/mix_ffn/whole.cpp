// MixFFN, forward and backward, for images of few tokens: whole images at once.
//
// The strips of strips_{forward,backward}.cpp read all weights once for every image row, and keep a partial sum of
// every weight gradient; both are too much where the weights are larger than the images. Here the hidden features of a
// group of images are worked on slice by slice (hidden_slice.h), one thread on each. The products whose sums go over
// all hidden features, the output and the gradient of x, come last, all threads on one product at a time (dense.h).
#include "../engine/weight_rows.h"
#include "hidden_slice.h"

namespace msformer::MSFORMER_VARIANT {
namespace {

template <class E>
struct Whole : MixFFN<E> {
  using T = typename E::Value;
  using Element = typename E::Element;
  using Base = MixFFN<E>;
  using Slice = HiddenSlice<E>;
  using Weights = typename Base::Weights;
  using Base::a, Base::channels, Base::hidden, Base::width, Base::hidden_width, Base::activated, Base::activated_width;

  const std::int64_t image_tokens = a.height * a.width;
  const std::int64_t group_images = images_at_once(a.batch, image_tokens), group_tokens = group_images * image_tokens;
  const HiddenSlices<T> slices{hidden_width, hidden, a.gated || a.parameters.hidden_norm.weight};
  const int slice_threads = slices.count > 1 ? 1 : a.num_threads;
  const MixFFNArguments widest = widest_slice();
  const std::size_t weight_bytes = bytes_of<Weights>(), vector_bytes = bytes_of_vectors();

  // whether the forward multiplies weights where they lie
  const bool by_rows = WeightRows<E>::fit({a.parameters.fc1_weight, a.matrix_dtype}, group_tokens, channels) &&
                       WeightRows<E>::fit({a.parameters.fc2_weight, a.matrix_dtype}, group_tokens, activated);

  Whole(const MixFFNArguments& arguments, const E& engine) : Base(arguments, engine) {}

  MixFFNArguments slice_arguments(std::int64_t i) const {
    return with_hidden<T>(a, slices.begin(i), slices.end(i), slice_threads);
  }
  MixFFNArguments widest_slice() const {
    std::int64_t most = 0;
    for (std::int64_t i = 0; i < slices.count; ++i) most = max_of(most, slices.end(i) - slices.begin(i));
    return with_hidden<T>(a, 0, most, slice_threads);
  }

  // what a slice needs at most
  template <class Pieces>
  std::size_t bytes_of() const {
    Arena counter(nullptr);
    Pieces(counter, Slice(widest, this->engine));
    return counter.used();
  }
  std::size_t bytes_of_vectors() const {
    Arena counter(nullptr);
    take_vectors(counter, Slice(widest, this->engine));
    return counter.used();
  }
  static VectorGradients<T> take_vectors(Arena& arena, const Slice& slice) {
    return VectorGradients<T>(arena, slice.width, slice.hidden_width, slice.tap_count);
  }

  // calls task(slice, its weights, its number, scratch), in parallel; weights: of all slices
  template <class Task>
  void for_slices(char* weights, std::size_t scratch_bytes, bool packs, const Task& task) const {
    parallel_for(slices.count, a.num_threads, scratch_bytes, [&](std::int64_t i, void* scratch) {
      const MixFFNArguments arguments = slice_arguments(i);
      const Slice slice(arguments, this->engine);
      Arena arena(weights + static_cast<std::size_t>(i) * weight_bytes);
      Weights w(arena, slice);
      w.fill_in(slice, packs);
      task(slice, w, i, scratch);
    });
  }

  template <class Task>
  void for_groups(const Task& task) const {
    for (std::int64_t first = 0; first < a.batch; first += group_images)
      task(first, min_of(group_images, a.batch - first));
  }

  // rows of a slice -> its columns of all hidden features
  void gather(std::int64_t i, std::int64_t tokens, const Slice& slice, const T* from, T* all) const {
    T* to = all + slices.begin(i);
    for (std::int64_t token = 0; token < tokens; ++token)
      for (std::int64_t c = 0; c < slice.hidden_width; c += kWidth<T>)
        store(to + token * hidden_width + c, load(from + token * slice.hidden_width + c));
  }

  struct ForwardBuffers {
    TokenNorm<T> norm;
    char* slice_weights;
    Element *operand, *fc2;  // operand: made of tokens
    T *fc2_bias, *x, *t, *y;
    ForwardBuffers(Arena& arena, const Whole& m)
        : norm(arena, m.channels),
          slice_weights(arena.take<char>(m.slices.count * static_cast<std::int64_t>(m.weight_bytes))),
          operand(arena.take<Element>(m.operand_size())),
          fc2(arena.take<Element>(m.by_rows ? 0 : m.engine.packed_size(m.activated, m.width))),
          fc2_bias(arena.take<T>(m.width)),
          x(arena.take<T>(m.group_tokens * m.width)),
          t(arena.take<T>(m.group_tokens * m.hidden_width)),
          y(arena.take<T>(m.group_tokens * m.width)) {}
  };

  std::int64_t operand_size() const {
    if (!by_rows) return this->engine.left_size(group_tokens, channels);
    return max_of(WeightRows<E>::size(this->engine, group_tokens, channels),
                  WeightRows<E>::size(this->engine, group_tokens, activated));
  }

  // T of all hidden features, in s.t; make_hidden(slice, its weights, offsets, u)
  template <class MakeHidden>
  void forward_slices(const ForwardBuffers& s, std::int64_t first, std::int64_t images,
                      const MakeHidden& make_hidden) const {
    for_slices(s.slice_weights, bytes_of<typename Slice::ForwardBuffers>(), first == 0 && !by_rows,
               [&](const Slice& slice, const Weights& w, std::int64_t i, void* scratch) {
                 Arena slice_arena(scratch);
                 const typename Slice::ForwardBuffers b(slice_arena, slice);
                 slice.forward(w, b, first, images,
                               [&](const std::int64_t* offsets, T* u) { make_hidden(slice, w, offsets, u); });
                 gather(i, images * image_tokens, slice, b.z, s.t);
               });
  }

  void forward_group(const ForwardBuffers& s, std::int64_t first, std::int64_t images) const {
    const E& engine = this->engine;
    const int threads = a.num_threads;
    const std::int64_t tokens = images * image_tokens;
    if (by_rows) {
      const typename E::Right x = WeightRows<E>::turn(engine, threads, s.operand, tokens, channels, s.x, width);
      forward_slices(s, first, images, [&](const Slice& slice, const Weights& w, const std::int64_t* offsets, T* u) {
        WeightRows<E>::multiply(engine, slice_threads, tokens, channels, slice.hidden, x, slice.a.parameters.fc1_weight,
                                w.fc1_bias, {u, 0, offsets});
      });
      const typename E::Right t = WeightRows<E>::turn(engine, threads, s.operand, tokens, activated, s.t, hidden_width);
      return WeightRows<E>::multiply(engine, threads, tokens, activated, channels, t, a.parameters.fc2_weight,
                                     s.fc2_bias, {s.y, width});
    }
    const typename E::Left x = engine.make_left(threads, s.operand, tokens, channels, {s.x, width, 1});
    forward_slices(s, first, images, [&](const Slice& slice, const Weights& w, const std::int64_t* offsets, T* u) {
      slice.make_hidden(w, images, x, offsets, u);
    });
    dense_rows(engine, threads, tokens, activated, width, s.t, hidden_width, engine.packed_right(s.fc2), Start::bias,
               s.fc2_bias, {s.y, width});
  }

  void forward() const {
    Arena counter(nullptr);
    ForwardBuffers(counter, *this);
    Workspace memory(counter.used());
    Arena arena(memory.data());
    ForwardBuffers s(arena, *this);
    s.norm.fill_in(a.parameters.norm, channels, a.norm_eps);
    if (!by_rows)
      pack(this->engine, a.num_threads, s.fc2, WeightMatrix{a.parameters.fc2_weight, a.matrix_dtype}, 1, activated,
           activated, channels);
    copy_padded(s.fc2_bias, a.parameters.fc2_bias, channels);
    for_groups([&](std::int64_t first, std::int64_t images) {
      load_images<T>(a.num_threads, a.x, s.norm.norm, first, images, image_tokens, channels, s.x, nullptr, nullptr);
      forward_group(s, first, images);
      store_images(a.num_threads, a.output, a.residual ? &a.x : nullptr, first, images, image_tokens, channels, s.x,
                   s.y);
    });
  }

  struct BackwardBuffers {
    TokenNorm<T> norm;
    char *slice_weights, *slice_vectors;
    RightSide<E> fc1_transposed, fc2_transposed;  // [hidden, width], [C, activated_width]
    WeightGradient<T> fc1_gradient, fc2_gradient;
    SharedOperand<E> x_rows, x_right, grad_rows, grad_columns;
    T *x, *normalized, *rstd, *grad_output, *grad_x, *grad_u;
    T *norm_partials, *norm_weight, *norm_bias, *fc2_bias;  // gradients; partials: of a token block each
    BackwardBuffers(Arena& arena, const Whole& m)
        : norm(arena, m.channels),
          slice_weights(arena.take<char>(m.slices.count * static_cast<std::int64_t>(m.weight_bytes))),
          slice_vectors(arena.take<char>(m.slices.count * static_cast<std::int64_t>(m.vector_bytes))),
          fc1_transposed(arena, m.engine, {m.a.parameters.fc1_weight, m.a.matrix_dtype}, m.hidden, m.channels),
          fc2_transposed(arena, m.engine, {m.a.parameters.fc2_weight, m.a.matrix_dtype}, m.channels, m.activated),
          fc1_gradient(arena, m.a.gradients.fc1_weight, m.a.matrix_dtype, m.hidden, m.channels),
          fc2_gradient(arena, m.a.gradients.fc2_weight, m.a.matrix_dtype, m.channels, m.activated),
          x_rows(arena, m.a.kept_hidden.data ? 0 : m.engine.left_size(m.group_tokens, m.channels)),
          x_right(arena, m.engine.right_size(m.group_tokens, m.width)),
          grad_rows(arena, m.engine.left_size(m.group_tokens, m.channels)),
          grad_columns(arena, m.engine.left_size(m.channels, m.group_tokens)),
          x(arena.take<T>(m.group_tokens * m.width)),
          normalized(arena.take<T>(m.group_tokens * m.width)),
          rstd(arena.take<T>(m.group_tokens)),
          grad_output(arena.take<T>(m.group_tokens * m.width)),
          grad_x(arena.take<T>(m.group_tokens * m.width)),
          grad_u(arena.take<T>(m.group_tokens * m.hidden_width)),
          norm_partials(arena.take<T>(token_blocks(m.group_tokens) * 2 * m.width)),
          norm_weight(arena.take<T>(m.width)),
          norm_bias(arena.take<T>(m.width)),
          fc2_bias(arena.take<T>(m.width)) {}
  };

  // what the slices share of a group of images: operands made of x and of the gradient of the output
  struct Operands {
    typename E::Left x_rows, grad_rows, grad_columns;
    typename E::Right x_right;
  };

  Operands make_operands(const BackwardBuffers& s, std::int64_t tokens) const {
    const E& engine = this->engine;
    const int threads = a.num_threads;
    const typename E::Left grad_rows = s.grad_rows.rows(engine, threads, tokens, channels, s.grad_output, width);
    return {a.kept_hidden.data ? grad_rows : s.x_rows.rows(engine, threads, tokens, channels, s.x, width), grad_rows,
            s.grad_columns.columns(engine, threads, channels, tokens, s.grad_output, width),
            s.x_right.right(engine, threads, tokens, width, s.x, width)};
  }

  // dT of a slice = grad_output W_2, into the rows that the slice keeps for dZ
  void make_grad_t(std::int64_t i, std::int64_t tokens, const BackwardBuffers& s, const Operands& o,
                   const typename Slice::BackwardBuffers& b) const {
    const typename E::Right fc2 = s.fc2_transposed.operand();
    if (slices.count == 1)
      return product(this->engine, slice_threads, tokens, channels, activated_width, o.grad_rows, fc2, Start::zero,
                     nullptr, {b.grad_z, 0, b.offsets});
    // columns are counted from the first of all hidden features
    this->engine.product(slice_threads, tokens, slices.panel_range(i), channels, slices.panels, o.grad_rows, fc2,
                         Start::zero, nullptr, {b.grad_z - slices.begin(i), 0, b.offsets});
  }

  void backward_slice(const BackwardBuffers& s, const Operands& o, const Slice& slice, const Weights& w, std::int64_t i,
                      std::int64_t first, std::int64_t images, void* scratch) const {
    const std::int64_t tokens = images * image_tokens, begin = slices.begin(i);
    const WeightGradient<T>&fc1 = s.fc1_gradient, &fc2 = s.fc2_gradient;
    Arena arena(scratch), vector_arena(s.slice_vectors + static_cast<std::size_t>(i) * vector_bytes);
    const typename Slice::BackwardBuffers b(arena, slice);
    const VectorGradients<T> vectors = take_vectors(vector_arena, slice);
    if (first == 0) vectors.clear();
    slice.load_hidden(w, b, first, images, o.x_rows);
    make_grad_t(i, tokens, s, o, b);
    slice.activation_gradients(w, b, images);
    dense_right(this->engine, slice_threads, channels, tokens, slice.activated_width, o.grad_columns,
                {b.t, slice.hidden_width}, {fc2.data() + begin, fc2.leading()}, first > 0);
    slice.convolution_gradients(w, b, vectors, images);
    dense_columns(this->engine, slice_threads, slice.hidden, tokens, width, b.z, slice.hidden_width, o.x_right,
                  {fc1.data() + begin * fc1.leading(), fc1.leading()}, first > 0);
    gather(i, tokens, slice, b.z, s.grad_u);
    if (first + images == a.batch) vectors.write(slice.a);
  }

  void backward() const {
    Arena counter(nullptr);
    BackwardBuffers(counter, *this);
    Workspace memory(counter.used());
    Arena arena(memory.data());
    BackwardBuffers s(arena, *this);
    s.norm.fill_in(a.parameters.norm, channels, a.norm_eps);
    s.fc1_transposed.fill_in(a.num_threads);
    s.fc2_transposed.fill_in(a.num_threads);
    for (T* sums : {s.norm_weight, s.norm_bias, s.fc2_bias}) fill(sums, width, T(0));
    for_groups([&](std::int64_t first, std::int64_t images) {
      const std::int64_t tokens = images * image_tokens;
      load_images(a.num_threads, a.x, s.norm.norm, first, images, image_tokens, channels, s.x, s.normalized, s.rstd);
      load_images<T>(a.num_threads, a.grad_output, {}, first, images, image_tokens, channels, s.grad_output, nullptr,
                     nullptr);
      const Operands operands = make_operands(s, tokens);
      for_slices(s.slice_weights, bytes_of<typename Slice::BackwardBuffers>(), first == 0 && !a.kept_hidden.data,
                 [&](const Slice& slice, const Weights& w, std::int64_t i, void* scratch) {
                   backward_slice(s, operands, slice, w, i, first, images, scratch);
                 });
      add_column_sums(tokens, width, s.grad_output, width, s.fc2_bias);
      dense_rows(this->engine, a.num_threads, tokens, hidden, width, s.grad_u, hidden_width, s.fc1_transposed.operand(),
                 Start::zero, nullptr, {s.grad_x, width});
      store_image_gradients(a.num_threads, a.grad_x, s.norm.norm, a.residual ? s.grad_output : nullptr, first, images,
                            image_tokens, channels, s.normalized, s.rstd, s.grad_x, s.norm_partials, s.norm_weight,
                            s.norm_bias);
    });
    s.fc1_gradient.finish(a.num_threads);
    s.fc2_gradient.finish(a.num_threads);
    copy_out(s.fc2_bias, channels, a.gradients.fc2_bias);
    copy_out(s.norm_weight, channels, a.gradients.norm.weight);
    copy_out(s.norm_bias, channels, a.gradients.norm.bias);
  }
};

struct WholeProducts {
  ProductShape shapes[2];
  explicit WholeProducts(const MixFFNArguments& a) {
    const std::int64_t image_tokens = a.height * a.width, tokens = images_at_once(a.batch, image_tokens) * image_tokens;
    shapes[0] = {tokens, a.channels, a.hidden, true};  // weights are rewritten once a group, like tokens
    shapes[1] = {tokens, a.gated ? a.hidden / 2 : a.hidden, a.channels, true};
  }
};

}  // namespace

bool mix_ffn_fits_whole(const MixFFNArguments& a) {
  return a.form == Form::few_tokens && a.batch * a.height * a.width * a.hidden > 0;
}

void mix_ffn_whole_forward(const MixFFNArguments& a) {
  with_engine(a.x.dtype, a.precision, WholeProducts(a).shapes,
              [&](auto engine) { Whole<decltype(engine)>(a, engine).forward(); });
}

void mix_ffn_whole_backward(const MixFFNArguments& a) {
  with_engine(a.x.dtype, a.precision, WholeProducts(a).shapes,
              [&](auto engine) { Whole<decltype(engine)>(a, engine).backward(); });
}

}  // namespace msformer::MSFORMER_VARIANT
