/* The choice of columns on the CPU: column_scores of the heads that share a choice, in scratch, and then the
 * largest of them. A threshold is found on the way, so that only what is chosen is sorted; scores and places
 * are compared as integers, so that the choice is exact. */
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <new>

#include "cpu/kernels.h"
#include "cpu/launch.h"

namespace attn_sampler {
namespace {

constexpr int64_t kScoreBytes = 32 << 20; /* of scores that are held at once */

enum Role : uint8_t { kAbsent, kCandidate, kKept };

int64_t columns_of(const TopProblem &top) {
    return top.attention.params.columns.stop - top.attention.params.columns.start;
}

/* The view of what comes after so many of the first dimension and of the second. */
template <typename T, int kDims>
void advance(View<T, kDims> &view, int64_t i, int64_t j = 0) {
    if (view.data == nullptr)
        return;
    view.data += i * view.stride[0];
    if constexpr (kDims > 1)
        view.data += j * view.stride[1];
}
void advance(View<const void, 3> &view, int64_t i, int64_t j, int64_t size) {
    View<const char, 3> bytes = {static_cast<const char *>(view.data),
                                 {view.stride[0] * size, view.stride[1] * size, 0}};
    advance(bytes, i, j);
    view.data = bytes.data;
}

/* The scores of a sequence, added up over the heads of one group: a problem of its own, whose bits do not
 * depend on what else is asked. */
bool score(const TopProblem &top, int64_t b, int64_t group, float *scores, int num_threads) {
    AttentionProblem p = top.attention;
    const int64_t size = element_size(p.dtype), heads = p.heads / top.groups, head = group * heads;
    const int64_t kv_head = head * p.kv_heads / p.heads;
    advance(p.q, b, head, size);
    advance(p.k, p.pages.table.data == nullptr ? b : 0, kv_head, size);
    advance(p.softmax_lse, b, head);
    advance(p.q_descale, b, kv_head);
    advance(p.k_descale, b, kv_head);
    for (View<const uint8_t, 2> *const mask : {&p.key_mask, &p.query_mask})
        advance(*mask, b);
    advance(p.seqlens_k, b);
    advance(p.pages.table, b);
    p.batch = 1;
    p.kv_heads = max_of(p.kv_heads / top.groups, 1);
    p.heads = heads;
    p.out = {scores, {0, 0, 0, 1}};
    p.num_threads = num_threads;
    return cpu_kernels().column_scores(p);
}

/* Room for the choice of one group. */
struct Choice {
    Role *role;       /* of each column */
    float *pooled;    /* scores */
    uint32_t *key;    /* in the order of scores */
    uint64_t *chosen; /* [count], ascending in the order of the answer */

