// Every vertex on problems of many sizes, for a build with the address and undefined-behaviour sanitizers. The numbers
// are checked elsewhere; here only memory and arithmetic are. Problems come from a fixed linear congruence.
#include "harness.cpp"

#include <cmath>

namespace {

class Random {
 public:
  explicit Random(unsigned seed) : state_(seed) {}
  float uniform(float low, float high) {
    state_ = state_ * 1664525u + 1013904223u;
    return low + (high - low) * static_cast<float>(state_ >> 8) / 16777216.0f;
  }

 private:
  unsigned state_;
};

template <typename T>
std::vector<T> values(Random& random, long count, float low, float high) {
  const float strange[] = {0.0f, -0.0f, 1e30f, -1e30f, 1e-40f, INFINITY, -INFINITY, NAN};
  std::vector<T> result(count);
  for (T& value : result) {
    const float draw = random.uniform(0, 1);
    value = T(draw < 0.1f ? strange[static_cast<int>(draw * 80)] : random.uniform(low, high));
  }
  return result;
}

template <typename T>
constexpr int type_of() {
  return sizeof(T) == 2;
}

void expect(int found, const char* what) {
  if (found == 0) return;
  std::printf("%s returned %d\n", what, found);
  std::exit(1);
}

template <typename S, typename B>
void run_nms(Random& random) {
  for (long rows : {1, 5, 64, 65, 200})
    for (long keep : {1, 64, 201})
      for (long tiles : {1, 7, 300}) {
        const auto scores = values<S>(random, rows, -1, 1);
        const auto boxes = values<B>(random, 4 * rows, -10, 60);
        std::vector<int> rows_out(keep);
        std::vector<B> boxes_out(4 * keep);
        int64_t report[8] = {};
        expect(codelets_nms(type_of<S>(), type_of<B>(), scores.data(), boxes.data(), rows, keep, 0.5f, -0.5f, tiles,
                            200000, rows_out.data(), boxes_out.data(), report),
               "nms");
      }
}

template <typename T, typename R>
void run_roi_align(Random& random) {
  for (long channels : {1, 3, 12})
    for (long rois : {1, 5})
      for (long ratio : {1, 3})
        for (long tiles : {1, 9, 500}) {
          const int64_t sizes[] = {2, channels, 5, 7, rois, 5, 3, 2, ratio};
          const auto features = values<T>(random, 2 * channels * 35, -2, 2);
          const auto boxes = values<R>(random, 2 * rois * 5, -20, 60);
          std::vector<T> aligned(2 * rois * channels * 6), grad(features.size());
          int64_t report[8] = {};
          const int types[] = {type_of<T>(), type_of<R>()};
          expect(codelets_roi_align(types[0], types[1], features.data(), boxes.data(), sizes, 0.25f, 0, tiles, 200000,
                                    aligned.data(), report),
                 "roi_align forward");
          expect(codelets_roi_align(types[0], types[1], aligned.data(), boxes.data(), sizes, 0.25f, 1, tiles, 200000,
                                    grad.data(), report),
                 "roi_align backward");
        }
}

template <typename T>
void run_box_decode(Random& random) {
  const float settings[] = {0.1f, 0.1f, 0.2f, 0.2f, 48, 64};
  for (long rows : {1, 13, 50}) {
    const auto anchors = values<T>(random, 4 * rows, -10, 60), deltas = values<T>(random, 4 * rows, -9, 9);
    std::vector<T> boxes(4 * rows);
    expect(codelets_box_decode(type_of<T>(), anchors.data(), deltas.data(), rows, settings, 4, boxes.data()), "decode");
  }
}

}  // namespace

int main() {
  Random random(1);
  run_nms<float, float>(random);
  run_nms<float, half>(random);
  run_nms<half, float>(random);
  run_nms<half, half>(random);
  run_roi_align<float, float>(random);
  run_roi_align<float, half>(random);
  run_roi_align<half, float>(random);
  run_roi_align<half, half>(random);
  run_box_decode<float>(random);
  run_box_decode<half>(random);
  std::printf("all vertices ran\n");
}
