// GroupNorm + residual + ReLU, and RoIAlign, for channels_last maps on a CPU; called by native.py through ctypes.
//
// Arithmetic is fp32 and results are rounded once. Work is cut by shape alone and partial sums are added in a fixed
// order, so results do not depend on the number of threads.
//
// Letters: N samples, C channels, P pixels of a sample, G groups. Maps are (N, P, C).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

struct bf16 {
  uint16_t bits;
};

inline float get(float v) { return v; }

inline float get(bf16 v) {
  uint32_t bits = uint32_t(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline void put(float& to, float v) { to = v; }

inline void put(bf16& to, float v) {  // to nearest even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

template <class F>
void parallel(int64_t items, int threads, const F& work) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && items > 1)
  for (int64_t i = 0; i < items; ++i) work(i);
}

// ------------------------------------------------------------ GroupNorm

// A sample's pixels are cut into chunks of `rows`.
struct Cut {
  int64_t n, c, p, groups, rows;
  int threads;

  int64_t chunks() const { return (p + rows - 1) / rows; }
  int64_t length(int64_t chunk) const { return std::min(rows, p - chunk * rows); }

  // `chunk(i)` for every chunk of every sample, `sample(n)` once those of a sample are done, then `last(i)`.
  template <class A, class B, class D>
  void run(const A& chunk, const B& sample, const D& last) const {
    int64_t k = chunks();
    if (k == 1) {
      parallel(n, threads, [&](int64_t i) { chunk(i), sample(i), last(i); });
      return;
    }
    parallel(n * k, threads, chunk);
    parallel(n, threads, sample);
    parallel(n * k, threads, last);
  }
};

// Per channel of a sample: mean, gamma / std, beta, 1 / std.
struct Affine {
  std::vector<float> mean, scale, shift, rstd;

  Affine(const Cut& cut, int64_t sample, const float* means, const float* rstds, const float* w, const float* b)
      : mean(cut.c), scale(cut.c), shift(b, b + cut.c), rstd(cut.c) {
    int64_t per = cut.c / cut.groups;
    for (int64_t c = 0; c < cut.c; ++c) {
      mean[c] = means[sample * cut.groups + c / per];
      rstd[c] = rstds[sample * cut.groups + c / per];
      scale[c] = w[c] * rstd[c];
    }
  }
};

// `pixels(r, count)` for all rows, four at a time: a channel's sum is loaded and stored once for four pixels.
template <class F>
void by_fours(int64_t rows, const F& pixels) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) pixels(r, std::integral_constant<int, 4>());
  for (; r < rows; ++r) pixels(r, std::integral_constant<int, 1>());
}

// Mean and sum of squared differences from it, for each channel of `rows` pixels.
template <class T>
void moments(const T* x, int64_t rows, int64_t c, float* mean, float* squares) {
  std::fill(mean, mean + c, 0.f);
  std::fill(squares, squares + c, 0.f);
  by_fours(rows, [=](int64_t r, auto count) {
#pragma GCC ivdep
    for (int64_t k = 0; k < c; ++k) {
      float sum = 0;
      for (int u = 0; u < count; ++u) sum += get(x[(r + u) * c + k]);
      mean[k] += sum;
    }
  });
  for (int64_t k = 0; k < c; ++k) mean[k] /= float(rows);
  by_fours(rows, [=](int64_t r, auto count) {
#pragma GCC ivdep
    for (int64_t k = 0; k < c; ++k) {
      float sum = 0;
      for (int u = 0; u < count; ++u) {
        float d = get(x[(r + u) * c + k]) - mean[k];
        sum += d * d;
      }
      squares[k] += sum;
    }
  });
}

template <class T, bool RES, bool RELU>
void apply_rows(const T* x, const T* res, T* y, int64_t rows, int64_t c, const Affine& f) {
  const float *mean = f.mean.data(), *scale = f.scale.data(), *shift = f.shift.data();
  for (int64_t r = 0; r < rows; ++r, x += c, y += c, res += RES ? c : 0)
#pragma GCC ivdep
    for (int64_t k = 0; k < c; ++k) {
      float v = (get(x[k]) - mean[k]) * scale[k] + shift[k];
      if (RES) v += get(res[k]);
      if (RELU) v = v < 0.f ? 0.f : v;  // NaN stays NaN
      put(y[k], v);
    }
}

template <class T>
void apply(const T* x, const T* res, T* y, int64_t rows, int64_t c, const Affine& f, bool relu) {
  if (res) return relu ? apply_rows<T, true, true>(x, res, y, rows, c, f) : apply_rows<T, true, false>(x, res, y, rows, c, f);
  return relu ? apply_rows<T, false, true>(x, res, y, rows, c, f) : apply_rows<T, false, false>(x, res, y, rows, c, f);
}

