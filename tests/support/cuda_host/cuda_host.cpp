#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <ucontext.h>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace cuda_host {

Index thread_index, block_index;

namespace {

constexpr size_t kStack = 128 * 1024;
constexpr size_t kGuard = 128;            /* bytes before and after the shared memory */
constexpr int kLargestShared = 99 * 1024; /* of a block, on the smallest device served (sm_120) */
constexpr int kWithoutAsking = 48 * 1024;
constexpr uint32_t kSharedStart = 1024;                       /* address of the launch's shared memory */
constexpr unsigned kResident = 3;                             /* blocks that run at the same time */
constexpr unsigned char kGuardByte = 0xA5, kUnwritten = 0xFF; /* floats of the latter are NaN */

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
    bool fenced = false;
    float *accumulators = nullptr;  /* of the products in flight */
    float in_flight[kAccumulators]; /* what they will hold */
};

struct Block {
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    Meeting barrier;
    bool votes[2] = {};
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
    char failure[256];
};

std::mutex mutex; /* one launch at a time */
Launch *current = nullptr;
Block *block = nullptr;
Thread *thread = nullptr;
Place scheduler;
const void *scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;
std::map<AnyKernel, int> shared_limit;
std::vector<std::unique_ptr<unsigned char[]>> stacks; /* of the resident blocks' threads, kept */
std::string last_failure;
int device = 0, processors = 2, launches = 0, launch_device = -1, products = 0;
std::mt19937_64 random_order(0);

/* Leaves a stack for another; returns when something leaves for this one. After a fiber's first entry no
 * signal mask is saved, which would take a system call each time. */
#if defined(__SANITIZE_ADDRESS__)
void leave(Place &from, Place &to, const void *stack, size_t size, bool forever) {
    __sanitizer_start_switch_fiber(forever ? nullptr : &from.fake_stack, stack, size);
    swapcontext(&from.context, &to.context);
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
}
#else
__attribute__((noinline)) void leave(Place &from, Place &to, const void *, size_t, bool) {
    if (__builtin_setjmp(from.jump) != 0)
        return;
    if (to.entered)
        __builtin_longjmp(to.jump, 1);
    to.entered = true;
    setcontext(&to.context);
}
#endif

void enter_scheduler(bool forever) {
    leave(thread->place, scheduler, scheduler_stack, scheduler_stack_size, forever);
}

void fiber() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
    current->call(current->kernel, current->argument);
    thread->done = true;
    enter_scheduler(true);
}

void enter_fiber(Thread &t) {
    thread = &t;
    thread_index.x = t.index;
    leave(scheduler, t.place, t.stack, kStack, false);
}

const char *file_name(const char *path) {
    const char *const slash = strrchr(path, '/');
    return slash != nullptr ? slash + 1 : path;
}

/* A failed block's threads are left where they are, so nothing on their stacks may own memory. */
void fail(const char *format, ...) {
    if (current->failure[0] == '\0') {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(current->failure, sizeof(current->failure), format, arguments);
        va_end(arguments);
    }
    enter_scheduler(false);
}

void meet(Meeting &m, unsigned expected, const char *kind, const char *file, int line) {
    if (m.arrived == 0) {
        m.file = file;
        m.line = line;
    } else if (m.line != line || strcmp(m.file, file) != 0) {
        fail("thread %u is at %s %s:%d while others are at %s:%d", thread->index, kind, file_name(file), line,
             file_name(m.file), m.line);
    }
    if (++m.arrived == expected) {
        m.arrived = 0;
        ++m.generation;
        return;
    }
    thread->waits_for = &m;
    thread->until = m.generation + 1;
    enter_scheduler(false);
    thread->waits_for = nullptr;
}

bool is_waiting(const Thread &t) { return t.waits_for != nullptr && t.waits_for->generation < t.until; }

void describe_deadlock() {
    size_t ended = 0;
    const Thread *waiting = nullptr;
    for (const Thread &t : block->threads) {
        ended += t.done;
        if (!t.done && waiting == nullptr)
            waiting = &t;
    }
    snprintf(current->failure, sizeof(current->failure),
             "thread %u waits at %s:%d for threads that never come (%zu of %zu have ended)", waiting->index,
             file_name(waiting->waits_for->file), waiting->waits_for->line, ended, block->threads.size());
}

