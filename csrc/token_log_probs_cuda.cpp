// Log-probabilities of tokens and entropy on CUDA tensors: checks, allocates, sets the device, and launches the kernels of
// token_log_probs.cu and token_log_probs_backward.cu.
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "check.h"
#include "softmax_rows_cuda.h"

namespace rlhf_lightning {
namespace {

constexpr const char* kName = "token_log_probs";

// [..., V] as rows with an outer and an inner stride. Strides that two numbers cannot describe cost a copy; those of
// logits[:, :-1] do not.
struct DenseRows {
  explicit DenseRows(const at::Tensor& logits) : tensor(logits) {
    if (logits.stride(-1) == 1 && describe()) return;
    tensor = logits.contiguous();
    describe();
  }
  bool describe() {
    rows = {tensor.const_data_ptr(), element_type(tensor.scalar_type()), 1, tensor.size(-1), 0, 1, 0, 0};
    int levels = 0;
    for (int64_t d = tensor.dim() - 2; d >= 0; --d) {
      const int64_t size = tensor.size(d), stride = tensor.stride(d);
      rows.count *= size;
      if (size == 1) continue;
      if (levels == 1 && stride == rows.inner * rows.inner_stride) {
        rows.inner *= size;
      } else if (levels == 0) {
        rows.inner = size;
        rows.inner_stride = stride;
        levels = 1;
      } else if (levels == 1) {
        rows.outer_stride = stride;
        outer = size;
        levels = 2;
      } else if (stride == outer * rows.outer_stride) {
        outer *= size;
      } else {
        return false;
      }
    }
    return true;
  }
  at::Tensor tensor;
  LogitRows rows;
  int64_t outer = 1;
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward(
    const at::Tensor& logits, const at::Tensor& tokens, double temperature) {
  check_logits(kName, logits, tokens, temperature);
  const c10::cuda::CUDAGuard guard(logits.device());
  const DenseRows dense(logits);
  const auto t = tokens.contiguous();
  auto results = empty_results(t.sizes(), logits.options().dtype(compute_type({logits})));
  if (t.numel() > 0) {
    RowStates states(kName, logits.options(), t.numel(), softmax_states(dense.rows.type, dense.rows.columns));
    states.add(dense.rows, t, temperature);
    states.write(t, dense.rows.columns, temperature, results);
  }
  return {results.log_probs, results.entropy, results.shift, results.log_sum};
}

at::Tensor backward(
    const at::Tensor& grad_log_probs, const at::Tensor& grad_entropy, const at::Tensor& logits,
    const at::Tensor& tokens, const at::Tensor& entropy, const at::Tensor& shift, const at::Tensor& log_sum,
    double temperature) {
  check_logits(kName, logits, tokens, temperature);
  check_rows(kName, {grad_log_probs, grad_entropy, entropy, shift, log_sum}, tokens, logits, "logits");
  const c10::cuda::CUDAGuard guard(logits.device());
  const DenseRows dense(logits);
  const auto t = tokens.contiguous();
  const RowGradientInputs rows(compute_type({logits}), grad_log_probs, grad_entropy, entropy, shift, log_sum);
  auto out = at::empty(logits.sizes(), logits.options());
  if (t.numel() > 0) {
    check_launch(
        kName, softmax_gradient(
                   dense.rows, t.const_data_ptr<int64_t>(), temperature, rows.pointers(), out.mutable_data_ptr(),
                   dense.rows.columns, c10::cuda::getCurrentCUDAStream()));
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(rlhf_lightning, CUDA, m) {
  m.impl("token_log_probs", &forward);
  m.impl("token_log_probs_backward", &backward);
}

}  // namespace rlhf_lightning
