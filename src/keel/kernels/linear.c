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

/* bfloat16 weights; the rows are bfloat16 numbers too. Sums are float. */
#ifdef __AVX512BF16__
void round_rows(const float *x, int64_t count, narrow_row *to) {
    EACH_PART(at, count) store_part_bfloat16(to + at, load_part(x + at, part, 0), part);
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
    EACH_PART(at, count) {
        const halves narrow = rounded(load_part(x + at, part, 0));
        store_part(to + at, load_bfloat16((const bfloat16 *)&narrow), part);
    }
}

#define ROW float
#define ROWS_VEC vec
#define WEIGHTS_VEC vec
#define STEP LANES
#define LOAD_ROW load
#define LOAD_WEIGHT load_bfloat16
#define ADD PLUS_PRODUCT
#define VALUE_ROW ITSELF
#endif
#define ENTRY linear_bfloat16
#define WEIGHT bfloat16
#define VALUE_WEIGHT wide
#include "linear_tile.h"
