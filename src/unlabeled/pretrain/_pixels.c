/* The pixels of one image's crops: resampling and augmentation in one pass over cache-sized buffers.

   Everything works on planar float rows, which compilers vectorise; 8-bit rounding happens where Pillow's would. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* On x86 with GCC the whole of a crop is compiled for several instruction sets and chosen when the module loads. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define VERSIONS __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VERSIONS
#endif
#define INLINE static inline __attribute__((always_inline))

enum { LANES = 16, BLUR_RADIUS = 4 };

/* One crop's parameters, as crops.py lays them out: a row of float32. */
typedef struct {
    float top, left, height, width; /* box in the image, pixels */
    float flip;
    float jitter, order[4];         /* order of 0 brightness, 1 contrast, 2 saturation, 3 hue */
    float brightness, contrast, saturation; /* factors */
    float hue;                      /* share of the colour circle */
    float grey;
    float sigma;                    /* of the blur, pixels; 0: none */
    float solarise;                 /* threshold; 0: none */
} Parameters;
enum { NUM_PARAMETERS = sizeof(Parameters) / sizeof(float) };

INLINE float bicubic(float x) { /* Keys, a = -0.5: Pillow's */
    x = fabsf(x);
    if (x < 1) return ((1.5f * x - 2.5f) * x) * x + 1;
    if (x < 2) return (((x - 5) * x + 8) * x - 4) * -0.5f;
    return 0;
}

/* Weights that resample [0, in) to `out` points, antialiased: the kernel widens with the reduction.
   first[i], count[i]: source taps of point i; weights[i * taps ...]. */
static int coefficients(int in, int out, int taps, int *first, int *count, float *weights) {
    double scale = (double)in / out, widen = scale < 1 ? 1 : scale, support = 2 * widen;
    for (int i = 0; i < out; i++) {
        double centre = (i + 0.5) * scale;
        int low = (int)(centre - support + 0.5), high = (int)(centre + support + 0.5);
        if (low < 0) low = 0;
        if (high > in) high = in;
        float *row = weights + (size_t)i * taps, sum = 0;
        for (int k = 0; k < high - low; k++) sum += row[k] = bicubic((float)((k + low - centre + 0.5) / widen));
        for (int k = 0; k < high - low; k++) row[k] /= sum;
        first[i] = low;
        count[i] = high - low;
    }
    return 0;
}

INLINE float quantised(float x) { /* clipped and cut to 8 bits, as Pillow's blend does */
    x = x > 0 ? x : 0;
    x = x < 255 ? x : 255;
    return (float)(int)x;
}

INLINE float luma(float r, float g, float b) { /* ITU-R 601-2, 16-bit weights */
    return (float)(((int)r * 19595 + (int)g * 38470 + (int)b * 7471 + 32768) >> 16);
}

INLINE void blend(float *plane, int n, float factor, float other) {
    for (int i = 0; i < n; i++) plane[i] = quantised(other + factor * (plane[i] - other));
}

INLINE void saturate(float *r, float *g, float *b, int n, float factor) {
    for (int i = 0; i < n; i++) {
        float grey = luma(r[i], g[i], b[i]);
        r[i] = quantised(grey + factor * (r[i] - grey));
        g[i] = quantised(grey + factor * (g[i] - grey));
        b[i] = quantised(grey + factor * (b[i] - grey));
    }
}

INLINE float hue_channel(float offset, float hue, float value, float saturation) {
    float k = offset + hue * 6;
    k -= 6 * (float)(int)(k * (1 / 6.0f)); /* k >= 0 */
    float other = 4 - k, least = k < other ? k : other;
    least = least > 0 ? least : 0;
    least = least < 1 ? least : 1;
    return (float)(int)(value - value * saturation * least + 0.5f);
}

