// The scan's gradients, from what scan.cu gives.

#include "scan.cuh"

//
// A chunk is done in parts of PART steps, the last one first. In a part a warp walks
// forward once, leaving its states before every fourth step in shared memory; then four
// steps at a time are replayed into registers and walked back. Thread (s, c) of a warp
// has states 4s to 4s + 3 of ACROSS channels, so that few shuffles sum over channels (for
// B, C) and over states (for u and the step sizes). Those sums end with the thread whose
// own channel it is: the s-th of the ACROSS ones, if there are so many.

#define PART (CHUNK < 32 ? CHUNK : 32)
#define GROUPS (PART / 4)
#define QUADS ((PART * 4 + THREADS - 1) / THREADS)
#define WIDTH (8 * ACROSS)  // channels of a warp
#define PITCH (ACROSS == 3 ? 4 : ACROSS)  // of a thread's channels in shared memory

struct Shared {
    float BC[PART * 2 * STATES];
    float sums[2][WARPS][8][32];  // gradients of B and C at eight steps, two buffers
    float dt[WARPS][PART][8][PITCH], u[WARPS][PART][8][PITCH], dy[WARPS][PART][8][PITCH];
    float left[WARPS][GROUPS - 1][ACROSS][32][4];  // states; the code while staging
};

// Which states and channels a thread has.
struct Square {
    int warp, s, c, channel, own;
    bool valid[ACROSS], owner;  // the channels exist; the own one does
};

INLINE Square square_of(int part, int E) {
    Square q;
    int lane = threadIdx.x % 32;
    q.warp = threadIdx.x / 32, q.s = lane % 4, q.c = lane / 4;
    int inside = (part * WARPS + q.warp) * WIDTH + ACROSS * q.c;
#pragma unroll
    for (int k = 0; k < ACROSS; k++) q.valid[k] = inside + k < E;
    q.owner = q.s < ACROSS && inside + q.s < E;
    q.channel = inside;
    q.own = q.channel + q.s;
    return q;
}

INLINE void load_square(float (*to)[ACROSS], const float *from, const Square &q, int E) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
#pragma unroll
        for (int k = 0; k < ACROSS; k++) {
            to[j][k] = q.valid[k] ? from[(4 * q.s + j) * E + q.channel + k] : 0.0f;
        }
    }
}

INLINE void load_across(float *to, const float *from) {
#if PITCH == 4
    float four[4];
    load4(from, four);
#pragma unroll
    for (int k = 0; k < ACROSS; k++) to[k] = four[k];
#else
#pragma unroll
    for (int k = 0; k < ACROSS; k++) to[k] = from[k];
#endif
}

// A row's four states of B or C that a thread brings into shared memory.
struct Quad {
    float values[4];

    INLINE void load(const element *from, int stride, int i, int count) {
        int t = i / 4;
        load4(from + min(t, max(count, 1) - 1) * stride + i % 4 * 4, values);
    }

    INLINE void store(float *to, int i, int count) {
        int t = i / 4;
#pragma unroll
        for (int n = 0; n < 4; n++) values[n] = t < count ? values[n] : 0.0f;
        if (t < PART) store4(to + t * 2 * STATES + i % 4 * 4, values);
    }
};

// Step sizes, u and B of a part into shared memory; on the way `back` also C and the
// gradient of y. All that comes from afar is on its way before anything is waited for.
INLINE void stage_part(Shared &m, Place p, int part, int first, int count,
                       bool back, const element *grad, const element *u,
                       const element *code, const element *b, const element *c,
                       const float *weight, const float *bias, const int *orders, int L,
                       int E, int rank, int code_stride, int b_stride, int c_stride) {
    u += first * E, code += first * code_stride;
    b += first * b_stride, c += first * c_stride;
    float *code_s = &m.left[0][0][0][0][0];
    int last = max(count, 1) - 1;
    int inside = (part * WARPS + p.warp) * WIDTH + p.lane;
    p.valid = p.lane < WIDTH && inside < E;
    p.channel = p.valid ? inside : 0;
    element far_u[PART], far_dy[PART] = {};
#pragma unroll
    for (int i = 0; i < PART; i++) far_u[i] = u[min(i, last) * E + p.channel];
    if (back) {
        int place = place_in_row(orders, p.direction, p.chunk * CHUNK + first + p.lane, L);
        place *= E;
#pragma unroll
        for (int i = 0; i < PART; i++) {
            int at = __shfl_sync(0xffffffffu, place, min(i, last));
            far_dy[i] = grad[at + p.channel];
        }
    }
    Quad B[QUADS], C[QUADS];
#pragma unroll
    for (int i = 0; i < QUADS; i++) {
        B[i].load(b, b_stride, threadIdx.x + i * THREADS, count);
        if (back) C[i].load(c, c_stride, threadIdx.x + i * THREADS, count);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < QUADS; i++) {
        B[i].store(m.BC, threadIdx.x + i * THREADS, count);
        if (back) C[i].store(m.BC + STATES, threadIdx.x + i * THREADS, count);
    }
    stage_code(code_s, code, code_stride, rank, count, PART);
    __syncthreads();
    int column_of = p.lane / ACROSS, k = p.lane % ACROSS;
    float exists = p.valid ? 1.0f : 0.0f, dt[PART];
    step_sizes<PART>(dt, p, code_s, PART, 0, weight, bias, rank, E,
                     count);
    if (p.lane < WIDTH) {
#pragma unroll
        for (int i = 0; i < PART; i++) {
            m.dt[p.warp][i][column_of][k] = exists * dt[i];
            m.u[p.warp][i][column_of][k] = to_float(far_u[i]);
            float arrived = i < count ? exists * to_float(far_dy[i]) : 0.0f;
            if (back) m.dy[p.warp][i][column_of][k] = arrived;
        }
    }
    __syncthreads();
}

