// Products with weights of 2, 3, 4 or 8 bits in the order of the tensor cores' registers.
//
// Compiled at run time (nvrtc.py) with the macros below; no header is needed. The host side, which makes the layout and
// says what it is for, is fragments.py. Three kernels share one layout of the weight:
//
//   few    up to some 32 tokens: mma.sync, columns split over warps and a cluster
//   many   up to some 256 tokens: wgmma with the weights as register operand, tokens through shared memory
//   dense  the weight in 16 bits, for a dense product with more tokens than that
//
// Weights are the *left* operand, tokens the columns on the right: 16 rows of the weight fill a tile whatever the number
// of tokens. A thread of a warp (g = lane / 4, c = lane % 4) holds of a tile of 16 x 16 the registers
//   r = 0..3: row g + 8 (r % 2), columns 2 c + 8 (r / 2) + {0, 1}
// which is the left operand of mma.m16n8k16, and of wgmma.m64nNk16 for the quarter of a warpgroup that a warp is.
//
// Macros. BITS; TABLE (codes index a table of levels) or not (levels are consecutive integers); GROUP columns that share
// a scale, a multiple of 16, or 0; ZERO (a zero point per group) or OFFSET (one for all); HALF (float16 in and out, else
// bfloat16); RT tiles of 16 rows per warp, WARPS of a thread block, MT tiles of 8 tokens, SPLIT thread blocks of a
// cluster along columns, RING units of weights on their way to a warp, STAGED in shared memory or not, RESIDENT blocks to leave registers for; for `many`: WG
// warpgroups, NT tokens, STAGES, SHARE (of tiles that are left over: 0 no, 1 an equal number of blocks to each tile, 2
// equal runs), the LEAST_UNITS of a run, APART (sums of a group), and REGISTERS of a thread that multiplies, or 0 to leave
// them as the compiler has them; E4M3 (tokens are rounded to it: codes of 4 bits only).

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__

// A block is what a thread reads at once: WORDS words for STEPS tiles along the columns.
#if BITS == 4
constexpr int WORDS = 4, STEPS = 4;
#elif BITS == 3
constexpr int WORDS = 3, STEPS = 4;
#elif BITS == 2
constexpr int WORDS = 4, STEPS = 8;
#elif BITS == 8
constexpr int WORDS = 8, STEPS = 4;
#endif
constexpr int COLUMNS = 16 * STEPS;

constexpr int BLOCKS = UNIT / COLUMNS;
constexpr int SCALES = GROUP ? UNIT / GROUP : 0;

#if HALF
[[maybe_unused]] constexpr u32 MAGIC = 0x64006400, ONES = 0x3c003c00;  // 1024 + code: a float16 whose last bits are the code
#else
[[maybe_unused]] constexpr u32 MAGIC = 0x43004300, ONES = 0x3f803f80;  // 128 + code: a bfloat16 whose last bits are the code
#endif

extern __shared__ __align__(1024) u8 memory[];  // begins with the table of pairs, where there is one

// ---------------------------------------------------------------- instructions

DEVICE u32 lane_id() { return threadIdx.x & 31; }

DEVICE void load4(const u32* from, u32* to) {
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "l"(from));
}
DEVICE u32 load1(const u32* from) {
  u32 word;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(word) : "l"(from));
  return word;
}
DEVICE u32 load_half(const u16* from) {
  u16 word;
  asm volatile("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=h"(word) : "l"(from));
  return word;
}
DEVICE u32 and_or(u32 a, u32 mask, u32 with) {
  u32 out;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(a), "r"(mask), "r"(with));
  return out;
}
DEVICE u32 permute(u32 a, u32 b, u32 selector) {
  u32 out;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(selector));
  return out;
}
#if HALF
DEVICE u32 minus(u32 a, u32 b) { u32 out; asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b)); return out; }
DEVICE u32 times(u32 a, u32 b) { u32 out; asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b)); return out; }
DEVICE u32 pair(float low, float high) {
  u32 out; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low)); return out;
}
#else
// fma, for sm_80 knows no bfloat16 addition; a + 0 * b would be needed for the sign of zero, which no product minds
DEVICE u32 minus(u32 a, u32 b) {
  u32 out;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(b), "r"(0xbf80bf80u), "r"(a));
  return out;
}
DEVICE u32 times(u32 a, u32 b) {
  u32 out;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(0x80008000u));
  return out;
}
DEVICE u32 pair(float low, float high) {
  u32 out; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low)); return out;
}
#endif
DEVICE float low_half(u32 word) {
  float out; asm("{.reg .b16 l,h; mov.b32 {l,h}, %1; cvt.f32.f16 %0, l;}" : "=f"(out) : "r"(word)); return out;
}
DEVICE float high_half(u32 word) {
  float out; asm("{.reg .b16 l,h; mov.b32 {l,h}, %1; cvt.f32.f16 %0, h;}" : "=f"(out) : "r"(word)); return out;
}
DEVICE float first_of(u32 pair) { return HALF ? low_half(pair) : __uint_as_float(pair << 16); }
DEVICE float second_of(u32 pair) { return HALF ? high_half(pair) : __uint_as_float(pair & 0xffff0000u); }
DEVICE float sum_of(u32 pair) { return first_of(pair) + second_of(pair); }
DEVICE u32 shared_address(const void* pointer) {
  u64 out; asm("cvta.to.shared.u64 %0, %1;" : "=l"(out) : "l"(pointer)); return (u32)out;
}
DEVICE void copy16(u32 to, const void* from, bool real) {  // zeros where not real
  int bytes = real ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
DEVICE void copy4(u32 to, const void* from, bool real) {
  int bytes = real ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
DEVICE void copy16_ahead(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> DEVICE void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }

DEVICE void mma(float* acc, const u32* a, u32 b0, u32 b1) {
#if HALF
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
#endif
               : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE void read4(u32* to, u32 address) {
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address) : "memory");
}
DEVICE u32 read1(u32 address) {
  u32 word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
  return word;
}
DEVICE u32 read_half(u32 address) {
  u16 word;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(word) : "r"(address) : "memory");
  return word;
}
DEVICE void read_tokens(uint4& to, const u16* from) {  // not by way of the L1 cache, which may hold what was there before
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(to.x), "=r"(to.y), "=r"(to.z), "=r"(to.w) : "l"(from));
}
DEVICE void write_tokens(u32 to, const uint4& from) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(from.x), "r"(from.y), "r"(from.z), "r"(from.w)
               : "memory");
}
DEVICE void tokens_of_two_steps(u32 address, u32* b) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3]) : "r"(address));
}

// The kernel before in the stream may still run when this one starts (programmatic dependent launch): weights are read
// at once, what it writes only from here on.
DEVICE void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEVICE void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
DEVICE u32 address_in(u32 address, u32 rank) {  // of the same place in another block of the cluster
  u32 there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}
DEVICE float read_shared_of(u32 address, u32 rank) {
  float value;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address_in(address, rank)) : "memory");
  return value;
}

// ---------------------------------------------------------------- weights

struct Weight {
  const u32* words;  // [tiles of 16 rows][units][...]
  const u32* scale;  // [tiles][groups][8]: float16 of row g and of row g + 8, of normalised scales
  const u16* zero;   // [tiles][groups][8]: bytes of row g and of row g + 8
  int units;         // in a row
  int tiles;
};

struct Unit {
  u32 words[RT][BLOCKS][WORDS];
  u32 scale[RT][SCALES ? SCALES : 1];
  u32 zero[RT][SCALES ? SCALES : 1];
};

// Where a lane reads on: unit after unit of a row of tiles.
struct Stream {
  const u32* words;
  const u32* scale;
  const u16* zero;
};

constexpr int UNIT_WORDS = 32 * WORDS * BLOCKS;

