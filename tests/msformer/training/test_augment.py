"""Views: image, target and weight move together, and what is drawn is where it should be."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from msformer.training import augment
from msformer.training.augment import Geometry, Strengths, generator
from msformer.training.batches import Batches
from msformer.training.domains import DERMOSCOPY
from msformer.training.lessons import Pool

SIZE = 65
STILL = Strengths(rotation=0, zoom=(1.0, 1.0), aspect=0, gain=0, contrast=0, balance=0, saturation=0, gamma=0, noise=0)


def scene(images: int = 8, size: int = 97) -> tuple[Tensor, Tensor]:
    """Images of an ellipse off the middle, white on black, and their targets."""
    axis = torch.linspace(-1, 1, size)
    inside = ((axis[:, None] - 0.2) / 0.5) ** 2 + ((axis + 0.1) / 0.3) ** 2 < 1
    target = inside.float().expand(images, size, size)
    return target[:, None].expand(images, 3, size, size).contiguous(), target.contiguous()


def generators(count: int = 8, seed: int = 0) -> list[torch.Generator]:
    return [generator(seed, number) for number in range(count)]


def test_image_and_target_move_together() -> None:
    images, target = scene()
    geometry = augment.draw_geometry(generators(), Strengths())
    seen = augment.warp_images(images, geometry, SIZE)[:, 0]
    moved, weight = augment.warp_targets(target, torch.ones_like(target), geometry, SIZE)
    clear = (weight > 0) & ((seen < 0.1) | (seen > 0.9))  # not the border of the ellipse
    assert clear.float().mean() > 0.6
    assert ((seen > 0.5) == (moved > 0.5))[clear].all()
    assert 0 < moved.mean() < 0.6
    assert len({float(view.mean()) for view in moved}) > 5  # not all views are alike


def test_the_weight_moves_with_the_image_and_is_zero_beyond_it() -> None:
    _, target = scene()
    geometry = augment.draw_geometry(generators(), replace(Strengths(), zoom=(1.1, 1.1)))
    _, weight = augment.warp_targets(target, target, geometry, SIZE)
    moved, ones = augment.warp_targets(target, torch.ones_like(target), geometry, SIZE)
    torch.testing.assert_close(ones, ones.round())
    beyond = ones == 0
    assert 0.1 < beyond.float().mean() < 0.6
    assert (weight[beyond] == 0).all()
    assert ((weight > 0.5) == (moved > 0.5))[~beyond].all()


def test_without_strengths_a_view_is_the_image_or_its_mirror_image() -> None:
    images = torch.rand(8, 3, SIZE, SIZE)
    geometry = augment.draw_geometry(generators(), STILL)
    seen = augment.warp_images(images, geometry, SIZE)
    smooth = torch.nn.functional.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)
    smooth = torch.nn.functional.avg_pool2d(smooth, 2)
    mirrored = [smooth.flip(sides) for sides in ([], [2], [3], [2, 3])]
    found = [[bool(torch.allclose(view, each[i], atol=1e-4)) for each in mirrored] for i, view in enumerate(seen)]
    assert all(sum(each) == 1 for each in found)
    assert sum(each[0] for each in found) < 8


def test_a_quarter_turn_by_hand() -> None:
    """A view whose right is the image's top shows the image turned by a quarter to the left or right, not mirrored."""
    image = torch.zeros(1, 1, 9, 9)
    image[0, 0, 0, 4] = 1  # top, middle
    angle = math.pi / 2
    matrix = torch.tensor([[[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]]])
    seen = augment.warp_images(image, Geometry(matrix), 9)
    assert int(seen.flatten().argmax()) == 4 * 9  # left, middle


def test_zoom_shows_a_part_of_the_image() -> None:
    geometry = augment.draw_geometry(generators(), replace(STILL, zoom=(0.5, 0.5)))
    sides = geometry.matrix[:, :, :2].abs().sum(2)
    torch.testing.assert_close(sides, torch.full_like(sides, 0.5))
    assert (geometry.matrix[:, :, 2].abs() <= 0.5).all()


