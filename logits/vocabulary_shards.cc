#include "logits/vocabulary_shards.h"

#include <algorithm>
#include <array>
#include <bit>
#include <string>
#include <vector>

#include "core/check.h"

namespace tether {
namespace {

// Which all ranks must share.
constexpr auto kOptions =
    std::apply([](const auto&... each) { return std::array{each...}; }, RowOptions::fields());

struct Rank {
  int64_t index;
  ShardHeader header;

  double end() const { return header.first_id + header.columns; }
  std::string name() const { return " of rank " + text(index); }
  std::string range() const {
    return "[" + text(int64_t(header.first_id)) + ", " + text(int64_t(end())) + ")" + name();
  }
};

std::string sums_text(double sums) {
  constexpr std::array<std::string_view, 3> kNames{"logps", "entropies", "statistics"};
  const bool known = sums >= 0 && sums < kNames.size();
  return known ? std::string(kNames[static_cast<size_t>(sums)]) : text(sums);
}

void check_same(const std::string& where, const Rank& a, const Rank& b) {
  const auto check = [&](std::string_view what, double ours, double theirs, auto words) {
    require(ours == theirs, [&] {
      return where + " must all have the same " + std::string(what) + ", got " + words(ours) +
             a.name() + " and " + words(theirs) + b.name();
    });
  };
  check("ids", a.header.ids, b.header.ids, [](double value) { return text(int64_t(value)); });
  check("results", a.header.sums, b.header.sums, sums_text);
  for (size_t i = 0; i < kOptions.size(); ++i) {
    check(kOptions[i].name, a.header.options[i], b.header.options[i],
          [](double value) { return text(value); });
  }
  require(a.header.targets == b.header.targets, [&] {
    return where + " must all have the same targets, ignore_index and support, got those" +
           a.name() + " and others" + b.name();
  });
}

void check_tiling(const std::string& where, std::vector<Rank> ranks) {
  std::stable_sort(ranks.begin(), ranks.end(), [](const Rank& a, const Rank& b) {
    return a.header.first_id < b.header.first_id;
  });
  const double ids = ranks.front().header.ids;
  const auto missing = [&](const std::string& place) {
    return where + " must hold every id of [0, " + text(int64_t(ids)) + "), got none " + place;
  };
  require(ranks.front().header.first_id == 0,
          [&] { return missing("before " + ranks.front().range()); });
  for (size_t i = 1; i < ranks.size(); ++i) {
    const Rank &a = ranks[i - 1], &b = ranks[i];
    require(a.end() <= b.header.first_id,
            [&] { return where + " must not overlap, got " + a.range() + " and " + b.range(); });
    require(a.end() == b.header.first_id,
            [&] { return missing("between " + a.range() + " and " + b.range()); });
  }
  require(ranks.back().end() == ids, [&] { return missing("after " + ranks.back().range()); });
}

// FNV-1a over words in place of bytes, of 53 bits, so that it is a double: other targets pass for
// these once in 2^53 times.
double hash_of(const int64_t* targets, int64_t rows, int64_t ignore_index, const KeptIds* kept) {
  uint64_t hash = 0xcbf29ce484222325;
  const auto add = [&](int64_t word) {
    hash = (hash ^ static_cast<uint64_t>(word)) * 0x100000001b3;
    hash ^= hash >> 32;  // a product carries nothing down
  };
  add(ignore_index);
  for (int64_t row = 0; row < rows; ++row) add(targets[row]);
  for (int64_t row = 0; kept != nullptr && row < rows; ++row) {
    add(row);  // where its ids begin
    for (int64_t i = 0; i < kept->layout.length(row); ++i) add(kept->id(row, i));
  }
  return static_cast<double>(hash >> 11);
}

}  // namespace

ShardHeader shard_header(const RowOptions& options, int64_t columns, const int64_t* targets,
                         int64_t rows, const KeptIds* kept) {
  const auto number = [](int64_t value) { return static_cast<double>(value); };
  ShardHeader out{.first_id = number(options.first_id),
                  .columns = number(columns),
                  .ids = number(options.ids),
                  .sums = number(static_cast<int64_t>(options.sums)),
                  .options = {},
                  .targets = hash_of(targets, rows, options.ignore_index, kept)};
  for (size_t i = 0; i < kOptions.size(); ++i) out.options[i] = options.*kOptions[i].member;
  return out;
}

void merge_shards(std::string_view function, const RowStatistics* blocks, int64_t shards,
                  int64_t rows, const int64_t* targets, const RowOptions& options,
                  RowStatistics* merged) {
  const auto block = [&](int64_t shard) { return blocks + shard * (1 + rows); };
  std::vector<Rank> ranks;
  for (int64_t i = 0; i < shards; ++i) ranks.push_back({i, std::bit_cast<ShardHeader>(*block(i))});
  const std::string where = std::string(function) + ": shards";
  for (const Rank& rank : ranks) check_same(where, ranks.front(), rank);
  const double ids = ranks.front().header.ids;
  require(options.ids == 0 || ids == static_cast<double>(options.ids), [&] {
    return where + " must be what was gathered, of " + text(options.ids) + " ids, got of " +
           text(ids);
  });
  check_tiling(where, ranks);
  for (int64_t row = 0; row < rows; ++row) {
    RowStatistics sum = block(0)[1 + row];
    for (int64_t i = 1; i < shards && targets[row] != options.ignore_index; ++i) {
      sum = merge(sum, block(i)[1 + row], options);
    }
    merged[row] = sum;
  }
}

}  // namespace tether
