// Operands of products on tiles: a float as the sum of one, two or three bfloat16 parts, each the rounding of what the
// ones before leave, so that three parts hold all of a float's bits. x y is then
//   1 part:  x1 y1                                                             (as a product of bfloat16 tensors)
//   2 parts: x1 y2 + x1 y1 + x2 y1                                             (what is left out is 2^-16 of it)
//   3 parts: x1 y3 + x1 y2 + x2 y2 + x2 y1 + x3 y1 + x1 y1                     (2^-24)
// in an order in which neighbours share an operand, so that few tiles are loaded.
//
// k is cut into steps of 32, the depth of a tile; a step has a tile for each part of each operand. The t < 32 values
// that are left share their tiles: the products above lie side by side along k, t (rounded up to pairs) of it each,
// the largest product last.
//
// The left operand is row-major, parts one after the other, then the shared tiles. The right one is a sequence of
// tiles for every 16 columns, in which a row holds pairs of neighbours along k: step by step, part by part, then the
// shared tiles.
#pragma once

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "../base/tokens.h"

namespace msformer::MSFORMER_VARIANT {

static_assert(kWidth<float> == 16, "a row of a tile of sums is a vector");

struct PartProduct {
  int left, right;
};

// the products of parts, in order
inline const PartProduct* part_products(int parts) {
  static constexpr PartProduct kOne[] = {{0, 0}}, kTwo[] = {{0, 1}, {0, 0}, {1, 0}},
                               kThree[] = {{0, 2}, {0, 1}, {1, 1}, {1, 0}, {2, 0}, {0, 0}};
  return parts == 1 ? kOne : parts == 2 ? kTwo : kThree;
}

struct PartLayout {
  static constexpr std::int64_t kStep = 32, kTile = 512;  // values along k, and in a tile

  int parts, products;
  std::int64_t k, steps, rest, rest_tiles;  // rest: values of k in a shared product, even

  PartLayout(int parts_, std::int64_t k_)
      : parts(parts_),
        products(parts_ * (parts_ + 1) / 2),
        k(k_),
        steps(k_ / kStep),
        rest((k_ % kStep + 1) / 2 * 2),
        rest_tiles((products * rest + kStep - 1) / kStep) {}

  std::int64_t leading() const { return steps * kStep; }            // of a part of the left operand
  std::int64_t rest_leading() const { return rest_tiles * kStep; }  // of its shared tiles
  std::int64_t left_size(std::int64_t rows) const { return rows * (parts * leading() + rest_leading()); }
  std::int64_t right_stride() const { return (steps * parts + rest_tiles) * kTile; }  // of 16 columns
  std::int64_t right_size(std::int64_t n_padded) const { return n_padded / 16 * right_stride(); }
  std::int64_t rest_tile(std::int64_t i) const { return (steps * parts + i) * kTile; }
  // of the pair of values i, i + 1 of a shared product, along k
  std::int64_t rest_place(int product, std::int64_t i) const { return product * rest + i; }
};

typedef Simd<float>::Bits PartBits;
typedef std::uint32_t AliasedBits __attribute__((vector_size(64), may_alias));

// a part in the upper half of each lane; subnormal numbers become zero
inline PartBits next_part(Vector<float> x) {
#ifdef __AVX512BF16__
  const __m512i wide = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
  return reinterpret_cast<PartBits>(_mm512_slli_epi32(wide, 16));
#else
  const PartBits bits = reinterpret_cast<PartBits>(x), magnitude = bits & 0x7fffffffu;
  const PartBits rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u;
  const PartBits quiet = (bits & 0xffff0000u) | 0x00400000u;
  const PartBits found = magnitude > 0x7f800000u ? quiet : rounded;
  return magnitude < 0x00800000u ? bits & 0x80000000u : found;
#endif
}

// calls take(part, bits) for the parts of x
template <class Take>
inline void for_parts(int parts, Vector<float> x, const Take& take) {
  for (int part = 0; part < parts; ++part) {
    const PartBits bits = next_part(x);
    take(part, bits);
    x -= reinterpret_cast<Vector<float>>(bits);
  }
}

inline void store_part(std::uint16_t* to, PartBits bits) {
  *reinterpret_cast<Simd<float>::Halves*>(to) = __builtin_convertvector(bits >> 16, Simd<float>::Halves);
}

// The left operand of `rows` rows, as it is filled in.
class LeftParts {
 public:
  LeftParts(const PartLayout& layout, std::int64_t rows, std::uint16_t* data)
      : layout_(layout), rows_(rows), data_(data) {}

  // row `row` from a row of values
  void fill_row(std::int64_t row, const float* from) const {
    for (std::int64_t c = 0; c < layout_.leading(); c += 16) store_values(row, c, load_unaligned(from + c));
    if (!layout_.rest) return;
    alignas(64) float rest[PartLayout::kStep] = {};
    std::memcpy(rest, from + layout_.leading(),
                sizeof(float) * static_cast<std::size_t>(layout_.k - layout_.leading()));
    fill_rest(row, rest);
  }

