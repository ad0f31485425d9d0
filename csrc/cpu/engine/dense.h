// Products that all threads work on together, for images of few tokens: there a layer is a handful of matrix products
// with large weights, and one product after the other, each cut into tiles, reads every weight once and keeps all cores
// busy.
//
// Each value of a product is summed by one thread in an order that does not depend on how the product is cut, so
// results are the same on any number of threads.
#pragma once

#include "../base/norm.h"
#include "../base/tokens.h"
#include "products.h"

namespace msformer::MSFORMER_VARIANT {

constexpr std::int64_t kGroupTokens =
    1024;  // tokens of the images that are worked on at once, unless one image has more

template <class E>
using Value = typename E::Value;

template <class T>
inline Panels panels_of(std::int64_t n_padded) {
  return Panels(n_padded / kWidth<T>);
}

// All of C = start + A B.
template <class E>
void product(const E& engine, int num_threads, std::int64_t rows, std::int64_t k, std::int64_t n_padded,
             const typename E::Left& a, const typename E::Right& b, Start start, const Value<E>* bias,
             const Output<Value<E>>& c) {
  const Panels panels = panels_of<Value<E>>(n_padded);
  engine.product(num_threads, rows, {0, panels.count}, k, panels, a, b, start, bias, c);
}

// calls task(memory) with room for so many elements
template <class E, class Task>
void with_operand_memory(int num_threads, std::int64_t elements, const Task& task) {
  const std::size_t bytes = sizeof(typename E::Element) * static_cast<std::size_t>(elements);
  if (num_threads == 1) return task(static_cast<typename E::Element*>(operand_scratch(bytes)));
  Workspace memory(bytes);
  task(static_cast<typename E::Element*>(memory.data()));
}

// C = start + A B of values
template <class E>
void dense(const E& engine, int num_threads, std::int64_t rows, std::int64_t k, std::int64_t n_padded,
           const Operand<Value<E>>& a, const Matrix<Value<E>>& b, Start start, const Value<E>* bias,
           const Output<Value<E>>& c) {
  constexpr std::int64_t kLine = 64 / sizeof(typename E::Element);
  const std::int64_t left_size = (engine.left_size(rows, k) + kLine - 1) / kLine * kLine;
  with_operand_memory<E>(num_threads, left_size + engine.right_size(k, n_padded), [&](typename E::Element* memory) {
    product(engine, num_threads, rows, k, n_padded, engine.make_left(num_threads, memory, rows, k, a),
            engine.make_right(num_threads, memory + left_size, k, panels_of<Value<E>>(n_padded), b), start, bias, c);
  });
}

// C = start + A B, A row-major, B made before
template <class E>
void dense_rows(const E& engine, int num_threads, std::int64_t rows, std::int64_t k, std::int64_t n_padded,
                const Value<E>* a, std::int64_t lda, const typename E::Right& b, Start start, const Value<E>* bias,
                const Output<Value<E>>& c) {
  with_operand_memory<E>(num_threads, engine.left_size(rows, k), [&](typename E::Element* memory) {
    product(engine, num_threads, rows, k, n_padded, engine.make_left(num_threads, memory, rows, k, {a, lda, 1}), b,
            start, bias, c);
  });
}

// C [rows, n] (+)= A^T B, summed over tokens: A [tokens, rows], B made before
template <class E>
void dense_columns(const E& engine, int num_threads, std::int64_t rows, std::int64_t tokens, std::int64_t n_padded,
                   const Value<E>* a, std::int64_t lda, const typename E::Right& b, const Output<Value<E>>& c,
                   bool add) {
  with_operand_memory<E>(num_threads, engine.left_size(rows, tokens), [&](typename E::Element* memory) {
    product(engine, num_threads, rows, tokens, n_padded,
            engine.make_left(num_threads, memory, rows, tokens, {a, 1, lda}), b, add ? Start::output : Start::zero,
            nullptr, c);
  });
}

// C [rows, n] (+)= A B, summed over tokens: A made before, B [tokens, n]
template <class E>
void dense_right(const E& engine, int num_threads, std::int64_t rows, std::int64_t tokens, std::int64_t n_padded,
                 const typename E::Left& a, const Matrix<Value<E>>& b, const Output<Value<E>>& c, bool add) {
  with_operand_memory<E>(num_threads, engine.right_size(tokens, n_padded), [&](typename E::Element* memory) {
    product(engine, num_threads, rows, tokens, n_padded, a,
            engine.make_right(num_threads, memory, tokens, panels_of<Value<E>>(n_padded), b),
            add ? Start::output : Start::zero, nullptr, c);
  });
}

// Room for an operand that several products share: all of a group of images' tokens, as the left side, the same
// transposed, and as the right side of sums over tokens.
template <class E>
class SharedOperand {
  using Element = typename E::Element;

