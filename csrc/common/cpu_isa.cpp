#include "common/cpu_isa.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <string_view>

namespace vtk {
namespace {

constexpr std::string_view kNames[] = {"generic", "avx2", "avx512", "avx512_bf16"};  // in the order of CpuIsa
constexpr std::string_view kPairs = "+bf16";

// Of the processor and the operating system, which must save the registers.
CpuIsa best() {
#if defined(VTK_CPU_X86)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return CpuIsa::kGeneric;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return CpuIsa::kAvx2;
  return __builtin_cpu_supports("avx512bf16") ? CpuIsa::kAvx512Bf16 : CpuIsa::kAvx512;
#else
  return CpuIsa::kGeneric;
#endif
}

struct Choice {
  CpuIsa isa;
  bool pairs;
};

Choice choose() {
  const char* variable = std::getenv("VTK_CPU_ISA");
  std::string_view limit = variable == nullptr ? "" : variable;
  const bool pairs = limit.size() > kPairs.size() && limit.substr(limit.size() - kPairs.size()) == kPairs;
  if (pairs) limit.remove_suffix(kPairs.size());
  const auto* named = std::find(std::begin(kNames), std::end(kNames), limit);
  const CpuIsa isa = std::min(best(), static_cast<CpuIsa>(named - std::begin(kNames)));
  return {isa, pairs || isa == CpuIsa::kAvx512Bf16};
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

}  // namespace

CpuIsa cpu_isa() { return choice().isa; }
bool bf16_pairs_wanted() { return choice().pairs; }
const char* cpu_isa_name() { return kNames[static_cast<int>(cpu_isa())].data(); }

}  // namespace vtk

// Read by `vtk env` through ctypes.
extern "C" __attribute__((visibility("default"))) const char* vtk_cpu_isa() { return vtk::cpu_isa_name(); }
