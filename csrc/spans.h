// In which stretches sums over codes and 8-bit activations run, on every device alike: so results are, too.
#pragma once
#include "packed.h"

namespace mpq {

// Stretches of k over which codes times 8-bit activations are summed as integers: a group, or an even part of one, so
// short that the sums stay below 2^24 and are exact as floats, too (and far below the 2^31 of an int32).
struct Spans {
  int64_t group, kp, per_group, length, count;

  MPQ_HD explicit Spans(const Packed& w) : group(w.group < w.kp ? w.group : w.kp), kp(w.kp) {
    const int64_t most = (int64_t(1) << 24) / (max_code(w.bits) * 127) / kBlock * kBlock;  // 8 bits: 512
    per_group = ceil_div(group, most);
    length = padded(ceil_div(group, per_group));
    per_group = ceil_div(group, length);
    count = kp / group * per_group + ceil_div(kp % group, length);
  }
  MPQ_HD int64_t begin(int64_t s) const { return s / per_group * group + s % per_group * length; }
  MPQ_HD int64_t end(int64_t s) const { return s + 1 < count ? begin(s + 1) : kp; }
};

}  // namespace mpq
