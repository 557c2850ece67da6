// quantkit::int8_dot on x86: codes of weights in 4 or 8 bits times activations rounded to int8.
//
// x is rounded in blocks of 32 columns, as int8_dot.py says.  Integer sums of a block, or of its
// halves where each has a scale, are exact; they are added in float32.  Eight rows of the weight, a panel, lie side by side, so that every
// 32-bit lane of a 256-bit register belongs to one row and holds four of its columns:
//
//   4 bit, 128 bytes a block   register j = 0..3, byte 4r+c: row r, columns 8j+c low, 8j+4+c high
//   8 bit, 256 bytes a block   register j = 0..7, byte 4r+c: row r, column 4j+c
//
// VNNI adds four products to a lane at once.  Without it vpmaddubsw adds pairs into 16 bits: 4-bit
// codes cannot overflow them within a block (8 · 2 · 15 · 127 < 2^15); 8-bit codes are taken as |w|
// and x with the sign of w (2 · 128 · 127 < 2^15), and widened after every product.
//
// Codes of a codebook are looked up.  Values that are whole twelfths of the largest (MXFP4, NVFP4)
// are one digit of 0..24, exactly; four pairs of them stay in 16 bits: 4 · 2 · 24 · 127 < 2^15.
// Others (NF4) are two digits of 7 bits, high · 128 + low, each multiplied: 2 · 127 · 127 < 2^15.
//
// e4m3 numbers, bytes as 8-bit codes are, are counted in sixteenths, up to 7168: numbers from 1/2 on
// exactly, smaller ones rounded half up.  Their products with x need 16 bits to multiply in.
#include "int8_dot_blocks.h"

#include <immintrin.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlock = 32;
constexpr int64_t kLanes = 8;
// Rows of x multiplied by a block of weights that was loaded once.
constexpr int64_t kRows = 4;
// Multiply-adds that are worth a thread's while.
constexpr int64_t kGrain = 1 << 17;
// Bytes of rounded activations that a thread keeps for the next call.
constexpr size_t kKept = 1 << 20;

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline __m256 load8(const float* from) { return _mm256_loadu_ps(from); }
inline __m256 load8(const BFloat16* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline __m256 load8(const Half* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline __m256 load8(const uint8_t* from) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
}

inline void store(float value, float* to) { *to = value; }
inline void store(float value, Half* to) {
  to->bits = static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(float value, BFloat16* to) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  to->bits = nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// x [M, K] in whole blocks: codes, the scale of each block, and the sum of its codes, of which
// `half` is that of the first sixteen.
struct Rounded {
  std::vector<int8_t> codes;
  std::vector<float> scale, sum, half;

  template <class T>
  void block(const T* x, int64_t index) {
    const __m256i no_sign = _mm256_set1_epi32(0x7fffffff);
    __m256 v[4];
    // As integers the magnitudes are ordered alike, and a NaN is the largest of all.
    __m256i most = _mm256_setzero_si256();
    for (int i = 0; i < 4; ++i) {
      v[i] = load8(x + 8 * i);
      most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_castps_si256(v[i]), no_sign));
    }
    alignas(32) float lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), max_lanes(most));
    const float largest = lanes[0];
    scale[index] = largest / 127.0f;
    const __m256 by = _mm256_set1_ps(largest > 0x1p-100f ? 127.0f / largest : 0.0f);
    __m256i q[4];
    for (int i = 0; i < 4; ++i) q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], by));
    const __m256i low = _mm256_packs_epi32(q[0], q[1]), high = _mm256_packs_epi32(q[2], q[3]);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes.data() + index * kBlock), bytes);
    const __m256i ones = _mm256_set1_epi8(1);
    const __m256i fours = _mm256_madd_epi16(_mm256_maddubs_epi16(ones, bytes), _mm256_set1_epi16(1));
    alignas(32) int32_t sums[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(sums), fours);
    const int32_t first = sums[0] + sums[1] + sums[2] + sums[3];
    half[index] = static_cast<float>(first);
    sum[index] = static_cast<float>(first + sums[4] + sums[5] + sums[6] + sums[7]);
  }

  // The last block of a row, filled up with zeros.
  template <class T>
  void short_block(const T* x, int64_t width, int64_t index) {
    T whole[kBlock] = {};
    std::memcpy(whole, x, width * sizeof(T));
    block(whole, index);
  }

  static __m256i max_lanes(__m256i v) {
    v = _mm256_max_epi32(v, _mm256_permute2x128_si256(v, v, 1));
    v = _mm256_max_epi32(v, _mm256_shuffle_epi32(v, 0x4e));
    return _mm256_max_epi32(v, _mm256_shuffle_epi32(v, 0xb1));
  }
};

