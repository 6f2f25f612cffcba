// The arithmetic of SReLU for one element: the only place where its formula is written in C++.
//
// A formula says how many tensors it reads and writes and which sums it needs; how memory is walked is
// walk.cuh's business on the GPU and walk_cpu.h's on the CPU. Both compile this file. Values arrive widened to
// float (double for float64): widening a half is exact, so comparing in float is comparing in the tensor's dtype.
#pragma once

#ifdef __CUDACC__
#define ISONET_FORMULA static __host__ __device__ __forceinline__
#else
#define ISONET_FORMULA [[gnu::always_inline]] static inline
#endif

namespace isonet_fast {

struct SReLUForward {
  static constexpr int kReads = 1;   // x
  static constexpr int kWrites = 1;  // y
  static constexpr bool kSumsBias = false;
  static constexpr bool kSumsScale = false;

  template <typename A>
  ISONET_FORMULA void apply(const A (&in)[1], A b, A, A (&out)[1], A&, A&) {
    out[0] = (in[0] > b) | (in[0] != in[0]) ? in[0] : b;
  }
};

struct SReLUBackward {
  static constexpr int kReads = 2;   // g, y
  static constexpr int kWrites = 1;  // dx
  static constexpr bool kSumsBias = true;
  static constexpr bool kSumsScale = false;

  template <typename A>
  ISONET_FORMULA void apply(const A (&in)[2], A b, A, A (&out)[1], A& grad_bias, A&) {
    const A g = in[0];
    const bool blocked = in[1] <= b;  // false for a NaN on either side: then the gradient passes
    out[0] = blocked ? A(0) : g;
    grad_bias += blocked ? g : A(0);
  }
};

}  // namespace isonet_fast
