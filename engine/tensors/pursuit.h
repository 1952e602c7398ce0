/* What the pursuit of a target and the passes over all rows share. */

#ifndef MERGEMILL_PURSUIT_H
#define MERGEMILL_PURSUIT_H

#include "slab.h"

#define AHEAD 8  /* steps of a block */
#define NEAR 256 /* rows that are looked at ahead */
#define ONE 32767.0
#define ABOUT 0.999999 /* on what floats are compared with: they are rounded */

/* Rows, and the room that a pursuit among them works in. A state is what is left of the target after some steps of a
 * block, and the weights of the rows that were taken until then. */
typedef struct {
    const void *rows; /* [count, width], of this dtype */
    int32_t dtype;
    int64_t count, width, terms;
    const float *lengths; /* of the rows; NaN for those that are none */
    const float *start;   /* products with the target over lengths, [count] */
    double length;        /* of the target */
    double unsure;        /* the share of lengths within which sums of products are known */
    double *basis;        /* [terms, width]: orthonormal, of the rows taken */
    double *inverse;      /* [terms, terms]: of these the weights of rows, one basis row's after the other's */
    double *sizes;        /* [terms]: lengths of the rows taken */
    double *left;         /* [AHEAD + 1, width] */
    double *weights;      /* [AHEAD + 1, terms] */
    double *row, *shares; /* [width], [terms] */
    int64_t *numbers;     /* [terms]: of the rows taken */
    int64_t *near;        /* [NEAR]: numbers of rows */
    float *most;          /* [count]: what the products with what is left are at most */
    float *factors;       /* [AHEAD, terms] */
    float *floats;        /* [width] */
    int16_t *products;    /* [terms, count]: of the rows taken with all, over both lengths, times ONE */
    int16_t *near_products; /* [terms, NEAR]: of these the near rows' */
} Pursuit;

/* Of some rows what their products are at most, and the largest of what any is at least. */
typedef struct {
    float *most, low;
} Bounds;

/* What was chosen ahead: in the state i, after `first` + i steps, numbers[first + i], whose product with what was left is
 * values[i]. */
typedef struct {
    int64_t first, states;
    double values[AHEAD];
} Block;

static inline double *left_at(const Pursuit *given, int64_t state) { return given->left + state * given->width; }

static inline double *weights_at(const Pursuit *given, int64_t state) { return given->weights + state * given->terms; }

/* Whether a row is among the first so many that were taken. */
INSIDE int is_taken(const Pursuit *given, int64_t count, int64_t number);
/* Decode a row into its room. */
INSIDE void load_row(const Pursuit *given, int64_t number);
INSIDE double multiply_doubles(const double *x, const double *y, int64_t size);
/* |<left, row>| of one row. */
INSIDE double measure(const Pursuit *given, int64_t number, const double *left);
/* Look at all rows in the states from `from` to before `states`, of which the block has chosen in those before
 * block->states; returns the first in which another row is right, or `states`. Leaves the bounds of one state more. */
INSIDE int64_t look_at_all(const Pursuit *given, const Block *block, int64_t from, int64_t states, Bounds *bounds);
/* The bounds of near rows in a state, after so many steps. */
INSIDE void look_at_near(const Pursuit *given, int64_t state, int64_t steps, int64_t count, Bounds *bounds);
/* The rows that are nearest to the largest, ascending, and their products: returns how many. */
INSIDE int64_t find_near(const Pursuit *given, const Bounds *bounds, int64_t steps);
/* Of the near rows, their products with those that were taken from the step `from` to before `to`. */
INSIDE void gather_near(const Pursuit *given, int64_t from, int64_t to, int64_t count);

#endif
