// Products with weights that lie in panels: 48 outputs side by side, and of each four bytes that belong together (one
// float, two bfloat16 or four int8 of a row of the weight). A step of a product so reads three whole vectors of the
// panel and four bytes of each input row, whatever the type; nine rows by 48 outputs are summed in registers.
//
// Inputs in float may have weights stored in 16 bits, bfloat16 in pairs. They are widened on their way into registers, or
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

#include "aligned.h"
#include "panels.h"
#include "panels_tiles.h"
#include "parallel.h"
#include "three_products.h"

namespace {

constexpr int64_t kRows = 9;
constexpr int64_t kWidenedBlocks = 6;  // of rows, from which on a panel is widened once
constexpr int64_t kAhead = 24 * 64 * kVectors;  // bytes that a panel is fetched before it is needed

// A kind of product reads kVectors vectors of kBytes from a panel in every step, of kTogether steps that lie together. Two
// instructions are by name below: what GCC makes of their intrinsics copies every sum before and after.
struct WholeVectors {
  static constexpr int64_t kBytes = 64, kTogether = 1;
  PANEL static __m512i load(const char* together, int64_t, int64_t v) { return _mm512_loadu_si512(together + v * 64); }
};

struct Floats;

struct SummedAsFloats {
  using Sum = __m512;
  using Widened = Floats;  // its kind once a panel is widened
  static constexpr bool kFlushes = false;  // denormal numbers to zero
  PANEL static Sum zero() { return _mm512_setzero_ps(); }
};

struct Floats : WholeVectors, SummedAsFloats {
  PANEL static Sum add(Sum sum, int32_t input, __m512i weight) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_set1_epi32(input)), _mm512_castsi512_ps(weight), sum);
  }
};

struct FloatsByBFloat16s : Floats {
  static constexpr int64_t kBytes = 32, kTogether = 2;
  PANEL static __m512i load(const char* pair, int64_t step, int64_t v) {
    const __m512i both = _mm512_loadu_si512(pair + v * 64);
    return step == 0 ? _mm512_slli_epi32(both, 16) : _mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
  }
};

struct FloatsByHalves : Floats {
  static constexpr int64_t kBytes = 32;
  PANEL static __m512i load(const char* step, int64_t, int64_t v) {
    return _mm512_castps_si512(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(step + v * 32))));
  }
};

// What BFloat16s computes, bit for bit, by instructions for floats, which are the faster ones of some CPUs: of a pair the
// second product first, and denormal numbers are zero. A pair is two steps, and inputs are floats in the order of the steps.
struct FlushedFloats : Floats {
  static constexpr bool kFlushes = true;
};

struct FloatsByPairs : FlushedFloats {
  using Widened = FlushedFloats;
  static constexpr int64_t kBytes = 32, kTogether = 2;
  PANEL static __m512i load(const char* pair, int64_t step, int64_t v) {
    const __m512i both = _mm512_loadu_si512(pair + v * 64);
    return step == 0 ? _mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000))) : _mm512_slli_epi32(both, 16);
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
  using Widened = Floats;
  static constexpr bool kFlushes = false;
  PANEL static Sum zero() { return _mm512_setzero_si512(); }
  PANEL static Sum add(Sum sum, int32_t input, __m512i weight) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(_mm512_set1_epi32(input)), "v"(weight));
    return sum;
  }
};

// R rows of inputs, `steps` steps each, times one panel.
template <typename Dot, int64_t R>
PANEL void multiply(const int32_t* inputs, const char* panel, int64_t steps, const char* const* ahead, const Epilogue& epilogue,
                    int64_t output, float* results) {
  typename Dot::Sum sums[R][kVectors];
  for (int64_t r = 0; r < R; ++r)
    for (int64_t v = 0; v < kVectors; ++v) sums[r][v] = Dot::zero();
  const unsigned modes = _mm_getcsr();
  if constexpr (Dot::kFlushes) _mm_setcsr(modes | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON);
  for (int64_t together = 0; together < steps; together += Dot::kTogether) {
    UNROLLED for (int64_t part = 0; part < Dot::kTogether; ++part) {
      const int64_t step = together + part;
      __m512i weights[kVectors];
      for (int64_t v = 0; v < kVectors; ++v) {
        const int64_t place = (step * kVectors + v) * Dot::kBytes;
        weights[v] = Dot::load(panel + together * kVectors * Dot::kBytes, part, v);
        _mm_prefetch(ahead[v] + place, _MM_HINT_T1);
      }
      for (int64_t r = 0; r < R; ++r) {
        const int32_t input = inputs[r * steps + step];
        for (int64_t v = 0; v < kVectors; ++v) sums[r][v] = Dot::add(sums[r][v], input, weights[v]);
      }
    }
  }
  if constexpr (Dot::kFlushes) {
    _mm_setcsr(modes);
    // The compiler does not know that what follows must not move before.
    for (int64_t r = 0; r < R; ++r)
      for (int64_t v = 0; v < kVectors; ++v) asm volatile("" : "+v"(sums[r][v]));
  }
  for (int64_t v = 0; v < kVectors; ++v)
    for (int64_t r = 0; r < R; ++r)
      _mm512_storeu_ps(results + r * kOutputs + v * 16, finish(sums[r][v], epilogue, r, output + v * 16));
}

