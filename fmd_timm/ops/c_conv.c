// The attention of images and their convolutions, each with its own mixture of K kernels. `c_conv.py` says what it is
// for, `c_library.py` compiles it. All numbers are float32, images and kernels lie in memory as in channels_last.

#include <math.h>

// WIDTH: floats of a vector, as wide as the processor's. PIXELS, VECTORS: the largest tile, whose sums fill the registers;
// TILES: all tiles. LOW, HIGH: which elements of two vectors a and b make the two halves of a0 b0 a1 b1 ...
#if defined(__AVX512F__)
enum { WIDTH = 16, PIXELS = 14, VECTORS = 2 };
#define TILES(DO) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11) DO(12) DO(13) DO(14)
#define LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX__)
enum { WIDTH = 8, PIXELS = 3, VECTORS = 4 };
#define TILES(DO) DO(1) DO(2) DO(3)
#define LOW 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
enum { WIDTH = 4, PIXELS = 6, VECTORS = 2 };
#define TILES(DO) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6)
#define LOW 0, 4, 1, 5
#define HIGH 2, 6, 3, 7
#endif
// Output channels of a block, rows of a panel (see `multiply`), bytes of a line of the caches.
enum { O_BLOCK = 32, R_PANEL = 128, LINE = 64 };
// Where the gates of a layer are in an array.
enum { IN, OUT, TAP, GATES };
typedef float vec __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));

typedef struct {
    const float *weight, *bias;  // (outputs, inputs) and (outputs)
    long outputs, inputs;
} Linear;

// The attention of a method: what makes factors of the means of an image's channels.
typedef struct {
    Linear squeeze;       // before a ReLU; no outputs where the method has none
    Linear gates[GATES];  // of the first of the squeezed features, before a sigmoid; no outputs where there is no gate
    Linear kernel;        // of the last of the squeezed features, before a softmax or a sigmoid
    long has_softmax;
} Maps;

// Sizes; pairs are (vertical, horizontal).
typedef struct {
    long in_channels, out_channels, num_kernels;
    long taps[2], stride[2], padding[2], dilation[2], in_size[2], out_size[2];
    long rows, columns;   // of a padded image, as far as taps meet it; of its columns, every stride-th (see `pad`)
    long padded;          // numbers of a padded image
    long group;           // images that are convolved together: the kernels are read once for all of them
    long chunk;           // numbers of padded images that a thread should work on at once
} Conv;

typedef struct {
    const Maps *maps;     // null: the attention is given
    const Conv *conv;
    const float *x;       // (B, H, W, I)
    const float *weight;  // the kernels as PyTorch has them (K, O, taps, I), or null
    const float *bank;    // the kernels laid out to be read faster (O / O_BLOCK, taps, I, K, O_BLOCK), or null
    const float *shift;   // (O) or null
    float *kernel_attn, *gates[GATES];  // (B, K); (B, I), (B, O), (B, taps), null is 1 everywhere
    float *pooled, *squeezed;           // memory for the attention: (B, I), (B, outputs of squeeze)
    float *padded;        // memory for the convolution: (group, rows, I, stride, columns)
    float *y;             // (B, H', W', O); null: only the attention is asked for
    long batch, threads;
} Call;

// One output of a linear map.
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

static float sigmoid(float x) { return 1 / (1 + expf(-x)); }

// Means over one image of O_BLOCK channels. Summing up each row first rounds less.
static void pool(const Call *c, long image, long channel) {
    long I = c->conv->in_channels, height = c->conv->in_size[0], width = c->conv->in_size[1];
    long n = I - channel < O_BLOCK ? I - channel : O_BLOCK;
    float sum[O_BLOCK] = {0};
    for (long row = 0; row < height; row++) {
        float of_row[O_BLOCK] = {0};
        for (long column = 0; column < width; column++) {
            const float *x = c->x + ((image * height + row) * width + column) * I + channel;
            if (n == O_BLOCK) for (int l = 0; l < O_BLOCK; l++) of_row[l] += x[l];
            else for (int l = 0; l < n; l++) of_row[l] += x[l];
        }
        for (int l = 0; l < n; l++) sum[l] += of_row[l];
    }
    for (int l = 0; l < n; l++) c->pooled[image * I + channel + l] = sum[l] / (height * width);
}

