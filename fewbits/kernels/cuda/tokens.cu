// Tokens to 8 bits in one pass: what comes before the product, the largest magnitude, rounding. The host side, which says
// what for, is cuda_tokens.py, and e4m3_tokens.py for the order and the sums that many.cu takes.
//
// A block has a token. It is read once, 16 bytes at a time, and kept as it came or as what comes before left it, in 16 bits
// where it has 16, so that there is room for the loads of several blocks on their way.
//
// Macros. INPUT (0 bfloat16, 1 float16, 2 float32); THREADS of a block; CHUNKS of WIDTH columns of a thread; BEFORE (0 nothing,
// 1 the norm by root mean square, 2 SiLU of the first half of a row times the second); INTEGERS (INT8, else E4M3); PART columns
// a sum and the order of many.cu, which is one of 16 columns, or 0: plain order. 8 columns, 16 bytes, are read best.

constexpr int WIDTH = PART ? 16 : 8;
constexpr int HELD = INPUT == 2 ? WIDTH : WIDTH / 2;  // words of a chunk
constexpr int FOUR = INPUT == 2 ? 4 : 8;              // columns in 16 bytes
constexpr float MAGIC = 12582912.f;        // 1.5 * 2^23: the last bits of a sum with it are the number, rounded

// Column j of a chunk.
DEVICE float value(const u32* held, int j) {
#if INPUT == 2
  return __uint_as_float(held[j]);
#elif INPUT == 1
  return j % 2 ? high_half(held[j / 2]) : low_half(held[j / 2]);
#else
  return __uint_as_float(j % 2 ? held[j / 2] & 0xffff0000 : held[j / 2] << 16);
#endif
}

// Columns j and j + 1 of a chunk, rounded as INPUT is.
DEVICE void keep(u32* held, int j, float low, float high) {
#if INPUT == 2
  held[j] = __float_as_uint(low), held[j + 1] = __float_as_uint(high);
#elif INPUT == 1
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(held[j / 2]) : "f"(high), "f"(low));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(held[j / 2]) : "f"(high), "f"(low));
#endif
}
DEVICE float rounded(float x) {
  u32 two[2];
  keep(two, 0, x, x);
  return value(two, 0);
}

// A chunk of a row from `column` on, zeros past the last. `aligned`: every row begins on 16 bytes, K is a multiple
// of 8.
DEVICE void read(const u8* row, int column, int k, bool aligned, u32* held) {
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
DEVICE u32 round_two(float low, float high, [[maybe_unused]] float& sum) {
  u16 two;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(two) : "f"(high), "f"(low));
#if PART
  u32 halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(two));
  sum += low_half(halves) + high_half(halves);
#endif
  return two;
}

// x: rows `pitch` bytes apart. weight: [k], of the norm. q: [M][width] bytes. scales: [M]. sums: [M][sums_width] float16, sums
// times 2^-9. top: what the largest magnitude is scaled to; low, high: what is clamped to.
extern "C" __global__ void __launch_bounds__(THREADS)
    round_tokens(const u8* x, const u8* weight, u8* q, float* scales, u16* sums, long long pitch, int k, int width,
                 int sums_width, int aligned, float eps, float top, float low, float high) {
  __shared__ u32 largest[THREADS / 32];
  let_next_start();  // a product begins to read its weights
  wait_for_inputs();

  const u8* const row = x + blockIdx.x * pitch;
  u32 held[CHUNKS][HELD];
#pragma unroll
  for (int i = 0; i < CHUNKS; i++) read(row, WIDTH * (i * THREADS + threadIdx.x), k, aligned, held[i]);
#if BEFORE == 1
  __shared__ __align__(16) float squares[THREADS / 32];  // or its loads would take some of `largest` along
  float square = 0;
#pragma unroll
  for (int i = 0; i < CHUNKS; i++)
#pragma unroll
    for (int j = 0; j < WIDTH; j++) square += value(held[i], j) * value(held[i], j);
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) square += __shfl_xor_sync(~0u, square, lanes);
  if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = square;
  __syncthreads();
  square = 0;
#pragma unroll
  for (int i = 0; i < THREADS / 32; i++) square += squares[i];
  const float norm = rsqrtf(square / k + eps);
