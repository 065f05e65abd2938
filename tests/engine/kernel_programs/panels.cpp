// Holds every product of panel_lanes.h and panel_blocks.h against sums in plain C++, to the bit, and says which were computed.

#include "panel_blocks.h"
#include "panel_lanes.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

namespace lanes = panel_lanes;

std::mt19937 generator(7);

float draw() { return std::normal_distribution<float>()(generator); }

[[noreturn]] void fail(const char* form, int64_t rows, int64_t steps, float found, float expected) {
  std::printf("%s, %lld rows, %lld steps: %a, not %a\n", form, static_cast<long long>(rows), static_cast<long long>(steps), found, expected);
  std::exit(1);
}

void compare(const char* form, int64_t rows, int64_t steps, const std::vector<float>& found, const std::vector<float>& expected) {
  for (size_t i = 0; i < expected.size(); ++i)
    if (std::memcmp(&found[i], &expected[i], sizeof(float)) != 0) fail(form, rows, steps, found[i], expected[i]);
}

float as_bfloat16(float number, uint16_t& bits) {
  uint32_t word;
  std::memcpy(&word, &number, sizeof word);
  word &= 0xffff0000u;
  bits = static_cast<uint16_t>(word >> 16);
  std::memcpy(&number, &word, sizeof word);
  return number;
}

// A number that half precision has: a sign, an exponent from -14 to 15 and ten bits.
float some_half(uint16_t& bits) {
  bits = static_cast<uint16_t>(generator() % 0x7c00u | (generator() & 1) << 15);
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                        : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  return bits >> 15 ? -magnitude : magnitude;
}

template <typename Dot, typename Stored>
void check_floats(const char* form, int64_t rows, int64_t steps, const std::vector<Stored>& panel, const std::vector<float>& weights) {
  std::vector<float> inputs(rows * steps), bias(lanes::kOutputs), found(rows * lanes::kOutputs), expected(found.size());
  for (float& number : inputs) number = draw();
  for (float& number : bias) number = draw();
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t o = 0; o < lanes::kOutputs; ++o) {
      float sum = 0;
      for (int64_t s = 0; s < steps; ++s) sum = std::fma(inputs[r * steps + s], weights[s * lanes::kOutputs + o], sum);
      expected[r * lanes::kOutputs + o] = sum + bias[o];
    }
  const auto* words = reinterpret_cast<const int32_t*>(inputs.data());
  const auto* bytes = reinterpret_cast<const char*>(panel.data());
  const lanes::Epilogue epilogue{nullptr, nullptr, nullptr, bias.data()};
  lanes::multiply_rows<Dot>(rows, words, bytes, steps, bytes, epilogue, 0, found.data());
  compare(form, rows, steps, found, expected);
}

// Rows in blocks of panels are those of `multiply`, one by one.
template <typename Dot, typename Stored>
void check_blocks(int64_t rows, int64_t steps, const std::vector<Stored>& panel) {
  std::vector<float> bias(lanes::kOutputs), found(rows * lanes::kOutputs), expected(found.size());
  for (float& number : bias) number = draw();
  std::vector<int32_t> inputs(rows * steps), wide_inputs(rows * steps * Dot::kParts);
  std::vector<float> scales(lanes::kOutputs, 0.5f), row_scales(rows);
  for (float& scale : row_scales) scale = draw();
  if constexpr (Dot::kParts == 1) {
    for (int32_t& input : inputs) {
      const float number = draw();
      std::memcpy(&input, &number, sizeof number);
    }
    wide_inputs = inputs;
  } else {
    auto* bytes = reinterpret_cast<int8_t*>(inputs.data());
    for (size_t i = 0; i < 4 * inputs.size(); ++i) bytes[i] = static_cast<int8_t>(static_cast<int>(generator() % 255) - 127);
    lanes::widen_inputs(inputs.data(), rows * steps, wide_inputs.data());
  }
  const auto* bytes = reinterpret_cast<const char*>(panel.data());
  for (const bool is_plain : {true, false}) {
    lanes::Epilogue epilogue{nullptr, nullptr, nullptr, is_plain ? nullptr : bias.data()};
    if (Dot::kParts > 1) epilogue.scales = scales.data();
    for (int64_t r = 0; r < rows; ++r) {
      if (epilogue.scales) epilogue.row_scales = &row_scales[r];
      lanes::multiply_rows<Dot>(1, &inputs[r * steps], bytes, steps, bytes, epilogue, 0, &expected[r * lanes::kOutputs]);
    }
    epilogue.row_scales = row_scales.data();
    std::vector<char> wide(lanes::kBlockBytes<Dot>);
    lanes::multiply_blocks<Dot>(rows, wide_inputs.data(), bytes, steps, epilogue, 0, wide.data(), found.data());
    compare("in blocks", rows, steps, found, expected);
  }
}

