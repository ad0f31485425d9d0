// MixFFN, backward. Everything is made again from x; between the passes only the gradients of Z and U go through
// memory.
//
// 1. statistics (with a hidden norm): mean and deviation of Z of each token.
// 2. second half, a block for a chunk of hidden channels and a split of the tiles: the gradient of LayerNorm(Z) (of Z,
//    if there is no norm), its sums over the chunk for each token, and the weight gradients of fc2 and of the hidden
//    norm.
// 3. first half, likewise: the gradient of Z from these with a halo, that of U through the convolution, and the weight
//    gradients of fc1 and of the convolution.
// 4. tokens: the gradient of x through fc1 and the norm, for rows of tokens, and the sums over tokens that are left.
// 5. the partial sums of all splits, in a fixed order.
//
// Weight gradients stay in registers while a block walks over its tiles, so that each chunk of hidden channels has
// blocks of its own; they read x and grad_output again, which a large cache keeps.
#pragma once

#include "mix_ffn.h"

namespace msformer::gpu {

// The passes, each with the largest chunk of channels that fits. They return 0, a cudaError_t or OUT_OF_SHARED_MEMORY.
int mix_ffn_statistics(Engine engine, MixFFN a, void* stream);
int mix_ffn_second_backward(Engine engine, MixFFN a, void* stream);
int mix_ffn_first_backward(Engine engine, MixFFN a, void* stream);

// Blocks of the two halves: chunks of hidden channels, splits of the tiles, and parts of the channels of x.
template <class E>
dim3 grid_of_halves(const MixFFN& a) {
  using C = Config<E>;
  return dim3(ceil_div(a.arguments.hidden, C::CHUNK), a.scratch.splits, ceil_div(a.arguments.channels, C::OUT));
}

// Tiles [begin, end) of a split.
struct Walk {
  std::int64_t begin, end;

  DEV Walk(std::int64_t tiles, int split, int splits)
      : begin(tiles * split / splits), end(tiles * (split + 1) / splits) {}
};

// Sums over the groups of threads that have the same channel, then `write(channel, sum)` by the first group.
template <class C, class Write>
DEV void sum_groups(float* shared, const ExactSum& mine, Write out) {
  __syncthreads();
  shared[threadIdx.x] = mine.total;
  shared[C::THREADS + threadIdx.x] = mine.lost;
  __syncthreads();
  if (threadIdx.x < C::CHUNK) {
    ExactSum all;
    for (int i = threadIdx.x; i < C::THREADS; i += C::CHUNK) all.join({shared[i], shared[C::THREADS + i]});
    out(static_cast<int>(threadIdx.x), all.value());
  }
}

}  // namespace msformer::gpu
