// MixFFN backward by recomputation: nothing of the forward is saved but its inputs.
//
// A piece walks its rows with a lag. With taps that reach R = k / 2 rows and columns far, for a new image row r: U(r),
// with 2R halo columns on each side; then for row r-R, with R halo columns: dT = dY W_2^T, the convolution, the hidden
// norm, the activation and their gradients, which give dZ; then for row r-2R: dU = dw^T(dZ), dX = dU W_1^T and the
// gradient of the norm before.
// Weight gradients are summed over the piece's own tokens only, in a fixed number of groups of pieces.
#include "mix_ffn.h"

namespace msformer::MSFORMER_VARIANT {
namespace {

template <class E>
struct Backward : MixFFN<E> {
  using Base = MixFFN<E>;
  using T = typename E::Value;
  using Element = typename E::Element;
  using Weights = typename Base::Weights;
  using Piece = typename Base::Piece;
  using Base::a, Base::channels, Base::hidden, Base::width, Base::hidden_width, Base::strip_columns;
  using Base::kernel_size, Base::radius, Base::activated, Base::activated_width;

  Backward(const MixFFNArguments& arguments, const E& engine) : Base(arguments, engine) {}

  struct Products {      // weights as the backward products want them
    Element *fc1, *fc2;  // packed W_1 [hidden, width], W_2 [C, activated_width]
    Products(Arena& arena, const Backward& b)
        : fc1(arena.take<Element>(b.engine.packed_size(b.hidden, b.width))),
          fc2(arena.take<Element>(b.engine.packed_size(b.channels, b.activated_width))) {}
  };

  struct Rows {
    T *x, *normalized, *grad_output, *grad_x, *rstd;
    RowRing<T> u, before, grad_z;    // before: U without its activation
    T *z, *t, *grad_u;               // grad_u takes the place of a z that is not needed any more
    T *hidden_weight, *hidden_bias;  // gradients of the hidden norm, summed over one image row
    Rows(Arena& arena, const Backward& b) {
      const std::int64_t most = b.strip_columns + 4 * b.radius;
      x = arena.take<T>(most * b.width);
      normalized = arena.take<T>(most * b.width);
      grad_output = arena.take<T>(most * b.width);
      grad_x = arena.take<T>(most * b.width);
      rstd = arena.take<T>(most);
      u = b.take_ring(arena, most);
      before = b.activates_hidden() ? b.take_ring(arena, most) : RowRing<T>{b.kernel_size};
      grad_z = b.take_ring(arena, most);
      z = arena.take<T>(most * b.hidden_width);
      t = arena.take<T>(most * b.hidden_width);
      grad_u = z;
      hidden_weight = arena.take<T>(b.hidden_width);
      hidden_bias = arena.take<T>(b.hidden_width);
    }
  };

  struct TokenSums : VectorGradients<T> {
    T *fc1, *fc2;  // [C, hidden_width], [C, activated_width]
    TokenSums(Arena& arena, const Backward& b)
        : VectorGradients<T>(arena, b.width, b.hidden_width, b.tap_count),
          fc1(arena.take<T>(b.channels * b.hidden_width)),
          fc2(arena.take<T>(b.channels * b.activated_width)) {}
  };

  template <class Pieces>
  std::size_t bytes_of() const {
    Arena counter(nullptr);
    Pieces(counter, *this);
    return counter.used();
  }

  // dZ of image row `row` for the piece's columns and `radius` halo columns on each side
  void grad_hidden_row(const Weights& w, const Products& products, const Piece& p, std::int64_t row, Rows& s,
                       const TokenSums& sums) const {
    T* grad_z = s.grad_z.at(row);
    const std::int64_t columns = p.column_end - p.column_begin;
    const std::int64_t begin = p.column_begin - radius, end = p.column_end + radius;
    if (row < 0 || row >= a.height) return fill(grad_z, (end - begin) * hidden_width, T(0));
    const std::int64_t first = max_of<std::int64_t>(begin, 0), last = min_of(end, a.width);
    fill(grad_z, (first - begin) * hidden_width, T(0));
    fill(grad_z + (last - begin) * hidden_width, (end - last) * hidden_width, T(0));
    T* grad = grad_z + (first - begin) * hidden_width;

    load_tokens(a.grad_output, p.batch, 0, row * a.width + first, last - first, channels, s.grad_output, width);
    multiply(this->engine, last - first, channels, activated_width, s.grad_output, width, products.fc2, grad,
             hidden_width);
    // u starts `radius` columns left of `begin`, where the taps of the token at `begin` start
    const TapRows<T> rows = s.u.around(row, (first - begin) * hidden_width);
    depthwise<T, false>(kernel_size, rows, w.taps, w.dw_bias, last - first, hidden_width, s.z);
    const bool own_row = row >= p.row_begin && row < p.row_end;
    fill(s.hidden_weight, hidden_width, T(0));
    fill(s.hidden_bias, hidden_width, T(0));
    // the columns left and right of the piece are another one's to sum up
    const std::int64_t skip = p.column_begin - first;
    const auto activate_columns = [&](std::int64_t begin, std::int64_t end, bool own) {
      const std::int64_t at = begin * hidden_width;
      this->activation_backward(w.hidden_norm, end - begin, s.z + at, s.t + at, grad + at,
                                own ? s.hidden_weight : nullptr, s.hidden_bias);
    };
    activate_columns(0, skip, false);
    activate_columns(skip, skip + columns, own_row);
    activate_columns(skip + columns, last - first, false);
    if (!own_row) return;
    add_rows<T>(1, hidden_width, s.hidden_weight, sums.hidden_weight);
    add_rows<T>(1, hidden_width, s.hidden_bias, sums.hidden_bias);
    const T* own_grad_output = s.grad_output + skip * width;
    multiply_transposed_add(this->engine, channels, columns, activated_width, own_grad_output, width,
                            s.t + skip * hidden_width, hidden_width, sums.fc2, activated_width);
    add_column_sums(columns, width, own_grad_output, width, sums.fc2_bias);
    const std::int64_t own = radius * hidden_width;
    depthwise_weight_backward<T>(kernel_size, s.u.around(row, own), grad_z + own, columns, hidden_width,
                                 {0, hidden_width}, sums.taps, sums.dw_bias);
  }

