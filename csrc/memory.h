/* Where the elements of tensors are: how many, how far apart, and whether those of two tensors meet. */
#ifndef ATTN_SAMPLER_MEMORY_H_
#define ATTN_SAMPLER_MEMORY_H_

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdint>
#include <numeric>

#include "arithmetic.h"
#include "error.h"

namespace attn_sampler {

/* Within these limits no product of a tensor's sizes and strides, of its rows and the bytes that a kernel
 * keeps for each, or of 64 of its rows, comes near the end of int64. */
constexpr int64_t kMaxReach = int64_t{1} << 53; /* elements from a tensor's first to its last */

/* The bytes [first, stop) in which a tensor's elements are; none where it has none. */
struct Extent {
    uintptr_t first, stop;

    bool meets(const Extent &other) const { return first < other.stop && other.first < stop; }
};

inline int64_t bytes_of(int dtype) {
    switch (dtype) {
    case ATTN_SAMPLER_INT64:
        return 8;
    case ATTN_SAMPLER_FLOAT32:
    case ATTN_SAMPLER_INT32:
        return 4;
    case ATTN_SAMPLER_BOOL:
    case ATTN_SAMPLER_UINT8:
    case ATTN_SAMPLER_FLOAT8_E4M3:
        return 1;
    default:
        return 2;
    }
}

/* Refuses more elements than ATTN_SAMPLER_MAX_ELEMENTS, a size of 0 counting as 1, or elements that are
 * further apart than kMaxReach. The sizes are not negative. */
inline void check_reach(const char *name, const attn_sampler_tensor &t) {
    double elements = 1.0, reach = 0.0; /* no product of them wraps */
    for (int i = 0; i < t.ndim; ++i) {
        const auto n = static_cast<double>(max_of(t.shape[i], 1));
        elements *= n;
        reach += (n - 1.0) * std::fabs(static_cast<double>(t.stride[i]));
    }
    if (elements > static_cast<double>(ATTN_SAMPLER_MAX_ELEMENTS))
        throw Error(ATTN_SAMPLER_INVALID_ARGUMENT, "%s: expected at most 2^40 elements, got %g", name,
                    elements);
    if (reach > static_cast<double>(kMaxReach))
        throw Error(ATTN_SAMPLER_INVALID_ARGUMENT, "%s: expected elements at most 2^53 apart, got %g", name,
                    reach);
}

/* Of a tensor within the limits. */
inline Extent extent(const attn_sampler_tensor &t) {
    int64_t low = 0, high = 0;
    for (int i = 0; i < t.ndim; ++i) {
        const int64_t n = t.shape[i];
        if (n == 0)
            return {0, 0};
        if (n > 1)
            (t.stride[i] < 0 ? low : high) += (n - 1) * t.stride[i];
    }
    const auto at = reinterpret_cast<uintptr_t>(t.data);
    const int64_t size = bytes_of(t.dtype);
    return {at + static_cast<uintptr_t>(low * size), at + static_cast<uintptr_t>((high + 1) * size)};
}

/* Whether two tensors within the limits, neither of them empty, have a byte in common. Their differences in
 * address are sums of steps, each taken a bounded number of times: one that is too small to part two elements
 * is searched for from the longest step on. Where that takes long, as no views of one array do, the answer is
 * yes. */
class Meeting {
  public:
    Meeting(const attn_sampler_tensor &a, const attn_sampler_tensor &b) {
        const int64_t a_size = bytes_of(a.dtype), b_size = bytes_of(b.dtype);
        low_ = reinterpret_cast<intptr_t>(a.data) - reinterpret_cast<intptr_t>(b.data) + 1 - b_size;
        high_ = low_ + a_size + b_size - 2;
        add(b, b_size, 1);
        add(a, a_size, -1);
        int64_t reach = 0, divisor = 0;
        for (int i = count_ - 1; i >= 0; --i) {
            steps_[i].others = reach;
            reach += steps_[i].bytes * steps_[i].times;
            steps_[i].divisor = divisor = std::gcd(divisor, steps_[i].bytes);
        }
    }
    bool found() { return found(0, low_, high_); }

  private:
    struct Step {
        int64_t bytes, times; /* how long, and how often at the most */
        int64_t others;       /* what the shorter ones reach */
        int64_t divisor;      /* of its bytes and theirs */
    };

