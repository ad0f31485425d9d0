// Vectors of the instruction set that this file is compiled for, through the compiler's vector types: no intrinsics, so
// the same sources give AVX-512, AVX2 and plain (SSE2, NEON) code. Arithmetic is done in float or double; bfloat16 and
// float16 exist in memory only (tokens.h), but for engines that multiply bfloat16 (engine/).
//
// Everything here lives in a namespace named after the instruction set, and uses nothing from the standard library that
// could be emitted as a shared inline function: otherwise the linker might hand AVX-512 code to a machine without it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

// The build names the variant: MSFORMER_VARIANT is its namespace, MSFORMER_VECTOR_BYTES its width (csrc/variants.py).
namespace msformer::MSFORMER_VARIANT {

template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float Vector __attribute__((vector_size(MSFORMER_VECTOR_BYTES)));
  typedef std::int32_t Integer __attribute__((vector_size(MSFORMER_VECTOR_BYTES)));
  typedef float Unaligned __attribute__((vector_size(MSFORMER_VECTOR_BYTES), aligned(4), may_alias));
  typedef std::uint32_t Bits __attribute__((vector_size(MSFORMER_VECTOR_BYTES)));
  typedef std::uint16_t Halves __attribute__((vector_size(MSFORMER_VECTOR_BYTES / 2), aligned(2), may_alias));
};

template <>
struct Simd<double> {
  typedef double Vector __attribute__((vector_size(MSFORMER_VECTOR_BYTES)));
  typedef std::int64_t Integer __attribute__((vector_size(MSFORMER_VECTOR_BYTES)));
  typedef double Unaligned __attribute__((vector_size(MSFORMER_VECTOR_BYTES), aligned(8), may_alias));
};

template <class T>
using Vector = typename Simd<T>::Vector;
template <class T>
constexpr int kWidth = MSFORMER_VECTOR_BYTES / static_cast<int>(sizeof(T));

// n rounded up to whole vectors
template <class T>
inline std::int64_t padded(std::int64_t n) {
  return (n + kWidth<T> - 1) / kWidth<T> * kWidth<T>;
}

template <class T>
inline Vector<T> load(const T* p) {
  return *reinterpret_cast<const Vector<T>*>(p);
}
template <class T>
inline Vector<T> load_unaligned(const T* p) {
  return *reinterpret_cast<const typename Simd<T>::Unaligned*>(p);
}
template <class T>
inline void store_unaligned(T* p, Vector<T> v) {
  *reinterpret_cast<typename Simd<T>::Unaligned*>(p) = v;
}
template <class T>
inline void store(T* p, Vector<T> v) {
  *reinterpret_cast<Vector<T>*>(p) = v;
}
template <class T>
constexpr T kInfinity = static_cast<T>(__builtin_inf());

// x in every lane; x - 0 is x for every x, which the compiler knows, so that nothing is calculated
template <class T>
inline Vector<T> splat(T x) {
  return x - Vector<T>{};
}

template <class T>
constexpr T max_of(T a, T b) {
  return a > b ? a : b;
}
template <class T>
constexpr T min_of(T a, T b) {
  return a < b ? a : b;
}

// a NaN in b never replaces a: maxima skip NaN, which then comes out through exp(NaN - max)
template <class T>
inline Vector<T> vmax(Vector<T> a, Vector<T> b) {
  return b > a ? b : a;
}

template <class T, int... I>
inline Vector<T> shuffle(Vector<T> a, Vector<T> b) {  // lanes I of a followed by b
#ifdef __clang__
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, typename Simd<T>::Integer{I...});
#endif
}

template <class T, int HALF, int... I>
inline Vector<T> exchange_lanes(Vector<T> v, std::integer_sequence<int, I...>) {  // lane i and lane i ^ HALF
  return shuffle<T, (I ^ HALF)...>(v, v);
}

