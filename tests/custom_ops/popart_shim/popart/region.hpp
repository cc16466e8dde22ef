// Parts of a tensor that PopART may take for an alias; ours are always empty.
#pragma once

#include <cstdint>
#include <vector>

namespace popart {
namespace view {

class Region {
 public:
  static Region getEmpty(int64_t) { return Region(); }
  bool isEmpty() const { return true; }
};
using Regions = std::vector<Region>;

}  // namespace view
}  // namespace popart
