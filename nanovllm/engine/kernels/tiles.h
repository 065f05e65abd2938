// AMX tiles: eight registers of up to 16 rows of 64 bytes, and products of two of them that are added to a third. A process
// must ask for them (`refusal`) before a thread uses any. Instructions are by name: the intrinsics of GCC 12 do not tell
// the compiler that they read memory, and it drops what was written there.
#pragma once

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <string>

namespace tiles {

constexpr int64_t kRows = 16;
constexpr int64_t kRowBytes = 64;

// Asks Linux for tiles in this process; empty if it has them, else who withholds them.
inline std::string refusal() {
  constexpr unsigned kBFloat16s = 1 << 22, kTiles = 1 << 24, kBytes = 1 << 25, kAll = kBFloat16s | kTiles | kBytes;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA: newer than some headers
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAll) != kAll) return "the CPU has none, or the hypervisor hides them";
  if (syscall(SYS_arch_prctl, kRequest, kTileData) == 0) return "";
  return std::string("Linux refuses them (arch_prctl: ") + std::strerror(errno) + ")";
}

// The tiles of this thread, for as long as this lives: those before `first_whole` have `rows` rows, the others all.
class Configured {
 public:
  Configured(int64_t rows, int first_whole) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int t = 0; t < 8; ++t) {
      config.row_bytes[t] = kRowBytes;
      config.rows[t] = static_cast<uint8_t>(t < first_whole ? rows : kRows);
    }
    asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
  }
  // A thread that keeps tiles has 8 KiB more to save whenever it is switched.
  ~Configured() { asm volatile("tilerelease" ::: "memory"); }
  Configured(const Configured&) = delete;
  Configured& operator=(const Configured&) = delete;
};

template <int Tile>
inline void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(Tile));
}

template <int Tile>
inline void load(const void* rows, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(Tile), "r"(rows), "r"(stride) : "memory");
}

template <int Tile>
inline void store(void* rows, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(Tile), "r"(rows), "r"(stride) : "memory");
}

template <int Sum, int Left, int Right>
inline void add_bfloat16s() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(Left), "i"(Right));
}

// Bytes without a sign times bytes with one.
template <int Sum, int Left, int Right>
inline void add_bytes() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(Left), "i"(Right));
}

}  // namespace tiles
