// Runs the kernel of rows.cu on the CPU: the lanes of a block take turns, and what they do together (barriers,
// shuffles, products of matrices) waits for all of them.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#define EMULATED
#define __device__
#define __forceinline__ inline
#define __global__
#define __launch_bounds__(threads, blocks)
#define __shared__
#define __align__(n) __attribute__((aligned(n)))

typedef unsigned int u32;
typedef unsigned short u16;
using std::max;
using std::min;

struct uint4 { u32 x, y, z, w; };
struct uint2 { u32 x, y; };
static uint4 make_uint4(u32 a, u32 b, u32 c, u32 d) { return {a, b, c, d}; }
static uint2 make_uint2(u32 a, u32 b) { return {a, b}; }

static struct { int x; } threadIdx, blockIdx;
alignas(16) unsigned char memory[1 << 18];

static const int LANES_OF_BLOCK = 32 * WARPS;
static ucontext_t lanes[LANES_OF_BLOCK], scheduler;
static bool finished[LANES_OF_BLOCK];
static int current;
struct Barrier { unsigned round, waiting; };
static Barrier warp_barriers[WARPS], block_barrier;
static u32 given[LANES_OF_BLOCK][6];

static void pause() {
    const int own = current;
    swapcontext(&lanes[own], &scheduler);
    current = threadIdx.x = own;
}

static void wait_at(Barrier& barrier, unsigned count) {
    const unsigned round = barrier.round;
    if (++barrier.waiting == count) {
        barrier.waiting = 0;
        barrier.round++;
    } else {
        while (barrier.round == round) pause();
    }
}

static void __syncwarp() { wait_at(warp_barriers[current / 32], 32); }
static void __syncthreads() { wait_at(block_barrier, LANES_OF_BLOCK); }
static u32 (&of_lane(int lane))[6] { return given[current / 32 * 32 + lane]; }

static float __int_as_float(u32 x) {
    float y;
    memcpy(&y, &x, 4);
    return y;
}

template <class T> static T __shfl_sync(u32, T x, int lane) {
    T y;
    memcpy(given[current], &x, 4);
    __syncwarp();
    memcpy(&y, of_lane(lane), 4);
    __syncwarp();
    return y;
}

template <class T> static T __shfl_xor_sync(u32 mask, T x, int lanes) { return __shfl_sync(mask, x, current % 32 ^ lanes); }
template <class T> static T __shfl_up_sync(u32 mask, T x, int lanes) { return __shfl_sync(mask, x, max(current % 32 - lanes, 0)); }

static u32 __ballot_sync(u32, bool x) {
    u32 y = 0;
    given[current][0] = x;
    __syncwarp();
    for (int lane = 0; lane < 32; lane++) y |= of_lane(lane)[0] << lane;
    __syncwarp();
    return y;
}

static int __ffs(u32 x) { return __builtin_ffs(x); }

static u32 __dp4a(u32 a, u32 b, u32 sum) {
    for (int i = 0; i < 32; i += 8) sum += (a >> i & 255) * (b >> i & 255);
    return sum;
}

static u32 __byte_perm(u32 a, u32 b, u32 chosen) {
    const uint64_t both = (uint64_t)b << 32 | a;
    u32 y = 0;
    for (int i = 0; i < 4; i++) y |= (u32)(both >> (chosen >> 4 * i & 7) * 8 & 255) << 8 * i;
    return y;
}

static u32 shared_address(const void* p) { return (u32)((unsigned char*)p - memory); }

static void store_entry(u32 address, u32 word) {
    if (address % 2 || address >= sizeof memory) abort();
    *(u16*)(memory + address) = (u16)word;
}

static void clear_16(u32 address) { memset(memory + address, 0, 16); }

static void load_eights(u32 (&a)[4], u32 address, bool transposed) {
    const int g = current % 32 / 4, t = current % 4;
    given[current][0] = address;
    __syncwarp();
    for (int matrix = 0; matrix < 4; matrix++) {
        a[matrix] = 0;
        for (int i = 0; i < 2; i++) {
            const u32 row = of_lane(matrix * 8 + (transposed ? 2 * t + i : g))[0];
            if (row % 16) abort();
            a[matrix] |= (u32)((u16*)(memory + row))[transposed ? g : 2 * t + i] << 16 * i;
        }
    }
    __syncwarp();
}

static void load_matrices(u32 (&a)[4], u32 address) { load_eights(a, address, false); }
static void load_transposed(u32 (&a)[4], u32 address) { load_eights(a, address, true); }

static u32 transposed(u32 x) {
    const int g = current % 32 / 4, t = current % 4;
    u32 y = 0;
    given[current][0] = x;
    __syncwarp();
    for (int i = 0; i < 2; i++) y |= (of_lane((2 * t + i) * 4 + g / 2)[0] >> g % 2 * 16 & 0xffff) << 16 * i;
    __syncwarp();
    return y;
}

static float wide(u32 x) { return __int_as_float(x << 16); }

static u16 narrowed(float x) {
    u32 bits;
    memcpy(&bits, &x, 4);
    return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static u32 packed(float low, float high) { return narrowed(low) | (u32)narrowed(high) << 16; }

static u32 fused(u32 a, u32 b, u32 c) {
    return packed(wide(a & 0xffff) * wide(b & 0xffff) + wide(c & 0xffff), wide(a >> 16) * wide(b >> 16) + wide(c >> 16));
}

static void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    const int g = current % 32 / 4, t = current % 4;
    for (int i = 0; i < 4; i++) given[current][i] = a[i];
    given[current][4] = b0;
    given[current][5] = b1;
    __syncwarp();
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 16; k++) {
            const u32 x = of_lane(g * 4 + k % 8 / 2)[i / 2 + k / 8 * 2], y = of_lane((2 * t + i % 2) * 4 + k % 8 / 2)[4 + k / 8];
            c[i] += wide(x >> k % 2 * 16 & 0xffff) * wide(y >> k % 2 * 16 & 0xffff);
        }
    __syncwarp();
}

static float exp2_fast(float x) { return exp2f(x); }
template <class T> static T load_once(const T* p) { return *p; }
static void let_next_start() {}

#include "rows.cu"

static const Problem* problem;

static void run_lane(int lane) {
    current = threadIdx.x = lane;
    decode_rows_forward(*problem);
    finished[lane] = true;
    while (true) pause();
}

extern "C" void run(const Problem* given_problem, int blocks) {
    const size_t room = 1 << 17;
    std::vector<char> stacks(LANES_OF_BLOCK * room);
    problem = given_problem;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
        memset(memory, 0xff, sizeof memory);
        for (int lane = 0; lane < LANES_OF_BLOCK; lane++) {
            finished[lane] = false;
            getcontext(&lanes[lane]);
            lanes[lane].uc_stack.ss_sp = &stacks[lane * room];
            lanes[lane].uc_stack.ss_size = room;
            makecontext(&lanes[lane], (void (*)())run_lane, 1, lane);
        }
        while (!std::all_of(finished, finished + LANES_OF_BLOCK, [](bool x) { return x; }))
            for (int lane = 0; lane < LANES_OF_BLOCK; lane++)
                if (!finished[lane]) {
                    current = threadIdx.x = lane;
                    swapcontext(&scheduler, &lanes[lane]);
                }
    }
}
