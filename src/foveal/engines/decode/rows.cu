// The decode kernel for rows that others read too slowly, each warp with 32 tokens of its own: rows of 4 bits
// with a scale and a zero, which go from memory to the operands of products without a detour, and rows of which
// some entries are kept with their channels, which are spread in shared memory.  All queries see all tokens but
// those behind the window of the only query.  Shares of work, parts and what merges them are those of the
// Triton edition.
//
// Compiled when first used, with sizes as macros: KIND (below), BFLOAT16 (else float16), DIM, VALUE_DIM,
// KEY_ENTRIES and VALUE_ENTRIES kept of a row (multiples of 8), HEADS, GROUPS, ROWS (8 or 16 of Lq * GROUPS held
// at a time), WARPS and BLOCKS of a multiprocessor, WINDOW, SOFT_CAP, SLOPES, EARLY (as in attend.py).

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;

#define LANES 32
#define WARP_TOKENS 32
#define TILE (WARP_TOKENS * WARPS)
#define PARTS (ROWS / 8)
#define INT4 0
#define CHANNELS 1
#define WIDEST (DIM > VALUE_DIM ? DIM : VALUE_DIM)
#define PITCH (WIDEST + 8)                   // entries from one token to the next: eight rows meet no bank twice
#define SUM_PITCH (VALUE_DIM + 4)
#define WARP_BYTES (WARP_TOKENS * PITCH * 2)
#define NONE __int_as_float(0xff800000)      // -inf
#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f

struct Problem {
    const u16* q;
    i64 q_batch, q_token, q_head;
    const int* table;
    i64 table_batch;
    const int *lengths, *after, *seen;
    int page_size, page_step, head_step, units;
    const void* keys;
    const u8* key_channels;
    const void* values;
    const u8* value_channels;
    const float *key_scales, *key_zeros, *value_scales, *value_zeros;
    const float *slopes, *sink;
    float scale, soft_cap;
    int Lq, left, sink_tokens, programs;
    u16* o;
    float *lse, *part, *part_max, *part_sum;
};

#ifndef EMULATED
__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void store_entry(u32 address, u32 word) {
    asm volatile("{ .reg .b16 low, high; mov.b32 {low, high}, %1; st.shared.b16 [%0], low; }" ::"r"(address), "r"(word) : "memory");
}

__device__ __forceinline__ void clear_16(u32 address) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(address), "r"(0) : "memory");
}

__device__ __forceinline__ void load_matrices(u32 (&a)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(address) : "memory");
}

__device__ __forceinline__ void load_transposed(u32 (&a)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(address) : "memory");
}

__device__ __forceinline__ u32 transposed(u32 x) {
    u32 y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

#if BFLOAT16
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#define PACK "cvt.rn.bf16x2.f32"
#define NARROW "cvt.rn.bf16.f32"
#else
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#define PACK "cvt.rn.f16x2.f32"
#define NARROW "cvt.rn.f16.f32"
#endif

__device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(MMA " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u32 fused(u32 a, u32 b, u32 c) {  // bfloat16, two at a time
    u32 x;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(x) : "r"(a), "r"(b), "r"(c));
    return x;
}

