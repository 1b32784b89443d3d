/* The tile of attention weights: 16 query rows of each warp times a tile of keys, shared by column scores,
 * the attention map and the row log-sum-exp.
 *
 * The ladder of ideas:
 * 1. A dot product does not care in which order its terms come. So a lane may hold *any* 8 elements of its
 * row, as long as the keys are cut the same way: it takes 16 contiguous bytes, straight from global memory
 * into the registers in which mma.sync wants them. Queries need no shared memory, no ldmatrix and no barrier,
 * and many loads are in flight.
 * 2. Keys are read by all warps: cp.async brings them into shared memory, vector by vector in the order in
 * which lanes consume them, so that every access is 16 bytes wide and free of bank conflicts.
 * 3. Lane 4g + t holds rows g and g + 8 of operand and result alike: what is known of a row (its address,
 * log-sum-exp, position) stays in the registers of the lanes that need it.
 * 4. Query heads that share a key head are one long list of rows.
 */
#ifndef ATTN_SAMPLER_CUDA_TILE_CUH_
#define ATTN_SAMPLER_CUDA_TILE_CUH_

#include "cuda/block.cuh"

namespace attn_sampler {
namespace cuda {

constexpr int kMaxLayers = 64; /* of one launch: their addresses fit its parameters */
constexpr int kWarpRows = 16;
constexpr int kBlockRows = kWarps * kWarpRows;

/* A tensor of every layer of a launch, all with the same strides. */
template <typename T, int kDims>
struct Layers {
    T *data[kMaxLayers];
    int64_t stride[kDims];

    void set(int64_t layer, const View<T, kDims> &view) {
        data[layer] = view.data;
        for (int i = 0; i < kDims; ++i)
            stride[i] = view.stride[i];
    }
    template <typename Element = T>
    __device__ Element *at(int layer, int64_t i, int64_t j, int64_t k = 0) const {
        Element *const p = static_cast<Element *>(data[layer]) + i * stride[0] + j * stride[1];
        return kDims == 2 ? p : p + k * stride[kDims - 1];
    }
};

/* Layers of one shape. Rows are counted from row_start, the first that can count. */
struct AttentionArgs {
    Layers<const void, 3> q, k;
    Layers<const float, 3> softmax_lse;          /* null where computed_lse is read */
    Layers<const float, 2> q_descale, k_descale; /* of Float8 only; may be null */
    float2 *computed_lse; /* [layers, B, Hq, rows], in product_units; what is left, base 2 */
    View<const uint8_t, 2> key_mask, query_mask; /* may be null, as what follows */
    View<const int32_t, 1> seqlens_k;
    Pages pages;
    View<const int64_t, 2> row_tokens; /* null, or rows count only where this is mask_token_id */
    int64_t mask_token_id;
    int64_t query_start, key_start, column_start; /* key positions of row 0, softmax key 0 and column 0 */
    int32_t layers, batch, heads, kv_heads, group, headdim;
    int32_t row_start, rows, keys, columns;
    int32_t positions;   /* of keys, in all: what seqlens_k is at the most */
    int32_t left, right; /* a row sees keys from so far before its position to so far after it: see Window */
    float scale;         /* to base-2 logits, but for the descales */
    bool diagonal, lse_is_base2;
    bool aligned;  /* every row starts on 16 bytes and is a multiple of them long */
    bool together; /* the keys are in no pages, and the sequences have no ends of their own */
};

/* Elements in 16 bytes, and in the 64 bytes of four lanes that are one chunk of a row. */
template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));
template <typename T>
constexpr int kChunk = 4 * kVector<T>;
/* Of a row that are in registers at a time. */
template <typename T>
constexpr int kSliceChunks = sizeof(T) == 1 ? 2 : 4;

template <typename T>
__device__ inline int chunks(const AttentionArgs &a) {
    return (a.headdim + kChunk<T> - 1) / kChunk<T>;
}

/* One of the batch. */
struct Sequence {
    int b, ahead; /* the latter: of its keys, key positions are so far */

    /* Made where it is asked for keys: it would take a register of whatever is in between. */
    __device__ Sequence(const AttentionArgs &a, int b_)
        : b(b_), ahead(static_cast<int>(keys_ahead(a.seqlens_k, a.positions, b_))) {}
};

__device__ inline bool is_unmasked(const AttentionArgs &a, int b, int64_t n) {
    return a.key_mask.data == nullptr || element(a.key_mask, b, n) != 0;
}

/* The way of kernels of so many columns to keys that are not together: they are counted and looked up one by
 * one. Those of wgmma have no registers left for it; WarpTile serves such keys. */
