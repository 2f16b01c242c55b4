// Some queries of a prompt chunk against all keys up to themselves.
//
// Keys and values go through in blocks of kKeyBlock tokens, packed into the panels of linear.h for all queries of an
// item and all query heads that share them. Scores never leave the first-level cache: the softmax is kept up to date
// from block to block (Milakov, Gimelshein: Online normalizer calculation for softmax, 2018; Dao et al.:
// FlashAttention, 2022).
#pragma once

#include <array>
#include <numeric>

#include "kv_cache.h"
#include "linear.h"

namespace {

constexpr int64_t kKeyBlock = 256;
constexpr int64_t kQueryBlock = 96;  // queries of an item: packing is a small part of its work

// How many numbers lie side by side in a panel. Number is float, or uint16_t for products of bfloat16.
template <typename Number>
constexpr int64_t kInterleaved = sizeof(float) / sizeof(Number);

// Where the products of one item read and write.
template <typename Number>
struct PromptBuffers {
  Number* queries;  // [query head][query][head_size]
  Number* keys;     // panels of kPanel keys
  Number* values;   // panels of kPanel of the head's numbers
  Number* weights;  // [kTileRows][kKeyBlock]
  float* scores;    // the same; for float they become the weights
  float* part;      // [kTileRows][kPanel]
  float* results;   // [query head][query][value panels * kPanel]: not yet divided by totals
  float* maxima;    // [query head][query], of the scores times scale, to base 2
  float* totals;    // [query head][query]

  // `num_queries`: of all query heads together. `memory`: num_floats() of them.
  PromptBuffers(const TwinpoolShape& d, int64_t num_queries, float* memory) {
    const Sizes sizes = sizes_of(d, num_queries);
    float* parts[std::tuple_size_v<Sizes>];
    for (size_t i = 0; i < sizes.size(); memory += sizes[i++]) parts[i] = memory;
    queries = reinterpret_cast<Number*>(parts[0]);
    keys = reinterpret_cast<Number*>(parts[1]);
    values = reinterpret_cast<Number*>(parts[2]);
    scores = parts[3];
    weights = sizeof(Number) == sizeof(float) ? reinterpret_cast<Number*>(scores) : reinterpret_cast<Number*>(parts[4]);
    part = parts[5];
    results = parts[6];
    maxima = parts[7];
    totals = parts[8];
  }

  static int64_t num_floats(const TwinpoolShape& d, int64_t num_queries) {
    const Sizes sizes = sizes_of(d, num_queries);
    return std::accumulate(sizes.begin(), sizes.end(), int64_t{0});
  }

 private:
  using Sizes = std::array<int64_t, 9>;

  static Sizes sizes_of(const TwinpoolShape& d, int64_t num_queries) {
    const int64_t head = d.head_size, width = panels_of(head) * kPanel;
    return {num_queries * head,    kKeyBlock * head,   kKeyBlock * width,   kTileRows * kKeyBlock, kTileRows * kKeyBlock,
            kTileRows * kPanel, num_queries * width, num_queries,           num_queries};
  }
};

// rows[i] becomes column i. Step by step: pairs of lanes, of pairs, of fours, of eights.
inline void transpose(Vec* rows) {
#pragma GCC unroll 4
  for (int step = 1; step < kLanes; step *= 2)
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & step) continue;
      const Vec a = rows[i], b = rows[i + step];
      rows[i] = shuffled(a, b, [step](int lane) { return lane & step ? lane - step + kLanes : lane; });
      rows[i + step] = shuffled(a, b, [step](int lane) { return lane & step ? lane + kLanes : lane + step; });
    }
}

// Keys rows[0 .. kLanes - 1] into one half of a panel: [number][kPanel].
template <typename KV>
void pack_keys(const KV* const* rows, int64_t head, float* half) {
  for (int64_t i = 0; i < head; i += kLanes) {
    Vec numbers[kLanes];
    for (int row = 0; row < kLanes; ++row) numbers[row] = load_scaled(rows[row], i, head);
    transpose(numbers);
    for (int lane = 0; lane < kLanes; ++lane) store(half + (i + lane) * kPanel, numbers[lane]);
  }
}

// Values rows[0 .. count - 1] into panels: [number / kPanel][row][kPanel].
template <typename KV>
void pack_values(const KV* const* rows, int64_t count, int64_t head, float* panels) {
  for (int64_t i = 0; i < head; i += kLanes)
    for (int64_t row = 0; row < count; ++row)
      store(panels + (i / kPanel * kKeyBlock + row) * kPanel + i % kPanel,
            load_scaled(rows[row], i, head));
}

