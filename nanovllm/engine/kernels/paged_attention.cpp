// Attention that reads keys and values where they lie: in the pages of the KV cache.
//
// Keys lie in tiles of sixteen positions, so the products of a query with sixteen keys are one vector, and nothing is ever
// summed across a vector.
//
// A work item is a tile of a row's query tokens with the query heads that share one key head. It walks the row's pages in
// logical order, four tiles of keys at a time, with a running softmax (Milakov and Gimelshein, arXiv 1805.02867). What a
// query adds up, and in which order, depends on its own position alone: not on the work item, the row's other tokens, or
// the other rows. So the result is the same to the bit in any batch and for any chunking of a prompt.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <optional>
#include <vector>

#include "attention_pages.h"
#include "attention_tiles.h"
#include "parallel.h"

namespace {

constexpr int64_t kQueries = 32;  // query vectors of a work item, unless a single token has more heads than that
constexpr int64_t kTileQueries = 128;  // of an item of TileAttention: so many share what pairing a stride costs
constexpr int64_t kRegisters = kLanes == 16 ? 16 : 8;  // sums that stay in registers

// The exponential of the weights, for one number.
float exponential(float x) {
  float lanes[kLanes];
  Lanes(x).exp_u20().store(lanes);
  return lanes[0];
}

// scores[q][tile] = queries[q] . each key of the tiles, summed in the order of the dimensions. Fetches as much of `ahead`.
template <int64_t Q, int64_t T, typename Stored>
void multiply(const float* queries, const Piece<Stored>* pieces, const Stored* const* ahead, int64_t d, float* scores) {
  constexpr int64_t parts = kTile / kLanes;
  Register sums[Q][T * parts];
  UNROLLED for (int64_t q = 0; q < Q; ++q)
    UNROLLED for (int64_t t = 0; t < T * parts; ++t) sums[q][t] = Lanes(0.0f);
  for (int64_t i = 0; i < d; ++i) {
    Register keys[T * parts];
    UNROLLED for (int64_t t = 0; t < T * parts; ++t) keys[t] = load_lanes(pieces[t / parts].keys + i * kTile + t % parts * kLanes);
    UNROLLED for (int64_t t = 0; t < T; ++t) fetch<kTile>(ahead[t] + i * kTile);
    UNROLLED for (int64_t q = 0; q < Q; ++q) {
      const Lanes query(queries[q * d + i]);
      UNROLLED for (int64_t t = 0; t < T * parts; ++t) sums[q][t] = at::vec::fmadd(query, Lanes(keys[t]), Lanes(sums[q][t]));
    }
  }
  UNROLLED for (int64_t q = 0; q < Q; ++q)
    UNROLLED for (int64_t t = 0; t < T * parts; ++t) Lanes(sums[q][t]).store(scores + q * kStride + t * kLanes);
}

// outputs[q] = outputs[q] * scales[q] + sum over positions j of weights[q][j] * values[j], V vectors of every row at a time.
// Fetches as much of `ahead`.
template <int64_t Q, int64_t V, typename Stored>
void accumulate(const float* weights, const float* scales, const Stride<Stored>& stride, const Stored* const* ahead, int64_t d,
                int64_t start, float* outputs) {
  Register sums[Q][V];
  UNROLLED for (int64_t q = 0; q < Q; ++q)
    UNROLLED for (int64_t v = 0; v < V; ++v) sums[q][v] = Lanes::loadu(outputs + q * d + start + v * kLanes) * Lanes(scales[q]);
  for (int64_t piece = 0; piece < stride.count; ++piece) {
    for (int64_t j = 0; j < stride.pieces[piece].count; ++j) {
      const int64_t first = j * d + start;
      Register values[V];
      UNROLLED for (int64_t v = 0; v < V; ++v) values[v] = load_lanes(stride.pieces[piece].values + first + v * kLanes);
      fetch<V * kLanes>(ahead[piece] + first);
      UNROLLED for (int64_t q = 0; q < Q; ++q) {
        const Lanes weight(weights[q * kStride + piece * kTile + j]);
        UNROLLED for (int64_t v = 0; v < V; ++v) sums[q][v] = at::vec::fmadd(weight, Lanes(values[v]), Lanes(sums[q][v]));
      }
    }
  }
  UNROLLED for (int64_t q = 0; q < Q; ++q)
    UNROLLED for (int64_t v = 0; v < V; ++v) Lanes(sums[q][v]).store(outputs + q * d + start + v * kLanes);
}

template <typename Computed, typename Stored>
class Attention {
 public:
  Attention(const Pages<Computed, Stored>& pages, double scale) : pages_(pages), d_(pages.d), scale_(static_cast<float>(scale)) {}

