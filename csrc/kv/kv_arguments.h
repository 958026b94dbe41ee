// Checks and unpacks what the ops of the family share. Include only from an op's .cpp.
#pragma once
#include <string>

#include "common/check.h"
#include "kv/page.h"

namespace vtk {
namespace {

using OptTensor = std::optional<Tensor>;
constexpr int64_t kMaxHeadDim = 256;

// The words of an op's format, parsed.
struct KvFormat {
  KvScheme scheme[2];  // keys, values
  bool along_tokens[2];
  int32_t group;
};
constexpr const char* kSideNames[2] = {"k", "v"};

inline KvScheme parse_scheme(const char* op, int side, const std::string& text) {
  const struct {
    const char* name;
    KvScheme scheme;
  } names[] = {{"none", KvScheme::kNone}, {"fp8", KvScheme::kFp8},         {"int4", KvScheme::kInt4},
               {"int2", KvScheme::kInt2}, {"ternary", KvScheme::kTernary}, {"ternary5", KvScheme::kTernary5},
               {"sign", KvScheme::kSign}, {"mix", KvScheme::kMix}};
  for (const auto& known : names)
    if (text == known.name && (side == 0 || known.scheme != KvScheme::kMix)) return known.scheme;
  fail(op, "expected ", kSideNames[side], "_scheme to be \"none\", \"fp8\", \"int4\", \"int2\", \"ternary\", ",
       "\"ternary5\"", side == 0 ? ", \"sign\" or \"mix\"" : " or \"sign\"", ", got \"", text, "\"");
}

inline bool parse_axis(const char* op, int side, const std::string& text) {
  VTK_CHECK(op, text == "channel" || text == "token", "expected ", kSideNames[side],
            "_axis to be \"channel\" or \"token\", got \"", text, "\"");
  return text == "channel";
}

inline KvFormat parse_format(const char* op, const std::string& k_scheme, const std::string& v_scheme, int64_t group,
                             const std::string& k_axis, const std::string& v_axis) {
  VTK_CHECK(op, group == 32 || group == 64 || group == 128, "expected group to be 32, 64 or 128, got ", group);
  return {{parse_scheme(op, 0, k_scheme), parse_scheme(op, 1, v_scheme)},
          {parse_axis(op, 0, k_axis), parse_axis(op, 1, v_axis)},
          static_cast<int32_t>(group)};
}

inline void check_head_dim(const char* op, const KvFormat& format, int64_t head_dim) {
  VTK_CHECK(op, head_dim >= 8 && head_dim <= kMaxHeadDim && head_dim % 8 == 0,
            "expected a head dimension D that is a multiple of 8 up to ", kMaxHeadDim, ", got ", head_dim);
  for (int side = 0; side < 2; ++side) {
    if (format.along_tokens[side] || format.scheme[side] == KvScheme::kNone) continue;
    const bool mix = format.scheme[side] == KvScheme::kMix;
    const int64_t channels = mix ? mix_hard(static_cast<int32_t>(head_dim)) : head_dim;
    VTK_CHECK(op, channels % format.group == 0, "with ", kSideNames[side], "_axis \"token\" expected a group that ",
              "divides the ", channels, " channels", mix ? " of each half of a mix" : "", ", got ", format.group);
  }
}

inline KvPage page_of(const KvFormat& format, int side, int64_t head_dim, DType dtype) {
  return kv_page(side == 0, format.scheme[side], static_cast<int32_t>(head_dim), format.group,
                 format.along_tokens[side], dtype == DType::kFloat32 ? 32 : 16);
}

// k_order int32 [B | 1, Hk | 1, D], with a mix and only with it.
inline KvOrder order_of(const char* op, const KvFormat& format, const OptTensor& k_order, int64_t batch, int64_t heads,
                        int64_t head_dim, const char* like_name, const Tensor& like) {
  const bool mix = format.scheme[0] == KvScheme::kMix;
  VTK_CHECK(op, k_order.has_value() == mix,
            mix ? "expected k_order with k_scheme \"mix\" (vtkernels.kv.channel_order)"
                : "expected no k_order unless k_scheme is \"mix\"");
  if (!mix) return {};
  check_same_device(op, "k_order", *k_order, like_name, like);
  check_dtype(op, "k_order", *k_order, ScalarType::Int);
  check_dim(op, "k_order", *k_order, 3, "[B | 1, Hk | 1, D]");
  const auto fits = [&](int64_t d, int64_t size) { return k_order->size(d) == size || k_order->size(d) == 1; };
  VTK_CHECK(op, fits(0, batch) && fits(1, heads) && k_order->size(2) == head_dim,
            "expected k_order.shape = ", "[B | 1, Hk | 1, D] = [", batch, " | 1, ", heads, " | 1, ", head_dim,
            "], got ", shape_text(*k_order));
  KvOrder order;
  order.data = static_cast<const int32_t*>(k_order->const_data_ptr());
  order.stride_batch = k_order->size(0) == 1 ? 0 : k_order->stride(0);
  order.stride_head = k_order->size(1) == 1 ? 0 : k_order->stride(1);
  order.stride_channel = k_order->stride(2);
#if !defined(VTK_BACKEND_CUDA)
  for (int64_t b = 0; b < k_order->size(0); ++b)
    for (int64_t h = 0; h < k_order->size(1); ++h) {
      bool seen[kMaxHeadDim] = {};
      for (int32_t row = 0; row < head_dim; ++row) {
        const int32_t channel = order.channel(b, h, row);
        VTK_CHECK(op, channel >= 0 && channel < head_dim && !seen[channel],
                  "expected k_order to hold every channel 0 <= c < D = ", head_dim, " once, got ", channel, " at [", b,
                  ", ", h, ", ", row, "]");
        seen[channel] = true;
      }
    }
#endif
  return order;
}

// What every tensor of packed pages begins with.
struct PageCounts {
  int32_t batch, heads, pages;
};

inline PageCounts page_counts(const char* op, const Tensor& k_codes) {
  check_dim(op, "k_codes", k_codes, 4, "[B, Hk, pages, bytes]");
  PageCounts counts;
  counts.batch = check_count(op, "batch size", k_codes.size(0));
  counts.heads = check_count(op, "head count", k_codes.size(1));
  counts.pages = check_count(op, "page count", k_codes.size(2));
  check_count(op, "number of pages of all heads", 2 * k_codes.size(0) * k_codes.size(1) * k_codes.size(2));
  return counts;
}

struct PagesView {
  KvView<const uint8_t> codes;
  KvView<const uint16_t> meta;
};

inline PagesView pages_view(const char* op, int side, const Tensor& codes, const Tensor& meta, const PageCounts& counts,
                            const KvPage& page, const Tensor& k_codes) {
  const std::string codes_name = std::string(kSideNames[side]) + "_codes";
  const std::string meta_name = std::string(kSideNames[side]) + "_meta";
  const auto check = [&](const std::string& name, const Tensor& x, ScalarType dtype, const char* last, int64_t count) {
    check_same_device(op, name.c_str(), x, "k_codes", k_codes);
    check_dtype(op, name.c_str(), x, dtype);
    check_shape(op, name.c_str(), x, last, {counts.batch, counts.heads, counts.pages, count});
    check_contiguous_last(op, name.c_str(), x);
  };
  check(codes_name, codes, ScalarType::Byte, "[B, Hk, pages, bytes]", page.code_bytes);
  check(meta_name, meta, ScalarType::Half, "[B, Hk, pages, numbers]", page.meta_count);
  PagesView view;
  view.codes = {static_cast<const uint8_t*>(codes.const_data_ptr()), codes.stride(0), codes.stride(1), codes.stride(2)};
  view.meta = {static_cast<const uint16_t*>(meta.const_data_ptr()), meta.stride(0), meta.stride(1), meta.stride(2)};
  const uint64_t places = reinterpret_cast<uint64_t>(view.codes.data) | view.codes.stride_batch |
                          view.codes.stride_head | view.codes.stride_row;
  VTK_CHECK(op, places % kPageAlign == 0, "expected ", codes_name, " whose pages begin at multiples of ", kPageAlign,
            " bytes");
  return view;
}

}  // namespace
}  // namespace vtk
