# find_package(tether) where the package was built without torch: core alone, over raw memory.
include(${CMAKE_CURRENT_LIST_DIR}/common.cmake)
if(TORCH)
  set(BUILD ${WORK}/tether)
  step(ignored ${configure} -S ${SOURCE} -B ${BUILD} -DTETHER_TORCH=OFF -DTETHER_TESTS=OFF
    -DTETHER_BENCH=OFF -DTETHER_EXAMPLES=OFF)
  step(ignored ${CMAKE_COMMAND} --build ${BUILD})
endif()
install_moved(${BUILD})

set(consumer ${configure} -S ${SOURCE}/tests/consumers/no_torch -DCMAKE_PREFIX_PATH=${WORK}/prefix)
step(ignored ${consumer} -B ${WORK}/build)
step(ignored ${CMAKE_COMMAND} --build ${WORK}/build)
step(output ${WORK}/build/consumer)
# By hand: (-e^0.1 + e^0.1 / 2) / 2 + 0.04 (e^0.1 - 1.1), and its derivatives.
expect("${output}" "loss -0.276086\ngradient -0.184896 -0.184896 -0.184896 0.0913964 0.0913964 0.0913964")

step(ignored ${consumer} -B ${WORK}/eigen -DEIGEN=ON)
step(ignored ${CMAKE_COMMAND} --build ${WORK}/eigen)
step(output ${WORK}/eigen/eigen_consumer)
# By hand: log(1 + e^-0.06), -0.1 / (1 + e^0.06); delta = -0.25, 0.25, 0.5.
expect("${output}" "loss 0.663597\n-0.0485004 -0.0485004\n 0.0485004  0.0485004")
expect("${output}" "advantages   0 0.5 0.5")

refused("tether: component must be one of core;eigen"
  ${consumer} -B ${WORK}/refused -DCOMPONENTS=tether)
