// The machine under the stand-in headers: it runs the blocks of a kernel on this thread, every CUDA thread a fiber.
//
// A fiber runs until it waits at a barrier, takes part in a shuffle or ends; which one runs next is drawn at random
// (see emulator_seed), so threads are as far apart as the barriers allow and a missing barrier shows as a wrong result.
// Waiting fibers go on when all those whom they wait for have come to the same call. If none can go on, or a thread has
// ended that is waited for, the launch fails. So it does at a memory fault, at an index beyond a C array, and at a
// wrong access through __ldg and its like: the file is compiled with traps for the former (ops/cuda_emulation.py).
#pragma once

#include <signal.h>

#include <algorithm>

#include "fibers.h"

namespace emulator {

// Lets fibers go on that have what they wait for. False if a thread that is waited for will never come.
inline bool release_warps(Block& block) {
  for (size_t first = 0; first < block.fibers.size(); first += warpSize) {
    for (size_t i = first; i < std::min(first + warpSize, block.fibers.size()); ++i) {
      const Fiber& waiting = block.fibers[i];
      if (waiting.wait != kWarp) continue;
      bool all = true;
      for (unsigned lane = 0; lane < warpSize; ++lane) {
        if ((waiting.mask >> lane & 1u) == 0) continue;
        const bool exists = first + lane < block.fibers.size();
        const Fiber& other = block.fibers[exists ? first + lane : i];
        if (!exists || other.wait == kDone) {
          fiber = &block.fibers[i];
          describe("line %d: lane %u of the mask %#x has ended or does not exist", waiting.line, lane, waiting.mask);
          return false;
        }
        all = all && other.wait == kWarp && other.mask == waiting.mask && other.line == waiting.line;
      }
      if (!all) continue;
      const unsigned mask = waiting.mask;
      for (unsigned lane = 0; lane < warpSize; ++lane) {
        if ((mask >> lane & 1u) == 0) continue;
        block.lanes[first + lane] = block.fibers[first + lane].given;
        block.fibers[first + lane].wait = kReady;
      }
    }
  }
  return true;
}

// The same for the block's barrier: all of its threads must wait, at one line.
inline void release_block(std::vector<Fiber*>& fibers) {
  for (const Fiber* one : fibers) {
    if (one->wait != kBlock || one->line != fibers[0]->line) return;
  }
  for (Fiber* one : fibers) one->wait = kReady;
}

// The same for the cluster's barrier. False if nobody can go on.
inline bool release_cluster(std::vector<Fiber*>& fibers) {
  int arrivals = fibers[0]->arrivals;
  for (const Fiber* one : fibers) arrivals = std::min(arrivals, one->arrivals);
  bool released = false;
  for (Fiber* one : fibers) {
    if (one->wait != kCluster || one->arrivals > arrivals) continue;
    one->wait = kReady;
    released = true;
  }
  return released;
}

// Runs a block until its fibers have ended or wait for the cluster.
inline bool run_block(Block& block) {
  std::vector<Fiber*> all;
  for (Fiber& one : block.fibers) all.push_back(&one);
  blockIdx = block.index;
  std::vector<size_t> ready;
  while (true) {
    if (!release_warps(block)) return false;
    release_block(all);
    ready.clear();
    for (size_t i = 0; i < all.size(); ++i) {
      if (all[i]->wait == kReady) ready.push_back(i);
    }
    if (ready.empty()) break;
    std::shuffle(ready.begin(), ready.end(), random_numbers);
    const unsigned resting = random_numbers();  // warps with their bit set let the others go ahead, unless all are
    const size_t last = ready.back();
    for (const size_t i : ready) {
      if (resting >> (i / warpSize) & 1u && i != last) continue;
      resume(*all[i], rank * all.size() + i);
      if (message[0] != 0) return false;
    }
  }
  for (Fiber* one : all) {
    fiber = one;
    if (one->wait == kWarp || one->wait == kBlock) {
      describe("line %d: a barrier that the other threads do not reach", one->line);
      return false;
    }
  }
  return true;
}

// Runs the blocks of a cluster, which is one block unless the launch says otherwise.
inline bool run_cluster(const Launch& launch, size_t first) {
  const unsigned threads = launch.block.x * launch.block.y * launch.block.z;
  blocks.assign(launch.cluster, {});
  std::vector<Fiber*> all;
  for (unsigned i = 0; i < launch.cluster; ++i) {
    const size_t number = first + i;
    Block& block = blocks[i];
    block.index = {
        static_cast<unsigned>(number % launch.grid.x), static_cast<unsigned>(number / launch.grid.x % launch.grid.y),
        static_cast<unsigned>(number / launch.grid.x / launch.grid.y)};
    block.fibers.resize(threads);
    block.lanes.assign((threads + warpSize - 1) / warpSize * warpSize, 0);
    block.shared.assign(segment.size, 0xff);
    for (unsigned t = 0; t < threads; ++t) {
      block.fibers[t].thread = t;
      all.push_back(&block.fibers[t]);
    }
  }
  std::vector<unsigned> order(launch.cluster);
  for (unsigned i = 0; i < launch.cluster; ++i) order[i] = i;
  do {
    std::shuffle(order.begin(), order.end(), random_numbers);
    for (const unsigned i : order) {
      rank = i;
      std::memcpy(segment.begin, blocks[i].shared.data(), segment.size);
      if (!run_block(blocks[i])) return false;
      std::memcpy(blocks[i].shared.data(), segment.begin, segment.size);
    }
  } while (release_cluster(all));
  for (Fiber* one : all) {
    fiber = one;
    if (one->wait == kCluster) {
      describe("line %d: a cluster barrier that the other threads do not reach", one->line);
      return false;
    }
  }
  for (const Block& block : blocks) {
    const unsigned char* dynamic = block.shared.data() + (rlhf_lightning::dynamic_shared_bytes - segment.begin);
    for (size_t i = launch.shared; i < kMaxDynamicShared; ++i) {
      if (dynamic[i] == 0xff) continue;
      describe("a write %zu bytes into %zu bytes of dynamic shared memory", i, launch.shared);
      return false;
    }
  }
  return true;
}

// A fault on a fiber ends the launch, not the process.
inline void on_fault(int number, siginfo_t* info, void*) {
  const bool trap = number == SIGILL || number == SIGTRAP;
  describe("%s at %p", trap ? "an index or operand out of its range" : "a memory fault", info->si_addr);
  back_to_scheduler();
}

constexpr int kFaults[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE};

inline bool refuse(const char* why) {
  refused = true;
  std::snprintf(message, sizeof(message), "%s", why);
  return false;
}

inline bool run(const Launch& launch) {
  message[0] = 0;
  refused = false;
  const size_t threads = size_t{launch.block.x} * launch.block.y * launch.block.z;
  const size_t count = size_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  if (threads == 0 || threads > 1024) return refuse("a block has 1 to 1024 threads");
  if (count == 0 || launch.grid.x > 2147483647u || launch.grid.y > 65535 || launch.grid.z > 65535) {
    return refuse("a grid has 1 to 2147483647, 65535, 65535 blocks");
  }
  if (launch.cluster == 0 || launch.cluster > 8 || launch.grid.x % launch.cluster != 0) {
    return refuse("a cluster has 1 to 8 blocks and divides the grid");
  }
  if (launch.cluster > 1 && capability_major < 9) return refuse("clusters need compute capability 9.0");
  if (launch.shared > launch.shared_limit) return refuse("more shared memory than the kernel was allowed");

  current = &launch;
  segment = shared_segment();
  gridDim = launch.grid;
  blockDim = launch.block;
  struct sigaction before[std::size(kFaults)], ours{};
  ours.sa_sigaction = on_fault;
  ours.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
  static unsigned char fault_stack[64 * 1024];
  stack_t stack_before, stack{};
  stack.ss_sp = fault_stack;
  stack.ss_size = sizeof(fault_stack);
  sigaltstack(&stack, &stack_before);
  for (size_t i = 0; i < std::size(kFaults); ++i) sigaction(kFaults[i], &ours, &before[i]);

  std::vector<size_t> order(count / launch.cluster);
  for (size_t i = 0; i < order.size(); ++i) order[i] = i * launch.cluster;
  std::shuffle(order.begin(), order.end(), random_numbers);
  bool good = true;
  for (size_t i = 0; good && i < order.size(); ++i) good = run_cluster(launch, order[i]);

  for (size_t i = 0; i < std::size(kFaults); ++i) sigaction(kFaults[i], &before[i], nullptr);
  sigaltstack(&stack_before, nullptr);
  return good;
}

}  // namespace emulator

extern "C" {
const char* emulator_message() { return emulator::message; }
void emulator_seed(unsigned seed) { emulator::random_numbers.seed(seed); }
void emulator_device(int multiprocessors, int capability_major) {
  emulator::multiprocessors = multiprocessors;
  emulator::capability_major = capability_major;
}
void emulator_forget_arrays() { emulator::arrays.clear(); }
void emulator_allow_array(const void* begin, size_t bytes) {
  emulator::arrays.emplace_back(reinterpret_cast<uintptr_t>(begin), bytes);
}
}
