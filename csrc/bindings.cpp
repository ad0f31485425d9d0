// The Python module msformer_kernels._native: raw pointers, sizes and strides in, kernels of the best instruction set that
// this machine has. It knows nothing of torch; `native.py` of each operator calls it with tensors that are checked already.
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/arguments.h"

namespace py = pybind11;
using namespace msformer;

#define MSFORMER_DECLARE(isa)                                            \
  namespace msformer::isa {                                              \
  void attention_forward(const AttentionArguments&);                     \
  void attention_backward(const AttentionArguments&);                    \
  void self_attention_forward(const SelfAttentionArguments&);            \
  void self_attention_backward(const SelfAttentionArguments&);           \
  void mix_ffn_forward(const MixFFNArguments&);                          \
  void mix_ffn_backward(const MixFFNArguments&);                         \
  void linear_forward(const LinearArguments&);                           \
  void linear_backward(const LinearArguments&);                          \
  void batch_norm_forward(const BatchNormArguments&);                    \
  void batch_norm_backward(const BatchNormArguments&);                   \
  double multiply_adds(int, std::int64_t, double*);                      \
  constexpr Kernels kernels{attention_forward,       attention_backward, \
                            self_attention_forward,  self_attention_backward, \
                            mix_ffn_forward,         mix_ffn_backward,   \
                            linear_forward,          linear_backward,    \
                            batch_norm_forward,      batch_norm_backward, \
                            multiply_adds};                              \
  }

MSFORMER_DECLARE(plain)
#ifdef MSFORMER_X86_VARIANTS
MSFORMER_DECLARE(avx2)
MSFORMER_DECLARE(avx512)
#ifdef MSFORMER_BF16_VARIANT
MSFORMER_DECLARE(avx512_bf16)
#endif
#endif

namespace {

struct Variant {
  std::string name;
  const Kernels* kernels;
};

// best first
std::vector<Variant> usable_variants() {
  std::vector<Variant> variants;
#ifdef MSFORMER_X86_VARIANTS
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#ifdef MSFORMER_BF16_VARIANT
  if (avx512 && __builtin_cpu_supports("avx512bf16")) variants.push_back({"avx512_bf16", &avx512_bf16::kernels});
#endif
  if (avx512) variants.push_back({"avx512", &avx512::kernels});
  if (avx2) variants.push_back({"avx2", &avx2::kernels});
#endif
  variants.push_back({"plain", &plain::kernels});
  return variants;
}

const std::vector<Variant>& variants() {
  static const std::vector<Variant> list = usable_variants();
  return list;
}

Variant current;
Form form = Form::by_shape;

void set_isa(const std::string& name) {
  std::string known;
  for (const Variant& variant : variants()) {
    if (variant.name == name) {
      current = variant;
      return;
    }
    known += (known.empty() ? "" : ", ") + variant.name;
  }
  throw std::invalid_argument("unknown or unsupported instruction set '" + name + "'; this machine has: " + known);
}

void set_form(const std::string& name) {
  const char* names[] = {"by_shape", "many_tokens", "few_tokens"};
  for (int i = 0; i < 3; ++i)
    if (name == names[i]) {
      form = static_cast<Form>(i);
      return;
    }
  throw std::invalid_argument("unknown form '" + name + "'; expected by_shape, many_tokens or few_tokens");
}

void* pointer(std::uintptr_t address) { return reinterpret_cast<void*>(address); }

// (address, dtype, batch stride, head stride, token stride, channel stride)
Activation activation(const py::tuple& t) {
  if (t.empty()) return {};
  return {pointer(t[0].cast<std::uintptr_t>()), static_cast<DType>(t[1].cast<int>()), t[2].cast<std::int64_t>(),
          t[3].cast<std::int64_t>(), t[4].cast<std::int64_t>(), t[5].cast<std::int64_t>()};
}

// (address, batch stride, token stride), or empty
Mask mask(const py::tuple& t) {
  if (t.empty()) return {};
  return {static_cast<const unsigned char*>(pointer(t[0].cast<std::uintptr_t>())), t[1].cast<std::int64_t>(),
          t[2].cast<std::int64_t>()};
}

// walks through a tuple of addresses, in the order of the fields they fill
class Pointers {
 public:
  explicit Pointers(const py::tuple& t) : tuple_(t) {}
  template <class Pointer> void to(Pointer& field) { field = pointer(tuple_[next_++].cast<std::uintptr_t>()); }
  template <class... Fields> void fill(Fields&... fields) { (to(fields), ...); }

