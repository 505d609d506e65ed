/* The pixels of one image's crops: resampling and augmentation in one pass over cache-sized buffers.

   Everything works on planar float rows, which compilers vectorise; 8-bit rounding happens where Pillow's would. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* With GCC and glibc on x86 the whole of a crop is compiled for several instruction sets; the loader chooses. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define VERSIONS __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VERSIONS
#endif
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define HAS_SHUFFLE 1
#endif
#endif

enum {
    MAX_TAPS = 24,  /* more are weighed in float: fixed point would lose too much */
    MAX_RADIUS = 8, /* of the blur */
    MAX_SIZE = 8192, /* of a crop */
    TILE = 16,      /* rows turned on their side at a time */
    LANES = 32,     /* rows of levels are padded to this, so that no vector is left half full */
};

/* One crop's parameters, as crops.py lays them out: a row of float32. */
typedef struct {
    float top, left, height, width; /* box in the image, pixels */
    float flip, jitter, grey;       /* 0: no */
    float sigma;                    /* of the blur, pixels; 0: none */
    float solarise;                 /* threshold; 0: none */
    float brightness, contrast, saturation; /* factors */
    float hue;                      /* share of the colour circle */
    float radius;                   /* of the blur's kernel, pixels */
    float order[4];                 /* of 0 brightness, 1 contrast, 2 saturation, 3 hue */
} Parameters;
enum { NUM_PARAMETERS = sizeof(Parameters) / sizeof(float) };

/* Weights of one side of a crop: point i is the sum of count[i] source points from first[i] on. */
typedef struct {
    int stride, *first, *count;
    float *start, *sum;
    float *exact;   /* (tap, stride), sum over taps 1 */
    int16_t *fixed; /* the same in 1/16384, sum 16384 */
} Weights;

/* Room for one crop, allocated once for all crops of a size. `stride` is the size rounded up to LANES. */
typedef struct {
    Weights across, down;
    float *sums;
    int16_t *levels;  /* (source rows of a tile, width * 3): centred at 0 */
    int16_t *rows;    /* (TILE, width * 3): rows resampled to their height */
    int16_t *turned;  /* (width * 3, stride): all of them, turned */
    int16_t *planes;  /* (x, channel, stride of y): the crop, turned */
    int16_t *blurred; /* the same */
} Room;

/* ---- resampling ---- */

INLINE float bicubic(float x) { /* Keys, a = -0.5: Pillow's */
    x = fabsf(x);
    float near = ((1.5f * x - 2.5f) * x) * x + 1, far = (((x - 5) * x + 8) * x - 4) * -0.5f;
    return x < 1 ? near : x < 2 ? far : 0;
}

static int num_taps(int in, int out) { return 2 * (int)ceil(2 * ((double)in / out < 1 ? 1 : (double)in / out)) + 1; }

/* Weights that resample [0, in) to `out` points, antialiased: the kernel widens with the reduction. */
INLINE void weights(int in, int out, Weights *table) {
    double scale = (double)in / out, widen = scale < 1 ? 1 : scale, support = 2 * widen;
    float narrow = (float)(1 / widen);
    int stride = table->stride, taps = num_taps(in, out);
    int *restrict first = table->first, *restrict count = table->count;
    float *restrict start = table->start, *restrict sum = table->sum;
    for (int i = 0; i < stride; i++) {
        double centre = (i < out ? i + 0.5 : 0.5) * scale;
        int low = (int)(centre - support + 0.5), high = (int)(centre + support + 0.5);
        low = low > 0 ? low : 0;
        high = high < in ? high : in;
        first[i] = low;
        count[i] = high - low;
        start[i] = (float)((low - centre + 0.5) / widen);
        sum[i] = 0;
    }
    for (int k = 0; k < taps; k++) {
        float *restrict exact = table->exact + (size_t)k * stride;
        for (int i = 0; i < stride; i++) {
            exact[i] = k < count[i] ? bicubic(start[i] + k * narrow) : 0;
            sum[i] += exact[i];
        }
    }
    for (int k = 0; k < taps; k++) {
        float *restrict exact = table->exact + (size_t)k * stride;
        int16_t *restrict fixed = table->fixed + (size_t)k * stride;
        for (int i = 0; i < stride; i++) {
            exact[i] /= sum[i];
            fixed[i] = (int16_t)((int)(exact[i] * 16384 + 65536.5f) - 65536);
        }
    }
    for (int i = 0; i < out; i++) { /* what rounding left goes to the middle */
        int left = 16384, middle = (int)((i + 0.5) * scale) - first[i];
        for (int k = 0; k < count[i]; k++) left -= table->fixed[(size_t)k * stride + i];
        table->fixed[(size_t)middle * stride + i] += (int16_t)left;
    }
}

