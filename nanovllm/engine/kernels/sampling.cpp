// Sampling of rows of logits: a token by its limits and a counter-based generator, and masks of forbidden tokens.
//
// Every row depends on itself alone. Limits are found without sorting the row: few best tokens by a heap, others by counts
// and probabilities in buckets of logits, of which one alone is put in order.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "lanes.h"
#include "parallel.h"

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kBlock = 64;        // tokens of 16 counters, four words each
constexpr int64_t kHeapTokens = 1024;  // the largest top_k that a heap serves
constexpr float kReach = 32;           // a token so far below the best has less than 1e-13 of its probability
constexpr int kBuckets = 1024;         // of that reach

struct Candidate {
  float value;
  int32_t token;
};

// Order of the limits: a higher logit first, of equal ones the lower token.
inline bool is_before(const Candidate& a, const Candidate& b) {
  return a.value > b.value || (a.value == b.value && a.token < b.token);
}

struct Limits {
  float scale;  // 1 / temperature
  float min_p;
  float top_p;
  int64_t top_k;
};

// Philox-4x32-10 (Salmon et al., SC 2011) for 16 neighbouring counters.
struct Philox {
  uint32_t key_low, key_high, position;

  Philox(uint64_t seed, uint64_t at)
      : key_low(static_cast<uint32_t>(seed)), key_high(static_cast<uint32_t>(seed >> 32)), position(static_cast<uint32_t>(at)) {}

  // words[w][i] of counter first + i: the random bits of token 64 * (first / 16) + 16 * w + i.
  void fill(uint32_t first, uint32_t (&words)[4][16]) const {
    for (uint32_t i = 0; i < 16; ++i) {
      words[0][i] = first + i;
      words[1][i] = position;
      words[2][i] = words[3][i] = 0;
    }
    uint32_t low = key_low, high = key_high;
    for (int round = 0; round < 10; ++round, low += 0x9E3779B9u, high += 0xBB67AE85u)
      for (int i = 0; i < 16; ++i) {
        const uint64_t a = uint64_t{0xD2511F53u} * words[0][i], b = uint64_t{0xCD9E8D57u} * words[2][i];
        const uint32_t second = words[1][i], fourth = words[3][i];
        words[0][i] = static_cast<uint32_t>(b >> 32) ^ second ^ low;
        words[1][i] = static_cast<uint32_t>(b);
        words[2][i] = static_cast<uint32_t>(a >> 32) ^ fourth ^ high;
        words[3][i] = static_cast<uint32_t>(a);
      }
  }
};

// A Gumbel variate of 31 random bits: minus the logarithm of an exponential variate, between -2.9 and 22.2.
constexpr float kLeastGumbel = -2.9f, kMostGumbel = 22.2f;

inline Lanes gumbel(const uint32_t* words) {
  alignas(64) float uniform[kLanes];
  for (int64_t i = 0; i < kLanes; ++i)
    uniform[i] = (static_cast<float>(static_cast<int32_t>(words[i] >> 1)) + 0.5f) * 0x1p-31f;
  const Lanes below_one = at::vec::minimum(Lanes::loadu(uniform), Lanes(0x1.fffffep-1f));
  return below_one.neg().log1p().neg().log().neg();
}

template <typename Stored>
class Row {
 public:
  Row(const Stored* logits, int64_t vocab, const Limits& limits, const Philox& random)
      : logits_(logits), vocab_(vocab), whole_(vocab / kBlock * kBlock), limits_(limits), random_(random) {}

  int64_t draw() {
    const bool has_heap = limits_.top_k <= kHeapTokens && limits_.top_k < vocab_;
    if (has_heap) keep_best();
    best_ = has_heap ? candidates_.front() : highest();
    if (!std::isfinite(best_.value)) return best_.token;
    floor_ = limits_.min_p > 0 ? best_.value + std::log(limits_.min_p) : -kInfinity;
    if (has_heap) {
      while (candidates_.back().value < floor_) candidates_.pop_back();
      if (limits_.top_p < 1) keep_mass(limits_.top_p * mass_of_candidates());
      return draw_from_candidates();
    }
    if (limits_.top_k < vocab_ || limits_.top_p < 1) cut_ = last_kept();
    return draw_from_row();
  }