 private:
  const py::tuple& tuple_;
  py::size_t next_ = 0;
};

template <class Arguments> void run(void (*kernel)(const Arguments&), const Arguments& arguments) {
  py::gil_scoped_release release;
  kernel(arguments);
}

// sizes: threads, batch, heads, query tokens, key tokens, key channels, value channels
AttentionArguments attention_arguments(const py::tuple& sizes, const py::tuple& scales, bool normalize_query, bool softmax,
                                       const py::tuple& query, const py::tuple& key, const py::tuple& value,
                                       const py::tuple& mask_tuple, const py::tuple& state) {
  AttentionArguments a{};
  a.num_threads = sizes[0].cast<int>();
  std::int64_t* fields[] = {&a.batch, &a.heads, &a.query_tokens, &a.key_tokens, &a.key_channels, &a.value_channels};
  for (py::size_t i = 0; i < 6; ++i) *fields[i] = sizes[i + 1].cast<std::int64_t>();
  a.query_scale = scales[0].cast<double>();
  a.key_scale = scales[1].cast<double>();
  a.output_scale = scales[2].cast<double>();
  a.normalize_query = normalize_query;
  a.softmax = softmax;
  a.query = activation(query);
  a.key = activation(key);
  a.value = activation(value);
  a.mask = mask(mask_tuple);
  Pointers(state).fill(a.context, a.key_max, a.key_sum);
  return a;
}

void attention_forward(const py::tuple& sizes, const py::tuple& scales, bool normalize_query, bool softmax,
                       const py::tuple& query, const py::tuple& key, const py::tuple& value, const py::tuple& mask_tuple,
                       const py::tuple& state, const py::tuple& output) {
  AttentionArguments a = attention_arguments(sizes, scales, normalize_query, softmax, query, key, value, mask_tuple, state);
  a.output = activation(output);
  run(current.kernels->attention_forward, a);
}

void attention_backward(const py::tuple& sizes, const py::tuple& scales, bool normalize_query, bool softmax,
                        const py::tuple& query, const py::tuple& key, const py::tuple& value, const py::tuple& mask_tuple,
                        const py::tuple& state, const py::tuple& grad_output, std::uintptr_t grad_context,
                        const py::tuple& grad_query, const py::tuple& grad_key, const py::tuple& grad_value) {
  AttentionArguments a = attention_arguments(sizes, scales, normalize_query, softmax, query, key, value, mask_tuple, state);
  a.grad_output = activation(grad_output);
  a.grad_context = pointer(grad_context);
  a.grad_query = activation(grad_query);
  a.grad_key = activation(grad_key);
  a.grad_value = activation(grad_value);
  run(current.kernels->attention_backward, a);
}

// sizes: threads, batch, tokens, channels, key channels, value channels, heads
SelfAttentionArguments self_attention_arguments(const py::tuple& sizes, double norm_eps, bool residual, const py::tuple& x,
                                                const py::tuple& mask_tuple, const py::tuple& parameters,
                                                const py::tuple& state) {
  SelfAttentionArguments a{};
  a.num_threads = sizes[0].cast<int>();
  std::int64_t* fields[] = {&a.batch, &a.tokens, &a.channels, &a.key_channels, &a.value_channels, &a.heads};
  for (py::size_t i = 0; i < 6; ++i) *fields[i] = sizes[i + 1].cast<std::int64_t>();
  a.form = form;
  a.norm_eps = norm_eps;
  a.residual = residual;
  a.x = activation(x);
  a.mask = mask(mask_tuple);
  Pointers(parameters)
      .fill(a.query_weight, a.query_bias, a.key_weight, a.value_weight, a.value_bias, a.output_weight, a.output_bias,
            a.norm_weight, a.norm_bias);
  Pointers(state).fill(a.context, a.key_max, a.key_sum, a.key_tokens);
  return a;
}

void self_attention_forward(const py::tuple& sizes, double norm_eps, bool residual, const py::tuple& x,
                            const py::tuple& mask_tuple, const py::tuple& parameters, const py::tuple& state,
                            const py::tuple& output) {
  SelfAttentionArguments a = self_attention_arguments(sizes, norm_eps, residual, x, mask_tuple, parameters, state);
  a.output = activation(output);
  run(current.kernels->self_attention_forward, a);
}

void self_attention_backward(const py::tuple& sizes, double norm_eps, bool residual, const py::tuple& x,
                             const py::tuple& mask_tuple, const py::tuple& parameters, const py::tuple& state,
                             const py::tuple& grad_output, std::uintptr_t grad_context, const py::tuple& grad_x,
                             const py::tuple& grad_parameters) {
  SelfAttentionArguments a = self_attention_arguments(sizes, norm_eps, residual, x, mask_tuple, parameters, state);
  a.grad_output = activation(grad_output);
  a.grad_context = pointer(grad_context);
  a.grad_x = activation(grad_x);
  Pointers(grad_parameters)
      .fill(a.grad_query_weight, a.grad_query_bias, a.grad_key_weight, a.grad_value_weight, a.grad_value_bias,
            a.grad_output_weight, a.grad_output_bias, a.grad_norm_weight, a.grad_norm_bias);
  run(current.kernels->self_attention_backward, a);
}

// sizes: threads, batch, height, width, channels, hidden
MixFFNArguments mix_ffn_arguments(const py::tuple& sizes, double norm_eps, bool skip, bool residual, int function,
                                  const py::tuple& x, const py::tuple& parameters) {
  MixFFNArguments a{};
  a.num_threads = sizes[0].cast<int>();
  std::int64_t* fields[] = {&a.batch, &a.height, &a.width, &a.channels, &a.hidden};
  for (py::size_t i = 0; i < 5; ++i) *fields[i] = sizes[i + 1].cast<std::int64_t>();
  a.form = form;
  a.norm_eps = norm_eps;
  a.skip = skip;
  a.residual = residual;
  a.activation = static_cast<ActivationFunction>(function);
  a.x = activation(x);
  Pointers(parameters)
      .fill(a.fc1_weight, a.fc1_bias, a.dw_weight, a.dw_bias, a.fc2_weight, a.fc2_bias, a.hidden_norm_weight,
            a.hidden_norm_bias, a.norm_weight, a.norm_bias);
  return a;
}

void mix_ffn_forward(const py::tuple& sizes, double norm_eps, bool skip, bool residual, int function, const py::tuple& x,
                     const py::tuple& parameters, const py::tuple& output) {
  MixFFNArguments a = mix_ffn_arguments(sizes, norm_eps, skip, residual, function, x, parameters);
  a.output = activation(output);
  run(current.kernels->mix_ffn_forward, a);
}

void mix_ffn_backward(const py::tuple& sizes, double norm_eps, bool skip, bool residual, int function, const py::tuple& x,
                      const py::tuple& parameters, const py::tuple& grad_output, const py::tuple& grad_x,
                      const py::tuple& grad_parameters) {
  MixFFNArguments a = mix_ffn_arguments(sizes, norm_eps, skip, residual, function, x, parameters);
  a.grad_output = activation(grad_output);
  a.grad_x = activation(grad_x);
  Pointers(grad_parameters)
      .fill(a.grad_fc1_weight, a.grad_fc1_bias, a.grad_dw_weight, a.grad_dw_bias, a.grad_fc2_weight, a.grad_fc2_bias,
            a.grad_hidden_norm_weight, a.grad_hidden_norm_bias, a.grad_norm_weight, a.grad_norm_bias);
  run(current.kernels->mix_ffn_backward, a);
}

// sizes: threads, batch, tokens, in features, out features
LinearArguments linear_arguments(const py::tuple& sizes, const py::tuple& x, const py::tuple& parameters) {
  LinearArguments a{};
  a.num_threads = sizes[0].cast<int>();
  std::int64_t* fields[] = {&a.batch, &a.tokens, &a.in_features, &a.out_features};
  for (py::size_t i = 0; i < 4; ++i) *fields[i] = sizes[i + 1].cast<std::int64_t>();
  a.x = activation(x);
  Pointers(parameters).fill(a.weight, a.bias);
  return a;
}

void linear_forward(const py::tuple& sizes, const py::tuple& x, const py::tuple& parameters, const py::tuple& output) {
  LinearArguments a = linear_arguments(sizes, x, parameters);
  a.output = activation(output);
  run(current.kernels->linear_forward, a);
}

void linear_backward(const py::tuple& sizes, const py::tuple& x, const py::tuple& parameters, const py::tuple& grad_output,
                     const py::tuple& grad_x, const py::tuple& grad_parameters) {
  LinearArguments a = linear_arguments(sizes, x, parameters);
  a.grad_output = activation(grad_output);
  a.grad_x = activation(grad_x);
  Pointers(grad_parameters).fill(a.grad_weight, a.grad_bias);
  run(current.kernels->linear_backward, a);
}

// sizes: threads, batch, tokens, channels; statistics: mean, variance
BatchNormArguments batch_norm_arguments(const py::tuple& sizes, double eps, const py::tuple& x, const py::tuple& parameters,
                                        const py::tuple& statistics) {
  BatchNormArguments a{};
  a.num_threads = sizes[0].cast<int>();
  std::int64_t* fields[] = {&a.batch, &a.tokens, &a.channels};
  for (py::size_t i = 0; i < 3; ++i) *fields[i] = sizes[i + 1].cast<std::int64_t>();
  a.eps = eps;
  a.x = activation(x);
  Pointers(parameters).fill(a.weight, a.bias);
  Pointers(statistics).fill(a.mean, a.variance);
  return a;
}

void batch_norm_forward(const py::tuple& sizes, double eps, const py::tuple& x, const py::tuple& parameters,
                        const py::tuple& statistics, const py::tuple& output) {
  BatchNormArguments a = batch_norm_arguments(sizes, eps, x, parameters, statistics);
  a.output = activation(output);
  run(current.kernels->batch_norm_forward, a);
}

void batch_norm_backward(const py::tuple& sizes, double eps, const py::tuple& x, const py::tuple& parameters,
                         const py::tuple& statistics, const py::tuple& grad_output, const py::tuple& grad_x,
                         const py::tuple& grad_parameters) {
  BatchNormArguments a = batch_norm_arguments(sizes, eps, x, parameters, statistics);
  a.grad_output = activation(grad_output);
  a.grad_x = activation(grad_x);
  Pointers(grad_parameters).fill(a.grad_weight, a.grad_bias);
  run(current.kernels->batch_norm_backward, a);
}

double multiply_adds(int num_threads, std::int64_t steps) {
  if (num_threads < 1 || steps < 0) throw std::invalid_argument("multiply_adds: expected num_threads >= 1 and steps >= 0");
  double sink = 0;
  py::gil_scoped_release release;
  return current.kernels->multiply_adds(num_threads, steps, &sink);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "CPU kernels of msformer_kernels, for the best instruction set of this machine";
  const char* wanted = std::getenv("MSFORMER_CPU_ISA");
  set_isa(wanted && *wanted ? wanted : variants().front().name);
  m.def("isa", [] { return current.name; });
  m.def("available_isas", [] {
    py::list names;
    for (const Variant& variant : variants()) names.append(variant.name);
    return names;
  });
  m.def("set_isa", &set_isa, py::arg("name"));
  m.def("set_form", &set_form, py::arg("name"));
  m.def("attention_forward", &attention_forward);
  m.def("attention_backward", &attention_backward);
  m.def("self_attention_forward", &self_attention_forward);
  m.def("self_attention_backward", &self_attention_backward);
  m.def("mix_ffn_forward", &mix_ffn_forward);
  m.def("mix_ffn_backward", &mix_ffn_backward);
  m.def("linear_forward", &linear_forward);
  m.def("linear_backward", &linear_backward);
  m.def("batch_norm_forward", &batch_norm_forward);
  m.def("batch_norm_backward", &batch_norm_backward);
  m.def("multiply_adds", &multiply_adds, py::arg("num_threads"), py::arg("steps"));
}
