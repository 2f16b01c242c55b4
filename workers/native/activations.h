// The inputs of linear layers, in the form that a layer's format wants.
#pragma once

#include "packed.h"

namespace {

// A value rounded to 8 bits, and how four of a row lie: where there are no products of bytes, as pairs of 16 bits.
#if defined(__AVX512VNNI__)
using Rounded = int8_t;

inline void copy_four(const int8_t* from, Rounded* to) { std::memcpy(to, from, 4); }
#else
using Rounded = int16_t;

inline void copy_four(const int8_t* from, Rounded* to) {
  to[0] = from[0];
  to[1] = from[2];
  to[2] = from[1];
  to[3] = from[3];
}
#endif

// Rows of x. Those of int8 and int4 lie in tiles of kTileRows, the last one of as many as there are, so that a kernel
// finds what it needs side by side:
//
//     rows8    [tile][k/4][row][4], see copy_four()
//     scales8  [tile][group][row]
struct Activations {
  const float* rows32 = nullptr;
  const uint16_t* rows16 = nullptr;
  const Rounded* rows8 = nullptr;
  const float* scales8 = nullptr;
  const int32_t* starts8 = nullptr;  // int8: as scales8; minus 128 times the group's sum, which unsigned weights add
  const float* sums4 = nullptr;      // int4: [tile][group][2][row], sums of 32 values times their scale
  int64_t stride = 0;
};

class Converter {
 public:
  // Makes room, before threads begin; what was converted before is lost.
  void reserve(int64_t rows, int64_t depth, Format format) {
    const int64_t padded_rows = (rows + kTileRows - 1) / kTileRows * kTileRows;
    const int64_t size = padded_rows * stride_of(depth, format);
    if (format == kBfloat16) rows16_.get(size);
    if (format == kInt8 || format == kInt4) {
      rows8_.get(size);
      scales_.get(size / kScaleGroup);
      starts_.get(size / kScaleGroup);
      sums_.get(2 * size / kScaleGroup);
    }
  }

  // What all rows are when `convert` was called for each: for float32 `x` itself.
  Activations all(const float* x, int64_t depth, Format format) {
    return {x, rows16_.get(0), rows8_.get(0), scales_.get(0), starts_.get(0), sums_.get(0), stride_of(depth, format)};
  }

  // One row of `rows`, of `depth` floats. Threads may convert different rows at once.
  void convert(const float* from, int64_t row, int64_t rows, int64_t depth, Format format) {
    const int64_t stride = stride_of(depth, format);
    if (format == kBfloat16) {
      uint16_t* to = rows16_.get(0) + row * stride;
      for (int64_t k = 0; k < depth; ++k) to[k] = float_to_bfloat16(from[k]);
      std::fill(to + depth, to + stride, uint16_t{0});
    }
    if (format == kInt8 || format == kInt4)
      for (int64_t group = 0; group < stride / kScaleGroup; ++group) quantize(from, row, rows, depth, group);
  }

 private:
  static int64_t stride_of(int64_t depth, Format format) {
    return (depth + kDepthMultiple[format] - 1) / kDepthMultiple[format] * kDepthMultiple[format];
  }

  // Symmetric. NaN and infinity go on in the scale, and so into the result.
  void quantize(const float* row_from, int64_t row, int64_t rows, int64_t depth, int64_t group) {
    constexpr int kVectors = kScaleGroup / kLanes;
    const int64_t stride = stride_of(depth, kInt8);
    const int64_t size = std::min(kScaleGroup, depth - group * kScaleGroup);
    float padded[kScaleGroup] = {};
    const float* from = row_from + group * kScaleGroup;
    if (size < kScaleGroup) from = static_cast<float*>(std::memcpy(padded, from, size * sizeof(float)));
    const float highest = largest_magnitude(from);
    const bool finite = highest <= 3.0e38f;
    const float scale = !finite ? NAN : highest > 0 ? highest / 127.0f : 1.0f, inverse = 1.0f / scale;
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    IntVec sums[2] = {};
    int8_t narrow[kScaleGroup] = {};
    for (int i = 0; i < kVectors && finite; ++i) {
      const Vec shifted = load(from + i * kLanes) * inverse + kRound;
      IntVec values;
      std::memcpy(&values, &shifted, sizeof values);
      values -= 0x4B400000;
      sums[i / (kVectors / 2)] += values;
      typedef int8_t Narrow __attribute__((vector_size(kLanes)));
      const Narrow bytes = __builtin_convertvector(values, Narrow);
      std::memcpy(narrow + i * kLanes, &bytes, sizeof bytes);
    }
    const int64_t tile = row / kTileRows * kTileRows, lane = row % kTileRows;
    const int64_t height = std::min<int64_t>(kTileRows, rows - tile);
    const int64_t at = tile * stride / kScaleGroup + group * height;
    Rounded* to = rows8_.get(0) + tile * stride + group * height * kScaleGroup + lane * 4;
    for (int64_t four = 0; four < kFours; ++four) copy_four(narrow + four * 4, to + four * height * 4);
    const int32_t totals[2] = {total(sums[0]), total(sums[1])};
    scales_.get(0)[at + lane] = scale;
    starts_.get(0)[at + lane] = -128 * (totals[0] + totals[1]);
    for (int part = 0; part < 2; ++part)
      sums_.get(0)[2 * at + part * height + lane] = static_cast<float>(totals[part]) * scale;
  }

  // Of non-negative floats the order is that of their bits, where a NaN is the largest.
  static float largest_magnitude(const float* from) {
    IntVec highest = {};
    for (int64_t k = 0; k < kScaleGroup; k += kLanes) {
      IntVec bits;
      std::memcpy(&bits, from + k, sizeof bits);
      bits &= 0x7fffffff;
      highest = bits > highest ? bits : highest;
    }
    const int32_t bits = largest<kLanes>(reinterpret_cast<const int32_t*>(&highest));
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
  }

  // Lays the halves onto each other until one lane is left.
  template <int kWidth>
  static int32_t largest(const int32_t* values) {
    if constexpr (kWidth == 1) {
      return values[0];
    } else {
      typedef int32_t Half __attribute__((vector_size(kWidth * 2)));
      Half low, high;
      std::memcpy(&low, values, sizeof low);
      std::memcpy(&high, values + kWidth / 2, sizeof high);
      low = low > high ? low : high;
      return largest<kWidth / 2>(reinterpret_cast<const int32_t*>(&low));
    }
  }

  // Sums of 64 rounded values are exact in float32.
  static int32_t total(IntVec values) { return static_cast<int32_t>(sum(__builtin_convertvector(values, Vec))); }

  Scratch<uint16_t> rows16_;
  Scratch<Rounded> rows8_;
  Scratch<float> scales_, sums_;
  Scratch<int32_t> starts_;
};

}  // namespace
