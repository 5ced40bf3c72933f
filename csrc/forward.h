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
    const Rows<T> image = logits.image_rows(rows), text = logits.text_rows(rows);
    const int64_t width = image.width();
    for (int64_t i = 0; i < rows.size; ++i) {
      const int64_t row = rows.begin + i;
      const T *x = image[i], *y = text[i];
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

// What the losses need beside the softmaxes' sums, [2][n] each.
template <typename T>
struct LossSums {
  std::vector<T> cross[2];  // of e0 * (S0 - S)
  std::vector<T> gaps[2];   // of S minus the row's, or the column's, diagonal, over the positives
};

// Row and column sums of e = exp(S - shift), of e0, and `sums`.
template <typename T>
void sum_tiles(Group<T>& group, const std::vector<T>& diagonal, LossSums<T>& sums) {
  const bool has_ref = group.has_ref();
  const Labels<T>& labels = group.labels;
  for (Softmax<T>& softmax : group.softmaxes) {
    for (T* sums : softmax.sums) std::fill_n(sums, group.rows(), T(0));
  }
  for (int way = 0; way < 2; ++way) {
    sums.cross[way].assign(group.rows(), T(0));
    sums.gaps[way].assign(labels.repeat() ? group.rows() : 0, T(0));
  }
  if (group.rows() < 2) return;
  const Scratch<T> scratch(group.parts.largest(), 2, 4);
  group.for_each_tile(scratch, [&](const Tile<T>& tile) {
    const int64_t width = tile.cols.size, first_col = tile.cols.begin;
    // Columns are summed within the tile first: shorter chains of additions, smaller rounding
    // errors.
    T *col_sums = scratch.line(0), *ref_col_sums = scratch.line(1), *col_cross = scratch.line(2),
      *col_gaps = scratch.line(3);
    for (T* line : {col_sums, ref_col_sums, col_cross, col_gaps}) std::fill_n(line, width, T(0));
    for (int64_t i = 0; i < tile.rows.size; ++i) {
      const int64_t row = tile.rows.begin + i;
      group.visit_exps(0, tile, i, [&](auto current) {
        group.softmaxes[0].sums[0][row] += add_exps(current, col_sums, width);
      });
      const T* s = tile.logits[0] + i * width;
      if (labels.repeats(row)) {
        sums.gaps[0][row] +=
            add_gaps(s, labels.keys + first_col, labels.keys[row], group.find_diagonal(tile, i),
                     diagonal[row], diagonal.data() + first_col, col_gaps, width);
      }
      if (!has_ref) continue;
      group.visit_exps(1, tile, i, [&](auto original) {
        const RefSums<T> found = add_ref_exps(original, s, ref_col_sums, col_cross, width);
        group.softmaxes[1].sums[0][row] += found.exps;
        sums.cross[0][row] += found.cross;
      });
    }
    add_row(col_sums, group.softmaxes[0].sums[1] + first_col, width);
    if (labels.repeat()) add_row(col_gaps, sums.gaps[1].data() + first_col, width);
    if (!has_ref) return;
    add_row(ref_col_sums, group.softmaxes[1].sums[1] + first_col, width);
    add_row(col_cross, sums.cross[1].data() + first_col, width);
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
                    const std::vector<T>* cross) {
  bool overflow = false;
  for (int way = 0; way < 2; ++way) {
    const T* sums = softmax.sums[way];
    if (std::any_of(sums, sums + n, [](T sum) { return sum < T(kUnderflow); })) return true;
    overflow |= !all_finite(sums, n) || (cross && !all_finite(cross[way].data(), n));
  }
  return overflow && has_finite_features(logits);
}

// The sums with the fixed shift or, where that fails, with each row's and column's own peak.
template <typename T>
LossSums<T> compute_stable_sums(Group<T>& group, const std::vector<Diagonal<T>>& diagonals) {
  const int64_t n = group.rows(), matrices = group.matrices.size();
  LossSums<T> sums;
  for (int64_t k = 0; k < matrices; ++k) shift_by_bound(group.softmaxes[k], diagonals[k].bound, n);
  sum_tiles(group, diagonals[0].logits, sums);
  if (n < 2) return sums;  // which are 0
  bool is_repeated = false;
  for (int64_t k = 0; k < matrices; ++k) {
    const std::vector<T>* cross = k == 1 ? sums.cross : nullptr;
    if (!has_lost_terms(group.matrices[k], group.softmaxes[k], n, cross)) continue;
    shift_by_peaks(group, k);
    is_repeated = true;
  }
  if (is_repeated) sum_tiles(group, diagonals[0].logits, sums);
  return sums;
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

// KLs of one direction, from the cross-entropies of each pair with its own partner.
//
// Every logit is measured from its own diagonal (lse - diagonal is ce), so a matched pair's KL
// consists of small numbers, not of differences of large ones. A lone pair has no sums: 0 / tiny.
template <typename T>
void compute_kls(const Group<T>& group, int way, const std::vector<Diagonal<T>>& diagonals,
                 const std::vector<T>& cross, const T* ce, T* kl) {
  const Softmax<T>& original = group.softmaxes[1];
  compute_cross_entropies(original, way, diagonals[1].logits, kl);
  for (int64_t i = 0; i < group.rows(); ++i) {
    const T sum = original.sums[way][i], tiny = std::numeric_limits<T>::min();
    const T mean = cross[i] / (sum < tiny ? tiny : sum);
    const T gap = mean - (diagonals[1].logits[i] - diagonals[0].logits[i]);
    kl[i] = original.miss_probability[way][i] * gap + ce[i] - kl[i];
  }
}

// losses: ce_row, ce_col and, with a reference, kl_row, kl_col, `stride` apart.
template <typename T>
void compute_losses(Group<T>& group, T* losses, int64_t stride) {
  const int64_t n = group.rows();
  std::vector<Diagonal<T>> diagonals;
  for (const Logits<T>& logits : group.matrices) {
    diagonals.push_back(compute_diagonal(logits, group.parts));
  }
  const LossSums<T> sums = compute_stable_sums(group, diagonals);
  for (int way = 0; way < 2; ++way) {
    T* ce = losses + way * stride;
    compute_cross_entropies(group.softmaxes[0], way, diagonals[0].logits, ce);
    if (group.has_ref()) compute_kls(group, way, diagonals, sums.cross[way], ce, ce + 2 * stride);
    for (int64_t i = 0; group.labels.repeat() && i < n; ++i) {
      ce[i] -= sums.gaps[way][i] * group.labels.shares[i];
    }
  }
}

}  // namespace fasterase
