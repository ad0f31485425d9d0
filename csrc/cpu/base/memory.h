// Memory of a kernel call: scratch that a thread keeps, and workspaces.
#pragma once

#include <cstddef>

namespace msformer {

// At least `bytes` of 64-byte aligned memory of the calling thread, kept until the thread ends; null when there is
// none.
void* thread_scratch(std::size_t bytes);

// The same, apart from it, for an engine that rewrites the operands of a product.
void* operand_scratch(std::size_t bytes);

[[noreturn]] void throw_out_of_memory();

// Aligned memory, not initialised, that lives as long as one kernel call. The calling thread keeps the last one, up to
// 64 MiB, for its next call.
class Workspace {
 public:
  explicit Workspace(std::size_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
  std::size_t bytes_;
};

}  // namespace msformer
