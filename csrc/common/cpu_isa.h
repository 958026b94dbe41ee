// One CPU kernel source, compiled once per instruction set, picked once at load time.
//
// A kernel source puts its code in `namespace vtk::VTK_ISA` (the build defines VTK_ISA as generic, avx2, avx512 or
// avx512_bf16 with the matching flags). VTK_CPU_KERNEL in the op's header declares all variants and a function
// of the same name in namespace vtk that calls the best one this processor runs. avx512_bf16 is built for the sources
// that gain (cmake/cpu_isa.cmake), whose kernels are declared with VTK_CPU_KERNEL_BF16.
//
// NOTE: the build links the generic objects first. Inline functions of the standard library are merged
// across translation units and the linker keeps the first copy, which must run on every processor.
#pragma once

namespace vtk {

enum class CpuIsa { kGeneric, kAvx2, kAvx512, kAvx512Bf16 };

// The best set that both the processor and this build have. For tests, VTK_CPU_ISA=generic|avx2|avx512 lowers it, and
// generic+bf16|avx2+bf16|avx512+bf16 makes the kernels multiply bfloat16 in pairs, as avx512_bf16 does.
CpuIsa cpu_isa();
const char* cpu_isa_name();
bool bf16_pairs_wanted();

}  // namespace vtk

#if defined(VTK_CPU_X86)
#define VTK_CPU_KERNEL_UP_TO(best, Result, name, Params)   \
  namespace generic { Result name(const Params&); }        \
  namespace avx2 { Result name(const Params&); }           \
  namespace avx512 { Result name(const Params&); }         \
  namespace best { Result name(const Params&); }           \
  inline Result name(const Params& params) {               \
    switch (cpu_isa()) {                                   \
      case CpuIsa::kAvx512Bf16: return best::name(params); \
      case CpuIsa::kAvx512: return avx512::name(params);   \
      case CpuIsa::kAvx2: return avx2::name(params);       \
      default: return generic::name(params);               \
    }                                                      \
  }
#define VTK_CPU_KERNEL(Result, name, Params) VTK_CPU_KERNEL_UP_TO(avx512, Result, name, Params)
#define VTK_CPU_KERNEL_BF16(Result, name, Params) VTK_CPU_KERNEL_UP_TO(avx512_bf16, Result, name, Params)
#else
#define VTK_CPU_KERNEL(Result, name, Params)        \
  namespace generic { Result name(const Params&); } \
  inline Result name(const Params& params) { return generic::name(params); }
#define VTK_CPU_KERNEL_BF16 VTK_CPU_KERNEL
#endif
