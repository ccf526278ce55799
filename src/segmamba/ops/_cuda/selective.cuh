// What the kernels of `selective_scan` share: tensors by channel, rows of L steps.
//
// u, delta, z and their like are (batch, E, L), B and C (batch, G, N, L). Four steps of a
// row are loaded at once. Constants: KIND, WARPS, and ALIGNED where L is a multiple of 4.

#define STATES 16
#define THREADS (32 * WARPS)
#define KEPT 32  // steps between states that the forward keeps for the backward

#if !defined(KIND) || KIND == 0
typedef float4 Quad;
#else
typedef uint2 Quad;
#endif

// Numbers of a scan. A row has `segments` of `steps` steps each, the last one perhaps
// fewer; as many are the slots for states between them.
struct Sizes {
    int L, E, N, per_group, steps, segments;
};

// Four steps of a row from step t on. Loads don't depend on conditions, so that many are
// under way at once: steps behind the row's end give others, to be cleared by `mask`.
INLINE Quad load_quad(const element *row, int t, int L) {
    Quad quad;
#ifdef ALIGNED
    quad = *reinterpret_cast<const Quad *>(row + min(t, L - 4));
#else
    element *one = reinterpret_cast<element *>(&quad);
#pragma unroll
    for (int i = 0; i < 4; i++) one[i] = row[min(t + i, L - 1)];
#endif
    return quad;
}

INLINE void open(const Quad &quad, float *values) {
    load4(reinterpret_cast<const element *>(&quad), values);
}

// Of steps t to t + 3, those before `end`.
INLINE bool before(int t, int i, int end) {
#ifdef ALIGNED
    return t < end;
#else
    return t + i < end;
#endif
}

// Clear values from step `end` on, or all where there is no such row.
INLINE void mask(float *values, bool there, int t, int end) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        values[i] = there && before(t, i, end) ? values[i] : 0.0f;
    }
}

INLINE void store_quad(element *row, bool there, int t, int end, const float *values) {
#ifdef ALIGNED
    if (there && t < end) store4(row + t, values);
#else
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (there && t + i < end) row[t + i] = from_float(values[i]);
    }
#endif
}

// Deltas to step sizes.
INLINE void soften(float *values, float bias, int softly) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        values[i] += bias;
        if (softly) values[i] = softplus(values[i]);
    }
}

INLINE void multiply_gate(const Quad &gate, float *values) {
    float z[4];
    open(gate, z);
#pragma unroll
    for (int i = 0; i < 4; i++) values[i] *= silu(z[i]);
}

// Which slot of a channel, in (batch, segments, E).
INLINE long long slot_of(int i, int channel, const Sizes &sizes) {
    return ((long long)blockIdx.z * sizes.segments + i) * sizes.E + channel;
}

// Where the sums of step sizes begin, behind the states of all slots.
INLINE long long sums_at(const Sizes &sizes) {
    return (long long)gridDim.z * sizes.segments * sizes.E * STATES;
}

// Where a channel's state before a step is kept, in (batch, L / KEPT, E).
INLINE long long kept_at(int t, int channel, const Sizes &sizes) {
    int chunks = (sizes.L + KEPT - 1) / KEPT;
    return (((long long)blockIdx.z * chunks + t / KEPT) * sizes.E + channel) * STATES;
}
