/* Threads for the CPU kernels, a small pool of our own, and their memory.
 *
 * Not OpenMP: torch's wheels carry a private copy of its run-time, and a second one in the process would
 * keep its threads spinning beside torch's.
 */
#ifndef ATTN_SAMPLER_CPU_LAUNCH_H_
#define ATTN_SAMPLER_CPU_LAUNCH_H_

#include <cstdint>
#include <cstdlib>

#include "arithmetic.h"

namespace attn_sampler {

/* Calls task(context, index, worker) for every index in [0, count), in any order, on up to num_threads
 * threads (this one among them); worker is in [0, num_threads) and never at two tasks at once. Tasks must
 * not throw. Safe to call from several threads, from inside a task, and after a fork: where the pool
 * is not free, the calling thread does all the work. */
void parallel_for(int num_threads, int64_t count, void (*task)(void *context, int64_t index, int worker),
                  void *context);

namespace { /* as in cpu/simd/simd.h */

/* The same with task(index, worker). */
template <typename Task>
void parallel_for(int num_threads, int64_t count, Task &task) {
    attn_sampler::parallel_for(
        num_threads, count,
        [](void *context, int64_t index, int worker) { (*static_cast<Task *>(context))(index, worker); },
        &task);
}

/* Memory for each worker and for what they share, from one allocation; false where there was none. */
class Workspace {
  public:
    Workspace(int num_threads, int64_t worker_bytes, int64_t shared_bytes)
        : worker_bytes_(round_up(worker_bytes, 64)), shared_at_(num_threads * worker_bytes_),
          memory_(static_cast<char *>(std::aligned_alloc(
              64, static_cast<size_t>(shared_at_ + round_up(max_of(shared_bytes, 1), 64))))) {}
    ~Workspace() { std::free(memory_); }
    Workspace(const Workspace &) = delete;
    Workspace &operator=(const Workspace &) = delete;

    explicit operator bool() const { return memory_ != nullptr; }
    void *of_worker(int worker) const { return memory_ + worker * worker_bytes_; }
    void *shared() const { return memory_ + shared_at_; }

  private:
    int64_t worker_bytes_, shared_at_;
    char *memory_;
};

} // namespace
} // namespace attn_sampler

#endif /* ATTN_SAMPLER_CPU_LAUNCH_H_ */
