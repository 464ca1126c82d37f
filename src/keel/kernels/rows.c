/* Operations on each token separately: RMS norm, the gated unit, log-probabilities, and their gradients. */
#include "kernels.h"

#define PARALLEL _Pragma("omp parallel for num_threads(threads) if (threads > 1)")

static inline vec sigmoid(vec x) { return 1.0f / (1.0f + exponential(-x)); }

#define NAMED(name) name
#define NUMBER float
#define READ load_part
#define WRITE store_part
#include "rows_typed.h"

#define NAMED(name) name##_bfloat16
#define NUMBER bfloat16
#define READ load_part_bfloat16
#define WRITE store_part_bfloat16
#include "rows_typed.h"

/* Number of words whose exponentials are summed in float. Sums of blocks are added in double: long sums in float are
   biased. */
#define BLOCK (32 * LANES)

/* The largest logit of a row and, with x = (logit - largest) / temperature, the sums of exp(x) and of exp(x) x. */
static void summarise(const float *logits, int words, float temperature, float *top, double *total, double *weighted) {
    vec tops = -INFINITY - (vec){0};
    for (int word = 0; word < words; word += LANES) {
        const int part = words - word < LANES ? words - word : LANES;
        tops = larger(load_part(logits + word, part, -INFINITY), tops);
    }
    *top = largest(tops), *total = 0, *weighted = 0;
    for (int first = 0; first < words; first += BLOCK) {
        const int last = words - first < BLOCK ? words : first + BLOCK;
        vec totals = {0}, weights = {0};
        for (int word = first; word < last; word += LANES) {
            const int part = last - word < LANES ? last - word : LANES;
            const vec x = tempered(load_part(logits + word, part, -INFINITY) - *top, temperature), e = exponential(x);
            totals += e;
            weights += choose(e != 0.0f, e * x, (vec){0}); /* a logit of -inf has weight 0 */
        }
        *total += sum(totals), *weighted += sum(weights);
    }
}

/* Limit a rounded entropy to between 0 and log(words). NaN stays NaN. */
static float bounded(double entropy, int words) {
    float most = (float)log(words);
    if (most > log(words)) most = nextafterf(most, 0);
    return entropy < 0 ? 0 : entropy > most ? most : (float)entropy;
}

/* log p(token) and the entropy of each row of logits [count, words] at a temperature. The statistics [count, 3] for the
   gradient are the largest logit, the sum of exp((logit - largest) / temperature), and the entropy. */
void logprobs(const float *logits, const int64_t *tokens, int64_t count, int words, double temperature, int threads,
              float *results, float *entropies, float *statistics) {
    PARALLEL
    for (int64_t row = 0; row < count; row++) {
        float top;
        double total, weighted;
        summarise(logits + row * words, words, (float)temperature, &top, &total, &weighted);
        results[row] = (float)(((double)logits[row * words + tokens[row]] - top) / temperature - log(total));
        entropies[row] = bounded(log(total) - weighted / total, words);
        statistics[3 * row] = top, statistics[3 * row + 1] = (float)total, statistics[3 * row + 2] = entropies[row];
    }
}

/* (gradient (onehot(token) - p) - for_entropy p (log p + entropy)) / temperature. for_entropy may be NULL, for zeros. */
void logprobs_back(const float *logits, const int64_t *tokens, const float *statistics, const float *gradient,
                   const float *for_entropy, int64_t count, int words, float temperature, int threads,
                   float *for_logits) {
    PARALLEL
    for (int64_t row = 0; row < count; row++) {
        const float *from = logits + row * words, outward = gradient[row] / temperature;
        const float top = statistics[3 * row], inverse = 1 / statistics[3 * row + 1];
        const float slope = for_entropy ? for_entropy[row] / temperature : 0;
        const float level = outward + slope * (logf(inverse) + statistics[3 * row + 2]);
        float *to = for_logits + row * words;
        for (int word = 0; word < words; word += LANES) {
            const int part = words - word < LANES ? words - word : LANES;
            const vec x = tempered(load_part(from + word, part, 0) - top, temperature), p = exponential(x) * inverse;
            vec result = p * -level;
            if (slope != 0) result = choose(p != 0.0f, p * -(level + slope * x), (vec){0});
            store_part(to + word, result, part);
        }
        to[tokens[row]] += outward;
    }
}
