#pragma once

#include <torch/optim/adamw.h>
#include <torch/serialize/archive.h>

#include <filesystem>
#include <string>
#include <vector>

#include "examples/text2sql/model.h"
#include "examples/text2sql/run_state.h"
#include "examples/text2sql/tokenizer.h"

namespace text2sql {

// Writes a file so that a reader, or a run killed at any moment, finds either the old content or
// the new one: temporary file, fsync, rename, fsync of the folder. Throws std::runtime_error.
void write_atomically(const std::filesystem::path& path, const std::string& content);

// The file is a header (magic, size, checksum) and a torch archive. `models` are saved under their
// names' order; a null optimizer is left out. Randomness needs no place in it: every step seeds its
// own streams from the run's seed, the phase and the step.
struct NamedModel {
  std::string name;
  Transformer* model;
};

void save_checkpoint(const std::filesystem::path& path, const RunState& state,
                     const Tokenizer& tokenizer, const std::vector<NamedModel>& models,
                     const torch::optim::Optimizer* optimizer);

// An opened checkpoint. Throws std::runtime_error with one line when the file is missing, cut or
// altered.
class Checkpoint {
 public:
  explicit Checkpoint(const std::filesystem::path& path);

  RunState state() const;
  Tokenizer tokenizer() const;
  void restore(const std::vector<NamedModel>& models);
  void restore(torch::optim::Optimizer& optimizer);

 private:
  std::filesystem::path path_;
  mutable torch::serialize::InputArchive archive_;
};

}  // namespace text2sql