// The same block of kPanels panels, `next` bytes apart.
template <class Block, int kPanels>
struct Many {
  Block one;
  Many<Block, kPanels - 1> others;
  Many(const Weight& w, const uint8_t* packed, int64_t next)
      : one(w, packed), others(w, packed + next, next) {}
  template <int kPart>
  __m256i dot(int panel, const int8_t* x) const {
    return panel == 0 ? one.template dot<kPart>(x) : others.template dot<kPart>(panel - 1, x);
  }
};

template <class Block>
struct Many<Block, 0> {
  Many(const Weight&, const uint8_t*, int64_t) {}
  template <int>
  __m256i dot(int, const int8_t*) const {
    return _mm256_setzero_si256();
  }
};

// kCount rows of x, from `first` on, times the rows of kPanels panels; out [panel, row of x].
template <class Block, class Scale, int kCount, int kPanels>
void multiply(const Weight& w, int64_t panel, const Rounded& x, int64_t first, __m256* out) {
  const uint8_t* packed = w.packed + panel * w.blocks * Block::kBytes;
  const int64_t next = w.blocks * Block::kBytes;
  constexpr int kParts = Block::kParts;
  __m256 total[kPanels][kCount];
  for (auto& row : total)
    for (__m256& one : row) one = _mm256_setzero_ps();
  for (int64_t group = 0, block = 0; group < w.groups; group += kParts) {
    __m256 scale[kPanels][kParts], zero[kPanels][kParts];
    for (int p = 0; p < kPanels; ++p) {
      for (int part = 0; part < kParts; ++part) {
        const int64_t at = ((panel + p) * w.groups + group + part) * kLanes;
        scale[p][part] = load8(static_cast<const Scale*>(w.scale) + at);
        const __m256 point = w.zero ? load8(w.zero + at) : _mm256_set1_ps(w.middle);
        zero[p][part] = _mm256_sub_ps(point, _mm256_set1_ps(Block::kShift));
      }
    }
    const int64_t end = std::min(block + w.group_blocks, w.blocks);
    for (; block < end; ++block, packed += Block::kBytes) {
      for (int p = 0; p < kPanels; ++p)
        for (int64_t line = 0; line < Block::kBytes; line += 64)
          _mm_prefetch(reinterpret_cast<const char*>(packed + p * next) + 1024 + line,
                       _MM_HINT_T0);
      const Many<Block, kPanels> weights(w, packed, next);
      for (int m = 0; m < kCount; ++m) {
        const int64_t where = (first + m) * w.blocks + block;
        const int8_t* codes = x.codes.data() + where * kBlock;
        const __m256 step = _mm256_set1_ps(x.scale[where]);
        const auto add = [&](int p, int part, __m256i sum, float of_x) {
          const __m256 products = _mm256_cvtepi32_ps(sum), shifted = _mm256_set1_ps(of_x);
          const __m256 centred = _mm256_fnmadd_ps(zero[p][part], shifted, products);
          const __m256 by = _mm256_mul_ps(scale[p][part], step);
          total[p][m] = _mm256_fmadd_ps(centred, by, total[p][m]);
        };
        const float sum = x.sum[where], half = x.half[where];
        for (int p = 0; p < kPanels; ++p) {
          add(p, 0, weights.template dot<0>(p, codes), kParts == 1 ? sum : half);
          if constexpr (kParts == 2) add(p, 1, weights.template dot<1>(p, codes), sum - half);
        }
      }
    }
  }
  for (int p = 0; p < kPanels; ++p)
    for (int m = 0; m < kCount; ++m) out[p * kCount + m] = total[p][m];
}

using Multiply = void (*)(const Weight&, int64_t, const Rounded&, int64_t, __m256*);

// Loops by the count of rows of x, for one panel and then for `panels`.
struct Loops {
  Multiply one[kRows], together[kRows];
  int64_t panels;
};

template <class Block, class Scale>
const Loops* by_count() {
  constexpr int kPanels = Block::kPanels;
  static constexpr Loops loops = {
      {multiply<Block, Scale, 1, 1>, multiply<Block, Scale, 2, 1>, multiply<Block, Scale, 3, 1>,
       multiply<Block, Scale, 4, 1>},
      {multiply<Block, Scale, 1, kPanels>, multiply<Block, Scale, 2, kPanels>,
       multiply<Block, Scale, 3, kPanels>, multiply<Block, Scale, 4, kPanels>},
      kPanels};
  return &loops;
}

