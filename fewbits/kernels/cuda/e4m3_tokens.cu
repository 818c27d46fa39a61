// Tokens rounded to E4M3, in the order and with the sums that many.cu takes. The host side, which says what
// for, is e4m3_tokens.py.
//
// Macros. INPUT (0 bfloat16, 1 float16, 2 float32); THREADS of a block, which rounds a token; CHUNKS of 16 columns of a
// thread, kept in registers between finding the largest magnitude and rounding; PART columns a sum.

constexpr int HELD = INPUT == 2 ? 16 : 8;  // words of 16 columns: as they came, which leaves room for more blocks

// Column j of 16.
DEVICE float value(const u32* held, int j) {
#if INPUT == 2
  return __uint_as_float(held[j]);
#elif INPUT == 1
  return j % 2 ? high_half(held[j / 2]) : low_half(held[j / 2]);
#else
  return __uint_as_float(j % 2 ? held[j / 2] & 0xffff0000 : held[j / 2] << 16);
#endif
}

// 16 columns of a token from `column` on, zeros past the last. `aligned`: every row begins on 16 bytes, K is a multiple
// of 8.
DEVICE void read(const u8* row, int column, int k, bool aligned, u32* held) {
  constexpr int FOUR = 64 / HELD;  // columns in 16 bytes
#pragma unroll
  for (int i = 0; i < HELD; i += 4) {
    const int first = column + i * FOUR / 4;
    if (aligned && first < k) {
      const uint4 words = *(const uint4*)(row + (u64)first * (16 / FOUR));
      held[i] = words.x, held[i + 1] = words.y, held[i + 2] = words.z, held[i + 3] = words.w;
      continue;
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
#if INPUT == 2
      held[i + j] = first + j < k ? ((const u32*)row)[first + j] : 0;
#else
      const int low = first + 2 * j;
      held[i + j] = (low < k ? ((const u16*)row)[low] : 0) | (low + 1 < k ? ((const u16*)row)[low + 1] : 0) << 16;
#endif
    }
  }
}

DEVICE u32 largest_of_warp(u32 bits) {
  u32 out;
  asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(out) : "r"(bits));
  return out;
}

// Two values to E4M3, to nearest, ties to even, saturating; what they became is added to `sum`.
DEVICE u32 round_two(float low, float high, float& sum) {
  u16 two;
  u32 halves;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(two) : "f"(high), "f"(low));
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(two));
  sum += low_half(halves) + high_half(halves);
  return two;
}

// x: rows `pitch` bytes apart. q: [M][width] bytes. scales: [M]. sums: [M][sums_width] float16, sums times 2^-9.
extern "C" __global__ void __launch_bounds__(THREADS)
    round_tokens(const u8* x, u8* q, float* scales, u16* sums, long long pitch, int k, int width, int sums_width,
                 int aligned) {
  __shared__ u32 largest[THREADS / 32];
  __shared__ float partial[CHUNKS * THREADS];  // of 16 columns
  let_next_start();  // the product begins to read its weights
  wait_for_inputs();

  const u8* const row = x + blockIdx.x * pitch;
  u32 held[CHUNKS][HELD];
  u32 reach = 0;  // bits of magnitudes are ordered as they are, NaN last
#pragma unroll
  for (int i = 0; i < CHUNKS; i++) {
    read(row, 16 * (i * THREADS + threadIdx.x), k, aligned, held[i]);
#pragma unroll
    for (int j = 0; j < 16; j++) reach = max(reach, __float_as_uint(value(held[i], j)) & 0x7fffffff);
  }
  reach = largest_of_warp(reach);
  if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = reach;
  __syncthreads();
  reach = largest_of_warp(threadIdx.x % 32 < THREADS / 32 ? largest[threadIdx.x % 32] : 0);
  const float scale = reach ? fmaxf(__fdiv_rn(__uint_as_float(reach), 448.0f), 0x1p-126f) : 1.0f;  // fmaxf loses a NaN,
  const float inverse = __fdiv_rn(1.0f, scale);  // which the token keeps
  if (threadIdx.x == 0) scales[blockIdx.x] = scale;

#pragma unroll
  for (int i = 0; i < CHUNKS; i++) {
    const int chunk = i * THREADS + threadIdx.x;
    float sum = 0;
    auto over_scale = [&](int j) {  // as IEEE rounds it (Markstein 1990)
      const float v = value(held[i], j), quotient = v * inverse;
      return __fmaf_rn(__fmaf_rn(-quotient, scale, v), inverse, quotient);
    };
    u32 out[4];  // a word: columns 2 c, 2 c + 8, 2 c + 1, 2 c + 9
#pragma unroll
    for (int c = 0; c < 4; c++)
      out[c] = round_two(over_scale(2 * c), over_scale(2 * c + 8), sum) |
               round_two(over_scale(2 * c + 1), over_scale(2 * c + 9), sum) << 16;
    if (16 * chunk < width) *(uint4*)(q + (u64)blockIdx.x * width + 16 * chunk) = make_uint4(out[0], out[1], out[2], out[3]);
    partial[chunk] = sum;  // zero past the last column
  }
  __syncthreads();
  for (int part = threadIdx.x; part < sums_width; part += THREADS) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < PART / 16; i++) {
      const int chunk = part * (PART / 16) + i;
      sum += chunk < CHUNKS * THREADS ? partial[chunk] : 0;
    }
    u16 half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(sum * 0x1p-9f));
    sums[(u64)blockIdx.x * sums_width + part] = half;
  }
}
