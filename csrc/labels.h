// Repeated labels: pairs that share one are each other's positives. The mean over them takes the
// diagonal's place: ce_i = lse_i - mean s_ij = (lse_i - d_i) - mean (s_ij - d_i), d_i = s_ii.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fasterase {

// The labels of one group; `shares` is empty where all are distinct, and nothing is computed then.
template <typename T>
struct Labels {
  const int64_t* keys = nullptr;  // [n]
  std::vector<T> shares;          // [n] 1 / how many pairs have the label of a pair

  Labels() = default;
  Labels(const int64_t* keys, int64_t n) : keys(keys) {
    std::vector<int64_t> sorted(keys, keys + n);
    std::sort(sorted.begin(), sorted.end());
    if (std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end()) return;
    shares.resize(n);
    for (int64_t i = 0; i < n; ++i) {
      const auto same = std::equal_range(sorted.begin(), sorted.end(), keys[i]);
      shares[i] = T(1) / T(same.second - same.first);
    }
  }

  bool repeat() const { return !shares.empty(); }
  bool repeats(int64_t i) const { return repeat() && shares[i] < 1; }
};

// Adds s - d over the positives in a row of a tile, beside the diagonal, at `skipped`: returns the
// row's sum, where d is the row's, and adds to the columns', where it is theirs.
template <typename T>
[[gnu::noinline]] T add_gaps(const T* s, const int64_t* keys, int64_t key, int64_t skipped, T d,
                             const T* col_d, T* col_gaps, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    const bool is_positive = keys[j] == key && j != skipped;
    sum += is_positive ? s[j] - d : T(0);
    col_gaps[j] += is_positive ? s[j] - col_d[j] : T(0);
  }
  return sum;
}

// g -= row factor + column factors, over the same elements.
template <typename T>
[[gnu::noinline]] void subtract_positives(T* g, const int64_t* keys, int64_t key, int64_t skipped,
                                          T row_factor, const T* col_factors, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const bool is_positive = keys[j] == key && j != skipped;
    g[j] -= is_positive ? row_factor + col_factors[j] : T(0);
  }
}

}  // namespace fasterase
