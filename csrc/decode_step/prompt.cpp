// Many tokens: blocks of rows go through all layers one after the other, so that workspace is bounded and activations
// stay in the caches. A unit of work is some rows times some tiles of a weight, whose sums never leave the member that
// made them: queries and keys are rotated, gates joined, residuals added where they lie. Seven barriers per layer:
// norm | queries, keys and values | attention | sums | output | norm | gate and up | down.
#include <stdint.h>

#include "common/row_blocks.h"
#include "decode_step/parts.h"
#include "m3/memory_attention.h"
#include "packed_linear/sums.h"

M3_DECLARE_LEVELS(void, memory_attention, const M3MemoryAttentionParams&, const RowBlocks&, int64_t, int64_t)
M3_DECLARE_LEVELS(void, packed_linear_sums, const M3PackedLinearParams&, const int64_t*, int, int64_t, int64_t, float*,
                  int64_t)

namespace m3 {
namespace {

constexpr int64_t kTile = M3_PACKED_ROWS, kBlock = M3_PACKED_COLS;
constexpr int64_t kRows = 512;      // of a block
constexpr int64_t kFewest = 32;     // rows of a unit of work, where there are more: each expands its weights
constexpr int64_t kUnits = 4;       // units per member from which a phase ends evenly enough
constexpr int kMostTiles = 32;      // of a unit: heads of 248 columns fill 31

// The rows of a block that belong to one sequence.
struct Segment {
  int64_t first, rows;           // in the block
  int64_t sequence;
  int64_t chunk, chunks;         // the first that they belong to, and how many
  const int32_t* cu_chunk;       // [chunks + 1], from 0 to rows
  int32_t cu_q[2], cu_k[2];      // {0, rows}, {0, keys that the last row sees}
  RowBlocks blocks;
  int64_t items;                 // of attention, of all segments before this one
};

// Where a row of the block stands.
struct Place {
  int64_t sequence, at;  // row of its cache
};

struct Buffers {
  float *x, *lse, *mass, *hidden, *unit;
  uint16_t *q, *attended;
  M3PackedRows input, gated, hidden_input;
  Segment* segments;
  Place* places;
  int32_t* cu_chunk;
  int64_t* count;  // of segments
  int64_t unit_size;
  int64_t bytes;
};

int64_t greatest_divisor(int64_t a, int64_t b) { return b == 0 ? a : greatest_divisor(b, a % b); }

// Tiles that hold whole heads: the fewest possible, or as many as are multiplied at once.
int64_t tiles_of_heads(int64_t dim) {
  const int64_t fewest = dim / greatest_divisor(dim, kTile);
  return fewest < kSumTiles ? kSumTiles / fewest * fewest : fewest;
}

// With a null base only the size is meaningful.
Buffers cut(const M3DecodeStepParams& p, void* base) {
  Buffers w{};
  Cutter take{static_cast<char*>(base)};
  const int64_t rows = p.count < kRows ? p.count : kRows, wide = p.heads * p.head_dim;
  const int64_t cols = wide > p.dim ? wide : p.dim, refs = p.memory_layers > 0 ? p.memory.refs : 0;
  take(w.x, rows * p.dim);
  take_rows(take, w.input, rows, cols);
  take(w.q, rows * wide);
  take(w.attended, rows * wide);
  take(w.lse, rows * p.heads);
  take(w.mass, rows * p.heads * refs);
  take_rows(take, w.gated, rows, p.ffn);
  take(w.hidden, p.wanted * p.dim);
  take_rows(take, w.hidden_input, p.wanted, p.dim);
  take(w.segments, p.batch);
  take(w.places, rows);
  take(w.cu_chunk, (p.cu_chunk != nullptr ? p.memory.chunks : p.batch) + 2 * p.batch);
  take(w.count, 1);
  w.unit_size = kSumRows * tiles_of_heads(p.head_dim) * kTile;
  take(w.unit, p.threads * w.unit_size);
  w.bytes = take.bytes;
  return w;
}

// What one member does.
class Prompt {
 public:
  Prompt(const M3DecodeStepParams& p, const Buffers& w, Member& member)
      : p_(p),
        w_(w),
        member_(member),
        watch_(member.index == 0 ? p.profile : nullptr),
        sum_(w.unit + member.index * w.unit_size),
        refs_(p.memory_layers > 0 ? p.memory.refs : 0) {}

