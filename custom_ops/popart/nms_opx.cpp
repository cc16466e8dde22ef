// ai.graphcore.nms 1 as a Poplar program: the compute sets of ../kernels/nms_blocks.hpp, split by tile_plan.hpp.
#include <string>
#include <vector>

#include <poplar/Graph.hpp>
#include <poplar/Program.hpp>
#include <popart/error.hpp>
#include <popart/popx/devicex.hpp>
#include <popart/popx/opx.hpp>
#include <popart/popx/opxmanager.hpp>

#include "nms_op.hpp"
#include "opx_graph.hpp"

namespace popdet {

namespace {

using poplar::Tensor;
using poplar::program::Copy;
using poplar::program::Execute;
using poplar::program::Sequence;

// The program of one image. The order of the methods is the order of the compute sets.
class NmsProgram {
 public:
  NmsProgram(poplar::Graph& graph, Sequence& program, const NmsPlan& plan, const NmsAttributes& attributes,
             const poplar::Type& type, const poplar::DebugNameAndId& debug)
      : graph_(graph), program_(program), plan_(plan), attributes_(attributes), type_(type), debug_(debug) {
    const auto rows = [&](const poplar::Type& of, long width, const char* name) {
      return add_rows(graph, of, plan.shape.rows, width, plan.columns, {debug, name});
    };
    keys_ = rows(poplar::FLOAT, 1, "keys");
    ranks_ = rows(poplar::INT, 1, "ranks");
    order_ = rows(poplar::INT, 1, "order");
    sorted_ = rows(type, 4, "sorted");
    bits_ = rows(poplar::UNSIGNED_INT, plan.words, "bits");
    diagonal_ = rows(poplar::UNSIGNED_INT, 2, "diagonal");
    flags_ = add_rows(graph, poplar::UNSIGNED_INT, plan.column_tiles, plan.flag_words, 1, {debug, "flags"});
    local_diagonal_ = on_resolver(poplar::UNSIGNED_INT, 2 * plan.shape.rows, "local_diagonal");
    state_ = on_resolver(poplar::INT, 3, "state");
    slots_ = on_resolver(poplar::INT, plan.shape.keep, "slots");
    mask_ = on_resolver(poplar::UNSIGNED_INT, 3, "mask");
    more_ = graph.addVariable(poplar::BOOL, {}, {debug, "more"});
    graph.setTileMapping(more_, plan.resolver);
  }

  // scores [N], boxes [N, 4] -> keep [K], kept [K, 4], both mapped by the plan's output rows.
  void run(const Tensor& scores, const Tensor& boxes, const Tensor& keep, const Tensor& kept) {
    // Vertices write these in parts; what was there before is of no use.
    for (const Tensor& tensor : {ranks_, order_, sorted_, bits_, diagonal_, keep, kept})
      program_.add(poplar::program::WriteUndef(tensor, debug_));
    find_keys(scores, boxes);
    for_each_chunk([&](Range chunk) { rank(chunk); });
    for_each_chunk([&](Range chunk) { place(chunk, boxes); });
    for_each_chunk([&](Range chunk) { overlap(chunk); });
    set_flags();
    program_.add(Copy(diagonal_.flatten(), local_diagonal_, false, debug_));
    begin();
    program_.add(poplar::program::RepeatWhileTrue(resolve(), more_, suppress(), debug_));
    for_each_chunk([&](Range chunk) { emit(chunk, keep, kept); });
  }

 private:
  Tensor on_resolver(const poplar::Type& type, long size, const char* name) {
    const Tensor result = graph_.addVariable(type, {static_cast<std::size_t>(size)}, {debug_, name});
    graph_.setTileMapping(result, plan_.resolver);
    return result;
  }

  template <typename Use>
  void for_each_chunk(Use use) const {
    for (long chunk = 0; chunk < plan_.chunks; ++chunk) use(part_of(plan_.shape.rows, plan_.chunk, chunk));
  }

  // A compute set with one vertex on each tile that has slots; use(vertex, part) connects part(tensor), the tile's rows.
  template <typename Use>
  Execute on_tiles(const char* name, const std::string& vertex, long cycles, Use use) {
    const poplar::ComputeSet set = graph_.addComputeSet({debug_, name});
    for (long tile = 0; tile < plan_.column_tiles; ++tile)
      use(add_vertex(set, vertex, tile, cycles), part_of(plan_.shape.rows, plan_.columns, tile));
    return Execute(set, debug_);
  }

  poplar::VertexRef add_vertex(const poplar::ComputeSet& set, const std::string& name, long tile, long cycles) {
    const poplar::VertexRef vertex = graph_.addVertex(set, name);
    graph_.setTileMapping(vertex, tile);
    graph_.setPerfEstimate(vertex, cycles);
    return vertex;
  }

