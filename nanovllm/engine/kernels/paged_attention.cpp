// Attention that reads keys and values where they lie: in the pages of the KV cache.
//
// A page holds, for each key head, its keys in tiles of sixteen positions, each tile [d, 16], and its values [positions, d].
// So the products of a query with sixteen keys are one vector, and nothing is ever summed across a vector.
//
// A work item is a tile of a row's query tokens with the query heads that share one key head. It walks the row's pages in
// logical order, four tiles of keys at a time, with a running softmax (Milakov and Gimelshein, arXiv 1805.02867). What a
// query adds up, and in which order, depends on its own position alone: not on the work item, the row's other tokens, or
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

constexpr int64_t kTile = 16;  // positions of a tile of keys
constexpr int64_t kTiles = 4;  // tiles between two updates of the softmax
constexpr int64_t kStride = kTile * kTiles;
constexpr int64_t kQueries = 32;  // query vectors of a work item, unless a single token has more heads than that
constexpr int64_t kRegisters = kLanes == 16 ? 16 : 8;  // sums that stay in registers
constexpr int64_t kCacheLine = 64;  // bytes
constexpr float kNever = -std::numeric_limits<float>::infinity();

struct Item {
  int64_t row, first_token, num_tokens, first_position;
};

// Keys and values of neighbouring positions, at most a tile of them.
template <typename Stored>
struct Piece {
  const Stored *keys, *values;
  int64_t position, count;
};

// The exponential of the weights, for one number.
float exponential(float x) {
  float lanes[kLanes];
  Lanes(x).exp_u20().store(lanes);
  return lanes[0];
}

// scores[q][tile] = queries[q] . each key of the tiles, summed in the order of the dimensions.
template <int64_t Q, int64_t T, typename Stored>
void multiply(const float* queries, const Piece<Stored>* pieces, int64_t d, float* scores) {
  constexpr int64_t parts = kTile / kLanes;
  Lanes sums[Q][T * parts];
  for (int64_t q = 0; q < Q; ++q)
    for (int64_t t = 0; t < T * parts; ++t) sums[q][t] = Lanes(0.0f);
  for (int64_t i = 0; i < d; ++i) {
    Lanes keys[T * parts];
    for (int64_t t = 0; t < T * parts; ++t) keys[t] = load_lanes(pieces[t / parts].keys + i * kTile + t % parts * kLanes);
    for (int64_t q = 0; q < Q; ++q) {
      const Lanes query(queries[q * d + i]);
      for (int64_t t = 0; t < T * parts; ++t) sums[q][t] = at::vec::fmadd(query, keys[t], sums[q][t]);
    }
  }
  for (int64_t q = 0; q < Q; ++q)
    for (int64_t t = 0; t < T * parts; ++t) sums[q][t].store(scores + q * kStride + t * kLanes);
}

// outputs[q] = outputs[q] * scales[q] + sum over positions j of weights[q][j] * values[j], V vectors of every row at a time.
template <int64_t Q, int64_t V, typename Stored>
void accumulate(const float* weights, const float* scales, const Piece<Stored>* pieces, int64_t num_pieces, int64_t d,
                int64_t start, float* outputs) {
  Lanes sums[Q][V];
  for (int64_t q = 0; q < Q; ++q)
    for (int64_t v = 0; v < V; ++v) sums[q][v] = Lanes::loadu(outputs + q * d + start + v * kLanes) * Lanes(scales[q]);
  for (int64_t piece = 0; piece < num_pieces; ++piece) {
    for (int64_t j = 0; j < pieces[piece].count; ++j) {
      Lanes values[V];
      for (int64_t v = 0; v < V; ++v) values[v] = load_lanes(pieces[piece].values + j * d + start + v * kLanes);
      for (int64_t q = 0; q < Q; ++q) {
        const Lanes weight(weights[q * kStride + piece * kTile + j]);
        for (int64_t v = 0; v < V; ++v) sums[q][v] = at::vec::fmadd(weight, values[v], sums[q][v]);
      }
    }
  }
  for (int64_t q = 0; q < Q; ++q)
    for (int64_t v = 0; v < V; ++v) sums[q][v].store(outputs + q * d + start + v * kLanes);
}

