"""Judge: turn samples into verdicts, on the CPU. A corrected scorer judges stored samples again."""

from collections.abc import Sequence

import pyarrow as pa

from dparallel.config.problems import ProtocolConfig
from dparallel.evaluation.bench import Bench, Split
from dparallel.models.checkpoints import read_config
from dparallel.problems.prompts import finish
from dparallel.problems.registry import problems_digest
from dparallel.problems.scoring import Scorer, scorers_of
from dparallel.problems.sources import Problem
from dparallel.stages.code import PROMPTS, SCORERS, code_digest
from dparallel.stages.manifest import digest

Verdicts = dict[str, list[bool | None]]  # of every sample, by the names of metrics; None where unknown


def judge(bench: Bench, model: str, split: Split, samples_key: str, samples: pa.Table) -> dict[str, Verdicts]:
    """Verdicts of all scorers of a split's protocol, by their keys in the store.

    Scorers whose verdicts are stored are not run again.
    """
    protocol: ProtocolConfig = getattr(bench.config, split).protocol
    problems = bench.problems[split]
    verdicts = {}
    for scorer in scorers_of(protocol):
        key = verdicts_key(samples_key, problems, protocol, scorer)
        table = bench.store.verdicts(key)
        if table is None:
            table = _judge(bench, model, problems, protocol, scorer, samples)
            bench.store.put_verdicts(key, table)
        verdicts[key] = {metric: table[metric].to_pylist() for metric in scorer.metrics}
    return verdicts


def _judge(
    bench: Bench,
    model: str,
    problems: Sequence[Problem],
    protocol: ProtocolConfig,
    scorer: Scorer,
    samples: pa.Table,
) -> pa.Table:
    tokenizer, end_token_ids = bench.tokenizer(model), read_config(bench.inputs[model]).end_token_ids
    responses = [
        finish(tokens, tokenizer, end_token_ids, protocol.stops)
        for tokens in samples["response_ids"].to_pylist()
    ]
    rows = [
        {
            "problem_id": problem.problem_id,
            "prompt": problem.prompt,
            "reference": problem.reference,
            "response": response,
            **verdict,
        }
        for problem, response, verdict in zip(
            problems, responses, scorer.score(problems, responses), strict=True
        )
    ]
    texts = [(name, pa.string()) for name in ("problem_id", "prompt", "reference", "response")]
    return pa.Table.from_pylist(
        rows, schema=pa.schema([*texts, *((metric, pa.bool_()) for metric in scorer.metrics)])
    )


def verdicts_key(
    samples_key: str, problems: Sequence[Problem], protocol: ProtocolConfig, scorer: Scorer
) -> str:
    """Names verdicts by what they follow from: responses, problems, the code that ends and judges them."""
    made_from = {
        "samples": samples_key,
        "problems": problems_digest(problems, extra=True),
        "stops": protocol.stops,
        "scorer": [scorer.name, scorer.version],
        "code": code_digest({*PROMPTS, *SCORERS.get(scorer.name, ())}),
    }
    return digest(made_from)[:16]
