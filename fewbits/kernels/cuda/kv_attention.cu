// Decode attention over keys and values of 4 or 8 bits in tiles (kv_tiles.py), for Hopper and later.
//
// Compiled at run time (nvrtc.py) with the macros below; no header is needed. How queries and weights become integers
// is told in triton_attention.py, how the work is shared out and why in cuda_attention.py.
//
// A block owns a multiprocessor. Two of its warps bring tiles into a ring in shared memory, one keys, the other values;
// the rest multiply. Four of those take a tile, SLICE tokens each, from scores to weighted values, and meet other
// warps only when a head is done. Codes are the left operand of mma.m16n8k32, queries and weights the 8 columns of the
// right one: high and low part of 4 query heads. A thread (g = lane / 4, c = lane % 4) holds
//   of the left operand rows g and g + 8, each 4 bytes from 4 c and 4 bytes from 16 + 4 c of the 32 that are summed;
//   of the right one column g, the same 8 bytes;  of the product rows g and g + 8, columns 2 c and 2 c + 1.
// So a thread has both parts of a score of head c. The order of what is summed is free, as long as both operands agree:
// it is such that a thread reads whole runs of bytes, and that its 4 tokens are neighbours, 4 g + {0..3} of the slice.
//
// Macros. BITS; D channels; GROUPS of them with scales of their own; HEADS that a block takes, 4 or 8, of RATIO that
// read one key-value head; QUERY (0 float32, 1 float16, 2 bfloat16); TEAMS of four warps; STAGES of the ring.

constexpr int TILE = 128, SLICE = 32;
constexpr int HALVES = 8 / BITS, ROW = D / HALVES;             // bytes of a token
constexpr int OWN = GROUPS > HALVES ? GROUPS / HALVES : 1;     // groups of half a token (of 4 bits), or of a whole one
constexpr int SPAN = ROW / OWN;                                // bytes of a token, or rows of values, of one group
constexpr int SUMS = OWN * HALVES;                             // parts of a score that are summed apart
constexpr int RUN = SPAN >= 64 ? 16 : 8;                       // bytes of a token that a thread reads at once
constexpr int COLUMNS = HEADS / 4;                             // of 8: high and low parts of 4 heads
constexpr int PARTS = (RATIO + HEADS - 1) / HEADS;
constexpr int MULTIPLIERS = 4 * TEAMS, THREADS = 32 * (MULTIPLIERS + 2);
constexpr int CODES = TILE * ROW, PARAMS = 4 * GROUPS * TILE, SIDE = CODES + PARAMS, STAGE = 2 * SIDE;
constexpr int PADDED = D + 8;                                  // floats of a head's sums in shared memory
constexpr float TOP = 32639.f;                                 // 127 * 256 + 127
constexpr float MAGIC = 12582912.f;                            // 1.5 * 2^23: what is added to it becomes whole
constexpr float NOTHING = -1e30f;

#if QUERY == 0
typedef float Query;
#else
typedef u16 Query;
#endif

struct Cache {
  const u8* keys;
  const u32* key_params;
  const u8* values;
  const u32* value_params;
  const int* lengths;
  int batches, heads, tiles;  // tiles: of a head, used or not
};

struct Shared {
  u8 ring[STAGES][STAGE];
  alignas(16) float sums[MULTIPLIERS][HEADS * PADDED];
  float highest[HEADS][MULTIPLIERS], weight[HEADS][MULTIPLIERS];  // the largest score, sums of weights relative to it
  u8 queries[2 * HEADS][D + 16];                                  // columns: the high and the low part of each head
  float unit[HEADS], whole[HEADS][GROUPS];                        // see Queries
  u64 keys_full[STAGES], values_full[STAGES], empty[STAGES];
  u32 last;
};

extern __shared__ __align__(1024) u8 memory[];

// ---------------------------------------------------------------- instructions

