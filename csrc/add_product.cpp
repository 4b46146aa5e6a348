// sum += a b on the CPU. The product of 16-bit matrices is summed in float32: by the CPU's dot instructions where it has
// them, else over float32 copies of the operands.
#include "add_product.h"

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <vector>

namespace rlhf_lightning {

namespace {
namespace blas = at::native::cpublas;

// A block of kDepth x kColumns of b, 32 KiB, is packed for the CPU's dot instructions and multiplied with kRows rows of a.
constexpr int64_t kDepth = 256, kColumns = 64, kRows = 256;

// at::mm rounds the result to 16 bits on the CPU; the brgemm kernels that torch uses for attention keep float32. `depth`, the
// number of a's columns to take, is even, because the instructions take columns in pairs.
template <typename T>
void add_blocks(at::Tensor& sum, const at::Tensor& a, const at::Tensor& b, int64_t depth) {
  const int64_t rows = sum.size(0), columns = sum.size(1);
  const int64_t across = (columns + kColumns - 1) / kColumns, down = (rows + kRows - 1) / kRows;
  const T *left = a.const_data_ptr<T>(), *right = b.const_data_ptr<T>();
  float* out = sum.mutable_data_ptr<float>();
  at::parallel_for(0, across * down, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> packed(kDepth * kColumns);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t row = block / across * kRows, column = block % across * kColumns;
      const int64_t height = std::min(kRows, rows - row), width = std::min(kColumns, columns - column);
      const int64_t line = (width + 15) / 16 * 16;  // pack writes multiples of 16 only
      for (int64_t first = 0; first < depth; first += kDepth) {
        const int64_t count = std::min(kDepth, depth - first);
        blas::pack(count, width, columns, line, b.scalar_type(), b.scalar_type(), right + first * columns + column,
                   packed.data());
        blas::brgemm(height, width, count, a.size(1), line, columns, true, left + row * a.size(1) + first, packed.data(),
                     out + row * columns + column);
      }
    }
    blas::brgemm_release();
  });
}

// Without such instructions a float32 product is as fast as a 16-bit one. Piece by piece, so that the copies stay small.
void add_copies(at::Tensor& sum, const at::Tensor& a, const at::Tensor& b, int64_t first) {
  constexpr int64_t kPiece = 1024;
  for (; first < a.size(1); first += kPiece) {
    const int64_t count = std::min(kPiece, a.size(1) - first);
    sum.addmm_(a.narrow(1, first, count).to(sum.scalar_type()), b.narrow(0, first, count).to(sum.scalar_type()));
  }
}
}  // namespace

void add_product(at::Tensor& sum, const at::Tensor& a, const at::Tensor& b) {
  const auto type = a.scalar_type();
  const bool packed = type != sum.scalar_type() && a.size(1) > 1 && blas::could_pack(type);
  const int64_t depth = packed ? a.size(1) / 2 * 2 : 0;
  if (packed && type == at::kBFloat16) add_blocks<at::BFloat16>(sum, a, b, depth);
  if (packed && type == at::kHalf) add_blocks<at::Half>(sum, a, b, depth);
  if (type == sum.scalar_type()) {
    sum.addmm_(a, b);
  } else {
    add_copies(sum, a, b, depth);
  }
}

}  // namespace rlhf_lightning
