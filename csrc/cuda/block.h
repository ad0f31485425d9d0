// What a kernel may use, for both compilers. Under nvcc these are thin wrappers of PTX (sm_80 and up); under a plain
// C++17 compiler with MSFORMER_CUDA_EMULATE they are those of an emulation on the CPU (emulated.h). Kernels use nothing
// else of CUDA but threadIdx, blockIdx, __syncthreads, __syncwarp and the shuffles.
//
// Global memory is read and written through `read` and `write` alone, so that the emulation can count it.
#pragma once

#include <cstdint>

#ifdef MSFORMER_CUDA_EMULATE
#include "emulated.h"
#else
#include <cuda_runtime.h>

#include <atomic>
#include <cstddef>

#define DEV __device__ __forceinline__
#define BOTH __host__ __device__ __forceinline__
#define KERNEL(threads, blocks_per_sm) __global__ void __launch_bounds__(threads, blocks_per_sm)
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

namespace msformer::gpu {

struct bf16 {
  std::uint16_t bits;
};
struct f16 {
  std::uint16_t bits;
};

DEV float to_float(float x) { return x; }
DEV float to_float(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
DEV float to_float(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
template <class T>
DEV T from_float(float x);
template <>
DEV float from_float<float>(float x) {
  return x;
}
template <>
DEV bf16 from_float<bf16>(float x) {
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <>
DEV f16 from_float<f16>(float x) {
  f16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
// Two values in bf16, the first one in the lower half.
DEV unsigned pack_bf16(float x, float y) {
  unsigned both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(y), "f"(x));
  return both;
}
DEV unsigned bits_of(float x) { return __float_as_uint(x); }
DEV float float_of(unsigned x) { return __uint_as_float(x); }

// a b, rounded, and no part of a fused multiply-add.
DEV float multiply(float a, float b) { return __fmul_rn(a, b); }

template <class T>
DEV T read(const T* from) {
  return *from;
}
template <class T>
DEV void write(T* to, T value) {
  *to = value;
}

DEV unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

// Copies BYTES (4, 8 or 16, and aligned so) from global to shared memory; there from the `wait` for its group on, and
// for other threads from the barrier after it.
template <int BYTES>
DEV void copy(void* to, const void* from) {
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(shared_address(to)), "l"(from));
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;\n" ::"r"(shared_address(to)), "l"(from), "n"(BYTES));
}
DEV void commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int GROUPS_LEFT>
DEV void wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(GROUPS_LEFT) : "memory");
}

// Four 8 x 8 matrices of 16-bit values: lane l gives the address of row l % 8 of matrix l / 8.
template <bool TRANSPOSED>
DEV void load_matrices(unsigned (&r)[4], const void* row) {
  if constexpr (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)));
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)));
}

// To the nearest number with 10 bits behind the leading one, ties away from zero; not finite stays so.
DEV float round_to_tf32(float x) {
  unsigned y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return __uint_as_float(y);
}

// sum += A B for A 16 x 16 (tf32: 16 x 8) and B 16 x 8 (8 x 8), fragments as in the PTX manual.
DEV void multiply_add(bf16, float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEV void multiply_add(f16, float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};\n"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEV void multiply_add(float, float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};\n"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The most dynamic shared memory that a block may have on the current device, in bytes; 0 where it cannot be asked.
inline int most_shared() {
  static std::atomic<int> known[64];
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= 64) return 0;
  if (int found = known[device].load(std::memory_order_relaxed)) return found;
  if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) return 0;
  known[device].store(bytes, std::memory_order_relaxed);
  return bytes;
}

inline int processors() {
  static std::atomic<int> known[64];
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= 64) return 1;
  if (int found = known[device].load(std::memory_order_relaxed)) return found;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 1;
  known[device].store(count, std::memory_order_relaxed);
  return count;
}

// Launches on the current device and the stream; returns a cudaError_t, 0 for success. Nothing waits for the device.
template <auto kernel, class Arguments>
int launch(dim3 grid, int threads, int shared, void* stream, const Arguments& arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return 0;
  static std::atomic<int> allowed[64];  // per kernel and device: an attribute that is set once
  if (shared > 48 * 1024) {
    int device = 0;
    if (cudaError_t e = cudaGetDevice(&device)) return static_cast<int>(e);
    if (device >= 64 || allowed[device].load(std::memory_order_relaxed) < shared) {
      if (cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared()))
        return static_cast<int>(e);
      if (device < 64) allowed[device].store(most_shared(), std::memory_order_relaxed);
    }
  }
  void* pointers[] = {const_cast<Arguments*>(&arguments)};
  return static_cast<int>(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(threads), pointers, shared,
                                           static_cast<cudaStream_t>(stream)));
}

}  // namespace msformer::gpu
#endif
