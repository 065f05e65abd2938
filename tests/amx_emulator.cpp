// An emulator of AMX tiles for tests on CPUs without them. Once installed, a handler of SIGILL decodes a tile instruction
// that the CPU refused, carries it out on tiles of its own thread, and steps over it: the machine code under test is the
// very code that a CPU with AMX runs.
//
// By Intel's Software Developer's Manual: LDTILECFG, TILERELEASE, TILEZERO, TILELOADD, TILELOADDT1, TILESTORED,
// TDPBF16PS, TDPBSSD, TDPBSUD, TDPBUSD, TDPBUUD. TDPBF16PS sums the products of even and of odd elements apart, by fused
// multiply-add, then adds both sums up and the total to the tile; it rounds to nearest even, reads denormals as zero and
// writes zero for them. What a CPU refuses (shapes that do not fit, tiles without a configuration) ends the process.
//
// Not emulated: which of several NaNs a result is, STTILECFG, transactions, interrupted loads (start_row), time.

#include <immintrin.h>
#include <signal.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>

namespace {

constexpr int kTiles = 8, kTileRows = 16, kRowBytes = 64;

enum Kind { kConfigure, kRelease, kZero, kLoad, kStore, kBFloat16s, kBytes, kKinds };
std::atomic<int64_t> executed[kKinds];
std::atomic<int64_t> configured_threads;
struct sigaction before;

struct Tile {
  uint8_t rows = 0;
  uint16_t row_bytes = 0;
  alignas(64) uint8_t data[kTileRows][kRowBytes] = {};
};

struct Thread {
  bool configured = false;
  Tile tiles[kTiles];
};
thread_local Thread thread;

[[noreturn]] void refuse(const char* reason) {
  std::fprintf(stderr, "AMX emulator: a CPU refuses this instruction: %s\n", reason);
  _exit(132);
}

void require(bool holds, const char* otherwise) {
  if (!holds) refuse(otherwise);
}

void clear_tiles() {
  for (Tile& tile : thread.tiles) tile = Tile{};
}

void release() {
  if (thread.configured) --configured_threads;
  thread.configured = false;
  clear_tiles();
}

// Of the 64 bytes: palette, start row, 14 reserved, 16 row lengths of two bytes, 16 numbers of rows.
void configure(const uint8_t* config) {
  if (config[0] == 0) return release();
  require(config[0] == 1, "an unknown palette");
  require(config[1] == 0, "a start row, which this emulator does not know");
  for (int i = 2; i < 16; ++i) require(config[i] == 0, "a reserved byte of the configuration is set");
  clear_tiles();
  for (int t = 0; t < 16; ++t) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, config + 16 + 2 * t, 2);
    const uint8_t rows = config[48 + t];
    require(t < kTiles || (!rows && !row_bytes), "a tile beyond the eighth has a shape");
    require(rows <= kTileRows && row_bytes <= kRowBytes, "a tile is too large");
    require(!rows == !row_bytes, "a tile has rows without bytes, or bytes without rows");
    if (t < kTiles) thread.tiles[t].rows = rows, thread.tiles[t].row_bytes = row_bytes;
  }
  if (!thread.configured) ++configured_threads;
  thread.configured = true;
}

Tile& shaped(int number) {
  require(thread.configured, "there is no configuration of tiles");
  require(number < kTiles && thread.tiles[number].rows, "the tile has no shape");
  return thread.tiles[number];
}

void load(int number, const uint8_t* base, int64_t stride) {
  Tile& tile = shaped(number);
  std::memset(tile.data, 0, sizeof tile.data);
  for (int r = 0; r < tile.rows; ++r) std::memcpy(tile.data[r], base + r * stride, tile.row_bytes);
}

void store(int number, uint8_t* base, int64_t stride) {
  const Tile& tile = shaped(number);
  for (int r = 0; r < tile.rows; ++r) std::memcpy(base + r * stride, tile.data[r], tile.row_bytes);
}

void check_product(int sum, int left, int right) {
  const Tile &c = shaped(sum), &a = shaped(left), &b = shaped(right);
  require(sum != left && sum != right && left != right, "a tile is named twice");
  require(c.row_bytes % 4 == 0 && a.row_bytes % 4 == 0 && b.row_bytes % 4 == 0, "a row is no multiple of four bytes");
  require(a.rows == c.rows && b.row_bytes == c.row_bytes && a.row_bytes / 4 == b.rows, "the shapes of three tiles do not fit");
}

