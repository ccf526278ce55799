// What the kernels share: element types, vector accesses, fast functions.
//
// NVRTC compiles this without CUDA's headers. Where EMULATED is defined, a C++ compiler
// does, and the tests' emulator has defined what stands below between #ifndef and #endif.

#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f
#define INLINE __device__ __forceinline__

// --- element types -------------------------------------------------------------------

struct bfloat16 {
    unsigned short bits;
};

struct float16 {
    unsigned short bits;
};

#if !defined(KIND) || KIND == 0
typedef float element;
#elif KIND == 1
typedef bfloat16 element;
#else
typedef float16 element;
#endif

#ifndef EMULATED

INLINE float half_value(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

INLINE unsigned short half_bits(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

// Two of them, the first in the low half.
INLINE unsigned half_pair(float first, float second) {
#if __CUDA_ARCH__ >= 800
    unsigned bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
    return bits;
#else
    return half_bits(first) | (unsigned)half_bits(second) << 16;
#endif
}

INLINE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

INLINE float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

INLINE float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#endif

INLINE unsigned short bfloat_bits(float value) {
    unsigned bits = __float_as_uint(value);
    if (value != value) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

INLINE unsigned bfloat_pair(float first, float second) {
#if __CUDA_ARCH__ >= 800
    unsigned bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
    return bits;
#else
    return bfloat_bits(first) | (unsigned)bfloat_bits(second) << 16;
#endif
}

INLINE float to_float(float value) {
    return value;
}

INLINE float to_float(bfloat16 value) {
    return __uint_as_float((unsigned)value.bits << 16);
}

INLINE float to_float(float16 value) {
    return half_value(value.bits);
}

template <class T> INLINE T convert(float value);

template <> INLINE float convert<float>(float value) {
    return value;
}

template <> INLINE bfloat16 convert<bfloat16>(float value) {
    return {(unsigned short)bfloat_pair(value, 0.0f)};
}

template <> INLINE float16 convert<float16>(float value) {
    return {half_bits(value)};
}

INLINE element from_float(float value) {
    return convert<element>(value);
}

// --- four and eight neighbours, in accesses of 8 or 16 aligned bytes -------------------

INLINE void unpack(bfloat16, unsigned bits, float *values) {
    values[0] = __uint_as_float(bits << 16);
    values[1] = __uint_as_float(bits & 0xffff0000u);
}

INLINE void unpack(float16, unsigned bits, float *values) {
    values[0] = half_value((unsigned short)bits);
    values[1] = half_value((unsigned short)(bits >> 16));
}

INLINE unsigned pack(bfloat16, const float *values) {
    return bfloat_pair(values[0], values[1]);
}

INLINE unsigned pack(float16, const float *values) {
    return half_pair(values[0], values[1]);
}

INLINE void load4(const float *from, float *values) {
    float4 four = *reinterpret_cast<const float4 *>(from);
    values[0] = four.x;
    values[1] = four.y;
    values[2] = four.z;
    values[3] = four.w;
}

INLINE void store4(float *to, const float *values) {
    *reinterpret_cast<float4 *>(to) =
        make_float4(values[0], values[1], values[2], values[3]);
}

INLINE void load8(const float *from, float *values) {
    load4(from, values);
    load4(from + 4, values + 4);
}

INLINE void store8(float *to, const float *values) {
    store4(to, values);
    store4(to + 4, values + 4);
}

template <class T> INLINE void load4(const T *from, float *values) {
    uint2 bits = *reinterpret_cast<const uint2 *>(from);
    unpack(T(), bits.x, values);
    unpack(T(), bits.y, values + 2);
}

template <class T> INLINE void store4(T *to, const float *values) {
    *reinterpret_cast<uint2 *>(to) =
        make_uint2(pack(T(), values), pack(T(), values + 2));
}

template <class T> INLINE void load8(const T *from, float *values) {
    uint4 bits = *reinterpret_cast<const uint4 *>(from);
    unpack(T(), bits.x, values);
    unpack(T(), bits.y, values + 2);
    unpack(T(), bits.z, values + 4);
    unpack(T(), bits.w, values + 6);
}

template <class T> INLINE void store8(T *to, const float *values) {
    *reinterpret_cast<uint4 *>(to) =
        make_uint4(pack(T(), values), pack(T(), values + 2), pack(T(), values + 4),
                   pack(T(), values + 6));
}

// VEC neighbours, where a file defines it: 8, 4 or 1.
#ifdef VEC
template <class T> INLINE void load(const T *from, float *values) {
#if VEC == 8
    load8(from, values);
#elif VEC == 4
    load4(from, values);
#else
    values[0] = to_float(*from);
#endif
}

template <class T> INLINE void store(T *to, const float *values) {
#if VEC == 8
    store8(to, values);
#elif VEC == 4
    store4(to, values);
#else
    *to = convert<T>(values[0]);
#endif
}
#endif

// --- functions -----------------------------------------------------------------------

INLINE float sigmoid(float x) {
    return reciprocal_fast(1.0f + exp2_fast(-LOG2E * x));
}

INLINE float silu(float x) {
    return x * sigmoid(x);
}

// log(1 + exp(x)): a series where that would cancel, linear above 20.
INLINE float softplus(float x) {
    float raised = exp2_fast(x * LOG2E);
    float series =
        raised * (1.0f - raised * (0.5f - raised * (1.0f / 3.0f - raised * 0.25f)));
    float small = raised < 0.03125f ? series : LN2 * log2_fast(1.0f + raised);
    return x > 20.0f ? x : small;
}

// The slope of softplus where it is dt, 1 - exp(-dt), without cancellation.
INLINE float slope_of(float dt) {
    float series = dt * (1.0f - dt * (0.5f - dt * (1.0f / 6.0f - dt * (1.0f / 24.0f))));
    return dt < 0.0625f ? series : 1.0f - exp2_fast(-LOG2E * dt);
}

// --- sums over a warp ----------------------------------------------------------------

// Sum pairs of values with the lane across: a thread keeps the half that its bit names.
template <int COUNT> INLINE void fold(float *values, int bit) {
    bool high = threadIdx.x & bit;
#pragma unroll
    for (int i = 0; i < COUNT / 2; i++) {
        float away = high ? values[i] : values[i + COUNT / 2];
        float here = high ? values[i + COUNT / 2] : values[i];
        values[i] = here + __shfl_xor_sync(0xffffffffu, away, bit);
    }
}

// The same without a choice, where the partner has as its first half what is this thread's
// second one.
template <int COUNT> INLINE void meet(float *values, int bit) {
#pragma unroll
    for (int i = 0; i < COUNT / 2; i++) {
        values[i] += __shfl_xor_sync(0xffffffffu, values[i + COUNT / 2], bit);
    }
}
