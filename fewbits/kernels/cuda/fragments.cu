// Products with weights of 2, 3, 4 or 8 bits in the order of the tensor cores' registers.
//
// Compiled at run time (nvrtc.py) with the macros below; no header is needed. The host side, which makes the layout and
// says what it is for, is fragments.py. Three kernels share one layout of the weight:
//
//   few    up to some 32 tokens: mma.sync, weights straight from memory to registers, K split over warps and a cluster
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
// cluster along columns, RING units of weights in flight, RESIDENT blocks to leave registers for; for `many`: WG warpgroups, NT tokens, STAGES, and REGISTERS
// of a thread that multiplies, or 0 to leave them as the compiler has them.

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
DEVICE u32 shared_address(const void* pointer) {
  u64 out; asm("cvta.to.shared.u64 %0, %1;" : "=l"(out) : "l"(pointer)); return (u32)out;
}
DEVICE void copy16(u32 to, const void* from, bool real) {  // zeros where not real
  int bytes = real ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
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
DEVICE float read_shared_of(u32 address, u32 rank) {
  u32 there;
  float value;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(there) : "memory");
  return value;
}

// ---------------------------------------------------------------- weights

struct Weight {
  const u32* words;  // [tiles of 16 rows][blocks][...]
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
  for (int i = threadIdx.x; i < TABLE_BYTES / 4; i += blockDim.x) ((u32*)memory)[i] = pairs[i >> 5];
}

// One result: its sum times what its row's scales were divided by.
DEVICE void put(u16* y, float sum, const float* alpha, int row, int token, int m, int n) {
  if (token < m && row < n) {
    sum *= alpha[row];
    y[(u64)token * n + row] = (u16)pair(sum, sum);
  }
}

// Sums of one block at `sums` + token * pitch + row, ROWS x TOKENS of them, added over the blocks of a cluster (each has
// its own part of the columns) -> y. All threads of the cluster that have not ended come here; `sums` is free again after the next time.
template <int ROWS, int TOKENS, int THREADS>
DEVICE void add_cluster(float* sums, const float* alpha, u16* y, int first_row, int first_token, int m, int n, u32 rank) {
  constexpr int PITCH = ROWS + 4, SHARE = ROWS * TOKENS / SPLIT;
  cluster_arrive();
  cluster_wait();
  for (int i = threadIdx.x; i < SHARE; i += THREADS) {
    const int index = rank * SHARE + i, token = index / ROWS, row = index % ROWS;
    const u32 mine = shared_address(sums + token * PITCH + row);
    float sum = 0;
#pragma unroll
    for (int part = 0; part < SPLIT; part++) sum += read_shared_of(mine, part);
    put(y, sum, alpha, first_row + row, first_token + token, m, n);
  }
}

// ---------------------------------------------------------------- few tokens

#ifdef FEW

constexpr int FEW_ROWS = 16 * RT, FEW_TOKENS = 8 * MT, FEW_THREADS = 32 * WARPS;

struct Sums {
  float of[RT][MT][4];
};

