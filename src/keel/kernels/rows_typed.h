/* RMS norm and the gated unit, included once for each type of what linear maps read and return. Sums are float.
   NUMBER        that type
   NAMED(name)   names of the functions
   READ(from, part, rest), WRITE(to, x, part)   `load_part` and `store_part` of it */

/* y = weight x / sqrt(mean(x^2) + eps), the mean over `size` numbers (Zhang and Sennrich 2019). scales [count] */
void NAMED(norm)(const float *x, const float *weight, int64_t count, int size, float eps, int threads, NUMBER *y,
                 float *scales) {
    PARALLEL
    for (int64_t row = 0; row < count; row++) {
        const float *from = x + row * size;
        vec squares = {0};
        EACH_PART(d, size) {
            const vec numbers = load_part(from + d, part, 0);
            squares += numbers * numbers;
        }
        const float scale = 1 / sqrtf(sum(squares) / size + eps);
        EACH_PART(d, size)
        WRITE(y + row * size + d, load_part(from + d, part, 0) * scale * load_part(weight + d, part, 0), part);
        scales[row] = scale;
    }
}

/* for_weight [ceil(count / block), size] has a sum per block of tokens, so that the number of threads does not change
   the order of any sum. */
void NAMED(norm_back)(const float *x, const float *weight, const float *scales, const NUMBER *gradient, int64_t count,
                      int size, int block, int threads, float *for_x, float *for_weight) {
    PARALLEL
    for (int64_t first = 0; first < count; first += block) {
        float *weights = for_weight + first / block * size;
        const int64_t last = first + block < count ? first + block : count;
        memset(weights, 0, sizeof(float) * size);
        for (int64_t row = first; row < last; row++) {
            const float *from = x + row * size, scale = scales[row];
            const NUMBER *outward = gradient + row * size;
            vec products = {0};
            EACH_PART(d, size)
            products += READ(outward + d, part, 0) * load_part(weight + d, part, 0) * load_part(from + d, part, 0);
            const float along = sum(products) * scale * scale / size;
            EACH_PART(d, size) {
                const vec slope = READ(outward + d, part, 0), numbers = load_part(from + d, part, 0);
                const vec result = (slope * load_part(weight + d, part, 0) - numbers * along) * scale;
                store_part(for_x + row * size + d, result, part);
                store_part(weights + d, load_part(weights + d, part, 0) + slope * numbers * scale, part);
            }
        }
    }
}

/* y = gate sigmoid(gate) up for each number (Shazeer 2020). */
void NAMED(gated)(const NUMBER *gate, const NUMBER *up, int64_t count, int threads, NUMBER *y) {
    PARALLEL
    for (int64_t at = 0; at < count; at += LANES) {
        const int part = count - at < LANES ? (int)(count - at) : LANES;
        const vec g = READ(gate + at, part, 0);
        WRITE(y + at, g * sigmoid(g) * READ(up + at, part, 0), part);
    }
}

void NAMED(gated_back)(const NUMBER *gate, const NUMBER *up, const NUMBER *gradient, int64_t count, int threads,
                       NUMBER *for_gate, NUMBER *for_up) {
    PARALLEL
    for (int64_t at = 0; at < count; at += LANES) {
        const int part = count - at < LANES ? (int)(count - at) : LANES;
        const vec g = READ(gate + at, part, 0), u = READ(up + at, part, 0), s = sigmoid(g);
        const vec outward = READ(gradient + at, part, 0);
        WRITE(for_gate + at, outward * u * s * (1.0f + g * (1.0f - s)), part);
        WRITE(for_up + at, outward * g * s, part);
    }
}

#undef NUMBER
#undef NAMED
#undef READ
#undef WRITE
