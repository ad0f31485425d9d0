// Runs the instructions of AMX on a processor that has none: each of them ends in SIGILL, and the handler does what
// Intel's manual says. It shares no code with the emulation that it is compared with.
#include "trap.h"

#include <signal.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

struct Tile {
  int rows, row_bytes;
  unsigned char data[16][64];
};
thread_local Tile tiles[8];
thread_local bool configured = false;
long executed = 0;  // about, for threads count together

[[noreturn]] void fail(const char* why) {
  std::fprintf(stderr, "trap: %s\n", why);
  std::_Exit(3);
}

Tile& tile(int number) {
  if (number > 7 || !configured || !tiles[number].rows || !tiles[number].row_bytes) fail("a tile is not configured");
  return tiles[number];
}

std::uint64_t general(const ucontext_t* context, int number) {
  static const int names[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return static_cast<std::uint64_t>(context->uc_mcontext.gregs[names[number]]);
}

struct Address {
  unsigned char* base;
  std::int64_t index;
  const unsigned char* end;  // of the instruction
};

// the memory operand whose ModRM byte is at `at`; x and b extend its registers
Address address_of(const ucontext_t* context, const unsigned char* at, int x, int b) {
  const int mode = *at >> 6, low = *at & 7;
  ++at;
  std::uint64_t base = 0;
  std::int64_t index = 0;
  bool wide = mode == 2, relative = false;
  if (low == 4) {
    const int scale = *at >> 6, index_number = (*at >> 3 & 7) | x << 3, base_number = *at & 7;
    ++at;
    if (index_number != 4) index = static_cast<std::int64_t>(general(context, index_number)) << scale;
    if (mode == 0 && base_number == 5)
      wide = true;
    else
      base = general(context, base_number | b << 3);
  } else if (mode == 0 && low == 5) {
    wide = relative = true;
  } else {
    base = general(context, low | b << 3);
  }
  std::int32_t far = 0;
  if (wide) {
    std::memcpy(&far, at, 4);
    at += 4;
  } else if (mode == 1) {
    far = static_cast<signed char>(*at++);
  }
  if (relative) base = reinterpret_cast<std::uint64_t>(at);
  return {reinterpret_cast<unsigned char*>(base + static_cast<std::uint64_t>(static_cast<std::int64_t>(far))), index,
          at};
}

void configure(const unsigned char* memory) {
  if (memory[0] != 1 || memory[1] != 0) fail("palette or start row");
  for (int i = 2; i < 16; ++i)
    if (memory[i]) fail("reserved bytes of a configuration");
  for (int i = 0; i < 16; ++i) {
    std::uint16_t bytes;
    std::memcpy(&bytes, memory + 16 + 2 * i, 2);
    const int rows = memory[48 + i];
    if (i >= 8 ? bytes || rows : bytes > 64 || rows > 16 || !bytes != !rows) fail("shape of a tile");
    if (i < 8) tiles[i] = {rows, bytes, {}};
  }
  configured = true;
}

float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

float bfloat16(const unsigned char* at) {
  std::uint32_t bits = 0;
  std::memcpy(reinterpret_cast<unsigned char*>(&bits) + 2, at, 2);
  float x;
  std::memcpy(&x, &bits, 4);
  return flushed(x);
}

void multiply_add(Tile& sums, const Tile& left, const Tile& right) {
  if (sums.rows != left.rows || left.row_bytes / 4 != right.rows || sums.row_bytes != right.row_bytes)
    fail("tiles do not fit");
  for (int m = 0; m < sums.rows; ++m)
    for (int n = 0; n < sums.row_bytes / 4; ++n) {
      float even = 0, odd = 0, sum;
      for (int k = 0; k < right.rows; ++k) {
        even = flushed(std::fma(bfloat16(left.data[m] + 4 * k), bfloat16(right.data[k] + 4 * n), even));
        odd = flushed(std::fma(bfloat16(left.data[m] + 4 * k + 2), bfloat16(right.data[k] + 4 * n + 2), odd));
      }
      std::memcpy(&sum, sums.data[m] + 4 * n, 4);
      sum = flushed(flushed(sum) + flushed(even + odd));
      std::memcpy(sums.data[m] + 4 * n, &sum, 4);
    }
}

void handle(int, siginfo_t*, void* data) {
  auto* context = static_cast<ucontext_t*>(data);
  auto* at = reinterpret_cast<const unsigned char*>(context->uc_mcontext.gregs[REG_RIP]);
  if (at[0] != 0xc4 || (at[1] & 0x1f) != 2 || (at[2] & 0x84)) fail("an unknown instruction");
  const int x = !(at[1] & 0x40), b = !(at[1] & 0x20), other = ~at[2] >> 3 & 15, prefix = at[2] & 3;
  const int opcode = at[3], mode = at[4] >> 6, reg = at[4] >> 3 & 7, low = at[4] & 7;
  const unsigned char* end = at + 5;
  enum { none, p66, pf3, pf2 };
  if (opcode == 0x49 && prefix == none && mode == 3) {  // tilerelease
    configured = false;
  } else if (opcode == 0x49 && prefix == none) {  // ldtilecfg
    const Address from = address_of(context, at + 4, x, b);
    configure(from.base + from.index);
    end = from.end;
  } else if (opcode == 0x49 && prefix == pf2 && mode == 3) {  // tilezero
    std::memset(tile(reg).data, 0, sizeof tiles[0].data);
  } else if (opcode == 0x4b && (prefix == pf2 || prefix == pf3) && mode != 3) {  // tileloadd, tilestored
    const Address where = address_of(context, at + 4, x, b);
    Tile& t = tile(reg);
    for (int row = 0; row < t.rows; ++row) {
      unsigned char* memory = where.base + row * where.index;
      if (prefix == pf2)
        std::memcpy(t.data[row], memory, static_cast<std::size_t>(t.row_bytes));
      else
        std::memcpy(memory, t.data[row], static_cast<std::size_t>(t.row_bytes));
    }
    end = where.end;
  } else if (opcode == 0x5c && prefix == pf3 && mode == 3) {  // tdpbf16ps
    multiply_add(tile(reg), tile(low), tile(other));
  } else {
    fail("an unknown instruction of AMX");
  }
  ++executed;
  context->uc_mcontext.gregs[REG_RIP] = reinterpret_cast<long long>(end);
}

}  // namespace

void trap_tile_instructions() {
  struct sigaction action{};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, nullptr);
}

bool tiles_are_released() { return !configured; }
long trapped_instructions() { return executed; }
