// The Python module of the CUDA kernels (api.h): msformer_kernels._cuda, or, compiled with MSFORMER_CUDA_EMULATE, their
// emulation msformer_kernels._cuda_emulated. It knows nothing of torch.
//
// A call hands over engine, stream and one flat tuple of numbers, the fields of the operator's arguments in order.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "../reader.h"
#include "api.h"

namespace msformer::gpu {

void read_fields(Reader& r, Parameter& p) { r.fill(p.data, p.wide); }
void read_fields(Reader& r, ParameterGradient& p) { r.fill(p.data, p.wide); }
void read_fields(Reader& r, Tokens& x) { r.fill(x.data, x.batch_stride, x.token_stride, x.channel_stride); }
void read_fields(Reader& r, Heads& x) {
  r.fill(x.data, x.batch_stride, x.head_stride, x.token_stride, x.channel_stride);
}

void read_fields(Reader& r, SelfAttentionState& s) { r.fill(s.context, s.key_max, s.key_sum, s.key_tokens); }

namespace {

void read_inputs(Reader& r, MixFFNArguments& a) {
  r.fill(a.batch, a.height, a.width, a.channels, a.hidden, a.eps, a.skip, a.residual, a.activation, a.x, a.parameters);
}
void read_forward(Reader& r, MixFFNArguments& a) { r.fill(a.output); }
void read_backward(Reader& r, MixFFNArguments& a) { r.fill(a.grad_output, a.grad_x, a.gradients, a.scratch); }

void read_inputs(Reader& r, AttentionArguments& a) {
  r.fill(a.batch, a.heads, a.queries, a.tokens, a.key_channels, a.value_channels, a.query_scale, a.key_scale,
         a.output_scale, a.normalize_query, a.softmax, a.query, a.key, a.value, a.mask);
}
void read_forward(Reader& r, AttentionArguments& a) { r.fill(a.context, a.key_max, a.key_sum, a.output, a.scratch); }
void read_output(Reader& r, AttentionArguments& a) { r.fill(a.context, a.output); }
void read_backward(Reader& r, AttentionArguments& a) {
  r.fill(a.context, a.key_max, a.key_sum, a.grad_output, a.grad_context, a.grad_query, a.grad_key, a.grad_value,
         a.scratch);
}

void read_inputs(Reader& r, SelfAttentionArguments& a) {
  r.fill(a.batch, a.tokens, a.channels, a.keys, a.values, a.heads, a.eps, a.residual, a.x, a.mask, a.parameters);
}
void read_forward(Reader& r, SelfAttentionArguments& a) { r.fill(a.state, a.output, a.scratch); }
void read_backward(Reader& r, SelfAttentionArguments& a) {
  r.fill(a.state, a.grad_output, a.grad_context, a.grad_x, a.gradients, a.scratch);
}

void check(int error) {
  if (error == OUT_OF_SHARED_MEMORY) throw std::runtime_error("the kernels need more shared memory than the GPU has");
  if (error) throw std::runtime_error(std::string("CUDA: ") + error_text(error));
}

template <class Arguments>
void define(pybind11::module_& m, const char* name, int (*run)(Engine, const Arguments&, void*),
            void (*read_others)(Reader&, Arguments&)) {
  m.def(name, [=](int engine, std::uintptr_t stream, const pybind11::tuple& values) {
    Arguments arguments{};
    Reader reader(values, "_cuda");
    read_inputs(reader, arguments);
    read_others(reader, arguments);
    reader.finish();
    pybind11::gil_scoped_release release;
    check(run(static_cast<Engine>(engine), arguments, reinterpret_cast<void*>(stream)));
  });
}

// Bytes of scratch memory that an entry point needs; takes the inputs alone.
template <class Arguments>
void define_scratch(pybind11::module_& m, const char* name, std::int64_t (*bytes)(Engine, const Arguments&)) {
  m.def(name, [=](int engine, const pybind11::tuple& values) {
    Arguments arguments{};
    Reader reader(values, "_cuda");
    read_inputs(reader, arguments);
    reader.finish();
    const std::int64_t found = bytes(static_cast<Engine>(engine), arguments);
    if (found < 0) check(static_cast<int>(found));
    return found;
  });
}

}  // namespace
}  // namespace msformer::gpu

#ifdef MSFORMER_CUDA_EMULATE
#define MSFORMER_MODULE _cuda_emulated
#else
#define MSFORMER_MODULE _cuda
#endif

PYBIND11_MODULE(MSFORMER_MODULE, m) {
  using namespace msformer::gpu;
  m.doc() = "CUDA kernels of msformer_kernels";
  m.def("is_emulated", is_emulated);
  m.def("shared_memory", shared_memory);
#ifdef MSFORMER_CUDA_EMULATE
  m.def("record_launches", record_launches);
#endif
  m.def("why_not_this_driver", why_not_this_driver);
  m.def("compiled_for", compiled_for);
  define(m, "mix_ffn_forward", mix_ffn_forward, read_forward);
  define(m, "mix_ffn_backward", mix_ffn_backward, read_backward);
  define_scratch(m, "mix_ffn_backward_scratch", mix_ffn_backward_scratch);
  define(m, "attention_forward", attention_forward, read_forward);
  define(m, "attention_output", attention_output, read_output);
  define(m, "attention_backward", attention_backward, read_backward);
  define_scratch(m, "attention_forward_scratch", attention_forward_scratch);
  define_scratch(m, "attention_backward_scratch", attention_backward_scratch);
  define(m, "self_attention_forward", self_attention_forward, read_forward);
  define_scratch(m, "self_attention_forward_scratch", self_attention_forward_scratch);
  define(m, "self_attention_backward", self_attention_backward, read_backward);
  define_scratch(m, "self_attention_backward_scratch", self_attention_backward_scratch);
}
