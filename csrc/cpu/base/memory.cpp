// Memory of the CPU kernels. Compiled once, for any processor.
#include "memory.h"

#include <cstdlib>
#include <new>

namespace msformer {

namespace {

void* allocate(std::size_t bytes) { return std::aligned_alloc(64, (bytes + 64) / 64 * 64); }

// The last workspace that the thread gave back: a call that needs no more than the one before takes it again, with its
// pages already there. Larger ones are returned to the system.
constexpr std::size_t kKeptBytes = std::size_t{64} << 20;

struct Kept {
  void* data = nullptr;
  std::size_t bytes = 0;
  ~Kept() { std::free(data); }
};

thread_local Kept kept;

struct ThreadScratch {
  void* data = nullptr;
  std::size_t bytes = 0;
  ~ThreadScratch() { std::free(data); }
};

thread_local ThreadScratch scratch, operands;

void* at_least(ThreadScratch& scratch, std::size_t bytes) {
  if (scratch.data && bytes <= scratch.bytes) return scratch.data;
  std::free(scratch.data);
  scratch.data = allocate(bytes);
  scratch.bytes = scratch.data ? bytes : 0;
  return scratch.data;
}

}  // namespace

void* thread_scratch(std::size_t bytes) { return at_least(scratch, bytes); }

void* operand_scratch(std::size_t bytes) {
  void* data = at_least(operands, bytes);
  if (!data) throw_out_of_memory();
  return data;
}

void throw_out_of_memory() { throw std::bad_alloc(); }

Workspace::Workspace(std::size_t bytes) : data_(kept.data), bytes_(kept.bytes) {
  kept.data = nullptr;
  if (data_ && bytes <= bytes_) return;
  std::free(data_);
  data_ = allocate(bytes);
  bytes_ = bytes;
  if (!data_) throw std::bad_alloc();
}

Workspace::~Workspace() {
  if (bytes_ > kKeptBytes || (kept.data && kept.bytes >= bytes_)) {
    std::free(data_);
    return;
  }
  std::free(kept.data);
  kept.data = data_;
  kept.bytes = bytes_;
}

}  // namespace msformer
