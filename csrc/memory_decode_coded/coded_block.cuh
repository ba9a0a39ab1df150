// The part of a block of memory_decode_coded that reads records: rounds of 64 tokens. In each, all threads copy the
// tokens' codes to shared memory, all warps look vectors up, and then every warp takes one tile of 16 tokens.
#pragma once

#include "m3/memory_decode_coded.h"
#include "memory_decode/decode_block.cuh"
#include "memory_decode_coded/look_up.cuh"
#include "memory_decode_coded/rotation.cuh"

namespace m3::gpu {

constexpr int kRoundTokens = kDecodeWarps * kTileTokens;

struct CodedPlan {
  CodeLayout k, v;
  bool half, paired;  // all four tables (Tables)

  explicit CodedPlan(const M3MemoryDecodeCodedParams& p)
      : k(p.k_book), v(p.v_book), half(p.k_book.dtype == M3_F16), paired(even(p.k_book) && even(p.v_book)) {}
  static bool even(const M3Book& book) { return book.dim / book.fine_parts % 2 == 0; }
};

// Shared memory of a block.
template <class T, int D>
struct CodedStage {
  SplitRows<T, D> queries;
  T* keys;    // [4 tiles] of split rows
  T* values;  // [4 tiles, 16, D]: rounded, as the weights they are multiplied with are
  int32_t* slots;      // [64], -1: no token
  int32_t* positions;  // [64]
  char* codes;         // keys' [64, pieces, 16], then values'

  static constexpr int kRows = SplitRows<T, D>::kElements * (1 + kDecodeWarps) + kDecodeWarps * kTileTokens * D;

  static int64_t bytes(const CodedPlan& plan) {
    return kRows * sizeof(T) + kRoundTokens * (2 * 4 + 16 * (plan.k.pieces + plan.v.pieces));
  }

  M3_DEVICE CodedStage()
      : queries(reinterpret_cast<T*>(shared_memory())),
        keys(queries.high + SplitRows<T, D>::kElements),
        values(keys + kDecodeWarps * SplitRows<T, D>::kElements),
        slots(reinterpret_cast<int32_t*>(values + kDecodeWarps * kTileTokens * D)),
        positions(slots + kRoundTokens),
        codes(reinterpret_cast<char*>(positions + kRoundTokens)) {}

  M3_DEVICE SplitRows<T, D> tile_keys(int tile) const {
    return SplitRows<T, D>(keys + tile * SplitRows<T, D>::kElements);
  }
  M3_DEVICE T* tile_values(int tile) const { return values + tile * kTileTokens * D; }
};

// Starts copying the codes of the round's tokens, one side: as many pieces as each code touches.
M3_DEVICE void copy_codes(const uint8_t* codes, const int64_t* stride, int head, const CodeLayout& layout,
                          const int32_t* slots, const int32_t* positions, char* to) {
  for (int i = thread_index(); i < kRoundTokens * layout.pieces; i += kDecodeThreads) {
    const int token = i / layout.pieces, piece = i % layout.pieces;
    if (slots[token] < 0) continue;
    const int begin = positions[token] * layout.bytes, first = begin / 16 + piece;
    if (first * 16 < begin + layout.bytes)
      copy_async16(to + i * 16, codes + slots[token] * stride[0] + head * stride[1] + first * 16, true);
  }
}

template <class T, int D>
struct CodedReader {
  const M3MemoryDecodeCodedParams& p;
  const CodedPlan& plan;
  const DecodeBlock& block;
  const int head;  // of the records, or -1
  const CodedStage<T, D> stage;
  const LookUp<D> k, v;

  M3_DEVICE CodedReader(const M3MemoryDecodeCodedParams& params, const CodedPlan& layouts, const DecodeBlock& of,
                        int record_head)
      : p(params), plan(layouts), block(of), head(record_head), k(p.k_book, plan.k), v(p.v_book, plan.v) {}

  M3_DEVICE char* value_codes() const { return stage.codes + kRoundTokens * plan.k.pieces * 16; }

  // Finds the tokens from `first` on and starts copying their codes.
  M3_DEVICE void start(int first) const {
    for (int i = thread_index(); i < kRoundTokens; i += kDecodeThreads) {
      const MemoryToken token = memory_token(p.decode.memory, block.sequence, head, first + i);
      stage.slots[i] = static_cast<int32_t>(token.slot);
      stage.positions[i] = token.position;
    }
    sync_block();
    copy_codes(p.k_codes, p.k_code_stride, head, plan.k, stage.slots, stage.positions, stage.codes);
    copy_codes(p.v_codes, p.v_code_stride, head, plan.v, stage.slots, stage.positions, value_codes());
    commit_copies();
  }

