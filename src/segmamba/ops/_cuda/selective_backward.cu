// The selective scan's gradients, from kept states and the adjoints behind segments.
//
// A block walks a segment of a row back, PART steps at a time. From the state kept before
// a part it walks forward once, leaving the states before every fourth step in shared
// memory; then four steps at a time, the last ones first, are done again and walked back.
// Thread (s, c) of a warp has states 4s to 4s + 3 of channels c and c + 8. Sums over
// states (for u and the step sizes) and over channels (for B and C) go through shuffles.
// Threads have states and channels in orders of their own: with the partner of a shuffle,
// one's first half is the other's second, and nothing has to be chosen.
// Constant besides the header's: GATED where there is z.

#include "selective.cuh"

#ifndef SEGMENTS

#define PART KEPT
#define GROUPS (PART / 4)
#define PITCH (PART + 4)
#define CHANNELS 16           // of a warp
#define SLOT (2 * 32 * 4 + 4) // of what a warp leaves before four steps
#define SHARE ((STATES * PART / 4 + THREADS - 1) / THREADS)

// What is summed over states goes where what it comes from was: `through` to x, the
// exponent's gradient to dy. Sums over channels go where states were left.
struct Memory {
    float B[STATES][PITCH], C[STATES][PITCH];
    float dt[WARPS][CHANNELS][PITCH], x[WARPS][CHANNELS][PITCH], dy[WARPS][CHANNELS][PITCH];
#ifdef GATED
    float y[WARPS][CHANNELS][PITCH];
#endif
    float left[WARPS][GROUPS][SLOT];
};

struct Inputs {
    const element *grad, *u, *delta, *z, *b, *c;
    const float *a, *skip, *bias;
};

// Gradients; those of a and the others that every row sums over its steps go to `sums`.
// `shares` is null where a block has all channels of a group.
struct Outputs {
    element *u, *delta, *z, *b, *c;
    float *shares, *sums;
};

struct Place {
    int lane, warp, s, group, part, room, first, begin, end;
    long long base;

    INLINE Place(const Sizes &sizes) {
        lane = threadIdx.x % 32, warp = threadIdx.x / 32, s = lane % 4;
        int parts = (sizes.per_group + WARPS * CHANNELS - 1) / (WARPS * CHANNELS);
        part = blockIdx.y % parts, group = blockIdx.y / parts;
        int inside = (part * WARPS + warp) * CHANNELS;
        room = sizes.per_group - inside;
        first = group * sizes.per_group + inside;
        begin = blockIdx.x * sizes.steps;
        end = min(begin + sizes.steps, sizes.L);
        base = (long long)min(first + row(0), sizes.E - 1) * sizes.L;
    }

    // The channel, in a warp, and the state that a thread has as [k][j].
    INLINE int channel(int k) const { return lane / 4 + 8 * (k ^ s / 2); }
    INLINE int state(int j) const { return 4 * s + (j ^ lane / 8); }

    // Where B's and C's rows of a state lie: neighbouring threads' in different banks.
    INLINE int line(int j) const { return 4 * (j ^ lane / 8) + s; }

    // A lane's quads are of every fourth row, at one place of a part. Rows that don't
    // exist give another.
    INLINE int at() const { return lane % GROUPS * 4; }
    INLINE int row(int q) const { return 4 * q + lane / GROUPS; }
    INLINE bool there(int q) const { return row(q) < room; }
    INLINE long long offset(int q, int L) const {
        return base + (there(q) ? 4LL * q * L : 0);
    }
};

INLINE void stage_matrix(float (*to)[PITCH], const element *rows, const Place &p, int t,
                         const Sizes &sizes) {
#pragma unroll
    for (int i = 0; i < SHARE; i++) {
        int n = (i * THREADS + threadIdx.x) / GROUPS;
        if (n >= STATES) break;
        long long row = (long long)min(n, sizes.N - 1) * sizes.L;
        float values[4];
        open(load_quad(rows + row, t + p.at(), sizes.L), values);
        mask(values, n < sizes.N, t + p.at(), p.end);
        store4(&to[n % 4 * 4 + n / 4][p.at()], values);
    }
}

