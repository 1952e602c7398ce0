/* Merging slabs as they are stored, in one go, and the sums that methods must know before: decoded, subtracted, thinned,
 * joined and encoded a chunk at a time in the first-level cache.
 */

#include "slab.h"

/* total = the mean of the deltas of the elected sign, each with its share as weight. */
WIDTHS static void share_agreeing(float *restrict total, const float *const *x, const float *share, int64_t count,
                                  int64_t size) {
    float sign[CHUNK], divisor[CHUNK] = {0};
    memcpy(sign, x[0], (size_t)size * sizeof(float));
    for (int64_t i = 1; i < count; i++)
        for (int64_t j = 0; j < size; j++) sign[j] += x[i][j];
    elect(sign, size);
    memset(total, 0, (size_t)size * sizeof(float));
    for (int64_t i = 0; i < count; i++) {
        const float *restrict own = x[i];
        for (int64_t j = 0; j < size; j++) {
            const float agrees = (own[j] * sign[j] > 0 ? 1.0f : 0.0f) * share[i];
            total[j] += own[j] * agrees;
            divisor[j] += agrees;
        }
    }
    for (int64_t j = 0; j < size; j++) total[j] /= divisor[j] < 1e-6f ? 1e-6f : divisor[j];
}

/* How many tensors change each element by more than epsilon. */
WIDTHS static void count_changed(float *const *x, int64_t count, int64_t size, float epsilon, float *restrict changed) {
    memset(changed, 0, (size_t)size * sizeof(float));
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < size; j++) changed[j] += fabsf(x[i][j]) > epsilon ? 1.0f : 0.0f;
}

/* total = the mean of what is changed; what one tensor alone changes is multiplied by its weight and one. */
WIDTHS static void mean_of_changes(float *restrict total, float *const *x, const float *weight, int64_t count,
                                   int64_t size, float epsilon) {
    float changed[CHUNK];
    count_changed(x, count, size, epsilon, changed);
    for (int64_t i = 0; i < count; i++) {
        const float *restrict own = x[i];
        const float factor = weight[i];
        for (int64_t j = 0; j < size; j++) {
            const float kept = own[j] * (fabsf(own[j]) > epsilon ? 1.0f : 0.0f);
            const float amplified = kept * ((changed[j] == 1 ? 1.0f : 0.0f) * factor + 1);
            total[j] = i ? total[j] + amplified : amplified;
        }
    }
    for (int64_t j = 0; j < size; j++) total[j] /= changed[j] < 1 ? 1 : changed[j];
}

WIDTHS static void add_votes(float *restrict votes, const float *restrict total, const float *restrict x, float mask,
                             int64_t size) {
    for (int64_t j = 0; j < size; j++) votes[j] += fabsf(x[j]) >= fabsf(total[j] - x[j]) * mask ? 1.0f : 0.0f;
}

WIDTHS static void keep_agreed(float *restrict total, const float *restrict votes, float least, int64_t size) {
    for (int64_t j = 0; j < size; j++) total[j] *= votes[j] >= least ? 1.0f : 0.0f;
}

/* total = the largest magnitude among the tensors whose sign is that of their sum, with that sign; 0 of a sum of 0. What
 * is no number stays so. */
WIDTHS static void farthest_agreeing(float *restrict total, float *const *x, int64_t count, int64_t size) {
    float sign[CHUNK];
    memcpy(sign, x[0], (size_t)size * sizeof(float));
    for (int64_t i = 1; i < count; i++)
        for (int64_t j = 0; j < size; j++) sign[j] += x[i][j];
    for (int64_t j = 0; j < size; j++) sign[j] = (sign[j] > 0 ? 1.0f : 0.0f) - (sign[j] < 0 ? 1.0f : 0.0f);
    memset(total, 0, (size_t)size * sizeof(float));
    for (int64_t i = 0; i < count; i++) {
        const float *restrict own = x[i];
        for (int64_t j = 0; j < size; j++) {
            const float along = own[j] * sign[j];
            total[j] = ((along > total[j]) | (along != along)) ? along : total[j];
        }
    }
    for (int64_t j = 0; j < size; j++) total[j] *= sign[j];
}

