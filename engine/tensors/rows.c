/* Marking what stays of each row of a slab, where chance hangs on the rank of a magnitude in its row, without a sort. */

#include "slab.h"

#define SHIFT 17     /* of a magnitude's 31 bits, 14 are looked at first: its exponent and 6 more */
#define ROW_BINS 512 /* from the row's largest down, 8 octaves; the first bin has all that is smaller */
#define MANY 512     /* elements of a bin from which on they are put in order, instead of counting for each that needs it */

/* A row's elements by the bits they begin with. */
typedef struct {
    uint32_t counts[2][ROW_BINS]; /* of every other element: two counts in a row are seldom of one bin and wait less */
    uint32_t ranks[ROW_BINS];     /* of each bin's first */
    uint32_t limits[ROW_BINS];    /* the upper halves, made unsigned, of the least and the largest limit of its ranks */
    uint8_t ordered[ROW_BINS];
} Bins;

enum { KEPT = 1, OPEN = 2 };

/* How many of a row are less than the element j, or equal and before it. */
WIDTHS static int64_t find_rank(const uint32_t *row, int64_t columns, int64_t j) {
    const uint32_t own = row[j];
    int64_t rank = 0, k = 0;
    for (; k + TILE <= columns; ) {
        Flags less = {0};
        for (const int64_t stop = least(k + BLOCK, columns) - TILE; k <= stop; k += TILE) {
            Words tile;
            memcpy(&tile, row + k, sizeof tile);
            less += tile < own;
        }
        rank += count_flags(less);
    }
    for (; k < columns; k++) rank += row[k] < own;
    for (k = 0; k < j; k++) rank += row[k] == own;
    return rank;
}

/* The bin of each magnitude. */
WIDTHS static void find_bins(const uint32_t *restrict row, int64_t columns, uint16_t *restrict out) {
    uint32_t most = 0;
    for (int64_t j = 0; j < columns; j++) most = row[j] > most ? row[j] : most;
    const int32_t first = (int32_t)(most >> SHIFT) - (ROW_BINS - 1);
    for (int64_t j = 0; j < columns; j++) {
        const int32_t bin = (int32_t)(row[j] >> SHIFT) - first;
        out[j] = (uint16_t)(bin > 0 ? bin : 0);
    }
}

static void fill_bins(const uint16_t *own, int64_t columns, Bins *bins) {
    memset(bins->counts, 0, sizeof bins->counts);
    memset(bins->ordered, 0, sizeof bins->ordered);
    int64_t j = 0;
    for (; j + 2 <= columns; j += 2) bins->counts[0][own[j]]++, bins->counts[1][own[j + 1]]++;
    if (j < columns) bins->counts[0][own[j]]++;
}

static inline uint32_t upper_half(int32_t limit) { return ((uint32_t)limit ^ 0x80000000u) >> 16; }

/* The limits change in one direction, so that those of a bin's ranks lie between its first and the next bin's first. */
WIDTHS static void find_limits(Bins *bins, const uint16_t *halves) {
    uint32_t first[ROW_BINS + 1], rank = 0;
    for (int64_t bin = 0; bin < ROW_BINS; bin++) {
        bins->ranks[bin] = rank;
        first[bin] = halves[rank];
        rank += bins->counts[0][bin] + bins->counts[1][bin];
    }
    first[ROW_BINS] = halves[rank];
    for (int64_t bin = 0; bin < ROW_BINS; bin++) {
        const uint32_t here = first[bin], next = first[bin + 1];
        bins->limits[bin] = (here < next ? here : next) | (here < next ? next : here) << 16;
    }
}

/* Whether elements stay whatever their rank in their bin is; or whether that is open. */
WIDTHS static void decide(const int32_t *restrict bits, const uint16_t *restrict own, int64_t columns,
                          const uint32_t *restrict limits, uint8_t *restrict out) {
    for (int64_t j = 0; j < columns; j++) {
        const uint32_t pair = limits[own[j]], half = upper_half(bits[j]);
        const uint32_t kept = half < (pair & 0xFFFF), dropped = half > pair >> 16;
        out[j] = (uint8_t)(kept | (OPEN - (kept | dropped) * OPEN));
    }
}

