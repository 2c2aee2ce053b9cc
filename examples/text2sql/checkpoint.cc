#include "examples/text2sql/checkpoint.h"

#include <ATen/ATen.h>
#include <fcntl.h>
#include <torch/optim/serialize.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string_view>

namespace text2sql {
namespace {

using torch::serialize::InputArchive;
using torch::serialize::OutputArchive;

constexpr std::string_view kMagic = "text2sql checkpoint 1\n";

[[noreturn]] void fail(const std::filesystem::path& path, const std::string& problem) {
  throw std::runtime_error(path.string() + ": " + problem);
}

// FNV-1a, 64 bits: torch's archives are read without a check of their content.
uint64_t checksum(std::string_view bytes) {
  uint64_t hash = 0xcbf29ce484222325ULL;
  for (const char byte : bytes) {
    hash = (hash ^ static_cast<unsigned char>(byte)) * 0x100000001b3ULL;
  }
  return hash;
}

std::string header(std::string_view payload) {
  const uint64_t numbers[] = {payload.size(), checksum(payload)};
  std::string result(kMagic);
  result.append(reinterpret_cast<const char*>(numbers), sizeof numbers);
  return result;
}

std::string verified_payload(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) fail(path, "no checkpoint there (" + std::string(std::strerror(errno)) + ")");
  const std::string bytes{std::istreambuf_iterator<char>(in), {}};
  const size_t size = header("").size();
  if (!std::string_view(bytes).starts_with(kMagic)) fail(path, "not a checkpoint of text2sql");
  if (bytes.size() < size) fail(path, "the checkpoint is cut short");
  std::string payload = bytes.substr(size);
  uint64_t expected = 0;
  std::memcpy(&expected, bytes.data() + kMagic.size(), sizeof expected);
  if (payload.size() < expected) fail(path, "the checkpoint is cut short");
  if (bytes.compare(0, size, header(payload)) != 0) fail(path, "the checkpoint is damaged");
  return payload;
}

void write_all(int file, const std::string& content, const std::filesystem::path& path) {
  const char* next = content.data();
  const char* const end = next + content.size();
  while (next < end) {
    const ssize_t written = ::write(file, next, static_cast<size_t>(end - next));
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) fail(path, "cannot write (" + std::string(std::strerror(errno)) + ")");
    next += written;
  }
}

class Descriptor {
 public:
  Descriptor(const std::filesystem::path& path, int flags)
      : file_(::open(path.c_str(), flags, 0644)) {
    if (file_ < 0) fail(path, "cannot open (" + std::string(std::strerror(errno)) + ")");
  }
  ~Descriptor() { ::close(file_); }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return file_; }

 private:
  int file_;
};

void write_number(OutputArchive& archive, const std::string& key, int64_t v) {
  archive.write(key, v);
}
void write_number(OutputArchive& archive, const std::string& key, uint64_t v) {
  archive.write(key, static_cast<int64_t>(v));
}
void write_number(OutputArchive& archive, const std::string& key, double v) {
  archive.write(key, v);
}
void write_number(OutputArchive& archive, const std::string& key, bool v) { archive.write(key, v); }
void write_number(OutputArchive& archive, const std::string& key, const std::string& v) {
  archive.write(key, v);
}

c10::IValue read_value(InputArchive& archive, const std::string& key) {
  c10::IValue value;
  archive.read(key, value);
  return value;
}

template <class T>
void read_number(InputArchive& archive, const std::string& key, T& value) {
  const c10::IValue read = read_value(archive, key);
  if constexpr (std::is_same_v<T, std::string>) {
    value = read.toStringRef();
  } else {
    value = static_cast<T>(read.to<std::conditional_t<std::is_same_v<T, uint64_t>, int64_t, T>>());
  }
}