// Step sizes, what drives the states, and the gradients before the gate.
INLINE void stage_rows(Memory &m, const Inputs &in, const Place &p, int t, int softly,
                       const Sizes &sizes) {
    Quad u[4], delta[4], grad[4], z[4];
#pragma unroll
    for (int q = 0; q < 4; q++) {
        long long row = p.offset(q, sizes.L);
        int at = t + p.at();
        u[q] = load_quad(in.u + row, at, sizes.L);
        delta[q] = load_quad(in.delta + row, at, sizes.L);
        grad[q] = load_quad(in.grad + row, at, sizes.L);
#ifdef GATED
        z[q] = load_quad(in.z + row, at, sizes.L);
#endif
    }
#pragma unroll
    for (int q = 0; q < 4; q++) {
        float x[4], dt[4], dy[4];
        open(u[q], x), open(delta[q], dt), open(grad[q], dy);
        soften(dt, in.bias && p.there(q) ? in.bias[p.first + p.row(q)] : 0.0f, softly);
#ifdef GATED
        multiply_gate(z[q], dy);
#endif
        mask(x, p.there(q), t + p.at(), p.end);
        mask(dt, p.there(q), t + p.at(), p.end);
        mask(dy, p.there(q), t + p.at(), p.end);
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] *= dt[i];
        store4(&m.dt[p.warp][p.row(q)][p.at()], dt);
        store4(&m.x[p.warp][p.row(q)][p.at()], x);
        store4(&m.dy[p.warp][p.row(q)][p.at()], dy);
    }
}

// A thread's states from (E, 16); zero where there are none.
INLINE void load_states(float (*to)[4], const float *from, const Place &p) {
#pragma unroll
    for (int k = 0; k < 2; k++) {
        int row = p.channel(k);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            to[k][j] = row < p.room ? from[(long long)row * STATES + p.state(j)] : 0.0f;
        }
    }
}

// Four steps forward from t on.
INLINE void do_steps(float (*state)[4], const float (*rate)[4], const Memory &m,
                     const Place &p, int t) {
    float dt[2][4], x[2][4];
#pragma unroll
    for (int k = 0; k < 2; k++) {
        load4(&m.dt[p.warp][p.channel(k)][t], dt[k]);
        load4(&m.x[p.warp][p.channel(k)][t], x[k]);
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float b[4];
        load4(&m.B[p.line(j)][t], b);
#pragma unroll
        for (int k = 0; k < 2; k++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                state[k][j] = state[k][j] * exp2_fast(rate[k][j] * dt[k][i]) + x[k][i] * b[i];
            }
        }
    }
}

// A thread's numbers: states, adjoints, rates and their gradients, [channel][state].
struct Walk {
    float state[2][4], adjoint[2][4], rate[2][4], of_rate[2][4];
};

// Sums at four steps: over a thread's states, of what goes to x, to dy and to y.
struct OverStates {
    float through[2][2][4];
#ifdef GATED
    float y[2][4];
#endif
};

// Four steps of a channel and state, forward and back. Gives what is summed over channels:
// B's four steps, and C's.
INLINE void return_state(Walk &w, OverStates &sums, int k, int j, const float *dt,
                         const float *x, const float *dy, const float *b, const float *c,
                         float *over_channels) {
    float decay[4], passed[4], after[4], state = w.state[k][j], now = w.adjoint[k][j];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        decay[i] = exp2_fast(w.rate[k][j] * dt[i]);
        passed[i] = decay[i] * state;
        state = after[i] = passed[i] + x[i] * b[i];
#ifdef GATED
        sums.y[k][i] += after[i] * c[i];
#endif
    }
#pragma unroll
    for (int i = 3; i >= 0; i--) {
        now += dy[i] * c[i];
        float moved = now * passed[i];
        sums.through[k][0][i] += now * b[i];
        sums.through[k][1][i] += moved * w.rate[k][j];
        over_channels[i] += now * x[i];
        over_channels[4 + i] += dy[i] * after[i];
        w.of_rate[k][j] += moved * dt[i];
        now *= decay[i];
    }
    w.adjoint[k][j] = now;
}

