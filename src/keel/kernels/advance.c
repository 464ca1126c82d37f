/* The layers of a Llama-like model for the newest token of each row, in one call: RMS norm, rotary attention over the
   cache, RMS norm and the gated unit. Calls between Python and small operations would take as long as the operations. */
#include "kernels.h"

#define LEAST_PRODUCT (1 << 18) /* numbers of rows times weights, and of other operations, that are worth two threads */
#define LEAST_NUMBERS (1 << 14)

typedef struct {
    const void *weight; /* [outputs, inputs] */
    const float *bias;  /* [outputs] or NULL */
    int64_t outputs, inputs;
} map;

typedef struct {
    const float *attention_norm, *unit_norm;
    const float *query_norm, *key_norm; /* [size] or NULL */
    map query, key, value, output, gate, up, down;
} layer;

typedef struct {
    int rows, threads, narrow;
    void *narrowed; /* scratch memory for the rows of a map in bfloat16 */
} call;

static int threads_for(const call *c, int64_t numbers) { return numbers >= LEAST_NUMBERS ? c->threads : 1; }

/* Round x [rows, inputs] for the maps that read it. Returns what they read. */
static const void *rounded_for(const call *c, const float *x, int64_t inputs) {
    if (!c->narrow) return x;
    round_rows(x, c->rows * inputs, c->narrowed);
    return c->narrowed;
}

static void apply(const call *c, const map *m, const void *x, float *y) {
    const int threads = c->rows * m->outputs * m->inputs >= LEAST_PRODUCT ? c->threads : 1;
    const int size = (int)m->inputs;
    if (c->narrow)
        linear_bfloat16(x, m->weight, m->bias, c->rows, m->outputs, size, threads, y);
    else
        linear(x, m->weight, m->bias, c->rows, m->outputs, size, threads, y);
}

static void add(float *x, const float *y, int64_t count) {
    for (int64_t i = 0; i < count; i++) x[i] += y[i];
}

/* Run the layers on states [rows, width], in place. `cache` is [layers, 2, capacity, kv_heads, columns / LANES, size,
   LANES]; the others are as in `attend_newest`. `narrow`: all weights of maps are bfloat16, instead of float. */
void advance(const layer *layers, int count, int narrow, float *states, const float *cos, const float *sin,
             const int64_t *first, int rows, int width, int heads, int kv_heads, int size, int columns, int column,
             int capacity, float scaling, float eps, int threads, float *cache) {
    const int64_t inner = layers->gate.outputs, queries = (int64_t)rows * heads * size;
    const int64_t keys = (int64_t)rows * kv_heads * size, all = (int64_t)rows * width, units = rows * inner;
    const int64_t widest = all > units ? (all > queries ? all : queries) : units > queries ? units : queries;
    float *space = scratch(2 * all + 2 * queries + 2 * keys + 3 * units + rows * (heads + 1) + widest);
    float *normed = space, *result = normed + all, *query = result + all, *attended = query + queries;
    float *key = attended + queries, *value = key + keys, *gate = value + keys, *up = gate + units, *unit = up + units;
    float *scales = unit + units;
    const call c = {rows, threads, narrow, scales + rows * (heads + 1)};
    for (const layer *l = layers; l < layers + count; l++) {
        norm(states, l->attention_norm, rows, width, eps, threads_for(&c, all), normed, scales);
        const void *read = rounded_for(&c, normed, width);
        apply(&c, &l->query, read, query);
        apply(&c, &l->key, read, key);
        apply(&c, &l->value, read, value);
        if (l->query_norm) norm(query, l->query_norm, rows * heads, size, eps, 1, query, scales);
        if (l->key_norm) norm(key, l->key_norm, rows * kv_heads, size, eps, 1, key, scales);
        const int64_t part = (int64_t)capacity * kv_heads * columns * size;
        float *layer_keys = cache + (l - layers) * 2 * part;
        attend_newest(query, key, value, cos, sin, first, rows, heads, kv_heads, size, columns, column, scaling,
                      threads_for(&c, queries), layer_keys, layer_keys + part, attended);
        apply(&c, &l->output, rounded_for(&c, attended, (int64_t)heads * size), result);
        add(states, result, all);
        norm(states, l->unit_norm, rows, width, eps, threads_for(&c, all), normed, scales);
        read = rounded_for(&c, normed, width);
        apply(&c, &l->gate, read, gate);
        apply(&c, &l->up, read, up);
        gated(gate, up, units, threads_for(&c, units), unit);
        apply(&c, &l->down, rounded_for(&c, unit, inner), result);
        add(states, result, all);
    }
    free(space);
}
