// Runs CUDA kernels on the CPU, for tests: one fiber per CUDA thread. Include it before any .cu source.
//
// Emulated: grid and block indices, dynamic shared memory, __syncthreads, __shfl_down_sync, __umul64hi, and
// launches through ISONET_FAST_LAUNCH (elementwise.cuh). A block's threads run one after the other until each reaches a
// barrier, in an order that the test chooses: 0 ascending, 1 descending, otherwise a shuffle seeded by that number,
// new at every barrier. So
// - a missing barrier shows as a result that is wrong in some order;
// - a barrier that not all threads reach shows as a deadlock, reported as an exception;
// - a kernel that reads what the one ahead of it wrote, without waiting for it, is reported as an exception;
// - shared memory is heap memory of exactly the launched size, and so AddressSanitizer sees an index past its end.
// Bytes are counted where the kernels load and store (ISONET_FAST_COUNT).
#pragma once

#include <cuda_runtime.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

struct Bytes {
  int64_t read = 0, written = 0;  // tensors
  int64_t parameters = 0;         // bias, scale and their gradients
  int64_t partials_written = 0, partials_read = 0;
};
inline Bytes bytes;
inline int order = 0;  // of the threads of a block
inline int launches = 0;
inline unsigned blocks = ~0u;   // of a grid that are run
inline bool early = false;      // whether the kernel was launched before the one ahead of it had ended
inline const bool refuses = std::getenv("EMULATOR_REFUSES") != nullptr;  // as a GPU that the binary holds no code for

constexpr size_t kStack = 64 << 10;

// Where a fiber, or the scheduler, goes on.
struct Continuation {
  ucontext_t context;
  jmp_buf jump;
  bool left = false;  // by a switch: `jump` is set
};

struct Fiber {
  Continuation continuation;
  std::unique_ptr<char[]> stack{new char[kStack]};
  uint3 thread;
  bool done = false;
  bool awaited;  // whether it may read what the kernel ahead wrote
};
inline std::deque<Fiber> fibers;  // kept from launch to launch: their stacks are in memory

// Threads wait at a barrier until `count` of them have arrived; `generation` tells the waiting that it opened.
struct Barrier {
  int count = 0;
  unsigned generation = 0;
};

struct Block {
  dim3 grid, size;
  uint3 index;
  int live = 0;
  Fiber* current = nullptr;
  Continuation scheduler;
  Barrier all;
  std::vector<Barrier> warps;
  std::vector<uint64_t> shuffle[2];  // one slot per thread
  std::unique_ptr<unsigned char[]> shared;
  const std::function<void()>* body = nullptr;
  std::exception_ptr error;
  bool progress = false;
};
inline Block* block = nullptr;

// AddressSanitizer must be told when the stack changes under it, and knows no jump from stack to stack. Without it a
// stack is entered once, and then jumped to: swapcontext makes two system calls.
inline void switch_to(Continuation& from, Continuation& to, const void* stack, size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, stack, size);
  swapcontext(&from.context, &to.context);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  (void)stack, (void)size;
  from.left = true;
  if (_setjmp(from.jump)) return;
  if (to.left) _longjmp(to.jump, 1);
  setcontext(&to.context);
#endif
}

inline const void* main_stack = nullptr;
inline size_t main_stack_size = 0;

inline void yield() { switch_to(block->current->continuation, block->scheduler, main_stack, main_stack_size); }

inline void arrive(Barrier& barrier, int needed) {
  block->progress = true;
  if (++barrier.count >= needed) {
    barrier.count = 0;
    ++barrier.generation;
    return;
  }
  const unsigned generation = barrier.generation;
  while (barrier.generation == generation) yield();
}

inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &main_stack, &main_stack_size);
#endif
  for (;;) {  // a thread of one block after the other
    try {
      (*block->body)();
    } catch (...) {
      block->error = std::current_exception();
    }
    block->current->done = true;
    block->progress = true;
    --block->live;
    yield();
  }
}

inline void begin(Fiber& fiber) {
  getcontext(&fiber.continuation.context);
  fiber.continuation.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.continuation.context.uc_stack.ss_size = kStack;
  fiber.continuation.context.uc_link = nullptr;
  makecontext(&fiber.continuation.context, fiber_main, 0);
  fiber.continuation.left = false;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack.get(), kStack);  // frames that were never returned from
#endif
}

