// How PopART names an op.
#pragma once

#include <string>
#include <tuple>

namespace popart {

struct OperatorIdentifier {
  OperatorIdentifier(const std::string& d, const std::string& t, int v) : domain(d), type(t), version(v) {}
  std::string domain, type;
  int version;
  friend bool operator<(const OperatorIdentifier& a, const OperatorIdentifier& b) {
    return std::tie(a.domain, a.type, a.version) < std::tie(b.domain, b.type, b.version);
  }
  friend bool operator==(const OperatorIdentifier& a, const OperatorIdentifier& b) { return !(a < b) && !(b < a); }
};

}  // namespace popart
