// How PopART learns of Opx classes.
#pragma once

#include "opx.hpp"

namespace popart {
namespace popx {

using OpxFactory = std::function<std::unique_ptr<Opx>(Op*, Devicex*)>;
std::map<OperatorIdentifier, OpxFactory>& registered_opxs();  // simulator.cpp

template <typename OPX>
class OpxCreator {
 public:
  explicit OpxCreator(const std::vector<OperatorIdentifier>& ids) {
    for (const OperatorIdentifier& id : ids)
      registered_opxs()[id] = [](Op* op, Devicex* device) { return std::unique_ptr<Opx>(new OPX(op, device)); };
  }
};

}  // namespace popx
}  // namespace popart
