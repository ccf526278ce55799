// The selective scan's forward, and the adjoints that its backward starts from.
//
// A block does some steps of a row, TILE of them at a time. A thread has PER states of a
// channel, ACROSS neighbours have all of them. A warp's lanes load its CHANNELS rows
// together; then a thread takes four steps of its channel at a time from shared memory.
// Constants besides the header's: PER, and SEGMENTS for `carry`.
//
// Segments of a row that different blocks do start from zero first; `carry` finds the
// states between them. Slot i is the state before segment i, or the adjoint behind it.

#include "selective.cuh"

#ifdef PER

#define TILE 64
#define PITCH (TILE + 4)
#define ACROSS (STATES / PER)
#define CHANNELS (2 * PER)
#define RUN 16  // steps whose outputs are summed over states at once
#define SHARE (STATES * TILE / 4 / THREADS)  // quads of B and C that a thread loads

enum Mode { ENDS, OUTPUTS, ADJOINTS };

typedef float Rows[WARPS][CHANNELS][PITCH];
typedef float Matrix[STATES][PITCH];

// x is u, or the output's gradient; `first` is what the states start with in the first
// steps done, (batch, E, N). What a mode doesn't need is null. A block does `walked` steps.
struct Scan {
    const element *x, *delta, *z, *b, *c;
    const float *a, *skip, *bias, *first;
    float *slots, *kept, *last;
    element *y;
    Sizes sizes;
    int softly, walked;
};

struct Memory {
    Rows &dt, &x, &u;
    Matrix &B, &C;
};

// Which channels and steps a thread has.
struct Place {
    int lane, warp, s, c, group, room, first, channel, segment, begin, end;
    bool valid;

    INLINE Place(const Scan &scan, int segment) : segment(segment) {
        const Sizes &sizes = scan.sizes;
        int parts = (sizes.per_group + WARPS * CHANNELS - 1) / (WARPS * CHANNELS);
        lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        s = lane % ACROSS, c = lane / ACROSS;
        int inside = (blockIdx.y % parts * WARPS + warp) * CHANNELS;
        group = blockIdx.y / parts;
        room = sizes.per_group - inside;
        first = group * sizes.per_group + inside;
        channel = first + c;
        valid = c < room;
        begin = segment * sizes.steps;
        end = min(begin + scan.walked, sizes.L);
    }

    // A lane's quads are PER steps-long pieces of every other row, at one place of them.
    INLINE int at() const { return lane % (TILE / 4) * 4; }
    INLINE int row(int q) const { return 2 * q + lane / (TILE / 4); }
    INLINE bool there(int q) const { return row(q) < room; }
};

// What a thread loads ahead for a tile.
struct Ahead {
    Quad x[PER], delta[PER], z[PER], b[SHARE], c[SHARE];
};

// Rows that don't exist give others.
INLINE void load_rows(Quad *quads, const element *rows, const Place &p, int t,
                      const Sizes &sizes) {
#pragma unroll
    for (int q = 0; q < PER; q++) {
        long long channel = min(p.first + p.row(q), sizes.E - 1);
        quads[q] = load_quad(rows + channel * sizes.L, t + p.at(), sizes.L);
    }
}

INLINE int state_of(int i) {
    return (i * THREADS + threadIdx.x) / (TILE / 4);
}

INLINE void load_matrix(Quad *quads, const element *rows, const Place &p, int t,
                        const Sizes &sizes) {
#pragma unroll
    for (int i = 0; i < SHARE; i++) {
        long long n = min(state_of(i), sizes.N - 1);
        quads[i] = load_quad(rows + n * sizes.L, t + p.at(), sizes.L);
    }
}

template <int MODE>
INLINE void load_tile(Ahead &ahead, const Scan &scan, const Place &p, int t) {
    load_rows(ahead.x, scan.x, p, t, scan.sizes);
    load_rows(ahead.delta, scan.delta, p, t, scan.sizes);
    if (MODE == ADJOINTS && scan.z) load_rows(ahead.z, scan.z, p, t, scan.sizes);
    if (MODE != ADJOINTS) load_matrix(ahead.b, scan.b, p, t, scan.sizes);
    if (MODE != ENDS) load_matrix(ahead.c, scan.c, p, t, scan.sizes);
}

