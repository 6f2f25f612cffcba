// The arithmetic of SReLU for one element: the only place where its formula is written in C++.
//
//   y  = x if (x > b or x is NaN) else b
//   dx = g m,  db = sum of g (1 - m) over all but the channels,  m = not (y <= b)
//
// A formula says how many tensors it reads and writes and which sums it needs. The loops over memory are in
// elementwise.cuh (GPU) and elementwise_cpu.h; both compile this file. Values arrive widened to A, which is float
// (double for float64): widening a half is exact, so comparing in float is comparing in the tensor's dtype. Sums are
// kept in S: A, or on the CPU double.
#pragma once

#ifdef __CUDACC__
#define ISONET_FAST_FORMULA static __host__ __device__ __forceinline__
#else
#define ISONET_FAST_FORMULA [[gnu::always_inline]] static inline
#endif

namespace isonet_fast {

// max(x, b), NaN if either is: one instruction from sm_80 on, three elsewhere.
template <typename A>
ISONET_FAST_FORMULA A larger(A x, A b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (sizeof(A) == sizeof(float)) {
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(x), "f"(b));
    return x;
  }
#endif
  return (x > b) | (x != x) ? x : b;
}

struct SReLUForward {
  static constexpr int kReads = 1;   // x
  static constexpr int kWrites = 1;  // y
  static constexpr bool kSumsBias = false;
  static constexpr bool kSumsScale = false;

  template <typename A, typename S>
  ISONET_FAST_FORMULA void apply(const A (&in)[1], A b, A, A (&out)[1], S&, S&) {
    out[0] = larger(in[0], b);
  }
};

struct SReLUBackward {
  static constexpr int kReads = 2;   // g, y
  static constexpr int kWrites = 1;  // dx
  static constexpr bool kSumsBias = true;
  static constexpr bool kSumsScale = false;

  template <typename A, typename S>
  ISONET_FAST_FORMULA void apply(const A (&in)[2], A b, A, A (&out)[1], S& grad_bias, S&) {
    const A g = in[0];
    const bool blocked = in[1] <= b;  // false for a NaN on either side: then the gradient passes
    out[0] = blocked ? A(0) : g;
    grad_bias += S(blocked ? g : A(0));
  }
};

}  // namespace isonet_fast
