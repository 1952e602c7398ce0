/* Chunks of slabs as they are stored: decoding, encoding, and thinning what was decoded. */

#include "slab.h"

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

void decode(const void *data, int32_t dtype, int64_t start, int64_t size, float *out) {
    if (dtype == BF16)
        decode_bf16s((const uint16_t *)data + start, size, out);
    else if (dtype == F16)
        decode_f16s((const uint16_t *)data + start, size, out);
    else if (dtype == CODED)
        decode_coded(data, start, size, out);
    else if (dtype == ADAPTED)
        decode_adapted(data, start, size, out);
    else
        memcpy(out, (const float *)data + start, (size_t)size * sizeof(float));
}

/* Encode a chunk, and count what is then not finite; two plain loops, of which compilers make vectors: those of 64 bytes
 * that were here took eight times as long without AVX-512, where they are kept in memory. */
WIDTHS static int64_t encode_bf16s(const float *restrict x, int64_t size, uint16_t *restrict out) {
    for (int64_t j = 0; j < size; j++) out[j] = encode_bf16(x[j]);
    uint16_t broken = 0;
    for (int64_t j = 0; j < size; j++) broken += (out[j] & 0x7F80) == 0x7F80;
    return broken;
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

int64_t encode(const float *x, int32_t dtype, int64_t start, int64_t size, void *out) {
    if (dtype == BF16) return encode_bf16s(x, size, (uint16_t *)out + start);
    if (dtype == F16) return encode_f16s(x, size, (uint16_t *)out + start);
    return encode_f32s(x, size, (float *)out + start);
}

WIDTHS static void subtract(float *restrict x, const float *restrict base, int64_t size) {
    for (int64_t j = 0; j < size; j++) x[j] -= base[j];
}

WIDTHS void multiply(float *restrict x, int64_t size, float factor) {
    for (int64_t j = 0; j < size; j++) x[j] *= factor;
}

WIDTHS void find_magnitudes(const float *restrict x, int64_t size, uint32_t *restrict out) {
    for (int64_t j = 0; j < size; j++) out[j] = float_to_bits(x[j]) & 0x7FFFFFFFu;
}

/* ---------------------------------------------------------------------------------------------------------- chunks */

WIDTHS static void decode_bf16s_less(const uint16_t *restrict data, const float *restrict base, int64_t size,
                                     float *restrict out) {
    for (int64_t j = 0; j < size; j++) out[j] = decode_bf16(data[j]) - base[j];
}

void load_base(const Slab *slab, int64_t start, int64_t size, float *base) {
    if (slab->has_base) decode(slab->data[0], slab->dtypes[0], start, size, base);
}

void load_plain(const Slab *slab, int64_t i, int64_t start, int64_t size, const float *base, float *out) {
    const int64_t at = i + slab->has_base;
    const int less = slab->has_base && !slab->vectors[i];
    if (less && slab->dtypes[at] == BF16) {
        decode_bf16s_less((const uint16_t *)slab->data[at] + start, base, size, out);
        return;
    }
    decode(slab->data[at], slab->dtypes[at], start, size, out);
    if (less) subtract(out, base, size);
}

/* A slab as it is stored, as float32. */
int32_t mergemill_decode(const void *data, int32_t dtype, int64_t size, float *out) {
    if (size < 0 || !is_stored(data, dtype, size)) return REFUSED;
    decode(data, dtype, 0, size, out);
    return 0;
}

/* One slab less another, to float32. */
int32_t mergemill_subtract_stored(const void *data, int32_t dtype, const void *less, int32_t less_dtype, int64_t size,
                                  float *out) {
    if (size < 0 || !is_stored(data, dtype, size) || !is_stored(less, less_dtype, size)) return REFUSED;
    float other[CHUNK];
    for (int64_t start = 0, here; start < size; start += here) {
        here = least(CHUNK, size - start);
        decode(less, less_dtype, start, here, other);
        if (dtype == BF16) {
            decode_bf16s_less((const uint16_t *)data + start, other, here, out + start);
            continue;
        }
        decode(data, dtype, start, here, out + start);
        subtract(out + start, other, here);
    }
    return 0;
}

void scale(const Slab *slab, int64_t i, int64_t size, float *x) {
    if (slab->scales[i] != 1.0f) multiply(x, size, slab->scales[i]);
}

void load(const Slab *slab, int64_t i, int64_t start, int64_t size, const float *base, float *out) {
    load_plain(slab, i, start, size, base, out);
    scale(slab, i, size, out);
}

/* ---------------------------------------------------------------------------------------------------------- checks */

#define OF(kind, field) (int64_t)offsetof(kind, field)

/* Write the version, and of each structure its size and where its fields begin, as far as there is room; returns how
 * many numbers these are. structures.py has the same. */
int64_t mergemill_layout(int64_t *out, int64_t room) {
    const int64_t layout[] = {
        VERSION,
        sizeof(Slab), OF(Slab, data), OF(Slab, dtypes), OF(Slab, vectors), OF(Slab, scales), OF(Slab, count),
        OF(Slab, has_base), OF(Slab, size), OF(Slab, start), OF(Slab, block), OF(Slab, derived),
        sizeof(Derived), OF(Derived, kind), OF(Derived, least), OF(Derived, span), OF(Derived, divergences),
        OF(Derived, rows), OF(Derived, columns),
        sizeof(Cut), OF(Cut, threshold), OF(Cut, block), OF(Cut, ties),
        sizeof(Keep), OF(Keep, kind), OF(Keep, factor), OF(Keep, cut), OF(Keep, outliers), OF(Keep, has_outliers),
        OF(Keep, limit), OF(Keep, keys), OF(Keep, mask), OF(Keep, rank), OF(Keep, outlier_rank),
        sizeof(Join), OF(Join, kind), OF(Join, normalize), OF(Join, weight), OF(Join, divisor), OF(Join, lambda),
        OF(Join, threshold), OF(Join, votes), OF(Join, masks), OF(Join, group), OF(Join, kept),
        OF(Join, lines), OF(Join, columns), OF(Join, line_count), OF(Join, by_row),
        sizeof(Window), OF(Window, which), OF(Window, low), OF(Window, high), OF(Window, above), OF(Window, inside),
        OF(Window, low_counts), OF(Window, high_counts), OF(Window, counts), OF(Window, keys), OF(Window, room),
        sizeof(Rank), OF(Rank, which), OF(Rank, rank), OF(Rank, share), OF(Rank, key), OF(Rank, above), OF(Rank, ties),
        OF(Rank, block), OF(Rank, block_ties),
        sizeof(Codes), OF(Codes, codes), OF(Codes, skipped), OF(Codes, bits), OF(Codes, high_first), OF(Codes, table),
        OF(Codes, scales), OF(Codes, zeros), OF(Codes, factor),
        sizeof(Coded), OF(Coded, codes), OF(Coded, start), OF(Coded, rows), OF(Coded, columns), OF(Coded, row_codes),
        OF(Coded, block_rows), OF(Coded, block_columns), OF(Coded, first_block), OF(Coded, code_count),
        OF(Coded, scale_count),
        sizeof(Factor), OF(Factor, data), OF(Factor, dtype), OF(Factor, size), OF(Factor, start),
        OF(Factor, along_side), OF(Factor, along_rank), OF(Factor, along_matrix),
        sizeof(Adapted), OF(Adapted, weight), OF(Adapted, dtype), OF(Adapted, scale), OF(Adapted, start),
        OF(Adapted, rows), OF(Adapted, columns), OF(Adapted, rank), OF(Adapted, group), OF(Adapted, left),
        OF(Adapted, right), OF(Adapted, room), OF(Adapted, floats), OF(Adapted, there),
    };
    const int64_t count = sizeof layout / sizeof *layout;
    memcpy(out, layout, (size_t)least(count, room > 0 ? room : 0) * sizeof *out);
    return count;
}

/* Whether values can be derived: scores of all tensors less a base, importances of the second of two in whole rows. */
static int is_derived(const Slab *slab, const Derived *derived) {
    if (derived->kind == DERIVE_SCORES) return slab->has_base && derived->least && derived->span;
    if (derived->kind != DERIVE_IMPORTANCE || slab->has_base || slab->count != 2 || !derived->divergences) return 0;
    return derived->columns > 0 && (slab->start + slab->size - 1) / derived->columns < derived->rows;
}

int is_stored(const void *data, int32_t dtype, int64_t size) {
    const uintptr_t at = (uintptr_t)data;
    if (dtype < F32 || dtype > ADAPTED || (size && !at)) return 0;
    if (dtype == CODED || dtype == ADAPTED) {
        if (at % sizeof(int64_t)) return 0;
        return !size || (dtype == CODED ? is_coded(data, size) : is_adapted(data, size));
    }
    return at % (dtype == F32 ? sizeof(float) : sizeof(uint16_t)) == 0;
}

int is_sound(const Slab *slab) {
    if (slab->count < 1 || slab->has_base < 0 || slab->has_base > 1 || slab->size < 0 || slab->block < 1) return 0;
    if (slab->start < 0 || slab->start % slab->block || slab->size > INT64_MAX / 8 - slab->start) return 0;
    for (int64_t i = 0; i < slab->count + slab->has_base; i++)
        if (!is_stored(slab->data[i], slab->dtypes[i], slab->size)) return 0;
    return !slab->derived || is_derived(slab, slab->derived);
}

int is_tensor(const Slab *slab, int64_t which) { return which >= 0 && which < slab->count; }

int is_ranked(const Slab *slab, int64_t which) {
    if (which == IMPORTANCE) return slab->derived && slab->derived->kind == DERIVE_IMPORTANCE;
    return which == SPREAD || is_tensor(slab, which);
}

int is_scored(const Slab *slab, int64_t which) {
    return slab->derived && slab->derived->kind == DERIVE_SCORES && which >= slab->count && which < 2 * slab->count;
}

/* Whether all that belongs to `inner` belongs to `outer`, too. */
static int lies_within(const Cut *inner, const Cut *outer) {
    const uint32_t a = float_to_bits(inner->threshold), b = float_to_bits(outer->threshold);
    if (a != b) return a > b;
    return inner->block < outer->block || (inner->block == outer->block && inner->ties <= outer->ties);
}

int is_kept(const Slab *slab, const Keep *keep) {
    if (keep->kind < KEEP_ALL || keep->kind > KEEP_MASK) return 0;
    if (keep->kind == KEEP_CUT && keep->has_outliers && !lies_within(&keep->outliers, &keep->cut)) return 0;
    return !slab->size || ((keep->kind != KEEP_RANDOM || keep->keys) && (keep->kind != KEEP_MASK || keep->mask));
}

/* Whether there is a weight for every column, or for every row that the slab touches. */
static int has_weights(const Slab *slab, const Join *join) {
    if (!join->lines || join->columns < 1 || join->line_count < 1) return 0;
    if (!join->by_row) return join->line_count == join->columns;
    return !slab->size || (slab->start + slab->size - 1) / join->columns < join->line_count;
}

int is_joined(const Slab *slab, const Join *join, const Keep *keeps) {
    if (join->kind < JOIN_SUM || join->kind > JOIN_LINES) return 0;
    if (join->kind == JOIN_TURNS && (join->group < 1 || CHUNK % join->group || join->kept < 0)) return 0;
    if (join->kind == JOIN_LINES && !has_weights(slab, join)) return 0;
    if (join->kind == JOIN_EXCEED) return is_ranked(slab, IMPORTANCE);
    if (join->kind == JOIN_BALANCE && (!keeps || !is_scored(slab, slab->count))) return 0;
    if (join->masks && join->kind != JOIN_ADD && join->kind != JOIN_AGREE) return 0;
    return slab->has_base || join->kind == JOIN_SUM;
}

/* ------------------------------------------------------------------------------------------------------------ room */

int make_room(Room *room, int64_t count) {
    const size_t floats = (size_t)(count + 2) * CHUNK * sizeof(float);
    room->base = aligned_alloc(64, floats + ((size_t)count * sizeof(float *) + 63) / 64 * 64);
    room->seen = calloc((size_t)count, 2 * sizeof(int64_t));
    if (!room->base || !room->seen) return 0;
    room->total = room->base + CHUNK;
    room->x = (float **)(room->total + (count + 1) * CHUNK);
    for (int64_t i = 0; i < count; i++) room->x[i] = room->total + (i + 1) * CHUNK;
    return 1;
}

void drop_room(Room *room) {
    free(room->base);
    free(room->seen);
}

int next_chunk(const Slab *slab, Chunk *chunk) {
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

uint32_t *all_counters(void) {
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

WIDTHS void thin_by_mask(float *restrict x, const uint8_t *restrict mask, int64_t size) {
    for (int64_t j = 0; j < size; j++) x[j] *= (float)mask[j];
}

void pack_bits(const uint8_t *marks, int64_t size, uint8_t *bits) {
    int64_t j = 0;
    for (; j + 8 <= size; j += 8) {
        uint64_t eight;
        memcpy(&eight, marks + j, 8);
        bits[j / 8] = (uint8_t)(eight * 0x0102040810204080u >> 56);
    }
    if (j < size) bits[j / 8] = 0;
    for (int64_t k = j; k < size; k++) bits[j / 8] = (uint8_t)(bits[j / 8] | marks[k] << (k - j));
}

WIDTHS void keep_by_bits(const float *restrict x, const uint8_t *bits, int64_t start, int64_t size, float *restrict out) {
    int64_t j = 0;
    for (; start % 8 == 0 && j + 32 <= size; j += 32) {
        uint32_t many;
        memcpy(&many, bits + (start + j) / 8, sizeof many);
        for (int64_t k = 0; k < 32; k++) out[j + k] = x[j + k] * (float)(int32_t)(many >> k & 1);
    }
    for (; j < size; j++) out[j] = x[j] * (float)(bits[(start + j) / 8] >> (start + j) % 8 & 1);
}

WIDTHS static void thin_by_bits(float *restrict x, const uint8_t *bits, int64_t start, int64_t size) {
    int64_t j = 0;
    for (; start % 8 == 0 && j + 32 <= size; j += 32) {
        uint32_t many;
        memcpy(&many, bits + (start + j) / 8, sizeof many);
        for (int64_t k = 0; k < 32; k++) x[j + k] *= (float)(int32_t)(many >> k & 1);
    }
    for (; j < size; j++) x[j] *= (float)(bits[(start + j) / 8] >> (start + j) % 8 & 1);
}

WIDTHS static void mark_large(const float *restrict x, int64_t size, float threshold, int inclusive, uint8_t *restrict mark) {
    if (inclusive)
        for (int64_t j = 0; j < size; j++) mark[j] = fabsf(x[j]) >= threshold;
    else
        for (int64_t j = 0; j < size; j++) mark[j] = fabsf(x[j]) > threshold;
}

void mark_cut(const float *x, const Chunk *chunk, const Cut *cut, int64_t *seen, uint8_t *mark) {
    mark_large(x, chunk->here, cut->threshold, chunk->block < cut->block, mark);
    if (chunk->block != cut->block) return;
    if (chunk->block_begins) *seen = 0;
    for (int64_t j = 0; j < chunk->here && *seen < cut->ties; j++)
        if (fabsf(x[j]) == cut->threshold) mark[j] = 1, ++*seen;
}

/* Multiply by 0 what does not have the bits from `low` to less than `low + span`. */
WIDTHS static void keep_band(float *restrict x, int64_t size, uint32_t low, uint32_t span) {
    for (int64_t j = 0; j < size; j++) x[j] *= (float_to_bits(x[j]) & 0x7FFFFFFFu) - low < span ? 1.0f : 0.0f;
}

/* The bits from which on magnitudes belong to a cut, in a block that its last tie does not lie in. */
static uint32_t first_bits(const Cut *cut, int64_t block) { return float_to_bits(cut->threshold) + (block >= cut->block); }

static void thin_to_cut(float *x, const Chunk *chunk, const Keep *keep, int64_t *seen) {
    uint8_t mark[CHUNK], outlier[CHUNK];
    if (chunk->block != keep->cut.block && !(keep->has_outliers && chunk->block == keep->outliers.block)) {
        const uint32_t low = first_bits(&keep->cut, chunk->block);
        const uint32_t end = keep->has_outliers ? first_bits(&keep->outliers, chunk->block) : INFINITE + 1;
        keep_band(x, chunk->here, low, low < end ? end - low : 0); /* of a threshold that is no number, nothing */
        return;
    }
    mark_cut(x, chunk, &keep->cut, seen, mark);
    if (keep->has_outliers) {
        mark_cut(x, chunk, &keep->outliers, seen + 1, outlier);
        for (int64_t j = 0; j < chunk->here; j++) mark[j] = mark[j] & !outlier[j];
    }
    thin_by_mask(x, mark, chunk->here);
}

void thin(float *x, const Slab *slab, const Chunk *chunk, const Keep *keep, int64_t *seen) {
    if (keep->kind == KEEP_NOTHING) memset(x, 0, (size_t)chunk->here * sizeof(float));
    if (keep->kind == KEEP_CUT) thin_to_cut(x, chunk, keep, seen);
    if (keep->kind == KEEP_RANDOM) thin_randomly(x, slab, chunk, keep);
    if (keep->kind == KEEP_MASK) thin_by_bits(x, keep->mask, chunk->start, chunk->here);
}
