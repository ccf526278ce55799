// Convolution of 3x3x3 voxels with padding 1, for Hopper's GPUs.
//
// Features are channels-last. A block keeps all weights in shared memory and walks down
// columns of voxels along D, two slices a step. Of the features it keeps a ring of six
// slices, each with a border of a voxel. Each of the 27 taps is another start of a
// product's A: nothing is gathered.
//
// A warpgroup does a product's 64 rows, 8 by 8 voxels, in both slices. What a step has
// computed is written while the next one computes, and so is read what comes after it.
//
// Constants: KIND, 1 bfloat16, 2 float16; CIN, input channels, 4 or a multiple of 8; N,
// output channels, a multiple of 16; ADD, whether y already holds something to add to.

#include "conv3d.cuh"

#define THREADS 256
#define ROW (WIDE + 2)
#define TERMS ((CIN + 15) / 16) // products that a tap takes
#define PLANES (2 * TERMS)
#define RING 6
#define WEIGHTS (27 * PLANES * N)

typedef Window<TALL + 2, ROW, CIN, THREADS> Border;
#define PLANE Border::PLANE
#define SLICE (PLANES * PLANE)

// --- products and results ----------------------------------------------------------------

// Three taps along W, for row `row` of nine (kd, kh), in both slices.
INLINE void multiply_row(float (&sums)[2][N / 2], unsigned ring, int base, int row,
                         unsigned weights) {
    unsigned upper = ring + (base + row / 3) % RING * SLICE + row % 3 * ROW;
    unsigned lower = ring + (base + row / 3 + 1) % RING * SLICE + row % 3 * ROW;
    weights += row * 3 * PLANES * N;
#pragma unroll
    for (int w = 0; w < 3; w++)
#pragma unroll
        for (int k = 0; k < TERMS; k++) {
            unsigned a = w + 2 * k * PLANE, b = (w * PLANES + 2 * k) * N;
            multiply(sums[0], upper + a, ROW, weights + b, 8);
            multiply(sums[1], lower + a, ROW, weights + b, 8);
        }
    end_products();
}

INLINE unsigned pair(float first, float second) {
    float values[2] = {first, second};
    return pack(element(), values);
}

// A thread's results: pairs of channels of two voxels, one below the other, in two slices.
struct Results {
    unsigned pairs[2][N / 4];
    element *at; // first voxel, where this thread writes first
    bool inside[2][2];
    long long next[2]; // from slice to slice, from row to row
};

INLINE void aim(Results &results, element *y, int pitch, const Features &x,
                const Column &column, int z, int group) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    int h = column.h + 2 * warp, w = column.w + 8 * group + lane / 4;
    long long slice = (long long)x.H * x.W;
    results.at = y + ((column.item * (long long)x.D + z) * slice + h * x.W + w) * pitch;
    results.next[0] = slice * pitch;
    results.next[1] = x.W * pitch;
#pragma unroll
    for (int s = 0; s < 2; s++)
#pragma unroll
        for (int row = 0; row < 2; row++)
            results.inside[s][row] = w < x.W && h + row < x.H && z + s < x.D;
}

// What is there already, in the order of the products' sums.
INLINE void read(Results &results) {
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        int s = i / (N / 4), j = i % (N / 4), row = j % 2;
        const element *from = results.at + s * results.next[0] + row * results.next[1] +
                              j / 2 * 8 + threadIdx.x % 4 * 2;
        results.pairs[s][j] =
            results.inside[s][row] ? *reinterpret_cast<const unsigned *>(from) : 0;
    }
}

INLINE void round_sums(Results &results, const float (&sums)[2][N / 2]) {
#pragma unroll
    for (int s = 0; s < 2; s++)
#pragma unroll
        for (int j = 0; j < N / 4; j++) {
            float before[2] = {0.0f, 0.0f};
            if (ADD) unpack(element(), results.pairs[s][j], before);
            results.pairs[s][j] =
                pair(before[0] + sums[s][2 * j], before[1] + sums[s][2 * j + 1]);
        }
}

// Neighbours swap pairs so that each has four channels, and four threads 32 bytes.
INLINE void write(const Results &results) {
    bool odd = threadIdx.x & 1;
    element *at = results.at + (threadIdx.x & 1) * 8 + (threadIdx.x & 2) * 2;
#pragma unroll
    for (int i = 0; i < N / 4; i++) {
        int s = i / (N / 8), row = i % 2, j = i % (N / 8) / 2 * 4 + row;
        unsigned left = results.pairs[s][j], right = results.pairs[s][j + 2];
        unsigned other = __shfl_xor_sync(0xffffffffu, odd ? left : right, 1);
        uint2 four = odd ? make_uint2(other, right) : make_uint2(left, other);
        element *to = at + s * results.next[0] + row * results.next[1] + j / 4 * 16;
        if (results.inside[s][row]) *reinterpret_cast<uint2 *>(to) = four;
    }
}

// --- the kernel ------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    conv3d(const element *features, const element *packed, element *y, int batch, int D,
           int H, int W, int pitch, int y_pitch) {
    extern __shared__ __align__(128) unsigned char memory[];
    const unsigned ring = shared_place(memory), weights = ring + RING * SLICE;
    const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
    const Features x = {features, D, H, W, pitch};
    const int deep = parts(D, 2);
    const long long total = (long long)batch * deep * parts(H, TALL) * parts(W, WIDE);
    const int begin = total * blockIdx.x / gridDim.x;
    const int end = total * (blockIdx.x + 1) / gridDim.x;
    // Descriptors' first halves: where, and how far the next eight channels are.
    const unsigned tiles = place_and_step(ring + 8 * group, PLANE);
    const unsigned filters = place_and_step(weights, N);

    if (CIN % 16) { // channels that aren't there
        for (int i = threadIdx.x; i < RING * SLICE; i += THREADS)
            reinterpret_cast<uint4 *>(memory)[i] = uint4();
        __syncthreads();
    }
    for (int i = threadIdx.x; i < WEIGHTS; i += THREADS)
        copy_async<16>(weights + i, packed + 8 * i, true);

    Border border;
    Column column;
    Results results;
    float sums[2][N / 2];
    for (int step = begin, base = 0; step < end; step++, base = (base + 2) % RING) {
        int z = step % deep * 2;
        if (z == 0 || step == begin) {
            column = column_of(step / deep, x);
            border.aim(x, column.h - 1, column.w - 1);
#pragma unroll 1
            for (int i = 0; i < 4; i++)
                border.load(ring + (base + i) % RING * SLICE, x, column.item, z - 1 + i);
            end_copies();
            wait_for_copies<0>();
            __syncthreads();
        }
#pragma unroll
        for (int i = 0; i < N; i++) sums[i % 2][i / 2] = 0.0f;
        begin_products();
        multiply_row(sums, tiles, base, 0, filters);
        if (step > begin) write(results);
        if (step + 1 < end && z + 2 < D)
#pragma unroll 1
            for (int i = 4; i < RING; i++)
                border.load(ring + (base + i) % RING * SLICE, x, column.item, z - 1 + i);
        end_copies();
        begin_products();
#pragma unroll 1
        for (int row = 1; row < 9; row++) multiply_row(sums, tiles, base, row, filters);
        aim(results, y, y_pitch, x, column, z, group);
        if (ADD) read(results);
        wait_for_products<0>();
        hold(sums[0]);
        hold(sums[1]);
        round_sums(results, sums);
        wait_for_copies<0>();
        __syncthreads();
    }
    if (begin < end) write(results);
}
