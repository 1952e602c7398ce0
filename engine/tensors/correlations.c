/* Correlations of all rows, and of a few, with what is left of a pursuit's target: which may be the largest.
 *
 * A row's correlation over its length is start - sum of shares[i] · products[i], known to within `slack`.
 */

#include "pursuit.h"

#define PANEL 256 /* rows that are worked on at once: their sums stay in the core's nearest cache */
#define ROWS 8    /* of products that are decoded at once */
_Static_assert(PANEL == NEAR && PANEL % TILE == 0, "near rows are a panel, and a panel is whole tiles");

/* sums -= some rows of products, each times its factor, for each state. */
WIDTHS static void take_products_off(float (*sums)[PANEL], const int16_t *products, int64_t stride, int64_t rows,
                                     const float *factors, int64_t terms, int64_t states, int64_t count) {
    float decoded[ROWS][PANEL];
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < count; j++) decoded[i][j] = products[i * stride + j];
    for (int64_t state = 0; state < states; state++, factors += terms) {
        float *sum = sums[state];
        if (rows < ROWS) {
            for (int64_t i = 0; i < rows; i++)
                for (int64_t j = 0; j < count; j++) sum[j] -= factors[i] * decoded[i][j];
            continue;
        }
        float by[ROWS];
        memcpy(by, factors, sizeof by);
        for (int64_t j = 0; j < count; j++)
            sum[j] -= ((by[0] * decoded[0][j] + by[1] * decoded[1][j]) + (by[2] * decoded[2][j] + by[3] * decoded[3][j])) +
                      ((by[4] * decoded[4][j] + by[5] * decoded[5][j]) + (by[6] * decoded[6][j] + by[7] * decoded[7][j]));
    }
}

/* From correlations over lengths to bounds of correlations; returns the largest of them, which what is no number never
 * is. */
WIDTHS static float bound(const float *restrict sums, const float *restrict lengths, float slack, int64_t count,
                          Bounds *bounds) {
    float lows[TILE], highs[TILE], *restrict most = bounds->most;
    for (int lane = 0; lane < TILE; lane++) lows[lane] = highs[lane] = -1;
    for (int64_t j = 0; j < count; j += TILE) {
        const int64_t here = least(TILE, count - j);
        for (int64_t lane = 0; lane < here; lane++) {
            const float cosine = fabsf(sums[j + lane]), low = (cosine - slack) * lengths[j + lane];
            const float high = (cosine + slack) * lengths[j + lane];
            most[j + lane] = high;
            lows[lane] = low > lows[lane] ? low : lows[lane];
            highs[lane] = high > highs[lane] ? high : highs[lane];
        }
    }
    float high = -1;
    for (int lane = 0; lane < TILE; lane++) {
        bounds->low = lows[lane] > bounds->low ? lows[lane] : bounds->low;
        high = highs[lane] > high ? highs[lane] : high;
    }
    return high;
}

/* The factors of products in the correlations of a state, after so many steps; returns within what these are known. */
static float find_factors(const Pursuit *given, int64_t state, int64_t steps, float *factors) {
    const double *weights = weights_at(given, state);
    double explains = 0;
    for (int64_t i = 0; i < given->terms; i++) {
        const double share = i < steps ? weights[i] * given->sizes[i] : 0;
        explains += fabs(share), factors[i] = (float)(share / ONE);
    }
    return (float)(given->unsure * (given->length + explains) + explains / ONE);
}

/* Whether a row of a panel would have been chosen in a state instead. */
static int is_beaten(const Pursuit *given, const Block *block, int64_t state, const float *most, int64_t panel,
                     int64_t count) {
    const int64_t step = block->first + state;
    const float value = (float)(block->values[state] * ABOUT);
    for (int64_t j = 0; j < count; j++) {
        if (!(most[j] >= value) || is_taken(given, step + 1, panel + j)) continue;
        const double found = measure(given, panel + j, left_at(given, state));
        if (found > block->values[state]) return 1;
        if (found == block->values[state] && panel + j < given->numbers[step]) return 1;
    }
    return 0;
}

int64_t look_at_all(const Pursuit *given, const Block *block, int64_t from, int64_t states, Bounds *bounds) {
    const int64_t count = states - from, steps = block->first + states - 1;
    float slack[AHEAD], sums[AHEAD][PANEL], most[PANEL];
    int64_t right = count;
    if (count < 1) return states;
    for (int64_t i = 0; i < count; i++)
        slack[i] = find_factors(given, from + i, block->first + from + i, given->factors + i * given->terms);
    bounds->low = 0;
    for (int64_t panel = 0; panel < given->count; panel += PANEL) {
        const int64_t here = least(PANEL, given->count - panel);
        for (int64_t i = 0; i < count; i++) memcpy(sums[i], given->start + panel, (size_t)here * sizeof(float));
        for (int64_t row = 0; row < steps; row += ROWS)
            take_products_off(sums, given->products + row * given->count + panel, given->count, least(ROWS, steps - row),
                              given->factors + row, given->terms, count, here);
        for (int64_t i = 0; i < right; i++) {
            const int is_next = from + i >= block->states;
            Bounds found = {is_next ? given->most + panel : most, bounds->low};
            const float high = bound(sums[i], given->lengths + panel, slack[i], here, &found);
            if (is_next)
                bounds->low = found.low;
            else if (high >= (float)(block->values[from + i] * ABOUT) &&
                     is_beaten(given, block, from + i, most, panel, here))
                right = i;
        }
    }
    return from + right;
}

void look_at_near(const Pursuit *given, int64_t state, int64_t steps, int64_t count, Bounds *bounds) {
    float sums[1][PANEL], lengths[PANEL];
    for (int64_t j = 0; j < count; j++)
        sums[0][j] = given->start[given->near[j]], lengths[j] = given->lengths[given->near[j]];
    const float slack = find_factors(given, state, steps, given->factors);
    for (int64_t row = 0; row < steps; row += ROWS)
        take_products_off(sums, given->near_products + row * NEAR, NEAR, least(ROWS, steps - row), given->factors + row,
                          given->terms, 1, count);
    bounds->low = 0;
    bound(sums[0], lengths, slack, count, bounds);
}

WIDTHS static int64_t count_above(const float *x, float least, int64_t size) {
    int32_t count = 0;
    for (int64_t j = 0; j < size; j++) count += x[j] >= least;
    return count;
}

int64_t find_near(const Pursuit *given, const Bounds *bounds, int64_t steps) {
    float share = 0.5f;
    while (count_above(bounds->most, share * bounds->low, given->count) > NEAR)
        if ((share += 0.05f) > 1) return 0;
    int64_t count = 0;
    for (int64_t j = 0; j < given->count; j++)
        if (bounds->most[j] >= share * bounds->low) given->near[count++] = j;
    gather_near(given, 0, steps, count);
    return count;
}

void gather_near(const Pursuit *given, int64_t from, int64_t to, int64_t count) {
    for (int64_t i = from; i < to; i++)
        for (int64_t j = 0; j < count; j++)
            given->near_products[i * NEAR + j] = given->products[i * given->count + given->near[j]];
}
