// What token_log_probs and linear_token_log_probs share on CUDA tensors: from tensors to token_log_probs_launch.h and back.
#pragma once

#include <ATen/ATen.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda_tensors.h"
#include "softmax_rows.h"
#include "token_log_probs_launch.h"

namespace rlhf_lightning {

// Collects the states of all rows, one part of the columns at a time.
class RowStates {
 public:
  // For `rows` rows of logits of `options`, with states_count states a row.
  RowStates(const char* op, const at::TensorOptions& options, int64_t rows, int64_t states_count)
      : op_(op), type_(element_type(c10::typeMetaToScalarType(options.dtype()))), states_count_(states_count),
        states_(at::empty({states_count * rows * softmax_state_bytes(type_)}, options.dtype(at::kByte))),
        token_logits_(at::empty({rows}, options.dtype(type_ == Element::kDouble ? at::kDouble : at::kFloat))) {}

  // Adds the next part; parts come in the order of the vocabulary.
  void add(const LogitRows& logits, const at::Tensor& tokens, double temperature) {
    auto* here = static_cast<char*>(states_.mutable_data_ptr()) + done_ * logits.count * softmax_state_bytes(type_);
    check_launch(
        op_, softmax_statistics(
                 logits, tokens.const_data_ptr<int64_t>(), temperature, here, token_logits_.mutable_data_ptr(),
                 c10::cuda::getCurrentCUDAStream()));
    done_ += softmax_states(type_, logits.columns);
  }

  void write(const at::Tensor& tokens, int64_t vocabulary, double temperature, RowResults& results) const {
    TORCH_INTERNAL_ASSERT(done_ == states_count_);
    check_launch(
        op_, softmax_results(
                 type_, states_.const_data_ptr(), states_count_, token_logits_.const_data_ptr(),
                 tokens.const_data_ptr<int64_t>(), vocabulary, tokens.numel(), temperature,
                 {results.log_probs.mutable_data_ptr(), results.entropy.mutable_data_ptr(),
                  results.shift.mutable_data_ptr(), results.log_sum.mutable_data_ptr()},
                 c10::cuda::getCurrentCUDAStream()));
  }

 private:
  const char* op_;
  Element type_;
  int64_t states_count_, done_ = 0;
  at::Tensor states_, token_logits_;
};

// The gradients and saved results of all rows, dense and of the compute dtype. It keeps them alive until the launch.
class RowGradientInputs {
 public:
  RowGradientInputs(
      at::ScalarType type, const at::Tensor& grad_log_probs, const at::Tensor& grad_entropy, const at::Tensor& entropy,
      const at::Tensor& shift, const at::Tensor& log_sum)
      : dense_{grad_log_probs, grad_entropy, entropy, shift, log_sum} {
    for (auto& x : dense_) x = x.to(type).contiguous();
  }
  RowInputs pointers() const {
    return {dense_[0].const_data_ptr(), dense_[1].const_data_ptr(), dense_[2].const_data_ptr(),
            dense_[3].const_data_ptr(), dense_[4].const_data_ptr()};
  }

 private:
  std::array<at::Tensor, 5> dense_;
};

}  // namespace rlhf_lightning