__device__ __forceinline__ u32 packed(float low, float high) {
    u32 x;
    asm(PACK " %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    return x;
}

__device__ __forceinline__ u16 narrowed(float x) {
    u16 y;
    asm(NARROW " %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ uint4 load_once(const uint4* p) {
    uint4 x;
    asm volatile("ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p));
    return x;
}

__device__ __forceinline__ uint2 load_once(const uint2* p) {
    uint2 x;
    asm volatile("ld.global.L1::no_allocate.v2.b32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(p));
    return x;
}

__device__ __forceinline__ void let_next_start() {
#if EARLY
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
#endif

__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Tiles of a sequence: those of the sink tokens, then those from `first` on.
struct Range { int sinks, first, tiles; };

__device__ __forceinline__ Range range_of(const Problem& p, int unit) {
    int length = p.lengths[unit], last = ceil_div(length, TILE);
    Range r = {0, 0, last};
#if WINDOW
    int after = p.after ? p.after[unit] : 0;
    r.first = min(max(length + after - 1 - p.left, 0) / TILE, last);
    r.sinks = min(ceil_div(p.sink_tokens, TILE), r.first);
    r.tiles = r.sinks + last - r.first;
#endif
    return r;
}

// The first tile of a program's share, as in split.py.
__device__ __forceinline__ int share_start(int program, int programs, int total) {
    programs = max(min(programs, total), 1);
    int each = total / programs, larger = total - each * programs;
    return min(program * each + (int)((i64)program * larger / programs), total);
}

#if KIND == INT4
// Numbers i of both halves of a word of eight, as bfloat16.
__device__ __forceinline__ u32 pair(u32 x, int i) {
    return fused(((x >> (4 * i)) & 0x000f000fu) | 0x43004300u, 0x3f803f80u, 0xc300c300u);  // 128 + n - 128
}

// Keys of 32 tokens as operands, tokens by channels; of every 128 channels a lane has 32.
struct Keys {
    u32 words[2][2][DIM / 128][4];  // 16 tokens; g, g + 8
    float scale[2][2], zero[2][2];

    __device__ __forceinline__ void ready(u32, int) const {}

    __device__ __forceinline__ void load(const Problem& p, const i64 (&slot)[2], u32 visible, int lane) {
        const int g = lane / 4, t = lane % 4;
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const bool seen = visible >> (m * 16 + h * 8 + g) & 1;
                const i64 row = slot[m] + h * 8 + g;
#pragma unroll
                for (int j = 0; j < DIM / 128; j++) {
                    uint4 x = make_uint4(0, 0, 0, 0);
                    if (seen) x = load_once((const uint4*)((const u8*)p.keys + row * (DIM / 2)) + j * 4 + t);
                    words[m][h][j][0] = x.x, words[m][h][j][1] = x.y, words[m][h][j][2] = x.z, words[m][h][j][3] = x.w;
                }
                scale[m][h] = seen ? p.key_scales[row] : 0.0f;
                zero[m][h] = seen ? p.key_zeros[row] : 0.0f;
            }
    }

    // Channels `channel(c, ...)` of 16 tokens.
    __device__ __forceinline__ void operands(u32 (&a)[4], int m, int c, u32, int) const {
#pragma unroll
        for (int i = 0; i < 4; i++) a[i] = pair(words[m][i % 2][c / 8][c % 8 / 2], c % 2 * 2 + i / 2);
    }

    // The channel of entry e of a half of an operand.
    static __device__ __forceinline__ int channel(int c, int half, int e, int t) {
        return c / 8 * 128 + t * 32 + c % 8 / 2 * 8 + c % 2 * 2 + half + 4 * e;
    }
};

// Values of 32 tokens as operands, channels by tokens; of every 128 channels a lane has 16.
struct Values {
    u32 words[2][4][VALUE_DIM / 128][2];  // 16 tokens; 2 t, 2 t + 1, 2 t + 8, 2 t + 9
    float scale[2][2], zero[2][2];        // of tokens g, g + 8

    __device__ __forceinline__ void ready(u32, int) const {}

    __device__ __forceinline__ void load(const Problem& p, const i64 (&slot)[2], u32 visible, int lane) {
        const int g = lane / 4, t = lane % 4;
#pragma unroll
        for (int m = 0; m < 2; m++) {
#pragma unroll
            for (int h = 0; h < 4; h++) {
                const int token = 2 * t + h % 2 + h / 2 * 8;
                const u8* row = (const u8*)p.values + (slot[m] + token) * (VALUE_DIM / 2);
#pragma unroll
                for (int j = 0; j < VALUE_DIM / 128; j++) {
                    uint2 x = make_uint2(0, 0);
                    if (visible >> (m * 16 + token) & 1) x = load_once((const uint2*)row + j * 8 + g);
                    words[m][h][j][0] = x.x, words[m][h][j][1] = x.y;
                }
            }
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const bool seen = visible >> (m * 16 + h * 8 + g) & 1;
                scale[m][h] = seen ? p.value_scales[slot[m] + h * 8 + g] : 0.0f;
                zero[m][h] = seen ? p.value_zeros[slot[m] + h * 8 + g] : 0.0f;
            }
        }
    }

    // Channels 2 c and 2 c + 1 of this lane, of 16 tokens.
    __device__ __forceinline__ void operands(u32 (&a)[4], int m, int c, u32, int) const {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const u32 one = words[m][2 * h][c / 8][c % 8 / 4], other = words[m][2 * h + 1][c / 8][c % 8 / 4];
            const u32 both = __byte_perm(one, other, c % 4 < 2 ? 0x5410 : 0x7632);
            a[2 * h] = pair(both, c % 2 * 2);
            a[2 * h + 1] = pair(both, c % 2 * 2 + 1);
        }
    }

    // The channel of entry e of an operand's pair.
    static __device__ __forceinline__ int channel(int c, int e, int g) { return c / 8 * 128 + g * 16 + c % 8 * 2 + e; }
};

#else
// Stored entries of the 32 tokens of a warp, CHUNKS groups of 8 in each lane.
template <int CHUNKS>
struct Rows {
    uint4 entries[CHUNKS];
    uint2 channels[CHUNKS];

    __device__ __forceinline__ void load(const u16* from, const u8* where, const i64 (&slot)[2], u32 visible, int lane) {
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            const int chunk = c * LANES + lane, token = chunk / CHUNKS;
            const i64 at = (token < 16 ? slot[0] : slot[1] - 16) * CHUNKS + chunk;
            entries[c] = make_uint4(0, 0, 0, 0);
            channels[c] = make_uint2(0, 0);
            if (visible >> token & 1) {
                entries[c] = load_once((const uint4*)from + at);
                channels[c] = load_once((const uint2*)where + at);
            }
        }
    }

    __device__ __forceinline__ void ready(u32 tile, int lane) const {
        __syncwarp();
#pragma unroll
        for (int c = 0; c < WARP_BYTES / (16 * LANES); c++) clear_16(tile + (c * LANES + lane) * 16);
        __syncwarp();
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            u32 row = tile + (c * LANES + lane) / CHUNKS * (PITCH * 2);
            const u32 words[4] = {entries[c].x, entries[c].y, entries[c].z, entries[c].w};
            const u32 octets[2] = {channels[c].x, channels[c].y};
#pragma unroll
            for (int e = 0; e < 8; e++) {
                u32 address = __dp4a(octets[e / 4], 2u << (e % 4 * 8), row);
                store_entry(address, e % 2 ? words[e / 2] >> 16 : words[e / 2]);
            }
        }
        __syncwarp();
    }
};

