/* A random valid call of the C API, with all that it points to. */
#ifndef ATTN_SAMPLER_TESTS_RANDOM_CALL_H_
#define ATTN_SAMPLER_TESTS_RANDOM_CALL_H_

#include <algorithm>
#include <cinttypes>
#include <climits>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <initializer_list>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "attn_sampler.h"

namespace {

class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed) {}
    uint64_t bits() { /* splitmix64 */
        uint64_t x = state_ += 0x9E3779B97F4A7C15u;
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
        x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
        return x ^ (x >> 31);
    }
    int64_t below(int64_t n) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(n)); }
    int64_t between(int64_t a, int64_t b) { return a + below(b - a + 1); } /* b included */
    bool chance(int percent) { return below(100) < percent; }
    double real(double a, double b) { return a + (b - a) * static_cast<double>(bits() >> 11) * 0x1p-53; }
    template <typename T>
    T pick(std::initializer_list<T> of) {
        return of.begin()[below(static_cast<int64_t>(of.size()))];
    }

  private:
    uint64_t state_;
};

enum class Role { input, rows, output }; /* rows: an input whose last stride is 1 */

int64_t element_size(int dtype) {
    return dtype == ATTN_SAMPLER_INT64                                       ? 8
           : dtype == ATTN_SAMPLER_FLOAT32 || dtype == ATTN_SAMPLER_INT32    ? 4
           : dtype == ATTN_SAMPLER_FLOAT16 || dtype == ATTN_SAMPLER_BFLOAT16 ? 2
                                                                             : 1;
}

/* A tensor and its memory, all of 0xFF (NaN, or no bool) where no element lies. */
struct Tensor {
    attn_sampler_tensor view;
    const attn_sampler_tensor **slot; /* where the call has its address */
    Role role;
    bool required;
    std::string name;
    std::vector<int> tied; /* dimensions whose size is compared with another tensor's */
    std::unique_ptr<unsigned char[]> memory;
    size_t bytes = 0;

    bool empty() const { return std::count(view.shape, view.shape + view.ndim, 0) > 0; }

    void place(Random &random, int dtype, std::initializer_list<int64_t> shape) {
        constexpr int64_t kNotRead = INT64_MIN;
        view.dtype = dtype;
        view.ndim = static_cast<int>(shape.size());
        std::fill_n(view.shape, 4, kNotRead);
        std::fill_n(view.stride, 4, kNotRead);
        std::copy(shape.begin(), shape.end(), view.shape);
        int order[4] = {0, 1, 2, 3}; /* outermost first */
        for (int i = view.ndim - (role == Role::rows ? 2 : 1); i > 0 && random.chance(40); --i)
            std::swap(order[i], order[random.below(i + 1)]);
        int64_t extent = 1, origin = 0; /* in elements */
        for (int i = view.ndim - 1; i >= 0; --i) {
            const int64_t size = view.shape[order[i]];
            int64_t &stride = view.stride[order[i]];
            const bool is_row = role == Role::rows && i == view.ndim - 1, is_input = role != Role::output;
            stride = extent + (!is_row && random.chance(25) ? random.below(9) : 0);
            if (size < 2)
                stride = random.pick<int64_t>({1, 0, -7, INT64_MAX, INT64_MIN});
            else if (is_input && !is_row && random.chance(20)) /* the same again, overlaps, backwards */
                stride = random.pick<int64_t>({0, random.below(extent) + 1, -stride});
            if (size < 2)
                continue;
            extent += std::abs(stride) * (size - 1);
            origin -= std::min<int64_t>(stride, 0) * (size - 1);
        }
        if (empty()) {
            view.data = nullptr;
            if (random.chance(30))
                return;
            extent = origin = 0;
        }
        const int64_t lead = random.below(4); /* aligned to an element, not more */
        bytes = static_cast<size_t>((lead + extent) * element_size(dtype));
        memory.reset(new unsigned char[bytes]);
        memset(memory.get(), 0xFF, bytes);
        view.data = memory.get() + (lead + origin) * element_size(dtype);
    }

