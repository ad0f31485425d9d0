// What Python hands to the kernels: raw pointers, sizes and strides (in elements). No functions with code here: this
// header is shared by all variants of the CPU code.
//
// "Parameters" (weights, biases), statistics and gradients of parameters are contiguous arrays of the arithmetic type:
// double when the activations are float64, else float. Activations may have any strides and are converted on the way.
// Where there is a matrix_dtype, weights of linear layers and their gradients may be bfloat16 instead: of few tokens,
// where converting them would take longer than their products.
// A null pointer stands for an absent optional argument.
#pragma once

#include <cstdint>

namespace msformer {

enum class DType : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

struct Activation {  // [batch, head, token, channel]; token layouts have one head
  void* data;
  DType dtype;
  std::int64_t batch_stride, head_stride, token_stride, channel_stride;
};

struct Mask {  // [batch, token], one byte each, non-zero keeps the token
  const unsigned char* data;
  std::int64_t batch_stride, token_stride;
};

// How exact products are: torch.get_float32_matmul_precision(), and medium for bfloat16 activations. It does not hold
// for float64 and float16.
enum class Precision : int { highest, high, medium };

// How images are worked on: as images of many or of few tokens. Python chooses, as the op's state follows from it.
enum class Form : int { many_tokens = 1, few_tokens = 2 };

// What queries and keys are weighed by: a softmax each; the square root of the number of kept tokens; ReLU, with the
// sum of the keys dividing the output.
enum class Normalization : int { softmax, scaling, relu };

// query [B, H, Nq, Dk], key [B, H, N, Dk], value [B, H, N, Dv]
struct AttentionArguments {
  int num_threads;
  Precision precision;
  std::int64_t batch, heads, query_tokens, key_tokens, key_channels, value_channels;
  double query_scale, key_scale, output_scale;
  bool normalize_query;
  Normalization normalization;
  double eps;  // added to what ReLU attention divides by
  Activation query, key, value;
  Mask mask;
  std::int64_t memory_tokens;  // further keys and values, the same for every image; their batch stride is 0
  Activation memory_key, memory_value;
  void *context, *key_max, *key_sum;  // [B, H, Dk, Dv], [B, H, Dk], [B, H, Dk]
  Activation output;                  // forward
  Activation grad_output;             // backward, from here on
  const void* grad_context;
  Activation grad_query, grad_key, grad_value, grad_memory_key, grad_memory_value;
};

// The parameters of an operator, and their gradients, stand once: P is const void* or void*. Their order is that of the
// declaration in Python, which hands them over as one list.
template <class P>
struct AffineParameters {  // of a norm, or of a linear layer
  P weight, bias;
};

template <class P>
struct SelfAttentionParameters {  // weights as in torch.nn.Linear: [out, in]
  P query_weight, query_bias, key_weight, value_weight, value_bias, output_weight, output_bias;
  AffineParameters<P> norm;
};

// x [B, N, C]
struct SelfAttentionArguments {
  int num_threads;
  Precision precision;
  std::int64_t batch, tokens, channels, key_channels, value_channels, heads;
  Form form;
  DType matrix_dtype;
  double norm_eps;
  bool norm_centred;  // LayerNorm; else RMSNorm
  bool residual;
  Activation x;
  Mask mask;
  std::int64_t memory_tokens;  // further keys and values, the same for every image, as those of AttentionArguments
  Activation memory_key, memory_value;
  SelfAttentionParameters<const void*> parameters;
  void *context, *key_max, *key_sum;  // [B, H, Dk/H, Dv/H], [B, Dk], [B, Dk]
  void* key_tokens;                   // of many tokens, [B, Dk, C]
  Activation projected;               // of few tokens: see csrc/cpu/self_attention/unfolded.cpp
  Activation output;                  // forward
  Activation grad_output;             // backward, from here on
  const void* grad_context;
  Activation grad_x, grad_memory_key, grad_memory_value;
  SelfAttentionParameters<void*> gradients;
};

enum class ActivationFunction : int { gelu, gelu_tanh, relu, silu, hardswish, relu6, identity };

template <class P>
struct MixFFNParameters {  // dw_weight [hidden, kernel_size, kernel_size], fc2_weight [C, hidden or, gated, half]
  P fc1_weight, fc1_bias, dw_weight, dw_bias, fc2_weight, fc2_bias;
  AffineParameters<P> hidden_norm, norm;
};

// x [B, height * width, C]
struct MixFFNArguments {
  int num_threads;
  Precision precision;
  std::int64_t batch, height, width, channels, hidden;
  std::int64_t kernel_size;  // 3, 5 or 7
  Form form;
  DType matrix_dtype;
  double norm_eps;
  bool skip, residual;
  bool gated;  // the second half of Z, activated, gates the first; a half is a multiple of 16 and Z has no norm
  ActivationFunction activation, inner_activation;  // of Z or its gate, and of U before the convolution
  Activation x;
  MixFFNParameters<const void*> parameters;
  Activation
      kept_hidden;    // U before its activation, [B, N, hidden]: forward writes it, backward reads it; may be absent
  Activation output;  // forward
  Activation grad_output;  // backward, from here on
  Activation grad_x;
  MixFFNParameters<void*> gradients;
};

// x [B, N, in]; weight as in torch.nn.Linear: [out, in]
struct LinearArguments {
  int num_threads;
  Precision precision;
  std::int64_t batch, tokens, in_features, out_features;
  Activation x;
  AffineParameters<const void*> parameters;
  Activation output;       // forward
  Activation grad_output;  // backward, from here on
  Activation grad_x;       // without data where it is not wanted
  AffineParameters<void*> gradients;
};

// x [B, N, C]; mean and variance (biased) [C]
struct BatchNormArguments {
  int num_threads;
  std::int64_t batch, tokens, channels;
  double eps;
  Activation x;
  AffineParameters<const void*> parameters;
  void *mean, *variance;
  Activation output;       // forward
  Activation grad_output;  // backward, from here on
  Activation grad_x;
  AffineParameters<void*> gradients;
};

// The operators: each has a forward and a backward for its arguments in every variant. This list is all that the module
// and the dispatch know of them.
#define MSFORMER_FOR_EACH_OPERATOR(X)       \
  X(attention, AttentionArguments)          \
  X(self_attention, SelfAttentionArguments) \
  X(mix_ffn, MixFFNArguments)               \
  X(linear, LinearArguments)                \
  X(batch_norm, BatchNormArguments)

// The entry points of one variant.
struct Kernels {
#define MSFORMER_MEMBERS(name, Arguments)   \
  void (*name##_forward)(const Arguments&); \
  void (*name##_backward)(const Arguments&);
  MSFORMER_FOR_EACH_OPERATOR(MSFORMER_MEMBERS)
#undef MSFORMER_MEMBERS
};

}  // namespace msformer
