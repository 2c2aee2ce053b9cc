#include "examples/text2sql/schema.h"

#include <array>
#include <initializer_list>
#include <stdexcept>
#include <utility>
#include <vector>

#include "examples/text2sql/random.h"

namespace text2sql {
namespace {

constexpr std::array<std::string_view, 5> kTables = {"dept", "teacher", "student", "course",
                                                     "enrol"};

constexpr std::array<std::string_view, 8> kDepartments = {
    "Physics", "Biology", "History", "Music", "Law", "Geology", "Chemistry", "Economics"};
constexpr std::array<std::string_view, 4> kBuildings = {"North", "South", "Main", "Garden"};
constexpr std::array<std::string_view, 6> kCities = {"Oslo", "Paris", "Rome",
                                                     "Lima", "Cairo", "Delhi"};
constexpr std::array<std::string_view, 14> kTitles = {
    "Algebra", "Logic",  "Optics",    "Genetics", "Poetry",  "Ethics",  "Robotics",
    "Grammar", "Botany", "Acoustics", "Finance",  "Anatomy", "Drawing", "Statistics"};
constexpr std::array<std::string_view, 3> kLevels = {"Basic", "Advanced", "Expert"};
constexpr std::array<std::string_view, 30> kNames = {
    "Ada",  "Bela", "Carl", "Dora", "Emil", "Fay", "Gus",  "Hana", "Ivan", "Jane",
    "Karl", "Lena", "Max",  "Nina", "Olaf", "Pia", "Quin", "Rosa", "Sven", "Tara",
    "Uwe",  "Vera", "Wim",  "Xena", "Yuri", "Zoe", "Abel", "Beth", "Cleo", "Dirk"};

// Numbers that order rows have more values than their table has rows, but few enough that a value
// asked for ("older than 25") is often in the table: only then > and >= differ.
constexpr std::array<Domain, 14> kDomains = {{
    {.column = "dept.name", .words = kDepartments},
    {.column = "dept.building", .words = kBuildings},
    {.column = "dept.budget", .low = 200, .high = 400, .step = 20},
    {.column = "teacher.age", .low = 30, .high = 49},
    {.column = "teacher.salary", .low = 3000, .high = 4900, .step = 100},
    {.column = "teacher.city", .words = kCities},
    {.column = "student.age", .low = 17, .high = 44},
    {.column = "student.gpa", .low = 10, .high = 40, .tenths = true},
    {.column = "student.city", .words = kCities},
    {.column = "course.title", .words = kTitles},
    {.column = "course.credits", .low = 2, .high = 16},
    {.column = "course.level", .words = kLevels},
    {.column = "enrol.grade", .low = 50, .high = 95, .step = 5},
    {.column = "enrol.year", .low = 2020, .high = 2024},
}};

constexpr std::string_view kCreate =
    "CREATE TABLE dept(id INTEGER PRIMARY KEY, name TEXT, building TEXT, budget INTEGER);"
    "CREATE TABLE teacher(id INTEGER PRIMARY KEY, name TEXT, age INTEGER, salary INTEGER,"
    " city TEXT, dept_id INTEGER);"
    "CREATE TABLE student(id INTEGER PRIMARY KEY, name TEXT, age INTEGER, gpa REAL, city TEXT,"
    " dept_id INTEGER);"
    "CREATE TABLE course(id INTEGER PRIMARY KEY, title TEXT, credits INTEGER, level TEXT,"
    " dept_id INTEGER, teacher_id INTEGER);"
    "CREATE TABLE enrol(student_id INTEGER, course_id INTEGER, grade INTEGER, year INTEGER);";

constexpr size_t kDepartmentRows = 6, kTeacherRows = 10, kStudentRows = 24, kCourseRows = 12;
constexpr size_t kFewestEnrolments = 24, kMostEnrolments = 120;

std::string quoted(std::string_view word) { return std::string("'").append(word).append("'"); }

std::string literal(const Domain& domain, size_t index) {
  return domain.words.empty() ? domain.value(index) : quoted(domain.words[index]);
}

std::string any(std::string_view column, Random& random) {
  const Domain& values = domain(column);
  return literal(values, random.below(values.size()));
}

// `count` different values of a column in random order.
std::vector<std::string> distinct(std::string_view column, size_t count, Random& random) {
  const Domain& values = domain(column);
  std::vector<std::string> result;
  for (size_t i = 0; i < values.size(); ++i) result.push_back(literal(values, i));
  random.shuffle(result);
  result.resize(count);
  return result;
}

std::vector<std::string> distinct_names(size_t count, Random& random) {
  std::vector<std::string> names;
  for (std::string_view name : kNames) names.push_back(quoted(name));
  random.shuffle(names);
  names.resize(count);
  return names;
}

void insert(std::string& script, std::string_view table, std::initializer_list<std::string> row) {
  script.append("INSERT INTO ").append(table).append(" VALUES(");
  std::string_view separator = "";
  for (const std::string& cell : row) {
    script.append(separator).append(cell);
    separator = ",";
  }
  script += ");";
}

using Ids = std::vector<std::string>;

const std::string& pick(const Ids& ids, Random& random) { return ids[random.below(ids.size())]; }

// Hands out ids that no table shares.
class IdSource {
 public:
  explicit IdSource(Random& random) {
    for (int id = 100; id < 1000; ++id) ids_.push_back(std::to_string(id));
    random.shuffle(ids_);
  }
  Ids take(size_t count) {
    const Ids taken(ids_.end() - static_cast<std::ptrdiff_t>(count), ids_.end());
    ids_.resize(ids_.size() - count);
    return taken;
  }

