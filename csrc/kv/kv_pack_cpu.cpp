// kv_pack on the CPU. A task is one page of keys or of values: it is brought into the form [depth][lane], quantised
// with a vector of groups at a time (the form is transposed where a scale belongs to a depth), and packed with lanes as
// lanes.
#include "kv/kv_pack.h"

#include "common/parallel.h"
#include "common/scratch.h"
#include "device/bits.cuh"
#include "kv/page_cpu.h"

namespace vtk {
namespace VTK_ISA {
namespace {

KvStatistics<float> lane_of(const KvStatistics<f32v>& s, int lane) {
  return {s.low[lane], s.high[lane], s.sum[lane], s.kept[lane], s.count[lane], s.poison[lane]};
}

template <class T>
class PagePacker {
 public:
  explicit PagePacker(const KvPackParams& params) : p(params) {
    const int32_t most = padded(std::max(p.head_dim, kPageTokens));
    for (Scratch<float>* matrix : {&page_, &turned_}) {
      *matrix = scratch<float>(int64_t{most} * most);
      std::fill_n(matrix->get(), int64_t{most} * most, 0.0f);  // what pads a row takes part in vectors
    }
    row_of_ = scratch<int32_t>(p.head_dim);
  }

  void run(const KvPackSide& side, int32_t b, int32_t h, int32_t n) {
    const KvPage& page = side.page;
    codes_ = side.codes.at(b, h, n);
    meta_ = side.meta.at(b, h, n);
    const auto token = [&](int32_t t) {
      return reinterpret_cast<const T*>(side.x.at(b, h, int64_t{n} * kPageTokens + t));
    };
    if (page.section[0].scheme == KvScheme::kNone) return copy(page, token);
    stride_ = padded(page.lanes);
    if (page.is_key) {
      for (int32_t row = 0; row < p.head_dim; ++row) row_of_[side.order.channel(b, h, row)] = row;
      load_keys(token);
    } else {
      for (int32_t t = 0; t < kPageTokens; ++t) load_row(token(t), p.head_dim, &page_[int64_t{t} * stride_]);
    }
    for (int32_t i = 0; i < page.sections; ++i) {
      const KvSection& s = page.section[i];
      float* x = &page_[int64_t{s.first} * stride_];
      if (i == 1) hadamard(x, s.depth, stride_);
      quantise(page, s, x);
      write_codes(page, s, reinterpret_cast<const char*>(x));
    }
  }

 private:
  // Bits, not numbers: a NaN keeps its payload.
  template <class Token>
  void copy(const KvPage& page, const Token& token) {
    const int32_t row_bytes = p.head_dim * static_cast<int32_t>(sizeof(T)), words = row_bytes / 4;
    const int32_t stride = padded(words);
    if (page.is_key) {  // a word is the next channels of a token
      for (int32_t t = 0; t < kPageTokens; ++t) std::memcpy(&page_[int64_t{t} * stride], token(t), row_bytes);
      transpose_matrix(
          kPageTokens, words, [&](int32_t t) { return &page_[int64_t{t} * stride]; },
          [&](int32_t w) { return reinterpret_cast<float*>(codes_) + int64_t{w} * kPageTokens; });
    } else if constexpr (sizeof(T) == 4) {
      for (int32_t t = 0; t < kPageTokens; ++t) std::memcpy(codes_ + int64_t{t} * row_bytes, token(t), row_bytes);
    } else {  // a word is a channel of two tokens
      for (int32_t t = 0; t < kPageTokens; t += 2) {
        const T *even = token(t), *odd = token(t + 1);
        T* to = reinterpret_cast<T*>(codes_) + int64_t{t} * p.head_dim;
        for (int32_t c = 0; c < p.head_dim; ++c) to[2 * c] = even[c], to[2 * c + 1] = odd[c];
      }
    }
  }

  template <class Token>
  void load_keys(const Token& token) {
    const int32_t stride = padded(p.head_dim);
    for (int32_t t = 0; t < kPageTokens; ++t) load_row(token(t), p.head_dim, &turned_[int64_t{t} * stride]);
    transpose_matrix(
        kPageTokens, p.head_dim, [&](int32_t t) { return &turned_[int64_t{t} * stride]; },
        [&](int32_t c) { return &page_[int64_t{row_of_[c]} * stride_]; });
  }

  // Rows of the section at x become codes.
  void quantise(const KvPage& page, const KvSection& s, float* x) {
    if (page.per_lane) return quantise_columns(page, s, x, s.depth, page.lanes, stride_);
    const int32_t stride = padded(s.depth);
    transpose_matrix(
        s.depth, page.lanes, [&](int32_t d) { return x + int64_t{d} * stride_; },
        [&](int32_t l) { return &turned_[int64_t{l} * stride]; });
    quantise_columns(page, s, turned_.get(), page.lanes, s.depth, stride);
    transpose_matrix(
        page.lanes, s.depth, [&](int32_t l) { return &turned_[int64_t{l} * stride]; },
        [&](int32_t d) { return x + int64_t{d} * stride_; });
  }

  void quantise_columns(const KvPage& page, const KvSection& s, float* x, int32_t rows, int32_t cols, int32_t stride) {
    switch (s.scheme) {
      case KvScheme::kFp8: return quantise_columns<KvScheme::kFp8>(page, s, x, rows, cols, stride);
      case KvScheme::kInt4: return quantise_columns<KvScheme::kInt4>(page, s, x, rows, cols, stride);
      case KvScheme::kInt2: return quantise_columns<KvScheme::kInt2>(page, s, x, rows, cols, stride);
      case KvScheme::kSign: return quantise_columns<KvScheme::kSign>(page, s, x, rows, cols, stride);
      default: return quantise_columns<KvScheme::kTernary>(page, s, x, rows, cols, stride);
    }
  }

