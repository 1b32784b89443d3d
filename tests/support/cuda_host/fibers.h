/* The state of a launch on the host: its blocks, their warps and threads, and what is in flight. */
#ifndef ATTN_SAMPLER_TESTS_FIBERS_H_
#define ATTN_SAMPLER_TESTS_FIBERS_H_

#include <cuda_runtime.h>

#include <random>
#include <ucontext.h>
#include <vector>

namespace cuda_host {

/* Where a set of threads waits for the last of them. */
struct Meeting {
    const char *file = nullptr;
    int line = 0;
    unsigned arrived = 0;
    uint64_t generation = 0;
};

struct Warp {
    Meeting meeting;
    alignas(16) unsigned char slot[2][32 * 64]; /* of two operations in turn: a lane may be one ahead */
};

/* Where a stack was left. */
struct Place {
    ucontext_t context{};
    void *jump[5];
    bool entered = false;
    void *fake_stack = nullptr;
};

struct Copy {
    uint4 *to;
    const uint4 *from; /* null: zeros */
    int group;
};

struct Thread {
    unsigned index = 0;
    Place place;
    unsigned char *stack = nullptr; /* kStack bytes */
    Warp *warp = nullptr;
    int warp_turn = 0, block_turn = 0;
    const Meeting *waits_for = nullptr;
    uint64_t until = 0;
    bool done = false;
    std::vector<Copy> copies;              /* that have not arrived, oldest first */
    std::vector<Copy> unpublished;         /* that products must not read yet */
    int open_group = 0, closed_groups = 0; /* the latter have arrived for certain */
    std::vector<Product> products;         /* that have not happened, oldest first */
    size_t n_products = 0;                 /* of this block so far */
    bool fenced = false, awaited = false;  /* the latter: the launch before this one */
    float *accumulators = nullptr;         /* of the products in flight */
    float in_flight[kAccumulators];        /* what they will hold */
};

struct Block {
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    Meeting barrier;
    int votes[2] = {};
    unsigned char *shared = nullptr;
    unsigned index = 0;
    size_t running = 0; /* threads that have not ended */
    std::vector<Thread *> order;
    std::vector<bool> unpublished;  /* 16 bytes each of the shared memory */
    std::vector<uint64_t> matrices; /* of the block's products */
};

struct Launch {
    void (*call)(AnyKernel, void *);
    AnyKernel kernel;
    void *argument;
    size_t shared_bytes;
    bool starts_early;
    char failure[256];
};

/* What runs now. */
extern Launch *current;
extern Block *block;
extern Thread *thread;
extern std::mt19937_64 random_order;
extern int products; /* asynchronous ones so far, each of a block */

/* Ends the launch with this failure, and does not return. A failed block's threads are left where they are,
 * so nothing on their stacks may own memory. */
void fail(const char *format, ...);

} // namespace cuda_host

#endif /* ATTN_SAMPLER_TESTS_FIBERS_H_ */
