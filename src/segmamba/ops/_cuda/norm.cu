// Kernels of the instance norm.
//
// In channels-last memory a case is N rows (voxels) of C channels. A thread keeps to VEC
// channels and walks over rows; a block's threads lie side by side over `columns` times
// VEC channels, and over as many rows. Blocks: x = chunk of rows and case, y = slice of
// channels, z = tensor (x or residual) where both have statistics.
//
// A large case takes three launches: sums over chunks, a merge of the chunks, a pass that
// writes. A small one takes one, in which a block does a slice of channels of a case.
//
// Constants: X, R and Y, types of x, of the residual and of the result; VEC, 1, 4 or 8;
// JOIN: 0 no residual, 1 one that is added before the activation, 2 the same, normed
// first, 3 one that is added after the activation; BACKWARD, 0 or 1, which kernels.

#define MOST_THREADS 512
#define KINDS (JOIN == 2 ? 4 : 2)  // numbers a channel: mean, 1 / deviation; residual's
#define SUMS (JOIN == 2 ? 3 : 2)   // and of gradients: alone, times x, times residual
#define MERGED 8                   // channels of a block that merges chunks
#define LANES 32                   // threads for each of them
#define AHEAD 8                    // chunks that such a thread loads at a time

// --- where a thread works --------------------------------------------------------------

struct Place {
    int row, rows, column, columns;  // in its block
    int channel;                     // the first of VEC
    bool valid;                      // they exist
    int item;                        // of the batch
    int chunk, chunks;
    int first, step, end;            // rows that it walks over
    long long base;                  // where its channels of the case begin
};

INLINE Place place_of(int chunk, int batch, int N, int C, int columns) {
    Place p;
    p.columns = columns;
    p.rows = blockDim.x / columns;
    p.row = threadIdx.x / columns;
    p.column = threadIdx.x - p.row * columns;
    p.channel = (blockIdx.y * columns + p.column) * VEC;
    p.valid = p.channel < C;
    p.chunk = chunk / batch;
    p.item = chunk - p.chunk * batch;
    p.chunks = gridDim.x / batch;
    p.base = (long long)p.item * N * C + p.channel;
    return p;
}

// Chunks interleaved: all blocks move through memory together, from front to back.
INLINE Place place_to_sum(int batch, int N, int C, int columns) {
    Place p = place_of(blockIdx.x, batch, N, C, columns);
    p.first = p.chunk * p.rows + p.row;
    p.step = p.chunks * p.rows;
    p.end = N;
    return p;
}

// Chunks in one piece, the last first: what was read last may still be in the cache.
INLINE Place place_to_write(int batch, int N, int C, int columns, int sweeps) {
    Place p = place_of(gridDim.x - 1 - blockIdx.x, batch, N, C, columns);
    p.first = p.chunk * sweeps * p.rows + p.row;
    p.step = p.rows;
    p.end = min(N, (p.chunk + 1) * sweeps * p.rows);
    return p;
}

// Rows of a chunk of `place_to_sum`.
INLINE int rows_of(int chunk, int chunks, int N, int rows) {
    int full = N / (chunks * rows);
    int left = N - (full * chunks + chunk) * rows;
    return full * rows + max(0, min(left, rows));
}

// Call body(row, count) for count rows at a time: `row` and those `step` behind it.
template <int UNROLL, class Body> INLINE void walk(const Place &p, Body body) {
    if (!p.valid) return;
    int at = p.first;
    for (; p.end - at > (UNROLL - 1) * p.step; at += UNROLL * p.step) body(at, UNROLL);
    for (; at < p.end; at += p.step) body(at, 1);
}

template <int COUNT, int WIDTH, class T>
INLINE void load_rows(const T *from, int at, const Place &p, int C, int count,
                      float (&values)[COUNT][WIDTH]) {
#pragma unroll
    for (int u = 0; u < COUNT; u++)
        if (u < count) load(from + p.base + (long long)(at + u * p.step) * C, values[u]);
}

