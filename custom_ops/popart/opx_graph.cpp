// What both Opx classes need of Poplar.
#include "opx_graph.hpp"

#include <dlfcn.h>

#include <popart/error.hpp>

namespace popdet {

namespace {

// The folder of the shared library that holds this function.
std::string library_folder() {
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(&add_codelets), &info) == 0 || info.dli_fname == nullptr)
    throw popart::error("popdet custom ops: the shared library cannot find its own path");
  const std::string path = info.dli_fname;
  const auto slash = path.rfind('/');
  return slash == std::string::npos ? "." : path.substr(0, slash);
}

std::string type_name(const poplar::Type& type) {
  if (type == poplar::HALF) return "half";
  if (type == poplar::FLOAT) return "float";
  throw popart::error("popdet custom ops: tensors must be half or float");
}

}  // namespace

void add_codelets(poplar::Graph& graph) {
  graph.addCodelets(library_folder() + "/popdet_codelets.gp");  // returns false where the graph has them already
}

std::string vertex_name(const std::string& name, const poplar::Type& type) {
  return "popdet::" + name + "<" + type_name(type) + ">";
}

std::string vertex_name(const std::string& name, const poplar::Type& first, const poplar::Type& second) {
  return "popdet::" + name + "<" + type_name(first) + "," + type_name(second) + ">";
}

long bytes_of(const poplar::Type& type) { return type == poplar::HALF ? 2 : 4; }

long tile_budget(const poplar::Target& target) {
  if (target.getTargetType() == poplar::TargetType::CPU) return 1l << 50;
  if (static_cast<long>(target.getNumWorkerContexts()) != kWorkers)
    throw popart::error("popdet custom ops: plans count on six workers a tile, this target has " +
                        std::to_string(target.getNumWorkerContexts()));
  return default_budget(target.getBytesPerTile());
}

poplar::Tensor add_rows(poplar::Graph& graph, const poplar::Type& type, long rows, long width, long each,
                        const poplar::DebugContext& debug) {
  const poplar::Tensor result =
      graph.addVariable(type, {static_cast<std::size_t>(rows), static_cast<std::size_t>(width)}, debug);
  for (long tile = 0; tile * each < rows; ++tile) {
    const Range own = part_of(rows, each, tile);
    graph.setTileMapping(result.slice(own.first, own.first + own.count), tile);
  }
  return result;
}

void connect(poplar::Graph& graph, const poplar::VertexRef& vertex, const char* field, const poplar::Tensor& tensor) {
  graph.connect(vertex[field], tensor.flatten());
}

void fill(poplar::Graph& graph, poplar::program::Sequence& program, const poplar::Tensor& target, int value,
          const poplar::DebugContext& debug) {
  if (target.numElements() == 0) return;
  const poplar::Type type = target.elementType();
  const poplar::Tensor constant = type == poplar::INT ? graph.addConstant(type, {1}, value, debug)
                                                      : graph.addConstant(type, {1}, static_cast<float>(value), debug);
  graph.setTileMapping(constant, 0);
  program.add(poplar::program::Copy(constant.broadcast(target.numElements(), 0), target.flatten(), false, debug));
}

}  // namespace popdet