// Rows lie where threads of neighbouring states find them in different banks.
INLINE void put_matrix(Matrix &to, const Quad *quads, const Place &p, int t, int N) {
#pragma unroll
    for (int i = 0; i < SHARE; i++) {
        int n = state_of(i);
        float values[4];
        open(quads[i], values);
        mask(values, n < N, t + p.at(), p.end);
        store4(&to[n % PER * ACROSS + n / PER][p.at()], values);
    }
}

// Step sizes, what drives the states and, for outputs, u.
template <int MODE>
INLINE void put_tile(const Memory &m, const Ahead &ahead, const Scan &scan,
                     const Place &p, int t, const float *bias) {
    if (MODE != ADJOINTS) put_matrix(m.B, ahead.b, p, t, scan.sizes.N);
    if (MODE != ENDS) put_matrix(m.C, ahead.c, p, t, scan.sizes.N);
#pragma unroll
    for (int q = 0; q < PER; q++) {
        int row = p.row(q), at = p.at();
        float x[4], dt[4];
        open(ahead.x[q], x);
        open(ahead.delta[q], dt);
        soften(dt, bias[q], scan.softly);
        if (MODE == ADJOINTS && scan.z) multiply_gate(ahead.z[q], x);
        mask(x, p.there(q), t + at, p.end);
        mask(dt, p.there(q), t + at, p.end);
        if (MODE == OUTPUTS) store4(&m.u[p.warp][row][at], x);
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] = MODE == ADJOINTS ? x[i] : dt[i] * x[i];
        store4(&m.dt[p.warp][row][at], dt);
        store4(&m.x[p.warp][row][at], x);
    }
}

// Sum RUN values over a channel's threads; the s-th one gets the s-th PER of them.
INLINE void sum_across(float *values) {
    if (ACROSS >= 16) fold<RUN>(values, 8);
    if (ACROSS >= 8) fold<8 * PER>(values, 4);
    fold<4 * PER>(values, 2);
    fold<2 * PER>(values, 1);
}

// RUN steps from t0 of a tile on; gives their step sizes' sum. Outputs and skip come
// where u was.
template <int MODE>
INLINE float do_steps(const Memory &m, const Place &p, int t0, float *state,
                      const float *rate, float skip) {
    float y[RUN] = {}, total = 0.0f;
#pragma unroll
    for (int q = 0; q < RUN; q += 4) {
        int at = MODE == ADJOINTS ? RUN - 4 - q : q;
        float dt[4], x[4];
        load4(&m.dt[p.warp][p.c][t0 + at], dt);
        load4(&m.x[p.warp][p.c][t0 + at], x);
        total += (dt[0] + dt[1]) + (dt[2] + dt[3]);
#pragma unroll
        for (int j = 0; j < PER; j++) {
            float b[4], c[4];
            if (MODE != ADJOINTS) load4(&m.B[j * ACROSS + p.s][t0 + at], b);
            if (MODE != ENDS) load4(&m.C[j * ACROSS + p.s][t0 + at], c);
#pragma unroll
            for (int step = 0; step < 4; step++) {
                int i = MODE == ADJOINTS ? 3 - step : step;
                float decay = exp2_fast(rate[j] * dt[i]);
                if (MODE == ADJOINTS) {
                    state[j] = (state[j] + x[i] * c[i]) * decay;
                } else {
                    state[j] = state[j] * decay + x[i] * b[i];
                    if (MODE == OUTPUTS) y[at + i] += state[j] * c[i];
                }
            }
        }
    }
    if (MODE == OUTPUTS) {
        float *out = &m.u[p.warp][p.c][t0 + PER * p.s];
        sum_across(y);
#pragma unroll
        for (int i = 0; i < PER; i++) out[i] = out[i] * skip + y[i];
    }
    return total;
}

INLINE void store_states(float *to, const float *state, const Place &p) {
    if (!p.valid) return;
#if PER == 4
    store4(to + PER * p.s, state);
#else
#pragma unroll
    for (int j = 0; j < PER; j++) to[PER * p.s + j] = state[j];
#endif
}

INLINE void store_slot(const Scan &scan, const Place &p, int slot, const float *state,
                       float total) {
    long long at = slot_of(slot, p.channel, scan.sizes);
    store_states(scan.slots + at * STATES, state, p);
    if (p.valid && p.s == 0) scan.slots[sums_at(scan.sizes) + at] = total;
}