struct Keys : Rows<KEY_ENTRIES / 8> {
    __device__ __forceinline__ void load(const Problem& p, const i64 (&slot)[2], u32 visible, int lane) {
        Rows::load((const u16*)p.keys, p.key_channels, slot, visible, lane);
    }

    __device__ __forceinline__ void operands(u32 (&a)[4], int m, int c, u32 tile, int lane) const {
        load_matrices(a, tile + ((m * 16 + lane % 16) * PITCH + c * 16 + lane / 16 * 8) * 2);
    }

    static __device__ __forceinline__ int channel(int c, int half, int e, int t) { return c * 16 + half * 8 + t * 2 + e; }
};

struct Values : Rows<VALUE_ENTRIES / 8> {
    __device__ __forceinline__ void load(const Problem& p, const i64 (&slot)[2], u32 visible, int lane) {
        Rows::load((const u16*)p.values, p.value_channels, slot, visible, lane);
    }

    __device__ __forceinline__ void operands(u32 (&a)[4], int m, int c, u32 tile, int lane) const {
        const int token = m * 16 + lane / 16 * 8 + lane % 8;
        load_transposed(a, tile + (token * PITCH + c * 16 + lane / 8 % 2 * 8) * 2);
    }

    static __device__ __forceinline__ int channel(int c, int e, int g) { return c * 16 + g + 8 * e; }
};
#endif

