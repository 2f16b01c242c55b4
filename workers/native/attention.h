// Paged attention: new keys and values into the cache, then every query against its own sequence up to itself.
//
// A prompt's keys and values are packed into the panels of linear.h and run on its inner kernel; a decoding sequence
// reads them straight from the cache.
#pragma once

#include "interface.h"
#include "linear.h"

namespace {

// Scores of one query become weights that sum to one; whatever lies beyond `count` up to `padded` becomes 0.
void softmax(float* scores, int64_t count, int64_t padded, float scale) {
  for (int64_t i = count; i < padded; ++i) scores[i] = -INFINITY;
  Vec maxima = load(scores);
  for (int64_t i = kLanes; i < padded; i += kLanes) {
    const Vec value = load(scores + i);
    maxima = value > maxima ? value : maxima;
  }
  float highest = maxima[0];
  for (int lane = 1; lane < kLanes; ++lane) highest = std::max(highest, maxima[lane]);
  Vec total = {};
  for (int64_t i = 0; i < padded; i += kLanes) {
    const Vec value = exponential((load(scores + i) - highest) * scale);
    store(scores + i, value);
    total += value;
  }
  float surplus = 0;  // exponential() ends at e^-87, which is not quite 0
  for (int64_t i = count; i < padded; ++i) {
    surplus += scores[i];
    scores[i] = 0;
  }
  const float inverse = 1.0f / (sum(total) - surplus);
  for (int64_t i = 0; i < count; ++i) scores[i] *= inverse;
}

struct Work {
  int32_t sequence, kv_head, first_query, num_queries;
};

// Where block `index` of a sequence keeps the keys (part 0) or values (part 1) of one head: [block_size][head_size].
template <typename KV>
inline KV* block_of(const TwinpoolShape& d, KV* cache, const TwinpoolSequence& s, int64_t index, int part, int kv_head) {
  const int64_t head = static_cast<int64_t>(d.block_size) * d.head_size;
  return cache + ((s.block_table[index] * 2 + part) * d.num_kv_heads + kv_head) * head;
}

template <typename KV>
void write_cache(const TwinpoolShape& d, KV* cache, const TwinpoolSequence& s, const float* key, const float* value) {
  const int64_t stride = static_cast<int64_t>(d.num_kv_heads) * d.head_size;
  for (int32_t i = 0; i < s.num_rows; ++i) {
    const int64_t position = s.start + i, offset = position % d.block_size * d.head_size;
    for (int kv_head = 0; kv_head < d.num_kv_heads; ++kv_head) {
      const int64_t from = (s.first_row + i) * stride + kv_head * d.head_size;
      if (offset == 0) {  // the first token of a block: nothing of an earlier owner stays, here or in a handoff
        const int64_t block_size = static_cast<int64_t>(d.block_size) * d.head_size * sizeof(KV);
        std::memset(block_of(d, cache, s, position / d.block_size, 0, kv_head), 0, block_size);
        std::memset(block_of(d, cache, s, position / d.block_size, 1, kv_head), 0, block_size);
      }
      KV* k = block_of(d, cache, s, position / d.block_size, 0, kv_head) + offset;
      KV* v = block_of(d, cache, s, position / d.block_size, 1, kv_head) + offset;
      for (int64_t j = 0; j < d.head_size; ++j) {
        assign(k + j, key[from + j]);
        assign(v + j, value[from + j]);
      }
    }
  }
}

// One new token: every query head of the group against each block, straight from the cache.
template <typename KV>
void attend_one(const TwinpoolShape& d, KV* cache, const TwinpoolSequence& s, int kv_head, const float* query, float* out,
                Scratch<>& scratch) {
  const int64_t count = s.start + 1, padded = (count + kLanes - 1) / kLanes * kLanes;
  const int group = d.num_heads / d.num_kv_heads;
  const int64_t head = d.head_size, row = static_cast<int64_t>(s.first_row) * d.num_heads * head;
  float* scores = scratch.get(group * padded);
  for (int64_t index = 0; index * d.block_size < count; ++index) {
    const KV* keys = block_of(d, cache, s, index, 0, kv_head);
    const int64_t tokens = std::min<int64_t>(d.block_size, count - index * d.block_size);
    for (int g = 0; g < group; ++g) {
      const float* q = query + row + (kv_head * group + g) * head;
      for (int64_t t = 0; t < tokens; ++t) {
        Vec products = {};
        for (int64_t i = 0; i < head; i += kLanes) products += load(q + i) * load(keys + t * head + i);
        scores[g * padded + index * d.block_size + t] = sum(products);
      }
    }
  }
  for (int g = 0; g < group; ++g) {
    softmax(scores + g * padded, count, padded, d.attention_scale);
    std::memset(out + row + (kv_head * group + g) * head, 0, head * sizeof(float));
  }
  for (int64_t index = 0; index * d.block_size < count; ++index) {
    const KV* values = block_of(d, cache, s, index, 1, kv_head);
    const int64_t tokens = std::min<int64_t>(d.block_size, count - index * d.block_size);
    for (int g = 0; g < group; ++g) {
      const float* weights = scores + g * padded + index * d.block_size;
      float* o = out + row + (kv_head * group + g) * head;
      for (int64_t i = 0; i < head; i += kLanes) {
        Vec total = load(o + i);
        for (int64_t t = 0; t < tokens; ++t) total += weights[t] * load(values + t * head + i);
        store(o + i, total);
      }
    }
  }
}

// Some queries of a prompt chunk: keys and values are packed into panels, then it is two matrix products.
template <typename KV>
void attend_many(const TwinpoolShape& d, KV* cache, const TwinpoolSequence& s, const Work& work, const float* query, float* out,
                 Scratch<>& scratch) {
  const int group = d.num_heads / d.num_kv_heads;
  const int64_t head = d.head_size, stride = static_cast<int64_t>(d.num_heads) * head;
  const int64_t last = s.start + work.first_query + work.num_queries;  // keys that any of the queries sees
  const int64_t padded = panels_of(last) * kPanel, value_panels = panels_of(head);
  float* keys = scratch.get(padded * head + value_panels * kPanel * padded + kTileRows * (padded + value_panels * kPanel));
  float* values = keys + padded * head;
  float* scores = values + value_panels * kPanel * padded;
  float* result = scores + kTileRows * padded;
  std::memset(keys + (padded - kPanel) * head, 0, kPanel * head * sizeof(float));
  std::memset(values, 0, value_panels * kPanel * padded * sizeof(float));
  for (int64_t t = 0; t < last; ++t) {
    const int64_t offset = t % d.block_size * head;
    const KV* k = block_of(d, cache, s, t / d.block_size, 0, work.kv_head) + offset;
    const KV* v = block_of(d, cache, s, t / d.block_size, 1, work.kv_head) + offset;
    float* key_panel = keys + t / kPanel * kPanel * head + t % kPanel;
    for (int64_t i = 0; i < head; ++i) key_panel[i * kPanel] = as_float(k[i]);
    for (int64_t i = 0; i < head; ++i) values[(i / kPanel * padded + t) * kPanel + i % kPanel] = as_float(v[i]);
  }
  for (int g = 0; g < group; ++g) {
    for (int64_t first = work.first_query; first < work.first_query + work.num_queries; first += kTileRows) {
      const int64_t rows = std::min<int64_t>(kTileRows, work.first_query + work.num_queries - first);
      const int64_t at = (s.first_row + first) * stride + (work.kv_head * group + g) * head;
      const int64_t seen = s.start + first + rows, panels = panels_of(seen);
      for (int64_t p = 0; p < panels; ++p)
        tile_of<false>(rows, query + at, stride, keys + p * kPanel * head, head, scores + p * kPanel, padded);
      for (int64_t i = 0; i < rows; ++i)
        softmax(scores + i * padded, s.start + first + i + 1, panels * kPanel, d.attention_scale);
      for (int64_t p = 0; p < value_panels; ++p)
        tile_of<false>(rows, scores, padded, values + p * padded * kPanel, seen, result + p * kPanel,
                       value_panels * kPanel);
      for (int64_t i = 0; i < rows; ++i)
        std::memcpy(out + at + i * stride, result + i * value_panels * kPanel, head * sizeof(float));
    }
  }
}

std::vector<Work> split_attention(const TwinpoolShape& d, const TwinpoolStep& step) {
  std::vector<Work> items;
  for (int32_t index = 0; index < step.num_sequences; ++index)
    for (int32_t kv_head = 0; kv_head < d.num_kv_heads; ++kv_head)
      for (int32_t first = 0; first < step.sequences[index].num_rows; first += kQueryBlock)
        items.push_back({index, kv_head, first,
                         static_cast<int32_t>(std::min<int64_t>(kQueryBlock, step.sequences[index].num_rows - first))});
  // Later queries see more keys: the longest first, so that the threads end together.
  std::stable_sort(items.begin(), items.end(), [&](const Work& a, const Work& b) {
    const TwinpoolSequence &s = step.sequences[a.sequence], &t = step.sequences[b.sequence];
    return static_cast<int64_t>(s.start + a.first_query) * a.num_queries >
           static_cast<int64_t>(t.start + b.first_query) * b.num_queries;
  });
  return items;
}

template <typename KV>
void attend(const TwinpoolShape& d, const TwinpoolStep& step, const std::vector<Work>& items, KV* cache,
            const float* query, float* out, std::vector<Scratch<>>& per_thread, int num_threads) {
#pragma omp parallel for schedule(dynamic) num_threads(num_threads)
  for (size_t i = 0; i < items.size(); ++i) {
    const TwinpoolSequence& s = step.sequences[items[i].sequence];
    Scratch<>& scratch = per_thread[omp_get_thread_num()];
    if (s.num_rows == 1)
      attend_one(d, cache, s, items[i].kv_head, query, out, scratch);
    else
      attend_many(d, cache, s, items[i], query, out, scratch);
  }
}

}  // namespace
