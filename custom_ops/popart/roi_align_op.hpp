// ai.graphcore.roiAlign 1 and its gradient in PopART's IR: attributes, shapes. Semantics: ../schema.py.
#pragma once

#include <map>
#include <memory>
#include <vector>

#include <popart/op.hpp>
#include <popart/operatoridentifier.hpp>
#include <popart/region.hpp>
#include <popart/tensorinfo.hpp>

namespace popdet {

const popart::OperatorIdentifier RoiAlignId = {"ai.graphcore", "roiAlign", 1};
const popart::OperatorIdentifier RoiAlignOldId = {"ai.graphcore", "roi_align", 1};  // some published graphs say so
const popart::OperatorIdentifier RoiAlignGradId = {"ai.graphcore", "roiAlignGrad", 1};

// As ../schema.py has them. The last five repeat dimensions: kFromShapes where they are not given.
struct RoiAlignAttributes {
  static constexpr int64_t kFromShapes = -1;

  float spatialScale;  // feature pixels per input pixel
  int64_t alignedHeight, alignedWidth, samplingRatio;
  int64_t batchSize, numRois, height, width, channels;
};

// features [B, C, H, W], rois [B, D, 4 or 5] -> [B, D, C, aligned height, aligned width]. Throws popart::error.
popart::TensorInfo roi_align_output(const popart::TensorInfo& features, const popart::TensorInfo& rois,
                                    const RoiAlignAttributes& attributes);

class RoiAlignOp : public popart::Op {
 public:
  RoiAlignOp(const popart::OperatorIdentifier& opid, const RoiAlignAttributes& attributes,
             const popart::Op::Settings& settings);

  static popart::InIndex featuresInIndex() { return 0; }
  static popart::InIndex roisInIndex() { return 1; }
  static popart::OutIndex alignedOutIndex() { return 0; }

  std::unique_ptr<popart::Op> clone() const override;
  void setup() override;
  std::vector<std::unique_ptr<popart::Op>> getGradOps() override;
  void appendAttributes(popart::OpSerialiserBase& os) const override;
  void appendOutlineAttributes(popart::OpSerialiserBase& os) const override;
  float getSubgraphValue() const override { return getHighSubgraphValue(); }

  // Nothing is written in place and the output is no view of an input.
  popart::view::Regions aliases(popart::InIndex in, popart::OutIndex) const override {
    return {popart::view::Region::getEmpty(inRank(in))};
  }
  popart::view::Regions modifies(popart::InIndex in) const override {
    return {popart::view::Region::getEmpty(inRank(in))};
  }

  const RoiAlignAttributes& attributes() const { return attributes_; }

 private:
  RoiAlignAttributes attributes_;
};

// The gradient of the features from that of the result; the RoIs have none.
class RoiAlignGradOp : public popart::Op {
 public:
  explicit RoiAlignGradOp(const RoiAlignOp& forward);

  static popart::InIndex gradInIndex() { return 0; }
  static popart::InIndex roisInIndex() { return 1; }
  static popart::OutIndex featuresOutIndex() { return 0; }

  std::unique_ptr<popart::Op> clone() const override;
  void setup() override;
  const std::vector<popart::GradInOutMapper>& gradInputInfo() const override;
  const std::map<int, int>& gradOutToNonGradIn() const override;
  void appendAttributes(popart::OpSerialiserBase& os) const override;
  void appendOutlineAttributes(popart::OpSerialiserBase& os) const override;
  float getSubgraphValue() const override { return getHighSubgraphValue(); }

  popart::view::Regions aliases(popart::InIndex in, popart::OutIndex) const override {
    return {popart::view::Region::getEmpty(inRank(in))};
  }
  popart::view::Regions modifies(popart::InIndex in) const override {
    return {popart::view::Region::getEmpty(inRank(in))};
  }

  const RoiAlignAttributes& attributes() const { return attributes_; }

 private:
  RoiAlignAttributes attributes_;
  popart::TensorInfo features_;  // the output's shape, which no input of this op has
};

}  // namespace popdet
