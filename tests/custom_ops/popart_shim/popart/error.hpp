// PopART's exception.
#pragma once

#include <stdexcept>

namespace popart {

class error : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace popart
