// ai.graphcore.nms 1 in PopART's IR: attributes, shapes, no gradient. Semantics: ../schema.py.
#pragma once

#include <memory>
#include <vector>

#include <popart/op.hpp>
#include <popart/operatoridentifier.hpp>
#include <popart/region.hpp>
#include <popart/tensorinfo.hpp>

namespace popdet {

const popart::OperatorIdentifier NmsId = {"ai.graphcore", "nms", 1};

// As ../schema.py has them.
struct NmsAttributes {
  float threshold;        // IoU above which a box is suppressed, 0 .. 1
  int64_t numDetections;  // K, at least 1
  float scoreThreshold;   // rows at or below are absent
};

// scores [B, N], boxes [B, N, 4] -> scores [B, N, 1], boxes [B, K, 4], keep int32 [B, K]. Throws popart::error.
std::vector<popart::TensorInfo> nms_outputs(const popart::TensorInfo& scores, const popart::TensorInfo& boxes,
                                            const NmsAttributes& attributes);

class NmsOp : public popart::Op {
 public:
  NmsOp(const popart::OperatorIdentifier& opid, const NmsAttributes& attributes, const popart::Op::Settings& settings);

  static popart::InIndex scoresInIndex() { return 0; }
  static popart::InIndex boxesInIndex() { return 1; }
  static popart::OutIndex scoresOutIndex() { return 0; }
  static popart::OutIndex boxesOutIndex() { return 1; }
  static popart::OutIndex keepOutIndex() { return 2; }

  std::unique_ptr<popart::Op> clone() const override;
  void setup() override;
  void appendAttributes(popart::OpSerialiserBase& os) const override;
  void appendOutlineAttributes(popart::OpSerialiserBase& os) const override;
  float getSubgraphValue() const override { return getHighSubgraphValue(); }

  // No gradient flows to scores or boxes.
  std::vector<std::unique_ptr<popart::Op>> getGradOps() override { return {}; }

  // Nothing is written in place and no output is a view of an input: the scores are copied.
  popart::view::Regions aliases(popart::InIndex in, popart::OutIndex) const override {
    return {popart::view::Region::getEmpty(inRank(in))};
  }
  popart::view::Regions modifies(popart::InIndex in) const override {
    return {popart::view::Region::getEmpty(inRank(in))};
  }

  const NmsAttributes& attributes() const { return attributes_; }

 private:
  NmsAttributes attributes_;
};

}  // namespace popdet
