// The tables of rl/README.md, from the catalogues.
//   tether_catalogue FILE           prints it; exit code 1 when FILE says something else
//   tether_catalogue FILE --write   writes FILE
#include "rl/catalogue.h"

#include <cctype>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <string_view>
#include <variant>

#include "estimators/advantage/catalogue.h"
#include "rl/batch_weight_catalogue.h"
#include "rl/dialects.h"

namespace {

// A cell of a Markdown table: | would end it.
std::string cell(std::string_view text) {
  std::string escaped;
  for (const char c : text) {
    if (c == '|') escaped += '\\';
    escaped += c;
  }
  return escaped;
}

// The cells that every family has.
template <class Row>
std::string cells(const Row& row) {
  const bool here = row.header.starts_with("rl/");
  const std::string link =
      here ? std::string(row.header.substr(3)) : "../" + std::string(row.header);
  const std::string file(link.substr(link.rfind('/') + 1));
  return "| `" + std::string(row.name) + "` | " + cell(row.formula) + " | " + cell(row.paper) +
         " | [" + file + "](" + link + ") | " + cell(row.agreement) + " |";
}

std::string text(const tether::Advantages& advantages) {
  const auto* group = std::get_if<tether::GroupAdvantage>(&advantages);
  if (group == nullptr) return "GAE";
  const auto baseline = tether::kAdvantageBaselineNames[static_cast<size_t>(group->baseline)];
  const auto scale = tether::kAdvantageScaleNames[static_cast<size_t>(group->scale)];
  return "group: " + std::string(baseline) + ", " + std::string(scale);
}

std::string policy_table() {
  std::string out =
      "| name | loss | paper | header | agreement | advantages |\n|---|---|---|---|---|---|\n";
  for (const auto& row : tether::kCatalogue)
    out += cells(row) + " " + text(row.advantages) + " |\n";
  return out;
}

std::string preference_table() {
  std::string out = "| name | loss | paper | header | agreement |\n|---|---|---|---|---|\n";
  for (const auto& row : tether::kPreferenceCatalogue) out += cells(row) + "\n";
  return out;
}

std::string value_table() {
  std::string out = "| name | loss | paper | header | agreement |\n|---|---|---|---|---|\n";
  for (const auto& row : tether::kValueCatalogue) out += cells(row) + "\n";
  return out;
}

std::string weight_table() {
  std::string out = "| name | W | paper | header | agreement | of 0 |\n|---|---|---|---|---|---|\n";
  tether::for_each_weight([&](const auto& row) {
    out += cells(row) + (row.defaults.traits.leaves ? " leaves the mask |\n" : " stays |\n");
  });
  return out;
}

std::string batch_weight_table() {
  std::string out = "| name | weight | paper | header | agreement |\n|---|---|---|---|---|\n";
  tether::for_each_batch_weight([&](const auto& row) { out += cells(row) + "\n"; });
  return out;
}

// "verl.vanilla" of "mpmath; verl vanilla; OpenRLHF ppo, token": whether the peer is among those
// that a row agrees with, by the trainer's own name of its loss.
bool is_compared(const tether::Dialect& dialect) {
  std::string wanted, words;
  for (const char c : dialect.name) wanted += c == '.' ? ' ' : c;
  for (const auto& row : tether::kCatalogue) {
    if (row.name != dialect.objective) continue;
    for (const char c : row.agreement) {
      words += c == '-' ? '_' : static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    }
  }
  const size_t at = words.find("; " + wanted);
  if (at == std::string::npos) return false;
  const size_t end = at + 2 + wanted.size();
  return end == words.size() || words[end] == ';' || words[end] == ',';
}

std::string dialect_table() {
  std::string out = "| name | objective | with | compared |\n|---|---|---|---|\n";
  for (const auto& each : tether::kDialects) {
    std::string settings;
    for (const auto& [name, value] : settings_of(each)) {
      settings += (settings.empty() ? "`" : ", `") + std::string(name) + "` " + std::string(value);
    }
    out += "| `" + std::string(each.name) + "` | `" + std::string(each.objective) + "` | " +
           settings + (is_compared(each) ? " | yes |\n" : " | |\n");
  }
  return out;
}

std::string kl_table() {
  std::string out =
      "| name | K, d = log other - log sampled | paper | header | agreement |\n"
      "|---|---|---|---|---|\n";
  tether::for_each_kl_form([&](const auto& row) { out += cells(row) + "\n"; });
  return out;
}

std::string link_table() {
  std::string out = "| name | g(S) | paper | header | agreement |\n|---|---|---|---|---|\n";
  tether::for_each_link([&](const auto& row) { out += cells(row) + "\n"; });
  return out;
}

std::string advantage_table() {
  std::string out =
      "| name | formula | paper | header | agreement | of |\n|---|---|---|---|---|---|\n";
  tether::for_each_recursion([&](const auto& row) { out += cells(row) + " tokens |\n"; });
  tether::for_each_group_rule([&](const auto& row) { out += cells(row) + " groups |\n"; });
  return out;
}

std::string page() {
  return "# Objectives\n\n"
         "Every objective is a plain value that `tether::presets::NAME()` returns and that may "
         "then\n"
         "be changed. This page is written by `./dev catalogue --write` from catalogue.h.\n"
         "Agreement: who computes the same value and gradient in the tests, to 1e-12 in float64:\n"
         "mpmath, 60 digits, and peers' own functions (docs/peers.md), to 1e-6 of those that "
         "insist\n"
         "on float32; a level behind a name is the peer's. Advantages: its paper's or,\n"
         "where that leaves them open, the field's: GAE, or relative to a group (baseline, "
         "scale).\n\n"
         "## Policy objectives: ratio level, surrogate, weights, KL penalty, entropy, "
         "aggregation\n\n" +
         policy_table() +
         "\n### By the trainers' names ([how](../docs/peers.md#by-the-trainers-name))\n\n"
         "Compared: with a recording of the trainer's loss of that name, in the row of the "
         "objective.\n\n" +
         dialect_table() +
         "\n## Weights of tokens, of any policy objective ([how](../docs/weights.md))\n\n" +
         weight_table() +
         "\n## Weights that need the whole batch "
         "([how](../docs/weights.md#weights-that-need-the-whole-batch))\n\n" +
         batch_weight_table() + "\n## Forms of the KL penalty ([which](../docs/kl.md))\n\n" +
         kl_table() + "\n## Preference objectives: score, link, loss of the pair\n\n" +
         preference_table() + "\n## Links of preference objectives\n\n" + link_table() +
         "\n## Value objectives\n\n" + value_table() +
         "\n## Advantages, by `advantage(batch, Gae{})` and `tether.advantage(\"gae\", ...)`\n\n" +
         advantage_table();
}

std::string contents(const char* path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

}  // namespace

int main(int argc, char** argv) {
  const bool write = argc == 3 && std::string_view(argv[2]) == "--write";
  if (argc != 2 && !write) {
    std::cerr << "usage: tether_catalogue FILE [--write]\n";
    return 2;
  }
  if (write) {
    std::ofstream file(argv[1], std::ios::binary);
    file << page();
    return file.flush() ? 0 : 1;
  }
  std::cout << page();
  if (contents(argv[1]) == page()) return 0;
  std::cerr << argv[1] << " is stale: run ./dev catalogue --write\n";
  return 1;
}
