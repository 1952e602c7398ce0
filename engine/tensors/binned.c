/* Marking what stays of a row, where chance hangs on the rank of a magnitude in it, without a sort.
 *
 * A row's magnitudes are counted in bins, and most elements are decided by their bin's first and last rank, most of these
 * by the upper eight bits of their random number and a class of bins. Every other bin has a single magnitude: differences
 * of 16-bit floats have few, and of equal ones the rank is that of the first and a count. It makes no difference whether
 * a zero stays. The bins of a row lie around its own mean, so that neither zeros nor outliers fill one of them.
 */

#include "rows.h"

#ifdef HAS_GATHER
#include <immintrin.h>
#endif

#define PLACED 64 /* open elements of a row from which on places in bins are noted, instead of counted for each */
#define MANY 512  /* elements of a bin from which on they are put in order, instead of counting for each that needs it */

/* How a row is cut into bins: 2**steps in an octave, of which the first that has bins, and how many bins. */
typedef struct {
    int32_t steps, first, count;
} Scale;

/* ------------------------------------------------------------------------------------------------------------- bins */

/* More columns have more bins; the middle one is that of the mean of 64 magnitudes, without those that are 0. */
static Scale choose_scale(const float *row, int64_t columns) {
    int32_t steps = 1, sum = 0, count = 0;
    while (steps < MOST_STEPS && (int64_t)64 << steps < columns) steps++;
    for (int64_t j = 0; j < columns; j += columns / 64 + 1) {
        const uint32_t bits = float_to_bits(row[j]);
        sum += (int32_t)(bits >> 16), count += bits != 0;
    }
    const int32_t low = (count ? sum / count : 0) - 128 * OCTAVES / 2; /* 128 to the octave */
    return (Scale){steps, low > 0 ? low >> (7 - steps) : 0, 2 * OCTAVES << steps};
}

/* The bin of each magnitude; the last one and bin 1 have all that is larger and smaller. */
WIDTHS static void find_bins(const float *restrict row, int64_t columns, Scale scale, uint16_t *restrict out) {
    const int32_t shift = 22 - scale.steps, first = 2 * scale.first, last = scale.count - 1;
    const uint32_t lower = (2u << shift) - 1;
    for (int64_t j = 0; j < columns; j++) {
        const uint32_t bits = float_to_bits(row[j]);
        const int32_t some = bits != 0;
        int32_t bin = (int32_t)(bits >> shift | 1) - ((bits & lower) == 0) - first;
        bin = bin > some ? bin : some;
        out[j] = (uint16_t)(bin < last ? bin : last);
    }
}

static void clear_bins(Bins *bins, int32_t count) {
    memset(bins->counts[0], 0, (size_t)count * sizeof **bins->counts);
    memset(bins->counts[1], 0, (size_t)count * sizeof **bins->counts);
    memset(bins->ordered, 0, (size_t)count);
}

/* Four bins are loaded at once. */
static void fill_bins(const uint16_t *own, int64_t columns, Bins *bins) {
    uint32_t *left = bins->counts[0], *right = bins->counts[1];
    const int64_t half = columns / 2;
    int64_t j = 0;
    for (; j + 4 <= half; j += 4) {
        uint64_t a, b;
        memcpy(&a, own + j, sizeof a);
        memcpy(&b, own + half + j, sizeof b);
        left[(uint16_t)a]++, right[(uint16_t)b]++;
        left[(uint16_t)(a >> 16)]++, right[(uint16_t)(b >> 16)]++;
        left[(uint16_t)(a >> 32)]++, right[(uint16_t)(b >> 32)]++;
        left[a >> 48]++, right[b >> 48]++;
    }
    for (; j < half; j++) left[own[j]]++, right[own[half + j]]++;
    if (2 * half < columns) right[own[2 * half]]++;
}

/* The same, noting how many of an element's half and bin come before it. */
static void fill_places(const uint16_t *own, int64_t columns, Bins *bins, uint32_t *places) {
    for (int64_t j = 0; j < columns / 2; j++) places[j] = bins->counts[0][own[j]]++;
    for (int64_t j = columns / 2; j < columns; j++) places[j] = bins->counts[1][own[j]]++;
}

WIDTHS static void add_counts(const Bins *bins, int32_t count, uint32_t *restrict sums) {
    for (int32_t bin = 0; bin < count; bin++) sums[bin] = bins->counts[0][bin] + bins->counts[1][bin];
}

