// Holds the kernels of attention, of single tokens and of sampling against their definitions in double precision.

#include "paged_attention.cpp"
#include "rows.cpp"
#include "sampling.cpp"

#include <cmath>
#include <cstdio>
#include <random>

namespace {

std::mt19937 generator(11);
float draw() { return std::normal_distribution<float>()(generator); }

template <typename Stored>
at::ScalarType type_of() {
  return std::is_same_v<Stored, float> ? at::kFloat : std::is_same_v<Stored, at::BFloat16> ? at::kBFloat16 : at::kHalf;
}

template <typename Stored>
at::Tensor drawn(at::Sizes sizes) {
  at::Tensor tensor(std::move(sizes), type_of<Stored>());
  for (int64_t i = 0; i < tensor.numel(); ++i) tensor.mutable_data_ptr<Stored>()[i] = static_cast<Stored>(draw());
  return tensor;
}

at::Tensor whole_numbers(const std::vector<int64_t>& numbers) {
  at::Tensor tensor({static_cast<int64_t>(numbers.size())}, at::kLong);
  std::copy(numbers.begin(), numbers.end(), tensor.mutable_data_ptr<int64_t>());
  return tensor;
}

template <typename Stored>
double at_place(const at::Tensor& tensor, int64_t place) {
  return static_cast<float>(tensor.const_data_ptr<Stored>()[place]);
}

template <typename Stored>
void expect(const char* what, double found, double expected) {
  const double tolerance = std::is_same_v<Stored, float> ? 2e-5 : std::is_same_v<Stored, at::Half> ? 4e-3 : 3e-2;
  if (std::abs(found - expected) <= tolerance * std::max(1.0, std::abs(expected))) return;
  std::printf("%s in %d bytes: %g, not %g\n", what, static_cast<int>(sizeof(Stored)), found, expected);
  std::exit(1);
}

// A sequence of 40 tokens as a prompt of 39 and one more, in pages that lie backwards; the second step beside another row.
template <typename Computed, typename Stored>
void check_attention() {
  const int64_t heads = 4, kv_heads = 2, d = 32, block = 16, total = 40;
  const at::Tensor query = drawn<Computed>({total, heads, d}), key = drawn<Computed>({total, kv_heads, d}),
                   value = drawn<Computed>({total, kv_heads, d});
  at::Tensor cache({4, 2, kv_heads, block, d}, type_of<Stored>());
  const auto slot = [&](int64_t position) { return (3 - position / block) * block + position % block; };
  const auto part = [](const at::Tensor& whole, int64_t first, int64_t count) {
    const int64_t row = whole.stride(0);
    at::Tensor piece({count, whole.size(1), whole.size(2)}, whole.scalar_type());
    std::copy_n(whole.const_data_ptr<Computed>() + first * row, count * row, piece.mutable_data_ptr<Computed>());
    return piece;
  };
  at::Tensor tables({2, 3}, at::kInt);  // the sequence has the second row
  for (int32_t i = 0; i < 6; ++i) tables.mutable_data_ptr<int32_t>()[i] = i < 3 ? 0 : 6 - i;
  for (const auto& [first, count] : {std::pair<int64_t, int64_t>{0, 39}, {39, 1}}) {
    std::vector<int64_t> slots;
    for (int64_t i = first; i < first + count; ++i) slots.push_back(slot(i));
    const at::Tensor output =
        paged_attention(part(query, first, count), part(key, first, count), part(value, first, count), cache, block,
                        whole_numbers(slots), whole_numbers({0, count}), whole_numbers({first + count}), tables,
                        whole_numbers({1}), 0.2, std::nullopt);
    for (int64_t token = 0; token < count; ++token)
      for (int64_t head = 0; head < heads; ++head) {
        std::vector<double> weights, expected(d);
        double sum = 0;
        for (int64_t seen = 0; seen <= first + token; ++seen) {
          double product = 0;
          for (int64_t i = 0; i < d; ++i)
            product += at_place<Computed>(query, ((first + token) * heads + head) * d + i) *
                       at_place<Computed>(key, (seen * kv_heads + head / 2) * d + i);
          weights.push_back(std::exp(0.2 * product));
          sum += weights.back();
          for (int64_t i = 0; i < d; ++i)
            expected[i] += weights.back() * at_place<Computed>(value, (seen * kv_heads + head / 2) * d + i);
        }
        for (int64_t i = 0; i < d; ++i)
          expect<Stored>("attention", at_place<Computed>(output, (token * heads + head) * d + i), expected[i] / sum);
      }
  }
}

template <typename Stored>
void check_rows() {
  const int64_t rows = 3, d = 96;
  const at::Tensor x = drawn<Stored>({rows, d}), weight = drawn<Stored>({d});
  const at::Tensor normed = add_rms_norm(x, std::nullopt, weight, 1e-6), gated = gated_silu(x), best = argmax(x);
  const auto [scaled, largest] = scale_rows(x);
  for (int64_t row = 0; row < rows; ++row) {
    double squares = 0, most = 0;
    int64_t highest = 0;
    for (int64_t i = 0; i < d; ++i) {
      const double number = at_place<Stored>(x, row * d + i);
      squares += number * number;
      most = std::max(most, std::abs(number));
      if (number > at_place<Stored>(x, row * d + highest)) highest = i;
    }
    for (int64_t i = 0; i < d; ++i) {
      const double number = at_place<Stored>(x, row * d + i);
      const double expected = number / std::sqrt(squares / d + 1e-6) * at_place<Stored>(weight, i);
      expect<Stored>("add_rms_norm", at_place<Stored>(normed, row * d + i), expected);
      expect<float>("scale_rows", at_place<float>(scaled, row * d + i), number / most);
    }
    for (int64_t i = 0; i < d / 2; ++i) {
      const double gate = at_place<Stored>(x, row * d + i), up = at_place<Stored>(x, row * d + d / 2 + i);
      expect<Stored>("gated_silu", at_place<Stored>(gated, row * d / 2 + i), gate / (1 + std::exp(-gate)) * up);
    }
    if (best.const_data_ptr<int64_t>()[row] != highest) expect<float>("argmax", best.const_data_ptr<int64_t>()[row], highest);
  }

  const int64_t heads = 2, width = 32;
  const at::Tensor turned = drawn<Stored>({rows, heads, width}), cos = drawn<Stored>({rows, 1, width}), sin = drawn<Stored>({rows, 1, width});
  const at::Tensor rotated = rotate_heads(turned, std::nullopt, 0, cos, sin);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t head = 0; head < heads; ++head)
      for (int64_t i = 0; i < width; ++i) {
        const int64_t first = (row * heads + head) * width, other = (i + width / 2) % width;
        const double expected = at_place<Stored>(turned, first + i) * at_place<Stored>(cos, row * width + i) +
                                at_place<Stored>(turned, first + other) * at_place<Stored>(sin, row * width + i);
        expect<Stored>("rotate_heads", at_place<Stored>(rotated, first + i), expected);
      }
}

