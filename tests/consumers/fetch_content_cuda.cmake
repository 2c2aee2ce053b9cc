# FetchContent of LibTorch's face with the kernels for CUDA inside, by any torch: compiled by nvcc,
# linked, and loaded on a machine that may have no driver. Of CUDA's runtime nothing is to be seen.
include(${CMAKE_CURRENT_LIST_DIR}/common.cmake)
step(ignored ${configure} -S ${SOURCE}/examples/consumer -B ${WORK}/build
  -DTETHER_SOURCE=${SOURCE} -DTETHER_TORCH_ROOT=${TORCH_ROOT} -DTETHER_WERROR=ON -DTETHER_CUDA=ON
  -DTETHER_CUDA_ARCHITECTURES=${CUDA_ARCHITECTURES} -DCMAKE_CUDA_COMPILER=${CUDA_COMPILER}
  -DCMAKE_CUDA_COMPILER_LAUNCHER=${LAUNCHER})
step(ignored ${CMAKE_COMMAND} --build ${WORK}/build)
step(output ${WORK}/build/consumer)
include(${CMAKE_CURRENT_LIST_DIR}/expected.cmake)

file(GLOB_RECURSE library ${WORK}/build/libtether.so)
step(symbols nm -C ${library})
expect("${symbols}" "tether::cuda::policy_loss_of_logits(")
step(exported nm -D --defined-only ${library})
if(exported MATCHES " (cuda[A-Z][A-Za-z]+)")
  message(FATAL_ERROR "libtether.so must keep CUDA's runtime to itself, got ${CMAKE_MATCH_1}")
endif()