/* The limits change in one direction, so that those of a bin's ranks lie between its first and the next bin's first. */
static void find_limits(Bins *bins, int32_t count, const uint16_t *limits) {
    uint32_t sums[MOST_BINS], rank = 0;
    add_counts(bins, count, sums);
    for (int32_t bin = 0; bin < count; bin += 4) {
        const uint32_t second = rank + sums[bin], third = second + sums[bin + 1], fourth = third + sums[bin + 2];
        bins->ranks[bin] = rank, bins->ranks[bin + 1] = second, bins->ranks[bin + 2] = third, bins->ranks[bin + 3] = fourth;
        rank = fourth + sums[bin + 3];
        bins->limits[bin + 1] = limits[second], bins->limits[bin + 2] = limits[third];
        bins->limits[bin + 3] = limits[fourth], bins->limits[bin + 4] = limits[rank];
    }
    bins->limits[0] = bins->limits[1]; /* of zeros, hardly any is open */
}

/* ------------------------------------------------------------------------------------------------- what is decided */

#ifdef HAS_GATHER
/* Decide what the upper eight bits of random numbers and of the limits of 32 classes of bins can decide, of as many
 * elements as are whole vectors; returns how many. */
__attribute__((target("avx2"))) static int64_t decide_by_class(const RowRoom *room, int64_t columns, Scale scale) {
    uint8_t least_limits[32] = {0}, most_limits[32] = {0};
    for (int32_t i = 0; i < 4 * OCTAVES; i++) {
        const uint16_t a = room->bins->limits[i << (scale.steps - 1)], b = room->bins->limits[(i + 1) << (scale.steps - 1)];
        least_limits[i] = (uint8_t)((a < b ? a : b) >> 8);
        most_limits[i] = (uint8_t)((a < b ? b : a) >> 8);
    }
    __m256i low[2], high[2];
    for (int i = 0; i < 2; i++) {
        low[i] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(least_limits + 16 * i)));
        high[i] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(most_limits + 16 * i)));
    }
    const __m128i shift = _mm_cvtsi32_si128(scale.steps - 1);
    int64_t j = 0;
    for (; j + 32 <= columns; j += 32) {
        const __m256i *own = (const __m256i *)(room->own + j), *halves = (const __m256i *)(room->halves + j);
        const __m256i class = _mm256_packus_epi16(_mm256_srl_epi16(_mm256_loadu_si256(own), shift),
                                                  _mm256_srl_epi16(_mm256_loadu_si256(own + 1), shift));
        const __m256i random = _mm256_packus_epi16(_mm256_srli_epi16(_mm256_loadu_si256(halves), 8),
                                                   _mm256_srli_epi16(_mm256_loadu_si256(halves + 1), 8));
        const __m256i above = _mm256_cmpgt_epi8(class, _mm256_set1_epi8(15));
        const __m256i least_limit =
            _mm256_blendv_epi8(_mm256_shuffle_epi8(low[0], class), _mm256_shuffle_epi8(low[1], class), above);
        const __m256i most_limit =
            _mm256_blendv_epi8(_mm256_shuffle_epi8(high[0], class), _mm256_shuffle_epi8(high[1], class), above);
        __m256i other = _mm256_cmpeq_epi8(_mm256_max_epu8(random, least_limit), random); /* than stays */
        __m256i open = _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_min_epu8(random, most_limit), random), other);
        other = _mm256_permute4x64_epi64(other, 0xD8), open = _mm256_permute4x64_epi64(open, 0xD8); /* as before packing */
        const int32_t stays_bits = ~_mm256_movemask_epi8(other), open_bits = _mm256_movemask_epi8(open);
        memcpy(room->stays + j / 8, &stays_bits, sizeof stays_bits);
        memcpy(room->open + j / 8, &open_bits, sizeof open_bits);
    }
    return j;
}
#endif

/* Decide whether elements stay, where that does not hang on their rank in their bin; returns of how many it does, and
 * which. */
static int64_t decide(const RowRoom *room, int64_t columns, Scale scale) {
    int64_t from = 0, count = 0;
#ifdef HAS_GATHER
    if (__builtin_cpu_supports("avx2")) from = decide_by_class(room, columns, scale);
#else
    (void)scale;
#endif
    memset(room->stays + from / 8, 0, (size_t)((columns - from + 7) / 8));
    memset(room->open + from / 8, 0xFF, (size_t)((columns - from + 7) / 8));
    for (int64_t j = 0; j < columns; j += 64) {
        const int64_t bytes = least(8, (columns - j + 7) / 8);
        uint64_t open = 0, stays = 0;
        memcpy(&open, room->open + j / 8, (size_t)bytes);
        memcpy(&stays, room->stays + j / 8, (size_t)bytes);
        if (columns - j < 64) open &= ((uint64_t)1 << (columns - j)) - 1;
        for (; open; open &= open - 1) {
            const int place = __builtin_ctzll(open);
            const uint16_t *limits = room->bins->limits + room->own[j + place];
            const uint16_t half = room->halves[j + place], a = limits[0], b = limits[1];
            const int less = half < (a < b ? a : b);
            stays |= (uint64_t)less << place;
            room->index[count] = (uint32_t)(j + place);
            count += (less ^ 1) & (half <= (a < b ? b : a));
        }
        memcpy(room->stays + j / 8, &stays, (size_t)bytes);
    }
    return count;
}

