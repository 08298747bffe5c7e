// The attention of images and their convolutions, each with its own mixture of K kernels, and the gradients of these.
// `c_conv.py` says what it is for, `c_library.py` compiles it. All numbers are float32, images and kernels lie in
// memory as in channels_last.

#include <math.h>
#include <string.h>

// WIDTH: floats of a vector, as wide as the processor's. PIXELS, VECTORS: the largest tile, whose sums fill the registers;
// TILES: all tiles. ROWS: channels of a tile of a kernel's gradient. LOW, HIGH: which elements of two vectors a and b
// make the two halves of a0 b0 a1 b1 ...
#if defined(__AVX512F__)
enum { WIDTH = 16, PIXELS = 14, VECTORS = 2, ROWS = 8 };
#define TILES(DO) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11) DO(12) DO(13) DO(14)
#define LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX__)
enum { WIDTH = 8, PIXELS = 3, VECTORS = 4, ROWS = 4 };
#define TILES(DO) DO(1) DO(2) DO(3)
#define LOW 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
enum { WIDTH = 4, PIXELS = 6, VECTORS = 2, ROWS = 4 };
#define TILES(DO) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6)
#define LOW 0, 4, 1, 5
#define HIGH 2, 6, 3, 7
#endif
// Output channels of a block, rows of a panel (see `multiply`), bytes of a line of the caches, channels that a depthwise
// convolution works on at once.
enum { O_BLOCK = 32, R_PANEL = 128, LINE = 64, FILTERED = 256 };
// Of the backward pass: most kernels, input channels and images whose gradients are added to the kernels' at once.
enum { MAX_KERNELS = 32, SQUARE = 16, IMAGES = 4 };
// Where the gates of a layer are in an array.
enum { IN, OUT, TAP, GATES };
typedef float vec __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));
typedef int lanes __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));

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
    long group;           // images that are convolved together: the kernels are read once for all of them. All where
                          // the images' kernels are wanted
    long chunk;           // numbers of padded images that a thread should work on at once
    long groups;          // of the channels; only `mix_kernels` knows more than one. A depthwise convolution has a
                          // kernel of one output channel and all input channels, which `filter` doesn't sum up
} Conv;

typedef struct {
    const Maps *maps;     // null: the attention is given
    const Conv *conv;
    const float *x;       // (B, H, W, I)
    const float *weight;  // the kernels as PyTorch has them (K, O, taps, I), or null
    const void *bank;     // the kernels laid out to be read faster (O / O_BLOCK, taps, I, K, O_BLOCK), or null
    const float *scale;   // (O): the bank is of int16, and times this the kernels; null: it is the kernels
    const float *shift;   // (O) or null
    float *memory;        // for the attention: see `divide`
    float *padded;        // memory for the convolution: (group, rows, I, stride, columns)
    float *y;             // (B, H', W', O), or null
    float *kernels;       // each image's kernel with all of its attention (B, O, taps, I / groups), or null; if there is
                          // y too, the convolution is depthwise
    long batch, threads;
    float *kernel_attn, *gates[GATES];  // (B, K); (B, I), (B, O), (B, taps), null is 1 everywhere
    float *pooled, *squeezed;           // (B, I), (B, outputs of squeeze)
} Call;

typedef struct {
    const Conv *conv;
    const float *x, *weight, *grad_y, *kernel_attn, *gates[GATES];  // as in a Call; the gradient of y
    float *grad_x, *grad_weight, *grad_in_attn;                     // the last is null where there is no in_attn
    float *products;      // (chunks, T, B, K, O), zeros: see `add_tiles`; T is taps where there is tap_attn, or else 1
    float *of_x, *of_y;   // memory: (B, H, I, stride, columns) and (B, H', W', O)
    long batch, threads, chunks;  // images; threads; parts of the input channels whose kernels are differentiated apart
} Backward;

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

