# The CUDA kernels, tether::cuda: a library of their own that nothing else here links. A program
# with them starts on a machine without a driver.

# Whether TETHER_CUDA asks for them: ON stops without a toolkit, AUTO does without.
function(tether_find_cuda variable)
  set(${variable} FALSE PARENT_SCOPE)
  if(NOT TETHER_CUDA STREQUAL AUTO AND NOT TETHER_CUDA)
    return()
  endif()
  include(CheckLanguage)
  check_language(CUDA)
  find_package(CUDAToolkit 12 QUIET)
  if(CMAKE_CUDA_COMPILER AND TARGET CUDA::cudart_static)
    set(${variable} TRUE PARENT_SCOPE)
  elseif(NOT TETHER_CUDA STREQUAL AUTO)
    message(FATAL_ERROR "TETHER_CUDA must be OFF or AUTO without a CUDA toolkit, got \
${TETHER_CUDA}. Set -DCMAKE_CUDA_COMPILER= to the nvcc of CUDA 12 or later.")
  endif()
endfunction()

function(tether_cuda_target)
  find_package(CUDAToolkit REQUIRED)
  add_library(tether_cuda STATIC)
  add_library(tether::cuda ALIAS tether_cuda)
  set_target_properties(tether_cuda PROPERTIES
    EXPORT_NAME cuda
    POSITION_INDEPENDENT_CODE ON
    CUDA_ARCHITECTURES "${TETHER_CUDA_ARCHITECTURES}"
    CUDA_RUNTIME_LIBRARY Static)
  target_link_libraries(tether_cuda PUBLIC tether_core CUDA::cudart_static)
  # CMake 3.25 does not know the standards of newer CUDA compilers. Users' .cu files need it too.
  target_compile_options(tether_cuda PUBLIC $<$<COMPILE_LANGUAGE:CUDA>:-std=c++20>)
  # nvcc's own host code has the parentheses that g++ would warn of.
  target_compile_options(tether_cuda PRIVATE
    -Xcompiler=-Wall,-Wextra,-Wno-parentheses
    $<$<BOOL:${TETHER_WERROR}>:-Werror=all-warnings>)
endfunction()
