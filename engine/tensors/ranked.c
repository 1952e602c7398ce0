/* Counting and marking the magnitudes of slabs as they are stored, or the spread over all tensors, by rank. */

#include "slab.h"

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

/* ---------------------------------------------------------------------------------------------- samples and windows */

/* Write the bits of `run` magnitudes from `first` on, and from every `stride` after it as long as all lie in the slab. */
int32_t mergemill_stored_sample(const Slab *slab, int64_t which, int64_t first, int64_t stride, int64_t run,
                                uint32_t *out) {
    Room room;
    if (!make_room(&room, slab->count)) return drop_room(&room), -1;
    for (Chunk chunk = {.start = first, .here = run}; chunk.start + run <= slab->size; chunk.start += stride, out += run) {
        load_base(slab, chunk.start, run, room.base);
        find_magnitudes(load_ranked(slab, which, &chunk, &room), run, out);
    }
    drop_room(&room);
    return 0;
}

/* What is seen of the magnitudes' bits from `low` to `high`. */
typedef struct {
    int64_t which;
    uint32_t low, high;
    int64_t nonzero, above, inside;
    int64_t *low_counts, *high_counts; /* what equals the ends, in each block from the slab's first */
    int64_t *counts;                   /* what lies between them, in each block of the slab */
    uint32_t *keys;                    /* that itself, as far as there is room */
    int64_t room;
} Window;

typedef struct {
    int32_t nonzero, above, low, high;
} Sight;

WIDTHS static Sight look_at(const float *restrict x, int64_t size, uint32_t low, uint32_t high, uint8_t *restrict inside) {
    Sight seen = {0, 0, 0, 0};
    const uint32_t first = low + 1, span = high > low ? high - low - 1 : 0;
    for (int64_t j = 0; j < size; j++) {
        const uint32_t bits = float_to_bits(x[j]) & 0x7FFFFFFFu;
        seen.nonzero += bits != 0;
        seen.above += bits > high;
        seen.low += bits == low;
        seen.high += bits == high;
        inside[j] = bits - first < span;
    }
    return seen;
}

static void collect(Window *window, const float *x, const uint8_t *inside, int64_t size, int64_t *count) {
    for (int64_t j = 0; j < size; j += 8) {
        uint64_t eight;
        memcpy(&eight, inside + j, 8);
        for (int64_t k = j; eight; k++, eight >>= 8) {
            if (!(eight & 1)) continue;
            if (window->inside < window->room) window->keys[window->inside] = float_to_bits(x[k]) & 0x7FFFFFFFu;
            window->inside++;
            ++*count;
        }
    }
}

/* Look at windows of ranked values; what `nonzero`, `above` and `inside` begin with is added to. */
int32_t mergemill_stored_windows(const Slab *slab, Window *windows, int64_t many) {
    Room room;
    if (!make_room(&room, slab->count)) return drop_room(&room), -1;
    uint8_t inside[CHUNK] = {0};
    const float *x = 0;
    for (Chunk chunk = {0}; next_chunk(slab, &chunk); ) {
        const int64_t block = chunk.block - slab->start / slab->block;
        load_base(slab, chunk.start, chunk.here, room.base);
        if (chunk.here < CHUNK) memset(inside, 0, sizeof inside);
        for (Window *window = windows; window < windows + many; window++) {
            if (window == windows || window->which != window[-1].which) x = load_ranked(slab, window->which, &chunk, &room);
            const Sight seen = look_at(x, chunk.here, window->low, window->high, inside);
            window->nonzero += seen.nonzero;
            window->above += seen.above;
            window->low_counts[block] += seen.low;
            window->high_counts[block] += seen.high;
            collect(window, x, inside, chunk.here, window->counts + block);
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