bool failed() { return current->failure[0] != '\0'; }

void begin_block(Block &b, unsigned index) {
    const size_t shared_bytes = current->shared_bytes;
    unsigned char *const memory =
        static_cast<unsigned char *>(std::aligned_alloc(128, (shared_bytes + 2 * kGuard + 127) / 128 * 128));
    b.shared = memory + kGuard;
    memset(memory, kGuardByte, kGuard);
    memset(b.shared, kUnwritten, shared_bytes);
    memset(b.shared + shared_bytes, kGuardByte, kGuard);
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(memory, kGuard);
    __asan_poison_memory_region(b.shared + shared_bytes, kGuard);
#endif
    b.index = index;
    b.running = b.threads.size();
    b.barrier = Meeting{};
    b.unpublished.assign((shared_bytes + 15) / 16, false);
    b.matrices.clear();
    for (Warp &w : b.warps)
        w.meeting = Meeting{};
    b.order.clear();
    for (Thread &t : b.threads) {
        t.warp_turn = t.block_turn = 0;
        t.waits_for = nullptr;
        t.done = false;
        t.copies.clear();
        t.unpublished.clear();
        t.products.clear();
        t.open_group = t.closed_groups = 0;
        t.n_products = 0;
        t.fenced = false;
        t.accumulators = nullptr;
        ucontext_t &context = t.place.context;
        getcontext(&context);
        context.uc_stack.ss_sp = t.stack;
        context.uc_stack.ss_size = kStack;
        context.uc_link = nullptr;
        makecontext(&context, fiber, 0);
        t.place.entered = false;
        b.order.push_back(&t);
    }
    std::shuffle(b.order.begin(), b.order.end(), random_order);
}

/* Runs those threads of some of its warps that do not wait, each until it does. */
bool run_warps(Block &b, uint64_t warps) {
    bool progress = false;
    for (Thread *t : b.order) {
        if (t->done || is_waiting(*t) || (warps >> (t->index / 32) & 1) == 0)
            continue;
        progress = true;
        enter_fiber(*t);
        b.running -= t->done;
        if (failed())
            break;
    }
    return progress;
}

void end_block(Block &b) {
    unsigned char *const before = b.shared - kGuard, *const after = b.shared + current->shared_bytes;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(before, kGuard);
    __asan_unpoison_memory_region(after, kGuard);
#endif
    auto untouched = [](const unsigned char *guard) {
        return std::all_of(guard, guard + kGuard, [](unsigned char byte) { return byte == kGuardByte; });
    };
    if (!failed() && !(untouched(before) && untouched(after)))
        snprintf(current->failure, sizeof(current->failure), "a write beyond the %zu bytes of shared memory",
                 current->shared_bytes);
    for (const Thread &t : b.threads)
        if (!failed() && t.n_products != b.matrices.size())
            snprintf(current->failure, sizeof(current->failure),
                     "thread %u took part in %zu of the block's %zu products", t.index, t.n_products,
                     b.matrices.size());
    std::free(before);
    b.shared = nullptr;
}

} // namespace

unsigned char *shared_memory() { return block->shared; }

bool meet_block(bool vote, const char *file, int line) {
    const int turn = thread->block_turn;
    thread->block_turn ^= 1;
    block->votes[turn] = (block->barrier.arrived > 0 && block->votes[turn]) || vote;
    meet(block->barrier, static_cast<unsigned>(block->threads.size()), "the barrier", file, line);
    return block->votes[turn];
}

const void *meet_warp(const void *value, size_t size, const char *file, int line) {
    if (size > 64)
        fail("a warp-wide operation on more than 64 bytes");
    unsigned char *const slot = thread->warp->slot[thread->warp_turn];
    thread->warp_turn ^= 1;
    memcpy(slot + thread->index % 32 * size, value, size);
    meet(thread->warp->meeting, 32, "the warp-wide operation", file, line);
    return slot;
}

namespace {

size_t vector_index(const void *p) {
    return static_cast<size_t>(static_cast<const unsigned char *>(p) - block->shared) / 16;
}

} // namespace

void arrive(const Copy &copy) { *copy.to = copy.from != nullptr ? *copy.from : uint4{0, 0, 0, 0}; }

