// Elementwise work on one row of a tile, in loops that compilers vectorise.
//
// Do not compile this with -fassociative-math: exp splits its argument by sums whose order matters.
// Loops whose sums may be reordered say so (omp simd reduction).
#pragma once

#include <algorithm>
#include <cmath>
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
  static constexpr float lowest = -127 * 0.693147f, highest = 128 * 0.693147f;
  static constexpr float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
  static constexpr float round = 0x1.8p23f;  // adding and subtracting it rounds to an integer
};

template <>
struct Exp<double> {
  using Bits = uint64_t;
  static constexpr int mantissa = 52, degree = 13;
  static constexpr double lowest = -1023 * 0.693147, highest = 1024 * 0.693147;
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

// exp to about one unit in the last place; 0 below 2^-126.5 (2^-1022.5), infinite above 2^127.5
// (2^1023.5), NaN of NaN.
//
// libm's own vector expf needs -ffast-math, which would also turn on flush-to-zero for the whole
// process. exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln(2) / 2,
// exp(r) by its Taylor series (remainder 5e-9 in float, 4e-18 in double). At the ends of the range
// of n the bits of 2^n are those of 0 and of infinity, so no branch is needed. A branch, or a call
// that is not inlined, would prevent the vectorisation of the loops around it.
template <typename T>
[[gnu::always_inline]] inline T exp(T x) {
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
  return series * bit_cast<T>(power);
}

// The exps of one row of logits: exp(s - shift) for the row's direction and for the columns'; both
// are the same number if a matrix has one shift.
template <bool is_shared, typename T>
struct Exponentials {
  const T* s;
  T row_shift;
  const T* col_shift;

  [[gnu::always_inline]] T row(int64_t j) const { return exp(s[j] - row_shift); }
  [[gnu::always_inline]] T col(int64_t j, T row) const {
    return is_shared ? row : exp(s[j] - col_shift[j]);
  }
};

// The loops over exps are not inlined: inside a tile's code GCC fails to vectorise some of them.

// Adds the exps to the columns' sums; returns the row's.
template <bool is_shared, typename T>
[[gnu::noinline]] T add_exps(Exponentials<is_shared, T> current, T* col_sums, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    const T row = current.row(j);
    sum += row;
    col_sums[j] += current.col(j, row);
  }
  return sum;
}

template <typename T>
struct RefSums {
  T exps, cross;
};

// The same for the original, and for its exps times s0 - s.
template <bool is_shared, typename T>
[[gnu::noinline]] RefSums<T> add_ref_exps(Exponentials<is_shared, T> original, const T* s,
                                          T* col_sums, T* col_cross, int64_t n) {
  T sum = 0, cross = 0;
#pragma omp simd reduction(+ : sum, cross)
  for (int64_t j = 0; j < n; ++j) {
    const T row = original.row(j), col = original.col(j, row), gap = original.s[j] - s[j];
    sum += row;
    cross += row * gap;
    col_sums[j] += col;
    col_cross[j] += col * gap;
  }
  return {sum, cross};
}

// g = row exps * row factor + column exps * column factors; `g` may overwrite the logits.
template <bool is_shared, typename T>
[[gnu::noinline]] void weigh_exps(Exponentials<is_shared, T> current, T row_factor,
                                  const T* col_factors, T* g, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const T row = current.row(j);
    g[j] = row * row_factor + current.col(j, row) * col_factors[j];
  }
}

template <bool is_shared, typename T>
[[gnu::noinline]] void subtract_weighed_exps(Exponentials<is_shared, T> original, T row_factor,
                                             const T* col_factors, T* g, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const T row = original.row(j);
    g[j] -= row * row_factor + original.col(j, row) * col_factors[j];
  }
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

// Elementwise maximum; NaNs in x are ignored.
template <typename T>
inline void max_row(const T* x, T* to, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) to[j] = x[j] > to[j] ? x[j] : to[j];
}

// The largest finite magnitude, 0 if there is none.
template <typename T>
inline T largest_finite(const T* x, int64_t n) {
  T largest = 0;
  for (int64_t j = 0; j < n; ++j) {
    if (std::isfinite(x[j])) largest = std::max(largest, std::abs(x[j]));
  }
  return largest;
}

template <typename T>
inline T max_of_row(const T* x, T most, int64_t n) {
#pragma omp simd reduction(max : most)
  for (int64_t j = 0; j < n; ++j) most = x[j] > most ? x[j] : most;
  return most;
}

}  // namespace fasterase
