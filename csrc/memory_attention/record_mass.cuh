// The probability on each record, gathered while its tokens pass: weights go through shared memory, so that each lane
// has those of one query vector in order, and sums them record by record.
#pragma once

#include "memory_attention/attention_tile.cuh"

namespace m3::gpu {

// Columns of weights that are in shared memory at a time, and finished records that wait there.
constexpr int kMassColumns = 16;
constexpr int kMassRecords = 8;
// Floats from one waiting record to the next: against bank conflicts where few records of many rows are read.
constexpr int kMassPitch = 39;
// Bytes a warp needs: weights, waiting records, and per vector the sum of the record that is passing.
constexpr int kMassBytes = (kWarpRows * kMassColumns + kMassRecords * kMassPitch + 2 * kWarpRows) * 4;

// Nothing of it is in registers between two tiles.
class RecordMass {
 public:
  // `mass` [Tq, Hq, refs]; `place`: of this lane's vector in [Tq, Hq], -1 if there is none.
  M3_DEVICE RecordMass(float* mass, int64_t place, int64_t refs, int64_t tokens, char* shared)
      : mass_(mass), place_(place), refs_(static_cast<int>(refs)), tokens_(static_cast<int>(tokens)),
        weights_(reinterpret_cast<float*>(shared)) {}

  // The 32 tokens from `first` on; `highest` is what the weights are relative to.
  M3_DEVICE void take(int first, const WarpScores& weights, const float (&highest)[2][2]) {
    float* const passing = kept() + kMassRecords * kMassPitch + lane_index();
    const float now = of_own_row(highest);
    float sum = 0.0f;
    int record = first / tokens_, left = tokens_ - first % tokens_;
    if (left < tokens_) sum = passing[0] == 0.0f ? 0.0f : passing[0] * exp2_fast(passing[kWarpRows] - now);
    M3_UNROLL
    for (int half = 0; half < kTokens; half += kMassColumns) {
      put(weights, half / 8);
      sync_warp();
      for (int column = 0; column < kMassColumns && record < refs_; column += 4) {
        float x[4];
        load16(x, weights_ + at(lane_index(), column));
        M3_UNROLL
        for (int i = 0; i < 4; ++i) {
          sum += x[i];
          if (--left > 0) continue;
          if (record < refs_) end_record(record, sum, now);
          ++record, left = tokens_, sum = 0.0f;
        }
      }
      sync_warp();
    }
    passing[0] = sum, passing[kWarpRows] = now;
  }

  // `records` have come, all or none; `lse` of this lane's vector, in base 2. Writes the warp's results side by side.
  M3_DEVICE void finish(int records, float lse) {
    sync_warp();
    const int waiting = records > 0 ? (records - 1) / kMassRecords * kMassRecords : 0;  // the first that waits
    for (int i = 0; i < refs_; ++i) {
      const int at = lane_index() + kWarpRows * i, row = at / refs_, r = at % refs_;
      const int64_t place = shuffle(place_, row);
      const float row_lse = shuffle(lse, row);
      if (place < 0) continue;
      float* const to = mass_ + place * refs_ + r;
      float log = kMinusInfinity;
      if (r < waiting)
        log = *to;
      else if (r < records)
        log = kept()[(r - waiting) * kMassPitch + row];
      *to = row_lse == kMinusInfinity ? 0.0f : exp2_fast(log - row_lse);
    }
  }

 private:
  M3_DEVICE float* kept() const { return weights_ + kWarpRows * kMassColumns; }

  // Columns come in pairs from mma's layout, four rows at a time, and leave in fours, eight rows at a time: the fours
  // of a row are exchanged so that both meet all banks.
  M3_DEVICE static int at(int row, int column) {
    const int four = column / 4 ^ ((row >> 1 & 1) * 2 | (row >> 2 & 1));
    return row * kMassColumns + four * 4 + column % 4;
  }

  M3_DEVICE void put(const WarpScores& weights, int first) {
    M3_UNROLL
    for (int m = 0; m < 2; ++m) {
      M3_UNROLL
      for (int n = 0; n < kMassColumns / 8; ++n) {
        M3_UNROLL
        for (int h = 0; h < 2; ++h) {
          const float(&x)[4] = weights[m][first + n];
          const uint32_t pair[2] = {to_bits(x[2 * h]), to_bits(x[2 * h + 1])};
          store_words_shared(weights_ + at(16 * m + score_row(2 * h), score_token(n, 0)), pair);
        }
      }
    }
  }

  // A record's sum waits as its logarithm for the log-sum-exp of everything.
  M3_DEVICE void end_record(int record, float sum, float base) {
    if (record > 0 && record % kMassRecords == 0) store_kept(record - kMassRecords);
    kept()[record % kMassRecords * kMassPitch + lane_index()] = sum > 0.0f ? base + log2_fast(sum) : kMinusInfinity;
  }

  // Makes room: the waiting logarithms, from record `first` on, go where the masses will be.
  M3_DEVICE void store_kept(int first) {
    sync_warp();
    M3_UNROLL
    for (int i = 0; i < kMassRecords; ++i) {
      const int at = lane_index() + kWarpRows * i, row = at / kMassRecords, r = at % kMassRecords;
      const int64_t place = shuffle(place_, row);
      if (place >= 0) mass_[place * refs_ + first + r] = kept()[r * kMassPitch + row];
    }
    sync_warp();
  }

  float* mass_;
  int64_t place_;
  int refs_, tokens_;
  float* weights_;
};

}  // namespace m3::gpu
