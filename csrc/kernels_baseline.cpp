// The kernels for the instruction set that the compiler targets by default.
#include "kernels.h"

namespace rlhf_lightning::baseline {
namespace {
#include "vectors.h"

#include "kernels_impl.h"
}  // namespace

Kernels kernels() {
  return table("baseline");
}
}  // namespace rlhf_lightning::baseline