template <int kColumns>
constexpr bool kFinds = kColumns != 8 * kWgmmaTiles;

/* Whether there is a key at this position that is not masked, and how far it is then from where the keys of
 * its head start (keys_of_head), in elements of a layer's k. */
template <bool kMayBeApart = true>
__device__ inline bool find_key(const AttentionArgs &a, const Sequence &s, int64_t position,
                                int64_t *offset = nullptr) {
    int64_t n = position, page = 0, row = position;
    if (kMayBeApart && !a.together) {
        n -= s.ahead;
        row = n;
        if (n < 0)
            return false;
        if (a.pages.table.data != nullptr) {
            const int64_t index = a.pages.index_of(n);
            page = a.pages.page(s.b, index);
            row = n - index * a.pages.size;
        }
        if (page < 0)
            return false;
        page *= a.k.stride[0];
    }
    if (offset != nullptr)
        *offset = page + row * a.k.stride[2];
    return is_unmasked(a, s.b, n);
}

template <typename T>
__device__ inline const T *keys_of_head(const AttentionArgs &a, int layer, const Sequence &s, int kv_head) {
    return a.k.at<const T>(layer, a.pages.table.data != nullptr ? 0 : s.b, kv_head);
}

__device__ inline bool row_counts(const AttentionArgs &a, int b, int m) {
    const int64_t row = static_cast<int64_t>(a.row_start) + m;
    if (a.query_mask.data != nullptr && element(a.query_mask, b, row) == 0)
        return false;
    return a.row_tokens.data == nullptr || element(a.row_tokens, b, row) == a.mask_token_id;
}

/* From products of a layer's key head to base-2 logits. */
template <typename T>
__device__ inline float logit_scale(const AttentionArgs &a, int layer, int b, int kv_head) {
    float scale = a.scale;
    if constexpr (sizeof(T) == 1) {
        if (a.q_descale.data[layer] != nullptr)
            scale *= *a.q_descale.at(layer, b, kv_head);
        if (a.k_descale.data[layer] != nullptr)
            scale *= *a.k_descale.at(layer, b, kv_head);
    }
    return scale;
}

/* How a product becomes what 2 is raised to: (product * factor - first) * unit - second, the last two being
 * of the row's log-sum-exp. */
struct LogitUnits {
    float factor, unit;
};

/* Of a log-sum-exp computed here, whose first part is a product, or its opposite where the scale is negative:
 * no rounding, and no logit beyond float32, comes between a weight and that. Only a scale too small for it is
 * multiplied in. */
__device__ inline LogitUnits product_units(float scale) {
    if (fabsf(scale) <= 0x1p-100f)
        return {scale, 1.0f};
    return {scale < 0.0f ? -1.0f : 1.0f, fabsf(scale)};
}

/* Of the log-sum-exp that is read: a given one is a sum of two parts in base 2. */
__device__ inline LogitUnits logit_units(const AttentionArgs &a, float scale) {
    return a.computed_lse != nullptr ? product_units(scale) : LogitUnits{scale, 1.0f};
}

/* A row that counts, or one whose address is null. Nothing here waits for its log-sum-exp, so that its
 * elements are asked for at the same time. */
template <typename T>
struct Row {
    const T *q;
    float2 lse;       /* as it is in memory: one number, or two */
    int32_t position; /* counted from the tile's first key */

    __device__ void clear() {
        q = nullptr;
        lse = make_float2(0.0f, 0.0f);
        position = -1;
    }

    /* Row m of a head, for a tile of `width` keys from `origin` on. */
    __device__ void find(const AttentionArgs &a, int layer, int b, int head, int m, int64_t origin, int width,
                         bool with_lse) {
        clear();
        if (!row_counts(a, b, m))
            return;
        position =
            static_cast<int32_t>(a.query_start + m - origin); /* a Window keeps it and its ends small */
        if (position + a.right < 0 || position - a.left >= width)
            return;
        const int64_t row = static_cast<int64_t>(a.row_start) + m;
        q = a.q.at<const T>(layer, b, head, row);
        if (!with_lse)
            return;
        if (a.computed_lse != nullptr)
            lse = a.computed_lse[((static_cast<int64_t>(layer) * a.batch + b) * a.heads + head) * a.rows + m];
        else
            lse.x = *a.softmax_lse.at(layer, b, head, row);
    }

    /* The log-sum-exp in two parts, as LogitUnits has them. */
    __device__ float2 lse_parts(const AttentionArgs &a) const {
        if (a.computed_lse != nullptr || a.lse_is_base2)
            return lse;
        const float high = lse.x * kLog2eHigh;
        /* And what the product lost. */
        const float low = fmaf(lse.x, kLog2eLow, fmaf(lse.x, kLog2eHigh, -high));
        return make_float2(high, is_finite(high) ? low : 0.0f);
    }
};

