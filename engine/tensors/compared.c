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
typedef int16_t Halves __attribute__((vector_size(32)));
typedef struct {
    int64_t of[4][FIELDS];
} Fields;
_Static_assert(FIELDS == 256, "the last field is eight bits of ones");

/* One by one: of that compilers make one instruction, of a conversion of vectors (gcc 12) six and a way through memory. */
INLINE Doubles widen(const float *x) { return (Doubles){x[0], x[1], x[2], x[3]}; }

/* Four sums beside each other, of eight lanes: of the squares of all three and of the products of the pair. */
typedef struct {
    Doubles of[4][2];
} Sums;

/* Add the squares of all three and the products of the pair to 32 lanes each; what is beyond `size` is 0. Eight lanes at
 * a time: their sums stay in registers, and none waits for the one before. */
WIDTHS static void add_products(const float *x, const float *y, const float *z, int64_t size, double *lanes) {
    for (int64_t first = 0; first < LAST; first += 2 * FOUR) {
        Sums sums;
        for (int64_t k = 0; k < 4; k++) memcpy(sums.of[k], lanes + k * LAST + first, sizeof sums.of[k]);
        for (int64_t j = first; j < size; j += LAST)
            for (int64_t half = 0; half < 2; half++) {
                const int64_t at = j + half * FOUR;
                const Doubles a = widen(x + at), b = widen(y + at), c = widen(z + at);
                sums.of[0][half] += a * a;
                sums.of[1][half] += b * b;
                sums.of[2][half] += c * c;
                sums.of[3][half] += a * b;
            }
        for (int64_t k = 0; k < 4; k++) memcpy(lanes + k * LAST + first, sums.of[k], sizeof sums.of[k]);
    }
}

/* What is seen of a chunk of one side. */
typedef struct {
    int32_t zeros, most; /* how many are 0; the bits of the largest magnitude */
} Seen;

WIDTHS static Seen look_at(const float *x, int64_t size) {
    Seen seen = {0, 0};
    for (int64_t j = 0; j < size; j++) {
        const int32_t bits = (int32_t)(float_to_bits(x[j]) & MAGNITUDE);
        seen.zeros += bits == 0;
        seen.most = bits > seen.most ? bits : seen.most;
    }
    return seen;
}

/* The difference, and what is seen of it. */
WIDTHS static Seen subtract_into(const float *restrict x, const float *restrict less, int64_t size, float *restrict out) {
    Seen seen = {0, 0};
    for (int64_t j = 0; j < size; j++) {
        const float value = x[j] - less[j];
        const int32_t bits = (int32_t)(float_to_bits(value) & MAGNITUDE);
        out[j] = value;
        seen.zeros += bits == 0;
        seen.most = bits > seen.most ? bits : seen.most;
    }
    return seen;
}

/* Two chunks of bfloat16, decoded, and their difference. */
WIDTHS static Seen subtract_bf16s(const uint16_t *restrict a, const uint16_t *restrict b, int64_t size, float *restrict x,
                                  float *restrict y, float *restrict out) {
    Seen seen = {0, 0};
    for (int64_t j = 0; j < size; j++) {
        const float one = decode_bf16(a[j]), other = decode_bf16(b[j]), value = other - one;
        const int32_t bits = (int32_t)(float_to_bits(value) & MAGNITUDE);
        x[j] = one;
        y[j] = other;
        out[j] = value;
        seen.zeros += bits == 0;
        seen.most = bits > seen.most ? bits : seen.most;
    }
    return seen;
}

/* Of how many both are numbers other than 0, and of how many of these the signs differ. */
WIDTHS static void count_signs(const float *x, const float *y, int64_t size, int64_t *both, int64_t *opposite) {
    int32_t with_sign = 0, apart = 0;
    for (int64_t j = 0; j < size; j++) {
        const int32_t counts = (int32_t)(fabsf(x[j]) > 0) & (int32_t)(fabsf(y[j]) > 0);
        with_sign += counts;
        apart += counts & (int32_t)((float_to_bits(x[j]) ^ float_to_bits(y[j])) >> 31);
    }
    *both += with_sign;
    *opposite += apart;
}

