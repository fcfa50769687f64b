// The matrix kernels of `linear`, their task, and which of them serves what. No kernels in here.
#pragma once
#include <algorithm>
#include <numeric>

#include "fragments.h"

namespace mpq {

enum class Type { f32, f16, bf16, int8 };  // int8: activations that are rounded

// y[M][N] = x[M][K] . weight^T + bias, for one of the kernels below.
struct LinearTask {
  Packed weight;  // its codes are not read
  const void* fragments = nullptr;
  const void* x = nullptr;  // `warpgroup`: as mpq_arrange makes it
  int64_t x_ld = 0;         // elements from row to row. Of `many`: the rows start on 16 bytes, and are 0 from K on
  // `many`: of a token's activations in a unit of k, fp32 [units][sums_ld]; int8: then their scales, as many.
  // `warpgroup`: in every group, or where the row is one group, in every split
  const float* sums = nullptr;
  int64_t sums_ld = 0;
  const float* bias = nullptr;
  void* y = nullptr;
  float* partial = nullptr;  // [splits][M][N] where there are several splits, which `join` adds up
  int64_t m = 0;
  int type = 0;    // a Type: of x and y, or of y alone in `many` with int8
  int splits = 1;  // of k, each `per_split` tiles (few) or steps (many, warpgroup) long
  int64_t per_split = 0;
};

constexpr int kFewTokens = 16;
constexpr int64_t kRowsOfMany = 128, kStripsOfFew = 8;  // weight rows and strips of a block of threads

// The depth of one step of `many`.
MPQ_HD constexpr int step_depth(int bits, bool int8) { return int8 || bits == 2 ? 128 : 64; }

// Sums are corrected by scale and zero at ends of groups. Where those are ends of tiles (few) or steps (many),
// one place in each is enough to look for them; else every 32 codes are looked at.
MPQ_HD constexpr bool ends_inside(int64_t group, int64_t groups, int64_t depth) {
  return groups > 1 && group % depth != 0;
}
MPQ_HD constexpr int sum_unit(bool fine, int step) { return fine ? int(kBlock) : step; }
MPQ_HD constexpr int64_t sum_units(int64_t kp, int unit) {  // whole steps of them
  return unit == kBlock ? ceil_div(kp, 128) * 4 : ceil_div(kp, unit);
}

struct LinearPlan {
  enum Kernel { dense, few, many, many_int8, warpgroup };  // dense: dequantize, then torch's product
  Kernel kernel = dense;
  int columns = 0;  // tokens of a block of threads
  int splits = 1;
  int64_t per_split = 0;
};

constexpr const char* name_of(LinearPlan::Kernel kernel) {
  constexpr const char* kNames[] = {"dense", "few", "many", "many_int8", "warpgroup"};
  return kNames[kernel];
}

// The count of splits that gives `blocks` blocks company, none shorter than `least` of the `length`, all but the last
// whole `chunks` of it.
inline void split(LinearPlan& plan, int64_t blocks, int64_t wanted, int64_t length, int64_t least, int64_t most,
                  int64_t chunk = 1) {
  const int64_t splits = std::max<int64_t>(1, std::min({wanted / std::max<int64_t>(1, blocks), length / least, most}));
  plan.per_split = ceil_div(ceil_div(length, splits), chunk) * chunk;
  plan.splits = int(ceil_div(length, plan.per_split));
}

// Splits of `warpgroup` are whole groups: the fewest steps that are.
inline int64_t steps_of_groups(int64_t group, int64_t groups, int step) {
  return groups == 1 ? 1 : std::lcm(group, int64_t(step)) / step;
}

// arch: 10 * major + minor. Depends on nothing else, so that results are the same on every GPU of an architecture.
// The thresholds come from a model of bandwidth and tensor core rates, not from measurements.
inline LinearPlan linear_plan(int arch, int64_t m, int64_t n, int64_t k, int bits, int64_t group, Type type) {
  LinearPlan plan;
  const int64_t kp = padded(k), groups = group ? ceil_div(kp, group) : 1;
  const int processors = arch == 80 ? 108 : arch == 86 ? 84 : arch >= 90 ? 132 : 128;
  const bool int8 = type == Type::int8;
  if (arch < 80 || type == Type::f32 || m == 0 || n == 0) return plan;
  if (!int8 && m <= kFewTokens) {
    plan.kernel = LinearPlan::few;
    plan.columns = m <= 8 ? 8 : 16;
    const int64_t depth = tile_depth(bits);
    split(plan, ceil_div(strips(n), kStripsOfFew), 2 * processors, tiles_deep(kp, bits), ceil_div(256, depth), 16);
    return plan;
  }
  // torch's product is nearer to the tensor cores' limit, but dequantizing for it moves 12 bytes a weight, 3 ps at
  // 4 TB/s. `warpgroup` should reach two thirds of Hopper's 790 TFLOP/s, since a block wants 40 bytes a clock of L2,
  // which gives some 28. Against 85% that costs 0.8 fs a weight and token, less than 3 ps up to 3000 tokens and more.
  // mma.sync, which cannot do two thirds of what is newer than sm_80, is overtaken sooner there.
  if (!int8 && m >= (arch > 90 ? 512 : 2048)) return plan;
  const int step = step_depth(bits, int8);
  // To 64 tokens memory takes the time, whatever multiplies.
  if (arch == 90 && !int8 && m > 64) {
    plan.kernel = LinearPlan::warpgroup;
    plan.columns = m <= 256 && (m - 1) % 128 < 64 ? 64 : 128;  // 129 to 192 tokens: three times 64
    const int64_t blocks = ceil_div(n, kRowsOfMany) * ceil_div(m, plan.columns);
    split(plan, blocks, processors, ceil_div(kp, step), 4, 8, steps_of_groups(group, groups, step));
    return plan;
  }
  plan.kernel = int8 ? LinearPlan::many_int8 : LinearPlan::many;
  plan.columns = m <= 32 ? 32 : m <= 64 || ends_inside(group, groups, step) ? 64 : 128;
  const int64_t blocks = ceil_div(n, kRowsOfMany) * ceil_div(m, plan.columns);
  split(plan, blocks, processors, ceil_div(kp, step), 4, 8);
  return plan;
}

// ---- one .cu file each ------------------------------------------------------------------------------

template <int bits>
int few(const LinearTask& task, void* stream);
template <int bits, class T>
int many(const LinearTask& task, int columns, void* stream);
template <int bits, class T>
int warpgroup(const LinearTask& task, int columns, void* stream);

}  // namespace mpq
