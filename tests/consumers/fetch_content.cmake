# FetchContent from the sources. Warnings as errors only so that the compiler cache is shared.
include(${CMAKE_CURRENT_LIST_DIR}/common.cmake)
step(ignored ${configure} -S ${SOURCE}/examples/consumer -B ${WORK}/build
  -DTETHER_SOURCE=${SOURCE} -DTETHER_TORCH_ROOT=${TORCH_ROOT} -DTETHER_WERROR=ON)
step(ignored ${CMAKE_COMMAND} --build ${WORK}/build)
step(output ${WORK}/build/consumer)
include(${CMAKE_CURRENT_LIST_DIR}/expected.cmake)