    /* use(address) for each element in turn, the last dimension innermost. */
    template <typename Use>
    void each(const Use &use) const {
        int64_t at[4] = {};
        if (empty())
            return;
        for (int i = 0; i >= 0;) {
            int64_t offset = 0;
            for (int d = 0; d < view.ndim; ++d)
                offset += at[d] * view.stride[d];
            use(static_cast<unsigned char *>(view.data) + offset * element_size(view.dtype));
            for (i = view.ndim - 1; i >= 0 && ++at[i] == view.shape[i]; --i)
                at[i] = 0;
        }
    }

    template <typename T>
    std::vector<T> values() const {
        std::vector<T> all;
        each([&](const unsigned char *at) {
            T value;
            memcpy(&value, at, sizeof(T));
            all.push_back(value);
        });
        return all;
    }

    void set(unsigned char *at, double value) const {
        const auto put = [&](auto x) { memcpy(at, &x, sizeof(x)); };
        const float single = static_cast<float>(value);
        uint32_t bits;
        memcpy(&bits, &single, 4);
        /* To fewer bits of exponent and mantissa: 0 below what is normal there. */
        const auto narrow = [&](int exponent_bits, int mantissa_bits) -> uint32_t {
            const int bias = (1 << (exponent_bits - 1)) - 1, most = 2 * bias + 1;
            const int exponent = static_cast<int>(bits >> 23 & 0xFF) - 127 + bias;
            const uint32_t sign = bits >> 31 << (exponent_bits + mantissa_bits);
            const uint32_t mantissa = (bits & 0x7FFFFF) >> (23 - mantissa_bits);
            if (exponent <= 0)
                return sign;
            return sign | static_cast<uint32_t>(std::min(exponent, most)) << mantissa_bits | mantissa;
        };
        switch (view.dtype) {
        case ATTN_SAMPLER_FLOAT32:
            return put(single);
        case ATTN_SAMPLER_FLOAT16:
            return put(static_cast<uint16_t>(narrow(5, 10)));
        case ATTN_SAMPLER_BFLOAT16:
            return put(static_cast<uint16_t>(bits >> 16));
        case ATTN_SAMPLER_FLOAT8_E4M3:
            return put(static_cast<uint8_t>(std::isfinite(value) ? narrow(4, 3) : 0x7F));
        case ATTN_SAMPLER_INT64:
            return put(static_cast<int64_t>(value));
        case ATTN_SAMPLER_INT32:
            return put(static_cast<int32_t>(value));
        default:
            return put(static_cast<uint8_t>(value));
        }
    }
};

enum Function {
    kColumnScores,
    kAttentionMap,
    kTopColumns,
    kTokenConfidence,
    kSelectTokens,
    kDecodeStep,
    kFunctions
};

/* A call: its arguments, valid as drawn. */
struct Call {
    Random random;
    Function function;
    std::deque<Tensor> tensors;
    bool plain = true; /* no value is NaN or infinite, no logit far from the others */
    int64_t batch, rows = 0 /* of all heads and layers */, vocab = 0;
    int64_t pages = 0, page_size = 0; /* of keys that lie in pages */
    int64_t end = 0;                  /* what key positions count from */

    attn_sampler_layer layer[3] = {};
    const attn_sampler_layer *layers = layer;
    int64_t num_layers = 1;
    attn_sampler_masks masks = {};
    attn_sampler_decode_step_params params = {}; /* those of the others are part of them */
    attn_sampler_top_columns_params top = {};    /* but for the attention */
    attn_sampler_exec exec = {};
    const attn_sampler_tensor *positions = nullptr, *out = nullptr, *tokens = nullptr, *logits = nullptr,
                              *scores = nullptr, *token_ids = nullptr, *confidence = nullptr,
                              *masked = nullptr, *selected = nullptr, *current_ids = nullptr,
                              *log_prob = nullptr, *current = nullptr;
    attn_sampler_revision revision = {};
    attn_sampler_tensor unread = {nullptr, {-1, INT64_MAX, 1, 7}, {INT64_MIN, INT64_MAX, 0, 1}, 4, -1};
    bool has_params = true, has_exec = true, revises = false;

