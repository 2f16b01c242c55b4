// Paged attention of a step: new keys and values into the cache, then every query against its own sequence up to itself,
// split into pieces of work for the threads.
//
// No piece depends on what else is in the step or on the number of threads, and so no result does.
#pragma once

#include "decode_attention.h"
#include "interface.h"
#include "norms.h"
#include "prompt_attention.h"
#include "team.h"

namespace {

// Of one sequence and KV head: some of its new tokens, some queries of a prompt chunk, or some keys of a sequence that
// decodes.
struct Work {
  int32_t sequence, kv_head;
  int64_t first, count;
  int64_t part;  // decoding, of more than one part: index of the partial result, else -1
};

// The partial results of one decoding sequence and KV head.
struct Merge {
  int32_t sequence, kv_head;
  int64_t first_part, num_parts;
};

// What there is to do, in order. A sequence that decodes and whose keys are one part is prepared and attended to in one
// piece, so that few such steps need to wait for each other.
struct AttentionPlan {
  std::vector<Work> prepares;  // new tokens whose keys others read
  std::vector<Work> items;
  std::vector<Merge> merges;
  int64_t num_parts = 0;
  bool writes_while_attending = false;  // some items write keys and values too
};

constexpr int64_t kPreparedRows = 64;

// The cache's blocks are not divided: who writes the first token of one clears it.
inline void split_prepares(const TwinpoolShape& d, const TwinpoolSequence& s, const Work& head, AttentionPlan& plan) {
  const int64_t span = d.block_size * std::max<int64_t>(1, kPreparedRows / d.block_size), end = s.start + s.num_rows;
  for (int64_t at = s.start, next; at < end; at = next) {
    next = std::min<int64_t>(end, (at / span + 1) * span);
    plan.prepares.push_back({head.sequence, head.kv_head, at - s.start, next - at, -1});
  }
}

inline void split_head(const TwinpoolShape& d, const TwinpoolSequence& s, const Work& head, AttentionPlan& plan) {
  const bool decodes = s.num_rows == 1;
  const int64_t count = decodes ? s.start + 1 : s.num_rows, block = decodes ? kPartition : kQueryBlock;
  const bool is_divided = decodes && count > kPartition;
  if (is_divided) plan.merges.push_back({head.sequence, head.kv_head, plan.num_parts, (count + block - 1) / block});
  if (is_divided || !decodes)
    split_prepares(d, s, head, plan);
  else
    plan.writes_while_attending = true;
  for (int64_t first = 0; first < count; first += block)
    plan.items.push_back(
        {head.sequence, head.kv_head, first, std::min(block, count - first), is_divided ? plan.num_parts++ : -1});
}

inline AttentionPlan split_attention(const TwinpoolShape& d, const TwinpoolStep& step) {
  AttentionPlan plan;
  for (int32_t index = 0; index < step.num_sequences; ++index)
    for (int32_t kv_head = 0; kv_head < d.num_kv_heads; ++kv_head)
      split_head(d, step.sequences[index], {index, kv_head, 0, 0, -1}, plan);
  // Later queries see more keys: the longest first, so that the threads end together.
  const auto cost = [&](const Work& work) {
    const TwinpoolSequence& s = step.sequences[work.sequence];
    return s.num_rows == 1 ? work.count : (s.start + work.first + work.count) * work.count;
  };
  std::stable_sort(plan.items.begin(), plan.items.end(),
                   [&](const Work& a, const Work& b) { return cost(a) > cost(b); });
  return plan;
}

// The memory that a thread needs for any of the pieces.
inline int64_t work_floats(const TwinpoolShape& d, const TwinpoolStep& step, const AttentionPlan& plan) {
  int64_t num_queries = 0;
  for (const Work& work : plan.items)
    if (step.sequences[work.sequence].num_rows > 1) num_queries = std::max(num_queries, work.count);
  const int64_t group = d.num_heads / d.num_kv_heads;
  return std::max(partial_size(d), num_queries > 0 ? PromptBuffers<float>::num_floats(d, group * num_queries) : 0);
}

// Attention of one layer.
template <typename KV>
struct AttentionLayer {
  const TwinpoolShape& d;
  const TwinpoolStep& step;
  const AttentionPlan& plan;
  const std::vector<float>&query_norm, &key_norm;  // empty: none
  KV* cache;
  float *query, *key, *value;  // projections of the step's rows; queries and keys are turned in place
  float* partials;
  float* out;

  // Normalizes and turns some new tokens' queries and key of one KV head, and writes the key and value to the cache.
  void prepare(const Work& work, int64_t first, int64_t count) const {
    const TwinpoolSequence& s = step.sequences[work.sequence];
    const int64_t size = d.head_size, group = d.num_heads / d.num_kv_heads;
    for (int64_t i = first; i < first + count; ++i) {
      const int64_t row = s.first_row + i, at = (s.start + i) * size;
      float* queries = query + (row * d.num_heads + work.kv_head * group) * size;
      for (int64_t head = 0; head < group; ++head) turn(queries + head * size, query_norm, at);
      turn(key + (row * d.num_kv_heads + work.kv_head) * size, key_norm, at);
    }
    write_head(d, cache, s, work.kv_head, first, count, key, value);
  }

  // Number: what prompts are multiplied in, float or uint16_t for bfloat16. `memory`: work_floats() of them.
  template <typename Number>
  void attend(const Work& work, float* memory) const {
    const TwinpoolSequence& s = step.sequences[work.sequence];
    if (s.num_rows > 1)
      return attend_queries<Number>(d, cache, s, work.kv_head, work.first, work.count, query, out, memory);
    const bool is_whole = work.part < 0;
    if (is_whole) prepare(work, 0, 1);
    float* partial = is_whole ? memory : partials + work.part * partial_size(d);
    attend_partition(d, cache, s, work.kv_head, work.first, work.count, query, partial);
    if (is_whole) merge_partitions(d, partial, 1, out_of(work.sequence, work.kv_head));
  }

  void merge(const Merge& merge) const {
    merge_partitions(d, partials + merge.first_part * partial_size(d), merge.num_parts,
                     out_of(merge.sequence, merge.kv_head));
  }

 private:
  void turn(float* x, const std::vector<float>& norm, int64_t at) const {
    if (!norm.empty()) rms_norm(x, norm, d.norm_epsilon, d.head_size, x);
    rotate(x, step.cosine + at, step.sine + at, d.head_size);
  }

  float* out_of(int32_t sequence, int32_t kv_head) const {
    const int64_t row = step.sequences[sequence].first_row;
    return out + (row * d.num_kv_heads + kv_head) * (d.num_heads / d.num_kv_heads) * d.head_size;
  }
};

}  // namespace