  struct Workspace {
    // For items of up to `rows` query vectors.
    Workspace(const Pages<Computed, Stored>& pages, int64_t rows)
        : queries(rows * pages.d),
          outputs(rows * pages.d),
          scores(rows * kStride),
          highest(rows),
          sums(rows),
          scales(rows),
          stored(pages.head) {}
    std::vector<float> queries, outputs, scores, highest, sums, scales;
    std::vector<Stored> stored;
  };

  // `stride` is the item's first one, `after` that of the item that will follow.
  void attend(const Item& item, int64_t kv_head, Stride<Stored> stride, const Stride<Stored>& after, Workspace& work) const {
    const int64_t rows = item.num_tokens * pages_.group, head = pages_.head;
    for (int64_t row = 0; row < rows; ++row) {
      float* target = work.queries.data() + row * d_;
      load(pages_.query_of(item, kv_head, row), head, target);
      for (int64_t i = 0; i < head; ++i) target[i] *= scale_;
      std::fill(target + head, target + d_, 0.0f);
    }
    std::fill_n(work.outputs.data(), rows * d_, 0.0f);
    std::fill_n(work.highest.data(), rows, kNever);
    std::fill_n(work.sums.data(), rows, 0.0f);

    while (stride.count > 0) {
      const Piece<Stored>& end = stride.pieces[stride.count - 1];
      const Stride<Stored> following = pages_.collect(item, kv_head, end.position + end.count);
      if (following.count == 0 && item.writes) pages_.write(item.first_token, kv_head, work.stored.data());
      update(item, rows, stride, following.count == 0 ? after : following, work);
      stride = following;
    }

    for (int64_t row = 0; row < rows; ++row) {
      float* source = work.outputs.data() + row * d_;
      const float inverse = 1.0f / work.sums[row];
      for (int64_t i = 0; i < head; ++i) source[i] *= inverse;
      store(source, head, pages_.output_of(item, kv_head, row));
    }
  }

  // A tile's keys without the first ones of them.
  void fetch_keys(const Piece<Stored>& piece, int64_t first = 0) const {
    for (int64_t i = first * d_; i < kTile * d_; i += kTile) fetch<kTile>(piece.keys + i);
  }

 private:
  // Attends to a stride, while its values and the keys of the following one are fetched.
  void update(const Item& item, int64_t rows, const Stride<Stored>& stride, const Stride<Stored>& following, Workspace& work) const {
    const Stored *own_keys[kTiles], *own_values[kTiles], *next_keys[kTiles];
    for (int64_t piece = 0; piece < stride.count; ++piece) {
      own_keys[piece] = stride.pieces[piece].keys;
      own_values[piece] = stride.pieces[piece].values;
      next_keys[piece] = piece < following.count ? following.pieces[piece].keys : own_values[piece];
    }
    float* scores = work.scores.data();
    in_groups(rows, [&](auto width, int64_t row) {
      const auto score = [&](auto tiles, int64_t piece) {
        multiply<width, tiles>(work.queries.data() + row * d_, stride.pieces + piece, (row == 0 ? own_values : own_keys) + piece, d_,
                               scores + row * kStride + piece * kTile);
      };
      constexpr int64_t at_once = std::max<int64_t>(1, kRegisters / std::max<int64_t>(width, 4) * kLanes / kTile);
      int64_t piece = 0;
      for (; piece + at_once <= stride.count; piece += at_once) score(std::integral_constant<int64_t, at_once>{}, piece);
      if constexpr (at_once > 2) {
        if (stride.count - piece >= 2) {
          score(std::integral_constant<int64_t, 2>{}, piece);
          piece += 2;
        }
      }
      if (piece < stride.count) score(std::integral_constant<int64_t, 1>{}, piece);
    });
    for (int64_t row = 0; row < rows; ++row) soften(item.first_position + row / pages_.group, row, stride, work);
    in_groups(rows, [&](auto width, int64_t row) {
      constexpr int64_t at_once = kRegisters / (width <= 2 ? 2 : width <= 4 ? 4 : 8);
      const auto add = [&](auto vectors, int64_t start) {
        accumulate<width, vectors>(scores + row * kStride, work.scales.data() + row, stride, row == 0 ? next_keys : own_values, d_,
                                   start, work.outputs.data() + row * d_);
      };
      int64_t i = 0;
      for (; i + at_once * kLanes <= d_; i += at_once * kLanes) add(std::integral_constant<int64_t, at_once>{}, i);
      for (; i < d_; i += kLanes) add(std::integral_constant<int64_t, 1>{}, i);
    });
    for (int64_t piece = 0; piece < following.count; ++piece)
      fetch_keys(following.pieces[piece], piece < stride.count ? stride.pieces[piece].count : 0);
  }

