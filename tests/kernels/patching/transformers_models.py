"""The common tests of transformers for its SegFormer, PVTv2 and GLPN; `transformers_suite` runs this file.

`transformers_tests` is the folder `tests` of transformers' source distribution. It leaves out the tests of each model,
so configurations, inputs, and what the common tests do not know of these models are written here.
"""

from __future__ import annotations

import unittest
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers_tests.test_modeling_common import ModelTesterMixin

HIDDEN, HEADS, DEPTHS, RATIOS = [8, 16], [1, 2], [1, 2], [4, 2]
STAGES: dict[str, Any] = {"depths": DEPTHS, "sr_ratios": RATIOS, "hidden_sizes": HIDDEN, "num_attention_heads": HEADS}
SIZE = 32


class Tester:
    """What the common tests ask for: a configuration and inputs."""

    is_training = True
    batch_size, image_size, num_labels = 2, SIZE, 3
    num_hidden_layers = len(DEPTHS)

    def __init__(self, config: Any) -> None:
        self.config = config

    def get_config(self) -> Any:
        return self.config.__class__(**self.config.to_diff_dict())

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        return self.get_config(), {"pixel_values": torch.rand(self.batch_size, 3, SIZE, SIZE, generator=generator)}


class Common(ModelTesterMixin):
    """The tests of transformers, with these in place of those that expect text or one size of all hidden states."""

    config: Any
    test_resize_embeddings = False
    has_attentions = True

    def setUp(self) -> None:
        self.model_tester = Tester(self.config)

    @unittest.skip("images have no input embeddings")
    def test_inputs_embeds(self) -> None: ...

    @unittest.skip("images have no input embeddings")
    def test_model_get_set_embeddings(self) -> None: ...

    def outputs(self, **options: bool) -> Any:
        """Of every class, with options given to the call."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        config._attn_implementation = "eager"
        for kind in self.all_model_classes:
            with torch.no_grad():
                yield kind(config).eval()(**inputs, **options)

    def test_attention_outputs(self) -> None:
        for output in self.outputs(output_attentions=True):
            tokens = [(SIZE // 4) ** 2, *[(SIZE // 8) ** 2] * 2]
            shapes = [(2, h, n, n // r**2) for h, n, r in zip([1, 2, 2], tokens, [4, 2, 2], strict=True)]
            # PVTv2 has a tuple for each stage
            found = [a for entry in output.attentions for a in (entry if isinstance(entry, tuple) else (entry,))]
            assert [tuple(a.shape) for a in found] == shapes
            for a in found:
                torch.testing.assert_close(a.sum(-1), torch.ones(a.shape[:-1]))

    def test_hidden_states_output(self) -> None:
        for output in self.outputs(output_hidden_states=True):
            shapes = {tuple(h.shape) for h in output.hidden_states}
            assert {(2, 8, SIZE // 4, SIZE // 4), (2, 16, SIZE // 8, SIZE // 8)} <= shapes


class SegformerTest(Common, unittest.TestCase):
    all_model_classes = (
        transformers.SegformerModel,
        transformers.SegformerForSemanticSegmentation,
        transformers.SegformerForImageClassification,
    )
    config = transformers.SegformerConfig(
        num_encoder_blocks=2, patch_sizes=[7, 3], strides=[4, 2], mlp_ratios=[2, 2], decoder_hidden_size=8, **STAGES
    )

    def test_segmentation_trains(self) -> None:
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        config.num_labels = 3
        model = transformers.SegformerForSemanticSegmentation(config).train()
        output = model(**inputs, labels=torch.zeros(2, SIZE, SIZE, dtype=torch.long))
        output.loss.backward()
        assert tuple(output.logits.shape) == (2, 3, SIZE // 4, SIZE // 4)
        assert all(p.grad is not None for p in model.parameters())


class PvtV2Test(Common, unittest.TestCase):
    @unittest.skip("its attentions are tuples")
    def test_retain_grad_hidden_states_attentions(self) -> None: ...

    all_model_classes = (transformers.PvtV2Model, transformers.PvtV2ForImageClassification)
    config = transformers.PvtV2Config(
        image_size=SIZE, num_encoder_blocks=2, patch_sizes=[7, 3], strides=[4, 2], mlp_ratios=[2, 2], **STAGES
    )


class GLPNTest(Common, unittest.TestCase):
    all_model_classes = (transformers.GLPNModel,)
    config = transformers.GLPNConfig(
        num_encoder_blocks=2, patch_sizes=[7, 3], strides=[4, 2], mlp_ratios=[2, 2], decoder_hidden_size=8, **STAGES
    )