// sums += unit of weights x tokens.
DEVICE void few_unit(const Unit& unit, u32 tokens, u32 token_stride, Sums& total) {
#if GROUP
  Sums group = {};
#else
  Sums& group = total;
#endif
  u32 offset[RT][2];
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
#if !ZERO
          offsets(0, offset[rt]);
#else
          if (column % GROUP == 0) offsets(unit.zero[rt][column / GROUP], offset[rt]);
#endif
          u32 a[4];
          levels(unit.words[rt][b], step + half, offset[rt], a);
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
  Unit ring[RING];
  auto fetch_next = [&](Unit& to) {
    if (ahead++ >= last) return;
    fetch(weights, w.units, to);
    if ((RT > 1 || SPLIT > 1) && ++ahead_unit == units) {
      ahead_unit = 0;
      weights.words += (long long)skip * UNIT_WORDS, weights.scale += skip * SCALES * 8, weights.zero += skip * SCALES * 8;
    }
  };
#pragma unroll
  for (int d = 0; d < RING; d++) fetch_next(ring[d]);
  spread_table(pairs);

  let_next_start();
  wait_for_inputs();
  constexpr int PITCH = FEW_ROWS + 4, PART = FEW_TOKENS * PITCH;  // of a part: [tokens][rows], 4 more against bank conflicts
  float* parts = (float*)(memory + TABLE_BYTES);
  const int most = (all + places - 1) / places + WARPS;  // parts at most, of any block
  const u32 base = shared_address(parts + most * PART);
  const int width = units * UNIT, pitch = 2 * width + 16;  // columns of x; bytes: rows begin 4 banks apart
  for (int row = 0; row < m; row++)
    for (int i = threadIdx.x; i < width / 8; i += FEW_THREADS) {
      const int column = start * UNIT + 8 * i;
      copy16(base + row * pitch + 16 * i, x + (u64)row * k + (column < k ? column : 0), column < k);
    }
  copies_commit();
  copies_wait<0>();
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
      few_unit(ring[d], tokens + 2 * unit * UNIT, 8 * pitch, total);
      fetch_next(ring[d]);
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
  __syncthreads();

  // Unit u of the line is warp (u WARPS + WARPS - 1) / line's: the last whose piece begins at or before it.
  for (int i = threadIdx.x; i < strips * FEW_ROWS * m; i += FEW_THREADS) {
    const int row = i % FEW_ROWS, token = i / FEW_ROWS % m, s = i / FEW_ROWS / m;
    const int from = (s * units * WARPS + WARPS - 1) / line, to = (((s + 1) * units - 1) * WARPS + WARPS - 1) / line;
    float sum = 0;
    for (int by = from; by <= to; by++)
      if (line >= WARPS || line * by / WARPS < line * (by + 1) / WARPS)  // on a short line some have nothing
        sum += parts[(s + by) * PART + token * PITCH + row];
    if (SPLIT > 1)
      parts[(s + from) * PART + token * PITCH + row] = sum;  // where no other strip has a part
    else
      put(y, sum, alpha, (strip + s) * FEW_ROWS + row, token, m, n);
  }
#if SPLIT > 1
  cluster_arrive();
  cluster_wait();
  // Columns differ from block to block of the cluster, and so may where a strip's first part lies.
  for (int i = rank * FEW_THREADS + threadIdx.x; i < strips * FEW_ROWS * m; i += SPLIT * FEW_THREADS) {
    const int row = i % FEW_ROWS, token = i / FEW_ROWS % m, s = i / FEW_ROWS / m;
    float sum = 0;
#pragma unroll
    for (int other = 0; other < SPLIT; other++) {
      const int count = w.units * (other + 1) / SPLIT - w.units * other / SPLIT, there = strips * count;
      const int from = (s * count * WARPS + WARPS - 1) / there;
      sum += read_shared_of(shared_address(parts + (s + from) * PART + token * PITCH + row), other);
    }
    put(y, sum, alpha, (strip + s) * FEW_ROWS + row, token, m, n);
  }
  cluster_arrive();  // a block must not end while another reads its memory
  cluster_wait();
#endif
}

#endif  // FEW

// ---------------------------------------------------------------- many tokens

#ifdef MANY

// sm_90a. A warpgroup multiplies 64 rows by NT tokens; tokens lie in shared memory as NT rows of 128 bytes (64 columns),
// STAGES times, in the 128-byte swizzle, brought by one more warp through the tensor memory accelerator. Weights of the
// next 64 columns are decoded while the tensor cores work on these.
// Sums of a group are kept apart and added to the others times its scale, as in `few`. That takes two sets of sums: with
// more than 64 tokens, four warpgroups, and groups that are no whole stages, a weight is multiplied by its scale in 16 bits before the
// product instead.

