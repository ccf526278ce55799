// CUDA's words in plain C++, and a block's threads as fibers of one thread.
//
// A fiber runs until it waits for others. Blocks run from last to first, and every other
// block's threads in reverse, so that a barrier that is missing or a block that reads
// what an earlier one writes shows. Shared memory is not-a-number when a block starts.

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#define __device__
#define __global__
#define __host__
#define __constant__ static
#define __shared__ static __attribute__((section("emulated_shared")))
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#undef __noinline__
#define __noinline__ __attribute__((noinline))

// --- vectors -------------------------------------------------------------------------

#define EMULATED_VECTOR(type, base)                                                    \
    struct alignas(2 * sizeof(base)) type##2 {                                         \
        base x, y;                                                                     \
    };                                                                                 \
    struct type##3 {                                                                   \
        base x, y, z;                                                                  \
    };                                                                                 \
    struct alignas(4 * sizeof(base)) type##4 {                                         \
        base x, y, z, w;                                                               \
    };                                                                                 \
    static inline type##2 make_##type##2(base x, base y) {                             \
        return {x, y};                                                                 \
    }                                                                                  \
    static inline type##3 make_##type##3(base x, base y, base z) {                     \
        return {x, y, z};                                                              \
    }                                                                                  \
    static inline type##4 make_##type##4(base x, base y, base z, base w) {             \
        return {x, y, z, w};                                                           \
    }

EMULATED_VECTOR(float, float)
EMULATED_VECTOR(int, int)
EMULATED_VECTOR(uint, unsigned)
EMULATED_VECTOR(short, short)
EMULATED_VECTOR(ushort, unsigned short)

typedef uint3 dim3;

static uint3 threadIdx, blockIdx, blockDim, gridDim;
static const int warpSize = 32;

// --- fibers --------------------------------------------------------------------------

