// PPO's clipped value loss on the GPU: the contract is in rlhf_lightning/ops/clipped_value_loss.py. The arithmetic adds no
// product to anything, so the compiler fuses nothing, and the results are the same bits as on the CPU.
//
// Launch: see clipped_losses.cuh. This file says what a thread computes for one element.
#include "clipped_losses.cuh"

namespace rlhf_lightning {
namespace {

// The comparisons let a NaN through.
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
    // Within the clip range both predictions are equal, so old + (value - old) must not count as clipped by rounding.
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
