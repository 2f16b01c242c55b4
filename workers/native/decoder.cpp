// One step of a decoder-only transformer on a CPU, in one call: embedding, every layer, final norm, logits.
//
// Built several times from this file, once per instruction set (see setup.py); workers/native/library.py chooses at
// run time. Vectors are GCC vector extensions, so the same source gives AVX2, AVX-512 or NEON code.
//
//     vectors.h   vectors, bfloat16, exp         packed.h, activations.h, products.h, linear.h   linear layers
//     interface.h what callers hand over         kv_cache.h    the paged KV cache
//     attention.h the work of a step, split; decode_attention.h, prompt_attention.h   the two kinds of it
//     all_reduce.h  sums over tensor-parallel ranks

#include "all_reduce.h"
#include "attention.h"
#include "interface.h"
#include "linear.h"
#include "vectors.h"

#include <unistd.h>

namespace {

void rms_norm(const float* x, const std::vector<float>& weight, float epsilon, int64_t size, float* out) {
  Vec squares = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) squares += load(x + i) * load(x + i);
  float total = sum(squares);
  for (; i < size; ++i) total += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(total / static_cast<float>(size) + epsilon);
  for (i = 0; i < size; ++i) out[i] = x[i] * scale * weight[i];
}

// Turns pairs (i, i + size/2) by the position's angle (Su et al.: RoFormer, 2021), in the half-split layout.
void rotate(float* x, const float* cosine, const float* sine, int64_t size) {
  const int64_t half = size / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float first = x[i], second = x[i + half];
    x[i] = first * cosine[i] - second * sine[i];
    x[i + half] = second * cosine[i + half] + first * sine[i + half];
  }
}

struct Layer {
  Linear linears[kDown + 1];
  std::vector<float> norms[kKeyNorm + 1];
};

struct Decoder {
  TwinpoolShape shape;
  std::vector<Layer> layers;
  Linear head, embedding;  // no embedding when it is tied to the head
  std::vector<float> final_norm;
  Scratch<> hidden, normed, query, key, value, attended, gated_rows, rank_sum, partials;
  Converter converter;
  std::vector<Scratch<>> per_thread;
  bool is_rank_lost = false;
};

// What a step works on: rows of activations, [num_rows][...] each, and what attention's parts leave.
struct Buffers {
  float *hidden, *normed, *query, *key, *value, *attended, *gated, *rank_sum, *partials;
};

Format head_format(const TwinpoolShape& d) {
  // The head has no layer after it that could forgive what 4 bits cost: 6 % of the default model's perplexity.
  return d.weight_format == kInt4 ? kInt8 : static_cast<Format>(d.weight_format);
}

Buffers reserve(Decoder& m, const TwinpoolStep& step, int64_t num_parts, int num_threads) {
  const TwinpoolShape& d = m.shape;
  const int64_t rows = std::max(step.num_rows, step.num_sampled), size = d.hidden_size;
  const int64_t query_size = static_cast<int64_t>(d.num_heads) * d.head_size;
  const int64_t kv_size = static_cast<int64_t>(d.num_kv_heads) * d.head_size;
  const int64_t longest = std::max({size, query_size, static_cast<int64_t>(d.intermediate_size)});
  if (static_cast<int>(m.per_thread.size()) < num_threads) m.per_thread.resize(num_threads);
  m.converter.reserve(rows, longest, static_cast<Format>(d.weight_format));
  m.converter.reserve(rows, longest, head_format(d));
  return {m.hidden.get(rows * size),         m.normed.get(rows * size),
          m.query.get(rows * query_size),    m.key.get(rows * kv_size),
          m.value.get(rows * kv_size),       m.attended.get(rows * query_size),
          m.gated_rows.get(rows * d.intermediate_size),
          m.rank_sum.get(step.group != nullptr ? rows * size : 0),
          m.partials.get(num_parts * partial_size(d))};
}