template <typename Computed, typename Stored>
class Attention {
 public:
  Attention(const at::Tensor& query, const at::Tensor& cache, const at::Tensor& tables, int64_t block_size, double scale,
            at::Tensor& output)
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
        page_size_(cache.size(3)),
        block_size_(block_size),
        group_(heads_ / kv_heads_),
        scale_(static_cast<float>(scale)) {}

  void run(const std::vector<Item>& items) const {
    const int64_t total = static_cast<int64_t>(items.size()) * kv_heads_;
    std::atomic<int64_t> next{0};  // items differ in length: whoever is free takes the next
    at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
      Workspace work(*this, items);
      for (int64_t item = next++; item < total;) {
        const int64_t following = next++;
        if (following < total) {
          Piece<Stored> pieces[kTiles];
          int64_t position = 0;
          const int64_t count = collect(items[following / kv_heads_], following % kv_heads_, position, pieces);
          fetch(pieces, count, true);
        }
        attend(items[item / kv_heads_], item % kv_heads_, work);
        item = following;
      }
    });
  }

 private:
  struct Workspace {
    Workspace(const Attention& parent, const std::vector<Item>& items) {
      int64_t tokens = 1;
      for (const Item& item : items) tokens = std::max(tokens, item.num_tokens);
      const int64_t rows = tokens * parent.group_;
      queries.resize(rows * parent.d_);
      outputs.resize(rows * parent.d_);
      scores.resize(rows * kStride);
      highest.resize(rows);
      sums.resize(rows);
      scales.resize(rows);
    }
    std::vector<float> queries, outputs, scores, highest, sums, scales;
  };

  void attend(const Item& item, int64_t kv_head, Workspace& work) const {
    const int64_t rows = item.num_tokens * group_;
    for (int64_t row = 0; row < rows; ++row) {
      const Computed* source = query_ + (item.first_token + row / group_) * query_stride_ + (kv_head * group_ + row % group_) * head_;
      float* target = work.queries.data() + row * d_;
      load(source, head_, target);
      for (int64_t i = 0; i < head_; ++i) target[i] *= scale_;
      std::fill(target + head_, target + d_, 0.0f);
    }
    std::fill_n(work.outputs.data(), rows * d_, 0.0f);
    std::fill_n(work.highest.data(), rows, kNever);
    std::fill_n(work.sums.data(), rows, 0.0f);

    Piece<Stored> pieces[2][kTiles];
    int64_t position = 0;
    int64_t num_pieces = collect(item, kv_head, position, pieces[0]);
    for (int64_t which = 0; num_pieces > 0; which = 1 - which) {
      const int64_t num_following = collect(item, kv_head, position, pieces[1 - which]);
      fetch(pieces[which], num_pieces, false);
      fetch(pieces[1 - which], num_following, true);
      update(item, rows, pieces[which], num_pieces, work);
      num_pieces = num_following;
    }

    for (int64_t row = 0; row < rows; ++row) {
      float* source = work.outputs.data() + row * d_;
      const float inverse = 1.0f / work.sums[row];
      for (int64_t i = 0; i < head_; ++i) source[i] *= inverse;
      Computed* target = output_ + ((item.first_token + row / group_) * heads_ + kv_head * group_ + row % group_) * head_;
      store(source, head_, target);
    }
  }

  // The next pieces of the item's context from `position` on, which moves behind them; returns how many there are.
  int64_t collect(const Item& item, int64_t kv_head, int64_t& position, Piece<Stored>* pieces) const {
    const int64_t context = item.first_position + item.num_tokens;
    int64_t num_pieces = 0;
    while (num_pieces < kTiles && position < context) {
      const int64_t block = position / block_size_, offset = position % block_size_;
      const int64_t page = tables_[item.row * width_ + block];
      const Stored* keys = cache_ + (page * 2 * kv_heads_ + kv_head) * page_size_ * d_ + offset * d_;
      const int64_t count = std::min({kTile, block_size_ - offset, context - position});
      pieces[num_pieces++] = {keys, keys + kv_heads_ * page_size_ * d_, position, count};
      position += count;
    }
    return num_pieces;
  }

  // What is needed soon sets out while something else is computed: every piece lies in another page, at which the CPU's
  // own prefetching begins anew.
  void fetch(const Piece<Stored>* pieces, int64_t num_pieces, bool keys) const {
    for (int64_t piece = 0; piece < num_pieces; ++piece) {
      const Stored* first = keys ? pieces[piece].keys : pieces[piece].values;
      const int64_t size = (keys ? kTile : pieces[piece].count) * d_;
      for (int64_t i = 0; i < size; i += kCacheLine / sizeof(Stored)) __builtin_prefetch(first + i, 0, 2);
    }
  }

  void update(const Item& item, int64_t rows, const Piece<Stored>* pieces, int64_t num_pieces, Workspace& work) const {
    float* scores = work.scores.data();
    in_groups(rows, [&](auto width, int64_t row) {
      const auto score = [&](auto tiles, int64_t piece) {
        multiply<width, tiles>(work.queries.data() + row * d_, pieces + piece, d_, scores + row * kStride + piece * kTile);
      };
      if constexpr (kLanes < kTile) {
        for (int64_t piece = 0; piece < num_pieces; ++piece) score(std::integral_constant<int64_t, 1>{}, piece);
      } else {
        if (num_pieces == 4) score(std::integral_constant<int64_t, 4>{}, 0);
        if (num_pieces == 3) score(std::integral_constant<int64_t, 3>{}, 0);
        if (num_pieces == 2) score(std::integral_constant<int64_t, 2>{}, 0);
        if (num_pieces == 1) score(std::integral_constant<int64_t, 1>{}, 0);
      }
    });
    for (int64_t row = 0; row < rows; ++row) soften(item.first_position + row / group_, row, pieces, num_pieces, work);
    in_groups(rows, [&](auto width, int64_t row) {
      constexpr int64_t at_once = kRegisters / (width <= 2 ? 2 : 4);
      const auto add = [&](auto vectors, int64_t start) {
        accumulate<width, vectors>(scores + row * kStride, work.scales.data() + row, pieces, num_pieces, d_, start,
                                   work.outputs.data() + row * d_);
      };
      int64_t i = 0;
      for (; i + at_once * kLanes <= d_; i += at_once * kLanes) add(std::integral_constant<int64_t, at_once>{}, i);
      for (; i < d_; i += kLanes) add(std::integral_constant<int64_t, 1>{}, i);
    });
  }

  // Scores to weights, in place, of a query at `position`, which sees what comes up to it.
  void soften(int64_t position, int64_t row, const Piece<Stored>* pieces, int64_t num_pieces, Workspace& work) const {
    float* own = work.scores.data() + row * kStride;
    for (int64_t piece = 0; piece < num_pieces; ++piece) {
      const int64_t seen = std::clamp<int64_t>(position + 1 - pieces[piece].position, 0, pieces[piece].count);
      std::fill(own + piece * kTile + seen, own + (piece + 1) * kTile, kNever);
    }
    Lanes most(work.highest[row]);
    for (int64_t j = 0; j < num_pieces * kTile; j += kLanes) most = at::vec::maximum(most, Lanes::loadu(own + j));
    const float highest = highest_of(most);
    Lanes sum(0.0f);
    for (int64_t j = 0; j < num_pieces * kTile; j += kLanes) {
      const Lanes weight = (Lanes::loadu(own + j) - Lanes(highest)).exp_u20();
      weight.store(own + j);
      sum = sum + weight;
    }
    const float scale = exponential(work.highest[row] - highest);
    work.scales[row] = scale;
    work.highest[row] = highest;
    work.sums[row] = work.sums[row] * scale + sum_of(sum);
  }

  // Up to four rows at a time share what is loaded.
  template <typename Step>
  static void in_groups(int64_t rows, const Step& step) {
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4) step(std::integral_constant<int64_t, 4>{}, row);
    if (rows - row == 3) step(std::integral_constant<int64_t, 3>{}, row);
    if (rows - row == 2) step(std::integral_constant<int64_t, 2>{}, row);
    if (rows - row == 1) step(std::integral_constant<int64_t, 1>{}, row);
  }

  const Computed* query_;
  const Stored* cache_;
  const int32_t* tables_;
  Computed* output_;
  int64_t width_, heads_, head_, d_, query_stride_, kv_heads_, page_size_, block_size_, group_;
  float scale_;
};