    explicit Call(uint64_t seed) : random(seed), function(static_cast<Function>(random.below(kFunctions))) {
        batch = random.pick<int64_t>({1, 1, 2, 2, 3, 0});
        exec.num_threads = static_cast<int>(random.between(1, 3));
        if (function <= kTopColumns)
            draw_attention();
        else if (function == kTokenConfidence)
            draw_confidence(random.below(6));
        else if (function == kSelectTokens)
            draw_selection(random.below(70), Role::input);
        else
            draw_step();
        if (function != kAttentionMap && random.chance(10))
            masks.column_mask = &unread;
    }

    attn_sampler_status run() {
        const attn_sampler_decode_step_params *const p = has_params ? &params : nullptr;
        attn_sampler_exec *const e = has_exec ? &exec : nullptr;
        const bool has_masks =
            masks.key_mask || masks.query_mask || masks.column_mask || masks.block_table || masks.seqlens_k;
        const attn_sampler_masks *const m = has_masks ? &masks : nullptr;
        const attn_sampler_revision *const r = revises ? &revision : nullptr;
        switch (function) {
        case kColumnScores:
            return attn_sampler_column_scores(layers, m, p ? &p->attention : nullptr, out, e);
        case kAttentionMap:
            return attn_sampler_attention_map(layers, m, p ? &p->attention : nullptr, out, e);
        case kTopColumns:
            top.attention = params.attention;
            return attn_sampler_top_columns(layers, m, p ? &top : nullptr, positions, scores, e);
        case kTokenConfidence:
            return attn_sampler_token_confidence(logits, current_ids, p ? &p->sampling : nullptr, token_ids,
                                                 confidence, log_prob, current, e);
        case kSelectTokens:
            return attn_sampler_select_tokens(scores, confidence, masked, p ? &p->selection : nullptr,
                                              selected, r, e);
        default:
            return attn_sampler_decode_step(tokens, logits, layers, num_layers, m, p, scores, token_ids,
                                            confidence, selected, r, e);
        }
    }

    Tensor &tensor(const char *name) { /* the first of this name */
        return *std::find_if(tensors.begin(), tensors.end(), [&](auto &t) { return t.name == name; });
    }

    std::vector<std::vector<unsigned char>> bytes() const {
        std::vector<std::vector<unsigned char>> all;
        for (const Tensor &t : tensors)
            all.emplace_back(t.memory.get(), t.memory.get() + t.bytes);
        return all;
    }

    void restore(const std::vector<std::vector<unsigned char>> &all) {
        for (size_t i = 0; i < tensors.size(); ++i)
            std::copy(all[i].begin(), all[i].end(), tensors[i].memory.get());
    }

  private:
    /* A tensor of values from [low, high], whole ones where the dtype is; few are not finite. */
    void add(const attn_sampler_tensor *&slot, const char *name, Role role, int dtype,
             std::initializer_list<int64_t> shape, double low, double high,
             std::vector<int> tied = {0, 1, 2, 3}, bool required = true) {
        Tensor &t = tensors.emplace_back();
        t.slot = &slot;
        t.name = name;
        t.role = role;
        t.required = required;
        t.tied = tied;
        t.place(random, dtype, shape);
        slot = &t.view;
        const bool whole =
            dtype == ATTN_SAMPLER_INT64 || dtype == ATTN_SAMPLER_INT32 || dtype == ATTN_SAMPLER_BOOL;
        const int percent = !whole && !t.empty() && random.chance(5) ? random.pick({1, 30, 100}) : 0;
        plain = plain && percent == 0;
        t.each([&](unsigned char *at) {
            const double value = random.real(low, high + whole);
            t.set(at, random.chance(percent)
                          ? random.pick<double>({NAN, 60.0, HUGE_VAL, -HUGE_VAL, 3e38, 1e-40, -0.0})
                          : value);
        });
    }
    void add_output(const attn_sampler_tensor *&slot, const char *name, int dtype,
                    std::initializer_list<int64_t> shape) {
        add(slot, name, Role::output, dtype, shape, 0, 0);
        Tensor &t = tensors.back();
        std::fill_n(t.memory.get(), t.bytes, 0xFF); /* so that what is not written shows */
    }

