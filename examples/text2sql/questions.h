#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "examples/text2sql/query.h"
#include "examples/text2sql/random.h"

namespace text2sql {

struct Question {
  std::string text = {};
  std::string gold_sql = {};
  std::string logged_sql = {};  // the sloppy label; only Task::log() has it
  int tables = 1;
  int composition = 0;  // index into Grammar::compositions()
};

// log: may be imitated and rewarded; reward: seen by RL only, as a reward; held_out: never seen.
enum class Split { log, reward, held_out };

// What a question asks for, without its words and values: a base table, a projection and up to two
// filters.
struct Composition {
  int base = 0;
  int projection = 0;        // index into the base's projections
  std::vector<int> filters;  // indices into the base's filters, ascending
  int tables = 1;
  Split split = Split::log;
};

class Grammar {
 public:
  // The split of a composition is a hash of its names and of `seed`; one without a filter is
  // always in `log`, so that every projection is seen there.
  explicit Grammar(uint64_t seed);

  const std::vector<Composition>& compositions() const { return compositions_; }

  // "student / count / age_above, dept_name"
  std::string name(const Composition& composition) const;

  struct Draw {
    std::string text;
    Query query;
  };
  // A paraphrase and values at random; the query is canonical: one per composition and values.
  Draw draw(const Composition& composition, Random& random) const;

 private:
  std::vector<Composition> compositions_;
};

}  // namespace text2sql
