/* A linear map of few rows for one type of weights. Included once for each, which defines:
   ENTRY           name of the function
   ROW, WEIGHT     types of the numbers in memory
   ROWS_VEC, WEIGHTS_VEC, STEP   types of vectors of them, of STEP numbers
   LOAD_ROW(from), LOAD_WEIGHT(from), ADD(sum, row, weight), VALUE_ROW(x), VALUE_WEIGHT(x) */
#define JOINED(a, b) a##_##b
#define NAMED(a, b) JOINED(a, b)
#define TILE_OF NAMED(ENTRY, tile)
#define FULL_TILE NAMED(ENTRY, full_tile)
#define LAST_TILE NAMED(ENTRY, last_tile)

/* Compute a tile of y, and bring the weights of outputs `from` to `to` of the next tile into the second-level cache.
   Compiled for each number of rows and outputs, which must be constants. */
static inline __attribute__((always_inline)) void TILE_OF(const ROW *x, const WEIGHT *weight, const float *bias,
                                                          int rows, int outputs, int size, int64_t stride, int from,
                                                          int to, float *y) {
    vec partial[ROWS * OUTPUTS] = {{0}};
    int k = 0;
    for (; k + STEP <= size; k += STEP) {
        WEIGHTS_VEC weights[OUTPUTS];
        for (int n = 0; n < outputs; n++) {
            weights[n] = LOAD_WEIGHT(weight + (int64_t)n * size + k);
            IN_REGISTER(weights[n]);
        }
        for (int n = from; n < to; n++) __builtin_prefetch(weight + (int64_t)(outputs + n) * size + k, 0, 2);
        for (int m = 0; m < rows; m++) {
            ROWS_VEC row = LOAD_ROW(x + (int64_t)m * size + k);
            IN_REGISTER(row);
            for (int n = 0; n < outputs; n++) partial[m * outputs + n] = ADD(partial[m * outputs + n], row, weights[n]);
        }
    }
    float totals[ROWS * OUTPUTS + LANES];
    const int count = rows * outputs;
#pragma GCC unroll 4
    for (int at = 0; at < count; at += LANES) {
        vec part[LANES];
        for (int i = 0; i < LANES; i++) part[i] = at + i < count ? partial[at + i] : (vec){0};
        store(totals + at, sums(part, count - at <= LANES / 2 ? LANES / 2 : LANES));
    }
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < outputs; n++) {
            float total = totals[m * outputs + n] + (bias ? bias[n] : 0);
            for (int rest = k; rest < size; rest++)
                total += VALUE_ROW(x[(int64_t)m * size + rest]) * VALUE_WEIGHT(weight[(int64_t)n * size + rest]);
            y[m * stride + n] = total;
        }
}

#define TILE(rows, outputs, from, to) TILE_OF(x, weight, bias, rows, outputs, size, stride, from, to, y)

NOINLINE static void FULL_TILE(const ROW *x, const WEIGHT *weight, const float *bias, int size, int64_t stride,
                               int from, int to, float *y) {
    TILE(ROWS, OUTPUTS, from, to);
}

/* The last rows, or the last outputs */
NOINLINE static void LAST_TILE(const ROW *x, const WEIGHT *weight, const float *bias, int rows, int outputs, int size,
                               int64_t stride, float *y) {
    if (outputs == OUTPUTS) {
        if (rows == 3) TILE(3, OUTPUTS, 0, OUTPUTS);
        if (rows == 2) TILE(2, OUTPUTS, 0, OUTPUTS);
        if (rows == 1) TILE(1, OUTPUTS, 0, OUTPUTS);
        return;
    }
    const WEIGHT *const first = weight;
    const float *const first_bias = bias;
    float *const first_y = y;
    for (int m = 0; m < rows; m++, x += size)
        for (int n = 0; n < outputs; n++) {
            weight = first + (int64_t)n * size, bias = first_bias ? first_bias + n : NULL, y = first_y + m * stride + n;
            TILE(1, 1, 0, 0);
        }
}

/* y = x weight^T + bias. x [rows, size], weight [outputs, size], bias [outputs] or NULL -> y [rows, outputs] */
void ENTRY(const ROW *x, const WEIGHT *weight, const float *bias, int rows, int64_t outputs, int size, int threads,
           float *y) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t n = 0; n < outputs; n += OUTPUTS) {
        const int wide = outputs - n < OUTPUTS ? (int)(outputs - n) : OUTPUTS, tiles = rows / ROWS;
        const WEIGHT *tile_weight = weight + n * size;
        const float *tile_bias = bias ? bias + n : NULL;
        for (int tile = 0, m = 0; m < rows; tile++, m += ROWS) {
            const ROW *row = x + (int64_t)m * size;
            float *result = y + m * outputs + n;
            if (wide < OUTPUTS || rows - m < ROWS)
                LAST_TILE(row, tile_weight, tile_bias, rows - m < ROWS ? rows - m : ROWS, wide, size, outputs, result);
            else /* each tile of rows prefetches a part, since all at once would wait for the memory */
                FULL_TILE(row, tile_weight, tile_bias, size, outputs, tile * OUTPUTS / tiles,
                          (tile + 1) * OUTPUTS / tiles, result);
        }
    }
}

#undef ENTRY
#undef ROW
#undef WEIGHT
#undef ROWS_VEC
#undef WEIGHTS_VEC
#undef STEP
#undef LOAD_ROW
#undef LOAD_WEIGHT
#undef ADD
#undef VALUE_ROW
#undef VALUE_WEIGHT
#undef TILE