namespace emulated {

const int MOST_THREADS = 1024;
const int STACK = 256 * 1024;
const int DYNAMIC = 227 * 1024;

enum State { READY, AT_BARRIER, IN_WARP, ENDED };

struct Fiber {
    jmp_buf place;
    ucontext_t start;
    bool begun;
    State state;
    int line;          // where it waits
    unsigned mask;     // for which lanes
    unsigned count;    // exchanges so far
    long long slot[2]; // what it shows to its warp, in turn
};

static Fiber *fibers;
static char *stacks;
static Fiber *current;
static jmp_buf scheduler;
static void (*call)(void **);
static void **call_arguments;
static char problem[400];

alignas(1024) static char dynamic[DYNAMIC];

__attribute__((format(printf, 1, 2))) static void report(const char *format, ...) {
    if (problem[0]) return; // the first one counts
    int length = snprintf(problem, sizeof problem, "block (%u, %u, %u): ", blockIdx.x,
                          blockIdx.y, blockIdx.z);
    va_list values;
    va_start(values, format);
    vsnprintf(problem + length, sizeof problem - length, format, values);
    va_end(values);
}

// End the thread that did something wrong.
static void give_up() {
    current->state = ENDED;
    _longjmp(scheduler, 1);
}

static void live() {
    for (;;) {
        call(call_arguments);
        current->state = ENDED;
        if (!_setjmp(current->place)) _longjmp(scheduler, 1);
    }
}

__attribute__((noinline)) static void wait(State state, int line, unsigned mask) {
    current->state = state;
    current->line = line;
    current->mask = mask;
    if (!_setjmp(current->place)) _longjmp(scheduler, 1);
}

__attribute__((noinline)) static void resume(int thread) {
    current = fibers + thread;
    threadIdx = {(unsigned)thread, 0, 0};
    if (_setjmp(scheduler)) return;
    if (current->begun) _longjmp(current->place, 1);
    current->begun = true;
    setcontext(&current->start);
}

static void make_fibers(int threads) {
    if (!fibers) {
        fibers = (Fiber *)calloc(MOST_THREADS, sizeof(Fiber));
        stacks = (char *)malloc((size_t)MOST_THREADS * STACK);
    }
    for (int i = 0; i < threads; i++) {
        Fiber *fiber = fibers + i;
        if (fiber->begun) continue;
        getcontext(&fiber->start);
        fiber->start.uc_stack.ss_sp = stacks + (size_t)i * STACK;
        fiber->start.uc_stack.ss_size = STACK;
        fiber->start.uc_link = nullptr;
        makecontext(&fiber->start, live, 0);
    }
}

// Let lanes go on whose mask waits at one place, all of it.
static bool release(int first, int lanes) {
    bool any = false;
    for (int lane = 0; lane < lanes; lane++) {
        Fiber *one = fibers + first + lane;
        if (one->state != IN_WARP) continue;
        bool all = one->mask >> lane & 1;
        for (int i = 0; i < 32; i++) {
            if (!(one->mask >> i & 1)) continue;
            Fiber *other = fibers + first + i;
            all = all && i < lanes && other->state == IN_WARP &&
                  other->line == one->line && other->mask == one->mask;
        }
        if (!all) continue;
        unsigned mask = one->mask;
        for (int i = 0; i < lanes; i++)
            if (mask >> i & 1) fibers[first + i].state = READY;
        any = true;
    }
    return any;
}

// Run a warp until all its lanes ended or wait at a barrier.
static bool run_warp(int first, int lanes, bool reverse) {
    do {
        for (int i = 0; i < lanes; i++) {
            int lane = reverse ? lanes - 1 - i : i;
            if (fibers[first + lane].state == READY) resume(first + lane);
            if (problem[0]) return false;
        }
    } while (release(first, lanes));
    for (int lane = 0; lane < lanes; lane++) {
        Fiber *fiber = fibers + first + lane;
        if (fiber->state != IN_WARP) continue;
        report("thread %d waits in line %d for lanes of mask %08x that never come",
               first + lane, fiber->line, fiber->mask);
        return false;
    }
    return true;
}

// Whether threads wait at a barrier; reports those that don't all wait at the same.
static bool at_barrier(int threads) {
    int waiting = 0, line = 0;
    for (int i = 0; i < threads; i++) {
        if (fibers[i].state != AT_BARRIER) continue;
        if (waiting++ && fibers[i].line != line)
            report("divergent barrier: threads wait in lines %d and %d", line,
                   fibers[i].line);
        line = fibers[i].line;
    }
    if (waiting && waiting < threads)
        report("divergent barrier: %d of %d threads wait in line %d", waiting, threads,
               line);
    return waiting;
}

static void run_block(int threads, bool reverse) {
    for (int i = 0; i < threads; i++) {
        fibers[i].state = READY;
        fibers[i].count = 0;
    }
    int warps = (threads + 31) / 32;
    do {
        for (int i = 0; i < threads; i++)
            if (fibers[i].state == AT_BARRIER) fibers[i].state = READY;
        for (int i = 0; i < warps; i++) {
            int first = 32 * (reverse ? warps - 1 - i : i);
            int lanes = threads - first < 32 ? threads - first : 32;
            if (!run_warp(first, lanes, reverse)) return;
        }
    } while (at_barrier(threads) && !problem[0]);
}

extern "C" char __start_emulated_shared[] __attribute__((weak));
extern "C" char __stop_emulated_shared[] __attribute__((weak));

// Run a grid. Gives an error's text, empty if there is none.
static const char *launch(void (*function)(void **), void **arguments, const int *grid,
                          int threads, int shared) {
    call = function;
    call_arguments = arguments;
    problem[0] = 0;
    make_fibers(threads);
    gridDim = {(unsigned)grid[0], (unsigned)grid[1], (unsigned)grid[2]};
    blockDim = {(unsigned)threads, 1, 1};
    long long blocks = (long long)grid[0] * grid[1] * grid[2];
    for (long long i = blocks - 1; i >= 0 && !problem[0]; i--) {
        blockIdx = {(unsigned)(i % grid[0]), (unsigned)(i / grid[0] % grid[1]),
                    (unsigned)(i / grid[0] / grid[1])};
        memset(dynamic, 0xff, shared);
        if (__start_emulated_shared)
            memset(__start_emulated_shared, 0xff,
                   __stop_emulated_shared - __start_emulated_shared);
        run_block(threads, i & 1);
    }
    if (problem[0]) // fibers that hang are given up
        for (int i = 0; i < MOST_THREADS; i++) fibers[i].begun = false;
    return problem;
}

// Show a value to the lanes of a mask, and see that of one of them.
template <class T> static T exchange(int line, unsigned mask, T value, int lane) {
    static_assert(sizeof(T) <= sizeof(long long), "at most 64 bits");
    Fiber *self = current;
    int turn = self->count++ & 1, first = threadIdx.x & ~31;
    memcpy(&self->slot[turn], &value, sizeof value);
    wait(IN_WARP, line, mask);
    if (!(mask >> lane & 1)) {
        report("line %d: lane %d isn't in the mask", line, lane);
        give_up();
    }
    T seen;
    memcpy(&seen, &fibers[first + lane].slot[turn], sizeof seen);
    return seen;
}

static unsigned ballot(int line, unsigned mask, bool value) {
    Fiber *self = current;
    int turn = self->count++ & 1, first = threadIdx.x & ~31;
    self->slot[turn] = value;
    wait(IN_WARP, line, mask);
    unsigned bits = 0;
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1) bits |= (fibers[first + i].slot[turn] ? 1u : 0u) << i;
    return bits;
}

