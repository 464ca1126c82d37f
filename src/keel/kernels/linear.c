/* Linear maps of few rows. Reading the weights takes most of their time, and a general matrix product would first copy
   the weights into blocks. Here each weight is read once. The result of a row does not depend on the other rows. */
#include "vectors.h"

#define ROWS 4 /* The sums of a tile of ROWS x OUTPUTS fill the registers. */
#define OUTPUTS (LANES == 16 ? 6 : 3)
#ifdef __AVX__
#define IN_REGISTER(x) __asm__("" : "+v"(x)) /* for a vector that is used several times */
#else
#define IN_REGISTER(x)
#endif

/* Compute a tile of y. Compiled for each number of rows and outputs, which must be constants. */
static inline __attribute__((always_inline)) void tile(const float *x, const float *weight, const float *bias, int rows,
                                                       int outputs, int size, int64_t stride, int prefetch, float *y) {
    vec sums[ROWS][OUTPUTS] = {{{0}}};
    int k = 0;
    for (; k + LANES <= size; k += LANES) {
        vec weights[OUTPUTS];
        for (int n = 0; n < outputs; n++) {
            weights[n] = load(weight + (int64_t)n * size + k);
            IN_REGISTER(weights[n]);
            if (prefetch) __builtin_prefetch(weight + (int64_t)(outputs + n) * size + k); /* the next tile's */
        }
        for (int m = 0; m < rows; m++) {
            vec row = load(x + (int64_t)m * size + k);
            IN_REGISTER(row);
            for (int n = 0; n < outputs; n++) sums[m][n] += row * weights[n];
        }
    }
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < outputs; n++) {
            float total = sum(sums[m][n]) + (bias ? bias[n] : 0);
            for (int rest = k; rest < size; rest++) total += x[(int64_t)m * size + rest] * weight[(int64_t)n * size + rest];
            y[m * stride + n] = total;
        }
}

#define TILE(rows, outputs, prefetch) tile(x, weight, bias, rows, outputs, size, stride, prefetch, y)

NOINLINE static void full_tile(const float *x, const float *weight, const float *bias, int size, int64_t stride,
                               float *y) {
    TILE(ROWS, OUTPUTS, 0);
}

NOINLINE static void first_tile(const float *x, const float *weight, const float *bias, int size, int64_t stride,
                                float *y) {
    TILE(ROWS, OUTPUTS, 1);
}

/* The last rows, or the last outputs */
NOINLINE static void last_tile(const float *x, const float *weight, const float *bias, int rows, int outputs, int size,
                               int64_t stride, float *y) {
    if (outputs == OUTPUTS) {
        if (rows == 3) TILE(3, OUTPUTS, 1);
        if (rows == 2) TILE(2, OUTPUTS, 1);
        if (rows == 1) TILE(1, OUTPUTS, 1);
        return;
    }
    const float *const first = weight, *const first_bias = bias;
    float *const first_y = y;
    for (int m = 0; m < rows; m++, x += size)
        for (int n = 0; n < outputs; n++) {
            weight = first + (int64_t)n * size, bias = first_bias ? first_bias + n : NULL, y = first_y + m * stride + n;
            TILE(1, 1, 0);
        }
}

/* y = x weight^T + bias. x [rows, size], weight [outputs, size], bias [outputs] or NULL -> y [rows, outputs] */
void linear(const float *x, const float *weight, const float *bias, int rows, int64_t outputs, int size, int threads,
            float *y) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t n = 0; n < outputs; n += OUTPUTS) {
        const int wide = outputs - n < OUTPUTS ? (int)(outputs - n) : OUTPUTS;
        const float *tile_weight = weight + n * size, *tile_bias = bias ? bias + n : NULL;
        for (int m = 0; m < rows; m += ROWS) {
            const float *from = x + (int64_t)m * size;
            float *to = y + m * outputs + n;
            if (wide < OUTPUTS || rows - m < ROWS)
                last_tile(from, tile_weight, tile_bias, rows - m < ROWS ? rows - m : ROWS, wide, size, outputs, to);
            else
                (m ? full_tile : first_tile)(from, tile_weight, tile_bias, size, outputs, to);
        }
    }
}
