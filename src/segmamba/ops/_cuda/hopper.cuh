// Instructions of Hopper's GPUs: products by warpgroups, copies that nobody waits for.
//
// A product D += A B has 64 rows, N columns and 16 terms. A and B lie in shared memory in
// pieces of eight by eight elements: 128 bytes in a row. A descriptor says where the
// first piece is, how far the next one along the terms is (bits 16 to 29), and along
// rows or columns (bits 32 to 45), all in units of 16 bytes. It comes as two halves, since
// products differ in the first one. By default the eight terms of a row are neighbours in
// a piece; for `multiply_transposed` its eight rows are.
//
// Where EMULATED is defined, products happen when they are waited for, and copies too
// unless EAGER_COPIES is defined: as late, or as early, as a GPU may do them.

// The first half of a descriptor; what is added to it moves the start.
INLINE unsigned place_and_step(unsigned start, unsigned along_terms) {
    return start | along_terms << 16;
}

#ifndef EMULATED

// --- shared memory and copies ----------------------------------------------------------

// Of shared memory, in units of 16 bytes.
INLINE unsigned shared_place(const void *pointer) {
    unsigned address;
    asm("{\n.reg .u64 t;\ncvta.to.shared.u64 t, %1;\ncvt.u32.u64 %0, t;\n}"
        : "=r"(address)
        : "l"(pointer));
    return address >> 4;
}

// Copy 16 bytes, or 8 where WIDTH is 8; zeros if not `inside`.
template <int WIDTH> INLINE void copy_async(unsigned place, const void *from, bool inside) {
    if (WIDTH == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(place << 4),
                     "l"(from), "r"(inside ? 16 : 0));
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(place << 4),
                     "l"(from), "r"(inside ? 8 : 0));
}

INLINE void end_copies() {
    asm volatile("cp.async.commit_group;");
}

// Wait for this thread's copies, but for those of the last LATER groups that have ended.
// A barrier behind it lets products read them.
template <int LATER> INLINE void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;\nfence.proxy.async.shared::cta;" ::"n"(LATER)
                 : "memory");
}

// --- products ----------------------------------------------------------------------------

INLINE void begin_products() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

INLINE void end_products() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Wait for products, but for those of the last LATER groups that have ended.
template <int LATER> INLINE void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LATER) : "memory");
}

// Keep what reads sums behind the wait for them.
template <int COUNT> INLINE void hold(float (&sums)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(sums[i])::"memory");
}

#if KIND == 1
#define HALF "bf16"
#else
#define HALF "f16"
#endif

#define NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define NAMES_12 NAMES_8 ", %8, %9, %10, %11"
#define NAMES_16 NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_24 NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define NAMES_32 NAMES_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_40 NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define NAMES_48 NAMES_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define NAMES_56 NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define NAMES_64 NAMES_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_72 NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71"

#define SUMS(i)                                                                        \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]),        \
        "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define SUMS_8 SUMS(0)
#define SUMS_12 SUMS_8, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define SUMS_16 SUMS_8, SUMS(8)
#define SUMS_24 SUMS_16, SUMS(16)
#define SUMS_32 SUMS_24, SUMS(24)
#define SUMS_40 SUMS_32, SUMS(32)
#define SUMS_48 SUMS_40, SUMS(40)
#define SUMS_56 SUMS_48, SUMS(48)
#define SUMS_64 SUMS_56, SUMS(56)
#define SUMS_72 SUMS_64, SUMS(64)

// Sums of COUNT a thread are those of 2 COUNT columns.
#define PRODUCT(NAME, COUNT, COLUMNS, A, A_ROWS, B, B_ROWS, TRANSPOSED)                  \
    INLINE void NAME(float(&d)[COUNT], unsigned a, unsigned a_rows, unsigned b,          \
                     unsigned b_rows) {                                                  \
        asm volatile("{\n.reg .b64 a, b;\nmov.b64 a, {" A ", " A_ROWS "};\n"             \
                     "mov.b64 b, {" B ", " B_ROWS "};\n"                                 \
                     "wgmma.mma_async.sync.aligned.m64n" COLUMNS "k16.f32." HALF         \
                     "." HALF " {" NAMES_##COUNT "}, a, b, 1, 1, 1, " TRANSPOSED ";\n}"  \
                     : SUMS_##COUNT                                                      \
                     : "r"(a), "r"(a_rows), "r"(b), "r"(b_rows));                        \
    }

