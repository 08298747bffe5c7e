// The attention of one image, and one image convolved with the mixture of K kernels, for inference. `native.py` compiles
// this and says what it is for. Vectors are GCC's and Clang's own, as wide as those of the processor.

#include <math.h>

#if defined(__AVX512F__)
enum { WIDTH = 16, COLUMNS = 14 };  // floats of a vector; pixels of the widest tile, whose sums fill the registers
#elif defined(__AVX__)
enum { WIDTH = 8, COLUMNS = 6 };
#else
enum { WIDTH = 4, COLUMNS = 6 };
#endif
enum { O_BLOCK = 32, R_PANEL = 128, LINE = 64, CHUNK = 512 * 1024 };
typedef float vec __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));

typedef struct {
    const float *weight;  // (outputs, inputs)
    const float *bias;    // (outputs)
    long outputs, inputs;
} Linear;

typedef struct {
    const float *x;  // (H, W, I)
    Linear squeeze;  // no outputs: the method has none, its maps are of the pooled image
    Linear gates;    // of the first of the squeezed features
    Linear kernel;   // of the last of them
    float *pooled;   // (I)
    float *squeezed; // (squeeze.outputs)
    float *gate;     // (gates.outputs), the result
    float *share;    // (kernel.outputs), the result
    long height, width, in_channels, competes, threads;
} Attention;

static float apply(const Linear *map, const float *x, long output) {
    const float *weight = map->weight + output * map->inputs;
    vec sums[4] = {0};  // as many as hide the latency of an addition
    long i = 0;
    for (; i + 4 * WIDTH <= map->inputs; i += 4 * WIDTH)
        for (int v = 0; v < 4; v++)
            sums[v] += *(const vec *)(weight + i + v * WIDTH) * *(const vec *)(x + i + v * WIDTH);
    vec sum = sums[0] + sums[1] + (sums[2] + sums[3]);
    float result = map->bias[output];
    for (int l = 0; l < WIDTH; l++) result += sum[l];
    for (; i < map->inputs; i++) result += weight[i] * x[i];
    return result;
}

// Means over the image of O_BLOCK channels from `channel` on: sums of rows, then of these, which rounds less.
static void pool(const Attention *a, long channel) {
    long n = a->in_channels - channel < O_BLOCK ? a->in_channels - channel : O_BLOCK;
    float sum[O_BLOCK] = {0};
    for (long row = 0; row < a->height; row++) {
        float of_row[O_BLOCK] = {0};
        for (long column = 0; column < a->width; column++) {
            const float *x = a->x + (row * a->width + column) * a->in_channels + channel;
            if (n == O_BLOCK) for (int l = 0; l < O_BLOCK; l++) of_row[l] += x[l];
            else for (int l = 0; l < n; l++) of_row[l] += x[l];
        }
        for (int l = 0; l < n; l++) sum[l] += of_row[l];
    }
    for (int l = 0; l < n; l++) a->pooled[channel + l] = sum[l] / (a->height * a->width);
}

void fmd_timm_attend(const Attention *a) {
    const float *features = a->squeeze.outputs ? a->squeezed : a->pooled;
    long count = a->squeeze.outputs ? a->squeeze.outputs : a->in_channels;
    #pragma omp parallel num_threads(a->threads)
    {
        #pragma omp for schedule(static)
        for (long channel = 0; channel < a->in_channels; channel += O_BLOCK) pool(a, channel);
        #pragma omp for schedule(static)
        for (long o = 0; o < a->squeeze.outputs; o++) a->squeezed[o] = fmaxf(apply(&a->squeeze, a->pooled, o), 0);
        #pragma omp for schedule(static) nowait
        for (long o = 0; o < a->gates.outputs; o++) a->gate[o] = 1 / (1 + expf(-apply(&a->gates, features, o)));
        #pragma omp single
        {
            const float *last = features + count - a->kernel.inputs;
            float highest = -INFINITY, sum = 0;
            for (long k = 0; k < a->kernel.outputs; k++) {
                a->share[k] = apply(&a->kernel, last, k);
                highest = fmaxf(highest, a->share[k]);
            }
            for (long k = 0; k < a->kernel.outputs; k++)
                sum += a->share[k] = a->competes ? expf(a->share[k] - highest) : 1 / (1 + expf(-a->share[k]));
            for (long k = 0; k < a->kernel.outputs && a->competes; k++) a->share[k] /= sum;
        }
    }
}

