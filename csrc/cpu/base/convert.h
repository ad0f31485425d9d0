// The types that tokens have in memory, and their way to and from float: bfloat16 and float16 round to nearest, ties to
// even.
#pragma once

#include "vectors.h"

namespace msformer::MSFORMER_VARIANT {

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float to_float(BFloat16 x) { return bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16); }

// the product with 2^112 moves the exponent bias and turns float16 subnormals into normal floats
inline float to_float(Float16 x) {
  const std::uint32_t magnitude = x.bits & 0x7fffu;
  std::uint32_t bits = bit_cast<std::uint32_t>(bit_cast<float>(magnitude << 13) * bit_cast<float>(0x77800000u));
  bits |= magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return bit_cast<float>(bits | static_cast<std::uint32_t>(x.bits & 0x8000u) << 16);
}

// round to nearest, ties to even
inline BFloat16 to_bfloat16(float x) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(x);
  const std::uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return {static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
}

inline Float16 to_float16(float x) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(x), magnitude = bits & 0x7fffffffu;
  // below 2^-14: adding 0.5 lets the float unit round to multiples of 2^-24
  const std::uint32_t subnormal = bit_cast<std::uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const std::uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  const std::uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const std::uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  return {static_cast<std::uint16_t>((magnitude >= 0x477ff000u ? special : finite) | (bits >> 16 & 0x8000u))};
}

template <class T>
inline T convert(float x) {
  return static_cast<T>(x);
}
template <class T>
inline T convert(double x) {
  return static_cast<T>(x);
}
template <class T>
inline T convert(BFloat16 x) {
  return static_cast<T>(to_float(x));
}
template <class T>
inline T convert(Float16 x) {
  return static_cast<T>(to_float(x));
}
template <class T>
inline void assign(float& to, T x) {
  to = static_cast<float>(x);
}
template <class T>
inline void assign(double& to, T x) {
  to = static_cast<double>(x);
}
template <class T>
inline void assign(BFloat16& to, T x) {
  to = to_bfloat16(static_cast<float>(x));
}
template <class T>
inline void assign(Float16& to, T x) {
  to = to_float16(static_cast<float>(x));
}

}  // namespace msformer::MSFORMER_VARIANT