void copy_later(uint4 *to, const void *from) {
    const Copy copy = {to, static_cast<const uint4 *>(from), thread->open_group};
    if (random_order() % 2 == 0)
        arrive(copy);
    else
        thread->copies.push_back(copy);
    thread->unpublished.push_back(copy);
    block->unpublished[vector_index(to)] = true;
}

void close_copy_group() { ++thread->open_group; }

void await_copies(int pending_groups) {
    std::vector<Copy> &copies = thread->copies;
    size_t n = 0;
    for (; n < copies.size() && copies[n].group < thread->open_group - pending_groups; ++n)
        arrive(copies[n]);
    copies.erase(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(n));
    thread->closed_groups = thread->open_group - pending_groups;
}

uint32_t shared_address(const void *p) {
    return kSharedStart + static_cast<uint32_t>(static_cast<const unsigned char *>(p) - block->shared);
}

void publish_copies() {
    std::vector<Copy> &copies = thread->unpublished;
    size_t n = 0;
    for (; n < copies.size() && copies[n].group < thread->closed_groups; ++n)
        block->unpublished[vector_index(copies[n].to)] = false;
    copies.erase(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(n));
}

namespace {

/* Element k of column n. PTX ISA, "Matrix Descriptor Format": bits 0 to 13 are the start address, 16 to 29
 * the leading and 32 to 45 the stride dimension's byte offset, all without their lowest four bits, and 62 to
 * 63 the swizzle, 0 for none. Without one, 8 columns times 16 bytes are 128 bytes in a row, column by column;
 * where elements are contiguous along k, the leading offset is from 16 bytes of a column to its next, and the
 * stride offset from 8 columns to the next. */
float matrix_element(const Product &product, int n, int k) {
    const uint64_t b = product.b;
    auto field = [b](int bit) { return static_cast<uint32_t>(b >> bit & 0x3FFF) << 4; };
    if (b >> 46 != 0)
        fail("a matrix descriptor with a swizzle or a base offset");
    const int64_t offset = int64_t{field(0)} + n / 8 * int64_t{field(32)} + k / 8 * int64_t{field(16)} +
                           n % 8 * 16 + k % 8 * 2 - int64_t{kSharedStart};
    if (offset < 0 || offset + 2 > static_cast<int64_t>(current->shared_bytes))
        fail("a product reads beyond the shared memory");
    if (block->unpublished[static_cast<size_t>(offset) / 16])
        fail("a product reads what was not published");
    uint16_t bits;
    memcpy(&bits, block->shared + offset, 2);
    return product.to_float(bits);
}

void multiply_now() {
    for (const Product &product : thread->products)
        for (int i = 0; i < kAccumulators; ++i)
            for (int k = 0; k < 16; ++k)
                thread->in_flight[i] +=
                    product.a[i / 2 % 2][k] *
                    matrix_element(product, 8 * (i / 4) + 2 * (static_cast<int>(thread->index) % 4) + i % 2,
                                   k);
    thread->products.clear();
}

} // namespace

void fence_products() { thread->fenced = true; }

void multiply_later(float *c, const Product &product) {
    if (!thread->fenced)
        fail("a product without a fence before it");
    if (thread->accumulators == nullptr) {
        thread->accumulators = c;
        std::copy_n(c, kAccumulators, thread->in_flight);
        std::fill_n(c, kAccumulators, NAN);
    } else if (thread->accumulators != c) {
        fail("products with different accumulators in flight");
    }
    const size_t n = thread->n_products++;
    if (n == block->matrices.size()) {
        block->matrices.push_back(product.b);
        ++products;
    } else if (block->matrices[n] != product.b) {
        fail("warps multiply by different matrices");
    }
    thread->products.push_back(product);
    if (random_order() % 2 == 0)
        multiply_now();
}

void await_products(float *c) {
    if (thread->accumulators != c)
        fail("products are waited for in other accumulators");
    multiply_now();
    std::copy_n(thread->in_flight, kAccumulators, c);
    thread->accumulators = nullptr;
    thread->fenced = false;
}

cudaError_t set_shared_limit(AnyKernel kernel, int bytes) {
    if (bytes > kLargestShared) {
        last_failure = std::to_string(bytes) + " bytes of shared memory are more than some devices have";
        return cudaErrorInvalidValue;
    }
    shared_limit[kernel] = bytes;
    return cudaSuccess;
}

