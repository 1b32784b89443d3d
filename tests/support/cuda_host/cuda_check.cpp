/* Runs the CUDA kernels over random small problems, in buffers of exact size so that a sanitizer sees every
 * stray access, and compares them with the CPU kernels. On a GPU the buffers are managed memory, each of an
 * allocation of its own; exits with 77 where there is none. Built for the host it breaks the rules on purpose
 * too, afterwards.
 *
 *     cuda_check [FIRST LAST]   the problems of these numbers, of 0 to 90
 */
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "attn_sampler.h"

#if defined(ATTN_SAMPLER_CUDA_ON_HOST)
#include "cuda/wgmma.cuh"
#include "problem.h"

extern "C" void cuda_host_shuffle(uint64_t seed);
extern "C" void cuda_host_fail(int launch);
#endif

namespace {

#if defined(ATTN_SAMPLER_CUDA_ON_HOST)
constexpr float kTolerance = 2e-5f; /* of the largest value */

void *allocate(size_t size) {
    void *memory = nullptr;
    return posix_memalign(&memory, 256, size) == 0 ? memory : nullptr;
}
void release(void *memory) { free(memory); }
#else
constexpr float kTolerance = 1e-4f; /* its exponentials are approximate, and its products cut sums short */

void *allocate(size_t size) {
    void *memory = nullptr;
    return cudaMallocManaged(&memory, size) == cudaSuccess ? memory : nullptr;
}
void release(void *memory) { cudaFree(memory); }
#endif

/* Of memory that both processors see. */
template <typename T>
struct Shared {
    using value_type = T;
    Shared() = default;
    template <typename U>
    Shared(const Shared<U> &) {}
    T *allocate(size_t count) {
        void *const memory = ::allocate(count * sizeof(T));
        if (memory == nullptr) {
            printf("out of memory\n");
            exit(1);
        }
        return static_cast<T *>(memory);
    }
    void deallocate(T *memory, size_t) { release(memory); }
    template <typename U>
    bool operator==(const Shared<U> &) const {
        return true;
    }
    template <typename U>
    bool operator!=(const Shared<U> &) const {
        return false;
    }
};

std::mt19937 rng(1);

int pick(std::initializer_list<int> choices) { return choices.begin()[rng() % choices.size()]; }
float normal() { return std::normal_distribution<float>()(rng); }

/* A dense tensor of its own, the last dimensions inner. */
struct Array {
    std::vector<unsigned char, Shared<unsigned char>> bytes;
    attn_sampler_tensor tensor{};

