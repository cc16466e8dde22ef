// PopART's Op, as far as our ops use it: attributes, shapes, gradients. Tensors are nothing but their shapes here.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "error.hpp"
#include "operatoridentifier.hpp"
#include "opserialiser.hpp"
#include "region.hpp"
#include "tensorinfo.hpp"

namespace popart {

using InIndex = int;
using OutIndex = int;
using TensorId = std::string;

enum class GradOpInType { In, Out, GradOut };

struct GradInOutMapper {
  GradInOutMapper(InIndex grad, int non_grad, GradOpInType of) : iGrad(grad), iNonGrad(non_grad), type(of) {}
  InIndex iGrad;
  int iNonGrad;
  GradOpInType type;
};

class Op {
 public:
  struct Settings {};

  Op(const OperatorIdentifier& id, const Settings& s) : opid(id), settings(s) {}
  virtual ~Op() = default;

  virtual std::unique_ptr<Op> clone() const = 0;
  virtual void setup() = 0;
  virtual std::vector<std::unique_ptr<Op>> getGradOps() { throw error("this op has no gradient"); }
  virtual const std::vector<GradInOutMapper>& gradInputInfo() const { throw error("this is no gradient op"); }
  virtual const std::map<int, int>& gradOutToNonGradIn() const { throw error("this is no gradient op"); }
  virtual void appendAttributes(OpSerialiserBase& os) const { os.appendAttribute("base", int64_t(1)); }
  virtual void appendOutlineAttributes(OpSerialiserBase& os) const { os.appendAttribute("base", int64_t(1)); }
  virtual float getSubgraphValue() const = 0;
  virtual view::Regions aliases(InIndex in, OutIndex) const = 0;
  virtual view::Regions modifies(InIndex in) const = 0;

  const TensorInfo& inInfo(InIndex at) const { return inputs.at(at); }
  const TensorInfo& outInfo(OutIndex at) const { return outputs.at(at); }
  TensorInfo& outInfo(OutIndex at) { return outputs[at]; }
  int64_t inRank(InIndex at) const { return inInfo(at).rank(); }

  OperatorIdentifier opid;
  Settings settings;
  std::map<InIndex, TensorInfo> inputs;
  std::map<OutIndex, TensorInfo> outputs;

 protected:
  static float getHighSubgraphValue() { return 1000.0f; }
};

}  // namespace popart