/* total = of each element the tensor of largest magnitude, of equals the later. */
WIDTHS static void largest_of_all(float *restrict total, float *const *x, int64_t count, int64_t size) {
    memcpy(total, x[0], (size_t)size * sizeof(float));
    for (int64_t i = 1; i < count; i++) {
        const float *restrict own = x[i];
        for (int64_t j = 0; j < size; j++) {
            const float later = fabsf(own[j]) >= fabsf(total[j]) ? 1.0f : 0.0f;
            total[j] = total[j] * (1.0f - later) + own[j] * later;
        }
    }
}

/* total = the one tensor, of each element no more than the reach. What is no number stays so. */
WIDTHS static void keep_near(float *restrict total, const float *restrict x, float reach, int64_t size) {
    for (int64_t j = 0; j < size; j++) {
        const float distance = fabsf(x[j]) < 1e-6f ? 1e-6f : fabsf(x[j]);
        const float share = 1.0f / distance * reach;
        total[j] = x[j] * (share < 0.0f ? 0.0f : share > 1.0f ? 1.0f : share);
    }
}

static int32_t count_from(const int32_t *keys, int64_t size, int32_t least) {
    int32_t count = 0;
    for (int64_t j = 0; j < size; j++) count += keys[j] >= least;
    return count;
}

/* Multiply by 0 what is not among the `kept` largest magnitudes, of equal ones the first; by 0 also what is no number,
 * which is larger than all numbers. */
WIDTHS static void keep_largest(float *x, int64_t size, int64_t kept) {
    int32_t keys[CHUNK];
    if (kept >= size) return;
    if (!kept) {
        memset(x, 0, (size_t)size * sizeof(float));
        return;
    }
    for (int64_t j = 0; j < size; j++) {
        const int32_t key = (int32_t)(float_to_bits(x[j]) & INT32_MAX);
        keys[j] = key > (int32_t)INFINITE ? (int32_t)INFINITE + 1 : key;
    }
    int32_t least_key = 0, found = (int32_t)size;
    for (int bit = 30; bit >= 0 && found != kept; bit--) {
        const int32_t tried = least_key | 1 << bit, count = count_from(keys, size, tried);
        if (count >= kept) least_key = tried, found = count;
    }
    if (found == kept) {
        for (int64_t j = 0; j < size; j++)
            x[j] *= ((keys[j] >= least_key) & (keys[j] <= (int32_t)INFINITE)) ? 1.0f : 0.0f;
        return;
    }
    int64_t room = kept;
    for (int64_t j = 0; j < size; j++) room -= (keys[j] > least_key) & (keys[j] <= (int32_t)INFINITE);
    for (int64_t j = 0; j < size; j++) {
        const int equal = keys[j] == least_key && keys[j] <= (int32_t)INFINITE && room-- > 0;
        x[j] *= equal || ((keys[j] > least_key) & (keys[j] <= (int32_t)INFINITE)) ? 1.0f : 0.0f;
    }
}

/* total = the weighted sum of what each tensor keeps of a group, in turn, of the elements that none before it has kept. */
WIDTHS static void take_turns(float *restrict total, float *const *x, const Join *join, int64_t count, int64_t size) {
    float unused[CHUNK];
    for (int64_t j = 0; j < size; j++) unused[j] = 1.0f, total[j] = 0.0f;
    for (int64_t i = 0; i < count; i++) {
        float *restrict own = x[i];
        for (int64_t j = 0; j < size; j++) own[j] *= unused[j];
        for (int64_t at = 0; at < size; at += join->group) {
            const int64_t here = least(join->group, size - at);
            keep_largest(own + at, here, here == join->group ? join->kept : join->kept * here / join->group);
        }
        for (int64_t j = 0; j < size; j++) unused[j] *= own[j] == 0 ? 1.0f : 0.0f;
        for (int64_t j = 0; j < size; j++) total[j] += own[j] * join->weight[i];
    }
}

WIDTHS static void add_weighted(float *restrict base, const float *restrict x, const float *restrict weight, int64_t size) {
    for (int64_t j = 0; j < size; j++) base[j] += x[j] * weight[j];
}

