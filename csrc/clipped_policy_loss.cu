// PPO's clipped surrogate loss on the GPU: the contract is in rlhf_lightning/ops/clipped_policy_loss.py.
//
// Launch: see clipped_losses.cuh. This file says what a thread computes for one element.
#include "clipped_losses.cuh"

namespace rlhf_lightning {
namespace {

// The comparisons let a NaN through.
template <typename C>
struct PolicyLossOf {
  C low;   // 1 - clip_low
  C high;  // 1 + clip_high
  C dual_clip;

  __device__ LossAt<C> operator()(C log_prob, C old_log_prob, C advantage) const {
    constexpr C kLimit = 20;
    const C log_ratio = log_prob - old_log_prob;
    const bool far = log_ratio < -kLimit || log_ratio > kLimit;
    const C ratio = exp(far ? (log_ratio < 0 ? -kLimit : kLimit) : log_ratio);
    const C negated = -advantage;
    const C surrogate = negated * ratio;
    const C raised = ratio < low ? low : ratio;
    const C bounded = negated * (raised > high ? high : raised);
    const bool clipped = bounded > surrogate;
    const C loss = clipped ? bounded : surrogate;
    const C bound = dual_clip * negated;
    const bool dual = negated > 0 && loss > bound;
    return {dual ? bound : loss, clipped, clipped || dual || far ? C(0) : surrogate};
  }
};

template <typename C>
PolicyLossOf<C> policy_loss(double clip_low, double clip_high, double dual_clip) {
  return {static_cast<C>(1 - clip_low), static_cast<C>(1 + clip_high), static_cast<C>(dual_clip)};
}

}  // namespace

cudaError_t launch_clipped_policy_loss(
    const ClippedLossArrays& arrays, double clip_low, double clip_high, double dual_clip, cudaStream_t stream) {
  return launch_losses_of(
      arrays, policy_loss<float>(clip_low, clip_high, dual_clip), policy_loss<double>(clip_low, clip_high, dual_clip),
      stream);
}

}  // namespace rlhf_lightning