    int64_t size() { return random.pick<int64_t>({1, 2, 3, 5, 16, 17, 33, 64, 65, random.between(1, 130)}); }
    attn_sampler_span span(int64_t size) {
        const int64_t start = random.below(size);
        return {start, random.between(start + 1, size)};
    }

    void draw_layer(int i, int64_t n_rows, int64_t n_keys) {
        attn_sampler_layer &l = layer[i];
        const int64_t kv_heads = random.pick<int64_t>({1, 1, 2, 3}),
                      heads = kv_heads * random.pick({1, 2, 4});
        const int64_t most = std::max<int64_t>(1, 1000000 / (n_keys * std::max<int64_t>(n_rows * heads, 1)));
        const int64_t headdim = std::min(size(), most);
        const int dtype = random.pick<int>(
            {ATTN_SAMPLER_FLOAT32, ATTN_SAMPLER_FLOAT16, ATTN_SAMPLER_BFLOAT16, ATTN_SAMPLER_FLOAT8_E4M3});
        add(l.q, "q", Role::rows, dtype, {batch, heads, n_rows, headdim}, -1.5, 1.5, {0, 3});
        if (page_size > 0)
            add(l.k, "k", Role::rows, dtype, {pages, kv_heads, page_size, headdim}, -1.5, 1.5, {3});
        else
            add(l.k, "k", Role::rows, dtype, {batch, kv_heads, n_keys, headdim}, -1.5, 1.5, {0, 3});
        if (params.attention.softmax_scope == ATTN_SAMPLER_SCOPE_SEQUENCE && random.chance(50))
            add(l.softmax_lse, "softmax_lse", Role::input, ATTN_SAMPLER_FLOAT32, {batch, heads, n_rows}, 0,
                20, {0, 1, 2}, false);
        for (auto [slot, name] : {std::pair{&l.q_descale, "q_descale"}, {&l.k_descale, "k_descale"}})
            if (dtype == ATTN_SAMPLER_FLOAT8_E4M3 && random.chance(50))
                add(*slot, name, Role::input, ATTN_SAMPLER_FLOAT32, {batch, kv_heads}, 0, 2, {0, 1}, false);
        rows += heads * n_rows;
    }

    /* Perhaps pages, which hold no fewer keys, and ends of the sequences, from which positions count. */
    void draw_places(int64_t &n_keys) {
        if (random.chance(30)) {
            page_size = random.pick<int64_t>({1, 3, 16, 17, n_keys});
            const int64_t table_size = (n_keys + page_size - 1) / page_size;
            n_keys = table_size * page_size;
            pages = random.pick<int64_t>({0, 1, 3, random.between(1, 1 + 400 / page_size)});
            add(masks.block_table, "block_table", Role::input, ATTN_SAMPLER_INT32, {batch, table_size}, -1,
                static_cast<double>(pages), {0}, false);
        }
        if (random.chance(30)) {
            end = n_keys;
            add(masks.seqlens_k, "seqlens_k", Role::input, ATTN_SAMPLER_INT32, {batch}, -2,
                static_cast<double>(n_keys + 2), {0}, false);
        }
    }

    void draw_masks(int64_t n_rows, int64_t n_keys) {
        for (auto [slot, name, n] :
             {std::tuple{&masks.key_mask, "key_mask", n_keys}, {&masks.query_mask, "query_mask", n_rows}})
            if (random.chance(40))
                add(*slot, name, Role::input, ATTN_SAMPLER_BOOL, {batch, n}, 0, 1, {0, 1}, false);
    }

