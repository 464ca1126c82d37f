/* Causal attention of packed rows, and its gradient, on a tile of tokens at a time, one in each lane.

   No matrix of the size of a row squared is in memory: the gradient computes the weights again from the largest score
   and the sum of each token (Dao et al. 2022). Query and key may be rotated as they are read (Su et al. 2021).
   The result of a row depends only on that row, for any number of threads. */
#include "vectors.h"

typedef float quad __attribute__((vector_size(16), aligned(4), may_alias));

typedef struct {
    const int64_t *starts; /* [rows + 1], in tokens */
    int rows, heads, kv_heads, size, window;
    float scaling;
    const float *cos, *sin; /* [tokens, size / 2], or null */
} Shape;

/* Copy a vector of the token at `at`. With `turned`, rotate it by the token's angle, or back (sign -1). */
static inline void move(const Shape *shape, const float *restrict from, int64_t at, int turned, float sign,
                        float *restrict to) {
    const int half = shape->size / 2;
    if (!turned || !shape->cos) {
        for (int d = 0; d < shape->size; d += 8) memcpy(to + d, from + d, 8 * sizeof(float));
        return;
    }
    for (int d = 0; d < half; d += 4) {
        const quad c = *(quad *)(shape->cos + at * half + d), s = *(quad *)(shape->sin + at * half + d) * sign;
        const quad left = *(quad *)(from + d), right = *(quad *)(from + half + d);
        *(quad *)(to + d) = left * c - right * s;
        *(quad *)(to + half + d) = right * c + left * s;
    }
}

/* Copy one head of one row into contiguous memory: the vectors of its tokens, and zeros to the end of the last tile. */
static void gather(const Shape *shape, const float *x, int64_t start, int length, int head, int heads, int turned,
                   float *rows) {
    const int size = shape->size, padded = rounded_up(length, LANES);
    for (int at = 0; at < length; at++)
        move(shape, x + ((start + at) * heads + head) * size, start + at, turned, 1, rows + (int64_t)at * size);
    memset(rows + (int64_t)length * size, 0, sizeof(float) * size * (padded - length));
}

/* The inverse of gather. Gradients are rotated back. */
static void scatter(const Shape *shape, const float *rows, int64_t start, int length, int head, int heads, int turned,
                    float *x) {
    const int size = shape->size;
    for (int at = 0; at < length; at++)
        move(shape, rows + (int64_t)at * size, start + at, turned, -1, x + ((start + at) * heads + head) * size);
}

/* Transpose rows into a tile, which has a token in each lane. rows [LANES, size] -> tile [size] of lanes */
static NOINLINE void into_tile(const float *rows, int size, vec *tile) {
    int d = 0;
    for (; d + LANES <= size; d += LANES) {
        for (int lane = 0; lane < LANES; lane++) tile[d + lane] = load(rows + lane * size + d);
        transpose(tile + d);
    }
    if (d < size) { /* eight numbers are left, so a vector holds those of two tokens */
        for (int lane = 0; lane < LANES; lane++)
            memcpy((float *)(tile + d + lane % 8) + lane / 8 * 8, rows + lane * size + d, 8 * sizeof(float));
        transpose_eights(tile + d);
    }
}

/* The inverse of into_tile. It overwrites the tile. */
static NOINLINE void out_of_tile(vec *tile, int size, float *rows) {
    int d = 0;
    for (; d + LANES <= size; d += LANES) {
        transpose(tile + d);
        for (int lane = 0; lane < LANES; lane++) store(rows + lane * size + d, tile[d + lane]);
    }
    if (d < size) {
        transpose_eights(tile + d);
        for (int lane = 0; lane < LANES; lane++)
            memcpy(rows + lane * size + d, (float *)(tile + d + lane % 8) + lane / 8 * 8, 8 * sizeof(float));
    }
}

