// The entry points of the CUDA kernels: raw pointers, sizes and strides in (strides in values). No code of the device
// and nothing of CUDA is here, so that a plain compiler can call them.
//
// All work goes to the given stream of the current device; nothing waits for it and nothing is allocated. What a
// backward needs besides, scratch memory of the size that its `..._scratch` tells, comes from the caller. Functions
// return 0, a cudaError_t, or OUT_OF_SHARED_MEMORY where no configuration of a kernel fits the device.
#pragma once

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "../abi.h"

namespace msformer::gpu {

constexpr int OUT_OF_SHARED_MEMORY = -1;

// The dtype of the activations and how their products are done.
enum class Engine : int { bf16 = 0, f16 = 1, tf32 = 2, fp32 = 3 };

// A contiguous parameter: in the dtype of the activations, or float32 (`wide`); no data if it is absent.
struct Parameter {
  const void* data;
  bool wide;
};
// Its gradient, contiguous, in the dtype of the parameter; no data if it is not wanted.
struct ParameterGradient {
  void* data;
  bool wide;
};

// Tokens of one image after another, in any layout.
struct Tokens {
  void* data;
  std::int64_t batch_stride, token_stride, channel_stride;
};

// x [B, height * width, C]
struct MixFFNArguments {
  std::int64_t batch;
  int height, width, channels, hidden;
  float eps;
  bool skip, residual;
  ActivationFunction activation;
  Tokens x;
  MixFFNParameters<Parameter> parameters;
  Tokens output;               // forward
  Tokens grad_output, grad_x;  // backward, from here on
  MixFFNParameters<ParameterGradient> gradients;
  void* scratch;
};

int mix_ffn_forward(Engine engine, const MixFFNArguments& arguments, void* stream);
int mix_ffn_backward(Engine engine, const MixFFNArguments& arguments, void* stream);
// Bytes; of the arguments only sizes and parameters count. OUT_OF_SHARED_MEMORY where the backward cannot run.
std::int64_t mix_ffn_backward_scratch(Engine engine, const MixFFNArguments& arguments);

// The heads of one image after another, [B, heads, N, D], in any layout.
struct Heads {
  void* data;
  std::int64_t batch_stride, head_stride, token_stride, channel_stride;
};

// query [B, heads, queries, Dk], key [B, heads, tokens, Dk], value [B, heads, tokens, Dv], of at least one feature.
struct AttentionArguments {
  std::int64_t batch, heads, queries, tokens;
  int key_channels, value_channels;
  float query_scale, key_scale, output_scale;
  bool normalize_query, softmax;  // softmax: else both are divided by the square root of the number of tokens kept
  Heads query, key, value;
  Mask mask;
  float *context, *key_max, *key_sum;  // [B, heads, Dk, Dv] and [B, heads, Dk], contiguous; the forward fills them
  Heads output;                        // forward
  Heads grad_output;                   // backward, from here on
  const float* grad_context;           // contiguous; null: zero
  Heads grad_query, grad_key, grad_value;
  void* scratch;  // of both
};

int attention_forward(Engine engine, const AttentionArguments& arguments, void* stream);
// The output from a context that is known; queries that are divided by a length take it from key_sum.
int attention_output(Engine engine, const AttentionArguments& arguments, void* stream);
int attention_backward(Engine engine, const AttentionArguments& arguments, void* stream);
// Bytes; of the arguments only sizes count.
std::int64_t attention_forward_scratch(Engine engine, const AttentionArguments& arguments);
std::int64_t attention_backward_scratch(Engine engine, const AttentionArguments& arguments);

// Contiguous float32, written by the forward: [B, heads, keys / heads, values / heads], [B, keys] twice, and [B, keys,
// C].
struct SelfAttentionState {
  float *context, *key_max, *key_sum, *key_tokens;
};

// x [B, tokens, C]; channels, key and value features (of all heads) 1 to 128, batch at least 1, tokens below 2^31.
struct SelfAttentionArguments {
  std::int64_t batch, tokens;
  int channels, keys, values, heads;
  float eps;
  bool residual;
  Tokens x;
  Mask mask;
  SelfAttentionParameters<Parameter> parameters;
  SelfAttentionState state;
  Tokens output;              // forward
  Tokens grad_output;         // backward, from here on
  const float* grad_context;  // as the context; none: zeros
  Tokens grad_x;
  SelfAttentionParameters<ParameterGradient> gradients;
  void* scratch;  // both
};

int self_attention_forward(Engine engine, const SelfAttentionArguments& arguments, void* stream);
std::int64_t self_attention_forward_scratch(Engine engine, const SelfAttentionArguments& arguments);
int self_attention_backward(Engine engine, const SelfAttentionArguments& arguments, void* stream);
std::int64_t self_attention_backward_scratch(Engine engine, const SelfAttentionArguments& arguments);

// Whether this is the emulation on the CPU.
bool is_emulated();
// Bytes that a block may have on the current device; 0 without one.
int shared_memory();
const char* error_text(int error);
// Why the driver here does not run these kernels; empty if it does.
std::string why_not_this_driver();
// The compute capabilities that there is code for, times ten, ascending; for newer ones there is PTX of the first. None
// for the emulation.
std::vector<int> compiled_for();

#ifdef MSFORMER_CUDA_EMULATE
// Kernel, threads, bytes of shared memory; bytes asked of global memory, and of distinct sectors read and written.
using Launch = std::tuple<std::string, int, int, std::uint64_t, std::uint64_t, std::uint64_t>;
// What was recorded of launches until now, and what is to be from now on: 0 nothing, 1 launches in place of running
// them, 2 what they move.
std::vector<Launch> record_launches(int what);
#endif

}  // namespace msformer::gpu
