// One block per (reference, KV head): the keys stay in shared memory, each warp goes through every fourth tile of 16
// query vectors of the group, with the next one on its way, and adds up what every key receives. Nothing of the T x T
// scores leaves registers.
#include "common/cuda/shapes.cuh"
#include "m3/cuda.h"
#include "select_tokens/rank.cuh"
#include "select_tokens/received.cuh"

namespace m3::gpu {

constexpr int kSelectWarps = 4;
constexpr int kSelectThreads = 32 * kSelectWarps;
// Blocks an SM should hold: bounds the registers by 168. Two where a tile's scores are formed twice.
constexpr int kSelectResident = 3, kSelectLongResident = 2;
constexpr int64_t kMostBlockShared = 227 << 10;  // of any device; less is found out when the kernel is launched

// The block's reference and head, in rows of the reference.
struct SelectBlock {
  int64_t ref, head;
  int group;
  int first, length, start;  // keys are rows first..length-1; queries, and candidates, start..length-1
  bool causal;

  M3_DEVICE explicit SelectBlock(const M3SelectTokensParams& p) {
    const auto block = static_cast<uint32_t>(block_index()), heads = static_cast<uint32_t>(p.kv_heads);
    ref = block / heads, head = block % heads;
    group = static_cast<int>(p.q_heads / p.kv_heads);
    const int64_t rows = p.length[ref];
    length = static_cast<int>(rows < 0 ? 0 : rows > p.rows ? p.rows : rows);
    start = static_cast<int>(p.start < length ? p.start : length);
    causal = p.rule == M3_SELECT_CAUSAL;
    first = causal ? 0 : start;
  }
  M3_DEVICE int keys() const { return length - first; }
  M3_DEVICE int candidates() const { return length - start; }
  M3_DEVICE int row_tiles() const { return (candidates() + kTileRows - 1) / kTileRows; }

  // Tile `tile` of the group's queries: all tiles of a head, then the next head's.
  M3_DEVICE int tile_row(int tile) const { return start + tile % row_tiles() * kTileRows; }
  M3_DEVICE int64_t tile_head(int tile) const { return head * group + tile / row_tiles(); }