static inline int my_lane() {
    return threadIdx.x & 31;
}

// The lane a shuffle reads: its own where that would leave its part of the warp.
static inline int lane_of(int lane, int width) {
    int first = my_lane() / width * width;
    return lane >= first && lane < first + width ? lane : my_lane();
}

// --- launches by types ---------------------------------------------------------------

template <class T> struct Name {
    static constexpr const char *value = "other";
};
template <class T> struct Name<const T> : Name<T> {};
#define EMULATED_NAME(type, name)                                                      \
    template <> struct Name<type> {                                                    \
        static constexpr const char *value = name;                                     \
    };

EMULATED_NAME(int, "int32")
EMULATED_NAME(unsigned, "int32")
EMULATED_NAME(float, "float32")
EMULATED_NAME(short, "int16")
EMULATED_NAME(unsigned char, "uint8")
EMULATED_NAME(long long, "int64")

template <class T> struct Parameter {
    static void describe(char *text) {
        strcat(text, Name<T>::value);
    }
};
template <class T> struct Parameter<T *> {
    static void describe(char *text) {
        strcat(strcat(text, "*"), Name<T>::value);
    }
};

template <class... A> static const char *types(void (*)(A...)) {
    static char text[4000];
    text[0] = 0;
    ((Parameter<A>::describe(text), strcat(text, " ")), ...);
    return text;
}

template <int... I> struct Indices {};
template <int N, int... I> struct Count : Count<N - 1, N - 1, I...> {};
template <int... I> struct Count<0, I...> {
    typedef Indices<I...> type;
};

template <class... A, int... I>
static void apply(void (*function)(A...), void **arguments, Indices<I...>) {
    function(*(A *)arguments[I]...);
}

template <class... A> static void unpack_call(void (*function)(A...), void **arguments) {
    apply(function, arguments, typename Count<sizeof...(A)>::type());
}

} // namespace emulated

// --- waiting for others --------------------------------------------------------------

#define ALL_LANES 0xffffffffu
#define __syncthreads() emulated::wait(emulated::AT_BARRIER, __LINE__, 0)
#define EMULATED_SYNCWARP(mask, ...)                                                   \
    emulated::wait(emulated::IN_WARP, __LINE__, (unsigned)(mask))
#define __syncwarp(...) EMULATED_SYNCWARP(__VA_ARGS__ __VA_OPT__(, ) 0xffffffffu)
#define __ballot_sync(mask, value) emulated::ballot(__LINE__, mask, value)
#define __any_sync(mask, value) (emulated::ballot(__LINE__, mask, value) != 0)
#define __all_sync(mask, value) (emulated::ballot(__LINE__, mask, !(value)) == 0)
#define EMULATED_SHUFFLE(mask, value, lane, width, ...)                                \
    emulated::exchange(__LINE__, mask, value, emulated::lane_of(lane, width))
#define __shfl_sync(mask, value, ...) EMULATED_SHFL(mask, value, __VA_ARGS__, 32)
#define EMULATED_SHFL(mask, value, from, width, ...)                                   \
    EMULATED_SHUFFLE(mask, value,                                                      \
                     emulated::my_lane() / (width) * (width) + (from) % (width), width)
#define __shfl_xor_sync(mask, value, ...) EMULATED_XOR(mask, value, __VA_ARGS__, 32)
#define EMULATED_XOR(mask, value, by, width, ...)                                      \
    EMULATED_SHUFFLE(mask, value, emulated::my_lane() ^ (by), width)
#define __shfl_up_sync(mask, value, ...) EMULATED_UP(mask, value, __VA_ARGS__, 32)
#define EMULATED_UP(mask, value, by, width, ...)                                       \
    EMULATED_SHUFFLE(mask, value, emulated::my_lane() - (int)(by), width)