std::vector<int64_t> positions_of(const TwinpoolStep& step) {
  std::vector<int64_t> positions(step.num_rows);
  for (int64_t index = 0; index < step.num_sequences; ++index) {
    const TwinpoolSequence& s = step.sequences[index];
    for (int32_t i = 0; i < s.num_rows; ++i) positions[s.first_row + i] = s.start + i;
  }
  return positions;
}

// The functions from here to run() are called by every thread of a team, and wait for all of them.

Activations normalize(Decoder& m, const float* x, const std::vector<float>& weight, int64_t rows, Format format,
                      float* out) {
  const int64_t size = m.shape.hidden_size;
#pragma omp for schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    rms_norm(x + row * size, weight, m.shape.norm_epsilon, size, out + row * size);
    m.converter.convert(out + row * size, row, size, format);
  }
  return m.converter.all(out, size, format);
}

Activations convert(Decoder& m, const float* x, int64_t rows, int64_t depth) {
  const Format format = static_cast<Format>(m.shape.weight_format);
  if (format != kFloat32) {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) m.converter.convert(x + row * depth, row, depth, format);
  }
  return m.converter.all(x, depth, format);
}

// x += the sum of every rank's `partial`. False when a rank is lost.
bool add_ranks(Decoder& m, const TwinpoolStep& step, const float* partial, int64_t count, float* x) {
#pragma omp master
  m.is_rank_lost = !AllReduce(*step.group).add(partial, count, x);
#pragma omp barrier
  return !m.is_rank_lost;
}

// x += layer(input), summed over the ranks that share out the layer's depth. False when a rank is lost.
bool add_linear(Decoder& m, const TwinpoolStep& step, const Linear& layer, const Activations& input, int64_t rows,
                float* x, float* rank_sum) {
  if (step.group == nullptr) {
    linear<true>(layer, input, rows, x);
    return true;
  }
  linear<false>(layer, input, rows, rank_sum);
  return add_ranks(m, step, rank_sum, rows * layer.columns, x);
}

// x = the tokens' rows of the embedding, of which every rank holds a range. False when a rank is lost.
bool embed(Decoder& m, const TwinpoolStep& step, float* x, float* rank_sum) {
  const Linear& embedding = m.embedding.columns > 0 ? m.embedding : m.head;
  const int64_t size = m.shape.hidden_size;
#pragma omp for schedule(static)
  for (int64_t row = 0; row < step.num_rows; ++row) {
    const int64_t token = step.token_ids[row] - m.shape.first_token;
    float* to = (step.group == nullptr ? x : rank_sum) + row * size;
    if (token < 0 || token >= m.shape.vocab_size)
      std::fill(to, to + size, 0.0f);
    else
      embedding.row(token, to);
    if (step.group != nullptr) std::fill(x + row * size, x + (row + 1) * size, 0.0f);
  }
  return step.group == nullptr || add_ranks(m, step, rank_sum, step.num_rows * size, x);
}

void prepare_heads(const Layer& layer, const TwinpoolShape& d, const TwinpoolStep& step,
                   const std::vector<int64_t>& positions, float* query, float* key) {
#pragma omp for schedule(static)
  for (int64_t row = 0; row < step.num_rows; ++row) {
    const float *cosine = step.cosine + positions[row] * d.head_size, *sine = step.sine + positions[row] * d.head_size;
    for (int which = 0; which < 2; ++which) {
      const int num_heads = which == 0 ? d.num_heads : d.num_kv_heads;
      const std::vector<float>& norm = layer.norms[which == 0 ? kQueryNorm : kKeyNorm];
      float* x = (which == 0 ? query : key) + row * num_heads * d.head_size;
      for (int head = 0; head < num_heads; ++head, x += d.head_size) {
        if (!norm.empty()) rms_norm(x, norm, d.norm_epsilon, d.head_size, x);
        rotate(x, cosine, sine, d.head_size);
      }
    }
  }
}