inline void multiply(int64_t rows, const float* a, int64_t a_stride, const float* panel, int64_t depth, float* out,
                     int64_t out_stride) {
  tile_of<false>(rows, a, a_stride, panel, depth, out, out_stride);
}

#if defined(__AVX512BF16__)
template <typename KV>
inline __m512i load_bfloat16(const KV* row, int64_t i, int64_t head) {
  if constexpr (std::is_same_v<KV, uint16_t>) return _mm512_loadu_si512(row + i);
  return to_bfloat16(load_scaled(row, i, head), load_scaled(row, i + kLanes, head));
}

// As above, by pairs of numbers: [number / 2][kPanel][2].
template <typename KV>
void pack_keys(const KV* const* rows, int64_t head, uint16_t* half) {
  for (int64_t i = 0; i < head; i += 2 * kLanes) {
    Vec pairs[kLanes];
    const int num_pairs = static_cast<int>(std::min<int64_t>(kLanes, (head - i) / 2));
    for (int row = 0; row < kLanes; ++row)
      pairs[row] = (Vec)(num_pairs == kLanes ? load_bfloat16(rows[row], i, head)
                                             : to_bfloat16(load_scaled(rows[row], i, head), Vec{}));
    transpose(pairs);
    for (int pair = 0; pair < num_pairs; ++pair)
      std::memcpy(half + (i + pair * 2) * kPanel, &pairs[pair], sizeof(Vec));
  }
}

// As above, by pairs of rows: [number / kPanel][row / 2][kPanel][2].
template <typename KV>
void pack_values(const KV* const* rows, int64_t count, int64_t head, uint16_t* panels) {
  const __m512i side_by_side = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                                6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  for (int64_t i = 0; i < head; i += kLanes)
    for (int64_t row = 0; row < count; row += 2) {
      const Vec next = row + 1 < count ? load_scaled(rows[row + 1], i, head) : Vec{};
      const __m512i pairs =
          _mm512_permutexvar_epi16(side_by_side, to_bfloat16(load_scaled(rows[row], i, head), next));
      _mm512_storeu_si512(panels + (i / kPanel * kKeyBlock + row) * kPanel + i % kPanel * 2, pairs);
    }
}

template <int kRows = kTileRows>
void multiply(int64_t rows, const uint16_t* a, int64_t a_stride, const uint16_t* panel, int64_t depth, float* out,
              int64_t out_stride) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return multiply<kRows - 1>(rows, a, a_stride, panel, depth, out, out_stride);
  }
  tile16<kRows>(a, a_stride, panel, depth, out, out_stride);
}

inline void round_row(const float* scores, int64_t count, uint16_t* weights) {
  for (int64_t i = 0; i < count; i += 2 * kLanes)
    _mm512_storeu_si512(weights + i, to_bfloat16(load(scores + i), load(scores + i + kLanes)));
}
#endif

inline void round_row(const float*, int64_t, float*) {}  // the scores are the weights

// Scores of one query and one block of keys become weights, in place: 0 from `visible` up to `padded`, a multiple of
// kLanes. What was found so far has to be multiplied by the number that is returned.
inline float weigh_block(float* scores, int64_t visible, int64_t padded, float scale, float* maximum, float* total) {
  const int64_t whole = visible / kLanes * kLanes;
  for (int64_t i = visible; i < std::min(padded, whole + kLanes); ++i) scores[i] = -INFINITY;
  const int64_t used = std::min(padded, (visible + kLanes - 1) / kLanes * kLanes);
  Vec maxima = Vec{} - INFINITY;
  for (int64_t i = 0; i < used; i += kLanes) maxima = larger(load(scores + i), maxima);
  const float before = *maximum;
  const float highest = std::max(before, largest(maxima) * scale);
  Vec sums = {};
  for (int64_t i = 0; i < used; i += kLanes) {
    const Vec weights = power_of_two(load(scores + i) * scale - highest);
    store(scores + i, weights);
    sums += weights;
  }
  float surplus = 0;  // power_of_two() ends at 2^-126, which is not quite 0
  for (int64_t i = visible; i < used; ++i) surplus += scores[i];
  for (int64_t i = visible; i < padded; ++i) scores[i] = 0;
  const float factor = before == highest ? 1.0f : std::exp2(before - highest);
  *maximum = highest;
  *total = *total * factor + (sum(sums) - surplus);
  return factor;
}