// Merge values of all rows of a block into those of its first row, or of all rows.
template <bool ALL, int COUNT, class Merge>
INLINE void fold(const Place &p, float (&values)[COUNT], Merge merge) {
    __shared__ float shown[COUNT][MOST_THREADS / 2];
    for (int rows = p.rows, half; rows > 1; rows = half) {
        half = (rows + 1) / 2;
        if (p.row >= half && p.row < rows) {
            int slot = (p.row - half) * p.columns + p.column;
#pragma unroll
            for (int i = 0; i < COUNT; i++) shown[i][slot] = values[i];
        }
        __syncthreads();
        if (p.row + half < rows) {
            int slot = p.row * p.columns + p.column;
            float other[COUNT];
#pragma unroll
            for (int i = 0; i < COUNT; i++) other[i] = shown[i][slot];
            merge(values, other);
        }
        __syncthreads();
    }
    if (!ALL) return;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        if (p.row == 0) shown[i][p.column] = values[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < COUNT; i++) values[i] = shown[i][p.column];
    __syncthreads();
}

// Mean and 1 / deviation of a thread's channels.
struct Norm {
    float mean[VEC], rstd[VEC];
};

INLINE Norm load_norm(const float *stats, int tensor, const Place &p, int C) {
    Norm norm = {};
    const float *from = stats + (p.item * KINDS + 2 * tensor) * (long long)C + p.channel;
    if (p.valid) {
        load(from, norm.mean);
        load(from + C, norm.rstd);
    }
    return norm;
}

INLINE void normalise(const Norm &norm, float *values) {
#pragma unroll
    for (int j = 0; j < VEC; j++) values[j] = (values[j] - norm.mean[j]) * norm.rstd[j];
}

// A place for merges: rows are lanes, columns are channels.
INLINE Place place_to_merge(int C) {
    Place p;
    p.row = threadIdx.x / MERGED;
    p.rows = LANES;
    p.column = threadIdx.x % MERGED;
    p.columns = MERGED;
    p.channel = blockIdx.x * MERGED + p.column;
    p.valid = p.channel < C;
    return p;
}

// A number of each of AHEAD chunks from `chunk` on, one for each lane, or zero.
INLINE void load_parts(const float *from, const Place &p, int chunk, int chunks,
                       int stride, float (&values)[AHEAD]) {
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
        int at = chunk + u * LANES;
        values[u] = p.valid && at < chunks ? from[at * (long long)stride] : 0.0f;
    }
}

#if !BACKWARD

// --- statistics ------------------------------------------------------------------------

// Moments of WIDTH channels: the count, means, sums of squared deviations.
template <int WIDTH> struct MergeMoments {
    INLINE void operator()(float *a, const float *b) const {
        if (b[0] == 0.0f) return;
        float count = a[0] + b[0], part = __fdividef(b[0], count), weight = a[0] * part;
#pragma unroll
        for (int j = 1; j <= WIDTH; j++) {
            float delta = b[j] - a[j];
            a[j] += delta * part;
            a[j + WIDTH] += b[j + WIDTH] + delta * delta * weight;
        }
        a[0] = count;
    }
};

// Sums are of differences from the thread's first row: what cancels is then at most the
// thread's count times what remains.
template <class T>
INLINE void moments(const T *x, const Place &p, int C, float (&found)[1 + 2 * VEC]) {
    float shift[VEC] = {}, total[VEC] = {}, squares[VEC] = {};
    bool any = p.valid && p.first < p.end;
    if (any) load(x + p.base + (long long)p.first * C, shift);
    walk<4>(p, [&](int at, int count) {
        float values[4][VEC];
        load_rows(x, at, p, C, count, values);
#pragma unroll
        for (int u = 0; u < 4; u++) {
            if (u >= count) break;
#pragma unroll
            for (int j = 0; j < VEC; j++) {
                float delta = values[u][j] - shift[j];
                total[j] += delta;
                squares[j] += delta * delta;
            }
        }
    });
    float count = any ? (p.end - 1 - p.first) / p.step + 1 : 0;
    float inverse = 1.0f / max(count, 1.0f);
    found[0] = count;
#pragma unroll
    for (int j = 0; j < VEC; j++) {
        float mean = total[j] * inverse;
        found[1 + j] = shift[j] + mean;
        found[1 + j + VEC] = max(squares[j] - total[j] * mean, 0.0f);
    }
}

