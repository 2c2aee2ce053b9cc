# Finds LibTorch without its own CMake config, which stops when the wheel is a CUDA build and the
# machine has no CUDA toolkit. Looks, in this order, in
#   TETHER_TORCH_ROOT    a folder with include/ and lib/ (a LibTorch archive, or torch/ of a wheel)
#   CMAKE_PREFIX_PATH    variable and environment; torch.utils.cmake_prefix_path is understood
#   Python               .venv of the project, then python3 on the path
# and defines the imported target tether_torch::torch and TetherTorch_VERSION, TetherTorch_ROOT.
# libtorch_python is never linked. -DTETHER_TORCH_CONFIG=ON uses torch's own config instead.

option(TETHER_TORCH_CONFIG "Find LibTorch by its own TorchConfig.cmake" OFF)

function(tether_torch_version root variable)
  set(version "")
  foreach(header torch/headeronly/version.h torch/csrc/api/include/torch/version.h)
    if(NOT version AND EXISTS ${root}/include/${header})
      file(STRINGS ${root}/include/${header} lines
        REGEX "define TORCH_VERSION_(MAJOR|MINOR|PATCH) ")
      string(REGEX REPLACE "[^0-9;]" "" version "${lines}")
      string(REPLACE ";" "." version "${version}")
    endif()
  endforeach()
  set(${variable} "${version}" PARENT_SCOPE)
endfunction()

# torch's folder as this Python sees it, without importing torch.
function(tether_torch_of_python python variable)
  execute_process(
    COMMAND ${python} -c "import importlib.util as u; s = u.find_spec('torch'); \
print(s.submodule_search_locations[0] if s and s.submodule_search_locations else '')"
    OUTPUT_VARIABLE folder OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failed)
  if(failed)
    set(folder "")
  endif()
  set(${variable} "${folder}" PARENT_SCOPE)
endfunction()

function(tether_torch_root variable)
  set(prefixes ${CMAKE_PREFIX_PATH} $ENV{CMAKE_PREFIX_PATH})
  string(REPLACE ":" ";" prefixes "${prefixes}")
  set(roots ${TETHER_TORCH_ROOT})
  foreach(prefix ${prefixes})
    list(APPEND roots ${prefix} ${prefix}/../..)
  endforeach()
  find_program(python3 NAMES python3 python NO_CACHE)
  foreach(python ${CMAKE_SOURCE_DIR}/.venv/bin/python ${python3})
    if(EXISTS ${python})
      tether_torch_of_python(${python} root)
      list(APPEND roots ${root})
    endif()
  endforeach()
  set(${variable} "" PARENT_SCOPE)
  foreach(root ${roots})
    if(EXISTS ${root}/lib/libtorch_cpu.so AND EXISTS ${root}/include/torch)
      get_filename_component(root ${root} REALPATH)
      set(${variable} ${root} PARENT_SCOPE)
      return()
    endif()
  endforeach()
endfunction()

# libtorch.so has no symbol of its own and only brings in the CUDA library of a CUDA build, so a
# linker that drops what looks unused is told to keep it. _GLIBCXX_USE_CXX11_ABI is 1 in every build
# since 2.7.
function(tether_torch_target root)
  foreach(library torch_cpu c10)
    add_library(tether_torch::${library} SHARED IMPORTED GLOBAL)
    set_target_properties(tether_torch::${library} PROPERTIES
      IMPORTED_LOCATION ${root}/lib/lib${library}.so)
  endforeach()
  add_library(tether_torch::torch INTERFACE IMPORTED GLOBAL)
  target_link_libraries(tether_torch::torch INTERFACE
    "-Wl,--push-state,--no-as-needed,${root}/lib/libtorch.so,--pop-state"
    tether_torch::torch_cpu tether_torch::c10)
  target_include_directories(tether_torch::torch SYSTEM INTERFACE
    ${root}/include ${root}/include/torch/csrc/api/include)
  target_compile_features(tether_torch::torch INTERFACE cxx_std_20)
  target_compile_definitions(tether_torch::torch INTERFACE _GLIBCXX_USE_CXX11_ABI=1)
endfunction()

if(TETHER_TORCH_CONFIG)
  find_package(Torch CONFIG QUIET GLOBAL)
  set(TetherTorch_VERSION "${Torch_VERSION}")
  set(TetherTorch_ROOT "${TORCH_INSTALL_PREFIX}")
else()
  tether_torch_root(TetherTorch_ROOT)
  tether_torch_version("${TetherTorch_ROOT}" TetherTorch_VERSION)
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(TetherTorch
  REQUIRED_VARS TetherTorch_ROOT
  VERSION_VAR TetherTorch_VERSION
  REASON_FAILURE_MESSAGE "LibTorch was not found. Activate a Python that has it (`pip install torch`), or \
set -DTETHER_TORCH_ROOT= or CMAKE_PREFIX_PATH to a LibTorch folder, or configure with -DTETHER_TORCH=OFF.")

if(TetherTorch_FOUND AND NOT TARGET tether_torch::torch)
  if(TETHER_TORCH_CONFIG)
    add_library(tether_torch::torch INTERFACE IMPORTED GLOBAL)
    target_link_libraries(tether_torch::torch INTERFACE torch)
  else()
    tether_torch_target(${TetherTorch_ROOT})
  endif()
endif()