/* Starts loading kColumns keys of a key head from position `first` on, of which `count` exist, into
 * keys[chunk][column][lane % 4] or, for wgmma, keys[chunk][lane % 4][column]. Masked and absent ones are
 * zeros. Ends with copy_commit(). */
template <typename T, int kColumns, bool kMayBeUnaligned = true>
__device__ inline void load_keys(const AttentionArgs &a, int layer, int b, int kv_head, int64_t first,
                                 int count, uint4 *keys) {
    const Sequence s(a, b);
    const T *const base = keys_of_head<T>(a, layer, s, kv_head);
    constexpr int kAtOnce = kColumns < kThreads / 4 ? kColumns : kThreads / 4;
    constexpr bool kForWgmma = kColumns == 8 * kWgmmaTiles;
    const int n_chunks = chunks<T>(a), thread = threadIdx.x, first_chunk = thread / (4 * kAtOnce);
    const int lane = kForWgmma ? thread / 8 % 4 : thread % 4;
    const int first_column = kForWgmma ? thread / 32 * 8 + thread % 8 : thread / 4 % kAtOnce;
    for (int column = first_column; column < kColumns; column += kAtOnce) {
        int64_t offset = 0;
        const bool counts = column < count && find_key<kFinds<kColumns>>(a, s, first + column, &offset);
        const T *const row = base + offset;
        for (int chunk = first_chunk; chunk < n_chunks; chunk += kThreads / (4 * kAtOnce)) {
            const int d = chunk * kChunk<T> + lane * kVector<T>;
            const bool valid = counts && d < a.headdim;
            uint4 *const to = keys + (kForWgmma ? (chunk * 4 + lane) * kColumns + column
                                                : (chunk * kColumns + column) * 4 + lane);
            if (!kMayBeUnaligned || a.aligned)
                copy_async(to, valid ? row + d : base, valid);
            else
                *to = valid ? load_unaligned(row, d, a.headdim) : uint4{0, 0, 0, 0};
        }
    }
    copy_commit();
}

/* Four e4m3 numbers as float16, which can hold every one of them: two pairs, in an order that is the same for
 * all x. */
__device__ inline void widen(uint32_t x, uint32_t (&pair)[2]) {
#if __CUDA_ARCH__ >= 890
    pair[0] = convert_e4m3x2(static_cast<uint16_t>(x));
    pair[1] = convert_e4m3x2(static_cast<uint16_t>(x >> 16));
#else
    for (int i = 0; i < 2; ++i) {
        const uint32_t high = i == 0 ? x << 8 : x; /* the numbers are the high bytes of the halves */
        /* Exponent and fraction moved into place, a NaN's exponent filled up; the product rebases it. */
        uint32_t magnitude = high >> 1 & 0x3F803F80u;
        magnitude |= (magnitude + 0x00800080u) & 0x40004000u;
        constexpr uint32_t k256 = 0x5C005C00u;
        pair[i] = multiply_f16x2(magnitude | (high & 0x80008000u), k256);
    }
#endif
}

/* 16 rows of a warp and their product with 8 * kTiles keys. The way of elements that start anywhere is as
 * long as all the others together: kernels that are asked for the common case alone do without. */
template <typename T, int kTiles, bool kMayBeUnaligned = true>
class WarpTile {
  public:
    Row<T> row[2]; /* g and g + 8 */

    /* Whether a row counts, of those that are multiplied together. */
    __device__ bool any() const {
        return __any_sync(kAllLanes, row[0].q != nullptr || row[1].q != nullptr) != 0;
    }

    /* Starts loading the first slice of the rows. */
    __device__ void load(const AttentionArgs &a) { load_slice(a, 0); }

    /* Waits for the rows, where they have to be rearranged. */
    __device__ void arrange() {}

    /* Waits, in the whole block, for all but the latest kPending tiles of keys. */
    template <int kPending>
    __device__ static void await_keys() {
        copy_wait<kPending>();
        __syncthreads();
    }

