"""Decodings of baselines that a config does not state: the decode defaults of their checkpoints."""

import json
import logging

from dparallel.config.base import ConfigError
from dparallel.config.experiment import DistillConfig
from dparallel.config.files import quoted
from dparallel.models.defaults import read_defaults
from dparallel.models.hub import checkpoint_folder

log = logging.getLogger(__name__)


def baseline_decodings(config: DistillConfig) -> list[str]:
    """Overrides `key.sub=value` that give every baseline a decoding.

    Raises:
        ConfigError: neither the config nor the checkpoint states how a baseline is decoded.
        CheckpointError: a checkpoint does not exist, or its decode defaults cannot be used.
    """
    overrides = []
    for name, benchmark in config.benchmarks.items():
        for rival, baseline in benchmark.baselines.items():
            if baseline.decoding is not None:
                continue
            place = f"benchmarks.{quoted(name)}.baselines.{quoted(rival)}.decoding"
            defaults = read_defaults(checkpoint_folder(baseline.model, with_weights=False))
            if not defaults.settings:
                raise ConfigError(
                    f"{place}: required, since {baseline.model} states no decode defaults "
                    f"(in {defaults.file.name}): say how it is decoded"
                )
            decoding, kept = defaults.resolve()
            log.info("%s: decoding with %s", place, defaults.sentence(kept))
            overrides.append(f"{place}={json.dumps(decoding.portable())}")
    return overrides
