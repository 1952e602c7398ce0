/* Quantised values: a code of 4 or 8 bits for each element, a table of what codes stand for, scales and zero points. */

#include "slab.h"

#define FEW_ROWS 32   /* that are turned round at once */
#define FEW_COLUMNS 8 /* so are these */

INLINE int knows(const Codes *given) {
    return (given->bits == 4 || given->bits == 8) && given->skipped >= 0 && (given->high_first & ~1) == 0;
}

INLINE float take_code(const Codes *given, int64_t at) {
    if (given->bits == 8) return given->table[given->codes[at]];
    const int32_t shift = (int32_t)((at & 1) ^ given->high_first) * 4;
    return given->table[given->codes[at >> 1] >> shift & 15];
}

/* Codes of 4 bits, whole bytes of them; eight at once where floats can be shuffled. */
INLINE void take_pairs(const Codes *given, const uint8_t *codes, int64_t pairs, float *restrict out) {
    const float *table = given->table;
    const int32_t first = given->high_first * 4, second = 4 - first;
    int64_t pair = 0;
#ifdef HAS_SHUFFLE
    typedef float Eight __attribute__((vector_size(32)));
    typedef int32_t Indices __attribute__((vector_size(32)));
    Eight low, high;
    memcpy(&low, table, sizeof low);
    memcpy(&high, table + 8, sizeof high);
    const Indices shifts = {first, second, first + 8, second + 8, first + 16, second + 16, first + 24, second + 24};
    for (; pair + 4 <= pairs; pair += 4) {
        int32_t word;
        memcpy(&word, codes + pair, sizeof word);
        const Indices code = ((Indices){0} + word) >> shifts, upper = -(code >> 3 & 1);
        const Indices below = (Indices)__builtin_shuffle(low, code & 7), above = (Indices)__builtin_shuffle(high, code & 7);
        const Indices found = (below & ~upper) | (above & upper);
        memcpy(out + 2 * pair, &found, sizeof found);
    }
#endif
    for (; pair < pairs; pair++) {
        const uint8_t both = codes[pair];
        out[2 * pair] = table[both >> first & 15];
        out[2 * pair + 1] = table[both >> second & 15];
    }
}

/* As many codes as there are, one after the other, without their scales; those of 4 bits two at a time. */
INLINE void take_codes(const Codes *given, int64_t at, int64_t size, float *restrict out) {
    const uint8_t *codes = given->codes + at;
    int64_t i = 0;
    if (given->bits == 8) {
        for (; i < size; i++) out[i] = given->table[codes[i]];
        return;
    }
    if (size && at & 1) out[i++] = take_code(given, at);
    take_pairs(given, given->codes + ((at + i) >> 1), (size - i) / 2, out + i);
    if ((size - i) & 1) out[size - 1] = take_code(given, at + size - 1);
}

/* Each less the zero point, where there is one, times the scale of their block, times the factor of all. */
INLINE void rescale(const Codes *given, int64_t block, int64_t size, float *restrict x) {
    const float scale = given->scales[block], factor = given->factor;
    if (given->zeros) {
        const float zero = given->zeros[block];
        for (int64_t i = 0; i < size; i++) x[i] = (x[i] - zero) * scale;
    } else {
        for (int64_t i = 0; i < size; i++) x[i] *= scale;
    }
    if (factor != 1.0f)
        for (int64_t i = 0; i < size; i++) x[i] *= factor;
}

/* The row of blocks of a row, among those whose scales there are. */
static inline int64_t find_block_row(const Coded *coded, int64_t row) {
    const int64_t down = (coded->rows + coded->block_rows - 1) / coded->block_rows;
    return row / coded->rows * down + row % coded->rows / coded->block_rows - coded->first_block;
}

int is_coded(const Coded *coded, int64_t size) {
    const int64_t most = INT32_MAX; /* of a side, so that no product is too large; of all elements the same squared */
    if (!knows(&coded->codes) || coded->start < 0 || size < 0 || coded->code_count < 0) return 0;
    const int64_t sides[] = {coded->rows, coded->columns, coded->row_codes, coded->block_rows, coded->block_columns};
    for (int64_t i = 0; i < 5; i++)
        if (sides[i] < 1 || sides[i] > most) return 0;
    if (coded->row_codes < coded->columns || coded->start > most * most - size || coded->first_block < 0) return 0;
    if (coded->codes.skipped > 1 || size == 0) return size == 0;
    const int64_t last = coded->start + size - 1, first_row = coded->start / coded->columns;
    if (last / coded->columns > INT64_MAX / 4 / coded->row_codes) return 0;
    const int64_t codes = (last / coded->columns - first_row) * coded->row_codes + last % coded->columns -
                          coded->start % coded->columns + 1;
    const int64_t across = (coded->columns + coded->block_columns - 1) / coded->block_columns;
    const int64_t from = find_block_row(coded, first_row), to = find_block_row(coded, last / coded->columns);
    return codes <= coded->code_count && from >= 0 && to >= from && to < coded->scale_count / across;
}

