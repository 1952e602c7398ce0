/* What the native loops share: cuts of slabs, how elements are stored, and joins of a chunk in the first-level cache. */

#ifndef MERGEMILL_NATIVE_H
#define MERGEMILL_NATIVE_H

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define WIDTHS __attribute__((target_clones("default", "avx2", "avx512f")))
#define HAS_GATHER /* where the processor does, too */
#define HAS_SHUFFLE /* of eight floats by indices; without AVX2 it is a loop */
#else
#define WIDTHS
#endif
#define INSIDE __attribute__((visibility("hidden")))

#define CHUNK 1024 /* elements that stay in the first-level cache */
#define BLOCK 65536
#define LANES 1024
#define LAST 32
#define SAMPLE 1024

#define VERSION 20 /* of structures and signatures, as structures.py has it */

_Static_assert(CHUNK == SAMPLE && SAMPLE == LANES, "a chunk is a sample, and a row of lanes");
_Static_assert(BLOCK % CHUNK == 0 && LANES % LAST == 0, "a block is whole chunks, and lanes are whole rows of the last");
_Static_assert(CHUNK <= UINT16_MAX && BLOCK <= INT32_MAX, "what is counted of them fits");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "checkpoints are little-endian, and are not turned");
_Static_assert(FLT_EVAL_METHOD == 0, "floats are not computed with more bits than they have");

/* Elements that are worked on at once where the compiler needs to be told. As many as AVX2 has floats in a register: of
 * larger vectors gcc 12 makes single elements, in memory (signs elected took ten times as long, 2026-11-30). */
#define TILE 8
_Static_assert(CHUNK % TILE == 0 && TILE % 8 == 0, "a chunk is whole tiles, and a tile's marks are whole bytes");
typedef float Floats __attribute__((vector_size(4 * TILE)));
#define INLINE static inline __attribute__((always_inline))

/* `size` elements, at most a tile; beyond them 0. */
INLINE Floats take_tile(const float *x, int64_t size) {
    Floats tile = {0};
    memcpy(&tile, x, (size_t)size * sizeof(float));
    return tile;
}

INLINE void put_tile(float *x, Floats tile, int64_t size) { memcpy(x, &tile, (size_t)size * sizeof(float)); }

/* From votes to elected signs, 1 or -1: that of the votes' sum, 0 counting as plus. */
INLINE void elect(float *votes, int64_t size) {
    for (int64_t j = 0; j < size; j++) votes[j] = votes[j] >= 0 ? 1.0f : -1.0f;
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static inline float decode_bf16(uint16_t bits) {
    const union { uint32_t bits; float value; } word = {(uint32_t)bits << 16};
    return word.value;
}

/* The random number of an element, from its counter and the two keys of its BLOCK. */
static inline uint32_t hash_counter(uint32_t counter, uint32_t first, uint32_t second) {
    uint32_t bits = counter ^ first;
    bits ^= bits >> 16;
    bits = bits * 0x21F0AAADu + second;
    bits ^= bits >> 15;
    bits *= 0xD35A2D97u;
    return bits ^ bits >> 15;
}

/* total = sum(weight[i] * x[i][start…]), over `divisor` where that is not 0. */
INSIDE void sum_weighted(float *restrict total, const float *const *x, const float *weight, int64_t count,
                         int64_t start, int64_t size, float divisor);
/* base += lambda * total. */
INSIDE void add_scaled(float *restrict base, const float *restrict total, int64_t size, float lambda);
/* The sum of the weighted deltas that have the sign of all weighted deltas' sum, 0 counting as plus. */
INSIDE void sum_agreeing(float *restrict total, const float *const *x, const float *weight, int64_t count, int64_t start,
                         int64_t size, int normalize);
/* x = 0 (x times 0) where the random number of the element, a hash of its counter and the keys, is not under `limit`. */
INSIDE void keep_random(float *restrict x, const uint32_t *restrict counters, int64_t size, uint32_t first,
                        uint32_t second, int32_t limit);
/* The sum of squares of a sample, or of its difference to another: rows of 32 lanes one after the other, then the lanes. */
INSIDE double sum_squares(const float *restrict x, const float *restrict less, int64_t size);
/* From 1,024 lanes to 32: rows of 32 one after the other. */
INSIDE void fold_lanes(const double *restrict lanes, double *restrict last);

#endif