INLINE int16_t high_half(int16_t a, int16_t b) { return (int16_t)(((int)a * (int)b) >> 16); }

INLINE int16_t clipped(int16_t x) {
    x = x > 0 ? x : 0;
    return x < 255 ? x : 255;
}

/* Bytes as levels in 1/256, centred at 0. */
INLINE void to_levels(const uint8_t *bytes, int n, int16_t *restrict levels) {
    if (n < LANES) {
        for (int i = 0; i < n; i++) levels[i] = (int16_t)((bytes[i] << 8) ^ 0x8000);
        return;
    }
    for (int i = 0; i < n; i += LANES) {
        int from = i < n - LANES ? i : n - LANES; /* the last lanes overlap the ones before */
        for (int k = from; k < from + LANES; k++) levels[k] = (int16_t)((bytes[k] << 8) ^ 0x8000);
    }
}

/* The weighed sum of `num` (a constant) rows, `step` apart. Levels come in 1/256 and leave in 1/128, to_whole is 0;
   those come in again, turned, and leave whole. Products are cut, hence the half of each in `start`. */
INLINE void add_rows(int num, int is_first, int is_last, int to_whole, const int16_t *source, size_t step,
                     const int16_t *weight, size_t weight_step, int n, int start, int16_t *restrict out) {
    int16_t w[8];
    for (int k = 0; k < num; k++) w[k] = weight[k * weight_step];
    n = n / LANES * LANES;
    for (int i = 0; i < n; i++) {
        int16_t sum = is_first ? (int16_t)start : out[i];
        UNROLL
        for (int k = 0; k < num; k++) sum = (int16_t)(sum + high_half(source[k * step + i], w[k]));
        if (is_last) sum = to_whole ? clipped((int16_t)(sum >> 5)) : (int16_t)(sum * 2);
        out[i] = sum;
    }
}

INLINE void weigh(int to_whole, const int16_t *source, size_t step, const int16_t *weight, size_t weight_step,
                  int count, int n, int16_t *out) {
    int start = (count + 1) / 2 + (to_whole ? (128 << 5) + 16 : 0);
#define CASE(K)                                                                                            \
    case K: add_rows(K, 1, 1, to_whole, source, step, weight, weight_step, n, start, out); return;         \
    case K + 8: add_rows(K, 0, 1, to_whole, source, step, weight, weight_step, n, start, out); return;
    int is_first = 1;
    for (; count > 8; count -= 8, source += 8 * step, weight += 8 * weight_step, is_first = 0) {
        if (is_first)
            add_rows(8, 1, 0, to_whole, source, step, weight, weight_step, n, start, out);
        else
            add_rows(8, 0, 0, to_whole, source, step, weight, weight_step, n, start, out);
    }
    switch (count + (is_first ? 0 : 8)) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) }
#undef CASE
}

/* The same for many taps: from bytes, or from levels in 1/128 to whole ones. */
INLINE void weigh_exactly(int is_bytes, const void *source, size_t step, const float *weight, size_t weight_step,
                          int count, int n, float *restrict sums, int16_t *restrict out) {
    const uint8_t *bytes = source;
    const int16_t *levels = source;
    for (int i = 0; i < n; i++) sums[i] = is_bytes ? -128.0f : 128.5f * 128;
    for (int k = 0; k < count; k++) {
        float w = weight[k * weight_step];
        for (int i = 0; i < n; i++) sums[i] += w * (is_bytes ? bytes[k * step + i] : levels[k * step + i]);
    }
    for (int i = 0; i < n; i++) out[i] = is_bytes ? (int16_t)(sums[i] * 128) : clipped((int16_t)((int)sums[i] >> 7));
}

