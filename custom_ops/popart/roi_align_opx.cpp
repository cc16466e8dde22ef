// ai.graphcore.roiAlign 1 and its gradient as Poplar programs: one vertex for each cell of tile_plan.hpp.
#include <set>
#include <string>
#include <vector>

#include <poplar/Graph.hpp>
#include <poplar/Program.hpp>
#include <popart/error.hpp>
#include <popart/popx/devicex.hpp>
#include <popart/popx/opx.hpp>
#include <popart/popx/opxmanager.hpp>

#include "opx_graph.hpp"
#include "roi_align_op.hpp"

namespace popdet {

namespace {

using poplar::Tensor;
using poplar::program::Copy;
using poplar::program::Execute;
using poplar::program::Sequence;

std::size_t size(long value) { return static_cast<std::size_t>(value); }

// Tensors and vertices of one plan.
class CellGraph {
 public:
  CellGraph(poplar::Graph& graph, const RoiAlignPlan& plan, const RoiAlignAttributes& attributes)
      : graph_(graph), plan_(plan), attributes_(attributes) {}

  // The maps of one group of channels of one image, [H * W, channels], on the tile of the group's first cell.
  Tensor add_map(long image, long group, const poplar::Type& type, const poplar::DebugContext& debug) const {
    const Range channels = plan_.channels_of(group);
    const Tensor map = graph_.addVariable(type, {size(plan_.sizes.pixels()), size(channels.count)}, debug);
    graph_.setTileMapping(map, plan_.tile(plan_.cell(image, group, 0)));
    return map;
  }

  // The bins of all RoIs of one group of channels, [D, bins, channels], each cell's on its tile.
  Tensor add_bins(long image, long group, const poplar::Type& type, const poplar::DebugContext& debug) const {
    const RoiAlignSizes& s = plan_.sizes;
    const Tensor bins =
        graph_.addVariable(type, {size(s.rois), size(s.bins()), size(plan_.channels_of(group).count)}, debug);
    for (long r = 0; r < plan_.roi_groups; ++r) {
      const Range rois = plan_.rois_of(r);
      graph_.setTileMapping(bins.slice(rois.first, rois.first + rois.count), plan_.tile(plan_.cell(image, group, r)));
    }
    return bins;
  }

  // [H * W, channels] of every group and image as [B, C, H, W].
  Tensor as_features(const std::vector<std::vector<Tensor>>& maps) const {
    const RoiAlignSizes& s = plan_.sizes;
    std::vector<Tensor> images;
    for (const std::vector<Tensor>& groups : maps)
      images.push_back(poplar::concat(groups, 1).transpose().reshape({1, size(s.channels), size(s.height), size(s.width)}));
    return poplar::concat(images, 0);
  }

  // [D, bins, channels] of every group and image as [B, D, C, h, w].
  Tensor as_aligned(const std::vector<std::vector<Tensor>>& bins) const {
    const RoiAlignSizes& s = plan_.sizes;
    std::vector<Tensor> images;
    for (const std::vector<Tensor>& groups : bins)
      images.push_back(poplar::concat(groups, 2).dimShuffle({0, 2, 1}).reshape(
          {1, size(s.rois), size(s.channels), size(s.out_height), size(s.out_width)}));
    return poplar::concat(images, 0);
  }

  // A vertex of one cell with its RoIs, scratch memory and fields; the caller connects the other two edges.
  poplar::VertexRef add_vertex(const poplar::ComputeSet& set, const std::string& name, const Tensor& rois, long image,
                               long group, long roi_group) const {
    const long tile = plan_.tile(plan_.cell(image, group, roi_group));
    const Range channels = plan_.channels_of(group), own = plan_.rois_of(roi_group);
    const poplar::VertexRef vertex = graph_.addVertex(set, name);
    graph_.setTileMapping(vertex, tile);
    const Tensor scratch = graph_.addVariable(poplar::UNSIGNED_INT, {size(kWorkers * plan_.scratch / 4)});
    graph_.setTileMapping(scratch, tile);
    connect(graph_, vertex, "scratch", scratch);
    connect(graph_, vertex, "rois", rois[image].slice(own.first, own.first + own.count));
    set_fields(vertex, channels.count);
    const long items = own.count * plan_.sizes.bins(), ratio = plan_.sizes.ratio;
    graph_.setPerfEstimate(vertex, plan_.backward ? roi_align_backward_cycles(items, channels.count, ratio,
                                                                              plan_.sizes.pixels())
                                                  : roi_align_forward_cycles(items, channels.count, ratio));
    return vertex;
  }

