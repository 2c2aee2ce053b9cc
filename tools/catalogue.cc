// The table of rl/README.md, from rl/catalogue.h.
//   tether_catalogue FILE           compares; exit code 1 when FILE says something else
//   tether_catalogue FILE --write   writes FILE
#include "rl/catalogue.h"

#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <string_view>

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

std::string page() {
  std::string text =
      "# Objectives\n\n"
      "Every objective is a `PolicyObjective` (policy_objective.h) that `tether::presets::NAME()`\n"
      "returns and that may then be changed: its surrogate, KL penalty, aggregation.\n"
      "This page is written by `./dev catalogue --write` from catalogue.h.\n\n"
      "| name | loss | paper | header |\n|---|---|---|---|\n";
  for (const tether::CatalogueRow& row : tether::kCatalogue) {
    const std::string file(row.header.substr(row.header.rfind('/') + 1));
    text += "| `" + std::string(row.name) + "` | " + cell(row.formula) + " | " + cell(row.paper) +
            " | [" + file + "](" + file + ") |\n";
  }
  return text;
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
  if (contents(argv[1]) == page()) return 0;
  std::cerr << argv[1] << " is stale: run ./dev catalogue --write\n";
  return 1;
}
