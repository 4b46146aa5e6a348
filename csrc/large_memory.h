// Memory for large results. A kernel that writes to fresh memory spends more time in page faults, and in the zeros that the
// system writes first, than in arithmetic. So large results get huge pages. Some freed blocks are kept for later results of
// about their size; their pages are marked as free, so that the system can take them back when it runs short of memory.
#pragma once

#include <ATen/ATen.h>

namespace rlhf_lightning {

struct LargeResult {
  at::Tensor tensor;  // contiguous, uninitialised
  bool streaming;     // its pages are mapped and it exceeds the caches: streaming stores are faster
};

LargeResult empty_large(at::IntArrayRef sizes, const at::TensorOptions& options);

// Returns all kept memory to the system at once, as torch.cuda.empty_cache() does on a GPU.
void release_kept_memory();

// Turns on or off that the memory of every CPU tensor of at least 1 MiB is kept, because a training allocates the same sizes in
// every step. While it is on, kept and used memory together stay within the peak of the memory in use, and no page is marked
// as free.
void keep_memory(bool on);

}  // namespace rlhf_lightning
