// kv_unpack on the CPU. A task is one page of keys or of values: codes become values in the form [depth][lane], and
// that becomes rows of tokens.
#include "kv/kv_unpack.h"

#include "common/parallel.h"
#include "common/scratch.h"
#include "device/bits.cuh"
#include "kv/page_cpu.h"

namespace vtk {
namespace VTK_ISA {
namespace {

constexpr int32_t kMostScales = 2048;  // of a section: 8 groups of 32 in 256 channels, whose scales fill padded rows

template <class T>
class PageUnpacker {
 public:
  explicit PageUnpacker(const KvUnpackParams& params) : p(params) {
    const int32_t most = padded(std::max(p.head_dim, kPageTokens));
    for (Scratch<float>* matrix : {&page_, &rows_}) {
      *matrix = scratch<float>(int64_t{most} * most);
      std::fill_n(matrix->get(), int64_t{most} * most, 0.0f);  // what pads a row takes part in vectors
    }
    row_of_ = scratch<int32_t>(p.head_dim);
    scales_ = scratch<float>(kMostScales);
    zeros_ = scratch<float>(kMostScales);
  }

  void run(const KvUnpackSide& side, int32_t b, int32_t h, int32_t n) {
    const KvPage& page = side.page;
    codes_ = side.codes.at(b, h, n);
    const auto token = [&](int32_t t) { return reinterpret_cast<T*>(side.x.at(b, h, int64_t{n} * kPageTokens + t)); };
    if (page.section[0].scheme == KvScheme::kNone) return copy(page, token);
    stride_ = padded(page.lanes);
    for (int32_t i = 0; i < page.sections; ++i) {
      const KvSection& s = page.section[i];
      read_meta(page, s, side.meta.at(b, h, n) + s.meta_offset);
      read_codes(page, s);
      if (i == 1) hadamard(&page_[int64_t{s.first} * stride_], s.depth, stride_);
    }
    if (page.is_key) {
      for (int32_t row = 0; row < p.head_dim; ++row) row_of_[side.order.channel(b, h, row)] = row;
      const int32_t stride = padded(p.head_dim);
      transpose_matrix(
          p.head_dim, kPageTokens, [&](int32_t c) { return &page_[int64_t{row_of_[c]} * stride_]; },
          [&](int32_t t) { return &rows_[int64_t{t} * stride]; });
      for (int32_t t = 0; t < kPageTokens; ++t) store_row(&rows_[int64_t{t} * stride], p.head_dim, token(t));
    } else {
      for (int32_t t = 0; t < kPageTokens; ++t) store_row(&page_[int64_t{t} * stride_], p.head_dim, token(t));
    }
  }

 private:
  template <class Token>
  void copy(const KvPage& page, const Token& token) {
    const int32_t row_bytes = p.head_dim * static_cast<int32_t>(sizeof(T)), words = row_bytes / 4;
    const int32_t stride = padded(words);
    if (page.is_key) {
      transpose_matrix(
          words, kPageTokens,
          [&](int32_t w) { return reinterpret_cast<const float*>(codes_) + int64_t{w} * kPageTokens; },
          [&](int32_t t) { return &rows_[int64_t{t} * stride]; });
      for (int32_t t = 0; t < kPageTokens; ++t) std::memcpy(token(t), &rows_[int64_t{t} * stride], row_bytes);
    } else if constexpr (sizeof(T) == 4) {
      for (int32_t t = 0; t < kPageTokens; ++t) std::memcpy(token(t), codes_ + int64_t{t} * row_bytes, row_bytes);
    } else {
      for (int32_t t = 0; t < kPageTokens; t += 2) {
        T *even = token(t), *odd = token(t + 1);
        const T* from = reinterpret_cast<const T*>(codes_) + int64_t{t} * p.head_dim;
        for (int32_t c = 0; c < p.head_dim; ++c) even[c] = from[2 * c], odd[c] = from[2 * c + 1];
      }
    }
  }

