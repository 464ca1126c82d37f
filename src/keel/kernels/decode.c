/* What one more token for each row takes besides linear maps: attention over a cache, and the draw of the token. */
#include "vectors.h"

int lanes(void) { return LANES; }

/* weights[j] = turned . key j, for blocks of keys [size, LANES]. */
static inline void scores(const float *turned, const float *keys, int first, int last, int size, float *weights) {
    for (int block = first; block < last; block++) {
        const float *from = keys + (int64_t)block * size * LANES;
        vec sums[4] = {{0}, {0}, {0}, {0}}; /* four, so that no product waits for the one before */
        for (int d = 0; d < size; d += 4)
            for (int u = 0; u < 4; u++) sums[u] += load(from + (d + u) * LANES) * turned[d + u];
        store(weights + block * LANES, (sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
}

/* One query over the blocks [first, last) of a cache, of which the columns `from` to `to` count. -> found [size] */
static void attend_one(const float *turned, const float *keys, const float *values, int from, int to, int size,
                       float *weights, vec *sums, float *found) {
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
        const float *own = values + (int64_t)block * size * LANES;
        total += e;
        for (int d = 0; d < size; d++) sums[d] += e * load(own + d * LANES);
    }
    const float inverse = 1 / sum(total);
    for (int d = 0; d < size; d++) found[d] = sum(sums[d]) * inverse;
}

static inline void turn(const float *x, const float *cos, const float *sin, int half, float factor, int step,
                        float *to) {
    for (int d = 0; d < half; d++) {
        to[d * step] = (x[d] * cos[d] - x[half + d] * sin[d]) * factor;
        to[(half + d) * step] = (x[half + d] * cos[d] + x[d] * sin[d]) * factor;
    }
}

/* The newest token of each row looks at its row's cache, to which its own key and value are added at `column`; query
   and key are rotated first. A cache holds blocks of columns, [rows, kv_heads, columns / LANES, size, LANES]; of row r,
   the columns before first[r] are padding. query [rows, heads, size], key and value [rows, kv_heads, size], cos and
   sin [rows, size / 2] */
void attend_newest(const float *query, const float *key, const float *value, const float *cos, const float *sin,
                   const int64_t *first, int rows, int heads, int kv_heads, int size, int columns, int column,
                   float scaling, int threads, float *keys, float *values, float *found) {
    const int group = heads / kv_heads, half = size / 2, wide = rounded_up(column + 1, LANES);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *space = scratch((size_t)size * LANES + wide + size);
        float *weights = space + (size_t)size * LANES, *turned = weights + wide;
#pragma omp for
        for (int job = 0; job < rows * kv_heads; job++) {
            const int row = job / kv_heads;
            const float *c = cos + (int64_t)row * half, *s = sin + (int64_t)row * half;
            const int64_t whole = (int64_t)size * columns;
            const int64_t here = (int64_t)(column / LANES) * size * LANES + column % LANES;
            float *own_keys = keys + job * whole, *own_values = values + job * whole;
            for (int64_t next = whole; next <= whole + here; next += LANES) { /* what the next job reads */
                __builtin_prefetch(own_keys + next);
                __builtin_prefetch(own_values + next);
            }
            turn(key + (int64_t)job * size, c, s, half, 1, LANES, own_keys + here);
            for (int d = 0; d < size; d++) own_values[here + d * LANES] = value[(int64_t)job * size + d];
            for (int member = 0; member < group; member++) {
                const int64_t at = ((int64_t)job * group + member) * size;
                turn(query + at, c, s, half, scaling, 1, turned);
                attend_one(turned, own_keys, own_values, (int)first[row], column, size, weights, (vec *)space,
                           found + at);
            }
        }
        free(space);
    }
}

/* The token at which the cumulative distribution of one row passes `uniform`, and its log-probability. The sums are in
   double precision; weights [words, rounded up] is scratch. */
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
    int possible = 0; /* the last vector of words of which one is possible */
    for (int word = 0; word < words; word += LANES) {
        store(weights + word, exponential(tempered(load(weights + word) - top, (float)temperature)));
        const float more = sum(load(weights + word));
        total += more;
        if (more != 0) possible = word;
    }
    const double point = uniform * total;
    int word = 0, token = 0;
    for (; word < possible; word += LANES) { /* a vector of words at a time, then one by one */
        const double after = passed + sum(load(weights + word));
        if (after > point) break;
        passed = after;
    }
    for (; word < words && passed <= point; word++) {
        if (weights[word] != 0) token = word;
        passed += weights[word];
    }
    *logprob = (float)(((double)logits[token] - top) / temperature - log(total));
    return token;
}

/* logits [count, words], uniforms [count] in [0, 1) */
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
