# What every target of this project has in common.

# How kernels are compiled. Contracted products would give other bits on other instruction sets;
# the two in the middle let a loop with a comparison in it be vectorised.
set(TETHER_KERNEL_OPTIONS -O3 -fno-math-errno -fno-trapping-math -ffp-contract=off)

# tether_target(NAME [CONVERSION]): C++20, our include root, warnings.
# CONVERSION adds -Wconversion: for code in which every number is ours.
function(tether_target name)
  cmake_parse_arguments(ARG "CONVERSION" "" "" ${ARGN})
  target_compile_features(${name} PUBLIC cxx_std_20)
  set_target_properties(${name} PROPERTIES
    CXX_EXTENSIONS OFF
    POSITION_INDEPENDENT_CODE ON)
  target_include_directories(${name} PUBLIC
    $<BUILD_INTERFACE:${tether_SOURCE_DIR}>
    $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}/tether>)
  target_compile_options(${name} PRIVATE
    -Wall -Wextra -Wshadow
    $<$<BOOL:${ARG_CONVERSION}>:-Wconversion>
    $<$<BOOL:${TETHER_WERROR}>:-Werror>)
endfunction()

# tether_executable(NAME SOURCES... LIBS...)
function(tether_executable name)
  cmake_parse_arguments(ARG "" "" "SOURCES;LIBS" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  tether_target(${name})
  target_link_libraries(${name} PRIVATE ${ARG_LIBS})
endfunction()

# tether_test(NAME SOURCES... LIBS... [LABELS...]): one GoogleTest binary, which is one ctest,
# because a process that loads libtorch takes half a second to start.
function(tether_test name)
  cmake_parse_arguments(ARG "" "" "SOURCES;LIBS;LABELS" ${ARGN})
  if(NOT ARG_SOURCES)
    return()
  endif()
  tether_executable(${name} SOURCES ${ARG_SOURCES} LIBS ${ARG_LIBS} GTest::gmock GTest::gtest_main)
  # Where golden files are.
  target_compile_definitions(${name} PRIVATE TETHER_TESTS_DIR="${tether_SOURCE_DIR}/tests")
  add_test(NAME ${name} COMMAND ${name} --gtest_brief=1)
  set_tests_properties(${name} PROPERTIES LABELS "${ARG_LABELS}")
endfunction()

# tether_sources(VARIABLE PATTERN...): the files of this folder that match.
macro(tether_sources variable)
  file(GLOB ${variable} CONFIGURE_DEPENDS ${ARGN})
endmacro()