DEVICE Stream stream(const Weight& w, int tile, int unit) {
  const u64 at = (u64)tile * w.units + unit;
  const int lane = lane_id();
  return {w.words + at * UNIT_WORDS + (BITS == 3 ? lane : 4 * lane), w.scale + at * SCALES * 8 + (lane >> 2),
          w.zero + at * SCALES * 8 + (lane >> 2)};
}

DEVICE void fetch(Stream& from, int units, Unit& to) {  // units: of a tile, from one of RT tiles to the next
#pragma unroll
  for (int rt = 0; rt < RT; rt++) {
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
      const u32* block = from.words + (u64)(rt * units) * UNIT_WORDS + b * 32 * WORDS;
#if BITS == 3
#pragma unroll
      for (int i = 0; i < WORDS; i++) to.words[rt][b][i] = load1(block + 32 * i);
#else
#pragma unroll
      for (int i = 0; i < WORDS; i += 4) load4(block + 32 * i, to.words[rt][b] + i);
#endif
    }
#pragma unroll
    for (int s = 0; s < SCALES; s++) {
      to.scale[rt][s] = load1(from.scale + (u64)(rt * units) * SCALES * 8 + 8 * s);
#if ZERO
      to.zero[rt][s] = load_half(from.zero + (u64)(rt * units) * SCALES * 8 + 8 * s);
#endif
    }
  }
  from.words += UNIT_WORDS, from.scale += SCALES * 8, from.zero += SCALES * 8;
}

// Register r (0..3) of tile `step` of a block, before a zero point is taken off.
DEVICE u32 raw(const u32* q, int step, int r) {
  [[maybe_unused]] const int i = 4 * step + r;  // of STEPS * 4
#if BITS == 8
  return 0;
#elif TABLE
  // Entry e of the table at byte 128 e + 4 lane: shift the code pair to bit 7.
  const u32 mine = 4 * lane_id();
  u32 at;
#if BITS == 4
  at = and_or(r == 0 ? q[step] << 7 : q[step] >> (8 * r - 7), 0x7f80, mine);
#elif BITS == 3
  if (i < 15) {
    const int n = i % 5;
    at = and_or(n < 2 ? q[i / 5] << (7 - 6 * n) : q[i / 5] >> (6 * n - 7), 0x1f80, mine);
  } else {
    at = ((q[0] >> 30) | (q[1] >> 30 << 2) | (q[2] >> 30 << 4)) << 7 | mine;
  }
#elif BITS == 2
  const int n = i % 8;
  at = and_or(n < 2 ? q[i / 8] << (7 - 4 * n) : q[i / 8] >> (4 * n - 7), 0x780, mine);
#endif
  return *(const u32*)(memory + at);
#elif BITS == 4
  return and_or(q[step] >> (4 * r), 0x000f000f, MAGIC);
#elif BITS == 2
  return and_or(q[i / 8] >> (2 * (i % 8)), 0x00030003, MAGIC);
#elif BITS == 3
  if (i < 15) return and_or(q[i / 5] >> (3 * (i % 5)), 0x00070007, MAGIC);
  u32 bits = (q[0] >> 15) & 0x00010001;  // what five codes of 3 bits leave of each half word
  bits = and_or(q[1] >> 14, 0x00020002, bits);
  return and_or(q[2] >> 13, 0x00040004, bits) | MAGIC;
#endif
}

// The four registers of a tile: whole levels less their zero point. `offset`: of row g and row g + 8.
DEVICE void levels(const u32* q, int step, const u32* offset, u32* a) {
#pragma unroll
  for (int r = 0; r < 4; r++) {
#if TABLE
    a[r] = raw(q, step, r);
#elif BITS == 8
    // 2^23 + code, a float32 whose last bits are the code: 8 bits are one too many for a bfloat16
    const u32 word = q[2 * step + r / 2], byte = 2 * (r & 1);
    const float bias = __uint_as_float(0x4b000000u + offset[r & 1]);
    a[r] = pair(__uint_as_float(permute(word, 0x4b000000u, 0x7540 + byte)) - bias,
                __uint_as_float(permute(word, 0x4b000000u, 0x7541 + byte)) - bias);
#else
    a[r] = minus(raw(q, step, r), offset[r & 1]);
#endif
  }
}

// What is taken off the codes of row g and of row g + 8, from the bytes of their zero points.
DEVICE void offsets(u32 zeros, u32* offset) {
#if !ZERO
  offset[0] = offset[1] = BITS == 8 ? OFFSET : MAGIC + OFFSET * 0x00010001u;
#elif BITS == 8
  offset[0] = zeros & 255;
  offset[1] = zeros >> 8 & 255;
#else
  offset[0] = permute(zeros, 0, 0x4040) + MAGIC;
  offset[1] = permute(zeros, 0, 0x4141) + MAGIC;
#endif
}

// The table of pairs of levels, once per lane: entry e of lane l at word 32 e + l, so that no two lanes of a warp meet in
// a bank. `pairs`: [2 ** (2 BITS)] in memory.
#if TABLE
constexpr int TABLE_BYTES = 128 << (2 * BITS);
#else
constexpr int TABLE_BYTES = 0;
#endif
DEVICE void spread_table(const u32* pairs) {
  for (int i = threadIdx.x; i < TABLE_BYTES / 16; i += blockDim.x) {
    const u32 pair = pairs[i >> 3];
    ((uint4*)memory)[i] = make_uint4(pair, pair, pair, pair);
  }
}

// One result: its sum times alpha, what its row's scales were divided by.
DEVICE void put(u16* y, float sum, float alpha, int row, int token, int m, int n) {
  if (token < m && row < n) y[(u64)token * n + row] = (u16)pair(sum * alpha, sum * alpha);
}

// ---------------------------------------------------------------- few tokens

#ifdef FEW

constexpr int FEW_ROWS = 16 * RT, FEW_TOKENS = 8 * MT, FEW_THREADS = 32 * WARPS;

// Codes of up to 4 bits that are levels but for an offset are multiplied as they are, BIAS and all: of each sum, BIAS and
// the zero point times the sum of its tokens is taken off, which was added up when they came in, GRAIN columns at a time.
#define BIASED (BITS < 8 && !TABLE)
constexpr float BIAS = HALF ? 1024 : 128;
constexpr int GRAIN = (GROUP | 128) & -(GROUP | 128);  // the power of two in GROUP, up to 128

// A unit that is STAGED lies in shared memory: words as each lane will read them, scales and zero points as in memory.
constexpr int SLOT_SCALES = RT * UNIT_WORDS * 4, SLOT_ZEROS = SLOT_SCALES + RT * SCALES * 32;
constexpr int SLOT_BYTES = STAGED ? SLOT_ZEROS + (ZERO ? RT * SCALES * 16 : 0) : 0;

DEVICE void copy_unit(Stream& from, int units, u32 slot) {
  const int lane = lane_id();
#pragma unroll
  for (int rt = 0; rt < RT; rt++) {
    const u32* words = from.words + (u64)(rt * units) * UNIT_WORDS;
    const u32 to = slot + rt * UNIT_WORDS * 4;
#if BITS == 3
#pragma unroll
    for (int i = 0; i < BLOCKS * WORDS; i++) copy4(to + 128 * i + 4 * lane, words + 32 * i, true);
#else
#pragma unroll
    for (int i = 0; i < BLOCKS * WORDS; i += 4) copy16_ahead(to + 128 * i + 16 * lane, words + 32 * i);
#endif
    const u64 first = (u64)(rt * units) * SCALES * 8 - (lane >> 2);  // of this lane's row on
    for (int i = lane; i < 2 * SCALES; i += 32)
      copy16(slot + SLOT_SCALES + rt * SCALES * 32 + 16 * i, from.scale + first + 4 * i, true);
#if ZERO
    for (int i = lane; i < SCALES; i += 32)
      copy16(slot + SLOT_ZEROS + rt * SCALES * 16 + 16 * i, from.zero + first + 8 * i, true);
#endif
  }
  from.words += UNIT_WORDS, from.scale += SCALES * 8, from.zero += SCALES * 8;
}

