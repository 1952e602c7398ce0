/* Marking what stays of each row of a slab, where chance hangs on the rank of a magnitude in its row, without a sort. */

#include "slab.h"

#define SHIFT 17 /* of a magnitude's 31 bits, 14 are looked at first: its exponent and 6 more */
#define ROW_BINS (1 << (31 - SHIFT))
#define GROUP 64  /* bins that are looked through, and cleared, together */
#define MANY 512 /* elements of a bin from which on they are put in order, instead of counting for each that needs it */

/* The random number of an element must lie within `gap` above `lower` for its rank to matter. */
typedef struct {
    int32_t lower;
    uint32_t gap;
    uint32_t rank; /* of the bin's first */
    int32_t ordered;
} Bounds;

/* A row's elements by the bits they begin with. */
typedef struct {
    uint32_t counts[ROW_BINS];
    Bounds bounds[ROW_BINS];
    uint8_t touched[ROW_BINS / GROUP];
} Bins;

/* How many of a row are less than the element j, or equal and before it. */
WIDTHS static int64_t find_rank(const uint32_t *row, int64_t columns, int64_t j) {
    const uint32_t own = row[j];
    int64_t rank = 0;
    for (int64_t start = 0; start < columns; start += BLOCK) {
        const int64_t stop = least(start + BLOCK, columns);
        int32_t count = 0;
        for (int64_t k = start; k < stop; k++) count += row[k] < own;
        rank += count;
    }
    for (int64_t k = 0; k < j; k++) rank += row[k] == own;
    return rank;
}

static void fill_bins(const uint32_t *row, int64_t columns, Bins *bins) {
    for (int64_t j = 0; j < columns; j++) {
        bins->counts[row[j] >> SHIFT]++;
        bins->touched[row[j] >> SHIFT >> 6] = 1;
    }
}

static void find_bounds(Bins *bins, const int32_t *limits) {
    uint32_t rank = 0;
    for (int64_t group = 0; group < ROW_BINS / GROUP; group++) {
        if (!bins->touched[group]) continue;
        for (int64_t bin = group * GROUP; bin < (group + 1) * GROUP; bin++) {
            if (!bins->counts[bin]) continue;
            const int32_t first = limits[rank], last = limits[rank + bins->counts[bin] - 1];
            const int32_t lower = first < last ? first : last, upper = first < last ? last : first;
            bins->bounds[bin] = (Bounds){lower, (uint32_t)upper - (uint32_t)lower, rank, 0};
            rank += bins->counts[bin];
        }
    }
}

static void clear_bins(Bins *bins) {
    for (int64_t group = 0; group < ROW_BINS / GROUP; group++)
        if (bins->touched[group]) memset(bins->counts + group * GROUP, 0, GROUP * sizeof(uint32_t));
    memset(bins->touched, 0, sizeof bins->touched);
}

static int compare_keys(const void *left, const void *right) {
    const uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;
    return (a > b) - (a < b);
}

/* Mark all elements of one bin, put in order by magnitude and column; `keys` has room for them. */
static void mark_bin(uint32_t bin, const uint32_t *row, int64_t columns, uint32_t rank, const int32_t *limits,
                     const int32_t *bits, uint64_t *keys, uint8_t *mask) {
    int64_t count = 0;
    int same = 1;
    for (int64_t k = 0; k < columns; k++) {
        if (row[k] >> SHIFT != bin) continue;
        keys[count++] = (uint64_t)row[k] << 32 | (uint64_t)k;
        same &= keys[0] >> 32 == row[k];
    }
    if (!same) qsort(keys, (size_t)count, sizeof *keys, compare_keys);
    for (int64_t i = 0; i < count; i++) {
        const uint32_t k = (uint32_t)keys[i];
        mask[k] = bits[k] < limits[rank + i];
    }
}

/* Room for a row: its magnitudes, random numbers, elements whose rank matters, and keys to put them in order. */
typedef struct {
    float *base, *x;
    uint32_t *row;
    int32_t *bits;
    uint32_t *open;
    uint64_t *keys;
    Bins *bins;
} RowRoom;

/* Mark what stays of a row: the elements whose random number is under the limit of their rank. */
static void mark_row(const RowRoom *room, int64_t columns, const int32_t *limits, uint8_t *mask) {
    const uint32_t *row = room->row;
    const int32_t *bits = room->bits;
    int64_t open = 0;
    fill_bins(row, columns, room->bins);
    find_bounds(room->bins, limits);
    for (int64_t j = 0; j < columns; j++) {
        const Bounds *bounds = room->bins->bounds + (row[j] >> SHIFT);
        mask[j] = bits[j] < bounds->lower;
        room->open[open] = (uint32_t)j;
        open += (uint32_t)bits[j] - (uint32_t)bounds->lower < bounds->gap;
    }
    for (int64_t i = 0; i < open; i++) {
        const uint32_t j = room->open[i], bin = row[j] >> SHIFT;
        Bounds *bounds = room->bins->bounds + bin;
        if (room->bins->counts[bin] < MANY) {
            mask[j] = bits[j] < limits[find_rank(row, columns, j)];
        } else if (!bounds->ordered) {
            mark_bin(bin, row, columns, bounds->rank, limits, bits, room->keys, mask);
            bounds->ordered = 1;
        }
    }
    clear_bins(room->bins);
}

WIDTHS static void hash_counters(const uint32_t *restrict counters, int64_t size, uint32_t first, uint32_t second,
                                 int32_t *restrict out) {
    for (int64_t j = 0; j < size; j++) out[j] = (int32_t)hash_counter(counters[j], first, second);
}

/* The random numbers of `size` elements from `at` on; `keys` begins with the BLOCK that `first` lies in. */
static void find_random(int64_t at, int64_t size, int64_t first, const uint32_t *keys, int32_t *out) {
    for (const int64_t stop = at + size; at < stop; ) {
        const uint32_t *own = keys + 2 * (at / BLOCK - first / BLOCK);
        const int64_t here = least(stop - at, BLOCK - at % BLOCK);
        hash_counters(all_counters() + at % BLOCK, here, own[0], own[1], out);
        at += here, out += here;
    }
}

/* Mark in `mask` what stays of one tensor, row by row, the limits given by rank, the smallest magnitude first; `random`
 * has the two keys of each BLOCK that the slab touches. */
int32_t mergemill_stored_ranked_marks(const Slab *slab, int64_t which, int64_t columns, const int32_t *limits,
                                      const uint32_t *random, uint8_t *mask) {
    Bins *bins = calloc(1, sizeof(Bins));
    uint64_t *keys = malloc((size_t)columns * (sizeof *keys + 2 * sizeof(float) + 3 * sizeof(uint32_t)));
    if (!bins || !keys) return free(bins), free(keys), -1;
    float *base = (float *)(keys + columns), *x = base + columns;
    uint32_t *row = (uint32_t *)(x + columns), *open = row + columns;
    const RowRoom room = {base, x, row, (int32_t *)(open + columns), open, keys, bins};
    for (int64_t start = 0; start < slab->size; start += columns) {
        load_base(slab, start, columns, base);
        load(slab, which, start, columns, base, x);
        find_magnitudes(x, columns, row);
        find_random(slab->start + start, columns, slab->start, random, room.bits);
        mark_row(&room, columns, limits, mask + start);
    }
    free(bins);
    free(keys);
    return 0;
}
