"""Layouts: order, positions and sharing of image sequences."""

from __future__ import annotations

import pytest
import torch

from multimodal_gen.pipelines.zimage.packing import Rope, Shape, make_layout, pad_count, patchify, unpatchify

pytestmark = [pytest.mark.unit]

ROPE = Rope((4, 6, 6), 256.0)
CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(3, 4, 6), (16, 8, 2)])
def test_patchify_and_back(shape):
    latents = torch.randn(shape)
    patches = patchify(latents, 2)
    assert patches.shape == (shape[1] * shape[2] // 4, 4 * shape[0])
    # channels are innermost: the first patch starts with all channels of its top left pixel
    assert torch.equal(patches[0, : shape[0]], latents[:, 0, 0])
    assert torch.equal(unpatchify(patches, shape[1], shape[2], 2), latents)


def test_branches_share_an_image_only_if_their_captions_are_equally_long():
    same = make_layout([Shape(4, 4, (32, 32))], ROPE, CPU)
    assert len(same.images) == 1
    assert [joint.image for joint in same.joints] == [0, 0]
    other = make_layout([Shape(4, 4, (32, 64))], ROPE, CPU)
    assert len(other.images) == 2


def test_sequences_are_sorted_by_length_and_every_branch_is_there_once():
    shapes = [Shape(8, 8, (32, 64)), Shape(4, 5, (32,)), Shape(8, 8, (32, 32))]
    layout = make_layout(shapes, ROPE, CPU)
    lengths = layout.joint_segments.lengths
    assert list(lengths) == sorted(lengths)
    assert sorted((j.row, j.branch) for j in layout.joints) == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)]
    for joint in layout.joints:
        shape = shapes[joint.row]
        patches = shape.height * shape.width
        assert joint.image_tokens == patches
        assert joint.length == patches + pad_count(patches) + shape.captions[joint.branch]
    assert len(layout.joint_turns) == layout.joint_segments.total
    assert len(layout.image_turns) == layout.image_segments.total


def test_positions_are_those_of_the_reference():
    from diffusers.models.transformers.transformer_z_image import RopeEmbedder

    reference = RopeEmbedder(theta=256.0, axes_dims=(4, 6, 6), axes_lens=(512, 64, 64))
    height, width, caption = 3, 5, 32
    grid = [(caption + 1, y, x) for y in range(height) for x in range(width)]
    grid += [(0, 0, 0)] * pad_count(len(grid))
    captions = [(1 + i, 0, 0) for i in range(caption)]
    for found, positions in ((ROPE.image(height, width, caption), grid), (ROPE.caption(caption), captions)):
        expected = reference(torch.tensor(positions))  # complex
        assert torch.equal(found, torch.stack((expected.real, expected.imag), 1))
