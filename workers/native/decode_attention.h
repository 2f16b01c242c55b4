// One new token's queries against the cache, key by key as they lie there.
//
// The keys of a sequence are cut every kPartition tokens, whatever else is in the step and however many threads there
// are; each part gives sums of its own, which are then added in order (Dao et al.: Flash-Decoding, 2023). The query
// heads that share keys go together, so that each key and value is read once.
#pragma once

#include "kv_cache.h"

namespace {

constexpr int64_t kPartition = 256;
#if defined(__AVX512F__)
constexpr int kHeadTile = 4;  // query heads at a time: 16 of 32 registers accumulate
#else
constexpr int kHeadTile = 2;  // 8 of 16
#endif

// What one query head found in one part of its keys: maximum of the scores, sum of the weights, weighted values.
//
//     [kv head's query heads][2 + head_size]
inline int64_t partial_size(const TwinpoolShape& d) {
  return static_cast<int64_t>(d.num_heads / d.num_kv_heads) * (2 + d.head_size);
}

// A sequence's blocks lie scattered, so that the processor cannot know where it reads next. So many bytes ahead are
// asked for, into the second-level cache: the first has room for few requests, and reading ends at half the speed.
constexpr int64_t kPrefetchBytes = 8192;

template <typename KV>
inline void prefetch(const KV* row, int64_t size) {
  for (int64_t at = 0; at < size * static_cast<int64_t>(sizeof(KV)); at += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(row) + at, 0, 2);
}

// The keys of a partition, then its values; one token's keys are one row.
template <typename KV>
struct Partition {
  int64_t count, padded;  // tokens; and up to a multiple of kLanes, where the last one is repeated
  int64_t size, ahead;    // numbers in a row, rows between reading and asking for
  const KV* rows[2 * kPartition];

  Partition(const TwinpoolShape& d, KV* cache, const TwinpoolSequence& s, int kv_head, int64_t first, int64_t tokens)
      : count(tokens), padded((tokens + kLanes - 1) / kLanes * kLanes), size(row_size<KV>(d)) {
    ahead = std::max<int64_t>(1, kPrefetchBytes / (size * static_cast<int64_t>(sizeof(KV))));
    find_rows(d, cache, s, 0, kv_head, first, count, padded, rows);
    find_rows(d, cache, s, 1, kv_head, first, count, padded, rows + padded);
    for (int64_t row = 0; row < std::min(ahead, 2 * padded); ++row) prefetch(rows[row], size);
  }

  const KV* key(int64_t i) const { return at(i); }
  const KV* value(int64_t i) const { return at(padded + i); }

 private:
  const KV* at(int64_t row) const {
    if (row + ahead < 2 * padded) prefetch(rows[row + ahead], size);
    return rows[row];
  }
};

// scores[head][i] = query[head] . key i, for all keys of a partition.
template <int kHeads, typename KV>
void score_keys(const Partition<KV>& partition, const float* query, int64_t head, float* scores) {
  for (int64_t t = 0; t < partition.padded; t += kLanes) {
    Vec fours[kHeads][kLanes / 4];
    float scales[kLanes];
    for (int four = 0; four < kLanes / 4; ++four) {
      const KV* keys[4];
      for (int key = 0; key < 4; ++key) {
        keys[key] = partition.key(t + four * 4 + key);
        if constexpr (kScaled<KV>) scales[four * 4 + key] = scale_of(keys[key], head);
      }
      Vec products[kHeads][4] = {};
      for (int64_t i = 0; i < head; i += kLanes) {
#pragma GCC unroll 4
        for (int key = 0; key < 4; ++key) {
          const Vec values = load(keys[key] + i);
#pragma GCC unroll 4
          for (int h = 0; h < kHeads; ++h) products[h][key] += load(query + h * head + i) * values;
        }
      }
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) fours[h][four] = sum_quarters(products[h]);
    }
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) {
      const Vec sums = sum_lanes(fours[h]);
      store(scores + h * kPartition + t, kScaled<KV> ? sums * load(scales) : sums);
    }
  }
}