/* base += the tensors, one after the other, each column or each row of each times its weight. */
static void add_lines(const Slab *slab, const Join *join, const Chunk *chunk, Room *room) {
    for (int64_t i = 0; i < slab->count; i++) {
        const float *weight = join->lines + i * join->line_count;
        for (int64_t at = 0, here; at < chunk->here; at += here) {
            const int64_t place = slab->start + chunk->start + at, row = place / join->columns;
            const int64_t column = place - row * join->columns;
            here = least(chunk->here - at, join->columns - column);
            if (join->by_row)
                add_scaled(room->base + at, room->x[i] + at, here, weight[row]);
            else
                add_weighted(room->base + at, room->x[i] + at, weight + column, here);
        }
    }
}

/* Multiply by 0 what the tensors do not all change in one direction. */
WIDTHS static void keep_consensual(float *restrict total, float *const *x, int64_t count, int64_t size) {
    float rises[CHUNK] = {0}, falls[CHUNK] = {0};
    for (int64_t i = 0; i < count; i++) {
        const float *restrict own = x[i];
        for (int64_t j = 0; j < size; j++) {
            rises[j] += own[j] > 0 ? 1.0f : 0.0f;
            falls[j] += own[j] < 0 ? 1.0f : 0.0f;
        }
    }
    const float all = (float)count;
    for (int64_t j = 0; j < size; j++) total[j] *= ((rises[j] >= all) | (falls[j] >= all)) ? 1.0f : 0.0f;
}

WIDTHS static void drop_signs_of_zeros(float *total, int64_t size) {
    for (int64_t j = 0; j < size; j++) total[j] += 0.0f;
}

/* Keep of the total what the masks of enough tensors agree on, these taken whole. */
static void find_consensus(const Slab *slab, const Join *join, const Chunk *chunk, Room *room) {
    float votes[CHUNK] = {0};
    drop_signs_of_zeros(room->total, chunk->here);
    for (int64_t i = 0; i < slab->count; i++) {
        load(slab, i, chunk->start, chunk->here, room->base, room->x[i]);
        add_votes(votes, room->total, room->x[i], join->masks[i], chunk->here);
    }
    keep_agreed(room->total, votes, join->votes, chunk->here);
}

/* total = the mean of the tensors, each by its share: how far its score, if it belongs to the cut, is up to the highest,
 * which is its weight above the threshold; of a weight of 0, all alike. */
static void balance(const Slab *slab, const Keep *keeps, const Join *join, const Chunk *chunk, Room *room) {
    double sum[CHUNK];
    float divisor[CHUNK] = {0}, scores[CHUNK];
    uint16_t index[CHUNK];
    memset(room->total, 0, sizeof divisor);
    sum_all(room->x, slab->count, chunk->here, sum);
    for (int64_t i = 0; i < slab->count; i++) {
        const Cut *cut = &keeps[i].cut;
        const float *x = room->x[i];
        int64_t *seen = room->seen + 2 * i;
        const int64_t found = score(slab, i, x, sum, chunk->here, cut->threshold, index, scores);
        if (chunk->block_begins) *seen = 0;
        for (int64_t k = 0; k < found; k++) {
            const float own = scores[k];
            int mark = chunk->block < cut->block ? own >= cut->threshold : own > cut->threshold;
            if (chunk->block == cut->block && own == cut->threshold && *seen < cut->ties) mark = 1, ++*seen;
            float share = 1;
            if (join->weight[i] != 0) {
                share = (own - cut->threshold) / join->weight[i];
                share = share < 0 ? 0 : share > 1 ? 1 : share;
            }
            share *= (float)mark;
            divisor[index[k]] += share;
            room->total[index[k]] += x[index[k]] * share;
        }
    }
    for (int64_t j = 0; j < chunk->here; j++) room->total[j] /= divisor[j] < 1e-12f ? 1e-12f : divisor[j];
}

WIDTHS static void take_over(float *restrict base, const float *restrict other, const float *restrict importance,
                             float threshold, int64_t size) {
    for (int64_t j = 0; j < size; j++) base[j] += (other[j] - base[j]) * (importance[j] >= threshold ? 1.0f : 0.0f);
}

