// One CPU kernel source, compiled once per instruction set, picked once at load time.
//
// A kernel source puts its code in `namespace vtk::VTK_ISA` (the build defines VTK_ISA as generic, avx2 or
// avx512 with the matching flags). VTK_CPU_KERNEL in the op's header declares all variants and a function
// of the same name in namespace vtk that calls the best one this processor runs.
//
// NOTE: the build links the generic objects first. Inline functions of the standard library are merged
// across translation units and the linker keeps the first copy, which must run on every processor.
#pragma once

namespace vtk {

enum class CpuIsa { kGeneric, kAvx2, kAvx512 };

// The best set that both the processor and this build have; VTK_CPU_ISA=generic|avx2 lowers it (for tests).
CpuIsa cpu_isa();
const char* cpu_isa_name();

}  // namespace vtk

#if defined(VTK_CPU_X86)
#define VTK_CPU_KERNEL(Result, name, Params)             \
  namespace generic { Result name(const Params&); }      \
  namespace avx2 { Result name(const Params&); }         \
  namespace avx512 { Result name(const Params&); }       \
  inline Result name(const Params& params) {             \
    switch (cpu_isa()) {                                 \
      case CpuIsa::kAvx512: return avx512::name(params); \
      case CpuIsa::kAvx2: return avx2::name(params);     \
      default: return generic::name(params);             \
    }                                                    \
  }
#else
#define VTK_CPU_KERNEL(Result, name, Params)        \
  namespace generic { Result name(const Params&); } \
  inline Result name(const Params& params) { return generic::name(params); }
#endif