    static int64_t bytes(int64_t columns, int64_t count) { return count * 8 + columns * 9; }
    Choice(void *memory, int64_t columns, int64_t count) : chosen(static_cast<uint64_t *>(memory)) {
        pooled = reinterpret_cast<float *>(chosen + count);
        key = reinterpret_cast<uint32_t *>(pooled + columns);
        role = reinterpret_cast<Role *>(key + columns);
    }
};

/* What part each column has in the choice; returns how many are candidates. */
int64_t assign_roles(const TopProblem &top, int64_t b, Role *role) {
    const AttentionProblem &p = top.attention;
    const int64_t columns = columns_of(top);
    const int64_t first_key = p.params.columns.start - keys_ahead(p.seqlens_k, p.n_keys, b);
    int64_t present = 0, kept = 0;
    for (int64_t c = 0; c < columns; ++c) {
        const int64_t n = first_key + c;
        const bool is_there = n >= 0 && (p.key_mask.data == nullptr || element(p.key_mask, b, n) != 0) &&
                              (p.pages.table.data == nullptr || p.pages.page(b, p.pages.index_of(n)) >= 0);
        role[c] = is_there ? kCandidate : kAbsent;
        present += is_there;
    }
    const auto keep = [&](int64_t c, int64_t &left) {
        if (role[c] == kAbsent)
            return;
        kept += role[c] == kCandidate;
        role[c] = kKept;
        --left;
    };
    int64_t sinks = top.params.sinks, recent = top.params.recent;
    for (int64_t c = 0; c < columns && sinks > 0; ++c)
        keep(c, sinks);
    for (int64_t c = columns; c > 0 && recent > 0;)
        keep(--c, recent);
    return present - kept;
}

/* The score of a candidate, of those of the candidates around it. */
float pool(const TopProblem &top, const float *scores, const Role *role, int64_t c) {
    const int64_t half = top.params.pool_width / 2;
    const int64_t stop = min_of(c + half + 1, columns_of(top));
    float largest = scores[c];
    double sum = 0.0;
    for (int64_t i = max_of(c - half, 0); i < stop; ++i) {
        if (role[i] != kCandidate)
            continue;
        sum += static_cast<double>(scores[i]);
        if (scores[i] > largest || std::isnan(scores[i]))
            largest = scores[i];
    }
    return top.params.pool == ATTN_SAMPLER_POOL_MAX
               ? largest
               : static_cast<float>(sum / static_cast<double>(top.params.pool_width));
}

/* Above 0, in the order of scores, NaN below all: no score is negative, so their bits are in that order. */
uint32_t key_of(float score) {
    uint32_t bits;
    memcpy(&bits, &score, sizeof(bits));
    return std::isnan(score) ? 1 : bits + 2;
}

/* The n-th largest of the keys, of which so many are above 0, digit by digit; `above` are larger. */
uint32_t nth_largest(const uint32_t *keys, int64_t size, int64_t n, int64_t &above) {
    uint32_t found = 0, mask = 0;
    above = 0;
    for (const int shift : {21, 10, 0}) {
        const uint32_t digits = shift == 0 ? 1 << 10 : 1 << 11;
        int32_t count[1 << 11] = {};
        for (int64_t i = 0; i < size; ++i)
            if ((keys[i] & mask) == found)
                ++count[keys[i] >> shift & (digits - 1)];
        uint32_t digit = digits - 1;
        for (; above + count[digit] < n; --digit)
            above += count[digit];
        found |= digit << shift;
        mask |= (digits - 1) << shift;
    }
    return found;
}

void choose(const TopProblem &top, int64_t b, int64_t group, const float *scores, const Choice &choice) {
    const int64_t columns = columns_of(top), count = top.params.count;
    const AttentionProblem &p = top.attention;
    const int64_t first_key = p.params.columns.start - keys_ahead(p.seqlens_k, p.n_keys, b);
    const int64_t candidates = assign_roles(top, b, choice.role);
    int64_t place = 0;
    const auto write = [&](int64_t position, float value) {
        const int64_t *const at = top.positions.stride, *const to = top.scores.stride;
        top.positions.data[b * at[0] + group * at[1] + place * at[2]] = position;
        top.scores.data[b * to[0] + group * to[1] + place++ * to[2]] = value;
    };
    for (int64_t c = 0; c < columns; ++c) {
        const bool is_candidate = choice.role[c] == kCandidate;
        choice.pooled[c] =
            is_candidate && top.params.pool_width > 1 ? pool(top, scores, choice.role, c) : scores[c];
        choice.key[c] = is_candidate ? key_of(choice.pooled[c]) : 0;
        if (choice.role[c] == kKept)
            write(first_key + c, scores[c]);
    }
    const int64_t wanted = min_of(count - place, candidates);
    int64_t n = 0, above = 0;
    if (wanted > 0) {
        const uint32_t least = nth_largest(choice.key, columns, wanted, above);
        int64_t equal = wanted - above; /* the lowest of those with the least key */
        for (int64_t c = 0; n < wanted; ++c)
            if (choice.key[c] > least || (choice.key[c] == least && equal-- > 0))
                choice.chosen[n++] = static_cast<uint64_t>(~choice.key[c]) << 32 | static_cast<uint64_t>(c);
    }
    std::sort(choice.chosen, choice.chosen + n);
    for (int64_t i = 0; i < n; ++i) {
        const auto c = static_cast<int64_t>(choice.chosen[i] & 0xFFFFFFFF);
        write(first_key + c, choice.pooled[c]);
    }
    while (place < count)
        write(-1, -__builtin_inff());
}

} // namespace

namespace cpu {

int64_t top_columns(const TopProblem &top, const attn_sampler_exec &) {
    const int64_t columns = columns_of(top), units = top.attention.batch * top.groups;
    const int64_t at_once = clamp(kScoreBytes / (columns * 4), 1, max_of(units, 1));
    const int threads = top.attention.num_threads;
    const Workspace work(static_cast<int>(min_of(threads, at_once)), Choice::bytes(columns, top.params.count),
                         at_once * columns * 4);
    if (!work)
        throw std::bad_alloc();
    float *const scores = static_cast<float *>(work.shared());
    for (int64_t first = 0; first < units; first += at_once) {
        const int64_t count = min_of(at_once, units - first);
        const int inner = count < threads ? threads : 1; /* of each group, where these are too few */
        std::atomic<bool> done{true};
        auto add_up = [&](int64_t i, int) {
            const int64_t unit = first + i;
            if (!score(top, unit / top.groups, unit % top.groups, scores + i * columns, inner))
                done = false;
        };
        parallel_for(inner == 1 ? threads : 1, count, add_up);
        if (!done)
            throw std::bad_alloc();
        auto select = [&](int64_t i, int worker) {
            const int64_t unit = first + i;
            choose(top, unit / top.groups, unit % top.groups, scores + i * columns,
                   Choice(work.of_worker(worker), columns, top.params.count));
        };
        parallel_for(threads, count, select);
    }
    return 0;
}

} // namespace cpu
} // namespace attn_sampler