template <class T, int HALF = kWidth<T> / 2>
inline T horizontal_sum(Vector<T> v) {
  v += exchange_lanes<T, HALF>(v, std::make_integer_sequence<int, kWidth<T>>());
  if constexpr (HALF > 1) return horizontal_sum<T, HALF / 2>(v);
  return v[0];
}

template <class T, int HALF = kWidth<T> / 2>
inline T horizontal_max(Vector<T> v) {
  v = vmax<T>(v, exchange_lanes<T, HALF>(v, std::make_integer_sequence<int, kWidth<T>>()));
  if constexpr (HALF > 1) return horizontal_max<T, HALF / 2>(v);
  return v[0];
}

template <class T, int HALF, int... I>
inline void exchange_halves(Vector<T>& a, Vector<T>& b, std::integer_sequence<int, I...>) {
  constexpr int W = kWidth<T>;
  const Vector<T> low = shuffle<T, (I & HALF ? I - HALF + W : I)...>(a, b);
  b = shuffle<T, (I & HALF ? I + W : I + HALF)...>(a, b);
  a = low;
}

// rows become columns: square blocks of HALF x HALF change places, then those within them
template <class T, int HALF = kWidth<T> / 2>
inline void transpose(Vector<T>* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < kWidth<T>; ++i)
    if (!(i & HALF)) exchange_halves<T, HALF>(rows[i], rows[i + HALF], std::make_integer_sequence<int, kWidth<T>>());
  if constexpr (HALF > 1) transpose<T, HALF / 2>(rows);
}

template <class T, int... I>
inline typename Simd<T>::Integer lane_numbers(std::integer_sequence<int, I...>) {
  return typename Simd<T>::Integer{I...};
}

// lanes below `count` keep their value, the rest become zero
template <class T>
inline Vector<T> keep_lanes(Vector<T> v, std::int64_t count) {
  const auto lanes = lane_numbers<T>(std::make_integer_sequence<int, kWidth<T>>());
  typename Simd<T>::Integer limit{};
  limit += static_cast<decltype(limit[0] + 0)>(count);
  return lanes < limit ? v : Vector<T>{};
}

// exp for arguments that are not far above 0 (up to 88): range reduction by ln 2 in two parts, degree-6 polynomial
// (S. L. Moshier, Cephes), within 2 ulp. Below -87.3 the result is 0, whatever the steps in between make of it; NaN
// stays NaN.
inline Vector<float> vexp_small(Vector<float> x) {
  typedef Simd<float>::Integer Integer;
  // adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits
  const Vector<float> magic = splat(12582912.0f);
  const Vector<float> shifted = x * 1.44269504088896341f + magic;
  const Integer power = (reinterpret_cast<Integer>(shifted) + 127) << 23;  // 2^n
  const Vector<float> n = shifted - magic;
  Vector<float> r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vector<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  p = p * reinterpret_cast<Vector<float>>(power);
  return x < -87.33654f ? Vector<float>{} : p;
}

// exp; arguments above 88, of double above 709, saturate: it is never infinite
inline Vector<float> vexp(Vector<float> x) { return vexp_small(x > 88.0f ? splat(88.0f) : x); }

inline Vector<double> vexp(Vector<double> x) {
  for (int i = 0; i < kWidth<double>; ++i) x[i] = __builtin_exp(x[i] > 709.0 ? 709.0 : x[i]);
  return x;
}

inline Vector<double> vexp_small(Vector<double> x) { return vexp(x); }

inline Vector<float> vabs(Vector<float> x) {
  typedef Simd<float>::Integer Integer;
  return reinterpret_cast<Vector<float>>(reinterpret_cast<Integer>(x) & 0x7fffffff);
}

