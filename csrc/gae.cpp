// Generalised advantage estimation on the CPU: splits the rows over threads, and long rows into pieces.
#include "gae.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "check.h"
#include "kernels.h"
#include "large_memory.h"

namespace rlhf_lightning {

namespace {
constexpr const char* kName = "gae";
constexpr int64_t kGrain = 16384;  // elements that are worth another thread
constexpr int64_t kRows = 16;      // the most rows that a kernel takes at once
constexpr int64_t kLongest = 4096, kPiece = 512;  // steps

template <typename T>
GaeRows<T> part(GaeRows<T> all, int64_t offset, int64_t rows, int64_t steps, int64_t stride) {
  all.rewards += offset;
  all.values += offset;
  all.mask += offset;
  if (all.advantages != nullptr) {
    all.advantages += offset;
    all.returns += offset;
  }
  all.rows = rows;
  all.steps = steps;
  all.stride = stride;
  return all;
}

// In double, because squaring a rounded power doubles its error, each time in the same direction.
double power(double base, int64_t exponent) {
  double result = 1;
  for (; exponent > 0; exponent /= 2, base *= base) {
    if (exponent % 2 == 1) result *= base;
  }
  return result;
}

// A long row is cut into pieces, which are computed like rows, twice: first as if nothing followed a piece, then with what
// does follow it. By linearity, the advantage that a piece passes on is its own plus (gamma lambda)^count times the advantage
// that follows it. The row's length alone decides where it is cut, and so its bits.
template <typename T>
class LongRows {
 public:
  LongRows(const LossKernels<T>& kernel, const GaeRows<T>& all)
      : kernel_(kernel), all_(all), pieces_((all.steps + kPiece - 1) / kPiece), next_value_(all.rows * pieces_),
        next_advantage_(all.rows * pieces_), count_(all.rows * pieces_) {}

  void run() {
    const int64_t pieces = all_.rows * pieces_;
    at::parallel_for(0, pieces, kGrain / kPiece, [&](int64_t from, int64_t to) {
      for (; from < to; ++from) look_at(from);
    });
    std::vector<T> value_after(pieces), advantage_after(pieces);
    for (int64_t i = pieces - 2; i >= 0; --i) {  // zeros follow a row's last piece
      if ((i + 1) % pieces_ != 0) value_after[i] = count_[i + 1] > 0 ? next_value_[i + 1] : value_after[i + 1];
    }
    next_value_ = value_after;
    auto carries_only = all_;
    carries_only.advantages = carries_only.returns = nullptr;
    run_pieces(carries_only);
    for (int64_t i = pieces - 2; i >= 0; --i) {
      if ((i + 1) % pieces_ == 0) continue;
      advantage_after[i] =
          next_advantage_[i + 1] +
          static_cast<T>(power(all_.gamma_lambda, count_[i + 1])) * advantage_after[i + 1];
    }
    next_value_ = value_after;
    next_advantage_ = advantage_after;
    run_pieces(all_);
  }

 private:
  // The first piece takes the row's remainder.
  int64_t begin(int64_t piece) const { return std::max<int64_t>(0, all_.steps - (pieces_ - piece) * kPiece); }

  // Counts a piece's True steps and keeps the value at the first of them.
  void look_at(int64_t index) {
    const int64_t piece = index % pieces_, start = index / pieces_ * all_.steps;
    const auto* mask = reinterpret_cast<const unsigned char*>(all_.mask);  // any byte but 0 is True, as in the kernels
    int64_t count = 0;
    for (int64_t i = start + begin(piece); i < start + begin(piece + 1); ++i) {
      if (mask[i] != 0 && count++ == 0) next_value_[index] = all_.values[i];
    }
    count_[index] = count;
  }

  void run_pieces(const GaeRows<T>& rows) {
    const int64_t groups = 1 + (pieces_ - 1 + kRows - 1) / kRows;  // the row's first piece, and the others in groups of sixteen
    at::parallel_for(0, rows.rows * groups, kGrain / (kRows * kPiece), [&](int64_t from, int64_t to) {
      for (; from < to; ++from) {
        const int64_t row = from / groups, group = from % groups;
        const int64_t piece = group == 0 ? 0 : 1 + (group - 1) * kRows;
        const int64_t count = group == 0 ? 1 : std::min(kRows, pieces_ - piece);
        auto these = part(rows, row * rows.steps + begin(piece), count, begin(piece + 1) - begin(piece), kPiece);
        these.next_value = next_value_.data() + row * pieces_ + piece;
        these.next_advantage = next_advantage_.data() + row * pieces_ + piece;
        kernel_.gae(these);
      }
    });
  }

  const LossKernels<T>& kernel_;
  const GaeRows<T> all_;
  const int64_t pieces_;
  std::vector<T> next_value_, next_advantage_;  // of each piece: in, what follows it; out, what it passes on
  std::vector<int64_t> count_;                  // of True steps
};

template <typename T>
void run(
    const LossKernels<T>& kernel, const at::Tensor& rewards, const at::Tensor& values, const at::Tensor& mask,
    double gamma, double lam, const LargeResult& advantages, const LargeResult& returns) {
  const int64_t steps = rewards.size(1);
  const GaeRows<T> all{
      rewards.const_data_ptr<T>(), values.const_data_ptr<T>(), mask.const_data_ptr<bool>(),
      advantages.tensor.mutable_data_ptr<T>(), returns.tensor.mutable_data_ptr<T>(), rewards.size(0), steps, steps,
      static_cast<T>(gamma), static_cast<T>(gamma * lam), advantages.streaming && returns.streaming, nullptr, nullptr};
  if (steps > kLongest) return LongRows<T>(kernel, all).run();
  const int64_t groups = (all.rows + kRows - 1) / kRows;
  at::parallel_for(0, groups, std::max<int64_t>(1, kGrain / (kRows * steps)), [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kRows, last = std::min(end * kRows, all.rows);
    kernel.gae(part(all, first * steps, last - first, steps, steps));
  });
}
}  // namespace

void check_gae(const at::Tensor& rewards, const at::Tensor& values, const at::Tensor& mask) {
  check_float(kName, "rewards", rewards);
  check_float(kName, "values", values);
  check_dtype(kName, "mask", mask, at::kBool);
  check_dimensions(kName, "rewards", rewards, "[B, T]", 2);
  check_shape(kName, "values", values, rewards.sizes(), "rewards");
  check_device(kName, "values", values, rewards, "rewards");
  check_shape(kName, "mask", mask, rewards.sizes(), "rewards");
  check_device(kName, "mask", mask, rewards, "rewards");
}

std::tuple<at::Tensor, at::Tensor> gae(
    const at::Tensor& rewards, const at::Tensor& values, const at::Tensor& mask, double gamma, double lam) {
  check_gae(rewards, values, mask);
  const auto type = compute_type({rewards, values});
  const auto r = rewards.to(type).contiguous(), v = values.to(type).contiguous(), m = mask.contiguous();
  const auto advantages = empty_large(r.sizes(), r.options()), returns = empty_large(r.sizes(), r.options());
  if (r.numel() == 0) return {advantages.tensor, returns.tensor};
  if (type == at::kDouble) {
    run<double>(kernels().loss_double, r, v, m, gamma, lam, advantages, returns);
  } else {
    run<float>(kernels().loss_float, r, v, m, gamma, lam, advantages, returns);
  }
  return {advantages.tensor, returns.tensor};
}

}  // namespace rlhf_lightning