#ifdef HAS_SHUFFLE
typedef int16_t Words __attribute__((vector_size(16)));
typedef int16_t Words16 __attribute__((vector_size(32)));
typedef uint8_t Bytes __attribute__((vector_size(16)));
#define LOW8 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH8 4, 12, 5, 13, 6, 14, 7, 15
#define LOW16 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH16 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
/* Rows i and i + N/2 interleaved, log2(N) times over, are the columns. */
#define TURN(NAME, TYPE, WIDE, VECTOR, N, ROUNDS, LOW, HIGH)                                                \
    INLINE void NAME(const int16_t *in, size_t in_stride, TYPE *out, size_t out_stride) {                   \
        VECTOR a[N], b[N];                                                                                  \
        for (int i = 0; i < N; i++) {                                                                       \
            WIDE row;                                                                                       \
            memcpy(&row, in + i * in_stride, sizeof row);                                                   \
            a[i] = __builtin_convertvector(row, VECTOR);                                                    \
        }                                                                                                   \
        UNROLL for (int round = 0; round < ROUNDS; round++) {                                               \
            UNROLL for (int i = 0; i < N / 2; i++) {                                                        \
                b[2 * i] = __builtin_shufflevector(a[i], a[i + N / 2], LOW);                                \
                b[2 * i + 1] = __builtin_shufflevector(a[i], a[i + N / 2], HIGH);                           \
            }                                                                                               \
            UNROLL for (int i = 0; i < N; i++) a[i] = b[i];                                                 \
        }                                                                                                   \
        for (int i = 0; i < N; i++) memcpy(out + i * out_stride, &a[i], sizeof(VECTOR));                    \
    }
#else
#define TURN(NAME, TYPE, WIDE, VECTOR, N, ROUNDS, LOW, HIGH)                                                \
    INLINE void NAME(const int16_t *in, size_t in_stride, TYPE *out, size_t out_stride) {                   \
        for (int i = 0; i < N; i++)                                                                         \
            for (int j = 0; j < N; j++) out[j * out_stride + i] = (TYPE)in[i * in_stride + j];              \
    }
#endif
TURN(turn_words, int16_t, Words, Words, 8, 3, LOW8, HIGH8)
TURN(turn_to_bytes, uint8_t, Words16, Bytes, 16, 4, LOW16, HIGH16)

/* The box as size x size whole levels. Rows first, then turned on their side, so that both sums run along vectors. */
INLINE void resample(const uint8_t *image, int image_width, const Parameters *p, int size, int stride, Room *room) {
    int n = (int)p->width * 3, padded = (n + LANES - 1) / LANES * LANES;
    const uint8_t *box = image + ((size_t)p->top * image_width + (size_t)p->left) * 3;
    size_t step = (size_t)image_width * 3;
    const Weights *down = &room->down, *across = &room->across;
    int is_exact = num_taps((int)p->height, size) > MAX_TAPS;
    for (int y0 = 0; y0 < stride; y0 += TILE) {
        int end = y0 + TILE < size ? y0 + TILE : size, top = y0 < size ? down->first[y0] : 0;
        if (y0 < size && !is_exact)
            for (int y = top; y < down->first[end - 1] + down->count[end - 1]; y++)
                to_levels(box + y * step, n, room->levels + (size_t)(y - top) * padded);
        for (int y = y0; y < y0 + TILE; y++) {
            int16_t *row = room->rows + (size_t)(y - y0) * padded;
            if (y >= size)
                memset(row, 0, n * sizeof(int16_t));
            else if (is_exact)
                weigh_exactly(1, box + down->first[y] * step, step, down->exact + y, down->stride, down->count[y], n,
                              room->sums, row);
            else
                weigh(0, room->levels + (size_t)(down->first[y] - top) * padded, padded, down->fixed + y,
                      down->stride, down->count[y], padded, row);
        }
        for (int i = 0; i < n; i += 8)
            for (int half = 0; half < TILE; half += 8)
                turn_words(room->rows + (size_t)half * padded + i, padded,
                           room->turned + (size_t)i * stride + y0 + half, stride);
    }
    is_exact = num_taps((int)p->width, size) > MAX_TAPS;
    for (int x = 0; x < size; x++) {
        size_t pixel = 3 * (size_t)stride;
        const int16_t *source = room->turned + across->first[x] * pixel;
        int16_t *out = room->planes + (p->flip > 0 ? size - 1 - x : x) * pixel;
        if (is_exact)
            weigh_exactly(0, source, pixel, across->exact + x, across->stride, across->count[x], (int)pixel,
                          room->sums, out);
        else
            weigh(1, source, pixel, across->fixed + x, across->stride, across->count[x], (int)pixel, out);
    }
}

