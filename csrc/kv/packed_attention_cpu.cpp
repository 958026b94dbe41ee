// packed_attention on the CPU.
//
// out_i = sum over n of softmax_n(scale q_i k_n) v_n, logits in powers of two, online softmax a page at a time
//
// The query heads of one key head are rows of one task, so that a page is read once for all of them; rows go through
// the products (page_product.h) four at a time. Long caches are cut into parts of 16 pages, merged in their order:
// which thread ran a part changes no bit, and a request's parts begin with its own first page, whatever the widest
// request of the batch has. Tokens that are in no page become pages of scheme none in scratch memory.
// Bound: reading the pages; 4 D multiply-adds a token for four rows come close.
#include "kv/packed_attention.h"

#include <vector>

#include "common/parallel.h"
#include "common/running_softmax.h"
#include "kv/kept_tokens.h"
#include "kv/page_product.h"

namespace vtk {
namespace VTK_ISA {
namespace {

constexpr int32_t kPartPages = 16;

// Numbers the sources of one request: its pages, its protected pages, runs of 128 residual tokens.
struct Sources {
  int32_t pages, with_protected, residual, count;
  Sources(const PackedAttentionParams& p, int32_t b)
      : pages(pages_of(p, b)),
        with_protected(pages + p.pages[1].count),
        residual(residual_of(p, b)),
        count(with_protected + ceil_div(residual, kPageTokens)) {}
};

// What key_bias makes of 128 tokens, in powers of two.
struct TokenBias {
  float of[kPageTokens];  // -inf: excluded
  int32_t kept;           // tokens that are not

  bool excludes(int32_t t) const { return of[t] == -kInfinity; }
};

template <class T>
class PackedRows {
 public:
  explicit PackedRows(const PackedAttentionParams& params)
      : p(params), group_(p.heads / p.key_heads), rows_(p.num_queries * group_), stride_(padded(p.head_dim)) {
    const int32_t rows = round_up(rows_, kProductRows);
    query_ = zeros(int64_t{rows} * kFactorStride);
    turned_ = zeros(int64_t{rows} * kFactorStride);
    logits_ = zeros(kProductRows * kFactorStride);
    for (int side = 0; side < 2; ++side) {
      loose_page_[side] = kv_page(side == 0, KvScheme::kNone, p.head_dim, 128, true, 32);
      loose_[side] = zeros(kPageTokens * stride_ + kLanes);
    }
    natural_ = zeros(kPageTokens * stride_);
  }

  // Sources [begin, end) of the request.
  void run(int32_t b, int32_t h, int32_t begin, int32_t end, const PartialRows& out) {
    load_queries(b, h);
    std::fill_n(out.values, int64_t{round_up(rows_, kProductRows)} * stride_, 0.0f);
    std::fill_n(out.most, rows_, -kInfinity);
    std::fill_n(out.sum, rows_, 0.0f);
    const Sources sources(p, b);
    for (int32_t source = begin; source < end; ++source) {
      if (source < sources.pages)
        attend_page(0, b, h, source, source, source + 1 < std::min(end, sources.pages), out);
      else if (source < sources.with_protected)
        attend_page(1, b, h, source - sources.pages, p.pages[0].count + source - sources.pages,
                    source + 1 < std::min(end, sources.with_protected), out);
      else
        attend_residual(b, h, (source - sources.with_protected) * kPageTokens, sources.residual, out);
    }
  }

 private:
  static Scratch<float> zeros(int64_t count) {
    Scratch<float> out = scratch<float>(count);
    std::fill_n(out.get(), count, 0.0f);
    return out;
  }

  struct Bytes {
    const uint8_t* at = nullptr;
    int64_t count = 0;
  };

  static void prefetch(const uint16_t* from, int32_t count) {
    for (int32_t i = 0; i < count; i += 32) __builtin_prefetch(from + i, 0, 2);
  }

  static bool is_mix(const PackedClass& pages) { return pages.page[0].sections == 2; }