// The shares of the kernels in one image.
static void share(const Call *c, long image, const float *features) {
    long K = c->conv->num_kernels;
    float *shares = c->kernel_attn + image * K, highest = -INFINITY, sum = 0;
    for (long k = 0; k < K; k++) {
        shares[k] = apply(&c->maps->kernel, features, k);
        highest = fmaxf(highest, shares[k]);
    }
    for (long k = 0; k < K; k++)
        sum += shares[k] = c->maps->has_softmax ? expf(shares[k] - highest) : sigmoid(shares[k]);
    for (long k = 0; k < K && c->maps->has_softmax; k++) shares[k] /= sum;
}

static void attend(const Call *c) {
    const Maps *maps = c->maps;
    long B = c->batch, I = c->conv->in_channels, hidden = maps->squeeze.outputs, blocks = (I + O_BLOCK - 1) / O_BLOCK;
    long count = hidden ? hidden : I;
    const float *features = hidden ? c->squeezed : c->pooled;
    #pragma omp parallel num_threads(c->threads)
    {
        #pragma omp for schedule(static)
        for (long n = 0; n < B * blocks; n++) pool(c, n / blocks, n % blocks * O_BLOCK);
        // Every map goes output by output, so that the images share the weights that are read.
        #pragma omp for schedule(static)
        for (long n = 0; n < B * hidden; n++) {
            float feature = apply(&maps->squeeze, c->pooled + n % B * I, n / B);
            c->squeezed[n % B * hidden + n / B] = feature < 0 ? 0 : feature;  // NaN stays
        }
        for (int g = 0; g < GATES; g++) {
            const Linear *gate = &maps->gates[g];
            #pragma omp for schedule(static) nowait
            for (long n = 0; n < B * gate->outputs; n++)
                c->gates[g][n % B * gate->outputs + n / B] = sigmoid(apply(gate, features + n % B * count, n / B));
        }
        #pragma omp for schedule(static)
        for (long b = 0; b < B; b++) share(c, b, features + (b + 1) * count - maps->kernel.inputs);
    }
}

// Copies a row of an image with the zeros around it, so that the pixels that meet one weight lie side by side: of each
// channel, first columns 0, stride, 2 * stride and so on, then 1, 1 + stride and so on.
static void pad(const Call *c, long row) {
    const Conv *conv = c->conv;
    long I = conv->in_channels, height = conv->in_size[0], width = conv->in_size[1], stride = conv->stride[1];
    long image = row / conv->rows, from_row = row % conv->rows - conv->padding[0];
    int is_inside = from_row >= 0 && from_row < height;
    const float *x = is_inside ? c->x + (image * height + from_row) * width * I : 0;
    float *to = c->padded + row * I * stride * conv->columns;
    for (long phase = 0; phase < stride; phase++)
        for (long first = 0; first < conv->columns; first += WIDTH) {
            long n = conv->columns - first < WIDTH ? conv->columns - first : WIDTH;
            for (long channel = 0; channel < I; channel += WIDTH) {
                float square[WIDTH][WIDTH] __attribute__((aligned(LINE)));
                for (long m = 0; m < n; m++) {
                    long column = (first + m) * stride + phase - conv->padding[1];
                    vec values = {0};
                    if (is_inside && column >= 0 && column < width) values = *(const vec *)(x + column * I + channel);
                    *(vec *)square[m] = values;
                }
                for (int l = 0; l < WIDTH; l++)
                    for (long m = 0; m < n; m++)
                        to[((channel + l) * stride + phase) * conv->columns + first + m] = square[m][l];
            }
        }
}

// A panel of the K kernels: n rows (input channels of one tap) by O_BLOCK output channels.
typedef struct {
    const float *first;
    const char *next;      // where the next panel is in memory
    long kernel, channel;  // distance from one kernel and output channel to the next; 0 in a bank, which has no gaps
    long n;
} Source;

