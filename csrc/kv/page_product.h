// The product of a few rows of factors with a packed page, codes decoded in registers on their way into the sums:
//
//   out[r][lane] += sum over depth of factor[r][depth] * page[depth][lane]
//
// Lanes of the page are lanes of vectors, factors are broadcast, so nothing is summed across lanes. Scales stay
// outside: one of the depth goes into the factors, one of the lane onto the sums. A code of one or two bits picks its
// digit from a table of four by one permutation, which sees no other bits, so that neither mask nor conversion is
// needed. Include only from *_cpu.cpp files.
#pragma once
#include <type_traits>

#include "common/scratch.h"
#include "device/bits.cuh"
#include "kv/page_cpu.h"

namespace vtk {
namespace VTK_ISA {
namespace {

constexpr int kProductRows = 4;  // 8 accumulators of 2 vectors, what they multiply, and the table fit 16 registers

// Four numbers, again and again.
inline f32v table_of(float a, float b, float c, float d) {
  const float numbers[4] = {a, b, c, d};
  f32v table;
  for (int lane = 0; lane < kLanes; ++lane) table[lane] = numbers[lane % 4];
  return table;
}

// In each lane the table's number bits & 3.
inline f32v pick(f32v table, u32v bits) {
#if defined(__AVX512F__)
  return (f32v)_mm512_maskz_permutevar_ps(0xffff, (__m512)table, (__m512i)bits);  // maskz: see load in common/simd.h
#elif defined(__AVX2__)
  return (f32v)_mm256_permutevar_ps((__m256)table, (__m256i)bits);
#else
  f32v v;
  for (int lane = 0; lane < kLanes; ++lane) v[lane] = table[bits[lane] & 3u];
  return v;
#endif
}

// One decoder a kind of code: words of kPlanes rows give kCodes digits, digit(i) from what open() made of the words.
template <int kBits>
struct TableCodes {
  static constexpr int kCodes = 32 / kBits, kPlanes = 1;
  f32v table;
  struct Words {
    u32v w;
  };
  static Words open(const u32v* words) { return {words[0]}; }
  template <int i>
  f32v digit(const Words& words) const {
    return pick(table, words.w >> (kBits * (i / 2) + 16 * (i % 2)));
  }
};

// The two planes of 32 codes, merged to 2-bit codes: those at even places and those at odd places.
struct PlaneCodes {
  static constexpr int kCodes = 32, kPlanes = 2;
  f32v table = table_of(0, 1, 0, -1);  // bit 0: nonzero, bit 1: negative
  struct Words {
    u32v even, odd;
  };
  static Words open(const u32v* words) {
    constexpr uint32_t kEven = 0x55555555u;
    return {(words[0] & kEven) | (words[1] & kEven) << 1, (words[0] >> 1 & kEven) | (words[1] & ~kEven)};
  }
  template <int i>
  f32v digit(const Words& words) const {
    constexpr int kPlace = i / 2 + 16 * (i % 2);
    return pick(table, (kPlace % 2 == 0 ? words.even : words.odd) >> (kPlace / 2 * 2));
  }
};

template <KvScheme kScheme>
struct WideCodes {  // int4, fp8
  static constexpr int kBits = code_bits(kScheme), kCodes = 32 / kBits, kPlanes = 1;
  using Words = TableCodes<2>::Words;
  static Words open(const u32v* words) { return {words[0]}; }
  template <int i>
  f32v digit(const Words& words) const {
    const u32v code = words.w >> (kBits * (i / 2) + 16 * (i % 2)) & ((1u << kBits) - 1);
    if constexpr (kScheme == KvScheme::kInt4)
      return __builtin_convertvector((i32v)code, f32v);
    else
      return kv_digit<f32v>(kScheme, code);
  }
};

template <class T>
struct RawCodes {
  static constexpr int kCodes = 4 / static_cast<int>(sizeof(T)), kPlanes = 1;
  using Words = TableCodes<2>::Words;
  static Words open(const u32v* words) { return {words[0]}; }
  template <int i>
  f32v digit(const Words& words) const {
    if constexpr (sizeof(T) == 4) return (f32v)words.w;
    if constexpr (std::is_same_v<T, bf16>) return (f32v)(i == 0 ? words.w << 16 : words.w & 0xffff0000u);
    if constexpr (std::is_same_v<T, f16>) {
      const u16v half = __builtin_convertvector(words.w >> (16 * i), u16v);
      f16 lanes[kLanes];
      std::memcpy(lanes, &half, sizeof lanes);
      return load(lanes);
    }
  }
};

constexpr int kVectors = 2;  // of lanes in a register tile
constexpr int32_t kTileLanes = kVectors * kLanes;

template <int kRows, class Decoder, int... i>
inline void multiply_word(const Decoder& decoder, const typename Decoder::Words (&words)[kVectors], const float* factor,
                          int32_t stride, f32v (&sum)[kRows][kVectors], std::integer_sequence<int, i...>) {
  const auto step = [&](auto index) __attribute__((always_inline)) {
    constexpr int kIndex = decltype(index)::value;
    const f32v first = decoder.template digit<kIndex>(words[0]), second = decoder.template digit<kIndex>(words[1]);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const f32v f = splat(factor[r * stride + kIndex]);
      sum[r][0] += f * first;
      sum[r][1] += f * second;
    }
  };
  (step(std::integral_constant<int, i>()), ...);
}

// sum[r][v] = the dot products of `rows` rows of words with factor[r * stride + depth], in the first `count` lanes at
// `words`. Not inlined: one copy for each decoder, and the call is nothing beside its loop.
template <int kRows, class Decoder>
__attribute__((noinline)) void multiply_words(const Decoder& decoder, const char* words, int32_t lanes, int32_t rows,
                                              int32_t count, const float* factor, int32_t stride,
                                              f32v (&sum)[kRows][kVectors]) {
  f32v local[kRows][kVectors] = {};
  for (int32_t row = 0; row < rows; ++row) {
    typename Decoder::Words opened[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      u32v planes[Decoder::kPlanes];
      for (int plane = 0; plane < Decoder::kPlanes; ++plane) {
        const char* at = words + ((int64_t{row} * Decoder::kPlanes + plane) * lanes + v * kLanes) * 4;
        planes[plane] = count >= kTileLanes ? load_words(at) : load_words(at, std::max(count - v * kLanes, 0));
      }
      opened[v] = Decoder::open(planes);
    }
    multiply_word<kRows>(decoder, opened, factor + row * Decoder::kCodes, stride, local,
                         std::make_integer_sequence<int, Decoder::kCodes>());
  }
  std::memcpy(sum, local, sizeof local);
}

typedef uint8_t u8v __attribute__((vector_size(kLanes)));
typedef uint8_t u8x16 __attribute__((vector_size(kPageAlign)));
typedef uint16_t u16x16 __attribute__((vector_size(2 * kPageAlign)));

class PageProduct {
 public:
  PageProduct() : scaled_(scratch<float>(kProductRows * (kMostDepth + kSlack))), words_(nullptr) {}