  // Row r is query r / group of head h group + r % group.
  void load_queries(int32_t b, int32_t h) {
    const float scale = p.scale * kLog2E;
    for (int32_t r = 0; r < rows_; ++r) {
      const PackedRow at = packed_row(r, group_);
      const T* from = reinterpret_cast<const T*>(p.query.at(b, h * group_ + at.head, at.query));
      float* to = &query_[int64_t{r} * kFactorStride];
      for (int32_t c = 0; c < p.head_dim; ++c) to[c] = to_float(from[c]) * scale;
    }
    if (p.order.data != nullptr) turn_queries(b, h);
  }

  // The transform of a mix, on the query: [depth][row] for a moment.
  void turn_queries(int32_t b, int32_t h) {
    const KvSection& easy = p.pages[is_mix(p.pages[0]) ? 0 : 1].page[0].section[1];
    const int32_t rows = padded(rows_);
    Scratch<float> columns = zeros(int64_t{p.head_dim} * rows);
    for (int32_t d = 0; d < p.head_dim; ++d) {
      const int32_t channel = p.order.channel(b, h, d);
      for (int32_t r = 0; r < rows_; ++r) columns[d * rows + r] = query_[r * kFactorStride + channel];
    }
    hadamard(&columns[easy.first * rows], easy.depth, rows);
    for (int32_t d = 0; d < p.head_dim; ++d)
      for (int32_t r = 0; r < rows_; ++r) turned_[r * kFactorStride + d] = columns[d * rows + r];
  }

  // The bias of `count` tokens from `first` on, or null where there is none. Tokens beyond are excluded.
  const TokenBias* load_bias(int32_t b, int64_t first, int32_t count) {
    if (p.key_bias == nullptr) return nullptr;
    const float* from = p.key_bias + b * p.bias_stride_batch + first * p.bias_stride_key;
    bias_.kept = 0;
    for (int32_t t = 0; t < kPageTokens; ++t) {
      bias_.of[t] = t < count ? from[t * p.bias_stride_key] * kLog2E : -kInfinity;
      bias_.kept += bias_.excludes(t) ? 0 : 1;
    }
    return &bias_;
  }

  // `number` counts pages of both classes where the bias does; `more`: page n + 1 follows.
  void attend_page(int kind, int32_t b, int32_t h, int32_t n, int64_t number, bool more, const PartialRows& out) {
    const PackedClass& pages = p.pages[kind];
    const int32_t place = packed_place(p, kind, b, n);
    if (place < 0) return;
    const TokenBias* bias = load_bias(b, number * kPageTokens, kPageTokens);
    if (bias != nullptr && bias->kept == 0) return;
    const uint8_t* codes[2] = {pages.codes[0].at(b, h, place), pages.codes[1].at(b, h, place)};
    const uint16_t* meta[2] = {pages.meta[0].at(b, h, place), pages.meta[1].at(b, h, place)};
    if (bias != nullptr && bias->kept < kPageTokens) {
      const auto keeps = [&](int32_t t) { return !bias->excludes(t); };
      codes[1] = kept_.codes(pages.page[1], codes[1], keeps);
      meta[1] = kept_.meta(pages.page[1], meta[1], keeps);
    }
    const int32_t next_place = more ? packed_place(p, kind, b, n + 1) : -1;
    Bytes next;
    if (next_place >= 0) {
      next = {pages.codes[0].at(b, h, next_place), pages.page[0].code_bytes};
      for (int side = 0; side < 2; ++side) prefetch(pages.meta[side].at(b, h, next_place), pages.page[side].meta_count);
    }
    attend_tokens<T>(pages.page, codes, meta, is_mix(pages) ? turned_.get() : query_.get(), bias, next, out,
                     [](int32_t, float*) {});
  }

