// Which codes memory is asked for while products with 8-bit activations read others. Included by kernels.inl.
namespace {

using mpq::kLine;

// Memory gives more where it is asked for several pages in turn, whatever reads them later: a Zen 3 core 23 GB/s, and
// 17 for one page after the other. Each TURN bytes of codes stand for some of the next kTurnBlock, in the order of so
// many streams.
constexpr uint64_t kTurnStreams = 4, kTurnBlock = 65536;

template <uint64_t TURN>
inline const uint8_t* in_turn(const uint8_t* codes) {
  const uint64_t turn = reinterpret_cast<uint64_t>(codes) % kTurnBlock / TURN;
  const uint64_t moved = turn % kTurnStreams * (kTurnBlock / TURN / kTurnStreams) + turn / kTurnStreams;
  return codes + (kTurnBlock + (moved - turn) * TURN);
}

// Which codes memory is asked for while others are read: as many, so far ahead, or, where there is an end, `in_turn` up
// to there. Where that may be, tiles that lie side by side ask for a part each.
struct Asked {
  int64_t ahead;
  const uint8_t* until;
  const uint8_t *begin, *part;  // the tile's first codes, and the first of its part

  template <int BITS, int V>
  static constexpr int64_t kParts = Isa::template kInTurn<BITS> ? kPanel / (V * Isa::kWidth) : 1;

  // What codes stand for, or null.
  template <int BITS, int V>
  const uint8_t* soon(const uint8_t* codes) const {
    constexpr int64_t kDivided = kParts<BITS, V>;
    const uint8_t* const at = kDivided == 1 ? codes : part + (codes - begin) / kDivided;
    if constexpr (Isa::template kInTurn<BITS>)
      if (until) {
        const uint8_t* const far = in_turn<256 * kDivided>(at);
        return far < until ? far : nullptr;
      }
    return ahead ? at + ahead : nullptr;
  }
  // Inlined in any case: compilers drop calls of what does nothing but ask.
  template <int BITS, int V, int64_t BYTES>
  [[gnu::always_inline]] void fetch(const uint8_t* codes) const {
    constexpr int64_t kOnce = BYTES < 256 ? BYTES : 256;
    MPQ_UNROLL for (int64_t done = 0; done < BYTES / kParts<BITS, V>; done += kOnce) {
      const uint8_t* const from = soon<BITS, V>(codes + done);
      const uint8_t* const some = from ? from : codes;
      MPQ_UNROLL for (int64_t i = 0; i < kOnce; i += kLine) __builtin_prefetch(some + i, 0, 2);
    }
  }
};

}  // namespace