  // up to 16 rows from `row` on, from a matrix whose rows lie side by side: value (row, k) is from[row + k * apart]
  void fill_rows(std::int64_t row, const float* from, std::int64_t apart) const {
    const int count = static_cast<int>(min_of<std::int64_t>(16, rows_ - row));
    Vector<float> square[16];
    for (std::int64_t c = 0; c < layout_.leading(); c += 16) {
      turn(square, from + row + c * apart, apart, 16);
      for (int i = 0; i < count; ++i) store_values(row + i, c, square[i]);
    }
    if (!layout_.rest) return;
    alignas(64) float rest[16][PartLayout::kStep];
    for (std::int64_t c = 0; c < PartLayout::kStep; c += 16) {
      const std::int64_t at = layout_.leading() + c;
      turn(square, from + row + at * apart, apart, layout_.k - at);
      for (int i = 0; i < 16; ++i) store(rest[i] + c, square[i]);
    }
    for (int i = 0; i < count; ++i) fill_rest(row + i, rest[i]);
  }

  const std::uint16_t* part(int part, std::int64_t row) const {
    return data_ + (part * rows_ + row) * layout_.leading();
  }
  const std::uint16_t* rest(std::int64_t row) const {
    return data_ + layout_.parts * rows_ * layout_.leading() + row * layout_.rest_leading();
  }

 private:
  static void turn(Vector<float>* square, const float* from, std::int64_t apart, std::int64_t count) {
    for (std::int64_t i = 0; i < 16; ++i) square[i] = i < count ? load_unaligned(from + i * apart) : Vector<float>{};
    transpose<float>(square);
  }

  void store_values(std::int64_t row, std::int64_t column, Vector<float> x) const {
    std::uint16_t* to = data_ + row * layout_.leading() + column;
    for_parts(layout_.parts, x,
              [&](int part, PartBits bits) { store_part(to + part * rows_ * layout_.leading(), bits); });
  }

  void fill_rest(std::int64_t row, const float* from) const {
    std::uint16_t parts[3][PartLayout::kStep];
    for (std::int64_t c = 0; c < PartLayout::kStep; c += 16)
      for_parts(layout_.parts, load(from + c), [&](int part, PartBits bits) { store_part(parts[part] + c, bits); });
    std::uint16_t* to = const_cast<std::uint16_t*>(rest(row));
    const std::int64_t used = layout_.products * layout_.rest;
    for (int i = 0; i < layout_.products; ++i)
      std::memcpy(to + layout_.rest_place(i, 0), parts[part_products(layout_.parts)[i].left],
                  2 * static_cast<std::size_t>(layout_.rest));
    std::memset(to + used, 0, 2 * static_cast<std::size_t>(layout_.rest_leading() - used));
  }

  const PartLayout layout_;
  const std::int64_t rows_;
  std::uint16_t* data_;
};

// 16 columns of the right operand, from rows of values `apart` values from each other.
inline void fill_right(const PartLayout& layout, const float* from, std::int64_t apart, std::uint16_t* to) {
  const auto pair = [&](std::int64_t k, const auto& take) {  // of the values k and k + 1
    PartBits low[3], high[3];
    for_parts(layout.parts, load_unaligned(from + k * apart), [&](int part, PartBits bits) { low[part] = bits >> 16; });
    for_parts(layout.parts, k + 1 < layout.k ? load_unaligned(from + (k + 1) * apart) : Vector<float>{},
              [&](int part, PartBits bits) { high[part] = bits; });
    for (int part = 0; part < layout.parts; ++part) take(part, low[part] | high[part]);
  };
  const auto store_pairs = [&](std::uint16_t* row, PartBits pairs) { *reinterpret_cast<AliasedBits*>(row) = pairs; };
  for (std::int64_t k = 0; k < layout.leading(); k += 2)
    pair(k, [&](int part, PartBits pairs) {
      store_pairs(to + (k / PartLayout::kStep * layout.parts + part) * PartLayout::kTile + k % PartLayout::kStep * 16,
                  pairs);
    });
  std::uint16_t* rest = to + layout.rest_tile(0);
  for (std::int64_t i = 0; i < layout.rest; i += 2)
    pair(layout.leading() + i, [&](int part, PartBits pairs) {
      for (int product = 0; product < layout.products; ++product)
        if (part_products(layout.parts)[product].right == part)
          store_pairs(rest + layout.rest_place(product, i) * 16, pairs);
    });
  for (std::int64_t i = layout.products * layout.rest; i < layout.rest_leading(); i += 2)
    store_pairs(rest + i * 16, PartBits{});
}

}  // namespace msformer::MSFORMER_VARIANT
