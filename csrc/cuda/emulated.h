// A GPU on the CPU, for tests: the threads of a block are fibers, and what a kernel may use (block.h) is done by hand.
//
// It is made to show what a GPU would hide. A warp runs until all of it waits for the block, the furthest that it can
// get ahead of the others, and warps run in three orders (MSFORMER_EMULATE_ORDER: 0 as numbered, 1 backwards, any other
// number the seed of a random one): what lacks a barrier gives other results. Fresh shared memory is NaN. A copy of
// cp.async is carried out when it is waited for, never before, and its target is NaN until then. Misaligned accesses,
// barriers that not all threads reach, threads that wait at different barriers, and lanes that do not meet stop the
// program with the block, the thread and the kind. AddressSanitizer knows the fibers. Not seen: bank conflicts, and
// memory ordering between warps without a barrier.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <unordered_set>
#include <vector>

#include "fibers.h"

#define DEV inline
#define BOTH inline
#define KERNEL(threads, blocks_per_sm) inline void
#define DYNAMIC_SHARED(name) unsigned char* name = ::msformer::emulated::block().shared

namespace msformer::emulated {

// What a launch moves between global memory and the chip: bytes asked for, and bytes of distinct sectors of 32 bytes,
// which is what a large cache lets through.
struct Traffic {
  std::uint64_t asked = 0;
  std::unordered_set<std::uintptr_t> read, written;  // sectors

  void count(const void* at, int bytes, bool reads) {
    asked += static_cast<std::uint64_t>(bytes);
    const auto first = reinterpret_cast<std::uintptr_t>(at) / 32;
    const auto last = (reinterpret_cast<std::uintptr_t>(at) + bytes - 1) / 32;
    for (auto sector = first; sector <= last; sector++) (reads ? read : written).insert(sector);
  }
};

struct Launched {
  std::string kernel;  // as the compiler writes the function `launch`
  int threads, shared;
  std::uint64_t asked, read, written;  // bytes (see Traffic), where they are counted
};

// What becomes of launches: they run; they are recorded in place of running, for questions about sizes that would take
// too long; or they run, and what they move is counted.
enum class Record : int { nothing = 0, launches = 1, traffic = 2 };

struct Recorder {
  Record what = Record::nothing;
  std::vector<Launched> launched;
  Traffic traffic;
};
inline Recorder& recorder() {
  static Recorder r;
  return r;
}
inline void count_traffic(const void* at, int bytes, bool reads) {
  if (recorder().what == Record::traffic) recorder().traffic.count(at, bytes, reads);
}

}  // namespace msformer::emulated

#define threadIdx (::msformer::emulated::self().index)
#define blockIdx (::msformer::emulated::block().index)
#define blockDim (::msformer::emulated::block().size)
#define gridDim (::msformer::emulated::block().grid)

namespace msformer {

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulated::sync_block({file, line});
}
inline void __syncwarp(std::uint32_t mask = ~0u) {
  emulated::meet(mask, [] {});
}
template <class T>
T __shfl_sync(std::uint32_t mask, T value, int lane) {
  return emulated::exchange(mask, value, lane);
}
template <class T>
T __shfl_xor_sync(std::uint32_t mask, T value, int bits) {
  return emulated::exchange(mask, value, emulated::self().lane ^ bits);
}
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }

using std::max;
using std::min;