 private:
  void set_fields(const poplar::VertexRef& vertex, long channels) const {
    const RoiAlignSizes& s = plan_.sizes;
    const std::pair<const char*, long> fields[] = {{"columns", s.roi_columns}, {"channels", channels},
                                                   {"height", s.height},       {"width", s.width},
                                                   {"outHeight", s.out_height}, {"outWidth", s.out_width},
                                                   {"ratio", s.ratio}};
    for (const auto& field : fields) graph_.setInitialValue(vertex[field.first], static_cast<unsigned>(field.second));
    graph_.setInitialValue(vertex["scale"], attributes_.spatialScale);
  }

  poplar::Graph& graph_;
  const RoiAlignPlan& plan_;
  const RoiAlignAttributes& attributes_;
};

// Throws popart::error where no split fits a tile.
RoiAlignPlan make_plan(const poplar::Target& target, const popart::TensorInfo& features, const popart::TensorInfo& rois,
                       const RoiAlignAttributes& a, bool backward) {
  const RoiAlignSizes sizes = {features.dim(0), features.dim(1), features.dim(2),  features.dim(3),
                               rois.dim(1),     rois.dim(2),     a.alignedHeight,  a.alignedWidth,
                               a.samplingRatio, features.dataType() == popart::DataType::FLOAT16 ? 2 : 4,
                               rois.dataType() == popart::DataType::FLOAT16 ? 2 : 4};
  const RoiAlignPlan plan = plan_roi_align(sizes, backward, target.getNumTiles(), tile_budget(target));
  if (!plan.fits)
    throw popart::error("ai.graphcore.roiAlign: " + std::to_string(sizes.height) + " x " + std::to_string(sizes.width) +
                        " pixels and " + std::to_string(sizes.rois) + " RoIs need " + std::to_string(plan.bytes) +
                        " bytes on a tile; use fewer RoIs, a smaller map or half precision");
  return plan;
}

class RoiAlignOpx : public popart::popx::Opx {
 public:
  RoiAlignOpx(popart::Op* op, popart::popx::Devicex* devicex) : popart::popx::Opx(op, devicex) {
    verifyOp<RoiAlignOp>(op, {RoiAlignId, RoiAlignOldId});
  }

  // Features that arrive from outside can lie as the cells want them.
  popart::popx::InputCreatorType getInputCreatorType(popart::InIndex index) const final {
    const bool ours = index == RoiAlignOp::featuresInIndex() && inInfo(RoiAlignOp::roisInIndex()).nelms() > 0;
    return ours ? popart::popx::InputCreatorType::CanCreate : popart::popx::Opx::getInputCreatorType(index);
  }

  std::set<popart::TensorId> mustExistBeforeCreate(popart::InIndex) const final { return {}; }

  Tensor createInput(popart::InIndex index, const poplar::DebugNameAndId& name) const final {
    if (index != RoiAlignOp::featuresInIndex()) throw popart::error("roiAlign creates the layout of features only");
    const RoiAlignPlan plan = make_own_plan();
    const CellGraph cells(graph(), plan, getOp<RoiAlignOp>().attributes());
    const poplar::Type type = popart::popx::popType(inInfo(index));
    std::vector<std::vector<Tensor>> maps(plan.sizes.batch);
    for (long image = 0; image < plan.sizes.batch; ++image)
      for (long c = 0; c < plan.channel_groups; ++c) maps[image].push_back(cells.add_map(image, c, type, name));
    return cells.as_features(maps);
  }