// Whoever sends the KV on may read it from here on. A full pipe has woken its reader already.
void tell_layers_done(const TwinpoolStep& step, int64_t num_layers) {
  if (step.layers_done == nullptr) return;
  __atomic_store_n(step.layers_done, num_layers, __ATOMIC_RELEASE);
  const char byte = 1;
  if (write(static_cast<int>(step.wake_fd), &byte, 1) < 0) return;
}

// rows[i] = rows[chosen[i]], so that what nobody asks for is not computed. `from` and `to` do not overlap.
void gather_rows(const float* from, const int64_t* chosen, int64_t count, int64_t size, float* to) {
#pragma omp for schedule(static)
  for (int64_t i = 0; i < count; ++i) std::memcpy(to + i * size, from + chosen[i] * size, size * sizeof(float));
}

// Attention's output projection and the MLP, added to x. False when a rank is lost.
bool finish_layer(Decoder& m, const TwinpoolStep& step, int32_t index, const float* attended, float* x, int64_t rows,
                  float* normed, const Buffers& b) {
  const TwinpoolShape& d = m.shape;
  const Layer& layer = m.layers[index];
  const Linear &output = layer.linears[kOutput], &down = layer.linears[kDown];
  if (!add_linear(m, step, output, convert(m, attended, rows, output.depth), rows, x, b.rank_sum)) return false;
#pragma omp master
  if (step.group != nullptr) tell_layers_done(step, index + 1);  // the other ranks' KV is written too
  const Format format = static_cast<Format>(d.weight_format);
  const Activations input = normalize(m, x, layer.norms[kPostNorm], rows, format, normed);
  gated(layer.linears[kGate], layer.linears[kUp], input, rows, b.gated);
  return add_linear(m, step, down, convert(m, b.gated, rows, d.intermediate_size), rows, x, b.rank_sum);
}

// Number: what attention multiplies prompts in, see attend(). False when a rank is lost.
template <typename Number, typename KV>
bool run_team(Decoder& m, const TwinpoolStep& step, const AttentionPlan& plan, const std::vector<int64_t>& positions,
              const Buffers& b) {
  const TwinpoolShape& d = m.shape;
  const Format format = static_cast<Format>(d.weight_format);
  float *x = b.hidden, *normed = b.normed;
  if (!embed(m, step, x, b.rank_sum)) return false;
  for (int32_t index = 0; index < d.num_layers; ++index) {
    const Layer& layer = m.layers[index];
    KV* cache = static_cast<KV*>(step.cache_layers[index]);
    const Activations input = normalize(m, x, layer.norms[kInputNorm], step.num_rows, format, normed);
    linears<false>({Output{&layer.linears[kQuery], b.query}, Output{&layer.linears[kKey], b.key},
                    Output{&layer.linears[kValue], b.value}},
                   input, step.num_rows);
    prepare_heads(layer, d, step, positions, b.query, b.key);
    write_cache(d, cache, step, b.key, b.value);
#pragma omp master
    if (step.group == nullptr) tell_layers_done(step, index + 1);
    // After the last layer's keys and values, only the rows whose logits are asked for go on; a group's ranks keep
    // all, so that each hears of the others'.
    const bool is_cut = index + 1 == d.num_layers && step.group == nullptr;
    if (is_cut && step.num_sampled == 0) return true;
    attend<Number>(d, step, plan, cache, b.query, b.attended, b.partials, m.per_thread);
    const float* attended = b.attended;
    if (is_cut) {
      gather_rows(attended, step.sampled_rows, step.num_sampled, layer.linears[kOutput].depth, b.query);
      gather_rows(x, step.sampled_rows, step.num_sampled, d.hidden_size, normed);
      std::swap(x, normed);
      attended = b.query;
    }
    if (!finish_layer(m, step, index, attended, x, is_cut ? step.num_sampled : step.num_rows, normed, b)) return false;
  }
  if (step.group != nullptr) {
    gather_rows(x, step.sampled_rows, step.num_sampled, d.hidden_size, normed);
    std::swap(x, normed);
  }
  linear<false>(m.head, normalize(m, x, m.final_norm, step.num_sampled, head_format(d), normed), step.num_sampled,
                step.logits);
  return true;
}