template <typename Dot, int64_t R>
void multiply_rows(int64_t rows, const int32_t* inputs, const char* panel, int64_t steps, const char* const* ahead,
                   const Epilogue& epilogue, int64_t output, float* results) {
  if (rows == R)
    multiply<Dot, R>(inputs, panel, steps, ahead, epilogue, output, results);
  else if constexpr (R > 1)
    multiply_rows<Dot, R - 1>(rows, inputs, panel, steps, ahead, epilogue, output, results);
}

// So many steps of a panel as they are multiplied.
template <typename Dot>
PANEL void widen(const char* panel, int64_t steps, float* wide) {
  for (int64_t together = 0; together < steps; together += Dot::kTogether)
    UNROLLED for (int64_t part = 0; part < Dot::kTogether; ++part)
      for (int64_t v = 0; v < kVectors; ++v)
        _mm512_storeu_si512(wide + (together + part) * kOutputs + 16 * v,
                            Dot::load(panel + together * kVectors * Dot::kBytes, part, v));
}

// inputs [rows, steps] times panels [panels, steps, 48], to output [rows, width].
template <typename Dot, typename Stored>
void run(const int32_t* inputs, int64_t rows, const char* panels, int64_t num_panels, int64_t steps, Epilogue epilogue,
         int64_t width, Stored* output) {
  const int64_t all_blocks = (rows + kRows - 1) / kRows, panel_bytes = steps * kVectors * Dot::kBytes;
  const bool widens = Dot::kBytes < 64 && all_blocks >= kWidenedBlocks;
  const int64_t groups = groups_of_rows(num_panels, all_blocks / kWidenedBlocks);
  share_out(0, groups * num_panels, 1, [&](int64_t begin, int64_t end) {
    float results[kRows * kOutputs];
    float* const wide = widens ? floats_of_thread(steps * kOutputs) : nullptr;
    int64_t some;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t number = item % num_panels, group = item / num_panels, last = (group + 1) * rows / groups;
      const int64_t blocks = (last - group * rows / groups + kRows - 1) / kRows;
      const char* panel = panels + number * panel_bytes;
      const int64_t first = number * kOutputs, count = std::min(kOutputs, width - first);
      const char* following = item + 1 < end && number + 1 < num_panels ? panel + panel_bytes : panel;
      if (widens) widen<Dot>(panel, steps, wide);
      const char* own_panel = widens ? reinterpret_cast<const char*>(wide) : panel;
      for (int64_t row = group * rows / groups, block = 0; row < last; row += some, ++block) {
        some = (last - row + blocks - block - 1) / (blocks - block);
        // Every block of rows fetches its share of the next panel; a single one fetches what it needs itself soon.
        const char* ahead[kVectors];
        for (int64_t v = 0; v < kVectors; ++v)
          ahead[v] = blocks == 1 ? panel + kAhead : v % blocks == block && !widens ? following : own_panel;
        Epilogue own = epilogue;
        if (own.row_scales) own.row_scales += row;
        if (widens)
          multiply_rows<typename Dot::Widened, kRows>(some, inputs + row * steps, own_panel, steps, ahead, own, first, results);
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

// Pairs of bfloat16 as floats, the second of a pair first; negative zeros and denormal numbers as they are.
PANEL void widen_pairs(const int32_t* pairs, int64_t count, float* wide) {
  for (int64_t i = 0; i < count; ++i) {
    const int32_t first = static_cast<int32_t>(static_cast<uint32_t>(pairs[i]) << 16), second = pairs[i] & static_cast<int32_t>(0xffff0000);
    std::memcpy(wide + 2 * i, &second, 4);
    std::memcpy(wide + 2 * i + 1, &first, 4);
  }
}

// x [rows, d] times a weight [width, d] in panels [panels, steps, 48, n] of float32 or, under inputs in float, float16 (n = 1),
// of pairs of bfloat16 or fours of int8. With int8 `scales` and `excess` [48 * panels] belong to the outputs: see Bytes.
// From so many rows on bfloat16 is multiplied as floats (the same bits), and bfloat16 and int8 by tiles; none: never.
at::Tensor multiply_panels(const at::Tensor& x, const at::Tensor& panels, int64_t width, const std::optional<at::Tensor>& bias,
                           const std::optional<at::Tensor>& scales, const std::optional<at::Tensor>& excess,
                           std::optional<int64_t> floats_from, std::optional<int64_t> tiles_from) {
  const int64_t d = x.size(-1), rows = x.numel() / std::max<int64_t>(d, 1), num_panels = panels.size(0), steps = panels.size(1);
  TORCH_CHECK(x.is_contiguous() && panels.is_contiguous() && width <= num_panels * kOutputs);
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = width;
  at::Tensor output = at::empty(sizes, x.options());
  if (output.numel() == 0) return output;
  const bool by_tiles = tiles_from && rows >= *tiles_from && steps % tiles::kRows == 0;
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
      Stored* results = output.mutable_data_ptr<Stored>();
      if (by_tiles)
        tiles::run<tiles::Bytes>(inputs.data(), rows, weights, num_panels, steps, epilogue, width, results);
      else
        run<Bytes>(inputs.data(), rows, weights, num_panels, steps, epilogue, width, results);
    });
  } else if (x.scalar_type() == at::kFloat) {
    const int32_t* inputs = static_cast<const int32_t*>(x.const_data_ptr());
    float* results = output.mutable_data_ptr<float>();
    TORCH_CHECK(steps * panels.size(3) == d);
    if (panels.scalar_type() == at::kBFloat16) {
      TORCH_CHECK(2 * steps == d);
      if (by_tiles) {
        const at::Tensor terms = at::empty({tiles::Floats::kTerms, rows, d}, x.options().dtype(at::kBFloat16));
        uint16_t* first = static_cast<uint16_t*>(terms.mutable_data_ptr());
        share_out(0, rows, std::max<int64_t>(1, (1 << 15) / d), [&](int64_t begin, int64_t end) {
          uint16_t* const own[] = {first + begin * d, first + (rows + begin) * d, first + (2 * rows + begin) * d};
          tiles::split(x.const_data_ptr<float>() + begin * d, (end - begin) * d, own);
        });
        tiles::run<tiles::Floats>(reinterpret_cast<const int32_t*>(first), rows, weights, num_panels, steps, epilogue, width, results);
      } else {
        run<FloatsByBFloat16s>(inputs, rows, weights, num_panels, d, epilogue, width, results);
      }
    } else if (panels.scalar_type() == at::kHalf) {
      run<FloatsByHalves>(inputs, rows, weights, num_panels, steps, epilogue, width, results);
    } else {
      TORCH_CHECK(panels.scalar_type() == at::kFloat);
      run<Floats>(inputs, rows, weights, num_panels, steps, epilogue, width, results);
    }
  } else {
    TORCH_CHECK(panels.scalar_type() == at::kBFloat16 && x.scalar_type() == at::kBFloat16 && 2 * steps == d);
    const int32_t* inputs = static_cast<const int32_t*>(x.const_data_ptr());
    at::BFloat16* results = output.mutable_data_ptr<at::BFloat16>();
    if (by_tiles) {
      tiles::run<tiles::BFloat16s>(inputs, rows, weights, num_panels, steps, epilogue, width, results);
    } else if (floats_from && rows >= *floats_from) {
      const at::Tensor wide = at::empty({rows, d}, x.options().dtype(at::kFloat));
      float* floats = wide.mutable_data_ptr<float>();
      share_out(0, rows, std::max<int64_t>(1, (1 << 15) / d),
                [&](int64_t begin, int64_t end) { widen_pairs(inputs + begin * steps, (end - begin) * steps, floats + begin * d); });
      run<FloatsByPairs>(reinterpret_cast<const int32_t*>(floats), rows, weights, num_panels, d, epilogue, width, results);
    } else {
      run<BFloat16s>(inputs, rows, weights, num_panels, steps, epilogue, width, results);
    }
  }
  return output;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(nanovllm, library) {
  library.def(
      "multiply_panels(Tensor x, Tensor panels, int width, Tensor? bias, Tensor? scales, Tensor? excess, int? floats_from=None, "
      "int? tiles_from=None) -> Tensor");
  library.def("request_tiles() -> str", tiles::refusal);
}
TORCH_LIBRARY_IMPL(nanovllm, CPU, library) { library.impl("multiply_panels", multiply_panels); }

#endif