 public:
  SharedOperand(Arena& arena, std::int64_t size) : memory_(arena.take<Element>(size)) {}

  typename E::Left rows(const E& engine, int num_threads, std::int64_t tokens, std::int64_t k, const Value<E>* x,
                        std::int64_t leading) const {
    return engine.make_left(num_threads, memory_, tokens, k, {x, leading, 1});
  }
  typename E::Left columns(const E& engine, int num_threads, std::int64_t k, std::int64_t tokens, const Value<E>* x,
                           std::int64_t leading) const {
    return engine.make_left(num_threads, memory_, k, tokens, {x, 1, leading});
  }
  typename E::Right right(const E& engine, int num_threads, std::int64_t tokens, std::int64_t n_padded,
                          const Value<E>* x, std::int64_t leading) const {
    return engine.make_right(num_threads, memory_, tokens, panels_of<Value<E>>(n_padded), {x, leading});
  }

 private:
  Element* memory_;
};

inline std::int64_t token_blocks(std::int64_t tokens) { return (tokens + 15) / 16; }

// calls task(first token, tokens, block) for the blocks of tokens, in parallel
template <class Task>
inline void for_token_blocks(int num_threads, std::int64_t tokens, const Task& task) {
  const std::int64_t blocks = token_blocks(tokens);
  parallel_for(blocks, num_threads, 0, [&](std::int64_t i, void*) {
    const std::int64_t first = tokens * i / blocks;
    task(first, tokens * (i + 1) / blocks - first, i);
  });
}

// How many images are worked on at once.
inline std::int64_t images_at_once(std::int64_t images, std::int64_t tokens) {
  return max_of<std::int64_t>(1, min_of(images, kGroupTokens / max_of<std::int64_t>(1, tokens)));
}

// calls task(batch, token in the image, tokens, token in the group, block) for the token blocks of a group of images,
// cut where an image ends, in parallel over blocks
template <class Task>
void for_tokens_of_images(int num_threads, std::int64_t first_image, std::int64_t images, std::int64_t image_tokens,
                          const Task& task) {
  for_token_blocks(
      num_threads, images * image_tokens, [&](std::int64_t first, std::int64_t tokens, std::int64_t block) {
        for (std::int64_t t = first; t < first + tokens;) {
          const std::int64_t image = t / image_tokens, count = min_of(first + tokens, (image + 1) * image_tokens) - t;
          task(first_image + image, t - image * image_tokens, count, t, block);
          t += count;
        }
      });
}

// The norm of tokens, or none, with its parameters in whole vectors.
template <class T>
struct TokenNorm {
  T *weight, *bias;
  Norm<T> norm;
  TokenNorm(Arena& arena, std::int64_t channels)
      : weight(arena.take<T>(padded<T>(channels))), bias(arena.take<T>(padded<T>(channels))) {}
  void fill_in(const AffineParameters<const void*>& given, std::int64_t channels, double eps, bool centred = true) {
    if (given.weight)
      norm = {copy_padded(weight, given.weight, channels), copy_padded(bias, given.bias, channels), static_cast<T>(eps),
              centred};
  }
};

// Tokens of a group of images -> rows of whole vectors, after the norm; normalized and rstd may be null.
template <class T>
void load_images(int num_threads, const Activation& source, const Norm<T>& norm, std::int64_t first_image,
                 std::int64_t images, std::int64_t image_tokens, std::int64_t channels, T* x, T* normalized, T* rstd) {
  const std::int64_t width = padded<T>(channels);
  for_tokens_of_images(num_threads, first_image, images, image_tokens,
                       [&](std::int64_t batch, std::int64_t token, std::int64_t tokens, std::int64_t at, std::int64_t) {
                         T* rows = x + at * width;
                         load_tokens(source, batch, 0, token, tokens, channels, rows, width);
                         if (norm.weight)
                           layer_norm(norm, tokens, channels, rows, normalized ? normalized + at * width : rows, rows,
                                      width, rstd ? rstd + at : nullptr);
                       });
}

// Rows y, plus the residual unless null, -> tokens of a group of images. scratch: as large as y.
template <class T>
void store_images(int num_threads, const Activation& target, const Activation* residual, std::int64_t first_image,
                  std::int64_t images, std::int64_t image_tokens, std::int64_t channels, T* scratch, T* y) {
  const std::int64_t width = padded<T>(channels);
  for_tokens_of_images(num_threads, first_image, images, image_tokens,
                       [&](std::int64_t batch, std::int64_t token, std::int64_t tokens, std::int64_t at, std::int64_t) {
                         if (residual) {
                           load_tokens(*residual, batch, 0, token, tokens, channels, scratch + at * width, width);
                           add_rows(tokens, width, scratch + at * width, y + at * width);
                         }
                         store_tokens(target, batch, 0, token, tokens, channels, y + at * width, width);
                       });
}

// The gradient of normed tokens, grad_x, through the norm, plus the residual's unless null, -> tokens of a group of
// images; the gradients of the norm's parameters are added to. partials: 2 widths a token block.
template <class T>
void store_image_gradients(int num_threads, const Activation& target, const Norm<T>& norm, const T* residual,
                           std::int64_t first_image, std::int64_t images, std::int64_t image_tokens,
                           std::int64_t channels, const T* normalized, const T* rstd, T* grad_x, T* partials,
                           T* grad_weight, T* grad_bias) {
  const std::int64_t width = padded<T>(channels), blocks = token_blocks(images * image_tokens);
  fill(partials, blocks * 2 * width, T(0));
  for_tokens_of_images(
      num_threads, first_image, images, image_tokens,
      [&](std::int64_t batch, std::int64_t token, std::int64_t tokens, std::int64_t at, std::int64_t block) {
        T *grad = grad_x + at * width, *partial = partials + block * 2 * width;
        if (norm.weight)
          layer_norm_backward(norm, tokens, channels, normalized + at * width, rstd + at, grad, width, partial,
                              partial + width);
        if (residual) add_rows(tokens, width, residual + at * width, grad);
        store_tokens(target, batch, 0, token, tokens, channels, grad, width);
      });
  add_column_sums(blocks, width, partials, 2 * width, grad_weight);
  add_column_sums(blocks, width, partials + width, 2 * width, grad_bias);
}

// whether the rows of a user's matrix are whole vectors, so that products may work on it where it lies
template <class T>
inline bool has_whole_rows(const void* data, std::int64_t columns) {
  return columns % kWidth<T> == 0 && reinterpret_cast<std::uintptr_t>(data) % 64 == 0;
}

// A weight [k, n] as the right-hand side of products: where it lies if they take it so, else packed.
template <class E>
class RightSide {
  using T = Value<E>;