// Runs every thread of one block to its end. A thread that exits does not open a barrier for those that wait: on
// the GPU that is undefined, here it is the deadlock that a test can see.
inline void run_block(Block& b) {
  const int threads = static_cast<int>(b.size.x);
  b.live = threads;
  b.all = {};
  b.warps.assign((threads + 31) / 32, {});
  b.error = nullptr;
  std::vector<int> sequence(threads);
  std::mt19937 random(order * 7919 + b.index.x);
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    if (!fiber.done) begin(fiber);  // new, or left in the middle by a block that failed
    fiber.thread = {static_cast<unsigned>(t), 0, 0};
    fiber.done = false;
    fiber.awaited = !early;
    sequence[t] = order == 1 ? threads - 1 - t : t;
  }
  while (b.live > 0 && !b.error) {
    if (order > 1) std::shuffle(sequence.begin(), sequence.end(), random);
    b.progress = false;
    for (const int t : sequence) {
      Fiber& fiber = fibers[t];
      if (fiber.done || b.error) continue;
      b.current = &fiber;
      switch_to(b.scheduler, fiber.continuation, fiber.stack.get(), kStack);
    }
    if (!b.progress && !b.error)
      throw std::runtime_error("deadlock: " + std::to_string(b.live) + " threads wait at a barrier that others miss");
  }
  if (b.error) std::rethrow_exception(b.error);
}

template <class Kernel, class... Arguments>
void launch(Kernel kernel, dim3 grid, dim3 size, size_t shared_bytes, Arguments... arguments) {
  if (size.y * size.z * grid.y * grid.z != 1) throw std::runtime_error("only one-dimensional launches");
  if (size.x % 32 != 0 || size.x > 1024 || grid.x == 0) throw std::runtime_error("bad launch configuration");
  ++launches;
  if (refuses) return;
  const std::function<void()> body = [=] { kernel(arguments...); };
  Block b;
  block = &b;
  b.grid = grid;
  b.size = size;
  b.body = &body;
  while (fibers.size() < size.x) fibers.emplace_back();
  for (auto& slots : b.shuffle) slots.resize(size.x);
  for (unsigned i = 0; i < std::min(grid.x, blocks); ++i) {
    b.shared.reset(new unsigned char[shared_bytes]);
    std::memset(b.shared.get(), 0xff, shared_bytes);  // NaN: what is read before it is written shows
    b.index = {i, 0, 0};
    run_block(b);
  }
  block = nullptr;
}

// As csrc/launch.cuh launches on a chip that lets a kernel start early: here it has ended, but nobody may count on that.
template <class Kernel, class... Arguments>
cudaError_t launch_after(Kernel kernel, dim3 grid, dim3 size, size_t shared_bytes, cudaStream_t, Arguments... arguments) {
  early = true;
  launch(kernel, grid, size, shared_bytes, arguments...);
  early = false;
  return refuses ? cudaErrorNoKernelImageForDevice : cudaSuccess;
}

inline void count(int64_t Bytes::* what, int64_t number) {
  if (what == &Bytes::partials_read && !block->current->awaited)
    throw std::runtime_error("partial sums are read before the kernel that writes them is awaited");
  bytes.*what += number;
}

}  // namespace emulator

#define threadIdx (::emulator::block->current->thread)
#define blockIdx (::emulator::block->index)
#define blockDim (::emulator::block->size)
#define gridDim (::emulator::block->grid)

inline void __syncthreads() { emulator::arrive(emulator::block->all, static_cast<int>(blockDim.x)); }

template <class T>
T __shfl_down_sync(unsigned mask, T value, int distance) {
  if (mask != 0xffffffffu) throw std::runtime_error("only shuffles of whole warps");
  const unsigned thread = threadIdx.x, lane = thread % 32;
  emulator::Barrier& warp = emulator::block->warps[thread / 32];
  // Two sets of slots in turn: nobody can be two shuffles ahead, so one barrier per shuffle is enough.
  uint64_t* const slots = emulator::block->shuffle[warp.generation % 2].data();
  std::memcpy(&slots[thread], &value, sizeof(T));
  emulator::arrive(warp, 32);
  T result = value;
  if (lane + distance < 32) std::memcpy(&result, &slots[thread + distance], sizeof(T));
  return result;
}

inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
}

#define cudaGetLastError() (::emulator::refuses ? cudaErrorNoKernelImageForDevice : cudaSuccess)
#define ISONET_FAST_EMULATED
#define ISONET_FAST_LAUNCH(kernel, grid, block_size, shared_bytes, stream, ...) \
  ((void)(stream), ::emulator::launch(kernel, grid, block_size, shared_bytes, __VA_ARGS__))
#define ISONET_FAST_SHARED(type, name) type* const name = reinterpret_cast<type*>(::emulator::block->shared.get())
#define ISONET_FAST_COUNT(what, number) ::emulator::count(&::emulator::Bytes::what, number)
#define ISONET_FAST_LET_NEXT_GRID_START()
#define ISONET_FAST_AWAIT_GRID() (::emulator::block->current->awaited = true)
using emulator::launch_after;
