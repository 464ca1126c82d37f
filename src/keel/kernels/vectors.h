/* Vectors as wide as the registers of this processor, in the vector types of GCC and Clang. */
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#define NOINLINE __attribute__((noinline)) /* for a loop that needs all registers */

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline int rounded_up(int count, int step) { return (count + step - 1) / step * step; }

/* Allocate scratch memory for `numbers` floats, aligned for vectors. */
static inline float *scratch(size_t numbers) {
    return aligned_alloc(64, (sizeof(float) * numbers + 63) / 64 * 64);
}

static inline vec load(const float *from) { return *(const vec *)from; }

static inline void store(float *to, vec x) { *(vec *)to = x; }

/* Load the first `count` numbers, followed by `rest`. */
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

/* Loop over `count` numbers in steps of a vector. `part` is the number of them in the step at `at`. */
#define EACH_PART(at, count)                            \
    for (int64_t at = 0; at < (count); at += LANES)     \
        for (int part = (count) - at < LANES ? (int)((count) - at) : LANES, once = 1; once; once = 0)

typedef uint16_t bfloat16; /* the upper half of a float */
typedef bfloat16 halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef uint32_t bits __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline vec load_bfloat16(const bfloat16 *from) {
    return (vec)(__builtin_convertvector(*(const halves *)from, bits) << 16);
}

static inline vec load_part_bfloat16(const bfloat16 *from, int count, float rest) {
    if (count == LANES) return load_bfloat16(from);
    bfloat16 part[LANES] = {0};
    memcpy(part, from, sizeof(bfloat16) * count);
    const vec x = load_bfloat16(part);
    float all[LANES];
    for (int lane = 0; lane < LANES; lane++) all[lane] = lane < count ? x[lane] : rest;
    return load(all);
}

static inline vec choose(ints where, vec x, vec otherwise) {
    return (vec)((where & (ints)x) | (~where & (ints)otherwise));
}

/* Round to the nearest bfloat16, to an even one of two. NaN stays NaN. */
static inline halves rounded(vec x) {
    const bits whole = (bits)x, up = (whole + 0x7fff + ((whole >> 16) & 1)) >> 16;
    return __builtin_convertvector((bits)choose(x == x, (vec)up, (vec)(0x7fc0 + (bits){0})), halves);
}

static inline void store_part_bfloat16(bfloat16 *to, vec x, int count) {
    const halves y = rounded(x);
    memcpy(to, &y, sizeof(bfloat16) * count);
}

static inline vec larger(vec a, vec b) { return choose(a > b, a, b); }

static inline ints lanes_from(int first) {
    ints lane;
    for (int i = 0; i < LANES; i++) lane[i] = first + i;
    return lane;
}

/* A shuffle of two vectors. rule(lane, block) is the source of each lane. */
#define FOUR(rule, at, block) rule(at, block), rule(at + 1, block), rule(at + 2, block), rule(at + 3, block)
#define EIGHT(rule, at, block) FOUR(rule, at, block), FOUR(rule, at + 4, block)
#if LANES == 16
#define LIST(rule, block) EIGHT(rule, 0, block), EIGHT(rule, 8, block)
#else
#define LIST(rule, block) EIGHT(rule, 0, block)
#endif
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLED(a, b, rule, block) __builtin_shufflevector(a, b, LIST(rule, block))
#else
#define SHUFFLED(a, b, rule, block) __builtin_shuffle(a, b, (ints){LIST(rule, block)})
#endif

#define SWAPPED(lane, block) ((lane) ^ (block))

static inline float sum(vec x) {
#if LANES == 16
    x += SHUFFLED(x, x, SWAPPED, 8);
#endif
    x += SHUFFLED(x, x, SWAPPED, 4);
    x += SHUFFLED(x, x, SWAPPED, 2);
    return x[0] + x[1];
}

static inline float largest(vec x) {
#if LANES == 16
    x = larger(x, SHUFFLED(x, x, SWAPPED, 8));
#endif
    x = larger(x, SHUFFLED(x, x, SWAPPED, 4));
    x = larger(x, SHUFFLED(x, x, SWAPPED, 2));
    return x[0] > x[1] ? x[0] : x[1];
}

/* In each round, pairs of vectors exchange blocks of lanes. After blocks of 1, 2, 4 and 8 lanes, rows are lanes. */
#define UPPER(lane, block) ((lane) & (block) ? LANES + (lane) - (block) : (lane))
#define LOWER(lane, block) ((lane) & (block) ? LANES + (lane) : (lane) + (block))
#define EXCHANGE(square, count, block)                           \
    _Pragma("GCC unroll 16") for (int i = 0; i < (count); i++) { \
        if (i & (block)) continue;                               \
        const vec a = square[i], b = square[i + (block)];        \
        square[i] = SHUFFLED(a, b, UPPER, block);                \
        square[i + (block)] = SHUFFLED(a, b, LOWER, block);      \
    }

/* [8, 8], or two of them side by side */
static inline void transpose_eights(vec *square) {
    EXCHANGE(square, 8, 1)
    EXCHANGE(square, 8, 2)
    EXCHANGE(square, 8, 4)
}

/* [LANES, LANES] */
static inline void transpose(vec *square) {
#if LANES == 16
    EXCHANGE(square, 16, 1)
    EXCHANGE(square, 16, 2)
    EXCHANGE(square, 16, 4)
    EXCHANGE(square, 16, 8)
#else
    transpose_eights(square);
#endif
}

/* Add up the lanes of `count` vectors, a power of two and at most LANES. The sums are the first lanes of the result.
   Changes the vectors. Pairs of vectors are halved into one, which takes fewer steps than `sum` of each. */
#define FOLD(vectors, count, block)                                                                \
    if ((block) < (count)) {                                                                       \
        _Pragma("GCC unroll 16") for (int i = 0; i < (count); i += 2 * (block)) {                  \
            const vec a = vectors[i], b = vectors[i + (block)];                                    \
            vectors[i] = SHUFFLED(a, b, UPPER, block) + SHUFFLED(a, b, LOWER, block);              \
        }                                                                                          \
    } else                                                                                         \
        vectors[0] += SHUFFLED(vectors[0], vectors[0], SWAPPED, block);

static inline __attribute__((always_inline)) vec sums(vec *vectors, int count) {
    FOLD(vectors, count, 1)
    FOLD(vectors, count, 2)
    FOLD(vectors, count, 4)
#if LANES == 16
    FOLD(vectors, count, 8)
#endif
    return vectors[0];
}

/* e^x to within one or two units in the last place, as 2^n e^r with |r| <= log(2) / 2 (the polynomial of Moshier's
   Cephes). 0 below -87 and for -inf, e^88 above 88, NaN for NaN. */
static inline vec exponential(vec x) {
    const vec top = 88.0f - (vec){0}, magic = 12582912.0f - (vec){0}; /* adding 1.5 * 2^23 rounds to integers */
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

/* Logits minus the largest of them, at a temperature. The division comes last: before the subtraction it would round
   away the differences of logits with a large offset. */
static inline vec tempered(vec x, float temperature) {
    if (temperature != 1) x /= temperature;
    return x;
}