INLINE void store_last(const Scan &scan, const Place &p, const float *state) {
    int N = scan.sizes.N;
    float *last = scan.last + ((long long)blockIdx.z * scan.sizes.E + p.channel) * N;
#pragma unroll
    for (int j = 0; j < PER; j++) {
        if (p.valid && PER * p.s + j < N) last[PER * p.s + j] = state[j];
    }
}

// Gate and store a tile's outputs.
INLINE void put_out(const Memory &m, const Scan &scan, const Place &p, int t,
                    const Quad *gate) {
    __syncwarp();
#pragma unroll
    for (int q = 0; q < PER; q++) {
        float y[4];
        load4(&m.u[p.warp][p.row(q)][p.at()], y);
        if (scan.z) multiply_gate(gate[q], y);
        element *row = scan.y + (long long)(p.first + p.row(q)) * scan.sizes.L;
        store_quad(row, p.there(q), t + p.at(), p.end, y);
    }
}

// Move the tensors that a mode has to a row of the batch, B and C to a group.
template <int MODE> INLINE void move_to(Scan &scan, const Place &p) {
    const Sizes &sizes = scan.sizes;
    long long row = (long long)blockIdx.z * sizes.E * sizes.L;
    long long groups = sizes.E / sizes.per_group;
    long long matrix = (blockIdx.z * groups + p.group) * sizes.N * sizes.L;
    scan.x += row, scan.delta += row;
    if (scan.z) scan.z += row;
    if (MODE == OUTPUTS) scan.y += row;
    if (MODE != ADJOINTS) scan.b += matrix;
    if (MODE != ENDS) scan.c += matrix;
}

// Rates, what is added to a quad's deltas, and the states to start from.
template <int MODE>
INLINE void load_channel(const Scan &scan, const Place &p, float *rate, float *bias,
                         float *state) {
    const Sizes &sizes = scan.sizes;
    long long states = (long long)p.channel * sizes.N;
    long long all = (long long)blockIdx.z * sizes.E * sizes.N;
#pragma unroll
    for (int j = 0; j < PER; j++) {
        int n = PER * p.s + j;
        bool there = p.valid && n < sizes.N;
        rate[j] = there ? scan.a[states + n] * LOG2E : 0.0f;
        state[j] = there && scan.first ? scan.first[all + states + n] : 0.0f;
        if (MODE == OUTPUTS && p.segment > 0 && p.valid) {
            state[j] = scan.slots[slot_of(p.segment, p.channel, sizes) * STATES + n];
        }
        bias[j] = scan.bias && p.there(j) ? scan.bias[p.first + p.row(j)] : 0.0f;
    }
}

template <int MODE> INLINE void walk(Scan scan, const Memory &m, int segment) {
    constexpr bool BACK = MODE == ADJOINTS;
    Place p(scan, segment);
    move_to<MODE>(scan, p);
    const Sizes &sizes = scan.sizes;
    float rate[PER], state[PER], bias[PER], total = 0.0f, skip = 0.0f;
    load_channel<MODE>(scan, p, rate, bias, state);
    if (MODE == OUTPUTS && scan.skip && p.valid) skip = scan.skip[p.channel];
    int tiles = (p.end - p.begin + TILE - 1) / TILE, bound = (p.end - 1) / sizes.steps;
    int t = BACK ? p.begin + (tiles - 1) * TILE : p.begin;
    Ahead ahead;
    load_tile<MODE>(ahead, scan, p, t);
    for (int i = 0; i < tiles; i++, t += BACK ? -TILE : TILE) {
        __syncthreads();
        put_tile<MODE>(m, ahead, scan, p, t, bias);
        __syncthreads();
        if (i + 1 < tiles) load_tile<MODE>(ahead, scan, p, t + (BACK ? -TILE : TILE));
        Quad gate[PER];
        if (MODE == OUTPUTS && scan.z) load_rows(gate, scan.z, p, t, sizes);
        // whole runs of KEPT steps, as steps behind the end change nothing
        int runs = (min(TILE, p.end - t) + KEPT - 1) / KEPT;
        for (int k = 0; k < runs; k++) {
            int run = (BACK ? runs - 1 - k : k) * KEPT;
            if (MODE == OUTPUTS && scan.kept) {
                store_states(scan.kept + kept_at(t + run, p.channel, sizes), state, p);
            }
#pragma unroll
            for (int i = 0; i < KEPT; i += RUN) {
                int t0 = run + (BACK ? KEPT - RUN - i : i);
                total += do_steps<MODE>(m, p, t0, state, rate, skip);
            }
            if (BACK && bound > 0 && t + run == bound * sizes.steps) {
                store_slot(scan, p, --bound, state, total);
            }
        }
        if (MODE == OUTPUTS) put_out(m, scan, p, t, gate);
    }
    if (MODE == ENDS) store_slot(scan, p, segment + 1, state, total);
    if (MODE == OUTPUTS && scan.last && p.end == sizes.L) store_last(scan, p, state);
}

