// Poplar's graph: variables, vertices, what they are connected to and where they lie.
#pragma once

#include <cstring>
#include <map>
#include <set>
#include <string>

#include "Target.hpp"
#include "Tensor.hpp"

namespace poplar {

class DebugNameAndId {
 public:
  DebugNameAndId(std::string = "") {}
};

class DebugContext {
 public:
  DebugContext() = default;
  DebugContext(const char*) {}
  DebugContext(const DebugNameAndId&, std::string = "") {}
};

enum class VariableMappingMethod { NONE, LINEAR };

// What the graph knows of one vertex: its edges, its fields as bytes, its tile and its estimate.
struct VertexRecord {
  std::string name;
  std::map<std::string, Tensor> edges;
  std::map<std::string, std::pair<Type, std::vector<unsigned char>>> fields;
  int tile = -1;
  std::uint64_t cycles = 0;
};

struct FieldRef {
  VertexRecord* vertex;
  std::string name;
};

class VertexRef {
 public:
  explicit VertexRef(VertexRecord* record) : record_(record) {}
  FieldRef operator[](const char* name) const { return {record_, name}; }
  VertexRecord* record() const { return record_; }

 private:
  VertexRecord* record_;
};

using Vertices = std::vector<std::unique_ptr<VertexRecord>>;

class ComputeSet {
 public:
  explicit ComputeSet(std::shared_ptr<Vertices> vertices) : vertices_(std::move(vertices)) {}
  const std::shared_ptr<Vertices>& vertices() const { return vertices_; }

 private:
  std::shared_ptr<Vertices> vertices_;
};

inline Type type_of(float) { return FLOAT; }
inline Type type_of(int) { return INT; }
inline Type type_of(unsigned) { return UNSIGNED_INT; }

class Graph {
 public:
  explicit Graph(const Target& target) : target_(target) {}

  const Target& getTarget() const { return target_; }
  bool addCodelets(const std::string& file) { return codelets_.insert(file).second; }  // false: it was there already
  const std::set<std::string>& codelets() const { return codelets_; }

  Tensor addVariable(const Type& type, const Sizes& shape, const DebugContext& = {}) {
    const std::size_t count = Tensor::count(shape);
    variables_.emplace_back(new Variable(type, count));
    std::vector<Place> places;
    for (std::size_t i = 0; i < count; ++i) places.push_back({variables_.back().get(), i});
    return Tensor(type, shape, places);
  }

  Tensor addVariable(const Type& type, const Sizes& shape, VariableMappingMethod, const DebugContext& = {}) {
    const Tensor result = addVariable(type, shape);
    for (std::size_t i = 0; i < result.numElements(); ++i)
      result.places()[i].variable->tiles[i] = static_cast<int>(i % target_.getNumTiles());
    return result;
  }

  // A constant of 0 or -1, as a number of the type: the only ones in use, and both are easy in half.
  template <typename T>
  Tensor addConstant(const Type& type, const Sizes& shape, T value, const DebugContext& = {}) {
    if (type != type_of(value) && value != T(0)) throw std::runtime_error("this constant is not known here");
    const Tensor result = addVariable(type, shape);
    for (const Place& place : result.places()) {
      std::memset(place.data(), 0, type.bytes());
      if (type == type_of(value)) std::memcpy(place.data(), &value, sizeof value);
    }
    return result;
  }

  Tensor clone(const Tensor& tensor, const DebugContext& = {}) {
    const Tensor result = addVariable(tensor.elementType(), tensor.shape());
    for (std::size_t i = 0; i < tensor.numElements(); ++i)
      result.places()[i].variable->tiles[i] = tensor.places()[i].variable->tiles[tensor.places()[i].at];
    return result;
  }

  void setTileMapping(const Tensor& tensor, unsigned tile) {
    check_tile(tile);
    for (const Place& place : tensor.places()) place.variable->tiles[place.at] = static_cast<int>(tile);
  }
  void setTileMapping(const VertexRef& vertex, unsigned tile) {
    check_tile(tile);
    vertex.record()->tile = static_cast<int>(tile);
  }

  ComputeSet addComputeSet(const DebugContext& = {}) {
    sets_.push_back(std::make_shared<Vertices>());
    return ComputeSet(sets_.back());
  }

  VertexRef addVertex(const ComputeSet& set, const std::string& name) {
    set.vertices()->emplace_back(new VertexRecord);
    set.vertices()->back()->name = name;
    return VertexRef(set.vertices()->back().get());
  }

  void connect(const FieldRef& field, const Tensor& tensor) {
    if (!field.vertex->edges.emplace(field.name, tensor).second)
      throw std::runtime_error(field.vertex->name + "." + field.name + " is connected twice");
  }

  template <typename T>
  void setInitialValue(const FieldRef& field, T value) {
    std::vector<unsigned char> bytes(sizeof value);
    std::memcpy(bytes.data(), &value, sizeof value);
    field.vertex->fields.emplace(field.name, std::make_pair(type_of(value), bytes));
  }

  void setPerfEstimate(const VertexRef& vertex, std::uint64_t cycles, std::uint64_t = 0) {
    vertex.record()->cycles = cycles;
  }

  // The most bytes that one compute set touches on one tile: what its vertices there are connected to, wherever it lies,
  // and what lies there and vertices elsewhere are connected to. `ignored` variables count only where they are sent.
  std::size_t busiest_tile(const std::set<const Variable*>& ignored) const {
    std::size_t most = 0;
    for (const auto& set : sets_) {
      std::map<int, std::set<Place>> touched;
      for (const auto& vertex : *set)
        for (const auto& edge : vertex->edges)
          for (const Place& place : edge.second.places()) {
            touched[vertex->tile].insert(place);
            if (ignored.count(place.variable) == 0) touched[place.variable->tiles[place.at]].insert(place);
          }
      for (const auto& tile : touched) {
        std::size_t bytes = 0;
        for (const Place& place : tile.second) bytes += place.variable->type.bytes();
        most = bytes > most ? bytes : most;
      }
    }
    return most;
  }

  // Throws where an element of a variable has no tile.
  void check_mapping() const {
    for (const auto& variable : variables_)
      for (int tile : variable->tiles)
        if (tile < 0) throw std::runtime_error("an element of a variable lies on no tile");
  }

  std::size_t count_vertices(const std::string& name) const {
    std::size_t count = 0;
    for (const auto& set : sets_)
      for (const auto& vertex : *set) count += vertex->name == name;
    return count;
  }

 private:
  void check_tile(unsigned tile) const {
    if (tile >= target_.getNumTiles()) throw std::runtime_error("there is no such tile");
  }

  Target target_;
  std::set<std::string> codelets_;
  std::vector<std::shared_ptr<Vertices>> sets_;
  std::vector<std::unique_ptr<Variable>> variables_;
};

}  // namespace poplar
