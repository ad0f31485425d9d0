// Compiled once, for any processor.
#include "tile_permission.h"

#if defined(__x86_64__) && defined(__linux__)

#include <cpuid.h>
#include <errno.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>

#include "processor.h"

namespace msformer {
namespace {

enum class Tiles { permitted, absent, refused };

struct Found {
  Tiles tiles;
  char why[160];
};

bool processor_has_tiles() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBFloat16 = 1u << 22, kTile = 1u << 24;
  return (d & kBFloat16) && (d & kTile);
}

Found find() {
  Found found{Tiles::absent, ""};
  if (!processor_has_tiles()) return found;
  found.tiles = Tiles::refused;
  constexpr unsigned kTileState = 3u << 17;
  if ((kept_state() & kTileState) != kTileState) {
    std::strcpy(found.why, "the operating system does not keep the state of AMX tiles");
    return found;
  }
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) {
    std::snprintf(found.why, sizeof found.why, "Linux does not permit AMX tiles (arch_prctl: %s)",
                  std::strerror(errno));
    return found;
  }
  found.tiles = Tiles::permitted;
  return found;
}

const Found& found() {
  static const Found once = find();
  return once;
}

}  // namespace

bool tiles_are_permitted() { return found().tiles == Tiles::permitted; }
const char* why_tiles_are_refused() { return found().tiles == Tiles::refused ? found().why : nullptr; }

}  // namespace msformer

#else

namespace msformer {
bool tiles_are_permitted() { return false; }
const char* why_tiles_are_refused() { return nullptr; }
}  // namespace msformer

#endif
