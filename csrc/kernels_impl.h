// The kernels that kernels.h declares. Each kernels_*.cpp file includes it in its own namespace.
#include "masks.h"

#include "kernels_losses.h"
#include "kernels_softmax.h"

#include "kernels_sampling.h"  // after kernels_softmax.h, which it uses

Kernels table(const char* name) {
  return {name,
          {softmax_statistics<float>, softmax_gradient<float>},
          {softmax_statistics<Bfloat16>, softmax_gradient<Bfloat16>},
          {softmax_statistics<Float16>, softmax_gradient<Float16>},
          {softmax_statistics<double>, softmax_gradient<double>},
          {sample_row<float>},
          {sample_row<Bfloat16>},
          {sample_row<Float16>},
          {sample_row<double>},
          {gae_rows<float>, policy_loss<float>, value_loss<float>, loss_gradient<float, float>},
          {gae_rows<double>, policy_loss<double>, value_loss<double>, loss_gradient<double, double>},
          loss_gradient<float, Bfloat16>,
          loss_gradient<float, Float16>};
}
