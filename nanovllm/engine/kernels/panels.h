// The layout of weights in panels, and what becomes of a product's sums: for every kind of instruction that multiplies.
#pragma once

#include <ATen/Parallel.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "lanes.h"

constexpr int64_t kVectors = 3;  // of a panel
constexpr int64_t kOutputs = 16 * kVectors;

constexpr int64_t kItemsPerThread = 4;  // so that the last ones wait little

// Groups of rows, `most` at most, so that a weight of few panels has items for all threads: a panel and a group each.
inline int64_t groups_of_rows(int64_t num_panels, int64_t most) {
  const int64_t wanted = (kItemsPerThread * at::get_num_threads() + num_panels - 1) / num_panels;
  return std::clamp<int64_t>(wanted, 1, std::max<int64_t>(most, 1));
}

#define PANEL __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")))

struct Epilogue {
  const float* row_scales;  // null: none
  const float* scales;      // of the outputs; null: none
  const int32_t* excess;    // null: none
  const float* bias;        // null: none
};

PANEL inline __m512 to_floats(__m512 sum, __m512i) { return sum; }
PANEL inline __m512 to_floats(__m512i sum, __m512i excess) { return _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, excess)); }

// The results of one row from its sums, for 16 outputs from `output` on.
template <typename Sum>
PANEL inline __m512 finish(Sum sum, const Epilogue& epilogue, int64_t row, int64_t output) {
  __m512 result = to_floats(sum, epilogue.excess ? _mm512_loadu_si512(epilogue.excess + output) : _mm512_setzero_si512());
  if (epilogue.scales)
    result = _mm512_mul_ps(result, _mm512_mul_ps(_mm512_loadu_ps(epilogue.scales + output), _mm512_set1_ps(epilogue.row_scales[row])));
  if (epilogue.bias) result = _mm512_add_ps(result, _mm512_loadu_ps(epilogue.bias + output));
  return result;
}