static Source source(const Call *c, long o, long start, long n) {
    const Conv *conv = c->conv;
    long R = conv->taps[0] * conv->taps[1] * conv->in_channels, K = conv->num_kernels;
    Source s = {.n = n};
    if (c->bank) {
        s.first = c->bank + (o * R + start * O_BLOCK) * K;
        s.next = (const char *)(s.first + n * K * O_BLOCK);
    } else {
        s.first = c->weight + o * R + start;
        s.next = (const char *)(s.first + n + (start + n == R ? (O_BLOCK - 1) * R : 0));
        s.kernel = conv->out_channels * R, s.channel = R;
    }
    return s;
}

// n of the lines of the next panel, to be fetched into the L2 cache. A panel is 2 * K such runs.
typedef struct {
    const char *line;      // null: nothing is to be fetched
    long length, gap;      // the lines lie together in pieces of `length` bytes, with `gap` bytes between them
} Run;

static Run run(const Source *s, long number) {
    if (!s->channel) return (Run){s->next + number * s->n * LINE, s->n * LINE, 0};
    long first = number / 2 * s->kernel + number % 2 * (O_BLOCK / 2) * s->channel, size = sizeof(float);
    return (Run){s->next + first * size, s->n * size, (s->channel - s->n) * size};
}

// Mixes a panel of a bank for one image: n rows of O_BLOCK channels, times in_attn of each row and the gate of their
// tap. Meanwhile, the runs of the next panel from `unread` on are fetched.
static void mix_bank(
        const Source *s, const float *shares, const float *in_attn, float gate, long K, long unread, float *panel) {
    const char *next = s->next + unread * s->n * LINE;
    for (long r = 0; r < s->n; r++) {
        for (long number = unread; number < 2 * K; number++, next += LINE) __builtin_prefetch(next, 0, 2);
        for (long o = 0; o < O_BLOCK; o += WIDTH) {
            const float *bank = s->first + r * K * O_BLOCK + o;
            vec sum = shares[0] * *(const vec *)bank;
            for (long k = 1; k < K; k++) sum += shares[k] * *(const vec *)(bank + k * O_BLOCK);
            *(vec *)(panel + r * O_BLOCK + o) = sum * (in_attn ? in_attn[r] * gate : gate);
        }
    }
}

#ifdef __clang__
#define UNROLL
#define SHUFFLE(A, B, ...) __builtin_shufflevector(A, B, __VA_ARGS__)
#else
#define UNROLL _Pragma("GCC unroll 14")
typedef int indices __attribute__((vector_size(WIDTH * 4)));
#define SHUFFLE(A, B, ...) __builtin_shuffle(A, B, (indices){__VA_ARGS__})
#endif

static inline void transpose(vec *square) {
    for (int done = 1; done < WIDTH; done *= 2) {
        vec before[WIDTH];
        for (int l = 0; l < WIDTH; l++) before[l] = square[l];
        for (int l = 0; l < WIDTH / 2; l++) {
            square[2 * l] = SHUFFLE(before[l], before[l + WIDTH / 2], LOW);
            square[2 * l + 1] = SHUFFLE(before[l], before[l + WIDTH / 2], HIGH);
        }
    }
}

// The same of kernels as PyTorch has them, in squares that are mixed and transposed.
static void mix_rows(
        const Source *s, const float *shares, const float *in_attn, float gate, long K, long unread, float *panel) {
    long ahead = s->next - (const char *)s->first;
    for (long o = 0; o < O_BLOCK; o += WIDTH)
        for (long r = 0; r < s->n; r += WIDTH) {
            vec square[WIDTH], gates = in_attn ? *(const vec *)(in_attn + r) * gate : gate - (vec){0};
            for (int l = 0; l < WIDTH; l++) {
                const float *weight = s->first + (o + l) * s->channel + r;
                vec sum = {0};
                for (long k = 0; k < K; k++, weight += s->kernel) {
                    sum += shares[k] * *(const vec *)weight;
                    if (2 * k + (o + l) / (O_BLOCK / 2) >= unread)
                        __builtin_prefetch((const char *)weight + ahead, 0, 2);
                }
                square[l] = sum * gates;
            }
            transpose(square);
            for (int l = 0; l < WIDTH; l++) *(vec *)(panel + (r + l) * O_BLOCK + o) = square[l];
        }
}