  void grow(Sequence& program) const final {
    const Tensor features = getInTensor(RoiAlignOp::featuresInIndex()), rois = getInTensor(RoiAlignOp::roisInIndex());
    if (rois.dim(1) == 0) {
      std::vector<std::size_t> shape;
      for (int64_t dim : outInfo(RoiAlignOp::alignedOutIndex()).shape()) shape.push_back(size(dim));
      setOutTensor(RoiAlignOp::alignedOutIndex(), graph().addVariable(features.elementType(), shape, debugContext("none")));
      return;
    }
    add_codelets(graph());
    const RoiAlignPlan plan = make_own_plan();
    const CellGraph cells(graph(), plan, getOp<RoiAlignOp>().attributes());
    const std::string name = vertex_name("RoiAlignForward", features.elementType(), rois.elementType());
    const poplar::ComputeSet set = graph().addComputeSet(debugContext("align"));
    std::vector<std::vector<Tensor>> bins(plan.sizes.batch);
    for (long image = 0; image < plan.sizes.batch; ++image) {
      for (long c = 0; c < plan.channel_groups; ++c) {
        // Arranged once, on one tile; from there it goes to all cells of the group as it is.
        const Tensor map = cells.add_map(image, c, features.elementType(), debugContext("map"));
        const Range channels = plan.channels_of(c);
        program.add(Copy(features[image].slice(channels.first, channels.first + channels.count).flatten(1, 3).transpose(),
                         map, false, debugContext("arrange")));
        bins[image].push_back(cells.add_bins(image, c, features.elementType(), debugContext("aligned")));
        for (long r = 0; r < plan.roi_groups; ++r) {
          const Range own = plan.rois_of(r);
          const poplar::VertexRef vertex = cells.add_vertex(set, name, rois, image, c, r);
          connect(graph(), vertex, "features", map);
          connect(graph(), vertex, "aligned", bins[image].back().slice(own.first, own.first + own.count));
        }
      }
    }
    program.add(Execute(set, debugContext("align")));
    setOutTensor(RoiAlignOp::alignedOutIndex(), cells.as_aligned(bins));
  }

 private:
  RoiAlignPlan make_own_plan() const {
    return make_plan(graph().getTarget(), inInfo(RoiAlignOp::featuresInIndex()), inInfo(RoiAlignOp::roisInIndex()),
                     getOp<RoiAlignOp>().attributes(), false);
  }
};

class RoiAlignGradOpx : public popart::popx::Opx {
 public:
  RoiAlignGradOpx(popart::Op* op, popart::popx::Devicex* devicex) : popart::popx::Opx(op, devicex) {
    verifyOp<RoiAlignGradOp>(op, RoiAlignGradId);
  }

  void grow(Sequence& program) const final {
    const Tensor grad = getInTensor(RoiAlignGradOp::gradInIndex()), rois = getInTensor(RoiAlignGradOp::roisInIndex());
    const popart::TensorInfo& features = outInfo(RoiAlignGradOp::featuresOutIndex());
    if (rois.dim(1) == 0) {
      std::vector<std::size_t> shape;
      for (int64_t dim : features.shape()) shape.push_back(size(dim));
      const Tensor zeros = graph().addVariable(grad.elementType(), shape, poplar::VariableMappingMethod::LINEAR,
                                               debugContext("zeros"));
      fill(graph(), program, zeros, 0, debugContext("zeros"));
      setOutTensor(RoiAlignGradOp::featuresOutIndex(), zeros);
      return;
    }
    add_codelets(graph());
    const RoiAlignPlan plan = make_plan(graph().getTarget(), features, inInfo(RoiAlignGradOp::roisInIndex()),
                                        getOp<RoiAlignGradOp>().attributes(), true);
    const CellGraph cells(graph(), plan, getOp<RoiAlignGradOp>().attributes());
    const poplar::ComputeSet scatter = graph().addComputeSet(debugContext("scatter"));
    const poplar::ComputeSet add = graph().addComputeSet(debugContext("add"));
    std::vector<std::vector<Tensor>> maps(plan.sizes.batch);
    for (long image = 0; image < plan.sizes.batch; ++image) {
      for (long c = 0; c < plan.channel_groups; ++c) {
        const Tensor rows = arrange(program, cells, plan, grad[image], image, c);
        const Tensor sums = add_scatter(cells, plan, scatter, rows, rois, image, c);
        maps[image].push_back(add_sum(plan, add, sums, grad.elementType(), image, c));
      }
    }
    program.add(Execute(scatter, debugContext("scatter")));
    program.add(Execute(add, debugContext("add")));
    setOutTensor(RoiAlignGradOp::featuresOutIndex(), cells.as_features(maps));
  }