  void read_meta(const KvPage& page, const KvSection& s, const uint16_t* meta) {
    const int32_t groups = meta_groups(page, s), width = meta_width(page, s);
    meta_stride_ = padded(width);
    std::fill_n(zeros_.get(), groups * meta_stride_, 0.0f);
    for (int32_t g = 0; g < groups; ++g)
      for (int32_t i = 0; i < width; ++i) {
        scales_[g * meta_stride_ + i] = CpuHalf::to(meta[g * width + i]);
        if (meta_planes(s.scheme) == 2) zeros_[g * meta_stride_ + i] = CpuHalf::to(meta[(groups + g) * width + i]);
      }
  }

  void read_codes(const KvPage& page, const KvSection& s) {
    const uint8_t* from = codes_ + s.code_offset;
    if (s.scheme == KvScheme::kTernary5) return read_trits(page, s, from);
    const int bits = code_bits(s.scheme), planes = s.scheme == KvScheme::kTernary ? 2 : 1;
    for (int32_t row = 0; row < word_rows(s); ++row)
      for (int32_t l = 0; l < page.lanes; l += kLanes) {
        u32v word[2] = {};
        for (int32_t plane = 0; plane < planes; ++plane)
          word[plane] = load_words(from + ((int64_t{row} * planes + plane) * page.lanes + l) * 4, page.lanes - l);
        for (int32_t i = 0; i < std::min(32 / bits, s.depth - row * (32 / bits)); ++i) {
          const u32v code = word[0] >> code_place(bits, i) & ((1u << bits) - 1);
          const u32v negative = word[1] >> code_place(bits, i) & 1u;
          write_value(page, s, row * (32 / bits) + i, l, planes == 2 ? 1u + code - 2u * negative : code);
        }
      }
  }

  void read_trits(const KvPage& page, const KvSection& s, const uint8_t* from) {
    const int32_t bytes = trit_bytes(s, page.lanes);
    Scratch<uint32_t> trits = scratch<uint32_t>(int64_t{bytes} * kTritsPerByte + kLanes);
    for (int i = 0; i < kTritsPerByte; ++i)
      for (int32_t j = 0; j < bytes; ++j) trits[int64_t{i} * bytes + j] = trit_of(from[j], i);
    for (int32_t d = 0; d < s.depth; ++d)
      for (int32_t l = 0; l < page.lanes; l += kLanes)
        write_value(page, s, d, l, load_words(&trits[int64_t{d} * page.lanes + l]));
  }

  void write_value(const KvPage& page, const KvSection& s, int32_t d, int32_t l, u32v code) {
    const int64_t at =
        page.per_lane ? int64_t{d} / page.group * meta_stride_ + l : int64_t{l} / page.group * meta_stride_ + d;
    const f32v scale = page.per_lane ? load(&scales_[at]) : splat(scales_[at]);
    const f32v zero = page.per_lane ? load(&zeros_[at]) : splat(zeros_[at]);
    store(&page_[(int64_t{s.first} + d) * stride_ + l], scale * kv_digit<f32v>(s.scheme, code) + zero);
  }

  const KvUnpackParams& p;
  Scratch<float> page_, rows_;  // the page as [depth][lane], and keys as rows of tokens
  Scratch<int32_t> row_of_;     // of each channel
  Scratch<float> scales_, zeros_;
  int32_t stride_ = 0, meta_stride_ = 0;
  const uint8_t* codes_ = nullptr;
};

template <class T>
void unpack(const KvUnpackParams& p) {
  parallel_for(int64_t{2} * p.batch * p.heads * p.pages, 1, [&](int64_t begin, int64_t end) {
    PageUnpacker<T> unpacker(p);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / 2 % p.pages, head = i / 2 / p.pages;
      unpacker.run(p.side[i % 2], static_cast<int32_t>(head / p.heads), static_cast<int32_t>(head % p.heads),
                   static_cast<int32_t>(n));
    }
  });
}

}  // namespace

void kv_unpack_cpu(const KvUnpackParams& p) {
  switch (p.dtype) {
    case DType::kFloat32: return unpack<float>(p);
    case DType::kFloat16: return unpack<f16>(p);
    case DType::kBFloat16: return unpack<bf16>(p);
  }
}

}  // namespace VTK_ISA
}  // namespace vtk
