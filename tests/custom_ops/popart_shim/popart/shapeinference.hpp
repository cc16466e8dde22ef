// How PopART's Builder learns of shapes before there is an Op.
#pragma once

#include "opmanager.hpp"

namespace popart {

class ShapeInferenceContext {
 public:
  ShapeInferenceContext(const std::map<int, TensorInfo>& inputs, const Attributes& attributes)
      : inputs_(inputs), attributes_(attributes) {}
  const TensorInfo& inInfo(int at) const { return inputs_.at(at); }
  TensorInfo& outInfo(int at) { return outputs[at]; }
  template <typename T>
  T getAttribute(const std::string& name, const T& otherwise) const {
    return attributes_.getAttribute<T>(name, otherwise);
  }
  std::map<int, TensorInfo> outputs;

 private:
  std::map<int, TensorInfo> inputs_;
  Attributes attributes_;
};

using ShapeFunction = std::function<void(ShapeInferenceContext&)>;
std::map<OperatorIdentifier, ShapeFunction>& registered_shapes();  // simulator.cpp

class RegisterShapeInferenceFunction {
 public:
  RegisterShapeInferenceFunction(const OperatorIdentifier& id, ShapeFunction function) {
    registered_shapes()[id] = std::move(function);
  }
};

}  // namespace popart
