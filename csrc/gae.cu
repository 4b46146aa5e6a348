// Generalised advantage estimation as a scan along each row, in one pass over memory.
//
// Launch: one block a row, or a cluster of 2, 4 or 8 blocks a row where the rows are long and few; the grid has
// rows * cluster blocks in x. A block has 1 to kMaxWarps warps: no more than the row's steps need. In each iteration a block
// takes one tile of the row, the last tile first. A thread takes kGroups groups of kSteps neighbouring steps of the tile.
// Warps exchange results by shuffles, a block's warps through shared memory, a cluster's blocks through distributed shared
// memory.
//
// With d = reward - value, let B[t] = gamma * value[t] + gamma * lambda * advantage[t]. Then the recursion of
// rlhf_lightning/ops/gae.py becomes a recursion of B alone, over the True steps:
//
//     advantage[t] = d[t] + B[t + 1],    B[t] = gamma * lambda * B[t + 1] + (gamma * value[t] + gamma * lambda * d[t])
//
// So any group of steps is a map x -> (gamma * lambda)^count * x + offset, where count is the number of True steps, and
// composing maps is associative. The grouping depends on the number of steps alone, and the maps of tiles are applied one
// by one, whichever block holds them: a row's results are the same bits in any batch, on any number of blocks, at any
// address.
//
// A power is computed from its count, not by repeated squaring. Squaring doubles the rounding error each time, always in
// the same direction (three times the error of the sequential recursion at 300 steps and lambda 0.999);
// 2^(count * log2(gamma * lambda)) is off by a few units in the last place of 1 for any count.
#include "gae_launch.h"

#include <cooperative_groups.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "device.cuh"

namespace rlhf_lightning {
namespace {

constexpr int kMaxWarps = 8;
constexpr int kMaxCluster = 8;  // the largest that every GPU with clusters supports

// The same for all steps: discount is gamma, decay is gamma * lambda.
template <typename C>
struct Factors {
  C discount;
  C decay;
  C log2_decay;  // -infinity where decay is 0
};

// x -> decay^count * x + offset. It has no initialisers, because shared memory runs no constructors.
template <typename C>
struct Map {
  int count;
  C offset;
  __device__ C operator()(C x, const Factors<C>& by) const {
    return count == 0 ? x : fma(exp2_of(static_cast<C>(count) * by.log2_decay), x, offset);
  }
};
template <typename C>
__device__ Map<C> identity() {
  return {0, C(0)};
}
// The composition of two maps: `first` is applied first.
template <typename C>
__device__ Map<C> composed(const Map<C>& first, const Map<C>& second, const Factors<C>& by) {
  return {first.count + second.count, second(first.offset, by)};
}

template <typename T>
struct Rows {
  const T* rewards;
  const T* values;
  const unsigned char* mask;
  Compute<T>* advantages;
  Compute<T>* returns;
};

// Loads n elements from x on, by one vector load or one by one; never reads an element beyond `left`.
template <int n, bool by_vector, typename T>
__device__ __forceinline__ Vector<T, n> load_some(const T* x, int left) {
  Vector<T, n> vector{};
  if constexpr (by_vector) {
    if (left >= n) vector = load<n>(x);  // the row is whole vectors, so all n exist or none
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if (i < left) vector.at[i] = load<1>(x + i).at[0];
    }
  }
  return vector;
}
template <int n, bool by_vector, typename T>
__device__ __forceinline__ void store_some(T* x, const Vector<T, n>& vector, int left) {
  if constexpr (by_vector) {
    if (left >= n) store<n>(x, vector);
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if (i < left) store<1>(x + i, Vector<T, 1>{{vector.at[i]}});
    }
  }
}

// A thread's part of one tile: kGroups groups of kSteps steps.
template <typename T, int kSteps, int kGroups, bool by_vector>
struct Tile {
  using C = Compute<T>;
  C difference[kGroups][kSteps];  // reward - value, 0 at a False step
  C value[kGroups][kSteps];
  unsigned counted = 0;  // bit group * kSteps + step
  Map<C> after[kGroups];  // the map of the warp's steps after the group