  M3_DEVICE Sight sight(int chunk, int row) const {
    const int from = chunk * kChunk, left = keys() - from, query = row - first - from;
    int seen = left < kChunk ? left : kChunk;
    if (causal && seen > query + kTileRows) seen = query + kTileRows;
    const int queries = length - row < kTileRows ? length - row : kTileRows;
    return {seen > 0 ? (seen + kTileTokens - 1) / kTileTokens : 0, left, query, queries, causal};
  }
};

// `count` rows to shared memory (tile_at), zeros up to a multiple of 16; by `threads` threads, this one is `thread`.
template <class T, int D>
M3_DEVICE void copy_rows(const T* from, int64_t stride, int count, int thread, int threads, T* to) {
  const int pieces = (count + kTileRows - 1) / kTileRows * kTileRows * (D / 8);
  for (int i = thread; i < pieces; i += threads) {
    const int row = i / (D / 8), piece = i % (D / 8);
    const bool here = row < count;
    copy_async16(to + tile_at<D>(row, piece), here ? from + row * stride + piece * 8 : from, here);
  }
}

// The warp's tiles of queries, the next one on its way: body(queries in registers, first row).
template <class T, int D, class Body>
M3_DEVICE void for_query_tiles(const M3SelectTokensParams& p, const SelectBlock& block, T* stage, const Body& body) {
  const int tiles = block.group * block.row_tiles();
  const auto copy = [&](int tile) {
    if (tile < tiles) {
      const int row = block.tile_row(tile), left = block.length - row;
      const T* from = static_cast<const T*>(p.q) + block.ref * p.q_stride[0] + row * p.q_stride[1] +
                      block.tile_head(tile) * p.q_stride[2];
      copy_rows<T, D>(from, p.q_stride[1], left < kTileRows ? left : kTileRows, lane_index(), 32, stage);
    }
    commit_copies();
  };
  copy(warp_index());
  wait_copies<0>();
  sync_block();  // the keys, too
  for (int tile = warp_index(); tile < tiles; tile += kSelectWarps) {
    QueryColumns<T, D> q;
    q.load(stage);
    sync_warp();
    copy(tile + kSelectWarps);
    body(q, block.tile_row(tile));
    wait_copies<0>();
    sync_warp();
  }
}

// Scores of a tile of queries against a chunk of keys.
template <class T, int D>
M3_DEVICE Sight score(const SelectBlock& block, const QueryColumns<T, D>& q, int row, const T* keys, int chunk,
                      float scale, ChunkScores& s) {
  const Sight sight = block.sight(chunk, row);
  M3_UNROLL
  for (int t = 0; t < kKeyTiles; ++t)
    if (t < sight.tiles) q.scores(keys + chunk * kChunk * D, t, scale, sight, s[t]);
  return sight;
}

// What one chunk of keys receives from a tile of queries: `received` takes it.
template <class T, int D>
M3_DEVICE void receive(const SelectBlock& block, const QueryColumns<T, D>& q, int row, const T* keys, float scale,
                       ReceivedShares& received) {
  ChunkScores s;
  QueryStatistics statistics;
  statistics.clear();
  const Sight sight = score(block, q, row, keys, 0, scale, s);
  statistics.absorb(s, sight.tiles);
  float share[2][2];
  statistics.shares(sight.queries, share);
  received.add(s, sight.tiles, share);
}

template <class T, int D>
M3_DEVICE void receive(const SelectBlock& block, const QueryColumns<T, D>& q, int row, const T* keys, float scale,
                       ReceivedExponentials& received, int chunk = 0) {
  const Sight sight = block.sight(chunk, row);
  M3_UNROLL
  for (int t = 0; t < kKeyTiles; ++t)
    if (t < sight.tiles) {
      TileScores s;
      q.scores(keys + chunk * kChunk * D, t, scale, sight, s);
      received.add(s, t, sight.queries);
    }
}

// The same for several chunks, put down one by one. Softmax scores them twice: for its sums, and for the shares.
template <class T, int D>
M3_DEVICE void receive_chunks(const SelectBlock& block, const QueryColumns<T, D>& q, int row, const T* keys,
                              int chunks, float scale, float* columns, int64_t count, ReceivedShares& received) {
  ChunkScores s;
  QueryStatistics statistics;
  statistics.clear();
  for (int chunk = 0; chunk < chunks; ++chunk)
    statistics.absorb(s, score(block, q, row, keys, chunk, scale, s).tiles);
  float share[2][2];
  statistics.shares(block.sight(0, row).queries, share);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int tiles = score(block, q, row, keys, chunk, scale, s).tiles;
    statistics.weigh(s, tiles);
    received.clear();
    received.add(s, tiles, share);
    received.put_down(columns, count, chunk * kChunk, tiles);
  }
}

template <class T, int D>
M3_DEVICE void receive_chunks(const SelectBlock& block, const QueryColumns<T, D>& q, int row, const T* keys,
                              int chunks, float scale, float* columns, int64_t count,
                              ReceivedExponentials& received) {
  for (int chunk = 0; chunk < chunks; ++chunk) {
    received.clear();
    receive(block, q, row, keys, scale, received, chunk);
    received.put_down(columns, count, chunk * kChunk, block.sight(chunk, row).tiles);
  }
}

