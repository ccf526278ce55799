// The scan's gradients, from what scan.cu gives.
//
// A chunk is done in parts of PART steps, the last one first. From the state before a part
// a warp walks forward once, leaving its states before every fourth step in shared memory;
// then four steps at a time, the last ones first, are done again and walked back. That goes
// state by state, so that only one state's four steps are in registers at once.
//
// A warp has CHANNELS channels. As a Square, in walks, a thread has four states of two
// channels; sums over states (for u and the step sizes) and over channels (for B and C) go
// through shuffles. Threads have states and channels in orders of their own: with the
// partner of a shuffle, one's first half is the other's second, and nothing has to be
// chosen. As a Tile, for global memory, a thread has four steps of four channels.
//
// Time is innermost in shared memory, for accesses of four steps. Those of a warp take two
// passes, not four, where the threads of each half warp ask for no more than eight places
// and pairs of neighbours (or of next but ones) ask for the same; the order of lanes and
// the pitches of rows see to that, and to different banks.

#include "scan.cuh"

#define GROUPS (PART / 4)
#define CHANNELS 16               // of a warp
#define PITCH (PART + 4)          // from one row of steps to the next
#define HIGH (8 * PITCH + 16)     // from a channel's row to that of the eighth behind it
#define ROWS (16 * PITCH + 40)    // of a warp's channels
#define SLOT (2 * 32 * 4)         // of what a warp leaves before four steps

// A warp's own. What is summed over states goes where what it comes from was: `through`
// to x, the exponent's gradient to dy. Sums over channels go where states were left.
struct Own {
    float dt[ROWS], x[ROWS], dy[ROWS];
    float left[GROUPS][SLOT];
};

// A state n of B and C is in row n % 4 * 4 + n / 4. The step sizes' code lies behind all.
struct Shared {
    float B[STATES][PITCH], C[STATES][PITCH];
    Own own[WARPS];
};

// A row of sequences, and its gradients, and parameters of its direction. SPLIT: several
// blocks share B and C, and each gives floats of its own.
struct Data {
    const element *grad, *u, *code, *b, *c;
    const float *weight, *bias, *skip;
    element *of_u, *of_step;
#ifdef SPLIT
    float *of_bc;
#else
    element *of_bc;
#endif
    int L, E, rank, code_stride, b_stride, c_stride, step_stride, bc_stride;
};

// The value itself, which the compiler takes for another: it keeps nothing in registers that
// it made of the first before, and adds offsets to a pointer, not to what that was made of.
INLINE int anew(int number) {
#ifndef EMULATED
    asm volatile("" : "+r"(number));
#endif
    return number;
}

// One of global memory.
template <class T> INLINE T *anew(T *pointer) {
#ifndef EMULATED
    asm volatile("" : "+l"(pointer));
    __builtin_assume(__isGlobal(pointer));
#endif
    return pointer;
}

INLINE int row_of(int channel) {
    return channel % 8 * PITCH + channel / 8 * HIGH;
}

// --- a thread's states in walks ---------------------------------------------------------

struct Square {
    int lane, s, c, first;  // the warp's first channel

    INLINE Square(int at) {
        lane = anew(threadIdx.x % 32), first = at;
        s = lane & 1 | lane >> 1 & 2;
        c = lane >> 1 & 1 | lane >> 2 & 6;
    }

    // The channel, in the warp, and the state that a thread has as [k][j].
    INLINE int channel(int k) const { return c + 8 * (k ^ s / 2); }
    INLINE int state(int j) const { return 4 * s + (j ^ c / 2); }

    // Their rows in shared memory.
    INLINE int row(int k) const { return row_of(channel(k)); }
    INLINE int line(int j) const { return 4 * (j ^ c / 2) + s; }
};

// A thread's numbers: states, adjoints, rates and their gradients, [channel][state].
struct Walk {
    float state[2][4], adjoint[2][4], rate[2][4], of_rate[2][4];
};

// A thread's states from (16, E); zero where there are none.
INLINE void load_square(float (*to)[4], const float *from, const Square &q, int E) {
#pragma unroll
    for (int k = 0; k < 2; k++) {
        int channel = q.first + q.channel(k);
        bool there = channel < E;
        const float *column = anew(from + (there ? channel : 0));
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float value = column[q.state(j) * E];
            to[k][j] = there ? value : 0.0f;
        }
    }
}

