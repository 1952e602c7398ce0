/* Ranks among all values of a slab that is a whole tensor: its keys are written down once, and what is looked for is
 * found among them bit by bit. A sample says between which keys, all but surely; it plays no part in the result.
 */

#include "slab.h"

enum { SAMPLED = 2048, FEW = 4 * SAMPLED }; /* keys; of so few no sample is taken */

/* Keys that are not under `least`. */
WIDTHS static int64_t count_from(const uint32_t *keys, int64_t size, uint32_t least) {
    int32_t count = 0;
    for (int64_t j = 0; j < size; j++) count += keys[j] >= least;
    return count;
}

WIDTHS static int64_t count_same(const uint32_t *keys, int64_t size, uint32_t key) {
    int32_t count = 0;
    for (int64_t j = 0; j < size; j++) count += keys[j] == key;
    return count;
}

/* The key of that rank, 1 being the largest, which is known to lie from `low` to `high`. */
static uint32_t find_key(const uint32_t *keys, int64_t size, int64_t rank, uint32_t low, uint32_t high) {
    uint32_t key = 0;
    for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
        const uint32_t tried = key | bit;
        if (tried <= high && (tried <= low || count_from(keys, size, tried) >= rank)) key = tried;
    }
    return key;
}

/* The same among many keys: `near` has room for all of them. */
static uint32_t find_key_of_many(const uint32_t *keys, int64_t size, int64_t rank, uint32_t *near) {
    uint32_t sample[SAMPLED];
    uint8_t inside[CHUNK];
    for (int64_t i = 0; i < SAMPLED; i++) sample[i] = keys[i * (size / SAMPLED)];
    const double place = (double)rank / (double)size * SAMPLED, margin = 2 + 4 * sqrt(place * (1 - place / SAMPLED));
    const int64_t first = (int64_t)(place - margin), last = (int64_t)(place + margin) + 1;
    const uint32_t low = last > SAMPLED ? 0 : find_key(sample, SAMPLED, last, 0, UINT32_MAX);
    const uint32_t high = first < 1 ? UINT32_MAX : find_key(sample, SAMPLED, first, low, UINT32_MAX);
    Window window = {.low = low, .high = high, .keys = near, .room = size};
    int64_t lows = 0, highs = 0, count = 0;
    for (int64_t j = 0; j < size; j += CHUNK) {
        const Sight seen = watch_keys(keys + j, low, high, inside);
        window.above += seen.above, lows += seen.low, highs += seen.high;
        collect(&window, keys + j, inside, &count);
    }
    if (rank <= window.above) return find_key(keys, size, rank, high, UINT32_MAX);
    if (rank <= window.above + highs) return high;
    const int64_t left = rank - window.above - highs;
    if (left > window.inside) return left <= window.inside + lows ? low : find_key(keys, size, rank, 0, low);
    return find_key(near, window.inside, left, low, high);
}

/* Fill in what is known of the key of a rank. */
static void place_rank(const Slab *slab, Rank *rank, const uint32_t *keys, uint32_t *near) {
    const int64_t size = slab->size;
    if (!rank->rank) rank->rank = (int64_t)floor(rank->share * (double)count_from(keys, size, 1));
    if (!rank->rank) return;
    rank->key = size > FEW ? find_key_of_many(keys, size, rank->rank, near)
                           : find_key(keys, size, rank->rank, 0, UINT32_MAX);
    rank->above = rank->key < UINT32_MAX ? count_from(keys, size, rank->key + 1) : 0;
    rank->ties = rank->block_ties = rank->rank - rank->above;
    rank->block = slab->start / slab->block;
    for (int64_t at = 0; at < size; at += slab->block, rank->block++) {
        const int64_t equal = count_same(keys + at, least(slab->block, size - at), rank->key);
        if (rank->block_ties <= equal) return;
        rank->block_ties -= equal;
    }
}

/* Find ranks of values, those of one value side by side; `keys` has room for whole chunks of each value, and once more. */
int32_t mergemill_stored_ranks(const Slab *slab, Rank *ranks, int64_t many, uint32_t *keys, int64_t room_keys) {
    if (!is_sound(slab) || many < 0) return REFUSED;
    const int64_t row = (slab->size + CHUNK - 1) / CHUNK * CHUNK;
    int64_t rows = 1;
    for (Rank *rank = ranks; rank < ranks + many; rank++) {
        if (!is_ranked(slab, rank->which) && !is_scored(slab, rank->which)) return REFUSED;
        if (rank->rank < 0 || rank->rank > slab->size || !(rank->share >= 0 && rank->share <= 1)) return REFUSED;
        rows += rank == ranks || rank->which != rank[-1].which;
    }
    if (room_keys / rows < row) return REFUSED;
    Room room;
    if (!make_room(&room, slab->count)) return drop_room(&room), NO_MEMORY;
    uint32_t found[CHUNK];
    memset(keys, 0, (size_t)(rows * row) * sizeof *keys);
    for (Chunk chunk = {0}; next_chunk(slab, &chunk); ) {
        uint32_t *into = keys + chunk.start;
        load_base(slab, chunk.start, chunk.here, room.base);
        for (Rank *rank = ranks; rank < ranks + many; rank++) {
            if (rank != ranks && rank->which == rank[-1].which) continue;
            if (is_scored(slab, rank->which)) {
                find_keys(slab, rank->which, &chunk, &room, 0, found);
                memcpy(into, found, (size_t)chunk.here * sizeof *found);
            } else {
                find_magnitudes(load_ranked(slab, rank->which, &chunk, &room), chunk.here, into);
            }
            into += row;
        }
    }
    drop_room(&room);
    const uint32_t *own = keys;
    for (Rank *rank = ranks; rank < ranks + many; rank++) {
        if (rank != ranks && rank->which != rank[-1].which) own += row;
        place_rank(slab, rank, own, keys + (rows - 1) * row);
    }
    return 0;
}

static int32_t find_cut(const Slab *slab, int64_t which, Keep *keep, uint32_t *keys, int64_t room_keys) {
    Rank ranks[] = {{.which = which, .rank = keep->rank}, {.which = which, .rank = keep->outlier_rank}};
    if (keep->rank < 1) return REFUSED;
    const int32_t done = mergemill_stored_ranks(slab, ranks, 1 + (keep->outlier_rank != 0), keys, room_keys);
    if (done < 0) return done;
    keep->kind = KEEP_CUT, keep->has_outliers = keep->outlier_rank != 0;
    keep->cut = (Cut){bits_to_float(ranks[0].key), ranks[0].block, ranks[0].block_ties};
    keep->outliers = (Cut){bits_to_float(ranks[1].key), ranks[1].block, ranks[1].block_ties};
    return 0;
}

/* Make cuts of what is kept by rank, of so many slabs that are whole tensors: their data and keeps follow one another.
 * `keys` has room for whole chunks of one tensor, twice. */
int32_t mergemill_find_cuts(const Slab *slab, int64_t many, Keep *keeps, uint32_t *keys, int64_t room_keys) {
    if (many < 0 || slab->count < 1) return REFUSED;
    Slab own = *slab;
    for (int64_t n = 0; n < many * slab->count; n++) {
        own.data = slab->data + n / slab->count * (slab->count + slab->has_base);
        if (keeps[n].kind != KEEP_RANK) continue;
        const int32_t done = find_cut(&own, n % slab->count, keeps + n, keys, room_keys);
        if (done < 0) return done;
    }
    return 0;
}
