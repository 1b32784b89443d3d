/* What is asked of the values that a call has for each row, and of the bits of its tokens. */
#ifndef ATTN_SAMPLER_ROW_CHECKS_H_
#define ATTN_SAMPLER_ROW_CHECKS_H_

#include <algorithm>
#include <cmath>

#include "problem.h"
#include "tensor_checks.h"

namespace attn_sampler {

/* No view of NULL. */
template <typename T, int kDims>
inline void set_view(View<T, kDims> &view, const Tensor *t) {
    view = {};
    if (t == nullptr)
        return;
    view.data = static_cast<T *>(t->data);
    for (int i = 0; i < kDims; ++i) /* no limit holds for a step that is never taken */
        view.stride[i] = t->shape[i] > 1 ? t->stride[i] : 0;
}

inline void check_unit(const char *name, double value) {
    if (!(value >= 0.0 && value <= 1.0))
        throw Error(kInvalid, "%s: expected a number in [0, 1], got %g", name, value);
}

/* The value of a row: of its own, from a tensor of this dtype, or that of all. */
template <typename T>
void set_of_rows(OfRows<T> &values, const char *name, const Tensor *own, int dtype, double all,
                 int64_t batch) {
    check_optional(name, own, dtype, {batch});
    set_view(values.own, own);
    values.all = static_cast<T>(all);
}

/* What each row draws by. */
inline Draws draws_of(const attn_sampler_sampling_params &params, int64_t batch, int64_t vocab) {
    const double t = params.temperature, top_p = params.top_p > 0.0 ? params.top_p : 1.0;
    if (!(t == 0.0 || (t >= ATTN_SAMPLER_MIN_TEMPERATURE && std::isfinite(t))))
        throw Error(kInvalid, "params.temperature: expected 0, or a finite number >= 2^-120, got %g", t);
    if (params.top_k < 0)
        throw Error(kInvalid, "params.top_k: expected at least 0, got %" PRId64, params.top_k);
    check_unit("params.top_p", params.top_p);
    check_unit("params.min_p", params.min_p);
    if (vocab > ATTN_SAMPLER_MAX_TOP_P_VOCAB && (params.top_ps != nullptr || top_p < 1.0))
        throw Error(kInvalid, "params.top_p: served for at most 2^32 tokens, got %" PRId64, vocab);
    constexpr int kFloat = ATTN_SAMPLER_FLOAT32;
    Draws draws{};
    set_of_rows(draws.temperature, "params.temperatures", params.temperatures, kFloat, std::min(t, 0x1p126),
                batch);
    set_of_rows(draws.top_k, "params.top_ks", params.top_ks, ATTN_SAMPLER_INT32,
                static_cast<double>(min_of(params.top_k, INT32_MAX)), batch);
    set_of_rows(draws.top_p, "params.top_ps", params.top_ps, kFloat, top_p, batch);
    set_of_rows(draws.min_p, "params.min_ps", params.min_ps, kFloat, params.min_p, batch);
    set_of_rows(draws.seed, "params.seeds", params.seeds, ATTN_SAMPLER_INT64, 0.0, batch);
    draws.seed.all = static_cast<int64_t>(params.seed);
    return draws;
}

/* Words of a bit for each token, of each position or of all of a sequence. */
inline View<const uint32_t, 3> bitmask_of(const Tensor *t, int64_t batch, int64_t positions, int64_t vocab) {
    View<const uint32_t, 3> view{};
    if (t == nullptr)
        return view;
    const bool of_positions = t->ndim == 3;
    const int64_t words = ceil_div(vocab, 32);
    check_tensor("params.token_bitmask", t, of_positions ? 3 : 2);
    check_dtype("params.token_bitmask", t, ATTN_SAMPLER_INT32);
    check_size("params.token_bitmask", t, 0, batch);
    if (of_positions)
        check_size("params.token_bitmask", t, 1, positions);
    if (t->shape[t->ndim - 1] < words)
        throw Error(kInvalid, "params.token_bitmask: expected at least %" PRId64 " words, got %" PRId64,
                    words, t->shape[t->ndim - 1]);
    if (of_positions) {
        set_view(view, t);
    } else {
        View<const uint32_t, 2> of_sequence;
        set_view(of_sequence, t);
        view = {of_sequence.data, {of_sequence.stride[0], 0, of_sequence.stride[1]}};
    }
    return view;
}

} // namespace attn_sampler

#endif /* ATTN_SAMPLER_ROW_CHECKS_H_ */
