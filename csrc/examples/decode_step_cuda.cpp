/* Decoding a block on the GPU from C++: device memory, a stream and a workspace of the caller's.
 *
 * The step is launched until every masked position is committed, and each step's tokens are compared with
 * those of the CPU kernels on the same problem. Exits with 77 where there is no GPU.
 *
 *     cmake -B build && cmake --build build && ctest --test-dir build
 */
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <utility>
#include <vector>

#include "attn_sampler.h"

namespace {

constexpr int64_t kBatch = 2, kHeads = 4, kKvHeads = 2, kRows = 8, kKeys = 40, kHeaddim = 64, kLayers = 3;
constexpr int64_t kBlock = 8, kTokens = 40, kVocab = 50, kMask = 49;

void require(bool condition, const char *what) {
    if (!condition) {
        fprintf(stderr, "%s: %s\n", what, attn_sampler_last_error());
        exit(EXIT_FAILURE);
    }
}

/* An array on the host and its copy on the device. */
template <typename T>
struct Array {
    std::vector<T> host;
    T *device = nullptr;

    explicit Array(int64_t count) : host(static_cast<size_t>(count)) {
        require(cudaMalloc(reinterpret_cast<void **>(&device), bytes()) == cudaSuccess, "cudaMalloc");
    }
    Array(Array &&other) noexcept
        : host(std::move(other.host)), device(std::exchange(other.device, nullptr)) {}
    ~Array() { cudaFree(device); }
    size_t bytes() const { return host.size() * sizeof(T); }
    void upload() const {
        require(cudaMemcpy(device, host.data(), bytes(), cudaMemcpyHostToDevice) == cudaSuccess,
                "cudaMemcpy");
    }
    std::vector<T> download() const {
        std::vector<T> copy(host.size());
        require(cudaMemcpy(copy.data(), device, bytes(), cudaMemcpyDeviceToHost) == cudaSuccess,
                "cudaMemcpy");
        return copy;
    }
};

attn_sampler_tensor view(void *data, int32_t dtype, std::initializer_list<int64_t> shape) {
    attn_sampler_tensor t{};
    t.data = data;
    t.dtype = dtype;
    t.ndim = static_cast<int32_t>(shape.size());
    int64_t stride = 1;
    for (int i = t.ndim; i-- > 0; stride *= t.shape[i]) {
        t.shape[i] = shape.begin()[i];
        t.stride[i] = stride;
    }
    return t;
}

Array<float> normal(int64_t count, float spread, std::mt19937 &generator) {
    Array<float> array(count);
    std::normal_distribution<float> distribution(0.0f, spread);
    for (float &x : array.host)
        x = distribution(generator);
    array.upload();
    return array;
}

} // namespace

