// ai.graphcore.nms 1: checks, shapes, what goes into the IR hash, and its registration with PopART.
#include "nms_op.hpp"

#include <cmath>
#include <string>

#include <popart/error.hpp>
#include <popart/opmanager.hpp>
#include <popart/opserialiser.hpp>
#include <popart/shapeinference.hpp>

namespace popdet {

namespace {

using popart::Attributes;
using popart::DataType;
using popart::OpDefinition;

constexpr float kNoScoreThreshold = -3.4e38f;

const OpDefinition::DataTypes kFloats = {DataType::FLOAT16, DataType::FLOAT};
const OpDefinition::DataTypes kInt = {DataType::INT32};

OpDefinition nms_definition({OpDefinition::Inputs({{"scores", kFloats}, {"boxes", kFloats}}),
                             OpDefinition::Outputs({{"scores", kFloats}, {"boxes", kFloats}, {"keep", kInt}}),
                             OpDefinition::Attributes({{"threshold", {"*"}},
                                                       {"numDetections", {"*"}},
                                                       {"score_threshold", {"*"}}})});

void check(bool holds, const char* message) {
  if (!holds) throw popart::error(std::string("ai.graphcore.nms: ") + message);
}

void check_attributes(const NmsAttributes& a) {
  check(a.threshold >= 0 && a.threshold <= 1, "attribute threshold must be given, from 0 to 1");
  check(a.numDetections >= 1 && a.numDetections <= 0x7fffffff, "attribute numDetections must be given, at least 1");
  check(std::isfinite(a.scoreThreshold), "attribute score_threshold must be a finite number");
}

popart::OpCreator<NmsOp> nms_creator(
    popart::OpDefinitions({{NmsId, nms_definition}}),
    [](const popart::OpCreatorInfo& info) -> std::unique_ptr<popart::Op> {
      // -1 and 0 are out of range: an attribute that is missing is refused like one that is wrong.
      const NmsAttributes attributes = {info.attributes.getAttribute<Attributes::Float>("threshold", -1.0f),
                                        info.attributes.getAttribute<Attributes::Int>("numDetections", 0),
                                        info.attributes.getAttribute<Attributes::Float>("score_threshold", kNoScoreThreshold)};
      return std::unique_ptr<popart::Op>(new NmsOp(info.opid, attributes, info.settings));
    },
    true);

// The Builder's shapes, before there is an Op.
popart::RegisterShapeInferenceFunction nms_shapes(NmsId, [](popart::ShapeInferenceContext& context) {
  const NmsAttributes attributes = {context.getAttribute<Attributes::Float>("threshold", -1.0f),
                                    context.getAttribute<Attributes::Int>("numDetections", 0),
                                    context.getAttribute<Attributes::Float>("score_threshold", kNoScoreThreshold)};
  const auto outputs = nms_outputs(context.inInfo(0), context.inInfo(1), attributes);
  for (int i = 0; i < 3; ++i) context.outInfo(i) = outputs[i];
});

}  // namespace

std::vector<popart::TensorInfo> nms_outputs(const popart::TensorInfo& scores, const popart::TensorInfo& boxes,
                                            const NmsAttributes& attributes) {
  check_attributes(attributes);
  check(scores.rank() == 2 && boxes.rank() == 3, "scores [B,N] and boxes [B,N,4] are needed");
  const int64_t batch = scores.dim(0), rows = scores.dim(1), keep = attributes.numDetections;
  check(boxes.dim(0) == batch && boxes.dim(1) == rows && boxes.dim(2) == 4, "scores [B,N] need boxes [B,N,4]");
  check(batch >= 1, "the batch is empty");
  return {popart::TensorInfo(scores.dataType(), popart::Shape{batch, rows, 1}),
          popart::TensorInfo(boxes.dataType(), popart::Shape{batch, keep, 4}),
          popart::TensorInfo(DataType::INT32, popart::Shape{batch, keep})};
}

NmsOp::NmsOp(const popart::OperatorIdentifier& opid, const NmsAttributes& attributes,
             const popart::Op::Settings& settings)
    : popart::Op(opid, settings), attributes_(attributes) {
  check_attributes(attributes);
}

std::unique_ptr<popart::Op> NmsOp::clone() const { return std::unique_ptr<popart::Op>(new NmsOp(*this)); }

void NmsOp::setup() {
  const auto outputs = nms_outputs(inInfo(scoresInIndex()), inInfo(boxesInIndex()), attributes_);
  for (int i = 0; i < 3; ++i) outInfo(i) = outputs[i];
}

void NmsOp::appendAttributes(popart::OpSerialiserBase& os) const {
  popart::Op::appendAttributes(os);
  os.appendAttribute("threshold", attributes_.threshold);
  os.appendAttribute("numDetections", attributes_.numDetections);
  os.appendAttribute("score_threshold", attributes_.scoreThreshold);
}

void NmsOp::appendOutlineAttributes(popart::OpSerialiserBase& os) const {
  popart::Op::appendOutlineAttributes(os);
  os.appendAttribute("threshold", attributes_.threshold);
  os.appendAttribute("numDetections", attributes_.numDetections);
  os.appendAttribute("score_threshold", attributes_.scoreThreshold);
}

}  // namespace popdet
