// Many tokens, on sm_90a (after fragments.cu). A warpgroup multiplies 64 rows by NT tokens. Two more warps bring
// everything through shared memory, by the tensor copy engine: STAGES times a unit of the block's weights as they lie in
// memory, and the same columns of the tokens, 64 at a time in the 128-byte swizzle. Weights of the next 64 columns are
// decoded, to registers, while the tensor cores work on these.
//
// A copy takes a warp some 80 cycles to begin, whatever its size, and more beside warps that keep the arithmetic units
// busy. So one instruction brings the words of all of the block's tiles for 128 columns, one their scales.
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
//
// Or (WARPWISE, for few tokens) warps multiply their 16 rows for themselves, by mma.sync: as much to decode, tokens by
// ldmatrix, and no waiting for other warps nor for the tensor cores.
//
// Macros. WG warpgroups, NT tokens, STAGES, SHARE (of tiles that are left over: 0 no, 1 an equal number of blocks to each
// tile, 2 equal runs), the LEAST_UNITS of a run, SPLIT thread blocks of a cluster, APART (sums of a group), RESIDENT blocks to
// leave registers for, REGISTERS of a thread that multiplies, or 0 to leave them as the compiler has them; WARPWISE; PART,
// see E4M3.

constexpr int MANY_ROWS = 64 * WG, STEPS_OF_64 = 4;
constexpr int WIDE = E4M3 ? 128 : 64, TURNS = UNIT / WIDE;  // columns of a token in 128 bytes; even with 64
constexpr int TOKENS_OF_64 = NT * 128, TOKENS_BYTES = TURNS * TOKENS_OF_64;  // of so many columns, and of a stage
// Weights of a stage: words of each tile, scales of each, zero points of each.
constexpr int WORD_BYTES = 4 * UNIT_WORDS, SCALE_BYTES = 32 * SCALES;
constexpr int ZERO_BYTES = ZERO && !(E4M3 && APART) ? 16 * SCALES : 0;
constexpr int SCALES_AT = 4 * WG * WORD_BYTES, ZEROS_AT = SCALES_AT + 4 * WG * SCALE_BYTES;
constexpr int COPIED_BYTES = ZEROS_AT + 4 * WG * ZERO_BYTES, WEIGHTS_BYTES = (COPIED_BYTES + 127) & ~127;
// Sums of a tile come in pieces of 16 rows x 16 tokens, 8 to a lane; a warp has PIECES of them.
constexpr int PIECES = NT / 16, TURNED = PIECES % 2 ? 1 : 2, TILE_SUMS = MANY_ROWS * NT;  // TURNED: at a time
constexpr int TOKEN_GROUP = 4;  // blocks of tokens that go through all rows together
constexpr int MANY_THREADS = 128 * WG + 128;
constexpr int CHUNKS = UNIT / 128, WIDE_BYTES = 1024 * BITS * WG;  // of a block's words for 128 columns, the tiles' side by side

// E4M3 tokens. The 4 bits of a code with zeros before them are an E4M3 number, code * 2^-9 for all of 0 .. 15 (its subnormals
// and the first binade beyond): two masks and a shift of a word make half of the left operand of m64nNk32, rows g and g + 8.
// Their bytes then are columns 2 c, 2 c + 8, 2 c + 1, 2 c + 9 of a tile, an order in which the tokens are written. What a
// code is more than its level, OFFSET or a zero point, is the same for a group: sum(scale (code - zero) x) =
// sum(scale (code x)) - sum(scale zero sum(x)), where the last sum, over the columns of a part, comes with the tokens
// in float16. So it is taken off when a run is done, by a product whose columns are the parts.
//
// The tensor cores add E4M3 products with some 14 bits. Sums of a part, PART columns of a group (at most 128), are kept
// apart and added in float32. With many tokens that adding takes as long as multiplying. Not APART, a level times its
// scale is rounded to E4M3, and everything is left to the tensor cores.
#if E4M3
constexpr int PARTS = UNIT / PART, PART_STEPS = PART / 32;
constexpr int CODE = APART ? 512 : 1;  // codes count as code * 2^-9
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