/* ---- colour ---- */

INLINE int16_t luma(int16_t r, int16_t g, int16_t b) { /* ITU-R 601-2, rounded */
    uint16_t red = (uint16_t)(r << 8), green = (uint16_t)(g << 8), blue = (uint16_t)(b << 8);
    uint16_t sum = (uint16_t)(((uint32_t)red * 19595u) >> 16);
    sum = (uint16_t)(sum + (uint16_t)(((uint32_t)green * 38470u) >> 16));
    sum = (uint16_t)(sum + (uint16_t)(((uint32_t)blue * 7471u) >> 16));
    return (int16_t)((uint16_t)(sum + 129) >> 8);
}

/* other + factor * (x - other), cut and clipped as Pillow does; factor in 1/16384. */
INLINE int16_t blended(int16_t x, int16_t other, int16_t factor) {
    int16_t part = high_half((int16_t)((int16_t)(x - other) * 128), factor);
    return clipped((int16_t)((int16_t)(part + other * 32) >> 5));
}

INLINE int16_t blended_far(int16_t x, int16_t other, float factor) {
    float value = other + factor * (float)(x - other);
    value = value > 0 ? value : 0;
    return (int16_t)(value < 255 ? value : 255);
}

INLINE void blend(int16_t *plane, size_t n, int16_t other, float factor) {
    int16_t fixed = (int16_t)(factor * 16384 + 0.5f);
    if (factor < 1.999f)
        for (size_t i = 0; i < n; i++) plane[i] = blended(plane[i], other, fixed);
    else
        for (size_t i = 0; i < n; i++) plane[i] = blended_far(plane[i], other, factor);
}

INLINE void saturate(int16_t *restrict r, int16_t *restrict g, int16_t *restrict b, int n, float factor) {
    int16_t fixed = (int16_t)(factor * 16384 + 0.5f);
    if (factor < 1.999f)
        for (int i = 0; i < n; i++) {
            int16_t grey = luma(r[i], g[i], b[i]);
            r[i] = blended(r[i], grey, fixed);
            g[i] = blended(g[i], grey, fixed);
            b[i] = blended(b[i], grey, fixed);
        }
    else
        for (int i = 0; i < n; i++) {
            int16_t grey = luma(r[i], g[i], b[i]);
            r[i] = blended_far(r[i], grey, factor);
            g[i] = blended_far(g[i], grey, factor);
            b[i] = blended_far(b[i], grey, factor);
        }
}

INLINE void to_grey(int16_t *restrict r, int16_t *restrict g, int16_t *restrict b, int n) {
    for (int i = 0; i < n; i++) r[i] = g[i] = b[i] = luma(r[i], g[i], b[i]);
}

INLINE int32_t row_sum(const int16_t *r, const int16_t *g, const int16_t *b, int n) {
    int32_t sum = 0;
    for (int i = 0; i < n; i++) sum += luma(r[i], g[i], b[i]);
    return sum;
}

INLINE float hue_channel(float offset, float hue, float value, float chroma) {
    float k = offset + hue;
    k = k >= 6 ? k - 6 : k;
    float other = 4 - k, least = k < other ? k : other;
    least = least > 0 ? least : 0;
    least = least < 1 ? least : 1;
    return value - chroma * least + 0.5f;
}