namespace gpu {

struct bf16 {
  std::uint16_t bits;
};
struct f16 {
  std::uint16_t bits;
};

inline unsigned bits_of(float x) {
  unsigned u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline float float_of(unsigned u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return float_of(static_cast<unsigned>(x.bits) << 16); }
inline float to_float(f16 x) {
  const unsigned sign = (x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  if (exponent == 31) return float_of(sign | 0x7f800000u | mantissa << 13);
  if (exponent) return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
  const float small = static_cast<float>(mantissa) * 0x1p-24f;
  return sign ? -small : small;
}
template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  const unsigned u = bits_of(x);
  if (x != x) return {0x7fff};
  return {static_cast<std::uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
template <>
inline f16 from_float<f16>(float x) {
  const auto sign = static_cast<std::uint16_t>(bits_of(x) >> 16 & 0x8000);
  const float size = std::fabs(x);
  if (x != x) return {0x7fff};
  if (size >= 65520.0f) return {static_cast<std::uint16_t>(sign | 0x7c00)};
  if (size < 0x1p-14f)  // nearbyint rounds ties to even
    return {static_cast<std::uint16_t>(sign | static_cast<unsigned>(std::nearbyint(size * 0x1p24f)))};
  const unsigned u = bits_of(size);
  return {static_cast<std::uint16_t>(sign | ((u + 0xfff + (u >> 13 & 1)) - (112u << 23)) >> 13)};
}

inline unsigned pack_bf16(float x, float y) {
  return from_float<bf16>(x).bits | static_cast<unsigned>(from_float<bf16>(y).bits) << 16;
}
inline float multiply(float a, float b) { return a * b; }

template <class T>
T read(const T* from) {
  emulated::check_alignment(from, alignof(T), "a misaligned read");
  emulated::count_traffic(from, sizeof(T), true);
  return *from;
}
template <class T>
void write(T* to, T value) {
  emulated::check_alignment(to, alignof(T), "a misaligned write");
  emulated::count_traffic(to, sizeof(T), false);
  *to = value;
}

template <int BYTES>
void copy(void* to, const void* from) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  emulated::check_alignment(to, BYTES, "a misaligned target of a copy");
  emulated::check_alignment(from, BYTES, "a misaligned source of a copy");
  emulated::count_traffic(from, BYTES, true);
  std::memset(to, 0xff, BYTES);
  emulated::self().open.push_back({to, from, BYTES});
}
inline void commit() {
  auto& f = emulated::self();
  f.groups.push_back(std::move(f.open));
  f.open.clear();
}
template <int GROUPS_LEFT>
void wait() {
  auto& f = emulated::self();
  while (static_cast<int>(f.groups.size()) > GROUPS_LEFT) {
    for (const auto& c : f.groups.front()) std::memcpy(c.to, c.from, c.bytes);
    f.groups.erase(f.groups.begin());
  }
}

template <bool TRANSPOSED>
void load_matrices(unsigned (&r)[4], const void* row) {
  emulated::check_alignment(row, 16, "a misaligned row of ldmatrix");
  const int side = emulated::self().turn & 1;
  auto* given = emulated::give(&row, sizeof(row));
  emulated::Warp& w = *emulated::self().warp;
  emulated::meet(~0u, [&] {
    for (int j = 0; j < 4; j++) {
      std::uint16_t m[8][8];
      for (int i = 0; i < 8; i++) {
        const void* p;
        std::memcpy(&p, given[8 * j + i], sizeof(p));
        std::memcpy(m[i], p, 16);
      }
      for (int l = 0; l < 32; l++) {
        const int i = l / 4, k = l % 4 * 2;
        w.made[side][l][j] = TRANSPOSED ? m[k][i] | unsigned(m[k + 1][i]) << 16 : m[i][k] | unsigned(m[i][k + 1]) << 16;
      }
    }
  });
  std::memcpy(r, w.made[side][emulated::self().lane], 16);
}

// To the nearest number with 10 bits behind the leading one, ties away from zero; not finite stays so.
inline float round_to_tf32(float x) {
  const unsigned u = bits_of(x);
  return (u & 0x7f800000u) == 0x7f800000u ? x : float_of((u + 0x1000u) & 0xffffe000u);
}

inline float cut_off(double x) {
  const float nearest = static_cast<float>(x);
  return std::isfinite(nearest) && std::fabs(static_cast<double>(nearest)) > std::fabs(x)
             ? std::nextafter(nearest, 0.0f)
             : nearest;
}

// K values of a row of A; PACKED of them in a register.
template <int K, int PACKED, class Value>
void multiply_add_by_hand(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, Value value) {
  const unsigned all[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const int side = emulated::self().turn & 1;
  auto* given = emulated::give(all, sizeof(all));
  emulated::Warp& w = *emulated::self().warp;
  emulated::meet(~0u, [&] {  // the last lane multiplies for the warp
    float left[16][K], right[K][8];
    double sum[16][8] = {};
    for (int l = 0; l < 32; l++)
      for (int e = 0; e < PACKED; e++) {
        const int k = l % 4 * PACKED + e;
        for (int q = 0; q < 4; q++) left[l / 4 + q % 2 * 8][k + q / 2 * (K / 2)] = value(given[l][q], e);
        for (int q = 0; q < 2; q++) right[k + q * (K / 2)][l / 4] = value(given[l][4 + q], e);
      }
    for (int i = 0; i < 16; i++)
      for (int k = 0; k < K; k++)
        for (int j = 0; j < 8; j++) sum[i][j] += static_cast<double>(left[i][k]) * right[k][j];
    for (int l = 0; l < 32; l++)
      for (int q = 0; q < 4; q++) w.sum[side][l][q] = sum[l / 4 + q / 2 * 8][l % 4 * 2 + q % 2];
  });
  // products are exact, and so is their sum to many bits; it is cut off, not rounded, to a float (Fasi et al.,
  // "Numerical behavior of NVIDIA tensor cores", 2021)
  for (int q = 0; q < 4; q++) d[q] = cut_off(d[q] + w.sum[side][emulated::self().lane][q]);
}
inline void multiply_add(bf16, float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  multiply_add_by_hand<16, 2>(
      d, a, b0, b1, [](unsigned r, int e) { return to_float(bf16{static_cast<std::uint16_t>(r >> 16 * e)}); });
}
inline void multiply_add(f16, float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  multiply_add_by_hand<16, 2>(d, a, b0, b1,
                              [](unsigned r, int e) { return to_float(f16{static_cast<std::uint16_t>(r >> 16 * e)}); });
}
// As the tensor cores do: of a float the upper 19 bits count, the others are cut off.
inline void multiply_add(float, float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  multiply_add_by_hand<8, 1>(d, a, b0, b1, [](unsigned r, int) { return float_of(r & 0xffffe000u); });
}

// MSFORMER_EMULATE_SHARED_KB: as on a GPU with that much, e.g. 99 (sm_86, sm_89) or 163 (sm_80).
inline int most_shared() { return emulated::number_from_environment("MSFORMER_EMULATE_SHARED_KB", 227) * 1024; }
// MSFORMER_EMULATE_PROCESSORS: how many multiprocessors work is split for.
inline int processors() { return emulated::number_from_environment("MSFORMER_EMULATE_PROCESSORS", 2); }

template <auto kernel, class Arguments>
int launch(dim3 grid, int threads, int shared, void* /*stream*/, const Arguments& arguments) {
  using namespace emulated;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return 0;
  if (threads < 1 || threads > 1024 || shared > most_shared() || grid.y > 65535 || grid.z > 65535)
    return INVALID_CONFIGURATION;
  if (recorder().what == Record::launches) {
    recorder().launched.push_back({__PRETTY_FUNCTION__, threads, shared, 0, 0, 0});
    return 0;
  }
  Block& b = block();
  b.grid = grid;
  b.size = dim3(threads);
  if (static_cast<int>(b.fibers.size()) != threads) {
    b.fibers.clear();
    b.fibers.resize(threads);
  }
  b.warps.resize((threads + 31) / 32);
  for (int i = 0; i < threads; i++) {
    Fiber& f = b.fibers[i];
    f.number = i;
    f.lane = i % 32;
    f.warp = &b.warps[i / 32];
    f.index = dim3(i, 0, 0);
  }
  b.body = [](void* a) { kernel(*static_cast<const Arguments*>(a)); };
  b.argument = const_cast<Arguments*>(&arguments);
  Traffic& traffic = recorder().traffic;
  traffic = {};
  // exactly as much as was asked for: a sanitizer sees what lies beyond
  void* allocated = nullptr;
  if (posix_memalign(&allocated, 128, shared)) return OUT_OF_MEMORY;
  std::unique_ptr<void, void (*)(void*)> memory(allocated, std::free);
  b.shared = static_cast<unsigned char*>(allocated);
  const int how = order();
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        std::memset(b.shared, 0xff, shared);
        b.index = dim3(x, y, z);
        run_block(how);
      }
  b.shared = nullptr;
  if (recorder().what == Record::traffic)
    recorder().launched.push_back(
        {__PRETTY_FUNCTION__, threads, shared, traffic.asked, 32 * traffic.read.size(), 32 * traffic.written.size()});
  return 0;
}

}  // namespace gpu
}  // namespace msformer
