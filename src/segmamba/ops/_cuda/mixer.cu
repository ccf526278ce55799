// What stands around the scan: causal convolution with silu, the gate, their gradients,
// and the parameters' layout.
//
// x and z are the halves of rows of xz, by token; u and its gradient are by position, a
// (direction times batch) row of sequences each. A thread does eight channels.
// Constants: KIND, TAPS, and RUN, the rows of a thread.

#define STATES 16

// A walk along an order without divisions: where it stands in a run, and which run.
struct Walk {
    int inside, run, step, stride, per;

    INLINE Walk(int position, const int *order, int L) {
        stride = order[0], per = L / stride;
        int place = order[1] ? L - 1 - position : position;
        inside = place % stride, run = place / stride;
        step = order[1] ? -1 : 1;
    }

    INLINE long long token() const { return (long long)inside * per + run; }

    INLINE void on() {
        inside += step;
        if (inside == stride) inside = 0, run++;
        if (inside < 0) inside = stride - 1, run--;
    }
};

struct Taps {
    float weight[TAPS][8], bias[8];

    // taps are (K, TAPS, E), offsets (K, E)
    INLINE Taps(const float *taps, const float *offset, int direction, int channel,
                int E) {
#pragma unroll
        for (int j = 0; j < TAPS; j++) {
            load8(taps + ((long long)direction * TAPS + j) * E + channel, weight[j]);
        }
        load8(offset + (long long)direction * E + channel, bias);
    }
};

// The last TAPS rows of x at a thread's channels.
struct Window {
    float rows[TAPS][8];

    INLINE void push(const element *from) {
#pragma unroll
        for (int j = 0; j + 1 < TAPS; j++) {
#pragma unroll
            for (int i = 0; i < 8; i++) rows[j][i] = rows[j + 1][i];
        }
        if (from) {
            load8(from, rows[TAPS - 1]);
        } else {
#pragma unroll
            for (int i = 0; i < 8; i++) rows[TAPS - 1][i] = 0.0f;
        }
    }

    INLINE void convolve(const Taps &taps, float *sum) const {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            sum[i] = taps.bias[i];
#pragma unroll
            for (int j = 0; j < TAPS; j++) sum[i] += taps.weight[j][i] * rows[j][i];
        }
    }
};

// Fill a window with the rows before a position.
INLINE Walk enter(Window &window, const element *x, const int *order, int first, int E,
                  int L) {
    Walk walk(first >= TAPS ? first - TAPS + 1 : 0, order, L);
#pragma unroll
    for (int t = first - TAPS + 1; t < first; t++) {
        window.push(t >= 0 ? x + walk.token() * 2 * E : nullptr);
        if (t >= 0) walk.on();
    }
    return walk;
}

// u = silu(causal convolution of x along an order).
extern "C" __global__ void conv_silu(const element *xz, const float *taps,
                                     const float *offset, const int *orders, element *u,
                                     int L, int E, int batch) {
    int index = blockIdx.x * blockDim.x + threadIdx.x, eighths = E / 8;
    int channel = index % eighths * 8, first = index / eighths * RUN;
    int row = blockIdx.y, direction = row / batch;
    if (first >= L) return;
    xz += (long long)(row % batch) * L * 2 * E + channel;
    u += (long long)row * L * E + channel;
    Taps weights(taps, offset, direction, channel, E);
    Window window;
    Walk walk = enter(window, xz, orders + 2 * direction, first, E, L);
    int last = min(first + RUN, L);
#pragma unroll 4
    for (int t = first; t < last; t++) {
        float sum[8];
        window.push(xz + walk.token() * 2 * E);
        walk.on();
        window.convolve(weights, sum);
#pragma unroll
        for (int i = 0; i < 8; i++) sum[i] = silu(sum[i]);
        store8(u + (long long)t * E, sum);
    }
}

