// Generalised advantage estimation on CUDA tensors: checks, allocates, sets the device, and launches the kernel of gae.cu.
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "check.h"
#include "cuda_tensors.h"
#include "gae.h"
#include "gae_launch.h"

namespace rlhf_lightning {
namespace {

// Rewards and values of different types are first converted to the compute type.
std::tuple<at::Tensor, at::Tensor> gae_cuda(
    const at::Tensor& rewards, const at::Tensor& values, const at::Tensor& mask, double gamma, double lam) {
  check_gae(rewards, values, mask);
  const c10::cuda::CUDAGuard guard(rewards.device());
  const auto results = compute_type({rewards, values});
  const auto type = rewards.scalar_type() == values.scalar_type() ? rewards.scalar_type() : results;
  const auto r = rewards.to(type).contiguous(), v = values.to(type).contiguous(), m = mask.contiguous();
  auto advantages = at::empty(r.sizes(), r.options().dtype(results)), returns = at::empty_like(advantages);
  const GaeArrays arrays{r.const_data_ptr(), v.const_data_ptr(), element_type(type), m.const_data_ptr<bool>(),
                         advantages.mutable_data_ptr(), returns.mutable_data_ptr(), r.size(0), r.size(1)};
  check_launch("gae", launch_gae(arrays, gamma, lam, c10::cuda::getCurrentCUDAStream()));
  return {advantages, returns};
}

}  // namespace

TORCH_LIBRARY_IMPL(rlhf_lightning, CUDA, m) { m.impl("gae", &gae_cuda); }

}  // namespace rlhf_lightning
