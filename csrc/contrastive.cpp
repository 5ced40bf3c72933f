// The contrastive operator on CPUs. fasterase/ops/contrastive/README.md derives the formulas; the
// names here are those used there. Registered as fasterase::contrastive_cpu and its backward, whose
// schemas are in fasterase/ops/contrastive/operator.py.

#include <torch/library.h>

#include "backward.h"
#include "forward.h"
#include "workspace.h"

namespace fasterase {
namespace {

using MaybeTensor = std::optional<Tensor>;

// Rows of unit stride, as the tiles read them.
Tensor readable(const Tensor& x) { return x.stride(1) == 1 ? x : x.contiguous(); }

template <typename T>
T number(const Tensor& scale) {
  return scale.to(c10::CppTypeToScalarType<T>::value).template item<T>();
}

// The features of all groups, as rows of groups are taken from them.
template <typename T>
struct Features {
  Tensor image, text;
  T scale;

  Features(const Tensor& image, const Tensor& text, const Tensor& scale)
      : image(readable(image)), text(readable(text)), scale(number<T>(scale)) {}

  Logits<T> group(Span rows) const {
    return {image.narrow(0, rows.begin, rows.size), text.narrow(0, rows.begin, rows.size), scale};
  }
};

template <typename T>
std::vector<Features<T>> all_features(const Tensor& image, const Tensor& text, const Tensor& scale,
                                      const MaybeTensor& ref_image, const MaybeTensor& ref_text,
                                      const MaybeTensor& ref_scale) {
  std::vector<Features<T>> features;
  features.emplace_back(image, text, scale);
  if (ref_image) features.emplace_back(*ref_image, *ref_text, *ref_scale);
  return features;
}

// Statistics [matrices, 3 (shift, sums, off), 2 (rows, columns), N] from row `begin` on.
template <typename T>
Softmax<T> softmax_of(const Tensor& statistics, int64_t matrix, int64_t begin) {
  const int64_t total = statistics.size(3);
  T* data = statistics.mutable_data_ptr<T>() + matrix * 6 * total + begin;
  Softmax<T> softmax{};
  for (int way = 0; way < 2; ++way) {
    softmax.shift[way] = data + way * total;
    softmax.sums[way] = data + (2 + way) * total;
    softmax.off[way] = data + (4 + way) * total;
  }
  return softmax;
}

// How many parts of rows fit into `room` elements, all matrices together.
int64_t parts_within(const Parts& parts, int64_t matrices, int64_t room) {
  int64_t fit = 0;
  while (fit < parts.count && matrices * parts[fit].begin * parts.n +
                                      matrices * parts[fit].size * parts.n <= room) ++fit;
  return fit;
}

// The kept elements of `count` parts.
int64_t kept_size(const Parts& parts, int64_t matrices, int64_t count) {
  return count == 0 ? 0 : matrices * (parts[count - 1].begin + parts[count - 1].size) * parts.n;
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const std::vector<Features<T>>& features,
                                                   at::IntArrayRef groups, int64_t tile,
                                                   int64_t room) {
  const auto type = c10::CppTypeToScalarType<T>::value;
  const int64_t total = features[0].image.size(0), matrices = features.size();
  const int64_t width = features[0].image.size(1);
  Tensor losses = at::empty({2 * matrices, total}, type);
  Tensor statistics = at::empty({matrices, 3, 2, total}, type);
  Tensor kept = Workspace::instance().take<T>(room);
  Tensor plan = at::empty({int64_t(groups.size()), 2}, at::kLong);
  T* kept_next = kept.mutable_data_ptr<T>();
  int64_t begin = 0;
  for (size_t g = 0; g < groups.size(); ++g) {
    const int64_t n = groups[g];
    Group<T> group{};
    group.parts = Parts::choose(n, width, tile);
    for (int64_t k = 0; k < matrices; ++k) {
      group.matrices.push_back(features[k].group({begin, n}));
      group.softmaxes.push_back(softmax_of<T>(statistics, k, begin));
    }
    group.kept = kept_next;
    group.kept_matrices = matrices;
    group.kept_parts = n < 2 ? 0 : parts_within(group.parts, matrices, room);
    const int64_t used = kept_size(group.parts, matrices, group.kept_parts);
    kept_next += used;
    room -= used;
    compute_losses(group, losses.mutable_data_ptr<T>() + begin, total);
    int64_t* planned = plan.mutable_data_ptr<int64_t>() + 2 * g;
    planned[0] = group.parts.count;
    planned[1] = group.kept_parts;
    begin += n;
  }
  std::fill_n(kept_next, room, T(0));  // an operator returns no memory that it never wrote
  return {losses, statistics, kept, plan};
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& upstream,
                                            const std::vector<Features<T>>& features,
                                            const Tensor& statistics, const Tensor& kept,
                                            const Tensor& plan, at::IntArrayRef groups,
                                            Wanted wanted, bool rounded) {
  const auto type = c10::CppTypeToScalarType<T>::value;
  const int64_t total = features[0].image.size(0), matrices = features.size();
  const Tensor weights = upstream.to(type).contiguous();
  const T unit = largest_magnitude(weights.const_data_ptr<T>(), weights.numel());
  const bool from_text = wanted.scale && wanted.text && !wanted.image;
  const bool makes_image = wanted.image || (wanted.scale && !wanted.text);
  const auto gradient = [&](const Tensor& side, bool made) {
    return at::empty({made ? side.size(0) : 0, side.size(1)}, type);
  };
  Tensor d_image = gradient(features[0].image, makes_image);
  Tensor d_text = gradient(features[0].text, wanted.text);
  double d_scale = 0;
  const T* kept_next = kept.const_data_ptr<T>();
  int64_t begin = 0;
  for (size_t g = 0; g < groups.size(); ++g) {
    const int64_t n = groups[g];
    const int64_t* planned = plan.const_data_ptr<int64_t>() + 2 * g;
    Group<T> group{};
    group.parts = {n, planned[0]};
    group.kept = const_cast<T*>(kept_next);
    group.kept_parts = planned[1];
    group.kept_matrices = matrices;
    group.filled = true;
    kept_next += kept_size(group.parts, matrices, group.kept_parts);
    const Weights<T> upstream_of{weights.const_data_ptr<T>() + begin, total, n, unit};
    const bool any = upstream_of.used(0) || (matrices > 1 && upstream_of.used(1));
    const int64_t used = matrices > 1 && upstream_of.used(1) ? 2 : 1;
    for (int64_t k = 0; any && k < used; ++k) {
      group.matrices.push_back(features[k].group({begin, n}));
      group.softmaxes.push_back(softmax_of<T>(statistics, k, begin));
      group.softmaxes[k].shared = one_number(group.softmaxes[k].shift, n);
    }
    Gradients<T> gradients{makes_image ? d_image.narrow(0, begin, n) : Tensor(),
                           wanted.text ? d_text.narrow(0, begin, n) : Tensor()};
    if (any && n > 0) {
      d_scale += compute_gradients(group, upstream_of, gradients, from_text);
    } else {
      for (Tensor* side : {&gradients.image, &gradients.text}) {
        if (side->defined()) side->zero_();
      }
    }
    begin += n;
  }
  const auto returned = [&](const Tensor& made, bool is_wanted, const Tensor& like) {
    const auto precision = rounded ? like.scalar_type() : type;
    return is_wanted ? made.to(precision) : at::empty({0}, precision);
  };
  return {returned(d_image, wanted.image, features[0].image),
          returned(d_text, wanted.text, features[0].text),
          at::scalar_tensor(d_scale, type)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> contrastive_cpu(
    const Tensor& image, const Tensor& text, const Tensor& scale, const MaybeTensor& ref_image,
    const MaybeTensor& ref_text, const MaybeTensor& ref_scale, at::IntArrayRef groups,
    int64_t tile, int64_t kept) {
  PlainTensors guard;
  return AT_DISPATCH_FLOATING_TYPES(scale.scalar_type(), "contrastive_cpu", [&] {
    return forward(
        all_features<scalar_t>(image, text, scale, ref_image, ref_text, ref_scale), groups, tile,
        kept);
  });
}

std::tuple<Tensor, Tensor, Tensor> contrastive_cpu_backward(
    const Tensor& upstream, const Tensor& image, const Tensor& text, const Tensor& scale,
    const MaybeTensor& ref_image, const MaybeTensor& ref_text, const MaybeTensor& ref_scale,
    const Tensor& statistics, const Tensor& kept, const Tensor& plan, at::IntArrayRef groups,
    bool wants_image, bool wants_text, bool wants_scale, bool rounded) {
  PlainTensors guard;
  return AT_DISPATCH_FLOATING_TYPES(scale.scalar_type(), "contrastive_cpu_backward", [&] {
    return backward(
        upstream, all_features<scalar_t>(image, text, scale, ref_image, ref_text, ref_scale),
        statistics, kept, plan, groups, Wanted{wants_image, wants_text, wants_scale}, rounded);
  });
}

}  // namespace
}  // namespace fasterase

TORCH_LIBRARY_IMPL(fasterase, CPU, m) {
  m.impl("contrastive_cpu", fasterase::contrastive_cpu);
  m.impl("contrastive_cpu_backward", fasterase::contrastive_cpu_backward);
}