DEVICE void meet() {  // the warps that multiply
  asm volatile("barrier.sync 1, %0;" ::"n"(32 * MULTIPLIERS) : "memory");
}
DEVICE void mma(int* acc, const u32* a, const u32* b) {
#if BITS == 8
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
#else
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
#endif
               : "+r"(acc[0]), "+r"(acc[1]), "+r"(acc[2]), "+r"(acc[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }
DEVICE float power_of_2(float x) { float out; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x)); return out; }
DEVICE float other(float x, int lanes) { return __shfl_xor_sync(~0u, x, lanes); }
DEVICE int largest_of(int a, int b) { return a > b ? a : b; }
DEVICE int least_of(int a, int b) { return a < b ? a : b; }
DEVICE float as_float(Query x) {
#if QUERY == 0
  return x;
#elif QUERY == 1
  return low_half(x);
#else
  return __uint_as_float((u32)x << 16);
#endif
}
DEVICE Query as_query(float x) {
#if QUERY == 0
  return x;
#else
  u16 out;
#if QUERY == 1
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out) : "f"(x));
#else
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out) : "f"(x));
#endif
  return out;
#endif
}

// ---------------------------------------------------------------- who does what

// Tiles of all heads of all batches stand in one line, of which every block takes an equal run.
struct Place {
  int batch, unit, tile;  // unit: a key-value head, and HEADS of the query heads that read it
  int tiles;              // of the unit
};

// A length of 0 is not allowed; counted as a tile without tokens it leaves nan, and not what was in memory before.
DEVICE int tiles_of(const Cache& cache, int batch) {
  const int length = cache.lengths[batch];
  return largest_of(1, least_of((length - 1) / TILE + 1, cache.tiles));
}

struct Line {
  u32 blocks;         // that share the tiles
  u32 share, longer;  // tiles of a block; the first `longer` blocks have one more
  DEVICE u32 start(u32 block) const { return block * share + (block < longer ? block : longer); }
  DEVICE u32 block_of(u32 tile) const {
    const u32 behind = longer * (share + 1);
    return tile < behind ? tile / (share + 1) : longer + (tile - behind) / share;
  }
};

DEVICE Line line_of(const Cache& cache) {
  int tiles = 0;
  for (int batch = lane_id(); batch < cache.batches; batch += 32) tiles += tiles_of(cache, batch);
  const u32 all = (u32)__reduce_add_sync(~0u, tiles) * (u32)(cache.heads * PARTS);
  const u32 blocks = all < gridDim.x ? all : gridDim.x;
  return {blocks, all / blocks, all % blocks};
}

DEVICE Place place_of(const Cache& cache, u32 tile) {
  for (int batch = 0;; batch++) {
    const u32 tiles = tiles_of(cache, batch), here = tiles * (u32)(cache.heads * PARTS);
    if (tile < here) return {batch, (int)(tile / tiles), (int)(tile % tiles), (int)tiles};
    tile -= here;
  }
}

DEVICE void next_unit(const Cache& cache, Place& at) {
  at.tile = 0;
  if (++at.unit < cache.heads * PARTS) return;
  at.unit = 0;
  if (++at.batch < cache.batches) at.tiles = tiles_of(cache, at.batch);
}

// ---------------------------------------------------------------- bringing

DEVICE void bring_tiles(const Cache& cache, Shared& shared, int side, Place at, u32 count) {
  if (lane_id() != 0) return;
  const u8* codes = side ? cache.values : cache.keys;
  const u8* params = (const u8*)(side ? cache.value_params : cache.key_params);
#pragma unroll 1
  for (u32 n = 0; n < count; n++) {
    const u64 place = (u64)(at.batch * cache.heads + at.unit / PARTS) * cache.tiles + at.tile;
    const u32 slot = n % STAGES;
    u8* to = shared.ring[slot] + side * SIDE;
    u64* full = (side ? shared.values_full : shared.keys_full) + slot;
    if (n >= STAGES) barrier_wait(shared_address(shared.empty + slot), (n / STAGES - 1) & 1);
    barrier_expect(shared_address(full), SIDE);
    read_bytes(shared_address(to), codes + place * CODES, CODES, shared_address(full));
    read_bytes(shared_address(to + CODES), params + place * PARAMS, PARAMS, shared_address(full));
    if (++at.tile == at.tiles) next_unit(cache, at);
  }
}

// ---------------------------------------------------------------- queries

