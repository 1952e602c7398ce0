/* Weights with an adapter's change: what is stored of them plus the product of two small factors, as a slab's elements.
 *
 * An element's products are added in the order of the ranks, each multiplied and added in two steps, so that neither
 * slabs nor the width of registers show, and torch gives the same bits (low_rank.py).
 */

#include "slab.h"

#define PAIR (2 * TILE)
#define FEW 4      /* rows that are multiplied at once; a group is several times as many */
#define LITTLE 256 /* fewer elements, those of a sample, are made without the rest of their rows */
typedef float LooseFloats __attribute__((vector_size(4 * TILE), aligned(4), may_alias)); /* at any float */

/* Where the room's parts begin: the right factor, a pair of tiles of columns after the other, each rank by rank; the
 * products of a group of rows; and the left factor of these, FEW rows after the other, each rank by rank. */
static inline int64_t fill_up(int64_t columns) { return (columns + PAIR - 1) / PAIR * PAIR; }

/* The first row of a row's group; rows are counted over all matrices, and groups end with theirs. */
static inline int64_t find_group(const Adapted *adapted, int64_t row) {
    return row - row % adapted->rows % adapted->group;
}

static inline float *find_rows(const Adapted *adapted) {
    return adapted->room + fill_up(adapted->columns) * adapted->rank;
}

static inline float *find_left(const Adapted *adapted) {
    return find_rows(adapted) + adapted->group * fill_up(adapted->columns);
}

/* Elements of a factor that lie `stride` apart. */
static void take_factor(const Factor *factor, int64_t at, int64_t stride, int64_t size, float *out) {
    if (stride == 1)
        decode(factor->data, factor->dtype, at, size, out);
    else
        for (int64_t j = 0; j < size; j++) decode(factor->data, factor->dtype, at + j * stride, 1, out + j);
}

/* The right factor of one matrix, in the order in which it is used. */
static void turn_right(const Adapted *adapted, int64_t matrix) {
    const Factor *right = &adapted->right;
    const int64_t columns = adapted->columns, rank = adapted->rank;
    float found[CHUNK];
    memset(adapted->room + (fill_up(columns) - PAIR) * rank, 0, (size_t)(PAIR * rank) * sizeof(float));
    const int64_t across = right->along_rank == 1 && rank <= CHUNK; /* ranks lie together, else columns may */
    for (int64_t j = 0; across && j < columns; j++) {
        float *out = adapted->room + j / PAIR * PAIR * rank + j % PAIR;
        take_factor(right, right->start + matrix * right->along_matrix + j * right->along_side, 1, rank, found);
        for (int64_t k = 0; k < rank; k++) out[k * PAIR] = found[k];
    }
    for (int64_t from = 0, here; !across && from < columns; from += here) {
        here = least(CHUNK, columns - from);
        for (int64_t k = 0; k < rank; k++) {
            const int64_t at = right->start + matrix * right->along_matrix + k * right->along_rank;
            take_factor(right, at + from * right->along_side, right->along_side, here, found);
            for (int64_t j = 0; j < here; j += PAIR)
                memcpy(adapted->room + (from + j) * rank + k * PAIR, found + j,
                       (size_t)least(PAIR, here - j) * sizeof(float));
        }
    }
}

/* The left factor of a group of rows; of those beyond the matrix, 0. */
static void turn_left(const Adapted *adapted, int64_t matrix, int64_t first) {
    const Factor *left = &adapted->left;
    const int64_t rank = adapted->rank;
    memset(find_left(adapted), 0, (size_t)(adapted->group * rank) * sizeof(float));
    for (int64_t i = 0; i < least(adapted->group, adapted->rows - first); i++) {
        const int64_t at = left->start + matrix * left->along_matrix + (first + i) * left->along_side;
        float found[CHUNK], *out = find_left(adapted) + i / FEW * FEW * rank + i % FEW;
        for (int64_t from = 0, here; from < rank; from += here, out += here * FEW) {
            here = least(CHUNK, rank - from);
            take_factor(left, at + from * left->along_rank, left->along_rank, here, found);
            for (int64_t k = 0; k < here; k++) out[k * FEW] = found[k];
        }
    }
}

/* The elements of FEW rows, each `width` apart in `out`, in a pair of tiles of columns. One name for each sum: gcc 12
 * clears and copies arrays of them in memory, which took as long as the products. */
INLINE void multiply_tile(const float *left, const float *right, int64_t rank, float scale, float *out, int64_t width) {
    Floats a = {0}, b = {0}, c = {0}, d = {0}, e = {0}, f = {0}, g = {0}, h = {0};
    for (int64_t k = 0; k < rank; k++, right += PAIR, left += FEW) {
        const Floats first = *(const LooseFloats *)right, second = *(const LooseFloats *)(right + TILE);
        a += first * left[0], b += second * left[0];
        c += first * left[1], d += second * left[1];
        e += first * left[2], f += second * left[2];
        g += first * left[3], h += second * left[3];
    }
    const Floats low[] = {a, c, e, g}, high[] = {b, d, f, h};
    for (int64_t i = 0; i < FEW; i++) {
        *(LooseFloats *)(out + i * width) = low[i] * scale;
        *(LooseFloats *)(out + i * width + TILE) = high[i] * scale;
    }
}

