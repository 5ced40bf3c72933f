// The weighted total of a call, with gradients made in the forward pass: what
// fasterase/ops/contrastive/api.py does for any backend, without Python. Python code, met with cold
// caches once per step, takes longer than the products of 64 pairs.

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include "group.h"

namespace fasterase {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using MaybeTensor = std::optional<Tensor>;
using Sizes = c10::SymIntArrayRef;

// Called by the dispatcher, so that fake tensors and dispatch modes see it.
const auto& step_operator() {
  static const auto found =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("fasterase::contrastive_cpu_step", "")
          .typed<std::tuple<Tensor, Tensor, Tensor, Tensor>(
              const Tensor&, const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&,
              const MaybeTensor&, const MaybeTensor&, Sizes, bool, bool, bool, bool,
              const MaybeTensor&, int64_t, c10::SymInt, bool)>();
  return found;
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

class Weighted : public torch::autograd::Function<Weighted> {
 public:
  static constexpr size_t num_arguments = 12;

  static variable_list forward(AutogradContext* ctx, const Tensor& image, const Tensor& text,
                               const Tensor& scale, const Tensor& weights,
                               const MaybeTensor& ref_image, const MaybeTensor& ref_text,
                               const MaybeTensor& ref_scale, at::IntArrayRef groups,
                               const MaybeTensor& labels, int64_t tile, int64_t kept,
                               bool bf16) {
    PlainTensors guard;
    const auto [losses, d_image, d_text, d_scale] = step_operator().call(
        weights, image, text, scale, ref_image, ref_text, ref_scale,
        c10::fromIntArrayRefSlow(groups), image.requires_grad(), text.requires_grad(),
        scale.requires_grad(), /*rounded=*/false, labels, tile, kept, bf16);
    ctx->save_for_backward({d_image, d_text, d_scale});
    ctx->saved_data["dtypes"] =
        std::vector<int64_t>{int64_t(image.scalar_type()), int64_t(text.scalar_type()),
                             int64_t(scale.scalar_type())};
    ctx->mark_non_differentiable({losses});
    ctx->set_materialize_grads(false);
    return {(weights * losses).sum(), losses};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstreams) {
    variable_list gradients(num_arguments);
    const Tensor& upstream = upstreams[0];
    if (!upstream.defined()) return gradients;  // nobody uses the total
    // Before the guards: a checkpoint may compute them again here, with a graph.
    const variable_list made = ctx->get_saved_variables();
    {
      const at::AutoGradMode no_graph(false);
      PlainTensors guard;
      const std::vector<int64_t> dtypes = ctx->saved_data["dtypes"].toIntVector();
      // In place where nothing else will read them; vmap's tensors cannot be written into others.
      const auto keys = upstream.key_set();
      const bool is_mapped = keys.has(c10::DispatchKey::FuncTorchBatched) ||
                             keys.has(c10::DispatchKey::Batched);
      const bool is_last = !is_mapped && !torch::autograd::get_current_graph_task_keep_graph();
      // Of a plain `backward()`; read where there is certainly a value.
      const bool is_one = is_last && upstream.scalar_type() == at::kFloat && upstream.is_cpu() &&
                          upstream.has_storage() && !keys.has(c10::DispatchKey::Python) &&
                          *upstream.const_data_ptr<float>() == 1;
      for (size_t k = 0; k < made.size(); ++k) {
        if (!ctx->needs_input_grad(k)) continue;
        const Tensor scaled = is_one    ? made[k]
                              : is_last ? made[k].mul_(upstream)
                                        : made[k] * upstream;
        gradients[k] = scaled.to(at::ScalarType(dtypes[k]));
      }
    }
    if (at::GradMode::is_enabled()) refuse_second_derivative(gradients);
    return gradients;
  }
};

std::tuple<Tensor, Tensor> compute_weighted(const Tensor& weights, const Tensor& image,
                                            const Tensor& text, const Tensor& scale,
                                            const MaybeTensor& ref_image,
                                            const MaybeTensor& ref_text,
                                            const MaybeTensor& ref_scale, at::IntArrayRef groups,
                                            const MaybeTensor& labels, int64_t tile,
                                            int64_t kept, bool bf16) {
  variable_list found = Weighted::apply(image, text, scale, weights, ref_image, ref_text,
                                        ref_scale, groups, labels, tile, kept, bf16);
  return {found[0], found[1]};
}

}  // namespace
}  // namespace fasterase

TORCH_LIBRARY_IMPL(fasterase, CompositeImplicitAutograd, m) {
  m.impl("contrastive_cpu_weighted", fasterase::compute_weighted);
}
