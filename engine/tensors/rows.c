/* Marking what stays of each row of a slab, where chance hangs on the rank of a magnitude in its row, without a sort. */

#include "slab.h"

#ifdef HAS_GATHER
#include <immintrin.h>
#endif

#define SHIFT 17     /* of a magnitude's 31 bits, 14 are looked at first: its exponent and 6 more */
#define ROW_BINS 512 /* from the row's largest down, 8 octaves; the first bin has all that is smaller */
#define MANY 512     /* elements of a bin from which on they are put in order, instead of counting for each that needs it */

/* A row's elements by the bits they begin with. */
typedef struct {
    uint32_t counts[2][ROW_BINS]; /* of every other element: two counts in a row are seldom of one bin and wait less */
    uint32_t ranks[ROW_BINS];     /* of each bin's first */
    uint32_t limits[ROW_BINS];    /* the upper halves, made unsigned, of the least and the largest limit of its ranks */
    uint8_t ordered[ROW_BINS];
} Bins;

_Static_assert(ROW_BINS % 16 == 0, "bins are whole vectors");
_Static_assert(sizeof(Bins) % _Alignof(double) == 0, "sums may follow bins in memory");

enum { KEPT = 1, OPEN = 2 };

WIDTHS static int64_t count_below(const uint32_t *row, int64_t columns, uint32_t end) {
    int64_t below = 0;
    for (int64_t k = 0, here; k < columns; k += here) {
        int32_t count = 0;
        here = least(BLOCK, columns - k);
        for (int64_t i = k; i < k + here; i++) count += row[i] < end;
        below += count;
    }
    return below;
}

/* How many of a row are less than the element j, or equal and before it: a magnitude's bits have a next number. */
static int64_t find_rank(const uint32_t *row, int64_t columns, int64_t j) {
    return count_below(row, j, row[j] + 1) + count_below(row + j, columns - j, row[j]);
}

/* The bin of each magnitude. */
WIDTHS static void find_bins(const uint32_t *restrict row, int64_t columns, uint16_t *restrict out) {
    uint32_t most = 0;
    for (int64_t j = 0; j < columns; j++) most = row[j] > most ? row[j] : most;
    const int32_t first = (int32_t)(most >> SHIFT) - (ROW_BINS - 1);
    for (int64_t j = 0; j < columns; j++) {
        const int32_t bin = (int32_t)(row[j] >> SHIFT) - first;
        out[j] = (uint16_t)(bin > 0 ? bin : 0);
    }
}

static void fill_bins(const uint16_t *own, int64_t columns, Bins *bins) {
    memset(bins->counts, 0, sizeof bins->counts);
    memset(bins->ordered, 0, sizeof bins->ordered);
    int64_t j = 0;
    for (; j + 2 <= columns; j += 2) bins->counts[0][own[j]]++, bins->counts[1][own[j + 1]]++;
    if (j < columns) bins->counts[0][own[j]]++;
}

static inline uint32_t upper_half(int32_t limit) { return ((uint32_t)limit ^ 0x80000000u) >> 16; }

/* The limits change in one direction, so that those of a bin's ranks lie between its first and the next bin's first. */
WIDTHS static void find_limits(Bins *bins, const uint16_t *halves) {
    uint32_t first[ROW_BINS + 1], rank = 0;
    for (int64_t bin = 0; bin < ROW_BINS; bin++) {
        bins->ranks[bin] = rank;
        first[bin] = halves[rank];
        rank += bins->counts[0][bin] + bins->counts[1][bin];
    }
    first[ROW_BINS] = halves[rank];
    for (int64_t bin = 0; bin < ROW_BINS; bin++) {
        const uint32_t here = first[bin], next = first[bin + 1];
        bins->limits[bin] = (here < next ? here : next) | (here < next ? next : here) << 16;
    }
}

/* Whether elements stay whatever their rank in their bin is; or whether that is open. */
WIDTHS static void decide(const int32_t *restrict bits, const uint16_t *restrict own, int64_t columns,
                          const uint32_t *restrict limits, uint8_t *restrict out) {
    for (int64_t j = 0; j < columns; j++) {
        const uint32_t pair = limits[own[j]], half = upper_half(bits[j]);
        const uint32_t kept = half < (pair & 0xFFFF), dropped = half > pair >> 16;
        out[j] = (uint8_t)(kept | (OPEN - (kept | dropped) * OPEN));
    }
}

#ifdef HAS_GATHER
/* `find_limits`, with the ranks of 16 bins added up at once and their limits looked up together; of `halves`, one more
 * than there are ranks is read. */
