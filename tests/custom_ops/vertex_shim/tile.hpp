// One vertex on one tile: buffers of its own for every edge, as after an exchange, and a check of who writes what.
#pragma once

#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include <poplar/Vertex.hpp>

namespace harness {

// Tile memory before anybody wrote to it: neither 0 nor a number that one would miss.
constexpr int kFill = 0xCD;

// An edge in tile memory. Exactly as large as the edge, so that an address checker sees any step outside.
template <typename T>
class Local {
 public:
  explicit Local(long count) : count_(count), values_(static_cast<T*>(std::malloc(count * sizeof(T)))) {
    if (count < 1 || values_ == nullptr) throw std::runtime_error("an edge must not be empty");
    std::memset(static_cast<void*>(values_), kFill, bytes());
  }
  Local(const T* from, long count) : Local(count) { std::memcpy(static_cast<void*>(values_), from, bytes()); }
  Local(const Local&) = delete;
  ~Local() { std::free(static_cast<void*>(values_)); }

  long count() const { return count_; }
  long bytes() const { return count_ * static_cast<long>(sizeof(T)); }
  T* data() { return values_; }
  T& operator[](long at) { return values_[at]; }
  void copy_to(T* target) const { std::memcpy(static_cast<void*>(target), values_, bytes()); }

  template <typename Edge>
  void connect(Edge& edge) {
    edge.connect(values_, static_cast<unsigned>(count_));
  }

 private:
  long count_;
  T* values_;
};

// The words of 32 bits of a written edge, and the worker that wrote each. An edge of Output begins unwritten for every
// worker, so that even writing the same value twice shows; one of InOut goes from worker to worker.
class Words {
 public:
  template <typename T>
  static Words of_output(Local<T>& edge) {
    return Words(edge, true);
  }
  template <typename T>
  static Words of_in_out(Local<T>& edge) {
    return Words(edge, false);
  }

  // To be called when `worker` has run.
  void after(int worker) {
    for (long word = 0; word < static_cast<long>(owner_.size()); ++word) {
      const long at = 4 * word, length = size_ - at < 4 ? size_ - at : 4;
      if (std::memcmp(bytes_ + at, before_.data() + at, length) == 0) continue;
      if (owner_[word] >= 0) throw std::runtime_error("two workers wrote one word");
      owner_[word] = worker;
      std::memcpy(result_.data() + at, bytes_ + at, length);
    }
    if (is_output_)
      std::memset(bytes_, kFill, size_);
    else
      std::memcpy(before_.data(), bytes_, size_);
  }

  // To be called when all have.
  void finish() { std::memcpy(bytes_, result_.data(), size_); }

 private:
  template <typename T>
  Words(Local<T>& edge, bool is_output)
      : bytes_(reinterpret_cast<unsigned char*>(edge.data())), size_(edge.bytes()), is_output_(is_output),
        before_(bytes_, bytes_ + size_), owner_((size_ + 3) / 4, -1) {
    if (is_output) before_.assign(size_, kFill);
    result_ = before_;
    std::memcpy(bytes_, before_.data(), size_);
  }

  unsigned char* bytes_;
  long size_;
  bool is_output_;
  std::vector<unsigned char> before_, result_;
  std::vector<int> owner_;
};

// Runs the six workers of a MultiVertex one after another, in an order that no codelet may rely on.
template <typename V>
void run_workers(V& vertex, std::vector<Words> written) {
  for (int worker : {3, 0, 5, 1, 4, 2}) {
    vertex.compute(worker);
    for (Words& words : written) words.after(worker);
  }
  for (Words& words : written) words.finish();
}

// The largest sum of edges that any vertex had on its tile.
struct TileBytes {
  long largest = 0;

  template <typename... Edges>
  void see(const Edges&... edges) {
    long sum = 0;
    for (long bytes : {edges.bytes()...}) sum += bytes;
    largest = sum > largest ? sum : largest;
  }
};

}  // namespace harness
