// Products with weights in panels on CPUs without AVX-512, and those in bytes where AVX-512 comes without VNNI.

#include <ATen/core/Dict.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "lanes.h"
#include "aligned.h"
#include "panel_blocks.h"
#include "panel_lanes.h"
#include "parallel.h"

namespace {

using namespace panel_lanes;

// A panel is multiplied block by block from so many rows on.
template <typename Dot>
constexpr int64_t kRowsOfBlocks = 24;
template <>
constexpr int64_t kRowsOfBlocks<Floats> = 96;  // nothing is widened
constexpr int64_t kMostRowsOfBlocks = 240;     // at a time

// Calls function(panel, the panel that this thread multiplies next, the panel's first output) for each panel.
template <typename Function>
void for_panels(const char* panels, int64_t num_panels, int64_t panel_bytes, const Function& function) {
  share_out(0, num_panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) {
      const char* panel = panels + number * panel_bytes;
      function(panel, number + 1 < end ? panel + panel_bytes : panel, number * kOutputs);
    }
  });
}

template <typename Stored>
void store_rows(const float* results, int64_t rows, int64_t first, int64_t width, Stored* output) {
  for (int64_t r = 0; r < rows; ++r)
    store(results + r * kOutputs, std::min(kOutputs, width - first), output + r * width + first);
}

Epilogue from_row(Epilogue epilogue, int64_t row) {
  if (epilogue.row_scales) epilogue.row_scales += row;
  return epilogue;
}

// inputs [rows, steps] times panels [panels, steps, 48], to output [rows, width].
template <typename Dot, typename Stored>
void run(const int32_t* inputs, int64_t rows, const char* panels, int64_t num_panels, int64_t steps, const Epilogue& epilogue,
         int64_t width, Stored* output) {
  const int64_t blocks = (rows + kRows - 1) / kRows;
  for_panels(panels, num_panels, steps * kVectors * Dot::kBytes, [&](const char* panel, const char* following, int64_t first) {
    float results[kRows * kOutputs];
    int64_t some;
    for (int64_t row = 0, block = 0; row < rows; row += some, ++block) {
      some = (rows - row + blocks - block - 1) / (blocks - block);
      // The first of several blocks of rows fetches the next panel; a single one what it needs itself soon.
      const char* ahead = blocks == 1 ? panel + kAhead : block == 0 ? following : panel;
      multiply_rows<Dot>(some, inputs + row * steps, panel, steps, ahead, from_row(epilogue, row), first, results);
      store_rows(results, some, first, width, output + row * width);
    }
  });
}

// The same for kRowsOfBlocks and more; inputs [rows, steps * kParts].
template <typename Dot, typename Stored>
void run_blocks(const int32_t* inputs, int64_t rows, const char* panels, int64_t num_panels, int64_t steps,
                const Epilogue& epilogue, int64_t width, Stored* output) {
  for_panels(panels, num_panels, steps * kVectors * Dot::kBytes, [&](const char* panel, const char*, int64_t first) {
    float* const results = floats_of_thread(kMostRowsOfBlocks * kOutputs + kBlockBytes<Dot> / sizeof(float));
    char* const wide = reinterpret_cast<char*>(results + kMostRowsOfBlocks * kOutputs);
    for (int64_t row = 0, some; row < rows; row += some) {
      some = std::min(kMostRowsOfBlocks, rows - row);
      const int32_t* own = inputs + row * steps * Dot::kParts;
      multiply_blocks<Dot>(some, own, panel, steps, from_row(epilogue, row), first, wide, results);
      store_rows(results, some, first, width, output + row * width);
    }
  });
}

template <typename Dot>
void run_floats(const at::Tensor& x, int64_t rows, const char* panels, int64_t num_panels, int64_t steps, const Epilogue& epilogue,
                int64_t width, at::Tensor& output) {
  const auto* inputs = static_cast<const int32_t*>(x.const_data_ptr());
  (rows < kRowsOfBlocks<Dot> ? run<Dot, float> : run_blocks<Dot, float>)(inputs, rows, panels, num_panels, steps, epilogue, width,
                                                                        output.mutable_data_ptr<float>());
}

