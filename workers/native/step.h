// A step, as every thread of a team computes it: the same calls in the same order, each doing its share.
#pragma once

#include "all_reduce.h"
#include "decoder.h"
#include "likeliest.h"
#include "norms.h"
#include "team.h"

#include <unistd.h>

namespace {

// Number: what attention multiplies prompts in, see AttentionLayer::attend(). KV: a number of the cache.
template <typename Number, typename KV>
class StepThread {
 public:
  StepThread(Decoder& decoder, const TwinpoolStep& step, const AttentionPlan& plan, const Buffers& buffers, Team& team,
             int index)
      : m(decoder), d(decoder.shape), step(step), plan(plan), b(buffers), member(team, index, step.parts),
        own(decoder.per_thread[index]) {}

  // A lost rank ends it early, and is noted in the decoder.
  void run() {
    float* x = b.hidden;
    if (!embed(x)) return;
    for (int32_t index = 0; index < d.num_layers; ++index) {
      // After the last layer's keys and values, only the rows whose logits are asked for go on; a group's ranks keep
      // all, so that each hears of the others'.
      const bool is_cut = index + 1 == d.num_layers && step.group == nullptr;
      project(index, x);
      write_new_keys(index);
      if (is_cut && step.num_sampled == 0 && !plan.writes_while_attending) return;
      attend(index);
      const float* attended = b.attended;
      if (is_cut) {
        gather_sampled(attended, m.layers[index].linears[kOutput].depth, b.query);
        gather_sampled(x, d.hidden_size, b.sampled);
        member.wait();
        x = b.sampled;
        attended = b.query;
      }
      if (!finish_layer(index, attended, x, is_cut ? step.num_sampled : step.num_rows)) return;
    }
    if (step.group != nullptr) {
      gather_sampled(x, d.hidden_size, b.sampled);
      member.wait();
      x = b.sampled;
    }
    const Activations input = normalize(x, m.final_norm, step.num_sampled, m.head_format());
    linear<false>(member, m.head, input, step.num_sampled, step.logits);
    const Range rows = member.share(step.num_sampled);
    for (int64_t row = rows.first; row < rows.last; ++row)
      step.likeliest[row] = likeliest(step.logits + row * d.vocab_size, d.vocab_size);
    member.finish(kPartHead);
  }

 private:
  // x = the tokens' rows of the embedding, of which every rank holds a range. False when a rank is lost.
  bool embed(float* x) {
    const Linear& embedding = m.embedding.columns > 0 ? m.embedding : m.head;
    const int64_t size = d.hidden_size;
    const Range rows = member.share(step.num_rows);
    for (int64_t row = rows.first; row < rows.last; ++row) {
      const int64_t token = step.token_ids[row] - d.first_token;
      float* to = (step.group == nullptr ? x : b.rank_sum) + row * size;
      if (token < 0 || token >= d.vocab_size)
        std::fill(to, to + size, 0.0f);
      else
        embedding.row(token, to);
      if (step.group != nullptr) std::fill(x + row * size, x + (row + 1) * size, 0.0f);
    }
    member.wait();
    const bool is_whole = step.group == nullptr || add_ranks(b.rank_sum, step.num_rows * size, x);
    member.finish(kPartEmbedding);
    return is_whole;
  }

  void project(int32_t index, const float* x) {
    const Layer& layer = m.layers[index];
    const Activations input = normalize(x, layer.norms[kInputNorm], step.num_rows, m.format());
    linears<false>(member,
                   {Output{&layer.linears[kQuery], b.query}, Output{&layer.linears[kKey], b.key},
                    Output{&layer.linears[kValue], b.value}},
                   input, step.num_rows);
    member.finish(kPartLinears);
  }

  AttentionLayer<KV> attention_of(int32_t index) const {
    const Layer& layer = m.layers[index];
    return {d, step, plan, layer.norms[kQueryNorm], layer.norms[kKeyNorm], static_cast<KV*>(step.cache_layers[index]),
            b.query, b.key, b.value, b.partials, b.attended};
  }

  void write_new_keys(int32_t index) {
    const AttentionLayer<KV> attention = attention_of(index);
    member.take_turns(plan.prepares.size(), [&](int64_t i) {
      const Work& work = plan.prepares[i];
      attention.prepare(work, work.first, work.count);
    });
    if (!plan.writes_while_attending && step.group == nullptr) tell_layers_done(index + 1);
    member.finish(kPartAttention);
  }

