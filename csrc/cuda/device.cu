// What the module asks about the device.
#include "api.h"
#include "block.h"
#include "driver.h"

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
  if (error == emulated::OUT_OF_MEMORY) return "out of memory";
  return error == emulated::INVALID_CONFIGURATION ? "invalid configuration of a launch" : "unknown error";
#else
  return cudaGetErrorString(static_cast<cudaError_t>(error));
#endif
}

int shared_memory() { return most_shared(); }

std::string why_not_this_driver() {
#ifdef MSFORMER_CUDA_EMULATE
  return "";
#else
  int driver = 0;
  const cudaError_t error = cudaDriverGetVersion(&driver);
  return error ? cudaGetErrorString(error) : why_not_driver(CUDART_VERSION, driver);
#endif
}

std::vector<int> compiled_for() {
#ifdef MSFORMER_CUDA_EMULATE
  return {};
#else
  std::vector<int> found{__CUDA_ARCH_LIST__};  // of nvcc, e.g. 800,900
  for (int& architecture : found) architecture /= 10;
  return found;
#endif
}

#ifdef MSFORMER_CUDA_EMULATE
std::vector<Launch> record_launches(int what) {
  std::vector<Launch> found;
  auto& recorder = emulated::recorder();
  for (const auto& each : recorder.launched)
    found.emplace_back(each.kernel, each.threads, each.shared, each.asked, each.read, each.written);
  recorder = {static_cast<emulated::Record>(what), {}, {}};
  return found;
}
#endif

}  // namespace msformer::gpu
