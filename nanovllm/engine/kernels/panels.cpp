// Products with weights that lie in panels: 48 outputs side by side, and of each four bytes that belong together (one
// float, two bfloat16 or four int8 of a row of the weight). A step of a product so reads three whole vectors of the
// panel and four bytes of each input row, whatever the type; nine rows by 48 outputs are summed in registers.
//
// Inputs in float may have weights stored in 16 bits, one for each step. They are widened on their way into registers, or
// once for many rows: the same bits as with weights stored in float, from half the memory.
//
// A row's result is summed in the order of its inputs, whatever is multiplied beside it: the same bits in any batch.

#if defined(CPU_CAPABILITY_AVX512)

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#include "lanes.h"
#include "parallel.h"

namespace {

constexpr int64_t kVectors = 3;  // of a panel
constexpr int64_t kOutputs = 16 * kVectors;
constexpr int64_t kRows = 9;
constexpr int64_t kWidenedBlocks = 6;  // of rows, from which on a panel is widened once
constexpr int64_t kAhead = 24 * 64 * kVectors;  // bytes that a panel is fetched before it is needed

#define PANEL __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")))

// A kind of product reads kVectors vectors of kBytes from a panel in every step. Two instructions are by name below: what
// GCC makes of their intrinsics copies every sum before and after.
struct WholeVectors {
  static constexpr int64_t kBytes = 64;
  PANEL static __m512i load(const char* panel) { return _mm512_loadu_si512(panel); }
};

struct SummedAsFloats {
  using Sum = __m512;
  PANEL static Sum zero() { return _mm512_setzero_ps(); }
  PANEL static __m512 finish(Sum sum, __m512i) { return sum; }
};

struct Floats : WholeVectors, SummedAsFloats {
  PANEL static Sum add(Sum sum, int32_t input, __m512i weight) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_set1_epi32(input)), _mm512_castsi512_ps(weight), sum);
  }
};

struct FloatsByBFloat16s : Floats {
  static constexpr int64_t kBytes = 32;
  PANEL static __m512i load(const char* panel) {
    return _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel))), 16);
  }
};

struct FloatsByHalves : Floats {
  static constexpr int64_t kBytes = 32;
  PANEL static __m512i load(const char* panel) {
    return _mm512_castps_si512(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel))));
  }
};

struct BFloat16s : WholeVectors, SummedAsFloats {
  PANEL static Sum add(Sum sum, int32_t input, __m512i weight) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(_mm512_set1_epi32(input)), "v"(weight));
    return sum;
  }
};

// Inputs are bytes without a sign, 128 too high: so many times the sum of its weights is every output too high.
struct Bytes : WholeVectors {
  using Sum = __m512i;
  PANEL static Sum zero() { return _mm512_setzero_si512(); }
  PANEL static Sum add(Sum sum, int32_t input, __m512i weight) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(_mm512_set1_epi32(input)), "v"(weight));
    return sum;
  }
  PANEL static __m512 finish(Sum sum, __m512i excess) { return _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, excess)); }
};

struct Epilogue {
  const float* row_scales;  // null: none
  const float* scales;      // of the outputs; null: none
  const int32_t* excess;    // null: none
  const float* bias;        // null: none
};

// R rows of inputs, `steps` steps each, times one panel.
template <typename Dot, int64_t R>
PANEL void multiply(const int32_t* inputs, const char* panel, int64_t steps, const char* const* ahead, const Epilogue& epilogue,
                    int64_t output, float* results) {
  typename Dot::Sum sums[R][kVectors];
  for (int64_t r = 0; r < R; ++r)
    for (int64_t v = 0; v < kVectors; ++v) sums[r][v] = Dot::zero();
  for (int64_t step = 0; step < steps; ++step) {
    __m512i weights[kVectors];
    for (int64_t v = 0; v < kVectors; ++v) {
      const int64_t place = (step * kVectors + v) * Dot::kBytes;
      weights[v] = Dot::load(panel + place);
      _mm_prefetch(ahead[v] + place, _MM_HINT_T1);
    }
    for (int64_t r = 0; r < R; ++r) {
      const int32_t input = inputs[r * steps + step];
      for (int64_t v = 0; v < kVectors; ++v) sums[r][v] = Dot::add(sums[r][v], input, weights[v]);
    }
  }
  for (int64_t v = 0; v < kVectors; ++v) {
    const int64_t first = output + v * 16;
    const __m512i excess = epilogue.excess ? _mm512_loadu_si512(epilogue.excess + first) : _mm512_setzero_si512();
    for (int64_t r = 0; r < R; ++r) {
      __m512 result = Dot::finish(sums[r][v], excess);
      if (epilogue.scales)
        result = _mm512_mul_ps(result, _mm512_mul_ps(_mm512_loadu_ps(epilogue.scales + first), _mm512_set1_ps(epilogue.row_scales[r])));
      if (epilogue.bias) result = _mm512_add_ps(result, _mm512_loadu_ps(epilogue.bias + first));
      _mm512_storeu_ps(results + r * kOutputs + v * 16, result);
    }
  }
}

