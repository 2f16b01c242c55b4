// What the callers of the native decoder and it agree on; workers/native/library.py holds the same structures.
#pragma once

#include <cstdint>

extern "C" {

struct TwinpoolShape {
  int32_t num_layers, hidden_size, num_heads, num_kv_heads, head_size, intermediate_size, vocab_size, block_size;
  float norm_epsilon, attention_scale;
  int32_t weight_format;  // Format of every linear layer; see head_format for the last
  int32_t cache_format;   // TwinpoolCacheFormat
  int32_t first_token;    // the first of the vocab_size rows of head and embedding that are here
};

// One rank of a tensor-parallel group. The sizes of a rank's shape are its own share; only hidden_size is everybody's.
struct TwinpoolGroup {
  int32_t rank, size;
  uint32_t round;      // counted up by every sum; starts at 0 in every rank
  int32_t timeout_ms;  // how long a rank waits for another
  void* memory;        // twinpool_group_bytes(size) bytes, zeros at first, shared by all ranks
};

// One sequence of a step. Its tokens are rows first_row .. first_row + num_rows - 1, at positions start ...
struct TwinpoolSequence {
  int32_t first_row, num_rows, start, reserved;
  const int64_t* block_table;
};

// What a step's time goes to, as its first thread sees it: waiting counts to what is waited for.
enum TwinpoolPart { kPartEmbedding = 0, kPartAttention, kPartLinears, kPartNorms, kPartHead, kNumParts };

struct TwinpoolParts {
  int64_t nanoseconds[kNumParts];
};

struct TwinpoolStep {
  int64_t num_rows, num_sequences, num_sampled;
  const int64_t* token_ids;          // [num_rows]
  const float* cosine;               // [position][head_size], up to the longest sequence there may be
  const float* sine;                 // the same
  const TwinpoolSequence* sequences;
  const int64_t* sampled_rows;       // [num_sampled]
  void* const* cache_layers;         // per layer: [num_blocks][2][num_kv_heads][block_size] rows
  float* logits;                     // [num_sampled][vocab_size]
  int64_t* likeliest;                // [num_sampled]: first index of each row's maximum, -1 where that is not finite
  int64_t* layers_done;              // or null: counts the layers whose KV is in the cache
  int64_t wake_fd;                   // where a byte is written each time that it has grown
  TwinpoolGroup* group;              // null: one rank does it all
  TwinpoolParts* parts;              // or null: the step's time is added to it
};

// One row of logits to draw a token from; see draw.h.
struct TwinpoolDraw {
  const float* logits;
  int64_t likeliest;   // the first index of their maximum, which is finite
  int64_t top_k;       // 0: all
  int64_t token;       // the result
  double top_p;        // 1: all
  double threshold;    // of the draw, 0 <= threshold < 1
  float temperature;   // above 0, a normal float
  float lowest;        // logarithm of min_p
};

// What a row of the cache is, one token in one head: head_size numbers, and behind those of one byte their float scale.
enum TwinpoolCacheFormat { kCacheFloat32 = 0, kCacheBfloat16, kCacheInt8, kCacheFp8 };
enum TwinpoolLinear { kQuery = 0, kKey, kValue, kOutput, kGate, kUp, kDown, kHead, kEmbedding };
enum TwinpoolVector { kInputNorm = 0, kPostNorm, kQueryNorm, kKeyNorm, kFinalNorm };
}
