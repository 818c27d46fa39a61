// Products with weights of 2, 3, 4 or 8 bits in the order of the tensor cores' registers.
//
// Compiled at run time (nvrtc.py) with the macros below; no header is needed. The host side, which makes the layout and
// says what it is for, is fragments.py and fragment_layout.py. This is what three kernels have in common, one of which is
// appended:
//
//   few.cu    up to some 16 tokens: mma.sync, columns split over warps and a cluster
//   many.cu   more: wgmma with the weights as register operand, tokens through shared memory
//   dense.cu  the weight in 16 bits or in E4M3, for a dense product
//
// Weights are the *left* operand, tokens the columns on the right: 16 rows of the weight fill a tile whatever the number
// of tokens. A thread of a warp (g = lane / 4, c = lane % 4) holds of a tile of 16 x 16 the registers
//   r = 0..3: row g + 8 (r % 2), columns 2 c + 8 (r / 2) + {0, 1}
// which is the left operand of mma.m16n8k16, and of wgmma.m64nNk16 for the quarter of a warpgroup that a warp is.
//
// Macros. BITS; TABLE (codes index a table of levels) or not (levels are consecutive integers); GROUP columns that share
// a scale, a multiple of 16, or 0; UNIT columns that hold whole blocks and groups; ZERO (a zero point per group) or OFFSET
// (one for all); HALF (float16 in and out, else bfloat16); E4M3 (tokens are rounded to it: codes of 4 bits only); RT tiles of
// 16 rows per warp. Those of one kernel are named in its file.

// A block is what a thread reads at once: WORDS words for STEPS tiles along the columns, four of each thread, then the rest.
#if BITS == 4
constexpr int WORDS = 4, STEPS = 4;
#elif BITS == 3
constexpr int WORDS = 6, STEPS = 8;
#elif BITS == 2
constexpr int WORDS = 4, STEPS = 8;
#elif BITS == 8
constexpr int WORDS = 8, STEPS = 4;
#endif
constexpr int COLUMNS = 16 * STEPS;

constexpr int BLOCKS = UNIT / COLUMNS;
constexpr int SCALES = GROUP ? UNIT / GROUP : 0;

[[maybe_unused]] constexpr u32 ONES = HALF ? 0x3c003c00 : 0x3f803f80;  // twice, in 16 bits

// A code with zeros around it is a number of 16 bits: if it lies in the last ones code * 2^-133 in bfloat16, code * 2^-24 in
// float16, for the subnormals and the first binade after them have the same distance from one to the next. `up` bits higher
// it counts 2^up times as much. So codes are masked where they lie in the last 8 bits of a bfloat16, two or more after one
// shift, and need nothing added.
#define BARE (BITS < 8 && !TABLE)
[[maybe_unused]] constexpr float LEVEL = BARE ? (HALF ? 512 : 64) : 1;  // what `levels` are divided by

extern __shared__ __align__(1024) u8 memory[];  // begins with the table of pairs, where there is one

// ---------------------------------------------------------------- instructions

DEVICE void load4(const u32* from, u32* to) {
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "l"(from));
}
DEVICE void load2(const u32* from, u32* to) {
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v2.u32 {%0,%1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "l"(from));
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
DEVICE u32 fused(u32 a, u32 b, u32 c) {  // a * b + c
  u32 out;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  return out;
}
DEVICE u32 times(u32 a, u32 b) { u32 out; asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b)); return out; }
DEVICE u32 pair(float low, float high) {
  u32 out; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low)); return out;
}
#else
DEVICE u32 fused(u32 a, u32 b, u32 c) {  // a * b + c
  u32 out;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  return out;
}
DEVICE u32 times(u32 a, u32 b) { return fused(a, b, 0x80008000u); }  // sm_80 knows no product
DEVICE u32 pair(float low, float high) {
  u32 out; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low)); return out;
}
#endif
DEVICE float first_of(u32 pair) { return HALF ? low_half(pair) : __uint_as_float(pair << 16); }
DEVICE float second_of(u32 pair) { return HALF ? high_half(pair) : __uint_as_float(pair & 0xffff0000u); }
DEVICE float sum_of(u32 pair) { return first_of(pair) + second_of(pair); }
DEVICE void copy16(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
DEVICE void copy4(u32 to, const void* from, bool real) {  // zeros where not real
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
DEVICE void read2(u32* to, u32 address) {
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "r"(address) : "memory");
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
DEVICE void read_matrices(u32 address, u32* b) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3]) : "r"(address));
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
  return {w.words + at * UNIT_WORDS + 4 * lane, w.scale + at * SCALES * 8 + (lane >> 2),
          w.zero + at * SCALES * 8 + (lane >> 2)};
}

