// The scan's forward: chunks from a zero state, the carry, the outputs; and, for the
// backward, adjoints of chunks from a zero end.

#include "scan.cuh"

// Each chunk's last state from a zero one, and its sum of step sizes. Both go to the slot
// of the chunk's end, where the carry wants them. Slots are of chunks' ends, `every` by
// `every`, and between them of parts' ends.
extern "C" __global__ void __launch_bounds__(THREADS)
scan_chunks(const element *u, const element *code, const element *b, const float *a,
            const float *weight, const float *bias, float *kept, int L, int E,
            int batch, int chunks, int rank, int code_stride, int b_stride, int every) {
    __shared__ __align__(16) float B[CHUNK * STATES];
    extern __shared__ __align__(16) float code_s[];
    Place p = place_of(blockIdx.x, L, batch, E);
    u += p.base * E, code += p.base * code_stride;
    b += p.base * b_stride;
    stage_states(B, STATES, b, b_stride, p.count, CHUNK);
    stage_code<CHUNK>(code_s, code, code_stride, rank, p.count);
    float rate[STATES], state[STATES], total = 0.0f;
    load_rates(rate, a, p, E);
#pragma unroll
    for (int n = 0; n < STATES; n++) state[n] = 0.0f;
    __syncthreads();
    for (int t0 = 0; t0 < CHUNK; t0 += STEPS) {
        float dt[STEPS], x[STEPS];
        column<STEPS>(x, u, p.channel, t0, E, p.count);
        step_sizes<STEPS>(dt, p, code_s, CHUNK, t0, weight, bias, rank, E, p.count);
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            float Bt[STATES], drive = dt[i] * x[i];
            load16(B + (t0 + i) * STATES, Bt);
            total += dt[i];
#pragma unroll
            for (int n = 0; n < STATES; n++) {
                state[n] = state[n] * exp2_fast(rate[n] * dt[i]) + drive * Bt[n];
            }
        }
    }
    if (!p.valid) return;
    kept += slot_of(p, (p.chunk + 1) * every, chunks * every, E) + p.channel;
#pragma unroll
    for (int n = 0; n < STATES; n++) kept[(long long)n * E] = state[n];
    kept[(long long)STATES * E] = total;
    // the first slot has no chunk before it
    if (p.chunk == 0) kept[(STATES - every * (STATES + 1LL)) * E] = 0.0f;
}

// Carry states over the chunks, in place.
//
// Forward, the slot of chunk i's end holds what it adds, and that of its start becomes the
// state that it starts from. back: slot i - 1 holds what chunk i adds to the adjoint, and
// slot i becomes the adjoint that chunk i ends with. The slot to start from counts as zero.
// A thread does a segment of the chunks for one channel. Chunks' slots are
// `states_every` and `every` from each other.
extern "C" __global__ void carry_states(float *states, const float *kept, const float *a,
                                        int E, int batch, int chunks, int back,
                                        int states_every, int every) {
    __shared__ float decays[SEGMENTS][CARRIED], values[SEGMENTS][CARRIED];
    int lane = threadIdx.x % CARRIED, segment = threadIdx.x / CARRIED;
    int channel = blockIdx.x * CARRIED + lane, n = blockIdx.y, row = blockIdx.z;
    bool valid = channel < E;
    channel = valid ? channel : 0;
    float rate = a[((long long)(row / batch) * STATES + n) * E + channel];
    int count = chunks + 1 - back, each = (count + SEGMENTS - 1) / SEGMENTS;
    int begin = min(segment * each, count), end = min(begin + each, count);
    long long slot = (long long)(STATES + 1) * E;
    long long step = states_every * slot, sum_step = every * slot;
    float *state = states + row * (chunks * step + slot) + (long long)n * E + channel;
    const float *sum = kept + row * (chunks * sum_step + slot) + (long long)STATES * E + channel;
    if (back) {
        state += (chunks - 1) * step, sum += (chunks + 1) * sum_step;
        step = -step, sum_step = -sum_step;
    }
    float decay = 1.0f, value = 0.0f;
#pragma unroll 8
    for (int i = begin; i < end; i++) {
        float d = i > 0 ? exp2_fast(rate * sum[i * sum_step]) : 0.0f;
        float v = i > 0 ? state[i * step] : 0.0f;
        value = d * value + v;
        decay *= d;
    }
    decays[segment][lane] = decay;
    values[segment][lane] = value;
    __syncthreads();
    value = 0.0f;
    for (int s = 0; s < segment; s++) value = decays[s][lane] * value + values[s][lane];
    if (!valid) return;
#pragma unroll 8
    for (int i = begin; i < end; i++) {
        float d = i > 0 ? exp2_fast(rate * sum[i * sum_step]) : 0.0f;
        float v = i > 0 ? state[i * step] : 0.0f;
        value = d * value + v;
        state[i * step] = value;
    }
}

// A state between chunks, behind which no sum of step sizes is.
INLINE void keep(float *kept, const float *state, int E, bool valid) {
    if (!valid) return;
#pragma unroll
    for (int n = 0; n < STATES; n++) kept[(long long)n * E] = state[n];
    kept[(long long)STATES * E] = 0.0f;
}

