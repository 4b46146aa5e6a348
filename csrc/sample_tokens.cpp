// Sampling a token from each row of logits on the CPU: checks the arguments and splits the rows over threads.
#include "sample_tokens.h"

#include <ATen/Parallel.h>

#include <memory>

#include "check.h"
#include "kernels.h"

namespace rlhf_lightning {

namespace {
constexpr const char* kName = "sample_tokens";

template <typename A>
struct Buffers {
  explicit Buffers(int64_t n, bool filtered) : parts(new SoftmaxState[(n + kSamplePart - 1) / kSamplePart]) {
    if (!filtered) return;
    values.reset(new A[n]);
    masses.reset(new A[n]);
    keys.reset(new typename OrderedKey<A>::type[n]);
    index.reset(new int32_t[n]);
  }
  SampleScratch<A> scratch() const { return {parts.get(), values.get(), masses.get(), keys.get(), index.get()}; }
  std::unique_ptr<SoftmaxState[]> parts;
  std::unique_ptr<A[]> values, masses;
  std::unique_ptr<typename OrderedKey<A>::type[]> keys;
  std::unique_ptr<int32_t[]> index;
};

template <typename T, typename A = typename Accumulate<T>::type>
void run(
    const SampleKernels<T>& kernel, const at::Tensor& logits, const double* draws, const SampleOptions& options,
    at::Tensor& tokens, at::Tensor& log_probs, at::Tensor& entropy) {
  const T* x = static_cast<const T*>(logits.const_data_ptr());
  const int64_t n = logits.size(1), stride = logits.stride(0);
  int64_t* token = tokens.mutable_data_ptr<int64_t>();
  A* log_prob = log_probs.mutable_data_ptr<A>();
  A* spread = entropy.mutable_data_ptr<A>();
  at::parallel_for(0, logits.size(0), 1, [&](int64_t begin, int64_t end) {
    const Buffers<A> buffers(n, options.top_k > 0 || options.top_p < 1);
    for (int64_t i = begin; i < end; ++i) {
      const SampledToken result = kernel.row(x + i * stride, n, options, draws[i], buffers.scratch());
      token[i] = result.token;
      log_prob[i] = static_cast<A>(result.log_prob);
      spread[i] = static_cast<A>(result.entropy);
    }
  });
}
}  // namespace

void check_sample_tokens(
    const at::Tensor& logits, const at::Tensor& draws, double temperature, int64_t top_k, double top_p) {
  check_float(kName, "logits", logits);
  check_dtype(kName, "draws", draws, at::kDouble);
  check_dimensions(kName, "logits", logits, "[B, V]", 2);
  TORCH_CHECK_VALUE(
      logits.size(1) > 0 && logits.size(1) < (int64_t{1} << 30), kName, ": logits must have shape [B, V] with 0 < V < 2^30, ",
      "got shape ", logits.sizes());
  check_shape(kName, "draws", draws, logits.sizes().slice(0, 1), "logits without its last dimension");
  check_device(kName, "draws", draws, logits, "logits");
  check_temperature(kName, temperature, /*greedy=*/true);
  TORCH_CHECK_VALUE(top_k >= 0, kName, ": top_k must be an integer, 0 or above, got ", top_k);
  TORCH_CHECK_VALUE(top_p > 0 && top_p <= 1, kName, ": top_p must be a number in (0, 1], got ", top_p);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> sample_tokens(
    const at::Tensor& logits, const at::Tensor& draws, double temperature, int64_t top_k, double top_p) {
  check_sample_tokens(logits, draws, temperature, top_k, top_p);
  const auto x = logits.stride(1) == 1 ? logits : logits.contiguous();
  const auto u = draws.contiguous();
  const int64_t rows = x.size(0);
  const auto options = x.options().dtype(compute_type({x}));
  auto tokens = at::empty({rows}, x.options().dtype(at::kLong));
  auto log_probs = at::empty({rows}, options), entropy = at::empty({rows}, options);
  const double inverse = temperature == 0 ? 1.0 : 1 / temperature;
  const SampleOptions how{inverse, top_k < x.size(1) ? top_k : 0, top_p, temperature == 0};
  const double* draw = u.const_data_ptr<double>();
  const Kernels& k = kernels();
  switch (x.scalar_type()) {
    case at::kFloat: run(k.sample_float, x, draw, how, tokens, log_probs, entropy); break;
    case at::kBFloat16: run(k.sample_bfloat16, x, draw, how, tokens, log_probs, entropy); break;
    case at::kHalf: run(k.sample_float16, x, draw, how, tokens, log_probs, entropy); break;
    default: run(k.sample_double, x, draw, how, tokens, log_probs, entropy);
  }
  return {tokens, log_probs, entropy};
}

}  // namespace rlhf_lightning
