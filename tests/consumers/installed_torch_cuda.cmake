# find_package(tether) built with torch and CUDA, with a .cu file of the consumer's: LibTorch's CUDA
# tensors take the kernels of its own formula.
include(${CMAKE_CURRENT_LIST_DIR}/common.cmake)
install_moved(${BUILD})

file(COPY ${SOURCE}/tests/consumers/torch_cuda DESTINATION ${WORK})
step(ignored ${configure} -S ${WORK}/torch_cuda -B ${WORK}/build -DCMAKE_PREFIX_PATH=${WORK}/prefix
  -DTETHER_TORCH_ROOT=${TORCH_ROOT}
  -DCMAKE_CUDA_COMPILER=${CUDA_COMPILER} -DCMAKE_CUDA_ARCHITECTURES=${CUDA_ARCHITECTURES})
step(ignored ${CMAKE_COMMAND} --build ${WORK}/build)
step(output ${WORK}/build/consumer)
# By hand: (1 - 0.5) / 2 + 2 * 0.1^2
expect("${output}" "loss 0.27\nit has kernels\n")
if(output MATCHES "on the device")
  expect("${output}" "loss on the device 0.27\n")
endif()
