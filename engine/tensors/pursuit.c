/* An orthogonal matching pursuit of one target, by the products of all rows with all: batch_omp.py has the formula.
 *
 * The next row is the one whose product with what is left of the target is the largest, in float64. Which rows may be it
 * is known from bounds of all, from all products that are kept, and to go over these is what takes time. So one pass
 * serves some steps, a block. Its first step chooses among all rows, those after it among few that were near the largest;
 * then bounds of all rows are made for all these steps at once, and where a row beats the one that was chosen, the
 * pursuit goes back to there, and chooses among all. So nothing that is chosen hangs on where blocks begin.
 *
 * Sums of doubles are taken in lanes of a fixed number, so that every processor has the same bits.
 */

#include <errno.h>
#include <unistd.h>

#include "pursuit.h"

#define SMALLEST 1e-6 /* of a length: what is less is nothing */
#define MUCH 0.5      /* of a square: where less is left, rounding has left more than there should be */
#define FOUR 4

typedef double Doubles __attribute__((vector_size(8 * FOUR)));

/* What became of a block, or a number of what failed, below 0. */
enum { GOES_ON, ENDS };

INLINE Doubles take_four(const double *x) {
    Doubles four;
    memcpy(&four, x, sizeof four);
    return four;
}

WIDTHS double multiply_doubles(const double *x, const double *y, int64_t size) {
    Doubles sums[FOUR] = {{0}};
    int64_t j = 0;
    for (; j + FOUR * FOUR <= size; j += FOUR * FOUR)
        for (int i = 0; i < FOUR; i++) sums[i] += take_four(x + j + FOUR * i) * take_four(y + j + FOUR * i);
    const Doubles four = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    double sum = (four[0] + four[1]) + (four[2] + four[3]);
    for (; j < size; j++) sum += x[j] * y[j];
    return sum;
}

WIDTHS static void add(double *restrict out, const double *restrict x, double factor, int64_t size) {
    for (int64_t j = 0; j < size; j++) out[j] += factor * x[j];
}

WIDTHS static void divide(double *x, double divisor, int64_t size) {
    for (int64_t j = 0; j < size; j++) x[j] /= divisor;
}

/* out -= the rows of a basis, each times its share. */
WIDTHS static void take_off(double *restrict out, const double *basis, const double *shares, int64_t terms,
                                 int64_t size) {
    int64_t i = 0;
    for (; i + FOUR <= terms; i += FOUR) {
        const double *a = basis + i * size, *b = a + size, *c = b + size, *d = c + size;
        const double by[FOUR] = {shares[i], shares[i + 1], shares[i + 2], shares[i + 3]};
        for (int64_t j = 0; j < size; j++) out[j] -= (by[0] * a[j] + by[1] * b[j]) + (by[2] * c[j] + by[3] * d[j]);
    }
    for (; i < terms; i++) add(out, basis + i * size, -shares[i], size);
}

WIDTHS static void widen(const float *restrict x, int64_t size, double *restrict out) {
    for (int64_t j = 0; j < size; j++) out[j] = x[j];
}

void load_row(const Pursuit *given, int64_t number) {
    decode(given->rows, given->dtype, number * given->width, given->width, given->floats);
    widen(given->floats, given->width, given->row);
}

double measure(const Pursuit *given, int64_t number, const double *left) {
    load_row(given, number);
    return fabs(multiply_doubles(left, given->row, given->width));
}

int is_taken(const Pursuit *given, int64_t count, int64_t number) {
    for (int64_t i = 0; i < count; i++)
        if (given->numbers[i] == number) return 1;
    return 0;
}

/* Of the rows whose bounds reach the largest the one of largest |<left, row>| that is not taken, of equals the first; -1
 * where there is none. `rows` has their numbers, ascending; without it they are all. */
