// Few tokens (after fragments.cu): every warp streams an equal piece of the weights past all tokens.
//
// Macros. WARPS of a thread block, MT tiles of 8 tokens, SPLIT thread blocks of a cluster along the columns, RING units of
// weights on their way to a warp, STAGED in shared memory or not, RESIDENT blocks to leave registers for.

constexpr int FEW_ROWS = 16 * RT, FEW_TOKENS = 8 * MT, FEW_THREADS = 32 * WARPS;

// Codes of up to 4 bits that are levels but for an offset are multiplied as they are, bare. Of each sum the zero point times
// the sum of its tokens is taken off, which was added up when they came in, GRAIN columns at a time. So small a number
// times a token of bfloat16 may be too small for float32: tokens are multiplied by 2^LIFT. (One of 2^63 or more is
// infinite then.) Sums, which are too small by ABOVE, are set right at the end.
constexpr int GRAIN = (GROUP | 128) & -(GROUP | 128);  // the power of two in GROUP, up to 128
constexpr int LIFT = BARE && !HALF ? 64 : 0;
constexpr float ABOVE = BARE ? (HALF ? 0x1p24f : 0x1p69f) : 1, BELOW = ABOVE / (1 << ROW_UP);  // rows g, rows g + 8

// A unit that is STAGED lies in shared memory: words as each lane will read them, scales and zero points as in memory.
constexpr int SLOT_SCALES = RT * UNIT_WORDS * 4, SLOT_ZEROS = SLOT_SCALES + RT * SCALES * 32;
constexpr int SLOT_BYTES = STAGED ? SLOT_ZEROS + (ZERO ? RT * SCALES * 16 : 0) : 0;

DEVICE void copy_unit(Stream& from, int units, u32 slot) {
  const int lane = lane_id();
#pragma unroll
  for (int rt = 0; rt < RT; rt++) {
    const u32* words = from.words + (u64)(rt * units) * UNIT_WORDS;
    const u32 to = slot + rt * UNIT_WORDS * 4;
#pragma unroll
    for (int i = 0; i < BLOCKS * WORDS; i += 4)
      if (i + 4 <= BLOCKS * WORDS || lane < 16) copy16_ahead(to + 128 * i + 16 * lane, words + 32 * i);
    const u64 first = (u64)(rt * units) * SCALES * 8 - (lane >> 2);  // of this lane's row on
    for (int i = lane; i < 2 * SCALES; i += 32)
      copy16(slot + SLOT_SCALES + rt * SCALES * 32 + 16 * i, from.scale + first + 4 * i);
#if ZERO
    for (int i = lane; i < SCALES; i += 32)
      copy16(slot + SLOT_ZEROS + rt * SCALES * 16 + 16 * i, from.zero + first + 8 * i);
#endif
  }
  from.words += UNIT_WORDS, from.scale += SCALES * 8, from.zero += SCALES * 8;
}