  // `at` is the index of the thread's first step in the arrays; `left` counts the steps from it on.
  __device__ void read(const Rows<T>& rows, int64_t at, int left) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group, at += kWarp * kSteps, left -= kWarp * kSteps) {
      const auto mask = load_some<kSteps, by_vector>(rows.mask + at, left);
      const auto rewards = load_some<kSteps, by_vector>(rows.rewards + at, left);
      const auto values = load_some<kSteps, by_vector>(rows.values + at, left);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const bool real = mask.at[step] != 0;
        value[group][step] = real ? to_compute(values.at[step]) : C(0);
        difference[group][step] = real ? to_compute(rewards.at[step]) - value[group][step] : C(0);
        counted |= static_cast<unsigned>(real) << (group * kSteps + step);
      }
    }
  }

  // Returns the map of all the warp's steps, in every lane.
  __device__ Map<C> scan(const Factors<C>& by) {
    const int lane = threadIdx.x % kWarp;
    auto warp = identity<C>();
#pragma unroll
    for (int group = kGroups - 1; group >= 0; --group) {
      auto from_here = identity<C>();  // at first the map of this lane's steps, in the end that of all lanes from this one on
#pragma unroll
      for (int step = kSteps - 1; step >= 0; --step) {
        if ((counted >> (group * kSteps + step) & 1u) == 0) continue;
        const C own = fma(by.decay, difference[group][step], by.discount * value[group][step]);
        from_here = {from_here.count + 1, fma(by.decay, from_here.offset, own)};
      }
#pragma unroll
      for (int distance = 1; distance < kWarp; distance *= 2) {
        const Map<C> later{
            __shfl_down_sync(kAllLanes, from_here.count, distance),
            __shfl_down_sync(kAllLanes, from_here.offset, distance)};
        if (lane + distance < kWarp) from_here = composed(later, from_here, by);
      }
      const Map<C> next{
          __shfl_down_sync(kAllLanes, from_here.count, 1), __shfl_down_sync(kAllLanes, from_here.offset, 1)};
      after[group] = lane + 1 < kWarp ? composed(warp, next, by) : warp;
      const Map<C> whole{
          __shfl_sync(kAllLanes, from_here.count, 0), __shfl_sync(kAllLanes, from_here.offset, 0)};
      warp = composed(warp, whole, by);
    }
    return warp;
  }

  // `bootstrap` is B of the first step after the warp's.
  __device__ void write(
      const Rows<T>& rows, int64_t at, int left, const Factors<C>& by, C bootstrap) const {
#pragma unroll
    for (int group = 0; group < kGroups; ++group, at += kWarp * kSteps, left -= kWarp * kSteps) {
      Vector<C, kSteps> advantages, returns;
      C next = after[group](bootstrap, by);
#pragma unroll
      for (int step = kSteps - 1; step >= 0; --step) {
        const bool real = counted >> (group * kSteps + step) & 1u;
        const C advantage = difference[group][step] + next;
        advantages.at[step] = real ? advantage : C(0);
        returns.at[step] = real ? advantage + value[group][step] : C(0);
        if (real) next = fma(by.discount, value[group][step], by.decay * advantage);
      }
      store_some<kSteps, by_vector>(rows.advantages + at, advantages, left);
      store_some<kSteps, by_vector>(rows.returns + at, returns, left);
    }
  }
};

// The maps of the tiles of a cluster's blocks: lane i of every warp gets that of block i. Never called where there are no
// clusters.
template <typename C>
__device__ Map<C> maps_of_cluster(const Map<C>* own, int cluster) {
  auto map = identity<C>();
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  const auto group = cooperative_groups::this_cluster();
  group.sync();
  const int lane = threadIdx.x % kWarp;
  if (lane < cluster) map = *group.map_shared_rank(own, lane);
#endif
  return map;
}
// A block may not end while another block reads its shared memory. So each block arrives at the cluster barrier once it has
// read, writes its results, and only then waits.
__device__ inline void has_read() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().barrier_arrive();
#endif
}
__device__ inline void wait_for_readers() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().barrier_wait();
#endif
}

// As many blocks as fit without spilling registers: more blocks keep more loads in flight.
template <typename T, int kSteps, bool by_vector>
constexpr int kBlocksPerMultiprocessor = kSteps > 1 && by_vector && sizeof(T) < 8 ? 5 : 3;

