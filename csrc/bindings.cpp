/* Python module attn_sampler._C: the C API for attn_sampler/_core.py, its only caller.
 *
 * A tensor arrives as (address, dtype, shape, strides) or None; the global interpreter lock is released while
 * a kernel runs.
 */
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "attn_sampler.h"

namespace py = pybind11;

namespace {

/* A view of a tensor that the caller keeps alive. */
struct View {
    attn_sampler_tensor tensor{};
    bool given = false;

    explicit View(py::handle source) {
        if (source.is_none())
            return;
        const py::tuple fields = py::reinterpret_borrow<py::tuple>(source);
        const py::tuple shape = fields[2], stride = fields[3];
        if (shape.size() > 4)
            throw py::value_error("expected a tensor of at most 4 dimensions");
        tensor.data = reinterpret_cast<void *>(fields[0].cast<uintptr_t>());
        tensor.dtype = fields[1].cast<int32_t>();
        tensor.ndim = static_cast<int32_t>(shape.size());
        for (size_t i = 0; i < shape.size(); ++i) {
            tensor.shape[i] = shape[i].cast<int64_t>();
            tensor.stride[i] = stride[i].cast<int64_t>();
        }
        given = true;
    }

    const attn_sampler_tensor *get() const { return given ? &tensor : nullptr; }
};

std::vector<View> views(const py::list &sources) {
    std::vector<View> result;
    result.reserve(sources.size());
    for (const py::handle source : sources)
        result.emplace_back(source);
    return result;
}

/* Where to run: device, CPU threads, CUDA ordinal, stream, workspace address and size. */
attn_sampler_exec exec_of(const py::tuple &where) {
    return {where[0].cast<int32_t>(),
            where[1].cast<int32_t>(),
            where[2].cast<int32_t>(),
            reinterpret_cast<void *>(where[3].cast<uintptr_t>()),
            reinterpret_cast<void *>(where[4].cast<uintptr_t>()),
            where[5].cast<int64_t>()};
}

/* Runs an API call without the lock and turns its status into an exception; 0, or the bytes of workspace
 * without which nothing was run. */
template <typename Call, typename Workspace>
int64_t run(Call call, Workspace workspace) {
    attn_sampler_status status;
    int64_t bytes = 0;
    {
        const py::gil_scoped_release unlocked;
        status = call();
        if (status == ATTN_SAMPLER_WORKSPACE_TOO_SMALL)
            status = workspace(&bytes);
    }
    if (status == ATTN_SAMPLER_OK)
        return bytes;
    const char *const message = attn_sampler_last_error();
    if (status == ATTN_SAMPLER_INVALID_ARGUMENT)
        throw py::value_error(message);
    if (status == ATTN_SAMPLER_OUT_OF_MEMORY) {
        PyErr_SetString(PyExc_MemoryError, message);
        throw py::error_already_set();
    }
    throw std::runtime_error(message);
}

int64_t column_scores(const py::object &out, const py::object &q, const py::object &k, const py::object &lse,
                      const py::object &q_descale, const py::object &k_descale, const py::object &key_mask,
                      const py::object &query_mask, int64_t column_start, int64_t column_stop,
                      int64_t query_start, double softmax_scale, int lse_base, bool causal, int softmax_scope,
                      bool diagonal, int reduction, bool per_head, bool accumulate, const py::tuple &where) {
    const View out_(out), q_(q), k_(k), lse_(lse), q_descale_(q_descale), k_descale_(k_descale),
        key_mask_(key_mask), query_mask_(query_mask);
    const attn_sampler_attention_params params = {
        softmax_scale, column_start,  column_stop, 0,         0,        query_start, lse_base,
        causal,        softmax_scope, diagonal,    reduction, per_head, accumulate};
    const attn_sampler_exec exec = exec_of(where);
    return run(
        [&] {
            return attn_sampler_column_scores(q_.get(), k_.get(), lse_.get(), q_descale_.get(),
                                              k_descale_.get(), key_mask_.get(), query_mask_.get(), &params,
                                              out_.get(), &exec);
        },
        [&](int64_t *bytes) {
            return attn_sampler_column_scores_workspace(q_.get(), k_.get(), lse_.get(), q_descale_.get(),
                                                        k_descale_.get(), key_mask_.get(), query_mask_.get(),
                                                        &params, out_.get(), &exec, bytes);
        });
}

int64_t attention_map(const py::object &out, const py::object &q, const py::object &k, const py::object &lse,
                      const py::object &q_descale, const py::object &k_descale, const py::object &key_mask,
                      const py::object &query_mask, int64_t row_start, int64_t row_stop, int64_t column_start,
                      int64_t column_stop, int64_t query_start, double softmax_scale, int lse_base,
                      bool causal, int softmax_scope, bool diagonal, bool per_head, bool accumulate,
                      const py::tuple &where) {
    const View out_(out), q_(q), k_(k), lse_(lse), q_descale_(q_descale), k_descale_(k_descale),
        key_mask_(key_mask), query_mask_(query_mask);
    const attn_sampler_attention_params params = {
        softmax_scale, column_start,  column_stop, row_start, row_stop, query_start, lse_base,
        causal,        softmax_scope, diagonal,    0,         per_head, accumulate};
    const attn_sampler_exec exec = exec_of(where);
    return run(
        [&] {
            return attn_sampler_attention_map(q_.get(), k_.get(), lse_.get(), q_descale_.get(),
                                              k_descale_.get(), key_mask_.get(), query_mask_.get(), &params,
                                              out_.get(), &exec);
        },
        [&](int64_t *bytes) {
            return attn_sampler_attention_map_workspace(q_.get(), k_.get(), lse_.get(), q_descale_.get(),
                                                        k_descale_.get(), key_mask_.get(), query_mask_.get(),
                                                        &params, out_.get(), &exec, bytes);
        });
}

int64_t token_confidence(const py::object &token_ids, const py::object &confidence, const py::object &logits,
                         const py::object &seeds, int metric, double temperature, int64_t seed,
                         int64_t exclude_token_id, const py::tuple &where) {
    const View token_ids_(token_ids), confidence_(confidence), logits_(logits), seeds_(seeds);
    const attn_sampler_confidence_params params = {metric, temperature, static_cast<uint64_t>(seed),
                                                   exclude_token_id};
    const attn_sampler_exec exec = exec_of(where);
    return run(
        [&] {
            return attn_sampler_token_confidence(logits_.get(), seeds_.get(), &params, token_ids_.get(),
                                                 confidence_.get(), &exec);
        },
        [&](int64_t *bytes) {
            return attn_sampler_token_confidence_workspace(logits_.get(), seeds_.get(), &params,
                                                           token_ids_.get(), confidence_.get(), &exec, bytes);
        });
}

int64_t select_tokens(const py::object &selected, const py::object &scores, const py::object &confidence,
                      const py::object &masked, int policy, double tau, int fallback,
                      const py::tuple &where) {
    const View selected_(selected), scores_(scores), confidence_(confidence), masked_(masked);
    const attn_sampler_select_params params = {policy, fallback, tau};
    const attn_sampler_exec exec = exec_of(where);
    return run(
        [&] {
            return attn_sampler_select_tokens(scores_.get(), confidence_.get(), masked_.get(), &params,
                                              selected_.get(), &exec);
        },
        [&](int64_t *bytes) {
            return attn_sampler_select_tokens_workspace(scores_.get(), confidence_.get(), masked_.get(),
                                                        &params, selected_.get(), &exec, bytes);
        });
}

int64_t decode_step(const py::object &tokens, const py::object &scores, const py::object &token_ids,
                    const py::object &confidence, const py::object &selected, const py::object &logits,
                    const py::list &q, const py::list &k, const py::list &lse, const py::list &q_descale,
                    const py::list &k_descale, const py::object &key_mask, const py::object &query_mask,
                    const py::object &seeds, int64_t block_start, int64_t block_stop, int64_t mask_token_id,
                    bool masked_rows_only, int64_t column_start, int64_t column_stop, int64_t query_start,
                    double softmax_scale, int lse_base, bool causal, int softmax_scope, bool diagonal,
                    int reduction, int metric, double temperature, int64_t seed, int policy, double tau,
                    int fallback, const py::tuple &where) {
    const View tokens_(tokens), scores_(scores), token_ids_(token_ids), confidence_(confidence);
    const View selected_(selected), logits_(logits), key_mask_(key_mask), query_mask_(query_mask),
        seeds_(seeds);
    const std::vector<View> q_ = views(q), k_ = views(k), lse_ = views(lse), q_descale_ = views(q_descale),
                            k_descale_ = views(k_descale);
    std::vector<attn_sampler_layer> layers;
    layers.reserve(q_.size());
    for (size_t i = 0; i < q_.size(); ++i)
        layers.push_back({q_[i].get(), k_.at(i).get(), lse_.empty() ? nullptr : lse_.at(i).get(),
                          q_descale_.empty() ? nullptr : q_descale_.at(i).get(),
                          k_descale_.empty() ? nullptr : k_descale_.at(i).get()});
    const attn_sampler_decode_step_params params = {block_start,
                                                    block_stop,
                                                    mask_token_id,
                                                    masked_rows_only,
                                                    {softmax_scale, column_start, column_stop, 0, 0,
                                                     query_start, lse_base, causal, softmax_scope, diagonal,
                                                     reduction, 0, 0},
                                                    {metric, temperature, static_cast<uint64_t>(seed), -1},
                                                    {policy, fallback, tau}};
    const attn_sampler_exec exec = exec_of(where);
    return run(
        [&] {
            return attn_sampler_decode_step(tokens_.get(), logits_.get(), layers.data(),
                                            static_cast<int64_t>(layers.size()), key_mask_.get(),
                                            query_mask_.get(), seeds_.get(), &params, scores_.get(),
                                            token_ids_.get(), confidence_.get(), selected_.get(), &exec);
        },
        [&](int64_t *bytes) {
            return attn_sampler_decode_step_workspace(
                tokens_.get(), logits_.get(), layers.data(), static_cast<int64_t>(layers.size()),
                key_mask_.get(), query_mask_.get(), seeds_.get(), &params, scores_.get(), token_ids_.get(),
                confidence_.get(), selected_.get(), &exec, bytes);
        });
}

} // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "The compiled core of attn_sampler; use the functions of the package instead.";
    m.def("column_scores", &column_scores);
    m.def("attention_map", &attention_map);
    m.def("token_confidence", &token_confidence);
    m.def("select_tokens", &select_tokens);
    m.def("decode_step", &decode_step);
    m.def("version", [] { return attn_sampler_version(); });
    m.def("cpu_isa", [] { return attn_sampler_cpu_isa(); });
    m.def("cpu_unavailable", [] { return attn_sampler_cpu_unavailable(); });
    m.def("cuda_unavailable", [] { return attn_sampler_cuda_unavailable(); });
}