// The parts of the memory for the attention of a group of images.
static void divide(Call *c) {
    float *next = c->memory;
    c->kernel_attn = next, next += c->batch * c->conv->num_kernels;
    for (int g = 0; g < GATES; g++) {
        long size = c->batch * c->maps->gates[g].outputs;
        c->gates[g] = size ? next : 0, next += size;
    }
    c->pooled = next, c->squeezed = next + c->batch * c->conv->in_channels;
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

// Output channels first to last of the kernel of an image.
static void mix_kernel(const Call *c, long image, long first, long last) {
    const Conv *conv = c->conv;
    long O = conv->out_channels, I = conv->in_channels / conv->groups, taps = conv->taps[0] * conv->taps[1];
    long size = O * taps * I, start = first * taps * I, n = last * taps * I - start;
    const float *shares = c->kernel_attn + image * conv->num_kernels;
    float *kernel = c->kernels + image * size + start;
    for (long k = 0; k < conv->num_kernels; k++)
        for (long r = 0; r < n; r++) kernel[r] = (k ? kernel[r] : 0) + shares[k] * c->weight[k * size + start + r];
    for (long o = first; o < last; o++)
        for (long tap = 0; tap < taps; tap++, kernel += I) {
            float gate = (c->gates[OUT] ? c->gates[OUT][image * O + o] : 1)
                * (c->gates[TAP] ? c->gates[TAP][image * taps + tap] : 1);
            const float *in_attn = c->gates[IN] ? c->gates[IN] + (image * conv->groups + o * conv->groups / O) * I : 0;
            for (long i = 0; i < I; i++) kernel[i] *= in_attn ? in_attn[i] * gate : gate;
        }
}

// The kernels of all images, some output channels at a time: those of the K kernels stay in the cache meanwhile.
static void mix_kernels(const Call *c) {
    long O = c->conv->out_channels, R = c->conv->taps[0] * c->conv->taps[1] * c->conv->in_channels / c->conv->groups;
    long rows = R_PANEL * O_BLOCK / R + 1;
    #pragma omp parallel for schedule(static) num_threads(c->threads)
    for (long first = 0; first < O; first += rows)
        for (long image = 0; image < c->batch; image++)
            mix_kernel(c, image, first, first + rows < O ? first + rows : O);
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
    const void *first;
    const char *next;      // where the next panel is in memory
    long kernel, channel;  // distance from one kernel and output channel to the next; 0 in a bank, which has no gaps
    long n, runs;          // of the latter the next panel has as many (see `Run`)
} Source;

static Source source(const Call *c, long o, long start, long n) {
    const Conv *conv = c->conv;
    long R = conv->taps[0] * conv->taps[1] * conv->in_channels, K = conv->num_kernels;
    Source s = {.n = n, .runs = 2 * K};
    if (c->bank) {
        long bytes = K * O_BLOCK * (c->scale ? sizeof(short) : sizeof(float));  // of a row
        s.first = (const char *)c->bank + (o / O_BLOCK * R + start) * bytes;
        s.next = (const char *)s.first + n * bytes;
        s.runs = bytes / LINE;
    } else {
        const float *first = c->weight + o * R + start;
        s.first = first;
        s.next = (const char *)(first + n + (start + n == R ? (O_BLOCK - 1) * R : 0));
        s.kernel = conv->out_channels * R, s.channel = R;
    }
    return s;
}

// n of the lines of the next panel, to be fetched into the L2 cache. A panel of float32 is 2 * K such runs.
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
        for (long number = unread; number < s->runs; number++, next += LINE) __builtin_prefetch(next, 0, 2);
        for (long o = 0; o < O_BLOCK; o += WIDTH) {
            const float *bank = (const float *)s->first + r * K * O_BLOCK + o;
            vec sum = shares[0] * *(const vec *)bank;
            for (long k = 1; k < K; k++) sum += shares[k] * *(const vec *)(bank + k * O_BLOCK);
            *(vec *)(panel + r * O_BLOCK + o) = sum * (in_attn ? in_attn[r] * gate : gate);
        }
    }
}

