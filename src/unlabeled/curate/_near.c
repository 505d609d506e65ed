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
#define HAS_AVX2 1
#endif

enum {
    ZERO = 63,   /* the code of 0 */
    GROUP = 8,   /* codes of a row that are multiplied at a time; widths are multiples of it */
    LANES = 32,  /* targets beside each other */
    AHEAD = 8,   /* queries whose codes are fetched before they are needed */
};

/* Targets, laid out as they are read: (LANES targets, GROUP codes, 2 halves of 4 codes), signed. */
typedef struct {
    int count, width;
    int8_t *codes;
    int32_t *offset; /* ZERO times the sum of a target's integers: what the unsigned queries add */
    float *inverse;
} Targets;

/* A product is high that is at least slope * targets.inverse - less: see `Codes.near` in codes.py. */
typedef struct {
    float slope, less;
} Limit;

static Limit limit_of(float inverse, float threshold, float slack) {
    return (Limit){threshold * inverse - slack, slack * inverse};
}

/* Bits of those among LANES targets from `block` on that are near a query. */
static uint32_t near_plain(const Targets *targets, int block, const uint8_t *query, Limit limit) {
    const int8_t *codes = targets->codes + (size_t)block * LANES * targets->width;
    int32_t sums[LANES] = {0};
    for (int group = 0; group < targets->width; group += GROUP)
        for (int half = 0; half < 2; half++)
            for (int j = 0; j < LANES; j++, codes += 4)
                for (int k = 0; k < 4; k++)
                    sums[j] += query[group + 4 * half + k] * codes[k];
    uint32_t bits = 0;
    for (int j = 0; j < LANES; j++) {
        int at = block * LANES + j;
        bits |= (uint32_t)((float)(sums[j] - targets->offset[at]) >= limit.slope * targets->inverse[at] - limit.less) << j;
    }
    return bits;
}

#ifdef HAS_AVX2
/* The same of two queries. Products of codes below 127 with integers below 64 are below 2^13, so that sums of four fit
   in 16 bits. Named sums stay in registers; those of an array would not. */
#define ADD(sum, v, first, second)                                                                                     \
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_add_epi16(_mm256_maddubs_epi16(first, codes[v]),             \
                                                                   _mm256_maddubs_epi16(second, codes[4 + (v)])),     \
                                                  ones))

