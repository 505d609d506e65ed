/* Pairs of rows of small integers whose product is high: what a join of vectors with themselves spends its time on.

   A row's codes are 0 to 126, 63 above the integers they stand for, which times a scale are the vector's values. The
   products are exact sums of integers, so that every processor finds the same pairs. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define HAS_AVX 1
#endif

enum {
    ZERO = 63,    /* the code of 0 */
    GROUP = 8,    /* codes of a row that are multiplied at a time; widths are multiples of it */
    LANES = 32,   /* targets beside each other */
    TOGETHER = 4, /* queries that are multiplied together */
    BATCH = 16,   /* queries that pass a block of targets while that is in the nearest cache */
};

/* Targets, laid out as they are read: (LANES targets, 4 codes) one after the other, signed. */
typedef struct {
    int count, width;
    int8_t *codes;
    int32_t *offset; /* ZERO times the sum of a target's integers: what the unsigned queries add */
    float *scale, *weight;
} Targets;

/* A product is high that is at least slope * targets.scale - less * targets.weight: see `near` in codes.py. */
typedef struct {
    float slope, less;
} Limit;

/* Write for each of some queries the bits of those among LANES targets from `block` on that are near it. */
typedef void Near(const Targets *targets, int block, const uint8_t *const *queries, const Limit *limits,
                  uint32_t *bits);

static void near_plain(const Targets *targets, int block, const uint8_t *const *queries, const Limit *limits,
                       uint32_t *bits) {
    for (int q = 0; q < TOGETHER; q++) {
        const int8_t *codes = targets->codes + (size_t)block * LANES * targets->width;
        int32_t sums[LANES] = {0};
        for (int k = 0; k < targets->width; k += 4)
            for (int j = 0; j < LANES; j++, codes += 4)
                for (int i = 0; i < 4; i++)
                    sums[j] += queries[q][k + i] * codes[i];
        bits[q] = 0;
        for (int j = 0; j < LANES; j++) {
            const int at = block * LANES + j;
            const float lowest = limits[q].slope * targets->scale[at] - limits[q].less * targets->weight[at];
            bits[q] |= (uint32_t)((float)(sums[j] - targets->offset[at]) >= lowest) << j;
        }
    }
}

#ifdef HAS_AVX
/* Two queries at a time. Products of codes below 127 with integers below 64 are below 2^13, so that sums of four fit
   in 16 bits. Named sums stay in registers; those of an array would not. */
#define ADD(sum, v, first, second)                                                                                     \
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_add_epi16(_mm256_maddubs_epi16(first, codes[v]),             \
                                                                   _mm256_maddubs_epi16(second, codes[4 + (v)])),     \
                                                  ones))

__attribute__((target("avx2"))) static void near_avx2(const Targets *targets, int block, const uint8_t *const *queries,
                                                       const Limit *limits, uint32_t *bits) {
    const __m256i ones = _mm256_set1_epi16(1);
    for (int q = 0; q < TOGETHER; q += 2) {
        const __m256i *codes = (const __m256i *)(targets->codes + (size_t)block * LANES * targets->width);
        __m256i a0 = _mm256_setzero_si256(), a1 = a0, a2 = a0, a3 = a0, b0 = a0, b1 = a0, b2 = a0, b3 = a0;
        for (int group = 0; group < targets->width; group += GROUP, codes += 8) {
            int32_t words[4];
            memcpy(words, queries[q] + group, 8);
            memcpy(words + 2, queries[q + 1] + group, 8);
            const __m256i a = _mm256_set1_epi32(words[0]), b = _mm256_set1_epi32(words[1]);
            const __m256i c = _mm256_set1_epi32(words[2]), d = _mm256_set1_epi32(words[3]);
            ADD(a0, 0, a, b);
            ADD(b0, 0, c, d);
            ADD(a1, 1, a, b);
            ADD(b1, 1, c, d);
            ADD(a2, 2, a, b);
            ADD(b2, 2, c, d);
            ADD(a3, 3, a, b);
            ADD(b3, 3, c, d);
        }
        const __m256i sums[2][4] = {{a0, a1, a2, a3}, {b0, b1, b2, b3}};
        for (int i = 0; i < 2; i++) {
            const __m256 slope = _mm256_set1_ps(limits[q + i].slope), less = _mm256_set1_ps(limits[q + i].less);
            bits[q + i] = 0;
            for (int v = 0; v < 4; v++) {
                const int at = block * LANES + 8 * v;
                const __m256i offset = _mm256_load_si256((const __m256i *)(targets->offset + at));
                const __m256 product = _mm256_cvtepi32_ps(_mm256_sub_epi32(sums[i][v], offset));
                const __m256 lowest = _mm256_sub_ps(_mm256_mul_ps(slope, _mm256_load_ps(targets->scale + at)),
                                                    _mm256_mul_ps(less, _mm256_load_ps(targets->weight + at)));
                bits[q + i] |= (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(product, lowest, _CMP_GE_OQ)) << (8 * v);
            }
        }
    }
}