/* Hue as Pillow has it: 8-bit HSV, shifted round the circle. */
INLINE void shift_hue(float *r, float *g, float *b, int n, float shift) {
    int step = (int)(shift * 255);
    for (int i = 0; i < n; i++) {
        float R = r[i], G = g[i], B = b[i];
        float high = R > G ? R : G, low = R < G ? R : G;
        high = high > B ? high : B;
        low = low < B ? low : B;
        /* Choices are sums with weights of 0 and 1: branches would keep compilers from vectorising. */
        float range = high - low, flat = range > 0 ? 0.0f : 1.0f, black = high > 0 ? 0.0f : 1.0f;
        float inverse = 1 / (range + flat);
        float is_red = R >= high ? 1.0f : 0.0f, is_green = (1 - is_red) * (G >= high ? 1.0f : 0.0f);
        float hue = is_red * (G - B) * inverse + is_green * (2 + (B - R) * inverse) +
                    (1 - is_red - is_green) * (4 + (R - G) * inverse);
        hue = (1 - flat) * (hue * (1 / 6.0f) + 1);
        hue -= (float)(int)hue;
        float saturation = range / (high + black);
        hue = (float)(((int)(hue * 255) + step) & 255) * (1 / 255.0f);
        saturation = (float)(int)(saturation * 255) * (1 / 255.0f);
        r[i] = hue_channel(5, hue, high, saturation);
        g[i] = hue_channel(3, hue, high, saturation);
        b[i] = hue_channel(1, hue, high, saturation);
    }
}

INLINE int reflected(int i, int n) {
    if (n == 1) return 0;
    while (i < 0 || i >= n) i = i < 0 ? -i : 2 * (n - 1) - i;
    return i;
}

/* Gaussian of 9 taps, reflected at the borders, rounded: torchvision's GaussianBlur(9). */
INLINE void blur(float *plane, int size, float sigma, float *padded, float *across) {
    float weights[2 * BLUR_RADIUS + 1], sum = 0;
    for (int k = -BLUR_RADIUS; k <= BLUR_RADIUS; k++)
        sum += weights[k + BLUR_RADIUS] = expf(-0.5f * (k / sigma) * (k / sigma));
    for (int k = 0; k <= 2 * BLUR_RADIUS; k++) weights[k] /= sum;
    for (int y = 0; y < size; y++) {
        float *row = plane + (size_t)y * size, *out = across + (size_t)y * size;
        memcpy(padded + BLUR_RADIUS, row, size * sizeof(float));
        for (int k = 1; k <= BLUR_RADIUS; k++) {
            padded[BLUR_RADIUS - k] = row[reflected(-k, size)];
            padded[BLUR_RADIUS + size - 1 + k] = row[reflected(size - 1 + k, size)];
        }
        for (int x = 0; x < size; x++) {
            float value = 0;
            for (int k = 0; k <= 2 * BLUR_RADIUS; k++) value += weights[k] * padded[x + k];
            out[x] = value;
        }
    }
    for (int y = 0; y < size; y++) {
        const float *rows[2 * BLUR_RADIUS + 1];
        for (int k = 0; k <= 2 * BLUR_RADIUS; k++)
            rows[k] = across + (size_t)reflected(y + k - BLUR_RADIUS, size) * size;
        float *out = plane + (size_t)y * size;
        for (int x = 0; x < size; x++) {
            float value = 0.5f;
            for (int k = 0; k <= 2 * BLUR_RADIUS; k++) value += weights[k] * rows[k][x];
            out[x] = (float)(int)value;
        }
    }
}

/* Room for one crop of an image, allocated once for all of them. */
typedef struct {
    int *first_x, *count_x, *first_y, *count_y;
    float *weights_x, *weights_y, *rows, *columns, *planes, *padded, *across;
} Room;

/* The box resampled to size x size, as three planes of whole numbers. Rows are weighed first, LANES output rows at a
   time; turned on their side, the same LANES then run along the vector in the weighing of columns. */
