/* Random calls of the C API on the CPU, every other one with something wrong in it, from two threads at once.
 *
 *     c_api_fuzz SEED COUNT
 *
 * A valid call succeeds, writes all of its outputs and nothing else, plausible values, and the same bits with
 * another number of threads. A broken one is refused in words that name an argument, and writes nothing;
 * where what was broken may still be valid, it may succeed too. The sanitizers that this is built with see
 * the rest: every tensor lies in memory of its extent and no more. Each call has a seed, told where it fails:
 * `c_api_fuzz SEED 1` repeats it.
 */
#include <atomic>
#include <csignal>
#include <thread>

#include "judge.h"

#pragma GCC visibility push(default)
extern "C" {
/* A report ends in SIGABRT, which tells the seed; too large an allocation fails. */
const char *__asan_default_options() { return "abort_on_error=1:allocator_may_return_null=1"; }
const char *__tsan_default_options() {
    return "abort_on_error=1:allocator_may_return_null=1:halt_on_error=1";
}
const char *__ubsan_default_options() { return "abort_on_error=1:print_stacktrace=1"; }
}
#pragma GCC visibility pop

namespace {

/* What was broken, whether the call is invalid for sure, and whether the answer may name another argument. */
struct Broken {
    std::string name;
    bool surely, elsewhere = false;
};

Tensor &any_tensor(Call &call) {
    return call.tensors[static_cast<size_t>(call.random.below(static_cast<int64_t>(call.tensors.size())))];
}

Broken break_tensor(Call &call) {
    Random &random = call.random;
    Tensor &t = any_tensor(call);
    attn_sampler_tensor &view = t.view;
    const int i = static_cast<int>(random.below(view.ndim));
    int64_t &size = view.shape[i], &stride = view.stride[i];
    switch (random.below(8)) {
    case 0:
        *t.slot = nullptr; /* without what says where the keys lie, k or the columns are none */
        return {t.name, t.required, t.name == "block_table" || t.name == "seqlens_k"};
    case 1:
        view.data = nullptr;
        return {t.name, !t.empty()};
    case 2:
        view.ndim = random.pick({view.ndim - 1, view.ndim + 1, 0, -1, 5, INT_MAX, INT_MIN});
        return {t.name, true};
    case 3:
        size = random.pick<int64_t>({-1, -size - 1, INT64_MIN, -(INT64_C(1) << 32)});
        return {t.name, true};
    case 4: { /* a size that another tensor does not have, or that no memory has */
        const int64_t huge = random.pick<int64_t>({INT64_C(1) << 41, INT64_C(1) << 62, INT64_MAX});
        const int64_t other =
            random.pick<int64_t>({size - 1, size + 1, size + 1000, size + (INT64_C(1) << 32), huge});
        const bool is_tied = std::count(t.tied.begin(), t.tied.end(), i) > 0;
        size = is_tied && other >= 0 ? other : huge;
        return {t.name, true, true};
    }
    case 5: {
        const int dtype = random.pick<int>(
            {-1, 8, INT_MIN, ATTN_SAMPLER_INT64, ATTN_SAMPLER_BOOL, ATTN_SAMPLER_FLOAT8_E4M3});
        const bool differs = view.dtype != dtype;
        view.dtype = dtype;
        return {t.name, differs, true};
    }
    case 6: /* a step that may not be, that leads to the same element again, or beyond memory */
        if (size < 2)
            return break_tensor(call);
        if (t.role == Role::rows && i == view.ndim - 1)
            stride = random.pick<int64_t>({0, 2, -1, INT64_MAX, INT64_MIN});
        else if (t.role == Role::output && !t.empty() && random.chance(50))
            stride = random.pick<int64_t>({0, -1, -stride});
        else
            stride = random.pick<int64_t>({INT64_MAX, INT64_MIN, INT64_C(1) << 54, -(INT64_C(1) << 61)});
        return {t.name, true};
    default: { /* memory of another tensor (a step may read its scores) */
        const Tensor &other = any_tensor(call);
        if (t.role != Role::output || t.name == "scores" || &t == &other || t.empty() || other.empty())
            return break_tensor(call);
        view.data = other.view.data;
        return {t.name, true, true};
    }
    }
}

Broken break_choice(Random &random, int32_t &field, const char *name, int count) {
    field = random.pick({-1, count, count + 1, INT_MAX, INT_MIN});
    return {name, true};
}

Broken break_span(Random &random, attn_sampler_span &span, const char *name, int64_t size) {
    span = random.pick<attn_sampler_span>({{-1, span.stop},
                                           {span.start, span.start},
                                           {span.stop, span.start},
                                           {span.start, size + 1},
                                           {INT64_MIN, INT64_MAX},
                                           {0, INT64_MAX},
                                           {INT64_MIN, span.stop},
                                           {INT64_MAX, INT64_MIN}});
    return {name, true};
}

Broken break_columns(Call &call) {
    attn_sampler_span &columns = call.params.attention.columns;
    const attn_sampler_tensor *const table = call.masks.block_table;
    const int64_t n_keys = call.layer[0].k->shape[2] * (table == nullptr ? 1 : table->shape[1]);
    columns = {columns.start + call.end, columns.stop + call.end};
    const Broken broken = break_span(call.random, columns, "params.columns", n_keys);
    for (int64_t *bound : {&columns.start, &columns.stop})
        if (std::abs(*bound / 2) < INT64_MAX / 4)
            *bound -= call.end;
    return broken;
}

Broken break_attention(Call &call) {
    Random &random = call.random;
    attn_sampler_attention_params &a = call.params.attention;
    const bool is_step = call.function == kDecodeStep, is_map = call.function == kAttentionMap;
    switch (random.below(13)) {
    case 0:
        return break_choice(random, a.lse_base, "params.lse_base", 2);
    case 1:
        return break_choice(random, a.causal, "params.causal", 2);
    case 2:
        return break_choice(random, a.softmax_scope, "params.softmax_scope", 2);
    case 3:
        return break_choice(random, a.diagonal, "params.diagonal", 2);
    case 4:
        return break_choice(random, a.reduction, "params.reduction", 3);
    case 5:
        break_choice(random, a.per_head, "", 2);
        break_choice(random, a.accumulate, "", 2);
        return {"params.", !is_step && call.function != kTopColumns};
    case 6:
        a.softmax_scale = random.pick({double{NAN}, HUGE_VAL, -HUGE_VAL, 2.36e38, -1e300});
        return {"params.softmax_scale", true};
    case 7:
        a.query_start = random.pick<int64_t>(
            {INT64_MIN, INT64_MAX, ATTN_SAMPLER_MAX_POSITION, -ATTN_SAMPLER_MAX_POSITION - 1});
        return {"params.query_start", true};
    case 8:
        if (!is_map)
            return break_attention(call);
        return break_span(random, a.rows, "params.rows", call.layer[0].q->shape[2]);
    case 9:
        a.softmax_scope ^= 1; /* with a log-sum-exp it may not be the block's */
        return {"softmax_lse", false};
    case 10: /* another number of sequences, or of heads, in more than one tensor */
        if (call.layer[0].q == nullptr)
            return break_attention(call);
        call.tensor("q").view.shape[0] += 2; /* which no other change mends */
        call.tensor("k").view.shape[0] += 2;
        return {"q and k", true, true};
    case 11:
        if (call.layer[0].q == nullptr || call.tensor("k").view.shape[1] == 1)
            return break_attention(call);
        call.tensor("q").view.shape[1] = call.tensor("k").view.shape[1] + 1;
        return {"k", true};
    default:
        if (call.layer[0].q == nullptr)
            return break_attention(call);
        return break_columns(call);
    }
}

Broken break_choice_of_columns(Call &call) {
    Random &random = call.random;
    attn_sampler_top_columns_params &top = call.top;
    const attn_sampler_span &columns = call.params.attention.columns;
    switch (random.below(6)) {
    case 0:
        top.count = random.pick<int64_t>({0, -1, INT64_MIN, INT64_MAX, columns.stop - columns.start + 1});
        return {"params.count", true};
    case 1:
        return break_choice(random, top.per, "params.per", 3);
    case 2:
        top.sinks = random.pick<int64_t>({-1, INT64_MIN, INT64_MAX, top.count + 1});
        return {"params.sinks", true};
    case 3:
        top.recent = random.pick<int64_t>({-1, INT64_MIN, INT64_MAX, top.count - top.sinks + 1});
        return {"params.recent", true};
    case 4:
        return break_choice(random, top.pool, "params.pool", 2);
    default:
        top.pool_width =
            random.pick<int64_t>({0, 2, -1, INT64_MIN, INT64_MAX, ATTN_SAMPLER_MAX_POOL_WIDTH + 2});
        return {"params.pool_width", true};
    }
}

Broken break_sampling(Call &call) {
    Random &random = call.random;
    attn_sampler_sampling_params &s = call.params.sampling;
    switch (random.below(6)) {
    case 3:
        s.top_k = random.pick<int64_t>({-1, INT64_MIN});
        return {"params.top_k", true};
    case 4:
        s.top_p = random.pick({double{NAN}, HUGE_VAL, -1e-9, 1.0001});
        return {"params.top_p", true};
    case 5:
        s.min_p = random.pick({double{NAN}, -HUGE_VAL, -1e-9, 1.0001});
        return {"params.min_p", true};
    case 0:
        return break_choice(random, s.metric, "params.metric", 3);
    case 1:
        s.temperature = random.pick({double{NAN}, HUGE_VAL, -1.0, 0x1p-121, 5e-324});
        return {"params.temperature", true};
    default:
        s.vocab_start =
            random.pick<int64_t>({-1, INT64_MIN, INT64_MAX, ATTN_SAMPLER_MAX_VOCAB - call.vocab + 1});
        return {"params.vocab_start", call.function == kTokenConfidence};
    }
}

Broken break_selection(Call &call) {
    Random &random = call.random;
    attn_sampler_selection_params &s = call.params.selection;
    switch (random.below(call.revises ? 7 : 3)) {
    case 0:
        return break_choice(random, s.rule, "params.rule", 3);
    case 1:
        return break_choice(random, s.fallback, "params.fallback", 2);
    case 2:
        s.tau = random.pick({double{NAN}, HUGE_VAL, -1e-9, 1.0001});
        return {"params.tau", true};
    case 3:
        s.replace_tau = random.pick({double{NAN}, -HUGE_VAL, -1e-9});
        return {"params.replace_tau", true};
    case 4:
        s.remask_tau = random.pick({double{NAN}, HUGE_VAL, -1e-9, 1.0001});
        return {"params.remask_tau", true};
    case 5:
        s.max_revisions = random.pick<int64_t>({-1, INT64_MIN});
        return {"params.max_revisions", true};
    default:
        return break_choice(random, s.revision_order, "params.revision_order", 3);
    }
}

Broken break_step(Call &call) {
    Random &random = call.random;
    attn_sampler_decode_step_params &p = call.params;
    switch (random.below(7)) {
    case 0:
        return break_span(random, p.block, "params.block", call.tokens->shape[1]);
    case 1:
        p.mask_token_id = random.pick<int64_t>({-1, call.vocab, INT64_MIN, INT64_MAX});
        return {"params.mask_token_id", true};
    case 2:
        return break_choice(random, p.query_rows, "params.query_rows", 2);
    case 3:
        call.num_layers = random.pick<int64_t>({-1, INT64_MIN, (1 << 20) + 1, INT64_MAX});
        return {"layers", true};
    case 4: {
        const bool counts = p.query_rows == ATTN_SAMPLER_QUERY_ROWS_MASKED && call.num_layers > 0;
        p.attention.query_start =
            random.pick<int64_t>({-ATTN_SAMPLER_MAX_POSITION, -1000, 1000, ATTN_SAMPLER_MAX_POSITION - 1});
        return {"params.query_rows", counts};
    }
    case 5:
        return break_sampling(call);
    default:
        return break_selection(call);
    }
}

Broken break_exec(Call &call) {
    Random &random = call.random;
    const bool has_layers =
        call.function <= kTopColumns || (call.function == kDecodeStep && call.num_layers > 0);
    switch (random.below(6)) {
    case 0:
        call.has_params = false;
        return {"params", true};
    case 1:
        call.has_exec = false;
        return {"exec", true};
    case 2:
        call.exec.num_threads = random.pick({0, -1, INT_MIN});
        return {"exec.num_threads", true};
    case 3:
        call.exec.device = random.pick({-1, 2, INT_MAX, INT_MIN});
        return {"exec.device", true};
    case 4:
        call.layers = nullptr;
        return {"layer", has_layers};
    default:
        call.exec.device = ATTN_SAMPLER_CUDA;
        return {"exec.device", true}; /* not in this build */
    }
}

Broken break_option(Call &call) {
    switch (call.function) {
    case kTopColumns:
        return call.random.chance(50) ? break_choice_of_columns(call) : break_attention(call);
    case kTokenConfidence:
        return break_sampling(call);
    case kSelectTokens:
        return break_selection(call);
    case kDecodeStep:
        return call.random.chance(50) ? break_step(call) : break_attention(call);
    default:
        return break_attention(call);
    }
}

Broken break_call(Call &call) {
    const int64_t kind = call.random.below(10);
    return kind == 0 ? break_exec(call) : kind < 6 ? break_tensor(call) : break_option(call);
}

/* Whether a message begins with this or, where that is none, with any argument's name; of a layer, perhaps.
 */
bool names(const Call &call, const std::string &name, std::string message) {
    if (message.rfind("layers[", 0) == 0)
        message = message.substr(message.find("].") + 2);
    if (!name.empty())
        return message.rfind(name, 0) == 0;
    const std::string start = message.substr(0, message.find_first_of(":.,"));
    for (const char *other : {"layer", "layers", "params", "exec"})
        if (start == other)
            return true;
    return std::any_of(call.tensors.begin(), call.tensors.end(), [&](auto &t) { return t.name == start; });
}

/* Breaks a call and judges the answer; whether it was refused. */
bool check_broken(Call &call) {
    const auto before = call.bytes();
    const bool twice = call.random.chance(25);
    if (twice)
        break_option(call);
    Broken broken = break_call(call);
    broken.elsewhere = broken.elsewhere || twice;
    const attn_sampler_status status = call.run();
    const std::string message = attn_sampler_last_error();
    if (status == ATTN_SAMPLER_OK && broken.surely)
        fail("accepted, with a wrong " + broken.name);
    if (status == ATTN_SAMPLER_OK)
        return false;
    if (status != ATTN_SAMPLER_INVALID_ARGUMENT && status != ATTN_SAMPLER_UNSUPPORTED)
        fail("status " + std::to_string(status) + ": " + message);
    if (!names(call, broken.elsewhere ? "" : broken.name, message))
        fail("broke " + broken.name + ", but the answer is: " + message);
    require(call.bytes() == before, "a refused call wrote something");
    return true;
}

void print_seed(int) { fprintf(stderr, "in the call of seed %" PRIu64 "\n", this_seed); }

} // namespace

int main(int argc, char **argv) {
    if (argc != 3)
        return 2;
    signal(SIGABRT, print_seed);
    const uint64_t first = strtoull(argv[1], nullptr, 10), count = strtoull(argv[2], nullptr, 10);
    std::atomic<uint64_t> next{first}, valid{0}, refused{0}, harmless{0};
    const auto work = [&] {
        for (uint64_t seed = next++; seed < first + count; seed = next++) {
            this_seed = seed;
            Call call(seed);
            if (seed % 2 == 0) {
                check_valid(call);
                ++valid;
            } else {
                ++(check_broken(call) ? refused : harmless);
            }
        }
    };
    std::thread other(work);
    work();
    other.join();
    printf("%" PRIu64 " valid calls, %" PRIu64 " refused, %" PRIu64 " broken without harm, on %s\n",
           valid.load(), refused.load(), harmless.load(), attn_sampler_cpu_isa());
}
