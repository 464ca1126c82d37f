/* The steps of appending a token to each row besides linear maps: attention over a cache, and sampling the token. */
#include "kernels.h"

int lanes(void) { return LANES; }

/* weights[j] = dot product of `turned` and key j, for blocks of keys [size, LANES]. */
static inline void scores(const float *turned, const float *keys, int first, int last, int size, float *weights) {
    for (int block = first; block < last; block++) {
        const float *from = keys + (int64_t)block * size * LANES;
        vec sums[4] = {{0}, {0}, {0}, {0}}; /* four sums, so that no product waits for the previous one */
        for (int d = 0; d < size; d += 4)
            for (int u = 0; u < 4; u++) sums[u] += load(from + (d + u) * LANES) * turned[d + u];
        store(weights + block * LANES, (sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
}

/* Attention of one query to the columns `from` to `to` of a cache, both included. -> attended [size] */
static void attend_one(const float *turned, const float *keys, const float *values, int from, int to, int size,
                       float *weights, vec *sums, float *attended) {
    const int first = from / LANES, last = to / LANES + 1;
    scores(turned, keys, first, last, size, weights);
    vec top = -INFINITY - (vec){0}, total = {0};
    for (int block = first; block < last; block++) {
        float *here = weights + block * LANES;
        const ints column = lanes_from(block * LANES);
        store(here, choose((column >= from) & (column <= to), load(here), -INFINITY - (vec){0}));
        top = larger(load(here), top);
    }
    const float highest = largest(top);
    memset(sums, 0, sizeof(vec) * size);
    for (int block = first; block < last; block++) {
        const vec e = exponential(load(weights + block * LANES) - highest);
        const float *in_block = values + (int64_t)block * size * LANES;
        total += e;
        for (int d = 0; d < size; d++) sums[d] += e * load(in_block + d * LANES);
    }
    const float inverse = 1 / sum(total);
    for (int d = 0; d < size; d++) attended[d] = sum(sums[d]) * inverse;
}

static inline void turn(const float *x, const float *cos, const float *sin, int half, float factor, int step,
                        float *to) {
    for (int d = 0; d < half; d++) {
        to[d * step] = (x[d] * cos[d] - x[half + d] * sin[d]) * factor;
        to[(half + d) * step] = (x[half + d] * cos[d] + x[d] * sin[d]) * factor;
    }
}

/* Attention of the newest token of each row to the row's cache. Query and key are rotated, then key and value are added
   to the cache at `column`. A cache holds blocks of columns, [rows, kv_heads, columns / LANES, size, LANES]. The
   columns of row r before first[r] are padding. query [rows, heads, size], key and value [rows, kv_heads, size], cos
   and sin [rows, size / 2] */
void attend_newest(const float *query, const float *key, const float *value, const float *cos, const float *sin,
                   const int64_t *first, int rows, int heads, int kv_heads, int size, int columns, int column,
                   float scaling, int threads, float *keys, float *values, float *attended) {
    const int group = heads / kv_heads, half = size / 2, wide = rounded_up(column + 1, LANES);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *space = scratch((size_t)size * LANES + wide + size);
        float *weights = space + (size_t)size * LANES, *turned = weights + wide;
#pragma omp for
        for (int job = 0; job < rows * kv_heads; job++) {
            const int row = job / kv_heads;
            const float *c = cos + (int64_t)row * half, *s = sin + (int64_t)row * half;
            const int64_t head_size = (int64_t)size * columns;
            const int64_t here = (int64_t)(column / LANES) * size * LANES + column % LANES;
            float *head_keys = keys + job * head_size, *head_values = values + job * head_size;
            /* Prefetch what the next job reads. */
            for (int64_t next = head_size; next <= head_size + here; next += LANES) {
                __builtin_prefetch(head_keys + next);
                __builtin_prefetch(head_values + next);
            }
            turn(key + (int64_t)job * size, c, s, half, 1, LANES, head_keys + here);
            for (int d = 0; d < size; d++) head_values[here + d * LANES] = value[(int64_t)job * size + d];
            for (int member = 0; member < group; member++) {
                const int64_t at = ((int64_t)job * group + member) * size;
                turn(query + at, c, s, half, scaling, 1, turned);
                attend_one(turned, head_keys, head_values, (int)first[row], column, size, weights, (vec *)space,
                           attended + at);
            }
        }
        free(space);
    }
}

/* Return the token at which the cumulative distribution of one row passes `uniform`, and its log-probability. Sums are
   in double precision. weights [words, rounded up] is scratch memory. */
static int draw_one(const float *logits, double uniform, int words, double temperature, float *weights,
                    float *logprob) {
    vec tops = -INFINITY - (vec){0};
    for (int word = 0; word < words; word += LANES) {
        const int part = words - word < LANES ? words - word : LANES;
        store(weights + word, load_part(logits + word, part, -INFINITY));
        tops = larger(load(weights + word), tops);
    }
    const float top = largest(tops);
    double total = 0, passed = 0;
    int possible = 0; /* the last vector with a word whose probability is not 0 */
    for (int word = 0; word < words; word += LANES) {
        store(weights + word, exponential(tempered(load(weights + word) - top, (float)temperature)));
        const float more = sum(load(weights + word));
        total += more;
        if (more != 0) possible = word;
    }
    const double point = uniform * total;
    int word = 0, token = 0;
    for (; word < possible; word += LANES) { /* a vector of words at a time, then one by one */
        const double next = passed + sum(load(weights + word));
        if (next > point) break;
        passed = next;
    }
    for (; word < words && passed <= point; word++) {
        if (weights[word] != 0) token = word;
        passed += weights[word];
    }
    *logprob = (float)(((double)logits[token] - top) / temperature - log(total));
    return token;
}

/* Sample a token for each row. logits [count, words], uniforms [count] in [0, 1) */
void draw(const float *logits, const double *uniforms, int64_t count, int words, double temperature, int threads,
          int64_t *tokens, float *logprobs) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *weights = scratch(rounded_up(words, LANES));
#pragma omp for
        for (int64_t row = 0; row < count; row++)
            tokens[row] = draw_one(logits + row * words, uniforms[row], words, temperature, weights, logprobs + row);
        free(weights);
    }
}