/* Hue as Pillow has it: 8-bit HSV, shifted round the circle. */
INLINE void shift_hue(int16_t *restrict r, int16_t *restrict g, int16_t *restrict b, int n, float shift) {
    int step = (int)(shift * 255);
    for (int i = 0; i < n; i++) {
        float R = r[i], G = g[i], B = b[i];
        float high = R > G ? R : G, low = R < G ? R : G;
        high = high > B ? high : B;
        low = low < B ? low : B;
        float range = high - low, inverse = 1 / (range > 0 ? range : 1);
        float hue = 4 + (R - G) * inverse;
        hue = G >= high ? 2 + (B - R) * inverse : hue;
        hue = R >= high ? (G - B) * inverse : hue;
        hue = hue < 0 ? hue + 6 : hue;
        hue = range > 0 ? hue : 0;
        float saturation = range * 255 / (high > 0 ? high : 1);
        hue = (float)(((int)(hue * (255 / 6.0f)) + step) & 255) * (6 / 255.0f);
        float chroma = high * (float)(int)saturation * (1 / 255.0f);
        r[i] = (int16_t)(int)hue_channel(5, hue, high, chroma);
        g[i] = (int16_t)(int)hue_channel(3, hue, high, chroma);
        b[i] = (int16_t)(int)hue_channel(1, hue, high, chroma);
    }
}

/* ---- blur ---- */

INLINE int reflected(int i, int n) {
    if (n == 1) return 0;
    while (i < 0 || i >= n) i = i < 0 ? -i : 2 * (n - 1) - i;
    return i;
}

/* Gaussian of 2 * radius + 1 taps, reflected at the borders, rounded: torchvision's GaussianBlur. `most` (a constant)
   is at least the radius. Sums of pairs of centred levels just fit 16 bits. */
INLINE void blur(int most, int size, int stride, float sigma, int radius, Room *room) {
    float exact[MAX_RADIUS + 1], sum = 0;
    int16_t fixed[MAX_RADIUS + 1], w[MAX_RADIUS + 1];
    for (int k = 0; k <= radius; k++) sum += (k ? 2 : 1) * (exact[k] = expf(-0.5f * (k / sigma) * (k / sigma)));
    int total = 0;
    for (int k = most; k > 0; k--) {
        fixed[k] = k <= radius ? (int16_t)(exact[k] / sum * 32768 + 0.5f) : 0;
        total += 2 * fixed[k];
    }
    fixed[0] = (int16_t)(total > 0 ? 32768 - total : 32767);
    for (int k = 0; k <= most; k++) w[k] = fixed[k];
    int n = 3 * stride;
    for (int x = 0; x < size; x++) {
        const int16_t *up[MAX_RADIUS + 1], *down[MAX_RADIUS + 1];
        int16_t *restrict out = room->blurred + (size_t)x * n;
        for (int k = 0; k <= most; k++) {
            up[k] = room->planes + (size_t)reflected(x - k, size) * n;
            down[k] = room->planes + (size_t)reflected(x + k, size) * n;
        }
        for (int i = 0; i < n; i++) {
            int16_t value = high_half((int16_t)((up[0][i] - 128) * 128), w[0]);
            UNROLL
            for (int k = 1; k <= most; k++)
                value = (int16_t)(value + high_half((int16_t)((up[k][i] + down[k][i] - 256) * 128), w[k]));
            out[i] = (int16_t)(value + most / 2);
        }
    }
    int16_t *padded = room->rows;
    for (int line = 0; line < 3 * size; line++) {
        const int16_t *in = room->blurred + (size_t)line * stride;
        int16_t *restrict out = room->planes + (size_t)line * stride;
        memcpy(padded + most, in, size * sizeof(int16_t));
        for (int k = 1; k <= most; k++) {
            padded[most - k] = in[reflected(-k, size)];
            padded[most + size - 1 + k] = in[reflected(size - 1 + k, size)];
        }
        for (int i = 0; i < size; i++) {
            int16_t value = high_half(padded[i + most], w[0]);
            UNROLL
            for (int k = 1; k <= most; k++)
                value = (int16_t)(value + high_half((int16_t)(padded[i + most - k] + padded[i + most + k]), w[k]));
            out[i] = clipped((int16_t)((int16_t)(value + (128 << 5) + 16 + most / 2) >> 5));
        }
    }
}

/* ---- a crop ---- */