INLINE void store_square(float *to, const float (*from)[4], const Square &q, int E) {
#pragma unroll
    for (int k = 0; k < 2; k++) {
        int channel = q.first + q.channel(k);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (channel < E) to[q.state(j) * E + channel] = from[k][j];
        }
    }
}

INLINE void leave(const Walk &w, Own &own, const Square &q, int g) {
    store4(&own.left[g][4 * q.lane], w.state[0]);
    store4(&own.left[g][4 * q.lane + 128], w.state[1]);
}

INLINE void take_up(Walk &w, const Own &own, const Square &q, int g) {
    load4(&own.left[g][4 * q.lane], w.state[0]);
    load4(&own.left[g][4 * q.lane + 128], w.state[1]);
}

// The g-th four steps forward.
INLINE void do_steps(Walk &w, const Shared &m, const Own &own, const Square &q, int g) {
    float dt[2][4], x[2][4];
#pragma unroll
    for (int k = 0; k < 2; k++) {
        load4(&own.dt[q.row(k) + 4 * g], dt[k]);
        load4(&own.x[q.row(k) + 4 * g], x[k]);
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float b[4];
        load4(&m.B[q.line(j)][4 * g], b);
#pragma unroll
        for (int k = 0; k < 2; k++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float decay = exp2_fast(w.rate[k][j] * dt[k][i]);
                w.state[k][j] = w.state[k][j] * decay + x[k][i] * b[i];
            }
        }
    }
}

// Four steps of a channel and state, forward and back. `through` gets what is summed over
// states: four steps' for x, and for the exponent; `across` what is over channels: B's, C's.
INLINE void return_state(Walk &w, int k, int j, const float *dt, const float *x,
                         const float *dy, const float *b, const float *c, float *through,
                         float *across) {
    float decay[4], passed[4], after[4], state = w.state[k][j], now = w.adjoint[k][j];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        decay[i] = exp2_fast(w.rate[k][j] * dt[i]);
        passed[i] = decay[i] * state;
        state = after[i] = passed[i] + x[i] * b[i];
    }
#pragma unroll
    for (int i = 3; i >= 0; i--) {
        now += dy[i] * c[i];
        float moved = now * passed[i];
        through[i] += now * b[i];
        through[4 + i] += moved * w.rate[k][j];
        across[i] += now * x[i];
        across[4 + i] += dy[i] * after[i];
        w.of_rate[k][j] += moved * dt[i];
        now *= decay[i];
    }
    w.adjoint[k][j] = now;
}

// Walk the g-th four steps of a part back, from the states before them. Sums over channels
// end with pairs of threads, each with a half: `finish_states` adds those.
INLINE void return_steps(Walk &w, const Shared &m, Own &own, const Square &q, int g) {
    float dt[2][4], x[2][4], dy[2][4], through[16] = {}, across[2][16] = {};
#pragma unroll
    for (int k = 0; k < 2; k++) {
        load4(&own.dt[q.row(k) + 4 * g], dt[k]);
        load4(&own.x[q.row(k) + 4 * g], x[k]);
        load4(&own.dy[q.row(k) + 4 * g], dy[k]);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int j = i % 2 * 2 + i / 2;  // states 0 and 2 meet, then 1 and 3
        float b[4], c[4];
        load4(&m.B[q.line(j)][4 * g], b);
        load4(&m.C[q.line(j)][4 * g], c);
#pragma unroll
        for (int k = 0; k < 2; k++) {
            return_state(w, k, j, dt[k], x[k], dy[k], b, c, through + 8 * k,
                         across[i / 2] + i % 2 * 8);
        }
        if (i % 2) meet<16>(across[i / 2], 16);
    }
    meet<16>(through, 4);
    fold<8>(through, 1);
    float *to = q.s % 2 ? own.dy : own.x;
    store4(to + q.row(0) + 4 * g, through);
#pragma unroll
    for (int i = 0; i < 8; i++) across[0][8 + i] = across[1][i];
    meet<16>(across[0], 8);
    store4(&own.left[g][4 * q.lane], across[0]);
    store4(&own.left[g][4 * q.lane + 128], across[0] + 4);
}

