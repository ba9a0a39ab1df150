#include "torch/select_tokens_args.h"

namespace m3::binding {
namespace {

Tensor select_tokens(const Tensor& q, const Tensor& k, const Tensor& length, int64_t tokens, int64_t start,
                     double scale, std::string rule) {
  SelectArgs args(q, k, length, tokens, start, scale, rule);
  M3SelectTokensParams& p = args.params;
  Tensor index = empty_cpu({p.refs, p.kv_heads, tokens}, ScalarType::Int);
  p.index = index.mutable_data_ptr<int32_t>();
  const int64_t tasks = p.rows > start ? p.refs * p.kv_heads : 0;  // without a row to rank nothing is computed
  p.workers = 1;
  Tensor workspace;
  if (tasks > 0) {
    const int64_t threads = torch::stable::get_num_threads();
    p.workers = tasks < threads ? tasks : threads;
    workspace = empty_cpu({p.workers, m3_select_tokens_workspace(&p)}, ScalarType::Float);
    p.workspace = workspace.mutable_data_ptr<float>();
  }
  check(m3_select_tokens_cpu(&p));
  return index;
}

}  // namespace
}  // namespace m3::binding

M3_REGISTER_CPU(select_tokens, m3::binding::select_tokens)
