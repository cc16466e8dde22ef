// The part of Poplar's codelet interface that our vertices use, for running them on a host: a vertex is an object, an
// edge is a pointer and a size that the harness sets. Written from Poplar's public documentation.
#pragma once

#include <cstdio>
#include <cstdlib>

namespace poplar {

enum class VectorLayout { SPAN, ONE_PTR };

// An edge of several values. Reading or writing outside of it ends the process.
template <typename T, VectorLayout Layout = VectorLayout::SPAN, unsigned MinimumAlignment = alignof(T)>
class Vector {
 public:
  using Value = T;
  unsigned size() const { return size_; }
  T& operator[](unsigned at) const {
    if (at >= size_) {
      std::fprintf(stderr, "a codelet used element %u of an edge of %u\n", at, size_);
      std::abort();
    }
    return values_[at];
  }
  void connect(T* values, unsigned size) {
    values_ = values;
    size_ = size;
  }

 private:
  T* values_ = nullptr;
  unsigned size_ = 0;
};

// A const edge for Input<Vector<T>>, and one value for Output<T>.
template <typename Edge>
class Input;

template <typename T, VectorLayout Layout, unsigned Alignment>
class Input<Vector<T, Layout, Alignment>> : public Vector<const T, Layout, Alignment> {};

template <typename Edge>
class Output {
 public:
  Edge& operator*() const { return *value_; }
  void connect(Edge* value) { value_ = value; }

 private:
  Edge* value_ = nullptr;
};

template <typename T, VectorLayout Layout, unsigned Alignment>
class Output<Vector<T, Layout, Alignment>> : public Vector<T, Layout, Alignment> {};

template <typename Edge>
class InOut;

template <typename T, VectorLayout Layout, unsigned Alignment>
class InOut<Vector<T, Layout, Alignment>> : public Vector<T, Layout, Alignment> {};

class Vertex {};

class MultiVertex {
 public:
  static constexpr unsigned numWorkers() { return 6; }
};

}  // namespace poplar
