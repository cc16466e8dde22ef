// What an Opx grows into.
#pragma once

#include <map>

#include <poplar/Graph.hpp>
#include <popart/tensorinfo.hpp>

namespace popart {
namespace popx {

// The graph that programs are grown into, and the tensors of one op.
struct Devicex {
  explicit Devicex(const poplar::Target& target) : graph(target) {}
  poplar::Graph graph;
  std::map<int, poplar::Tensor> inputs, outputs;
};

inline poplar::Type popType(const TensorInfo& info) {
  return info.dataType() == DataType::FLOAT ? poplar::FLOAT
                                            : info.dataType() == DataType::FLOAT16 ? poplar::HALF : poplar::INT;
}

}  // namespace popx
}  // namespace popart
