// The weights of a linear layer, packed once into panels, in four formats.
//
// A panel is kPanel output columns, k-major:
//
//     panel p:  [k = 0: w[p*kPanel + 0 .. kPanel-1][0]]  [k = 1: ...]  ...  [k = K-1: ...]
//
// so that a small batch streams it from memory once, in order, and a large one reuses it from the cache
// (Goto, van de Geijn: Anatomy of High-Performance Matrix Multiplication, TOMS 2008).
#pragma once

#include "vectors.h"

#include <memory>

namespace {

int64_t panels_of(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

// Memory for weights, in large pages where the system gives them: a step reads all of them, and small pages cost a
// look-up each. Matrices lie one after the other, or each of a small model would take a large page of its own.
class WeightMemory {
 public:
  // Zeros, at the beginning of a cache line; they stay as long as this does.
  template <typename T>
  T* take(size_t count) {
    const size_t size = rounded_up(count * sizeof(T), kLine);
    if (size > left_) add_chunk(std::max(kChunk, rounded_up(size, kPage)));
    T* memory = reinterpret_cast<T*>(next_);
    next_ += size;
    left_ -= size;
    std::memset(static_cast<void*>(memory), 0, size);
    return memory;
  }

 private:
  static constexpr size_t kLine = 64, kPage = 2 << 20, kChunk = 64 << 20;  // what is not touched takes no memory

  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };

  static size_t rounded_up(size_t size, size_t unit) { return (size + unit - 1) / unit * unit; }

  void add_chunk(size_t size) {
    chunks_.emplace_back(static_cast<char*>(std::aligned_alloc(kPage, size)));
    if (chunks_.back() == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    madvise(chunks_.back().get(), size, MADV_HUGEPAGE);
#endif
    next_ = chunks_.back().get();
    left_ = size;
  }

  std::vector<std::unique_ptr<char, Free>> chunks_;
  char* next_ = nullptr;
  size_t left_ = 0;
};

enum Format { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2, kInt4 = 3 };

// int8, and the activations of int8 and int4: so many values along the depth share a scale. Activations have outliers:
// with one scale per row the default model's perplexity rises by 4 %, with one per 64 values by less than 1 %.
constexpr int64_t kScaleGroup = 64;
constexpr int64_t kScaleGroup4 = 32;  // int4: as in GGUF's Q4_0 and Q4_1, whose weights come out as they went in
constexpr int64_t kDepthMultiple[] = {1, 2, kScaleGroup, kScaleGroup};
constexpr int64_t kFours = kScaleGroup / 4;  // four values of one column side by side are one factor of a product

// A linear layer y = x W^T + b with W of [columns][depth], in one of four formats:
//   float32   panels as above
//   bfloat16  panels of pairs:  [k/2][column][2]; products of bfloat16, sums in float32
//   int8      two halves of kLanes columns, each of fours:  [k/4][column][4], 128 added, so that they are unsigned; a
//             scale per column and 64 values
//   int4      the same halves, two fours in one:  [k/8][column][4], the first four in the low bits; unsigned, with a
//             scale and a minimum per column and 32 values
// Scales and minima are bfloat16. For int8 and int4 activations are rounded to 8 bits with a scale per row and 64
// values (dynamic quantization); sums over a scale's values are in int32, sums of those in float32.
struct Linear {
  int64_t columns = 0, depth = 0;
  Format format = kFloat32;
  float* packed = nullptr;  // each of these in the WeightMemory that it was packed into
  uint16_t* packed16 = nullptr;
  uint8_t* packed8 = nullptr;  // int8 and int4; after the weights their scales: [half panel][group][kLanes] of uint16_t,
                               // for int4 each group's scales, then its minima
  std::vector<float> bias;     // empty, or padded to whole panels

  int64_t padded_depth() const {
    return (depth + kDepthMultiple[format] - 1) / kDepthMultiple[format] * kDepthMultiple[format];
  }

  int64_t num_groups() const { return padded_depth() / kScaleGroup; }

  void pack(const float* weight, int64_t new_columns, int64_t new_depth, Format new_format, WeightMemory& memory) {
    columns = new_columns;
    depth = new_depth;
    format = new_format;
    const int64_t num_panels = panels_of(columns), size = num_panels * kPanel * padded_depth();
    if (format == kFloat32) packed = memory.take<float>(size);
    if (format == kBfloat16) packed16 = memory.take<uint16_t>(size);
    if (format == kInt8 || format == kInt4)
      packed8 = memory.take<uint8_t>(weight_bytes8() + 2 * num_panels * scales_per_half() * sizeof(uint16_t));
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < num_panels; ++p)
      for (int64_t column = p * kPanel; column < std::min(columns, (p + 1) * kPanel); ++column)
        pack_column(column, weight + column * depth);
  }

  // Row `column` of W: how tied embeddings are read without a second copy.
  void row(int64_t column, float* to) const {
    for (int64_t k = 0; k < depth; ++k) to[k] = at(column, k);
  }

  const float* panel(int64_t index) const { return packed + index * kPanel * depth; }
  const uint16_t* panel16(int64_t index) const { return packed16 + index * kPanel * padded_depth(); }

  // A half panel and its scales.
  const uint8_t* half8(int64_t half) const {
    return packed8 + half * kLanes * padded_depth() / (format == kInt4 ? 2 : 1);
  }
  const uint16_t* half_scales(int64_t half) const {
    return reinterpret_cast<const uint16_t*>(packed8 + weight_bytes8()) + half * scales_per_half();
  }

 private:
  int64_t weight_bytes8() const { return panels_of(columns) * kPanel * padded_depth() / (format == kInt4 ? 2 : 1); }
  int64_t scales_per_half() const {
    return kLanes * (format == kInt4 ? 2 * padded_depth() / kScaleGroup4 : num_groups());
  }

  float at(int64_t column, int64_t k) const {
    const int64_t half = column / kLanes, lane = column % kLanes;
    if (format == kFloat32) return panel(column / kPanel)[k * kPanel + column % kPanel];
    if (format == kBfloat16) return bfloat16_to_float(panel16(column / kPanel)[index16(column, k)]);
    if (format == kInt8) {
      const int value = half8(half)[(k / 4 * kLanes + lane) * 4 + k % 4];
      return static_cast<float>(value - 128) * bfloat16_to_float(half_scales(half)[k / kScaleGroup * kLanes + lane]);
    }
    const int value = half8(half)[index4(lane, k)] >> (k / 4 % 2 * 4) & 15;
    const uint16_t* group = half_scales(half) + k / kScaleGroup4 * 2 * kLanes + lane;
    return static_cast<float>(value) * bfloat16_to_float(group[0]) + bfloat16_to_float(group[kLanes]);
  }

  static int64_t index16(int64_t column, int64_t k) { return k / 2 * kPanel * 2 + column % kPanel * 2 + k % 2; }
  static int64_t index4(int64_t lane, int64_t k) { return (k / 8 * kLanes + lane) * 4 + k % 4; }

  void pack_column(int64_t column, const float* from) {
    const int64_t base = column / kPanel * kPanel * padded_depth();
    if (format == kFloat32)
      for (int64_t k = 0; k < depth; ++k) packed[base + k * kPanel + column % kPanel] = from[k];
    if (format == kBfloat16)
      for (int64_t k = 0; k < depth; ++k) packed16[base + index16(column, k)] = float_to_bfloat16(from[k]);
    const int64_t group = format == kInt4 ? kScaleGroup4 : kScaleGroup;
    for (int64_t first = 0; first < depth && (format == kInt8 || format == kInt4); first += group) {
      const int64_t size = std::min(group, depth - first);
      format == kInt8 ? pack8(column, first, from + first, size) : pack4(column, first, from + first, size);
    }
  }

  void pack8(int64_t column, int64_t first, const float* from, int64_t size) {
    const int64_t half = column / kLanes, lane = column % kLanes;
    float highest = 0;
    for (int64_t k = 0; k < size; ++k) highest = larger_or_nan(highest, std::fabs(from[k]));
    uint16_t& scale = const_cast<uint16_t*>(half_scales(half))[first / kScaleGroup * kLanes + lane];
    scale = float_to_bfloat16(highest / 127.0f);
    const float inverse = inverse_of(bfloat16_to_float(scale));
    uint8_t* to = packed8 + half * kLanes * padded_depth();
    for (int64_t k = 0; k < size; ++k) {
      const int value = rounded(from[k] * inverse, -127, 127) + 128;
      to[((first + k) / 4 * kLanes + lane) * 4 + k % 4] = static_cast<uint8_t>(value);
    }
  }

  void pack4(int64_t column, int64_t first, const float* from, int64_t size) {
    const int64_t half = column / kLanes, lane = column % kLanes;
    float lowest = from[0], highest = from[0];
    for (int64_t k = 0; k < size; ++k) {
      lowest = -larger_or_nan(-lowest, -from[k]);
      highest = larger_or_nan(highest, from[k]);
    }
    uint16_t* group = const_cast<uint16_t*>(half_scales(half)) + first / kScaleGroup4 * 2 * kLanes + lane;
    group[kLanes] = float_to_bfloat16(lowest);
    const float minimum = bfloat16_to_float(group[kLanes]);
    group[0] = float_to_bfloat16((highest - minimum) / 15.0f);
    const float inverse = inverse_of(bfloat16_to_float(group[0]));
    uint8_t* to = packed8 + half * kLanes * padded_depth() / 2;
    for (int64_t k = 0; k < size; ++k)
      to[index4(lane, first + k)] |= rounded((from[k] - minimum) * inverse, 0, 15) << ((first + k) / 4 % 2 * 4);
  }

  // A NaN among the weights makes the scale one, and so the result.
  static float larger_or_nan(float a, float b) { return b <= a || a != a ? a : b; }
  static float inverse_of(float scale) { return std::isfinite(scale) && scale > 0 ? 1.0f / scale : 0.0f; }
  static int rounded(float value, int lowest, int highest) {
    if (!(std::fabs(value) < 1e6f)) return highest;
    return std::min(highest, std::max(lowest, static_cast<int>(std::nearbyint(value))));
  }
};

}  // namespace