#define __shfl_down_sync(mask, value, ...) EMULATED_DOWN(mask, value, __VA_ARGS__, 32)
#define EMULATED_DOWN(mask, value, by, width, ...)                                     \
    EMULATED_SHUFFLE(mask, value, emulated::my_lane() + (int)(by), width)

// --- functions -----------------------------------------------------------------------

template <class To, class From> static inline To emulated_cast(From from) {
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

static inline float __uint_as_float(unsigned x) {
    return emulated_cast<float>(x);
}
static inline float __int_as_float(int x) {
    return emulated_cast<float>(x);
}
static inline unsigned __float_as_uint(float x) {
    return emulated_cast<unsigned>(x);
}
static inline int __float_as_int(float x) {
    return emulated_cast<int>(x);
}

template <class T> static inline T __ldg(const T *from) {
    return *from;
}
template <class T> static inline T __ldcs(const T *from) {
    return *from;
}
template <class T> static inline T __ldcg(const T *from) {
    return *from;
}
template <class T> static inline void __stcs(T *to, T value) {
    *to = value;
}

#define EMULATED_LEAST(type)                                                           \
    static inline type min(type a, type b) {                                           \
        return a < b ? a : b;                                                          \
    }                                                                                  \
    static inline type max(type a, type b) {                                           \
        return a > b ? a : b;                                                          \
    }

EMULATED_LEAST(int)
EMULATED_LEAST(unsigned)
EMULATED_LEAST(long long)
EMULATED_LEAST(unsigned long long)
EMULATED_LEAST(float)

// glibc has functions of these names.
#define __expf expf
#define __logf logf
#define __log2f log2f

static inline float __fdividef(float x, float y) {
    return x / y;
}
static inline float __frcp_rn(float x) {
    return 1.0f / x;
}
static inline float __fsqrt_rn(float x) {
    return sqrtf(x);
}
static inline float __frsqrt_rn(float x) {
    return 1.0f / sqrtf(x);
}
static inline float rsqrtf(float x) {
    return 1.0f / sqrtf(x);
}
static inline float __fmaf_rn(float x, float y, float z) {
    return fmaf(x, y, z);
}
static inline int __float2int_rn(float x) {
    return (int)rintf(x);
}
static inline int __popc(unsigned x) {
    return __builtin_popcount(x);
}
static inline int __clz(int x) {
    return x ? __builtin_clz((unsigned)x) : 32;
}
static inline int __ffs(int x) {
    return __builtin_ffs(x);
}

// What common.cuh takes from the GPU's instructions.

static inline float exp2_fast(float x) {
    return exp2f(x);
}
static inline float log2_fast(float x) {
    return log2f(x);
}
static inline float reciprocal_fast(float x) {
    return 1.0f / x;
}

static inline float half_value(unsigned short bits) {
    int exponent = bits >> 10 & 31, fraction = bits & 1023;
    float size = exponent == 31  ? (fraction ? NAN : INFINITY)
                 : exponent == 0 ? ldexpf((float)fraction, -24)
                                 : ldexpf((float)(fraction | 1024), exponent - 25);
    return bits & 0x8000 ? -size : size;
}

static inline unsigned short half_bits(float value) {
    unsigned sign = __float_as_uint(value) >> 16 & 0x8000;
    float size = fabsf(value);
    if (size != size) return 0x7fff;
    if (size >= 65520.0f) return sign | 0x7c00;
    int exponent;
    frexpf(size, &exponent);
    if (exponent < -13) exponent = -13; // where numbers have fewer bits
    int fraction = (int)rintf(ldexpf(size, 11 - exponent)); // 1024 to 2048, or less
    if (fraction < 1024) return sign | fraction;
    return sign | (unsigned)(((exponent + 13) << 10) + fraction);
}

static inline unsigned half_pair(float first, float second) {
    return half_bits(first) | (unsigned)half_bits(second) << 16;
}

// --- what the compiler's own checks call ----------------------------------------------

struct EmulatedPlace {
    const char *file;
    unsigned line, column;
};

#define EMULATED_CHECK(name, text, ...)                                                \
    extern "C" __attribute__((visibility("hidden"))) void __ubsan_handle_##name(       \
        EmulatedPlace *place, ##__VA_ARGS__) {                                         \
        emulated::report("%s:%u: %s", place->file, place->line, text);                 \
        emulated::give_up();                                                           \
    }

EMULATED_CHECK(type_mismatch_v1, "an access isn't aligned to its type", void *)
EMULATED_CHECK(out_of_bounds, "an index is outside its array", void *)
