// The scan's gradients: adjoints of chunks from a zero end, then everything.

#include "scan.cuh"

// The adjoint with which each chunk but the first begins, from a zero end; it goes to
// slot chunk - 1, where the carry wants it. grad is by token, of `grad_rows` rows of
// sequences: one for each case, or one for each direction too.
extern "C" __global__ void __launch_bounds__(THREADS)
adjoint_chunks(const element *grad, const element *code, const element *c,
               const float *a, const float *weight, const float *bias,
               const int *orders, float *adjoints, int L, int E, int per_group,
               int batch, int chunks, int grad_rows, int rank, int code_stride,
               int c_stride) {
    __shared__ __align__(16) float C[CHUNK * STATES];
    __shared__ int tokens[CHUNK];
    extern __shared__ __align__(16) float code_s[];
    Place p = place_of(blockIdx.x + 1, L, per_group, batch, E);
    code += p.base * code_stride;
    c += p.base * c_stride + p.group * STATES;
    grad += (long long)(p.row % grad_rows) * L * E + p.channel;
    stage_states(C, STATES, c, c_stride, p.count, CHUNK);
    stage_code(code_s, code, code_stride, rank, p.count, CHUNK);
    stage_tokens(tokens, orders, p.direction, p.chunk * CHUNK, L, CHUNK);
    float rate[STATES], adjoint[STATES];
    load_rates(rate, a, p, E);
#pragma unroll
    for (int n = 0; n < STATES; n++) adjoint[n] = 0.0f;
    __syncthreads();
    for (int t0 = CHUNK - STEPS; t0 >= 0; t0 -= STEPS) {
        float dt[STEPS], dy[STEPS];
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            bool here = p.valid && t0 + i < p.count;
            dy[i] = here ? to_float(grad[(long long)tokens[t0 + i] * E]) : 0.0f;
        }
        step_sizes<STEPS>(dt, p, code_s, CHUNK, t0, code, code_stride, weight, bias, rank, E,
                          p.count);
#pragma unroll
        for (int i = STEPS - 1; i >= 0; i--) {
            float Ct[STATES];
            load16(C + (t0 + i) * STATES, Ct);
#pragma unroll
            for (int n = 0; n < STATES; n++) {
                adjoint[n] = (adjoint[n] + dy[i] * Ct[n]) * exp2_fast(rate[n] * dt[i]);
            }
        }
    }
    if (!p.valid) return;
    adjoints += slot_of(p, p.chunk - 1, chunks, E) + p.channel;
#pragma unroll
    for (int n = 0; n < STATES; n++) adjoints[(long long)n * E] = adjoint[n];
}

// --- all gradients -------------------------------------------------------------------
//
// A chunk is done in parts of PART steps, the last one first. In a part a warp walks
// forward once, leaving its states before every fourth step in shared memory; then four
// steps at a time are replayed into registers and walked back. Thread (s, c) of a warp
// has states 4s to 4s + 3 of channels 4c to 4c + 3, so that few shuffles sum over
// channels (for B, C) and over states (for u and the step sizes).

#define PART (CHUNK < 32 ? CHUNK : 32)
#define GROUPS (PART / 4)

struct Shared {
    float BC[PART * 2 * STATES];
    float sums[2][WARPS][4][32];     // gradients of B and C at four steps, two buffers
    float dt[WARPS][PART][32];
    element u[WARPS][PART][32];
    float left[WARPS][GROUPS][4][32][4];  // states, four of them a thread and quad
    int tokens[PART];
};

// A warp's thread: which states and channels it has.
struct Square {
    int warp, s, c;
    long long corner;  // of its states and channels in an (STATES, E) array
    bool valid;        // the channels exist
};

INLINE void load_square(float (*to)[4], const float *from, const Square &q, int E) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
#pragma unroll
        for (int k = 0; k < 4; k++) to[j][k] = 0.0f;
        if (q.valid) load4(from + q.corner + (long long)j * E, to[j]);
    }
}

