// Four barriers per layer: queries, keys and values | attention | output | gate and up | down. Norms are computed by every
// member for itself, since a barrier would cost more. Linear maps are cut by tiles, attention by sequence and KV head.
#include "common/row_blocks.h"
#include "decode_step/parts.h"
#include "m3/memory_decode.h"

M3_DECLARE_LEVELS(void, memory_decode, const M3MemoryDecodeParams&, const RowBlocks&, int64_t, int64_t)

namespace m3 {
namespace {

constexpr int64_t kTile = M3_PACKED_ROWS, kBlock = M3_PACKED_COLS;
constexpr int64_t kShare = 2;         // tiles that stay together: a block of the next linear map's input
constexpr int64_t kAhead = 64 << 10;  // bytes of the next weight that a waiting member fetches
constexpr int kStretches = 16;        // of memory that a call of a kernel fetches on the way, at most
constexpr int64_t kLinesEach = 6;     // cache lines that it fetches per block of weights and 8 rows of x: what it has time for
constexpr int64_t kSpread = 4;        // sequences from which linear maps leave memory idle

// Buffers of a step, cut from one workspace.
struct Buffers {
  float *x, *added, *qkv, *lse, *mass, *mass_sum, *gate_up;
  uint16_t *q, *attended;
  M3PackedRows gated;
  int32_t *kv_len, *cu_q;
  M3PackedRows* input;  // of every member: that of its linear maps
  int64_t bytes;
};

// With a null base only the size is meaningful.
Buffers cut(const M3DecodeStepParams& p, void* base) {
  Buffers w{};
  Cutter take{static_cast<char*>(base)};
  const int64_t wide = p.heads * p.head_dim, cols = wide > p.dim ? wide : p.dim;
  const int64_t refs = p.memory_layers > 0 ? p.memory.refs : 0;
  take(w.x, p.batch * p.dim);
  take(w.added, p.batch * p.dim);
  take(w.qkv, p.batch * (p.heads + 2 * p.kv_heads) * p.head_dim);
  take(w.q, p.batch * wide);
  take(w.attended, p.batch * wide);
  take(w.lse, p.batch * p.heads);
  take(w.mass, p.batch * p.heads * refs);
  take(w.mass_sum, p.batch * p.kv_heads * refs);
  take(w.gate_up, p.batch * 2 * p.ffn);
  take_rows(take, w.gated, p.batch, p.ffn);
  take(w.kv_len, p.batch);
  take(w.cu_q, p.batch + 1);
  take(w.input, p.threads);
  for (int i = 0; i < p.threads; ++i) {
    M3PackedRows input{};
    take_rows(take, input, p.batch, cols);
    if (base != nullptr) w.input[i] = input;
  }
  w.bytes = take.bytes;
  return w;
}

// Fetches the beginning of what this member will read next, a little per call.
class Ahead {
 public:
  // The first `shared` tiles will be cut among the members.
  Ahead(const M3PackedWeight& w, int64_t shared, const Member& member) {
    const int64_t bytes = m3_packed_tile_bytes(&w);
    at_ = w.data + member.dealt(shared, kShare) * member.index * bytes;
    const uint8_t* const last = w.data + shared * bytes;
    end_ = last - at_ < kAhead ? last : at_ + kAhead;
  }

  bool operator()() {
    for (int i = 0; i < 8 && at_ < end_; ++i, at_ += 64) __builtin_prefetch(at_, 0, 2);
    return at_ < end_;
  }

 private:
  const uint8_t *at_, *end_;
};

// What attention will ask a member for: rows of the cache, where products of several sequences leave memory idle, and
// records, short pieces far apart, which no hardware prefetcher follows.
class AttentionAhead {
 public:
  AttentionAhead() = default;

