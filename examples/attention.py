"""Functional efficient attention in ten lines, its gradients, and the plain PyTorch that it replaces.

Run: ``python examples/attention.py`` (needs ``pip install msformer``).
Takes: 2 s of CPU time, the import of torch included.
Prints: the shapes, how far the fused operator and its gradients are from plain PyTorch, and which backend served it.
"""

import torch

from msformer_kernels import efficient_attention, explain

torch.manual_seed(0)
query, key, value = (torch.randn(1, 2, 64 * 64, 32, requires_grad=True) for _ in range(3))  # [B, heads, tokens, D]
output, context = efficient_attention(query, key, value)  # [B, heads, tokens, D], and the context [B, heads, D, D]
plain = query.softmax(-1) @ (key.softmax(-2).transpose(-2, -1) @ value)  # the same; nothing is tokens x tokens
gradients, expected = (torch.autograd.grad(found.square().mean(), (query, key, value)) for found in (output, plain))

print(f"output {tuple(output.shape)}, context {tuple(context.shape)}")
print(f"largest difference from plain PyTorch: {(output - plain).abs().max().item():.1e}")
print(f"of the gradients: {max((a - b).abs().max().item() for a, b in zip(gradients, expected, strict=True)):.1e}")
print(explain("cpu"))
