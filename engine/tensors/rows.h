/* What marking rows and reading them share: a row, what is known of it, and where it lies. */

#ifndef MERGEMILL_ROWS_H
#define MERGEMILL_ROWS_H

#include "slab.h"

#define OCTAVES 7      /* that have bins of their own, about half of them below the row's usual magnitude */
#define MOST_STEPS 7   /* at most 2**7 steps in an octave */
#define MOST_BINS (2 * OCTAVES << MOST_STEPS)

/* A row's elements by the bits they begin with. Even bins have a single magnitude, bin 0 zero; odd ones what lies between. */
typedef struct {
    uint32_t counts[2][MOST_BINS]; /* of the row's two halves: two counts in turn are seldom of one bin and wait less */
    uint32_t ranks[MOST_BINS];     /* of each bin's first */
    uint16_t limits[MOST_BINS + 1]; /* the upper half, made unsigned, of the limit of each bin's first rank */
    uint8_t ordered[MOST_BINS];
} Bins;

/* Room for a row: its magnitudes, the upper halves of its random numbers, bins, which elements are open, and places in the
 * bin among those of its half of the row; a bit for each element that stays, and that is open; the limits' upper halves;
 * keys to put it in order. */
typedef struct {
    float *row;
    uint32_t *index, *places;
    uint16_t *halves, *own, *limits;
    uint8_t *stays, *open;
    uint64_t *keys;
    Bins *bins;
} RowRoom;

/* Where a row lies, its limits by rank, and the two keys of each BLOCK from the slab's first on. */
typedef struct {
    int64_t start, columns, first;
    const int32_t *limits;
    const uint32_t *random;
} RowPlace;

static inline uint32_t upper_half(int32_t limit) { return ((uint32_t)limit ^ 0x80000000u) >> 16; }

/* Mark what stays of a row: the elements whose random number is under the limit of their rank. */
INSIDE void mark_row(const RowRoom *room, const RowPlace *place);

#endif