// Byte of a token that word w of a thread begins at; words 2 j and 2 j + 1 are of step j of a product.
DEVICE constexpr int run_at(int w) { return w / (RUN / 4) * 4 * RUN + w % (RUN / 4) * 4; }

struct Queries {
  u32 words[COLUMNS][HALVES][ROW / 16];  // column g: high or low part of head 4 column + g / 2
  float unit[COLUMNS];                   // of head 4 column + c: what a score of integers is worth
  float whole[COLUMNS][GROUPS];          // of that head, the sum of the integers of a group
};

// A warp rounds a head to fixed point, into shared memory: done by all warps alike, it takes longer than a tile.
DEVICE void round_query(Shared& shared, int head, const Query* q, bool real, float scale) {
  constexpr int EACH = D / 32;  // channels of a lane
  const int lane = lane_id();
  float x[EACH], reach = 1e-20f;
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    x[i] = real ? as_float(q[head * D + EACH * lane + i]) : 0.f;
    reach = fmaxf(reach, fabsf(x[i]));
  }
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) reach = fmaxf(reach, other(reach, lanes));
  const float to_whole = __fdividef(TOP, reach);
  int whole = 0;
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int value = (int)__float_as_uint(x[i] * to_whole + MAGIC) - 0x4b400000;
    shared.queries[2 * head][EACH * lane + i] = (u8)((value + 128) >> 8);
    shared.queries[2 * head + 1][EACH * lane + i] = (u8)value;
    whole += value;
  }
#pragma unroll
  for (int lanes = 1; lanes < 32 / GROUPS; lanes *= 2) whole += __shfl_xor_sync(~0u, whole, lanes);
  if (lane % (32 / GROUPS) == 0) shared.whole[head][lane / (32 / GROUPS)] = (float)whole;
  if (lane == 0) shared.unit[head] = reach * scale * (1.f / TOP);
}

DEVICE void load_queries(Queries& to, const Shared& shared) {
  const int g = lane_id() >> 2, c = threadIdx.x & 3;
#pragma unroll
  for (int t = 0; t < COLUMNS; t++) {
#pragma unroll
    for (int h = 0; h < HALVES; h++)
#pragma unroll
      for (int w = 0; w < ROW / 16; w++)
        to.words[t][h][w] = *(const u32*)(shared.queries[8 * t + g] + h * ROW + run_at(w) + RUN * c);
    to.unit[t] = shared.unit[4 * t + c];
#pragma unroll
    for (int j = 0; j < GROUPS; j++) to.whole[t][j] = shared.whole[4 * t + c][j];
  }
}

// ---------------------------------------------------------------- a slice of a tile

struct State {
  float highest[COLUMNS], weight[COLUMNS];  // of head 4 column + c; weights and minima of this thread's tokens
  float minima[COLUMNS][GROUPS];
  float total[COLUMNS][HALVES][ROW / 16][2];  // of channels 16 i + g + {0, 8} of a half
};

DEVICE void params_of(u32 word, float& scale, float& minimum) {
  scale = low_half(word), minimum = high_half(word);
  if (BITS == 8) minimum -= 128.f * scale;  // 8-bit codes are kept less 128
}

// The codes of one half, of 4 bits times 16 in the second.
DEVICE u32 codes_of(u32 word, int half) { return BITS == 8 ? word : word & (half ? 0xf0f0f0f0u : 0x0f0f0f0fu); }

DEVICE int joined(int high, int low) { return (high << 8) + low; }

DEVICE void load_params(u32 (&to)[GROUPS][4], const u8* params, int slice, int g, int real) {
#pragma unroll
  for (int j = 0; j < GROUPS; j++) {
    const uint4 words = *(const uint4*)(params + 4 * (j * TILE + SLICE * slice + 4 * g));
    to[j][0] = words.x, to[j][1] = words.y, to[j][2] = words.z, to[j][3] = words.w;
    if (real < SLICE) {  // what lies behind the last token may be anything
#pragma unroll
      for (int i = 0; i < 4; i++) to[j][i] = 4 * g + i < real ? to[j][i] : 0;
    }
  }
}