 private:
  Lanes scaled(int64_t i) const { return load_lanes(logits_ + i) * Lanes(limits_.scale); }
  float scaled_one(int64_t i) const { return static_cast<float>(logits_[i]) * limits_.scale; }

  // The first place of the highest logit; token 0 of a row of NaNs.
  Candidate highest() const {
    Lanes most(-kInfinity);
    for (int64_t i = 0; i < whole_; i += kLanes) most = at::vec::maximum(most, scaled(i));
    float value = highest_of(most);
    for (int64_t i = whole_; i < vocab_; ++i) value = std::max(value, scaled_one(i));
    for (int64_t i = 0; i < vocab_; ++i)
      if (scaled_one(i) == value) return {value, static_cast<int32_t>(i)};
    return {value, 0};
  }

  // Calls each(first, count) for every block with a logit that is not below bottom; values_ are its logits, minus
  // infinity behind the last.
  template <typename Each>
  void for_each_block(const float& bottom, const Each& each) {
    for (int64_t i = 0; i < vocab_; i += kBlock) {
      const int64_t count = std::min(kBlock, vocab_ - i);
      Lanes most(-kInfinity);
      if (count == kBlock) {
        for (int64_t j = 0; j < kBlock; j += kLanes) {
          const Lanes value = scaled(i + j);
          value.store(values_ + j);
          most = at::vec::maximum(most, value);
        }
      } else {
        std::fill_n(values_, kBlock, -kInfinity);
        for (int64_t j = 0; j < count; ++j) values_[j] = scaled_one(i + j);
        for (int64_t j = 0; j < kBlock; j += kLanes) most = at::vec::maximum(most, Lanes::loadu(values_ + j));
      }
      highest_ = highest_of(most);
      if (highest_ >= bottom) each(i, count);
    }
  }

  // The top_k best tokens, best first.
  void keep_best() {
    const size_t k = limits_.top_k;
    float least = -kInfinity;
    for_each_block(least, [&](int64_t first, int64_t count) {
      for (int64_t j = 0; j < count; ++j) {
        const Candidate found{values_[j], static_cast<int32_t>(first + j)};
        if (candidates_.size() == k) {
          if (!is_before(found, candidates_.front())) continue;
          std::pop_heap(candidates_.begin(), candidates_.end(), is_before);
          candidates_.back() = found;
        } else {
          candidates_.push_back(found);
        }
        std::push_heap(candidates_.begin(), candidates_.end(), is_before);  // the worst of them in front
        if (candidates_.size() == k) least = candidates_.front().value;
      }
    });
    if (candidates_.empty()) candidates_.push_back({std::numeric_limits<float>::quiet_NaN(), 0});
    std::sort(candidates_.begin(), candidates_.end(), is_before);
  }

  int bucket_of(float value) const {
    return static_cast<int>(std::min((best_.value - value) * (kBuckets / kReach), static_cast<float>(kBuckets - 1)));
  }

  // The last token, in the order of the limits, that top_k and top_p keep: it is looked for in one bucket of logits.
  Candidate last_kept() {
    const bool has_top_k = limits_.top_k < vocab_;
    if (!has_top_k) floor_ = std::max(floor_, best_.value - kReach);
    std::array<int64_t, kBuckets> counts{};
    std::array<double, kBuckets> masses{};
    alignas(64) float weights[kBlock];
    for_each_block(floor_, [&](int64_t first, int64_t count) {
      for (int64_t j = 0; j < kBlock; j += kLanes)
        (Lanes::loadu(values_ + j) - Lanes(best_.value)).exp_u20().store(weights + j);
      for (int64_t j = 0; j < count; ++j) {
        if (!(values_[j] >= floor_)) continue;
        const int bucket = bucket_of(values_[j]);
        ++counts[bucket];
        masses[bucket] += weights[j];
      }
    });
    Candidate last{-kInfinity, std::numeric_limits<int32_t>::max()};
    int end = kBuckets;
    if (has_top_k) {
      int64_t above = 0;
      int bucket = 0;
      while (bucket < kBuckets && above + counts[bucket] < limits_.top_k) above += counts[bucket++];
      if (bucket < kBuckets) {
        gather(bucket, last);
        const auto kth = candidates_.begin() + (limits_.top_k - above - 1);
        std::nth_element(candidates_.begin(), kth, candidates_.end(), is_before);
        last = *kth;
        candidates_.erase(kth + 1, candidates_.end());
        masses[bucket] = mass_of_candidates();
        end = bucket + 1;
      }
    }
    if (limits_.top_p < 1) {
      double wanted = 0;
      for (int bucket = 0; bucket < end; ++bucket) wanted += masses[bucket];
      wanted *= limits_.top_p;
      int bucket = 0;
      while (bucket + 1 < end && masses[bucket] < wanted) wanted -= masses[bucket++];
      gather(bucket, last);
      if (candidates_.empty()) return last;
      keep_mass(wanted);
      last = *std::max_element(candidates_.begin(), candidates_.end(), is_before);
    }
    return last;
  }

