// What the module asks about the device.
#include "api.h"
#include "block.h"

namespace msformer::gpu {

bool is_emulated() {
#ifdef MSFORMER_CUDA_EMULATE
  return true;
#else
  return false;
#endif
}

const char* error_text(int error) {
#ifdef MSFORMER_CUDA_EMULATE
  return error == emulated::INVALID_CONFIGURATION ? "invalid configuration of a launch" : "unknown error";
#else
  return cudaGetErrorString(static_cast<cudaError_t>(error));
#endif
}

int shared_memory() { return most_shared(); }

}  // namespace msformer::gpu
