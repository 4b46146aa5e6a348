// A sum of matrix products, in float32 where the operands have 16 bits.
#pragma once

#include <ATen/ATen.h>

namespace rlhf_lightning {

// sum += a b, for contiguous matrices on the CPU. Where a and b are bfloat16 or float16, sum is float32, and the product is
// never rounded to 16 bits.
void add_product(at::Tensor& sum, const at::Tensor& a, const at::Tensor& b);

}  // namespace rlhf_lightning
