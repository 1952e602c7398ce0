/* Blocks of llama.cpp's quantised types: whole numbers, and for each group of them a scale and what is taken off; as
 * ggml-common.h lays them out. Products, then differences, in float32, as the package `gguf` has them. */

#include "slab.h"

#define LARGEST 256 /* elements of a block */
#define GROUPS 16   /* of a block, at most */

enum { Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, KINDS };

typedef struct {
    int64_t elements, bytes, groups; /* of a block */
} Kind;

static const Kind kinds[KINDS] = {
    [Q4_0] = {32, 18, 1},    [Q4_1] = {32, 20, 1},   [Q5_0] = {32, 22, 1},   [Q5_1] = {32, 24, 1},
    [Q8_0] = {32, 34, 1},    [Q2_K] = {256, 84, 16}, [Q3_K] = {256, 110, 16}, [Q4_K] = {256, 144, 8},
    [Q5_K] = {256, 176, 8},  [Q6_K] = {256, 210, 16}, [IQ4_NL] = {32, 18, 1}, [IQ4_XS] = {256, 136, 8},
};

typedef struct {
    int8_t q[LARGEST];
    float scale[GROUPS], less[GROUPS];
} Unpacked;

/* What the 4-bit codes of IQ4 stand for. */
static const int8_t values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

INLINE float take_half(const uint8_t *at) {
    uint16_t half;
    memcpy(&half, at, sizeof half);
    return decode_f16(half);
}

/* `size` codes of `bits` each that begin at `shift` in as many bytes. */
INLINE void take_bits(const uint8_t *from, int64_t size, int32_t shift, int32_t bits, int8_t *restrict q) {
    const uint8_t mask = (uint8_t)((1 << bits) - 1);
    for (int64_t i = 0; i < size; i++) q[i] = (int8_t)(from[i] >> shift & mask);
}

/* One bit more, at `shift` in as many bytes, worth `worth`. */
INLINE void add_bits(const uint8_t *from, int64_t size, int32_t shift, int32_t bits, int32_t worth, int8_t *restrict q) {
    const uint8_t mask = (uint8_t)((1 << bits) - 1);
    for (int64_t i = 0; i < size; i++) q[i] = (int8_t)(q[i] + (from[i] >> shift & mask) * worth);
}

INLINE void shift_all(int8_t *q, int64_t size, int32_t by) {
    for (int64_t i = 0; i < size; i++) q[i] = (int8_t)(q[i] - by);
}

/* 16 bytes of two codes: all lower ones first. */
INLINE void take_nibbles(const uint8_t *from, int8_t *restrict q) {
    take_bits(from, 16, 0, 4, q);
    take_bits(from, 16, 4, 4, q + 16);
}

/* The fifth bits of 32 codes, in a word. */
INLINE void add_fifth(const uint8_t *from, int8_t *restrict q) {
    uint32_t word;
    memcpy(&word, from, sizeof word);
    for (int32_t i = 0; i < 32; i++) q[i] = (int8_t)(q[i] | (int32_t)(word >> i & 1) << 4);
}

INLINE void look_up(int8_t *q, int64_t size) {
    for (int64_t i = 0; i < size; i++) q[i] = values[q[i]];
}

/* Blocks of 32: a scale, for some a least value, fifth bits, and codes. */
INLINE void unpack_small(int32_t kind, const uint8_t *block, Unpacked *made) {
    made->scale[0] = take_half(block);
    made->less[0] = 0;
    block += 2;
    if (kind == Q8_0) {
        memcpy(made->q, block, 32);
        return;
    }
    if (kind == Q4_1 || kind == Q5_1) {
        made->less[0] = -take_half(block);
        block += 2;
    }
    const int fifth = kind == Q5_0 || kind == Q5_1;
    take_nibbles(block + (fifth ? 4 : 0), made->q);
    if (fifth) add_fifth(block, made->q);
    if (kind == Q4_0) shift_all(made->q, 32, 8);
    if (kind == Q5_0) shift_all(made->q, 32, 16);
    if (kind == IQ4_NL) look_up(made->q, 32);
}

/* Codes of two bits, four in a byte: halves of a block, in each 32 of each place. */
INLINE void take_quarters(const uint8_t *from, int8_t *restrict q) {
    for (int32_t half = 0; half < 2; half++)
        for (int32_t place = 0; place < 4; place++) take_bits(from + 32 * half, 32, 2 * place, 2, q + 128 * half + 32 * place);
}

INLINE void unpack_q2(const uint8_t *block, Unpacked *made) {
    const float d = take_half(block + 80), least_d = take_half(block + 82);
    for (int32_t g = 0; g < 16; g++) {
        made->scale[g] = d * (float)(block[g] & 15);
        made->less[g] = least_d * (float)(block[g] >> 4);
    }
    take_quarters(block + 16, made->q);
}

/* A third bit that is not set takes 4 off; scales have six bits, in two places, and 32 off. */
INLINE void unpack_q3(const uint8_t *block, Unpacked *made) {
    const uint8_t *scales = block + 96;
    const float d = take_half(block + 108);
    for (int32_t g = 0; g < 16; g++) {
        const int32_t low = scales[g % 8] >> (g / 8 * 4) & 15, high = scales[8 + g % 4] >> (g / 4 * 2) & 3;
        made->scale[g] = d * (float)((low | high << 4) - 32);
        made->less[g] = 0;
    }
    take_quarters(block + 32, made->q);
    for (int32_t bit = 0; bit < 8; bit++) add_bits(block, 32, bit, 1, 4, made->q + 32 * bit);
    shift_all(made->q, 256, 4);
}