template <typename Dot, int64_t R>
void multiply_rows(int64_t rows, const int32_t* inputs, const char* panel, int64_t steps, const char* const* ahead,
                   const Epilogue& epilogue, int64_t output, float* results) {
  if (rows == R)
    multiply<Dot, R>(inputs, panel, steps, ahead, epilogue, output, results);
  else if constexpr (R > 1)
    multiply_rows<Dot, R - 1>(rows, inputs, panel, steps, ahead, epilogue, output, results);
}

// So many vectors of a panel as they are multiplied.
template <typename Dot>
PANEL void widen(const char* panel, int64_t vectors, float* wide) {
  for (int64_t i = 0; i < vectors; ++i) _mm512_storeu_si512(wide + 16 * i, Dot::load(panel + i * Dot::kBytes));
}

// inputs [rows, steps] times panels [panels, steps, 48], to output [rows, width].
template <typename Dot, typename Stored>
void run(const int32_t* inputs, int64_t rows, const char* panels, int64_t num_panels, int64_t steps, Epilogue epilogue,
         int64_t width, Stored* output) {
  const int64_t blocks = (rows + kRows - 1) / kRows, panel_bytes = steps * kVectors * Dot::kBytes;
  const bool widens = Dot::kBytes < 64 && blocks >= kWidenedBlocks;
  share_out(0, num_panels, 1, [&](int64_t begin, int64_t end) {
    float results[kRows * kOutputs];
    std::vector<float> wide(widens ? steps * kOutputs : 0);
    int64_t some;
    for (int64_t number = begin; number < end; ++number) {
      const char* panel = panels + number * panel_bytes;
      const int64_t first = number * kOutputs, count = std::min(kOutputs, width - first);
      const char* following = number + 1 < end ? panel + panel_bytes : panel;
      if (widens) widen<Dot>(panel, steps * kVectors, wide.data());
      const char* own_panel = widens ? reinterpret_cast<const char*>(wide.data()) : panel;
      for (int64_t row = 0, block = 0; row < rows; row += some, ++block) {
        some = (rows - row + blocks - block - 1) / (blocks - block);
        // Every block of rows fetches its share of the next panel; a single one fetches what it needs itself soon.
        const char* ahead[kVectors];
        for (int64_t v = 0; v < kVectors; ++v)
          ahead[v] = blocks == 1 ? panel + kAhead : v % blocks == block && !widens ? following : own_panel;
        Epilogue own = epilogue;
        if (own.row_scales) own.row_scales += row;
        if (widens)
          multiply_rows<Floats, kRows>(some, inputs + row * steps, own_panel, steps, ahead, own, first, results);
        else
          multiply_rows<Dot, kRows>(some, inputs + row * steps, own_panel, steps, ahead, own, first, results);
        for (int64_t r = 0; r < some; ++r) store(results + r * kOutputs, count, output + (row + r) * width + first);
      }
    }
  });
}

