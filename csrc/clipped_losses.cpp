// What both clipped losses do on the CPU: they check the operands, allocate the results, and multiply the incoming gradient
// by the slope. with_gradient() adds the backward to a loss on any device.
#include "clipped_losses.h"

#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <string>

#include "check.h"
#include "kernels.h"
#include "operation.h"

namespace rlhf_lightning {

void check_clipped_loss(const char* op, NamedTensor learned, NamedTensor old, NamedTensor target) {
  check_float(op, learned.name, learned.tensor);
  for (const auto& other : {old, target}) {
    check_float(op, other.name, other.tensor);
    check_shape(op, other.name, other.tensor, learned.tensor.sizes(), learned.name);
    check_device(op, other.name, other.tensor, learned.tensor, learned.name);
  }
}

ClippedLossTensors clipped_loss_tensors(const char* op, NamedTensor learned, NamedTensor old, NamedTensor target) {
  check_clipped_loss(op, learned, old, target);
  const auto type = compute_type({learned.tensor, old.tensor, target.tensor});
  const auto ready = [type](const at::Tensor& x) { return x.to(type).contiguous(); };
  const auto x = ready(learned.tensor);
  return {x, ready(old.tensor), ready(target.tensor), at::empty(x.sizes(), x.options()),
          at::empty(x.sizes(), x.options().dtype(at::kBool)), at::empty(x.sizes(), x.options())};
}

namespace {
template <typename T, typename Kernel>
void multiply(Kernel kernel, const at::Tensor& grad, bool same_grad, const at::Tensor& slope, at::Tensor& out) {
  const LossGradient<T> arguments{
      grad.const_data_ptr<T>(), same_grad, slope.const_data_ptr<T>(), out.mutable_data_ptr()};
  at::parallel_for(0, slope.numel(), kLossGrain, [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
}
}  // namespace

at::Tensor clipped_loss_backward_composed(const at::Tensor& grad_loss, const at::Tensor& slope, at::ScalarType dtype) {
  return (grad_loss * slope).to(dtype);
}

ClippedLossBackward clipped_loss_backward_tensors(
    const at::Tensor& grad_loss, const at::Tensor& slope, at::ScalarType dtype) {
  constexpr const char* name = "clipped_loss_backward";
  check_float(name, "slope", slope);
  check_dtype(name, "grad_loss", grad_loss, slope.scalar_type());
  check_shape(name, "grad_loss", grad_loss, slope.sizes(), "slope");
  check_device(name, "grad_loss", grad_loss, slope, "slope");
  const bool single = slope.scalar_type() == at::kFloat, half = dtype == at::kBFloat16 || dtype == at::kHalf;
  if (slope.numel() == 0 || (dtype != slope.scalar_type() && !(single && half))) return {};
  const auto strides = grad_loss.strides();
  const bool same = std::all_of(strides.begin(), strides.end(), [](int64_t stride) { return stride == 0; });
  const auto s = slope.contiguous();
  return {same ? grad_loss : grad_loss.contiguous(), same, s, at::empty(s.sizes(), s.options().dtype(dtype))};
}

at::Tensor clipped_loss_backward(const at::Tensor& grad_loss, const at::Tensor& slope, at::ScalarType dtype) {
  auto t = clipped_loss_backward_tensors(grad_loss, slope, dtype);
  if (!t.out.defined()) return clipped_loss_backward_composed(grad_loss, slope, dtype);
  const Kernels& k = kernels();
  if (dtype == at::kDouble) {
    multiply<double>(k.loss_double.gradient, t.grad, t.same, t.slope, t.out);
  } else {
    const auto kernel = dtype == at::kFloat      ? k.loss_float.gradient
                        : dtype == at::kBFloat16 ? k.gradient_bfloat16
                                                 : k.gradient_float16;
    multiply<float>(kernel, t.grad, t.same, t.slope, t.out);
  }
  return t.out;
}

namespace {
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct ClippedLossFunction : torch::autograd::Function<ClippedLossFunction> {
  static variable_list forward(
      AutogradContext* ctx, const at::Tensor& learned, const char* op, const std::function<ClippedLoss()>& compute) {
    auto [loss, clipped, slope] = compute();
    ctx->mark_non_differentiable({clipped, slope});
    ctx->set_materialize_grads(false);  // clipped and slope have no gradients: do not fill in zeros
    ctx->save_for_backward({slope});
    ctx->saved_data["dtype"] = static_cast<int64_t>(learned.scalar_type());
    ctx->saved_data["op"] = std::string(op);
    return {loss, clipped, slope};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        !at::GradMode::is_enabled(), ctx->saved_data["op"].toStringRef(),
        ": gradients are first order, reverse mode only, this one was asked for with create_graph=True");
    if (!grads[0].defined()) return {at::Tensor(), at::Tensor(), at::Tensor()};
    static const auto op = operation<decltype(clipped_loss_backward)>("rlhf_lightning::clipped_loss_backward");
    const auto dtype = static_cast<at::ScalarType>(ctx->saved_data["dtype"].toInt());
    const at::AutoDispatchBelowADInplaceOrView guard;
    return {op.call(grads[0], ctx->get_saved_variables()[0], dtype), at::Tensor(), at::Tensor()};
  }
};
}  // namespace

ClippedLoss with_gradient(const char* op, const at::Tensor& learned, const std::function<ClippedLoss()>& compute) {
  const auto results = ClippedLossFunction::apply(learned, op, compute);
  return {results[0], results[1], results[2]};
}

}  // namespace rlhf_lightning