constexpr int MANY_ROWS = 64 * WG, STAGE = NT * 128, STAGE_STEPS = 4;
constexpr int UNIT_STAGES = UNIT / 64;  // even
constexpr bool APART = GROUP && GROUP % 64 == 0 && NT <= 64 && !REGISTERS;
// Where sums take many registers, the warp that only waits gives its own away; registers change hands by warpgroups.
#if REGISTERS
constexpr int MANY_THREADS = 128 * WG + 128;
#else
constexpr int MANY_THREADS = 128 * WG + 32;
#endif

struct alignas(64) TensorMap {
  u8 bytes[128];
};

DEVICE u64 descriptor(u32 address) {  // K-major, 128-byte swizzle, 1024 bytes from 8 rows to the next
  return (u64)((address & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)64 << 32 | (u64)1 << 62;
}
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
DEVICE void read_tile(u32 to, const TensorMap* map, int column, int token, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(column), "r"(token), "r"(barrier) : "memory");
}

DEVICE void scaled(u32* a, u32 low, u32 high) {
  a[0] = times(a[0], low), a[1] = times(a[1], high), a[2] = times(a[2], low), a[3] = times(a[3], high);
}

extern "C" __global__ void __launch_bounds__(MANY_THREADS, 1)
#if SPLIT > 1
    __cluster_dims__(SPLIT, 1, 1)