/* Join a chunk of all tensors; returns where the result is. */
static const float *join_chunk(const Slab *slab, const Keep *keeps, const Join *join, const Chunk *chunk, Room *room) {
    const float *const *x = (const float *const *)room->x;
    const int64_t count = slab->count, size = chunk->here;
    if (join->kind == JOIN_EXCEED) {
        find_importances(slab, chunk, x[0], x[1], room->total);
        take_over(room->x[0], x[1], room->total, join->threshold, size);
        return room->x[0];
    }
    if (join->kind == JOIN_LINES) {
        add_lines(slab, join, chunk, room);
        return room->base;
    }
    if (join->kind == JOIN_AGREE)
        sum_agreeing(room->total, x, join->weight, count, 0, size, join->normalize);
    else if (join->kind == JOIN_SHARE)
        share_agreeing(room->total, x, join->weight, count, size);
    else if (join->kind == JOIN_CHANGED)
        mean_of_changes(room->total, room->x, join->weight, count, size, join->threshold);
    else if (join->kind == JOIN_BALANCE)
        balance(slab, keeps, join, chunk, room);
    else if (join->kind == JOIN_FARTHEST)
        farthest_agreeing(room->total, room->x, count, size);
    else if (join->kind == JOIN_LARGEST)
        largest_of_all(room->total, room->x, count, size);
    else if (join->kind == JOIN_NEAR)
        keep_near(room->total, x[0], join->threshold, size);
    else if (join->kind == JOIN_TURNS)
        take_turns(room->total, room->x, join, count, size);
    else
        sum_weighted(room->total, x, join->weight, count, 0, size, join->divisor);
    if (join->kind == JOIN_SUM) return room->total;
    if (join->kind == JOIN_CONSENT) keep_consensual(room->total, room->x, count, size);
    if (join->masks) find_consensus(slab, join, chunk, room);
    add_scaled(room->base, room->total, size, join->lambda);
    return room->base;
}

/* What a merge of one slab is given, and room for a chunk of it. */
typedef struct {
    const Keep *keeps; /* or NULL */
    const Join *join;
    void *out;
    int32_t dtype;
    double *squares; /* or NULL */
    int64_t chunks;
    Room *room;
} Making;

static int64_t merge_slab(const Slab *slab, const Making *making) {
    const Keep *keeps = making->keeps;
    const Join *join = making->join;
    Room *room = making->room;
    float first[SAMPLE];
    int64_t broken = 0, column = 0;
    for (Chunk chunk = {0}; next_chunk(slab, &chunk); ) {
        const int64_t here = chunk.here;
        const int sampled = making->squares && chunk.sampled;
        double *squares = sampled ? making->squares + column : NULL;
        load_base(slab, chunk.start, here, room->base);
        for (int64_t i = 0; i < slab->count; i++) {
            float *x = room->x[i];
            load_plain(slab, i, chunk.start, here, room->base, x);
            if (sampled) {
                if (i == 0) memcpy(first, slab->has_base ? room->base : x, (size_t)here * sizeof(float));
                if (i == 0 && slab->has_base) squares[0] = sum_squares(first, 0, here);
                squares[(i + slab->has_base) * making->chunks] =
                    sum_squares(x, i && !slab->has_base ? first : 0, here);
            }
            scale(slab, i, here, x);
            if (!keeps || join->kind == JOIN_BALANCE) continue; /* there cuts are of scores */
            thin(x, slab, &chunk, keeps + i, room->seen + 2 * i);
            if (keeps[i].factor != 1.0f) multiply(x, here, keeps[i].factor);
        }
        const float *merged = join_chunk(slab, keeps, join, &chunk, room);
        if (sampled) {
            squares[(slab->count + slab->has_base) * making->chunks] = sum_squares(merged, first, here);
            column++;
        }
        broken += encode(merged, making->dtype, chunk.start, here, making->out);
    }
    return broken;
}

/* Merge `many` slabs that differ in their data, one after the other in `out`, encoded as `dtype`; `broken` gets of each
 * how many values of that are not finite. Keeps, joins and squares are those of one slab after those of the other.
 *
 * Of each sampled chunk `squares`, unless NULL, gets a column: the squares of the first tensor (the base, where there is
 * one), of the others (less the base; without one, less the first) and of the result less the first.
 */