  // Of a layer, and of memory layer `memory` (below 0: no records), for items [sequence, KV head]: those dealt to this
  // member, and its part of the others. At most `most` lines, or what the records take.
  AttentionAhead(const M3DecodeStepParams& p, int64_t layer, int64_t memory, int64_t most, const Member& member)
      : p_(&p), layer_(layer), memory_(memory), refs_(memory < 0 ? 0 : p.memory.refs) {
    const int64_t items = p.batch * p.kv_heads, dealt = member.count == 1 ? items : member.dealt(items, 1);
    first_ = member.index * dealt, dealt_ = dealt, rest_ = member.count * dealt + member.index, every_ = member.count;
    count_ = dealt + (items > rest_ ? (items - rest_ + every_ - 1) / every_ : 0);
    for (piece_ = caches(); find_piece(all()); ++piece_) lines_ += left_;
    const int64_t records = lines_;
    cache_left_ = records < most ? most - records : 0;
    for (piece_ = 0; find_piece(caches()); ++piece_) lines_ += left_;
    piece_ = left_ = 0, cache_left_ = lines_ - records;
  }

  int64_t lines() const { return lines_; }

  // The next lines, at most n in at most kStretches; returns how many.
  int64_t take(int64_t n, M3Lines* to, int64_t* stretches) {
    int64_t taken = 0;
    for (*stretches = 0; taken < n && *stretches < kStretches;) {
      if (left_ == 0 && !find_piece(all())) break;
      const int64_t some = left_ < n - taken ? left_ : n - taken;
      to[(*stretches)++] = {at_, some};
      at_ += 64 * some, left_ -= some, taken += some;
      if (left_ == 0) ++piece_;
    }
    return taken;
  }

  // All of it at once.
  void fetch() {
    M3Lines line;
    for (int64_t stretches; take(1, &line, &stretches) > 0;) __builtin_prefetch(line.at, 0, 2);
  }

 private:
  // Pieces are keys or values: of the sequences' caches, then of every item's records. Those that are read first come
  // last.
  int64_t caches() const { return 2 * count_; }
  int64_t all() const { return caches() * (1 + refs_); }

  // Piece piece_, or the next below `end` that there is.
  bool find_piece(int64_t end) {
    for (; piece_ < end; ++piece_) {
      const bool values = piece_ % 2;
      const int64_t i = piece_ / 2 - count_, bytes = i < 0 ? cache(piece_ / 2, values) : record(i / refs_, i % refs_, values);
      left_ = (bytes + 63) / 64;
      if (i < 0) left_ = left_ < cache_left_ ? left_ : cache_left_, cache_left_ -= left_;
      if (left_ > 0) return true;
    }
    return false;
  }

  int64_t item(int64_t i) const { return i < dealt_ ? first_ + i : rest_ + (i - dealt_) * every_; }

  // Sets at_; returns bytes. All heads of a sequence, where they lie side by side, once.
  int64_t cache(int64_t i, bool values) {
    const int64_t* const stride = values ? p_->v_stride : p_->k_stride;
    const int64_t b = item(i) / p_->kv_heads;
    const bool again = i > 0 && item(i - 1) / p_->kv_heads == b;
    if (again || stride[2] != p_->kv_heads * p_->head_dim) return 0;
    at_ = reinterpret_cast<const char*>((values ? p_->v_cache : p_->k_cache) + layer_ * stride[0] + b * stride[1]);
    return 2 * p_->lengths[b] * stride[2];
  }

  int64_t record(int64_t i, int64_t ref, bool values) {
    const M3Records& records = p_->memory;
    const int64_t kv = item(i) % p_->kv_heads, slot = records.slot[item(i) / p_->kv_heads * records.refs + ref];
    const int64_t head = records.head_map ? records.head_map[memory_ * p_->kv_heads + kv] : kv;
    if (slot < 0 || head < 0) return 0;
    const int64_t* const stride = values ? records.v_stride : records.k_stride;
    at_ = static_cast<const char*>(values ? records.v : records.k) +
          2 * (memory_ * p_->memory_stride + slot * stride[0] + head * stride[1]);
    return 2 * records.length[slot] * stride[2];
  }