DEVICE void read_unit(u32 slot, Unit& to) {
  const int lane = lane_id();
#pragma unroll
  for (int rt = 0; rt < RT; rt++) {
#pragma unroll
    for (int i = 0; i < BLOCKS * WORDS; i += BITS == 3 ? 1 : 4) {
      const u32 at = slot + rt * UNIT_WORDS * 4 + 128 * i;
      if (BITS == 3)
        to.words[rt][i / WORDS][i % WORDS] = read1(at + 4 * lane);
      else
        read4(&to.words[rt][i / WORDS][i % WORDS], at + 16 * lane);
    }
#pragma unroll
    for (int s = 0; s < SCALES; s++) {
      const int at = 8 * (rt * SCALES + s) + (lane >> 2);
      to.scale[rt][s] = read1(slot + SLOT_SCALES + 4 * at);
#if ZERO
      to.zero[rt][s] = read_half(slot + SLOT_ZEROS + 2 * at);
#endif
    }
  }
}

struct Sums {
  float of[RT][MT][4];
};

// What sums of `columns` of these tokens begin with; zeros: of row g and of row g + 8.
DEVICE void begin_sums(float (*sums)[4], const float* token_sums, int columns, [[maybe_unused]] u32 zeros) {
#if ZERO
  const float above = BIAS + (float)(zeros & 255), below = BIAS + (float)(zeros >> 8);
#else
  const float above = BIAS + OFFSET, below = above;
#endif
#pragma unroll
  for (int mt = 0; mt < MT; mt++) {
    const float* from = token_sums + 8 * mt + 2 * (lane_id() & 3);
    float2 sum = {0, 0};
#pragma unroll
    for (int i = 0; i < columns / GRAIN; i++) {
      const float2 more = *(const float2*)(from + i * FEW_TOKENS);
      sum.x += more.x, sum.y += more.y;
    }
    sums[mt][0] -= above * sum.x, sums[mt][1] -= above * sum.y;
    sums[mt][2] -= below * sum.x, sums[mt][3] -= below * sum.y;
  }
}

// sums += unit of weights x tokens, whose sums are those of the unit's columns.
DEVICE void few_unit(const Unit& unit, u32 tokens, u32 token_stride, const float* token_sums, Sums& total) {
#if GROUP
  Sums group = {};
#else
  Sums& group = total;
  if (BIASED)
#pragma unroll
    for (int rt = 0; rt < RT; rt++) begin_sums(total.of[rt], token_sums, UNIT, 0);
#endif
#pragma unroll
  for (int b = 0; b < BLOCKS; b++) {
#pragma unroll
    for (int step = 0; step < STEPS; step += 2) {
      u32 x[MT][4];
#pragma unroll
      for (int mt = 0; mt < MT; mt++)
        tokens_of_two_steps(tokens + mt * token_stride + 2 * (b * COLUMNS + 16 * step), x[mt]);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        [[maybe_unused]] const int column = b * COLUMNS + 16 * (step + half);
#pragma unroll
        for (int rt = 0; rt < RT; rt++) {
#if GROUP
          if (BIASED && column % GROUP == 0)
            begin_sums(group.of[rt], token_sums + column / GRAIN * FEW_TOKENS, GROUP, unit.zero[rt][column / GROUP]);
#endif
          u32 a[4];
#if BIASED
#pragma unroll
          for (int r = 0; r < 4; r++) a[r] = raw(unit.words[rt][b], step + half, r);
#else
          u32 offset[2];
#if ZERO
          offsets(unit.zero[rt][column / GROUP], offset);
#else
          offsets(0, offset);
#endif
          levels(unit.words[rt][b], step + half, offset, a);
#endif
#pragma unroll
          for (int mt = 0; mt < MT; mt++) mma(group.of[rt][mt], a, x[mt][2 * half], x[mt][2 * half + 1]);
        }
#if GROUP
        if ((column + 16) % GROUP == 0) {
#pragma unroll
          for (int rt = 0; rt < RT; rt++) {
            const u32 scale = unit.scale[rt][column / GROUP];
            const float low = low_half(scale), high = high_half(scale);
#pragma unroll
            for (int mt = 0; mt < MT; mt++) {
              float *t = total.of[rt][mt], *p = group.of[rt][mt];
              t[0] += low * p[0], t[1] += low * p[1], t[2] += high * p[2], t[3] += high * p[3];
              p[0] = p[1] = p[2] = p[3] = 0;
            }
          }
        }
#endif
      }
    }
  }
}

// A block has a contiguous run of strips (16 RT rows), of which it multiplies its part of the columns. These units of
// weights lie in a line, strip after strip, and every warp takes an equal piece of the line, from the middle of one strip to
// the middle of another, without waiting for anyone. What it summed up of a strip goes to shared memory under the number
// strip + warp, which no other pair has, and at the end the parts of each strip are added in the order of the warps.
//
// On a small layer what counts is the time from the end of one product to the end of the next, which must be that of what
// depends on it: x, the products, the sums. All else is done before: the next product's blocks find room beside this one's,
// fetch their first weights and wait. More of them find room in shared memory (STAGED) than in registers; with registers
// the largest layers are 1 % faster, where all this is little.
extern "C" __global__ void __launch_bounds__(FEW_THREADS, RESIDENT)
#if SPLIT > 1
    __cluster_dims__(SPLIT, 1, 1)