  // A group is page.group rows of a column.
  template <KvScheme kScheme>
  void quantise_columns(const KvPage& page, const KvSection& s, float* x, int32_t rows, int32_t cols, int32_t stride) {
    const float size = static_cast<float>(page.group);
    uint16_t *scales = meta_ + s.meta_offset, *zeros = scales + rows / page.group * cols;
    for (int32_t g = 0; g < rows / page.group; ++g)
      for (int32_t c = 0; c < cols; c += kLanes) {
        float* at = x + int64_t{g} * page.group * stride + c;
        KvStatistics<f32v> stats = begin_statistics(load(at));
        for (int32_t r = 0; r < page.group; ++r) observe(stats, load(at + r * stride));
        f32v limit = {};
        if constexpr (kScheme == KvScheme::kTernary) {
          limit = p.ternary_threshold * (stats.sum / size);
          for (int32_t r = 0; r < page.group; ++r) observe_kept(stats, load(at + r * stride), limit);
        }
        f32v scale = {}, zero = {};
        for (int lane = 0; lane < std::min(kLanes, cols - c); ++lane) {
          const KvMeta meta = meta_of<CpuHalf>(kScheme, lane_of(stats, lane), size);
          scales[g * cols + c + lane] = meta.scale;
          if constexpr (meta_planes(kScheme) == 2) zeros[g * cols + c + lane] = meta.zero;
          scale[lane] = CpuHalf::to(meta.scale);
          zero[lane] = CpuHalf::to(meta.zero);
        }
        for (int32_t r = 0; r < page.group; ++r) {
          float* value = at + r * stride;
          store_words(value, kv_code<u32v>(kScheme, load(value), scale, zero, limit));
        }
      }
  }

  // codes: 32-bit numbers [depth][stride]
  void write_codes(const KvPage& page, const KvSection& s, const char* codes) const {
    const auto code_at = [&](int32_t d, int32_t l) {
      return load_words(codes + (int64_t{d} * stride_ + l) * sizeof(uint32_t));
    };
    uint8_t* to = codes_ + s.code_offset;
    if (s.scheme == KvScheme::kTernary5) return write_trits(page, s, code_at, to);
    const int bits = code_bits(s.scheme), planes = s.scheme == KvScheme::kTernary ? 2 : 1;
    for (int32_t row = 0; row < word_rows(s); ++row)
      for (int32_t l = 0; l < page.lanes; l += kLanes) {
        u32v word[2] = {};
        for (int32_t i = 0; i < std::min(32 / bits, s.depth - row * (32 / bits)); ++i) {
          const u32v code = code_at(row * (32 / bits) + i, l);
          if (planes == 2) {
            word[0] |= ((code & 1u) ^ 1u) << code_place(bits, i);  // 0 and 2 are not 1
            word[1] |= (u32v)(code == 0u) >> 31 << code_place(bits, i);
          } else {
            word[0] |= code << code_place(bits, i);
          }
        }
        for (int32_t plane = 0; plane < planes; ++plane)
          store_words(to + ((int64_t{row} * planes + plane) * page.lanes + l) * 4, word[plane], page.lanes - l);
      }
  }

  template <class CodeAt>
  void write_trits(const KvPage& page, const KvSection& s, const CodeAt& code_at, uint8_t* to) const {
    const int32_t bytes = trit_bytes(s, page.lanes);
    Scratch<uint32_t> trits = scratch<uint32_t>(int64_t{bytes} * kTritsPerByte + kLanes);
    std::fill_n(trits.get(), bytes * kTritsPerByte, 1u);
    for (int32_t d = 0; d < s.depth; ++d)
      for (int32_t l = 0; l < page.lanes; l += kLanes)
        store_words(&trits[int64_t{d} * page.lanes + l], code_at(d, l), page.lanes - l);
    for (int32_t j = 0; j < bytes; ++j) to[j] = pack_trits([&](int i) { return trits[int64_t{i} * bytes + j]; });
  }

  const KvPackParams& p;
  Scratch<float> page_, turned_;  // the page as [depth][lane], and its transpose
  Scratch<int32_t> row_of_;       // of each channel
  int32_t stride_ = 0;            // of page_
  uint8_t* codes_ = nullptr;
  uint16_t* meta_ = nullptr;
};

template <class T>
void pack(const KvPackParams& p) {
  parallel_for(int64_t{2} * p.batch * p.heads * p.pages, 1, [&](int64_t begin, int64_t end) {
    PagePacker<T> packer(p);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / 2 % p.pages, head = i / 2 / p.pages;
      packer.run(p.side[i % 2], static_cast<int32_t>(head / p.heads), static_cast<int32_t>(head % p.heads),
                 static_cast<int32_t>(n));
    }
  });
}

}  // namespace

void kv_pack_cpu(const KvPackParams& p) {
  switch (p.dtype) {
    case DType::kFloat32: return pack<float>(p);
    case DType::kFloat16: return pack<f16>(p);
    case DType::kBFloat16: return pack<bf16>(p);
  }
}

}  // namespace VTK_ISA
}  // namespace vtk
