/* The choice of columns: their scores, of the heads that share a choice, in the workspace, and then the
 * largest of them by one block for each choice. As on the CPU a threshold is found on the way, digit by
 * digit, so that only what is chosen is sorted; scores and places are compared as integers, so that the
 * choice is exact. */
#include "cuda/column_scores.cuh"

namespace attn_sampler {
namespace cuda {
namespace {

constexpr int kDigits = 1 << 11;      /* of a number, 11 bits at a time */
constexpr int kSortedInShared = 4096; /* of what is chosen; more are sorted where they are */

struct TopArgs {
    AttentionArgs attention;
    const float *scores; /* [batch, groups, columns] */
    uint32_t *keys;      /* [batch, groups, columns] */
    uint64_t *chosen;    /* [batch, groups, room] */
    View<int64_t, 3> positions;
    View<float, 3> top;
    Divisor groups;
    int32_t count, sinks, recent, pool_width, room; /* the last: count, rounded up to a power of two */
    bool pools_max;
};

/* Behind what every block has in shared memory. */
struct alignas(16) Histogram {
    int32_t count[kDigits];
    int32_t of_thread[kThreads];
    int32_t digit, above; /* what was found */
    int32_t chosen;
};

__device__ inline Histogram &histogram() {
    return *reinterpret_cast<Histogram *>(dynamic_shared() + sizeof(Shared));
}

/* A sequence's columns, and which of them are chosen anyway: those before sinks_end and from recent_start on.
 */
struct Columns {
    const TopArgs &args;
    int b;
    int sinks_end = 0, recent_start;

    __device__ Columns(const TopArgs &a, int b_) : args(a), b(b_), recent_start(a.attention.columns) {}

    __device__ bool is_present(int c) const {
        const AttentionArgs &a = args.attention;
        return c >= 0 && c < a.columns && find_key(a, Sequence(a, b), a.column_start + c);
    }
    __device__ bool is_kept(int c) const { return c < sinks_end || c >= recent_start; }

    /* The place, counted from an end, before which so many are present: of all, where there are fewer. */
    __device__ int place_of(int wanted, bool from_start) const {
        const int columns = args.attention.columns;
        for (int first = 0, found = 0; wanted > 0 && first < columns; first += kThreads) {
            const int i = first + static_cast<int>(threadIdx.x);
            const bool there = i < columns && is_present(from_start ? i : columns - 1 - i);
            const int more = __syncthreads_count(there);
            if (found + more < wanted) {
                found += more;
                continue;
            }
            int *const flags = histogram().of_thread;
            flags[threadIdx.x] = there;
            __syncthreads();
            int place = 0;
            for (int t = 0; t < kThreads && found < wanted; ++t) {
                found += flags[t];
                place = first + t + 1;
            }
            __syncthreads();
            return place;
        }
        return wanted > 0 ? columns : 0;
    }

