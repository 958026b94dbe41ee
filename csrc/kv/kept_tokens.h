// A page of values without its excluded tokens. A weight of 0 is not enough: 0 times a NaN is a NaN.
// Include only from *_cpu.cpp files.
#pragma once
#include "common/scratch.h"
#include "kv/page_cpu.h"

namespace vtk {
namespace VTK_ISA {
namespace {

class KeptTokens {
 public:
  // The codes, those of tokens that are not kept being 0. Codes that stand for finite numbers whatever they are come
  // back as they lie.
  template <class Keeps>
  const uint8_t* codes(const KvPage& page, const uint8_t* from, const Keeps& keeps) {
    const KvScheme scheme = page.section[0].scheme;
    if (scheme != KvScheme::kNone && scheme != KvScheme::kFp8) return from;
    codes_ = scratch<uint8_t>(page.code_bytes);
    const int32_t bits = scheme == KvScheme::kNone ? page.element_bits : 8, depth = 32 / bits;
    for (int32_t row = 0; row * depth < page.depth; ++row) {
      uint32_t mask = 0;
      for (int32_t i = 0; i < depth; ++i)
        if (keeps(row * depth + i)) mask |= (0xffffffffu >> (32 - bits)) << code_place(bits, i);
      for (int32_t l = 0; l < page.lanes; l += kLanes) {
        const int64_t at = (int64_t{row} * page.lanes + l) * 4;
        store_words(&codes_[at], load_words(from + at, page.lanes - l) & mask, page.lanes - l);
      }
    }
    return codes_.get();
  }

  // Scales and zeros, 0 where all tokens of a group are left out.
  template <class Keeps>
  const uint16_t* meta(const KvPage& page, const uint16_t* from, const Keeps& keeps) {
    const KvSection& s = page.section[0];
    const int32_t tokens = page.per_lane ? page.group : 1;  // of a number
    const int32_t groups = meta_groups(page, s), width = meta_width(page, s);
    meta_ = scratch<uint16_t>(page.meta_count);
    std::copy_n(from, page.meta_count, meta_.get());
    for (int32_t first = 0; first < page.depth; first += tokens) {
      bool kept = false;
      for (int32_t t = first; t < first + tokens; ++t) kept = kept || keeps(t);
      if (kept) continue;
      for (int32_t plane = 0; plane < meta_planes(s.scheme); ++plane) {
        uint16_t* numbers = &meta_[int64_t{plane} * groups * width];
        if (page.per_lane)
          std::fill_n(numbers + first / tokens * width, width, uint16_t{0});
        else
          for (int32_t g = 0; g < groups; ++g) numbers[g * width + first] = 0;
      }
    }
    return meta_.get();
  }

 private:
  Scratch<uint8_t> codes_;
  Scratch<uint16_t> meta_;
};

}  // namespace
}  // namespace VTK_ISA
}  // namespace vtk
