// Paged attention: every query against its own sequence up to itself, split into pieces of work for the threads.
//
// No piece depends on what else is in the step or on the number of threads, and so no result does.
#pragma once

#include "decode_attention.h"
#include "interface.h"
#include "prompt_attention.h"

namespace {

// Of one sequence and KV head: some queries of a prompt chunk, or some keys of a sequence that decodes.
struct Work {
  int32_t sequence, kv_head;
  int64_t first, count;
  int64_t part;  // decoding: index of the partial result
};

// The partial results of one decoding sequence and KV head.
struct Merge {
  int32_t sequence, kv_head;
  int64_t first_part, num_parts;
};

struct AttentionPlan {
  std::vector<Work> items;
  std::vector<Merge> merges;
  int64_t num_parts = 0;
};

AttentionPlan split_attention(const TwinpoolShape& d, const TwinpoolStep& step) {
  AttentionPlan plan;
  for (int32_t index = 0; index < step.num_sequences; ++index) {
    const TwinpoolSequence& s = step.sequences[index];
    const bool decodes = s.num_rows == 1;
    const int64_t count = decodes ? s.start + 1 : s.num_rows, block = decodes ? kPartition : kQueryBlock;
    for (int32_t kv_head = 0; kv_head < d.num_kv_heads; ++kv_head) {
      if (decodes) plan.merges.push_back({index, kv_head, plan.num_parts, (count + block - 1) / block});
      for (int64_t first = 0; first < count; first += block)
        plan.items.push_back({index, kv_head, first, std::min(block, count - first), decodes ? plan.num_parts++ : 0});
    }
  }
  // Later queries see more keys: the longest first, so that the threads end together.
  const auto cost = [&](const Work& work) {
    const TwinpoolSequence& s = step.sequences[work.sequence];
    return s.num_rows == 1 ? work.count : (s.start + work.first + work.count) * work.count;
  };
  std::stable_sort(plan.items.begin(), plan.items.end(),
                   [&](const Work& a, const Work& b) { return cost(a) > cost(b); });
  return plan;
}

// Called by every thread of a team; waits. Number: what prompts are multiplied in, float or uint16_t for bfloat16.
template <typename Number, typename KV>
void attend(const TwinpoolShape& d, const TwinpoolStep& step, const AttentionPlan& plan, KV* cache, const float* query,
            float* out, float* partials, std::vector<Scratch<>>& per_thread) {
  const int64_t size = partial_size(d), group_size = static_cast<int64_t>(d.num_heads / d.num_kv_heads) * d.head_size;
#pragma omp for schedule(dynamic)
  for (size_t i = 0; i < plan.items.size(); ++i) {
    const Work& work = plan.items[i];
    const TwinpoolSequence& s = step.sequences[work.sequence];
    if (s.num_rows == 1)
      attend_partition(d, cache, s, work.kv_head, work.first, work.count, query, partials + work.part * size);
    else
      attend_queries<Number>(d, cache, s, work.kv_head, work.first, work.count, query, out,
                             per_thread[omp_get_thread_num()]);
  }
#pragma omp for schedule(static)
  for (size_t i = 0; i < plan.merges.size(); ++i) {
    const Merge& merge = plan.merges[i];
    const int64_t row = step.sequences[merge.sequence].first_row;
    merge_partitions(d, partials + merge.first_part * size, merge.num_parts,
                     out + (row * d.num_kv_heads + merge.kv_head) * group_size);
  }
}

}  // namespace
