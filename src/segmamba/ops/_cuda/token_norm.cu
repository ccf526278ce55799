// Kernels of the layer norm over the channels of tokens.
//
// LANES neighbouring threads do a token, each MINE times VEC of its channels, all in
// registers. The backward finds mean and deviation again: it reads x anyway.
//
// Constants: X, Y and WEIGHT, types of x, of the result and of the weights; CHANNELS of
// a token; VEC, 1, 4 or 8, a divisor of them; LANES, a power of two up to 32.

#define THREADS 256
#define WARPS (THREADS / 32)
#define GROUPS (THREADS / LANES)  // tokens of a block at a time
#define VECTORS (CHANNELS / VEC)
#define MINE ((VECTORS + LANES - 1) / LANES)

// Call body(first channel, first number in registers) for each vector of a thread.
template <class Body> INLINE void each_vector(Body body) {
    const int lane = threadIdx.x % LANES;
#pragma unroll
    for (int k = 0; k < MINE; k++) {
        int vector = lane + k * LANES;
        if (VECTORS % LANES == 0 || vector < VECTORS) body(vector * VEC, k * VEC);
    }
}

template <class Body> INLINE void each_channel(Body body) {
    each_vector([&](int, int at) {
#pragma unroll
        for (int j = 0; j < VEC; j++) body(at + j);
    });
}

template <class T> INLINE void load_all(const T *from, float *values) {
    each_vector([&](int channel, int at) { load(from + channel, values + at); });
}

INLINE float sum_of_lanes(float value) {
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2)
        value += __shfl_xor_sync(0xffffffffu, value, step);
    return value;
}

// Turn channels into normed ones; give 1 / deviation.
INLINE float normalise(float *values, float eps) {
    float sum = 0.0f, squares = 0.0f;
    each_channel([&](int i) { sum += values[i]; });
    float mean = sum_of_lanes(sum) * (1.0f / CHANNELS);
    each_channel([&](int i) {
        values[i] -= mean;
        squares += values[i] * values[i];
    });
    float inverse = 1.0f / sqrtf(sum_of_lanes(squares) * (1.0f / CHANNELS) + eps);
    each_channel([&](int i) { values[i] *= inverse; });
    return inverse;
}

extern "C" __global__ void __launch_bounds__(THREADS)
token_norm(const X *__restrict__ x, const WEIGHT *__restrict__ weight,
           const WEIGHT *__restrict__ bias, Y *__restrict__ out, int tokens,
           float eps) {
    int token = blockIdx.x * GROUPS + threadIdx.x / LANES;
    bool valid = token < tokens;
    long long base = (long long)token * CHANNELS;
    float values[MINE * VEC] = {}, scale[MINE * VEC], shift[MINE * VEC];
    if (valid) load_all(x + base, values);
    load_all(weight, scale);
    load_all(bias, shift);
    normalise(values, eps);
    if (!valid) return;
    each_channel([&](int i) { values[i] = values[i] * scale[i] + shift[i]; });
    each_vector([&](int channel, int at) { store(out + base + channel, values + at); });
}

// Add a thread's sums to those of the others with the same channels in its warp. All
// threads take part, those without channels too.
INLINE void add_in_warp(float *sums) {
#pragma unroll
    for (int i = 0; i < MINE * VEC; i++) {
#pragma unroll
        for (int step = LANES; step < 32; step *= 2)
            sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], step);
    }
}

// Gradient of x; and of weight and bias a block's part, (blocks, 2, CHANNELS).
extern "C" __global__ void __launch_bounds__(THREADS)
token_norm_back(const Y *__restrict__ grad, const X *__restrict__ x,
                const WEIGHT *__restrict__ weight, X *__restrict__ grad_x,
                float *__restrict__ parts, int tokens, float eps) {
    __shared__ float total[2 * CHANNELS];
    float scale[MINE * VEC], of_weight[MINE * VEC] = {}, of_bias[MINE * VEC] = {};
    load_all(weight, scale);
    for (int first = blockIdx.x * GROUPS; first < tokens; first += gridDim.x * GROUPS) {
        int token = first + threadIdx.x / LANES;
        bool valid = token < tokens;
        long long base = (long long)token * CHANNELS;
        float values[MINE * VEC] = {}, g[MINE * VEC] = {};
        if (valid) {
            load_all(x + base, values);
            load_all(grad + base, g);
        }
        float inverse = normalise(values, eps), sum = 0.0f, along = 0.0f;
        each_channel([&](int i) {
            of_weight[i] += g[i] * values[i];
            of_bias[i] += g[i];
            g[i] *= scale[i];
            sum += g[i];
            along += g[i] * values[i];
        });
        sum = sum_of_lanes(sum) * (1.0f / CHANNELS);
        along = sum_of_lanes(along) * (1.0f / CHANNELS);
        if (!valid) continue;  // the shuffles are behind it
        each_channel([&](int i) { g[i] = (g[i] - sum - values[i] * along) * inverse; });
        each_vector([&](int at, int i) { store(grad_x + base + at, g + i); });
    }
    add_in_warp(of_weight);
    add_in_warp(of_bias);
    for (int warp = 0; warp < WARPS; warp++) {  // in turn, for the same bits every time
        if (threadIdx.x / 32 == warp && threadIdx.x % 32 < LANES) {
            each_vector([&](int channel, int at) {
#pragma unroll
                for (int j = 0; j < VEC; j++) {
                    float *to = total + channel + j;
                    to[0] = (warp ? to[0] : 0.0f) + of_weight[at + j];
                    to[CHANNELS] = (warp ? to[CHANNELS] : 0.0f) + of_bias[at + j];
                }
            });
        }
        __syncthreads();
    }
    for (int i = threadIdx.x; i < 2 * CHANNELS; i += THREADS)
        parts[blockIdx.x * 2LL * CHANNELS + i] = total[i];
}
