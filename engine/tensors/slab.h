/* Slabs as they are stored, and what the loops over them share: chunks, decoding and encoding, thinning. The operations
 * and their order are those of the loops in native.c and of torch, so that either way gives the same bits; stored.py
 * says what the structures mean.
 */

#ifndef MERGEMILL_SLAB_H
#define MERGEMILL_SLAB_H

#include <stdlib.h>

#include "native.h"

#define INFINITE 0x7F800000u /* the bits of infinity: what has more is no number */

enum { F32, BF16, F16, CODED, ADAPTED }; /* the last two are no dtypes: a tensor's data is then a Coded, or an Adapted */
enum { KEEP_ALL, KEEP_NOTHING, KEEP_CUT, KEEP_RANDOM, KEEP_MASK, KEEP_RANK }; /* the last becomes a cut: select.c */
enum { JOIN_SUM, JOIN_ADD, JOIN_AGREE, JOIN_SHARE, JOIN_CHANGED, JOIN_BALANCE, JOIN_EXCEED, JOIN_FARTHEST, JOIN_CONSENT,
       JOIN_LARGEST, JOIN_NEAR, JOIN_TURNS, JOIN_LINES };
enum { DERIVE_SCORES, DERIVE_IMPORTANCE };
enum { SPREAD = -1, IMPORTANCE = -2 }; /* in place of a tensor's number; its score has that number and `count` more */

/* What ranked values that are derived from all tensors hang on. */
typedef struct {
    int32_t kind;
    const double *least, *span; /* for scores: of each tensor's magnitudes; a span that is not above 0 says nothing */
    const double *divergences;  /* for importances: of each row of the whole tensor, of which there are `rows` */
    int64_t rows, columns;
} Derived;

typedef struct {
    const void *const *data; /* the base first, where there is one */
    const int32_t *dtypes;
    const int32_t *vectors; /* for each tensor beside the base, whether it is less a base already */
    const float *scales; /* of each tensor beside the base, before anything else */
    int64_t count;       /* of tensors beside the base */
    int32_t has_base;    /* then the other tensors are taken less the base */
    int64_t size, start, block;
    const Derived *derived; /* or NULL */
} Slab;

typedef struct {
    float threshold; /* what is above it belongs to the cut */
    int64_t block;   /* in blocks before this one also what equals it */
    int64_t ties;    /* in this block the first so many that equal it */
} Cut;

typedef struct {
    int32_t kind;
    float factor; /* on what was kept */
    Cut cut, outliers;
    int32_t has_outliers;
    int32_t limit;
    const uint32_t *keys; /* two for each BLOCK that the slab touches */
    const uint8_t *mask;  /* a bit for each element of the slab, the lowest of each byte first */
    int64_t rank, outlier_rank; /* how many belong to the cut that is to be found, and to the outliers, or 0 */
} Keep;

typedef struct {
    int32_t kind;
    int32_t normalize;
    const float *weight;
    float divisor, lambda;
    float threshold;    /* of changes and importances */
    float votes;        /* so many masks must agree, where there are any */
    const float *masks; /* the factor of each tensor's, or NULL */
    int64_t group, kept; /* elements of which a tensor keeps so many */
    const float *lines;  /* of each tensor so many weights: of all columns, or of all rows of the whole matrix */
    int64_t columns, line_count;
    int32_t by_row;
} Join;

/* Codes of a quantised tensor, and what they stand for: (table[code] - zero) * scale * factor. */
typedef struct {
    const uint8_t *codes;
    int64_t skipped;    /* codes before the first that is meant, in its byte */
    int32_t bits;       /* 4 or 8 */
    int32_t high_first; /* of the two codes of a byte */
    const float *table; /* of 16 or 256 values */
    const float *scales;
    const float *zeros; /* as many, or none */
    float factor;
} Codes;

/* A slab of matrices whose codes lie in the order of their elements, the first of them at `skipped`. */
typedef struct {
    Codes codes;
    int64_t start; /* of the slab, in all matrices */
    int64_t rows, columns, row_codes, block_rows, block_columns;
    int64_t first_block;              /* the row of blocks that scales begin with */
    int64_t code_count, scale_count; /* that there are, from the first on */
} Coded;