// A lane's words of a block that lies in shared memory.
DEVICE void read_words(u32* to, u32 block) {
#pragma unroll
  for (int i = 0; i + 4 <= WORDS; i += 4) read4(to + i, block + 128 * i + 16 * lane_id());
  if (BITS == 3) read2(to + WORDS - 2, block + 512 + 8 * lane_id());
}

DEVICE void fetch(Stream& from, int units, Unit& to) {  // units: of a tile, from one of RT tiles to the next
#pragma unroll
  for (int rt = 0; rt < RT; rt++) {
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
      const u32* block = from.words + (u64)(rt * units) * UNIT_WORDS + b * 32 * WORDS;
#pragma unroll
      for (int i = 0; i + 4 <= WORDS; i += 4) load4(block + 32 * i, to.words[rt][b] + i);
      if (BITS == 3) load2(block + 128 - 2 * lane_id(), to.words[rt][b] + WORDS - 2);
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

// Where register r (0..3) of tile `step` of a block lies: code n of the halves of a word, moved up `up` bits in what is read of
// it. Of 4 bits those of row g + 8 are moved up by ROW_UP, of less those of some columns, 8 at a time, in which tokens are
// divided by as much; in float16 they might lose digits, so there each code has a shift of its own.
constexpr int ROW_UP = BARE && BITS == 4 ? 4 : 0;
#define MOVED (BARE && BITS < 4 && !HALF)
struct Place {
  int word, n, up;
};
DEVICE constexpr int up_of(int columns) {  // of columns 8 * columns + 0 .. 7
  return MOVED ? (BITS == 2 ? 0x64206420 : 0x41303030) >> columns % 8 * 4 & 15 : 0;
}
DEVICE constexpr Place place(int step, int r) {
  [[maybe_unused]] const int columns = 2 * step + r / 2, of = columns % 8 * 4;
#if BITS == 2
  return {columns / 8 * 2 + r % 2, columns % 8, up_of(columns)};
#elif BITS == 3  // n 5: in the bits that five codes leave of three words
  const int word = columns / 8 * 3 + ((r % 2 ? 0x00211111 : 0x00222200) >> of & 15);
  return {word, (r % 2 ? 0x54443210 : 0x32321010) >> of & 15, up_of(columns)};
#else
  return {step, r, r % 2 * ROW_UP};
#endif
}

// Register r of tile `step`: a bare code, or the level of a table.
DEVICE u32 raw(const u32* q, int step, int r) {
#if BITS == 8
  return 0;
#else
  const Place in = place(step, r);
  const u32 word = q[in.word];
  [[maybe_unused]] const u32* const three = q + step / 4 * 3;
#if TABLE
  // Entry e of the table at byte 128 e + 4 lane: shift the code pair to bit 7.
  const int down = 2 * BITS * in.n - 7;
  u32 at = and_or(down < 0 ? word << -down : word >> (down < 0 ? 0 : down), ((1 << 2 * BITS) - 1) << 7, 4 * lane_id());
  if (BITS == 3 && in.n == 5) at = ((three[0] >> 30) | (three[1] >> 30 << 2) | (three[2] >> 30 << 4)) << 7 | 4 * lane_id();
  return *(const u32*)(memory + at);
#else
  if (BITS == 3 && in.n == 5) {
    u32 bits = three[0] >> (15 - in.up) & 0x00010001 << in.up;
    bits = and_or(three[1] >> (14 - in.up), 0x00020002 << in.up, bits);
    return and_or(three[2] >> (13 - in.up), 0x00040004 << in.up, bits);
  }
  return word >> (BITS * in.n - in.up) & ((1 << BITS) - 1) * 0x00010001 << in.up;
#endif
#endif
}

// The four registers of a tile: levels less their zero point, over LEVEL. `offset`: of row g and of row g + 8.
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
    const int up = place(step, r).up;  // times the largest power of two over 2^up
    a[r] = fused(raw(q, step, r), HALF ? 0x78007800 - up * 0x04000400 : 0x7f007f00 - up * 0x00800080, offset[r & 1]);
#endif
  }
}