// Sum over a channel's threads, and put the sums where they belong.
INLINE void put_over_states(OverStates &sums, Memory &m, const Place &p, int t) {
    float *through = &sums.through[0][0][0];
    int row = p.channel(0);
    meet<16>(through, 2);
    fold<8>(through, 1);
    store4(p.s % 2 ? &m.dy[p.warp][row][t] : &m.x[p.warp][row][t], through);
#ifdef GATED
    float *y = &sums.y[0][0], *to = &m.y[p.warp][row][t + p.s % 2 * 2];
    meet<8>(y, 2);
    fold<4>(y, 1);
    to[0] = y[0], to[1] = y[1];
#endif
}

// Walk the g-th four steps of a part back, from the states before them.
INLINE void return_steps(Walk &w, Memory &m, const Place &p, int g) {
    float dt[2][4], x[2][4], dy[2][4], over_channels[2][16] = {};
    OverStates over_states = {};
#pragma unroll
    for (int k = 0; k < 2; k++) {
        load4(&m.dt[p.warp][p.channel(k)][4 * g], dt[k]);
        load4(&m.x[p.warp][p.channel(k)][4 * g], x[k]);
        load4(&m.dy[p.warp][p.channel(k)][4 * g], dy[k]);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int j = i % 2 * 2 + i / 2;  // states 0 and 2 meet, then 1 and 3
        float b[4], c[4];
        load4(&m.B[p.line(j)][4 * g], b);
        load4(&m.C[p.line(j)][4 * g], c);
#pragma unroll
        for (int k = 0; k < 2; k++) {
            return_state(w, over_states, k, j, dt[k], x[k], dy[k], b, c,
                         over_channels[i / 2] + i % 2 * 8);
        }
        if (i % 2) meet<16>(over_channels[i / 2], 16);
    }
    put_over_states(over_states, m, p, 4 * g);
#pragma unroll
    for (int i = 0; i < 8; i++) over_channels[0][8 + i] = over_channels[1][i];
    meet<16>(over_channels[0], 8);
    fold<8>(over_channels[0], 4);
    int line = p.lane / 4 % 2 * STATES + p.state(0);
    store4(&m.left[p.warp][g][4 * line], over_channels[0]);
}

INLINE void leave(const Walk &w, Memory &m, const Place &p, int g) {
#pragma unroll
    for (int k = 0; k < 2; k++) {
        store4(&m.left[p.warp][g][(32 * k + p.lane) * 4], w.state[k]);
    }
}

INLINE void take_up(Walk &w, const Memory &m, const Place &p, int g) {
#pragma unroll
    for (int k = 0; k < 2; k++) {
        load4(&m.left[p.warp][g][(32 * k + p.lane) * 4], w.state[k]);
    }
}

// B's and C's gradients at a part's steps, or a block's share of them.
INLINE void store_matrices(const Memory &m, const Outputs &out, const Place &p, int t,
                           const Sizes &sizes) {
    int step = threadIdx.x % PART, first = threadIdx.x / PART;
    if (t + step >= p.end) return;
    long long matrices = (long long)gridDim.z * (sizes.E / sizes.per_group);
    long long matrix = blockIdx.z * (long long)(sizes.E / sizes.per_group) + p.group;
    long long to = (matrix * sizes.N + first) * sizes.L + t + step;
    long long share = p.part * 2 * matrices * sizes.N * sizes.L;
#pragma unroll 1
    for (int kind = 0; kind < 2; kind++) {
        const float *from = &m.left[0][step / 4][kind * STATES * 4 + step % 4];
        element *all = (kind ? out.c : out.b) + to;
        float *part = out.shares + share + kind * matrices * sizes.N * sizes.L + to;
#pragma unroll 1
        for (int n = first; n < sizes.N; n += THREADS / PART) {
            float sum = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum += from[w * GROUPS * SLOT + 4 * n];
            if (out.shares) {
                *part = sum;
            } else {
                *all = from_float(sum);
            }
            all += (long long)(THREADS / PART) * sizes.L;
            part += (long long)(THREADS / PART) * sizes.L;
        }
    }
}

