// Programs of test_emulation.py for the emulation of the GPU (csrc/cuda/emulated.h): small kernels that are right, or
// have the bug that the command line names. What is neither text nor a number of the command line goes through standard
// input and output.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda/driver.h"
#include "cuda/tiles.h"

namespace msformer::gpu {
namespace {

enum class Bug {
  none,
  no_barrier,
  no_trailing_barrier,
  no_wait,
  never_waited_for,
  wrong_column,
  no_row_bound,
  misaligned_pad,
};
const std::map<std::string, Bug> BUGS = {
    {"none", Bug::none},
    {"no_barrier", Bug::no_barrier},
    {"no_trailing_barrier", Bug::no_trailing_barrier},
    {"no_wait", Bug::no_wait},
    {"never_waited_for", Bug::never_waited_for},
    {"wrong_column", Bug::wrong_column},
    {"no_row_bound", Bug::no_row_bound},
    {"misaligned_pad", Bug::misaligned_pad},
};

// Y [m, n] = X [m, k] W [n, k]^T, X stored [k, m] and W [k, n] where transposed. Y is float32.
struct Gemm {
  const void *x, *w;
  float* y;
  int m, n, k;
  Bug bug;
};

constexpr int TILE = 32, WARPS = 4, THREADS = 32 * WARPS, STAGES = 2;

// A TILE x TILE tile from (row, column) on of a matrix [rows, columns]; zeros beyond it.
template <class T>
DEV void fill_tile(T* tile, int stride, const T* from, int rows, int columns, int row, int column, bool bounded) {
  constexpr int GROUP = 16 / sizeof(T);
  for (int i = threadIdx.x; i < TILE * TILE / GROUP; i += THREADS) {
    const int r = i / (TILE / GROUP), c = i % (TILE / GROUP) * GROUP;
    if ((row + r < rows || !bounded) && column + c < columns)
      copy<16>(tile + r * stride + c, from + static_cast<std::int64_t>(row + r) * columns + column + c);
    else
      for (int e = 0; e < GROUP; e++) tile[r * stride + c + e] = from_float<T>(0.0f);
  }
}

template <class E, bool X_TRANSPOSED, bool W_TRANSPOSED>
KERNEL(THREADS, 1)
gemm_kernel(const Gemm a) {
  using T = typename E::Store;
  DYNAMIC_SHARED(memory);
  const int stride = tile_stride<T>(TILE) + (a.bug == Bug::misaligned_pad ? 1 : 0);
  const int row = blockIdx.x * TILE, column = blockIdx.y * TILE;
  auto x_tile = [&](int step) { return reinterpret_cast<T*>(memory) + step % STAGES * 2 * TILE * stride; };
  auto w_tile = [&](int step) { return x_tile(step) + TILE * stride; };
  auto fill = [&](int step) {
    const T *x = static_cast<const T*>(a.x), *w = static_cast<const T*>(a.w);
    const bool bounded = a.bug != Bug::no_row_bound;
    if (X_TRANSPOSED)
      fill_tile(x_tile(step), stride, x, a.k, a.m, step * TILE, row, bounded);
    else
      fill_tile(x_tile(step), stride, x, a.m, a.k, row, step * TILE, bounded);
    if (W_TRANSPOSED)
      fill_tile(w_tile(step), stride, w, a.k, a.n, step * TILE, column, bounded);
    else
      fill_tile(w_tile(step), stride, w, a.n, a.k, column, step * TILE, bounded);
    commit();
  };

  Product<E, TILE, TILE, 2, WARPS> y;
  y.clear();
  const int steps = ceil_div(a.k, TILE);
  fill(0);
  for (int step = 0; step < steps; step++) {
    if (step + 1 < steps) {
      fill(step + 1);
      if (a.bug != Bug::no_wait) wait<1>();
    } else if (a.bug != Bug::never_waited_for) {
      wait<0>();
    }
    if (a.bug != Bug::no_barrier) __syncthreads();
    const T* w = w_tile(step);
    if (a.bug == Bug::wrong_column && threadIdx.x < 64) w += 8 * (W_TRANSPOSED ? 1 : stride);
    y.template add<X_TRANSPOSED, !W_TRANSPOSED>(x_tile(step), stride, w, stride, TILE);
    if (a.bug != Bug::no_trailing_barrier) __syncthreads();
  }
  y.each([&](int r, int c, float sum) {
    if (row + r < a.m && column + c < a.n) write(a.y + static_cast<std::int64_t>(row + r) * a.n + column + c, sum);
  });
}

float number(unsigned& state) {  // in [-1, 1)
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(static_cast<int>(state)) * 0x1p-31f;
}

// Prints the largest error of the product, relative to the sum of the sizes of its terms.
template <class E, bool X_TRANSPOSED, bool W_TRANSPOSED>
int gemm(Bug bug) {
  using T = typename E::Store;
  constexpr int M = 40, N = 48, K = 80;
  unsigned state = 1;
  std::vector<T> x, w;
  for (int i = 0; i < M * K; i++) x.push_back(from_float<T>(number(state)));
  for (int i = 0; i < N * K; i++) w.push_back(from_float<T>(number(state)));
  std::vector<float> y(M * N, float_of(0x7fc00000u));
  const Gemm a{x.data(), w.data(), y.data(), M, N, K, bug};
  const int shared = STAGES * 2 * TILE * (tile_stride<T>(TILE) + 1) * static_cast<int>(sizeof(T));
  const dim3 grid(ceil_div(M, TILE), ceil_div(N, TILE));
  if (int error = launch<gemm_kernel<E, X_TRANSPOSED, W_TRANSPOSED>>(grid, THREADS, shared, nullptr, a)) return error;
  double worst = 0;
  for (int i = 0; i < M; i++)
    for (int j = 0; j < N; j++) {
      double sum = 0, sizes = 0;
      for (int k = 0; k < K; k++) {
        const double term = static_cast<double>(to_float(x[X_TRANSPOSED ? k * M + i : i * K + k])) *
                            to_float(w[W_TRANSPOSED ? k * N + j : j * K + k]);
        sum += term;
        sizes += std::fabs(term);
      }
      const double error = std::fabs(y[i * N + j] - sum) / sizes;
      if (worst == worst && !(error <= worst)) worst = error;  // NaN stays
    }
  std::printf("%.3g\n", worst);
  return 0;
}

template <class E>
int gemm(const std::string& transposed, Bug bug) {
  if (transposed == "x") return gemm<E, true, false>(bug);
  if (transposed == "w") return gemm<E, false, true>(bug);
  if (transposed == "xw") return gemm<E, true, true>(bug);
  return gemm<E, false, false>(bug);
}

// Kernels that must stop the emulation, or show NaN.
struct Small {
  float* values;
  int count;
};

KERNEL(64, 1)
divergent_barrier_kernel(const Small a) {
  if (threadIdx.x < 40) __syncthreads();
  __syncthreads();
  write(a.values + threadIdx.x, 1.0f);
}

KERNEL(64, 1)
early_end_kernel(const Small a) {  // allowed: what has ended is not waited for
  if (threadIdx.x >= 40) return;
  __syncthreads();
  write(a.values + threadIdx.x, 1.0f);
}

KERNEL(64, 1)
missing_lane_kernel(const Small a) {
  float x = 1;
  if (threadIdx.x != 37) x += __shfl_xor_sync(ALL_LANES, x, 1);
  write(a.values + threadIdx.x, x);
}

KERNEL(64, 1)
wrong_mask_kernel(const Small a) {
  float x = 1;
  x += __shfl_xor_sync(threadIdx.x % 2 ? ALL_LANES : 0x55555555u, x, 2);
  write(a.values + threadIdx.x, x);
}

KERNEL(64, 1)
barrier_of_part_of_a_warp_kernel(const Small a) {
  if (threadIdx.x % 32 < 8)
    __syncthreads();
  else
    __syncwarp();
  write(a.values + threadIdx.x, 1.0f);
}

KERNEL(64, 1)
misaligned_read_kernel(const Small a) {
  const auto* shifted = reinterpret_cast<const float*>(reinterpret_cast<const char*>(a.values) + 2);
  write(a.values + threadIdx.x, read(shifted));
}

KERNEL(64, 1)
read_before_write_kernel(const Small a) {
  DYNAMIC_SHARED(memory);
  float* shared = reinterpret_cast<float*>(memory);
  const float x = shared[(threadIdx.x + 1) % 64];
  __syncthreads();
  shared[threadIdx.x] = 1;
  __syncthreads();
  write(a.values + threadIdx.x, x + shared[threadIdx.x]);
}

KERNEL(64, 1)
late_copy_kernel(const Small a) {  // 1 where a copy is not there before it is waited for, and then is
  DYNAMIC_SHARED(memory);
  float* shared = reinterpret_cast<float*>(memory);
  shared[threadIdx.x] = 5;
  copy<4>(shared + threadIdx.x, a.values + threadIdx.x);
  const float copied = shared[threadIdx.x];
  commit();
  const float committed = shared[threadIdx.x];
  wait<0>();
  const float found = shared[threadIdx.x];
  const bool late = copied != copied && committed != committed && found == to_float(read(a.values + threadIdx.x));
  write(a.values + threadIdx.x, late ? 1.0f : 0.0f);
}

KERNEL(64, 1)
beyond_shared_memory_kernel(const Small a) {
  DYNAMIC_SHARED(memory);
  float* shared = reinterpret_cast<float*>(memory);
  shared[threadIdx.x + 1] = 1;
  __syncthreads();
  write(a.values + threadIdx.x, shared[threadIdx.x + 1]);
}

KERNEL(64, 1)
large_stack_kernel(const Small a) {
  volatile float local[emulated::STACK / 4];
  for (float& value : const_cast<float (&)[emulated::STACK / 4]>(local)) value = 1;
  write(a.values + threadIdx.x, local[63]);
}

template <auto kernel>
int small() {
  std::vector<float> values(64, 0.0f);
  if (int error = launch<kernel>(dim3(2), 64, 256, nullptr, Small{values.data(), 64})) return error;
  for (float value : values) std::printf("%g ", value);
  return 0;
}

const std::map<std::string, int (*)()> SMALL = {
    {"divergent_barrier", small<divergent_barrier_kernel>},
    {"early_end", small<early_end_kernel>},
    {"missing_lane", small<missing_lane_kernel>},
    {"wrong_mask", small<wrong_mask_kernel>},
    {"barrier_of_part_of_a_warp", small<barrier_of_part_of_a_warp_kernel>},
    {"misaligned_read", small<misaligned_read_kernel>},
    {"read_before_write", small<read_before_write_kernel>},
    {"late_copy", small<late_copy_kernel>},
    {"beyond_shared_memory", small<beyond_shared_memory_kernel>},
    {"large_stack", small<large_stack_kernel>},
};

template <class T>
std::vector<T> input() {
  std::vector<T> values(1);
  std::size_t count = 0;
  while (std::fread(&values[count], sizeof(T), 1, stdin) == 1) values.resize(++count + 1);
  values.resize(count);
  return values;
}
template <class T>
int output(const std::vector<T>& values) {
  return std::fwrite(values.data(), sizeof(T), values.size(), stdout) == values.size() ? 0 : 1;
}

template <class To, class From, class F>
int each(F f) {
  std::vector<To> made;
  for (From value : input<From>()) made.push_back(f(value));
  return output(made);
}

// One instruction of a warp: 32 lanes of registers in and out.
struct Registers {
  unsigned a[4], b[2];
  float sum[4];
};
struct Instruction {
  Registers* lanes;
  const std::uint16_t* matrices;
};

template <class T>
KERNEL(32, 1)
multiply_add_kernel(const Instruction i) {
  Registers& r = i.lanes[threadIdx.x];
  multiply_add(T{}, r.sum, r.a, r.b[0], r.b[1]);
}
template <bool TRANSPOSED>
KERNEL(32, 1)
load_matrices_kernel(const Instruction i) {
  DYNAMIC_SHARED(memory);
  auto* rows = reinterpret_cast<std::uint16_t*>(memory) + threadIdx.x * 8;
  std::memcpy(rows, i.matrices + threadIdx.x * 8, 16);
  __syncwarp();
  load_matrices<TRANSPOSED>(i.lanes[threadIdx.x].a, rows);
}

template <class T>
int multiply_add_program() {
  std::vector<Registers> lanes = input<Registers>();
  if (lanes.size() != 32) return 1;
  if (int error = launch<multiply_add_kernel<T>>(dim3(1), 32, 0, nullptr, Instruction{lanes.data(), nullptr}))
    return error;
  return output(lanes);
}
template <bool TRANSPOSED>
int load_matrices_program() {
  const std::vector<std::uint16_t> matrices = input<std::uint16_t>();
  std::vector<Registers> lanes(32);
  if (matrices.size() != 4 * 8 * 8) return 1;
  const Instruction arguments{lanes.data(), matrices.data()};
  if (int error = launch<load_matrices_kernel<TRANSPOSED>>(dim3(1), 32, 512, nullptr, arguments)) return error;
  return output(lanes);
}

const std::map<std::string, int (*)()> PROGRAMS = {
    {"to_bf16", [] { return each<std::uint16_t, float>([](float x) { return from_float<bf16>(x).bits; }); }},
    {"to_f16", [] { return each<std::uint16_t, float>([](float x) { return from_float<f16>(x).bits; }); }},
    {"from_bf16", [] { return each<float, std::uint16_t>([](std::uint16_t x) { return to_float(bf16{x}); }); }},
    {"from_f16", [] { return each<float, std::uint16_t>([](std::uint16_t x) { return to_float(f16{x}); }); }},
    {"round_to_tf32", [] { return each<float, float>([](float x) { return round_to_tf32(x); }); }},
    {"multiply_add_bf16", multiply_add_program<bf16>},
    {"multiply_add_f16", multiply_add_program<f16>},
    {"multiply_add_tf32", multiply_add_program<float>},
    {"load_matrices", load_matrices_program<false>},
    {"load_matrices_transposed", load_matrices_program<true>},
};

int run(const std::vector<std::string>& words) {
  if (words.size() == 4 && words[0] == "gemm" && BUGS.count(words[3])) {
    const Bug bug = BUGS.at(words[3]);
    if (words[1] == "bf16") return gemm<Bf16>(words[2], bug);
    if (words[1] == "f16") return gemm<F16>(words[2], bug);
    if (words[1] == "tf32") return gemm<Tf32>(words[2], bug);
    if (words[1] == "fp32") return gemm<Fp32>(words[2], bug);
  }
  if (words.size() == 1 && SMALL.count(words[0])) return SMALL.at(words[0])();
  if (words.size() == 1 && PROGRAMS.count(words[0])) return PROGRAMS.at(words[0])();
  if (words.size() == 3 && words[0] == "driver")
    return std::printf("%s\n", why_not_driver(std::stoi(words[1]), std::stoi(words[2])).c_str()) < 0;
  std::fprintf(stderr, "unknown command\n");
  return 2;
}

}  // namespace
}  // namespace msformer::gpu

int main(int count, char** words) { return msformer::gpu::run({words + 1, words + count}); }
