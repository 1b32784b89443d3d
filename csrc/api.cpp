/* The C API: checks every argument, then hands a validated problem to the kernels of the device. */
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <exception>
#include <new>
#include <vector>

#include "attn_sampler.h"
#include "cpu/kernels.h"
#include "cpu/select.h"
#include "cuda/kernels.h"
#include "version.h"

namespace attn_sampler {
namespace {

thread_local char last_error[512] = "";

struct Failure {
    attn_sampler_status status;
};

[[noreturn]] __attribute__((format(printf, 2, 3))) void fail(attn_sampler_status status, const char *format,
                                                             ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof(last_error), format, arguments);
    va_end(arguments);
    throw Failure{status};
}

/* Says of a failure that names a tensor of a layer which layer it is about. */
void name_layer_in_error(int64_t layer) {
    bool of_layer = false;
    for (const char *const start : {"q:", "k:", "softmax_lse:", "q_descale:", "k_descale:"})
        of_layer = of_layer || strncmp(last_error, start, strlen(start)) == 0;
    if (!of_layer)
        return;
    char message[sizeof(last_error)];
    snprintf(message, sizeof(message), "layers[%lld].%.400s", static_cast<long long>(layer), last_error);
    memcpy(last_error, message, sizeof(message));
}

/* Runs an entry point's body; no exception leaves the library. */
template <typename Body>
attn_sampler_status guarded(Body body) {
    try {
        last_error[0] = '\0';
        body();
        return ATTN_SAMPLER_OK;
    } catch (const Failure &failure) {
        return failure.status;
    } catch (const std::bad_alloc &) {
        snprintf(last_error, sizeof(last_error), "out of memory");
        return ATTN_SAMPLER_OUT_OF_MEMORY;
    } catch (const cuda::Error &error) {
        snprintf(last_error, sizeof(last_error), "%s", error.what());
        return error.status();
    } catch (const std::exception &error) {
        snprintf(last_error, sizeof(last_error), "%s", error.what());
        return ATTN_SAMPLER_INTERNAL_ERROR;
    }
}

void require_memory(bool done) {
    if (!done)
        throw std::bad_alloc();
}

using Tensor = attn_sampler_tensor;

const char *dtype_name(int dtype) {
    static const char *const names[] = {"float32", "float16", "bfloat16", "int64", "bool", "float8_e4m3"};
    return dtype >= 0 && dtype < 6 ? names[dtype] : "an unknown dtype";
}

void check_tensor(const char *name, const Tensor *t, int ndim) {
    if (t == nullptr)
        fail(ATTN_SAMPLER_INVALID_ARGUMENT, "%s: expected a tensor, got NULL", name);
    if (t->ndim != ndim)
        fail(ATTN_SAMPLER_INVALID_ARGUMENT, "%s: expected %d dimensions, got %d", name, ndim, t->ndim);
    bool empty = false;
    for (int i = 0; i < ndim; ++i) {
        if (t->shape[i] < 0)
            fail(ATTN_SAMPLER_INVALID_ARGUMENT, "%s: expected sizes >= 0, got %lld in dimension %d", name,
                 static_cast<long long>(t->shape[i]), i);
        empty = empty || t->shape[i] == 0;
    }
    if (t->data == nullptr && !empty)
        fail(ATTN_SAMPLER_INVALID_ARGUMENT, "%s: expected an address, got NULL", name);
}

void check_dtype(const char *name, const Tensor *t, int dtype) {
    if (t->dtype != dtype)
        fail(ATTN_SAMPLER_INVALID_ARGUMENT, "%s: expected dtype %s, got %s", name, dtype_name(dtype),
             dtype_name(t->dtype));
}

void check_float(const char *name, const Tensor *t, bool may_be_float8 = false) {
    if (t->dtype != ATTN_SAMPLER_FLOAT32 && t->dtype != ATTN_SAMPLER_FLOAT16 &&
        t->dtype != ATTN_SAMPLER_BFLOAT16 && !(may_be_float8 && t->dtype == ATTN_SAMPLER_FLOAT8_E4M3))
        fail(ATTN_SAMPLER_INVALID_ARGUMENT, "%s: expected dtype float32, float16%s, got %s", name,
             may_be_float8 ? ", bfloat16 or float8_e4m3" : " or bfloat16", dtype_name(t->dtype));
    const int last = t->ndim - 1;
    if (t->shape[last] > 1 && t->stride[last] != 1)
        fail(ATTN_SAMPLER_INVALID_ARGUMENT, "%s: expected a contiguous last dimension, got stride %lld", name,
             static_cast<long long>(t->stride[last]));
}

void check_size(const char *name, const Tensor *t, int dimension, int64_t expected) {
    if (t->shape[dimension] != expected)
        fail(ATTN_SAMPLER_INVALID_ARGUMENT, "%s: expected size %lld in dimension %d, got %lld", name,
             static_cast<long long>(expected), dimension, static_cast<long long>(t->shape[dimension]));
}

/* A tensor of this dtype and shape; may be NULL where optional. */
void check_like(const char *name, const Tensor *t, int dtype, std::initializer_list<int64_t> shape,
                bool optional = false) {
    if (optional && t == nullptr)
        return;
    check_tensor(name, t, static_cast<int>(shape.size()));
    check_dtype(name, t, dtype);
    int i = 0;
    for (const int64_t size : shape)
        check_size(name, t, i++, size);
}

/* A tensor to be written: its elements are apart in memory. */
void check_apart(const char *name, const Tensor *t) {
    for (int i = 0; i < t->ndim; ++i)
        if (t->shape[i] == 0)
            return;
    for (int i = 0; i < t->ndim; ++i) {
        if (t->shape[i] < 2)
            continue;
        /* A stride steps over all that the dimensions of smaller strides reach; of equal ones, none can. */
        int64_t reach = 0;
        for (int j = 0; j < t->ndim; ++j)
            if (t->shape[j] > 1 && j != i && t->stride[j] <= t->stride[i])
                reach += (t->shape[j] - 1) * t->stride[j];
        if (t->stride[i] <= reach)
            fail(ATTN_SAMPLER_INVALID_ARGUMENT,
                 "%s: expected elements that are apart in memory, got stride %lld in dimension %d", name,
                 static_cast<long long>(t->stride[i]), i);
    }
}

void check_output(const char *name, const Tensor *t, int dtype, std::initializer_list<int64_t> shape) {
    check_like(name, t, dtype, shape);
    check_apart(name, t);
}

void check_choice(const char *name, int value, int count) {
    if (value < 0 || value >= count)
        fail(ATTN_SAMPLER_INVALID_ARGUMENT, "%s: expected 0 to %d, got %d", name, count - 1, value);
}

void check_range(const char *name, int64_t start, int64_t stop, int64_t size) {
    if (start < 0 || start >= stop || stop > size)
        fail(ATTN_SAMPLER_INVALID_ARGUMENT, "%s: expected 0 <= start < stop <= %lld, got [%lld, %lld)", name,
             static_cast<long long>(size), static_cast<long long>(start), static_cast<long long>(stop));
}

template <typename Params>
void check_params(const Params *params) {
    if (params == nullptr)
        fail(ATTN_SAMPLER_INVALID_ARGUMENT, "params: expected an address, got NULL");
}

/* The CPU threads to use. */
int check_exec(const attn_sampler_exec *exec) {
    if (exec == nullptr)
        fail(ATTN_SAMPLER_INVALID_ARGUMENT, "exec: expected an address, got NULL");
    check_choice("exec.device", exec->device, 2);
    if (exec->device == ATTN_SAMPLER_CUDA) {
        if (const char *const reason = attn_sampler_cuda_unavailable())
            fail(ATTN_SAMPLER_UNSUPPORTED, "exec.device: %s", reason);
        if (exec->workspace_size < 0 || (exec->workspace == nullptr && exec->workspace_size > 0))
            fail(ATTN_SAMPLER_INVALID_ARGUMENT, "exec.workspace: expected an address and a size >= 0");
        if (reinterpret_cast<uintptr_t>(exec->workspace) % 256 != 0)
            fail(ATTN_SAMPLER_INVALID_ARGUMENT, "exec.workspace: expected an address aligned to 256 bytes");
        return 1;
    }
    if (const char *const reason = attn_sampler_cpu_unavailable())
        fail(ATTN_SAMPLER_UNSUPPORTED, "exec.device: %s", reason);
    if (exec->num_threads < 1)
        fail(ATTN_SAMPLER_INVALID_ARGUMENT, "exec.num_threads: expected at least 1, got %d",
             exec->num_threads);
    constexpr int kMostThreads = 256; /* each has memory of its own */
    return exec->num_threads < kMostThreads ? exec->num_threads : kMostThreads;
}

void check_workspace_answer(const int64_t *bytes) {
    if (bytes == nullptr)
        fail(ATTN_SAMPLER_INVALID_ARGUMENT, "bytes: expected an address, got NULL");
}

template <typename To>
void copy_strides(const Tensor *t, To *stride, int count) {
    for (int i = 0; i < count; ++i)
        stride[i] = t->stride[i];
}

/* The scales of float8 q or k, if there are any. */
void check_descale(const char *name, const Tensor *descale, const AttentionProblem &p, const float *&data,
                   int64_t (&stride)[2]) {
    if (descale == nullptr)
        return;
    if (p.dtype != ATTN_SAMPLER_FLOAT8_E4M3)
        fail(ATTN_SAMPLER_INVALID_ARGUMENT, "%s: expected NULL with q and k of dtype %s", name,
             dtype_name(p.dtype));
    check_like(name, descale, ATTN_SAMPLER_FLOAT32, {p.batch, p.kv_heads});
    data = static_cast<const float *>(descale->data);
    copy_strides(descale, stride, 2);
}

/* The options that stand by themselves. */
void check_attention_params(const attn_sampler_attention_params &params) {
    check_choice("params.lse_base", params.lse_base, 2);
    check_choice("params.softmax_scope", params.softmax_scope, 2);
    check_choice("params.reduction", params.reduction, 3);
    check_choice("params.causal", params.causal, 2);
    check_choice("params.diagonal", params.diagonal, 2);
    check_choice("params.per_head", params.per_head, 2);
    check_choice("params.accumulate", params.accumulate, 2);
    /* It is multiplied by log2(e), in float32. */
    if (!(std::fabs(params.softmax_scale) <= 2.35e38))
        fail(ATTN_SAMPLER_INVALID_ARGUMENT,
             "params.softmax_scale: expected a finite number of magnitude up to 2.35e+38, got %g",
             params.softmax_scale);
    /* Row positions are sums with query_start; this bound keeps them far from overflow. */
    if (params.query_start > INT64_MAX / 2 || params.query_start < INT64_MIN / 2)
        fail(ATTN_SAMPLER_INVALID_ARGUMENT, "params.query_start: expected at most 2^62 in size, got %lld",
             static_cast<long long>(params.query_start));
}

/* Everything of an attention problem but its output. */
AttentionProblem check_attention(const attn_sampler_layer &layer, const Tensor *key_mask,
                                 const Tensor *query_mask, const attn_sampler_attention_params &params,
                                 int num_threads) {
    const Tensor *const q = layer.q, *const k = layer.k, *const lse = layer.softmax_lse;
    check_tensor("q", q, 4);
    check_tensor("k", k, 4);
    check_float("q", q, true);
    check_float("k", k, true);
    check_dtype("k", k, q->dtype);
    AttentionProblem p{};
    p.dtype = q->dtype;
    p.batch = q->shape[0];
    p.heads = q->shape[1];
    p.n_rows = q->shape[2];
    p.headdim = q->shape[3];
    p.kv_heads = k->shape[1];
    p.n_keys = k->shape[2];
    check_size("k", k, 0, p.batch);
    check_size("k", k, 3, p.headdim);
    if (p.headdim < 1)
        fail(ATTN_SAMPLER_INVALID_ARGUMENT, "q: expected a head dimension of at least 1, got 0");
    if (p.heads < 1 || p.kv_heads < 1 || p.heads % p.kv_heads != 0)
        fail(ATTN_SAMPLER_INVALID_ARGUMENT,
             "k: expected a number of heads that divides the %lld heads of q, got %lld",
             static_cast<long long>(p.heads), static_cast<long long>(p.kv_heads));
    if (p.n_keys >= 1 << 30)
        fail(ATTN_SAMPLER_UNSUPPORTED, "k: expected fewer than 2^30 keys, got %lld",
             static_cast<long long>(p.n_keys));
    check_like("softmax_lse", lse, ATTN_SAMPLER_FLOAT32, {p.batch, p.heads, p.n_rows}, true);
    check_descale("q_descale", layer.q_descale, p, p.q_descale, p.q_descale_stride);
    check_descale("k_descale", layer.k_descale, p, p.k_descale, p.k_descale_stride);
    check_like("key_mask", key_mask, ATTN_SAMPLER_BOOL, {p.batch, p.n_keys}, true);
    check_like("query_mask", query_mask, ATTN_SAMPLER_BOOL, {p.batch, p.n_rows}, true);
    check_range("params.columns", params.column_start, params.column_stop, p.n_keys);
    check_attention_params(params);
    if (lse != nullptr && params.softmax_scope == ATTN_SAMPLER_SCOPE_BLOCK)
        fail(ATTN_SAMPLER_INVALID_ARGUMENT, "softmax_lse: expected NULL in block scope");
    p.q = q->data;
    p.k = k->data;
    copy_strides(q, p.q_stride, 3);
    copy_strides(k, p.k_stride, 3);
    if (lse != nullptr) {
        p.softmax_lse = static_cast<const float *>(lse->data);
        copy_strides(lse, p.lse_stride, 3);
    }
    if (key_mask != nullptr) {
        p.key_mask = static_cast<const uint8_t *>(key_mask->data);
        copy_strides(key_mask, p.key_mask_stride, 2);
    }
    if (query_mask != nullptr) {
        p.query_mask = static_cast<const uint8_t *>(query_mask->data);
        copy_strides(query_mask, p.query_mask_stride, 2);
    }
    p.params = params;
    p.num_threads = num_threads;
    return p;
}

ConfidenceProblem check_confidence(const Tensor *logits, const Tensor *seeds,
                                   const attn_sampler_confidence_params &params, const Tensor *token_ids,
                                   const Tensor *confidence, int num_threads) {
    check_tensor("logits", logits, 3);
    check_float("logits", logits);
    ConfidenceProblem p{};
    p.batch = logits->shape[0];
    p.positions = logits->shape[1];
    p.vocab = logits->shape[2];
    const int64_t tokens = p.vocab - (params.exclude_token_id >= 0 && params.exclude_token_id < p.vocab);
    if (tokens < 1)
        fail(ATTN_SAMPLER_INVALID_ARGUMENT, "logits: expected a vocabulary of at least one token to choose");
    check_like("seeds", seeds, ATTN_SAMPLER_INT64, {p.batch}, true);
    check_output("token_ids", token_ids, ATTN_SAMPLER_INT64, {p.batch, p.positions});
    check_output("confidence", confidence, ATTN_SAMPLER_FLOAT32, {p.batch, p.positions});
    check_choice("params.metric", params.metric, 3);
    /* Logits are multiplied by its inverse, in float32. */
    if (!(params.temperature == 0.0 || (params.temperature >= 0x1p-120 && std::isfinite(params.temperature))))
        fail(ATTN_SAMPLER_INVALID_ARGUMENT,
             "params.temperature: expected 0, or a finite number >= 2^-120, got %g", params.temperature);
    constexpr int64_t kMaxVocab = int64_t{1} << 34; /* groups of 4 are counted in 32 bits */
    if (params.vocab_start < 0 || params.vocab_start > kMaxVocab - p.vocab)
        fail(ATTN_SAMPLER_INVALID_ARGUMENT, "params.vocab_start: expected 0 to %lld, got %lld",
             static_cast<long long>(kMaxVocab - p.vocab), static_cast<long long>(params.vocab_start));
    p.dtype = logits->dtype;
    p.logits = logits->data;
    copy_strides(logits, p.logits_stride, 2);
    if (seeds != nullptr) {
        p.seeds = static_cast<const int64_t *>(seeds->data);
        p.seeds_stride = seeds->stride[0];
    }
    p.params = params;
    p.token_ids = static_cast<int64_t *>(token_ids->data);
    copy_strides(token_ids, p.token_ids_stride, 2);
    p.confidence = static_cast<float *>(confidence->data);
    copy_strides(confidence, p.confidence_stride, 2);
    p.num_threads = num_threads;
    return p;
}

void check_select_params(const attn_sampler_select_params &params) {
    check_choice("params.policy", params.policy, 2);
    check_choice("params.fallback", params.fallback, 2);
    if (!(params.tau >= 0.0 && params.tau <= 1.0))
        fail(ATTN_SAMPLER_INVALID_ARGUMENT, "params.tau: expected a number in [0, 1], got %g", params.tau);
}

cuda::SelectProblem select_problem(const Tensor *scores, const Tensor *confidence, const Tensor *selected,
                                   const attn_sampler_select_params &params) {
    cuda::SelectProblem p{};
    p.batch = scores->shape[0];
    p.columns = scores->shape[1];
    p.scores = static_cast<const float *>(scores->data);
    p.confidence = static_cast<const float *>(confidence->data);
    p.selected = static_cast<uint8_t *>(selected->data);
    copy_strides(scores, p.scores_stride, 2);
    copy_strides(confidence, p.confidence_stride, 2);
    copy_strides(selected, p.selected_stride, 2);
    p.params = params;
    return p;
}

/* Runs a validated problem on its device or, where `workspace` is not null, only tells how much of it that
 * takes. */
template <typename Problem, typename OnCpu>
void dispatch(const attn_sampler_exec *exec, int64_t *workspace,
              int64_t (*on_cuda)(const Problem &, const attn_sampler_exec &, bool), const Problem &problem,
              OnCpu on_cpu) {
    int64_t bytes = 0;
    if (exec->device == ATTN_SAMPLER_CUDA)
        bytes = on_cuda(problem, *exec, workspace == nullptr);
    else if (workspace == nullptr)
        on_cpu();
    if (workspace != nullptr)
        *workspace = bytes;
}

void column_scores(const attn_sampler_layer &layer, const Tensor *key_mask, const Tensor *query_mask,
                   const attn_sampler_attention_params *params, const Tensor *out,
                   const attn_sampler_exec *exec, int64_t *workspace) {
    check_params(params);
    AttentionProblem p = check_attention(layer, key_mask, query_mask, *params, check_exec(exec));
    const int64_t columns = params->column_stop - params->column_start;
    if (params->per_head) {
        check_output("out", out, ATTN_SAMPLER_FLOAT32, {p.batch, p.heads, columns});
        p.out_stride[1] = out->stride[1];
    } else {
        check_output("out", out, ATTN_SAMPLER_FLOAT32, {p.batch, columns});
    }
    p.out = static_cast<float *>(out->data);
    p.out_stride[0] = out->stride[0];
    p.out_stride[3] = out->stride[out->ndim - 1];
    dispatch(exec, workspace, cuda::column_scores, p,
             [&] { require_memory(cpu_kernels().column_scores(p)); });
}

void attention_map(const attn_sampler_layer &layer, const Tensor *key_mask, const Tensor *query_mask,
                   const attn_sampler_attention_params *params, const Tensor *out,
                   const attn_sampler_exec *exec, int64_t *workspace) {
    check_params(params);
    AttentionProblem p = check_attention(layer, key_mask, query_mask, *params, check_exec(exec));
    check_range("params.rows", params->row_start, params->row_stop, p.n_rows);
    const int64_t rows = params->row_stop - params->row_start;
    const int64_t columns = params->column_stop - params->column_start;
    if (params->per_head) {
        check_output("out", out, ATTN_SAMPLER_FLOAT32, {p.batch, p.heads, rows, columns});
        p.out_stride[1] = out->stride[1];
    } else {
        check_output("out", out, ATTN_SAMPLER_FLOAT32, {p.batch, rows, columns});
    }
    p.out = static_cast<float *>(out->data);
    p.out_stride[0] = out->stride[0];
    p.out_stride[2] = out->stride[out->ndim - 2];
    p.out_stride[3] = out->stride[out->ndim - 1];
    dispatch(exec, workspace, cuda::attention_map, p,
             [&] { require_memory(cpu_kernels().attention_map(p)); });
}

void token_confidence(const Tensor *logits, const Tensor *seeds, const attn_sampler_confidence_params *params,
                      const Tensor *token_ids, const Tensor *confidence, const attn_sampler_exec *exec,
                      int64_t *workspace) {
    check_params(params);
    const int num_threads = check_exec(exec);
    const ConfidenceProblem p = check_confidence(logits, seeds, *params, token_ids, confidence, num_threads);
    dispatch(exec, workspace, cuda::token_confidence, p,
             [&] { require_memory(cpu_kernels().token_confidence(p)); });
}

void select(const Tensor *scores, const Tensor *confidence, const Tensor *masked,
            const attn_sampler_select_params *params, const Tensor *selected, const attn_sampler_exec *exec,
            int64_t *workspace) {
    check_params(params);
    check_exec(exec);
    check_select_params(*params);
    check_tensor("scores", scores, 2);
    check_dtype("scores", scores, ATTN_SAMPLER_FLOAT32);
    const int64_t batch = scores->shape[0], columns = scores->shape[1];
    check_like("confidence", confidence, ATTN_SAMPLER_FLOAT32, {batch, columns});
    check_like("masked", masked, ATTN_SAMPLER_BOOL, {batch, columns});
    check_output("selected", selected, ATTN_SAMPLER_BOOL, {batch, columns});
    cuda::SelectProblem p = select_problem(scores, confidence, selected, *params);
    p.masked = static_cast<const uint8_t *>(masked->data);
    copy_strides(masked, p.masked_stride, 2);
    dispatch(exec, workspace, cuda::select_tokens, p, [&] {
        for (int64_t b = 0; b < batch; ++b)
            select_row(*scores, *confidence, *masked, b, *params, *selected);
    });
}

void decode_step(const Tensor *tokens, const Tensor *logits, const attn_sampler_layer *layers,
                 int64_t num_layers, const Tensor *key_mask, const Tensor *query_mask, const Tensor *seeds,
                 const attn_sampler_decode_step_params *params, const Tensor *scores, const Tensor *token_ids,
                 const Tensor *confidence, const Tensor *selected, const attn_sampler_exec *exec,
                 int64_t *workspace) {
    check_params(params);
    const int num_threads = check_exec(exec);
    check_tensor("tokens", tokens, 2);
    check_dtype("tokens", tokens, ATTN_SAMPLER_INT64);
    check_apart("tokens", tokens);
    check_range("params.block", params->block_start, params->block_stop, tokens->shape[1]);
    const int64_t batch = tokens->shape[0], block = params->block_stop - params->block_start;
    check_tensor("logits", logits, 3);
    check_size("logits", logits, 0, batch);
    check_size("logits", logits, 1, block);
    if (params->mask_token_id < 0 || params->mask_token_id >= logits->shape[2])
        fail(ATTN_SAMPLER_INVALID_ARGUMENT, "params.mask_token_id: expected 0 to %lld, got %lld",
             static_cast<long long>(logits->shape[2] - 1), static_cast<long long>(params->mask_token_id));
    attn_sampler_confidence_params confidence_params = params->confidence;
    confidence_params.exclude_token_id = params->mask_token_id;
    confidence_params.vocab_start = 0;
    const ConfidenceProblem predict =
        check_confidence(logits, seeds, confidence_params, token_ids, confidence, num_threads);
    check_select_params(params->select);
    check_output("scores", scores, ATTN_SAMPLER_FLOAT32, {batch, block});
    check_output("selected", selected, ATTN_SAMPLER_BOOL, {batch, block});
    check_choice("params.masked_rows_only", params->masked_rows_only, 2);
    if (num_layers < 0 || (num_layers > 0 && layers == nullptr))
        fail(ATTN_SAMPLER_INVALID_ARGUMENT, "layers: expected an address and a count >= 0");

    attn_sampler_attention_params attention = params->attention;
    attention.per_head = 0;
    attention.accumulate = 1;
    check_attention_params(attention); /* without a layer too */
    std::vector<AttentionProblem> problems;
    problems.reserve(static_cast<size_t>(num_layers));
    for (int64_t i = 0; i < num_layers; ++i) {
        try {
            problems.push_back(check_attention(layers[i], key_mask, query_mask, attention, num_threads));
        } catch (const Failure &) {
            name_layer_in_error(i);
            throw;
        }
        AttentionProblem &p = problems.back();
        if (p.batch != batch)
            fail(ATTN_SAMPLER_INVALID_ARGUMENT, "layers[%lld].q: expected %lld sequences, got %lld",
                 static_cast<long long>(i), static_cast<long long>(batch), static_cast<long long>(p.batch));
        if (attention.column_stop - attention.column_start != block)
            fail(ATTN_SAMPLER_INVALID_ARGUMENT,
                 "params.attention: expected as many columns as the block has");
        p.out = static_cast<float *>(scores->data);
        p.out_stride[0] = scores->stride[0];
        p.out_stride[3] = scores->stride[1];
    }

    const bool masked_rows_only = params->masked_rows_only && num_layers > 0;
    int64_t first_row = 0; /* the token at which query row 0 stands */
    if (masked_rows_only) {
        first_row = attention.query_start - attention.column_start + params->block_start;
        const int64_t rows = problems[0].n_rows;
        for (const AttentionProblem &p : problems)
            if (p.n_rows != rows)
                fail(ATTN_SAMPLER_INVALID_ARGUMENT, "layers: expected one number of rows in all of them");
        if (first_row < 0 || first_row + rows > tokens->shape[1])
            fail(ATTN_SAMPLER_INVALID_ARGUMENT,
                 "params.masked_rows_only: expected every row at one of the tokens, got rows at %lld to %lld",
                 static_cast<long long>(first_row), static_cast<long long>(first_row + rows - 1));
    }
    Tensor block_tokens = *tokens;
    if (batch > 0)
        block_tokens.data = &element<int64_t>(*tokens, 0, params->block_start);

    cuda::StepProblem step{};
    step.layers = problems.data();
    step.num_layers = num_layers;
    step.predict = predict;
    step.select = select_problem(scores, confidence, selected, params->select);
    step.tokens = static_cast<int64_t *>(block_tokens.data);
    copy_strides(tokens, step.tokens_stride, 2);
    step.mask_token_id = params->mask_token_id;
    if (masked_rows_only && batch > 0)
        step.row_tokens = &element<int64_t>(*tokens, 0, first_row);
    dispatch(exec, workspace, cuda::decode_step, step, [&] {
        if (batch == 0)
            return;
        std::vector<uint8_t> masked_rows;
        if (masked_rows_only) {
            const int64_t rows = problems[0].n_rows;
            masked_rows.resize(static_cast<size_t>(batch * rows));
            for (int64_t b = 0; b < batch; ++b)
                for (int64_t m = 0; m < rows; ++m)
                    masked_rows[static_cast<size_t>(b * rows + m)] =
                        element<int64_t>(*tokens, b, first_row + m) == params->mask_token_id &&
                        (query_mask == nullptr || element<uint8_t>(*query_mask, b, m) != 0);
            for (AttentionProblem &p : problems) {
                p.query_mask = masked_rows.data();
                p.query_mask_stride[0] = rows;
                p.query_mask_stride[1] = 1;
            }
        }
        const CpuKernels &kernels = cpu_kernels();
        std::vector<uint8_t> masked(static_cast<size_t>(batch * block));
        /* Outputs are written from here on; the token tensor last. */
        require_memory(kernels.token_confidence(predict));
        if (num_layers > 0)
            for (int64_t b = 0; b < batch; ++b)
                for (int64_t c = 0; c < block; ++c)
                    element<float>(*scores, b, c) = 0.0f;
        for (const AttentionProblem &p : problems)
            require_memory(kernels.column_scores(p));
        const Tensor masked_view = {masked.data(), {batch, block}, {block, 1}, 2, ATTN_SAMPLER_BOOL};
        for (int64_t b = 0; b < batch; ++b) {
            for (int64_t c = 0; c < block; ++c)
                element<uint8_t>(masked_view, b, c) =
                    element<int64_t>(block_tokens, b, c) == params->mask_token_id;
            select_row(*scores, *confidence, masked_view, b, params->select, *selected);
            for (int64_t c = 0; c < block; ++c)
                if (element<uint8_t>(*selected, b, c) != 0)
                    element<int64_t>(block_tokens, b, c) = element<int64_t>(*token_ids, b, c);
        }
    });
}

} // namespace
} // namespace attn_sampler