extern "C" __global__ void __launch_bounds__(MOST_THREADS, 2)
sum_statistics(const X *__restrict__ x, const R *__restrict__ residual,
               float *__restrict__ parts, int batch, int N, int C, int columns) {
    Place p = place_to_sum(batch, N, C, columns);
    float found[1 + 2 * VEC];
    if (JOIN == 2 && blockIdx.z == 1)
        moments(residual, p, C, found);
    else
        moments(x, p, C, found);
    fold<false>(p, found, MergeMoments<VEC>());
    if (p.row > 0 || !p.valid) return;
    int tensor_and_item = blockIdx.z * batch + p.item;
    float *to = parts + (tensor_and_item * p.chunks + p.chunk) * 2LL * C + p.channel;
    store(to, found + 1);
    store(to + C, found + 1 + VEC);
}

INLINE void write_statistics(float *stats, int item, int tensor, int C, int channel,
                             float mean, float rest, int N, float eps) {
    float *to = stats + (item * KINDS + 2 * tensor) * (long long)C + channel;
    to[0] = mean;
    to[C] = 1.0f / sqrtf(rest / N + eps);
}

extern "C" __global__ void __launch_bounds__(MERGED *LANES)
merge_statistics(const float *__restrict__ parts, float *__restrict__ stats, int chunks,
                 int rows, int N, int C, float eps) {
    Place p = place_to_merge(C);
    int item = blockIdx.y, tensor = blockIdx.z;
    parts += (tensor * gridDim.y + item) * (2LL * chunks * C) + p.channel;
    float found[3] = {};
    for (int chunk = p.row; chunk < chunks; chunk += AHEAD * LANES) {
        float means[AHEAD], rests[AHEAD];
        load_parts(parts, p, chunk, chunks, 2 * C, means);
        load_parts(parts + C, p, chunk, chunks, 2 * C, rests);
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            int at = chunk + u * LANES, count = rows_of(at, chunks, N, rows);
            float other[3] = {at < chunks ? (float)count : 0.0f, means[u], rests[u]};
            MergeMoments<1>()(found, other);
        }
    }
    fold<false>(p, found, MergeMoments<1>());
    if (p.row == 0 && p.valid)
        write_statistics(stats, item, tensor, C, p.channel, found[1], found[2], N, eps);
}

// --- the result ------------------------------------------------------------------------

INLINE void write_result(const X *x, const R *residual, Y *out, const Place &p, int C,
                         float slope, const Norm &of_x, const Norm &of_residual) {
    const int UNROLL = JOIN ? 2 : 4;
    walk<UNROLL>(p, [&](int at, int count) {
        float y[UNROLL][VEC], r[UNROLL][VEC];
        load_rows(x, at, p, C, count, y);
        if (JOIN) load_rows(residual, at, p, C, count, r);
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            if (u >= count) break;
            normalise(of_x, y[u]);
            if (JOIN == 2) normalise(of_residual, r[u]);
#pragma unroll
            for (int j = 0; j < VEC; j++) {
                float value = y[u][j];
                if (JOIN == 1 || JOIN == 2) value += r[u][j];
                value = value > 0.0f ? value : value * slope;
                y[u][j] = JOIN == 3 ? value + r[u][j] : value;
            }
            store(out + p.base + (long long)(at + u * p.step) * C, y[u]);
        }
    });
}

extern "C" __global__ void __launch_bounds__(MOST_THREADS, 2)
normalise_large(const X *__restrict__ x, const R *__restrict__ residual,
                const float *__restrict__ stats, Y *__restrict__ out, int batch, int N,
                int C, int columns, int sweeps, float slope) {
    Place p = place_to_write(batch, N, C, columns, sweeps);
    Norm of_x = load_norm(stats, 0, p, C);
    Norm of_residual = JOIN == 2 ? load_norm(stats, 1, p, C) : of_x;
    write_result(x, residual, out, p, C, slope, of_x, of_residual);
}

// Statistics of a block's channels, by a block that walks over all rows.
template <class T>
INLINE Norm norm_of(const T *x, float *stats, int tensor, const Place &p, int N, int C,
                    float eps) {
    float found[1 + 2 * VEC];
    moments(x, p, C, found);
    fold<true>(p, found, MergeMoments<VEC>());
    Norm norm;
#pragma unroll
    for (int j = 0; j < VEC; j++) {
        norm.mean[j] = found[1 + j];
        norm.rstd[j] = 1.0f / sqrtf(found[1 + j + VEC] / N + eps);
    }
    if (p.row == 0 && p.valid) {
        float *to = stats + (p.item * KINDS + 2 * tensor) * (long long)C + p.channel;
        store(to, norm.mean);
        store(to + C, norm.rstd);
    }
    return norm;
}

