// Losses of one group: the sums of its tiles, under a shift that loses nothing, and what follows.
#pragma once

#include <cmath>

#include "group.h"

namespace fasterase {

// Per row of a group: <I_i, T_i> scaled, and in `bound` the largest |S| there can be.
template <typename T>
struct Diagonal {
  std::vector<T> own;
  T bound;
};

template <typename T>
Diagonal<T> diagonal_of(const Logits<T>& logits, const Parts& parts) {
  Diagonal<T> diagonal{std::vector<T>(parts.n), 0};
  std::vector<T> largest(2 * parts.count, T(0));
  at::parallel_for(0, parts.count, 1, [&](int64_t begin, int64_t end) {
    PlainTensors guard;
    for (int64_t r = begin; r < end; ++r) {
      const Span rows = parts[r];
      const Tensor image = logits.image_rows(rows), text = logits.text_rows(rows);
      const int64_t width = image.size(1);
      for (int64_t i = 0; i < rows.size; ++i) {
        const T* x = image.template const_data_ptr<T>() + i * image.stride(0);
        const T* y = text.template const_data_ptr<T>() + i * text.stride(0);
        diagonal.own[rows.begin + i] = logits.scale * dot_row(x, y, width);
        const T squares[2] = {dot_row(x, x, width), dot_row(y, y, width)};
        for (int side = 0; side < 2; ++side) {
          // NaN and infinite rows are left out: they must not reach others through the shift.
          if (std::isfinite(squares[side])) {
            largest[2 * r + side] = std::max(largest[2 * r + side], squares[side]);
          }
        }
      }
    }
  });
  T squares[2] = {0, 0};
  for (int64_t k = 0; k < 2 * parts.count; ++k) squares[k % 2] = std::max(squares[k % 2], largest[k]);
  diagonal.bound = std::abs(logits.scale) * std::sqrt(squares[0]) * std::sqrt(squares[1]);
  return diagonal;
}

// max(0, B - 66): exp(66) times 2^20 columns, also times the KL's (s0 - s), still fits fp32.
template <typename T>
void shift_by_bound(Softmax<T>& softmax, T bound, int64_t n) {
  const T by = std::max(bound - T(66), T(0));
  for (T* shift : softmax.shift) std::fill_n(shift, n, by);
  softmax.shared = true;
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
    const T* s = group.tile(matrix, r, c, scratch.tile(0));
    for (int64_t i = 0; i < rows.size; ++i, s += cols.size) {
      T& peak = softmax.shift[0][rows.begin + i];
      peak = max_of_row(s, peak, cols.size);
      max_row(s, softmax.shift[1] + cols.begin, cols.size);
    }
  });
  softmax.shared = false;
}

// Row and column sums of e = exp(S - shift), of e0, and in `cross` [2][n] of e0 * (S0 - S).
template <typename T>
void add_up(Group<T>& group, T* const cross[2]) {
  const bool has_ref = group.matrices.size() > 1;
  for (Softmax<T>& softmax : group.softmaxes) {
    for (T* sums : softmax.sums) std::fill_n(sums, group.rows(), T(0));
  }
  for (int way = 0; has_ref && way < 2; ++way) std::fill_n(cross[way], group.rows(), T(0));
  const Scratch<T> scratch(group.parts.largest(), 2, 3);
  group.parts.for_each_tile([&](int64_t r, int64_t c) {
    const Span rows = group.parts[r], cols = group.parts[c];
    const int64_t width = cols.size;
    const T* s = group.tile(0, r, c, scratch.tile(0));
    const T* s0 = has_ref ? group.tile(1, r, c, scratch.tile(1)) : nullptr;
    // Columns first add up within the tile: shorter chains of additions, smaller rounding errors.
    T *down = scratch.line(0), *down0 = scratch.line(1), *down_cross = scratch.line(2);
    for (T* sums : {down, down0, down_cross}) std::fill_n(sums, width, T(0));
    for (int64_t i = 0; i < rows.size; ++i, s += width) {
      const int64_t at_row = rows.begin + i;
      group.softmaxes[0].visit_exps(s, at_row, cols, [&](auto current) {
        group.softmaxes[0].sums[0][at_row] += add_exps(current, down, width);
      });
      if (!has_ref) continue;
      group.softmaxes[1].visit_exps(s0, at_row, cols, [&](auto original) {
        const RefSums<T> sums = add_ref_exps(original, s, down0, down_cross, width);
        group.softmaxes[1].sums[0][at_row] += sums.exps;
        cross[0][at_row] += sums.cross;
      });
      s0 += width;
    }
    add_row(down, group.softmaxes[0].sums[1] + cols.begin, width);
    if (!has_ref) return;
    add_row(down0, group.softmaxes[1].sums[1] + cols.begin, width);
    add_row(down_cross, cross[1] + cols.begin, width);
  });
  group.filled = true;
}