extern "C" {

attn_sampler_status
attn_sampler_column_scores(const attn_sampler_tensor *q, const attn_sampler_tensor *k,
                           const attn_sampler_tensor *softmax_lse, const attn_sampler_tensor *q_descale,
                           const attn_sampler_tensor *k_descale, const attn_sampler_tensor *key_mask,
                           const attn_sampler_tensor *query_mask, const attn_sampler_attention_params *params,
                           const attn_sampler_tensor *out, const attn_sampler_exec *exec) {
    return attn_sampler::guarded([&] {
        attn_sampler::column_scores({q, k, softmax_lse, q_descale, k_descale}, key_mask, query_mask, params,
                                    out, exec, nullptr);
    });
}

attn_sampler_status attn_sampler_column_scores_workspace(
    const attn_sampler_tensor *q, const attn_sampler_tensor *k, const attn_sampler_tensor *softmax_lse,
    const attn_sampler_tensor *q_descale, const attn_sampler_tensor *k_descale,
    const attn_sampler_tensor *key_mask, const attn_sampler_tensor *query_mask,
    const attn_sampler_attention_params *params, const attn_sampler_tensor *out,
    const attn_sampler_exec *exec, int64_t *bytes) {
    return attn_sampler::guarded([&] {
        attn_sampler::check_workspace_answer(bytes);
        attn_sampler::column_scores({q, k, softmax_lse, q_descale, k_descale}, key_mask, query_mask, params,
                                    out, exec, bytes);
    });
}

attn_sampler_status
attn_sampler_attention_map(const attn_sampler_tensor *q, const attn_sampler_tensor *k,
                           const attn_sampler_tensor *softmax_lse, const attn_sampler_tensor *q_descale,
                           const attn_sampler_tensor *k_descale, const attn_sampler_tensor *key_mask,
                           const attn_sampler_tensor *query_mask, const attn_sampler_attention_params *params,
                           const attn_sampler_tensor *out, const attn_sampler_exec *exec) {
    return attn_sampler::guarded([&] {
        attn_sampler::attention_map({q, k, softmax_lse, q_descale, k_descale}, key_mask, query_mask, params,
                                    out, exec, nullptr);
    });
}

attn_sampler_status attn_sampler_attention_map_workspace(
    const attn_sampler_tensor *q, const attn_sampler_tensor *k, const attn_sampler_tensor *softmax_lse,
    const attn_sampler_tensor *q_descale, const attn_sampler_tensor *k_descale,
    const attn_sampler_tensor *key_mask, const attn_sampler_tensor *query_mask,
    const attn_sampler_attention_params *params, const attn_sampler_tensor *out,
    const attn_sampler_exec *exec, int64_t *bytes) {
    return attn_sampler::guarded([&] {
        attn_sampler::check_workspace_answer(bytes);
        attn_sampler::attention_map({q, k, softmax_lse, q_descale, k_descale}, key_mask, query_mask, params,
                                    out, exec, bytes);
    });
}

attn_sampler_status attn_sampler_token_confidence(const attn_sampler_tensor *logits,
                                                  const attn_sampler_tensor *seeds,
                                                  const attn_sampler_confidence_params *params,
                                                  const attn_sampler_tensor *token_ids,
                                                  const attn_sampler_tensor *confidence,
                                                  const attn_sampler_exec *exec) {
    return attn_sampler::guarded(
        [&] { attn_sampler::token_confidence(logits, seeds, params, token_ids, confidence, exec, nullptr); });
}

attn_sampler_status attn_sampler_token_confidence_workspace(const attn_sampler_tensor *logits,
                                                            const attn_sampler_tensor *seeds,
                                                            const attn_sampler_confidence_params *params,
                                                            const attn_sampler_tensor *token_ids,
                                                            const attn_sampler_tensor *confidence,
                                                            const attn_sampler_exec *exec, int64_t *bytes) {
    return attn_sampler::guarded([&] {
        attn_sampler::check_workspace_answer(bytes);
        attn_sampler::token_confidence(logits, seeds, params, token_ids, confidence, exec, bytes);
    });
}

attn_sampler_status
attn_sampler_select_tokens(const attn_sampler_tensor *scores, const attn_sampler_tensor *confidence,
                           const attn_sampler_tensor *masked, const attn_sampler_select_params *params,
                           const attn_sampler_tensor *selected, const attn_sampler_exec *exec) {
    return attn_sampler::guarded(
        [&] { attn_sampler::select(scores, confidence, masked, params, selected, exec, nullptr); });
}

attn_sampler_status attn_sampler_select_tokens_workspace(const attn_sampler_tensor *scores,
                                                         const attn_sampler_tensor *confidence,
                                                         const attn_sampler_tensor *masked,
                                                         const attn_sampler_select_params *params,
                                                         const attn_sampler_tensor *selected,
                                                         const attn_sampler_exec *exec, int64_t *bytes) {
    return attn_sampler::guarded([&] {
        attn_sampler::check_workspace_answer(bytes);
        attn_sampler::select(scores, confidence, masked, params, selected, exec, bytes);
    });
}

attn_sampler_status
attn_sampler_decode_step(const attn_sampler_tensor *tokens, const attn_sampler_tensor *logits,
                         const attn_sampler_layer *layers, int64_t num_layers,
                         const attn_sampler_tensor *key_mask, const attn_sampler_tensor *query_mask,
                         const attn_sampler_tensor *seeds, const attn_sampler_decode_step_params *params,
                         const attn_sampler_tensor *scores, const attn_sampler_tensor *token_ids,
                         const attn_sampler_tensor *confidence, const attn_sampler_tensor *selected,
                         const attn_sampler_exec *exec) {
    return attn_sampler::guarded([&] {
        attn_sampler::decode_step(tokens, logits, layers, num_layers, key_mask, query_mask, seeds, params,
                                  scores, token_ids, confidence, selected, exec, nullptr);
    });
}

attn_sampler_status attn_sampler_decode_step_workspace(
    const attn_sampler_tensor *tokens, const attn_sampler_tensor *logits, const attn_sampler_layer *layers,
    int64_t num_layers, const attn_sampler_tensor *key_mask, const attn_sampler_tensor *query_mask,
    const attn_sampler_tensor *seeds, const attn_sampler_decode_step_params *params,
    const attn_sampler_tensor *scores, const attn_sampler_tensor *token_ids,
    const attn_sampler_tensor *confidence, const attn_sampler_tensor *selected, const attn_sampler_exec *exec,
    int64_t *bytes) {
    return attn_sampler::guarded([&] {
        attn_sampler::check_workspace_answer(bytes);
        attn_sampler::decode_step(tokens, logits, layers, num_layers, key_mask, query_mask, seeds, params,
                                  scores, token_ids, confidence, selected, exec, bytes);
    });
}

const char *attn_sampler_last_error(void) { return attn_sampler::last_error; }

const char *attn_sampler_version(void) { return ATTN_SAMPLER_VERSION; }

const char *attn_sampler_cpu_isa(void) { return attn_sampler::cpu_kernels().name; }

const char *attn_sampler_cpu_unavailable(void) { return attn_sampler::cpu_problem(); }

const char *attn_sampler_cuda_unavailable(void) { return attn_sampler::cuda::device_problem(); }

} /* extern "C" */