DEVICE void prefetch_map(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
DEVICE void read_tile(u32 to, const TensorMap* map, int column, int token, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(column), "r"(token), "r"(barrier) : "memory");
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

#if E4M3 && APART
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
         const __grid_constant__ TensorMap words_map, const __grid_constant__ TensorMap scales_map,
         const __grid_constant__ TensorMap third_map,  // zero points, or sums of the tokens
#if E4M3
         const float* token_scale,
#endif
         u16* y, float* left, u32* counts, int m, int n) {
  __shared__ __align__(8) u64 barriers[2 * STAGES];
  const u32 full = shared_address(barriers), empty = full + 8 * STAGES;
  // tokens must lie on 1024 bytes whatever the driver gives
  const u32 begin = shared_address(memory) + TABLE_BYTES, tokens = (begin + 1023) & ~1023u;
  const u32 weights = tokens + STAGES * TOKENS_BYTES, turned = weights + STAGES * WEIGHTS_BYTES;
  const int lane = lane_id(), warp = threadIdx.x / 32;

  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      barrier_init(full + 8 * i, 2);
      barrier_init(empty + 8 * i, WARPWISE ? 4 * WG : WG);
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
    const int copier = warp - 4 * WG;  // 0 of weights, 1 of tokens; registers are handed over by four
    if (copier > 1) return;
    prefetch_map(copier ? &map : &words_map);
    if (copier) wait_for_inputs();
    int slot = 0, phase = 1;
    while (work.next()) {
      place(work.tile, m, n, &first_row, &first_token);
#if E4M3 && APART
      const int sums = work.first * PARTS / SUMS_WIDE * SUMS_WIDE;
      const int more = (work.last * PARTS - sums + SUMS_WIDE - 1) / SUMS_WIDE;  // stages of sums, after those of units
#else
      const int more = 0;
#endif
      for (int unit = work.first; unit < work.last + more; unit++) {
        barrier_wait(empty + 8 * slot, phase);
        const u32 arrived = full + 8 * slot, to = weights + slot * WEIGHTS_BYTES;
#if E4M3 && APART
        if (unit >= work.last) {
          if (lane == 0) barrier_expect(arrived, copier ? TOKENS_OF_64 : 0);
          if (lane == 0 && copier)
            read_tile(tokens + slot * TOKENS_BYTES, &third_map, sums + (unit - work.last) * SUMS_WIDE, first_token, arrived);
        } else
#endif
        if (copier == 0) {
          if (lane == 0) barrier_expect(arrived, COPIED_BYTES);
          __syncwarp();
          if (lane < CHUNKS)  // a map's elements of words are 8 bytes
            read_tile(to + lane * WIDE_BYTES, &words_map, (unit * CHUNKS + lane) * 32 * BITS, first_row / 16, arrived);
          if (GROUP && lane == 31) read_tile(to + SCALES_AT, &scales_map, unit * SCALES * 8, first_row / 16, arrived);
          if (ZERO_BYTES && lane == 30) read_tile(to + ZEROS_AT, &third_map, unit * SCALES * 4, first_row / 16, arrived);
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
  const u32 words = weights + warp * 256 * BITS;
  const u32 scales = weights + SCALES_AT + warp * SCALE_BYTES + 4 * (lane >> 2);
  const u32 zeros = weights + ZEROS_AT + warp * ZERO_BYTES + 2 * (lane >> 2);
  auto read_block = [&](u32* q, u32 stage, int block) {  // of COLUMNS
    read_words(q, words + stage + block * COLUMNS / 128 * WIDE_BYTES + block * COLUMNS % 128 * 2 * BITS);
  };
  // Of a lane, for ldmatrix: a row of a matrix, 8 columns of one of 16 tokens, in the 128-byte swizzle.
  [[maybe_unused]] const u32 mine_of_tokens =
      tokens + 128 * (lane >> 4 << 3 | lane & 7) + 16 * ((lane >> 3 & 1) ^ lane & 7);
  int slot = 0, phase = 0, before = 0;
  while (work.next()) {
    place(work.tile, m, n, &first_row, &first_token);
    const int row = first_row + 16 * warp + (lane >> 2);
    const float level = E4M3 ? 1 : LEVEL, top = row < n ? level * alpha[row] : 0;
    const float bottom = row + 8 < n ? level * alpha[row + 8] : 0;
    float acc[NT / 2], apart[APART ? NT / 2 : 1];
#pragma unroll
    for (int i = 0; i < NT / 2; i++) acc[i] = 0;
    float above = 0, below = 0, next_above = 0, next_below = 0;  // scales of the last group and of this one
    auto add_group = [&]() {
#pragma unroll
      for (int i = 0; i < NT / 2; i++) acc[i] += (i & 2 ? below : above) * apart[APART ? i : 0];
    };
#if !E4M3
    u32 offset[2], low = ONES, high = ONES;  // of this group: what is added to codes, and scales, twice in 16 bits
    offsets(0, offset);
    [[maybe_unused]] auto read_group = [&](u32 stage, int group, float& of_top, float& of_bottom) {
      const u32 scale = read1(scales + stage + group * 32);
      of_top = low_half(scale), of_bottom = high_half(scale);
      if (!APART) low = pair(of_top, of_top), high = pair(of_bottom, of_bottom);
#if ZERO
      offsets(read_half(zeros + stage + group * 16), offset);
#endif
    };
#endif
#if E4M3 && APART
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
            read_block(q[block % 2], here, block);
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
#elif E4M3
    u32 a[2][2][4], q[2][WORDS];
    Scaled scaled(ONE, 0);
    for (int unit = work.first; unit < work.last; unit++) {
      barrier_wait(full + 8 * slot, phase);
      const u32 here = slot * WEIGHTS_BYTES;
      const u32 at = __shfl_sync(0xffffffff, descriptor + slot * (TOKENS_BYTES / 16), 0);  // the same in all lanes
      read_block(q[0], here, 0);
#pragma unroll
      for (int turn = 0; turn < UNIT / 64; turn++) {
        u32(*now)[4] = a[turn & 1];  // the other may still be read
        const u32* const two = q[turn & 1];
        if (turn + 1 < UNIT / 64) read_block(q[turn + 1 & 1], here, turn + 1);
#pragma unroll
        for (int step = 0; step < 2; step++) {
          const int column = turn * 64 + step * 32;
#if GROUP
          if (column % GROUP == 0) {
            u32 zero = 0;
            if (ZERO) zero = read_half(zeros + here + column / GROUP * 16);
            scaled = Scaled(read1(scales + here + column / GROUP * 32), zero);
          }
#endif
          scaled.levels(two[2 * step], now[step][0], now[step][1]);
          scaled.levels(two[2 * step + 1], now[step][2], now[step][3]);
        }
#pragma unroll
        for (int i = 0; i < 8; i++) asm volatile("" : "+r"(now[i / 4][i % 4]));
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 2; step++) wgmma(acc, now[step], at + turn / 2 * (TOKENS_OF_64 / 16) + turn % 2 * 4 + 2 * step, 1);
        wgmma_commit();
        wgmma_wait<1>();
        if (turn == 0 && unit > work.first && threadIdx.x % 128 == 0) barrier_arrive(empty + 8 * before);
      }
      before = slot;
      if (++slot == STAGES) slot = 0, phase ^= 1;
    }
    wgmma_wait<0>();
    if (threadIdx.x % 128 == 0) barrier_arrive(empty + 8 * before);
#elif WARPWISE
    u32 q[WORDS];
    float* const sums = APART ? apart : acc;
#pragma unroll
    for (int i = 0; i < NT / 2; i++) sums[i] = 0;
    for (int unit = work.first; unit < work.last; unit++) {
      barrier_wait(full + 8 * slot, phase);
      const u32 here = slot * WEIGHTS_BYTES;
#pragma unroll
      for (int column = 0; column < UNIT; column += 16) {
        if (column % COLUMNS == 0) read_block(q, here, column / COLUMNS);
#if GROUP
        if (column % GROUP == 0) read_group(here, column / GROUP, above, below);
#endif
        u32 a[4];
        levels(q, column % COLUMNS / 16, offset, a);
        if (GROUP && !APART) scaled(a, low, high);
#pragma unroll
        for (int piece = 0; piece < PIECES; piece++) {
          u32 b[4];
          read_matrices((mine_of_tokens ^ column % 64 * 2) + slot * TOKENS_BYTES + column / 64 * TOKENS_OF_64 + 2048 * piece, b);
          mma(sums + 8 * piece, a, b[0], b[1]), mma(sums + 8 * piece + 4, a, b[2], b[3]);
        }
        if (APART && (column + 16) % (GROUP ? GROUP : 16) == 0) {
          add_group();
#pragma unroll
          for (int i = 0; i < NT / 2; i++) sums[i] = 0;
        }
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(empty + 8 * slot);
      if (++slot == STAGES) slot = 0, phase ^= 1;
    }
#else
    u32 a[2][STEPS_OF_64][4], q[WORDS];
    for (int unit = work.first; unit < work.last; unit++) {
      barrier_wait(full + 8 * slot, phase);
      const u32 here = slot * WEIGHTS_BYTES;
      const u32 at = __shfl_sync(0xffffffff, descriptor + slot * (TOKENS_BYTES / 16), 0);  // the same in all lanes
      read_block(q, here, 0);
#pragma unroll
      for (int turn = 0; turn < TURNS; turn++) {
        u32(*now)[4] = a[turn & 1];  // the other may still be read
#pragma unroll
        for (int step = 0; step < STEPS_OF_64; step++) {
          const int column = turn * 64 + step * 16;
#if GROUP
          if (column % GROUP == 0) read_group(here, column / GROUP, next_above, next_below);
#endif
          levels(q, column % COLUMNS / 16, offset, now[step]);
          if (GROUP && !APART) scaled(now[step], low, high);
        }
        if ((turn + 1) * 64 % COLUMNS == 0 && turn + 1 < TURNS) read_block(q, here, (turn + 1) * 64 / COLUMNS);
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
      for (int i = 0; i < 8; i += 2) {
        const float2 t = i < 4 ? first : second;
        acc[8 * j + i] *= CODE * t.x, acc[8 * j + i + 1] *= CODE * t.y;
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
