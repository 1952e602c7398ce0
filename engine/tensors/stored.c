/* Merging and measuring slabs as they are stored, in one go: decoded, subtracted, thinned, joined and encoded a chunk at
 * a time in the first-level cache. The operations and their order are those of the loops in native.c and of torch, so
 * that either way gives the same bits; stored.py says what the structures mean.
 */

#include <stdlib.h>

#include "native.h"

enum { F32, BF16, F16 };
enum { KEEP_ALL, KEEP_NOTHING, KEEP_CUT, KEEP_RANDOM, KEEP_MASK };
enum { JOIN_SUM, JOIN_ADD, JOIN_AGREE, JOIN_SHARE };

typedef struct {
    const void *const *data; /* the base first, where there is one */
    const int32_t *dtypes;
    const float *scales; /* of each tensor beside the base, before anything else */
    int64_t count;       /* of tensors beside the base */
    int32_t has_base;    /* then the tensors are taken less the base */
    int64_t size, start, block;
} Slab;

typedef struct {
    float threshold; /* what is above it belongs to the cut */
    int64_t block;   /* in blocks before this one also what equals it */
    int64_t ties;    /* in this block the first so many that equal it */
} Cut;

typedef struct {
    int32_t kind;
    float factor; /* on what was kept */
    Cut cut, outliers;
    int32_t has_outliers;
    int32_t limit;
    const uint32_t *keys; /* two for each BLOCK that the slab touches */
    const uint8_t *mask;  /* one for each element of the slab */
} Keep;

typedef struct {
    int32_t kind;
    int32_t normalize;
    const float *weight;
    float divisor, lambda;
} Join;

/* ------------------------------------------------------------------------------------------------ decode and encode */

static inline float bits_to_float(uint32_t bits) {
    const union { uint32_t bits; float value; } word = {bits};
    return word.value;
}

static inline uint32_t float_to_bits(float value) {
    const union { float value; uint32_t bits; } word = {value};
    return word.bits;
}

/* A float16's exponent is moved up by 112 with a product, which also makes its denormals right. */
static inline float decode_f16(uint16_t half) {
    const uint32_t magnitude = (uint32_t)(half & 0x7FFF) << 13;
    const float scaled = bits_to_float(magnitude) * 0x1p112f;
    const uint32_t special = (half & 0x7C00) == 0x7C00 ? magnitude | 0x7F800000u : float_to_bits(scaled);
    return bits_to_float(special | (uint32_t)(half & 0x8000) << 16);
}

