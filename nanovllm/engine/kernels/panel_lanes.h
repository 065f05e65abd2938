// Products with weights in the panels of panels.cpp, by vectors of eight floats (AVX2) or four (NEON). Without torch, so
// that a program of a few lines can hold them against plain sums.
//
// An output is summed as by panels.cpp, one input after the other: the same bits. Bytes are summed exactly by every form.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__aarch64__)
#include <arm_neon.h>
#include <sys/auxv.h>
#else
#include <cpuid.h>
#include <immintrin.h>
#endif

#if defined(UNROLLED)
#elif defined(__clang__)
#define UNROLLED _Pragma("unroll")
#else
#define UNROLLED _Pragma("GCC unroll 16")
#endif

namespace panel_lanes {

constexpr int64_t kOutputs = 48;  // of a panel

struct Epilogue {
  const float* row_scales;  // null: none
  const float* scales;      // of the outputs; null: none
  const int32_t* excess;    // what each output of bytes without a sign is too high
  const float* bias;        // null: none
};

// A kind of product adds an Input, broadcast from one row, times a vector of weights to kWidth sums. It has kRegisters for
// sums, weights and one Input; kOffset is how much too high its bytes of input are.

#if defined(__aarch64__)

constexpr int64_t kWidth = 4;
constexpr int64_t kRows = 6;
using Vector = float32x4_t;

inline Vector load(const float* memory) { return vld1q_f32(memory); }
inline void store(float* memory, Vector vector) { vst1q_f32(memory, vector); }
inline Vector broadcast(float number) { return vdupq_n_f32(number); }
inline Vector add(Vector a, Vector b) { return vaddq_f32(a, b); }
inline Vector multiply(Vector a, Vector b) { return vmulq_f32(a, b); }
inline Vector divide(Vector a, Vector b) { return vdivq_f32(a, b); }
inline Vector magnitudes(Vector a) { return vabsq_f32(a); }
inline Vector highest(Vector a, Vector b) { return vmaxq_f32(a, b); }
inline void store_rounded(int32_t* memory, Vector vector) { vst1q_s32(memory, vcvtnq_s32_f32(vector)); }

struct Floats {
  using Sum = float32x4_t;
  using Input = float32x4_t;
  static constexpr int64_t kBytes = 16, kRegisters = 32;
  static Sum zero() { return vdupq_n_f32(0); }
  static Input input(const int32_t* step) { return vreinterpretq_f32_s32(vld1q_dup_s32(step)); }
  static float32x4_t weights(const char* panel) { return vld1q_f32(reinterpret_cast<const float*>(panel)); }
  static Sum add(Sum sum, Input input, float32x4_t weights) { return vfmaq_f32(sum, input, weights); }
  static Vector finish(Sum sum, const Epilogue&, int64_t) { return sum; }
  using Wide = Floats;
  static constexpr int64_t kParts = 1;
  static Sum load_sum(const float* memory) { return load(memory); }
  static void store_sum(float* memory, Sum sum) { store(memory, sum); }
};

struct FloatsByBFloat16s : Floats {
  static constexpr int64_t kBytes = 8;
  static float32x4_t weights(const char* panel) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(panel)), 16));
  }
};

struct FloatsByHalves : Floats {
  static constexpr int64_t kBytes = 8;
  static float32x4_t weights(const char* panel) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(panel))));
  }
};

struct WholeNumbers {
  using Sum = int32x4_t;
  using Input = int8x16_t;
  static constexpr int64_t kBytes = 16;
  static constexpr int32_t kOffset = 0;
  static Sum zero() { return vdupq_n_s32(0); }
  static Input input(const int32_t* step) { return vreinterpretq_s8_s32(vld1q_dup_s32(step)); }
  static int8x16_t weights(const char* panel) { return vld1q_s8(reinterpret_cast<const int8_t*>(panel)); }
  static Vector finish(Sum sum, const Epilogue&, int64_t) { return vcvtq_f32_s32(sum); }
};

// Needs the dot products of ARMv8.2, which `has_dot_products` asks for.
struct BytesByDotProducts : WholeNumbers {
  static constexpr int64_t kRegisters = 32;
  static Sum add(Sum sum, Input input, int8x16_t weights) {
    asm(".arch armv8.2-a+dotprod\n\tsdot %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(weights), "w"(input));
    return sum;
  }
};

struct Bytes : WholeNumbers {
  static constexpr int64_t kRegisters = 28;
  static Sum add(Sum sum, Input input, int8x16_t weights) {
    const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(weights), vget_low_s8(input)));
    const int32x4_t high = vpaddlq_s16(vmull_high_s8(weights, input));
    return vaddq_s32(sum, vpaddq_s32(low, high));
  }
};

inline bool has_dot_products() { return getauxval(AT_HWCAP) & (1 << 20); }
constexpr const char* kFloatForm = "FMA (NEON)";
constexpr const char* kDotProductForm = "sdot (NEON)";
constexpr const char* kByteForm = "smull (NEON)";

