// Gradients of one group: the coefficient matrix G by tiles, and its products with the features.
#pragma once

#include <optional>

#include "forward.h"

namespace fasterase {

struct Wanted {
  bool image, text, scale;
};

// Whether a matrix has one shift for all its rows and columns.
template <typename T>
bool has_one_shift(T* const shift[2], int64_t n) {
  const auto is_first = [&](T value) { return value == shift[0][0]; };
  return std::all_of(shift[0], shift[0] + n, is_first) &&
         std::all_of(shift[1], shift[1] + n, is_first);
}

// Upstream gradients of a group, divided by the largest finite magnitude in the batch: weights of
// about 1 keep a 1/N out of factors that may be 1e-34 already (sums up to exp(78)).
template <typename T>
struct Weights {
  const T* data;
  int64_t stride, n;
  T largest;  // 1 where all are 0

  // loss 0: cross-entropy, 1: KL; way 0: rows, 1: columns.
  T get(int loss, int way, int64_t i) const {
    return data[(2 * loss + way) * stride + i] / largest;
  }

  bool has_loss(int loss) const {
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

  void fill_with_zeros() {
    for (Tensor* side : {&image, &text}) {
      if (side->defined()) side->zero_();
    }
  }
};

// Factors that turn exp(s - shift) into weight * p, [2][n] per matrix, those of positives, and G's
// diagonal, [n].
//
// They use the sums and not exp(shift - lse): a row of p then adds up to the miss probability to
// the last bit. An lse near 100, rounded, would tilt the whole row by 4e-6, and features that share
// a direction would feel it 100-fold.
template <typename T>
struct Coefficients {
  std::vector<std::vector<T>> factors;
  std::vector<T> positives[2];  // weight / the number of pairs with the same label
  std::vector<T> diagonal;

  Coefficients(const Group<T>& group, const Weights<T>& weights)
      : factors(2 * group.matrices.size(), std::vector<T>(weights.n)), diagonal(weights.n, T(0)) {
    const std::vector<T>& shares = group.labels.shares;
    for (int way = 0; way < 2; ++way) {
      const Softmax<T>& current = group.softmaxes[0];
      positives[way].resize(shares.size());
      for (int64_t i = 0; i < weights.n; ++i) {
        const T kl = group.has_ref() ? weights.get(1, way, i) : T(0);
        const T both = weights.get(0, way, i) + kl;
        const T miss = current.miss_probability[way][i];
        factors[way][i] = both * (miss / current.sums[way][i]);
        diagonal[i] -= both * miss;
        if (group.labels.repeats(i)) {
          positives[way][i] = weights.get(0, way, i) * shares[i];
          diagonal[i] += weights.get(0, way, i) - positives[way][i];
        }
        if (!group.has_ref()) continue;
        const Softmax<T>& original = group.softmaxes[1];
        const T ref_miss = original.miss_probability[way][i];
        factors[2 + way][i] = kl * (ref_miss / original.sums[way][i]);
        diagonal[i] += kl * ref_miss;
      }
    }
  }
};

// The products of tiles of G and features, G rounded to bf16 as well.
class Bf16Products {
 public:
  template <typename T>
  Bf16Products(const Group<T>& group, const Gradients<T>& gradients)
      : scratch(pad(group.parts.largest()), 2, 0) {
    const auto pack = [&](const Tensor& side) {
      return RightFactors(round_rows(side), group.parts, /*is_turned=*/false);
    };
    if (gradients.text.defined()) image = pack(group.matrices[0].image);
    if (gradients.image.defined()) text = pack(group.matrices[0].text);
  }

  void add(const float* g, const Tile<float>& tile, bool adds, Gradients<float>& to) const {
    Bf16 *rounded = scratch.tile(0), *turned = scratch.tile(1);
    round_tile(g, tile.rows.size, tile.cols.size, rounded, turned);
    if (to.image.defined()) {
      add(rounded, text[tile.col_part], tile.rows, tile.cols.size, adds, to.image);
    }
    if (to.text.defined()) {
      add(turned, image[tile.row_part], tile.cols, tile.rows.size, adds, to.text);
    }
  }

 private:
  RightFactors image, text;
  Scratch<Bf16> scratch;  // a tile of G, and the same turned