template <class Block>
const Loops* by_scale(ScalarType scale) {
  if (scale == ScalarType::BFloat16) return by_count<Block, BFloat16>();
  return scale == ScalarType::Half ? by_count<Block, Half>() : by_count<Block, float>();
}

template <class Block>
const Loops* by_digit(ScalarType scale, bool halves) {
  return halves ? by_scale<Halves<Block>>(scale) : by_scale<Block>(scale);
}

template <class T>
void run(const Weight& w, const Loops* loops, const void* x_data, int64_t rows,
         int64_t columns, const std::vector<float>& bias, void* out_data, int64_t n) {
  const T* x = static_cast<const T*>(x_data);
  T* out = static_cast<T*>(out_data);
  static thread_local Rounded kept;
  Rounded& rounded = kept;  // that of this thread, also inside the loops of others
  rounded.codes.resize(rows * w.blocks * kBlock);
  rounded.scale.resize(rows * w.blocks);
  rounded.sum.resize(rows * w.blocks);
  rounded.half.resize(rows * w.blocks);
  const int64_t whole = columns / kBlock;
  torch::stable::parallel_for(
      0, rows, std::max<int64_t>(1, kGrain / 8 / columns), [&](int64_t from, int64_t to) {
        for (int64_t m = from; m < to; ++m) {
          const T* row = x + m * columns;
          for (int64_t b = 0; b < whole; ++b) rounded.block(row + b * kBlock, m * w.blocks + b);
          if (whole < w.blocks)
            rounded.short_block(row + whole * kBlock, columns - whole * kBlock,
                                m * w.blocks + whole);
        }
      });
  const int64_t panels = (n + kLanes - 1) / kLanes, step = loops->panels;
  const int64_t grain = std::max<int64_t>(1, kGrain / (step * kLanes * columns * rows));
  torch::stable::parallel_for(0, (panels + step - 1) / step, grain, [&](int64_t from, int64_t to) {
    for (int64_t panel = from * step; panel < std::min(to * step, panels); panel += step) {
      const int64_t here = panel + step <= panels ? step : 1, row = panel * kLanes;
      const Multiply* products = here == step ? loops->together : loops->one;
      for (int64_t first = 0; first < rows; first += kRows) {
        const int64_t count = std::min(kRows, rows - first);
        __m256 sums[kPair * kRows];
        products[count - 1](w, panel, rounded, first, sums);
        for (int64_t part = 0; part < here * count; ++part) {
          alignas(32) float lanes[kLanes];
          _mm256_store_ps(lanes, sums[part]);
          const int64_t left = row + part / count * kLanes;
          T* to_row = out + (first + part % count) * n + left;
          for (int64_t lane = 0; lane < std::min(kLanes, n - left); ++lane)
            store(lanes[lane] + (bias.empty() ? 0.0f : bias[left + lane]), to_row + lane);
        }
      }
    }
  });
  if (rounded.codes.size() > kKept) rounded = Rounded{};
}

// The number of groups.  The op can be called with anything: what would be read out of bounds is
// refused.
int64_t check_weight(const Tensor& packed, const Tensor& scale, const std::optional<Tensor>& zero,
                  const std::optional<Tensor>& table, const std::optional<Tensor>& bias,
                  int64_t bits, bool floats, int64_t group_size, int64_t n) {
  const auto bytes = [](const Tensor& t) {
    return t.scalar_type() == ScalarType::Byte && t.is_contiguous();
  };
  STD_TORCH_CHECK(packed.dim() == 3, "quantkit::int8_dot: packed has ", packed.dim(),
                  " dimensions, not 3");
  const int64_t panels = packed.size(0), blocks = packed.size(1);
  const bool halves = 2 * group_size == kBlock;
  STD_TORCH_CHECK((bits == 4 || bits == 8) && group_size >= 0 &&
                      (halves || group_size % kBlock == 0),
                  "quantkit::int8_dot: ", bits, " bits in groups of ", group_size);
  STD_TORCH_CHECK(bytes(packed) && packed.size(2) == kBlock * bits &&
                      n > (panels - 1) * kLanes && n <= panels * kLanes,
                  "quantkit::int8_dot: packed is not what int8_dot.pack gives for ", n, " rows");
  const int64_t per_group = group_size ? std::max<int64_t>(1, group_size / kBlock) : blocks;
  const int64_t groups = halves ? 2 * blocks : (blocks + per_group - 1) / per_group;
  const auto per_group_of = [&](const Tensor& t) {
    return t.dim() == 3 && t.size(0) == panels && t.size(1) == groups && t.size(2) == kLanes;
  };
  const ScalarType dtype = scale.scalar_type();
  STD_TORCH_CHECK((dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
                   dtype == ScalarType::Half) &&
                      scale.is_contiguous() && per_group_of(scale),
                  "quantkit::int8_dot: scale must be contiguous floats [", panels, ", ", groups,
                  ", 8]");
  STD_TORCH_CHECK(!zero || (bytes(*zero) && per_group_of(*zero)),
                  "quantkit::int8_dot: zero must be contiguous bytes of the shape of scale");
  STD_TORCH_CHECK(!table || (bits == 4 && bytes(*table) && table->dim() == 2 &&
                             (table->size(0) == 1 || table->size(0) == 2) && table->size(1) == 16),
                  "quantkit::int8_dot: table must be contiguous bytes [1 or 2, 16], for 4 bits");
  STD_TORCH_CHECK(!floats || (bits == 8 && !zero),
                  "quantkit::int8_dot: floats have 8 bits and no zero");
  STD_TORCH_CHECK(!halves || !(floats || (table && table->size(0) == 2)),
                  "quantkit::int8_dot: groups of 16 are of integers or of codes for one digit");
  STD_TORCH_CHECK(!bias || bias->numel() == n, "quantkit::int8_dot: bias must have ", n,
                  " numbers");
  return groups;
}

}  // namespace

