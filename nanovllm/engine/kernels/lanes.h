// Vectors of float over at::vec, and rows of any stored type read as float.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

using Lanes = at::vec::Vectorized<float>;
constexpr int64_t kLanes = Lanes::size();

// The bare vector. An array of these stays in registers if every loop over it is unrolled; one of Lanes lies on the stack.
#if defined(CPU_CAPABILITY_AVX512)
using Register = __m512;
#elif defined(__aarch64__)
using Register = float32x4_t;
#else
using Register = __m256;
#endif
#if defined(__clang__)
#define UNROLLED _Pragma("unroll")
#else
#define UNROLLED _Pragma("GCC unroll 16")
#endif

inline float sum_of(Lanes lanes) {
  return at::vec::vec_reduce_all<float>([](Lanes a, Lanes b) { return a + b; }, lanes);
}

inline float highest_of(Lanes lanes) {
  return at::vec::vec_reduce_all<float>([](Lanes a, Lanes b) { return at::vec::maximum(a, b); }, lanes);
}

// One vector of any stored type.
template <typename Stored>
Lanes load_lanes(const Stored* source) {
  if constexpr (std::is_same_v<Stored, float>) {
    return Lanes::loadu(source);
  } else {
#if defined(__aarch64__)
    const uint16x4_t bits = vld1_u16(reinterpret_cast<const uint16_t*>(source));
    if constexpr (std::is_same_v<Stored, at::BFloat16>)
      return vreinterpretq_f32_u32(vshll_n_u16(bits, 16));
    else
      return vcvt_f32_f16(vreinterpret_f16_u16(bits));
#else
    Lanes lanes;
    if constexpr (std::is_same_v<Stored, at::BFloat16>)
      at::vec::load_fp32_from_bf16(source, lanes);
    else
      at::vec::load_fp32_from_fp16(source, lanes);
    return lanes;
#endif
  }
}

template <typename Stored>
void store_lanes(Lanes lanes, Stored* target) {
  if constexpr (std::is_same_v<Stored, float>) {
    lanes.store(target);
  } else {
    const auto converted = [&] {
#if defined(__aarch64__)
      const float32x4_t floats = lanes;
      if constexpr (std::is_same_v<Stored, at::BFloat16>) {
        // To the nearest, of two to the even one; a NaN stays one.
        const uint32x4_t bits = vreinterpretq_u32_f32(floats);
        const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
        const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
        return vshrn_n_u32(vbslq_u32(vceqq_f32(floats, floats), rounded, vdupq_n_u32(0x7fc00000)), 16);
      } else {
        return vcvt_f16_f32(floats);
      }
#else
      if constexpr (std::is_same_v<Stored, at::BFloat16>)
        return at::vec::cvtfp32_bf16(lanes);
      else
        return at::vec::cvtfp32_fp16(lanes);
#endif
    }();
    std::memcpy(target, &converted, sizeof converted);
  }
}

template <typename Stored>
void load(const Stored* source, int64_t count, float* target) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) load_lanes(source + i).store(target + i);
  for (; i < count; ++i) target[i] = static_cast<float>(source[i]);
}

// The row itself if it is float already, or its copy in scratch.
template <typename Stored>
const float* as_float(const Stored* source, int64_t count, float* scratch) {
  if constexpr (std::is_same_v<Stored, float>) {
    return source;
  } else {
    load(source, count, scratch);
    return scratch;
  }
}

template <typename Stored>
void store(const float* source, int64_t count, Stored* target) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store_lanes(Lanes::loadu(source + i), target + i);
  for (; i < count; ++i) target[i] = static_cast<Stored>(source[i]);
}

// Numbers of one type as another.
template <typename From, typename To>
void convert(const From* source, int64_t count, To* target) {
  if constexpr (std::is_same_v<From, To>) {
    std::copy_n(source, count, target);
  } else {
    static_assert(std::is_same_v<From, float>);
    store(source, count, target);
  }
}

// Calls function with a number of the type.
template <typename Function>
void dispatch(at::ScalarType type, const Function& function) {
  if (type == at::kFloat)
    function(float{});
  else if (type == at::kBFloat16)
    function(at::BFloat16{});
  else if (type == at::kHalf)
    function(at::Half{});
  else
    TORCH_CHECK(false, "no kernel for ", type);
}
