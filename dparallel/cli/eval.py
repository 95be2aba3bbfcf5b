"""`dparallel eval`: measure a model on benchmarks, without the config of an experiment.

Samples and verdicts are those of the benchmark stage: equal models, problems and decodings have equal keys in
the store of a `runs` folder.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from dparallel.cli import display
from dparallel.cli.decoding_arguments import given_decoding
from dparallel.cli.eval_report import Json, report
from dparallel.cli.model import Decoding, decoding_of
from dparallel.config.base import ConfigError, UserError, nearest
from dparallel.config.benchmark import BenchmarkConfig
from dparallel.config.decoding import DecodingConfig
from dparallel.config.experiment import MEASUREMENTS
from dparallel.config.files import make_config, read_settings
from dparallel.config.paths import shipped_configs
from dparallel.config.problems import EMBEDDED, LM_EVAL, ProblemsConfig
from dparallel.decoding.generate import DecodingError, LengthError, check_prompts
from dparallel.evaluation.bench import Bench, Unit
from dparallel.evaluation.cases import Case
from dparallel.evaluation.measure import Measurement
from dparallel.evaluation.selection import Row
from dparallel.evaluation.sharing import make_here
from dparallel.evaluation.stage import measure
from dparallel.models.checkpoints import checkpoint_folder, load_tokenizer, read_config
from dparallel.models.commit_rule import check_commit_rule, read_commit_rule
from dparallel.models.defaults import read_defaults
from dparallel.models.placement import empty_model
from dparallel.preflight.checks import check_folder
from dparallel.problems.embedded import embedded_task
from dparallel.problems.prompts import encode_problems
from dparallel.problems.registry import data_of
from dparallel.problems.scorer import Measure
from dparallel.problems.scoring import scorers_of
from dparallel.stages.manifest import fingerprint

MODEL = "model"  # name of the only input
REPORTED = (  # fields of a `Measurement`
    "samples",
    "repeats",
    "nfe",
    "tpf",
    "tps",
    "latency",
    "batch_sizes",
    "hardware",
    "sandbox",
    "measured_on",
    "reused",
)
GENERATED_PROBLEMS = 200  # of an embedded task


@dataclass(frozen=True)
class Asked:
    """A measurement: the model on the problems of a protocol, with a decoding.

    Attributes:
        file: the protocol's file, if it has one.
        limit: number of problems asked for; None for all.
        changes: further settings of the problems, as given.
        found: the decoding, and where its settings come from.
    """

    name: str
    file: Path | None
    limit: int | None
    changes: Sequence[str]
    found: Decoding
    bench: Bench
    case: Case

    @property
    def total(self) -> int:
        """Number of responses."""
        return len(self.bench.problems["test"]) * len(self.repeated)

    @property
    def repeated(self) -> list[DecodingConfig]:
        """The decodings of all responses to a problem."""
        return self.bench.repeated("test", self.case.decoding)


def evaluate(options: argparse.Namespace) -> None:
    """Measure `--model` by every `--protocol`, and print the results.

    Raises:
        UserError: an option, the model, the data or this machine cannot be used; raised before decoding.
    """
    # 1. Check everything, first what does not need the weights.
    check_folder(options.runs)
    folder = checkpoint_folder(options.model, with_weights=False)
    everything = [ask(name, options, folder) for name in dict.fromkeys(options.protocol)]
    for asked in everything:
        with _named(asked.name):
            check(asked, options.model)
    checkpoint_folder(options.model)

    # 2. Measure
    results = []
    for asked in everything:
        result = _result(asked, options.model, _measure(asked))
        if options.json:
            print(json.dumps(result), flush=True)
        results.append(result)

    # 3. Report
    if not options.json:
        print(report(results))


def ask(protocol: str, options: argparse.Namespace, folder: Path) -> Asked:
    """The measurement of the model in `folder` by a protocol.

    Raises:
        ConfigError: the protocol is unknown or invalid, or an option does not fit it.
    """
    name, file, settings = problem_settings(protocol)
    if LM_EVAL in settings.values() and options.path is not None:
        raise ConfigError(
            f"--path {options.path} with {name}: tasks of lm-eval read files by split; give "
            f"--set data_files.test={options.path}, and data_files.train for examples"
        )
    given: Json = {"path": options.path}
    if options.limit is not None:
        given |= {"count": options.limit} if name in EMBEDDED else {"rows": f"[:{options.limit}]"}
    settings |= {key: value for key, value in given.items() if value is not None}
    problems = make_config(ProblemsConfig, settings, name, options.set)
    for key in ("rows", "count"):
        if key in given and getattr(problems, key) != given[key]:
            raise ConfigError(
                f"--limit {options.limit} with {key}={getattr(problems, key)} in --set: give one of them"
            )
    with _named(name):
        published = problems.protocol.decoding
        stated = {} if published is None else published.stated()
        found = decoding_of(
            options, folder, _own_blocks(stated, options, folder) if name in EMBEDDED else stated
        )
        decoding = found.decoding
        _check_repeatable(decoding)
        config = BenchmarkConfig(test=problems, reference=decoding, batch_size=options.batch_size)
    bench = Bench(config, {MODEL: str(folder)}, options.runs / MEASUREMENTS)
    return Asked(name, file, options.limit, options.set, found, bench, Case(MODEL, name, decoding))


def _own_blocks(stated: Json, options: argparse.Namespace, folder: Path) -> Json:
    """An embedded task's decoding, without its blocks where those of the checkpoint's decode defaults fit.

    A student is decoded in the blocks that it was trained for; a published protocol fixes its blocks.
    """
    length = given_decoding(options).get("gen_length") or stated.get("gen_length") or 0
    blocks = read_defaults(folder).settings.get("block_length")
    fits = type(blocks) is int and blocks > 0 and length % blocks == 0
    return {key: value for key, value in stated.items() if not (fits and key == "block_length")}


def problem_settings(protocol: str) -> tuple[str, Path | None, Json]:
    """Name, file and problem settings of a protocol: a file, a name, `lm_eval:TASK`, or an embedded task."""
    kind, colon, task = protocol.partition(":")
    if kind == LM_EVAL and not task:
        raise ConfigError(f"--protocol {protocol}: name a task, as {LM_EVAL}:gsm8k_cot_zeroshot")
    if kind == LM_EVAL and colon:
        return protocol, None, {"benchmark": LM_EVAL, "task": task}
    if protocol in EMBEDDED:
        embedded = embedded_task(protocol)
        decoding = {"gen_length": embedded.response_length, "block_length": embedded.block_length}
        generated = {"benchmark": protocol, "split": "test", "count": GENERATED_PROBLEMS}
        return protocol, None, {**generated, "protocol": {"decoding": decoding}}
    file = protocol_file(protocol)
    return file.stem, file, {"benchmark": "dataset", "protocol": read_settings(file)}


def protocol_file(given: str) -> Path:
    """The file of a protocol that is given by its path, or by its name.

    Names are looked up in `configs/protocols/` of the working folder, then among the protocols that come with
    the package.

    Raises:
        ConfigError: there is no such protocol; names those that exist.
    """
    path = Path(os.path.expanduser(given))
    if path.suffix in (".yaml", ".yml", ".json") or len(path.parts) > 1:
        return path
    folders = [Path("configs", "protocols"), shipped_configs() / "protocols"]
    for folder in folders:
        if os.path.isfile(file := folder / f"{given}.yaml"):
            return file
    known = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
    known += EMBEDDED
    raise ConfigError(
        f"--protocol {given}: unknown; {nearest(given, known)}known: {', '.join(known)}; or give a file, or "
        f"{LM_EVAL}:TASK"
    )


def check(asked: Asked, model: str) -> None:
    """Check the data, what the scorers need, and that the model can decode every prompt.

    Raises:
        UserError: names what cannot be used, and the remedy.
    """
    problems = asked.bench.problems["test"]  # reads the data and checks that they can be judged
    tokenizer, empty = load_tokenizer(model), empty_model(read_config(model))
    with suppress(LengthError):  # which length fits, the prompts say
        check_prompts(empty, [], asked.case.decoding)
    check_commit_rule(asked.case.decoding, read_commit_rule(checkpoint_folder(model, with_weights=False)))
    encode_problems(problems, asked.bench.protocol("test"), tokenizer, empty, asked.case.decoding)


def _check_repeatable(decoding: DecodingConfig) -> None:
    if decoding.temperature > 0 and decoding.seed is None:
        raise ConfigError(
            f"--temperature {decoding.temperature:g} without a seed: give --seed; otherwise a measurement "
            "that was interrupted would go on with other draws"
        )


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Errors name the protocol that they belong to."""
    try:
        yield
    except UserError as error:
        raise ConfigError(f"{name}: {error}") from error


