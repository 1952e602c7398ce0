/* Counting and marking the magnitudes of slabs as they are stored, or the spread over all tensors, by rank. */

#include "slab.h"

#define QUIET 0x7FC00000u /* the bits of what is no number */

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

float *load_ranked(const Slab *slab, int64_t which, const Chunk *chunk, Room *room) {
    if (which >= 0) {
        load(slab, which, chunk->start, chunk->here, room->base, room->x[which]);
        return room->x[which];
    }
    for (int64_t i = 0; i < slab->count; i++) load(slab, i, chunk->start, chunk->here, room->base, room->x[i]);
    if (which == IMPORTANCE)
        find_importances(slab, chunk, room->x[0], room->x[1], room->total);
    else
        find_spread(room->x, slab->count, chunk->here, room->total);
    return room->total;
}

void find_keys(const Slab *slab, int64_t which, const Chunk *chunk, Room *room, uint32_t low, uint32_t *keys) {
    double sum[CHUNK];
    float scores[CHUNK];
    uint16_t index[CHUNK];
    const int64_t own = which - slab->count;
    for (int64_t i = 0; i < slab->count; i++) load(slab, i, chunk->start, chunk->here, room->base, room->x[i]);
    sum_all(room->x, slab->count, chunk->here, sum);
    const float least = low >> 31 ? bits_to_float(low ^ 0x80000000u) : -1.0f;
    const int64_t found = score(slab, own, room->x[own], sum, chunk->here, least, index, scores);
    memset(keys, 0, CHUNK * sizeof *keys);
    for (int64_t k = 0; k < found; k++) {
        const uint32_t bits = float_to_bits(scores[k] + 0.0f);
        const uint32_t ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
        keys[index[k]] = (bits & 0x7FFFFFFFu) > INFINITE ? ~(0x80000000u | QUIET) : ordered;
    }
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

/* Write the keys of `run` values from `first` on, and from every `stride` after it as long as all lie in the slab. */
int32_t mergemill_stored_sample(const Slab *slab, int64_t which, int64_t first, int64_t stride, int64_t run,
                                uint32_t *out) {
    if (!is_sound(slab) || first < 0 || stride < 1 || run < 1 || run > CHUNK) return REFUSED;
    const int scored = is_scored(slab, which);
    if (!scored && !is_ranked(slab, which)) return REFUSED;
    Room room;
    uint32_t keys[CHUNK];
    if (!make_room(&room, slab->count)) return drop_room(&room), NO_MEMORY;
    for (Chunk chunk = {.start = first, .here = run}; chunk.start + run <= slab->size; chunk.start += stride, out += run) {
        load_base(slab, chunk.start, run, room.base);
        if (scored) {
            find_keys(slab, which, &chunk, &room, 0, keys);
            memcpy(out, keys, (size_t)run * sizeof *keys);
        } else {
            find_magnitudes(load_ranked(slab, which, &chunk, &room), run, out);
        }
    }
    drop_room(&room);
    return 0;
}

/* Plain loops: of comparisons of tiles the compiler makes one at a time where a tile is more than a register. */
WIDTHS Sight watch_keys(const uint32_t *restrict keys, uint32_t low, uint32_t high, uint8_t *restrict inside) {
    const uint32_t span = high > low ? high - low - 1 : 0;
    int32_t above = 0, lows = 0, highs = 0;
    for (int64_t j = 0; j < CHUNK; j++) {
        const uint32_t key = keys[j];
        above += key > high;
        lows += key == low;
        highs += key == high;
    }
    for (int64_t j = 0; j < CHUNK; j++) inside[j] = keys[j] - (low + 1) < span;
    return (Sight){above, lows, highs};
}

void collect(Window *window, const uint32_t *keys, const uint8_t *inside, int64_t *count) {
    int64_t found = window->inside;
    for (int64_t j = 0; j < CHUNK; j += 8) {
        uint64_t eight;
        memcpy(&eight, inside + j, 8);
        if (eight == 0x0101010101010101u && found + 8 <= window->room) {
            memcpy(window->keys + found, keys + j, 8 * sizeof *keys);
            found += 8;
            continue;
        }
        for (; eight; eight &= eight - 1) {
            if (found < window->room) window->keys[found] = keys[j + (__builtin_ctzll(eight) >> 3)];
            found++;
        }
    }
    *count += found - window->inside;
    window->inside = found;
}

/* The least low end of the windows of the same values from this one on. */
static uint32_t find_lowest(const Window *window, const Window *end) {
    uint32_t low = window->low;
    for (const Window *next = window + 1; next < end && next->which == window->which; next++)
        low = next->low < low ? next->low : low;
    return low;
}

/* Look at windows of ranked values; what `above` and `inside` begin with is added to. */
int32_t mergemill_stored_windows(const Slab *slab, Window *windows, int64_t many) {
    if (!is_sound(slab)) return REFUSED;
    for (const Window *window = windows; window < windows + many; window++)
        if ((!is_ranked(slab, window->which) && !is_scored(slab, window->which)) || window->inside < 0) return REFUSED;
    Room room;
    if (!make_room(&room, slab->count)) return drop_room(&room), NO_MEMORY;
    uint8_t inside[CHUNK];
    uint32_t keys[CHUNK];
    for (Chunk chunk = {0}; next_chunk(slab, &chunk); ) {
        const int64_t block = chunk.block - slab->start / slab->block, beyond = CHUNK - chunk.here;
        load_base(slab, chunk.start, chunk.here, room.base);
        for (Window *window = windows; window < windows + many; window++) {
            if (window != windows && window->which == window[-1].which) {
                /* its keys are there */
            } else if (window->which >= slab->count) {
                find_keys(slab, window->which, &chunk, &room, find_lowest(window, windows + many), keys);
            } else {
                find_magnitudes(load_ranked(slab, window->which, &chunk, &room), chunk.here, keys);
                memset(keys + chunk.here, 0, (size_t)beyond * sizeof *keys); /* which are zeros too many */
            }
            const Sight seen = watch_keys(keys, window->low, window->high, inside);
            window->above += seen.above;
            window->low_counts[block] += seen.low - (window->low ? 0 : beyond);
            window->high_counts[block] += seen.high - (window->high ? 0 : beyond);
            collect(window, keys, inside, window->counts + block);
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
