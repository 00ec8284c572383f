"""Several shots, against plain loops over them in double precision; and other precisions than float32."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from svf_lightning.backbones.backbone import Backbone
from svf_lightning.episode import Episode
from svf_lightning.models.bam import BAM
from svf_lightning.models.baseline import Baseline
from svf_lightning.models.cosine import Cosine
from svf_lightning.models.cyctr import CyCTR
from svf_lightning.models.hsnet import HSNet
from svf_lightning.models.pfenet import PFENet
from svf_lightning.models.pspnet import PSPNet
from svf_lightning.training.losses import cross_entropy, cyctr_dice

SHOTS = 3


def backbone(last_stride=1):
    """Five stages that differ in channels; the last two have half the resolution, as in a VGG."""
    widths, strides = (3, 4, 6, 8, 10, 12), (2, 1, 2, 2, last_stride)
    stages = [
        nn.Sequential(nn.Conv2d(i, o, 3, stride, padding=1), nn.ReLU())
        for i, o, stride in zip(widths, widths[1:], strides, strict=False)
    ]
    return Backbone(stages, widths[1:], (2, 2, 4, 8, 8 * last_stride))


def episode(dtype=torch.float64, side=49):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, SHOTS + 1, 3, side, side, generator=generator).to(dtype)
    masks = torch.zeros(2, SHOTS + 1, side, side, dtype=torch.long)
    for number, mask in enumerate(masks.flatten(0, 1)):
        mask[5 + 2 * number : 30 + 2 * number, 4:25] = 1
        mask[:3] = 255
    masks[1, 2] = 0  # a support that shows nothing
    return Episode(images[:, 0], masks[:, 0], images[:, 1:], masks[:, 1:], torch.tensor([1, 2]))


def bam():
    pspnet = PSPNet(backbone(), 3, train_batch_norm=False)
    learner = nn.Sequential(pspnet.ppm, pspnet.cls)
    stages = [f"layer{i}" for i in range(5)]
    return BAM(
        pspnet.backbone, SHOTS, base_learner=learner, base_classes=(1, 2, 3), own_stages=stages, channels=8
    )


METHODS = {
    "baseline": lambda: Baseline(backbone(), SHOTS, channels=8, train_down_query=True),
    "pfenet": lambda: PFENet(backbone(), SHOTS, channels=8, bins=(9, 3)),
    "bam": bam,
    "cosine": lambda: Cosine(backbone(), stage=4, channels=8),
    "cyctr": lambda: CyCTR(backbone(), SHOTS, channels=16),
    "hsnet": lambda: HSNet(backbone(2), SHOTS, channels=8),
}


def build(method, dtype=torch.float64):
    torch.manual_seed(0)
    model = METHODS[method]().to(dtype)
    for module in model.modules():
        if "Dropout" in type(module).__name__:
            module.p = 0.0
    return model.train()


def up(x, size):
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=True)


def per_shot(model, task):
    """Query features, and of every shot prototype, prior mask and low-level features, pass by pass."""
    stages = model.backbone

    def features(image, mask):
        f2 = stages.layer2(stages.layer1(stages.layer0(image)))
        f3 = stages.layer3(f2)
        size = f3.shape[-2:]
        f4 = stages.layer4(f3 if mask is None else f3 * up(mask, size))
        return up(f2, size), torch.cat([f3, up(f2, size)], dim=1), f4

    low, middle, high = features(task.query_image, None)
    query = model.down_query(middle)
    prototypes, priors, lows = [], [], []
    for k in range(SHOTS):
        mask = (task.support_masks[:, k, None] == 1).double()
        low_k, middle_k, high_k = features(task.support_images[:, k], mask)
        weight = up(mask, query.shape[-2:])
        total = (model.down_supp(middle_k) * weight).sum(dim=(2, 3))
        prototypes.append((total / (weight.sum(dim=(2, 3)) + 5e-4))[:, :, None, None].expand_as(query))
        maps = []
        for q, s in zip(high.flatten(2), (high_k * up(mask, high_k.shape[-2:])).flatten(2), strict=True):
            cosines = s.T @ q / (s.norm(dim=0)[:, None] * q.norm(dim=0) + 1e-7)
            best = cosines.max(dim=0).values
            maps.append((best - best.min()) / (best.max() - best.min() + 1e-7))
        priors.append(torch.stack(maps).view(len(query), 1, *query.shape[-2:]))
        lows.append(low_k)
    return query, prototypes, priors, low, lows


def meta_head(model, query, prototype, prior):
    x = model.res1_meta(model.ASPP_meta(model.init_merge(torch.cat([query, prototype, prior], dim=1))))
    return model.cls_meta(model.res2_meta(x) + x)


def plain_baseline(model, task):
    query, prototypes, priors, *_ = per_shot(model, task)
    logits = up(meta_head(model, query, sum(prototypes), sum(priors)), task.query_image.shape[-2:])
    return logits, F.cross_entropy(logits, task.query_mask, ignore_index=255)


def plain_pfenet(model, task):
    query, prototypes, priors, *_ = per_shot(model, task)
    prototype, prior = sum(prototypes) / SHOTS, sum(priors) / SHOTS
    size, losses, enriched = task.query_image.shape[-2:], [], []
    for i, side in enumerate((9, 3)):
        pooled, at = F.adaptive_avg_pool2d(query, side), (side, side)
        x = torch.cat([pooled, prototype[..., :1, :1].expand_as(pooled), up(prior, at)], dim=1)
        x = model.init_merge[i](x)
        if i:
            x = model.alpha_conv[i - 1](torch.cat([x, up(enriched[-1], at)], dim=1)) + x
        x = model.beta_conv[i](x) + x
        inner = up(model.inner_cls[i](x), size)
        losses.append(F.cross_entropy(inner, task.query_mask, ignore_index=255))
        enriched.append(up(x, query.shape[-2:]))
    x = model.res1(torch.cat(enriched, dim=1))
    logits = up(model.cls(model.res2(x) + x), size)
    return logits, F.cross_entropy(logits, task.query_mask, ignore_index=255) + sum(losses) / 2


def plain_bam(model, task):
    query, prototypes, priors, low, lows = per_shot(model, task)

    def gram(image):
        rows = image.flatten(1)
        return rows @ rows.T / (rows.norm(dim=1)[:, None] * rows.norm(dim=1) + 1e-7)

    finals, metas = [], []
    for b in range(len(query)):
        e = torch.stack([(gram(low[b]) - gram(x[b])).norm() / len(low[b]) for x in lows])
        ascending, order = e.sort()
        heard = model.kshot_rw(ascending.view(1, -1, 1, 1)).flatten()
        weights = torch.zeros_like(e)
        weights[order] = heard
        weights = weights.softmax(dim=0)
        prototype = sum(w * p[b : b + 1] for w, p in zip(weights, prototypes, strict=True))
        prior = sum(w * p[b : b + 1] for w, p in zip(weights, priors, strict=True))
        meta = meta_head(model, query[b : b + 1], prototype, prior)
        with torch.no_grad():
            base = model.learner_base(model.base_backbone(task.query_image[b : b + 1])[4]).softmax(dim=1)
        others = [c for c in (1, 2, 3) if c != task.class_id[b]]
        psi = (weights * e).sum().expand_as(meta[:, :1])
        background, wanted = (model.gram_merge(torch.cat([m, psi], 1)) for m in meta.softmax(1).split(1, 1))
        background = model.cls_merge(torch.cat([background, base[:, others].sum(1, keepdim=True)], dim=1))
        finals.append(torch.cat([background, wanted], dim=1))
        metas.append(meta)
    size = task.query_image.shape[-2:]
    final, meta = up(torch.cat(finals), size), up(torch.cat(metas), size)
    return final, sum(F.cross_entropy(x, task.query_mask, ignore_index=255) for x in (final, meta))


def plain_cosine(model, task):
    query, size = model.backbone(task.query_image)[4], task.query_image.shape[-2:]
    prototypes = []
    for k in range(SHOTS):
        support = model.backbone(task.support_images[:, k])[4]
        weight = up((task.support_masks[:, k, None] == 1).double(), support.shape[-2:])
        area = weight.sum(dim=(2, 3)) + 5e-4
        prototypes.append(((support * weight).sum(dim=(2, 3)) / area)[:, :, None, None].expand_as(query))
    prototype = sum(prototypes) / SHOTS
    product = (query * prototype).sum(dim=1, keepdim=True)
    similarity = product / (query.norm(dim=1, keepdim=True) * prototype.norm(dim=1, keepdim=True))
    logits = up(model.head(torch.cat([query, prototype, similarity], dim=1)), size)
    return logits, F.cross_entropy(logits, task.query_mask, ignore_index=255)


PLAIN = {"cosine": plain_cosine, "baseline": plain_baseline, "pfenet": plain_pfenet, "bam": plain_bam}


@pytest.mark.parametrize("method", PLAIN)
def test_shots_as_a_batch_axis_are_the_loop_over_shots(method):
    model, task = build(method), episode()
    prediction = model(task)
    loss = cross_entropy(prediction, task)
    logits, expected = PLAIN[method](model, task)
    torch.testing.assert_close(prediction.logits, logits, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-12)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    ours, theirs = (torch.autograd.grad(x, list(parameters.values())) for x in (loss, expected))
    for name, one, other in zip(parameters, ours, theirs, strict=True):
        assert other.any(), name
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-8, msg=name)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("method", METHODS)
def test_a_model_computes_in_the_precision_that_it_is_given(method, dtype, near):
    loss_function = cyctr_dice if method == "cyctr" else cross_entropy
    losses = []
    for precision in (torch.float32, dtype):
        model, task = build(method, precision), episode(precision)
        torch.manual_seed(0)  # CyCTR draws tokens
        prediction = model(task)
        losses.append(loss_function(prediction, task))
        losses[-1].backward()
        assert prediction.logits.dtype == precision
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=near)
    if dtype == torch.float64:  # and not in float32 on the way
        assert losses[1].item() != losses[0].item()


@pytest.mark.parametrize("method", METHODS)
def test_any_size_is_taken_but_one_for_query_and_supports(method):
    model = build(method, torch.float32).eval()
    task = episode(torch.float32)  # 49 pixels
    even = Episode(*(x[..., :38, :47] for x in task[:4]), task.class_id)
    with torch.no_grad():
        assert model(even).logits.shape == (2, 2, 38, 47)
        mixed = task._replace(query_image=even.query_image)
        with pytest.raises(ValueError, match=r"query_image is \(38, 47\) but support_images are \(49, 49\)"):
            model(mixed)