// Received: ReceivedShares or ReceivedExponentials. Shared memory: keys [key_rows, D], a tile of queries per warp, and
// what keys receive, kArrays x [key_rows] per warp. Weights lie where the keys were. kOneChunk: T is at most kChunk.
template <class T, int D, class Received, bool kOneChunk>
M3_DEVICE void select(const M3SelectTokensParams& p, int64_t key_rows) {
  const SelectBlock block(p);
  T* keys = reinterpret_cast<T*>(shared_memory());
  T* stages = keys + key_rows * D;
  float* columns = reinterpret_cast<float*>(stages + kSelectWarps * kTileRows * D);
  float* mine = columns + warp_index() * Received::kArrays * key_rows;
  float* weights = reinterpret_cast<float*>(keys);
  const int count = block.candidates(), padded = (count + 3) / 4 * 4;

  if (count > 0) {
    copy_rows<T, D>(static_cast<const T*>(p.k) + block.ref * p.k_stride[0] + block.first * p.k_stride[1] +
                        block.head * p.k_stride[2],
                    p.k_stride[1], block.keys(), thread_index(), kSelectThreads, keys);
    Received::begin(mine, key_rows);
    Received received;
    received.clear();
    [[maybe_unused]] const int chunks = (block.keys() + kChunk - 1) / kChunk;
    const float scale = p.scale * kLog2e;
    for_query_tiles<T, D>(p, block, stages + warp_index() * kTileRows * D, [&](const auto& q, int row) {
      if constexpr (kOneChunk)
        receive(block, q, row, keys, scale, received);
      else
        receive_chunks(block, q, row, keys, chunks, scale, mine, key_rows, received);
    });
    if (kOneChunk) received.put_down(mine, key_rows, 0, (block.keys() + kTileTokens - 1) / kTileTokens);
    sync_block();
    for (int j = thread_index(); j < padded; j += kSelectThreads)
      weights[j] = j < count ? ranked(Received::weight(columns, key_rows, kSelectWarps, j + block.start - block.first))
                             : kMinusInfinity;
    sync_block();
  }
  int32_t* index = p.index + (block.ref * p.kv_heads + block.head) * p.tokens;
  keep_heaviest(weights, count, block.start, p.tokens, kSelectThreads, reinterpret_cast<uint32_t*>(weights + padded),
                index);
}

template <class T, int D, class Received>
M3_KERNEL void M3_THREADS(kSelectThreads, kSelectResident) select_rows(M3SelectTokensParams p, int64_t key_rows) {
  select<T, D, Received, true>(p, key_rows);
}
template <class T, int D, class Received>
M3_KERNEL void M3_THREADS(kSelectThreads, kSelectLongResident)
    select_long_rows(M3SelectTokensParams p, int64_t key_rows) {
  select<T, D, Received, false>(p, key_rows);
}

}  // namespace m3::gpu

extern "C" m3_status m3_select_tokens_cuda(const M3SelectTokensParams* p, void* stream) {
  using namespace m3::gpu;
  if (p->start < 0)
    return fail(M3_INVALID, "start: expected a row number, 0 or more, got %lld", static_cast<long long>(p->start));
  return with_shape(p->dtype, p->dim, [&](auto type, auto dim) -> m3_status {
    using T = decltype(type);
    constexpr int D = decltype(dim)::value;
    M3_GPU_TRY(check_rows("q", p->q, p->q_stride, 3));
    M3_GPU_TRY(check_rows("k", p->k, p->k_stride, 3));
    const int64_t key_rows = (p->rows + kTileTokens - 1) / kTileTokens * kTileTokens;
    const auto start = [&](auto received) -> m3_status {
      using Received = decltype(received);
      const int64_t shared =
          (key_rows + kSelectWarps * kTileRows) * D * 2 + kSelectWarps * Received::kArrays * key_rows * 4;
      if (shared > kMostBlockShared)
        return fail(M3_UNSUPPORTED, "k: %lld rows of %d values do not fit the shared memory of a block",
                    static_cast<long long>(p->rows), D);
      return launch(p->rows <= kChunk ? &select_rows<T, D, Received> : &select_long_rows<T, D, Received>,
                    {p->refs * p->kv_heads, kSelectThreads, shared}, stream, *p, key_rows);
    };
    return p->rule == M3_SELECT_EXP ? start(ReceivedExponentials{}) : start(ReceivedShares{});
  });
}
