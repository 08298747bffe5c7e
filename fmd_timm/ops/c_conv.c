// The attention of one image, and convolutions of images with their mixtures of K kernels. `c_conv.py` compiles this
// and says what it is for. Vectors are GCC's and Clang's own, as wide as those of the processor.

#include <math.h>

// WIDTH: floats of a vector. COLUMNS: pixels of the widest tile, whose sums fill the registers. FIRST, LAST: the first
// and the last halves of two vectors, with the elements of both in turn.
#if defined(__AVX512F__)
enum { WIDTH = 16, COLUMNS = 14 };
#define FIRST 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define LAST 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX__)
enum { WIDTH = 8, COLUMNS = 6 };
#define FIRST 0, 8, 1, 9, 2, 10, 3, 11
#define LAST 4, 12, 5, 13, 6, 14, 7, 15
#else
enum { WIDTH = 4, COLUMNS = 6 };
#define FIRST 0, 4, 1, 5
#define LAST 2, 6, 3, 7
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
    const float *bank;    // (O / O_BLOCK, R, K, O_BLOCK), R = taps * I; or null
    const float *shift;   // (O) or null
    long in_channels, out_channels, kernels, taps[2], stride[2], padding[2], dilation[2];
} Layer;

typedef struct {
    const Layer *layer;
    const float *weight;  // the kernels where there is no bank: (K, O, R)
    const float *shift;   // (O), or of every image, or null
    long shifts;          // from one image's shift to the next: 0 or O
    const float *x;       // (B, H, W, I)
    long images, height, width, threads;
    float *share, *gates; // results of the attention
    float *pooled, *squeezed;
    const float *in_attn, *out_attn, *tap_attn;  // of every image; null is 1 everywhere
    long out_height, out_width;
    long rows, columns;   // that are read of each channel, of every stride-th column
    float *padded;        // (B, rows, I, stride, columns)
    float *y;             // (B, out_height, out_width, O)
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

// A row of an image with its padding, the channels outside and every stride-th column together, so that the pixels
// that meet one weight lie side by side.
static void pad(const Pass *p, long row) {
    const Layer *layer = p->layer;
    long I = layer->in_channels, stride = layer->stride[1], from_row = row % p->rows - layer->padding[0];
    const float *x = p->x + (row / p->rows * p->height + from_row) * p->width * I;
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
                        values = *(const vec *)(x + column * I + channel);
                    *(vec *)square[m] = values;
                }
                for (int l = 0; l < WIDTH; l++)
                    for (long m = 0; m < n; m++)
                        to[((channel + l) * stride + phase) * p->columns + first + m] = square[m][l];
            }
        }
}

// The K kernels of one panel: those of n rows, from row `start` on, of O_BLOCK output channels from o on.
typedef struct {
    const float *first;
    const char *next;     // where those of the next panel are
    long kernel, channel; // distances: of a kernel from the next, of an output channel from the next; 0 in a bank
    long n;
} Source;

static Source source(const Pass *p, long o, long start, long n) {
    const Layer *layer = p->layer;
    long R = layer->taps[0] * layer->taps[1] * layer->in_channels, K = layer->kernels;
    Source s = {.n = n};
    if (layer->bank) {
        s.first = layer->bank + (o * R + start * O_BLOCK) * K;
        s.next = (const char *)(s.first + n * K * O_BLOCK);
    } else {
        s.first = p->weight + o * R + start;
        s.next = (const char *)(s.first + n + (start + n == R ? (O_BLOCK - 1) * R : 0));
        s.kernel = layer->out_channels * R, s.channel = R;
    }
    return s;
}

// Panels are read into the L2 cache ahead of their time, in two runs for each kernel: n lines, that lie in rows.
typedef struct {
    const char *line;     // null: nothing is to be read
    long row, skip;       // bytes of a row, and of what lies between two
} Run;

static Run run(const Source *s, long number) {
    if (!s->channel) return (Run){s->next + number * s->n * LINE, s->n * LINE, 0};
    long first = number / 2 * s->kernel + number % 2 * (O_BLOCK / 2) * s->channel, size = sizeof(float);
    return (Run){s->next + first * size, s->n * size, (s->channel - s->n) * size};
}

// n rows of O_BLOCK channels, mixed from (n, K, O_BLOCK), times the gates of the rows and of their tap. Runs from
// `unread` on are read meanwhile.
static void mix_bank(
        const Source *s, const float *share, const float *in_attn, float gate, long kernels, long unread,
        float *panel) {
    const char *next = s->next + unread * s->n * LINE;
    for (long r = 0; r < s->n; r++) {
        for (long number = unread; number < 2 * kernels; number++, next += LINE) __builtin_prefetch(next, 0, 2);
        for (long o = 0; o < O_BLOCK; o += WIDTH) {
            const float *bank = s->first + r * kernels * O_BLOCK + o;
            vec sum = share[0] * *(const vec *)bank;
            for (long k = 1; k < kernels; k++) sum += share[k] * *(const vec *)(bank + k * O_BLOCK);
            *(vec *)(panel + r * O_BLOCK + o) = sum * (in_attn ? in_attn[r] * gate : gate);
        }
    }
}

