// What the threads of a kernel are on this machine, and what they do to each other: fibers, lanes, shared memory.
//
// A fiber runs until it waits at a barrier, takes part in a shuffle or ends; machine.h says who goes on.
#pragma once

#include <link.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdio>
#include <functional>
#include <map>
#include <random>
#include <vector>

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

constexpr int kMaxDynamicShared = 232448;  // bytes a block of compute capability 9.0 may have
namespace rlhf_lightning {
alignas(128) inline thread_local unsigned char dynamic_shared_bytes[kMaxDynamicShared];  // declared in device.cuh
}

namespace emulator {

enum Wait { kReady, kWarp, kBlock, kCluster, kDone };
enum Lane { kIndex, kUp, kDown, kXor };
constexpr size_t kStack = 256 * 1024;  // of a fiber; its lowest page is a trap

struct Launch {
  dim3 grid, block;
  unsigned cluster;
  size_t shared, shared_limit;
  std::function<void()> body;
};

struct Fiber {
  Wait wait = kReady;
  int line = 0;
  unsigned mask = 0;
  int arrivals = 0;  // at the cluster's barrier; a thread that waits there waits until all have as many
  uint64_t given = 0;  // what this lane brings to a shuffle
  bool started = false;
  unsigned thread = 0;
  jmp_buf state;
};

struct Block {
  uint3 index;
  std::vector<Fiber> fibers;
  std::vector<uint64_t> lanes;  // what the lanes brought to the last shuffle that all of them reached
  std::vector<unsigned char> shared;
};

// What the caller sets, and reads after a failure.
inline int multiprocessors = 132, capability_major = 9;
inline std::mt19937 random_numbers;
inline std::vector<std::pair<uintptr_t, size_t>> arrays;  // where global memory may be reached; empty: anywhere
inline char message[512];
inline bool refused;  // the launch was impossible, rather than wrong
inline std::map<const void*, int> allowed_shared;

inline const Launch* current;
inline std::vector<Block> blocks;  // of the cluster that runs
inline unsigned rank;              // the block among them
inline Fiber* fiber;
inline jmp_buf scheduler;

[[noreturn]] inline void back_to_scheduler() { _longjmp(scheduler, 1); }

inline void describe(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  const int used = std::vsnprintf(message, sizeof(message), format, arguments);
  va_end(arguments);
  std::snprintf(
      message + used, sizeof(message) - used, " (block %u, %u, %u; thread %u)", blockIdx.x, blockIdx.y, blockIdx.z,
      fiber == nullptr ? 0 : fiber->thread);
}

template <typename... Arguments>
[[noreturn]] void fail(const char* format, Arguments... arguments) {
  describe(format, arguments...);
  back_to_scheduler();
}

inline void check(const void* x, size_t bytes, size_t alignment, const char* name) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(x);
  if (address % alignment != 0) fail("%s: %zu bytes at an address that is no multiple of %zu", name, bytes, alignment);
  if (arrays.empty()) return;
  for (const auto& [begin, size] : arrays) {
    if (address >= begin && address + bytes <= begin + size) return;
  }
  fail("%s: %zu bytes out of bounds", name, bytes);
}

// Fibers

__attribute__((noinline)) inline void wait(Wait what, unsigned mask, int line) {
  fiber->wait = what;
  fiber->mask = mask;
  fiber->line = line;
  if (_setjmp(fiber->state) == 0) back_to_scheduler();
}

inline void arrive() { ++fiber->arrivals; }

inline void fiber_main() {
  current->body();
  fiber->wait = kDone;
  back_to_scheduler();
}

inline unsigned char* stack_of(size_t number) {
  static std::vector<unsigned char*> stacks;
  while (stacks.size() <= number) {
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    mprotect(memory, 4096, PROT_NONE);
    stacks.push_back(static_cast<unsigned char*>(memory));
  }
  return stacks[number];
}

// Runs a fiber until it waits or ends.
__attribute__((noinline)) inline void resume(Fiber& next, size_t stack) {
  fiber = &next;
  const unsigned t = next.thread;
  threadIdx = {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
  next.wait = kReady;
  if (_setjmp(scheduler) != 0) return;
  if (next.started) _longjmp(next.state, 1);
  next.started = true;
  static ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stack_of(stack);
  context.uc_stack.ss_size = kStack;
  makecontext(&context, fiber_main, 0);
  setcontext(&context);
}

// Lanes

inline void warp_wait(unsigned mask, int line, uint64_t given) {
  const unsigned lane = fiber->thread % warpSize;
  if ((mask >> lane & 1u) == 0) fail("line %d: lane %u is not in its own mask %#x", line, lane, mask);
  fiber->given = given;
  wait(kWarp, mask, line);
}
inline void sync_warp(int line, unsigned mask = 0xffffffffu) { warp_wait(mask, line, 0); }

template <typename T>
T shuffle(Lane how, int line, unsigned mask, T x, int operand, int width = warpSize) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4, "a shuffle moves a number of 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof(T));
  warp_wait(mask, line, bits);
  const int lane = fiber->thread % warpSize, first = lane / width * width;
  int source = how == kIndex ? first + (operand & (width - 1))
               : how == kUp   ? lane - operand
               : how == kDown ? lane + operand
                              : lane ^ operand;
  if (source < first || source >= first + width) source = lane;
  if ((mask >> source & 1u) == 0) {
    fail("line %d: a shuffle reads lane %d, which is not in the mask %#x", line, source, mask);
  }
  std::memcpy(&x, &blocks[rank].lanes[fiber->thread - lane + source], sizeof(T));
  return x;
}

inline unsigned ballot(int line, unsigned mask, bool predicate) {
  warp_wait(mask, line, predicate);
  unsigned votes = 0;
  const unsigned first = fiber->thread / warpSize * warpSize;
  for (unsigned lane = 0; lane < warpSize; ++lane) {
    if (mask >> lane & 1u && blocks[rank].lanes[first + lane] != 0) votes |= 1u << lane;
  }
  return votes;
}

// Shared memory is this shared object's thread-local segment. Where a cluster's blocks take turns, each has a copy of
// its own, which is put in place while it runs.

struct Segment {
  unsigned char* begin = nullptr;
  size_t size = 0;
};

inline Segment shared_segment() {
  Segment found;
  rlhf_lightning::dynamic_shared_bytes[0] = 0;  // the segment exists from the first access on
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        bool ours = false;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& part = info->dlpi_phdr[i];
          const uintptr_t begin = info->dlpi_addr + part.p_vaddr, here = reinterpret_cast<uintptr_t>(&message);
          ours = ours || (part.p_type == PT_LOAD && here >= begin && here < begin + part.p_memsz);
        }
        for (int i = 0; ours && i < info->dlpi_phnum; ++i) {
          if (info->dlpi_phdr[i].p_type != PT_TLS || info->dlpi_tls_data == nullptr) continue;
          *static_cast<Segment*>(data) = {
              static_cast<unsigned char*>(info->dlpi_tls_data), info->dlpi_phdr[i].p_memsz};
        }
        return ours ? 1 : 0;
      },
      &found);
  return found;
}
inline Segment segment;

inline unsigned cluster_size() { return static_cast<unsigned>(blocks.size()); }
inline unsigned cluster_rank() { return rank; }
inline void* shared_of(unsigned other, void* x) {
  if (other >= blocks.size()) fail("block %u of a cluster of %zu", other, blocks.size());
  const size_t offset = static_cast<unsigned char*>(x) - segment.begin;
  if (offset >= segment.size) fail("map_shared_rank of what is not shared memory");
  return other == rank ? x : blocks[other].shared.data() + offset;
}

}  // namespace emulator