// Scores of this thread's 4 tokens.
DEVICE void scores_of(float (&score)[COLUMNS][4], const Queries& q, const u8* keys, int slice, int real) {
  const int g = lane_id() >> 2, c = threadIdx.x & 3;
  u32 params[GROUPS][4];
  load_params(params, keys + CODES, slice, g, real);
#pragma unroll
  for (int pair = 0; pair < 2; pair++) {  // tokens 4 g + 2 pair + {0, 1}: rows g and g + 8
    u32 words[2][ROW / 16];
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int w = 0; w < ROW / 16; w += RUN / 4) {
        const u8* from = keys + (SLICE * slice + 4 * g + 2 * pair + i) * ROW + run_at(w) + RUN * c;
        if (RUN == 16) *(uint4*)(words[i] + w) = *(const uint4*)from;
        else *(uint2*)(words[i] + w) = *(const uint2*)from;
      }
    int sums[COLUMNS][SUMS][4] = {};
#pragma unroll
    for (int step = 0; step < ROW / 32; step++)
#pragma unroll
      for (int half = 0; half < HALVES; half++) {
        const u32 a[4] = {codes_of(words[0][2 * step], half), codes_of(words[1][2 * step], half),
                          codes_of(words[0][2 * step + 1], half), codes_of(words[1][2 * step + 1], half)};
#pragma unroll
        for (int t = 0; t < COLUMNS; t++) mma(sums[t][half * OWN + 32 * step / SPAN], a, q.words[t][half] + 2 * step);
      }
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int t = 0; t < COLUMNS; t++) {
        int found[SUMS];
#pragma unroll
        for (int j = 0; j < SUMS; j++) {
          const int* parts = sums[t][j] + 2 * i;
          found[j] = joined(parts[0], parts[1]) >> (j >= OWN ? 4 : 0);
        }
        if (GROUPS < SUMS) found[0] += found[1];
        float sum = 0;
#pragma unroll
        for (int j = 0; j < GROUPS; j++) {
          float scale, minimum;
          params_of(params[j][2 * pair + i], scale, minimum);
          sum += scale * (float)found[j] - minimum * q.whole[t][j];
        }
        score[t][2 * pair + i] = sum * q.unit[t];
      }
  }
}

// No less than log2(x), and no more than 0.1 above it: exponent and mantissa of x as one number.
DEVICE float log2_bound(float x) {
  return (float)(int)__float_as_uint(fmaxf(x, 1e-9f)) * 1.1920928955078125e-07f - 126.9f;
}

DEVICE void add_slice(State& state, const float (&score)[COLUMNS][4], const u8* values, int slice, int real) {
  const int lane = lane_id(), g = lane >> 2, c = lane & 3;
  u32 params[GROUPS][4];
  load_params(params, values + CODES, slice, g, real);
  float scale[GROUPS][4], minimum[GROUPS][4], bound[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float largest = 0;
#pragma unroll
    for (int j = 0; j < GROUPS; j++) {
      params_of(params[j][i], scale[j][i], minimum[j][i]);
      largest = fmaxf(largest, scale[j][i]);
    }
    bound[i] = log2_bound(largest);
  }
  u32 columns[COLUMNS][GROUPS][2];
  float fit[COLUMNS];
#pragma unroll
  for (int t = 0; t < COLUMNS; t++) {
    // Weights relative to the largest of the slice, so that one far from the highest score keeps its digits.
    float top = fmaxf(fmaxf(score[t][0] + bound[0], score[t][1] + bound[1]),
                      fmaxf(score[t][2] + bound[2], score[t][3] + bound[3]));
    top = fmaxf(top, other(top, 4));
    top = fmaxf(top, other(top, 8));
    top = fmaxf(top, other(top, 16));
    const float now = fmaxf(state.highest[t], top), before = power_of_2(state.highest[t] - now);
    fit[t] = power_of_2(top - now);
    state.highest[t] = now;
    float p[4];
    state.weight[t] *= before;
#pragma unroll
    for (int j = 0; j < GROUPS; j++) state.minima[t][j] *= before;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      p[i] = power_of_2(score[t][i] - top);
      const float fitted = p[i] * fit[t];
      state.weight[t] += fitted;
#pragma unroll
      for (int j = 0; j < GROUPS; j++) state.minima[t][j] += fitted * minimum[j][i];
    }
    if (__any_sync(~0u, before != 1.f)) {
#pragma unroll
      for (int h = 0; h < HALVES; h++)
#pragma unroll
        for (int i = 0; i < ROW / 16; i++) state.total[t][h][i][0] *= before, state.total[t][h][i][1] *= before;
    }
#pragma unroll
    for (int j = 0; j < GROUPS; j++) {
      u32 bits[4];  // whole + 128 in the last 16: the high part above, the low one below and 128 too large
#pragma unroll
      for (int i = 0; i < 4; i++) bits[i] = __float_as_uint(p[i] * scale[j][i] * TOP + (MAGIC + 128.f));
      const u32 first = __byte_perm(bits[0], bits[1], 0x5140), second = __byte_perm(bits[2], bits[3], 0x5140);
      const u32 low = __byte_perm(first, second, 0x5410) ^ 0x80808080u, high = __byte_perm(first, second, 0x7632);
      // Column g wants tokens 8 c to 8 c + 7 of head g / 2.
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int from = 8 * c + 4 * i + g / 2;
        const u32 there_high = __shfl_sync(~0u, high, from), there_low = __shfl_sync(~0u, low, from);
        columns[t][j][i] = g & 1 ? there_low : there_high;
      }
    }
    fit[t] *= 1.f / TOP;
  }
