#pragma once

#include <mutex>
#include <optional>
#include <shared_mutex>
#include <typeindex>
#include <unordered_map>

namespace tether {

// A value for each type that somebody added, from any thread: what a backend knows of formulas. By
// the type and not by its name, which two unnamed namespaces may share.
template <class Value>
class TypeTable {
 public:
  void add(std::type_index type, const Value& value) {
    const std::unique_lock lock(mutex_);
    values_.insert_or_assign(type, value);
  }

  std::optional<Value> find(std::type_index type) const {
    const std::shared_lock lock(mutex_);
    const auto found = values_.find(type);
    return found == values_.end() ? std::nullopt : std::optional(found->second);
  }

 private:
  mutable std::shared_mutex mutex_;
  std::unordered_map<std::type_index, Value> values_;
};

}  // namespace tether
