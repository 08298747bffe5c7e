// One image convolved with the mixture of K kernels, for inference. `native.py` compiles this and says what it is for.
//
// A matrix product of the patches (P pixels, R = taps * I) with the mixed kernel (R, O), in panels of R_PANEL rows and
// O_BLOCK output channels. A panel is mixed into the L1 cache and multiplied with all patches; meanwhile the K panels
// that come next are fetched. Vectors are GCC's and Clang's own, as wide as those of the processor.

#if defined(__AVX512F__)
enum { WIDTH = 16, ROWS = 14 };  // floats of a vector; pixels of a tile, whose sums fill the registers
#elif defined(__AVX__)
enum { WIDTH = 8, ROWS = 6 };
#else
enum { WIDTH = 4, ROWS = 6 };
#endif
enum { O_BLOCK = 32, R_PANEL = 128, LINE = 64 };
typedef float vec __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));

typedef struct {
    const float *x;       // (H, W, I)
    const float *bank;    // (O / O_BLOCK, R, K, O_BLOCK)
    const float *share;   // (K)
    const float *in;      // (I) or null
    const float *out;     // (O) or null
    const float *shift;   // (O) or null
    float *patches;       // room for (ceil(P / ROWS), R, ROWS)
    float *y;             // (P, O)
    long height, width, in_channels, out_channels, kernels, taps[2], stride[2], padding[2], dilation[2], out_size[2];
    long threads;
} Conv;

// ROWS patches from pixel `first` on, transposed and times the gates of their channels, zeros beyond the image.
static void pack(const Conv *c, long first, float *to) {
    for (long i = 0; i < c->taps[0]; i++)
        for (long j = 0; j < c->taps[1]; j++) {
            const float *from[ROWS];
            for (long m = 0; m < ROWS; m++) {
                long pixel = first + m;
                long row = pixel / c->out_size[1] * c->stride[0] - c->padding[0] + i * c->dilation[0];
                long column = pixel % c->out_size[1] * c->stride[1] - c->padding[1] + j * c->dilation[1];
                int is_inside = pixel < c->out_size[0] * c->out_size[1]
                    && row >= 0 && row < c->height && column >= 0 && column < c->width;
                from[m] = is_inside ? c->x + (row * c->width + column) * c->in_channels : 0;
            }
            for (long channel = 0; channel < c->in_channels; channel += WIDTH, to += WIDTH * ROWS) {
                float square[ROWS][WIDTH] __attribute__((aligned(LINE)));
                vec gate = (vec){0} + 1;
                if (c->in) gate = *(const vec *)(c->in + channel);
                for (int m = 0; m < ROWS; m++) {
                    vec values = {0};
                    if (from[m]) values = *(const vec *)(from[m] + channel) * gate;
                    *(vec *)square[m] = values;
                }
                for (int l = 0; l < WIDTH; l++)
                    for (int m = 0; m < ROWS; m++) to[l * ROWS + m] = square[m][l];
            }
        }
}

// n rows of O_BLOCK channels, mixed from (n, K, O_BLOCK).
static void mix(const float *bank, const float *share, long kernels, long n, float *panel) {
    for (long r = 0; r < n; r++)
        for (long o = 0; o < O_BLOCK; o += WIDTH) {
            vec sum = share[0] * *(const vec *)(bank + r * kernels * O_BLOCK + o);
            for (long k = 1; k < kernels; k++) sum += share[k] * *(const vec *)(bank + (r * kernels + k) * O_BLOCK + o);
            *(vec *)(panel + r * O_BLOCK + o) = sum;
        }
}