// A row of d floats as bytes around 128, the largest magnitude 127 away from it; returns what a unit is worth.
PANEL float to_bytes(const float* x, int64_t d, uint8_t* bytes) {
  const auto lanes_at = [d](int64_t i) { return static_cast<__mmask16>(d - i >= 16 ? 0xffff : (1 << (d - i)) - 1); };
  __m512 most = _mm512_set1_ps(std::numeric_limits<float>::min());
  for (int64_t i = 0; i < d; i += 16) most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_maskz_loadu_ps(lanes_at(i), x + i)));
  const float highest = _mm512_reduce_max_ps(most);
  for (int64_t i = 0; i < d; i += 16) {
    const __m512 scaled = _mm512_div_ps(_mm512_maskz_loadu_ps(lanes_at(i), x + i), _mm512_set1_ps(highest));
    const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(scaled, _mm512_set1_ps(127.0f)));
    _mm_mask_storeu_epi8(bytes + i, lanes_at(i), _mm512_cvtepi32_epi8(_mm512_add_epi32(rounded, _mm512_set1_epi32(128))));
  }
  return highest / 127.0f;
}

// x [rows, d] times a weight [width, d] in panels [panels, steps, 48] of its own type, of 16
// bits under inputs in float, of pairs of bfloat16 or fours of int8. With int8 `scales` and `excess` [48 * panels] belong to the outputs: see Bytes.
at::Tensor multiply_panels(const at::Tensor& x, const at::Tensor& panels, int64_t width, const std::optional<at::Tensor>& bias,
                           const std::optional<at::Tensor>& scales, const std::optional<at::Tensor>& excess) {
  const int64_t d = x.size(-1), rows = x.numel() / std::max<int64_t>(d, 1), num_panels = panels.size(0), steps = panels.size(1);
  TORCH_CHECK(x.is_contiguous() && panels.is_contiguous() && width <= num_panels * kOutputs);
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = width;
  at::Tensor output = at::empty(sizes, x.options());
  const char* weights = static_cast<const char*>(panels.const_data_ptr());
  Epilogue epilogue{nullptr, nullptr, nullptr, bias ? bias->const_data_ptr<float>() : nullptr};
  if (panels.scalar_type() == at::kChar) {
    std::vector<int32_t> inputs(rows * steps);
    std::vector<float> row_scales(rows);
    epilogue.scales = scales->const_data_ptr<float>();
    epilogue.excess = excess->const_data_ptr<int32_t>();
    dispatch(x.scalar_type(), [&](auto stored) {
      using Stored = decltype(stored);
      const Stored* source = x.const_data_ptr<Stored>();
      share_out(0, rows, std::max<int64_t>(1, (1 << 15) / d), [&](int64_t begin, int64_t end) {
        std::vector<float> scratch(d);
        for (int64_t row = begin; row < end; ++row)
          row_scales[row] = to_bytes(as_float(source + row * d, d, scratch.data()), d, reinterpret_cast<uint8_t*>(&inputs[row * steps]));
      });
      epilogue.row_scales = row_scales.data();
      run<Bytes>(inputs.data(), rows, weights, num_panels, steps, epilogue, width, output.mutable_data_ptr<Stored>());
    });
  } else if (x.scalar_type() == at::kFloat) {
    const int32_t* inputs = static_cast<const int32_t*>(x.const_data_ptr());
    float* results = output.mutable_data_ptr<float>();
    TORCH_CHECK(steps == d);
    if (panels.scalar_type() == at::kBFloat16) {
      run<FloatsByBFloat16s>(inputs, rows, weights, num_panels, steps, epilogue, width, results);
    } else if (panels.scalar_type() == at::kHalf) {
      run<FloatsByHalves>(inputs, rows, weights, num_panels, steps, epilogue, width, results);
    } else {
      TORCH_CHECK(panels.scalar_type() == at::kFloat);
      run<Floats>(inputs, rows, weights, num_panels, steps, epilogue, width, results);
    }
  } else {
    TORCH_CHECK(panels.scalar_type() == at::kBFloat16 && x.scalar_type() == at::kBFloat16 && 2 * steps == d);
    run<BFloat16s>(static_cast<const int32_t*>(x.const_data_ptr()), rows, weights, num_panels, steps, epilogue, width,
                   output.mutable_data_ptr<at::BFloat16>());
  }
  return output;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(nanovllm, library) {
  library.def("multiply_panels(Tensor x, Tensor panels, int width, Tensor? bias, Tensor? scales, Tensor? excess) -> Tensor");
}
TORCH_LIBRARY_IMPL(nanovllm, CPU, library) { library.impl("multiply_panels", multiply_panels); }

#endif