  const M3DecodeStepParams* p_ = nullptr;
  int64_t layer_ = 0, memory_ = 0, refs_ = 0;
  int64_t first_ = 0, dealt_ = 0, rest_ = 0, every_ = 1, count_ = 0;  // of items
  int64_t lines_ = 0, cache_left_ = 0, piece_ = 0, left_ = 0;
  const char* at_ = nullptr;
};

// What one member does in a step.
class Step {
 public:
  Step(const M3DecodeStepParams& p, const Buffers& w, Member& member)
      : p_(p),
        w_(w),
        member_(member),
        watch_(member.index == 0 ? p.profile : nullptr) {
    for (const int map : {M3_STEP_GATE_UP, M3_STEP_DOWN, M3_STEP_QKV})
      if (p.layers > 0) map_blocks_ += m3_packed_tiles(&p.weights[map]) * (p.weights[map].cols / kBlock);
  }

  void run() {
    embed();
    int64_t memory = 0;  // of the next layer that reads records
    const auto reads_records = [&](int64_t layer) {
      return memory < p_.memory_layers && p_.memory_layer[memory] == layer;
    };
    const auto look_ahead = [&](int64_t layer) {
      owed_ = 0, ahead_ = AttentionAhead();
      if (layer == p_.layers) return;
      const int64_t most = p_.batch < kSpread ? 0 : map_blocks_ * p_.batch * kLinesEach / (8 * member_.count);
      ahead_ = AttentionAhead(p_, layer, reads_records(layer) ? memory : -1, most, member_);
    };
    look_ahead(0);
    for (int64_t layer = 0; layer < p_.layers; ++layer) {
      const M3PackedWeight* weights = p_.weights + layer * M3_STEP_LINEARS;
      const bool reads = reads_records(layer);
      norm(2 * layer, weights[M3_STEP_QKV]);
      if (p_.batch < kSpread) ahead_.fetch();
      linear(weights[M3_STEP_QKV], w_.qkv);
      meet(M3_STEP_LINEAR, weights[M3_STEP_OUT]);
      attention(layer, reads ? memory++ : -1);
      meet(M3_STEP_ATTENTION, weights[M3_STEP_OUT]);
      pack_attended(weights[M3_STEP_OUT]);
      linear_added(weights[M3_STEP_OUT], input_);
      meet(M3_STEP_LINEAR, weights[M3_STEP_GATE_UP], 2);
      norm(2 * layer + 1, weights[M3_STEP_GATE_UP]);
      look_ahead(layer + 1);
      const M3PackedRows gated = rows_for(p_, weights[M3_STEP_DOWN], w_.gated);
      gate_up(weights[M3_STEP_GATE_UP], gated);
      meet(M3_STEP_FFN, weights[M3_STEP_DOWN]);
      linear_added(weights[M3_STEP_DOWN], gated);
      meet(M3_STEP_FFN, weights[M3_STEP_LINEARS]);  // the next layer's first, or the head
    }
    const M3PackedWeight& head = p_.weights[p_.layers * M3_STEP_LINEARS];
    norm(2 * p_.layers, head);
    linear(head, p_.logits);
    if (p_.mass != nullptr && member_.index == 0) mean_mass();
    watch_.mark(M3_STEP_HEAD);
  }

 private:
  void meet(int stage, const M3PackedWeight& next, int64_t parts = 1) {
    watch_.mark(stage);
    member_.barrier(Ahead(next, m3_packed_tiles(&next) / parts, member_));
    watch_.mark(M3_STEP_WAIT);
  }

  // Row b of everything that needs no other member, by one member each.
  void embed() {
    const int64_t refs = p_.memory_layers > 0 ? p_.memory.refs : 0;
    member_.share(p_.batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        M3_AT_LEVEL(step_widen)(p_.embed + p_.tokens[b] * p_.embed_stride, p_.dim, w_.x + b * p_.dim);
        w_.kv_len[b] = p_.lengths[b] + 1;
        w_.cu_q[b + 1] = static_cast<int32_t>(b + 1);
        for (int64_t i = 0; i < p_.kv_heads * refs; ++i) w_.mass_sum[b * p_.kv_heads * refs + i] = 0.f;
      }
    });
    if (member_.index == 0) w_.cu_q[0] = 0;
    meet(M3_STEP_EMBED, p_.weights[0]);
  }