DEVICE void read_unit(u32 slot, Unit& to) {
  const int lane = lane_id();
#pragma unroll
  for (int rt = 0; rt < RT; rt++) {
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) read_words(to.words[rt][b], slot + rt * UNIT_WORDS * 4 + 128 * WORDS * b);
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
  const float above = ZERO ? (float)(zeros & 255) : OFFSET, below = (ZERO ? (float)(zeros >> 8) : OFFSET) * (1 << ROW_UP);
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
  if (BARE)
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
        read_matrices(tokens + mt * token_stride + 2 * (b * COLUMNS + 16 * step), x[mt]);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        [[maybe_unused]] const int column = b * COLUMNS + 16 * (step + half);
#pragma unroll
        for (int rt = 0; rt < RT; rt++) {
#if GROUP
          if (BARE && column % GROUP == 0)
            begin_sums(group.of[rt], token_sums + column / GRAIN * FEW_TOKENS, GROUP, unit.zero[rt][column / GROUP]);
#endif
          u32 a[4];
#if BARE
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

// Sums over the GRAIN / 8 lanes that have a grain, of four values at a time: a lane hands on those that another adds up. It
// ends with value lane % 4; after two lanes with value lane % 2 and value lane % 2 + 2.
DEVICE void sum_of_two_lanes(const float* four, float* two) {
  const bool odd = threadIdx.x & 1;
#pragma unroll
  for (int i = 0; i < 2; i++)
    two[i] = (odd ? four[2 * i + 1] : four[2 * i]) + __shfl_xor_sync(0xffffffff, odd ? four[2 * i] : four[2 * i + 1], 1);
}
DEVICE float sum_of_lanes(const float* two) {
  const bool odd = threadIdx.x & 2;
  float sum = (odd ? two[1] : two[0]) + __shfl_xor_sync(0xffffffff, odd ? two[0] : two[1], 2);
#pragma unroll
  for (int other = 4; other < GRAIN / 8; other *= 2) sum += __shfl_xor_sync(0xffffffff, sum, other);
  return sum;
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
  const u32 base = shared_address(token_sums + (BARE ? width / GRAIN * FEW_TOKENS : 0));
  // Of this thread's columns, 8 (of 64): what their tokens are multiplied by.
  [[maybe_unused]] const u32 lift = ONES + (LIFT - up_of(threadIdx.x)) * 0x00800080;
  wait_for_inputs();
  auto keep = [&](uint4 eight, int row, int i) {  // -> their sum
    const float sum = sum_of(eight.x) + sum_of(eight.y) + sum_of(eight.z) + sum_of(eight.w);
    if (LIFT) eight = {times(eight.x, lift), times(eight.y, lift), times(eight.z, lift), times(eight.w, lift)};
    if (8 * i < width) write_tokens(base + row * pitch + 16 * i, eight);
    return sum / ABOVE;
  };
  // A load takes as long as a hundred instructions: AT_ONCE of one row are on their way to a thread, or of as many rows.
  // Loops are left by whole warps, which add up together.
  constexpr int AT_ONCE = 4;
  if (m == 1) {
    for (int begin = threadIdx.x; begin - lane < width / 8; begin += AT_ONCE * FEW_THREADS) {
      uint4 eight[AT_ONCE];
#pragma unroll
      for (int j = 0; j < AT_ONCE; j++) {
        const int i = begin + j * FEW_THREADS, column = start * UNIT + 8 * i;
        eight[j] = {0, 0, 0, 0};
        if (8 * i < width && column < k) read_tokens(eight[j], x + column);
      }
#pragma unroll
      for (int j = 0; j < AT_ONCE; j++) {
        const int i = begin + j * FEW_THREADS;
        if (i - lane >= width / 8) break;
        float sum = keep(eight[j], 0, i);
        if (!BARE) continue;
#pragma unroll
        for (int other = 1; other < GRAIN / 8; other *= 2) sum += __shfl_xor_sync(0xffffffff, sum, other);
        if (8 * i < width && i % (GRAIN / 8) == 0) token_sums[8 * i / GRAIN * FEW_TOKENS] = sum;
      }
    }
  } else {
    for (int first_row = 0; first_row < m; first_row += AT_ONCE)
      for (int i = threadIdx.x; i - lane < width / 8; i += FEW_THREADS) {
        const int column = start * UNIT + 8 * i;
        uint4 eight[AT_ONCE];
        float sums[AT_ONCE] = {}, two[2];
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
          eight[j] = {0, 0, 0, 0};
          if (first_row + j < m && 8 * i < width && column < k) read_tokens(eight[j], x + (u64)(first_row + j) * k + column);
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
          if (first_row + j >= m) break;
          sums[j] = keep(eight[j], first_row + j, i);
        }
        if (!BARE) continue;
        auto put_sum = [&](float sum, int j) {
          if (first_row + j < m && 8 * i < width) token_sums[8 * i / GRAIN * FEW_TOKENS + first_row + j] = sum;
        };
        sum_of_two_lanes(sums, two);
        if (GRAIN == 16)
          put_sum(two[0], lane & 1), put_sum(two[1], 2 | lane & 1);
        else {
          const float sum = sum_of_lanes(two);
          if (lane % (GRAIN / 8) < AT_ONCE) put_sum(sum, lane & 3);
        }
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
            parts[part * PART + (8 * mt + 2 * c + (i & 1)) * PITCH + 16 * rt + g + 8 * (i >> 1)] =
                (i & 2 ? BELOW : ABOVE) * total.of[rt][mt][i];
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
