/* The loops that torch has no single operation for, over flat float32 slabs.
 *
 * Every loop gives the same bits as the torch operations that it stands for (native.py says which): the same
 * operations in the same order, none of them contracted into a fused one (-ffp-contract=off), so that a machine
 * without this library writes the same bytes. The compiler makes a version for each width of vector registers.
 */

#include "native.h"

WIDTHS void sum_weighted(float *restrict out, const float *const *x, const float *weight, int64_t count, int64_t start,
                         int64_t size, float divisor) {
    int64_t i = 0;
    while (i < count && weight[i] == 0) i++; /* what has no weight has no part, see methods/sums.py */
    if (i == count) {
        memset(out, 0, (size_t)size * sizeof(float));
    } else {
        const float *first = x[i] + start;
        for (int64_t j = 0; j < size; j++) out[j] = first[j] * weight[i];
    }
    for (i++; i < count; i++) {
        const float *next = x[i] + start;
        const float w = weight[i];
        if (w == 0) continue;
        for (int64_t j = 0; j < size; j++) out[j] += next[j] * w;
    }
    if (divisor != 0 && divisor != 1)
        for (int64_t j = 0; j < size; j++) out[j] /= divisor;
}

/* x[0] = sum(weight[i] * x[i]), over `divisor` where that is not 0. */
void mergemill_combine(float *const *x, const float *weight, int64_t count, int64_t size, float divisor) {
    float total[CHUNK];
    for (int64_t start = 0; start < size; start += CHUNK) {
        const int64_t here = least(CHUNK, size - start);
        sum_weighted(total, (const float *const *)x, weight, count, start, here, divisor);
        memcpy(x[0] + start, total, (size_t)here * sizeof(float));
    }
}

WIDTHS void add_scaled(float *restrict base, const float *restrict total, int64_t size, float lambda) {
    for (int64_t j = 0; j < size; j++) base[j] += total[j] * lambda;
}

/* base += lambda * sum(weight[i] * x[i]) / divisor. */
void mergemill_add_deltas(float *base, float *const *x, const float *weight, int64_t count, int64_t size,
                          float divisor, float lambda) {
    float total[CHUNK];
    for (int64_t start = 0; start < size; start += CHUNK) {
        const int64_t here = least(CHUNK, size - start);
        sum_weighted(total, (const float *const *)x, weight, count, start, here, divisor);
        add_scaled(base + start, total, here, lambda);
    }
}

WIDTHS void sum_agreeing(float *restrict total, const float *const *x, const float *weight, int64_t count, int64_t start,
                         int64_t size, int normalize) {
    float sign[CHUNK], divisor[CHUNK];
    for (int64_t i = 0; i < count; i++) {
        const float *restrict own = x[i] + start;
        const float factor = weight[i];
        for (int64_t j = 0; j < size; j++) sign[j] = i ? sign[j] + own[j] * factor : own[j] * factor;
    }
    elect(sign, size);
    memset(total, 0, (size_t)size * sizeof(float));
    memset(divisor, 0, sizeof divisor);
    for (int64_t i = 0; i < count; i++) {
        const float *restrict own = x[i] + start;
        const float factor = weight[i];
        for (int64_t j = 0; j < size; j++) {
            const float weighted = own[j] * factor, agrees = weighted * sign[j] > 0 ? 1.0f : 0.0f;
            total[j] += weighted * agrees;
            divisor[j] += agrees * factor;
        }
    }
    for (int64_t j = 0; normalize && j < size; j++) total[j] /= divisor[j] + (fabsf(divisor[j]) < 1e-8f ? 1.0f : 0.0f);
}

/* base += lambda * (that sum), each element over the weights that went into it with `normalize`. */
void mergemill_add_agreeing(float *base, float *const *x, const float *weight, int64_t count, int64_t size,
                            int32_t normalize, float lambda) {
    float total[CHUNK];
    for (int64_t start = 0; start < size; start += CHUNK) {
        const int64_t here = least(CHUNK, size - start);
        sum_agreeing(total, (const float *const *)x, weight, count, start, here, normalize);
        add_scaled(base + start, total, here, lambda);
    }
}

WIDTHS void mergemill_keep_large(float *x, int64_t size, float threshold, int32_t inclusive) {
    if (inclusive)
        for (int64_t j = 0; j < size; j++) x[j] *= fabsf(x[j]) >= threshold ? 1.0f : 0.0f;
    else
        for (int64_t j = 0; j < size; j++) x[j] *= fabsf(x[j]) > threshold ? 1.0f : 0.0f;
}

WIDTHS void keep_random(float *restrict x, const uint32_t *restrict counters, int64_t size, uint32_t first,
                        uint32_t second, int32_t limit) {
    for (int64_t j = 0; j < size; j++) {
        x[j] *= (int32_t)hash_counter(counters[j], first, second) < limit ? 1.0f : 0.0f;
    }
}

void mergemill_keep_random(float *x, const uint32_t *counters, int64_t size, uint32_t first, uint32_t second,
                           int32_t limit) {
    keep_random(x, counters, size, first, second, limit);
}

/* Count the bits from `shift` on of ordered integers, made unsigned by adding `bias`; the last bin has what is beyond it. */
void mergemill_count_first(const uint32_t *ordered, int64_t size, uint32_t bias, int32_t shift, int64_t *counts,
                           uint32_t bins) {
    const uint32_t last = bins - 1;
    for (int64_t j = 0; j < size; j++) {
        const uint32_t bin = (ordered[j] + bias) >> shift;
        counts[bin < last ? bin : last]++;
    }
}