// y (COUNT, 2 * WIDTH) += patches (n, COUNT)^T panel (n, 2 * WIDTH), set where `is_first`; scaled and shifted if asked
// for. Fetches `lines` of memory from `next` on in each of the n steps.
#define TILE(COUNT) \
static void tile_##COUNT( \
        const float *patches, const float *panel, long n, float *y, long out_channels, int is_first, \
        const float *scale, const float *shift, const char *next, long lines) { \
    vec sums[COUNT][2]; \
    for (int m = 0; m < COUNT; m++) \
        for (int v = 0; v < 2; v++) { \
            if (is_first) sums[m][v] = (vec){0}; \
            else sums[m][v] = *(const vec *)(y + m * out_channels + v * WIDTH); \
        } \
    for (long r = 0; r < n; r++) { \
        vec left = *(const vec *)(panel + r * O_BLOCK), right = *(const vec *)(panel + r * O_BLOCK + WIDTH); \
        for (long l = 0; l < lines; l++) __builtin_prefetch(next + (r * lines + l) * LINE, 0, 2); \
        _Pragma("GCC unroll 14") \
        for (int m = 0; m < COUNT; m++) { \
            sums[m][0] += patches[r * ROWS + m] * left; \
            sums[m][1] += patches[r * ROWS + m] * right; \
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
    const float *, const float *, long, float *, long, int, const float *, const float *, const char *, long);
TILE(4)
TILE(2)
TILE(1)
#if defined(__AVX512F__)
TILE(14)
TILE(7)
static Tile *const tiles[] = {tile_14, tile_7, tile_4, tile_2, tile_1};
static const long counts[] = {14, 7, 4, 2, 1};
#else
TILE(6)
static Tile *const tiles[] = {tile_6, tile_4, tile_2, tile_1};
static const long counts[] = {6, 4, 2, 1};
#endif

// The output channels o to o + O_BLOCK of all pixels.
static void multiply(const Conv *c, long o) {
    long pixels = c->out_size[0] * c->out_size[1], rows = c->taps[0] * c->taps[1] * c->in_channels;
    float panel[R_PANEL * O_BLOCK] __attribute__((aligned(LINE)));
    for (long start = 0; start < rows; start += R_PANEL) {
        long n = rows - start < R_PANEL ? rows - start : R_PANEL;
        const float *bank = c->bank + (o * rows + start * O_BLOCK) * c->kernels;
        mix(bank, c->share, c->kernels, n, panel);
        // The next K panels follow in memory. The first tiles fetch them, a few lines in each of their steps.
        long ahead = n * c->kernels * O_BLOCK * (long)sizeof(float) / LINE, fetched = 0;
        long steps = (pixels + ROWS - 1) / ROWS * (O_BLOCK / (2 * WIDTH)) * n, at_once = (ahead + steps - 1) / steps;
        const char *next = (const char *)(bank + n * c->kernels * O_BLOCK);
        int is_first = !start, is_last = start + n == rows;
        for (long channel = 0; channel < O_BLOCK; channel += 2 * WIDTH)
            for (long pixel = 0, kind = 0; pixel < pixels;) {
                if (pixel % ROWS == 0) kind = 0;
                while (counts[kind] > pixels - pixel) kind++;
                long lines = fetched < ahead ? at_once : 0, at = o + channel;
                tiles[kind](
                    c->patches + (pixel / ROWS * rows + start) * ROWS + pixel % ROWS, panel + channel, n,
                    c->y + pixel * c->out_channels + at, c->out_channels, is_first,
                    is_last && c->out ? c->out + at : 0, is_last && c->shift ? c->shift + at : 0,
                    next + fetched * LINE, lines);
                fetched += lines * n;
                pixel += counts[kind];
            }
    }
}

void fmd_timm_convolve(const Conv *c) {
    long pixels = c->out_size[0] * c->out_size[1], rows = c->taps[0] * c->taps[1] * c->in_channels;
    #pragma omp parallel num_threads(c->threads)
    {
        #pragma omp for schedule(static)
        for (long first = 0; first < pixels; first += ROWS) pack(c, first, c->patches + first * rows);
        #pragma omp for schedule(static)
        for (long o = 0; o < c->out_channels; o += O_BLOCK) multiply(c, o);
    }
}
