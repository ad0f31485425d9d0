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
enum class Engine : int { bf16 = 0, f16 = 1, tf32 = 2, tf32x3 = 3, fp32 = 4 };

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

// Whether this is the emulation on the CPU.
bool is_emulated();
// Bytes that a block may have on the current device; 0 without one.
int shared_memory();
const char* error_text(int error);
// The emulation alone: from now on launches are only recorded, or no longer. Returns the kernel, threads and bytes of
// shared memory of those that were.
std::vector<std::tuple<std::string, int, int>> record_launches(bool on);
// Why the driver here does not run these kernels; empty if it does.
std::string why_not_this_driver();
// The compute capabilities that there is code for, times ten, ascending; for newer ones there is PTX of the first. None
// for the emulation.
std::vector<int> compiled_for();

}  // namespace msformer::gpu
