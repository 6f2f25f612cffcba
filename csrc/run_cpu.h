// Every loop body is written once and compiled twice: for the baseline of the platform and for AVX2, chosen at
// run time, so a wheel needs no -march. A body is an object whose operator() is always inlined.
#pragma once

#define ISONET_FAST_INLINE [[gnu::always_inline]] inline

#if defined(__x86_64__) && defined(__GNUC__)
#define ISONET_FAST_AVX2
#endif

namespace isonet_fast::cpu {

#ifdef ISONET_FAST_AVX2
template <class Body, class... Arguments>
[[gnu::target("avx2,fma")]] void run_avx2(const Body& body, Arguments&&... arguments) {
  body(arguments...);  // always_inline: compiled for this function's target
}
#endif

inline bool has_avx2() {
#ifdef ISONET_FAST_AVX2
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return avx2;
#else
  return false;
#endif
}

template <class Body, class... Arguments>
void run(const Body& body, Arguments&&... arguments) {
#ifdef ISONET_FAST_AVX2
  if (has_avx2()) return run_avx2(body, arguments...);
#endif
  body(arguments...);
}

}  // namespace isonet_fast::cpu