  static void add(const Bf16* left, const Bf16* right, Span rows, int64_t depth, bool adds,
                  Tensor& to) {
    const int64_t width = to.size(1);
    multiply_bf16(left, pad(depth), right, rows.size, depth, width, 1.f, adds,
                  to.mutable_data_ptr<float>() + rows.begin * width, width);
  }
};

// Sets the gradients to the products of G, without its diagonal, and the features.
template <typename T>
void multiply_tiles(const Group<T>& group, const Coefficients<T>& coefficients,
                    Gradients<T>& gradients) {
  const std::vector<std::vector<T>>& factors = coefficients.factors;
  const Labels<T>& labels = group.labels;
  const Logits<T>& logits = group.matrices[0];
  const Scratch<T> scratch(group.parts.largest(), 2, 0);
  std::optional<Bf16Products> in_bf16;
  if (group.is_bf16) in_bf16.emplace(group, gradients);
  group.for_each_tile(scratch, [&](const Tile<T>& tile) {
    const int64_t width = tile.cols.size, first_col = tile.cols.begin;
    T* g = scratch.tile(0);  // where S is not kept, G overwrites it row by row
    for (int64_t i = 0; i < tile.rows.size; ++i, g += width) {
      const int64_t row = tile.rows.begin + i;
      group.visit_exps(0, tile, i, [&](auto current) {
        weigh_exps(current, factors[0][row], factors[1].data() + first_col, g, width);
      });
      if (labels.repeats(row)) {
        subtract_positives(g, labels.keys + first_col, labels.keys[row],
                           group.find_diagonal(tile, i), coefficients.positives[0][row],
                           coefficients.positives[1].data() + first_col, width);
      }
      if (!group.has_ref()) continue;
      group.visit_exps(1, tile, i, [&](auto original) {
        subtract_weighed_exps(original, factors[2][row], factors[3].data() + first_col, g, width);
      });
    }
    // The diagonal's tiles come first, and initialise the gradients.
    const bool adds = tile.rows.begin != tile.cols.begin;
    if constexpr (std::is_same_v<T, float>) {
      if (in_bf16) return in_bf16->add(scratch.tile(0), tile, adds, gradients);
    }
    const Factor<T> product{scratch.tile(0), tile.rows.size, width, width};
    const auto add = [&](const Factor<T>& left, const Rows<T>& right, int64_t begin, Tensor& to) {
      T* out = to.template mutable_data_ptr<T>() + begin * right.width();
      multiply(left, right.factor(), T(1), adds, out, right.width());
    };
    if (gradients.image.defined()) {
      add(product, logits.text_rows(tile.cols), tile.rows.begin, gradients.image);
    }
    if (gradients.text.defined()) {
      add(product.turn(), logits.image_rows(tile.rows), tile.cols.begin, gradients.text);
    }
  });
}

// Adds G's diagonal times `other` to some rows, stores <side, gradient> in `inner` [n] unless it is
// null, and multiplies by `factor`.
template <typename T>
void finish_gradient(const Tensor& gradient, const Rows<T>& side, const Rows<T>& other, Span rows,
                     const T* diagonal, T factor, T* inner) {
  const int64_t width = side.width();
  for (int64_t i = 0; i < rows.size; ++i) {
    const int64_t row = rows.begin + i;
    T* d = gradient.mutable_data_ptr<T>() + row * width;
    const T *x = side[i], *y = other[i];
    const T weight = diagonal[row];
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) d[j] += weight * y[j];
    if (inner) inner[row] = dot_row(x, d, width);
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) d[j] *= factor;
  }
}

// Fills the gradients of the weighted losses and returns the one in scale, computed from the text's
// gradient if `from_text`, else from the image's.
template <typename T>
double compute_gradients(const Group<T>& group, const Weights<T>& weights, Gradients<T>& gradients,
                         bool from_text) {
  const Logits<T>& logits = group.matrices[0];
  const Coefficients<T> coefficients(group, weights);
  const T* diagonal = coefficients.diagonal.data();
  if (group.rows() > 1) {
    multiply_tiles(group, coefficients, gradients);
  } else {
    gradients.fill_with_zeros();
  }
  std::vector<T> inner(group.rows(), T(0));
  const T factor = logits.scale * weights.largest;
  group.parts.for_each_part([&](Span rows) {
    const Rows<T> image = logits.image_rows(rows), text = logits.text_rows(rows);
    if (gradients.image.defined()) {
      finish_gradient(gradients.image, image, text, rows, diagonal, factor,
                      from_text ? nullptr : inner.data());
    }
    if (gradients.text.defined()) {
      finish_gradient(gradients.text, text, image, rows, diagonal, factor,
                      from_text ? inner.data() : nullptr);
    }
  });
  double sum = 0;
  for (T value : inner) sum += value;
  return sum * weights.largest;
}

}  // namespace fasterase
