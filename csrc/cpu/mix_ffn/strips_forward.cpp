// MixFFN and MixFFN-skip, forward: Y = act([LN](dw(U) + b_d [+ U])) W_2 + b_2 [+ x], U = [LN](x) W_1 + b_1.
// Per image row of a piece: one new row of U, the convolution of the row above it, the hidden norm and activation in
// place, and the second product straight to the output (SegFormer, Xie et al. 2021; MS-Former, 2023 for the skip form).
#include "mix_ffn.h"

namespace msformer::MSFORMER_VARIANT {
namespace {

template <class E>
struct Forward : MixFFN<E> {
  using Base = MixFFN<E>;
  using T = typename E::Value;
  using Element = typename E::Element;
  using Weights = typename Base::Weights;
  using Base::a, Base::channels, Base::hidden, Base::width, Base::hidden_width, Base::strip_columns;
  using Base::kernel_size, Base::radius, Base::activated;

  Forward(const MixFFNArguments& arguments, const E& engine) : Base(arguments, engine) {}

  struct Rows {
    T *x, *z, *y;
    RowRing<T> u;
    Rows(Arena& arena, const Forward& f) {
      const std::int64_t with_halo = f.strip_columns + 2 * f.radius;
      x = arena.take<T>(with_halo * f.width);
      u = f.take_ring(arena, with_halo);
      z = arena.take<T>(f.strip_columns * f.hidden_width);
      y = arena.take<T>(f.strip_columns * f.width);
    }
  };

  void walk(const Weights& w, const Element* fc2, const T* fc2_bias, const typename Base::Piece& p, Rows& s) const {
    const std::int64_t columns = p.column_end - p.column_begin;
    for (std::int64_t row = p.row_begin - radius; row < p.row_end + radius; ++row) {
      this->hidden_row(w, p.batch, row, p.column_begin - radius, p.column_end + radius, s.x, s.u.at(row), nullptr);
      const std::int64_t center = row - radius;
      if (center < p.row_begin) continue;
      depthwise<T, false>(kernel_size, s.u.around(center), w.taps, w.dw_bias, columns, hidden_width, s.z);
      this->normalize_and_activate(w.hidden_norm, columns, s.z);
      multiply(this->engine, columns, activated, width, s.z, hidden_width, fc2, s.y, width, fc2_bias);
      const std::int64_t token = center * a.width + p.column_begin;
      if (a.residual) {
        load_tokens(a.x, p.batch, 0, token, columns, channels, s.x, width);
        add_rows(columns, width, s.x, s.y);
      }
      store_tokens(a.output, p.batch, 0, token, columns, channels, s.y, width);
    }
  }

  void run() const {
    Arena counter(nullptr), row_counter(nullptr);
    Weights(counter, *this);
    counter.take<Element>(this->engine.packed_size(activated, width));
    counter.take<T>(width);
    Rows(row_counter, *this);
    Workspace memory(counter.used());
    Arena arena(memory.data());
    Weights w(arena, *this);
    w.fill_in(*this);
    Element* fc2 = arena.take<Element>(this->engine.packed_size(activated, width));
    T* fc2_bias = arena.take<T>(width);
    pack(this->engine, a.num_threads, fc2, static_cast<const T*>(a.parameters.fc2_weight), 1, activated, activated,
         channels);
    copy_padded(fc2_bias, a.parameters.fc2_bias, channels);
    parallel_for(this->pieces, a.num_threads, row_counter.used(), [&](std::int64_t i, void* scratch) {
      Arena rows_arena(scratch);
      Rows rows(rows_arena, *this);
      walk(w, fc2, fc2_bias, this->piece(i), rows);
    });
  }
};

}  // namespace

void mix_ffn_forward(const MixFFNArguments& a) {
  if (mix_ffn_fits_whole(a)) return mix_ffn_whole_forward(a);
  with_engine(a.x.dtype, a.precision, StripProducts(a).shapes,
              [&](auto engine) { Forward<decltype(engine)>(a, engine).run(); });
}

}  // namespace msformer::MSFORMER_VARIANT