// A part forward and back.
INLINE void walk(Walk &w, const Shared &m, Own &own, const Square &q) {
#pragma unroll 1
    for (int g = 0; g < GROUPS - 1; g++) {
        leave(w, own, q, g);
        do_steps(w, m, own, q, g);
    }
#pragma unroll 1
    for (int g = GROUPS - 1; g >= 0; g--) {
        if (g < GROUPS - 1) take_up(w, own, q, g);
        return_steps(w, m, own, q, g);
    }
    __syncwarp();
}

// --- a thread's steps and channels in global memory -------------------------------------

#if !defined(KIND) || KIND == 0
typedef float4 Quad;
#else
typedef uint2 Quad;
#endif

INLINE void open(const Quad &quad, float *values) {
    load4(reinterpret_cast<const element *>(&quad), values);
}

// Steps that don't exist have the last one's data, and channels the first one's, so that
// loads don't depend on conditions, and all are on their way before one is waited for.
struct Tile {
    int at, inside, channel;  // first step; first channel in the warp, of all
    bool idle, there;         // there are too few steps for all lanes; the channels exist
    int first, steps;         // of the part

    INLINE Tile(int begin, int slot, const Data &d) {
        unsigned lane = anew(threadIdx.x % 32);
        at = lane % GROUPS * 4, inside = lane / GROUPS % 4 * 4;
        idle = lane / GROUPS >= 4, there = !idle && begin + inside < d.E;
        channel = there ? begin + inside : 0;
        first = slot * PART, steps = min(PART, d.L - first);
    }

    INLINE int step(int i) const { return min(at + i, steps - 1); }

    // Four steps of u's rows by position, and of the gradient's by token: `place` is where
    // that of the lane's own step begins. The latter's are zero where nothing exists; so
    // are then adjoints, and all gradients.
    INLINE void load(Quad *u, Quad *dy, int place, const Data &d) const {
        const element *by_position = anew(d.u + channel), *by_token = anew(d.grad + channel);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int row = (first + step(i)) * d.E;
            u[i] = *reinterpret_cast<const Quad *>(by_position + row);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int row = __shfl_sync(0xffffffffu, place, step(i));
            dy[i] = *reinterpret_cast<const Quad *>(by_token + row);
        }
        int limit = there ? steps - at : 0;
#pragma unroll
        for (int i = 0; i < 4; i++) dy[i] = i < limit ? dy[i] : Quad();
    }
};

