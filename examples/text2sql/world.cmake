# The world without torch: data, questions, query log, sandbox, judge, tokenizer.
find_package(SQLite3 REQUIRED)

set(world_sources grammar_tables judge projections query query_log questions sandbox schema task
  tokenizer tokenizer_training)
list(TRANSFORM world_sources REPLACE "(.+)" "${CMAKE_CURRENT_LIST_DIR}/\\1.cc")
add_library(text2sql_world STATIC ${world_sources})
tether_target(text2sql_world CONVERSION)
target_link_libraries(text2sql_world PRIVATE SQLite::SQLite3)