#endif
        few(Weight w, const float* alpha, const u32* pairs, const u16* x, u16* y, int m, int n, int k) {
  const int lane = lane_id(), warp = threadIdx.x / 32, g = lane >> 2, c = lane & 3;
  const int rank = blockIdx.x % SPLIT, place = blockIdx.x / SPLIT, places = gridDim.x / SPLIT;
  const int all = (n + FEW_ROWS - 1) / FEW_ROWS;
  const int strip = (int)((long long)all * place / places);
  const int strips = (int)((long long)all * (place + 1) / places) - strip;
  const int start = w.units * rank / SPLIT, units = w.units * (rank + 1) / SPLIT - start;  // of a strip, here
  const int line = strips * units, first = line * warp / WARPS, last = line * (warp + 1) / WARPS;

  int ahead = first, ahead_unit = first % units;
  Stream weights = stream(w, (strip + first / units) * RT, start + ahead_unit);
  const int skip = RT * w.units - units;  // from the end of a strip's part to the next strip's
  constexpr int PITCH = FEW_ROWS + 4, PART = FEW_TOKENS * PITCH;  // of a part: [tokens][rows], 4 more against bank conflicts
  const int most = (all + places - 1) / places;  // strips of any block
  float* factors = (float*)(memory + TABLE_BYTES + WARPS * RING * SLOT_BYTES);  // alpha of each row
  u32* bounds = (u32*)(factors + most * FEW_ROWS);  // the first and the last warp that have a piece of a strip
  float* parts = (float*)(bounds + (most + 3) / 4 * 4);
  for (int i = threadIdx.x; i < strips * FEW_ROWS; i += FEW_THREADS) {
    const int row = strip * FEW_ROWS + i;
    copy4(shared_address(factors + i), alpha + (row < n ? row : 0), row < n);
  }
#if STAGED
  const u32 ring = shared_address(memory) + TABLE_BYTES + warp * RING * SLOT_BYTES;
#else
  Unit ring[RING];
#endif
  auto fetch_next = [&](int slot) {
    if (ahead++ < last) {
#if STAGED
      copy_unit(weights, w.units, ring + slot * SLOT_BYTES);
#else
      fetch(weights, w.units, ring[slot]);
#endif
      if ((RT > 1 || SPLIT > 1) && ++ahead_unit == units) {
        ahead_unit = 0;
        weights.words += (long long)skip * UNIT_WORDS, weights.scale += skip * SCALES * 8, weights.zero += skip * SCALES * 8;
      }
    }
    copies_commit();
  };
#pragma unroll
  for (int d = 0; d < RING; d++) fetch_next(d);
  let_next_start();
  // Unit u of the line is warp (u WARPS + WARPS - 1) / line's: the last whose piece begins at or before it.
  for (int s = threadIdx.x; s < strips; s += FEW_THREADS)
    bounds[s] = (s * units * WARPS + WARPS - 1) / line | (((s + 1) * units - 1) * WARPS + WARPS - 1) / line << 16;
  const u32 of_m = 0xffffffffu / m + 1;  // an integer division takes long, and the end of a block is waited for
  spread_table(pairs);

  const int width = units * UNIT, pitch = 2 * width + 16;  // columns of x; bytes: rows begin 4 banks apart
  float* token_sums = parts + (most + WARPS) * PART;       // [columns / GRAIN][tokens]
  const u32 base = shared_address(token_sums + (BIASED ? width / GRAIN * FEW_TOKENS : 0));
  wait_for_inputs();
  constexpr int AT_ONCE = 4;  // rows of x on their way
  for (int first_row = 0; first_row < m; first_row += AT_ONCE)
    for (int i = threadIdx.x; i - lane < width / 8; i += FEW_THREADS) {  // whole warps, for the sums
      const int column = start * UNIT + 8 * i;
      uint4 eight[AT_ONCE];
#pragma unroll
      for (int j = 0; j < AT_ONCE; j++) {
        eight[j] = {0, 0, 0, 0};
        if (first_row + j < m && 8 * i < width && column < k) read_tokens(eight[j], x + (u64)(first_row + j) * k + column);
      }
#pragma unroll
      for (int j = 0; j < AT_ONCE; j++) {
        const int row = first_row + j;
        if (row >= m) break;
        if (8 * i < width) write_tokens(base + row * pitch + 16 * i, eight[j]);
        if (!BIASED) continue;
        float sum = sum_of(eight[j].x) + sum_of(eight[j].y) + sum_of(eight[j].z) + sum_of(eight[j].w);
#pragma unroll
        for (int other = 1; other < GRAIN / 8; other *= 2) sum += __shfl_xor_sync(0xffffffff, sum, other);
        if (8 * i < width && i % (GRAIN / 8) == 0) token_sums[8 * i / GRAIN * FEW_TOKENS + row] = sum;
      }
    }
  __syncthreads();

  // Lane l names row l % 8 of matrix l / 8. Rows past the last token hold anything: a token's sums are its own, and
  // those of no token go nowhere. With one tile they are copies of the last row, which need no memory.
  const int row = lane & 7;
  const u32 tokens = base + (MT > 1 || row < m ? row : m - 1) * pitch + 16 * (lane >> 3);
  Sums total = {};
  int unit = first % units, part = first / units + warp;
  for (int at = first; at < last; at += RING) {
#pragma unroll
    for (int d = 0; d < RING; d++) {
      if (at + d >= last) break;
#if STAGED
      copies_wait<RING - 1>();
      __syncwarp();  // scales were copied by other lanes
      Unit now;
      read_unit(ring + d * SLOT_BYTES, now);
#else
      const Unit& now = ring[d];
#endif
      few_unit(now, tokens + 2 * unit * UNIT, 8 * pitch, token_sums + unit * UNIT / GRAIN * FEW_TOKENS, total);
      fetch_next(d);  // the lanes of a warp multiply together, so all have read
      if (++unit < units && at + d + 1 < last) continue;
#pragma unroll
      for (int rt = 0; rt < RT; rt++)
#pragma unroll
        for (int mt = 0; mt < MT; mt++)
#pragma unroll
          for (int i = 0; i < 4; i++)
            parts[part * PART + (8 * mt + 2 * c + (i & 1)) * PITCH + 16 * rt + g + 8 * (i >> 1)] = total.of[rt][mt][i];
      total = {};
      unit = 0;
      part++;
    }
  }
  copies_wait<0>();
  __syncthreads();

  for (int i = threadIdx.x; i < strips * FEW_ROWS * m; i += FEW_THREADS) {
    const int row = i % FEW_ROWS, s = m == 1 ? i / FEW_ROWS : __umulhi(i / FEW_ROWS, of_m), token = i / FEW_ROWS - s * m;
    const int from = bounds[s] & 0xffff, to = bounds[s] >> 16;
    float sum = 0;
    for (int by = from; by <= to; by++)
      if (line >= WARPS || line * by / WARPS < line * (by + 1) / WARPS)  // on a short line some have nothing
        sum += parts[(s + by) * PART + token * PITCH + row];
    if (SPLIT > 1)
      parts[(s + from) * PART + token * PITCH + row] = sum;  // where no other strip has a part
    else
      put(y, sum, factors[s * FEW_ROWS + row], (strip + s) * FEW_ROWS + row, token, m, n);
  }
#if SPLIT > 1
  cluster_arrive();
  cluster_wait();
  // Columns differ from block to block of the cluster, and so may where a strip's first part lies.
  for (int i = rank * FEW_THREADS + threadIdx.x; i < strips * FEW_ROWS * m; i += SPLIT * FEW_THREADS) {
    const int row = i % FEW_ROWS, s = m == 1 ? i / FEW_ROWS : __umulhi(i / FEW_ROWS, of_m), token = i / FEW_ROWS - s * m;
    float sum = 0;
#pragma unroll
    for (int other = 0; other < SPLIT; other++) {
      const int count = w.units * (other + 1) / SPLIT - w.units * other / SPLIT, there = strips * count;
      const int from = (s * count * WARPS + WARPS - 1) / there;
      sum += read_shared_of(shared_address(parts + (s + from) * PART + token * PITCH + row), other);
    }
    put(y, sum, factors[s * FEW_ROWS + row], (strip + s) * FEW_ROWS + row, token, m, n);
  }
  cluster_arrive();  // a block must not end while another reads its memory
  cluster_wait();
#endif
}

#endif  // FEW

// ---------------------------------------------------------------- many tokens

#ifdef MANY

// sm_90a. A warpgroup multiplies 64 rows by NT tokens. Four more warps bring everything through shared memory, by the bulk
// copy engine: STAGES times a unit of the block's weights as they lie in memory, and the same columns of the tokens, 64 at a
// time in the 128-byte swizzle. Weights of the next 64 columns are decoded, to registers, while the tensor cores work on
// these.
//
// There are as many blocks as run at a time. Each takes tiles of MANY_ROWS x NT results, one after another, and what the
// next needs is on its way while the sums of the last are written. The tiles that are left when all blocks have had the
// same number are shared out by their columns, in equal runs ("stream-K", Osama et al., arXiv 2301.03598): a run goes from
// the middle of one tile to the middle of the next. Blocks that have parts of a tile leave their sums in memory; those
// of which it is the last work wait for one another, and each adds the others' sums to its own for its share of the tile.
//
// Or (SPLIT) all tiles are worked on at once, each by a cluster, which shares out its columns; then the blocks read one
// another's sums in shared memory, in half the time of the way through memory.
//
// Sums of a group can be kept apart and added to the others times its scale, as in `few`. That takes two sets of sums, and
// the tensor cores wait at the end of each group; else a weight is multiplied by its scale in 16 bits before the product.