#pragma unroll
  for (int i = 0; i < ROW / 16; i++) {
    const u8* from = values + (16 * i + g) * TILE + SLICE * slice + 8 * c;
    const uint2 upper = *(const uint2*)from, lower = *(const uint2*)(from + 8 * TILE);
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
      const u32 a[4] = {codes_of(upper.x, h), codes_of(lower.x, h), codes_of(upper.y, h), codes_of(lower.y, h)};
#pragma unroll
      for (int t = 0; t < COLUMNS; t++) {
        int sums[4] = {};
        mma(sums, a, columns[t][GROUPS == 1 ? 0 : h * OWN + 16 * i / SPAN]);
        const float worth = fit[t] * (h ? 1.f / 16 : 1.f);
        state.total[t][h][i][0] += (float)joined(sums[0], sums[1]) * worth;
        state.total[t][h][i][1] += (float)joined(sums[2], sums[3]) * worth;
      }
    }
  }
}

// ---------------------------------------------------------------- joining

// Pieces of a unit: sums [2 a block][HEADS * D] and statistics [2 a block][HEADS * 2] in device memory.
struct Pieces {
  float* sums;
  float* stats;
  u32* counters;  // one a block, zero between launches
};

constexpr int MULTIPLYING = 32 * MULTIPLIERS;  // threads

// Sums of all warps, relative to the largest score of all, into shared memory.
DEVICE void leave(const State& state, Shared& shared, int warp) {
  const int g = lane_id() >> 2, c = threadIdx.x & 3;
  float weight[COLUMNS], minima[COLUMNS][GROUPS];
#pragma unroll
  for (int t = 0; t < COLUMNS; t++) {
    if (g == 0) shared.highest[4 * t + c][warp] = state.highest[t];
    weight[t] = state.weight[t];
#pragma unroll
    for (int j = 0; j < GROUPS; j++) minima[t][j] = state.minima[t][j];
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) {
      weight[t] += other(weight[t], lanes);
#pragma unroll
      for (int j = 0; j < GROUPS; j++) minima[t][j] += other(minima[t][j], lanes);
    }
  }
  meet();
#pragma unroll
  for (int t = 0; t < COLUMNS; t++) {
    const int head = 4 * t + c;
    float highest = NOTHING;
#pragma unroll
    for (int w = 0; w < MULTIPLIERS; w++) highest = fmaxf(highest, shared.highest[head][w]);
    const float fit = power_of_2(state.highest[t] - highest);
    if (g == 0) shared.weight[head][warp] = weight[t] * fit;
#pragma unroll
    for (int h = 0; h < HALVES; h++)
#pragma unroll
      for (int i = 0; i < ROW / 16; i++) {
        float* at = shared.sums[warp] + head * PADDED + h * ROW + 16 * i + g;
        const float less = minima[t][GROUPS == 1 ? 0 : h * OWN + 16 * i / SPAN];
        at[0] = (state.total[t][h][i][0] - less) * fit, at[8] = (state.total[t][h][i][1] - less) * fit;
      }
  }
  meet();
}

