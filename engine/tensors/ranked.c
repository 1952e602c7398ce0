/* Counting and marking the magnitudes of slabs as they are stored, or the spread over all tensors, by rank. */

#include "slab.h"

/* Of two tensors it is half their difference, to the bit. */
WIDTHS void find_spread(float *const *x, int64_t count, int64_t size, float *restrict out) {
    const float *first = x[0];
    if (count == 2) {
        const float *second = x[1];
        for (int64_t j = 0; j < size; j++) {
            const double apart = (double)second[j] - (double)first[j];
            out[j] = (float)(fabs(apart) * 0.5 + (apart - apart)); /* of what is not finite no number, as of more */
        }
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
    if (!is_sound(slab)) return REFUSED;
    for (int64_t i = 0; i < many; i++)
        if (!is_ranked(slab, which[i])) return REFUSED;
    Room room;
    if (!make_room(&room, slab->count)) return drop_room(&room), NO_MEMORY;
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
    if (!is_sound(slab) || !is_ranked(slab, which)) return REFUSED;
    Room room;
    if (!make_room(&room, slab->count)) return drop_room(&room), NO_MEMORY;
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
    if (!is_sound(slab) || !is_ranked(slab, which) || first < 0 || stride < 1 || run < 1 || run > CHUNK) return REFUSED;
    Room room;
    if (!make_room(&room, slab->count)) return drop_room(&room), NO_MEMORY;
    for (Chunk chunk = {.start = first, .here = run}; chunk.start + run <= slab->size; chunk.start += stride, out += run) {
        load_base(slab, chunk.start, run, room.base);
        find_magnitudes(load_ranked(slab, which, &chunk, &room), run, out);
    }
    drop_room(&room);
    return 0;
}

typedef struct {
    int32_t above, low, high;
} Sight;

/* Look at a whole chunk. */
WIDTHS static Sight look_at(const float *x, uint32_t low, uint32_t high, uint8_t *inside) {
    Flags above = {0}, lows = {0}, highs = {0};
    const uint32_t span = high > low ? high - low - 1 : 0;
    for (int64_t j = 0; j < CHUNK; j += TILE) {
        const Words bits = (Words)take_tile(x + j, TILE) & 0x7FFFFFFFu;
        above += bits > high;
        lows += bits == low;
        highs += bits == high;
        const Halves halves = __builtin_convertvector((Words)(bits - (low + 1) < span), Halves);
        const Bytes bytes = __builtin_convertvector(halves, Bytes); /* at once it would be done one by one */
        memcpy(inside + j, &bytes, sizeof bytes);
    }
    return (Sight){count_flags(above), count_flags(lows), count_flags(highs)};
}

static void collect(Window *window, const float *x, const uint8_t *inside, int64_t *count) {
    int64_t found = window->inside;
    for (int64_t j = 0; j < CHUNK; j += 8) {
        uint64_t eight;
        memcpy(&eight, inside + j, 8);
        for (eight &= 0x0101010101010101u; eight; eight &= eight - 1) {
            const int64_t k = j + (__builtin_ctzll(eight) >> 3);
            if (found < window->room) window->keys[found] = float_to_bits(x[k]) & 0x7FFFFFFFu;
            found++;
        }
    }
    *count += found - window->inside;
    window->inside = found;
}

/* Look at windows of ranked values; what `above` and `inside` begin with is added to. */
int32_t mergemill_stored_windows(const Slab *slab, Window *windows, int64_t many) {
    if (!is_sound(slab)) return REFUSED;
    for (const Window *window = windows; window < windows + many; window++)
        if (!is_ranked(slab, window->which) || window->inside < 0) return REFUSED;
    Room room;
    if (!make_room(&room, slab->count)) return drop_room(&room), NO_MEMORY;
    uint8_t inside[CHUNK];
    float *x = 0;
    for (Chunk chunk = {0}; next_chunk(slab, &chunk); ) {
        const int64_t block = chunk.block - slab->start / slab->block, beyond = CHUNK - chunk.here;
        load_base(slab, chunk.start, chunk.here, room.base);
        for (Window *window = windows; window < windows + many; window++) {
            if (window == windows || window->which != window[-1].which) {
                x = load_ranked(slab, window->which, &chunk, &room);
                memset(x + chunk.here, 0, (size_t)beyond * sizeof(float)); /* which are zeros too many */
            }
            const Sight seen = look_at(x, window->low, window->high, inside);
            window->above += seen.above;
            window->low_counts[block] += seen.low - (window->low ? 0 : beyond);
            window->high_counts[block] += seen.high - (window->high ? 0 : beyond);
            collect(window, x, inside, window->counts + block);
        }
    }
    drop_room(&room);
    return 0;
}

/* Count in each block what equals `value`; `counts` begins with the slab's first block. */
int32_t mergemill_stored_equal(const Slab *slab, int64_t which, float value, int64_t *counts) {
    if (!is_sound(slab) || !is_ranked(slab, which)) return REFUSED;
    Room room;
    if (!make_room(&room, slab->count)) return drop_room(&room), NO_MEMORY;
    for (Chunk chunk = {0}; next_chunk(slab, &chunk); ) {
        load_base(slab, chunk.start, chunk.here, room.base);
        counts[chunk.block - slab->start / slab->block] +=
            count_equal(load_ranked(slab, which, &chunk, &room), chunk.here, value);
    }
    drop_room(&room);
    return 0;
}

/* Mark in `bits` the elements whose ranked value belongs to the cut; `mask` has room for a byte each. */
int32_t mergemill_stored_marks(const Slab *slab, int64_t which, const Cut *cut, uint8_t *mask, uint8_t *bits) {
    if (!is_sound(slab) || !is_ranked(slab, which)) return REFUSED;
    Room room;
    int64_t seen = 0;
    if (!make_room(&room, slab->count)) return drop_room(&room), NO_MEMORY;
    for (Chunk chunk = {0}; next_chunk(slab, &chunk); ) {
        load_base(slab, chunk.start, chunk.here, room.base);
        mark_cut(load_ranked(slab, which, &chunk, &room), &chunk, cut, &seen, mask + chunk.start);
    }
    pack_bits(mask, slab->size, bits);
    drop_room(&room);
    return 0;
}
