// What Python hands to the kernels: raw pointers, sizes and strides (in elements). No functions here: this header is
// shared by all instruction sets.
//
// "Parameters" (weights, biases), statistics and gradients of parameters are contiguous arrays of the arithmetic type:
// double when the activations are float64, else float. Activations may have any strides and are converted on the way.
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

// How images are worked on: as measured to be the better way for the shape, or always as images of many or of few tokens.
enum class Form : int { by_shape = 0, many_tokens = 1, few_tokens = 2 };

// query [B, H, Nq, Dk], key [B, H, N, Dk], value [B, H, N, Dv]
struct AttentionArguments {
  int num_threads;
  std::int64_t batch, heads, query_tokens, key_tokens, key_channels, value_channels;
  double query_scale, key_scale, output_scale;
  bool normalize_query, softmax;  // softmax: else "scaling" by the square root of the number of kept tokens
  Activation query, key, value;
  Mask mask;
  void *context, *key_max, *key_sum;  // [B, H, Dk, Dv], [B, H, Dk], [B, H, Dk]
  Activation output;                  // forward
  Activation grad_output;             // backward, from here on
  const void* grad_context;
  Activation grad_query, grad_key, grad_value;
};

// x [B, N, C]; weights as in torch.nn.Linear: [out, in]
struct SelfAttentionArguments {
  int num_threads;
  std::int64_t batch, tokens, channels, key_channels, value_channels, heads;
  Form form;
  double norm_eps;
  bool residual;
  Activation x;
  Mask mask;
  const void *query_weight, *query_bias, *key_weight, *value_weight, *value_bias, *output_weight, *output_bias;
  const void *norm_weight, *norm_bias;
  void *context, *key_max, *key_sum, *key_tokens;  // [B, H, Dk/H, Dv/H], [B, Dk], [B, Dk], [B, Dk, C]
  Activation output;                               // forward
  Activation grad_output;                          // backward, from here on
  const void* grad_context;
  Activation grad_x;
  void *grad_query_weight, *grad_query_bias, *grad_key_weight, *grad_value_weight, *grad_value_bias;
  void *grad_output_weight, *grad_output_bias, *grad_norm_weight, *grad_norm_bias;
};

enum class ActivationFunction : int { gelu = 0, gelu_tanh = 1, relu = 2 };

// x [B, height * width, C]; depthwise weight [hidden, 3, 3]
struct MixFFNArguments {
  int num_threads;
  std::int64_t batch, height, width, channels, hidden;
  Form form;
  double norm_eps;
  bool skip, residual;
  ActivationFunction activation;
  Activation x;
  const void *fc1_weight, *fc1_bias, *dw_weight, *dw_bias, *fc2_weight, *fc2_bias;
  const void *hidden_norm_weight, *hidden_norm_bias, *norm_weight, *norm_bias;
  Activation output;       // forward
  Activation grad_output;  // backward, from here on
  Activation grad_x;
  void *grad_fc1_weight, *grad_fc1_bias, *grad_dw_weight, *grad_dw_bias, *grad_fc2_weight, *grad_fc2_bias;
  void *grad_hidden_norm_weight, *grad_hidden_norm_bias, *grad_norm_weight, *grad_norm_bias;
};

// x [B, N, in]; weight as in torch.nn.Linear: [out, in]
struct LinearArguments {
  int num_threads;
  std::int64_t batch, tokens, in_features, out_features;
  Activation x;
  const void *weight, *bias;
  Activation output;       // forward
  Activation grad_output;  // backward, from here on
  Activation grad_x;       // without data where it is not wanted
  void *grad_weight, *grad_bias;
};

// x [B, N, C]; mean and variance (biased) [C]
struct BatchNormArguments {
  int num_threads;
  std::int64_t batch, tokens, channels;
  double eps;
  Activation x;
  const void *weight, *bias;
  void *mean, *variance;
  Activation output;       // forward
  Activation grad_output;  // backward, from here on
  Activation grad_x;
  void *grad_weight, *grad_bias;
};

// The kernels of one instruction set.
struct Kernels {
  void (*attention_forward)(const AttentionArguments&);
  void (*attention_backward)(const AttentionArguments&);
  void (*self_attention_forward)(const SelfAttentionArguments&);
  void (*self_attention_backward)(const SelfAttentionArguments&);
  void (*mix_ffn_forward)(const MixFFNArguments&);
  void (*mix_ffn_backward)(const MixFFNArguments&);
  void (*linear_forward)(const LinearArguments&);
  void (*linear_backward)(const LinearArguments&);
  void (*batch_norm_forward)(const BatchNormArguments&);
  void (*batch_norm_backward)(const BatchNormArguments&);
  double (*multiply_adds)(int num_threads, std::int64_t steps, double* sink);
};

}  // namespace msformer
