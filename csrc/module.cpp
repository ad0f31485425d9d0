// The Python module msformer_kernels._native: raw pointers, sizes and strides in, kernels of the best variant that this
// machine has. It knows nothing of torch; `native.py` of each operator calls it with tensors that are checked already.
//
// A call hands over one flat tuple of numbers, the fields of the operator's argument struct (abi.h) in order.
#include <pybind11/pybind11.h>

#include "cpu/base/team.h"
#include "cpu/base/tile_permission.h"
#include "dispatch.h"
#include "reader.h"

namespace py = pybind11;

namespace msformer {

void read_fields(Reader& r, Activation& a) {
  r.fill(a.data, a.dtype, a.batch_stride, a.head_stride, a.token_stride, a.channel_stride);
}

namespace {

void read_arguments(Reader& r, AttentionArguments& a, bool backward) {
  r.fill(a.num_threads, a.precision, a.batch, a.heads, a.query_tokens, a.key_tokens, a.key_channels, a.value_channels,
         a.query_scale, a.key_scale, a.output_scale, a.normalize_query, a.normalization, a.eps, a.query, a.key, a.value,
         a.mask, a.memory_tokens, a.memory_key, a.memory_value, a.context, a.key_max, a.key_sum);
  if (backward)
    r.fill(a.grad_output, a.grad_context, a.grad_query, a.grad_key, a.grad_value, a.grad_memory_key,
           a.grad_memory_value);
  else
    r.fill(a.output);
}

void read_arguments(Reader& r, SelfAttentionArguments& a, bool backward) {
  r.fill(a.num_threads, a.precision, a.batch, a.tokens, a.channels, a.key_channels, a.value_channels, a.heads, a.form,
         a.matrix_dtype, a.norm_eps, a.norm_centred, a.residual, a.x, a.mask, a.memory_tokens, a.memory_key,
         a.memory_value, a.parameters, a.context, a.key_max, a.key_sum, a.key_tokens, a.projected);
  if (backward)
    r.fill(a.grad_output, a.grad_context, a.grad_x, a.grad_memory_key, a.grad_memory_value, a.gradients);
  else
    r.fill(a.output);
}

void read_arguments(Reader& r, MixFFNArguments& a, bool backward) {
  r.fill(a.num_threads, a.precision, a.batch, a.height, a.width, a.channels, a.hidden, a.kernel_size, a.form,
         a.matrix_dtype, a.norm_eps, a.skip, a.residual, a.gated, a.activation, a.inner_activation, a.x, a.parameters,
         a.kept_hidden);
  if (backward)
    r.fill(a.grad_output, a.grad_x, a.gradients);
  else
    r.fill(a.output);
}

void read_arguments(Reader& r, LinearArguments& a, bool backward) {
  r.fill(a.num_threads, a.precision, a.batch, a.tokens, a.in_features, a.out_features, a.x, a.parameters);
  if (backward)
    r.fill(a.grad_output, a.grad_x, a.gradients);
  else
    r.fill(a.output);
}

void read_arguments(Reader& r, BatchNormArguments& a, bool backward) {
  r.fill(a.num_threads, a.batch, a.tokens, a.channels, a.eps, a.x, a.parameters, a.mean, a.variance);
  if (backward)
    r.fill(a.grad_output, a.grad_x, a.gradients);
  else
    r.fill(a.output);
}

template <class Arguments>
void define(py::module_& m, const char* name, void (*kernel)(const Arguments&), bool backward) {
  m.def(name, [kernel, backward](const py::tuple& values) {
    Arguments arguments{};
    Reader reader(values, "_native");
    read_arguments(reader, arguments, backward);
    reader.finish();
    py::gil_scoped_release release;
    kernel(arguments);
  });
}

}  // namespace
}  // namespace msformer

PYBIND11_MODULE(_native, m) {
  using namespace msformer;
  m.doc() = "CPU kernels of msformer_kernels, for the best instruction set of this machine";
  static const Variant variant = chosen_variant();
  m.def("isa", [] { return variant.name; });
  m.def("available_isas", [] {
    py::list names;
    for (const Variant& usable : usable_variants()) names.append(usable.name);
    return names;
  });
  m.def("why_tiles_are_refused", &why_tiles_are_refused);
  m.def("thread_library", &thread_library);
#define MSFORMER_DEFINE(name, Arguments)                                          \
  define<Arguments>(m, #name "_forward", variant.kernels->name##_forward, false); \
  define<Arguments>(m, #name "_backward", variant.kernels->name##_backward, true);
  MSFORMER_FOR_EACH_OPERATOR(MSFORMER_DEFINE)
}
