// Blocks of tokens on their way between the user's tensors (any strides; float32, float64, bfloat16, float16) and
// scratch memory (row-major, arithmetic type, rows padded with zeros to whole vectors); and how tokens are cut into
// blocks.
#pragma once

#include <type_traits>

#include "../../abi.h"
#include "convert.h"

namespace msformer::MSFORMER_VARIANT {

// calls visit with a pointer to the activation's element type, at (batch, head, token)
template <class Visit>
inline void visit_elements(const Activation& x, std::int64_t batch, std::int64_t head, std::int64_t token,
                           Visit visit) {
  const std::int64_t offset = batch * x.batch_stride + head * x.head_stride + token * x.token_stride;
  switch (x.dtype) {
    case DType::float32:
      visit(static_cast<float*>(x.data) + offset);
      break;
    case DType::float64:
      visit(static_cast<double*>(x.data) + offset);
      break;
    case DType::bfloat16:
      visit(static_cast<BFloat16*>(x.data) + offset);
      break;
    case DType::float16:
      visit(static_cast<Float16*>(x.data) + offset);
      break;
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

// a vector of neighbouring values
template <class T, class S>
inline Vector<T> load_values(const S* p) {
  if constexpr (sizeof(T) == sizeof(S)) {
    return load_unaligned(reinterpret_cast<const T*>(p));
  } else if constexpr (sizeof(T) == 4 && std::is_same<S, BFloat16>::value) {
    return load_bfloat16(p);
  } else {
    alignas(64) T values[kWidth<T>];
    for (int i = 0; i < kWidth<T>; ++i) values[i] = convert<T>(p[i]);
    return load(values);
  }
}
template <class T, class S>
inline void store_values(S* p, Vector<T> x) {
  if constexpr (sizeof(T) == sizeof(S)) {
    store_unaligned(reinterpret_cast<T*>(p), x);
  } else if constexpr (sizeof(T) == 4 && std::is_same<S, BFloat16>::value) {
    store_bfloat16(p, x);
  } else {
    for (int i = 0; i < kWidth<T>; ++i) assign(p[i], x[i]);
  }
}

// whether load_values and store_values are a few instructions, not one for each value
template <class T, class S>
constexpr bool kConvertsVectors = sizeof(T) == sizeof(S) || (sizeof(T) == 4 && std::is_same<S, BFloat16>::value);

// row of values -> out, in whole vectors: a value of the same type is copied, the end of the last vector becomes zero
template <class T, class S>
inline void load_row(const S* source, std::int64_t channels, T* out, std::int64_t leading) {
  constexpr std::int64_t W = kWidth<T>;
  const std::int64_t whole = channels / W * W;
  for (std::int64_t c = 0; c < whole; c += W) store(out + c, load_values<T>(source + c));
  if (kConvertsVectors<T, S> && whole && whole < channels) {  // a vector that ends where the row does
    for (std::int64_t c = whole; c < leading; c += W) store(out + c, Vector<T>{});
    return store_unaligned(out + channels - W, load_values<T>(source + channels - W));
  }
  for (std::int64_t c = whole; c < leading; c += W) {
    alignas(64) T last[W] = {};
    for (std::int64_t i = 0; i < channels - c; ++i) last[i] = convert<T>(source[c + i]);
    store(out + c, load(last));
  }
}

// The same of tokens that lie side by side, as in images with channels first: squares of channels and tokens change
// places in registers.
template <class T, class S>
inline void load_columns(const S* source, std::int64_t by_channel, std::int64_t tokens, std::int64_t channels, T* out,
                         std::int64_t leading) {
  constexpr std::int64_t W = kWidth<T>;
  const std::int64_t whole = tokens / W * W;
  for (std::int64_t c = 0; c < leading; c += W) {
    const std::int64_t count = min_of<std::int64_t>(W, channels - c);
    for (std::int64_t i = 0; i < whole; i += W) {
      Vector<T> square[W];
      for (std::int64_t k = 0; k < W; ++k)
        square[k] = k < count ? load_values<T>(source + i + (c + k) * by_channel) : Vector<T>{};
      transpose<T>(square);
      for (std::int64_t k = 0; k < W; ++k) store(out + (i + k) * leading + c, square[k]);
    }
    for (std::int64_t i = whole; i < tokens; ++i)
      for (std::int64_t k = 0; k < W; ++k)
        out[i * leading + c + k] = k < count ? convert<T>(source[i + (c + k) * by_channel]) : T(0);
  }
}

template <class T, class S>
inline void store_columns(const T* in, std::int64_t leading, std::int64_t tokens, std::int64_t channels, S* target,
                          std::int64_t by_channel) {
  constexpr std::int64_t W = kWidth<T>;
  const std::int64_t whole = tokens / W * W;
  for (std::int64_t c = 0; c < channels; c += W) {
    const std::int64_t count = min_of<std::int64_t>(W, channels - c);
    for (std::int64_t i = 0; i < whole; i += W) {
      Vector<T> square[W];
      for (std::int64_t k = 0; k < W; ++k) square[k] = load(in + (i + k) * leading + c);
      transpose<T>(square);
      for (std::int64_t k = 0; k < count; ++k) store_values<T>(target + i + (c + k) * by_channel, square[k]);
    }
    for (std::int64_t i = whole; i < tokens; ++i)
      for (std::int64_t k = 0; k < count; ++k) assign(target[i + (c + k) * by_channel], in[i * leading + c + k]);
  }
}

// rows [tokens, channels] of one batch and head -> out [tokens, leading], padding zeroed
template <class T>
void load_tokens(const Activation& x, std::int64_t batch, std::int64_t head, std::int64_t token, std::int64_t tokens,
                 std::int64_t channels, T* out, std::int64_t leading) {
  visit_elements(x, batch, head, token, [&](const auto* source) {
    const std::int64_t by_token = x.token_stride, by_channel = x.channel_stride;
    if (by_channel == 1) {
      for (std::int64_t i = 0; i < tokens; ++i)
        load_row<T>(source + i * by_token, channels, out + i * leading, leading);
      return;
    }
    if (by_token == 1) {
      load_columns<T>(source, by_channel, tokens, channels, out, leading);
      return;
    }
    for (std::int64_t c = 0; c < channels; ++c)
      for (std::int64_t i = 0; i < tokens; ++i)
        out[i * leading + c] = convert<T>(source[i * by_token + c * by_channel]);
    for (std::int64_t i = 0; i < tokens; ++i)
      for (std::int64_t c = channels; c < leading; ++c) out[i * leading + c] = T(0);
  });
}

template <class T, class S>
inline void store_row(const T* in, std::int64_t channels, S* target) {
  constexpr std::int64_t W = kWidth<T>;
  std::int64_t c = 0;
  for (; c + W <= channels; c += W) store_values<T>(target + c, load(in + c));
  if (kConvertsVectors<T, S> && c && c < channels)  // as in load_row
    return store_values<T>(target + channels - W, load_unaligned(in + channels - W));
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
    if (x.token_stride == 1) {
      store_columns<T>(in, leading, tokens, channels, target, x.channel_stride);
      return;
    }
    for (std::int64_t i = 0; i < tokens; ++i)
      for (std::int64_t c = 0; c < channels; ++c)
        assign(target[i * x.token_stride + c * x.channel_stride], in[i * leading + c]);
  });
}

// The weight of a linear layer, contiguous, of the arithmetic type or of bfloat16.
struct WeightMatrix {
  const void* data;
  DType dtype;

