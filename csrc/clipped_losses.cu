// The backward of both clipped losses on the GPU: out = grad * slope, elementwise.
//
// Launch: one thread for each 16-byte vector of `slope`, or for each element where an address is not aligned; blocks of 256
// threads in a one-dimensional grid. A thread loads its elements of grad and slope, multiplies, and stores the product.
#include "clipped_losses.cuh"

namespace rlhf_lightning {
namespace {

template <int n, typename T>
__device__ __forceinline__ void gradient_at(
    const Compute<T>* grad, bool same_grad, const Compute<T>* slope, T* out, int64_t at) {
  using C = Compute<T>;
  const auto slopes = load<n>(slope + at);
  Vector<C, n> grads{};
  if (!same_grad) grads = load<n>(grad + at);
  const C same = same_grad ? load<1>(grad).at[0] : C(0);
  Vector<T, n> product;
#pragma unroll
  for (int i = 0; i < n; ++i) product.at[i] = from_compute<T>((same_grad ? same : grads.at[i]) * slopes.at[i]);
  store<n>(out + at, product);
}

template <int n, typename T>
__global__ void __launch_bounds__(kLossThreads) gradient_kernel(
    const Compute<T>* grad, bool same_grad, const Compute<T>* slope, T* out, int64_t count) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kLossThreads + threadIdx.x) * n;
  if (at + n <= count) {
    gradient_at<n>(grad, same_grad, slope, out, at);
  } else {
    for (int64_t i = at; i < count; ++i) gradient_at<1>(grad, same_grad, slope, out, i);
  }
}

template <typename T>
cudaError_t launch_gradient(
    const void* grad, bool same_grad, const void* slope, void* out, int64_t count, cudaStream_t stream) {
  using C = Compute<T>;
  constexpr int n = kVector<C>;
  const bool in_vectors = (same_grad || aligned(grad)) && aligned(slope) && aligned(out);
  const auto kernel = in_vectors ? gradient_kernel<n, T> : gradient_kernel<1, T>;
  const Grid blocks = loss_blocks(count, in_vectors ? n : 1);
  return launch(
      kernel, blocks, kLossThreads, 0, stream, static_cast<const C*>(grad), same_grad,
      static_cast<const C*>(slope), static_cast<T*>(out), count);
}

}  // namespace

cudaError_t launch_clipped_loss_gradient(
    const void* grad, bool same_grad, const void* slope, Element type, void* out, int64_t count, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  switch (type) {
    case Element::kFloat: return launch_gradient<float>(grad, same_grad, slope, out, count, stream);
    case Element::kBfloat16: return launch_gradient<__nv_bfloat16>(grad, same_grad, slope, out, count, stream);
    case Element::kHalf: return launch_gradient<__half>(grad, same_grad, slope, out, count, stream);
    default: return launch_gradient<double>(grad, same_grad, slope, out, count, stream);
  }
}

}  // namespace rlhf_lightning