#pragma unroll
  for (int i = 0; i < CHUNKS; i++) {
    u32 w[HELD];
    read(weight, WIDTH * (i * THREADS + threadIdx.x), k, aligned, w);
#pragma unroll
    for (int j = 0; j < WIDTH; j += 2)
      keep(held[i], j, rounded(value(held[i], j) * norm) * value(w, j), rounded(value(held[i], j + 1) * norm) * value(w, j + 1));
  }
#elif BEFORE == 2
  auto silu = [](float v) { return rounded(__fdividef(v, 1.f + __expf(-v))); };
#pragma unroll
  for (int i = 0; i < CHUNKS; i++) {
    u32 up[HELD];
    read(row + (u64)k * (16 / FOUR), WIDTH * (i * THREADS + threadIdx.x), k, aligned, up);
#pragma unroll
    for (int j = 0; j < WIDTH; j += 2)
      keep(held[i], j, silu(value(held[i], j)) * value(up, j), silu(value(held[i], j + 1)) * value(up, j + 1));
  }
#endif

  u32 reach = 0;  // bits of magnitudes are ordered as they are, NaN last
#if INPUT != 2 && __CUDA_ARCH__ >= 900
#pragma unroll
  for (int i = 0; i < CHUNKS * HELD; i++)
    asm("max.u16x2 %0, %0, %1;" : "+r"(reach) : "r"(held[i / HELD][i % HELD] & 0x7fff7fff));
  reach = max(reach & 0xffff, reach >> 16);
  reach = INPUT == 1 ? __float_as_uint(low_half(reach)) : reach << 16;
#else
#pragma unroll
  for (int i = 0; i < CHUNKS; i++)
#pragma unroll
    for (int j = 0; j < WIDTH; j++) reach = max(reach, __float_as_uint(value(held[i], j)) & 0x7fffffff);
#endif
  // Or the compiler keeps what it has unpacked, in twice the registers.
#pragma unroll
  for (int i = 0; i < CHUNKS * HELD; i++) asm volatile("" : "+r"(held[i / HELD][i % HELD]));
  reach = largest_of_warp(reach);
  if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = reach;
  __syncthreads();
  reach = largest_of_warp(threadIdx.x % 32 < THREADS / 32 ? largest[threadIdx.x % 32] : 0);
  const float scale = reach ? fmaxf(__fdiv_rn(__uint_as_float(reach), top), 0x1p-126f) : 1.0f;  // fmaxf loses a NaN,
  const float inverse = __fdiv_rn(1.0f, scale);  // which the token keeps
  if (threadIdx.x == 0) scales[blockIdx.x] = scale;

#if PART
  __shared__ float partial[CHUNKS * THREADS];
#endif
#pragma unroll
  for (int i = 0; i < CHUNKS; i++) {
    const int chunk = i * THREADS + threadIdx.x;
    float sum = 0;
    auto over_scale = [&](int j) {  // as IEEE rounds it (Markstein 1990)
      const float v = value(held[i], j), quotient = v * inverse;
      return __fmaf_rn(__fmaf_rn(-quotient, scale, v), inverse, quotient);
    };
    [[maybe_unused]] auto whole = [&](int j) { return __float_as_uint(fminf(fmaxf(over_scale(j), low), high) + MAGIC); };
    u32 out[WIDTH / 4];
#pragma unroll
    for (int c = 0; c < WIDTH / 4; c++) {
#if INTEGERS
      const u32 first = __byte_perm(whole(4 * c), whole(4 * c + 1), 0x40);
      out[c] = __byte_perm(first, __byte_perm(whole(4 * c + 2), whole(4 * c + 3), 0x40), 0x5410);
#elif PART  // a word: columns 2 c, 2 c + 8, 2 c + 1, 2 c + 9
      out[c] = round_two(over_scale(2 * c), over_scale(2 * c + 8), sum) |
               round_two(over_scale(2 * c + 1), over_scale(2 * c + 9), sum) << 16;
#else
      out[c] = round_two(over_scale(4 * c), over_scale(4 * c + 1), sum) |
               round_two(over_scale(4 * c + 2), over_scale(4 * c + 3), sum) << 16;
#endif
    }
    u8* const to = q + (u64)blockIdx.x * width + WIDTH * chunk;
    if (WIDTH * chunk < width) {
#if PART
      *(uint4*)to = make_uint4(out[0], out[1], out[2], out[3]);
#else
      *(uint2*)to = make_uint2(out[0], out[1]);
#endif
    }
#if PART
    partial[chunk] = sum;  // zero past the last column
#endif
  }
#if PART
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
#endif
}
