// A tensor's type and shape, of PopART.
#pragma once

#include <cstdint>
#include <vector>

namespace popart {

using Shape = std::vector<int64_t>;
enum class DataType { FLOAT, FLOAT16, INT32 };

class TensorInfo {
 public:
  TensorInfo() = default;
  TensorInfo(DataType type, const Shape& shape) : type_(type), shape_(shape) {}
  DataType dataType() const { return type_; }
  const Shape& shape() const { return shape_; }
  int64_t dim(int at) const { return shape_.at(at); }
  int rank() const { return static_cast<int>(shape_.size()); }
  int64_t nelms() const {
    int64_t product = 1;
    for (int64_t dim : shape_) product *= dim;
    return product;
  }

 private:
  DataType type_ = DataType::FLOAT;
  Shape shape_;
};

}  // namespace popart