INLINE Halves take_halves(const uint16_t *x, int64_t size) {
    Halves some = {0};
    memcpy(&some, x, (size_t)size * sizeof(uint16_t));
    return some;
}

static int64_t add_lanes(Halves counts) {
    int64_t total = 0;
    for (int64_t k = 0; k < 16; k++) total -= counts[k];
    return total;
}

/* The same of two chunks of halves as they are stored, and how many are unlike; `infinite` has the bits of infinity. */
WIDTHS static int64_t count_halves(const uint16_t *a, const uint16_t *b, int64_t size, int16_t infinite, int64_t *both,
                                   int64_t *opposite) {
    Halves unlike = {0}, with_sign = {0}, apart = {0};
    for (int64_t j = 0; j < size; j += 16) {
        const int64_t here = least(16, size - j);
        const Halves one = here == 16 ? take_halves(a + j, 16) : take_halves(a + j, here);
        const Halves other = here == 16 ? take_halves(b + j, 16) : take_halves(b + j, here);
        const Halves of_one = one & INT16_MAX, of_other = other & INT16_MAX;
        const Halves counts = (of_one > 0) & (of_one <= infinite) & (of_other > 0) & (of_other <= infinite);
        unlike += one != other;
        with_sign += counts;
        apart += counts & ((one ^ other) < 0);
    }
    *both += add_lanes(with_sign);
    *opposite += add_lanes(apart);
    return add_lanes(unlike);
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
INLINE void count_exponent(float x, int64_t *fields) {
    const uint32_t bits = float_to_bits(x) & MAGNITUDE;
    fields[bits >> 23 | (0u - (bits == 0)) >> 24]++; /* without a branch, which would be guessed wrong */
}

/* One element in eight, into four tables in turn: who counts what the last one counted waits for it. */
static void count_exponents(const float *x, int64_t first, int64_t size, Fields *fields) {
    int64_t j = first;
    for (; j + 3 * SAMPLED < size; j += 4 * SAMPLED)
        for (int64_t turn = 0; turn < 4; turn++) count_exponent(x[j + turn * SAMPLED], fields->of[turn]);
    for (; j < size; j += SAMPLED) count_exponent(x[j], fields->of[0]);
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

/* The same, the squares added in float32: for their sum's square alone, and where none of them leaves its range. */
WIDTHS static double add_near_row(const float *x, int64_t size, float sign, float *sum) {
    Floats even = {0}, odd = {0};
    int64_t j = 0;
    for (; j + 2 * TILE <= size; j += 2 * TILE) {
        const Floats one = take_tile(x + j, TILE), other = take_tile(x + j + TILE, TILE);
        if (sum) {
            put_tile(sum + j, take_tile(sum + j, TILE) + one * sign, TILE);
            put_tile(sum + j + TILE, take_tile(sum + j + TILE, TILE) + other * sign, TILE);
        }
        even += one * one;
        odd += other * other;
    }
    even += odd;
    double total = 0;
    for (int64_t k = 0; k < TILE; k++) total += even[k];
    for (; j < size; j++) {
        if (sum) sum[j] += x[j] * sign;
        total += (double)x[j] * (double)x[j];
    }
    return total;
}

static double add_wide_row(const double *x, int64_t size) {
    double total = 0;
    for (int64_t j = 0; j < size; j++) total += x[j] * x[j];
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

/* A chunk whose differences leave float32, though the numbers themselves do not: the pair and the third. */
typedef struct {
    double x[CHUNK], y[CHUNK], z[CHUNK];
} Wide;

/* A chunk of one side. */
typedef struct {
    const float *x;     /* or NULL: there is no such side */
    const double *wide; /* or NULL */
    Seen seen;
} Side;

/* Take a side's piece of a row: into its sketch, where there is one; returns the squares. */
static double take_piece(const Side *side, int64_t at, int64_t size, float sign, float *sketch, int exactly) {
    const int32_t least_near = 0x26800000, most_near = 0x58800000; /* 2^-50 and 2^50 */
    const int near = !exactly && side->seen.most >= least_near && side->seen.most <= most_near;
    const double squares = (near ? add_near_row : add_row)(side->x + at, size, sign, sketch);
    return side->wide ? add_wide_row(side->wide + at, size) : squares;
}

/* Take a chunk's pieces of rows: of both sides, and of what they are taken from. */
static void take_rows(Rows *rows, const Slab *slab, const Chunk *chunk, const Side *sides, const Side *own) {
    const int64_t first_block = slab->start / slab->block, blocks = (slab->size + slab->block - 1) / slab->block;
    const int64_t columns = rows->columns, start = slab->start + chunk->start;
    const int exactly = rows->squares != NULL;
    for (int64_t at = 0, run; at < chunk->here; at += run) {
        const int64_t row = (start + at) / columns, column = (start + at) % columns;
        run = least(columns - column, chunk->here - at);
        const float sign = mix((uint64_t)row) & 1 ? -1.0f : 1.0f;
        float *sketch = rows->sketch ? rows->sketch + find_sum((uint64_t)row) * columns + column : NULL;
        for (int64_t i = 0; i < 2 && sides[i].x; i++)
            rows->so_far[i] +=
                take_piece(&sides[i], at, run, sign, sketch ? sketch + i * SKETCHED * columns : NULL, exactly);
        if (rows->squares) rows->so_far[2] += take_piece(own, at, run, sign, NULL, exactly);
        if (column + run < columns) continue;
        for (int64_t i = 0; i < 2 && sides[i].x; i++)
            rows->fourths[i * blocks + chunk->block - first_block] += rows->so_far[i] * rows->so_far[i];
        for (int64_t i = 0; i < 3; i++) {
            if (rows->squares) rows->squares[i * rows->count + row - slab->start / columns] = rows->so_far[i];
            rows->so_far[i] = 0;
        }
    }
}

/* A difference as float32 has it; as double where it has not. */
static double differ(float value, float less) {
    const float near = value - less;
    return fabsf(near) <= FLT_MAX ? (double)near : (double)value - (double)less;
}

/* The chunk once more, and the products of it; returns the bits of the largest magnitude of the sides as doubles. */
static void widen_all(const Slab *slab, int64_t start, int64_t here, Wide *wide, double *lanes) {
    float one[CHUNK], other[CHUNK], base[CHUNK] = {0};
    const int64_t first = slab->has_base;
    load_base(slab, start, here, base);
    decode(slab->data[first], slab->dtypes[first], start, here, one);
    decode(slab->data[first + 1], slab->dtypes[first + 1], start, here, other);
    for (int64_t j = 0; j < here; j++) {
        wide->x[j] = slab->has_base ? differ(one[j], base[j]) : (double)one[j];
        wide->y[j] = slab->has_base ? differ(other[j], base[j]) : (double)other[j];
        wide->z[j] = slab->has_base ? (double)base[j] : differ(other[j], one[j]);
        lanes[j % LAST] += wide->x[j] * wide->x[j];
        lanes[LAST + j % LAST] += wide->y[j] * wide->y[j];
        lanes[2 * LAST + j % LAST] += wide->z[j] * wide->z[j];
        lanes[3 * LAST + j % LAST] += wide->x[j] * wide->y[j];
    }
}

static int64_t find_bits(double value) {
    const union { double value; int64_t bits; } word = {fabs(value)};
    return word.bits;
}

/* The bits of the largest magnitude, as a double's; they order as the magnitudes do. */
static int64_t find_largest(const Side *side, int64_t size) {
    if (!side->wide) return find_bits((double)bits_to_float((uint32_t)side->seen.most));
    int64_t largest = 0;
    for (int64_t j = 0; j < size; j++) {
        const int64_t bits = find_bits(side->wide[j]);
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

/* One element in eight; what is finite as a double alone goes where float32's largest go. */
static void count_wide_exponents(const Side *side, int64_t first, int64_t size, Fields *fields) {
    for (int64_t j = first; j < size; j += SAMPLED) {
        const int beyond = fabs(side->wide[j]) <= DBL_MAX && !(fabsf(side->x[j]) <= FLT_MAX);
        if (beyond) fields->of[0][FIELDS - 1]--, fields->of[0][FIELDS - 2]++;
    }
}

static void fill_up(float *x, int64_t size) {
    if (size % LAST) memset(x + size, 0, (size_t)(LAST - size % LAST) * sizeof(float));
}

static int64_t count_stored_halves(const Slab *slab, int64_t start, int64_t size, int64_t *counts) {
    const int16_t infinite = slab->dtypes[0] == BF16 ? 0x7F80 : 0x7C00;
    return count_halves((const uint16_t *)slab->data[0] + start, (const uint16_t *)slab->data[1] + start, size, infinite,
                        counts + SIGNED, counts + OPPOSITE);
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
        if ((i && !base) || one != other || one >= CODED) return REFUSED;
    }
    float x[CHUNK], y[CHUNK], z[CHUNK];
    double lanes[4 * LAST];
    Wide wide;
    Fields fields[2];
    memset(fields, 0, sizeof fields);
    Rows rows = {columns, columns ? slab->size / columns : 0, fourths, squares, sketch, {0}};
    const int bf16s = !base && slab->dtypes[0] == BF16 && slab->dtypes[1] == BF16;
    const int halves = !base && alike & 1 && slab->dtypes[0] != F32;
    for (Chunk chunk = {0}; next_chunk(slab, &chunk);) {
        const int64_t start = chunk.start, here = chunk.here;
        for (int64_t i = 0; i < 3 && !halves; i++)
            if (alike >> i & 1) counts[UNLIKE + i] += count_unlike(slab, pairs[i][0], pairs[i][1], start, here);
        if (base) load_base(slab, start, here, z);
        Side sides[2] = {{base ? x : z, NULL, {0, 0}}, {base ? y : NULL, NULL, {0, 0}}}, own = {base ? z : x, NULL, {0, 0}};
        if (bf16s) {
            sides[0].seen = subtract_bf16s((const uint16_t *)slab->data[0] + start, (const uint16_t *)slab->data[1] + start,
                                           here, x, y, z);
        } else {
            load_plain(slab, 0, start, here, z, x);
            load_plain(slab, 1, start, here, z, y);
            sides[0].seen = base ? look_at(x, here) : subtract_into(y, x, here, z);
            if (base) sides[1].seen = look_at(y, here);
        }
        if (chunk.sampled) memset(lanes, 0, sizeof lanes);
        if (sides[0].seen.most >= (int32_t)INFINITE || sides[1].seen.most >= (int32_t)INFINITE) {
            widen_all(slab, start, here, &wide, lanes);
            sides[0].wide = base ? wide.x : wide.z;
            sides[1].wide = wide.y;
            own.wide = base ? wide.z : wide.x;
        }
        for (int64_t i = 0; i < 2 && sides[i].x; i++) {
            const int64_t largest = find_largest(&sides[i], here), first = -(slab->start + start) & (SAMPLED - 1);
            if (largest > counts[LARGEST + i]) counts[LARGEST + i] = largest;
            counts[ZEROS + i] += sides[i].seen.zeros;
            count_exponents(sides[i].x, first, here, &fields[i]);
            if (sides[i].wide) count_wide_exponents(&sides[i], first, here, &fields[i]);
        }
        if (halves)
            counts[UNLIKE] += count_stored_halves(slab, start, here, counts);
        else
            count_signs(x, y, here, counts + SIGNED, counts + OPPOSITE);
        if (columns) take_rows(&rows, slab, &chunk, sides, &own);
        if (!sides[0].wide) {
            fill_up(x, here);
            fill_up(y, here);
            fill_up(z, here);
            add_products(x, y, z, here, lanes);
        }
        const int64_t end = (slab->start + start + here) % slab->block;
        if (end && end % BLOCK && start + here < slab->size) continue;
        for (int64_t k = 0; k < 4; k++) {
            double total = 0;
            for (int64_t j = 0; j < LAST; j++) total += lanes[k * LAST + j];
            sums[k * cuts] = total;
        }
        sums++;
    }
    for (int64_t i = 0; i < 2; i++)
        for (int64_t turn = 0; turn < 4; turn++)
            for (int64_t k = 0; k < FIELDS; k++) counts[EXPONENTS + i * FIELDS + k] += fields[i].of[turn][k];
    return 0;
}
