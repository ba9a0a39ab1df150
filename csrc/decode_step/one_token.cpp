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

// Fetches the records that attention will ask this member for: short pieces far apart, which no hardware prefetcher
// follows, and which products of several sequences leave the memory idle for.
class RecordsAhead {
 public:
  RecordsAhead() = default;

  // Of memory layer `memory`, for items [sequence, KV head]: those dealt to this member, and its part of the others.
  RecordsAhead(const M3DecodeStepParams& p, int64_t memory, const Member& member) : p_(&p), memory_(memory) {
    const int64_t items = p.batch * p.kv_heads, dealt = member.count == 1 ? items : member.dealt(items, 1);
    first_ = member.index * dealt, dealt_ = dealt, rest_ = member.count * dealt + member.index, every_ = member.count;
    count_ = dealt + (items > rest_ ? (items - rest_ + every_ - 1) / every_ : 0);
    for (piece_ = -1; next_piece();) lines_ += (bytes_ + 63) / 64;
    piece_ = -1, bytes_ = 0;
  }

  int64_t lines() const { return lines_; }

  // The next n lines.
  void operator()(int64_t n) {
    for (; n > 0; --n, at_ += 64, bytes_ -= 64) {
      while (bytes_ <= 0)
        if (!next_piece()) return;
      __builtin_prefetch(at_, 0, 2);
    }
  }

 private:
  // Keys or values of an item's record. False behind the last.
  bool next_piece() {
    if (p_ == nullptr) return false;
    const M3Records& records = p_->memory;
    while (++piece_ < count_ * records.refs * 2) {
      const int64_t i = piece_ / 2 / records.refs, item = i < dealt_ ? first_ + i : rest_ + (i - dealt_) * every_;
      const int64_t slot = records.slot[item / p_->kv_heads * records.refs + piece_ / 2 % records.refs];
      const int64_t kv = item % p_->kv_heads;
      const int64_t head = records.head_map ? records.head_map[memory_ * p_->kv_heads + kv] : kv;
      if (slot < 0 || head < 0) continue;
      const int64_t* const stride = piece_ % 2 ? records.v_stride : records.k_stride;
      at_ = static_cast<const char*>(piece_ % 2 ? records.v : records.k) +
            2 * (memory_ * p_->memory_stride + slot * stride[0] + head * stride[1]);
      bytes_ = 2 * records.length[slot] * stride[2];
      if (bytes_ > 0) return true;
    }
    return false;
  }

  const M3DecodeStepParams* p_ = nullptr;
  int64_t memory_ = 0, first_ = 0, dealt_ = 0, rest_ = 0, every_ = 1, count_ = 0, piece_ = 0, bytes_ = 0, lines_ = 0;
  const char* at_ = nullptr;
};

// What one member does in a step.
class Step {
 public:
  Step(const M3DecodeStepParams& p, const Buffers& w, Member& member)
      : p_(p),
        w_(w),
        member_(member),
        watch_(member.index == 0 ? p.profile : nullptr) {}

  void run() {
    embed();
    int64_t memory = 0;  // of the next layer that reads records
    const auto reads_records = [&](int64_t layer) {
      return memory < p_.memory_layers && p_.memory_layer[memory] == layer;
    };
    if (reads_records(0)) records_ahead_ = RecordsAhead(p_, memory, member_);
    for (int64_t layer = 0; layer < p_.layers; ++layer) {
      const M3PackedWeight* weights = p_.weights + layer * M3_STEP_LINEARS;
      const bool reads = reads_records(layer);
      norm(2 * layer, weights[M3_STEP_QKV]);
      if (p_.batch < kSpread) records_ahead_(records_ahead_.lines());
      linear(weights[M3_STEP_QKV], w_.qkv);
      meet(M3_STEP_LINEAR, weights[M3_STEP_OUT]);
      attention(layer, reads ? memory++ : -1);
      meet(M3_STEP_ATTENTION, weights[M3_STEP_OUT]);
      pack_attended(weights[M3_STEP_OUT]);
      linear_added(weights[M3_STEP_OUT], input_);
      meet(M3_STEP_LINEAR, weights[M3_STEP_GATE_UP], 2);
      norm(2 * layer + 1, weights[M3_STEP_GATE_UP]);
      const M3PackedRows gated = rows_for(p_, weights[M3_STEP_DOWN], w_.gated);
      gate_up(weights[M3_STEP_GATE_UP], gated);
      meet(M3_STEP_FFN, weights[M3_STEP_DOWN]);
      records_ahead_ = reads_records(layer + 1) ? RecordsAhead(p_, memory, member_) : RecordsAhead();
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

  // member_.share for tiles of a linear map; with several sequences, records are fetched between the tiles.
  template <class Work>
  void share_fetching(int64_t tiles, const Work& work) {
    const int64_t lines = records_ahead_.lines();
    if (p_.batch < kSpread || lines == 0) return member_.share(tiles, kShare, work);
    // Shares of the next layer's records between the maps before attention: down, and queries, keys and values.
    const M3PackedWeight* const maps = p_.weights;
    const int64_t all = m3_packed_tiles(&maps[M3_STEP_DOWN]) + m3_packed_tiles(&maps[M3_STEP_QKV]);
    const int64_t each = lines * kShare * member_.count / all + 1;
    member_.share(tiles, kShare, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; at += kShare) {
        records_ahead_(each);
        work(at, at + kShare < end ? at + kShare : end);
      }
    });
  }

  // out [B, rows] = input times weight.
  void linear(const M3PackedWeight& weight, float* out) {
    const M3PackedLinearParams params = linear_of(weight, input_, p_.batch, out);
    const auto kernel = M3_AT_LEVEL(packed_linear);
    share_fetching(m3_packed_tiles(&weight), [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
  }

  // Adds x times weight to the residual stream.
  void linear_added(const M3PackedWeight& weight, const M3PackedRows& x) {
    const M3PackedLinearParams params = linear_of(weight, x, p_.batch, w_.added);
    const auto kernel = M3_AT_LEVEL(packed_linear);
    share_fetching(m3_packed_tiles(&weight), [&](int64_t begin, int64_t end) {
      kernel(params, begin, end);
      const int64_t at = begin * kTile;
      M3_AT_LEVEL(step_add)({w_.added + at, p_.dim, p_.batch, (end - begin) * kTile, w_.x + at, p_.dim});
    });
  }

  // Tiles of gate and the same of up by one member, which then has all it needs to join them.
  void gate_up(const M3PackedWeight& weight, const M3PackedRows& gated) {
    const M3PackedLinearParams params = linear_of(weight, input_, p_.batch, w_.gate_up);
    const GateRows gate{w_.gate_up, w_.gate_up + p_.ffn, p_.batch, 2 * p_.ffn, gated, 0, 0};
    const auto kernel = M3_AT_LEVEL(packed_linear);
    const int64_t up = p_.ffn / kTile;
    member_.share(up, kShare, [&](int64_t begin, int64_t end) {
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
  RecordsAhead records_ahead_;  // of the next layer's attention
  M3PackedRows input_{};        // of this member's present map
};

}  // namespace

int64_t one_token_workspace(const M3DecodeStepParams& p) { return cut(p, nullptr).bytes; }

void one_token(const M3DecodeStepParams& p) {
  const Buffers buffers = cut(p, p.workspace);
  on_team(p.threads, [&](Member& member) { Step(p, buffers, member).run(); });
}

}  // namespace m3