INLINE void resample(const uint8_t *image, int image_width, const Parameters *p, int size, int taps_x, int taps_y,
                     Room *room) {
    int left = (int)p->left, top = (int)p->top, width = (int)p->width, flip = p->flip > 0;
    size_t area = (size_t)size * size;
    for (int y0 = 0; y0 < size; y0 += LANES) {
        int lanes = size - y0 < LANES ? size - y0 : LANES;
        for (int lane = 0; lane < lanes; lane++) {
            float *row = room->rows + (size_t)lane * width * 3;
            const float *weights = room->weights_y + (size_t)(y0 + lane) * taps_y;
            int first = room->first_y[y0 + lane], count = room->count_y[y0 + lane], n = width * 3;
            const uint8_t *source = image + ((size_t)(top + first) * image_width + left) * 3;
            size_t stride = (size_t)image_width * 3;
            for (int i = 0; i < n; i++) row[i] = weights[0] * source[i];
            int k = 1;
            for (; k + 1 < count; k += 2) {
                const uint8_t *one = source + k * stride, *two = one + stride;
                float a = weights[k], b = weights[k + 1];
                for (int i = 0; i < n; i++) row[i] += a * one[i] + b * two[i];
            }
            for (; k < count; k++) {
                const uint8_t *one = source + k * stride;
                for (int i = 0; i < n; i++) row[i] += weights[k] * one[i];
            }
        }
        for (int i = 0; i < width * 3; i++)
            for (int lane = 0; lane < LANES; lane++)
                room->columns[(size_t)i * LANES + lane] = room->rows[(size_t)lane * width * 3 + i];
        for (int x = 0; x < size; x++) {
            const float *weights = room->weights_x + (size_t)x * taps_x;
            const float *source = room->columns + (size_t)room->first_x[x] * 3 * LANES;
            float red[LANES] = {0}, green[LANES] = {0}, blue[LANES] = {0};
            for (int k = 0; k < room->count_x[x]; k++, source += 3 * LANES)
                for (int lane = 0; lane < LANES; lane++) {
                    red[lane] += weights[k] * source[lane];
                    green[lane] += weights[k] * source[LANES + lane];
                    blue[lane] += weights[k] * source[2 * LANES + lane];
                }
            float *out = room->planes + (size_t)y0 * size + (flip ? size - 1 - x : x);
            for (int lane = 0; lane < lanes; lane++, out += size) {
                out[0] = quantised(red[lane] + 0.5f);
                out[area] = quantised(green[lane] + 0.5f);
                out[2 * area] = quantised(blue[lane] + 0.5f);
            }
        }
    }
}

VERSIONS
static void one_crop(const uint8_t *image, int image_width, const Parameters *p, int size, int taps_x, int taps_y,
                     Room *room, uint8_t *out) {
    resample(image, image_width, p, size, taps_x, taps_y, room);
    int n = size * size;
    float *r = room->planes, *g = r + n, *b = g + n;
    for (int step = 0; step < 4 && p->jitter > 0; step++) {
        int operation = (int)p->order[step];
        if (operation == 0) {
            blend(r, 3 * n, p->brightness, 0);
        } else if (operation == 1) {
            long total = 0;
            for (int y = 0; y < n; y += size) {
                int sum = 0;
                for (int i = y; i < y + size; i++) sum += (int)luma(r[i], g[i], b[i]);
                total += sum;
            }
            blend(r, 3 * n, p->contrast, (float)(int)((double)total / n + 0.5));
        } else if (operation == 2) {
            saturate(r, g, b, n, p->saturation);
        } else {
            shift_hue(r, g, b, n, p->hue);
        }
    }
    if (p->grey > 0)
        for (int i = 0; i < n; i++) r[i] = g[i] = b[i] = luma(r[i], g[i], b[i]);
    if (p->sigma > 0)
        for (int c = 0; c < 3; c++) blur(r + (size_t)c * n, size, p->sigma, room->padded, room->across);
    float threshold = p->solarise > 0 ? p->solarise : 256;
    for (int i = 0; i < 3 * n; i++) out[i] = (uint8_t)(r[i] >= threshold ? 255 - r[i] : r[i]);
}

