// The elementwise loops on the CPU. A formula (srelu.h) says what they compute for one element.
//
// One pass over memory where eager PyTorch takes several. There are two loops: over runs (the inner elements of one
// channel are consecutive: NCHW), and over rows (inner = 1: channels_last), where the bias values and the running sums
// are arrays in the first-level cache. Work is cut into units only by shape, each unit keeps its own sums, and these
// are added in order, in double, at the end: the same bits for any number of threads.
//
// Every loop body is compiled for the baseline and for AVX2 (simd_dispatch.h). AVX-512 gains nothing here, because
// memory is the limit.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "call.h"
#include "element_cpu.h"
#include "simd_dispatch.h"

namespace isonet_fast::cpu {

template <typename T>
struct Streams {
  const T* in[3];
  T* out[2];
};

constexpr int64_t kUnit = 32768;  // elements: long enough for a thread to be worth waking, short enough to balance

// Element i of every stream through the formula.
template <class Formula, typename T, typename S>
ISONET_FAST_INLINE void apply(const T* const (&in)[3], T* const (&out)[2], int64_t i, Sum<T> b, Sum<T> scale,
                              S& grad_bias, S& grad_scale) {
  Sum<T> values[Formula::kReads], results[Formula::kWrites];
  for (int k = 0; k < Formula::kReads; ++k) values[k] = widen(in[k][i]);
  Formula::apply(values, b, scale, results, grad_bias, grad_scale);
  for (int k = 0; k < Formula::kWrites; ++k) narrow(results[k], out[k][i]);
}

// Sums of a small tensor are kept in double from the first term on, where a product of two floats is exact: a sum of few
// terms may cancel, and then every rounding shows. Longer loops would lose a quarter of their speed in a cache; they
// keep sums in float32 (float64) for one block of additions, and add the blocks up in double.
constexpr int64_t kExactSums = 4096;  // elements of the tensor
constexpr int64_t kRunBlock = 1024;  // elements, in some 16 vector lanes
constexpr int64_t kRowBlock = 32;    // rows

// Where a unit of loop_over_runs begins: a piece of a plane. It is counted on from unit to unit, because a division
// costs as much as a short plane.
struct Position {
  const int64_t pieces, channels;
  int64_t piece, plane, channel;

  Position(int64_t unit, int64_t pieces, int64_t channels)
      : pieces(pieces), channels(channels), piece(unit % pieces), plane(unit / pieces), channel(plane % channels) {}

