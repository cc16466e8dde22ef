// How PopART learns of ops: static objects that put a factory into a table.
#pragma once

#include <functional>
#include <initializer_list>
#include <utility>

#include "op.hpp"

namespace popart {

class Attributes {
 public:
  using Int = int64_t;
  using Float = float;

  template <typename T>
  T getAttribute(const std::string& name, const T& otherwise) const {
    return find(name, otherwise);
  }
  void set(const std::string& name, Int value) { ints_[name] = value; }
  void set(const std::string& name, Float value) { floats_[name] = value; }
  template <typename Use>
  void for_each_name(Use use) const {
    for (const auto& entry : ints_) use(entry.first);
    for (const auto& entry : floats_) use(entry.first);
  }

 private:
  Int find(const std::string& name, Int otherwise) const { return ints_.count(name) ? ints_.at(name) : otherwise; }
  Float find(const std::string& name, Float otherwise) const {
    return floats_.count(name) ? floats_.at(name) : otherwise;
  }
  std::map<std::string, Int> ints_;
  std::map<std::string, Float> floats_;
};

struct OpDefinition {
  using DataTypes = std::vector<DataType>;
  struct Input {
    std::string name;
    DataTypes types;
  };
  struct Attribute {
    std::string regex;
  };
  using Inputs = std::vector<Input>;
  using Outputs = std::vector<Input>;
  using Attributes = std::map<std::string, Attribute>;

  OpDefinition(Inputs i, Outputs o, Attributes a) : inputs(std::move(i)), outputs(std::move(o)), attributes(std::move(a)) {}
  Inputs inputs;
  Outputs outputs;
  Attributes attributes;
};

using OpDefinitions = std::map<OperatorIdentifier, OpDefinition>;

struct OpCreatorInfo {
  OperatorIdentifier opid;
  Op::Settings settings;
  Attributes attributes;
};

using OpFactory = std::function<std::unique_ptr<Op>(const OpCreatorInfo&)>;

struct RegisteredOp {
  OpDefinition definition;
  OpFactory factory;
  bool is_public;
};
std::map<OperatorIdentifier, RegisteredOp>& registered_ops();  // simulator.cpp

template <typename OP>
class OpCreator {
 public:
  OpCreator(const OpDefinitions& definitions, OpFactory factory, bool is_public) {
    for (const auto& entry : definitions) registered_ops().insert({entry.first, {entry.second, factory, is_public}});
  }
};

}  // namespace popart