WIDTHS void decode_coded(const Coded *coded, int64_t start, int64_t size, float *out) {
    const Codes *given = &coded->codes;
    const int64_t columns = coded->columns, block_columns = coded->block_columns;
    const int64_t across = (columns + block_columns - 1) / block_columns;
    int64_t row = (coded->start + start) / columns, column = (coded->start + start) % columns;
    const int64_t first = coded->start / columns * coded->row_codes + coded->start % columns - given->skipped;
    for (int64_t done = 0; done < size; row++, column = 0) {
        const int64_t end = least(columns, column + size - done), codes = row * coded->row_codes - first;
        int64_t block = column / block_columns, stop = block * block_columns;
        take_codes(given, codes + column, end - column, out + done);
        for (block += find_block_row(coded, row) * across; column < end; done += stop - column, column = stop, block++) {
            stop = least(end, stop + block_columns);
            if (stop - column == 32)
                rescale(given, block, 32, out + done);
            else
                rescale(given, block, stop - column, out + done);
        }
    }
}

/* All elements of the slab. */
int32_t mergemill_dequantize_rows(const Coded *coded, int64_t size, float *out) {
    if (!is_coded(coded, size)) return REFUSED;
    decode_coded(coded, 0, size, out);
    return 0;
}

/* Elements from `start` on of rows whose codes lie anywhere: at the sum of a row's place and a column's, as their scales
 * do. Tiles of columns come first, so that codes and elements that lie together are taken together. */
INLINE void decode_scattered(const Codes *given, int64_t start, int64_t size, int64_t columns, const int64_t *rows_at,
                             const int64_t *row_scales, const int64_t *columns_at, const int64_t *column_scales,
                             float *out) {
    const int64_t rows = (start + size + columns - 1) / columns;
    for (int64_t tile = 0; tile < columns; tile += TILE) {
        for (int64_t row = 0; row < rows; row++) {
            const int64_t left = row * columns;
            const int64_t low = start - left > tile ? start - left : tile;
            const int64_t high = least(least(columns, tile + TILE), start + size - left);
            for (int64_t i = low; i < high; i++) {
                const int64_t scale = row_scales[row] + column_scales[i];
                float x = take_code(given, rows_at[row] + columns_at[i] + given->skipped);
                if (given->zeros) x -= given->zeros[scale];
                out[left + i - start] = x * given->scales[scale] * given->factor;
            }
        }
    }
}

/* The same where rows lie one after the other: runs of them that share a scale are taken along a column, and turned
 * round in the first-level cache. */
INLINE void decode_turned(const Codes *given, int64_t start, int64_t size, int64_t columns, const int64_t *rows_at,
                          const int64_t *row_scales, const int64_t *columns_at, const int64_t *column_scales,
                          float *out) {
    const int64_t rows = (start + size + columns - 1) / columns;
    float taken[FEW_COLUMNS][FEW_ROWS];
    for (int64_t tile = 0; tile < columns; tile += FEW_COLUMNS) {
        const int64_t wide = least(FEW_COLUMNS, columns - tile);
        for (int64_t row = 0, run; row < rows; row += run) {
            for (run = 1; run < least(FEW_ROWS, rows - row) && row_scales[row + run] == row_scales[row]; run++) continue;
            for (int64_t i = 0; i < wide; i++) {
                take_codes(given, rows_at[row] + columns_at[tile + i] + given->skipped, run, taken[i]);
                rescale(given, row_scales[row] + column_scales[tile + i], run, taken[i]);
            }
            for (int64_t k = 0; k < run; k++) {
                const int64_t left = (row + k) * columns + tile - start;
                if (wide == FEW_COLUMNS && left >= 0 && left + FEW_COLUMNS <= size) {
                    for (int64_t i = 0; i < FEW_COLUMNS; i++) out[left + i] = taken[i][k];
                    continue;
                }
                for (int64_t i = left < 0 ? -left : 0; i < least(wide, size - left); i++) out[left + i] = taken[i][k];
            }
        }
    }
}

WIDTHS int32_t mergemill_dequantize_columns(const Codes *given, int64_t start, int64_t size, int64_t columns,
                                         const int64_t *rows_at, const int64_t *row_scales, const int64_t *columns_at,
                                         const int64_t *column_scales, float *out) {
    if (!knows(given) || start < 0 || columns < 1) return REFUSED;
    const int64_t rows = (start + size + columns - 1) / columns;
    int follows = 1;
    for (int64_t row = 1; row < rows; row++) follows &= rows_at[row] == rows_at[0] + row;
    if (follows)
        decode_turned(given, start, size, columns, rows_at, row_scales, columns_at, column_scales, out);
    else
        decode_scattered(given, start, size, columns, rows_at, row_scales, columns_at, column_scales, out);
    return 0;
}