// B, C and the step sizes' code of a part, zero behind its end.
INLINE void stage_matrices(Shared &m, float *code_s, const Data &d, const Tile &tile) {
#pragma unroll 1
    for (unsigned i = anew(threadIdx.x); i < PART * 8; i += THREADS) {
        unsigned t = i % PART, n = i / PART % 4;
        bool second = i >= PART * 4;
        const element *from = second ? d.c : d.b;
        int row = (tile.first + t) * (second ? d.c_stride : d.b_stride);
        float four[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (t < tile.steps) load4(from + (row + 4 * n), four);
        float *to = &m.B[0][0] + second * STATES * PITCH + n * PITCH + t;
#pragma unroll
        for (int k = 0; k < 4; k++) to[4 * k * PITCH] = four[k];
    }
    stage_code<PART, 1>(code_s, d.code + tile.first * d.code_stride, d.code_stride, d.rank,
                        tile.steps);
}

// Step sizes before softplus, [channel][step].
INLINE void project(float (*dt)[4], const Tile &tile, const float *code_s, const Data &d) {
#pragma unroll
    for (int a = 0; a < 4; a++) {
        float offset = d.bias[tile.channel + a];
#pragma unroll
        for (int i = 0; i < 4; i++) dt[a][i] = offset;
    }
#pragma unroll 1
    for (int r = 0; r < d.rank; r++) {
        float weight[4], code[4];
        load4(d.weight + (r * d.E + tile.channel), weight);
        load4(code_s + r * PART + tile.at, code);
#pragma unroll
        for (int a = 0; a < 4; a++) {
#pragma unroll
            for (int i = 0; i < 4; i++) dt[a][i] += weight[a] * code[i];
        }
    }
}

// Step sizes, what drives the states, and the gradient of y.
INLINE void stage_rows(Own &own, const Tile &tile, const Quad *u, const Quad *grad,
                       const float *code_s, const Data &d) {
    float dt[4][4], x[4][4], dy[4][4];
    project(dt, tile, code_s, d);
#pragma unroll
    for (int i = 0; i < 4; i++) open(u[i], x[i]), open(grad[i], dy[i]);
    if (tile.idle) return;
#pragma unroll
    for (int a = 0; a < 4; a++) {
        float driven[4], gradient[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            dt[a][i] = softplus(dt[a][i]);
            driven[i] = dt[a][i] * x[i][a];
            gradient[i] = dy[i][a];
        }
        int at = row_of(tile.inside + a) + tile.at;
        store4(own.dt + at, dt[a]);
        store4(own.x + at, driven);
        store4(own.dy + at, gradient);
    }
}

// A part's data, for all warps.
INLINE void stage(Shared &m, Own &own, float *code_s, const Tile &tile, int place,
                  const Data &d) {
    Quad u[4], dy[4];
    tile.load(u, dy, place, d);
    stage_matrices(m, code_s, d, tile);
    __syncthreads();
    stage_rows(own, tile, u, dy, code_s, d);
    __syncwarp();
}

// Gradients of u and of the step sizes before softplus; sums for D and the bias.
INLINE void store_rows(float *totals, const Tile &tile, int place, const Own &own,
                       const Data &d) {
    Quad far_u[4], far_dy[4];
    float u[4][4], dy[4][4], sums[8] = {};
    tile.load(far_u, far_dy, place, d);
#pragma unroll
    for (int i = 0; i < 4; i++) open(far_u[i], u[i]), open(far_dy[i], dy[i]);
#pragma unroll
    for (int a = 0; a < 4; a++) {
        float dt[4], through[4], exponent[4], D = d.skip[tile.channel + a];
        int at = row_of(tile.inside + a) + tile.at;
        load4(own.dt + at, dt);
        load4(own.x + at, through);
        load4(own.dy + at, exponent);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float slope = through[i] * u[i][a] + exponent[i] * LN2;
            slope *= slope_of(dt[i]);
            sums[a] += dy[i][a] * u[i][a];
            sums[4 + a] += slope;
            u[i][a] = dy[i][a] * D + through[i] * dt[i];
            dy[i][a] = slope;
        }
    }
    element *of_u = anew(d.of_u + tile.channel), *of_step = anew(d.of_step + tile.channel);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (!tile.there || tile.at + i >= tile.steps) break;
        int t = tile.first + tile.at + i;
        store4(of_u + t * d.E, u[i]);
        store4(of_step + t * d.step_stride, dy[i]);
    }
    __syncwarp();
    fold<8>(sums, 1);
    fold<4>(sums, 2);
    if (GROUPS == 8) fold<2>(sums, 4);
#pragma unroll
    for (int i = 0; i < 8 / GROUPS; i++) totals[i] += sums[i];
}

// Gradients of B and C, summed over the block's channels. A thread sums four steps of a
// state, 2 WARPS times, in an order that keeps its neighbours to banks of their own.
INLINE void finish_states(const Data &d, const Shared &m, const Tile &tile) {
#pragma unroll 1
    for (unsigned i = anew(threadIdx.x); i < 32 * GROUPS; i += THREADS) {
        unsigned lane = i & 1 | i << 1 & 28, g = i / 32, second = i / 16 % 2;
        unsigned s = lane & 1 | lane >> 1 & 2, n = 4 * s + lane / 8;
        const float *from = m.own[0].left[0] + SLOT * g + 128 * second + 4 * lane;
        unsigned swap = i / 4 % 2 * 8;
        float total[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float *own = from + w * (sizeof(Own) / 4);
            float one[4], other[4];
            load4(own + swap, one), load4(own + (swap ^ 8), other);
#pragma unroll
            for (int k = 0; k < 4; k++) total[k] += one[k] + other[k];
        }
        int at = (tile.first + 4 * g) * d.bc_stride + STATES * second + n;
#pragma unroll
        for (int k = 0; k < 4; k++) {
            if (4 * g + k >= tile.steps) break;
#ifdef SPLIT
            d.of_bc[at + k * d.bc_stride] = total[k];
#else
            d.of_bc[at + k * d.bc_stride] = from_float(total[k]);
#endif
        }
    }
}

