#include "m3/decode_step.h"

#include <vector>

#include "torch/records.h"

namespace m3::binding {
namespace {

// A packed weight names its format by the bytes of its tiles.
M3PackedWeight packed(const Tensor& t, size_t index, int64_t rows, int64_t cols) {
  M3PackedWeight w{nullptr, rows, cols, M3_WEIGHT_BF16};
  const bool matrix = t.scalar_type() == ScalarType::Byte && t.dim() == 2 && t.size(0) == m3_packed_tiles(&w) &&
                      (t.size(0) < 2 || t.stride(0) == t.size(1)) && t.stride(1) == 1;
  for (m3_weight_format format : {M3_WEIGHT_BF16, M3_WEIGHT_Q8_0, M3_WEIGHT_Q4_1}) {
    w.format = format;
    if (!matrix || t.size(1) != m3_packed_tile_bytes(&w)) continue;
    w.data = t.const_data_ptr<uint8_t>();
    return w;
  }
  STD_TORCH_CHECK(false, "weights[", index, "]: expected ", rows, " rows of ", cols,
                  " packed by pack_weight (uint8, contiguous), got ", torch::headeronly::toString(t.scalar_type()), " ",
                  shape_of(t));
  return w;
}

std::vector<M3PackedWeight> packed_weights(const std::vector<Tensor>& tensors, M3DecodeStepParams& p) {
  const size_t wanted = p.layers * M3_STEP_LINEARS + 1;
  STD_TORCH_CHECK(tensors.size() == wanted, "weights: expected ", wanted, ", four per layer and the head, got ",
                  tensors.size());
  const int64_t q = p.heads * p.head_dim, qkv = q + 2 * p.kv_heads * p.head_dim;
  p.ffn = 1;
  if (p.layers > 0) {
    const Tensor& gate_up = tensors[M3_STEP_GATE_UP];
    STD_TORCH_CHECK(gate_up.dim() == 2 && gate_up.size(0) > 0 && gate_up.size(0) % 4 == 0,
                    "weights[2]: expected gate and up of a multiple of 32 rows each, packed, got ", shape_of(gate_up));
    p.ffn = gate_up.size(0) * M3_PACKED_ROWS / 2;
  } else {
    p.ffn = M3_PACKED_COLS;
  }
  const int64_t sizes[M3_STEP_LINEARS][2] = {{qkv, p.dim}, {p.dim, q}, {2 * p.ffn, p.dim}, {p.dim, p.ffn}};
  std::vector<M3PackedWeight> weights;
  weights.reserve(wanted);
  for (size_t i = 0; i + 1 < wanted; ++i) {
    const int64_t* size = sizes[i % M3_STEP_LINEARS];
    weights.push_back(packed(tensors[i], i, size[0], size[1]));
  }
  weights.push_back(packed(tensors[wanted - 1], wanted - 1, p.vocab, p.dim));
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
  args.slot = index_tensor(*slot, "mem_slot", {p.batch, -1});
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
  view.chunks = p.batch, view.refs = slot->size(1);
  view.slot = args.slot.const_data_ptr<int32_t>();
  view.length = args.length.const_data_ptr<int32_t>();
  view.head_map = args.head_map ? args.head_map->const_data_ptr<int32_t>() : nullptr;
  p.memory_layers = count, p.memory_layer = layers.data();
}

std::tuple<Tensor, Tensor> decode_step(const Tensor& tokens, const Tensor& lengths, Tensor k_cache, Tensor v_cache,
                                       const Tensor& embed, const Tensor& norms, const Tensor& cos, const Tensor& sin,
                                       std::vector<Tensor> weights, const MaybeTensor& mem_kv,
                                       const MaybeTensor& mem_slot, const MaybeTensor& mem_len,
                                       const MaybeTensor& mem_bias, const MaybeTensor& head_map,
                                       std::vector<int64_t> memory_layers, int64_t heads, int64_t span, double eps,
                                       double scale, int64_t threads, std::optional<Tensor> profile) {
  M3DecodeStepParams p{};
  expect_shape(k_cache, "k_cache", {-1, -1, -1, -1, -1});
  p.layers = k_cache.size(0), p.batch = k_cache.size(1), p.capacity = k_cache.size(2);
  p.kv_heads = k_cache.size(3), p.head_dim = k_cache.size(4), p.heads = heads;
  expect_shape(v_cache, "v_cache", {p.layers, p.batch, p.capacity, p.kv_heads, p.head_dim});
  check_cache(k_cache, "k_cache");
  check_cache(v_cache, "v_cache");
  expect_shape(tokens, "tokens", {p.batch});
  expect_type(tokens, "tokens", ScalarType::Long);
  expect_shape(embed, "embed", {-1, -1});
  check_cache(embed, "embed");
  p.vocab = embed.size(0), p.dim = embed.size(1);
  STD_TORCH_CHECK(p.kv_heads > 0 && heads > 0 && p.dim > 0 && p.dim % M3_PACKED_COLS == 0,
                  "embed: expected a multiple of ", M3_PACKED_COLS, " columns, got ", p.dim, " (", heads, " heads of ",
                  p.kv_heads, ")");
  expect_shape(norms, "norms", {2 * p.layers + 1, p.dim});
  expect_type(norms, "norms", ScalarType::Float);
  expect_shape(cos, "cos", {-1, p.head_dim});
  expect_shape(sin, "sin", {cos.size(0), p.head_dim});
  expect_type(cos, "cos", ScalarType::Float);
  expect_type(sin, "sin", ScalarType::Float);
  STD_TORCH_CHECK(threads >= 1 && threads <= 256, "threads: expected 1 to 256, got ", threads);
  const Tensor token = torch::stable::contiguous(tokens), length = index_tensor(lengths, "lengths", {p.batch}),
               norm = torch::stable::contiguous(norms), cosine = torch::stable::contiguous(cos),
               sine = torch::stable::contiguous(sin);
  const std::vector<M3PackedWeight> packed = packed_weights(weights, p);
  p.tokens = token.const_data_ptr<int64_t>();
  p.lengths = length.const_data_ptr<int32_t>();
  p.embed = static_cast<const uint16_t*>(embed.const_data_ptr());
  p.embed_stride = embed.stride(0);
  p.norms = norm.const_data_ptr<float>();
  p.weights = packed.data();
  p.cos = cosine.const_data_ptr<float>(), p.sin = sine.const_data_ptr<float>(), p.positions = cos.size(0);
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
  Tensor logits = torch::stable::new_empty(tokens, {p.batch, p.vocab}, ScalarType::Float);
  Tensor mass = torch::stable::new_empty(tokens, {p.batch, p.memory.refs}, ScalarType::Float);
  Tensor workspace = torch::stable::new_empty(tokens, {m3_decode_step_workspace(&p)}, ScalarType::Byte);
  p.workspace = workspace.mutable_data_ptr();
  p.logits = logits.mutable_data_ptr<float>();
  p.mass = mass.mutable_data_ptr<float>();
  check(m3_decode_step_cpu(&p));
  return {logits, mass};
}

}  // namespace
}  // namespace m3::binding

M3_REGISTER_CPU(decode_step, m3::binding::decode_step)
