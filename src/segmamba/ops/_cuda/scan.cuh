// What the scan's kernels share.
//
// A block does CHUNK steps of a row of sequences (direction times batch) for WARPS groups of
// 32 channels. Rows of u, of the step sizes' code and of B and C are by position; rows of
// y and of its gradient by token. Constants: KIND, CHUNK, WARPS. Offsets within a row of
// sequences fit 31 bits.

#define STATES 16
#define THREADS (32 * WARPS)
#define STEPS 8  // that are loaded at a time
#define PART (CHUNK < 32 ? CHUNK : 32)  // steps that the backward does at a time
#define PARTS (CHUNK / PART)

// What a block works on.
struct Place {
    int lane, warp, chunk, row, direction, channel, count;
    bool valid;       // the channel exists
    long long base;   // first row
};

INLINE Place place_of(int chunk, int L, int batch, int E) {
    Place p;
    p.lane = threadIdx.x % 32;
    p.warp = threadIdx.x / 32;
    p.chunk = chunk;
    p.row = blockIdx.z;
    p.direction = p.row / batch;
    int inside = blockIdx.y * THREADS + threadIdx.x;
    p.valid = inside < E;
    p.channel = p.valid ? inside : 0;
    p.count = min(CHUNK, L - chunk * CHUNK);
    p.base = (long long)p.row * L + chunk * CHUNK;
    return p;
}

// States' rows (count, 16 neighbours) of a tensor into shared memory, zero behind them.
INLINE void stage_states(float *to, int width, const element *from, int stride,
                         int count, int rows) {
    for (int i = threadIdx.x; i < rows * (STATES / 4); i += THREADS) {
        int t = i / (STATES / 4), n = i % (STATES / 4) * 4;
        float four[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (t < count) load4(from + t * stride + n, four);
        store4(to + t * width + n, four);
    }
}

// The step sizes' code, (rank, ROWS) in shared memory, zero behind the last row.
template <int ROWS, int UNROLL = 4>
INLINE void stage_code(float *to, const element *from, int stride, int rank, int count) {
#pragma unroll UNROLL
    for (unsigned i = threadIdx.x; i < ROWS * rank; i += THREADS) {
        int t = i % ROWS, q = i / ROWS;
        to[i] = t < count ? to_float(from[t * stride + q]) : 0.0f;
    }
}

// The order of a direction's tokens.
struct Order {
    int stride, reverse, L, runs;

    INLINE Order(const int *orders, int direction, int length) {
        stride = orders[2 * direction], reverse = orders[2 * direction + 1];
        L = length, runs = L / stride;
    }

    // The token at a position; at one behind the last, that of the last.
    INLINE int token(int position) const {
        position = min(position, L - 1);
        if (reverse) position = L - 1 - position;
        int run = (unsigned)position / stride;
        return (position - run * stride) * runs + run;
    }
};

// Where the tokens of `rows` positions lie in a row of sequences, (L, E); positions
// behind the last give one that exists.
INLINE void stage_tokens(int *to, const int *orders, int direction, int first, int L,
                         int E, int rows) {
    Order order(orders, direction, L);
    for (int t = threadIdx.x; t < rows; t += THREADS) to[t] = order.token(first + t) * E;
}

// COUNT values of a channel, each `at` an offset of its step; steps behind the end give
// the last one again. Loads don't depend on conditions, so that all of them are on their
// way before the first one is waited for.
template <int COUNT, class At>
INLINE void gather(float *values, const element *from, int channel, int t0, int count,
                   At at) {
    element found[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        found[i] = from[at(min(t0 + i, max(count, 1) - 1)) + channel];
    }
#pragma unroll
    for (int i = 0; i < COUNT; i++) values[i] = to_float(found[i]);
}

// The same for rows of a stride one behind the other.
template <int COUNT>
INLINE void column(float *values, const element *from, int channel, int t0, int stride,
                   int count) {
    gather<COUNT>(values, from, channel, t0, count, [=](int t) { return t * stride; });
}

// Step sizes of a channel at COUNT steps from t0 on; zero behind the chunk's end.
template <int COUNT>
INLINE void step_sizes(float *dt, const Place &p, const float *code_s, int rows, int t0,
                       const float *weight, const float *bias, int rank, int E,
                       int count) {
    float offset = bias[p.direction * E + p.channel];
#pragma unroll
    for (int i = 0; i < COUNT; i++) dt[i] = offset;
    for (int q = 0; q < rank; q++) {
        float w = weight[(p.direction * rank + q) * E + p.channel];
#pragma unroll
        for (int i = 0; i < COUNT; i += 4) {
            float four[4];
            load4(code_s + q * rows + t0 + i, four);
#pragma unroll
            for (int j = 0; j < 4; j++) dt[i + j] += w * four[j];
        }
    }
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        dt[i] = t0 + i < count ? softplus(dt[i]) : 0.0f;
    }
}

INLINE void load_rates(float *rate, const float *a, const Place &p, int E) {
#pragma unroll
    for (int n = 0; n < STATES; n++) {
        rate[n] = a[(p.direction * STATES + n) * E + p.channel];
    }
}

INLINE void load16(const float *from, float *values) {
#pragma unroll
    for (int n = 0; n < STATES; n += 4) load4(from + n, values + n);
}

// Store where a condition holds, without a branch.
INLINE void store_if(bool condition, element *to, element value) {
#ifdef EMULATED
    if (condition) *to = value;
#elif KIND == 0
    asm volatile("{.reg .pred p; setp.ne.s32 p, %2, 0; @p st.global.f32 [%0], %1;}"
                 ::"l"(to), "f"(value), "r"((int)condition) : "memory");
#else
    asm volatile("{.reg .pred p; setp.ne.s32 p, %2, 0; @p st.global.u16 [%0], %1;}"
                 ::"l"(to), "h"(value.bits), "r"((int)condition) : "memory");
#endif
}

// Where slot i lies in what is kept, (rows, slots + 1, STATES + 1, E).
INLINE long long slot_of(const Place &p, int i, int slots, int E) {
    return ((long long)p.row * (slots + 1) + i) * (STATES + 1) * E;
}