/* Count the next digit of the integers that lie in [low, low + (bins << shift)). */
void mergemill_count_within(const uint32_t *ordered, int64_t size, uint32_t low, int32_t shift, int64_t *counts,
                            uint32_t bins) {
    for (int64_t j = 0; j < size; j++) {
        const uint32_t bin = (ordered[j] - low) >> shift;
        if (bin < bins) counts[bin]++;
    }
}

/* How many of a slab's elements equal the threshold. */
WIDTHS int64_t mergemill_count_equal(const float *x, int64_t size, float threshold) {
    int64_t total = 0;
    for (int64_t start = 0; start < size; start += BLOCK) {
        const int64_t stop = least(start + BLOCK, size);
        int32_t count = 0;
        for (int64_t j = start; j < stop; j++) count += x[j] == threshold;
        total += count;
    }
    return total;
}

void fold_lanes(const double *restrict lanes, double *restrict last) {
    memcpy(last, lanes, LAST * sizeof(double));
    for (int64_t i = 1; i < LANES / LAST; i++)
        for (int64_t j = 0; j < LAST; j++) last[j] += lanes[i * LAST + j];
}

/* Sums of |x| over at most BLOCK elements: rows of 1,024 lanes one after the other, then 32 rows of 32. */
WIDTHS static void sum_absolute(const float *restrict x, int64_t size, double *restrict last) {
    double lanes[LANES];
    memset(lanes, 0, sizeof lanes);
    for (int64_t start = 0; start < size; start += LANES) {
        const int64_t here = least(LANES, size - start);
        for (int64_t j = 0; j < here; j++) lanes[j] += (double)fabsf(x[start + j]);
    }
    fold_lanes(lanes, last);
}

WIDTHS static void sum_products(const float *restrict x, const float *restrict y, int64_t size, double *restrict last) {
    double lanes[LANES];
    memset(lanes, 0, sizeof lanes);
    for (int64_t start = 0; start < size; start += LANES) {
        const int64_t here = least(LANES, size - start);
        for (int64_t j = 0; j < here; j++) lanes[j] += (double)x[start + j] * (double)y[start + j];
    }
    fold_lanes(lanes, last);
}

/* Cut a slab at multiples of `block`, each of these at multiples of BLOCK, and write 32 sums for each cut. */
void mergemill_sum_absolute(const float *x, int64_t size, int64_t block, double *sums) {
    for (int64_t first = 0; first < size; first += block)
        for (int64_t start = first; start < least(first + block, size); start += BLOCK, sums += LAST)
            sum_absolute(x + start, least(BLOCK, least(first + block, size) - start), sums);
}

void mergemill_sum_products(const float *x, const float *y, int64_t size, int64_t block, double *sums) {
    for (int64_t first = 0; first < size; first += block)
        for (int64_t start = first; start < least(first + block, size); start += BLOCK, sums += LAST)
            sum_products(x + start, y + start, least(BLOCK, least(first + block, size) - start), sums);
}

/* How many of 16-bit floats have all bits of `mask`, their exponent's: infinities and NaN. */
WIDTHS int64_t mergemill_count_broken(const uint16_t *bits, int64_t size, uint16_t mask) {
    int64_t total = 0;
    for (int64_t start = 0; start < size; start += CHUNK) {
        const int64_t stop = least(start + CHUNK, size);
        uint16_t count = 0;
        for (int64_t j = start; j < stop; j++) count += (bits[j] & mask) == mask;
        total += count;
    }
    return total;
}

WIDTHS double sum_squares(const float *restrict x, const float *restrict less, int64_t size) {
    double lanes[LAST];
    memset(lanes, 0, sizeof lanes);
    for (int64_t start = 0; start < size; start += LAST) {
        const int64_t here = least(LAST, size - start);
        for (int64_t j = 0; j < here; j++) {
            const double value = less ? (double)x[start + j] - (double)less[start + j] : (double)x[start + j];
            lanes[j] += value * value;
        }
    }
    double total = lanes[0];
    for (int64_t j = 1; j < LAST; j++) total += lanes[j];
    return total;
}

/* Of each chunk (the first SAMPLE elements of each BLOCK of each block) keep the sample of x[0], and sum its squares and
 * those of the other slabs, or with `subtract` of their differences to x[0]; sums are a row for each slab. */
void mergemill_look(const float *const *x, int64_t count, int64_t size, int64_t block, int32_t subtract, int64_t chunks,
                    float *samples, double *sums) {
    int64_t chunk = 0;
    for (int64_t first = 0; first < size; first += block) {
        const int64_t end = least(first + block, size);
        for (int64_t start = first; start < end; start += BLOCK, chunk++) {
            const int64_t here = least(SAMPLE, least(start + BLOCK, end) - start);
            memcpy(samples + chunk * SAMPLE, x[0] + start, (size_t)here * sizeof(float));
            for (int64_t i = 0; i < count; i++)
                sums[i * chunks + chunk] = sum_squares(x[i] + start, i && subtract ? x[0] + start : 0, here);
        }
    }
}

/* Sum the squares of the differences of a slab to the samples that were kept, chunk by chunk. */
void mergemill_compare(const float *x, int64_t size, int64_t block, const float *samples, double *sums) {
    for (int64_t first = 0; first < size; first += block) {
        const int64_t end = least(first + block, size);
        for (int64_t start = first; start < end; start += BLOCK, samples += SAMPLE) {
            const int64_t here = least(SAMPLE, least(start + BLOCK, end) - start);
            *sums++ = sum_squares(x + start, samples, here);
        }
    }
}
