/* Small matrix products of query and key rows, the inner loop of everything that reads attention.
 *
 * One operand is packed across the lanes and reused, the other is walked row by row where it lies. Operands
 * are 32-bit words: a float32 each (narrower rows are widened), or, where the processor multiplies them, a
 * pair of bfloat16, which are then never widened, and to which float8 rows are.
 */
#ifndef ATTN_SAMPLER_CPU_MATMUL_H_
#define ATTN_SAMPLER_CPU_MATMUL_H_

#include "arithmetic.h"
#include "cpu/simd/simd.h"

namespace attn_sampler {
namespace {

constexpr int kTile = 64;                         /* rows and columns of a tile, at the most */
constexpr int kMaxVectors = kLanes == 16 ? 4 : 2; /* so that a micro-kernel's sums fit the registers */

/* Memory of one thread, for rows of one dtype and depth. */
struct Scratch {
    int dtype;
    int64_t depth;
    float *packed;  /* [depth][kTile] */
    float *rows;    /* [kTile][depth] */
    float *product; /* [kTile][kTile], or another size */
    int32_t *keys;  /* the keys that count, where there is room for them */

    static int64_t bytes(int64_t depth, int64_t product_size = kTile * kTile, int64_t keys = 0) {
        return (2 * depth * kTile + product_size + keys) * 4;
    }
};

/* c[kRows][kVectors * kLanes] = a[kRows][words] b[words][...], a's first rows. Raises top[...], if there is
 * one, to the largest of each column. */
template <typename Words, int kRows, int kVectors>
inline void micro_kernel(const Rows &a, const float *b, int width, int64_t words, float *c, float *top) {
    VecF sum[kRows][kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v)
            sum[r][v] = VecF{};
    for (int64_t d = 0; d < words; ++d) {
        if (d % 16 == 0) /* a cache line of the rows after these */
#pragma GCC unroll 16
            for (int r = kRows; r < 2 * kRows; ++r)
                __builtin_prefetch(a.row(r) + d * 4);
        VecF column[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v)
            column[v] = load<VecF>(b + d * width + v * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
            const VecF x = broadcast_word(a.data + r * a.stride + d * 4);
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v)
                sum[r][v] = Words::multiply_add(sum[r][v], column[v], x);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v)
            store(c + r * width + v * kLanes, sum[r][v]);
    if (top == nullptr)
        return;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
        VecF largest = load<VecF>(top + v * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r)
            largest = larger(sum[r][v], largest);
        store(top + v * kLanes, largest);
    }
}

/* The same for any number of rows: as many as possible at a time, then fewer, so that 8, 32 and 64 leave no
 * single ones; 16 are twice 8 rather than 12 and 4. */
template <typename Words, int kRows, int kVectors>
inline void micro_rows(Rows a, const float *b, int width, int64_t words, float *c, float *top) {
    constexpr int kBetterCut = kRows == 12 ? 16 : 0;
    for (; a.count >= kRows && a.count != kBetterCut;
         a.count -= kRows, a.data += kRows * a.stride, c += kRows * width)
        micro_kernel<Words, kRows, kVectors>(a, b, width, words, c, top);
    constexpr int kFewer = kRows > 8 ? 8 : kRows > 4 ? 4 : kRows / 2;
    if constexpr (kRows > 1)
        micro_rows<Words, kFewer, kVectors>(a, b, width, words, c, top);
}

/* Whether the rows are words where they lie. */
template <typename Words>
inline bool are_words(const Scratch &s) {
    return s.dtype == (Words::kElements == 2 ? ATTN_SAMPLER_BFLOAT16 : ATTN_SAMPLER_FLOAT32);
}

/* Where the stretches end in which rows at up to kTile addresses are evenly apart; returns how many. */
inline int64_t find_stretches(const void *const *address, int64_t n, int64_t (&stop)[kTile]) {
    const auto step = [&](int64_t i) {
        return reinterpret_cast<intptr_t>(address[i]) - reinterpret_cast<intptr_t>(address[i - 1]);
    };
    int64_t count = 0;
    for (int64_t i = 0; i < n; stop[count++] = i) {
        const intptr_t even = i + 1 < n ? step(i + 1) : 0;
        for (i = min_of(i + 2, n); i < n && step(i) == even;)
            ++i;
    }
    return count;
}

/* Rows that are words evenly apart, before those that start at `next`. */
inline Rows rows_in_place(const Scratch &s, const void *const *address, int64_t n, const void *next) {
    const char *const first = static_cast<const char *>(address[0]);
    const int64_t stride = n > 1 ? static_cast<const char *>(address[1]) - first : 4 * s.depth;
    return {first, stride, n, next == nullptr ? first + n * stride : static_cast<const char *>(next)};
}

/* Rows copied into the scratch, as words. */
template <typename Words>
inline Rows copied_rows(const Scratch &s, const void *const *address, int64_t n) {
    const int64_t depth = s.depth;
    char *const copy = reinterpret_cast<char *>(s.rows);
    const int64_t bytes = depth * 4 / Words::kElements;
    for (int64_t i = 0; i < n; ++i)
        if (Words::kElements == 1)
            convert_to_float(address[i], s.dtype, depth, reinterpret_cast<float *>(copy + i * bytes));
        else if (s.dtype == ATTN_SAMPLER_FLOAT8_E4M3)
            convert_to_bf16(address[i], depth, reinterpret_cast<uint16_t *>(copy + i * bytes));
        else
            memcpy(copy + i * bytes, address[i], static_cast<size_t>(bytes));
    return {copy, bytes, n, copy};
}

template <int kValue>
struct Constant {
    constexpr operator int() const { return kValue; }
};

/* x[n][width]: the products of these rows with the packed ones; width is a multiple of kLanes. Raises
 * top[width], if there is one, to the largest of each column that is a number. */
template <typename Words>
inline void multiply(const Scratch &s, Rows a, int width, float *x, float *top) {
    const int64_t words = s.depth / Words::kElements;
    const float *const b = s.packed;
    const int64_t done = Words::multiply_rows(a, b, width, words, x);
    for (int j = 0; done > 0 && top != nullptr && j < width; j += kLanes) {
        VecF largest = load<VecF>(top + j);
        for (int64_t r = 0; r < done; ++r)
            largest = larger(load<VecF>(x + r * width + j), largest);
        store(top + j, largest);
    }
    a.data += done * a.stride;
    a.count -= done;
    x += done * width;
    const auto columns = [&](auto rows_at_once, auto vectors, int j) {
        micro_rows<Words, rows_at_once, vectors>(a, b + j, width, words, x + j,
                                                 top == nullptr ? nullptr : top + j);
        return j + vectors * kLanes;
    };
    int j = 0;
    if constexpr (kMaxVectors == 4)
        while (j + 4 * kLanes <= width)
            j = columns(Constant<6>(), Constant<4>(), j);
    while (j + 2 * kLanes <= width)
        j = columns(Constant<kLanes == 16 ? 12 : 6>(), Constant<2>(), j);
    while (j + kLanes <= width)
        j = columns(Constant<kLanes == 16 ? 16 : 8>(), Constant<1>(), j);
}

/* The same of the rows at these addresses, before those at `next`: where they lie if they are words already,
 * in stretches that are worth it; with the same bits, as rows that a unit takes together stay together. */
template <typename Words>
inline void multiply(const Scratch &s, const void *const *address, int64_t n, const void *next, int width,
                     float *x, float *top = nullptr) {
    constexpr int64_t kWorthIt = 8; /* rows of one, on average */
    int64_t stop[kTile];
    const int64_t stretches = are_words<Words>(s) ? find_stretches(address, n, stop) : 0;
    bool in_place = stretches == 1 || (stretches > 0 && stretches * kWorthIt <= n);
    for (int64_t i = 0; i + 1 < stretches; ++i)
        in_place = in_place && stop[i] % Words::kTogether == 0;
    if (!in_place)
        return multiply<Words>(s, copied_rows<Words>(s, address, n), width, x, top);
    for (int64_t i = 0, first = 0; i < stretches; first = stop[i++]) {
        const void *const after = stop[i] < n ? address[stop[i]] : next;
        const Rows rows = rows_in_place(s, address + first, stop[i] - first, after);
        multiply<Words>(s, rows, width, x + first * width, top);
    }
}

/* Packs the rows at these addresses: packed[words][width], the rows across the lanes; zeros in the lanes
 * beyond n. */
template <typename Words>
inline void pack(const Scratch &s, const void *const *address, int64_t n, int width) {
    const int64_t words = s.depth / Words::kElements;
    for (int64_t i0 = 0; i0 < width; i0 += kLanes) {
        const int64_t count = clamp(n - i0, 0, kLanes);
        int64_t stop[kTile];
        const bool in_place = are_words<Words>(s) && find_stretches(address + i0, count, stop) == 1;
        const Rows rows = in_place ? rows_in_place(s, address + i0, count, nullptr)
                                   : copied_rows<Words>(s, address + i0, count);
        int64_t d = pack_squares({rows.data, rows.stride, count, nullptr}, words, s.packed + i0, width);
        for (; d < words; ++d) {
            float *const to = s.packed + d * width + i0;
            for (int64_t i = 0; i < count; ++i)
                memcpy(to + i, rows.data + i * rows.stride + d * 4, 4);
            for (int64_t i = count; i < kLanes; ++i)
                to[i] = 0.0f;
        }
    }
}

} // namespace
} // namespace attn_sampler

#endif /* ATTN_SAMPLER_CPU_MATMUL_H_ */