 private:
  Ids ids_;
};

void insert_departments(std::string& script, const Ids& ids, Random& random) {
  const auto names = distinct("dept.name", ids.size(), random);
  const auto budgets = distinct("dept.budget", ids.size(), random);
  for (size_t i = 0; i < ids.size(); ++i) {
    insert(script, "dept", {ids[i], names[i], any("dept.building", random), budgets[i]});
  }
}

void insert_teachers(std::string& script, const Ids& ids, const Ids& departments, Random& random) {
  const auto names = distinct_names(ids.size(), random);
  const auto ages = distinct("teacher.age", ids.size(), random);
  const auto salaries = distinct("teacher.salary", ids.size(), random);
  for (size_t i = 0; i < ids.size(); ++i) {
    insert(script, "teacher",
           {ids[i], names[i], ages[i], salaries[i], any("teacher.city", random),
            pick(departments, random)});
  }
}

void insert_students(std::string& script, const Ids& ids, const Ids& departments, Random& random) {
  const auto names = distinct_names(ids.size(), random);
  const auto ages = distinct("student.age", ids.size(), random);
  const auto gpas = distinct("student.gpa", ids.size(), random);
  for (size_t i = 0; i < ids.size(); ++i) {
    insert(script, "student",
           {ids[i], names[i], ages[i], gpas[i], any("student.city", random),
            pick(departments, random)});
  }
}

void insert_courses(std::string& script, const Ids& ids, const Ids& departments,
                    const Ids& teachers, Random& random) {
  const auto titles = distinct("course.title", ids.size(), random);
  const auto credits = distinct("course.credits", ids.size(), random);
  for (size_t i = 0; i < ids.size(); ++i) {
    insert(script, "course",
           {ids[i], titles[i], credits[i], any("course.level", random), pick(departments, random),
            pick(teachers, random)});
  }
}

void insert_enrolments(std::string& script, const Ids& students, const Ids& courses,
                       Random& random) {
  std::vector<std::pair<std::string, std::string>> pairs;
  for (const std::string& student : students) {
    for (const std::string& course : courses) pairs.emplace_back(student, course);
  }
  random.shuffle(pairs);
  pairs.resize(kFewestEnrolments + random.below(kMostEnrolments - kFewestEnrolments + 1));
  for (const auto& [student, course] : pairs) {
    insert(script, "enrol",
           {student, course, any("enrol.grade", random), any("enrol.year", random)});
  }
}

}  // namespace

std::span<const std::string_view> table_names() { return kTables; }

size_t Domain::size() const {
  if (!words.empty()) return words.size();
  return static_cast<size_t>((high - low) / step) + 1;
}

std::string Domain::value(size_t index) const {
  if (!words.empty()) return std::string(words[index]);
  const int number = low + step * static_cast<int>(index);
  if (!tenths) return std::to_string(number);
  return std::to_string(number / 10) + "." + std::to_string(number % 10);
}

const Domain& domain(std::string_view column) {
  for (const Domain& each : kDomains) {
    if (each.column == column) return each;
  }
  throw std::invalid_argument("domain: column must be one that questions name, got " +
                              std::string(column));
}

std::string instance_script(uint64_t seed) {
  Random random(seed);
  IdSource source(random);
  const Ids departments = source.take(kDepartmentRows);
  const Ids teachers = source.take(kTeacherRows);
  const Ids students = source.take(kStudentRows);
  const Ids courses = source.take(kCourseRows);
  std::string script(kCreate);
  insert_departments(script, departments, random);
  insert_teachers(script, teachers, departments, random);
  insert_students(script, students, departments, random);
  insert_courses(script, courses, departments, teachers, random);
  insert_enrolments(script, students, courses, random);
  return script;
}

}  // namespace text2sql