template <typename Number, typename KV>
bool run(Decoder& m, const TwinpoolStep& step, int num_threads) {
  const AttentionPlan plan = split_attention(m.shape, step);
  const std::vector<int64_t> positions = positions_of(step);
  const Buffers buffers = reserve(m, step, plan.num_parts, num_threads);
  m.is_rank_lost = false;
  // One region for the whole step: a barrier costs less than a region, and there are hundreds of either.
#pragma omp parallel num_threads(num_threads)
  run_team<Number, KV>(m, step, plan, positions, buffers);
  return !m.is_rank_lost;
}

// Where weights and activations are rounded, prompts' attention rounds as bfloat16 does, if there are instructions.
template <typename KV>
bool run_with(Decoder& m, const TwinpoolStep& step, int num_threads) {
  if constexpr (kHasPairProducts) {
    if (m.shape.weight_format != kFloat32) return run<uint16_t, KV>(m, step, num_threads);
  }
  return run<float, KV>(m, step, num_threads);
}

}  // namespace

extern "C" {

// Compared with library.py's number: another one means that the library was built from another version of this file.
int twinpool_interface() { return 6; }

// Shared memory that a tensor-parallel group of `size` ranks needs.
int64_t twinpool_group_bytes(int size) { return group_bytes(size); }

void* twinpool_create(const TwinpoolShape* shape) {
  Decoder* m = new (std::nothrow) Decoder;
  if (m != nullptr) {
    m->shape = *shape;
    m->layers.resize(shape->num_layers);
  }
  return m;
}

void twinpool_destroy(void* decoder) { delete static_cast<Decoder*>(decoder); }

// weight: [columns][depth]; bias: [columns] or null. The caller's memory is not kept. Returns 0, or 1 without memory.
int twinpool_set_linear(void* decoder, int layer, int which, const float* weight, const float* bias, int64_t columns,
                        int64_t depth) {
  Decoder* m = static_cast<Decoder*>(decoder);
  try {
    const bool in_layer = which < kHead;
    Linear& linear = which == kHead ? m->head : which == kEmbedding ? m->embedding : m->layers[layer].linears[which];
    linear.pack(weight, columns, depth,
                in_layer ? static_cast<Format>(m->shape.weight_format) : head_format(m->shape));
    if (bias != nullptr) {
      linear.bias.assign(panels_of(columns) * kPanel, 0.0f);
      std::copy(bias, bias + columns, linear.bias.begin());
    }
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

void twinpool_set_vector(void* decoder, int layer, int which, const float* values, int64_t size) {
  Decoder* m = static_cast<Decoder*>(decoder);
  (which == kFinalNorm ? m->final_norm : m->layers[layer].norms[which]).assign(values, values + size);
}

// Returns 0, 1 without memory for the step, or 2 when another rank of the group is lost.
int twinpool_step(void* decoder, const TwinpoolStep* step, int num_threads) {
  try {
    Decoder& m = *static_cast<Decoder*>(decoder);
    bool is_whole = false;
    switch (m.shape.cache_format) {
      case kCacheFloat32:
        is_whole = run_with<float>(m, *step, num_threads);
        break;
      case kCacheBfloat16:
        is_whole = run_with<uint16_t>(m, *step, num_threads);
        break;
      case kCacheInt8:
        is_whole = run_with<Int8>(m, *step, num_threads);
        break;
      default:
        is_whole = run_with<Fp8>(m, *step, num_threads);
    }
    return is_whole ? 0 : 2;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
}
