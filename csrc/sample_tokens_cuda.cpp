// Sampling tokens from CUDA tensors: checks, allocates, sets the device, and launches the kernel of sample_tokens.cu.
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "check.h"
#include "cuda_tensors.h"
#include "sample_tokens.h"
#include "sample_tokens_launch.h"

namespace rlhf_lightning {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> sample_tokens_cuda(
    const at::Tensor& logits, const at::Tensor& draws, double temperature, int64_t top_k, double top_p) {
  check_sample_tokens(logits, draws, temperature, top_k, top_p);
  const c10::cuda::CUDAGuard guard(logits.device());
  const auto x = logits.stride(1) == 1 ? logits : logits.contiguous();
  const auto u = draws.contiguous();
  const auto options = x.options().dtype(compute_type({x}));
  auto tokens = at::empty({x.size(0)}, x.options().dtype(at::kLong));
  auto log_probs = at::empty({x.size(0)}, options), entropy = at::empty({x.size(0)}, options);
  const SampleArrays arrays{x.const_data_ptr(), element_type(x.scalar_type()), x.size(0), x.size(1), x.stride(0),
                            u.const_data_ptr<double>(), tokens.mutable_data_ptr<int64_t>(),
                            log_probs.mutable_data_ptr(), entropy.mutable_data_ptr()};
  check_launch(
      "sample_tokens", launch_sample_tokens(arrays, temperature, top_k, top_p, c10::cuda::getCurrentCUDAStream()));
  return {tokens, log_probs, entropy};
}

}  // namespace

TORCH_LIBRARY_IMPL(rlhf_lightning, CUDA, m) { m.impl("sample_tokens", &sample_tokens_cuda); }

}  // namespace rlhf_lightning