// Some pixels, side by side, times some of a panel: y (pixels, o) += x (n, pixels)^T panel (n, o), o = VECTORS * WIDTH.
typedef struct {
    const float *x, *panel;
    float *y;
    long n, step;                // rows; from one row of x to the next
    long out_channels;           // from one pixel of y to the next
    int is_first;                // y is set
    const float *scale, *shift;  // (o), of the sums in the end
    Run ahead;                   // is fetched meanwhile, a line for each row
} Tile;

static inline __attribute__((always_inline)) void multiply_tile(const Tile *t, const int pixels) {
    const float *x = t->x, *panel = t->panel;
    const char *line = t->ahead.line, *end = line ? line + t->ahead.length : 0;
    float *y = t->y;
    long out_channels = t->out_channels;
    vec sums[PIXELS][VECTORS] = {0}, scale[VECTORS], shift[VECTORS];
    if (!t->is_first)
        UNROLL for (int m = 0; m < pixels; m++)
            for (int v = 0; v < VECTORS; v++) sums[m][v] = *(const vec *)(y + m * out_channels + v * WIDTH);
    for (long r = 0; r < t->n; r++, x += t->step, panel += O_BLOCK) {
        if (line) {
            __builtin_prefetch(line, 0, 2);
            if ((line += LINE) == end) end += t->ahead.length + t->ahead.gap, line += t->ahead.gap;
        }
        // The registers that are left hold all weights of a row or all of its pixels, whichever are fewer.
        const vec *weights = (const vec *)panel;
        if (VECTORS > pixels)
            for (int v = 0; v < VECTORS; v++) {
                vec weight = weights[v];
                UNROLL for (int m = 0; m < pixels; m++) sums[m][v] += x[m] * weight;
            }
        else
            UNROLL for (int m = 0; m < pixels; m++)
                for (int v = 0; v < VECTORS; v++) sums[m][v] += x[m] * weights[v];
    }
    for (int v = 0; v < VECTORS; v++) scale[v] = ((const vec *)t->scale)[v], shift[v] = ((const vec *)t->shift)[v];
    UNROLL for (int m = 0; m < pixels; m++)
        for (int v = 0; v < VECTORS; v++)
            *(vec *)(y + m * out_channels + v * WIDTH) = sums[m][v] * scale[v] + shift[v];
}

#define TILE(COUNT) static void tile_##COUNT(const Tile *t) { multiply_tile(t, COUNT); }
TILES(TILE)
#define NAME(COUNT) tile_##COUNT,
static void (*const tiles[])(const Tile *) = {0, TILES(NAME)};
static const float zeros[O_BLOCK], ones[O_BLOCK] = {[0 ... O_BLOCK - 1] = 1};