  void attend(int32_t index) {
    const AttentionLayer<KV> attention = attention_of(index);
    float* memory = own.attention.get(0);
    member.take_turns(plan.items.size(), [&](int64_t i) { attention.template attend<Number>(plan.items[i], memory); });
    if (plan.writes_while_attending && step.group == nullptr) tell_layers_done(index + 1);
    member.take_turns(plan.merges.size(), [&](int64_t i) { attention.merge(plan.merges[i]); });
    member.finish(kPartAttention);
  }

  // Attention's output projection and the MLP, added to x. False when a rank is lost.
  bool finish_layer(int32_t index, const float* attended, float* x, int64_t rows) {
    const Layer& layer = m.layers[index];
    const Linear &output = layer.linears[kOutput], &down = layer.linears[kDown];
    if (!add_linear(output, convert(attended, rows, output.depth), rows, x)) return false;
    if (step.group != nullptr) tell_layers_done(index + 1);  // the other ranks' KV is written too
    gated(member, layer.linears[kGate], layer.linears[kUp], normalize(x, layer.norms[kPostNorm], rows, m.format()), rows,
          b.gated);
    member.finish(kPartLinears);
    return add_linear(down, convert(b.gated, rows, d.intermediate_size), rows, x);
  }

  // x += layer(input), summed over the ranks that share out the layer's depth. False when a rank is lost.
  bool add_linear(const Linear& layer, const Activations& input, int64_t rows, float* x) {
    bool is_whole = true;
    if (step.group == nullptr) {
      linear<true>(member, layer, input, rows, x);
    } else {
      linear<false>(member, layer, input, rows, b.rank_sum);
      is_whole = add_ranks(b.rank_sum, rows * layer.columns, x);
    }
    member.finish(kPartLinears);
    return is_whole;
  }

  // x += the sum of every rank's `partial`; waits. False when a rank is lost.
  bool add_ranks(const float* partial, int64_t count, float* x) {
    if (member.is_first()) m.is_rank_lost = !AllReduce(*step.group).add(partial, count, x);
    member.wait();
    return !m.is_rank_lost;
  }

  // Normalized rows of x, as a layer of `format` wants them. Waits, unless each thread does all of them for itself.
  Activations normalize(const float* x, const std::vector<float>& weight, int64_t rows, Format format) {
    const int64_t size = d.hidden_size;
    float* normed = is_own(rows) ? own.normed.get(0) : b.normed;
    return make_rows(normed, rows, size, format, [&](int64_t row) {
      rms_norm(x + row * size, weight, d.norm_epsilon, size, normed + row * size);
    });
  }

  // The same of rows that are there.
  Activations convert(const float* x, int64_t rows, int64_t depth) {
    if (m.format() == kFloat32) return m.converter.all(x, depth, kFloat32);
    return make_rows(x, rows, depth, m.format(), [](int64_t) {});
  }

  // Rows of x, converted after `make` has made them.
  template <typename Make>
  Activations make_rows(const float* x, int64_t rows, int64_t depth, Format format, Make&& make) {
    Converter& converter = is_own(rows) ? own.converter : m.converter;
    const Range mine = is_own(rows) ? Range{0, rows} : member.share(rows);
    for (int64_t row = mine.first; row < mine.last; ++row) {
      make(row);
      converter.convert(x + row * depth, row, rows, depth, format);
    }
    if (!is_own(rows)) member.wait();
    member.finish(kPartNorms);
    return converter.all(x, depth, format);
  }

  static bool is_own(int64_t rows) { return rows <= kOwnRows; }

  // to[i] = from[sampled row i], so that what nobody asks for is not computed. `from` and `to` do not overlap.
  void gather_sampled(const float* from, int64_t size, float* to) {
    const Range rows = member.share(step.num_sampled);
    for (int64_t i = rows.first; i < rows.last; ++i)
      std::memcpy(to + i * size, from + step.sampled_rows[i] * size, size * sizeof(float));
  }

  // Whoever sends the KV on may read it from here on. A full pipe has woken its reader already.
  void tell_layers_done(int64_t num_layers) {
    if (!member.is_first() || step.layers_done == nullptr) return;
    __atomic_store_n(step.layers_done, num_layers, __ATOMIC_RELEASE);
    const char byte = 1;
    if (write(static_cast<int>(step.wake_fd), &byte, 1) < 0) return;
  }

  Decoder& m;
  const TwinpoolShape& d;
  const TwinpoolStep& step;
  const AttentionPlan& plan;
  const Buffers& b;
  Member member;
  ThreadMemory& own;
};

}  // namespace
