// The contrastive operator on CPUs. fasterase/ops/contrastive/README.md derives the formulas; names
// here follow it. Registers fasterase::contrastive_cpu and its backward, whose schemas are in
// fasterase/ops/contrastive/operator.py.

#include <limits>

#include <torch/library.h>

#include "backward.h"
#include "forward.h"
#include "workspace.h"

namespace fasterase {
namespace {

using MaybeTensor = std::optional<Tensor>;

// Rows of unit stride that do not overlap, no further apart than BLAS can read.
Tensor make_readable(const Tensor& x) {
  const bool is_readable = x.stride(1) == 1 && x.stride(0) >= x.size(1) &&
                           x.stride(0) <= std::numeric_limits<int>::max();
  return is_readable ? x : x.contiguous();
}

template <typename T>
T read_scale(const Tensor& scale) {
  return scale.to(c10::CppTypeToScalarType<T>::value).template item<T>();
}

// The features of all groups.
template <typename T>
struct Features {
  Tensor image, text;
  T scale;

  Features(const Tensor& image, const Tensor& text, const Tensor& scale)
      : image(make_readable(image)), text(make_readable(text)), scale(read_scale<T>(scale)) {}

  Logits<T> select(Span rows) const {
    return {image.narrow(0, rows.begin, rows.size), text.narrow(0, rows.begin, rows.size), scale};
  }
};

template <typename T>
std::vector<Features<T>> collect_features(const Tensor& image, const Tensor& text,
                                          const Tensor& scale, const MaybeTensor& ref_image,
                                          const MaybeTensor& ref_text,
                                          const MaybeTensor& ref_scale) {
  std::vector<Features<T>> features;
  features.emplace_back(image, text, scale);
  if (ref_image) features.emplace_back(*ref_image, *ref_text, *ref_scale);
  return features;
}

// Views statistics [matrices, 3 (shift, sums, miss probability), 2 (rows, columns), N] from row
// `begin` on.
template <typename T>
Softmax<T> view_softmax(const Tensor& statistics, int64_t matrix, int64_t begin) {
  const int64_t total = statistics.size(3);
  T* data = statistics.mutable_data_ptr<T>() + matrix * 6 * total + begin;
  Softmax<T> softmax{};
  for (int way = 0; way < 2; ++way) {
    softmax.shift[way] = data + way * total;
    softmax.sums[way] = data + (2 + way) * total;
    softmax.miss_probability[way] = data + (4 + way) * total;
  }
  return softmax;
}

template <typename T>
T find_largest(const Tensor& weights) {
  const T largest = largest_finite(weights.const_data_ptr<T>(), weights.numel());
  return largest == 0 ? T(1) : largest;
}

// The weights of the rows from `begin` on, of those of all losses, [2 or 4, N]; the largest of all.
template <typename T>
Weights<T> view_weights(const Tensor& weights, int64_t begin, int64_t n, T largest) {
  return {weights.const_data_ptr<T>() + begin, weights.size(1), n, largest};
}

// The kept elements of the first `count` parts.
int64_t count_kept(const Parts& parts, int64_t matrices, int64_t count) {
  return count == 0 ? 0 : matrices * (parts[count - 1].begin + parts[count - 1].size) * parts.n;
}

// How many parts of rows fit into `room` elements, all matrices together.
int64_t count_fitting_parts(const Parts& parts, int64_t matrices, int64_t room) {
  int64_t count = 0;
  while (count < parts.count && count_kept(parts, matrices, count + 1) <= room) ++count;
  return count;
}

// Labels as the tiles compare them.
MaybeTensor make_keys(const MaybeTensor& labels) {
  return labels ? labels->to(at::kLong).contiguous() : labels;
}

// A group of the rows `rows`, with its first `used` matrices; `kept` is how many may be kept.
template <typename T>
Group<T> make_group(const std::vector<Features<T>>& features, const Tensor& statistics,
                    const MaybeTensor& keys, Span rows, Parts parts, int64_t used, int64_t kept,
                    bool is_bf16) {
  Group<T> group{};
  group.parts = parts;
  group.is_bf16 = is_bf16;
  if (keys) group.labels = Labels<T>(keys->const_data_ptr<int64_t>() + rows.begin, rows.size);
  group.kept_matrices = kept;
  for (int64_t k = 0; k < used; ++k) {
    group.matrices.push_back(features[k].select(rows));
    group.softmaxes.push_back(view_softmax<T>(statistics, k, rows.begin));
  }
  return group;
}

// With `weights`, the KLs of a group whose KLs all have weight 0 are set to 0.
template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const std::vector<Features<T>>& features,
                                                   at::IntArrayRef groups,
                                                   const MaybeTensor& keys, int64_t tile,
                                                   int64_t room, bool is_bf16,
                                                   const MaybeTensor& weights = {}) {
  const auto type = c10::CppTypeToScalarType<T>::value;
  const int64_t total = features[0].image.size(0), matrices = features.size();
  const int64_t width = features[0].image.size(1);
  Tensor losses = at::empty({2 * matrices, total}, type);
  Tensor statistics = at::empty({matrices, 3, 2, total}, type);
  Tensor kept = Workspace::instance().take<T>(room);
  Tensor plan = at::empty({int64_t(groups.size()), 3}, at::kLong);
  T* kept_next = kept.mutable_data_ptr<T>();
  const T largest = weights ? find_largest<T>(*weights) : T(1);
  int64_t begin = 0;
  for (size_t g = 0; g < groups.size(); ++g) {
    const int64_t n = groups[g];
    const bool has_kl =
        matrices > 1 && !(weights && !view_weights<T>(*weights, begin, n, largest).has_loss(1));
    const int64_t used = 1 + has_kl;
    if (used < matrices) losses.narrow(0, 2, 2).narrow(1, begin, n).zero_();
    Group<T> group = make_group(features, statistics, keys, {begin, n},
                                Parts::choose(n, width, tile), used, used, is_bf16);
    group.kept = kept_next;
    group.kept_parts = n < 2 ? 0 : count_fitting_parts(group.parts, used, room);
    group.round_features();
    const int64_t filled = count_kept(group.parts, used, group.kept_parts);
    kept_next += filled;
    room -= filled;
    compute_losses(group, losses.mutable_data_ptr<T>() + begin, total);
    int64_t* planned = plan.mutable_data_ptr<int64_t>() + 3 * g;
    planned[0] = group.parts.count;
    planned[1] = group.kept_parts;
    planned[2] = group.kept_matrices;
    begin += n;
  }
  // An operator must not return uninitialised memory; a step returns none of it.
  if (!weights) std::fill_n(kept_next, room, T(0));
  return {losses, statistics, kept, plan};
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& upstream,
                                            const std::vector<Features<T>>& features,
                                            const Tensor& statistics, const Tensor& kept,
                                            const Tensor& plan, at::IntArrayRef groups,
                                            const MaybeTensor& keys, Wanted wanted, bool rounded,
                                            bool is_bf16) {
  const auto type = c10::CppTypeToScalarType<T>::value;
  const int64_t matrices = features.size();
  const Tensor weights = upstream.to(type).contiguous();
  const bool from_text = wanted.scale && wanted.text && !wanted.image;
  const bool makes_image = wanted.image || (wanted.scale && !wanted.text);
  const auto allocate = [&](const Tensor& side, bool is_made) {
    return at::empty({is_made ? side.size(0) : 0, side.size(1)}, type);
  };
  Tensor d_image = allocate(features[0].image, makes_image);
  Tensor d_text = allocate(features[0].text, wanted.text);
  double d_scale = 0;
  const T* kept_next = kept.const_data_ptr<T>();
  const T largest = find_largest<T>(weights);
  int64_t begin = 0;
  for (size_t g = 0; g < groups.size(); ++g) {
    const int64_t n = groups[g];
    const int64_t* planned = plan.const_data_ptr<int64_t>() + 3 * g;
    const Weights<T> group_weights = view_weights<T>(weights, begin, n, largest);
    const bool has_kl = matrices > 1 && group_weights.has_loss(1);
    const bool is_used = has_kl || group_weights.has_loss(0);
    Group<T> group = make_group(features, statistics, keys, {begin, n}, Parts{n, planned[0]},
                                is_used ? 1 + has_kl : 0, planned[2], is_bf16);
    for (Softmax<T>& softmax : group.softmaxes) {
      softmax.is_shared = has_one_shift(softmax.shift, n);
    }
    group.kept = const_cast<T*>(kept_next);
    group.kept_parts = planned[1];
    group.is_filled = true;
    group.round_features();
    kept_next += count_kept(group.parts, group.kept_matrices, group.kept_parts);
    Gradients<T> gradients{makes_image ? d_image.narrow(0, begin, n) : Tensor(),
                           wanted.text ? d_text.narrow(0, begin, n) : Tensor()};
    if (is_used && n > 0) {
      d_scale += compute_gradients(group, group_weights, gradients, from_text);
    } else {
      gradients.fill_with_zeros();
    }
    begin += n;
  }
  const auto convert = [&](const Tensor& gradient, bool is_wanted, const Tensor& side) {
    const auto precision = rounded ? side.scalar_type() : type;
    return is_wanted ? gradient.to(precision) : at::empty({0}, precision);
  };
  return {convert(d_image, wanted.image, features[0].image),
          convert(d_text, wanted.text, features[0].text),
          at::scalar_tensor(d_scale, type)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> contrastive_cpu(
    const Tensor& image, const Tensor& text, const Tensor& scale, const MaybeTensor& ref_image,
    const MaybeTensor& ref_text, const MaybeTensor& ref_scale, at::IntArrayRef groups,
    const MaybeTensor& labels, int64_t tile, int64_t kept, bool bf16) {
  PlainTensors guard;
  return AT_DISPATCH_FLOATING_TYPES(scale.scalar_type(), "contrastive_cpu", [&] {
    return forward(
        collect_features<scalar_t>(image, text, scale, ref_image, ref_text, ref_scale), groups,
        make_keys(labels), tile, kept, bf16);
  });
}

std::tuple<Tensor, Tensor, Tensor> contrastive_cpu_backward(
    const Tensor& upstream, const Tensor& image, const Tensor& text, const Tensor& scale,
    const MaybeTensor& ref_image, const MaybeTensor& ref_text, const MaybeTensor& ref_scale,
    const Tensor& statistics, const Tensor& kept, const Tensor& plan, at::IntArrayRef groups,
    bool wants_image, bool wants_text, bool wants_scale, bool rounded, const MaybeTensor& labels,
    int64_t, int64_t, bool bf16) {
  PlainTensors guard;
  return AT_DISPATCH_FLOATING_TYPES(scale.scalar_type(), "contrastive_cpu_backward", [&] {
    return backward(
        upstream, collect_features<scalar_t>(image, text, scale, ref_image, ref_text, ref_scale),
        statistics, kept, plan, groups, make_keys(labels),
        Wanted{wants_image, wants_text, wants_scale}, rounded, bf16);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> contrastive_cpu_step(
    const Tensor& weights, const Tensor& image, const Tensor& text, const Tensor& scale,
    const MaybeTensor& ref_image, const MaybeTensor& ref_text, const MaybeTensor& ref_scale,
    at::IntArrayRef groups, bool wants_image, bool wants_text, bool wants_scale, bool rounded,
    const MaybeTensor& labels, int64_t tile, int64_t kept, bool bf16) {
  PlainTensors guard;
  return AT_DISPATCH_FLOATING_TYPES(scale.scalar_type(), "contrastive_cpu_step", [&] {
    const auto features =
        collect_features<scalar_t>(image, text, scale, ref_image, ref_text, ref_scale);
    const Tensor upstream = weights.to(scale.scalar_type()).contiguous();
    const MaybeTensor keys = make_keys(labels);
    const auto [losses, statistics, logits, plan] =
        forward(features, groups, keys, tile, kept, bf16, upstream);
    const auto [d_image, d_text, d_scale] =
        backward(upstream, features, statistics, logits, plan, groups, keys,
                 Wanted{wants_image, wants_text, wants_scale}, rounded, bf16);
    return std::make_tuple(losses, d_image, d_text, d_scale);
  });
}

}  // namespace
}  // namespace fasterase

TORCH_LIBRARY_FRAGMENT(fasterase, m) { m.def("has_amx() -> bool", fasterase::has_amx); }

TORCH_LIBRARY_IMPL(fasterase, CPU, m) {
  m.impl("contrastive_cpu", fasterase::contrastive_cpu);
  m.impl("contrastive_cpu_backward", fasterase::contrastive_cpu_backward);
  m.impl("contrastive_cpu_step", fasterase::contrastive_cpu_step);
}
