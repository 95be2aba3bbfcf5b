"""A self-contained HTML page that replays a decoding, one forward pass at a time."""

from collections.abc import Sequence

from markupsafe import Markup
from transformers import PreTrainedTokenizerBase

from dparallel.config.decoding import DecodingConfig
from dparallel.decoding.canvas import Generation, Step
from dparallel.models.backbone import DiffusionConfig
from dparallel.pages.html import policy, template
from dparallel.pages.replay.drawing import Replays, script, style


def trace_page(
    model_name: str,
    decoding: DecodingConfig,
    tokenizer: PreTrainedTokenizerBase,
    config: DiffusionConfig,
    prompts: Sequence[str],
    generations: Sequence[Generation],
    steps: Sequence[Step],
    note: str | None = None,
) -> str:
    """The page as text; it loads no other resources.

    Args:
        prompts, generations: per row, in order.
        steps: all Steps reported by `generate`, in order.
        note: a sentence to show, such as that prompts were omitted.
    """
    forwards: list[list[Step]] = [[] for _ in generations]
    for step in steps:
        forwards[step.row].append(step)
    replays = Replays(readings=True)
    for row, (prompt, generation) in enumerate(zip(prompts, generations, strict=True)):
        replays.add(
            subject="",
            label=f"{row + 1} of {len(prompts)}: {' '.join(prompt.split())[:120]}",
            prompt=prompt,
            decoding=decoding,
            tokenizer=tokenizer,
            end_token_ids=config.end_token_ids,
            tokens=generation.tokens,
            commit_step=generation.commit_step,
            confidence=generation.confidence,
            nfe=generation.nfe,
            num_tokens=generation.num_tokens,
            steps=forwards[row],
        )
    code = f"\n{script()}"
    return template(__package__, "page.html").render(
        policy=policy([code]),
        model=model_name,
        note=note,
        style=Markup(style()),
        replay=replays.html("Prompt"),
        script=Markup(code),
    )
