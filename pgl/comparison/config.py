"""The settings of ``pgl compare``, and the runs that follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pgl.config import MethodSettings, PretrainConfig, genesis_intensity
from pgl.config_check import check as check_pretraining
from pgl.downstream.config import RANDOM, FinetuneConfig
from pgl.downstream.config import check as check_finetuning
from pgl.downstream.fresh_stages import check_with_pretraining

INITIALISATIONS = (RANDOM, "genesis", "byol", "pgl")
Tasks = dict[str, dict[str, list[str | int]]]


@dataclass
class CompareSettings:
    """What is compared.

    Args:
        data: a cache with labels that ``pgl prepare`` wrote.
        output: the folder of the comparison, created; the same command goes on with what is there.
        unlabelled: a cache to pretrain on; leave out for ``data``. The test cases of ``data`` are left out of
            it in any case.
        initialisations: of ``random``, ``genesis``, ``byol``, ``pgl``.
        fractions: shares of the training patients whose labels are used.
        ceiling_fractions: further shares, fine-tuned from random weights and with the first seed alone: what
            more labels would give.
        seeds: each is the seed of a pretraining by every method and of all fine-tunings from it.
        pretrain_once: pretrain with the first seed alone, and fine-tune from it with every seed. The spread
            over seeds is then that of fine-tuning alone.
        tasks: name → classes, see ``classes`` of ``pgl finetune``; each is fine-tuned by itself. Leave out
            for one task, with the classes of the fine-tuning settings.
        jobs: runs in progress at once, on the same cores and the same GPU. Above 1 none takes more threads
            and reading processes than its share of the cores.
        keep_going: go on with the others when a run fails.
        time_limit_s: after so many seconds save what is in progress and stop; 0 for no limit.
    """

    data: Path
    output: Path
    unlabelled: Path | None = None
    initialisations: tuple[str, ...] = INITIALISATIONS
    fractions: tuple[float, ...] = (0.1, 0.25, 1.0)
    ceiling_fractions: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    pretrain_once: bool = False
    tasks: Tasks | None = None
    jobs: int = 1
    keep_going: bool = False
    time_limit_s: float = 0

    def starts(self, seed: int | None = None) -> dict[float, tuple[str, ...]]:
        """The initialisations of each fraction, with that seed or at all."""
        starts = dict.fromkeys(self.fractions, self.initialisations)
        if seed in (None, self.seeds[0]):
            starts |= dict.fromkeys(self.ceiling_fractions, (RANDOM,))
        return starts


@dataclass(frozen=True)
class Tuning:
    """One fine-tuning.

    Args:
        task: its name, empty if there is one task only.
        initialisation: ``random`` or a method.
        fraction, seed: of the labels, of everything.
        config: its settings; ``weights`` is the file that the pretraining is exported to.
    """

    task: str
    initialisation: str
    fraction: float
    seed: int
    config: FinetuneConfig


class Comparison:
    """The runs of a comparison.

    Args:
        settings: what is compared.
        pretrain: what the pretrainings share; ``data``, ``output``, ``seed`` and ``method.name`` are set
            here.
        finetune: what the fine-tunings share; ``data``, ``output``, ``weights``, ``fraction``, ``seed``,
            ``encoder`` and ``intensity`` are set here, and ``fresh_stages`` of random weights.

    Attributes:
        pretrainings: (method, seed) → settings.
        tunings: in the order in which they are run.

    Raises:
        ValueError: settings that cannot be compared; names the setting.
    """

    def __init__(self, settings: CompareSettings, pretrain: PretrainConfig, finetune: FinetuneConfig) -> None:
        self.settings = settings
        self.folder = Path(settings.output)
        _check(settings)
        _check_shared(pretrain, finetune, settings.initialisations)
        self._pretrain, self._finetune = pretrain, finetune
        self.pretrainings = {
            (method, seed): self._pretraining(method, seed)
            for seed in settings.seeds[: 1 if settings.pretrain_once else None]
            for method in settings.initialisations
            if method != RANDOM
        }
        self.tunings = [
            self._tuning(task, initialisation, fraction, seed)
            for seed in settings.seeds
            for task in self.tasks
            for fraction, initialisations in settings.starts(seed).items()
            for initialisation in initialisations
        ]
        for run in self.pretrainings.values():
            check_pretraining(run)
        check_with_pretraining(finetune.fresh_stages, self.pretrainings.values())
        for tuning in self.tunings:
            check_finetuning(tuning.config)

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks; one empty name if there is one only."""
        return list(self.settings.tasks) if self.settings.tasks else [""]

    @property
    def carries_decoder(self) -> bool:
        """Whether PGL pretrains, and hands over, the whole U-Net."""
        return any(run.method.features == "decoder" for run in self.pretrainings.values())

    @property
    def fresh_stages(self) -> int:
        """How many of the deepest pretrained stages are not carried over; 0 without a pretraining."""
        return max(tuning.config.fresh_stages for tuning in self.tunings)

    @property
    def genesis_clip_hu(self) -> tuple[float, float]:
        """The window of HU that Models Genesis scales to [0, 1]."""
        return genesis_intensity(self._pretrain.intensity).clip_hu

    @property
    def doubts(self) -> list[str]:
        """What can be run but is perhaps not meant, a line each."""
        # Only PGL asks a place and its mirror image for the same features.
        if not any(method == "pgl" for method, _ in self.pretrainings):
            return []
        of_views = dict(zip("DHW", self._pretrain.views.flip_chances, strict=True))
        of_patches = dict(zip("DHW", self._finetune.patches.flip_probability, strict=True))
        axes = [name for name in "DHW" if of_views[name] > of_patches[name] == 0]
        if not axes:
            return []
        without = ",".join(f"{0 if name in axes else of_views[name]:g}" for name in "DHW")
        mirrored = " and ".join(f"axis {name}" for name in axes)
        return [
            f"note: pretraining mirrors {mirrored}, fine-tuning does not: if classes differ in that, as "
            "right and left organs do, features that ignore mirrors may cost Dice; "
            f"--pretrain.views.flip_probability {without}, with an --output of its own, pretrains without"
        ]

    @property
    def pretraining_cache(self) -> Path:
        """Where the volumes lie that are pretrained on."""
        return self.folder / "pretraining-cache"

    def source_of(self, tuning: Tuning) -> tuple[str, int] | None:
        """The pretraining that a fine-tuning starts from, None for random."""
        if tuning.initialisation == RANDOM:
            return None
        return tuning.initialisation, self.settings.seeds[0] if self.settings.pretrain_once else tuning.seed

    def encoder_file(self, method: str, seed: int) -> Path:
        """Where the encoder of a pretraining is exported to."""
        return self.folder / "encoders" / f"{method}-seed{seed}.pt"

    def _pretraining(self, method: str, seed: int) -> PretrainConfig:
        chosen = replace(self._pretrain.method, name=method)  # type: ignore[arg-type]
        if method != "pgl":
            # Options of PGL beyond the paper.
            chosen = replace(chosen, more_levels=[], decorrelation=MethodSettings.decorrelation)
            if chosen.features == "decoder":
                # The stage is one of the decoder's then, which the others do not read.
                chosen = replace(chosen, features="encoder", feature_level=MethodSettings.feature_level)
        intensity = self._pretrain.intensity
        return replace(
            self._pretrain,
            data=self.pretraining_cache,
            output=self.folder / "pretrained" / f"{method}-seed{seed}",
            seed=seed,
            resume=False,
            method=chosen,
            intensity=genesis_intensity(intensity) if method == "genesis" else intensity,
        )

    def _tuning(self, task: str, initialisation: str, fraction: float, seed: int) -> Tuning:
        settings, shared = self.settings, self._finetune
        pretrain_seed = settings.seeds[0] if settings.pretrain_once else seed
        name = f"{initialisation}-fraction{fraction:g}-seed{seed}"
        config = replace(
            shared,
            data=settings.data,
            output=self.folder / "finetuned" / (f"{task}-{name}" if task else name),
            weights=RANDOM
            if initialisation == RANDOM
            else str(self.encoder_file(initialisation, pretrain_seed)),
            fraction=fraction,
            seed=seed,
            resume=False,
            source=None,
            classes=settings.tasks[task] if settings.tasks else shared.classes,
            encoder=self._pretrain.encoder,
            fresh_stages=0 if initialisation == RANDOM else shared.fresh_stages,
            # A weights file brings its own.
            intensity=self._pretrain.intensity if initialisation == RANDOM else None,
        )
        return Tuning(task, initialisation, fraction, seed, config)