cudaError_t launch(AnyKernel kernel, void (*call)(AnyKernel, void *), void *argument, unsigned blocks,
                   unsigned threads, size_t shared_bytes) {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto limit = shared_limit.find(kernel);
    if (blocks == 0 || threads == 0 || threads % 32 != 0 ||
        static_cast<int>(shared_bytes) > (limit == shared_limit.end() ? kWithoutAsking : limit->second)) {
        last_failure = "invalid launch configuration";
        return cudaErrorInvalidValue;
    }
    ++launches;
    launch_device = device;
    Launch fresh = {call, kernel, argument, shared_bytes, ""};
    current = &fresh;
    scheduler.entered = true;
    std::vector<unsigned> order(blocks);
    for (unsigned i = 0; i < blocks; ++i)
        order[i] = i;
    std::shuffle(order.begin(), order.end(), random_order);
    std::vector<Block> resident(std::min(blocks, kResident));
    for (size_t r = 0; r < resident.size(); ++r) {
        resident[r].threads.resize(threads);
        resident[r].warps.resize(threads / 32);
        for (unsigned i = 0; i < threads; ++i) {
            Thread &t = resident[r].threads[i];
            t.index = i;
            t.warp = &resident[r].warps[i / 32];
            if (stacks.size() <= r * threads + i)
                stacks.emplace_back(new unsigned char[kStack]);
            t.stack = stacks[r * threads + i].get();
        }
    }
    size_t next = 0;
    std::vector<Block *> running;
    for (Block &b : resident) {
        begin_block(b, order[next++]);
        running.push_back(&b);
    }
    while (!running.empty() && !failed()) {
        const auto turn = running.begin() + static_cast<std::ptrdiff_t>(random_order() % running.size());
        block = *turn;
        block_index.x = block->index;
        if (!run_warps(*block, random_order()) && !run_warps(*block, ~uint64_t{0}))
            describe_deadlock();
        if (block->running > 0 || failed())
            continue;
        end_block(*block);
        if (next < order.size())
            begin_block(*block, order[next++]);
        else
            running.erase(turn);
    }
    if (failed())
        last_failure = "block " + std::to_string(block->index) + ": " + fresh.failure;
    for (Block &b : resident)
        if (b.shared != nullptr)
            end_block(b);
    current = nullptr;
    return fresh.failure[0] == '\0' ? cudaSuccess : cudaErrorLaunchFailure;
}

} // namespace cuda_host

cudaError_t cudaGetDeviceCount(int *count) {
    *count = 2;
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int *device) {
    *device = cuda_host::device;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device > 1) {
        cuda_host::last_failure = "invalid device ordinal";
        return cudaErrorInvalidDevice;
    }
    cuda_host::device = device;
    return cudaSuccess;
}
/* Device 0 is of the kind that has wgmma. */
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device) {
    *value = attribute == cudaDevAttrMultiProcessorCount      ? cuda_host::processors
             : attribute == cudaDevAttrComputeCapabilityMajor ? (device == 0 ? 9 : 8)
                                                              : 100 * 1024;
    return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char *cudaGetErrorString(cudaError_t) { return cuda_host::last_failure.c_str(); }
cudaError_t cudaMalloc(void **memory, size_t size) {
    *memory = std::aligned_alloc(256, (size + 255) / 256 * 256);
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, cudaMemcpyKind) {
    memcpy(to, from, size);
    return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t *stream) {
    *stream = nullptr;
    return cudaSuccess;
}
cudaError_t cudaFree(void *memory) {
    std::free(memory);
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaMemsetAsync(void *memory, int value, size_t size, cudaStream_t) {
    memset(memory, value, size);
    return cudaSuccess;
}

/* Seeds the orders of blocks and threads. */
EXPORT void cuda_host_shuffle(uint64_t seed) { cuda_host::random_order.seed(seed); }
EXPORT int cuda_host_launches() { return cuda_host::launches; }
/* Asynchronous ones, each of a block. */
EXPORT int cuda_host_products() { return cuda_host::products; }
/* The device that was current at the latest launch, and the one that is now. */
EXPORT int cuda_host_launch_device() { return cuda_host::launch_device; }
EXPORT int cuda_host_current_device() { return cuda_host::device; }