// Step sizes, u, B, C and tokens of a part into shared memory.
INLINE void stage_part(Shared &m, float *code_s, const Place &p, int first, int count,
                       const element *u, const element *code, const element *b,
                       const element *c, const float *weight, const float *bias,
                       const int *orders, int L, int E, int rank, int code_stride,
                       int b_stride, int c_stride) {
    u += (long long)first * E, code += (long long)first * code_stride;
    b += (long long)first * b_stride, c += (long long)first * c_stride;
    __syncthreads();
    stage_states(m.BC, 2 * STATES, b, b_stride, count, PART);
    stage_states(m.BC + STATES, 2 * STATES, c, c_stride, count, PART);
    stage_code(code_s, code, code_stride, rank, count, PART);
    stage_tokens(m.tokens, orders, p.direction, p.chunk * CHUNK + first, L, PART);
    __syncthreads();
    for (int t0 = 0; t0 < PART; t0 += STEPS) {
        float dt[STEPS], x[STEPS];
        column<STEPS>(x, u, p, t0, E, count);
        step_sizes<STEPS>(dt, p, code_s, PART, t0, code, code_stride, weight, bias, rank,
                          E, count);
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            m.dt[p.warp][t0 + i][p.lane] = dt[i];
            m.u[p.warp][t0 + i][p.lane] = from_float(x[i]);
        }
    }
    __syncwarp();
}

// One step forward; gives decay times state, and the decay, where they are wanted.
INLINE void step_forward(float (*state)[4], const float (*rate)[4], const Shared &m,
                         const Square &q, int t, float (*passed)[4], float (*decay)[4]) {
    float dt[4], u[4], B[4];
    load4(&m.dt[q.warp][t][4 * q.c], dt);
    load4(&m.u[q.warp][t][4 * q.c], u);
    load4(m.BC + t * 2 * STATES + 4 * q.s, B);
#pragma unroll
    for (int k = 0; k < 4; k++) {
        float drive = dt[k] * u[k];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float d = exp2_fast(rate[j][k] * dt[k]);
            float w = d * state[j][k];
            state[j][k] = w + drive * B[j];
            if (passed) passed[j][k] = w, decay[j][k] = d;
        }
    }
}

INLINE void walk(float (*state)[4], const float (*rate)[4], Shared &m, const Square &q,
                 bool leave) {
    int lane = threadIdx.x % 32;
    for (int g = 0; g < GROUPS; g++) {
        if (leave) {
#pragma unroll
            for (int j = 0; j < 4; j++) store4(m.left[q.warp][g][j][lane], state[j]);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            step_forward(state, rate, m, q, 4 * g + i, nullptr, nullptr);
        }
    }
}

// Sum pairs of values with the lane across: thread keeps the half that its bit names.
template <int COUNT> INLINE void fold(float *values, int bit) {
    bool high = threadIdx.x & bit;
#pragma unroll
    for (int i = 0; i < COUNT / 2; i++) {
        float away = high ? values[i] : values[i + COUNT / 2];
        float here = high ? values[i + COUNT / 2] : values[i];
        values[i] = here + __shfl_xor_sync(0xffffffffu, away, bit);
    }
}

INLINE float pick(const float *four, int i) {
    float low = i & 1 ? four[1] : four[0], high = i & 1 ? four[3] : four[2];
    return i & 2 ? high : low;
}

// Gradients of one channel, the thread's own, in one block's chunks.
struct Sums {
    float skip, bias;
};

// Where gradients go.
struct Targets {
    element *u, *step;
    void *bc;
    int step_stride, bc_stride;
};

// Gradients of u and of the step size of the thread's own channel at one step.
INLINE void finish_step(Sums &sums, const Targets &to, const Shared &m, const Place &p,
                        int t, bool here, float dy, float through, float exponent,
                        float D, int E) {
    float dt = m.dt[p.warp][t][p.lane], u = to_float(m.u[p.warp][t][p.lane]);
    float slope = through * u + exponent * LN2;
#ifndef GIVEN
    slope *= 1.0f - exp2_fast(-LOG2E * dt);
#endif
    sums.skip += dy * u;
    sums.bias += slope;
    if (!here || !p.valid) return;
    to.u[(long long)t * E + p.channel] = from_float(dy * D + through * dt);
    to.step[(long long)t * to.step_stride + p.channel] = from_float(slope);
}

