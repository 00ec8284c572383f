"""Features computed once per image: what is computed again, and that nothing else changes."""

import numpy as np
import pytest
import torch

from svf_lightning.backbones.feature_cache import remember_features
from svf_lightning.backbones.resnet import resnet50
from svf_lightning.episode import Episode
from svf_lightning.own_images.predict import FewShotPredictor


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return resnet50(weights=None).eval()


@pytest.fixture
def computed(backbone):
    """How many images went through the first stage, pass by pass."""
    passes = []
    handle = backbone.layer0.register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
    yield passes
    handle.remove()


IMAGES = torch.randn(3, 3, 33, 33, generator=torch.Generator().manual_seed(1))
MASKS = torch.zeros(3, 33, 33)
MASKS[:, 8:20, 8:30] = 1


@torch.no_grad()
def test_an_image_seen_before_is_not_computed_again_and_has_the_same_features(backbone, computed):
    plain = backbone(IMAGES, MASKS)
    with remember_features(backbone):
        backbone(IMAGES[:2], MASKS[:2])
        again = backbone(IMAGES[[1, 2, 0, 1]], MASKS[[1, 2, 0, 1]])
    assert computed == [3, 2, 1]
    for stage, expected in zip(again, plain, strict=True):
        torch.testing.assert_close(
            stage, expected[[1, 2, 0, 1]], rtol=0, atol=1e-5 * float(expected.abs().max())
        )


@torch.no_grad()
def test_another_mask_makes_another_image(backbone, computed):
    with remember_features(backbone):
        masked = backbone(IMAGES[:1], MASKS[:1])[4]
        whole = backbone(IMAGES[:1], torch.ones_like(MASKS[:1]))[4]
        unmasked = backbone(IMAGES[:1])[4]
    assert computed == [1, 1, 1]
    assert not torch.equal(masked, whole)
    torch.testing.assert_close(whole, unmasked, rtol=0, atol=1e-5 * float(unmasked.abs().max()))


def test_training_is_left_alone_and_so_is_everything_afterwards(backbone, computed):
    with remember_features(backbone):
        backbone(IMAGES[:1])
        features = backbone(IMAGES[:1])
    assert computed == [1, 1]
    assert features[4].requires_grad
    with torch.no_grad():
        backbone(IMAGES[:1])
    assert computed == [1, 1, 1]
    assert "forward" not in vars(backbone)


@torch.no_grad()
def test_no_more_is_kept_than_there_is_room_for(backbone, computed):
    with remember_features(backbone, megabytes=0):
        backbone(IMAGES)
        backbone(IMAGES)
    assert computed == [3, 3]


@torch.no_grad()
def test_half_precision_and_full_precision_are_not_mixed_up(backbone, computed):
    with remember_features(backbone):
        full = backbone(IMAGES[:1])
        with torch.autocast("cpu", torch.bfloat16):
            half = backbone(IMAGES[:1])
    assert (full[4].dtype, half[4].dtype) == (torch.float32, torch.bfloat16)


def numbered(query_id: int, support_id: int, pixels: float) -> Episode:
    """An episode of one grey support and a darker query."""
    image = torch.full((1, 3, 33, 33), pixels)
    mask = torch.ones(1, 33, 33, dtype=torch.long)
    ids = torch.tensor([query_id]), torch.tensor([[support_id]])
    return Episode(image - 1, mask, image[:, None], mask[:, None], torch.ones(1, dtype=torch.long), *ids)


@torch.no_grad()
def test_an_episodes_images_are_known_by_their_positions_in_whatever_way_a_method_shows_them(
    backbone, computed
):
    with remember_features(backbone) as cache:
        cache.episode = first = numbered(3, 8, 0.5)
        backbone(torch.cat([first.query_image, first.support_images[:, 0]]))
        # Other pixels at the same positions: only positions are asked.
        cache.episode = turned = numbered(8, 3, 0.25)
        backbone(turned.support_images[:, 0])
        backbone(turned.query_image)
        assert computed == [2]
        backbone(turned.query_image + 1e-3)  # none of the episode's images
        cache.episode = turned._replace(query_id=None)
        backbone(turned.query_image)
    assert computed == [2, 1, 1]


def test_a_trained_predictor_computes_supports_and_pictures_once_for_all_classes(train, tmp_path):
    predictor = FewShotPredictor(train(tmp_path / "run", "epochs=1"), batch_size=2)
    passes = []
    predictor.model.backbone.layer0.register_forward_pre_hook(lambda m, args: passes.append(len(args[0])))
    pixels = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 16:48] = 255

    predictor.fit({"a": [pixels[0]], "b": [pixels[1]]}, {"a": [mask], "b": [mask]})
    results = predictor.predict(list(pixels[2:]))

    assert [result.mask.shape for result in results] == [(64, 64)] * 3
    assert sum(passes) == 2 + 3
