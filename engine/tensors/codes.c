/* Quantised values: a code of 4 or 8 bits for each element, a table of what codes stand for, scales and zero points. */

#include "slab.h"

INLINE int knows(const Codes *given) {
    return (given->bits == 4 || given->bits == 8) && given->skipped >= 0 && (given->high_first & ~1) == 0;
}

INLINE float take_code(const Codes *given, int64_t at) {
    if (given->bits == 8) return given->table[given->codes[at]];
    const int32_t shift = (int32_t)((at & 1) ^ given->high_first) * 4;
    return given->table[given->codes[at >> 1] >> shift & 15];
}

/* As many codes as there are, one after the other, without their scales; those of 4 bits two at a time. */
INLINE void take_codes(const Codes *given, int64_t at, int64_t size, float *out) {
    const float *table = given->table;
    int64_t i = 0;
    if (given->bits == 8) {
        const uint8_t *codes = given->codes + at;
        for (; i < size; i++) out[i] = table[codes[i]];
        return;
    }
    if (size && at & 1) out[i++] = take_code(given, at);
    const uint8_t *codes = given->codes + ((at + i) >> 1);
    const int32_t first = given->high_first * 4, second = 4 - first;
    for (int64_t pair = 0; pair < (size - i) / 2; pair++) {
        const uint8_t both = codes[pair];
        out[i + 2 * pair] = table[both >> first & 15];
        out[i + 2 * pair + 1] = table[both >> second & 15];
    }
    if ((size - i) & 1) out[size - 1] = take_code(given, at + size - 1);
}

/* Elements from `start` on of matrices whose codes lie in their order, the first of them at `skipped`; scales begin with
 * the row of blocks `first_block`. */
WIDTHS int32_t mergemill_dequantize_rows(const Codes *given, int64_t start, int64_t size, int64_t rows, int64_t columns,
                                      int64_t row_codes, int64_t block_rows, int64_t block_columns, int64_t first_block,
                                      float *out) {
    if (!knows(given) || start < 0 || rows < 1 || columns < 1 || block_rows < 1 || block_columns < 1) return REFUSED;
    const int64_t down = (rows + block_rows - 1) / block_rows, across = (columns + block_columns - 1) / block_columns;
    int64_t row = start / columns, column = start % columns;
    const int64_t first = row * row_codes + column - given->skipped;
    for (int64_t done = 0; done < size; row++, column = 0) {
        const int64_t end = least(columns, column + size - done);
        const int64_t block = (row / rows * down + row % rows / block_rows - first_block) * across;
        for (int64_t stop; column < end; done += stop - column, column = stop) {
            const int64_t each = column / block_columns;
            stop = least(end, (each + 1) * block_columns);
            float *x = out + done;
            take_codes(given, row * row_codes + column - first, stop - column, x);
            const float scale = given->scales[block + each], factor = given->factor;
            if (given->zeros) {
                const float zero = given->zeros[block + each];
                for (int64_t i = 0; i < stop - column; i++) x[i] = (x[i] - zero) * scale * factor;
            } else {
                for (int64_t i = 0; i < stop - column; i++) x[i] = x[i] * scale * factor;
            }
        }
    }
    return 0;
}

/* Elements from `start` on of rows whose codes lie anywhere: at the sum of a row's place and a column's, as their scales
 * do. Tiles of columns come first, so that codes and elements that lie together are taken together. */
WIDTHS int32_t mergemill_dequantize_columns(const Codes *given, int64_t start, int64_t size, int64_t columns,
                                         const int64_t *rows_at, const int64_t *row_scales, const int64_t *columns_at,
                                         const int64_t *column_scales, float *out) {
    if (!knows(given) || start < 0 || columns < 1) return REFUSED;
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
    return 0;
}