// The convolution: for each tap, the image's pixels times the tap's mixed kernel (I, O), in panels of R_PANEL rows and
// O_BLOCK output channels. A panel is mixed into the L1 cache and multiplied with all pixels; meanwhile the K panels
// that come next are fetched.
typedef struct {
    const float *x;       // (H, W, I)
    const float *bank;    // (O / O_BLOCK, R, K, O_BLOCK), R = taps * I
    const float *share;   // (K)
    const float *in;      // (I) or null
    const float *out;     // (O) or null
    const float *shift;   // (O) or null
    float *padded;        // room for the rows that are read: (rows, I, stride, columns)
    float *y;             // (P, O)
    long height, width, in_channels, out_channels, kernels, taps[2], stride[2], padding[2], dilation[2], out_size[2];
    long rows, columns, threads;
} Conv;

// A row of the image with its padding, the channels outside and every stride-th column together, so that the pixels
// that meet one weight lie side by side.
static void pad(const Conv *c, long row) {
    long I = c->in_channels, stride = c->stride[1], from_row = row - c->padding[0];
    float *to = c->padded + row * I * stride * c->columns;
    for (long phase = 0; phase < stride; phase++)
        for (long first = 0; first < c->columns; first += WIDTH) {
            long n = c->columns - first < WIDTH ? c->columns - first : WIDTH;
            for (long channel = 0; channel < I; channel += WIDTH) {
                float square[WIDTH][WIDTH] __attribute__((aligned(LINE)));
                for (long m = 0; m < n; m++) {
                    long column = (first + m) * stride + phase - c->padding[1];
                    vec values = {0};
                    if (from_row >= 0 && from_row < c->height && column >= 0 && column < c->width)
                        values = *(const vec *)(c->x + (from_row * c->width + column) * I + channel);
                    *(vec *)square[m] = values;
                }
                for (int l = 0; l < WIDTH; l++)
                    for (long m = 0; m < n; m++)
                        to[((channel + l) * stride + phase) * c->columns + first + m] = square[m][l];
            }
        }
}

// Reads memory from `next` on into the L2 cache, `lines` in each step of a loop.
static inline void fetch(const char *next, long step, long lines) {
    for (long l = 0; l < lines; l++) __builtin_prefetch(next + (step * lines + l) * LINE, 0, 2);
}

// n rows of O_BLOCK channels, mixed from (n, K, O_BLOCK), times the gates of the rows.
static void mix(
        const float *bank, const float *share, const float *in, long kernels, long n, float *panel,
        const char *next, long lines) {
    for (long r = 0; r < n; r++) {
        fetch(next, r, lines);
        for (long o = 0; o < O_BLOCK; o += WIDTH) {
            vec sum = share[0] * *(const vec *)(bank + r * kernels * O_BLOCK + o);
            for (long k = 1; k < kernels; k++) sum += share[k] * *(const vec *)(bank + (r * kernels + k) * O_BLOCK + o);
            if (in) sum *= in[r];
            *(vec *)(panel + r * O_BLOCK + o) = sum;
        }
    }
}

// y (COUNT, 2 * WIDTH) += x (n, COUNT)^T panel (n, 2 * WIDTH), set where `is_first`; scaled and shifted if asked for.
// The rows of x are `step` apart.
#define TILE(COUNT) \
static void tile_##COUNT( \
        const float *x, long step, const float *panel, long n, float *y, long out_channels, int is_first, \
        const float *scale, const float *shift, const char *next, long lines) { \
    vec sums[COUNT][2]; \
    for (int m = 0; m < COUNT; m++) \
        for (int v = 0; v < 2; v++) { \
            if (is_first) sums[m][v] = (vec){0}; \
            else sums[m][v] = *(const vec *)(y + m * out_channels + v * WIDTH); \
        } \
    for (long r = 0; r < n; r++, x += step, panel += O_BLOCK) { \
        vec left = *(const vec *)panel, right = *(const vec *)(panel + WIDTH); \
        fetch(next, r, lines); \
        _Pragma("GCC unroll 14") \
        for (int m = 0; m < COUNT; m++) { \
            sums[m][0] += x[m] * left; \
            sums[m][1] += x[m] * right; \
        } \
    } \
    for (int m = 0; m < COUNT; m++) \
        for (int v = 0; v < 2; v++) { \
            vec sum = sums[m][v]; \
            if (scale) sum *= *(const vec *)(scale + v * WIDTH); \
            if (shift) sum += *(const vec *)(shift + v * WIDTH); \
            *(vec *)(y + m * out_channels + v * WIDTH) = sum; \
        } \
}
typedef void Tile(
    const float *, long, const float *, long, float *, long, int, const float *, const float *, const char *, long);
TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6)
#if defined(__AVX512F__)
TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12) TILE(13) TILE(14)
#endif
static Tile *const tiles[] = {
    0, tile_1, tile_2, tile_3, tile_4, tile_5, tile_6,
#if defined(__AVX512F__)
    tile_7, tile_8, tile_9, tile_10, tile_11, tile_12, tile_13, tile_14,
#endif
};

// The output channels o to o + O_BLOCK of the rows.
static void multiply(const Conv *c, long o, long first_row, long last_row) {
    long I = c->in_channels, rows = c->taps[0] * c->taps[1] * I, width = c->out_size[1];
    long step = c->stride[1] * c->columns, parts = (width + COLUMNS - 1) / COLUMNS;
    float panel[R_PANEL * O_BLOCK] __attribute__((aligned(LINE)));
    for (long start = 0, n; start < rows; start += n) {
        long channel = start % I, tap = start / I;
        n = I - channel < R_PANEL ? I - channel : R_PANEL;
        long i = tap / c->taps[1] * c->dilation[0], j = tap % c->taps[1] * c->dilation[1];
        const float *x = c->padded + (i * I + channel) * step + j % c->stride[1] * c->columns + j / c->stride[1];
        const float *bank = c->bank + (o * rows + start * O_BLOCK) * c->kernels;
        // The next K panels follow in memory. Reading is slow and must go on all the time: one line in each step of a
        // tile, as far as there are steps, the rest while this panel is mixed.
        long ahead = n * c->kernels * O_BLOCK * (long)sizeof(float) / LINE, fetched = 0;
        long steps = (last_row - first_row) * parts * (O_BLOCK / (2 * WIDTH)) * n;
        long at_once = ahead > steps ? ahead / steps : 1, rest = ahead > steps ? (ahead % steps + n - 1) / n : 0;
        const char *next = (const char *)(bank + n * c->kernels * O_BLOCK);
        mix(bank, c->share, c->in ? c->in + channel : 0, c->kernels, n, panel, next, rest);
        next += n * rest * LINE;
        ahead -= n * rest;
        int is_first = !start, is_last = start + n == rows;
        for (long to = o; to < o + O_BLOCK; to += 2 * WIDTH)
            for (long row = first_row; row < last_row; row++)
                for (long part = 0; part < parts; part++) {
                    long column = part * width / parts, count = (part + 1) * width / parts - column;
                    long lines = fetched < ahead ? at_once : 0;
                    tiles[count](
                        x + row * c->stride[0] * I * step + column, step, panel + to - o, n,
                        c->y + (row * width + column) * c->out_channels + to, c->out_channels, is_first,
                        is_last && c->out ? c->out + to : 0, is_last && c->shift ? c->shift + to : 0,
                        next + fetched * LINE, lines);
                    fetched += lines * n;
                }
    }
}

void fmd_timm_convolve(const Conv *c) {
    // Work is shared out in blocks of channels, and in chunks of rows that stay in the L2 cache and give each thread a
    // part of the image, unless reading the kernels once more for each chunk would take longer.
    long blocks = c->out_channels / O_BLOCK, chunks = (c->threads + blocks - 1) / blocks;
    long image = c->rows * c->in_channels * c->stride[1] * c->columns;
    if (c->taps[0] * c->taps[1] * c->in_channels * c->out_channels * c->kernels < 8 * image) {
        long for_cache = image * (long)sizeof(float) / CHUNK + 1;
        chunks = for_cache > c->threads ? for_cache : c->threads;
    }
    if (chunks > c->out_size[0]) chunks = c->out_size[0];
    #pragma omp parallel num_threads(c->threads)
    {
        #pragma omp for schedule(static)
        for (long row = 0; row < c->rows; row++) pad(c, row);
        #pragma omp for schedule(static)
        for (long piece = 0; piece < blocks * chunks; piece++) {
            long chunk = piece / blocks;
            multiply(c, piece % blocks * O_BLOCK, c->out_size[0] * chunk / chunks, c->out_size[0] * (chunk + 1) / chunks);
        }
    }
}
