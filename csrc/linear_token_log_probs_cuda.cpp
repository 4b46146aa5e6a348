// The LM head and token log-probabilities on CUDA tensors, forward and backward: torch multiplies the matrices, one chunk of
// the vocabulary at a time, and the kernels of token_log_probs.cu and token_log_probs_backward.cu do the rest.
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>

#include "check.h"
#include "linear_cross_entropy.h"
#include "softmax_rows_cuda.h"

namespace rlhf_lightning {
namespace {

constexpr const char* kName = "linear_token_log_probs";
constexpr int64_t kLogitsHeld = int64_t{1} << 24;  // logits held at a time, or 3% of all where that is more
constexpr int64_t kPercentHeld = 3;
constexpr int64_t kColumns = 1024;  // widths are multiples: the product fills its last wave; see docs/operators.md
constexpr int64_t kNarrowest = 256;

// The columns of a chunk of the vocabulary. A chunk takes all rows: the gradient of its part of the weight is then one
// product, and only the gradient of hidden is a sum over chunks.
int64_t chunk_width(int64_t rows, int64_t vocabulary) {
  const int64_t most = std::max(vocabulary * kPercentHeld / 100, kLogitsHeld / rows);
  if (most >= vocabulary) return vocabulary;
  const int64_t multiple = most < kColumns ? kNarrowest : kColumns;
  return std::max(kNarrowest, most / multiple * multiple);
}

// Computes the logits of one chunk at a time, in a buffer whose rows start at multiples of 16 bytes.
class Chunks {
 public:
  Chunks(const at::Tensor& hidden, const at::Tensor& weight)
      : hidden_(hidden), weight_(weight), vocabulary_(weight.size(0)),
        width_(chunk_width(hidden.size(0), vocabulary_)),
        buffer_(at::empty({hidden.size(0), (width_ + 7) / 8 * 8}, hidden.options())) {}

  // Calls f(first column, the chunk's weight, its logits) for each chunk, in the order of the vocabulary.
  template <typename F>
  void each(const F& f) const {
    for (int64_t first = 0; first < vocabulary_; first += width_) {
      const int64_t columns = std::min(width_, vocabulary_ - first);
      auto logits = buffer_.narrow(1, 0, columns);
      const auto weight = weight_.narrow(0, first, columns);
      at::mm_out(logits, hidden_, weight.t());
      f(first, weight, logits);
    }
  }
  LogitRows rows(const at::Tensor& logits, int64_t first) const {
    return {logits.const_data_ptr(), element_type(logits.scalar_type()), logits.size(0), logits.size(1), first,
            logits.size(0), 0, logits.stride(0)};
  }
  int64_t states_count() const {
    const auto type = element_type(hidden_.scalar_type());
    const int64_t last = vocabulary_ % width_;
    return vocabulary_ / width_ * softmax_states(type, width_) + (last > 0 ? softmax_states(type, last) : 0);
  }
  int64_t count() const { return (vocabulary_ + width_ - 1) / width_; }

 private:
  const at::Tensor &hidden_, &weight_;
  int64_t vocabulary_, width_;
  at::Tensor buffer_;
};

// A sum of products a @ b. Several products of 16-bit operands are summed in float32 and rounded once.
class ProductSum {
 public:
  ProductSum(at::IntArrayRef sizes, const at::TensorOptions& options, int64_t count)
      : type_(c10::typeMetaToScalarType(options.dtype())),
        wide_(count > 1 && (type_ == at::kBFloat16 || type_ == at::kHalf)),
        sum_(at::empty(sizes, wide_ ? options.dtype(at::kFloat) : options)) {}

  void add(const at::Tensor& a, const at::Tensor& b) {
    if (wide_) {
      started_ ? at::addmm_out(sum_, sum_, a, b, at::kFloat) : at::mm_out(sum_, a, b, at::kFloat);
    } else {
      started_ ? at::addmm_out(sum_, sum_, a, b) : at::mm_out(sum_, a, b);
    }
    started_ = true;
  }
  at::Tensor total() const { return sum_.to(type_); }

 private:
  at::ScalarType type_;
  bool wide_, started_ = false;
  at::Tensor sum_;
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& tokens, double temperature) {
  check_language_model_head(kName, hidden, weight, tokens, temperature);
  const c10::cuda::CUDAGuard guard(hidden.device());
  const auto t = tokens.contiguous();
  auto results = empty_results(t.sizes(), hidden.options().dtype(compute_type({hidden})));
  if (t.numel() > 0) {
    const Chunks chunks(hidden, weight);
    RowStates states(kName, hidden.options(), t.numel(), chunks.states_count());
    chunks.each([&](int64_t first, const at::Tensor&, const at::Tensor& logits) {
      states.add(chunks.rows(logits, first), t, temperature);
    });
    states.write(t, weight.size(0), temperature, results);
  }
  return {results.log_probs, results.entropy, results.shift, results.log_sum};
}

std::tuple<at::Tensor, at::Tensor> backward(
    const at::Tensor& grad_log_probs, const at::Tensor& grad_entropy, const at::Tensor& hidden,
    const at::Tensor& weight, const at::Tensor& tokens, const at::Tensor& entropy, const at::Tensor& shift,
    const at::Tensor& log_sum, double temperature, bool hidden_needed, bool weight_needed) {
  check_language_model_head(kName, hidden, weight, tokens, temperature);
  check_rows(kName, {grad_log_probs, grad_entropy, entropy, shift, log_sum}, tokens, hidden, "hidden");
  const c10::cuda::CUDAGuard guard(hidden.device());
  const auto t = tokens.contiguous();
  const auto of = [](bool needed, const at::Tensor& x) { return needed ? x.sizes().vec() : std::vector<int64_t>{0}; };
  auto grad_weight = at::empty(of(weight_needed, weight), weight.options());
  if (t.numel() == 0) return {at::zeros(of(hidden_needed, hidden), hidden.options()), grad_weight.zero_()};
  const RowGradientInputs rows(compute_type({hidden}), grad_log_probs, grad_entropy, entropy, shift, log_sum);
  const Chunks chunks(hidden, weight);
  ProductSum grad_hidden(of(hidden_needed, hidden), hidden.options(), hidden_needed ? chunks.count() : 1);
  chunks.each([&](int64_t first, const at::Tensor& weights, const at::Tensor& chunk) {
    check_launch(  // the gradient overwrites the logits
        kName, softmax_gradient(
                   chunks.rows(chunk, first), t.const_data_ptr<int64_t>(), temperature, rows.pointers(),
                   chunk.mutable_data_ptr(), chunk.stride(0), c10::cuda::getCurrentCUDAStream()));
    if (hidden_needed) grad_hidden.add(chunk, weights);
    if (weight_needed) {
      auto out = grad_weight.narrow(0, first, chunk.size(1));
      at::mm_out(out, chunk.t(), hidden);
    }
  });
  return {grad_hidden.total(), grad_weight};
}

}  // namespace

TORCH_LIBRARY_IMPL(rlhf_lightning, CUDA, m) {
  m.impl("linear_token_log_probs", &forward);
  m.impl("linear_token_log_probs_backward", &backward);
  m.impl("linear_cross_entropy", &linear_cross_entropy);
}

}  // namespace rlhf_lightning
