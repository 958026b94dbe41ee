// Loads of float types, packed codes, and codes as pairs of 16-bit floats.
#include <utility>

#include "common/dtype.h"
#include "device/code_pairs.cuh"
#include "device/convert.cuh"
#include "device/launch.h"
#include "native.h"

namespace vtk::native {
namespace {

constexpr int kThreads = 64, kPairs = 16;

__device__ int32_t thread_index() { return static_cast<int32_t>(blockIdx.x * kThreads + threadIdx.x); }

__global__ void load_floats_kernel(const void* values, DType dtype, int32_t count, float* out) {
  for (int32_t i = thread_index(); i < count; i += gridDim.x * kThreads) out[i] = load_float(values, dtype, i);
}

template <int kBits>
__global__ void pack_codes_kernel(const uint8_t* codes, int32_t words, uint32_t* packed, uint8_t* unpacked) {
  constexpr int kCodes = kCodesPerWord<kBits>;
  const int32_t w = thread_index();
  if (w >= words) return;
  packed[w] = vtk::pack_codes<kBits>([&](int i) { return codes[kCodes * w + i]; });
  for (int i = 0; i < kCodes; ++i) unpacked[kCodes * w + i] = static_cast<uint8_t>(code_of<kBits>(packed[w], i));
}

__global__ void pack_ternary_kernel(const int8_t* values, int32_t words, uint32_t* planes, int8_t* unpacked) {
  const int32_t w = thread_index();
  if (w >= words) return;
  const TernaryPlanes p = vtk::pack_ternary([&](int i) { return values[32 * w + i]; });
  planes[2 * w] = p.nonzero, planes[2 * w + 1] = p.negative;
  for (int i = 0; i < 32; ++i) unpacked[32 * w + i] = static_cast<int8_t>(ternary_of(p, i));
}

__global__ void pack_trits_kernel(const uint8_t* trits, int32_t bytes, uint8_t* packed, uint8_t* unpacked) {
  const int32_t b = thread_index();
  if (b >= bytes) return;
  packed[b] = vtk::pack_trits([&](int i) { return trits[kTritsPerByte * b + i]; });
  for (int i = 0; i < kTritsPerByte; ++i) unpacked[kTritsPerByte * b + i] = static_cast<uint8_t>(trit_of(packed[b], i));
}

// The pairs of a word, one decoder call with a constant each.
template <class T, int kBits, int kZero>
struct Codes {
  static constexpr int kCount = kCodesPerWord<kBits> / 2, kWords = 1;
  template <int kPair>
  static __device__ uint32_t pair(const uint32_t* words) {
    return code_pair<T, kBits, kPair, kZero>(words[0]);
  }
};
template <class T>
struct Signs {
  static constexpr int kCount = 16, kWords = 1;
  template <int kPair>
  static __device__ uint32_t pair(const uint32_t* words) {
    return sign_pair<T, kPair>(words[0]);
  }
};
template <class T>
struct Ternary {
  static constexpr int kCount = 16, kWords = 2;
  template <int kPair>
  static __device__ uint32_t pair(const uint32_t* words) {
    return ternary_pair<T, kPair>({words[0], words[1]});
  }
};
template <class T>
struct Trits {
  static constexpr int kCount = 2 * kTritsPerByte, kWords = 1;
  template <int kPair>
  static __device__ uint32_t pair(const uint32_t* words) {
    return trit_pair<T, kPair / 2, kPair % 2>(words[0]);
  }
};

template <class Decoder, int... kPair>
__device__ void decode(const uint32_t* words, uint32_t* out, std::integer_sequence<int, kPair...>) {
  ((out[kPair] = Decoder::template pair<kPair>(words)), ...);
}

template <class Decoder>
__global__ void decode_kernel(const uint32_t* packed, int32_t words, uint32_t* out) {
  const int32_t w = thread_index();
  if (w < words)
    decode<Decoder>(packed + Decoder::kWords * w, out + kPairs * w, std::make_integer_sequence<int, Decoder::kCount>{});
}

template <class... Expected, class... Actual>
cudaError_t run(void (*kernel)(Expected...), int32_t threads, Actual... args) {
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>((threads + kThreads - 1) / kThreads));
  shape.block = dim3(kThreads);
  return launch(kernel, shape, nullptr, args...);
}

template <template <class> class Decoder>
cudaError_t decode_as(const uint32_t* packed, bool bfloat16, int32_t words, uint32_t* out) {
  return bfloat16 ? run(decode_kernel<Decoder<__nv_bfloat16>>, words, packed, words, out)
                  : run(decode_kernel<Decoder<__half>>, words, packed, words, out);
}
template <class T>
using Bits = Codes<T, 1, 0>;
template <class T>
using Crumbs = Codes<T, 2, 0>;
template <class T>
using TernaryCrumbs = Codes<T, 2, 1>;
template <class T>
using Nibbles = Codes<T, 4, 0>;
template <class T>
using SignedNibbles = Codes<T, 4, 8>;

}  // namespace

cudaError_t load_floats(const void* values, int32_t dtype, int32_t count, float* out) {
  return run(load_floats_kernel, count, values, static_cast<DType>(dtype), count, out);
}

cudaError_t pack_codes(const uint8_t* codes, int32_t bits, int32_t words, uint32_t* packed, uint8_t* unpacked) {
  switch (bits) {
    case 1: return run(pack_codes_kernel<1>, words, codes, words, packed, unpacked);
    case 2: return run(pack_codes_kernel<2>, words, codes, words, packed, unpacked);
    case 4: return run(pack_codes_kernel<4>, words, codes, words, packed, unpacked);
    case 8: return run(pack_codes_kernel<8>, words, codes, words, packed, unpacked);
    default: return cudaErrorInvalidValue;
  }
}

cudaError_t pack_ternary(const int8_t* values, int32_t words, uint32_t* planes, int8_t* unpacked) {
  return run(pack_ternary_kernel, words, values, words, planes, unpacked);
}

cudaError_t pack_trits(const uint8_t* trits, int32_t bytes, uint8_t* packed, uint8_t* unpacked) {
  return run(pack_trits_kernel, bytes, trits, bytes, packed, unpacked);
}

cudaError_t code_pairs(const uint32_t* packed, int32_t bits, int32_t zero, bool bfloat16, int32_t words,
                       uint32_t* out) {
  if (bits == 1 && zero == 0) return decode_as<Bits>(packed, bfloat16, words, out);
  if (bits == 2 && zero == 0) return decode_as<Crumbs>(packed, bfloat16, words, out);
  if (bits == 2 && zero == 1) return decode_as<TernaryCrumbs>(packed, bfloat16, words, out);
  if (bits == 4 && zero == 0) return decode_as<Nibbles>(packed, bfloat16, words, out);
  if (bits == 4 && zero == 8) return decode_as<SignedNibbles>(packed, bfloat16, words, out);
  return cudaErrorInvalidValue;
}

cudaError_t sign_pairs(const uint32_t* packed, bool bfloat16, int32_t words, uint32_t* out) {
  return decode_as<Signs>(packed, bfloat16, words, out);
}

cudaError_t ternary_pairs(const uint32_t* planes, bool bfloat16, int32_t words, uint32_t* out) {
  return decode_as<Ternary>(planes, bfloat16, words, out);
}

cudaError_t trit_pairs(const uint32_t* packed, bool bfloat16, int32_t words, uint32_t* out) {
  return decode_as<Trits>(packed, bfloat16, words, out);
}

}  // namespace vtk::native