  // The tokens of a bucket at or above the floor and not behind the last one.
  void gather(int bucket, const Candidate& last) {
    candidates_.clear();
    // A little lower than the edge, as rounding may move it.
    const float bottom = bucket == kBuckets - 1 ? floor_ : best_.value - (bucket + 1.01f) * (kReach / kBuckets);
    for_each_block(std::max(floor_, bottom), [&](int64_t first, int64_t count) {
      for (int64_t j = 0; j < count; ++j) {
        const Candidate found{values_[j], static_cast<int32_t>(first + j)};
        if (found.value >= floor_ && bucket_of(found.value) == bucket && !is_before(last, found))
          candidates_.push_back(found);
      }
    });
  }

  double mass_of_candidates() const {
    double sum = 0;
    for (const Candidate& candidate : candidates_) sum += mass(candidate);
    return sum;
  }

  double mass(const Candidate& candidate) const { return std::exp(candidate.value - best_.value); }

  // The least set of candidates, best first, whose mass reaches wanted; one at least.
  void keep_mass(double wanted) {
    size_t begin = 0, end = candidates_.size();
    while (end - begin > 1) {
      const size_t middle = begin + (end - begin) / 2;
      const auto at = candidates_.begin();
      std::nth_element(at + begin, at + middle, at + end, is_before);
      double upper = 0;
      for (size_t i = begin; i < middle; ++i) upper += mass(candidates_[i]);
      if (upper >= wanted) {
        end = middle;
      } else {
        wanted -= upper;
        begin = middle;
      }
    }
    candidates_.resize(std::max<size_t>(end, 1));
  }

  int64_t draw_from_candidates() const {
    Candidate best{-kInfinity, best_.token};
    for (const Candidate& candidate : candidates_) {
      const float score = candidate.value + gumbel_of(candidate.token);
      if (is_before({score, candidate.token}, best)) best = {score, candidate.token};
    }
    return best.token;
  }

  float gumbel_of(int64_t token) const {
    uint32_t words[4][16];
    random_.fill(static_cast<uint32_t>(token / kBlock * 16), words);
    const uint32_t bits = words[token % kBlock / 16][token % 16];
    std::array<uint32_t, kLanes> same;
    same.fill(bits);
    alignas(64) float values[kLanes];
    gumbel(same.data()).store(values);
    return values[0];
  }

  // Among all tokens at or above the floor and not behind the cut.
  int64_t draw_from_row() {
    Candidate best{-kInfinity, best_.token};
    float known = best_.value + kLeastGumbel;  // a score that some token has
    uint32_t words[4][16];
    alignas(64) float scores[kBlock];
    const float bottom = std::max(floor_, cut_.value);
    for_each_block(bottom, [&](int64_t first, int64_t count) {
      if (highest_ + kMostGumbel < known) return;
      random_.fill(static_cast<uint32_t>(first / kBlock * 16), words);
      Lanes most(-kInfinity);
      for (int64_t j = 0; j < kBlock; j += kLanes) {
        const Lanes value = Lanes::loadu(values_ + j), score = value + gumbel(&words[j / 16][j % 16]);
        const Lanes kept = Lanes::blendv(Lanes(-kInfinity), score, value >= Lanes(bottom));
        kept.store(scores + j);
        most = at::vec::maximum(most, kept);
      }
      if (!(highest_of(most) >= best.value)) return;
      for (int64_t j = 0; j < count; ++j) {
        const Candidate found{scores[j], static_cast<int32_t>(first + j)};
        const bool is_kept = values_[j] > cut_.value || (values_[j] == cut_.value && found.token <= cut_.token);
        if (is_kept && is_before(found, best)) best = found;
      }
      known = std::max(known, best.value);
    });
    return best.token;
  }

