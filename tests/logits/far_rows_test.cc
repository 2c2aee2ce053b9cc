// Rows that lie more than 2^31 numbers apart, in the programs of the CUDA kernels.

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "logits/held_pair_program.h"
#include "logits/held_row_program.h"
#include "logits/support_program.h"
#include "tests/host_team.h"

namespace tether {
namespace {

constexpr int64_t kVocabulary = 48, kNear = 64, kFar = (int64_t{1} << 31) + 64;

// Two rows in memory of which only what is touched exists.
class TwoRows {
 public:
  explicit TwoRows(int64_t stride) : stride_(stride) {
    memory_ = mmap(nullptr, bytes(), PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }
  TwoRows(TwoRows&& other) noexcept
      : stride_(other.stride_), memory_(std::exchange(other.memory_, MAP_FAILED)) {}
  ~TwoRows() {
    if (there()) munmap(memory_, bytes());
  }
  bool there() const { return memory_ != MAP_FAILED; }
  float* row(int64_t i) const { return static_cast<float*>(memory_) + i * stride_; }
  template <class Byte>
  BasicLogits<Byte> view() const {
    return {memory_, DType::float32, 2, kVocabulary, stride_};
  }
  std::vector<float> numbers() const {
    std::vector<float> out(row(0), row(0) + kVocabulary);
    out.insert(out.end(), row(1), row(1) + kVocabulary);
    return out;
  }

 private:
  size_t bytes() const { return static_cast<size_t>(stride_ + kVocabulary) * sizeof(float); }

  int64_t stride_;
  void* memory_;
};

TwoRows filled(int64_t stride, float step) {
  TwoRows out(stride);
  for (int64_t i = 0; out.there() && i < 2 * kVocabulary; ++i) {
    out.row(i / kVocabulary)[i % kVocabulary] = 3 * std::sin(step * static_cast<float>(i));
  }
  return out;
}

struct Kl {
  float of[6];

  cuda::PairKlArrays<float> out() { return {of, of + 2, of + 4}; }
  cuda::PairKlArrays<const float> in() const { return {of, of + 2, of + 4}; }
};
constexpr Kl kUpstream{{1, -2, 0.5f, 3, -1, 0.25f}};

constexpr int32_t kIds[] = {0, 5, 17, 40, 5, 47};
constexpr KeptIds kKept{{.rows = 2, .columns = 3}, {kIds, DType::int32, 3, 1}};

using Results = std::vector<float>;
using Program = void(const TwoRows& q, const TwoRows& p, Results& out);

void add(Results& out, const Kl& kl) { out.insert(out.end(), kl.of, kl.of + 6); }

void pair_values(const TwoRows& q, const TwoRows& p, Results& out) {
  const auto in = cuda::pair_parameters(q.view<const void>(), p.view<const void>(), 0.7, nullptr);
  Kl found{};
  for (int64_t row = 0; row < 2; ++row) {
    cuda::pair_kl_program<float>(HostTeam<cuda::kPairThreads>{}, in, row, found.out());
  }
  add(out, found);
}

void pair_gradients(const TwoRows& q, const TwoRows& p, Results& out) {
  const auto in = cuda::pair_parameters(q.view<const void>(), p.view<const void>(), 0.7, nullptr);
  Kl found{};
  for (int64_t row = 0; row < 2; ++row) {
    cuda::held_pair_program<float>(HostCluster<cuda::kHeldPairThreads<float>>{}, in, row,
                                   kUpstream.in(), found.out(), q.view<void>(), p.view<void>());
  }
  add(out, found);
}

void kl_of_kept(const TwoRows& q, const TwoRows& p, Results& out) {
  const auto in = cuda::pair_parameters(q.view<const void>(), p.view<const void>(), 0.7, nullptr);
  Kl found{};
  float memory[12];
  for (int64_t row = 0; row < 2; ++row) {
    cuda::support_kl_program<float>(HostCluster<cuda::kSupportThreads>{}, in, kKept, row,
                                    kUpstream.in(), found.out(), memory, q.view<void>(),
                                    p.view<void>());
  }
  add(out, found);
}

void rows_of_kept(const TwoRows& q, const TwoRows&, Results& out) {
  const int64_t targets[] = {5, 47};
  const auto in = cuda::row_parameters<false>(q.view<const void>(), targets, {.temperature = 0.7});
  const HostTeam<cuda::kSupportThreads> team;
  cuda::RowState states[2];
  float logps[2], entropies[2], memory[6];
  const float upstream[] = {1, -2};
  for (int64_t row = 0; row < 2; ++row) {
    cuda::support_statistics_program<float>(
        team, in, kKept, row, {.states = states, .logps = logps, .entropies = entropies});
  }
  for (int64_t row = 0; row < 2; ++row) {
    cuda::support_gradient_program<float>(
        team, in, kKept, row, cuda::pieces_of_row<float, cuda::kSupportThreads>(kVocabulary),
        states, upstream, upstream, memory, q.view<void>());
  }
  out.insert(out.end(), {logps[0], logps[1], entropies[0], entropies[1]});
}

// The results, and the memory of both rows after it.
Results run(Program* program, int64_t stride) {
  const TwoRows q = filled(stride, 0.7f), p = filled(stride, 1.3f);
  Results out;
  if (!q.there() || !p.there()) return out;
  program(q, p, out);
  for (const TwoRows* each : {&q, &p}) {
    for (float number : each->numbers()) out.push_back(number);
  }
  return out;
}

TEST(FarRows, HaveTheBitsOfNearOnes) {
  for (auto* program : {pair_values, pair_gradients, kl_of_kept, rows_of_kept}) {
    const Results far = run(program, kFar);
    if (far.empty()) GTEST_SKIP() << "no address space for rows of 8 GiB";
    EXPECT_EQ(far, run(program, kNear));
  }
}

// The memory of a row of the policy loss of logits.
TEST(FarRows, AHeldRowLiesBehind31Bits) {
  const TwoRows rows(kFar);
  if (!rows.there()) GTEST_SKIP() << "no address space for rows of 8 GiB";
  const cuda::RowMemory<float> second(rows.view<const void>(), rows.view<void>(), 1);
  EXPECT_EQ(second.logits, rows.row(1));
  EXPECT_EQ(second.out, rows.row(1));
}

}  // namespace
}  // namespace tether