static int compare_keys(const void *left, const void *right) {
    const uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;
    return (a > b) - (a < b);
}

/* Room for a row: its magnitudes, random numbers, bins, the upper halves of the limits, and keys to put it in order. */
typedef struct {
    float *base, *x;
    uint32_t *row;
    int32_t *bits;
    uint16_t *own, *halves;
    uint64_t *keys;
    Bins *bins;
} RowRoom;

/* Mark all elements of one bin, put in order by magnitude and column. */
static void mark_bin(const RowRoom *room, uint16_t bin, int64_t columns, const int32_t *limits, uint8_t *mask) {
    int64_t count = 0;
    int same = 1;
    for (int64_t k = 0; k < columns; k++) {
        if (room->own[k] != bin) continue;
        room->keys[count++] = (uint64_t)room->row[k] << 32 | (uint64_t)k;
        same &= room->keys[0] >> 32 == room->row[k];
    }
    if (!same) qsort(room->keys, (size_t)count, sizeof *room->keys, compare_keys);
    for (int64_t i = 0; i < count; i++) {
        const uint32_t k = (uint32_t)room->keys[i];
        mask[k] = room->bits[k] < limits[room->bins->ranks[bin] + i];
    }
}

/* Mark an element whose rank matters, or all of its bin. */
static void mark_open(const RowRoom *room, int64_t j, int64_t columns, const int32_t *limits, uint8_t *mask) {
    Bins *bins = room->bins;
    const uint16_t bin = room->own[j];
    if (bins->counts[0][bin] + bins->counts[1][bin] < MANY) {
        mask[j] = room->bits[j] < limits[find_rank(room->row, columns, j)];
    } else if (!bins->ordered[bin]) {
        mark_bin(room, bin, columns, limits, mask);
        bins->ordered[bin] = 1;
    }
}

/* Mark what stays of a row: the elements whose random number is under the limit of their rank. */
static void mark_row(const RowRoom *room, int64_t columns, const int32_t *limits, uint8_t *mask) {
    find_bins(room->row, columns, room->own);
    fill_bins(room->own, columns, room->bins);
    find_limits(room->bins, room->halves);
    decide(room->bits, room->own, columns, room->bins->limits, mask);
    int64_t j = 0;
    for (; j + 8 <= columns; j += 8) {
        uint64_t eight;
        memcpy(&eight, mask + j, 8);
        if (!(eight & 0x0202020202020202u)) continue;
        for (int64_t k = j; k < j + 8; k++)
            if (mask[k] & OPEN) mark_open(room, k, columns, limits, mask);
    }
    for (; j < columns; j++)
        if (mask[j] & OPEN) mark_open(room, j, columns, limits, mask);
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
    Bins *bins = malloc(sizeof(Bins));
    uint64_t *keys = malloc((size_t)(columns + 1) * (sizeof *keys + 4 * sizeof(float) + 2 * sizeof(uint16_t)));
    if (!bins || !keys) return free(bins), free(keys), -1;
    float *base = (float *)(keys + columns), *x = base + columns;
    uint32_t *row = (uint32_t *)(x + columns);
    int32_t *bits = (int32_t *)(row + columns);
    uint16_t *own = (uint16_t *)(bits + columns), *halves = own + columns;
    for (int64_t rank = 0; rank <= columns; rank++) halves[rank] = (uint16_t)upper_half(limits[least(rank, columns - 1)]);
    const RowRoom room = {base, x, row, bits, own, halves, keys, bins};
    for (int64_t start = 0; start < slab->size; start += columns) {
        load_base(slab, start, columns, base);
        load(slab, which, start, columns, base, x);
        find_magnitudes(x, columns, row);
        find_random(slab->start + start, columns, slab->start, random, bits);
        mark_row(&room, columns, limits, mask + start);
    }
    free(bins);
    free(keys);
    return 0;
}
