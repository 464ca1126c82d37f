/* Products of many rows with bfloat16 weights, whose sums stay float. torch rounds such sums to bfloat16. */
#include "kernels.h"

#ifdef __AVX512BF16__
#include <immintrin.h>

#define BLOCK (2 * LANES) /* outputs at once; with ROWS, their sums fill the registers */
#define ROWS 12
#define PAIRS(size) ((size) / 2)

/* packed [size / 2, BLOCK] pairs of numbers = the transpose of weight [BLOCK, size / 2]. `size` is a multiple of BLOCK. */
static void pack(const bfloat16 *weight, int size, int outputs, vec *packed) {
    for (int half = 0; half < 2; half++)
        for (int k = 0; k < PAIRS(size); k += LANES) {
            vec square[LANES];
            for (int n = 0; n < LANES; n++) {
                const int output = half * LANES + n;
                square[n] = output < outputs ? load((const float *)(weight + (int64_t)output * size) + k) : (vec){0};
            }
            transpose(square);
            for (int i = 0; i < LANES; i++) packed[2 * (k + i) + half] = square[i];
        }
}

static inline __attribute__((always_inline)) void rows_of(const bfloat16 *x, const vec *packed, const vec *start,
                                                          int rows, int size, int64_t stride, int outputs, float *y) {
    vec sums[ROWS][2];
    for (int m = 0; m < rows; m++) sums[m][0] = start[0], sums[m][1] = start[1];
    for (int k = 0; k < PAIRS(size); k++) {
        const __m512bh left = (__m512bh)packed[2 * k], right = (__m512bh)packed[2 * k + 1];
        for (int m = 0; m < rows; m++) {
            int pair;
            memcpy(&pair, x + (int64_t)m * size + 2 * k, sizeof pair);
            const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            sums[m][0] = (vec)_mm512_dpbf16_ps((__m512)sums[m][0], left, both);
            sums[m][1] = (vec)_mm512_dpbf16_ps((__m512)sums[m][1], right, both);
        }
    }
    for (int m = 0; m < rows; m++) memcpy(y + m * stride, sums[m], sizeof(float) * outputs);
}

NOINLINE static void full_rows(const bfloat16 *x, const vec *packed, const vec *start, int size, int64_t stride,
                               int outputs, float *y) {
    rows_of(x, packed, start, ROWS, size, stride, outputs, y);
}

NOINLINE static void one_row(const bfloat16 *x, const vec *packed, const vec *start, int size, int64_t stride,
                             int outputs, float *y) {
    rows_of(x, packed, start, 1, size, stride, outputs, y);
}

static void product(const bfloat16 *x, const bfloat16 *weight, const float *bias, int rows, int64_t outputs, int size,
                    int threads, float *y) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        vec *packed = (vec *)scratch((size_t)PAIRS(size) * BLOCK);
#pragma omp for
        for (int64_t n = 0; n < outputs; n += BLOCK) {
            const int wide = outputs - n < BLOCK ? (int)(outputs - n) : BLOCK;
            vec start[2] = {{0}, {0}};
            if (bias) memcpy(start, bias + n, sizeof(float) * wide);
            pack(weight + n * size, size, wide, packed);
            int m = 0;
            for (; m + ROWS <= rows; m += ROWS)
                full_rows(x + (int64_t)m * size, packed, start, size, outputs, wide, y + m * outputs + n);
            for (; m < rows; m++)
                one_row(x + (int64_t)m * size, packed, start, size, outputs, wide, y + m * outputs + n);
        }
        free(packed);
    }
}
#endif

/* y = x weight^T + bias, as `linear_bfloat16`. */
void product_bfloat16(const narrow_row *x, const uint16_t *weight, const float *bias, int rows, int64_t outputs,
                      int size, int threads, float *y) {
#ifdef __AVX512BF16__
    if (size % BLOCK == 0) {
        product(x, weight, bias, rows, outputs, size, threads, y);
        return;
    }
#endif
    linear_bfloat16(x, weight, bias, rows, outputs, size, threads, y);
}
