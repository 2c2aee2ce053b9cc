#include "bench/gpu/door.h"
#include "logits/pair_kl_cuda.h"

// KL divergences of two rows of logits on the GPU.

using namespace tether;

extern "C" {

// q, p, dq, dp: [rows, vocabulary] of one type, as in doors.cc. upstream and values: three numbers
// of each row, [3, rows]. Without dq the values alone.
const char* tether_logits_kl(const void* q, const void* p, int64_t dtype, int64_t rows,
                             int64_t vocabulary, double temperature, const float* upstream,
                             float* values, void* dq, void* dp, void* stream) {
  return text_of_error([&] {
    const auto type = static_cast<DType>(dtype);
    const ConstLogits of_q{q, type, rows, vocabulary, vocabulary};
    const ConstLogits of_p{p, type, rows, vocabulary, vocabulary};
    const cuda::PairKlArrays<float> out{values, values + rows, values + 2 * rows};
    if (dq == nullptr) {
      cuda::logits_kl(of_q, of_p, temperature, nullptr, out, stream);
      return;
    }
    cuda::logits_kl_gradients(
        of_q, of_p, temperature, nullptr, {upstream, upstream + rows, upstream + 2 * rows}, out,
        {dq, type, rows, vocabulary, vocabulary}, {dp, type, rows, vocabulary, vocabulary}, stream);
  });
}

}  // extern "C"
