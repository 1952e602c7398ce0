/* Quantised values: a code of 4 or 8 bits for each element, a table of what codes stand for, scales and zero points. */

#include "slab.h"

#ifdef HAS_SHUFFLE
#include <immintrin.h>
#endif

#define FEW_ROWS 32 /* that are turned round at once */
#define TURNED 16   /* so are as many columns */

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
    for (int64_t tile = 0; tile < columns; tile += TURNED) {
        for (int64_t row = 0; row < rows; row++) {
            const int64_t left = row * columns;
            const int64_t low = start - left > tile ? start - left : tile;
            const int64_t high = least(least(columns, tile + TURNED), start + size - left);
            for (int64_t i = low; i < high; i++) {
                const int64_t scale = row_scales[row] + column_scales[i];
                float x = take_code(given, rows_at[row] + columns_at[i] + given->skipped);
                if (given->zeros) x -= given->zeros[scale];
                out[left + i - start] = x * given->scales[scale] * given->factor;
            }
        }
    }
}

#ifdef HAS_SHUFFLE
/* Codes of 4 bits that follow down a tile of columns, at most 32 from `at[i]` on, of which all or none are odd: `out` gets
 * a tile for each row, each element less the zero point and times the scale of its column. Bytes are turned round before
 * they are decoded, four times, the first half of them between those of the second. By the processor's own names, since
 * compilers find none of these instructions by themselves: a third of the time. */
__attribute__((target("avx2"))) static void turn_tile(const Codes *given, const int64_t *at, int64_t run,
                                                      const float *zeros, const float *scales, float (*out)[TURNED]) {
    const int64_t odd = at[0] & 1, bytes = (odd + run + 1) / 2;
    uint8_t last[TURNED] = {0}; /* of a 33rd code */
    __m128i rows[TURNED + 1], turned[TURNED];
    for (int64_t i = 0; i < TURNED; i++) {
        const uint8_t *codes = given->codes + at[i] / 2;
        uint8_t few[TURNED] = {0};
        for (int64_t k = 0; bytes < TURNED && k < bytes; k++) few[k] = codes[k];
        rows[i] = _mm_loadu_si128((const __m128i *)(bytes < TURNED ? few : codes));
        if (bytes > TURNED) last[i] = codes[TURNED];
    }
    rows[TURNED] = _mm_loadu_si128((const __m128i *)last);
    for (int32_t stage = 0; stage < 4; stage++) {
        for (int64_t i = 0; i < TURNED / 2; i++) {
            turned[2 * i] = _mm_unpacklo_epi8(rows[i], rows[i + TURNED / 2]);
            turned[2 * i + 1] = _mm_unpackhi_epi8(rows[i], rows[i + TURNED / 2]);
        }
        memcpy(rows, turned, sizeof turned);
    }
    const __m256 low = _mm256_loadu_ps(given->table), high = _mm256_loadu_ps(given->table + 8);
    const __m256 factor = _mm256_set1_ps(given->factor);
    for (int64_t half = 0; half < TURNED; half += 8) {
        const __m256 scale = _mm256_loadu_ps(scales + half), zero = _mm256_loadu_ps(zeros + half);
        for (int64_t k = 0; k < run; k++) {
            const int64_t code = odd + k;
            const __m128i line = half ? _mm_srli_si128(rows[code / 2], 8) : rows[code / 2];
            const __m128i shift = _mm_cvtsi32_si128((int32_t)((code & 1) ^ given->high_first) * 4);
            const __m256i index = _mm256_srl_epi32(_mm256_cvtepu8_epi32(line), shift); /* the lowest bits count */
            const __m256 below = _mm256_permutevar8x32_ps(low, index), above = _mm256_permutevar8x32_ps(high, index);
            __m256 found = _mm256_blendv_ps(below, above, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
            if (given->zeros) found = _mm256_sub_ps(found, zero);
            found = _mm256_mul_ps(found, scale);
            if (given->factor != 1.0f) found = _mm256_mul_ps(found, factor);
            _mm256_storeu_ps(out[k] + half, found);
        }
    }
}

static int can_turn(void) { return __builtin_cpu_supports("avx2"); }
#else
static int can_turn(void) { return 0; }

static void turn_tile(const Codes *given, const int64_t *at, int64_t run, const float *zeros, const float *scales,
                      float (*out)[TURNED]) {
    (void)given, (void)at, (void)run, (void)zeros, (void)scales, (void)out;
}
#endif

/* The same where rows lie one after the other: runs of them that share a scale are taken along a column, and turned
 * round in the first-level cache: codes of 4 bits as bytes of them, where bytes can be shuffled, else elements. */
INLINE void decode_turned(const Codes *given, int64_t start, int64_t size, int64_t columns, const int64_t *rows_at,
                          const int64_t *row_scales, const int64_t *columns_at, const int64_t *column_scales,
                          float *out) {
    const int64_t rows = (start + size + columns - 1) / columns;
    for (int64_t tile = 0; tile < columns; tile += TURNED) {
        const int64_t wide = least(TURNED, columns - tile);
        int even = given->bits == 4 && wide == TURNED && can_turn(); /* all codes of a row, or none */
        for (int64_t i = 1; i < wide; i++) even &= !((columns_at[tile + i] ^ columns_at[tile]) & 1);
        for (int64_t row = 0, run; row < rows; row += run) {
            float taken[FEW_ROWS][TURNED];
            for (run = 1; run < least(FEW_ROWS, rows - row) && row_scales[row + run] == row_scales[row]; run++) continue;
            if (even) {
                int64_t at[TURNED];
                float scales[TURNED], zeros[TURNED] = {0};
                for (int64_t i = 0; i < TURNED; i++) {
                    const int64_t scale = row_scales[row] + column_scales[tile + i];
                    at[i] = rows_at[row] + columns_at[tile + i] + given->skipped;
                    scales[i] = given->scales[scale];
                    if (given->zeros) zeros[i] = given->zeros[scale];
                }
                turn_tile(given, at, run, zeros, scales, taken);
            }
            for (int64_t i = 0; !even && i < wide; i++) {
                float column[FEW_ROWS];
                take_codes(given, rows_at[row] + columns_at[tile + i] + given->skipped, run, column);
                rescale(given, row_scales[row] + column_scales[tile + i], run, column);
                for (int64_t k = 0; k < run; k++) taken[k][i] = column[k];
            }
            for (int64_t k = 0; k < run; k++) {
                const int64_t left = (row + k) * columns + tile - start;
                if (wide == TURNED && left >= 0 && left + TURNED <= size)
                    memcpy(out + left, taken[k], sizeof taken[k]);
                else
                    for (int64_t i = left < 0 ? -left : 0; i < least(wide, size - left); i++) out[left + i] = taken[k][i];
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
