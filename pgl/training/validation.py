"""The fixed view pairs of a run, and what is measured on them."""

from __future__ import annotations

import torch

from pgl.cache.volumes import VolumeCache
from pgl.config import PretrainConfig
from pgl.methods.base import Method
from pgl.training.contexts import VALIDATION, ContextDataset, collate
from pgl.training.metrics import chance, effective_rank, feature_spread, matching_accuracy
from pgl.views import shared_region

# Pairs that go through the network at once, to save memory. What looks at a batch (batch normalisation in the
# heads, decorrelation) sees so many.
_CHUNK = 8


class Validation:
    """The first ``validation.pairs`` samples of the run's validation stream, augmented like training samples.

    They depend on the seed, the cases and the view settings alone, so the untrained network, every later
    one and a resumed run see the same voxels.

    Args:
        cache: the volumes.
        cases: the cases to draw from, as numbers in the cache.
        config: the run's settings.
    """

    def __init__(self, cache: VolumeCache, cases: list[int], config: PretrainConfig) -> None:
        self.config = config
        data = ContextDataset(
            cache,
            cases,
            config.views,
            config.augment,
            config.seed,
            VALIDATION,
            skip_damaged=config.train.skip_damaged,
        )
        numbers = range(config.validation.pairs)
        self.batches = [collate([data[i] for i in numbers[n : n + _CHUNK]]) for n in numbers[::_CHUNK]]

    @torch.no_grad()
    def measure(self, method: Method) -> dict[str, float]:
        """Matching accuracy, spread and loss of the network as it is.

        ``matching_accuracy``, ``feature_spread`` and ``feature_rank`` are of the encoder's aligned
        features, which is what is exported; the ``projected_`` ones of what the loss sees: the online
        projector's output. They are missing where a method has no projector, and the accuracy where it
        projects whole views.

        Returns:
            The numbers of a validation line in metrics.jsonl, without "kind" and "step".

        Raises:
            FloatingPointError: the features are not finite.
        """
        device = next(method.parameters()).device
        was_training = method.training
        method.eval()
        features, projected, matched, projected_matched, losses = [], [], [], [], []
        for part in self.batches:
            batch = part.to(device)
            views = method.views(batch, self.config)
            regions, flips = batch.pairs.placed(shared_region(batch.pairs.boxes)), batch.pairs.flat_flips()
            of_level = method.backbone(views)
            features.append(method.align(of_level, regions, flips).float())
            matched.append(matching_accuracy(*features[-1].chunk(2)))
            projection = method.project(of_level)
            if projection is not None and projection.shape[2:] == of_level.shape[2:]:
                projection = method.align(projection, regions, flips)
                projected_matched.append(matching_accuracy(*projection.float().chunk(2)))
            if projection is not None:
                projected.append(projection.float())
            losses.append(method(method.inputs(batch, self.config), batch.pairs).float() * len(batch))
        method.train(was_training)
        if not torch.cat(features).isfinite().all():
            raise FloatingPointError(
                "the encoder's features on the validation pairs are not finite: lower "
                "optimizer.learning_rate, or use train.precision=32-true; the checkpoints hold the last good "
                "state"
            )
        numbers = {
            "matching_accuracy": float(torch.cat(matched).mean()),
            "chance": chance(method.aligned_size),
            "feature_spread": feature_spread(torch.cat(features)),
            "feature_rank": effective_rank(torch.cat(features)),
        }
        if projected_matched:
            numbers["projected_matching_accuracy"] = float(torch.cat(projected_matched).mean())
        if projected:
            numbers["projected_spread"] = feature_spread(torch.cat(projected))
        return {**numbers, "loss": float(torch.stack(losses).sum()) / self.config.validation.pairs}