__attribute__((target("avx512f"))) static void find_limits_wide(Bins *bins, const uint16_t *halves) {
    const __m512i zero = _mm512_setzero_si512(), last = _mm512_set1_epi32(15);
    __m512i before = zero; /* the rank of the first of the 16, in every lane */
    for (int64_t bin = 0; bin < ROW_BINS; bin += 16) {
        const __m512i own =
            _mm512_add_epi32(_mm512_loadu_si512(bins->counts[0] + bin), _mm512_loadu_si512(bins->counts[1] + bin));
        __m512i sum = _mm512_add_epi32(own, _mm512_alignr_epi32(own, zero, 15));
        sum = _mm512_add_epi32(sum, _mm512_alignr_epi32(sum, zero, 14));
        sum = _mm512_add_epi32(sum, _mm512_alignr_epi32(sum, zero, 12));
        sum = _mm512_add_epi32(sum, _mm512_alignr_epi32(sum, zero, 8));
        const __m512i next = _mm512_add_epi32(before, sum), rank = _mm512_sub_epi32(next, own);
        _mm512_storeu_si512(bins->ranks + bin, rank);
        const __m512i lower = _mm512_set1_epi32(0xFFFF);
        const __m512i here = _mm512_and_si512(_mm512_i32gather_epi32(rank, halves, 2), lower);
        const __m512i there = _mm512_and_si512(_mm512_i32gather_epi32(next, halves, 2), lower);
        const __m512i most = _mm512_slli_epi32(_mm512_max_epu32(here, there), 16);
        _mm512_storeu_si512(bins->limits + bin, _mm512_or_si512(_mm512_min_epu32(here, there), most));
        before = _mm512_permutexvar_epi32(last, next);
    }
}

/* `decide`, of as many elements as are whole vectors; returns how many. The compiler looks limits up one by one. */
__attribute__((target("avx512f"))) static int64_t decide_wide(const int32_t *bits, const uint16_t *own, int64_t columns,
                                                               const uint32_t *limits, uint8_t *out) {
    const __m512i sign = _mm512_set1_epi32(INT32_MIN), lower = _mm512_set1_epi32(0xFFFF);
    int64_t j = 0;
    for (; j + 16 <= columns; j += 16) {
        const __m512i bins = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(own + j)));
        const __m512i pair = _mm512_i32gather_epi32(bins, limits, 4);
        const __m512i half = _mm512_srli_epi32(_mm512_xor_si512(_mm512_loadu_si512(bits + j), sign), 16);
        const __mmask16 kept = _mm512_cmplt_epu32_mask(half, _mm512_and_si512(pair, lower));
        const __mmask16 open = _mm512_mask_cmple_epu32_mask((__mmask16)~kept, half, _mm512_srli_epi32(pair, 16));
        const __m512i state = _mm512_or_si512(_mm512_maskz_set1_epi32(kept, KEPT), _mm512_maskz_set1_epi32(open, OPEN));
        _mm_storeu_si128((__m128i *)(out + j), _mm512_cvtepi32_epi8(state));
    }
    return j;
}
#endif

static int compare_keys(const void *left, const void *right) {
    const uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;
    return (a > b) - (a < b);
}

/* Room for a row: its magnitudes, random numbers, bins, the upper halves of the limits, and keys to put it in order. */
typedef struct {
    float *base, *x;
    uint32_t *row;
    int32_t *bits;
    uint16_t *own, *halves;
    uint64_t *keys;
    Bins *bins;
} RowRoom;

/* Mark all elements of one bin, put in order by magnitude and column. */
static void mark_bin(const RowRoom *room, uint16_t bin, int64_t columns, const int32_t *limits, uint8_t *mask) {
    int64_t count = 0;
    int same = 1;
    for (int64_t k = 0; k < columns; k++) {
        if (room->own[k] != bin) continue;
        room->keys[count++] = (uint64_t)room->row[k] << 32 | (uint64_t)k;
        same &= room->keys[0] >> 32 == room->row[k];
    }
    if (!same) qsort(room->keys, (size_t)count, sizeof *room->keys, compare_keys);
    for (int64_t i = 0; i < count; i++) {
        const uint32_t k = (uint32_t)room->keys[i];
        mask[k] = room->bits[k] < limits[room->bins->ranks[bin] + i];
    }
}

/* Mark an element whose rank matters, or all of its bin. */
static void mark_open(const RowRoom *room, int64_t j, int64_t columns, const int32_t *limits, uint8_t *mask) {
    Bins *bins = room->bins;
    const uint16_t bin = room->own[j];
    if (bins->counts[0][bin] + bins->counts[1][bin] < MANY) {
        mask[j] = room->bits[j] < limits[find_rank(room->row, columns, j)];
    } else if (!bins->ordered[bin]) {
        mark_bin(room, bin, columns, limits, mask);
        bins->ordered[bin] = 1;
    }
}

