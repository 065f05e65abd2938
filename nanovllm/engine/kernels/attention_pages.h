// Keys and values of attention where they lie: in the pages of the KV cache.
//
// A page holds, for each key head, its keys in tiles of sixteen positions, each tile [d, 16], and its values [positions, d].
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <limits>

#include "lanes.h"

constexpr int64_t kTile = 16;  // positions of a tile of keys
constexpr int64_t kTiles = 4;  // tiles between two updates of the softmax
constexpr int64_t kStride = kTile * kTiles;
constexpr int64_t kCacheLine = 64;  // bytes
constexpr float kNever = -std::numeric_limits<float>::infinity();

// A work item: a tile of a row's query tokens, which it takes with the query heads that share one key head.
struct Item {
  int64_t seat, first_token, num_tokens, first_position;
  bool writes;  // its own key and value, as nobody else waits for them
};

// Keys and values of neighbouring positions, at most a tile of them.
template <typename Stored>
struct Piece {
  const Stored *keys, *values;
  int64_t position, count;
};

// What is attended to between two updates of the softmax.
template <typename Stored>
struct Stride {
  Piece<Stored> pieces[kTiles];
  int64_t count = 0;
};

// A step's queries, keys and values, the cache of a layer, and the output.
template <typename Computed, typename Stored>
struct Pages {
  Pages(const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& values, at::Tensor& pages, const at::Tensor& places,
        const at::Tensor& block_tables, int64_t block_tokens, at::Tensor& outputs)
      : query(queries.const_data_ptr<Computed>()),
        key(keys.const_data_ptr<Computed>()),
        value(values.const_data_ptr<Computed>()),
        cache(pages.mutable_data_ptr<Stored>()),
        slots(places.const_data_ptr<int64_t>()),
        tables(block_tables.const_data_ptr<int32_t>()),
        output(outputs.mutable_data_ptr<Computed>()),
        width(block_tables.size(1)),
        heads(queries.size(1)),
        head(queries.size(2)),
        d(pages.size(4)),
        query_stride(queries.stride(0)),
        key_stride(keys.stride(0)),
        value_stride(values.stride(0)),
        kv_heads(pages.size(2)),
        page_size(pages.size(3)),
        block_size(block_tokens),
        group(heads / kv_heads) {}

  // A token's key and value go to their slot. Heads are padded with zeros to whole vectors of floats, which change neither
  // products nor outputs.
  void write(int64_t token, int64_t kv_head, Stored* scratch) const {
    const int64_t block = slots[token] / block_size, offset = slots[token] % block_size;
    Stored* keys = cache + (block * 2 * kv_heads + kv_head) * page_size * d;
    convert(key + token * key_stride + kv_head * head, head, scratch);
    Stored* column = keys + offset / kTile * kTile * d + offset % kTile;
    for (int64_t i = 0; i < head; ++i) column[i * kTile] = scratch[i];
    convert(value + token * value_stride + kv_head * head, head, keys + (kv_heads * page_size + offset) * d);
  }

  // What the item's context has from `position` on.
  Stride<Stored> collect(const Item& item, int64_t kv_head, int64_t position) const {
    const int64_t context = item.first_position + item.num_tokens;
    Stride<Stored> stride;
    while (stride.count < kTiles && position < context) {
      const int64_t block = position / block_size, offset = position % block_size;
      const int64_t page = tables[item.seat * width + block];
      const Stored* keys = cache + (page * 2 * kv_heads + kv_head) * page_size * d + offset * d;
      const int64_t count = std::min({kTile, block_size - offset, context - position});
      stride.pieces[stride.count++] = {keys, keys + kv_heads * page_size * d, position, count};
      position += count;
    }
    return stride;
  }

  // Of an item's row, which is a token with one of the query heads.
  const Computed* query_of(const Item& item, int64_t kv_head, int64_t row) const {
    return query + (item.first_token + row / group) * query_stride + (kv_head * group + row % group) * head;
  }
  Computed* output_of(const Item& item, int64_t kv_head, int64_t row) const {
    return output + ((item.first_token + row / group) * heads + kv_head * group + row % group) * head;
  }

  const Computed *query, *key, *value;
  Stored* cache;
  const int64_t* slots;
  const int32_t* tables;
  Computed* output;
  int64_t width, heads, head, d, query_stride, key_stride, value_stride, kv_heads, page_size, block_size, group;
};

// What will be needed sets out while something else is computed: every piece lies in another page, at which the CPU's own
// prefetching begins anew.
template <int64_t N, typename Stored>
void fetch(const Stored* memory) {
  for (int64_t i = 0; i < N; i += kCacheLine / sizeof(Stored)) __builtin_prefetch(memory + i, 0, 2);
}