PRODUCT(multiply, 8, "16", "%8", "%9", "%10", "%11", "0, 0")
PRODUCT(multiply, 16, "32", "%16", "%17", "%18", "%19", "0, 0")
PRODUCT(multiply, 24, "48", "%24", "%25", "%26", "%27", "0, 0")
PRODUCT(multiply, 32, "64", "%32", "%33", "%34", "%35", "0, 0")
PRODUCT(multiply_transposed, 12, "24", "%12", "%13", "%14", "%15", "1, 1")
PRODUCT(multiply_transposed, 24, "48", "%24", "%25", "%26", "%27", "1, 1")
PRODUCT(multiply_transposed, 48, "96", "%48", "%49", "%50", "%51", "1, 1")
PRODUCT(multiply_transposed, 72, "144", "%72", "%73", "%74", "%75", "1, 1")

#else

namespace hopper {

const int MOST = 1024; // threads, and what one of them has under way

struct Copy {
    unsigned place;
    const void *from;
    int bytes, width, group;
};

// A descriptor: where a matrix starts, and how far its next pieces are.
struct Matrix {
    unsigned start, along_terms, along_rows;
};

static Matrix matrix(unsigned first, unsigned second) {
    return {first & 0x3fff, first >> 16, second};
}

struct Product {
    float *sums;
    int count;
    Matrix a, b;
    bool transposed;
    int group;
};

// What threads have under way, oldest first, and the number of their next groups.
template <class Work> struct Queue {
    Work all[MOST][MOST];
    int counts[MOST], groups[MOST];

    void add(Work work) {
        int &count = counts[threadIdx.x];
        if (count == MOST) emulated::report("too much under way at a time");
        work.group = groups[threadIdx.x];
        all[threadIdx.x][count++ % MOST] = work;
    }

    void wait(int later) {
        int &count = counts[threadIdx.x], done = 0;
        Work *mine = all[threadIdx.x];
        while (done < count && mine[done].group < groups[threadIdx.x] - later)
            perform(mine[done++]);
        memmove(mine, mine + done, (count - done) * sizeof(Work));
        count -= done;
    }
};

static void perform(const Copy &copy) {
    char *to = emulated::dynamic + 16 * copy.place;
    memset(to, 0, copy.width);
    memcpy(to, copy.from, copy.bytes);
}

static float value(const Matrix &m, int row, int term, bool transposed) {
    unsigned place = m.start + row / 8 * m.along_rows + term / 8 * m.along_terms;
    int major = transposed ? term % 8 : row % 8, minor = transposed ? row % 8 : term % 8;
    unsigned byte = 16 * (place + major) + 2 * minor;
    if (byte + 2 > emulated::DYNAMIC) emulated::report("a product reads outside");
    element found;
    memcpy(&found, emulated::dynamic + byte % emulated::DYNAMIC, 2);
    return to_float(found);
}

static void perform(const Product &p) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    for (int half = 0; half < 2; half++) {
        int row = 16 * warp + lane / 4 + 8 * half;
        float left[16];
        for (int k = 0; k < 16; k++) left[k] = value(p.a, row, k, p.transposed);
        for (int i = 2 * half; i < p.count; i += i % 2 ? 3 : 1) {
            int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
            float sum = p.sums[i];
            for (int k = 0; k < 16; k++)
                sum += left[k] * value(p.b, column, k, p.transposed);
            p.sums[i] = sum;
        }
    }
}

static Queue<Copy> copies;
static Queue<Product> products;

} // namespace hopper

INLINE unsigned shared_place(const void *pointer) {
    return ((const char *)pointer - emulated::dynamic) / 16;
}

template <int WIDTH> INLINE void copy_async(unsigned place, const void *from, bool inside) {
    hopper::Copy copy = {place, from, inside ? WIDTH : 0, WIDTH};
    if ((unsigned long long)from % WIDTH) emulated::report("a copy isn't aligned");
#ifdef EAGER_COPIES
    hopper::perform(copy);
#else
    hopper::copies.add(copy);
#endif
}

INLINE void end_copies() {
    hopper::copies.groups[threadIdx.x]++;
}

template <int LATER> INLINE void wait_for_copies() {
    hopper::copies.wait(LATER);
}

INLINE void begin_products() {}

INLINE void end_products() {
    hopper::products.groups[threadIdx.x]++;
}

template <int LATER> INLINE void wait_for_products() {
    hopper::products.wait(LATER);
}

template <int COUNT> INLINE void hold(float (&)[COUNT]) {}

template <int COUNT>
INLINE void multiply(float (&d)[COUNT], unsigned a, unsigned a_rows, unsigned b,
                     unsigned b_rows) {
    hopper::products.add({d, COUNT, hopper::matrix(a, a_rows), hopper::matrix(b, b_rows), false});
}

template <int COUNT>
INLINE void multiply_transposed(float (&d)[COUNT], unsigned a, unsigned a_rows, unsigned b,
                                unsigned b_rows) {
    hopper::products.add({d, COUNT, hopper::matrix(a, a_rows), hopper::matrix(b, b_rows), true});
}

#endif
