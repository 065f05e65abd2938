// float32 by AMX tiles, where weights are exactly bfloat16: an input of 24 bits is the sum of three terms of eight bits, and the
// product of each with a weight is exact. The smallest terms are multiplied first, with all of a row's weights, so that what
// is lost is what the sums of the largest ones lose: every 32 inputs once, where vectors of float32 lose it at every input.
//
// Tiles read denormal numbers as zero and write zero for them. So an input below 2^-102 loses what of it lies below 2^-126,
// as do weights and sums below that. An infinity or NaN among the inputs gives what it gives in float32; among the weights
// it does not (an infinity times the zero that a term may be): such a weight is multiplied by vectors.
#pragma once

#include "panels_tiles.h"

namespace tiles {

struct Floats : BFloat16s {
  static constexpr int64_t kTerms = 3;
};

// x [count], a multiple of 16, as the sum of three terms [count] of bfloat16, the smallest first. They are cut off, not
// rounded: what is rounded up may be infinite. What is no finite number is its own largest term, and the others are zero.
PANEL inline void split(const float* x, int64_t count, uint16_t* const* terms) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000)), quiet = _mm512_set1_epi32(0x00400000);
  const auto cut = [&](__m512 value) { return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(value), upper)); };
  const auto keep = [](uint16_t* target, __m512 value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(value), 16)));
  };
  for (int64_t i = 0; i < count; i += 16) {
    const __m512 whole = _mm512_loadu_ps(x + i);
    const __mmask16 is_nan = _mm512_fpclass_ps_mask(whole, 0x81), is_finite = _mm512_knot(_mm512_fpclass_ps_mask(whole, 0x99));
    const __m512i bits = _mm512_castps_si512(whole);
    const __m512 high = cut(_mm512_castsi512_ps(_mm512_mask_or_epi32(bits, is_nan, bits, quiet)));
    const __m512 rest = _mm512_maskz_sub_ps(is_finite, whole, high), middle = cut(rest);
    keep(terms[0] + i, _mm512_sub_ps(rest, middle));
    keep(terms[1] + i, middle);
    keep(terms[2] + i, high);
  }
}

}  // namespace tiles
