"""The words of ``pgl pretrain``."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from pgl.printing import say

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

Config = TypeVar("Config")


def pretrain_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``pgl pretrain``."""
    from pgl.config import PretrainConfig

    add_config(parser)
    parser.add_class_arguments(PretrainConfig)


def add_config(parser: ArgumentParser, examples: str = "configs/") -> None:
    """Add ``--config``, a file that the rest of the command line overrides; there are ``examples``."""
    parser.add_argument(
        "--config",
        action="config",
        metavar="FILE",
        help=f"YAML file with settings, see {examples}; what the command line says overrides it",
    )


def config_of(kind: type[Config], arguments: Namespace) -> Config:
    """The settings of that kind that the arguments hold besides ``--config``."""
    return kind(**{name: value for name, value in vars(arguments).items() if name != "config"})


def check_pretrain(arguments: Namespace) -> None:
    """Raise ValueError, which names the setting, for what cannot work."""
    from pgl.config import PretrainConfig
    from pgl.config_check import check

    check(config_of(PretrainConfig, arguments))


def pretrain(arguments: Namespace) -> int:
    """Run the pretraining and say where its report is."""
    from lightning_fabric.utilities.rank_zero import rank_zero_only

    from pgl.config import PretrainConfig
    from pgl.pretrain import pretrain
    from pgl.report import report_line

    config = config_of(PretrainConfig, arguments)
    pretrain(config)
    if getattr(rank_zero_only, "rank", 0) == 0:
        say(report_line(config.output))
    return 0