  // Residual tokens [first, first + 128) of the request's `length`.
  void attend_residual(int32_t b, int32_t h, int32_t first, int32_t length, const PartialRows& out) {
    const int32_t count = std::min(kPageTokens, length - first);
    const int64_t before = (int64_t{p.pages[0].count} + p.pages[1].count) * kPageTokens;
    const TokenBias* bias = load_bias(b, before + first, count);
    if (bias != nullptr && bias->kept == 0) return;
    load_residual(b, h, first, count, bias);
    const uint8_t* codes[2];
    const uint16_t* no_meta[2] = {};
    for (int side = 0; side < 2; ++side) codes[side] = reinterpret_cast<const uint8_t*>(loose_[side].get());
    const int32_t seen_by_all = p.causal || p.ancestors != nullptr ? length - p.num_queries - first : count;
    attend_tokens<float>(loose_page_, codes, no_meta, query_.get(), bias, {}, out, [&](int32_t r, float* x) {
      std::fill(x + count, x + kPageTokens, -kInfinity);
      for (int32_t t = std::max(seen_by_all, 0); t < count; ++t)
        if (!packed_sees(p, b, r / group_, first + t, length)) x[t] = -kInfinity;
    });
  }

  // As pages of scheme none; excluded tokens, and those beyond `count`, are zeros.
  void load_residual(int32_t b, int32_t h, int32_t first, int32_t count, const TokenBias* bias) {
    const auto token = [&](int side, int32_t t) {
      return reinterpret_cast<const T*>(p.residual[side].at(b, h, first + t));
    };
    std::fill_n(natural_.get(), int64_t{kPageTokens} * stride_, 0.0f);
    std::fill_n(loose_[1].get(), int64_t{kPageTokens} * p.head_dim, 0.0f);
    for (int32_t t = 0; t < count; ++t) {
      if (bias != nullptr && bias->excludes(t)) continue;
      load_row(token(0, t), p.head_dim, &natural_[int64_t{t} * stride_]);
      load_row(token(1, t), p.head_dim, &loose_[1][int64_t{t} * p.head_dim]);
    }
    transpose_matrix(
        kPageTokens, p.head_dim, [&](int32_t t) { return &natural_[int64_t{t} * stride_]; },
        [&](int32_t c) { return &loose_[0][int64_t{c} * kPageTokens]; });
  }

  // The products of 128 tokens, a block of rows after the other, and the softmax between them. hide(r, x) takes from
  // row r's logits what the row does not see. Meanwhile the keys of the page at `next` are fetched.
  template <class Element, class Hide>
  void attend_tokens(const KvPage (&page)[2], const uint8_t* (&codes)[2], const uint16_t* const (&meta)[2],
                     const float* query, const TokenBias* bias, const Bytes& next, const PartialRows& out,
                     const Hide& hide) {
    product_.read_ahead(page[0], codes[1], page[1].code_bytes);
    const uint8_t* keys = product_.open(page[0], codes[0]);
    const uint8_t* values = nullptr;
    for (int32_t first = 0; first < rows_; first += kProductRows) {
      const int32_t rows = std::min(kProductRows, rows_ - first);
      for (int32_t r = 0; r < rows; ++r)
        for (int32_t t = 0; t < kPageTokens; t += kLanes) store(&logits_[r * kFactorStride + t], f32v{});
      product_.add<Element>(page[0], keys, meta[0], query + int64_t{first} * kFactorStride, rows, logits_.get(),
                            kFactorStride);
      for (int32_t r = 0; r < rows; ++r) softmax(out, first + r, &logits_[r * kFactorStride], bias, hide);
      if (first == 0) {
        values = product_.open(page[1], codes[1]);
        product_.read_ahead(page[1], next.at, next.count);
      }
      product_.add<Element>(page[1], values, meta[1], logits_.get(), rows, out.values + int64_t{first} * stride_,
                            stride_);
    }
  }

