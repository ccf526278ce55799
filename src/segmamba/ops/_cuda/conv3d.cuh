// What the convolution's kernels share: how features get into shared memory.
//
// A window is part of a slice, HIGH by WIDE voxels. In shared memory it lies as planes of
// eight channels; a plane has 16 bytes for each voxel, and the next one is PLANE * 16
// bytes on: an odd number, so that copies of neighbouring threads meet different banks.
// Eight neighbours along W then are a piece of a product's matrix, wherever they start.
// Voxels outside of the features become zeros.

#include "hopper.cuh"

#define TALL 8 // voxels that a block does at a time, along H and W
#define WIDE 16

struct Features {
    const element *data;
    int D, H, W, pitch; // elements from voxel to voxel
};

INLINE int parts(int count, int size) {
    return (count + size - 1) / size;
}

// Columns of TALL by WIDE voxels, which run along D: case and first voxel of one.
struct Column {
    int item, h, w;
};

INLINE Column column_of(int number, const Features &x) {
    int wide = parts(x.W, WIDE), high = parts(x.H, TALL);
    return {number / wide / high, number / wide % high * TALL, number % wide * WIDE};
}

// CHANNELS of a voxel are copied, 4 or a multiple of 8, by all threads of a block.
template <int HIGH, int WIDTH, int CHANNELS, int THREADS> struct Window {
    static constexpr int PLANE = HIGH * WIDTH | 1;
    static constexpr int PLANES = (CHANNELS + 7) / 8;
    static constexpr int COUNT = HIGH * WIDTH * PLANES;
    static constexpr int ITEMS = (COUNT + THREADS - 1) / THREADS;

    int from[ITEMS]; // where in a slice this thread copies from; -1 for zeros

    INLINE void aim(const Features &x, int first_h, int first_w) {
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            int item = threadIdx.x + i * THREADS, voxel = item / PLANES;
            int h = first_h + voxel / WIDTH, w = first_w + voxel % WIDTH;
            bool inside = h >= 0 && h < x.H && w >= 0 && w < x.W;
            from[i] = inside ? (h * x.W + w) * x.pitch + item % PLANES * 8 : -1;
        }
    }

    // Copy it from slice z of a case, if there is such a slice.
    INLINE void load(unsigned place, const Features &x, int item, int z) const {
        bool exists = z >= 0 && z < x.D;
        long long slice = exists ? (item * (long long)x.D + z) * x.H * x.W * x.pitch : 0;
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            int number = threadIdx.x + i * THREADS;
            if (number >= COUNT) break;
            bool inside = exists && from[i] >= 0;
            copy_async<CHANNELS == 4 ? 8 : 16>(
                place + number % PLANES * PLANE + number / PLANES,
                inside ? x.data + slice + from[i] : x.data, inside);
        }
    }
};