    Array(int dtype, std::vector<int64_t> shape) {
        static const int sizes[] = {4, 2, 2, 8, 1, 1, 1, 4};
        int64_t count = 1;
        tensor.ndim = static_cast<int32_t>(shape.size());
        tensor.dtype = dtype;
        for (size_t i = shape.size(); i-- > 0;) {
            tensor.shape[i] = shape[i];
            tensor.stride[i] = count;
            count *= shape[i];
        }
        bytes.resize(static_cast<size_t>(count * sizes[dtype]));
        bytes.shrink_to_fit();
        tensor.data = bytes.data();
    }
    template <typename T>
    T *data() {
        return reinterpret_cast<T *>(bytes.data());
    }
    template <typename T>
    size_t size() const {
        return bytes.size() / sizeof(T);
    }
    Array &fill_normal(float spread) {
        if (tensor.dtype == ATTN_SAMPLER_FLOAT8_E4M3) { /* any bits but NaN's are a number */
            for (unsigned char &x : bytes)
                x = static_cast<unsigned char>((rng() % 2 != 0 ? 0x80u : 0u) | rng() % 0x48u);
            return *this;
        }
        for (size_t i = 0; i < bytes.size() / (tensor.dtype == ATTN_SAMPLER_FLOAT32 ? 4 : 2); ++i) {
            const float x = spread * normal();
            uint32_t bits;
            memcpy(&bits, &x, 4);
            if (tensor.dtype == ATTN_SAMPLER_FLOAT32)
                data<float>()[i] = x;
            else if (tensor.dtype == ATTN_SAMPLER_BFLOAT16)
                data<uint16_t>()[i] = static_cast<uint16_t>(bits >> 16);
            else /* magnitudes from 2^-14 on */
                data<uint16_t>()[i] =
                    std::fabs(x) < 1e-4f ? 0
                                         : static_cast<uint16_t>((bits >> 16 & 0x8000u) |
                                                                 ((bits & 0x7FFFFFFFu) - (112u << 23)) >> 13);
        }
        return *this;
    }
    /* Rewraps as a view whose memory is the caller's own copy; a vector moves with its object. */
    const attn_sampler_tensor *view() {
        tensor.data = bytes.data();
        return &tensor;
    }
};

void require(attn_sampler_status status) {
    if (status != ATTN_SAMPLER_OK) {
        printf("failed: %s\n", attn_sampler_last_error());
        exit(1);
    }
}

/* Until what was launched has ended. */
void wait() {
    if (const cudaError_t status = cudaStreamSynchronize(nullptr); status != cudaSuccess) {
        printf("failed: %s\n", cudaGetErrorString(status));
        exit(1);
    }
}

/* Calls call(out, exec) on the CPU, then with CUDA in a workspace of exact size. */
template <typename Call>
void on_both(Call call, Array &cpu, Array &cuda) {
    attn_sampler_exec exec{};
    exec.num_threads = 1;
    require(call(cpu, exec));
    exec.device = ATTN_SAMPLER_CUDA;
    void *memory = nullptr;
    attn_sampler_status status = call(cuda, exec);
    if (status == ATTN_SAMPLER_WORKSPACE_TOO_SMALL) {
        exec.workspace_size = exec.workspace_needed;
        memory = allocate(static_cast<size_t>(exec.workspace_size));
        if (memory == nullptr)
            exit(1);
        memset(memory, 0, static_cast<size_t>(exec.workspace_size));
        exec.workspace = memory;
        status = call(cuda, exec);
    }
    require(status);
    wait();
    release(memory);
    float largest = 0.0f;
    for (size_t i = 0; i < cpu.size<float>(); ++i)
        largest = std::fmax(largest, std::fabs(cpu.data<float>()[i]));
    for (size_t i = 0; i < cpu.size<float>(); ++i)
        if (!(std::fabs(cpu.data<float>()[i] - cuda.data<float>()[i]) <= kTolerance * largest)) {
            printf("element %zu: %g on the CPU, %g with CUDA\n", i, static_cast<double>(cpu.data<float>()[i]),
                   static_cast<double>(cuda.data<float>()[i]));
            exit(1);
        }
}

void attention_problem(int index) {
    const int dtype = index % 4 == 3 ? static_cast<int>(ATTN_SAMPLER_FLOAT8_E4M3) : index % 4;
    const bool fills_a_tile = index % 8 < 3; /* of the kernels with wgmma, where the dtype is one of theirs */
    const int64_t batch = pick({1, 2}), kv_heads = pick({1, 2}), heads = kv_heads * pick({1, 3}),
                  rows = fills_a_tile ? 70 : pick({1, 5, 20, 70}),
                  wanted = fills_a_tile ? 130 : pick({1, 9, 40, 130}), headdim = pick({16, 24, 33, 64, 136});
    /* Keys may lie in pages, some of which do not exist, and sequences may have ends of their own. */
    const bool paged = rng() % 3 == 0, has_ends = rng() % 3 == 0;
    const int64_t page_size = paged ? pick({1, 3, 16}) : wanted, pages = paged ? pick({1, 5, 40}) : batch,
                  table_size = (wanted + page_size - 1) / page_size, keys = table_size * page_size;
    Array q(dtype, {batch, heads, rows, headdim}), k(dtype, {pages, kv_heads, page_size, headdim});
    Array table(ATTN_SAMPLER_INT32, {batch, table_size}), ends(ATTN_SAMPLER_INT32, {batch});
    for (size_t i = 0; i < table.size<int32_t>(); ++i)
        table.data<int32_t>()[i] = static_cast<int32_t>(rng() % static_cast<unsigned>(pages + 2)) - 1;
    for (size_t i = 0; i < ends.size<int32_t>(); ++i)
        ends.data<int32_t>()[i] = static_cast<int32_t>(rng() % static_cast<unsigned>(keys + 4)) - 2;
    q.fill_normal(1.0f);
    k.fill_normal(1.0f);
    const int64_t start = fills_a_tile ? 0 : static_cast<int64_t>(rng() % static_cast<unsigned>(keys));
    const int64_t stop =
        fills_a_tile ? keys : start + 1 + static_cast<int64_t>(rng() % static_cast<unsigned>(keys - start));
    Array key_mask(ATTN_SAMPLER_BOOL, {batch, keys}), query_mask(ATTN_SAMPLER_BOOL, {batch, rows});
    Array column_mask(ATTN_SAMPLER_BOOL, {batch, stop - start});
    for (Array *mask : {&key_mask, &query_mask, &column_mask})
        for (unsigned char &x : mask->bytes)
            x = rng() % 4 != 0;
    Array q_descale(ATTN_SAMPLER_FLOAT32, {batch, kv_heads}),
        k_descale(ATTN_SAMPLER_FLOAT32, {batch, kv_heads});
    q_descale.fill_normal(1.0f);
    k_descale.fill_normal(1.0f);
    const bool masked = rng() % 2 != 0, scaled = dtype == ATTN_SAMPLER_FLOAT8_E4M3 && rng() % 4 != 0;
    attn_sampler_attention_params params{};
    params.softmax_scale = 1.0 / std::sqrt(static_cast<double>(headdim));
    params.columns = {start, stop};
    params.rows = {0, rows};
    params.query_start = keys - rows + pick({-2, 0, 3});
    params.causal = rng() % 2 != 0;
    params.softmax_scope = rng() % 4 == 0;
    params.diagonal = rng() % 3 != 0;
    params.reduction = static_cast<int32_t>(rng() % 3);
    params.per_head = rng() % 2 != 0;
    params.window_left = pick({-1, -1, 0, 7, 50});
    params.window_right = pick({-1, -1, 0, 7, 50});
    if (has_ends) {
        params.columns = {start - keys, stop - keys};
        params.query_start -= keys;
    }
    const int64_t columns = stop - start;
    auto run = [&](auto function, std::vector<int64_t> shape) {
        Array cpu(ATTN_SAMPLER_FLOAT32, shape), cuda(ATTN_SAMPLER_FLOAT32, shape);
        const attn_sampler_layer layer = {q.view(), k.view(), nullptr, scaled ? q_descale.view() : nullptr,
                                          scaled ? k_descale.view() : nullptr};
        const attn_sampler_masks masks = {masked ? key_mask.view() : nullptr,
                                          masked ? query_mask.view() : nullptr,
                                          masked ? column_mask.view() : nullptr,
                                          paged ? table.view() : nullptr, has_ends ? ends.view() : nullptr};
        on_both(
            [&](Array &out, attn_sampler_exec &exec) {
                const bool given = masked || paged || has_ends;
                return function(&layer, given ? &masks : nullptr, &params, out.view(), &exec);
            },
            cpu, cuda);
    };
    if (rng() % 2 == 0)
        run(attn_sampler_column_scores, params.per_head ? std::vector<int64_t>{batch, heads, columns}
                                                        : std::vector<int64_t>{batch, columns});
    else {
        std::vector<int64_t> shape = {batch, rows};
        if (params.per_head)
            shape.insert(shape.begin() + 1, heads);
        if (params.reduction == ATTN_SAMPLER_MAP_REDUCTION_NONE)
            shape.push_back(columns);
        run(attn_sampler_attention_map, shape);
    }
}

void confidence_problem(int index) {
    const int64_t batch = 2, positions = pick({1, 3}), vocab = pick({2, 31, 1000, 5003});
    Array logits(index % 3, {batch, positions, vocab});
    logits.fill_normal(2.0f);
    attn_sampler_sampling_params params{};
    params.metric = static_cast<int32_t>(rng() % 3);
    params.temperature = pick({0, 1});
    params.seed = rng();
    params.exclude_token_id = static_cast<int64_t>(rng() % static_cast<unsigned>(vocab + 1)) - 1;
    Array ids(ATTN_SAMPLER_INT64, {batch, positions}), other(ATTN_SAMPLER_INT64, {batch, positions});
    Array standing(ATTN_SAMPLER_INT64, {batch, positions}),
        confidence(ATTN_SAMPLER_FLOAT32, {batch, positions}),
        log_prob(ATTN_SAMPLER_FLOAT32, {batch, positions});
    for (size_t i = 0; i < standing.size<int64_t>(); ++i)
        standing.data<int64_t>()[i] = static_cast<int64_t>(rng() % static_cast<unsigned>(vocab));
    Array cpu(ATTN_SAMPLER_FLOAT32, {batch, positions}), cuda(ATTN_SAMPLER_FLOAT32, {batch, positions});
    on_both(
        [&](Array &out, attn_sampler_exec &exec) {
            Array &tokens = exec.device == ATTN_SAMPLER_CPU ? ids : other;
            const bool is_compared =
                index % 2 == 0; /* either the confidence or what is asked for beside it */
            return attn_sampler_token_confidence(
                logits.view(), is_compared ? nullptr : standing.view(), &params, tokens.view(),
                (is_compared ? out : confidence).view(), is_compared ? nullptr : log_prob.view(),
                is_compared ? nullptr : out.view(), &exec);
        },
        cpu, cuda);
    if (ids.bytes != other.bytes) {
        printf("different tokens\n");
        exit(1);
    }
}

/* Scores and confidence are given: what is selected, what is revised and the budget are the same bytes. */
void selection_problem() {
    const int64_t batch = 2, columns = pick({1, 30, 200, 300});
    Array scores(ATTN_SAMPLER_FLOAT32, {batch, columns}), confidence(ATTN_SAMPLER_FLOAT32, {batch, columns}),
        current(ATTN_SAMPLER_FLOAT32, {batch, columns}), masked(ATTN_SAMPLER_BOOL, {batch, columns}),
        differs(ATTN_SAMPLER_BOOL, {batch, columns});
    for (Array *array : {&scores, &confidence, &current})
        for (size_t i = 0; i < array->size<float>(); ++i)
            array->data<float>()[i] = static_cast<float>(rng() % 9) / 8.0f;
    for (Array *array : {&masked, &differs})
        for (unsigned char &x : array->bytes)
            x = rng() % 2;
    attn_sampler_selection_params params{};
    params.rule = pick({0, 1, 2});
    params.fallback = pick({0, 1});
    params.tau = params.replace_tau = params.remask_tau = 0.5;
    params.max_revisions = pick({0, 1, 5, 1000});
    params.revision_order = pick({0, 1, 2});
    attn_sampler_exec exec{};
    exec.num_threads = 1;
    std::vector<unsigned char> answers[2];
    for (const int device : {ATTN_SAMPLER_CPU, ATTN_SAMPLER_CUDA}) {
        exec.device = device;
        Array selected(ATTN_SAMPLER_BOOL, {batch, columns}), revised(ATTN_SAMPLER_UINT8, {batch, columns}),
            budget(ATTN_SAMPLER_INT32, {batch, columns});
        for (size_t i = 0; i < budget.size<int32_t>(); ++i)
            budget.data<int32_t>()[i] = static_cast<int32_t>(i % 3);
        const attn_sampler_revision revision = {budget.view(), revised.view(), current.view(), differs.view(),
                                                nullptr};
        require(attn_sampler_select_tokens(scores.view(), confidence.view(), masked.view(), &params,
                                           selected.view(), &revision, &exec));
        wait();
        for (const Array *array : {&selected, &revised, &budget})
            answers[device].insert(answers[device].end(), array->bytes.begin(), array->bytes.end());
    }
    if (answers[0] != answers[1]) {
        printf("different selections or revisions\n");
        exit(1);
    }
}

/* A whole step of several layers: of the heads' dimensions that the kernels are made for, rows that fill
 * their tiles and rows that do not. */
void step_problem(int index) {
    const int dtype = index % 3;
    const int64_t batch = pick({1, 2, 3}), kv_heads = 2, heads = kv_heads * pick({1, 2}),
                  headdim = 32 * pick({1, 2, 3, 4}), columns = pick({4, 8, 32, 70}),
                  rows = columns + pick({0, 1, 40}), keys = rows + pick({0, 30}), vocab = pick({50, 1031});
    constexpr int kLayers = 3;
    const bool given = rng() % 2 != 0;
    std::vector<Array> q, k;
    Array lse(ATTN_SAMPLER_FLOAT32, {batch, heads, rows}), logits(pick({0, 1, 2}), {batch, columns, vocab});
    for (int i = 0; i < kLayers; ++i) {
        q.emplace_back(dtype, std::vector<int64_t>{batch, heads, rows, headdim}).fill_normal(1.0f);
        k.emplace_back(dtype, std::vector<int64_t>{batch, kv_heads, keys, headdim}).fill_normal(1.0f);
    }
    lse.fill_normal(1.0f);
    logits.fill_normal(2.0f);
    std::vector<attn_sampler_layer> layers;
    for (int i = 0; i < kLayers; ++i)
        layers.push_back({q[static_cast<size_t>(i)].view(), k[static_cast<size_t>(i)].view(),
                          given ? lse.view() : nullptr, nullptr, nullptr});
    attn_sampler_decode_step_params params{};
    params.block = {keys - columns, keys};
    params.mask_token_id = vocab - 1;
    params.attention.columns = params.block;
    params.attention.query_start = keys - rows;
    params.attention.softmax_scale = 1.0 / std::sqrt(static_cast<double>(headdim));
    params.attention.diagonal = 1;
    params.attention.window_left = params.attention.window_right = -1;
    params.selection.tau = 0.2;
    params.query_rows = pick({0, 1});
    Array cpu(ATTN_SAMPLER_FLOAT32, {batch, columns}), cuda(ATTN_SAMPLER_FLOAT32, {batch, columns}),
        confidence(ATTN_SAMPLER_FLOAT32, {batch, columns}), selected(ATTN_SAMPLER_BOOL, {batch, columns});
    Array start(ATTN_SAMPLER_INT64, {batch, keys});
    for (size_t i = 0; i < start.size<int64_t>(); ++i)
        start.data<int64_t>()[i] = rng() % 2 == 0 ? vocab - 1 : 1;
    Array tokens[] = {start, start},
          ids[] = {{ATTN_SAMPLER_INT64, {batch, columns}}, {ATTN_SAMPLER_INT64, {batch, columns}}};
    on_both(
        [&](Array &scores, attn_sampler_exec &exec) {
            return attn_sampler_decode_step(tokens[exec.device].view(), logits.view(), layers.data(), kLayers,
                                            nullptr, &params, scores.view(), ids[exec.device].view(),
                                            confidence.view(), selected.view(), nullptr, &exec);
        },
        cpu, cuda);
    if (ids[0].bytes != ids[1].bytes || tokens[0].bytes != tokens[1].bytes) {
        printf("different tokens in a step\n");
        exit(1);
    }
}

#if defined(ATTN_SAMPLER_CUDA_ON_HOST)

/* Two layers of different shapes take two launches. Where the second fails, the first has counted parts of a
 * step that does not end; the next call must not find them. */
void failing_launch() {
    const int64_t rows = 3, vocab = 20;
    Array q[] = {{ATTN_SAMPLER_FLOAT32, {1, 1, rows, 16}}, {ATTN_SAMPLER_FLOAT32, {1, 1, rows, 24}}};
    Array k[] = {{ATTN_SAMPLER_FLOAT32, {1, 1, rows, 16}}, {ATTN_SAMPLER_FLOAT32, {1, 1, rows, 24}}};
    Array lse(ATTN_SAMPLER_FLOAT32, {1, 1, rows}), logits(ATTN_SAMPLER_FLOAT32, {1, rows, vocab}),
        tokens(ATTN_SAMPLER_INT64, {1, rows}), ids(ATTN_SAMPLER_INT64, {1, rows}),
        selected(ATTN_SAMPLER_BOOL, {1, rows}), confidence(ATTN_SAMPLER_FLOAT32, {1, rows});
    for (Array *array : {q, q + 1, k, k + 1, &lse, &logits})
        array->fill_normal(1.0f);
    attn_sampler_layer layers[2];
    for (int i = 0; i < 2; ++i)
        layers[i] = {q[i].view(), k[i].view(), lse.view(), nullptr, nullptr};
    attn_sampler_decode_step_params params{};
    params.block = params.attention.columns = {0, rows};
    params.attention.softmax_scale = 1.0;
    params.attention.window_left = params.attention.window_right = -1;
    Array cpu(ATTN_SAMPLER_FLOAT32, {1, rows}), cuda(ATTN_SAMPLER_FLOAT32, {1, rows});
    on_both(
        [&](Array &scores, attn_sampler_exec &exec) {
            auto step = [&] {
                memset(tokens.bytes.data(), 0, tokens.bytes.size());
                return attn_sampler_decode_step(tokens.view(), logits.view(), layers, 2, nullptr, &params,
                                                scores.view(), ids.view(), confidence.view(), selected.view(),
                                                nullptr, &exec);
            };
            if (exec.workspace_size > 0) {
                cuda_host_fail(2);
                const bool failed = step() == ATTN_SAMPLER_INTERNAL_ERROR;
                const auto *const counters = static_cast<const uint32_t *>(exec.workspace);
                if (!failed || std::count(counters, counters + (1 << 14), 0) != 1 << 14) {
                    printf("a failed launch left tickets\n");
                    exit(1);
                }
                printf("reported: %s\n", attn_sampler_last_error());
            }
            return step();
        },
        cpu, cuda);
}

void two_barriers(int) {
    if (threadIdx.x < 40)
        __syncthreads();
    else
        __syncthreads();
}
void missing_threads(int) {
    if (threadIdx.x < 64)
        __syncthreads();
}
void missing_lanes(int) {
    if (threadIdx.x % 32 < 31)
        __shfl_xor_sync(0xFFFFFFFFu, 1, 1);
}
/* Where a sanitizer would stop the program, the write goes unseen by it and is found afterwards. */
#if defined(__SANITIZE_ADDRESS__)
__attribute__((no_sanitize("address")))
#endif
void stray_write(int) {
    cuda_host::shared_memory()[1024 + threadIdx.x % 8] = 1;
}

/* A product with the matrix that starts at this vector of the shared memory. */
void multiply(int first, bool fenced) {
    using namespace attn_sampler::cuda;
    uint4 a[1][2] = {};
    float c[kWgmmaTiles][4] = {};
    if (fenced)
        wgmma_fence(a, c);
    wgmma(c, {0, 0, 0, 0}, keys_descriptor(reinterpret_cast<uint4 *>(cuda_host::shared_memory()) + first),
          BFloat16{});
    wgmma_wait(c);
}
void product_without_fence(int) { multiply(0, false); }
void product_out_of_bounds(int) { multiply(257, true); }
void product_of_two_matrices(int) { multiply(threadIdx.x < 64 ? 0 : 8, true); }
void product_of_three_warps(int) {
    if (threadIdx.x >= 32)
        multiply(0, true);
}
void product_of_unpublished(int) {
    static const uint4 zeros{};
    attn_sampler::cuda::copy_async(reinterpret_cast<uint4 *>(cuda_host::shared_memory()) + threadIdx.x,
                                   &zeros, true);
    attn_sampler::cuda::copy_wait<0>();
    __syncthreads();
    multiply(0, true);
}

void starts_without_waiting(int) {}

void must_fail(void (*kernel)(int), size_t shared_bytes, bool starts_early = false) {
    cudaLaunchAttribute early{cudaLaunchAttributeProgrammaticStreamSerialization, {1}};
    const cudaLaunchConfig_t config{dim3(1), dim3(128), shared_bytes, nullptr, &early, starts_early};
    if (cudaLaunchKernelEx(&config, kernel, 0) == cudaSuccess) {
        printf("a broken kernel passed\n");
        exit(1);
    }
    printf("reported: %s\n", cudaGetErrorString(cudaErrorLaunchFailure));
}

#endif

} // namespace

int main(int argc, char **argv) {
    if (const char *const reason = attn_sampler_cuda_unavailable()) {
        printf("skipped: %s\n", reason);
        return 77;
    }
    const int first = argc == 3 ? atoi(argv[1]) : 0, last = argc == 3 ? atoi(argv[2]) : 90;
    for (int i = first; i < last; ++i) {
        rng.seed(static_cast<unsigned>(i));
#if defined(ATTN_SAMPLER_CUDA_ON_HOST)
        cuda_host_shuffle(static_cast<uint64_t>(i));
#endif
        attention_problem(i);
        confidence_problem(i);
        selection_problem();
        if (i % 3 == 0)
            step_problem(i / 3);
    }
#if defined(ATTN_SAMPLER_CUDA_ON_HOST)
    failing_launch();
    for (void (*kernel)(int) : {two_barriers, missing_threads, missing_lanes, stray_write})
        must_fail(kernel, 1024);
    for (void (*kernel)(int) : {product_without_fence, product_out_of_bounds, product_of_two_matrices,
                                product_of_three_warps, product_of_unpublished})
        must_fail(kernel, 8192); /* a matrix is 4096 bytes long */
    must_fail(starts_without_waiting, 1024, true);
#endif
    printf("all agree\n");
    return 0;
}