// How often a token is drawn is its probability among those that top_k keeps.
template <typename Stored>
void check_draws() {
  const int64_t vocab = 200, draws = 4000, top_k = 4;
  at::Tensor logits({1, vocab}, type_of<Stored>());
  for (int64_t i = 0; i < vocab; ++i) logits.mutable_data_ptr<Stored>()[i] = static_cast<Stored>(i < 6 ? 6.0f - 0.5f * i : -1.0f);
  for (const int64_t k : {top_k, vocab}) {
    std::vector<int64_t> counts(vocab);
    at::Tensor limits({draws, 3}, at::kFloat), keys({draws, 3}, at::kLong), rows({draws}, at::kLong);
    for (int64_t i = 0; i < draws; ++i) {
      const float limit[] = {1, 0, 1};
      const int64_t key[] = {7, i, k};
      std::copy_n(limit, 3, limits.mutable_data_ptr<float>() + 3 * i);
      std::copy_n(key, 3, keys.mutable_data_ptr<int64_t>() + 3 * i);
      rows.mutable_data_ptr<int64_t>()[i] = 0;
    }
    const at::Tensor tokens = draw_tokens(logits, rows, limits, keys);
    for (int64_t i = 0; i < draws; ++i) ++counts[tokens.const_data_ptr<int64_t>()[i]];
    double sum = 0;
    for (int64_t i = 0; i < k; ++i) sum += std::exp(at_place<Stored>(logits, i));
    for (int64_t i = 0; i < 6; ++i) {
      const double share = i < k ? std::exp(at_place<Stored>(logits, i)) / sum : 0;
      if (std::abs(counts[i] - draws * share) > 5 * std::sqrt(draws * share * (1 - share)))
        expect<float>("draws", counts[i], draws * share);
    }
  }
}

}  // namespace

int main() {
  check_attention<float, float>();
  check_attention<float, at::BFloat16>();
  check_attention<at::BFloat16, at::BFloat16>();
  check_attention<at::Half, at::Half>();
  check_rows<float>();
  check_rows<at::BFloat16>();
  check_rows<at::Half>();
  check_draws<float>();
  check_draws<at::BFloat16>();
  std::printf("%lld lanes\n", static_cast<long long>(kLanes));
}