// Gradients of B and C at four steps, summed over the block's channels.
INLINE void finish_states(const Targets &to, const Shared &m, int buffer, int t0,
                          int count, int columns) {
    for (int i = threadIdx.x; i < 128; i += THREADS) {
        int t = t0 + i / 32, n = i % 32;
        if (t >= count) continue;
        float total = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) total += m.sums[buffer][w][i / 32][n];
        long long at = (long long)t * to.bc_stride + (n < STATES ? n : columns + n - STATES);
#ifdef SPLIT
        static_cast<float *>(to.bc)[at] = total;
#else
        static_cast<element *>(to.bc)[at] = from_float(total);
#endif
    }
}

// Walk the four steps of a group back.
INLINE void return_group(float (*adjoint)[4], float (*of_rate)[4], Sums &sums,
                         const float (*rate)[4], Shared &m, const Targets &to,
                         const Place &p, const Square &q, int g, int count, float D,
                         const element *grad, int E, int columns) {
    float decay[4][4][4], passed[4][4][4], state[4][4], dy[4][4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int t = 4 * g + i;
#pragma unroll
        for (int k = 0; k < 4; k++) dy[i][k] = 0.0f;
        if (q.valid && t < count) load4(grad + (long long)m.tokens[t] * E, dy[i]);
    }
#pragma unroll
    for (int j = 0; j < 4; j++) load4(m.left[q.warp][g][j][p.lane], state[j]);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        step_forward(state, rate, m, q, 4 * g + i, passed[i], decay[i]);
    }
#pragma unroll
    for (int i = 3; i >= 0; i--) {
        int t = 4 * g + i;
        float dt[4], u[4], B[4], C[4], of_states[8], through[4], exponent[4];
        load4(&m.dt[q.warp][t][4 * q.c], dt);
        load4(&m.u[q.warp][t][4 * q.c], u);
        load4(m.BC + t * 2 * STATES + 4 * q.s, B);
        load4(m.BC + t * 2 * STATES + STATES + 4 * q.s, C);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            float drive = dt[k] * u[k];
            through[k] = exponent[k] = 0.0f;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float now = adjoint[j][k] + dy[i][k] * C[j];
                float after = passed[i][j][k] + drive * B[j];
                float moved = now * passed[i][j][k];
                of_states[j] = k ? of_states[j] + now * drive : now * drive;
                of_states[4 + j] =
                    k ? of_states[4 + j] + dy[i][k] * after : dy[i][k] * after;
                through[k] += now * B[j];
                exponent[k] += moved * rate[j][k];
                of_rate[j][k] += moved * dt[k];
                adjoint[j][k] = now * decay[i][j][k];
            }
        }
        fold<8>(of_states, 16);
        fold<4>(of_states, 8);
        fold<2>(of_states, 4);
        fold<4>(through, 2);
        fold<2>(through, 1);
        fold<4>(exponent, 2);
        fold<2>(exponent, 1);
        int n = (q.c & 4 ? STATES : 0) + 4 * q.s + (q.c & 3);
        m.sums[g & 1][q.warp][i][n] = of_states[0];
        finish_step(sums, to, m, p, t, t < count, pick(dy[i], q.s), through[0],
                    exponent[0], D, E);
    }
    __syncthreads();
    finish_states(to, m, g & 1, 4 * g, count, columns);
}

