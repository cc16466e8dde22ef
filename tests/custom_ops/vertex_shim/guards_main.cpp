// Shows that the harness would notice: two workers that share a word of two halves, and a step outside of an edge.
#include <poplar/HalfFloat.hpp>

#include "tile.hpp"

namespace {

struct Careless : poplar::MultiVertex {
  poplar::Output<poplar::Vector<poplar::half>> values;
  void compute(unsigned worker) {
    if (worker < values.size()) values[worker] = poplar::half(1.0f);
  }
};

}  // namespace

int main() {
  harness::Local<poplar::half> values(3);
  Careless vertex;
  values.connect(vertex.values);
  try {
    harness::run_workers(vertex, {harness::Words::of_output(values)});
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    std::fflush(stdout);
  }
  vertex.values[3] = poplar::half(1.0f);
  return 0;
}