// One step forward; gives decay times state, and the decay, where they are wanted.
INLINE void step_forward(float (*state)[ACROSS], const float (*rate)[ACROSS],
                         const Shared &m, const Square &q, int t,
                         float (*passed)[ACROSS], float (*decay)[ACROSS]) {
    float dt[ACROSS], u[ACROSS], B[4];
    load_across(dt, m.dt[q.warp][t][q.c]);
    load_across(u, m.u[q.warp][t][q.c]);
    load4(m.BC + t * 2 * STATES + 4 * q.s, B);
#pragma unroll
    for (int k = 0; k < ACROSS; k++) {
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

// Walk over some groups of four steps, and leave the states before each.
INLINE void walk(float (*state)[ACROSS], const float (*rate)[ACROSS], Shared &m,
                 const Square &q, int groups, bool leave) {
    int lane = threadIdx.x % 32;
    for (int g = 0; g < groups; g++) {
        if (leave) {
#pragma unroll
            for (int k = 0; k < ACROSS; k++) {
                float four[4] = {state[0][k], state[1][k], state[2][k], state[3][k]};
                store4(m.left[q.warp][g][k][lane], four);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            step_forward(state, rate, m, q, 4 * g + i, nullptr, nullptr);
        }
    }
}

INLINE void take_up(float (*state)[ACROSS], const Shared &m, const Square &q, int g) {
#pragma unroll
    for (int k = 0; k < ACROSS; k++) {
        float four[4];
        load4(m.left[q.warp][g][k][threadIdx.x % 32], four);
#pragma unroll
        for (int j = 0; j < 4; j++) state[j][k] = four[j];
    }
}

// Gradients of the thread's own channel, over its block's chunks.
struct Sums {
    float skip, bias;
};

// Where gradients of a part go.
struct Targets {
    element *u, *step;
    void *bc;
    int step_stride, bc_stride;
};

// Gradients of B and C at eight steps, summed over the block's channels.
INLINE void finish_states(const Targets &to, const Shared &m, int buffer, int t0,
                          int count) {
#pragma unroll 1
    for (int i = threadIdx.x; i < 8 * 32; i += THREADS) {
        int t = t0 + i / 32, n = i % 32;
        if (t >= count) continue;
        float total = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) total += m.sums[buffer][w][i / 32][n];
        int at = t * to.bc_stride + n;
#ifdef SPLIT
        static_cast<float *>(to.bc)[at] = total;
#else
        static_cast<element *>(to.bc)[at] = from_float(total);
#endif
    }
}

// Walk the four steps of a group back, from the states before it.
INLINE void return_group(float (*state)[ACROSS], float (*adjoint)[ACROSS],
                         float (*of_rate)[ACROSS], Sums &sums,
                         const float (*rate)[ACROSS], Shared &m, const Targets &to,
                         const Square &q, int g, int count, float D, int E) {
    float decay[4][4][ACROSS], passed[4][4][ACROSS];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        step_forward(state, rate, m, q, 4 * g + i, passed[i], decay[i]);
    }
#pragma unroll
    for (int i = 3; i >= 0; i--) {
        int t = 4 * g + i;
        float dt[ACROSS], u[ACROSS], dy[ACROSS], B[4], C[4], of_states[8];
        float through[4] = {0, 0, 0, 0}, exponent[4] = {0, 0, 0, 0};
        load_across(dt, m.dt[q.warp][t][q.c]);
        load_across(u, m.u[q.warp][t][q.c]);
        load_across(dy, m.dy[q.warp][t][q.c]);
        load4(m.BC + t * 2 * STATES + 4 * q.s, B);
        load4(m.BC + t * 2 * STATES + STATES + 4 * q.s, C);
#pragma unroll
        for (int k = 0; k < ACROSS; k++) {
            float drive = dt[k] * u[k];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float now = adjoint[j][k] + dy[k] * C[j];
                float after = passed[i][j][k] + drive * B[j];
                float moved = now * passed[i][j][k];
                of_states[j] = k ? of_states[j] + now * drive : now * drive;
                of_states[4 + j] = k ? of_states[4 + j] + dy[k] * after : dy[k] * after;
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
        m.sums[g >> 1 & 1][q.warp][4 * (g & 1) + i][n] = of_states[0];
        // threads without a channel of their own do as if, for the sake of no branches
        int k = min(q.s, ACROSS - 1);
        float own_dt = m.dt[q.warp][t][q.c][k], own_u = m.u[q.warp][t][q.c][k];
        float own_dy = m.dy[q.warp][t][q.c][k];
        float slope = through[0] * own_u + exponent[0] * LN2;
        slope *= slope_of(own_dt);
        sums.skip += own_dy * own_u;
        sums.bias += slope;
        element of_u = from_float(own_dy * D + through[0] * own_dt);
        element of_step = from_float(slope);
        element *u_at = to.u + t * E + q.own;
        element *step_at = to.step + t * to.step_stride + q.own;
        store_if(q.owner && t < count, u_at, of_u);
        store_if(q.owner && t < count, step_at, of_step);
    }
    if (g & 1) return;
    __syncthreads();
    finish_states(to, m, g >> 1 & 1, 4 * g, count);
}

// All gradients, chunk by chunk, from true first states and true last adjoints.
//
// Block (p, part, row): chunks p, p + P, ... of a row of sequences. Writes gradients of u
// and of the step sizes before softplus, those of B and C summed over the block's channels,
// and, for each p, (P, rows, N + 2, E) sums: for A, for D, and of the step sizes' gradients. SPLIT: several
// blocks share B and C, and each writes a (rows, L, 2 N) float part of its own.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
scan_gradients(const element *grad, const element *u, const element *code,
               const element *b, const element *c, const float *a, const float *weight,
               const float *bias, const float *skip, const int *orders,
               const float *kept, const float *adjoints, element *grad_u,
               element *grad_step, void *grad_bc, float *partial, int L, int E, int batch, int chunks, int grad_rows, int rank,
               int code_stride, int b_stride, int c_stride, int step_stride,
               int bc_stride) {
    extern __shared__ __align__(16) char memory[];
    Shared &m = *reinterpret_cast<Shared *>(memory);
    int part = blockIdx.y;
    Place p = place_of(blockIdx.x, L, batch, E);
    Square q = square_of(part, E);
    grad += (long long)(p.row % grad_rows) * L * E;
    float D = q.owner ? skip[p.direction * E + q.own] : 0.0f;
    float rate[4][ACROSS], of_rate[4][ACROSS], state[4][ACROSS], adjoint[4][ACROSS];
    Sums sums = {0.0f, 0.0f};
    load_square(rate, a + (long long)p.direction * STATES * E, q, E);
#pragma unroll
    for (int j = 0; j < 4; j++) {
#pragma unroll
        for (int k = 0; k < ACROSS; k++) of_rate[j][k] = 0.0f;
    }
    for (int chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
        p.chunk = chunk;
        p.count = min(CHUNK, L - chunk * CHUNK);
        p.base = (long long)p.row * L + chunk * CHUNK;
        load_square(adjoint, adjoints + slot_of(p, chunk, chunks, E), q, E);
        for (int begin = (p.count - 1) / PART * PART; begin >= 0; begin -= PART) {
            long long row = p.base + begin;
            load_square(state, kept + slot_of(p, chunk, chunks, E), q, E);
            for (int at = 0; at <= begin; at += PART) {
                stage_part(m, p, part, at, min(PART, p.count - at),
                           at == begin, grad, u + p.base * E, code + p.base * code_stride,
                           b + p.base * b_stride,
                           c + p.base * c_stride, weight, bias,
                           orders, L, E, rank, code_stride, b_stride, c_stride);
                walk(state, rate, m, q, at < begin ? GROUPS : GROUPS - 1, at == begin);
            }
            Targets to = {grad_u + row * E, grad_step + row * step_stride, grad_bc,
                          step_stride, bc_stride};
#ifdef SPLIT
            long long bc_row = row + (long long)part * gridDim.z * L;
            to.bc = static_cast<float *>(grad_bc) + bc_row * bc_stride;
#else
            to.bc = static_cast<element *>(grad_bc) + row * bc_stride;
#endif
            for (int g = GROUPS - 1; g >= 0; g--) {
                if (g < GROUPS - 1) take_up(state, m, q, g);
                return_group(state, adjoint, of_rate, sums, rate, m, to, q, g,
                             p.count - begin, D, E);
            }
        }
    }
    partial += ((long long)blockIdx.x * gridDim.z + p.row) * (STATES + 2) * E;
#pragma unroll
    for (int j = 0; j < 4; j++) {
#pragma unroll
        for (int k = 0; k < ACROSS; k++) {
            if (q.valid[k]) partial[(4 * q.s + j) * E + q.channel + k] = of_rate[j][k];
        }
    }
    if (!q.owner) return;
    partial[(long long)STATES * E + q.own] = sums.skip;
    partial[(long long)(STATES + 1) * E + q.own] = sums.bias;
}