// out[head][first ...] = sum over i of weights[head][i] * value i[first ...], kVecs vectors wide.
template <int kHeads, int kVecs, typename KV>
void add_values(const Partition<KV>& partition, const float* weights, int64_t first, int64_t head, float* out,
                int64_t out_stride) {
  Vec totals[kHeads][kVecs] = {};
  for (int64_t t = 0; t < partition.count; ++t) {
    const KV* row = partition.value(t);
    const float scale = scale_of(row, head);
    Vec values[kVecs];
    load_some<kVecs>(row + first, values);
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) {
      const float weight = weights[h * kPartition + t] * scale;
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) totals[h][j] += weight * values[j];
    }
  }
  for (int h = 0; h < kHeads; ++h) store_some<kVecs, KV>(totals[h], out + h * out_stride + first);
}

// Scores become weights, in place; the partial result's maximum and sum.
inline void weigh(float* scores, int64_t count, int64_t padded, float scale, float* partial) {
  for (int64_t i = count; i < padded; ++i) scores[i] = -INFINITY;
  Vec maxima = load(scores);
  for (int64_t i = kLanes; i < padded; i += kLanes) maxima = larger(load(scores + i), maxima);
  const float highest = largest(maxima) * scale;
  Vec total = {};
  for (int64_t i = 0; i < padded; i += kLanes) {
    const Vec weights = power_of_two(load(scores + i) * scale - highest);
    store(scores + i, weights);
    total += weights;
  }
  float surplus = 0;  // power_of_two() ends at 2^-126, which is not quite 0
  for (int64_t i = count; i < padded; ++i) surplus += scores[i];
  partial[0] = highest;
  partial[1] = sum(total) - surplus;
}

// kHeads query heads against a partition.
template <int kHeads, typename KV>
void attend_part(const TwinpoolShape& d, const Partition<KV>& partition, const float* query, float* partial) {
  const int64_t head = d.head_size;
  alignas(64) float scores[kHeads * kPartition];
  score_keys<kHeads>(partition, query, head, scores);
  for (int h = 0; h < kHeads; ++h)
    weigh(scores + h * kPartition, partition.count, partition.padded, d.attention_scale * kLog2E,
          partial + h * (2 + head));
  int64_t i = 0;
  for (; i + 4 * kLanes <= head; i += 4 * kLanes)
    add_values<kHeads, 4>(partition, scores, i, head, partial + 2, 2 + head);
  for (; i < head; i += kLanes) add_values<kHeads, 1>(partition, scores, i, head, partial + 2, 2 + head);
}

template <typename KV, int kHeads = kHeadTile>
void attend_part_of(int num_heads, const TwinpoolShape& d, const Partition<KV>& partition, const float* query,
                    float* partial) {
  if constexpr (kHeads > 1) {
    if (num_heads < kHeads) return attend_part_of<KV, kHeads - 1>(num_heads, d, partition, query, partial);
  }
  attend_part<kHeads>(d, partition, query, partial);
}

// Every query head of a KV head against tokens first .. first + count - 1 of a sequence, count <= kPartition.
template <typename KV>
void attend_partition(const TwinpoolShape& d, KV* cache, const TwinpoolSequence& s, int kv_head, int64_t first,
                      int64_t count, const float* query, float* partial) {
  const Partition<KV> partition(d, cache, s, kv_head, first, count);
  const int group = d.num_heads / d.num_kv_heads;
  const float* q = query + (static_cast<int64_t>(s.first_row) * d.num_heads + kv_head * group) * d.head_size;
  for (int h = 0; h < group; h += kHeadTile)
    attend_part_of(std::min(kHeadTile, group - h), d, partition, q + h * d.head_size, partial + h * (2 + d.head_size));
}

// Adds the parts of one KV head's query heads up, into rows of the step's attention output.
inline void merge_partitions(const TwinpoolShape& d, const float* partials, int64_t num_parts, float* out) {
  const int64_t head = d.head_size, size = partial_size(d);
  for (int h = 0; h < d.num_heads / d.num_kv_heads; ++h, out += head) {
    const float* first = partials + h * (2 + head);
    float highest = first[0], total = 0;
    for (int64_t part = 1; part < num_parts; ++part) highest = std::max(highest, first[part * size]);
    std::memset(out, 0, head * sizeof(float));
    for (int64_t part = 0; part < num_parts; ++part) {
      const float* found = first + part * size;
      const float factor = std::exp2(found[0] - highest);
      total += factor * found[1];
      for (int64_t i = 0; i < head; ++i) out[i] += factor * found[2 + i];
    }
    for (int64_t i = 0; i < head; ++i) out[i] /= total;
  }
}

}  // namespace