// A few queries of one head against the packed block of keys that begins at token `first_key`.
template <typename Number>
void attend_tile(const TwinpoolShape& d, const PromptBuffers<Number>& buffers, const Number* query,
                 int64_t query_stride, int64_t rows, int64_t position, int64_t first_key, int64_t num_keys,
                 int64_t state) {
  const int64_t head = d.head_size, width = panels_of(head) * kPanel;
  const int64_t seen = std::min(num_keys, position + rows - first_key), padded = panels_of(seen) * kPanel;
  const int64_t pair = kInterleaved<Number>, depth = (seen + pair - 1) / pair * pair;  // weights beyond `seen` are 0
  for (int64_t key = 0; key < seen; key += kPanel)
    multiply(rows, query, query_stride, buffers.keys + key * head, head, buffers.scores + key, kKeyBlock);
  float factors[kTileRows];
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t visible = std::max<int64_t>(0, std::min(seen, position + i + 1 - first_key));
    float* scores = buffers.scores + i * kKeyBlock;
    factors[i] = weigh_block(scores, visible, padded, d.attention_scale * kLog2E, buffers.maxima + state + i,
                             buffers.totals + state + i);
    round_row(scores, padded, buffers.weights + i * kKeyBlock);
  }
  for (int64_t first = 0; first < head; first += kPanel) {
    multiply(rows, buffers.weights, kKeyBlock, buffers.values + first * kKeyBlock, depth, buffers.part, kPanel);
    for (int64_t i = 0; i < rows; ++i) {
      float* result = buffers.results + (state + i) * width + first;
      for (int64_t j = 0; j < kPanel; j += kLanes)
        store(result + j, load(result + j) * factors[i] + load(buffers.part + i * kPanel + j));
    }
  }
}

// Packs `count` tokens from `first` on.
template <typename KV, typename Number>
void pack_block(const TwinpoolShape& d, KV* cache, const TwinpoolSequence& s, int kv_head, int64_t first, int64_t count,
                const PromptBuffers<Number>& buffers) {
  const KV* rows[kKeyBlock];
  find_rows(d, cache, s, 0, kv_head, first, count, panels_of(count) * kPanel, rows);
  for (int64_t t = 0; t < count; t += kLanes)
    pack_keys(rows + t, d.head_size,
              buffers.keys + t / kPanel * kPanel * d.head_size + t % kPanel * kInterleaved<Number>);
  find_rows(d, cache, s, 1, kv_head, first, count, count, rows);
  pack_values(rows, count, d.head_size, buffers.values);
}

// Queries first .. first + count - 1 of a chunk, for every query head of a KV head.
template <typename Number, typename KV>
void attend_queries(const TwinpoolShape& d, KV* cache, const TwinpoolSequence& s, int kv_head, int64_t first,
                    int64_t count, const float* query, float* out, float* memory) {
  const int64_t group = d.num_heads / d.num_kv_heads, head = d.head_size, width = panels_of(head) * kPanel;
  const int64_t stride = static_cast<int64_t>(d.num_heads) * head;
  const int64_t at = (s.first_row + first) * stride + kv_head * group * head;
  const PromptBuffers<Number> buffers(d, group * count, memory);
  for (int64_t g = 0; g < group; ++g)
    for (int64_t i = 0; i < count; ++i)
      copy_query(query + at + i * stride + g * head, head, buffers.queries + (g * count + i) * head);
  std::fill(buffers.results, buffers.results + group * count * width, 0.0f);
  std::fill(buffers.maxima, buffers.maxima + group * count, -INFINITY);
  std::fill(buffers.totals, buffers.totals + group * count, 0.0f);

  const int64_t position = s.start + first, last = position + count;
  for (int64_t key = 0; key < last; key += kKeyBlock) {
    const int64_t num_keys = std::min(kKeyBlock, last - key);
    pack_block(d, cache, s, kv_head, key, num_keys, buffers);
    for (int64_t g = 0; g < group; ++g)
      for (int64_t i = 0; i < count; i += kTileRows) {
        const int64_t rows = std::min<int64_t>(kTileRows, count - i), state = g * count + i;
        if (position + i + rows > key)
          attend_tile(d, buffers, buffers.queries + state * head, head, rows, position + i, key, num_keys, state);
      }
  }
  for (int64_t g = 0; g < group; ++g)
    for (int64_t i = 0; i < count; ++i) {
      const float* result = buffers.results + (g * count + i) * width;
      const float inverse = 1.0f / buffers.totals[g * count + i];
      for (int64_t j = 0; j < head; ++j) out[at + i * stride + g * head + j] = result[j] * inverse;
    }
}

}  // namespace
