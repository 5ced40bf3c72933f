// The losses of a call, followed by autograd, with the terms of repeated labels: what
// fasterase/ops/contrastive/autograd.py does for any backend, without Python. Python code, met with
// cold caches once a step, takes longer than the products of 64 pairs.

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/library.h>

#include "group.h"

namespace fasterase {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using MaybeTensor = std::optional<Tensor>;
using Sizes = c10::SymIntArrayRef;

// The operators are called by the dispatcher, so fake tensors and dispatch modes see them.
template <typename Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

const auto& forward_operator() {
  static const auto found = find_operator<std::tuple<Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&, const MaybeTensor&,
      const MaybeTensor&, Sizes, int64_t, c10::SymInt)>("fasterase::contrastive_cpu");
  return found;
}

const auto& backward_operator() {
  static const auto found = find_operator<std::tuple<Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&,
      const MaybeTensor&, const MaybeTensor&, const Tensor&, const Tensor&, const Tensor&, Sizes,
      bool, bool, bool, bool)>("fasterase::contrastive_cpu_backward");
  return found;
}

const auto& kinds_operator() {
  static const auto found =
      find_operator<Tensor(const Tensor&, Sizes)>("fasterase::label_kinds");
  return found;
}

const auto& terms_operator() {
  static const auto found = find_operator<Tensor(const Tensor&, const Tensor&, const Tensor&,
                                                 at::ScalarType)>("fasterase::label_terms");
  return found;
}

const auto& terms_backward_operator() {
  static const auto found = find_operator<std::tuple<Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, bool, bool)>(
      "fasterase::label_terms_backward");
  return found;
}

// The `Kinds` of labels; none where no label occurs twice in a group: the terms are 0 then.
MaybeTensor find_repeated(const Tensor& labels, at::IntArrayRef groups) {
  const Tensor kinds = kinds_operator().call(labels, c10::fromIntArrayRefSlow(groups));
  if (!at::isTensorSubclassLike(kinds)) {  // else it has no values
    const int64_t* const rows_of_kind = kinds.const_data_ptr<int64_t>() + 2 * kinds.size(1);
    const auto is_alone = [](int64_t rows) { return rows == 1; };
    if (std::all_of(rows_of_kind, rows_of_kind + kinds.size(1), is_alone)) return {};
  }
  return kinds;
}

// Gradients whose own derivative raises, as Python's once_differentiable makes them.
void refuse_second_derivative(variable_list& gradients) {
  variable_list copies;
  for (const Tensor& gradient : gradients) {
    if (gradient.defined()) copies.push_back(gradient.detach().requires_grad_());
  }
  const auto refuse = std::make_shared<torch::autograd::DelayedError>(
      "These losses are once_differentiable: backend='dense' alone has second derivatives.",
      copies.size());
  variable_list refusing = (*refuse)(std::move(copies));
  size_t next = 0;
  for (Tensor& gradient : gradients) {
    if (gradient.defined()) gradient = refusing[next++];
  }
}

class Losses : public torch::autograd::Function<Losses> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& image, const Tensor& text,
                        const Tensor& scale, const MaybeTensor& ref_image,
                        const MaybeTensor& ref_text, const MaybeTensor& ref_scale,
                        const MaybeTensor& kinds, at::IntArrayRef groups, int64_t tile,
                        int64_t kept) {
    PlainTensors guard;
    const auto [losses, statistics, logits, plan] =
        forward_operator().call(image, text, scale, ref_image, ref_text, ref_scale,
                                c10::fromIntArrayRefSlow(groups), tile, kept);
    Tensor terms;
    if (kinds) {
      terms = terms_operator().call(image, text, *kinds, scale.scalar_type());
      losses.narrow(0, 0, 2).addcmul_(scale, terms);
    }
    const auto or_undefined = [](const MaybeTensor& x) { return x.value_or(Tensor()); };
    ctx->save_for_backward({image, text, scale, or_undefined(ref_image), or_undefined(ref_text),
                            or_undefined(ref_scale), statistics, logits, plan,
                            or_undefined(kinds), terms});
    ctx->saved_data["groups"] = groups.vec();
    ctx->set_materialize_grads(false);
    return losses;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstreams) {
    constexpr size_t num_arguments = 10, num_differentiable = 3;
    variable_list gradients(num_arguments);
    const Tensor& upstream = upstreams[0];  // [2 or 4, N]
    if (!upstream.defined()) return gradients;  // nobody uses the losses
    bool wants[num_differentiable];
    for (size_t k = 0; k < num_differentiable; ++k) wants[k] = ctx->needs_input_grad(k);
    {
      const at::AutoGradMode no_graph(false);
      differentiate(ctx, upstream, wants, gradients);
    }
    for (size_t k = 0; k < num_differentiable; ++k) {
      if (!wants[k]) gradients[k] = Tensor();
    }
    if (at::GradMode::is_enabled()) refuse_second_derivative(gradients);
    return gradients;
  }

 private:
  static void differentiate(AutogradContext* ctx, const Tensor& upstream, const bool* wants,
                            variable_list& gradients) {
    PlainTensors guard;
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &image = saved[0], &text = saved[1], &scale = saved[2];
    const auto or_none = [](const Tensor& x) {
      return x.defined() ? MaybeTensor(x) : MaybeTensor();
    };
    const std::vector<int64_t> groups = ctx->saved_data["groups"].toIntVector();
    std::tie(gradients[0], gradients[1], gradients[2]) = backward_operator().call(
        upstream, image, text, scale, or_none(saved[3]), or_none(saved[4]), or_none(saved[5]),
        saved[6], saved[7], saved[8], c10::fromIntArrayRefSlow(groups), wants[0], wants[1],
        wants[2], /*rounded=*/true);
    const Tensor &kinds = saved[9], &terms = saved[10];
    if (!kinds.defined()) return;
    const Tensor of_ce = upstream.narrow(0, 0, 2);
    const auto [of_image, of_text] =
        terms_backward_operator().call(of_ce * scale, image, text, kinds, wants[0], wants[1]);
    if (wants[0]) gradients[0].add_(of_image);
    if (wants[1]) gradients[1].add_(of_text);
    if (wants[2]) gradients[2].add_((of_ce * terms).sum());
  }
};

// ce_row, ce_col and, with a reference, kl_row, kl_col, each [N].
std::vector<Tensor> compute_losses(const Tensor& image, const Tensor& text, const Tensor& scale,
                                   const MaybeTensor& ref_image, const MaybeTensor& ref_text,
                                   const MaybeTensor& ref_scale, at::IntArrayRef groups,
                                   const MaybeTensor& labels, int64_t tile, int64_t kept) {
  const MaybeTensor kinds = labels ? find_repeated(labels->to(image.device()), groups) : labels;
  return Losses::apply(image, text, scale, ref_image, ref_text, ref_scale, kinds, groups, tile,
                       kept)
      .unbind();
}

}  // namespace
}  // namespace fasterase

TORCH_LIBRARY_IMPL(fasterase, CompositeImplicitAutograd, m) {
  m.impl("contrastive_cpu_losses", fasterase::compute_losses);
}