constexpr int MANY_ROWS = 64 * WG, STEPS_OF_64 = 4;
constexpr int WIDE = E4M3 ? 128 : 64, TURNS = UNIT / WIDE;  // columns of a token in 128 bytes; even with 64
constexpr int TOKENS_OF_64 = NT * 128, TOKENS_BYTES = TURNS * TOKENS_OF_64;  // of so many columns, and of a stage
// Weights of a stage: words of each tile, scales of each, zero points of each.
constexpr int WORD_BYTES = 4 * UNIT_WORDS, SCALE_BYTES = 32 * SCALES, ZERO_BYTES = ZERO && !E4M3 ? 16 * SCALES : 0;
constexpr int SCALES_AT = 4 * WG * WORD_BYTES, ZEROS_AT = SCALES_AT + 4 * WG * SCALE_BYTES;
constexpr int WEIGHTS_BYTES = ZEROS_AT + 4 * WG * ZERO_BYTES;
// Sums of a tile come in pieces of 16 rows x 16 tokens, 8 to a lane; a warp has PIECES of them.
constexpr int PIECES = NT / 16, TURNED = PIECES % 2 ? 1 : 2, TILE_SUMS = MANY_ROWS * NT;  // TURNED: at a time
constexpr int TOKEN_GROUP = 4;  // blocks of tokens that go through all rows together
constexpr int MANY_THREADS = 128 * WG + 128;
constexpr int COPIERS = 3;  // warps that copy weights; one more copies tokens

// E4M3 tokens. The 4 bits of a code with zeros before them are an E4M3 number, code * 2^-9 for all of 0 .. 15 (its subnormals
// and the first binade beyond): two masks and a shift of a word make half of the left operand of m64nNk32, rows g and g + 8.
// Their bytes then are columns 2 c, 2 c + 8, 2 c + 1, 2 c + 9 of a tile, an order in which the tokens are written. What a
// code is more than its level, OFFSET or a zero point, is the same for a group: sum(scale (code - zero) x) =
// sum(scale (code x)) - sum(scale zero sum(x)), where the last sum, over the columns of a part, comes with the tokens
// in float16. So it is taken off when a run is done, by a product whose columns are the parts.
//
// The tensor cores add E4M3 products with some 14 bits. Sums of a part, PART columns of a group (at most 128), are kept
// apart and added in float32.
//
// A unit is copied by one instruction for the words of all tiles and one for their scales (tensor maps of two
// dimensions): the engine is a tenth slower at as many copies of 1 KB as there are tiles.
#if E4M3
constexpr int PARTS = UNIT / PART, PART_STEPS = PART / 32;
constexpr int WIDE_BYTES = 4096 * WG;  // of a block's words for 128 columns, 1 KB a tile
[[maybe_unused]] constexpr u32 ONE = 0x3c003c00;  // twice, in float16
constexpr int SUMS_WIDE = 64;  // parts of a token in 128 bytes
#endif

struct alignas(64) TensorMap {
  u8 bytes[128];
};

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory"); }

@WGMMA@

DEVICE void barrier_init(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
DEVICE void barrier_arrive(u32 barrier) {
  asm volatile("{.reg .b64 t; mbarrier.arrive.shared.b64 t, [%0];}" ::"r"(barrier) : "memory");
}
DEVICE void barrier_arrive_after_copies(u32 barrier) {  // when this thread's copies of 16 bytes are there
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}
DEVICE void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("{.reg .b64 t; mbarrier.arrive.expect_tx.shared.b64 t, [%0], %1;}" ::"r"(barrier), "r"(bytes) : "memory");
}
DEVICE void barrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{.reg .pred p;\n"
      "again: mbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n"
      "@p bra done;\n"
      "bra again;\n"
      "done:}" ::"r"(barrier), "r"(parity) : "memory");
}
DEVICE void prefetch_map(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
DEVICE void read_tile(u32 to, const TensorMap* map, int column, int token, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(column), "r"(token), "r"(barrier) : "memory");
}
DEVICE void read_bytes(u32 to, const void* from, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
               "r"(bytes), "r"(barrier) : "memory");
}
DEVICE void read_sums(float* to, const float* from) {  // four that another block has written
  asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3]) : "l"(from) : "memory");
}
DEVICE void read_sums_of(float* to, u32 there) {
  asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3]) : "r"(there) : "memory");
}
DEVICE void write_sums(u32 to, const float* from) {
  asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(to), "f"(from[0]), "f"(from[1]), "f"(from[2]), "f"(from[3])
               : "memory");
}
DEVICE u32 read_count(const u32* from) {
  u32 count;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(from) : "memory");
  return count;
}
DEVICE u32 add_count(u32* to) {  // -> what it was
  u32 count;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(count) : "l"(to) : "memory");
  return count;
}
// Four 8 x 8 matrices of 16 bits, as a warp has them in `a`, turned: a lane's address is that of one row of eight.
DEVICE void write_turned(u32 address, const u32* a) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(a[0]), "r"(a[1]),
               "r"(a[2]), "r"(a[3]) : "memory");
}
template <int THREADS> DEVICE void bar_sync(int name) { asm volatile("bar.sync %0, %1;" ::"r"(name), "n"(THREADS) : "memory"); }

DEVICE void scaled(u32* a, u32 low, u32 high) {
  a[0] = times(a[0], low), a[1] = times(a[1], high), a[2] = times(a[2], low), a[3] = times(a[3], high);
}

// What a block does, in its order: whole tiles first, then its run of the units of those that are left; of a cluster, its
// part of the cluster's tile.
struct Work {
  int tile, first, last;       // units first .. last - 1 of a tile
  int units, tiles, shared;    // units of a tile; the first of the tiles that are shared
  int block, sharers;          // as many blocks as leave every run some units
  int line, at, end;           // units of all shared tiles, in a line; this block's run. line x blocks fits in an int

  DEVICE Work(int tiles, int units) : units(units), tiles(tiles), block(blockIdx.x) {
    const int blocks = gridDim.x;
    if (SPLIT > 1) {
      tile = -1;
      return;
    }
    tile = block - blocks, shared = SHARE ? tiles / blocks * blocks : tiles;
    const int left = tiles - shared;
    line = left * units;
    sharers = line / LEAST_UNITS < blocks ? (line + LEAST_UNITS - 1) / LEAST_UNITS : blocks;
    if (SHARE == 1 && left && left < sharers) sharers = sharers / left * left;
    at = block < sharers ? begin_of(block) : line, end = block < sharers ? begin_of(block + 1) : line;
  }
  DEVICE bool next() {
    if (SPLIT > 1) {
      if (tile >= 0) return false;
      tile = block / SPLIT, first = units * (block % SPLIT) / SPLIT, last = units * (block % SPLIT + 1) / SPLIT;
      return true;
    }
    if (tile + (int)gridDim.x < shared) {
      tile += gridDim.x, first = 0, last = units;
      return true;
    }
    tile = tiles;  // no whole ones from here on
    if (at >= end) return false;
    tile = shared + at / units, first = at % units;
    last = end - at < units - first ? first + (end - at) : units;
    at += last - first;
    return true;
  }
  DEVICE int begin_of(int sharer) const { return line * sharer / sharers; }
  // Of this tile, which is shared: units in the line, and the block that has one of them.
  DEVICE int at_unit(int unit) const { return (tile - shared) * units + unit; }
  DEVICE int owner(int unit) const { return (at_unit(unit) * sharers + sharers - 1) / line; }
};

// Where a tile lies: TOKEN_GROUP blocks of tokens with the first rows, then with the next, and so on: tiles that are worked
// on at the same time have few weights and few tokens between them, which stay in the L2 cache.
DEVICE void place(int tile, int m, int n, int* row, int* token) {
  const int rows = (n + MANY_ROWS - 1) / MANY_ROWS, tokens = (m + NT - 1) / NT;
  const int group = tile / (TOKEN_GROUP * rows), within = tile - group * TOKEN_GROUP * rows;
  const int wide = tokens - group * TOKEN_GROUP < TOKEN_GROUP ? tokens - group * TOKEN_GROUP : TOKEN_GROUP;
  *row = within / wide * MANY_ROWS, *token = (group * TOKEN_GROUP + within % wide) * NT;
}

