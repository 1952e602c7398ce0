/* Two tensors compared in one pass over slabs as they are stored; compared.py says what is made of what is counted here.
 *
 * The pair are the tensors themselves, or what each is more than a base; the third is their difference, or the base. A
 * side is a difference of which more is asked: without a base there is one, the third; with one, both of the pair.
 */

#include "slab.h"

#define SKETCHED 32 /* sums of rows */
#define SAMPLED 8   /* one element in so many goes into the histogram */
#define FIELDS 256  /* of a float32's exponent */
#define MAGNITUDE 0x7FFFFFFF
#define FOUR 4 /* doubles that are worked on at once: compilers keep larger vectors in memory */
enum { ZEROS = 0, LARGEST = 2, SIGNED = 4, OPPOSITE = 5, UNLIKE = 6, EXPONENTS = 9 }; /* of the counts */
typedef double Doubles __attribute__((vector_size(8 * FOUR)));
typedef float Singles __attribute__((vector_size(4 * FOUR)));

INLINE Doubles widen(const float *x) {
    Singles four;
    memcpy(&four, x, sizeof four);
    return __builtin_convertvector(four, Doubles);
}

/* Add the squares of all three and the products of the pair to 32 lanes each; what is beyond `size` is 0. */
WIDTHS static void add_products(const float *x, const float *y, const float *z, int64_t size, double *lanes) {
    for (int64_t first = 0; first < LAST; first += FOUR) {
        Doubles xx, yy, zz, xy;
        memcpy(&xx, lanes + first, sizeof xx);
        memcpy(&yy, lanes + LAST + first, sizeof yy);
        memcpy(&zz, lanes + 2 * LAST + first, sizeof zz);
        memcpy(&xy, lanes + 3 * LAST + first, sizeof xy);
        for (int64_t j = first; j < size; j += LAST) {
            const Doubles a = widen(x + j), b = widen(y + j), c = widen(z + j);
            xx += a * a;
            yy += b * b;
            zz += c * c;
            xy += a * b;
        }
        memcpy(lanes + first, &xx, sizeof xx);
        memcpy(lanes + LAST + first, &yy, sizeof yy);
        memcpy(lanes + 2 * LAST + first, &zz, sizeof zz);
        memcpy(lanes + 3 * LAST + first, &xy, sizeof xy);
    }
}

/* How many are 0; `largest` becomes the bits of the largest magnitude. */
WIDTHS static int64_t look_at(const float *x, int64_t size, int64_t *largest) {
    int32_t zeros = 0, most = 0;
    for (int64_t j = 0; j < size; j++) {
        const int32_t bits = (int32_t)(float_to_bits(x[j]) & MAGNITUDE);
        zeros += bits == 0;
        most = bits > most ? bits : most;
    }
    if (most > *largest) *largest = most;
    return zeros;
}

/* Of how many both are numbers other than 0, and of how many of these the signs differ. */
WIDTHS static void count_signs(const float *x, const float *y, int64_t size, int64_t *both, int64_t *opposite) {
    int32_t with_sign = 0, apart = 0;
    for (int64_t j = 0; j < size; j++) {
        const int32_t counts = (fabsf(x[j]) > 0) & (fabsf(y[j]) > 0);
        with_sign += counts;
        apart += counts & (int32_t)((float_to_bits(x[j]) ^ float_to_bits(y[j])) >> 31);
    }
    *both += with_sign;
    *opposite += apart;
}

WIDTHS static int64_t count_unlike_halves(const uint16_t *a, const uint16_t *b, int64_t size) {
    uint16_t count = 0;
    for (int64_t j = 0; j < size; j++) count += a[j] != b[j];
    return count;
}

WIDTHS static int64_t count_unlike_words(const uint32_t *a, const uint32_t *b, int64_t size) {
    int32_t count = 0;
    for (int64_t j = 0; j < size; j++) count += a[j] != b[j];
    return count;
}