// visit(key, member) for everything in a RunState but the curve.
template <class State, class Visit>
void for_each_member(State& state, Visit visit) {
  for_each_result_option(state.options, state.options,
                         [&](const char* name, auto& value, auto&) { visit(name, value); });
  visit("step", state.step);
  visit("control_steps", state.control_steps);
  visit("log_accuracy", state.log_accuracy);
  visit("audited", state.audited);
  visit("accidental", state.accidental);
}

at::Tensor curve_tensor(const std::vector<CurvePoint>& curve) {
  std::vector<double> numbers;
  for (const CurvePoint& point : curve) {
    numbers.push_back(static_cast<double>(point.phase));
    numbers.push_back(static_cast<double>(point.step));
    CurvePoint::for_each(point, [&](const char*, double value) { numbers.push_back(value); });
  }
  return at::tensor(numbers, at::kDouble);
}

std::vector<CurvePoint> curve_of(const at::Tensor& numbers) {
  std::vector<CurvePoint> curve;
  const double* next = numbers.const_data_ptr<double>();
  const double* const end = next + numbers.numel();
  while (next < end) {
    CurvePoint point;
    point.phase = static_cast<Phase>(static_cast<int64_t>(*next++));
    point.step = static_cast<int64_t>(*next++);
    CurvePoint::for_each(point, [&](const char*, double& value) { value = *next++; });
    curve.push_back(point);
  }
  return curve;
}

}  // namespace

void write_atomically(const std::filesystem::path& path, const std::string& content) {
  const std::filesystem::path temporary = path.string() + ".tmp";
  {
    const Descriptor file(temporary, O_WRONLY | O_CREAT | O_TRUNC);
    write_all(file.get(), content, temporary);
    if (::fsync(file.get()) != 0) fail(temporary, "cannot write");
  }
  std::filesystem::rename(temporary, path);
  const std::filesystem::path parent = path.parent_path();
  const Descriptor folder(parent.empty() ? "." : parent, O_RDONLY | O_DIRECTORY);
  ::fsync(folder.get());
}

void save_checkpoint(const std::filesystem::path& path, const RunState& state,
                     const Tokenizer& tokenizer, const std::vector<NamedModel>& models,
                     const torch::optim::Optimizer* optimizer) {
  OutputArchive archive;
  archive.write("phase", static_cast<int64_t>(state.phase));
  for_each_member(state,
                  [&](const char* key, const auto& value) { write_number(archive, key, value); });
  archive.write("curve", curve_tensor(state.curve));
  std::ostringstream pieces;
  tokenizer.save(pieces);
  archive.write("tokenizer", pieces.str());
  for (const NamedModel& each : models) {
    OutputArchive nested;
    each.model->save(nested);
    archive.write(each.name, nested);
  }
  if (optimizer != nullptr) {
    OutputArchive nested;
    optimizer->save(nested);
    archive.write("optimizer", nested);
  }
  std::ostringstream bytes;
  archive.save_to(bytes);
  write_atomically(path, header(bytes.view()) + bytes.str());
}

Checkpoint::Checkpoint(const std::filesystem::path& path) : path_(path) {
  std::istringstream bytes(verified_payload(path));
  archive_.load_from(bytes);
}

RunState Checkpoint::state() const {
  RunState state;
  for_each_member(state, [&](const char* key, auto& value) { read_number(archive_, key, value); });
  state.phase = static_cast<Phase>(read_value(archive_, "phase").toInt());
  at::Tensor curve;
  archive_.read("curve", curve);
  state.curve = curve_of(curve);
  return state;
}

Tokenizer Checkpoint::tokenizer() const {
  std::istringstream pieces(read_value(archive_, "tokenizer").toStringRef());
  return Tokenizer::load(pieces);
}

void Checkpoint::restore(const std::vector<NamedModel>& models) {
  for (const NamedModel& each : models) {
    InputArchive nested;
    archive_.read(each.name, nested);
    each.model->load(nested);
  }
}

void Checkpoint::restore(torch::optim::Optimizer& optimizer) {
  InputArchive nested;
  if (archive_.try_read("optimizer", nested)) optimizer.load(nested);
}

}  // namespace text2sql
