// Products with panels by AMX tiles: a third of sixteen steps of a panel is a tile as it lies, and so are sixteen rows of
// inputs. Two units of 16 rows by 48 outputs are summed in six tiles; the last unit overlaps the one before, because a
// row's result is the same wherever it is computed, and is written once. Fewer rows than sixteen: tiles of that many.
//
// Sums of bfloat16 are of even and odd inputs apart, sixteen steps at a time: not the bits of `vdpbf16ps`. Sums of bytes are exact.
#pragma once

#include <algorithm>
#include <vector>

#include "panels.h"
#include "parallel.h"
#include "tiles.h"

namespace tiles {

constexpr int64_t kStepBytes = 4 * kOutputs;
constexpr int64_t kTileBytes = kRows * kStepBytes;  // of a panel, multiplied by one tile of inputs
constexpr int64_t kPartTiles = 8;                   // of a panel, that stay in the innermost cache beside inputs and sums
constexpr int64_t kAheadTiles = 8;
constexpr int64_t kGroupBytes = 1 << 20;  // of inputs, that stay in a core's own cache
constexpr int64_t kGroupBlocks = 16;

struct BFloat16s {
  static constexpr int64_t kTerms = 1;  // of each input, [terms, rows, steps], which are multiplied by the same weights
  PANEL static __m512 sum(const int32_t* sums) { return _mm512_loadu_ps(reinterpret_cast<const float*>(sums)); }
  template <int Sum, int Left, int Right>
  static void add() {
    add_bfloat16s<Sum, Left, Right>();
  }
};

struct Bytes {
  static constexpr int64_t kTerms = 1;
  PANEL static __m512i sum(const int32_t* sums) { return _mm512_loadu_si512(sums); }
  template <int Sum, int Left, int Right>
  static void add() {
    add_bytes<Sum, Left, Right>();
  }
};

// The first is the number of a unit in its block: its sums are the tiles 3 * Unit and the two behind.
template <int Unit>
inline void zero_sums() {
  zero<3 * Unit>(), zero<3 * Unit + 1>(), zero<3 * Unit + 2>();
}

template <int Unit>
inline void load_sums(const int32_t* sums) {
  load<3 * Unit>(sums, kStepBytes), load<3 * Unit + 1>(sums + 16, kStepBytes), load<3 * Unit + 2>(sums + 32, kStepBytes);
}

template <int Unit>
inline void store_sums(int32_t* sums) {
  store<3 * Unit>(sums, kStepBytes), store<3 * Unit + 1>(sums + 16, kStepBytes), store<3 * Unit + 2>(sums + 32, kStepBytes);
}

template <typename Dot, int Unit>
inline void multiply_unit(const char* inputs, int64_t row_bytes, const char* weights) {
  load<6>(inputs, row_bytes);
  load<7>(weights, kStepBytes);
  Dot::template add<3 * Unit, 6, 7>();
  load<7>(weights + 64, kStepBytes);
  Dot::template add<3 * Unit + 1, 6, 7>();
  load<7>(weights + 128, kStepBytes);
  Dot::template add<3 * Unit + 2, 6, 7>();
}

// Lines of the weights to come that a block fetches at each of its steps.
struct Ahead {
  int64_t distance, begin, end;
};

// One or two units of rows times `count` tiles of a panel, added to `sums` [units, 16, 48] or begun.
template <typename Dot, bool kTwo>
void multiply_block(const char* first, const char* second, int64_t row_bytes, const char* weights, int64_t count, bool begins,
                    const Ahead& ahead, int32_t* sums) {
  if (begins) {
    zero_sums<0>();
    if constexpr (kTwo) zero_sums<1>();
  } else {
    load_sums<0>(sums);
    if constexpr (kTwo) load_sums<1>(sums + kRows * kOutputs);
  }
  for (int64_t k = 0; k < count; ++k, weights += kTileBytes) {
    for (int64_t line = ahead.begin; line < ahead.end; ++line) _mm_prefetch(weights + ahead.distance + line * 64, _MM_HINT_T1);
    multiply_unit<Dot, 0>(first + k * kRowBytes, row_bytes, weights);
    if constexpr (kTwo) multiply_unit<Dot, 1>(second + k * kRowBytes, row_bytes, weights);
  }
  store_sums<0>(sums);
  if constexpr (kTwo) store_sums<1>(sums + kRows * kOutputs);
}

// Rows in units of sixteen, two of them a block.
struct Rows {
  int64_t count;
  int64_t height() const { return std::min(count, kRows); }
  int64_t units() const { return (count + kRows - 1) / kRows; }
  int64_t blocks() const { return (units() + 1) / 2; }
  int64_t first_of(int64_t unit) const { return std::min(unit * kRows, count - height()); }
};

// Blocks [begin, end) of rows times one panel, to output [rows, width].
template <typename Dot, typename Stored>
PANEL void multiply_group(const char* inputs, Rows rows, int64_t begin, int64_t end, const char* panel, int64_t steps,
                          const Epilogue& epilogue, int64_t output, int64_t width, int32_t* sums, Stored* results) {
  const int64_t row_bytes = 4 * steps, num_tiles = steps / kRows, num_blocks = end - begin;
  // A single block reads each weight once; several read a part of the panel again and again, from the innermost cache.
  const int64_t parts = num_blocks == 1 ? 1 : (num_tiles + kPartTiles - 1) / kPartTiles;
  for (int64_t pass = 0; pass < Dot::kTerms * parts; ++pass) {
    const int64_t part = pass % parts, from = part * num_tiles / parts, count = (part + 1) * num_tiles / parts - from;
    const char* term = inputs + pass / parts * rows.count * row_bytes;
    for (int64_t number = 0; number < num_blocks; ++number) {
      const int64_t unit = 2 * (begin + number);
      const char* first = term + rows.first_of(unit) * row_bytes + from * kRowBytes;
      const char* second = term + rows.first_of(unit + 1) * row_bytes + from * kRowBytes;
      const Ahead ahead{(num_blocks == 1 ? kAheadTiles : count) * kTileBytes, number * (kTileBytes / 64) / num_blocks,
                        (number + 1) * (kTileBytes / 64) / num_blocks};
      int32_t* own_sums = sums + number * 2 * kRows * kOutputs;
      const char* weights = panel + from * kTileBytes;
      if (unit + 1 < rows.units())
        multiply_block<Dot, true>(first, second, row_bytes, weights, count, pass == 0, ahead, own_sums);
      else
        multiply_block<Dot, false>(first, nullptr, row_bytes, weights, count, pass == 0, ahead, own_sums);
    }
  }
  float result[kOutputs];
  const int64_t stop = std::min(rows.count, 2 * end * kRows), valid = std::min(kOutputs, width - output);
  for (int64_t row = 2 * begin * kRows; row < stop; ++row) {
    const int64_t unit = row / kRows;
    const int32_t* row_sums = sums + ((unit - 2 * begin) * kRows + row - rows.first_of(unit)) * kOutputs;
    for (int64_t v = 0; v < kVectors; ++v)
      _mm512_storeu_ps(result + v * 16, finish(Dot::sum(row_sums + v * 16), epilogue, row, output + v * 16));
    ::store(result, valid, results + row * width + output);
  }
}

// inputs [terms, rows, steps] times panels [panels, steps, 48] of four bytes each, to output [rows, width]; steps: a multiple of 16.
template <typename Dot, typename Stored>
void run(const int32_t* inputs, int64_t num_rows, const char* panels, int64_t num_panels, int64_t steps, const Epilogue& epilogue,
         int64_t width, Stored* output) {
  const Rows rows{num_rows};
  const int64_t blocks = rows.blocks(), fitting = std::max<int64_t>(1, kGroupBytes / (2 * kRows * 4 * steps * Dot::kTerms));
  const int64_t most_blocks = std::min(fitting, kGroupBlocks);
  const int64_t groups = std::max((blocks + most_blocks - 1) / most_blocks, groups_of_rows(num_panels, blocks));
  share_out(0, groups * num_panels, 1, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> sums(((blocks + groups - 1) / groups) * 2 * kRows * kOutputs);
    const Configured configured(rows.height(), 7);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t group = item / num_panels, number = item % num_panels;
      multiply_group<Dot>(reinterpret_cast<const char*>(inputs), rows, group * blocks / groups, (group + 1) * blocks / groups,
                          panels + number * steps * kStepBytes, steps, epilogue, number * kOutputs, width, sums.data(), output);
    }
  });
}

}  // namespace tiles