  // Vectors of the first `count` tokens of the round (a multiple of 16), spread over the warps.
  M3_DEVICE void look_up(int count) const {
    if (plan.half)
      plan.paired ? look_up_in<Tables<uint16_t, true>>(count) : look_up_in<Tables<uint16_t, false>>(count);
    else
      plan.paired ? look_up_in<Tables<uint32_t, true>>(count) : look_up_in<Tables<uint32_t, false>>(count);
  }

 private:
  typedef typename LookUp<D>::Raw Raw;

  static constexpr int kTogether = 4;  // tokens a warp reads at a time: entries of both sides are 32 loads per lane

  template <class Tables>
  M3_DEVICE void look_up_in(int count) const {
    for (int token = warp_index(); token < count; token += kTogether * kDecodeWarps) {
      Raw k_raw[kTogether], v_raw[kTogether];
      bool here[kTogether];
      M3_UNROLL
      for (int i = 0; i < kTogether; ++i) {
        here[i] = stage.slots[token + i * kDecodeWarps] >= 0;
        if (here[i]) read<Tables>(token + i * kDecodeWarps, k_raw[i], v_raw[i]);
      }
      M3_UNROLL
      for (int i = 0; i < kTogether; ++i)
        write<Tables>(token + i * kDecodeWarps, here[i], k_raw[i], v_raw[i]);
    }
  }

  // Starts reading the table entries of a token.
  template <class Tables>
  M3_DEVICE void read(int token, Raw& k_raw, Raw& v_raw) const {
    k.template read<Tables>(unpack(k, plan.k, stage.codes, token), k_raw);
    v.template read<Tables>(unpack(v, plan.v, value_codes(), token), v_raw);
  }

  // Writes its vectors, or zeros where there is no token.
  template <class Tables>
  M3_DEVICE void write(int token, bool here, const Raw& k_raw, const Raw& v_raw) const {
    float k_sum[LookUp<D>::kPairs][2] = {}, v_sum[LookUp<D>::kPairs][2] = {};
    if (here) LookUp<D>::template sum<Tables>(k_raw, k_sum), LookUp<D>::template sum<Tables>(v_raw, v_sum);
    const int tile = token / kTileTokens, row = token % kTileTokens;
    M3_UNROLL
    for (int i = 0; i < LookUp<D>::kPairs; ++i) {
      const int pair = lane_index() + 32 * i;
      if (pair >= D / 2) continue;
      stage.tile_keys(tile).put(row, pair, k_sum[i][0], k_sum[i][1]);
      store_as(stage.tile_values(tile) + tile_at<D>(row, pair / 4) + pair % 4 * 2,
               pack<T>(v_sum[i][0], v_sum[i][1]));
    }
  }

  M3_DEVICE int unpack(const LookUp<D>& side, const CodeLayout& layout, const char* codes, int token) const {
    const auto* words = reinterpret_cast<const uint32_t*>(codes + token * layout.pieces * 16);
    return side.unpack(words, stage.positions[token] * layout.bytes % 16);
  }
};

// Attends to all memory tokens, in the basis they are coded in; `raw_scores`: DecodeWorkspace::score.
template <class T, int D>
M3_DEVICE void attend_coded(const M3MemoryDecodeCodedParams& p, const CodedPlan& plan, const DecodeBlock& block,
                            int tiles, float* raw_scores, SoftmaxTile<T, D>& softmax) {
  const int head = record_head(p.decode.memory, block.head);
  const CodedReader<T, D> reader(p, plan, block, head);
  const float scale = p.decode.scale * kLog2e;
  copy_queries<T, D>(p.decode, block, reader.stage.queries.high);
  reader.start(0);
  wait_copies<0>();
  sync_block();
  rotate_queries<T, D>(p.k_book.rot, reader.stage.queries);
  for (int first = 0; first < tiles; first += kDecodeWarps) {
    const int here = tiles - first < kDecodeWarps ? tiles - first : kDecodeWarps;
    if (first > 0) {
      reader.start(first * kTileTokens);
      wait_copies<0>();
      sync_block();
    }
    reader.look_up(here * kTileTokens);
    sync_block();
    const int mine = warp_index();
    if (mine < here) {
      TileScores s = {};
      reader.stage.queries.scores(reader.stage.tile_keys(mine), s);
      bias_memory(p.decode, block, head, first + mine, scale, raw_scores, s);
      softmax.absorb(s, reader.stage.tile_values(mine));
    }
    sync_block();
  }
  softmax.finish();
}

}  // namespace m3::gpu