  void next() {
    if (++piece < pieces) return;
    piece = 0;
    ++plane;
    if (++channel == channels) channel = 0;
  }
};

// Units of consecutive elements of one channel: planes, and pieces of long ones.
template <class Formula, typename T, typename S>
struct Runs {
  ISONET_FAST_INLINE void operator()(const Streams<T>& streams, int64_t begin, int64_t end, const Extent& e,
                                     int64_t pieces, int64_t length, const Sum<T>* b, Sum<T> scale, double* grad_bias,
                                     double* grad_scale) const {
    Position position(begin, pieces, e.channels);
    for (int64_t unit = begin; unit < end; ++unit, position.next()) {
      const int64_t plane = position.plane * e.inner, start = position.piece * length;
      const int64_t stop = plane + (start + length < e.inner ? start + length : e.inner);
      double total_bias = 0, total_scale = 0;
      for (int64_t at = plane + start; at < stop; at += kRunBlock) {
        const T* const in[3] = {streams.in[0] + at, streams.in[1] + at, streams.in[2] + at};
        T* const out[2] = {streams.out[0] + at, streams.out[1] + at};
        const int64_t n = stop - at < kRunBlock ? stop - at : kRunBlock;
        const Sum<T> bias = b[position.channel];
        S sum_bias = 0, sum_scale = 0;
#pragma omp simd reduction(+ : sum_bias, sum_scale)
        for (int64_t i = 0; i < n; ++i) apply<Formula>(in, out, i, bias, scale, sum_bias, sum_scale);
        total_bias += sum_bias;
        total_scale += sum_scale;
      }
      if (Formula::kSumsBias) grad_bias[unit] = total_bias;
      if (Formula::kSumsScale) grad_scale[unit] = total_scale;
    }
  }
};

// Rows of `width` elements, each with its own bias value and its own sum; the last row may be short.
template <class Formula, typename T, typename S>
struct Rows {
  ISONET_FAST_INLINE void operator()(const Streams<T>& streams, int64_t begin, int64_t end, int64_t width,
                                     const Sum<T>* b, Sum<T> scale, S* grad_bias, double& grad_scale) const {
    for (int64_t at = begin; at < end; at += width) {
      const T* const in[3] = {streams.in[0] + at, streams.in[1] + at, streams.in[2] + at};
      T* const out[2] = {streams.out[0] + at, streams.out[1] + at};
      const int64_t n = end - at < width ? end - at : width;
      S sum_scale = 0;
#pragma omp simd reduction(+ : sum_scale)
      for (int64_t i = 0; i < n; ++i) {
        S sum = Formula::kSumsBias ? grad_bias[i] : S(0);
        apply<Formula>(in, out, i, b[i], scale, sum, sum_scale);
        if (Formula::kSumsBias) grad_bias[i] = sum;
      }
      grad_scale += sum_scale;
    }
  }
};

// Value i of a parameter; the bias rounded to T (see call.h), the scale not.
template <typename T>
Sum<T> exact(const Parameter& parameter, int64_t i) {
  return parameter.dtype == DType::float32 ? Sum<T>(static_cast<const float*>(parameter.data)[i])
                                           : Sum<T>(widen(static_cast<const T*>(parameter.data)[i]));
}

template <typename T>
Sum<T> rounded(const Parameter& parameter, int64_t i) {
  T value;
  narrow(exact<T>(parameter, i), value);
  return widen(value);
}

// Long planes are cut, for balance.
inline int64_t pieces_of(const Extent& e) { return (e.inner + 2 * kUnit - 1) / (2 * kUnit); }

template <typename T>
void write_gradient(void* data, DType dtype, int64_t i, double value) {
  if (dtype == DType::float64)
    static_cast<double*>(data)[i] = value;
  else if (dtype == DType::float32)
    static_cast<float*>(data)[i] = static_cast<float>(value);
  else if constexpr (sizeof(T) == 2)
    narrow(static_cast<float>(value), static_cast<T*>(data)[i]);
}

// The sums of every unit, in the order of memory.
struct Sums {
  std::vector<double> bias;   // runs: one value per unit; rows: (units, channels)
  std::vector<double> scale;  // one value per unit
};

template <class Formula, typename S, typename T>
Sums loop_over_runs(const Call& call, const Streams<T>& streams, Sum<T> scale) {
  const Extent& e = call.extent;
  const int64_t pieces = pieces_of(e), length = (e.inner + pieces - 1) / pieces;
  const int64_t units = e.outer * e.channels * pieces;
  std::vector<Sum<T>> b(e.channels);
  for (int64_t c = 0; c < e.channels; ++c) b[c] = rounded<T>(call.bias, c);
  Sums sums{std::vector<double>(Formula::kSumsBias ? units : 0), std::vector<double>(Formula::kSumsScale ? units : 0)};
  torch::stable::parallel_for(0, units, std::max<int64_t>(1, kUnit / length), [&](int64_t begin, int64_t end) {
    run(Runs<Formula, T, S>{}, streams, begin, end, e, pieces, length, b.data(), scale, sums.bias.data(),
        sums.scale.data());
  });
  return sums;
}

template <class Formula, typename S, typename T>
Sums loop_over_rows(const Call& call, const Streams<T>& streams, Sum<T> scale) {
  const Extent& e = call.extent;
  // Few channels: take several rows as one, so that the inner loop has something to vectorise.
  const int64_t repeats = std::max<int64_t>(1, 128 / e.channels), width = repeats * e.channels;
  // At least 64 rows to a unit, so that its sums are a small part of its traffic.
  const int64_t length = std::max<int64_t>(64, kUnit / width) * width, numel = e.numel();
  const int64_t units = (numel + length - 1) / length;
  std::vector<Sum<T>> b(width);
  for (int64_t c = 0; c < width; ++c) b[c] = rounded<T>(call.bias, c % e.channels);
  Sums sums{std::vector<double>(Formula::kSumsBias ? units * e.channels : 0),
            std::vector<double>(Formula::kSumsScale ? units : 0)};
  torch::stable::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
    std::vector<S> grad_bias(Formula::kSumsBias ? width : 0);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t stop = std::min(numel, (unit + 1) * length);
      double grad_scale = 0;
      for (int64_t at = unit * length; at < stop; at += kRowBlock * width) {
        std::fill(grad_bias.begin(), grad_bias.end(), S(0));
        run(Rows<Formula, T, S>{}, streams, at, std::min(stop, at + kRowBlock * width), width, b.data(), scale,
            grad_bias.data(), grad_scale);
        if (Formula::kSumsBias) {
          double* const row = sums.bias.data() + unit * e.channels;
          for (int64_t k = 0; k < width; k += e.channels)
            for (int64_t c = 0; c < e.channels; ++c) row[c] += grad_bias[k + c];
        }
      }
      if (Formula::kSumsScale) sums.scale[unit] = grad_scale;
    }
  });
  return sums;
}