    /* logits[j][i]: row i / 2 at column 8 j + 2 t + i % 2, without the scale. `load` was called before. */
    __device__ void multiply(const AttentionArgs &a, const uint4 *keys, float (&logits)[kTiles][4]) {
        float sum[kTiles][kPartials];
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
#pragma unroll
            for (int i = 0; i < kPartials; ++i)
                sum[j][i] = 0.0f;
        const int n_chunks = chunks<T>(a);
        /* From the slice that is there on: rows used again and again load one slice less each time. */
        const int last = (n_chunks - 1) / kSliceChunks<T> * kSliceChunks<T>;
        const bool backwards = slice_ != 0;
        for (int i = 0; i < n_chunks; i += kSliceChunks<T>) {
            const int first = backwards ? last - i : i;
            if (first != slice_)
                load_slice(a, first);
#pragma unroll
            for (int c = 0; c < kSliceChunks<T>; ++c)
                if (first + c < n_chunks)
#pragma unroll
                    for (int j = 0; j < kTiles; ++j)
                        add_chunk(c, keys + ((first + c) * kTiles + j) * 32, sum[j]);
        }
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
            finish(sum[j], logits[j]);
    }

    /* Turns logits into weights: exactly 0 where a row does not see a column or drops it. Bit 2 j + i of
     * `seen` says that column 8 j + 2 t + i exists and is not masked. */
    __device__ void weigh(const AttentionArgs &a, float scale, uint32_t seen, float (&x)[kTiles][4]) const {
        const LogitUnits units = logit_units(a, scale);
        if (sees_all(a, seen) && counts_all(a))
            weigh_rows<true>(a, units, seen, x);
        else
            weigh_rows<false>(a, units, seen, x);
    }

    /* Whether all 16 rows see all columns, so that nothing need be asked of each; said of wide tiles only,
     * where it pays. Rows know their positions from `first` columns before the tile's first. */
    __device__ bool sees_all(const AttentionArgs &a, uint32_t seen, int first = 0) const {
        if constexpr (kTiles < 8)
            return false;
        bool all = seen == ~0u >> (32 - 2 * kTiles);
#pragma unroll
        for (int r = 0; r < 2; ++r)
            all &= row[r].q != nullptr && row[r].position - a.left <= first &&
                   row[r].position + a.right >= first + 8 * kTiles - 1;
        return __any_sync(kAllLanes, !all) == 0;
    }

  protected:
    uint4 q_[kSliceChunks<T>][2];