// Gradients of u, delta and z at a part's steps; sums for D and the bias.
INLINE void store_rows(const Memory &m, const Inputs &in, const Outputs &out,
                       const Place &p, int t, int softly, const float *skip,
                       float *of_skip, float *of_bias, const Sizes &sizes) {
#pragma unroll
    for (int q = 0; q < 4; q++) {
        long long row = p.offset(q, sizes.L);
        int at = t + p.at();
        float u[4], dy[4], dt[4], through[4], exponent[4];
        open(load_quad(in.u + row, at, sizes.L), u);
        open(load_quad(in.grad + row, at, sizes.L), dy);
        load4(&m.dt[p.warp][p.row(q)][p.at()], dt);
        load4(&m.x[p.warp][p.row(q)][p.at()], through);
        load4(&m.dy[p.warp][p.row(q)][p.at()], exponent);
#ifdef GATED
        float z[4], y[4];
        open(load_quad(in.z + row, at, sizes.L), z);
        load4(&m.y[p.warp][p.row(q)][p.at()], y);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float opened = sigmoid(z[i]), grad = dy[i];
            dy[i] = grad * z[i] * opened;
            z[i] = grad * (y[i] + skip[q] * u[i]) * opened * (1.0f + z[i] * (1.0f - opened));
        }
        store_quad(out.z + row, p.there(q), at, p.end, z);
#endif
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float slope = through[i] * u[i] + exponent[i] * LN2;
            if (softly) slope *= slope_of(dt[i]);
            bool here = before(at, i, p.end);
            of_skip[q] += here ? dy[i] * u[i] : 0.0f;
            of_bias[q] += here ? slope : 0.0f;
            u[i] = dy[i] * skip[q] + through[i] * dt[i];
            dt[i] = slope;
        }
        store_quad(out.u + row, p.there(q), at, p.end, u);
        store_quad(out.delta + row, p.there(q), at, p.end, dt);
    }
}

// A segment's sums for a (E, 16), for D (E) and for the bias (E).
INLINE void store_sums(float *to, const Walk &w, const Place &p, const float *of_skip,
                       const float *of_bias, const Sizes &sizes) {
    to += ((long long)blockIdx.z * gridDim.x + blockIdx.x) * (STATES + 2) * sizes.E;
#pragma unroll
    for (int k = 0; k < 2; k++) {
        if (p.channel(k) >= p.room) continue;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            long long channel = p.first + p.channel(k);
            to[channel * STATES + p.state(j)] = w.of_rate[k][j];
        }
    }
    to += (long long)STATES * sizes.E + p.first;
#pragma unroll
    for (int q = 0; q < 4; q++) {
        float skip = of_skip[q], bias = of_bias[q];
#pragma unroll
        for (int bit = 1; bit < GROUPS; bit *= 2) {
            skip += __shfl_xor_sync(0xffffffffu, skip, bit);
            bias += __shfl_xor_sync(0xffffffffu, bias, bit);
        }
        if (p.lane % GROUPS || !p.there(q)) continue;
        to[p.row(q)] = skip;
        to[sizes.E + p.row(q)] = bias;
    }
}

// Rates, and the adjoint behind the segment.
INLINE void begin_walk(Walk &w, const float *a, const float *adjoints, const float *last,
                       const Place &p, const Sizes &sizes) {
    bool end = blockIdx.x + 1 == sizes.segments;
#pragma unroll
    for (int k = 0; k < 2; k++) {
        int row = p.channel(k);
        long long channel = p.first + row;
        long long in_batch = (long long)blockIdx.z * sizes.E + channel;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int n = p.state(j);
            bool there = row < p.room && n < sizes.N;
            w.rate[k][j] = there ? a[channel * sizes.N + n] * LOG2E : 0.0f;
            w.adjoint[k][j] = there && end && last ? last[in_batch * sizes.N + n] : 0.0f;
            w.of_rate[k][j] = 0.0f;
        }
    }
    if (!end) {
        load_states(w.adjoint, adjoints + slot_of(blockIdx.x, p.first, sizes) * STATES, p);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 3)