/* What is seen of the magnitudes' bits from `low` to `high`. */
typedef struct {
    int64_t which;
    uint32_t low, high;
    int64_t above, inside;
    int64_t *low_counts, *high_counts; /* what equals the ends, in each block from the slab's first */
    int64_t *counts;                   /* what lies between them, in each block of the slab */
    uint32_t *keys;                    /* that itself, as far as there is room */
    int64_t room;
} Window;

/* What is asked of a rank among the values of a whole tensor, 1 being the largest, and what is found. */
typedef struct {
    int64_t which;
    int64_t rank; /* 0: floor(share * those that are not 0); where that is 0 as well, nothing is found */
    double share;
    uint32_t key;
    int64_t above, ties;       /* how many are larger, and how many that equal it are among the so many largest */
    int64_t block, block_ties; /* in which block the last of these lies, and how many of them do */
} Rank;

/* One of an adapter's two small matrices: where its elements lie, from the first of them. */
typedef struct {
    const void *data;
    int32_t dtype;
    int64_t size; /* elements that there are */
    int64_t start, along_side, along_rank, along_matrix;
} Factor;

/* A slab of matrices with an adapter's change: weight + scale * left * right, each of its own rows and columns. */
typedef struct {
    const void *weight; /* of the slab, as a tensor's data are */
    int32_t dtype;      /* of these */
    float scale;
    int64_t start; /* of the slab, in all matrices */
    int64_t rows, columns, rank, group;
    Factor left, right;
    float *room; /* of so many floats: the right factor turned round, and the products and left factor of `group` rows */
    int64_t floats;
    int64_t *there; /* of which matrix and from which row on; at first -1 */
} Adapted;

/* Room for a chunk of the base, of what is made of it, and of every tensor. */
typedef struct {
    float *base, *total, **x;
    int64_t *seen; /* two for each tensor */
} Room;

/* Where a loop over a slab stands: `here` elements from `start` on, all of them of one place's block and one BLOCK. */
typedef struct {
    int64_t start, here;
    int64_t block;      /* the tensor's, by number */
    int block_begins;   /* whether the chunk is the first of its block */
    int sampled;        /* whether it is the first of BLOCK elements of its block */
} Chunk;

/* What a chunk of keys has above, at the low end and at the high end of a window. */
typedef struct {
    int32_t above, low, high;
} Sight;

static inline float bits_to_float(uint32_t bits) {
    const union { uint32_t bits; float value; } word = {bits};
    return word.value;
}

static inline uint32_t float_to_bits(float value) {
    const union { float value; uint32_t bits; } word = {value};
    return word.bits;
}

/* What loops return instead of what they are asked for. */
/* A float16's exponent is moved up by 112 with a product, which also makes its denormals right. */
static inline float decode_f16(uint16_t half) {
    const uint32_t magnitude = (uint32_t)(half & 0x7FFF) << 13;
    const float scaled = bits_to_float(magnitude) * 0x1p112f;
    const uint32_t special = (half & 0x7C00) == 0x7C00 ? magnitude | 0x7F800000u : float_to_bits(scaled);
    return bits_to_float(special | (uint32_t)(half & 0x8000) << 16);
}

enum { NO_MEMORY = -1, REFUSED = -2 };

/* Whether what Python says of a slab, a number of what is ranked, a tensor's number, what is kept and a join holds
 * together: looked at once a call, so that nothing is read or written beyond what it points to. */
INSIDE int is_sound(const Slab *slab);
INSIDE int is_ranked(const Slab *slab, int64_t which);
INSIDE int is_scored(const Slab *slab, int64_t which);
INSIDE int is_tensor(const Slab *slab, int64_t which);
INSIDE int is_kept(const Slab *slab, const Keep *keep);
INSIDE int is_joined(const Slab *slab, const Join *join, const Keep *keeps);