// Joins the pieces of blocks begin to end, in that order whoever was first.
DEVICE void join_blocks(Shared& shared, const Pieces& pieces, u32 begin, u32 end, Query* out, int real) {
  constexpr int FOURS = HEADS * D / 4;  // of channels
  constexpr int CREWS = MULTIPLYING > FOURS ? MULTIPLYING / FOURS : 1;
  float* crews = shared.sums[0];  // [CREWS][HEADS * D], then weights and largest scores [CREWS][HEADS]
  float *weights = crews + CREWS * HEADS * D, *tops = weights + CREWS * HEADS;
#pragma unroll 1
  for (int x = threadIdx.x; x < CREWS * FOURS; x += MULTIPLYING) {
    const int crew = x / FOURS, four = x % FOURS, head = 4 * four / D;
    float4 sum = {0, 0, 0, 0};
    float highest = NOTHING, weight = 0;
#pragma unroll 4
    for (u32 block = begin + crew; block < end; block += CREWS) {
      const u32 piece = 2 * block + (block == begin);
      const float4 of = __ldcg((const float4*)(pieces.sums + (u64)piece * HEADS * D + 4 * four));
      const float2 stats = __ldcg((const float2*)(pieces.stats + (piece * HEADS + head) * 2));
      const float now = fmaxf(highest, stats.x), before = power_of_2(highest - now), fit = power_of_2(stats.x - now);
      sum.x = sum.x * before + of.x * fit, sum.y = sum.y * before + of.y * fit;
      sum.z = sum.z * before + of.z * fit, sum.w = sum.w * before + of.w * fit;
      weight = weight * before + stats.y * fit, highest = now;
    }
    *(float4*)(crews + crew * HEADS * D + 4 * four) = sum;
    if (4 * four % D == 0) weights[crew * HEADS + head] = weight, tops[crew * HEADS + head] = highest;
  }
  meet();
#pragma unroll 1
  for (int x = threadIdx.x; x < real * D; x += MULTIPLYING) {
    const int head = x / D;
    float highest = NOTHING, sum = 0, weight = 0;
#pragma unroll
    for (int crew = 0; crew < CREWS; crew++) highest = fmaxf(highest, tops[crew * HEADS + head]);
#pragma unroll
    for (int crew = 0; crew < CREWS; crew++) {
      const float fit = power_of_2(tops[crew * HEADS + head] - highest);
      sum += crews[crew * HEADS * D + x] * fit, weight += weights[crew * HEADS + head] * fit;
    }
    out[x] = as_query(__fdividef(sum, weight));
  }
  meet();
}

// Joins the warps of this block and, if others share the unit, blocks `begin` to `end`, and this is the last to be done,
// the blocks.
DEVICE void join(const State& state, Shared& shared, const Pieces& pieces, u32 begin, u32 end, Query* out, int real,
                 int warp) {
  leave(state, shared, warp);
  const bool shares = end - begin > 1;
  const u32 piece = 2 * blockIdx.x + (blockIdx.x == begin);  // a block ends one unit and begins another
#pragma unroll 1
  for (int x = 4 * threadIdx.x; x < HEADS * D; x += 4 * MULTIPLYING) {
    const int head = x / D;
    float4 sum = {0, 0, 0, 0};
    float weight = 0;
#pragma unroll
    for (int w = 0; w < MULTIPLIERS; w++) {
      const float4 of = *(const float4*)(shared.sums[w] + head * PADDED + x % D);
      sum.x += of.x, sum.y += of.y, sum.z += of.z, sum.w += of.w;
      weight += shared.weight[head][w];
    }
    if (shares) {
      *(float4*)(pieces.sums + (u64)piece * HEADS * D + x) = sum;
      if (x % D == 0) {
        float highest = NOTHING;
#pragma unroll
        for (int w = 0; w < MULTIPLIERS; w++) highest = fmaxf(highest, shared.highest[head][w]);
        *(float2*)(pieces.stats + (piece * HEADS + head) * 2) = {highest, weight};
      }
    } else if (head < real) {
      out[x] = as_query(__fdividef(sum.x, weight)), out[x + 1] = as_query(__fdividef(sum.y, weight));
      out[x + 2] = as_query(__fdividef(sum.z, weight)), out[x + 3] = as_query(__fdividef(sum.w, weight));
    }
  }
  meet();
  if (!shares) return;
  if (threadIdx.x == 0) {
    u32 before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;"
                 : "=r"(before) : "l"(pieces.counters + begin) : "memory");
    shared.last = before == end - begin - 1;
    if (shared.last) pieces.counters[begin] = 0;
  }
  meet();
  if (shared.last) join_blocks(shared, pieces, begin, end, out, real);
}

