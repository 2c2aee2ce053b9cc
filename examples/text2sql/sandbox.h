#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

struct sqlite3;

namespace text2sql {

using Cell = std::variant<std::monostate, int64_t, double, std::string>;  // monostate: NULL

struct ResultSet {
  size_t columns = 0;
  std::vector<Cell> cells;  // row by row

  size_t rows() const { return columns == 0 ? 0 : cells.size() / columns; }
};

// All are counts, none is a clock: the verdict on a query does not depend on the machine.
struct SandboxLimits {
  int virtual_machine_steps = 60000;  // of the whole query
  size_t sql_bytes = 320;             // the longest gold query has 215
  int selects = 2;                    // the word SELECT in the text
  int value_bytes = 500;              // of one string or row
  int nesting = 30;                   // of an expression
  int columns = 16;
  size_t rows = 500;
  size_t result_bytes = 16384;
};

// One in-memory database on which a query of unknown origin may run: reading only, one statement,
// a white list of functions, and limits on steps, lengths, memory and results. For one thread.
class Sandbox {
 public:
  explicit Sandbox(const std::string& script, const SandboxLimits& limits = {});
  ~Sandbox();
  Sandbox(Sandbox&&) noexcept;
  Sandbox& operator=(Sandbox&&) noexcept;

  // Nothing when the query is refused, wrong or beyond a limit; error() then says why.
  std::optional<ResultSet> run(std::string_view sql);
  const std::string& error() const { return error_; }

 private:
  struct Close {
    void operator()(sqlite3* database) const;
  };

  std::unique_ptr<sqlite3, Close> database_;
  SandboxLimits limits_;
  std::string error_;
};

// Rows as a multiset, or in order; numbers by value, reals within a relative 1e-9; NULL equals
// NULL. Names of columns do not matter.
bool same_result(const ResultSet& gold, const ResultSet& other, bool ordered);

// Has a row, and not just zeros and NULLs: a wrong query would not match it for nothing.
bool informative(const ResultSet& result);

}  // namespace text2sql