  // factor [rows][stride] and out [rows][out_stride] have rows for the next of 1, 2 and 4; T is the type of scheme
  // none.
  template <class T>
  void add(const KvPage& page, const uint8_t* codes, const uint16_t* meta, const float* factor, int32_t stride,
           int32_t rows, float* out, int32_t out_stride) {
    const Call call = {page, factor, stride, out, out_stride};
    if (rows == 1)
      add<T, 1>(call, codes, meta);
    else if (rows == 2)
      add<T, 2>(call, codes, meta);
    else
      add<T, kProductRows>(call, codes, meta);
  }

 private:
  static constexpr int32_t kMostDepth = 256;
  static constexpr int32_t kSlack = 32;  // the last word's codes beyond the depth

  struct Call {
    const KvPage& page;
    const float* factor;
    int32_t stride;
    float* out;
    int32_t out_stride;
  };

  template <class T, int kRows>
  void add(const Call& call, const uint8_t* codes, const uint16_t* meta) {
    for (int32_t i = 0; i < call.page.sections; ++i) {
      const KvSection& s = call.page.section[i];
      const char* words = reinterpret_cast<const char*>(codes + s.code_offset);
      const f16* scales = reinterpret_cast<const f16*>(meta + s.meta_offset);
      switch (s.scheme) {
        case KvScheme::kNone: add_none<T, kRows>(call, s, words); break;
        case KvScheme::kFp8: add_section<kRows>(WideCodes<KvScheme::kFp8>{}, call, s, words, scales); break;
        case KvScheme::kInt4: add_section<kRows>(WideCodes<KvScheme::kInt4>{}, call, s, words, scales); break;
        case KvScheme::kInt2: add_section<kRows>(TableCodes<2>{table_of(0, 1, 2, 3)}, call, s, words, scales); break;
        case KvScheme::kTernary: add_section<kRows>(PlaneCodes{}, call, s, words, scales); break;
        case KvScheme::kTernary5:
          add_section<kRows>(TableCodes<2>{table_of(-1, 0, 1, 0)}, call, s, words_of_trits(call.page, s, words),
                             scales);
          break;
        default: add_section<kRows>(TableCodes<1>{table_of(1, -1, 1, -1)}, call, s, words, scales);
      }
    }
  }