    /* The steps along one tensor's dimensions, forwards all of them: a backward one is taken back. */
    void add(const attn_sampler_tensor &t, int64_t size, int sign) {
        for (int i = 0; i < t.ndim; ++i) {
            const int64_t times = t.shape[i] - 1;
            if (times == 0 || t.stride[i] == 0)
                continue;
            const int64_t bytes = t.stride[i] * size * sign;
            if (bytes < 0) {
                low_ -= bytes * times;
                high_ -= bytes * times;
            }
            insert(bytes < 0 ? -bytes : bytes, times);
        }
    }

    /* The longest are the first, and equal ones together. */
    void insert(int64_t bytes, int64_t times) {
        int at = 0;
        while (at < count_ && steps_[at].bytes > bytes)
            ++at;
        if (at < count_ && steps_[at].bytes == bytes) {
            steps_[at].times += times;
            return;
        }
        for (int i = count_++; i > at; --i)
            steps_[i] = steps_[i - 1];
        steps_[at] = {bytes, times, 0, 0};
    }

    /* Whether steps from the i-th on lead to somewhere in [low, high]. */
    bool found(int i, int64_t low, int64_t high) {
        if (high < 0)
            return false;
        if (low <= 0)
            return true;
        if (i == count_ || high / steps_[i].divisor * steps_[i].divisor < low)
            return false;
        const Step &step = steps_[i];
        const int64_t least = low > step.others ? ceil_div(low - step.others, step.bytes) : 0;
        for (int64_t n = min_of(step.times, high / step.bytes); n >= least; --n)
            if (--patience_ < 0 || found(i + 1, low - n * step.bytes, high - n * step.bytes))
                return true;
        return false;
    }

    Step steps_[8];
    int count_ = 0, patience_ = 1 << 12;
    int64_t low_, high_;
};

/* The tensors that a call writes, all of them checked: nothing else of the call is in their memory. */
class Written {
  public:
    void add(const char *name, const attn_sampler_tensor *t) {
        read(name, t);
        const Extent own = extent(*t);
        tensors_[count_++] = {name, t, own};
        if (own.stop > 0)
            all_ = {std::min(all_.first, own.first), std::max(all_.stop, own.stop)};
    }

    /* A checked tensor that is read, or NULL; of that layer, if of one. */
    void read(const char *name, const attn_sampler_tensor *t, int64_t layer = -1) const {
        const Extent own = t == nullptr ? Extent{0, 0} : extent(*t);
        for (int i = 0; all_.meets(own) && i < count_; ++i)
            if (tensors_[i].extent.meets(own) && Meeting(*tensors_[i].tensor, *t).found()) {
                char prefix[40] = "";
                if (layer >= 0)
                    snprintf(prefix, sizeof(prefix), "layers[%" PRId64 "].", layer);
                throw Error(ATTN_SAMPLER_INVALID_ARGUMENT,
                            "%s: expected memory of its own, got some of that of %s%s", tensors_[i].name,
                            prefix, name);
            }
    }
    void read(const attn_sampler_layer &x, int64_t layer = -1) const {
        read("q", x.q, layer);
        read("k", x.k, layer);
        read("softmax_lse", x.softmax_lse, layer);
        read("q_descale", x.q_descale, layer);
        read("k_descale", x.k_descale, layer);
    }
    void read(const attn_sampler_sampling_params &x) const {
        read("params.seeds", x.seeds);
        read("params.temperatures", x.temperatures);
        read("params.top_ks", x.top_ks);
        read("params.top_ps", x.top_ps);
        read("params.min_ps", x.min_ps);
        read("params.token_bitmask", x.token_bitmask);
    }
    void read(const attn_sampler_selection_params &x) const {
        read("params.rules", x.rules);
        read("params.taus", x.taus);
    }
    void read(const attn_sampler_masks *masks) const {
        if (masks == nullptr)
            return;
        read("key_mask", masks->key_mask);
        read("query_mask", masks->query_mask);
        read("block_table", masks->block_table);
        read("seqlens_k", masks->seqlens_k);
    }

  private:
    struct {
        const char *name;
        const attn_sampler_tensor *tensor;
        Extent extent;
    } tensors_[9];
    int count_ = 0;
    Extent all_ = {UINTPTR_MAX, 0};
};

} // namespace attn_sampler

#endif /* ATTN_SAMPLER_MEMORY_H_ */