// A piece of sums, as two tiles of eight tokens have them, times alpha of rows g and g + 8, goes out by way of 512 bytes of
// this warp, in which matrices are turned so that 8 rows of a token are one write. There a token has two halves of 8 rows;
// which comes first changes every four tokens, against bank conflicts.
DEVICE void turn_piece(const float* sum, float top, float bottom, u32 mine) {
  const u32 a[4] = {pair(sum[0] * top, sum[1] * top), pair(sum[2] * bottom, sum[3] * bottom),
                    pair(sum[4] * top, sum[5] * top), pair(sum[6] * bottom, sum[7] * bottom)};
  const int lane = lane_id(), token = lane >> 4 << 3 | lane & 7, half = lane >> 3 & 1;
  write_turned(mine + 32 * token + 16 * (half ^ token >> 2 & 1), a);
}
DEVICE void put_piece(u32 mine, u16* y, int first_row, int first_token, int m, int n) {
  const int token = lane_id() >> 1, half = lane_id() & 1, to = first_row + 8 * half;
  u32 eight[4];
  read4(eight, mine + 32 * token + 16 * (half ^ token >> 2 & 1));
  if (first_token + token >= m || to >= n) return;
  u16* const out = y + (u64)(first_token + token) * n + to;
  if (n % 8 == 0)
    *(uint4*)out = make_uint4(eight[0], eight[1], eight[2], eight[3]);
  else  // not on 16 bytes
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (to + i < n) out[i] = (u16)(eight[i / 2] >> 16 * (i % 2));
}

#if E4M3
// Scale times zero point of a part, of rows g and g + 8 of a tile: two float16.
DEVICE u32 zero_of_part(const Weight& w, int tile, int part) {
  u32 scale = ONE, zero = 0x64006400 + OFFSET * 0x00010001;  // 1024 + zero
#if GROUP
  const u64 group = (u64)tile * w.units * SCALES + part * PART / GROUP;
  scale = load1(w.scale + 8 * group + (lane_id() >> 2));
#if ZERO
  zero = permute(load_half(w.zero + 8 * group + (lane_id() >> 2)), 0x64646464, 0x4140);
#endif
#endif
  u32 out;
  asm("{.reg .b32 t; sub.rn.f16x2 t, %1, %2; mul.rn.f16x2 %0, t, %3;}" : "=r"(out) : "r"(zero), "r"(0x64006400), "r"(scale));
  return out;
}
#endif

extern "C" __global__ void __launch_bounds__(MANY_THREADS, RESIDENT)
#if SPLIT > 1
    __cluster_dims__(SPLIT, 1, 1)
#endif
    many(Weight w, const float* alpha, const u32* pairs, const __grid_constant__ TensorMap map,
#if E4M3
         const __grid_constant__ TensorMap sums_map, const __grid_constant__ TensorMap words_map,
         const __grid_constant__ TensorMap scales_map, const float* token_scale,
#endif
         u16* y, float* left, u32* counts, int m, int n) {
  __shared__ __align__(8) u64 barriers[2 * STAGES];
  const u32 full = shared_address(barriers), empty = full + 8 * STAGES;
  // tokens must lie on 1024 bytes whatever the driver gives
  const u32 begin = shared_address(memory) + TABLE_BYTES, tokens = (begin + 1023) & ~1023u;
  const u32 weights = tokens + STAGES * TOKENS_BYTES, turned = weights + STAGES * WEIGHTS_BYTES;
  const int lane = lane_id(), warp = threadIdx.x / 32, group = threadIdx.x / 128;

  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      barrier_init(full + 8 * i, E4M3 ? 2 : COPIERS + 1 + (GROUP ? 32 : 0));  // a warp's copies of 16 bytes arrive lane by lane
      barrier_init(empty + 8 * i, WG);
    }
    asm volatile("fence.proxy.async;" ::: "memory");
  }
  let_next_start();
  spread_table(pairs);
  __syncthreads();

  Work work((n + MANY_ROWS - 1) / MANY_ROWS * ((m + NT - 1) / NT), w.units);
  int first_row, first_token;
  if (warp >= 4 * WG) {
#if REGISTERS
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
#endif
    // A copy takes a warp a while to begin, whatever its size: lanes have one each, and warps share them out.
    const int copier = warp - 4 * WG;
    if (E4M3 && copier % COPIERS) return;
    if (copier == COPIERS) {
      prefetch_map(&map);
      wait_for_inputs();
    }
    int slot = 0, phase = 1;
    while (work.next()) {
      place(work.tile, m, n, &first_row, &first_token);
      auto at = [&](int of, int unit) {  // of the block's tiles; rows past the last go nowhere
        const int tile = first_row / 16 + of;
        return (u64)(tile < w.tiles ? tile : w.tiles - 1) * w.units + unit;
      };
#if E4M3
      const int sums = work.first * PARTS / SUMS_WIDE * SUMS_WIDE;
      const int more = (work.last * PARTS - sums + SUMS_WIDE - 1) / SUMS_WIDE;  // stages of sums, after those of units
#else
      const int more = 0;
#endif
      for (int unit = work.first; unit < work.last + more; unit++) {
        barrier_wait(empty + 8 * slot, phase);
        const u32 arrived = full + 8 * slot, to = weights + slot * WEIGHTS_BYTES;
#if E4M3
        if (unit >= work.last) {
          if (lane == 0) barrier_expect(arrived, copier ? TOKENS_OF_64 : 0);
          if (lane == 0 && copier)
            read_tile(tokens + slot * TOKENS_BYTES, &sums_map, sums + (unit - work.last) * SUMS_WIDE, first_token, arrived);
        } else if (copier == 0) {
          if (lane == 0) barrier_expect(arrived, WEIGHTS_BYTES);
          __syncwarp();
          if (lane < TURNS)  // a map's elements of words are 8 bytes
            read_tile(to + lane * WIDE_BYTES, &words_map, (unit * TURNS + lane) * 128, first_row / 16, arrived);
          if (GROUP && lane == 31) read_tile(to + SCALES_AT, &scales_map, unit * SCALES * 8, first_row / 16, arrived);
        } else
#endif
        if (copier < COPIERS) {  // words: a tile a lane
          const int mine = copier + COPIERS * lane;
          if (lane == 0) barrier_expect(arrived, (4 * WG - copier + COPIERS - 1) / COPIERS * WORD_BYTES);
          __syncwarp();
          if (mine < 4 * WG)
            read_bytes(to + mine * WORD_BYTES, w.words + at(mine, unit) * UNIT_WORDS, WORD_BYTES, arrived);
#if GROUP
          if (copier == 0) {  // what is too small for that engine, 16 bytes a lane
            for (int i = lane; i < 4 * WG * 2 * SCALES; i += 32)
              copy16(to + SCALES_AT + 16 * i, w.scale + at(i / (2 * SCALES), unit) * (8 * SCALES) + i % (2 * SCALES) * 4, true);
#if ZERO
            for (int i = lane; i < 4 * WG * SCALES; i += 32)
              copy16(to + ZEROS_AT + 16 * i, w.zero + at(i / SCALES, unit) * (8 * SCALES) + i % SCALES * 8, true);
#endif
            barrier_arrive_after_copies(arrived);
          }
#endif
        } else {
          if (lane == 0) barrier_expect(arrived, TOKENS_BYTES);
          __syncwarp();
          if (lane < TURNS)
            read_tile(tokens + slot * TOKENS_BYTES + lane * TOKENS_OF_64, &map, unit * UNIT + lane * WIDE, first_token, arrived);
        }
        if (++slot == STAGES) slot = 0, phase ^= 1;
      }
    }
    return;
  }