int32_t mergemill_merge_stored(const Slab *slab, int64_t many, const Keep *keeps, const Join *joins, void *out,
                               int32_t dtype, double *squares, int64_t chunks, int64_t *broken) {
    const int64_t inputs = slab->count + slab->has_base;
    if (many < 0 || dtype < F32 || dtype > F16) return REFUSED;
    Slab own = *slab;
    for (int64_t n = 0; n < many; n++) {
        own.data = slab->data + n * inputs;
        const Keep *kept = keeps ? keeps + n * slab->count : NULL;
        if (!is_sound(&own) || !is_joined(&own, joins + n, kept)) return REFUSED;
        for (int64_t i = 0; kept && i < slab->count; i++)
            if (!is_kept(&own, kept + i)) return REFUSED;
    }
    Room room;
    if (!make_room(&room, slab->count)) return drop_room(&room), NO_MEMORY;
    for (int64_t n = 0; n < many; n++) {
        own.data = slab->data + n * inputs;
        const size_t start = (size_t)(n * slab->size) * (dtype == F32 ? sizeof(float) : sizeof(uint16_t));
        const Making making = {
            keeps ? keeps + n * slab->count : NULL, joins + n, (uint8_t *)out + start, dtype,
            squares ? squares + n * (inputs + 1) * chunks : NULL, chunks, &room};
        broken[n] = merge_slab(&own, &making);
    }
    drop_room(&room);
    return 0;
}

/* ------------------------------------------------------------------------------------------------------ statistics */

WIDTHS static void add_absolute(double *restrict lanes, const float *restrict x, int64_t size) {
    for (int64_t j = 0; j < size; j++) lanes[j] += (double)fabsf(x[j]);
}

WIDTHS static void add_products(double *restrict lanes, const float *restrict x, const float *restrict y, int64_t size) {
    for (int64_t j = 0; j < size; j++) lanes[j] += (double)x[j] * (double)y[j];
}

/* All three of a pair at once: each element is widened once. */
WIDTHS static void add_three_products(double *restrict lanes, const float *restrict x, const float *restrict y,
                                      int64_t size) {
    double *restrict crossed = lanes + LANES, *restrict others = crossed + LANES;
    for (int64_t j = 0; j < size; j++) {
        const double a = (double)x[j], b = (double)y[j];
        lanes[j] += a * a;
        crossed[j] += a * b;
        others[j] += b * b;
    }
}

/* Whether the sums of a block, or of BLOCK elements of it, end with this chunk. */
static int sums_end(const Slab *slab, const Chunk *chunk) {
    const int64_t stop = chunk->start + chunk->here;
    return stop == slab->size || stop % slab->block == 0 || stop % slab->block % BLOCK == 0;
}

/* For each tensor i and each j <= i, and each cut, 32 sums of products in float64. */
int32_t mergemill_stored_products(const Slab *slab, double *sums, int64_t cuts) {
    if (!is_sound(slab)) return REFUSED;
    const int64_t pairs = slab->count * (slab->count + 1) / 2;
    double *lanes = malloc((size_t)pairs * LANES * sizeof(double));
    Room room;
    if (!make_room(&room, slab->count) || !lanes) return drop_room(&room), free(lanes), NO_MEMORY;
    int64_t cut = 0;
    for (Chunk chunk = {0}; next_chunk(slab, &chunk); ) {
        if (chunk.sampled) memset(lanes, 0, (size_t)pairs * LANES * sizeof(double));
        load_base(slab, chunk.start, chunk.here, room.base);
        int64_t pair = 0;
        for (int64_t i = 0; i < slab->count; i++) {
            load(slab, i, chunk.start, chunk.here, room.base, room.x[i]);
            for (int64_t j = 0; j <= i && slab->count != 2; j++, pair++)
                add_products(lanes + pair * LANES, room.x[i], room.x[j], chunk.here);
        }
        if (slab->count == 2) add_three_products(lanes, room.x[0], room.x[1], chunk.here);
        if (!sums_end(slab, &chunk)) continue;
        for (pair = 0; pair < pairs; pair++) fold_lanes(lanes + pair * LANES, sums + (pair * cuts + cut) * LAST);
        cut++;
    }
    drop_room(&room);
    free(lanes);
    return 0;
}