static int64_t choose(const Pursuit *given, const Bounds *bounds, const int64_t *rows, int64_t count, int64_t state,
                      int64_t steps, double *value) {
    int64_t best = -1;
    *value = -1;
    for (int64_t i = 0; i < count; i++) {
        const int64_t number = rows ? rows[i] : i;
        if (!(bounds->most[i] >= bounds->low) || is_taken(given, steps, number)) continue;
        const double found = measure(given, number, left_at(given, state));
        if (found > *value) best = number, *value = found;
    }
    return best;
}

/* What of the row in its room is orthogonal to the basis, into the next place of that, and its shares in it; again where
 * much was taken off. Returns its square. */
static double find_part(const Pursuit *given, int64_t steps, double square) {
    double *part = given->basis + steps * given->width, *shares = given->shares, left = square;
    memcpy(part, given->row, (size_t)given->width * sizeof(double));
    memset(shares, 0, (size_t)steps * sizeof(double));
    for (int again = 0; again < 2 && (!again || left < MUCH * square); again++) {
        double *more = given->inverse + steps * given->terms; /* nothing is there yet */
        for (int64_t i = 0; i < steps; i++)
            more[i] = multiply_doubles(given->basis + i * given->width, part, given->width);
        take_off(part, given->basis, more, steps, given->width);
        add(shares, more, 1, steps);
        left = multiply_doubles(part, part, given->width);
    }
    return left;
}

/* Take a row, after so many steps: makes the next state. Returns 0 where it adds no direction. */
static int take(const Pursuit *given, int64_t number, int64_t state, int64_t steps) {
    const int64_t width = given->width;
    double *part = given->basis + steps * width, *column = given->inverse + steps * given->terms;
    load_row(given, number);
    const double square = multiply_doubles(given->row, given->row, width);
    const double size = sqrt(find_part(given, steps, square));
    given->sizes[steps] = sqrt(square);
    if (!(size > SMALLEST * given->sizes[steps])) return 0;
    divide(part, size, width);
    memset(column, 0, (size_t)steps * sizeof(double));
    for (int64_t i = 0; i < steps; i++) add(column, given->inverse + i * given->terms, -given->shares[i] / size, i + 1);
    column[steps] = 1 / size;
    const double explained = multiply_doubles(part, left_at(given, state), width);
    memcpy(left_at(given, state + 1), left_at(given, state), (size_t)width * sizeof(double));
    add(left_at(given, state + 1), part, -explained, width);
    memcpy(weights_at(given, state + 1), weights_at(given, state), (size_t)steps * sizeof(double));
    weights_at(given, state + 1)[steps] = 0;
    add(weights_at(given, state + 1), column, explained, steps + 1);
    return 1;
}

/* Read a row of a file of int16; returns 0, or below 0 the number of what failed. */
static int read_products(int32_t file, int64_t number, int64_t count, int16_t *out) {
    char *at = (char *)out;
    off_t from = (off_t)(number * count * (int64_t)sizeof(int16_t));
    for (size_t rest = (size_t)count * sizeof(int16_t); rest;) {
        const ssize_t got = pread(file, at, rest, from);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return got ? -errno : -EIO;
        at += got, from += got, rest -= (size_t)got;
    }
    return 0;
}

/* Choose and take for at most `most` steps; `taken` gets how many were. */
static int run_block(const Pursuit *given, int32_t file, Bounds *bounds, int64_t most, Block *block, int64_t *taken) {
    int64_t count = 0, step = block->first;
    float near_most[NEAR];
    Bounds near_bounds = {near_most, 0};
    block->states = 0;
    for (*taken = 0; *taken < most && step < given->terms; step++) {
        const int64_t state = *taken;
        const double left = sqrt(multiply_doubles(left_at(given, state), left_at(given, state), given->width));
        if (!(left > SMALLEST * given->length)) return ENDS;
        double *value = block->values + state;
        if (state) look_at_near(given, state, step, count, &near_bounds);
        const int64_t found = state ? choose(given, &near_bounds, given->near, count, state, step, value)
                                    : choose(given, bounds, NULL, given->count, state, step, value);
        if (found < 0) return state ? GOES_ON : ENDS;
        given->numbers[step] = found;
        block->states++;
        if (!take(given, found, state, step)) return ENDS;
        ++*taken;
        if (step + 1 == given->terms) return ENDS;
        const int failed = read_products(file, found, given->count, given->products + step * given->count);
        if (failed) return failed;
        if (!state && most > 1) count = find_near(given, bounds, step);
        gather_near(given, step, step + 1, count);
    }
    return GOES_ON;
}

