// Depthwise convolution of 8-bit activations with vectors along channels: over a copy of some rows as bytes, four taps
// of a channel to each product.
#include "depthwise_rows.h"

namespace mpq {
namespace {

constexpr int64_t kBlocks = 8;  // whose results are found together, so that more of a pixel's lie together: measured
constexpr int64_t kTilesEarly = 4;  // that are computed while memory answers
constexpr int64_t kNarrow = 12;     // rows of fewer pixels are turned as floats: each one costs as much as a wider one

// Weights as `filter_quads` takes them.
struct QuadFilters {
  const QuadShape shape;
  const int64_t blocks;
  Buffer<uint32_t> weights, rest;  // as `quad_weights` makes them, block after block
  Buffer<int32_t> sums;
  Buffer<float> scale, bias;

  QuadFilters(const ConvArgs& a, const Filters& f)
      : shape{a.kernel[0], a.kernel[1], a.stride[1], f.most > float(kByteMost)},
        blocks(lane_blocks(a.groups)),
        weights(blocks * shape.words()),
        rest(shape.halved ? blocks * shape.words() : 0),
        sums(blocks * shape.sums()),
        scale(blocks * kLanes),
        bias(blocks * kLanes) {
    for (Buffer<float>* b : {&scale, &bias}) std::memset(*b, 0, blocks * kLanes * sizeof(float));
    std::memcpy(scale, f.scale, a.groups * sizeof(float));
    std::memcpy(bias, f.bias, a.groups * sizeof(float));
    const Packed& w = a.weight;
    parallel_for(blocks, ceil_div(kConvGrain, 2 * kLanes * w.kp), [&](int64_t begin, int64_t end) {
      Buffer<uint8_t> codes(kLanes * w.kp + kCodesPast);
      std::memset(codes, 0, kLanes * w.kp + kCodesPast);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i * kLanes, used = std::min(kLanes, a.groups - n);
        int32_t offsets[kLanes] = {};
        for (int64_t j = 0; j < used; ++j) offsets[j] = f.offset(n + j);
        kernels().unpack(w.row(n), w.bits, codes, used * w.kp);
        std::memset(codes + used * w.kp, 0, (kLanes - used) * w.kp);
        kernels().quad_weights(shape, codes, w.kp, f.each(), offsets, weights + i * shape.words(),
                               shape.halved ? rest + i * shape.words() : nullptr, sums + i * shape.sums());
      }
    });
  }
};

// Rows of results from a copy of rows of pixels, in blocks [row][quad][kLanes][4] of channels.
struct QuadRows {
  using Weights = QuadFilters;
  static bool takes_planes(const ConvArgs& a) { return a.width >= kNarrow; }

  struct Run {  // of rows of results that meet the same rows of taps
    int64_t first, rows;
    TapRows taps;  // of the first one
  };

  const ConvArgs& a;
  const int64_t steps, row, block;  // steps: quads that a row of taps meets; row, block: bytes
  Buffer<uint8_t> data;
  std::vector<int64_t> offsets;
  std::vector<Run> runs;
  Buffer<float> scale;
  Buffer<uint8_t> room;  // for planes, or null
  Landing landing;

  // Bytes of a copied row of so many channels.
  static int64_t row_bytes(const ConvArgs& a, int64_t channels) { return quads(a) * kQuad * lane_blocks(channels); }

  QuadRows(const ConvArgs& args, int64_t channels, int64_t out_rows, bool turn)
      : a(args),
        steps(quad_steps(a.kernel[1], a.stride[1])),
        row(quads(a) * kQuad),
        block(RowsIn::most(a, out_rows) * row),
        data(lane_blocks(channels) * block),
        scale(lane_blocks(channels) * kLanes),
        room(turn && takes_planes(a) ? plane_room(row) : 0),
        landing(a, true) {
    std::memset(data, 128, lane_blocks(channels) * block);
    if (room) std::memset(room, 128, plane_room(row));
    for (int64_t k = 0; k < a.kernel[0]; ++k)
      for (int64_t i = 0; i < steps; ++i) offsets.push_back(k * a.dilation[0] * row + i * kQuad);
  }