/* Of one tensor, 32 sums of |x| for each cut, before and after it is thinned. */
int32_t mergemill_stored_norms(const Slab *slab, int64_t which, const Keep *keep, double *whole, double *kept) {
    if (!is_sound(slab) || !is_tensor(slab, which) || !is_kept(slab, keep)) return REFUSED;
    float base[CHUNK], x[CHUNK];
    double before[LANES], after[LANES];
    int64_t seen[2] = {0};
    for (Chunk chunk = {0}; next_chunk(slab, &chunk); ) {
        if (chunk.sampled) memset(before, 0, sizeof before), memset(after, 0, sizeof after);
        load_base(slab, chunk.start, chunk.here, base);
        load(slab, which, chunk.start, chunk.here, base, x);
        add_absolute(before, x, chunk.here);
        thin(x, slab, &chunk, keep, seen);
        add_absolute(after, x, chunk.here);
        if (!sums_end(slab, &chunk)) continue;
        fold_lanes(before, whole), whole += LAST;
        fold_lanes(after, kept), kept += LAST;
    }
    return 0;
}

/* For each tensor and each cut, 32 sums of x² over the marked elements, where the tensors spread most; `cut` NULL takes
 * all, and marks none. `mask` has room for a byte each. */
int32_t mergemill_stored_marked_squares(const Slab *slab, const Cut *cut, uint8_t *mask, uint8_t *bits, double *sums,
                                        int64_t cuts) {
    if (!is_sound(slab)) return REFUSED;
    double *lanes = malloc((size_t)slab->count * LANES * sizeof(double));
    Room room;
    if (!make_room(&room, slab->count) || !lanes) return drop_room(&room), free(lanes), NO_MEMORY;
    int64_t seen = 0, at = 0;
    for (Chunk chunk = {0}; next_chunk(slab, &chunk); ) {
        if (chunk.sampled) memset(lanes, 0, (size_t)slab->count * LANES * sizeof(double));
        load_base(slab, chunk.start, chunk.here, room.base);
        for (int64_t i = 0; i < slab->count; i++) load(slab, i, chunk.start, chunk.here, room.base, room.x[i]);
        if (cut) {
            find_spread(room.x, slab->count, chunk.here, room.total);
            mark_cut(room.total, &chunk, cut, &seen, mask + chunk.start);
        }
        for (int64_t i = 0; i < slab->count; i++) {
            if (cut) thin_by_mask(room.x[i], mask + chunk.start, chunk.here);
            add_products(lanes + i * LANES, room.x[i], room.x[i], chunk.here);
        }
        if (!sums_end(slab, &chunk)) continue;
        for (int64_t i = 0; i < slab->count; i++) fold_lanes(lanes + i * LANES, sums + (i * cuts + at) * LAST);
        at++;
    }
    if (cut) pack_bits(mask, slab->size, bits);
    drop_room(&room);
    free(lanes);
    return 0;
}

WIDTHS static void count_own(const float *restrict x, const float *restrict changed, int64_t size, float epsilon,
                             int64_t *counts) {
    int32_t shared = 0, alone = 0;
    for (int64_t j = 0; j < size; j++) {
        const int32_t own = x[j] * (fabsf(x[j]) > epsilon ? 1.0f : 0.0f) != 0;
        shared += own & (changed[j] != 1);
        alone += own & (changed[j] == 1);
    }
    counts[0] += shared;
    counts[1] += alone;
}

/* Count of each tensor the changed elements (as `mean_of_changes` takes them): those it shares with others, and those it
 * has alone. */
int32_t mergemill_stored_changes(const Slab *slab, float epsilon, int64_t *counts) {
    if (!is_sound(slab)) return REFUSED;
    Room room;
    if (!make_room(&room, slab->count)) return drop_room(&room), NO_MEMORY;
    for (Chunk chunk = {0}; next_chunk(slab, &chunk); ) {
        load_base(slab, chunk.start, chunk.here, room.base);
        for (int64_t i = 0; i < slab->count; i++) load(slab, i, chunk.start, chunk.here, room.base, room.x[i]);
        count_changed(room.x, slab->count, chunk.here, epsilon, room.total);
        for (int64_t i = 0; i < slab->count; i++)
            count_own(room.x[i], room.total, chunk.here, epsilon, counts + 2 * i);
    }
    drop_room(&room);
    return 0;
}