    void draw_attention_params() {
        attn_sampler_attention_params &a = params.attention;
        a.softmax_scale = random.real(-0.3, 1);
        if (random.chance(6)) {
            a.softmax_scale = random.pick({0.0, ATTN_SAMPLER_MAX_SCALE, -ATTN_SAMPLER_MAX_SCALE, 1e-42, 1e4});
            plain = false;
        }
        for (int32_t *flag :
             {&a.lse_base, &a.causal, &a.softmax_scope, &a.diagonal, &a.per_head, &a.accumulate})
            *flag = random.chance(50);
        a.reduction = static_cast<int32_t>(random.below(3));
    }

    void draw_attention() {
        const bool is_map = function == kAttentionMap;
        int64_t n_rows = random.chance(5) && !is_map ? 0 : size(), n_keys = size();
        if (random.chance(2)) { /* beyond what a kernel takes at once */
            n_rows = random.between(1, 3);
            n_keys = random.pick<int64_t>({2050, 14000, 50000});
        }
        draw_attention_params();
        draw_places(n_keys);
        attn_sampler_attention_params &a = params.attention;
        a.columns = span(n_keys);
        a.columns = {a.columns.start - end, a.columns.stop - end};
        a.rows = is_map ? span(n_rows) : attn_sampler_span{-1, -1};
        a.query_start =
            random.pick<int64_t>({n_keys - n_rows - end, 0, a.columns.start, random.between(-99, 199),
                                  -ATTN_SAMPLER_MAX_POSITION, ATTN_SAMPLER_MAX_POSITION - 1});
        draw_layer(0, n_rows, n_keys);
        draw_masks(n_rows, n_keys);
        if (is_map && random.chance(40))
            add(masks.column_mask, "column_mask", Role::input, ATTN_SAMPLER_BOOL,
                {batch, a.columns.stop - a.columns.start}, 0, 1, {0, 1}, false);
        const int64_t heads = layer[0].q->shape[1], columns = a.columns.stop - a.columns.start;
        if (function == kTopColumns)
            return draw_choice(columns);
        const int64_t map_rows = a.rows.stop - a.rows.start;
        const bool is_reduced = is_map && a.reduction != ATTN_SAMPLER_MAP_REDUCTION_NONE;
        if (is_reduced && a.per_head)
            add_output(out, "out", ATTN_SAMPLER_FLOAT32, {batch, heads, map_rows});
        else if (is_reduced)
            add_output(out, "out", ATTN_SAMPLER_FLOAT32, {batch, map_rows});
        else if (is_map && a.per_head)
            add_output(out, "out", ATTN_SAMPLER_FLOAT32, {batch, heads, map_rows, columns});
        else if (is_map || a.per_head)
            add_output(out, "out", ATTN_SAMPLER_FLOAT32, {batch, is_map ? map_rows : heads, columns});
        else
            add_output(out, "out", ATTN_SAMPLER_FLOAT32, {batch, columns});
        if (a.accumulate)
            tensors.back().each([&](unsigned char *at) { tensors.back().set(at, 0.5); });
    }

    void draw_choice(int64_t columns) {
        top.count = random.pick<int64_t>({1, columns, random.between(1, columns)});
        top.per = static_cast<int32_t>(random.below(3));
        top.sinks = random.pick<int64_t>({0, random.between(0, top.count)});
        top.recent = random.pick<int64_t>({0, random.between(0, top.count - top.sinks)});
        top.pool = static_cast<int32_t>(random.below(2));
        top.pool_width = random.pick<int64_t>({1, 3, 7, ATTN_SAMPLER_MAX_POOL_WIDTH});
        const int64_t groups = top.per == ATTN_SAMPLER_PER_KV_HEAD ? layer[0].k->shape[1]
                               : top.per == ATTN_SAMPLER_PER_HEAD  ? layer[0].q->shape[1]
                                                                   : 1;
        add_output(positions, "positions", ATTN_SAMPLER_INT64, {batch, groups, top.count});
        add_output(scores, "scores", ATTN_SAMPLER_FLOAT32, {batch, groups, top.count});
    }