// Each chunk from its true first state; y by token, written or added to. States before
// parts go to their slots, if there are such.
extern "C" __global__ void __launch_bounds__(THREADS)
scan_outputs(const element *u, const element *code, const element *b, const element *c,
             const float *a, const float *weight, const float *bias, const float *skip,
             const int *orders, float *kept, element *y, int L, int E,
             int batch, int chunks, int rank, int code_stride, int b_stride,
             int c_stride, int add, int every) {
    __shared__ __align__(16) float BC[CHUNK * 2 * STATES];
    __shared__ int tokens[CHUNK];
    extern __shared__ __align__(16) float code_s[];
    Place p = place_of(blockIdx.x, L, batch, E);
    u += p.base * E, code += p.base * code_stride;
    b += p.base * b_stride;
    c += p.base * c_stride;
    y += (long long)p.row * L * E;
    stage_states(BC, 2 * STATES, b, b_stride, p.count, CHUNK);
    stage_states(BC + STATES, 2 * STATES, c, c_stride, p.count, CHUNK);
    stage_code<CHUNK>(code_s, code, code_stride, rank, p.count);
    stage_tokens(tokens, orders, p.direction, p.chunk * CHUNK, L, E, CHUNK);
    float rate[STATES], state[STATES];
    load_rates(rate, a, p, E);
    float D = skip[p.direction * E + p.channel];
    kept += slot_of(p, p.chunk * every, chunks * every, E) + p.channel;
#pragma unroll
    for (int n = 0; n < STATES; n++) state[n] = kept[(long long)n * E];
    __syncthreads();
    for (int t0 = 0; t0 < (every > 1 ? CHUNK : p.count); t0 += STEPS) {
        if (every > 1 && t0 && t0 % PART == 0) {
            kept += (STATES + 1) * E;
            keep(kept, state, E, p.valid);
        }
        if (t0 >= p.count) continue;
        float dt[STEPS], x[STEPS], before[STEPS] = {};
        column<STEPS>(x, u, p.channel, t0, E, p.count);
        if (add) {
            gather<STEPS>(before, y, p.channel, t0, p.count,
                          [&](int t) { return tokens[t]; });
        }
        step_sizes<STEPS>(dt, p, code_s, CHUNK, t0, weight, bias, rank, E, p.count);
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            float Bt[STATES], Ct[STATES], drive = dt[i] * x[i];
            float sums[4] = {D * x[i], before[i], 0.0f, 0.0f};
            load16(BC + (t0 + i) * 2 * STATES, Bt);
            load16(BC + (t0 + i) * 2 * STATES + STATES, Ct);
#pragma unroll
            for (int n = 0; n < STATES; n++) {
                state[n] = state[n] * exp2_fast(rate[n] * dt[i]) + drive * Bt[n];
                sums[n % 4] += state[n] * Ct[n];
            }
            element out = from_float((sums[0] + sums[1]) + (sums[2] + sums[3]));
            bool here = p.valid && t0 + i < p.count;
            store_if(here, y + tokens[t0 + i] + p.channel, out);
        }
    }
}

// The adjoint with which each chunk but the first begins, from a zero end; it goes to
// slot chunk - 1, where the carry wants it. grad is by token, of `grad_rows` rows of
// sequences: one for each case, or one for each direction too.
extern "C" __global__ void __launch_bounds__(THREADS)
adjoint_chunks(const element *grad, const element *code, const element *c,
               const float *a, const float *weight, const float *bias,
               const int *orders, float *adjoints, int L, int E, int batch, int chunks, int grad_rows, int rank, int code_stride,
               int c_stride) {
    __shared__ __align__(16) float C[CHUNK * STATES];
    __shared__ int tokens[CHUNK];
    extern __shared__ __align__(16) float code_s[];
    Place p = place_of(blockIdx.x + 1, L, batch, E);
    code += p.base * code_stride;
    c += p.base * c_stride;
    grad += (long long)(p.row % grad_rows) * L * E;
    stage_states(C, STATES, c, c_stride, p.count, CHUNK);
    stage_code<CHUNK>(code_s, code, code_stride, rank, p.count);
    stage_tokens(tokens, orders, p.direction, p.chunk * CHUNK, L, E, CHUNK);
    float rate[STATES], adjoint[STATES];
    load_rates(rate, a, p, E);
#pragma unroll
    for (int n = 0; n < STATES; n++) adjoint[n] = 0.0f;
    __syncthreads();
    for (int t0 = CHUNK - STEPS; t0 >= 0; t0 -= STEPS) {
        float dt[STEPS], dy[STEPS];
        gather<STEPS>(dy, grad, p.channel, t0, p.count,
                      [&](int t) { return tokens[t]; });
#pragma unroll
        for (int i = 0; i < STEPS; i++) dy[i] = t0 + i < p.count ? dy[i] : 0.0f;
        step_sizes<STEPS>(dt, p, code_s, CHUNK, t0, weight, bias, rank, E, p.count);
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