  // Scores to weights, in place, of a query at `position`, which sees what comes up to it.
  void soften(int64_t position, int64_t row, const Stride<Stored>& stride, Workspace& work) const {
    float* own = work.scores.data() + row * kStride;
    for (int64_t piece = 0; piece < stride.count; ++piece) {
      const int64_t seen = std::clamp<int64_t>(position + 1 - stride.pieces[piece].position, 0, stride.pieces[piece].count);
      std::fill(own + piece * kTile + seen, own + (piece + 1) * kTile, kNever);
    }
    Lanes most(work.highest[row]);
    for (int64_t j = 0; j < stride.count * kTile; j += kLanes) most = at::vec::maximum(most, Lanes::loadu(own + j));
    const float highest = highest_of(most);
    Lanes sum(0.0f);
    for (int64_t j = 0; j < stride.count * kTile; j += kLanes) {
      const Lanes weight = (Lanes::loadu(own + j) - Lanes(highest)).exp_u20();
      weight.store(own + j);
      sum = sum + weight;
    }
    const float scale = exponential(work.highest[row] - highest);
    work.scales[row] = scale;
    work.highest[row] = highest;
    work.sums[row] = work.sums[row] * scale + sum_of(sum);
  }

  // Up to eight rows at a time share what is loaded; four where there are half as many registers.
  template <typename Step>
  static void in_groups(int64_t rows, const Step& step) {
    int64_t row = 0;
    if constexpr (kRegisters == 16)
      for (; row + 8 <= rows; row += 8) step(std::integral_constant<int64_t, 8>{}, row);
    for (; row + 4 <= rows; row += 4) step(std::integral_constant<int64_t, 4>{}, row);
    if (rows - row == 3) step(std::integral_constant<int64_t, 3>{}, row);
    if (rows - row == 2) step(std::integral_constant<int64_t, 2>{}, row);
    if (rows - row == 1) step(std::integral_constant<int64_t, 1>{}, row);
  }

  Pages<Computed, Stored> pages_;
  int64_t d_;
  float scale_;
};

// Keys and values of the tokens from `begin` on go to their slots.
template <typename Computed, typename Stored>
void write_tokens(const Pages<Computed, Stored>& pages, int64_t begin, int64_t end) {
  share_out(begin, end, 2 * kTile, [&](int64_t first, int64_t last) {
    std::vector<Stored> scratch(pages.head);
    for (; first < last; first += kTile)
      for (int64_t kv_head = 0; kv_head < pages.kv_heads; ++kv_head)
        for (int64_t token = first; token < std::min(first + kTile, last); ++token) pages.write(token, kv_head, scratch.data());
  });
}

// Every item attends, by Attention or TileAttention.
template <typename Kernel, typename Computed, typename Stored>
void attend_all(const Kernel& kernel, const Pages<Computed, Stored>& pages, const std::vector<Item>& items) {
  const int64_t total = static_cast<int64_t>(items.size()) * pages.kv_heads;
  int64_t tokens = 1;
  for (const Item& item : items) tokens = std::max(tokens, item.num_tokens);
  std::atomic<int64_t> next{0};  // items differ in length: whoever is free takes the next
  share_out(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    const auto begin = [&](int64_t item) {
      return item < total ? pages.collect(items[item / pages.kv_heads], item % pages.kv_heads, 0) : Stride<Stored>{};
    };
    typename Kernel::Workspace work(pages, tokens * pages.group);
    int64_t item = next++;
    Stride<Stored> stride = begin(item);
    for (int64_t piece = 0; piece < stride.count; ++piece) kernel.fetch_keys(stride.pieces[piece]);
    while (item < total) {
      const int64_t following = next++;
      const Stride<Stored> after = begin(following);
      kernel.attend(items[item / pages.kv_heads], item % pages.kv_heads, stride, after, work);
      item = following;
      stride = after;
    }
  });
}