// ---------------------------------------------------------------- the kernel

extern "C" __global__ void __launch_bounds__(THREADS, 1)
decode(Cache cache, const Query* __restrict__ q, Query* __restrict__ out, Pieces pieces, float scale) {
  Shared& shared = *(Shared*)memory;
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = lane_id();  // the compiler sees it is uniform
  if (threadIdx.x < STAGES) {
    barrier_init(shared_address(shared.keys_full + threadIdx.x), 1);
    barrier_init(shared_address(shared.values_full + threadIdx.x), 1);
    barrier_init(shared_address(shared.empty + threadIdx.x), 4);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if (threadIdx.x < cache.batches) prefetch(cache.lengths + threadIdx.x);  // no copy starts before they are known
  wait_for_inputs();  // all that is read here
  const Line line = line_of(cache);
  __syncthreads();
  if (blockIdx.x >= line.blocks) return;
  const u32 begin = line.start(blockIdx.x), end = line.start(blockIdx.x + 1);
  Place at = place_of(cache, begin);
  if (warp >= MULTIPLIERS) {
    bring_tiles(cache, shared, warp - MULTIPLIERS, at, end - begin);
    return;
  }
  const int team = warp / 4, slice = warp % 4;
  for (u32 n = 0; begin + n < end;) {  // n: tiles done
    const int head = at.unit / PARTS, part = at.unit % PARTS, length = cache.lengths[at.batch];
    const int real = least_of(HEADS, RATIO - part * HEADS);
    const u64 row = (u64)(at.batch * cache.heads + head) * RATIO + part * HEADS;
    const u32 count = least_of(at.tiles - at.tile, end - begin - n);
    if (warp < HEADS) round_query(shared, warp, q + row * D, warp < real, scale);
    const u32 first = begin + n - at.tile;  // the unit's, and the blocks that share it
    const u32 from = line.block_of(first), to = line.block_of(first + at.tiles - 1) + 1;
    meet();
    Queries queries;
    load_queries(queries, shared);
    State state = {};
#pragma unroll
    for (int t = 0; t < COLUMNS; t++) state.highest[t] = NOTHING;
#pragma unroll 1
    for (u32 i = (team + TEAMS - n % TEAMS) % TEAMS; i < count; i += TEAMS) {
      const u32 slot = (n + i) % STAGES, parity = (n + i) / STAGES & 1;
      const u8* stage = shared.ring[slot];
      const int left = length - (int)(at.tile + i) * TILE - SLICE * slice;  // tokens, from the first of the slice
      barrier_wait(shared_address(shared.keys_full + slot), parity);
      float score[COLUMNS][4];
      if (left > 0) {
        scores_of(score, queries, stage, slice, left);
        if (left < SLICE) {
#pragma unroll
          for (int t = 0; t < COLUMNS; t++)
#pragma unroll
            for (int k = 0; k < 4; k++)
              if (4 * (lane >> 2) + k >= left) score[t][k] = NOTHING;
        }
      }
      barrier_wait(shared_address(shared.values_full + slot), parity);
      if (left > 0) add_slice(state, score, stage + SIDE, slice, left);
      __syncwarp();
      if (lane == 0) barrier_arrive(shared_address(shared.empty + slot));
    }
    // The next kernel in the stream may take the places of blocks that are done while the last ones join.
    let_next_start();
    join(state, shared, pieces, from, to, out + row * D, real, warp);
    n += count;
    next_unit(cache, at);
  }
}