/* The next `count` elements of the room, where there is one, of which so many bytes are used. */
static void *cut(char *room, int64_t *used, int64_t count, size_t size) {
    void *found = room ? room + *used : NULL;
    *used += count * (int64_t)size;
    return found;
}

/* Lay the room out; returns how many bytes it has. */
static int64_t lay_out(Pursuit *given, char *room) {
    const int64_t terms = given->terms, width = given->width, states = AHEAD + 1;
    double **const doubles[] = {&given->basis,   &given->inverse, &given->sizes, &given->left,
                                &given->weights, &given->row,     &given->shares};
    const int64_t sizes[] = {terms * width, terms * terms, terms, states * width, states * terms, width, terms};
    int64_t used = 0;
    for (int i = 0; i < 7; i++) *doubles[i] = cut(room, &used, sizes[i], sizeof(double));
    given->near = cut(room, &used, NEAR, sizeof(int64_t));
    given->most = cut(room, &used, given->count, sizeof(float));
    given->factors = cut(room, &used, AHEAD * terms, sizeof(float));
    given->floats = cut(room, &used, width, sizeof(float));
    given->products = cut(room, &used, terms * given->count, sizeof(int16_t));
    given->near_products = cut(room, &used, terms * NEAR, sizeof(int16_t));
    return used;
}

/* The bytes of the room that a pursuit works in. */
int64_t mergemill_pursuit_bytes(int64_t count, int64_t width, int64_t terms) {
    Pursuit given = {.count = count, .width = width, .terms = terms};
    return lay_out(&given, NULL);
}

/* The numbers of the rows that are taken of [count, width], at most `terms`, in their order, and their weights; returns
 * how many they are, or below 0 the number of what failed. file: the products of all with all. */
int64_t mergemill_pursue(const void *rows, int32_t dtype, int64_t count, int64_t width, int64_t terms,
                         const float *lengths, int32_t file, double unsure, void *room, const double *target,
                         const float *start, int64_t *numbers, double *weights) {
    Pursuit given = {.rows = rows, .dtype = dtype, .count = count, .width = width, .terms = terms, .lengths = lengths,
                     .start = start, .unsure = unsure, .numbers = numbers};
    lay_out(&given, room);
    given.length = sqrt(multiply_doubles(target, target, width));
    memcpy(given.left, target, (size_t)width * sizeof(double));
    Bounds bounds = {given.most, 0};
    Block block = {0};
    look_at_all(&given, &block, 0, 1, &bounds);
    for (int64_t most = AHEAD;;) {
        int64_t taken;
        int became = run_block(&given, file, &bounds, most, &block, &taken);
        if (became < 0) return became;
        const int64_t right = look_at_all(&given, &block, 1, block.states + (became == GOES_ON), &bounds);
        most = least(AHEAD, 2 * most);
        if (right < block.states) {
            became = GOES_ON, block.states = taken = most = right;
            look_at_all(&given, &block, right, right + 1, &bounds);
        }
        block.first += taken;
        memmove(given.left, left_at(&given, taken), (size_t)width * sizeof(double));
        memmove(given.weights, weights_at(&given, taken), (size_t)block.first * sizeof(double));
        if (became == ENDS) break;
    }
    memcpy(weights, given.weights, (size_t)block.first * sizeof(double));
    return block.first;
}
