// Tokens as rows, up to 128 channels: a warp takes a row at a time, a lane four neighbouring channels of it. LayerNorm
// is done on the way from global to shared memory.
#pragma once

#include "tiles.h"

namespace msformer::gpu {

constexpr int MOST_CHANNELS = 128;

DEV int lane_channel() { return threadIdx.x % 32 * 4; }

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T value[4];
};

// The tokens of one image.
template <class T>
struct ImageTokens {
  Tokens tokens;
  std::int64_t image;
  int channels;
  bool aligned;  // four neighbours can be read and written at once

  DEV ImageTokens(const Tokens& tokens, std::int64_t image, int channels)
      : tokens(tokens), image(image), channels(channels) {
    aligned = tokens.channel_stride == 1 && (tokens.token_stride | tokens.batch_stride) % 4 == 0 &&
              reinterpret_cast<std::uintptr_t>(tokens.data) % sizeof(Four<T>) == 0;
  }

  // Four channels of a token; zeros beyond the last.
  DEV Four<T> load(std::int64_t token, int channel) const {
    const T* from = address<T>(tokens, image, token, channel);
    if (aligned && channel + 4 <= channels) return read(reinterpret_cast<const Four<T>*>(from));
    Four<T> four;
#pragma unroll
    for (int i = 0; i < 4; i++)
      four.value[i] = channel + i < channels ? read(from + i * tokens.channel_stride) : from_float<T>(0.0f);
    return four;
  }

  DEV void store(std::int64_t token, int channel, const float (&values)[4]) const {
    T* to = address<T>(tokens, image, token, channel);
    if (aligned && channel + 4 <= channels) {
      Four<T> four;
#pragma unroll
      for (int i = 0; i < 4; i++) four.value[i] = from_float<T>(values[i]);
      write(reinterpret_cast<Four<T>*>(to), four);
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (channel + i < channels) write(to + i * tokens.channel_stride, from_float<T>(values[i]));
  }
};

template <class T>
DEV void widen(float (&values)[4], const Four<T>& four) {
#pragma unroll
  for (int i = 0; i < 4; i++) values[i] = to_float(four.value[i]);
}

// This lane's share of a LayerNorm over the channels; without a weight it leaves rows as they are.
template <class T>
struct LaneNorm {
  float weight[4], bias[4], eps;
  int channels;
  bool on;

  DEV LaneNorm(const Parameter& w, const Parameter& b, int channels, float eps)
      : eps(eps), channels(channels), on(w.data != nullptr) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int c = lane_channel() + i;
      weight[i] = on && c < channels ? element<T>(w, c) : 0.0f;
      bias[i] = on && b.data && c < channels ? element<T>(b, c) : 0.0f;
    }
  }

  // A row to (x - mean) / deviation, zeros beyond the last channel; returns 1 / deviation. The deviations are summed
  // from the values again, so that a large mean costs no digits.
  DEV float normalize(float (&x)[4]) const {
    const float mean = warp_sum((x[0] + x[1]) + (x[2] + x[3])) / static_cast<float>(channels);
    float squares = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      x[i] = lane_channel() + i < channels ? x[i] - mean : 0.0f;
      squares += x[i] * x[i];
    }
    const float rstd = reciprocal_deviation(warp_sum(squares) / static_cast<float>(channels), eps);
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] *= rstd;
    return rstd;
  }

  DEV void apply(float (&x)[4]) const {
    if (!on) return;
    normalize(x);
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = x[i] * weight[i] + bias[i];
  }
};

// Rows `step` apart, on their way through the registers of a warp: to be fetched before, and put into a tile after what
// hides the latency of memory.
template <class T, int ROWS>
struct TokenRows {
  Four<T> row[ROWS];

  // Zeros from token `end` on.
  DEV void fetch(const ImageTokens<T>& x, std::int64_t token, int step, std::int64_t end) {
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
      if (token + i * step < end)
        row[i] = x.load(token + i * step, lane_channel());
      else
        for (int k = 0; k < 4; k++) row[i].value[k] = from_float<T>(0.0f);
    }
  }

  // Normalised; zeros where !exists(i), and in the columns up to a multiple of 16. each(i, values) sees what is put.
  template <class Exists, class Each>
  DEV void put(const LaneNorm<T>& norm, T* tile, int stride, int step, Exists exists, Each each) {
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
      float x[4] = {};
      if (exists(i)) {
        widen(x, row[i]);
        norm.apply(x);
      }
      each(i, x);
      if (lane_channel() >= round_up(norm.channels, 16)) continue;
      Four<T> four;
#pragma unroll
      for (int k = 0; k < 4; k++) four.value[k] = from_float<T>(x[k]);
      *reinterpret_cast<Four<T>*>(tile + i * step * stride + lane_channel()) = four;
    }
  }
};

// The sums of 16 rows of one warp, written as tokens, through a tile of theirs: row by row, `columns` float32 at a time
// in rows of `stride`. change(token, channel, values) sees four channels before they are rounded. Rows from token `end`
// on are left.
template <class T, int NJ, class Sums, class Change>
DEV void store_rows(const Sums& sums, float* tile, int stride, int columns, const ImageTokens<T>& to,
                    std::int64_t token, std::int64_t end, Change change) {
  constexpr int LANES = 8 * sizeof(T);  // of a row
  const int lane = threadIdx.x % 32;
  for (int first = 0; first < to.channels; first += columns) {
    __syncwarp();
#pragma unroll
    for (int j = 0; j < NJ; j++) {
      if (8 * j < first || 8 * j >= first + columns) continue;
#pragma unroll
      for (int q = 0; q < 4; q++) tile[Sums::row(q) * stride + Sums::column(j, q) - first] = sums.sum[j][q];
    }
    __syncwarp();
    for (int r = lane / LANES; r < 16; r += 32 / LANES) {
      const int c = lane % LANES * 4, channel = first + c;
      if (c >= columns || channel >= to.channels || token + r >= end) continue;
      Four<float> four = *reinterpret_cast<const Four<float>*>(tile + r * stride + c);
      change(token + r, channel, four.value);
      to.store(token + r, channel, four.value);
    }
  }
  __syncwarp();
}

}  // namespace msformer::gpu