#if REGISTERS
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
#endif
  wait_for_inputs();  // for y, which the kernel before may still read
  const u32 mine = turned + 512 * TURNED * warp;
  // Of the descriptor of tokens (PTX ISA, "Matrix descriptor") the half that changes: their address in units of 16 bytes.
  // The other half is always 1024 bytes from 8 rows to the next, in the 128-byte swizzle.
  const u32 descriptor = tokens >> 4 | 1 << 16;
  const u32 words = weights + warp * (E4M3 ? 1024 : WORD_BYTES) + (BITS == 3 ? 4 : 16) * lane;
  const u32 scales = weights + SCALES_AT + warp * SCALE_BYTES + 4 * (lane >> 2);
  const u32 zeros = weights + ZEROS_AT + warp * ZERO_BYTES + 2 * (lane >> 2);
  int slot = 0, phase = 0, before = 0;
  while (work.next()) {
    place(work.tile, m, n, &first_row, &first_token);
    const int row = first_row + 16 * warp + (lane >> 2);
    const float top = row < n ? alpha[row] : 0, bottom = row + 8 < n ? alpha[row + 8] : 0;
    float acc[NT / 2], apart[APART ? NT / 2 : 1];
#pragma unroll
    for (int i = 0; i < NT / 2; i++) acc[i] = 0;
    float above = 0, below = 0, next_above = 0, next_below = 0;  // scales of the last group and of this one
    auto add_group = [&]() {
#pragma unroll
      for (int i = 0; i < NT / 2; i++) acc[i] += (i & 2 ? below : above) * apart[APART ? i : 0];
    };
#if E4M3
    u32 a[PART_STEPS][4], q[2][WORDS];
#pragma unroll
    for (int i = 0; i < NT / 2; i++) apart[i] = 0;
    for (int unit = work.first; unit < work.last; unit++) {
      barrier_wait(full + 8 * slot, phase);
      const u32 here = slot * WEIGHTS_BYTES;
      const u32 at = __shfl_sync(0xffffffff, descriptor + slot * (TOKENS_BYTES / 16), 0);  // the same in all lanes
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        const int first = part * PART;
#pragma unroll
        for (int block = first / 64; block < (first + PART + 63) / 64; block++)
          if (first % 64 == 0 || block > first / 64)
            read4(q[block % 2], words + here + block / 2 * WIDE_BYTES + block % 2 * 512);
        u32 scale = ONE;
        if (GROUP) scale = read1(scales + here + first / (GROUP ? GROUP : UNIT) * 32);
        wgmma_wait<0>();
        if (part == 0 && unit > work.first && threadIdx.x % 128 == 0) barrier_arrive(empty + 8 * before);
        add_group();
        above = low_half(scale), below = high_half(scale);
#pragma unroll
        for (int step = 0; step < PART_STEPS; step++) {
          const int column = first + 32 * step, mask = 0x0f0f0f0f;
          const u32* const two = q[column / 64 % 2] + column % 64 / 16;
          a[step][0] = two[0] & mask, a[step][1] = two[0] >> 4 & mask;
          a[step][2] = two[1] & mask, a[step][3] = two[1] >> 4 & mask;
        }
        // No compiler may put these off until after the fence: it would have to wait for each product then.
#pragma unroll
        for (int i = 0; i < 4 * PART_STEPS; i++) asm volatile("" : "+r"(a[i / 4][i % 4]));
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < PART_STEPS; step++) {
          const int column = first + 32 * step;
          wgmma(apart, a[step], at + column / WIDE * (TOKENS_OF_64 / 16) + column % WIDE / 16, step > 0);
        }
        wgmma_commit();
      }
      before = slot;
      if (++slot == STAGES) slot = 0, phase ^= 1;
    }
    // Scales times zero points of 64 parts: the left operand of m64nNk16, zeros for parts of other runs
    const int from = work.first * PARTS, to = work.last * PARTS;
    const int tile = first_row / 16 + warp < w.tiles ? first_row / 16 + warp : w.tiles - 1;
    u32 taken[SUMS_WIDE / 16][4];
    auto take = [&](int begin) {
#pragma unroll
      for (int i = 0; i < SUMS_WIDE / 8; i++) {
        u32 two[2];
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const int part = begin + 8 * i + 2 * (lane & 3) + j;
          two[j] = zero_of_part(w, tile, part < to ? part : to - 1);
          if (part < from || part >= to) two[j] = 0;
        }
        taken[i / 2][i % 2 * 2] = permute(two[0], two[1], 0x5410), taken[i / 2][i % 2 * 2 + 1] = permute(two[0], two[1], 0x7632);
      }
    };
    int begin = from / SUMS_WIDE * SUMS_WIDE;
    take(begin);
    wgmma_wait<0>();
    if (threadIdx.x % 128 == 0) barrier_arrive(empty + 8 * before);
    add_group();
    for (;;) {
      barrier_wait(full + 8 * slot, phase);
      const u32 at = __shfl_sync(0xffffffff, descriptor + slot * (TOKENS_BYTES / 16), 0);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < SUMS_WIDE / 16; step++) wgmma_minus(acc, taken[step], at + 2 * step, 1);
      wgmma_commit();
      wgmma_wait<0>();
      if (threadIdx.x % 128 == 0) barrier_arrive(empty + 8 * slot);
      if (++slot == STAGES) slot = 0, phase ^= 1;
      begin += SUMS_WIDE;
      if (begin >= to) break;
      take(begin);
    }
#else
    u32 a[2][STEPS_OF_64][4], q[WORDS], offset[2], low = ONES, high = ONES;
    offsets(0, offset);
    for (int unit = work.first; unit < work.last; unit++) {
      barrier_wait(full + 8 * slot, phase);
      const u32 here = slot * WEIGHTS_BYTES;
      const u32 at = __shfl_sync(0xffffffff, descriptor + slot * (TOKENS_BYTES / 16), 0);  // the same in all lanes
      auto read_words = [&](int block) {
#if BITS == 3
#pragma unroll
        for (int i = 0; i < WORDS; i++) q[i] = read1(words + here + 128 * (block * WORDS + i));
#else
#pragma unroll
        for (int i = 0; i < WORDS; i += 4) read4(q + i, words + here + 128 * (block * WORDS + i));
#endif
      };
      read_words(0);
#pragma unroll
      for (int turn = 0; turn < TURNS; turn++) {
        u32(*now)[4] = a[turn & 1];  // the other may still be read
#pragma unroll
        for (int step = 0; step < STEPS_OF_64; step++) {
          const int column = turn * 64 + step * 16;
#if GROUP
          if (column % GROUP == 0) {
            const u32 scale = read1(scales + here + column / GROUP * 32);
            next_above = low_half(scale), next_below = high_half(scale);
            if (!APART) low = pair(next_above, next_above), high = pair(next_below, next_below);
#if ZERO
            offsets(read_half(zeros + here + column / GROUP * 16), offset);
#endif
          }
#endif
          levels(q, column % COLUMNS / 16, offset, now[step]);
          if (GROUP && !APART) scaled(now[step], low, high);
        }
        if ((turn + 1) * 64 % COLUMNS == 0 && turn + 1 < TURNS) read_words((turn + 1) * 64 / COLUMNS);
        const bool begins = (turn * 64) % (GROUP ? GROUP : 64) == 0;
        if (APART && begins) {
          wgmma_wait<0>();
          if (turn > 0 || unit > work.first) add_group();
          above = next_above, below = next_below;
        }
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < STEPS_OF_64; step++)
          wgmma(APART ? apart : acc, now[step], at + turn * (TOKENS_OF_64 / 16) + 2 * step,
                !(APART && begins && step == 0));
        wgmma_commit();
        wgmma_wait<1>();
        if (turn == 0 && unit > work.first && threadIdx.x % 128 == 0) barrier_arrive(empty + 8 * before);
      }
      before = slot;
      if (++slot == STAGES) slot = 0, phase ^= 1;
    }
    wgmma_wait<0>();
    if (threadIdx.x % 128 == 0) barrier_arrive(empty + 8 * before);
    if (APART) add_group();