    void draw_confidence(int64_t positions) {
        vocab = random.chance(2) ? random.between(8193, 40000)
                                 : random.pick<int64_t>({2, 3, 63, 64, 65, 4097, random.between(2, 700)});
        const int dtype =
            random.pick<int>({ATTN_SAMPLER_FLOAT32, ATTN_SAMPLER_FLOAT16, ATTN_SAMPLER_BFLOAT16});
        attn_sampler_sampling_params &s = params.sampling;
        s.metric = static_cast<int32_t>(random.below(3));
        s.temperature = random.pick({0.0, 0.0, 1.0, 0.3, ATTN_SAMPLER_MIN_TEMPERATURE, 1e300});
        s.seed = random.bits();
        s.exclude_token_id = random.pick<int64_t>({-1, INT64_MIN, INT64_MAX, vocab, random.below(vocab)});
        s.vocab_start = random.pick<int64_t>({0, 0, 1, 4098, ATTN_SAMPLER_MAX_VOCAB - vocab});
        add(logits, "logits", Role::rows, dtype, {batch, positions, vocab}, -8, 8, {0, 1});
        if (random.chance(40))
            add(s.seeds, "params.seeds", Role::input, ATTN_SAMPLER_INT64, {batch}, -1e18, 1e18, {0}, false);
        s.top_k = random.pick<int64_t>({0, 0, 1, 40, vocab, INT64_MAX});
        s.top_p = random.pick({0.0, 1.0, 0.9, 5e-324});
        s.min_p = random.pick({0.0, 0.0, 0.1, 1.0, 5e-324});
        draw_row_value(s.temperatures, "params.temperatures", -1, 2);
        draw_row_value(s.top_ps, "params.top_ps", -0.2, 1.2);
        draw_row_value(s.min_ps, "params.min_ps", -0.2, 1.2);
        if (random.chance(20))
            add(s.top_ks, "params.top_ks", Role::input, ATTN_SAMPLER_INT32, {batch}, -2, 60, {0}, false);
        if (random.chance(15)) { /* a word of 0 may leave no token, and NaN */
            plain = false;
            const int64_t words = (vocab + 31) / 32;
            if (random.chance(50))
                add(s.token_bitmask, "params.token_bitmask", Role::input, ATTN_SAMPLER_INT32, {batch, words},
                    -2e9, 2e9, {0}, false);
            else
                add(s.token_bitmask, "params.token_bitmask", Role::input, ATTN_SAMPLER_INT32,
                    {batch, positions, words}, -2e9, 2e9, {0, 1}, false);
        }
        add_output(token_ids, "token_ids", ATTN_SAMPLER_INT64, {batch, positions});
        add_output(confidence, "confidence", ATTN_SAMPLER_FLOAT32, {batch, positions});
        if (function != kTokenConfidence)
            return;
        if (random.chance(50)) {
            add_output(log_prob, "log_prob", ATTN_SAMPLER_FLOAT32, {batch, positions});
            tensors.back().required = false;
        }
        if (random.chance(50)) { /* some are no tokens */
            add(current_ids, "current_ids", Role::input, ATTN_SAMPLER_INT64, {batch, positions}, -2,
                static_cast<double>(vocab + 2), {0, 1});
            add_output(current, "current", ATTN_SAMPLER_FLOAT32, {batch, positions});
        }
    }

    /* For some calls, a number of each sequence, some of which are none. */
    void draw_row_value(const attn_sampler_tensor *&slot, const char *name, double low, double high) {
        const bool was_plain = plain;
        if (random.chance(20))
            add(slot, name, Role::input, ATTN_SAMPLER_FLOAT32, {batch}, low, high, {0}, false);
        plain = was_plain; /* no number here makes a probability odd */
    }

