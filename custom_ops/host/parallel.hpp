// Threads for the host kernels, and exceptions that end at the C interface.
#pragma once

#include <algorithm>
#include <atomic>
#include <exception>
#include <new>

namespace popdet {

// work(i) for 0 <= i < count, each i once, on up to `threads` threads. They are OpenMP's, which torch uses as well: threads
// of our own would wait for cores on which OpenMP's spin for a while after each of torch's loops.
template <typename Work>
void parallel_for(long count, int threads, Work work) {
  std::atomic<long> next{0};
  std::atomic<bool> failed{false};
#pragma omp parallel num_threads(static_cast<int>(std::max(1l, std::min<long>(threads, count))))
  try {
    for (long i; (i = next.fetch_add(1)) < count;) work(i);
  } catch (...) {  // out of memory in a thread must not end the process
    failed = true;
    next = count;
  }
  if (failed) throw std::bad_alloc();
}

// 0, or 1 where `function` threw.
template <typename Function>
int guarded(Function function) {
  try {
    function();
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}

}  // namespace popdet
