// What every loop of int8_dot.cpp computes, one number at a time: no vectors, no torch.
// Weights are those of `int8_dot.Packed`, with scales in float32; x [m, k] is float32.
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { INT4, INT8, DIGIT, CODEBOOK, FLOATS };

// The code of one of eight rows in one of 32 columns of a block.
static int code_of(const uint8_t* block, int kind, int row, int column) {
  if (kind == INT8 || kind == FLOATS) return block[column / 4 * 32 + 4 * row + column % 4];
  const uint8_t both = block[column / 8 * 32 + 4 * row + column % 4];
  return column / 4 % 2 ? both >> 4 : both & 15;
}

// Sixteenths of an e4m3 number, rounded half up.
static int sixteenths(int code) {
  const int exponent = (code >> 3) & 15, mantissa = code & 7;
  const float size = exponent ? ldexpf((float)(8 + mantissa), exponent - 10)
                              : ldexpf((float)mantissa, -9);
  const int count = (int)floorf(size * 16 + 0.5f);
  return code & 128 ? -count : count;
}

static int number_of(int code, int kind, const uint8_t* table) {
  if (kind == DIGIT) return table[code];
  if (kind == CODEBOOK) return table[code] * 128 + table[16 + code];
  return kind == FLOATS ? sixteenths(code) : code;
}

// Codes of 32 numbers, and their scale; numbers that are none become -128.
static float rounded(const float* x, int64_t width, int8_t* codes) {
  float all[32] = {0};
  memcpy(all, x, width * sizeof(float));
  uint32_t most = 0;
  for (int i = 0; i < 32; ++i) {
    uint32_t bits;
    memcpy(&bits, all + i, 4);
    bits &= 0x7fffffff;
    if (bits > most) most = bits;
  }
  float largest;
  memcpy(&largest, &most, 4);
  const float by = largest > 0x1p-100f ? 127.0f / largest : 0.0f;
  for (int i = 0; i < 32; ++i) {
    const float y = all[i] * by;
    codes[i] = isfinite(y) ? (int8_t)nearbyintf(y) : -128;
  }
  return largest / 127.0f;
}

// out [m, n] in float32, without bias; group 0 means one per row, 16 two in a block.
void twin(const float* x, int64_t m, int64_t k, int kind, const uint8_t* packed, const float* scale,
          const uint8_t* zero, const uint8_t* table, float middle, int64_t n, int64_t group,
          float* out) {
  const int64_t blocks = (k + 31) / 32, bytes = kind == INT8 || kind == FLOATS ? 256 : 128;
  const int64_t part = group == 16 ? 16 : 32, size = group ? group : 32 * blocks;
  const int64_t groups = (32 * blocks + size - 1) / size;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t row = 0; row < n; ++row) {
      const int64_t panel = row / 8, lane = row % 8;
      float total = 0;
      for (int64_t b = 0; b < blocks; ++b) {
        int8_t codes[32];
        const int64_t left = k - 32 * b;
        const float step = rounded(x + i * k + 32 * b, left < 32 ? left : 32, codes);
        const uint8_t* block = packed + (panel * blocks + b) * bytes;
        for (int64_t from = 0; from < 32; from += part) {
          const int64_t at = (panel * groups + (32 * b + from) / size) * 8 + lane;
          int32_t products = 0, sum = 0;
          for (int64_t c = from; c < from + part; ++c) {
            products += number_of(code_of(block, kind, lane, c), kind, table) * codes[c];
            sum += codes[c];
          }
          const float centred = fmaf(-(zero ? zero[at] : middle), (float)sum, (float)products);
          total = fmaf(centred, scale[at] * step, total);
        }
      }
      out[i * n + row] = total;
    }
  }
}
