// Memory for large results on Linux: huge pages from mmap, and a list of freed blocks that the next results take. On other
// systems every call falls back to torch's allocator.
#include "large_memory.h"

#include <c10/core/CPUAllocator.h>

#ifdef __linux__
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <vector>
#endif

namespace rlhf_lightning {

#ifdef __linux__
namespace {
constexpr size_t kHugePage = size_t{1} << 21;
constexpr size_t kLarge = 8 * kHugePage;
constexpr size_t kMedium = kHugePage / 2;  // the smallest block that KeepingAllocator keeps
constexpr size_t kSmallStep = size_t{1} << 16;
constexpr size_t kKeptBytes = size_t{256} << 20;  // drop() leaves at least this much

std::atomic<bool> keeping{false};  // whether KeepingAllocator keeps the memory of every large tensor

// A mapping that starts at a huge page; `start` is null where there is none. Its last, incomplete huge page is small pages:
// a whole one would waste memory, and a training holds its gradients and the optimizer's state in such blocks.
struct Block {
  char* start = nullptr;
  size_t size = 0;
};

Block map(size_t size) {
  void* memory = mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return {};
  char* start = static_cast<char*>(memory);
  const size_t before = -reinterpret_cast<uintptr_t>(start) % kHugePage;
  if (before > 0) munmap(start, before);
  if (before < kHugePage) munmap(start + before + size, kHugePage - before);
  madvise(start + before, size, MADV_HUGEPAGE);  // advice only: the mapping works where the system refuses
  return {start + before, size};
}

void unmap(Block block) {
  if (block.start != nullptr) munmap(block.start, block.size);
}

// The freed blocks that are kept. door_ is a lock, and take() and give() only try it (try_lock): a thread that cannot take the
// lock maps or unmaps its block by the system, and never waits.
class Kept {
 public:
  Block take(size_t size) {
    Block found;
    if (door_.test_and_set(std::memory_order_acquire)) return found;
    size_t best = blocks_.size();
    for (size_t i = blocks_.size(); i-- > 0;) {  // the smallest block that fits, and the newest of those
      if (blocks_[i].size < size || blocks_[i].size > 2 * size) continue;
      if (best == blocks_.size() || blocks_[i].size < blocks_[best].size) best = i;
    }
    if (best < blocks_.size()) {
      found = blocks_[best];
      blocks_.erase(blocks_.begin() + best);
      bytes_ -= found.size;
    }
    door_.clear(std::memory_order_release);
    return found;
  }

  void give(Block block, size_t room) {
    if (door_.test_and_set(std::memory_order_acquire)) return unmap(block);
    // Between a training's steps the pages are not marked as free: the next step takes them at once, and the call costs time.
    if (keeping || madvise(block.start, block.size, MADV_FREE) == 0) {
      blocks_.push_back(block);
      bytes_ += block.size;
      drop(room);
    } else {
      unmap(block);
    }
    door_.clear(std::memory_order_release);
  }

  void trim(size_t room) {
    if (door_.test_and_set(std::memory_order_acquire)) return;
    drop(room);
    door_.clear(std::memory_order_release);
  }

  void clear() {
    lock();
    for (const Block block : blocks_) unmap(block);
    blocks_.clear();
    bytes_ = 0;
    unlock();
  }

  void lock() {
    while (door_.test_and_set(std::memory_order_acquire)) std::this_thread::yield();
  }
  void unlock() { door_.clear(std::memory_order_release); }

 private:
  // Unmaps the oldest blocks until at most `room` or kKeptBytes bytes are left, whichever is more. Two blocks stay whatever
  // their size where their pages are marked as free.
  void drop(size_t room) {
    const size_t most = std::max(room, kKeptBytes), spared = keeping ? 0 : 2;
    size_t count = 0;
    for (; bytes_ > most && count + spared < blocks_.size(); ++count) {
      bytes_ -= blocks_[count].size;
      unmap(blocks_[count]);
    }
    blocks_.erase(blocks_.begin(), blocks_.begin() + count);
  }

  std::atomic_flag door_ = ATOMIC_FLAG_INIT;
  std::vector<Block> blocks_;  // oldest first
  size_t bytes_ = 0;
};

Kept& kept() {
  static Kept* const blocks = new Kept;  // never destroyed: tensors may be freed while the process ends
  return *blocks;
}

// The blocks in use, by address, because a call that frees memory may have the pointer alone.
class Used {
 public:
  void add(Block block) {
    const std::lock_guard<std::mutex> lock(door_);
    sizes_.emplace(block.start, block.size);
    bytes_ += block.size;
    most_ = std::max(most_, bytes_);
  }