// Block i of a cluster of `cluster` blocks takes tiles i, i + cluster, ... of the cluster's row, counted from the row's end.
template <typename T, int kSteps, int kGroups, bool by_vector>
__global__ void __launch_bounds__(kMaxWarps * kWarp, kBlocksPerMultiprocessor<T, kSteps, by_vector>) gae_kernel(
    const Rows<T> rows, int64_t steps, int cluster, const Factors<Compute<T>> by) {
  using C = Compute<T>;
  // Two buffers, so that one barrier a tile is enough: a tile's maps are read while the next tile's are written.
  static_assert(std::is_trivially_default_constructible_v<Map<C>>, "shared memory is not initialised");
  __shared__ Map<C> of_warp[2][kMaxWarps], of_tile[2];
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, rank = blockIdx.x % cluster;
  constexpr int kRun = kSteps * kGroups * kWarp;
  const int tiles = static_cast<int>((steps + kRun * warps - 1) / (kRun * warps));

  C bootstrap = 0;  // B of the first step after this iteration's tiles
  int buffer = 0;
  for (int done = 0; done < tiles; done += cluster, buffer ^= 1) {
    const int tile = tiles - 1 - done - rank;  // negative in the last iteration where the tiles run out
    const int64_t start = (static_cast<int64_t>(tile) * warps + warp) * kRun + threadIdx.x % kWarp * kSteps;
    const int left = tile < 0 ? 0 : static_cast<int>(min(steps - start, static_cast<int64_t>(kRun)));
    const int64_t at = blockIdx.x / cluster * steps + start;
    Tile<T, kSteps, kGroups, by_vector> mine;
    mine.read(rows, at, left);
    const Map<C> own = mine.scan(by);
    if (threadIdx.x % kWarp == 0) of_warp[buffer][warp] = own;
    __syncthreads();
    auto later = identity<C>(), whole = identity<C>();  // the maps of the warps after this one, and of all warps
    for (int w = warps - 1; w >= 0; --w) {
      if (w == warp) later = whole;
      whole = composed(whole, of_warp[buffer][w], by);
    }
    C here = bootstrap;  // B of the first step after this tile
    if (cluster == 1) {
      bootstrap = whole(bootstrap, by);
    } else {
      if (threadIdx.x == 0) of_tile[buffer] = whole;
      const Map<C> map = maps_of_cluster(&of_tile[buffer], cluster);
      for (int i = 0; i < cluster; ++i) {
        if (i == rank) here = bootstrap;
        const Map<C> other{__shfl_sync(kAllLanes, map.count, i), __shfl_sync(kAllLanes, map.offset, i)};
        bootstrap = other(bootstrap, by);
      }
      if (done + cluster >= tiles) has_read();
    }
    mine.write(rows, at, left, by, later(here, by));
  }
  if (cluster > 1) wait_for_readers();
}

// Sets the blocks of a row: enough to fill the GPU, and no more than the row has tiles.
template <typename Kernel>
cudaError_t choose_cluster(Kernel* kernel, int64_t rows, int64_t tiles, int& cluster) {
  cluster = 1;
  if (tiles == 1) return cudaSuccess;
  int device, multiprocessors;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  // Ask the compiled code, not the GPU: a new GPU may run code that was compiled for one without clusters.
  cudaFuncAttributes attributes;
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess || attributes.ptxVersion < 90) return error;
  while (cluster < kMaxCluster && cluster < tiles && rows * cluster < 4 * multiprocessors) cluster *= 2;
  return cudaSuccess;
}

template <typename T, int kSteps, int kGroups, bool by_vector>
cudaError_t launch_shape(const GaeArrays& a, double gamma, double lam, cudaStream_t stream) {
  using C = Compute<T>;
  constexpr int64_t kRun = kSteps * kGroups * kWarp;
  const int64_t warps = std::min<int64_t>(kMaxWarps, (a.steps + kRun - 1) / kRun);
  const auto kernel = gae_kernel<T, kSteps, kGroups, by_vector>;
  int cluster;
  const cudaError_t error =
      choose_cluster(kernel, a.rows, (a.steps + kRun * warps - 1) / (kRun * warps), cluster);
  if (error != cudaSuccess) return error;
  const Rows<T> rows{
      static_cast<const T*>(a.rewards), static_cast<const T*>(a.values),
      reinterpret_cast<const unsigned char*>(a.mask), static_cast<C*>(a.advantages), static_cast<C*>(a.returns)};
  return launch_clusters(
      kernel, {a.rows * cluster}, static_cast<int>(warps * kWarp), 0, cluster, stream, rows, a.steps, cluster,
      Factors<C>{static_cast<C>(gamma), static_cast<C>(gamma * lam), static_cast<C>(std::log2(gamma * lam))});
}

// Rows of whole vectors are loaded and stored 16 bytes at a time; where their addresses are not aligned, the same threads
// take the same steps one element at a time.
template <typename T>
cudaError_t launch_type(const GaeArrays& a, double gamma, double lam, cudaStream_t stream) {
  constexpr int kSteps = kVector<Compute<T>>;
  if (a.steps % kSteps != 0) return launch_shape<T, 1, 2 * kSteps, true>(a, gamma, lam, stream);
  const bool in_vectors = aligned(a.rewards) && aligned(a.values) && aligned(a.mask) && aligned(a.advantages) &&
                          aligned(a.returns);
  return in_vectors ? launch_shape<T, kSteps, 2, true>(a, gamma, lam, stream)
                    : launch_shape<T, kSteps, 2, false>(a, gamma, lam, stream);
}

}  // namespace

cudaError_t launch_gae(const GaeArrays& arrays, double gamma, double lam, cudaStream_t stream) {
  if (arrays.rows == 0 || arrays.steps == 0) return cudaSuccess;
  switch (arrays.type) {
    case Element::kFloat: return launch_type<float>(arrays, gamma, lam, stream);
    case Element::kBfloat16: return launch_type<__nv_bfloat16>(arrays, gamma, lam, stream);
    case Element::kHalf: return launch_type<__half>(arrays, gamma, lam, stream);
    default: return launch_type<double>(arrays, gamma, lam, stream);
  }
}

}  // namespace rlhf_lightning