// What each segment but the last one adds to the states.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
scan_ends(const element *u, const element *delta, const element *b, const float *a,
          const float *bias, float *slots, int softly, int L, int E, int N,
          int per_group, int steps, int segments) {
    __shared__ __align__(16) Rows dt, x;
    __shared__ __align__(16) Matrix B;
    Scan scan = {u, delta, nullptr, b, nullptr, a, nullptr, bias, nullptr, slots};
    scan.sizes = {L, E, N, per_group, steps, segments};
    scan.softly = softly, scan.walked = steps;
    walk<ENDS>(scan, {dt, x, x, B, B}, blockIdx.x);
}

// Outputs (y + D u) silu(z), states at every KEPT-th step, and the last state.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
scan_outputs(const element *u, const element *delta, const element *z,
             const element *b, const element *c, const float *a, const float *skip,
             const float *bias, float *slots, float *kept, float *last, element *y,
             int softly, int L, int E, int N, int per_group, int steps, int segments) {
    __shared__ __align__(16) Rows dt, x, out;
    __shared__ __align__(16) Matrix B, C;
    Scan scan = {u, delta, z, b, c, a, skip, bias, nullptr, slots, kept, last, y};
    scan.sizes = {L, E, N, per_group, steps, segments};
    scan.softly = softly, scan.walked = steps;
    walk<OUTPUTS>(scan, {dt, x, out, B, C}, blockIdx.x);
}

// Adjoints between segments: all of them in one walk back from the last state's gradient,
// or what each segment but the first one adds, where a block walks over one.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
scan_adjoints(const element *grad, const element *delta, const element *z,
              const element *c, const float *a, const float *bias, const float *first,
              float *slots, int walked, int softly, int L, int E, int N, int per_group,
              int steps, int segments) {
    __shared__ __align__(16) Rows dt, x;
    __shared__ __align__(16) Matrix C;
    Scan scan = {grad, delta, z, nullptr, c, a, nullptr, bias, first, slots};
    scan.sizes = {L, E, N, per_group, steps, segments};
    scan.softly = softly, scan.walked = walked;
    walk<ADJOINTS>(scan, {dt, x, x, C, C}, walked < L ? blockIdx.x + 1 : 0);
}

#else

// Sum what segments add into states between them, in place: forward from zero in slot 0,
// back from `first`, the last state's gradient (zero if null), behind the last slot. A
// thread does one of SEGMENTS parts of the slots for a state of a channel.
extern "C" __global__ void carry(float *slots, const float *a, const float *first, int E,
                                 int N, int segments, int back) {
    __shared__ float decays[SEGMENTS][32], values[SEGMENTS][32];
    Sizes sizes = {0, E, N, 0, 0, segments};
    int lane = threadIdx.x % 32, part = threadIdx.x / 32;
    int channel = blockIdx.x * 2 + lane / STATES, n = lane % STATES;
    bool there = channel < E && n < N;
    long long state = (long long)channel * N + n;
    float rate = there ? a[state] * LOG2E : 0.0f, start = 0.0f;
    if (there && first) start = first[(long long)blockIdx.z * E * N + state];
    const float *sums = slots + sums_at(sizes);
    int each = (segments - 1 + SEGMENTS - 1) / SEGMENTS;
    int begin = min(part * each, segments - 1), end = min(begin + each, segments - 1);
    float decay = 1.0f, value = 0.0f;
    for (int pass = 0; pass < 2; pass++) {
#pragma unroll 4
        for (int i = begin; i < end && channel < E; i++) {
            long long at = slot_of(back ? segments - 2 - i : i + 1, channel, sizes);
            float d = exp2_fast(rate * sums[at]);
            value = d * value + slots[at * STATES + n];
            decay *= d;
            if (pass == 1) slots[at * STATES + n] = value;
        }
        if (pass == 1) return;
        decays[part][lane] = decay;
        values[part][lane] = value;
        __syncthreads();
        value = start;
        for (int s = 0; s < part; s++) value = decays[s][lane] * value + values[s][lane];
    }
}

#endif
