// Gradient of a 3x3x3 convolution's weights, for Hopper's GPUs.
//
// It is a product over voxels: for each tap, outputs' gradients times features that are
// shifted by the tap. A block walks down columns of voxels along D, a slice a step, and
// does the taps of one kh: each of its three warpgroups those of one kw, and all three
// kd in one product. For the three slices follow one another in shared memory: A is the
// gradients' slice, 64 rows of outputs (rows beyond N are nonsense that nobody reads), B
// three slices of features, 3 * PLANES * 8 columns. Its 16 terms are a row of voxels.
//
// The ring of features has two slots more than slices: what is in the first two is there
// once more behind the last. Copies are three steps ahead, and products of a step and the
// one before it are under way: three slices that are read, one more for the step before,
// and three that come.
//
// Blocks' sums go to memory of their own, and `sum_parts` adds them in a fixed order.
//
// Constants: KIND, 1 bfloat16, 2 float16; CIN, input channels, 4 or a multiple of 8 up to
// 48; N, output channels, a multiple of 8 up to 64.

#include "conv3d.cuh"

#define THREADS 384
#define ROW (WIDE + 2)
#define RING 7
#define AHEAD 3
#define SLOTS 5 // of gradients

typedef Window<TALL, ROW, CIN, THREADS> Inputs;
typedef Window<TALL, WIDE, N, THREADS> Outputs;
#define SLICE (Inputs::PLANES * Inputs::PLANE)
#define GRADIENT (Outputs::PLANES * Outputs::PLANE)
#define COLUMNS (3 * Inputs::PLANES * 8)

// Steps of a block. A column has two more than slices: step t loads features of slice
// t - 1, and does slice t - 2 unless it only leads to the first one.
struct Walk {
    int begin, lead, end;
};

INLINE Walk walk_of(long long total, int D) {
    int block = blockIdx.x / 3, blocks = gridDim.x / 3;
    int begin = total * block / blocks, last = total * (block + 1) / blocks - 1;
    int first = begin / D * (D + 2) + begin % D;
    return {first, first + 2, last / D * (D + 2) + last % D + 3};
}

INLINE bool has_products(int step, const Walk &walk, int D) {
    return step >= walk.lead && step % (D + 2) >= 2;
}

struct Loader {
    Inputs inputs;
    Outputs outputs;
    Column column;

    INLINE void load(unsigned features, unsigned gradients, int step, const Walk &walk,
                     const Features &x, const Features &dy, int kh) {
        int t = step % (x.D + 2), slot = step % RING;
        if (t == 0 || step == walk.begin) {
            column = column_of(step / (x.D + 2), x);
            inputs.aim(x, column.h - 1 + kh, column.w - 1);
            outputs.aim(dy, column.h, column.w);
        }
        inputs.load(features + slot * SLICE, x, column.item, t - 1);
        if (slot < 2) inputs.load(features + (slot + RING) * SLICE, x, column.item, t - 1);
        if (has_products(step, walk, x.D))
            outputs.load(gradients + step % SLOTS * GRADIENT, dy, column.item, t - 2);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    sum_products(const element *features, const element *grad, float *sums_of_blocks,
                 int batch, int D, int H, int W, int x_pitch, int dy_pitch) {
    extern __shared__ __align__(128) unsigned char memory[];
    // Rows of A that aren't there read on behind the gradients: in the features.
    const unsigned first = shared_place(memory), second = first + SLOTS * GRADIENT;
    const int kw = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0), kh = blockIdx.x % 3;
    const Features x = {features, D, H, W, x_pitch}, dy = {grad, D, H, W, dy_pitch};
    const Walk walk =
        walk_of((long long)batch * D * parts(H, TALL) * parts(W, WIDE), D);

    for (int i = threadIdx.x; i < SLOTS * GRADIENT + (RING + 2) * SLICE; i += THREADS)
        reinterpret_cast<uint4 *>(memory)[i] = uint4();
    __syncthreads();
    Loader loader;
    float sums[COLUMNS / 2];
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; i++) sums[i] = 0.0f;
#pragma unroll 1
    for (int i = 0; i < AHEAD; i++) {
        if (walk.begin + i < walk.end)
            loader.load(second, first, walk.begin + i, walk, x, dy, kh);
        end_copies();
    }
#pragma unroll 1
    for (int step = walk.begin; step < walk.end; step++) {
        wait_for_copies<AHEAD - 1>();
        wait_for_products<1>();
        __syncthreads();
        begin_products();
        if (has_products(step, walk, D)) {
            unsigned a = place_and_step(first + step % SLOTS * GRADIENT, 8);
            unsigned b = place_and_step(second + (step + RING - 2) % RING * SLICE + kw, 8);
#pragma unroll
            for (int h = 0; h < TALL; h++)
                multiply_transposed(sums, a + h * WIDE, Outputs::PLANE, b + h * ROW,
                                    Inputs::PLANE);
        }
        end_products();
        if (step + AHEAD < walk.end)
            loader.load(second, first, step + AHEAD, walk, x, dy, kh);
        end_copies();
    }
    wait_for_products<0>();
    hold(sums);

    float *to = sums_of_blocks + (blockIdx.x * 3 + kw) * N * COLUMNS;
    int row = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; i += 2) {
        int output = row + i / 2 % 2 * 8, column = i / 4 * 8 + threadIdx.x % 4 * 2;
        if (output < N)
            *reinterpret_cast<float2 *>(to + output * COLUMNS + column) =
                make_float2(sums[i], sums[i + 1]);
    }
}

// Add blocks' sums, [block][kh][kw][output][kd][input], to the gradient of the weights.
extern "C" __global__ void sum_parts(const float *sums_of_blocks, float *gradient,
                                     int blocks, int output_stride, int input_stride,
                                     int tap_stride) {
    const int size = 9 * N * COLUMNS;
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    int input = i % (Inputs::PLANES * 8), kd = i / (Inputs::PLANES * 8) % 3;
    int output = i / COLUMNS % N, khw = i / (COLUMNS * N);
    if (i >= size || input >= CIN) return;
    float sum = 0.0f;
#pragma unroll 4
    for (int block = 0; block < blocks; block++)
        sum += sums_of_blocks[(long long)block * size + i];
    gradient[output * output_stride + input * input_stride +
             (kd * 9 + khw) * tap_stride] = sum;
}