  // The residual stream, normalised, becomes this member's input of a map.
  void norm(int64_t which, const M3PackedWeight& next) {
    input_ = rows_for(p_, next, w_.input[member_.index]);
    M3_AT_LEVEL(step_norm)({w_.x, p_.norms + which * p_.dim, p_.batch, p_.eps, input_, 0});
    watch_.mark(M3_STEP_NORM);
  }

  // member_.share for tiles of a linear map: work(kernel, begin, end) calls kernel(params, begin, end). With several
  // sequences, what attention reads next is fetched on the way: by all maps from gate and up on, in proportion to their
  // weights.
  template <class Work>
  void share_fetching(int64_t tiles, const Work& work) {
    const auto kernel = M3_AT_LEVEL(packed_linear);
    if (p_.batch < kSpread || ahead_.lines() == 0)
      return member_.share(tiles, kShare, [&](int64_t begin, int64_t end) { work(kernel, begin, end); });
    const auto fetching = [&](M3PackedLinearParams params, int64_t begin, int64_t end) {
      owed_ += ahead_.lines() * (end - begin) * (params.weight.cols / kBlock) * member_.count;
      M3Lines stretches[kStretches];
      owed_ -= ahead_.take(owed_ / map_blocks_, stretches, &params.stretches) * map_blocks_;
      params.ahead = stretches;
      kernel(params, begin, end);
    };
    member_.share(tiles, kShare, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; at += kShare) work(fetching, at, at + kShare < end ? at + kShare : end);
    });
  }

  // out [B, rows] = input times weight.
  void linear(const M3PackedWeight& weight, float* out) {
    const M3PackedLinearParams params = linear_of(weight, input_, p_.batch, out);
    share_fetching(m3_packed_tiles(&weight),
                   [&](const auto& kernel, int64_t begin, int64_t end) { kernel(params, begin, end); });
  }

  // Adds x times weight to the residual stream.
  void linear_added(const M3PackedWeight& weight, const M3PackedRows& x) {
    const M3PackedLinearParams params = linear_of(weight, x, p_.batch, w_.added);
    share_fetching(m3_packed_tiles(&weight), [&](const auto& kernel, int64_t begin, int64_t end) {
      kernel(params, begin, end);
      const int64_t at = begin * kTile;
      M3_AT_LEVEL(step_add)({w_.added + at, p_.dim, p_.batch, (end - begin) * kTile, w_.x + at, p_.dim});
    });
  }

  // Tiles of gate and the same of up by one member, which then has all it needs to join them.
  void gate_up(const M3PackedWeight& weight, const M3PackedRows& gated) {
    const M3PackedLinearParams params = linear_of(weight, input_, p_.batch, w_.gate_up);
    const GateRows gate{w_.gate_up, w_.gate_up + p_.ffn, p_.batch, 2 * p_.ffn, gated, 0, 0};
    const int64_t up = p_.ffn / kTile;
    share_fetching(up, [&](const auto& kernel, int64_t begin, int64_t end) {
      kernel(params, begin, end);
      kernel(params, up + begin, up + end);
      M3_AT_LEVEL(step_gate)(gate, begin * kTile, end * kTile);
    });
  }

  // A KV head of a sequence: its key and value into the cache, its queries over cache and records.
  void attention(int64_t layer, int64_t memory) {
    const int64_t dim = p_.head_dim, group = p_.heads / p_.kv_heads, row = (p_.heads + 2 * p_.kv_heads) * dim;
    const int64_t refs = memory >= 0 ? p_.memory.refs : 0;
    M3MemoryDecodeParams a{};
    a.rows = a.sequences = a.pages = p_.batch;
    a.heads = p_.heads, a.kv_heads = p_.kv_heads, a.dim = dim, a.dtype = M3_BF16;
    a.q = w_.q;
    a.q_stride[0] = p_.heads * dim, a.q_stride[1] = dim;
    uint16_t* const k_cache = p_.k_cache + layer * p_.k_stride[0];
    uint16_t* const v_cache = p_.v_cache + layer * p_.v_stride[0];
    a.k_cache = k_cache, a.v_cache = v_cache;
    for (int i = 0; i < 3; ++i) a.k_stride[i] = p_.k_stride[i + 1], a.v_stride[i] = p_.v_stride[i + 1];
    a.page = p_.capacity;
    a.kv_len = w_.kv_len, a.cu_q = w_.cu_q;
    a.scale = p_.scale, a.max_q = 1, a.max_kv = p_.capacity;
    a.out = w_.attended, a.lse = w_.lse, a.mass = w_.mass;
    a.memory.chunks = p_.batch;
    if (memory >= 0) a.memory = records_of(p_, memory);
    const RowBlocks blocks = row_blocks(1, group);
    const auto rotate = M3_AT_LEVEL(step_rotate);
    const auto round = M3_AT_LEVEL(step_round);
    const auto kernel = M3_AT_LEVEL(memory_decode);
    member_.share(p_.batch * p_.kv_heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t b = item / p_.kv_heads, head = item % p_.kv_heads, at = p_.lengths[b];
        const float* const q = w_.qkv + b * row + head * group * dim;
        const float* const k = w_.qkv + b * row + (p_.heads + head) * dim;
        const float* const cos = p_.cos + (at + p_.span) * dim;
        const float* const sin = p_.sin + (at + p_.span) * dim;
        rotate({q, group, dim, cos, sin, w_.q + (b * p_.heads + head * group) * dim});
        rotate({k, 1, dim, cos, sin, k_cache + b * a.k_stride[0] + at * a.k_stride[1] + head * a.k_stride[2]});
        round(k + p_.kv_heads * dim, dim, v_cache + b * a.v_stride[0] + at * a.v_stride[1] + head * a.v_stride[2]);
      }
      kernel(a, blocks, begin, end);
      if (p_.mass == nullptr || refs == 0) return;
      for (int64_t item = begin; item < end; ++item)
        for (int64_t g = 0; g < group; ++g)
          for (int64_t r = 0; r < refs; ++r)
            w_.mass_sum[item * refs + r] += w_.mass[(item * group + g) * refs + r];
    });
  }

  // Attention's result becomes this member's input.
  void pack_attended(const M3PackedWeight& next) {
    input_ = rows_for(p_, next, w_.input[member_.index]);
    M3_AT_LEVEL(pack_activations)(w_.attended, M3_BF16, next.cols, p_.batch, input_, 0);
  }

  void mean_mass() {
    const int64_t refs = p_.memory.refs;
    const float factor = 1.f / static_cast<float>(p_.heads * p_.memory_layers);
    for (int64_t b = 0; b < p_.batch; ++b)
      for (int64_t r = 0; r < refs; ++r) {
        float sum = 0.f;
        for (int64_t h = 0; h < p_.kv_heads; ++h) sum += w_.mass_sum[(b * p_.kv_heads + h) * refs + r];
        p_.mass[b * refs + r] = sum * factor;
      }
  }

  const M3DecodeStepParams& p_;
  const Buffers& w_;
  Member& member_;
  Watch watch_;
  AttentionAhead ahead_;        // of the next layer's attention
  int64_t owed_ = 0;            // lines that calls so far left, times map_blocks_
  int64_t map_blocks_ = 0;      // of the weights of a layer that fetch
  M3PackedRows input_{};        // of this member's present map
};

}  // namespace

int64_t one_token_workspace(const M3DecodeStepParams& p) { return cut(p, nullptr).bytes; }

void one_token(const M3DecodeStepParams& p) {
  const Buffers buffers = cut(p, p.workspace);
  on_team(p.threads, [&](Member& member) { Step(p, buffers, member).run(); });
}

}  // namespace m3
