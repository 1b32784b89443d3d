/* AVX-512 with products of bfloat16, and whole tiles of them on the AMX unit. */
#ifndef ATTN_SAMPLER_CPU_SIMD_AMX_H_
#define ATTN_SAMPLER_CPU_SIMD_AMX_H_

#include "cpu/simd/avx512_bf16.h"

namespace attn_sampler {
namespace {

/* Eight tiles of 16 rows of 64 bytes. */
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

struct AmxWords : Bf16Words {
    static constexpr int64_t kTogether = 32;

    /* As many whole blocks of 32 rows as there are. The packed operand is laid out as a tile wants it: a row
     * holds pair d of all columns. */
    static int64_t multiply_rows(const Rows &a, const float *b, int width, int64_t words, float *c) {
        const int64_t done = a.count / kTogether * kTogether;
        if (words % 16 != 0 || width % 32 != 0 || done == 0)
            return 0;
        static constexpr TileConfig config{};
        _tile_loadconfig(&config);
        /* The intrinsics do not tell the compiler which memory a tile is loaded from. */
        __asm__ volatile("" ::: "memory");
        const int64_t width_bytes = int64_t{width} * 4;
        for (int64_t r = 0; r < done; r += kTogether)
            for (int j = 0; j < width; j += 32) {
                /* Tiles 0 to 3 hold sums, 4 and 5 rows of a, 6 and 7 of b. */
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
                for (int64_t d = 0; d < words; d += 16) {
                    _tile_loadd(4, a.row(r) + d * 4, a.stride);
                    _tile_loadd(5, a.row(r + 16) + d * 4, a.stride);
                    _tile_loadd(6, b + d * width + j, width_bytes);
                    _tile_loadd(7, b + d * width + j + 16, width_bytes);
                    for (int64_t ahead = r + 32; j == 0 && ahead < r + 64; ++ahead)
                        __builtin_prefetch(a.row(ahead) + d * 4);
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_dpbf16ps(1, 4, 7);
                    _tile_dpbf16ps(2, 5, 6);
                    _tile_dpbf16ps(3, 5, 7);
                }
                float *const at = c + r * width + j;
                _tile_stored(0, at, width_bytes);
                _tile_stored(1, at + 16, width_bytes);
                _tile_stored(2, at + 16 * width, width_bytes);
                _tile_stored(3, at + 16 * width + 16, width_bytes);
            }
        _tile_release();
        return done;
    }
};

} // namespace

namespace amx {
using PairWords = AmxWords;
}
} // namespace attn_sampler

#endif /* ATTN_SAMPLER_CPU_SIMD_AMX_H_ */
