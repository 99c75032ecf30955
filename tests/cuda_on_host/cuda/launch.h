// Stands in for csrc/cuda/launch.h: runs a kernel on the host, one block after the other, its
// threads as coroutines that meet at __syncthreads and at shuffles. A shuffle that a lane has left
// out, and a barrier that a thread has left out, are errors here; on a GPU they would be silent.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __shared__ static

namespace branchcore::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 128;

class Block {
 public:
  // The block that runs now.
  static Block& now() {
    static Block block;
    return block;
  }

  template <class Params>
  void run(const char* name, void (*kernel)(Params), unsigned block, const Params& params) {
    name_ = name, block_ = block;
    body_ = [](void* call) {
      auto& [kernel, params] = *static_cast<Call<Params>*>(call);
      kernel(*params);
    };
    Call<Params> call = {kernel, &params};
    call_ = &call;
    for (thread_ = 0; thread_ < kThreads; ++thread_) start();
    while (advance()) {
    }
  }

  unsigned thread() const { return thread_; }
  unsigned block() const { return block_; }

  void sync_block() { wait(kAtBlock); }

  template <class T>
  T shuffle(T value, int partner) {
    Lane& own = lanes_[thread_];
    const int turn = own.shuffles++ % 2;
    std::memcpy(own.value[turn], &value, sizeof(T));
    wait(kAtWarp);
    T out;
    std::memcpy(&out, lanes_[thread_ / kWarp * kWarp + partner].value[turn], sizeof(T));
    return out;
  }

 private:
  enum State { kRunning, kAtWarp, kAtBlock, kDone };
  template <class Params>
  struct Call {
    void (*kernel)(Params);
    const Params* params;
  };
  struct Lane {
    State state = kDone;
    int64_t shuffles = 0;
    char value[2][8];
    jmp_buf place;
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
  };
  static constexpr size_t kStack = 1 << 16;

  static void enter() {
    Block& block = now();
    block.body_(block.call_);
    block.lanes_[block.thread_].state = kDone;
    _longjmp(block.scheduler_, 1);
  }

  void start() {
    Lane& lane = lanes_[thread_];
    lane.state = kRunning, lane.shuffles = 0;
    getcontext(&lane.context);
    lane.context.uc_stack.ss_sp = lane.stack.get();
    lane.context.uc_stack.ss_size = kStack;
    makecontext(&lane.context, enter, 0);
    if (_setjmp(scheduler_) == 0) setcontext(&lane.context);
  }

  void resume(unsigned thread) {
    thread_ = thread;
    lanes_[thread].state = kRunning;
    if (_setjmp(scheduler_) == 0) _longjmp(lanes_[thread].place, 1);
  }

  void wait(State state) {
    Lane& lane = lanes_[thread_];
    lane.state = state;
    if (_setjmp(lane.place) == 0) _longjmp(scheduler_, 1);
  }

  int count(int first, int threads, State state) const {
    int found = 0;
    for (int i = first; i < first + threads; ++i) found += lanes_[i].state == state;
    return found;
  }

  // Lets every warp or the block pass the barrier that all of it has reached; false at the end.
  bool advance() {
    if (count(0, kThreads, kDone) == kThreads) return false;
    bool moved = false;
    for (int first = 0; first < kThreads; first += kWarp) {
      if (count(first, kWarp, kAtWarp) != kWarp) continue;
      for (int i = first; i < first + kWarp; ++i) resume(i);
      moved = true;
    }
    if (!moved && count(0, kThreads, kAtBlock) == kThreads) {
      for (int i = 0; i < kThreads; ++i) resume(i);
      moved = true;
    }
    if (!moved)
      throw std::runtime_error(std::string(name_) + ": threads wait at a barrier that others skip");
    return true;
  }

  const char* name_ = "";
  unsigned thread_ = 0, block_ = 0;
  void (*body_)(void*) = nullptr;
  void* call_ = nullptr;
  jmp_buf scheduler_;
  std::vector<Lane> lanes_{kThreads};
};

struct ThreadIndex {
  unsigned x;
};

#define threadIdx (::branchcore::cuda::ThreadIndex{::branchcore::cuda::Block::now().thread()})
#define blockIdx (::branchcore::cuda::ThreadIndex{::branchcore::cuda::Block::now().block()})

inline void __syncthreads() { Block::now().sync_block(); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  const int lane = static_cast<int>(Block::now().thread()) % kWarp;
  return Block::now().shuffle(value, lane ^ distance);
}

template <class Params>
void launch(const char* name, void (*kernel)(Params), int64_t num_units, Params params, int,
            uintptr_t) {
  constexpr int64_t kWarps = kThreads / kWarp;
  for (int64_t block = 0; block < (num_units + kWarps - 1) / kWarps; ++block)
    Block::now().run(name, kernel, static_cast<unsigned>(block), params);
}

}  // namespace branchcore::cuda