template <typename Dot>
void check_blocks_of_bytes(int64_t rows, int64_t steps) {
  if constexpr (requires { typename Dot::Wide; }) {
    std::vector<int8_t> panel(steps * lanes::kOutputs * 4);
    for (int8_t& byte : panel) byte = static_cast<int8_t>(static_cast<int>(generator() % 255) - 127);
    check_blocks<Dot>(rows, steps, panel);
  }
}

template <typename Dot>
void check_bytes(const char* form, int64_t rows, int64_t steps) {
  const int64_t d = 4 * steps - 1;
  std::vector<int8_t> weights(steps * lanes::kOutputs * 4);
  for (int8_t& weight : weights) weight = static_cast<int8_t>(static_cast<int>(generator() % 255) - 127);
  for (int64_t i = 0; i < 40; ++i) weights[i] = i % 2 ? 127 : -127;  // two products of them overflow 15 bits
  for (int64_t o = 0; o < lanes::kOutputs; ++o) weights[((steps - 1) * lanes::kOutputs + o) * 4 + 3] = 0;  // of no input
  std::vector<float> x(d), scales(lanes::kOutputs), bias(lanes::kOutputs), row_scales(rows), found(rows * lanes::kOutputs),
      expected(found.size());
  std::vector<int32_t> excess(lanes::kOutputs), inputs(rows * steps);
  for (int64_t o = 0; o < lanes::kOutputs; ++o) {
    scales[o] = std::fabs(draw());
    bias[o] = draw();
    for (int64_t s = 0; s < steps; ++s)
      for (int64_t b = 0; b < 4; ++b) excess[o] += 128 * weights[(s * lanes::kOutputs + o) * 4 + b];
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < d; ++i) x[i] = i < 10 ? (i % 2 ? 9.0f : -9.0f) : draw();
    row_scales[r] = lanes::to_bytes(x.data(), d, Dot::kOffset, reinterpret_cast<uint8_t*>(&inputs[r * steps]));
    float largest = 0;
    for (const float number : x) largest = std::max(largest, std::fabs(number));
    if (row_scales[r] != largest / 127.0f) fail("scale", r, steps, row_scales[r], largest / 127.0f);
    for (int64_t o = 0; o < lanes::kOutputs; ++o) {
      int64_t sum = 0;
      for (int64_t i = 0; i < d; ++i)
        sum += std::lrint(x[i] / largest * 127.0f) * weights[(i / 4 * lanes::kOutputs + o) * 4 + i % 4];
      expected[r * lanes::kOutputs + o] = static_cast<float>(sum) * (scales[o] * row_scales[r]) + bias[o];
    }
  }
  const lanes::Epilogue epilogue{row_scales.data(), scales.data(), excess.data(), bias.data()};
  const auto* panel = reinterpret_cast<const char*>(weights.data());
  lanes::multiply_rows<Dot>(rows, inputs.data(), panel, steps, panel, epilogue, 0, found.data());
  compare(form, rows, steps, found, expected);
}

int main() {
  for (const int64_t steps : {1, 7, 192, 401}) {
    std::vector<float> weights(steps * lanes::kOutputs), shorter(weights.size()), halves(weights.size());
    std::vector<uint16_t> as_shorter(weights.size()), as_halves(weights.size());
    for (size_t i = 0; i < weights.size(); ++i) {
      weights[i] = draw();
      shorter[i] = as_bfloat16(weights[i], as_shorter[i]);
      halves[i] = some_half(as_halves[i]);
    }
    for (int64_t rows = 1; rows <= lanes::kRows; ++rows) {
      check_floats<lanes::Floats>("float32", rows, steps, weights, weights);
      check_floats<lanes::FloatsByBFloat16s>("bfloat16", rows, steps, as_shorter, shorter);
      check_floats<lanes::FloatsByHalves>("float16", rows, steps, as_halves, halves);
      check_bytes<lanes::Bytes>(lanes::kByteForm, rows, steps);
      if (lanes::has_dot_products()) check_bytes<lanes::BytesByDotProducts>(lanes::kDotProductForm, rows, steps);
    }
    for (const int64_t rows : {1, 2, 3, 5, 24, 31}) {
      check_blocks<lanes::Floats>(rows, steps, weights);
      check_blocks<lanes::FloatsByBFloat16s>(rows, steps, as_shorter);
      check_blocks<lanes::FloatsByHalves>(rows, steps, as_halves);
      check_blocks_of_bytes<lanes::Bytes>(rows, steps);
    }
  }
  std::printf("%s; %s%s%s\n", lanes::kFloatForm, lanes::kByteForm, lanes::has_dot_products() ? "; " : "",
              lanes::has_dot_products() ? lanes::kDotProductForm : "");
}