#endif

    // Parts of this tile are with blocks head .. tail. It is the last work of all but perhaps the last of them, and those whose
    // last work it is add up a share of the pieces each. A piece that another adds goes to memory; a block has two places
    // there, for it may be the tail of one tile and the head of another.
    const bool whole = SPLIT > 1 || (work.first == 0 && work.last == w.units);
    const int head = whole ? 0 : work.owner(0), tail = whole ? 0 : work.owner(w.units - 1);
    const bool tail_adds = !whole && work.begin_of(tail + 1) == work.at_unit(w.units);
    const int adders = whole ? 1 : tail - head + tail_adds;
    const int share = whole ? 0 : work.block < tail || tail_adds ? work.block - head : -1;
    u32* const count = counts + head;
    const u32 parts = adders == 1 ? 1 : tail - head + 1;  // in memory
    const int turn = warp * PIECES % adders;  // whose share this warp's first piece is
    bool ours[PIECES];
#pragma unroll
    for (int j = 0, of = turn; j < PIECES; j++) {
      ours[j] = of == share;
      if (++of == adders) of = 0;
    }
#if SPLIT > 1
    // Each block of the cluster adds its share of the pieces; those of others lie where weights and tokens were.
    const int rank = blockIdx.x % SPLIT;
    const u32 exchanged = tokens + warp * PIECES * 1024 + 16 * lane;
    bar_sync<128 * WG>(1);
#pragma unroll
    for (int j = 0; j < PIECES; j++) {
      ours[j] = (warp * PIECES + j) % SPLIT == rank;
      if (!ours[j]) write_sums(exchanged + 1024 * j, acc + 8 * j), write_sums(exchanged + 1024 * j + 512, acc + 8 * j + 4);
    }
    cluster_arrive();
    cluster_wait();
#pragma unroll
    for (int other = 1; other < SPLIT; other++) {
      const u32 there = address_in(exchanged, (rank + other) % SPLIT);
#pragma unroll
      for (int j = 0; j < PIECES; j++) {
        float more[8];
        if (!ours[j]) continue;
        read_sums_of(more, there + 1024 * j), read_sums_of(more + 4, there + 1024 * j + 512);
#pragma unroll
        for (int i = 0; i < 8; i++) acc[8 * j + i] += more[i];
      }
    }
    cluster_arrive();  // a block must not end while another reads its memory
#endif
    if (!whole) {
      float* const to = left + (u64)(2 * work.block + (work.block == head)) * TILE_SUMS + warp * PIECES * 256 + 4 * lane;
#pragma unroll
      for (int j = 0; j < PIECES; j++)
        if (!ours[j])
#pragma unroll
          for (int i = 0; i < 8; i += 4)
            *(float4*)(to + 256 * j + 32 * i) =
                make_float4(acc[8 * j + i], acc[8 * j + i + 1], acc[8 * j + i + 2], acc[8 * j + i + 3]);
      bar_sync<128 * WG>(1);
      if (threadIdx.x == 0 && (adders > 1 || share < 0)) add_count(count);  // after all that this block has written
      if (share < 0) continue;
      if (threadIdx.x == 0)
        while (read_count(count) < parts) {}
      bar_sync<128 * WG>(1);
      for (int part = head; part <= tail; part++) {
        if (part == work.block) continue;
        const float* from = left + (u64)(2 * part + (part == head)) * TILE_SUMS + warp * PIECES * 256 + 4 * lane;
        constexpr int AT_ONCE = PIECES % 2 ? 1 : PIECES % 4 || WG == 4 ? 2 : 4;  // on their way
#pragma unroll
        for (int first = 0; first < PIECES; first += AT_ONCE) {
          float more[AT_ONCE][8];
#pragma unroll
          for (int j = 0; j < AT_ONCE; j++)
            if (ours[first + j])
              read_sums(more[j], from + 256 * (first + j)), read_sums(more[j] + 4, from + 256 * (first + j) + 128);
#pragma unroll
          for (int j = 0; j < AT_ONCE; j++)
            if (ours[first + j])
#pragma unroll
              for (int i = 0; i < 8; i++) acc[8 * (first + j) + i] += more[j][i];
        }
      }
    }
#if E4M3
#pragma unroll
    for (int j = 0; j < PIECES; j++) {
      const float2* of = (const float2*)(token_scale + first_token + 16 * j + 2 * (lane & 3));
      const float2 first = of[0], second = of[4];
#pragma unroll
      for (int i = 0; i < 8; i += 2) {  // codes counted as code * 2^-9
        const float2 t = i < 4 ? first : second;
        acc[8 * j + i] *= 512 * t.x, acc[8 * j + i + 1] *= 512 * t.y;
      }
    }
#endif
#pragma unroll
    for (int first = 0; first < PIECES; first += TURNED) {
      __syncwarp();  // what was there has been read
#pragma unroll
      for (int j = 0; j < TURNED; j++)
        if (ours[first + j]) turn_piece(acc + 8 * (first + j), top, bottom, mine + 512 * j);
      __syncwarp();
#pragma unroll
      for (int j = 0; j < TURNED; j++)
        if (ours[first + j]) put_piece(mine + 512 * j, y, first_row + 16 * warp, first_token + 16 * (first + j), m, n);
    }
#if SPLIT > 1
    cluster_wait();
#endif
    if (!whole) {
      bar_sync<128 * WG>(1);
      if (threadIdx.x == 0 && add_count(count) == parts + adders - 1) *count = 0;  // all have seen it
    }
  }
}

#endif  // MANY

// ---------------------------------------------------------------- the weight in 16 bits

#ifdef DENSE

// A warp writes tiles of 16 rows by 64 columns, through shared memory so that rows are written 128 bytes at a time.
extern "C" __global__ void __launch_bounds__(256)
    dense(Weight w, const float* alpha, const u32* pairs, u16* out, int n, int k) {
  __shared__ __align__(128) u32 staged[8][16][36];
  spread_table(pairs);
  __syncthreads();
  const int lane = lane_id(), warp = threadIdx.x / 32, g = lane >> 2, c = lane & 3;
  const u64 count = (u64)w.tiles * w.units;
  for (u64 i = (u64)blockIdx.x * 8 + warp; i < count; i += (u64)gridDim.x * 8) {
    const int tile = (int)(i / w.units), unit = (int)(i % w.units);
    Unit here;
    Stream weights = stream(w, tile, unit);
    fetch(weights, 0, here);
    const int row = tile * 16 + g;
    const float above = row < n ? alpha[row] : 0, below = row + 8 < n ? alpha[row + 8] : 0;
    u32 offset[2];
    offsets(0, offset);
    float low = above, high = below;
#pragma unroll
    for (int piece = 0; piece < UNIT / 64; piece++) {
#pragma unroll
      for (int step = 0; step < 4; step++) {
        const int column = piece * 64 + step * 16;
#if GROUP
        if (column % GROUP == 0) {
          const int s = column / GROUP;
          low = above * low_half(here.scale[0][s]), high = below * high_half(here.scale[0][s]);
#if ZERO
          offsets(here.zero[0][s], offset);
#endif
        }
#endif
        u32 a[4];
        levels(here.words[0][column / COLUMNS], column % COLUMNS / 16, offset, a);
#pragma unroll
        for (int r = 0; r < 4; r++) {
          const float factor = r & 1 ? high : low;
          staged[warp][g + 8 * (r & 1)][step * 8 + 4 * (r >> 1) + c] =
              pair(first_of(a[r]) * factor, second_of(a[r]) * factor);
        }
      }
      __syncwarp();
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int row = 4 * j + lane / 8, column = unit * UNIT + piece * 64 + 8 * (lane % 8);
        if (tile * 16 + row < n && column < k)
          *(uint4*)(out + (u64)(tile * 16 + row) * k + column) = *(uint4*)&staged[warp][row][4 * (lane % 8)];
      }
      __syncwarp();
    }
  }
}

#endif  // DENSE
