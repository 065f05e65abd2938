// The layout of weights in panels, and what becomes of a product's sums: for every kind of instruction that multiplies.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "lanes.h"

constexpr int64_t kVectors = 3;  // of a panel
constexpr int64_t kOutputs = 16 * kVectors;

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
