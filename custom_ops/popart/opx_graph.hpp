// What both Opx classes need of Poplar: finding the codelets, naming a vertex, mapping tensors by a plan.
#pragma once

#include <string>

#include <poplar/Graph.hpp>
#include <poplar/Program.hpp>
#include <poplar/Target.hpp>
#include <poplar/Tensor.hpp>
#include <poplar/Type.hpp>

#include "tile_plan.hpp"

namespace popdet {

// Adds the codelets to the graph unless it has them. They lie beside this shared library, where build.py put them.
void add_codelets(poplar::Graph& graph);

// "popdet::Name<half>" and the like.
std::string vertex_name(const std::string& name, const poplar::Type& type);
std::string vertex_name(const std::string& name, const poplar::Type& first, const poplar::Type& second);

// 2 or 4.
long bytes_of(const poplar::Type& type);

// What a plan may use of a tile: default_budget on an IPU, without limit on the CPU. Throws popart::error if a tile has
// not the six workers that plans count on.
long tile_budget(const poplar::Target& target);

// A variable [rows, width] whose rows lie on tiles 0, 1, ... as `each` of them at a time.
poplar::Tensor add_rows(poplar::Graph& graph, const poplar::Type& type, long rows, long width, long each,
                        const poplar::DebugContext& debug);

// Connects an edge to all elements of a tensor.
void connect(poplar::Graph& graph, const poplar::VertexRef& vertex, const char* field, const poplar::Tensor& tensor);

// Sets `target` to one value.
void fill(poplar::Graph& graph, poplar::program::Sequence& program, const poplar::Tensor& target, int value,
          const poplar::DebugContext& debug);

}  // namespace popdet
