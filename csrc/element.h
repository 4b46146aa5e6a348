// The element types of the CUDA launchers: what an untyped pointer points to.
#pragma once

namespace rlhf_lightning {

enum class Element { kFloat, kBfloat16, kHalf, kDouble };

}  // namespace rlhf_lightning
