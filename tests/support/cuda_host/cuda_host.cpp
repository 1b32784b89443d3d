#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "fibers.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace cuda_host {

Index thread_index, block_index;
Launch *current = nullptr;
Block *block = nullptr;
Thread *thread = nullptr;
std::mt19937_64 random_order(0);
int products = 0;
int64_t noise_groups = 0;

namespace {

constexpr size_t kStack = 128 * 1024;
constexpr size_t kGuard = 128;            /* bytes before and after the shared memory */
constexpr int kLargestShared = 99 * 1024; /* of a block, on the smallest device served (sm_120) */
constexpr int kWithoutAsking = 48 * 1024;
constexpr unsigned kResident = 3;                             /* blocks that run at the same time */
constexpr unsigned char kGuardByte = 0xA5, kUnwritten = 0xFF; /* floats of the latter are NaN */

constexpr int kProcessors[] = {2, 2, 2, 1, 3, 5, 13, 64, 132, 264, 2}; /* of each device */
constexpr int kDevices = static_cast<int>(std::size(kProcessors));
std::mutex mutex; /* one launch at a time */
Place scheduler;
const void *scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;
std::map<AnyKernel, int> shared_limit;
std::vector<std::unique_ptr<unsigned char[]>> stacks; /* of the resident blocks' threads, kept */
std::string last_failure;
unsigned launch_blocks = 0;
bool launch_starts_early = false;
unsigned contexts = 1; /* a bit for each device: it has a primary context */
int device = 0, launches = 0, launch_device = -1, launches_until_failure = 0;

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

} // namespace

void fail(const char *format, ...) {
    if (current->failure[0] == '\0') {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(current->failure, sizeof(current->failure), format, arguments);
        va_end(arguments);
    }
    enter_scheduler(false);
}

namespace {

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
        t.fenced = t.awaited = false;
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
        if (!failed() && current->starts_early && !t.awaited)
            snprintf(current->failure, sizeof(current->failure),
                     "thread %u has not waited for the launch before", t.index);
    for (const Thread &t : b.threads)
        if (!failed() && t.n_products != b.matrices.size())
            snprintf(current->failure, sizeof(current->failure),
                     "thread %u took part in %zu of the block's %zu products", t.index, t.n_products,
                     b.matrices.size());
    std::free(before);
    b.shared = nullptr;
}

} // namespace

void await_launches() { thread->awaited = true; }

unsigned char *shared_memory() { return block->shared; }

int meet_block(bool vote, const char *file, int line) {
    const int turn = thread->block_turn;
    thread->block_turn ^= 1;
    block->votes[turn] = (block->barrier.arrived > 0 ? block->votes[turn] : 0) + vote;
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

cudaError_t set_shared_limit(AnyKernel kernel, int bytes) {
    if (bytes > kLargestShared) {
        last_failure = std::to_string(bytes) + " bytes of shared memory are more than some devices have";
        return cudaErrorInvalidValue;
    }
    shared_limit[kernel] = bytes;
    return cudaSuccess;
}

cudaError_t launch(AnyKernel kernel, void (*call)(AnyKernel, void *), void *argument, unsigned blocks,
                   unsigned threads, size_t shared_bytes, bool starts_early) {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto limit = shared_limit.find(kernel);
    if (blocks == 0 || threads == 0 || threads % 32 != 0 ||
        static_cast<int>(shared_bytes) > (limit == shared_limit.end() ? kWithoutAsking : limit->second)) {
        last_failure = "invalid launch configuration";
        return cudaErrorInvalidValue;
    }
    if (launches_until_failure > 0 && --launches_until_failure == 0) {
        last_failure = "as was asked for";
        return cudaErrorLaunchFailure;
    }
    ++launches;
    launch_device = device;
    launch_blocks = blocks;
    launch_starts_early = starts_early;
    Launch fresh = {call, kernel, argument, shared_bytes, starts_early, ""};
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

cudaError_t find_image(int *architecture) {
    *architecture = device == 0 ? 90 : 80;
    if (device != 2)
        return cudaSuccess;
    last_failure = "no kernel image is available";
    return cudaErrorNoKernelImageForDevice;
}

} // namespace cuda_host

cudaError_t cudaGetDeviceCount(int *count) {
    *count = cuda_host::kDevices;
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int *device) {
    *device = cuda_host::device;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= cuda_host::kDevices) {
        cuda_host::last_failure = "invalid device ordinal";
        return cudaErrorInvalidDevice;
    }
    cuda_host::device = device;
    cuda_host::contexts |= 1u << device;
    return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned,
                                             unsigned long long, cudaDriverEntryPointQueryResult *) {
    const auto get_state = +[](int device, unsigned *flags, int *is_active) {
        *flags = 0;
        *is_active = static_cast<int>(cuda_host::contexts >> device & 1);
        return 0;
    };
    if (strcmp(symbol, "cuDevicePrimaryCtxGetState") != 0)
        return cudaErrorInvalidValue;
    *function = reinterpret_cast<void *>(get_state);
    return cudaSuccess;
}
/* Device 0 is of the kind that has wgmma, for device 2 there is no code, and device 10 is newer than its. */
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device) {
    *value = attribute == cudaDevAttrMultiProcessorCount      ? cuda_host::kProcessors[device]
             : attribute == cudaDevAttrComputeCapabilityMajor ? (device == 0    ? 9
                                                                 : device == 2  ? 7
                                                                 : device == 10 ? 11
                                                                                : 8)
             : attribute == cudaDevAttrComputeCapabilityMinor ? 0
                                                              : 100 * 1024;
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *version) {
    *version = 13000;
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
/* Lets the launch that is this many away fail: 1 is the next. */
EXPORT void cuda_host_fail(int launch) { cuda_host::launches_until_failure = launch; }
/* The blocks of the latest launch. */
EXPORT int cuda_host_blocks() { return static_cast<int>(cuda_host::launch_blocks); }
EXPORT int cuda_host_launches() { return cuda_host::launches; }
/* Whether the latest may start before the one before it has ended. */
EXPORT int cuda_host_starts_early() { return cuda_host::launch_starts_early; }
/* Asynchronous ones, each of a block. */
EXPORT int cuda_host_products() { return cuda_host::products; }
EXPORT int64_t cuda_host_noise_groups() { return cuda_host::noise_groups; }
/* The device that was current at the latest launch, and the one that is now. */
EXPORT int cuda_host_launch_device() { return cuda_host::launch_device; }
EXPORT int cuda_host_current_device() { return cuda_host::device; }
/* The devices that have a context, a bit each. */
EXPORT unsigned cuda_host_contexts() { return cuda_host::contexts; }
/* Makes a device current, without a context, and says which devices have one. */
EXPORT void cuda_host_become(int device, unsigned contexts) {
    cuda_host::device = device;
    cuda_host::contexts = contexts;
}