def test_light_follows_its_formula() -> None:
    images = torch.rand(8, 3, 9, 9)
    look = augment.draw_appearance(generators(), 9, replace(Strengths(), noise=0, shade=0.3))
    found = augment.change_light(images, look)
    for image, changed, light in zip(images, found, look.light, strict=True):
        axis = (torch.arange(9) - 4) / 4.5
        x = image * light[:3, None, None] * (1 + light[7] * axis + light[8] * axis[:, None])
        x = x.mean() + (x - x.mean()) * light[3]
        grey = x.mean(0)
        expected = (grey + (x - grey) * light[4]).clamp(0, 1) ** light[5]
        torch.testing.assert_close(changed, expected)


def test_hairs_are_thin_dark_lines_in_some_views() -> None:
    white = torch.ones(64, 3, SIZE, SIZE)
    look = augment.draw_appearance(generators(64), SIZE, replace(STILL, hairs=0.4))
    drawn = augment.draw_hairs(white, look)
    touched = (drawn < 0.9).any(1).float().mean((1, 2))
    assert 15 < int((touched > 0).sum()) < 36  # two fifths of 64 are 26
    assert touched.max() < 0.25
    assert drawn.min() < 0.6
    assert drawn.min() >= 0


def test_dark_corners_are_background_for_sure() -> None:
    images, target, weight = torch.ones(64, 3, SIZE, SIZE), torch.ones(64, SIZE, SIZE), torch.zeros(64, SIZE, SIZE)
    look = augment.draw_appearance(generators(64), SIZE, replace(STILL, corners=0.4))
    seen, moved, certain = augment.draw_corners(images, target, weight, look)
    dark = seen[:, 0] < 0.5
    assert (moved[dark] == 0).all()
    assert (certain[dark] == 1).all()
    assert (moved[~dark & (seen[:, 0] > 0.7)] == 1).all()
    assert not dark[:, SIZE // 2, SIZE // 2].any()
    assert 10 < int(dark.flatten(1).any(1).sum()) < 36


def pool(images: int = 5) -> Pool:
    pixels, target = scene(images)
    noisy = (pixels * 200 + 20 * torch.rand(pixels.shape, generator=torch.Generator().manual_seed(0))).to(torch.uint8)
    return Pool(tuple(map(str, range(images))), noisy, target.to(torch.uint8), torch.full_like(target, 255).byte())


def batches(seed: int = 3, batch: int = 4, share: tuple[int, int] = (0, 1), views: int = 1) -> Batches:
    return Batches(pool(), DERMOSCOPY.strengths, seed=seed, batch=batch, sizes=(33, 49), share=share, views=views)


def test_a_crop_is_the_same_in_whatever_process_it_is_made() -> None:
    for step in (0, 7):
        whole = batches().make(step)
        parts = [batches(share=(rank, 2)).make(step) for rank in (0, 1)]
        for name, value in whole._asdict().items():
            joined = torch.cat([getattr(part, name) for part in parts])
            torch.testing.assert_close(joined, value, msg=lambda m, n=name: f"{n}: {m}")


def test_batches_follow_from_seed_and_step() -> None:
    first = batches().make(5)
    again = batches()
    again.make(0)
    assert all(torch.equal(x, y) for x, y in zip(first, again.make(5), strict=True))
    assert not torch.equal(first.weight, batches(seed=4).make(5).weight)


def test_every_image_is_seen_once_before_any_is_seen_again() -> None:
    found = batches()
    numbers = [found._image(number) for number in range(15)]
    turns = [numbers[start : start + 5] for start in (0, 5, 10)]
    assert all(sorted(turn) == list(range(5)) for turn in turns)
    assert turns[0] != turns[1]


def test_two_lights_of_the_same_crops() -> None:
    """Split in parts, each part has both lights of its crops, the first half in one, the second in the other."""
    batch = batches(views=2).make(1)
    first, second = batch.images.chunk(2)
    assert len(first) == 4
    assert not torch.equal(first, second)
    part = list(batch.parts(2, views=2))[1]
    assert torch.equal(part.images, torch.cat([first[2:], second[2:]]))
    assert torch.equal(part.target, batch.target[2:])


@pytest.mark.parametrize("seed", [0, 1])
def test_crops_are_standardised(seed: int) -> None:
    images = batches(seed).make(0).images
    torch.testing.assert_close(images.mean((2, 3)), torch.zeros(4, 3), atol=1e-4, rtol=0)
    torch.testing.assert_close(images.std((2, 3), correction=0), torch.ones(4, 3), atol=1e-3, rtol=0)