template <class T>
void forward(const T* x, const T* res, const float* w, const float* b, T* y, float* mean, float* rstd, float* scratch,
             const Cut& cut, float eps, bool relu) {
  int64_t chunks = cut.chunks(), per = cut.c / cut.groups;
  auto at = [&](int64_t i) { return ((i / chunks) * cut.p + (i % chunks) * cut.rows) * cut.c; };
  cut.run(
      [&](int64_t i) {
        float* slot = scratch + 2 * i * cut.c;
        moments(x + at(i), cut.length(i % chunks), cut.c, slot, slot + cut.c);
      },
      [&](int64_t n) {
        for (int64_t g = 0; g < cut.groups; ++g) {
          double sum = 0, squares = 0;
          const float* slots = scratch + 2 * n * chunks * cut.c + g * per;
          for (int64_t k = 0; k < chunks; ++k)
            for (int64_t c = 0; c < per; ++c) sum += double(slots[2 * k * cut.c + c]) * cut.length(k);
          double m = sum / double(cut.p * per);
          for (int64_t k = 0; k < chunks; ++k)
            for (int64_t c = 0; c < per; ++c) {
              double d = slots[2 * k * cut.c + c] - m;
              squares += slots[(2 * k + 1) * cut.c + c] + d * d * cut.length(k);
            }
          mean[n * cut.groups + g] = float(m);
          rstd[n * cut.groups + g] = float(1.0 / std::sqrt(squares / double(cut.p * per) + eps));
        }
      },
      [&](int64_t i) {
        Affine f(cut, i / chunks, mean, rstd, w, b);
        apply(x + at(i), res ? res + at(i) : nullptr, y + at(i), cut.length(i % chunks), cut.c, f, relu);
      });
}

template <class T>
void apply_again(const T* x, const float* mean, const float* rstd, const float* w, const float* b, T* y,
                 const Cut& cut, bool relu) {
  int64_t chunks = cut.chunks();
  parallel(cut.n * chunks, cut.threads, [&](int64_t i) {
    int64_t at = ((i / chunks) * cut.p + (i % chunks) * cut.rows) * cut.c;
    apply<T>(x + at, nullptr, y + at, cut.length(i % chunks), cut.c, Affine(cut, i / chunks, mean, rstd, w, b), relu);
  });
}

// What the ReLU let through of dy. MASK 0: no ReLU; 1: its input follows from x; 2: `out` is its output.
template <int MASK, class T>
inline float passed(const T* dy, const T* x, const T* out, int64_t i, float mean, float scale, float shift) {
  float g = get(dy[i]);
  if (MASK == 1) g = (get(x[i]) - mean) * scale + shift <= 0.f ? 0.f : g;
  if (MASK == 2) g = get(out[i]) <= 0.f ? 0.f : g;
  return g;
}

// Per channel: sums of g = passed dy, and of g * x_hat; `dres`, if any, gets g.
template <class T, int MASK, bool DRES>
void sums(const T* dy, const T* x, const T* out, T* dres, int64_t rows, int64_t c, const Affine& f, float* s1, float* s2) {
  const float *mean = f.mean.data(), *scale = f.scale.data(), *shift = f.shift.data(), *rstd = f.rstd.data();
  std::fill(s1, s1 + c, 0.f);
  std::fill(s2, s2 + c, 0.f);
  by_fours(rows, [=](int64_t r, auto count) {
#pragma GCC ivdep
    for (int64_t k = 0; k < c; ++k) {
      float sum = 0, product = 0;
      for (int u = 0; u < count; ++u) {
        int64_t i = (r + u) * c + k;
        float g = passed<MASK>(dy, x, out, i, mean[k], scale[k], shift[k]);
        sum += g;
        product += g * (get(x[i]) - mean[k]);
        if (DRES) put(dres[i], g);
      }
      s1[k] += sum;
      s2[k] += product;
    }
  });
  for (int64_t k = 0; k < c; ++k) s2[k] *= rstd[k];
}

template <class T, int MASK>
void dx_rows(const T* dy, const T* x, const T* out, T* dx, int64_t rows, int64_t c, const Affine& f, const float* a,
             const float* b) {
  const float *mean = f.mean.data(), *scale = f.scale.data(), *shift = f.shift.data();
  for (int64_t r = 0; r < rows; ++r, dy += c, x += c, dx += c, out += MASK == 2 ? c : 0)
#pragma GCC ivdep
    for (int64_t k = 0; k < c; ++k) {
      float g = passed<MASK>(dy, x, out, k, mean[k], scale[k], shift[k]);
      put(dx[k], g * scale[k] - a[k] - (get(x[k]) - mean[k]) * b[k]);
    }
}

