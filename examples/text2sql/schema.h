#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace text2sql {

// A school: dept(id, name, building, budget), teacher(id, name, age, salary, city, dept_id),
// student(id, name, age, gpa, city, dept_id), course(id, title, credits, level, dept_id,
// teacher_id), enrol(student_id, course_id, grade, year).
std::span<const std::string_view> table_names();

// What the values of a column are drawn from: numbers low, low + step, .., high, or words.
struct Domain {
  std::string_view column;  // "student.age"
  int low = 0;
  int high = 0;
  int step = 1;
  bool tenths = false;  // 35 is printed as 3.5
  std::span<const std::string_view> words = {};

  size_t size() const;
  std::string value(size_t index) const;  // as a person writes it: 3.5, Physics
};

const Domain& domain(std::string_view column);

// One database: CREATE TABLE and INSERT statements. 6 departments, 10 teachers, 24 students,
// 12 courses, 24 to 120 enrolments. Ids are random and no two tables share one, so a join on
// a.id = b.id is empty; ages, salaries, gpas, credits and budgets have no ties within a table; a
// student takes a course at most once.
std::string instance_script(uint64_t seed);

}  // namespace text2sql