/* products[i] = sum over d of tile[d] * rows[i][d], for eight rows at a time: their sums stay in registers. */
static NOINLINE void dot_products(const vec *tile, const float *rows, int first, int last, int size, vec *products) {
    for (int i = first; i < last; i += 8) {
        const float *r = rows + (int64_t)i * size;
        vec a = {0}, b = {0}, c = {0}, e = {0}, f = {0}, g = {0}, h = {0}, k = {0};
        for (int d = 0; d < size; d++) {
            const vec t = tile[d];
            a += t * r[d];
            b += t * r[size + d];
            c += t * r[2 * size + d];
            e += t * r[3 * size + d];
            f += t * r[4 * size + d];
            g += t * r[5 * size + d];
            h += t * r[6 * size + d];
            k += t * r[7 * size + d];
        }
        vec *to = products + i;
        to[0] = a, to[1] = b, to[2] = c, to[3] = e, to[4] = f, to[5] = g, to[6] = h, to[7] = k;
    }
}

/* tile[d] += sum over i of weights[i] * rows[i][d], for eight d at a time. */
static NOINLINE void add_weighted(const vec *weights, const float *rows, int first, int last, int size, vec *tile) {
    for (int d = 0; d < size; d += 8) {
        vec *to = tile + d;
        vec a = to[0], b = to[1], c = to[2], e = to[3], f = to[4], g = to[5], h = to[6], k = to[7];
        for (int i = first; i < last; i++) {
            const vec w = weights[i];
            const float *r = rows + (int64_t)i * size + d;
            a += w * r[0];
            b += w * r[1];
            c += w * r[2];
            e += w * r[3];
            f += w * r[4];
            g += w * r[5];
            h += w * r[6];
            k += w * r[7];
        }
        to[0] = a, to[1] = b, to[2] = c, to[3] = e, to[4] = f, to[5] = g, to[6] = h, to[7] = k;
    }
}

/* Which keys a query attends to: that of its token and the `window` - 1 before it, or without a window all before it. One of
   `queries` and `keys` varies over the lanes. */
static inline ints visible(ints queries, ints keys, int window) {
    const ints distance = queries - keys;
    return window ? (distance >= 0) & (distance < window) : distance >= 0;
}

/* Allocate scratch memory for a row of `padded` tokens: `heads` heads, two columns of lanes, and four tiles. */
static float *space_for(int padded, int size, int heads) {
    return scratch((size_t)padded * size * heads + 2 * (size_t)padded * LANES + 4 * (size_t)size * LANES);
}

static int longest(const Shape *shape) {
    int64_t most = 0;
    for (int row = 0; row < shape->rows; row++) {
        const int64_t length = shape->starts[row + 1] - shape->starts[row];
        most = length > most ? length : most;
    }
    return rounded_up((int)most, LANES);
}

/* Attention of all query heads of one key head. statistics [tokens, heads, 2] are the largest score of each token and
   1 / sum of exp(score - largest). */
static void attend_head(const Shape *shape, const float *query, const float *key, const float *value, int row,
                        int kv_head, float *space, float *attended, float *statistics) {
    const int64_t start = shape->starts[row];
    const int length = (int)(shape->starts[row + 1] - start), padded = rounded_up(length, LANES);
    const int size = shape->size, group = shape->heads / shape->kv_heads;
    float *keys = space, *values = keys + (int64_t)padded * size, *queries = values + (int64_t)padded * size;
    vec *weights = (vec *)(queries + (int64_t)padded * size), *tile = weights + padded, *result = tile + size;
    gather(shape, key, start, length, kv_head, shape->kv_heads, 1, keys);
    gather(shape, value, start, length, kv_head, shape->kv_heads, 0, values);
    for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
        gather(shape, query, start, length, head, shape->heads, 1, queries);
        for (int i = 0; i < length; i += LANES) {
            const ints at = lanes_from(i);
            const int first = shape->window && i >= shape->window ? (i - shape->window + 1) / 8 * 8 : 0;
            const int last = i + LANES;
            into_tile(queries + (int64_t)i * size, size, tile);
            dot_products(tile, keys, first, last, size, weights);
            vec top = -INFINITY - (vec){0}, total = {0};
            for (int j = first; j < last; j++) {
                weights[j] *= shape->scaling;
                if (j > i || shape->window)
                    weights[j] = choose(visible(at, j - (ints){0}, shape->window), weights[j], -INFINITY - (vec){0});
                top = larger(weights[j], top);
            }
            for (int j = first; j < last; j++) {
                weights[j] = exponential(weights[j] - top);
                total += weights[j];
            }
            memset(result, 0, sizeof(vec) * size);
            add_weighted(weights, values, first, last, size, result);
            const vec inverse = 1.0f / total;
            for (int d = 0; d < size; d++) result[d] *= inverse;
            out_of_tile(result, size, queries + (int64_t)i * size); /* these queries are no longer needed */
            for (int lane = 0; lane < LANES && i + lane < length; lane++) {
                float *to = statistics + ((start + i + lane) * shape->heads + head) * 2;
                to[0] = top[lane], to[1] = inverse[lane];
            }
        }
        scatter(shape, queries, start, length, head, shape->heads, 0, attended);
    }
}

