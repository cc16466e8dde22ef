// PopART's Opx, as far as ours use it.
#pragma once

#include <set>

#include <poplar/Program.hpp>
#include <popart/op.hpp>

#include "devicex.hpp"

namespace popart {
namespace popx {

enum class InputCreatorType { CanCreate, Deadend };

class Opx {
 public:
  Opx(Op* op, Devicex* device) : op_(op), device_(device) {}
  virtual ~Opx() = default;
  virtual void grow(poplar::program::Sequence&) const = 0;
  virtual InputCreatorType getInputCreatorType(InIndex) const { return InputCreatorType::Deadend; }
  virtual std::set<TensorId> mustExistBeforeCreate(InIndex) const { throw error("nothing is created here"); }
  virtual poplar::Tensor createInput(InIndex, const poplar::DebugNameAndId&) const { throw error("nothing is created here"); }

 protected:
  template <typename OP>
  OP& getOp() const {
    return dynamic_cast<OP&>(*op_);
  }
  template <typename OP>
  void verifyOp(Op* op, const std::vector<OperatorIdentifier>& ids) const {
    bool known = false;
    for (const OperatorIdentifier& id : ids) known = known || id == op->opid;
    if (!known || dynamic_cast<OP*>(op) == nullptr) throw error("an Opx got another op than it serves");
  }
  template <typename OP>
  void verifyOp(Op* op, const OperatorIdentifier& id) const {
    verifyOp<OP>(op, std::vector<OperatorIdentifier>{id});
  }
  poplar::Graph& graph() const { return device_->graph; }
  const poplar::Tensor& getInTensor(InIndex at) const { return device_->inputs.at(at); }
  void setOutTensor(OutIndex at, const poplar::Tensor& tensor) const { device_->outputs[at] = tensor; }
  const TensorInfo& inInfo(InIndex at) const { return op_->inInfo(at); }
  const TensorInfo& outInfo(OutIndex at) const { return static_cast<const Op*>(op_)->outInfo(at); }
  poplar::DebugContext debugContext(const std::string& name = "") const { return poplar::DebugContext(name.c_str()); }
  poplar::DebugNameAndId getDebugNameAndId(const std::string& name = "") const { return poplar::DebugNameAndId(name); }

 private:
  Op* op_;
  Devicex* device_;
};

}  // namespace popx
}  // namespace popart