__attribute__((target("avx2"))) static void near_avx2(const Targets *targets, int block, const uint8_t *one,
                                                       const uint8_t *other, const Limit *limits, uint32_t *bits) {
    const __m256i *codes = (const __m256i *)(targets->codes + (size_t)block * LANES * targets->width);
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i a0 = _mm256_setzero_si256(), a1 = a0, a2 = a0, a3 = a0, b0 = a0, b1 = a0, b2 = a0, b3 = a0;
    for (int group = 0; group < targets->width; group += GROUP, codes += 8) {
        int32_t words[4];
        memcpy(words, one + group, 8);
        memcpy(words + 2, other + group, 8);
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
    for (int q = 0; q < 2; q++) {
        bits[q] = 0;
        for (int v = 0; v < 4; v++) {
            const int at = block * LANES + 8 * v;
            const __m256i offset = _mm256_load_si256((const __m256i *)(targets->offset + at));
            const __m256 product = _mm256_cvtepi32_ps(_mm256_sub_epi32(sums[q][v], offset));
            const __m256 inverse = _mm256_load_ps(targets->inverse + at);
            const __m256 lowest = _mm256_sub_ps(_mm256_mul_ps(_mm256_set1_ps(limits[q].slope), inverse),
                                                _mm256_set1_ps(limits[q].less));
            bits[q] |= (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(product, lowest, _CMP_GE_OQ)) << (8 * v);
        }
    }
}
#endif

static void lay_out(Targets *targets, const uint8_t *codes, const float *inverse, const int64_t *rows) {
    const int width = targets->width;
    for (int at = 0; at < (targets->count + LANES - 1) / LANES * LANES; at++) {
        const int64_t row = rows[at < targets->count ? at : 0]; /* the last ones fill up, and are not looked at */
        int8_t *place = targets->codes + (size_t)(at / LANES) * LANES * width + at % LANES * 4;
        int32_t sum = 0;
        for (int k = 0; k < width; k++) {
            const int8_t value = (int8_t)(codes[(size_t)row * width + k] - ZERO);
            place[k / 4 * LANES * 4 + k % 4] = value;
            sum += value;
        }
        targets->offset[at] = ZERO * sum;
        targets->inverse[at] = inverse[row];
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

/* Compare queries from `next` on while there is room for all pairs of two of them; return the next one. */
static Py_ssize_t compare(const Targets *targets, const uint8_t *codes, const float *inverse, const int64_t *queries,
                          Py_ssize_t next, Py_ssize_t total, float threshold, float slack, int is_fast,
                          Pairs *pairs) {
    const int width = targets->width, blocks = (targets->count + LANES - 1) / LANES;
    const uint32_t last = targets->count % LANES ? (1u << targets->count % LANES) - 1 : UINT32_MAX;
    while (next < total && pairs->count + 2 * targets->count <= pairs->room) {
        const int two = next + 1 < total;
        const int64_t rows[2] = {queries[next], queries[next + two]};
        const uint8_t *query[2] = {codes + rows[0] * width, codes + rows[1] * width};
        const Limit limits[2] = {limit_of(inverse[rows[0]], threshold, slack),
                                 limit_of(inverse[rows[1]], threshold, slack)};
        for (int q = 0; q < 2 && next + AHEAD + q < total; q++)
            for (int k = 0; k < width; k += 64)
                __builtin_prefetch(codes + queries[next + AHEAD + q] * width + k);
        for (int block = 0; block < blocks; block++) {
            uint32_t bits[2];
#ifdef HAS_AVX2
            if (is_fast)
                near_avx2(targets, block, query[0], query[1], limits, bits);
#endif
            for (int q = 0; q < 2 && !is_fast; q++)
                bits[q] = near_plain(targets, block, query[q], limits[q]);
            const uint32_t valid = block == blocks - 1 ? last : UINT32_MAX;
            put(pairs, bits[0] & valid, (int)next, block);
            if (two)
                put(pairs, bits[1] & valid, (int)next + 1, block);
        }
        next += 1 + two;
    }
    return next;
}

static int are_rows(const Py_buffer *numbers, Py_ssize_t rows) {
    const int64_t *number = numbers->buf;
    for (Py_ssize_t i = 0; i < numbers->len / (Py_ssize_t)sizeof(int64_t); i++)
        if (number[i] < 0 || number[i] >= rows)
            return 0;
    return 1;
}

static PyObject *near_rows(PyObject *self, PyObject *args) {
    enum { CODES, INVERSE, QUERIES, TARGETS, LEFT, RIGHT, BUFFERS };
    Py_buffer held[BUFFERS];
    Py_ssize_t next;
    float threshold, slack;
    int is_plain = 0;
    if (!PyArg_ParseTuple(args, "y*y*y*ny*ffw*w*|p", &held[CODES], &held[INVERSE], &held[QUERIES], &next, &held[TARGETS],
                          &threshold, &slack, &held[LEFT], &held[RIGHT], &is_plain))
        return NULL;
#ifdef HAS_AVX2
    const int is_fast = !is_plain && __builtin_cpu_supports("avx2");
#else
    const int is_fast = 0;
#endif
    PyObject *result = NULL;
    void *room = NULL;
    const Py_ssize_t rows = held[INVERSE].len / (Py_ssize_t)sizeof(float);
    const Py_ssize_t width = rows ? held[CODES].len / rows : 0;
    const Py_ssize_t total = held[QUERIES].len / (Py_ssize_t)sizeof(int64_t);
    const Py_ssize_t count = held[TARGETS].len / (Py_ssize_t)sizeof(int64_t);
    const Py_ssize_t padded = (count + LANES - 1) / LANES * LANES;
    const Py_ssize_t shorter = held[LEFT].len < held[RIGHT].len ? held[LEFT].len : held[RIGHT].len;
    Pairs pairs = {held[LEFT].buf, held[RIGHT].buf, shorter / (Py_ssize_t)sizeof(int32_t), 0};
    if (width < GROUP || width % GROUP || width > 1 << 16 || held[CODES].len != rows * width || !count ||
        count > 1 << 20 || total > INT32_MAX || next < 0 || 2 * count > pairs.room || !are_rows(&held[QUERIES], rows) ||
        !are_rows(&held[TARGETS], rows)) {
        PyErr_SetString(PyExc_ValueError, "codes, rows or room do not fit each other");
        goto end;
    }
    room = aligned_alloc(64, ((size_t)padded * (width + 8) + 63) / 64 * 64);
    if (!room) {
        PyErr_NoMemory();
        goto end;
    }
    Targets targets = {(int)count, (int)width, room, NULL, NULL};
    targets.offset = (int32_t *)(targets.codes + padded * width);
    targets.inverse = (float *)(targets.offset + padded);
    Py_BEGIN_ALLOW_THREADS
    lay_out(&targets, held[CODES].buf, held[INVERSE].buf, held[TARGETS].buf);
    next = compare(&targets, held[CODES].buf, held[INVERSE].buf, held[QUERIES].buf, next, total, threshold, slack,
                   is_fast, &pairs);
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