// starts [rows + 1]: the first token of each row; contexts [rows]: positions with the row's own tokens; tables [any, width], of
// which seats [rows] are the rows'.
// Rows of at least `tiles_from` query vectors for each key head attend by TileAttention: for bfloat16, where the process may
// use AMX. None: never.
at::Tensor paged_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, at::Tensor cache,
                           int64_t block_size, const at::Tensor& slots, const at::Tensor& starts, const at::Tensor& contexts,
                           const at::Tensor& tables, const at::Tensor& seats, double scale, std::optional<int64_t> tiles_from) {
  for (const at::Tensor* part : {&query, &key, &value}) {
    TORCH_CHECK(part->dim() == 3 && part->stride(2) == 1 && part->stride(1) == part->size(2), "heads must lie together");
    TORCH_CHECK(part->scalar_type() == query.scalar_type(), "queries, keys and values must have one type");
  }
  TORCH_CHECK(cache.is_contiguous() && cache.size(4) % 16 == 0 && query.size(2) <= cache.size(4), "heads do not fit the pages");
  TORCH_CHECK(tables.is_contiguous() && seats.numel() == contexts.numel(), "every row has a row of the block tables");
  TORCH_CHECK(cache.size(3) % kTile == 0 && block_size <= cache.size(3), "a page must hold its block in whole tiles");
  at::Tensor output = at::empty(query.sizes(), query.options());
  std::vector<Item> items, tiled_items;
  const int64_t group = query.size(1) / cache.size(2);
  const int64_t* start = starts.const_data_ptr<int64_t>();
  const int64_t* seat = seats.const_data_ptr<int64_t>();
  const int64_t* context = contexts.const_data_ptr<int64_t>();
  int64_t written = 0;  // tokens whose items write them
  for (int64_t row = 0; row < contexts.numel(); ++row) {
    const bool writes = start[row + 1] == start[row] + 1 && start[row] == written;
    written += writes;
    const bool tiled = tiles_from && (start[row + 1] - start[row]) * group >= *tiles_from;
    const int64_t item_tokens = std::max<int64_t>(1, (tiled ? kTileQueries : kQueries) / group);
    for (int64_t token = start[row]; token < start[row + 1]; token += item_tokens)
      (tiled ? tiled_items : items)
          .push_back({seat[row], token, std::min(item_tokens, start[row + 1] - token), context[row] - (start[row + 1] - token), writes});
  }
  const auto run = [&](auto computed, auto stored) {
    using Computed = decltype(computed);
    using Stored = decltype(stored);
    const Pages<Computed, Stored> pages(query, key, value, cache, slots, tables, block_size, output);
    write_tokens(pages, written, slots.numel());
    if (!items.empty()) attend_all(Attention<Computed, Stored>(pages, scale), pages, items);
#if defined(CPU_CAPABILITY_AVX512)
    if constexpr (std::is_same_v<Computed, at::BFloat16>)
      if (!tiled_items.empty()) return attend_all(TileAttention(pages, scale), pages, tiled_items);
#endif
    TORCH_CHECK(tiled_items.empty(), "no attention by tiles in ", query.scalar_type(), " on this CPU");
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
      "Tensor starts, Tensor contexts, Tensor tables, Tensor seats, float scale, int? tiles_from=None) -> Tensor");
}
TORCH_LIBRARY_IMPL(nanovllm, CPU, library) { library.impl("paged_attention", paged_attention); }