// The normal distribution at x: cdf = (1 + erf(x / sqrt 2)) / 2 and pdf = exp(-x^2 / 2) / sqrt(2 pi).
// float: the lower tail is exp(-x^2 / 2) * t P(t) with t = 1 / (1 + 0.21 |x|); P is a degree-8 minimax fit of the
// scaled complementary error function for |x| <= 13.5, relative error 1.4e-8, so that small tails keep their digits.
inline void normal_distribution(Vector<float> x, Vector<float>& cdf, Vector<float>& pdf) {
  const Vector<float> t = 1.0f / (vabs(x) * 0.21f + 1.0f);
  const Vector<float> e = vexp_small(x * x * -0.5f);
  Vector<float> p = t * -0.0720338448882103f + 0.2854527533054352f;
  p = p * t - 0.3341883718967438f;
  p = p * t + 0.3540322184562683f;
  p = p * t - 0.0972447395324707f;
  p = p * t + 0.12635473906993866f;
  p = p * t + 0.06879014521837234f;
  p = p * t + 0.08512939512729645f;
  p = p * t + 0.08370770514011383f;
  const Vector<float> tail = p * t * e;
  cdf = x < 0.0f ? tail : 1.0f - tail;
  pdf = e * 0.3989422804014327f;
}

// 2^x, within 2.6e-6 of itself; below -126 the result is 0, NaN stays NaN. No x above 127.
inline Vector<float> rough_exp2(Vector<float> x) {
  typedef Simd<float>::Integer Integer;
  // as in vexp_small; 127 more, so that the low bits are the exponent of 2^n
  const Vector<float> magic = splat(12583039.0f), shifted = x + magic, r = x - (shifted - magic);
  Vector<float> p = r * 0.00957010895f + 0.0559178816f;
  p = p * r + 0.240247449f;
  p = p * r + 0.693121812f;
  p = p * r + 0.999999261f;
  p = p * reinterpret_cast<Vector<float>>(reinterpret_cast<Integer>(shifted) << 23);
  return x < -126.0f ? Vector<float>{} : p;
}

// The same for values that are rounded to bfloat16 next, without a division: the lower tail is 2^L(|x|), and the pdf is
// that tail times H(|x|), the hazard rate. L and H are minimax fits up to |x| = 14, beyond which floats have no tail.
// cdf and x cdf are within 3e-6, the tail within 0.1 % of itself; pdf and x pdf are within 6e-6.
inline void rough_normal_distribution(Vector<float> x, Vector<float>& cdf, Vector<float>& pdf) {
  const Vector<float> size = vabs(x), y = size > 14.0f ? splat(14.0f) : size;
  Vector<float> l = y * 3.83190218e-8f - 2.33907365e-6f;
  l = l * y + 6.07635493e-5f;
  l = l * y - 8.89587221e-4f;
  l = l * y + 8.28347258e-3f;
  l = l * y - 5.34774094e-2f;
  l = l * y - 4.58899187e-1f;
  l = l * y - 1.15111066f;
  l = l * y - 1.00000367f;
  const Vector<float> tail = rough_exp2(l);
  Vector<float> h = y * 3.99715241e-6f - 1.64511041e-4f;
  h = h * y + 2.643717e-3f;
  h = h * y - 2.20470783e-2f;
  h = h * y + 1.10425208e-1f;
  h = h * y + 6.36373309e-1f;
  h = h * y + 7.97891052e-1f;
  cdf = x < 0.0f ? tail : 1.0f - tail;
  pdf = tail * h;
}

inline void normal_distribution(Vector<double> x, Vector<double>& cdf, Vector<double>& pdf) {
  for (int i = 0; i < kWidth<double>; ++i) {
    cdf[i] = 0.5 * __builtin_erfc(x[i] * -0.70710678118654752440);
    pdf[i] = 0.3989422804014326779 * __builtin_exp(x[i] * x[i] * -0.5);
  }
}
inline void rough_normal_distribution(Vector<double> x, Vector<double>& cdf, Vector<double>& pdf) {
  normal_distribution(x, cdf, pdf);
}

}  // namespace msformer::MSFORMER_VARIANT
