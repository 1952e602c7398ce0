/* The step of a matching pursuit: which rows may be of the largest correlation with what is left of a target.
 *
 * A row's correlation over its length is start - sum of weights[i] · products[i], known to within `slack`.
 */

#include "native.h"

#define PANEL 1024 /* columns that are worked on at once: they stay in the core's nearest cache */

/* What a correlation is at most, and the largest of what any is at least and at most; no number is never the largest. */
INLINE void bound(float sum, float slack, float length, float *most, float *low, float *high) {
    const float cosine = sum < 0 ? -sum : sum;
    const float at_least = (cosine - slack) * length, at_most = (cosine + slack) * length;
    *most = at_most;
    *low = at_least > *low ? at_least : *low;
    *high = at_most > *high ? at_most : *high;
}

/* What the correlations of a panel are at most; and the largest of what they are at least, and at most. */
WIDTHS static void correlate(const float *start, const int16_t *products, int64_t size, const float *weights,
                             int64_t terms, const float *lengths, float slack, int64_t count, float *most, float *low,
                             float *high) {
    float sums[PANEL], lows[TILE], highs[TILE];
    memcpy(sums, start, (size_t)count * sizeof(float));
    int64_t i = 0;
    for (; i + 4 <= terms; i += 4) {
        const int16_t *a = products + i * size, *b = a + size, *c = b + size, *d = c + size;
        const float by[4] = {weights[i], weights[i + 1], weights[i + 2], weights[i + 3]};
        for (int64_t j = 0; j < count; j++)
            sums[j] -= (by[0] * (float)a[j] + by[1] * (float)b[j]) + (by[2] * (float)c[j] + by[3] * (float)d[j]);
    }
    for (; i < terms; i++) {
        const int16_t *a = products + i * size;
        for (int64_t j = 0; j < count; j++) sums[j] -= weights[i] * (float)a[j];
    }
    for (int64_t lane = 0; lane < TILE; lane++) lows[lane] = highs[lane] = -1;
    int64_t j = 0;
    for (; j + TILE <= count; j += TILE)
        for (int64_t lane = 0; lane < TILE; lane++)
            bound(sums[j + lane], slack, lengths[j + lane], most + j + lane, lows + lane, highs + lane);
    for (; j < count; j++) bound(sums[j], slack, lengths[j], most + j, lows, highs);
    for (int64_t lane = 1; lane < TILE; lane++) {
        lows[0] = lows[lane] > lows[0] ? lows[lane] : lows[0];
        highs[0] = highs[lane] > highs[0] ? highs[lane] : highs[0];
    }
    *low = lows[0], *high = highs[0];
}

/* Those of the rows found that may still be the largest come first; returns how many they are. */
static int64_t forget_smaller(float best, int64_t *found, float *bounds, int64_t count) {
    int64_t kept = 0;
    for (int64_t i = 0; i < count; i++)
        if (bounds[i] >= best) found[kept] = found[i], bounds[kept++] = bounds[i];
    return kept;
}

/* The numbers of the rows that may be it, ascending, into `found`, and what their correlations are at most into `bounds`;
 * returns how many, or -1 where there are more than `most`. products: `terms` rows of `size`. */
int64_t mergemill_find_largest(const float *start, const int16_t *products, int64_t size, const float *weights,
                               int64_t terms, const float *lengths, float slack, int64_t most, int64_t *found,
                               float *bounds) {
    float best = 0, panel[PANEL];
    int64_t count = 0;
    for (int64_t from = 0; from < size; from += PANEL) {
        const int64_t here = least(PANEL, size - from);
        float low, high;
        correlate(start + from, products + from, size, weights, terms, lengths + from, slack, here, panel, &low, &high);
        best = low > best ? low : best;
        for (int64_t j = 0; high >= best && j < here; j++) {
            if (!(panel[j] >= best)) continue;
            if (count == most && (count = forget_smaller(best, found, bounds, count)) == most) return -1;
            found[count] = from + j, bounds[count++] = panel[j];
        }
    }
    return forget_smaller(best, found, bounds, count);
}
