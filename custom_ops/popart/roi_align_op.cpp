// ai.graphcore.roiAlign 1 and its gradient: checks, shapes, what goes into the IR hash, and registration with PopART.
#include "roi_align_op.hpp"

#include <string>

#include <popart/error.hpp>
#include <popart/opmanager.hpp>
#include <popart/opserialiser.hpp>
#include <popart/shapeinference.hpp>

namespace popdet {

constexpr int64_t RoiAlignAttributes::kFromShapes;

namespace {

using popart::DataType;
using popart::OpDefinition;

const OpDefinition::DataTypes kFloats = {DataType::FLOAT16, DataType::FLOAT};

OpDefinition roi_align_definition({OpDefinition::Inputs({{"features", kFloats}, {"rois", kFloats}}),
                                   OpDefinition::Outputs({{"aligned", kFloats}}),
                                   OpDefinition::Attributes({{"spatial_scale", {"*"}},
                                                             {"aligned_height", {"*"}},
                                                             {"aligned_width", {"*"}},
                                                             {"batch_size", {"*"}},
                                                             {"num_rois", {"*"}},
                                                             {"height", {"*"}},
                                                             {"width", {"*"}},
                                                             {"channels", {"*"}},
                                                             {"sampling_ratio", {"*"}}})});

void check(bool holds, const std::string& message) {
  if (!holds) throw popart::error("ai.graphcore.roiAlign: " + message);
}

void check_range(const char* name, int64_t value, int64_t most) {
  check(value >= 1 && value <= most, std::string("attribute ") + name + " must be from 1 to " + std::to_string(most));
}

void check_attributes(const RoiAlignAttributes& a) {
  check(a.spatialScale >= 1e-6f && a.spatialScale <= 1e6f, "attribute spatial_scale must be given, from 1e-6 to 1e6");
  check_range("aligned_height", a.alignedHeight, 4096);
  check_range("aligned_width", a.alignedWidth, 4096);
  check_range("sampling_ratio", a.samplingRatio, 64);
}

void check_dimension(const char* name, int64_t given, int64_t actual) {
  check(given == RoiAlignAttributes::kFromShapes || given == actual,
        std::string("attribute ") + name + " is " + std::to_string(given) + ", but the input shapes say " +
            std::to_string(actual));
}

// `Source` is popart::Attributes or a ShapeInferenceContext. A required attribute that is missing reads as 0: refused.
template <typename Source>
RoiAlignAttributes read_attributes(const Source& source) {
  using popart::Attributes;
  const auto integer = [&](const char* name, int64_t otherwise) {
    return source.template getAttribute<Attributes::Int>(name, otherwise);
  };
  const int64_t unknown = RoiAlignAttributes::kFromShapes;
  return {source.template getAttribute<Attributes::Float>("spatial_scale", 0.0f),
          integer("aligned_height", 0),
          integer("aligned_width", 0),
          integer("sampling_ratio", 1),
          integer("batch_size", unknown),
          integer("num_rois", unknown),
          integer("height", unknown),
          integer("width", unknown),
          integer("channels", unknown)};
}

// The dimensions are in the shapes, and so in the hash, already.
void append(popart::OpSerialiserBase& os, const RoiAlignAttributes& a) {
  os.appendAttribute("spatial_scale", a.spatialScale);
  os.appendAttribute("aligned_height", a.alignedHeight);
  os.appendAttribute("aligned_width", a.alignedWidth);
  os.appendAttribute("sampling_ratio", a.samplingRatio);
}

popart::OpCreator<RoiAlignOp> roi_align_creator(
    popart::OpDefinitions({{RoiAlignId, roi_align_definition}, {RoiAlignOldId, roi_align_definition}}),
    [](const popart::OpCreatorInfo& info) -> std::unique_ptr<popart::Op> {
      return std::unique_ptr<popart::Op>(new RoiAlignOp(info.opid, read_attributes(info.attributes), info.settings));
    },
    true);

// The Builder's shape, before there is an Op.
void infer_shape(popart::ShapeInferenceContext& context) {
  context.outInfo(0) = roi_align_output(context.inInfo(0), context.inInfo(1), read_attributes(context));
}
popart::RegisterShapeInferenceFunction roi_align_shape(RoiAlignId, infer_shape);
popart::RegisterShapeInferenceFunction roi_align_old_shape(RoiAlignOldId, infer_shape);

}  // namespace

popart::TensorInfo roi_align_output(const popart::TensorInfo& features, const popart::TensorInfo& rois,
                                    const RoiAlignAttributes& a) {
  check_attributes(a);
  check(features.rank() == 4, "features must be [B,C,H,W]");
  check(rois.rank() == 3 && (rois.dim(2) == 4 || rois.dim(2) == 5), "rois must be [B,D,4] or [B,D,5]");
  check(features.dim(0) == rois.dim(0), "features and rois must share a batch");
  check(features.nelms() > 0, "features are empty");
  check_dimension("batch_size", a.batchSize, features.dim(0));
  check_dimension("num_rois", a.numRois, rois.dim(1));
  check_dimension("height", a.height, features.dim(2));
  check_dimension("width", a.width, features.dim(3));
  check_dimension("channels", a.channels, features.dim(1));
  return popart::TensorInfo(
      features.dataType(),
      popart::Shape{features.dim(0), rois.dim(1), features.dim(1), a.alignedHeight, a.alignedWidth});
}

RoiAlignOp::RoiAlignOp(const popart::OperatorIdentifier& opid, const RoiAlignAttributes& attributes,
                       const popart::Op::Settings& settings)
    : popart::Op(opid, settings), attributes_(attributes) {
  check_attributes(attributes);
}

std::unique_ptr<popart::Op> RoiAlignOp::clone() const { return std::unique_ptr<popart::Op>(new RoiAlignOp(*this)); }

void RoiAlignOp::setup() {
  outInfo(alignedOutIndex()) = roi_align_output(inInfo(featuresInIndex()), inInfo(roisInIndex()), attributes_);
}

std::vector<std::unique_ptr<popart::Op>> RoiAlignOp::getGradOps() {
  std::vector<std::unique_ptr<popart::Op>> result;
  result.emplace_back(new RoiAlignGradOp(*this));
  return result;
}

void RoiAlignOp::appendAttributes(popart::OpSerialiserBase& os) const {
  popart::Op::appendAttributes(os);
  append(os, attributes_);
}

void RoiAlignOp::appendOutlineAttributes(popart::OpSerialiserBase& os) const {
  popart::Op::appendOutlineAttributes(os);
  append(os, attributes_);
}

RoiAlignGradOp::RoiAlignGradOp(const RoiAlignOp& forward)
    : popart::Op(RoiAlignGradId, forward.settings), attributes_(forward.attributes()),
      features_(forward.inInfo(RoiAlignOp::featuresInIndex())) {}

std::unique_ptr<popart::Op> RoiAlignGradOp::clone() const {
  return std::unique_ptr<popart::Op>(new RoiAlignGradOp(*this));
}

void RoiAlignGradOp::setup() {
  outInfo(featuresOutIndex()) = popart::TensorInfo(inInfo(gradInIndex()).dataType(), features_.shape());
}

const std::vector<popart::GradInOutMapper>& RoiAlignGradOp::gradInputInfo() const {
  static const std::vector<popart::GradInOutMapper> inputs = {
      {gradInIndex(), RoiAlignOp::alignedOutIndex(), popart::GradOpInType::GradOut},
      {roisInIndex(), RoiAlignOp::roisInIndex(), popart::GradOpInType::In}};
  return inputs;
}

const std::map<int, int>& RoiAlignGradOp::gradOutToNonGradIn() const {
  static const std::map<int, int> outputs = {{featuresOutIndex(), RoiAlignOp::featuresInIndex()}};
  return outputs;
}

void RoiAlignGradOp::appendAttributes(popart::OpSerialiserBase& os) const {
  popart::Op::appendAttributes(os);
  append(os, attributes_);
  os.appendAttribute("features", features_.shape());
}

void RoiAlignGradOp::appendOutlineAttributes(popart::OpSerialiserBase& os) const {
  popart::Op::appendOutlineAttributes(os);
  append(os, attributes_);
  os.appendAttribute("features", features_.shape());
}

}  // namespace popdet
