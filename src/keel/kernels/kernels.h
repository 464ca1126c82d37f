/* The operations that other files call. Each is described where it is defined. */
#pragma once

#include "vectors.h"

#ifdef __AVX512BF16__
typedef uint16_t narrow_row; /* what `linear_bfloat16` reads: bfloat16 numbers, or floats that bfloat16 can hold */
#else
typedef float narrow_row;
#endif

void norm(const float *x, const float *weight, int64_t count, int size, float eps, int threads, float *y,
          float *scales);
void gated(const float *gate, const float *up, int64_t count, int threads, float *y);
void linear(const float *x, const float *weight, const float *bias, int rows, int64_t outputs, int size, int threads,
            float *y);
void linear_bfloat16(const narrow_row *x, const uint16_t *weight, const float *bias, int rows, int64_t outputs,
                     int size, int threads, float *y);
void round_rows(const float *x, int64_t count, narrow_row *to);
void attend_newest(const float *query, const float *key, const float *value, const float *cos, const float *sin,
                   const int64_t *first, int rows, int heads, int kv_heads, int size, int columns, int column,
                   float scaling, int threads, float *keys, float *values, float *attended);
