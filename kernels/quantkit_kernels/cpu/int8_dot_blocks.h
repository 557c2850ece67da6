// Eight rows by 32 columns of a weight in registers, and their products with x; see int8_dot.cpp.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

// The dot product of four unsigned with four signed bytes, added to every lane.
#if defined(QUANTKIT_PLAIN_DOT)
static inline __m256i plain_dot(__m256i sum, __m256i u8, __m256i s8) {  // to test the road on AVX2
  alignas(32) int32_t lanes[8];
  alignas(32) uint8_t left[32];
  alignas(32) int8_t right[32];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sum);
  _mm256_store_si256(reinterpret_cast<__m256i*>(left), u8);
  _mm256_store_si256(reinterpret_cast<__m256i*>(right), s8);
  for (int i = 0; i < 32; ++i) lanes[i / 4] += left[i] * right[i];
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(lanes));
}
#define QUANTKIT_DOT plain_dot
#elif defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define QUANTKIT_DOT _mm256_dpbusd_epi32
#elif defined(__AVXVNNI__)
#define QUANTKIT_DOT _mm256_dpbusd_avx_epi32
#endif

namespace {

// Panels that share what is loaded of x, where 32 registers hold the blocks of both.
#if defined(__AVX512VL__)
constexpr int kPair = 2;
#else
constexpr int kPair = 1;
#endif

inline __m256i four_columns(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}

struct Weight {
  const uint8_t* packed;  // [N/8, K/32, bytes]
  const void* scale;      // [N/8, G, 8]
  const uint8_t* zero;    // [N/8, G, 8], or null where all are `middle`
  const uint8_t* table;   // [1 or 2, 16]: the digits of a codebook, high ones first, or null
  float middle;
  int64_t blocks, group_blocks, groups;
};

// Eight rows by 32 columns of the weight in registers; their products are with code - kShift.
// kMost is the largest 4-bit code, or what it stands for.  A block has kParts scales, each of its
// share of the columns: `dot` is the sum over one of them.
template <int kBits, int kMost = 15>
struct Integers {
  static constexpr int64_t kBytes = 32 * kBits;
  static constexpr int kPanels = kPair;
  static constexpr int kParts = 1;
#ifdef QUANTKIT_DOT
  static constexpr float kShift = 0;
#else
  static constexpr float kShift = kBits == 8 ? 128 : 0;
#endif
  __m256i part[8];

  Integers(const Weight&, const uint8_t* packed) {
    const __m256i* from = reinterpret_cast<const __m256i*>(packed);
    if constexpr (kBits == 4) {
      const __m256i low = _mm256_set1_epi8(15);
      for (int j = 0; j < 4; ++j) {
        const __m256i both = _mm256_loadu_si256(from + j);
        part[2 * j] = _mm256_and_si256(both, low);
        part[2 * j + 1] = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
      }
    } else {
      const __m256i shift = _mm256_set1_epi8(kShift == 0 ? 0 : static_cast<char>(-128));
      for (int j = 0; j < 8; ++j)
        part[j] = _mm256_xor_si256(_mm256_loadu_si256(from + j), shift);
    }
  }

  template <int>
  __m256i dot(const int8_t* x) const {
    return sum<0, 8>(x);
  }

  // Over columns 4 · kFrom to 4 · kTo.
  template <int kFrom, int kTo>
  __m256i sum(const int8_t* x) const {
#ifdef QUANTKIT_DOT
    __m256i sum = _mm256_setzero_si256();
    for (int j = kFrom; j < kTo; ++j) sum = QUANTKIT_DOT(sum, part[j], four_columns(x + 4 * j));
    return sum;
#else
    // Pairs of products that can be added in 16 bits.
    constexpr int kPairs = 32767 / (2 * kMost * 127) >= 8 ? 8 : 4;
    static_assert(kPairs * 2 * kMost * 127 < 32768);
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sum = _mm256_setzero_si256(), pairs16 = _mm256_setzero_si256();
    for (int j = kFrom; j < kTo; ++j) {
      const __m256i four = four_columns(x + 4 * j);
      if constexpr (kBits == 4) {
        pairs16 = _mm256_add_epi16(pairs16, _mm256_maddubs_epi16(part[j], four));
        if ((j + 1) % kPairs == 0 || j + 1 == kTo) {
          sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs16, ones));
          pairs16 = _mm256_setzero_si256();
        }
      } else {
        const __m256i size = _mm256_abs_epi8(part[j]), signed_x = _mm256_sign_epi8(four, part[j]);
        const __m256i pairs = _mm256_maddubs_epi16(size, signed_x);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
      }
    }
    return sum;
#endif
  }
};

// The same with codes that stand for sixteen values, which lie in 0..24.
struct Digit : Integers<4, 24> {
  Digit(const Weight& w, const uint8_t* packed) : Integers<4, 24>(w, packed) {
    const __m128i* table = reinterpret_cast<const __m128i*>(w.table);
    const __m256i digits = _mm256_broadcastsi128_si256(_mm_loadu_si128(table));
    for (__m256i& one : part) one = _mm256_shuffle_epi8(digits, one);
  }
};

