"""The model card of an exported model: how it is loaded and decoded, and what was measured of it."""

import json
from pathlib import Path
from typing import NamedTuple

from dparallel.config.decoding import DecodingConfig
from dparallel.config.modes import modes_of
from dparallel.models.backbone import DiffusionConfig
from dparallel.reporting.find import find_run
from dparallel.reporting.read import read_benchmark

REMOTE = "AutoModel.from_pretrained(FOLDER, trust_remote_code=True)  # or dparallel.load_model(FOLDER)"
LOADED = {
    "native": REMOTE,
    "original": REMOTE,
    "llama": "AutoModelForCausalLM.from_pretrained(FOLDER)  # with the attention above, which engines set",
    "adapter": "dparallel.load_model(MODEL, adapter=FOLDER)  # or PEFT on the publisher's code",
}

MERGED = (
    "dparallel merge --model MODEL --adapter FOLDER --attention {} --out MERGED  # then load_model(MERGED)"
)


class Results(NamedTuple):
    """The table of a benchmark stage, and what its numbers depend on."""

    name: str
    table: str
    devices: list[str]
    protocol: str
    data: list[str]


def results_of(run: str, runs: Path) -> list[Results]:
    """Results of the benchmarks of a run.

    Raises:
        UserError: it names no finished run.
    """
    found = []
    for name, folder in find_run(run, runs).stages:
        benchmark = read_benchmark(name, folder)
        settings = {name: value for name, value in benchmark.protocol.items() if value}
        table = (folder / "table.md").read_text(encoding="utf-8").strip()
        described = str(settings.get("name") or settings.get("prompt"))
        found.append(Results(name, table, benchmark.devices, described, benchmark.data))
    return found


def model_card(
    model: str,
    adapter: str | None,
    format: str,
    config: DiffusionConfig,
    decoding: DecodingConfig | None,
    results: list[Results],
    other: bool = False,
    merged_first: bool = False,
) -> str:
    """The model card as Markdown.

    Args:
        model, adapter: what was exported, as the user named it; of local folders the last part is shown.
        decoding: decode defaults; None if there are none, as of an adapter.
        other: whether `generate` of the written model code cannot decode by them, or at all.
        merged_first: whether an adapter has to be merged, since it was trained with another attention pattern
            than the base model states.
    """
    attention = config.attention_pattern or "full"
    modes = " or ".join(modes_of(attention))
    parts = [_named(model), *([] if adapter is None else [f"the adapter {_named(adapter)}"])]
    lines = [
        "---",
        "library_name: transformers",
        "tags: [diffusion-language-model, dparallel]",
        "---",
        f"# {parts[-1].removeprefix('the adapter ')}",
        f"Exported by `dparallel export --format {format}` from {' with '.join(parts)}. A masked diffusion "
        f"language model ({config.family}) with {attention} attention, for decoding in mode {modes}; mask "
        f"token {config.mask_token_id}, end tokens {', '.join(map(str, config.end_token_ids))}.",
        "",
        "```sh" if merged_first else "```python",
        MERGED.format(attention) if merged_first else LOADED[format],
        "```",
    ]
    if decoding is not None:
        stated = json.dumps(decoding.portable(), indent=1)
        lines += ["", "## Decode defaults", "```json", stated, "```"]
    if other:
        lines += [
            "",
            "`dparallel.generate` decodes it. `generate` of the model code here cannot decode so: it is for "
            "full attention, without a cache, by the settings under `dparallel` in config.json.",
        ]
    for result in results:
        lines += ["", f"## Measured: {result.name}", result.table, ""]
        lines += [f"Device: {', '.join(result.devices)}. Problems: {'; '.join(result.data)}."]
        lines += [f"Protocol: {result.protocol!r}."]
    if not results:
        lines += ["", "Nothing was measured for this card; `--run` puts the table of a benchmark here."]
    return "\n".join(lines) + "\n"


def _named(place: str) -> str:
    return Path(place).name if Path(place).exists() else place