template <typename T>
bool all_finite(const T* x, int64_t n) {
  return std::all_of(x, x + n, [](T value) { return std::isfinite(value); });
}

template <typename T>
bool finite_inputs(const Logits<T>& logits) {
  return at::isfinite(logits.image).all().template item<bool>() &&
         at::isfinite(logits.text).all().template item<bool>();
}

// Whether the fixed shift lost terms to underflow, or overflowed though the inputs are finite.
template <typename T>
bool lost(const Logits<T>& logits, const Softmax<T>& softmax, int64_t n, T* const cross[2]) {
  bool overflow = false;
  for (int way = 0; way < 2; ++way) {
    const T* sums = softmax.sums[way];
    // fp32 is normal down to 2^-126.
    if (std::any_of(sums, sums + n, [](T sum) { return sum < T(0x1p-80); })) return true;
    overflow |= !all_finite(sums, n) || (cross && !all_finite(cross[way], n));
  }
  return overflow && finite_inputs(logits);
}

// The sums under the fixed shift or, where that fails, under each row's and column's own peak.
template <typename T>
void stable_sums(Group<T>& group, const std::vector<T>& bounds, T* const cross[2]) {
  const int64_t n = group.rows(), matrices = group.matrices.size();
  for (int64_t k = 0; k < matrices; ++k) shift_by_bound(group.softmaxes[k], bounds[k], n);
  if (n < 2) {
    for (Softmax<T>& softmax : group.softmaxes) {
      for (T* sums : softmax.sums) std::fill_n(sums, n, T(0));
    }
    for (int way = 0; way < 2; ++way) std::fill_n(cross[way], n, T(0));
    return;
  }
  add_up(group, cross);
  bool again = false;
  for (int64_t k = 0; k < matrices; ++k) {
    if (!lost(group.matrices[k], group.softmaxes[k], n, k == 1 ? cross : nullptr)) continue;
    shift_by_peaks(group, k);
    again = true;
  }
  if (again) add_up(group, cross);
}

// Cross-entropies of one direction, and the probability beside the diagonal.
template <typename T>
void cross_entropies(const Softmax<T>& softmax, int way, const std::vector<T>& own, T* ce) {
  for (size_t i = 0; i < own.size(); ++i) {
    const T gap = std::log(softmax.sums[way][i]) + softmax.shift[way][i] - own[i];
    ce[i] = (gap > 0 ? gap : T(0)) + std::log1p(std::exp(-std::abs(gap)));
    softmax.off[way][i] = 1 / (1 + std::exp(-gap));
  }
}

// losses: ce_row, ce_col and, with a reference, kl_row, kl_col, `stride` apart.
template <typename T>
void compute_losses(Group<T>& group, T* losses, int64_t stride) {
  const int64_t n = group.rows();
  std::vector<Diagonal<T>> diagonals;
  std::vector<T> bounds;
  for (const Logits<T>& logits : group.matrices) {
    diagonals.push_back(diagonal_of(logits, group.parts));
    bounds.push_back(diagonals.back().bound);
  }
  std::vector<T> crossed(2 * n);
  T* const cross[2] = {crossed.data(), crossed.data() + n};
  stable_sums(group, bounds, cross);
  for (int way = 0; way < 2; ++way) {
    const T* ce = losses + way * stride;
    cross_entropies(group.softmaxes[0], way, diagonals[0].own, losses + way * stride);
    if (group.matrices.size() < 2) continue;
    T* kl = losses + (2 + way) * stride;
    const Softmax<T>& original = group.softmaxes[1];
    cross_entropies(original, way, diagonals[1].own, kl);
    // Every logit is measured from its own diagonal (lse - own is ce), so that a matched pair's KL
    // is made of small numbers, not of differences of large ones. A lone pair has no sums: 0 / tiny.
    for (int64_t i = 0; i < n; ++i) {
      const T sum = original.sums[way][i], tiny = std::numeric_limits<T>::min();
      const T mean = cross[way][i] / (sum < tiny ? tiny : sum);
      const T gap = mean - (diagonals[1].own[i] - diagonals[0].own[i]);
      kl[i] = original.off[way][i] * gap + ce[i] - kl[i];
    }
  }
}

}  // namespace fasterase