// What is added to the codes of row g and of row g + 8, from the bytes of their zero points; of 8 bits, what is taken off.
DEVICE void offsets(u32 zeros, u32* offset) {
#pragma unroll
  for (int low = 0; low < 2; low++) {
#if BITS == 8
    offset[low] = ZERO ? zeros >> 8 * low & 255 : OFFSET;
#else
    const u32 zero = ZERO ? permute(zeros, 0, low ? 0x4141 : 0x4040) : OFFSET * 0x00010001u;  // a bare code, too
    offset[low] = times(zero, HALF ? 0xf800f800 : 0xff00ff00);
#endif
  }
}

#if E4M3
// Levels times scales as E4M3: what a product takes whose tensor cores add up groups too.
struct Scaled {
  u32 scale[2], offset[2];  // of row g and of row g + 8, twice in float16; taken off 1024 + code, and off 64 + code

  DEVICE Scaled(u32 scales, u32 zeros) {
    scale[0] = permute(scales, 0, 0x1010), scale[1] = permute(scales, 0, 0x3232);
    offset[0] = 0x64006400 + OFFSET * 0x00010001, offset[1] = 0xd400d400 + OFFSET * 0x00100010;
#if ZERO
    offset[0] = permute(zeros, 0x64646464, 0x4040), offset[1] = permute(zeros, 0, 0x4141) * 16 + 0xd400d400;
#endif
  }

  // A word: four E4M3 of row g, and of row g + 8, columns 2 c, 2 c + 8, 2 c + 1, 2 c + 9 of a tile.
  DEVICE void levels(u32 word, u32& above, u32& below) const {
    const u32 low = 0x000f000f, high = 0x00f000f0, magic = 0x64006400;
    above = e4m3(and_or(word, low, magic), and_or(word >> 8, low, magic), 0x3c003c00, offset[0] ^ 0x80008000, scale[0]);
    below = e4m3(and_or(word, high, magic), and_or(word >> 8, high, magic), 0x2c002c00, offset[1], scale[1]);
  }

 private:
  // (a * by + plus) * scale; every sum is a whole number and exact.
  DEVICE static u32 e4m3(u32 a, u32 b, u32 by, u32 plus, u32 scale) {
    u32 out;
    asm("{.reg .b32 a, b, t; .reg .b16 l, h;"
        "fma.rn.f16x2 a, %1, %3, %4; fma.rn.f16x2 b, %2, %3, %4;"
        "mul.rn.f16x2 a, a, %5; mul.rn.f16x2 b, b, %5;"
        "cvt.rn.satfinite.e4m3x2.f16x2 l, a; cvt.rn.satfinite.e4m3x2.f16x2 h, b;"
        "mov.b32 t, {l, h}; prmt.b32 %0, t, 0, 0x3120;}"
        : "=r"(out) : "r"(a), "r"(b), "r"(by), "r"(plus), "r"(scale));
    return out;
  }
};
#endif

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
