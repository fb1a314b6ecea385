// Runs a block's threads as fibers. A fiber runs until it waits for its block or warp, or returns; then the
// scheduler goes on to the next. When nobody can go on although some wait, the kernel would deadlock on a GPU
// too, and the process is ended with a message.
//
// Between two waits the order of the threads is drawn anew, and shared memory is all ones when a grid starts:
// a kernel that lacks a barrier, or reads what nobody wrote, gives a wrong result. PGL_OPS_HOST_CUDA_SEED
// draws other orders; with 0 threads go in ascending order and shared memory is left as it is.
//
// Contexts are switched by longjmp, which asks nothing of the kernel; only a fiber's first start takes
// swapcontext. AddressSanitizer must be told of every switch, so with it all are made by swapcontext.
#include <link.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "cuda_runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define PGL_ASAN_FIBERS 1
#endif

thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace host_cuda {
namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr unsigned kWarp = 32;

uint64_t seed() {
  static const char* given = std::getenv("PGL_OPS_HOST_CUDA_SEED");
  static const uint64_t number = given ? std::strtoull(given, nullptr, 10) : 1;
  return number;
}

enum class State { ready, waits_for_block, waits_for_warp, done };

struct Fiber {
  ucontext_t context;
  jmp_buf place;         // where it waits
  bool started = false;  // for ever: a fiber that is done waits for the next block
  std::unique_ptr<char[]> stack;
  State state = State::done;
  dim3 thread;
  uint64_t given = 0;             // to the warp
  uint64_t received[kWarp] = {};  // from the warp, all lanes' gifts
};

class Scheduler {
 public:
  void run_block(dim3 size, const std::function<void()>& body) {
    body_ = &body;
    const unsigned n = size.x * size.y * size.z;
    if (fibers_.size() < n) fibers_.resize(n);
    threads_ = n;
    for (unsigned i = 0; i < n; ++i) start(i, size);
    order_.resize(n);
    std::iota(order_.begin(), order_.end(), 0u);
    unsigned done = 0;
    while (done < n) {
      bool advanced = false;
      for (unsigned i = n; seed() != 0 && i > 1; --i) std::swap(order_[i - 1], order_[random_() % i]);
      for (const unsigned i : order_) {
        if (fibers_[i].state != State::ready) continue;
        advanced = true;
        resume(i);
        if (fibers_[i].state == State::done) ++done;
      }
      if (release_warps() || release_block()) advanced = true;
      if (!advanced) {
        std::fprintf(stderr, "host_cuda: the block's threads wait for each other for ever\n");
        std::abort();
      }
    }
  }

  void wait(State state) {
    Fiber& fiber = fibers_[current_];
    fiber.state = state;
    switch_to_scheduler(fiber);
  }

  Fiber& current() { return fibers_[current_]; }

 private:
  static void entry();

  void start(unsigned i, dim3 size) {
    Fiber& fiber = fibers_[i];
    fiber.thread = dim3(i % size.x, i / size.x % size.y, i / size.x / size.y);
    fiber.state = State::ready;
    if (fiber.started) return;
    fiber.stack.reset(new char[kStackBytes]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Scheduler::entry, 0);
  }

  void resume(unsigned i) {
    current_ = i;
    threadIdx = fibers_[i].thread;
#ifdef PGL_ASAN_FIBERS
    fibers_[i].started = true;
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, fibers_[i].stack.get(), kStackBytes);
    swapcontext(&home_, &fibers_[i].context);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
    if (_setjmp(home_place_) != 0) return;
    if (fibers_[i].started) _longjmp(fibers_[i].place, 1);
    fibers_[i].started = true;
    setcontext(&fibers_[i].context);
#endif
  }

  void switch_to_scheduler(Fiber& fiber) {
#ifdef PGL_ASAN_FIBERS
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, home_stack_, home_stack_size_);
    swapcontext(&fiber.context, &home_);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
    if (_setjmp(fiber.place) == 0) _longjmp(home_place_, 1);
#endif
  }

  // Lets go every warp whose threads all wait for it (or have ended).
  bool release_warps() {
    bool any = false;
    for (unsigned first = 0; first < threads_; first += kWarp) {
      const unsigned last = first + kWarp < threads_ ? first + kWarp : threads_;
      bool waits = false, complete = true;
      for (unsigned i = first; i < last; ++i) {
        waits = waits || fibers_[i].state == State::waits_for_warp;
        complete = complete && (fibers_[i].state == State::waits_for_warp || fibers_[i].state == State::done);
      }
      if (!waits || !complete) continue;
      for (unsigned i = first; i < last; ++i) {
        if (fibers_[i].state != State::waits_for_warp) continue;
        for (unsigned j = first; j < last; ++j) {
          fibers_[i].received[j - first] = fibers_[j].state == State::done ? 0 : fibers_[j].given;
        }
      }
      for (unsigned i = first; i < last; ++i) {
        if (fibers_[i].state == State::waits_for_warp) fibers_[i].state = State::ready;
      }
      any = true;
    }
    return any;
  }

  bool release_block() {
    bool waits = false;
    for (unsigned i = 0; i < threads_; ++i) {
      if (fibers_[i].state == State::waits_for_block) {
        waits = true;
      } else if (fibers_[i].state != State::done) {
        return false;
      }
    }
    for (unsigned i = 0; waits && i < threads_; ++i) {
      if (fibers_[i].state == State::waits_for_block) fibers_[i].state = State::ready;
    }
    return waits;
  }

  std::deque<Fiber> fibers_;  // contexts must not move
  std::vector<unsigned> order_;
  std::minstd_rand random_{static_cast<std::minstd_rand::result_type>(seed())};