#else

constexpr int64_t kWidth = 8;
constexpr int64_t kRows = 4;
using Vector = __m256;

inline Vector load(const float* memory) { return _mm256_loadu_ps(memory); }
inline void store(float* memory, Vector vector) { _mm256_storeu_ps(memory, vector); }
inline Vector broadcast(float number) { return _mm256_set1_ps(number); }
inline Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
inline Vector multiply(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
inline Vector divide(Vector a, Vector b) { return _mm256_div_ps(a, b); }
inline Vector magnitudes(Vector a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline Vector highest(Vector a, Vector b) { return _mm256_max_ps(a, b); }
inline void store_rounded(int32_t* memory, Vector vector) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(memory), _mm256_cvtps_epi32(vector));
}

struct Floats {
  using Sum = __m256;
  using Input = __m256;
  static constexpr int64_t kBytes = 32, kRegisters = 16;
  static Sum zero() { return _mm256_setzero_ps(); }
  static Input input(const int32_t* step) { return _mm256_broadcast_ss(reinterpret_cast<const float*>(step)); }
  static __m256 weights(const char* panel) { return _mm256_loadu_ps(reinterpret_cast<const float*>(panel)); }
  static Sum add(Sum sum, Input input, __m256 weights) { return _mm256_fmadd_ps(input, weights, sum); }
  static Vector finish(Sum sum, const Epilogue&, int64_t) { return sum; }
  using Wide = Floats;
  static constexpr int64_t kParts = 1;
  static Sum load_sum(const float* memory) { return load(memory); }
  static void store_sum(float* memory, Sum sum) { store(memory, sum); }
};

struct FloatsByBFloat16s : Floats {
  static constexpr int64_t kBytes = 16;
  static __m256 weights(const char* panel) {
    const __m128i stored = _mm_loadu_si128(reinterpret_cast<const __m128i*>(panel));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(stored), 16));
  }
};

struct FloatsByHalves : Floats {
  static constexpr int64_t kBytes = 16;
  static __m256 weights(const char* panel) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(panel)));
  }
};

struct WholeNumbers {
  using Sum = __m256i;
  using Input = __m256i;
  static constexpr int64_t kBytes = 32;
  static Sum zero() { return _mm256_setzero_si256(); }
  static Input input(const int32_t* step) { return _mm256_set1_epi32(*step); }
  static __m256i weights(const char* panel) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel)); }
};

#if __has_include(<avxvnniintrin.h>)
#define VPDPBUSD "%{vex%} vpdpbusd %2, %1, %0"
constexpr bool kAssemblesVnni = true;
#else
#define VPDPBUSD ""
constexpr bool kAssemblesVnni = false;
#endif

// Needs AVX-VNNI of the CPU and of the assembler, which `has_dot_products` asks for. By name: what GCC makes of the
// intrinsic copies every sum.
struct BytesByDotProducts : WholeNumbers {
  static constexpr int64_t kRegisters = 16;
  static constexpr int32_t kOffset = 128;
  static Sum add(Sum sum, Input input, __m256i weights) {
    asm(VPDPBUSD : "+x"(sum) : "x"(input), "x"(weights));
    return sum;
  }
  static Vector finish(Sum sum, const Epilogue& epilogue, int64_t output) {
    const __m256i too_high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(epilogue.excess + output));
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(sum, too_high));
  }
};

// Pairs of whole numbers of 16 bits.
struct Pairs : WholeNumbers {
  static constexpr int64_t kRegisters = 14;
  static Sum add(Sum sum, Input input, __m256i weights) { return _mm256_add_epi32(sum, _mm256_madd_epi16(input, weights)); }
  static Sum load_sum(const float* memory) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(memory)); }
  static void store_sum(float* memory, Sum sum) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(memory), sum); }
};

// Pairs of products are added in 16 bits, which hold them, as inputs and weights are at most 127 from zero. That takes an
// instruction more than Pairs, which take twice the memory.
struct Bytes : WholeNumbers {
  using Wide = Pairs;
  static constexpr int64_t kParts = 2;
  // The first and the second two of each four.
  static void split(const char* weights, char* first, char* second) {
    const __m256i bytes = WholeNumbers::weights(weights);
    const __m256i high = _mm256_and_si256(bytes, _mm256_set1_epi16(static_cast<short>(0xff00)));
    const __m256i low = _mm256_slli_epi16(bytes, 8);
    // Of the numbers' high bytes: the even ones of a four in `low`, the odd ones in `high`.
    const __m256i firsts = _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi32(0xffff)), _mm256_slli_epi32(high, 16));
    const __m256i seconds = _mm256_or_si256(_mm256_srli_epi32(low, 16), _mm256_andnot_si256(_mm256_set1_epi32(0xffff), high));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(first), _mm256_srai_epi16(firsts, 8));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(second), _mm256_srai_epi16(seconds, 8));
  }
  static constexpr int64_t kRegisters = 13;
  static constexpr int32_t kOffset = 0;
  static Sum add(Sum sum, Input input, __m256i weights) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(input), _mm256_sign_epi8(weights, input));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static Vector finish(Sum sum, const Epilogue&, int64_t) { return _mm256_cvtepi32_ps(sum); }
};