  const Stored* logits_;
  const int64_t vocab_, whole_;
  const Limits limits_;
  const Philox random_;
  Candidate best_{};
  Candidate cut_{-kInfinity, std::numeric_limits<int32_t>::max()};  // the last token that top_k and top_p keep
  float floor_ = -kInfinity;                                         // the least logit that min_p keeps
  alignas(64) float values_[kBlock];                                // of the block at hand, scaled
  float highest_ = 0;                                               // among them
  std::vector<Candidate> candidates_;
};

// A token of each of the rows [n] of logits [all rows, vocab]. limits [n, 3] are the inverse of the temperature, min_p
// and top_p; keys [n, 3] are a seed, the position in its sequence of draws, and top_k.
at::Tensor draw_tokens(const at::Tensor& logits, const at::Tensor& rows, const at::Tensor& limits, const at::Tensor& keys) {
  const int64_t count = rows.size(0), vocab = logits.size(1);
  TORCH_CHECK(logits.is_contiguous() && limits.is_contiguous() && keys.is_contiguous() && rows.is_contiguous());
  at::Tensor tokens = at::empty({count}, rows.options());
  const int64_t *chosen = rows.const_data_ptr<int64_t>(), *key = keys.const_data_ptr<int64_t>();
  const float* limit = limits.const_data_ptr<float>();
  int64_t* drawn = tokens.mutable_data_ptr<int64_t>();
  dispatch(logits.scalar_type(), [&](auto stored) {
    using Stored = decltype(stored);
    const Stored* numbers = logits.const_data_ptr<Stored>();
    share_out(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Limits own{limit[3 * i], limit[3 * i + 1], limit[3 * i + 2], key[3 * i + 2]};
        drawn[i] = Row<Stored>(numbers + chosen[i] * vocab, vocab, own, Philox(key[3 * i], key[3 * i + 1])).draw();
      }
    });
  });
  return tokens;
}

// Sets the numbers in the rows [n] of logits [all rows, vocab] whose bit in masks [n, words] is 0 to minus infinity.
void forbid_masked(at::Tensor logits, const at::Tensor& rows, const at::Tensor& masks) {
  const int64_t count = rows.size(0), vocab = logits.size(1), words = masks.size(1);
  TORCH_CHECK(logits.is_contiguous() && rows.is_contiguous() && masks.is_contiguous());
  TORCH_CHECK(masks.size(0) == count && words * 32 >= vocab);
  const int64_t* guided = rows.const_data_ptr<int64_t>();
  dispatch(logits.scalar_type(), [&](auto stored) {
    using Stored = decltype(stored);
    share_out(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        Stored* own = logits.mutable_data_ptr<Stored>() + guided[i] * vocab;
        const int32_t* mask = masks.const_data_ptr<int32_t>() + i * words;
        for (int64_t word = 0; word < words; ++word) {
          if (mask[word] == -1) continue;
          for (int64_t token = word * 32; token < std::min(vocab, word * 32 + 32); ++token)
            if (!(static_cast<uint32_t>(mask[word]) >> (token % 32) & 1)) own[token] = static_cast<Stored>(-kInfinity);
        }
      }
    });
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(nanovllm, library) {
  library.def("draw_tokens(Tensor logits, Tensor rows, Tensor limits, Tensor keys) -> Tensor");
  library.def("forbid_masked(Tensor(a!) logits, Tensor rows, Tensor masks) -> ()");
}
TORCH_LIBRARY_IMPL(nanovllm, CPU, library) {
  library.impl("draw_tokens", draw_tokens);
  library.impl("forbid_masked", forbid_masked);
}