  template <int kRows, class Decoder>
  void add_section(const Decoder& decoder, const Call& call, const KvSection& s, const char* words, const f16* scales) {
    const KvPage& page = call.page;
    const int32_t groups = meta_groups(page, s), width = meta_width(page, s);
    const f16* zeros = meta_planes(s.scheme) == 2 ? scales + groups * width : nullptr;
    for (int32_t g = 0; g < groups; ++g) {
      const f16 *scale = scales + g * width, *zero = zeros == nullptr ? nullptr : zeros + g * width;
      if (page.per_lane)
        add_depth_group<kRows>(decoder, call, s, g, words, scale, zero);
      else
        add_lane_group<kRows>(decoder, call, s, g, words, scale, zero);
    }
  }

  // Scales of the depth: into the factors of this group of lanes.
  template <int kRows, class Decoder>
  void add_lane_group(const Decoder& decoder, const Call& call, const KvSection& s, int32_t g, const char* words,
                      const f16* scale, const f16* zero) {
    constexpr int32_t kStride = kMostDepth + kSlack;
    const int32_t lanes = call.page.lanes, rows = ceil_div(s.depth, Decoder::kCodes);
    float bias[kRows] = {};
    for (int r = 0; r < kRows; ++r) {
      const float* factor = call.factor + r * call.stride + s.first;
      float* to = &scaled_[r * kStride];
      f32v sum = {};
      for (int32_t d = 0; d < s.depth; d += kLanes) {
        const int32_t count = std::min(kLanes, s.depth - d);
        const f32v f = count == kLanes ? load(factor + d) : load_partial(factor + d, count);
        store(to + d, f * (count == kLanes ? load(scale + d) : load_partial(scale + d, count)));
        if (zero != nullptr) sum += f * (count == kLanes ? load(zero + d) : load_partial(zero + d, count));
      }
      bias[r] = vtk::VTK_ISA::sum(sum);
      std::fill(to + s.depth, to + rows * Decoder::kCodes, 0.0f);
    }
    for (int32_t l = g * call.page.group; l < (g + 1) * call.page.group; l += kTileLanes) {
      f32v sum[kRows][kVectors];
      multiply_words<kRows>(decoder, words + l * 4, lanes, rows, kTileLanes, scaled_.get(), kStride, sum);
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) {
          float* to = call.out + r * call.out_stride + l + v * kLanes;
          store(to, load(to) + (sum[r][v] + bias[r]));
        }
    }
  }

