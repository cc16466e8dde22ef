// Every vertex of codelets.cpp by name, its edges and fields bound to what a graph connected to them.
#pragma once

#include <functional>
#include <set>

#include <poplar/Graph.hpp>

#include "../../../custom_ops/popart/codelets.cpp"
#include "../vertex_shim/tile.hpp"

namespace simulator {

using poplar::Place;
using poplar::Tensor;

template <typename T>
poplar::Type type_of();
template <>
inline poplar::Type type_of<float>() { return poplar::FLOAT; }
template <>
inline poplar::Type type_of<poplar::half>() { return poplar::HALF; }
template <>
inline poplar::Type type_of<int>() { return poplar::INT; }
template <>
inline poplar::Type type_of<unsigned>() { return poplar::UNSIGNED_INT; }
template <>
inline poplar::Type type_of<bool>() { return poplar::BOOL; }

// Gives one vertex its edges, in buffers of its own, and its fields; afterwards copies what was written back.
class Binder {
 public:
  explicit Binder(const poplar::VertexRecord& record) : record_(record) {}

  template <typename T, poplar::VectorLayout L, unsigned A>
  Binder& edge(const char* name, poplar::Input<poplar::Vector<T, L, A>>& e) {
    local<T>(name, false)->connect(e);
    return *this;
  }
  template <typename T, poplar::VectorLayout L, unsigned A>
  Binder& edge(const char* name, poplar::Output<poplar::Vector<T, L, A>>& e) {
    const auto buffer = local<T>(name, true);
    words_.push_back(harness::Words::of_output(*buffer));
    buffer->connect(e);
    return *this;
  }
  template <typename T, poplar::VectorLayout L, unsigned A>
  Binder& edge(const char* name, poplar::InOut<poplar::Vector<T, L, A>>& e) {
    const auto buffer = local<T>(name, true);
    words_.push_back(harness::Words::of_in_out(*buffer));
    buffer->connect(e);
    return *this;
  }
  Binder& edge(const char* name, poplar::Output<bool>& e) {
    e.connect(local<bool>(name, true)->data());
    return *this;
  }

  template <typename T>
  Binder& field(const char* name, T& value) {
    const auto found = record_.fields.find(name);
    if (found == record_.fields.end()) fail(name, "has no value");
    if (found->second.first != type_of<T>()) fail(name, "has a value of another type");
    std::memcpy(&value, found->second.second.data(), sizeof value);
    bound_.insert(name);
    return *this;
  }

  template <typename V>
  void run(V& vertex) {
    for (const auto& entry : record_.edges)
      if (bound_.count(entry.first) == 0) fail(entry.first, "is no edge of it");
    for (const auto& entry : record_.fields)
      if (bound_.count(entry.first) == 0) fail(entry.first, "is no field of it");
    compute(vertex);
    for (const auto& finish : finish_) finish();
  }

 private:
  template <typename V>
  auto compute(V& vertex) -> decltype(vertex.compute(0u), void()) {
    harness::run_workers(vertex, words_);
  }
  template <typename V>
  auto compute(V& vertex) -> decltype(vertex.compute(), void()) {
    vertex.compute();
  }

  template <typename T>
  std::shared_ptr<harness::Local<T>> local(const char* name, bool is_written) {
    const auto found = record_.edges.find(name);
    if (found == record_.edges.end()) fail(name, "is not connected");
    const Tensor& tensor = found->second;
    if (tensor.elementType() != type_of<T>()) fail(name, "is connected to another type");
    bound_.insert(name);
    auto buffer = std::make_shared<harness::Local<T>>(static_cast<long>(tensor.numElements()));
    for (std::size_t i = 0; i < tensor.numElements(); ++i)
      std::memcpy(static_cast<void*>(buffer->data() + i), tensor.places()[i].data(), sizeof(T));
    finish_.push_back([buffer, tensor, is_written]() {
      for (std::size_t i = 0; is_written && i < tensor.numElements(); ++i)
        std::memcpy(tensor.places()[i].data(), static_cast<const void*>(buffer->data() + i), sizeof(T));
    });
    return buffer;
  }

  [[noreturn]] void fail(const std::string& name, const char* what) const {
    throw std::runtime_error(record_.name + "." + name + " " + what);
  }

