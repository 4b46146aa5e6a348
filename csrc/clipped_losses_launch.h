// Launches the CUDA kernels of clipped_policy_loss and clipped_value_loss, see clipped_losses.cuh.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "element.h"

namespace rlhf_lightning {

// Device memory, `count` dense elements each.
struct ClippedLossArrays {
  const void* learned;
  const void* old;
  const void* target;
  Element type;  // of the three above
  void* loss;    // double for double operands, else float; so is slope
  bool* clipped;
  void* slope;  // d loss / d learned
  int64_t count;
};

// One launch each, or none for empty arrays. An infinite dual_clip or clip means that there is none.
cudaError_t launch_clipped_policy_loss(
    const ClippedLossArrays& arrays, double clip_low, double clip_high, double dual_clip, cudaStream_t stream);
cudaError_t launch_clipped_value_loss(const ClippedLossArrays& arrays, double clip, cudaStream_t stream);

// out = grad * slope, in the element type `type`. grad and slope are double where `type` is, else float. With same_grad, grad
// points to one number for all elements.
cudaError_t launch_clipped_loss_gradient(
    const void* grad, bool same_grad, const void* slope, Element type, void* out, int64_t count, cudaStream_t stream);

}  // namespace rlhf_lightning
