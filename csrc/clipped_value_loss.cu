// PPO's clipped value loss on the GPU: the contract is in rlhf_lightning/ops/clipped_value_loss.py. No product is added
// to anything, so there is nothing to fuse: the results are the same bits as on the CPU.
#include "clipped_losses.cuh"

namespace rlhf_lightning {
namespace {

// Comparisons are written so that NaN passes through.
template <typename C>
struct ValueLossOf {
  C clip;

  __device__ LossAt<C> operator()(C value, C old_value, C target) const {
    const C error = value - target;
    const C free = C(0.5) * (error * error);
    const C moved = value - old_value;
    const C raised = moved < -clip ? -clip : moved;
    const C bounded_error = (old_value + (raised > clip ? clip : raised)) - target;
    const C bounded = C(0.5) * (bounded_error * bounded_error);
    // Within the clip range both are the same prediction: old + (value - old) must not win by a rounding error.
    const bool clipped = (moved < -clip || moved > clip) && bounded > free;
    return {clipped ? bounded : free, clipped, clipped ? C(0) : error};
  }
};

}  // namespace

cudaError_t launch_clipped_value_loss(const ClippedLossArrays& arrays, double clip, cudaStream_t stream) {
  return launch_losses_of(
      arrays, ValueLossOf<float>{static_cast<float>(clip)}, ValueLossOf<double>{clip}, stream);
}

}  // namespace rlhf_lightning