  Block remove(void* start) {
    const std::lock_guard<std::mutex> lock(door_);
    const auto found = sizes_.find(start);
    if (found == sizes_.end()) return {};
    const Block block{static_cast<char*>(start), found->second};
    sizes_.erase(found);
    bytes_ -= block.size;
    return block;
  }

  void lock() { door_.lock(); }
  void unlock() { door_.unlock(); }

  // Starts or stops measuring the peak of the bytes in use.
  void watch(bool on) {
    const std::lock_guard<std::mutex> lock(door_);
    watched_ = on;
    most_ = bytes_;
  }

  // The peak less the bytes in use now: keeping so much does not raise the peak.
  size_t room() {
    const std::lock_guard<std::mutex> lock(door_);
    return watched_ ? most_ - bytes_ : 0;
  }

 private:
  std::mutex door_;
  std::unordered_map<void*, size_t> sizes_;
  size_t bytes_ = 0, most_ = 0;
  bool watched_ = false;
};

Used& used() {
  static Used* const blocks = new Used;
  return *blocks;
}

// fork() copies the calling thread alone. A lock that another thread held would stay locked in the child for ever, so the
// thread that forks takes all locks before, and both processes free them after.
void lock_all() {
  used().lock();
  kept().lock();
}

void unlock_all() {
  kept().unlock();
  used().unlock();
}

[[maybe_unused]] const int kForkSafe = pthread_atfork(lock_all, unlock_all, unlock_all);

void release(void* start) {
  c10::profiledCPUMemoryReporter().Delete(start);
  const Block block = used().remove(start);
  kept().give(block, used().room());
}

struct Allocation {
  at::DataPtr data;  // empty where the system has no memory left
  bool warm = false;
};

Allocation allocate(size_t bytes, size_t size) {
  Block block = kept().take(size);
  const bool warm = block.start != nullptr;
  if (!warm) block = map(size);
  if (block.start == nullptr) {  // the kept blocks may hold the memory that is missing
    kept().clear();
    block = map(size);
  }
  if (block.start == nullptr) return {};
  used().add(block);
  if (!warm) kept().trim(used().room());
  c10::profiledCPUMemoryReporter().New(block.start, bytes);
  return {at::DataPtr(block.start, block.start, &release, c10::kCPU), warm};
}

// Replaces torch's CPU allocator for the rest of the process once keep_memory() is called. It frees blocks of both allocators,
// because oneDNN frees by the pointer alone, and at any later time.
class KeepingAllocator final : public c10::Allocator {
 public:
  at::DataPtr allocate(size_t bytes) override {
    if (bytes < kMedium || !keeping) return plain().allocate(bytes);
    // Few sizes, so that a freed block fits a later request: eight for each doubling, in whole pages.
    size_t step = bytes < kLarge ? kSmallStep : kHugePage;
    while (16 * step <= bytes) step *= 2;
    auto allocation = rlhf_lightning::allocate(bytes, (bytes + step - 1) / step * step);
    return allocation.data ? std::move(allocation.data) : plain().allocate(bytes);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { plain().copy_data(to, from, bytes); }

  static c10::Allocator& plain() {
    static c10::Allocator* const allocator = c10::GetCPUAllocator();
    return *allocator;
  }

 private:
  static void free(void* start) {
    const Block block = used().remove(start);
    if (block.start == nullptr) return plain().raw_deallocate(start);
    c10::profiledCPUMemoryReporter().Delete(start);
    kept().give(block, used().room());
  }
};
}  // namespace

LargeResult empty_large(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const size_t bytes = c10::multiply_integers(sizes) * options.dtype().itemsize();
  if (bytes < kLarge) return {at::empty(sizes, options), false};
  auto [data, warm] = allocate(bytes, (bytes + kHugePage - 1) / kHugePage * kHugePage);
  if (!data) return {at::empty(sizes, options), false};
  const auto storage = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), bytes, std::move(data), c10::GetCPUAllocator(), /*resizable=*/true);
  auto tensor = at::empty({0}, options).set_(c10::Storage(storage));
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return {tensor, warm};
}

void release_kept_memory() { kept().clear(); }

void keep_memory(bool on) {
  static KeepingAllocator* const allocator = [] {
    KeepingAllocator::plain();  // looks up torch's allocator before it is replaced
    auto* const made = new KeepingAllocator;
    c10::SetCPUAllocator(made);
    return made;
  }();
  (void)allocator;
  used().watch(on);
  keeping = on;
}
#else
void release_kept_memory() {}

void keep_memory(bool) {}

LargeResult empty_large(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return {at::empty(sizes, options), false};
}
#endif

}  // namespace rlhf_lightning
