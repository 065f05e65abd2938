// Attention in bfloat16 by AMX tiles, over the same pages and the same strides of positions as paged_attention.cpp.
//
// A stride's keys and values are put into pairs once for all rows of an item: keys as [d / 2, 16, 2] for each tile of
// sixteen positions, values as [32, d, 2]. Products are summed in float32, the softmax is computed in float32, and its
// weights are rounded to bfloat16. Tiles read denormals as zero and write zero for them.
//
// What a query adds up, and in which order, depends on its own position alone, as there: a row of a tile's sums knows
// nothing of the others, and a weight of zero changes no sum.
#pragma once

#if defined(CPU_CAPABILITY_AVX512)

#include <immintrin.h>

#include <optional>
#include <vector>

#include "attention_pages.h"
#include "tiles.h"


#define TILED __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))

class TileAttention {
 public:
  using Half = at::BFloat16;

  TileAttention(const Pages<Half, Half>& pages, double scale)
      : pages_(pages), d_(pages.d), pairs_(steps(pages.d) * 16), scale_(static_cast<float>(scale)) {}

  // Of one thread, whose tiles it configures.
  struct Workspace {
    Workspace(const Pages<Half, Half>& pages, int64_t rows)
        : queries(whole_tiles(rows) * steps(pages.d)),
          keys(kTiles * steps(pages.d) * 16),
          values(kStride / 2 * pages.d / 16),
          scores(tiles::kRows * kStride / 16),
          weights(tiles::kRows * kStride / 32),
          outputs(whole_tiles(rows) * pages.d / 16),
          sums(whole_tiles(rows)),
          highest(whole_tiles(rows)),
          stored(pages.head) {}
    // Tiles 0 to 3 are sums of up to `rows` rows, 4 and 5 their inputs, 6 and 7 pairs of keys or values.
    void configure(int64_t rows) {
      if (rows == height) return;
      height = rows;
      configured.emplace(rows, 6);
    }

    struct alignas(64) Line {
      char bytes[64] = {};
    };
    int64_t height = 0;
    std::optional<tiles::Configured> configured;
    std::vector<Line> queries;  // [rows, steps, 32]
    std::vector<Line> keys;     // [4, 16 * steps, 16, 2]
    std::vector<Line> values;   // [32, d, 2]
    std::vector<Line> scores;   // [16, 64] of a tile of rows
    std::vector<Line> weights;  // [16, 64] in bfloat16
    std::vector<Line> outputs;  // [rows, d]
    std::vector<Line> sums;     // [rows, 16]: of every sixteenth position
    std::vector<float> highest;
    std::vector<Half> stored;
  };

  void fetch_keys(const Piece<Half>& piece) const {
    for (int64_t i = 0; i < kTile * d_; i += kCacheLine / 2) fetch<1>(piece.keys + i);
  }

  // `stride` is the item's first one, `after` that of the item that will follow.
  TILED void attend(const Item& item, int64_t kv_head, Stride<Half> stride, const Stride<Half>& after, Workspace& work) const {
    const int64_t rows = item.num_tokens * pages_.group, head = pages_.head, height = std::min(rows, tiles::kRows);
    work.configure(height);
    Half* queries = as<Half>(work.queries);
    for (int64_t row = 0; row < rows; ++row) {
      Half* end = std::copy_n(pages_.query_of(item, kv_head, row), head, queries + row * 2 * pairs_);
      std::fill(end, queries + (row + 1) * 2 * pairs_, Half(0.0f));
    }
    std::fill(queries + rows * 2 * pairs_, queries + whole_tiles(rows) * 2 * pairs_, Half(0.0f));
    float* outputs = as<float>(work.outputs);
    std::fill_n(outputs, whole_tiles(rows) * d_, 0.0f);
    std::fill_n(as<float>(work.sums), whole_tiles(rows) * 16, 0.0f);
    std::fill_n(work.highest.data(), whole_tiles(rows), kNever);

    while (stride.count > 0) {
      const Piece<Half>& end = stride.pieces[stride.count - 1];
      const Stride<Half> following = pages_.collect(item, kv_head, end.position + end.count);
      if (following.count == 0 && item.writes) pages_.write(item.first_token, kv_head, work.stored.data());
      pair(stride, following.count == 0 ? after : following, work);
      for (int64_t row = 0; row < rows; row += tiles::kRows) {
        const int64_t last = item.first_position + (std::min(row + tiles::kRows, rows) - 1) / pages_.group;
        if (last < stride.pieces[0].position) continue;
        score(row, work);
        soften(item, row, std::min(tiles::kRows, rows - row), stride, work);
        accumulate(row, work);
      }
      stride = following;
    }

    for (int64_t row = 0; row < rows; ++row) {
      float* own = outputs + row * d_;
      const float inverse = 1.0f / _mm512_reduce_add_ps(_mm512_load_ps(as<float>(work.sums) + row * 16));
      // A zero's sign would tell how many strides came after the row's last position.
      for (int64_t i = 0; i < head; ++i) own[i] = own[i] * inverse + 0.0f;
      store(own, head, pages_.output_of(item, kv_head, row));
    }
  }