 private:
  // grad [D, C, h, w] of one image -> [D, bins, channels of the group], each cell's on its tile.
  Tensor arrange(Sequence& program, const CellGraph& cells, const RoiAlignPlan& plan, const Tensor& grad, long image,
                 long group) const {
    const Range channels = plan.channels_of(group);
    const Tensor rows = cells.add_bins(image, group, grad.elementType(), debugContext("rows"));
    const Tensor own = grad.slice(channels.first, channels.first + channels.count, 1).flatten(2, 4);
    program.add(Copy(own.dimShuffle({0, 2, 1}), rows, false, debugContext("arrange")));
    return rows;
  }

  // Float sums of each cell, [groups of RoIs, H * W * channels].
  Tensor add_scatter(const CellGraph& cells, const RoiAlignPlan& plan, const poplar::ComputeSet& set, const Tensor& rows,
                     const Tensor& rois, long image, long group) const {
    const std::string name = vertex_name("RoiAlignBackward", rows.elementType(), rois.elementType());
    const long values = plan.sizes.pixels() * plan.channels_of(group).count;
    const Tensor sums =
        graph().addVariable(poplar::FLOAT, {size(plan.roi_groups), size(values)}, debugContext("sums"));
    for (long r = 0; r < plan.roi_groups; ++r) {
      const Range own = plan.rois_of(r);
      graph().setTileMapping(sums[r], plan.tile(plan.cell(image, group, r)));
      const poplar::VertexRef vertex = cells.add_vertex(set, name, rois, image, group, r);
      connect(graph(), vertex, "grad", rows.slice(own.first, own.first + own.count));
      connect(graph(), vertex, "sums", sums[r]);
    }
    return sums;
  }

  // The sums of all cells of a group of channels added up, [H * W, channels], a share on each cell's tile.
  Tensor add_sum(const RoiAlignPlan& plan, const poplar::ComputeSet& set, const Tensor& sums, const poplar::Type& type,
                 long image, long group) const {
    const long channels = plan.channels_of(group).count;
    const Tensor map = graph().addVariable(type, {size(plan.sizes.pixels() * channels)}, debugContext("gradient"));
    for (long r = 0; r < plan.roi_groups; ++r) {
      const Range share = plan.share_of(channels, r);
      if (share.count <= 0) continue;
      const long tile = plan.tile(plan.cell(image, group, r));
      const Tensor own = map.slice(share.first, share.first + share.count);
      graph().setTileMapping(own, tile);
      const poplar::VertexRef vertex = graph().addVertex(set, vertex_name("RoiAlignSum", type));
      graph().setTileMapping(vertex, tile);
      graph().setPerfEstimate(vertex, roi_align_sum_cycles(share.count, plan.roi_groups));
      connect(graph(), vertex, "sums", sums.slice(share.first, share.first + share.count, 1));
      connect(graph(), vertex, "grad", own);
    }
    return map.reshape({size(plan.sizes.pixels()), size(channels)});
  }
};

popart::popx::OpxCreator<RoiAlignOpx> roi_align_opx_creator({RoiAlignId, RoiAlignOldId});
popart::popx::OpxCreator<RoiAlignGradOpx> roi_align_grad_opx_creator({RoiAlignGradId});

}  // namespace

}  // namespace popdet