/* Four queries; one instruction sums products of four codes in 32 bits. */
__attribute__((target("avx512f,avx512vnni"))) static void near_vnni(const Targets *targets, int block,
                                                                     const uint8_t *const *queries,
                                                                     const Limit *limits, uint32_t *bits) {
    const __m512i *codes = (const __m512i *)(targets->codes + (size_t)block * LANES * targets->width);
    __m512i sums[TOGETHER][2];
    for (int q = 0; q < TOGETHER; q++)
        sums[q][0] = sums[q][1] = _mm512_setzero_si512();
    for (int k = 0; k < targets->width; k += 4, codes += 2) {
        for (int q = 0; q < TOGETHER; q++) {
            int32_t word;
            memcpy(&word, queries[q] + k, 4);
            const __m512i four = _mm512_set1_epi32(word);
            sums[q][0] = _mm512_dpbusd_epi32(sums[q][0], four, codes[0]);
            sums[q][1] = _mm512_dpbusd_epi32(sums[q][1], four, codes[1]);
        }
    }
    for (int q = 0; q < TOGETHER; q++) {
        const __m512 slope = _mm512_set1_ps(limits[q].slope), less = _mm512_set1_ps(limits[q].less);
        bits[q] = 0;
        for (int v = 0; v < 2; v++) {
            const int at = block * LANES + 16 * v;
            const __m512i offset = _mm512_load_si512(targets->offset + at);
            const __m512 product = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums[q][v], offset));
            const __m512 lowest = _mm512_sub_ps(_mm512_mul_ps(slope, _mm512_load_ps(targets->scale + at)),
                                                _mm512_mul_ps(less, _mm512_load_ps(targets->weight + at)));
            bits[q] |= (uint32_t)_mm512_cmp_ps_mask(product, lowest, _CMP_GE_OQ) << (16 * v);
        }
    }
}
#endif

/* The fastest that the processor has, or a slower one by number: 1 for AVX2 at most, 2 for plain C. */
static Near *near_of(int slower) {
#ifdef HAS_AVX
    if (slower < 1 && __builtin_cpu_supports("avx512vnni"))
        return near_vnni;
    if (slower < 2 && __builtin_cpu_supports("avx2"))
        return near_avx2;
#endif
    return near_plain;
}

static void lay_out(Targets *targets, const uint8_t *codes, const int64_t *rows, const float *scale,
                    const float *weight) {
    for (int at = 0; at < (targets->count + LANES - 1) / LANES * LANES; at++) {
        const int from = at < targets->count ? at : 0; /* the last ones fill up, and are not looked at */
        const uint8_t *row = codes + rows[from] * targets->width;
        int8_t *place = targets->codes + (size_t)(at / LANES) * LANES * targets->width + at % LANES * 4;
        for (int k = 0; k < targets->width; k += 4, place += 4 * LANES) {
            uint32_t word; /* four codes, from each of which ZERO is taken; the highest bits are there to be borrowed */
            memcpy(&word, row + k, 4);
            word = ((word | 0x80808080u) - ZERO * 0x01010101u) ^ 0x80808080u;
            memcpy(place, &word, 4);
        }
        int32_t sum = -ZERO * targets->width;
        for (int k = 0; k < targets->width; k++)
            sum += row[k];
        targets->offset[at] = ZERO * sum;
        targets->scale[at] = scale[from];
        targets->weight[at] = weight[from];
    }
}

typedef struct {
    int32_t *queries, *targets;
    Py_ssize_t room, count;
} Pairs;

static void put(Pairs *pairs, uint32_t bits, int query, int block) {
    for (; bits; bits &= bits - 1) {
        pairs->queries[pairs->count] = query;
        pairs->targets[pairs->count++] = block * LANES + __builtin_ctz(bits);
    }
}

typedef struct {
    Py_ssize_t count;
    const uint8_t *codes;
    const int64_t *rows;
    const float *slope, *less;
} Queries;

/* Compare queries from `next` on while there is room for all pairs of BATCH of them; return the next one. */
static Py_ssize_t compare(const Targets *targets, const Queries *queries, Py_ssize_t next, Near *near, Pairs *pairs) {
    const int width = targets->width, blocks = (targets->count + LANES - 1) / LANES;
    const uint32_t last = targets->count % LANES ? (1u << targets->count % LANES) - 1 : UINT32_MAX;
    while (next < queries->count && pairs->count + BATCH * targets->count <= pairs->room) {
        const int some = queries->count - next < BATCH ? (int)(queries->count - next) : BATCH;
        const uint8_t *codes[BATCH];
        Limit limits[BATCH];
        for (int q = 0; q < BATCH; q++) {
            const Py_ssize_t from = next + (q < some ? q : 0); /* the last ones fill up, and are not looked at */
            codes[q] = queries->codes + queries->rows[from] * width;
            limits[q] = (Limit){queries->slope[from], queries->less[from]};
            if (from + BATCH < queries->count)
                for (int k = 0; k < width; k += 64)
                    __builtin_prefetch(queries->codes + queries->rows[from + BATCH] * width + k);
        }
        for (int block = 0; block < blocks; block++) {
            const uint32_t valid = block == blocks - 1 ? last : UINT32_MAX;
            uint32_t bits[BATCH];
            for (int q = 0; q < some; q += TOGETHER)
                near(targets, block, codes + q, limits + q, bits + q);
            for (int q = 0; q < some; q++)
                put(pairs, bits[q] & valid, (int)next + q, block);
        }
        next += some;
    }
    return next;
}

