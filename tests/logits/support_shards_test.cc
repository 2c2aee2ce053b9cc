// Shards of logits/support.h, and what it refuses.

#include <gtest/gtest.h>

#include <bit>
#include <string>
#include <utility>
#include <vector>

#include "logits/support.h"
#include "logits/vocabulary_shards.h"
#include "tests/error_message.h"
#include "tests/logits/support_batch.h"

namespace tether {
namespace {

using namespace rows_test;

// ---- shards -------------------------------------------------------------------------------------

// A batch of float64 and its columns [begin, end) as those of a rank.
struct Shard {
  const Batch& batch;
  int64_t begin, end;

  RowOptions options() const {
    RowOptions out = batch.options;
    out.first_id = begin;
    out.ids = batch.vocabulary;
    return out;
  }
  ConstLogits columns(const Doubles& of) const {
    return {of.data() + begin, DType::float64, batch.rows(), end - begin, batch.vocabulary};
  }
  MutableLogits columns(Doubles& of) const {
    return {of.data() + begin, DType::float64, batch.rows(), end - begin, batch.vocabulary};
  }
  // What it sends.
  std::vector<RowStatistics> block(const KeptIds& kept) const {
    const int64_t* targets = batch.targets.data();
    std::vector<RowStatistics> out(batch.targets.size() + 1);
    out[0] = std::bit_cast<RowStatistics>(
        shard_header(options(), end - begin, targets, batch.rows(), &kept));
    support_statistics(columns(batch.logits), targets, kept, options(), out.data() + 1);
    return out;
  }
};

std::vector<RowStatistics> merged(const Batch& batch,
                                  const std::vector<std::vector<RowStatistics>>& blocks) {
  std::vector<RowStatistics> all, out(batch.targets.size());
  for (const auto& each : blocks) all.insert(all.end(), each.begin(), each.end());
  merge_shards("f", all.data(), std::ssize(blocks), batch.rows(), batch.targets.data(),
               batch.options, out.data());
  return out;
}

TEST(Support, ShardsMergeToTheWhole) {
  Batch batch = random_batch(DType::float64, 6, 40, 3);
  batch.options.temperature = 0.7;
  batch.targets[5] = batch.options.ignore_index;
  // Row 0 has all its ids in one shard.
  Sets sets = random_sets(batch, 7);
  sets[0] = {1, 2};
  batch.targets[0] = 2;
  const Result want = run(batch, sets);
  Kept kept;
  pack(sets, kept);
  const std::vector<Shard> shards = {{batch, 0, 11}, {batch, 11, 12}, {batch, 12, 40}};
  std::vector<std::vector<RowStatistics>> blocks;
  for (const Shard& shard : shards) blocks.push_back(shard.block(kept.view));
  const std::vector<RowStatistics> rows = merged(batch, blocks);
  Doubles dlogits(batch.logits.size(), kNan);
  for (const Shard& shard : shards) {
    support_gradients(shard.columns(std::as_const(batch).logits), batch.targets.data(), kept.view,
                      shard.options(), rows.data(), batch.dlogps.data(), batch.dentropies.data(),
                      shard.columns(dlogits));
  }
  for (size_t row = 0; row < 6; ++row) {
    EXPECT_NEAR(logp(rows[row], batch.options), want.logps[row], 1e-14);
    EXPECT_NEAR(entropy(rows[row]), want.entropies[row], 1e-14);
  }
  expect_near(dlogits, want.dlogits, 1e-14, "gradient");
}

TEST(Support, ShardsOfAnotherSupportAreRefused) {
  const Batch batch = random_batch(DType::float64, 2, 10, 3);
  const auto refusal = [&](const Sets& a, const Sets& b) {
    Kept ours, theirs;
    pack(a, ours);
    pack(b, theirs);
    return message([&] {
      merged(batch, {Shard{batch, 0, 4}.block(ours.view), Shard{batch, 4, 10}.block(theirs.view)});
    });
  };
  EXPECT_EQ(refusal({{1}, {2, 3}}, {{1}, {2, 3}}), "no error");
  const std::string others =
      "f: shards must all have the same targets, ignore_index and support, got those of rank 0 and "
      "others of rank 1";
  EXPECT_EQ(refusal({{1}, {2, 3}}, {{1}, {2, 4}}), others);
  EXPECT_EQ(refusal({{1}, {2, 3}}, {{1, 2}, {3}}), others);
}

// ---- errors -------------------------------------------------------------------------------------

TEST(Support, BadArgumentsAreRefused) {
  const Batch batch = random_batch(DType::float64, 2, 10, 3);
  Memory memory(batch.dtype, batch.logits);
  RowStatistics statistics[2];
  const auto refusal = [&](const KeptIds& kept, ConstLogits logits = {}) {
    if (logits.rows == 0) logits = batch.view(memory);
    return message(
        [&] { support_statistics(logits, batch.targets.data(), kept, batch.options, statistics); });
  };
  std::vector<int64_t> ids = {1, 10, 2, -2};
  const RowLayout layout = {.rows = 2, .columns = 2};
  const ConstArray array = {ids.data(), DType::int64, 2, 1};
  const std::string name = "support_statistics: ";
  EXPECT_EQ(refusal({layout, array}),
            name + "ids must be in [0, 10) or -1 for none, got 10 at [0, 1]");
  ids[1] = 9;
  EXPECT_EQ(refusal({layout, array}),
            name + "ids must be in [0, 10) or -1 for none, got -2 at [1, 1]");
  EXPECT_EQ(refusal({{.rows = 1, .columns = 4}, array}),
            name + "ids must be of 2 rows like the logits, got 1");
  EXPECT_EQ(refusal({layout, {ids.data(), DType::float32, 2, 1}}),
            name + "ids must be int32 or int64, got float32");
  EXPECT_EQ(refusal({layout, {nullptr, DType::int64, 2, 1}}),
            name + "ids must point to 4 elements, got null");
  const std::vector<int64_t> offsets = {0, 3, 2};
  EXPECT_EQ(refusal({{.rows = 2, .offsets64 = offsets.data()}, array}),
            name + "offsets must not decrease, got 2 after 3 at [2]");
  ConstLogits strange = batch.view(memory);
  strange.dtype = DType::int64;
  EXPECT_EQ(refusal({layout, array}, strange),
            name + "logits must be float32, float64, bfloat16 or float16, got int64");
}

}  // namespace
}  // namespace tether
