// One step of a decoder-only transformer on a CPU, in one call: embedding, every layer, final norm, logits.
//
// Built several times from this file, once per instruction set (see setup.py); workers/native/library.py chooses at
// run time. Vectors are GCC vector extensions, so the same source gives AVX2, AVX-512 or NEON code.
//
//     vectors.h   vectors, bfloat16, exp         linear.h   packed weights and their products
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
  Linear head;
  std::vector<float> embedding;  // empty when tied to the head
  std::vector<float> final_norm;
  Scratch<> hidden, normed, query, key, value, attended, gated_rows, rank_sum, partials;
  Converter converter;
  std::vector<Scratch<>> per_thread;
};

void norm_rows(const float* x, const std::vector<float>& weight, float epsilon, int64_t rows, int64_t size, float* out,
               int num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (int64_t row = 0; row < rows; ++row) rms_norm(x + row * size, weight, epsilon, size, out + row * size);
}

void prepare_heads(const Layer& layer, const TwinpoolShape& d, const TwinpoolStep& step, float* query, float* key,
                   int num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (int64_t row = 0; row < step.num_rows; ++row) {
    const float *cosine = step.cosine + row * d.head_size, *sine = step.sine + row * d.head_size;
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

// x += layer(input), summed over the ranks that share out the layer's depth. False when a rank is lost.
bool add_linear(Decoder& m, const TwinpoolStep& step, const Linear& layer, const Activations& input, float* x,
                int num_threads) {
  if (step.group == nullptr) {
    linear<true>(layer, input, step.num_rows, x, num_threads);
    return true;
  }
  float* partial = m.rank_sum.get(step.num_rows * layer.columns);
  linear<false>(layer, input, step.num_rows, partial, num_threads);
  return AllReduce(*step.group).add(partial, step.num_rows * layer.columns, x);
}

// x = the tokens' rows of the embedding, of which every rank holds a range. False when a rank is lost.
bool embed(Decoder& m, const TwinpoolStep& step, float* x) {
  const int64_t size = m.shape.hidden_size, count = step.num_rows * size;
  float* rows = step.group == nullptr ? x : m.rank_sum.get(count);
  for (int64_t row = 0; row < step.num_rows; ++row) {
    const int64_t token = step.token_ids[row] - m.shape.first_token;
    float* to = rows + row * size;
    if (token < 0 || token >= m.shape.vocab_size)
      std::fill(to, to + size, 0.0f);
    else if (m.embedding.empty())
      m.head.row(token, to);
    else
      std::memcpy(to, m.embedding.data() + token * size, size * sizeof(float));
  }
  if (step.group == nullptr) return true;
  std::fill(x, x + count, 0.0f);
  return AllReduce(*step.group).add(rows, count, x);
}

// Number: what attention multiplies prompts in, see attend(). False when a rank is lost.
template <typename Number, typename KV>
bool run(Decoder& m, const TwinpoolStep& step, int num_threads) {
  const TwinpoolShape& d = m.shape;
  const int64_t rows = step.num_rows, size = d.hidden_size;
  const int64_t query_size = static_cast<int64_t>(d.num_heads) * d.head_size;
  const int64_t kv_size = static_cast<int64_t>(d.num_kv_heads) * d.head_size;
  float *x = m.hidden.get(rows * size), *normed = m.normed.get(std::max(rows, step.num_sampled) * size);
  float *query = m.query.get(rows * query_size), *attended = m.attended.get(rows * query_size);
  float *key = m.key.get(rows * kv_size), *value = m.value.get(rows * kv_size);
  float* gated_rows = m.gated_rows.get(rows * d.intermediate_size);
  if (static_cast<int>(m.per_thread.size()) < num_threads) m.per_thread.resize(num_threads);
  const AttentionPlan plan = split_attention(d, step);
  float* partials = m.partials.get(plan.num_parts * partial_size(d));
  const Format format = static_cast<Format>(d.weight_format);

  if (!embed(m, step, x)) return false;
  for (int32_t index = 0; index < d.num_layers; ++index) {
    const Layer& layer = m.layers[index];
    KV* cache = static_cast<KV*>(step.cache_layers[index]);
    norm_rows(x, layer.norms[kInputNorm], d.norm_epsilon, rows, size, normed, num_threads);
    Activations input = m.converter.convert(normed, rows, size, format, num_threads);
    linear<false>(layer.linears[kQuery], input, rows, query, num_threads);
    linear<false>(layer.linears[kKey], input, rows, key, num_threads);
    linear<false>(layer.linears[kValue], input, rows, value, num_threads);
    prepare_heads(layer, d, step, query, key, num_threads);
    write_cache(d, cache, step, key, value, num_threads);
    if (step.group == nullptr) tell_layers_done(step, index + 1);
    attend<Number>(d, step, plan, cache, query, attended, partials, m.per_thread, num_threads);
    input = m.converter.convert(attended, rows, query_size, format, num_threads);
    if (!add_linear(m, step, layer.linears[kOutput], input, x, num_threads)) return false;
    if (step.group != nullptr) tell_layers_done(step, index + 1);  // the other ranks' KV is written too
    norm_rows(x, layer.norms[kPostNorm], d.norm_epsilon, rows, size, normed, num_threads);
    input = m.converter.convert(normed, rows, size, format, num_threads);
    gated(layer.linears[kGate], layer.linears[kUp], input, rows, gated_rows, num_threads);
    input = m.converter.convert(gated_rows, rows, d.intermediate_size, format, num_threads);
    if (!add_linear(m, step, layer.linears[kDown], input, x, num_threads)) return false;
  }
  for (int64_t i = 0; i < step.num_sampled; ++i)
    rms_norm(x + step.sampled_rows[i] * size, m.final_norm, d.norm_epsilon, size, normed + i * size);
  linear<false>(m.head, m.converter.convert(normed, step.num_sampled, size, format, num_threads), step.num_sampled,
                step.logits, num_threads);
  return true;
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
int twinpool_interface() { return 5; }

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
    if (which == kEmbedding) {
      m->embedding.assign(weight, weight + columns * depth);
      return 0;
    }
    Linear& linear = which == kHead ? m->head : m->layers[layer].linears[which];
    linear.pack(weight, columns, depth, static_cast<Format>(m->shape.weight_format));
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