// Gradient of u to that of the convolution, in place; sums for taps and bias.
//
// A block is `across` eighths of channels by several runs, and goes on along the rows;
// partial is (rows, blocks, TAPS + 1, E).
extern "C" __global__ void conv_silu_back(const element *xz, const float *taps,
                                          const float *offset, const int *orders,
                                          element *grad, float *partial, int L, int E,
                                          int batch, int across) {
    extern __shared__ __align__(16) float sums_s[];
    int column = threadIdx.x % across, down = threadIdx.x / across;
    int high = blockDim.x / across;
    int channel = (blockIdx.y * across + column) * 8;
    int row = blockIdx.z, direction = row / batch;
    xz += (long long)(row % batch) * L * 2 * E + channel;
    grad += (long long)row * L * E + channel;
    Taps weights(taps, offset, direction, channel, E);
    float sums[TAPS + 1][8];
#pragma unroll
    for (int j = 0; j <= TAPS; j++) {
#pragma unroll
        for (int i = 0; i < 8; i++) sums[j][i] = 0.0f;
    }
    int runs = (L + RUN - 1) / RUN;
    for (int r = blockIdx.x * high + down; r < runs; r += gridDim.x * high) {
        Window window;
        Walk walk = enter(window, xz, orders + 2 * direction, r * RUN, E, L);
        int last = min(r * RUN + RUN, L);
#pragma unroll 2
        for (int t = r * RUN; t < last; t++) {
            float sum[8], of[8];
            window.push(xz + walk.token() * 2 * E);
            walk.on();
            window.convolve(weights, sum);
            load8(grad + (long long)t * E, of);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                float open = sigmoid(sum[i]);
                of[i] *= open * (1.0f + sum[i] * (1.0f - open));
                sums[TAPS][i] += of[i];
#pragma unroll
                for (int j = 0; j < TAPS; j++) sums[j][i] += of[i] * window.rows[j][i];
            }
            store8(grad + (long long)t * E, of);
        }
    }
    long long program = (long long)row * gridDim.x + blockIdx.x;
    partial += program * (TAPS + 1) * E + blockIdx.y * across * 8;
#pragma unroll
    for (int j = 0; j <= TAPS; j++) {
        __syncthreads();
        store8(sums_s + threadIdx.x * 8, sums[j]);
        __syncthreads();
        for (int i = threadIdx.x; i < across * 8; i += blockDim.x) {
            float total = 0.0f;
            for (int d = 0; d < high; d++) total += sums_s[d * across * 8 + i];
            partial[(long long)j * E + i] = total;
        }
    }
}