// Write key and value [T, kv_heads, head] to their slots of cache [blocks, 2, kv_heads, page_size, d]. Heads are padded
// with zeros to whole vectors of floats, which change neither products nor outputs.
template <typename Computed, typename Stored>
void write(const at::Tensor& key, const at::Tensor& value, at::Tensor& cache, int64_t block_size, const at::Tensor& slots) {
  const int64_t heads = cache.size(2), page_size = cache.size(3), d = cache.size(4), head_size = key.size(2);
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  Stored* pages = cache.mutable_data_ptr<Stored>();
  at::parallel_for(0, slots.numel(), 32, [&](int64_t begin, int64_t end) {
    std::vector<Stored> scratch(head_size);
    for (int64_t token = begin; token < end; ++token) {
      const int64_t block = slot[token] / block_size, offset = slot[token] % block_size;
      const Computed* keys = key.const_data_ptr<Computed>() + token * key.stride(0);
      const Computed* values = value.const_data_ptr<Computed>() + token * value.stride(0);
      for (int64_t head = 0; head < heads; ++head) {
        Stored* page = pages + (block * 2 * heads + head) * page_size * d;
        convert(keys + head * head_size, head_size, scratch.data());
        Stored* column = page + offset / kTile * kTile * d + offset % kTile;
        for (int64_t i = 0; i < head_size; ++i) column[i * kTile] = scratch[i];
        convert(values + head * head_size, head_size, page + heads * page_size * d + offset * d);
      }
    }
  });
}

