/* What the columns of a matrix, or its rows, sum up to: squares of a base, and for each tensor beside it, less the base,
 * products with the base and squares. Values are multiplied by a power of two first, after which none is above 1.
 */

#include "slab.h"

#define DIGITS 3
#define DIGIT 0x1p40

static int has_lines(const Slab *slab, int64_t columns) {
    if (!is_sound(slab) || !slab->has_base || columns < 1 || columns > INT64_MAX / 64) return 0;
    return slab->size % columns == 0;
}

/* ---------------------------------------------------------------------------------------------------------- columns */

WIDTHS static void add_squares(double *restrict squares, const float *restrict x, double factor, int64_t size) {
    for (int64_t j = 0; j < size; j++) {
        const double own = (double)x[j] * factor;
        squares[j] += own * own;
    }
}

WIDTHS static void add_products(double *restrict crossed, double *restrict squares, const float *restrict base,
                                const float *restrict x, double factor, int64_t size) {
    for (int64_t j = 0; j < size; j++) {
        const double before = (double)base[j] * factor, own = (double)x[j] * factor;
        crossed[j] += before * own;
        squares[j] += own * own;
    }
}

/* Add sums to their digits, each 2**-40 of the one before, without rounding but of the last; the sums become 0. */
static void add_digits(double *sums, int64_t size, int64_t *digits, int64_t columns) {
    for (int64_t j = 0; j < size; j++) {
        double left = sums[j];
        sums[j] = 0;
        for (int64_t at = 0; at < DIGITS; at++) {
            if (!(fabs(left) < 0x1p62)) break; /* no integer */
            int64_t whole = (int64_t)left;
            whole -= (double)whole > left;
            int64_t *digit = digits + at * columns + j;
            *digit = (int64_t)((uint64_t)*digit + (uint64_t)whole); /* of random bits the sum is too large: it wraps */
            left = (left - (double)whole) * DIGIT;
        }
    }
}

/* Add the rows of a block, from `start` on, for `here` columns from `at` on. */
static void add_rows(const Slab *slab, int64_t start, int64_t rows, int64_t columns, int64_t at, int64_t here,
                     double factor, Room *room, double *sums) {
    for (int64_t row = 0; row < rows; row++) {
        const int64_t first = start + row * columns + at;
        load_base(slab, first, here, room->base);
        add_squares(sums, room->base, factor, here);
        for (int64_t i = 0; i < slab->count; i++) {
            double *own = sums + (2 * i + 1) * CHUNK;
            load(slab, i, first, here, room->base, room->total);
            add_products(own, own + CHUNK, room->base, room->total, factor, here);
        }
    }
}

/* Add to `digits` [2 count + 1, 3, columns] the sums of whole rows: those of a block one after the other, and blocks as
 * integers, so that their order is free. */
int32_t mergemill_stored_columns(const Slab *slab, int64_t columns, double factor, int64_t *digits) {
    if (!has_lines(slab, columns) || slab->block % columns) return REFUSED;
    const int64_t kinds = 2 * slab->count + 1;
    Room room;
    double *sums = calloc((size_t)kinds, CHUNK * sizeof *sums);
    if (!make_room(&room, slab->count) || !sums) return drop_room(&room), free(sums), NO_MEMORY;
    for (int64_t start = 0; start < slab->size; start += slab->block) {
        const int64_t rows = least(slab->block, slab->size - start) / columns;
        for (int64_t at = 0; at < columns; at += CHUNK) {
            const int64_t here = least(CHUNK, columns - at);
            add_rows(slab, start, rows, columns, at, here, factor, &room, sums);
            for (int64_t kind = 0; kind < kinds; kind++)
                add_digits(sums + kind * CHUNK, here, digits + kind * DIGITS * columns + at, columns);
        }
    }
    drop_room(&room);
    free(sums);
    return 0;
}

/* ------------------------------------------------------------------------------------------------------------- rows */

WIDTHS static void multiply_wide(double *restrict out, const float *restrict left, const float *restrict right,
                                 double factor, int64_t size) {
    for (int64_t j = 0; j < size; j++) out[j] = ((double)left[j] * factor) * ((double)right[j] * factor);
}

/* Write the same sums of each row to `out` [2 count + 1, rows], of which the slab has those from its first row on. */
int32_t mergemill_stored_row_squares(const Slab *slab, int64_t columns, double factor, int64_t rows, double *out) {
    if (!has_lines(slab, columns) || slab->start % columns || (slab->start + slab->size) / columns > rows) return REFUSED;
    double *wide = malloc((size_t)columns * (sizeof *wide + 2 * sizeof(float)));
    if (!wide) return NO_MEMORY;
    float *base = (float *)(wide + columns), *x = base + columns;
    for (int64_t start = 0; start < slab->size; start += columns) {
        const int64_t row = (slab->start + start) / columns;
        load_base(slab, start, columns, base);
        multiply_wide(wide, base, base, factor, columns);
        out[row] = fold_row(wide, columns);
        for (int64_t i = 0; i < slab->count; i++) {
            double *own = out + (2 * i + 1) * rows + row;
            load(slab, i, start, columns, base, x);
            multiply_wide(wide, base, x, factor, columns);
            own[0] = fold_row(wide, columns);
            multiply_wide(wide, x, x, factor, columns);
            own[rows] = fold_row(wide, columns);
        }
    }
    free(wide);
    return 0;
}
