"""The fixed view pairs of a run, and what is measured on them."""

from __future__ import annotations

import torch

from pgl.augment import augment, normalise
from pgl.cache import VolumeCache
from pgl.config import PretrainConfig
from pgl.contexts import VALIDATION, Batch, ContextDataset, collate
from pgl.method import PGL
from pgl.metrics import chance, effective_rank, feature_spread, matching_accuracy
from pgl.views import cut, shared_region

# Pairs that go through the network at once; it changes memory and nothing else.
_CHUNK = 8


def prepare_views(batch: Batch, config: PretrainConfig) -> torch.Tensor:
    """The network's input for a batch: both views cut, normalised and augmented, Tensor[2B, 1, *patch]."""
    return augment(normalise(cut(batch.contexts, batch.pairs), config.intensity), batch.augmentation)


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
    def measure(self, method: PGL) -> dict[str, float]:
        """Matching accuracy, spread and loss of the network as it is.

        ``matching_accuracy``, ``feature_spread`` and ``feature_rank`` are of the encoder's aligned
        features, which is what is exported; the ``projected_`` ones of the online projector's output, which
        is what the loss sees.

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
            views = prepare_views(batch, self.config)
            regions, flips = batch.pairs.placed(shared_region(batch.pairs.boxes)), batch.pairs.flat_flips()
            of_level = method.backbone(views)
            features.append(method.align(of_level, regions, flips).float())
            projected.append(method.align(method.projector(of_level), regions, flips).float())
            matched.append(matching_accuracy(*features[-1].chunk(2)))
            projected_matched.append(matching_accuracy(*projected[-1].chunk(2)))
            losses.append(method(views, batch.pairs).float() * len(batch))
        method.train(was_training)
        if not torch.cat(features).isfinite().all():
            raise FloatingPointError(
                "the encoder's features on the validation pairs are not finite: lower "
                "optimizer.learning_rate, or use train.precision=32-true; the checkpoints hold the last good "
                "state"
            )
        return {
            "matching_accuracy": float(torch.cat(matched).mean()),
            "chance": chance(method.aligned_size),
            "feature_spread": feature_spread(torch.cat(features)),
            "feature_rank": effective_rank(torch.cat(features)),
            "projected_matching_accuracy": float(torch.cat(projected_matched).mean()),
            "projected_spread": feature_spread(torch.cat(projected)),
            "loss": float(torch.stack(losses).sum()) / self.config.validation.pairs,
        }
