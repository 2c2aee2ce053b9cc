#include "examples/text2sql/grammar_tables.h"

namespace text2sql::tables {
namespace {

constexpr Step kStudentDept[] = {{"dept", "student.dept_id", "dept.id"}};
constexpr Step kStudentEnrol[] = {{"enrol", "student.id", "enrol.student_id"}};
constexpr Step kStudentCourse[] = {{"enrol", "student.id", "enrol.student_id"},
                                   {"course", "enrol.course_id", "course.id"}};
constexpr Step kTeacherDept[] = {{"dept", "teacher.dept_id", "dept.id"}};
constexpr Step kTeacherCourse[] = {{"course", "teacher.id", "course.teacher_id"}};
constexpr Step kTeacherEnrol[] = {{"course", "teacher.id", "course.teacher_id"},
                                  {"enrol", "course.id", "enrol.course_id"}};
constexpr Step kCourseDept[] = {{"dept", "course.dept_id", "dept.id"}};
constexpr Step kCourseTeacher[] = {{"teacher", "course.teacher_id", "teacher.id"}};
constexpr Step kCourseEnrol[] = {{"enrol", "course.id", "enrol.course_id"}};
constexpr Step kCourseStudent[] = {{"enrol", "course.id", "enrol.course_id"},
                                   {"student", "enrol.student_id", "student.id"}};
constexpr Step kDeptTeacher[] = {{"teacher", "dept.id", "teacher.dept_id"}};
constexpr Step kDeptStudent[] = {{"student", "dept.id", "student.dept_id"}};
constexpr Step kDeptCourse[] = {{"course", "dept.id", "course.dept_id"}};

constexpr Filter kStudentFilters[] = {
    {"age_above", "student.age", ">", {"older than #", "aged over #", "with an age above #"}},
    {"age_below", "student.age", "<", {"younger than #", "aged under #", "with an age below #"}},
    {"gpa_above", "student.gpa", ">", {"with a gpa above #", "having a gpa over #"}},
    {"gpa_below", "student.gpa", "<", {"with a gpa below #", "having a gpa under #"}},
    {"city", "student.city", "=", {"from #", "living in #"}},
    {"dept_name", "dept.name", "=", {"in the # department", "studying #"}, kStudentDept},
    {"dept_building",
     "dept.building",
     "=",
     {"in a department of the # building", "whose department is in the # building"},
     kStudentDept},
    {"dept_budget",
     "dept.budget",
     ">=",
     {"in a department with a budget of at least #", "whose department has at least # budget"},
     kStudentDept},
    {"grade_above",
     "enrol.grade",
     ">",
     {"with a grade above #", "who got a grade over #"},
     kStudentEnrol,
     true},
    {"year", "enrol.year", "=", {"enrolled in #", "who took a course in #"}, kStudentEnrol, true},
    {"course_title", "course.title", "=", {"taking #", "who took #"}, kStudentCourse},
    {"course_level",
     "course.level",
     "=",
     {"taking a course of level #", "who took a # course"},
     kStudentCourse,
     true},
    {"course_credits",
     "course.credits",
     ">=",
     {"taking a course with at least # credits", "who took a course worth at least # credits"},
     kStudentCourse,
     true},
};

constexpr Filter kTeacherFilters[] = {
    {"age_above", "teacher.age", ">", {"older than #", "aged over #", "with an age above #"}},
    {"age_below", "teacher.age", "<", {"younger than #", "aged under #", "with an age below #"}},
    {"salary_above", "teacher.salary", ">", {"earning more than #", "with a salary above #"}},
    {"salary_below", "teacher.salary", "<", {"earning less than #", "with a salary below #"}},
    {"city", "teacher.city", "=", {"from #", "living in #"}},
    {"dept_name", "dept.name", "=", {"in the # department", "working in #"}, kTeacherDept},
    {"dept_building",
     "dept.building",
     "=",
     {"in a department of the # building", "whose department is in the # building"},
     kTeacherDept},
    {"dept_budget",
     "dept.budget",
     ">=",
     {"in a department with a budget of at least #", "whose department has at least # budget"},
     kTeacherDept},
    {"course_title", "course.title", "=", {"teaching #", "who teach #"}, kTeacherCourse},
    {"course_level",
     "course.level",
     "=",
     {"teaching a course of level #", "who teach a # course"},
     kTeacherCourse,
     true},
    {"course_credits",
     "course.credits",
     ">=",
     {"teaching a course with at least # credits", "who teach a course worth at least # credits"},
     kTeacherCourse,
     true},
    {"grade",
     "enrol.grade",
     ">=",
     {"who gave a grade of at least #", "with a student who got at least #"},
     kTeacherEnrol,
     true},
};

constexpr Filter kCourseFilters[] = {
    {"credits_above", "course.credits", ">", {"with more than # credits", "worth over # credits"}},
    {"credits_below", "course.credits", "<", {"with less than # credits", "worth under # credits"}},
    {"level", "course.level", "=", {"of level #", "at the # level"}},
    {"dept_name", "dept.name", "=", {"in the # department", "offered by #"}, kCourseDept},
    {"dept_building",
     "dept.building",
     "=",
     {"in a department of the # building", "whose department is in the # building"},
     kCourseDept},
    {"teacher_city",
     "teacher.city",
     "=",
     {"taught by someone from #", "whose teacher lives in #"},
     kCourseTeacher},
    {"teacher_age",
     "teacher.age",
     ">=",
     {"taught by someone aged at least #", "whose teacher is at least # years old"},
     kCourseTeacher},
    {"teacher_salary",
     "teacher.salary",
     ">",
     {"taught by someone earning more than #", "whose teacher has a salary above #"},
     kCourseTeacher},
    {"grade",
     "enrol.grade",
     ">=",
     {"with a grade of at least #", "in which someone got at least #"},
     kCourseEnrol,
     true},
    {"year", "enrol.year", "=", {"held in #", "which someone took in #"}, kCourseEnrol, true},
    {"student_city",
     "student.city",
     "=",
     {"taken by a student from #", "with a student living in #"},
     kCourseStudent,
     true},
};

constexpr Filter kDeptFilters[] = {
    {"building", "dept.building", "=", {"in the # building", "located in building #"}},
    {"budget_above", "dept.budget", ">", {"with a budget above #", "having a budget over #"}},
    {"budget_below", "dept.budget", "<", {"with a budget below #", "having a budget under #"}},
    {"teacher_city",
     "teacher.city",
     "=",
     {"with a teacher from #", "having a teacher living in #"},
     kDeptTeacher,
     true},
    {"teacher_salary",
     "teacher.salary",
     ">=",
     {"with a teacher earning at least #", "having a teacher with a salary of at least #"},
     kDeptTeacher,
     true},
    {"student_gpa",
     "student.gpa",
     ">",
     {"with a student whose gpa is above #", "having a student with a gpa over #"},
     kDeptStudent,
     true},
    {"course_title", "course.title", "=", {"offering #", "with a course in #"}, kDeptCourse},
    {"course_level",
     "course.level",
     "=",
     {"offering a course of level #", "with a # course"},
     kDeptCourse,
     true},
};

constexpr std::string_view kStudentNumbers[] = {"age", "gpa"};
constexpr std::string_view kTeacherNumbers[] = {"age", "salary"};
constexpr std::string_view kCourseNumbers[] = {"credits"};
constexpr std::string_view kDeptNumbers[] = {"budget"};
constexpr std::string_view kAggregates[] = {"AVG", "MAX", "MIN"};
constexpr std::string_view kAggregatesOfMoney[] = {"AVG", "MAX", "MIN", "SUM"};

constexpr Base kBases[] = {
    {"student", "student", "students", "name", kStudentNumbers, "city", kAggregates, kStudentDept,
     kStudentFilters},
    {"teacher", "teacher", "teachers", "name", kTeacherNumbers, "city", kAggregates, kTeacherDept,
     kTeacherFilters},
    {"course", "course", "courses", "title", kCourseNumbers, "level", kAggregates, kCourseDept,
     kCourseFilters},
    {"dept",
     "department",
     "departments",
     "name",
     kDeptNumbers,
     "building",
     kAggregatesOfMoney,
     {},
     kDeptFilters},
};

constexpr Wording kWordings[] = {
    {Kind::list, {"list the $P$F", "show all $P$F", "which $P$F are there"}},
    {Kind::column, {"list the $C of the $P$F", "show the $C of all $P$F"}},
    {Kind::named_column, {"list the $L and $C of the $P$F", "show $L and $C of all $P$F"}},
    {Kind::count, {"how many $P$F are there", "count the $P$F", "number of $P$F"}},
    {Kind::aggregate, {"what is the $A $C of the $P$F", "$A $C of all $P$F"}},
    {Kind::first, {"which $S$F has the $B $C", "name the $S$F with the $B $C"}},
    {Kind::first_k, {"which $K $P$F have the $B $C", "list the $K $P$F with the $B $C"}},
    {Kind::count_by, {"how many $P$F are there per $G", "number of $P$F for each $G"}},
    {Kind::mean_by, {"$A $C of the $P$F per $G", "what is the $A $C of $P$F for each $G"}},
};

constexpr AggregateWords kAggregateWords[] = {
    {"AVG", {"average", "mean"}},
    {"MAX", {"highest", "largest"}},
    {"MIN", {"lowest", "smallest"}},
    {"SUM", {"total", "summed"}},
};

}  // namespace

std::span<const Base> bases() { return kBases; }
std::span<const Wording> wordings() { return kWordings; }
std::span<const AggregateWords> aggregate_words() { return kAggregateWords; }

}  // namespace text2sql::tables
