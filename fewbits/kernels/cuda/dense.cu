// The weight in 16 bits, or in E4M3 without alpha, in the order of the tokens (after fragments.cu).
//
// A warp writes tiles of 16 rows by 128 bytes, through shared memory so that rows are written 128 bytes at a time.
// out: [n][k]; k a multiple of 8, with E4M3 of 16.
#if E4M3
typedef u8 Out;
#else
typedef u16 Out;
#endif
extern "C" __global__ void __launch_bounds__(256)
    dense(Weight w, const float* alpha, const u32* pairs, Out* out, int n, int k) {
  constexpr int PIECE = 128 / sizeof(Out), EACH = 16 / sizeof(Out);  // columns in 128 bytes, and in 16
  __shared__ __align__(128) u32 staged[8][16][36];
  spread_table(pairs);
  __syncthreads();
  wait_for_inputs();  // for `out`, which the kernel before may still read
  const int lane = lane_id(), warp = threadIdx.x / 32, g = lane >> 2, c = lane & 3;
  const u64 count = (u64)w.tiles * w.units;
  for (u64 i = (u64)blockIdx.x * 8 + warp; i < count; i += (u64)gridDim.x * 8) {
    const int tile = (int)(i / w.units), unit = (int)(i % w.units);
    Unit here;
    Stream weights = stream(w, tile, unit);
    fetch(weights, 0, here);
#if E4M3
    Scaled scaled(0x3c003c00, 0);
#else
    const int row = tile * 16 + g;
    const float above = row < n ? LEVEL * alpha[row] : 0, below = row + 8 < n ? LEVEL * alpha[row + 8] : 0;
    u32 offset[2];
    offsets(0, offset);
    float low = above, high = below;
#endif
#pragma unroll
    for (int piece = 0; piece < UNIT / PIECE; piece++) {
#if E4M3
#pragma unroll
      for (int step = 0; step < 8; step++) {
        const int column = piece * PIECE + step * 16;
#if GROUP
        if (column % GROUP == 0) scaled = Scaled(here.scale[0][column / GROUP], here.zero[0][column / GROUP]);
#endif
        u32* const to = &staged[warp][g][step * 4 + c];
        scaled.levels(here.words[0][column / COLUMNS][column % COLUMNS / 16], to[0], to[8 * 36]);
      }
#else
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
#endif
      __syncwarp();
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int row = 4 * j + lane / 8, column = unit * UNIT + piece * PIECE + EACH * (lane % 8);
        if (tile * 16 + row < n && column < k)
          *(uint4*)(out + (u64)(tile * 16 + row) * k + column) = *(uint4*)&staged[warp][row][4 * (lane % 8)];
      }
      __syncwarp();
    }
  }
}