#ifdef __clang__
#define SHUFFLE(A, B, ...) __builtin_shufflevector(A, B, __VA_ARGS__)
#else
typedef int indices __attribute__((vector_size(WIDTH * 4)));
#define SHUFFLE(A, B, ...) __builtin_shuffle(A, B, (indices){__VA_ARGS__})
#endif

static inline void transpose(vec *square) {
    for (int done = 1; done < WIDTH; done *= 2) {
        vec before[WIDTH];
        for (int l = 0; l < WIDTH; l++) before[l] = square[l];
        for (int l = 0; l < WIDTH / 2; l++) {
            square[2 * l] = SHUFFLE(before[l], before[l + WIDTH / 2], FIRST);
            square[2 * l + 1] = SHUFFLE(before[l], before[l + WIDTH / 2], LAST);
        }
    }
}

// The same from kernels (K, O, R), in squares that are mixed and transposed.
static void mix_rows(
        const Source *s, const float *share, const float *in_attn, float gate, long kernels, long unread,
        float *panel) {
    long ahead = s->next - (const char *)s->first;
    for (long o = 0; o < O_BLOCK; o += WIDTH)
        for (long r = 0; r < s->n; r += WIDTH) {
            vec square[WIDTH], gates = in_attn ? *(const vec *)(in_attn + r) * gate : gate - (vec){0};
            for (int l = 0; l < WIDTH; l++) {
                const float *weight = s->first + (o + l) * s->channel + r;
                vec sum = {0};
                for (long k = 0; k < kernels; k++, weight += s->kernel) {
                    sum += share[k] * *(const vec *)weight;
                    if (2 * k + (o + l) / (O_BLOCK / 2) >= unread)
                        __builtin_prefetch((const char *)weight + ahead, 0, 2);
                }
                square[l] = sum * gates;
            }
            transpose(square);
            for (int l = 0; l < WIDTH; l++) *(vec *)(panel + (r + l) * O_BLOCK + o) = square[l];
        }
}