def _check(settings: CompareSettings) -> None:
    unknown = sorted(set(settings.initialisations) - set(INITIALISATIONS))
    if unknown or not settings.initialisations:
        raise ValueError(
            f"initialisations must be of {', '.join(INITIALISATIONS)}, got "
            f"{', '.join(settings.initialisations) or 'none'}"
        )
    for name in ("initialisations", "fractions", "seeds"):
        values: Sequence[object] = getattr(settings, name)
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name} must be different from each other, at least one, got {list(values)}")
    shared = set(settings.fractions) & set(settings.ceiling_fractions)
    if shared or len(set(settings.ceiling_fractions)) < len(settings.ceiling_fractions):
        raise ValueError(
            "ceiling_fractions must be different from each other and from fractions, got "
            f"{list(settings.ceiling_fractions)} beside {list(settings.fractions)}"
        )
    if settings.jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {settings.jobs}")
    if not 0 <= settings.time_limit_s < float("inf"):
        raise ValueError(f"time_limit_s must be at least 0, got {settings.time_limit_s}")
    if min(settings.seeds) < 0:
        raise ValueError(f"seeds must be at least 0, got {list(settings.seeds)}")
    for task, classes in (settings.tasks or {}).items():
        if not task or not all(letter.isalnum() or letter in "._" for letter in task) or task[0] == ".":
            raise ValueError(f"tasks: a name must be of letters, digits, dots and underscores, got {task!r}")
        if not classes:
            raise ValueError(f"tasks: {task} has no classes")
    if settings.tasks is not None and not settings.tasks:
        raise ValueError("tasks must name at least one task, or be left out")


def _check_shared(pretrain: PretrainConfig, finetune: FinetuneConfig, initialisations: Sequence[str]) -> None:
    whole = pretrain.method.features == "decoder"
    if whole and "pgl" not in initialisations:
        raise ValueError(
            "pretrain.method.features decoder is an option of pgl, which is not among the initialisations "
            f"{', '.join(initialisations)}: leave it out"
        )
    if whole and finetune.decoder_convs != 1:
        raise ValueError(
            "finetune.decoder_convs must be 1 with pretrain.method.features decoder, as in the decoder that "
            f"is pretrained, got {finetune.decoder_convs}"
        )
    if finetune.encoder is not None and finetune.encoder != pretrain.encoder:
        raise ValueError(
            "finetune.encoder differs from pretrain.encoder, but all networks must be alike: leave it out"
        )
    if finetune.intensity is not None:
        raise ValueError("finetune.intensity must be left out: each initialisation brings its own")
    if finetune.source is not None:
        raise ValueError(
            "finetune.source must be left out: prepare the data into a cache and give it as data"
        )