// The same of a bank of int16: a lane of 32 bits has those of output channels o and o + O_BLOCK / 2. Any processor makes
// floats of them in three operations.
static void mix_integers(
        const Source *s, const float *shares, const float *in_attn, float gate, long K, long unread, float *panel) {
    const char *next = s->next + unread * s->n * LINE;
    for (long r = 0; r < s->n; r++) {
        for (long number = unread; number < s->runs; number++, next += LINE) __builtin_prefetch(next, 0, 2);
        float factor = in_attn ? in_attn[r] * gate : gate;
        for (long o = 0; o < O_BLOCK / 2; o += WIDTH) {
            const int *bank = (const int *)s->first + r * K * (O_BLOCK / 2) + o;
            vec low = {0}, high = {0};
            for (long k = 0; k < K; k++, bank += O_BLOCK / 2) {
                lanes pairs = *(const lanes *)bank;
                low += shares[k] * __builtin_convertvector(pairs << 16 >> 16, vec);
                high += shares[k] * __builtin_convertvector(pairs >> 16, vec);
            }
            *(vec *)(panel + r * O_BLOCK + o) = low * factor;
            *(vec *)(panel + r * O_BLOCK + O_BLOCK / 2 + o) = high * factor;
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
                const float *weight = (const float *)s->first + (o + l) * s->channel + r;
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
    float panel[R_PANEL * O_BLOCK] __attribute__((aligned(LINE))), scale[O_BLOCK];
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
            (c->scale ? mix_integers : c->bank ? mix_bank : mix_rows)(
                &s, c->kernel_attn + image * K, in_attn, gate, K, call ? s.runs : calls, panel);
            for (long l = 0; l < O_BLOCK && is_last; l++)
                scale[l] = (c->gates[OUT] ? c->gates[OUT][image * O + o + l] : 1) * (c->scale ? c->scale[o + l] : 1);
            const float *x = c->padded + ((image * conv->rows + i) * I + channel) * step
                + j % conv->stride[1] * conv->columns + j / conv->stride[1];
            for (long to = o; to < o + O_BLOCK; to += VECTORS * WIDTH) {
                t.panel = panel + to - o;
                t.scale = is_last ? scale + to - o : ones;
                t.shift = is_last && c->shift ? c->shift + to : zeros;
                for (long row = first_row > begin ? first_row : begin; row < last_row && row < end; row++)
                    for (long part = 0; part < parts; part++, call++) {
                        long column = part * width / parts, pixels = (part + 1) * width / parts - column;
                        t.x = x + (row - begin) * conv->stride[0] * I * step + column;
                        t.y = c->y + (row * width + column) * O + to;
                        t.ahead = call < s.runs ? run(&s, call) : (Run){0};
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

// Some channels of a pixel of a depthwise convolution; rows are counted through all images.
static inline __attribute__((always_inline)) void filter(
        const Call *c, long row, long column, long channel, const int channels) {
    const Conv *conv = c->conv;
    long I = conv->in_channels, height = conv->in_size[0], width = conv->in_size[1], image = row / conv->out_size[0];
    long top = row % conv->out_size[0] * conv->stride[0] - conv->padding[0];
    long left = column * conv->stride[1] - conv->padding[1];
    const float *kernel = c->kernels + image * conv->taps[0] * conv->taps[1] * I + channel;
    float sums[O_BLOCK];
    for (int l = 0; l < channels; l++) sums[l] = c->shift ? c->shift[channel + l] : 0;
    for (long i = 0, y = top; i < conv->taps[0]; i++, y += conv->dilation[0])
        for (long j = 0, x = left; j < conv->taps[1]; j++, x += conv->dilation[1]) {
            if (y < 0 || y >= height || x < 0 || x >= width) continue;
            const float *pixel = c->x + ((image * height + y) * width + x) * I + channel;
            const float *weight = kernel + (i * conv->taps[1] + j) * I;
            for (int l = 0; l < channels; l++) sums[l] += pixel[l] * weight[l];
        }
    memcpy(c->y + (row * conv->out_size[1] + column) * I + channel, sums, channels * sizeof(float));
}

// So many channels at a time that a kernel and the rows under it stay in the L1 cache.
static void filter_all(const Call *c) {
    long I = c->conv->in_channels, rows = c->batch * c->conv->out_size[0], columns = c->conv->out_size[1];
    #pragma omp parallel for schedule(static) num_threads(c->threads)
    for (long row = 0; row < rows; row++)
        for (long first = 0; first < I; first += FILTERED)
            for (long column = 0; column < columns; column++) {
                long i = first, end = first + FILTERED < I ? first + FILTERED : I;
                for (; i + 32 <= end; i += 32) filter(c, row, column, i, 32);
                for (; i + 16 <= end; i += 16) filter(c, row, column, i, 16);
                for (; i + 8 <= end; i += 8) filter(c, row, column, i, 8);
                for (; i < end; i++) filter(c, row, column, i, 1);
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
        if (c.maps) {
            divide(&c);
            attend(&c);
        } else {
            c.kernel_attn += first * conv->num_kernels;
            for (int g = 0; g < GATES; g++)
                if (c.gates[g]) c.gates[g] += first * sizes[g];
        }
        if (c.kernels) mix_kernels(&c);
        if (!c.y) continue;
        c.y += first * conv->out_size[0] * conv->out_size[1] * conv->out_channels;
        (c.kernels ? filter_all : convolve)(&c);
    }
}

// The results that meet a pixel under a tap, in one dimension: n of them from `first`, whose pixel is `pixel`.
typedef struct {
    long first, n, pixel;
} Span;

static Span span(const Conv *conv, int dimension, long tap) {
    long stride = conv->stride[dimension], at = tap * conv->dilation[dimension] - conv->padding[dimension];
    long first = at < 0 ? (stride - 1 - at) / stride : 0, end = (conv->in_size[dimension] - at + stride - 1) / stride;
    if (end > conv->out_size[dimension]) end = conv->out_size[dimension];
    return (Span){first, end > first ? end - first : 0, first * stride + at};
}

// Gradients of O_BLOCK input channels of some images and of their in_attn. Each tap adds the gradients of the results,
// times its mixed kernel (O, I), to the pixels under it: a convolution whose panels have output channels as rows.
static void image_gradient(const Backward *c, long i, long first, long last) {
    const Conv *conv = c->conv;
    long I = conv->in_channels, O = conv->out_channels, K = conv->num_kernels;
    long height = conv->out_size[0], width = conv->out_size[1], pixels = conv->in_size[0] * conv->in_size[1];
    long taps = conv->taps[0] * conv->taps[1], R = taps * I;
    float *sums = c->of_x + i * c->batch * pixels;  // (B, pixels, O_BLOCK): side by side, they stay in the cache
    float rows[MAX_KERNELS * SQUARE * O_BLOCK] __attribute__((aligned(LINE)));  // (n, K, O_BLOCK): the same of kernels
    float panel[R_PANEL * O_BLOCK] __attribute__((aligned(LINE)));
    long most = MAX_KERNELS * SQUARE / K < R_PANEL ? MAX_KERNELS * SQUARE / K : R_PANEL;
    memset(sums + first * pixels * O_BLOCK, 0, (last - first) * pixels * O_BLOCK * sizeof(float));
    for (long o = 0, n; o < O; o += n) {
        n = O - o < most ? O - o : most;
        for (long tap = 0; tap < taps; tap++) {
            Span down = span(conv, 0, tap / conv->taps[1]), across = span(conv, 1, tap % conv->taps[1]);
            const float *weight = c->weight + o * R + tap * I + i;
            const float *next = weight + (tap + 1 < taps ? I : n * R + I - R);
            for (long r = 0; r < n; r++)
                for (long k = 0; k < K; k++)
                    memcpy(rows + (r * K + k) * O_BLOCK, weight + (k * O + r) * R, O_BLOCK * sizeof(float));
            Source s = {.first = rows, .next = (const char *)rows, .n = n};
            Tile t = {.n = n, .step = width, .out_channels = conv->stride[1] * O_BLOCK, .scale = ones, .shift = zeros};
            long parts = (across.n + PIXELS - 1) / PIXELS, call = 0;
            for (long image = first; image < last; image++) {
                const float *out_attn = c->gates[OUT] ? c->gates[OUT] + image * O + o : 0;
                float gate = c->gates[TAP] ? c->gates[TAP][image * taps + tap] : 1;
                mix_bank(&s, c->kernel_attn + image * K, out_attn, gate, K, 0, panel);
                for (long to = 0; to < O_BLOCK; to += VECTORS * WIDTH)
                    for (long row = 0; row < down.n; row++)
                        for (long part = 0; part < parts; part++, call++) {
                            long column = part * across.n / parts, end = (part + 1) * across.n / parts;
                            long pixel = (image * conv->in_size[0] + down.pixel + row * conv->stride[0])
                                * conv->in_size[1] + across.pixel + column * conv->stride[1];
                            t.panel = panel + to;
                            t.x = c->of_y + ((image * height + down.first + row) * O + o) * width
                                + across.first + column;
                            t.y = sums + pixel * O_BLOCK + to;
                            // Each tile fetches half of a kernel's rows of the next panel.
                            t.ahead = call < 2 * K ? (Run){
                                (const char *)(next + (call / 2 * O + call % 2 * (n / 2)) * R),
                                O_BLOCK * sizeof(float), (R - O_BLOCK) * sizeof(float)} : (Run){0};
                            tiles[end - column](&t);
                        }
            }
        }
    }
    for (long image = first; image < last; image++) {
        float grad_in_attn[O_BLOCK] = {0};
        for (long pixel = image * pixels; pixel < (image + 1) * pixels; pixel++)
            for (int l = 0; l < O_BLOCK; l++) {
                float grad = sums[pixel * O_BLOCK + l];
                grad_in_attn[l] += grad * c->x[pixel * I + i + l];
                c->grad_x[pixel * I + i + l] = c->gates[IN] ? grad * c->gates[IN][image * I + i + l] : grad;
            }
        if (c->grad_in_attn) memcpy(c->grad_in_attn + image * I + i, grad_in_attn, sizeof(grad_in_attn));
    }
}

// The kernels' gradient of one image, for ROWS input channels of a tap and 2 * WIDTH output channels, times in_attn:
// sums over pixels of x (rows, ROWS, columns), `step` from one channel to the next, times y (rows, columns, O_BLOCK).
static void correlate(
        const float *x, long step, long x_row, const float *y, long y_row, long rows, long columns,
        const float *in_attn, float *tile) {
    vec sums[ROWS][2] = {0};
    for (long row = 0; row < rows; row++, x += x_row, y += y_row)
        for (long column = 0; column < columns; column++) {
            vec left = *(const vec *)(y + column * O_BLOCK), right = *(const vec *)(y + column * O_BLOCK + WIDTH);
            UNROLL for (int m = 0; m < ROWS; m++) {
                sums[m][0] += x[m * step + column] * left;
                sums[m][1] += x[m * step + column] * right;
            }
        }
    UNROLL for (int m = 0; m < ROWS; m++)
        for (int v = 0; v < 2; v++)
            *(vec *)(tile + m * O_BLOCK + v * WIDTH) = sums[m][v] * (in_attn ? in_attn[m] : 1);
}

typedef float Square[SQUARE][O_BLOCK] __attribute__((aligned(LINE)));  // some weights of a tap

// Adds the tiles of some images to the gradients of K kernels, times their attention, and to `products`: of the tiles
// with the kernels, summed over input channels. All of the attention but in_attn gets its gradient of those.
static void add_tiles(const Backward *c, long first, long o, long tap, Square *tiles, Square *kernels, Square *grads,
                      float *products) {
    long O = c->conv->out_channels, K = c->conv->num_kernels, taps = c->conv->taps[0] * c->conv->taps[1];
    long images = c->batch - first < IMAGES ? c->batch - first : IMAGES;
    for (long to = 0; to < O_BLOCK; to += WIDTH)
        for (long k = 0; k < K; k++) {
            vec sums[IMAGES] = {0}, factors[IMAGES] = {0};
            for (long b = 0, image = first; b < images; b++, image++) {
                float factor = c->kernel_attn[image * K + k];
                if (c->gates[TAP]) factor *= c->gates[TAP][image * taps + tap];
                factors[b] = factor + (vec){0};
                if (c->gates[OUT]) factors[b] *= *(const vec *)(c->gates[OUT] + image * O + o + to);
            }
            for (long r = 0; r < SQUARE; r++) {
                vec kernel = *(const vec *)&kernels[k][r][to], grad = *(const vec *)&grads[k][r][to];
                for (int b = 0; b < IMAGES; b++) {
                    vec value = *(const vec *)&tiles[b][r][to];
                    sums[b] += kernel * value;
                    grad += factors[b] * value;
                }
                *(vec *)&grads[k][r][to] = grad;
            }
            for (long b = 0; b < images; b++) *(vec *)(products + ((first + b) * K + k) * O + o + to) += sums[b];
        }
}

// Gradients of O_BLOCK output channels of the kernels, for a part of the input channels. The gradients of an image's
// kernel never leave the cache.
static void kernel_gradient(const Backward *c, long o, long chunk) {
    const Conv *conv = c->conv;
    long I = conv->in_channels, O = conv->out_channels, K = conv->num_kernels, B = c->batch;
    long height = conv->out_size[0], width = conv->out_size[1], squares = I / SQUARE;
    long taps = conv->taps[0] * conv->taps[1], R = taps * I, stride = conv->stride[1];
    long columns = (conv->in_size[1] + stride - 1) / stride, step = stride * columns;
    Square kernels[MAX_KERNELS], grads[MAX_KERNELS], images[IMAGES];
    for (long i = squares * chunk / c->chunks * SQUARE; i < squares * (chunk + 1) / c->chunks * SQUARE; i += SQUARE)
        for (long tap = 0; tap < taps; tap++) {
            Span down = span(conv, 0, tap / conv->taps[1]), across = span(conv, 1, tap % conv->taps[1]);
            float *products = c->products + (c->gates[TAP] ? chunk * taps + tap : chunk) * B * K * O;
            long start = o * R + tap * I + i, next = start + (tap + 1 < taps ? I : SQUARE + I - R);
            vec square[WIDTH];
            for (long k = 0; k < K; k++)
                for (long to = 0; to < O_BLOCK; to += WIDTH)
                    for (long r = 0; r < SQUARE; r += WIDTH) {
                        for (int l = 0; l < WIDTH; l++)
                            square[l] = *(const vec *)(c->weight + start + (k * O + to + l) * R + r);
                        transpose(square);
                        for (int l = 0; l < WIDTH; l++) *(vec *)&kernels[k][r + l][to] = square[l];
                    }
            memset(grads, 0, K * sizeof(Square));
            for (long image = 0; image < B; image++) {
                const float *x = c->of_x + ((image * conv->in_size[0] + down.pixel) * I + i) * step
                    + across.pixel % stride * columns + across.pixel / stride;
                const float *y = c->of_y
                    + ((o / O_BLOCK * B + image) * height * width + down.first * width + across.first) * O_BLOCK;
                const float *in_attn = c->gates[IN] ? c->gates[IN] + image * I + i : 0;
                for (long r = 0; r < SQUARE; r += ROWS)
                    for (long to = 0; to < O_BLOCK; to += 2 * WIDTH)
                        correlate(x + r * step, step, conv->stride[0] * I * step, y + to, width * O_BLOCK, down.n,
                                  across.n, in_attn ? in_attn + r : 0, &images[image % IMAGES][r][to]);
                for (long line = image * K * O_BLOCK / B; line < (image + 1) * K * O_BLOCK / B; line++) {
                    long row = next + (line / O_BLOCK * O + line % O_BLOCK) * R;
                    __builtin_prefetch(c->weight + row, 0, 2);
                    __builtin_prefetch(c->grad_weight + row, 1, 2);
                }
                if (image + 1 == B) memset(images + B % IMAGES, 0, (IMAGES - B % IMAGES) % IMAGES * sizeof(Square));
                if (image + 1 == B || image % IMAGES == IMAGES - 1)
                    add_tiles(c, image / IMAGES * IMAGES, o, tap, images, kernels, grads, products);
            }
            for (long k = 0; k < K; k++)
                for (long to = 0; to < O_BLOCK; to += WIDTH)
                    for (long r = 0; r < SQUARE; r += WIDTH) {
                        for (int l = 0; l < WIDTH; l++) square[l] = *(const vec *)&grads[k][r + l][to];
                        transpose(square);
                        for (int l = 0; l < WIDTH; l++)
                            *(vec *)(c->grad_weight + start + (k * O + to + l) * R + r) = square[l];
                    }
        }
}

// The gradients of what a forward pass was given. Unlike there, no zeros stand around the images: taps skip them.
void fmd_timm_backward(const Backward *c) {
    const Conv *conv = c->conv;
    long I = conv->in_channels, O = conv->out_channels, B = c->batch;
    long height = conv->in_size[0], width = conv->in_size[1];
    long results = conv->out_size[0] * conv->out_size[1], stride = conv->stride[1];
    Conv of_x = {.in_channels = I, .in_size = {height, width}, .stride = {1, stride},
                 .rows = height, .columns = (width + stride - 1) / stride};
    Conv of_y = {.in_channels = O, .in_size = {conv->out_size[0], conv->out_size[1]}, .stride = {1, 1},
                 .rows = conv->out_size[0], .columns = conv->out_size[1]};
    Call x = {.conv = &of_x, .x = c->x, .padded = c->of_x}, y = {.conv = &of_y, .x = c->grad_y, .padded = c->of_y};
    // Of some images, the sums and the gradients of the results of one panel should stay in the L2 cache.
    long blocks = I / O_BLOCK, parts = B * (height * width * O_BLOCK + results * R_PANEL) / conv->chunk + 1;
    if (parts * blocks < c->threads) parts = (c->threads + blocks - 1) / blocks;
    if (parts > B) parts = B;
    #pragma omp parallel num_threads(c->threads)
    {
        #pragma omp for schedule(static)
        for (long row = 0; row < B * of_y.rows; row++) pad(&y, row);
        #pragma omp for schedule(static)
        for (long n = 0; n < blocks * parts; n++)
            image_gradient(c, n % blocks * O_BLOCK, B * (n / blocks) / parts, B * (n / blocks + 1) / parts);
        #pragma omp for schedule(static)
        for (long row = 0; row < B * height; row++) pad(&x, row);
        #pragma omp for schedule(static)
        for (long row = 0; row < B * of_y.rows; row++)
            for (long o = 0; o < O; o += O_BLOCK)
                for (long n = row * of_y.columns; n < (row + 1) * of_y.columns; n++)
                    memcpy(c->of_y + o * B * results + n * O_BLOCK, c->grad_y + n * O + o, O_BLOCK * sizeof(float));
        #pragma omp for schedule(static)
        for (long n = 0; n < O / O_BLOCK * c->chunks; n++)
            kernel_gradient(c, n / c->chunks * O_BLOCK, n % c->chunks);
    }
}