enum { QUERY_CODES, QUERIES, SLOPE, LESS, TARGET_CODES, TARGETS, SCALE, WEIGHT, LEFT, RIGHT, BUFFERS };

/* Whether numbers are of rows of the codes. */
static int are_rows(const Py_buffer *numbers, const Py_buffer *codes, Py_ssize_t width) {
    const int64_t *number = numbers->buf;
    for (Py_ssize_t i = 0; i < numbers->len / (Py_ssize_t)sizeof(int64_t); i++)
        if (number[i] < 0 || number[i] >= codes->len / width)
            return 0;
    return 1;
}

static int do_fit(const Py_buffer *held, Py_ssize_t width, Py_ssize_t next, Py_ssize_t total, Py_ssize_t count,
                  Py_ssize_t room) {
    if (width < GROUP || width % GROUP || width > 1 << 16 || held[QUERY_CODES].len % width ||
        held[TARGET_CODES].len % width || count < 1 || count > 1 << 20 || next < 0 || total > INT32_MAX ||
        BATCH * count > room)
        return 0;
    for (int i = SLOPE; i <= LESS; i++)
        if (held[i].len != total * (Py_ssize_t)sizeof(float))
            return 0;
    for (int i = SCALE; i <= WEIGHT; i++)
        if (held[i].len != count * (Py_ssize_t)sizeof(float))
            return 0;
    return are_rows(&held[QUERIES], &held[QUERY_CODES], width) && are_rows(&held[TARGETS], &held[TARGET_CODES], width);
}

static PyObject *near_rows(PyObject *self, PyObject *args) {
    Py_buffer held[BUFFERS];
    Py_ssize_t width, next;
    int slower = 0;
    if (!PyArg_ParseTuple(args, "ny*y*y*y*ny*y*y*y*w*w*|i", &width, &held[QUERY_CODES], &held[QUERIES], &held[SLOPE],
                          &held[LESS], &next, &held[TARGET_CODES], &held[TARGETS], &held[SCALE], &held[WEIGHT],
                          &held[LEFT], &held[RIGHT], &slower))
        return NULL;
    PyObject *result = NULL;
    void *room = NULL;
    const Py_ssize_t total = held[QUERIES].len / (Py_ssize_t)sizeof(int64_t);
    const Py_ssize_t count = held[TARGETS].len / (Py_ssize_t)sizeof(int64_t);
    const Py_ssize_t padded = (count + LANES - 1) / LANES * LANES;
    const Py_ssize_t shorter = held[LEFT].len < held[RIGHT].len ? held[LEFT].len : held[RIGHT].len;
    Pairs pairs = {held[LEFT].buf, held[RIGHT].buf, shorter / (Py_ssize_t)sizeof(int32_t), 0};
    if (!do_fit(held, width, next, total, count, pairs.room)) {
        PyErr_SetString(PyExc_ValueError, "codes, rows or room do not fit each other");
        goto end;
    }
    room = aligned_alloc(64, ((size_t)padded * (width + 12) + 63) / 64 * 64);
    if (!room) {
        PyErr_NoMemory();
        goto end;
    }
    Targets targets = {(int)count, (int)width, room, NULL, NULL, NULL};
    targets.offset = (int32_t *)(targets.codes + padded * width);
    targets.scale = (float *)(targets.offset + padded);
    targets.weight = targets.scale + padded;
    const Queries queries = {total, held[QUERY_CODES].buf, held[QUERIES].buf, held[SLOPE].buf, held[LESS].buf};
    Py_BEGIN_ALLOW_THREADS
    lay_out(&targets, held[TARGET_CODES].buf, held[TARGETS].buf, held[SCALE].buf, held[WEIGHT].buf);
    next = compare(&targets, &queries, next, near_of(slower), &pairs);
    Py_END_ALLOW_THREADS
    result = Py_BuildValue("nn", pairs.count, next);
end:
    free(room);
    for (int i = 0; i < BUFFERS; i++)
        PyBuffer_Release(&held[i]);
    return result;
}

static PyMethodDef methods[] = {
    {"near_rows", near_rows, METH_VARARGS, "See _near.pyi."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_near", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__near(void) {
    return PyModule_Create(&module);
}