/* ---------------------------------------------------------------------------------------------------- what is open */

static int32_t find_random(const RowPlace *place, int64_t j) {
    const int64_t at = place->start + j;
    const uint32_t *own = place->random + 2 * (at / BLOCK - place->first / BLOCK);
    return (int32_t)hash_counter(all_counters()[at % BLOCK], own[0], own[1]);
}

static void mark(const RowRoom *room, const RowPlace *place, int64_t j, int64_t rank) {
    const int stays = find_random(place, j) < place->limits[rank];
    room->stays[j / 8] = (uint8_t)((room->stays[j / 8] & ~(1 << j % 8)) | stays << j % 8);
}

/* How many magnitudes have the bits `most` or less. */
WIDTHS static int64_t count_up_to(const float *row, int64_t columns, int32_t most) {
    int64_t found = 0;
    for (int64_t k = 0, here; k < columns; k += here) {
        int32_t count = 0;
        here = least(BLOCK, columns - k);
        for (int64_t i = k; i < k + here; i++) count += (int32_t)float_to_bits(row[i]) <= most;
        found += count;
    }
    return found;
}

WIDTHS static int64_t count_of_bin(const uint16_t *own, int64_t size, uint16_t bin) {
    int64_t found = 0;
    for (int64_t k = 0, here; k < size; k += here) {
        uint16_t count = 0;
        here = least(CHUNK, size - k);
        for (int64_t i = k; i < k + here; i++) count += own[i] == bin;
        found += count;
    }
    return found;
}

static int compare_keys(const void *left, const void *right) {
    const uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;
    return (a > b) - (a < b);
}

/* Mark all elements of one bin, put in order by magnitude and column. */
static void mark_bin(const RowRoom *room, const RowPlace *place, uint16_t bin) {
    int64_t count = 0;
    for (int64_t k = 0; k < place->columns; k++)
        if (room->own[k] == bin) room->keys[count++] = (uint64_t)float_to_bits(room->row[k]) << 32 | (uint64_t)k;
    qsort(room->keys, (size_t)count, sizeof *room->keys, compare_keys);
    for (int64_t i = 0; i < count; i++) mark(room, place, (uint32_t)room->keys[i], room->bins->ranks[bin] + i);
}

/* Mark an element whose rank matters, or all of its bin. Equal ones rank by column. */
static void mark_open(const RowRoom *room, const RowPlace *place, int64_t j, int placed) {
    Bins *bins = room->bins;
    const uint16_t bin = room->own[j];
    const int64_t half = place->columns / 2, from = j < half ? 0 : half;
    if (bin % 2 == 0) {
        const int64_t before = placed ? room->places[j] : count_of_bin(room->own + from, j - from, bin);
        mark(room, place, j, before + bins->ranks[bin] + (j < half ? 0 : bins->counts[0][bin]));
    } else if (bins->counts[0][bin] + bins->counts[1][bin] < MANY) {
        const int32_t own = (int32_t)float_to_bits(room->row[j]);
        mark(room, place, j, count_up_to(room->row, j, own) + count_up_to(room->row + j, place->columns - j, own - 1));
    } else if (!bins->ordered[bin]) {
        mark_bin(room, place, bin);
        bins->ordered[bin] = 1;
    }
}

void mark_row(const RowRoom *room, const RowPlace *place) {
    const int64_t columns = place->columns;
    const Scale scale = choose_scale(room->row, columns);
    find_bins(room->row, columns, scale, room->own);
    clear_bins(room->bins, scale.count);
    fill_bins(room->own, columns, room->bins);
    find_limits(room->bins, scale.count, room->limits);
    const int64_t open = decide(room, columns, scale);
    if (open >= PLACED) {
        clear_bins(room->bins, scale.count);
        fill_places(room->own, columns, room->bins, room->places);
    }
    for (int64_t i = 0; i < open; i++) mark_open(room, place, room->index[i], open >= PLACED);
}
