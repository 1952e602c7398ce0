/* The rows of a slab, of which chance keeps elements by the rank of their magnitude (binned.c): read, marked, summed. */

#include "rows.h"

WIDTHS static void hash_counters(const uint32_t *restrict counters, int64_t size, uint32_t first, uint32_t second,
                                 uint16_t *restrict out) {
    for (int64_t j = 0; j < size; j++) out[j] = (uint16_t)((hash_counter(counters[j], first, second) ^ 0x80000000u) >> 16);
}

/* The upper halves, made unsigned, of a row's random numbers. */
static void find_halves(const RowPlace *place, uint16_t *out) {
    for (int64_t at = place->start, stop = at + place->columns; at < stop; ) {
        const uint32_t *own = place->random + 2 * (at / BLOCK - place->first / BLOCK);
        const int64_t here = least(stop - at, BLOCK - at % BLOCK);
        hash_counters(all_counters() + at % BLOCK, here, own[0], own[1], out);
        at += here, out += here;
    }
}

/* Add bits that follow `at` others; what is beyond them in their last byte is 0. */
static void put_bits(uint8_t *bits, int64_t at, const uint8_t *own, int64_t size) {
    const int shift = (int)(at % 8);
    bits += at / 8;
    if (shift == 0) {
        memcpy(bits, own, (size_t)((size + 7) / 8));
        return;
    }
    for (int64_t j = 0; j < size; j += 8) {
        bits[j / 8] = (uint8_t)(bits[j / 8] | own[j / 8] << shift);
        if (j + 8 - shift < size) bits[j / 8 + 1] = (uint8_t)(own[j / 8] >> (8 - shift));
    }
}

/* Sums of |x| of whole tensors and of what is kept of them, for each cut, in the order of the other sums. */
typedef struct {
    double before[LANES], after[LANES];
    double *whole, *kept;
} Norms;

WIDTHS static void add_norms(double *restrict before, double *restrict after, const float *restrict x,
                             const float *restrict kept, int64_t size) {
    for (int64_t j = 0; j < size; j++) before[j] += (double)x[j];
    for (int64_t j = 0; j < size; j++) after[j] += (double)kept[j];
}

/* Of twice as many elements as there are lanes: each lane is loaded and stored once. */
WIDTHS static void add_two_norms(double *restrict before, double *restrict after, const float *restrict x,
                                 const float *restrict kept) {
    for (int64_t j = 0; j < LANES; j++) before[j] = before[j] + (double)x[j] + (double)x[j + LANES];
    for (int64_t j = 0; j < LANES; j++) after[j] = after[j] + (double)kept[j] + (double)kept[j + LANES];
}

/* Add a row that begins at `start`. */
static void sum_row(Norms *norms, const Slab *slab, int64_t start, const RowRoom *room, int64_t columns) {
    float kept[2 * LANES];
    for (int64_t at = start, stop = start + columns; at < stop; ) {
        const int64_t inside = at % slab->block % BLOCK, lane = inside % LANES;
        if (inside == 0) memset(norms->before, 0, sizeof norms->before), memset(norms->after, 0, sizeof norms->after);
        const int64_t left = least(stop - at, slab->block - at % slab->block);
        const int two = lane == 0 && inside + 2 * LANES <= BLOCK && left >= 2 * LANES;
        const int64_t here = two ? 2 * LANES : least(LANES - lane, left);
        const float *x = room->row + (at - start);
        keep_by_bits(x, room->stays, at - start, here, kept);
        if (two)
            add_two_norms(norms->before, norms->after, x, kept);
        else
            add_norms(norms->before + lane, norms->after + lane, x, kept, here);
        at += here;
        if (at != slab->size && at % slab->block % BLOCK) continue;
        fold_lanes(norms->before, norms->whole), norms->whole += LAST;
        fold_lanes(norms->after, norms->kept), norms->kept += LAST;
    }
}

WIDTHS static void take_magnitudes(const float *restrict x, int64_t size, float *restrict out) {
    for (int64_t j = 0; j < size; j++) out[j] = fabsf(x[j]);
}

WIDTHS static void take_differences(const uint16_t *restrict data, const uint16_t *restrict less, int64_t size,
                                    float *restrict out) {
    for (int64_t j = 0; j < size; j++) out[j] = fabsf(decode_bf16(data[j]) - decode_bf16(less[j]));
}

/* Load a row's magnitudes; of two plain bfloat16 tensors, as most are, in one go. */
static void load_row(const Slab *slab, int64_t which, int64_t start, int64_t columns, float *row) {
    float base[CHUNK], x[CHUNK];
    const int64_t at = which + slab->has_base;
    const int less = slab->has_base && !slab->vectors[which] && slab->scales[which] == 1.0f;
    if (less && slab->dtypes[0] == BF16 && slab->dtypes[at] == BF16) {
        take_differences((const uint16_t *)slab->data[at] + start, (const uint16_t *)slab->data[0] + start, columns, row);
        return;
    }
    for (int64_t j = 0, here; j < columns; j += here) {
        here = least(CHUNK, columns - j);
        load_base(slab, start + j, here, base);
        load(slab, which, start + j, here, base, x);
        take_magnitudes(x, here, row + j);
    }
}

/* Room for rows of so many columns, in one piece of memory from the keys on; 0 where there is none. */
static int make_row_room(RowRoom *room, int64_t columns) {
    const size_t count = (size_t)columns + 2, bits = count / 8 + 8;
    room->bins = malloc(sizeof *room->bins);
    room->keys = malloc(count * (sizeof(uint64_t) + 3 * sizeof(uint32_t) + 3 * sizeof(uint16_t)) + 2 * bits);
    if (!room->bins || !room->keys) return 0;
    room->row = (float *)(room->keys + count), room->index = (uint32_t *)(room->row + count);
    room->places = room->index + count, room->halves = (uint16_t *)(room->places + count);
    room->own = room->halves + count, room->limits = room->own + count;
    room->stays = (uint8_t *)(room->limits + count), room->open = room->stays + bits;
    return 1;
}

static void drop_row_room(RowRoom *room) {
    free(room->bins);
    free(room->keys);
}

/* Mark in `kept_bits` what stays of one tensor, row by row, the limits given by rank, the smallest magnitude first;
 * `random` has the two keys of each BLOCK that the slab touches. Unless NULL, `whole` and `kept` get 32 sums of |x| for
 * each cut, of all and of what stays. */
int32_t mergemill_stored_rows(const Slab *slab, int64_t which, int64_t columns, const int32_t *limits,
                              const uint32_t *random, uint8_t *kept_bits, double *whole, double *kept) {
    if (!is_sound(slab) || !is_tensor(slab, which)) return REFUSED;
    if (columns < 1 || columns > INT32_MAX || slab->size % columns) return REFUSED; /* ranks are 31 bits */
    RowRoom room;
    Norms norms;
    norms.whole = whole, norms.kept = kept;
    if (!make_row_room(&room, columns)) return drop_row_room(&room), NO_MEMORY;
    for (int64_t rank = 0; rank <= columns; rank++) room.limits[rank] = (uint16_t)upper_half(limits[least(rank, columns - 1)]);
    for (int64_t start = 0; start < slab->size; start += columns) {
        const RowPlace place = {slab->start + start, columns, slab->start, limits, random};
        load_row(slab, which, start, columns, room.row);
        find_halves(&place, room.halves);
        mark_row(&room, &place);
        put_bits(kept_bits, start, room.stays, columns);
        if (whole) sum_row(&norms, slab, start, &room, columns);
    }
    drop_row_room(&room);
    return 0;
}