  private:
    /* Whether no row has seen nothing, or drops a column of the tile. */
    __device__ bool counts_all(const AttentionArgs &a) const {
        bool all = true;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float2 lse = row[r].lse_parts(a);
            const int position = a.diagonal ? -1 : row[r].position;
            all &= lse.x + lse.y != -infinity() && (position < 0 || position >= 8 * kTiles);
        }
        return __any_sync(kAllLanes, !all) == 0;
    }

    template <bool kAll>
    __device__ void weigh_rows(const AttentionArgs &a, LogitUnits units, uint32_t seen,
                               float (&x)[kTiles][4]) const {
        const int first = 2 * (threadIdx.x % 4); /* column of this lane */
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float2 lse = row[r].lse_parts(a);
            /* A row that saw nothing has no weight, whatever else it holds. */
            const bool counts = row[r].q != nullptr && lse.x + lse.y != -infinity();
            const int first_seen = row[r].position - a.left - first;
            const int last_seen = counts ? row[r].position + a.right - first : -1;
            const int dropped = (a.diagonal ? -1 : row[r].position) - first;
#pragma unroll
            for (int j = 0; j < kTiles; ++j)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float relative = fmaf(x[j][2 * r + i], units.factor, -lse.x);
                    const float weight = exp2_fast(fmaf(relative, units.unit, -lse.y));
                    const int column = 8 * j + i; /* from the lane's first */
                    const bool visible = kAll || (((seen >> (2 * j + i) & 1) != 0) & (column >= first_seen) &
                                                  (column <= last_seen) & (column != dropped));
                    x[j][2 * r + i] = visible ? weight : 0.0f;
                }
        }
    }

    /* float32: 2 rows times 8 columns, each over this lane's own elements. Narrower: what mma accumulates. */
    static constexpr int kPartials = sizeof(T) == 4 ? 16 : 4;
    int slice_;

    __device__ void load_slice(const AttentionArgs &a, int first) {
        const int d = (first * 4 + static_cast<int>(threadIdx.x) % 4) * kVector<T>;
        if (!kMayBeUnaligned || a.aligned) {
#pragma unroll
            for (int c = 0; c < kSliceChunks<T>; ++c)
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    q_[c][r] = uint4{0, 0, 0, 0};
                    if (row[r].q != nullptr && d + c * kChunk<T> < a.headdim)
                        q_[c][r] = load_streaming(row[r].q + d + c * kChunk<T>);
                }
        } else {
#pragma unroll
            for (int c = 0; c < kSliceChunks<T>; ++c)
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    q_[c][r] = uint4{0, 0, 0, 0};
                    if (row[r].q != nullptr)
                        q_[c][r] = load_unaligned(row[r].q, d + c * kChunk<T>, a.headdim);
                }
        }
        slice_ = first;
    }

    __device__ void add_chunk(int c, const uint4 *keys, float (&sum)[kPartials]) {
        if constexpr (sizeof(T) == 2) {
            const uint4 k = keys[threadIdx.x % 32];
            const uint4 q0 = q_[c][0], q1 = q_[c][1];
            mma(sum, {q0.x, q1.x, q0.y, q1.y}, k.x, k.y, T{});
            mma(sum, {q0.z, q1.z, q0.w, q1.w}, k.z, k.w, T{});
        } else if constexpr (sizeof(T) == 1) {
            const uint4 k = keys[threadIdx.x % 32];
            const uint4 q0 = q_[c][0], q1 = q_[c][1];
            add_word(sum, q0.x, q1.x, k.x);
            add_word(sum, q0.y, q1.y, k.y);
            add_word(sum, q0.z, q1.z, k.z);
            add_word(sum, q0.w, q1.w, k.w);
        } else {
#pragma unroll
            for (int n = 0; n < 8; ++n) {
                const uint4 k = keys[n * 4 + threadIdx.x % 4];
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    float &s = sum[r * 8 + n];
                    s = fmaf(__uint_as_float(q_[c][r].x), __uint_as_float(k.x), s);
                    s = fmaf(__uint_as_float(q_[c][r].y), __uint_as_float(k.y), s);
                    s = fmaf(__uint_as_float(q_[c][r].z), __uint_as_float(k.z), s);
                    s = fmaf(__uint_as_float(q_[c][r].w), __uint_as_float(k.w), s);
                }
            }
        }
    }

    /* Four e4m3 elements of each operand, multiplied as float16: the tensor cores of sm_90 keep about 14 bits
     * of the sums of their own e4m3 product (arXiv 2412.19437, section 3.3.2). */
    __device__ static void add_word(float (&sum)[kPartials], uint32_t q0, uint32_t q1, uint32_t k) {
        uint32_t a0[2], a1[2], b[2];
        widen(q0, a0);
        widen(q1, a1);
        widen(k, b);
        mma(sum, {a0[0], a1[0], a0[1], a1[1]}, b[0], b[1], Half{});
    }

    /* Adds the four lanes' parts; each lane keeps the two columns that are its own. */
    __device__ static void finish(const float (&sum)[kPartials], float (&logits)[4]) {
        if constexpr (sizeof(T) <= 2) {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                logits[i] = sum[i];
        } else {
            const bool upper = (threadIdx.x & 2) != 0, odd = (threadIdx.x & 1) != 0;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float half[4];
#pragma unroll
                for (int n = 0; n < 4; ++n) {
                    const float low = sum[r * 8 + n], high = sum[r * 8 + 4 + n];
                    half[n] = (upper ? high : low) + __shfl_xor_sync(kAllLanes, upper ? low : high, 2);
                }
#pragma unroll
                for (int n = 0; n < 2; ++n)
                    logits[r * 2 + n] = (odd ? half[2 + n] : half[n]) +
                                        __shfl_xor_sync(kAllLanes, odd ? half[n] : half[2 + n], 1);
            }
        }
    }
};

/* Bit 2 j + i: column 8 j + 2 t + i of the tile exists and its key is there and not masked. By whole warps.
 */
template <int kTiles>
__device__ inline uint32_t seen_columns(const AttentionArgs &a, int b, int64_t first, int count) {
    uint32_t seen = 0;
    const auto column_of = [](int n) { return 8 * (n / 2) + 2 * static_cast<int>(threadIdx.x % 4) + n % 2; };
    if (kFinds<8 * kTiles> && !a.together) { /* a look-up is not cheap: each lane makes its own */
        const Sequence s(a, b);
        for (int start = 0; start < 8 * kTiles; start += 32) {
            const int column = start + static_cast<int>(threadIdx.x) % 32;
            const uint32_t there = __ballot_sync(kAllLanes, column < count && find_key(a, s, first + column));
#pragma unroll
            for (int n = 0; n < (kTiles < 4 ? 2 * kTiles : 8); ++n)
                seen |= (there >> column_of(n) & 1u) << (start / 4 + n);
        }
        return seen;
    }
#pragma unroll
    for (int n = 0; n < 2 * kTiles; ++n)
        if (column_of(n) < count && is_unmasked(a, b, first + column_of(n)))
            seen |= 1u << n;
    return seen;
}

} // namespace cuda
} // namespace attn_sampler

#endif /* ATTN_SAMPLER_CUDA_TILE_CUH_ */
