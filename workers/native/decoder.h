// A decoder's weights, and the memory that its steps work in.
#pragma once

#include "attention.h"
#include "interface.h"
#include "linear.h"

namespace {

struct Layer {
  Linear linears[kDown + 1];
  std::vector<float> norms[kKeyNorm + 1];
};

// Up to so many rows every thread normalizes and converts for itself: that is sooner done than to wait for others.
constexpr int64_t kOwnRows = 4;

// What each thread of a team has for itself.
struct ThreadMemory {
  Scratch<> attention, normed;
  Converter converter;
};

struct Decoder {
  TwinpoolShape shape;
  WeightMemory weights;
  std::vector<Layer> layers;
  Linear head, embedding;  // no embedding when it is tied to the head
  std::vector<float> final_norm;
  Scratch<> hidden, sampled, normed, query, key, value, attended, gated_rows, rank_sum, partials;
  Converter converter;
  std::vector<ThreadMemory> per_thread;
  bool is_rank_lost = false;

  Format format() const { return static_cast<Format>(shape.weight_format); }

  // The head has no layer after it that could forgive what 4 bits cost: 6 % of the default model's perplexity.
  Format head_format() const { return format() == kInt4 ? kInt8 : format(); }
};

// What a step works on: rows of activations, [num_rows][...] each, and what attention's parts leave.
struct Buffers {
  float *hidden, *sampled, *normed, *query, *key, *value, *attended, *gated, *rank_sum, *partials;
};

// All memory of a step, before its threads begin: none of them may throw.
inline Buffers reserve(Decoder& m, const TwinpoolStep& step, const AttentionPlan& plan, int num_threads) {
  const TwinpoolShape& d = m.shape;
  const int64_t rows = std::max(step.num_rows, step.num_sampled), size = d.hidden_size;
  const int64_t query_size = static_cast<int64_t>(d.num_heads) * d.head_size;
  const int64_t kv_size = static_cast<int64_t>(d.num_kv_heads) * d.head_size;
  const int64_t longest = std::max({size, query_size, static_cast<int64_t>(d.intermediate_size)});
  if (static_cast<int>(m.per_thread.size()) < num_threads) m.per_thread.resize(num_threads);
  for (const Format format : {m.format(), m.head_format()}) {
    m.converter.reserve(rows, longest, format);
    for (ThreadMemory& own : m.per_thread) own.converter.reserve(kOwnRows, longest, format);
  }
  for (ThreadMemory& own : m.per_thread) {
    own.normed.get(kOwnRows * size);
    own.attention.get(work_floats(d, step, plan));
  }
  return {m.hidden.get(rows * size),
          m.sampled.get(step.num_sampled * size),
          m.normed.get(rows * size),
          m.query.get(rows * query_size),
          m.key.get(rows * kv_size),
          m.value.get(rows * kv_size),
          m.attended.get(rows * query_size),
          m.gated_rows.get(rows * d.intermediate_size),
          m.rank_sum.get(step.group != nullptr ? rows * size : 0),
          m.partials.get(plan.num_parts * partial_size(d))};
}

}  // namespace
