// The orthogonality penalty and its gradient for small float32 layers on the CPU: one call for a whole network.
//
// A penalty of 16 to 64 channels is a few hundred multiplications of matrices that fit in the first-level cache. As
// operations of torch each costs more to start, and its operands more to slice, transpose and add, than to multiply.
// Here a thread takes a layer's group, packs its taps, and keeps taps, gradient and residual in its cache
// until the group is done. Groups are independent and each keeps its own sum: the same bits for any number of threads.
// The plan says which of two forms computes a layer: orthogonality_overlap.h or orthogonality_frequency.h.
#include "orthogonality.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "orthogonality_frequency.h"
#include "orthogonality_overlap.h"

namespace isonet_fast::cpu {
namespace {

int64_t scratch(const Plan& plan) {
  return 2 * plan.packed() + (plan.layer.frequency ? frequency_scratch(plan) : overlap_scratch(plan));
}

// Multiplications, about.
int64_t work(const Plan& plan) {
  const int64_t products = plan.layer.frequency ? 5 : plan.blocks;
  return plan.layer.count * products * plan.size * plan.rows;
}

// The loss of one group; its gradient, if wanted, goes to the tensor.
double compute(const Plan& plan, int64_t group, bool add, float* memory) {
  const OrthogonalityLayer& layer = plan.layer;
  const int64_t rows = plan.rows, columns = plan.weight.columns.size(), taps = plan.taps.size();
  float *const packed = memory, *const packed_grad = memory + plan.packed(), *const rest = packed_grad + plan.packed();
  std::fill(packed, rest, 0.0f);

  const float* const weight = layer.weight + group * plan.weight.group;
  for (int64_t n = 0; n < columns; ++n)
    for (int64_t u = 0; u < taps; ++u) {
      const float* const from = weight + plan.weight.columns[n] + plan.weight.taps[u];
      float* const to = packed + plan.taps[u] + n * plan.stride;
      for (int64_t m = 0; m < rows; ++m) to[m] = from[plan.weight.rows[m]];
    }

  float* const wanted = layer.grad == nullptr ? nullptr : packed_grad;
  const double loss = layer.frequency ? compute_frequency(plan, packed, wanted, rest)
                                      : compute_overlap(plan, packed, wanted, rest);
  if (layer.grad == nullptr) return loss;

  float* const grad = layer.grad + group * plan.grad.group;
  const float scale = 2 * layer.scale;
  for (int64_t n = 0; n < columns; ++n)
    for (int64_t u = 0; u < taps; ++u) {
      const float* const from = packed_grad + plan.taps[u] + n * plan.stride;
      float* const to = grad + plan.grad.columns[n] + plan.grad.taps[u];
      for (int64_t m = 0; m < rows; ++m) {
        float& value = to[plan.grad.rows[m]];
        value = add ? value + scale * from[m] : scale * from[m];
      }
    }
  return loss;
}

struct Unit {
  const Plan* plan;
  int64_t layer, group;
  double loss;
};

struct Free {
  void operator()(float* p) const { std::free(p); }
};

std::unique_ptr<float, Free> aligned_floats(int64_t count) {
  void* const memory = std::aligned_alloc(64, (count * sizeof(float) + 64) / 64 * 64);
  if (memory == nullptr) throw std::bad_alloc();
  return std::unique_ptr<float, Free>(static_cast<float*>(memory));
}

}  // namespace

void orthogonality(const std::vector<OrthogonalityLayer>& layers, bool add, double* losses) {
  const std::vector<Plan> plans(layers.begin(), layers.end());
  std::vector<Unit> units;
  int64_t memory = 0;
  for (size_t n = 0; n < plans.size(); ++n) {
    memory = std::max(memory, scratch(plans[n]));
    for (int64_t group = 0; group < layers[n].groups; ++group)
      units.push_back({&plans[n], static_cast<int64_t>(n), group, 0.0});
  }
  // The longest first, each to the thread that is free: little is left when the threads run out of work.
  std::stable_sort(units.begin(), units.end(),
                   [](const Unit& a, const Unit& b) { return work(*a.plan) > work(*b.plan); });
  std::atomic<size_t> next{0};
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), units.size());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const auto floats = aligned_floats(memory);
    for (size_t n; (n = next++) < units.size();)
      units[n].loss = compute(*units[n].plan, units[n].group, add, floats.get());
  });
  std::fill(losses, losses + layers.size(), 0.0);
  for (const Unit& unit : units) losses[unit.layer] += unit.loss;
}

}  // namespace isonet_fast::cpu