/* To nearest, ties to even; NaN becomes the quiet one. */
static inline uint16_t encode_bf16(float value) {
    const uint32_t bits = float_to_bits(value);
    const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return (bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0 : (uint16_t)rounded;
}

static inline uint16_t encode_f16(float value) {
    const uint32_t bits = float_to_bits(value), magnitude = bits & 0x7FFFFFFFu;
    const uint32_t normal = (magnitude + 0xFFF + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
    const uint32_t small = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3F000000u; /* rounds at 2**-24 */
    uint32_t half = magnitude < 0x38800000u ? small : normal;
    half = magnitude >= 0x477FF000u ? 0x7C00 : half;
    half = magnitude > 0x7F800000u ? 0x7E00 : half;
    return (uint16_t)(half | (bits >> 16 & 0x8000));
}

WIDTHS static void decode_bf16s(const uint16_t *restrict data, int64_t size, float *restrict out) {
    for (int64_t j = 0; j < size; j++) out[j] = decode_bf16(data[j]);
}

WIDTHS static void decode_f16s(const uint16_t *restrict data, int64_t size, float *restrict out) {
    for (int64_t j = 0; j < size; j++) out[j] = decode_f16(data[j]);
}

static void decode(const void *data, int32_t dtype, int64_t start, int64_t size, float *out) {
    if (dtype == BF16)
        decode_bf16s((const uint16_t *)data + start, size, out);
    else if (dtype == F16)
        decode_f16s((const uint16_t *)data + start, size, out);
    else
        memcpy(out, (const float *)data + start, (size_t)size * sizeof(float));
}

/* Encode, and count what is then not finite. */
WIDTHS static int64_t encode_bf16s(const float *restrict x, int64_t size, uint16_t *restrict out) {
    Flags broken = {0};
    int64_t j = 0;
    for (; j + TILE <= size; j += TILE) {
        Words bits;
        memcpy(&bits, x + j, sizeof bits);
        const Words nan = (Words)((bits & 0x7FFFFFFFu) > 0x7F800000u);
        const Words rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
        const Words whole = (rounded & ~nan) | (nan & 0x7FC0);
        const Halves halves = __builtin_convertvector(whole, Halves);
        memcpy(out + j, &halves, sizeof halves);
        broken -= (whole & 0x7F80) == 0x7F80;
    }
    int32_t count = 0;
    for (int64_t lane = 0; lane < TILE; lane++) count += broken[lane];
    for (; j < size; j++) {
        out[j] = encode_bf16(x[j]);
        count += (out[j] & 0x7F80) == 0x7F80;
    }
    return count;
}

WIDTHS static int64_t encode_f16s(const float *restrict x, int64_t size, uint16_t *restrict out) {
    int32_t broken = 0;
    for (int64_t j = 0; j < size; j++) {
        out[j] = encode_f16(x[j]);
        broken += (out[j] & 0x7C00) == 0x7C00;
    }
    return broken;
}

WIDTHS static int64_t encode_f32s(const float *restrict x, int64_t size, float *restrict out) {
    int32_t broken = 0;
    for (int64_t j = 0; j < size; j++) {
        out[j] = x[j];
        broken += (float_to_bits(x[j]) & 0x7F800000u) == 0x7F800000u;
    }
    return broken;
}

static int64_t encode(const float *x, int32_t dtype, int64_t start, int64_t size, void *out) {
    if (dtype == BF16) return encode_bf16s(x, size, (uint16_t *)out + start);
    if (dtype == F16) return encode_f16s(x, size, (uint16_t *)out + start);
    return encode_f32s(x, size, (float *)out + start);
}

WIDTHS static void subtract(float *restrict x, const float *restrict base, int64_t size) {
    for (int64_t j = 0; j < size; j++) x[j] -= base[j];
}

WIDTHS static void multiply(float *restrict x, int64_t size, float factor) {
    for (int64_t j = 0; j < size; j++) x[j] *= factor;
}

/* ------------------------------------------------------------------------------------------------- chunks of a slab */

WIDTHS static void decode_bf16s_less(const uint16_t *restrict data, const float *restrict base, int64_t size,
                                     float *restrict out) {
    for (int64_t j = 0; j < size; j++) out[j] = decode_bf16(data[j]) - base[j];
}

static void load_base(const Slab *slab, int64_t start, int64_t size, float *base) {
    if (slab->has_base) decode(slab->data[0], slab->dtypes[0], start, size, base);
}

/* The tensor i as it is, or less the base. */
static void load_plain(const Slab *slab, int64_t i, int64_t start, int64_t size, const float *base, float *out) {
    const int64_t at = i + slab->has_base;
    if (slab->has_base && slab->dtypes[at] == BF16) {
        decode_bf16s_less((const uint16_t *)slab->data[at] + start, base, size, out);
        return;
    }
    decode(slab->data[at], slab->dtypes[at], start, size, out);
    if (slab->has_base) subtract(out, base, size);
}

static void scale(const Slab *slab, int64_t i, int64_t size, float *x) {
    if (slab->scales[i] != 1.0f) multiply(x, size, slab->scales[i]);
}

static void load(const Slab *slab, int64_t i, int64_t start, int64_t size, const float *base, float *out) {
    load_plain(slab, i, start, size, base, out);
    scale(slab, i, size, out);
}

/* Room for a chunk of the base, of what is made of it, and of every tensor. */
typedef struct {
    float *base, *total, *sign, *divisor, **x;
    int64_t *seen; /* two for each tensor */
} Room;

static int make_room(Room *room, int64_t count) {
    const size_t floats = (size_t)(count + 4) * CHUNK * sizeof(float);
    room->base = aligned_alloc(64, floats + ((size_t)count * sizeof(float *) + 63) / 64 * 64);
    room->seen = calloc((size_t)count, 2 * sizeof(int64_t));
    if (!room->base || !room->seen) return 0;
    room->total = room->base + CHUNK, room->sign = room->total + CHUNK, room->divisor = room->sign + CHUNK;
    room->x = (float **)(room->divisor + (count + 1) * CHUNK);
    for (int64_t i = 0; i < count; i++) room->x[i] = room->divisor + (i + 1) * CHUNK;
    return 1;
}

static void drop_room(Room *room) {
    free(room->base);
    free(room->seen);
}

/* Where a loop over a slab stands: `here` elements from `start` on, all of them of one place's block and one BLOCK. */
typedef struct {
    int64_t start, here;
    int64_t block;      /* the tensor's, by number */
    int block_begins;   /* whether the chunk is the first of its block */
    int sampled;        /* whether it is the first of BLOCK elements of its block */
} Chunk;

/* Go to the next chunk; 0 at the end of the slab. `chunk` begins as zeros. */
static int next_chunk(const Slab *slab, Chunk *chunk) {
    chunk->start += chunk->here;
    if (chunk->start >= slab->size) return 0;
    const int64_t inside = chunk->start % slab->block;
    const int64_t left = least(slab->block - inside, slab->size - chunk->start);
    chunk->block = (slab->start + chunk->start) / slab->block;
    chunk->block_begins = inside == 0;
    chunk->sampled = inside % BLOCK == 0;
    chunk->here = least(least(CHUNK, BLOCK - inside % BLOCK), left);
    return 1;
}

/* -------------------------------------------------------------------------------------------------------- thinning */

static uint32_t *all_counters(void) {
    static uint32_t counters[BLOCK];
    return counters;
}

/* The first half of each element's hash: the same in every block, filled in once by whoever loads the library. */
void mergemill_fill_counters(void) {
    uint32_t *counters = all_counters();
    for (uint32_t j = 0; j < BLOCK; j++) {
        uint32_t bits = j ^ j >> 16;
        bits *= 0x21F0AAADu;
        bits ^= bits >> 15;
        bits *= 0xD35A2D97u;
        counters[j] = bits ^ bits >> 15;
    }
}

static void thin_randomly(float *x, const Slab *slab, const Chunk *chunk, const Keep *keep) {
    const int64_t first = slab->start / BLOCK, stop = slab->start + chunk->start + chunk->here;
    for (int64_t at = stop - chunk->here, here; at < stop; at += here, x += here) {
        const uint32_t *keys = keep->keys + 2 * (at / BLOCK - first);
        here = least(stop - at, BLOCK - at % BLOCK);
        keep_random(x, all_counters() + at % BLOCK, here, keys[0], keys[1], keep->limit);
    }
}

WIDTHS static void thin_by_mask(float *restrict x, const uint8_t *restrict mask, int64_t size) {
    for (int64_t j = 0; j < size; j++) x[j] *= (float)mask[j];
}

WIDTHS static void mark_large(const float *restrict x, int64_t size, float threshold, int inclusive, uint8_t *restrict mark) {
    if (inclusive)
        for (int64_t j = 0; j < size; j++) mark[j] = fabsf(x[j]) >= threshold;
    else
        for (int64_t j = 0; j < size; j++) mark[j] = fabsf(x[j]) > threshold;
}

/* Mark a cut's elements; `seen` counts those that equal the threshold in the block of its last tie. */
static void mark_cut(const float *x, const Chunk *chunk, const Cut *cut, int64_t *seen, uint8_t *mark) {
    mark_large(x, chunk->here, cut->threshold, chunk->block < cut->block, mark);
    if (chunk->block != cut->block) return;
    if (chunk->block_begins) *seen = 0;
    for (int64_t j = 0; j < chunk->here && *seen < cut->ties; j++)
        if (fabsf(x[j]) == cut->threshold) mark[j] = 1, ++*seen;
}

static void thin_to_cut(float *x, const Chunk *chunk, const Keep *keep, int64_t *seen) {
    uint8_t mark[CHUNK], outlier[CHUNK];
    if (!keep->has_outliers && chunk->block != keep->cut.block) {
        keep_large(x, chunk->here, keep->cut.threshold, chunk->block < keep->cut.block);
        return;
    }
    mark_cut(x, chunk, &keep->cut, seen, mark);
    if (keep->has_outliers) {
        mark_cut(x, chunk, &keep->outliers, seen + 1, outlier);
        for (int64_t j = 0; j < chunk->here; j++) mark[j] = (uint8_t)(mark[j] - outlier[j]);
    }
    thin_by_mask(x, mark, chunk->here);
}

/* `seen` holds two counts for each tensor. */
static void thin(float *x, const Slab *slab, const Chunk *chunk, const Keep *keep, int64_t *seen) {
    if (keep->kind == KEEP_NOTHING) memset(x, 0, (size_t)chunk->here * sizeof(float));
    if (keep->kind == KEEP_CUT) thin_to_cut(x, chunk, keep, seen);
    if (keep->kind == KEEP_RANDOM) thin_randomly(x, slab, chunk, keep);
    if (keep->kind == KEEP_MASK) thin_by_mask(x, keep->mask + chunk->start, chunk->here);
}

/* --------------------------------------------------------------------------------------------------------- merging */

/* total = the mean of the deltas of the elected sign, each with its share as weight. */
WIDTHS static void share_agreeing(float *restrict total, float *restrict sign, float *restrict divisor,
                                  const float *const *x, const float *share, int64_t count, int64_t size) {
    memcpy(sign, x[0], (size_t)size * sizeof(float));
    for (int64_t i = 1; i < count; i++)
        for (int64_t j = 0; j < size; j++) sign[j] += x[i][j];
    for (int64_t j = 0; j < size; j++) sign[j] = sign[j] >= 0 ? 1.0f : -1.0f;
    memset(total, 0, (size_t)size * sizeof(float));
    memset(divisor, 0, (size_t)size * sizeof(float));
    for (int64_t i = 0; i < count; i++) {
        const float *delta = x[i];
        const float w = share[i];
        for (int64_t j = 0; j < size; j++) {
            const float agrees = (delta[j] * sign[j] > 0 ? 1.0f : 0.0f) * w;
            total[j] += delta[j] * agrees;
            divisor[j] += agrees;
        }
    }
    for (int64_t j = 0; j < size; j++) total[j] /= divisor[j] < 1e-6f ? 1e-6f : divisor[j];
}


/* Join a chunk of all tensors; returns where the result is. */
static const float *join_chunk(const Join *join, const Room *room, int64_t count, int64_t size) {
    const float *const *x = (const float *const *)room->x;
    if (join->kind == JOIN_AGREE)
        sum_agreeing(room->total, room->sign, room->divisor, x, join->weight, count, 0, size, join->normalize);
    else if (join->kind == JOIN_SHARE)
        share_agreeing(room->total, room->sign, room->divisor, x, join->weight, count, size);
    else
        sum_weighted(room->total, x, join->weight, count, 0, size, join->divisor);
    if (join->kind == JOIN_SUM) return room->total;
    add_scaled(room->base, room->total, size, join->lambda);
    return room->base;
}

/* Merge a slab into `out`, encoded as `dtype`; returns how many values of that are not finite, -1 without memory.
 *
 * Of each sampled chunk `squares`, unless NULL, gets a column: the squares of the first tensor (the base, where there is
 * one), of the others (less the base; without one, less the first) and of the result less the first.
 */
int64_t mergemill_merge_stored(const Slab *slab, const Keep *keeps, const Join *join, void *out, int32_t dtype,
                               double *squares, int64_t chunks) {
    Room room;
    if (!make_room(&room, slab->count)) return drop_room(&room), -1;
    float first[SAMPLE];
    int64_t broken = 0, column = 0;
    for (Chunk chunk = {0}; next_chunk(slab, &chunk); ) {
        const int64_t here = chunk.here;
        const int sampled = squares && chunk.sampled;
        load_base(slab, chunk.start, here, room.base);
        for (int64_t i = 0; i < slab->count; i++) {
            float *x = room.x[i];
            load_plain(slab, i, chunk.start, here, room.base, x);
            if (sampled) {
                if (i == 0) memcpy(first, slab->has_base ? room.base : x, (size_t)here * sizeof(float));
                if (i == 0 && slab->has_base) squares[column] = sum_squares(first, 0, here);
                squares[(i + slab->has_base) * chunks + column] = sum_squares(x, i && !slab->has_base ? first : 0, here);
            }
            scale(slab, i, here, x);
            if (!keeps) continue;
            thin(x, slab, &chunk, keeps + i, room.seen + 2 * i);
            if (keeps[i].factor != 1.0f) multiply(x, here, keeps[i].factor);
        }
        const float *merged = join_chunk(join, &room, slab->count, here);
        if (sampled) squares[(slab->count + slab->has_base) * chunks + column++] = sum_squares(merged, first, here);
        broken += encode(merged, dtype, chunk.start, here, out);
    }
    drop_room(&room);
    return broken;
}

/* ------------------------------------------------------------------------------------------------------ statistics */

WIDTHS static void add_absolute(double *restrict lanes, const float *restrict x, int64_t size) {
    for (int64_t j = 0; j < size; j++) lanes[j] += (double)fabsf(x[j]);
}

WIDTHS static void add_products(double *restrict lanes, const float *restrict x, const float *restrict y, int64_t size) {
    for (int64_t j = 0; j < size; j++) lanes[j] += (double)x[j] * (double)y[j];
}

/* Whether the sums of a block, or of BLOCK elements of it, end with this chunk. */
static int sums_end(const Slab *slab, const Chunk *chunk) {
    const int64_t stop = chunk->start + chunk->here;
    return stop == slab->size || stop % slab->block == 0 || stop % slab->block % BLOCK == 0;
}

/* For each tensor i and each j <= i, and each cut, 32 sums of products in float64. */
int32_t mergemill_stored_products(const Slab *slab, double *sums, int64_t cuts) {
    const int64_t pairs = slab->count * (slab->count + 1) / 2;
    double *lanes = malloc((size_t)pairs * LANES * sizeof(double));
    Room room;
    if (!make_room(&room, slab->count) || !lanes) return drop_room(&room), free(lanes), -1;
    int64_t cut = 0;
    for (Chunk chunk = {0}; next_chunk(slab, &chunk); ) {
        if (chunk.sampled) memset(lanes, 0, (size_t)pairs * LANES * sizeof(double));
        load_base(slab, chunk.start, chunk.here, room.base);
        int64_t pair = 0;
        for (int64_t i = 0; i < slab->count; i++) {
            load(slab, i, chunk.start, chunk.here, room.base, room.x[i]);
            for (int64_t j = 0; j <= i; j++, pair++)
                add_products(lanes + pair * LANES, room.x[i], room.x[j], chunk.here);
        }
        if (!sums_end(slab, &chunk)) continue;
        for (pair = 0; pair < pairs; pair++) fold_lanes(lanes + pair * LANES, sums + (pair * cuts + cut) * LAST);
        cut++;
    }
    drop_room(&room);
    free(lanes);
    return 0;
}

/* Of one tensor, 32 sums of |x| for each cut: before and after it is thinned; with `square`, only after, of x². */
int32_t mergemill_stored_norms(const Slab *slab, int64_t which, const Keep *keep, int32_t square, double *whole,
                               double *kept) {
    float base[CHUNK], x[CHUNK];
    double before[LANES], after[LANES];
    int64_t seen[2] = {0};
    for (Chunk chunk = {0}; next_chunk(slab, &chunk); ) {
        if (chunk.sampled) memset(before, 0, sizeof before), memset(after, 0, sizeof after);
        load_base(slab, chunk.start, chunk.here, base);
        load(slab, which, chunk.start, chunk.here, base, x);
        if (!square) add_absolute(before, x, chunk.here);
        thin(x, slab, &chunk, keep, seen);
        if (square)
            add_products(after, x, x, chunk.here);
        else
            add_absolute(after, x, chunk.here);
        if (!sums_end(slab, &chunk)) continue;
        if (!square) fold_lanes(before, whole), whole += LAST;
        fold_lanes(after, kept), kept += LAST;
    }
    return 0;
}

/* -------------------------------------------------------------------------------------------------- ranked values */

/* The standard deviation over the tensors; of two it is half their difference, to the bit. */
WIDTHS static void find_spread(float *const *x, int64_t count, int64_t size, float *restrict out) {
    const float *first = x[0];
    if (count == 2) {
        const float *second = x[1];
        for (int64_t j = 0; j < size; j++) out[j] = (float)(fabs((double)second[j] - (double)first[j]) * 0.5);
        return;
    }
    for (int64_t j = 0; j < size; j++) {
        double mean = 0, squares = 0;
        for (int64_t i = 1; i < count; i++) mean += (double)x[i][j] - (double)first[j];
        mean /= (double)count;
        for (int64_t i = 0; i < count; i++) {
            const double deviation = ((double)x[i][j] - (double)first[j]) - mean;
            squares += deviation * deviation;
        }
        out[j] = (float)sqrt(squares / (double)count);
    }
}

/* What is ranked: |x| of the tensor `which`, or the spread over all where it is -1; returns where it is. The base is
 * loaded already. */
static float *load_ranked(const Slab *slab, int64_t which, const Chunk *chunk, Room *room) {
    if (which >= 0) {
        load(slab, which, chunk->start, chunk->here, room->base, room->x[which]);
        return room->x[which];
    }
    for (int64_t i = 0; i < slab->count; i++) load(slab, i, chunk->start, chunk->here, room->base, room->x[i]);
    find_spread(room->x, slab->count, chunk->here, room->total);
    return room->total;
}

WIDTHS static int64_t count_equal(const float *x, int64_t size, float value) {
    int32_t count = 0;
    for (int64_t j = 0; j < size; j++) count += fabsf(x[j]) == value;
    return count;
}

static void count_upper(const float *x, int64_t size, int64_t *counts) {
    for (int64_t j = 0; j < size; j++) counts[(float_to_bits(x[j]) & 0x7FFFFFFFu) >> 16]++;
}

/* Two at a time: while a count waits to be stored, another one of the other's is added to. */
static void count_upper_of_two(const float *x, const float *y, int64_t size, int64_t *counts, int64_t *others) {
    for (int64_t j = 0; j < size; j++) {
        counts[(float_to_bits(x[j]) & 0x7FFFFFFFu) >> 16]++;
        others[(float_to_bits(y[j]) & 0x7FFFFFFFu) >> 16]++;
    }
}

/* Add the histogram of the upper 15 bits of each of `many` ranked values to its counts. */
int32_t mergemill_stored_upper(const Slab *slab, const int64_t *which, int64_t *const *counts, int64_t many) {
    Room room;
    if (!make_room(&room, slab->count)) return drop_room(&room), -1;
    for (Chunk chunk = {0}; next_chunk(slab, &chunk); ) {
        load_base(slab, chunk.start, chunk.here, room.base);
        int64_t i = 0;
        for (; i + 1 < many; i += 2) {
            const float *x = load_ranked(slab, which[i], &chunk, &room);
            const float *y = load_ranked(slab, which[i + 1], &chunk, &room);
            count_upper_of_two(x, y, chunk.here, counts[i], counts[i + 1]);
        }
        if (i < many) count_upper(load_ranked(slab, which[i], &chunk, &room), chunk.here, counts[i]);
    }
    drop_room(&room);
    return 0;
}

WIDTHS static void mark_prefix(const float *restrict x, int64_t size, uint32_t prefix, uint8_t *restrict found) {
    for (int64_t j = 0; j < size; j++) found[j] = (float_to_bits(x[j]) & 0x7FFFFFFFu) >> 16 == prefix;
}

/* Add the histogram of the lower 16 bits of those whose upper 15 are `prefix` to `counts`. */
int32_t mergemill_stored_lower(const Slab *slab, int64_t which, uint32_t prefix, int64_t *counts) {
    Room room;
    if (!make_room(&room, slab->count)) return drop_room(&room), -1;
    for (Chunk chunk = {0}; next_chunk(slab, &chunk); ) {
        load_base(slab, chunk.start, chunk.here, room.base);
        const float *x = load_ranked(slab, which, &chunk, &room);
        uint8_t found[CHUNK] = {0};
        mark_prefix(x, chunk.here, prefix, found);
        for (int64_t j = 0; j < chunk.here; j += 8) {
            uint64_t eight;
            memcpy(&eight, found + j, 8);
            for (int64_t k = j; eight; k++, eight >>= 8)
                if (eight & 1) counts[float_to_bits(x[k]) & 0xFFFF]++;
        }
    }
    drop_room(&room);
    return 0;
}

/* Count in each block what equals `value`; `counts` begins with the slab's first block. */
int32_t mergemill_stored_equal(const Slab *slab, int64_t which, float value, int64_t *counts) {
    Room room;
    if (!make_room(&room, slab->count)) return drop_room(&room), -1;
    for (Chunk chunk = {0}; next_chunk(slab, &chunk); ) {
        load_base(slab, chunk.start, chunk.here, room.base);
        counts[chunk.block - slab->start / slab->block] +=
            count_equal(load_ranked(slab, which, &chunk, &room), chunk.here, value);
    }
    drop_room(&room);
    return 0;
}

/* Mark in `mask` the elements whose ranked value belongs to the cut. */
int32_t mergemill_stored_marks(const Slab *slab, int64_t which, const Cut *cut, uint8_t *mask) {
    Room room;
    int64_t seen = 0;
    if (!make_room(&room, slab->count)) return drop_room(&room), -1;
    for (Chunk chunk = {0}; next_chunk(slab, &chunk); ) {
        load_base(slab, chunk.start, chunk.here, room.base);
        mark_cut(load_ranked(slab, which, &chunk, &room), &chunk, cut, &seen, mask + chunk.start);
    }
    drop_room(&room);
    return 0;
}

/* ---------------------------------------------------------------------------------------------------- ranks in rows */

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

WIDTHS static void find_magnitudes(const float *restrict x, int64_t size, uint32_t *restrict out) {
    for (int64_t j = 0; j < size; j++) out[j] = float_to_bits(x[j]) & 0x7FFFFFFFu;
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