  void connect_part(const poplar::VertexRef& vertex, const char* field, const Tensor& tensor, Range part) {
    connect(graph_, vertex, field, tensor.slice(part.first, part.first + part.count));
  }

  void set(const poplar::VertexRef& vertex, const char* field, long value) {
    graph_.setInitialValue(vertex[field], static_cast<int>(value));
  }

  void find_keys(const Tensor& scores, const Tensor& boxes) {
    const std::string name = vertex_name("NmsKeys", scores.elementType(), boxes.elementType());
    program_.add(on_tiles("keys", name, nms_keys_cycles(plan_.columns), [&](const poplar::VertexRef& v, Range own) {
      connect_part(v, "scores", scores, own);
      connect_part(v, "boxes", boxes, own);
      connect_part(v, "keys", keys_, own);
      graph_.setInitialValue(v["scoreThreshold"], attributes_.scoreThreshold);
    }));
  }

  void rank(Range chunk) {
    const long cycles = nms_rank_cycles(plan_.columns, chunk.count);
    program_.add(on_tiles("rank", "popdet::NmsRank", cycles, [&](const poplar::VertexRef& v, Range own) {
      connect_part(v, "keys", keys_, own);
      connect_part(v, "chunk", keys_, chunk);
      connect_part(v, "ranks", ranks_, own);
      graph_.setInitialValue(v["scoreThreshold"], attributes_.scoreThreshold);
      set(v, "firstRow", own.first);
      set(v, "chunkBegin", chunk.first);
    }));
  }

  void place(Range chunk, const Tensor& boxes) {
    const long cycles = nms_place_cycles(plan_.columns, chunk.count);
    program_.add(on_tiles("place", vertex_name("NmsPlace", type_), cycles, [&](const poplar::VertexRef& v, Range own) {
      connect_part(v, "ranks", ranks_, chunk);
      connect_part(v, "boxes", boxes, chunk);
      connect_part(v, "order", order_, own);
      connect_part(v, "sorted", sorted_, own);
      set(v, "firstSlot", own.first);
      set(v, "chunkBegin", chunk.first);
    }));
  }

  void overlap(Range chunk) {
    const long cycles = nms_overlap_cycles(plan_.columns, chunk.count);
    program_.add(on_tiles("overlap", vertex_name("NmsOverlap", type_), cycles, [&](const poplar::VertexRef& v, Range own) {
      connect_part(v, "chunk", sorted_, chunk);
      connect_part(v, "sorted", sorted_, own);
      connect_part(v, "bits", bits_, own);
      connect_part(v, "diagonal", diagonal_, own);
      graph_.setInitialValue(v["iouThreshold"], attributes_.threshold);
      set(v, "firstSlot", own.first);
      set(v, "chunkBegin", chunk.first);
    }));
  }

  // Cycles of a vertex that is not a MultiVertex are those of its one worker.
  void set_flags() {
    const long cycles = nms_flags_cycles(plan_.columns) / kWorkers;
    program_.add(on_tiles("flags", "popdet::NmsFlags", cycles, [&](const poplar::VertexRef& v, Range own) {
      connect_part(v, "order", order_, own);
      connect(graph_, v, "flags", flags_[own.first / plan_.columns]);
    }));
  }

  void begin() {
    const poplar::ComputeSet compute = graph_.addComputeSet({debug_, "begin"});
    const auto v = add_vertex(compute, "popdet::NmsBegin", plan_.resolver, nms_begin_cycles(plan_.shape.keep) / kWorkers);
    connect(graph_, v, "flags", flags_);
    connect(graph_, v, "state", state_);
    connect(graph_, v, "keep", slots_);
    set(v, "columns", plan_.columns);
    set(v, "flagWords", plan_.flag_words);
    set(v, "slots", plan_.shape.rows);
    program_.add(Execute(compute, debug_));
  }

  Sequence resolve() {
    const poplar::ComputeSet compute = graph_.addComputeSet({debug_, "resolve"});
    const auto v = add_vertex(compute, "popdet::NmsResolve", plan_.resolver, nms_resolve_cycles() / kWorkers);
    connect(graph_, v, "flags", flags_);
    connect(graph_, v, "diagonal", local_diagonal_);
    connect(graph_, v, "state", state_);
    connect(graph_, v, "keep", slots_);
    connect(graph_, v, "mask", mask_);
    graph_.connect(v["more"], more_);
    set(v, "columns", plan_.columns);
    set(v, "flagWords", plan_.flag_words);
    Sequence result({}, {debug_, "resolve"});
    result.add(Execute(compute, debug_));
    return result;
  }

