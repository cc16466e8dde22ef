// Poplar's element types, as far as our programs use them.
#pragma once

#include <cstddef>

namespace poplar {

class Type {
 public:
  constexpr Type(int id, std::size_t bytes) : id_(id), bytes_(bytes) {}
  constexpr std::size_t bytes() const { return bytes_; }
  constexpr int id() const { return id_; }
  friend constexpr bool operator==(const Type& a, const Type& b) { return a.id_ == b.id_; }
  friend constexpr bool operator!=(const Type& a, const Type& b) { return a.id_ != b.id_; }

 private:
  int id_;
  std::size_t bytes_;
};

constexpr Type FLOAT(0, 4), HALF(1, 2), INT(2, 4), UNSIGNED_INT(3, 4), BOOL(4, 1);

}  // namespace poplar