  // As FloatRows::filter.
  bool filter(const Filters&, const QuadFilters& w, int64_t c0, int64_t channels, const Input& x, int64_t first,
              int64_t last, const float* act, const Output& y) {
    const RowsIn in(a, first, last);
    bool finite = true;
    if (room)
      finite = kernels().quads_of_planes(x.floats + in.y0 * a.width, x.plane, in.y1 - in.y0, a.width, channels, *act,
                                         a.padding[1], data, row, room);
    for (int64_t i = in.y0; !room && i < in.y1; ++i) {
      uint8_t* out = data + (i - in.y0) * row;
      if (x.bytes)
        kernels().quads_of_bytes(x.bytes + i * x.row, x.pixel, a.width, channels, a.padding[1], out, block);
      else
        finite &=
            kernels().quads_of_floats(x.floats + i * x.row, x.pixel, a.width, channels, *act, a.padding[1], out, block);
    }
    for (int64_t i = 0; i < lane_blocks(channels) * kLanes; ++i) scale[i] = w.scale[c0 + i] * *act;
    QuadTask r;
    r.offsets = offsets.data(), r.step = a.stride[1], r.out_width = a.out_width;
    r.x_row = a.stride[0] * row, r.range = range_of(a.activation);
    if (y.bytes) r.grid = byte_grid(a);
    runs.clear();
    for (int64_t i = first; i < last; ++i)
      if (const TapRows taps(a, i); runs.empty() || taps.k0 != runs.back().taps.k0 || taps.k1 != runs.back().taps.k1)
        runs.push_back({i, 1, taps});
      else
        ++runs.back().rows;
    QuadBlock group[kBlocks];
    r.block = group;
    for (int64_t c = 0, count; c < channels; c += count) {
      r.blocks = landing.direct(y) ? std::clamp((channels - c) / kLanes, int64_t(1), kBlocks) : 1;
      count = r.blocks * kLanes;
      for (const Run& run : runs) {
        r.steps = (run.taps.k1 - run.taps.k0) * steps;
        for (int64_t i = 0; i < run.rows; i += r.rows) {
          for (int64_t b = 0; b < r.blocks; ++b)
            group[b] = at(w, c0, c + b * kLanes, run.taps, run.taps.y - in.y0 + i * a.stride[0]);
          r.rows = landing.aim(y, run.first + i, run.rows - i, c, count, std::min(count, channels - c));
          r.far = landing.far, r.soon = landing.asks() ? ceil_div(kTilesEarly, r.blocks) * landing.row : 0;
          r.y = landing.data, r.y8 = landing.bytes, r.y_row = landing.row, r.y_pixel = landing.pixel;
          finite &= kernels().filter_quads(r);
          finite &= landing.land(true, run.first + i + r.rows == last);
        }
      }
    }
    return finite;
  }

 private:
  // What kLanes channels from c on meet, c0 + c of the weight, with the first of `taps` in a row of the copy.
  QuadBlock at(const QuadFilters& w, int64_t c0, int64_t c, const TapRows& taps, int64_t y) const {
    const int64_t filters = (c0 + c) / kLanes;
    const int64_t words = filters * w.shape.words() + taps.k0 * steps * (2 / a.stride[1]) * kLanes;
    const int32_t* sums = w.sums + filters * w.shape.sums();
    return {data + c / kLanes * block + y * row,
            w.weights + words,
            w.shape.halved ? w.rest + words : nullptr,
            sums + taps.k0 * kLanes,
            sums + taps.k1 * kLanes,
            scale + c,
            w.bias + c0 + c};
  }

  // In a padded row: those that its pixels touch, and those that results do.
  static int64_t quads(const ConvArgs& a) {
    return std::max(ceil_div(a.padding[1] + a.width, int64_t(4)),
                    ceil_div(a.out_width * a.stride[1], int64_t(4)) + quad_steps(a.kernel[1], a.stride[1]));
  }
};

}  // namespace

bool takes_quads(const ConvArgs& a, const Filters& f) {
  return a.act8 && f.centered && f.most <= float(kernels().quad_most) && (a.dilation[1] == 1 || a.kernel[1] == 1) &&
         a.stride[1] <= 2;
}

void depthwise_quads(const ConvArgs& a, const Filters& f, bool turn, const Scales8& scales, Spoiled& spoiled) {
  by_rows<QuadRows>(a, f, turn, scales, spoiled);
}

}  // namespace mpq