void attend(const float *query, const float *key, const float *value, const float *cos, const float *sin,
            const int64_t *starts, int rows, int heads, int kv_heads, int size, float scaling, int window, int threads,
            float *attended, float *statistics) {
    const Shape shape = {starts, rows, heads, kv_heads, size, window, scaling, cos, sin};
    const int padded = longest(&shape);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *space = space_for(padded, size, 3);
#pragma omp for schedule(dynamic)
        for (int job = 0; job < rows * kv_heads; job++)
            attend_head(&shape, query, key, value, job / kv_heads, job % kv_heads, space, attended, statistics);
        free(space);
    }
}

/* The inputs and results of the gradient for one row and one key head, each contiguous. */
typedef struct {
    float *keys, *values, *for_keys, *for_values, *queries, *outward, *inward, *tops, *inverses, *deltas;
} Row;

/* Gradient of the queries: for_queries[i] = sum over j of ds_ij k_j, a tile of queries at a time. */
static void back_to_queries(const Shape *shape, const Row *row, int length, vec *weights, vec *inward, vec *tile) {
    const int size = shape->size;
    vec *outward = tile + size, *result = outward + size;
    for (int i = 0; i < length; i += LANES) {
        const ints at = lanes_from(i);
        const int first = shape->window && i >= shape->window ? (i - shape->window + 1) / 8 * 8 : 0;
        const int last = i + LANES;
        const vec top = load(row->tops + i), inverse = load(row->inverses + i), delta = load(row->deltas + i);
        into_tile(row->queries + (int64_t)i * size, size, tile);
        into_tile(row->outward + (int64_t)i * size, size, outward);
        dot_products(tile, row->keys, first, last, size, weights);
        dot_products(outward, row->values, first, last, size, inward);
        for (int j = first; j < last; j++) {
            vec p = exponential(weights[j] * shape->scaling - top) * inverse;
            if (j > i || shape->window) p = choose(visible(at, j - (ints){0}, shape->window), p, (vec){0});
            inward[j] = p * (inward[j] - delta) * shape->scaling;
        }
        memset(result, 0, sizeof(vec) * size);
        add_weighted(inward, row->keys, first, last, size, result);
        out_of_tile(result, size, row->inward + (int64_t)i * size);
    }
}

