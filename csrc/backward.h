// Gradients of one group: the coefficient matrix G by tiles, and its products with the features.
#pragma once

#include "forward.h"

namespace fasterase {

struct Wanted {
  bool image, text, scale;
};

// Of the finite numbers: one that is not must spoil no group but its own.
template <typename T>
T largest_magnitude(const T* x, int64_t n) {
  T largest = 0;
  for (int64_t j = 0; j < n; ++j) {
    if (std::isfinite(x[j])) largest = std::max(largest, std::abs(x[j]));
  }
  return largest == 0 ? T(1) : largest;
}

// Whether a matrix has one shift for all its rows and columns.
template <typename T>
bool one_number(T* const shift[2], int64_t n) {
  return std::all_of(shift[0], shift[0] + n, [&](T by) { return by == shift[0][0]; }) &&
         std::all_of(shift[1], shift[1] + n, [&](T by) { return by == shift[0][0]; });
}

// Upstream gradients of a group over their largest finite magnitude `unit` in the batch: weights of about
// 1 keep a 1/N out of factors that may be 1e-34 already (sums up to exp(78)).
template <typename T>
struct Weights {
  const T* data;
  int64_t stride, n;
  T unit;

  // loss 0: cross-entropy, 1: KL; way 0: rows, 1: columns.
  T of(int loss, int way, int64_t i) const { return data[(2 * loss + way) * stride + i] / unit; }

  bool used(int loss) const {
    for (int way = 0; way < 2; ++way) {
      const T* row = data + (2 * loss + way) * stride;
      if (std::any_of(row, row + n, [](T weight) { return weight != 0; })) return true;
    }
    return false;
  }
};

// Sums over j of G_ij T_j and over i of G_ij I_i, [n, D], undefined where not wanted.
template <typename T>
struct Gradients {
  Tensor image, text;
};

// What turns exp(s - shift) into weight * p, [2][n] a matrix, and G's diagonal, [n].
//
// By the sums and not by exp(shift - lse): then a row of p adds up to `off` to the last bit, where
// an lse near 100, rounded, would tilt the whole row by 4e-6, and features that share a direction
// would feel it 100-fold.
template <typename T>
struct Coefficients {
  std::vector<std::vector<T>> factors;
  std::vector<T> diagonal;

  Coefficients(const Group<T>& group, const Weights<T>& weights)
      : factors(2 * group.matrices.size(), std::vector<T>(weights.n)), diagonal(weights.n, T(0)) {
    const bool has_ref = group.matrices.size() > 1;
    for (int way = 0; way < 2; ++way) {
      const Softmax<T>& current = group.softmaxes[0];
      for (int64_t i = 0; i < weights.n; ++i) {
        const T kl = has_ref ? weights.of(1, way, i) : T(0);
        const T both = weights.of(0, way, i) + kl;
        factors[way][i] = both * (current.off[way][i] / current.sums[way][i]);
        diagonal[i] -= both * current.off[way][i];
        if (!has_ref) continue;
        const Softmax<T>& original = group.softmaxes[1];
        factors[2 + way][i] = kl * (original.off[way][i] / original.sums[way][i]);
        diagonal[i] += kl * original.off[way][i];
      }
    }
  }
};

template <typename T>
void add_products(const Group<T>& group, const Coefficients<T>& by, Gradients<T>& gradients) {
  const bool has_ref = group.matrices.size() > 1;
  const Logits<T>& logits = group.matrices[0];
  const Scratch<T> scratch(group.parts.largest(), 2, 0);
  group.parts.for_each_tile([&](int64_t r, int64_t c) {
    const Span rows = group.parts[r], cols = group.parts[c];
    const int64_t width = cols.size;
    const T* s = group.tile(0, r, c, scratch.tile(0));
    const T* s0 = has_ref ? group.tile(1, r, c, scratch.tile(1)) : nullptr;
    T* g = scratch.tile(0);
    for (int64_t i = 0; i < rows.size; ++i, s += width, g += width) {
      const int64_t at_row = rows.begin + i;
      group.softmaxes[0].visit_exps(s, at_row, cols, [&](auto current) {
        weigh_exps(current, by.factors[0][at_row], by.factors[1].data() + cols.begin, g, width);
      });
      if (!has_ref) continue;
      group.softmaxes[1].visit_exps(s0, at_row, cols, [&](auto original) {
        subtract_weighed_exps(original, by.factors[2][at_row], by.factors[3].data() + cols.begin,
                              g, width);
      });
      s0 += width;
    }
    const Tensor tile = view(scratch.tile(0), rows.size, width);
    const int beta = r == c ? 0 : 1;  // the diagonal's tiles come first
    if (gradients.image.defined()) {
      Tensor out = gradients.image.narrow(0, rows.begin, rows.size);
      at::addmm_out(out, out, tile, logits.text_rows(cols), beta);
    }
    if (gradients.text.defined()) {
      Tensor out = gradients.text.narrow(0, cols.begin, cols.size);
      at::addmm_out(out, out, tile.t(), logits.image_rows(rows), beta);
    }
  });
}

// Adds G's diagonal times `other`, multiplies by `by`, and puts <own, gradient> into `inner` [n].
template <typename T>
void finish(const Tensor& gradient, const Tensor& own_side, const Tensor& other_side,
            const Parts& parts, const T* diagonal, T by, T* inner) {
  const auto type = c10::CppTypeToScalarType<T>::value;
  at::parallel_for(0, parts.count, 1, [&](int64_t begin, int64_t end) {
    PlainTensors guard;
    for (int64_t r = begin; r < end; ++r) {
      const Span rows = parts[r];
      const Tensor own = own_side.narrow(0, rows.begin, rows.size).to(type);
      const Tensor other = other_side.narrow(0, rows.begin, rows.size).to(type);
      const int64_t width = own.size(1);
      for (int64_t i = 0; i < rows.size; ++i) {
        const int64_t at_row = rows.begin + i;
        T* d = gradient.mutable_data_ptr<T>() + at_row * width;
        const T* x = own.template const_data_ptr<T>() + i * own.stride(0);
        const T* y = other.template const_data_ptr<T>() + i * other.stride(0);
        const T weight = diagonal[at_row];
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) d[j] += weight * y[j];
        if (inner) inner[at_row] = dot_row(x, d, width);
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) d[j] *= by;
      }
    }
  });
}

// Fills the gradients of the weighted losses and returns the one in scale, taken from the text's
// gradient where `from_text`, else from the image's.
template <typename T>
double compute_gradients(const Group<T>& group, const Weights<T>& weights, Gradients<T>& gradients,
                         bool from_text) {
  const Logits<T>& logits = group.matrices[0];
  const Coefficients<T> by(group, weights);
  if (group.rows() > 1) {
    add_products(group, by, gradients);
  } else {
    for (Tensor* side : {&gradients.image, &gradients.text}) {
      if (side->defined()) side->zero_();
    }
  }
  std::vector<T> inner(group.rows(), T(0));
  const T scaled = logits.scale * weights.unit;
  if (gradients.image.defined()) {
    finish(gradients.image, logits.image, logits.text, group.parts, by.diagonal.data(), scaled,
           from_text ? nullptr : inner.data());
  }
  if (gradients.text.defined()) {
    finish(gradients.text, logits.text, logits.image, group.parts, by.diagonal.data(), scaled,
           from_text ? inner.data() : nullptr);
  }
  double sum = 0;
  for (T value : inner) sum += value;
  return sum * weights.unit;
}

}  // namespace fasterase
