// Attention that reads keys and values where they lie: in the pages of the KV cache.
//
// A work item is a tile of a row's query tokens with the query heads that share one key head. It walks the row's pages in
// logical order, sixteen positions at a time, with a running softmax (Milakov and Gimelshein, arXiv 1805.02867). What a
// query adds up, and in which order, depends on its own position alone: not on the tile, the row's other tokens, or
// the other rows. So the result is the same to the bit in any batch and for any chunking of a prompt.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

#include "lanes.h"

namespace {

constexpr int64_t kStride = 16;  // positions between two updates of the softmax
constexpr int64_t kQueries = 32;  // query vectors of a tile, unless a single token has more heads than that
constexpr float kNever = -std::numeric_limits<float>::infinity();

struct Tile {
  int64_t row, first_token, num_tokens, first_position;
};

// The exponential of the weights, for one number.
float exponential(float x) {
  float lanes[kLanes];
  Lanes(x).exp_u20().store(lanes);
  return lanes[0];
}

// scores[q][j] = queries[q] . keys[j]; every product sums in one order, however many are computed side by side.
template <int64_t Q>
void multiply(const float* queries, const float* keys, int64_t num_keys, int64_t d, float* scores) {
  for (int64_t j = 0; j < num_keys; ++j) {
    Lanes sums[Q];
    for (int64_t q = 0; q < Q; ++q) sums[q] = Lanes(0.0f);
    for (int64_t i = 0; i < d; i += kLanes) {
      const Lanes key = Lanes::loadu(keys + j * d + i);
      for (int64_t q = 0; q < Q; ++q) sums[q] = at::vec::fmadd(Lanes::loadu(queries + q * d + i), key, sums[q]);
    }
    for (int64_t q = 0; q < Q; ++q)
      scores[q * kStride + j] = sum_of(sums[q]);
  }
}

// outputs[q] = outputs[q] * scales[q] + sum over j of weights[q][j] * values[j]
template <int64_t Q>
void accumulate(const float* weights, const float* scales, const float* values, int64_t num_values, int64_t d, float* outputs) {
  for (int64_t i = 0; i < d; i += kLanes) {
    Lanes sums[Q];
    for (int64_t q = 0; q < Q; ++q) sums[q] = Lanes::loadu(outputs + q * d + i) * Lanes(scales[q]);
    for (int64_t j = 0; j < num_values; ++j) {
      const Lanes value = Lanes::loadu(values + j * d + i);
      for (int64_t q = 0; q < Q; ++q) sums[q] = at::vec::fmadd(Lanes(weights[q * kStride + j]), value, sums[q]);
    }
    for (int64_t q = 0; q < Q; ++q) sums[q].store(outputs + q * d + i);
  }
}

template <typename Computed, typename Stored>
class Attention {
 public:
  Attention(const at::Tensor& query, const at::Tensor& cache, const at::Tensor& tables, double scale, at::Tensor& output)
      : query_(query.const_data_ptr<Computed>()),
        cache_(cache.const_data_ptr<Stored>()),
        tables_(tables.const_data_ptr<int32_t>()),
        output_(output.mutable_data_ptr<Computed>()),
        width_(tables.size(1)),
        heads_(query.size(1)),
        head_(query.size(2)),
        d_(cache.size(4)),
        query_stride_(query.stride(0)),
        kv_heads_(cache.size(2)),
        block_size_(cache.size(3)),
        group_(heads_ / kv_heads_),
        scale_(static_cast<float>(scale)) {}