  Sequence suppress() {
    Sequence result({}, {debug_, "suppress"});
    const long cycles = nms_suppress_cycles(plan_.columns) / kWorkers;
    result.add(on_tiles("suppress", "popdet::NmsSuppress", cycles, [&](const poplar::VertexRef& v, Range own) {
      connect_part(v, "bits", bits_, own);
      connect(graph_, v, "mask", mask_);
      connect(graph_, v, "flags", flags_[own.first / plan_.columns]);
      set(v, "columns", own.count);
    }));
    return result;
  }

  void emit(Range chunk, const Tensor& keep, const Tensor& kept) {
    const poplar::ComputeSet compute = graph_.addComputeSet({debug_, "emit"});
    for (long tile = 0; tile < plan_.output_tiles; ++tile) {
      const Range own = part_of(plan_.shape.keep, plan_.output_rows, tile);
      const auto v = add_vertex(compute, vertex_name("NmsEmit", type_), tile, nms_emit_cycles(own.count));
      connect_part(v, "slots", slots_, own);
      connect_part(v, "order", order_, chunk);
      connect_part(v, "sorted", sorted_, chunk);
      connect_part(v, "rows", keep, own);
      connect_part(v, "boxes", kept, own);
      set(v, "chunkBegin", chunk.first);
    }
    program_.add(Execute(compute, debug_));
  }

  poplar::Graph& graph_;
  Sequence& program_;
  NmsPlan plan_;
  NmsAttributes attributes_;
  poplar::Type type_;
  poplar::DebugNameAndId debug_;
  Tensor keys_, ranks_, order_, sorted_, bits_, diagonal_, flags_, local_diagonal_, state_, slots_, mask_, more_;
};

class NmsOpx : public popart::popx::Opx {
 public:
  NmsOpx(popart::Op* op, popart::popx::Devicex* devicex) : popart::popx::Opx(op, devicex) {
    verifyOp<NmsOp>(op, NmsId);
  }

  void grow(Sequence& program) const final {
    const Tensor scores = getInTensor(NmsOp::scoresInIndex()), boxes = getInTensor(NmsOp::boxesInIndex());
    const long batch = scores.dim(0), rows = scores.dim(1), keep_rows = getOp<NmsOp>().attributes().numDetections;
    const long tiles = graph().getTarget().getNumTiles();
    const long each = ceil_div(keep_rows, tiles);
    std::vector<Tensor> keeps, kepts;
    for (long image = 0; image < batch; ++image) {
      keeps.push_back(add_rows(graph(), poplar::INT, keep_rows, 1, each, debugContext("keep")));
      kepts.push_back(add_rows(graph(), boxes.elementType(), keep_rows, 4, each, debugContext("boxes")));
    }
    const Tensor keep = as_batch(keeps), kept = as_batch(kepts);
    if (rows == 0) {
      fill(graph(), program, keep, -1, debugContext("none"));
      fill(graph(), program, kept, 0, debugContext("none"));
    } else {
      add_codelets(graph());
      const NmsPlan plan = make_plan(scores, boxes, tiles);
      NmsProgram images(graph(), program, plan, getOp<NmsOp>().attributes(), boxes.elementType(),
                        getDebugNameAndId("nms"));
      for (long image = 0; image < batch; ++image)
        images.run(scores[image], boxes[image], keeps[image], kepts[image]);
    }
    const Tensor copy = graph().clone(scores, debugContext("scores"));
    program.add(Copy(scores, copy, false, debugContext("scores")));
    setOutTensor(NmsOp::scoresOutIndex(), copy.reshape({scores.dim(0), scores.dim(1), 1}));
    setOutTensor(NmsOp::boxesOutIndex(), kept);
    setOutTensor(NmsOp::keepOutIndex(), keep.reshape({scores.dim(0), keep.dim(1)}));
  }

 private:
  static Tensor as_batch(const std::vector<Tensor>& images) {
    std::vector<Tensor> expanded;
    for (const Tensor& image : images) expanded.push_back(image.expand({0}));
    return poplar::concat(expanded, 0);
  }

  NmsPlan make_plan(const Tensor& scores, const Tensor& boxes, long tiles) const {
    const NmsShape shape = {static_cast<long>(scores.dim(1)), static_cast<long>(getOp<NmsOp>().attributes().numDetections),
                            bytes_of(scores.elementType()), bytes_of(boxes.elementType())};
    const NmsPlan plan = plan_nms(shape, tiles, tile_budget(graph().getTarget()));
    if (!plan.fits)
      throw popart::error("ai.graphcore.nms: " + std::to_string(shape.rows) + " rows need " + std::to_string(plan.bytes) +
                          " bytes on a tile; use fewer rows, a smaller numDetections, or half boxes");
    return plan;
  }
};

popart::popx::OpxCreator<NmsOpx> nms_opx_creator({NmsId});

}  // namespace

}  // namespace popdet