    __device__ void find_kept() {
        sinks_end = place_of(args.sinks, true);
        recent_start = args.attention.columns - place_of(args.recent, false);
    }
};

/* Above 0, in the order of scores, NaN below all: no score is negative, so their bits are in that order. */
__device__ inline uint32_t key_of(float score) { return score == score ? __float_as_uint(score) + 2 : 1; }
__device__ inline float score_of(uint32_t key) {
    return key == 1 ? not_a_number() : __uint_as_float(key - 2);
}

/* The score of a candidate, of those of the candidates around it. */
__device__ inline float pooled(const Columns &columns, const float *scores, int c) {
    const TopArgs &a = columns.args;
    const int half = a.pool_width / 2, stop = min(c + half + 1, a.attention.columns);
    float largest = scores[c];
    double sum = 0.0;
#pragma unroll 1
    for (int i = max(c - half, 0); i < stop; ++i) {
        if (columns.is_kept(i) || !columns.is_present(i))
            continue;
        const float x = scores[i];
        sum += static_cast<double>(x);
        largest = max_or_nan(x, largest);
    }
    return a.pools_max ? largest : static_cast<float>(sum / static_cast<double>(a.pool_width));
}

/* Of the numbers of so many places, those with `where`, the n-th largest; `above` of them are larger. */
template <typename Number, typename Where>
__device__ uint32_t nth_largest(int places, int n, int *above, const Number &number, const Where &where) {
    Histogram &h = histogram();
    uint32_t found = 0, mask = 0;
    *above = 0;
#pragma unroll 1
    for (int shift = 21; shift >= 0; shift = shift == 21 ? 10 : shift == 10 ? 0 : -1) {
        const int digits = shift == 0 ? 1 << 10 : kDigits;
        __syncthreads();
        for (int i = threadIdx.x; i < kDigits; i += kThreads)
            h.count[i] = 0;
        __syncthreads();
#pragma unroll 4
        for (int i = threadIdx.x; i < places; i += kThreads)
            if (where(i) && (number(i) & mask) == found)
                atomicAdd(&h.count[number(i) >> shift & (digits - 1)], 1);
        __syncthreads();
        /* Each thread has some digits next to each other; from the largest on. */
        const int each = digits / kThreads, own = (kThreads - 1 - static_cast<int>(threadIdx.x)) * each;
        int sum = 0;
        for (int i = 0; i < each; ++i)
            sum += h.count[own + i];
        h.of_thread[threadIdx.x] = sum;
        __syncthreads();
        int before = *above;
        for (int t = 0; t < static_cast<int>(threadIdx.x); ++t)
            before += h.of_thread[t];
        if (before < n && before + sum >= n) {
            int digit = own + each - 1;
            for (; before + h.count[digit] < n; --digit)
                before += h.count[digit];
            h.digit = digit;
            h.above = before;
        }
        __syncthreads();
        found |= static_cast<uint32_t>(h.digit) << shift;
        mask |= static_cast<uint32_t>(digits - 1) << shift;
        *above = h.above;
    }
    return found;
}

template <typename T>
__device__ inline T *place(const View<T, 3> &view, int b, int group, int i) {
    return view.data + b * view.stride[0] + group * view.stride[1] + i * view.stride[2];
}

/* Sorts a power of two of numbers, in shared or global memory, by the whole block. */
__device__ inline void sort(uint64_t *numbers, int count) {
    for (int size = 2; size <= count; size *= 2)
        for (int distance = size / 2; distance > 0; distance /= 2) {
            __syncthreads();
            for (int i = threadIdx.x; i < count / 2; i += kThreads) {
                const int low = i / distance * 2 * distance + i % distance, high = low + distance;
                const uint64_t x = numbers[low], y = numbers[high];
                const bool ascends = (low & size) == 0;
                if ((x > y) == ascends) {
                    numbers[low] = y;
                    numbers[high] = x;
                }
            }
        }
    __syncthreads();
}

/* Registers for four blocks: with its own choice ptxas spills. */
__global__ void __launch_bounds__(kThreads, 4) top_columns_kernel(const __grid_constant__ TopArgs args) {
    await_launches();
    const int unit = static_cast<int>(blockIdx.x), b = args.groups.divide(unit);
    const int group = unit - b * args.groups.value, n_columns = args.attention.columns;
    const float *const scores = args.scores + static_cast<int64_t>(unit) * n_columns;
    uint32_t *const keys = args.keys + static_cast<int64_t>(unit) * n_columns;
    Histogram &h = histogram();
    Columns columns(args, b);
    columns.find_kept();

    int n_kept = 0, candidates = 0;
    for (int first = 0; first < n_columns; first += kThreads) {
        const int c = first + static_cast<int>(threadIdx.x);
        const bool there = columns.is_present(c), kept = there && columns.is_kept(c);
        if (c < n_columns)
            keys[c] =
                !there || kept ? 0 : key_of(args.pool_width > 1 ? pooled(columns, scores, c) : scores[c]);
        n_kept += kept;
        candidates += there && !kept;
    }
    const auto add = [](int x, int y) { return x + y; };
    const auto exchange = [](int x, int distance) { return __shfl_xor_sync(kAllLanes, x, distance); };
    n_kept = block_reduce(n_kept, exchange, add);
    candidates = block_reduce(candidates, exchange, add);
    const int wanted = min(args.count - n_kept, candidates);

    /* Of those with the least key that is chosen, the lowest places. */
    uint32_t least = ~0u, last = 0;
    if (wanted > 0) {
        int above;
        least =
            nth_largest(n_columns, wanted, &above, [&](int c) { return keys[c]; }, [](int) { return true; });
        last = ~nth_largest(
            n_columns, wanted - above, &above, [](int c) { return ~static_cast<uint32_t>(c); },
            [&](int c) { return keys[c] == least; });
    }

    const int total = n_kept + wanted;
    int room = 1;
    while (room < total)
        room *= 2;
    uint64_t *const chosen = room <= kSortedInShared ? reinterpret_cast<uint64_t *>(&h + 1)
                                                     : args.chosen + static_cast<int64_t>(unit) * args.room;
    if (threadIdx.x == 0)
        h.chosen = 0;
    for (int i = threadIdx.x; i < room; i += kThreads)
        chosen[i] = ~uint64_t{0};
    __syncthreads();
    for (int c = threadIdx.x; c < n_columns; c += kThreads) {
        const uint32_t key = keys[c];
        const bool kept = key == 0 && columns.is_kept(c) && columns.is_present(c);
        if (kept || (wanted > 0 && (key > least || (key == least && static_cast<uint32_t>(c) <= last))))
            chosen[atomicAdd(&h.chosen, 1)] = static_cast<uint64_t>(kept ? 0 : ~key) << 32 |
                                              static_cast<uint32_t>(c); /* in the order of the answer */
    }
    sort(chosen, room);

    const AttentionArgs &a = args.attention;
    const int64_t first_key = a.column_start - Sequence(a, b).ahead;
    for (int i = threadIdx.x; i < args.count; i += kThreads) {
        const bool there = i < total;
        const uint64_t own = there ? chosen[i] : 0;
        const int c = static_cast<int>(own & 0xFFFFFFFFu);
        const uint32_t key = ~static_cast<uint32_t>(own >> 32);
        *place(args.positions, b, group, i) = there ? first_key + c : int64_t{-1};
        *place(args.top, b, group, i) = !there ? -infinity() : key == ~0u ? scores[c] : score_of(key);
    }
}

} // namespace

int64_t top_columns(const TopProblem &top, const attn_sampler_exec &exec) {
    AttentionProblem p = top.attention;
    if (p.batch == 0)
        return 0;
    return run(exec, [&](Launcher &launcher) {
        TopArgs args{};
        args.attention = attention_args(&p, 1);
        const int64_t columns = args.attention.columns, units = p.batch * top.groups;
        float *const scores = launcher.take<float>(units * columns);
        args.scores = scores;
        args.keys = launcher.take<uint32_t>(units * columns);
        args.positions = top.positions;
        args.top = top.scores;
        args.groups = divisor(top.groups);
        args.count = static_cast<int32_t>(top.params.count);
        args.sinks = static_cast<int32_t>(top.params.sinks);
        args.recent = static_cast<int32_t>(top.params.recent);
        args.pool_width = static_cast<int32_t>(top.params.pool_width);
        args.pools_max = top.params.pool == ATTN_SAMPLER_POOL_MAX;
        args.room = 1;
        while (args.room < args.count)
            args.room *= 2;
        if (args.room > kSortedInShared)
            args.chosen = launcher.take<uint64_t>(units * args.room);
        p.out = {scores, {top.groups * columns, columns, 0, 1}};
        add_column_scores(p, p.heads / top.groups, launcher);
        const int64_t sorted = min_of(args.room, kSortedInShared);
        launcher.launch("top_columns", top_columns_kernel, args, units,
                        static_cast<int64_t>(sizeof(Shared) + sizeof(Histogram)) + sorted * 8);
    });
}

} // namespace cuda
} // namespace attn_sampler