extern "C" __global__ void __launch_bounds__(MOST_THREADS)
normalise_small(const X *__restrict__ x, const R *__restrict__ residual,
                float *__restrict__ stats, Y *__restrict__ out, int batch, int N, int C,
                int columns, float slope, float eps) {
    Place p = place_to_sum(batch, N, C, columns);
    Norm of_x = norm_of(x, stats, 0, p, N, C, eps);
    Norm of_residual = JOIN == 2 ? norm_of(residual, stats, 1, p, N, C, eps) : of_x;
    write_result(x, residual, out, p, C, slope, of_x, of_residual);
}

#else

// --- gradients -------------------------------------------------------------------------

struct Add {
    INLINE void operator()(float (&a)[SUMS * VEC], const float *b) const {
#pragma unroll
        for (int i = 0; i < SUMS * VEC; i++) a[i] += b[i];
    }
};

// What a thread reads for some rows: the gradient behind the activation, normed x, and
// the residual, normed where it takes part so.
template <int UNROLL> struct Rows {
    float g[UNROLL][VEC], x[UNROLL][VEC], r[UNROLL][VEC];

    INLINE void read(const Y *grad, const X *from, const R *residual, int at,
                     const Place &p, int C, int count, float slope, const Norm &of_x,
                     const Norm &of_residual) {
        load_rows(grad, at, p, C, count, g);
        load_rows(from, at, p, C, count, x);
        if (JOIN) load_rows(residual, at, p, C, count, r);
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            if (u >= count) break;
            normalise(of_x, x[u]);
            if (JOIN == 2) normalise(of_residual, r[u]);
#pragma unroll
            for (int j = 0; j < VEC; j++) {
                float y = JOIN ? x[u][j] + r[u][j] : x[u][j];
                g[u][j] = y > 0.0f ? g[u][j] : g[u][j] * slope;
            }
        }
    }
};

INLINE void sum_rows(const Y *grad, const X *x, const R *residual, const Place &p, int C,
                     float slope, const Norm &of_x, const Norm &of_residual,
                     float (&sums)[SUMS * VEC]) {
#pragma unroll
    for (int i = 0; i < SUMS * VEC; i++) sums[i] = 0.0f;
    walk<2>(p, [&](int at, int count) {
        Rows<2> rows;
        rows.read(grad, x, residual, at, p, C, count, slope, of_x, of_residual);
#pragma unroll
        for (int u = 0; u < 2; u++) {
            if (u >= count) break;
#pragma unroll
            for (int j = 0; j < VEC; j++) {
                float g = rows.g[u][j];
                sums[j] += g;
                sums[VEC + j] += g * rows.x[u][j];
                if (JOIN == 2) sums[(SUMS - 1) * VEC + j] += g * rows.r[u][j];
            }
        }
    });
}

extern "C" __global__ void __launch_bounds__(MOST_THREADS, 2)
sum_gradients(const Y *__restrict__ grad, const X *__restrict__ x,
              const R *__restrict__ residual, const float *__restrict__ stats,
              float *__restrict__ parts, int batch, int N, int C, int columns,
              float slope) {
    Place p = place_to_sum(batch, N, C, columns);
    Norm of_x = load_norm(stats, 0, p, C);
    Norm of_residual = JOIN == 2 ? load_norm(stats, 1, p, C) : of_x;
    float sums[SUMS * VEC];
    sum_rows(grad, x, residual, p, C, slope, of_x, of_residual, sums);
    fold<false>(p, sums, Add());
    if (p.row > 0 || !p.valid) return;
    parts += (p.item * p.chunks + p.chunk) * (long long)(SUMS * C) + p.channel;
#pragma unroll
    for (int kind = 0; kind < SUMS; kind++) store(parts + kind * C, sums + kind * VEC);
}

struct AddOne {
    INLINE void operator()(float *a, const float *b) const {
        a[0] += b[0];
    }
};

