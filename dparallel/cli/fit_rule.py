"""`dparallel fit-rule`: fit the commit rule of a checkpoint on recorded trajectories."""

import argparse
import os
import sys
import time
from pathlib import Path

from dparallel.config.base import ConfigError
from dparallel.config.experiment import CommitRuleConfig
from dparallel.config.files import make_config
from dparallel.distillation.commit_rule import fit_on
from dparallel.models.checkpoints import load_model
from dparallel.models.commit_rule import write_commit_rule
from dparallel.models.threads import fitting_threads
from dparallel.preflight.checks import check_folder
from dparallel.rules.declaration import COMMIT_RULE
from dparallel.stages.files import is_there
from dparallel.stages.manifest import MANIFEST, read_manifest


def fit_rule(options: argparse.Namespace) -> None:
    """Fit the rule, write it into the folder of `--model`, and print how well it does.

    Raises:
        UserError: an option, the model or the trajectories cannot be used, or the folder cannot be written.
    """
    folder = _own_folder(options.model)
    config = make_config(CommitRuleConfig, {}, "fit-rule", options.set)
    model, began = load_model(options.model, options.device, options.dtype), time.perf_counter()
    with fitting_threads(model, config.canvases):
        rule = fit_on(model, options.trajectories, config)
    write_commit_rule(folder, rule)
    found = rule.fitted
    taken = f"{found['trajectories']} trajectories: {found['examples']:,} examples"
    print(f"{folder / COMMIT_RULE}, fitted on {taken}")
    print(
        f"held-out log loss {found['log_loss']:.4f}, of the model's own probability "
        f"{found['log_loss_of_probability']:.4f}; {found['final']:.1%} of the predictions are final"
    )
    print(
        f"took {time.perf_counter() - began:.1f} s; decode with --rule learned --threshold", file=sys.stderr
    )


def _own_folder(model: str) -> Path:
    """The model's folder, if a commit rule can be written there."""
    folder = Path(os.path.expanduser(model))
    if not folder.is_dir():
        raise ConfigError(
            f"--model {model}: the rule is written into the model's folder; give one of this machine"
        )
    check_folder(folder)
    if is_there(folder / MANIFEST) and COMMIT_RULE in read_manifest(folder).files:
        raise ConfigError(
            f"--model {model}: its {COMMIT_RULE} is a result of its stage; change merging.commit_rule in the "
            "experiment's config, or copy the model's files to a folder of their own"
        )
    return folder
