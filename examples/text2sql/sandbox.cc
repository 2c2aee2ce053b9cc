#include "examples/text2sql/sandbox.h"

#include <sqlite3.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <mutex>
#include <span>
#include <stdexcept>
#include <utility>

#include "examples/text2sql/schema.h"

namespace text2sql {
namespace {

constexpr int64_t kHeapBytes = int64_t{512} << 20;  // of the whole process
constexpr int kStepsPerCheck = 1000;
constexpr double kRelativeTolerance = 1e-9;

// Neither LIKE nor GLOB: matching a pattern is one step of the virtual machine, however long.
constexpr std::array<std::string_view, 13> kFunctions = {
    "abs", "avg", "coalesce", "count", "ifnull", "length", "lower",
    "max", "min", "nullif",   "round", "sum",    "upper"};

bool contains(auto names, std::string_view name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

int authorize(void*, int action, const char* first, const char* second, const char*, const char*) {
  const auto allowed = [](bool is) { return is ? SQLITE_OK : SQLITE_DENY; };
  switch (action) {
    case SQLITE_SELECT:
      return SQLITE_OK;
    case SQLITE_READ:
      return allowed(first != nullptr && contains(table_names(), first));
    case SQLITE_FUNCTION:
      return allowed(second != nullptr && contains(std::span(kFunctions), second));
    default:
      return SQLITE_DENY;
  }
}

int count_down(void* checks_left) { return --*static_cast<int*>(checks_left) < 0; }

void limit_heap() {
  static std::once_flag once;
  std::call_once(once, [] { sqlite3_hard_heap_limit64(kHeapBytes); });
}

void execute(sqlite3* database, const std::string& script) {
  if (sqlite3_exec(database, script.c_str(), nullptr, nullptr, nullptr) != SQLITE_OK) {
    throw std::invalid_argument(std::string("Sandbox: script must be valid SQL, got: ") +
                                sqlite3_errmsg(database));
  }
}

void restrict(sqlite3* database, const SandboxLimits& limits) {
  sqlite3_db_config(database, SQLITE_DBCONFIG_DEFENSIVE, 1, nullptr);
  sqlite3_db_config(database, SQLITE_DBCONFIG_TRUSTED_SCHEMA, 0, nullptr);
  sqlite3_db_config(database, SQLITE_DBCONFIG_DQS_DML, 0, nullptr);
  const std::pair<int, int> bounds[] = {
      {SQLITE_LIMIT_LENGTH, limits.value_bytes},
      {SQLITE_LIMIT_SQL_LENGTH, static_cast<int>(limits.sql_bytes)},
      {SQLITE_LIMIT_EXPR_DEPTH, limits.nesting},
      {SQLITE_LIMIT_COLUMN, limits.columns},
      {SQLITE_LIMIT_COMPOUND_SELECT, 4},
      {SQLITE_LIMIT_FUNCTION_ARG, 4},
      {SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 0},
      {SQLITE_LIMIT_ATTACHED, 0},
      {SQLITE_LIMIT_VARIABLE_NUMBER, 0},
      {SQLITE_LIMIT_TRIGGER_DEPTH, 0},
      {SQLITE_LIMIT_WORKER_THREADS, 0}};
  for (const auto& [which, bound] : bounds) sqlite3_limit(database, which, bound);
  sqlite3_set_authorizer(database, authorize, nullptr);
}

bool is_word(char c) {  // of an upper case text
  return (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
}

std::string upper_case(std::string_view text) {
  std::string result(text);
  for (char& c : result) c = c >= 'a' && c <= 'z' ? static_cast<char>(c - 'a' + 'A') : c;
  return result;
}

int count_word(std::string_view upper, std::string_view word) {
  int count = 0;
  for (size_t at = upper.find(word); at != upper.npos; at = upper.find(word, at + 1)) {
    const size_t end = at + word.size();
    const bool whole =
        (at == 0 || !is_word(upper[at - 1])) && (end == upper.size() || !is_word(upper[end]));
    count += whole ? 1 : 0;
  }
  return count;
}

// What must be refused before SQLite parses it. Neither steps nor the authoriser bound the work of
// preparing a statement, where every mention of an outer name is replaced by a copy of the inner
// expression: 1000 bytes with two SELECTs can take 1 s and 400 MB, 320 bytes 15 ms and 9 MB. WITH
// would repeat this at every level.
std::string objection(std::string_view sql, const SandboxLimits& limits) {
  if (sql.size() > limits.sql_bytes) return "the query is too long";
  if (sql.find('\0') != sql.npos) return "the query has a zero byte";
  const std::string upper = upper_case(sql);
  if (count_word(upper, "WITH") > 0) return "WITH is not allowed";
  if (count_word(upper, "SELECT") > limits.selects) return "too many SELECTs";
  return {};
}

struct Finalize {
  void operator()(sqlite3_stmt* statement) const { sqlite3_finalize(statement); }
};
using Statement = std::unique_ptr<sqlite3_stmt, Finalize>;

bool is_blank(std::string_view text) { return text.find_first_not_of(" \t\r\n") == text.npos; }

bool is_select(sqlite3_stmt* statement) {
  return sqlite3_stmt_isexplain(statement) == 0 && sqlite3_stmt_readonly(statement) != 0 &&
         sqlite3_column_count(statement) > 0;
}

Cell cell(sqlite3_stmt* statement, int column) {
  switch (sqlite3_column_type(statement, column)) {
    case SQLITE_INTEGER:
      return static_cast<int64_t>(sqlite3_column_int64(statement, column));
    case SQLITE_FLOAT:
      return sqlite3_column_double(statement, column);
    case SQLITE_NULL:
      return std::monostate{};
    default: {
      const auto* bytes = static_cast<const char*>(sqlite3_column_blob(statement, column));
      const auto size = static_cast<size_t>(sqlite3_column_bytes(statement, column));
      return size == 0 ? std::string() : std::string(bytes, size);
    }
  }
}

size_t bytes_of(const Cell& cell) {
  const auto* text = std::get_if<std::string>(&cell);
  return sizeof(int64_t) + (text == nullptr ? 0 : text->size());
}

// Fetches every row; what went wrong, or nothing.
std::string fetch(sqlite3_stmt* statement, const SandboxLimits& limits, ResultSet& result) {
  const int columns = sqlite3_column_count(statement);
  result.columns = static_cast<size_t>(columns);
  size_t bytes = 0;
  int status = sqlite3_step(statement);
  for (; status == SQLITE_ROW; status = sqlite3_step(statement)) {
    if (result.rows() >= limits.rows) return "too many rows";
    for (int column = 0; column < columns; ++column) {
      if (sqlite3_column_type(statement, column) == SQLITE_BLOB) return "a blob in the result";
      result.cells.push_back(cell(statement, column));
      bytes += bytes_of(result.cells.back());
    }
    if (bytes > limits.result_bytes) return "the result is too large";
  }
  if (status == SQLITE_DONE) return {};
  if (status == SQLITE_INTERRUPT) return "the query takes too many steps";
  return sqlite3_errmsg(sqlite3_db_handle(statement));
}

double number(const Cell& cell) {
  const auto* integer = std::get_if<int64_t>(&cell);
  return integer == nullptr ? std::get<double>(cell) : static_cast<double>(*integer);
}

bool is_number(const Cell& cell) {
  return std::holds_alternative<int64_t>(cell) || std::holds_alternative<double>(cell);
}

bool same_cell(const Cell& a, const Cell& b) {
  if (a.index() == b.index() && !std::holds_alternative<double>(a)) return a == b;
  if (!is_number(a) || !is_number(b)) return false;
  const double x = number(a), y = number(b);
  return x == y || std::abs(x - y) <= kRelativeTolerance * std::min(std::abs(x), std::abs(y));
}

using Row = std::span<const Cell>;

Row row(const ResultSet& result, size_t index) {
  return Row(result.cells).subspan(index * result.columns, result.columns);
}

bool same_row(Row a, Row b) { return std::equal(a.begin(), a.end(), b.begin(), same_cell); }

// Finds for every gold row one of its own among the others.
bool same_multiset(const ResultSet& gold, const ResultSet& other) {
  std::vector<bool> taken(other.rows(), false);
  for (size_t i = 0; i < gold.rows(); ++i) {
    size_t match = 0;
    while (match < taken.size() && (taken[match] || !same_row(row(gold, i), row(other, match)))) {
      ++match;
    }
    if (match == taken.size()) return false;
    taken[match] = true;
  }
  return true;
}

}  // namespace

void Sandbox::Close::operator()(sqlite3* database) const { sqlite3_close(database); }

Sandbox::Sandbox(const std::string& script, const SandboxLimits& limits) : limits_(limits) {
  limit_heap();
  sqlite3* database = nullptr;
  constexpr int kFlags = SQLITE_OPEN_READWRITE | SQLITE_OPEN_MEMORY | SQLITE_OPEN_NOMUTEX;
  const int status = sqlite3_open_v2(":memory:", &database, kFlags, nullptr);
  database_.reset(database);
  if (status != SQLITE_OK) throw std::runtime_error("Sandbox: cannot open a database in memory");
  execute(database, script);
  execute(database, "PRAGMA temp_store = MEMORY; PRAGMA query_only = ON;");
  restrict(database, limits_);
}

Sandbox::~Sandbox() = default;
Sandbox::Sandbox(Sandbox&&) noexcept = default;
Sandbox& Sandbox::operator=(Sandbox&&) noexcept = default;

std::optional<ResultSet> Sandbox::run(std::string_view sql) {
  error_ = objection(sql, limits_);
  if (!error_.empty()) return std::nullopt;
  sqlite3* database = database_.get();
  int checks_left = limits_.virtual_machine_steps / kStepsPerCheck;
  sqlite3_progress_handler(database, kStepsPerCheck, count_down, &checks_left);

  sqlite3_stmt* prepared = nullptr;
  const char* tail = nullptr;
  const int status =
      sqlite3_prepare_v2(database, sql.data(), static_cast<int>(sql.size()), &prepared, &tail);
  const Statement statement(prepared);
  if (status != SQLITE_OK) {
    error_ = sqlite3_errmsg(database);
  } else if (!statement) {
    error_ = "there is no statement";
  } else if (!is_blank(sql.substr(static_cast<size_t>(tail - sql.data())))) {
    error_ = "there is text after the statement";
  } else if (!is_select(prepared)) {
    error_ = "the statement is not a plain SELECT";
  }
  if (!error_.empty()) return std::nullopt;

  ResultSet result;
  error_ = fetch(prepared, limits_, result);
  if (!error_.empty()) return std::nullopt;
  return result;
}

bool same_result(const ResultSet& gold, const ResultSet& other, bool ordered) {
  if (gold.columns != other.columns || gold.cells.size() != other.cells.size()) return false;
  if (same_row(gold.cells, other.cells)) return true;
  return !ordered && same_multiset(gold, other);
}

bool informative(const ResultSet& result) {
  return std::any_of(result.cells.begin(), result.cells.end(), [](const Cell& cell) {
    return std::holds_alternative<std::string>(cell) || (is_number(cell) && number(cell) != 0);
  });
}

}  // namespace text2sql