inline bool has_dot_products() {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  return kAssemblesVnni && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1);
}
constexpr const char* kFloatForm = "FMA (AVX2)";
constexpr const char* kDotProductForm = "vpdpbusd (AVX-VNNI)";
constexpr const char* kByteForm = "vpmaddubsw (AVX2)";

#endif

constexpr int64_t kVectors = kOutputs / kWidth;  // of a panel
constexpr int64_t kAhead = 24 * 64 * 3;          // bytes that a panel is fetched before it is needed

// The vectors of a panel that R rows multiply at once: as many as registers hold, and a whole number of times.
template <typename Dot, int64_t R>
constexpr int64_t vectors_at_once() {
  int64_t most = (Dot::kRegisters - 1) / (R + 1);
  while (kVectors % most) --most;
  return most;
}

// What becomes of a row's sums of the outputs from `output` on.
template <typename Dot>
inline Vector finished(typename Dot::Sum sum, const Epilogue& epilogue, int64_t row, int64_t output) {
  Vector result = Dot::finish(sum, epilogue, output);
  if (epilogue.scales)
    result = multiply(result, multiply(load(epilogue.scales + output), broadcast(epilogue.row_scales[row])));
  return epilogue.bias ? add(result, load(epilogue.bias + output)) : result;
}

// R rows of inputs, `steps` steps each, times one panel. Fetches as much of `ahead`.
template <typename Dot, int64_t R>
void multiply(const int32_t* inputs, const char* panel, int64_t steps, const char* ahead, const Epilogue& epilogue,
              int64_t output, float* results) {
  constexpr int64_t V = vectors_at_once<Dot, R>();
  for (int64_t pass = 0; pass < kVectors; pass += V) {
    typename Dot::Sum sums[R][V];
    UNROLLED for (int64_t r = 0; r < R; ++r)
      UNROLLED for (int64_t v = 0; v < V; ++v) sums[r][v] = Dot::zero();
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t place = (step * kVectors + pass) * Dot::kBytes;
      decltype(Dot::weights(panel)) weights[V];
      UNROLLED for (int64_t v = 0; v < V; ++v) weights[v] = Dot::weights(panel + place + v * Dot::kBytes);
      UNROLLED for (int64_t byte = 0; byte < V * Dot::kBytes; byte += 64) __builtin_prefetch(ahead + place + byte, 0, 2);
      UNROLLED for (int64_t r = 0; r < R; ++r) {
        const typename Dot::Input input = Dot::input(inputs + r * steps + step);
        UNROLLED for (int64_t v = 0; v < V; ++v) sums[r][v] = Dot::add(sums[r][v], input, weights[v]);
      }
    }
    UNROLLED for (int64_t v = 0; v < V; ++v) {
      const int64_t own = (pass + v) * kWidth, first = output + own;
      UNROLLED for (int64_t r = 0; r < R; ++r)
        store(results + r * kOutputs + own, finished<Dot>(sums[r][v], epilogue, r, first));
    }
  }
}

template <typename Dot, int64_t R = kRows>
void multiply_rows(int64_t rows, const int32_t* inputs, const char* panel, int64_t steps, const char* ahead,
                   const Epilogue& epilogue, int64_t output, float* results) {
  if (rows == R)
    multiply<Dot, R>(inputs, panel, steps, ahead, epilogue, output, results);
  else if constexpr (R > 1)
    multiply_rows<Dot, R - 1>(rows, inputs, panel, steps, ahead, epilogue, output, results);
}

// A row of d floats as bytes around `offset`, the largest magnitude 127 away from it; returns what a unit is worth.
inline float to_bytes(const float* x, int64_t d, int32_t offset, uint8_t* bytes) {
  const auto vector_at = [x, d](int64_t i) {
    if (d - i >= kWidth) return load(x + i);
    float rest[kWidth] = {};
    std::copy_n(x + i, d - i, rest);
    return load(rest);
  };
  Vector most = broadcast(std::numeric_limits<float>::min());
  for (int64_t i = 0; i < d; i += kWidth) most = highest(most, magnitudes(vector_at(i)));
  float lanes[kWidth];
  store(lanes, most);
  const float largest = *std::max_element(lanes, lanes + kWidth);
  for (int64_t i = 0; i < d; i += kWidth) {
    int32_t rounded[kWidth];
    store_rounded(rounded, multiply(divide(vector_at(i), broadcast(largest)), broadcast(127.0f)));
    for (int64_t j = 0; j < std::min(kWidth, d - i); ++j) bytes[i + j] = static_cast<uint8_t>(rounded[j] + offset);
  }
  return largest / 127.0f;
}

}  // namespace panel_lanes
