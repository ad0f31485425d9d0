"""A SegFormer fine-tuned by a LoRA adapter, its feed-forward layers fused.

Run: ``python examples/segformer_adapter.py`` (needs ``pip install msformer transformers peft``).
Takes: 7 s of CPU time, most of it imports.
Prints: what was replaced and what was left alone and why, and the loss as it falls.

The images are synthetic, the label is a disc. The adapter is on the attention, and on the feed-forward layer of the
last stage. That layer runs as it is, which the report says: the fused operator would leave the adapter out.
"""

import peft
import torch
from transformers import SegformerConfig, SegformerForSemanticSegmentation

import msformer_kernels

torch.manual_seed(0)
sizes = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 64, 128], "decoder_hidden_size": 64}
model = SegformerForSemanticSegmentation(SegformerConfig(num_labels=2, drop_path_rate=0.0, **sizes))
targets = r".*\.(q_proj|v_proj|query|value)|.*3.*\.mlp\.(fc2|dense2)"  # names of transformers 5 and 4
model = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, modules_to_save=["decode_head"]))
print(msformer_kernels.patch(model, example=(torch.randn(4, 3, 64, 64),), min_gain=0))

rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
for step in range(31):
    centre_row, centre_column = torch.randint(16, 48, (2, 4, 1, 1))
    labels = ((rows - centre_row) ** 2 + (columns - centre_column) ** 2 < 12**2).long()
    images = 2 * labels[:, None] + torch.randn(4, 3, 64, 64)
    loss = model(pixel_values=images, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0:
        print(f"step {step}, loss {loss.item():.3f}")