extern "C" __global__ void __launch_bounds__(MERGED *LANES)
merge_gradients(const float *__restrict__ parts, float *__restrict__ means, int chunks,
                int N, int C) {
    Place p = place_to_merge(C);
    int item = blockIdx.y, kind = blockIdx.z;
    parts += item * (long long)(SUMS * C) * chunks + kind * C + p.channel;
    float sum[1] = {};
    for (int chunk = p.row; chunk < chunks; chunk += AHEAD * LANES) {
        float values[AHEAD];
        load_parts(parts, p, chunk, chunks, SUMS * C, values);
#pragma unroll
        for (int u = 0; u < AHEAD; u++) sum[0] += values[u];
    }
    fold<false>(p, sum, AddOne());
    if (p.row == 0 && p.valid) means[(item * SUMS + kind) * C + p.channel] = sum[0] / N;
}

// Write gradients of x and, unless it joins after, of the residual.
INLINE void write_gradients(const Y *grad, const X *x, const R *residual, X *grad_x,
                            R *grad_residual, const Place &p, int C, float slope,
                            const Norm &of_x, const Norm &of_residual,
                            const float (&means)[SUMS * VEC]) {
    walk<2>(p, [&](int at, int count) {
        Rows<2> rows;
        rows.read(grad, x, residual, at, p, C, count, slope, of_x, of_residual);
#pragma unroll
        for (int u = 0; u < 2; u++) {
            if (u >= count) break;
            long long offset = p.base + (long long)(at + u * p.step) * C;
            float back[VEC];
#pragma unroll
            for (int j = 0; j < VEC; j++) {
                float rest = rows.g[u][j] - means[j] - rows.x[u][j] * means[VEC + j];
                back[j] = rest * of_x.rstd[j];
            }
            store(grad_x + offset, back);
            if (JOIN == 1) store(grad_residual + offset, rows.g[u]);
            if (JOIN != 2) continue;
#pragma unroll
            for (int j = 0; j < VEC; j++) {
                float along = rows.r[u][j] * means[(SUMS - 1) * VEC + j];
                back[j] = (rows.g[u][j] - means[j] - along) * of_residual.rstd[j];
            }
            store(grad_residual + offset, back);
        }
    });
}

extern "C" __global__ void __launch_bounds__(MOST_THREADS, 2)
differentiate_large(const Y *__restrict__ grad, const X *__restrict__ x,
                    const R *__restrict__ residual, const float *__restrict__ stats,
                    const float *__restrict__ means, X *__restrict__ grad_x,
                    R *__restrict__ grad_residual, int batch, int N, int C, int columns,
                    int sweeps, float slope) {
    Place p = place_to_write(batch, N, C, columns, sweeps);
    Norm of_x = load_norm(stats, 0, p, C);
    Norm of_residual = JOIN == 2 ? load_norm(stats, 1, p, C) : of_x;
    float found[SUMS * VEC] = {};
    const float *from = means + p.item * (SUMS * C) + p.channel;
#pragma unroll
    for (int kind = 0; kind < SUMS; kind++)
        if (p.valid) load(from + kind * C, found + kind * VEC);
    write_gradients(grad, x, residual, grad_x, grad_residual, p, C, slope, of_x,
                    of_residual, found);
}

extern "C" __global__ void __launch_bounds__(MOST_THREADS)
differentiate_small(const Y *__restrict__ grad, const X *__restrict__ x,
                    const R *__restrict__ residual, const float *__restrict__ stats,
                    X *__restrict__ grad_x, R *__restrict__ grad_residual, int batch,
                    int N, int C, int columns, float slope) {
    Place p = place_to_sum(batch, N, C, columns);
    Norm of_x = load_norm(stats, 0, p, C);
    Norm of_residual = JOIN == 2 ? load_norm(stats, 1, p, C) : of_x;
    float sums[SUMS * VEC];
    sum_rows(grad, x, residual, p, C, slope, of_x, of_residual, sums);
    fold<true>(p, sums, Add());
#pragma unroll
    for (int i = 0; i < SUMS * VEC; i++) sums[i] /= N;
    write_gradients(grad, x, residual, grad_x, grad_residual, p, C, slope, of_x,
                    of_residual, sums);
}

#endif