 private:
  static int64_t whole_tiles(int64_t rows) { return (rows + tiles::kRows - 1) / tiles::kRows * tiles::kRows; }
  static int64_t steps(int64_t d) { return (d + 31) / 32; }  // of a product over the dimensions

  template <typename T>
  static T* as(std::vector<Workspace::Line>& lines) {
    return reinterpret_cast<T*>(lines.data());
  }

  // Sixteen numbers of either row side by side.
  TILED static __m512i paired(const Half* even, const Half* odd) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even)));
    if (!odd) return low;
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd)));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }

  // A stride's keys and values, in pairs; positions that it has not are zero. Fetches as much of what follows.
  TILED void pair(const Stride<Half>& stride, const Stride<Half>& following, Workspace& work) const {
    __m512i* keys = as<__m512i>(work.keys);
    __m512i* values = as<__m512i>(work.values);
    for (int64_t tile = 0; tile < kTiles; ++tile) {
      const Piece<Half> piece = tile < stride.count ? stride.pieces[tile] : Piece<Half>{nullptr, nullptr, 0, 0};
      const bool fetches = tile < following.count;
      if (piece.count == 0) {
        std::fill_n(keys + tile * pairs_, d_ / 2, _mm512_setzero_si512());
      } else {
        for (int64_t i = 0; i < d_ / 2; ++i) {
          if (fetches) fetch<1>(following.pieces[tile].keys + 2 * i * kTile);
          keys[tile * pairs_ + i] = paired(piece.keys + 2 * i * kTile, piece.keys + (2 * i + 1) * kTile);
        }
      }
      for (int64_t j = 0; j < kTile; j += 2) {
        __m512i* own = values + (tile * kTile + j) / 2 * (d_ / 16);
        const Half* even = piece.values + j * d_;
        for (int64_t i = 0; i < d_; i += 16) {
          if (fetches) fetch<1>(following.pieces[tile].values + j * d_ + 2 * i);
          own[i / 16] = j < piece.count ? paired(even + i, j + 1 < piece.count ? even + d_ + i : nullptr) : _mm512_setzero_si512();
        }
      }
    }
  }

  // The products of a tile of rows with the stride's keys.
  TILED void score(int64_t row, Workspace& work) const {
    const Half* queries = as<Half>(work.queries) + row * 2 * pairs_;
    const __m512i* keys = as<__m512i>(work.keys);
    tiles::zero<0>();
    tiles::zero<1>();
    tiles::zero<2>();
    tiles::zero<3>();
    for (int64_t step = 0; step < pairs_; step += 16, keys += 16) {
      tiles::load<4>(queries + 2 * step, 4 * pairs_);
      tiles::load<6>(keys, 64);
      tiles::add_bfloat16s<0, 4, 6>();
      tiles::load<7>(keys + pairs_, 64);
      tiles::add_bfloat16s<1, 4, 7>();
      tiles::load<6>(keys + 2 * pairs_, 64);
      tiles::add_bfloat16s<2, 4, 6>();
      tiles::load<7>(keys + 3 * pairs_, 64);
      tiles::add_bfloat16s<3, 4, 7>();
    }
    float* scores = as<float>(work.scores);
    tiles::store<0>(scores, 4 * kStride);
    tiles::store<1>(scores + 16, 4 * kStride);
    tiles::store<2>(scores + 32, 4 * kStride);
    tiles::store<3>(scores + 48, 4 * kStride);
  }

  // Scores to weights of `count` rows; what they have summed up so far is brought to their new highest score.
  TILED void soften(const Item& item, int64_t first, int64_t count, const Stride<Half>& stride, Workspace& work) const {
    const float* scores = as<float>(work.scores);
    char* weights = as<char>(work.weights);
    alignas(64) float found[tiles::kRows], scales[tiles::kRows];
    __m512 sums[tiles::kRows];
    for (int64_t row = 0; row < count; ++row) {
      const int64_t seen = item.first_position + (first + row) / pages_.group + 1;
      __m512 own[kTiles], most = _mm512_set1_ps(work.highest[first + row]);
      for (int64_t tile = 0; tile < kTiles; ++tile) {
        const int64_t visible =
            tile < stride.count ? std::clamp<int64_t>(seen - stride.pieces[tile].position, 0, stride.pieces[tile].count) : 0;
        own[tile] = _mm512_mask_mul_ps(_mm512_set1_ps(kNever), static_cast<__mmask16>((1 << visible) - 1),
                                       _mm512_load_ps(scores + row * kStride + tile * kTile), _mm512_set1_ps(scale_));
        most = at::vec::maximum(Lanes(most), Lanes(own[tile]));
      }
      found[row] = highest_of(most);
      const Lanes highest(found[row]);
      for (int64_t tile = 0; tile < kTiles; ++tile) own[tile] = (Lanes(own[tile]) - highest).exp_u20();
      sums[row] = _mm512_add_ps(_mm512_add_ps(own[0], own[1]), _mm512_add_ps(own[2], own[3]));
      __m512i* target = reinterpret_cast<__m512i*>(weights + row * 2 * kStride);
      target[0] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(own[1], own[0]));
      target[1] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(own[3], own[2]));
    }
    for (int64_t row = count; row < tiles::kRows; ++row) found[row] = kNever;
    const __m512 before = _mm512_loadu_ps(work.highest.data() + first), now = _mm512_load_ps(found);
    const __mmask16 same = _mm512_cmp_ps_mask(before, now, _CMP_EQ_OQ);
    _mm512_storeu_ps(work.highest.data() + first, now);
    float* totals = as<float>(work.sums) + first * 16;
    if (same == 0xffff) {
      for (int64_t row = 0; row < count; ++row)
        _mm512_store_ps(totals + row * 16, _mm512_add_ps(_mm512_load_ps(totals + row * 16), sums[row]));
      return;
    }
    const Lanes shrunk = (Lanes(before) - Lanes(now)).exp_u20();
    _mm512_store_ps(scales, _mm512_mask_blend_ps(same, shrunk, _mm512_set1_ps(1.0f)));
    float* outputs = as<float>(work.outputs) + first * d_;
    for (int64_t row = 0; row < count; ++row) {
      const __m512 scale = _mm512_set1_ps(scales[row]);
      _mm512_store_ps(totals + row * 16, _mm512_add_ps(_mm512_mul_ps(_mm512_load_ps(totals + row * 16), scale), sums[row]));
      for (int64_t i = row * d_; i < (row + 1) * d_; i += 16)
        _mm512_store_ps(outputs + i, _mm512_mul_ps(_mm512_load_ps(outputs + i), scale));
    }
  }

  // Adds the weighted values to the outputs of a tile of rows, up to 64 dimensions at a time.
  TILED void accumulate(int64_t row, Workspace& work) const {
    for (int64_t i = 0; i < d_; i += 64) {
      float* outputs = as<float>(work.outputs) + row * d_ + i;
      const __m512i* values = as<__m512i>(work.values) + i / 16;
      switch (std::min<int64_t>(d_ - i, 64) / 16) {
        case 4: add_values<4>(outputs, values, work); break;
        case 3: add_values<3>(outputs, values, work); break;
        case 2: add_values<2>(outputs, values, work); break;
        default: add_values<1>(outputs, values, work);
      }
    }
  }

  template <int N>
  TILED void add_values(float* outputs, const __m512i* values, Workspace& work) const {
    const int64_t row_bytes = 4 * d_;
    tiles::load<0>(outputs, row_bytes);
    if constexpr (N > 1) tiles::load<1>(outputs + 16, row_bytes);
    if constexpr (N > 2) tiles::load<2>(outputs + 32, row_bytes);
    if constexpr (N > 3) tiles::load<3>(outputs + 48, row_bytes);
    for (int64_t half = 0; half < 2; ++half, values += d_) {
      tiles::load<4>(work.weights.data() + half, 2 * kStride);
      tiles::load<6>(values, row_bytes);
      tiles::add_bfloat16s<0, 4, 6>();
      if constexpr (N > 1) {
        tiles::load<7>(values + 1, row_bytes);
        tiles::add_bfloat16s<1, 4, 7>();
      }
      if constexpr (N > 2) {
        tiles::load<6>(values + 2, row_bytes);
        tiles::add_bfloat16s<2, 4, 6>();
      }
      if constexpr (N > 3) {
        tiles::load<7>(values + 3, row_bytes);
        tiles::add_bfloat16s<3, 4, 7>();
      }
    }
    tiles::store<0>(outputs, row_bytes);
    if constexpr (N > 1) tiles::store<1>(outputs + 16, row_bytes);
    if constexpr (N > 2) tiles::store<2>(outputs + 32, row_bytes);
    if constexpr (N > 3) tiles::store<3>(outputs + 48, row_bytes);
  }

  Pages<Half, Half> pages_;
  int64_t d_, pairs_;  // pairs_: of dimensions, in whole tiles
  float scale_;
};

#endif
