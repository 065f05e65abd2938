// Products of many rows with panels on AVX2 and NEON, block by block of a panel: the bits of panel_lanes.h.
//
// A panel of 576 inputs is 110 KB of floats, more than a core's first cache, and each block of rows would read all of it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "panel_lanes.h"

namespace panel_lanes {

// For many rows a panel is cut into blocks of so many steps, which are widened once, each step to kParts steps of Dot::Wide.
// What a pass reads of a block stays in a core's first cache.
constexpr int64_t kBlockSteps = 192;

template <typename Dot>
constexpr int64_t kWideVectors = vectors_at_once<typename Dot::Wide, kRows>();  // of a pass

template <typename Dot>
constexpr int64_t kBlockBytes = kBlockSteps * Dot::kParts * kVectors * Dot::Wide::kBytes;

// So many steps of a panel as Wide [passes, steps * kParts, kWideVectors].
template <typename Dot>
void widen(const char* panel, int64_t steps, char* wide) {
  constexpr int64_t part_bytes = kWideVectors<Dot> * Dot::Wide::kBytes;
  for (int64_t pass = 0; pass < kVectors; pass += kWideVectors<Dot>)
    for (int64_t step = 0; step < steps; ++step, wide += Dot::kParts * part_bytes)
      for (int64_t v = 0; v < kWideVectors<Dot>; ++v) {
        const char* weights = panel + (step * kVectors + pass + v) * Dot::kBytes;
        char* const own = wide + v * Dot::Wide::kBytes;
        if constexpr (Dot::kParts == 1)
          store(reinterpret_cast<float*>(own), Dot::weights(weights));
        else
          Dot::split(weights, own, own + part_bytes);
      }
}

// Adds to sums [R, 48] the products of R rows of inputs, `stride` apart, with what `widen` made of so many `parts`.
template <typename Dot, int64_t R>
void add_products(const int32_t* inputs, int64_t stride, const char* wide, int64_t parts, float* sums) {
  using Wide = typename Dot::Wide;
  constexpr int64_t V = kWideVectors<Dot>;
  for (int64_t pass = 0; pass < kVectors; pass += V) {
    float* const own = sums + pass * kWidth;
    typename Wide::Sum held[R][V];
    UNROLLED for (int64_t r = 0; r < R; ++r)
      UNROLLED for (int64_t v = 0; v < V; ++v) held[r][v] = Wide::load_sum(own + r * kOutputs + v * kWidth);
    for (int64_t part = 0; part < parts; ++part, wide += V * Wide::kBytes) {
      decltype(Wide::weights(wide)) weights[V];
      UNROLLED for (int64_t v = 0; v < V; ++v) weights[v] = Wide::weights(wide + v * Wide::kBytes);
      UNROLLED for (int64_t r = 0; r < R; ++r) {
        const typename Wide::Input input = Wide::input(inputs + r * stride + part);
        UNROLLED for (int64_t v = 0; v < V; ++v) held[r][v] = Wide::add(held[r][v], input, weights[v]);
      }
    }
    UNROLLED for (int64_t r = 0; r < R; ++r)
      UNROLLED for (int64_t v = 0; v < V; ++v) Wide::store_sum(own + r * kOutputs + v * kWidth, held[r][v]);
  }
}

template <typename Dot, int64_t R = kRows>
void add_products_of(int64_t rows, const int32_t* inputs, int64_t stride, const char* wide, int64_t parts, float* sums) {
  if (rows == R)
    add_products<Dot, R>(inputs, stride, wide, parts, sums);
  else if constexpr (R > 1)
    add_products_of<Dot, R - 1>(rows, inputs, stride, wide, parts, sums);
}

// As `multiply` of any number of rows. `inputs` are those of Wide, [rows, steps * kParts]; `wide` has room for kBlockBytes.
template <typename Dot>
void multiply_blocks(int64_t rows, const int32_t* inputs, const char* panel, int64_t steps, const Epilogue& epilogue,
                     int64_t output, char* wide, float* results) {
  const int64_t stride = steps * Dot::kParts;
  std::memset(results, 0, rows * kOutputs * sizeof(float));
  for (int64_t step = 0; step < steps; step += kBlockSteps) {
    const int64_t count = std::min(kBlockSteps, steps - step);
    widen<Dot>(panel + step * kVectors * Dot::kBytes, count, wide);
    for (int64_t row = 0; row < rows; row += kRows)
      add_products_of<Dot>(std::min(kRows, rows - row), inputs + row * stride + step * Dot::kParts, stride, wide,
                           count * Dot::kParts, results + row * kOutputs);
  }
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t o = 0; o < kOutputs; o += kWidth) {
      float* const own = results + row * kOutputs + o;
      store(own, finished<Dot>(Dot::Wide::load_sum(own), epilogue, row, output + o));
    }
}

// Fours of bytes as pairs of 16 bits, twice as many.
inline void widen_inputs(const int32_t* fours, int64_t count, int32_t* pairs) {
  const auto* bytes = reinterpret_cast<const int8_t*>(fours);
  auto* wide = reinterpret_cast<int16_t*>(pairs);
  for (int64_t i = 0; i < 4 * count; ++i) wide[i] = bytes[i];
}

}  // namespace panel_lanes