  void run(const std::vector<Tile>& tiles) const {
    const int64_t items = static_cast<int64_t>(tiles.size()) * kv_heads_;
    std::atomic<int64_t> next{0};  // tiles differ in length: whoever is free takes the next
    at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
      Workspace work(*this, tiles);
      for (int64_t item = next++; item < items; item = next++) attend(tiles[item / kv_heads_], item % kv_heads_, work);
    });
  }

 private:
  struct Workspace {
    Workspace(const Attention& parent, const std::vector<Tile>& tiles) {
      int64_t tokens = 1;
      for (const Tile& tile : tiles) tokens = std::max(tokens, tile.num_tokens);
      const int64_t rows = tokens * parent.group_;
      queries.resize(rows * parent.d_);
      outputs.resize(rows * parent.d_);
      scores.resize(rows * kStride);
      highest.resize(rows);
      sums.resize(rows);
      scales.resize(rows);
      page.resize(kStride * parent.d_);
    }
    std::vector<float> queries, outputs, scores, highest, sums, scales, page;
  };

  void attend(const Tile& tile, int64_t kv_head, Workspace& work) const {
    const int64_t rows = tile.num_tokens * group_;
    for (int64_t row = 0; row < rows; ++row) {
      const Computed* source = query_ + (tile.first_token + row / group_) * query_stride_ + (kv_head * group_ + row % group_) * head_;
      float* target = work.queries.data() + row * d_;
      load(source, head_, target);
      for (int64_t i = 0; i < head_; ++i) target[i] *= scale_;
      std::fill(target + head_, target + d_, 0.0f);
    }
    std::fill_n(work.outputs.data(), rows * d_, 0.0f);
    std::fill_n(work.highest.data(), rows, kNever);
    std::fill_n(work.sums.data(), rows, 0.0f);

    const int64_t context = tile.first_position + tile.num_tokens;
    for (int64_t block = 0; block * block_size_ < context; ++block) {
      const int64_t page = tables_[tile.row * width_ + block];
      const Stored* keys = cache_ + (page * 2 * kv_heads_ + kv_head) * block_size_ * d_;
      const Stored* values = keys + kv_heads_ * block_size_ * d_;
      const int64_t filled = std::min(block_size_, context - block * block_size_);
      for (int64_t start = 0; start < filled; start += kStride) {
        const int64_t count = std::min(kStride, filled - start);
        update(tile, rows, block * block_size_ + start, count, keys + start * d_, values + start * d_, work);
      }
    }

    for (int64_t row = 0; row < rows; ++row) {
      float* source = work.outputs.data() + row * d_;
      const float inverse = 1.0f / work.sums[row];
      for (int64_t i = 0; i < head_; ++i) source[i] *= inverse;
      Computed* target = output_ + ((tile.first_token + row / group_) * heads_ + kv_head * group_ + row % group_) * head_;
      store(source, head_, target);
    }
  }

  void update(const Tile& tile, int64_t rows, int64_t position, int64_t count, const Stored* keys, const Stored* values, Workspace& work) const {
    float* scores = work.scores.data();
    const float* page = as_float(keys, count * d_, work.page.data());
    over(rows, [&](auto width, int64_t row) {
      multiply<width>(work.queries.data() + row * d_, page, count, d_, scores + row * kStride);
    });
    for (int64_t row = 0; row < rows; ++row) {
      float* own = scores + row * kStride;
      const int64_t seen = std::min(count, tile.first_position + row / group_ - position + 1);
      for (int64_t j = std::max<int64_t>(seen, 0); j < kStride; ++j) own[j] = kNever;
      float highest = work.highest[row];
      for (int64_t j = 0; j < seen; ++j) highest = std::max(highest, own[j]);
      Lanes sum(0.0f);
      for (int64_t j = 0; j < kStride; j += kLanes) {
        const Lanes weight = (Lanes::loadu(own + j) - Lanes(highest)).exp_u20();
        weight.store(own + j);
        sum = sum + weight;
      }
      const float scale = exponential(work.highest[row] - highest);
      work.scales[row] = scale;
      work.highest[row] = highest;
      work.sums[row] = work.sums[row] * scale + sum_of(sum);
    }
    page = as_float(values, count * d_, work.page.data());
    over(rows, [&](auto width, int64_t row) {
      accumulate<width>(scores + row * kStride, work.scales.data() + row, page, count, d_, work.outputs.data() + row * d_);
    });
  }

  // Four rows at a time share what is loaded, then two, then one.
  template <typename Step>
  static void over(int64_t rows, const Step& step) {
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4) step(std::integral_constant<int64_t, 4>{}, row);
    for (; row + 2 <= rows; row += 2) step(std::integral_constant<int64_t, 2>{}, row);
    for (; row < rows; ++row) step(std::integral_constant<int64_t, 1>{}, row);
  }

  const Computed* query_;
  const Stored* cache_;
  const int32_t* tables_;
  Computed* output_;
  int64_t width_, heads_, head_, d_, query_stride_, kv_heads_, block_size_, group_;
  float scale_;
};

