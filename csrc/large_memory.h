// Memory for large results. What a kernel writes into fresh memory costs more in page faults, and in the zeros that the
// system writes first, than in arithmetic. So such results get huge pages, and when they are freed some of them are kept for
// the next ones of about their size, marked as free, so that the system takes their pages back whenever it runs short.
#pragma once

#include <ATen/ATen.h>

namespace rlhf_lightning {

struct LargeResult {
  at::Tensor tensor;  // contiguous, uninitialised
  bool streaming;     // its pages are at hand and the caches too small for it: writing past them is faster
};

LargeResult empty_large(at::IntArrayRef sizes, const at::TensorOptions& options);

// Gives what is kept back to the system at once, as torch.cuda.empty_cache() does on a GPU.
void release_kept_memory();

// From now on, or no longer, the same for every CPU tensor of at least 1 MiB, whoever makes it: a training allocates the same
// sizes in every step. While it is on, as much is kept as was in use at once at most, what is in use now included, and none of
// it is marked.
void keep_memory(bool on);

}  // namespace rlhf_lightning
