#include <exception>
#include <iostream>

#include "examples/text2sql/options.h"
#include "examples/text2sql/run.h"

int main(int argc, char** argv) {
  const auto parsed = text2sql::parse_options(argc, argv);
  if (const int* exit_code = std::get_if<int>(&parsed)) return *exit_code;
  try {
    return text2sql::run(std::get<text2sql::Options>(parsed));
  } catch (const std::exception& error) {
    std::cerr << "text2sql: " << error.what() << '\n';
    return 2;
  }
}