  const poplar::VertexRecord& record_;
  std::set<std::string> bound_;
  std::vector<harness::Words> words_;
  std::vector<std::function<void()>> finish_;
};

template <typename S, typename B>
void bind(Binder& b, popdet::NmsKeys<S, B>& v) {
  b.edge("scores", v.scores).edge("boxes", v.boxes).edge("keys", v.keys).field("scoreThreshold", v.scoreThreshold);
}
inline void bind(Binder& b, popdet::NmsRank& v) {
  b.edge("keys", v.keys).edge("chunk", v.chunk).edge("ranks", v.ranks).field("scoreThreshold", v.scoreThreshold);
  b.field("firstRow", v.firstRow).field("chunkBegin", v.chunkBegin);
}
template <typename T>
void bind(Binder& b, popdet::NmsPlace<T>& v) {
  b.edge("ranks", v.ranks).edge("boxes", v.boxes).edge("order", v.order).edge("sorted", v.sorted);
  b.field("firstSlot", v.firstSlot).field("chunkBegin", v.chunkBegin);
}
template <typename T>
void bind(Binder& b, popdet::NmsOverlap<T>& v) {
  b.edge("chunk", v.chunk).edge("sorted", v.sorted).edge("bits", v.bits).edge("diagonal", v.diagonal);
  b.field("iouThreshold", v.iouThreshold).field("firstSlot", v.firstSlot).field("chunkBegin", v.chunkBegin);
}
inline void bind(Binder& b, popdet::NmsFlags& v) { b.edge("order", v.order).edge("flags", v.flags); }
inline void bind(Binder& b, popdet::NmsBegin& v) {
  b.edge("flags", v.flags).edge("state", v.state).edge("keep", v.keep);
  b.field("columns", v.columns).field("flagWords", v.flagWords).field("slots", v.slots);
}
inline void bind(Binder& b, popdet::NmsResolve& v) {
  b.edge("flags", v.flags).edge("diagonal", v.diagonal).edge("state", v.state).edge("keep", v.keep);
  b.edge("mask", v.mask).edge("more", v.more).field("columns", v.columns).field("flagWords", v.flagWords);
}
inline void bind(Binder& b, popdet::NmsSuppress& v) {
  b.edge("bits", v.bits).edge("mask", v.mask).edge("flags", v.flags).field("columns", v.columns);
}
template <typename T>
void bind(Binder& b, popdet::NmsEmit<T>& v) {
  b.edge("slots", v.slots).edge("order", v.order).edge("sorted", v.sorted).edge("rows", v.rows).edge("boxes", v.boxes);
  b.field("chunkBegin", v.chunkBegin);
}
template <typename V>
void bind_roi_align(Binder& b, V& v) {
  b.edge("rois", v.rois).edge("scratch", v.scratch).field("scale", v.scale).field("columns", v.columns);
  b.field("channels", v.channels).field("height", v.height).field("width", v.width).field("ratio", v.ratio);
  b.field("outHeight", v.outHeight).field("outWidth", v.outWidth);
}
template <typename T, typename R>
void bind(Binder& b, popdet::RoiAlignForward<T, R>& v) {
  bind_roi_align(b.edge("features", v.features).edge("aligned", v.aligned), v);
}
template <typename T, typename R>
void bind(Binder& b, popdet::RoiAlignBackward<T, R>& v) {
  bind_roi_align(b.edge("grad", v.grad).edge("sums", v.sums), v);
}
template <typename T>
void bind(Binder& b, popdet::RoiAlignSum<T>& v) {
  b.edge("sums", v.sums).edge("grad", v.grad);
}

using Runner = std::function<void(const poplar::VertexRecord&)>;

template <typename V>
Runner runner() {
  return [](const poplar::VertexRecord& record) {
    V vertex;
    Binder binder(record);
    bind(binder, vertex);
    binder.run(vertex);
  };
}

// Adds V<T> for half and float, or V<T, U> for all four pairs.
template <template <typename> class V>
void add_types(std::map<std::string, Runner>& table, const std::string& name) {
  table[name + "<float>"] = runner<V<float>>();
  table[name + "<half>"] = runner<V<poplar::half>>();
}
template <template <typename, typename> class V>
void add_pairs(std::map<std::string, Runner>& table, const std::string& name) {
  table[name + "<float,float>"] = runner<V<float, float>>();
  table[name + "<float,half>"] = runner<V<float, poplar::half>>();
  table[name + "<half,float>"] = runner<V<poplar::half, float>>();
  table[name + "<half,half>"] = runner<V<poplar::half, poplar::half>>();
}

inline std::map<std::string, Runner> all_vertices() {
  std::map<std::string, Runner> table;
  add_pairs<popdet::NmsKeys>(table, "popdet::NmsKeys");
  table["popdet::NmsRank"] = runner<popdet::NmsRank>();
  add_types<popdet::NmsPlace>(table, "popdet::NmsPlace");
  add_types<popdet::NmsOverlap>(table, "popdet::NmsOverlap");
  table["popdet::NmsFlags"] = runner<popdet::NmsFlags>();
  table["popdet::NmsBegin"] = runner<popdet::NmsBegin>();
  table["popdet::NmsResolve"] = runner<popdet::NmsResolve>();
  table["popdet::NmsSuppress"] = runner<popdet::NmsSuppress>();
  add_types<popdet::NmsEmit>(table, "popdet::NmsEmit");
  add_pairs<popdet::RoiAlignForward>(table, "popdet::RoiAlignForward");
  add_pairs<popdet::RoiAlignBackward>(table, "popdet::RoiAlignBackward");
  add_types<popdet::RoiAlignSum>(table, "popdet::RoiAlignSum");
  return table;
}

}  // namespace simulator
