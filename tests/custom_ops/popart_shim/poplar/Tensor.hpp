// Poplar's tensors: a shape, and for each element where it is stored. Views are lists of places, nothing clever.
#pragma once

#include <functional>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "Type.hpp"

namespace poplar {

using Sizes = std::vector<std::size_t>;

// The memory of one variable, and the tile of each element, -1 where none was set.
struct Variable {
  Variable(const Type& of, std::size_t count) : type(of), data(count * of.bytes(), 0xCD), tiles(count, -1) {}
  Type type;
  std::vector<unsigned char> data;
  std::vector<int> tiles;
};

struct Place {
  Variable* variable;
  std::size_t at;
  unsigned char* data() const { return variable->data.data() + at * variable->type.bytes(); }
  friend bool operator<(const Place& a, const Place& b) {
    return a.variable != b.variable ? std::less<Variable*>()(a.variable, b.variable) : a.at < b.at;
  }
};

class Tensor {
 public:
  Tensor() : type_(FLOAT) {}
  Tensor(const Type& type, Sizes shape, std::vector<Place> places)
      : type_(type), shape_(std::move(shape)), places_(std::move(places)) {
    if (count(shape_) != places_.size()) throw std::runtime_error("a reshape changes the number of elements");
  }

  Type elementType() const { return type_; }
  const Sizes& shape() const { return shape_; }
  unsigned rank() const { return static_cast<unsigned>(shape_.size()); }
  std::size_t dim(unsigned at) const { return shape_.at(at); }
  std::size_t numElements() const { return places_.size(); }
  const std::vector<Place>& places() const { return places_; }

  Tensor reshape(Sizes shape) const { return Tensor(type_, std::move(shape), places_); }
  Tensor flatten() const { return reshape({numElements()}); }

  // Dimensions first .. last - 1 become one.
  Tensor flatten(unsigned first, unsigned last) const {
    Sizes shape(shape_.begin(), shape_.begin() + first);
    shape.push_back(count(Sizes(shape_.begin() + first, shape_.begin() + last)));
    shape.insert(shape.end(), shape_.begin() + last, shape_.end());
    return reshape(shape);
  }

  Tensor expand(Sizes before) const {
    Sizes shape = shape_;
    for (auto at = before.rbegin(); at != before.rend(); ++at) shape.insert(shape.begin() + *at, 1);
    return reshape(shape);
  }

  Tensor slice(std::size_t begin, std::size_t end, unsigned dimension = 0) const {
    if (begin > end || end > shape_.at(dimension)) throw std::runtime_error("a slice outside of its tensor");
    Sizes shape = shape_;
    shape[dimension] = end - begin;
    return view(shape, [&](Sizes& index) { index[dimension] += begin; });
  }

  Tensor operator[](std::size_t at) const {
    Sizes shape(shape_.begin() + 1, shape_.end());
    return slice(at, at + 1).reshape(shape);
  }

  Tensor dimShuffle(const std::vector<unsigned>& order) const {
    Sizes shape;
    for (unsigned dimension : order) shape.push_back(shape_.at(dimension));
    return view(shape, [&](Sizes& index) {
      Sizes source(index.size());
      for (std::size_t i = 0; i < order.size(); ++i) source[order[i]] = index[i];
      index = source;
    });
  }

  Tensor transpose() const {
    std::vector<unsigned> order(rank());
    for (unsigned i = 0; i < rank(); ++i) order[i] = rank() - 1 - i;
    return dimShuffle(order);
  }

  Tensor broadcast(std::size_t times, unsigned dimension) const {
    Sizes shape = shape_;
    const std::size_t length = shape_.at(dimension);
    shape[dimension] *= times;
    return view(shape, [&](Sizes& index) { index[dimension] %= length; });
  }

  static std::size_t count(const Sizes& shape) {
    return std::accumulate(shape.begin(), shape.end(), std::size_t(1), std::multiplies<std::size_t>());
  }

  // A tensor of `shape` whose element `index` is this one's at source(index).
  template <typename Source>
  Tensor view(const Sizes& shape, Source source) const {
    std::vector<Place> places;
    places.reserve(count(shape));
    Sizes index(shape.size(), 0);
    for (std::size_t i = count(shape); i > 0; --i) {
      Sizes from = index;
      source(from);
      std::size_t at = 0;
      for (std::size_t d = 0; d < shape_.size(); ++d) at = at * shape_[d] + from[d];
      places.push_back(places_.at(at));
      for (std::size_t d = shape.size(); d > 0 && ++index[d - 1] == shape[d - 1]; --d) index[d - 1] = 0;
    }
    return Tensor(type_, shape, std::move(places));
  }

 private:
  Type type_;
  Sizes shape_;
  std::vector<Place> places_;
};

inline Tensor concat(const std::vector<Tensor>& parts, unsigned dimension) {
  Sizes shape = parts.at(0).shape();
  const std::size_t outer = Tensor::count(Sizes(shape.begin(), shape.begin() + dimension));
  shape[dimension] = 0;
  for (const Tensor& part : parts) {
    Sizes rest = part.shape();
    shape[dimension] += rest.at(dimension);
    rest[dimension] = shape[dimension];
    if (rest != shape) throw std::runtime_error("concat of tensors that do not match");
  }
  std::vector<Place> places;
  for (std::size_t o = 0; o < outer; ++o)
    for (const Tensor& part : parts) {
      const std::size_t each = part.numElements() / outer;
      places.insert(places.end(), part.places().begin() + o * each, part.places().begin() + (o + 1) * each);
    }
  return Tensor(parts[0].elementType(), shape, places);
}

}  // namespace poplar