static int64_t count_unlike(const Slab *slab, int64_t i, int64_t k, int64_t start, int64_t size) {
    const void *a = slab->data[i], *b = slab->data[k];
    if (slab->dtypes[i] == F32) return count_unlike_words((const uint32_t *)a + start, (const uint32_t *)b + start, size);
    return count_unlike_halves((const uint16_t *)a + start, (const uint16_t *)b + start, size);
}

/* Zeros go where what is not finite goes, and are not told. */
static void count_exponents(const float *x, int64_t first, int64_t size, int64_t *counts) {
    for (int64_t j = first; j < size; j += SAMPLED) {
        const uint32_t bits = float_to_bits(x[j]) & MAGNITUDE;
        counts[bits ? bits >> 23 : FIELDS - 1]++;
    }
}

/* Add a piece of a row, times a sign, to its sum, where there is one; returns its squares. */
WIDTHS static double add_row(const float *x, int64_t size, float sign, float *sum) {
    Doubles even = {0}, odd = {0};
    int64_t j = 0;
    for (; sum && j + 2 * FOUR <= size; j += 2 * FOUR) {
        Singles one, other, to_one, to_other;
        memcpy(&one, x + j, sizeof one);
        memcpy(&other, x + j + FOUR, sizeof other);
        memcpy(&to_one, sum + j, sizeof to_one);
        memcpy(&to_other, sum + j + FOUR, sizeof to_other);
        to_one += one * sign;
        to_other += other * sign;
        memcpy(sum + j, &to_one, sizeof to_one);
        memcpy(sum + j + FOUR, &to_other, sizeof to_other);
        const Doubles a = __builtin_convertvector(one, Doubles), b = __builtin_convertvector(other, Doubles);
        even += a * a;
        odd += b * b;
    }
    even += odd;
    double total = 0;
    for (int64_t k = 0; k < FOUR; k++) total += even[k];
    for (; j < size; j++) {
        if (sum) sum[j] += x[j] * sign;
        total += (double)x[j] * (double)x[j];
    }
    return total;
}