INLINE void write_out(int size, int stride, const Room *room, uint8_t *out) {
    size_t pixel = 3 * (size_t)stride, area = (size_t)size * size;
    const int16_t *planes = room->planes;
    if (size < 16) {
        for (int c = 0; c < 3; c++)
            for (int y = 0; y < size; y++)
                for (int x = 0; x < size; x++)
                    out[c * area + (size_t)y * size + x] = (uint8_t)planes[x * pixel + (size_t)c * stride + y];
        return;
    }
    for (int c = 0; c < 3; c++)
        for (int y = 0; y < size; y += 16)
            for (int x = 0; x < size; x += 16) { /* the last tile overlaps the one before */
                int row = y < size - 16 ? y : size - 16, column = x < size - 16 ? x : size - 16;
                turn_to_bytes(planes + column * pixel + (size_t)c * stride + row, pixel,
                              out + c * area + (size_t)row * size + column, size);
            }
}

VERSIONS
static void one_crop(const uint8_t *image, int image_width, const Parameters *p, int size, int stride, Room *room,
                     uint8_t *out) {
    weights((int)p->width, size, &room->across);
    weights((int)p->height, size, &room->down);
    resample(image, image_width, p, size, stride, room);
    size_t pixel = 3 * (size_t)stride, n = size * pixel;
    int16_t *r = room->planes, *g = r + stride, *b = g + stride;
    for (int step = 0; step < 4 && p->jitter > 0; step++) {
        int operation = (int)p->order[step];
        if (operation == 0) {
            blend(r, n, 0, p->brightness);
        } else if (operation == 1) {
            int64_t total = 0;
            for (size_t i = 0; i < n; i += pixel) total += row_sum(r + i, g + i, b + i, size);
            blend(r, n, (int16_t)((double)total / ((double)size * size) + 0.5), p->contrast);
        } else if (operation == 2) {
            for (size_t i = 0; i < n; i += pixel) saturate(r + i, g + i, b + i, stride, p->saturation);
        } else {
            for (size_t i = 0; i < n; i += pixel) shift_hue(r + i, g + i, b + i, stride, p->hue);
        }
    }
    if (p->grey > 0)
        for (size_t i = 0; i < n; i += pixel) to_grey(r + i, g + i, b + i, stride);
    if (p->sigma > 0) {
        if (p->radius <= 4)
            blur(4, size, stride, p->sigma, (int)p->radius, room);
        else
            blur(MAX_RADIUS, size, stride, p->sigma, (int)p->radius, room);
    }
    if (p->solarise > 0) {
        int16_t threshold = (int16_t)p->solarise;
        for (size_t i = 0; i < n; i++) r[i] = r[i] >= threshold ? (int16_t)(255 - r[i]) : r[i];
    }
    write_out(size, stride, room, out);
}

static void *cut(char **memory, size_t bytes) { /* a piece for 64-byte vectors */
    void *piece = *memory;
    *memory += (bytes + 63) & ~(size_t)63;
    return piece;
}

static int all_crops(const uint8_t *image, int image_width, const Parameters *parameters, Py_ssize_t num, int size,
                     uint8_t *out, Py_ssize_t out_step) {
    int widest = 1, tallest = 1, taps = 0, stride = (size + LANES - 1) / LANES * LANES;
    for (Py_ssize_t i = 0; i < num; i++) {
        if (parameters[i].width > widest) widest = (int)parameters[i].width;
        if (parameters[i].height > tallest) tallest = (int)parameters[i].height;
    }
    taps = num_taps(widest > tallest ? widest : tallest, size);
    size_t row = (3 * (size_t)widest + LANES - 1) / LANES * LANES, plane = 3 * (size_t)stride * size;
    size_t longest = row > 3 * (size_t)stride ? row : 3 * (size_t)stride;
    /* Source rows that a tile of output rows draws on, where they are weighed in fixed point. */
    size_t source_rows = (size_t)(TILE * (MAX_TAPS / 4.0 < (double)tallest / size ? MAX_TAPS / 4.0 : (double)tallest / size)) + MAX_TAPS + 2;
    size_t table = (size_t)taps * stride, line = (size_t)stride * sizeof(int);
    size_t bytes = 2 * (4 * line + table * (sizeof(float) + sizeof(int16_t))) + longest * sizeof(float) +
                   (source_rows * row + TILE * longest + 2 * MAX_RADIUS + row * stride + 2 * plane) * sizeof(int16_t) +
                   64 * 20;
    char *memory = malloc(bytes), *next = memory + (64 - (uintptr_t)memory % 64);
    if (!memory) return -1;
    Room room;
    Weights *sides[] = {&room.across, &room.down};
    for (int side = 0; side < 2; side++) {
        sides[side]->stride = stride;
        sides[side]->first = cut(&next, line);
        sides[side]->count = cut(&next, line);
        sides[side]->start = cut(&next, line);
        sides[side]->sum = cut(&next, line);
        sides[side]->exact = cut(&next, table * sizeof(float));
        sides[side]->fixed = cut(&next, table * sizeof(int16_t));
    }
    room.sums = cut(&next, longest * sizeof(float));
    room.levels = cut(&next, source_rows * row * sizeof(int16_t));
    room.rows = cut(&next, (TILE * longest + 2 * MAX_RADIUS) * sizeof(int16_t));
    room.turned = cut(&next, row * stride * sizeof(int16_t));
    room.planes = cut(&next, plane * sizeof(int16_t));
    room.blurred = cut(&next, plane * sizeof(int16_t));
    for (Py_ssize_t i = 0; i < num; i++)
        one_crop(image, image_width, parameters + i, size, stride, &room, out + i * out_step);
    free(memory);
    return 0;
}