  void run() {
    for (int64_t i = member_.index * p_.dim; i < p_.wanted * p_.dim; i += member_.count * p_.dim)
      for (int64_t c = i; c < i + p_.dim; ++c) w_.hidden[c] = 0.f;  // stays in a sequence without new tokens
    meet(M3_STEP_EMBED);
    for (first_ = 0; first_ < p_.count; first_ += kRows) {
      rows_ = p_.count - first_ < kRows ? p_.count - first_ : kRows;
      embed();
      int64_t memory = 0;  // of the next layer that reads records
      for (int64_t layer = 0; layer < p_.layers; ++layer) {
        const bool reads = memory < p_.memory_layers && p_.memory_layer[memory] == layer;
        through(layer, reads ? memory++ : -1);
      }
      keep_wanted();
    }
    head();
  }

 private:
  void meet(int stage) {
    watch_.mark(stage);
    member_.barrier();
    watch_.mark(M3_STEP_WAIT);
  }

  void through(int64_t layer, int64_t memory) {
    const M3PackedWeight* const weights = p_.weights + layer * M3_STEP_LINEARS;
    norm(2 * layer, weights[M3_STEP_QKV]);
    queries_keys_values(weights[M3_STEP_QKV], layer);
    attention(layer, memory);
    linear_added(weights[M3_STEP_OUT], after_attention(weights[M3_STEP_OUT], memory), M3_STEP_LINEAR);
    norm(2 * layer + 1, weights[M3_STEP_GATE_UP]);
    const M3PackedRows gated = rows_for(p_, weights[M3_STEP_DOWN], w_.gated);
    gate_up(weights[M3_STEP_GATE_UP], gated);
    linear_added(weights[M3_STEP_DOWN], gated, M3_STEP_FFN);
  }

  template <class Work>
  void each_row(const Work& work) {
    member_.share(rows_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) work(m);
    });
  }

  void embed() {
    if (member_.index == 0) *w_.count = plan();
    each_row([&](int64_t m) {
      M3_AT_LEVEL(step_widen)(p_.embed + p_.tokens[first_ + m] * p_.embed_stride, p_.dim, w_.x + m * p_.dim);
      if (p_.mass != nullptr)
        for (int64_t r = 0; r < refs_; ++r) p_.mass[(first_ + m) * refs_ + r] = 0.f;
    });
    meet(M3_STEP_EMBED);
  }

  // Segments and places of the block; returns how many segments there are.
  int64_t plan() const {
    int64_t count = 0, items = 0, b = 0, chunk = 0;
    int32_t* offsets = w_.cu_chunk;
    const int32_t* const cu_chunk = p_.cu_chunk != nullptr ? p_.cu_chunk : p_.cu_q;
    for (int64_t row = first_; row < first_ + rows_;) {
      while (p_.cu_q[b + 1] <= row) ++b;
      while (cu_chunk[chunk + 1] <= row) ++chunk;
      const int64_t end = p_.cu_q[b + 1] < first_ + rows_ ? p_.cu_q[b + 1] : first_ + rows_;
      Segment& s = w_.segments[count++];
      s = {row - first_, end - row, b, chunk, 0, offsets, {}, {}, {}, items};
      s.cu_q[1] = static_cast<int32_t>(s.rows);
      s.cu_k[1] = static_cast<int32_t>(p_.lengths[b] + end - p_.cu_q[b]);
      *offsets++ = 0;
      int64_t longest = 0;
      for (int64_t at = row; at < end; ++s.chunks, ++offsets) {
        const int64_t next = cu_chunk[chunk + s.chunks + 1] < end ? cu_chunk[chunk + s.chunks + 1] : end;
        longest = next - at > longest ? next - at : longest;
        *offsets = static_cast<int32_t>(next - row);
        at = next;
      }
      s.blocks = row_blocks(longest, p_.heads / p_.kv_heads);
      items += s.chunks * s.blocks.count * p_.kv_heads;
      for (; row < end; ++row) w_.places[row - first_] = {b, p_.lengths[b] + row - p_.cu_q[b]};
    }
    return count;
  }

