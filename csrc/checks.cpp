#include "checks.h"

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <utility>

#include "error.h"
#include "memory.h"
#include "row_checks.h"
#include "tensor_checks.h"

namespace attn_sampler {
namespace {

constexpr int64_t kMaxLayers = 1 << 20;

void check_choice(const char *name, int value, int count) {
    if (value < 0 || value >= count)
        throw Error(kInvalid, "%s: expected 0 to %d, got %d", name, count - 1, value);
}

int64_t length(const attn_sampler_span &span) { return span.stop - span.start; }

void check_span(const char *name, const attn_sampler_span &span, int64_t first, int64_t end) {
    if (span.start < first || span.start >= span.stop || span.stop > end)
        throw Error(kInvalid,
                    "%s: expected %" PRId64 " <= start < stop <= %" PRId64 ", got [%" PRId64 ", %" PRId64 ")",
                    name, first, end, span.start, span.stop);
}

void check_span(const char *name, const attn_sampler_span &span, int64_t size) {
    check_span(name, span, 0, size);
}

int num_threads(const attn_sampler_exec &exec) {
    constexpr int kMostThreads = 256; /* each has memory of its own */
    return exec.device == ATTN_SAMPLER_CPU ? std::min(exec.num_threads, kMostThreads) : 1;
}

/* Of keys in pages: their number, too, is the table's to say. */
void set_pages(AttentionProblem &p, const Tensor &k, const Tensor *block_table) {
    check_tensor("block_table", block_table, 2);
    check_dtype("block_table", block_table, ATTN_SAMPLER_INT32);
    check_size("block_table", block_table, 0, p.batch);
    const int64_t page_size = k.shape[2], table_size = block_table->shape[1];
    if (page_size < 1)
        throw Error(kInvalid, "k: expected pages of at least one key with a block_table, got 0");
    if (table_size > ATTN_SAMPLER_MAX_KEYS / page_size)
        throw Error(ATTN_SAMPLER_UNSUPPORTED,
                    "block_table: expected fewer than 2^30 keys, got %" PRId64 " pages of %" PRId64,
                    table_size, page_size);
    p.n_keys = table_size * page_size;
    set_view(p.pages.table, block_table);
    p.pages.count = k.shape[0];
    p.pages.set_size(page_size);
}

/* The scales of float8 q or k, if there are any. */
void check_descale(const char *name, const Tensor *descale, const AttentionProblem &p) {
    if (descale != nullptr && p.dtype != ATTN_SAMPLER_FLOAT8_E4M3)
        throw Error(kInvalid, "%s: expected NULL with q and k of dtype %s", name, dtype_name(p.dtype));
    check_optional(name, descale, ATTN_SAMPLER_FLOAT32, {p.batch, p.kv_heads});
}

void check_window(const char *name, int64_t keys) {
    if (keys < -1 || keys >= ATTN_SAMPLER_MAX_POSITION)
        throw Error(kInvalid, "%s: expected -1, or 0 to 2^62 - 1, got %" PRId64, name, keys);
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
    if (!(std::fabs(params.softmax_scale) <= ATTN_SAMPLER_MAX_SCALE))
        throw Error(kInvalid, "params.softmax_scale: expected a finite number of magnitude up to %g, got %g",
                    ATTN_SAMPLER_MAX_SCALE, params.softmax_scale);
    if (params.query_start < -ATTN_SAMPLER_MAX_POSITION || params.query_start >= ATTN_SAMPLER_MAX_POSITION)
        throw Error(kInvalid, "params.query_start: expected at most 2^62 in size, got %" PRId64,
                    params.query_start);
    check_window("params.window_left", params.window_left);
    check_window("params.window_right", params.window_right);
}

/* Everything of an attention problem but its output. */
AttentionProblem check_attention(const attn_sampler_layer &layer, const attn_sampler_masks *masks,
                                 const attn_sampler_attention_params &params, const attn_sampler_exec &exec) {
    const Tensor *const q = layer.q, *const k = layer.k;
    const Tensor *const key_mask = masks == nullptr ? nullptr : masks->key_mask;
    const Tensor *const query_mask = masks == nullptr ? nullptr : masks->query_mask;
    const Tensor *const block_table = masks == nullptr ? nullptr : masks->block_table;
    const Tensor *const seqlens_k = masks == nullptr ? nullptr : masks->seqlens_k;
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
    if (block_table == nullptr)
        check_size("k", k, 0, p.batch);
    check_size("k", k, 3, p.headdim);
    if (p.headdim < 1)
        throw Error(kInvalid, "q: expected a head dimension of at least 1, got 0");
    if (p.heads < 1 || p.kv_heads < 1 || p.heads % p.kv_heads != 0)
        throw Error(kInvalid,
                    "k: expected a number of heads that divides the %" PRId64 " heads of q, got %" PRId64,
                    p.heads, p.kv_heads);
    const int64_t rows = std::max<int64_t>(p.batch, 1) * std::max<int64_t>(p.n_rows, 1) * p.heads;
    if (rows > ATTN_SAMPLER_MAX_ROWS)
        throw Error(kInvalid, "q: expected at most 2^32 query rows of all heads and sequences, got %" PRId64,
                    rows);
    if (p.n_keys > ATTN_SAMPLER_MAX_KEYS)
        throw Error(ATTN_SAMPLER_UNSUPPORTED, "k: expected fewer than 2^30 keys, got %" PRId64, p.n_keys);
    if (block_table != nullptr)
        set_pages(p, *k, block_table);
    check_optional("seqlens_k", seqlens_k, ATTN_SAMPLER_INT32, {p.batch});
    check_optional("softmax_lse", layer.softmax_lse, ATTN_SAMPLER_FLOAT32, {p.batch, p.heads, p.n_rows});
    check_descale("q_descale", layer.q_descale, p);
    check_descale("k_descale", layer.k_descale, p);
    check_optional("key_mask", key_mask, ATTN_SAMPLER_BOOL, {p.batch, p.n_keys});
    check_optional("query_mask", query_mask, ATTN_SAMPLER_BOOL, {p.batch, p.n_rows});
    attn_sampler_attention_params placed = params;
    const int64_t ends_at = seqlens_k == nullptr ? 0 : p.n_keys; /* what positions of the caller count from */
    check_span("params.columns", params.columns, -ends_at, p.n_keys - ends_at);
    check_attention_params(params);
    placed.columns = {params.columns.start + ends_at, params.columns.stop + ends_at};
    placed.query_start += ends_at;
    if (layer.softmax_lse != nullptr && params.softmax_scope == ATTN_SAMPLER_SCOPE_BLOCK)
        throw Error(kInvalid, "softmax_lse: expected NULL in block scope");
    set_view(p.q, q);
    set_view(p.k, k);
    set_view(p.softmax_lse, layer.softmax_lse);
    set_view(p.q_descale, layer.q_descale);
    set_view(p.k_descale, layer.k_descale);
    set_view(p.key_mask, key_mask);
    set_view(p.query_mask, query_mask);
    set_view(p.seqlens_k, seqlens_k);
    p.params = placed;
    p.num_threads = num_threads(exec);
    return p;
}

void check_layer(const attn_sampler_layer *layer) {
    if (layer == nullptr)
        throw Error(kInvalid, "layer: expected an address, got NULL");
}

/* The output, whose dimensions are some of batch, head, row and column. */
void set_output(AttentionProblem &p, const Tensor *out, std::initializer_list<int64_t> shape,
                const attn_sampler_layer &layer, const attn_sampler_masks *masks) {
    check_output("out", out, ATTN_SAMPLER_FLOAT32, shape);
    Written written;
    written.add("out", out);
    written.read(layer);
    written.read(masks);
    if (p.column_mask.data != nullptr) /* of a map, else it is not looked at */
        written.read("column_mask", masks->column_mask);
    p.out.data = static_cast<float *>(out->data);
    int from = 0, to = 0;
    for (const int64_t size : shape) {
        p.out.stride[to++] = size < 2 ? 0 : out->stride[from];
        from += size != kNone;
    }
}

/* What a layer's check said is about that layer, where it names one of its tensors. */
Error of_layer(int64_t layer, const Error &error) {
    const char *const message = error.what();
    for (const char *const start : {"q:", "k:", "softmax_lse:", "q_descale:", "k_descale:"})
        if (strncmp(message, start, strlen(start)) == 0)
            return Error(error.status(), "layers[%" PRId64 "].%s", layer, message);
    return error;
}

void check_selection_params(const attn_sampler_selection_params &params) {
    check_choice("params.rule", params.rule, 3);
    check_choice("params.fallback", params.fallback, 2);
    check_unit("params.tau", params.tau);
}

/* Of a selection that may revise: the budget and what became of the tokens are written. */
void check_revision(const attn_sampler_revision &revision, const attn_sampler_selection_params &params,
                    int64_t batch, int64_t columns, Written &written) {
    if (!(params.replace_tau >= 0.0))
        throw Error(kInvalid, "params.replace_tau: expected a number >= 0, got %g", params.replace_tau);
    check_unit("params.remask_tau", params.remask_tau);
    if (params.max_revisions < 0)
        throw Error(kInvalid, "params.max_revisions: expected at least 0, got %" PRId64,
                    params.max_revisions);
    check_choice("params.revision_order", params.revision_order, 3);
    check_output("budget", revision.budget, ATTN_SAMPLER_INT32, {batch, columns});
    check_output("revised", revision.revised, ATTN_SAMPLER_UINT8, {batch, columns});
    written.add("budget", revision.budget);
    written.add("revised", revision.revised);
}

SelectProblem selection(const Tensor *scores, const Tensor *confidence, const Tensor *masked,
                        const attn_sampler_selection_params &params, const Tensor *selected,
                        const attn_sampler_revision *revision) {
    SelectProblem p{};
    p.batch = scores->shape[0];
    p.columns = scores->shape[1];
    set_view(p.scores, scores);
    set_view(p.confidence, confidence);
    set_view(p.masked, masked);
    set_view(p.selected, selected);
    p.params = params;
    set_of_rows(p.rule, "params.rules", params.rules, ATTN_SAMPLER_INT32, params.rule, p.batch);
    set_of_rows(p.tau, "params.taus", params.taus, ATTN_SAMPLER_FLOAT32, params.tau, p.batch);
    if (revision != nullptr) {
        set_view(p.budget, revision->budget);
        set_view(p.revised, revision->revised);
        set_view(p.current, revision->current);
    }
    return p;
}

} // namespace

const Device &check_exec(const attn_sampler_exec *exec) {
    if (exec == nullptr)
        throw Error(kInvalid, "exec: expected an address, got NULL");
    check_choice("exec.device", exec->device, 2);
    const bool on_cpu = exec->device == ATTN_SAMPLER_CPU;
    const Device &device = on_cpu ? kCpuDevice : kCudaDevice;
    if (const char *const reason = device.unavailable())
        throw Error(ATTN_SAMPLER_UNSUPPORTED, "exec.device: %s", reason);
    if (on_cpu && exec->num_threads < 1)
        throw Error(kInvalid, "exec.num_threads: expected at least 1, got %d", exec->num_threads);
    if (on_cpu)
        return device;
    if (exec->workspace_size < 0 || (exec->workspace == nullptr && exec->workspace_size > 0))
        throw Error(kInvalid, "exec.workspace: expected an address and a size >= 0");
    if (reinterpret_cast<uintptr_t>(exec->workspace) % 256 != 0)
        throw Error(kInvalid, "exec.workspace: expected an address aligned to 256 bytes");
    return device;
}

AttentionProblem check_column_scores(const attn_sampler_layer *layer, const attn_sampler_masks *masks,
                                     const attn_sampler_attention_params &params, const Tensor *out,
                                     const attn_sampler_exec &exec) {
    check_layer(layer);
    AttentionProblem p = check_attention(*layer, masks, params, exec);
    set_output(p, out, {p.batch, params.per_head ? p.heads : kNone, kNone, length(params.columns)}, *layer,
               masks);
    return p;
}

AttentionProblem check_attention_map(const attn_sampler_layer *layer, const attn_sampler_masks *masks,
                                     const attn_sampler_attention_params &params, const Tensor *out,
                                     const attn_sampler_exec &exec) {
    check_layer(layer);
    AttentionProblem p = check_attention(*layer, masks, params, exec);
    check_span("params.rows", params.rows, p.n_rows);
    const int64_t columns = length(params.columns);
    if (masks != nullptr) {
        check_optional("column_mask", masks->column_mask, ATTN_SAMPLER_BOOL, {p.batch, columns});
        set_view(p.column_mask, masks->column_mask);
    }
    const bool is_whole = params.reduction == ATTN_SAMPLER_MAP_REDUCTION_NONE;
    set_output(p, out,
               {p.batch, params.per_head ? p.heads : kNone, length(params.rows), is_whole ? columns : kNone},
               *layer, masks);
    return p;
}

TopProblem check_top_columns(const attn_sampler_layer *layer, const attn_sampler_masks *masks,
                             const attn_sampler_top_columns_params &params, const Tensor *positions,
                             const Tensor *scores, const attn_sampler_exec &exec) {
    check_layer(layer);
    TopProblem p{};
    p.params = params;
    p.params.attention.per_head = 0;
    p.params.attention.accumulate = 0;
    p.attention = check_attention(*layer, masks, p.params.attention, exec);
    check_choice("params.per", params.per, 3);
    check_choice("params.pool", params.pool, 2);
    if (params.pool_width < 1 || params.pool_width > ATTN_SAMPLER_MAX_POOL_WIDTH ||
        params.pool_width % 2 == 0)
        throw Error(kInvalid, "params.pool_width: expected an odd number from 1 to %d, got %" PRId64,
                    ATTN_SAMPLER_MAX_POOL_WIDTH, params.pool_width);
    const int64_t columns = length(params.attention.columns);
    if (params.count < 1 || params.count > columns)
        throw Error(kInvalid, "params.count: expected 1 to the %" PRId64 " columns, got %" PRId64, columns,
                    params.count);
    if (params.sinks < 0 || params.sinks > params.count)
        throw Error(kInvalid, "params.sinks: expected 0 to %" PRId64 ", got %" PRId64, params.count,
                    params.sinks);
    if (params.recent < 0 || params.recent > params.count - params.sinks)
        throw Error(kInvalid, "params.recent: expected 0 to %" PRId64 ", got %" PRId64,
                    params.count - params.sinks, params.recent);
    p.groups = params.per == ATTN_SAMPLER_PER_KV_HEAD ? p.attention.kv_heads
               : params.per == ATTN_SAMPLER_PER_HEAD  ? p.attention.heads
                                                      : 1;
    const std::initializer_list<int64_t> shape = {p.attention.batch, p.groups, params.count};
    check_output("positions", positions, ATTN_SAMPLER_INT64, shape);
    check_output("scores", scores, ATTN_SAMPLER_FLOAT32, shape);
    Written written;
    written.add("positions", positions);
    written.add("scores", scores);
    written.read(*layer);
    written.read(masks);
    set_view(p.positions, positions);
    set_view(p.scores, scores);
    return p;
}

ConfidenceProblem check_token_confidence(const Tensor *logits, const Tensor *current_ids,
                                         const attn_sampler_sampling_params &params, const Tensor *token_ids,
                                         const Tensor *confidence, const Tensor *log_prob,
                                         const Tensor *current, const attn_sampler_exec &exec) {
    check_tensor("logits", logits, 3);
    check_float("logits", logits);
    ConfidenceProblem p{};
    p.batch = logits->shape[0];
    p.positions = logits->shape[1];
    p.vocab = logits->shape[2];
    if (p.vocab > ATTN_SAMPLER_MAX_VOCAB)
        throw Error(kInvalid, "logits: expected a vocabulary of at most 2^34 tokens, got %" PRId64, p.vocab);
    if (p.positions > ATTN_SAMPLER_MAX_KEYS)
        throw Error(kInvalid, "logits: expected fewer than 2^30 positions, got %" PRId64, p.positions);
    if (p.vocab - (params.exclude_token_id >= 0 && params.exclude_token_id < p.vocab) < 1)
        throw Error(kInvalid, "logits: expected a vocabulary of at least one token to choose");
    check_output("token_ids", token_ids, ATTN_SAMPLER_INT64, {p.batch, p.positions});
    check_output("confidence", confidence, ATTN_SAMPLER_FLOAT32, {p.batch, p.positions});
    Written written;
    written.add("token_ids", token_ids);
    written.add("confidence", confidence);
    if ((current_ids == nullptr) != (current == nullptr))
        throw Error(kInvalid, "current_ids, current: expected both or none");
    check_optional("current_ids", current_ids, ATTN_SAMPLER_INT64, {p.batch, p.positions});
    const std::pair<const char *, const Tensor *> others[] = {{"log_prob", log_prob}, {"current", current}};
    for (const auto &[name, other] : others) {
        if (other == nullptr)
            continue;
        check_output(name, other, ATTN_SAMPLER_FLOAT32, {p.batch, p.positions});
        written.add(name, other);
    }
    written.read("current_ids", current_ids);
    written.read("logits", logits);
    check_choice("params.metric", params.metric, 3);
    if (params.vocab_start < 0 || params.vocab_start > ATTN_SAMPLER_MAX_VOCAB - p.vocab)
        throw Error(kInvalid, "params.vocab_start: expected 0 to %" PRId64 ", got %" PRId64,
                    ATTN_SAMPLER_MAX_VOCAB - p.vocab, params.vocab_start);
    p.draws = draws_of(params, p.batch, p.vocab);
    p.bitmask = bitmask_of(params.token_bitmask, p.batch, p.positions, p.vocab);
    written.read(params);
    p.dtype = logits->dtype;
    set_view(p.logits, logits);
    set_view(p.token_ids, token_ids);
    set_view(p.confidence, confidence);
    set_view(p.log_prob, log_prob);
    set_view(p.current_ids, current_ids);
    set_view(p.current, current);
    p.metric = params.metric;
    p.excluded = params.exclude_token_id;
    p.vocab_start = params.vocab_start;
    p.num_threads = num_threads(exec);
    return p;
}

SelectProblem check_select_tokens(const Tensor *scores, const Tensor *confidence, const Tensor *masked,
                                  const attn_sampler_selection_params &params, const Tensor *selected,
                                  const attn_sampler_revision *revision) {
    check_selection_params(params);
    check_tensor("scores", scores, 2);
    check_dtype("scores", scores, ATTN_SAMPLER_FLOAT32);
    const int64_t batch = scores->shape[0], columns = scores->shape[1];
    check_like("confidence", confidence, ATTN_SAMPLER_FLOAT32, {batch, columns});
    check_like("masked", masked, ATTN_SAMPLER_BOOL, {batch, columns});
    check_output("selected", selected, ATTN_SAMPLER_BOOL, {batch, columns});
    Written written;
    written.add("selected", selected);
    SelectProblem p = selection(scores, confidence, masked, params, selected, revision);
    if (revision != nullptr) {
        check_revision(*revision, params, batch, columns, written);
        check_like("current", revision->current, ATTN_SAMPLER_FLOAT32, {batch, columns});
        check_like("differs", revision->differs, ATTN_SAMPLER_BOOL, {batch, columns});
        written.read("current", revision->current);
        written.read("differs", revision->differs);
        set_view(p.differs, revision->differs);
    }
    written.read("scores", scores);
    written.read("confidence", confidence);
    written.read("masked", masked);
    written.read(params);
    return p;
}

StepProblem check_decode_step(const Tensor *tokens, const Tensor *logits, const attn_sampler_layer *layers,
                              int64_t num_layers, const attn_sampler_masks *masks,
                              const attn_sampler_decode_step_params &params, const Tensor *scores,
                              const Tensor *token_ids, const Tensor *confidence, const Tensor *selected,
                              const attn_sampler_revision *revision, const attn_sampler_exec &exec,
                              std::vector<AttentionProblem> &problems) {
    check_tensor("tokens", tokens, 2);
    check_dtype("tokens", tokens, ATTN_SAMPLER_INT64);
    check_apart("tokens", tokens);
    check_span("params.block", params.block, tokens->shape[1]);
    const int64_t batch = tokens->shape[0], block = length(params.block);
    check_tensor("logits", logits, 3);
    check_size("logits", logits, 0, batch);
    check_size("logits", logits, 1, block);
    if (params.mask_token_id < 0 || params.mask_token_id >= logits->shape[2])
        throw Error(kInvalid, "params.mask_token_id: expected 0 to %" PRId64 ", got %" PRId64,
                    logits->shape[2] - 1, params.mask_token_id);
    attn_sampler_sampling_params sampling = params.sampling;
    sampling.exclude_token_id = params.mask_token_id;
    sampling.vocab_start = 0;
    StepProblem step{};
    step.predict =
        check_token_confidence(logits, nullptr, sampling, token_ids, confidence, nullptr, nullptr, exec);
    check_selection_params(params.selection);
    check_output("scores", scores, ATTN_SAMPLER_FLOAT32, {batch, block});
    check_output("selected", selected, ATTN_SAMPLER_BOOL, {batch, block});
    step.select = selection(scores, confidence, nullptr, params.selection, selected, revision);
    Written written;
    written.add("tokens", tokens);
    written.add("token_ids", token_ids);
    written.add("confidence", confidence);
    written.add("selected", selected);
    if (revision != nullptr) {
        check_revision(*revision, params.selection, batch, block, written);
        check_output("current", revision->current, ATTN_SAMPLER_FLOAT32, {batch, block});
        written.add("current", revision->current);
        set_view(step.predict.current, revision->current);
        if (revision->log_prob != nullptr) {
            check_output("log_prob", revision->log_prob, ATTN_SAMPLER_FLOAT32, {batch, block});
            written.add("log_prob", revision->log_prob);
            set_view(step.predict.log_prob, revision->log_prob);
        }
    }
    if (num_layers == 0)
        written.read("scores", scores);
    else
        written.add("scores", scores);
    written.read("logits", logits);
    written.read(sampling);
    written.read(params.selection);
    check_choice("params.query_rows", params.query_rows, 2);
    if (num_layers < 0 || (num_layers > 0 && layers == nullptr))
        throw Error(kInvalid, "layers: expected an address and a count >= 0");
    if (num_layers > kMaxLayers)
        throw Error(kInvalid, "layers: expected at most %" PRId64 ", got %" PRId64, kMaxLayers, num_layers);

    attn_sampler_attention_params attention = params.attention;
    attention.per_head = 0;
    attention.accumulate = 1;
    check_attention_params(attention); /* without a layer too */
    problems.reserve(static_cast<size_t>(num_layers));
    for (int64_t i = 0; i < num_layers; ++i) {
        try {
            problems.push_back(check_attention(layers[i], masks, attention, exec));
        } catch (const Error &error) {
            throw of_layer(i, error);
        }
        AttentionProblem &p = problems.back();
        if (p.batch != batch)
            throw Error(kInvalid, "layers[%" PRId64 "].q: expected %" PRId64 " sequences, got %" PRId64, i,
                        batch, p.batch);
        if (length(attention.columns) != block)
            throw Error(kInvalid, "params.attention: expected as many columns as the block has");
        p.out = {static_cast<float *>(scores->data),
                 {step.select.scores.stride[0], 0, 0, step.select.scores.stride[1]}};
        written.read(layers[i], i);
    }
    written.read(masks);
    step.layers = problems.data();
    step.num_layers = num_layers;
    set_view(step.tokens, tokens);
    step.mask_token_id = params.mask_token_id;
    const int64_t *const first_token = step.tokens.data;
    if (batch > 0) /* else there may be no address */
        step.tokens.data += params.block.start * step.tokens.stride[1];
    if (revision != nullptr)
        step.predict.current_ids = {step.tokens.data, {step.tokens.stride[0], step.tokens.stride[1]}};
    if (params.query_rows == ATTN_SAMPLER_QUERY_ROWS_MASKED && num_layers > 0) {
        const int64_t first_row = attention.query_start - attention.columns.start + params.block.start;
        const int64_t rows = problems[0].n_rows;
        for (const AttentionProblem &p : problems)
            if (p.n_rows != rows)
                throw Error(kInvalid, "layers: expected one number of rows in all of them");
        if (first_row < 0 || first_row + rows > tokens->shape[1])
            throw Error(kInvalid,
                        "params.query_rows: expected every row at one of the tokens, got rows at %" PRId64
                        " to %" PRId64,
                        first_row, first_row + rows - 1);
        if (batch > 0)
            step.row_tokens = first_token + first_row * step.tokens.stride[1];
    }
    return step;
}

} // namespace attn_sampler