int main() {
    if (const char *const reason = attn_sampler_cuda_unavailable()) {
        printf("skipped: %s\n", reason);
        return 77;
    }
    std::mt19937 generator(0);
    std::vector<Array<float>> q, k;
    for (int64_t layer = 0; layer < kLayers; ++layer) {
        q.push_back(normal(kBatch * kHeads * kRows * kHeaddim, 1.0f, generator));
        k.push_back(normal(kBatch * kKvHeads * kKeys * kHeaddim, 1.0f, generator));
    }
    const Array<float> logits = normal(kBatch * kBlock * kVocab, 3.0f, generator);
    Array<int64_t> tokens(kBatch * kTokens), token_ids(kBatch * kBlock);
    Array<float> scores(kBatch * kBlock), confidence(kBatch * kBlock), current(kBatch * kBlock);
    Array<uint8_t> selected(kBatch * kBlock), revised(kBatch * kBlock);
    Array<int32_t> budget(kBatch * kBlock); /* each position may be masked again once */
    std::fill(budget.host.begin(), budget.host.end(), 1);
    budget.upload();
    for (int64_t i = 0; i < kBatch * kTokens; ++i)
        tokens.host[static_cast<size_t>(i)] = i % kTokens >= kTokens - kBlock ? kMask : i % 7;
    tokens.upload();

    attn_sampler_decode_step_params params{};
    params.block = {kTokens - kBlock, kTokens};
    params.mask_token_id = kMask;
    params.attention.softmax_scale = 0.125;
    params.attention.columns = {kKeys - kBlock, kKeys};
    params.attention.query_start = kKeys - kRows;
    params.attention.diagonal = 1;
    params.attention.window_left = params.attention.window_right = -1;
    params.selection.rule = ATTN_SAMPLER_RULE_PARALLEL;
    params.selection.fallback = ATTN_SAMPLER_FALLBACK_CONFIDENCE;
    params.selection.tau = 0.5;
    params.selection.replace_tau = HUGE_VAL;
    params.selection.remask_tau = 0.5;
    params.selection.max_revisions = 2;
    params.selection.revision_order = ATTN_SAMPLER_REVISION_ORDER_PRODUCT;

    /* The same call for either device. */
    auto step = [&](attn_sampler_exec &exec) {
        const bool on_gpu = exec.device == ATTN_SAMPLER_CUDA;
        auto data = [&](auto &array) {
            return static_cast<void *>(on_gpu ? array.device : array.host.data());
        };
        std::vector<attn_sampler_tensor> q_views, k_views;
        std::vector<attn_sampler_layer> layers;
        for (size_t i = 0; i < q.size(); ++i) {
            q_views.push_back(view(data(q[i]), ATTN_SAMPLER_FLOAT32, {kBatch, kHeads, kRows, kHeaddim}));
            k_views.push_back(view(data(k[i]), ATTN_SAMPLER_FLOAT32, {kBatch, kKvHeads, kKeys, kHeaddim}));
        }
        for (size_t i = 0; i < q.size(); ++i)
            layers.push_back({&q_views[i], &k_views[i], nullptr, nullptr, nullptr});
        const attn_sampler_tensor t = view(data(tokens), ATTN_SAMPLER_INT64, {kBatch, kTokens}),
                                  l = view(const_cast<void *>(static_cast<const void *>(
                                               on_gpu ? logits.device : logits.host.data())),
                                           ATTN_SAMPLER_FLOAT32, {kBatch, kBlock, kVocab}),
                                  s = view(data(scores), ATTN_SAMPLER_FLOAT32, {kBatch, kBlock}),
                                  i = view(data(token_ids), ATTN_SAMPLER_INT64, {kBatch, kBlock}),
                                  c = view(data(confidence), ATTN_SAMPLER_FLOAT32, {kBatch, kBlock}),
                                  m = view(data(selected), ATTN_SAMPLER_BOOL, {kBatch, kBlock}),
                                  b = view(data(budget), ATTN_SAMPLER_INT32, {kBatch, kBlock}),
                                  r = view(data(revised), ATTN_SAMPLER_UINT8, {kBatch, kBlock}),
                                  p = view(data(current), ATTN_SAMPLER_FLOAT32, {kBatch, kBlock});
        const attn_sampler_revision revision = {&b, &r, &p, nullptr, nullptr};
        return attn_sampler_decode_step(&t, &l, layers.data(), kLayers, nullptr, &params, &s, &i, &c, &m,
                                        &revision, &exec);
    };

    attn_sampler_exec cpu{}, gpu{};
    cpu.num_threads = 1;
    gpu.device = ATTN_SAMPLER_CUDA;
    cudaStream_t stream;
    require(cudaStreamCreate(&stream) == cudaSuccess, "cudaStreamCreate");
    gpu.stream = stream;
    /* Without a workspace the call launches nothing and says how much it takes. */
    require(step(gpu) == ATTN_SAMPLER_WORKSPACE_TOO_SMALL, "decode_step");
    gpu.workspace_size = gpu.workspace_needed;
    require(cudaMalloc(&gpu.workspace, static_cast<size_t>(gpu.workspace_size)) == cudaSuccess, "cudaMalloc");
    require(cudaMemsetAsync(gpu.workspace, 0, static_cast<size_t>(gpu.workspace_size), stream) == cudaSuccess,
            "cudaMemsetAsync");

    int steps = 0;
    for (bool masked = true; masked; ++steps) {
        require(step(gpu) == ATTN_SAMPLER_OK, "decode_step");
        require(cudaStreamSynchronize(stream) == cudaSuccess, "cudaStreamSynchronize");
        require(step(cpu) == ATTN_SAMPLER_OK, "decode_step");
        require(tokens.download() == tokens.host, "the GPU's tokens differ from the CPU's");
        require(budget.download() == budget.host, "the GPU's budget differs from the CPU's");
        masked = false;
        for (const int64_t token : tokens.host)
            masked = masked || token == kMask;
    }
    cudaFree(gpu.workspace);
    cudaStreamDestroy(stream);
    printf("CPU and GPU committed the block in the same %d steps\n", steps);
    return EXIT_SUCCESS;
}