scan_gradients(const element *grad, const element *u, const element *delta,
               const element *z, const element *b, const element *c, const float *a,
               const float *skip, const float *bias, const float *kept,
               const float *adjoints, const float *last, element *of_u,
               element *of_delta, element *of_z, element *of_b, element *of_c,
               float *shares, float *sums, int softly, int L, int E, int N,
               int per_group, int steps, int segments) {
    extern __shared__ __align__(16) char memory[];
    Memory &m = *reinterpret_cast<Memory *>(memory);
    Sizes sizes = {L, E, N, per_group, steps, segments};
    Place p(sizes);
    long long rows = (long long)blockIdx.z * E * L;
    long long matrix = ((long long)blockIdx.z * (E / per_group) + p.group) * N * L;
    Inputs in = {grad + rows, u + rows, delta + rows, z + rows, b + matrix, c + matrix,
                 a, skip, bias};
    Outputs out = {of_u + rows, of_delta + rows, of_z + rows, of_b, of_c, shares, sums};
    float D[4], of_skip[4] = {0, 0, 0, 0}, of_bias[4] = {0, 0, 0, 0};
#pragma unroll
    for (int q = 0; q < 4; q++) D[q] = skip && p.there(q) ? skip[p.first + p.row(q)] : 0;
    Walk w;
    begin_walk(w, a, adjoints, last, p, sizes);
    for (int t = p.begin + (p.end - p.begin - 1) / PART * PART; t >= p.begin; t -= PART) {
        int groups = (min(PART, p.end - t) + 3) / 4;
        __syncthreads();
        stage_matrix(m.B, in.b, p, t, sizes);
        stage_matrix(m.C, in.c, p, t, sizes);
        stage_rows(m, in, p, t, softly, sizes);
        load_states(w.state, kept + kept_at(t, p.first, sizes), p);
        __syncthreads();
#pragma unroll 1
        for (int g = 0; g + 1 < groups; g++) {
            leave(w, m, p, g);
            do_steps(w.state, w.rate, m, p, 4 * g);
        }
#pragma unroll 1
        for (int g = groups - 1; g >= 0; g--) {
            if (g < groups - 1) take_up(w, m, p, g);
            return_steps(w, m, p, g);
        }
        __syncthreads();
        store_matrices(m, out, p, t, sizes);
        store_rows(m, in, out, p, t, softly, D, of_skip, of_bias, sizes);
    }
    store_sums(sums, w, p, of_skip, of_bias, sizes);
}

#else

// Sum what blocks give, over all rows and segments: of a (E, 16), D and the bias. Blocks
// of y = 1 sum the shares in B's and C's gradients.
extern "C" __global__ void finish(const float *sums, const float *shares, float *of_a,
                                  float *of_skip, float *of_bias, element *of_b,
                                  element *of_c, int programs, int E, int N, int parts,
                                  int matrices, int L) {
    if (blockIdx.y) {
        long long all = (long long)matrices * N * L;
        for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < 2 * all;
             i += (long long)gridDim.x * blockDim.x) {
            float sum = 0.0f;
#pragma unroll 8
            for (int part = 0; part < parts; part++) sum += shares[part * 2 * all + i];
            element *to = i < all ? of_b + i : of_c + (i - all);
            *to = from_float(sum);
        }
        return;
    }
    __shared__ float parts_s[SEGMENTS][32];
    int lane = threadIdx.x % 32, segment = threadIdx.x / 32;
    int index = blockIdx.x * 32 + lane, width = (STATES + 2) * E;
    if (blockIdx.x * 32 >= width) return;
    float sum = 0.0f;
#pragma unroll 4
    for (int i = segment; i < programs && index < width; i += SEGMENTS) {
        sum += sums[(long long)i * width + index];
    }
    parts_s[segment][lane] = sum;
    __syncthreads();
    if (segment || index >= width) return;
    for (int i = 1; i < SEGMENTS; i++) sum += parts_s[i][lane];
    int channel = index / STATES, n = index % STATES;
    if (index < STATES * E) {
        if (n < N) of_a[channel * N + n] = sum;
    } else if (index < (STATES + 1) * E) {
        if (of_skip) of_skip[index - STATES * E] = sum;
    } else if (of_bias) {
        of_bias[index - (STATES + 1) * E] = sum;
    }
}

#endif
