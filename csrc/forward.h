// Losses of one group: sums over its tiles, with a shift that loses nothing, and losses from them.
#pragma once

#include "group.h"

namespace fasterase {

// The diagonal of S, [n], and an upper bound of |S|.
template <typename T>
struct Diagonal {
  std::vector<T> logits;
  T bound;
};

template <typename T>
Diagonal<T> compute_diagonal(const Logits<T>& logits, const Parts& parts) {
  const int64_t n = parts.n;
  Diagonal<T> diagonal{std::vector<T>(n), 0};
  std::vector<T> squares[2] = {std::vector<T>(n), std::vector<T>(n)};
  parts.for_each_part([&](Span rows) {
    const Tensor image = logits.image_rows(rows), text = logits.text_rows(rows);
    const int64_t width = image.size(1);
    for (int64_t i = 0; i < rows.size; ++i) {
      const int64_t row = rows.begin + i;
      const T* x = image.template const_data_ptr<T>() + i * image.stride(0);
      const T* y = text.template const_data_ptr<T>() + i * text.stride(0);
      diagonal.logits[row] = logits.scale * dot_row(x, y, width);
      squares[0][row] = dot_row(x, x, width);
      squares[1][row] = dot_row(y, y, width);
    }
  });
  // NaN and infinite rows are left out: they must not reach others through the shift.
  diagonal.bound = std::abs(logits.scale) * std::sqrt(largest_finite(squares[0].data(), n)) *
                   std::sqrt(largest_finite(squares[1].data(), n));
  return diagonal;
}

template <typename T>
void shift_by_bound(Softmax<T>& softmax, T bound, int64_t n) {
  const T shared = std::max(bound - T(kHeadroom), T(0));
  for (T* shift : softmax.shift) std::fill_n(shift, n, shared);
  softmax.is_shared = true;
}

// The largest logit of each row and column beside the diagonal: exp is then at most 1.
template <typename T>
void shift_by_peaks(Group<T>& group, int64_t matrix) {
  Softmax<T>& softmax = group.softmaxes[matrix];
  const T lowest = -std::numeric_limits<T>::infinity();
  for (T* shift : softmax.shift) std::fill_n(shift, group.rows(), lowest);
  const Scratch<T> scratch(group.parts.largest(), 1, 0);
  group.parts.for_each_tile([&](int64_t r, int64_t c) {
    const Span rows = group.parts[r], cols = group.parts[c];
    const T* s = group.compute_tile(matrix, r, c, scratch.tile(0));
    for (int64_t i = 0; i < rows.size; ++i, s += cols.size) {
      T& peak = softmax.shift[0][rows.begin + i];
      peak = max_of_row(s, peak, cols.size);
      max_row(s, softmax.shift[1] + cols.begin, cols.size);
    }
  });
  softmax.is_shared = false;
}

// Row and column sums of e = exp(S - shift), of e0, and in `cross` [2][n] of e0 * (S0 - S).
template <typename T>
void sum_tiles(Group<T>& group, T* const cross[2]) {
  const bool has_ref = group.has_ref();
  for (Softmax<T>& softmax : group.softmaxes) {
    for (T* sums : softmax.sums) std::fill_n(sums, group.rows(), T(0));
  }
  for (int way = 0; has_ref && way < 2; ++way) std::fill_n(cross[way], group.rows(), T(0));
  const Scratch<T> scratch(group.parts.largest(), 2, 3);
  group.for_each_tile(scratch, [&](const Tile<T>& tile) {
    const int64_t width = tile.cols.size, first_col = tile.cols.begin;
    // Columns are summed within the tile first: shorter chains of additions, smaller rounding
    // errors.
    T *col_sums = scratch.line(0), *ref_col_sums = scratch.line(1), *col_cross = scratch.line(2);
    for (T* sums : {col_sums, ref_col_sums, col_cross}) std::fill_n(sums, width, T(0));
    for (int64_t i = 0; i < tile.rows.size; ++i) {
      const int64_t row = tile.rows.begin + i;
      group.visit_exps(0, tile, i, [&](auto current) {
        group.softmaxes[0].sums[0][row] += add_exps(current, col_sums, width);
      });
      if (!has_ref) continue;
      group.visit_exps(1, tile, i, [&](auto original) {
        const T* s = tile.logits[0] + i * width;
        const RefSums<T> sums = add_ref_exps(original, s, ref_col_sums, col_cross, width);
        group.softmaxes[1].sums[0][row] += sums.exps;
        cross[0][row] += sums.cross;
      });
    }
    add_row(col_sums, group.softmaxes[0].sums[1] + first_col, width);
    if (!has_ref) return;
    add_row(ref_col_sums, group.softmaxes[1].sums[1] + first_col, width);
    add_row(col_cross, cross[1] + first_col, width);
  });
  group.is_filled = true;
}

template <typename T>
bool all_finite(const T* x, int64_t n) {
  return std::all_of(x, x + n, [](T value) { return std::isfinite(value); });
}

template <typename T>
bool has_finite_features(const Logits<T>& logits) {
  return at::isfinite(logits.image).all().template item<bool>() &&
         at::isfinite(logits.text).all().template item<bool>();
}

// Whether the fixed shift lost terms to underflow, or overflowed though the inputs are finite.
template <typename T>
bool has_lost_terms(const Logits<T>& logits, const Softmax<T>& softmax, int64_t n,
                    T* const cross[2]) {
  bool overflow = false;
  for (int way = 0; way < 2; ++way) {
    const T* sums = softmax.sums[way];
    if (std::any_of(sums, sums + n, [](T sum) { return sum < T(kUnderflow); })) return true;
    overflow |= !all_finite(sums, n) || (cross && !all_finite(cross[way], n));
  }
  return overflow && has_finite_features(logits);
}

// The sums with the fixed shift or, where that fails, with each row's and column's own peak.
template <typename T>
void compute_stable_sums(Group<T>& group, const std::vector<T>& bounds, T* const cross[2]) {
  const int64_t n = group.rows(), matrices = group.matrices.size();
  for (int64_t k = 0; k < matrices; ++k) shift_by_bound(group.softmaxes[k], bounds[k], n);
  if (n < 2) {
    for (Softmax<T>& softmax : group.softmaxes) {
      for (T* sums : softmax.sums) std::fill_n(sums, n, T(0));
    }
    for (int way = 0; way < 2; ++way) std::fill_n(cross[way], n, T(0));
    return;
  }
  sum_tiles(group, cross);
  bool is_repeated = false;
  for (int64_t k = 0; k < matrices; ++k) {
    T* const* ref_cross = k == 1 ? cross : nullptr;
    if (!has_lost_terms(group.matrices[k], group.softmaxes[k], n, ref_cross)) continue;
    shift_by_peaks(group, k);
    is_repeated = true;
  }
  if (is_repeated) sum_tiles(group, cross);
}

// Cross-entropies of one direction, and the probabilities beside the diagonal.
template <typename T>
void compute_cross_entropies(const Softmax<T>& softmax, int way, const std::vector<T>& diagonal,
                             T* ce) {
  for (size_t i = 0; i < diagonal.size(); ++i) {
    const T gap = std::log(softmax.sums[way][i]) + softmax.shift[way][i] - diagonal[i];
    ce[i] = (gap > 0 ? gap : T(0)) + std::log1p(std::exp(-std::abs(gap)));
    softmax.miss_probability[way][i] = 1 / (1 + std::exp(-gap));
  }
}

// losses: ce_row, ce_col and, with a reference, kl_row, kl_col, `stride` apart.
template <typename T>
void compute_losses(Group<T>& group, T* losses, int64_t stride) {
  const int64_t n = group.rows();
  std::vector<Diagonal<T>> diagonals;
  std::vector<T> bounds;
  for (const Logits<T>& logits : group.matrices) {
    diagonals.push_back(compute_diagonal(logits, group.parts));
    bounds.push_back(diagonals.back().bound);
  }
  std::vector<T> cross_sums(2 * n);
  T* const cross[2] = {cross_sums.data(), cross_sums.data() + n};
  compute_stable_sums(group, bounds, cross);
  for (int way = 0; way < 2; ++way) {
    const T* ce = losses + way * stride;
    compute_cross_entropies(group.softmaxes[0], way, diagonals[0].logits, losses + way * stride);
    if (!group.has_ref()) continue;
    T* kl = losses + (2 + way) * stride;
    const Softmax<T>& original = group.softmaxes[1];
    compute_cross_entropies(original, way, diagonals[1].logits, kl);
    // Every logit is measured from its own diagonal (lse - diagonal is ce), so a matched pair's KL
    // consists of small numbers, not of differences of large ones. A lone pair has no sums:
    // 0 / tiny.
    for (int64_t i = 0; i < n; ++i) {
      const T sum = original.sums[way][i], tiny = std::numeric_limits<T>::min();
      const T mean = cross[way][i] / (sum < tiny ? tiny : sum);
      const T gap = mean - (diagonals[1].logits[i] - diagonals[0].logits[i]);
      kl[i] = original.miss_probability[way][i] * gap + ce[i] - kl[i];
    }
  }
}

}  // namespace fasterase
