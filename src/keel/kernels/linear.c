/* Linear maps of few rows. Reading the weights takes most of their time, and a general matrix product would first copy
   the weights into blocks. Here each weight is read once. The result of a row does not depend on the other rows. */
#include "kernels.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#define ROWS 4 /* The sums of a tile of ROWS x OUTPUTS fill the registers. */
#define OUTPUTS (LANES == 16 ? 6 : 3)
#ifdef __AVX__
#define IN_REGISTER(x) __asm__("" : "+v"(x)) /* for a vector that is used several times */
#else
#define IN_REGISTER(x)
#endif

typedef uint16_t bfloat16; /* the upper half of a float */
typedef bfloat16 halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef uint32_t bits __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline vec widened(const bfloat16 *from) {
    return (vec)(__builtin_convertvector(*(const halves *)from, bits) << 16);
}

static inline float wide(bfloat16 x) {
    const uint32_t whole = (uint32_t)x << 16;
    float value;
    memcpy(&value, &whole, sizeof value);
    return value;
}

#define PLUS_PRODUCT(sum, row, weight) (sum) + (row) * (weight)
#define ITSELF(x) (x)

#define ENTRY linear
#define ROW float
#define WEIGHT float
#define ROWS_VEC vec
#define WEIGHTS_VEC vec
#define STEP LANES
#define LOAD_ROW load
#define LOAD_WEIGHT load
#define ADD PLUS_PRODUCT
#define VALUE_ROW ITSELF
#define VALUE_WEIGHT ITSELF
#include "linear_tile.h"

/* Round to the nearest bfloat16, to an even one of two. NaN stays NaN. */
static inline uint32_t round_to_bfloat16(float x) {
    uint32_t whole;
    memcpy(&whole, &x, sizeof whole);
    return x != x ? 0x7fc00000u : (whole + 0x7fff + ((whole >> 16) & 1)) & 0xffff0000u;
}

/* bfloat16 weights; the rows are bfloat16 numbers too. Sums are float. */
#ifdef __AVX512BF16__
void round_rows(const float *x, int64_t count, narrow_row *to) {
    for (int64_t i = 0; i < count; i++) to[i] = (narrow_row)(round_to_bfloat16(x[i]) >> 16);
}

#define ROW bfloat16
#define ROWS_VEC __m512i
#define WEIGHTS_VEC __m512i
#define STEP 32
#define LOAD_ROW(from) _mm512_loadu_si512(from)
#define LOAD_WEIGHT(from) _mm512_loadu_si512(from)
#define ADD(sum, row, weight) (vec) _mm512_dpbf16_ps((__m512)(sum), (__m512bh)(row), (__m512bh)(weight))
#define VALUE_ROW wide
#else
void round_rows(const float *x, int64_t count, narrow_row *to) {
    for (int64_t i = 0; i < count; i++) {
        const uint32_t whole = round_to_bfloat16(x[i]);
        memcpy(to + i, &whole, sizeof whole);
    }
}

#define ROW float
#define ROWS_VEC vec
#define WEIGHTS_VEC vec
#define STEP LANES
#define LOAD_ROW load
#define LOAD_WEIGHT widened
#define ADD PLUS_PRODUCT
#define VALUE_ROW ITSELF
#endif
#define ENTRY linear_bfloat16
#define WEIGHT bfloat16
#define VALUE_WEIGHT wide
#include "linear_tile.h"
