/* What is done to each token by itself: RMS norm, the gated unit, log-probabilities; and their gradients. */
#include "vectors.h"

#define PARALLEL _Pragma("omp parallel for num_threads(threads) if (threads > 1)")

/* y = weight x / sqrt(mean(x^2) + eps), the mean over `size` numbers (Zhang and Sennrich 2019). scales [count] */
void norm(const float *x, const float *weight, int64_t count, int size, float eps, int threads, float *y,
          float *scales) {
    PARALLEL
    for (int64_t at = 0; at < count; at++) {
        const float *from = x + at * size;
        float *to = y + at * size, squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int d = 0; d < size; d++) squares += from[d] * from[d];
        const float scale = 1 / sqrtf(squares / size + eps);
        for (int d = 0; d < size; d++) to[d] = from[d] * scale * weight[d];
        scales[at] = scale;
    }
}

/* for_weight [ceil(count / block), size] is summed over blocks of tokens, so threads do not change its sums. */
void norm_back(const float *x, const float *weight, const float *scales, const float *gradient, int64_t count, int size,
               int block, int threads, float *for_x, float *for_weight) {
    PARALLEL
    for (int64_t first = 0; first < count; first += block) {
        float *weights = for_weight + first / block * size;
        const int64_t last = first + block < count ? first + block : count;
        memset(weights, 0, sizeof(float) * size);
        for (int64_t at = first; at < last; at++) {
            const float *from = x + at * size, *outward = gradient + at * size, scale = scales[at];
            float *to = for_x + at * size, along = 0;
#pragma omp simd reduction(+ : along)
            for (int d = 0; d < size; d++) along += outward[d] * weight[d] * from[d];
            const float part = along * scale * scale / size;
#pragma omp simd
            for (int d = 0; d < size; d++) {
                to[d] = (outward[d] * weight[d] - from[d] * part) * scale;
                weights[d] += outward[d] * from[d] * scale;
            }
        }
    }
}

static inline vec sigmoid(vec x) { return 1.0f / (1.0f + exponential(-x)); }

/* y = gate sigmoid(gate) up (Shazeer 2020), over all numbers alike. */
void gated(const float *gate, const float *up, int64_t count, int threads, float *y) {
    PARALLEL
    for (int64_t at = 0; at < count; at += LANES) {
        const int part = count - at < LANES ? (int)(count - at) : LANES;
        const vec g = load_part(gate + at, part, 0), u = load_part(up + at, part, 0);
        store_part(y + at, g * sigmoid(g) * u, part);
    }
}

void gated_back(const float *gate, const float *up, const float *gradient, int64_t count, int threads, float *for_gate,
                float *for_up) {
    PARALLEL
    for (int64_t at = 0; at < count; at += LANES) {
        const int part = count - at < LANES ? (int)(count - at) : LANES;
        const vec g = load_part(gate + at, part, 0), u = load_part(up + at, part, 0);
        const vec outward = load_part(gradient + at, part, 0), s = sigmoid(g);
        store_part(for_gate + at, outward * u * s * (1.0f + g * (1.0f - s)), part);
        store_part(for_up + at, outward * g * s, part);
    }
}

/* Largest logit of a row and the sum of exp(logit - it), and of that times (logit - it). */
static void summarise(const float *logits, int words, float *top, float *total, float *weighted) {
    vec tops = -INFINITY - (vec){0}, totals = {0}, weights = {0};
    for (int word = 0; word < words; word += LANES) {
        const int part = words - word < LANES ? words - word : LANES;
        tops = larger(load_part(logits + word, part, -INFINITY), tops);
    }
    *top = largest(tops);
    for (int word = 0; word < words; word += LANES) {
        const int part = words - word < LANES ? words - word : LANES;
        const vec z = load_part(logits + word, part, -INFINITY) - *top, e = exponential(z);
        totals += e;
        weights += choose(e != 0.0f, e * z, (vec){0}); /* a logit of -inf weighs nothing */
    }
    *total = sum(totals), *weighted = sum(weights);
}

/* log p(token) and the entropy of each row of logits [count, words]; for the gradient, statistics [count, 2]: the
   largest logit, and the log of the sum of exp(logit - it). */
void logprobs(const float *logits, const int64_t *tokens, int64_t count, int words, int threads, float *found,
              float *entropies, float *statistics) {
    PARALLEL
    for (int64_t row = 0; row < count; row++) {
        float top, total, weighted;
        summarise(logits + row * words, words, &top, &total, &weighted);
        const float log_total = logf(total);
        found[row] = logits[row * words + tokens[row]] - top - log_total;
        entropies[row] = log_total - weighted / total;
        statistics[2 * row] = top, statistics[2 * row + 1] = log_total;
    }
}

/* gradient (onehot(token) - p) */
void logprobs_back(const float *logits, const int64_t *tokens, const float *statistics, const float *gradient,
                   int64_t count, int words, int threads, float *for_logits) {
    PARALLEL
    for (int64_t row = 0; row < count; row++) {
        const float *from = logits + row * words, factor = -gradient[row];
        const float top = statistics[2 * row], log_total = statistics[2 * row + 1];
        float *to = for_logits + row * words;
        for (int word = 0; word < words; word += LANES) {
            const int part = words - word < LANES ? words - word : LANES;
            store_part(to + word, exponential(load_part(from + word, part, 0) - top - log_total) * factor, part);
        }
        to[tokens[row]] += gradient[row];
    }
}