// One segment's walk of a warp: its running softmax and the sums of values, channels by rows.
struct State {
    float shift[PARTS][2];  // what the zeros of rows take from all channels
    float largest[PARTS][2], total[PARTS][2], sums[VALUE_DIM / 16][PARTS][4];
};

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) decode_rows_forward(const Problem p) {
    extern __shared__ __align__(16) unsigned char memory[];
    let_next_start();
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, program = blockIdx.x;
    const int g = lane / 4, t = lane % 4;
    const u32 tile = shared_address(memory) + warp * WARP_BYTES;  // of entries that are spread
    float* const merged = (float*)memory;  // after the walk: sums [WARPS][ROWS][SUM_PITCH], largest, total [WARPS][ROWS]
    float* const merged_max = merged + WARPS * ROWS * SUM_PITCH;
    float* const merged_sum = merged_max + WARPS * ROWS;

    const int row_tiles = ceil_div(p.Lq * GROUPS, ROWS), segments = row_tiles * HEADS;
    int work = 0;
    for (int unit = lane; unit < p.units; unit += LANES) work += range_of(p, unit).tiles * segments;
    for (int step = 16; step; step /= 2) work += __shfl_xor_sync(~0u, work, step);
    int place = share_start(program, p.programs, work);
    const int stop = share_start(program + 1, p.programs, work);

    int unit = 0, begin = 0;  // the sequence of the share's first tile, and its first tile
    for (int base = 0; base < p.units && place < stop; base += LANES) {
        const int own = base + lane < p.units ? range_of(p, base + lane).tiles * segments : 0;
        int sum = own;
        for (int lanes = 1; lanes < LANES; lanes *= 2) {
            const int before = __shfl_up_sync(~0u, sum, lanes);
            if (lane >= lanes) sum += before;
        }
        const u32 behind = __ballot_sync(~0u, begin + sum > place);
        if (behind) {
            unit = base + __ffs(behind) - 1;
            begin += __shfl_sync(~0u, sum - own, unit - base);
            break;
        }
        begin += __shfl_sync(~0u, sum, LANES - 1);
    }
    while (place < stop) {
        const Range range = range_of(p, unit);
        if (place >= begin + range.tiles * segments) {
            begin += range.tiles * segments;
            unit++;
            continue;
        }
        const int segment = (place - begin) / range.tiles, t0 = (place - begin) % range.tiles;
        const int h = segment / row_tiles, first_row = segment % row_tiles * ROWS;
        const int t1 = min(range.tiles, t0 + stop - place);
        place += t1 - t0;
        const int length = p.lengths[unit];
#if WINDOW || SLOPES
        const int first_pos = p.seen[unit] - (p.after ? p.after[unit] : 0) - length;
#endif
        const int* pages = p.table + unit * p.table_batch;
        const i64 head_slots = (i64)h * p.head_step;

        u32 q[DIM / 16][PARTS][2];
#if SLOPES
        float slope[PARTS][2];
        int own_pos[PARTS][2];
#endif
#pragma unroll
        for (int n = 0; n < PARTS; n++) {
            const int row = first_row + n * 8 + g;
            const u16* from = p.q + unit * p.q_batch + row / GROUPS * p.q_token + (h * GROUPS + row % GROUPS) * p.q_head;
#pragma unroll
            for (int c = 0; c < DIM / 16; c++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const u16 low = from[Keys::channel(c, half, 0, t)], high = from[Keys::channel(c, half, 1, t)];
                    q[c][n][half] = row < p.Lq * GROUPS ? (u32)low | (u32)high << 16 : 0u;
                }
#if SLOPES
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int own = first_row + n * 8 + t * 2 + i;
                slope[n][i] = p.slopes[h * GROUPS + own % GROUPS];
                own_pos[n][i] = p.seen[unit] - p.Lq + own / GROUPS - first_pos;
            }
#endif
        }

#if KIND == INT4
        float q_sum[PARTS][2];
#pragma unroll
        for (int n = 0; n < PARTS; n++) {
            float sum = 0.0f;  // of row g
#pragma unroll
            for (int c = 0; c < DIM / 16; c++)
#pragma unroll
                for (int half = 0; half < 2; half++)
                    sum += __int_as_float(q[c][n][half] << 16) + __int_as_float(q[c][n][half] & 0xffff0000u);
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            q_sum[n][0] = __shfl_sync(~0u, sum, t * 8);
            q_sum[n][1] = __shfl_sync(~0u, sum, t * 8 + 4);
        }
#endif

        // The first token of this warp in a tile of the walk, and which of 32 tokens are visible.
        auto token_of = [&](int step) {
            int number = step < range.sinks ? step : range.first + step - range.sinks;
            return number * TILE + warp * WARP_TOKENS;
        };
        auto slots_of = [&](int step, i64 (&slot)[2]) {
            const int token = token_of(step);
#pragma unroll
            for (int m = 0; m < 2; m++) {
                const int at = token + m * 16;
                const int page = step < t1 && at < length ? pages[at / p.page_size] : 0;
                slot[m] = (i64)page * p.page_step + head_slots + at % p.page_size;
            }
        };
        auto visible_of = [&](int step) -> u32 {
            if (step >= t1) return 0;
            const int token = token_of(step) + lane;
            bool seen = token < length;
#if WINDOW
            const int at = first_pos + token;
            seen = seen && (at >= p.seen[unit] - 1 - p.left || at < p.sink_tokens);
#endif
            return __ballot_sync(~0u, seen);
        };
        State s;
#pragma unroll
        for (int n = 0; n < PARTS; n++) {
            s.largest[n][0] = s.largest[n][1] = NONE;
            s.total[n][0] = s.total[n][1] = s.shift[n][0] = s.shift[n][1] = 0.0f;
#pragma unroll
            for (int m = 0; m < VALUE_DIM / 16; m++)
#pragma unroll
                for (int i = 0; i < 4; i++) s.sums[m][n][i] = 0.0f;
        }

        Keys k;
        Values v;
        i64 slot[2];
        u32 visible = visible_of(t0);
        slots_of(t0, slot);
        k.load(p, slot, visible, lane);
        v.load(p, slot, visible, lane);
        slots_of(t0 + 1, slot);
        for (int step = t0; step < t1; step++) {
            const u32 next_visible = visible_of(step + 1);
            k.ready(tile, lane);
            if (KIND == CHANNELS) k.load(p, slot, next_visible, lane);
            float score[2][PARTS][4];
#pragma unroll
            for (int m = 0; m < 2; m++) {
#pragma unroll
                for (int n = 0; n < PARTS; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) score[m][n][i] = 0.0f;
#pragma unroll
                for (int c = 0; c < DIM / 16; c++) {
                    u32 a[4];
                    k.operands(a, m, c, tile, lane);
#pragma unroll
                    for (int n = 0; n < PARTS; n++) multiply(score[m][n], a, q[c][n][0], q[c][n][1]);
                }
            }
#if KIND == INT4
#pragma unroll
            for (int m = 0; m < 2; m++)
#pragma unroll
                for (int n = 0; n < PARTS; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        score[m][n][i] = (score[m][n][i] - k.zero[m][i / 2] * q_sum[n][i % 2]) * k.scale[m][i / 2];
                    }
#endif
            if (KIND != CHANNELS) k.load(p, slot, next_visible, lane);

            u32 weights[2][PARTS][2];
#pragma unroll
            for (int n = 0; n < PARTS; n++) {
                float found[2] = {s.largest[n][0], s.largest[n][1]};
#pragma unroll
                for (int m = 0; m < 2; m++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const int token = m * 16 + i / 2 * 8 + g;
                        float x = score[m][n][i] * p.scale;
#if SOFT_CAP
                        const float e = exp2_fast(fabsf(x) * (-2.0f * LOG2E / p.soft_cap));
                        x = copysignf((1.0f - e) / (1.0f + e), x) * p.soft_cap;
#endif
#if SLOPES
                        x -= slope[n][i % 2] * fabsf((float)(own_pos[n][i % 2] - token_of(step) - token));
#endif
                        x = visible >> token & 1 ? x * LOG2E : NONE;
                        score[m][n][i] = x;
                        found[i % 2] = fmaxf(found[i % 2], x);
                    }
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    for (int lanes = 4; lanes < 32; lanes *= 2)
                        found[i] = fmaxf(found[i], __shfl_xor_sync(~0u, found[i], lanes));
                    const float base = found[i] == NONE ? 0.0f : found[i];
                    const float factor = exp2_fast(s.largest[n][i] - base);
                    s.largest[n][i] = found[i];
                    float total = s.total[n][i] * factor;
#pragma unroll
                    for (int m = 0; m < 2; m++)
#pragma unroll
                        for (int j = i; j < 4; j += 2) {
                            score[m][n][j] = exp2_fast(score[m][n][j] - base);
                            total += score[m][n][j];
                        }
                    s.total[n][i] = total;
                    s.shift[n][i] *= factor;
#pragma unroll
                    for (int m = 0; m < VALUE_DIM / 16; m++) {
                        s.sums[m][n][i] *= factor;
                        s.sums[m][n][i + 2] *= factor;
                    }
                }
#pragma unroll
                for (int m = 0; m < 2; m++)
#pragma unroll
                    for (int half = 0; half < 2; half++)
                    {
#if KIND == INT4
#pragma unroll
                        for (int i = 0; i < 2; i++) {
                            const float w = score[m][n][half * 2 + i] *= v.scale[m][half];
                            s.shift[n][i] += w * v.zero[m][half];
                        }
#endif
                        weights[m][n][half] = transposed(packed(score[m][n][half * 2], score[m][n][half * 2 + 1]));
                    }
            }

            v.ready(tile, lane);
            if (KIND == CHANNELS) v.load(p, slot, next_visible, lane);
#pragma unroll
            for (int m = 0; m < 2; m++)
#pragma unroll
                for (int c = 0; c < VALUE_DIM / 16; c++) {
                    u32 a[4];
                    v.operands(a, m, c, tile, lane);
#pragma unroll
                    for (int n = 0; n < PARTS; n++) multiply(s.sums[c][n], a, weights[m][n][0], weights[m][n][1]);
                }
            if (KIND != CHANNELS) v.load(p, slot, next_visible, lane);
            visible = next_visible;
            slots_of(step + 2, slot);
        }

        __syncthreads();
