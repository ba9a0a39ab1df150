#include "torch/cuda/values.h"
#include "torch/select_tokens_args.h"

namespace m3::binding {
namespace {

Tensor select_tokens_cuda(const Tensor& q, const Tensor& k, const Tensor& length, int64_t tokens, int64_t start,
                          double scale, std::string rule) {
  SelectArgs args(q, k, length, tokens, start, scale, rule);
  M3SelectTokensParams& p = args.params;
  check_values(args.length, "length", 0, p.rows);
  Tensor index = empty_beside(q, {p.refs, p.kv_heads, tokens}, ScalarType::Int);
  p.index = index.mutable_data_ptr<int32_t>();
  check_cuda(m3_select_tokens_cuda(&p, current_stream(q)));
  return index;
}

}  // namespace
}  // namespace m3::binding

M3_REGISTER_CUDA(select_tokens, select_tokens_cuda)