    /* Of a step, its confidence and masked positions are not given. */
    void draw_selection(int64_t columns, Role scores_role) {
        attn_sampler_selection_params &s = params.selection;
        s.rule = static_cast<int32_t>(random.below(3));
        s.fallback = static_cast<int32_t>(random.below(2));
        draw_row_value(s.taus, "params.taus", -0.2, 1.2);
        if (random.chance(20))
            add(s.rules, "params.rules", Role::input, ATTN_SAMPLER_INT32, {batch}, -1, 3, {0}, false);
        for (double *tau : {&s.tau, &s.replace_tau, &s.remask_tau})
            *tau = random.pick({0.0, 1.0, random.real(0, 1)});
        s.replace_tau = random.chance(30) ? HUGE_VAL : s.replace_tau;
        s.max_revisions = random.pick<int64_t>({0, 1, 3, columns, INT64_MAX});
        s.revision_order = static_cast<int32_t>(random.below(3));
        revises = random.chance(60);
        add(scores, "scores", scores_role, ATTN_SAMPLER_FLOAT32, {batch, columns}, 0, 1, {0, 1});
        if (function == kSelectTokens) {
            add(confidence, "confidence", Role::input, ATTN_SAMPLER_FLOAT32, {batch, columns}, 0, 1, {0, 1});
            add(masked, "masked", Role::input, ATTN_SAMPLER_BOOL, {batch, columns}, 0, 1, {0, 1});
        }
        add_output(selected, "selected", ATTN_SAMPLER_BOOL, {batch, columns});
        if (!revises) /* what is not read may be anything */
            s.replace_tau = s.remask_tau = random.pick({double{NAN}, -1.0});
        else
            draw_revision(columns);
    }

    void draw_revision(int64_t columns) {
        const bool is_step = function == kDecodeStep;
        add(revision.budget, "budget", Role::output, ATTN_SAMPLER_INT32, {batch, columns}, -1, 2);
        add_output(revision.revised, "revised", ATTN_SAMPLER_UINT8, {batch, columns});
        if (is_step) {
            add_output(revision.current, "current", ATTN_SAMPLER_FLOAT32, {batch, columns});
            if (random.chance(50)) {
                add_output(revision.log_prob, "log_prob", ATTN_SAMPLER_FLOAT32, {batch, columns});
                tensors.back().required = false;
            }
        } else {
            add(revision.current, "current", Role::input, ATTN_SAMPLER_FLOAT32, {batch, columns}, 0, 1,
                {0, 1});
            add(revision.differs, "differs", Role::input, ATTN_SAMPLER_BOOL, {batch, columns}, 0, 1, {0, 1});
        }
    }

    void draw_step() {
        const int64_t block = random.pick<int64_t>({1, 2, 7, 32, 65}), before = random.below(20);
        const int64_t n_tokens = before + block + random.below(20);
        num_layers = random.below(4);
        draw_attention_params();
        draw_confidence(block);
        draw_selection(block, Role::output);
        params.block = {before, before + block};
        params.mask_token_id = random.below(vocab);
        params.query_rows = random.chance(50);
        const int64_t first_key = random.below(20);       /* of the block */
        const int64_t first_row = random.below(n_tokens); /* in the tokens */
        int64_t n_rows = random.between(0, n_tokens - first_row),
                n_keys = first_key + block + random.below(40);
        if (num_layers > 0) {
            draw_places(n_keys);
            draw_masks(n_rows, n_keys);
        }
        params.attention.columns = {first_key - end, first_key - end + block};
        params.attention.query_start = first_row - before + first_key - end;
        for (int i = 0; i < num_layers; ++i) {
            if (masks.key_mask == nullptr && page_size == 0 && end == 0)
                n_keys = first_key + block + random.below(40);
            if (masks.query_mask == nullptr && params.query_rows == ATTN_SAMPLER_QUERY_ROWS_ALL)
                n_rows = random.below(70);
            draw_layer(i, n_rows, n_keys);
        }
        const auto token = static_cast<double>(params.mask_token_id);
        add(tokens, "tokens", Role::output, ATTN_SAMPLER_INT64, {batch, n_tokens}, 0, 3, {0});
        tensors.back().each([&](unsigned char *at) {
            if (random.chance(60))
                tensors.back().set(at, token);
        });
    }
};

} // namespace

#endif /* ATTN_SAMPLER_TESTS_RANDOM_CALL_H_ */