#endif
        many(Weight w, const float* alpha, const u32* pairs, const __grid_constant__ TensorMap map, u16* y, int m, int n,
             int k) {
  __shared__ __align__(8) u64 barriers[2 * STAGES];
  const u32 full = shared_address(barriers), empty = full + 8 * STAGES;
  // stages must lie on 1024 bytes whatever the driver gives
  const u32 begin = shared_address(memory) + TABLE_BYTES;
  u8* tokens = memory + TABLE_BYTES + ((1024 - (begin & 1023)) & 1023);
  const u32 base = shared_address(tokens);

  const int lane = lane_id(), warp = threadIdx.x / 32;
  const int rank = blockIdx.x % SPLIT, block = blockIdx.x / SPLIT, first_token = blockIdx.y * NT;
  const int tile = block * (4 * WG) + warp;
  const int first = w.units * rank / SPLIT, last = w.units * (rank + 1) / SPLIT;
  const int stages = (last - first) * UNIT_STAGES;
  const bool producer = warp >= 4 * WG;

  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) barrier_init(full + 8 * i, 1), barrier_init(empty + 8 * i, WG);
    asm volatile("fence.proxy.async;" ::: "memory");
  }
  spread_table(pairs);
  __syncthreads();
  let_next_start();

  constexpr int PITCH = MANY_ROWS + 4;
  float* sums = (float*)tokens;
  if (producer) {
#if REGISTERS
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
#endif
    wait_for_inputs();
    if (threadIdx.x == 128 * WG)
      for (int stage = 0; stage < stages; stage++) {
        const int slot = stage % STAGES;
        if (stage >= STAGES) barrier_wait(empty + 8 * slot, (stage / STAGES - 1) & 1);
        barrier_expect(full + 8 * slot, STAGE);
        read_tile(base + slot * STAGE, &map, (first * UNIT_STAGES + stage) * 64, first_token, full + 8 * slot);
      }
  } else {
#if REGISTERS
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
#endif
    Unit ring[RING];
    Stream weights = stream(w, tile < w.tiles ? tile : w.tiles - 1, first);  // rows past the last go nowhere
#pragma unroll
    for (int d = 0; d < RING; d++)
      if (first + d < last) fetch(weights, 0, ring[d]);
    wait_for_inputs();  // for y, which the kernel before may still read
    float acc[NT / 2], apart[APART ? NT / 2 : 1];
#pragma unroll
    for (int i = 0; i < NT / 2; i++) acc[i] = 0;
    float above = 0, below = 0, next_above = 0, next_below = 0;  // scales of the last group and of this one
    auto add_group = [&]() {
#pragma unroll
      for (int i = 0; i < NT / 2; i++) acc[i] += (i & 2 ? below : above) * apart[APART ? i : 0];
    };
    u32 a[2][STAGE_STEPS][4];
    u32 offset[2], low = ONES, high = ONES;
    offsets(0, offset);
    int stage = 0, slot = 0, phase = 0;
    for (int unit = first; unit < last; unit += RING) {
#pragma unroll
      for (int d = 0; d < RING; d++) {
        if (unit + d >= last) break;
#pragma unroll
        for (int us = 0; us < UNIT_STAGES; us++) {
          u32(*now)[4] = a[us & 1];  // the other may still be read
#pragma unroll
          for (int step = 0; step < STAGE_STEPS; step++) {
            const int column = us * 64 + step * 16;
#if GROUP
            if (column % GROUP == 0) {
              const u32 scale = ring[d].scale[0][column / GROUP];
              next_above = low_half(scale), next_below = high_half(scale);
              if (!APART) low = pair(next_above, next_above), high = pair(next_below, next_below);
#if ZERO
              offsets(ring[d].zero[0][column / GROUP], offset);
#endif
            }
#endif
            levels(ring[d].words[0][column / COLUMNS], column % COLUMNS / 16, offset, now[step]);
            if (GROUP && !APART) scaled(now[step], low, high);
          }
          if (us == UNIT_STAGES - 1 && unit + d + RING < last) fetch(weights, 0, ring[d]);
          barrier_wait(full + 8 * slot, phase);
          const u32 here = base + slot * STAGE;
          const bool begins = (us * 64) % (GROUP ? GROUP : 64) == 0;
          if (APART && begins) {
            wgmma_wait<0>();
            if (stage > 0) add_group();
            above = next_above, below = next_below;
          }
          wgmma_fence();
#pragma unroll
          for (int step = 0; step < STAGE_STEPS; step++)
            wgmma(APART ? apart : acc, now[step], descriptor(here + 32 * step), !(APART && begins && step == 0));
          wgmma_commit();
          wgmma_wait<1>();
          if (stage > 0 && threadIdx.x % 128 == 0) barrier_arrive(empty + 8 * (slot == 0 ? STAGES - 1 : slot - 1));
          stage++;
          if (++slot == STAGES) slot = 0, phase ^= 1;
        }
      }
    }
    wgmma_wait<0>();
    if (APART) add_group();
    asm volatile("bar.sync 1, %0;" ::"n"(128 * WG) : "memory");  // all have read their tokens, where sums come now
    const int g = lane >> 2, c = lane & 3;
#pragma unroll
    for (int j = 0; j < NT / 8; j++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        sums[(8 * j + 2 * c + (i & 1)) * PITCH + warp * 16 + g + 8 * (i >> 1)] = acc[4 * j + i];
#if SPLIT > 1
    add_cluster<MANY_ROWS, NT, 128 * WG>(sums, alpha, y, block * MANY_ROWS, first_token, m, n, rank);
    cluster_arrive();  // a block must not end while another reads its memory
    cluster_wait();
#else
    asm volatile("bar.sync 1, %0;" ::"n"(128 * WG) : "memory");
    for (int i = threadIdx.x; i < MANY_ROWS * NT; i += 128 * WG)
      put(y, sums[i / MANY_ROWS * PITCH + i % MANY_ROWS], alpha, block * MANY_ROWS + i % MANY_ROWS,
          first_token + i / MANY_ROWS, m, n);
#endif
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
#if HALF
          const float first = low_half(a[r]), second = high_half(a[r]);
#else
          const float first = __uint_as_float(a[r] << 16), second = __uint_as_float(a[r] & 0xffff0000u);
#endif
          staged[warp][g + 8 * (r & 1)][step * 8 + 4 * (r >> 1) + c] = pair(first * factor, second * factor);
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