static int all_crops(const uint8_t *image, int image_width, const Parameters *parameters, int num, int size,
                     uint8_t *out) {
    int widest = 1, tallest = 1;
    for (int i = 0; i < num; i++) {
        if (parameters[i].width > widest) widest = (int)parameters[i].width;
        if (parameters[i].height > tallest) tallest = (int)parameters[i].height;
    }
    int most = widest > tallest ? widest : tallest;
    int taps = 2 * (int)ceil(2 * ((double)most / size < 1 ? 1 : (double)most / size)) + 1;
    size_t area = (size_t)size * size;
    size_t floats = 2 * (size_t)taps * size + 2 * (size_t)widest * 3 * LANES + 4 * area + size + 2 * BLUR_RADIUS;
    float *memory = calloc(floats, sizeof(float));
    int *numbers = malloc(4 * (size_t)size * sizeof(int));
    if (!memory || !numbers) {
        free(memory);
        free(numbers);
        return -1;
    }
    Room room = {numbers, numbers + size, numbers + 2 * size, numbers + 3 * size};
    room.weights_x = memory;
    room.weights_y = room.weights_x + (size_t)taps * size;
    room.rows = room.weights_y + (size_t)taps * size;
    room.columns = room.rows + (size_t)widest * 3 * LANES;
    room.planes = room.columns + (size_t)widest * 3 * LANES;
    room.across = room.planes + 3 * area;
    room.padded = room.across + area;
    for (int i = 0; i < num; i++) {
        coefficients((int)parameters[i].width, size, taps, room.first_x, room.count_x, room.weights_x);
        coefficients((int)parameters[i].height, size, taps, room.first_y, room.count_y, room.weights_y);
        one_crop(image, image_width, parameters + i, size, taps, taps, &room, out + 3 * area * i);
    }
    free(memory);
    free(numbers);
    return 0;
}

static PyObject *crops(PyObject *self, PyObject *arguments) {
    Py_buffer image, parameters, out;
    int height, width, size;
    if (!PyArg_ParseTuple(arguments, "y*iiy*w*i", &image, &height, &width, &parameters, &out, &size)) return NULL;
    Py_ssize_t num = parameters.len / (Py_ssize_t)sizeof(Parameters);
    const Parameters *p = parameters.buf;
    int good = size > 0 && image.len == (Py_ssize_t)height * width * 3 &&
               parameters.len == num * (Py_ssize_t)sizeof(Parameters) && out.len == num * 3 * (Py_ssize_t)size * size;
    for (Py_ssize_t i = 0; good && i < num; i++)
        good = p[i].top >= 0 && p[i].left >= 0 && p[i].height >= 1 && p[i].width >= 1 &&
               p[i].top + p[i].height <= height && p[i].left + p[i].width <= width;
    int failed = 0;
    if (good) {
        Py_BEGIN_ALLOW_THREADS
        failed = all_crops(image.buf, width, p, (int)num, size, out.buf);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&image);
    PyBuffer_Release(&parameters);
    PyBuffer_Release(&out);
    if (!good) {
        PyErr_SetString(PyExc_ValueError, "buffers do not match the sizes, or a box lies outside the image");
        return NULL;
    }
    if (failed) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"crops", crops, METH_VARARGS, "crops(image, height, width, parameters, out, size): write size x size crops."},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_pixels", NULL, -1, methods};

PyMODINIT_FUNC PyInit__pixels(void) {
    PyObject *made = PyModule_Create(&module);
    if (made && PyModule_AddIntConstant(made, "NUM_PARAMETERS", NUM_PARAMETERS) < 0) {
        Py_DECREF(made);
        return NULL;
    }
    return made;
}