/* ---- Python ---- */

static PyObject *crops(PyObject *module, PyObject *const *arguments, Py_ssize_t num_arguments) {
    (void)module;
    if (num_arguments != 3) {
        PyErr_SetString(PyExc_TypeError, "crops(image, parameters, out)");
        return NULL;
    }
    Py_buffer image, parameters, out;
    if (PyObject_GetBuffer(arguments[0], &image, PyBUF_ND) < 0) return NULL;
    if (PyObject_GetBuffer(arguments[1], &parameters, PyBUF_SIMPLE) < 0) {
        PyBuffer_Release(&image);
        return NULL;
    }
    if (PyObject_GetBuffer(arguments[2], &out, PyBUF_STRIDED) < 0) {
        PyBuffer_Release(&image);
        PyBuffer_Release(&parameters);
        return NULL;
    }
    const Parameters *p = parameters.buf;
    Py_ssize_t num = parameters.len / (Py_ssize_t)sizeof(Parameters);
    int good = image.ndim == 3 && image.itemsize == 1 && image.shape[2] == 3 && image.shape[0] < 1 << 24 &&
               image.shape[1] < 1 << 24 && parameters.len == num * (Py_ssize_t)sizeof(Parameters) && out.ndim == 4 &&
               out.itemsize == 1 && !out.readonly && out.shape[0] == num && out.shape[1] == 3 &&
               out.shape[2] == out.shape[3] && out.shape[3] > 0 && out.shape[3] <= MAX_SIZE &&
               out.strides[3] == 1 && out.strides[2] == out.shape[3] &&
               out.strides[1] == out.shape[3] * out.shape[3];
    for (Py_ssize_t i = 0; good && i < num; i++)
        good = p[i].top >= 0 && p[i].left >= 0 && p[i].height >= 1 && p[i].width >= 1 &&
               p[i].top + p[i].height <= image.shape[0] && p[i].left + p[i].width <= image.shape[1] &&
               p[i].radius >= 0 && p[i].radius <= MAX_RADIUS;
    int failed = 0;
    if (good) {
        Py_BEGIN_ALLOW_THREADS
        failed = all_crops(image.buf, (int)image.shape[1], p, num, (int)out.shape[3], out.buf, out.strides[0]);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&image);
    PyBuffer_Release(&parameters);
    PyBuffer_Release(&out);
    if (!good) {
        PyErr_SetString(PyExc_ValueError, "arrays do not match, a box lies outside the image, or a blur is too wide");
        return NULL;
    }
    if (failed) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"crops", (PyCFunction)(void (*)(void))crops, METH_FASTCALL,
     "crops(image, parameters, out): write the crops of an image."},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {.m_base = PyModuleDef_HEAD_INIT, .m_name = "_pixels", .m_size = -1, .m_methods = methods};

PyMODINIT_FUNC PyInit__pixels(void) {
    PyObject *made = PyModule_Create(&module);
    if (made && PyModule_AddIntConstant(made, "NUM_PARAMETERS", NUM_PARAMETERS) < 0) {
        Py_DECREF(made);
        return NULL;
    }
    return made;
}
