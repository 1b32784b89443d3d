#include "cpu/launch.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace attn_sampler {
namespace {

struct Job {
    void (*task)(void *, int64_t, int);
    void *context;
    int64_t count;
    std::atomic<int64_t> next{0};

    void work(int worker) {
        for (int64_t i = next++; i < count; i = next++)
            task(context, i, worker);
    }
};

class Pool {
  public:
    /* False where another job has the pool. */
    bool run(Job &job, int num_threads) {
        std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
        if (!owner)
            return false;
        grow(num_threads - 1);
        const int helpers = num_helpers_ < num_threads - 1 ? num_helpers_ : num_threads - 1;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            job_ = &job;
            wanted_ = running_ = helpers;
            ++generation_;
        }
        wake_.notify_all();
        job.work(0);
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return running_ == 0; });
        return true;
    }

  private:
    void grow(int helpers) {
        try {
            while (num_helpers_ < helpers) {
                std::thread(&Pool::help, this, num_helpers_ + 1, generation_).detach();
                ++num_helpers_;
            }
        } catch (const std::system_error &) {
            /* No more threads to be had: fewer do the same work, with the same result. */
        }
    }

    void help(int worker, uint64_t seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return generation_ != seen; });
            seen = generation_;
            if (worker > wanted_)
                continue;
            Job &job = *job_;
            lock.unlock();
            job.work(worker);
            lock.lock();
            if (--running_ == 0)
                done_.notify_one();
        }
    }

    std::mutex owner_; /* held by the thread whose job runs */
    int num_helpers_ = 0;

    std::mutex mutex_; /* guards what follows */
    std::condition_variable wake_, done_;
    Job *job_ = nullptr;
    int wanted_ = 0, running_ = 0;
    uint64_t generation_ = 0;
};

Pool *pool = nullptr;

/* The pool outlives everything: its threads sleep until the process ends. A forked child has none of
 * them, so it starts anew. */
void start_anew() { pool = new (std::nothrow) Pool; }

Pool *the_pool() {
    static const bool started = [] {
        start_anew();
        pthread_atfork(nullptr, nullptr, start_anew);
        return true;
    }();
    return started ? pool : nullptr;
}

} // namespace

void parallel_for(int num_threads, int64_t count, void (*task)(void *, int64_t, int), void *context) {
    Job job{task, context, count, {}};
    if (num_threads > count)
        num_threads = static_cast<int>(count);
    if (num_threads > 1) {
        Pool *const p = the_pool();
        if (p != nullptr && p->run(job, num_threads))
            return;
    }
    job.work(0);
}

} // namespace attn_sampler