/* Mark what stays of a row: the elements whose random number is under the limit of their rank. */
static void mark_row(const RowRoom *room, int64_t columns, const int32_t *limits, uint8_t *mask) {
    find_bins(room->row, columns, room->own);
    fill_bins(room->own, columns, room->bins);
    int64_t j = 0;
#ifdef HAS_GATHER
    if (__builtin_cpu_supports("avx512f")) {
        find_limits_wide(room->bins, room->halves);
        j = decide_wide(room->bits, room->own, columns, room->bins->limits, mask);
    } else
#endif
        find_limits(room->bins, room->halves);
    decide(room->bits + j, room->own + j, columns - j, room->bins->limits, mask + j);
    j = 0;
    for (; j + 8 <= columns; j += 8) {
        uint64_t eight;
        memcpy(&eight, mask + j, 8);
        if (!(eight & 0x0202020202020202u)) continue;
        for (int64_t k = j; k < j + 8; k++)
            if (mask[k] & OPEN) mark_open(room, k, columns, limits, mask);
    }
    for (; j < columns; j++)
        if (mask[j] & OPEN) mark_open(room, j, columns, limits, mask);
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

/* Sums of |x| of whole tensors and of what is kept of them, for each cut, in the order of the other sums. */
typedef struct {
    double before[LANES], after[LANES];
    double *whole, *kept;
} Norms;

WIDTHS static void add_norms(double *restrict before, double *restrict after, const float *restrict x,
                             const uint8_t *restrict mask, int64_t size) {
    for (int64_t j = 0; j < size; j++) before[j] += (double)fabsf(x[j]);
    for (int64_t j = 0; j < size; j++) after[j] += (double)fabsf(x[j] * (float)mask[j]);
}

/* Of twice as many elements as there are lanes: each lane is loaded and stored once. */
WIDTHS static void add_two_norms(double *restrict before, double *restrict after, const float *restrict x,
                                 const uint8_t *restrict mask) {
    const float *restrict y = x + LANES;
    const uint8_t *restrict below = mask + LANES;
    for (int64_t j = 0; j < LANES; j++) before[j] = before[j] + (double)fabsf(x[j]) + (double)fabsf(y[j]);
    for (int64_t j = 0; j < LANES; j++)
        after[j] = after[j] + (double)fabsf(x[j] * (float)mask[j]) + (double)fabsf(y[j] * (float)below[j]);
}

/* Add a row that begins at `start`. */
static void sum_row(Norms *norms, const Slab *slab, int64_t start, const float *x, const uint8_t *mask, int64_t columns) {
    for (int64_t at = start, stop = start + columns; at < stop; ) {
        const int64_t inside = at % slab->block % BLOCK, lane = inside % LANES;
        if (inside == 0) memset(norms->before, 0, sizeof norms->before), memset(norms->after, 0, sizeof norms->after);
        const int64_t left = least(stop - at, slab->block - at % slab->block);
        const int64_t here = lane == 0 && inside % BLOCK + 2 * LANES <= BLOCK && left >= 2 * LANES ? 2 * LANES
                                                                                                   : least(LANES - lane, left);
        if (here == 2 * LANES)
            add_two_norms(norms->before, norms->after, x + (at - start), mask + (at - start));
        else
            add_norms(norms->before + lane, norms->after + lane, x + (at - start), mask + (at - start), here);
        at += here;
        if (at != slab->size && at % slab->block % BLOCK) continue;
        fold_lanes(norms->before, norms->whole), norms->whole += LAST;
        fold_lanes(norms->after, norms->kept), norms->kept += LAST;
    }
}

/* Mark in `bits` what stays of one tensor, row by row, the limits given by rank, the smallest magnitude first; `random`
 * has the two keys of each BLOCK that the slab touches, `mask` room for a byte each. Unless NULL, `whole` and `kept` get
 * 32 sums of |x| for each cut, of all and of what stays. */
int32_t mergemill_stored_rows(const Slab *slab, int64_t which, int64_t columns, const int32_t *limits,
                              const uint32_t *random, uint8_t *mask, uint8_t *kept_bits, double *whole, double *kept) {
    if (!is_sound(slab) || !is_tensor(slab, which)) return REFUSED;
    if (columns < 1 || columns > INT32_MAX || slab->size % columns) return REFUSED; /* ranks are 31 bits */
    Bins *bins = malloc(sizeof(Bins) + sizeof(Norms));
    uint64_t *keys = malloc((size_t)(columns + 2) * (sizeof *keys + 4 * sizeof(float) + 2 * sizeof(uint16_t)));
    if (!bins || !keys) return free(bins), free(keys), NO_MEMORY;
    Norms *norms = (Norms *)(bins + 1);
    norms->whole = whole, norms->kept = kept;
    float *base = (float *)(keys + columns), *x = base + columns;
    uint32_t *row = (uint32_t *)(x + columns);
    int32_t *bits = (int32_t *)(row + columns);
    uint16_t *own = (uint16_t *)(bits + columns), *halves = own + columns;
    for (int64_t rank = 0; rank <= columns + 1; rank++) halves[rank] = (uint16_t)upper_half(limits[least(rank, columns - 1)]);
    const RowRoom room = {base, x, row, bits, own, halves, keys, bins};
    for (int64_t start = 0; start < slab->size; start += columns) {
        load_base(slab, start, columns, base);
        load(slab, which, start, columns, base, x);
        find_magnitudes(x, columns, row);
        find_random(slab->start + start, columns, slab->start, random, bits);
        mark_row(&room, columns, limits, mask + start);
        if (whole) sum_row(norms, slab, start, x, mask + start, columns);
    }
    pack_bits(mask, slab->size, kept_bits);
    free(bins);
    free(keys);
    return 0;
}