// All gradients, chunk by chunk, from true first states and true last adjoints.
//
// Block (p, part, row): chunks p, p + P, ... of a row of sequences. Writes gradients of u
// and of the step sizes before softplus (or of the given ones), those of B and C summed
// over the block's channels, and, for each p, (P, rows, STATES + 2, E) sums: for A, for D, and
// of the step sizes' gradients. SPLIT: several blocks share a group's B and C, and each
// writes a (rows, L, 2 STATES groups) float part of its own.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
scan_gradients(const element *grad, const element *u, const element *code,
               const element *b, const element *c, const float *a, const float *weight,
               const float *bias, const float *skip, const int *orders,
               const float *kept, const float *adjoints, element *grad_u,
               element *grad_step, void *grad_bc, float *partial, int L, int E,
               int per_group, int batch, int chunks, int grad_rows, int rank,
               int code_stride, int b_stride, int c_stride, int step_stride,
               int bc_stride, int columns) {
    extern __shared__ __align__(16) char memory[];
    Shared &m = *reinterpret_cast<Shared *>(memory);
    float *code_s = reinterpret_cast<float *>(memory + sizeof(Shared));
    Place p = place_of(blockIdx.x, L, per_group, batch, E);
    Square q = {p.warp, p.lane % 4, p.lane / 4, 0, false};
    int parts = (per_group + THREADS - 1) / THREADS, part = blockIdx.y % parts;
    int inside = part * THREADS + p.warp * 32 + 4 * q.c;
    q.valid = inside < per_group;
    int corner = p.group * per_group + (q.valid ? inside : 0);
    q.corner = 4LL * q.s * E + corner;
    grad += (long long)(p.row % grad_rows) * L * E + corner;
    float D = skip[p.direction * E + p.channel];
    float rate[4][4], of_rate[4][4], state[4][4], adjoint[4][4];
    Sums sums = {0.0f, 0.0f};
    load_square(rate, a + (long long)p.direction * STATES * E, q, E);
#pragma unroll
    for (int j = 0; j < 4; j++) {
#pragma unroll
        for (int k = 0; k < 4; k++) of_rate[j][k] = 0.0f;
    }
    for (int chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
        p.chunk = chunk;
        p.count = min(CHUNK, L - chunk * CHUNK);
        p.base = (long long)p.row * L + chunk * CHUNK;
        const float *first = kept + slot_of(p, chunk, chunks, E);
        load_square(adjoint, adjoints + slot_of(p, chunk, chunks, E), q, E);
        load_square(state, first, q, E);
        const element *rows[4] = {u + p.base * E, code + p.base * code_stride,
                                  b + p.base * b_stride + p.group * STATES,
                                  c + p.base * c_stride + p.group * STATES};
#define STAGE(from)                                                                      \
    stage_part(m, code_s, p, from, min(PART, p.count - (from)), rows[0], rows[1],        \
               rows[2], rows[3], weight, bias, orders, L, E, rank, code_stride,          \
               b_stride, c_stride)
        for (int begin = (p.count - 1) / PART * PART; begin >= 0; begin -= PART) {
            for (int before = 0; before < begin; before += PART) {
                STAGE(before);
                walk(state, rate, m, q, false);
            }
            STAGE(begin);
            walk(state, rate, m, q, true);
            long long row = p.base + begin;
            Targets to = {grad_u + row * E, grad_step + row * step_stride, grad_bc,
                          step_stride, bc_stride};
#ifdef SPLIT
            row += (long long)part * gridDim.z * L;
            to.bc = static_cast<float *>(grad_bc) + row * bc_stride + p.group * STATES;
#else
            to.bc = static_cast<element *>(grad_bc) + row * bc_stride + p.group * STATES;
#endif
            __syncwarp();
            for (int g = GROUPS - 1; g >= 0; g--) {
                return_group(adjoint, of_rate, sums, rate, m, to, p, q, g,
                             p.count - begin, D, grad, E, columns);
            }
            if (begin > 0) load_square(state, first, q, E);
        }
    }
    partial += ((long long)blockIdx.x * gridDim.z + p.row) * (STATES + 2) * E;
    if (q.valid) {
#pragma unroll
        for (int j = 0; j < 4; j++) store4(partial + q.corner + (long long)j * E, of_rate[j]);
    }
    if (!p.valid) return;
    partial[(long long)STATES * E + p.channel] = sums.skip;
    partial[(long long)(STATES + 1) * E + p.channel] = sums.bias;
}
