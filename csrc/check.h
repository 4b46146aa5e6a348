// Argument checks, in the words of rlhf_lightning/ops/checks.py: operator, argument, expected, got. Python checks first; these
// are for callers of torch.ops, so that no wrong argument reads or writes outside a tensor's memory.
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
      x.scalar_type() == type, op, ": ", name, " must be ", type == at::kLong ? "an " : "a ", dtype_name(type),
      " tensor, got ", dtype_name(x.scalar_type()));
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

// The range that float32 can carry: see LEAST_TEMPERATURE in rlhf_lightning/ops/checks.py. With greedy, 0 is allowed too.
inline void check_temperature(const char* op, double temperature, bool greedy = false) {
  TORCH_CHECK_VALUE(
      (temperature >= 1e-12 && temperature <= 1e12) || (greedy && temperature == 0), op, ": temperature must be ",
      greedy ? "0 or " : "", "a number in [1e-12, 1e12], got ", temperature);
}

inline void check_logits(const char* op, const at::Tensor& logits, const at::Tensor& tokens, double temperature) {
  check_float(op, "logits", logits);
  check_dtype(op, "tokens", tokens, at::kLong);
  TORCH_CHECK_VALUE(
      logits.dim() > 0 && logits.size(-1) > 0, op, ": logits must have shape [..., V] with V > 0, got shape ",
      logits.sizes());
  check_shape(op, "tokens", tokens, logits.sizes().slice(0, logits.dim() - 1), "logits without its last dimension");
  check_device(op, "tokens", tokens, logits, "logits");
  check_temperature(op, temperature);
}

inline void check_language_model_head(
    const char* op, const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& tokens, double temperature) {
  check_float(op, "hidden", hidden);
  check_float(op, "weight", weight);
  check_dtype(op, "tokens", tokens, at::kLong);
  check_dimensions(op, "hidden", hidden, "[N, H]", 2);
  check_dimensions(op, "weight", weight, "[V, H]", 2);
  TORCH_CHECK_VALUE(
      weight.size(0) > 0 && weight.size(1) == hidden.size(1), op, ": weight must have shape [V, ", hidden.size(1),
      "] with V > 0, got shape ", weight.sizes());
  check_shape(op, "tokens", tokens, hidden.sizes().slice(0, 1), "hidden without its last dimension");
  check_device(op, "weight", weight, hidden, "hidden");
  check_device(op, "tokens", tokens, hidden, "hidden");
  TORCH_CHECK_TYPE(
      weight.scalar_type() == hidden.scalar_type(), op, ": weight must have the dtype of hidden, ",
      dtype_name(hidden.scalar_type()), ", got ", dtype_name(weight.scalar_type()));
  check_temperature(op, temperature);
}

// Checks what the backwards of the two above take for each row. `whose` is the name of `first`.
inline void check_rows(
    const char* op, at::TensorList rows, const at::Tensor& tokens, const at::Tensor& first, const char* whose) {
  for (const auto& x : rows) {
    check_shape(op, "a gradient or saved result", x, tokens.sizes(), "tokens");
    check_device(op, "a gradient or saved result", x, first, whose);
  }
}

// float64 if any operand is, else float32.
inline at::ScalarType compute_type(at::TensorList operands) {
  for (const auto& x : operands) {
    if (x.scalar_type() == at::kDouble) return at::kDouble;
  }
  return at::kFloat;
}

}  // namespace rlhf_lightning
