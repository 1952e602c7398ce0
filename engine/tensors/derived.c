/* What some methods derive from slabs as they are stored before they rank it: scores of elements among models (PCB), and
 * importances by the divergence of rows (Arcee). exp, log and tanh are those of elementary.py, operation by operation.
 */

#include "slab.h"

#define LN2_HIGH 0x1.62e42fee00000p-1
#define LN2_LOW 0x1.a39ef35793c76p-33
#define LOG2_E 0x1.71547652b82fep+0
#define WHOLE 0x1.8p52         /* what is added to this is rounded to a whole number, ties to even */
#define ROOT_HALF 0x3FE6A09E667F3BCDu
#define MANTISSA 52
#define ENDLESS (double)bits_to_float(INFINITE)
#define NOTHING (double)bits_to_float(INFINITE | 1u << 22)
#define EPS 1e-8               /* added to every probability */

INLINE uint64_t double_to_bits(double value) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE double bits_to_double(uint64_t bits) {
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* What is no number stays that. */
INLINE double clamp(double x, double least, double most) {
    x = x < least ? least : x;
    return x > most ? most : x;
}

/* e^x = scale * (1 + the result). */
INLINE double reduce(double x, double *scale) {
    const double shifted = x * LOG2_E + WHOLE, power = shifted - WHOLE;
    *scale = bits_to_double((double_to_bits(shifted) - double_to_bits(WHOLE) + 1023) << MANTISSA);
    x -= power * LN2_HIGH;
    x -= power * LN2_LOW;
    const double square = x * x;
    double coth = square * -0x1.22805d644267fp-30 + 0x1.66a8f2bf70ebep-25;
    coth = coth * square + -0x1.bbd779334ef0bp-20;
    coth = coth * square + 0x1.1566abc011566p-14;
    coth = coth * square + -0x1.6c16c16c16c17p-9;
    coth = coth * square + 0x1.5555555555555p-3;
    coth = coth * square + 2.0;
    return x * 2.0 / (coth - x);
}

INLINE double exp_of(double x) {
    double scale;
    const double less_one = reduce(clamp(x, -708.0, 709.0), &scale);
    return (less_one + 1.0) * scale;
}

INLINE double tanh_of(double x) {
    double scale;
    const double less_one = reduce(clamp(x, -20.0, 20.0) * 2.0, &scale);
    const double whole = less_one * scale + (scale - 1.0);
    return whole / (whole + 2.0);
}

INLINE double log_of(double x) {
    const uint64_t bits = double_to_bits(x);
    const uint64_t exponent = ((bits - ROOT_HALF + (1024ull << MANTISSA)) >> MANTISSA) - 1024; /* modulo 2**64 */
    const double near = bits_to_double(bits - (exponent << MANTISSA)); /* from the root of a half to that of two */
    const double power = bits_to_double(double_to_bits(WHOLE) + exponent) - WHOLE;
    double value = (near - 1.0) / (near + 1.0);
    const double square = value * value;
    double series = square * 0x1.642c8590b2164p-5 + 0x1.8618618618618p-5;
    series = series * square + 0x1.af286bca1af28p-5;
    series = series * square + 0x1.e1e1e1e1e1e1ep-5;
    series = series * square + 0x1.1111111111111p-4;
    series = series * square + 0x1.3b13b13b13b14p-4;
    series = series * square + 0x1.745d1745d1746p-4;
    series = series * square + 0x1.c71c71c71c71cp-4;
    series = series * square + 0x1.2492492492492p-3;
    series = series * square + 0x1.999999999999ap-3;
    series = series * square + 0x1.5555555555555p-2;
    series = series * square + 1.0;
    value = value * 2.0 * series;
    value += power * LN2_LOW;
    return value + power * LN2_HIGH;
}

/* ---------------------------------------------------------------------------------------------------------- scores */

WIDTHS static void add_wide(double *restrict total, const float *restrict x, int64_t size) {
    for (int64_t j = 0; j < size; j++) total[j] += (double)x[j];
}

void sum_all(float *const *x, int64_t count, int64_t size, double *restrict total) {
    memset(total, 0, (size_t)size * sizeof *total);
    for (int64_t i = 0; i < count; i++) add_wide(total, x[i], size);
}

typedef struct {
    double least, span; /* of the tensor's magnitudes; of a span of 0 none is larger than another */
    double models;
} Scale;

WIDTHS static void find_scores(const float *restrict x, const double *restrict total, int64_t size, Scale scale,
                               float *restrict out) {
    const double known = scale.span != 0 ? 1.0 : 0.0, span = scale.span != 0 ? scale.span : 1.0;
    for (int64_t j = 0; j < size; j++) {
        const double wide = (double)x[j], agreement = tanh_of(wide * total[j]);
        double relative = (fabs(wide) - scale.least) / span;
        relative = known != 0 ? relative : 0.0;
        out[j] = (float)(exp_of((relative * relative - 1.0) * scale.models) * agreement);
    }
}

/* Mark what may reach `least`, which is above 0, by a bound from above: tanh(x) is at most x, and 1; e^x at most the line
 * between the powers of two beside it, and a hundredth of an octave, which is far more than floats lose here. What is not
 * finite is marked. */
WIDTHS static void mark_candidates(const float *restrict x, const double *restrict total, int64_t size, Scale scale,
                                   float least, uint8_t *restrict mark) {
    const float from = scale.span != 0 ? (float)scale.least : 0.0f;
    const float inverse = scale.span != 0 ? (float)(1 / scale.span) : 0.0f;
    const float slope = (float)(scale.models * LOG2_E);
    for (int64_t j = 0; j < size; j++) {
        const float agreement = (float)((double)x[j] * total[j]), relative = (fabsf(x[j]) - from) * inverse;
        float power = (relative * relative - 1) * slope + 127.01f;
        power = power > 1 ? power : 1;
        power = power < 254 ? power : 254;
        const float most = bits_to_float((uint32_t)(int32_t)(power * 0x1p23f));
        const float bound = most * (agreement > 1 ? 1 : agreement) + (x[j] - x[j]);
        mark[j] = !(bound < least);
    }
}

/* Write which are marked, in order; returns how many. Beyond `size` there is room for a word of marks. */
static int64_t list_marked(uint8_t *mark, int64_t size, uint16_t *index) {
    int64_t found = 0;
    memset(mark + size, 0, 8);
    for (int64_t j = 0; j < size; j += 8) {
        uint64_t eight;
        memcpy(&eight, mark + j, 8);
        for (; eight; eight &= eight - 1) index[found++] = (uint16_t)(j + (__builtin_ctzll(eight) >> 3));
    }
    return found;
}

/* Whether the bound holds: no number is so small that it is lost, nor so large. */
static int has_bound(Scale scale, float least) {
    const int measured = scale.span == 0 || (scale.span > 1e-30 && scale.span < 1e30 && scale.least >= 0);
    return measured && least >= 1e-30f && scale.models <= 64;
}

int64_t score(const Slab *slab, int64_t which, const float *x, const double *total, int64_t size, float least,
              uint16_t *index, float *scores) {
    const double span = slab->derived->span[which];
    const Scale scale = {slab->derived->least[which], span > 0 && span < ENDLESS ? span : 0, (double)slab->count};
    if (!has_bound(scale, least)) {
        for (int64_t j = 0; j < size; j++) index[j] = (uint16_t)j;
        find_scores(x, total, size, scale, scores);
        return size;
    }
    uint8_t mark[CHUNK + 8];
    float own[CHUNK];
    double all[CHUNK];
    mark_candidates(x, total, size, scale, least, mark);
    const int64_t found = list_marked(mark, size, index);
    for (int64_t k = 0; k < found; k++) own[k] = x[index[k]], all[k] = total[index[k]];
    find_scores(own, all, found, scale, scores);
    return found;
}

/* Have the extremes hold those of |x|, too; from the first x on that is no number they are none. */
WIDTHS static void widen(const float *x, int64_t size, double *extremes) {
    uint32_t low = INFINITE, high = 0; /* the bits of magnitudes order as these do */
    for (int64_t j = 0; j < size; j++) {
        const uint32_t own = float_to_bits(x[j]) & 0x7FFFFFFFu;
        low = own < low ? own : low;
        high = own > high ? own : high;
    }
    if (!size) return;
    const double least = (double)bits_to_float(low), most = (double)bits_to_float(high);
    extremes[0] = least < extremes[0] ? least : extremes[0];
    extremes[1] = most > extremes[1] ? most : extremes[1];
    if (high > INFINITE) extremes[0] = extremes[1] = NOTHING;
}

/* Write the least and the largest magnitude of each tensor; where one is no number, neither is one. */
int32_t mergemill_stored_extremes(const Slab *slab, double *extremes) {
    if (!is_sound(slab)) return REFUSED;
    Room room;
    if (!make_room(&room, slab->count)) return drop_room(&room), NO_MEMORY;
    for (int64_t i = 0; i < slab->count; i++) extremes[2 * i] = ENDLESS, extremes[2 * i + 1] = -ENDLESS;
    for (Chunk chunk = {0}; next_chunk(slab, &chunk); ) {
        load_base(slab, chunk.start, chunk.here, room.base);
        for (int64_t i = 0; i < slab->count; i++) {
            load(slab, i, chunk.start, chunk.here, room.base, room.x[i]);
            widen(room.x[i], chunk.here, extremes + 2 * i);
        }
    }
    drop_room(&room);
    return 0;
}

/* ----------------------------------------------------------------------------------------------------- importances */

WIDTHS static void weigh(const float *restrict base, const float *restrict other, int64_t size, float divergence,
                         float *restrict out) {
    for (int64_t j = 0; j < size; j++) out[j] = fabsf(other[j] - base[j]) * divergence;
}

void find_importances(const Slab *slab, const Chunk *chunk, const float *base, const float *other, float *out) {
    const Derived *derived = slab->derived;
    const int64_t first = slab->start + chunk->start;
    for (int64_t at = 0, here; at < chunk->here; at += here) {
        const int64_t row = (first + at) / derived->columns;
        here = least(chunk->here - at, (row + 1) * derived->columns - first - at);
        weigh(base + at, other + at, here, (float)derived->divergences[row], out + at);
    }
}

WIDTHS double fold_row(double *row, int64_t columns) {
    while (columns > 1) {
        const int64_t half = columns - columns / 2;
        const double *right = row + half;
        for (int64_t j = 0; j < columns - half; j++) row[j] += right[j];
        columns = half;
    }
    return row[0];
}

/* The largest number of a row: floats order as integers do, once the negative ones have their other bits turned. */
WIDTHS static double find_most(const float *x, int64_t columns) {
    int32_t most = (int32_t)(0x80000000u | (INFINITE ^ INT32_MAX)); /* of the negative infinity */
    for (int64_t j = 0; j < columns; j++) {
        const int32_t bits = (int32_t)float_to_bits(x[j]), own = bits ^ (bits >> 31 & INT32_MAX);
        most = own > most && own <= (int32_t)INFINITE ? own : most;
    }
    return (double)bits_to_float((uint32_t)(most ^ (most >> 31 & INT32_MAX)));
}

WIDTHS static void take_powers(const float *restrict x, int64_t columns, double most, double *restrict out,
                               double *restrict again) {
    for (int64_t j = 0; j < columns; j++) out[j] = again[j] = exp_of((double)x[j] - most);
}

WIDTHS static void take_logs(const double *restrict before, double less, const double *restrict after, double own,
                             int64_t columns, double *restrict out) {
    for (int64_t j = 0; j < columns; j++) {
        const double other = after[j] / own + EPS;
        out[j] = log_of(other / (before[j] / less + EPS)) * other;
    }
}

/* Write the divergence of each row of two tensors, which are whole rows of `columns`: ``sum(after * log(after / before))``
 * of their softmaxes. */
int32_t mergemill_stored_divergences(const Slab *slab, int64_t columns, double *out) {
    if (!is_sound(slab) || slab->has_base || slab->count != 2 || columns < 1 || slab->size % columns) return REFUSED;
    if (columns > INT64_MAX / 64) return REFUSED;
    double *wide = malloc((size_t)columns * (3 * sizeof(double) + sizeof(float)));
    if (!wide) return NO_MEMORY;
    double *scratch = wide + 2 * columns;
    float *x = (float *)(wide + 3 * columns);
    for (int64_t start = 0; start < slab->size; start += columns) {
        double sums[2];
        for (int64_t i = 0; i < 2; i++) {
            load(slab, i, start, columns, 0, x);
            take_powers(x, columns, find_most(x, columns), wide + i * columns, scratch);
            sums[i] = fold_row(scratch, columns);
        }
        take_logs(wide, sums[0], wide + columns, sums[1], columns, scratch);
        const double divergence = fold_row(scratch, columns);
        const double odd = (sums[0] + sums[1]) * 0; /* of rows that have no softmax, no number */
        *out++ = (divergence < 0 ? 0 : divergence) + odd;
    }
    free(wide);
    return 0;
}
