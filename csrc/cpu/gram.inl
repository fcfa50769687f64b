// Gram matrices, written over `Isa` like kernels.inl, which includes this.
namespace {

// T x T sums of vectors that run along the depth: features need no transposition, and each vector loaded serves T
// products. With AVX-512, 5 x 5 sums, 5 rows and a column fill 31 of 32 registers; smaller tiles wait for loads.
constexpr int T = Isa::kGramTile;
constexpr int kTileSums = int(mpq::ceil_div(T * T, Isa::kWidth)) * Isa::kWidth;
constexpr int64_t kGramGroup = 2 * T;  // rows that stay in the level 1 cache while columns go by

// A 32-bit word of a row holds one fp32 feature, or two of bf16.
template <bool PAIRS, class I = Isa>
inline typename I::Vec add_products(typename I::Vec a, typename I::Vec b, typename I::Vec sum) {
  if constexpr (PAIRS)
    return I::add_pairs(a, b, sum);
  else
    return I::multiply_add(a, b, sum);
}

// sums[r * T + c] += rows[r] . columns[c]; on the diagonal c <= r. Two rows of the next chunk are fetched from
// memory meanwhile, `size` bytes a word.
template <bool PAIRS, bool DIAGONAL>
inline void gram_tile(const float* rows, const float* columns, int64_t ld, int64_t depth, double* sums,
                      const char* next, const char* after, int size) {
  typename Isa::Vec acc[kTileSums];
  for (typename Isa::Vec& a : acc) a = Isa::zero();
  for (int64_t k = 0; k < depth; k += Isa::kWidth) {
    __builtin_prefetch(next + k * size, 0, 2);
    __builtin_prefetch(after + k * size, 0, 2);
    typename Isa::Vec a[T];
    for (int r = 0; r < T; ++r) a[r] = Isa::load(rows + r * ld + k);
    for (int c = 0; c < T; ++c) {
      const typename Isa::Vec b = DIAGONAL ? a[c] : Isa::load(columns + c * ld + k);
      for (int r = DIAGONAL ? c : 0; r < T; ++r) acc[r * T + c] = add_products<PAIRS>(a[r], b, acc[r * T + c]);
    }
  }
#pragma GCC unroll 2
  for (int i = 0; i < kTileSums; i += Isa::kWidth) {
    float sum[Isa::kWidth];
    Isa::store(sum, Isa::sums(acc + i));
    for (int j = 0; j < Isa::kWidth; ++j) sums[i + j] += sum[j];
  }
}

template <bool PAIRS>
void gram(const float* x, int64_t n, int64_t ld, int64_t depth, double* sums, const mpq::Rows& next) {
  const int size = PAIRS ? 2 * next.size() : next.size();
  int64_t fetched = 0;
  auto row = [&] { return next.row(fetched < next.count ? fetched++ : 0); };
  for (int64_t g = 0; g < n; g += kGramGroup) {
    const int64_t end = g + kGramGroup < n ? g + kGramGroup : n;
    for (int64_t j = 0; j < end; j += T)
      for (int64_t i = g > j ? g : j; i < end; i += T) {
        const char *first = row(), *second = row();
        auto tile = i == j ? gram_tile<PAIRS, true> : gram_tile<PAIRS, false>;
        tile(x + i * ld, x + j * ld, ld, depth, sums + mpq::gram_tile_index(i / T, j / T) * kTileSums, first, second,
             size);
      }
  }
}

constexpr decltype(&gram<false>) gram_pairs() {
  if constexpr (Isa::kPairs)
    return gram<true>;
  else
    return nullptr;
}

}  // namespace
