// One step of a decoder-only transformer on a CPU, in one call: embedding, every layer, final norm, logits.
//
// Built several times from this file, once per instruction set (see setup.py); workers/native/library.py chooses at
// run time. Vectors are GCC vector extensions, so the same source gives AVX2 and AVX-512 code.
//
//     interface.h   what callers hand over           vectors.h      vectors, bfloat16, exp
//     decoder.h     weights and buffers              step.h         the course of a step
//     team.h        the threads of a step            waiting.h      how one waits for another
//     packed.h, activations.h, products.h, linear.h  linear layers
//     attention.h   the work of a step, split; decode_attention.h, prompt_attention.h   the two kinds of it
//     kv_cache.h    the paged KV cache               norms.h        of single rows, and their rotary embedding
//     all_reduce.h  sums over tensor-parallel ranks  likeliest.h    the largest of a row of logits
//     draw.h        a token from a row of logits     limits.h       what the processor can do at most

#include "decoder.h"
#include "draw.h"
#include "interface.h"
#include "limits.h"
#include "step.h"

#include <optional>

#include <omp.h>

namespace {

template <typename Number, typename KV>
bool run(Decoder& m, const TwinpoolStep& step, int num_threads) {
  const AttentionPlan plan = split_attention(m.shape, step);
  const Buffers buffers = reserve(m, step, plan, num_threads);
  m.is_rank_lost = false;
  std::optional<Team> team;
#pragma omp parallel num_threads(num_threads)
  {
#pragma omp single
    team.emplace(omp_get_num_threads());  // fewer than asked for where the system says so
    StepThread<Number, KV>(m, step, plan, buffers, *team, omp_get_thread_num()).run();
  }
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
int twinpool_interface() { return 10; }

// Draws a token for each of `count` rows of `size` logits. `memory`: num_threads times twinpool_draw_bytes(size).
int64_t twinpool_draw_bytes(int64_t size) {
  return (size + kLanes) * static_cast<int64_t>(sizeof(float) + sizeof(Candidate));
}

void twinpool_draw(TwinpoolDraw* rows, int64_t count, int64_t size, char* memory, int num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(dynamic)
  for (int64_t row = 0; row < count; ++row) {
    float* weights = reinterpret_cast<float*>(memory + omp_get_thread_num() * twinpool_draw_bytes(size));
    rows[row].token = Drawing(size, weights, reinterpret_cast<Candidate*>(weights + size + kLanes)).draw(rows[row]);
  }
}

// Multiply-adds of numbers, as the linear layers of a format do them, and nothing else. Returns how many were done.
int64_t twinpool_multiply(int format, int64_t rounds, int num_threads) {
  int64_t total = 0;
#pragma omp parallel num_threads(num_threads) reduction(+ : total)
  total += multiply(static_cast<Format>(format), rounds);
  return total;
}

// Reads all of `values`, each thread its part. Returns their sum.
float twinpool_read(const float* values, int64_t count, int num_threads) {
  float total = 0.0f;
#pragma omp parallel for num_threads(num_threads) reduction(+ : total)
  for (int part = 0; part < num_threads; ++part)
    total += sum_of(values + count * part / num_threads, count * (part + 1) / num_threads - count * part / num_threads);
  return total;
}

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
    linear.pack(weight, columns, depth, in_layer ? m->format() : m->head_format(), m->weights);
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