  void norm(int64_t which, const M3PackedWeight& next) {
    input_ = rows_for(p_, next, w_.input);
    member_.share(rows_, 1, [&](int64_t begin, int64_t end) {
      M3_AT_LEVEL(step_norm)
      ({w_.x + begin * p_.dim, p_.norms + which * p_.dim, end - begin, p_.eps, input_, begin});
    });
    meet(M3_STEP_NORM);
  }

  // A map of the block's rows, cut into units of `groups` groups of tiles times some rows, those of the same rows one
  // after the other. tiles_of(group, tiles) lists a group's and returns their number; take(group, row, rows) finds the
  // sums in sum_, `pitch` apart.
  template <class TilesOf, class Take>
  void linear(const M3PackedWeight& weight, const M3PackedRows& x, int64_t groups, int64_t pitch,
              const TilesOf& tiles_of, const Take& take) {
    int64_t parts = (rows_ + kSumRows - 1) / kSumRows;
    while (member_.count > 1 && groups * parts < kUnits * member_.count && rows_ / (2 * parts) >= kFewest) parts *= 2;
    const int64_t each = ((rows_ + parts - 1) / parts + kSumUnit - 1) / kSumUnit * kSumUnit;
    parts = (rows_ + each - 1) / each;
    const M3PackedLinearParams params = linear_of(weight, x, rows_, nullptr);
    const auto kernel = M3_AT_LEVEL(packed_linear_sums);
    member_.share(groups * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t group = unit % groups, row = unit / groups * each;
        const int64_t rows = rows_ - row < each ? rows_ - row : each;
        int64_t tiles[kMostTiles];
        const int count = tiles_of(group, tiles);
        for (int t = 0; t < count; t += kSumTiles)
          kernel(params, tiles + t, count - t < kSumTiles ? count - t : kSumTiles, row, rows, sum_ + t * kTile, pitch);
        take(group, row, rows);
      }
    });
  }

  // Consecutive tiles, `unit` at once.
  template <class Take>
  void linear_in_order(const M3PackedWeight& weight, const M3PackedRows& x, int64_t unit, const Take& take) {
    const int64_t all = m3_packed_tiles(&weight);
    const auto tiles_of = [&](int64_t group, int64_t* tiles) {
      int count = 0;
      for (int64_t t = group * unit; t < all && count < unit; ++t) tiles[count++] = t;
      return count;
    };
    linear(weight, x, (all + unit - 1) / unit, unit * kTile, tiles_of, take);
  }

  // Queries stay here, keys and values go into the cache.
  void queries_keys_values(const M3PackedWeight& weight, int64_t layer) {
    const int64_t dim = p_.head_dim, unit = tiles_of_heads(dim), pitch = unit * kTile, held = pitch / dim;
    const int64_t all = p_.heads + 2 * p_.kv_heads;
    uint16_t* const k_cache = p_.k_cache + layer * p_.k_stride[0];
    uint16_t* const v_cache = p_.v_cache + layer * p_.v_stride[0];
    const auto rotate = M3_AT_LEVEL(step_rotate);
    const auto round = M3_AT_LEVEL(step_round);
    linear_in_order(weight, input_, unit, [&](int64_t group, int64_t row, int64_t rows) {
      const int64_t begin = group * held, end = begin + held < all ? begin + held : all;
      for (int64_t m = 0; m < rows; ++m) {
        const Place place = w_.places[row + m];
        const float* const cos = p_.cos + (place.at + p_.span) * dim;
        const float* const sin = p_.sin + (place.at + p_.span) * dim;
        for (int64_t h = begin; h < end; ++h) {
          const float* const x = sum_ + m * pitch + (h - begin) * dim;
          const int64_t k = h - p_.heads, v = k - p_.kv_heads;
          if (k < 0)
            rotate({x, 1, dim, cos, sin, w_.q + ((row + m) * p_.heads + h) * dim});
          else if (v < 0)
            rotate({x, 1, dim, cos, sin, row_of(k_cache, p_.k_stride, place) + k * p_.k_stride[3]});
          else
            round(x, dim, row_of(v_cache, p_.v_stride, place) + v * p_.v_stride[3]);
        }
      }
    });
    meet(M3_STEP_LINEAR);
  }

  static uint16_t* row_of(uint16_t* cache, const int64_t* stride, const Place& place) {
    return cache + place.sequence * stride[1] + place.at * stride[2];
  }

  void attention(int64_t layer, int64_t memory) {
    const int64_t segments = *w_.count;
    const Segment& last = w_.segments[segments - 1];
    const int64_t items = last.items + last.chunks * last.blocks.count * p_.kv_heads;
    int64_t at = 0;
    member_.share(items, 1, [&](int64_t begin, int64_t end) {
      if (begin < w_.segments[at].items) at = 0;
      for (; begin < end; ++at) {
        const Segment& s = w_.segments[at];
        const int64_t next = s.items + s.chunks * s.blocks.count * p_.kv_heads;
        if (next <= begin) continue;
        const int64_t stop = next < end ? next : end;
        attend(s, layer, memory, begin - s.items, stop - s.items);
        if (stop < next) return;
        begin = stop;
      }
      --at;
    });
    meet(M3_STEP_ATTENTION);
  }

  void attend(const Segment& s, int64_t layer, int64_t memory, int64_t begin, int64_t end) {
    const int64_t wide = p_.heads * p_.head_dim;
    M3MemoryAttentionParams a{};
    a.rows = s.rows, a.keys = s.cu_k[1], a.sequences = 1;
    a.heads = p_.heads, a.kv_heads = p_.kv_heads, a.dim = p_.head_dim, a.dtype = M3_BF16;
    a.q = w_.q + s.first * wide;
    a.q_stride[0] = wide, a.q_stride[1] = p_.head_dim;
    a.k = p_.k_cache + layer * p_.k_stride[0] + s.sequence * p_.k_stride[1];
    a.v = p_.v_cache + layer * p_.v_stride[0] + s.sequence * p_.v_stride[1];
    for (int i = 0; i < 2; ++i) a.k_stride[i] = p_.k_stride[i + 2], a.v_stride[i] = p_.v_stride[i + 2];
    a.cu_q = s.cu_q, a.cu_k = s.cu_k, a.cu_chunk = s.cu_chunk;
    if (memory >= 0) {
      a.memory = records_of(p_, memory);
      a.memory.slot += s.chunk * refs_;
    }
    a.memory.chunks = s.chunks;
    a.scale = p_.scale;
    a.out = w_.attended + s.first * wide;
    a.lse = w_.lse + s.first * p_.heads;
    a.mass = w_.mass + s.first * p_.heads * refs_;
    M3_AT_LEVEL(memory_attention)(a, s.blocks, begin, end);
  }

  // Attention's result as the output map `next` takes it; the mean of its mass.
  M3PackedRows after_attention(const M3PackedWeight& next, int64_t memory) {
    const int64_t wide = p_.heads * p_.head_dim;
    const float factor = 1.f / static_cast<float>(p_.heads * p_.memory_layers);
    const bool sees = memory >= 0 && refs_ > 0 && p_.mass != nullptr;
    M3PackedRows x = rows_for(p_, next, w_.input);
    // bf16 that needs no sums is what it is already.
    const bool packs = x.activations != M3_ACTIVATIONS_BF16 || next.format == M3_WEIGHT_Q4_1;
    if (!packs) x.x = w_.attended;
    if (!packs && !sees) return x;
    each_row([&](int64_t m) {
      if (packs) M3_AT_LEVEL(pack_activations)(w_.attended + m * wide, M3_BF16, wide, 1, x, m);
      if (!sees) return;
      for (int64_t r = 0; r < refs_; ++r) {
        float sum = 0.f;
        for (int64_t h = 0; h < p_.heads; ++h) sum += w_.mass[(m * p_.heads + h) * refs_ + r];
        p_.mass[(first_ + m) * refs_ + r] += sum * factor;
      }
    });
    meet(M3_STEP_ATTENTION);
    return x;
  }

  // Adds x times weight to the residual stream.
  void linear_added(const M3PackedWeight& weight, const M3PackedRows& x, int stage) {
    constexpr int64_t kPitch = kSumTiles * kTile;
    linear_in_order(weight, x, kSumTiles, [&](int64_t group, int64_t row, int64_t rows) {
      const int64_t col = group * kPitch, cols = p_.dim - col < kPitch ? p_.dim - col : kPitch;
      M3_AT_LEVEL(step_add)({sum_, kPitch, rows, cols, w_.x + row * p_.dim + col, p_.dim});
    });
    meet(stage);
  }

  // Two tiles of gate and the same two of up make a block of columns.
  void gate_up(const M3PackedWeight& weight, const M3PackedRows& gated) {
    constexpr int64_t kPitch = 2 * kBlock;
    static_assert(kPitch == kSumTiles * kTile);
    const auto tiles_of = [&](int64_t group, int64_t* tiles) {
      const int64_t gate = 2 * group, up = p_.ffn / kTile + gate;
      tiles[0] = gate, tiles[1] = gate + 1, tiles[2] = up, tiles[3] = up + 1;
      return 4;
    };
    linear(weight, input_, p_.ffn / kBlock, kPitch, tiles_of, [&](int64_t group, int64_t row, int64_t rows) {
      M3_AT_LEVEL(step_gate)({sum_, sum_ + kBlock, rows, kPitch, gated, row, group * kBlock}, 0, kBlock);
    });
    meet(M3_STEP_FFN);
  }

  // Rows whose logits are wanted wait for the head.
  void keep_wanted() {
    member_.share(p_.wanted, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = p_.rows != nullptr ? p_.rows[i] : p_.cu_q[i + 1] - 1, m = row - first_;
        if (m < 0 || m >= rows_ || (p_.rows == nullptr && row < p_.cu_q[i])) continue;
        for (int64_t c = 0; c < p_.dim; ++c) w_.hidden[i * p_.dim + c] = w_.x[m * p_.dim + c];
      }
    });
    meet(M3_STEP_HEAD);
  }

  void head() {
    const M3PackedWeight& weight = p_.weights[p_.layers * M3_STEP_LINEARS];
    const M3PackedRows input = rows_for(p_, weight, w_.hidden_input);
    member_.share(p_.wanted, 1, [&](int64_t begin, int64_t end) {
      M3_AT_LEVEL(step_norm)
      ({w_.hidden + begin * p_.dim, p_.norms + 2 * p_.layers * p_.dim, end - begin, p_.eps, input, begin});
    });
    meet(M3_STEP_HEAD);
    const M3PackedLinearParams params = linear_of(weight, input, p_.wanted, p_.logits);
    const auto kernel = M3_AT_LEVEL(packed_linear);
    member_.share(m3_packed_tiles(&weight), kSumTiles,
                  [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
    watch_.mark(M3_STEP_HEAD);
  }

  const M3DecodeStepParams& p_;
  const Buffers& w_;
  Member& member_;
  Watch watch_;
  float* const sum_;      // of this member's present unit of work
  M3PackedRows input_{};  // of the block's present map
  const int64_t refs_;
  int64_t first_ = 0, rows_ = 0;  // of the block
};

}  // namespace

int64_t prompt_workspace(const M3DecodeStepParams& p) { return cut(p, nullptr).bytes; }

void prompt(const M3DecodeStepParams& p) {
  const Buffers buffers = cut(p, p.workspace);
  on_team(p.threads, [&](Member& member) { Prompt(p, buffers, member).run(); });
}

}  // namespace m3