WIDTHS static void multiply_rows(const float *left, const float *right, int64_t rank, int64_t count, float scale,
                                 float *out, int64_t width) {
    for (int64_t j = 0; j < width; j += PAIR)
        for (int64_t i = 0; i < count; i += FEW)
            multiply_tile(left + i * rank, right + j * rank, rank, scale, out + i * width + j, width);
}

/* The products of fewer than LITTLE elements of a row, from the factors as they are stored. */
static void multiply_little(const Adapted *adapted, int64_t row, int64_t column, int64_t size, float *out) {
    const Factor *left = &adapted->left, *right = &adapted->right;
    const int64_t matrix = row / adapted->rows;
    const int64_t down = left->start + matrix * left->along_matrix + row % adapted->rows * left->along_side;
    const int64_t across = right->start + matrix * right->along_matrix + column * right->along_side;
    float found[LITTLE], own;
    for (int64_t j = 0; j < size; j++) out[j] = 0;
    for (int64_t k = 0; k < adapted->rank; k++) {
        take_factor(left, down + k * left->along_rank, 1, 1, &own);
        take_factor(right, across + k * right->along_rank, right->along_side, size, found);
        for (int64_t j = 0; j < size; j++) out[j] += found[j] * own;
    }
    multiply(out, size, adapted->scale);
}

/* The products of a row, which may be of all matrices, from a column on: those that are there, or those of its group. */
static const float *find_products(const Adapted *adapted, int64_t row, int64_t column) {
    const int64_t group = find_group(adapted, row), matrix = row / adapted->rows, width = fill_up(adapted->columns);
    if (adapted->there[0] != matrix) turn_right(adapted, matrix);
    if (adapted->there[1] != group) {
        turn_left(adapted, matrix, group % adapted->rows);
        multiply_rows(find_left(adapted), adapted->room, adapted->rank, adapted->group, adapted->scale,
                      find_rows(adapted), width);
    }
    adapted->there[0] = matrix, adapted->there[1] = group;
    return find_rows(adapted) + (row - group) * width + column;
}

WIDTHS static void add_bf16s(const uint16_t *restrict data, const float *restrict products, int64_t size,
                             float *restrict out) {
    for (int64_t j = 0; j < size; j++) out[j] = decode_bf16(data[j]) + products[j];
}

WIDTHS static void add(float *restrict out, const float *restrict products, int64_t size) {
    for (int64_t j = 0; j < size; j++) out[j] += products[j];
}

void decode_adapted(const Adapted *adapted, int64_t start, int64_t size, float *out) {
    const int64_t columns = adapted->columns, stop = start + size;
    for (int64_t here; start < stop; start += here, out += here) {
        const int64_t row = (adapted->start + start) / columns, column = (adapted->start + start) % columns;
        const float *products;
        float few[LITTLE];
        here = least(columns - column, stop - start);
        if (size < LITTLE && adapted->there[1] != find_group(adapted, row))
            multiply_little(adapted, row, column, here, few), products = few;
        else
            products = find_products(adapted, row, column);
        if (adapted->dtype == BF16) {
            add_bf16s((const uint16_t *)adapted->weight + start, products, here, out);
            continue;
        }
        decode(adapted->weight, adapted->dtype, start, here, out);
        add(out, products, here);
    }
}

/* Whether so many vectors of as many matrices are among the elements that there are. */
static int has_vectors(const Factor *factor, int64_t matrices, int64_t count, int64_t rank) {
    const int64_t size = factor->size;
    if (factor->dtype < F32 || factor->dtype > F16 || size < 1 || size > INT64_MAX / 8 || !factor->data) return 0;
    if ((uintptr_t)factor->data % (factor->dtype == F32 ? sizeof(float) : sizeof(uint16_t))) return 0;
    if (factor->start < 0 || factor->along_side < 1 || factor->along_rank < 1 || factor->along_matrix < 0) return 0;
    if (factor->start >= size || count - 1 > size / factor->along_side || rank - 1 > size / factor->along_rank) return 0;
    if (matrices > 1 && factor->along_matrix && matrices - 1 > size / factor->along_matrix) return 0;
    return factor->start + (matrices - 1) * factor->along_matrix + (count - 1) * factor->along_side +
               (rank - 1) * factor->along_rank < size;
}

int is_adapted(const Adapted *adapted, int64_t size) {
    const int64_t most = INT32_MAX, columns = adapted->columns, rank = adapted->rank; /* so that no product is too large */
    if (adapted->group < FEW || adapted->group > CHUNK || adapted->group % FEW) return 0;
    if (adapted->rows < 1 || adapted->rows > most || columns < 1 || columns > most || rank < 1 || rank > most) return 0;
    if (size < 1 || adapted->start < 0 || adapted->start > most * most - size) return size == 0;
    const int64_t matrices = (adapted->start + size - 1) / columns / adapted->rows + 1;
    if (!has_vectors(&adapted->left, matrices, adapted->rows, rank)) return 0;
    if (!has_vectors(&adapted->right, matrices, columns, rank)) return 0;
    if (!adapted->room || !adapted->there || (uintptr_t)adapted->room % sizeof(float)) return 0;
    if ((uintptr_t)adapted->there % sizeof(int64_t)) return 0;
    if (adapted->floats < fill_up(columns) * (rank + adapted->group) + adapted->group * rank) return 0;
    return is_stored(adapted->weight, adapted->dtype, size);
}
