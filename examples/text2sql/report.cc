#include "examples/text2sql/report.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cmath>
#include <cstdio>
#include <sstream>

namespace text2sql {
namespace {

constexpr int64_t kPlainLines = 10;
constexpr size_t kBarWidth = 20;
constexpr size_t kShownQuestions = 4;

size_t terminal_width() {
  winsize size{};
  const bool known = ::ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0;
  return known ? size.ws_col : 100;
}

std::string minutes(double seconds) {
  char text[32];
  const auto whole = static_cast<long>(std::lround(seconds));
  std::snprintf(text, sizeof text, "%ld:%02ld", whole / 60, whole % 60);
  return text;
}

std::string padded(const std::string& text, size_t width) {
  return text + std::string(width > text.size() ? width - text.size() : 0, ' ');
}

std::string accuracy_row(const std::string& name, const std::vector<Answer>& answers) {
  Accuracy accuracy;
  for (const Answer& answer : answers) accuracy.add(answer.question->tables, answer.correct);
  std::string row = padded(name, 28);
  for (size_t tables = 0; tables < accuracy.asked.size(); ++tables) {
    row += padded(fixed(100 * accuracy.share(tables), 1) + " +-" +
                      fixed(100 * accuracy.standard_error(tables), 1),
                  13);
  }
  return row.substr(0, row.find_last_not_of(' ') + 1) + "\n";
}

std::string answer_line(const std::string& when, const Answer& answer) {
  return padded(when, 14) + (answer.correct ? "right  " : "wrong  ") + answer.sql + "\n";
}

// Questions that changed to right first, then any.
std::string example_questions(const Summary& summary) {
  std::string text;
  size_t shown = 0;
  for (const bool changed : {true, false}) {
    for (size_t i = 0; i < summary.after_rl.size() && shown < kShownQuestions; ++i) {
      const Answer& before = summary.after_sft[i];
      const Answer& after = summary.after_rl[i];
      if ((!before.correct && after.correct) != changed) continue;
      text += before.question->text + "\n" + answer_line("  after SFT", before) +
              answer_line("  after RL", after);
      ++shown;
    }
  }
  return text;
}

}  // namespace

void Accuracy::add(int tables, bool correct) {
  for (const size_t i : {size_t{0}, static_cast<size_t>(tables)}) {
    ++asked.at(i);
    right.at(i) += correct ? 1 : 0;
  }
}

double Accuracy::share(size_t tables) const {
  const int64_t count = asked.at(tables);
  return count == 0 ? 0 : static_cast<double>(right.at(tables)) / static_cast<double>(count);
}

double Accuracy::standard_error(size_t tables) const {
  const int64_t count = asked.at(tables);
  const double p = share(tables);
  return count == 0 ? 0 : std::sqrt(p * (1 - p) / static_cast<double>(count));
}

ProgressLine::ProgressLine(std::string title, int64_t done, int64_t total)
    : title_(std::move(title)),
      first_(done),
      total_(total),
      terminal_(::isatty(STDOUT_FILENO) == 1),
      start_(std::chrono::steady_clock::now()) {}

void ProgressLine::update(int64_t done, const std::string& figures) {
  const int64_t every = std::max<int64_t>(1, total_ / kPlainLines);
  if (!terminal_ && done % every != 0 && done != total_) return;
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  const double left = seconds * static_cast<double>(total_ - done) /
                      static_cast<double>(std::max<int64_t>(1, done - first_));
  std::string line = title_ + " " + std::to_string(done) + "/" + std::to_string(total_) + " ";
  if (terminal_) {
    const auto full = static_cast<size_t>(static_cast<int64_t>(kBarWidth) * done / total_);
    line += '[';
    line.append(full, '#').append(kBarWidth - full, '-').append("] ");
  }
  line += figures + "  " + minutes(left) + " left";
  if (terminal_) {
    std::printf("\r%s\033[K", line.substr(0, terminal_width() - 1).c_str());
  } else {
    std::printf("%s\n", line.c_str());
  }
  std::fflush(stdout);
}

void ProgressLine::end() {
  if (terminal_) std::printf("\n");
  std::fflush(stdout);
}

std::string fixed(double value, int decimals) {
  char text[64];
  std::snprintf(text, sizeof text, "%.*f", decimals, value);
  return text;
}

std::string percent(double share) { return fixed(100 * share, 1) + " %"; }

std::string title_of(const std::string& objective) {
  std::string out;
  for (const char c : objective) out += c == '_' ? ' ' : static_cast<char>(std::toupper(c));
  return out;
}

std::string curve_csv(const std::vector<CurvePoint>& curve) {
  constexpr std::array kPhases = {"sft", "rl", "control"};
  std::ostringstream out;
  const CurvePoint names;
  out << "phase,step";
  CurvePoint::for_each(names, [&](const char* name, double) { out << ',' << name; });
  out << '\n';
  for (const CurvePoint& point : curve) {
    out << kPhases.at(static_cast<size_t>(point.phase)) << ',' << point.step;
    CurvePoint::for_each(point, [&](const char*, double value) {
      out << ',';
      if (!std::isnan(value)) out << value;
    });
    out << '\n';
  }
  return out.str();
}

std::string summary_text(const Summary& summary) {
  const RunState& state = summary.state;
  std::string text = "\nHeld-out questions answered right, % +-1 standard error\n" +
                     padded("", 28) + padded("all", 13) + padded("1 table", 13) +
                     padded("2 tables", 13) + "3 tables\n";
  text += accuracy_row("  after SFT", summary.after_sft);
  text += accuracy_row("  after " + title_of(state.options.objective), summary.after_rl);
  if (!summary.control.empty()) {
    text += accuracy_row("  same time, more SFT", summary.control);
  }
  text +=
      "\nRight labels in the query log that SFT imitates: " + percent(state.log_accuracy) + "\n";
  if (state.audited > 0) {
    text += "Audit: " +
            percent(static_cast<double>(state.accidental) / static_cast<double>(state.audited)) +
            " of " + std::to_string(state.audited) +
            " rewarded samples of the last steps are wrong on the evaluation databases.\n";
  }
  return text + "\nHeld-out questions, before and after\n" + example_questions(summary);
}

}  // namespace text2sql