// Gradient of x by token, in rows of a width, from those of K directions' convolutions;
// added where `add`.
extern "C" __global__ void conv_input_back(const element *grad, const float *taps,
                                           const int *orders, element *grad_x, int L,
                                           int E, int width, int batch, int K,
                                           int add) {
    int index = blockIdx.x * blockDim.x + threadIdx.x, eighths = E / 8;
    int channel = index % eighths * 8, token = index / eighths, one = blockIdx.y;
    if (token >= L) return;
    element *target = grad_x + ((long long)one * L + token) * width + channel;
    float total[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    if (add) load8(target, total);
    for (int k = 0; k < K; k++) {
        int stride = orders[2 * k], per = L / stride;
        int place = token % per * stride + token / per;
        if (orders[2 * k + 1]) place = L - 1 - place;
        const element *from =
            grad + (((long long)k * batch + one) * L + place) * E + channel;
#pragma unroll
        for (int j = 0; j < TAPS; j++) {
            if (place + j >= L) break;
            float tap[8], of[8];
            load8(taps + ((long long)k * TAPS + TAPS - 1 - j) * E + channel, tap);
            load8(from + (long long)j * E, of);
#pragma unroll
            for (int i = 0; i < 8; i++) total[i] += tap[i] * of[i];
        }
    }
    store8(target, total);
}

// out = (sum of y over K directions) silu(z), for `rows` rows; sum is kept if given.
extern "C" __global__ void gate(const element *y, const element *xz, element *sum,
                                element *out, int rows, int E, int K) {
    int index = blockIdx.x * blockDim.x + threadIdx.x, eighths = E / 8;
    int channel = index % eighths * 8;
    long long row = index / eighths;
    if (row >= rows) return;
    float total[8] = {0, 0, 0, 0, 0, 0, 0, 0}, z[8];
    for (int k = 0; k < K; k++) {
        float part[8];
        load8(y + ((long long)k * rows + row) * E + channel, part);
#pragma unroll
        for (int i = 0; i < 8; i++) total[i] += part[i];
    }
    load8(xz + row * 2 * E + E + channel, z);
    if (sum) store8(sum + row * E + channel, total);
#pragma unroll
    for (int i = 0; i < 8; i++) total[i] *= silu(z[i]);
    store8(out + row * E + channel, total);
}

// Gradients of the gate, in place: that of z in xz, that of the sum in grad; and the
// gated sum.
extern "C" __global__ void gate_back(element *grad, const element *sum, element *xz,
                                     element *gated, int rows, int E) {
    int index = blockIdx.x * blockDim.x + threadIdx.x, eighths = E / 8;
    int channel = index % eighths * 8;
    long long row = index / eighths;
    if (row >= rows) return;
    float of[8], total[8], z[8], out[8];
    load8(grad + row * E + channel, of);
    load8(sum + row * E + channel, total);
    load8(xz + row * 2 * E + E + channel, z);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float open = sigmoid(z[i]), gate = z[i] * open;
        out[i] = total[i] * gate;
        total[i] *= of[i] * open * (1.0f + z[i] * (1.0f - open));
        of[i] *= gate;
    }
    store8(xz + row * 2 * E + E + channel, total);
    store8(grad + row * E + channel, of);
    store8(gated + row * E + channel, out);
}

// Parameters of K directions as the kernels want them, from all of them in a row:
// taps (K, E, TAPS), offset (K, E), x_proj (K, rank + 2 states, E), dt_proj
// (K, E, rank), dt_bias (K, E), A_log (K, E, states), D (K, E).
//
// Writes taps (K, TAPS, E), dt_proj (K, rank, E) and A / ln 2 (K, 16, E) one behind the
// other, and the projection (K, columns, E): 16 rows for B, 16 for C, the code's, zeros.
extern "C" __global__ void arrange(const float *flat, float *out, element *projection,
                                   int K, int E, int rank, int states, int columns) {
    int index = blockIdx.x * blockDim.x + threadIdx.x, all = K * E;
    const float *x_proj = flat + (long long)all * (TAPS + 1);
    const float *dt_proj = x_proj + (long long)all * (rank + 2 * states);
    const float *log_rates = dt_proj + (long long)all * (rank + 1);
    int line = index / E, channel = index % E;
    int kept = K * (TAPS + rank + STATES);
    if (line >= kept) {
        line -= kept;
        int k = line / columns, column = line % columns;
        if (k >= K) return;
        int n = column % STATES, from = column - 2 * STATES;
        if (column < 2 * STATES) from = rank + column / STATES * states + n;
        bool there = column < 2 * STATES ? n < states : from < rank;
        const float *row = x_proj + (long long)(k * (rank + 2 * states) + from) * E;
        float value = there ? row[channel] : 0.0f;
        projection[(long long)line * E + channel] = from_float(value);
        return;
    }
    float value;
    if (line < K * TAPS) {
        value = flat[(line / TAPS * E + channel) * TAPS + line % TAPS];
    } else if (line < K * (TAPS + rank)) {
        int of = line - K * TAPS;
        value = dt_proj[(of / rank * E + channel) * rank + of % rank];
    } else {
        int of = line - K * (TAPS + rank), n = of % STATES;
        value = 0.0f;
        if (n < states) {
            value = log_rates[(of / STATES * E + channel) * states + n];
            value = -LOG2E * expf(value);
        }
    }
    out[(long long)line * E + channel] = value;
}