// y (COUNT, 2 * WIDTH) += x (n, COUNT)^T panel (n, 2 * WIDTH), set where `is_first`; scaled and shifted if asked for.
// The rows of x are `step` apart. A line of the run that is ahead is read in each step.
#define TILE(COUNT) \
static void tile_##COUNT( \
        const float *x, long step, const float *panel, long n, float *y, long out_channels, int is_first, \
        const float *scale, const float *shift, const Run *ahead) { \
    const char *line = ahead->line, *end = line + ahead->row; \
    long row = ahead->row, skip = ahead->skip; \
    vec sums[COUNT][2]; \
    for (int m = 0; m < COUNT; m++) \
        for (int v = 0; v < 2; v++) { \
            if (is_first) sums[m][v] = (vec){0}; \
            else sums[m][v] = *(const vec *)(y + m * out_channels + v * WIDTH); \
        } \
    for (long r = 0; r < n; r++, x += step, panel += O_BLOCK) { \
        vec left = *(const vec *)panel, right = *(const vec *)(panel + WIDTH); \
        if (line) { \
            __builtin_prefetch(line, 0, 2); \
            if ((line += LINE) == end) end += row + skip, line += skip; \
        } \
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
    const float *, long, const float *, long, float *, long, int, const float *, const float *, const Run *);
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

// The output channels o to o + O_BLOCK of the rows, counted through all images: for each tap, the pixels times its
// kernel (I, O) for their image, in panels of R_PANEL rows, which are mixed into the L1 cache.
static void multiply(const Pass *p, long o, long first_row, long last_row) {
    const Layer *layer = p->layer;
    long I = layer->in_channels, O = layer->out_channels, K = layer->kernels, width = p->out_width;
    long taps = layer->taps[0] * layer->taps[1], R = taps * I;
    long step = layer->stride[1] * p->columns, parts = (width + COLUMNS - 1) / COLUMNS;
    float panel[R_PANEL * O_BLOCK] __attribute__((aligned(LINE)));
    for (long start = 0, n; start < R; start += n) {
        long channel = start % I, tap = start / I;
        n = I - channel < R_PANEL ? I - channel : R_PANEL;
        long i = tap / layer->taps[1] * layer->dilation[0], j = tap % layer->taps[1] * layer->dilation[1];
        // Reading is slow and must go on all the time: a run of the next panel during each tile, as far as there are
        // tiles, the rest while this panel is mixed.
        Source s = source(p, o, start, n);
        long calls = (last_row - first_row) * parts * (O_BLOCK / (2 * WIDTH)), call = 0;
        int is_first = !start, is_last = start + n == R;
        for (long image = first_row / p->out_height; image * p->out_height < last_row; image++) {
            long begin = image * p->out_height, end = begin + p->out_height;
            (layer->bank ? mix_bank : mix_rows)(
                &s, p->share + image * K, p->in_attn ? p->in_attn + image * I + channel : 0,
                p->tap_attn ? p->tap_attn[image * taps + tap] : 1, K, call ? 2 * K : calls, panel);
            const float *scale = is_last && p->out_attn ? p->out_attn + image * O : 0;
            const float *shift = is_last && p->shift ? p->shift + image * p->shifts : 0;
            const float *x = p->padded + ((image * p->rows + i) * I + channel) * step
                + j % layer->stride[1] * p->columns + j / layer->stride[1];
            for (long to = o; to < o + O_BLOCK; to += 2 * WIDTH)
                for (long row = first_row > begin ? first_row : begin; row < last_row && row < end; row++)
                    for (long part = 0; part < parts; part++, call++) {
                        long column = part * width / parts, count = (part + 1) * width / parts - column;
                        Run ahead = call < 2 * K ? run(&s, call) : (Run){0};
                        tiles[count](
                            x + (row - begin) * layer->stride[0] * I * step + column, step, panel + to - o, n,
                            p->y + (row * width + column) * O + to, O, is_first,
                            scale ? scale + to : 0, shift ? shift + to : 0, &ahead);
                    }
        }
    }
}

static void convolve(const Pass *p) {
    // Work is shared out in blocks of channels, and in chunks of rows that stay in the L2 cache and give each thread a
    // part of the image, unless reading the kernels once more for each chunk would take longer.
    const Layer *layer = p->layer;
    long blocks = layer->out_channels / O_BLOCK, chunks = (p->threads + blocks - 1) / blocks;
    long height = p->images * p->out_height;
    long padded = p->images * p->rows * layer->in_channels * layer->stride[1] * p->columns;
    if (layer->taps[0] * layer->taps[1] * layer->in_channels * layer->out_channels * layer->kernels < 8 * padded) {
        long for_cache = padded * (long)sizeof(float) / CHUNK + 1;
        chunks = for_cache > p->threads ? for_cache : p->threads;
    }
    if (chunks > height) chunks = height;
    #pragma omp parallel num_threads(p->threads)
    {
        #pragma omp for schedule(static)
        for (long row = 0; row < p->images * p->rows; row++) pad(p, row);
        #pragma omp for schedule(static)
        for (long piece = 0; piece < blocks * chunks; piece++) {
            long chunk = piece / blocks;
            multiply(p, piece % blocks * O_BLOCK, height * chunk / chunks, height * (chunk + 1) / chunks);
        }
    }
}

static Pass pass(const Layer *layer, const float *x, long height, long width, float *memory, long threads) {
    Pass p = {.layer = layer, .x = x, .images = 1, .height = height, .width = width, .threads = threads};
    p.share = memory;
    p.gates = p.share + layer->kernels;
    p.pooled = p.gates + layer->gates.outputs;
    p.squeezed = p.pooled + layer->in_channels;
    p.padded = p.squeezed + layer->squeeze.outputs;
    return p;
}

static void into(Pass *p, float *y, long out_height, long out_width) {
    const Layer *layer = p->layer;
    p->y = y, p->out_height = out_height, p->out_width = out_width;
    p->rows = (out_height - 1) * layer->stride[0] + (layer->taps[0] - 1) * layer->dilation[0] + 1;
    p->columns = out_width + (layer->taps[1] - 1) * layer->dilation[1] / layer->stride[1];
    convolve(p);
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
    p.shift = layer->shift;
    attend(&p);
    into(&p, y, out_height, out_width);
}

// Into y, of a number of images with attention that is given. Those of a group share each panel that is read; `memory`
// has room for them, padded.
void fmd_timm_convolve(
        const Layer *layer, const float *x, long height, long width, float *memory, long threads,
        float *y, long out_height, long out_width, long images, long group, const float *weight,
        float *share, const float *in_attn, const float *out_attn, const float *tap_attn,
        const float *shift, long shifts) {
    long I = layer->in_channels, O = layer->out_channels;
    for (long image = 0; image < images; image += group) {
        Pass p = {
            .layer = layer, .weight = weight, .shift = shift ? shift + image * shifts : 0, .shifts = shifts,
            .x = x + image * height * width * I, .images = images - image < group ? images - image : group,
            .height = height, .width = width, .threads = threads, .padded = memory,
            .share = share + image * layer->kernels, .in_attn = in_attn ? in_attn + image * I : 0,
            .out_attn = out_attn ? out_attn + image * O : 0,
            .tap_attn = tap_attn ? tap_attn + image * layer->taps[0] * layer->taps[1] : 0};
        into(&p, y + image * out_height * out_width * O, out_height, out_width);
    }
}