 public:
  RightSide(Arena& arena, const E& engine, const WeightMatrix& source, std::int64_t k, std::int64_t n)
      : engine_(engine),
        source_(source),
        k_(k),
        n_(n),
        in_place_(std::is_same<E, Values<T>>::value && source.dtype != DType::bfloat16 &&
                  has_whole_rows<T>(source.data, n)),
        packed_(in_place_ ? nullptr : arena.take<typename E::Element>(engine.packed_size(k, padded<T>(n)))) {}

  void fill_in(int num_threads) const {
    if (!in_place_) pack(engine_, num_threads, packed_, source_, n_, 1, k_, n_);
  }

  typename E::Right operand() const {
    if constexpr (std::is_same<E, Values<T>>::value)
      if (in_place_) return {static_cast<const T*>(source_.data), n_};
    return engine_.packed_right(packed_);
  }

 private:
  const E engine_;
  const WeightMatrix source_;
  const std::int64_t k_, n_;
  const bool in_place_;
  typename E::Element* packed_;
};

// A gradient [rows, columns] that products are summed into: the user's own memory where they may, else padded rows that
// are copied at the end.
template <class T>
class WeightGradient {
 public:
  WeightGradient(Arena& arena, void* target, DType dtype, std::int64_t rows, std::int64_t columns)
      : target_(target),
        dtype_(dtype),
        rows_(rows),
        columns_(columns),
        in_place_(dtype != DType::bfloat16 && has_whole_rows<T>(target, columns)),
        data_(in_place_ ? static_cast<T*>(target) : arena.take<T>(rows * padded<T>(columns))) {}
  T* data() const { return data_; }
  std::int64_t leading() const { return padded<T>(columns_); }

  void finish(int num_threads) const {
    if (in_place_) return;
    if constexpr (sizeof(T) == 4)
      if (dtype_ == DType::bfloat16) return copy_to(static_cast<BFloat16*>(target_), num_threads);
    copy_to(static_cast<T*>(target_), num_threads);
  }

 private:
  template <class S>
  void copy_to(S* target, int num_threads) const {
    constexpr std::int64_t kRows = 16;
    parallel_for((rows_ + kRows - 1) / kRows, num_threads, 0, [&](std::int64_t block, void*) {
      for (std::int64_t i = kRows * block; i < min_of(rows_, kRows * (block + 1)); ++i)
        store_row<T>(data_ + i * leading(), columns_, target + i * columns_);
    });
  }

  void* target_;
  DType dtype_;
  std::int64_t rows_, columns_;
  bool in_place_;
  T* data_;
};

}  // namespace msformer::MSFORMER_VARIANT
