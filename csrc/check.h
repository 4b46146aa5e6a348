// Argument checks, in the words of rlhf_lightning/ops/checks.py: operator, argument, expected, got. Python asks first; these
// stand for callers of torch.ops, whom no wrong argument may lead outside a tensor's memory.
#pragma once

#include <ATen/ATen.h>

namespace rlhf_lightning {

inline std::string dtype_name(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return "float32";
    case at::kDouble: return "float64";
    case at::kHalf: return "float16";
    case at::kBFloat16: return "bfloat16";
    case at::kBool: return "bool";
    case at::kLong: return "int64";
    case at::kInt: return "int32";
    default: return c10::toString(type);
  }
}

inline void check_float(const char* op, const char* name, const at::Tensor& x) {
  const auto type = x.scalar_type();
  TORCH_CHECK_TYPE(
      type == at::kFloat || type == at::kBFloat16 || type == at::kHalf || type == at::kDouble,
      op, ": ", name, " must be a float32, bfloat16, float16 or float64 tensor, got ", dtype_name(type));
}

inline void check_dtype(const char* op, const char* name, const at::Tensor& x, at::ScalarType type) {
  TORCH_CHECK_TYPE(
      x.scalar_type() == type, op, ": ", name, " must be a ", dtype_name(type), " tensor, got ",
      dtype_name(x.scalar_type()));
}

inline void check_dimensions(const char* op, const char* name, const at::Tensor& x, const char* shape, int64_t count) {
  TORCH_CHECK_VALUE(
      x.dim() == count, op, ": ", name, " must have ", count, " dimensions ", shape, ", got shape ", x.sizes());
}

inline void check_shape(
    const char* op, const char* name, const at::Tensor& x, at::IntArrayRef shape, const char* whose) {
  TORCH_CHECK_VALUE(
      x.sizes() == shape, op, ": ", name, " must have the shape of ", whose, ", ", shape, ", got shape ", x.sizes());
}

inline void check_device(
    const char* op, const char* name, const at::Tensor& x, const at::Tensor& other, const char* whose) {
  TORCH_CHECK_VALUE(
      x.device() == other.device(), op, ": ", name, " must be on the device of ", whose, ", ", other.device(), ", got ",
      x.device());
}

// float64 if any operand is, else float32.
inline at::ScalarType compute_type(at::TensorList operands) {
  for (const auto& x : operands) {
    if (x.scalar_type() == at::kDouble) return at::kDouble;
  }
  return at::kFloat;
}

}  // namespace rlhf_lightning
