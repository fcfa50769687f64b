// Few rows of activations, so that memory sets the pace: rows of a weight that lie far apart go side by side, each from
// the first to the last of a part of all, and memory is read as so many streams.
namespace {

// Bytes that streams together ask for ahead: what memory takes its time for, yet a small part of the cache.
constexpr int64_t kInFlight = 8192;

// row_grid with room behind scales and zeros for `Isa::picked`, which reads a whole vector from any group on: `scratch`
// holds 2 * groups + kWidest floats.
inline RowGrid roomy_grid(const Packed& w, int64_t n, float* scratch) {
  const RowGrid stored = row_grid(w, n, scratch);
  if (w.half) return stored;
  std::memcpy(scratch, stored.scale, w.groups * sizeof(float));
  if (w.zero_each) std::memcpy(scratch + w.groups, stored.zero, w.groups * sizeof(float));
  return {scratch, w.zero_each ? scratch + w.groups : stored.zero, stored.step};
}

// tile(n, apart, grid, y) computes rows n, n + apart, ..., R of them, of n..n1. Returns where those begin that are
// left. Inlined with the tile: called, rows of 2-bit codes would take a tenth more.
template <int R, class F>
[[gnu::always_inline]] inline int64_t in_streams(const Packed& w, int64_t n, int64_t n1, float* y, float* scratch,
                                                 F tile) {
  const int64_t apart = (n1 - n) / R;
  for (const int64_t end = n + apart; n < end; ++n, ++y) {
    RowGrid grid[R];
    for (int r = 0; r < R; ++r) grid[r] = roomy_grid(w, n + r * apart, scratch + r * (2 * w.groups + mpq::kWidest));
    tile(n, apart, grid, y);
  }
  return n + (R - 1) * apart;
}

}  // namespace
