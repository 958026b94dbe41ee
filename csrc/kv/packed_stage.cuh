// One side of 128 tokens in shared memory, as the tensor-core kernel of packed_attention reads it: rows of words
// [word row][lane] as in the page, then metadata [number of the group][depth or lane] with zeros up to a multiple of
// 32. Residual tokens are brought into the form of a page of scheme none. Five-in-a-byte codes stay bytes until
// words_of_trits.
//
// A row is a multiple of 128 bytes. Its 16-byte chunks are exchanged so that the four threads of a quad, which read
// the same lanes of four units of depth (packed_digits.cuh), find them in different banks.
#pragma once
#include "kv/packed_parts.cuh"

namespace vtk {
namespace {

constexpr int kMmaThreads = 128;

__host__ __device__ inline int32_t staged_row_bytes(const KvPage& page) { return round_up(page.lanes, 32) * 4; }
__host__ __device__ inline int32_t staged_meta_width(const KvPage& page, const KvSection& s) {
  return round_up(meta_width(page, s), 32);
}
__host__ __device__ inline bool is_trits(const KvPage& page) { return page.section[0].scheme == KvScheme::kTernary5; }
__host__ __device__ inline int32_t trit_words_bytes(const KvPage& page) {
  return ceil_div(page.depth, 16) * staged_row_bytes(page);
}

inline int32_t staged_code_bytes(const KvPage& page) {
  const int32_t bytes = static_cast<int32_t>(page.code_bytes);
  return is_trits(page) ? bytes : bytes / (page.lanes * 4) * staged_row_bytes(page);
}
inline int32_t staged_bytes(const KvPage& page) {
  int32_t bytes = staged_code_bytes(page);
  for (int32_t i = 0; i < page.sections; ++i) {
    const KvSection& s = page.section[i];
    bytes += meta_planes(s.scheme) * meta_groups(page, s) * staged_meta_width(page, s) * 2;
  }
  return bytes;
}

// Rows of words that hold 8 depths: 2^shift of them, or a part of one.
__host__ __device__ inline int32_t unit_shift(KvScheme scheme) {
  return scheme == KvScheme::kNone ? 2 : scheme == KvScheme::kFp8 ? 1 : 0;
}
__device__ inline int32_t staged_at(int32_t row, int32_t chunk, int32_t row_bytes, int32_t shift) {
  return row * row_bytes + (chunk ^ (row >> shift & 3) << 1) * 16;
}

// ---- Copies: 16 bytes at a time, to be waited for ----

__device__ inline void copy_words(const KvPage& page, const uint8_t* from, unsigned char* to) {
  const int32_t chunks = page.lanes / 4, vectors = static_cast<int32_t>(page.code_bytes) / 16;
  const int32_t row_bytes = staged_row_bytes(page), shift = unit_shift(page.section[0].scheme);
  const bool bytes = is_trits(page);
  for (int32_t v = threadIdx.x; v < vectors; v += kMmaThreads) {
    const int32_t at = bytes ? v * 16 : staged_at(v / chunks, v % chunks, row_bytes, shift);
    ptx::cp_async_16(to + at, from + v * 16, true);
  }
}

__device__ inline void copy_meta(const KvPage& page, const uint16_t* from, uint16_t* to) {
  for (int32_t i = 0; i < page.sections; ++i) {
    const KvSection& s = page.section[i];
    const int32_t rows = meta_planes(s.scheme) * meta_groups(page, s), width = meta_width(page, s);
    const int32_t staged = round_up(width, 32);
    const uint16_t* numbers = from + s.meta_offset;
    if (width % 8 == 0 && reinterpret_cast<uint64_t>(numbers) % 16 == 0) {
      for (int32_t v = threadIdx.x; v < rows * (staged / 8); v += kMmaThreads) {
        const int32_t row = v / (staged / 8), first = v % (staged / 8) * 8;
        const bool present = first < width;
        ptx::cp_async_16(to + row * staged + first, present ? numbers + row * width + first : numbers, present);
      }
    } else {
      for (int32_t e = threadIdx.x; e < rows * staged; e += kMmaThreads)
        to[e] = e % staged < width ? numbers[e / staged * width + e % staged] : uint16_t{0};
    }
    to += rows * staged;
  }
}

// Eight channels of a residual token; zeros where there is none.
__device__ inline uint4 residual_channels(const char* row, int32_t channel, bool present) {
  const uint16_t* from = reinterpret_cast<const uint16_t*>(row) + channel;
  if (!present) return make_uint4(0, 0, 0, 0);
  if (reinterpret_cast<uint64_t>(from) % 16 == 0) return *reinterpret_cast<const uint4*>(from);
  const auto pair = [&](int i) { return static_cast<uint32_t>(from[2 * i + 1]) << 16 | from[2 * i]; };
  return make_uint4(pair(0), pair(1), pair(2), pair(3));
}

// Keys: a word is a pair of channels of a token.
__device__ inline void stage_residual_keys(const PackedAttentionParams& p, const Task& task, const Source& source,
                                           unsigned char* to) {
  for (int32_t e = threadIdx.x; e < kPageTokens * (p.head_dim / 8); e += kMmaThreads) {
    const int32_t token = e % kPageTokens, unit = e / kPageTokens;
    const bool present = token < source.count;
    const char* row = p.residual[0].at(task.b, task.key_head, source.place + (present ? token : 0));
    const uint4 words = residual_channels(row, unit * 8, present);
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i)
      *reinterpret_cast<uint32_t*>(to + staged_at(unit * 4 + i, token / 4, kPageTokens * 4, 2) + token % 4 * 4) =
          word[i];
  }
}

// Values: a word is a channel of a pair of tokens.
__device__ inline void stage_residual_values(const PackedAttentionParams& p, const Task& task, const Source& source,
                                             unsigned char* to) {
  const int32_t units = p.head_dim / 8, row_bytes = round_up(p.head_dim, 32) * 4;
  for (int32_t e = threadIdx.x; e < kPageTokens / 2 * units; e += kMmaThreads) {
    const int32_t row = e / units, unit = e % units;
    uint4 token[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool present = 2 * row + i < source.count;
      token[i] = residual_channels(p.residual[1].at(task.b, task.key_head, source.place + (present ? 2 * row + i : 0)),
                                   unit * 8, present);
    }
    const auto low = [](uint32_t a, uint32_t b) { return ptx::prmt(a, b, 0x5410); };
    const auto high = [](uint32_t a, uint32_t b) { return ptx::prmt(a, b, 0x7632); };
    const uint4 &a = token[0], &b = token[1];
    *reinterpret_cast<uint4*>(to + staged_at(row, unit * 2, row_bytes, 2)) =
        make_uint4(low(a.x, b.x), high(a.x, b.x), low(a.y, b.y), high(a.y, b.y));
    *reinterpret_cast<uint4*>(to + staged_at(row, unit * 2 + 1, row_bytes, 2)) =
        make_uint4(low(a.z, b.z), high(a.z, b.z), low(a.w, b.w), high(a.w, b.w));
  }
}

// ---- In shared memory ----

// Five trits a byte as rows of words of 2-bit codes; `from` has come. A thread takes 4 lanes of 16 depths, four bytes
// at a time.
__device__ inline void words_of_trits(const KvPage& page, const unsigned char* from, unsigned char* to) {
  const int32_t bytes = trit_bytes(page.section[0], page.lanes), chunks = page.lanes / 4;
  const int32_t row_bytes = staged_row_bytes(page);
  for (int32_t v = threadIdx.x; v < ceil_div(page.depth, 16) * chunks; v += kMmaThreads) {
    const int32_t row = v / chunks, chunk = v % chunks, value = row * 16 * page.lanes + chunk * 4;
    int32_t j = value % bytes;
    uint32_t power = 1;
    for (int32_t k = value / bytes; k > 0; --k) power *= 3;
    uint32_t codes[2][2] = {};  // of even and odd depths: lanes 0 and 2, lanes 1 and 3
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if (row * 16 + i < page.depth) {
        const uint32_t four = *reinterpret_cast<const uint32_t*>(from + j);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t fraction = (four >> 8 * h & 0x00ff00ffu) * power & 0x00ff00ffu;
          codes[i % 2][h] |= (fraction * 3 >> 8 & 0x00030003u) << i / 2 * 2;
        }
      }
      j += page.lanes;
      if (j >= bytes) j -= bytes, power *= 3;
    }
    const auto word = [&](int lane) {
      return ptx::prmt(codes[0][lane % 2], codes[1][lane % 2], lane < 2 ? 0x5410 : 0x7632);
    };
    *reinterpret_cast<uint4*>(to + staged_at(row, chunk, row_bytes, 0)) =
        make_uint4(word(0), word(1), word(2), word(3));
  }
}

// An excluded token among others: its values and their scales are 0, for 0 times a NaN would be a NaN. A scale that it
// shares with other tokens stays.
__device__ inline void forget_value(const KvPage& page, int32_t token, unsigned char* codes, uint16_t* meta) {
  if (page.section[0].scheme == KvScheme::kNone) {
    for (int32_t l = 0; l < page.lanes; ++l) {
      const int32_t at = staged_at(token / 2, l / 4, staged_row_bytes(page), 2) + l % 4 * 4 + token % 2 * 2;
      *reinterpret_cast<uint16_t*>(codes + at) = 0;
    }
  } else if (!page.per_lane) {
    const KvSection& s = page.section[0];
    for (int32_t row = 0; row < meta_planes(s.scheme) * meta_groups(page, s); ++row)
      meta[row * staged_meta_width(page, s) + token] = 0;
  }
}

}  // namespace
}  // namespace vtk