/* splitmix64. */
static uint64_t mix(uint64_t x) {
    x = (x + 1) * 0x9E3779B97F4A7C15u;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

/* Which sum a row goes into: of each 32 rows one into each. */
static int64_t find_sum(uint64_t row) { return (int64_t)((row ^ mix(row / SKETCHED | 1ull << 63)) % SKETCHED); }

/* What is known of the rows of a slab. */
typedef struct {
    int64_t columns, count;
    double *fourths; /* [2, blocks]: the squares of rows' squares, added up */
    double *squares; /* [3, rows]: of each side, and of what they are taken from; or NULL */
    float *sketch;   /* [2, SKETCHED, columns], or NULL */
    double so_far[3];
} Rows;

/* Take a chunk's pieces of rows: of both sides, the second of which may be missing, and of what they are taken from. */
static void take_rows(Rows *rows, const Slab *slab, const Chunk *chunk, const float *const *sides, const float *own) {
    const int64_t first_block = slab->start / slab->block, blocks = (slab->size + slab->block - 1) / slab->block;
    const int64_t columns = rows->columns, start = slab->start + chunk->start;
    for (int64_t at = 0, run; at < chunk->here; at += run) {
        const int64_t row = (start + at) / columns, column = (start + at) % columns;
        run = least(columns - column, chunk->here - at);
        const float sign = mix((uint64_t)row) & 1 ? -1.0f : 1.0f;
        float *sketch = rows->sketch ? rows->sketch + find_sum((uint64_t)row) * columns + column : NULL;
        for (int64_t i = 0; i < 2 && sides[i]; i++)
            rows->so_far[i] += add_row(sides[i] + at, run, sign, sketch ? sketch + i * SKETCHED * columns : NULL);
        if (rows->squares) rows->so_far[2] += add_row(own + at, run, sign, NULL);
        if (column + run < columns) continue;
        for (int64_t i = 0; i < 2 && sides[i]; i++)
            rows->fourths[i * blocks + chunk->block - first_block] += rows->so_far[i] * rows->so_far[i];
        for (int64_t i = 0; i < 3; i++) {
            if (rows->squares) rows->squares[i * rows->count + row - slab->start / columns] = rows->so_far[i];
            rows->so_far[i] = 0;
        }
    }
}

WIDTHS static void subtract_into(const float *restrict x, const float *restrict less, int64_t size, float *restrict out) {
    for (int64_t j = 0; j < size; j++) out[j] = x[j] - less[j];
}

static void fill_up(float *x, int64_t size) {
    if (size % LAST) memset(x + size, 0, (size_t)(LAST - size % LAST) * sizeof(float));
}

static int64_t count_cuts(const Slab *slab) {
    const int64_t each = (slab->block + BLOCK - 1) / BLOCK, rest = slab->size % slab->block;
    return slab->size / slab->block * each + (rest + BLOCK - 1) / BLOCK;
}

/* Compare two tensors, or with a base three. `alike` has a bit for each pair (first and second, first and base, second
 * and base) whose bytes are to be compared. All but `sums` [4, cuts] and `squares` is added to. */
int32_t mergemill_stored_compared(const Slab *slab, int32_t alike, int64_t cuts, double *sums, int64_t *counts,
                                  int64_t columns, double *fourths, double *squares, float *sketch) {
    if (!is_sound(slab) || slab->count != 2 || cuts != count_cuts(slab) || columns < 0) return REFUSED;
    if (columns && (slab->block % columns || slab->size % columns)) return REFUSED;
    const int base = slab->has_base;
    const int64_t pairs[3][2] = {{base, base + 1}, {base, 0}, {base + 1, 0}};
    for (int64_t i = 0; i < 3; i++) {
        if (!(alike >> i & 1)) continue;
        const int32_t one = slab->dtypes[pairs[i][0]], other = slab->dtypes[pairs[i][1]];
        if ((i && !base) || one != other || one == CODED) return REFUSED;
    }
    float x[CHUNK], y[CHUNK], z[CHUNK];
    double lanes[4 * LAST];
    Rows rows = {columns, columns ? slab->size / columns : 0, fourths, squares, sketch, {0}};
    const float *const sides[2] = {base ? x : z, base ? y : NULL};
    for (Chunk chunk = {0}; next_chunk(slab, &chunk);) {
        const int64_t start = chunk.start, here = chunk.here;
        for (int64_t i = 0; i < 3; i++)
            if (alike >> i & 1) counts[UNLIKE + i] += count_unlike(slab, pairs[i][0], pairs[i][1], start, here);
        if (base) load_base(slab, start, here, z);
        load_plain(slab, 0, start, here, z, x);
        load_plain(slab, 1, start, here, z, y);
        if (!base) subtract_into(y, x, here, z);
        for (int64_t i = 0; i < 2 && sides[i]; i++) {
            counts[ZEROS + i] += look_at(sides[i], here, counts + LARGEST + i);
            count_exponents(sides[i], -(slab->start + start) & (SAMPLED - 1), here, counts + EXPONENTS + i * FIELDS);
        }
        count_signs(x, y, here, counts + SIGNED, counts + OPPOSITE);
        if (columns) take_rows(&rows, slab, &chunk, sides, base ? z : x);
        if (chunk.sampled) memset(lanes, 0, sizeof lanes);
        fill_up(x, here);
        fill_up(y, here);
        fill_up(z, here);
        add_products(x, y, z, here, lanes);
        const int64_t end = (slab->start + start + here) % slab->block;
        if (end && end % BLOCK && start + here < slab->size) continue;
        for (int64_t k = 0; k < 4; k++) {
            double total = 0;
            for (int64_t j = 0; j < LAST; j++) total += lanes[k * LAST + j];
            sums[k * cuts] = total;
        }
        sums++;
    }
    return 0;
}