// Sums over all parts: for A of states, for D and the bias of channels.
INLINE void store_sums(float *to, const Walk &w, const float *totals, const Square &q,
                       const Data &d) {
    store_square(to, w.of_rate, q, d.E);
    Tile tile(q.first, 0, d);
    if (!tile.there) return;
    int kind = q.lane % 2, channel = tile.channel + q.lane / 2 % 2 * 2;
    if (GROUPS == 8) channel += q.lane / 4 % 2;
#pragma unroll
    for (int i = 0; i < 8 / GROUPS; i++) {
        to[(STATES + kind) * d.E + channel + i] = totals[i];
    }
}

// All gradients, chunk by chunk, from true first states and true last adjoints.
//
// Block (p, part, row): chunks p, p + P, ... of a row of sequences. Writes gradients of u
// and of the step sizes before softplus, those of B and C summed over the block's channels,
// and, for each p, (P, rows, N + 2, E) sums: for A, for D, and of the step sizes' gradients.
// SPLIT: several blocks share B and C, and each writes a (rows, L, 2 N) float part of its
// own. E is a multiple of 8.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
scan_gradients(const element *grad, const element *u, const element *code,
               const element *b, const element *c, const float *a, const float *weight,
               const float *bias, const float *skip, const int *orders,
               const float *kept, const float *adjoints, element *grad_u,
               element *grad_step, void *grad_bc, float *partial, int L, int E, int batch,
               int chunks, int grad_rows, int rank, int code_stride, int b_stride,
               int c_stride, int step_stride, int bc_stride) {
    extern __shared__ __align__(16) char memory[];
    Shared &m = *reinterpret_cast<Shared *>(memory);
    float *code_s = reinterpret_cast<float *>(memory + sizeof(Shared));
    Own &own = m.own[threadIdx.x / 32];
    int first = (blockIdx.y * WARPS + threadIdx.x / 32) * CHANNELS;
    Place p = place_of(blockIdx.x, L, batch, E);
    Order order(orders, p.direction, L);
    long long row = (long long)p.row * L;
    Data d = {grad + (long long)(p.row % grad_rows) * L * E, u + row * E,
              code + row * code_stride, b + row * b_stride, c + row * c_stride,
              weight + p.direction * rank * E, bias + p.direction * E,
              skip + p.direction * E, grad_u + row * E,
              grad_step + row * step_stride};
    long long bc_row = row + (long long)blockIdx.y * gridDim.z * L;
#ifdef SPLIT
    d.of_bc = static_cast<float *>(grad_bc) + bc_row * bc_stride;
#else
    d.of_bc = static_cast<element *>(grad_bc) + row * bc_stride;
#endif
    d.L = L, d.E = E, d.rank = rank, d.code_stride = code_stride, d.b_stride = b_stride;
    d.c_stride = c_stride, d.step_stride = step_stride, d.bc_stride = bc_stride;
    Walk w;
    float totals[8 / GROUPS] = {};  // gradients for D or the bias, of some channels
    load_square(w.rate, a + (long long)p.direction * STATES * E, Square(first), E);
#pragma unroll
    for (int j = 0; j < 4; j++) w.of_rate[0][j] = w.of_rate[1][j] = 0.0f;
    for (int chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
        load_square(w.adjoint, adjoints + slot_of(p, chunk, chunks, E), Square(first), E);
        int slot = min((chunk + 1) * PARTS, (L + PART - 1) / PART) - 1;
        for (; slot >= chunk * PARTS; slot--) {
            int place = order.token(slot * PART + threadIdx.x % 32) * E;
            Square q(first);
            load_square(w.state, kept + slot_of(p, slot, chunks * PARTS, E), q, E);
            stage(m, own, code_s, Tile(first, slot, d), place, d);
            walk(w, m, own, q);
            Tile tile(first, slot, d);
            store_rows(totals, tile, place, own, d);
            __syncthreads();
            finish_states(d, m, tile);
        }
    }
    partial += ((long long)blockIdx.x * gridDim.z + p.row) * (STATES + 2) * E;
    store_sums(partial, w, totals, Square(first), d);
}
