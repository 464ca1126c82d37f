/* Sixteen numbers at a time, in the vector types of GCC and Clang, which fit any processor's registers. */
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
#define APART __attribute__((noinline)) /* a loop that needs all registers for itself */

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline int rounded_up(int count, int step) { return (count + step - 1) / step * step; }

static inline vec load(const float *from) { return *(const vec *)from; }

static inline void store(float *to, vec x) { *(vec *)to = x; }

/* The first `count` numbers, and `rest` behind them. */
static inline vec load_part(const float *from, int count, float rest) {
    if (count == LANES) return load(from);
    float part[LANES];
    for (int lane = 0; lane < LANES; lane++) part[lane] = rest;
    memcpy(part, from, sizeof(float) * count);
    return load(part);
}

static inline void store_part(float *to, vec x, int count) {
    if (count == LANES)
        store(to, x);
    else
        memcpy(to, &x, sizeof(float) * count);
}

static inline vec choose(ints where, vec x, vec otherwise) {
    return (vec)((where & (ints)x) | (~where & (ints)otherwise));
}

static inline vec larger(vec a, vec b) { return choose(a > b, a, b); }

static inline ints lanes_from(int first) {
    ints lane;
    for (int i = 0; i < LANES; i++) lane[i] = first + i;
    return lane;
}

/* A shuffle's lanes by a rule of lane and block. */
#define FOUR(side, at, block) side(at, block), side(at + 1, block), side(at + 2, block), side(at + 3, block)
#define ALL(side, block) ((ints){FOUR(side, 0, block), FOUR(side, 4, block), FOUR(side, 8, block), FOUR(side, 12, block)})

/* Lane i of the result holds lane i ^ block. */
#define SWAPPED(lane, block) ((lane) ^ (block))

static inline float sum(vec x) {
    x += __builtin_shuffle(x, ALL(SWAPPED, 8));
    x += __builtin_shuffle(x, ALL(SWAPPED, 4));
    x += __builtin_shuffle(x, ALL(SWAPPED, 2));
    return x[0] + x[1];
}

static inline float largest(vec x) {
    x = larger(x, __builtin_shuffle(x, ALL(SWAPPED, 8)));
    x = larger(x, __builtin_shuffle(x, ALL(SWAPPED, 4)));
    x = larger(x, __builtin_shuffle(x, ALL(SWAPPED, 2)));
    return x[0] > x[1] ? x[0] : x[1];
}

/* In each round pairs of vectors exchange blocks of lanes; after rounds with 1, 2, 4, 8 rows and lanes have changed
   places. */
#define UPPER(lane, block) ((lane) & (block) ? LANES + (lane) - (block) : (lane))
#define LOWER(lane, block) ((lane) & (block) ? LANES + (lane) : (lane) + (block))
#define EXCHANGE(square, count, block)                                  \
    _Pragma("GCC unroll 16") for (int i = 0; i < (count); i++) {        \
        if (i & (block)) continue;                                      \
        const vec a = square[i], b = square[i + (block)];               \
        square[i] = __builtin_shuffle(a, b, ALL(UPPER, block));         \
        square[i + (block)] = __builtin_shuffle(a, b, ALL(LOWER, block)); \
    }

/* [16, 16] */
static inline void transpose(vec *square) {
    EXCHANGE(square, LANES, 1)
    EXCHANGE(square, LANES, 2)
    EXCHANGE(square, LANES, 4)
    EXCHANGE(square, LANES, 8)
}

/* [8, 8] twice, side by side */
static inline void transpose_halves(vec *halves) {
    EXCHANGE(halves, 8, 1)
    EXCHANGE(halves, 8, 2)
    EXCHANGE(halves, 8, 4)
}

/* e^x to the last bit or two, by 2^n e^r with |r| <= log(2) / 2; 0 below -87 and for -inf, e^88 above 88, NaN for NaN. */
static inline vec exponential(vec x) {
    const vec top = 88.0f - (vec){0}, magic = 12582912.0f - (vec){0}; /* adding 1.5 * 2^23 rounds to whole numbers */
    const ints counts = ~(x < -87.0f);
    x = choose(x > top, top, x);
    const vec n = (x * 1.44269504f + magic) - magic;
    const vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const ints power = (__builtin_convertvector(n, ints) + 127) << 23;
    return (vec)((ints)(p * (vec)power) & counts);
}
