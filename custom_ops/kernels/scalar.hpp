// The number types of the kernels: how a value is stored, and the type that its arithmetic is done in.
//
// The kernels allocate nothing, use no standard container, no exception and no platform branch, so that the same text
// compiles for an IPU codelet and for the host. C++14. A codelet adds half by specialising Scalar<half> with
// `using Compute = float`; nothing else changes.
#pragma once

namespace popdet {

template <typename Storage>
struct Scalar {
  using Compute = Storage;
  static Compute load(Storage value) { return value; }
  static Storage store(Compute value) { return value; }
};

template <typename T>
inline T smaller(T a, T b) { return b < a ? b : a; }

template <typename T>
inline T larger(T a, T b) { return a < b ? b : a; }

}  // namespace popdet
