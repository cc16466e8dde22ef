// What PopART hashes of an op's attributes.
#pragma once

#include <sstream>
#include <string>
#include <vector>

namespace popart {

// Collects "name=value;" instead of hashing.
class OpSerialiserBase {
 public:
  void appendAttribute(const std::string& name, float value) { text_ << name << '=' << value << ';'; }
  void appendAttribute(const std::string& name, int64_t value) { text_ << name << '=' << value << ';'; }
  void appendAttribute(const std::string& name, const std::vector<int64_t>& values) {
    text_ << name << '=';
    for (int64_t value : values) text_ << value << ',';
    text_ << ';';
  }
  std::string text() const { return text_.str(); }

 private:
  std::ostringstream text_;
};

}  // namespace popart
