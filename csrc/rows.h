// Elementwise work on one row of a tile, in loops that compilers vectorise.
//
// Nothing here may be compiled with -fassociative-math: exp splits its argument by sums whose order
// matters. Where a sum may be reordered, the loop says so (omp simd reduction).
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

namespace fasterase {

template <typename T>
struct Exp;

template <>
struct Exp<float> {
  using Bits = uint32_t;
  static constexpr int mantissa = 23, degree = 7;
  static constexpr float lowest = -87.3f, highest = 88.0f;
  static constexpr float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
  static constexpr float round = 0x1.8p23f;  // added and taken off again: rounds to an integer
};

template <>
struct Exp<double> {
  using Bits = uint64_t;
  static constexpr int mantissa = 52, degree = 13;
  static constexpr double lowest = -708.3, highest = 709.0;
  static constexpr double ln2_high = 0x1.62e42feep-1, ln2_low = 0x1.a39ef35793c76p-33;
  static constexpr double round = 0x1.8p52;
};

template <typename To, typename From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

constexpr double inverse_factorial(int k) { return k < 2 ? 1.0 : inverse_factorial(k - 1) / k; }

// exp to about one unit in the last place; 0 below the smallest normal number, NaN of NaN.
//
// libm's own vector expf is out of reach without -ffast-math, which would also turn on
// flush-to-zero for the whole process. exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln(2) / 2,
// exp(r) by its Taylor series (remainder 5e-9 in float, 4e-18 in double).
template <typename T>
inline T exp(T x) {
  using E = Exp<T>;
  using Bits = typename E::Bits;
  constexpr T log2e = T(1.442695040888963407);
  T inside = x < E::lowest ? E::lowest : x;
  inside = inside > E::highest ? E::highest : inside;
  const T rounded = inside * log2e + E::round;
  const T n = rounded - E::round;
  const T r = (inside - n * E::ln2_high) - n * E::ln2_low;
  T series = T(inverse_factorial(E::degree));
#pragma GCC unroll 16
  for (int k = E::degree - 1; k >= 0; --k) series = series * r + T(inverse_factorial(k));
  const Bits power = (bit_cast<Bits>(rounded) << E::mantissa) + bit_cast<Bits>(T(1));
  T value = series * bit_cast<T>(power);
  value = x < E::lowest ? T(0) : value;
  return x > E::highest ? std::numeric_limits<T>::infinity() : value;
}

// out = exp(s - shift); out may be s.
template <typename T>
inline void exp_row(const T* s, T shift, T* out, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) out[j] = exp(s[j] - shift);
}

template <typename T>
inline void exp_row(const T* s, const T* shift, T* out, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) out[j] = exp(s[j] - shift[j]);
}

template <typename T>
inline T sum_row(const T* x, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += x[j];
  return sum;
}

template <typename T>
inline T dot_row(const T* x, const T* y, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += x[j] * y[j];
  return sum;
}

template <typename T>
inline void add_row(const T* x, T* to, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) to[j] += x[j];
}

template <typename T>
inline void add_product_row(const T* x, const T* y, T* to, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) to[j] += x[j] * y[j];
}

template <typename T>
inline void subtract_row(const T* x, const T* y, T* out, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) out[j] = x[j] - y[j];
}

// The larger of two; a NaN in x is passed over.
template <typename T>
inline void max_row(const T* x, T* to, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) to[j] = x[j] > to[j] ? x[j] : to[j];
}

template <typename T>
inline T max_of_row(const T* x, T most, int64_t n) {
#pragma omp simd reduction(max : most)
  for (int64_t j = 0; j < n; ++j) most = x[j] > most ? x[j] : most;
  return most;
}

}  // namespace fasterase