#pragma unroll
        for (int n = 0; n < PARTS; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float total = s.total[n][i], shift = s.shift[n][i];
                for (int lanes = 4; lanes < 32; lanes *= 2) {
                    total += __shfl_xor_sync(~0u, total, lanes);
                    if (KIND == INT4) shift += __shfl_xor_sync(~0u, shift, lanes);
                }
                const int row = warp * ROWS + n * 8 + t * 2 + i;
                if (g == 0) {
                    merged_max[row] = s.largest[n][i];
                    merged_sum[row] = total;
                }
#pragma unroll
                for (int m = 0; m < VALUE_DIM / 16; m++) {
                    merged[row * SUM_PITCH + Values::channel(m, 0, g)] = s.sums[m][n][i] - shift;
                    merged[row * SUM_PITCH + Values::channel(m, 1, g)] = s.sums[m][n][i + 2] - shift;
                }
            }
        __syncthreads();
        const bool whole = t0 == 0 && t1 == range.tiles;
        const i64 part = (i64)(program * 2 + (t0 == 0)) * ROWS;
        for (int cell = threadIdx.x; cell < min(p.Lq * GROUPS - first_row, ROWS) * VALUE_DIM; cell += LANES * WARPS) {
            const int row = cell / VALUE_DIM, channel = cell % VALUE_DIM;
            float largest = NONE, total = 0.0f, sum = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) largest = fmaxf(largest, merged_max[w * ROWS + row]);
            const float base = largest == NONE ? 0.0f : largest;
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                const float factor = exp2_fast(merged_max[w * ROWS + row] - base);
                total += merged_sum[w * ROWS + row] * factor;
                sum += merged[(w * ROWS + row) * SUM_PITCH + channel] * factor;
            }
            if (whole) {
                const int own = first_row + row;
                if (p.sink) {
                    const float sink = p.sink[h * GROUPS + own % GROUPS] * LOG2E, found = fmaxf(largest, sink);
                    const float factor = exp2_fast(largest - found);
                    sum *= factor;
                    total = total * factor + exp2_fast(sink - found);
                    largest = found;
                }
                const i64 to = ((i64)unit * p.Lq + own / GROUPS) * (HEADS * GROUPS) + h * GROUPS + own % GROUPS;
                const float safe = total == 0.0f ? 1.0f : total;
                p.o[to * VALUE_DIM + channel] = narrowed(sum / safe);
                if (channel == 0) p.lse[to] = total == 0.0f ? NONE : (largest + log2f(safe)) * LN2;
            } else {
                p.part[(part + row) * VALUE_DIM + channel] = sum;
                if (channel == 0) {
                    p.part_max[part + row] = largest;
                    p.part_sum[part + row] = total;
                }
            }
        }
        __syncthreads();
    }
}
