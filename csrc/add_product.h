// A sum of matrix products whose operands are shorter than the sum.
#pragma once

#include <ATen/ATen.h>

namespace rlhf_lightning {

// sum += a b, contiguous matrices on the CPU. Of bfloat16 or float16 operands the sum is float32, and no rounding to
// 16 bits comes between.
void add_product(at::Tensor& sum, const at::Tensor& a, const at::Tensor& b);

}  // namespace rlhf_lightning