template <class Formula, typename S, typename T>
Sums loop_over_elements(const Call& call, const Streams<T>& streams, Sum<T> scale) {
  if (call.extent.numel() == 0) return {};
  return call.extent.inner > 1 ? loop_over_runs<Formula, S>(call, streams, scale)
                               : loop_over_rows<Formula, S>(call, streams, scale);
}

template <class Formula, typename T>
void launch_typed(const Call& call) {
  Streams<T> streams{};
  for (int k = 0; k < Formula::kReads; ++k) streams.in[k] = static_cast<const T*>(call.in[k]);
  for (int k = 0; k < Formula::kWrites; ++k) streams.out[k] = static_cast<T*>(call.out[k]);
  const Sum<T> scale = call.scale.data == nullptr ? Sum<T>(1) : exact<T>(call.scale, 0);
  const Extent& e = call.extent;
  constexpr bool summing = Formula::kSumsBias || Formula::kSumsScale;
  const Sums sums = summing && e.numel() <= kExactSums ? loop_over_elements<Formula, double>(call, streams, scale)
                                                       : loop_over_elements<Formula, Sum<T>>(call, streams, scale);
  if constexpr (Formula::kSumsBias) {
    std::vector<double> totals(e.channels);
    const int64_t consecutive = e.inner > 1 ? pieces_of(e) : 1;  // sums of one channel
    const double* sum = sums.bias.data();
    for (const double* const last = sum + sums.bias.size(); sum < last;)
      for (double& total : totals)
        for (int64_t i = 0; i < consecutive; ++i) total += *sum++;
    for (int64_t c = 0; c < e.channels; ++c) write_gradient<T>(call.grad_bias, call.bias.dtype, c, totals[c]);
  }
  if constexpr (Formula::kSumsScale) {
    double total = 0;
    for (const double value : sums.scale) total += value;
    write_gradient<T>(call.grad_scale, call.scale.dtype, 0, total);
  }
}

template <class Formula>
void launch(const Call& call) {
  switch (call.dtype) {
    case DType::float32: return launch_typed<Formula, float>(call);
    case DType::float64: return launch_typed<Formula, double>(call);
    case DType::float16: return launch_typed<Formula, Half>(call);
    case DType::bfloat16: return launch_typed<Formula, BFloat16>(call);
  }
}

}  // namespace isonet_fast::cpu