template <class T, int MASK>
void backward(const T* dy, const T* x, const T* out, const float* w, const float* b, const float* mean,
              const float* rstd, T* dx, T* dres, float* dw, float* db, float* scratch, const Cut& cut) {
  int64_t chunks = cut.chunks(), per = cut.c / cut.groups;
  double size = double(cut.p) * per;
  float* means = scratch + 2 * cut.n * chunks * cut.c;  // of g * gamma and g * gamma * x_hat: (N, 2, G)
  auto at = [&](int64_t i) { return ((i / chunks) * cut.p + (i % chunks) * cut.rows) * cut.c; };
  cut.run(
      [&](int64_t i) {
        float* slot = scratch + 2 * i * cut.c;
        auto sum = dres ? sums<T, MASK, true> : sums<T, MASK, false>;
        sum(dy + at(i), x + at(i), out + (MASK == 2 ? at(i) : 0), dres ? dres + at(i) : nullptr,
            cut.length(i % chunks), cut.c, Affine(cut, i / chunks, mean, rstd, w, b), slot, slot + cut.c);
      },
      [&](int64_t n) {
        for (int64_t g = 0; g < cut.groups; ++g) {
          double m1 = 0, m2 = 0;
          const float* slots = scratch + 2 * n * chunks * cut.c + g * per;
          for (int64_t k = 0; k < chunks; ++k)
            for (int64_t c = 0; c < per; ++c) {
              m1 += double(slots[2 * k * cut.c + c]) * w[g * per + c];
              m2 += double(slots[(2 * k + 1) * cut.c + c]) * w[g * per + c];
            }
          means[2 * n * cut.groups + g] = float(m1 / size);
          means[(2 * n + 1) * cut.groups + g] = float(m2 / size);
        }
      },
      [&](int64_t i) {
        if (!dx) return;
        int64_t n = i / chunks;
        Affine f(cut, n, mean, rstd, w, b);
        std::vector<float> first(cut.c), second(cut.c);
        for (int64_t c = 0; c < cut.c; ++c) {
          first[c] = means[2 * n * cut.groups + c / per] * f.rstd[c];
          second[c] = means[(2 * n + 1) * cut.groups + c / per] * f.rstd[c] * f.rstd[c];
        }
        // Where the residual needs it, what the ReLU let through is stored already.
        auto row = dres ? dx_rows<T, 0> : dx_rows<T, MASK>;
        row(dres ? dres + at(i) : dy + at(i), x + at(i), out + (MASK == 2 ? at(i) : 0), dx + at(i),
            cut.length(i % chunks), cut.c, f, first.data(), second.data());
      });
  if (!dw) return;
  parallel((cut.c + 63) / 64, cut.threads, [&](int64_t block) {
    for (int64_t c = block * 64; c < std::min(cut.c, block * 64 + 64); ++c) {
      double sum_b = 0, sum_w = 0;
      for (int64_t i = 0; i < cut.n * chunks; ++i) {
        sum_b += scratch[2 * i * cut.c + c];
        sum_w += scratch[(2 * i + 1) * cut.c + c];
      }
      db[c] = float(sum_b), dw[c] = float(sum_w);
    }
  });
}

// ------------------------------------------------------------ RoIAlign

struct Pool {
  int64_t h, w, c, size;
  float scale;
  int64_t ratio;
  bool aligned;

  // `tap(bin, pixel, weight)` for the four neighbors of each sample of each bin; weights of a bin sum up to 1.
  template <class F>
  void taps(const float* roi, const F& tap) const {
    float offset = aligned ? 0.5f : 0.f;
    float x0 = roi[1] * scale - offset, y0 = roi[2] * scale - offset;
    float width = roi[3] * scale - offset - x0, height = roi[4] * scale - offset - y0;
    if (!aligned) width = std::max(width, 1.f), height = std::max(height, 1.f);
    float bin_w = width / float(size), bin_h = height / float(size);
    int64_t grid_h = ratio > 0 ? ratio : int64_t(std::ceil(bin_h)), grid_w = ratio > 0 ? ratio : int64_t(std::ceil(bin_w));
    float share = 1.f / float(std::max<int64_t>(grid_h * grid_w, 1));
    for (int64_t bin = 0; bin < size * size; ++bin)
      for (int64_t i = 0; i < grid_h; ++i)
        for (int64_t j = 0; j < grid_w; ++j) {
          float y = y0 + float(bin / size) * bin_h + (float(i) + .5f) * bin_h / float(grid_h);
          float x = x0 + float(bin % size) * bin_w + (float(j) + .5f) * bin_w / float(grid_w);
          if (!(y >= -1.f && y <= float(h) && x >= -1.f && x <= float(w))) continue;
          y = std::max(y, 0.f), x = std::max(x, 0.f);
          int64_t top = std::min(int64_t(y), h - 1), left = std::min(int64_t(x), w - 1);
          int64_t bottom = std::min(top + 1, h - 1), right = std::min(left + 1, w - 1);
          if (bottom == top) y = float(top);
          if (right == left) x = float(left);
          float ly = y - float(top), lx = x - float(left), hy = 1.f - ly, hx = 1.f - lx;
          tap(bin, top * w + left, hy * hx * share);
          tap(bin, top * w + right, hy * lx * share);
          tap(bin, bottom * w + left, ly * hx * share);
          tap(bin, bottom * w + right, ly * lx * share);
        }
  }
};