template <typename Dot, typename Stored>
void run_bytes(const Stored* source, int64_t rows, int64_t d, const char* panels, int64_t num_panels, int64_t steps,
               Epilogue epilogue, int64_t width, Stored* output) {
  constexpr bool has_wide = requires { typename Dot::Wide; };
  const bool in_blocks = has_wide && rows >= kRowsOfBlocks<Dot>;
  int64_t parts = 1;
  if constexpr (has_wide) parts = in_blocks ? Dot::kParts : 1;
  std::vector<int32_t> inputs(rows * steps * parts);
  std::vector<float> row_scales(rows);
  share_out(0, rows, std::max<int64_t>(1, (1 << 15) / d), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(d);
    std::vector<int32_t> bytes(steps);
    for (int64_t row = begin; row < end; ++row) {
      int32_t* const own = &inputs[row * steps * parts];
      int32_t* const narrow = in_blocks ? bytes.data() : own;
      row_scales[row] = to_bytes(as_float(source + row * d, d, scratch.data()), d, Dot::kOffset, reinterpret_cast<uint8_t*>(narrow));
      if (in_blocks) widen_inputs(narrow, steps, own);
    }
  });
  epilogue.row_scales = row_scales.data();
  if constexpr (has_wide)
    if (in_blocks) return run_blocks<Dot>(inputs.data(), rows, panels, num_panels, steps, epilogue, width, output);
  run<Dot>(inputs.data(), rows, panels, num_panels, steps, epilogue, width, output);
}

// As multiply_panels of panels.cpp, without pairs of bfloat16.
at::Tensor multiply_narrow_panels(const at::Tensor& x, const at::Tensor& panels, int64_t width, const std::optional<at::Tensor>& bias,
                                  const std::optional<at::Tensor>& scales, const std::optional<at::Tensor>& excess) {
  const int64_t d = x.size(-1), rows = x.numel() / std::max<int64_t>(d, 1), num_panels = panels.size(0), steps = panels.size(1);
  TORCH_CHECK(x.is_contiguous() && panels.is_contiguous() && width <= num_panels * kOutputs);
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = width;
  at::Tensor output = at::empty(sizes, x.options());
  const char* weights = static_cast<const char*>(panels.const_data_ptr());
  Epilogue epilogue{nullptr, nullptr, nullptr, bias ? bias->const_data_ptr<float>() : nullptr};
  if (panels.scalar_type() == at::kChar) {
    static const bool dots = has_dot_products();
    epilogue.scales = scales->const_data_ptr<float>();
    epilogue.excess = excess->const_data_ptr<int32_t>();
    dispatch(x.scalar_type(), [&](auto stored) {
      using Stored = decltype(stored);
      (dots ? run_bytes<BytesByDotProducts, Stored> : run_bytes<Bytes, Stored>)(
          x.const_data_ptr<Stored>(), rows, d, weights, num_panels, steps, epilogue, width, output.mutable_data_ptr<Stored>());
    });
    return output;
  }
  TORCH_CHECK(x.scalar_type() == at::kFloat && steps == d, "inputs in float, and panels of one number a step");
  if (panels.scalar_type() == at::kBFloat16)
    run_floats<FloatsByBFloat16s>(x, rows, weights, num_panels, steps, epilogue, width, output);
  else if (panels.scalar_type() == at::kHalf)
    run_floats<FloatsByHalves>(x, rows, weights, num_panels, steps, epilogue, width, output);
  else
    run_floats<Floats>(x, rows, weights, num_panels, steps, epilogue, width, output);
  return output;
}

// By what weights of a type are multiplied here; a type that is missing has no instructions of its own.
c10::Dict<std::string, std::string> panel_forms() {
  c10::Dict<std::string, std::string> forms;
  forms.insert("float32", kFloatForm);
  forms.insert("int8", has_dot_products() ? kDotProductForm : kByteForm);
#if defined(CPU_CAPABILITY_AVX512)
  forms.insert_or_assign("float32", "FMA (AVX-512)");
  if (__builtin_cpu_supports("avx512bf16")) forms.insert("bfloat16", "vdpbf16ps (AVX-512)");
  if (__builtin_cpu_supports("avx512vnni")) forms.insert_or_assign("int8", "vpdpbusd (AVX-512)");
#endif
  return forms;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(nanovllm, library) {
  library.def("panel_forms() -> Dict(str, str)", panel_forms);
  library.def("multiply_narrow_panels(Tensor x, Tensor panels, int width, Tensor? bias, Tensor? scales, Tensor? excess) -> Tensor");
}
TORCH_LIBRARY_IMPL(nanovllm, CPU, library) { library.impl("multiply_narrow_panels", multiply_narrow_panels); }