  // Logits of row r to weights; what is in out.values is brought to the new maximum.
  template <class Hide>
  void softmax(const PartialRows& out, int32_t r, float* x, const TokenBias* bias, const Hide& hide) {
    if (bias != nullptr) add_bias(x, *bias);
    hide(r, x);
    float correct;
    fold_logits(x, kPageTokens, out.most[r], out.sum[r], correct);
    if (correct == 1.0f) return;
    float* values = out.values + int64_t{r} * stride_;
    for (int32_t c = 0; c < stride_; c += kLanes) store(values + c, load(values + c) * correct);
  }

  // A choice, not a sum: a logit of an excluded token may be NaN.
  static void add_bias(float* x, const TokenBias& bias) {
    for (int32_t t = 0; t < kPageTokens; t += kLanes) {
      const f32v add = load(bias.of + t);
      store(x + t, add == -kInfinity ? add : load(x + t) + add);
    }
  }

  const PackedAttentionParams& p;
  const int32_t group_, rows_, stride_;
  Scratch<float> query_, turned_;      // [rows][kFactorStride], scaled; behind the transform of a mix
  Scratch<float> logits_;              // [kProductRows][kFactorStride]
  Scratch<float> natural_, loose_[2];  // residual tokens as a page
  KvPage loose_page_[2];
  TokenBias bias_;
  KeptTokens kept_;
  PageProduct product_;
};

// Row r, merged of its parts, as row `to` of the output.
template <class T>
void write_row(const PackedAttentionParams& p, const PartialRows* parts, int64_t num_parts, int32_t r, int64_t to,
               float* values) {
  const int32_t stride = padded(p.head_dim);
  float most, sum;
  merge_row(parts, num_parts, r, stride, values, most, sum);
  const float by_sum = inverse_sum(sum);
  for (int32_t c = 0; c < stride; c += kLanes) store(values + c, load(values + c) * by_sum);
  store_row(values, p.head_dim, static_cast<T*>(p.out) + to * p.head_dim);
  p.lse[to] = lse_of(most, sum);
}

template <class T>
void attend(const PackedAttentionParams& p) {
  const int32_t group = p.heads / p.key_heads, rows = p.num_queries * group, stride = padded(p.head_dim);
  const int32_t sources = p.pages[0].count + p.pages[1].count + ceil_div(p.residual_tokens, kPageTokens);
  const int32_t parts = ceil_div(sources, kPartPages);
  const int64_t heads = int64_t{p.batch} * p.key_heads;
  const int64_t values_size = int64_t{round_up(rows, kProductRows)} * stride;
  Scratch<float> values = scratch<float>(heads * parts * values_size), sums = scratch<float>(heads * parts * rows * 2);
  std::vector<PartialRows> partial(heads * parts);
  for (size_t i = 0; i < partial.size(); ++i)
    partial[i] = {&values[i * values_size], &sums[i * rows * 2], &sums[i * rows * 2 + rows]};
  const int64_t work = heads * sources * kPageTokens * rows * p.head_dim;
  run_tasks(
      heads * parts, work, [&] { return PackedRows<T>(p); },
      [&](PackedRows<T>& worker, int64_t i) {
        const int32_t b = static_cast<int32_t>(i / parts / p.key_heads);
        const int32_t h = static_cast<int32_t>(i / parts % p.key_heads);
        const Range range = tile_range(static_cast<int32_t>(i % parts), kPartPages, Sources(p, b).count);
        worker.run(b, h, range.begin, range.end, partial[i]);
      });
  Scratch<float> merged = scratch<float>(stride);
  for (int64_t head = 0; head < heads; ++head)
    for (int32_t r = 0; r < rows; ++r) {
      const PackedRow at = packed_row(r, group);
      write_row<T>(p, partial.data() + head * parts, parts, r, (head * group + at.head) * p.num_queries + at.query,
                   merged.get());
    }
}

}  // namespace

void packed_attention_cpu(const PackedAttentionParams& p) {
  switch (p.dtype) {
    case DType::kFloat32: return attend<float>(p);
    case DType::kFloat16: return attend<f16>(p);
    case DType::kBFloat16: return attend<bf16>(p);
  }
}

}  // namespace VTK_ISA
}  // namespace vtk