template <class T>
void roi_align(const T* x, const float* rois, T* y, int64_t k, const Pool& pool, int threads) {
  int64_t bins = pool.size * pool.size, c = pool.c;
  parallel(k, threads, [&](int64_t i) {
    std::vector<float> sum(bins * c, 0.f);
    const T* image = x + int64_t(rois[5 * i]) * pool.h * pool.w * c;
    pool.taps(rois + 5 * i, [&](int64_t bin, int64_t pixel, float weight) {
      float* to = sum.data() + bin * c;
      const T* from = image + pixel * c;
#pragma GCC ivdep
      for (int64_t q = 0; q < c; ++q) to[q] += weight * get(from[q]);
    });
    for (int64_t q = 0; q < bins * c; ++q) put(y[i * bins * c + q], sum[q]);
  });
}

// Adds to dx (N, H, W, C) in fp32; every thread owns a block of channels.
template <class T>
void roi_align_backward(const T* dy, const float* rois, float* dx, int64_t k, const Pool& pool, int threads) {
  int64_t bins = pool.size * pool.size, c = pool.c, step = threads > 1 ? 32 : c;
  parallel((c + step - 1) / step, threads, [&](int64_t block) {
    int64_t first = block * step, count = std::min(step, c - first);
    for (int64_t i = 0; i < k; ++i) {
      float* image = dx + int64_t(rois[5 * i]) * pool.h * pool.w * c + first;
      pool.taps(rois + 5 * i, [&](int64_t bin, int64_t pixel, float weight) {
        float* to = image + pixel * c;
        const T* from = dy + (i * bins + bin) * c + first;
#pragma GCC ivdep
        for (int64_t q = 0; q < count; ++q) to[q] += weight * get(from[q]);
      });
    }
  });
}

}  // namespace

#define EXPORT(T, NAME)                                                                                               \
  extern "C" void gn_forward_##NAME(const T* x, const T* res, const float* w, const float* b, T* y, float* mean,      \
                                    float* rstd, float* scratch, int64_t n, int64_t c, int64_t p, int64_t groups,     \
                                    int64_t rows, int threads, float eps, int relu) {                                 \
    forward<T>(x, res, w, b, y, mean, rstd, scratch, Cut{n, c, p, groups, rows, threads}, eps, relu != 0);            \
  }                                                                                                                   \
  extern "C" void gn_apply_##NAME(const T* x, const float* w, const float* b, T* y, const float* mean,                \
                                  const float* rstd, int64_t n, int64_t c, int64_t p, int64_t groups, int64_t rows,   \
                                  int threads, int relu) {                                                            \
    apply_again<T>(x, mean, rstd, w, b, y, Cut{n, c, p, groups, rows, threads}, relu != 0);                           \
  }                                                                                                                   \
  extern "C" void gn_backward_##NAME(const T* dy, const T* x, const T* out, const float* w, const float* b,           \
                                     const float* mean, const float* rstd, T* dx, T* dres, float* dw, float* db,      \
                                     float* scratch, int64_t n, int64_t c, int64_t p, int64_t groups, int64_t rows,   \
                                     int threads, int mask) {                                                         \
    auto run = mask == 0 ? backward<T, 0> : mask == 1 ? backward<T, 1> : backward<T, 2>;                              \
    run(dy, x, out, w, b, mean, rstd, dx, dres, dw, db, scratch, Cut{n, c, p, groups, rows, threads});                \
  }                                                                                                                   \
  extern "C" void roi_align_##NAME(const T* x, const float* rois, T* y, int64_t k, int64_t h, int64_t w, int64_t c,   \
                                   int64_t size, int threads, float scale, int64_t ratio, int aligned) {              \
    roi_align<T>(x, rois, y, k, Pool{h, w, c, size, scale, ratio, aligned != 0}, threads);                            \
  }                                                                                                                   \
  extern "C" void roi_align_backward_##NAME(const T* dy, const float* rois, float* dx, int64_t k, int64_t h,          \
                                            int64_t w, int64_t c, int64_t size, int threads, float scale,             \
                                            int64_t ratio, int aligned) {                                             \
    roi_align_backward<T>(dy, rois, dx, k, Pool{h, w, c, size, scale, ratio, aligned != 0}, threads);                 \
  }

EXPORT(float, f32)
EXPORT(bf16, bf16)
