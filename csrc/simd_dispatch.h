// Which instruction set a loop runs with on the CPU. Its body is written once and compiled for the baseline of the
// platform and for longer vectors; run() chooses among them, so a wheel needs no -march. A body is an object whose
// operator() is always inlined.
#pragma once

#define ISONET_FAST_INLINE [[gnu::always_inline]] inline

#if defined(__x86_64__) && defined(__GNUC__)
#define ISONET_FAST_AVX
#endif

namespace isonet_fast::cpu {

#ifdef ISONET_FAST_AVX
template <class Body, class... Arguments>
[[gnu::target("avx2,fma")]] void run_avx2(const Body& body, Arguments&&... arguments) {
  body(arguments...);  // always_inline: compiled for this function's target
}

template <class Body, class... Arguments>
[[gnu::target("avx512f,avx2,fma")]] void run_avx512(const Body& body, Arguments&&... arguments) {
  body(arguments...);
}

inline bool has_avx2() {
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return avx2;
}

inline bool has_avx512() {
  static const bool avx512 = __builtin_cpu_supports("avx512f") && has_avx2();
  return avx512;
}
#endif

// With AVX2 at most: a loop that memory limits gains nothing from more.
template <class Body, class... Arguments>
void run(const Body& body, Arguments&&... arguments) {
#ifdef ISONET_FAST_AVX
  if (has_avx2()) return run_avx2(body, arguments...);
#endif
  body(arguments...);
}

}  // namespace isonet_fast::cpu