// Write key and value [T, kv_heads, head] to their slots of cache [blocks, 2, kv_heads, block_size, d]. Heads are padded
// with zeros to whole vectors of floats, which change neither products nor outputs.
template <typename Computed, typename Stored>
void write(const at::Tensor& key, const at::Tensor& value, at::Tensor& cache, const at::Tensor& slots) {
  const int64_t heads = cache.size(2), block_size = cache.size(3), d = cache.size(4), head_size = key.size(2);
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  Stored* pages = cache.mutable_data_ptr<Stored>();
  const at::Tensor* sources[] = {&key, &value};
  at::parallel_for(0, slots.numel(), 32, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(head_size);
    for (int64_t token = begin; token < end; ++token) {
      const int64_t block = slot[token] / block_size, offset = slot[token] % block_size;
      for (int64_t which = 0; which < 2; ++which) {
        const Computed* source = sources[which]->const_data_ptr<Computed>() + token * sources[which]->stride(0);
        for (int64_t head = 0; head < heads; ++head) {
          Stored* target = pages + (((block * 2 + which) * heads + head) * block_size + offset) * d;
          if constexpr (std::is_same_v<Computed, Stored>)
            std::copy_n(source + head * head_size, head_size, target);
          else
            store(as_float(source + head * head_size, head_size, scratch.data()), head_size, target);
        }
      }
    }
  });
}

// starts [rows + 1]: the first token of each row; contexts [rows]: positions with the row's own tokens; tables [rows, width].
at::Tensor paged_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, at::Tensor cache,
                           const at::Tensor& slots, const at::Tensor& starts, const at::Tensor& contexts,
                           const at::Tensor& tables, double scale) {
  for (const at::Tensor* part : {&query, &key, &value}) {
    TORCH_CHECK(part->dim() == 3 && part->stride(2) == 1 && part->stride(1) == part->size(2), "heads must lie together");
    TORCH_CHECK(part->scalar_type() == query.scalar_type(), "queries, keys and values must have one type");
  }
  TORCH_CHECK(cache.is_contiguous() && cache.size(4) % 16 == 0 && query.size(2) <= cache.size(4), "heads do not fit the pages");
  at::Tensor output = at::empty(query.sizes(), query.options());
  std::vector<Tile> tiles;
  const int64_t tile_tokens = std::max<int64_t>(1, kQueries * cache.size(2) / query.size(1));
  const int64_t* start = starts.const_data_ptr<int64_t>();
  const int64_t* context = contexts.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < contexts.numel(); ++row)
    for (int64_t token = start[row]; token < start[row + 1]; token += tile_tokens)
      tiles.push_back({row, token, std::min(tile_tokens, start[row + 1] - token), context[row] - (start[row + 1] - token)});
  const auto run = [&](auto computed, auto stored) {
    write<decltype(computed), decltype(stored)>(key, value, cache, slots);
    Attention<decltype(computed), decltype(stored)>(query, cache, tables, scale, output).run(tiles);
  };
  const auto computed = query.scalar_type(), stored = cache.scalar_type();
  if (computed == at::kFloat && stored == at::kFloat)
    run(float{}, float{});
  else if (computed == at::kFloat && stored == at::kBFloat16)
    run(float{}, at::BFloat16{});
  else if (computed == at::kBFloat16 && stored == at::kBFloat16)
    run(at::BFloat16{}, at::BFloat16{});
  else if (computed == at::kHalf && stored == at::kHalf)
    run(at::Half{}, at::Half{});
  else
    TORCH_CHECK(false, "no attention in ", computed, " over a cache of ", stored);
  return output;
}

}  // namespace

TORCH_LIBRARY(nanovllm, library) {
  library.def(
      "paged_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) cache, Tensor slots, Tensor starts, "
      "Tensor contexts, Tensor tables, float scale) -> Tensor");
}
TORCH_LIBRARY_IMPL(nanovllm, CPU, library) { library.impl("paged_attention", paged_attention); }
