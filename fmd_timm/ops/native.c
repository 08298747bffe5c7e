// The attention of one image, and its convolution with the mixture of K kernels, for inference. `native.py` compiles
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
    Linear squeeze;       // no outputs: the method has none, its maps are of the pooled image
    Linear gates;         // of the first of the squeezed features: in_attn, out_attn and tap_attn, as far as there are
    Linear kernel;        // of the last of them
    long has_softmax, has_in_attn, has_out_attn, has_tap_attn;
    const float *bank;    // (O / O_BLOCK, R, K, O_BLOCK), R = taps * I
    const float *shift;   // (O) or null
    long in_channels, out_channels, kernels, taps[2], stride[2], padding[2], dilation[2];
} Layer;

typedef struct {
    const Layer *layer;
    const float *x;       // (H, W, I)
    long height, width, threads;
    float *share, *gates; // results of the attention
    float *pooled, *squeezed;
    const float *in_attn, *out_attn, *tap_attn;  // null is 1 everywhere
    long out_height, out_width;
    long rows, columns;   // that are read of each channel, of every stride-th column
    float *padded;        // (rows, I, stride, columns)
    float *y;             // (out_height, out_width, O)
} Pass;

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
static void pool(const Pass *p, long channel) {
    long I = p->layer->in_channels, n = I - channel < O_BLOCK ? I - channel : O_BLOCK;
    float sum[O_BLOCK] = {0};
    for (long row = 0; row < p->height; row++) {
        float of_row[O_BLOCK] = {0};
        for (long column = 0; column < p->width; column++) {
            const float *x = p->x + (row * p->width + column) * I + channel;
            if (n == O_BLOCK) for (int l = 0; l < O_BLOCK; l++) of_row[l] += x[l];
            else for (int l = 0; l < n; l++) of_row[l] += x[l];
        }
        for (int l = 0; l < n; l++) sum[l] += of_row[l];
    }
    for (int l = 0; l < n; l++) p->pooled[channel + l] = sum[l] / (p->height * p->width);
}

static void attend(const Pass *p) {
    const Layer *layer = p->layer;
    const float *features = layer->squeeze.outputs ? p->squeezed : p->pooled;
    long count = layer->squeeze.outputs ? layer->squeeze.outputs : layer->in_channels, K = layer->kernels;
    #pragma omp parallel num_threads(p->threads)
    {
        #pragma omp for schedule(static)
        for (long channel = 0; channel < layer->in_channels; channel += O_BLOCK) pool(p, channel);
        #pragma omp for schedule(static)
        for (long o = 0; o < layer->squeeze.outputs; o++) {
            float feature = apply(&layer->squeeze, p->pooled, o);
            p->squeezed[o] = feature < 0 ? 0 : feature;  // NaN stays
        }
        #pragma omp for schedule(static) nowait
        for (long o = 0; o < layer->gates.outputs; o++)
            p->gates[o] = 1 / (1 + expf(-apply(&layer->gates, features, o)));
        #pragma omp single
        {
            float highest = -INFINITY, sum = 0;
            for (long k = 0; k < K; k++) {
                p->share[k] = apply(&layer->kernel, features + count - layer->kernel.inputs, k);
                highest = fmaxf(highest, p->share[k]);
            }
            for (long k = 0; k < K; k++)
                sum += p->share[k] = layer->has_softmax ? expf(p->share[k] - highest) : 1 / (1 + expf(-p->share[k]));
            for (long k = 0; k < K && layer->has_softmax; k++) p->share[k] /= sum;
        }
    }
}

// A row of the image with its padding, the channels outside and every stride-th column together, so that the pixels
// that meet one weight lie side by side.
static void pad(const Pass *p, long row) {
    const Layer *layer = p->layer;
    long I = layer->in_channels, stride = layer->stride[1], from_row = row - layer->padding[0];
    float *to = p->padded + row * I * stride * p->columns;
    for (long phase = 0; phase < stride; phase++)
        for (long first = 0; first < p->columns; first += WIDTH) {
            long n = p->columns - first < WIDTH ? p->columns - first : WIDTH;
            for (long channel = 0; channel < I; channel += WIDTH) {
                float square[WIDTH][WIDTH] __attribute__((aligned(LINE)));
                for (long m = 0; m < n; m++) {
                    long column = (first + m) * stride + phase - layer->padding[1];
                    vec values = {0};
                    if (from_row >= 0 && from_row < p->height && column >= 0 && column < p->width)
                        values = *(const vec *)(p->x + (from_row * p->width + column) * I + channel);
                    *(vec *)square[m] = values;
                }
                for (int l = 0; l < WIDTH; l++)
                    for (long m = 0; m < n; m++)
                        to[((channel + l) * stride + phase) * p->columns + first + m] = square[m][l];
            }
        }
}

// Reads memory from `next` on into the L2 cache, `lines` in each step of a loop.
static inline void fetch(const char *next, long step, long lines) {
    for (long l = 0; l < lines; l++) __builtin_prefetch(next + (step * lines + l) * LINE, 0, 2);
}