/* Scales and what is taken off, six bits each: the last four have their upper two bits beside the first four. */
INLINE void take_scales(const uint8_t *block, Unpacked *made) {
    const float d = take_half(block), least_d = take_half(block + 2);
    const uint8_t *at = block + 4;
    for (int32_t g = 0; g < 4; g++) {
        made->scale[g] = d * (float)(at[g] & 63);
        made->less[g] = least_d * (float)(at[4 + g] & 63);
        made->scale[4 + g] = d * (float)((at[8 + g] & 15) | (at[g] >> 2 & 48));
        made->less[4 + g] = least_d * (float)(at[8 + g] >> 4 | (at[4 + g] >> 2 & 48));
    }
}

INLINE void unpack_q4(const uint8_t *codes, const uint8_t *fifth, Unpacked *made) {
    for (int32_t g = 0; g < 8; g++) {
        take_bits(codes + g / 2 * 32, 32, g % 2 * 4, 4, made->q + 32 * g);
        if (fifth) add_bits(fifth, 32, g, 1, 16, made->q + 32 * g);
    }
}

INLINE void unpack_q6(const uint8_t *block, Unpacked *made) {
    const float d = take_half(block + 208);
    for (int32_t g = 0; g < 16; g++) {
        made->scale[g] = d * (float)(int8_t)block[192 + g];
        made->less[g] = 0;
    }
    for (int32_t part = 0; part < 4; part++)
        take_bits(block + part / 2 * 64, 64, part % 2 * 4, 4, made->q + 64 * part);
    for (int32_t part = 0; part < 8; part++)
        add_bits(block + 128 + part / 4 * 32, 32, part % 4 * 2, 2, 16, made->q + 32 * part);
    shift_all(made->q, 256, 32);
}

INLINE void unpack_iq4(const uint8_t *block, Unpacked *made) {
    const float d = take_half(block);
    uint16_t upper;
    memcpy(&upper, block + 2, sizeof upper);
    for (int32_t g = 0; g < 8; g++) {
        const int32_t low = block[4 + g / 2] >> (g % 2 * 4) & 15, high = upper >> 2 * g & 3;
        made->scale[g] = d * (float)((low | high << 4) - 32);
        made->less[g] = 0;
        take_nibbles(block + 8 + 16 * g, made->q + 32 * g);
    }
    look_up(made->q, 256);
}

INLINE void unpack(int32_t kind, const uint8_t *block, Unpacked *made) {
    if (kind == Q2_K)
        unpack_q2(block, made);
    else if (kind == Q3_K)
        unpack_q3(block, made);
    else if (kind == Q6_K)
        unpack_q6(block, made);
    else if (kind == IQ4_XS)
        unpack_iq4(block, made);
    else if (kind == Q4_K || kind == Q5_K) {
        take_scales(block, made);
        unpack_q4(block + (kind == Q5_K ? 48 : 16), kind == Q5_K ? block + 16 : NULL, made);
    } else
        unpack_small(kind, block, made);
}

INLINE void scale_groups(const Unpacked *made, int64_t groups, int64_t each, float *restrict out) {
    for (int64_t g = 0; g < groups; g++)
        for (int64_t i = 0; i < each; i++)
            out[g * each + i] = made->scale[g] * (float)made->q[g * each + i] - made->less[g];
}

INLINE void decode_block(int32_t kind, const uint8_t *block, float *restrict out) {
    Unpacked made;
    unpack(kind, block, &made);
    if (kinds[kind].groups == 16)
        scale_groups(&made, 16, 16, out);
    else
        scale_groups(&made, kinds[kind].groups, 32, out);
}

/* Elements from `start` on of blocks one after the other. */
INLINE void decode_span(int32_t kind, const uint8_t *blocks, int64_t start, int64_t size, float *restrict out) {
    const int64_t each = kinds[kind].elements;
    for (int64_t done = 0; done < size;) {
        const int64_t from = (start + done) % each, taken = least(each - from, size - done);
        const uint8_t *block = blocks + (start + done) / each * kinds[kind].bytes;
        if (taken == each) {
            decode_block(kind, block, out + done);
        } else {
            float whole[LARGEST];
            decode_block(kind, block, whole);
            memcpy(out + done, whole + from, (size_t)taken * sizeof(float));
        }
        done += taken;
    }
}

WIDTHS int32_t mergemill_decode_blocks(int32_t kind, const uint8_t *blocks, int64_t size_bytes, int64_t start,
                                       int64_t size, float *out) {
    if (kind < 0 || kind >= KINDS || size_bytes < 0 || start < 0 || size < 0) return REFUSED;
    const int64_t most = size_bytes / kinds[kind].bytes * kinds[kind].elements;
    if (start > most || size > most - start) return REFUSED;
    switch (kind) { /* so that each has a loop of its own */
#define KIND(name) case name: decode_span(name, blocks, start, size, out); break;
        KIND(Q4_0) KIND(Q4_1) KIND(Q5_0) KIND(Q5_1) KIND(Q8_0) KIND(Q2_K)
        KIND(Q3_K) KIND(Q4_K) KIND(Q5_K) KIND(Q6_K) KIND(IQ4_NL) KIND(IQ4_XS)
    }
    return 0;
}
