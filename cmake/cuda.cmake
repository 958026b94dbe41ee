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

# vtk_keep_ptxas(TARGET sources...): the target's objects carry what ptxas said of their kernels (see keep_ptxas.py).
function(vtk_keep_ptxas target)
  set(script ${CMAKE_CURRENT_SOURCE_DIR}/cmake/keep_ptxas.py)
  set(launcher ${Python_EXECUTABLE} ${script} ${CMAKE_OBJCOPY} ${CMAKE_CUDA_COMPILER_VERSION} ${CMAKE_CUDA_COMPILER_LAUNCHER})
  set_target_properties(${target} PROPERTIES CUDA_COMPILER_LAUNCHER "${launcher}")
  set_source_files_properties(${ARGN} PROPERTIES OBJECT_DEPENDS ${script})
endfunction()
