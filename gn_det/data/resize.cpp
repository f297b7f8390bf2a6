// Pillow's bilinear resize of 8-bit images, equal to the bit; called by resize.py, which makes the tables of weights.
//
// Rows are scaled first, rounded to 8 bits, and then columns, both with integer weights.

#include <algorithm>
#include <cstdint>
#include <new>
#include <vector>

namespace {

constexpr int BITS = 22;  // weights are multiples of 2^-22

// Output i along an axis is the sum over t of input[first[i] + t] * weights[t * size + i].
struct Axis {
  const int32_t *first, *weights;
  int64_t size, taps;
};

inline uint8_t rounded(int32_t sum) { return uint8_t(std::min(sum >> BITS, 255)); }

// A row of pixels, each packed into an integer so that one gather reads all channels, to C rows `plane` bytes apart.
template <int C>
void along_row(const uint32_t* row, const Axis& x, int32_t* sums, uint8_t* out, int64_t plane) {
  const int64_t n = x.size;
  std::fill(sums, sums + C * n, 1 << (BITS - 1));
  for (int64_t t = 0; t < x.taps; ++t) {
    const int32_t* w = x.weights + t * n;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      uint32_t pixel = row[t + x.first[i]];
      for (int c = 0; c < C; ++c) sums[c * n + i] += int32_t(pixel >> (8 * c) & 255u) * w[i];
    }
  }
  for (int c = 0; c < C; ++c)
    for (int64_t i = 0; i < n; ++i) out[c * plane + i] = rounded(sums[c * n + i]);
}

// One row of output from rows of width n.
void along_columns(const uint8_t* rows, const Axis& y, int64_t row, int64_t n, int32_t* sums, uint8_t* out) {
  if (y.taps == 2) {
    const int32_t w = y.weights[row], v = y.weights[y.size + row];
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) out[i] = rounded((1 << (BITS - 1)) + rows[i] * w + rows[i + n] * v);
    return;
  }
  std::fill(sums, sums + n, 1 << (BITS - 1));
  for (int64_t t = 0; t < y.taps; ++t, rows += n) {
    const int32_t w = y.weights[t * y.size + row];
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) sums[i] += rows[i] * w;
  }
  for (int64_t i = 0; i < n; ++i) out[i] = rounded(sums[i]);
}

template <int C>
void resize(const uint8_t* in, int64_t width, uint8_t* out, const Axis& x, const Axis& y) {
  const int64_t top = *std::min_element(y.first, y.first + y.size);
  const int64_t rows = *std::max_element(y.first, y.first + y.size) + y.taps - top, plane = rows * x.size;
  std::vector<uint32_t> packed(width);
  std::vector<int32_t> sums(C * x.size);
  std::vector<uint8_t> wide(C * plane);
  for (int64_t r = 0; r < rows; ++r) {
    const uint8_t* from = in + (top + r) * width * C;
    for (int64_t i = 0; i < width; ++i) {
      uint32_t pixel = 0;
      for (int c = 0; c < C; ++c) pixel |= uint32_t(from[i * C + c]) << (8 * c);
      packed[i] = pixel;
    }
    along_row<C>(packed.data(), x, sums.data(), wide.data() + r * x.size, plane);
  }
  for (int64_t i = 0; i < C * y.size; ++i) {
    const int64_t c = i / y.size, row = i % y.size;
    along_columns(wide.data() + c * plane + (y.first[row] - top) * x.size, y, row, x.size, sums.data(), out + i * x.size);
  }
}

}  // namespace

// in (H, width, channels), 1 or 3 channels, to out (channels, y_size, x_size); false: no memory.
extern "C" int resize_bilinear(const uint8_t* in, int64_t width, int64_t channels, uint8_t* out, const int32_t* x_first,
                               const int32_t* x_weights, int64_t x_size, int64_t x_taps, const int32_t* y_first,
                               const int32_t* y_weights, int64_t y_size, int64_t y_taps) {
  Axis x{x_first, x_weights, x_size, x_taps}, y{y_first, y_weights, y_size, y_taps};
  try {
    channels == 1 ? resize<1>(in, width, out, x, y) : resize<3>(in, width, out, x, y);
    return 1;
  } catch (const std::bad_alloc&) {
    return 0;
  }
}
