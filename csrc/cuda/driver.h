// Whether a driver runs what was built with a CUDA runtime: a rule about version numbers, which needs neither.
#pragma once

#include <string>

namespace msformer::gpu {

// Versions as CUDA gives them: 1000 major + 10 minor; a driver's is the newest CUDA that it supports, 0 without a
// driver. Empty if it runs, else why not. Within a major version any driver runs any runtime.
inline std::string why_not_driver(int runtime, int driver) {
  auto text = [](int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); };
  if (driver == 0) return "there is no NVIDIA driver";
  const int major = runtime / 1000;
  if (driver / 1000 >= major) return "";
  std::string needed = "a driver for CUDA " + std::to_string(major);
  if (major == 11) needed = "driver 450";
  if (major == 12) needed = "driver 525";
  if (major == 13) needed = "driver 580";
  return "CUDA " + text(runtime) + " needs " + needed + " or newer, this one supports CUDA " + text(driver);
}

}  // namespace msformer::gpu