  // calls visit with a pointer to its values
  template <class T, class Visit>
  void visit(const Visit& visit_values) const {
    if constexpr (sizeof(T) == 4)
      if (dtype == DType::bfloat16) return visit_values(static_cast<const BFloat16*>(data));
    visit_values(static_cast<const T*>(data));
  }
};

// out [padded(count)] = source, or zeros when it is null; zero padding
template <class T>
inline const T* copy_padded(T* out, const void* source, std::int64_t count) {
  const std::int64_t given = source ? count : 0;
  if (given) std::memcpy(out, source, sizeof(T) * static_cast<std::size_t>(given));
  for (std::int64_t i = given; i < padded<T>(count); ++i) out[i] = T(0);
  return out;
}

// How tokens are cut into chunks, and chunks into blocks: by the shape alone, never by the number of threads. Chunks
// are nearly equal, and so are the blocks of one chunk.
struct Split {
  std::int64_t count, size;
};

constexpr std::int64_t kBlockTokens = 96;  // the most that one step of a kernel holds in scratch

inline Split split_tokens(std::int64_t tokens, std::int64_t images) {
  const std::int64_t wanted = max_of<std::int64_t>(1, 64 / max_of<std::int64_t>(1, images));
  const std::int64_t few = min_of<std::int64_t>(8, tokens / 24);  // small chunks, rather than leave cores idle
  const std::int64_t blocks = (tokens + kBlockTokens - 1) / kBlockTokens;
  const std::int64_t count = max_of<std::int64_t>(1, min_of(wanted, max_of(few, blocks)));
  const std::int64_t size = max_of<std::int64_t>(1, (tokens + count - 1) / count);
  return {max_of<std::int64_t>(1, (tokens + size - 1) / size), size};
}

// calls task(first token, tokens) for the blocks of [first, last), each of at most so many tokens
template <class Task>
inline void for_blocks_of(std::int64_t first, std::int64_t last, const Task& task, std::int64_t most = kBlockTokens) {
  const std::int64_t blocks = (last - first + most - 1) / most;
  for (std::int64_t i = 0; i < blocks; ++i) {
    const std::int64_t begin = first + (last - first) * i / blocks, end = first + (last - first) * (i + 1) / blocks;
    task(begin, end - begin);
  }
}

}  // namespace msformer::MSFORMER_VARIANT
