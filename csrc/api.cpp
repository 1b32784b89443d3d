/* The C API: every entry point checks its arguments, then hands a validated problem to the device. */
#include <cinttypes>
#include <exception>
#include <new>
#include <vector>

#include "attn_sampler.h"
#include "checks.h"
#include "cpu/kernels.h"
#include "error.h"
#include "version.h"

namespace attn_sampler {
namespace {

thread_local char last_error[512] = "";

attn_sampler_status failed(attn_sampler_status status, const char *message) {
    snprintf(last_error, sizeof(last_error), "%s", message);
    return status;
}

/* Runs an entry point's body; no exception leaves the library. */
template <typename Body>
attn_sampler_status guarded(Body body) {
    try {
        last_error[0] = '\0';
        body();
        return ATTN_SAMPLER_OK;
    } catch (const std::bad_alloc &) {
        return failed(ATTN_SAMPLER_OUT_OF_MEMORY, "out of memory");
    } catch (const Error &error) {
        return failed(error.status(), error.what());
    } catch (const std::exception &error) {
        return failed(ATTN_SAMPLER_INTERNAL_ERROR, error.what());
    }
}

/* An entry point: what `check` makes of its arguments, run by one of the functions of exec's device. */
template <typename Problem, typename Params, typename Check>
attn_sampler_status run(int64_t (*Device::*function)(const Problem &, const attn_sampler_exec &),
                        const Params *params, attn_sampler_exec *exec, Check check) {
    return guarded([&] {
        if (params == nullptr)
            throw Error(ATTN_SAMPLER_INVALID_ARGUMENT, "params: expected an address, got NULL");
        const Device &device = check_exec(exec);
        const int64_t needed = (device.*function)(check(), *exec);
        if (needed == 0)
            return;
        exec->workspace_needed = needed;
        throw Error(ATTN_SAMPLER_WORKSPACE_TOO_SMALL,
                    "exec.workspace: expected at least %" PRId64 " bytes, got %" PRId64, needed,
                    exec->workspace_size);
    });
}

} // namespace
} // namespace attn_sampler

using namespace attn_sampler;

attn_sampler_status attn_sampler_column_scores(const attn_sampler_layer *layer,
                                               const attn_sampler_masks *masks,
                                               const attn_sampler_attention_params *params,
                                               const attn_sampler_tensor *out, attn_sampler_exec *exec) {
    return run(&Device::column_scores, params, exec,
               [&] { return check_column_scores(layer, masks, *params, out, *exec); });
}

attn_sampler_status attn_sampler_attention_map(const attn_sampler_layer *layer,
                                               const attn_sampler_masks *masks,
                                               const attn_sampler_attention_params *params,
                                               const attn_sampler_tensor *out, attn_sampler_exec *exec) {
    return run(&Device::attention_map, params, exec,
               [&] { return check_attention_map(layer, masks, *params, out, *exec); });
}

attn_sampler_status attn_sampler_top_columns(const attn_sampler_layer *layer, const attn_sampler_masks *masks,
                                             const attn_sampler_top_columns_params *params,
                                             const attn_sampler_tensor *positions,
                                             const attn_sampler_tensor *scores, attn_sampler_exec *exec) {
    return run(&Device::top_columns, params, exec,
               [&] { return check_top_columns(layer, masks, *params, positions, scores, *exec); });
}

attn_sampler_status
attn_sampler_token_confidence(const attn_sampler_tensor *logits, const attn_sampler_tensor *current_ids,
                              const attn_sampler_sampling_params *params,
                              const attn_sampler_tensor *token_ids, const attn_sampler_tensor *confidence,
                              const attn_sampler_tensor *log_prob, const attn_sampler_tensor *current,
                              attn_sampler_exec *exec) {
    return run(&Device::token_confidence, params, exec, [&] {
        return check_token_confidence(logits, current_ids, *params, token_ids, confidence, log_prob, current,
                                      *exec);
    });
}

attn_sampler_status
attn_sampler_select_tokens(const attn_sampler_tensor *scores, const attn_sampler_tensor *confidence,
                           const attn_sampler_tensor *masked, const attn_sampler_selection_params *params,
                           const attn_sampler_tensor *selected, const attn_sampler_revision *revision,
                           attn_sampler_exec *exec) {
    return run(&Device::select_tokens, params, exec,
               [&] { return check_select_tokens(scores, confidence, masked, *params, selected, revision); });
}

attn_sampler_status
attn_sampler_decode_step(const attn_sampler_tensor *tokens, const attn_sampler_tensor *logits,
                         const attn_sampler_layer *layers, int64_t num_layers,
                         const attn_sampler_masks *masks, const attn_sampler_decode_step_params *params,
                         const attn_sampler_tensor *scores, const attn_sampler_tensor *token_ids,
                         const attn_sampler_tensor *confidence, const attn_sampler_tensor *selected,
                         const attn_sampler_revision *revision, attn_sampler_exec *exec) {
    std::vector<AttentionProblem> problems;
    return run(&Device::decode_step, params, exec, [&] {
        return check_decode_step(tokens, logits, layers, num_layers, masks, *params, scores, token_ids,
                                 confidence, selected, revision, *exec, problems);
    });
}

const char *attn_sampler_last_error(void) { return last_error; }

const char *attn_sampler_version(void) { return ATTN_SAMPLER_VERSION; }

const char *attn_sampler_cpu_isa(void) { return cpu_isa(); }

const char *attn_sampler_cpu_amx_refusal(void) { return cpu_amx_refusal(); }

const char *attn_sampler_cpu_unavailable(void) { return kCpuDevice.unavailable(); }

const char *attn_sampler_cuda_unavailable(void) { return kCudaDevice.unavailable(); }

const char *attn_sampler_cuda_device_unavailable(int32_t device_index) {
    const char *const reason = kCudaDevice.unavailable();
    return reason != nullptr ? reason : kCudaDevice.ordinal_unavailable(device_index);
}