  // Scales of the lanes: onto the sums over this group of depth.
  template <int kRows, class Decoder>
  void add_depth_group(const Decoder& decoder, const Call& call, const KvSection& s, int32_t g, const char* words,
                       const f16* scale, const f16* zero) {
    const int32_t lanes = call.page.lanes, rows = call.page.group / Decoder::kCodes, first = g * call.page.group;
    const float* factor = call.factor + s.first + first;
    words += int64_t{g} * rows * Decoder::kPlanes * lanes * 4;
    float total[kRows] = {};
    if (zero != nullptr)
      for (int r = 0; r < kRows; ++r) {
        f32v sum = {};
        for (int32_t d = 0; d < call.page.group; d += kLanes) sum += load(factor + r * call.stride + d);
        total[r] = vtk::VTK_ISA::sum(sum);
      }
    const auto finish = [&](int32_t l, int r, f32v sum) {
      const int32_t count = std::min(kLanes, lanes - l);
      float* to = call.out + r * call.out_stride + l;
      f32v x = sum * (count == kLanes ? load(scale + l) : load_partial(scale + l, count));
      if (zero != nullptr) x += total[r] * (count == kLanes ? load(zero + l) : load_partial(zero + l, count));
      store(to, load(to) + x);
    };
    multiply_lanes<kRows>(decoder, words, lanes, rows, factor, call.stride, finish);
  }

  template <class T, int kRows>
  void add_none(const Call& call, const KvSection& s, const char* words) {
    const auto finish = [&](int32_t l, int r, f32v sum) {
      float* to = call.out + r * call.out_stride + l;
      store(to, load(to) + sum);
    };
    using Decoder = RawCodes<T>;
    multiply_lanes<kRows>(Decoder{}, words, call.page.lanes, s.depth / Decoder::kCodes, call.factor, call.stride,
                          finish);
  }

  template <int kRows, class Decoder, class Finish>
  static void multiply_lanes(const Decoder& decoder, const char* words, int32_t lanes, int32_t rows,
                             const float* factor, int32_t stride, const Finish& finish) {
    for (int32_t l = 0; l < lanes; l += kTileLanes) {
      f32v sum[kRows][kVectors];
      multiply_words<kRows>(decoder, words + l * 4, lanes, rows, lanes - l, factor, stride, sum);
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors && l + v * kLanes < lanes; ++v) finish(l + v * kLanes, r, sum[r][v]);
    }
  }

  // Five trits a byte, rewritten as words of 2-bit codes.
  const char* words_of_trits(const KvPage& page, const KvSection& s, const char* from) {
    const int32_t bytes = trit_bytes(s, page.lanes), rows = ceil_div(s.depth, 16);
    if (words_ == nullptr) {
      words_ = scratch<uint32_t>(int64_t{kMostDepth} / 16 * kMostDepth);
      trits_ = scratch<uint8_t>(int64_t{kMostDepth} * kMostDepth);
    }
    for (int32_t j = 0; j < bytes; j += kPageAlign) {  // 16 at once, as trit_of in device/bits.cuh does one
      u8x16 byte;
      std::memcpy(&byte, from + j, sizeof byte);
      u16x16 fraction = __builtin_convertvector(byte, u16x16);
      for (int i = 0; i < kTritsPerByte; ++i) {
        fraction *= 3;
        const u8x16 trit = __builtin_convertvector(fraction >> 8, u8x16);
        std::memcpy(&trits_[int64_t{i} * bytes + j], &trit, sizeof trit);
        fraction &= 255;
      }
    }
    for (int32_t row = 0; row < rows; ++row)
      for (int32_t l = 0; l < page.lanes; l += kLanes) {
        u32v word = {};
        for (int32_t i = 0; i < std::min(16, s.depth - row * 16); ++i) {
          u8v trit;
          std::memcpy(&trit, &trits_[(int64_t{row} * 16 + i) * page.lanes + l], sizeof trit);
          word |= __builtin_convertvector(trit, u32v) << code_place(2, i);
        }
        store_words(&words_[int64_t{row} * page.lanes + l], word, page.lanes - l);
      }
    return reinterpret_cast<const char*>(words_.get());
  }

  Scratch<float> scaled_;    // factors times scales
  Scratch<uint32_t> words_;  // a page of trits
  Scratch<uint8_t> trits_;
};

}  // namespace
}  // namespace VTK_ISA
}  // namespace vtk
