# CUDA: architectures, CUTLASS headers, flags. Included only when nvcc is there.

set(VTK_CUDA_ARCHITECTURES "80;90a" CACHE STRING "CUDA architectures; release wheels add 90-virtual for forward compatibility")

execute_process(
  COMMAND ${Python_EXECUTABLE} -c
          "import importlib.util as u; print(u.find_spec('cutlass_library').submodule_search_locations[0], end='')"
  OUTPUT_VARIABLE cutlass_folder RESULT_VARIABLE failed ERROR_QUIET)
if(failed)
  message(FATAL_ERROR "vtkernels: CUTLASS headers not found; install nvidia-cutlass (see pyproject.toml)")
endif()
set(VTK_CUTLASS_INCLUDE "${cutlass_folder}/source/include")

set(VTK_NVCC_FLAGS -lineinfo --expt-relaxed-constexpr -Xptxas=--warn-on-spills,-v)