// x [..., K] in float32, bfloat16 or float16 -> [..., out_features] in the same dtype.
Tensor int8_dot(Tensor x, Tensor packed, Tensor scale, std::optional<Tensor> zero,
                std::optional<Tensor> table, std::optional<Tensor> bias, int64_t bits, bool floats,
                int64_t group_size, int64_t out_features) {
  const int64_t groups =
      check_weight(packed, scale, zero, table, bias, bits, floats, group_size, out_features);
  const int64_t columns = x.dim() ? x.size(-1) : 0, blocks = packed.size(1);
  STD_TORCH_CHECK(columns > 0 && (columns + kBlock - 1) / kBlock == blocks,
                  "quantkit::int8_dot: x has ", columns, " columns, the weight ", blocks,
                  " blocks of 32");
  const int64_t rows = x.numel() / columns;
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = out_features;
  Tensor out = torch::stable::new_empty(x, shape);
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Half,
                  "quantkit::int8_dot: x must be float32, bfloat16 or float16");
  if (rows == 0) return out;
  const Tensor flat = x.is_contiguous() ? x : torch::stable::contiguous(x);
  const auto bytes = [](const std::optional<Tensor>& tensor) {
    return tensor ? static_cast<const uint8_t*>(tensor->const_data_ptr()) : nullptr;
  };
  const bool one_digit = table && table->size(0) == 1;
  const float middle = one_digit ? 12.0f : table ? 8192.0f : floats ? 0.0f : bits == 4 ? 8.0f : 128.0f;
  const Weight weight{bytes(packed), scale.const_data_ptr(), bytes(zero), bytes(table), middle,
                      blocks, group_size ? std::max<int64_t>(1, group_size / kBlock) : blocks,
                      groups};
  std::vector<float> added;
  if (bias) {
    const Tensor wide = torch::stable::to(*bias, ScalarType::Float);
    const Tensor dense = torch::stable::contiguous(wide);
    const float* from = static_cast<const float*>(dense.const_data_ptr());
    added.assign(from, from + out_features);
  }
  const ScalarType scales = scale.scalar_type();
  const bool halves = 2 * group_size == kBlock;
  const Loops* loops = one_digit   ? by_digit<Digit>(scales, halves)
                       : table     ? by_scale<Codebook>(scales)
                       : floats    ? by_scale<Floats>(scales)
                       : bits == 4 ? by_digit<Integers<4>>(scales, halves)
                                   : by_digit<Integers<8>>(scales, halves);
  const void* data = flat.const_data_ptr();
  void* to = out.mutable_data_ptr();
  if (dtype == ScalarType::BFloat16)
    run<BFloat16>(weight, loops, data, rows, columns, added, to, out_features);
  else if (dtype == ScalarType::Half)
    run<Half>(weight, loops, data, rows, columns, added, to, out_features);
  else
    run<float>(weight, loops, data, rows, columns, added, to, out_features);
  return out;
}

#ifndef QUANTKIT_LIBRARY
#define QUANTKIT_LIBRARY quantkit  // another name to load two builds into one process
#endif

STABLE_TORCH_LIBRARY_IMPL(QUANTKIT_LIBRARY, CPU, m) {
  m.impl("int8_dot", TORCH_BOX(&int8_dot));
  m.impl("int8_dot_fixed", TORCH_BOX(&int8_dot));
}