def _measure(asked: Asked) -> Row:
    """Decode and judge what is missing, with progress on stderr.

    An exception gets a note that says what is kept and how to continue.
    """
    bench, case, total = asked.bench, asked.case, asked.total
    missing = sum(unit.slice[1] - unit.slice[0] for unit in bench.missing([case], "test"))
    here = f"; {total - missing} are in {bench.store.folder}" if missing < total else ""
    _say(f"{asked.name}: {missing} of {total} responses to decode{here}")
    if asked.found.note is not None:
        _say(f"{asked.name}: {asked.found.note}")
    if note := bench.copies("test", case.decoding):
        _say(f"{asked.name}: {note}")

    def make(units: Sequence[Unit]) -> None:
        if units and units[0].kind == "samples":
            with display.progress(sys.stderr, total, total - missing) as count:
                make_here(bench, units, lambda place, generation: count())
        elif units:
            _say(f"{asked.name}: judging")
            make_here(bench, units)

    try:
        [row] = measure(bench, make, [case], "test")
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise DecodingError(f"{asked.name}: {error}") from error
    except BaseException as error:
        keys = [bench.samples_key(MODEL, "test", repeat) for repeat in asked.repeated]
        kept = sum(len(bench.store.samples(key)) for key in keys)
        error.add_note(f"{asked.name}: {kept} of {total} responses are kept in {bench.store.folder}")
        if not isinstance(error, UserError):  # whose message names the remedy
            error.add_note("run the same command again to continue")
        raise
    return row


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _result(asked: Asked, model: str, row: Row) -> Json:
    """Everything that is reported of a measurement, as JSON values."""
    bench, measured = asked.bench, row.measurement
    protocol, store = bench.protocol("test"), bench.store
    scorers = scorers_of(protocol)
    assert row.keys is not None
    names = [scorer.name for scorer in scorers]
    verdicts = {
        name: str(store.verdicts_folder(key)) for name, key in zip(names, row.keys.verdicts, strict=True)
    }
    of_protocol = bench.config.test.protocol.decoding or DecodingConfig()
    stated = of_protocol.model_fields_set  # the others have dparallel's defaults
    published, used = (decoding.model_dump(mode="json") for decoding in (of_protocol, measured.decoding))
    return {
        "model": model,
        "fingerprint": fingerprint(bench.inputs[MODEL]),
        "protocol": asked.name,
        "version": protocol.version,
        "protocol_file": None if asked.file is None else str(asked.file),
        "licence": protocol.licence,
        "data": data_of(bench.config.test),
        "limit": asked.limit,
        "set": list(asked.changes),
        "metrics": {
            metric: _metric(measured, metric, scorer.measure(metric))
            for scorer in scorers
            for metric in scorer.metrics
        },
        **measured.model_dump(mode="json", include=set(REPORTED)),
        "decoding": used,
        "of_checkpoint": dict(asked.found.of_checkpoint),
        "overridden": {
            name: {"protocol" if name in stated else "default": published[name], "used": used[name]}
            for name in used
            if used[name] != published[name] and name not in asked.found.of_checkpoint
        },
        "files": {
            "samples": str(store.samples_folder(row.keys.samples)),
            **(
                {"repeats": list(map(str, map(store.samples_folder, row.keys.repeats)))}
                if row.keys.repeats
                else {}
            ),
            "verdicts": verdicts,
        },
    }


def _metric(measured: Measurement, name: str, measure: Measure) -> Json:
    """The number of a metric: a share (0..1) of its best value, or a score on a scale without one.

    Its `kind` is `correct` (a share of correct responses), `mean`, or `pooled` (of all responses together).
    """
    known = {"judged": measured.judged.get(name, 0), "kind": measured.kind(name)}
    if measure.lower_is_better:
        known["lower_is_better"] = True
    if name in measured.scores:
        return {"score": measured.scores[name], "stderr": measured.stderrs[name], **known}
    interval = measured.intervals.get(name)
    return {
        "share": measured.metrics.get(name),
        "stderr": measured.errors.get(name),
        "interval": None if interval is None else list(interval),
        **known,
    }