// Output channels o to o + O_BLOCK of some rows of the result, which are counted through all images. For each tap, the
// pixels are multiplied with its kernel (I, O) for their image, in panels of R_PANEL rows that stay in the L1 cache.
static void multiply(const Call *c, long o, long first_row, long last_row) {
    const Conv *conv = c->conv;
    long I = conv->in_channels, O = conv->out_channels, K = conv->num_kernels;
    long height = conv->out_size[0], width = conv->out_size[1], parts = (width + PIXELS - 1) / PIXELS;
    long taps = conv->taps[0] * conv->taps[1], R = taps * I, step = conv->stride[1] * conv->columns;
    float panel[R_PANEL * O_BLOCK] __attribute__((aligned(LINE)));
    for (long start = 0, n; start < R; start += n) {
        long channel = start % I, tap = start / I;
        n = I - channel < R_PANEL ? I - channel : R_PANEL;
        long i = tap / conv->taps[1] * conv->dilation[0], j = tap % conv->taps[1] * conv->dilation[1];
        // Reading the kernels is what takes longest, so it must never pause: each tile fetches a run of the next panel.
        // Where there are fewer tiles than runs, the others are fetched while this panel is mixed.
        Source s = source(c, o, start, n);
        long calls = (last_row - first_row) * parts * (O_BLOCK / (VECTORS * WIDTH)), call = 0;
        Tile t = {.n = n, .step = step, .out_channels = O, .is_first = !start};
        int is_last = start + n == R;
        for (long image = first_row / height; image * height < last_row; image++) {
            long begin = image * height, end = begin + height;
            const float *in_attn = c->gates[IN] ? c->gates[IN] + image * I + channel : 0;
            float gate = c->gates[TAP] ? c->gates[TAP][image * taps + tap] : 1;
            (c->bank ? mix_bank : mix_rows)(
                &s, c->kernel_attn + image * K, in_attn, gate, K, call ? 2 * K : calls, panel);
            const float *x = c->padded + ((image * conv->rows + i) * I + channel) * step
                + j % conv->stride[1] * conv->columns + j / conv->stride[1];
            for (long to = o; to < o + O_BLOCK; to += VECTORS * WIDTH) {
                t.panel = panel + to - o;
                t.scale = is_last && c->gates[OUT] ? c->gates[OUT] + image * O + to : ones;
                t.shift = is_last && c->shift ? c->shift + to : zeros;
                for (long row = first_row > begin ? first_row : begin; row < last_row && row < end; row++)
                    for (long part = 0; part < parts; part++, call++) {
                        long column = part * width / parts, pixels = (part + 1) * width / parts - column;
                        t.x = x + (row - begin) * conv->stride[0] * I * step + column;
                        t.y = c->y + (row * width + column) * O + to;
                        t.ahead = call < 2 * K ? run(&s, call) : (Run){0};
                        tiles[pixels](&t);
                    }
            }
        }
    }
}

// Threads share the work by blocks of channels, and by chunks of rows where there are fewer blocks than threads. Where
// the kernels are small beside the images, chunks stay in the L2 cache, and the kernels are read again for each one.
static void convolve(const Call *c) {
    const Conv *conv = c->conv;
    long blocks = conv->out_channels / O_BLOCK, chunks = (c->threads + blocks - 1) / blocks;
    long height = c->batch * conv->out_size[0], rows = c->batch * conv->rows, padded = c->batch * conv->padded;
    long weights = conv->taps[0] * conv->taps[1] * conv->in_channels * conv->out_channels * conv->num_kernels;
    if (weights < 8 * padded) {
        chunks = padded / conv->chunk + 1;
        if (chunks < c->threads) chunks = c->threads;
    }
    if (chunks > height) chunks = height;
    #pragma omp parallel num_threads(c->threads)
    {
        #pragma omp for schedule(static)
        for (long row = 0; row < rows; row++) pad(c, row);
        #pragma omp for schedule(static)
        for (long piece = 0; piece < blocks * chunks; piece++) {
            long chunk = piece / blocks;
            multiply(c, piece % blocks * O_BLOCK, height * chunk / chunks, height * (chunk + 1) / chunks);
        }
    }
}

// Computes what is asked for, group by group.
void fmd_timm_run(const Call *all) {
    const Conv *conv = all->conv;
    long sizes[GATES] = {conv->in_channels, conv->out_channels, conv->taps[0] * conv->taps[1]};
    for (long first = 0; first < all->batch; first += conv->group) {
        Call c = *all;
        c.batch = all->batch - first < conv->group ? all->batch - first : conv->group;
        c.x += first * conv->in_size[0] * conv->in_size[1] * conv->in_channels;
        c.kernel_attn += first * conv->num_kernels;
        for (int g = 0; g < GATES; g++)
            if (c.gates[g]) c.gates[g] += first * sizes[g];
        if (c.maps) attend(&c);
        if (!c.y) continue;
        c.y += first * conv->out_size[0] * conv->out_size[1] * conv->out_channels;
        convolve(&c);
    }
}