// starts [rows + 1]: the first token of each row; contexts [rows]: positions with the row's own tokens; tables [rows, width].
at::Tensor paged_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, at::Tensor cache,
                           int64_t block_size, const at::Tensor& slots, const at::Tensor& starts, const at::Tensor& contexts,
                           const at::Tensor& tables, double scale) {
  for (const at::Tensor* part : {&query, &key, &value}) {
    TORCH_CHECK(part->dim() == 3 && part->stride(2) == 1 && part->stride(1) == part->size(2), "heads must lie together");
    TORCH_CHECK(part->scalar_type() == query.scalar_type(), "queries, keys and values must have one type");
  }
  TORCH_CHECK(cache.is_contiguous() && cache.size(4) % 16 == 0 && query.size(2) <= cache.size(4), "heads do not fit the pages");
  TORCH_CHECK(cache.size(3) % kTile == 0 && block_size <= cache.size(3), "a page must hold its block in whole tiles");
  at::Tensor output = at::empty(query.sizes(), query.options());
  std::vector<Item> items;
  const int64_t item_tokens = std::max<int64_t>(1, kQueries * cache.size(2) / query.size(1));
  const int64_t* start = starts.const_data_ptr<int64_t>();
  const int64_t* context = contexts.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < contexts.numel(); ++row)
    for (int64_t token = start[row]; token < start[row + 1]; token += item_tokens)
      items.push_back({row, token, std::min(item_tokens, start[row + 1] - token), context[row] - (start[row + 1] - token)});
  const auto run = [&](auto computed, auto stored) {
    write<decltype(computed), decltype(stored)>(key, value, cache, block_size, slots);
    Attention<decltype(computed), decltype(stored)>(query, cache, tables, block_size, scale, output).run(items);
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
      "paged_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) cache, int block_size, Tensor slots, "
      "Tensor starts, Tensor contexts, Tensor tables, float scale) -> Tensor");
}
TORCH_LIBRARY_IMPL(nanovllm, CPU, library) { library.impl("paged_attention", paged_attention); }