// n rows of O_BLOCK channels, mixed from (n, K, O_BLOCK), times the gates of the rows and of their tap.
static void mix(
        const float *bank, const float *share, const float *in_attn, float gate, long kernels, long n, float *panel,
        const char *next, long lines) {
    for (long r = 0; r < n; r++) {
        fetch(next, r, lines);
        for (long o = 0; o < O_BLOCK; o += WIDTH) {
            vec sum = share[0] * *(const vec *)(bank + r * kernels * O_BLOCK + o);
            for (long k = 1; k < kernels; k++) sum += share[k] * *(const vec *)(bank + (r * kernels + k) * O_BLOCK + o);
            *(vec *)(panel + r * O_BLOCK + o) = sum * (in_attn ? in_attn[r] * gate : gate);
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

// The output channels o to o + O_BLOCK of the rows: for each tap, the pixels times the tap's mixed kernel (I, O), in
// panels of R_PANEL rows. A panel is mixed into the L1 cache and multiplied with all pixels; meanwhile the K panels that
// come next are fetched.
static void multiply(const Pass *p, long o, long first_row, long last_row) {
    const Layer *layer = p->layer;
    long I = layer->in_channels, O = layer->out_channels, K = layer->kernels, width = p->out_width;
    long R = layer->taps[0] * layer->taps[1] * I;
    long step = layer->stride[1] * p->columns, parts = (width + COLUMNS - 1) / COLUMNS;
    float panel[R_PANEL * O_BLOCK] __attribute__((aligned(LINE)));
    for (long start = 0, n; start < R; start += n) {
        long channel = start % I, tap = start / I;
        n = I - channel < R_PANEL ? I - channel : R_PANEL;
        long i = tap / layer->taps[1] * layer->dilation[0], j = tap % layer->taps[1] * layer->dilation[1];
        const float *x = p->padded + (i * I + channel) * step
            + j % layer->stride[1] * p->columns + j / layer->stride[1];
        const float *bank = layer->bank + (o * R + start * O_BLOCK) * K;
        // The next K panels follow in memory. Reading is slow and must go on all the time: one line in each step of a
        // tile, as far as there are steps, the rest while this panel is mixed.
        long ahead = n * K * O_BLOCK * (long)sizeof(float) / LINE, fetched = 0;
        long steps = (last_row - first_row) * parts * (O_BLOCK / (2 * WIDTH)) * n;
        long at_once = ahead > steps ? ahead / steps : 1, rest = ahead > steps ? (ahead % steps + n - 1) / n : 0;
        const char *next = (const char *)(bank + n * K * O_BLOCK);
        mix(
            bank, p->share, p->in_attn ? p->in_attn + channel : 0, p->tap_attn ? p->tap_attn[tap] : 1, K, n, panel,
            next, rest);
        next += n * rest * LINE;
        ahead -= n * rest;
        int is_first = !start, is_last = start + n == R;
        for (long to = o; to < o + O_BLOCK; to += 2 * WIDTH)
            for (long row = first_row; row < last_row; row++)
                for (long part = 0; part < parts; part++) {
                    long column = part * width / parts, count = (part + 1) * width / parts - column;
                    long lines = fetched < ahead ? at_once : 0;
                    tiles[count](
                        x + row * layer->stride[0] * I * step + column, step, panel + to - o, n,
                        p->y + (row * width + column) * O + to, O, is_first,
                        is_last && p->out_attn ? p->out_attn + to : 0, is_last && layer->shift ? layer->shift + to : 0,
                        next + fetched * LINE, lines);
                    fetched += lines * n;
                }
    }
}

static void convolve(const Pass *p) {
    // Work is shared out in blocks of channels, and in chunks of rows that stay in the L2 cache and give each thread a
    // part of the image, unless reading the kernels once more for each chunk would take longer.
    const Layer *layer = p->layer;
    long height = p->out_height, blocks = layer->out_channels / O_BLOCK, chunks = (p->threads + blocks - 1) / blocks;
    long image = p->rows * layer->in_channels * layer->stride[1] * p->columns;
    if (layer->taps[0] * layer->taps[1] * layer->in_channels * layer->out_channels * layer->kernels < 8 * image) {
        long for_cache = image * (long)sizeof(float) / CHUNK + 1;
        chunks = for_cache > p->threads ? for_cache : p->threads;
    }
    if (chunks > height) chunks = height;
    #pragma omp parallel num_threads(p->threads)
    {
        #pragma omp for schedule(static)
        for (long row = 0; row < p->rows; row++) pad(p, row);
        #pragma omp for schedule(static)
        for (long piece = 0; piece < blocks * chunks; piece++) {
            long chunk = piece / blocks;
            multiply(p, piece % blocks * O_BLOCK, height * chunk / chunks, height * (chunk + 1) / chunks);
        }
    }
}

static Pass pass(const Layer *layer, const float *x, long height, long width, float *memory, long threads) {
    Pass p = {.layer = layer, .x = x, .height = height, .width = width, .threads = threads};
    p.share = memory;
    p.gates = p.share + layer->kernels;
    p.pooled = p.gates + layer->gates.outputs;
    p.squeezed = p.pooled + layer->in_channels;
    p.padded = p.squeezed + layer->squeeze.outputs;
    return p;
}

// Into `memory`: the shares of the kernels, then the gates. It has room for the pooled and the squeezed features too.
void fmd_timm_attend(const Layer *layer, const float *x, long height, long width, float *memory, long threads) {
    Pass p = pass(layer, x, height, width, memory, threads);
    attend(&p);
}

// Into y. `memory` has room for the above and the padded image.
void fmd_timm_forward(
        const Layer *layer, const float *x, long height, long width, float *memory, long threads,
        float *y, long out_height, long out_width) {
    Pass p = pass(layer, x, height, width, memory, threads);
    const float *gates = p.gates;
    if (layer->has_in_attn) p.in_attn = gates, gates += layer->in_channels;
    if (layer->has_out_attn) p.out_attn = gates, gates += layer->out_channels;
    if (layer->has_tap_attn) p.tap_attn = gates;
    p.y = y, p.out_height = out_height, p.out_width = out_width;
    p.rows = (out_height - 1) * layer->stride[0] + (layer->taps[0] - 1) * layer->dilation[0] + 1;
    p.columns = out_width + (layer->taps[1] - 1) * layer->dilation[1] / layer->stride[1];
    attend(&p);
    convolve(&p);
}
