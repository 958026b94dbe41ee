#include "common/cpu_isa.h"

#include <cstdlib>
#include <cstring>

namespace vtk {
namespace {

CpuIsa detect() {
#if defined(VTK_CPU_X86)
  const char* limit = std::getenv("VTK_CPU_ISA");
  if (limit != nullptr && std::strcmp(limit, "generic") == 0) return CpuIsa::kGeneric;
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return CpuIsa::kGeneric;
  if (limit != nullptr && std::strcmp(limit, "avx2") == 0) return CpuIsa::kAvx2;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return CpuIsa::kAvx512;
  return CpuIsa::kAvx2;
#else
  return CpuIsa::kGeneric;
#endif
}

}  // namespace

CpuIsa cpu_isa() {
  static const CpuIsa isa = detect();
  return isa;
}

const char* cpu_isa_name() {
  switch (cpu_isa()) {
    case CpuIsa::kAvx512: return "avx512";
    case CpuIsa::kAvx2: return "avx2";
    default: return "generic";
  }
}

}  // namespace vtk

// Read by `vtk env` through ctypes.
extern "C" __attribute__((visibility("default"))) const char* vtk_cpu_isa() { return vtk::cpu_isa_name(); }