  // dX of the piece's part of image row `row`
  void grad_x_row(const Weights& w, const Products& products, const Piece& p, std::int64_t row, Rows& s,
                  const TokenSums& sums) const {
    const std::int64_t columns = p.column_end - p.column_begin, token = row * a.width + p.column_begin;
    depthwise<T, true>(kernel_size, s.grad_z.around(row), w.taps, nullptr, columns, hidden_width, s.grad_u);
    // the rows of U have more columns on each side
    if (this->activates_hidden())
      this->activate_hidden_backward(columns, s.before.at(row) + 2 * radius * hidden_width, s.grad_u);
    add_column_sums(columns, hidden_width, s.grad_u, hidden_width, sums.fc1_bias);
    this->load_row(w.norm, p.batch, row, p.column_begin, p.column_end, s.x, s.normalized, s.rstd);
    multiply_transposed_add(this->engine, channels, columns, hidden_width, s.x, width, s.grad_u, hidden_width, sums.fc1,
                            hidden_width);
    multiply(this->engine, columns, hidden, width, s.grad_u, hidden_width, products.fc1, s.grad_x, width);
    if (w.norm.weight)
      layer_norm_backward(w.norm, columns, channels, s.normalized, s.rstd, s.grad_x, width, sums.norm_weight,
                          sums.norm_bias);
    if (a.residual) {
      load_tokens(a.grad_output, p.batch, 0, token, columns, channels, s.x, width);
      add_rows(columns, width, s.x, s.grad_x);
    }
    store_tokens(a.grad_x, p.batch, 0, token, columns, channels, s.grad_x, width);
  }

  void walk(const Weights& w, const Products& products, const Piece& p, Rows& s, const TokenSums& sums) const {
    const std::int64_t halo = 2 * radius;
    for (std::int64_t row = p.row_begin - halo; row < p.row_end + halo; ++row) {
      this->hidden_row(w, p.batch, row, p.column_begin - halo, p.column_end + halo, s.x, s.u.at(row), s.before.at(row));
      if (row >= p.row_begin) grad_hidden_row(w, products, p, row - radius, s, sums);
      if (row - halo >= p.row_begin) grad_x_row(w, products, p, row - halo, s, sums);
    }
  }

  void write_gradients(const TokenSums& s) const {
    constexpr std::int64_t kLine = 64 / sizeof(T);  // hidden features that a cache line holds
    parallel_for((hidden + kLine - 1) / kLine, a.num_threads, 64, [&](std::int64_t line, void*) {
      const std::int64_t begin = line * kLine, end = min_of(hidden, begin + kLine);
      for (std::int64_t c = 0; c < channels; ++c) {
        for (std::int64_t j = begin; j < end; ++j)
          static_cast<T*>(a.gradients.fc1_weight)[j * channels + c] = s.fc1[c * hidden_width + j];
        for (std::int64_t j = begin; j < min_of(end, activated); ++j)
          static_cast<T*>(a.gradients.fc2_weight)[c * activated + j] = s.fc2[c * activated_width + j];
      }
    });
    s.write(a);
  }

  void run() const {
    const std::int64_t size = static_cast<std::int64_t>(bytes_of<TokenSums>() / sizeof(T));
    const std::int64_t groups = group_count(this->pieces, size * static_cast<std::int64_t>(sizeof(T)));
    Workspace memory(bytes_of<Weights>() + bytes_of<Products>() +
                     sizeof(T) * static_cast<std::size_t>((groups + 1) * size));
    Arena arena(memory.data());
    Weights w(arena, *this);
    w.fill_in(*this);
    Products products(arena, *this);
    pack(this->engine, a.num_threads, products.fc1, static_cast<const T*>(a.parameters.fc1_weight), channels, 1, hidden,
         channels);
    pack(this->engine, a.num_threads, products.fc2, static_cast<const T*>(a.parameters.fc2_weight), activated, 1,
         channels, activated);
    T* partials = arena.take<T>((groups + 1) * size);

    parallel_for(groups, a.num_threads, bytes_of<Rows>(), [&](std::int64_t group, void* scratch) {
      Arena rows_arena(scratch), sums_arena(partials + group * size);
      Rows rows(rows_arena, *this);
      TokenSums sums(sums_arena, *this);
      fill(partials + group * size, size, T(0));
      for (std::int64_t i = this->pieces * group / groups; i < this->pieces * (group + 1) / groups; ++i)
        walk(w, products, this->piece(i), rows, sums);
    });
    T* total = partials + groups * size;
    combine_groups(partials, groups, size, a.num_threads, total);
    Arena total_arena(total);
    write_gradients(TokenSums(total_arena, *this));
  }
};

}  // namespace

void mix_ffn_backward(const MixFFNArguments& a) {
  if (mix_ffn_fits_whole(a)) return mix_ffn_whole_backward(a);
  with_engine(a.x.dtype, a.precision, StripProducts(a).shapes,
              [&](auto engine) { Backward<decltype(engine)>(a, engine).run(); });
}

}  // namespace msformer::MSFORMER_VARIANT
