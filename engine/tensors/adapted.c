/* Weights with an adapter's change: a slab of them plus the product of two small factors, row by row.
 *
 * An element's products are added in the order of the ranks, each multiplied and added in two steps, so that neither
 * slabs nor the width of registers show, and torch gives the same bits (low_rank.py).
 */

#include "slab.h"

#define WIDE 512 /* columns that are worked on at once: the right factor's share then stays in the core's cache */
#define FEW 4    /* rows that share what is loaded of it */
#define PAIR (2 * TILE)
_Static_assert(WIDE % PAIR == 0, "wide is whole pairs of tiles");

static void decode_strided(const Factor *factor, int64_t at, int64_t stride, int64_t size, float *out) {
    if (stride == 1) {
        decode(factor->data, factor->dtype, at, size, out);
        return;
    }
    for (int64_t j = 0; j < size; j++) decode(factor->data, factor->dtype, at + j * stride, 1, out + j);
}

/* The elements of `count` rows, each `width` apart in `out`, from a pair of tiles of columns on. */
INLINE void add_tile(float *out, int64_t width, const float *left, const float *right, int64_t rank, int64_t count,
                     float scale, int64_t size) {
    Floats low[FEW] = {{0}}, high[FEW] = {{0}};
    for (int64_t k = 0; k < rank; k++) {
        Floats first, second;
        memcpy(&first, right + k * WIDE, sizeof first);
        memcpy(&second, right + k * WIDE + TILE, sizeof second);
        for (int64_t i = 0; i < count; i++) {
            low[i] += first * left[i * rank + k];
            high[i] += second * left[i * rank + k];
        }
    }
    for (int64_t i = 0; i < count; i++) {
        float added[PAIR];
        low[i] *= scale, high[i] *= scale;
        memcpy(added, &low[i], sizeof low[i]);
        memcpy(added + TILE, &high[i], sizeof high[i]);
        for (int64_t j = 0; j < size; j++) out[i * width + j] += added[j];
    }
}

WIDTHS static void add_rows(float *out, int64_t width, const float *left, const float *right, int64_t rank,
                            int64_t count, float scale, int64_t size) {
    int64_t j = 0;
    if (count == FEW)
        for (; j + PAIR <= size; j += PAIR) add_tile(out + j, width, left, right + j, rank, FEW, scale, PAIR);
    for (; j + PAIR <= size; j += PAIR) add_tile(out + j, width, left, right + j, rank, count, scale, PAIR);
    if (j < size) add_tile(out + j, width, left, right + j, rank, count, scale, size - j);
}

/* Whether the elements of so many of its vectors are among those that there are. */
static int has_vectors(const Factor *factor, int64_t count, int64_t rank) {
    const int64_t most = INT64_MAX / 8;
    if (factor->dtype < F32 || factor->dtype > F16 || factor->size < 0 || factor->size > most) return 0;
    if (factor->start < 0 || factor->along_side < 1 || factor->along_rank < 1) return 0;
    if (factor->start > factor->size || count > factor->size / factor->along_side + 1) return 0;
    if (rank > factor->size / factor->along_rank + 1) return 0;
    return factor->start + (count - 1) * factor->along_side + (rank - 1) * factor->along_rank < factor->size;
}

/* out += scale · left · right for the elements from `start` on of one matrix; `room`, of so many floats, has place for
 * the rows of left that they touch, and for WIDE columns of right. */
int32_t mergemill_add_product(float *out, int64_t start, int64_t size, int64_t columns, const Factor *left,
                              const Factor *right, int64_t rank, float scale, float *room, int64_t floats) {
    if (size == 0) return 0;
    if (start < 0 || size < 0 || columns < 1 || rank < 1 || start > INT64_MAX / 8 - size) return REFUSED;
    const int64_t first = start / columns, rows = (start + size - 1) / columns + 1 - first;
    if (!has_vectors(left, first + rows, rank) || !has_vectors(right, columns, rank)) return REFUSED;
    if (floats < PAIR || (floats - PAIR) / rank < rows + WIDE) return REFUSED;
    float *tile = room + rows * rank;
    for (int64_t i = 0; i < rows; i++)
        decode_strided(left, left->start + (first + i) * left->along_side, left->along_rank, rank, room + i * rank);
    for (int64_t from = 0, here; from < columns; from += here) {
        here = least(WIDE, columns - from);
        for (int64_t k = 0; k < rank; k++) {
            memset(tile + k * WIDE, 0, WIDE * sizeof(float));
            decode_strided(right, right->start + k * right->along_rank + from * right->along_side, right->along_side,
                           here, tile + k * WIDE);
        }
        for (int64_t i = 0, count; i < rows; i += count) {
            const int64_t row = (first + i) * columns - start; /* where it begins in the slab */
            const int whole = row + from >= 0 && row + (FEW - 1) * columns + from + here <= size && i + FEW <= rows;
            count = whole ? FEW : 1;
            const int64_t low = row + from > 0 ? row + from : 0;
            const int64_t high = whole ? low + here : least(row + from + here, size);
            if (low >= high) continue;
            add_rows(out + low, columns, room + i * rank, tile + (low - row - from), rank, count, scale, high - low);
        }
    }
    return 0;
}

/* A slab as it is stored, as float32. */
void mergemill_decode(const void *data, int32_t dtype, int64_t size, float *out) { decode(data, dtype, 0, size, out); }