/* Whether a slab of so many elements finds its codes and scales among those that there are. */
INSIDE int is_coded(const Coded *coded, int64_t size);
/* Elements from `start` of the slab on. */
INSIDE void decode_coded(const Coded *coded, int64_t start, int64_t size, float *out);
/* Whether a slab of so many elements finds its weights and factors among those that there are, and room. */
INSIDE int is_adapted(const Adapted *adapted, int64_t size);
INSIDE void decode_adapted(const Adapted *adapted, int64_t start, int64_t size, float *out);
/* Whether so many elements of a dtype, or what decodes them, can be there. */
INSIDE int is_stored(const void *data, int32_t dtype, int64_t size);
INSIDE void decode(const void *data, int32_t dtype, int64_t start, int64_t size, float *out);
INSIDE void load_base(const Slab *slab, int64_t start, int64_t size, float *base);
/* The tensor i as it is, or less the base. */
INSIDE void load_plain(const Slab *slab, int64_t i, int64_t start, int64_t size, const float *base, float *out);
/* Multiply by the factor of the tensor i. */
INSIDE void scale(const Slab *slab, int64_t i, int64_t size, float *x);
/* Both. */
INSIDE void load(const Slab *slab, int64_t i, int64_t start, int64_t size, const float *base, float *out);
INSIDE void multiply(float *restrict x, int64_t size, float factor);
/* The bits of |x|: they order as the magnitudes do. */
INSIDE void find_magnitudes(const float *restrict x, int64_t size, uint32_t *restrict out);
/* Encode a chunk at `start`; returns how many values are then not finite. */
INSIDE int64_t encode(const float *x, int32_t dtype, int64_t start, int64_t size, void *out);

/* 0 where there is no memory; then, too, the room is to be dropped. */
INSIDE int make_room(Room *room, int64_t count);
INSIDE void drop_room(Room *room);
/* Go to the next chunk; 0 at the end of the slab. `chunk` begins as zeros. */
INSIDE int next_chunk(const Slab *slab, Chunk *chunk);

/* The first half of each element's hash: the same in every BLOCK. */
INSIDE uint32_t *all_counters(void);
/* The importances of a chunk of two tensors. */
INSIDE void find_importances(const Slab *slab, const Chunk *chunk, const float *base, const float *other, float *out);
/* The sum of a row, the right half of it added to the left until one is left; all of it is overwritten. */
INSIDE double fold_row(double *row, int64_t columns);
/* A chunk's sum over all tensors. */
INSIDE void sum_all(float *const *x, int64_t count, int64_t size, double *restrict total);
/* The scores of the elements of a tensor that may reach `least`; returns how many, `index` gets which, in order. */
INSIDE int64_t score(const Slab *slab, int64_t which, const float *x, const double *total, int64_t size, float least,
                     uint16_t *index, float *scores);
/* The standard deviation over the tensors. */
INSIDE void find_spread(float *const *x, int64_t count, int64_t size, float *restrict out);
/* What is ranked: |x| of the tensor `which`, or what stands for it of all; returns where it is. The base is loaded
 * already. */
INSIDE float *load_ranked(const Slab *slab, int64_t which, const Chunk *chunk, Room *room);
/* The keys of a chunk's scores, as digits.py orders floats with a sign: what is no number is least, -0 is 0. Those that do
 * not reach `low` are 0, and so are all beyond the chunk. */
INSIDE void find_keys(const Slab *slab, int64_t which, const Chunk *chunk, Room *room, uint32_t low, uint32_t *keys);
/* Look at a whole chunk of keys. */
INSIDE Sight watch_keys(const uint32_t *restrict keys, uint32_t low, uint32_t high, uint8_t *restrict inside);
/* Add the keys inside to the window's, and their number to `count`. */
INSIDE void collect(Window *window, const uint32_t *keys, const uint8_t *inside, int64_t *count);
/* From marks, 0 or 1 each, to eight in a byte. */
INSIDE void pack_bits(const uint8_t *marks, int64_t size, uint8_t *bits);
/* Multiply by 0 or 1. */
INSIDE void thin_by_mask(float *restrict x, const uint8_t *restrict mask, int64_t size);
/* The same with a bit for each element, the first at `start`, to `out`. */
INSIDE void keep_by_bits(const float *restrict x, const uint8_t *bits, int64_t start, int64_t size, float *restrict out);
/* Mark a cut's elements; `seen` counts those that equal the threshold in the block of its last tie. */
INSIDE void mark_cut(const float *x, const Chunk *chunk, const Cut *cut, int64_t *seen, uint8_t *mark);
/* Multiply by 0 what is not kept; `seen` holds two counts for each tensor. */
INSIDE void thin(float *x, const Slab *slab, const Chunk *chunk, const Keep *keep, int64_t *seen);

#endif