#ifdef PGL_ASAN_FIBERS
  ucontext_t home_;
#else
  jmp_buf home_place_;
#endif
  const std::function<void()>* body_ = nullptr;
  unsigned threads_ = 0, current_ = 0;
#ifdef PGL_ASAN_FIBERS
  const void* home_stack_ = nullptr;
  size_t home_stack_size_ = 0;
#endif
};

// One a thread, for as long as the process runs. A plain pointer: what has to be set up for each thread has a
// mark beside it that says so, which spoil_shared_memory would spoil.
thread_local Scheduler* scheduler = nullptr;

// The library's memory of this thread: the shared memory of all kernels, and what is kept in
// spoil_shared_memory.
std::pair<char*, size_t> memory_of_thread() {
  std::pair<char*, size_t> found{nullptr, 0};
  const auto look = [](dl_phdr_info* library, size_t, void* result) {
    char* begin = static_cast<char*>(library->dlpi_tls_data);
    for (int i = 0; begin != nullptr && i < library->dlpi_phnum; ++i) {
      const auto& segment = library->dlpi_phdr[i];
      const char* own = reinterpret_cast<char*>(&threadIdx);
      if (segment.p_type != PT_TLS || own < begin || own >= begin + segment.p_memsz) continue;
      *static_cast<std::pair<char*, size_t>*>(result) = {begin, segment.p_memsz};
      return 1;
    }
    return 0;
  };
  dl_iterate_phdr(look, &found);
  return found;
}

// All ones: NaN as a number, and as an index far outside.
void spoil_shared_memory() {
  const auto [begin, size] = memory_of_thread();
  const dim3 kept[] = {threadIdx, blockIdx, blockDim, gridDim};
  Scheduler* const kept_scheduler = scheduler;
  if (size != 0) std::memset(begin, 0xff, size);
  asm volatile("" : : "r"(&scheduler) : "memory");  // the compiler cannot know that it was among them
  scheduler = kept_scheduler;
  threadIdx = kept[0], blockIdx = kept[1], blockDim = kept[2], gridDim = kept[3];
}

void Scheduler::entry() {
  Scheduler& self = *scheduler;
#ifdef PGL_ASAN_FIBERS
  __sanitizer_finish_switch_fiber(nullptr, &self.home_stack_, &self.home_stack_size_);
#endif
  for (;;) {
    (*self.body_)();
    Fiber& fiber = self.current();
    fiber.state = State::done;
    self.switch_to_scheduler(fiber);
  }
}

}  // namespace

cudaError_t run_grid(const cudaLaunchConfig_t& config, const std::function<void()>& body) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  // A GPU refuses these too.
  if (threads == 0 || threads > 1024 || block.z > 64) return cudaErrorInvalidConfiguration;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaErrorInvalidConfiguration;
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) return cudaErrorInvalidConfiguration;
  if (config.dynamicSmemBytes != 0) return cudaErrorInvalidConfiguration;
  if (scheduler == nullptr) scheduler = new Scheduler;
  blockDim = block;
  gridDim = grid;
  if (seed() != 0) spoil_shared_memory();
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        scheduler->run_block(block, body);
      }
    }
  }
  return cudaSuccess;
}

void synchronize_block() { scheduler->wait(State::waits_for_block); }

uint64_t exchange(uint64_t value, unsigned source) {
  Fiber& fiber = scheduler->current();
  fiber.given = value;
  scheduler->wait(State::waits_for_warp);
  return scheduler->current().received[source];
}

unsigned vote(bool predicate) {
  Fiber& fiber = scheduler->current();
  fiber.given = predicate ? 1 : 0;
  scheduler->wait(State::waits_for_warp);
  unsigned lanes = 0;
  for (unsigned i = 0; i < kWarp; ++i) {
    if (scheduler->current().received[i] != 0) lanes |= 1u << i;
  }
  return lanes;
}

}  // namespace host_cuda
