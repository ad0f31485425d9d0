// Memory of the CPU kernels. Compiled once, for the plain instruction set.
#include <cstdlib>
#include <new>

#include "parallel.h"

namespace msformer {

namespace {

void* allocate(std::size_t bytes) {
  return std::aligned_alloc(64, (bytes + 64) / 64 * 64);
}

struct ThreadScratch {
  void* data = nullptr;
  std::size_t bytes = 0;
  ~ThreadScratch() { std::free(data); }
};

thread_local ThreadScratch scratch;

}  // namespace

void* thread_scratch(std::size_t bytes) {
  if (scratch.data && bytes <= scratch.bytes) return scratch.data;
  std::free(scratch.data);
  scratch.data = allocate(bytes);
  scratch.bytes = scratch.data ? bytes : 0;
  return scratch.data;
}

void throw_out_of_memory() { throw std::bad_alloc(); }

Workspace::Workspace(std::size_t bytes) : data_(allocate(bytes)) {
  if (!data_) throw std::bad_alloc();
}

Workspace::~Workspace() { std::free(data_); }

}  // namespace msformer
