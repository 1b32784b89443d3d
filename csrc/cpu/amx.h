/* Products of bfloat16 rows on AMX tiles. ATTN_SAMPLER_AMX is defined where they are compiled in. */
#ifndef ATTN_SAMPLER_CPU_AMX_H_
#define ATTN_SAMPLER_CPU_AMX_H_

#include "cpu/simd.h"

#if defined(__AMX_BF16__)
#define ATTN_SAMPLER_AMX 1

namespace attn_sampler {
namespace {

/* Eight tiles of 16 rows of 64 bytes. */
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

/* Tiles 0 to 3 hold sums, 4 and 5 rows of a, 6 and 7 of b. */
struct Tiles {
    Tiles() {
        static constexpr TileConfig config{};
        _tile_loadconfig(&config);
        /* The intrinsics do not tell the compiler which memory a tile is loaded from. */
        __asm__ volatile("" ::: "memory");
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles &) = delete;
    Tiles &operator=(const Tiles &) = delete;

    void zero() {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    /* GCC's intrinsics take a tile's number as a literal only. */
    template <int kIndex>
    void load_a(const void *p, int64_t stride) {
        if constexpr (kIndex == 0)
            _tile_loadd(4, p, stride);
        else
            _tile_loadd(5, p, stride);
    }
    template <int kIndex>
    void load_b(const void *p, int64_t stride) {
        if constexpr (kIndex == 0)
            _tile_loadd(6, p, stride);
        else
            _tile_loadd(7, p, stride);
    }
    template <int kIndex>
    void store_sum(float *p, int64_t stride) {
        if constexpr (kIndex == 0)
            _tile_stored(0, p, stride);
        else if constexpr (kIndex == 1)
            _tile_stored(1, p, stride);
        else if constexpr (kIndex == 2)
            _tile_stored(2, p, stride);
        else
            _tile_stored(3, p, stride);
    }
    template <int kA, int kB>
    void multiply() {
        if constexpr (kA == 0 && kB == 0)
            _tile_dpbf16ps(0, 4, 6);
        else if constexpr (kA == 0)
            _tile_dpbf16ps(1, 4, 7);
        else if constexpr (kB == 0)
            _tile_dpbf16ps(2, 5, 6);
        else
            _tile_dpbf16ps(3, 5, 7);
    }
};

/* c[done][width] = a[done][words] b[words][width] for as many whole blocks of 32 rows as there are; returns
 * done. The packed operand is laid out as a tile wants it: a row holds pair d of all columns. */
inline int64_t multiply_amx(const Rows &a, const float *b, int width, int64_t words, float *c) {
    const int64_t done = a.count / 32 * 32;
    if (words % 16 != 0 || width % 32 != 0 || done == 0)
        return 0;
    const int64_t width_bytes = int64_t{width} * 4;
    Tiles tiles;
    for (int64_t r = 0; r < done; r += 32)
        for (int j = 0; j < width; j += 32) {
            tiles.zero();
            for (int64_t d = 0; d < words; d += 16) {
                tiles.load_a<0>(a.row(r) + d * 4, a.stride);
                tiles.load_a<1>(a.row(r + 16) + d * 4, a.stride);
                tiles.load_b<0>(b + d * width + j, width_bytes);
                tiles.load_b<1>(b + d * width + j + 16, width_bytes);
                for (int64_t ahead = r + 32; j == 0 && ahead < r + 64; ++ahead)
                    __builtin_prefetch(a.row(ahead) + d * 4);
                tiles.multiply<0, 0>();
                tiles.multiply<0, 1>();
                tiles.multiply<1, 0>();
                tiles.multiply<1, 1>();
            }
            float *const at = c + r * width + j;
            tiles.store_sum<0>(at, width_bytes);
            tiles.store_sum<1>(at + 16, width_bytes);
            tiles.store_sum<2>(at + 16 * width, width_bytes);
            tiles.store_sum<3>(at + 16 * width + 16, width_bytes);
        }
    return done;
}

} // namespace
} // namespace attn_sampler
#endif

#endif /* ATTN_SAMPLER_CPU_AMX_H_ */
