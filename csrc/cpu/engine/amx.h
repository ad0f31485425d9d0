// Intel AMX: products of tiles of bfloat16, 16 x 32 times 32 x 16, summed in float. As instructions of its own: GCC's
// intrinsics do not tell the compiler which memory they read. Here a block of sums, which begins with `clear` or
// `load_sum`, does: all of it, as written by then. While a block is summed its operands stay as they are.
//
// The two rows and two columns of a block of four sums: tmm0 to tmm3 hold the sums (row by row), tmm4 and tmm5 the left
// tiles, tmm6 and tmm7 the right ones.
#pragma once

#include <cstdint>
#include <initializer_list>

namespace msformer::MSFORMER_VARIANT {

class Amx {
 public:
  static constexpr bool kAlways = false;  // whether products are done on tiles even where that does not pay

  Amx() = default;
  Amx(const Amx&) = delete;
  Amx& operator=(const Amx&) = delete;
  // other libraries use the tiles in the same threads, and find them as they expect them
  ~Amx() { asm volatile("tilerelease" ::: "memory"); }

  // the rows of sums and left tiles that are used, of the first and of the second row of tiles; clears all tiles
  void configure(int first, int second) {
    struct alignas(64) Configuration {
      std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
      std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      std::uint8_t rows[16] = {};
    } configuration;
    for (int tile : {0, 1, 4}) configuration.rows[tile] = static_cast<std::uint8_t>(first);
    for (int tile : {2, 3, 5}) configuration.rows[tile] = static_cast<std::uint8_t>(second ? second : 1);
    for (int tile : {6, 7}) configuration.rows[tile] = 16;
    asm volatile("ldtilecfg %0" ::"m"(configuration) : "memory");
  }

  template <int SUM>
  void clear() {
    asm volatile("tilezero %%tmm%c0" ::"i"(SUM) : "memory");
  }
  template <int SUM>
  void load_sum(const float* from, std::int64_t leading) {
    asm volatile("" ::: "memory");
    load<SUM>(from, leading * 4);
  }
  template <int SUM>
  void store_sum(float* to, std::int64_t leading) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(SUM), "r"(to), "r"(leading * 4) : "memory");
  }
  template <int ROW>
  void load_left(const std::uint16_t* from, std::int64_t leading) {
    load<4 + ROW>(from, leading * 2);
  }
  template <int COLUMN>
  void load_right(const std::uint16_t* tile) {
    load<6 + COLUMN>(tile, 64);
  }
  template <int ROW, int COLUMN>
  void multiply_add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(2 * ROW + COLUMN), "i"(4 + ROW), "i"(6 + COLUMN));
  }

 private:
  template <int TILE>
  static void load(const void* from, std::int64_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(TILE), "r"(from), "r"(stride));
  }
};

}  // namespace msformer::MSFORMER_VARIANT
