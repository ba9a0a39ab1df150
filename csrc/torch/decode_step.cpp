#include "m3/decode_step.h"

#include <vector>

#include "torch/linear_args.h"
#include "torch/records.h"

namespace m3::binding {
namespace {

m3_weight_format format_of(char letter, size_t index) {
  if (letter == 'b') return M3_WEIGHT_BF16;
  if (letter == '8') return M3_WEIGHT_Q8_0;
  STD_TORCH_CHECK(letter == '4', "formats[", index, "]: expected one of b, 8, 4, got ", std::string(1, letter));
  return M3_WEIGHT_Q4_1;
}

// The weights of a whole model end to end, a letter each for their formats.
std::vector<M3PackedWeight> packed_weights(const Tensor& data, const std::string& formats,
                                           const M3DecodeStepParams& p) {
  const size_t wanted = p.layers * M3_STEP_LINEARS + 1;
  STD_TORCH_CHECK(formats.size() == wanted, "formats: expected ", wanted,
                  " letters, four per layer and the head, got ", formats.size());
  const int64_t q = p.heads * p.head_dim, qkv = q + 2 * p.kv_heads * p.head_dim;
  const int64_t sizes[M3_STEP_LINEARS][2] = {{qkv, p.dim}, {p.dim, q}, {2 * p.ffn, p.dim}, {p.dim, p.ffn}};
  std::vector<M3PackedWeight> weights;
  weights.reserve(wanted);
  int64_t bytes = 0;
  for (size_t i = 0; i < wanted; ++i) {
    const int64_t head[2] = {p.vocab, p.dim};
    const int64_t* size = i + 1 < wanted ? sizes[i % M3_STEP_LINEARS] : head;
    weights.push_back({nullptr, size[0], size[1], format_of(formats[i], i)});
    bytes += m3_packed_tiles(&weights[i]) * m3_packed_tile_bytes(&weights[i]);
  }
  STD_TORCH_CHECK(data.scalar_type() == ScalarType::Byte && data.dim() == 1 && data.size(0) == bytes &&
                      data.is_contiguous(),
                  "weights: expected ", bytes, " bytes (uint8, contiguous), got ",
                  torch::headeronly::toString(data.scalar_type()), " ", shape_of(data));
  const uint8_t* at = data.const_data_ptr<uint8_t>();
  for (M3PackedWeight& weight : weights) {
    weight.data = at;
    at += m3_packed_tiles(&weight) * m3_packed_tile_bytes(&weight);
  }
  return weights;
}

void check_cache(const Tensor& cache, const char* name) {
  expect_type(cache, name, ScalarType::BFloat16);
  expect_unit_stride(cache, name);
}

// The records of all memory layers, as those of the first one.
void memory_args(M3DecodeStepParams& p, RecordArgs& args, const Tensor& kv, const MaybeTensor& slot,
                 const MaybeTensor& length, const MaybeTensor& bias, const MaybeTensor& head_map,
                 const std::vector<int64_t>& layers) {
  STD_TORCH_CHECK(slot.has_value() && length.has_value(), "mem_kv: expected mem_slot and mem_len with it, got None");
  const int64_t count = static_cast<int64_t>(layers.size());
  expect_shape(kv, "mem_kv", {-1, count, 2, -1, -1, p.head_dim});
  check_cache(kv, "mem_kv");
  const int64_t slots = kv.size(0), heads = kv.size(3), tokens = kv.size(4);
  if (head_map)
    args.head_map = index_tensor(*head_map, "head_map", {count, p.kv_heads});
  else
    STD_TORCH_CHECK(heads == p.kv_heads, "head_map: expected one where records have ", heads, " heads and the model ",
                    p.kv_heads, " KV heads, got None");
  args.slot = index_tensor(*slot, "mem_slot", {p.memory.chunks, -1});
  args.length = index_tensor(*length, "mem_len", {slots});
  M3Records& view = p.memory;
  view.slots = slots, view.heads = heads, view.tokens = tokens;
  view.k = kv.const_data_ptr();
  view.v = static_cast<const uint16_t*>(view.k) + kv.stride(2);
  for (int64_t* to : {view.k_stride, view.v_stride}) to[0] = kv.stride(0), to[1] = kv.stride(3), to[2] = kv.stride(4);
  p.memory_stride = kv.stride(1);
  if (bias) {
    expect_shape(*bias, "mem_bias", {slots, count, heads, tokens});
    expect_type(*bias, "mem_bias", ScalarType::Float);
    expect_unit_stride(*bias, "mem_bias");
    view.bias = bias->const_data_ptr<float>();
    view.bias_stride[0] = bias->stride(0), view.bias_stride[1] = bias->stride(2), p.bias_stride = bias->stride(1);
  }
  view.refs = slot->size(1);
  view.slot = args.slot.const_data_ptr<int32_t>();
  view.length = args.length.const_data_ptr<int32_t>();
  view.head_map = args.head_map ? args.head_map->const_data_ptr<int32_t>() : nullptr;
  p.memory_layers = count, p.memory_layer = layers.data();
}

// How tokens are cut into sequences and chunks, and whose logits are wanted.
struct Cuts {
  Tensor cu_q, cu_chunk, rows;
};

void cut_args(M3DecodeStepParams& p, Cuts& args, const Tensor& tokens, const MaybeTensor& cu_q,
              const MaybeTensor& cu_chunk, const MaybeTensor& rows) {
  expect_shape(tokens, "tokens", {cu_q ? -1 : p.batch});
  expect_type(tokens, "tokens", ScalarType::Long);
  p.count = tokens.size(0), p.wanted = p.memory.chunks = p.batch;
  STD_TORCH_CHECK(cu_q || !(cu_chunk || rows), "cu_q: expected it with cu_chunk or rows, which cut it, got None");
  if (!cu_q) return;
  args.cu_q = index_tensor(*cu_q, "cu_q", {p.batch + 1});
  p.cu_q = args.cu_q.const_data_ptr<int32_t>();
  if (cu_chunk) {
    args.cu_chunk = offsets(*cu_chunk, "cu_chunk");
    p.cu_chunk = args.cu_chunk.const_data_ptr<int32_t>(), p.memory.chunks = cu_chunk->size(0) - 1;
  }
  if (!rows) return;
  expect_shape(*rows, "rows", {-1});
  expect_type(*rows, "rows", ScalarType::Long);
  args.rows = as_contiguous(*rows);
  p.rows = args.rows.const_data_ptr<int64_t>(), p.wanted = rows->size(0);
}

std::tuple<Tensor, Tensor> decode_step(const Tensor& tokens, const Tensor& lengths, Tensor k_cache, Tensor v_cache,
                                       const Tensor& embed, const Tensor& norms, const Tensor& rope,
                                       const Tensor& weights, const MaybeTensor& mem_kv, const MaybeTensor& mem_slot,
                                       const MaybeTensor& mem_len, const MaybeTensor& mem_bias,
                                       const MaybeTensor& head_map, const MaybeTensor& cu_q,
                                       const MaybeTensor& cu_chunk, const MaybeTensor& rows, std::string formats,
                                       std::string activations, int64_t ffn,
                                       std::vector<int64_t> memory_layers, int64_t heads, int64_t span, double eps,
                                       double scale, int64_t threads, MaybeTensor profile) {
  M3DecodeStepParams p{};
  expect_shape(k_cache, "k_cache", {-1, -1, -1, -1, -1});
  p.layers = k_cache.size(0), p.batch = k_cache.size(1), p.capacity = k_cache.size(2);
  p.kv_heads = k_cache.size(3), p.head_dim = k_cache.size(4), p.heads = heads, p.ffn = ffn;
  expect_shape(v_cache, "v_cache", {p.layers, p.batch, p.capacity, p.kv_heads, p.head_dim});
  check_cache(k_cache, "k_cache");
  check_cache(v_cache, "v_cache");
  Cuts cuts;
  cut_args(p, cuts, tokens, cu_q, cu_chunk, rows);
  expect_shape(embed, "embed", {-1, -1});
  check_cache(embed, "embed");
  p.vocab = embed.size(0), p.dim = embed.size(1);
  STD_TORCH_CHECK(p.kv_heads > 0 && heads > 0 && p.dim > 0 && p.dim % M3_PACKED_COLS == 0,
                  "embed: expected a multiple of ", M3_PACKED_COLS, " columns, got ", p.dim, " (", heads, " heads of ",
                  p.kv_heads, ")");
  expect_shape(norms, "norms", {2 * p.layers + 1, p.dim});
  expect_type(norms, "norms", ScalarType::Float);
  expect_shape(rope, "rope", {2, -1, p.head_dim});
  expect_type(rope, "rope", ScalarType::Float);
  STD_TORCH_CHECK(threads >= 1 && threads <= 256, "threads: expected 1 to 256, got ", threads);
  STD_TORCH_CHECK(ffn > 0 && ffn % M3_PACKED_COLS == 0, "ffn: expected a multiple of ", M3_PACKED_COLS, ", got ", ffn);
  const Tensor token = as_contiguous(tokens), length = index_tensor(lengths, "lengths", {p.batch}),
               norm = as_contiguous(norms), turn = as_contiguous(rope);
  const std::vector<M3PackedWeight> packed = packed_weights(weights, formats, p);
  p.activations = activations_by_name(activations);
  p.tokens = token.const_data_ptr<int64_t>();
  p.lengths = length.const_data_ptr<int32_t>();
  p.embed = static_cast<const uint16_t*>(embed.const_data_ptr());
  p.embed_stride = embed.stride(0);
  p.norms = norm.const_data_ptr<float>();
  p.weights = packed.data();
  p.positions = turn.size(1);
  p.cos = turn.const_data_ptr<float>(), p.sin = p.cos + p.positions * p.head_dim;
  p.k_cache = static_cast<uint16_t*>(k_cache.mutable_data_ptr());
  p.v_cache = static_cast<uint16_t*>(v_cache.mutable_data_ptr());
  copy_strides(k_cache, p.k_stride, 4);
  copy_strides(v_cache, p.v_stride, 4);
  p.span = span, p.eps = static_cast<float>(eps), p.scale = static_cast<float>(scale);
  p.threads = static_cast<int>(threads);
  RecordArgs records;
  if (mem_kv) memory_args(p, records, *mem_kv, mem_slot, mem_len, mem_bias, head_map, memory_layers);
  if (profile) {
    expect_shape(*profile, "profile", {M3_STEP_STAGES});
    expect_type(*profile, "profile", ScalarType::Long);
    p.profile = profile->mutable_data_ptr<int64_t>();
  }
  Tensor logits = empty_cpu({p.wanted, p.vocab}, ScalarType::Float);
  Tensor mass = empty_cpu({p.count, p.memory.refs}, ScalarType::Float);
  Tensor workspace = empty_cpu({m3_decode_step_workspace(&p)}, ScalarType::Byte);
  p.workspace = workspace.mutable_data_ptr();
  p.logits = logits.mutable_data_ptr<float>();
  p.mass = mass.mutable_data_ptr<float>();
  check(m3_decode_step_cpu(&p));
  return {std::move(logits), std::move(mass)};
}

}  // namespace
}  // namespace m3::binding

M3_REGISTER_CPU(decode_step, m3::binding::decode_step)