/* Gradients of keys and values: for_keys[j] += sum over i of ds_ij q_i, for_values[j] += sum over i of p_ij o_i. */
static void back_to_keys(const Shape *shape, const Row *row, int length, vec *weights, vec *inward, vec *tile) {
    const int size = shape->size, padded = rounded_up(length, LANES);
    vec *values = tile + size, *result = values + size;
    for (int j = 0; j < length; j += LANES) {
        const ints at = lanes_from(j);
        const int end = shape->window ? rounded_up(j + LANES + shape->window, 8) : padded;
        const int last = end < padded ? end : padded;
        into_tile(row->keys + (int64_t)j * size, size, tile);
        into_tile(row->values + (int64_t)j * size, size, values);
        dot_products(tile, row->queries, j, last, size, weights);
        dot_products(values, row->outward, j, last, size, inward);
        for (int i = j; i < last; i++) {
            vec p = exponential(weights[i] * shape->scaling - row->tops[i]) * row->inverses[i];
            if (i < j + LANES || shape->window) p = choose(visible(i - (ints){0}, at, shape->window), p, (vec){0});
            weights[i] = p;
            inward[i] = p * (inward[i] - row->deltas[i]) * shape->scaling;
        }
        into_tile(row->for_keys + (int64_t)j * size, size, result);
        add_weighted(inward, row->queries, j, last, size, result);
        out_of_tile(result, size, row->for_keys + (int64_t)j * size);
        into_tile(row->for_values + (int64_t)j * size, size, result);
        add_weighted(weights, row->outward, j, last, size, result);
        out_of_tile(result, size, row->for_values + (int64_t)j * size);
    }
}

static void attend_head_back(const Shape *shape, const float *query, const float *key, const float *value,
                             const float *attended, const float *statistics, const float *gradient, int row_index,
                             int kv_head, float *space, float *for_query, float *for_key, float *for_value) {
    const int64_t start = shape->starts[row_index];
    const int length = (int)(shape->starts[row_index + 1] - start), padded = rounded_up(length, LANES);
    const int size = shape->size, group = shape->heads / shape->kv_heads;
    const int64_t block = (int64_t)padded * size;
    Row row = {.keys = space, .values = space + block, .for_keys = space + 2 * block, .for_values = space + 3 * block,
               .queries = space + 4 * block, .outward = space + 5 * block, .inward = space + 6 * block,
               .tops = space + 7 * block};
    row.inverses = row.tops + padded, row.deltas = row.inverses + padded;
    vec *weights = (vec *)(space + 8 * block), *inward = weights + padded, *tile = inward + padded;
    gather(shape, key, start, length, kv_head, shape->kv_heads, 1, row.keys);
    gather(shape, value, start, length, kv_head, shape->kv_heads, 0, row.values);
    memset(row.for_keys, 0, sizeof(float) * 2 * block);
    for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
        gather(shape, query, start, length, head, shape->heads, 1, row.queries);
        gather(shape, gradient, start, length, head, shape->heads, 0, row.outward);
        memset(row.tops, 0, sizeof(float) * 3 * padded);
        for (int i = 0; i < length; i++) {
            const int64_t at = (start + i) * shape->heads + head;
            row.tops[i] = statistics[2 * at], row.inverses[i] = statistics[2 * at + 1];
            for (int d = 0; d < size; d++) row.deltas[i] += gradient[at * size + d] * attended[at * size + d];
        }
        back_to_queries(shape, &row, length, weights, inward, tile);
        back_to_keys(shape, &row, length, weights, inward, tile);
        scatter(shape, row.inward, start, length, head, shape->heads, 1, for_query);
    }
    scatter(shape, row.for_keys, start, length, kv_head, shape->kv_heads, 1, for_key);
    scatter(shape, row.for_values, start, length, kv_head, shape->kv_heads, 0, for_value);
}

void attend_back(const float *query, const float *key, const float *value, const float *cos, const float *sin,
                 const float *attended, const float *statistics, const float *gradient, const int64_t *starts, int rows,
                 int heads, int kv_heads, int size, float scaling, int window, int threads, float *for_query,
                 float *for_key, float *for_value) {
    const Shape shape = {starts, rows, heads, kv_heads, size, window, scaling, cos, sin};
    const int padded = longest(&shape);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *space = space_for(padded, size, 8);
#pragma omp for schedule(dynamic)
        for (int job = 0; job < rows * kv_heads; job++)
            attend_head_back(&shape, query, key, value, attended, statistics, gradient, job / kv_heads, job % kv_heads,
                             space, for_query, for_key, for_value);
        free(space);
    }
}
