# find_package(tether) from an installed prefix that was moved; refused with another torch, and
# without one.
include(${CMAKE_CURRENT_LIST_DIR}/common.cmake)
install_moved(${BUILD})

file(COPY ${SOURCE}/examples/consumer DESTINATION ${WORK})
set(consumer ${configure} -S ${WORK}/consumer -DCMAKE_PREFIX_PATH=${WORK}/prefix)
step(ignored ${consumer} -B ${WORK}/build -DTETHER_TORCH_ROOT=${TORCH_ROOT})
step(ignored ${CMAKE_COMMAND} --build ${WORK}/build)
step(output ${WORK}/build/consumer)
include(${CMAKE_CURRENT_LIST_DIR}/expected.cmake)

set(other ${WORK}/other_torch)
file(WRITE ${other}/lib/libtorch_cpu.so "")
file(WRITE ${other}/include/torch/headeronly/version.h
  "#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR 99\n#define TORCH_VERSION_PATCH 0\n")
refused("tether: built with torch ${TORCH_VERSION}, found 2.99.0 in ${other}."
  ${consumer} -B ${WORK}/refused -DTETHER_TORCH_ROOT=${other})

# python3: a Python without torch, whatever is on the path of this machine.
refused("LibTorch was not found. This tether was built with torch ${TORCH_VERSION}: activate a \
Python that has it (`pip install torch==${TORCH_VERSION}`), or set -DTETHER_TORCH_ROOT= or \
CMAKE_PREFIX_PATH to a LibTorch folder, or ask for COMPONENTS core."
  ${consumer} -B ${WORK}/no_torch -Dpython3=false)