// The same with a scale for each 16 columns.
template <class Block>
struct Halves : Block {
  static constexpr int kParts = 2;
  using Block::Block;

  template <int kPart>
  __m256i dot(const int8_t* x) const {
    return this->template sum<4 * kPart, 4 * kPart + 4>(x);
  }
};

// The same with codes that stand for sixteen values, which lie in 0..2^14 - 1.
struct Codebook {
  static constexpr int64_t kBytes = Integers<4>::kBytes;
  static constexpr int kPanels = 1;
  static constexpr int kParts = 1;
  static constexpr float kShift = 0;
  Integers<4> codes;
  __m256i high, low;

  Codebook(const Weight& w, const uint8_t* packed) : codes(w, packed) {
    const __m128i* table = reinterpret_cast<const __m128i*>(w.table);
    high = _mm256_broadcastsi128_si256(_mm_loadu_si128(table));
    low = _mm256_broadcastsi128_si256(_mm_loadu_si128(table + 1));
  }

  template <int>
  __m256i dot(const int8_t* x) const {
    __m256i highs = _mm256_setzero_si256(), lows = _mm256_setzero_si256();
    for (int j = 0; j < 8; ++j) {
      const __m256i four = four_columns(x + 4 * j);
      const __m256i digit1 = _mm256_shuffle_epi8(high, codes.part[j]);
      const __m256i digit0 = _mm256_shuffle_epi8(low, codes.part[j]);
#ifdef QUANTKIT_DOT
      highs = QUANTKIT_DOT(highs, digit1, four);
      lows = QUANTKIT_DOT(lows, digit0, four);
#else
      const __m256i ones = _mm256_set1_epi16(1);
      highs = _mm256_add_epi32(highs, _mm256_madd_epi16(_mm256_maddubs_epi16(digit1, four), ones));
      lows = _mm256_add_epi32(lows, _mm256_madd_epi16(_mm256_maddubs_epi16(digit0, four), ones));
#endif
    }
    return _mm256_add_epi32(_mm256_slli_epi32(highs, 7), lows);
  }
};

// The same with e4m3 numbers in sixteenths, those of even and of odd columns in 16 bits.
struct Floats {
  static constexpr int64_t kBytes = Integers<8>::kBytes;
  static constexpr int kPanels = 1;
  static constexpr int kParts = 1;
  static constexpr float kShift = 0;
  __m256i even[8], odd[8];

  Floats(const Weight&, const uint8_t* packed) {
    // Sixteenths are (8 + mantissa) · 2^(exponent - 6).  vpmulhrsw gives a · b / 2^15, rounded: a is
    // (8 + mantissa) · 2^11 and b 2^(exponent - 2), whose two bytes are looked up.  Exponents 0 and
    // 1 are less than half a sixteenth.
    const __m128i b0 = _mm_setr_epi8(0, 0, 1, 2, 4, 8, 16, 32, 64, -128, 0, 0, 0, 0, 0, 0);
    const __m128i b1 = _mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 4, 8, 16, 32);
    const __m256i power0 = _mm256_broadcastsi128_si256(b0);
    const __m256i power1 = _mm256_broadcastsi128_si256(b1);
    const __m256i byte = _mm256_set1_epi16(255);
    for (int j = 0; j < 8; ++j) {
      const __m256i code = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed) + j);
      const __m256i mantissa = _mm256_and_si256(code, _mm256_set1_epi8(7));
      const __m256i number = _mm256_or_si256(mantissa, _mm256_set1_epi8(8));
      const __m256i exponent =
          _mm256_and_si256(_mm256_srli_epi16(code, 3), _mm256_set1_epi8(15));
      const __m256i low = _mm256_shuffle_epi8(power0, exponent);
      const __m256i high = _mm256_shuffle_epi8(power1, exponent);
      const __m256i size0 = _mm256_mulhrs_epi16(
          _mm256_slli_epi16(_mm256_and_si256(number, byte), 11),
          _mm256_or_si256(_mm256_and_si256(low, byte), _mm256_slli_epi16(high, 8)));
      const __m256i size1 = _mm256_mulhrs_epi16(
          _mm256_slli_epi16(_mm256_srli_epi16(number, 8), 11),
          _mm256_or_si256(_mm256_srli_epi16(low, 8), _mm256_andnot_si256(byte, high)));
      even[j] = _mm256_sign_epi16(size0, _mm256_slli_epi16(code, 8));
      odd[j] = _mm256_sign_epi16(size1, code);
    }
  }

  template <int>
  __m256i dot(const int8_t* x) const {
    __m256i sum = _mm256_setzero_si256();
    for (int j = 0; j < 8; ++j) {
      const __m256i four = four_columns(x + 4 * j);
      const __m256i x0 = _mm256_srai_epi16(_mm256_slli_epi16(four, 8), 8);
      const __m256i x1 = _mm256_srai_epi16(four, 8);
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(even[j], x0));
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(odd[j], x1));
    }
    return sum;
  }
};

}  // namespace