float widened(const uint8_t* number) {
  uint16_t half;
  std::memcpy(&half, number, 2);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

// Called with MXCSR set: never inlined, so that no operation leaves this function.
__attribute__((noinline)) void multiply_bfloat16s(Tile& c, const Tile& a, const Tile& b) {
  const int columns = c.row_bytes / 4, pairs = a.row_bytes / 4;
  float weights[2][16][16] = {};
  for (int k = 0; k < pairs; ++k)
    for (int n = 0; n < columns; ++n)
      for (int odd = 0; odd < 2; ++odd) weights[odd][k][n] = widened(b.data[k] + 4 * n + 2 * odd);
  for (int m = 0; m < c.rows; ++m) {
    float sums[2][16] = {};
    for (int k = 0; k < pairs; ++k)
      for (int odd = 0; odd < 2; ++odd) {
        const float input = widened(a.data[m] + 4 * k + 2 * odd);
        for (int n = 0; n < 16; ++n) sums[odd][n] = __builtin_fmaf(input, weights[odd][k][n], sums[odd][n]);
      }
    float values[16] = {};
    std::memcpy(values, c.data[m], 4 * columns);
    for (int n = 0; n < 16; ++n) {
      const float sum = sums[0][n] + sums[1][n];
      values[n] = values[n] + sum;
    }
    std::memcpy(c.data[m], values, 4 * columns);
  }
}

template <typename Left, typename Right>
void multiply_bytes(Tile& c, const Tile& a, const Tile& b) {
  for (int m = 0; m < c.rows; ++m)
    for (int n = 0; n < c.row_bytes / 4; ++n) {
      uint32_t value;
      std::memcpy(&value, c.data[m] + 4 * n, 4);
      for (int k = 0; k < a.row_bytes / 4; ++k)
        for (int i = 0; i < 4; ++i)
          value += static_cast<uint32_t>(static_cast<Left>(a.data[m][4 * k + i]) * static_cast<Right>(b.data[k][4 * n + i]));
      std::memcpy(c.data[m] + 4 * n, &value, 4);
    }
}

// A VEX instruction of three bytes' prefix in the map 0F38, as all of tiles are.
struct Decoder {
  const uint8_t* bytes;
  greg_t* registers;

  bool is_tile() const { return bytes[0] == 0xc4 && (bytes[1] & 0x1f) == 2 && (bytes[2] & 0x84) == 0; }
  int prefix() const { return bytes[2] & 3; }  // 0: none, 1: 66, 2: F3, 3: F2
  int opcode() const { return bytes[3]; }
  int mode() const { return bytes[4] >> 6; }
  int reg() const { return (bytes[4] >> 3 & 7) | (bytes[1] & 0x80 ? 0 : 8); }
  int rm() const { return (bytes[4] & 7) | (bytes[1] & 0x20 ? 0 : 8); }
  int third() const { return ~(bytes[2] >> 3) & 15; }

  uint64_t value_of(int number) const {
    static constexpr int kPlaces[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                      REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return static_cast<uint64_t>(registers[kPlaces[number]]);
  }

  struct Memory {
    uint8_t* base;   // displacement included, index not
    int64_t stride;  // the scaled index
    int length;      // of the instruction
  };

  Memory memory() const {
    int at = 5;
    uint64_t base = 0;
    int64_t stride = 0;
    bool has_base = true, relative = false;
    if ((bytes[4] & 7) == 4) {
      const int sib = bytes[at++], index = (sib >> 3 & 7) | (bytes[1] & 0x40 ? 0 : 8);
      has_base = (sib & 7) != 5 || mode() != 0;
      if (has_base) base = value_of((sib & 7) | (bytes[1] & 0x20 ? 0 : 8));
      if (index != 4) stride = static_cast<int64_t>(value_of(index) << (sib >> 6));
    } else if ((bytes[4] & 7) == 5 && mode() == 0) {
      relative = true;
    } else {
      base = value_of(rm());
    }
    if (mode() == 1) {
      base += static_cast<int8_t>(bytes[at++]);
    } else if (mode() == 2 || relative || !has_base) {
      int32_t displacement;
      std::memcpy(&displacement, bytes + at, 4);
      base += displacement;
      at += 4;
    }
    if (relative) base += reinterpret_cast<uint64_t>(bytes) + at;
    return {reinterpret_cast<uint8_t*>(base), stride, at};
  }
};

// Carries an instruction out; returns its length, 0 if it is none of tiles.
int execute(const Decoder& code) {
  if (!code.is_tile()) return 0;
  const bool in_memory = code.mode() != 3;
  const int kind = code.opcode() << 4 | code.prefix() << 1 | in_memory;
  switch (kind) {
    case 0x491: {
      const auto memory = code.memory();
      require(memory.stride == 0, "this emulator knows no index of a configuration");
      configure(memory.base);
      ++executed[kConfigure];
      return memory.length;
    }
    case 0x490:
      release();
      ++executed[kRelease];
      return 5;
    case 0x496:
      std::memset(shaped(code.reg()).data, 0, sizeof(Tile::data));
      ++executed[kZero];
      return 5;
    case 0x4b7:
    case 0x4b3: {
      const auto memory = code.memory();
      load(code.reg(), memory.base, memory.stride);
      ++executed[kLoad];
      return memory.length;
    }
    case 0x4b5: {
      const auto memory = code.memory();
      store(code.reg(), memory.base, memory.stride);
      ++executed[kStore];
      return memory.length;
    }
  }
  if (kind != 0x5c4 && (kind & ~6) != 0x5e0) return 0;
  check_product(code.reg(), code.rm(), code.third());
  Tile& c = thread.tiles[code.reg()];
  const Tile &a = thread.tiles[code.rm()], &b = thread.tiles[code.third()];
  if (kind == 0x5c4) {
    const unsigned modes = _mm_getcsr();
    _mm_setcsr(0x1f80 | 0x8000 | 0x0040);  // no traps, to nearest even, denormals to zero on both sides
    multiply_bfloat16s(c, a, b);
    _mm_setcsr(modes);
    ++executed[kBFloat16s];
    return 5;
  }
  switch (code.prefix()) {
    case 0: multiply_bytes<uint8_t, uint8_t>(c, a, b); break;
    case 1: multiply_bytes<uint8_t, int8_t>(c, a, b); break;
    case 2: multiply_bytes<int8_t, uint8_t>(c, a, b); break;
    case 3: multiply_bytes<int8_t, int8_t>(c, a, b); break;
  }
  ++executed[kBytes];
  return 5;
}

void handle(int number, siginfo_t* info, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const int length = execute({reinterpret_cast<const uint8_t*>(registers[REG_RIP]), registers});
  registers[REG_RIP] += length;
  if (length) return;
  if (before.sa_flags & SA_SIGINFO)
    before.sa_sigaction(number, info, context);
  else
    sigaction(SIGILL, &before, nullptr);  // and the instruction is met again
}

}  // namespace

extern "C" {

void amx_install() {
  struct sigaction action = {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  struct sigaction current;
  sigaction(SIGILL, nullptr, &current);
  if (current.sa_sigaction == handle) return;
  before = current;
  sigaction(SIGILL, &action, nullptr);
}

void amx_uninstall() { sigaction(SIGILL, &before, nullptr); }

// Instructions of a kind that were carried out since the start, in all threads.
int64_t amx_executed(int kind) { return executed[kind]; }

// Threads whose tiles are configured now: none may be left between two kernels.
int64_t amx_configured_threads() { return configured_threads; }

// For a test of the emulator itself: one product [rows, row_bytes] x [row_bytes / 4, columns * 4] added to sums, by the
// instructions. bytes: 0 for bfloat16, else 1 + (2 if left has a sign) + (1 if right has one).
void amx_multiply(int bytes, int rows, int row_bytes, int columns, void* sums, const void* left, const void* right) {
  alignas(64) struct {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  config.rows[2] = config.rows[5] = static_cast<uint8_t>(rows);
  config.row_bytes[2] = config.row_bytes[7] = static_cast<uint16_t>(4 * columns);
  config.row_bytes[5] = static_cast<uint16_t>(row_bytes);
  config.rows[7] = static_cast<uint8_t>(row_bytes / 4);
  asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
  asm volatile("tileloadd (%0,%1,1), %%tmm2" ::"r"(sums), "r"(4L * columns) : "memory");
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm5" ::"r"(left), "r"(static_cast<int64_t>(row_bytes)) : "memory");
  asm volatile("tileloadd 64(%0,%1,2), %%tmm7" ::"r"(static_cast<const char*>(right) - 64), "r"(2L * columns) : "memory");
  switch (bytes) {
    case 0: asm volatile("tdpbf16ps %tmm7, %tmm5, %tmm2"); break;
    case 1: asm volatile("tdpbuud %tmm7, %tmm5, %tmm2"); break;
    case 2: asm volatile("tdpbusd %tmm7, %tmm5, %tmm2"); break;
    case 3: asm volatile("tdpbsud %tmm7, %tmm5, %tmm2"); break;
    case 4: asm volatile("tdpbssd %tmm7, %tmm5, %tmm2"); break;
  }
  asm volatile("tilestored %%tmm2, (%0,%1,1)" ::"r"(sums), "r"(4L * columns) : "memory");
  asm volatile("tilerelease");
}

}  // extern "C"
